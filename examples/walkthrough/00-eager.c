/*  00-eager.c - one operation at a time, one thread, floats.

    A numeric library works like this if it gets one operation after the other: each operation takes whole tensors,
    allocates a new one for its result, and does not know what comes next. The model reads one token at a time. */
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
    for (int i = 0; i < m->n; i++) weight->read_row(weight, i, m->w + (size_t)i * m->k);
}

/* ---- Tensors: each operation allocates a new one ---- */

typedef struct tensor {
    int rows, cols;
    float *at; /* [rows][cols] */
} tensor;

/* The tensors of a layer, which are freed at its end. (A real library counts references.) */
static float *made[64];
static int n_made;

static tensor new_tensor(int rows, int cols) {
    tensor t = {rows, cols, malloc((size_t)rows * cols * sizeof(float))};
    return t;
}

static tensor result(int rows, int cols) {
    tensor t = new_tensor(rows, cols);
    made[n_made++] = t.at;
    return t;
}

static void free_results(void) {
    while (n_made) free(made[--n_made]);
}

static tensor linear(const matrix *m, tensor x) {
    tensor y = result(1, m->n);
    for (int i = 0; i < m->n; i++) {
        float sum = 0;
        for (int j = 0; j < m->k; j++) sum += m->w[(size_t)i * m->k + j] * x.at[j];
        y.at[i] = sum;
    }
    return y;
}

static tensor rmsnorm(tensor x, const float *weight, float eps) {
    tensor y = result(1, x.cols);
    float squares = 0;
    for (int i = 0; i < x.cols; i++) squares += x.at[i] * x.at[i];
    float scale = 1 / sqrtf(squares / x.cols + eps);
    for (int i = 0; i < x.cols; i++) y.at[i] = x.at[i] * scale * weight[i];
    return y;
}

/* Copies some columns of a row: heads [n_heads][head_dim] of queries, keys or values. */
static tensor columns(tensor x, int first, int n_heads, int head_dim) {
    tensor y = result(n_heads, head_dim);
    memcpy(y.at, x.at + first, (size_t)n_heads * head_dim * sizeof(float));
    return y;
}

/* RoPE: rotates each pair of numbers i and i + half of a head by an angle that grows with the position. */
static tensor rotate(tensor heads, const model *m, int position) {
    int half = m->shape.rope_dim / 2;
    tensor y = columns(heads, 0, heads.rows, heads.cols);
    for (int h = 0; h < y.rows; h++) {
        float *head = y.at + h * y.cols;
        for (int i = 0; i < half; i++) {
            float c = m->cosines[position * half + i], s = m->sines[position * half + i];
            float a = head[i], b = head[i + half];
            head[i] = a * c - b * s;
            head[i + half] = a * s + b * c;
        }
    }
    return y;
}

/* Appends a row to the cache: allocates a new tensor and copies the old one into it. */
static tensor append(tensor cache, tensor row) {
    tensor y = new_tensor(cache.rows + 1, row.rows * row.cols);
    if (cache.rows) memcpy(y.at, cache.at, (size_t)cache.rows * y.cols * sizeof(float));
    memcpy(y.at + (size_t)cache.rows * y.cols, row.at, (size_t)y.cols * sizeof(float));
    free(cache.at);
    return y;
}

/* Several heads of queries share one head of keys and values. This copies it for each of them. */
static tensor repeat(tensor cache, int times, int head_dim) {
    tensor y = result(cache.rows, cache.cols * times);
    for (int p = 0; p < y.rows; p++)
        for (int h = 0; h < y.cols / head_dim; h++)
            memcpy(y.at + (size_t)p * y.cols + h * head_dim, cache.at + (size_t)p * cache.cols + h / times * head_dim,
                   (size_t)head_dim * sizeof(float));
    return y;
}

/* How well each head's query [n_heads][head_dim] matches the key at each position: [n_heads][positions]. */
static tensor scores(tensor queries, tensor keys) {
    tensor y = result(queries.rows, keys.rows);
    for (int h = 0; h < y.rows; h++) {
        for (int p = 0; p < y.cols; p++) {
            float sum = 0;
            for (int i = 0; i < queries.cols; i++)
                sum += queries.at[h * queries.cols + i] * keys.at[(size_t)p * keys.cols + h * queries.cols + i];
            y.at[h * y.cols + p] = sum / sqrtf((float)queries.cols);
        }
    }
    return y;
}

