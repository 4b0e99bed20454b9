/* llm_model_save_packed: a loaded packed file has the same weights, logits, tokens and metadata as the model it was
   made from, for each type of weights. The file is the same for every instruction set. Also hostile files, failing
   allocations, ranks, and processes that share the file's memory.
   Variants: asan cross */
#include "tests/check.h"
#include "tests/tiny.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include "tests/common.h"
#if !defined(_WIN32)
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#endif

static char folder[64];

static const char *golden(const char *name) {
    char inner[200];
    snprintf(inner, sizeof inner, "hf/%s", name);
    return golden_path(inner);
}

/* Returns the path of a file that does not exist yet, in the test's folder. */
static const char *new_path(void) {
    static char paths[4][128];
    static int next;
    char *path = paths[next % 4];
    snprintf(path, sizeof paths[0], "%s/%d.packed", folder, next++);
    return path;
}

static void save(const llm_model *model, const char *to) {
    llm_error err;
    if (llm_model_save_packed(model, to, NULL, &err)) fail_msg("%s", err.message);
    assert_true(err.code == LLM_OK && !err.message[0]);
}

static bool same(const void *a, const void *b, size_t n) { return !memcmp(a, b, n); }

static void assert_same_text(const llm_tokenizer *a, const llm_tokenizer *b) {
    static const char *const texts[] = {"", " a  quick brown fox's 42\n\n", "aaaaaaab<|end|><s></s> <|im_start|>",
                                        "\xC3\xA9\xE4\xBD\xA0 e\xCC\x81\xF0\x9F\x98\x80\xFF",
                                        "привет, мир; αβγδ λόγος; 你好，世界; 안녕하세요"};
    assert_int_equal(llm_tokenizer_n_vocab(a), llm_tokenizer_n_vocab(b));
    assert_int_equal(llm_tokenizer_bos(a), llm_tokenizer_bos(b));
    assert_int_equal(llm_tokenizer_eos(a), llm_tokenizer_eos(b));
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        for (unsigned flags = 0; flags < 4; flags++) {
            llm_token ids[2][256];
            const int64_t n = llm_encode(a, texts[i], strlen(texts[i]), flags, ids[0], 256, NULL);
            assert_in_range(n, 0, 256);
            assert_int_equal(llm_encode(b, texts[i], strlen(texts[i]), flags, ids[1], 256, NULL), n);
            assert_true(same(ids[0], ids[1], (size_t)n * sizeof **ids));
        }
    for (llm_token id = -1; id <= llm_tokenizer_n_vocab(a); id++) {
        size_t n[2] = {0, 0};
        const char *p = llm_token_bytes(a, id, &n[0]), *q = llm_token_bytes(b, id, &n[1]);
        assert_int_equal(n[0], n[1]);
        assert_true(!n[0] || same(p, q, n[0]));
        assert_int_equal(llm_token_is_end(a, id), llm_token_is_end(b, id));
        assert_int_equal(llm_token_is_special(a, id), llm_token_is_special(b, id));
    }
    const char *chat[] = {llm_chat_template_text(a), llm_chat_template_text(b)};
    assert_int_equal(chat[0] != NULL, chat[1] != NULL);
    assert_true(!chat[0] || !strcmp(chat[0], chat[1]));
}

static void assert_same_info(const llm_model *a, const llm_model *b) {
    const llm_model_info x = llm_model_get_info(a), y = llm_model_get_info(b);
    assert_string_equal(x.name, y.name);
    assert_string_equal(x.architecture, y.architecture);
    assert_string_equal(x.held, y.held);
    assert_int_equal(x.dtype, y.dtype);
    const int numbers[2][11] = {{x.n_vocab, x.n_layers, x.n_embd, x.n_ff, x.n_heads, x.n_kv_heads, x.head_dim,
                                 x.rope_dim, x.n_ctx_train, x.n_own_layers, x.n_own_kv_heads},
                                {y.n_vocab, y.n_layers, y.n_embd, y.n_ff, y.n_heads, y.n_kv_heads, y.head_dim,
                                 y.rope_dim, y.n_ctx_train, y.n_own_layers, y.n_own_kv_heads}};
    assert_true(same(numbers[0], numbers[1], sizeof *numbers));
    assert_true(x.n_params == y.n_params && x.weight_bytes == y.weight_bytes);
    assert_true(x.weight_bytes_per_token == y.weight_bytes_per_token && x.fingerprint == y.fingerprint);
    assert_true(x.cache_bytes_per_token == y.cache_bytes_per_token);
    int i = 0;
    for (const char *key; (key = llm_model_meta_key(a, i)) != NULL; i++) {
        assert_string_equal(key, llm_model_meta_key(b, i));
        assert_string_equal(llm_model_meta(a, key), llm_model_meta(b, key));
    }
    assert_null(llm_model_meta_key(b, i));
}

