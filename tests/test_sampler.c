/* The sampler compared with a plain reference in double: which tokens can be drawn, and how often.
   Variants: asan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"

static const tiny_spec SPEC = {1, 32, 32, 2, 2, 16, 64, 5, 0, 0, 1};
enum { N = 261 }; /* size of SPEC's vocabulary */

typedef struct fixture {
    llm_model *model;
    llm_context *ctx;
    float *logits; /* the context's logits of batch token 0; the tests write them */
} fixture;

static int open_isa(fixture *f, const char *isa) {
    static const llm_token tokens[1] = {7};
    llm_model_desc desc = {.isa = isa, .n_threads = 1};
    llm_context_desc context_desc = {.n_threads = 1};
    size_t size;
    uint8_t *data = tiny_model(&SPEC, &size);
    if (llm_model_load_memory(&f->model, data, size, &desc, NULL) ||
        llm_context_create(&f->ctx, f->model, &context_desc, NULL))
        return -1;
    free(data);
    if (llm_forward(f->ctx, &(llm_batch){1, tokens, NULL, NULL}, NULL)) return -1;
    f->logits = (float *)(uintptr_t)llm_logits(f->ctx, 0);
    return f->logits ? 0 : -1;
}

static void close_fixture(fixture *f) {
    llm_context_free(f->ctx);
    llm_model_free(f->model);
}

static int setup(void **state) {
    fixture *f = (fixture *)calloc(1, sizeof *f);
    *state = f;
    return f ? open_isa(f, NULL) : -1;
}

static int teardown(void **state) {
    close_fixture((fixture *)*state);
    free(*state);
    return 0;
}

static void fill(fixture *f, float x) {
    for (int i = 0; i < N; i++) f->logits[i] = x;
}

static void fill_random(fixture *f, uint32_t seed, float scale) {
    for (int i = 0; i < N; i++) {
        seed = seed * 1664525u + 1013904223u;
        f->logits[i] = scale * (float)(int32_t)seed / 2147483648.0f;
    }
}

/* Sets the sequence to these tokens and keeps the logits that the test has written. */
static void set_sequence(fixture *f, const llm_token *tokens, int n) {
    float kept[N];
    memcpy(kept, f->logits, sizeof kept);
    assert_int_equal(llm_seq_truncate(f->ctx, 0, 0, NULL), LLM_OK);
    assert_int_equal(llm_forward(f->ctx, &(llm_batch){n, tokens, NULL, NULL}, NULL), LLM_OK);
    f->logits = (float *)(uintptr_t)llm_logits(f->ctx, n - 1);
    memcpy(f->logits, kept, sizeof kept);
}

static llm_token sample(fixture *f, llm_sampler s) { return llm_sample(f->ctx, llm_seq_length(f->ctx, 0) - 1, 0, &s); }

/* ---- Greedy ---- */

static void test_ties(void **state) {
    fixture *f = (fixture *)*state;
    fill(f, 1);
    assert_int_equal(sample(f, (llm_sampler){0}), 0);
    f->logits[100] = f->logits[200] = 2;
    assert_int_equal(sample(f, (llm_sampler){0}), 100);
    f->logits[N - 1] = 3;
    assert_int_equal(sample(f, (llm_sampler){0}), N - 1);
    fill(f, 0);
    f->logits[50] = f->logits[40] = f->logits[60] = 9;
    for (uint64_t seed = 0; seed < 50; seed++) {
        assert_int_equal(sample(f, (llm_sampler){.temperature = 1, .top_k = 1, .seed = seed}), 40);
        assert_int_equal(sample(f, (llm_sampler){.temperature = 1, .top_p = 1e-6f, .seed = seed}), 40);
        assert_int_not_equal(sample(f, (llm_sampler){.temperature = 1, .top_k = 2, .seed = seed}), 60);
    }
}

static void test_not_computed(void **state) {
    fixture *f = (fixture *)*state;
    llm_sampler s = {0};
    assert_int_equal(llm_sample(f->ctx, 1, 0, &s), -1);
    assert_int_equal(llm_sample(f->ctx, -1, 0, &s), -1);
}

/* ---- Biases and penalty ---- */

