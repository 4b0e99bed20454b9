/* llm_cuda.cu compared with the CPU backend on small models: all kernels, in all modes. tests/cuda_host runs them on
   the CPU; compiled with nvcc, they run on a GPU.
   Variants: asan */
#define LLM_CUDA
#include "llm.h"
#include "tests/tiny.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <math.h>
#include <string>
#include <thread>
#include <vector>
extern "C" {
#include "tests/common.h"
#include "tests/ranks.h"
#include "tests/processes.h"
}
#ifdef CUDA_HOST_RUNTIME_H
#include "nccl_host.h"
#endif

enum { N_SEQ = 6, N_CTX = 256, N_BATCH = 100, N_VOCAB = 299 };

/* Layers, n_embd, n_ff, heads, key heads, head_dim, n_ctx, extra tokens, untied, type, seed. */
static const tiny_spec MANY_GROUPS = {2, 64, 96, 12, 1, 32, 512, 43, 1, 30, 2};
static const tiny_spec WIDE_HEADS = {1, 96, 130, 2, 2, 136, 512, 43, 0, 0, 3};
static const tiny_spec USUAL_HEADS = {2, 256, 300, 4, 2, 64, 512, 43, 1, 1, 4};
static const tiny_spec MANY_QUERIES = {1, 33, 47, 32, 1, 6, 512, 43, 0, 0, 5};
static const tiny_spec LONG_HEADS = {1, 128, 64, 2, 1, 128, 512, 43, 0, 30, 6};
static const tiny_spec FOUR_BITS = {2, 96, 160, 6, 2, 32, 512, 43, 1, 3, 7};
static const tiny_spec FOUR_BITS_0 = {1, 64, 288, 4, 4, 24, 512, 43, 0, 2, 8};
static const tiny_spec EIGHT_BITS = {1, 160, 96, 5, 1, 32, 512, 43, 0, 8, 9};
static const tiny_spec HALVES = {1, 64, 96, 4, 2, 16, 512, 43, 1, 1, 10};
static const tiny_spec SMALL = {1, 32, 32, 2, 1, 16, 512, 43, 0, 30, 9};
static const tiny_spec DEEP = {5, 48, 64, 3, 1, 16, 512, 43, 1, 1, 13};

/* 2:4 matrices: some rows are short in PAIRS, all are long in LONG_PAIRS. */
static const tiny_spec PAIRS = {2, 301, 790, 5, 1, 68, 512, 43, 0, TINY_ALL_SPARSE, 11};
#ifndef CUDA_HOST_ASAN
static const tiny_spec LONG_PAIRS = {1, 707, 1100, 6, 2, 120, 512, 43, 1, TINY_ALL_SPARSE, 12};
#endif

/* Loads a model. Returns NULL on failure. */
static llm_model *load_as(const tiny_spec *spec, const llm_backend *backend, llm_dtype dtype, llm_error *err) {
    llm_model_desc desc = {};
    llm_model *model = NULL;
    desc.dtype = dtype;
    desc.backend = backend;
    desc.n_threads = 2;
    try_tiny(&model, spec, desc, err);
    return model;
}

static llm_model *load(const tiny_spec *spec, const llm_backend *backend, llm_dtype dtype = LLM_DTYPE_BF16) {
    llm_error err;
    llm_model *model = load_as(spec, backend, dtype, &err);
    if (!model) fail_msg("%s", err.message);
    return model;
}

/* Loads one of the small models that test_hf compares with other programs. */
static llm_model *load_golden(const char *name, const llm_backend *backend) {
    llm_model_desc desc = {};
    desc.backend = backend;
    desc.dtype = LLM_DTYPE_BF16;
    desc.n_threads = 2;
    return load_model(golden_path(("hf/" + std::string(name) + ".gguf").c_str()), &desc);
}

static llm_context *create(const llm_model *model) {
    llm_context_desc desc = {};
    desc.n_ctx = N_CTX;
    desc.n_seq = N_SEQ;
    desc.n_batch = N_BATCH;
    desc.n_logits = N_BATCH;
    desc.n_threads = 2;
    return create_context(model, &desc);
}

/* Two contexts of different backends, which get the same calls. */
typedef struct pair {
    llm_context *ctx[2];
    int n_vocab;
    unsigned random;
    double worst; /* max over rows: root mean square of the differences / root mean square of the logits */
} pair;

static pair make_pair(llm_model *expected, llm_model *tested) {
    pair p = {};
    p.ctx[0] = create(expected);
    p.ctx[1] = create(tested);
    p.n_vocab = llm_model_get_info(expected).n_vocab;
    p.random = 1;
    return p;
}

static void free_pair(pair *p) {
    for (int i = 0; i < 2; i++) close_context(p->ctx[i]);
}

static int draw(pair *p, int n) {
    p->random = p->random * 1664525u + 1013904223u;
    return (int)((p->random >> 8) % (unsigned)n);
}

static void compare(pair *p, int i) {
    const float *expected = llm_logits(p->ctx[0], i), *got = llm_logits(p->ctx[1], i);
    double squares = 0, differences = 0;
    assert_true(!expected == !got);
    if (!expected) return;
    for (int j = 0; j < p->n_vocab; j++) {
        double difference = (double)expected[j] - got[j];
        squares += (double)expected[j] * expected[j];
        differences += difference * difference;
    }
    double ratio = sqrt(differences / squares);
    if (!(ratio <= p->worst)) p->worst = ratio; /* true for NaN, too */
}

