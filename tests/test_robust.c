/* Nothing crashes the host: damaged files, failing allocations, cancelled loads, many threads. Every failure gives a
   status and a message, and leaks nothing.
   Variants: asan tsan cross */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

#include <pthread.h>

/* Small, so that thousands of loads take seconds. */
static const tiny_spec SMALL = {1, 32, 40, 2, 1, 16, 64, 5, 0, 0, 3};
/* Large enough that memory missing from an estimate would be noticed. */
static const tiny_spec LARGE = {3, 256, 704, 8, 4, 32, 1024, 500, 1, 0, 5};

/* ---- Loading ---- */

/* Loads from memory. If that fails, there must be a message and no leak. */
static llm_model *load(heap *h, const uint8_t *data, size_t size, llm_error *err) {
    llm_model_desc desc = {.dtype = LLM_DTYPE_F32, .n_threads = 1, .host = heap_host(h)};
    llm_model *model = (llm_model *)(uintptr_t)1;
    memset(err, 0xEE, sizeof *err);
    llm_status status = llm_model_load_memory(&model, data, size, &desc, err);
    if (!status) {
        assert_non_null(model);
        return model;
    }
    assert_null(model);
    assert_explained(status, err);
    assert_all_returned(h);
    return NULL;
}

/* Generates with a model from a damaged file. This may fail, but only with a message. */
static void use(const llm_model *model) {
    llm_context_desc desc = {.n_ctx = 40, .n_batch = 8, .n_threads = 1};
    llm_sampler sampler = {.temperature = 1, .top_p = 0.9f, .repeat_penalty = 1.1f};
    llm_generate_desc generate = {.prompt = "aab\xFF", .max_tokens = 4, .sampler = &sampler};
    llm_context *ctx = NULL;
    llm_error err;
    llm_status status = llm_context_create(&ctx, model, &desc, &err);
    if (!status) status = llm_generate(ctx, &generate, NULL, &err);
    if (status) assert_explained(status, &err);
    llm_context_free(ctx);
}

/* Loads, uses and frees a copy of the file in memory of exactly its size. Returns true if it loaded. */
static bool try_file(const uint8_t *data, size_t size, llm_error *err) {
    heap h = {0};
    uint8_t *copy = (uint8_t *)malloc(size ? size : 1);
    assert_non_null(copy);
    if (size) memcpy(copy, data, size);
    llm_model *model = load(&h, copy, size, err);
    free(copy);
    if (model) use(model);
    llm_model_free(model);
    assert_all_returned(&h);
    return model != NULL;
}

/* Writes a temporary file and returns its path. The caller removes it. */
static char *write_own(const void *data, size_t size) {
    static char path[64];
    strcpy(path, "/tmp/llm_test_XXXXXX");
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, data, size), (ssize_t)size);
    close(fd);
    return path;
}

/* ---- Damaged files ---- */

static void test_truncated(void **state) {
    size_t size;
    llm_error err;
    uint8_t *data = tiny_model(&SMALL, &size);
    (void)state;
    for (size_t n = 0; n < 600; n++) assert_false(try_file(data, n, &err));
    for (size_t percent = 1; percent < 100; percent++) {
        assert_false(try_file(data, size * percent / 100, &err));
        if (!strstr(err.message, "the file ends")) fail_msg("cut to %d %%: %s", (int)percent, err.message);
    }
    assert_false(try_file(data, size - 32, &err));
    assert_true(try_file(data, size, &err));
    free(data);
}

/* A number in the file: a count, length, type, dimension, offset, or metadata value. */
typedef struct field {
    size_t at;
    int bytes;
    char owner[64]; /* the name that an error message about this number must contain */
} field;

typedef struct walk {
    uint8_t *data;
    size_t at;
    field fields[512];
    int n_fields;
    const char *owner;
} walk;

static uint64_t walk_number(walk *w, int bytes) {
    uint64_t x = 0;
    memcpy(&x, w->data + w->at, (size_t)bytes);
    assert_true(w->n_fields < 512);
    field *f = &w->fields[w->n_fields++];
    f->at = w->at;
    f->bytes = bytes;
    snprintf(f->owner, sizeof f->owner, "%s", w->owner);
    w->at += (size_t)bytes;
    return x;
}

static void walk_string(walk *w) { w->at += walk_number(w, 8); }

/* Reads a key or a tensor's name. It is the owner of the numbers that follow. */
static void walk_name(walk *w, const char *anonymous, char name[64]) {
    w->owner = anonymous;
    uint64_t n = walk_number(w, 8);
    snprintf(name, 64, "%.*s", (int)n, (const char *)w->data + w->at);
    w->owner = name;
    w->at += n;
}

static void walk_value(walk *w, uint32_t type) {
    if (type == 8) walk_string(w);
    else walk_number(w, 4); /* tiny.h writes only 4-byte numbers */
}