static void test_biases(void **state) {
    fixture *f = (fixture *)*state;
    static const llm_logit_bias biases[] = {{10, -INFINITY}, {11, -5}, {12, 1},        {12, 1.5f},
                                            {-1, 99},        {N, 99},  {INT32_MAX, 99}};
    llm_sampler s = {.biases = biases, .n_biases = 1};
    fill(f, 0);
    f->logits[10] = 9;
    f->logits[11] = 8;
    f->logits[12] = 6;
    f->logits[13] = 7;
    assert_int_equal(sample(f, s), 11);
    s.n_biases = 2;
    assert_int_equal(sample(f, s), 13);
    s.n_biases = 7; /* 6 + 1 + 1.5 is the largest; ids outside the vocabulary are ignored */
    assert_int_equal(sample(f, s), 12);
    assert_true(f->logits[12] == 6); /* the context's logits do not change */
    s.temperature = 5;
    for (s.n_drawn = 0; s.n_drawn < 5000;) assert_int_not_equal(llm_sample(f->ctx, 0, 0, &s), 10);
}

static void test_all_but_one_forbidden(void **state) {
    fixture *f = (fixture *)*state;
    llm_logit_bias biases[N];
    static const float temperatures[] = {0, 0.1f, 1, 1e6f};
    fill_random(f, 5, 20);
    for (int i = 0; i < N; i++) {
        biases[i].token = i;
        biases[i].bias = i == 77 ? -50 : -INFINITY;
    }
    for (int i = 0; i < 4; i++) {
        llm_sampler s = {.temperature = temperatures[i], .biases = biases, .n_biases = N};
        for (int j = 0; j < 500; j++) assert_int_equal(llm_sample(f->ctx, 0, 0, &s), 77);
    }
}

static void test_penalty(void **state) {
    fixture *f = (fixture *)*state;
    static const llm_token tokens[] = {20, 5, 5, 5, 5, 7, 7};
    fill(f, -100);
    set_sequence(f, tokens, 7);
    f->logits[5] = 3;
    f->logits[6] = 2;
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 1.4f}), 5); /* 3 / 1.4, only once */
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 1.6f}), 6);
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 1.6f, .repeat_window = 2}), 5); /* 5 is not recent */
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 1.6f, .repeat_window = 3}), 6);
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 1}), 5);
    f->logits[5] = -1;
    f->logits[6] = -1.3f;
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 1.2f}), 5); /* -1 * 1.2 */
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 1.4f}), 6);
    f->logits[5] = 3;
    f->logits[6] = 1;
    static const llm_logit_bias bias = {5, -2.5f}; /* biases come first: the penalty halves 0.5, not 3 */
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 2, .biases = &bias, .n_biases = 1}), 6);
    f->logits[6] = 0.3f;
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 2, .biases = &bias, .n_biases = 1}), 6);
    f->logits[6] = 0.2f;
    assert_int_equal(sample(f, (llm_sampler){.repeat_penalty = 2, .biases = &bias, .n_biases = 1}), 5);
}

/* OpenAI's penalties: each token of the answer loses presence + count * frequency. */
static void test_counts(void **state) {
    fixture *f = (fixture *)*state;
    static const llm_token tokens[] = {9, 9, 9, 5, 5, 6, 5};
    enum { BEGIN = 3 };
    fill(f, -100);
    set_sequence(f, tokens, 7);
    f->logits[5] = 4;
    f->logits[6] = 3;
    f->logits[9] = 2.5f;
    f->logits[8] = 1;
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = BEGIN}), 5);
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = BEGIN, .presence_penalty = 1.4f}), 5); /* 2.6 */
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = BEGIN, .presence_penalty = 1.6f}), 9); /* 2.4, 1.4, 2.5 */
    assert_int_equal(sample(f, (llm_sampler){.presence_penalty = 1.6f}), 5);                        /* 2.4, 1.4, 0.9 */
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = BEGIN, .frequency_penalty = 0.45f}), 5); /* 2.65, 2.55 */
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = BEGIN, .frequency_penalty = 0.51f}), 9); /* 2.47, 2.49 */
    assert_int_equal(sample(f, (llm_sampler){.frequency_penalty = 0.51f}), 6);                        /* ... 0.97 */
    assert_int_equal(sample(f, (llm_sampler){.frequency_penalty = 2}), 6); /* -2, 1, -3.5, 1 */
    assert_int_equal(sample(f, (llm_sampler){.frequency_penalty = 2.1f}), 8);
    assert_int_equal(
        sample(f, (llm_sampler){.answer_begin = BEGIN, .frequency_penalty = 0.3f, .presence_penalty = 0.5f}), 5);
    assert_int_equal(
        sample(f, (llm_sampler){.answer_begin = BEGIN, .frequency_penalty = 0.4f, .presence_penalty = 0.5f}), 9);
    f->logits[9] = 4.5f;
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = BEGIN, .presence_penalty = -1}), 5); /* < 0: more likely */
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = 7, .presence_penalty = -1}), 9);     /* no answer yet */
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = INT32_MAX, .presence_penalty = -1}), 9);
    assert_int_equal(sample(f, (llm_sampler){.answer_begin = INT32_MIN, .presence_penalty = -1}), 9); /* 5, 4, 5.5 */
    llm_sampler drawn = {.temperature = 1, .answer_begin = BEGIN, .presence_penalty = 200};
    for (int i = 0; i < 1000; i++) { /* a penalized token must not become likely by rounding */
        llm_token token = llm_sample(f->ctx, 6, 0, &drawn);
        assert_true(token != 5 && token != 6);
    }
}

