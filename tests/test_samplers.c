/* The samplers declared after answer_begin in llm_sampler: which tokens are drawn and how often, compared with
   samplers.jsonl (NumPy, in double); bad settings; the state; drafts and streams give the texts of plain decoding.
   Variants: asan */
#include "tests/check.h"
#include <jansson.h>
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

static const tiny_spec SPEC = {1, 32, 32, 2, 2, 16, 512, 5, 0, 0, 1};
enum { N = 261 }; /* size of SPEC's vocabulary: 256 bytes and five more */

static llm_model *model;
static llm_context *ctx;
static float *logits; /* the logits after the text; the tests write them */
static int row;       /* the row of these logits */

static int start(void **state) {
    llm_context_desc desc = {.n_threads = 2, .n_logits = LLM_DRAFT_MAX + 1, .n_seq = 4};
    (void)state;
    model = load_tiny(&SPEC, LLM_DTYPE_F32);
    return llm_context_create(&ctx, model, &desc, NULL);
}

static int stop(void **state) {
    (void)state;
    llm_context_free(ctx);
    llm_model_free(model);
    return 0;
}

static void set_text(const llm_token *tokens, int n) {
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    assert_int_equal(llm_forward(ctx, &(llm_batch){n, tokens, NULL, NULL}, NULL), LLM_OK);
    row = n - 1;
    logits = (float *)(uintptr_t)llm_logits(ctx, row);
    assert_non_null(logits);
}

static void fill_random(uint32_t seed, float scale) {
    for (int i = 0; i < N; i++) {
        seed = seed * 1664525u + 1013904223u;
        logits[i] = scale * (float)(int32_t)seed / 2147483648.0f;
    }
}

static llm_token sample(llm_sampler s) { return llm_sample(ctx, row, 0, &s); }

/* ---- Distributions ---- */

static float real(const json_t *settings, const char *name) {
    return (float)json_number_value(json_object_get(settings, name));
}

static llm_sampler sampler_of(const json_t *settings, const char **breakers) {
    const json_t *list = json_object_get(settings, "dry_breakers");
    llm_sampler s = {.temperature = real(settings, "temperature"),
                     .top_k = (int)real(settings, "top_k"),
                     .top_p = real(settings, "top_p"),
                     .min_p = real(settings, "min_p"),
                     .top_n_sigma = real(settings, "top_n_sigma"),
                     .typical_p = real(settings, "typical_p"),
                     .mirostat_tau = real(settings, "mirostat_tau"),
                     .mirostat_eta = real(settings, "mirostat_eta"),
                     .mirostat_shift = real(settings, "mirostat_shift"),
                     .xtc_probability = real(settings, "xtc_probability"),
                     .xtc_threshold = real(settings, "xtc_threshold"),
                     .dry_multiplier = real(settings, "dry_multiplier"),
                     .dry_base = real(settings, "dry_base"),
                     .dry_allowed_length = (int)real(settings, "dry_allowed_length"),
                     .dry_last_n = (int)real(settings, "dry_last_n"),
                     .dry_breakers = list ? breakers : NULL};
    for (size_t i = 0; i < json_array_size(list); i++)
        breakers[s.n_dry_breakers++] = json_string_value(json_array_get(list, i));
    return s;
}

static double number_at(const json_t *object, int id) {
    char name[16];
    snprintf(name, sizeof name, "%d", id);
    return json_number_value(json_object_get(object, name));
}

