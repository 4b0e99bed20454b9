/*  walkthrough.h - what all steps share: options, loading, choosing tokens, timing.

    A step is a program that computes a language model's forward pass in its own way. llm.h does the rest: it reads the
    file, turns text into tokens, and picks the next token. It calls a step through struct llm_backend, a table of
    functions. This file fills in that table. It needs four functions of the step, which are declared under "The step".

    A step says how it stores a matrix, includes this file, and then defines the four functions and main:

        typedef struct matrix { ... } matrix;
        #include "walkthrough.h"
        ...
        int main(int argc, char **argv) { return walkthrough(argc, argv, &(step){...}); } */
#include "llm.h"

#include <math.h>
#include <omp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* ---- The model ---- */

typedef struct layer {
    float *attention_norm, *ffn_norm; /* [n_embd] each */
    matrix qkv;                       /* [(n_heads + 2 * n_kv_heads) * head_dim][n_embd] queries, keys, values */
    matrix out;                       /* [n_embd][n_heads * head_dim] */
    matrix gate_up;                   /* [2 * n_ff][n_embd] all gates, then all ups */
    matrix down;                      /* [n_embd][n_ff] */
} layer;

typedef struct model {
    llm_backend_shape shape; /* n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_vocab, ... */
    layer *layers;           /* [n_layers] */
    matrix embedding;        /* [n_vocab][n_embd] row t belongs to token t */
    matrix head;             /* [n_vocab][n_embd] computes the logits; in many models it is the embedding */
    float *output_norm;      /* [n_embd] */
    float *cosines, *sines;  /* [MAX_POSITIONS][rope_dim / 2] for RoPE */
} model;

enum { MAX_POSITIONS = 4096 };

/* ---- The step: it defines these four ---- */

typedef struct context context;

static llm_dtype loading;                      /* the type of the model being loaded: f32, in step 6 also int8 */
static const llm_backend_shape *loading_shape; /* its shape */
static void load_matrix(matrix *m, const llm_backend_weight *weight); /* weight->read_row gives each row as floats */
static uint64_t matrix_bytes(const llm_backend_weight *weight);       /* memory that such a matrix takes */
static context *create_context(const model *m, int n_ctx, int n_batch, int n_logits);
/* Runs the tokens of one pass through the model, stores their keys and values, and returns the logits
   [pass->n_logits][n_vocab] of the rows that pass->logit_rows lists. */
static float *forward(context *c, const llm_backend_pass *pass);

/* ---- Memory ---- */

/* Every token reads all weights. With pages of 2 MB, where the system has them, the processor translates fewer
   addresses and can prefetch farther. */
static void *large_pages(size_t bytes) {
    size_t page = 1 << 21, whole = (bytes + page - 1) / page * page;
    void *block = aligned_alloc(page, whole);
    if (!block) {
        fprintf(stderr, "out of memory: %zu bytes were needed\n", whole);
        exit(1);
    }
    madvise(block, whole, MADV_HUGEPAGE);
    return block;
}

/* The memory is zeroed, begins at a multiple of 64 bytes, and is never freed. */
static void *allocate(size_t bytes) {
    static char *room;
    static size_t left;
    size_t whole = (bytes + 63) / 64 * 64, chunk = 32 << 20;
    if (whole > left) room = large_pages(left = whole > chunk ? whole : chunk);
    char *block = room;
    room += whole;
    left -= whole;
    return memset(block, 0, whole);
}

static float *floats(size_t n) { return allocate(n * sizeof(float)); }

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* Resident memory in bytes. */
static double memory_used(void) {
    long pages = 0;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file) return 0;
    if (fscanf(file, "%*d %ld", &pages) != 1) pages = 0;
    fclose(file);
    return (double)pages * 4096;
}

/* ---- The backend ---- */

/* With --weights a step gets rounded weights, as floats. So a step in f32 can be compared with a step that stores the
   rounded weights in fewer bits. */
static const char *rounding = "";

static float largest(const float *row, int n) {
    float most = 0;
    for (int i = 0; i < n; i++)
        if (fabsf(row[i]) > most) most = fabsf(row[i]);
    return most;
}

/* Sets the two smaller of each four weights to zero. */
static void prune(float *row, int n) {
    for (int i = 0; i + 4 <= n; i += 4) {
        for (int round = 0; round < 2; round++) {
            int least = -1;
            for (int j = i; j < i + 4; j++)
                if (row[j] != 0 && (least < 0 || fabsf(row[j]) < fabsf(row[least]))) least = j;
            int zeros = (row[i] == 0) + (row[i + 1] == 0) + (row[i + 2] == 0) + (row[i + 3] == 0);
            if (zeros < 2) row[least] = 0;
        }
    }
}

