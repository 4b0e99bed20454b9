/*  03-online-softmax.c - attention in one pass over the cache.

    Softmax needs the largest score and the sum over all positions. So 02-static-cache.c works in three steps: all
    scores, then all shares, then all values. Here each block of 32 positions is used once. The program keeps the
    largest score and the sum so far; if it finds a larger score, it scales down the results so far. Such partial
    results can be joined. So the cache can be cut into pieces for the threads. Heads of queries that share keys and
    values use a block together. */
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

enum {
    BLOCK = 32,  /* positions of a block of the cache */
    PIECE = 256, /* positions of a piece of the cache; a thread takes one piece at a time */
    ROWS = 8     /* max rows whose queries use a block together */
};

struct context {
    const model *m;
    float *keys;   /* [n_layers][n_kv_heads][n_ctx / BLOCK][head_dim][BLOCK] the keys of a block are interleaved */
    float *values; /* [n_layers][n_kv_heads][n_ctx][head_dim] */
    float *x;      /* [n_batch][n_embd] the layers add their results to it */
    float *normed; /* [n_batch][n_embd] */
    float *qkv;    /* [n_batch][(n_heads + 2 * n_kv_heads) * head_dim] queries, keys, values */
    float *found;  /* [n_batch][n_heads][n_pieces][head_dim + 2] a partial result of each piece, see meet */
    float *mixed;  /* [n_batch][n_heads * head_dim] values mixed by attention */
    float *ffn;    /* [n_batch][n_ff] */
    float *logits; /* [n_logits][n_vocab] */
    int n_ctx, n_pieces;
};

static context *create_context(const model *m, int n_ctx, int n_batch, int n_logits) {
    const llm_backend_shape *s = &m->shape;
    context *c = allocate(sizeof *c);
    c->m = m;
    c->n_ctx = n_ctx;
    c->keys = floats((size_t)s->n_layers * n_ctx * s->n_kv_heads * s->head_dim);
    c->values = floats((size_t)s->n_layers * n_ctx * s->n_kv_heads * s->head_dim);
    c->x = floats((size_t)n_batch * s->n_embd);
    c->normed = floats((size_t)n_batch * s->n_embd);
    c->qkv = floats((size_t)n_batch * (s->n_heads + 2 * s->n_kv_heads) * s->head_dim);
    c->n_pieces = (n_ctx + PIECE - 1) / PIECE;
    c->found = floats((size_t)n_batch * s->n_heads * c->n_pieces * (s->head_dim + 2));
    c->mixed = floats((size_t)n_batch * s->n_heads * s->head_dim);
    c->ffn = floats((size_t)n_batch * s->n_ff);
    c->logits = floats((size_t)n_logits * s->n_vocab);
    return c;
}

/* ---- Kernels ---- */

static float dot(const float *a, const float *b, int n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* LANES weights of one row, from a column on */
KERNEL vec weights_at(const matrix *m, int row, int column) {
    return *(const vec *)(m->w + (size_t)row * m->k + column);
}

/* Multiplies 4 rows of W by 4 rows of x: 8 loads of vectors for 16 products. */
KERNEL void tile(float sums[4][4], const matrix *m, int first, const float *x) {
    vec v[4][4] = {0};
    for (int j = 0; j < m->k; j += LANES)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            vec w = weights_at(m, first + i, j);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) v[r][i] += w * *(const vec *)(x + (size_t)r * m->k + j);
        }
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < 4; i++) sums[r][i] = sum_of(v[r][i]);
}

/* Multiplies rows i to i + 3 of W by 4 rows of x, or by one row if fewer than 4 are left. Returns the number of
   rows. */
static int multiply(float sums[4][4], const matrix *m, int i, const float *x, int rows) {
    if (rows >= 4) return tile(sums, m, i, x), 4;
    for (int j = 0; j < 4; j++) sums[0][j] = dot(m->w + (size_t)(i + j) * m->k, x, m->k);
    return 1;
}

/* y[rows][n] = x[rows][k] W, or += if `add`. The threads share the rows of W; each row is read from memory once, for
   all rows of x. */
