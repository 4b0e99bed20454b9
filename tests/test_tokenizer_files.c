/* tokenizer.json and tokenizer.model: small files of each kind give the same ids as Hugging Face's tokenizers,
   sentencepiece and tiktoken (tokenizer/families.py, tokenizer/meta.py). Long texts have the same ids without the
   memory of words. Also tokenizer_config.json and other files next to them, hostile files, and failing allocations.
   Variants: asan cross */
#include "tests/check.h"
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <jansson.h>

#include "tests/common.h"
#include "tests/small.h"

enum { MAX_IDS = 4096 };

static const char *golden(const char *name) {
    char inner[200];
    snprintf(inner, sizeof inner, "tokenizers/%s", name);
    return golden_path(inner);
}

static llm_tokenizer *load(const char *path) {
    llm_tokenizer *tokenizer;
    llm_error err;
    if (llm_tokenizer_load(&tokenizer, path, NULL, &err)) fail_msg("%s", err.message);
    return tokenizer;
}

/* ---- Golden texts ---- */

static void compare_ids(const llm_tokenizer *t, const char *name, const json_t *text, unsigned flags,
                        const json_t *expected) {
    llm_token ids[MAX_IDS];
    llm_error err;
    int64_t n = llm_encode(t, json_string_value(text), json_string_length(text), flags, ids, MAX_IDS, &err);
    bool same = n == (int64_t)json_array_size(expected) && n <= MAX_IDS;
    for (int64_t i = 0; same && i < n; i++) same = ids[i] == json_integer_value(json_array_get(expected, (size_t)i));
    if (same) return;
    for (int64_t i = 0; i < n && i < MAX_IDS; i++) print_error("%d ", (int)ids[i]);
    fail_msg("%s: \"%s\" with flags %u gives these ids instead of %s", name, json_string_value(text), flags,
             json_dumps(expected, 0));
}

static void compare_text(const llm_tokenizer *t, const char *name, const json_t *ids, unsigned flags,
                         const json_t *expected) {
    llm_token list[MAX_IDS];
    size_t n = json_array_size(ids), n_text = 0;
    char text[4096];
    llm_text_stream stream = {flags, false, {0}, 0};
    assert_in_range(n, 0, MAX_IDS);
    for (size_t i = 0; i < n; i++) list[i] = (llm_token)json_integer_value(json_array_get(ids, i));
    for (size_t i = 0; i <= n; i++)
        n_text += llm_stream_token(t, &stream, i < n ? list[i] : -1, text + n_text, sizeof text - n_text);
    if (n_text != json_string_length(expected) || memcmp(text, json_string_value(expected), n_text))
        fail_msg("%s: %s streamed with flags %u is \"%s\" instead of \"%s\"", name, json_dumps(ids, 0), flags, text,
                 json_string_value(expected));
    if (strstr(text, "\xEF\xBF\xBD")) return;
    assert_int_equal(llm_decode(t, list, n, flags, text, sizeof text), n_text);
    assert_memory_equal(text, json_string_value(expected), n_text);
}

static const json_t *either(const json_t *first, const json_t *second) { return json_is_null(first) ? second : first; }

/* True if the ids begin with BOS or end with EOS. Then LLM_TOKENS_ENDS adds no second one, unlike the references. */
static bool begins_or_ends(const llm_tokenizer *t, const json_t *ids) {
    size_t n = json_array_size(ids);
    return n && (json_integer_value(json_array_get(ids, 0)) == llm_tokenizer_bos(t) ||
                 json_integer_value(json_array_get(ids, n - 1)) == llm_tokenizer_eos(t));
}

static int compare_lines(const char *name) {
    char file_name[64];
    llm_tokenizer *t = load(golden(name));
    snprintf(file_name, sizeof file_name, "%s.jsonl", name);
    FILE *file = open_lines(golden(file_name));
    int n = 0;
    for (json_t *entry; (entry = next_line(file)) != NULL; n++) {
        const json_t *text = json_array_get(entry, 0), *ids = json_array_get(entry, 1),
                     *plain = json_array_get(entry, 2);
        const json_t *whole = json_array_get(entry, 3), *decoded = json_array_get(entry, 4),
                     *shown = json_array_get(entry, 5);
        bool special = !json_is_null(ids);
        plain = either(plain, ids);
        ids = either(ids, plain);
        if (special) compare_ids(t, name, text, LLM_TOKENS_SPECIAL, ids);
        compare_ids(t, name, text, 0, plain);
        if (!begins_or_ends(t, ids))
            compare_ids(t, name, text, LLM_TOKENS_ENDS | (special ? (unsigned)LLM_TOKENS_SPECIAL : 0),
                        either(whole, ids));
        if (!json_is_false(decoded)) compare_text(t, name, ids, 0, either(decoded, text));
        if (special && !json_is_false(decoded))
            compare_text(t, name, ids, LLM_TOKENS_SPECIAL, either(shown, either(decoded, text)));
        json_decref(entry);
    }
    llm_tokenizer_free(t);
    return n;
}

