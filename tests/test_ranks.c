/* Several ranks run one model: they give the same bits as one rank, and an error on one rank is an error on all.
   Variants: asan tsan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"
#include "tests/hash.h"
#include "tests/ranks.h"

/* ---- The committed hashes, in tensor parallel ---- */

typedef struct hash_job {
    const char *isa;
    int type, n_threads;
    bool staged; /* a pipeline; else tensor parallel */
} hash_job;

/* The small model has 2 key heads, 6 query heads, 5 tiles of n_embd, 4 lines of n_ff and one part of a vocabulary. */
static void hash_tiny(llm_comm *comm, void *arg) {
    const hash_job *job = (const hash_job *)arg;
    const expected *e = &EXPECTED[job->type];
    llm_model *model = load(e, job->isa, job->staged ? NULL : comm, job->staged ? comm : NULL);
    if (!model) return; /* this machine does not have the instruction set */
    llm_context *ctx = create(model, e->cache, job->n_threads, 0), *small = create(model, e->cache, job->n_threads, 37);
    for (int way = job->n_threads == 1 && !SANITIZED ? 0 : WAYS_OF_ONE; way < WAYS; way++) {
        bool chosen = way == WAYS_OF_ONE + job->type % (WAYS - WAYS_OF_ONE);
        if (THREAD_SANITIZED && !chosen) continue; /* all take minutes there */
        RANK_CHECK(go(way, ctx, small) == e->tiny, "the logits have other bits");
    }
    llm_context_free(ctx);
    llm_context_free(small);
    llm_model_free(model);
}

static void test_hashes(void **state) {
    (void)state;
    for (int n = 2; n <= 4; n++)
        for (int type = 0; type < (int)(sizeof EXPECTED / sizeof *EXPECTED); type++) {
            hash_job job = {type % 2 ? "avx2" : NULL, type, n == 2 ? 2 : 1, false};
            if (type % 3 != n % 3 && (SANITIZED || type > 3)) continue;
            on_ranks(n, NULL, hash_tiny, &job);
            job.staged = true;
            if (n == 2) on_ranks(n, NULL, hash_tiny, &job);
        }
    hash_job alone = {NULL, 1, 1, false}, many = {NULL, 1, 1, false};
    on_ranks(1, NULL, hash_tiny, &alone);
    on_ranks(MOST_RANKS, NULL, hash_tiny, &many); /* more ranks than heads, lines or tiles */
}

/* The default model: 3 key heads, 9 query heads, 96 parts of the vocabulary. */
static void hash_default(llm_comm *comm, void *arg) {
    const hash_job *job = (const hash_job *)arg;
    llm_comm *tensor = job->staged ? NULL : comm, *pipeline = job->staged ? comm : NULL;
    RANK_CHECK(hash_real(&EXPECTED[job->type], 32, job->n_threads, tensor, pipeline) == EXPECTED[job->type].real,
               "the logits have other bits");
}

static void test_default_model(void **state) {
    (void)state;
    if (THREAD_SANITIZED) {
        print_message("skipped: takes minutes with the thread sanitizer; the small models run the same code on as many "
                      "threads\n");
        skip();
    }
    for (int n = 2; n <= (SANITIZED ? 2 : 4); n++)
        for (int type = 0; type < (int)(sizeof EXPECTED / sizeof *EXPECTED); type++) {
            hash_job job = {NULL, type, 1, false};
            if (SANITIZED && type != 1) continue;
            if (!EXPECTED[type].real || (type != 1 && n != 2 + type % 3))
                continue; /* bf16 runs with each n, the other types with one n each */
            on_ranks(n, NULL, hash_default, &job);
            job.staged = true;
            on_ranks(n, NULL, hash_default, &job);
        }
}

/* ---- Scoring, generation, drafts and saved sequences give the results of one rank ---- */

