/* llm_seq_shift and llm_generate_desc.shift: the keys that a shift moves against an independent rotation and against
   those of the shorter text, forks, a full cache, saving, ranks, conversations that outgrow their sequence.
   Variants: asan */
#include "tests/check.h"
#include "llm.h"
#include "tests/ranks.h"
#include "tests/tiny.h"
#include "tests/common.h"
#include <math.h>

static const tiny_spec SPEC = {2, 40, 56, 4, 2, 12, 512, 9, 0, 0, 11};
enum { N_VOCAB = 265, MOST = 512 };

static llm_token token_at(int n_vocab, int i) {
    return (llm_token)((uint32_t)(i * 104729 + 1) * 2654435761u % (uint32_t)n_vocab);
}

static void append(llm_context *ctx, int seq, const llm_token *tokens, int n) {
    static int seqs[MOST];
    llm_error err;
    assert_in_range(n, 1, MOST);
    for (int i = 0; i < n; i++) seqs[i] = seq;
    llm_batch batch = {n, tokens, seqs, NULL};
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
}

static void shift(llm_context *ctx, int seq, int begin, int n) {
    llm_error err;
    if (llm_seq_shift(ctx, seq, begin, n, &err)) fail_msg("%s", err.message);
}

/* A saved sequence; free it with free(b.at). */
static bytes save(llm_context *ctx, int seq) {
    bytes b = {NULL, llm_seq_save_size(ctx, seq)};
    b.at = (uint8_t *)malloc(b.n);
    assert_non_null(b.at);
    assert_int_equal(llm_seq_save(ctx, seq, b.at, b.n, NULL), LLM_OK);
    return b;
}

static void assert_same(bytes a, bytes b) {
    assert_int_equal(a.n, b.n);
    assert_memory_equal(a.at, b.at, a.n);
}

/* ---- Keys and values ---- */

/* What a saved sequence holds, read by its format: a header, the tokens, and for each block the keys and the values of
   each head of each layer, in tiles of 16 positions (keys) or of 16 dimensions (values). */
typedef struct held {
    bytes saved;
    int length, n_layers, n_heads, dim, stride;
    llm_dtype dtype;
    size_t head; /* bytes of the header and the tokens */
} held;

static held hold(llm_context *ctx, int seq, llm_dtype dtype, size_t empty) {
    llm_model_info info = llm_model_get_info(llm_context_model(ctx));
    held h = {.saved = save(ctx, seq), .length = llm_seq_length(ctx, seq), .dtype = dtype};
    h.n_layers = info.n_layers;
    h.n_heads = info.n_kv_heads;
    h.dim = info.head_dim;
    h.stride = (info.head_dim + 31) / 32 * 32;
    h.head = empty + (size_t)h.length * sizeof(llm_token);
    return h;
}

static size_t tile_bytes(llm_dtype dtype, int k) {
    return (size_t)k * 16 *
               (dtype == LLM_DTYPE_F32    ? 4
                : dtype == LLM_DTYPE_BF16 ? 2
                                          : 1) +
           (dtype == LLM_DTYPE_INT8 ? 64 : 0);
}

static float float_at(const uint8_t *at) {
    float x;
    memcpy(&x, at, 4);
    return x;
}

/* Number i of output `lane` of a tile of k numbers each. */
static double number_at(llm_dtype dtype, const uint8_t *tile, int k, int lane, int i) {
    if (dtype == LLM_DTYPE_F32) return float_at(tile + 4 * (i * 16 + lane));
    if (dtype == LLM_DTYPE_INT8)
        return (double)(int8_t)tile[i * 16 + lane] * float_at(tile + (size_t)k * 16 + 4 * (size_t)lane);
    uint8_t wide[4] = {0, 0, 0, 0};
    memcpy(wide + 2, tile + 2 * (i / 2 * 32 + lane * 2 + i % 2), 2);
    return float_at(wide);
}

/* The biases of the keys of a model with one layer. The cache holds keys without them. */
static float key_biases[64];

/* Reads them from a Hugging Face directory; zeros if there are none. */
static void read_biases(const char *folder) {
    static const char name[] = "\"model.layers.0.self_attn.k_proj.bias\":{\"dtype\":\"BF16\"";
    char path[128];
    memset(key_biases, 0, sizeof key_biases);
    if (strstr(folder, ".gguf")) return;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    bytes file = read_file(path);
    uint64_t n_header;
    memcpy(&n_header, file.at, 8);
    char *header = (char *)file.at + 8, *at;
    const uint8_t *data = file.at + 8 + n_header;
    header[n_header - 1] = 0; /* the last brace */
    unsigned long begin, end;
    if ((at = strstr(header, name)) != NULL) {
        at = strstr(at, "data_offsets");
        assert_int_equal(sscanf(at, "data_offsets\":[%lu,%lu]", &begin, &end), 2);
        assert_true((end - begin) / 2 <= 64);
        for (unsigned long i = 0; i < (end - begin) / 2; i++)
            memcpy((char *)&key_biases[i] + 2, data + begin + 2 * i, 2);
    }
    free(file.at);
}