static const char *const families[] = {"gpt-2",       "mpt",          "smollm",        "llama-3",        "qwen2",
                                       "gpt-4o",      "tekken",       "falcon",        "deepseek-coder", "prefix-space",
                                       "added",       "llama-2",      "llama-2-added", "llama-2-first",  "metaspace",
                                       "unknown",     "unknown-each", "spm",           "spm-symbols",    "spm-plain",
                                       "llama-3-meta"};
enum { N_FAMILIES = sizeof families / sizeof *families };

static void test_golden(void **state) {
    (void)state;
    int n = 0;
    for (int i = 0; i < N_FAMILIES; i++) n += compare_lines(families[i]);
    assert_true(n >= 2000);
}

/* ---- The memory of words of a long text ---- */

enum { N_LONG = 40000, N_LONG_IDS = 2 * N_LONG };

/* Fills a text with a family's golden texts, in random order. */
static void fill_long(const char *name, char *text, size_t n, uint32_t *seed) {
    enum { MOST = 256 };
    char file_name[64];
    json_t *entries[MOST];
    int n_entries = 0;
    snprintf(file_name, sizeof file_name, "%s.jsonl", name);
    FILE *file = open_lines(golden(file_name));
    for (json_t *entry; (entry = next_line(file)) != NULL; entries[n_entries++] = entry)
        assert_in_range(n_entries, 0, MOST - 1);
    assert_true(n_entries > 20);
    for (size_t at = 0; at < n;) {
        *seed = *seed * 1103515245u + 12345u;
        const json_t *line = json_array_get(entries[(*seed >> 16) % (unsigned)n_entries], 0);
        size_t n_line = json_string_length(line);
        if (n_line > n - at) n_line = n - at;
        memcpy(text + at, json_string_value(line), n_line);
        at += n_line;
    }
    for (int i = 0; i < n_entries; i++) json_decref(entries[i]);
}

/* Encodes a text without the memory of words: its allocation is the only one that may fail. */
static int64_t encode_without_memory(const llm_tokenizer *t, heap *h, const char *text, size_t n, unsigned flags,
                                     llm_token *ids) {
    int64_t count = -1;
    for (int64_t k = 1; count < 0; k++) {
        h->n_calls = 0;
        h->fail_at = k;
        count = llm_encode(t, text, n, flags, ids, N_LONG_IDS, NULL);
        assert_true(h->n_calls >= k); /* the allocation number k did fail */
    }
    h->fail_at = 0;
    return count;
}

/* The ids of a long text do not depend on the memory of words, which the shorter text fills up. */
static void test_memory(void **state) {
    (void)state;
    static llm_token with[N_LONG_IDS], without[N_LONG_IDS];
    static char text[N_LONG];
    static heap h;
    llm_host host = heap_host(&h);
    int n_spaced = 0, n_ignoring = 0, n_fusing = 0;
    uint32_t seed = 1;
    for (int i = 0; i < N_FAMILIES; i++) {
        llm_tokenizer *t;
        llm_error err;
        if (llm_tokenizer_load(&t, golden(families[i]), &host, &err)) fail_msg("%s", err.message);
        n_spaced += t->spaces_cut;
        n_ignoring += t->ignore_merges;
        n_fusing += t->fuse_unk;
        fill_long(families[i], text, N_LONG, &seed);
        for (int k = 0; k < 4; k++) {
            const unsigned flags = k % 2 ? (unsigned)LLM_TOKENS_SPECIAL | LLM_TOKENS_ENDS : 0;
            const size_t n = k < 2 ? N_LONG : LLM__KNOWN_TEXT;
            int64_t count = llm_encode(t, text, n, flags, with, N_LONG_IDS, &err);
            assert_in_range(count, 1000, N_LONG_IDS);
            assert_int_equal(encode_without_memory(t, &h, text, n, flags, without), count);
            for (int64_t j = 0; j < count; j++)
                if (with[j] != without[j])
                    fail_msg("%s with flags %u: id %d is %d with the memory of words, %d without it", families[i],
                             flags, (int)j, (int)with[j], (int)without[j]);
        }
        llm_tokenizer_free(t);
    }
    assert_all_returned(&h);
    assert_true(n_spaced && n_ignoring && n_fusing);
    print_message("%d families: %d cut at spaces, %d ignore merges, %d fuse unknown characters\n", N_FAMILIES, n_spaced,
                  n_ignoring, n_fusing);
}

/* ---- Files made by the tests ---- */

static char directory[] = "/tmp/llm-test-XXXXXX";

static const char *in_directory(const char *name) { return joined(directory, name); }

static void write_text(const char *name, const char *text) { write_file(in_directory(name), text, strlen(text)); }

