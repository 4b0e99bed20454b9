/*  gpu.cpp - how fast llm_cuda.cu is, on models of well-known shapes with random weights:  bench/gpu [SHAPE...]

    It drives the backend itself, so no files are needed. Each line is one measurement, beside the limit measured on the
    same GPU: decoding against the bandwidth of reading the weights (MBU), prefill against cuBLAS on the widest matrix
    (MFU). bench/gpu.sh builds and runs it. */
#define LLM_CUDA
#include "llm.h"

#include <chrono>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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
    {"smallest", 2, 64, 96, 4, 2, 16, 300, 320}, /* to try this program without a GPU */
};

enum { PROMPT = 6, NEW_TOKENS = 200 };

typedef struct bench {
    const shape *s;
    const llm_backend *backend;
    void *model, *context;
    const char *mode, *dtype;
    double weight_bytes, bandwidth, flops;
    std::vector<int> table, positions, seqs, logit_rows;
    std::vector<llm_token> tokens;
} bench;

static double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

static void check(llm_status status, const llm_error *err) {
    if (!status) return;
    fprintf(stderr, "gpu: %s\n", err->message);
    exit(1);
}

/* Cheap numbers of about the right size; each row begins elsewhere in a short list. */
static void random_row(const llm_weight *weight, int row, float *out) {
    unsigned x = (unsigned)row * 2654435761u + (unsigned)weight->kind * 40503u + 12345u;
    for (int i = 0; i < weight->cols; i++) {
        x = x * 1664525u + 1013904223u;
        out[i] = weight->rows == 1 ? 1.0f : (float)(int)x * (0.03f / 2147483648.0f);
    }
}

static void upload(bench *b, llm_weight_kind kind, int layer, int rows, int cols) {
    llm_weight w = {};
    llm_error err;
    w.kind = kind;
    w.layer = layer;
    w.rows = rows;
    w.cols = cols;
    w.read_row = random_row;
    check(b->backend->upload(b->model, &w, &err), &err);
}

static void upload_all(bench *b, llm_dtype dtype) {
    const shape *s = b->s;
    int q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    upload(b, LLM_WEIGHT_EMBEDDING, 0, s->n_vocab, s->n_embd);
    for (int i = 0; i < s->n_layers; i++) {
        upload(b, LLM_WEIGHT_ATTENTION_NORM, i, 1, s->n_embd);
        upload(b, LLM_WEIGHT_QKV, i, q + 2 * kv, s->n_embd);
        upload(b, LLM_WEIGHT_ATTENTION_OUT, i, s->n_embd, q);
        upload(b, LLM_WEIGHT_FFN_NORM, i, 1, s->n_embd);
        upload(b, LLM_WEIGHT_GATE_UP, i, 2 * s->n_ff, s->n_embd);
        upload(b, LLM_WEIGHT_DOWN, i, s->n_embd, s->n_ff);
    }
    upload(b, LLM_WEIGHT_OUTPUT_NORM, 0, 1, s->n_embd);
    double per_layer = (double)(q + 2 * kv) * s->n_embd + (double)s->n_embd * q + 3.0 * s->n_ff * s->n_embd;
    b->weight_bytes = (s->n_layers * per_layer + (double)s->n_vocab * s->n_embd) * (dtype == LLM_DTYPE_INT8 ? 1 : 2);
}

static void open_model(bench *b, llm_dtype dtype) {
    const shape *s = b->s;
    std::vector<double> frequencies((size_t)s->head_dim / 2, 0.01);
    llm_shape shape = {};
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
    shape.rope_frequencies = frequencies.data();
    desc.dtype = dtype;
    desc.n_threads = 16;
    check(b->backend->open(&b->model, &shape, &desc, &err), &err);
    upload_all(b, dtype);
}