/* Dimension d of a key, or of a value. */
static double entry(const held *h, bool value, int layer, int head, int position, int d) {
    size_t own = (size_t)h->stride / 16 * tile_bytes(h->dtype, 32) + (h->dtype == LLM_DTYPE_INT8 ? 128 : 0);
    int plane = (layer * h->n_heads + head) * 2 + value, n_planes = h->n_layers * h->n_heads * 2, place = position % 32;
    const uint8_t *at = h->saved.at + h->head + ((size_t)(position / 32) * (size_t)n_planes + (size_t)plane) * own;
    assert_true(at + own <= h->saved.at + h->saved.n);
    if (!value)
        return number_at(h->dtype, at + (size_t)(place / 16) * tile_bytes(h->dtype, h->stride), h->stride, place % 16,
                         d) +
               (layer ? 0 : key_biases[head * h->dim + d]);
    double x = number_at(h->dtype, at + (size_t)(d / 16) * tile_bytes(h->dtype, 32), 32, d % 16, place);
    return h->dtype == LLM_DTYPE_INT8 ? x * float_at(at + own - 128 + 4 * place) : x;
}

/* The largest number of a key, with or without its bias. */
static double largest(const held *h, int layer, int head, int position) {
    double most = 0;
    for (int d = 0; d < h->dim; d++) {
        double x = entry(h, false, layer, head, position, d), bias = layer ? 0 : key_biases[head * h->dim + d];
        most = fmax(most, fmax(fabs(x), fabs(x - bias)));
    }
    return most;
}

/* How far a number may be off after it was rounded before and after a rotation, and so was what it is compared with.
   bf16 rounds by up to 1/512 of a number, int8 by half of 1/127 of the largest in the key. */
static double allowed(const held *h, int layer, int head, int position) {
    return largest(h, layer, head, position) * (h->dtype == LLM_DTYPE_F32    ? 1e-5
                                                : h->dtype == LLM_DTYPE_BF16 ? 4.0 / 512
                                                                             : 4.0 / 254);
}

/* The angle by which the model turns a pair of dimensions over n positions, from the keys of the first layer, which
   depend on the token and the position alone: of one text with a gap, and of the same without it. */
static double angle_of(const held *gap, const held *none, int from, int to, int i, int half) {
    double cosine = 0, sine = 0;
    for (int head = 0; head < gap->n_heads; head++) {
        double a = entry(gap, false, 0, head, from, i), b = entry(gap, false, 0, head, from, i + half),
               x = entry(none, false, 0, head, to, i), y = entry(none, false, 0, head, to, i + half);
        cosine += a * x + b * y;
        sine += a * y - b * x;
    }
    return atan2(sine, cosine);
}

/* Removes n of 100 tokens from `begin` on. Values and what stands before must not change. Keys of the first layer must
   be those of the shorter text; those of the others must be turned by the same angles in float64, which come from a
   context with an f32 cache: `exact` has the text and `shorter` the shorter one. */
