/*  gpu.cpp - measures the speed of llm_cuda.cu, on models of well-known shapes with random weights.

        bench SHAPE TYPE MODE      limits, decoding and prefill
        bench --why SHAPE TYPE     decoding without some optimisations, and the time of each kind of kernel
        bench --few SHAPE TYPE     a few passes, kernel by kernel, for a profiler
        bench --hellaswag SHAPE MODEL TEXTS [QUESTIONS]    scoring HellaSwag's texts, with MODEL's tokenizer
        bench --ranks N SHAPE TYPE decoding by N GPUs in tensor parallel, and without their meetings
        bench --stages N SHAPE MODEL TEXTS TRACE [QUESTIONS]  the same as --hellaswag by a pipeline of N GPUs; appends
                                   the waits of each stage to the file TRACE, for bench/gantt.py
        bench --gpus               prints the number of GPUs
        bench --same MODEL TYPE    compares a real model's text on the GPU and on the CPU
        bench --device             describes the GPU
        bench --help               lists the shapes

    TYPE is bf16, f16, int8, int4, bf16-2:4 or int8-2:4; MODE is graph, fused or eager. With 2:4, two of each four
    weights of the layers are zero, but none of the embedding, which is also the head.

    It calls the backend directly, so models need no files. Each line is one measurement: model, weights, mode, what,
    the rate per second, and its share of the limit measured on the same GPU. The limit of decoding is the bandwidth of
    reading the weights (MBU); that of prefill and scoring is cuBLAS's rate on the widest matrix (MFU). bench/gpu.sh
    builds and runs this program. */
#define LLM_CUDA
#define LLM_IMPLEMENTATION
#include "llm.h"

#include "examples/ranks.h"

#include <chrono>
#include <cuda_runtime.h>
#include <fstream>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <thread>
#include <vector>

typedef struct shape {
    const char *name;
    int n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_vocab, n_ctx;
} shape;