/* 856 tokens are 2 parts of a vocabulary; 14 heads share 2 key heads. */
static const tiny_spec WIDE = {3, 96, 160, 14, 2, 16, 256, 600, 1, 0, 5};
enum { WIDE_VOCAB = 856, QUESTIONS = 7, ENDINGS = 3 };

static llm_model *load_wide(llm_dtype dtype, llm_comm *tensor, llm_comm *pipeline) {
    llm_model *model = NULL;
    llm_error err;
    llm_model_desc desc = {.dtype = dtype, .n_threads = 1, .tensor = tensor, .pipeline = pipeline};
    RANK_CHECK(try_tiny(&model, &WIDE, desc, &err) == LLM_OK, err.message);
    return model;
}

static llm_context *open_wide(const llm_model *model, int n_threads) {
    llm_context *ctx = NULL;
    llm_error err;
    llm_context_desc desc = {.n_ctx = 200, .n_seq = 9, .n_batch = 48, .n_logits = 16, .n_threads = n_threads};
    RANK_CHECK(llm_context_create(&ctx, model, &desc, &err) == LLM_OK, err.message);
    return ctx;
}

/* The results of a rank. All ranks must get the same bytes as a single rank. */
typedef struct findings {
    llm_dtype dtype;
    int n_threads;
    double scores[3][QUESTIONS * ENDINGS];
    llm_token texts[6][60];
    int lengths[6];
    int n_told; /* calls of on_question */
} findings;

static bool count_question(void *user, int question, const double *log_likelihoods) {
    (void)question, (void)log_likelihoods;
    ++*(int *)user;
    return true;
}

/* Scores with three schedules. If `refuses` is not NULL, scores only with the packed one, which that callback stops. */
static void score(llm_context *ctx, findings *f,
                  bool (*refuses)(void *user, int question, const double *log_likelihoods)) {
    static const llm_schedule schedules[3] = {LLM_SCHEDULE_PACKED, LLM_SCHEDULE_FIXED, LLM_SCHEDULE_DP};
    llm_token contexts[QUESTIONS][30], endings[QUESTIONS][ENDINGS][20];
    const llm_token *lists[QUESTIONS][ENDINGS];
    int lengths[QUESTIONS][ENDINGS];
    llm_question questions[QUESTIONS];
    llm_error err;
    uint32_t x = 1;
    for (int i = 0; i < QUESTIONS; i++) {
        llm_question q = {contexts[i], 3 + 4 * i, ENDINGS, lists[i], lengths[i]};
        for (int j = 0; j < 30; j++) contexts[i][j] = (llm_token)((x = x * 1664525u + 1013904223u) >> 8) % WIDE_VOCAB;
        for (int e = 0; e < ENDINGS; e++) {
            lists[i][e] = endings[i][e];
            lengths[i][e] = 1 + (i * 5 + e * 7) % 20;
            for (int j = 0; j < 20; j++)
                endings[i][e][j] = (llm_token)((x = x * 1664525u + 1013904223u) >> 8) % WIDE_VOCAB;
        }
        questions[i] = q;
    }
    if (refuses) {
        llm_score_desc desc = {.on_question = refuses, .user = &f->n_told};
        RANK_CHECK(llm_score(ctx, questions, QUESTIONS, &desc, f->scores[0], NULL, &err) == LLM_ERROR_CANCELLED,
                   "scoring did not stop");
        assert_explained(LLM_ERROR_CANCELLED, &err);
        return;
    }
    for (int i = 0; i < 3; i++) {
        llm_score_desc desc = {.schedule = schedules[i], .on_question = count_question, .user = &f->n_told};
        RANK_CHECK(llm_score(ctx, questions, QUESTIONS, &desc, f->scores[i], NULL, &err) == LLM_OK, err.message);
    }
}

typedef struct writer {
    llm_token *tokens;
    int n, last, n_polls, last_poll;
} writer;

static bool write_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    writer *w = (writer *)user;
    (void)bytes, (void)n_bytes;
    if (w->n < 60) w->tokens[w->n] = token;
    return ++w->n != w->last;
}

