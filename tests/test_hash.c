/* One arithmetic: the logits are the same bits however they are computed. Each weight type has one committed hash; every
   instruction set, thread count, batch, chunking and fork must give it, in every build. Under a slow emulator the runs with
   one thread are left out, and of the default model's types all but the usual. There, and in builds that only try other
   compilers, where LLM_TEST_COMPILER is defined, the slow scalar kernels go each way for every third type. The thread
   sanitizer is shown the small model with several threads.
   Variants: matrix cross tsan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

enum { LENGTH = 300, N_VOCAB = 299 }; /* long enough for two chunks of keys */

typedef struct expected {
    llm_dtype dtype, cache; /* of weights and of the KV cache, 0: the usual */
    bool in_groups; /* the small model is a Q4_1 file */
    uint64_t tiny, real;
    uint64_t many; /* with groups: the small model's in passes of more than 16 tokens */
} expected;

/* Of the small model's logits at all positions, and of the default model's at 32. */
static const expected EXPECTED[] = {
    {LLM_DTYPE_F32, LLM_DTYPE_DEFAULT, false, 0x7341783e55522002, 0x8edd79e970583c6d, 0},
    {LLM_DTYPE_BF16, LLM_DTYPE_DEFAULT, false, 0xa2c2d316d6e4273d, 0x242236317cf1af6e, 0},
    {LLM_DTYPE_INT8, LLM_DTYPE_DEFAULT, false, 0x297e51aa2376e23a, 0x074a66040270b064, 0},
    {LLM_DTYPE_INT4, LLM_DTYPE_DEFAULT, true, 0x15c900c2068058cf, 0x0f6e7ecad2d246e2, 0x08402891e6ef15f8},
    {LLM_DTYPE_F16, LLM_DTYPE_DEFAULT, false, 0xbf15d36c8d3dc2a0, 0xfe977a84362c4ec6, 0},
    {LLM_DTYPE_BF16, LLM_DTYPE_F32, false, 0x58765bbb4d8752e9, 0xe792122691ca1235, 0},
    {LLM_DTYPE_BF16, LLM_DTYPE_INT8, false, 0xcb45b2d27860d649, 0x3ab86aed28c7d761, 0},
};

#ifdef LLM_TEST_COMPILER
#define OTHER_COMPILER true
#else
#define OTHER_COMPILER false
#endif

static llm_token token_at(int seq, int i) {
    uint32_t x = (uint32_t)(seq * 7919 + i * 104729 + 12345) * 2654435761u;
    return (llm_token)((x >> 8) % N_VOCAB);
}

static uint64_t hash_row(uint64_t hash, const float *logits, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], 4);
        for (int j = 0; j < 4; j++) hash = (hash ^ (bits >> 8 * j & 255)) * 0x100000001B3u;
    }
    return hash;
}

/* What this machine must run; whether the matrix unit may be used is the system's choice, too. */
static bool must_run(const char *isa) {
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avx512")) return avx512;
    if (!strcmp(isa, "avx512_bf16")) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return !strcmp(isa, "scalar") || !strcmp(isa, "neon");
}

static llm_model *load(const expected *e, const char *isa) {
    static const tiny_spec groups = {2, 96, 128, 6, 2, 32, 512, 43, 1, 3, 1};
    llm_model_desc desc = {.dtype = e->dtype, .isa = isa, .n_threads = 2};
    llm_model *model = NULL;
    llm_error err;
    llm_status status = try_tiny(&model, e->in_groups ? &groups : &TINY_ODD, desc, &err);
    /* Only an instruction set that this machine lacks is a reason to skip. */
    bool absent = status == LLM_ERROR_ARGUMENT && strstr(err.message, "not on this machine");
    if (status && (!absent || must_run(isa))) fail_msg("%s", err.message);
    return model;
}

static llm_context *create(const llm_model *model, llm_dtype cache, int n_threads, int n_batch) {
    llm_context_desc desc = {.n_ctx = 512, .n_seq = 8, .n_batch = n_batch, .n_logits = LENGTH, .n_threads = n_threads, .cache_dtype = cache};
    return create_context(model, &desc);
}