/* Returns the logits after a prompt, which is computed as a batch, and after single tokens. Free them with free(). */
static float *logits_of(const llm_model *model) {
    enum { PROMPT = 40, SINGLE = 4 };
    llm_context_desc desc = {.n_ctx = 64, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc);
    const size_t n = (size_t)llm_model_get_info(model).n_vocab;
    float *all = (float *)malloc((1 + SINGLE) * n * sizeof *all);
    llm_token tokens[PROMPT];
    llm_error err;
    assert_non_null(all);
    for (int i = 0; i < PROMPT; i++) tokens[i] = (llm_token)((size_t)(i * 7919 + 1) % n);
    for (int i = 0; i <= SINGLE; i++) {
        llm_batch batch = {.n_tokens = i ? 1 : PROMPT, .tokens = tokens + i};
        if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
        memcpy(all + (size_t)i * n, llm_logits(ctx, i ? 0 : PROMPT - 1), n * sizeof *all);
    }
    llm_context_free(ctx);
    return all;
}

static void assert_same_logits(const llm_model *a, const llm_model *b) {
    const size_t n = (size_t)llm_model_get_info(a).n_vocab;
    float *x = logits_of(a), *y = logits_of(b);
    assert_true(same(x, y, 5 * n * sizeof *x));
    free(x);
    free(y);
}

/* A read callback's file in memory, and the number of bytes read. */
typedef struct reader {
    bytes file;
    uint64_t n_read;
} reader;

static bool read_bytes(void *user, uint64_t offset, void *to, size_t n) {
    reader *r = (reader *)user;
    if (offset > r->file.n || n > r->file.n - offset) return false;
    memcpy(to, r->file.at + offset, n);
    r->n_read += n;
    return true;
}

/* Packs the model, loads the file in every way, and compares. Frees the model. */
static void round_trip(llm_model *model) {
    const char *path = new_path(), *again = new_path();
    llm_model_desc check = {.check = true, .n_threads = 1};
    llm_model_info info, wanted = llm_model_get_info(model);
    llm_tokenizer *tokenizer;
    llm_model *other;
    llm_error err;
    save(model, path);
    other = load_model(path, &check);
    assert_same_info(model, other);
    assert_same_text(llm_model_tokenizer(model), llm_model_tokenizer(other));
    assert_same_logits(model, other);
    save(other, again);
    llm_model_free(other);
    reader r = {read_file(path), 0};
    bytes second = read_file(again);
    assert_true(r.file.n == second.n && same(r.file.at, second.at, second.n));
    assert_int_equal(llm_model_load_callback(&other, read_bytes, &r, r.file.n, NULL, &err), LLM_OK);
    assert_same_logits(model, other);
    llm_model_free(other);
    r.n_read = 0;
    assert_int_equal(llm_model_read_info_callback(read_bytes, &r, r.file.n, NULL, &info, &err), LLM_OK);
    assert_true(r.n_read == LLM__PACKED_START + llm__bytes_u64(r.file.at + 24)); /* weights are not read */
    assert_string_equal(info.held, wanted.held);
    assert_true(info.weight_bytes == wanted.weight_bytes && info.dtype == wanted.dtype);
    other = load_memory(memcpy(second.at, r.file.at, r.file.n), second.n, &check);
    memset(second.at, 0, second.n); /* the model must not use this memory any more */
    assert_same_logits(model, other);
    llm_model_free(other);
    if (llm_tokenizer_load(&tokenizer, path, NULL, &err)) fail_msg("%s", err.message);
    assert_same_text(llm_model_tokenizer(model), tokenizer);
    llm_tokenizer_free(tokenizer);
    free(second.at);
    free(r.file.at);
    llm_model_free(model);
    assert_int_equal(remove(path) | remove(again), 0);
}

