/* Streams: each text is the same as from llm_generate alone, whatever other streams do. No stream waits for long. An
   error in one stream ends only that stream. A common prefix is computed once.
   Variants: asan tsan cross */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

static const tiny_spec SPEC = {2, 40, 56, 4, 2, 12, 256, 9, 1, 0, 21};
enum { N_VOCAB = 265, MOST_TEXT = 512, MOST_PROMPT = 120 };

static uint32_t draw(uint32_t *state, uint32_t n) {
    *state = *state * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)*state * n >> 32);
}

/* A user's request, and the answer so far. */
typedef struct job {
    llm_token prompt[MOST_PROMPT];
    int n_prompt, max_tokens, last_token; /* on_token returns false at this one; 0: never */
    llm_sampler sampler;
    const char *stop;
    llm_draft draft;
    bool drafted, keeps_text;
    llm_stream *stream;
    char text[MOST_TEXT];
    size_t n_text;
    llm_token tokens[MOST_TEXT];
    int n_tokens;
    llm_stats stats;
    /* on_token calls act when the answer has act_at tokens. */
    void (*act)(struct job *j);
    llm_context *ctx;
    int act_at;
} job;

static bool on_text(void *user, const char *text, size_t n) {
    job *j = (job *)user;
    assert_true(j->n_text + n < MOST_TEXT);
    memcpy(j->text + j->n_text, text, n + 1);
    j->n_text += n;
    return true;
}

static bool on_token(void *user, llm_token token, const char *bytes, size_t n) {
    job *j = (job *)user;
    (void)bytes, (void)n;
    assert_true(j->n_tokens < MOST_TEXT);
    j->tokens[j->n_tokens++] = token;
    if (j->act && j->n_tokens == j->act_at) j->act(j);
    return j->n_tokens != j->last_token;
}

static llm_generate_desc describe(job *j, int seq) {
    return (llm_generate_desc){.tokens = j->prompt,
                               .n_tokens = j->n_prompt,
                               .seq = seq,
                               .max_tokens = j->max_tokens,
                               .sampler = &j->sampler,
                               .stop_strings = &j->stop,
                               .n_stop_strings = j->stop != NULL,
                               .ignore_end = true,
                               .draft = j->drafted ? &j->draft : NULL,
                               .draft_keeps_text = true,
                               .on_text = on_text,
                               .on_token = on_token,
                               .user = j};
}

/* Makes a random request. Some prompts begin alike, some are the same. */
static void make_job(job *j, uint32_t seed) {
    static const char *const stops[] = {NULL, "e", "ab", "\xEF\xBF\xBD"};
    uint32_t random = seed * 7919, same = draw(&random, 4);
    memset(j, 0, sizeof *j);
    j->n_prompt = 1 + (int)draw(&random, draw(&random, 3) ? 30 : MOST_PROMPT - 1);
    for (int i = 0; i < j->n_prompt; i++)
        j->prompt[i] = (llm_token)(i < 20 * (int)same ? (i * 31 + 5) % 250 : (int)draw(&random, 250));
    j->max_tokens = 1 + (int)draw(&random, 40);
    j->last_token = draw(&random, 5) ? 0 : 1 + (int)draw(&random, 10);
    j->stop = stops[draw(&random, 4)];
    j->sampler.seed = seed;
    if (draw(&random, 3)) j->sampler.temperature = 1.3f;
    if (draw(&random, 2)) j->sampler.top_k = 30;
    if (draw(&random, 2)) j->sampler.top_p = 0.9f;
    if (draw(&random, 3) == 0) j->sampler.repeat_penalty = 1.2f;
    j->drafted = draw(&random, 2);
    j->draft = llm_draft_lookup();
}

/* Answers with llm_generate in a separate context. */
static void answer_alone(const llm_model *model, job *j) {
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 200, .n_threads = 1});
    llm_generate_desc desc = describe(j, 0);
    llm_error err;
    desc.draft = NULL;
    if (llm_generate(ctx, &desc, &j->stats, &err)) fail_msg("%s", err.message);
    llm_context_free(ctx);
}

static void begin(llm_context *ctx, job *j, int seq) {
    llm_generate_desc desc = describe(j, seq);
    llm_error err;
    if (llm_stream_begin(&j->stream, ctx, &desc, &err)) fail_msg("%s", err.message);
    assert_true(llm_stream_is_running(j->stream));
}

static int step(llm_context *ctx, int n_tokens) {
    int n_running;
    llm_error err;
    memset(&err, 0xEE, sizeof err);
    if (llm_step(ctx, n_tokens, &n_running, &err)) fail_msg("%s", err.message);
    assert_int_equal(err.code, LLM_OK);
    return n_running;
}

/* Gets the stream's result and frees the stream. */
static void end(job *j) {
    llm_error err;
    if (llm_stream_result(j->stream, &j->stats, &err)) fail_msg("%s", err.message);
    llm_stream_free(j->stream);
    j->stream = NULL;
}

