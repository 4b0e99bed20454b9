/* Fuzz targets for libFuzzer. Arbitrary bytes must be refused with a message, or give an object that works. Memory and
   time must be proportional to the number of bytes. This is one program; the name by which it is called selects the
   target (see `targets` at the end), that is, the meaning of the bytes:

     gguf             a GGUF file
     packed           a packed file, whose size and header checksum are corrected first
     safetensors      config.json, NUL, model.safetensors.index.json or nothing, NUL, safetensors
     json             a JSON text, compared with jansson
     tokenizer.json   tokenizer.json, NUL, tokenizer_config.json or nothing
     tokenizer.model  tokenizer_config.json or nothing, NUL, tokenizer.model
     pth              a byte of PTH_ flags, params.json, NUL, consolidated.00.pth or its data.pkl alone
     chat             a chat template, NUL, a message, NUL, a message ...
     messages         a byte for the template, a byte for the room, messages_json, NUL, tools_json, NUL, variables_json;
                      an empty one is left out
     tool-calls       an answer
     grammar          a byte for the kind, a byte for the draws, a regular expression, GBNF, JSON Schema or tools
     round-trip       a byte for flags, a byte for one of the tokenizers of tests/golden, a text */
#define LLM_IMPLEMENTATION
#define LLM__JINJA_MEMORY ((size_t)8 << 20) /* so that rendering ends before the fuzzer's limits */
#define LLM__GRAM_MOST_BYTES ((size_t)16 << 20)
#include "llm.h"

#include <jansson.h>
#include <malloc.h>

#include "tests/small.h"

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (condition) break;                                                         \
        fprintf(stderr, "%s:%d: failed check: %s\n", __FILE__, __LINE__, #condition); \
        abort();                                                                      \
    } while (0)

/* ---- Memory and time ---- */

enum { MOST_MEMORY = 48 << 20, MEMORY_PER_BYTE = 400, MOST_SECONDS = 3 };

static size_t live, allowed; /* bytes */
static clock_t begun;

static void *counted_alloc(void *user, size_t size) {
    (void)user;
    if (size > (size_t)1 << 40) return NULL; /* the sanitizer would report such a size as an error */
    if (live + size > allowed) {
        fprintf(stderr, "too much memory: %zu bytes in addition to %zu; the limit for this input is %zu\n", size, live,
                allowed);
        abort();
    }
    void *ptr = malloc(size);
    CHECK(ptr);
    live += malloc_usable_size(ptr);
    return ptr;
}

static void counted_free(void *user, void *ptr) {
    (void)user;
    live -= malloc_usable_size(ptr);
    free(ptr);
}

static const llm_host counting = {counted_alloc, counted_free, NULL, NULL, NULL};

static void begin(size_t size) {
    live = 0;
    allowed = MOST_MEMORY + MEMORY_PER_BYTE * size;
    begun = clock();
}

static void end(void) {
    double seconds = (double)(clock() - begun) / CLOCKS_PER_SEC;
    if (live) fprintf(stderr, "%zu bytes were not freed\n", live);
    if (seconds > MOST_SECONDS) fprintf(stderr, "too slow: %.1f s\n", seconds);
    CHECK(!live && seconds <= MOST_SECONDS);
}

static void check_error(llm_status status, const llm_error *err) {
    const char *end_of_text = (const char *)memchr(err->message, 0, sizeof err->message);
    CHECK(status > LLM_OK && status <= LLM_ERROR_DEVICE && err->code == status && end_of_text);
    CHECK(end_of_text - err->message >= 10);
    CHECK(llm__utf8_check((const uint8_t *)err->message, (const uint8_t *)end_of_text) == (const uint8_t *)end_of_text);
}

static bool all_good; /* FUZZ_ALL_GOOD is set: the files are known to be good */

static void check_refusal(llm_status status, const llm_error *err) {
    check_error(status, err);
    if (all_good) fprintf(stderr, "%s\n", err->message);
    CHECK(!all_good);
}

/* ---- Texts ---- */

/* Copies a text and replaces each byte that is not part of well-formed UTF-8 by U+FFFD. `out` has room for 3 n
   bytes. */
static size_t repair(const uint8_t *p, size_t n, uint8_t *out) {
    size_t n_out = 0;
    for (const uint8_t *at = p; at < p + n;) {
        size_t length = llm__utf8_length(at, p + n);
        memcpy(out + n_out, length ? at : (const uint8_t *)"\xEF\xBF\xBD", length ? length : 3);
        n_out += length ? length : 3;
        at += length ? length : 1;
    }
    return n_out;
}

/* Decodes ids. Streaming must give the same text, with invalid UTF-8 replaced. Free the result with free(). */
static uint8_t *decode(const llm_tokenizer *t, const llm_token *ids, size_t n_ids, unsigned flags, size_t *n) {
    *n = llm_decode(t, ids, n_ids, flags, NULL, 0);
    uint8_t *text = (uint8_t *)malloc(*n + 1), *whole = (uint8_t *)malloc(3 * *n + 1),
            *streamed = (uint8_t *)malloc(3 * *n + 9);
    llm_text_stream stream;
    size_t n_streamed = 0;
    CHECK(text && whole && streamed);
    CHECK(llm_decode(t, ids, n_ids, flags, (char *)text, *n + 1) == *n && !text[*n]);
    memset(&stream, 0, sizeof stream);
    stream.flags = flags;
    for (size_t i = 0; i <= n_ids; i++) {
        size_t room = 3 * *n + 9 - n_streamed;
        n_streamed += llm_stream_token(t, &stream, i < n_ids ? ids[i] : -1, (char *)streamed + n_streamed, room);
        CHECK(n_streamed < 3 * *n + 9);
    }
    size_t n_whole = repair(text, *n, whole);
    CHECK(n_streamed == n_whole && !memcmp(streamed, whole, n_whole));
    free(whole);
    free(streamed);
    return text;
}