static void test_types(void **state) {
    static const uint32_t types[] = {0, 1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 30};
    (void)state;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        tiny_spec spec = {1, 256, 256, 4, 2, 64, 512, 43, (int)i % 2, types[i], 1};
        round_trip(load_tiny(&spec, LLM_DTYPE_DEFAULT));
    }
    round_trip(load_tiny(&TINY_ALL_TYPES, LLM_DTYPE_DEFAULT));
    round_trip(load_tiny(&TINY_IQ4_TYPES, LLM_DTYPE_DEFAULT));
    for (int dtype = LLM_DTYPE_F32; dtype <= LLM_DTYPE_FILE; dtype++) {
        round_trip(load_tiny(&TINY_ODD, (llm_dtype)dtype));
        round_trip(load_tiny(&TINY_ALL_TYPES, (llm_dtype)dtype));
    }
    for (int i = 0; i < LLM__W_KINDS; i++) {
        assert_non_null(llm__packed_kinds[i]);
        for (int j = 0; j < i; j++) assert_string_not_equal(llm__packed_kinds[i], llm__packed_kinds[j]);
    }
}

static void test_formats(void **state) {
    static const char *const names[] = {"llama",   "gqa",        "linear",      "llama3", "mistral",      "qwen2",
                                        "qwen3",   "qwen2-yarn", "yarn-mscale", "int8",   "llama3.gguf",  "yarn.gguf",
                                        "sharded", "qwen3.gguf", "int8.gguf",   "meta-2", "mistral.gguf", "meta-3"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) round_trip(load_model(golden(names[i]), NULL));
    round_trip(load_model(golden_path("sparse/bf16"), NULL));
    round_trip(load_model(golden_path("sparse/int8"), NULL));
}