static void assert_same_text(const job *j, const job *alone) {
    assert_int_equal(j->n_text, alone->n_text);
    assert_memory_equal(j->text, alone->text, j->n_text);
    assert_int_equal(j->n_tokens, alone->n_tokens);
    assert_memory_equal(j->tokens, alone->tokens, (size_t)j->n_tokens * sizeof *j->tokens);
    assert_int_equal(j->stats.stop, alone->stats.stop);
    assert_int_equal(j->stats.n_generated, alone->stats.n_generated);
    assert_int_equal(j->stats.n_prompt, alone->stats.n_prompt);
    assert_true(j->sampler.n_drawn == alone->sampler.n_drawn);
}

static void assert_begins_like(const job *j, const job *alone) {
    assert_true(j->n_tokens <= alone->n_tokens && j->n_text <= alone->n_text);
    assert_memory_equal(j->tokens, alone->tokens, (size_t)j->n_tokens * sizeof *j->tokens);
    assert_memory_equal(j->text, alone->text, j->n_text);
}

/* ---- Random mixes ---- */

enum { JOBS = 24, AT_ONCE = 7 };

/* Streams begin at random times, and some are freed early. Meanwhile the host forks and truncates a sequence of its
   own. */
static void run_mix(const llm_model *model, const llm_context_desc *desc, const job *alone, uint32_t seed) {
    static job jobs[JOBS];
    llm_context *ctx = create_context(model, desc);
    uint32_t random = seed;
    int n_begun = 0, n_running = 0, n_refused = 0, own = desc->n_seq - 1;
    for (int i = 0; i < JOBS; i++) make_job(&jobs[i], seed * 100 + (uint32_t)i);
    for (int n_steps = 0; n_begun < JOBS || n_running; n_steps++) {
        assert_true(n_steps < 5000);
        while (n_begun < JOBS && draw(&random, 3) == 0) {
            llm_generate_desc d = describe(&jobs[n_begun], LLM_SEQ_ANY);
            llm_error err;
            if (desc->n_logits == 1) d.draft = NULL;
            llm_status status = llm_stream_begin(&jobs[n_begun].stream, ctx, &d, &err);
            if (status && status != LLM_ERROR_CONTEXT_FULL) fail_msg("%s", err.message);
            n_refused += status != LLM_OK;
            if (status) break;
            n_begun++;
        }
        if (draw(&random, 8) == 0) {
            int parent = (int)draw(&random, (uint32_t)desc->n_seq), length = llm_seq_length(ctx, parent);
            llm_seq_fork(ctx, own, parent, length / 2, NULL);
            if (draw(&random, 2)) llm_seq_truncate(ctx, own, 0, NULL);
        }
        n_running = step(ctx, 1 + (int)draw(&random, 40));
        for (int i = 0; i < n_begun; i++) {
            job *j = &jobs[i];
            if (!j->stream || (llm_stream_is_running(j->stream) && draw(&random, 200))) continue;
            bool ran = llm_stream_is_running(j->stream);
            /* The host's forks may have used positions that a prompt needs. */
            if (desc->n_cache && llm_stream_result(j->stream, NULL, NULL) == LLM_ERROR_CONTEXT_FULL) {
                assert_int_equal(j->n_tokens, 0);
                llm_stream_free(j->stream);
                j->stream = NULL;
                continue;
            }
            end(j);
            if (ran || j->stats.stop == LLM_STOP_CACHE) assert_begins_like(j, &alone[i]);
            else assert_same_text(j, &alone[i]);
        }
    }
    for (int i = 0; i < JOBS; i++) assert_null(jobs[i].stream);
    if (desc->n_cache) assert_true(n_refused > 0);
    for (int seq = 0; seq < desc->n_seq; seq++) llm_seq_truncate(ctx, seq, 0, NULL);
    assert_int_equal(llm_context_n_free(ctx), (llm_context_n_cache(ctx) + 31) / 32 * 32);
    llm_context_free(ctx);
}

/* Every third model has a sliding window, so that in a small cache blocks are given back all the time. */
static void test_any_mix(void **state) {
    static const llm_context_desc descs[] = {
        {.n_ctx = 200, .n_seq = AT_ONCE, .n_logits = 40, .n_batch = 64, .n_threads = 3},
        {.n_ctx = 200, .n_seq = 4, .n_logits = 1, .n_batch = 16, .n_threads = 1},
        {.n_ctx = 200, .n_seq = AT_ONCE, .n_logits = 5, .n_cache = 320, .n_batch = 32, .n_threads = 2}};
    static job alone[JOBS];
    (void)state;
    for (uint32_t seed = 1; seed <= (SANITIZED ? 3 : 12); seed++) {
        tiny_window = seed % 3 ? 0 : 20;
        llm_model *model = load_tiny(&SPEC, seed % 2 ? LLM_DTYPE_F32 : LLM_DTYPE_INT8);
        tiny_window = 0;
        for (int i = 0; i < JOBS; i++) {
            make_job(&alone[i], seed * 100 + (uint32_t)i);
            answer_alone(model, &alone[i]);
        }
        for (size_t i = 0; i < sizeof descs / sizeof *descs; i++) run_mix(model, &descs[i], alone, seed);
        llm_model_free(model);
    }
}