/* Checks properties of every tokenizer and text. `exact`: decoding must give the text back. */
static void check_text(const llm_tokenizer *t, const uint8_t *text, size_t n_text, unsigned flags, bool exact) {
    size_t room = 4 * n_text + 8;
    llm_token *ids = (llm_token *)malloc(room * sizeof *ids), *few = (llm_token *)malloc(room * sizeof *ids);
    uint8_t *wanted = (uint8_t *)malloc(3 * n_text + 1);
    llm_error err;
    CHECK(ids && few && wanted);
    int64_t n = llm_encode(t, (const char *)text, n_text, flags, ids, room, &err);
    CHECK(n >= 0 && n <= (int64_t)room);
    for (int64_t i = 0; i < n; i++) CHECK(ids[i] >= 0 && ids[i] < llm_tokenizer_n_vocab(t));
    size_t half = (size_t)n / 2;
    memset(few, 0xAB, room * sizeof *few);
    CHECK(llm_encode(t, (const char *)text, n_text, flags, few, half, &err) == n);
    CHECK(!memcmp(few, ids, half * sizeof *ids) && (half == room || few[half] == (llm_token)0xABABABAB));
    size_t n_decoded, n_wanted = repair(text, n_text, wanted);
    uint8_t *decoded = decode(t, ids, (size_t)n, flags, &n_decoded);
    CHECK(!exact || (n_decoded == n_wanted && !memcmp(decoded, wanted, n_wanted)));
    free(decoded);
    for (int64_t i = 0; i < n; i++)
        ids[i] = (llm_token)((uint64_t)i * 2654435761u % ((unsigned)llm_tokenizer_n_vocab(t) + 3)) - 1;
    free(decode(t, ids, (size_t)n, flags, &n_decoded)); /* unordered ids, some of them invalid */
    free(ids);
    free(few);
    free(wanted);
}

static const char *const some_texts[] = {"", "The quick  brown fox's 42\n",
                                         "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab <s></s><|im_end|> \t",
                                         "\xFF\xE4\xBD\xA0\xE2\x96\x81\xCC\x81 e\xCC\x81\xED\xA0\x80"};

static void check_tokenizer(const llm_tokenizer *t) {
    for (size_t i = 0; i < sizeof some_texts / sizeof *some_texts; i++)
        for (unsigned flags = 0; flags < 4; flags++)
            check_text(t, (const uint8_t *)some_texts[i], strlen(some_texts[i]), flags, false);
}

/* ---- Models ---- */

static void use_context(const llm_model *model, llm_context *ctx) {
    static const llm_message messages[] = {{"system", " a\n"}, {"user", "b\xFF</s>"}, {"assistant", "c"}, {"user", ""}};
    llm_sampler sampler;
    llm_generate_desc desc;
    llm_error err;
    llm_token tokens[3] = {0, llm_tokenizer_n_vocab(llm_model_tokenizer(model)) - 1, 0};
    llm_batch batch = {3, tokens, NULL, NULL};
    CHECK(!llm_forward(ctx, &batch, &err) && llm_logits(ctx, 2));
    memset(&sampler, 0, sizeof sampler);
    memset(&desc, 0, sizeof desc);
    sampler.temperature = 1;
    sampler.top_p = 0.9f;
    desc.sampler = &sampler;
    desc.prompt = "aab\xFF";
    desc.max_tokens = 3;
    llm_status status = llm_generate(ctx, &desc, NULL, &err);
    if (status) check_error(status, &err);
    desc.prompt = NULL;
    desc.messages = messages;
    desc.n_messages = 4;
    status = llm_generate(ctx, &desc, NULL, &err);
    if (status) check_error(status, &err);
}

static void use_model(const llm_model *model) {
    llm_context_desc desc;
    llm_context *ctx;
    llm_error err;
    memset(&desc, 0, sizeof desc);
    desc.n_ctx = 24;
    desc.n_batch = 4;
    desc.n_threads = 1;
    llm_status status = llm_context_create(&ctx, model, &desc, &err);
    if (status) check_error(status, &err);
    else use_context(model, ctx);
    llm_context_free(ctx);
    check_tokenizer(llm_model_tokenizer(model));
}

static void try_model(llm__file_source source, llm_dtype dtype) {
    llm_model *model;
    llm_model_desc desc;
    llm_model_info info;
    llm_memory memory;
    llm_error err, info_err;
    memset(&desc, 0, sizeof desc);
    desc.dtype = dtype;
    desc.n_threads = 1;
    desc.host = counting;
    memset(&err, 0xEE, sizeof err);
    memset(&info_err, 0xEE, sizeof err);
    llm_status status = llm__model_load(&model, &source, &desc, &err);
    llm_status info_status = llm__model_read_info(&source, &desc, &info, &info_err);
    if (info_status) check_error(info_status, &info_err);
    if (status) {
        check_refusal(status, &err);
        CHECK(!model);
        return;
    }
    /* Before its weights are read, a matrix with 2:4 sparsity counts like any other one. */
    const llm_model_info loaded = llm_model_get_info(model);
    CHECK(!info_status && (strstr(loaded.held, "2:4") ? info.weight_bytes >= loaded.weight_bytes
                                                      : info.weight_bytes == loaded.weight_bytes));
    info_status = llm_memory_estimate(&info, NULL, &memory, &info_err);
    if (info_status) check_error(info_status, &info_err);
    use_model(model);
    llm_model_free(model);
}

typedef struct bytes {
    const uint8_t *at;
    size_t n;
} bytes;

static bool read_bytes(void *user, uint64_t offset, void *to, size_t n) {
    const bytes *b = (const bytes *)user;
    CHECK(offset <= b->n && n <= b->n - offset);
    memcpy(to, b->at + offset, n);
    return true;
}

static void fuzz_gguf(const uint8_t *data, size_t size) {
    bytes all = {data, size};
    llm__file_source memory = {NULL, data, NULL, NULL, size}, function = {NULL, NULL, read_bytes, &all, size};
    try_model(size % 2 ? function : memory, (llm_dtype)(LLM_DTYPE_F32 + size / 2 % 4));
}

static void fuzz_packed(const uint8_t *data, size_t size) {
    uint8_t *file = (uint8_t *)malloc(size + 1);
    CHECK(file);
    if (size) memcpy(file, data, size);
    if (size >= LLM__PACKED_START) {
        const uint64_t n_file = size, n_header = llm__bytes_u64(file + 24);
        memcpy(file + 16, &n_file, sizeof n_file);
        if (n_header >= LLM__PACKED_START && n_header <= size && n_header % LLM__ALIGN == 0)
            llm__packed_seal(file, n_header);
    }
    llm__file_source memory = {NULL, file, NULL, NULL, size};
    try_model(memory, LLM_DTYPE_DEFAULT);
    free(file);
}

/* ---- Directories ---- */

static char folder[] = "/dev/shm/llm-fuzz-XXXXXX";

