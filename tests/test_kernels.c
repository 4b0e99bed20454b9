/* Every kernel of every instruction set against the scalar one, which is the definition: the same bits, on random shapes
   that are multiples of nothing.
   Variants: asan matrix */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <setjmp.h>
#include <cmocka.h>

enum { ROUNDS = 300, ROOM = 8192 };

static const llm__kernels *scalar;
static uint32_t seed = 1;

static uint32_t random_int(uint32_t below) {
    seed = seed * 1664525u + 1013904223u;
    return (seed >> 8) % below;
}

/* Mostly near 1, some tiny, some large, some zero. */
static float random_float(void) {
    static const float scales[] = {1, 1, 1, 1, 1e-3f, 30, 1e-30f, 0};
    return ((float)random_int(1 << 20) / (1 << 19) - 1) * scales[random_int(8)];
}

static float *random_floats(float *to, int n) {
    for (int i = 0; i < n; i++) to[i] = random_float();
    return to;
}

static void check_same(const char *what, const void *a, const void *b, size_t n) {
    if (memcmp(a, b, n)) fail_msg("%s differs from the scalar kernel", what);
}

static float x[ROOM], w[ROOM], a[ROOM], b[ROOM];
static uint16_t half[ROOM];

static void check_product(const llm__kernels *k, bool bf16) {
    int rows = 1 + (int)random_int(20), n = 32 * (1 + (int)random_int(6)), stride = n + (int)random_int(9), y_stride = 16 + (int)random_int(5);
    random_floats(x, rows * stride);
    random_floats(w, n * 16);
    random_floats(a, rows * y_stride);
    memcpy(b, a, sizeof a);
    for (int i = 0; i < n * 16; i++) half[i] = llm__f32_to_bf16(w[i]);
    if (bf16)
        for (int i = 0; i < rows * stride; i++) x[i] = llm__bf16_to_f32(llm__f32_to_bf16(x[i]));
    const void *tile = bf16 ? (const void *)half : (const void *)w;
    (bf16 ? scalar->product_bf16 : scalar->product_f32)(x, (size_t)stride, rows, tile, n, a, (size_t)y_stride);
    (bf16 ? k->product_bf16 : k->product_f32)(x, (size_t)stride, rows, tile, n, b, (size_t)y_stride);
    check_same(bf16 ? "product_bf16" : "product_f32", a, b, sizeof a);
}

static void check_rows(const llm__kernels *k) {
    int n = 1 + (int)random_int(300);
    bool round = random_int(2);
    float sum[2], max[2], factor = random_float();
    random_floats(x, n);
    random_floats(w, n);
    memset(a, 0, sizeof a);
    memset(b, 0, sizeof b);
    scalar->rms_norm(x, w, n, 1e-5f, round, a);
    k->rms_norm(x, w, n, 1e-5f, round, b);
    check_same("rms_norm", a, b, sizeof a);
    scalar->swiglu(x, w, n, round, a);
    k->swiglu(x, w, n, round, b);
    check_same("swiglu", a, b, sizeof a);
    scalar->scale(x, factor, n, round, a);
    k->scale(x, factor, n, round, b);
    check_same("scale", a, b, sizeof a);
    scalar->add(a, w, n);
    k->add(b, w, n);
    check_same("add", a, b, sizeof a);
    max[0] = max[1] = random_float();
    sum[0] = sum[1] = 1 + (float)random_int(100);
    scalar->merge(&max[0], &sum[0], a, factor, 3, w, n);
    k->merge(&max[1], &sum[1], b, factor, 3, w, n);
    check_same("merge", a, b, sizeof a);
    assert_true(max[0] == max[1] && sum[0] == sum[1]);
    int padded = llm__round_up(n, 16) + 16 * (int)random_int(3);
    memcpy(a, x, sizeof a);
    memcpy(b, x, sizeof b);
    scalar->softmax(a, n, padded, 0.3f, round, &max[0], &sum[0]);
    k->softmax(b, n, padded, 0.3f, round, &max[1], &sum[1]);
    check_same("softmax", a, b, (size_t)padded * 4);
    assert_true(max[0] == max[1] && sum[0] == sum[1]);
    memcpy(a, x, sizeof a);
    memcpy(b, x, sizeof b);
    scalar->rope(a, w, w + n / 2, n / 2);
    k->rope(b, w, w + n / 2, n / 2);
    check_same("rope", a, b, sizeof a);
}

static void check_set(const char *isa) {
    const llm__kernels *k = llm__choose_kernels(isa);
    scalar = llm__choose_kernels("scalar");
    if (!k) skip();
    uint64_t mode = llm__float_mode_enter();
    for (int i = 0; i < ROUNDS; i++) {
        check_product(k, false);
        check_product(k, true);
        check_rows(k);
    }
    llm__float_mode_leave(mode);
}

static void test_avx2(void **state) { (void)state; check_set("avx2"); }
static void test_avx512(void **state) { (void)state; check_set("avx512"); }

/* The scalar exp against libm's in double. */
static void test_exp(void **state) {
    double worst = 0;
    (void)state;
    scalar = llm__choose_kernels("scalar");
    for (int i = 0; i < 100000; i++) {
        float s[16] = {(float)i * -0.00087f}, max, sum;
        s[1] = 0;
        scalar->softmax(s, 2, 16, 1.0f, false, &max, &sum);
        double error = fabs(s[0] / exp((double)((float)i * -0.00087f)) - 1);
        if (error > worst) worst = error;
    }
    print_message("exp: relative error %.2g\n", worst);
    assert_true(worst < 2e-7);
}

/* Sine, cosine, 2^x, log2 and square root in fixed operations against libm's. */
static void test_functions(void **state) {
    (void)state;
    for (int i = 0; i < 200000; i++) {
        double v = i * 0.37;
        float s, c;
        llm__sincos(v, &s, &c);
        assert_true(fabs(s - sin(v)) < 1e-7 && fabs(c - cos(v)) < 1e-7);
        assert_true(fabs(llm__log2(v + 0.01) - log2(v + 0.01)) < 1e-14 * 20);
        assert_true(fabs(llm__exp2(-v / 1000) / exp2(-v / 1000) - 1) < 1e-15 * 4);
        assert_true(fabs(llm__sqrt(v + 1e-9) / sqrt(v + 1e-9) - 1) < 1e-15);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_avx2), cmocka_unit_test(test_avx512), cmocka_unit_test(test_exp),
                                       cmocka_unit_test(test_functions)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
