/* What compilers make of the kernels: of each set's products, the share of the multiplication rate that is measured beside
   them, in one thread. A pragma that a compiler passes over leaves a fifth or less of it. And how long a token is picked from
   a large vocabulary. All are the best of several tries, so a busy neighbour only makes this take longer.
   Variants: matrix */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

#include <time.h>

enum { N_TOKENS = 128, LEAST_ROUNDS = 3, MOST_ROUNDS = 60 };

static const tiny_spec SPEC = {2, 576, 1536, 9, 3, 64, N_TOKENS, 43, 0, 3, 1};

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Of the products alone. The last layer makes queries, its feed-forward part and logits for a single token. */
static double operations(void) {
    double q = SPEC.n_heads * SPEC.head_dim, kv = SPEC.n_kv_heads * SPEC.head_dim, ffn = 3.0 * SPEC.n_ff;
    return 2.0 * SPEC.n_embd * (N_TOKENS * ((SPEC.n_layers - 1) * (2 * q + 2 * kv + ffn) + 2 * kv) + 2 * q + ffn);
}

static double prefill(llm_context *ctx) {
    static const llm_token tokens[N_TOKENS] = {1, 2, 3};
    llm_batch batch = {N_TOKENS, tokens, NULL, NULL};
    llm_error err;
    llm_seq_truncate(ctx, 0, 0, NULL);
    double start = seconds();
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    return operations() / (seconds() - start);
}

static void check_share(const char *isa, llm_dtype dtype, double floor) {
    llm_model_desc desc = {.dtype = dtype, .isa = isa, .n_threads = 1};
    llm_context_desc context_desc = {.n_ctx = N_TOKENS, .n_batch = N_TOKENS, .n_threads = 1};
    llm_model *model;
    llm_error err;
    double best = 0, limit = 0;
    if (try_tiny(&model, &SPEC, desc, &err)) skip(); /* this machine does not have the instruction set */
    llm_context *ctx = create_context(model, &context_desc);
    for (int i = 0; i < LEAST_ROUNDS || (i < MOST_ROUNDS && (best < floor * limit || best > 1.2 * limit)); i++) {
        limit = fmax(limit, llm_measure_flops(ctx));
        for (int j = 0; j < 10; j++) best = fmax(best, prefill(ctx));
    }
    print_message("%s, %s: %.0f of %.0f GFLOP/s, %.0f %%\n", isa, llm_dtype_name(dtype), best / 1e9, limit / 1e9, 100 * best / limit);
    if (best < floor * limit) fail_msg("%s, %s reaches %.0f %% of the limit", isa, llm_dtype_name(dtype), 100 * best / limit);
    close_context(ctx);
}

static void check_set(const char *isa, double floor) {
    check_share(isa, LLM_DTYPE_BF16, floor);
    check_share(isa, LLM_DTYPE_INT8, floor);
    check_share(isa, LLM_DTYPE_INT4, floor);
}

/* Picks from a large vocabulary's logits, which are a spread wide. The limits are several times what a core of 2022 takes. */
static void check_sampler(llm_context *ctx, llm_sampler sampler, float spread, double limit) {
    static const llm_token token = 7;
    int n_vocab = llm_model_get_info(llm_context_model(ctx)).n_vocab;
    double best = 1e9;
    llm_error err;
    llm_seq_truncate(ctx, 0, 0, NULL);
    if (llm_forward(ctx, &(llm_batch){1, &token, NULL, NULL}, &err)) fail_msg("%s", err.message);
    float *logits = (float *)(uintptr_t)llm_logits(ctx, 0);
    uint32_t seed = 1;
    for (int i = 0; i < n_vocab; i++, seed = seed * 1664525u + 1013904223u) logits[i] = spread * (float)(seed >> 8) / 16777216.0f;
    for (int i = 0; i < LEAST_ROUNDS || (i < 10 * MOST_ROUNDS && best > limit); i++) {
        double start = seconds();
        assert_in_range(llm_sample(ctx, 0, 0, &sampler), 0, n_vocab - 1);
        best = fmin(best, seconds() - start);
    }
    print_message("temperature %g, top-k %d, top-p %g, min-p %g of logits up to %g: %.0f us\n", (double)sampler.temperature, sampler.top_k,
                  (double)sampler.top_p, (double)sampler.min_p, (double)spread, 1e6 * best);
    if (best > limit) fail_msg("this took %.0f us of %.0f", 1e6 * best, 1e6 * limit);
}

static void speed_sampler(void **state) {
    static const tiny_spec small = {1, 32, 32, 2, 2, 16, 64, 5, 0, 0, 1};
    enum { N_VOCAB = 151936, OWN = 261 }; /* of Qwen, and of `small` */
    static const llm_sampler greedy = {0}, plain = {.temperature = 0.8f}, top_p = {.temperature = 0.8f, .top_p = 0.95f},
                             min_p = {.temperature = 0.8f, .min_p = 0.05f},
                             all = {.temperature = 0.8f, .top_k = 40, .top_p = 0.95f, .min_p = 0.05f};
    llm_model_desc desc = {.n_threads = 1};
    llm_context_desc context_desc = {.n_threads = 1};
    llm_model *model = NULL;
    llm_error err;
    (void)state;
    uint8_t *data = tiny_padded(&small, N_VOCAB - OWN, &desc.data_size);
    desc.data = data;
    if (llm_model_load(&model, NULL, &desc, &err)) fail_msg("%s", err.message);
    free(data);
    llm_context *ctx = create_context(model, &context_desc);
    check_sampler(ctx, greedy, 10, 100e-6);
    check_sampler(ctx, all, 10, 400e-6);
    check_sampler(ctx, greedy, 0.1f, 100e-6); /* nearly all are as likely as the best */
    check_sampler(ctx, all, 0.1f, 1500e-6);
    check_sampler(ctx, plain, 0.1f, 8e-3);
    check_sampler(ctx, top_p, 0.1f, 12e-3);
    check_sampler(ctx, min_p, 0.1f, 8e-3);
    close_context(ctx);
}

#if defined(__aarch64__)
static void speed_neon(void **state) { (void)state; check_set("neon", 0.3); }
#else
static void speed_avx2(void **state) { (void)state; check_set("avx2", 0.4); }
static void speed_avx512(void **state) { (void)state; check_set("avx512", 0.4); }
static void speed_avx512_bf16(void **state) { (void)state; check_set("avx512_bf16", 0.4); }
static void speed_amx(void **state) { (void)state; check_set("amx", 0.1); }
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(speed_sampler),
#if defined(__aarch64__)
        cmocka_unit_test(speed_neon),
#else
        cmocka_unit_test(speed_avx2), cmocka_unit_test(speed_avx512), cmocka_unit_test(speed_avx512_bf16), cmocka_unit_test(speed_amx),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