static const char *in_folder(const char *name) {
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void write_file(const char *name, bytes content) {
    FILE *file = fopen(in_folder(name), "wb");
    CHECK(file && fwrite(content.at, 1, content.n, file) == content.n && !fclose(file));
}

static void remove_folder(void) {
    static const char *const names[] = {"config.json",           "model.safetensors", "model.safetensors.index.json",
                                        "a.safetensors",         "tokenizer.json",    "tokenizer.model",
                                        "tokenizer_config.json", "params.json",       "consolidated.00.pth",
                                        "consolidated.01.pth"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) remove(in_folder(names[i]));
    rmdir(folder);
}

/* Returns the bytes before the next NUL and removes them from *b. */
static bytes cut(bytes *b) {
    const uint8_t *nul = b->n ? (const uint8_t *)memchr(b->at, 0, b->n) : NULL;
    bytes head = {b->at, nul ? (size_t)(nul - b->at) : b->n};
    size_t taken = head.n + (nul != NULL);
    b->at += taken;
    b->n -= taken;
    return head;
}

static void fuzz_safetensors(const uint8_t *data, size_t size) {
    static const char tokenizer[] =
        "{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"c\":3},\"merges\":[\"a b\"]},"
        "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false}}";
    bytes rest = {data, size}, config = cut(&rest), index = cut(&rest),
          words = {(const uint8_t *)tokenizer, sizeof tokenizer - 1};
    llm__file_source source = {folder, NULL, NULL, NULL, 0};
    write_file("config.json", config);
    write_file("tokenizer.json", words);
    remove(in_folder("model.safetensors"));
    write_file(index.n ? "a.safetensors" : "model.safetensors", rest);
    if (index.n) write_file("model.safetensors.index.json", index);
    try_model(source, (llm_dtype)(LLM_DTYPE_F32 + size % 4));
}

static void try_tokenizer(void) {
    static const llm_message messages[] = {{"user", "a"}};
    llm_tokenizer *t;
    llm_error err;
    char text[100];
    memset(&err, 0xEE, sizeof err);
    llm_status status = llm_tokenizer_load(&t, folder, &counting, &err);
    if (status) {
        check_refusal(status, &err);
        CHECK(!t);
        return;
    }
    check_tokenizer(t);
    llm_chat_desc chat = {.messages = messages, .n_messages = 1, .open_answer = true};
    if (llm_chat_render(t, &chat, text, sizeof text, &err) < 0) check_error(err.code, &err);
    llm_tokenizer_free(t);
}

static void fuzz_tokenizer_json(const uint8_t *data, size_t size) {
    bytes rest = {data, size}, tokenizer = cut(&rest);
    write_file("tokenizer.json", tokenizer);
    write_file("tokenizer_config.json", rest);
    if (!rest.n) remove(in_folder("tokenizer_config.json"));
    try_tokenizer();
}

/* params.json gets a vocabulary size that matches the number of lines, as a list of ranks requires. */
static void fuzz_tokenizer_model(const uint8_t *data, size_t size) {
    bytes rest = {data, size}, config = cut(&rest);
    char params[64];
    size_t n_lines = 0;
    for (size_t i = 0; i < rest.n; i++) n_lines += rest.at[i] == '\n';
    bytes text = {(const uint8_t *)params,
                  (size_t)snprintf(params, sizeof params, "{\"vocab_size\":%zu}", n_lines + 256)};
    write_file("params.json", text);
    write_file("tokenizer.model", rest);
    write_file("tokenizer_config.json", config);
    if (!config.n) remove(in_folder("tokenizer_config.json"));
    try_tokenizer();
}

/* ---- JSON ---- */

static void compare_json(const llm__json *ours, const json_t *theirs);

static void compare_members(const llm__json *ours, const json_t *theirs) {
    for (const llm__json *m = ours->first; m; m = m->next) {
        json_t *other = json_object_getn(theirs, m->key.at, m->key.n);
        bool last = true;
        for (const llm__json *later = m->next; later && last; later = later->next)
            last = !llm__str_equal(later->key, m->key);
        CHECK(other);
        if (last) compare_json(m, other);
    }
}

static void compare_json(const llm__json *ours, const json_t *theirs) {
    double number = ours->number, other = json_number_value(theirs);
    size_t i = 0;
    switch (ours->type) {
    case LLM__JSON_NULL: CHECK(json_is_null(theirs)); break;
    case LLM__JSON_FALSE: CHECK(json_is_false(theirs)); break;
    case LLM__JSON_TRUE: CHECK(json_is_true(theirs)); break;
    case LLM__JSON_NUMBER:
        CHECK(json_is_number(theirs));
        /* The smallest doubles have few digits; the largest may become infinite. */
        CHECK(fabs(number - other) <= 1e-14 * fabs(other) + 1e-322 ||
              (fabs(other) > 1.79e308 && fabs(number) > 1.79e308));
        break;
    case LLM__JSON_STRING:
        CHECK(json_is_string(theirs) && json_string_length(theirs) == ours->string.n);
        CHECK(!memcmp(json_string_value(theirs), ours->string.at, ours->string.n));
        break;
    case LLM__JSON_ARRAY:
        CHECK(json_is_array(theirs) && json_array_size(theirs) == ours->n);
        for (const llm__json *item = ours->first; item; item = item->next)
            compare_json(item, json_array_get(theirs, i++));
        break;
    default: CHECK(json_is_object(theirs) && json_object_size(theirs) <= ours->n); compare_members(ours, theirs);
    }
}

typedef struct json_job {
    bytes text;
    json_t *theirs;
} json_job;

static void parse_json(llm__env *env, void *arg) {
    json_job *job = (json_job *)arg;
    llm__json *v = llm__json_parse(env, job->text.at, job->text.n);
    if (job->theirs) compare_json(v, job->theirs);
}

static void fuzz_json(const uint8_t *data, size_t size) {
    json_error_t why;
    json_job job = {{data, size}, NULL};
    bool ends_early = memchr(data, 0, size) != NULL; /* jansson does not accept a NUL */
    if (!ends_early)
        job.theirs =
            json_loadb((const char *)data, size, JSON_DECODE_ANY | JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &why);
    llm__pool pool;
    llm_error err;
    llm_status status = guarded(&pool, &counting, parse_json, &job, &err);
    if (status) check_error(status, &err);
    llm__pool_free(&pool);
    if (status && job.theirs) CHECK(strstr(err.message, "deeper than"));
    bool utf8 = llm__utf8_check(data, data + size) == data + size;
    if (!status && !job.theirs && !ends_early && utf8) /* only jansson refuses these */
        CHECK(json_error_code(&why) == json_error_numeric_overflow ||
              json_error_code(&why) == json_error_null_byte_in_key || strstr(why.text, "NUL byte in object key"));
    json_decref(job.theirs);
}

/* ---- Chat templates ---- */

typedef struct chat_job {
    llm_tokenizer *tokenizer;
    const llm_chat_desc *chat;
} chat_job;

/* Control tokens only come from the template: there are as many as the rendered text has outside of the messages. */
static void check_control(llm__env *env, void *arg) {
    static const char *const control[] = {"<s>", "</s>", "<|im_start|>", "<|im_end|>"};
    chat_job *job = (chat_job *)arg;
    llm__chat_text r = llm__chat_render(env, job->tokenizer, job->chat);
    size_t room = 4 * r.n + 8, n_control = 0, span = 0;
    llm_token *ids = (llm_token *)llm__alloc(env, room, sizeof *ids);
    size_t n = llm__enc_spans(env, job->tokenizer, r.text, r.n, LLM_TOKENS_SPECIAL, r.spans, r.n_spans, ids, room);
    CHECK(n <= room);
    for (size_t i = 0; i < n; i++) n_control += ids[i] > 0 && ids[i] < 5;
    for (size_t i = 0, length; i < r.n; i += length) {
        length = 1;
        while (span < r.n_spans && r.spans[span].end <= i) span++;
        size_t end = span < r.n_spans ? r.spans[span].begin : r.n;
        for (size_t k = 0; k < 4; k++) {
            size_t m = strlen(control[k]);
            if (i + m > end || memcmp(r.text + i, control[k], m)) continue;
            CHECK(n_control-- > 0);
            length = m;
            break;
        }
    }
    CHECK(!n_control);
}

/* Parses the input's template. Its nodes are valid until the pool is freed. */
static void parse_chat(llm__env *env, void *arg) {
    llm_tokenizer *t = ((chat_job *)arg)->tokenizer;
    t->chat_program = NULL;
    t->chat_problem = NULL;
    llm__tokenizer_parse_chat(env, t);
}

/* Renders a conversation. Returns true if that succeeds; then a small buffer must get the beginning of the text. */
static bool render(const llm_tokenizer *t, const llm_chat_desc *chat) {
    llm_error err;
    char few[20], *text;
    int64_t n_bytes = llm_chat_render(t, chat, few, sizeof few, &err);
    if (n_bytes < 0) {
        check_error(err.code, &err);
        return false;
    }
    size_t n_text = (size_t)n_bytes;
    text = (char *)malloc(n_text + 1);
    CHECK(text);
    CHECK(llm_chat_render(t, chat, text, n_text + 1, &err) == n_bytes);
    CHECK(strlen(few) <= n_text && !strncmp(text, few, strlen(few)) && !text[n_text]);
    free(text);
    return true;
}

enum { MOST_MESSAGES = 6 };

static void use_template(chat_job *job, bytes rest) {
    static const char *const in_turn[] = {"system", "user", "assistant"};
    llm_message messages[MOST_MESSAGES];
    char *contents = (char *)malloc(rest.n + 1), *at = contents;
    int n = 0;
    CHECK(contents);
    if (rest.n) memcpy(contents, rest.at, rest.n);
    contents[rest.n] = 0;
    for (int first = (int)(rest.n % 2); n < MOST_MESSAGES && at <= contents + rest.n; n++, at += strlen(at) + 1) {
        int turn = n + first;
        messages[n].role = in_turn[turn == 0 ? 0 : 1 + (turn - 1) % 2];
        messages[n].content = at;
    }
    llm_chat_desc chat = {.messages = messages, .n_messages = n, .open_answer = true};
    llm__pool pool;
    llm_error err;
    render(job->tokenizer, &chat);
    job->chat = &chat;
    guarded(&pool, &counting, check_control, job, &err);
    llm__pool_free(&pool);
    chat.open_answer = false;
    chat.n_messages = (n + 1) / 2;
    chat.tools_json = chat.variables_json = messages[0].content; /* sometimes this is valid JSON */
    render(job->tokenizer, &chat);
    free(contents);
}

static llm_tokenizer *chat_tokenizer; /* gets the template of each input */

static void build_chat_tokenizer(void) {
    static llm__pool pool;
    small_job small = {"", 0, NULL};
    llm_error err;
    begin(0);
    CHECK(!guarded(&pool, &counting, build_small, &small, &err));
    chat_tokenizer = small.tokenizer;
}

static void fuzz_chat(const uint8_t *data, size_t size) {
    bytes rest = {data, size}, text = cut(&rest);
    chat_job job;
    char *chat_template = (char *)malloc(text.n + 1);
    CHECK(chat_template);
    if (text.n) memcpy(chat_template, text.at, text.n);
    chat_template[text.n] = 0;
    memset(&job, 0, sizeof job);
    job.tokenizer = chat_tokenizer;
    chat_tokenizer->chat_template = text.n ? chat_template : NULL;
    llm__pool pool;
    llm_error err;
    guarded(&pool, &counting, parse_chat, &job, &err);
    use_template(&job, rest);
    llm__pool_free(&pool);
    free(chat_template);
}

/* ---- Messages as JSON ---- */

static const char *const message_templates[] = {
    "{% for message in messages %}<|im_start|>{{ message.role }}:{{ message.content }}<|im_end|>{% endfor %}",
    "{{ bos_token }}{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ messages }}{{ documents }}",
    ("{% for m in messages %}{{ m.role }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
     "{{ call.function.arguments | tojson }}{% endfor %}{{ m.content or '' }}{{ eos_token }}{% endfor %}")};

/* Encodes a copy of the messages that jansson has written. */
static int64_t encode_list(const json_t *list, llm_chat_desc chat, llm_token *ids, size_t room) {
    llm_error err;
    char *text = json_dumps(list, 0);
    CHECK(text);
    chat.messages_json = text;
    int64_t n = llm_chat_encode(chat_tokenizer, &chat, ids, room, &err);
    free(text);
    return n;
}

typedef struct turns_job {
    const llm_chat_desc *chat;
    llm_stream *stream;
    llm_token *ids;
    int n;
} turns_job;

static void fit_turns(llm__env *env, void *arg) {
    turns_job *job = (turns_job *)arg;
    job->ids = llm__gen_fit_turns(env, job->stream, job->chat, &job->n);
}

/* Leaving out the oldest turns must give what the messages without them give. */
static void check_turns(const llm_chat_desc *chat, int n_ctx) {
    enum { ROOM = 1 << 16 };
    static llm_token whole[ROOM], again[ROOM];
    static llm_model model;
    static llm_context ctx;
    llm_stream stream;
    llm__pool pool;
    llm_error err;
    turns_job job = {chat, &stream, NULL, 0};
    model.tokenizer = chat_tokenizer;
    ctx.model = &model;
    ctx.desc.n_ctx = n_ctx;
    memset(&stream, 0, sizeof stream);
    stream.ctx = &ctx;
    stream.desc.keep_free = 1;
    llm_status status = guarded(&pool, &counting, fit_turns, &job, &err);
    if (status) check_error(status, &err);
    json_t *list = json_loads(chat->messages_json, JSON_ALLOW_NUL, NULL);
    int64_t n = llm_chat_encode(chat_tokenizer, chat, whole, ROOM, &err);
    CHECK(n >= 0 || status);
    CHECK(status || job.n < n_ctx);
    /* jansson may refuse the list, or write its numbers or keys in another way */
    bool same = n >= 0 && n <= ROOM && list && encode_list(list, *chat, again, ROOM) == n &&
                !memcmp(whole, again, (size_t)n * sizeof *whole);
    if (same && n < n_ctx) CHECK(!status && !stream.stats.n_left_out);
    if (same && !status) {
        size_t n_kept = 0, n_left_out = (size_t)stream.stats.n_left_out;
        const char *role;
        while ((role = json_string_value(json_object_get(json_array_get(list, n_kept), "role"))) != NULL &&
               !strcmp(role, "system"))
            n_kept++;
        for (size_t i = 0; i < n_left_out; i++) CHECK(!json_array_remove(list, n_kept));
        role = json_string_value(json_object_get(json_array_get(list, n_kept), "role"));
        CHECK(!n_left_out || (role && !strcmp(role, "user")));
        CHECK(encode_list(list, *chat, again, ROOM) == job.n);
        CHECK(!memcmp(job.ids, again, (size_t)job.n * sizeof *again));
    }
    json_decref(list);
    llm__pool_free(&pool);
}

static void fuzz_messages(const uint8_t *data, size_t size) {
    if (size < 2) return;
    char *text = (char *)malloc(size - 1), *parts[3] = {text, NULL, NULL};
    CHECK(text);
    memcpy(text, data + 2, size - 2);
    text[size - 2] = 0;
    for (int i = 1; i < 3 && parts[i - 1] + strlen(parts[i - 1]) < text + size - 2; i++)
        parts[i] = parts[i - 1] + strlen(parts[i - 1]) + 1;
    for (int i = 1; i < 3; i++)
        if (parts[i] && !*parts[i]) parts[i] = NULL;
    llm_chat_desc chat = {
        .messages_json = parts[0], .tools_json = parts[1], .variables_json = parts[2], .open_answer = data[0] & 8};
    chat_job job = {chat_tokenizer, &chat};
    chat_tokenizer->chat_template = (char *)message_templates[data[0] % 3];
    llm__pool pool, own;
    llm_error err;
    CHECK(!guarded(&pool, &counting, parse_chat, &job, &err));
    if (render(chat_tokenizer, &chat)) CHECK(!guarded(&own, &counting, check_control, &job, &err));
    else {
        CHECK(!all_good);
        llm__pool_init(&own, &counting);
    }
    llm__pool_free(&own);
    check_turns(&chat, 8 + data[1]);
    llm__pool_free(&pool);
    free(text);
}

/* ---- Tool calls ---- */

static void same_calls(const llm_tool_calls *a, const llm_tool_calls *b) {
    CHECK(a->n_calls == b->n_calls);
    for (int i = 0; i < a->n_calls; i++) {
        const llm_tool_call *x = &a->calls[i], *y = &b->calls[i];
        CHECK(!strcmp(x->name, y->name) && !strcmp(x->arguments, y->arguments));
        CHECK(!x->id == !y->id && (!x->id || !strcmp(x->id, y->id)));
    }
}

static void read_calls(llm_tool_calls **out, const char *answer, size_t n) {
    llm_error err;
    llm_status status = llm_tool_calls_read(out, answer, n, &counting, &err);
    CHECK(!status == (*out != NULL));
    if (!status) return;
    CHECK(status == LLM_ERROR_FORMAT && !live);
    check_refusal(status, &err);
}

/* Writes calls in one of the forms, and reads them again. */
static void write_calls(const llm_tool_calls *calls, bool mistral) {
    char *text;
    size_t n;
    FILE *file = open_memstream(&text, &n);
    bool good = true;
    CHECK(file);
    if (mistral) fputs("a [TOOL_CALLS] [", file);
    for (int i = 0; i < calls->n_calls && good; i++) {
        json_t *call = json_pack("{s:s, s:s?}", "name", calls->calls[i].name, "id", calls->calls[i].id);
        good = call != NULL; /* jansson refuses a name that is not UTF-8 */
        if (!good) break;
        if (!calls->calls[i].id) json_object_del(call, "id");
        char *words = json_dumps(call, 0);
        CHECK(words);
        words[strlen(words) - 1] = 0;
        fprintf(file, "%s%s,\"parameters\":%s}%s", mistral ? i ? "," : "" : "<tool_call>", words,
                calls->calls[i].arguments, mistral ? "" : "</tool_call>\n");
        free(words);
        json_decref(call);
    }
    if (mistral) fputs("]", file);
    CHECK(!fclose(file));
    if (good) {
        llm_tool_calls *again;
        llm_error err;
        CHECK(!llm_tool_calls_read(&again, text, n, &counting, &err));
        same_calls(calls, again);
        llm_tool_calls_free(again);
    }
    free(text);
}

static void fuzz_tool_calls(const uint8_t *data, size_t size) {
    const char *answer = (const char *)data;
    llm_tool_calls *calls, *again;
    read_calls(&calls, answer, size);
    if (calls) {
        llm_error err;
        CHECK(!llm_tool_calls_read(&again, answer, size, &counting, &err));
        same_calls(calls, again);
        llm_tool_calls_free(again);
        CHECK(calls->n_bytes <= size && !calls->text[calls->n_bytes]);
        CHECK(!calls->n_bytes || !memcmp(calls->text, answer, calls->n_bytes));
        CHECK(calls->n_calls || calls->n_bytes == size);
        for (int i = 0; i < LLM__CALLS_BEGINS; i++)
            CHECK(memchr(calls->text, 0, calls->n_bytes) || !strstr(calls->text, llm__calls_marks[i]));
        for (int i = 0; i < calls->n_calls; i++) { /* the arguments are a JSON object, and a part of the answer */
            const char *object = calls->calls[i].arguments;
            size_t n = strlen(object), at = 0;
            json_job job = {{(const uint8_t *)object, n}, NULL};
            llm__pool pool;
            CHECK(*object == '{' && *calls->calls[i].name);
            CHECK(!guarded(&pool, &counting, parse_json, &job, &err));
            llm__pool_free(&pool);
            fuzz_json((const uint8_t *)object, n);
            while (at + n <= size && memcmp(answer + at, object, n)) at++;
            CHECK(at + n <= size);
        }
        if (calls->n_calls) write_calls(calls, size % 2);
        llm_tool_calls_free(calls);
        CHECK(!live);
    }
    if (all_good) return;
    read_calls(&calls, answer, size / 2);
    llm_tool_calls_free(calls);
}

/* ---- Round trips ---- */

/* The first N_EXACT tokenizers are byte-level without a prefix: decoding gives back exactly the encoded text. */
static const char *const families[] = {"gpt-2",         "mpt",           "smollm",  "llama-3",        "qwen2",
                                       "gpt-4o",        "tekken",        "falcon",  "deepseek-coder", "llama-3-meta",
                                       "llama-2",       "spm",           "added",   "prefix-space",   "metaspace",
                                       "llama-2-added", "llama-2-first", "unknown", "unknown-each",   "spm-symbols",
                                       "spm-plain"};
enum { N_FAMILIES = sizeof families / sizeof *families, N_EXACT = 10 };
static llm_tokenizer *tokenizers[N_FAMILIES];

static void load_families(void) {
    for (int i = 0; i < N_FAMILIES; i++) {
        char path[256];
        llm_error err;
        snprintf(path, sizeof path, "tests/golden/tokenizers/%s", families[i]);
        if (!llm_tokenizer_load(&tokenizers[i], path, NULL, &err)) continue;
        fprintf(stderr, "%s\n", err.message);
        exit(1);
    }
}

static void fuzz_round_trip(const uint8_t *data, size_t size) {
    if (size < 2) return;
    unsigned family = data[1] % N_FAMILIES, flags = data[0] % 4;
    bool exact = family < N_EXACT && !tokenizers[family]->nfc &&
                 flags != (LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL); /* BOS would be part of the text */
    check_text(tokenizers[family], data + 2, size - 2, flags, exact);
}

/* ---- Grammars ---- */

static uint32_t draw(uint32_t *state) { return (*state = *state * 1664525 + 1013904223) >> 8; }

/* Runs the grammar on a text. This may fail if the text is too ambiguous. */
static llm_status read_text(llm_grammar *g, const char *text, size_t n, llm_error *err) {
    llm__gram_args args;
    memset(&args, 0, sizeof args);
    args.g = g;
    args.text.at = text;
    args.text.n = n;
    return llm__gram_guard(g, llm__gram_run_body, &args, err);
}

/* Writes a text of random tokens that the mask allows. After each token, the text must match the grammar so far. */
static void write_at_random(llm_grammar *g, const llm_tokenizer *t, uint32_t seed) {
    enum { MOST_STEPS = 24 };
    int n_vocab = llm_tokenizer_n_vocab(t);
    float *logits = (float *)malloc((size_t)n_vocab * sizeof *logits);
    llm_token *allowed = (llm_token *)malloc((size_t)n_vocab * sizeof *allowed), ids[MOST_STEPS];
    char text[MOST_STEPS * 256];
    size_t n_text = 0, n_bytes;
    llm_error err;
    CHECK(logits && allowed);
    llm_grammar_begin(g, 0);
    for (int n = 0; n < MOST_STEPS; n++) {
        int n_allowed = 0;
        memset(logits, 0, (size_t)n_vocab * sizeof *logits);
        llm_status status = llm__gram_apply(g, ids, n, logits, n_vocab, &err);
        if (status) {
            CHECK(status == LLM_ERROR_UNSUPPORTED);
            check_error(status, &err);
            break;
        }
        for (int id = 0; id < n_vocab; id++)
            if (logits[id] == 0) allowed[n_allowed++] = id;
        int whole = llm_grammar_check(g, text, n_text);
        CHECK(whole >= 0 || read_text(g, text, n_text, &err));
        if (!n_allowed) {
            CHECK(whole);
            break;
        }
        ids[n] = allowed[draw(&seed) % (uint32_t)n_allowed];
        if (llm_token_is_end(t, ids[n])) {
            CHECK(whole);
            break;
        }
        const char *bytes = llm_token_bytes(t, ids[n], &n_bytes);
        CHECK(!llm_token_is_special(t, ids[n]) && n_bytes && n_bytes < 256);
        memcpy(text + n_text, bytes, n_bytes);
        n_text += n_bytes;
    }
    free(logits);
    free(allowed);
}

static llm_tokenizer *grammar_tokenizer;

static void load_grammar_tokenizer(void) {
    llm_error err;
    if (!llm_tokenizer_load(&grammar_tokenizer, "tests/golden/tokenizers/smollm", NULL, &err)) return;
    fprintf(stderr, "%s\n", err.message);
    exit(1);
}

static void fuzz_grammar(const uint8_t *data, size_t size) {
    if (size < 2) return;
    char *text = (char *)malloc(size - 1);
    llm_grammar *g;
    llm_error err;
    CHECK(text);
    memcpy(text, data + 2, size - 2);
    text[size - 2] = 0;
    allowed += (size_t)96 << 20; /* the limits on expressions and states do not depend on the input's size */
    memset(&err, 0xEE, sizeof err);
    llm_tools_desc tools = {
        .form = (llm_tool_form)(1 + data[1] % 4), .tools_json = text, .one = data[1] & 4, .text = data[1] & 8};
    llm_status status = data[0] % 4 == 0   ? llm_grammar_from_regex(&g, grammar_tokenizer, text, &counting, &err)
                        : data[0] % 4 == 1 ? llm_grammar_from_gbnf(&g, grammar_tokenizer, text, &counting, &err)
                        : data[0] % 4 == 2 ? llm_grammar_from_json_schema(&g, grammar_tokenizer, text, &counting, &err)
                                           : llm_grammar_from_tools(&g, grammar_tokenizer, &tools, &counting, &err);
    if (status) {
        check_refusal(status, &err);
        CHECK(!g);
    } else {
        for (uint32_t i = 0; i < 2; i++) write_at_random(g, grammar_tokenizer, data[1] + 256 * i);
        for (size_t n = size - 2; n > 0; n /= 2) llm_grammar_check(g, text, n);
        llm_grammar_free(g);
    }
    free(text);
}

/* ---- Mutations that keep the structure of the input valid ---- */

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);