static void open_context(bench *b) {
    llm_backend_desc desc = {};
    llm_error err;
    int blocks = b->s->n_ctx / LLM_BLOCK, n_batch = b->s->n_ctx < 2048 ? b->s->n_ctx : 2048;
    desc.n_seq = 1;
    desc.blocks_per_seq = desc.n_cache_blocks = blocks;
    desc.n_batch = n_batch;
    desc.n_logits = 1;
    desc.cache_dtype = LLM_DTYPE_BF16;
    check(b->backend->context_create(&b->context, b->model, &desc, &err), &err);
    b->table.resize((size_t)blocks);
    for (int i = 0; i < blocks; i++) b->table[(size_t)i] = i;
    b->positions.resize((size_t)n_batch);
    b->seqs.assign((size_t)n_batch, 0);
    b->tokens.resize((size_t)n_batch);
    b->bandwidth = b->backend->measure_bandwidth(b->context);
    b->flops = b->backend->measure_flops(b->context);
}

static void forward(bench *b, int from, int n) {
    llm_pass pass = {};
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
    printf("%s,%s,%s,%s,%.1f,%.1f\n", b->s->name, b->dtype, b->mode, what, rate, share * 100);
    fflush(stdout);
}

/* Greedy, the choice of the token included. */
static void bench_decode(bench *b, int depth) {
    char what[64];
    const shape *s = b->s;
    int n = s->n_ctx - depth < NEW_TOKENS + 8 ? 16 : NEW_TOKENS;
    if (depth + n + 8 > s->n_ctx) return;
    prefill(b, depth);
    for (int i = 0; i < 4; i++) forward(b, depth + i, 1); /* recording the graph is not decoding */
    double start = now();
    for (int i = 0; i < n; i++) {
        b->tokens[0] = best_token(b);
        forward(b, depth + 4 + i, 1);
    }
    double seconds = (now() - start) / n;
    double cache_bytes = 4.0 * s->n_layers * s->n_kv_heads * s->head_dim * (depth + 4 + n / 2);
    snprintf(what, sizeof what, "decode at %d", depth);
    print_row(b, what, 1 / seconds, (b->weight_bytes + cache_bytes) / seconds / b->bandwidth);
}

static void bench_prefill(bench *b, int n) {
    char what[64];
    const shape *s = b->s;
    if (n > s->n_ctx) return;
    prefill(b, n);
    double start = now();
    for (int i = 0; i < 3; i++) prefill(b, n);
    double seconds = (now() - start) / 3, q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim;
    double per_token = s->n_layers * (2.0 * s->n_embd * (2 * q + 2 * kv + 3.0 * s->n_ff) + 2.0 * q * n);
    snprintf(what, sizeof what, "prefill %d", n);
    print_row(b, what, n / seconds, per_token * n / seconds / b->flops);
}

static void bench_model(const shape *s, llm_dtype dtype, llm_cuda_mode mode) {
    static const char *const modes[] = {"graph", "fused", "eager"};
    bench b = {};
    b.s = s;
    b.backend = llm_cuda_backend_mode(mode);
    b.mode = modes[mode];
    b.dtype = dtype == LLM_DTYPE_INT8 ? "int8" : "bf16";
    open_model(&b, dtype);
    open_context(&b);
    if (mode == LLM_CUDA_GRAPH) {
        print_row(&b, "read GB/s", b.bandwidth / 1e9, 1);
        print_row(&b, "cuBLAS TFLOP/s", b.flops / 1e12, 1);
    }
    bench_decode(&b, PROMPT);
    bench_decode(&b, 3800);
    for (int n = 512; n <= 8192 && mode == LLM_CUDA_GRAPH; n *= 4) bench_prefill(&b, n);
    b.backend->context_free(b.context);
    b.backend->close(b.model);
}

int main(int argc, char **argv) {
    printf("model,weights,mode,what,per second,%% of the limit\n");
    for (size_t i = 0; i < sizeof SHAPES / sizeof *SHAPES; i++) {
        bool wanted = argc < 2 && strcmp(SHAPES[i].name, "smallest");
        for (int j = 1; j < argc; j++) wanted |= !strcmp(argv[j], SHAPES[i].name);
        if (!wanted) continue;
        for (int mode = LLM_CUDA_GRAPH; mode <= LLM_CUDA_EAGER; mode++) {
            bench_model(&SHAPES[i], LLM_DTYPE_BF16, (llm_cuda_mode)mode);
            bench_model(&SHAPES[i], LLM_DTYPE_INT8, (llm_cuda_mode)mode);
        }
    }
}