static uint16_t to_bf16(float x) { /* the upper half of a float, rounded to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float out;
    memcpy(&out, &bits, sizeof out);
    return out;
}

static void read_rounded_row(const llm_backend_weight *weight, int row, float *out) {
    const llm_backend_weight *whole = weight->source;
    whole->read_row(whole, row, out);
    if (strstr(rounding, "2:4") && weight->kind != LLM_WEIGHT_EMBEDDING && weight->kind != LLM_WEIGHT_HEAD)
        prune(out, weight->cols);
    float scale = largest(out, weight->cols) / 127;
    bool int8 = strstr(rounding, "int8"), bf16 = strstr(rounding, "bf16");
    for (int i = 0; i < weight->cols; i++) {
        if (int8) out[i] = scale ? rintf(out[i] / scale) * scale : 0;
        if (bf16) out[i] = from_bf16(to_bf16(out[i]));
    }
}

static llm_status refuse(llm_error *err, llm_status code, const char *why) {
    if (err) {
        err->code = code;
        snprintf(err->message, sizeof err->message, "the walkthrough does not run this model: %s", why);
    }
    return code;
}

static llm_status open_model(void **out, const llm_backend_shape *shape, const llm_model_desc *desc, llm_error *err) {
    if (shape->qkv_bias || shape->qk_norm || shape->window)
        return refuse(err, LLM_ERROR_UNSUPPORTED, "it has biases, norms of queries, or a window; use a Llama model");
    if (shape->n_embd % 64 || shape->n_ff % 64 || shape->n_heads * shape->head_dim % 64 || shape->head_dim % 32 ||
        shape->n_vocab % 4)
        return refuse(err, LLM_ERROR_UNSUPPORTED, "its rows are not multiples of 64");
    model *m = *out = allocate(sizeof *m);
    int half = shape->rope_dim / 2;
    m->shape = *shape;
    loading = desc->dtype;
    loading_shape = &m->shape;
    m->layers = allocate((size_t)shape->n_layers * sizeof *m->layers);
    m->cosines = floats((size_t)MAX_POSITIONS * half);
    m->sines = floats((size_t)MAX_POSITIONS * half);
    for (int position = 0; position < MAX_POSITIONS; position++) {
        for (int i = 0; i < half; i++) {
            double angle = position * shape->rope_frequencies[i];
            m->cosines[position * half + i] = (float)cos(angle) * shape->rope_scale;
            m->sines[position * half + i] = (float)sin(angle) * shape->rope_scale;
        }
    }
    return LLM_OK;
}

/* llm.h calls this for each weight. */
static llm_status upload(void *model_, const llm_backend_weight *weight, llm_error *err) {
    model *m = model_;
    layer *l = &m->layers[weight->layer];
    matrix *to = NULL;
    float **vector = NULL;
    switch (weight->kind) {
    case LLM_WEIGHT_EMBEDDING: to = &m->embedding; break;
    case LLM_WEIGHT_QKV: to = &l->qkv; break;
    case LLM_WEIGHT_ATTENTION_OUT: to = &l->out; break;
    case LLM_WEIGHT_GATE_UP: to = &l->gate_up; break;
    case LLM_WEIGHT_DOWN: to = &l->down; break;
    case LLM_WEIGHT_HEAD: to = &m->head; break;
    case LLM_WEIGHT_ATTENTION_NORM: vector = &l->attention_norm; break;
    case LLM_WEIGHT_FFN_NORM: vector = &l->ffn_norm; break;
    case LLM_WEIGHT_OUTPUT_NORM: vector = &m->output_norm; break;
    default: return refuse(err, LLM_ERROR_UNSUPPORTED, "it has a kind of weight that Llama does not have");
    }
    if (vector) {
        *vector = floats((size_t)weight->cols);
        weight->read_row(weight, 0, *vector);
        return LLM_OK;
    }
    llm_backend_weight rounded = *weight;
    rounded.source = weight;
    rounded.read_row = read_rounded_row;
    load_matrix(to, *rounding ? &rounded : weight);
    if (weight->kind == LLM_WEIGHT_EMBEDDING && m->shape.tied_head) m->head = m->embedding;
    return LLM_OK;
}

static uint64_t weight_bytes(llm_dtype dtype, const llm_backend_weight *weight) {
    loading = dtype;
    return matrix_bytes(weight);
}

static uint64_t block_bytes(const llm_backend_shape *s, llm_dtype cache_dtype) {
    (void)cache_dtype; /* keys and values are floats in all steps */
    return 2u * LLM_CACHE_BLOCK * (uint64_t)s->n_layers * (uint64_t)(s->n_kv_heads * s->head_dim) * sizeof(float);
}

static uint64_t scratch_bytes(const llm_backend_shape *s, const llm_backend_desc *desc) {
    (void)s;
    (void)desc;
    return 0;
}

typedef struct device { /* llm.h calls this the backend's context */
    context *context;
    const float *logits; /* [..][n_vocab] of the last pass */
    int n_vocab, first;
} device;

static llm_status context_create(void **out, void *model_, const llm_backend_desc *desc, llm_error *err) {
    device *d = *out = allocate(sizeof *d);
    (void)err;
    d->context = create_context(model_, desc->blocks_per_seq * LLM_CACHE_BLOCK, desc->n_batch, desc->n_logits);
    d->n_vocab = ((model *)model_)->shape.n_vocab;
    return LLM_OK;
}

static llm_status run_pass(void *device_, const llm_backend_pass *pass, llm_error *err) {
    device *d = device_;
    (void)err;
    d->logits = forward(d->context, pass);
    d->first = pass->first_logits;
    return LLM_OK;
}

static const float *logits(void *device_, int i) {
    device *d = device_;
    return d->logits + (size_t)(i - d->first) * (size_t)d->n_vocab;
}

/* With a single sequence no cache block is ever shared, copied or saved. */
static llm_status copy_block(void *device_, int to, int from, llm_error *err) {
    (void)device_, (void)to, (void)from;
    return refuse(err, LLM_ERROR_UNSUPPORTED, "it has one sequence only");
}
static llm_status read_block(void *device_, int block, void *bytes, llm_error *err) {
    (void)device_, (void)block, (void)bytes;
    return refuse(err, LLM_ERROR_UNSUPPORTED, "its cache cannot be saved");
}
static llm_status write_block(void *device_, int block, const void *bytes, llm_error *err) {
    (void)device_, (void)block, (void)bytes;
    return refuse(err, LLM_ERROR_UNSUPPORTED, "its cache cannot be restored");
}

static void release(void *object) { (void)object; } /* all memory stays until the program ends */
static double not_measured(void *device_) { return (void)device_, 0; }

static const llm_backend step_backend = {
    "walkthrough", open_model,     upload,       release,      weight_bytes, block_bytes,
    scratch_bytes, context_create, release,      run_pass,     logits,       copy_block,
    read_block,    write_block,    not_measured, not_measured, NULL,         NULL};

/* ---- The machine's limits ---- */

#if defined(__AVX512F__)
enum { LANES = 16 }; /* floats in a vector register */
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#define KERNEL static inline __attribute__((always_inline)) /* so that the compiler knows the number of rows */

/* Reads LANES numbers as floats. The loop defines the result. Compilers do not always find the instruction for it, so
   there is a version for AVX-512 and one for AVX2. */
static inline vec from_int8(const int8_t *q) {
    vec v;
#if defined(__AVX512F__)
    v = (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q)));