static void put_number(uint8_t *to, uint64_t x, int n) {
    for (int i = 0; i < n; i++) to[i] = (uint8_t)(x >> 8 * i);
}

/* The number of bytes by which an input may grow. libFuzzer also passes inputs that are longer than `most` already. */
static size_t room_to_grow(size_t size, size_t most) { return size < most ? most - size : 0; }

/* Mutates the n bytes at `at`, which may grow by up to `room` bytes, and moves the bytes after them. Returns the new
   n. */
static size_t mutate_part(uint8_t *data, size_t *size, size_t at, size_t n, size_t room) {
    uint8_t *part = (uint8_t *)malloc(n + room + 1);
    CHECK(part);
    memcpy(part, data + at, n);
    size_t n_new = LLVMFuzzerMutate(part, n, n + room);
    memmove(data + at + n_new, data + at + n, *size - at - n);
    memcpy(data + at, part, n_new);
    *size += n_new - n;
    free(part);
    return n_new;
}

/* A number or string in a GGUF header. */
typedef struct field {
    size_t at;
    uint32_t n;    /* size of a number in bytes; 0: a string */
    bool is_value; /* a value of the metadata */
} field;

enum { MOST_FIELDS = 4096 };

typedef struct walk {
    const uint8_t *data;
    size_t size, at;
    field fields[MOST_FIELDS];
    int n_fields;
    bool in_values;
} walk;