/* Appends counts[seq] tokens to each sequence, interleaved. logits: 0 none, 1 of the last tokens, 2 all, 3 some. */
static void append(pair *p, const int counts[N_SEQ], int logits) {
    static llm_token tokens[N_SEQ * N_CTX];
    static int seqs[N_SEQ * N_CTX];
    static bool wanted[N_SEQ * N_CTX];
    llm_error err;
    int n = 0;
    for (int i = 0; i < N_CTX; i++)
        for (int seq = 0; seq < N_SEQ; seq++) {
            if (i >= counts[seq]) continue;
            tokens[n] = draw(p, p->n_vocab);
            seqs[n] = seq;
            wanted[n++] = logits == 2 || (logits == 3 && draw(p, 3) == 0);
        }
    llm_batch batch = {n, tokens, seqs, logits == 1 ? NULL : wanted};
    for (int i = 0; i < 2; i++)
        if (llm_forward(p->ctx[i], &batch, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < n; i++) compare(p, i);
}

static void on_both(pair *p, int seq, int parent, int length) {
    for (int i = 0; i < 2; i++) {
        if (parent < 0) assert_int_equal(llm_seq_truncate(p->ctx[i], seq, length, NULL), LLM_OK);
        else assert_int_equal(llm_seq_fork(p->ctx[i], seq, parent, length, NULL), LLM_OK);
    }
}

/* Runs long and short passes, passes of unequal sequences, single rows, forks inside blocks, and truncations. */
static void exercise(pair *p) {
    static const int ragged[N_SEQ] = {40, 1, 23, 0, 7, 0}, small[N_SEQ] = {3, 1, 5, 0, 1, 0}, one[N_SEQ] = {1},
                     three[N_SEQ] = {1, 0, 1, 0, 1}, fork[N_SEQ] = {2, 0, 0, 4, 0, 0},
                     sixteen[N_SEQ] = {5, 3, 4, 1, 2, 1}, lengthy[N_SEQ] = {0, 0, 90, 0, 0, 9};
    append(p, small, 2);
    append(p, ragged, 3);
    for (int i = 0; i < 3; i++) append(p, one, 1);
    append(p, three, 1);
    on_both(p, 3, 0, 37);
    append(p, fork, 2);
    on_both(p, 0, -1, 33);
    append(p, sixteen, 2);
    append(p, lengthy, 3);
    append(p, sixteen, 3);
    append(p, three, 0);
    append(p, lengthy, 0);
    append(p, three, 1);
    on_both(p, 5, 2, 200);
    append(p, sixteen, 2);
    append(p, one, 1);
}

static double agree(llm_model *expected, llm_model *tested, double most) {
    pair p = make_pair(expected, tested);
    llm_model_info info = llm_model_get_info(expected);
    exercise(&p);
    free_pair(&p);
    print_message("%s, %d heads of %d dimensions: within %.4f\n", info.name, info.n_heads, info.head_dim, p.worst);
    assert_true(p.worst < most);
    return p.worst;
}

/* Weights in groups are multiplied by 8-bit activations on the CPU, but by bf16 on the GPU. So if the file has groups,
   the CPU uses bf16 weights. */
static llm_dtype dtype_on_cpu(const tiny_spec *spec, llm_dtype dtype) {
    bool blocks = spec->type == 2 || spec->type == 3 || spec->type == 8;
    return dtype == LLM_DTYPE_INT4 && blocks ? LLM_DTYPE_BF16 : dtype;
}

static void agrees_with_cpu(const tiny_spec *spec, llm_cuda_mode mode, llm_dtype dtype) {
    llm_dtype on_cpu = dtype_on_cpu(spec, dtype);
    /* The error of a bf16 number is up to 1/256, which becomes about 0.012 of the logits over the few layers of these
       models. The error of an 8-bit number is up to 1/254 of the largest of its 32, two to three times as much relative
       to a typical number; 0.039 was measured. */
    double most = on_cpu == LLM_DTYPE_INT4 ? 0.05 : 0.02;
    agree(load(spec, NULL, on_cpu), load(spec, llm_cuda_backend_mode(mode), dtype), most);
}

static void test_eager(void **state) {
    (void)state;
    agrees_with_cpu(&TINY_ODD, LLM_CUDA_EAGER, LLM_DTYPE_BF16);
    agrees_with_cpu(&MANY_GROUPS, LLM_CUDA_EAGER, LLM_DTYPE_BF16);
    agrees_with_cpu(&SMALL, LLM_CUDA_EAGER, LLM_DTYPE_INT8);
}

static void test_fused(void **state) {
    static const tiny_spec *const specs[] = {&TINY_ODD,    &MANY_GROUPS,  &WIDE_HEADS,
                                             &USUAL_HEADS, &MANY_QUERIES, &LONG_HEADS};
    (void)state;
    for (int i = 0; i < 6; i++) agrees_with_cpu(specs[i], LLM_CUDA_FUSED, LLM_DTYPE_BF16);
    agrees_with_cpu(&TINY_ODD, LLM_CUDA_FUSED, LLM_DTYPE_INT8);
    agrees_with_cpu(&USUAL_HEADS, LLM_CUDA_FUSED, LLM_DTYPE_INT8);
}

/* f16 weights: from an f16 file, whose last digits bf16 would lose, and from weights that must be rounded. */
static void test_halves(void **state) {
    const llm_dtype f16 = LLM_DTYPE_F16;
    (void)state;
    double exact = agree(load(&HALVES, NULL, f16), load(&HALVES, llm_cuda_backend_mode(LLM_CUDA_FUSED), f16), 0.02);
    double rounded = agree(load(&HALVES, NULL, f16), load(&HALVES, llm_cuda_backend_mode(LLM_CUDA_FUSED)), 0.02);
    assert_true(exact < rounded);
    agrees_with_cpu(&TINY_ODD, LLM_CUDA_EAGER, f16);
}

/* Groups of 32 from files in Q4_1, Q4_0 and Q8_0, and groups made from other weights. */
static void test_groups(void **state) {
    (void)state;
    agrees_with_cpu(&FOUR_BITS, LLM_CUDA_FUSED, LLM_DTYPE_INT4);
    agrees_with_cpu(&FOUR_BITS_0, LLM_CUDA_FUSED, LLM_DTYPE_INT4);
    agrees_with_cpu(&EIGHT_BITS, LLM_CUDA_FUSED, LLM_DTYPE_INT4);
    agrees_with_cpu(&TINY_ODD, LLM_CUDA_FUSED, LLM_DTYPE_INT4);
    agrees_with_cpu(&FOUR_BITS, LLM_CUDA_EAGER, LLM_DTYPE_INT4);
    agrees_with_cpu(&EIGHT_BITS, LLM_CUDA_EAGER, LLM_DTYPE_INT4);
}

/* Biases (qwen2), norms of queries and keys (qwen3), a window (mistral), and all kinds of RoPE scaling. The rows of
   these models are so short that bf16's errors hardly average out. */
static void test_architectures(void **state) {
    static const char *const names[] = {"gqa", "linear", "llama3", "mistral", "qwen2", "qwen2-yarn", "qwen3", "yarn"};
    (void)state;
    for (int i = 0; i < 8; i++)
        agree(load_golden(names[i], NULL), load_golden(names[i], llm_cuda_backend_mode(LLM_CUDA_FUSED)), 0.05);
    for (int i = 3; i < 7; i++)
        agree(load_golden(names[i], NULL), load_golden(names[i], llm_cuda_backend_mode(LLM_CUDA_EAGER)), 0.05);
}

/* A recorded pass gives the same logits. */
static void test_graph(void **state) {
    pair p = make_pair(load(&TINY_ODD, llm_cuda_backend_mode(LLM_CUDA_FUSED), LLM_DTYPE_INT8),
                       load(&TINY_ODD, llm_cuda_backend(), LLM_DTYPE_INT8));
    (void)state;
    exercise(&p);
    free_pair(&p);
    assert_true(p.worst == 0);
}

static uint64_t hash_logits(const llm_context *ctx, int i, uint64_t hash) {
    const float *logits = llm_logits(ctx, i);
    assert_non_null(logits);
    for (int j = 0; j < N_VOCAB; j++) {
        uint32_t bits;
        memcpy(&bits, &logits[j], 4);
        hash = (hash ^ bits) * 0x100000001B3u;
    }
    return hash;
}

/* Computes 80 tokens of sequence 2, the last 20 one by one, in passes of n_rows rows. The other rows are other texts.
   Returns a hash of the logits. */
static uint64_t in_company(llm_context *ctx, int n_rows) {
    llm_token tokens[64];
    int seqs[64];
    bool logits[64];
    uint64_t hash = 0;
    llm_error err;
    for (int seq = 0; seq < N_SEQ; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    for (int i = 0; i < 80; i += i ? 1 : 60) {
        int n = 0, at = 0;
        for (int j = 0; i == 0 && j < 60; j++, n++) tokens[n] = j * 7 % N_VOCAB, seqs[n] = 2, logits[n] = false;
        for (int j = 0; i && j < n_rows; j++, n++) {
            bool ours = j == n_rows / 2;
            if (ours) at = n;
            tokens[n] = (i * 31 + (ours ? 0 : j + 1)) % N_VOCAB;
            seqs[n] = ours ? 2 : j % 2 ? 0 : 4;
            logits[n] = ours || j % 3 == 0;
        }
        llm_batch batch = {n, tokens, seqs, logits};
        if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
        if (i) hash = hash_logits(ctx, at, hash);
    }
    return hash;
}

/* In passes of up to 16 rows, other rows do not change any bit. */
static void check_rows_do_not_meet(const tiny_spec *spec, llm_dtype dtype) {
    llm_model *model = load(spec, llm_cuda_backend(), dtype);
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    desc.n_ctx = 1024; /* the other texts are long */
    desc.n_seq = N_SEQ;
    desc.n_logits = 16;
    assert_int_equal(llm_context_create(&ctx, model, &desc, NULL), LLM_OK);
    uint64_t alone = in_company(ctx, 1);
    assert_int_equal(in_company(ctx, 2), alone);
    assert_int_equal(in_company(ctx, 7), alone);
    assert_int_equal(in_company(ctx, 16), alone);
#ifdef CUDA_HOST_RUNTIME_H
    cuda_host.reverse = true; /* the order of threads must not matter */
    assert_int_equal(in_company(ctx, 3), alone);
    cuda_host.reverse = false;
#endif
    close_context(ctx);
}

static void test_rows_do_not_meet(void **state) {
    (void)state;
    check_rows_do_not_meet(&TINY_ODD, LLM_DTYPE_BF16);
#ifndef CUDA_HOST_ASAN /* these take minutes there */
    check_rows_do_not_meet(&HALVES, LLM_DTYPE_INT8);
    check_rows_do_not_meet(&FOUR_BITS, LLM_DTYPE_INT4);
    check_rows_do_not_meet(&EIGHT_BITS, LLM_DTYPE_INT4);
#endif
}

/* Loads a model of 2:4 matrices, or of the same with their zeros. */
static llm_model *load_pairs(const tiny_spec *spec, llm_cuda_mode mode, llm_dtype dtype, bool keep_zeros) {
    llm_model_desc desc = {};
    llm_model *model = NULL;
    llm_error err;
    desc.dtype = dtype;
    desc.backend = llm_cuda_backend_mode(mode);
    desc.n_threads = 2;
    desc.keep_zeros = keep_zeros;
    if (try_tiny(&model, spec, desc, &err)) fail_msg("%s", err.message);
    return model;
}

static void same_as_with_zeros(const tiny_spec *spec, llm_cuda_mode mode, llm_dtype dtype, const char *held) {
    llm_model *full = load_pairs(spec, mode, dtype, true), *half = load_pairs(spec, mode, dtype, false);
    llm_model_info all = llm_model_get_info(full), some = llm_model_get_info(half);
    assert_string_equal(all.held, llm_dtype_name(dtype));
    if (strncmp(some.held, held, strlen(held))) fail_msg("%s is held as %s, not as %s", some.name, some.held, held);
    assert_true(some.weight_bytes < all.weight_bytes);
    assert_true(some.weight_bytes_per_token < all.weight_bytes_per_token);
    pair p = make_pair(full, half);
    exercise(&p);
    assert_true(p.worst == 0);
    assert_int_equal(in_company(p.ctx[0], 9), in_company(p.ctx[1], 9));
    free_pair(&p);
}

/* A 2:4 matrix gives the bits that it gives with its zeros, in passes of all lengths. It takes 9/16 of the memory, or
   5/8 with int8. If its rows are so short that it would take more, it is held with its zeros. */
static void test_2_4(void **state) {
    llm_backend_weight w = {};
    uint64_t (*bytes)(llm_dtype dtype, const llm_backend_weight *weight) = llm_cuda_backend()->weight_bytes;
    (void)state;
    w.rows = 16;
    w.cols = 4096;
    w.is_2_4 = true;
    assert_int_equal(bytes(LLM_DTYPE_BF16, &w), 16 * 4096 * 2 / 16 * 9);
    assert_int_equal(bytes(LLM_DTYPE_INT8, &w), 16 * (4096 / 8 * 5 + 4));
    assert_int_equal(bytes(LLM_DTYPE_F16, &w), 16 * 4096 * 2);
    w.cols = 256;
    assert_int_equal(bytes(LLM_DTYPE_BF16, &w), 16 * 256 * 2);
    assert_int_equal(bytes(LLM_DTYPE_INT8, &w), 16 * (256 + 4));
    same_as_with_zeros(&PAIRS, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, "bf16 2:4");
#ifndef CUDA_HOST_ASAN /* these take minutes there */
    same_as_with_zeros(&LONG_PAIRS, LLM_CUDA_FUSED, LLM_DTYPE_INT8, "int8 2:4");
    same_as_with_zeros(&PAIRS, LLM_CUDA_GRAPH, LLM_DTYPE_INT8, "int8 76.3 %, int8 2:4 23.7 %");
    same_as_with_zeros(&PAIRS, LLM_CUDA_EAGER, LLM_DTYPE_BF16, "bf16 2:4");
    same_as_with_zeros(&PAIRS, LLM_CUDA_EAGER, LLM_DTYPE_INT8, "int8 76.3 %, int8 2:4 23.7 %");
    same_as_with_zeros(&LONG_PAIRS, LLM_CUDA_FUSED, LLM_DTYPE_BF16, "bf16 2:4");
    agrees_with_cpu(&PAIRS, LLM_CUDA_FUSED, LLM_DTYPE_BF16);
    agrees_with_cpu(&LONG_PAIRS, LLM_CUDA_FUSED, LLM_DTYPE_INT8);
#endif
}

/* Returns the logits of the 701st token of sequence 2, in a pass of n_rows rows. The other rows are a short text. */
static std::vector<float> after_long_text(llm_context *ctx, int n_rows) {
    llm_token tokens[16];
    int seqs[16];
    bool wanted[16];
    llm_error err;
    assert_int_equal(llm_seq_truncate(ctx, 2, 700, NULL), LLM_OK);
    for (int i = 0; i < n_rows; i++) {
        wanted[i] = i == n_rows / 2;
        seqs[i] = wanted[i] ? 2 : 0;
        tokens[i] = wanted[i] ? 9 : i;
    }
    llm_batch batch = {n_rows, tokens, seqs, wanted};
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    const float *logits = llm_logits(ctx, n_rows / 2);
    return std::vector<float>(logits, logits + N_VOCAB);
}

/* The keys are divided into several spans. Whether one block or several compute them, the bits are the same, and the
   result agrees with the CPU. */
static void test_long_text(void **state) {
    llm_context_desc desc = {};
    llm_context *ctx[2] = {};
    llm_token tokens[700];
    int seqs[700];
    double squares = 0, differences = 0;
    (void)state;
    desc.n_ctx = 800;
    desc.n_seq = 3;
    desc.n_batch = 700;
    desc.n_threads = 2;
    for (int i = 0; i < 700; i++) tokens[i] = i * 13 % N_VOCAB, seqs[i] = 2;
    for (int i = 0; i < 2; i++) {
        llm_batch batch = {700, tokens, seqs, NULL};
        assert_int_equal(llm_context_create(&ctx[i], load(&TINY_ODD, i ? llm_cuda_backend() : NULL), &desc, NULL),
                         LLM_OK);
        assert_int_equal(llm_forward(ctx[i], &batch, NULL), LLM_OK);
    }
    std::vector<float> expected = after_long_text(ctx[0], 1), alone = after_long_text(ctx[1], 1);
    for (int i = 0; i < N_VOCAB; i++) {
        squares += (double)expected[i] * expected[i];
        differences += ((double)expected[i] - alone[i]) * ((double)expected[i] - alone[i]);
    }
    assert_true(sqrt(differences / squares) < 0.02);
    for (int n_rows : {2, 5, 16}) assert_true(after_long_text(ctx[1], n_rows) == alone);
    for (int i = 0; i < 2; i++) close_context(ctx[i]);
}

static void test_save_and_restore(void **state) {
    llm_model *model = load(&TINY_ODD, llm_cuda_backend());
    llm_context *from = create(model), *to = create(model);
    uint64_t hash = in_company(from, 1);
    size_t size = llm_seq_save_size(from, 2);
    void *buffer = malloc(size);
    llm_token token = 5;
    int seq = 2;
    llm_batch batch = {1, &token, &seq, NULL};
    (void)state;
    assert_non_null(buffer);
    assert_int_equal(llm_seq_save(from, 2, buffer, size, NULL), LLM_OK);
    assert_int_equal(llm_forward(from, &batch, NULL), LLM_OK);
    hash = hash_logits(from, 0, 0);
    seq = 1;
    assert_int_equal(llm_seq_restore(to, 1, buffer, size, NULL), LLM_OK);
    assert_int_equal(llm_forward(to, &batch, NULL), LLM_OK);
    assert_int_equal(hash_logits(to, 0, 0), hash);
    free(buffer);
    llm_context_free(from);
    close_context(to);
}

static bool cancel_now(void *user) {
    (void)user;
    return true;
}

static void test_cancel(void **state) {
    llm_model *model = load(&TINY_ODD, llm_cuda_backend());
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    llm_token tokens[40] = {};
    llm_batch batch = {40, tokens, NULL, NULL};
    (void)state;
    desc.cancel = cancel_now;
    assert_int_equal(llm_context_create(&ctx, model, &desc, NULL), LLM_OK);
    assert_int_equal(llm_forward(ctx, &batch, NULL), LLM_ERROR_CANCELLED);
    batch.n_tokens = 1;
    assert_int_equal(llm_forward(ctx, &batch, NULL), LLM_ERROR_CANCELLED);
    assert_int_equal(llm_seq_length(ctx, 0), 0);
    close_context(ctx);
}

/* ---- Generation with tokens picked on the GPU ---- */

/* The output of llm_generate and the state after it. */
typedef struct story {
    llm_token tokens[256];
    int n_tokens, n_refused_at, n_cancelled_at; /* 0: never */
    std::string text;
    llm_stats stats;
    uint64_t n_drawn, hash;
    int length;
} story;

static bool hear_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    story *s = (story *)user;
    (void)bytes, (void)n_bytes;
    s->tokens[s->n_tokens++] = token;
    return s->n_tokens != s->n_refused_at;
}

static bool hear_text(void *user, const char *text, size_t n_bytes) {
    ((story *)user)->text.append(text, n_bytes);
    return true;
}

static bool cancel_story(void *user) {
    const story *s = (const story *)user;
    return s->n_cancelled_at && s->n_tokens >= s->n_cancelled_at;
}

static void tell(llm_context *ctx, llm_sampler sampler, llm_generate_desc desc, story *s) {
    static const llm_token prompt[] = {1, 2, 3, 200, 5};
    llm_token next = 7;
    llm_error err;
    desc.tokens = prompt;
    desc.n_tokens = 5;
    desc.seq = 1;
    desc.sampler = &sampler;
    desc.on_token = hear_token;
    desc.on_text = hear_text;
    desc.cancel = cancel_story;
    desc.user = s;
    assert_int_equal(llm_seq_truncate(ctx, 1, 0, NULL), LLM_OK);
    if (llm_generate(ctx, &desc, &s->stats, &err)) fail_msg("%s", err.message);
    s->n_drawn = sampler.n_drawn;
    s->length = llm_seq_length(ctx, 1);
    assert_int_equal(s->stats.n_generated, s->n_tokens);
    assert_memory_equal(llm_seq_tokens(ctx, 1) + 5, s->tokens, (size_t)(s->length - 5) * sizeof(llm_token));
    if (s->length == llm_context_n_ctx(ctx)) return;
    int seq = 1; /* one more pass checks the contents of the cache */
    llm_batch batch = {1, &next, &seq, NULL};
    assert_int_equal(llm_forward(ctx, &batch, NULL), LLM_OK);
    s->hash = hash_logits(ctx, 0, 0);
}

/* What a story tells, and what it leaves in the cache. */
static void assert_same_story(const story &a, const story &b) {
    assert_int_equal(a.n_tokens, b.n_tokens);
    assert_memory_equal(a.tokens, b.tokens, sizeof a.tokens);
    assert_string_equal(a.text.c_str(), b.text.c_str());
    assert_int_equal(a.stats.stop, b.stats.stop);
    assert_int_equal(a.stats.stop_index, b.stats.stop_index);
    assert_int_equal(a.n_drawn, b.n_drawn);
    assert_int_equal(a.length, b.length);
    assert_int_equal(a.hash, b.hash);
}

/* Generates with tokens picked on the GPU and on the host, and compares. A bias, even of 0, makes the host pick. */
static story tells_the_same(llm_context *ctx, llm_sampler sampler, const llm_generate_desc &desc, int refused_at = 0,
                            int cancelled_at = 0) {
    static const llm_logit_bias nothing = {0, 0};
    story stories[2] = {};
    for (int i = 0; i < 2; i++) {
        stories[i].n_refused_at = refused_at;
        stories[i].n_cancelled_at = cancelled_at;
        sampler.biases = &nothing;
        sampler.n_biases = i;
        tell(ctx, sampler, desc, &stories[i]);
    }
    assert_same_story(stories[0], stories[1]);
    assert_int_equal(stories[0].stats.n_decode_passes, stories[1].stats.n_decode_passes);
    assert_int_equal(stories[0].stats.decode_bytes, stories[1].stats.decode_bytes);
    return stories[0];
}

static llm_context *create_for_text(const llm_model *model, int n_ctx) {
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    desc.n_ctx = n_ctx;
    desc.n_seq = 2;
    desc.n_batch = 32;
    assert_int_equal(llm_context_create(&ctx, model, &desc, NULL), LLM_OK);
    return ctx;
}

static llm_sampler sampler_of(float temperature, uint64_t seed, int top_k = 0, float top_p = 0, float min_p = 0,
                              float repeat_penalty = 0, uint64_t n_drawn = 0) {
    llm_sampler sampler = {};
    sampler.temperature = temperature;
    sampler.top_k = top_k;
    sampler.top_p = top_p;
    sampler.min_p = min_p;
    sampler.repeat_penalty = repeat_penalty;
    sampler.seed = seed;
    sampler.n_drawn = n_drawn;
    return sampler;
}

static const llm_sampler SAMPLERS[] = {sampler_of(0, 1),
                                       sampler_of(1, 2),
                                       sampler_of(0.8f, 3, 20, 0.9f, 0, 0, 5),
                                       sampler_of(2, 4, 0, 0.7f),
                                       sampler_of(1.5f, 5, 5),
                                       sampler_of(1.2f, 6, 0, 0, 0.1f),
                                       sampler_of(1, 7, 1000, 0.999f, 0.01f, 1)};

static void test_bursts(void **state) {
    llm_model *model = load(&SMALL, llm_cuda_backend());
    llm_context *ctx = create_for_text(model, 300), *small = create_for_text(model, 80);
    llm_generate_desc desc = {};
    (void)state;
    desc.ignore_end = true;
    desc.max_tokens = 70; /* more than a burst */
    story greedy = tells_the_same(ctx, SAMPLERS[0], desc);
    assert_int_equal(greedy.stats.stop, LLM_STOP_LENGTH);
    desc.max_tokens = 12;
    for (int i = 1; i < 7; i++) tells_the_same(ctx, SAMPLERS[i], desc);
    desc.max_tokens = 1;
    tells_the_same(ctx, SAMPLERS[1], desc);
    desc.max_tokens = 0;
    assert_int_equal(tells_the_same(small, SAMPLERS[1], desc).stats.stop, LLM_STOP_CONTEXT);
    assert_int_equal(tells_the_same(ctx, SAMPLERS[1], desc, 12).stats.stop, LLM_STOP_CALLBACK);
    assert_int_equal(tells_the_same(ctx, SAMPLERS[1], desc, 0, 12).stats.stop, LLM_STOP_CALLBACK);
    std::string ending = tells_the_same(ctx, SAMPLERS[1], desc, 12).text.substr(10, 3);
    const char *strings[] = {ending.c_str()};
    desc.stop_strings = strings;
    desc.n_stop_strings = 1;
    assert_int_equal(tells_the_same(ctx, SAMPLERS[1], desc).stats.stop, LLM_STOP_STRING);
    llm_generate_desc by_token = {};
    by_token.ignore_end = true;
    by_token.stop_tokens = &greedy.tokens[40];
    by_token.n_stop_tokens = 1;
    assert_int_equal(tells_the_same(ctx, SAMPLERS[0], by_token).stats.stop, LLM_STOP_TOKEN);
    llm_context_free(small);
    close_context(ctx);
}

/* ---- A model with one token whose embedding is NaN ---- */

enum { NAN_TOKEN = 251 };

static llm_backend_weight sound_weight; /* the weight that is being uploaded */

static void read_row_with_nan(const llm_backend_weight *weight, int row, float *out) {
    (void)weight;
    sound_weight.read_row(&sound_weight, row, out);
    for (int i = 0; row == NAN_TOKEN && i < sound_weight.cols; i++) out[i] = NAN;
}

static llm_status upload_with_nan(void *model, const llm_backend_weight *weight, llm_error *err) {
    llm_backend_weight changed = sound_weight = *weight;
    if (weight->kind == LLM_WEIGHT_EMBEDDING) changed.read_row = read_row_with_nan;
    return llm_cuda_backend()->upload(model, &changed, err);
}

/* NaN logits give an error message. NaNs that remain in the cache must not reach the next text. */
static void test_nan(void **state) {
    static llm_backend backend;
    llm_generate_desc desc = {};
    (void)state;
    backend = *llm_cuda_backend();
    backend.upload = upload_with_nan;
    llm_context *ctx = create_for_text(load(&MANY_GROUPS, &backend), 300);
    desc.ignore_end = true;
    desc.max_tokens = 12;
    story expected = tells_the_same(ctx, SAMPLERS[2], desc);
    for (llm_sampler sampler : SAMPLERS) {
        llm_generate_desc with_nan = desc;
        llm_token tokens[60];
        llm_error err;
        for (int i = 0; i < 60; i++) tokens[i] = i % 3 == 1 ? (llm_token)NAN_TOKEN : i;
        with_nan.tokens = tokens;
        with_nan.n_tokens = 60;
        with_nan.seq = 1;
        with_nan.sampler = &sampler;
        assert_int_equal(llm_seq_truncate(ctx, 1, 0, NULL), LLM_OK);
        assert_int_equal(llm_generate(ctx, &with_nan, NULL, &err), LLM_ERROR_FORMAT);
        assert_non_null(strstr(err.message, "NaN"));
        story again = tells_the_same(ctx, SAMPLERS[2], desc);
        assert_int_equal(again.hash, expected.hash);
        assert_string_equal(again.text.c_str(), expected.text.c_str());
    }
    close_context(ctx);
}

/* Generation without graphs, and in eager mode, where the host picks. */
static void test_bursts_of_all_modes(void **state) {
    llm_generate_desc desc = {};
    (void)state;
    desc.ignore_end = true;
    desc.max_tokens = 20;
    for (int mode = LLM_CUDA_FUSED; mode <= LLM_CUDA_EAGER; mode++) {
        llm_model *model = load(&TINY_ODD, llm_cuda_backend_mode((llm_cuda_mode)mode));
        llm_context *ctx = create_for_text(model, 100);
        tells_the_same(ctx, SAMPLERS[2], desc);
        close_context(ctx);
    }
}

/* ---- Masks and grammars, with which the host picks ---- */

static void change_nothing(void *, const llm_token *, int, float *, int) {}

/* Forbids what is not ASCII, and BOS, the last token. */
static void only_ascii(void *, const llm_token *, int, float *logits, int n_vocab) {
    for (int i = 128; i < n_vocab; i++)
        if (i < 256 || i == n_vocab - 1) logits[i] = -INFINITY;
}

static story tell_masked(llm_context *ctx, llm_sampler sampler, llm_generate_desc desc,
                         void (*mask)(void *user, const llm_token *tokens, int n, float *logits, int n_vocab),
                         llm_grammar *grammar = NULL) {
    story s = {};
    sampler.mask = mask;
    sampler.mask_user = grammar;
    tell(ctx, sampler, desc, &s);
    return s;
}

/* In each mode: a mask that changes nothing gives the text that the GPU picks alone; a grammar that allows all ASCII
   gives the text of a mask that does; and where a schema forces tokens, which are computed several at a time, the text
   is the one that its masks give token by token. */
static void test_masks_and_grammars(void **state) {
    static const char *const COLOURS =
        "{\"type\":\"object\",\"properties\":{\"colour\":{\"enum\":[\"red\",\"blue\"]},\"transparent\":{\"type\":"
        "\"boolean\"}},\"required\":[\"colour\",\"transparent\"],\"additionalProperties\":false}";
    (void)state;
    for (int mode = LLM_CUDA_GRAPH; mode <= LLM_CUDA_EAGER; mode++) {
        llm_model *model = load(&SMALL, llm_cuda_backend_mode((llm_cuda_mode)mode));
        llm_context *ctx = create_for_text(model, 300);
        llm_grammar *ascii = NULL, *colours = NULL;
        const llm_tokenizer *tokenizer = llm_model_tokenizer(model);
        assert_int_equal(llm_grammar_from_regex(&ascii, tokenizer, "[\\x00-\\x7F]*", NULL, NULL), LLM_OK);
        assert_int_equal(llm_grammar_from_json_schema(&colours, tokenizer, COLOURS, NULL, NULL), LLM_OK);
        for (int i = SANITIZED ? 2 : 0; i < 3; i += 2) {
            llm_generate_desc desc = {};
            desc.max_tokens = SANITIZED ? 6 : 20;
            desc.ignore_end = true;
            const story plain = tell_masked(ctx, SAMPLERS[i], desc, NULL);
            assert_same_story(tell_masked(ctx, SAMPLERS[i], desc, change_nothing), plain);
            desc.ignore_end = false;
            const story expected = tell_masked(ctx, SAMPLERS[i], desc, only_ascii);
            desc.grammar = ascii;
            assert_same_story(tell_masked(ctx, SAMPLERS[i], desc, NULL), expected);
            for (int n = 12; n <= 100; n += 88) { /* a part of the answer, and all of it */
                desc.max_tokens = n;
                desc.grammar = colours;
                const story quick = tell_masked(ctx, SAMPLERS[i], desc, NULL);
                desc.grammar = NULL;
                llm_grammar_begin(colours, 5); /* the prompt's tokens */
                const story slow = tell_masked(ctx, SAMPLERS[i], desc, llm_grammar_mask, colours);
                if (n == 12) assert_same_story(quick, slow);
                assert_int_equal(quick.stats.stop, n == 12 ? LLM_STOP_LENGTH : LLM_STOP_END);
                assert_int_equal(slow.stats.stop, quick.stats.stop);
                assert_string_equal(slow.text.c_str(), quick.text.c_str());
                assert_int_equal(llm_grammar_check(colours, quick.text.c_str(), quick.text.size()), n > 12);
                const int n_forced = quick.stats.draft.n_accepted, n_end = n > 12; /* END is drawn, if by masks alone */
                assert_int_equal(quick.stats.n_decode_passes + n_forced + n_end, slow.stats.n_decode_passes);
                assert_true(n_forced > 5 || n == 12);
            }
        }
        llm_grammar_free(ascii);
        llm_grammar_free(colours);
        close_context(ctx);
    }
}

/* ---- Scoring ---- */

enum { QUESTIONS = 5, MOST_ENDINGS = 9, MOST_TOKENS = 9 };

/* Contexts and endings are parts of one list of tokens. */
typedef struct quiz {
    llm_token tokens[1000];
    const llm_token *endings[QUESTIONS][MOST_ENDINGS];
    int lengths[QUESTIONS][MOST_ENDINGS], n_results;
    llm_question questions[QUESTIONS];
} quiz;

/* Makes questions of many lengths. The first one predicts more tokens from one row than a small pass has rows. The
   endings of another one begin alike. */
static void make_quiz(quiz *z) {
    pair random = {};
    z->n_results = 0;
    for (llm_token &token : z->tokens) token = draw(&random, N_VOCAB);
    for (int i = 0; i < QUESTIONS; i++) {
        int n_endings = i ? 1 + i % 4 : (int)MOST_ENDINGS, n_context = i ? 1 + draw(&random, MOST_TOKENS) : 1;
        z->questions[i] =
            llm_question{z->tokens + draw(&random, 900), n_context, n_endings, z->endings[i], z->lengths[i]};
        for (int e = 0; e < n_endings; e++, z->n_results++) {
            z->endings[i][e] = z->tokens + (i == 3 ? 100 : draw(&random, 900));
            z->lengths[i][e] = 1 + draw(&random, MOST_TOKENS);
        }
    }
}

static std::vector<double> score(const llm_model *model, const quiz &z, const llm_context_desc &desc,
                                 const llm_score_desc &how) {
    std::vector<double> results((size_t)z.n_results);
    llm_context *ctx = NULL;
    llm_error err;
    if (llm_context_create(&ctx, model, &desc, &err)) fail_msg("%s", err.message);
    if (llm_score(ctx, z.questions, QUESTIONS, &how, results.data(), NULL, &err)) fail_msg("%s", err.message);
    llm_context_free(ctx);
    return results;
}

/* Scores in the first n_ways of these ways: in one piece and in several, with more targets than are sent at a time,
   with and without forks. */
static void scores_as_cpu(const tiny_spec *spec, llm_cuda_mode mode, llm_dtype dtype, int n_ways) {
    static const struct {
        int n_seq, n_batch, n_logits;
        llm_schedule schedule;
        bool recompute_context;
    } ways[] = {{9, 4, 3, LLM_SCHEDULE_PACKED, false},
                {60, 200, 1, LLM_SCHEDULE_PACKED, false},
                {20, 40, 1, LLM_SCHEDULE_DP, false},
                {60, 200, 170, LLM_SCHEDULE_FIXED, true}};
    llm_model *cpu = load(spec, NULL, dtype_on_cpu(spec, dtype)), *gpu = load(spec, llm_cuda_backend_mode(mode), dtype);
    static quiz z;
    double worst = 0; /* as in `pair`, but relative to log-likelihoods above those of uniform probabilities */
    make_quiz(&z);
    for (int i = 0; i < n_ways; i++) {
        const auto &way = ways[i];
        llm_context_desc desc = {};
        llm_score_desc how = {};
        desc.n_ctx = 2 * MOST_TOKENS;
        desc.n_seq = way.n_seq;
        desc.n_batch = way.n_batch;
        desc.n_logits = way.n_logits;
        desc.n_threads = 2;
        how.schedule = way.schedule;
        how.recompute_context = way.recompute_context;
        std::vector<double> expected = score(cpu, z, desc, how), got = score(gpu, z, desc, how);
        double squares = 0, differences = 0;
        for (size_t i = 0, at = 0; i < QUESTIONS; i++)
            for (int e = 0; e < z.questions[i].n_endings; e++, at++) {
                double value = expected[at] + z.lengths[i][e] * log((double)N_VOCAB),
                       difference = got[at] - expected[at];
                squares += value * value;
                differences += difference * difference;
            }
        double ratio = sqrt(differences / squares);
        if (!(ratio <= worst)) worst = ratio;
    }
    print_message("log-likelihoods: within %.4f\n", worst);
    assert_true(worst < 0.01);
    llm_model_free(cpu);
    llm_model_free(gpu);
}

static void test_scores(void **state) {
    (void)state;
    scores_as_cpu(&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 4);
    scores_as_cpu(&TINY_ODD, LLM_CUDA_EAGER, LLM_DTYPE_INT8, 2);
    scores_as_cpu(&TINY_ODD, LLM_CUDA_FUSED, LLM_DTYPE_INT8, 2);
    scores_as_cpu(&FOUR_BITS_0, LLM_CUDA_GRAPH, LLM_DTYPE_INT4, 2);
    scores_as_cpu(&EIGHT_BITS, LLM_CUDA_FUSED, LLM_DTYPE_INT4, 2);
}

/* The scores of all possible next tokens match the logits of the same kernels. */
static void test_scores_against_logits(void **state) {
    static llm_token context[] = {1, 2, 3};
    double results[N_VOCAB], all = 0, sum = 0;
    llm_context_desc desc = {};
    llm_batch batch = {3, context, NULL, NULL};
    llm_question question = every_token(context, 3, N_VOCAB);
    llm_error err;
    (void)state;
    desc.n_ctx = 32;
    desc.n_seq = N_VOCAB;
    desc.n_cache = 64;
    desc.n_batch = 8;
    llm_context *ctx = create_context(load(&USUAL_HEADS, llm_cuda_backend_mode(LLM_CUDA_EAGER)), &desc);
    if (llm_score(ctx, &question, 1, NULL, results, NULL, &err)) fail_msg("%s", err.message);
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    const float *logits = llm_logits(ctx, 2);
    for (int i = 0; i < N_VOCAB; i++) all += exp((double)logits[i]);
    for (int i = 0; i < N_VOCAB; i++) {
        sum += exp(results[i]);
        assert_true(fabs(results[i] - (logits[i] - log(all))) < 1e-5);
    }
    assert_true(fabs(sum - 1) < 1e-5);
    close_context(ctx);
}

static void test_limits_are_measured(void **state) {
    llm_model *model = load(&TINY_ODD, llm_cuda_backend());
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    (void)state;
    desc.n_batch = 20;
    assert_int_equal(llm_context_create(&ctx, model, &desc, NULL), LLM_OK);
    assert_true(llm_measure_bandwidth(ctx) > 0);
    assert_true(llm_measure_flops(ctx) > 0);
    close_context(ctx);
}

static void in_a_thread(const llm_model *model, uint64_t *hash) {
    llm_context *ctx = create(model);
    *hash = in_company(ctx, 2);
    llm_context_free(ctx);
}

/* Several threads have contexts of one model, and all record graphs. */
static void test_threads(void **state) {
    llm_model *model = load(&TINY_ODD, llm_cuda_backend());
    uint64_t hashes[3] = {};
    std::thread threads[3];
    (void)state;
    for (int i = 0; i < 3; i++) threads[i] = std::thread(in_a_thread, model, &hashes[i]);
    for (int i = 0; i < 3; i++) threads[i].join();
    assert_int_equal(hashes[1], hashes[0]);
    assert_int_equal(hashes[2], hashes[0]);
    llm_model_free(model);
}

static void test_refusals(void **state) {
    llm_error err;
    llm_model *model = load(&TINY_ODD, llm_cuda_backend());
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    (void)state;
    for (llm_dtype dtype : {LLM_DTYPE_F32, LLM_DTYPE_INT8}) {
        desc.cache_dtype = dtype;
        assert_int_equal(llm_context_create(&ctx, model, &desc, &err), LLM_ERROR_UNSUPPORTED);
        assert_null(ctx);
        assert_non_null(strstr(err.message, llm_dtype_name(dtype)));
    }
    desc.cache_dtype = LLM_DTYPE_BF16;
    assert_int_equal(llm_context_create(&ctx, model, &desc, &err), LLM_OK);
    llm_context_free(ctx);
    ctx = NULL;
    desc.n_batch = 70000;
    assert_int_equal(llm_context_create(&ctx, model, &desc, &err), LLM_ERROR_UNSUPPORTED);
    llm_model_free(model);
    tiny_spec longest = LONG_HEADS, sharing = MANY_QUERIES;
    longest.head_dim = 288;
    sharing.n_heads = 33;
    assert_null(load_as(&TINY_ODD, llm_cuda_backend(), LLM_DTYPE_F32, &err));
    assert_int_equal(err.code, LLM_ERROR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "f32"));
    assert_null(load_as(&longest, llm_cuda_backend(), LLM_DTYPE_BF16, &err));
    assert_int_equal(err.code, LLM_ERROR_UNSUPPORTED);
    assert_null(load_as(&sharing, llm_cuda_backend(), LLM_DTYPE_BF16, &err));
    assert_int_equal(err.code, LLM_ERROR_UNSUPPORTED);
}