static const shape SHAPES[] = {
    {"Llama-2-7B", 32, 4096, 11008, 32, 32, 128, 32000, 8320},
    {"Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 8320},
    {"TinyLlama-1.1B", 22, 2048, 5632, 32, 4, 64, 32000, 8320},
    {"SmolLM2-135M", 30, 576, 1536, 9, 3, 64, 49152, 8320},
    {"Llama-2-70B", 80, 8192, 28672, 64, 8, 128, 32000, 1088}, /* for --ranks */
    {"LLaMA-33B", 60, 6656, 17920, 52, 52, 128, 32000, 8320},  /* for --hellaswag, --stages */
    {"smallest", 5, 64, 96, 4, 2, 16, 300, 320},               /* to try this program without a GPU */
};

typedef struct weight_type {
    const char *name;
    llm_dtype dtype;
    bool is_2_4;
} weight_type;

static const weight_type TYPES[] = {{"bf16", LLM_DTYPE_BF16, false},    {"f16", LLM_DTYPE_F16, false},
                                    {"int8", LLM_DTYPE_INT8, false},    {"int4", LLM_DTYPE_INT4, false},
                                    {"bf16-2:4", LLM_DTYPE_BF16, true}, {"int8-2:4", LLM_DTYPE_INT8, true}};

enum { PROMPT = 6, DEEP = 3800, NEW_TOKENS = 200, SOME_TOKENS = 64, SOME_PROMPT = 2048 };

/* llm_cuda.cu has these functions only for this program. */
LLM_API void llm__cuda_vary(void *context, bool overlap, unsigned kinds);
LLM_API const char *llm__cuda_kind(void *context, int kind, int *n_kernels, double *bytes);

typedef struct bench {
    const shape *s;
    llm_backend_shape llm;
    const llm_backend *backend;
    void *model, *context;
    const weight_type *type;
    const char *mode;
    double weight_bytes, bandwidth, flops;
    std::vector<int> table, positions, seqs, logit_rows;
    std::vector<llm_token> tokens;
    std::vector<double> frequencies;
    llm_comm *tensor, *pipeline; /* NULL: one GPU has whole layers; all layers */
} bench;

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

static void check(llm_status status, const llm_error *err) {
    if (!status) return;
    fprintf(stderr, "gpu: %s\n", err->message);
    exit(1);
}

/* Fills a row with numbers of about the right size, which is fast: each row is a different window of a short list.
   With 2:4, two of each four numbers are zero. */
static void random_row(const llm_backend_weight *weight, int row, float *out) {
    unsigned x = (unsigned)row * 2654435761u + (unsigned)weight->kind * 40503u + 12345u;
    for (int i = 0; i < weight->cols; i++) {
        x = x * 1664525u + 1013904223u;
        out[i] = weight->rows == 1 ? 1.0f : (float)(int)x * (0.03f / 2147483648.0f);
    }
    for (int i = 0; weight->is_2_4 && i + 4 <= weight->cols; i += 4) {
        static const unsigned char places[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
        x = x * 1664525u + 1013904223u;
        for (unsigned char place : places[(x >> 16) % 6]) out[i + place] = 0;
    }
}

/* There are no raw rows, so int4 makes its groups from the numbers above. */
static const void *no_raw_row(const llm_backend_weight *, int, int *type) {
    *type = 0; /* F32 */
    return NULL;
}

static void upload(bench *b, llm_backend_weight_kind kind, int layer, int rows, int cols) {
    llm_backend_weight w = {};
    llm_error err;
    w.kind = kind;
    w.layer = layer;
    w.rows = rows;
    w.cols = cols;
    w.read_row = random_row;
    w.raw_row = no_raw_row;
    w.is_2_4 = b->type->is_2_4 && rows > 1 && kind != LLM_WEIGHT_EMBEDDING;
    if (rows > 1)
        b->weight_bytes += (double)b->backend->weight_bytes(b->type->dtype, &w); /* the embedding is the head */
    check(b->backend->upload(b->model, &w, &err), &err);
}

static void upload_all(bench *b) {
    const shape *s = b->s;
    const llm_backend_ranks own = llm_backend_find_ranks(&b->llm, b->tensor, b->pipeline);
    int q = own.heads.n * s->head_dim, kv = own.key_heads.n * s->head_dim;
    bool is_first = !b->pipeline || b->pipeline->rank == 0,
         is_last = !b->pipeline || b->pipeline->rank == b->pipeline->size - 1;
    if (is_first || is_last) upload(b, LLM_WEIGHT_EMBEDDING, 0, own.vocab.n, s->n_embd);
    for (int i = 0; i < own.layers.n; i++) {
        upload(b, LLM_WEIGHT_ATTENTION_NORM, i, 1, s->n_embd);
        upload(b, LLM_WEIGHT_QKV, i, q + 2 * kv, s->n_embd);
        upload(b, LLM_WEIGHT_ATTENTION_OUT, i, own.embd.n, s->n_heads * s->head_dim);
        upload(b, LLM_WEIGHT_FFN_NORM, i, 1, s->n_embd);
        upload(b, LLM_WEIGHT_GATE_UP, i, 2 * own.ff.n, s->n_embd);
        upload(b, LLM_WEIGHT_DOWN, i, own.embd.n, s->n_ff);
    }
    if (is_last) upload(b, LLM_WEIGHT_OUTPUT_NORM, 0, 1, s->n_embd);
}

static void open_model(bench *b) {
    const shape *s = b->s;
    llm_backend_shape &shape = b->llm;
    llm_model_desc desc = {};
    llm_error err;
    shape.n_vocab = s->n_vocab;
    shape.n_layers = s->n_layers;
    shape.n_embd = s->n_embd;
    shape.n_ff = s->n_ff;
    shape.n_heads = s->n_heads;
    shape.n_kv_heads = s->n_kv_heads;
    shape.head_dim = shape.rope_dim = s->head_dim;
    shape.rms_eps = 1e-5f;
    shape.rope_scale = 1;
    shape.tied_head = true;
    b->frequencies.assign((size_t)s->head_dim / 2, 0.01);
    shape.rope_frequencies = b->frequencies.data();
    desc.dtype = b->type->dtype;
    int n_ranks = b->tensor ? b->tensor->size : b->pipeline ? b->pipeline->size : 1;
    desc.n_threads = n_ranks < 16 ? 16 / n_ranks : 1;
    desc.tensor = b->tensor;
    desc.pipeline = b->pipeline;
    check(b->backend->open(&b->model, &shape, &desc, &err), &err);
    upload_all(b);
}

/* Fills the whole cache with keys and values of about the right size. */
static void fill_cache(bench *b, const llm_backend_shape *shape, int n_blocks) {
    std::vector<uint16_t> block((size_t)b->backend->block_bytes(shape, LLM_DTYPE_BF16) / 2);
    llm_error err;
    unsigned x = 1;
    for (uint16_t &number : block) {
        x = x * 1664525u + 1013904223u;
        number = (uint16_t)((x >> 16 & 0x80FF) | 0x3E80); /* 0.25 to 1, either sign, in bf16 */
    }
    for (int i = 0; i < n_blocks; i++) check(b->backend->write_block(b->context, i, block.data(), &err), &err);
}

static void open_context(bench *b) {
    llm_backend_desc desc = {};
    llm_error err;
    int blocks = b->s->n_ctx / LLM_CACHE_BLOCK, n_batch = b->s->n_ctx < 2048 ? b->s->n_ctx : 2048;
    desc.n_seq = 1;
    desc.blocks_per_seq = desc.n_cache_blocks = blocks;
    desc.n_batch = n_batch;
    desc.n_logits = 1;
    desc.cache_dtype = LLM_DTYPE_BF16;
    desc.tensor = b->tensor;
    check(b->backend->context_create(&b->context, b->model, &desc, &err), &err);
    b->table.resize((size_t)blocks);
    for (int i = 0; i < blocks; i++) b->table[(size_t)i] = i;
    b->positions.resize((size_t)n_batch);
    b->seqs.assign((size_t)n_batch, 0);
    b->tokens.resize((size_t)n_batch);
    fill_cache(b, &b->llm, blocks);
}

/* Returns the data sheet's GB/s: two transfers per clock. */
static double sheet_bandwidth() {
    int device = 0, khz = 0, bits = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&khz, cudaDevAttrMemoryClockRate, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device) != cudaSuccess)
        return 0;
    return 2e3 * khz * bits / 8 / 1e9;
}

