/*  06-speculative.c - guess several tokens cheaply, then check them all in one pass.

    We want the text of the model in floats. A copy of it in int8, which reads a quarter of the bytes, guesses the next
    five tokens. Then the model computes one pass over the guesses, like a short prompt. The pass shows which token the
    model would have chosen at each position. Guesses that agree are kept, so the text is the model's own. --draft
    lookup guesses without a model: the guesses are the tokens that followed the same two tokens earlier in the text. */
#include <stdint.h>

typedef struct matrix {
    int n, k;
    float *w;     /* [n][k], or NULL if the next two are set */
    int8_t *q;    /* [n][k]                             */
    float *scale; /* [n] a weight is q * scale          */
} matrix;
#include "walkthrough.h"

static uint64_t matrix_bytes(const llm_backend_weight *weight) {
    uint64_t row = (uint64_t)weight->cols;
    return (uint64_t)weight->rows * (loading == LLM_DTYPE_INT8 ? row + sizeof(float) : row * sizeof(float));
}

static void load_matrix(matrix *m, const llm_backend_weight *weight) {
    m->n = weight->rows;
    m->k = weight->cols;
    if (loading == LLM_DTYPE_INT8) m->q = allocate((size_t)m->n * m->k);
    else m->w = floats((size_t)m->n * m->k);
    m->scale = floats((size_t)m->n);
#pragma omp parallel
    {
        float *row = malloc((size_t)m->k * sizeof(float));
#pragma omp for schedule(static)
        for (int i = 0; i < m->n; i++) {
            weight->read_row(weight, i, row);
            if (m->w) memcpy(m->w + (size_t)i * m->k, row, (size_t)m->k * sizeof(float));
            float scale = m->scale[i] = m->w ? 1 : largest(row, m->k) / 127;
            for (int j = 0; j < m->k && m->q; j++)
                m->q[(size_t)i * m->k + j] = scale ? (int8_t)rintf(row[j] / scale) : 0;
        }
        free(row);
    }
}

enum {
    BLOCK = 32,  /* positions of a block of the cache */
    PIECE = 256, /* positions of a piece of the cache; a thread takes one piece at a time */
    ROWS = 8,    /* max rows whose queries use a block together */
    AHEAD = 4096 /* weights are prefetched this many bytes ahead */
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

/* LANES weights of one row, from a column on, not yet multiplied by the row's scale */
KERNEL vec weights_at(const matrix *m, bool as_floats, int row, int column) {
    if (as_floats) return *(const vec *)(m->w + (size_t)row * m->k + column);
    return from_int8(m->q + (size_t)row * m->k + column);
}

/* Multiplies 4 rows of W by 4 rows of x: 8 loads of vectors for 16 products. */
KERNEL void tile(float sums[4][4], const matrix *m, int first, const float *x, bool as_floats) {
    vec v[4][4] = {0};
    for (int j = 0; j < m->k; j += LANES)
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            vec w = weights_at(m, as_floats, first + i, j);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) v[r][i] += w * *(const vec *)(x + (size_t)r * m->k + j);
        }
    for (int r = 0; r < 4; r++)
        for (int i = 0; i < 4; i++) sums[r][i] = sum_of(v[r][i]);
}

/* Multiplies one row of W by one row of x. Decoding calls this for row after row, in the order of memory. */
KERNEL float one(const matrix *m, int i, const float *x) {
    vec v[4] = {0}; /* four independent sums, so that none waits for another */
    for (int j = 0; j < m->k; j += 4 * LANES) {
        __builtin_prefetch(m->q + (size_t)i * m->k + j + AHEAD); /* each round uses 64 bytes, one cache line */
#pragma GCC unroll 4
        for (int a = 0; a < 4; a++) v[a] += weights_at(m, false, i, j + a * LANES) * *(const vec *)(x + j + a * LANES);
    }
    return sum_of(v[0] + v[1] + (v[2] + v[3]));
}

KERNEL int multiply_as(float sums[4][4], const matrix *m, int i, const float *x, int rows, bool as_floats) {
    rows = rows < 4 ? 1 : 4;
    if (rows == 4) tile(sums, m, i, x, as_floats);
    else
        for (int j = 0; j < 4; j++)
            sums[0][j] = as_floats ? dot(m->w + (size_t)(i + j) * m->k, x, m->k) : one(m, i + j, x);
    for (int r = 0; r < rows; r++)
        for (int j = 0; j < 4; j++) sums[r][j] *= m->scale[i + j];
    return rows;
}

/* Multiplies rows i to i + 3 of W by 4 rows of x, or by one row if fewer than 4 are left. Returns the number of
   rows. */