/* Several streams share a draft model: the same weights in another type. Returns the number of right guesses. */
static int share_draft(llm_model *model, llm_model *small) {
    llm_context *ctx =
        create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 4, .n_logits = 20, .n_threads = 2});
    llm_draft draft;
    static job jobs[4], alone[4];
    int n_accepted = 0;
    assert_int_equal(llm_draft_model(&draft, ctx, small, NULL), LLM_OK);
    for (int i = 0; i < 4; i++) {
        make_job(&jobs[i], 900 + (uint32_t)i);
        jobs[i].last_token = 0;
        jobs[i].stop = NULL;
        jobs[i].max_tokens = 60;
        alone[i] = jobs[i];
        answer_alone(model, &alone[i]);
        llm_generate_desc desc = describe(&jobs[i], i);
        desc.draft = &draft;
        assert_int_equal(llm_stream_begin(&jobs[i].stream, ctx, &desc, NULL), LLM_OK);
    }
    while (step(ctx, 0)) {}
    for (int i = 0; i < 4; i++) {
        end(&jobs[i]);
        assert_same_text(&jobs[i], &alone[i]);
        n_accepted += jobs[i].stats.draft.n_accepted;
    }
    llm_draft_free(&draft);
    llm_context_free(ctx);
    return n_accepted;
}

/* The number of guesses depends on measured times, so on a busy machine there may be none for a while. */
static void test_shared_draft(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32), *small = load_tiny(&SPEC, LLM_DTYPE_INT8);
    int n_accepted = 0;
    (void)state;
    for (int i = 0; i < 20 && !n_accepted; i++) n_accepted = share_draft(model, small);
    assert_true(n_accepted > 0);
    llm_model_free(small);
    llm_model_free(model);
}

/* ---- No stream waits for long ---- */

static void test_long_prompt_beside_a_text(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 3, .n_threads = 1});
    static job text, longer, shorter;
    (void)state;
    make_job(&text, 1), make_job(&longer, 2), make_job(&shorter, 3);
    text.max_tokens = 60, text.n_prompt = 4, text.stop = NULL, text.last_token = 0, text.drafted = false;
    longer.n_prompt = 100, shorter.n_prompt = 10;
    longer.max_tokens = shorter.max_tokens = 1;
    begin(ctx, &text, 0);
    step(ctx, 16);
    begin(ctx, &longer, 1);
    begin(ctx, &shorter, 2);
    for (int i = 2; i <= 9; i++) {
        assert_true(step(ctx, 16) > 0);
        assert_int_equal(text.n_tokens, i);         /* one in each pass */
        assert_int_equal(shorter.n_tokens, i >= 3); /* it gets 8 of the 16 tokens of a pass */
        assert_int_equal(longer.n_tokens, i >= 9);
        if (i < 9) assert_true(llm_seq_length(ctx, 1) <= 15 * (i - 1));
    }
    end(&text), end(&longer), end(&shorter);
    close_context(ctx);
}

/* If there are more streams than rows of logits, all make equal progress. */
static void test_turns(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_context *ctx =
        create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 5, .n_logits = 2, .n_threads = 1});
    static job jobs[5];
    (void)state;
    for (int i = 0; i < 5; i++) {
        make_job(&jobs[i], 40 + (uint32_t)i);
        jobs[i].n_prompt = 3, jobs[i].stop = NULL, jobs[i].last_token = 0, jobs[i].max_tokens = 30;
        jobs[i].drafted = false;
        begin(ctx, &jobs[i], LLM_SEQ_ANY);
    }
    for (int n = 1; step(ctx, 0) == 5; n++)
        for (int i = 0; i < 5; i++) assert_in_range(jobs[i].n_tokens, 2 * n / 5, 2 * n / 5 + 1);
    while (step(ctx, 0)) {}
    for (int i = 0; i < 5; i++) {
        end(&jobs[i]);
        assert_int_equal(jobs[i].stats.stop, LLM_STOP_LENGTH);
    }
    close_context(ctx);
}

/* ---- Prefixes ---- */

static void plain_job(job *j, int n_prompt, int max_tokens) {
    make_job(j, 5);
    j->n_prompt = n_prompt, j->max_tokens = max_tokens;
    j->stop = NULL, j->last_token = 0, j->drafted = false;
    for (int i = 0; i < MOST_PROMPT; i++) j->prompt[i] = i * 7 % 250;
}