static void check_shift(const llm_model *model, llm_dtype dtype, int begin, int n, int rope_dim) {
    enum { LENGTH = 100 };
    llm_context_desc desc = {.n_ctx = 128, .n_seq = 2, .cache_dtype = dtype, .n_threads = 2}, plain = desc;
    plain.cache_dtype = LLM_DTYPE_F32;
    llm_context *ctx = create_context(model, &desc), *other = create_context(model, &plain);
    llm_token text[LENGTH];
    llm_model_info info = llm_model_get_info(model);
    size_t empty = llm_seq_save_size(ctx, 0);
    for (int i = 0; i < LENGTH; i++) text[i] = token_at(info.n_vocab, i);
    append(ctx, 0, text, LENGTH);
    append(other, 0, text, LENGTH);
    held before = hold(ctx, 0, dtype, empty), exact = hold(other, 0, LLM_DTYPE_F32, empty);
    memmove(text + begin, text + begin + n, (size_t)(LENGTH - begin - n) * sizeof *text);
    append(other, 1, text, LENGTH - n);
    append(ctx, 1, text, LENGTH - n);
    shift(ctx, 0, begin, n);
    held after = hold(ctx, 0, dtype, empty), fresh = hold(ctx, 1, dtype, empty),
         shorter = hold(other, 1, LLM_DTYPE_F32, empty);
    assert_int_equal(after.length, LENGTH - n);
    assert_memory_equal(llm_seq_tokens(ctx, 0), text, (size_t)(LENGTH - n) * sizeof *text);
    for (int at = 0; at < after.length; at++) {
        int from = at < begin ? at : at + n;
        for (int layer = 0; layer < after.n_layers; layer++)
            for (int head = 0; head < after.n_heads; head++) {
                for (int d = 0; d < after.dim; d++) {
                    bool turned = from > at && d < rope_dim;
                    assert_true(entry(&after, true, layer, head, at, d) == entry(&before, true, layer, head, from, d));
                    if (dtype != LLM_DTYPE_INT8 && !turned)
                        assert_true(entry(&after, false, layer, head, at, d) ==
                                    entry(&before, false, layer, head, from, d));
                    if (layer == 0)
                        assert_true(fabs(entry(&after, false, 0, head, at, d) - entry(&fresh, false, 0, head, at, d)) <=
                                    allowed(&after, 0, head, at));
                }
                for (int i = 0; i < rope_dim / 2 && from > at; i++) {
                    double angle = angle_of(&exact, &shorter, from, at, i, rope_dim / 2),
                           a = entry(&before, false, layer, head, from, i),
                           b = entry(&before, false, layer, head, from, i + rope_dim / 2),
                           x = entry(&after, false, layer, head, at, i),
                           y = entry(&after, false, layer, head, at, i + rope_dim / 2);
                    assert_true(hypot(x - (a * cos(angle) - b * sin(angle)), y - (a * sin(angle) + b * cos(angle))) <=
                                2 * allowed(&after, layer, head, at));
                }
            }
    }
    held all[] = {before, exact, after, fresh, shorter};
    for (int i = 0; i < 5; i++) free(all[i].saved.at);
    llm_context_free(ctx);
    llm_context_free(other);
}

static void check_model(const llm_model *model) {
    static const int gaps[][2] = {{0, 1}, {5, 32}, {32, 32}, {7, 45}, {33, 1}, {0, 64}, {1, 98}, {31, 34}};
    static const llm_dtype dtypes[] = {LLM_DTYPE_F32, LLM_DTYPE_BF16, LLM_DTYPE_INT8};
    llm_model_info info = llm_model_get_info(model);
    for (int t = 0; t < 3; t++)
        for (size_t i = 0; i < sizeof gaps / sizeof *gaps; i++)
            check_shift(model, dtypes[t], gaps[i][0], gaps[i][1], info.rope_dim);
}

/* Both orders of RoPE's pairs, all its scalings, biases and norms of keys, a sliding window. */
static void test_keys(void **state) {
    static const char *const names[] = {"llama",       "llama.gguf", "llama3",       "llama3.gguf", "linear",
                                        "linear.gguf", "yarn",       "yarn.gguf",    "yarn-mscale", "qwen2-yarn",
                                        "qwen2",       "qwen3.gguf", "mistral.gguf", "gqa"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[64];
        snprintf(path, sizeof path, "hf/%s", names[i]);
        llm_model *model = load_model(golden_path(path), &(llm_model_desc){.dtype = LLM_DTYPE_F32, .n_threads = 2});
        read_biases(golden_path(path));
        check_model(model);
        llm_model_free(model);
    }
    memset(key_biases, 0, sizeof key_biases);
}

/* Only some of a head's dimensions are rotated, and their number is not a multiple of 16. The key for that takes the
   place of another one of the same length, whose value is the default. */
static void test_partial(void **state) {
    static const char old[] = "llama.attention.key_length", key[] = "llama.rope.dimension_count";
    const tiny_spec spec = {2, 48, 56, 4, 2, 12, 512, 9, 0, 0, 11};
    const uint32_t dims = 8;
    size_t size;
    uint8_t *data = tiny_model(&spec, &size);
    int n_found = 0;
    (void)state;
    for (size_t at = 0; at + sizeof old + 8 < size; at++) {
        if (memcmp(data + at, old, sizeof old - 1)) continue;
        memcpy(data + at, key, sizeof key - 1);
        memcpy(data + at + sizeof key - 1 + 4, &dims, 4); /* the value follows its type */
        n_found++;
    }
    assert_int_equal(n_found, 1);
    llm_model *model = load_memory(data, size, &(llm_model_desc){.dtype = LLM_DTYPE_F32, .n_threads = 1});
    assert_int_equal(llm_model_get_info(model).rope_dim, 8);
    assert_int_equal(llm_model_get_info(model).head_dim, 12);
    check_model(model);
    free(data);
    llm_model_free(model);
}

/* ---- Sequences ---- */

static void fill(llm_token *tokens, int first, int n) {
    for (int i = 0; i < n; i++) tokens[i] = token_at(N_VOCAB, first + i);
}