/* ---- Several GPUs ---- */

/* On a GPU, cuBLAS may add in another order for a rank's share of a matrix. So passes have at most 16 rows there, and
   scores, which are computed by other kernels, may differ a little. */
#ifdef CUDA_HOST_RUNTIME_H
static const int RANK_BATCH = 48;
static const double RANK_ERROR = 0;
static void set_devices(int n) {
    cuda_host.n_devices = n;
    cuda_host_peers.clear(); /* each test begins without access */
    if (n == 1) assert_int_equal(cuda_host.n_live, 0);
}
#else
static const int RANK_BATCH = 16;
static const double RANK_ERROR = 0.01;
static void set_devices(int) {}                        /* ranks share the existing GPUs */
#endif

/* The results of a rank. All ranks must get the same results as one GPU. */
typedef struct findings {
    uint64_t logits[7], saved; /* hashes of the logits after each of seven passes, and of the saved sequence */
    double scores[5];
    llm_token texts[3][24];
    llm_status cancelled, refused;
    int n_passes;
} findings;

/* Where tensor ranks exchange their rows. */
typedef enum way { IN_GPUS, IN_HOST, IN_NCCL, WAYS } way;

/* Ranks of the same tensor group have consecutive numbers. */
typedef struct ranked_job {
    const tiny_spec *spec;
    llm_cuda_mode mode;
    llm_dtype dtype;
    int n_shards, n_stages;
    llm_comm *tensor[4], *pipeline[4];
    findings found[4];
    void (*work)(struct ranked_job *job, int rank);
    int n_met[WAYS]; /* atomic: number of contexts whose ranks exchange rows in this way         */
    int n_links[2];  /* atomic: links of all contexts that go through the host; from GPU to GPU  */
} ranked_job;

