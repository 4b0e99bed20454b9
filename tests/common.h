/* Used by several tests: files, models, golden data in lines of JSON, an allocator that counts and fails on request.
   Include it after llm.h. If the test uses tests/tiny.h or jansson.h, include those before it. */
#ifndef TESTS_COMMON_H
#define TESTS_COMMON_H

#include "tests/check.h"

/* True under an emulator, which computes twenty times slower. */
static inline bool emulated(void) { return getenv("LLM_TEST_EMULATED") != NULL; }

/* ---- Files ---- */

/* Returns "DIRECTORY/NAME". The string is valid for the next 7 calls. */
static inline const char *joined(const char *directory, const char *name) {
    static char paths[8][512];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", directory, name);
    return path;
}

/* The path of a file or folder in tests/golden. */
static inline const char *golden_path(const char *name) {
    const char *dir = getenv("LLM_TEST_DIR");
    char inner[256];
    snprintf(inner, sizeof inner, "golden/%s", name);
    return joined(dir ? dir : "tests", inner);
}

static inline const char *model_path(void) {
    const char *path = getenv("LLM_MODEL");
    return path ? path : "models/SmolLM2-135M-Instruct.Q4_1.gguf";
}

typedef struct bytes {
    uint8_t *at;
    size_t n;
} bytes;

/* Reads a whole file and adds a NUL after it. Free it with free(b.at). */
static inline bytes read_file(const char *path) {
    bytes b = {NULL, 0};
    FILE *file = fopen(path, "rb");
    if (!file) fail_msg("%s cannot be read", path);
    fseek(file, 0, SEEK_END);
    b.n = (size_t)ftell(file);
    rewind(file);
    b.at = (uint8_t *)malloc(b.n + 1);
    assert_non_null(b.at);
    assert_int_equal(fread(b.at, 1, b.n, file), b.n);
    b.at[b.n] = 0;
    fclose(file);
    return b;
}

static inline void write_file(const char *path, const void *data, size_t n) {
    FILE *file = fopen(path, "wb");
    if (!file) fail_msg("%s cannot be written", path);
    assert_int_equal(fwrite(data, 1, n, file), n);
    assert_int_equal(fclose(file), 0);
}

/* ---- Models and contexts: if a call fails, the test fails ---- */

/* desc may be NULL. */
static inline llm_model *load_model(const char *path, const llm_model_desc *desc) {
    llm_model *model = NULL;
    llm_error err;
    if (llm_model_load(&model, path, desc, &err)) fail_msg("%s", err.message);
    return model;
}

static inline llm_model *load_memory(const void *data, size_t size, const llm_model_desc *desc) {
    llm_model *model = NULL;
    llm_error err;
    if (llm_model_load_memory(&model, data, size, desc, &err)) fail_msg("%s", err.message);
    return model;
}

#ifdef TINY_H
/* Returns the status instead of failing the test. */
static inline llm_status try_tiny(llm_model **model, const tiny_spec *spec, llm_model_desc desc, llm_error *err) {
    size_t size;
    uint8_t *data = tiny_model(spec, &size);
    llm_status status = llm_model_load_memory(model, data, size, &desc, err);
    free(data);
    return status;
}

static inline llm_model *load_tiny(const tiny_spec *spec, llm_dtype dtype) {
    llm_model *model = NULL;
    llm_model_desc desc;
    llm_error err;
    memset(&desc, 0, sizeof desc);
    desc.dtype = dtype;
    desc.n_threads = 1;
    if (try_tiny(&model, spec, desc, &err)) fail_msg("%s", err.message);
    return model;
}
#endif

static inline llm_context *create_context(const llm_model *model, const llm_context_desc *desc) {
    llm_context *ctx = NULL;
    llm_error err;
    if (llm_context_create(&ctx, model, desc, &err)) fail_msg("%s", err.message);
    return ctx;
}

/* Frees the context and its model. */
static inline void close_context(llm_context *ctx) {
    llm_model *model = (llm_model *)(uintptr_t)llm_context_model(ctx);
    llm_context_free(ctx);
    llm_model_free(model);
}

/* A question with n_vocab endings: each token is one. It uses static memory, so the next call overwrites it. */
static inline llm_question every_token(const llm_token *context, int n_context, int n_vocab) {
    enum { MOST = 1024 };
    static llm_token tokens[MOST];
    static const llm_token *endings[MOST];
    static int ones[MOST];
    llm_question question = {context, n_context, n_vocab, endings, ones};
    assert_in_range(n_vocab, 1, MOST);
    for (int i = 0; i < n_vocab; i++) {
        tokens[i] = i;
        endings[i] = &tokens[i];
        ones[i] = 1;
    }
    return question;
}

#ifdef JANSSON_H
static inline FILE *open_lines(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail_msg("%s cannot be read", path);
    return file;
}