#elif defined(__AVX2__)
    v = (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q)));
#else
    for (int i = 0; i < LANES; i++) v[i] = q[i];
#endif
    return v;
}

static inline vec from_nibbles(const uint8_t *q, int shift) { /* 4 bits of each byte: q >> shift & 15 */
    vec v;
#if defined(__AVX512F__)
    __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)q));
    v = (vec)_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(wide, (unsigned)shift), _mm512_set1_epi32(15)));
#elif defined(__AVX2__)
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)q));
    v = (vec)_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(wide, shift), _mm256_set1_epi32(15)));
#else
    for (int i = 0; i < LANES; i++) v[i] = (float)(q[i] >> shift & 15);
#endif
    return v;
}

static inline vec from_bf16s(const uint16_t *w) { /* the upper halves of floats */
    vec v;
#if defined(__AVX512F__)
    v = (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)w)), 16);
#elif defined(__AVX2__)
    v = (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)w)), 16);
#else
    for (int i = 0; i < LANES; i++) v[i] = from_bf16(w[i]);
#endif
    return v;
}

/* The sum of a vector's numbers: adds its halves until one number is left. */
static inline float sum_of(vec v) {
    typedef float half __attribute__((vector_size(sizeof(vec) / 2)));
    union {
        vec whole;
        half halves[2];
    } all = {v};
    half sums = all.halves[0] + all.halves[1];
    float sum = 0;
#if defined(__AVX512F__)
    typedef float quarter __attribute__((vector_size(sizeof(vec) / 4)));
    union {
        half whole;
        quarter quarters[2];
    } left = {sums};
    quarter four = left.quarters[0] + left.quarters[1];
    for (int i = 0; i < LANES / 4; i++) sum += four[i];
#else
    for (int i = 0; i < LANES / 2; i++) sum += sums[i];
#endif
    return sum;
}