static bool poll(void *user) {
    writer *w = (writer *)user;
    return ++w->n_polls == w->last_poll;
}

static llm_stats generate(llm_context *ctx, llm_generate_desc desc, writer *w) {
    static const llm_token prompt[] = {1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3};
    llm_stats stats;
    llm_error err;
    desc.tokens = prompt;
    desc.n_tokens = 17;
    desc.max_tokens = 60;
    desc.ignore_end = true;
    desc.on_token = write_token;
    if (w->last_poll) desc.cancel = poll;
    desc.user = w;
    RANK_CHECK(llm_seq_truncate(ctx, desc.seq, 0, &err) == LLM_OK, err.message);
    RANK_CHECK(llm_generate(ctx, &desc, &stats, &err) == LLM_OK, err.message);
    return stats;
}

/* Generates five texts: greedy; drawn; with lookup; with the same weights in int8 as a draft that is split over the
   ranks like the model; with the same draft whole on each rank. */
static void write_texts(llm_context *ctx, findings *f, llm_comm *tensor, llm_comm *pipeline) {
    llm_sampler warm = {.temperature = 1.2f, .top_p = 0.9f, .seed = 3};
    llm_draft lookup = llm_draft_lookup(), draft;
    llm_error err;
    for (int i = 0; i < 5; i++) {
        llm_sampler sampler = warm;
        writer w = {f->texts[i], 0, 0, 0, 0};
        llm_generate_desc desc = {.seq = i, .sampler = i == 1 || i == 3 ? &sampler : NULL, .draft_keeps_text = true};
        llm_model *other = i < 3 ? NULL : load_wide(LLM_DTYPE_INT8, i == 3 ? tensor : NULL, i == 3 ? pipeline : NULL);
        if (i == 2) desc.draft = &lookup;
        if (other) {
            RANK_CHECK(llm_draft_model(&draft, ctx, other, &err) == LLM_OK, err.message);
            desc.draft = &draft;
        }
        llm_stats stats = generate(ctx, desc, &w);
        f->lengths[i] = stats.n_generated;
        if (other) llm_draft_free(&draft);
        llm_model_free(other);
    }
}

/* Saves a sequence, restores it, and generates from it. */
static void save(llm_context *ctx, findings *f) {
    llm_error err;
    size_t size = llm_seq_save_size(ctx, 0);
    void *bytes = malloc(size);
    writer w = {f->texts[5], 0, 0, 0, 0};
    RANK_CHECK(bytes != NULL, "no memory");
    RANK_CHECK(llm_seq_save(ctx, 0, bytes, size, &err) == LLM_OK, err.message);
    RANK_CHECK(llm_seq_restore(ctx, 8, bytes, size, &err) == LLM_OK, err.message);
    free(bytes);
    llm_token more[60];
    int length = llm_seq_length(ctx, 8);
    memcpy(more, llm_seq_tokens(ctx, 8), 60 * sizeof *more);
    llm_generate_desc desc = {.tokens = more,
                              .n_tokens = 60,
                              .seq = 8,
                              .max_tokens = 60,
                              .ignore_end = true,
                              .on_token = write_token,
                              .user = &w};
    llm_stats stats;
    RANK_CHECK(length > 60, "the sequence is too short");
    RANK_CHECK(llm_generate(ctx, &desc, &stats, &err) == LLM_OK, err.message);
    RANK_CHECK(stats.n_reused == 59, "the restored sequence was computed again");
    f->lengths[5] = stats.n_generated;
}

static void find(findings *f, llm_comm *tensor, llm_comm *pipeline) {
    llm_model *model = load_wide(f->dtype, tensor, pipeline);
    llm_context *ctx = open_wide(model, f->n_threads);
    score(ctx, f, NULL);
    write_texts(ctx, f, tensor, pipeline);
    save(ctx, f);
    llm_context_free(ctx);
    llm_model_free(model);
}