/* The log callback. The first rank's context logs how tensor ranks exchange rows, and how stages send them. */
static void count_meetings(void *user, const char *line) {
    static const char *const words[WAYS] = {"meet in the GPUs' memory", "meet in the host's memory",
                                            "meet through NCCL 2.27"};
    ranked_job *job = (ranked_job *)user;
    for (int i = 0; i < WAYS; i++)
        if (strstr(line, words[i])) __atomic_add_fetch(&job->n_met[i], 1, __ATOMIC_RELAXED);
    int n_direct, n;
    if (sscanf(line, "CUDA: %d of %d links between the stages", &n_direct, &n) != 2) return;
    __atomic_add_fetch(&job->n_links[0], n - n_direct, __ATOMIC_RELAXED);
    __atomic_add_fetch(&job->n_links[1], n_direct, __ATOMIC_RELAXED);
}

static llm_model *load_rank(ranked_job *job, int rank, llm_error *err) {
    llm_model_desc desc = {};
    llm_model *model = NULL;
    desc.dtype = job->dtype;
    desc.backend = llm_cuda_backend_mode(job->mode);
    desc.n_threads = 1;
    desc.tensor = job->tensor[rank];
    desc.pipeline = job->pipeline[rank];
    desc.host.log = count_meetings;
    desc.host.user = job;
    try_tiny(&model, job->spec, desc, err);
    return model;
}

/* Computes n tokens of sequence seq and hashes all their logits. */
static void add_logits(llm_context *ctx, findings *f, int n, int seq) {
    llm_token tokens[64];
    int seqs[64];
    bool wanted[64];
    llm_error err;
    for (int i = 0; i < n; i++) tokens[i] = (i * 37 + n) % N_VOCAB, seqs[i] = i < n / 3 ? 0 : seq, wanted[i] = true;
    llm_batch batch = {n, tokens, seqs, wanted};
    RANK_CHECK(llm_forward(ctx, &batch, &err) == LLM_OK, err.message);
    for (int i = 0; i < n; i++) {
        RANK_CHECK(llm_logits(ctx, i), "no logits");
        f->logits[f->n_passes] = hash_logits(ctx, i, f->logits[f->n_passes]);
    }
    f->n_passes++;
}

static bool keep_token(void *user, llm_token token, const char *, size_t) {
    llm_token *tokens = (llm_token *)user;
    tokens[++tokens[0]] = token;
    return true;
}

static bool always(void *) { return true; }

static int n_guesses; /* atomic: guesses that ranks of this process checked; how many depends on measured times */

/* A draft that guesses three tokens right, then one wrong, and so on. */
static llm_status guess(void *user, const llm_draft_request *request, llm_draft_guesses *guesses, llm_error *) {
    const llm_token *text = (const llm_token *)user; /* the length, then the tokens of the text without a draft */
    int at = request->n_tokens - request->answer_begin;
    for (int i = 0; i < request->n_wanted[0] && at + i < text[0]; i++)
        guesses->tokens[guesses->n++] = (text[1 + at + i] + (at + i) % 4 / 3) % N_VOCAB;
    return LLM_OK;
}

/* Runs long and short passes, three texts, one of them with a draft, saving and restoring, scoring, and cancelling. */
static void run_rank(ranked_job *job, int rank) {
    static const llm_token words[20] = {3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4};
    static const llm_token *const endings[] = {words, words + 3, words + 7, words + 9, words + 11};
    static const int lengths[] = {5, 9, 2, 11, 7};
    const llm_question question = {words, 9, 5, endings, lengths};
    findings *f = &job->found[rank];
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    llm_error err;
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    desc.n_ctx = 100;
    desc.n_seq = 6;
    desc.n_batch = RANK_BATCH;
    desc.n_logits = 48;
    RANK_CHECK(llm_context_create(&ctx, model, &desc, &err) == LLM_OK, err.message);
    for (int n : {40, 5, 1, 1, 1, 16}) add_logits(ctx, f, n, 2);
    size_t size = llm_seq_save_size(ctx, 2);
    std::vector<uint8_t> buffer(size);
    RANK_CHECK(llm_seq_save(ctx, 2, buffer.data(), size, &err) == LLM_OK, err.message);
    for (uint8_t byte : buffer) f->saved = (f->saved ^ byte) * 0x100000001B3u;
    RANK_CHECK(llm_seq_restore(ctx, 1, buffer.data(), size, &err) == LLM_OK, err.message);
    add_logits(ctx, f, 3, 1);
    llm_draft draft = {};
    draft.name = "test";
    draft.propose = guess;
    draft.user = f->texts[1];
    for (int kind = 0; kind < LLM_DRAFT_KINDS; kind++)
        for (int i = 0; i < LLM_DRAFT_MAX; i++) draft.learnt.n_right[kind][i] = draft.learnt.n_known[kind][i] = 100;
    for (int i = 0; i < 3; i++) {
        llm_sampler sampler = SAMPLERS[i == 0 ? 0 : 2];
        llm_generate_desc text = {};
        llm_stats stats;
        if (i == 2) text.draft = &draft;
        text.draft_keeps_text = true;
        text.tokens = words;
        text.n_tokens = 20;
        text.seq = 3;
        text.max_tokens = 20;
        text.ignore_end = true;
        text.sampler = &sampler;
        text.on_token = keep_token;
        text.user = f->texts[i];
        RANK_CHECK(llm_generate(ctx, &text, &stats, &err) == LLM_OK, err.message);
        __atomic_add_fetch(&n_guesses, stats.draft.n_proposed, __ATOMIC_RELAXED);
    }
    if (job->mode != LLM_CUDA_EAGER)
        RANK_CHECK(!memcmp(f->texts[2], f->texts[1], sizeof f->texts[1]), "a draft must not change the text");
    RANK_CHECK(llm_score(ctx, &question, 1, NULL, f->scores, NULL, &err) == LLM_OK, err.message);
    llm_context_free(ctx);
    if (rank == job->n_shards * job->n_stages - 1) desc.cancel = always; /* only the last rank cancels */
    RANK_CHECK(llm_context_create(&ctx, model, &desc, &err) == LLM_OK, err.message);
    llm_batch batch = {20, words, NULL, NULL};
    f->cancelled = llm_forward(ctx, &batch, &err);
    llm_context_free(ctx);
    desc.cache_dtype = rank ? LLM_DTYPE_BF16 : LLM_DTYPE_INT8; /* rank 0 refuses INT8 */
    f->refused = llm_context_create(&ctx, model, &desc, &err);
    llm_model_free(model);
}

#ifdef CUDA_HOST_RUNTIME_H
static void check_meetings(const ranked_job *job, way expected) {
    for (int i = 0; i < WAYS && job->n_shards > 1; i++) assert_int_equal(job->n_met[i] > 0, i == (int)expected);
    for (int i = 0; i < 2 && job->n_stages > 1; i++)
        assert_int_equal(job->n_links[i] > 0, (i == 1) == (expected == IN_GPUS));
}
#else
static void check_meetings(const ranked_job *, way) {} /* the way depends on the machine */
#endif

/* Runs job->work on all ranks. Each is a thread with its own device. */
static void run_job(ranked_job *job) {
    std::vector<std::thread> threads;
    int n = job->n_shards * job->n_stages;
    memset(job->found, 0, sizeof job->found);
    for (llm_comm *&comm : job->tensor) comm = NULL;
    for (llm_comm *&comm : job->pipeline) comm = NULL;
    for (int stage = 0; stage < job->n_stages && job->n_shards > 1; stage++)
        assert_int_equal(llm_comm_threads(job->tensor + stage * job->n_shards, job->n_shards, NULL, NULL), LLM_OK);
    for (int shard = 0; shard < job->n_shards && job->n_stages > 1; shard++) {
        llm_comm *comms[4];
        assert_int_equal(llm_comm_threads(comms, job->n_stages, NULL, NULL), LLM_OK);
        for (int stage = 0; stage < job->n_stages; stage++) job->pipeline[stage * job->n_shards + shard] = comms[stage];
    }
    set_devices(4);
    for (int rank = 0; rank < n; rank++)
        threads.emplace_back([=] {
            job->work(job, rank);
            llm_comm_free(job->tensor[rank]);
            llm_comm_free(job->pipeline[rank]);
        });
    for (std::thread &thread : threads) thread.join();
    set_devices(1);
}

/* Ranks of all these shapes give the results of one GPU. With tests/cuda_host they exchange rows in the expected
   way. */
