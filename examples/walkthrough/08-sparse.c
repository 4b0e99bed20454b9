/*  08-sparse.c - of each four weights two are zero, and are neither stored nor read.

    --weights "bf16 2:4" or "int8 2:4" prunes the matrices in the layers: of each four neighbouring weights, the two
    smallest become zero (prune, in walkthrough.h). The other two are stored, each with two bits that say which of the
    four it is. "bf16" and "int8" alone store all weights, for comparison. "int8 2:4 dense" prunes, but stores the
    zeros, to show that the result is the same. */
#include <stdint.h>

typedef enum kind { BF16, INT8, BF16_2_4, INT8_2_4 } kind;

/* Weights lie in blocks of 4 rows and LANES columns: see index_of. */
typedef struct matrix {
    int n, k;
    kind kind;
    uint16_t *bf16;  /* [n * k], or with 2:4 [n * k / 2]: the upper halves of floats */
    int8_t *q;       /* the same, as integers                                        */
    uint8_t *places; /* [n * k / 8] with 2:4: 2 bits for each stored weight           */
    float *scale;    /* [n] by which a row's sum is multiplied; 1 for bf16            */
} matrix;
#include "walkthrough.h"

/* The embedding keeps all its weights, because the input and the output of the model depend on it: it is also the
   head. */
static kind kind_of(const llm_backend_weight *weight) {
    bool head = weight->kind == LLM_WEIGHT_EMBEDDING || weight->kind == LLM_WEIGHT_HEAD;
    bool pruned = strstr(rounding, "2:4") && !strstr(rounding, "dense") && !head;
    if (strstr(rounding, "int8")) return pruned ? INT8_2_4 : INT8;
    return pruned ? BF16_2_4 : BF16;
}

static uint64_t matrix_bytes(const llm_backend_weight *weight) {
    static const int eighths[] = {16, 8, 9, 5}; /* bits per weight, which are eighths of a byte */
    return (uint64_t)weight->rows * ((uint64_t)weight->cols * eighths[kind_of(weight)] / 8 + sizeof(float));
}

/* How many of four weights are stored. */
KERNEL int stored(kind kind) { return kind == BF16_2_4 || kind == INT8_2_4 ? 2 : 4; }

/* The place of the p-th stored weight of the four that begin at `column`. A block holds stored(kind) vectors. Vector p
   has the p-th weight of each four, with 4 rows side by side: element 4 g + r belongs to row r and to four number g. */
static size_t index_of(const matrix *m, int row, int column, int p) {
    size_t block = (size_t)(row / 4) * (size_t)(m->k / LANES) + (size_t)(column / LANES);
    return (block * (size_t)stored(m->kind) + (size_t)p) * LANES + (size_t)(column % LANES / 4 * 4 + row % 4);
}

static void load_matrix(matrix *m, const llm_backend_weight *weight) {
    m->n = weight->rows;
    m->k = weight->cols;
    m->kind = kind_of(weight);
    bool pruned = stored(m->kind) == 2, bf16 = m->kind == BF16 || m->kind == BF16_2_4;
    size_t total = (size_t)m->n * (size_t)m->k / (pruned ? 2 : 1);
    if (bf16) m->bf16 = allocate(total * sizeof *m->bf16);
    else m->q = allocate(total);
    if (pruned) m->places = allocate(total / 4);
    m->scale = floats((size_t)m->n);
#pragma omp parallel
    {
        float *row = malloc((size_t)m->k * sizeof(float));
#pragma omp for schedule(static, 4) /* 4 rows share bytes of `places`, so one thread must fill them */
        for (int i = 0; i < m->n; i++) {
            weight->read_row(weight, i, row);
            if (pruned) prune(row, m->k);
            float scale = m->scale[i] = bf16 ? 1 : largest(row, m->k) / 127;
            for (int j = 0, p = 0; j < m->k; j++) {
                /* Always store two of four: if more than two are zero, store some of the zeros. */
                if (j % 4 == 0) p = 0;
                bool must = p < 2 && j % 4 >= 2 + p;
                if (pruned && (p == 2 || (row[j] == 0 && !must))) continue;
                size_t at = index_of(m, i, j, p++);
                if (bf16) m->bf16[at] = to_bf16(row[j]);
                else m->q[at] = scale ? (int8_t)rintf(row[j] / scale) : 0;
                if (pruned) m->places[at / 4] |= (uint8_t)(j % 4 << at % 4 * 2);
            }
        }
        free(row);
    }
}