static void find_the_same(const findings *expected, llm_comm *tensor, llm_comm *pipeline) {
    findings f;
    memset(&f, 0, sizeof f);
    f.dtype = expected->dtype;
    f.n_threads = expected->n_threads;
    find(&f, tensor, pipeline);
    RANK_CHECK(!memcmp(f.scores, expected->scores, sizeof f.scores), "the log-likelihoods differ");
    RANK_CHECK(!memcmp(f.texts, expected->texts, sizeof f.texts), "the texts differ");
    RANK_CHECK(!memcmp(f.lengths, expected->lengths, sizeof f.lengths), "the texts have other lengths");
    RANK_CHECK(f.n_told == expected->n_told, "the number of on_question calls differs");
}

static void find_in_tensor_parallel(llm_comm *comm, void *arg) { find_the_same((const findings *)arg, comm, NULL); }
static void find_in_a_pipeline(llm_comm *comm, void *arg) { find_the_same((const findings *)arg, NULL, comm); }

/* Two tensor groups are the stages of two pipelines. */
typedef struct grid {
    const findings *alone;
    llm_comm *tensor[2][2], *pipeline[2][2]; /* [stage][shard], [shard][stage] */
} grid;

static void find_in_a_grid(llm_comm *comm, void *arg) {
    const grid *g = (const grid *)arg;
    int stage = comm->rank / 2, shard = comm->rank % 2;
    find_the_same(g->alone, g->tensor[stage][shard], g->pipeline[shard][stage]);
    llm_comm_free(g->tensor[stage][shard]);
    llm_comm_free(g->pipeline[shard][stage]);
}

static void test_same_results(void **state) {
    (void)state;
    for (int dtype = LLM_DTYPE_F32; dtype <= LLM_DTYPE_F16; dtype++) {
        static findings alone;
        if (dtype != LLM_DTYPE_BF16 && (dtype != LLM_DTYPE_INT8 || SANITIZED))
            continue; /* other types differ only in their products */
        memset(&alone, 0, sizeof alone);
        alone.dtype = (llm_dtype)dtype;
        alone.n_threads = 1;
        find(&alone, NULL, NULL);
        for (int n = 2; n <= 4; n++) {
            alone.n_threads = n == 2 ? 2 : 1;
            on_ranks(n, NULL, find_in_tensor_parallel, &alone);
            if (n <= WIDE.n_layers) on_ranks(n, NULL, find_in_a_pipeline, &alone);
        }
        grid g;
        g.alone = &alone;
        for (int i = 0; i < 2; i++) {
            assert_int_equal(llm_comm_threads(g.tensor[i], 2, NULL, NULL), LLM_OK);
            assert_int_equal(llm_comm_threads(g.pipeline[i], 2, NULL, NULL), LLM_OK);
        }
        on_ranks(4, NULL, find_in_a_grid, &g);
    }
}

/* A sequence saved by several ranks has the same bytes as one saved by a single rank, so any number of ranks can
   continue it. */
typedef struct saved {
    uint8_t *bytes;
    size_t size;
} saved;

static void save_sequence(llm_comm *comm, void *arg) {
    saved *s = (saved *)arg;
    llm_model *model = load_wide(LLM_DTYPE_BF16, comm, NULL);
    llm_context *ctx = open_wide(model, 1);
    llm_token tokens[100];
    llm_error err;
    for (int i = 0; i < 100; i++) tokens[i] = token_at(0, i);
    llm_batch batch = {100, tokens, NULL, NULL};
    RANK_CHECK(llm_forward(ctx, &batch, &err) == LLM_OK, err.message);
    size_t size = llm_seq_save_size(ctx, 0);
    uint8_t *bytes = (uint8_t *)calloc(size, 1);
    RANK_CHECK(bytes != NULL, "no memory");
    RANK_CHECK(llm_seq_save(ctx, 0, bytes, size, &err) == LLM_OK, err.message);
    if (!comm) {
        s->bytes = bytes;
        s->size = size;
    } else {
        RANK_CHECK(size == s->size && !memcmp(bytes, s->bytes, size), "the saved sequence differs");
        free(bytes);
    }
    llm_context_free(ctx);
    llm_model_free(model);
}