/* Bytes per second that all threads reach when they only read `bytes` of memory: the best of five runs. */
static double measure_bandwidth(size_t bytes) {
    size_t n = bytes / sizeof(vec) / 8 * 8;
    vec *buffer = memset(large_pages(n * sizeof(vec)), 0, n * sizeof(vec));
    double best = 0, sink = 0;
    for (int round = 0; round < 5; round++) {
        double start = now();
#pragma omp parallel for schedule(static) reduction(+ : sink)
        for (size_t i = 0; i < n; i += 8) {
            vec sum = buffer[i];
            for (int j = 1; j < 8; j++) sum += buffer[i + (size_t)j];
            sink += sum[0];
        }
        double rate = (double)(n * sizeof(vec)) / (now() - start);
        if (rate > best) best = rate;
    }
    free(buffer);
    return sink == 1 ? 0 : best;
}

/* Floating-point operations per second that all threads reach on numbers in registers: a product and a sum count as
   two. */
static double measure_flops(void) {
    enum { ROUNDS = 20000000, SUMS = 10 };
    double start = now();
    float sink = 0;
#pragma omp parallel reduction(+ : sink)
    {
        vec sums[SUMS], a;
        for (int i = 0; i < LANES; i++) a[i] = 0.5f;
        for (int i = 0; i < SUMS; i++) sums[i] = a;
        for (int round = 0; round < ROUNDS; round++) {
            for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * a + a;
        }
        for (int i = 0; i < SUMS; i++) sink += sum_of(sums[i]);
    }
    return 2.0 * LANES * SUMS * ROUNDS * omp_get_max_threads() / (now() - start) + (sink == 1);
}

/* ---- Making a text ---- */

typedef struct step {
    const char *name; /* "3 online softmax" */
    int n_batch;      /* max tokens in a pass; 0: 1 */
    int n_logits;     /* max tokens of a pass whose logits are returned; 0: 1 */
    /* Replaces generate below; may be NULL. */
    double (*generate)(llm_context *ctx, const llm_token *prompt, int n_prompt, llm_token *ids, int n, llm_error *err);
} step;

static bool silent;         /* print nothing, because another process prints */
static int n_processes = 1; /* processes that work on one model together */

static void say(const char *format, ...) {
    va_list args;
    va_start(args, format);
    if (!silent) vprintf(format, args);
    va_end(args);
    fflush(stdout);
}

static struct options {
    const char *model, *prompt, *ids, *text, *draft, *library;
    int n_new, n_samples, n_long, n_perplexity;
} options = {.prompt = "Hello, my name is", .draft = "int8", .n_new = 200, .n_samples = 5};

/* Continues the prompt by n tokens: first the prompt in one call, then token after token. Always picks the likeliest
   token (temperature 0), so all steps must give the same text. Returns how often all weights were read. */
static double generate(llm_context *ctx, const llm_token *prompt, int n_prompt, llm_token *ids, int n, llm_error *err) {
    llm_sampler greedy = {0};
    llm_batch batch = {n_prompt, prompt, NULL, NULL};
    if (llm_seq_truncate(ctx, 0, 0, err) || llm_forward(ctx, &batch, err)) return 0;
    for (int i = 0; i < n; i++) {
        ids[i] = llm_sample(ctx, batch.n_tokens - 1, 0, &greedy);
        batch.n_tokens = 1;
        batch.tokens = &ids[i];
        if (i + 1 < n && llm_forward(ctx, &batch, err)) return 0;
    }
    return n;
}

static llm_status load(const step *s, llm_dtype dtype, int n_ctx, llm_model **model, llm_context **ctx,
                       llm_error *err) {
    llm_model_desc desc = {.dtype = dtype, .backend = options.library ? NULL : &step_backend};
    llm_context_desc context_desc = {.n_ctx = n_ctx, .n_batch = s->n_batch ? s->n_batch : 1, .n_logits = s->n_logits};
    if (llm_model_load(model, options.model, &desc, err)) return err->code;
    return llm_context_create(ctx, *model, &context_desc, err);
}