static walk *walk_file(uint8_t *data) {
    char name[64];
    walk *w = (walk *)calloc(1, sizeof *w);
    assert_non_null(w);
    w->data = data;
    w->owner = "not a GGUF file";
    walk_number(w, 4);
    w->owner = "GGUF version";
    walk_number(w, 4);
    w->owner = "the list of tensors";
    uint64_t n_tensors = walk_number(w, 8);
    w->owner = "the metadata";
    uint64_t n_values = walk_number(w, 8);
    for (uint64_t i = 0; i < n_values; i++) {
        walk_name(w, "a metadata key", name);
        uint32_t type = (uint32_t)walk_number(w, 4);
        uint64_t count = 1;
        if (type == 9) {
            type = (uint32_t)walk_number(w, 4);
            count = walk_number(w, 8);
        }
        for (uint64_t j = 0; j < count; j++) {
            int n_fields = w->n_fields;
            walk_value(w, type);
            if (j > 2 && j + 3 < count) w->n_fields = n_fields; /* of arrays, test only the first and last elements */
        }
    }
    for (uint64_t i = 0; i < n_tensors; i++) {
        walk_name(w, "a tensor's name", name);
        uint32_t n_dims = (uint32_t)walk_number(w, 4);
        for (uint32_t j = 0; j < n_dims; j++) walk_number(w, 8);
        walk_number(w, 4);
        walk_number(w, 8);
    }
    return w;
}

/* True if the message shows the value, as an integer or as a float. */
static bool shows_value(const char *message, uint64_t value, int bytes) {
    char shown[4][40];
    uint32_t bits = (uint32_t)value;
    float real;
    memcpy(&real, &bits, 4);
    snprintf(shown[0], sizeof shown[0], "%llu", (unsigned long long)(bytes == 4 ? bits : value));
    snprintf(shown[1], sizeof shown[1], "%g", bytes == 4 ? (double)bits : (double)value);
    snprintf(shown[2], sizeof shown[2], "%g", (double)(int32_t)bits);
    snprintf(shown[3], sizeof shown[3], "is %g", (double)real);
    for (int i = 0; i < 4; i++)
        if (strstr(message, shown[i])) return true;
    return false;
}

/* An impossible number must be refused. The message must name the file, the owner and the number. */
static void refuse_number(const uint8_t *data, size_t size, const field *f, uint64_t value) {
    char *path = write_own(data, size);
    llm_model *model;
    llm_error err;
    if (!llm_model_load(&model, path, NULL, &err))
        fail_msg("%llu at %zu, of %s, was not refused", (unsigned long long)value, f->at, f->owner);
    unlink(path);
    if (!strstr(err.message, path) || !strstr(err.message, f->owner) ||
        (f->at && !shows_value(err.message, value, f->bytes)))
        fail_msg("%llu at %zu, of %s: %s", (unsigned long long)value, f->at, f->owner, err.message);
}

static void test_fields(void **state) {
    static const uint64_t values[] = {
        0, 1, 2, UINT64_C(1) << 31, UINT32_MAX, UINT64_C(1) << 63, UINT64_MAX - 31, UINT64_MAX};
    size_t size;
    llm_error err;
    uint8_t *data = tiny_model(&SMALL, &size), kept[8];
    walk *w = walk_file(data);
    (void)state;
    for (int i = 0; i < w->n_fields; i++) {
        const field *f = &w->fields[i];
        memcpy(kept, data + f->at, 8);
        for (size_t j = 0; j < sizeof values / sizeof *values; j++) {
            memcpy(data + f->at, &values[j], (size_t)f->bytes);
            bool loaded = try_file(data, size, &err), large = (f->bytes == 4 ? (uint32_t)values[j] : values[j]) >> 31;
            if (i < 2 && loaded != (i == 1 && values[j] == 2))
                fail_msg("%s %d: loaded is %d", f->owner, (int)values[j], loaded);
            if (large) refuse_number(data, size, f, values[j]);
        }
        memcpy(data + f->at, kept, 8);
    }
    free(w);
    free(data);
}

static uint32_t next_random(uint32_t *x) {
    *x ^= *x << 13;
    *x ^= *x >> 17;
    return *x ^= *x << 5;
}

/* Changes random bytes. Two of three files are changed in the header only, where changes do most harm. */
static void test_flips(void **state) {
    size_t size;
    llm_error err;
    uint8_t *data = tiny_model(&SMALL, &size);
    uint32_t x = 20240607;
    walk *w = walk_file(data);
    int n_loaded = 0;
    (void)state;
    for (int i = 0; i < 5000; i++) {
        size_t at[3];
        uint8_t kept[3];
        int n = 1 + i % 3;
        for (int j = 0; j < n; j++) {
            at[j] = next_random(&x) % (i % 3 == 2 ? size : w->at);
            kept[j] = data[at[j]];
            data[at[j]] ^= (uint8_t)(1 + next_random(&x) % 255);
        }
        n_loaded += try_file(data, size, &err);
        while (n--) data[at[n]] = kept[n];
    }
    print_message("%d of 5000 damaged files still loaded\n", n_loaded);
    assert_in_range(n_loaded, 1000, 4000); /* weights may have any value, most of the header may not */
    free(w);
    free(data);
}

/* ---- Files that contradict themselves ---- */