/* ---- Log-probabilities ---- */

static void test_log_probs(void **state) {
    fixture *f = (fixture *)*state;
    for (int shape = 0; shape < 4; shape++) {
        double most = -INFINITY, sum = 0, below = INFINITY;
        llm_log_prob top[N + 1];
        float chosen, alone;
        fill_random(f, 77, shape ? 12 : 0.1f);
        for (int i = 0; i < N && shape == 2; i++) f->logits[i] = (float)(int)f->logits[i]; /* many ties */
        for (int i = 0; i < N && shape == 3; i += 3) f->logits[i] = -INFINITY;
        for (int i = 0; i < N; i++) most = f->logits[i] > most ? f->logits[i] : most;
        for (int i = 0; i < N; i++) sum += exp(f->logits[i] - most);
        assert_int_equal(llm_log_probs(f->ctx, 0, 100, &chosen, top, N + 1), N);
        for (int i = 0; i < N; i++) {
            double expected = f->logits[top[i].token] - most - log(sum);
            if (isfinite(expected)) assert_true(fabs(top[i].log_prob - expected) < 4e-6);
            else assert_true(top[i].log_prob == expected);
            if (i && top[i].log_prob == top[i - 1].log_prob && f->logits[top[i].token] == f->logits[top[i - 1].token])
                assert_true(top[i].token > top[i - 1].token);
            assert_true(f->logits[top[i].token] <= below);
            below = f->logits[top[i].token];
            if (top[i].token == 100) assert_true(top[i].log_prob == chosen);
        }
        for (int n = 0; n < 9; n++) {
            llm_log_prob few[9];
            assert_int_equal(llm_log_probs(f->ctx, 0, 100, &alone, few, n), n);
            assert_true(alone == chosen);
            for (int i = 0; i < n; i++) assert_true(few[i].token == top[i].token && few[i].log_prob == top[i].log_prob);
        }
        assert_int_equal(llm_log_probs(f->ctx, 0, -1, NULL, top, 1), 1);
        assert_int_equal(llm_log_probs(f->ctx, 0, 0, NULL, NULL, 0), 0);
    }
    float chosen;
    llm_log_prob top[1];
    assert_int_equal(llm_log_probs(f->ctx, 1, 0, &chosen, top, 1), -1); /* no logits were requested */
    assert_int_equal(llm_log_probs(f->ctx, 0, N, &chosen, top, 1), -1);
    assert_int_equal(llm_log_probs(f->ctx, 0, -1, &chosen, top, 1), -1);
    assert_int_equal(llm_log_probs(f->ctx, 0, 0, &chosen, NULL, 1), -1);
    f->logits[7] = INFINITY;
    assert_int_equal(llm_log_probs(f->ctx, 0, 0, &chosen, top, 1), -1);
    f->logits[7] = NAN;
    assert_int_equal(llm_log_probs(f->ctx, 0, 0, &chosen, top, 1), -1);
}

typedef struct reported {
    llm_log_prob chosen[64], top[64][3];
    llm_token tokens[64];
    int n, n_tokens;
} reported;