/* Reads a prompt of n tokens, then generates 32: measures prefill, and decoding after a long text. */
static void run_long(llm_context *ctx, const llm_token *prompt, int n, llm_error *err) {
    llm_token ids[33];
    double start = now();
    generate(ctx, prompt, n, ids, 1, err);
    double middle = now();
    generate(ctx, prompt, n, ids, 33, err);
    double prefill = middle - start, decode = now() - middle - prefill;
    say("Prefill of %d tokens: %.1f tokens/sec\n", n, n / prefill);
    say("Decode after %d tokens: %.1f tokens/sec\n", n, 32 / decode);
}

/* How well the model predicts a text: e to the mean of -log(the probability that it gave to the next token). */
static double perplexity(llm_context *ctx, const llm_token *text, int n, int n_rows, int n_vocab, llm_error *err) {
    bool *all = allocate((size_t)n_rows * sizeof *all);
    double sum = 0;
    llm_seq_truncate(ctx, 0, 0, err);
    for (int i = 0; i < n_rows; i++) all[i] = true;
    for (int i = 0; i < n - 1; i += n_rows) {
        llm_batch batch = {n - 1 - i < n_rows ? n - 1 - i : n_rows, text + i, NULL, all};
        if (llm_forward(ctx, &batch, err)) return 0;
        for (int j = 0; j < batch.n_tokens; j++) {
            const float *row = llm_logits(ctx, j);
            double most = row[0], total = 0;
            for (int t = 1; t < n_vocab; t++) most = row[t] > most ? row[t] : most;
            for (int t = 0; t < n_vocab; t++) total += exp(row[t] - most);
            sum += log(total) + most - row[text[i + j + 1]];
        }
    }
    return exp(sum / (n - 1));
}

/* The name of this run: the step and its options. */
static const char *title(const step *s) {
    static char text[100];
    if (options.library) snprintf(text, sizeof text, "llm.h, %s", options.library);
    else if (*rounding) snprintf(text, sizeof text, "%s, %s", s->name, rounding);
    else if (s->generate && strcmp(options.draft, "int8"))
        snprintf(text, sizeof text, "%s, %s", s->name, options.draft);
    else snprintf(text, sizeof text, "%s", s->name);
    return text;
}

static bool parse(int argc, char **argv) {
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *name = argv[i], *value = argv[i + 1];
        if (!strcmp(name, "-m")) options.model = value;
        else if (!strcmp(name, "-p")) options.prompt = value;
        else if (!strcmp(name, "-n")) options.n_new = atoi(value);
        else if (!strcmp(name, "--samples")) options.n_samples = atoi(value);
        else if (!strcmp(name, "--ids")) options.ids = value;
        else if (!strcmp(name, "--text")) options.text = value;
        else if (!strcmp(name, "--long")) options.n_long = atoi(value);
        else if (!strcmp(name, "--perplexity")) options.n_perplexity = atoi(value);
        else if (!strcmp(name, "--library")) options.library = value;
        else if (!strcmp(name, "--weights")) rounding = value;
        else if (!strcmp(name, "--draft")) options.draft = value;
        else return false;
    }
    return argc % 2 && options.model && options.n_new > 0;
}

static llm_token *read_tokens(const llm_tokenizer *t, const char *text, size_t n_bytes, int *n, llm_error *err) {
    llm_token *ids = allocate((4 * n_bytes + 8) * sizeof *ids);
    *n = (int)llm_encode(t, text, n_bytes, LLM_TOKENS_ENDS, ids, 4 * n_bytes + 8, err);
    return ids;
}

static llm_token *read_text(const llm_tokenizer *t, const char *path, int *n, llm_error *err) {
    static char text[1 << 16];
    FILE *file = fopen(path, "rb");
    size_t n_bytes = file ? fread(text, 1, sizeof text, file) : 0;
    if (file) fclose(file);
    return read_tokens(t, text, n_bytes, n, err);
}

/* Runs the samples and prints them in gpt-fast's format, which bench/extract_and_plot.py reads. A first run warms up
   the caches and is not counted. After 40 seconds no new sample begins. */