/* Finds the string `name`, stored after its length, and returns the address after it. */
static uint8_t *behind(uint8_t *data, size_t size, const char *name) {
    uint64_t n = strlen(name);
    for (size_t at = 0; at + 8 + n <= size; at++)
        if (!memcmp(data + at, &n, 8) && !memcmp(data + at + 8, name, n)) return data + at + 8 + n;
    fail_msg("%s is not in the file", name);
    return NULL;
}

static void assert_refused(const uint8_t *data, size_t size, const char *named) {
    llm_error err;
    if (try_file(data, size, &err)) fail_msg("a file with a bad %s loaded", named);
    if (!strstr(err.message, named)) fail_msg("the message does not name %s: %s", named, err.message);
}

/* Changes a 4-byte metadata value, which must be refused. `shown` is the value as in the message. */
static void refuse_value(const char *key, uint32_t bits, const char *shown) {
    size_t size;
    char words[100];
    uint8_t *data = tiny_model(&SMALL, &size);
    memcpy(behind(data, size, key) + 4, &bits, 4);
    snprintf(words, sizeof words, "%s is %s, not ", key, shown);
    assert_refused(data, size, words);
    free(data);
}

/* Renames a key or a tensor, so that it is missing. */
static void refuse_without(const char *name) {
    size_t size;
    uint8_t *data = tiny_model(&SMALL, &size);
    behind(data, size, name)[-1] ^= 1;
    assert_refused(data, size, name);
    free(data);
}

static void test_hyperparameters(void **state) {
    static const char *const counts[] = {
        "llama.block_count",          "llama.embedding_length",        "llama.feed_forward_length",
        "llama.attention.head_count", "llama.attention.head_count_kv", "llama.attention.key_length",
        "llama.context_length"};
    static const char *const reals[] = {"llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base"};
    static const struct {
        uint32_t bits;
        const char *shown;
    } bad[] = {{0x7FC00000, "nan"}, {0x7F800000, "inf"}, {0xFF800000, "-inf"}, {0xBF800000, "-1"}, {0, "0"}};
    (void)state;
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++) {
        refuse_value(counts[i], 0, "0");
        refuse_value(counts[i], UINT32_MAX, "4.29497e+09");
    }
    for (size_t i = 0; i < sizeof reals / sizeof *reals; i++)
        for (size_t j = 0; j < sizeof bad / sizeof *bad; j++) refuse_value(reals[i], bad[j].bits, bad[j].shown);
    refuse_value("tokenizer.ggml.eos_token_id", 261, "261");
    refuse_value("tokenizer.ggml.bos_token_id", UINT32_MAX, "4.29497e+09");
}

static void test_missing(void **state) {
    static const char *const names[] = {
        "llama.block_count",    "llama.embedding_length",   "llama.feed_forward_length", "llama.attention.head_count",
        "llama.context_length", "tokenizer.ggml.model",     "tokenizer.ggml.tokens",     "tokenizer.ggml.merges",
        "token_embd.weight",    "blk.0.attn_norm.weight",   "blk.0.attn_q.weight",       "blk.0.attn_k.weight",
        "blk.0.attn_v.weight",  "blk.0.attn_output.weight", "blk.0.ffn_norm.weight",     "blk.0.ffn_gate.weight",
        "blk.0.ffn_up.weight",  "blk.0.ffn_down.weight",    "output_norm.weight"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) refuse_without(names[i]);
}

static void test_shapes(void **state) {
    static const char *const names[] = {"token_embd.weight",        "blk.0.attn_q.weight",   "blk.0.attn_k.weight",
                                        "blk.0.attn_output.weight", "blk.0.ffn_gate.weight", "blk.0.ffn_down.weight"};
    size_t size;
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        for (int dim = 0; dim < 2; dim++) {
            uint8_t *data = tiny_model(&SMALL, &size);
            uint8_t *at = behind(data, size, names[i]) + 4 + 8 * dim;
            uint64_t n;
            memcpy(&n, at, 8);
            n--;
            memcpy(at, &n, 8);
            /* With fewer rows of the embedding, the vocabulary no longer fits. */
            assert_refused(data, size, i == 0 && dim == 1 ? "vocabulary" : names[i]);
            free(data);
        }
}

static void test_places(void **state) {
    size_t size;
    uint8_t *data = tiny_model(&SMALL, &size), *q = behind(data, size, "blk.0.attn_q.weight");
    uint8_t *k = behind(data, size, "blk.0.attn_k.weight"), kept[8];
    uint64_t offset;
    (void)state;
    memcpy(kept, k + 24, 8);
    memcpy(k + 24, q + 24, 8); /* the offset, which follows the dimensions and the type */
    assert_refused(data, size, "overlap");
    memcpy(&offset, kept, 8);
    offset -= 32;
    memcpy(k + 24, &offset, 8);
    assert_refused(data, size, "blk.0.attn_k.weight");
    offset += 33;
    memcpy(k + 24, &offset, 8);
    assert_refused(data, size, "blk.0.attn_k.weight");
    memcpy(k + 24, kept, 8);
    k[-(int)strlen("k.weight")] = 'q';
    assert_refused(data, size, "blk.0.attn_q.weight occurs twice");
    free(data);
}