static void same_on_ranks(const tiny_spec *spec, llm_cuda_mode mode, llm_dtype dtype,
                          std::vector<std::pair<int, int>> shapes, way expected_way = IN_GPUS) {
    ranked_job job = {spec, mode, dtype, 1, 1, {}, {}, {}, run_rank, {}, {}};
    run_job(&job);
    findings expected = job.found[0];
    for (const auto &shape : shapes) {
        job.n_shards = shape.first;
        job.n_stages = shape.second;
        memset(job.n_met, 0, sizeof job.n_met);
        memset(job.n_links, 0, sizeof job.n_links);
        run_job(&job);
        check_meetings(&job, expected_way);
        for (int rank = 0; rank < job.n_shards * job.n_stages; rank++) {
            const findings *f = &job.found[rank];
            for (int i = 0; i < 7; i++)
                if (f->logits[i] != expected.logits[i])
                    fail_msg("%d x %d ranks: rank %d has other logits in pass %d", job.n_shards, job.n_stages, rank, i);
            assert_int_equal(f->saved, expected.saved);
            assert_memory_equal(f->texts, expected.texts, sizeof f->texts);
            for (int i = 0; i < 5; i++)
                assert_true(fabs(f->scores[i] - expected.scores[i]) <= RANK_ERROR * fabs(expected.scores[i]));
            assert_int_equal(f->cancelled, LLM_ERROR_CANCELLED);
            assert_int_equal(f->refused, LLM_ERROR_UNSUPPORTED);
        }
    }
}

/* Ranks that are not allowed to exchange rows in the GPUs' memory, and ranks that cannot. */
static void test_ranks_through_host(void **state) {
    (void)state;
    setenv("LLM_CUDA_RANKS", "host", 1);
    same_on_ranks(&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, {{2, 2}}, IN_HOST);
#ifndef CUDA_HOST_ASAN /* these take minutes there */
    same_on_ranks(&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, {{3, 1}, {2, 2}}, IN_HOST);
    same_on_ranks(&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, {{1, 3}}, IN_HOST);
#endif
    unsetenv("LLM_CUDA_RANKS");
#if defined(CUDA_HOST_RUNTIME_H) && !defined(CUDA_HOST_ASAN)
    cuda_host.has_peers = false;
    same_on_ranks(&HALVES, LLM_CUDA_FUSED, LLM_DTYPE_F16, {{2, 1}}, IN_HOST);
    same_on_ranks(&DEEP, LLM_CUDA_FUSED, LLM_DTYPE_F16, {{1, 2}, {2, 2}}, IN_HOST);
    cuda_host.has_peers = true;
#endif
}

/* Ranks with fewer heads than a group, key heads that two ranks use, ranks without a share; all types. */
static void test_ranks(void **state) {
    (void)state;
#ifdef CUDA_HOST_ASAN /* all of them take many minutes there */
    same_on_ranks(&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, {{3, 1}, {2, 2}});
    same_on_ranks(&FOUR_BITS, LLM_CUDA_GRAPH, LLM_DTYPE_INT4, {{2, 1}});
#else
    same_on_ranks(&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, {{2, 1}, {3, 1}, {4, 1}, {1, 2}, {2, 2}});
    same_on_ranks(&USUAL_HEADS, LLM_CUDA_FUSED, LLM_DTYPE_INT8, {{3, 1}, {1, 2}});
    same_on_ranks(&FOUR_BITS, LLM_CUDA_GRAPH, LLM_DTYPE_INT4, {{4, 1}, {2, 2}});
    same_on_ranks(&EIGHT_BITS, LLM_CUDA_FUSED, LLM_DTYPE_INT4, {{2, 1}});
    same_on_ranks(&HALVES, LLM_CUDA_GRAPH, LLM_DTYPE_F16, {{3, 1}});
    same_on_ranks(&PAIRS, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, {{3, 1}, {2, 2}});
    same_on_ranks(&PAIRS, LLM_CUDA_GRAPH, LLM_DTYPE_INT8, {{2, 1}});
    same_on_ranks(&SMALL, LLM_CUDA_EAGER, LLM_DTYPE_BF16, {{2, 1}});
#endif
    assert_true(n_guesses > 0);
}

/* Scores twenty questions in many passes, so that stages run ahead of each other. Returns a hash of the scores. */
static llm_status score_many(llm_context *ctx, uint64_t *hash, llm_error *err) {
    llm_token words[20][30];
    const llm_token *endings[20];
    llm_question questions[20];
    const int length = 15;
    double scores[20] = {};
    for (int i = 0; i < 600; i++) words[i / 30][i % 30] = (i * 37 + i / 7) % N_VOCAB;
    for (int i = 0; i < 20; i++) {
        endings[i] = words[i] + 15;
        questions[i] = {words[i], 15, 1, &endings[i], &length};
    }
    llm_status status = llm_score(ctx, questions, 20, NULL, scores, NULL, err);
    *hash = 14695981039346656037u;
    for (size_t i = 0; i < sizeof scores; i++) *hash = (*hash ^ ((const uint8_t *)scores)[i]) * 0x100000001B3u;
    return status;
}

static llm_context *create_to_score(const llm_model *model, bool (*cancel)(void *user), void *user) {
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    llm_error err;
    desc.n_ctx = 64;
    desc.n_batch = 32;
    desc.n_seq = 4;
    desc.cancel = cancel;
    desc.cancel_user = user;
    RANK_CHECK(llm_context_create(&ctx, model, &desc, &err) == LLM_OK, err.message);
    return ctx;
}

static void run_scoring(ranked_job *job, int rank) {
    llm_error err;
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    llm_context *ctx = create_to_score(model, NULL, NULL);
    RANK_CHECK(score_many(ctx, &job->found[rank].saved, &err) == LLM_OK, err.message);
    llm_context_free(ctx);
    llm_model_free(model);
}

static void scores_the_same(const ranked_job *job, const ranked_job *one) {
    for (int rank = 0; rank < job->n_shards * job->n_stages; rank++)
        assert_int_equal(job->found[rank].saved, one->found[0].saved);
}

/* Two to four stages, in all modes. On several GPUs they send rows from GPU to GPU. */
static void test_pipeline(void **state) {
    (void)state;
#ifndef CUDA_HOST_ASAN /* these take minutes there */
    same_on_ranks(&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, {{1, 2}, {1, 4}, {2, 2}});
    same_on_ranks(&DEEP, LLM_CUDA_EAGER, LLM_DTYPE_BF16, {{1, 2}});
    same_on_ranks(&DEEP, LLM_CUDA_FUSED, LLM_DTYPE_INT8, {{1, 3}});
#endif
    same_on_ranks(&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, {{1, 3}});
    ranked_job job = {&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 1, 1, {}, {}, {}, run_scoring, {}, {}};
    run_job(&job);
    ranked_job one = job;
    for (job.n_stages = 2; job.n_stages <= 4; job.n_stages++) {
        run_job(&job);
        scores_the_same(&job, &one);
    }
}

/* One rank leaves before the pass. The others must get an error. */
static void leave_early(ranked_job *job, int rank) {
    llm_context *ctx = NULL;
    llm_token tokens[20] = {};
    llm_batch batch = {20, tokens, NULL, NULL};
    llm_error err;
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    RANK_CHECK(llm_context_create(&ctx, model, NULL, &err) == LLM_OK, err.message);
    if (rank != 1) job->found[rank].refused = llm_forward(ctx, &batch, &err);
    if (rank != 1) RANK_CHECK(strstr(err.message, "rank"), err.message);
    llm_context_free(ctx);
    llm_model_free(model);
}

static void test_dead_rank(void **state) {
    ranked_job job = {&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 3, 1, {}, {}, {}, leave_early, {}, {}};
    (void)state;
    run_job(&job);
    assert_int_equal(job.found[0].refused, LLM_ERROR_DEVICE);
    assert_int_equal(job.found[2].refused, LLM_ERROR_DEVICE);
    job.n_shards = 1;
    job.n_stages = 2;
    run_job(&job);
    assert_int_equal(job.found[0].refused, LLM_ERROR_DEVICE);
}

#ifdef CUDA_HOST_RUNTIME_H
/* The GPU of rank 1 fails in the third pass (the second pass was recorded). The other ranks' kernels wait for it. */
static void fail_in_pass(ranked_job *job, int rank, int *failing) {
    llm_context *ctx = NULL;
    llm_token tokens[3] = {};
    llm_batch batch = {3, tokens, NULL, NULL};
    llm_error err;
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    RANK_CHECK(llm_context_create(&ctx, model, NULL, &err) == LLM_OK, err.message);
    for (int i = 0; i < 2; i++) RANK_CHECK(llm_forward(ctx, &batch, &err) == LLM_OK, err.message);
    if (rank == 1) *failing = 1;
    job->found[rank].refused = llm_forward(ctx, &batch, &err);
    if (rank != 1 && job->n_shards > 1) RANK_CHECK(strstr(err.message, "rank 1"), err.message);
    RANK_CHECK(llm_forward(ctx, &batch, &err) == LLM_ERROR_DEVICE, "a pass after the failure must fail");
    llm_context_free(ctx);
    llm_model_free(model);
}

/* The rank cannot inform the others, which stop waiting when their patience ends. */
static void lose_device(ranked_job *job, int rank) {
    (job->n_shards > 1 ? job->tensor : job->pipeline)[rank]->patience = 1;
    fail_in_pass(job, rank, &cuda_host.lost_device);
}

/* The rank informs the others. If it did not, they would wait much longer than a test may take. */
static void refuse_launches(ranked_job *job, int rank) {
    (job->n_shards > 1 ? job->tensor : job->pipeline)[rank]->patience = 3600;
    fail_in_pass(job, rank, &cuda_host.refusing_device);
}

static void test_dead_gpu(void **state) {
    (void)state;
    for (auto work : {lose_device, refuse_launches}) {
        ranked_job job = {&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 3, 1, {}, {}, {}, work, {}, {}};
        int before = cuda_host.n_graph_launches;
        run_job(&job);
        cuda_host.lost_device = cuda_host.refusing_device = -1;
        check_meetings(&job, IN_GPUS);
        assert_true(cuda_host.n_graph_launches >= before + 3);
        for (int rank = 0; rank < 3; rank++) assert_int_equal(job.found[rank].refused, LLM_ERROR_DEVICE);
        job = {&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 1, 3, {}, {}, {}, work, {}, {}};
        run_job(&job);
        cuda_host.lost_device = cuda_host.refusing_device = -1;
        check_meetings(&job, IN_GPUS);
        for (int rank = 0; rank < 3; rank++) assert_int_equal(job.found[rank].refused, LLM_ERROR_DEVICE);
    }
}

/* ---- Ranks that are processes ---- */

/* A job in memory shared by the processes. */
typedef struct process_job {
    ranked_job job;
    bool each_sees_one;              /* true: every process sees one device, each on its own bus          */
    double patience;                 /* patience of the comm                                              */
    int refusing;                    /* the rank that cannot open the memory of the others; -1: none      */
    double seconds[4];               /* time that a rank needed to notice that another ended              */
    struct {                         /* for each rank:                                                    */
        const char *ways;            /* value of LLM_CUDA_RANKS; NULL: not set                            */
        int version;                 /* version of NCCL; 0: the test's NCCL is not loaded                 */
        bool refuses, fails, shares; /* NCCL does not start; NCCL fails later; uses the first rank's GPU  */
        bool breaks;                 /* a CUDA call fails while NCCL connects the ranks                   */
        int n_reduced, n_gathered;   /* number of operations by NCCL                                      */
        llm_status status;
        char message[500];
    } ranks[4];
} process_job;

/* Loads the test's NCCL, so that the library finds it by its name. If version is 0, the library finds the machine's
   NCCL, if there is one. */
static nccl_host_settings *load_nccl(const process_job *p, int rank) {
    const auto &r = p->ranks[rank];
    void *library = r.version ? dlopen("build/cuda_host/libnccl.so.2", RTLD_NOW | RTLD_LOCAL) : NULL;
    RANK_CHECK(library || !r.version, dlerror());
    nccl_host_settings *settings = library ? (nccl_host_settings *)dlsym(library, "nccl_host") : NULL;
    if (!settings) return NULL;
    settings->version = r.version;
    settings->refuses_start = r.refuses;
    settings->fail_at = r.fails ? 50 : 0;
    settings->n_busy = 3;
    if (r.breaks) settings->on_queued = [] { cuda_host.fail_at = 1; };
    return settings;
}

static void begin_process(process_job *p, llm_comm *comm) {
    cuda_host.has_ipc = true;
    cuda_host.n_graph_launches = 0;
    cuda_host.n_devices = p->each_sees_one ? 1 : 4;
    cuda_host.first_bus = p->each_sees_one && !p->ranks[comm->rank].shares ? comm->rank : 0;
    cuda_host.n_refused_handles = p->refusing == comm->rank ? 100 : 0;
    (p->job.n_stages > 1 ? p->job.pipeline : p->job.tensor)[comm->rank] = comm;
}

static void run_process(llm_comm *comm, void *arg) {
    process_job *p = (process_job *)arg;
    auto &r = p->ranks[comm->rank];
    begin_process(p, comm);
    if (r.ways) setenv("LLM_CUDA_RANKS", r.ways, 1);
    nccl_host_settings *nccl = load_nccl(p, comm->rank);
    p->job.work(&p->job, comm->rank);
    RANK_CHECK(cuda_host.n_live == 0, "something was not freed");
    if (!nccl) return;
    RANK_CHECK(nccl->n_live == 0, "a communicator was not freed");
    r.n_reduced = nccl->n_reduced;
    r.n_gathered = nccl->n_gathered;
}

static process_job *make_process_job(const tiny_spec *spec, llm_cuda_mode mode, llm_dtype dtype, int n,
                                     void (*work)(ranked_job *job, int rank)) {
    process_job *p = (process_job *)shared_by_processes(sizeof *p);
    p->job = ranked_job{spec, mode, dtype, n, 1, {}, {}, {}, work, {}, {}};
    p->refusing = -1;
    p->patience = 8;
    for (auto &r : p->ranks) r.version = 21499; /* too old, so NCCL is not used, even if the machine has it */
    return p;
}

/* A job whose processes have NCCL and LLM_CUDA_RANKS=nccl. */
static process_job *make_nccl_job(const tiny_spec *spec, llm_cuda_mode mode, llm_dtype dtype, int n,
                                  void (*work)(ranked_job *job, int rank)) {
    process_job *p = make_process_job(spec, mode, dtype, n, work);
    p->each_sees_one = true;
    for (auto &r : p->ranks) r.ways = "nccl", r.version = 22707;
    return p;
}

static void compare_findings(const findings *f, const findings *expected) {
    assert_memory_equal(f->logits, expected->logits, sizeof f->logits);
    assert_int_equal(f->saved, expected->saved);
    assert_memory_equal(f->texts, expected->texts, sizeof f->texts);
    assert_memory_equal(f->scores, expected->scores, sizeof f->scores);
    assert_int_equal(f->cancelled, LLM_ERROR_CANCELLED);
    assert_int_equal(f->refused, LLM_ERROR_UNSUPPORTED);
}