/* Checks draws with a chi-square test. Tokens expected less than 10 times are counted together. */
static void check_line(const json_t *line, int number) {
    enum { DRAWS = 40000 };
    const char *breakers[8];
    llm_token text[64];
    int n = 0, seen[N] = {0}, rare = 0, k = -1;
    double chi = 0, rare_expected = 0;
    const json_t *settings = json_object_get(line, "sampler"), *list = json_object_get(line, "text");
    const json_t *p = json_object_get(line, "p"), *shifts = json_object_get(line, "shifts");
    for (; n < (int)json_array_size(list); n++)
        text[n] = (llm_token)json_integer_value(json_array_get(list, (size_t)n));
    set_text(text, n);
    fill_random((uint32_t)json_integer_value(json_object_get(line, "seed")), real(line, "scale"));
    float best = logits[0];
    for (int i = 0; i < N; i++) best = logits[i] > best ? logits[i] : best;
    logits[' '] = logits['t'] = best - 0.25f;
    llm_sampler s = sampler_of(settings, breakers), first = s;
    for (int i = 0; i < DRAWS; i++) {
        s.mirostat_shift = first.mirostat_shift;
        llm_token token = llm_sample(ctx, row, 0, &s);
        assert_in_range(token, 0, N - 1);
        if (!seen[token]++ && shifts && fabs(s.mirostat_shift - number_at(shifts, token)) > 1e-4)
            fail_msg("line %d: the state is %g after token %d, not %g", number, s.mirostat_shift, token,
                     number_at(shifts, token));
    }
    bool coin = first.xtc_probability > 0 && first.xtc_threshold <= 0.5f;
    assert_int_equal(s.n_drawn, coin ? 2 * DRAWS : DRAWS);
    for (int i = 0; i < N; i++) {
        double expected = number_at(p, i) * DRAWS;
        if (expected == 0 && seen[i]) fail_msg("line %d: token %d cannot be drawn", number, i);
        if (expected < 10) {
            rare += seen[i];
            rare_expected += expected;
            continue;
        }
        chi += (seen[i] - expected) * (seen[i] - expected) / expected;
        k++;
    }
    if (rare_expected > 10) {
        chi += (rare - rare_expected) * (rare - rare_expected) / rare_expected;
        k++;
    }
    if (k < 1) return;
    double z = (pow(chi / k, 1.0 / 3) - 1 + 2.0 / (9 * k)) / sqrt(2.0 / (9 * k)); /* normal, by Wilson and Hilferty */
    if (z > 3.8) fail_msg("line %d: chi-square %.1f of %d, %.2f standard deviations above its mean", number, chi, k, z);
}

static void test_golden(void **state) {
    FILE *file = open_lines("tests/golden/samplers.jsonl");
    int number = 0;
    (void)state;
    for (json_t *line; (line = next_line(file)); json_decref(line)) check_line(line, ++number);
    assert_int_equal(number, 36);
}

/* ---- Settings ---- */

static const llm_token TEXT[] = {1, 2, 3, 1, 2, 3, 1, 2};