static int make_directory(void **state) {
    (void)state;
    return mkdtemp(directory) ? 0 : 1;
}

static void remove_files(void) {
    static const char *const names[] = {
        "tokenizer.json",         "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
        "generation_config.json", "config.json",     "chat_template.jinja",   "params.json"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) remove(in_directory(names[i]));
}

static int remove_directory(void **state) {
    (void)state;
    remove_files();
    return rmdir(directory);
}

#define ADDED(id, content) "{\"id\":" #id ",\"content\":\"" content "\",\"special\":true}"
/* clang-format off */
#define SMALL \
    "{\"added_tokens\":[" ADDED(3, "<s>") "," ADDED(4, "</s>") "],\"normalizer\":null," \
    "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false}," \
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]}}"
/* clang-format on */

static void check_ids(const llm_tokenizer *t, const char *text, unsigned flags, const char *expected) {
    llm_token ids[64];
    char shown[256] = "";
    int64_t n = llm_encode(t, text, strlen(text), flags, ids, 64, NULL);
    for (int64_t i = 0; i < n; i++) snprintf(shown + strlen(shown), 8, i ? " %d" : "%d", (int)ids[i]);
    if (strcmp(shown, expected)) fail_msg("\"%s\" is %s, not %s", text, shown, expected);
}

static void test_beside(void **state) {
    (void)state;
    remove_files();
    write_text("tokenizer.json", SMALL);
    llm_tokenizer *t = load(directory);
    check_ids(t, "ab", LLM_TOKENS_ENDS, "2");
    assert_int_equal(llm_tokenizer_bos(t), -1);
    assert_true(llm_token_is_end(t, 4)); /* recognised by its text */
    llm_tokenizer_free(t);
    write_text(
        "tokenizer_config.json",
        "{\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":\"</s>\",\"add_bos_token\":true,\"add_eos_token\":true,"
        "\"chat_template\":[{\"name\":\"tools\",\"template\":\"x\"},{\"name\":\"default\",\"template\":\"y\"}]}");
    write_text("generation_config.json", "{\"eos_token_id\":[4,1]}");
    t = load(in_directory("tokenizer.json"));
    check_ids(t, "ab", LLM_TOKENS_ENDS, "3 2 4");
    assert_int_equal(llm_tokenizer_eos(t), 4);
    assert_true(llm_token_is_end(t, 4) && llm_token_is_end(t, 1) && !llm_token_is_end(t, 0));
    assert_string_equal(t->chat_template, "y");
    llm_tokenizer_free(t);
    write_text("chat_template.jinja", "z");
    write_text("tokenizer_config.json", "{}");
    write_text("special_tokens_map.json", "{\"bos_token\":\"<s>\"}");
    write_text("config.json", "{\"eos_token_id\":0,\"bos_token_id\":0}");
    remove(in_directory("generation_config.json"));
    t = load(directory);
    assert_int_equal(llm_tokenizer_bos(t), 3);
    assert_int_equal(llm_tokenizer_eos(t), 0);
    assert_string_equal(t->chat_template, "z");
    check_ids(t, "ab", LLM_TOKENS_ENDS, "2");
    llm_tokenizer_free(t);
}

/* Tokens and flags that are only in tokenizer_config.json are used as in transformers (tokenizer/beside.py). */
static void test_tokens_beside(void **state) {
    (void)state;
    FILE *file = open_lines(golden_path("beside.jsonl"));
    json_t *tokenizer = next_line(file);
    char *text = json_dumps(tokenizer, 0);
    int n_lines = 0;
    remove_files();
    write_text("tokenizer.json", text);
    free(text);
    json_decref(tokenizer);
    for (json_t *line, *item; (line = next_line(file)) != NULL; n_lines++) {
        text = json_dumps(json_object_get(line, "config"), 0);
        write_text("tokenizer_config.json", text);
        llm_tokenizer *t = load(directory);
        size_t i;
        json_array_foreach(json_object_get(line, "texts"), i, item)
            compare_ids(t, text, json_array_get(item, 0), LLM_TOKENS_SPECIAL, json_array_get(item, 1));
        const json_t *bos = json_object_get(line, "bos"), *eos = json_object_get(line, "eos");
        assert_int_equal(llm_tokenizer_n_vocab(t), json_integer_value(json_object_get(line, "n_vocab")));
        assert_int_equal(llm_tokenizer_bos(t), json_is_null(bos) ? -1 : json_integer_value(bos));
        assert_int_equal(llm_tokenizer_eos(t), json_is_null(eos) ? -1 : json_integer_value(eos));
        llm_tokenizer_free(t);
        free(text);
        json_decref(line);
    }
    assert_true(n_lines >= 15);
    /* A token for which the model has no row is ignored. */
    write_text(
        "tokenizer_config.json",
        "{\"bos_token\":\"<s>\",\"added_tokens_decoder\":{\"21\":{\"content\":\"<t>\"},\"22\":{\"content\":\"<u>\"}}}");
    write_text("config.json", "{\"vocab_size\":22}");
    llm_tokenizer *t = load(directory);
    assert_int_equal(llm_tokenizer_n_vocab(t), 22);
    assert_int_equal(llm_tokenizer_bos(t), -1);
    llm_tokenizer_free(t);
}