/* If streams with a common prefix begin together, one computes the prefix and the others wait for it. */
static void test_prefix_is_computed_once(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 6, .n_threads = 1});
    static job jobs[4], alone[4], later, other;
    (void)state;
    for (int i = 0; i < 4; i++) {
        plain_job(&jobs[i], 100, 12);
        jobs[i].prompt[90 + i] = 200;
        alone[i] = jobs[i];
        answer_alone(model, &alone[i]);
        begin(ctx, &jobs[i], LLM_SEQ_ANY);
    }
    while (step(ctx, 48)) {}
    for (int i = 0; i < 4; i++) {
        end(&jobs[i]);
        assert_same_text(&jobs[i], &alone[i]);
        assert_int_equal(jobs[i].stats.n_shared, jobs[i].stats.n_reused);
        assert_int_equal(jobs[i].stats.n_reused, i ? 90 : 0);
    }
    /* A conversation continues in its own sequence. Another one with the same beginning copies it. */
    plain_job(&later, 100, 5);
    later.prompt[92] = 200;
    memcpy(later.prompt + 100, jobs[2].tokens, 12 * sizeof *later.prompt);
    later.n_prompt = 115;
    begin(ctx, &later, LLM_SEQ_ANY);
    while (step(ctx, 0)) {}
    end(&later);
    assert_int_equal(later.stats.seq, jobs[2].stats.seq);
    assert_int_equal(later.stats.n_reused, 111);
    assert_int_equal(later.stats.n_shared, 0);
    plain_job(&other, 60, 5);
    llm_generate_desc desc = describe(&other, 5);
    assert_int_equal(llm_generate(ctx, &desc, &other.stats, NULL), LLM_OK);
    assert_int_equal(other.stats.n_reused, 59);
    assert_int_equal(other.stats.n_shared, 59);
    close_context(ctx);
}

/* If the cache is full, sequences of ended streams are dropped, the oldest first. Sequences that the host named
   stay. */
static void test_oldest_is_dropped(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_context *ctx =
        create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 6, .n_cache = 320, .n_threads = 1});
    static job jobs[4], big;
    (void)state;
    llm_token named[40] = {3};
    llm_generate_desc desc = {.tokens = named, .n_tokens = 40, .max_tokens = 1, .seq = 5};
    assert_int_equal(llm_generate(ctx, &desc, NULL, NULL), LLM_OK);
    for (int i = 0; i < 4; i++) { /* two blocks each */
        plain_job(&jobs[i], 60, 1);
        jobs[i].prompt[0] = 100 + i;
        begin(ctx, &jobs[i], LLM_SEQ_ANY);
        while (step(ctx, 0)) {}
        end(&jobs[i]);
        assert_int_equal(jobs[i].stats.seq, i);
    }
    assert_int_equal(llm_context_n_free(ctx), 0);
    plain_job(&big, 90, 1);
    big.prompt[0] = 99;
    begin(ctx, &big, LLM_SEQ_ANY);
    while (step(ctx, 0)) {}
    end(&big);
    assert_int_equal(big.stats.seq, 4);
    static const int lengths[] = {0, 32, 60, 60, 90, 40};
    for (int seq = 0; seq < 6; seq++) assert_int_equal(llm_seq_length(ctx, seq), lengths[seq]);
    /* A prompt larger than the cache is refused before anything is dropped. */
    assert_int_equal(llm_seq_truncate(ctx, 5, 33, NULL), LLM_OK);
    llm_token many[200] = {77};
    llm_context *small =
        create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 2, .n_cache = 128, .n_threads = 1});
    desc = (llm_generate_desc){.tokens = many, .n_tokens = 100, .max_tokens = 1, .seq = LLM_SEQ_ANY};
    assert_int_equal(llm_generate(small, &desc, NULL, NULL), LLM_OK);
    desc.n_tokens = 140;
    desc.tokens = named;
    many[0] = 78;
    desc.tokens = many;
    assert_int_equal(llm_generate(small, &desc, NULL, NULL), LLM_ERROR_CONTEXT_FULL);
    assert_int_equal(llm_seq_length(small, 0), 100);
    llm_context_free(small);
    close_context(ctx);
}

/* ---- One stream ends, the others continue ---- */

