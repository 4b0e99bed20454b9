/* Small random models, written as GGUF into memory, for tests that need many shapes and no downloads.
   The weights come from a fixed integer generator, so every machine makes the same file. */
#ifndef TINY_H
#define TINY_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct tiny_spec {
    int n_layers, n_embd, n_ff, n_heads, n_kv_heads, head_dim, n_ctx;
    int n_extra;   /* tokens after the 256 bytes; the last two are <|end|> (EOS) and <|start|> (BOS) */
    int untied;    /* 1: the file has output.weight */
    uint32_t type; /* of the matrices: 0 F32, 1 F16, 2 Q4_0, 3 Q4_1, 6 Q5_0, 7 Q5_1, 8 Q8_0, 10 to 14 Q2_K to Q6_K,
                      20 IQ4_NL, 23 IQ4_XS, 30 BF16, or TINY_MIXED, TINY_IQ4, TINY_SPARSE or TINY_ALL_SPARSE; blocks
                      need dims of 32, those of K types and of IQ4_XS of 256 */
    uint32_t seed;
} tiny_spec;

/* TINY_MIXED: the matrices of two layers have different types, see tiny_mixed_type. TINY_SPARSE: F32, and at least two of
   each four weights of the layers' matrices are zero. TINY_ALL_SPARSE: the same of all matrices. */
enum { TINY_MIXED = 99, TINY_IQ4 = 98, TINY_SPARSE = 97, TINY_ALL_SPARSE = 96 };
static const tiny_spec TINY_ALL_TYPES = {2, 256, 256, 4, 2, 64, 512, 43, 1, TINY_MIXED, 1};

/* IQ4_NL and IQ4_XS, mixed in queries, keys and values, and in gates and ups. */
static const tiny_spec TINY_IQ4_TYPES = {2, 256, 256, 4, 2, 64, 512, 43, 1, TINY_IQ4, 1};

/* Dimensions that are not multiples of 16. */
static const tiny_spec TINY_ODD = {2, 72, 100, 6, 2, 20, 512, 43, 0, 0, 1};

/* The same, with 2:4 sparsity. */
static const tiny_spec TINY_2_4 = {2, 72, 100, 6, 2, 20, 512, 43, 0, TINY_SPARSE, 1};

typedef struct tiny_file {
    uint8_t *data;
    size_t size, room;
    size_t tensor_bytes; /* bytes of the tensors described so far */
    int n_padding;       /* rows of the embedding beyond the vocabulary */
    uint32_t random;
} tiny_file;

static void tiny_put(tiny_file *f, const void *bytes, size_t n) {
    while (f->size + n > f->room) {
        f->room = f->room ? 2 * f->room : 65536;
        f->data = (uint8_t *)realloc(f->data, f->room);
        if (!f->data) abort();
    }
    memcpy(f->data + f->size, bytes, n);
    f->size += n;
}

static void tiny_u32(tiny_file *f, uint32_t x) { tiny_put(f, &x, 4); }
static void tiny_u64(tiny_file *f, uint64_t x) { tiny_put(f, &x, 8); }
static void tiny_f32(tiny_file *f, float x) { tiny_put(f, &x, 4); }

static void tiny_str(tiny_file *f, const char *s) {
    tiny_u64(f, strlen(s));
    tiny_put(f, s, strlen(s));
}

static void tiny_key_u32(tiny_file *f, const char *key, uint32_t x) {
    tiny_str(f, key);
    tiny_u32(f, 4);
    tiny_u32(f, x);
}

static void tiny_key_f32(tiny_file *f, const char *key, float x) {
    tiny_str(f, key);
    tiny_u32(f, 6);
    tiny_f32(f, x);
}

static void tiny_key_str(tiny_file *f, const char *key, const char *s) {
    tiny_str(f, key);
    tiny_u32(f, 8);
    tiny_str(f, s);
}

static void tiny_key_array(tiny_file *f, const char *key, uint32_t type, uint64_t n) {
    tiny_str(f, key);
    tiny_u32(f, 9);
    tiny_u32(f, type);
    tiny_u64(f, n);
}

/* Uniform in [-1, 1), by a linear congruential generator. */
static float tiny_random(tiny_file *f) {
    f->random = f->random * 1664525u + 1013904223u;
    return (float)(int32_t)f->random / 2147483648.0f;
}