static void on_log_probs(void *user, llm_log_prob chosen, const llm_log_prob *top, int n_top) {
    reported *t = (reported *)user;
    assert_int_equal(n_top, 3);
    assert_int_equal(t->n, t->n_tokens); /* on_log_probs is called before on_token */
    t->chosen[t->n] = chosen;
    memcpy(t->top[t->n++], top, sizeof t->top[0]);
}

static bool on_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    reported *t = (reported *)user;
    (void)bytes, (void)n_bytes;
    t->tokens[t->n_tokens++] = token;
    return true;
}

/* With and without a draft, on_log_probs gets the same values, and they match the logits of the tokens. */
static void test_on_log_probs(void **state) {
    fixture *f = (fixture *)*state;
    llm_context_desc context_desc = {.n_threads = 1, .n_logits = LLM_DRAFT_MAX + 1};
    llm_context *ctx = NULL;
    static const llm_token prompt[] = {7, 8, 7, 8};
    reported reports[2];
    assert_int_equal(llm_context_create(&ctx, f->model, &context_desc, NULL), LLM_OK);
    for (int drafted = 0; drafted < 2; drafted++) {
        llm_draft draft = llm_draft_lookup();
        llm_sampler s = {.temperature = 0.5f, .seed = 5, .presence_penalty = -3, .frequency_penalty = 0.01f};
        llm_generate_desc desc = {.tokens = prompt,
                                  .n_tokens = 4,
                                  .max_tokens = 40,
                                  .ignore_end = true,
                                  .sampler = &s,
                                  .draft = drafted ? &draft : NULL,
                                  .draft_keeps_text = true,
                                  .on_token = on_token,
                                  .on_log_probs = on_log_probs,
                                  .n_top_log_probs = 3,
                                  .user = &reports[drafted]};
        memset(&reports[drafted], 0, sizeof reports[drafted]);
        assert_int_equal(llm_generate(ctx, &desc, NULL, NULL), LLM_OK);
        assert_int_equal(reports[drafted].n, 40);
        llm_draft_free(&draft);
        desc.n_top_log_probs = LLM_LOG_PROBS_MAX + 1;
        assert_int_equal(llm_generate(ctx, &desc, NULL, NULL), LLM_ERROR_ARGUMENT);
    }
    assert_memory_equal(&reports[0], &reports[1], sizeof reports[0]);
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    assert_int_equal(llm_forward(ctx, &(llm_batch){4, prompt, NULL, NULL}, NULL), LLM_OK);
    llm_sampler own = {
        .temperature = 0.5f, .seed = 5, .presence_penalty = -3, .frequency_penalty = 0.01f, .answer_begin = 4};
    for (int i = 0, row = 3; i < 40; i++, row = 0) {
        llm_log_prob top[3];
        float chosen;
        llm_token token = reports[0].tokens[i];
        assert_int_equal(llm_sample(ctx, row, 0, &own), token);
        assert_int_equal(reports[0].chosen[i].token, token);
        assert_int_equal(llm_log_probs(ctx, row, token, &chosen, top, 3), 3);
        assert_true(chosen == reports[0].chosen[i].log_prob);
        for (int j = 0; j < 3; j++)
            assert_true(top[j].token == reports[0].top[i][j].token && top[j].log_prob == reports[0].top[i][j].log_prob);
        assert_int_equal(llm_forward(ctx, &(llm_batch){1, &token, NULL, NULL}, NULL), LLM_OK);
    }
    llm_context_free(ctx);
}

/* ---- Which tokens may be drawn ---- */

typedef struct candidate {
    double p;
    int id;
} candidate;

static int compare(const void *a, const void *b) {
    const candidate *x = (const candidate *)a, *y = (const candidate *)b;
    if (x->p != y->p) return x->p < y->p ? 1 : -1;
    return x->id - y->id;
}

/* Lists the remaining candidates, most likely first, with p normalized to sum to 1. Returns their number. */
static int reference(const float *logits, const llm_sampler *s, candidate *list) {
    double most = logits[0], sum = 0, seen = 0;
    int n = N;
    for (int i = 0; i < N; i++) most = logits[i] > most ? logits[i] : most;
    for (int i = 0; i < N; i++) {
        list[i].id = i;
        list[i].p = exp((logits[i] - most) / (double)s->temperature);
    }
    qsort(list, N, sizeof *list, compare);
    if (s->top_k > 0 && s->top_k < n) n = s->top_k;
    for (int i = 0; i < n; i++) sum += list[i].p;
    for (int i = 0; s->top_p > 0 && s->top_p < 1 && i < n; i++)
        if ((seen += list[i].p / sum) >= (double)s->top_p) n = i + 1;
    while (s->min_p > 0 && list[n - 1].p < (double)s->min_p * list[0].p) n--;
    sum = 0;
    for (int i = 0; i < n; i++) sum += list[i].p;
    for (int i = 0; i < n; i++) list[i].p /= sum;
    return n;
}