static void test_refusals(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 64, .n_seq = 2, .n_threads = 1});
    static job a, b;
    llm_error err;
    llm_stream *stream = (llm_stream *)&a;
    int n_running = 7;
    (void)state;
    assert_int_equal(llm_step(ctx, 0, &n_running, NULL), LLM_OK);
    assert_int_equal(n_running, 0);
    assert_int_equal(llm_step(ctx, -1, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_step(NULL, 0, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_stream_begin(&stream, ctx, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_stream_begin(NULL, ctx, NULL, &err), LLM_ERROR_ARGUMENT);
    llm_stream_free(NULL);
    plain_job(&a, 10, 40), plain_job(&b, 10, 40);
    a.sampler.temperature = b.sampler.temperature = 1;
    begin(ctx, &a, 1);
    llm_generate_desc desc = describe(&b, 1);
    static const llm_token one = 1, *const endings[] = {&one};
    static const int length = 1, seq_1 = 1;
    llm_question question = {&one, 1, 1, endings, &length};
    char bytes[16] = {0};
    for (int i = 0; i < 2; i++) {
        const llm_status refused[] = {llm_stream_begin(&stream, ctx, &desc, &err),
                                      llm_generate(ctx, &desc, NULL, &err),
                                      llm_seq_truncate(ctx, 1, 0, &err),
                                      llm_seq_fork(ctx, 1, 0, 0, &err),
                                      llm_seq_restore(ctx, 1, bytes, sizeof bytes, &err),
                                      llm_forward(ctx, &(llm_batch){1, &one, &seq_1, NULL}, &err),
                                      llm_score(ctx, &question, 1, NULL, NULL, NULL, &err)};
        for (size_t k = 0; k < sizeof refused / sizeof *refused; k++) assert_int_equal(refused[k], LLM_ERROR_ARGUMENT);
        assert_non_null(strstr(err.message, "stream"));
        assert_null(stream);
        step(ctx, 0);
    }
    desc.seq = 0;
    desc.sampler = &a.sampler;
    assert_int_equal(llm_stream_begin(&stream, ctx, &desc, &err), LLM_ERROR_ARGUMENT);
    assert_non_null(strstr(err.message, "sampler"));
    desc.sampler = &b.sampler;
    assert_int_equal(llm_seq_fork(ctx, 0, 1, 5, NULL), LLM_OK); /* reading it is allowed */
    desc.seq = LLM_SEQ_ANY;
    assert_int_equal(llm_stream_begin(&stream, ctx, &desc, &err), LLM_ERROR_CONTEXT_FULL);
    assert_non_null(strstr(err.message, "n_seq"));
    desc.seq = -1;
    assert_int_equal(llm_stream_begin(&stream, ctx, &desc, &err), LLM_ERROR_ARGUMENT);
    while (step(ctx, 0)) {}
    end(&a);
    assert_int_equal(a.n_tokens, 40);
    begin(ctx, &a, 0); /* freeing the context frees its streams */
    close_context(ctx);
}

/* A NaN logit, a full sequence, a full cache, or a failing allocation ends only one of two streams. */
static void test_failures(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    static job good, alone;
    llm_logit_bias nan = {5, NAN};
    heap h = {0};
    (void)state;
    plain_job(&alone, 20, 40);
    answer_alone(model, &alone);
    for (int kind = 0; kind < 4; kind++) {
        llm_context *ctx = create_context(
            model, &(llm_context_desc){
                       .n_ctx = 90, .n_seq = 2, .n_cache = kind == 2 ? 128 : 0, .n_threads = 2, .host = heap_host(&h)});
        static job bad;
        plain_job(&good, 20, 40), plain_job(&bad, 33, 0);
        for (int i = 0; i < 33; i++) bad.prompt[i] += 2;
        if (kind == 0) bad.sampler.biases = &nan, bad.sampler.n_biases = 1;
        begin(ctx, &good, kind % 2);
        begin(ctx, &bad, 1 - kind % 2);
        if (kind == 3) h.fail_at = h.n_calls + 1; /* the next allocation */
        llm_error err;
        while (step(ctx, 8)) {}
        llm_status expected = kind == 0 ? LLM_ERROR_FORMAT : kind == 3 ? LLM_ERROR_MEMORY : LLM_OK;
        job *ended = kind == 3 && llm_stream_result(good.stream, NULL, NULL) ? &good : &bad;
        assert_int_equal(llm_stream_result(ended->stream, &ended->stats, &err), expected);
        if (expected) assert_explained(expected, &err);
        if (expected) assert_int_equal(ended->stats.stop, LLM_STOP_NONE);
        if (kind == 1) assert_int_equal(bad.stats.stop, LLM_STOP_CONTEXT);
        if (kind == 1) assert_int_equal(bad.n_tokens, 90 - 33 + 1);
        if (kind == 2) assert_int_equal(bad.stats.stop, LLM_STOP_CACHE);
        if (ended == &bad) {
            end(&good);
            assert_same_text(&good, &alone);
        } else llm_stream_free(good.stream);
        llm_stream_free(bad.stream);
        llm_context_free(ctx);
        assert_all_returned(&h);
    }
    llm_model_free(model);
}

/* Each allocation of llm_stream_begin and llm_step fails once. Nothing may leak, and the context must stay usable. */
static llm_status answer_starved(void *user, llm_error *err) {
    llm_context *ctx = (llm_context *)user;
    static const char *const stops[] = {"never"};
    llm_generate_desc desc = {
        .prompt = "abc abc", .max_tokens = 9, .stop_strings = stops, .n_stop_strings = 1, .ignore_end = true};
    llm_stream *streams[2] = {NULL, NULL};
    llm_status status = LLM_OK;
    for (int i = 0; i < 2 && !status; i++) {
        desc.seq = i;
        status = llm_stream_begin(&streams[i], ctx, &desc, err);
    }
    for (int n = 1; n && !status;) status = llm_step(ctx, 0, &n, err);
    for (int i = 0; i < 2; i++) {
        if (streams[i] && !status) status = llm_stream_result(streams[i], NULL, err);
        llm_stream_free(streams[i]);
    }
    return status;
}

static void test_memory(void **state) {
    heap h = {0};
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_context *ctx =
        create_context(model, &(llm_context_desc){.n_ctx = 64, .n_seq = 2, .n_threads = 1, .host = heap_host(&h)});
    (void)state;
    starve(&h, answer_starved, ctx, 1, "two streams");
    llm_context_free(ctx);
    assert_all_returned(&h);
    llm_model_free(model);
}

/* ---- Callbacks ---- */

static jmp_buf outside;
static job *victim;

static void leave(job *j) {
    (void)j;
    longjmp(outside, 1);
}

static void free_victim(job *j) {
    (void)j;
    llm_stream_free(victim->stream);
    victim->stream = NULL;
}

static void use_context(job *j) {
    llm_error err;
    int n_running = 7;
    llm_generate_desc desc = {.prompt = "a", .seq = LLM_SEQ_ANY};
    llm_stream *stream;
    assert_int_equal(llm_step(j->ctx, 0, &n_running, &err), LLM_ERROR_ARGUMENT);
    assert_non_null(strstr(err.message, "callback"));
    assert_int_equal(llm_stream_begin(&stream, j->ctx, &desc, &err), LLM_ERROR_ARGUMENT);
    assert_non_null(strstr(err.message, "callback"));
    assert_null(stream);
    assert_true(llm_stream_is_running(j->stream));
    assert_int_equal(llm_stream_result(j->stream, &j->stats, NULL), LLM_OK);
    assert_int_equal(llm_seq_length(j->ctx, j->stats.seq), j->n_prompt + j->n_tokens - 1);
}

static bool leaves_at(void *user) {
    job *j = (job *)user;
    if (++j->act_at == 20) longjmp(outside, 1);
    return false;
}

static llm_status leaves_guessing(void *user, const llm_draft_request *r, llm_draft_guesses *g, llm_error *err) {
    job *j = (job *)user;
    (void)err;
    for (; g->n < r->n_wanted[0]; g->n++) g->tokens[g->n] = 'a';
    if (r->n_tokens >= j->n_prompt + 5) longjmp(outside, 1);
    return LLM_OK;
}

/* One of three streams does something special in a callback. The others must give their usual texts. */
static void test_callbacks(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    static job jobs[3], alone[3];
    (void)state;
    for (int i = 0; i < 3; i++) {
        make_job(&alone[i], 70 + (uint32_t)i);
        alone[i].max_tokens = 30, alone[i].stop = NULL, alone[i].last_token = 0, alone[i].drafted = i == 1;
        jobs[i] = alone[i];
        answer_alone(model, &alone[i]);
    }
    const job fresh[3] = {jobs[0], jobs[1], jobs[2]};
    for (int kind = 0; kind < 6; kind++)
        for (int who = 0; who < 3; who++) {
            llm_context *ctx =
                create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 3, .n_logits = 20, .n_threads = 2});
            volatile int n_left = 0;
            memcpy(jobs, fresh, sizeof jobs);
            for (int i = 0; i < 3; i++) {
                llm_generate_desc desc = describe(&jobs[i], LLM_SEQ_ANY);
                jobs[i].ctx = ctx;
                if (i == who && kind == 4) desc.cancel = leaves_at;
                if (i == who && kind == 5) {
                    jobs[i].draft = (llm_draft){.name = "leaving", .propose = leaves_guessing, .user = &jobs[i]};
                    desc.draft = &jobs[i].draft;
                }
                assert_int_equal(llm_stream_begin(&jobs[i].stream, ctx, &desc, NULL), LLM_OK);
            }
            jobs[who].act = kind == 0 ? leave : kind == 3 ? use_context : kind < 3 ? free_victim : NULL;
            jobs[who].act_at = kind == 4 ? 0 : 4;
            victim = &jobs[kind == 1 ? who : (who + 1) % 3];
            if (setjmp(outside)) n_left++;
            while (step(ctx, 0)) {}
            assert_int_equal(n_left, kind == 0 || kind >= 4);
            for (int i = 0; i < 3; i++) {
                if (!jobs[i].stream) {
                    assert_begins_like(&jobs[i], &alone[i]);
                    assert_true(&jobs[i] == victim && jobs[i].n_tokens <= 12);
                    continue;
                }
                end(&jobs[i]);
                if (i == who && n_left) assert_int_equal(jobs[i].stats.stop, LLM_STOP_CALLBACK);
                else assert_same_text(&jobs[i], &alone[i]);
            }
            llm_context_free(ctx);
        }
    llm_model_free(model);
}