/* Turns each row into shares that sum to 1. */
static tensor softmax(tensor x) {
    tensor y = result(x.rows, x.cols);
    for (int r = 0; r < x.rows; r++) {
        float most = x.at[r * x.cols], sum = 0;
        for (int i = 1; i < x.cols; i++) most = fmaxf(most, x.at[r * x.cols + i]);
        for (int i = 0; i < x.cols; i++) sum += y.at[r * x.cols + i] = expf(x.at[r * x.cols + i] - most);
        for (int i = 0; i < x.cols; i++) y.at[r * x.cols + i] /= sum;
    }
    return y;
}

/* Mixes the values by these shares: [1][n_heads * head_dim]. */
static tensor mix(tensor shares, tensor values) {
    int head_dim = values.cols / shares.rows;
    tensor y = result(1, values.cols);
    for (int j = 0; j < values.cols; j++) {
        float sum = 0;
        for (int p = 0; p < values.rows; p++)
            sum += shares.at[j / head_dim * shares.cols + p] * values.at[(size_t)p * values.cols + j];
        y.at[j] = sum;
    }
    return y;
}

static tensor add(tensor a, tensor b) {
    tensor y = result(1, a.cols);
    for (int i = 0; i < a.cols; i++) y.at[i] = a.at[i] + b.at[i];
    return y;
}

static tensor silu(tensor x) {
    tensor y = result(x.rows, x.cols);
    for (int i = 0; i < x.cols; i++) y.at[i] = x.at[i] / (1 + expf(-x.at[i]));
    return y;
}

static tensor multiply(tensor a, tensor b) {
    tensor y = result(1, a.cols);
    for (int i = 0; i < a.cols; i++) y.at[i] = a.at[i] * b.at[i];
    return y;
}

/* ---- The forward pass ---- */

struct context {
    const model *m;
    tensor *keys, *values; /* [n_layers] of [positions so far][n_kv_heads * head_dim] */
    float *logits;         /* [n_vocab] */
};

static context *create_context(const model *m, int n_ctx, int n_batch, int n_logits) {
    context *c = allocate(sizeof *c);
    (void)n_ctx, (void)n_batch, (void)n_logits;
    c->m = m;
    c->keys = allocate((size_t)m->shape.n_layers * sizeof(tensor));
    c->values = allocate((size_t)m->shape.n_layers * sizeof(tensor));
    c->logits = floats((size_t)m->shape.n_vocab);
    return c;
}

static float *forward(context *c, const llm_backend_pass *pass) {
    const llm_backend_shape *s = &c->m->shape;
    int position = pass->positions[0], group = s->n_heads / s->n_kv_heads;
    tensor x = new_tensor(1, s->n_embd);
    memcpy(x.at, c->m->embedding.w + (size_t)pass->tokens[0] * s->n_embd, (size_t)s->n_embd * sizeof(float));
    for (int i = 0; i < s->n_layers; i++) {
        const layer *l = &c->m->layers[i];
        c->keys[i].rows = c->values[i].rows = position; /* drops later rows, if the sequence was truncated */
        tensor normed = rmsnorm(x, l->attention_norm, s->rms_eps);
        tensor qkv = linear(&l->qkv, normed);
        tensor queries = columns(qkv, 0, s->n_heads, s->head_dim);
        tensor keys = columns(qkv, s->n_heads * s->head_dim, s->n_kv_heads, s->head_dim);
        tensor values = columns(qkv, (s->n_heads + s->n_kv_heads) * s->head_dim, s->n_kv_heads, s->head_dim);
        c->keys[i] = append(c->keys[i], rotate(keys, c->m, position));
        c->values[i] = append(c->values[i], values);
        tensor shares = softmax(scores(rotate(queries, c->m, position), repeat(c->keys[i], group, s->head_dim)));
        tensor mixed = mix(shares, repeat(c->values[i], group, s->head_dim));
        tensor attended = add(x, linear(&l->out, mixed));
        tensor normed2 = rmsnorm(attended, l->ffn_norm, s->rms_eps);
        tensor gate_up = linear(&l->gate_up, normed2);
        tensor gates = columns(gate_up, 0, 1, s->n_ff), ups = columns(gate_up, s->n_ff, 1, s->n_ff);
        tensor y = add(attended, linear(&l->down, multiply(silu(gates), ups)));
        memcpy(x.at, y.at, (size_t)s->n_embd * sizeof(float));
        free_results();
    }
    if (pass->n_logits) {
        tensor logits = linear(&c->m->head, rmsnorm(x, c->m->output_norm, s->rms_eps));
        memcpy(c->logits, logits.at, (size_t)s->n_vocab * sizeof(float));
        free_results();
    }
    free(x.at);
    return c->logits;
}

int main(int argc, char **argv) { return walkthrough(argc, argv, &(step){.name = "0 eager"}); }