static void forward(bench *b, int from, int n) {
    llm_backend_pass pass = {};
    llm_error err;
    int last = n - 1;
    for (int i = 0; i < n; i++) {
        b->positions[(size_t)i] = from + i;
        if (i) b->tokens[(size_t)i] = (from + i) * 7 % b->s->n_vocab;
    }
    pass.n_rows = n;
    pass.tokens = b->tokens.data();
    pass.positions = b->positions.data();
    pass.seqs = b->seqs.data();
    pass.n_logits = 1;
    pass.logit_rows = &last;
    pass.blocks = b->table.data();
    pass.blocks_per_seq = (int)b->table.size();
    check(b->backend->forward(b->context, &pass, &err), &err);
}

static void prefill(bench *b, int n) {
    for (int from = 0; from < n; from += (int)b->tokens.size())
        forward(b, from, n - from < (int)b->tokens.size() ? n - from : (int)b->tokens.size());
}

static llm_token best_token(bench *b) {
    const float *logits = b->backend->logits(b->context, 0);
    llm_token best = 0;
    for (llm_token i = 1; i < b->s->n_vocab; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static void print_row(const bench *b, const char *what, double rate, double share) {
    printf("%s,%s,%s,%s,%.1f,%.1f\n", b->s->name, b->type->name, b->mode, what, rate, share * 100);
    fflush(stdout);
}

static bool go_on(void *, llm_token) { return true; }

/* Decodes greedily. The token is picked on the host after each pass, or in bursts on the GPU. */
static void decode(bench *b, int depth, int n, bool on_host) {
    static const llm_sampler greedy = {};
    llm_error err;
    for (int done = 0; done < n;) {
        int some = on_host ? 1 : n - done < LLM_BACKEND_BURST ? n - done : (int)LLM_BACKEND_BURST;
        if (on_host) b->tokens[0] = best_token(b);
        llm_backend_burst burst = {some, depth + done, b->table.data(), &greedy, go_on, NULL};
        if (!on_host) check(b->backend->burst(b->context, &burst, &err), &err);
        done += some;
        forward(b, depth + done - 1, 1); /* computes the burst's last token, so that the next burst has logits */
    }
}

static void bench_decode(bench *b, int depth, bool on_host) {
    char what[64];
    const shape *s = b->s;
    int most = b->backend->burst ? NEW_TOKENS : NEW_TOKENS / 4, n = s->n_ctx - depth < most + 8 ? 16 : most;
    if (depth + n + 8 > s->n_ctx || (!on_host && !b->backend->burst)) return;
    forward(b, depth, 1);
    decode(b, depth + 1, 3, on_host); /* records the graph, which must not be timed */
    double start = seconds();
    decode(b, depth + 4, n, on_host);
    double each = (seconds() - start) / n;
    double cache_bytes = 4.0 * s->n_layers * s->n_kv_heads * s->head_dim * (depth + 4 + n / 2);
    snprintf(what, sizeof what, "decode at %d%s", depth, on_host ? " (host picks)" : "");
    print_row(b, what, 1 / each, (b->weight_bytes + cache_bytes) / each / b->bandwidth);
}

static void bench_prefill(bench *b, int n) {
    char what[64];
    const shape *s = b->s;
    if (n > s->n_ctx) return;
    prefill(b, n);
    double start = seconds();
    for (int i = 0; i < 3; i++) prefill(b, n);
    double each = (seconds() - start) / 3, q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    double per_token = s->n_layers * (2.0 * s->n_embd * (2 * q + 2 * kv + 3.0 * s->n_ff) + 2.0 * q * n);
    snprintf(what, sizeof what, "prefill %d", n);
    print_row(b, what, n / each, per_token * n / each / b->flops);
}

static const char *const MODES[] = {"graph", "fused", "eager"};

static bench make_bench(const shape *s, const weight_type *type, llm_cuda_mode mode, llm_comm *tensor = NULL) {
    bench b = {};
    b.tensor = tensor;
    b.s = s;
    b.backend = llm_cuda_backend_mode(mode);
    b.mode = MODES[mode];
    b.type = type;
    double start = seconds();
    open_model(&b);
    open_context(&b);
    fprintf(stderr, "gpu: %s in %s was made in %.1f s\n", s->name, type->name, seconds() - start);
    return b;
}

static int close_bench(bench *b) {
    b->backend->context_free(b->context);
    b->backend->close(b->model);
    return 0;
}

static int bench_model(const shape *s, const weight_type *type, llm_cuda_mode mode) {
    bench b = make_bench(s, type, mode);
    double sheet = sheet_bandwidth();
    b.bandwidth = b.backend->measure_bandwidth(b.context);
    print_row(&b, "read GB/s", b.bandwidth / 1e9, sheet > 0 ? b.bandwidth / 1e9 / sheet : 0);
    bench_decode(&b, PROMPT, mode == LLM_CUDA_EAGER);
    bench_decode(&b, DEEP, mode == LLM_CUDA_EAGER);
    if (mode == LLM_CUDA_GRAPH) {
        bench_decode(&b, PROMPT, true);
        b.flops = b.backend->measure_flops(b.context);
        print_row(&b, "cuBLAS TFLOP/s", b.flops / 1e12, 1);
        for (int n = 512; n <= 8192; n *= 4) bench_prefill(&b, n);
    }
    return close_bench(&b);
}

/* ---- Parts of the time ---- */

/* Returns the seconds per token, measured with bursts of identical passes. */
static double token_seconds(bench *b, int depth) {
    forward(b, depth, 1);
    decode(b, depth + 1, 3, false); /* loads the kernels, then records the graph */
    double start = seconds();
    decode(b, depth + 4, SOME_TOKENS, false);
    return (seconds() - start) / SOME_TOKENS;
}

static double vary(bench *b, const char *what, bool overlap, unsigned kinds) {
    llm__cuda_vary(b->context, overlap, kinds);
    double each = token_seconds(b, PROMPT);
    print_row(b, what, 1 / each, b->weight_bytes / each / b->bandwidth);
    return each;
}

/* Kinds that always run: the embedding, picking, and kernels that decoding does not use. */
static const unsigned ALWAYS = ~0u << 7;

/* For each kind of kernel: the time of one if only this kind runs, layer after layer, and the time saved by leaving
   this kind out. */
static void bench_kinds(bench *b, int depth, double whole) {
    const shape *s = b->s;
    const char *name;
    double bytes;
    int n;
    llm__cuda_vary(b->context, true, ALWAYS);
    double empty = token_seconds(b, depth);
    for (int kind = 0; (name = llm__cuda_kind(b->context, kind, &n, &bytes)) != NULL; kind++) {
        char what[128];
        if (n == 0) continue;
        if (bytes == 0) /* attention reads keys and values instead of weights */
            bytes = 4.0 * s->n_layers * s->n_kv_heads * s->head_dim * (depth + 4 + SOME_TOKENS / 2);
        llm__cuda_vary(b->context, true, ALWAYS | 1u << kind);
        double alone = (token_seconds(b, depth) - empty) / n;
        llm__cuda_vary(b->context, true, ~(1u << kind));
        double saved = (whole - token_seconds(b, depth)) / n;
        snprintf(what, sizeof what, "at %d: %s: us each alone; GB/s; us saved without", depth, name);
        printf("%s,%s,%s,%s,%.2f; %.0f; %.2f,%.1f\n", s->name, b->type->name, b->mode, what, alone * 1e6,
               alone > 0 ? bytes / n / alone / 1e9 : 0, saved * 1e6,
               alone > 0 ? bytes / n / alone / b->bandwidth * 100 : 0);
        fflush(stdout);
    }
    llm__cuda_vary(b->context, true, ~0u);
}

static double prefill_seconds(bench *b) {
    prefill(b, SOME_PROMPT);
    double start = seconds();
    for (int i = 0; i < 3; i++) prefill(b, SOME_PROMPT);
    return (seconds() - start) / 3;
}

/* Measures the time that leaving out each kind of kernel saves in a prefill. cuBLAS's products cannot be left out, and
   their time depends a little on the numbers that earlier kernels write. */
static void bench_prefill_kinds(bench *b) {
    const char *name;
    double bytes, whole = prefill_seconds(b), rest = whole;
    int n;
    for (int kind = 0; (name = llm__cuda_kind(b->context, kind, &n, &bytes)) != NULL; kind++) {
        char what[128];
        llm__cuda_vary(b->context, true, ~(1u << kind));
        double saved = whole - prefill_seconds(b);
        if (saved < 0.001 * whole) continue;
        rest -= saved;
        snprintf(what, sizeof what, "prefill %d: %s: ms saved without", SOME_PROMPT, name);
        print_row(b, what, saved * 1e3, saved / whole);
    }
    llm__cuda_vary(b->context, true, ~0u);
    char what[64];
    snprintf(what, sizeof what, "prefill %d: the rest: ms", SOME_PROMPT);
    print_row(b, what, rest * 1e3, rest / whole);
}

static int bench_why(const shape *s, const weight_type *type) {
    bench b = make_bench(s, type, LLM_CUDA_GRAPH);
    b.bandwidth = b.backend->measure_bandwidth(b.context);
    double whole = vary(&b, "as it is", true, ~0u);
    vary(&b, "kernels do not overlap", false, ~0u);
    bench_kinds(&b, PROMPT, whole);
    if (DEEP + SOME_TOKENS + 8 <= s->n_ctx) bench_kinds(&b, DEEP, token_seconds(&b, DEEP));
    if (SOME_PROMPT <= s->n_ctx) bench_prefill_kinds(&b);
    return close_bench(&b);
}

static int run_few(const shape *s, const weight_type *type) {
    bench b = make_bench(s, type, LLM_CUDA_FUSED);
    for (int i = 0; i < 4; i++) forward(&b, PROMPT + i, 1);
    return close_bench(&b);
}

static int print_device() {
    int n = 0, device = 0, processors = 0, major = 0, l2 = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0 || cudaGetDevice(&device) != cudaSuccess) {
        fprintf(stderr, "gpu: no GPU can be used: %s\n", cudaGetErrorString(cudaGetLastError()));
        return 3;
    }
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, device);
    fprintf(stderr, "gpu: compute capability %d, %d multiprocessors, %d MB of L2, %.0f GB/s by the data sheet\n", major,
            processors, l2 >> 20, sheet_bandwidth());
    return 0;
}