/* Each process takes many seconds with the address sanitizer. Three have unequal shares. */
#ifdef CUDA_HOST_ASAN
enum { FEWEST_PROCESSES = 3, MOST_PROCESSES = 3 };
#else
enum { FEWEST_PROCESSES = 2, MOST_PROCESSES = 4 };
#endif

/* The processes must give the same results as one GPU. */
static void same_in_processes(process_job *p, way expected) {
    ranked_job one = {p->job.spec, p->job.mode, p->job.dtype, 1, 1, {}, {}, {}, run_rank, {}, {}};
    run_job(&one);
    int n = p->job.n_shards * p->job.n_stages;
    on_processes(n, p->patience, run_process, p, NULL);
    check_meetings(&p->job, expected);
    for (int rank = 0; rank < n; rank++) compare_findings(&p->job.found[rank], &one.found[0]);
    munmap(p, sizeof *p);
}

static void test_processes(void **state) {
    (void)state;
    for (int n = FEWEST_PROCESSES; n <= MOST_PROCESSES; n++)
        same_in_processes(make_process_job(&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, n, run_rank), IN_GPUS);
    process_job *p = make_process_job(&FOUR_BITS, LLM_CUDA_FUSED, LLM_DTYPE_INT4, 2, run_rank);
    p->each_sees_one = true;
    same_in_processes(p, IN_GPUS);
}

/* If one rank cannot open the memory of another, all use the host's memory. */
static void test_processes_through_host(void **state) {
    (void)state;
    process_job *p = make_process_job(&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 3, run_rank);
    p->refusing = 1;
    same_in_processes(p, IN_HOST);
}

/* The same for two to four stages. */
static process_job *make_stages(int n, void (*work)(ranked_job *job, int rank)) {
    process_job *p = make_process_job(&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 1, work);
    p->job.n_stages = n;
    return p;
}

static void test_pipeline_processes(void **state) {
    (void)state;
    for (int n = FEWEST_PROCESSES; n <= MOST_PROCESSES; n++) {
        process_job *p = make_stages(n, run_rank);
        p->each_sees_one = n == 3;
        same_in_processes(p, IN_GPUS);
    }
    ranked_job one = {&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 1, 1, {}, {}, {}, run_scoring, {}, {}};
    run_job(&one);
    for (int n = FEWEST_PROCESSES; n <= MOST_PROCESSES; n++) {
        process_job *p = make_stages(n, run_scoring);
        on_processes(n, p->patience, run_process, p, NULL);
        check_meetings(&p->job, IN_GPUS);
        scores_the_same(&p->job, &one);
        munmap(p, sizeof *p);
    }
}

/* A link goes through the host's memory if one of its two stages cannot open the memory or the events of the other. All
   links do if a stage has LLM_CUDA_RANKS=host. */
static void test_pipeline_through_host(void **state) {
    (void)state;
    process_job *p;
#ifndef CUDA_HOST_ASAN /* these take minutes there */
    p = make_stages(3, run_rank);
    p->refusing = 1;
    same_in_processes(p, IN_HOST);
    p = make_stages(2, run_rank);
    p->ranks[1].ways = "host";
    same_in_processes(p, IN_HOST);
#endif
    ranked_job one = {&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 1, 1, {}, {}, {}, run_rank, {}, {}};
    run_job(&one);
    p = make_stages(3, run_rank);
    p->refusing = 2;
    on_processes(3, p->patience, run_process, p, NULL);
    assert_true(p->job.n_links[0] > 0 && p->job.n_links[0] == p->job.n_links[1]);
    for (int rank = 0; rank < 3; rank++) compare_findings(&p->job.found[rank], &one.found[0]);
    munmap(p, sizeof *p);
}

/* Rank 1 of a pipeline is killed, or hangs, while it scores its third batch. Meanwhile the others run ahead. */
enum { STAGE_IS_KILLED = 1, STAGE_HANGS };

typedef struct stage_end {
    int what, n_polls; /* the host is asked whether to cancel before each pass and after each layer */
    double last;       /* time of the last poll */
} stage_end;

static bool end_stage(void *user) {
    stage_end *end = (stage_end *)user;
    end->last = seconds_now();
    if (!end->what || ++end->n_polls < 9) return false;
    if (end->what == STAGE_IS_KILLED) raise(SIGKILL);
    sleep(6);
    end->what = 0;
    end->last = seconds_now();
    return false;
}

static void lose_stage(ranked_job *job, int rank, int what) {
    process_job *p = (process_job *)job;
    stage_end end = {rank == 1 ? what : 0, 0, 0};
    uint64_t hash;
    llm_error err;
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    llm_context *ctx = create_to_score(model, end_stage, &end);
    job->found[rank].refused = score_many(ctx, &hash, &err);
    p->seconds[rank] = seconds_now() - end.last;
    snprintf(p->ranks[rank].message, sizeof p->ranks[rank].message, "%s", err.message);
    llm_context_free(ctx);
    llm_model_free(model);
    cuda_host.n_live = 0; /* boxes that others may have opened are not freed */
}

static void kill_stage(ranked_job *job, int rank) { lose_stage(job, rank, STAGE_IS_KILLED); }
static void hang_stage(ranked_job *job, int rank) { lose_stage(job, rank, STAGE_HANGS); }

static void test_dead_stage(void **state) {
    (void)state;
    for (auto work : {kill_stage, hang_stage}) {
        process_job *p = make_stages(3, work);
        int statuses[4];
        on_processes(3, 3, run_process, p, statuses);
        check_meetings(&p->job, IN_GPUS);
        assert_int_equal(WIFSIGNALED(statuses[1]), work == kill_stage);
        for (int rank = 0; rank < 3; rank++) {
            if (rank == 1 && work == kill_stage) continue;
            assert_int_equal(statuses[rank], 0);
            assert_int_equal(p->job.found[rank].refused, LLM_ERROR_DEVICE);
            assert_non_null(strstr(p->ranks[rank].message, "rank 1"));
            assert_true(p->seconds[rank] < 10);
        }
        munmap(p, sizeof *p);
    }
}

/* Rank 1 is killed after five tokens of a text, during a burst. The other ranks' kernels wait for it. */
static bool leave_burst(void *user, llm_token, const char *, size_t) {
    double *left = (double *)user; /* [0]: tokens until the process is killed, 0: never; [1]: time of the last token */
    left[1] = seconds_now();
    if (left[0] > 0 && --left[0] == 0) raise(SIGKILL);
    return true;
}

static void lose_process(ranked_job *job, int rank) {
    process_job *p = (process_job *)job;
    llm_context *ctx = NULL;
    const llm_token tokens[3] = {};
    llm_generate_desc text = {};
    llm_error err;
    double left[2] = {rank == 1 ? 5.0 : 0, 0};
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    RANK_CHECK(llm_context_create(&ctx, model, NULL, &err) == LLM_OK, err.message);
    text.tokens = tokens;
    text.n_tokens = 3;
    text.max_tokens = 40;
    text.ignore_end = true;
    text.on_token = leave_burst;
    text.user = left;
    job->found[rank].refused = llm_generate(ctx, &text, NULL, &err);
    p->seconds[rank] = seconds_now() - left[1];
    RANK_CHECK(strstr(err.message, job->n_met[IN_NCCL] ? "another rank" : "rank 1"), err.message);
    RANK_CHECK((job->mode == LLM_CUDA_GRAPH) == (cuda_host.n_graph_launches > 0),
               "the ranks must wait in a graph exactly in graph mode");
    RANK_CHECK(llm_generate(ctx, &text, NULL, &err) == LLM_ERROR_DEVICE, "a pass after the failure must fail");
    llm_context_free(ctx);
    llm_model_free(model);
    cuda_host.n_live = 0; /* mailboxes that others may have opened are not freed */
}

/* Runs with less patience than usual: simulated streams only run while the host waits for them, so a rank first waits
   for the comm and then for its kernels. On a GPU it waits for both at the same time. */
static void dies_in_time(process_job *p, way expected) {
    int statuses[4];
    on_processes(3, 3, run_process, p, statuses);
    check_meetings(&p->job, expected);
    assert_true(WIFSIGNALED(statuses[1]));
    for (int rank = 0; rank < 3; rank += 2) {
        assert_int_equal(statuses[rank], 0);
        assert_int_equal(p->job.found[rank].refused, LLM_ERROR_DEVICE);
        assert_true(p->seconds[rank] < 10);
    }
    munmap(p, sizeof *p);
}

static void test_dead_process(void **state) {
    (void)state;
    dies_in_time(make_process_job(&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 3, lose_process), IN_GPUS);
}

/* ---- Ranks with NCCL ---- */

/* NCCL gives the same bits, for all types and modes. TINY_ODD's shares are unequal. Most shares of the other models are
   equal for two ranks, so NCCL gathers single rows. */
static void test_nccl(void **state) {
    (void)state;
    for (int n = FEWEST_PROCESSES; n <= MOST_PROCESSES; n++)
        same_in_processes(make_nccl_job(&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, n, run_rank), IN_NCCL);
#ifndef CUDA_HOST_ASAN
    same_in_processes(make_nccl_job(&USUAL_HEADS, LLM_CUDA_GRAPH, LLM_DTYPE_INT8, 2, run_rank), IN_NCCL);
    same_in_processes(make_nccl_job(&FOUR_BITS, LLM_CUDA_FUSED, LLM_DTYPE_INT4, 2, run_rank), IN_NCCL);
    same_in_processes(make_nccl_job(&HALVES, LLM_CUDA_GRAPH, LLM_DTYPE_F16, 3, run_rank), IN_NCCL);
    same_in_processes(make_nccl_job(&SMALL, LLM_CUDA_EAGER, LLM_DTYPE_BF16, 2, run_rank), IN_NCCL);
#endif
}

/* Ranks that are threads of a process with NCCL. Their passes are not recorded. */
static void run_threads(llm_comm *, void *arg) {
    process_job *p = (process_job *)arg;
    load_nccl(p, 0);
    setenv("LLM_CUDA_RANKS", "nccl", 1);
    run_job(&p->job);
}

static void test_nccl_threads(void **state) {
    ranked_job one = {&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 1, 1, {}, {}, {}, run_rank, {}, {}};
    process_job *p = make_nccl_job(&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, run_rank);
    (void)state;
    run_job(&one);
    on_processes(1, 8, run_threads, p, NULL);
    check_meetings(&p->job, IN_NCCL);
    for (int rank = 0; rank < 2; rank++) compare_findings(&p->job.found[rank], &one.found[0]);
    munmap(p, sizeof *p);
}

/* Computes logits in a context whose arrays have fewer rows than a recorded pass may have. */
static void run_few_rows(ranked_job *job, int rank) {
    findings *f = &job->found[rank];
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    llm_error err;
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    desc.n_ctx = 100;
    desc.n_batch = 5;
    desc.n_logits = 1;
    RANK_CHECK(llm_context_create(&ctx, model, &desc, &err) == LLM_OK, err.message);
    for (int i = 0; i < 12; i++) {
        llm_token tokens[5] = {1, 2, 3, 4, i};
        const int n = i % 3 ? 1 : 5;
        const llm_batch batch = {n, tokens, NULL, NULL};
        RANK_CHECK(llm_forward(ctx, &batch, &err) == LLM_OK, err.message);
        f->logits[0] = hash_logits(ctx, n - 1, f->logits[0]);
    }
    llm_context_free(ctx);
    llm_model_free(model);
}

static void test_nccl_few_rows(void **state) {
    ranked_job one = {&USUAL_HEADS, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 1, 1, {}, {}, {}, run_few_rows, {}, {}};
    process_job *p = make_nccl_job(&USUAL_HEADS, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, run_few_rows);
    (void)state;
    run_job(&one);
    on_processes(2, 8, run_process, p, NULL);
    for (int rank = 0; rank < 2; rank++) {
        assert_int_equal(p->job.found[rank].logits[0], one.found[0].logits[0]);
        assert_true(p->ranks[rank].n_gathered > 0 && p->ranks[rank].n_reduced > 0);
    }
    munmap(p, sizeof *p);
}

/* One rank cannot record a pass, so no rank may launch a graph. */
static void forbid_recording(ranked_job *job, int rank) {
    cuda_host.can_record = rank != 1;
    run_rank(job, rank);
    RANK_CHECK(cuda_host.n_graph_launches == 0, "a rank launched a graph that another rank lacks");
}

static void test_nccl_without_recording(void **state) {
    (void)state;
    same_in_processes(make_nccl_job(&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, forbid_recording), IN_NCCL);
}

/* If LLM_CUDA_RANKS is not set, NCCL is used if the GPUs cannot access each other's memory. If NCCL does not start on
   one rank, the host's memory is used. */
static void test_nccl_unasked(void **state) {
    process_job *p;
    (void)state;
    for (int bad = 0; bad < 4; bad++) {
        p = make_nccl_job(&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, run_rank);
        for (auto &r : p->ranks) r.ways = NULL;
        p->refusing = 1;
        if (bad == 1) p->ranks[1].version = 21499;
        if (bad == 2) p->ranks[0].refuses = true;
        if (bad == 3) p->ranks[1].refuses = true;
        if (bad == 3) p->patience = 2; /* the other rank waits four times as long for NCCL to start */
        same_in_processes(p, bad ? IN_HOST : IN_NCCL);
    }
    p = make_nccl_job(&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, run_rank);
    for (auto &r : p->ranks) r.ways = NULL;
    same_in_processes(p, IN_GPUS);
}

/* Creates a context and runs a pass. Keeps the status and the message. */
static void try_pass(ranked_job *job, int rank) {
    auto &r = ((process_job *)job)->ranks[rank];
    const llm_token tokens[3] = {};
    const llm_batch batch = {3, tokens, NULL, NULL};
    llm_context *ctx = NULL;
    llm_error err = {};
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    r.status = llm_context_create(&ctx, model, NULL, &err);
    if (!r.status) r.status = llm_forward(ctx, &batch, &err);
    memcpy(r.message, err.message, sizeof r.message);
    llm_context_free(ctx);
    llm_model_free(model);
}