static void test_saved(void **state) {
    saved s;
    (void)state;
    save_sequence(NULL, &s);
    for (int n = 2; n <= 4; n++) on_ranks(n, NULL, save_sequence, &s);
    free(s.bytes);
}

/* ---- A rank stops a call, and the next calls work again ---- */

static bool refuse_the_second(void *user, int question, const double *log_likelihoods) {
    (void)question, (void)log_likelihoods;
    return ++*(int *)user != 2;
}

static void stop_and_go_on(const findings *expected, llm_comm *comm, llm_comm *tensor, llm_comm *pipeline) {
    llm_model *model = load_wide(LLM_DTYPE_BF16, tensor, pipeline);
    llm_context *ctx = open_wide(model, 1);
    llm_token tokens[60];
    bool me = comm->rank == comm->size - 1;
    writer refuses = {tokens, 0, me ? 20 : 0, 0, 0}, cancels = {tokens, 0, 0, 0, me ? 50 : 1 << 30},
           whole = {tokens, 0, 0, 0, 0};
    llm_stats stats = generate(ctx, (llm_generate_desc){.seq = 0}, &refuses);
    RANK_CHECK(stats.stop == LLM_STOP_CALLBACK && stats.n_generated == 20,
               "a rank continued when another's callback returned false");
    int length = llm_seq_length(ctx, 0);
    RANK_CHECK(length == 17 + 19, "the sequence has the wrong length");
    stats = generate(ctx, (llm_generate_desc){.seq = 0}, &cancels);
    RANK_CHECK(stats.stop == LLM_STOP_CALLBACK && stats.n_generated < 40, "a rank continued after another's cancel");
    stats = generate(ctx, (llm_generate_desc){.seq = 0}, &whole);
    RANK_CHECK(stats.n_generated == 60 && !memcmp(tokens, expected->texts[0], sizeof tokens),
               "the text after a stop differs");
    for (int i = 0; i < 2; i++) {
        findings f;
        memset(&f, 0, sizeof f);
        score(ctx, &f, me ? refuse_the_second : count_question);
        score(ctx, &f, NULL);
        RANK_CHECK(!memcmp(f.scores, expected->scores, sizeof f.scores), "the log-likelihoods after a stop differ");
    }
    llm_context_free(ctx);
    llm_model_free(model);
}

static void stop_in_tensor_parallel(llm_comm *comm, void *arg) {
    stop_and_go_on((const findings *)arg, comm, comm, NULL);
}
static void stop_in_a_pipeline(llm_comm *comm, void *arg) { stop_and_go_on((const findings *)arg, comm, NULL, comm); }

static void test_stopping(void **state) {
    static findings alone;
    (void)state;
    alone.dtype = LLM_DTYPE_BF16;
    alone.n_threads = 1;
    find(&alone, NULL, NULL);
    for (int n = 2; n <= 4; n++) on_ranks(n, NULL, stop_in_tensor_parallel, &alone);
    for (int n = 2; n <= WIDE.n_layers; n++) on_ranks(n, NULL, stop_in_a_pipeline, &alone);
}

/* ---- Failures ---- */

typedef struct trouble {
    enum { OTHER_FILE, OTHER_TYPE, OTHER_SET, NO_FILE, OTHER_NUMBERS, NO_MEMORY, LEAVES, OTHER_CALL, TROUBLES } kind;
    int n_told;
} trouble;

static const char *const WORDS[TROUBLES] = {"file",   "type",     "instruction set", "rank 1", "llm_context_desc",
                                            "memory", "has left", "different call"};