static void test_added_to_model(void **state) {
    (void)state;
    bytes file = read_file(golden("spm/tokenizer.model"));
    remove_files();
    write_file(in_directory("tokenizer.model"), file.at, file.n);
    free(file.at);
    write_text("tokenizer_config.json", "{\"legacy\":false,\"added_tokens_decoder\":{\"480\":{\"content\":\"<|x|>\","
                                        "\"special\":true,\"rstrip\":true}}}");
    llm_tokenizer *t = load(directory);
    assert_int_equal(llm_tokenizer_n_vocab(t), 481);
    llm_token one, two[2];
    assert_int_equal(llm_encode(t, "<|x|>  \n", 8, LLM_TOKENS_SPECIAL, &one, 1, NULL), 1);
    assert_int_equal(one, 480);
    assert_true(llm_encode(t, "<|x|> ", 6, 0, NULL, 0, NULL) > 2);
    assert_true(llm_encode(t, "<|x|>,", 6, LLM_TOKENS_SPECIAL, two, 2, NULL) ==
                2); /* with "legacy" there would be a space before the comma */
    llm_tokenizer_free(t);
}

/* Writes SMALL with `to` in place of `from`. */
static void write_small(const char *from, const char *to) {
    char text[2048];
    const char *at = strstr(SMALL, from);
    if (!at) fail_msg("%s is missing", from);
    snprintf(text, sizeof text, "%.*s%s%s", (int)(at - SMALL), SMALL, to, at + strlen(from));
    write_text("tokenizer.json", text);
}

/* The lists of pieces and merges are read apart from the rest of the file. */
static void test_lists(void **state) {
    static const char *const same[][2] = {
        {"[\"a b\"]", "[[\"a\",\"b\"]]"},
        {"[\"a b\"]", " [ [ \"\\u0061\" , \"b\" ]\n] "},
        {"[\"a b\"]", "[\"b b\"],\"merges\":[\"\\u0061 b\"]"},
        {"{\"a\":0,\"b\":1,\"ab\":2}", "{\"ab\":5,\"x\":9},\"vocab\":{ \"a\" : 0e0 , \"b\":1,\"a\\u0062\":2.0 }"},
        {"\"model\"", "\"x\":{\"model\":{\"vocab\":{\"a\":null},\"merges\":[7]}},\"vocab\":[],\"model\""},
        {"\"model\"", "\"model\":{\"vocab\":{\"q\":0},\"merges\":[]},\"model\""},
        {"\"type\":\"BPE\"", "\"merges\":[\"a b\"],\"merges\":{},\"type\":\"BPE\""}};
    (void)state;
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        remove_files();
        write_small(same[i][0], same[i][1]);
        llm_tokenizer *t = load(directory);
        assert_int_equal(llm_tokenizer_n_vocab(t), 5);
        check_ids(t, "abba", 0, "2 1 0");
        llm_tokenizer_free(t);
    }
    remove_files();
    write_small("[\"a b\"]", "[]");
    llm_tokenizer *t = load(directory);
    check_ids(t, "ab", 0, "0 1");
    llm_tokenizer_free(t);
}

static void parse_body(llm__env *env, void *arg) {
    llm__str *s = (llm__str *)arg;
    const llm__json *v = llm__json_parse(env, s->at, s->n);
    assert_int_equal(v->type, LLM__JSON_STRING);
    char *copy = llm__str_copy(env, v->string.at, v->string.n);
    s->at = copy;
    s->n = v->string.n;
}

/* Strings are read 8 bytes at a time: every byte, at every place. */
static void test_json_strings(void **state) {
    (void)state;
    for (int n_before = 0; n_before < 12; n_before++)
        for (int n_after = 0; n_after < 10; n_after++)
            for (int byte = 1; byte < 256; byte++) {
                char text[64], expected[64], escape[8] = {(char)byte, 0};
                const char *meant = byte == '"' ? "" : escape;
                bool escaped = byte == '\\';
                llm_error err;
                llm__pool pool;
                if (escaped) snprintf(escape, sizeof escape, "\\u00e9"), meant = "\xC3\xA9";
                snprintf(expected, sizeof expected, "%.*s%s%.*s", n_before, "0123456789\xFF\x80", meant,
                         byte == '"' ? 0 : n_after, "\xC3\xA4\x7F abc defg");
                int n = snprintf(text, sizeof text, "\"%.*s%s%.*s\"", n_before, "0123456789\xFF\x80", escape, n_after,
                                 "\xC3\xA4\x7F abc defg");
                llm__str s = {text, (size_t)n};
                llm_status status = guarded(&pool, NULL, parse_body, &s, &err);
                bool refused = byte < 0x20 || byte == '"';
                if ((status != LLM_OK) != refused) fail_msg("byte %d after %d is %d: %s", byte, n_before, status, text);
                if (refused)
                    assert_non_null(strstr(err.message, byte < 0x20 ? "a control character" : "unexpected text"));
                if (!refused) {
                    assert_int_equal(s.n, strlen(expected));
                    assert_memory_equal(s.at, expected, s.n);
                }
                llm__pool_free(&pool);
            }
}