/* If one of two streams is cancelled during a pass, the pass continues for the other. If both are, it ends. */
static bool cancels(void *user) {
    job *j = (job *)user;
    return ++j->act_at >= 15;
}

static void test_cancelled(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    static job jobs[2], alone;
    (void)state;
    plain_job(&alone, 20, 40);
    answer_alone(model, &alone);
    for (int both = 0; both < 2; both++) {
        llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 2, .n_threads = 1});
        for (int i = 0; i < 2; i++) {
            plain_job(&jobs[i], 20, 40);
            llm_generate_desc desc = describe(&jobs[i], i);
            if (i == 0 || both) desc.cancel = cancels;
            assert_int_equal(llm_stream_begin(&jobs[i].stream, ctx, &desc, NULL), LLM_OK);
        }
        while (step(ctx, 0)) {}
        for (int i = 0; i < 2; i++) {
            end(&jobs[i]);
            if (i == 0 || both) {
                assert_int_equal(jobs[i].stats.stop, LLM_STOP_CALLBACK);
                assert_true(jobs[i].n_tokens > 2 && jobs[i].n_tokens < 10);
                assert_begins_like(&jobs[i], &alone);
            } else assert_same_text(&jobs[i], &alone);
        }
        llm_context_free(ctx);
    }
    llm_model_free(model);
}