/* All instruction sets of this machine, and all machines and compilers, give the same file. */
static void test_same_file(void **state) {
    static const char *const sets[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon"};
    static const struct {
        const tiny_spec *spec;
        llm_dtype dtype;
        uint64_t checksum;
    } files[] = {{&TINY_ODD, LLM_DTYPE_F32, 0x24f914278eb0688f},        {&TINY_ODD, LLM_DTYPE_BF16, 0xefba3684b2c2ba60},
                 {&TINY_ODD, LLM_DTYPE_INT8, 0x57cdef2154a563f9},       {&TINY_ODD, LLM_DTYPE_INT4, 0x82f326c28d24382b},
                 {&TINY_ALL_TYPES, LLM_DTYPE_FILE, 0xf0808fd2ef470432}, {&TINY_2_4, LLM_DTYPE_BF16, 0xae548933b1011675},
                 {&TINY_2_4, LLM_DTYPE_INT8, 0xcb3d21b2e6d7d543}};
    (void)state;
    for (size_t i = 0; i < sizeof files / sizeof *files; i++)
        for (size_t j = 0; j < sizeof sets / sizeof *sets; j++) {
            if (!llm__kernels_choose(sets[j])) continue;
            llm_model_desc desc = {.dtype = files[i].dtype, .isa = sets[j], .n_threads = 1};
            llm_model *model = NULL;
            llm_error err;
            const char *path = new_path();
            if (try_tiny(&model, files[i].spec, desc, &err)) fail_msg("%s", err.message);
            save(model, path);
            llm_model_free(model);
            bytes file = read_file(path);
            const uint64_t sum = llm__packed_checksum(file.at, (size_t)llm__bytes_u64(file.at + 24));
            assert_true(sum == llm__bytes_u64(file.at + 32));
            if (sum != files[i].checksum)
                fail_msg("%s, %s: 0x%016llx", sets[j], llm_dtype_name(files[i].dtype), (unsigned long long)sum);
            free(file.at);
            remove(path);
        }
}

static void refuses(const void *data, size_t n, const llm_model_desc *desc, llm_status expected, const char *words) {
    heap h = {0};
    llm_model_desc counted = desc ? *desc : (llm_model_desc){.n_threads = 1};
    llm_model *model;
    llm_error err;
    counted.host = heap_host(&h);
    assert_int_equal(llm_model_load_memory(&model, data, n, &counted, &err), expected);
    assert_null(model);
    assert_explained(expected, &err);
    if (!strstr(err.message, words)) fail_msg("\"%s\" does not say \"%s\"", err.message, words);
    assert_all_returned(&h);
}

/* A small packed file. */
static bytes small_file(void) {
    tiny_spec spec = {1, 32, 32, 2, 1, 16, 64, 5, 1, 8, 1};
    const char *path = new_path();
    llm_model *model = load_tiny(&spec, LLM_DTYPE_FILE);
    save(model, path);
    llm_model_free(model);
    bytes file = read_file(path);
    assert_int_equal(remove(path), 0);
    return file;
}

static void seal(bytes file) { llm__packed_seal(file.at, llm__bytes_u64(file.at + 24)); }

static void test_refusals(void **state) {
    bytes file = small_file();
    const size_t n_header = (size_t)llm__bytes_u64(file.at + 24);
    llm_model_desc check = {.check = true}, bf16 = {.dtype = LLM_DTYPE_BF16};
    uint8_t *first = (uint8_t *)malloc(file.n + 1);
    (void)state;
    assert_non_null(first);
    memcpy(first, file.at, file.n + 1);
    for (size_t n = 0; n < file.n; n += n < 300 ? 1 : 777)
        refuses(file.at, n, NULL, LLM_ERROR_FORMAT, n < 4 ? "ends" : "cut off");
    refuses(file.at, file.n + 1, NULL, LLM_ERROR_FORMAT, "its header says");
    for (size_t at = 0; at < n_header; at += at < 300 ? 1 : 97) { /* any byte of the header */
        file.at[at] ^= 0x10;
        llm_model *model;
        llm_error err;
        llm_status status = llm_model_load_memory(&model, file.at, file.n, NULL, &err);
        assert_true(status == LLM_ERROR_FORMAT || status == LLM_ERROR_UNSUPPORTED);
        assert_explained(status, &err);
        if (at >= 64 && !strstr(err.message, "altered")) fail_msg("%s", err.message);
        file.at[at] = first[at];
    }
    for (size_t at = n_header; at < file.n; at += 997) { /* a changed weight is only noticed with desc.check */
        file.at[at] ^= 1;
        refuses(file.at, file.n, &check, LLM_ERROR_FORMAT, "weights of this packed file were altered");
        llm_model_free(load_memory(file.at, file.n, NULL));
        file.at[at] = first[at];
    }
    refuses(file.at, file.n, &bf16, LLM_ERROR_UNSUPPORTED, "holds its weights as Q8_0, and is not converted to bf16");
    memcpy(file.at + 8, "\1\2\3\4", 4);
    refuses(file.at, file.n, NULL, LLM_ERROR_UNSUPPORTED, "big-endian");
    memcpy(file.at + 8, first + 8, 4);
    file.at[12] = LLM__PACKED_VERSION + 1;
    seal(file);
    refuses(file.at, file.n, NULL, LLM_ERROR_UNSUPPORTED, "this is version 3 of packed files");
    memcpy(file.at, first, file.n);
    for (size_t at = 64; at + 2 < n_header; at++) /* an unknown type */
        if (!memcmp(file.at + at, "\2\0\0\0\0\0\0\0q8", 10)) {
            file.at[at + 9] = '9';
            seal(file);
            refuses(file.at, file.n, NULL, LLM_ERROR_UNSUPPORTED, "\"q9\", which this library does not know");
            break;
        }
    size_t n_tiny;
    uint8_t *gguf = tiny_model(&TINY_ODD, &n_tiny);
    refuses(gguf, n_tiny, &check, LLM_ERROR_UNSUPPORTED, "not a packed file");
    free(gguf);
    free(first);
    free(file.at);
}

static void resize_pairs(llm__env *env, void *room) {
    llm_tokenizer *t = (llm_tokenizer *)llm__alloc_zero(env, 1, sizeof *t);
    llm__bpe_pairs_resize(env, t, *(const size_t *)room);
}

/* Tables have the same limits when they are built and when they are read. */
static void test_large_tables(void **state) {
    enum { MOST = LLM__MOST_SLOTS };
    size_t room = 2 * (size_t)MOST;
    const char *path = new_path();
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_FILE);
    const int32_t slots[2] = {(int32_t)model->tokenizer->piece_mask + 1, (int32_t)model->tokenizer->pair_mask + 1},
                  too_many = 2 * MOST;
    llm__pool pool;
    llm__env env;
    llm_error err;
    (void)state;
    assert_int_equal(llm__hash_slots(LLM__MOST_TOKENS + LLM__MOST_TOKENS / 2) <= MOST, true);
    assert_int_equal(llm__hash_slots(LLM__MOST_MERGES + LLM__MOST_MERGES / 2), MOST);
    llm__pool_init(&pool, NULL);
    llm__env_init(&env, &pool, &err, NULL);
    assert_int_equal(llm__env_run(&env, resize_pairs, &room), LLM_ERROR_UNSUPPORTED);
    assert_explained(LLM_ERROR_UNSUPPORTED, &err);
    llm__pool_free(&pool);
    save(model, path);
    llm_model_free(model);
    bytes file = read_file(path);
    size_t at = (size_t)llm__bytes_u64(file.at + 56); /* the tokenizer */
    while (!same(file.at + at, slots, sizeof slots)) at += 4;
    for (int i = 0; i < 2; i++) {
        memcpy(file.at + at + 4 * i, &too_many, 4);
        seal(file);
        refuses(file.at, file.n, NULL, LLM_ERROR_FORMAT, i ? "slots for merges is" : "slots for tokens is");
        memcpy(file.at + at + 4 * i, &slots[i], 4);
    }
    free(file.at);
    assert_int_equal(remove(path), 0);
}