static void check_set(fixture *f, llm_sampler s) {
    enum { DRAWS = 10000 };
    candidate list[N];
    int n = reference(f->logits, &s, list), seen[N] = {0};
    for (int i = 0; i < DRAWS; i++) {
        llm_token token = llm_sample(f->ctx, 0, 0, &s);
        assert_in_range(token, 0, N - 1);
        seen[token]++;
    }
    assert_int_equal(s.n_drawn, DRAWS);
    for (int i = 0; i < n; i++) {
        if (list[i].p * DRAWS > 30 && !seen[list[i].id])
            fail_msg("candidate %d of %d with p %g was never drawn (k %d, p %g, min %g)", i, n, list[i].p, s.top_k,
                     s.top_p, s.min_p);
        seen[list[i].id] = 0;
    }
    for (int i = 0; i < N; i++)
        if (seen[i]) fail_msg("token %d is not a candidate (k %d, p %g, min %g)", i, s.top_k, s.top_p, s.min_p);
}

static void test_sets(void **state) {
    fixture *f = (fixture *)*state;
    static const llm_sampler samplers[] = {{.temperature = 1},
                                           {.temperature = 0.5f},
                                           {.temperature = 3},
                                           {.temperature = 1, .top_k = 1},
                                           {.temperature = 1, .top_k = 2},
                                           {.temperature = 1, .top_k = 20},
                                           {.temperature = 1, .top_k = N - 1},
                                           {.temperature = 1, .top_k = N},
                                           {.temperature = 1, .top_k = 10 * N},
                                           {.temperature = 1, .top_p = 0.1f},
                                           {.temperature = 1, .top_p = 0.5f},
                                           {.temperature = 1, .top_p = 0.95f},
                                           {.temperature = 1, .top_p = 1},
                                           {.temperature = 1, .min_p = 0.5f},
                                           {.temperature = 1, .min_p = 0.05f},
                                           {.temperature = 1, .min_p = 1},
                                           {.temperature = 1, .top_k = 20, .top_p = 0.5f},
                                           {.temperature = 0.7f, .top_k = 40, .top_p = 0.9f, .min_p = 0.1f},
                                           {.temperature = 2, .top_p = 0.8f, .min_p = 0.3f},
                                           {.temperature = 1, .top_k = 10, .min_p = 0.2f}};
    for (uint32_t seed = 1; seed < 4; seed++) {
        fill_random(f, seed, 2 * (float)seed);
        for (size_t i = 0; i < sizeof samplers / sizeof *samplers; i++) check_set(f, samplers[i]);
    }
}

/* ---- How often tokens are drawn ---- */

static void check_distribution(fixture *f, llm_sampler s) {
    enum { DRAWS = 50000 };
    candidate list[N];
    int n = reference(f->logits, &s, list), seen[N] = {0};
    double chi = 0;
    assert_in_range(n, 5, 30);
    for (int i = 0; i < DRAWS; i++) seen[llm_sample(f->ctx, 0, 0, &s)]++;
    for (int i = 0; i < n; i++) {
        double expected = list[i].p * DRAWS, off = seen[list[i].id] - expected;
        assert_true(expected > 20);
        chi += off * off / expected;
    }
    double k = n - 1,
           z = (pow(chi / k, 1.0 / 3) - 1 + 2 / (9 * k)) / sqrt(2 / (9 * k)); /* normal, by Wilson and Hilferty */
    print_message("%d candidates: chi-square %.1f, %.2f standard deviations from its mean\n", n, chi, z);
    assert_true(fabs(z) < 3.3);
}