/* If LLM_CUDA_RANKS requires a way that is impossible, all ranks get an error, and one message explains it. */
static void refused(process_job *p, llm_status status, const char *words) {
    on_processes(2, 8, run_process, p, NULL);
    bool told = false;
    for (int rank = 0; rank < 2; rank++) {
        assert_int_equal(p->ranks[rank].status, status);
        told = told || strstr(p->ranks[rank].message, words);
    }
    if (!told) fail_msg("\"%s\" and \"%s\"", p->ranks[0].message, p->ranks[1].message);
    munmap(p, sizeof *p);
}

static bool machine_has_nccl(void) {
    void *library = dlopen("libnccl.so.2", RTLD_LAZY | RTLD_LOCAL);
    if (library) dlclose(library);
    return library != NULL;
}

static void test_nccl_refusals(void **state) {
    static const struct {
        int version;
        const char *words;
    } versions[] = {{21299, "NCCL is too old: libnccl.so.2 is version 2.12, and 2.18 is needed"},
                    {2803, "NCCL is too old: libnccl.so.2 is version 2.8, and 2.18 is needed"},
                    {0, "NCCL cannot be loaded"}};
    auto make = [] { return make_nccl_job(&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, try_pass); };
    process_job *p;
    (void)state;
    for (const auto &v : versions) {
        if (v.version == 0 && machine_has_nccl()) continue;
        p = make();
        p->ranks[1].version = v.version;
        refused(p, LLM_ERROR_UNSUPPORTED, v.words);
        p = make();
        p->ranks[0].version = v.version;
        p->ranks[0].ways = NULL; /* only the other rank requires NCCL */
        refused(p, LLM_ERROR_UNSUPPORTED, v.words);
    }
    p = make();
    p->ranks[0].refuses = true;
    refused(p, LLM_ERROR_UNSUPPORTED, "NCCL does not start: a system error");
    p = make();
    p->ranks[1].breaks = true;
    refused(p, LLM_ERROR_UNSUPPORTED, "NCCL does not start: a failure");
    p = make();
    p->ranks[1].shares = true;
    refused(p, LLM_ERROR_UNSUPPORTED, "NCCL needs a GPU for each rank");
    p = make();
    p->ranks[1].ways = "fast";
    refused(p, LLM_ERROR_ARGUMENT, "LLM_CUDA_RANKS is \"fast\"; it may be host, peer or nccl");
    p = make();
    p->ranks[1].ways = "peer";
    refused(p, LLM_ERROR_ARGUMENT, "different values of LLM_CUDA_RANKS");
    p = make();
    p->refusing = 1;
    p->ranks[0].ways = p->ranks[1].ways = "peer";
    refused(p, LLM_ERROR_UNSUPPORTED, "LLM_CUDA_RANKS is peer, but");
}

static void test_nccl_dead_process(void **state) {
    (void)state;
    dies_in_time(make_nccl_job(&TINY_ODD, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 3, lose_process), IN_NCCL);
    dies_in_time(make_nccl_job(&TINY_ODD, LLM_CUDA_FUSED, LLM_DTYPE_BF16, 3, lose_process), IN_NCCL);
}

/* Runs passes until one fails. If NCCL does not fail, rank 1 makes a different call after the fourth pass. */
static void pass_until_failure(ranked_job *job, int rank) {
    process_job *p = (process_job *)job;
    auto &r = p->ranks[rank];
    const llm_token tokens[3] = {};
    llm_context *ctx = NULL;
    llm_generate_desc text = {};
    llm_error err = {};
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    RANK_CHECK(llm_context_create(&ctx, model, NULL, &err) == LLM_OK, err.message);
    text.tokens = tokens;
    text.n_tokens = 3;
    text.max_tokens = 20;
    text.ignore_end = true;
    for (int i = 0; i < 20 && !r.status; i++) {
        const llm_batch batch = {3, tokens, NULL, NULL};
        double start = seconds_now();
        if (i == 4 && rank == 1 && !r.fails) r.status = llm_generate(ctx, &text, NULL, &err);
        else r.status = llm_forward(ctx, &batch, &err);
        p->seconds[rank] = seconds_now() - start;
    }
    memcpy(r.message, err.message, sizeof r.message);
    RANK_CHECK(llm_forward(ctx, NULL, &err), "a pass after the failure must fail");
    llm_context_free(ctx);
    llm_model_free(model);
    if (job->n_met[IN_GPUS]) cuda_host.n_live = 0; /* mailboxes that others may have opened are not freed */
}

static void test_nccl_failures(void **state) {
    (void)state;
    for (bool fails : {false, true}) {
        process_job *p = make_nccl_job(&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, pass_until_failure);
        p->ranks[1].fails = fails;
        on_processes(2, 3, run_process, p, NULL);
        for (int rank = 0; rank < 2; rank++) {
            assert_int_equal(p->ranks[rank].status, LLM_ERROR_DEVICE);
            assert_true(p->seconds[rank] < 10);
        }
        if (fails) assert_non_null(strstr(p->ranks[1].message, "NCCL failed on rank 1: a system error"));
        munmap(p, sizeof *p);
    }
}

/* Ranks that meet in the GPUs' memory or in the host's, and of which one makes a different call. */
static void test_different_calls(void **state) {
    (void)state;
    for (way expected : {IN_GPUS, IN_HOST}) {
        process_job *p = make_process_job(&SMALL, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, pass_until_failure);
        if (expected == IN_HOST) p->refusing = 1;
        on_processes(2, 3, run_process, p, NULL);
        check_meetings(&p->job, expected);
        for (int rank = 0; rank < 2; rank++) {
            assert_int_equal(p->ranks[rank].status, LLM_ERROR_DEVICE);
            assert_true(p->seconds[rank] < 10);
        }
        munmap(p, sizeof *p);
    }
}

/* A process can only use another process's memory after it has opened it, and not after it has closed it. */
static void use_foreign_memory(llm_comm *comm, void *arg) {
    cudaIpcMemHandle_t *handle = (cudaIpcMemHandle_t *)arg;
    void *own = NULL, *there = NULL;
    cudaStream_t stream = NULL;
    unsigned flags = 0;
    const llm_exchange nothing = {NULL, 0, 0, 0, 0, comm->size, NULL, 0};
    cuda_host.has_ipc = true;
    cuda_host.n_devices = 2;
    cuda_host_device = comm->rank;
    RANK_CHECK(cudaMalloc(&own, 64) == cudaSuccess && cudaStreamCreateWithFlags(&stream, 1) == cudaSuccess, "memory");
    if (comm->rank == 0) {
        RANK_CHECK(cudaIpcGetMemHandle(handle, own) == cudaSuccess, "a handle");
        RANK_CHECK(cudaIpcOpenMemHandle(&there, *handle, 1) != cudaSuccess, "a process opens its own memory");
    }
    comm->exchange(comm, &nothing, &flags, NULL);
    if (comm->rank == 1) {
        int sent = 42;
        RANK_CHECK(cudaIpcOpenMemHandle(&there, *handle, 0) != cudaSuccess, "memory of another device needs access");
        RANK_CHECK(cudaIpcOpenMemHandle(&there, *handle, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess, "opening");
        RANK_CHECK(cudaMemcpyAsync(there, &sent, 4, cudaMemcpyHostToDevice, stream) == cudaSuccess, "copying");
        RANK_CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "copying");
    }
    comm->exchange(comm, &nothing, &flags, NULL);
    cuda_host.keeps_faults = true;
    if (comm->rank == 0) {
        RANK_CHECK(*(int *)own == 42, "the memory has the wrong contents");
        cudaFree(own);
        RANK_CHECK(cuda_host.faults.size() == 1, "freeing open memory must be a fault");
    }
    comm->exchange(comm, &nothing, &flags, NULL);
    if (comm->rank == 1) {
        RANK_CHECK(cudaIpcCloseMemHandle(there) == cudaSuccess, "closing");
        RANK_CHECK(cudaIpcCloseMemHandle(there) != cudaSuccess, "closing twice");
        RANK_CHECK(cudaIpcOpenMemHandle(&there, *handle, 1) != cudaSuccess, "freed memory cannot be opened");
    }
    cudaStreamDestroy(stream);
}

/* The same for events and for copies between devices. */
static void use_foreign_events(llm_comm *comm, void *arg) {
    struct handles {
        cudaIpcEventHandle_t event;
        cudaIpcMemHandle_t memory;
    } *shared = (handles *)arg;
    void *own[2] = {NULL, NULL}, *there = NULL;
    cudaStream_t stream = NULL;
    cudaEvent_t event = NULL, plain = NULL;
    unsigned flags = 0;
    int sent = 42;
    const unsigned kind = cudaEventDisableTiming | cudaEventInterprocess;
    const llm_exchange nothing = {NULL, 0, 0, 0, 0, comm->size, NULL, 0};
    RANK_CHECK(cudaEventCreateWithFlags(&event, kind) != cudaSuccess, "this needs support for handles");
    cuda_host.has_ipc = true;
    cuda_host.n_devices = 2;
    cuda_host_device = 1 - comm->rank;
    RANK_CHECK(cudaMalloc(&own[1 - comm->rank], 64) == cudaSuccess, "memory");
    cuda_host_device = comm->rank;
    RANK_CHECK(cudaMalloc(&own[comm->rank], 64) == cudaSuccess, "memory");
    RANK_CHECK(cudaStreamCreateWithFlags(&stream, 1) == cudaSuccess, "a stream");
    RANK_CHECK(cudaMemcpyPeerAsync(own[1], 1, own[0], 0, 4, stream) != cudaSuccess, "a copy needs access");
    RANK_CHECK(cudaDeviceEnablePeerAccess(1 - comm->rank, 0) == cudaSuccess, "access");
    RANK_CHECK(cudaMemcpyPeerAsync(own[1], 0, own[0], 0, 4, stream) != cudaSuccess, "the wrong device");
    RANK_CHECK(cudaMemcpyPeerAsync(own[1], 1, &sent, 0, 4, stream) != cudaSuccess, "memory of the host");
    RANK_CHECK(cudaMemcpyPeerAsync(own[1], 1, own[0], 0, 65, stream) != cudaSuccess, "too many bytes");
    RANK_CHECK(cudaMemcpyPeerAsync(own[1], 1, own[0], 0, 64, stream) == cudaSuccess, "a copy");
    RANK_CHECK(cudaEventCreateWithFlags(&plain, cudaEventInterprocess) != cudaSuccess, "an event with a time");
    RANK_CHECK(cudaEventCreateWithFlags(&plain, cudaEventDisableTiming) == cudaSuccess, "an event");
    if (comm->rank == 0) {
        RANK_CHECK(cudaEventCreateWithFlags(&event, kind) == cudaSuccess, "an event");
        RANK_CHECK(cudaIpcGetEventHandle(&shared->event, plain) != cudaSuccess, "an event without a handle");
        RANK_CHECK(cudaIpcGetEventHandle(&shared->event, event) == cudaSuccess, "a handle");
        RANK_CHECK(cudaIpcGetMemHandle(&shared->memory, own[0]) == cudaSuccess, "a handle");
        RANK_CHECK(cudaIpcOpenEventHandle(&plain, shared->event) != cudaSuccess, "a process opens its own event");
        cudaMemsetAsync(own[0], 0, 64, stream);
        RANK_CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "clearing");
    }
    comm->exchange(comm, &nothing, &flags, NULL);
    if (comm->rank == 1) {
        RANK_CHECK(cudaIpcOpenMemHandle(&there, shared->memory, cudaIpcMemLazyEnablePeerAccess) == cudaSuccess,
                   "opening memory");
        RANK_CHECK(cudaIpcOpenEventHandle(&event, shared->event) == cudaSuccess, "opening an event");
        RANK_CHECK(cudaEventQuery(event) == cudaSuccess, "an event that was not recorded has come");
        RANK_CHECK(cudaEventRecord(event, stream) != cudaSuccess, "an event of another process is recorded");
    }
    comm->exchange(comm, &nothing, &flags, NULL);
    if (comm->rank == 0) {
        cudaMemcpyAsync(own[0], &sent, 4, cudaMemcpyHostToDevice, stream);
        RANK_CHECK(cudaEventRecord(event, stream) == cudaSuccess, "recording");
    }
    comm->exchange(comm, &nothing, &flags, NULL);
    if (comm->rank == 1) {
        int seen = 0;
        RANK_CHECK(cudaStreamWaitEvent(stream, event) == cudaSuccess, "waiting");
        RANK_CHECK(cudaMemcpyAsync(&seen, there, 4, cudaMemcpyDeviceToHost, stream) == cudaSuccess, "reading");
        RANK_CHECK(cudaStreamSynchronize(stream) == cudaSuccess && seen == 42, "the copy came before the event");
        RANK_CHECK(cudaEventQuery(event) == cudaSuccess, "the event has come");
        RANK_CHECK(cudaIpcCloseMemHandle(there) == cudaSuccess, "closing");
    }
    comm->exchange(comm, &nothing, &flags, NULL);
    if (event) cudaEventDestroy(event);
    cudaEventDestroy(plain);
    cudaStreamDestroy(stream);
    for (void *memory : own) cudaFree(memory);
    RANK_CHECK(cuda_host.n_live == 0, "something was not freed");
}

static void test_foreign_memory(void **state) {
    void *handle = shared_by_processes(4096);
    (void)state;
    on_processes(2, 8, use_foreign_memory, handle, NULL);
    on_processes(2, 8, use_foreign_events, handle, NULL);
    munmap(handle, 4096);
}

static void await_ranks(llm_comm *others) {
    unsigned flags = 0;
    const llm_exchange nothing = {NULL, 0, 0, 0, 0, others->size, NULL, 0};
    RANK_CHECK(others->exchange(others, &nothing, &flags, NULL) == LLM_OK, "no answer");
}

static void compare_memory(ranked_job *job, int rank) {
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    llm_memory memory;
    llm_error err;
    llm_model *model = load_rank(job, rank, &err);
    RANK_CHECK(model, err.message);
    llm_model_info info = llm_model_get_info(model);
    desc.n_ctx = 100;
    desc.n_batch = RANK_BATCH;
    RANK_CHECK(llm_memory_estimate(&info, &desc, &memory, &err) == LLM_OK, err.message);
    llm_comm *others = job->n_shards > 1 ? job->tensor[rank] : job->pipeline[rank];
    await_ranks(others);
    size_t before = cuda_host.n_bytes;
    await_ranks(others);
    RANK_CHECK(llm_context_create(&ctx, model, &desc, &err) == LLM_OK, err.message);
    await_ranks(others);
    size_t used = (cuda_host.n_bytes - before) / (size_t)(job->n_shards * job->n_stages),
           host = (size_t)info.n_vocab * 8, told = (size_t)(memory.cache + memory.scratch);
    RANK_CHECK(used <= told && told <= used + used / 4 + host + 8192, "the estimate is wrong");
    await_ranks(others);
    llm_context_free(ctx);
    llm_model_free(model);
}