/* Rank 1 does something wrong. */
static llm_status go_wrong_here(llm_comm *comm, trouble *t, heap *h, llm_error *err) {
    static const tiny_spec other = {3, 96, 160, 14, 2, 16, 256, 600, 1, 0, 6};
    bool odd = comm->rank == 1;
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_token tokens[60];
    llm_model_desc desc = {
        .dtype = odd && t->kind == OTHER_TYPE ? LLM_DTYPE_INT8 : LLM_DTYPE_BF16, .n_threads = 1, .tensor = comm};
    llm_context_desc context_desc = {.n_ctx = odd && t->kind == OTHER_NUMBERS ? 199 : 200, .n_threads = 1};
    desc.host = heap_host(h);
    if (odd && t->kind == OTHER_SET) desc.isa = "scalar";
    if (odd && t->kind == NO_MEMORY) h->fail_at = 60; /* while the context is made */
    llm_status status = odd && t->kind == NO_FILE
                            ? llm_model_load(&model, "no/such/file", &desc, err)
                            : try_tiny(&model, odd && t->kind == OTHER_FILE ? &other : &WIDE, desc, err);
    if (!status && odd && t->kind == NO_MEMORY) h->n_calls = 0, h->fail_at = 9;
    if (!status) status = llm_context_create(&ctx, model, &context_desc, err);
    comm->patience = 1;
    for (int i = 0; i < 5 && !status; i++) {
        llm_batch batch = {odd && i == 2 && t->kind == OTHER_CALL ? 5 : 4, tokens, NULL, NULL};
        for (int j = 0; j < 5; j++) tokens[j] = 7 * j;
        if (odd && i == 2 && t->kind == LEAVES) break;
        status = llm_forward(ctx, &batch, err);
    }
    llm_context_free(ctx);
    llm_model_free(model);
    return status;
}

static void go_wrong(llm_comm *comm, void *arg) {
    trouble *t = (trouble *)arg;
    llm_error err;
    heap h;
    memset(&h, 0, sizeof h);
    double start = seconds_now();
    llm_status status = go_wrong_here(comm, t, &h, &err);
    RANK_CHECK(seconds_now() - start < 10, "a rank waited for too long");
    RANK_CHECK(h.live == 0 && h.n_blocks == 0, "memory leaked");
    if (!status) return;
    assert_explained(status, &err);
    RANK_CHECK(strstr(err.message, WORDS[t->kind]) || (comm->rank == 1 && t->kind == NO_FILE), err.message);
    __atomic_add_fetch(&t->n_told, 1, __ATOMIC_ACQ_REL);
}

static void test_failures(void **state) {
    (void)state;
    for (int kind = 0; kind < TROUBLES; kind++)
        for (int n = 2; n <= 4; n++) {
            trouble t = {0};
            t.kind = kind;
            on_ranks(n, NULL, go_wrong, &t);
            assert_int_equal(t.n_told, n - (kind == LEAVES));
        }
}

/* ---- A callback leaves its call by longjmp, as a C++ exception would, on one rank ---- */

typedef struct departure {
    enum { FROM_POLL, FROM_TOKEN, FROM_QUESTION, CALLBACKS } callback;
    enum { CALLS_AGAIN, FREES, DOES_NOTHING, SEQUELS } sequel;
    bool staged; /* a pipeline; else tensor parallel */
    int rank;    /* the rank whose callback leaves */
    int at;      /* the number of the callback's call that leaves */
    int n_told;
} departure;

/* One rank's callbacks. If `back` is NULL, they always return. */
typedef struct leaver {
    jmp_buf *back;
    int n, at;
} leaver;

static bool leave_poll(void *user) {
    leaver *l = (leaver *)user;
    if (++l->n == l->at && l->back) longjmp(*l->back, 1);
    return false;
}

static bool leave_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    (void)token, (void)bytes, (void)n_bytes;
    return !leave_poll(user);
}

