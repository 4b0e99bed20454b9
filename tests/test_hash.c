/* The logits have the same bits however they are computed. Each weight type has one committed hash, which every
   instruction set, thread count, batch, chunking and fork must give in every build. To save time, some builds run less:
   - An emulator skips the runs with one thread, and runs the default model only with its usual type.
   - With the scalar kernels, an emulator runs a third of the ways. Builds with other compilers (LLM_TEST_COMPILER) run
     one way per type, so that each way runs with some type.
   - Builds with other compilers run with one and two threads only.
   - The sanitizers run one way per type and number of threads, and not with one thread. The thread sanitizer runs more
     than two threads with one instruction set, the address sanitizer never.
   Variants: matrix cross tsan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"
#include "tests/hash.h"

#ifdef LLM_TEST_COMPILER
#define OTHER_COMPILER true
#else
#define OTHER_COMPILER false
#endif

/* The first WAYS_OF_ONE ways run with one thread, the others with two. Each larger number of threads runs a third of
   all ways. */
enum { COUNTS = 5 };

static const int THREADS[COUNTS] = {1, 2, 3, 5, 8};

static bool goes(int way, int count) {
    return count == 0 ? way < WAYS_OF_ONE : count == 1 ? way >= WAYS_OF_ONE : way % 3 == count - 2;
}

/* The way that the sanitizers run. It differs from type to type. */
static int way_of(int type, int count) { return count == 1 ? 4 + type % 5 : count - 2 + 3 * ((type + 1) % 3); }

static void check_tiny(int type, const char *isa) {
    const expected *e = &EXPECTED[type];
    llm_model *model = load(e, isa, NULL, NULL);
    if (!model) skip(); /* this machine does not have the instruction set */
    const bool slow = !strcmp(isa, "scalar");
    const int step = !slow ? 1 : OTHER_COMPILER ? WAYS : emulated() ? 3 : 1;
    const bool few = emulated() || OTHER_COMPILER || slow || (SANITIZED && !THREAD_SANITIZED);
    for (int count = emulated() || SANITIZED; count < (few ? 2 : COUNTS); count++) {
        int n_threads = THREADS[count];
        if (THREAD_SANITIZED && n_threads > 2 && strcmp(isa, "avx2")) break;
        llm_context *ctx = create(model, e->cache, n_threads, 0), *small = create(model, e->cache, n_threads, 37);
        for (int way = 0; way < WAYS; way++) {
            if (!goes(way, count) || way % step != type % step) continue;
            if (!SANITIZED || way == way_of(type, count)) assert_int_equal(go(way, ctx, small), e->tiny);
        }
        llm_context_free(ctx);
        llm_context_free(small);
    }
    llm_model_free(model);
}

static void all_ways_agree(const char *isa) {
    for (int type = 0; type < (int)(sizeof EXPECTED / sizeof *EXPECTED); type++) check_tiny(type, isa);
}

static void hash_scalar(void **state) {
    (void)state;
    all_ways_agree("scalar");
}
#if defined(__aarch64__)
static void hash_neon(void **state) {
    (void)state;
    all_ways_agree("neon");
}
#else
static void hash_avx2(void **state) {
    (void)state;
    all_ways_agree("avx2");
}
static void hash_avx512(void **state) {
    (void)state;
    all_ways_agree("avx512");
}
static void hash_avx512_bf16(void **state) {
    (void)state;
    all_ways_agree("avx512_bf16");
}
static void hash_amx(void **state) {
    (void)state;
    all_ways_agree("amx");
}
#endif

/* Computes the last logits of a small model from an F16 file. */
static void small_logits(llm_dtype dtype, llm_dtype cache, float *logits) {
    static const tiny_spec f16 = {2, 72, 100, 6, 2, 20, 512, 43, 0, 1, 1};
    llm_context *ctx = create(load_tiny(&f16, dtype), cache, 2, 0);
    append(ctx, 0, 0, LENGTH, 0);
    memcpy(logits, llm_logits(ctx, LENGTH - 1), N_VOCAB * sizeof *logits);
    close_context(ctx);
}