static void test_arguments(void **state) {
    llm_context *ctx =
        create_context(load_tiny(&SPEC, LLM_DTYPE_F32), &(llm_context_desc){.n_ctx = 100, .n_seq = 2, .n_threads = 1});
    static const int bad[][3] = {{-1, 0, 1}, {2, 0, 1},  {0, -1, 1},         {0, 0, -1},        {0, 0, 71},
                                 {0, 71, 0}, {0, 70, 1}, {0, 1, 0x7FFFFFFF}, {0, 0x7FFFFFFF, 1}};
    llm_token text[70];
    llm_error err;
    (void)state;
    fill(text, 0, 70);
    append(ctx, 0, text, 70);
    bytes before = save(ctx, 0);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(llm_seq_shift(ctx, bad[i][0], bad[i][1], bad[i][2], &err), LLM_ERROR_ARGUMENT);
        assert_int_equal(err.code, LLM_ERROR_ARGUMENT);
    }
    shift(ctx, 0, 30, 0); /* nothing */
    shift(ctx, 0, 70, 0);
    shift(ctx, 1, 0, 0);
    bytes after = save(ctx, 0);
    assert_same(before, after);
    shift(ctx, 0, 40, 30); /* the end */
    assert_int_equal(llm_seq_length(ctx, 0), 40);
    append(ctx, 0, text + 40, 30);
    bytes again = save(ctx, 0);
    assert_int_equal(before.n, again.n);
    assert_memory_equal(before.at, again.at, 56 + 70 * sizeof(llm_token)); /* the same, and not marked */
    shift(ctx, 0, 0, 70);                                                  /* all */
    assert_int_equal(llm_seq_length(ctx, 0), 0);
    assert_int_equal(llm_context_n_free(ctx), llm_context_n_cache(ctx));
    free(before.at);
    free(after.at);
    free(again.at);
    close_context(ctx);
}

/* Nothing is lost if there is no room for copies of shared blocks. Blocks that are not shared need no room. */
static void test_no_room(void **state) {
    llm_context *ctx = create_context(load_tiny(&SPEC, LLM_DTYPE_F32),
                                      &(llm_context_desc){.n_ctx = 128, .n_seq = 2, .n_cache = 160, .n_threads = 1});
    llm_token text[128];
    llm_error err;
    (void)state;
    fill(text, 0, 128);
    append(ctx, 0, text, 128);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 128, NULL), LLM_OK);
    bytes before = save(ctx, 0);
    assert_int_equal(llm_seq_shift(ctx, 0, 20, 10, &err), LLM_ERROR_CONTEXT_FULL);
    assert_non_null(strstr(err.message, "128"));
    assert_int_equal(llm_context_n_free(ctx), 32);
    for (int seq = 0; seq < 2; seq++) {
        bytes after = save(ctx, seq);
        assert_same(before, after);
        free(after.at);
    }
    shift(ctx, 0, 32, 64); /* changes one block */
    assert_int_equal(llm_context_n_free(ctx), 0);
    bytes after = save(ctx, 1);
    assert_same(before, after);
    free(after.at);
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    append(ctx, 0, text, 32);
    assert_int_equal(llm_context_n_free(ctx), 0);
    shift(ctx, 1, 20, 10); /* in place */
    assert_int_equal(llm_seq_length(ctx, 1), 118);
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    assert_int_equal(llm_seq_truncate(ctx, 1, 0, NULL), LLM_OK);
    assert_int_equal(llm_context_n_free(ctx), 160);
    free(before.at);
    close_context(ctx);
}

/* A backend without the function is refused by its name, and nothing changes. */
static void test_unsupported(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_backend other = *llm_model_get_info(model).backend;
    llm_model_desc desc = {.dtype = LLM_DTYPE_F32, .n_threads = 1, .backend = &other};
    llm_error err;
    (void)state;
    llm_model_free(model);
    other.name = "other";
    other.shift = NULL;
    if (try_tiny(&model, &SPEC, desc, &err)) fail_msg("%s", err.message);
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 100, .n_threads = 1});
    llm_token text[70];
    fill(text, 0, 70);
    append(ctx, 0, text, 70);
    assert_int_equal(llm_seq_shift(ctx, 0, 5, 5, &err), LLM_ERROR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "\"other\""));
    llm_generate_desc generate = {.tokens = text, .n_tokens = 20, .max_tokens = 1, .shift = true};
    assert_int_equal(llm_generate(ctx, &generate, NULL, &err), LLM_ERROR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "\"other\""));
    assert_int_equal(llm_seq_length(ctx, 0), 70);
    assert_memory_equal(llm_seq_tokens(ctx, 0), text, sizeof text);
    close_context(ctx);
}

static uint32_t below(uint32_t *random, uint32_t n) {
    *random = *random * 1664525u + 1013904223u;
    return (uint32_t)((uint64_t)*random * n >> 32);
}