static void test_distribution(void **state) {
    fixture *f = (fixture *)*state;
    fill_random(f, 42, 4);
    check_distribution(f, (llm_sampler){.temperature = 1, .top_k = 8, .seed = 1});
    check_distribution(f, (llm_sampler){.temperature = 0.6f, .top_k = 12, .seed = 2});
    check_distribution(f, (llm_sampler){.temperature = 1.7f, .top_k = 30, .seed = UINT64_MAX});
    check_distribution(f, (llm_sampler){.temperature = 1, .top_p = 0.5f, .seed = 4});
    fill(f, -1000);
    for (int i = 0; i < 6; i++) f->logits[40 * i] = (float)i / 2;
    check_distribution(f, (llm_sampler){.temperature = 1, .min_p = 0.01f, .seed = 3});
}

/* ---- Seeds ---- */

static void draw(fixture *f, llm_sampler *s, llm_token *tokens, int n) {
    for (int i = 0; i < n; i++) tokens[i] = llm_sample(f->ctx, 0, 0, s);
}

static void test_seeds(void **state) {
    fixture *f = (fixture *)*state, scalar;
    llm_token a[100], b[100];
    llm_sampler s = {.temperature = 1, .top_p = 0.95f, .seed = 123}, first = s, other = s;
    fill_random(f, 9, 3);
    draw(f, &first, a, 100);
    other = s;
    draw(f, &other, b, 40);
    llm_sampler copy = other; /* continues where `other` is */
    draw(f, &copy, b + 40, 60);
    assert_memory_equal(a, b, sizeof a);
    s.seed = 124;
    draw(f, &s, b, 100);
    assert_memory_not_equal(a, b, sizeof a);
    memset(&scalar, 0, sizeof scalar);
    assert_int_equal(open_isa(&scalar, "scalar"), 0);
    fill_random(&scalar, 9, 3);
    first.n_drawn = 0;
    draw(&scalar, &first, b, 100);
    close_fixture(&scalar);
    assert_memory_equal(a, b, sizeof a);
}

/* ---- Extremes ---- */

/* Very low temperatures always draw the best token. Very high ones draw nearly all tokens. */
static void test_temperatures(void **state) {
    fixture *f = (fixture *)*state;
    static const float cold[] = {1e-3f, 1e-6f, 1e-20f, 1e-37f, 1e-38f, 1e-42f, 1e-45f},
                       hot[] = {1e6f, 1e20f, 3e38f, INFINITY};
    static const float offsets[] = {0, 500, -500};
    for (size_t o = 0; o < 3; o++) {
        fill_random(f, 3, 10);
        for (int i = 0; i < N; i++) f->logits[i] += offsets[o];
        llm_token best = sample(f, (llm_sampler){0});
        for (size_t i = 0; i < sizeof cold / sizeof *cold; i++)
            for (uint64_t seed = 0; seed < 20; seed++) {
                llm_token token = sample(f, (llm_sampler){.temperature = cold[i], .seed = seed});
                if (token != best) fail_msg("temperature %g draws token %d instead of %d", cold[i], token, best);
            }
        for (size_t i = 0; i < sizeof hot / sizeof *hot; i++) {
            int seen[N] = {0}, n = 0;
            llm_sampler s = {.temperature = hot[i]};
            for (int j = 0; j < 5000; j++) n += seen[llm_sample(f->ctx, 0, 0, &s)]++ == 0;
            if (n < N - 5) fail_msg("temperature %g draws only %d different tokens", hot[i], n);
        }
    }
}

static void test_strange_logits(void **state) {
    fixture *f = (fixture *)*state;
    static const float strange[] = {NAN, INFINITY, -INFINITY, 3e38f, -3e38f, 1e-45f};
    static const float settings[] = {0, 1, NAN, -1, 1e30f};
    for (size_t i = 0; i < sizeof strange / sizeof *strange; i++)
        for (int some = 0; some < 2; some++)
            for (size_t j = 0; j < sizeof settings / sizeof *settings; j++) {
                fill(f, strange[i]);
                if (some) fill_random(f, 1, 5);
                if (some) f->logits[30] = strange[i];
                llm_sampler s = {.temperature = settings[j],
                                 .top_p = settings[j],
                                 .min_p = settings[(j + 1) % 5],
                                 .top_k = -3 + 5 * (int)j,
                                 .repeat_penalty = settings[(j + 2) % 5]};
                bool none = isnan(strange[i]) || (strange[i] == -INFINITY && !some);
                for (int k = 0; k < 50; k++) {
                    llm_token token = llm_sample(f->ctx, 0, 0, &s);
                    if (none) assert_int_equal(token, -1);
                    else assert_in_range(token, 0, N - 1);
                }
            }
    fill(f, -INFINITY); /* only one token remains */
    f->logits[30] = -3;
    for (uint64_t seed = 0; seed < 50; seed++) {
        assert_int_equal(sample(f, (llm_sampler){.temperature = 1, .seed = seed}), 30);
        assert_int_equal(sample(f, (llm_sampler){.temperature = 0.01f, .top_p = 0.9f, .seed = seed}), 30);
    }
    assert_int_equal(sample(f, (llm_sampler){0}), 30);
}