/* F16 weights kept as f16 give the same logits as f32. An int8 cache changes them a little. */
static void test_types(void **state) {
    float f32[N_VOCAB], f16[N_VOCAB], int8[N_VOCAB], most = 0, off = 0;
    (void)state;
    small_logits(LLM_DTYPE_F32, LLM_DTYPE_DEFAULT, f32);
    small_logits(LLM_DTYPE_F16, LLM_DTYPE_DEFAULT, f16);
    small_logits(LLM_DTYPE_F32, LLM_DTYPE_INT8, int8);
    assert_memory_equal(f32, f16, sizeof f32);
    for (int i = 0; i < N_VOCAB; i++) {
        most = fmaxf(most, fabsf(f32[i]));
        off = fmaxf(off, fabsf(f32[i] - int8[i]));
    }
    print_message("largest logit %.3g; largest difference with an int8 cache %.3g\n", (double)most, (double)off);
    assert_true(off > 0 && off < 0.02f * most);
}

/* A 2:4 matrix gives the same bits as with its zeros stored. It needs 9/16 of the memory, or 5/8 with int8. */
static void test_2_4(void **state) {
    static const char *const names[] = {"bf16 2:4", "int8 2:4"};
    (void)state;
    for (size_t i = 0; i < sizeof EXPECTED / sizeof *EXPECTED; i++) {
        if (EXPECTED[i].spec != &TINY_2_4) continue;
        const bool int8 = EXPECTED[i].dtype == LLM_DTYPE_INT8;
        llm_model_desc desc = {.dtype = EXPECTED[i].dtype, .n_threads = 2, .keep_zeros = true};
        llm_model *model = NULL;
        llm_error err;
        if (try_tiny(&model, &TINY_2_4, desc, &err)) fail_msg("%s", err.message);
        const llm_model_info all = llm_model_get_info(model);
        llm_context *ctx = create(model, LLM_DTYPE_DEFAULT, 2, 0);
        assert_int_equal(in_chunks(ctx, 1), EXPECTED[i].tiny);
        assert_int_equal(in_chunks(ctx, LENGTH), EXPECTED[i].tiny);
        close_context(ctx);
        llm_model *thin = load(&EXPECTED[i], "scalar", NULL, NULL);
        const llm_model_info held = llm_model_get_info(thin);
        llm_model_free(thin);
        print_message("%s instead of %s\n", held.held, all.held);
        assert_string_equal(all.held, llm_dtype_name(EXPECTED[i].dtype));
        assert_true(!strncmp(held.held, names[int8], strlen(names[int8])));
        assert_int_equal(held.fingerprint, all.fingerprint);
        /* Padded to tiles of 16 rows and 32 columns, the matrices of a layer have this many weights. */
        const uint64_t weights = 2 * (208 * 96 + 80 * 128 + 224 * 96 + 80 * 128);
        assert_int_equal(all.weight_bytes - held.weight_bytes, int8 ? weights * 3 / 8 : weights * 14 / 16);
    }
}

static void test_default_model(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof EXPECTED / sizeof *EXPECTED; i++)
        if (EXPECTED[i].real &&
            (!(emulated() || THREAD_SANITIZED) || (EXPECTED[i].dtype == LLM_DTYPE_BF16 && !EXPECTED[i].cache)))
            assert_int_equal(hash_real(&EXPECTED[i], 32, 0, NULL, NULL), EXPECTED[i].real);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hash_scalar),
#if defined(__aarch64__)
        cmocka_unit_test(hash_neon),
#else
        cmocka_unit_test(hash_avx2),
        cmocka_unit_test(hash_avx512),
        cmocka_unit_test(hash_avx512_bf16),
        cmocka_unit_test(hash_amx),
#endif
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_2_4),
        cmocka_unit_test(test_default_model)
    };
#ifdef TILES_H /* the matrix unit is simulated: only its kernels differ from the usual build */
    cmocka_set_test_filter("hash_amx");
#endif
    return cmocka_run_group_tests(tests, NULL, NULL);
}
