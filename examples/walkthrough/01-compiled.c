/*  01-compiled.c - the same operations, but fused, in vectors and on all cores. A pass allocates no memory except for
    the cache.

    torch.compile does this to a program like 00-eager.c; here it is done by hand. */
typedef struct matrix {
    int n, k;
    float *w; /* [n][k] */
} matrix;
#include "walkthrough.h"

static uint64_t matrix_bytes(const llm_backend_weight *weight) {
    return (uint64_t)weight->rows * (uint64_t)weight->cols * sizeof(float);
}

static void load_matrix(matrix *m, const llm_backend_weight *weight) {
    m->n = weight->rows;
    m->k = weight->cols;
    m->w = floats((size_t)m->n * m->k);
#pragma omp parallel for schedule(static)
    for (int i = 0; i < m->n; i++) weight->read_row(weight, i, m->w + (size_t)i * m->k);
}

struct context {
    const model *m;
    float **keys, **values; /* [n_layers] of [positions so far][n_kv_heads * head_dim] */
    float *x;               /* [n_embd] the layers add their results to it */
    float *normed;          /* [n_embd] */
    float *qkv;             /* [(n_heads + 2 * n_kv_heads) * head_dim] queries, keys, values */
    float *scores;          /* [n_heads][n_ctx] */
    float *mixed;           /* [n_heads * head_dim] values mixed by attention */
    float *ffn;             /* [n_ff] */
    float *logits;          /* [n_vocab] */
    int n_ctx;
};

static context *create_context(const model *m, int n_ctx, int n_batch, int n_logits) {
    const llm_backend_shape *s = &m->shape;
    context *c = allocate(sizeof *c);
    (void)n_batch, (void)n_logits;
    c->m = m;
    c->n_ctx = n_ctx;
    c->keys = allocate((size_t)s->n_layers * sizeof *c->keys);
    c->values = allocate((size_t)s->n_layers * sizeof *c->values);
    c->x = floats((size_t)s->n_embd);
    c->normed = floats((size_t)s->n_embd);
    c->qkv = floats((size_t)(s->n_heads + 2 * s->n_kv_heads) * s->head_dim);
    c->scores = floats((size_t)s->n_heads * n_ctx);
    c->mixed = floats((size_t)s->n_heads * s->head_dim);
    c->ffn = floats((size_t)s->n_ff);
    c->logits = floats((size_t)s->n_vocab);
    return c;
}

/* ---- Kernels ---- */

static float dot(const float *a, const float *b, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* y[n] = W x. The threads share the rows of W. */
static void product(float *y, const matrix *m, const float *x) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < m->n; i++) y[i] = dot(m->w + (size_t)i * m->k, x, m->k);
}

/* y[n] += W x */
static void add_product(float *y, const matrix *m, const float *x) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < m->n; i++) y[i] += dot(m->w + (size_t)i * m->k, x, m->k);
}

/* y[n_ff] = silu(gates) * ups. The gates and the ups are the two halves of W x. */
static void gated_product(float *y, const matrix *m, const float *x) {
    int n = m->n / 2, k = m->k;
#pragma omp parallel for schedule(static)
    for (int i = 0; i < n; i++) {
        float gate = dot(m->w + (size_t)i * k, x, k), up = dot(m->w + (size_t)(n + i) * k, x, k);
        y[i] = gate / (1 + expf(-gate)) * up;
    }
}

static void rmsnorm(float *y, const float *x, const float *weight, int n, float eps) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void rotate(float *head, const model *m, int position) {
    int half = m->shape.rope_dim / 2;
    const float *cosines = m->cosines + position * half, *sines = m->sines + position * half;
    for (int i = 0; i < half; i++) {
        float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = a * sines[i] + b * cosines[i];
    }
}

/* Makes room for one more row in the cache. */
static float *grow(float *cache, int rows, int cols) {
    float *more = malloc((size_t)(rows + 1) * cols * sizeof(float));
    if (rows) memcpy(more, cache, (size_t)rows * cols * sizeof(float));
    free(cache);
    return more;
}

/* One head: out[head_dim] = softmax(query . keys) values, over the positions 0 .. n - 1. */
static void attend(float *out, const float *query, const float *keys, const float *values, int stride, float *scores,
                   int n, int head_dim) {
    float most = -INFINITY, sum = 0;
    for (int p = 0; p < n; p++) {
        scores[p] = dot(query, keys + (size_t)p * stride, head_dim) / sqrtf((float)head_dim);
        if (scores[p] > most) most = scores[p];
    }
    for (int p = 0; p < n; p++) sum += scores[p] = expf(scores[p] - most);
    memset(out, 0, (size_t)head_dim * sizeof(float));
    for (int p = 0; p < n; p++)
        for (int i = 0; i < head_dim; i++) out[i] += scores[p] / sum * values[(size_t)p * stride + i];
}

/* ---- The forward pass ---- */

static float *forward(context *c, const llm_backend_pass *pass) {
    const model *m = c->m;
    const llm_backend_shape *s = &m->shape;
    int position = pass->positions[0], head_dim = s->head_dim, kv_dim = s->n_kv_heads * head_dim;
    float *queries = c->qkv, *keys = queries + s->n_heads * head_dim, *values = keys + kv_dim;
    memcpy(c->x, m->embedding.w + (size_t)pass->tokens[0] * s->n_embd, (size_t)s->n_embd * sizeof(float));
    for (int i = 0; i < s->n_layers; i++) {
        const layer *l = &m->layers[i];
        rmsnorm(c->normed, c->x, l->attention_norm, s->n_embd, s->rms_eps);
        product(c->qkv, &l->qkv, c->normed);
        for (int h = 0; h < s->n_heads + s->n_kv_heads; h++) rotate(c->qkv + h * head_dim, m, position);
        c->keys[i] = grow(c->keys[i], position, kv_dim);
        c->values[i] = grow(c->values[i], position, kv_dim);
        memcpy(c->keys[i] + (size_t)position * kv_dim, keys, (size_t)kv_dim * sizeof(float));
        memcpy(c->values[i] + (size_t)position * kv_dim, values, (size_t)kv_dim * sizeof(float));
#pragma omp parallel for schedule(static)
        for (int h = 0; h < s->n_heads; h++) {
            int shared = h / (s->n_heads / s->n_kv_heads) * head_dim; /* the keys and values that this head reads */
            attend(c->mixed + h * head_dim, queries + h * head_dim, c->keys[i] + shared, c->values[i] + shared, kv_dim,
                   c->scores + (size_t)h * c->n_ctx, position + 1, head_dim);
        }
        add_product(c->x, &l->out, c->mixed);
        rmsnorm(c->normed, c->x, l->ffn_norm, s->n_embd, s->rms_eps);
        gated_product(c->ffn, &l->gate_up, c->normed);
        add_product(c->x, &l->down, c->ffn);
    }
    if (pass->n_logits) {
        rmsnorm(c->normed, c->x, m->output_norm, s->n_embd, s->rms_eps);
        product(c->logits, &m->head, c->normed);
    }
    return c->logits;
}

int main(int argc, char **argv) { return walkthrough(argc, argv, &(step){.name = "1 compiled"}); }