/* A NaN is found at any position, however likely another token is. No random number is drawn. */
static void test_nan(void **state) {
    fixture *f = (fixture *)*state;
    fill_random(f, 1, 5);
    f->logits[100] = 30;
    for (int i = 0; i < N; i++) {
        float kept = f->logits[i];
        llm_sampler s = {.temperature = (float)(i % 2), .top_k = 2};
        f->logits[i] = i % 3 ? NAN : -NAN;
        assert_int_equal(llm_sample(f->ctx, 0, 0, &s), -1);
        assert_true(s.n_drawn == 0);
        f->logits[i] = kept;
    }
    static const llm_logit_bias nan[] = {{7, NAN}}, both[] = {{7, INFINITY}, {7, -INFINITY}};
    assert_int_equal(sample(f, (llm_sampler){.biases = nan, .n_biases = 1}), -1);
    assert_int_equal(sample(f, (llm_sampler){.biases = both, .n_biases = 2}), -1);
    assert_int_equal(sample(f, (llm_sampler){0}), 100);
}

/* At any temperature, a forced token is always drawn and a forbidden one never. If all are forbidden, the result is
   -1. */
static void test_forced_and_forbidden(void **state) {
    fixture *f = (fixture *)*state;
    static const float temperatures[] = {0, 0.01f, 1, 1e6f, INFINITY};
    static const llm_logit_bias force[] = {{77, INFINITY}}, forbid[] = {{78, -INFINITY}};
    llm_logit_bias all[N];
    fill_random(f, 5, 20);
    f->logits[78] = 60;
    for (int i = 0; i < N; i++) all[i] = (llm_logit_bias){i, -INFINITY};
    for (int i = 0; i < 5; i++) {
        llm_sampler s = {.temperature = temperatures[i], .biases = force, .n_biases = 1}, never = s, none = s;
        never.biases = forbid;
        none.biases = all;
        none.n_biases = N;
        for (int j = 0; j < 2000; j++) {
            assert_int_equal(llm_sample(f->ctx, 0, 0, &s), 77);
            assert_int_not_equal(llm_sample(f->ctx, 0, 0, &never), 78);
        }
        assert_int_equal(llm_sample(f->ctx, 0, 0, &none), -1);
        none.top_k = 5;
        none.top_p = 0.9f;
        none.min_p = 0.1f;
        assert_int_equal(llm_sample(f->ctx, 0, 0, &none), -1);
    }
}

static void test_bad_settings(void **state) {
    fixture *f = (fixture *)*state;
    fill_random(f, 5, 20);
    assert_int_equal(llm_sample(f->ctx, 0, 0, NULL), sample(f, (llm_sampler){0})); /* greedy */
    assert_int_equal(sample(f, (llm_sampler){.n_biases = 3}), -1);
    assert_int_equal(sample(f, (llm_sampler){.temperature = 1, .n_biases = 3}), -1);
}

/* ---- A large vocabulary ---- */

/* Draws from a large vocabulary. The hashes come from a sampler that ran every step on all tokens; running it only on
   the likely tokens must not change them. */