/* Writes a byte as the byte-level alphabet does: printable bytes as themselves, the others from U+0100 on. */
static void tiny_byte_piece(int byte, char out[3]) {
    int code = 256;
    if ((byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174) code = byte;
    else
        for (int i = 0; i < byte; i++) code += !((i >= 33 && i <= 126) || (i >= 161 && i <= 172) || i >= 174);
    if (code < 128) {
        out[0] = (char)code;
        out[1] = 0;
    } else {
        out[0] = (char)(0xC0 | code >> 6);
        out[1] = (char)(0x80 | (code & 63));
        out[2] = 0;
    }
}

static const char *tiny_start = "<|start|>"; /* the text of BOS; a test may set another */
static int tiny_window;                      /* a sliding window in positions, which a test may set; 0: none */

static void tiny_vocabulary(tiny_file *f, const tiny_spec *s) {
    int n = 256 + s->n_extra;
    char piece[32];
    tiny_key_str(f, "tokenizer.ggml.model", "gpt2");
    tiny_key_str(f, "tokenizer.ggml.pre", "gpt-2");
    tiny_key_array(f, "tokenizer.ggml.tokens", 8, (uint64_t)n);
    for (int i = 0; i < n; i++) {
        if (i < 256) tiny_byte_piece(i, piece);
        else if (i == n - 2) strcpy(piece, "<|end|>");
        else if (i == n - 1) snprintf(piece, sizeof piece, "%s", tiny_start);
        else if (i == 256) strcpy(piece, "aa");
        else snprintf(piece, sizeof piece, "a%c%c", 'a' + (i - 256) / 26 % 26, 'a' + (i - 256) % 26);
        tiny_str(f, piece);
    }
    tiny_key_array(f, "tokenizer.ggml.token_type", 5, (uint64_t)n);
    for (int i = 0; i < n; i++) tiny_u32(f, i >= n - 2 ? 3 : 1);
    tiny_key_array(f, "tokenizer.ggml.merges", 8, 1);
    tiny_str(f, "a a");
    tiny_key_u32(f, "tokenizer.ggml.eos_token_id", (uint32_t)n - 2);
    tiny_key_u32(f, "tokenizer.ggml.bos_token_id", (uint32_t)n - 1);
    tiny_key_str(f, "tokenizer.chat_template",
                 "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
                 "'<|im_end|>' + '\n'}}"
                 "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}");
}

static int tiny_block_weights(uint32_t type) { return (type >= 10 && type < 15) || type == 23 ? 256 : 32; }

static size_t tiny_row_bytes(uint32_t type, int cols) {
    switch (type) {
    case 1:
    case 30: return (size_t)cols * 2;
    case 2: return (size_t)cols / 32 * 18;
    case 3: return (size_t)cols / 32 * 20;
    case 6: return (size_t)cols / 32 * 22;
    case 7: return (size_t)cols / 32 * 24;
    case 8: return (size_t)cols / 32 * 34;
    case 10: return (size_t)cols / 256 * 84;
    case 11: return (size_t)cols / 256 * 110;
    case 12: return (size_t)cols / 256 * 144;
    case 13: return (size_t)cols / 256 * 176;
    case 14: return (size_t)cols / 256 * 210;
    case 20: return (size_t)cols / 32 * 18;
    case 23: return (size_t)cols / 256 * 136;
    default: return (size_t)cols * 4;
    }
}

/* Gates and ups have different types, and so have queries, keys and values. Types with few bits follow types with
   many. */
static uint32_t tiny_mixed_type(const char *name) {
    static const struct {
        const char *name;
        uint32_t type;
    } types[] = {{"blk.0.attn_q.", 12},      {"blk.0.attn_k.", 6},      {"blk.0.attn_v.", 14},
                 {"blk.0.attn_output.", 13}, {"blk.0.ffn_gate.", 2},    {"blk.0.ffn_up.", 7},
                 {"blk.0.ffn_down.", 11},    {"blk.1.attn_q.", 10},     {"blk.1.attn_k.", 30},
                 {"blk.1.attn_v.", 8},       {"blk.1.attn_output.", 1}, {"blk.1.ffn_gate.", 30},
                 {"blk.1.ffn_up.", 30},      {"blk.1.ffn_down.", 3},    {"output.", 14}};
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (!strncmp(name, types[i].name, strlen(types[i].name))) return types[i].type;
    return 12;
}

static uint32_t tiny_type(const tiny_spec *s, const char *name, int rows) {
    if (rows == 1) return 0;
    if (s->type == TINY_IQ4) return strstr(name, "attn_k") || strstr(name, "ffn_gate") ? 20 : 23;
    if (s->type == TINY_SPARSE || s->type == TINY_ALL_SPARSE) return 0;
    return s->type == TINY_MIXED ? tiny_mixed_type(name) : s->type;
}

static void tiny_describe(tiny_file *f, const tiny_spec *s, const char *name, int rows, int cols) {
    size_t bytes = (size_t)rows * tiny_row_bytes(tiny_type(s, name, rows), cols);
    tiny_str(f, name);
    tiny_u32(f, rows == 1 ? 1 : 2);
    tiny_u64(f, (uint64_t)cols);
    if (rows > 1) tiny_u64(f, (uint64_t)rows);
    tiny_u32(f, tiny_type(s, name, rows));
    tiny_u64(f, f->tensor_bytes);
    f->tensor_bytes += (bytes + 31) / 32 * 32;
}

/* Writes a block of random bits after a scale (and a minimum) that keeps the weights near 1 / sqrt(cols). */
static void tiny_block(tiny_file *f, uint32_t type, float scale) {
    uint16_t half = (uint16_t)(scale > 0.02f ? 0x2000 : 0x1C00), minimum = (uint16_t)((half + 0x0C00) | 0x8000);
    tiny_put(f, &half, 2);
    if (type == 3) tiny_put(f, &minimum, 2);
    for (int i = 0; i < (type == 8 ? 32 : 16); i++) {
        tiny_random(f);
        uint8_t byte = (uint8_t)(type == 8 ? (f->random >> 24) % 31 - 15 : f->random >> 24);
        tiny_put(f, &byte, 1);
    }
}

/* Converts x >= 2^-14 to f16, rounded towards 0. */
static uint16_t tiny_half(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)(((bits >> 23) - 112) << 10 | (bits >> 13 & 1023));
}

