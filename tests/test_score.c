/* Scoring: log-likelihoods compared with logits and with independent references; the same bits in every schedule; the
   number of computed tokens; bad input. tests/golden/README.md says where the references come from.
   Variants: asan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"

#include <jansson.h>
#include "tests/common.h"

/* ---- Invented questions ---- */

enum { N_VOCAB = 856, QUESTIONS = 13, MOST_ENDINGS = 5, MOST_TOKENS = 50 };

typedef struct quiz {
    llm_question questions[QUESTIONS];
    llm_token contexts[QUESTIONS][MOST_TOKENS], endings[QUESTIONS][MOST_ENDINGS][MOST_TOKENS];
    const llm_token *ending_lists[QUESTIONS][MOST_ENDINGS];
    int lengths[QUESTIONS][MOST_ENDINGS];
    int n_results;
} quiz;

static uint32_t draw(uint32_t *state, uint32_t n) {
    *state = *state * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)*state * n >> 32);
}

/* Makes contexts and endings of many lengths. Some endings begin alike, are equal, or have one token. */
static void make_quiz(quiz *z) {
    uint32_t random = 7;
    z->n_results = 0;
    for (int i = 0; i < QUESTIONS; i++) {
        llm_question *q = &z->questions[i];
        q->context = z->contexts[i];
        q->n_context = i == 0 ? 1 : i == 1 ? 32 : 1 + (int)draw(&random, MOST_TOKENS);
        q->n_endings = i == 2 ? 1 : 2 + (int)draw(&random, MOST_ENDINGS - 1);
        q->endings = z->ending_lists[i];
        q->n_ending = z->lengths[i];
        for (int j = 0; j < q->n_context; j++) z->contexts[i][j] = (llm_token)draw(&random, N_VOCAB);
        for (int e = 0; e < q->n_endings; e++, z->n_results++) {
            int same = i % 3 ? (int)draw(&random, 4) : 0;
            z->ending_lists[i][e] = z->endings[i][e];
            z->lengths[i][e] = i == 3 ? 1 : i == 4 ? 12 : 1 + same + (int)draw(&random, MOST_TOKENS - 4);
            for (int j = 0; j < z->lengths[i][e]; j++)
                z->endings[i][e][j] = j < same || i == 4 ? (llm_token)(j + 5) : (llm_token)draw(&random, N_VOCAB);
        }
    }
}

static const tiny_spec SPEC = {2, 40, 56, 4, 2, 12, 512, N_VOCAB - 256, 1, 0, 11}; /* two parts of the vocabulary */

static llm_model *load(llm_dtype dtype, const char *isa) {
    static const tiny_spec blocks = {2, 64, 96, 4, 2, 32, 512, N_VOCAB - 256, 1, 3, 1};
    llm_model_desc desc = {.dtype = dtype, .isa = isa, .n_threads = 1};
    llm_model *model = NULL;
    llm_error err;
    llm_status status = try_tiny(&model, dtype == LLM_DTYPE_INT4 ? &blocks : &SPEC, desc, &err);
    if (status && status != LLM_ERROR_ARGUMENT) fail_msg("%s", err.message);
    return model;
}

/* ---- Compared with logits ---- */

static double log_prob(const float *logits, int n, llm_token token) {
    double most = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++) most = fmax(most, logits[i]);
    for (int i = 0; i < n; i++) sum += exp(logits[i] - most);
    return logits[token] - most - log(sum);
}

/* Computes the log-likelihood of one ending from the logits of a plain pass. */
static double log_likelihood(llm_context *ctx, const llm_question *q, int ending) {
    llm_token tokens[2 * MOST_TOKENS];
    bool logits[2 * MOST_TOKENS];
    int n = q->n_context + q->n_ending[ending];
    double sum = 0;
    llm_error err;
    for (int i = 0; i < n; i++) {
        tokens[i] = i < q->n_context ? q->context[i] : q->endings[ending][i - q->n_context];
        logits[i] = true;
    }
    llm_batch batch = {n, tokens, NULL, logits};
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    for (int i = q->n_context; i < n; i++) sum += log_prob(llm_logits(ctx, i - 1), N_VOCAB, tokens[i]);
    return sum;
}