enum {
    BLOCK = 32,  /* positions of a block of the cache */
    PIECE = 256, /* positions of a piece of the cache; a thread takes one piece at a time */
    ROWS = 8,    /* max rows whose queries use a block together */
    AHEAD = 8192 /* weights are prefetched this many bytes ahead */
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

/* LANES weights as they are stored, still without the row's scale */
KERNEL vec weights_at(const matrix *m, kind kind, size_t at) {
    return kind == BF16 || kind == BF16_2_4 ? from_bf16s(m->bf16 + at) : from_int8(m->q + at);
}

/* Replaces each element by one of the four in its group; its two bits of `places` say by which. */
KERNEL vec pick(vec x, uint32_t places) {
    vec picked;
#if defined(__AVX512F__)
    __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    picked = (vec)_mm512_permutevar_ps((__m512)x, _mm512_srlv_epi32(_mm512_set1_epi32((int)places), shifts));
#elif defined(__AVX2__)
    __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
    picked = (vec)_mm256_permutevar_ps((__m256)x, _mm256_srlv_epi32(_mm256_set1_epi32((int)places), shifts));
#else
    for (int i = 0; i < LANES; i++) picked[i] = x[i / 4 * 4 + (places >> 2 * i & 3)];
#endif
    return picked;
}

/* Sums of 4 rows whose elements are interleaved in v */
KERNEL void sum_rows(float sums[4], vec v) {
    typedef float four __attribute__((vector_size(16)));
    union {
        vec whole;
        four parts[LANES / 4];
    } all = {v};
    for (int i = 1; i < LANES / 4; i++) all.parts[0] += all.parts[i];
    memcpy(sums, &all.parts[0], sizeof all.parts[0]);
}

/* Multiplies 4 rows of W by `rows` rows of x. The four weights side by side are added to one sum, one after the other.
   Adding 0 does not change a sum, so weights that are not stored can be left out, and the result is the same bits. */
KERNEL int multiply_rows(float sums[4][4], const matrix *m, int i, const float *x, int rows, kind kind) {
    size_t at = (size_t)i * (size_t)m->k / 4 * (size_t)stored(kind);
    const size_t bytes = kind == BF16 || kind == BF16_2_4 ? 2 : 1;
    vec v[4][4] = {0}; /* for each row of x four sums, none of which waits for another */
    for (int j = 0; j < m->k; j += 4 * LANES) {
        const char *ahead = (bytes == 2 ? (const char *)(m->bf16 + at) : (const char *)(m->q + at)) + AHEAD;
        for (size_t a = 0; a < 4 * LANES * stored(kind) * bytes; a += 64) __builtin_prefetch(ahead + a);
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++)
#pragma GCC unroll 4
            for (int p = 0; p < stored(kind); p++, at += LANES) {
                uint32_t places = 0x55555555u * (uint32_t)p; /* each is the p-th of its four */
                if (stored(kind) == 2) memcpy(&places, m->places + at / 4, LANES / 4);
                vec w = weights_at(m, kind, at);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++)
                    v[r][a] += w * pick(*(const vec *)(x + (size_t)r * m->k + j + a * LANES), places);
            }
    }
    for (int r = 0; r < rows; r++) {
        sum_rows(sums[r], v[r][0] + v[r][1] + (v[r][2] + v[r][3]));
        for (int j = 0; j < 4; j++) sums[r][j] *= m->scale[i + j];
    }
    return rows;
}

KERNEL int multiply_kind(float sums[4][4], const matrix *m, int i, const float *x, int rows, kind kind) {
    return rows < 4 ? multiply_rows(sums, m, i, x, 1, kind) : multiply_rows(sums, m, i, x, 4, kind);
}

/* Multiplies rows i to i + 3 of W by 4 rows of x, or by one row if fewer than 4 are left. Returns the number of
   rows. */
static int multiply(float sums[4][4], const matrix *m, int i, const float *x, int rows) {
    if (m->kind == BF16) return multiply_kind(sums, m, i, x, rows, BF16);
    if (m->kind == INT8) return multiply_kind(sums, m, i, x, rows, INT8);
    if (m->kind == BF16_2_4) return multiply_kind(sums, m, i, x, rows, BF16_2_4);
    return multiply_kind(sums, m, i, x, rows, INT8_2_4);
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
        for (int j = 0; j < n_embd; j++) {
            const matrix *e = &m->embedding;
            size_t at = index_of(e, pass->tokens[r], j, j % 4);
            float w = e->kind == BF16 ? from_bf16(e->bf16[at]) : e->q[at];
            c->x[r * n_embd + j] = w * e->scale[pass->tokens[r]];
        }
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
    return walkthrough(argc, argv, &(step){.name = "8 sparse", .n_batch = 128, .n_logits = 16});
}