/* The same for the K and IQ4 types. Everything is random except d, which makes the largest weight about `scale`, and
   the minimum, which makes the mean about 0. */
static void tiny_other_block(tiny_file *f, uint32_t type, float scale) {
    const float largest = type == 6    ? 16
                          : type == 7  ? 31
                          : type == 10 ? 45
                          : type == 11 ? 128
                          : type == 12 ? 945
                          : type == 13 ? 1953
                          : type == 20 ? 127
                                       : 4096;
    size_t bytes = tiny_row_bytes(type, tiny_block_weights(type)), d = type == 10   ? 80
                                                                       : type == 11 ? 108
                                                                       : type == 14 ? 208
                                                                                    : 0;
    float unit = scale / largest * (type == 7 || type == 10 || type == 12 || type == 13 ? 2 : 1);
    uint16_t half = tiny_half(unit < 6.2e-5f ? 6.2e-5f : unit), minimum = 0;
    if (type == 7) minimum = (uint16_t)(tiny_half(scale) | 0x8000);
    if (type == 10) minimum = tiny_half(unit * 1.5f);
    if (type == 12) minimum = tiny_half(unit * 7.5f);
    if (type == 13) minimum = tiny_half(unit * 15.5f);
    for (size_t i = 0; i < bytes; i++) {
        tiny_random(f);
        uint8_t byte = (uint8_t)(f->random >> 24);
        uint16_t number = i < d + 2 ? half : minimum;
        if (i >= d && (i < d + 2 || (minimum && i < d + 4))) byte = (uint8_t)((i - d) % 2 ? number >> 8 : number & 255);
        tiny_put(f, &byte, 1);
    }
}

/* True if TINY_SPARSE or TINY_ALL_SPARSE makes weight i zero. */
static int tiny_is_zero(const tiny_spec *s, const char *name, int rows, int cols, int i) {
    static const uint8_t kept[] = {3, 5, 6, 9, 10, 12, 8, 0};
    int place = i % cols % 4, first = i - place;
    if (rows == 1 || (s->type != TINY_ALL_SPARSE && (s->type != TINY_SPARSE || strncmp(name, "blk.", 4)))) return 0;
    return !(kept[(first / 4 * 5 + first / 36) % 8] >> place & 1);
}