static void test_logits(void **state) {
    static const llm_dtype dtypes[] = {LLM_DTYPE_F32, LLM_DTYPE_BF16, LLM_DTYPE_INT8, LLM_DTYPE_INT4};
    static quiz z;
    double results[QUESTIONS * MOST_ENDINGS];
    (void)state;
    make_quiz(&z);
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
        llm_model *model = load(dtypes[d], NULL);
        llm_context_desc desc = {.n_ctx = 2 * MOST_TOKENS, .n_seq = 16, .n_logits = 2 * MOST_TOKENS, .n_threads = 1};
        llm_context *ctx = create_context(model, &desc);
        llm_error err;
        if (llm_score(ctx, z.questions, QUESTIONS, NULL, results, NULL, &err)) fail_msg("%s", err.message);
        for (int i = 0, at = 0; i < QUESTIONS; i++)
            for (int e = 0; e < z.questions[i].n_endings; e++, at++) {
                double expected = log_likelihood(ctx, &z.questions[i], e);
                if (!(fabs(results[at] - expected) <= 1e-6 * fabs(expected)))
                    fail_msg("%s, question %d, ending %d: %.9g instead of %.9g", llm_dtype_name(dtypes[d]), i, e,
                             results[at], expected);
            }
        close_context(ctx);
    }
}