static uint64_t walk_number(walk *w, uint32_t n) {
    uint64_t x = 0;
    if (w->n_fields == MOST_FIELDS || n > w->size - w->at) {
        w->at = w->size;
        return 0;
    }
    for (uint32_t i = 0; i < n; i++) x |= (uint64_t)w->data[w->at + i] << 8 * i;
    field f = {w->at, n, w->in_values};
    w->fields[w->n_fields++] = f;
    w->at += n;
    return x;
}

static void walk_string(walk *w) {
    uint64_t n = walk_number(w, 8);
    if (w->at == w->size || n > w->size - w->at) return;
    w->fields[w->n_fields - 1].n = 0;
    w->at += (size_t)n;
}

static void walk_header(walk *w) {
    walk_number(w, 4);
    walk_number(w, 4);
    uint64_t n_tensors = walk_number(w, 8), n_values = walk_number(w, 8);
    for (uint64_t i = 0; i < n_values && w->at < w->size; i++) {
        walk_string(w);
        uint32_t type = (uint32_t)walk_number(w, 4);
        uint64_t count = 1;
        if (type == LLM__GGUF_ARRAY) {
            type = (uint32_t)walk_number(w, 4);
            count = walk_number(w, 8);
        }
        if (type >= LLM__GGUF_N_TYPES || type == LLM__GGUF_ARRAY) return;
        w->in_values = true;
        for (uint64_t j = 0; j < count && w->at < w->size; j++) {
            if (type == LLM__GGUF_STRING) walk_string(w);
            else walk_number(w, llm__gguf_size(type));
        }
        w->in_values = false;
    }
    for (uint64_t i = 0; i < n_tensors && w->at < w->size; i++) {
        walk_string(w);
        uint64_t n_dims = walk_number(w, 4);
        for (uint64_t j = 0; j < n_dims && w->at < w->size; j++) walk_number(w, 8);
        walk_number(w, 4);
        walk_number(w, 8);
    }
}