static void assert_same_logits(llm_context *a, int i, llm_context *b, int j) {
    const float *x = llm_logits(a, i), *y = llm_logits(b, j);
    assert_non_null(x);
    assert_non_null(y);
    assert_memory_equal(x, y, N_VOCAB * sizeof *x);
}

/* Three sequences that share blocks, with random forks, shifts, truncations and new tokens, against three contexts that
   share nothing. Both must give the same bits, and all blocks must be free in the end. */
static void test_random_operations(void **state) {
    enum { N_SEQ = 3, N_CTX = 160 };
    static const llm_dtype dtypes[] = {LLM_DTYPE_F32, LLM_DTYPE_BF16, LLM_DTYPE_INT8};
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    uint32_t random = 99;
    (void)state;
    for (int t = 0; t < 3; t++) {
        llm_context_desc desc = {.n_ctx = N_CTX, .n_seq = N_SEQ, .cache_dtype = dtypes[t], .n_threads = 2}, one = desc;
        one.n_seq = one.n_threads = 1;
        llm_context *ctx = create_context(model, &desc), *own[N_SEQ];
        for (int i = 0; i < N_SEQ; i++) own[i] = create_context(model, &one);
        for (int step = 0; step < 600; step++) {
            int seq = (int)below(&random, N_SEQ), parent = (int)below(&random, N_SEQ);
            uint32_t length = (uint32_t)llm_seq_length(ctx, seq), what = below(&random, 8);
            if (what < 3) {
                llm_token text[60];
                int n = 1 + (int)below(&random, below(&random, 3) ? 6 : 60);
                if ((int)length + n > N_CTX) continue;
                fill(text, (int)below(&random, 10000), n);
                append(ctx, seq, text, n);
                append(own[seq], 0, text, n);
                assert_same_logits(ctx, n - 1, own[seq], n - 1);
            } else if (what < 5) {
                int begin = (int)below(&random, length + 1), n = (int)below(&random, length - (uint32_t)begin + 1);
                if (llm_seq_shift(ctx, seq, begin, n, NULL)) continue; /* a full cache */
                shift(own[seq], 0, begin, n);
            } else if (what == 5) {
                assert_int_equal(llm_seq_truncate(ctx, seq, (int)length / 2, NULL), LLM_OK);
                assert_int_equal(llm_seq_truncate(own[seq], 0, (int)length / 2, NULL), LLM_OK);
            } else {
                int part = (int)below(&random, (uint32_t)llm_seq_length(ctx, parent) + 1);
                assert_int_equal(llm_seq_fork(ctx, seq, parent, part, NULL), LLM_OK);
                if (seq != parent) {
                    bytes all = save(own[parent], 0);
                    assert_int_equal(llm_seq_restore(own[seq], 0, all.at, all.n, NULL), LLM_OK);
                    free(all.at);
                }
                assert_int_equal(llm_seq_truncate(own[seq], 0, part, NULL), LLM_OK);
            }
            for (int i = 0; i < N_SEQ; i++) {
                assert_int_equal(llm_seq_length(ctx, i), llm_seq_length(own[i], 0));
                assert_memory_equal(llm_seq_tokens(ctx, i), llm_seq_tokens(own[i], 0),
                                    (size_t)llm_seq_length(ctx, i) * sizeof(llm_token));
                bytes a = save(ctx, i), b = save(own[i], 0);
                assert_memory_equal(a.at + 40, b.at + 40, 8); /* where the marks begin */
                free(a.at);
                free(b.at);
            }
        }
        for (int i = 0; i < N_SEQ; i++) {
            assert_int_equal(llm_seq_truncate(ctx, i, 0, NULL), LLM_OK);
            llm_context_free(own[i]);
        }
        assert_int_equal(llm_context_n_free(ctx), llm_context_n_cache(ctx));
        llm_context_free(ctx);
    }
    llm_model_free(model);
}

/* ---- Prompts ---- */

static llm_stats ask(llm_context *ctx, int seq, const llm_token *tokens, int n, bool shifts) {
    llm_generate_desc desc = {.tokens = tokens, .n_tokens = n, .seq = seq, .max_tokens = 1, .ignore_end = true};
    llm_stats stats;
    llm_error err;
    desc.shift = shifts;
    if (llm_generate(ctx, &desc, &stats, &err)) fail_msg("%s", err.message);
    return stats;
}

/* The last of 100 tokens, fed again, gives the logits of a context that never shifted. */
static void assert_exact(llm_context *ctx, int seq, const llm_token *text, llm_context *own) {
    assert_int_equal(llm_seq_truncate(ctx, seq, 99, NULL), LLM_OK);
    append(ctx, seq, text + 99, 1);
    append(own, 0, text, 100);
    assert_same_logits(ctx, 0, own, 99);
    assert_int_equal(llm_seq_truncate(own, 0, 0, NULL), LLM_OK);
}