/* The memory estimate includes the buffers for exchanges between ranks, and for messages between stages. */
static void test_rank_memory(void **state) {
    ranked_job job = {&USUAL_HEADS, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 2, 1, {}, {}, {}, compare_memory, {}, {}};
    (void)state;
    run_job(&job);
    job = {&DEEP, LLM_CUDA_GRAPH, LLM_DTYPE_BF16, 1, 3, {}, {}, {}, compare_memory, {}, {}};
    run_job(&job);
}

/* Any allocation on the host may fail while a model and a context are created. */
static llm_status make_and_free(void *job, llm_error *err) {
    llm_model_desc desc = {};
    llm_context_desc context_desc = {};
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    size_t size;
    uint8_t *data = tiny_model(&SMALL, &size);
    desc.backend = llm_cuda_backend();
    desc.n_threads = 2;
    desc.host = heap_host((heap *)job);
    context_desc.n_ctx = 64;
    context_desc.n_batch = 16;
    llm_status status = llm_model_load_memory(&model, data, size, &desc, err);
    if (!status) status = llm_context_create(&ctx, model, &context_desc, err);
    llm_context_free(ctx);
    llm_model_free(model);
    free(data);
    assert_int_equal(cuda_host.n_live, 0);
    return status;
}

static void test_host_out_of_memory(void **state) {
    heap h = {};
    (void)state;
    starve(&h, make_and_free, &h, 7, "a model on the GPU");
}

/* Counts the launches per token of a model with two layers. bench/README.md uses these numbers. */
static void test_launches(void **state) {
    static const int expected[][2] = {{0, 1}, {1 + 2 * 5 + 1, 0}, {1 + 2 * 9 + 3, 0}}; /* kernels, graphs */
    (void)state;
    for (int mode = LLM_CUDA_GRAPH; mode <= LLM_CUDA_EAGER; mode++) {
        llm_model *model = load(&TINY_ODD, llm_cuda_backend_mode((llm_cuda_mode)mode));
        llm_context *ctx = create_for_text(model, 100);
        llm_token token = 3;
        llm_batch batch = {1, &token, NULL, NULL};
        for (int i = 0; i < 2; i++)
            assert_int_equal(llm_forward(ctx, &batch, NULL), LLM_OK); /* loads kernels, then records them */
        cuda_host.n_launches = cuda_host.n_graph_launches = 0;
        assert_int_equal(llm_forward(ctx, &batch, NULL), LLM_OK);
        assert_int_equal(cuda_host.n_launches, expected[mode][0]);
        assert_int_equal(cuda_host.n_graph_launches, expected[mode][1]);
        llm_generate_desc desc = {};
        desc.tokens = &token;
        desc.n_tokens = 1;
        desc.max_tokens = 20; /* one burst */
        desc.ignore_end = true;
        assert_int_equal(llm_generate(ctx, &desc, NULL, NULL), LLM_OK); /* loads or records the remaining kernels */
        cuda_host.n_launches = cuda_host.n_graph_launches = 0;
        assert_int_equal(llm_generate(ctx, &desc, NULL, NULL), LLM_OK);
        if (mode == LLM_CUDA_GRAPH) assert_int_equal(cuda_host.n_launches, 1); /* picks the first token */
        if (mode == LLM_CUDA_GRAPH) assert_int_equal(cuda_host.n_graph_launches, 20);
        close_context(ctx);
    }
}

static void test_no_gpu(void **state) {
    llm_error err;
    (void)state;
    cuda_host.n_devices = 0;
    assert_null(load_as(&TINY_ODD, llm_cuda_backend(), LLM_DTYPE_BF16, &err));
    assert_int_equal(err.code, LLM_ERROR_DEVICE);
    assert_non_null(strstr(err.message, "no GPU"));
    cuda_host.n_devices = 1;
    cuda_host.major = 7;
    assert_null(load_as(&TINY_ODD, llm_cuda_backend(), LLM_DTYPE_BF16, &err));
    assert_int_equal(err.code, LLM_ERROR_UNSUPPORTED);
    cuda_host.major = 9;
    assert_int_equal(cuda_host.n_live, 0);
}

/* A model stays on the GPU that was the thread's current device when it was loaded. */
static void test_other_device(void **state) {
    (void)state;
    llm_context *ctx = create(load(&TINY_ODD, llm_cuda_backend()));
    uint64_t expected = in_company(ctx, 2);
    close_context(ctx);
    cuda_host.n_devices = 2;
    cuda_host_device = 1;
    llm_model *model = load(&TINY_ODD, llm_cuda_backend());
    cuda_host_device = 0;
    ctx = create(model);
    assert_int_equal(in_company(ctx, 2), expected);
    size_t size = llm_seq_save_size(ctx, 2);
    std::vector<uint8_t> buffer(size);
    assert_int_equal(llm_seq_save(ctx, 2, buffer.data(), size, NULL), LLM_OK);
    assert_int_equal(llm_seq_restore(ctx, 1, buffer.data(), size, NULL), LLM_OK);
    assert_true(llm_measure_bandwidth(ctx) > 0);
    close_context(ctx);
    assert_int_equal(cuda_host_device, 0);
    cudaStream_t stream = NULL; /* device 0 cannot access memory of device 1 */
    void *there = NULL;
    assert_int_equal(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
    cuda_host_device = 1;
    assert_int_equal(cudaMalloc(&there, 64), cudaSuccess);
    cuda_host_device = 0;
    assert_int_equal(cudaMemcpyAsync(there, buffer.data(), 64, cudaMemcpyHostToDevice, stream), cudaErrorInvalidValue);
    cudaStreamDestroy(stream);
    cudaFree(there);
    assert_int_equal(cuda_host.n_live, 0);
    cuda_host.n_devices = 1;
}

/* A chip with too little shared memory for the inputs of products computes the same bits. It has the minimum of shared
   memory with which kernels can be launched. */
static void test_little_shared_memory(void **state) {
    (void)state;
    for (llm_dtype dtype : {LLM_DTYPE_BF16, LLM_DTYPE_INT4}) {
        llm_token token = 3;
        llm_batch batch = {1, &token, NULL, NULL};
        const int enough = cuda_host.shared_bytes;
        uint64_t hashes[2] = {0, 0};
        for (int i = 0; i < 2; i++) {
            if (i) cuda_host.shared_bytes = 48 << 10;
            llm_status status = LLM_OK;
            do {
                llm_context *ctx = create(load(&TINY_ODD, llm_cuda_backend(), dtype));
                status = llm_forward(ctx, &batch, NULL);
                if (!status) hashes[i] = in_company(ctx, 4);
                close_context(ctx);
                cuda_host.shared_bytes += 64;
            } while (status && cuda_host.shared_bytes < enough);
            assert_int_equal(status, LLM_OK);
        }
        assert_true(cuda_host.shared_bytes < 80 << 10);
        cuda_host.shared_bytes = enough;
        assert_int_equal(hashes[1], hashes[0]);
    }
}

/* Kernels only overlap if both the chip and the compiled code support it: code for older chips does not wait for the
   previous kernel. */
static void test_overlap(void **state) {
    static const struct {
        int major, ptx;
        bool overlaps;
    } chips[] = {{9, 90, true}, {9, 80, false}, {8, 80, false}, {10, 90, true}};
    (void)state;
    for (const auto &chip : chips) {
        llm_token token = 3;
        llm_batch batch = {1, &token, NULL, NULL};
        cuda_host.major = chip.major;
        cuda_host.ptx_version = chip.ptx;
        llm_context *ctx = create(load(&SMALL, llm_cuda_backend()));
        cuda_host.n_overlapping = 0;
        assert_int_equal(llm_forward(ctx, &batch, NULL), LLM_OK);
        assert_int_equal(cuda_host.n_overlapping > 0, chip.overlaps);
        close_context(ctx);
    }
    cuda_host.major = 9;
    cuda_host.ptx_version = 90;
}

static void keep_line(void *user, const char *line) { *(std::string *)user += line; }

/* If passes cannot be recorded, kernels are launched one by one, and the log says so. */
static void test_no_recording(void **state) {
    llm_model_desc desc = {};
    llm_model *model = NULL;
    std::string log;
    llm_error err;
    (void)state;
    desc.dtype = LLM_DTYPE_BF16;
    desc.backend = llm_cuda_backend();
    desc.n_threads = 2;
    llm_context *ctx = create(load(&TINY_ODD, llm_cuda_backend_mode(LLM_CUDA_FUSED)));
    uint64_t expected = in_company(ctx, 2);
    close_context(ctx);
    desc.host.log = keep_line;
    desc.host.user = &log;
    try_tiny(&model, &TINY_ODD, desc, &err);
    assert_non_null(model);
    cuda_host.can_record = false;
    cuda_host.n_graph_launches = 0;
    ctx = create(model);
    assert_int_equal(in_company(ctx, 2), expected);
    assert_int_equal(cuda_host.n_graph_launches, 0);
    assert_non_null(strstr(log.c_str(), "one by one"));
    cuda_host.can_record = true;
    close_context(ctx);
}

/* Runs a prefill (0), decoding (1), a burst (2) or scoring (3). */
static llm_status work(llm_context *ctx, int what, llm_error *err) {
    static const llm_token tokens[20] = {};
    static const llm_token *const endings[] = {tokens + 10};
    static const int n_ending[] = {10};
    static const llm_question question = {tokens, 10, 1, endings, n_ending};
    const llm_batch batch = {what == 0 ? 20 : 1, tokens, NULL, NULL};
    double log_likelihood;
    llm_generate_desc text = {};
    if (what < 2) return llm_forward(ctx, &batch, err);
    if (what == 3) return llm_score(ctx, &question, 1, NULL, &log_likelihood, NULL, err);
    text.tokens = tokens;
    text.n_tokens = 20;
    text.max_tokens = 8;
    text.ignore_end = true;
    return llm_generate(ctx, &text, NULL, err);
}

/* Uses a model and a context while the n-th CUDA call fails. Work that fails is done again, which must succeed, and
   then ends. Returns the status of the failure. */
static llm_status a_life(int n, bool *failed, llm_error *err) {
    llm_context_desc desc = {};
    llm_context *ctx = NULL;
    desc.n_ctx = 64;
    desc.n_batch = 20;
    cuda_host.fail_at = n;
    llm_model *model = load_as(&SMALL, llm_cuda_backend(), LLM_DTYPE_BF16, err);
    llm_status status = model ? llm_context_create(&ctx, model, &desc, err) : err->code;
    for (int what = 0; what < 4 && !status; what++) {
        status = work(ctx, what, err);
        if (status) assert_int_equal(work(ctx, what, NULL), LLM_OK);
    }
    *failed = cuda_host.fail_at == 0;
    cuda_host.fail_at = 0;
    llm_context_free(ctx);
    llm_model_free(model);
    return status;
}

/* Whichever call fails, there is an error message and no leak. */
static void test_every_failure(void **state) {
    bool failed = true;
    int n;
    (void)state;
    for (n = 1; failed; n++) {
        llm_error err = {};
        llm_status status = a_life(n, &failed, &err);
        assert_int_equal(cuda_host.n_live, 0);
        bool told = failed && !cuda_host.failed_recording; /* failing to record is not an error */
        assert_int_equal(status != LLM_OK, told);
        assert_int_equal(err.message[0] != 0, told);
    }
    assert_true(n > 70);
}
#endif

int main(int argc, char **argv) {
    const struct CMUnitTest tests[] = {
#ifdef CUDA_HOST_RUNTIME_H /* these fork, so they run first, while the process is small */
        cmocka_unit_test(test_processes),
        cmocka_unit_test(test_processes_through_host),
        cmocka_unit_test(test_dead_process),
        cmocka_unit_test(test_pipeline_processes),
        cmocka_unit_test(test_pipeline_through_host),
        cmocka_unit_test(test_dead_stage),
        cmocka_unit_test(test_nccl),
        cmocka_unit_test(test_nccl_threads),
        cmocka_unit_test(test_nccl_few_rows),
        cmocka_unit_test(test_nccl_without_recording),
        cmocka_unit_test(test_nccl_unasked),
        cmocka_unit_test(test_nccl_refusals),
        cmocka_unit_test(test_nccl_dead_process),
        cmocka_unit_test(test_nccl_failures),
        cmocka_unit_test(test_different_calls),
#endif
        cmocka_unit_test(test_eager),
        cmocka_unit_test(test_fused),
        cmocka_unit_test(test_halves),
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_architectures),
        cmocka_unit_test(test_graph),
        cmocka_unit_test(test_rows_do_not_meet),
        cmocka_unit_test(test_2_4),
        cmocka_unit_test(test_long_text),
        cmocka_unit_test(test_save_and_restore),
        cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_bursts),
        cmocka_unit_test(test_nan),
        cmocka_unit_test(test_bursts_of_all_modes),
        cmocka_unit_test(test_masks_and_grammars),
        cmocka_unit_test(test_scores),
        cmocka_unit_test(test_scores_against_logits),
        cmocka_unit_test(test_limits_are_measured),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_ranks),
        cmocka_unit_test(test_ranks_through_host),
        cmocka_unit_test(test_pipeline),
        cmocka_unit_test(test_dead_rank),
#ifdef CUDA_HOST_RUNTIME_H
        cmocka_unit_test(test_dead_gpu),
        cmocka_unit_test(test_foreign_memory),
        cmocka_unit_test(test_rank_memory),
        cmocka_unit_test(test_launches),
        cmocka_unit_test(test_other_device),
        cmocka_unit_test(test_little_shared_memory),
        cmocka_unit_test(test_overlap),
        cmocka_unit_test(test_no_recording),
        cmocka_unit_test(test_host_out_of_memory),
        cmocka_unit_test(test_no_gpu),
        cmocka_unit_test(test_every_failure),
#endif
    };
    if (argc > 1 && !strcmp(argv[1], "--list")) {
        for (const CMUnitTest &test : tests) puts(test.name);
        return 0;
    }
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