/* Changes one number or string of the header. The tensors' data stay aligned. */
static size_t mutate_gguf(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static const uint64_t numbers[] = {0,
                                       1,
                                       2,
                                       3,
                                       4,
                                       7,
                                       8,
                                       16,
                                       255,
                                       0x7FC00000,
                                       0x7F800000,
                                       0x80000000,
                                       UINT32_MAX,
                                       UINT64_C(1) << 32,
                                       UINT64_C(1) << 63,
                                       UINT64_MAX - 31,
                                       UINT64_MAX};
    static walk w;
    memset(&w, 0, sizeof w);
    w.data = data;
    w.size = size;
    walk_header(&w);
    size_t end_of_header = (w.at + 31) / 32 * 32, room = room_to_grow(size, most);
    if (!w.n_fields || end_of_header > size) return LLVMFuzzerMutate(data, size, most);
    field f = w.fields[seed / 8 % (unsigned)w.n_fields];
    uint64_t old = 0;
    for (uint32_t i = 0; i < (f.n ? f.n : 8); i++) old |= (uint64_t)data[f.at + i] << 8 * i;
    if (!f.n && room >= 64) {
        size_t n = mutate_part(data, &size, f.at + 8, (size_t)old, 32), header = w.at + n - (size_t)old;
        put_number(data + f.at, n, 8);
        size_t now = (header + 31) / 32 * 32, behind = size - (end_of_header + n - (size_t)old);
        memmove(data + now, data + size - behind, behind);
        memset(data + header, 0, now - header);
        return now + behind;
    }
    uint64_t choice = seed / 8 / (unsigned)w.n_fields;
    if (choice % 4 == 0) put_number(data + f.at, old + 1 - choice / 4 % 2 * 2, (int)(f.n ? f.n : 8));
    else if (choice % 4 == 1) LLVMFuzzerMutate(data + f.at, f.n ? f.n : 8, f.n ? f.n : 8);
    else put_number(data + f.at, numbers[choice / 4 % (sizeof numbers / sizeof *numbers)], (int)(f.n ? f.n : 8));
    return size;
}