/* A merge whose result is not in the vocabulary is refused. */
static void test_merge(void **state) {
    size_t size;
    uint8_t *data = tiny_model(&SMALL, &size), *merge = behind(data, size, "tokenizer.ggml.merges") + 4 + 4 + 8 + 8;
    llm_tokenizer *tokenizer;
    llm_error err;
    (void)state;
    assert_memory_equal(merge, "a a", 3);
    merge[2] = 'z';
    char *path = write_own(data, size);
    assert_int_equal(llm_tokenizer_load(&tokenizer, path, NULL, &err), LLM_ERROR_FORMAT);
    if (!strstr(err.message, path) || !strstr(err.message, "tokenizer.ggml.merges[0] makes \"az\""))
        fail_msg("%s", err.message);
    unlink(path);
    free(data);
}

/* Messages about a file on disk name it. */
static void refuse_path(const char *path, llm_status expected) {
    heap h = {0};
    llm_model_desc desc = {.host = heap_host(&h)};
    llm_model *model = NULL;
    llm_tokenizer *tokenizer = NULL;
    llm_model_info info;
    llm_error err;
    assert_int_equal(llm_model_load(&model, path, &desc, &err), expected);
    assert_explained(expected, &err);
    assert_non_null(strstr(err.message, path));
    assert_null(model);
    assert_int_equal(llm_tokenizer_load(&tokenizer, path, &desc.host, &err), expected);
    assert_non_null(strstr(err.message, path));
    assert_null(tokenizer);
    assert_int_equal(llm_model_read_info(path, &desc, &info, &err), expected);
    assert_non_null(strstr(err.message, path));
    assert_int_equal(info.weight_bytes, 0);
    assert_all_returned(&h);
}

static void test_paths(void **state) {
    size_t size;
    uint8_t *data = tiny_model(&SMALL, &size);
    char *path = write_own(data, size / 50);
    (void)state;
    refuse_path(path, LLM_ERROR_FORMAT);
    unlink(path);
    refuse_path(path, LLM_ERROR_IO);
    path = write_own(data, 0);
    refuse_path(path, LLM_ERROR_IO);
    unlink(path);
    refuse_path("/tmp", LLM_ERROR_IO);
    free(data);
}

/* Paths are UTF-8 on every system. */
static void test_path_in_utf8(void **state) {
    size_t size;
    uint8_t *data = tiny_model(&SMALL, &size);
    char *path = write_own(data, size), name[80];
    llm_model *model = NULL;
    llm_error err;
    (void)state;
    snprintf(name, sizeof name, "%s-Größe-模型-\U0001F600.gguf", path);
    assert_int_equal(rename_utf8(path, name), 0);
    if (llm_model_load(&model, name, NULL, &err)) fail_msg("%s", err.message);
    assert_int_equal(rename_utf8(name, path), 0);
    llm_model_free(model);
    unlink(path);
    free(data);
}

/* ---- Wrong arguments ---- */