/* ---- Several GPUs ---- */

static int count_gpus() {
    int n = 0;
    return cudaGetDeviceCount(&n) == cudaSuccess ? n : 0;
}

/* Runs one rank in a thread. The first rank prints tokens per second and a GPU's GB/s, both relative to the bandwidth
   at which it reads its own weights, and the share of the time that the ranks' meetings take. A rank's bytes are its
   weights and its share of the cache. */
static void bench_rank(const shape *s, const weight_type *type, llm_comm *tensor) {
    bench b = make_bench(s, type, LLM_CUDA_GRAPH, tensor);
    const llm_backend_ranks own = llm_backend_find_ranks(&b.llm, tensor, NULL);
    char mode[32];
    const char *way = getenv("LLM_CUDA_RANKS");
    snprintf(mode, sizeof mode, "tensor %d%s%s", tensor->size, way ? " by " : "", way ? way : "");
    b.mode = mode;
    b.bandwidth = b.backend->measure_bandwidth(b.context);
    double each[2];
    for (unsigned meets = 0; meets < 2; meets++) {
        llm__cuda_vary(b.context, true, ~0u >> (1 - meets));
        each[meets] = token_seconds(&b, PROMPT);
    }
    double cache = 4.0 * s->n_layers * own.key_heads.n * s->head_dim * (PROMPT + 4 + SOME_TOKENS / 2),
           bytes = b.weight_bytes + cache;
    if (tensor->rank == 0) {
        print_row(&b, "decode at 6", 1 / each[1], bytes / each[1] / b.bandwidth);
        print_row(&b, "GB/s of a GPU", bytes / each[1] / 1e9, bytes / each[1] / b.bandwidth);
        print_row(&b, "without meetings", 1 / each[0], each[0] / each[1]);
        print_row(&b, "meetings' share of the time", 1 / (each[1] - each[0]), 1 - each[0] / each[1]);
    }
    close_bench(&b);
}