/* A merge of the tokenizer lacks a token, or its rank. */
static void test_merges(void **state) {
    bytes file = small_file();
    llm_model *model = load_memory(file.at, file.n, NULL);
    const llm__bpe_pair_slot *slot = model->tokenizer->pairs;
    size_t at = (size_t)llm__bytes_u64(file.at + 56); /* the tokenizer */
    llm__bpe_pair_slot damaged[3];
    (void)state;
    while (slot->left == LLM__NONE) slot++;
    for (int i = 0; i < 3; i++) damaged[i] = *slot;
    llm_model_free(model);
    while (!same(file.at + at, damaged, sizeof *damaged)) at++;
    damaged[0].right = LLM__NONE;
    damaged[1].merged = LLM__NONE;
    damaged[2].rank = LLM__NO_RANK;
    for (int i = 0; i < 3; i++) {
        memcpy(file.at + at, &damaged[i], sizeof *damaged);
        seal(file);
        refuses(file.at, file.n, NULL, LLM_ERROR_FORMAT, "two tokens of the tokenizer merge to none");
    }
    free(file.at);
}

/* A header has the right checksum but names another type of weights. The file must be refused, or the model must work:
   the size of a context's buffers depends on the type. */
static void test_other_types(void **state) {
    (void)state;
    for (int held = LLM_DTYPE_F32; held <= LLM_DTYPE_FILE; held++) {
        const char *path = new_path();
        llm_model *model = load_tiny(held == LLM_DTYPE_FILE ? &TINY_ALL_TYPES : &TINY_ODD, (llm_dtype)held);
        assert_int_equal(llm_model_get_info(model).dtype, held);
        save(model, path);
        llm_model_free(model);
        bytes file = read_file(path);
        size_t at = 64;
        for (int i = 0; i < 3; i++) at += 8 + (size_t)llm__bytes_u64(file.at + at); /* strings */
        assert_int_equal(llm__bytes_u32(file.at + at), held);
        for (int named = LLM_DTYPE_F32; named <= LLM_DTYPE_FILE; named++) {
            llm_error err;
            file.at[at] = (uint8_t)named;
            seal(file);
            llm_status status = llm_model_load_memory(&model, file.at, file.n, NULL, &err);
            assert_true(!status || named != held);
            if (status) assert_non_null(strstr(err.message, "a weight of this packed file is not held as"));
            else free(logits_of(model));
            llm_model_free(model);
        }
        free(file.at);
        assert_int_equal(remove(path), 0);
    }
}