/* The probabilities of all possible next tokens sum to 1. */
static void test_sum(void **state) {
    static double results[N_VOCAB];
    llm_token context[3] = {1, 2, 3};
    llm_context_desc desc = {.n_ctx = 32, .n_seq = N_VOCAB, .n_cache = 64, .n_batch = 8, .n_threads = 2};
    llm_context *ctx = create_context(load(LLM_DTYPE_BF16, NULL), &desc);
    llm_question q = every_token(context, 3, N_VOCAB);
    double sum = 0;
    llm_error err;
    (void)state;
    if (llm_score(ctx, &q, 1, NULL, results, NULL, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < N_VOCAB; i++) sum += exp(results[i]);
    assert_true(fabs(sum - 1) < 1e-6);
    close_context(ctx);
}

/* ---- The same bits ---- */

static const llm_score_desc SCHEDULES[] = {{.schedule = LLM_SCHEDULE_PACKED},
                                           {.schedule = LLM_SCHEDULE_PACKED, .recompute_context = true},
                                           {.schedule = LLM_SCHEDULE_FIXED, .batch = 1, .recompute_context = true},
                                           {.schedule = LLM_SCHEDULE_FIXED, .batch = 1},
                                           {.schedule = LLM_SCHEDULE_FIXED, .recompute_context = true},
                                           {.schedule = LLM_SCHEDULE_FIXED, .batch = 5},
                                           {.schedule = LLM_SCHEDULE_DP, .min_tokens = 300, .recompute_context = true},
                                           {.schedule = LLM_SCHEDULE_DP, .min_tokens = 1, .min_context_tokens = 1},
                                           {.schedule = LLM_SCHEDULE_DP, .min_tokens = 100, .min_context_tokens = 200},
                                           {.schedule = LLM_SCHEDULE_DP}};
enum { N_SCHEDULES = sizeof SCHEDULES / sizeof *SCHEDULES };

/* The minimum number of tokens to compute: each prefix once, and each ending once without its last token. */
static int64_t tokens_needed(const llm_question *questions, int n) {
    int64_t needed = 0;
    for (int i = 0; i < n; i++) {
        const llm_question *q = &questions[i];
        int common = 0;
        for (bool same = true; same; common += same)
            for (int e = 0; e < q->n_endings && same; e++)
                same = common < q->n_ending[e] - 1 && q->endings[e][common] == q->endings[0][common];
        needed += q->n_context + common;
        for (int e = 0; e < q->n_endings; e++) needed += q->n_ending[e] - 1 - common;
    }
    return needed;
}

/* All positions of the cache must be free. */
static void assert_cache_is_free(llm_context *ctx, const llm_context_desc *desc) {
    static llm_token tokens[4000];
    static int seqs[4000];
    int most = desc->n_cache ? desc->n_ctx / 32 * 32 : desc->n_ctx; /* positions per sequence, in whole blocks */
    int n = desc->n_cache ? desc->n_cache : desc->n_seq * desc->n_ctx;
    llm_error err;
    assert_in_range(n, 1, 4000);
    for (int i = 0; i < n; i++) seqs[i] = i / most;
    for (int seq = 0; seq < desc->n_seq; seq++) assert_int_equal(llm_seq_length(ctx, seq), 0);
    if (llm_forward(ctx, &(llm_batch){n, tokens, seqs, NULL}, &err)) fail_msg("%s", err.message);
}

static void check_schedules(const llm_model *model, const llm_context_desc *desc, const llm_question *questions, int n,
                            double *expected, int n_results) {
    llm_context *ctx = create_context(model, desc);
    double *results = (double *)malloc((size_t)n_results * sizeof *results);
    llm_error err;
    assert_non_null(results);
    for (int i = 0; i < N_SCHEDULES; i++) {
        llm_score_stats stats, counted;
        if (llm_score(ctx, questions, n, &SCHEDULES[i], results, &stats, &err)) fail_msg("%s", err.message);
        if (expected[0] == 0) memcpy(expected, results, (size_t)n_results * sizeof *results);
        if (memcmp(results, expected, (size_t)n_results * sizeof *results)) fail_msg("schedule %d gives other bits", i);
        assert_int_equal(stats.n_questions, n);
        assert_int_equal(stats.n_computed - stats.n_padded - stats.n_redundant + stats.n_shared,
                         tokens_needed(questions, n));
        if (i == 0) {
            assert_int_equal(stats.n_padded + stats.n_redundant, 0);
            assert_true(stats.n_passes >= (stats.n_computed + desc->n_batch - 1) / desc->n_batch);
        }
        assert_int_equal(llm_score(ctx, questions, n, &SCHEDULES[i], NULL, &counted, &err), LLM_OK);
        counted.seconds = stats.seconds;
        assert_memory_equal(&counted, &stats, sizeof stats);
    }
    assert_cache_is_free(ctx, desc);
    free(results);
    llm_context_free(ctx);
}

static void test_schedules(void **state) {
    static const llm_context_desc descs[] = {
        {.n_ctx = 100, .n_seq = 40, .n_batch = 512, .n_threads = 2},
        {.n_ctx = 100, .n_seq = 6, .n_batch = 7, .n_threads = 1},
        {.n_ctx = 100, .n_seq = 17, .n_cache = 800, .n_batch = 64, .n_threads = 1}};
    static quiz z;
    (void)state;
    make_quiz(&z);
    for (int dtype = LLM_DTYPE_F32; dtype <= LLM_DTYPE_INT4; dtype++) {
        double expected[QUESTIONS * MOST_ENDINGS] = {0};
        for (size_t i = 0; i < sizeof descs / sizeof *descs; i++) {
            const char *isa = i != 1 ? NULL : dtype == LLM_DTYPE_BF16 ? "scalar" : "avx2";
            llm_model *model = load((llm_dtype)dtype, isa);
            if (!model) continue; /* not on this machine */
            llm_context_desc desc = descs[i];
            check_schedules(model, &desc, z.questions, QUESTIONS, expected, z.n_results);
            llm_model_free(model);
        }
    }
}

/* Questions with a common instruction. It is computed once if the cache has room, and the results keep their bits. */
static void test_shared_prefix(void **state) {
    static const struct {
        llm_context_desc desc;
        int n_shared; /* at least */
    } cases[] = {{{.n_ctx = 180, .n_seq = 20, .n_batch = 512, .n_threads = 2}, 12 * 60},
                 {{.n_ctx = 180, .n_seq = 5, .n_batch = 16, .n_threads = 1}, 12 * 60},
                 {{.n_ctx = 180, .n_seq = 17, .n_cache = 800, .n_batch = 64, .n_threads = 1}, 12 * 60},
                 {{.n_ctx = 180, .n_seq = 5, .n_cache = 720, .n_batch = 30, .n_threads = 1}, 0}};
    static quiz z;
    static llm_token contexts[QUESTIONS][60 + MOST_TOKENS];
    double expected[QUESTIONS * MOST_ENDINGS];
    (void)state;
    make_quiz(&z);
    for (int i = 0; i < QUESTIONS; i++) {
        llm_question *q = &z.questions[i];
        for (int j = 0; j < 60; j++) contexts[i][j] = j * 7 + 1;
        memcpy(contexts[i] + 60, q->context, (size_t)q->n_context * sizeof *q->context);
        q->context = contexts[i];
        q->n_context += 60;
    }
    for (int dtype = LLM_DTYPE_F32; dtype <= LLM_DTYPE_INT8; dtype++) {
        llm_model *model = load((llm_dtype)dtype, NULL);
        llm_context_desc one = {.n_ctx = 180, .n_seq = MOST_ENDINGS, .n_threads = 1};
        llm_context *ctx = create_context(model, &one);
        for (int i = 0, at = 0; i < QUESTIONS; at += z.questions[i++].n_endings)
            assert_int_equal(llm_score(ctx, &z.questions[i], 1, NULL, expected + at, NULL, NULL), LLM_OK);
        llm_context_free(ctx);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            llm_score_stats stats;
            check_schedules(model, &cases[i].desc, z.questions, QUESTIONS, expected, z.n_results);
            ctx = create_context(model, &cases[i].desc);
            assert_int_equal(llm_score(ctx, z.questions, QUESTIONS, NULL, NULL, &stats, NULL), LLM_OK);
            assert_true(stats.n_shared >= cases[i].n_shared);
            llm_context_free(ctx);
        }
        llm_model_free(model);
    }
}