static int multiply(float sums[4][4], const matrix *m, int i, const float *x, int rows) {
    return m->w ? multiply_as(sums, m, i, x, rows, true) : multiply_as(sums, m, i, x, rows, false);
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
        for (int j = 0; j < n_embd; j += LANES)
            *(vec *)(c->x + r * n_embd + j) =
                weights_at(&m->embedding, m->embedding.w, pass->tokens[r], j) * m->embedding.scale[pass->tokens[r]];
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

/* ---- Speculative decoding ---- */

enum { GUESSES = 5 };

static const step target_step;
static llm_context *draft; /* of the same weights as int8, with a cache of its own; NULL: lookup */

/* Looks for the last two tokens earlier in the text, and guesses what followed them there. Returns how many guesses. */
static int look_up(const llm_token *text, int n, llm_token *guesses, int n_guesses) {
    for (int i = n - 3; i >= 1; i--) {
        if (text[i] != text[n - 1] || text[i - 1] != text[n - 2]) continue;
        int found = n - 1 - i < n_guesses ? n - 1 - i : n_guesses;
        memcpy(guesses, text + i + 1, (size_t)found * sizeof *guesses);
        return found;
    }
    return 0;
}

/* Lets the int8 model read the text that it has not read yet, and then continue it. */
static int ask_draft(const llm_token *text, int n, llm_token *guesses, int n_guesses, llm_error *err) {
    llm_sampler greedy = {0};
    int known = llm_seq_length(draft, 0);
    llm_batch batch = {n - known, text + known, NULL, NULL};
    for (int i = 0; i < n_guesses; i++) {
        if (llm_forward(draft, &batch, err)) return 0;
        guesses[i] = llm_sample(draft, batch.n_tokens - 1, 0, &greedy);
        batch.n_tokens = 1;
        batch.tokens = &guesses[i];
    }
    return n_guesses;
}

static double speculate(llm_context *ctx, const llm_token *prompt, int n_prompt, llm_token *ids, int n,
                        llm_error *err) {
    static llm_token text[MAX_POSITIONS]; /* prompt and answer */
    llm_model *model = NULL;
    llm_sampler greedy = {0};
    double passes = 0, draft_passes = 0;
    int end = n_prompt;
    if (!strcmp(options.draft, "int8") && !draft &&
        load(&target_step, LLM_DTYPE_INT8, llm_context_n_ctx(ctx), &model, &draft, err))
        return 0;
    memcpy(text, prompt, (size_t)n_prompt * sizeof *text);
    if (llm_seq_truncate(ctx, 0, 0, err) || (draft && llm_seq_truncate(draft, 0, 0, err))) return 0;
    while (end < n_prompt + n) {
        /* The batch: what the model has not read yet (the prompt, or one token), then the guesses. We want the logits
           of the last token before the guesses and of all guesses. */
        int known = llm_seq_length(ctx, 0), left = n_prompt + n - end - 1, n_guesses = left < GUESSES ? left : GUESSES;
        bool wanted[MAX_POSITIONS] = {0};
        n_guesses =
            draft ? ask_draft(text, end, text + end, n_guesses, err) : look_up(text, end, text + end, n_guesses);
        llm_batch batch = {end - known + n_guesses, text + known, NULL, wanted};
        for (int i = 0; i <= n_guesses; i++) wanted[end - known - 1 + i] = true;
        if (err->code || llm_forward(ctx, &batch, err)) return 0;
        for (int i = 0, last = end - known - 1; i <= n_guesses; i++) {
            llm_token right = llm_sample(ctx, last + i, 0, &greedy);
            bool guessed = i < n_guesses && text[end] == right;
            text[end++] = right;
            if (!guessed) break;
        }
        /* Drop wrong guesses from both caches. Neither model has read the last token yet. */
        int draft_known = draft ? llm_seq_length(draft, 0) : 0;
        if (llm_seq_truncate(ctx, 0, end - 1, err)) return 0;
        if (draft && llm_seq_truncate(draft, 0, draft_known < end - 1 ? draft_known : end - 1, err)) return 0;
        passes++;
        draft_passes += draft ? n_guesses : 0;
    }
    memcpy(ids, text + n_prompt, (size_t)n * sizeof *ids);
    say("Mean Accepted: %.2f\n", n / passes - 1);
    return passes + draft_passes / 4; /* a pass of the draft reads a quarter of the bytes */
}

static const step target_step = {.name = "6 speculative", .n_batch = 128, .n_logits = 16, .generate = speculate};

int main(int argc, char **argv) { return walkthrough(argc, argv, &target_step); }