/* Packed files do not store the zeros of 2:4 matrices, so keep_zeros is refused. */
static void test_keep_zeros(void **state) {
    const char *path = new_path();
    llm_model *model = load_model(golden_path("sparse/bf16"), NULL);
    const llm_model_desc keep = {.n_threads = 1, .keep_zeros = true};
    (void)state;
    assert_non_null(strstr(llm_model_get_info(model).held, "2:4"));
    save(model, path);
    llm_model_free(model);
    bytes file = read_file(path);
    refuses(file.at, file.n, &keep, LLM_ERROR_UNSUPPORTED, "keep_zeros");
    free(file.at);
    assert_int_equal(remove(path), 0);
    file = small_file();
    llm_model_free(load_memory(file.at, file.n, &keep)); /* accepted: the file has no 2:4 matrices */
    free(file.at);
}

/* Returns a longer header size when the beginning is read for the second time. */
static bool read_changing(void *user, uint64_t offset, void *to, size_t n) {
    reader *r = (reader *)user;
    memcpy(to, r->file.at + offset, n);
    if (offset == 0 && r->n_read++ && n >= 32) ((uint8_t *)to)[24] += 64;
    return true;
}

static bool read_nothing(void *user, uint64_t offset, void *to, size_t n) {
    (void)user, (void)offset, (void)to, (void)n;
    return false;
}

static void test_bad_callbacks(void **state) {
    reader r = {small_file(), 0};
    llm_model_info info;
    llm_error err;
    (void)state;
    assert_true(r.file.at[24] < 192);
    assert_int_equal(llm_model_read_info_callback(read_changing, &r, r.file.n, NULL, &info, &err), LLM_ERROR_IO);
    assert_non_null(strstr(err.message, "changed while it was read"));
    assert_int_equal(llm_model_read_info_callback(read_nothing, &r, r.file.n, NULL, &info, &err), LLM_ERROR_IO);
    assert_non_null(strstr(err.message, "the read callback failed"));
    free(r.file.at);
}

/* Headers with the right checksum but random bytes give an error message, or a model that works. */
static void test_damaged(void **state) {
    bytes file = small_file();
    const size_t n_header = (size_t)llm__bytes_u64(file.at + 24);
    uint8_t *first = (uint8_t *)malloc(file.n);
    uint32_t random = 1;
    int n_loaded = 0;
    (void)state;
    assert_non_null(first);
    memcpy(first, file.at, file.n);
    for (int i = 0; i < (SANITIZED ? 3000 : 12000); i++) {
        for (int j = 0; j < 1 + i % 3; j++) {
            random = random * 1664525u + 1013904223u;
            const size_t at = 48 + (random >> 4) % (n_header - 48), n_low = 48 + (random >> 4) % 600;
            random = random * 1664525u + 1013904223u;
            file.at[i % 2 ? at : n_low < n_header ? n_low : at] = (uint8_t)(random % 3 ? random >> 24 : 255);
        }
        seal(file);
        heap h = {0};
        llm_model_desc desc = {.n_threads = 1, .host = heap_host(&h)};
        llm_model *model;
        llm_model_info info;
        llm_error err;
        llm_status status = llm_model_load_memory(&model, file.at, file.n, &desc, &err);
        if (status) assert_explained(status, &err);
        else n_loaded++;
        if (!status) {
            llm_token ids[64];
            assert_in_range(llm_encode(llm_model_tokenizer(model), "a aab<|end|>", 12, 3, ids, 64, NULL), 0, 64);
            assert_int_equal(llm_model_read_info_memory(file.at, file.n, &desc, &info, &err), LLM_OK);
            llm_context_desc small = {.n_ctx = 8, .n_threads = 1, .host = heap_host(&h)};
            llm_context *ctx;
            llm_token token = 1;
            llm_batch batch = {.n_tokens = 1, .tokens = &token};
            if (!llm_context_create(&ctx, model, &small, &err) && llm_model_get_info(model).n_vocab > 1)
                assert_int_equal(llm_forward(ctx, &batch, &err), LLM_OK);
            llm_context_free(ctx);
        }
        llm_model_free(model);
        assert_all_returned(&h);
        memcpy(file.at, first, n_header);
    }
    print_message("%d of the damaged files load\n", n_loaded);
    assert_true(n_loaded > 0);
    free(first);
    free(file.at);
}