/* ---- Log-probabilities of a prompt ---- */

typedef struct told {
    llm_log_prob chosen[MOST_PROMPT + 8];
    int n, n_top, last; /* act is called when n reaches last; 0: never */
    void (*act)(struct told *t);
    llm_stream *stream;
} told;

static void on_log_probs(void *user, llm_log_prob chosen, const llm_log_prob *top, int n_top) {
    told *t = (told *)user;
    assert_true(t->n < MOST_PROMPT + 8);
    assert_int_equal(n_top, t->n_top);
    for (int i = 0; i < n_top; i++) {
        assert_true(i == 0 || top[i].log_prob <= top[i - 1].log_prob);
        assert_true(top[i].token != chosen.token || top[i].log_prob == chosen.log_prob);
    }
    assert_true(n_top == 0 || chosen.log_prob <= top[0].log_prob);
    t->chosen[t->n++] = chosen;
    if (t->act && t->n == t->last) t->act(t);
}

static void free_told(told *t) {
    llm_stream_free(t->stream);
    t->stream = NULL;
}

static void leave_told(told *t) {
    (void)t;
    longjmp(outside, 1);
}

/* log_probs[i] is set to llm_score's log-likelihood of token i after the previous tokens. */
static void score_tokens(const llm_model *model, const llm_token *tokens, int n, double *log_probs) {
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 3, .n_threads = 2});
    const llm_token *endings[MOST_PROMPT + 8];
    llm_question questions[MOST_PROMPT + 8];
    const int one = 1;
    for (int i = 1; i < n; i++) {
        endings[i] = &tokens[i];
        questions[i] = (llm_question){tokens, i, 1, &endings[i], &one};
    }
    assert_int_equal(llm_score(ctx, questions + 1, n - 1, NULL, log_probs + 1, NULL, NULL), LLM_OK);
    llm_context_free(ctx);
}

/* Log-probabilities have the same bits as from llm_score, however the prompt is split into passes and whatever other
   streams run. The texts of other streams do not change. Cached tokens are computed again only if their logits are
   needed. */
static void test_log_probs(void **state) {
    static const struct { int n_logits, n_tokens; } sizes[] = {{4, 7}, {4, 64}, {5, 1}, {300, 0}, {40, 33}};
    static const int froms[] = {1, 2, 50, MOST_PROMPT};
    (void)state;
    for (int type = 0; type < 3; type++) {
        const tiny_spec large = {2, 64, 96, 4, 2, 16, 1600, 9, 1, 0, 21}; /* more than one part of the vocabulary */
        llm_model *model = load_tiny(type == 2 ? &large : &SPEC, type == 1 ? LLM_DTYPE_INT8 : LLM_DTYPE_F32);
        static job alone, beside;
        double expected[MOST_PROMPT];
        plain_job(&alone, MOST_PROMPT, 6);
        score_tokens(model, alone.prompt, MOST_PROMPT, expected);
        answer_alone(model, &alone);
        for (size_t i = 0; i < 2 * sizeof sizes / sizeof *sizes; i++) {
            llm_context *ctx = create_context(
                model, &(llm_context_desc){
                           .n_ctx = 200, .n_seq = 5, .n_batch = 64, .n_logits = sizes[i / 2].n_logits, .n_threads = 2});
            static told tells[4];
            llm_stats stats;
            bool only = i % 2;
            plain_job(&beside, MOST_PROMPT, 6);
            begin(ctx, &beside, 4);
            if (sizes[i / 2].n_tokens == 33)
                while (step(ctx, 0)) {} /* so that its tokens can be reused */
            for (int k = 0; k < 4; k++) {
                llm_generate_desc desc = describe(&alone, k);
                tells[k] = (told){.n_top = k};
                desc.on_text = NULL, desc.on_token = NULL, desc.user = &tells[k], desc.sampler = NULL;
                desc.on_log_probs = on_log_probs, desc.n_top_log_probs = k;
                desc.log_probs_from = froms[k], desc.prompt_only = only, desc.max_tokens = 2;
                assert_int_equal(llm_stream_begin(&tells[k].stream, ctx, &desc, NULL), LLM_OK);
            }
            while (step(ctx, sizes[i / 2].n_tokens)) {}
            end(&beside);
            assert_same_text(&beside, &alone);
            for (int k = 0; k < 4; k++) {
                assert_int_equal(llm_stream_result(tells[k].stream, &stats, NULL), LLM_OK);
                assert_int_equal(stats.stop, LLM_STOP_LENGTH);
                assert_int_equal(stats.n_generated, only ? 0 : 2);
                assert_true(stats.n_reused < froms[k]);
                if (sizes[i / 2].n_tokens == 33) assert_int_equal(stats.n_reused, froms[k] < 20 ? 0 : froms[k] - 1);
                assert_int_equal(tells[k].n, MOST_PROMPT - froms[k] + stats.n_generated);
                for (int at = froms[k]; at < MOST_PROMPT; at++) {
                    assert_int_equal(tells[k].chosen[at - froms[k]].token, alone.prompt[at]);
                    assert_true((double)tells[k].chosen[at - froms[k]].log_prob == expected[at]);
                }
                llm_stream_free(tells[k].stream);
            }
            llm_context_free(ctx);
        }
        llm_model_free(model);
    }
}