/* Calls work(comm) on n ranks, which are threads with a GPU each. */
template <typename Work> static int on_gpus(int n, Work work) {
    llm_comm *comms[64];
    std::vector<std::thread> threads;
    llm_error err;
    if (n < 2 || n > 64 || n > count_gpus()) {
        fprintf(stderr, "gpu: there are %d GPUs, and %d ranks need one each\n", count_gpus(), n);
        return 1;
    }
    check(llm_comm_threads(comms, n, NULL, &err), &err);
    for (int i = 0; i < n; i++)
        threads.emplace_back([=] {
            work(comms[i]);
            llm_comm_free(comms[i]);
        });
    for (std::thread &thread : threads) thread.join();
    return 0;
}

static int bench_ranks(int n, const shape *s, const weight_type *type) {
    return on_gpus(n, [=](llm_comm *comm) { bench_rank(s, type, comm); });
}

/* ---- HellaSwag (with random weights, only the lengths of the texts matter) ---- */

enum { ENDINGS = 4, SOME_QUESTIONS = 400, ALL_QUESTIONS = 10042 };

typedef struct scored {
    std::vector<llm_token> texts[ENDINGS]; /* the context's tokens, then the ending's */
    const llm_token *endings[ENDINGS];
    int n_context, n_ending[ENDINGS];
} scored;