/* What was shifted is reused for a prompt only by its own sequence and with `shift`. Everything else gives the bits of
   the shorter text. */
static void test_marks(void **state) {
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_context_desc desc = {.n_ctx = 200, .n_seq = 3, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc), *own = create_context(model, &desc);
    llm_token text[150];
    (void)state;
    fill(text, 0, 150);
    append(ctx, 0, text, 150);
    shift(ctx, 0, 40, 50);
    memmove(text + 40, text + 90, 60 * sizeof *text);
    bytes shifted = save(ctx, 0);
    assert_int_equal(ask(ctx, 1, text, 100, true).n_reused, 40); /* another sequence */
    assert_int_equal(llm_seq_restore(ctx, 0, shifted.at, shifted.n, NULL), LLM_OK);
    llm_stats stats = ask(ctx, 0, text, 100, true);
    assert_int_equal(stats.n_reused, 99);
    assert_int_equal(stats.n_shared, 0);
    assert_int_equal(llm_seq_restore(ctx, 0, shifted.at, shifted.n, NULL), LLM_OK);
    assert_int_equal(llm_seq_truncate(ctx, 1, 0, NULL), LLM_OK);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 100, NULL), LLM_OK);
    assert_int_equal(ask(ctx, 2, text, 100, false).n_reused, 40);
    assert_exact(ctx, 2, text, own);
    assert_int_equal(ask(ctx, 1, text, 100, true).n_reused, 99); /* a fork that the host made */
    assert_int_equal(llm_seq_truncate(ctx, 2, 0, NULL), LLM_OK);
    assert_int_equal(ask(ctx, 1, text, 100, false).n_reused, 40);
    assert_exact(ctx, 1, text, own);
    assert_int_equal(ask(ctx, 1, text, 100, false).n_reused, 99); /* now it has been computed */
    llm_question question = every_token(text, 100, 2);
    double a[2], b[2];
    llm_context *one = create_context(model, &desc), *clean = create_context(model, &desc);
    assert_int_equal(llm_seq_restore(one, 0, shifted.at, shifted.n, NULL), LLM_OK);
    assert_int_equal(llm_score(one, &question, 1, NULL, a, NULL, NULL), LLM_OK);
    assert_int_equal(llm_score(clean, &question, 1, NULL, b, NULL, NULL), LLM_OK);
    assert_memory_equal(a, b, sizeof a);
    for (size_t at = 40; at < 48; at++) { /* the mark is checked like everything else that is saved */
        shifted.at[at] ^= 1;
        assert_int_equal(llm_seq_restore(ctx, 0, shifted.at, shifted.n, NULL), LLM_ERROR_FORMAT);
        shifted.at[at] ^= 1;
    }
    free(shifted.at);
    llm_context_free(one);
    llm_context_free(clean);
    llm_context_free(ctx);
    llm_context_free(own);
    llm_model_free(model);
}

enum { TURNS = 30, N_MESSAGES = 2 * TURNS + 2 };

/* A conversation that outgrows its sequence. Adds up how many tokens of the turns' prompts were computed. `turn_most`
   is the most of a turn. */
static void chat(llm_context *ctx, bool shifts, int n_ctx, int *computed, int *turn_most, int *n_changes) {
    static char contents[N_MESSAGES][64];
    llm_message messages[N_MESSAGES] = {{"system", "Be brief."}};
    int n_messages = 1, left_out = 0;
    *computed = *turn_most = *n_changes = 0;
    for (int turn = 0; turn < TURNS; turn++) {
        llm_generate_desc desc = {.messages = messages, .max_tokens = 5, .ignore_end = true, .keep_free = 20};
        llm_stats stats;
        llm_error err;
        snprintf(contents[n_messages], sizeof *contents, "%d: a question that is a bit longer", turn);
        messages[n_messages] = (llm_message){"user", contents[n_messages]};
        desc.n_messages = ++n_messages;
        desc.shift = shifts;
        if (llm_generate(ctx, &desc, &stats, &err)) fail_msg("%s", err.message);
        int n = stats.n_prompt - stats.n_reused;
        assert_true(stats.n_prompt <= n_ctx - 20);
        assert_int_equal(llm_seq_length(ctx, 0), stats.n_prompt + 4);
        if (turn && n > *turn_most) *turn_most = n;
        *computed += n;
        *n_changes += stats.n_left_out > left_out;
        left_out = stats.n_left_out;
        snprintf(contents[n_messages], sizeof *contents, "answer %d", turn);
        messages[n_messages] = (llm_message){"assistant", contents[n_messages]};
        n_messages++;
    }
}

/* With `shift` every turn costs only its own tokens, and the answer before it, also when turns are left out. The random
   model's answers are not the ones that stand in the messages. */