static bool leave_question(void *user, int question, const double *log_likelihoods) {
    (void)question, (void)log_likelihoods;
    return !leave_poll(user);
}

enum { N_QUESTIONS = 40 };

/* Returns LLM_OK if a callback left the call. */
static llm_status call_to_be_left(llm_context *ctx, const departure *d, leaver *l, llm_error *err) {
    static const llm_token tokens[] = {1, 2, 3, 4, 5, 6, 7}, *endings[] = {tokens};
    static const int length = 7;
    jmp_buf back;
    if (l->at) l->back = &back;
    if (setjmp(back)) return LLM_OK;
    if (d->callback == FROM_QUESTION) {
        /* Contexts with a common prefix would be computed once, in a single pass, and no rank would have to wait. */
        llm_token contexts[N_QUESTIONS][7];
        llm_question questions[N_QUESTIONS];
        double log_likelihoods[N_QUESTIONS];
        llm_score_desc desc = {.on_question = leave_question, .user = l};
        for (int i = 0; i < N_QUESTIONS; i++) {
            memcpy(contexts[i], tokens, sizeof tokens);
            contexts[i][0] = (llm_token)i;
            questions[i] = (llm_question){contexts[i], length, 1, endings, &length};
        }
        return llm_score(ctx, questions, N_QUESTIONS, &desc, log_likelihoods, NULL, err);
    }
    llm_generate_desc desc = {.tokens = tokens, .n_tokens = length, .max_tokens = 60, .ignore_end = true, .user = l};
    if (d->callback == FROM_POLL) desc.cancel = leave_poll;
    else desc.on_token = leave_token;
    return llm_generate(ctx, &desc, NULL, err);
}

static void depart(llm_comm *comm, void *arg) {
    static const char *const words[SEQUELS] = {"did not return", "did not return", "in time"};
    departure *d = (departure *)arg;
    bool me = comm->rank == d->rank;
    leaver l = {NULL, 0, me ? d->at : 0};
    double start = seconds_now();
    llm_error err;
    comm->patience = d->sequel == DOES_NOTHING ? 1 : 8;
    llm_model *model = load_wide(LLM_DTYPE_BF16, d->staged ? NULL : comm, d->staged ? comm : NULL);
    llm_context *ctx = open_wide(model, comm->rank ? 1 : 2);
    llm_status status = call_to_be_left(ctx, d, &l, &err);
    RANK_CHECK(!status == me, me ? "the callback did not leave" : "the call succeeded although a rank had left it");
    if (me && d->sequel == DOES_NOTHING)
        while (__atomic_load_n(&d->n_told, __ATOMIC_ACQUIRE) < comm->size - 1)
            nanosleep(&(struct timespec){0, 1000000}, NULL);
    l.back = NULL;
    if (me && d->sequel == CALLS_AGAIN) status = call_to_be_left(ctx, d, &(leaver){NULL, 0, 0}, &err);
    if (status) {
        assert_explained(status, &err);
        RANK_CHECK(strstr(err.message, words[d->sequel]), err.message);
        __atomic_add_fetch(&d->n_told, 1, __ATOMIC_ACQ_REL);
    }
    RANK_CHECK(seconds_now() - start < 10, "a rank waited for too long");
    llm_context_free(ctx);
    llm_model_free(model);
}

static void test_longjmp(void **state) {
    (void)state;
    for (int i = 0; i < CALLBACKS * SEQUELS * 2 * 3; i++) {
        int n = 2 + i / (CALLBACKS * SEQUELS * 2) % 2;
        departure d = {0};
        d.callback = i % CALLBACKS;
        d.sequel = i / CALLBACKS % SEQUELS;
        d.staged = i / (CALLBACKS * SEQUELS) % 2;
        d.rank = i % 5 % n;
        d.at = 2 + 7 * (i % 4);
        if (d.callback == FROM_QUESTION && i % 4 == 3) d.at = N_QUESTIONS;  /* the others already have all results */
        if (d.sequel == DOES_NOTHING && d.callback != FROM_TOKEN) continue; /* it takes a second */
        on_ranks(n, NULL, depart, &d);
        assert_int_equal(d.n_told, n - (d.sequel != CALLS_AGAIN));
    }
}