/* ---- Hostile files ---- */

/* Replaces `from` in SMALL by `to` and writes the result to the file `name`; from == NULL: writes only `to`. It must be
   refused. */
static void refuses(const char *name, const char *from, const char *to, const char *words) {
    char text[2048] = SMALL;
    llm_tokenizer *t;
    llm_error err;
    char *at = from ? strstr(text, from) : text;
    remove_files();
    write_text("tokenizer.json", SMALL);
    if (!at) fail_msg("%s is missing", from);
    if (from) snprintf(at, sizeof text - (size_t)(at - text), "%s%s", to, strstr(SMALL, from) + strlen(from));
    else snprintf(text, sizeof text, "%s", to);
    write_text(name, text);
    llm_status status = llm_tokenizer_load(&t, directory, NULL, &err);
    llm_tokenizer_free(t);
    if (!status) fail_msg("%s instead of %s was not refused", to, from);
    if (!strstr(err.message, words)) fail_msg("%s: \"%s\" does not say \"%s\"", to, err.message, words);
    if (!strstr(err.message, name)) fail_msg("\"%s\" does not name %s", err.message, name);
}

static void test_hostile_json(void **state) {
    (void)state;
    static const char *const cases[][3] = {
        {"\"BPE\"", "\"Unigram\"", "the model's type is \"Unigram\""},
        {"\"BPE\"", "3", "type is a number, not a string"},
        {"\"BPE\"", "\"BPE\",\"dropout\":0.1", "dropout"},
        {"\"BPE\"", "\"BPE\",\"end_of_word_suffix\":\"</w>\"", "end_of_word_suffix"},
        {"\"BPE\"", "\"BPE\",\"unk_token\":\"<x>\"", "unk_token is \"<x>\", which is not in vocab"},
        {"\"ab\":2", "\"ab\":1", "\"b\" and \"ab\" both have the id 1"},
        {"\"ab\":2", "\"ab\":-1", "token \"ab\" has the id -1, not a whole number"},
        {"\"ab\":2", "\"ab\":1.5", "token \"ab\" has the id 1.5"},
        {"\"ab\":2", "\"ab\":16777215", "a token has the id 16777215, but there are only 5 tokens"},
        {"\"ab\":2", "\"ab\":1e300", "token \"ab\" has the id 1e300"},
        {"\"ab\":2", "\"ab\":\"2\"", "token \"ab\" has the id 2, not"},
        {"\"ab\":2", "\"abc\":2", "merges[0] makes \"ab\", which is not in vocab"},
        {"\"ab\":2", "\"\":2", "vocab[2] is empty"},
        {"\"a b\"", "\"a x\"", "merges[0] needs \"x\", which is not in vocab"},
        {"\"a b\"", "\"ab\"", "merges[0] is \"ab\", not two pieces"},
        {"\"a b\"", "[\"a\"]", "merges[0] is neither"},
        {"\"a b\"", "[\"a\",1]", "merges[0] is neither"},
        {"\"a b\"", "[\"a\",\"b\",\"c\"]", "merges[0] is neither"},
        {"\"a b\"", "\"a b\",7", "merges[1] is neither"},
        {"\"a b\"", "\"a b\" \"b a\"", "a comma or ] is expected"},
        {"\"ab\":2", "\"ab\":02", "a value is expected"},
        {"\"ab\":2", "\"ab\":2,", "a string is expected"},
        {"[\"a b\"]", "{}", "merges is an object, not an array"},
        {"{\"a\":0,\"b\":1,\"ab\":2}", "[\"a\",\"b\"]", "vocab is an array, not an object"},
        {"[\"a b\"]", "[\"a b\"],\"merges\":null", "merges is missing"},
        {"\"vocab\"", "\"vocabulary\"", "vocab is missing"},
        {"\"model\"", "\"mod\"", "model is missing"},
        {"\"id\":3", "\"id\":0", "\"a\" and \"<s>\" both have the id 0"},
        {"\"id\":3", "\"id\":3000000", "a token has the id 3000000"},
        {"\"content\":\"<s>\"", "\"content\":5", "content is a number, not a string"},
        {"\"special\":true", "\"special\":1", "special is a number, not true or false"},
        {"\"normalizer\":null", "\"normalizer\":{\"type\":\"NFKC\"}", "the normalizer \"NFKC\" is not supported"},
        {"\"normalizer\":null", "\"normalizer\":{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"x\"},\"content\":\"y\"}",
         "replaces something other"},
        {"\"normalizer\":null", "\"normalizer\":{}", "type is missing"},
        {"\"ByteLevel\"", "\"Whitespace\"", "the pre_tokenizer \"Whitespace\" is not supported"},
        {"\"ByteLevel\"", "\"Split\",\"pattern\":{\"Regex\":\"(a|b)+\"},\"behavior\":\"Isolated\"",
         "splits by \"(a|b)+\""},
        {"\"ByteLevel\"", "\"Split\",\"pattern\":{\"Regex\":\"[a\"},\"behavior\":\"Isolated\"", "splits by \"[a\""},
        {"\"ByteLevel\"", "\"Split\",\"pattern\":{\"Regex\":\"[^a]\"},\"behavior\":\"Isolated\"", "splits by \"[^a]\""},
        {"\"ByteLevel\"", "\"Split\",\"pattern\":{\"Regex\":\"\\\\\"},\"behavior\":\"Isolated\"", "splits by"},
        {"\"ByteLevel\"", "\"Split\",\"pattern\":{\"Regex\":\"[z-a]\"},\"behavior\":\"Isolated\"", "splits by"},
        {"\"ByteLevel\"", "\"Split\",\"pattern\":{\"String\":\" \"},\"behavior\":\"Isolated\"", "splits by a String"},
        {"\"ByteLevel\"", "\"Split\",\"pattern\":{\"Regex\":\"\\\\s+\"},\"behavior\":\"MergedWithNext\"",
         "with behavior \"MergedWithNext\""},
        {"\"ByteLevel\"", "\"Metaspace\",\"replacement\":\"_\"", "another replacement"},
        {"\"ByteLevel\"", "\"Digits\"", "neither a ByteLevel"},
        {"\"normalizer\"", "\"post_processor\":{\"type\":\"RobertaProcessing\"},\"normalizer\"",
         "post_processor \"RobertaProcessing\""},
        {"\"normalizer\"",
         "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}],\"special_"
         "tokens\":{}},\"normalizer\"",
         "\"x\" is not in its special_tokens"},
        {"\"normalizer\"",
         "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"x\"}}],\"special_"
         "tokens\":{\"x\":{\"ids\":[9]}}},\"normalizer\"",
         "\"x\" has the id 9, which is no token's"}};
    llm_error err;
    llm_tokenizer *t;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        refuses("tokenizer.json", cases[i][0], cases[i][1], cases[i][2]);
    refuses("tokenizer.json", NULL, "[]", "model is missing");
    refuses("tokenizer.json", NULL, "{\"model\":", "JSON text");
    refuses("tokenizer_config.json", NULL, "{\"bos_token\":7}", "\"bos_token\" is a number, not a token's text");
    refuses("tokenizer_config.json", NULL, "{\"add_bos_token\":\"yes\"}",
            "add_bos_token is a string, not true or false");
    refuses("tokenizer_config.json", NULL, "[]", "not a JSON object");
    refuses("config.json", NULL, "{\"eos_token_id\":5}", "eos_token_id is 5, but the vocabulary has 5 tokens");
    refuses("config.json", NULL, "{\"eos_token_id\":[1,-1]}", "has the id -1");
    refuses("generation_config.json", NULL, "{\"eos_token_id\":\"x\"}", "has the id x");
    remove_files();
    assert_int_equal(llm_tokenizer_load(&t, directory, NULL, &err), LLM_ERROR_IO);
    assert_non_null(strstr(err.message, "neither tokenizer.json nor tokenizer.model"));
}