/* llm_generate gives the same with one row of logits. Bad values are refused. A callback may free the stream, or not
   return. */
static void test_log_probs_end(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 200, .n_seq = 2, .n_threads = 1});
    static job good, alone;
    static told t;
    double expected[MOST_PROMPT];
    llm_token stop;
    llm_error err;
    (void)state;
    plain_job(&alone, 60, 9);
    alone.sampler = (llm_sampler){0};
    score_tokens(model, alone.prompt, 60, expected);
    answer_alone(model, &alone);
    llm_generate_desc desc = describe(&alone, 0);
    desc.on_text = NULL, desc.on_token = NULL, desc.user = &t;
    desc.on_log_probs = on_log_probs, desc.log_probs_from = 30, desc.max_tokens = 1;
    for (int ends = 0; ends < 2; ends++) { /* log_probs_of_end also reports the token that ends the text */
        t = (told){.n = 0};
        stop = alone.tokens[0];
        desc.stop_tokens = &stop, desc.n_stop_tokens = 1, desc.log_probs_of_end = ends;
        assert_int_equal(llm_generate(ctx, &desc, NULL, NULL), LLM_OK);
        assert_int_equal(t.n, 30 + ends);
        for (int i = 0; i < 30; i++) assert_true((double)t.chosen[i].log_prob == expected[30 + i]);
        if (ends) assert_int_equal(t.chosen[30].token, stop);
    }
    for (int from = -1; from <= 61; from += 62) {
        desc.log_probs_from = from;
        assert_int_equal(llm_generate(ctx, &desc, NULL, &err), LLM_ERROR_ARGUMENT);
        assert_non_null(strstr(err.message, "log_probs_from"));
    }
    desc.log_probs_from = 1, desc.on_log_probs = NULL;
    assert_int_equal(llm_stream_begin(&t.stream, ctx, &desc, &err), LLM_ERROR_ARGUMENT);
    assert_non_null(strstr(err.message, "on_log_probs"));
    desc.on_log_probs = on_log_probs;
    for (int leaves = 0; leaves < 2; leaves++) {
        plain_job(&good, 60, 9);
        good.sampler = (llm_sampler){0};
        begin(ctx, &good, 1);
        t = (told){.last = 20, .act = leaves ? leave_told : free_told};
        assert_int_equal(llm_stream_begin(&t.stream, ctx, &desc, NULL), LLM_OK);
        int left = setjmp(outside);
        assert_true(!left || leaves);
        while (step(ctx, 16)) {}
        assert_int_equal(t.n, 20);
        if (leaves) {
            llm_stats stats;
            assert_int_equal(llm_stream_result(t.stream, &stats, NULL), LLM_OK);
            assert_int_equal(stats.stop, LLM_STOP_CALLBACK);
            llm_stream_free(t.stream);
        }
        end(&good);
        assert_same_text(&good, &alone);
    }
    close_context(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_any_mix),
                                       cmocka_unit_test(test_shared_draft),
                                       cmocka_unit_test(test_turns),
                                       cmocka_unit_test(test_long_prompt_beside_a_text),
                                       cmocka_unit_test(test_oldest_is_dropped),
                                       cmocka_unit_test(test_prefix_is_computed_once),
                                       cmocka_unit_test(test_refusals),
                                       cmocka_unit_test(test_failures),
                                       cmocka_unit_test(test_memory),
                                       cmocka_unit_test(test_callbacks),
                                       cmocka_unit_test(test_cancelled),
                                       cmocka_unit_test(test_log_probs),
                                       cmocka_unit_test(test_log_probs_end)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