/* Changes one of the texts and corrects the header's length. */
static size_t mutate_safetensors(uint8_t *data, size_t size, size_t most, unsigned seed) {
    bytes rest = {data, size}, config = cut(&rest), index = cut(&rest), chosen = seed / 8 % 4 ? config : index;
    uint64_t n = rest.n < 8 ? 0 : llm__bytes_u64(rest.at);
    size_t room = room_to_grow(size, most) < 64 ? room_to_grow(size, most) : 64;
    if (rest.n < 8 || n > rest.n - 8 || seed / 8 % 4 == 3) {
        mutate_part(data, &size, (size_t)(chosen.at - data), chosen.n, room);
    } else {
        size_t at = (size_t)(rest.at - data);
        put_number(data + at, mutate_part(data, &size, at + 8, (size_t)n, room), 8);
    }
    return size;
}

/* Changes a field of the protobuf and corrects its length, which has one or two bytes. */
static size_t mutate_model(uint8_t *data, size_t size, size_t most, unsigned seed) {
    size_t starts[1024], n_starts = 0, at = 0;
    bytes rest = {data, size};
    cut(&rest);
    for (at = (size_t)(rest.at - data); at + 2 < size && n_starts < 1024 && (data[at] & 7) == 2;) {
        bool two = data[at + 1] & 128;
        size_t n = (size_t)(two ? (data[at + 1] & 127) + data[at + 2] * 128 : data[at + 1]);
        if (n > size - at - 2 - two) break;
        starts[n_starts++] = at;
        at += 2 + two + n;
    }
    if (!n_starts || room_to_grow(size, most) < 32) return LLVMFuzzerMutate(data, size, most);
    at = starts[seed / 8 % n_starts];
    bool two = data[at + 1] & 128;
    size_t n = (size_t)(two ? (data[at + 1] & 127) + data[at + 2] * 128 : data[at + 1]);
    size_t room = two ? 32 : n > 95 ? 127 - n : 32, n_new = mutate_part(data, &size, at + 2 + two, n, room);
    data[at + 1] = (uint8_t)((n_new & 127) | (two ? 128 : 0));
    if (two) data[at + 2] = (uint8_t)(n_new >> 7);
    return size;
}