static void test_refused(void **state) {
    static const char *const none[1] = {NULL}, *const empty[1] = {""};
    const llm_sampler all = {.temperature = 1,
                             .top_n_sigma = 1,
                             .typical_p = 0.5f,
                             .xtc_probability = 1,
                             .xtc_threshold = 0.1f,
                             .dry_multiplier = 1};
    llm_sampler s = all;
    llm_error err;
    (void)state;
    set_text(TEXT, 8);
    s.n_dry_breakers = 1;
    assert_int_equal(sample(s), -1);
    s.dry_breakers = none;
    assert_int_equal(sample(s), -1);
    s.dry_breakers = empty;
    assert_int_equal(sample(s), -1);
    llm_generate_desc desc = {.tokens = TEXT, .n_tokens = 8, .max_tokens = 3, .sampler = &s};
    assert_int_equal(llm_generate(ctx, &desc, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_non_null(strstr(err.message, "dry_breakers[0] is NULL or empty"));
    set_text(TEXT, 8);
    logits[5] = NAN;
    s = all;
    assert_int_equal(llm_sample(ctx, row, 0, &s), -1);
    assert_int_equal(s.n_drawn, 0);
    s = (llm_sampler){.temperature = 1, .mirostat_tau = 3};
    assert_int_equal(llm_sample(ctx, row, 0, &s), -1);
    assert_true(s.n_drawn == 0 && s.mirostat_shift == 0);
    for (int i = 0; i < N; i++) logits[i] = -INFINITY;
    assert_int_equal(sample(all), -1);
    assert_int_equal(sample(s), -1);
    logits[9] = -4; /* only one token remains */
    for (uint64_t seed = 0; seed < 20; seed++) {
        llm_sampler one = all;
        one.seed = s.seed = seed;
        assert_int_equal(sample(one), 9);
        assert_int_equal(sample(s), 9);
    }
    logits[7] = INFINITY;
    assert_int_equal(sample(all), 7);
    assert_int_equal(sample(s), 7);
}

/* With strange settings and logits, the result is always a token of the vocabulary. */
static void test_strange(void **state) {
    static const float values[] = {0, 1e-30f, 0.3f, 0.5f, 1, 2, 1e30f, -1, INFINITY, -INFINITY, NAN};
    enum { VALUES = sizeof values / sizeof *values };
    (void)state;
    set_text(TEXT, 8);
    for (int shape = 0; shape < 3; shape++) {
        fill_random(5, shape == 0 ? 0 : shape == 1 ? 5 : 1e4f);
        for (int i = 0; i < VALUES; i++)
            for (int j = 0; j < VALUES; j++) {
                llm_sampler s = {.temperature = 1, .top_n_sigma = values[i], .typical_p = values[j]};
                assert_in_range(sample(s), 0, N - 1);
                s = (llm_sampler){.temperature = 1, .xtc_probability = values[i], .xtc_threshold = values[j]};
                assert_in_range(sample(s), 0, N - 1);
                s = (llm_sampler){.temperature = 1, .mirostat_tau = values[i], .mirostat_eta = values[j]};
                for (int k = 0; k < 30; k++) assert_in_range(llm_sample(ctx, row, 0, &s), 0, N - 1);
                s = (llm_sampler){.temperature = 1, .mirostat_tau = 1, .mirostat_shift = values[j]};
                for (int k = 0; k < 3; k++) assert_in_range(llm_sample(ctx, row, 0, &s), 0, N - 1);
                s = (llm_sampler){.temperature = 1, .dry_multiplier = values[i], .dry_base = values[j]};
                assert_in_range(sample(s), 0, N - 1);
            }
    }
}

/* A vocabulary of 200,000 tokens. */
static void test_large(void **state) {
    enum { LARGE = 200000 };
    llm_model *large = NULL;
    llm_context *own = NULL;
    llm_model_desc desc = {.n_threads = 1};
    llm_context_desc context_desc = {.n_threads = 1};
    size_t size;
    uint8_t *data = tiny_padded(&SPEC, LARGE - N, &size);
    (void)state;
    assert_int_equal(llm_model_load_memory(&large, data, size, &desc, NULL), LLM_OK);
    free(data);
    assert_int_equal(llm_context_create(&own, large, &context_desc, NULL), LLM_OK);
    assert_int_equal(llm_forward(own, &(llm_batch){8, TEXT, NULL, NULL}, NULL), LLM_OK);
    float *wide = (float *)(uintptr_t)llm_logits(own, 7);
    for (int i = 0; i < LARGE; i++) wide[i] = 0;
    double mean = 0;
    int typical = 0;
    for (int i = 0; i < 50; i++) { /* uniform: all tokens are typical, and none reaches XTC's threshold */
        llm_sampler s = {.temperature = 1, .typical_p = 0.99f, .xtc_probability = 1, .xtc_threshold = 0.1f};
        s.seed = (uint64_t)i;
        mean += llm_sample(own, 7, 0, &s) / 50.0 / LARGE;
    }
    assert_true(mean > 0.3 && mean < 0.7);
    for (int i = 0; i < 100; i++) wide[2000 * i] = 12 + 0.01f * (float)i; /* these have about half of the probability */
    for (int i = 0; i < 200; i++) {
        llm_sampler s = {.temperature = 1, .typical_p = 0.5f, .seed = (uint64_t)i};
        typical += llm_sample(own, 7, 0, &s) % 2000 == 0;
        s = (llm_sampler){.temperature = 1, .mirostat_tau = 4, .seed = (uint64_t)i};
        assert_int_equal(llm_sample(own, 7, 0, &s) % 2000, 0);
        s = (llm_sampler){.temperature = 1, .top_n_sigma = 3, .seed = (uint64_t)i};
        assert_int_equal(llm_sample(own, 7, 0, &s) % 2000, 0);
    }
    assert_int_equal(typical, 200);
    llm_context_free(own);
    llm_model_free(large);
}

/* ---- Texts ---- */

typedef struct answer {
    llm_token tokens[64];
    int n;
} answer;

static bool on_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    answer *t = (answer *)user;
    (void)bytes, (void)n_bytes;
    t->tokens[t->n++] = token;
    return true;
}

static const llm_sampler SAMPLERS[] = {
    {.temperature = 0.4f, .mirostat_tau = 3, .seed = 1},
    {.temperature = 0.4f, .xtc_probability = 0.5f, .xtc_threshold = 0.02f, .seed = 2},
    {.temperature = 0.4f, .typical_p = 0.7f, .top_n_sigma = 1.5f, .seed = 3},
    {.dry_multiplier = 2, .dry_base = 3},
    {.temperature = 0.5f, .dry_multiplier = 0.8f, .xtc_probability = 0.4f, .xtc_threshold = 0.1f, .seed = 5}};
enum { SAMPLER_COUNT = sizeof SAMPLERS / sizeof *SAMPLERS };

/* Plain generation, generation with a draft, concurrent streams, and a host's own loop give the same tokens and the
   same state of the sampler. */
static void test_texts(void **state) {
    answer plain[SAMPLER_COUNT], beside[SAMPLER_COUNT];
    llm_sampler ends[SAMPLER_COUNT], own[SAMPLER_COUNT];
    llm_stream *streams[SAMPLER_COUNT];
    llm_context_desc wide = {.n_threads = 2, .n_seq = SAMPLER_COUNT, .n_logits = SAMPLER_COUNT};
    llm_context *many = NULL;
    int running = 1;
    (void)state;
    memset(beside, 0, sizeof beside);
    assert_int_equal(llm_context_create(&many, model, &wide, NULL), LLM_OK);
    for (int i = 0; i < SAMPLER_COUNT; i++) {
        llm_generate_desc desc = {.tokens = TEXT, .n_tokens = 8, .max_tokens = 50, .ignore_end = true};
        desc.on_token = on_token;
        for (int drafted = 0; drafted < 2; drafted++) {
            llm_draft draft = llm_draft_lookup();
            answer t = {{0}, 0};
            llm_sampler s = SAMPLERS[i];
            desc.sampler = &s;
            desc.user = &t;
            desc.draft = drafted ? &draft : NULL;
            desc.draft_keeps_text = true;
            assert_int_equal(llm_generate(ctx, &desc, NULL, NULL), LLM_OK);
            assert_int_equal(t.n, 50);
            if (drafted) assert_memory_equal(&t, &plain[i], sizeof t);
            if (drafted) assert_true(s.n_drawn == ends[i].n_drawn && s.mirostat_shift == ends[i].mirostat_shift);
            plain[i] = t;
            ends[i] = s;
            llm_draft_free(&draft);
        }
        own[i] = SAMPLERS[i];
        desc.draft = NULL;
        desc.seq = LLM_SEQ_ANY;
        desc.sampler = &own[i];
        desc.user = &beside[i];
        assert_int_equal(llm_stream_begin(&streams[i], many, &desc, NULL), LLM_OK);
    }
    while (running) assert_int_equal(llm_step(many, 0, &running, NULL), LLM_OK);
    for (int i = 0; i < SAMPLER_COUNT; i++) {
        assert_memory_equal(&beside[i], &plain[i], sizeof plain[i]);
        assert_true(own[i].mirostat_shift == ends[i].mirostat_shift);
        llm_stream_free(streams[i]);
        set_text(TEXT, 8);
        llm_sampler s = SAMPLERS[i];
        for (int j = 0, at = row; j < 50; j++, at = 0) {
            llm_sampler copy = s;
            llm_token token = llm_sample(ctx, at, 0, &s);
            assert_int_equal(token, plain[i].tokens[j]);
            assert_int_equal(llm_sample(ctx, at, 0, &copy), token); /* a copy draws the same */
            assert_int_equal(llm_forward(ctx, &(llm_batch){1, &token, NULL, NULL}, NULL), LLM_OK);
        }
    }
    llm_context_free(many);
}

/* Rejection sampling keeps the distribution: over many texts, the second token is distributed as without a draft. The
   draft is the same model with int8 weights. */
static void test_rejection(void **state) {
    enum { TEXTS = 3000, KINDS = 16 };
    llm_model *coarse = load_tiny(&SPEC, LLM_DTYPE_INT8);
    llm_draft draft;
    (void)state;
    for (int i = 0; i < 2; i++) {
        int counts[2][KINDS] = {{0}}, n_checked = 0;
        assert_int_equal(llm_draft_model(&draft, ctx, coarse, NULL), LLM_OK);
        for (int drafted = 0; drafted < 2; drafted++)
            for (int j = 0; j < TEXTS / (SANITIZED ? 10 : 1); j++) {
                answer t = {{0}, 0};
                llm_stats stats;
                llm_sampler s = SAMPLERS[i];
                s.seed = (uint64_t)(2 * j + drafted);
                llm_generate_desc desc = {.tokens = TEXT, .n_tokens = 8, .max_tokens = 6, .ignore_end = true};
                desc.sampler = &s;
                desc.on_token = on_token;
                desc.user = &t;
                desc.draft = drafted ? &draft : NULL;
                assert_int_equal(llm_generate(ctx, &desc, &stats, NULL), LLM_OK);
                n_checked += stats.draft.n_proposed;
                counts[drafted][(unsigned)(t.tokens[3] * 31 + t.tokens[4]) % KINDS]++;
            }
        double chi = 0;
        for (int k = 0; k < KINDS; k++) {
            double sum = counts[0][k] + counts[1][k], off = counts[0][k] - counts[1][k];
            if (sum > 0) chi += off * off / sum;
        }
        print_message("sampler %d: %d guesses checked, chi-square %.1f of %d\n", i, n_checked, chi, KINDS - 1);
        assert_true(chi < 45);
        llm_draft_free(&draft);
    }
    llm_model_free(coarse);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_golden),  cmocka_unit_test(test_refused),
                                       cmocka_unit_test(test_strange), cmocka_unit_test(test_large),
                                       cmocka_unit_test(test_texts),   cmocka_unit_test(test_rejection)};
    return cmocka_run_group_tests(tests, start, stop);
}