static void test_arguments(void **state) {
    size_t size;
    heap h = {0};
    llm_error err;
    llm_context *ctx = NULL;
    uint8_t *data = tiny_model(&SMALL, &size);
    llm_model *model = load(&h, data, size, &err), *other = NULL;
    static const llm_context_desc bad[] = {{.n_ctx = -1},
                                           {.n_seq = -1},
                                           {.n_cache = -1},
                                           {.n_batch = -1},
                                           {.n_logits = -1},
                                           {.n_threads = -1},
                                           {.n_ctx = INT32_MAX},
                                           {.n_seq = INT32_MAX},
                                           {.n_batch = INT32_MAX},
                                           {.n_logits = INT32_MAX},
                                           {.n_cache = INT32_MAX},
                                           {.n_threads = INT32_MAX},
                                           {.cache_dtype = (llm_dtype)99}};
    static const llm_model_desc bad_models[] = {{.dtype = (llm_dtype)99}, {.n_threads = -1}, {.isa = "abacus"}};
    llm_tokenizer *tokenizer = NULL;
    llm_model_info info;
    llm_memory memory;
    (void)state;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(llm_context_create(&ctx, model, &bad[i], &err), LLM_ERROR_ARGUMENT);
        assert_explained(LLM_ERROR_ARGUMENT, &err);
        assert_null(ctx);
    }
    for (size_t i = 0; i < sizeof bad_models / sizeof *bad_models; i++) {
        llm_model_desc desc = bad_models[i];
        assert_int_equal(llm_model_load_memory(&other, data, size, &desc, &err), LLM_ERROR_ARGUMENT);
        assert_explained(LLM_ERROR_ARGUMENT, &err);
    }
    const llm_host half = {.alloc = heap_alloc, .user = &h}, other_half = {.free = heap_free, .user = &h};
    assert_int_equal(llm_model_load_memory(&other, data, size, &(llm_model_desc){.host = half}, &err),
                     LLM_ERROR_ARGUMENT);
    assert_non_null(strstr(err.message, "host.alloc and host.free"));
    assert_int_equal(llm_model_read_info_memory(data, size, &(llm_model_desc){.host = other_half}, &info, &err),
                     LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_tokenizer_load_memory(&tokenizer, data, size, &half, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_context_create(&ctx, model, &(llm_context_desc){.host = other_half}, &err),
                     LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_model_load(&other, NULL, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_model_load_memory(&other, NULL, 9, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_model_load_callback(&other, NULL, NULL, 9, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_model_read_info(NULL, NULL, &info, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_model_read_info("x", NULL, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_memory_estimate(&info, NULL, &memory, &err), LLM_ERROR_ARGUMENT); /* `info` is empty */
    assert_int_equal(llm_memory_estimate(NULL, NULL, &memory, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_tokenizer_load(&tokenizer, NULL, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_model_load(NULL, "x", NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_tokenizer_load(NULL, "x", NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_context_create(&ctx, NULL, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_context_create(NULL, model, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_model_load(&other, "/nowhere", NULL, NULL), LLM_ERROR_IO); /* err may be NULL */
    llm_model_free(NULL);
    llm_context_free(NULL);
    llm_tokenizer_free(NULL);
    llm_model_free(model);
    assert_all_returned(&h);
    free(data);
}

/* ---- Failing allocations ---- */

typedef struct starved {
    heap h;
    const uint8_t *data;
    size_t size;
    const char *path;
    llm_model *model;
    llm_context *ctx;
} starved;

static llm_status do_load(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_model_desc desc = {.n_threads = 2, .host = heap_host(&s->h)};
    llm_model *model = NULL;
    llm_status status = llm_model_load_memory(&model, s->data, s->size, &desc, err);
    assert_int_equal(status == LLM_OK, model != NULL);
    llm_model_free(model);
    return status;
}

static bool read_starved(void *user, uint64_t offset, void *to, size_t n) {
    const starved *s = (const starved *)user;
    memcpy(to, s->data + offset, n);
    return true;
}

static llm_status do_read(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_model_desc desc = {.n_threads = 2, .host = heap_host(&s->h)};
    llm_model *model = NULL;
    llm_status status = llm_model_load_callback(&model, read_starved, s, s->size, &desc, err);
    llm_model_free(model);
    return status;
}

static llm_status do_render(void *job, llm_error *err) {
    static const llm_message message = {"user", "a\xFF"};
    const starved *s = (const starved *)job;
    char text[10];
    llm_chat_desc chat = {.messages = &message, .n_messages = 1, .open_answer = true};
    return llm_chat_render(llm_model_tokenizer(s->model), &chat, text, sizeof text, err) < 0 ? err->code : LLM_OK;
}

static llm_status do_create(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_context_desc desc = {.n_threads = 2, .n_seq = 3, .n_batch = 16};
    llm_context *ctx = NULL;
    llm_status status = llm_context_create(&ctx, s->model, &desc, err);
    assert_int_equal(status == LLM_OK, ctx != NULL);
    llm_context_free(ctx);
    return status;
}

static llm_status do_prompt(void *job, llm_error *err) {
    starved *s = (starved *)job;
    static const char *const stops[] = {"never in this text"};
    llm_generate_desc desc = {
        .prompt = "aaaa\xC3 and more", .max_tokens = 40, .stop_strings = stops, .n_stop_strings = 1};
    return llm_generate(s->ctx, &desc, NULL, err);
}

static llm_status do_messages(void *job, llm_error *err) {
    starved *s = (starved *)job;
    static const llm_message messages[] = {{"system", "a"},
                                           {"user", "b\xFF"
                                                    "c"},
                                           {"assistant", "aaaa"},
                                           {"user", ""}};
    llm_generate_desc desc = {.messages = messages, .n_messages = 4, .max_tokens = 3};
    return llm_generate(s->ctx, &desc, NULL, err);
}

static llm_status do_encode(void *job, llm_error *err) {
    starved *s = (starved *)job;
    char text[3000];
    llm_token ids[8];
    memset(text, 'a', sizeof text);
    text[100] = (char)0xFF;
    memset(err, 0, sizeof *err);
    int64_t n =
        llm_encode(llm_model_tokenizer(s->model), text, sizeof text, LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL, ids, 8, err);
    assert_true(n > 8 || n == -1);
    return n < 0 ? err->code : LLM_OK;
}

static llm_status do_read_info(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_model_desc desc = {.host = heap_host(&s->h)};
    llm_model_info info;
    return llm_model_read_info(s->path, &desc, &info, err);
}

static void test_starved(void **state) {
    starved s;
    llm_error err;
    llm_context_desc desc = {.n_ctx = 256, .n_threads = 1};
    memset(&s, 0, sizeof s);
    uint8_t *data = tiny_model(&SMALL, &s.size);
    (void)state;
    s.data = data;
    s.path = write_own(data, s.size);
    load_job alone = {.path = s.path};
    starve(&s.h, do_load, &s, 1, "llm_model_load_memory");
    starve(&s.h, do_read, &s, 1, "llm_model_load_callback");
    starve(&alone.h, load_tokenizer_starved, &alone, 1, "llm_tokenizer_load");
    starve(&s.h, do_read_info, &s, 1, "llm_model_read_info");
    s.model = load(&s.h, data, s.size, &err);
    starve(&s.h, do_create, &s, 1, "llm_context_create");
    starve(&s.h, do_encode, &s, 1, "llm_encode");
    starve(&s.h, do_render, &s, 1, "llm_chat_render");
    assert_int_equal(llm_context_create(&s.ctx, s.model, &desc, &err), LLM_OK);
    starve(&s.h, do_prompt, &s, 1, "llm_generate of a prompt");
    starve(&s.h, do_messages, &s, 1, "llm_generate of messages");
    llm_context_free(s.ctx);
    llm_model_free(s.model);
    assert_all_returned(&s.h);
    assert_all_returned(&alone.h);
    unlink(s.path);
    free(data);
}

/* A forward pass allocates nothing. */
static void test_forward_allocates_nothing(void **state) {
    size_t size;
    heap h = {0};
    llm_error err;
    llm_context *ctx = NULL;
    llm_token tokens[40] = {1, 2, 3};
    llm_batch batch = {40, tokens, NULL, NULL};
    llm_context_desc desc = {.n_ctx = 128, .n_seq = 2, .n_batch = 16};
    uint8_t *data = tiny_model(&SMALL, &size);
    llm_model *model = load(&h, data, size, &err);
    (void)state;
    assert_int_equal(llm_context_create(&ctx, model, &desc, &err), LLM_OK);
    h.n_calls = 0;
    assert_int_equal(llm_forward(ctx, &batch, &err), LLM_OK);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 33, &err), LLM_OK);
    assert_int_equal(llm_seq_truncate(ctx, 0, 7, &err), LLM_OK);
    assert_int_equal(h.n_calls, 0);
    llm_context_free(ctx);
    llm_model_free(model);
    assert_all_returned(&h);
    free(data);
}

/* ---- Repeated loads ---- */

/* Resident memory in pages. Returns 0 where it would be meaningless: sanitizers keep freed memory, and an emulator uses
   memory itself. */
static long resident(void) {
    long total = 0, pages = 0;
    if (SANITIZED || emulated()) return 0;
    FILE *file = fopen("/proc/self/statm", "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%ld %ld", &total, &pages), 2);
    fclose(file);
    return pages;
}

static void test_a_hundred_times(void **state) {
    size_t size;
    uint8_t *data = tiny_model(&SMALL, &size);
    char *path = write_own(data, size);
    long warm = 0;
    heap h = {0};
    (void)state;
    for (int i = 0; i < 100; i++) {
        llm_model_desc desc = {.n_threads = 2, .host = heap_host(&h)};
        llm_model *model = NULL;
        assert_int_equal(llm_model_load(&model, path, &desc, NULL), LLM_OK);
        use(model);
        llm_model_free(model);
        assert_all_returned(&h);
        if (i == 20) warm = resident();
    }
    if (resident() - warm > 256) fail_msg("80 loads leaked %ld pages", resident() - warm);
    unlink(path);
    free(data);
}

/* ---- Threads ---- */

static llm_model *load_shared(const tiny_spec *spec) {
    llm_model *model = NULL;
    assert_int_equal(try_tiny(&model, spec, (llm_model_desc){.n_threads = 2}, NULL), LLM_OK);
    return model;
}

typedef struct job {
    const llm_model *model;
    const tiny_spec *spec; /* if spec or path is not NULL, the job loads its own model */
    const char *path;
    int n_threads;
    bool drafts; /* the model is its own draft */
    void (*parallel)(void *user, int n, void (*task)(void *arg, int i), void *arg);
    int n_parallel; /* calls */
    int length;
    llm_token tokens[64];
} job;

static bool keep_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    job *j = (job *)user;
    (void)bytes;
    (void)n_bytes;
    j->tokens[j->length++] = token;
    return true;
}

/* No assertions here: cmocka's use longjmp, which only works on the main thread. After a failure, length is wrong. */
static void *run_job(void *arg) {
    job *j = (job *)arg;
    llm_context_desc desc = {.n_ctx = 96,
                             .n_threads = j->n_threads,
                             .n_batch = 16,
                             .n_logits = 8,
                             .parallel = j->parallel,
                             .host = {.user = j}};
    llm_generate_desc generate = {.prompt = "The same text on every thread, please: aaab",
                                  .max_tokens = 32,
                                  .ignore_end = true,
                                  .on_token = keep_token,
                                  .user = j};
    llm_context *ctx = NULL;
    llm_draft draft = {0};
    llm_model *own = j->spec ? load_shared(j->spec) : NULL;
    llm_status status = j->path ? llm_model_load(&own, j->path, NULL, NULL) : LLM_OK;
    if (!status) status = llm_context_create(&ctx, own ? own : j->model, &desc, NULL);
    if (!status && j->drafts) {
        status = llm_draft_model(&draft, ctx, j->model, NULL);
        generate.draft = &draft;
    }
    if (status || llm_generate(ctx, &generate, NULL, NULL)) j->length = -1;
    llm_draft_free(&draft);
    llm_context_free(ctx);
    llm_model_free(own);
    return NULL;
}

static void assert_same_text(const job *a, const job *b) {
    assert_int_equal(a->length, 32);
    assert_int_equal(b->length, 32);
    assert_memory_equal(a->tokens, b->tokens, 32 * sizeof *a->tokens);
}

static void run_jobs(job *jobs, int n) {
    pthread_t threads[8];
    for (int i = 0; i < n; i++) assert_int_equal(pthread_create(&threads[i], NULL, run_job, &jobs[i]), 0);
    for (int i = 0; i < n; i++) pthread_join(threads[i], NULL);
}

static void test_eight_contexts(void **state) {
    llm_model *model = load_shared(&TINY_ODD);
    job jobs[8], alone = {.model = model, .n_threads = 1};
    (void)state;
    run_job(&alone);
    memset(jobs, 0, sizeof jobs);
    for (int i = 0; i < 8; i++) {
        jobs[i].model = model;
        jobs[i].n_threads = 1 + i % 2;
        jobs[i].drafts = i >= 5;
    }
    run_jobs(jobs, 8);
    for (int i = 0; i < 8; i++) assert_same_text(&jobs[i], &alone);
    llm_model_free(model);
}

/* Four threads load models at the same time: two from memory, two from a directory. */
static void test_loads_at_once(void **state) {
    job alone[2] = {{.spec = &TINY_ODD, .n_threads = 1}, {.path = golden_path("hf/qwen3"), .n_threads = 1}}, jobs[4];
    (void)state;
    for (int i = 0; i < 4; i++) jobs[i] = alone[i % 2];
    run_jobs(jobs, 4);
    for (int i = 0; i < 2; i++) run_job(&alone[i]);
    for (int i = 0; i < 4; i++) assert_same_text(&jobs[i], &alone[i % 2]);
}

typedef struct piece {
    void (*task)(void *arg, int i);
    void *arg;
    int i;
} piece;

static void *run_piece(void *arg) {
    piece *p = (piece *)arg;
    p->task(p->arg, p->i);
    return NULL;
}

static void host_parallel(void *user, int n, void (*task)(void *arg, int i), void *arg) {
    pthread_t threads[8];
    piece pieces[8];
    ((job *)user)->n_parallel++;
    for (int i = 1; i < n; i++) {
        pieces[i].task = task;
        pieces[i].arg = arg;
        pieces[i].i = i;
        if (pthread_create(&threads[i], NULL, run_piece, &pieces[i])) abort();
    }
    task(arg, 0);
    for (int i = 1; i < n; i++) pthread_join(threads[i], NULL);
}

static void test_host_threads(void **state) {
    llm_model *model = load_shared(&TINY_ODD);
    job alone = {.model = model, .n_threads = 1};
    (void)state;
    run_job(&alone);
    for (int n = 1; n <= 3; n++) {
        job lent = {.model = model, .n_threads = n, .parallel = host_parallel};
        run_job(&lent);
        assert_same_text(&lent, &alone);
        assert_true(lent.n_parallel >= 32);
    }
    llm_model_free(model);
}

/* ---- Progress ---- */

typedef struct progress {
    int n, stop_at;
    float last;
    bool forward; /* progress never decreased */
} progress;

static bool on_progress(void *user, float done) {
    progress *p = (progress *)user;
    p->forward = p->forward && done >= p->last && done >= 0 && done <= 1;
    p->last = done;
    return ++p->n != p->stop_at;
}

/* Loads with a progress callback, and cancels at each call. The host has no allocator: `user` is the callback's. */
static void test_progress(void **state) {
    size_t size;
    uint8_t *data = tiny_model(&TINY_ODD, &size);
    progress p = {0, 0, 0, true};
    llm_model_desc desc = {.n_threads = 1, .host = {.progress = on_progress, .user = &p}};
    llm_model *model = NULL;
    llm_error err;
    (void)state;
    assert_int_equal(llm_model_load_memory(&model, data, size, &desc, &err), LLM_OK);
    llm_model_free(model);
    int n = p.n;
    assert_true(n > TINY_ODD.n_layers);
    assert_true(p.last == 1);
    assert_true(p.forward);
    for (int stop_at = 1; stop_at <= n; stop_at++) {
        memset(&p, 0, sizeof p);
        p.stop_at = stop_at;
        model = (llm_model *)(uintptr_t)1;
        assert_int_equal(llm_model_load_memory(&model, data, size, &desc, &err), LLM_ERROR_CANCELLED);
        assert_explained(LLM_ERROR_CANCELLED, &err);
        assert_null(model);
        assert_int_equal(p.n, stop_at);
    }
    free(data);
}

/* ---- Memory estimates ---- */

static void check_estimate(const tiny_spec *spec, llm_dtype dtype, const char *isa,
                           const llm_context_desc *context_desc) {
    heap h = {0};
    size_t size;
    uint8_t *data = tiny_model(spec, &size);
    llm_model_desc desc = {.dtype = dtype, .n_threads = 2, .isa = isa, .host = heap_host(&h)};
    llm_model_info info;
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_memory memory;
    assert_int_equal(llm_model_read_info_memory(data, size, &desc, &info, NULL), LLM_OK);
    assert_int_equal(llm_memory_estimate(&info, context_desc, &memory, NULL), LLM_OK);
    assert_all_returned(&h);
    assert_int_equal(llm_model_load_memory(&model, data, size, &desc, NULL), LLM_OK);
    assert_int_equal(memory.weights, llm_model_get_info(model).weight_bytes);
    double loaded = (double)h.live;
    assert_int_equal(llm_context_create(&ctx, model, context_desc, NULL), LLM_OK);
    double estimate = (double)(memory.weights + memory.cache + memory.scratch);
    print_message("estimated %.2f MB; the model takes %.2f MB, with a context %.2f MB, peak %.2f MB\n", estimate / 1e6,
                  loaded / 1e6, (double)h.live / 1e6, (double)h.peak / 1e6);
    assert_true(fabs((double)h.live - estimate) <= 0.1 * estimate + 1e6);
    assert_true(fabs((double)h.peak - estimate) <= 0.1 * estimate + 1e6);
    llm_context_free(ctx);
    llm_model_free(model);
    assert_all_returned(&h);
    free(data);
}

static void test_estimate(void **state) {
    const llm_context_desc descs[] = {{0},
                                      {.n_seq = 16, .n_threads = 4},
                                      {.n_ctx = 4096, .cache_dtype = LLM_DTYPE_F32},
                                      {.n_ctx = 512, .n_batch = 4096},
                                      {.n_ctx = 512, .n_logits = 500},
                                      {.n_ctx = 2048, .n_seq = 64, .n_cache = 4096}};
    (void)state;
    for (size_t i = 0; i < sizeof descs / sizeof *descs; i++)
        for (int dtype = LLM_DTYPE_F32; dtype <= LLM_DTYPE_BF16; dtype++)
            check_estimate(&LARGE, (llm_dtype)dtype, NULL, &descs[i]);
    check_estimate(&TINY_ODD, LLM_DTYPE_F32, NULL, NULL);
    check_estimate(&LARGE, LLM_DTYPE_BF16, "scalar", &descs[3]); /* no panels, but more floats */
}

/* ---- No output ---- */

static int redirect(int fd, int to) {
    fflush(NULL);
    int old = dup(fd);
    assert_true(old >= 0 && dup2(to, fd) >= 0);
    return old;
}

static void count_line(void *user, const char *line) {
    if (*line) ++*(int *)user;
}

/* Loading, failing and generating write nothing to standard output or standard error, but call the log callback. */
static void test_no_output(void **state) {
    size_t size;
    int n_lines = 0;
    uint8_t *data = tiny_model(&SMALL, &size);
    llm_model_desc desc = {.n_threads = 1, .host = {.log = count_line, .user = &n_lines}};
    llm_model *model = NULL;
    llm_error err;
    FILE *file = tmpfile();
    (void)state;
    assert_non_null(file);
    int out = redirect(1, fileno(file)), error = redirect(2, fileno(file));
    bool loaded = try_file(data, size, &err), half = try_file(data, size / 2, &err);
    llm_status status = llm_model_load_memory(&model, data, size, &desc, &err);
    llm_model_free(model);
    close(redirect(1, out));
    close(redirect(2, error));
    close(out);
    close(error);
    assert_true(loaded && !half && !status);
    assert_int_equal(lseek(fileno(file), 0, SEEK_END), 0);
    assert_true(n_lines > 0);
    fclose(file);
    free(data);
}

int main(void) {
    const struct CMUnitTest alone[] = {cmocka_unit_test(test_truncated),
                                       cmocka_unit_test(test_fields),
                                       cmocka_unit_test(test_flips),
                                       cmocka_unit_test(test_hyperparameters),
                                       cmocka_unit_test(test_missing),
                                       cmocka_unit_test(test_shapes),
                                       cmocka_unit_test(test_places),
                                       cmocka_unit_test(test_merge),
                                       cmocka_unit_test(test_paths),
                                       cmocka_unit_test(test_path_in_utf8),
                                       cmocka_unit_test(test_arguments),
                                       cmocka_unit_test(test_starved),
                                       cmocka_unit_test(test_forward_allocates_nothing),
                                       cmocka_unit_test(test_estimate),
                                       cmocka_unit_test(test_no_output)};
    const struct CMUnitTest with_threads[] = {
        cmocka_unit_test(test_a_hundred_times), cmocka_unit_test(test_eight_contexts),
        cmocka_unit_test(test_loads_at_once), cmocka_unit_test(test_host_threads), cmocka_unit_test(test_progress)};
    int n_failed = THREAD_SANITIZED ? 0 : cmocka_run_group_tests(alone, NULL, NULL);
    return n_failed + cmocka_run_group_tests(with_threads, NULL, NULL);
}