/* Ranks refuse queries, keys and values of different types if heads do not fill tiles. With one type they work. */
static void refuse_mixed_heads(llm_comm *comm, void *arg) {
    static const tiny_spec spec = {2, 256, 256, 32, 2, 8, 512, 43, 1, TINY_MIXED, 1};
    llm_model *model = NULL;
    llm_error err;
    (void)arg;
    llm_status status =
        try_tiny(&model, &spec, (llm_model_desc){.dtype = LLM_DTYPE_FILE, .n_threads = 1, .tensor = comm}, &err);
    RANK_CHECK(status == LLM_ERROR_UNSUPPORTED && strstr(err.message, "different types"),
               status ? err.message : "it was loaded");
    status = try_tiny(&model, &spec, (llm_model_desc){.dtype = LLM_DTYPE_BF16, .n_threads = 1, .tensor = comm}, &err);
    RANK_CHECK(status == LLM_OK, err.message);
    llm_model_free(model);
}

static void test_mixed_heads(void **state) {
    (void)state;
    on_ranks(2, NULL, refuse_mixed_heads, NULL);
}

/* ---- Share of the weights on each rank ---- */

typedef struct share_job {
    bool staged; /* a pipeline; else tensor parallel */
    llm_dtype dtype;
    double whole;
} share_job;

static void measure(llm_comm *comm, void *arg) {
    share_job *job = (share_job *)arg;
    llm_model_desc desc = {.dtype = job->dtype, .n_threads = 1};
    llm_model *model = NULL;
    llm_error err;
    heap h;
    memset(&h, 0, sizeof h);
    if (job->staged) desc.pipeline = comm;
    else desc.tensor = comm;
    if (comm) desc.host = heap_host(&h);
    RANK_CHECK(llm_model_load(&model, model_path(), &desc, &err) == LLM_OK, err.message);
    double bytes = (double)llm_model_get_info(model).weight_bytes;
    if (comm) RANK_CHECK(bytes / job->whole < 1.0 / comm->size + 0.05, "a rank holds too many weights");
    if (comm && comm->rank == 0)
        print_message("%d %s: the first holds %.1f %% of the weights\n", comm->size, job->staged ? "stages" : "ranks",
                      100 * bytes / job->whole);
    if (!comm) job->whole = bytes;
    llm_model_free(model);
}

/* The default model's head is its embedding. The first stage reads rows of it from the file; the last stage holds it.
   Layers are assigned to stages by time. In the file, the head has more bits per weight than the layers, so stages are
   checked with bf16, where bytes are proportional to weights. */
static void test_shares(void **state) {
    share_job job = {false, LLM_DTYPE_DEFAULT, 0};
    (void)state;
    if (THREAD_SANITIZED) {
        print_message(
            "skipped: it loads the default model six times, which takes a minute with the thread sanitizer\n");
        skip();
    }
    measure(NULL, &job);
    for (int n = 2; n <= (SANITIZED ? 2 : MOST_RANKS); n++) on_ranks(n, NULL, measure, &job);
    job = (share_job){true, LLM_DTYPE_BF16, 0};
    measure(NULL, &job);
    for (int n = 2; n <= (SANITIZED ? 2 : 4); n++) on_ranks(n, NULL, measure, &job);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_hashes),  cmocka_unit_test(test_default_model), cmocka_unit_test(test_same_results),
        cmocka_unit_test(test_saved),   cmocka_unit_test(test_stopping),      cmocka_unit_test(test_failures),
        cmocka_unit_test(test_longjmp), cmocka_unit_test(test_mixed_heads),   cmocka_unit_test(test_shares)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