/* Parses the next line of a file of JSON lines; release it with json_decref. After the last line it closes the file and
   returns NULL. */
static inline json_t *next_line(FILE *file) {
    static char line[1 << 18];
    if (!fgets(line, sizeof line, file)) {
        fclose(file);
        return NULL;
    }
    json_t *value = json_loads(line, JSON_ALLOW_NUL, NULL);
    if (!value) fail_msg("this line is not JSON: %.60s", line);
    return value;
}
#endif

/* ---- An allocator that counts, and fails on request; any thread may use it ---- */

typedef struct heap {
    int64_t live, peak; /* bytes */
    int64_t n_blocks, n_calls, fail_at;
} heap;

enum { HEAP_HEAD = 16 };

static inline void *heap_alloc(void *user, size_t size) {
    heap *h = (heap *)user;
    if (__atomic_add_fetch(&h->n_calls, 1, __ATOMIC_RELAXED) == h->fail_at) return NULL;
    uint8_t *block = (uint8_t *)malloc(size + HEAP_HEAD);
    if (!block) return NULL;
    int64_t live = __atomic_add_fetch(&h->live, (int64_t)size, __ATOMIC_RELAXED);
    if (live > h->peak) h->peak = live; /* read only by tests of one thread */
    __atomic_add_fetch(&h->n_blocks, 1, __ATOMIC_RELAXED);
    memcpy(block, &size, sizeof size);
    return block + HEAP_HEAD;
}

static inline void heap_free(void *user, void *ptr) {
    heap *h = (heap *)user;
    uint8_t *block = (uint8_t *)ptr - HEAP_HEAD;
    size_t size;
    memcpy(&size, block, sizeof size);
    __atomic_sub_fetch(&h->live, (int64_t)size, __ATOMIC_RELAXED);
    __atomic_sub_fetch(&h->n_blocks, 1, __ATOMIC_RELAXED);
    free(block);
}

static inline llm_host heap_host(heap *h) {
    llm_host host;
    memset(&host, 0, sizeof host);
    host.alloc = heap_alloc;
    host.free = heap_free;
    host.user = h;
    return host;
}

static inline void assert_all_returned(const heap *h) {
    assert_int_equal(h->live, 0);
    assert_int_equal(h->n_blocks, 0);
}

/* A failure must have a message. */
static inline void assert_explained(llm_status status, const llm_error *err) {
    assert_int_equal(err->code, status);
    assert_non_null(memchr(err->message, 0, sizeof err->message));
    if (strlen(err->message) < 10) fail_msg("status %d has the message \"%s\"", status, err->message);
    if (!is_utf8(err->message, strlen(err->message))) fail_msg("the message is not UTF-8: %s", err->message);
}

/* Runs act(job), which allocates from h, again and again: the first allocation fails, then the second, the third, and
   so on, until a run has no more allocations to fail. After the 100th, only every `step`th allocation is tried. */
static inline void starve(heap *h, llm_status (*act)(void *job, llm_error *err), void *job, int step,
                          const char *name) {
    int64_t live = h->live, n_blocks = h->n_blocks;
    for (int64_t k = 1;; k += k < 100 ? 1 : step) {
        llm_error err;
        h->n_calls = 0;
        h->fail_at = k;
        llm_status status = act(job, &err);
        bool reached = h->n_calls >= k;
        h->fail_at = 0;
        if (h->live != live || h->n_blocks != n_blocks) fail_msg("%s leaks when allocation %d fails", name, (int)k);
        if (!reached) {
            if (status) fail_msg("%s: %s", name, err.message);
            print_message("%s: %d allocations\n", name, (int)h->n_calls);
            return;
        }
        if (status != LLM_ERROR_MEMORY) fail_msg("%s gives status %d when allocation %d fails", name, status, (int)k);
        assert_explained(status, &err);
    }
}

typedef struct load_job {
    heap h;
    const char *path;
} load_job;

/* This function and the next are passed to `starve`; the job is a load_job. */
static inline llm_status load_model_starved(void *job, llm_error *err) {
    load_job *j = (load_job *)job;
    llm_model *model;
    llm_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_threads = 1;
    desc.host = heap_host(&j->h);
    llm_status status = llm_model_load(&model, j->path, &desc, err);
    assert_int_equal(status == LLM_OK, model != NULL);
    llm_model_free(model);
    return status;
}

static inline llm_status load_tokenizer_starved(void *job, llm_error *err) {
    load_job *j = (load_job *)job;
    llm_host host = heap_host(&j->h);
    llm_tokenizer *tokenizer;
    llm_status status = llm_tokenizer_load(&tokenizer, j->path, &host, err);
    assert_int_equal(status == LLM_OK, tokenizer != NULL);
    llm_tokenizer_free(tokenizer);
    return status;
}

#endif