static void cut_text(const llm_tokenizer *tokenizer, const std::string &context, const std::string &ending, int n_vocab,
                     scored *q, int e) {
    std::vector<llm_token> &text = q->texts[e];
    llm_error err;
    int64_t n_context;
    text.resize(4 * (context.size() + ending.size()) + 16);
    int64_t n = llm_encode_pair(tokenizer, context.c_str(), (" " + ending).c_str(), LLM_TOKENS_ENDS, text.data(),
                                text.size(), &n_context, &err);
    if (n < 0) check(err.code, &err);
    text.resize((size_t)n);
    for (llm_token &token : text) token %= n_vocab;
    q->n_context = (int)n_context;
    q->n_ending[e] = (int)(n - n_context);
    q->endings[e] = text.data() + n_context;
}

/* Reads llama.cpp's format, six lines per question: the context, the number of the right ending, four endings. */
static std::vector<scored> read_questions(const char *model, const char *path, size_t most, int n_vocab) {
    std::vector<scored> questions(most);
    std::ifstream file(path);
    std::string context, line;
    llm_tokenizer *tokenizer;
    llm_error err;
    size_t n = 0;
    check(llm_tokenizer_load(&tokenizer, model, NULL, &err), &err);
    for (; n < most && std::getline(file, context) && std::getline(file, line); n++)
        for (int e = 0; e < ENDINGS && std::getline(file, line); e++)
            cut_text(tokenizer, context, line, n_vocab, &questions[n], e);
    questions.resize(n);
    if (questions.empty()) {
        fprintf(stderr, "gpu: %s has no questions\n", path);
        exit(1);
    }
    llm_tokenizer_free(tokenizer);
    return questions;
}

/* Counts operations in the same way as examples/hellaswag.c. */
static double useful_operations(const shape *s, const llm_score_stats *stats) {
    double q = s->n_heads * s->head_dim, projections = s->n_embd * (q + 2.0 * s->n_kv_heads * s->head_dim),
           rest = s->n_embd * (q + 3.0 * s->n_ff);
    return 2 * ((double)stats->n_computed * (s->n_layers * projections + (s->n_layers - 1) * rest) +
                (double)stats->n_predicted * (rest + (double)s->n_embd * s->n_vocab));
}

/* Scores with a model like one from llm_model_load, but without a file. In a pipeline the first stage prints, and each
   writes its waits after the warm-up to a file. */