/* Appends positions [from, to) of sequence `seq`'s text to sequence `as`, and hashes their logits. */
static uint64_t append(llm_context *ctx, int as, int from, int to, uint64_t hash) {
    llm_token tokens[LENGTH];
    int seqs[LENGTH];
    bool logits[LENGTH];
    llm_error err;
    for (int i = from; i < to; i++) {
        tokens[i - from] = token_at(0, i);
        seqs[i - from] = as;
        logits[i - from] = true;
    }
    llm_batch batch = {to - from, tokens, seqs, logits};
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < to - from; i++) hash = hash_row(hash, llm_logits(ctx, i), N_VOCAB);
    return hash;
}

static uint64_t in_chunks(llm_context *ctx, int size) {
    uint64_t hash = 0;
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    for (int from = 0; from < LENGTH; from += size) hash = append(ctx, 0, from, from + size < LENGTH ? from + size : LENGTH, hash);
    return hash;
}

/* Among seven other sequences of other lengths, their tokens taking turns. */
static uint64_t in_a_crowd(llm_context *ctx) {
    static llm_token tokens[8 * LENGTH];
    static int seqs[8 * LENGTH];
    static bool logits[8 * LENGTH];
    llm_error err;
    int n = 0;
    for (int seq = 0; seq < 8; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    for (int i = 0; i < LENGTH; i++)
        for (int seq = 0; seq < 8; seq++) {
            if (seq != 3 && i >= LENGTH / (seq + 2)) continue;
            tokens[n] = token_at(seq == 3 ? 0 : seq + 1, i);
            seqs[n] = seq;
            logits[n++] = seq == 3;
        }
    llm_batch batch = {n, tokens, seqs, logits};
    uint64_t hash = 0;
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < n; i++)
        if (logits[i]) hash = hash_row(hash, llm_logits(ctx, i), N_VOCAB);
    return hash;
}

/* The text goes on in forks, each cut at an odd place, while the parents go elsewhere. */
static uint64_t through_forks(llm_context *ctx) {
    static const int cuts[] = {0, 45, 64, 131, 257, LENGTH};
    uint64_t hash = 0;
    for (int seq = 0; seq < 8; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    for (int i = 0; i + 1 < 6; i++) {
        hash = append(ctx, i, cuts[i], cuts[i + 1], hash);
        if (i + 1 == 5) break;
        append(ctx, i, 0, 9, 0); /* the parent is past the cut when the fork is made, and goes on after it */
        assert_int_equal(llm_seq_fork(ctx, i + 1, i, cuts[i + 1], NULL), LLM_OK);
        append(ctx, i, 20, 30, 0);
    }
    return hash;
}

static uint64_t restored(llm_context *ctx, llm_context *other) {
    uint64_t hash;
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    hash = append(ctx, 0, 0, 100, 0);
    size_t size = llm_seq_save_size(ctx, 0);
    void *buffer = malloc(size);
    assert_non_null(buffer);
    assert_int_equal(llm_seq_save(ctx, 0, buffer, size, NULL), LLM_OK);
    assert_int_equal(llm_seq_restore(other, 5, buffer, size, NULL), LLM_OK);
    free(buffer);
    return append(other, 5, 100, LENGTH, hash);
}

/* The first four are gone with one thread, the others with two, and a third of all with each of more; `small` takes at most 37 tokens in a pass. With weights in
   groups, which are rounded where more than 16 tokens meet them, no pass has more than these, or all have. */
enum { WAYS = 9, WAYS_OF_ONE = 4, COUNTS = 5 };

static const int THREADS[COUNTS] = {1, 2, 3, 5, 8};

static bool goes(int way, int count) { return count == 0 ? way < WAYS_OF_ONE : count == 1 ? way >= WAYS_OF_ONE : way % 3 == count - 2; }

static uint64_t go(int way, llm_context *ctx, llm_context *small) {
    switch (way) {
    case 0: return in_chunks(ctx, 1);
    case 1: return in_chunks(ctx, 64);
    case 2: return in_chunks(small, LENGTH);
    case 3: return in_a_crowd(small);
    case 4: return in_chunks(ctx, 7);
    case 5: return in_chunks(ctx, LENGTH);
    case 6: return in_a_crowd(ctx);
    case 7: return through_forks(ctx);
    default: return restored(ctx, small);
    }
}

static void check_tiny(int type, const char *isa) {
    const expected *e = &EXPECTED[type];
    llm_model *model = load(e, isa);
    if (!model) skip(); /* this machine does not have the instruction set */
    bool slow = !strcmp(isa, "scalar"), a_third = (OTHER_COMPILER || emulated() || THREAD_SANITIZED) && slow;
    for (int count = emulated() || THREAD_SANITIZED; count < (emulated() || slow ? 2 : COUNTS); count++) {
        int n_threads = THREADS[count];
        llm_context *ctx = create(model, e->cache, n_threads, e->in_groups ? 16 : 0),
                    *small = create(model, e->cache, n_threads, e->in_groups ? 11 : 37);
        for (int way = 0; way < WAYS; way++)
            if (goes(way, count) && (!a_third || way % 3 == type % 3)) assert_int_equal(go(way, ctx, small), e->tiny);
        llm_context_free(ctx);
        llm_context_free(small);
        if (!e->many) continue;
        ctx = create(model, e->cache, n_threads, 0);
        assert_int_equal(in_chunks(ctx, n_threads == 1 ? 64 : LENGTH), e->many);
        llm_context_free(ctx);
    }
    llm_model_free(model);
}

static void all_ways_agree(const char *isa) {
    for (int type = 0; type < (int)(sizeof EXPECTED / sizeof *EXPECTED); type++) check_tiny(type, isa);
}

static void hash_scalar(void **state) { (void)state; all_ways_agree("scalar"); }
#if defined(__aarch64__)
static void hash_neon(void **state) { (void)state; all_ways_agree("neon"); }
#else
static void hash_avx2(void **state) { (void)state; all_ways_agree("avx2"); }
static void hash_avx512(void **state) { (void)state; all_ways_agree("avx512"); }
static void hash_avx512_bf16(void **state) { (void)state; all_ways_agree("avx512_bf16"); }
static void hash_amx(void **state) { (void)state; all_ways_agree("amx"); }
#endif

/* The last logits of a small model of an F16 file. */
static void small_logits(llm_dtype dtype, llm_dtype cache, float *logits) {
    static const tiny_spec f16 = {2, 72, 100, 6, 2, 20, 512, 43, 0, 1, 1};
    llm_context *ctx = create(load_tiny(&f16, dtype), cache, 2, 0);
    append(ctx, 0, 0, LENGTH, 0);
    memcpy(logits, llm_logits(ctx, LENGTH - 1), N_VOCAB * sizeof *logits);
    close_context(ctx);
}

/* F16 weights held as they are lose nothing against f32; an int8 cache, a little. */
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
    print_message("logits up to %.3g; with an int8 cache off by %.3g\n", (double)most, (double)off);
    assert_true(off > 0 && off < 0.02f * most);
}