static void product(float *y, const matrix *m, const float *x, int rows, bool add) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < m->n; i += 4) {
        float sums[4][4];
        for (int r = 0, some; r < rows; r += some) {
            some = multiply(sums, m, i, x + (size_t)r * m->k, rows - r);
            for (int a = 0; a < some; a++)
                for (int b = 0; b < 4; b++) {
                    float *to = y + (size_t)(r + a) * m->n + i + b;
                    *to = sums[a][b] + (add ? *to : 0);
                }
        }
    }
}

/* y[rows][n_ff] = silu(gates) * ups. The gates and the ups are the two halves of x W. */
static void gated_product(float *y, const matrix *m, const float *x, int rows) {
    int n_ff = m->n / 2;
#pragma omp parallel for schedule(static)
    for (int i = 0; i < n_ff; i += 4) {
        float gates[4][4], ups[4][4];
        for (int r = 0, some; r < rows; r += some) {
            multiply(gates, m, i, x + (size_t)r * m->k, rows - r);
            some = multiply(ups, m, n_ff + i, x + (size_t)r * m->k, rows - r);
            for (int a = 0; a < some; a++)
                for (int b = 0; b < 4; b++)
                    y[(size_t)(r + a) * n_ff + i + b] = gates[a][b] / (1 + expf(-gates[a][b])) * ups[a][b];
        }
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

/* Attention of one query to the first n positions of one block. `found` is the result so far: the sum of
   exp(score - most) * value [head_dim], then the largest score `most`, then the sum of exp(score - most). */
static void meet(float *found, const float *query, const float *keys, const float *values, int n, int head_dim) {
    float scores[BLOCK] = {0}, *most = found + head_dim, *sum = most + 1, old = *most;
    for (int i = 0; i < head_dim; i++)
        for (int p = 0; p < BLOCK; p++) scores[p] += query[i] * keys[i * BLOCK + p];
    for (int p = 0; p < n; p++) {
        scores[p] /= sqrtf((float)head_dim);
        if (scores[p] > *most) *most = scores[p];
    }
    float scale = expf(old - *most); /* 0 the first time, because old is -INFINITY */
    *sum *= scale;
    for (int i = 0; i < head_dim; i++) found[i] *= scale;
    for (int p = 0; p < n; p++) {
        float share = expf(scores[p] - *most);
        *sum += share;
        for (int i = 0; i < head_dim; i++) found[i] += share * values[p * head_dim + i];
    }
}

/* Joins the partial results of n pieces into out[head_dim]. */
static void join(float *out, const float *found, int n, int head_dim) {
    float most = -INFINITY, sum = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, found[i * (head_dim + 2) + head_dim]);
    memset(out, 0, (size_t)head_dim * sizeof(float));
    for (int i = 0; i < n; i++, found += head_dim + 2) {
        float scale = expf(found[head_dim] - most);
        sum += scale * found[head_dim + 1];
        for (int j = 0; j < head_dim; j++) out[j] += scale * found[j];
    }
    for (int j = 0; j < head_dim; j++) out[j] /= sum;
}

/* Computes mixed[rows][n_heads * head_dim] from queries [rows][qkv_dim] and one layer's cache. A thread takes up to 8
   rows, one head of keys and values, and one piece of the cache, so it fetches a block once for all these queries. */
static void attention(context *c, const llm_backend_pass *pass, const float *keys, const float *values) {
    const llm_backend_shape *s = &c->m->shape;
    int rows = pass->n_rows, dim = s->head_dim, qkv_dim = (s->n_heads + 2 * s->n_kv_heads) * dim;
    int group = s->n_heads / s->n_kv_heads, n_pieces = pass->positions[rows - 1] / PIECE + 1;
    size_t per_head = (size_t)c->n_pieces * (dim + 2), head = (size_t)c->n_ctx * dim;
#pragma omp parallel for collapse(3) schedule(dynamic)
    for (int first = 0; first < rows; first += ROWS)
        for (int kv = 0; kv < s->n_kv_heads; kv++)
            for (int piece = 0; piece < n_pieces; piece++)
                for (int at = piece * PIECE; at < (piece + 1) * PIECE; at += BLOCK)
                    for (int r = first; r < first + ROWS && r < rows; r++)
                        for (int h = kv * group; h < (kv + 1) * group; h++) {
                            float *found = c->found + ((size_t)r * s->n_heads + h) * per_head + piece * (dim + 2);
                            int n = pass->positions[r] + 1 - at; /* a token attends to itself and all earlier tokens */
                            if (at == piece * PIECE) {
                                memset(found, 0, (size_t)(dim + 2) * sizeof(float));
                                found[dim] = -INFINITY;
                            }
                            if (n > 0)
                                meet(found, c->qkv + (size_t)r * qkv_dim + h * dim, keys + kv * head + at * dim,
                                     values + kv * head + at * dim, n < BLOCK ? n : BLOCK, dim);
                        }
#pragma omp parallel for schedule(static)
    for (int j = 0; j < rows * s->n_heads; j++) join(c->mixed + j * dim, c->found + j * per_head, n_pieces, dim);
}

/* Puts the keys and values [2][n_kv_heads][head_dim] of one position into the cache. */
static void store(context *c, float *keys, float *values, const float *kv, int position) {
    int dim = c->m->shape.head_dim, n = c->m->shape.n_kv_heads, block = position / BLOCK * BLOCK;
    for (int h = 0; h < n; h++)
        for (int i = 0; i < dim; i++) {
            keys[((size_t)h * c->n_ctx + block) * dim + i * BLOCK + position % BLOCK] = kv[h * dim + i];
            values[((size_t)h * c->n_ctx + position) * dim + i] = kv[(n + h) * dim + i];
        }
}

/* ---- The forward pass ---- */

static float *forward(context *c, const llm_backend_pass *pass) {
    const model *m = c->m;
    const llm_backend_shape *s = &m->shape;
    int rows = pass->n_rows, head_dim = s->head_dim, n_embd = s->n_embd;
    int kv_dim = s->n_kv_heads * head_dim, q_dim = s->n_heads * head_dim, qkv_dim = q_dim + 2 * kv_dim;
    for (int r = 0; r < rows; r++)
        memcpy(c->x + r * n_embd, m->embedding.w + (size_t)pass->tokens[r] * n_embd, (size_t)n_embd * sizeof(float));
    for (int i = 0; i < s->n_layers; i++) {
        const layer *l = &m->layers[i];
        float *keys = c->keys + (size_t)i * c->n_ctx * kv_dim, *values = c->values + (size_t)i * c->n_ctx * kv_dim;
        for (int r = 0; r < rows; r++)
            rmsnorm(c->normed + r * n_embd, c->x + r * n_embd, l->attention_norm, n_embd, s->rms_eps);
        product(c->qkv, &l->qkv, c->normed, rows, false);
        for (int r = 0; r < rows; r++) {
            float *q = c->qkv + (size_t)r * qkv_dim;
            for (int h = 0; h < s->n_heads + s->n_kv_heads; h++) rotate(q + h * head_dim, m, pass->positions[r]);
            store(c, keys, values, q + q_dim, pass->positions[r]);
        }
        attention(c, pass, keys, values);
        product(c->x, &l->out, c->mixed, rows, true);
        for (int r = 0; r < rows; r++)
            rmsnorm(c->normed + r * n_embd, c->x + r * n_embd, l->ffn_norm, n_embd, s->rms_eps);
        gated_product(c->ffn, &l->gate_up, c->normed, rows);
        product(c->x, &l->down, c->ffn, rows, true);
    }
    for (int i = 0; i < pass->n_logits; i++)
        rmsnorm(c->normed + i * n_embd, c->x + pass->logit_rows[i] * n_embd, m->output_norm, n_embd, s->rms_eps);
    if (pass->n_logits) product(c->logits, &m->head, c->normed, pass->n_logits, false);
    return c->logits;
}

int main(int argc, char **argv) {
    return walkthrough(argc, argv, &(step){.name = "3 online softmax", .n_batch = 128, .n_logits = 16});
}