/* A file that is truncated, or in which any byte is changed, is loaded or refused, but does no harm. */
static void shake(const char *name, const char *golden_name, size_t step) {
    bytes file = read_file(golden(golden_name));
    llm_error err;
    llm_tokenizer *t;
    remove_files();
    write_text("params.json", "{\"vocab_size\":679}"); /* for llama-3-meta */
    for (size_t i = 0; i < file.n; i += step) {
        write_file(in_directory(name), file.at, i);
        if (!llm_tokenizer_load(&t, directory, NULL, &err)) llm_tokenizer_free(t);
        else if (i) assert_non_null(strstr(err.message, name));
    }
    for (size_t i = 0; i < file.n; i += step) {
        file.at[i] ^= (uint8_t)(1 << i % 8);
        write_file(in_directory(name), file.at, file.n);
        file.at[i] ^= (uint8_t)(1 << i % 8);
        if (!llm_tokenizer_load(&t, directory, NULL, &err)) {
            assert_true(llm_encode(t, "The quick  brown <s> fox\n42", 27, LLM_TOKENS_SPECIAL, NULL, 0, NULL) >= 0);
            llm_tokenizer_free(t);
        }
    }
    free(file.at);
}

static void test_shaken(void **state) {
    (void)state;
    shake("tokenizer.json", "llama-2-added/tokenizer.json", 61);
    shake("tokenizer.json", "added/tokenizer.json", 67);
    shake("tokenizer.model", "spm-symbols/tokenizer.model", 23);
    shake("tokenizer.model", "llama-3-meta/tokenizer.model", 41);
}