/* Mostly changes the messages, because most changed templates do not parse. */
static size_t mutate_chat(uint8_t *data, size_t size, size_t most, unsigned seed) {
    bytes rest = {data, size};
    (void)seed;
    if (cut(&rest).n == size) return LLVMFuzzerMutate(data, size, most);
    mutate_part(data, &size, (size_t)(rest.at - data), rest.n, room_to_grow(size, most));
    return size;
}

/* ---- Meta's directories ---- */

enum {
    PTH_PICKLE = 1, /* the bytes are data.pkl; all tensors are parts of a storage "0", which has PTH_DATA bytes */
    PTH_TWO = 2,    /* the file is written twice, as two parts of a model */
    PTH_DATA = 8192
};

/* Writes a file in the format of torch.save, with this pickle. */
static void write_pth(const char *name, bytes pickle) {
    enum { LOCAL = 30, ENTRY = 46, END = 22, NAME = 10 };
    static const char *const names[] = {"a/data.pkl", "a/data/0"};
    static uint8_t numbers[PTH_DATA];
    for (size_t i = 0; i < PTH_DATA; i++) numbers[i] = (uint8_t)((0x11 + 37 * i) % 64);
    const bytes contents[] = {pickle, {numbers, PTH_DATA}};
    uint8_t *zip = (uint8_t *)calloc(pickle.n + PTH_DATA + 2 * (LOCAL + ENTRY + 2 * NAME) + END, 1);
    size_t at = 0, starts[2];
    CHECK(zip);
    for (int i = 0; i < 2; i++) {
        const size_t n = strlen(names[i]);
        starts[i] = at;
        put_number(zip + at, 0x04034b50, 4);
        put_number(zip + at + 26, n, 2);
        memcpy(zip + at + LOCAL, names[i], n);
        if (contents[i].n) memcpy(zip + at + LOCAL + n, contents[i].at, contents[i].n);
        at += LOCAL + n + contents[i].n;
    }
    const size_t directory = at;
    for (int i = 0; i < 2; i++) {
        const size_t n = strlen(names[i]);
        put_number(zip + at, 0x02014b50, 4);
        put_number(zip + at + 20, contents[i].n, 4);
        put_number(zip + at + 24, contents[i].n, 4);
        put_number(zip + at + 28, n, 2);
        put_number(zip + at + 42, starts[i], 4);
        memcpy(zip + at + ENTRY, names[i], n);
        at += ENTRY + n;
    }
    put_number(zip + at, 0x06054b50, 4);
    put_number(zip + at + 10, 2, 2);
    put_number(zip + at + 12, at - directory, 4);
    put_number(zip + at + 16, directory, 4);
    bytes all = {zip, at + END};
    write_file(name, all);
    free(zip);
}

static void fuzz_pth(const uint8_t *data, size_t size) {
    if (!size) return;
    const char *const names[] = {"consolidated.00.pth", "consolidated.01.pth"};
    bytes rest = {data + 1, size - 1}, params = cut(&rest);
    llm__file_source source = {folder, NULL, NULL, NULL, 0};
    write_file("params.json", params);
    for (int i = 0; i < 2; i++)
        if (i && !(data[0] & PTH_TWO)) remove(in_folder(names[i]));
        else if (data[0] & PTH_PICKLE) write_pth(names[i], rest);
        else write_file(names[i], rest);
    try_model(source, (llm_dtype)(LLM_DTYPE_F32 + size % 4));
}

/* Writes the tokenizer of all these models. */
static void write_pth_tokenizer(void) {
    static uint8_t text[4096];
    FILE *file = fopen("tests/golden/tokenizers/spm-plain/tokenizer.model", "rb");
    CHECK(file);
    bytes all = {text, fread(text, 1, sizeof text, file)};
    CHECK(all.n < sizeof text && !fclose(file));
    write_file("tokenizer.model", all);
}

/* ---- Targets ---- */

static const struct {
    const char *name;
    void (*run)(const uint8_t *data, size_t size);
    size_t (*mutate)(uint8_t *data, size_t size, size_t most, unsigned seed); /* NULL: libFuzzer's own */
} targets[] = {
    {"gguf", fuzz_gguf, mutate_gguf},
    {"packed", fuzz_packed, NULL},
    {"safetensors", fuzz_safetensors, mutate_safetensors},
    {"json", fuzz_json, NULL},
    {"tokenizer.json", fuzz_tokenizer_json, NULL},
    {"tokenizer.model", fuzz_tokenizer_model, mutate_model},
    {"pth", fuzz_pth, NULL},
    {"chat", fuzz_chat, mutate_chat},
    {"messages", fuzz_messages, NULL},
    {"tool-calls", fuzz_tool_calls, NULL},
    {"grammar", fuzz_grammar, NULL},
    {"round-trip", fuzz_round_trip, NULL},
};

static size_t target;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    const char *name = llm__path_name((*argv)[0]);
    enum { N = sizeof targets / sizeof *targets };
    (void)argc;
    while (target < N && strcmp(name, targets[target].name)) target++;
    if (target == N) {
        fprintf(stderr, "\"%s\" is not a target; see `make fuzz`\n", name);
        exit(1);
    }
    all_good = getenv("FUZZ_ALL_GOOD") != NULL;
    if (targets[target].run == fuzz_round_trip) load_families();
    if (targets[target].run == fuzz_grammar) load_grammar_tokenizer();
    if (targets[target].run == fuzz_chat || targets[target].run == fuzz_messages) build_chat_tokenizer();
    if (!mkdtemp(folder) || atexit(remove_folder)) exit(1);
    if (targets[target].run == fuzz_pth) write_pth_tokenizer();
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    begin(size);
    targets[target].run(data, size);
    end();
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    if (!targets[target].mutate || seed % 4 == 0) return LLVMFuzzerMutate(data, size, most);
    return targets[target].mutate(data, size, most, seed);
}