/* Saving refuses existing files and bad paths, and leaves no files behind. */
static void test_saving(void **state) {
    const char *path = new_path();
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_FILE);
    llm_error err;
    (void)state;
    save(model, path);
    assert_int_equal(llm_model_save_packed(model, path, NULL, &err), LLM_ERROR_IO);
    assert_non_null(strstr(err.message, "exists already"));
    assert_int_equal(llm_model_save_packed(model, joined(folder, "none/a"), NULL, &err), LLM_ERROR_IO);
    assert_int_equal(llm_model_save_packed(NULL, path, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_model_save_packed(model, NULL, NULL, &err), LLM_ERROR_ARGUMENT);
    llm_quantize_desc quantize = {.type = "Q8_0"};
    assert_int_equal(llm_quantize_gguf(path, new_path(), &quantize, &err), LLM_ERROR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "this is a packed file"));
    assert_int_equal(llm_quantize_directory(path, new_path(), NULL, &err), LLM_ERROR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "this is not a directory"));
    assert_int_equal(llm_prune_directory(path, new_path(), LLM_DTYPE_BF16, NULL, NULL, &err), LLM_ERROR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "this is not a directory"));
    llm_model_free(model);
    assert_int_equal(remove(path), 0);
#if !defined(_WIN32)
    /* A full disk: no file may be longer than 4 kB. */
    struct rlimit old, low;
    model = load_tiny(&TINY_ODD, LLM_DTYPE_FILE);
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    low = old;
    low.rlim_cur = 4096;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    assert_int_equal(llm_model_save_packed(model, path, NULL, &err), LLM_ERROR_IO);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    if (!strstr(err.message, path)) fail_msg("\"%s\" does not name the file", err.message);
    assert_int_equal(access(path, F_OK), -1);
    llm_model_free(model);
#endif
}

/* A real vocabulary has pieces of many characters in many scripts. */
static void test_default_model(void **state) {
    const llm_model_desc as_it_is = {.dtype = LLM_DTYPE_FILE, .n_threads = 1};
    const char *path = new_path();
    llm_model *model = load_model(model_path(), &as_it_is);
    (void)state;
    save(model, path);
    llm_model *packed = load_model(path, NULL);
    assert_same_text(llm_model_tokenizer(model), llm_model_tokenizer(packed));
    llm_model_free(packed);
    llm_model_free(model);
    assert_int_equal(remove(path), 0);
}

static bool stop_half_way(void *user, float done) {
    (void)user;
    return done < 0.5f;
}

static void test_cancelled(void **state) {
    const char *path = new_path();
    char unfinished[140];
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_FILE);
    llm_host host = {.progress = stop_half_way};
    llm_model_desc desc = {.host = host};
    llm_error err;
    (void)state;
    snprintf(unfinished, sizeof unfinished, "%s.tmp", path);
    assert_int_equal(llm_model_save_packed(model, path, &host, &err), LLM_ERROR_CANCELLED);
    assert_int_equal(access(path, F_OK) & access(unfinished, F_OK), -1);
    save(model, path);
    llm_model_free(model);
    assert_int_equal(llm_model_load(&model, path, &desc, &err), LLM_ERROR_CANCELLED);
    assert_null(model);
    assert_int_equal(remove(path), 0);
}

typedef struct starved {
    heap h;
    const llm_model *model;
} starved;

static llm_status save_starved(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_host host = heap_host(&s->h);
    const char *path = new_path();
    llm_status status = llm_model_save_packed(s->model, path, &host, err);
    assert_int_equal(access(path, F_OK), status ? -1 : 0);
    if (!status) remove(path);
    return status;
}