static void run_samples(const step *s, llm_context *ctx, llm_model_info info, const llm_token *prompt, int n_prompt,
                        llm_error *err) {
    llm_token *ids = allocate((size_t)options.n_new * sizeof *ids);
    double gigabytes = (double)info.weight_bytes_per_token / 1e9, total = 0, reads = 0, begin = now();
    double (*run)(llm_context *, const llm_token *, int, llm_token *, int, llm_error *) =
        s->generate ? s->generate : generate;
    int n = 0;
    run(ctx, prompt, n_prompt, ids, options.n_new < 20 ? options.n_new : 20, err);
    for (; n < options.n_samples && (n == 0 || n_processes > 1 || now() - begin < 40) && !err->code; n++) {
        double start = now(), r = run(ctx, prompt, n_prompt, ids, options.n_new, err), seconds = now() - start;
        say("Time for inference %d: %.2f sec total, %.2f tokens/sec\n", n + 1, seconds, options.n_new / seconds);
        say("Bandwidth achieved: %.2f GB/s\n", gigabytes * r / seconds);
        total += seconds;
        reads += r;
    }
    if (err->code) return;
    static char text[1 << 16];
    llm_decode(llm_model_tokenizer(llm_context_model(ctx)), ids, (size_t)options.n_new, 0, text, sizeof text);
    say("%s%s\n==========\n", options.prompt, text);
    say("Batch Size: 1\nPrompt Length: %d\nGenerated tokens: %d\n", n_prompt, options.n_new);
    say("Average tokens/sec: %.2f\n", options.n_new * n / total);
    say("Memory used: %.2f GB\n", memory_used() * n_processes / 1e9);
    say("Bytes per token: %.0f\n", gigabytes * 1e9 * reads / n / options.n_new);
    say("Operations per token: %.0f\n", 2.0 * (double)info.n_params);
    FILE *file = options.ids && !silent ? fopen(options.ids, "w") : NULL;
    for (int i = 0; file && i < options.n_new; i++) fprintf(file, "%d\n", (int)ids[i]);
    if (file) fclose(file);
}

static int walkthrough(int argc, char **argv, const step *s) {
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_error err = {0};
    if (!parse(argc, argv)) {
        fprintf(stderr,
                "%s -m MODEL [-p PROMPT] [-n 200] [--samples 5] [--ids FILE] [--weights \"int8 2:4\"] [--library f32]\n"
                "    [--draft int8] [--text FILE [--long N] [--perplexity N]]\n",
                argv[0]);
        return 2;
    }
    double start = now();
    int longest = options.n_long > options.n_new ? options.n_long : options.n_new;
    if (options.n_perplexity > longest) longest = options.n_perplexity;
    int n_ctx = longest + 256 < MAX_POSITIONS ? longest + 256 : MAX_POSITIONS, n_logits = s->n_logits ? s->n_logits : 1,
        n_prompt = 0;
    say("Using device=CPU, %d threads\nStep: %s\nLoading model ...\n", omp_get_max_threads() * n_processes, title(s));
    llm_dtype dtype = options.library ? llm_dtype_from_name(options.library) : LLM_DTYPE_F32;
    if (!load(s, dtype, n_ctx, &model, &ctx, &err)) {
        llm_model_info info = llm_model_get_info(model);
        say("Time to load model: %.2f seconds\n", now() - start);
        double bandwidth = measure_bandwidth(info.weight_bytes_per_token);
        say("Rate measured: %.1f GFLOP/s\n", measure_flops() * n_processes / 1e9);
        const llm_tokenizer *t = llm_model_tokenizer(model);
        llm_token *prompt = read_tokens(t, options.prompt, strlen(options.prompt), &n_prompt, &err);
        run_samples(s, ctx, info, prompt, n_prompt, &err);
        bandwidth =
            fmax(bandwidth, measure_bandwidth(info.weight_bytes_per_token)); /* the machine may have been busy before */
        say("Bandwidth measured: %.2f GB/s\n", bandwidth * n_processes / 1e9);
        llm_token *text = options.text ? read_text(t, options.text, &n_prompt, &err) : NULL;
        if (options.n_long && n_prompt >= options.n_long && !err.code) run_long(ctx, text, options.n_long, &err);
        if (options.n_perplexity && n_prompt >= options.n_perplexity && !err.code) {
            double p = perplexity(ctx, text, options.n_perplexity, n_logits, info.n_vocab, &err);
            if (!err.code) say("Perplexity of %d tokens: %.3f\n", options.n_perplexity, p);
        }
    }
    if (err.code) fprintf(stderr, "%s\n", err.message);
    llm_context_free(ctx);
    llm_model_free(model);
    return err.code;
}