static void score_texts(const shape *s, const std::vector<scored> &texts, llm_comm *pipeline, FILE *file) {
    std::vector<llm_question> questions;
    std::vector<double> results(texts.size() * ENDINGS);
    llm_context_desc desc = {};
    llm_context *ctx;
    llm_model model = {};
    llm_score_stats stats;
    llm_error err;
    bench b = {};
    char what[100], mode[64] = "packed";
    const char *way = getenv("LLM_CUDA_RANKS");
    for (const scored &t : texts)
        questions.push_back(llm_question{t.texts[0].data(), t.n_context, ENDINGS, t.endings, t.n_ending});
    if (pipeline) snprintf(mode, sizeof mode, "stages %d%s%s", pipeline->size, way ? " by " : "", way ? way : "");
    b.s = s;
    b.backend = llm_cuda_backend();
    b.mode = mode;
    b.type = &TYPES[0];
    b.pipeline = pipeline;
    open_model(&b);
    model.backend = b.backend;
    model.device = b.model;
    model.shape = b.llm;
    model.info.dtype = LLM_DTYPE_BF16;
    model.desc.pipeline = pipeline;
    desc.n_ctx = 512;
    desc.n_seq = 256;
    desc.n_cache = 6144; /* 10 GB for LLaMA-33B, 75 GB with its weights */
    desc.n_batch = 2048;
    desc.n_logits = 1;
    check(llm_context_create(&ctx, &model, &desc, &err), &err);
    int n = (int)questions.size();
    check(llm_score(ctx, questions.data(), (n + 9) / 10, NULL, results.data(), &stats, &err),
          &err); /* warm-up: cuBLAS loads its kernels */
    if (pipeline) {
        ranks stage = {};
        stage.rank = pipeline->rank;
        stage.pipeline = ctx->backend_desc.pipeline;
        ranks_trace(&stage, file);
        trace_comm(stage.pipeline);
    }
    check(llm_score(ctx, questions.data(), n, NULL, results.data(), &stats, &err), &err);
    double limit = llm_measure_flops(ctx) * (pipeline ? pipeline->size : 1);
    if (!pipeline || pipeline->rank == 0) {
        snprintf(what, sizeof what, "HellaSwag: %d questions in %.1f s; tokens", n, stats.seconds);
        print_row(&b, what, (double)stats.n_computed / stats.seconds,
                  useful_operations(s, &stats) / stats.seconds / limit);
        printf("%s,%s,%s,HellaSwag: seconds for all %d,%.1f,\n", s->name, b.type->name, b.mode, ALL_QUESTIONS,
               stats.seconds / n * ALL_QUESTIONS);
        fflush(stdout);
    }
    llm_context_free(ctx);
    b.backend->close(b.model);
}

static int score_hellaswag(const shape *s, const char *tokenizer, const char *path, size_t most) {
    score_texts(s, read_questions(tokenizer, path, most, s->n_vocab), NULL, NULL);
    return 0;
}

static int score_in_stages(int n, const shape *s, const char *tokenizer, const char *path, const char *trace_path,
                           size_t most) {
    if (n > s->n_layers) {
        fprintf(stderr, "gpu: %d stages need a layer each, and %s has %d\n", n, s->name, s->n_layers);
        return 1;
    }
    const std::vector<scored> texts = read_questions(tokenizer, path, most, s->n_vocab);
    FILE *file = fopen(trace_path, "a");
    if (!file) {
        fprintf(stderr, "gpu: %s cannot be written\n", trace_path);
        return 1;
    }
    int status = on_gpus(n, [&](llm_comm *comm) { score_texts(s, texts, comm, file); });
    return fclose(file) || status;
}

/* ---- A real model's text ---- */

typedef struct text {
    std::vector<llm_token> tokens; /* NEW_TOKENS */
    std::string words;
    llm_stats stats;
} text;

static bool keep_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    text *t = (text *)user;
    t->tokens.push_back(token);
    t->words.append(bytes, n_bytes);
    return true;
}

static llm_context *open_real(const char *path, llm_dtype dtype, const llm_backend *backend) {
    llm_model_desc desc = {};
    llm_model *model;
    llm_context *ctx;
    llm_error err;
    desc.dtype = dtype;
    desc.backend = backend;
    check(llm_model_load(&model, path, &desc, &err), &err);
    check(llm_context_create(&ctx, model, NULL, &err), &err);
    return ctx;
}

static text continue_text(llm_context *ctx) {
    llm_generate_desc desc = {};
    llm_error err;
    text t = {};
    desc.prompt = "Once upon a time, in a small village by the sea, there lived";
    desc.max_tokens = NEW_TOKENS;
    desc.ignore_end = true;
    desc.on_token = keep_token;
    desc.user = &t;
    check(llm_generate(ctx, &desc, &t.stats, &err), &err);
    return t;
}