static void test_chat(void **state) {
    llm_context *ctx =
        create_context(load_tiny(&SPEC, LLM_DTYPE_F32), &(llm_context_desc){.n_ctx = 400, .n_threads = 1});
    int computed[2], most[2], n_changes[2];
    llm_stats stats;
    llm_error err;
    (void)state;
    for (int i = 0; i < 2; i++) {
        chat(ctx, i == 1, 400, &computed[i], &most[i], &n_changes[i]);
        assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    }
    assert_true(n_changes[0] > 2);
    assert_int_equal(n_changes[1], n_changes[0]);
    assert_true(most[0] > 180);
    assert_true(most[1] < 140);
    assert_true(computed[1] < computed[0]);
    static const llm_message message = {"user", "a"};
    llm_generate_desc desc = {.messages = &message, .n_messages = 1, .max_tokens = 1, .keep_free = 20, .shift = true};
    desc.seq = LLM_SEQ_ANY;
    assert_int_equal(llm_generate(ctx, &desc, &stats, &err), LLM_ERROR_ARGUMENT);
    assert_non_null(strstr(err.message, "LLM_SEQ_ANY"));
    close_context(ctx);
}

/* If a fork has the sequence's blocks and there is no room for copies, the turns are computed, as without `shift`. */
static void test_chat_no_room(void **state) {
    enum { N_CTX = 256, FORK = 128 };
    static char contents[12][64];
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_F32);
    llm_message messages[12] = {{"system", "Be brief."}};
    (void)state;
    for (int n = 1; n < 6; n++) {
        snprintf(contents[n], sizeof *contents, "%d: some", n);
        messages[n] = (llm_message){n % 2 ? "user" : "assistant", contents[n]};
    }
    for (int i = 0; i < 2; i++) {
        llm_context *ctx = create_context(
            model, &(llm_context_desc){.n_ctx = N_CTX, .n_seq = 2, .n_cache = i ? 512 : 256, .n_threads = 1});
        llm_context *own = create_context(model, &(llm_context_desc){.n_ctx = N_CTX, .n_threads = 1});
        llm_generate_desc desc = {.messages = messages, .n_messages = 6, .max_tokens = 1, .ignore_end = true};
        llm_stats stats;
        llm_error err;
        if (llm_generate(ctx, &desc, &stats, &err)) fail_msg("%s", err.message);
        assert_in_range(stats.n_prompt, 225, 256);
        assert_int_equal(llm_seq_fork(ctx, 1, 0, FORK, NULL), LLM_OK);
        bytes before = save(ctx, 1);
        desc.keep_free = N_CTX - 128;
        desc.shift = true;
        if (llm_generate(ctx, &desc, &stats, &err)) fail_msg("%s", err.message);
        assert_true(stats.n_left_out > 0);
        assert_true(i ? stats.n_reused == stats.n_prompt - 1 : stats.n_reused < 60);
        assert_int_equal(err.code, LLM_OK);
        if (i == 0) {
            const llm_token last = llm_seq_tokens(ctx, 0)[stats.n_prompt - 1];
            append(own, 0, llm_seq_tokens(ctx, 0), stats.n_prompt);
            assert_int_equal(llm_seq_truncate(ctx, 0, stats.n_prompt - 1, NULL), LLM_OK);
            append(ctx, 0, &last, 1);
            assert_same_logits(ctx, 0, own, stats.n_prompt - 1);
        }
        bytes after = save(ctx, 1);
        assert_same(before, after);
        free(before.at);
        free(after.at);
        llm_context_free(own);
        llm_context_free(ctx);
    }
    llm_model_free(model);
}

/* ---- Ranks ---- */

typedef struct ranks_job {
    bool tensor;
    const void *file;
    size_t size;
    bytes expected;
} ranks_job;

static bytes shifted_text(const llm_model *model) {
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 160, .n_seq = 2, .n_threads = 1});
    llm_token text[150];
    bytes saved = {NULL, 0};
    fill(text, 0, 150);
    llm_batch batch = {150, text, NULL, NULL}, last = {1, text, NULL, NULL};
    RANK_CHECK(!llm_forward(ctx, &batch, NULL) && !llm_seq_fork(ctx, 1, 0, 150, NULL), "forward or fork");
    RANK_CHECK(!llm_seq_shift(ctx, 0, 40, 50, NULL) && !llm_forward(ctx, &last, NULL), "shift or forward");
    saved.n = llm_seq_save_size(ctx, 0);
    saved.at = (uint8_t *)malloc(saved.n);
    RANK_CHECK(saved.at && !llm_seq_save(ctx, 0, saved.at, saved.n, NULL), "save");
    llm_context_free(ctx);
    return saved;
}