static uint64_t hash_real(const expected *e, int n_tokens) {
    llm_model_desc desc = {.dtype = e->dtype};
    llm_context_desc context_desc = {.n_ctx = 128, .n_logits = 1, .cache_dtype = e->cache};
    llm_token tokens[32];
    llm_error err;
    for (int i = 0; i < 32; i++) tokens[i] = token_at(0, i) * 160;
    llm_model *model = load_model(model_path(), &desc);
    llm_context *ctx = create_context(model, &context_desc);
    uint64_t hash = 0;
    for (int i = 0; i < n_tokens; i++) {
        llm_batch batch = {1, tokens + i, NULL, NULL};
        if (i == 0) batch.n_tokens = n_tokens / 2, i = n_tokens / 2 - 1;
        if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
        hash = hash_row(hash, llm_logits(ctx, batch.n_tokens - 1), llm_model_get_info(model).n_vocab);
    }
    close_context(ctx);
    return hash;
}

static void test_default_model(void **state) {
    (void)state;
    for (size_t i = 0; i < sizeof EXPECTED / sizeof *EXPECTED; i++)
        if (!(emulated() || THREAD_SANITIZED) || (EXPECTED[i].dtype == LLM_DTYPE_BF16 && !EXPECTED[i].cache))
            assert_int_equal(hash_real(&EXPECTED[i], 32), EXPECTED[i].real);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hash_scalar),
#if defined(__aarch64__)
        cmocka_unit_test(hash_neon),
#else
        cmocka_unit_test(hash_avx2), cmocka_unit_test(hash_avx512), cmocka_unit_test(hash_avx512_bf16),
        cmocka_unit_test(hash_amx),
#endif
        cmocka_unit_test(test_types), cmocka_unit_test(test_default_model)};
#ifdef TILES_H /* the matrix unit is in plain C: the other sets are as they always are */
    cmocka_set_test_filter("hash_amx");
#endif
    return cmocka_run_group_tests(tests, NULL, NULL);
}