static void test_large_vocabulary(void **state) {
    enum { LARGE = 151936, DRAWS = 100 };
    static const llm_sampler samplers[] = {
        {0},
        {.temperature = 0.8f},
        {.temperature = 0.8f, .top_k = 40},
        {.temperature = 0.8f, .top_p = 0.95f},
        {.temperature = 0.8f, .min_p = 0.05f},
        {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1.1f},
        {.temperature = 1.5f, .top_k = 3000, .top_p = 0.9f},
        {.temperature = 0.3f, .top_p = 0.5f, .min_p = 0.1f},
        {.temperature = 2, .top_k = 5, .top_p = 0.99f}};
    static const uint64_t expected[4][9] = {
        {0xDE2543E1DD678FD9, 0x6191D84801059F77, 0xAFBFA6791E5DC57A, 0x64D6197207BD442C, 0x14B51F31BCBC185E,
         0x59D76179FD961C38, 0xDFF95636527905D4, 0xDE2543E1DD678FD9, 0x5200AB63B09D3637},
        {0x1CE5ECFB97BBC859, 0x317EF900EE5ADA14, 0x8469422261565242, 0x259A6117A19B710B, 0x1BD20B18286551F0,
         0xC0490B341D797BE8, 0xBCE438544A39F77A, 0x78836231F50FE4C4, 0xF4E87BFF130AAB69},
        {0xF1D75EE3D625C451, 0x7319D09EFBAFD7FA, 0xB2DEFB6406C4582C, 0x62A0ED2666B207F1, 0x476DD75C1AE905AB,
         0x99C6BB41A578ABDE, 0x5D589A2E413674B8, 0xD0C25ABB3DBBC5CD, 0xF63208065BDC992D},
        {0x60C90B5CCD779ED9, 0x2538024B17B15759, 0xFDB3708F25CE90D3, 0x1DF09F7791D9F352, 0xB4327D0D83F51C28,
         0x5569F64B80673558, 0x3C8EC8832102E89E, 0x36FFF6347F5DB661, 0x98CDDF54CF612E26}};
    llm_model_desc desc = {.n_threads = 1};
    llm_context_desc context_desc = {.n_threads = 1};
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    static const llm_token tokens[] = {7, 9, 7};
    size_t size;
    uint8_t *data = tiny_padded(&SPEC, LARGE - N, &size);
    (void)state;
    assert_int_equal(llm_model_load_memory(&model, data, size, &desc, NULL), LLM_OK);
    assert_int_equal(llm_context_create(&ctx, model, &context_desc, NULL), LLM_OK);
    assert_int_equal(llm_forward(ctx, &(llm_batch){3, tokens, NULL, NULL}, NULL), LLM_OK);
    free(data);
    float *logits = (float *)(uintptr_t)llm_logits(ctx, 2);
    for (int shape = 0; shape < 4; shape++) { /* a few likely tokens, as in a text; uniform; many ties; nearly flat */
        uint32_t x = 1 + (uint32_t)shape;
        for (int i = 0; i < LARGE; i++) {
            float sum = 0;
            for (int j = 0; j < 4; j++) {
                x = x * 1664525u + 1013904223u;
                sum += (float)(x >> 8) / 16777216.0f - 0.5f;
            }
            bool likely = x >> 8 < 8000;
            logits[i] = shape == 0   ? 4 * sum + (likely ? 8 : 0)
                        : shape == 1 ? (float)(x >> 8) / 1677721.6f
                        : shape == 2 ? (float)(int)(12 * sum)
                                     : 0.05f * sum;
        }
        for (int i = 0; i < 9; i++) {
            llm_sampler s = samplers[i];
            uint64_t hash = 0xCBF29CE484222325u;
            s.seed = (uint64_t)i;
            for (int j = 0; j < DRAWS; j++) hash = (hash ^ (uint64_t)llm_sample(ctx, 2, 0, &s)) * 0x100000001B3u;
            if (hash != expected[shape][i])
                fail_msg("shape %d, sampler %d: 0x%016llX", shape, i, (unsigned long long)hash);
        }
    }
    llm_context_free(ctx);
    llm_model_free(model);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void) {
    const struct CMUnitTest tests[] = {TEST(test_ties),
                                       TEST(test_not_computed),
                                       TEST(test_biases),
                                       TEST(test_all_but_one_forbidden),
                                       TEST(test_penalty),
                                       TEST(test_counts),
                                       TEST(test_log_probs),
                                       TEST(test_on_log_probs),
                                       TEST(test_sets),
                                       TEST(test_distribution),
                                       TEST(test_seeds),
                                       TEST(test_temperatures),
                                       TEST(test_strange_logits),
                                       TEST(test_nan),
                                       TEST(test_forced_and_forbidden),
                                       TEST(test_bad_settings),
                                       cmocka_unit_test(test_large_vocabulary)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