static void run_rank(llm_comm *comm, void *arg) {
    const ranks_job *job = (const ranks_job *)arg;
    llm_model_desc desc = {.dtype = LLM_DTYPE_F32, .n_threads = 1};
    llm_model *model = NULL;
    llm_error err;
    if (job->tensor) desc.tensor = comm;
    else desc.pipeline = comm;
    RANK_CHECK(!llm_model_load_memory(&model, job->file, job->size, &desc, &err), err.message);
    bytes saved = shifted_text(model);
    RANK_CHECK(saved.n == job->expected.n && !memcmp(saved.at, job->expected.at, saved.n), "a rank differs");
    free(saved.at);
    llm_model_free(model);
}

static void test_ranks(void **state) {
    tiny_spec spec = SPEC;
    ranks_job job;
    (void)state;
    spec.head_dim = 16;
    uint8_t *data = tiny_model(&spec, &job.size);
    job.file = data;
    llm_model *model = load_tiny(&spec, LLM_DTYPE_F32);
    job.expected = shifted_text(model);
    for (int i = 0; i < 2; i++) {
        job.tensor = i == 1;
        on_ranks(2, NULL, run_rank, &job);
    }
    free(job.expected.at);
    free(data);
    llm_model_free(model);
}

/* ---- A real model ---- */

/* The mean negative log-likelihood of tokens [from, end) of a text, of which the sequence holds those before. The first
   one is fed but not counted. */
static double loss_of(llm_context *ctx, const llm_token *text, int from, int end) {
    static bool all[MOST];
    llm_batch batch = {end - from, text + from, NULL, all};
    double sum = 0;
    for (int i = 0; i < end - from; i++) all[i] = true;
    assert_int_equal(llm_forward(ctx, &batch, NULL), LLM_OK);
    int n_vocab = llm_tokenizer_n_vocab(llm_model_tokenizer(llm_context_model(ctx)));
    for (int i = from; i + 1 < end; i++) {
        const float *logits = llm_logits(ctx, i - from);
        double most = -INFINITY, total = 0;
        assert_non_null(logits);
        for (int v = 0; v < n_vocab; v++) most = fmax(most, logits[v]);
        for (int v = 0; v < n_vocab; v++) total += exp(logits[v] - most);
        sum += most + log(total) - logits[text[i + 1]];
    }
    return sum / (end - from - 1);
}

/* Texts of which a part is removed go on about as well after a shift as after computing the rest again: the perplexity
   of what follows is within a twentieth. */
static void test_text(void **state) {
    enum { N = 480, BEGIN = 37, GAP = 200, HELD = 352, N_TEXTS = 4, EVERY = 1392 };
    llm_model *model = load_model(model_path(), NULL);
    static const llm_dtype dtypes[] = {LLM_DTYPE_BF16, LLM_DTYPE_INT8};
    bytes file = read_file(golden_path("heldout.txt"));
    static llm_token ids[50000];
    llm_error err;
    (void)state;
    int64_t n = llm_encode(llm_model_tokenizer(model), (const char *)file.at, file.n, 0, ids, 50000, &err);
    assert_in_range(n, (N_TEXTS - 1) * EVERY + N, 50000);
    for (int t = 0; t < 2; t++) {
        llm_context *ctx = create_context(
            model, &(llm_context_desc){.n_ctx = 512, .n_batch = 512, .n_logits = 512, .cache_dtype = dtypes[t]});
        double shifted = 0, computed = 0;
        for (int i = 0; i < N_TEXTS; i++) {
            llm_token text[N];
            memcpy(text, ids + i * EVERY, sizeof text);
            append(ctx, 0, text, HELD);
            shift(ctx, 0, BEGIN, GAP);
            shifted += loss_of(ctx, text, HELD, N) / N_TEXTS;
            memmove(text + BEGIN, text + BEGIN + GAP, (N - BEGIN - GAP) * sizeof *text);
            assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
            append(ctx, 0, text, HELD - GAP);
            computed += loss_of(ctx, text, HELD - GAP, N - GAP) / N_TEXTS;
            assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
        }
        printf("# perplexity after a shift %.3f, computed again %.3f\n", exp(shifted), exp(computed));
        assert_true(fabs(shifted - computed) < 0.05);
        llm_context_free(ctx);
    }
    free(file.at);
    llm_model_free(model);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_keys),    cmocka_unit_test(test_partial),     cmocka_unit_test(test_arguments),
        cmocka_unit_test(test_no_room), cmocka_unit_test(test_unsupported), cmocka_unit_test(test_random_operations),
        cmocka_unit_test(test_marks),   cmocka_unit_test(test_chat),        cmocka_unit_test(test_chat_no_room),
        cmocka_unit_test(test_ranks),   cmocka_unit_test(test_text)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