static void test_starved(void **state) {
    const char *path = new_path();
    llm_model *model = load_model(golden("qwen2"), NULL);
    starved s = {{0}, model};
    load_job job = {{0}, path};
    (void)state;
    starve(&s.h, save_starved, &s, 1, "llm_model_save_packed");
    save(model, path);
    starve(&job.h, load_model_starved, &job, 1, "llm_model_load of a packed file");
    starve(&job.h, load_tokenizer_starved, &job, 1, "llm_tokenizer_load of a packed file");
    llm_model_free(model);
    assert_int_equal(remove(path), 0);
}

/* Ranks cannot share a packed file. */
static void test_ranks(void **state) {
    const char *path = new_path();
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_FILE);
    llm_comm one = {.size = 2};
    llm_model_desc tensor = {.tensor = &one}, pipeline = {.pipeline = &one};
    llm_model_info info;
    llm_error err;
    (void)state;
    save(model, path);
    llm_model_free(model);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(llm_model_read_info(path, i ? &pipeline : &tensor, &info, &err), LLM_ERROR_UNSUPPORTED);
        assert_non_null(strstr(err.message, "ranks cannot share a packed file"));
    }
    assert_int_equal(remove(path), 0);
}

#if defined(__linux__)
/* Reads the private and the resident memory of this process's mapping of a file, in kB. */
static void mapped_memory(const char *path, long *own, long *resident) {
    char line[512];
    bool inside = false;
    FILE *maps = fopen("/proc/self/smaps", "r");
    assert_non_null(maps);
    *own = *resident = 0;
    while (fgets(line, sizeof line, maps)) {
        long kb;
        if (strchr(line, '-') && strstr(line, " r")) inside = strstr(line, path) != NULL;
        if (inside && sscanf(line, "Rss: %ld kB", &kb) == 1) *resident += kb;
        if (inside && sscanf(line, "Anonymous: %ld kB", &kb) == 1) *own += kb;
    }
    fclose(maps);
}

/* Two processes compute with one file. Neither has private memory for the weights. */
static void test_two_processes(void **state) {
    const char *path = new_path();
    tiny_spec spec = {2, 512, 1024, 4, 2, 128, 512, 43, 1, 8, 1};
    llm_model *model = load_tiny(&spec, LLM_DTYPE_FILE);
    const uint64_t n = llm_model_get_info(model).weight_bytes;
    float *wanted = logits_of(model);
    int hears[2], says[2];
    char byte;
    (void)state;
    save(model, path);
    llm_model_free(model);
    assert_int_equal(pipe(hears) | pipe(says), 0);
    const pid_t child = fork();
    assert_true(child >= 0);
    close(child ? says[1] : hears[1]);
    heap h = {0};
    llm_model_desc desc = {.n_threads = 1, .host = heap_host(&h)};
    model = load_model(path, &desc);
    const int64_t on_heap = h.live;
    float *logits = logits_of(model);
    long own, resident;
    mapped_memory(path, &own, &resident);
    bool good = same(logits, wanted, 5 * 299 * sizeof *wanted) && !own && resident * 1024 >= (long)n &&
                on_heap < (int64_t)n / 4;
    if (!child) { /* holds the model until the parent is done */
        good = good && write(says[1], "x", 1) == 1 && read(hears[0], &byte, 1) == 1;
        _exit(!good);
    }
    int status;
    assert_int_equal(read(says[0], &byte, 1), 1);
    assert_int_equal(write(hears[1], "x", 1), 1);
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_true(good);
    free(logits);
    free(wanted);
    llm_model_free(model);
    assert_int_equal(remove(path), 0);
}
#endif

static int make_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/llm_packed_XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    (void)state;
    return rmdir(folder); /* fails if a test has left a file */
}

int main(void) {
    const struct CMUnitTest tests[] = {
#if defined(__linux__)
        cmocka_unit_test(test_two_processes), /* forks, so it must run before threads exist */
#endif
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_formats),
        cmocka_unit_test(test_same_file),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_large_tables),
        cmocka_unit_test(test_merges),
        cmocka_unit_test(test_other_types),
        cmocka_unit_test(test_keep_zeros),
        cmocka_unit_test(test_bad_callbacks),
        cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_saving),
        cmocka_unit_test(test_default_model),
        cmocka_unit_test(test_cancelled),
        cmocka_unit_test(test_starved),
        cmocka_unit_test(test_ranks)
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