/* Returns the difference of two tokens' logits after the sequence's first `n` tokens. */
static double gap(llm_context *ctx, int n, llm_token a, llm_token b) {
    llm_error err;
    llm_token last = llm_seq_tokens(ctx, 0)[n - 1];
    llm_batch batch = {1, &last, NULL, NULL};
    check(llm_seq_truncate(ctx, 0, n - 1, &err), &err);
    check(llm_forward(ctx, &batch, &err), &err);
    return fabs((double)llm_logits(ctx, 0)[a] - (double)llm_logits(ctx, 0)[b]);
}

/* Compares the greedy texts on the CPU and on the GPU, with the same type of weights. They must be equal, or differ
   first at a token where two logits are nearly equal. */
static int same_text(const char *path, const weight_type *type) {
    llm_context *cpu = open_real(path, type->dtype, NULL), *gpu = open_real(path, type->dtype, llm_cuda_backend());
    text expected = continue_text(cpu), got = continue_text(gpu);
    size_t n = 0;
    while (n < NEW_TOKENS && expected.tokens[n] == got.tokens[n]) n++;
    llm_model_info info = llm_model_get_info(llm_context_model(gpu));
    fprintf(stderr, "%s\n", got.words.c_str());
    if (n == NEW_TOKENS) {
        printf("%s,%s,graph,greedy tokens as on the CPU,%d,\n", info.name, type->name, (int)n);
        return 0;
    }
    double apart = gap(cpu, expected.stats.n_prompt + (int)n, expected.tokens[n], got.tokens[n]);
    printf("%s,%s,graph,greedy tokens as on the CPU until two logits are %.4f apart,%d,\n", info.name, type->name,
           apart, (int)n);
    return apart < 0.01 ? 0 : 1;
}

static int usage(FILE *out) {
    fprintf(out, "bench SHAPE TYPE MODE | --why SHAPE TYPE | --few SHAPE TYPE | --hellaswag SHAPE MODEL TEXTS "
                 "[QUESTIONS] | --ranks N SHAPE TYPE | --stages N SHAPE MODEL TEXTS TRACE [QUESTIONS] | --same MODEL "
                 "TYPE | --device | --gpus\n"
                 "SHAPE:");
    for (const shape &s : SHAPES) fprintf(out, " %s", s.name);
    fprintf(out, "\nTYPE:");
    for (const weight_type &t : TYPES) fprintf(out, " %s", t.name);
    fprintf(out, "\nMODE: graph fused eager\n");
    return out == stdout ? 0 : 2;
}

static const shape *find_shape(const char *name) {
    for (const shape &s : SHAPES)
        if (!strcmp(s.name, name)) return &s;
    return NULL;
}

static const weight_type *find_type(const char *name) {
    for (const weight_type &t : TYPES)
        if (!strcmp(t.name, name)) return &t;
    return NULL;
}

int main(int argc, char **argv) {
    const char *what = argc > 1 ? argv[1] : "";
    const weight_type *t = NULL;
    if (!strcmp(what, "--help")) return usage(stdout);
    if (!strcmp(what, "--device")) return print_device();
    if (!strcmp(what, "--gpus")) return printf("%d\n", count_gpus()) < 0;
    if (!strcmp(what, "--ranks") && argc == 5 && find_shape(argv[3]) && (t = find_type(argv[4])) != NULL)
        return bench_ranks(atoi(argv[2]), find_shape(argv[3]), t);
    if (!strcmp(what, "--stages") && argc >= 7 && find_shape(argv[3]))
        return score_in_stages(atoi(argv[2]), find_shape(argv[3]), argv[4], argv[5], argv[6],
                               argc > 7 ? strtoul(argv[7], NULL, 10) : (size_t)SOME_QUESTIONS);
    if (!strcmp(what, "--same") && argc == 4 && (t = find_type(argv[3])) != NULL) return same_text(argv[2], t);
    const shape *s = argc > 2 ? find_shape(what[0] == '-' ? argv[2] : what) : NULL;
    if (s && !strcmp(what, "--hellaswag") && argc >= 5)
        return score_hellaswag(s, argv[3], argv[4], argc > 5 ? strtoul(argv[5], NULL, 10) : (size_t)SOME_QUESTIONS);
    if (!s || argc != 4 || (t = find_type(what[0] == '-' ? argv[3] : argv[2])) == NULL) return usage(stderr);
    if (!strcmp(what, "--why")) return bench_why(s, t);
    if (!strcmp(what, "--few")) return run_few(s, t);
    for (int mode = LLM_CUDA_GRAPH; mode <= LLM_CUDA_EAGER; mode++)
        if (!strcmp(argv[3], MODES[mode])) return bench_model(s, t, (llm_cuda_mode)mode);
    return usage(stderr);
}