/* All passes of the packed schedule are full, except the last few. */
static void test_full_passes(void **state) {
    static quiz z;
    llm_model *model = load(LLM_DTYPE_F32, NULL);
    llm_context_desc desc = {.n_ctx = 100, .n_seq = 60, .n_batch = 200, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc);
    llm_score_stats stats;
    (void)state;
    make_quiz(&z);
    assert_int_equal(llm_score(ctx, z.questions, QUESTIONS, NULL, NULL, &stats, NULL), LLM_OK);
    assert_true(stats.n_passes <= stats.n_computed / 200 + 2);
    close_context(ctx);
}

/* ---- Refused input, and stopping ---- */

static bool stop_if_set(void *user) { return *(bool *)user; }

typedef struct answers {
    int n, most;
    const double *results;
} answers;

static bool count_question(void *user, int question, const double *log_likelihoods) {
    answers *a = (answers *)user;
    assert_in_range(question, 0, QUESTIONS - 1);
    assert_true(log_likelihoods >= a->results);
    return ++a->n < a->most;
}

static void test_refusals(void **state) {
    static quiz z;
    double results[QUESTIONS * MOST_ENDINGS];
    llm_model *model = load(LLM_DTYPE_F32, NULL);
    llm_context_desc desc = {.n_ctx = 100, .n_seq = 8, .n_batch = 64, .n_threads = 1}, short_ctx = desc, few = desc,
                     small = desc, cancelled = desc;
    bool told = true;
    llm_token token = 1, wrong = N_VOCAB;
    llm_batch batch = {1, &token, NULL, NULL};
    llm_context *ctx = create_context(model, &desc);
    llm_error err;
    (void)state;
    make_quiz(&z);
    assert_int_equal(llm_forward(ctx, &batch, NULL), LLM_OK);
    llm_question q = z.questions[5], empty = q;
    empty.n_context = 0;
    assert_int_equal(llm_score(NULL, &q, 1, NULL, results, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_score(ctx, NULL, 1, NULL, results, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_score(ctx, &empty, 1, NULL, results, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_string_equal(err.message, "question 0: its context has no tokens");
    empty = q;
    empty.n_endings = 0;
    assert_int_equal(llm_score(ctx, &empty, 1, NULL, results, NULL, &err), LLM_ERROR_ARGUMENT);
    const llm_token *endings[2] = {&token, &wrong};
    int ones[2] = {1, 1};
    llm_question bad = {&token, 1, 2, endings, ones};
    assert_int_equal(llm_score(ctx, &bad, 1, NULL, results, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_string_equal(err.message, "question 0: token 0 of an ending is 856; the vocabulary has 856");
    llm_score_desc wrong_desc = {.schedule = (llm_schedule)3}, negative = {.min_tokens = -1};
    assert_int_equal(llm_score(ctx, &q, 1, &wrong_desc, results, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_score(ctx, &q, 1, &negative, results, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_seq_length(ctx, 0), 1); /* a refused call changes nothing */
    assert_int_equal(llm_score(ctx, NULL, 0, NULL, results, NULL, &err), LLM_OK);

    answers a = {0, 4, results};
    llm_score_desc counting = {.on_question = count_question, .user = &a};
    assert_int_equal(llm_score(ctx, z.questions, QUESTIONS, &counting, results, NULL, &err), LLM_ERROR_CANCELLED);
    assert_int_equal(a.n, 4);
    a.n = 0;
    a.most = QUESTIONS + 1;
    assert_int_equal(llm_score(ctx, z.questions, QUESTIONS, &counting, results, NULL, &err), LLM_OK);
    assert_int_equal(a.n, QUESTIONS);
    assert_null(llm_logits(ctx, 0));
    llm_context_free(ctx);

    short_ctx.n_ctx = 20;
    few.n_seq = 1;
    small.n_cache = 32;
    cancelled.cancel = stop_if_set;
    cancelled.cancel_user = &told;
    const llm_context_desc *full[] = {&short_ctx, &few, &small};
    for (int i = 0; i < 3; i++) {
        ctx = create_context(model, full[i]);
        assert_int_equal(llm_score(ctx, &z.questions[1], 1, NULL, results, NULL, &err), LLM_ERROR_CONTEXT_FULL);
        llm_context_free(ctx);
    }
    ctx = create_context(model, &cancelled);
    assert_int_equal(llm_score(ctx, z.questions, QUESTIONS, NULL, results, NULL, &err), LLM_ERROR_CANCELLED);
    told = false;
    assert_cache_is_free(ctx, &cancelled);
    close_context(ctx);
}

typedef struct budget {
    int left;
} budget;

static void *spend(void *user, size_t size) {
    budget *b = (budget *)user;
    return b->left-- > 0 ? malloc(size) : NULL;
}

static void give_back(void *user, void *ptr) {
    (void)user;
    free(ptr);
}

/* Each allocation fails once. */
static void test_memory(void **state) {
    static quiz z;
    double results[QUESTIONS * MOST_ENDINGS];
    budget b = {1 << 20};
    llm_model *model = load(LLM_DTYPE_F32, NULL);
    llm_context_desc desc = {.n_ctx = 100,
                             .n_seq = 8,
                             .n_batch = 64,
                             .n_threads = 1,
                             .host = {.alloc = spend, .free = give_back, .user = &b}};
    llm_context *ctx = create_context(model, &desc);
    (void)state;
    make_quiz(&z);
    for (int i = 0; i < N_SCHEDULES; i += 4)
        for (int n = 0, failed = 1; failed; n++) {
            b.left = n;
            llm_status status = llm_score(ctx, z.questions, 6, &SCHEDULES[i], results, NULL, NULL);
            failed = status == LLM_ERROR_MEMORY;
            assert_true(failed || status == LLM_OK);
            assert_true(n < 1000);
        }
    close_context(ctx);
}

/* ---- The default model ---- */

enum { GOLDEN = 20, ENDINGS = 4 };

typedef struct golden {
    llm_question questions[GOLDEN];
    llm_token tokens[GOLDEN][ENDINGS][256];
    const llm_token *endings[GOLDEN][ENDINGS];
    int lengths[GOLDEN][ENDINGS];
    double expected[GOLDEN * ENDINGS];
} golden;

/* llm_encode_pair must give the file's ids of context and ending. */
static void encode_like(const llm_tokenizer *tokenizer, json_t *line, int ending, llm_token *ids, int *n_context,
                        int *n_ending) {
    char text[1024];
    int64_t n_first;
    llm_error err;
    json_t *context = json_object_get(line, "context"),
           *rest = json_array_get(json_object_get(line, "endings"), (size_t)ending);
    snprintf(text, sizeof text, " %s",
             json_string_value(json_array_get(json_object_get(line, "choices"), (size_t)ending)));
    int64_t n = llm_encode_pair(tokenizer, json_string_value(json_object_get(line, "query")), text,
                                LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL, ids, 256, &n_first, &err);
    assert_int_equal(n_first, json_array_size(context));
    assert_int_equal(n, json_array_size(context) + json_array_size(rest));
    for (int i = 0; i < n; i++)
        assert_int_equal(ids[i], json_integer_value(i < n_first ? json_array_get(context, (size_t)i)
                                                                : json_array_get(rest, (size_t)(i - n_first))));
    *n_context = (int)n_first;
    *n_ending = (int)(n - n_first);
}

static void read_golden(const llm_tokenizer *tokenizer, golden *g) {
    FILE *file = open_lines(golden_path("hellaswag.golden"));
    for (int i = 0; i < GOLDEN; i++) {
        json_t *line = json_loadf(file, JSON_DISABLE_EOF_CHECK, NULL);
        assert_non_null(line);
        llm_question q = {g->tokens[i][0], 0, ENDINGS, g->endings[i], g->lengths[i]};
        for (int e = 0; e < ENDINGS; e++) {
            encode_like(tokenizer, line, e, g->tokens[i][e], &q.n_context, &g->lengths[i][e]);
            g->endings[i][e] = g->tokens[i][e] + q.n_context;
            g->expected[i * ENDINGS + e] =
                json_real_value(json_array_get(json_object_get(line, "log_likelihoods"), (size_t)e));
        }
        g->questions[i] = q;
        json_decref(line);
    }
    fclose(file);
}

static llm_model *load_default(llm_dtype dtype) { return load_model(model_path(), &(llm_model_desc){.dtype = dtype}); }

static void test_default_reference(void **state) {
    static golden g;
    double results[GOLDEN * ENDINGS], worst = 0;
    llm_context_desc desc = {.n_ctx = 128, .n_seq = 32, .n_cache = 2048};
    llm_model *model = load_default(LLM_DTYPE_F32);
    llm_context *ctx = create_context(model, &desc);
    llm_error err;
    (void)state;
    read_golden(llm_model_tokenizer(model), &g);
    if (llm_score(ctx, g.questions, GOLDEN, NULL, results, NULL, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < GOLDEN * ENDINGS; i++)
        if (fabs(results[i] / g.expected[i] - 1) > worst) worst = fabs(results[i] / g.expected[i] - 1);
    print_message("largest relative error %.1e\n", worst);
    assert_true(worst < 1e-5);
    close_context(ctx);
}

/* Four questions in the schedules that differ most. */
static void test_default_schedules(void **state) {
    static golden g;
    double expected[2 * ENDINGS] = {0};
    llm_context_desc desc = {.n_ctx = 128, .n_seq = 32, .n_batch = 200, .n_cache = 1024};
    llm_model *model = load_default(LLM_DTYPE_BF16);
    (void)state;
    read_golden(llm_model_tokenizer(model), &g);
    check_schedules(model, &desc, g.questions + 3, 2, expected, 2 * ENDINGS);
    llm_model_free(model);
}

/* ---- Pairs of texts ---- */

static void check_pair(const llm_tokenizer *t, const char *context, const char *ending, const char *first,
                       const char *second) {
    llm_token ids[64], expected[64];
    int64_t n_context, n = llm_encode_pair(t, context, ending, LLM_TOKENS_SPECIAL, ids, 64, &n_context, NULL);
    int64_t n_first = llm_encode(t, first, strlen(first), LLM_TOKENS_SPECIAL, expected, 64, NULL);
    int64_t n_second =
        llm_encode(t, second, strlen(second), LLM_TOKENS_SPECIAL, expected + n_first, (size_t)(64 - n_first), NULL);
    assert_int_equal(n_context, n_first);
    assert_int_equal(n, n_first + n_second);
    assert_memory_equal(ids, expected, (size_t)n * sizeof *ids);
    assert_int_equal(llm_encode_pair(t, context, ending, LLM_TOKENS_SPECIAL, NULL, 0, &n_context, NULL), n);
    assert_int_equal(n_context, n_first);
}

static void test_pairs(void **state) {
    llm_model *model = load(LLM_DTYPE_F32, NULL); /* bytes are tokens, and "aa" is one */
    const llm_tokenizer *t = llm_model_tokenizer(model);
    (void)state;
    check_pair(t, "xy", " z", "xy", " z");
    check_pair(t, "xy \n", "z", "xy", " \nz");
    check_pair(t, "xy\xC2\xA0\xE3\x80\x80\x1F", " z", "xy", "\xC2\xA0\xE3\x80\x80\x1F z");
    check_pair(t, "xa", "az", "xa", "z"); /* "xaaz" is x, aa, z: the ending begins after the first two */
    check_pair(t, "", " z", "<|start|>", " z");
    check_pair(t, "  ", "z", "<|start|>", "  z");
    check_pair(t, "aaa", "", "aaa", "");
    llm_model_free(model);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_logits),
                                       cmocka_unit_test(test_sum),
                                       cmocka_unit_test(test_schedules),
                                       cmocka_unit_test(test_shared_prefix),
                                       cmocka_unit_test(test_full_passes),
                                       cmocka_unit_test(test_refusals),
                                       cmocka_unit_test(test_memory),
                                       cmocka_unit_test(test_pairs),
                                       cmocka_unit_test(test_default_reference),
                                       cmocka_unit_test(test_default_schedules)};
    if (SANITIZED) cmocka_set_skip_filter("test_default*");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