static void tiny_tensor(tiny_file *f, const tiny_spec *s, const char *name, int rows, int cols) {
    uint32_t type = tiny_type(s, name, rows);
    float scale = 1.7f / 10.0f;
    static const uint8_t zeros[32] = {0};
    while (scale * scale * (float)cols > 3.0f) scale *= 0.9f; /* about sqrt(3 / cols), without sqrt */
    for (int i = 0; i < rows * cols && (type < 2 || type == 30); i++) {
        float x = rows == 1 ? 1.0f + 0.2f * tiny_random(f) : scale * tiny_random(f);
        uint32_t bits;
        if (tiny_is_zero(s, name, rows, cols, i)) x = 0;
        memcpy(&bits, &x, 4);
        uint16_t bf16 = (uint16_t)(bits >> 16);
        uint16_t f16 =
            (uint16_t)((bits >> 16 & 0x8000) |
                       (((bits >> 23 & 255) < 113 ? 0 : ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023))));
        if (type == 0) tiny_put(f, &bits, 4);
        else tiny_put(f, type == 1 ? &f16 : &bf16, 2);
    }
    for (int i = 0; i < rows * cols / 32 && (type == 2 || type == 3 || type == 8); i++) tiny_block(f, type, scale);
    for (int i = 0; i < rows * cols / 32; i += tiny_block_weights(type) / 32)
        if (type == 6 || type == 7 || (type >= 10 && type < 30)) tiny_other_block(f, type, scale);
    size_t bytes = (size_t)rows * tiny_row_bytes(type, cols);
    tiny_put(f, zeros, (32 - bytes % 32) % 32);
}

static void tiny_tensors(tiny_file *f, const tiny_spec *s,
                         void (*each)(tiny_file *, const tiny_spec *, const char *, int, int)) {
    int q = s->n_heads * s->head_dim, kv = s->n_kv_heads * s->head_dim, e = s->n_embd;
    const struct {
        const char *name;
        int rows, cols;
    } layer[] = {{"attn_norm", 1, e},      {"attn_q", q, e},       {"attn_k", kv, e},
                 {"attn_v", kv, e},        {"attn_output", e, q},  {"ffn_norm", 1, e},
                 {"ffn_gate", s->n_ff, e}, {"ffn_up", s->n_ff, e}, {"ffn_down", e, s->n_ff}};
    char name[64];
    each(f, s, "token_embd.weight", 256 + s->n_extra + f->n_padding, e);
    for (int i = 0; i < s->n_layers; i++)
        for (size_t j = 0; j < sizeof layer / sizeof *layer; j++) {
            snprintf(name, sizeof name, "blk.%d.%s.weight", i, layer[j].name);
            each(f, s, name, layer[j].rows, layer[j].cols);
        }
    each(f, s, "output_norm.weight", 1, e);
    if (s->untied) each(f, s, "output.weight", 256 + s->n_extra + f->n_padding, e);
}

/* Makes the file. The embedding has n_padding more rows than the vocabulary has tokens. Free the result with free(). */
static uint8_t *tiny_padded(const tiny_spec *s, int n_padding, size_t *size) {
    tiny_file f;
    static const uint8_t zeros[32] = {0};
    memset(&f, 0, sizeof f);
    f.random = s->seed;
    f.n_padding = n_padding;
    tiny_put(&f, "GGUF", 4);
    tiny_u32(&f, 3);
    tiny_u64(&f, (uint64_t)(2 + 9 * s->n_layers + s->untied));
    tiny_u64(&f, tiny_window ? 21 : 20);
    tiny_key_str(&f, "general.architecture", "llama");
    tiny_key_str(&f, "general.name", "tiny");
    tiny_key_u32(&f, "llama.block_count", (uint32_t)s->n_layers);
    tiny_key_u32(&f, "llama.embedding_length", (uint32_t)s->n_embd);
    tiny_key_u32(&f, "llama.feed_forward_length", (uint32_t)s->n_ff);
    tiny_key_u32(&f, "llama.attention.head_count", (uint32_t)s->n_heads);
    tiny_key_u32(&f, "llama.attention.head_count_kv", (uint32_t)s->n_kv_heads);
    tiny_key_u32(&f, "llama.attention.key_length", (uint32_t)s->head_dim);
    tiny_key_u32(&f, "llama.attention.value_length", (uint32_t)s->head_dim);
    tiny_key_u32(&f, "llama.context_length", (uint32_t)s->n_ctx);
    if (tiny_window) tiny_key_u32(&f, "llama.attention.sliding_window", (uint32_t)tiny_window);
    tiny_key_f32(&f, "llama.attention.layer_norm_rms_epsilon", 1e-5f);
    tiny_key_f32(&f, "llama.rope.freq_base", 10000.0f);
    tiny_vocabulary(&f, s);
    tiny_tensors(&f, s, tiny_describe);
    tiny_put(&f, zeros, (32 - f.size % 32) % 32);
    tiny_tensors(&f, s, tiny_tensor);
    *size = f.size;
    return f.data;
}

static uint8_t *tiny_model(const tiny_spec *s, size_t *size) { return tiny_padded(s, 0, size); }

#endif
