/* Each compiler makes fast kernels: the products of every instruction set reach a minimum share of the machine's
   multiplication rate, which is measured at the same time, in one thread. With a compiler that ignores a pragma, they
   would reach a fifth or less. The best of several tries counts, so a busy machine only makes the test take longer.
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

/* Counts the operations of the products only. The last layer computes queries, feed-forward part and logits for one
   token. */
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
    llm_status status = try_tiny(&model, &SPEC, desc, &err);
    if (status == LLM_ERROR_ARGUMENT && strstr(err.message, "not on this machine")) skip();
    if (status) fail_msg("%s", err.message);
    llm_context *ctx = create_context(model, &context_desc);
    for (int i = 0; i < LEAST_ROUNDS || (i < MOST_ROUNDS && (best < floor * limit || best > 1.2 * limit)); i++) {
        limit = fmax(limit, llm_measure_flops(ctx));
        for (int j = 0; j < 10; j++) best = fmax(best, prefill(ctx));
    }
    print_message("%s, %s: %.0f of %.0f GFLOP/s, %.0f %%\n", isa, llm_dtype_name(dtype), best / 1e9, limit / 1e9,
                  100 * best / limit);
    if (best < floor * limit)
        fail_msg("%s, %s reaches %.0f %% of the limit", isa, llm_dtype_name(dtype), 100 * best / limit);
    close_context(ctx);
}

static void check_set(const char *isa, double floor) {
    check_share(isa, LLM_DTYPE_BF16, floor);
    check_share(isa, LLM_DTYPE_INT8, floor);
    check_share(isa, LLM_DTYPE_INT4, floor);
}

#if defined(__aarch64__)
static void speed_neon(void **state) {
    (void)state;
    check_set("neon", 0.3);
}
#else
static void speed_avx2(void **state) {
    (void)state;
    check_set("avx2", 0.4);
}
static void speed_avx512(void **state) {
    (void)state;
    check_set("avx512", 0.4);
}
static void speed_avx512_bf16(void **state) {
    (void)state;
    check_set("avx512_bf16", 0.4);
}
static void speed_amx(void **state) {
    (void)state;
    check_set("amx", 0.1);
}
#endif

int main(void) {
    const struct CMUnitTest tests[] = {
#if defined(__aarch64__)
        cmocka_unit_test(speed_neon),
#else
        cmocka_unit_test(speed_avx2),
        cmocka_unit_test(speed_avx512),
        cmocka_unit_test(speed_avx512_bf16),
        cmocka_unit_test(speed_amx),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