static void refuses_model(const char *what, const void *tail, size_t n_tail, const char *words) {
    bytes file = read_file(golden("spm/tokenizer.model"));
    llm_tokenizer *t;
    llm_error err;
    file.at = (uint8_t *)realloc(file.at, file.n + n_tail);
    assert_non_null(file.at);
    memcpy(file.at + file.n, tail, n_tail); /* if a field occurs twice, the last one is used */
    remove_files();
    write_file(in_directory("tokenizer.model"), file.at, file.n + n_tail);
    free(file.at);
    llm_status status = llm_tokenizer_load(&t, in_directory("tokenizer.model"), NULL, &err);
    llm_tokenizer_free(t);
    if (!status) fail_msg("%s was not refused", what);
    if (!strstr(err.message, words)) fail_msg("%s: \"%s\" does not say \"%s\"", what, err.message, words);
}

static void test_hostile_model(void **state) {
    (void)state;
    refuses_model("unigram", "\x12\x02\x18\x01", 4, "model_type is 1 (unigram)");
    refuses_model("an id", "\x12\x06\x18\x02\xC8\x02\xF0\x2E", 8, "bos_id is 6000, but there are");
    refuses_model("extra spaces", "\x1A\x00", 2, "remove_extra_whitespaces is set");
    refuses_model("a charsmap", "\x1A\x05\x12\x01x\x20\x00", 7, "precompiled_charsmap is set");
    refuses_model("a wire type", "\x0B", 1, "has the wire type 3");
    refuses_model("a length", "\x0A\xFF\xFF\xFF\xFF\x0F", 6, "the file ends inside the model");
    refuses_model("a number", "\x08\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01", 12, "is too long");
    refuses_model("a type", "\x0A\x05\x0A\x01q\x18\x09", 7, "has the type 9, not one from 1 to 6");
    refuses_model("no text", "\x0A\x00", 2, "is empty");
}

/* ---- Llama 3's tokenizer.model ---- */

enum { N_RANKS = 423 }; /* number of ranks in tokenizers/llama-3-meta */

static void test_special_tokens_of_llama_3(void **state) {
    static const struct {
        const char *text;
        int at;
        bool ends;
    } some[] = {{"<|begin_of_text|>", 0, false},
                {"<|end_of_text|>", 1, true},
                {"<|finetune_right_pad_id|>", 4, false},
                {"<|eom_id|>", 8, true},
                {"<|eot_id|>", 9, true},
                {"<|image|>", 11, false},
                {"<|reserved_special_token_2|>", 12, false},
                {"<|reserved_special_token_245|>", 255, false}};
    (void)state;
    llm_tokenizer *t = load(golden("llama-3-meta/tokenizer.model"));
    assert_int_equal(llm_tokenizer_n_vocab(t), N_RANKS + 256);
    assert_int_equal(llm_tokenizer_bos(t), N_RANKS);
    assert_int_equal(llm_tokenizer_eos(t), N_RANKS + 1);
    for (size_t i = 0; i < sizeof some / sizeof *some; i++) {
        llm_token id;
        assert_int_equal(llm_encode(t, some[i].text, strlen(some[i].text), LLM_TOKENS_SPECIAL, &id, 1, NULL), 1);
        assert_int_equal(id, N_RANKS + some[i].at);
        assert_int_equal(llm_token_is_end(t, id), some[i].ends);
    }
    for (llm_token id = 0; id < N_RANKS + 256; id++) assert_int_equal(llm_token_is_special(t, id), id >= N_RANKS);
    llm_tokenizer_free(t);
}

/* Loads Llama 3's kind of file after replacing one text by another. */
static llm_status load_ranks(const char *from, const char *to, llm_tokenizer **t, llm_error *err) {
    bytes file = read_file(golden("llama-3-meta/tokenizer.model"));
    char *text = (char *)calloc(file.n + strlen(to) + 1, 1);
    assert_non_null(text);
    memcpy(text, file.at, file.n);
    char *at = strstr(text, from);
    if (!at) fail_msg("%s is missing", from);
    const size_t before = (size_t)(at - text), after = before + strlen(from);
    memcpy(at, to, strlen(to));
    memcpy(at + strlen(to), file.at + after, file.n - after);
    write_file(in_directory("tokenizer.model"), text, file.n - strlen(from) + strlen(to));
    free(text);
    free(file.at);
    return llm_tokenizer_load(t, directory, NULL, err);
}

