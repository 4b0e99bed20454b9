/* The committed hashes of logits, and the ways to compute them. Include it after tests/common.h. */
#ifndef TESTS_HASH_H
#define TESTS_HASH_H

enum { LENGTH = 300, N_VOCAB = 299 }; /* long enough for two chunks of keys */

typedef struct expected {
    llm_dtype dtype, cache; /* of the weights and of the KV cache; 0: the default */
    const tiny_spec *spec;  /* of the small model */
    uint64_t tiny, real;
} expected;

/* A small model with weights in Q4_1. */
static const tiny_spec FOUR_BITS = {2, 96, 128, 6, 2, 32, 512, 43, 1, 3, 1};

/* Hashes of the small model's logits at all positions, and of the default model's logits at 32 positions (0: not
   tested in this row). */
static const expected EXPECTED[] = {
    {LLM_DTYPE_F32, LLM_DTYPE_DEFAULT, &TINY_ODD, 0x7341783e55522002, 0x8edd79e970583c6d},
    {LLM_DTYPE_BF16, LLM_DTYPE_DEFAULT, &TINY_ODD, 0xa2c2d316d6e4273d, 0x242236317cf1af6e},
    {LLM_DTYPE_INT8, LLM_DTYPE_DEFAULT, &TINY_ODD, 0x297e51aa2376e23a, 0x074a66040270b064},
    {LLM_DTYPE_INT4, LLM_DTYPE_DEFAULT, &FOUR_BITS, 0x03516e26d0bf5356, 0xa370081832c4702d},
    {LLM_DTYPE_FILE, LLM_DTYPE_DEFAULT, &TINY_ALL_TYPES, 0x2cf5f63844d315fb, 0xa370081832c4702d},
    {LLM_DTYPE_F16, LLM_DTYPE_DEFAULT, &TINY_ODD, 0xbf15d36c8d3dc2a0, 0xfe977a84362c4ec6},
    {LLM_DTYPE_BF16, LLM_DTYPE_F32, &TINY_ODD, 0x58765bbb4d8752e9, 0xe792122691ca1235},
    {LLM_DTYPE_BF16, LLM_DTYPE_INT8, &TINY_ODD, 0xcb45b2d27860d649, 0x3ab86aed28c7d761},
    {LLM_DTYPE_FILE, LLM_DTYPE_DEFAULT, &TINY_IQ4_TYPES, 0x2f5afcd619def71c, 0},
    {LLM_DTYPE_BF16, LLM_DTYPE_DEFAULT, &TINY_2_4, 0x9f3d973d7ac98ce6, 0},
    {LLM_DTYPE_INT8, LLM_DTYPE_DEFAULT, &TINY_2_4, 0x059ee17ea7acbbfb, 0},
};

static inline llm_token token_at(int seq, int i) {
    uint32_t x = (uint32_t)(seq * 7919 + i * 104729 + 12345) * 2654435761u;
    return (llm_token)((x >> 8) % N_VOCAB);
}

static inline uint64_t hash_row(uint64_t hash, const float *logits, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &logits[i], 4);
        for (int j = 0; j < 4; j++) hash = (hash ^ (bits >> 8 * j & 255)) * 0x100000001B3u;
    }
    return hash;
}

/* True if this machine must be able to run an instruction set. False for the matrix unit: the system may forbid it. */
static inline bool must_run(const char *isa) {
#if defined(__x86_64__)
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (!strcmp(isa, "avx2")) return avx2;
    if (!strcmp(isa, "avx512")) return avx512;
    if (!strcmp(isa, "avx512_bf16"))
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
    return !strcmp(isa, "scalar") || !strcmp(isa, "neon");
}

/* Loads the model of one type; with ranks, this rank's part. Returns NULL if this machine lacks the instruction set. */
static inline llm_model *load(const expected *e, const char *isa, llm_comm *tensor, llm_comm *pipeline) {
    llm_model_desc desc = {.dtype = e->dtype, .isa = isa, .n_threads = 2, .tensor = tensor, .pipeline = pipeline};
    llm_model *model = NULL;
    llm_error err;
    llm_status status = try_tiny(&model, e->spec, desc, &err);
    /* The only reason to skip is an instruction set that this machine lacks. */
    bool absent = status == LLM_ERROR_ARGUMENT && strstr(err.message, "not on this machine");
    if (status && (!absent || must_run(isa))) fail_msg("%s", err.message);
    return model;
}

static inline llm_context *create(const llm_model *model, llm_dtype cache, int n_threads, int n_batch) {
    llm_context_desc desc = {
        .n_ctx = 512, .n_seq = 8, .n_batch = n_batch, .n_logits = LENGTH, .n_threads = n_threads, .cache_dtype = cache};
    return create_context(model, &desc);
}

/* Appends positions [from, to) of sequence `seq`'s text to sequence `as`, and hashes their logits. */
static inline uint64_t append(llm_context *ctx, int as, int from, int to, uint64_t hash) {
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

static inline uint64_t in_chunks(llm_context *ctx, int size) {
    uint64_t hash = 0;
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    for (int from = 0; from < LENGTH; from += size)
        hash = append(ctx, 0, from, from + size < LENGTH ? from + size : LENGTH, hash);
    return hash;
}

/* Computes the text together with seven sequences of other lengths, in batches that mix their tokens. */
static inline uint64_t in_a_crowd(llm_context *ctx) {
    llm_token tokens[8 * LENGTH];
    int seqs[8 * LENGTH];
    bool logits[8 * LENGTH];
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

/* Computes the text in a chain of forks, while their parents continue with other tokens. */
static inline uint64_t through_forks(llm_context *ctx) {
    static const int cuts[] = {0, 45, 64, 131, 257, LENGTH};
    uint64_t hash = 0;
    for (int seq = 0; seq < 8; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    for (int i = 0; i + 1 < 6; i++) {
        hash = append(ctx, i, cuts[i], cuts[i + 1], hash);
        if (i + 1 == 5) break;
        append(ctx, i, 0, 9, 0); /* the parent is longer than the fork, and grows again after it */
        assert_int_equal(llm_seq_fork(ctx, i + 1, i, cuts[i + 1], NULL), LLM_OK);
        append(ctx, i, 20, 30, 0);
    }
    return hash;
}

static inline uint64_t restored(llm_context *ctx, llm_context *other) {
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

/* Ways to compute the logits. The first four run with one thread, the others with two or more. `small` takes at most 37
   tokens per pass. */
enum { WAYS = 9, WAYS_OF_ONE = 4 };

static inline uint64_t go(int way, llm_context *ctx, llm_context *small) {
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

/* Hashes logits of the default model. */
static inline uint64_t hash_real(const expected *e, int n_tokens, int n_threads, llm_comm *tensor, llm_comm *pipeline) {
    llm_model_desc desc = {.dtype = e->dtype, .n_threads = n_threads, .tensor = tensor, .pipeline = pipeline};
    llm_context_desc context_desc = {.n_ctx = 128, .n_logits = 1, .n_threads = n_threads, .cache_dtype = e->cache};
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

#endif