static void test_hostile_ranks(void **state) {
    static const char *const cases[][3] = {
        {"AQ== 1\n", "A$== 1\n", "the token number 1, \"A$== 1\", is not up to 256 bytes in base64"},
        {"AQ== 1\n", "AQ= 1\n", "the token number 1"},
        {"AQ== 1\n", "AQ==AQ== 1\n", "the token number 1"},
        {"AQ== 1\n", "AR== 1\n", "the token number 1"}, /* its last bits are not 0 */
        {"AQ== 1\n", "==== 1\n", "the token number 1"},
        {"AQ== 1\n", " 1\n", "the token number 1"},
        {"AQ== 1\n", "AQ==\n", "the token number 1"},
        {"AQ== 1\n", "AQ== \n", "the token number 1"},
        {"AQ== 1\n", "AQ== 1 \n", "the token number 1"},
        {"AQ== 1\n", "AQ== -1\n", "the token number 1"},
        {"AQ== 1\n", "AQ== 1.0\n", "the token number 1"},
        {"AQ== 1\n", "AQ== 123456789\n", "the token number 1"},
        {"AQ== 1\n", "AQ== 423\n", "has the rank 423, but the 423 tokens must have those from 0 on"},
        {"AQ== 1\n", "AQ== 99999999\n", "has the rank 99999999"},
        {"AQ== 1\n", "AQ== 2\n", "two tokens have the rank 2"},
        {"AQ== 1\n", "AQ== 1\nAQ== 1\n", "two tokens have the rank 1"},
        {"cXU= 422\n", "anVtcHM= 422\n", "tokens[421] and [422] are the same piece"},
        {"AQ== 1\n", "ICAgICAg 1\n", "there is no token of the single byte 0x01"},
        {"AQ== 1\n", "AQ== 1\nICAgICAg 423\n",
         "with Llama 3's 256 special ones 680, but vocab_size in params.json is 679"},
    };
    llm_tokenizer *t;
    llm_error err;
    bytes params = read_file(golden("llama-3-meta/params.json"));
    (void)state;
    remove_files();
    write_file(in_directory("params.json"), params.at, params.n);
    free(params.at);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_not_equal(load_ranks(cases[i][0], cases[i][1], &t, &err), LLM_OK);
        if (!strstr(err.message, cases[i][2]))
            fail_msg("%s: \"%s\" does not say \"%s\"", cases[i][1], err.message, cases[i][2]);
        assert_non_null(strstr(err.message, "tokenizer.model"));
    }
    /* A token of more than 256 bytes, and a line of a megabyte. */
    for (size_t n = 344; n < 2000000; n = n == 344 ? 1 << 20 : 2000000) {
        char *line = (char *)malloc(n + 10);
        assert_non_null(line);
        memset(line, 'A', n);
        memcpy(line + n, " 1\n", 4);
        assert_int_not_equal(load_ranks("AQ== 1\n", line, &t, &err), LLM_OK);
        assert_non_null(strstr(err.message, "the token number 1"));
        free(line);
    }
    /* Empty lines, Windows line ends, and ranks in any order are accepted. */
    assert_int_equal(load_ranks("AQ== 1\nAg== 2\n", "Ag== 2\r\n\n\r\nAQ== 1\n", &t, &err), LLM_OK);
    llm_tokenizer_free(t);
    write_text("params.json", "{\"dim\":8}");
    assert_int_not_equal(load_ranks("AQ== 1", "AQ== 1", &t, &err), LLM_OK);
    assert_non_null(strstr(err.message, "params.json"));
    assert_non_null(strstr(err.message, "vocab_size is missing"));
    remove(in_directory("params.json"));
    assert_int_equal(load_ranks("AQ== 1", "AQ== 1", &t, &err), LLM_ERROR_UNSUPPORTED);
    assert_non_null(strstr(err.message, "beside Meta's params.json only"));
}

/* ---- Failing allocations ---- */

static void test_allocation(void **state) {
    (void)state;
    static const char *const names[] = {"llama-2-added", "added", "spm", "llama-3-meta"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        load_job job;
        memset(&job, 0, sizeof job);
        job.path = golden(names[i]);
        starve(&job.h, load_tokenizer_starved, &job, 7, names[i]);
    }
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),
        cmocka_unit_test(test_memory),
        cmocka_unit_test(test_beside),
        cmocka_unit_test(test_tokens_beside),
        cmocka_unit_test(test_added_to_model),
        cmocka_unit_test(test_lists),
        cmocka_unit_test(test_json_strings),
        cmocka_unit_test(test_hostile_json),
        cmocka_unit_test(test_shaken),
        cmocka_unit_test(test_hostile_model),
        cmocka_unit_test(test_special_tokens_of_llama_3),
        cmocka_unit_test(test_hostile_ranks),
        cmocka_unit_test(test_allocation),
    };
    return cmocka_run_group_tests_name("tokenizer files", tests, make_directory, remove_directory);
}
