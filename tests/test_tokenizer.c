/* Tokenizers: the default model's ids compared with Hugging Face's (tokenizer/golden.py), Unicode tables compared with
   Python's, small handwritten vocabularies, streams, hostile files, failing allocations, threads.
   Variants: asan tsan cross */
#include "tests/check.h"
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <jansson.h>
#include <pthread.h>
#include <time.h>

#include "tests/common.h"
#include "tests/small.h"

enum { MAX_IDS = 200000 };

static llm_tokenizer *load_model_tokenizer(const llm_host *host) {
    llm_tokenizer *tokenizer;
    llm_error err;
    if (llm_tokenizer_load(&tokenizer, model_path(), host, &err))
        fail_msg("%s (`make model` gets the default model)", err.message);
    return tokenizer;
}

static uint64_t fnv(uint64_t hash, uint32_t value) { return (hash ^ value) * 0x100000001B3u; }
static const uint64_t FNV = 0xCBF29CE484222325u;

static void check_hash(const char *what, uint64_t hash, const json_t *expected) {
    char text[20];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)hash);
    if (strcmp(text, json_string_value(expected)))
        fail_msg("%s: hash %s, not %s", what, text, json_string_value(expected));
}

/* ---- Small handwritten vocabularies ---- */

typedef struct vocabulary {
    bool sentencepiece;
    const char *pre;
    int n, n_merges;
    const char *const *pieces;
    const char *const *merges; /* two strings per merge */
    const int32_t *types;
    const float *scores;
    const uint16_t *traits;
    llm_token bos, eos, unk;
    bool add_bos, add_eos, add_space_prefix;
    llm_tokenizer *built;
} vocabulary;

static llm__str str(const char *text) {
    llm__str s;
    s.at = text;
    s.n = strlen(text);
    return s;
}

static void build_body(llm__env *env, void *arg) {
    vocabulary *in = (vocabulary *)arg;
    llm__vocab_source v;
    llm__str pieces[256];
    llm__bpe_merge_text merges[64];
    memset(&v, 0, sizeof v);
    for (int i = 0; i < in->n; i++) pieces[i] = str(in->pieces[i]);
    for (int i = 0; i < in->n_merges; i++) {
        merges[i].left = str(in->merges[2 * i]);
        merges[i].right = str(in->merges[2 * i + 1]);
    }
    v.sentencepiece = in->sentencepiece;
    v.pieces_name = "pieces";
    v.scores_name = "scores";
    v.types_name = "types";
    v.merges_name = "merges";
    v.n_pieces = (size_t)in->n;
    v.n_merges = (size_t)in->n_merges;
    v.pieces = pieces;
    v.merges = merges;
    v.types = in->types;
    v.scores = in->scores;
    v.traits = in->traits;
    v.bos = in->bos;
    v.eos = in->eos;
    v.unk = in->unk;
    v.add_bos = in->add_bos;
    v.add_eos = in->add_eos;
    v.strip_prefix = in->add_space_prefix;
    v.prefix = in->add_space_prefix ? LLM__PREFIX_STRETCH : LLM__NO_PREFIX;
    v.fuse_unk = true;
    if (!in->sentencepiece) llm__pre_use(env, &v, str(in->pre ? in->pre : "gpt-2"));
    in->built = llm__tokenizer_build(env, &v);
}

static llm_status try_build(vocabulary *v, llm_error *err) {
    llm__pool pool;
    llm_status status = guarded(&pool, NULL, build_body, v, err);
    if (status) llm__pool_free(&pool);
    else v->built->own = pool;
    return status;
}

static llm_tokenizer *build(vocabulary *v) {
    llm_error err;
    if (try_build(v, &err)) fail_msg("%s", err.message);
    return v->built;
}

static void check_ids(const llm_tokenizer *tokenizer, const char *text, unsigned flags, const char *expected) {
    llm_token ids[256];
    llm_error err;
    char shown[1024] = "";
    int64_t n = llm_encode(tokenizer, text, strlen(text), flags, ids, 256, &err);
    assert_in_range(n, 0, 256);
    for (int64_t i = 0; i < n; i++) snprintf(shown + strlen(shown), 16, i ? " %d" : "%d", (int)ids[i]);
    if (strcmp(shown, expected)) fail_msg("\"%s\" is %s, not %s", text, shown, expected);
}

static void check_text(const llm_tokenizer *tokenizer, const llm_token *ids, size_t n, unsigned flags,
                       const char *expected) {
    char text[256];
    assert_int_equal(llm_decode(tokenizer, ids, n, flags, text, sizeof text), strlen(expected));
    assert_string_equal(text, expected);
}

/* A byte-level vocabulary without special tokens. */
static vocabulary byte_level(const char *const *pieces, int n, const char *const *merges, int n_merges) {
    vocabulary v;
    memset(&v, 0, sizeof v);
    v.n = n;
    v.n_merges = n_merges;
    v.pieces = pieces;
    v.merges = merges;
    v.bos = v.eos = v.unk = LLM__NONE;
    return v;
}

#define SPACE "\xE2\x96\x81"

static const char *const spm_pieces[] = {"<unk>", "<s>", "</s>",    SPACE,    "a",      "b",      "c",  "ab",
                                         "bc",    "aa",  SPACE "a", "<0x0A>", "<0xC3>", "<0xA9>", "<u>"};
static const int32_t spm_types[] = {2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 6, 6, 6, 4};
static const float spm_scores[] = {0, 0, 0, -9, -9, -9, -9, -3, -3, -2, -4, 0, 0, 0, 0};

static vocabulary spm_vocabulary(void) {
    vocabulary v;
    memset(&v, 0, sizeof v);
    v.sentencepiece = true;
    v.n = 15;
    v.pieces = spm_pieces;
    v.types = spm_types;
    v.scores = spm_scores;
    v.bos = 1;
    v.eos = 2;
    v.add_bos = v.add_space_prefix = true;
    return v;
}

static void test_sentencepiece(void **state) {
    (void)state;
    vocabulary v = spm_vocabulary();
    llm_tokenizer *t = build(&v);
    check_ids(t, "", 0, "");
    check_ids(t, "", LLM_TOKENS_ENDS, "1");
    check_ids(t, "b", 0, "3 5");
    check_ids(t, "a", 0, "10");
    check_ids(t, " a", 0, "3 10");
    check_ids(t, "aaa", 0, "3 9 4");             /* aa has the better score than " a", and the left one comes first */
    check_ids(t, "abc", 0, "3 7 6");             /* ab and bc have the same score: the left one                     */
    check_ids(t, "\xC3\xA9\n", 0, "3 12 13 11"); /* bytes                                                         */
    check_ids(t, "\xC3\xA8", 0, "3 0");          /* one of its bytes has no token                                 */
    check_ids(t, "b" SPACE "a", 0, "3 5 10");
    check_ids(t, "<s>b", 0, "3 0 5"); /* a run of unknown characters is one token */
    check_ids(t, "<s>b", LLM_TOKENS_SPECIAL, "1 3 5");
    check_ids(t, "<s>b", LLM_TOKENS_SPECIAL | LLM_TOKENS_ENDS, "1 3 5"); /* never two */
    check_ids(t, "b<u>b", 0, "3 5 14 3 5");
    const llm_token ids[] = {1, 3, 5, 10, 12, 13, 2, 99, -5};
    check_text(t, ids, 9, 0, "b a\xC3\xA9");
    check_text(t, ids, 9, LLM_TOKENS_SPECIAL, "<s> b a\xC3\xA9</s>");
    check_text(t, ids + 1, 1, 0, "");
    assert_true(llm_token_is_special(t, 0) && llm_token_is_special(t, 1) && !llm_token_is_special(t, 14));
    assert_true(llm_token_is_end(t, 2) && !llm_token_is_end(t, 1) && !llm_token_is_end(t, -1) &&
                !llm_token_is_end(t, 15));
    llm_tokenizer_free(t);
}

static void test_no_byte_tokens(void **state) {
    (void)state;
    vocabulary v = spm_vocabulary();
    v.n = 11;
    v.add_eos = true;
    v.add_space_prefix = false;
    llm_tokenizer *t = build(&v);
    check_ids(t,
              "b\xC3\xA9\xC3\xA8"
              "b\n",
              0, "5 0 5 0"); /* a run of unknown characters is one token */
    check_ids(t, "b", LLM_TOKENS_ENDS, "1 5 2");
    check_ids(t, "b</s>", LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL, "1 5 2");
    llm_tokenizer_free(t);
}

/* A character without a token is dropped if there is no unknown token. Its neighbours may then merge, as in Hugging
   Face's tokenizers, though no merge has a part of it. An unknown token that merges is not cut off either. */
static void test_dropped(void **state) {
    static const char *const pieces[] = {"a", "c", "ac", "u", "au"}, *const merges[] = {"a", "c", "a", "u"};
    static const float scores[] = {-9, -9, -1, -9, -2};
    static const int32_t types[] = {1, 1, 1, 1, 1};
    (void)state;
    for (int kind = 0; kind < 3; kind++) { /* byte-level; SentencePiece with merges and with scores */
        vocabulary v = byte_level(pieces, 5, merges, 2);
        v.types = types;
        v.sentencepiece = kind > 0;
        v.scores = kind == 2 ? scores : NULL;
        llm_tokenizer *t = build(&v);
        check_ids(t, "axc", 0, "2");
        check_ids(t,
                  "a\xC3\xA9\xE4\xB8\xAD"
                  "c",
                  0, "2");
        check_ids(t, "caxxca", 0, "1 2 0");
        llm_tokenizer_free(t);
        v.unk = 3;
        t = build(&v);
        check_ids(t, "axc", 0, "4 1");
        llm_tokenizer_free(t);
    }
}

static void test_byte_level(void **state) {
    (void)state;
    static const char *const pieces[] = {"a",        "b",   "c",    "ab", "bc",           "abc",
                                         "\xC4\xA0", "<x>", "<x>y", "<x", "\xC4\xA0\x61", "<"};
    static const char *const merges[] = {"b", "c", "a", "b", "ab", "c", "\xC4\xA0", "a"};
    static const int32_t types[] = {1, 1, 1, 1, 1, 1, 1, 3, 4, 3, 1, 1};
    static const uint16_t traits[] = {0, 0, 0, 0, 0, 0, 0, LLM__LSTRIP, LLM__RSTRIP, 0, 0, 0};
    vocabulary v = byte_level(pieces, 12, merges, 4);
    v.types = types;
    v.traits = traits;
    llm_tokenizer *t = build(&v);
    check_ids(t, "abc", 0, "0 4"); /* "abc" is a piece, but the merges never get there */
    check_ids(t, "ab a", 0, "3 10");
    check_ids(t, "dab", 0, "3"); /* d has no token and is left out                   */
    check_ids(t, "a<x>y  b", 0, "0 8 1");
    check_ids(t, "a <x>a", 0, "0 6 11 0");
    check_ids(t, "a <x>a", LLM_TOKENS_SPECIAL, "0 7 0");
    check_ids(t, "<x<x>y", LLM_TOKENS_SPECIAL, "9 8"); /* the longest */
    check_ids(t, "a", LLM_TOKENS_ENDS, "0");
    llm_tokenizer_free(t);
    v.pre = "llama-bpe"; /* a word that is a piece is not merged */
    t = build(&v);
    check_ids(t, "abc", 0, "5");
    llm_tokenizer_free(t);
}

/* Merging starts from whole characters only if that changes nothing. */
static void test_characters(void **state) {
    (void)state;
    static const char a[] = "\xC3\x83", b[] = "\xC2\xA9"; /* the bytes of U+00E9, 0xC3 and 0xA9, as pieces show them */
    static const char *const pieces[] = {
        a, b, "x", "y", "\xC3\x83\xC2\xA9", "x\xC3\x83\xC2\xA9", "yx", "x\xC3\x83", "\xC2\xA9\xC3\x83"};
    static const char *const merges[][6] = {{a, b, "y", "x", "x", "\xC3\x83\xC2\xA9"},
                                            {"x", "\xC3\x83\xC2\xA9", "y", "x", a, b},
                                            {"x", a, a, b, NULL, NULL},
                                            {b, a, a, b, NULL, NULL}};
    static const char *const expected[][5] = {{"6 4", "5", "2 3", "4 4 4", "2 0 4"},
                                              {"6 4", "5", "2 3", "4 4 4", "2 0 4"},
                                              {"3 7 1", "7 1", "2 3", "4 4 4", "7 4"},
                                              {"3 2 4", "2 4", "2 3", "0 8 8 1", "2 0 4"}};
    for (int i = 0; i < 4; i++) {
        vocabulary v = byte_level(pieces, 9, merges[i], i < 2 ? 3 : 2);
        llm_tokenizer *t = build(&v);
        assert_int_equal(t->ranks_grow, i != 1);
        check_ids(t, "yx\xC3\xA9", 0, expected[i][0]);
        check_ids(t, "x\xC3\xA9", 0, expected[i][1]);
        check_ids(t, "xy", 0, expected[i][2]);
        check_ids(t, "x\xC3\xA8\xC3\xA9", 0, expected[i][4]); /* 0xA8 has no token and is left out */
        check_ids(t, "\xC3\xA9\xC3\xA9\xC3\xA9", 0, expected[i][3]);
        llm_tokenizer_free(t);
    }
}

/* ---- Unicode ---- */

typedef struct unicode_job {
    const json_t *golden;
    llm__unicode_classes *classes;
    llm__nfc *nfc;
} unicode_job;

static uint64_t hash_nfc(llm__env *env, const llm__nfc *nfc, const char *before, const char *after) {
    uint64_t hash = FNV;
    for (uint32_t c = 0; c < 0x110000; c++) {
        if (c >= 0xD800 && c < 0xE000) continue;
        uint8_t text[32], *p = text + strlen(before);
        memcpy(text, before, strlen(before));
        p += llm__utf8_encode(c, p);
        memcpy(p, after, strlen(after));
        p += strlen(after);
        size_t n = (size_t)(p - text);
        uint8_t *changed = llm__nfc_apply(env, nfc, text, p, &n);
        const uint8_t *q = changed ? changed : text, *end = q + n;
        while (q < end) hash = fnv(hash, llm__utf8_decode(q, &q));
        llm__free(env->pool, changed);
    }
    return hash;
}

static void unicode_body(llm__env *env, void *arg) {
    unicode_job *job = (unicode_job *)arg;
    job->classes = llm__unicode_build_classes(env);
    job->nfc = llm__nfc_build(env);
    uint64_t hash = FNV;
    for (uint32_t c = 0; c < 0x110000; c++) {
        uint8_t text[4];
        const uint8_t *next;
        if (c >= 0xD800 && c < 0xE000) continue;
        llm__utf8_encode(c, text);
        hash = fnv(hash, llm__unicode_class_at(job->classes, text, &next));
    }
    check_hash("classes", hash, json_object_get(job->golden, "classes"));
    size_t i;
    json_t *frame;
    json_array_foreach(json_object_get(job->golden, "nfc"), i, frame) {
        const char *before = json_string_value(json_object_get(frame, "before"));
        const char *after = json_string_value(json_object_get(frame, "after"));
        check_hash(before, hash_nfc(env, job->nfc, before, after), json_object_get(frame, "hash"));
    }
}

/* A piece that words cannot contain may have the bytes of one that they can. A merge makes the latter, also if the ids
   are in order. */
static void test_piece_as_written(void **state) {
    static const char *const pieces[] = {"\xC3\xA6",         "\xC4\xB9",     "\xC2\xA5",
                                         "\xC3\xA6\xC4\xB9", "\xE6\x97\xA5", "\xC3\xA6\xC4\xB9\xC2\xA5"};
    static const char *const merges[] = {"\xC3\xA6", "\xC4\xB9", "\xC3\xA6\xC4\xB9", "\xC2\xA5"};
    (void)state;
    vocabulary v = byte_level(pieces, 6, merges, 2);
    llm_tokenizer *t = build(&v);
    check_ids(t, "\xE6\x97\xA5", 0, "5");
    const llm_token ids[] = {4, 5};
    check_text(t, ids, 2, 0, "\xE6\x97\xA5\xE6\x97\xA5");
    llm_tokenizer_free(t);
}

static void test_unicode(void **state) {
    (void)state;
    json_t *golden = json_load_file(golden_path("unicode.json"), 0, NULL);
    assert_non_null(golden);
    unicode_job job = {golden, NULL, NULL};
    llm__pool pool;
    llm_error err;
    if (guarded(&pool, NULL, unicode_body, &job, &err)) fail_msg("%s", err.message);
    llm__pool_free(&pool);
    json_decref(golden);
}

/* ---- The default model ---- */

typedef struct golden_run {
    const llm_tokenizer *tokenizer;
    llm_token *ids;
    char *text, *streamed;
    int n_texts, n_wrong;
} golden_run;

static void report(golden_run *run, const char *what, const char *text) {
    if (run->n_wrong++ < 5) print_error("%s differ: %s\n", what, text);
}

static void compare_ids(golden_run *run, const char *text, size_t n, unsigned flags, const json_t *expected) {
    llm_error err;
    int64_t count = llm_encode(run->tokenizer, text, n, flags, run->ids, MAX_IDS, &err);
    bool same = count == (int64_t)json_array_size(expected);
    for (int64_t i = 0; same && i < count; i++)
        same = run->ids[i] == json_integer_value(json_array_get(expected, (size_t)i));
    if (!same) report(run, flags ? "ids" : "plain ids", text);
}

/* Writes the text that decoding must give: without bytes that have no token. Returns its length. */
static size_t representable(golden_run *run, const char *text, size_t n, char *out) {
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        bool ascii = (unsigned char)text[i] < 0x80;
        if (!ascii || llm_encode(run->tokenizer, text + i, 1, 0, NULL, 0, NULL) > 0) out[kept++] = text[i];
    }
    return kept;
}

static void compare_back(golden_run *run, const char *text, size_t n) {
    llm_error err;
    char wanted[4096];
    assert_in_range(n, 0, sizeof wanted);
    size_t n_wanted = representable(run, text, n, wanted), n_streamed = 0;
    int64_t count = llm_encode(run->tokenizer, text, n, LLM_TOKENS_SPECIAL, run->ids, MAX_IDS, &err);
    size_t n_text = llm_decode(run->tokenizer, run->ids, (size_t)count, LLM_TOKENS_SPECIAL, run->text, MAX_IDS);
    if (n_text != n_wanted || memcmp(run->text, wanted, n_wanted)) report(run, "decoded texts", text);
    llm_text_stream stream;
    memset(&stream, 0, sizeof stream);
    stream.flags = LLM_TOKENS_SPECIAL;
    for (int64_t i = 0; i <= count; i++) {
        char *out = run->streamed + n_streamed;
        size_t more =
            llm_stream_token(run->tokenizer, &stream, i < count ? run->ids[i] : -1, out, MAX_IDS - n_streamed);
        const uint8_t *p = (const uint8_t *)out;
        if (llm__utf8_check(p, p + more) != p + more) report(run, "whole characters", text);
        n_streamed += more;
    }
    if (n_streamed != n_wanted || memcmp(run->streamed, wanted, n_wanted)) report(run, "streamed texts", text);
}

static void compare_long(golden_run *run, const json_t *entry) {
    const json_t *unit = json_object_get(entry, "unit");
    size_t n = json_string_length(unit), times = (size_t)json_integer_value(json_object_get(entry, "times"));
    char *text = (char *)malloc(n * times);
    llm_error err;
    assert_non_null(text);
    for (size_t i = 0; i < times; i++) memcpy(text + i * n, json_string_value(unit), n);
    int64_t count = llm_encode(run->tokenizer, text, n * times, 0, run->ids, MAX_IDS, &err);
    assert_int_equal(count, json_integer_value(json_object_get(entry, "count")));
    uint64_t hash = FNV;
    for (int64_t i = 0; i < count; i++) hash = fnv(hash, (uint32_t)run->ids[i]);
    check_hash(json_string_value(unit), hash, json_object_get(entry, "hash"));
    free(text);
}

static void test_golden(void **state) {
    (void)state;
    llm_tokenizer *tokenizer = load_model_tokenizer(NULL);
    golden_run run = {tokenizer,
                      (llm_token *)malloc(MAX_IDS * sizeof(llm_token)),
                      (char *)malloc(MAX_IDS),
                      (char *)malloc(MAX_IDS),
                      0,
                      0};
    FILE *file = open_lines(golden_path("tokens-smollm2.jsonl"));
    for (json_t *entry; (entry = next_line(file)) != NULL;) {
        if (json_is_object(entry)) {
            compare_long(&run, entry);
        } else {
            const json_t *text = json_array_get(entry, 0), *ids = json_array_get(entry, 1),
                         *plain = json_array_get(entry, 2);
            compare_ids(&run, json_string_value(text), json_string_length(text), LLM_TOKENS_SPECIAL, ids);
            compare_ids(&run, json_string_value(text), json_string_length(text), 0, plain ? plain : ids);
            compare_back(&run, json_string_value(text), json_string_length(text));
        }
        run.n_texts++;
        json_decref(entry);
    }
    free(run.ids);
    free(run.text);
    free(run.streamed);
    llm_tokenizer_free(tokenizer);
    assert_int_equal(run.n_wrong, 0);
    assert_true(run.n_texts >= 5000);
}

static void test_tokens(void **state) {
    (void)state;
    llm_tokenizer *t = load_model_tokenizer(NULL);
    size_t n;
    assert_int_equal(llm_tokenizer_n_vocab(t), 49152);
    assert_int_equal(llm_tokenizer_bos(t), 1);
    assert_int_equal(llm_tokenizer_eos(t), 2);
    assert_true(llm_token_is_end(t, 0) && llm_token_is_end(t, 2) && !llm_token_is_end(t, 1) && !llm_token_is_end(t, 3));
    assert_true(llm_token_is_special(t, 16) && !llm_token_is_special(t, 17));
    assert_null(llm_token_bytes(t, 49152, &n));
    assert_null(llm_token_bytes(t, -1, &n));
    assert_non_null(llm_token_bytes(t, 2, &n));
    assert_int_equal(n, strlen("<|im_end|>"));
    check_ids(t, "<|im_end|>", LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL, "2"); /* the file says that there is no BOS */
    llm_tokenizer_free(t);
}

static void test_buffers(void **state) {
    (void)state;
    llm_tokenizer *t = load_model_tokenizer(NULL);
    llm_token ids[4] = {-7, -7, -7, -7};
    char text[8] = "xxxxxxx";
    llm_error err;
    assert_int_equal(llm_encode(t, "1 2 3", 5, 0, ids, 2, &err), 5);
    assert_int_equal(ids[1], 216);
    assert_int_equal(ids[2], -7);
    assert_int_equal(llm_encode(t, NULL, 0, 0, NULL, 0, &err), 0);
    llm_encode(t, "1234", 4, 0, ids, 4, &err);
    assert_int_equal(llm_decode(t, ids, 4, 0, text, 3), 4);
    assert_string_equal(text, "12");
    assert_int_equal(text[3], 'x');
    assert_int_equal(llm_decode(t, ids, 4, 0, NULL, 0), 4);
    llm_text_stream stream, before;
    memset(&stream, 0, sizeof stream);
    before = stream;
    assert_int_equal(llm_stream_token(t, &stream, 0 + ids[0], text, 1), 1); /* no room for the NUL */
    assert_memory_equal(&stream, &before, sizeof stream);
    assert_int_equal(llm_stream_token(t, &stream, ids[0], text, 2), 1);
    assert_string_equal(text, "1");
    llm_tokenizer_free(t);
}

/* ---- Bytes that are not UTF-8 ---- */

static void test_invalid(void **state) {
    (void)state;
#define BAD "\xEF\xBF\xBD"
    static const char *const cases[][2] = {{"a\xFF"
                                            "b",
                                            "a" BAD "b"},
                                           {"\x80", BAD},
                                           {"\xC3", BAD},
                                           {"\xC0\x80", BAD BAD},
                                           {"\xE2\x82", BAD BAD},
                                           {"\xE2\x82 ", BAD BAD " "},
                                           {"\xED\xA0\x80", BAD BAD BAD},
                                           {"\xF4\x90\x80\x80", BAD BAD BAD BAD},
                                           {"\xF0\x9F\x91\x8D", "\xF0\x9F\x91\x8D"},
                                           {"\xF0\x9F\x91", BAD BAD BAD},
                                           {"\xC3\xC3\xA9", BAD "\xC3\xA9"},
                                           {"\xE0\x9F\xBF", BAD BAD BAD},
                                           {"\xF8\x88\x80\x80\x80", BAD BAD BAD BAD BAD}};
    llm_tokenizer *t = load_model_tokenizer(NULL);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llm_token a[64], b[64];
        llm_error err;
        int64_t n = llm_encode(t, cases[i][0], strlen(cases[i][0]), 0, a, 64, &err);
        assert_int_equal(n, llm_encode(t, cases[i][1], strlen(cases[i][1]), 0, b, 64, &err));
        assert_memory_equal(a, b, (size_t)n * sizeof *a);
    }
    llm_tokenizer_free(t);
}

/* Streams single bytes as tokens. Bytes that may become a character must be held back; others must be replaced. */
static void check_stream(const llm_tokenizer *t, const char *bytes, const char *expected) {
    llm_text_stream stream;
    char text[256] = "", piece[16];
    memset(&stream, 0, sizeof stream);
    stream.started = true;
    for (const char *p = bytes;; p++) {
        size_t n = llm_stream_token(t, &stream, *p ? t->byte_tokens[(unsigned char)*p] : -1, piece, sizeof piece);
        assert_in_range(n, 0, sizeof piece - 1);
        strcat(text, piece);
        if (!*p) break;
    }
    if (strcmp(text, expected)) fail_msg("streamed \"%s\", not \"%s\"", text, expected);
}

static void test_stream(void **state) {
    (void)state;
    static char names[256][8];
    static const char *pieces[256];
    static int32_t types[256];
    static float scores[256];
    for (int i = 0; i < 256; i++) {
        snprintf(names[i], sizeof names[i], "<0x%02X>", (unsigned)i);
        pieces[i] = names[i];
        types[i] = LLM__TYPE_BYTE;
    }
    vocabulary v;
    memset(&v, 0, sizeof v);
    v.sentencepiece = true;
    v.n = 256;
    v.pieces = pieces;
    v.types = types;
    v.scores = scores;
    v.bos = v.eos = v.unk = -1;
    llm_tokenizer *t = build(&v);
    check_stream(t, "a\xC3\xA9\xE4\xBD\xA0\xF0\x9F\x91\x8D", "a\xC3\xA9\xE4\xBD\xA0\xF0\x9F\x91\x8D");
    check_stream(t, "\xF0\x9F\x91", BAD BAD BAD);
    check_stream(t,
                 "\xF0\x9F"
                 "a",
                 BAD BAD "a");
    check_stream(t, "\xE4\xBD\xC3\xA9", BAD BAD "\xC3\xA9");
    check_stream(t,
                 "\x80\xFF\xC1"
                 "b",
                 BAD BAD BAD "b");
    check_stream(t, "\xED\xA0\x80", BAD BAD BAD);
    check_stream(t, "\xF4\x8F\xBF\xBF\xF4\x90", "\xF4\x8F\xBF\xBF" BAD BAD);
    check_stream(t, "\xE0\x80\x80", BAD BAD BAD);
    llm_tokenizer_free(t);
}

/* ---- Hostile vocabularies ---- */

static void check_refused(vocabulary v, llm_status code, const char *words) {
    llm_error err;
    llm_status status = try_build(&v, &err);
    if (!status) llm_tokenizer_free(v.built);
    assert_int_equal(status, code);
    if (!strstr(err.message, words)) fail_msg("\"%s\" does not say \"%s\"", err.message, words);
}

/* Replaces the last piece, or the second half of the merge. The vocabulary must be refused. */
static void refuse_piece(vocabulary v, const char *piece, llm_status code, const char *words) {
    const char *pieces[] = {"a", "b", "ab", piece};
    v.pieces = pieces;
    check_refused(v, code, words);
}

static void refuse_merge(vocabulary v, const char *second, const char *words) {
    const char *merges[] = {"a", second};
    v.merges = merges;
    check_refused(v, LLM_ERROR_FORMAT, words);
}

static void test_hostile(void **state) {
    (void)state;
    static const char *const pieces[] = {"a", "b", "ab", "c"}, *const merges[] = {"a", "b"};
    int32_t types[] = {1, 1, 1, 1};
    float scores[] = {0, 0, 0, 0};
    vocabulary v = byte_level(pieces, 4, merges, 1), w;
    v.types = types;
    llm_tokenizer_free(build(&v));

    w = v;
    w.pre = "fancy";
    check_refused(w, LLM_ERROR_UNSUPPORTED, "pre is \"fancy\"");
    w = v;
    w.n = 0;
    check_refused(w, LLM_ERROR_FORMAT, "pieces has 0 entries");
    refuse_piece(v, "", LLM_ERROR_FORMAT, "pieces[3] is empty");
    refuse_piece(v, "a\xFF", LLM_ERROR_FORMAT, "pieces[3] is not UTF-8: byte 1 is 0xFF");
    refuse_piece(v, "a", LLM_ERROR_FORMAT, "pieces[0] and [3] are the same piece: \"a\"");
    refuse_merge(v, "c", "merges[0] makes \"ac\", which is not in pieces");
    refuse_merge(v, "x", "merges[0] needs \"x\", which is not in pieces");
    refuse_merge(v, "", "merges[0] is empty");
    refuse_merge(v, " ", "merges[0]: \" \" is not made of byte characters");
    w = v;
    types[2] = 9;
    check_refused(w, LLM_ERROR_FORMAT, "types[2] is 9");
    types[2] = 6;
    w.sentencepiece = true;
    w.scores = scores;
    check_refused(w, LLM_ERROR_FORMAT, "pieces[2] is \"ab\", not a byte like \"<0x0A>\"");
    types[2] = 1;
    scores[1] = NAN;
    check_refused(w, LLM_ERROR_FORMAT, "scores[1] is not a number");
    static char long_piece[70001];
    memset(long_piece, 'x', 70000);
    scores[1] = 0;
    refuse_piece(w, long_piece, LLM_ERROR_UNSUPPORTED, "pieces[3] has 70000 bytes; 65535 are the most");
    long_piece[600] = 0;
    refuse_piece(w, long_piece, LLM_ERROR_UNSUPPORTED, "pieces[3] has 600 bytes; 512 are the most");
}

/* ---- Hostile GGUF metadata: the smallest file that loads, with one value changed ---- */

typedef struct header {
    uint8_t data[4096];
    size_t n;
} header;

static void put(header *b, const void *data, size_t n) {
    assert_in_range(b->n + n, 0, sizeof b->data);
    memcpy(b->data + b->n, data, n);
    b->n += n;
}

static void put_u32(header *b, uint32_t v) { put(b, &v, 4); }
static void put_u64(header *b, uint64_t v) { put(b, &v, 8); }

static void put_string(header *b, const char *text) {
    put_u64(b, strlen(text));
    put(b, text, strlen(text));
}

/* Adds a value: "key=text", "key#number", "key~float", "key:a,b,c" (strings) or "key;1,2,3" (int32). */
static void put_value(header *b, const char *line) {
    size_t n = strcspn(line, "=#~:;");
    char key[64], list[256], kind = line[n];
    const char *value = line + n + 1;
    snprintf(key, sizeof key, "%.*s", (int)n, line);
    put_string(b, key);
    if (kind == '=') {
        put_u32(b, LLM__GGUF_STRING);
        put_string(b, value);
    } else if (kind == '#') {
        put_u32(b, LLM__GGUF_U32);
        put_u32(b, (uint32_t)strtoul(value, NULL, 10));
    } else if (kind == '~') {
        float f = strtof(value, NULL);
        put_u32(b, LLM__GGUF_F32);
        put(b, &f, 4);
    } else {
        uint64_t count = *value != 0;
        for (const char *p = value; *p; p++) count += *p == ',';
        put_u32(b, LLM__GGUF_ARRAY);
        put_u32(b, kind == ':' ? LLM__GGUF_STRING : LLM__GGUF_I32);
        put_u64(b, count);
        snprintf(list, sizeof list, "%s", value);
        for (char *p = strtok(list, ","); p; p = strtok(NULL, ",")) {
            if (kind == ':') put_string(b, p);
            else put_u32(b, (uint32_t)strtol(p, NULL, 10));
        }
    }
}

/* Loads a file with these values. `changed` replaces the value with the same key, or is added. */
static llm_status load_values(const char *changed, llm_error *err) {
    static const char *const good[] = {"tokenizer.ggml.model=gpt2", "tokenizer.ggml.pre=gpt-2",
                                       "tokenizer.ggml.tokens:a,b,ab", "tokenizer.ggml.token_type;1,1,1",
                                       "tokenizer.ggml.merges:a b"};
    header b;
    char path[] = "/tmp/llm-test-XXXXXX";
    llm_tokenizer *tokenizer;
    size_t n_key = strcspn(changed, "=#~:;"), n_good = sizeof good / sizeof *good;
    bool replaced = false, removed = !changed[n_key];
    b.n = 0;
    put(&b, "GGUF", 4);
    put_u32(&b, 3);
    put_u64(&b, 0);
    size_t count_at = b.n;
    put_u64(&b, 0);
    uint64_t count = 0;
    for (size_t i = 0; i < n_good; i++) {
        bool same = !strncmp(good[i], changed, n_key) && strchr("=#~:;", good[i][n_key]);
        replaced |= same;
        if (same && removed) continue;
        put_value(&b, same ? changed : good[i]);
        count++;
    }
    if (!replaced && *changed) {
        put_value(&b, changed);
        count++;
    }
    memcpy(b.data + count_at, &count, 8);
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, b.data, b.n), b.n);
    close(fd);
    llm_status status = llm_tokenizer_load(&tokenizer, path, NULL, err);
    unlink(path);
    llm_tokenizer_free(tokenizer);
    return status;
}

static void test_hostile_gguf(void **state) {
    (void)state;
    static const char *const cases[][2] = {
        {"tokenizer.ggml.model=bert", "tokenizer.ggml.model is \"bert\""},
        {"tokenizer.ggml.model", "tokenizer.ggml.model is \"\""},
        {"tokenizer.ggml.model#1", "tokenizer.ggml.model is not a string"},
        {"tokenizer.ggml.pre=odd", "tokenizer.ggml.pre is \"odd\""},
        {"tokenizer.ggml.pre", "tokenizer.ggml.pre is \"\""},
        {"tokenizer.ggml.tokens", "tokenizer.ggml.tokens is missing"},
        {"tokenizer.ggml.tokens:", "tokenizer.ggml.t"},
        {"tokenizer.ggml.tokens=a", "tokenizer.ggml.tokens is not an array of strings"},
        {"tokenizer.ggml.tokens:a,b,ab,c", "tokenizer.ggml.token_type has 3 entries, tokenizer.ggml.tokens 4"},
        {"tokenizer.ggml.tokens:a,b,c", "tokenizer.ggml.merges[0] makes \"ab\", which is not in tokenizer.ggml.tokens"},
        {"tokenizer.ggml.token_type;1,7,1", "tokenizer.ggml.token_type[1] is 7"},
        {"tokenizer.ggml.token_type;1,-1,1", "tokenizer.ggml.token_type[1] is -1"},
        {"tokenizer.ggml.token_type:a,b,c", "tokenizer.ggml.token_type is not an array of numbers"},
        {"tokenizer.ggml.merges", "tokenizer.ggml.merges is missing"},
        {"tokenizer.ggml.merges:ab", "tokenizer.ggml.merges[0] is \"ab\", not two pieces"},
        {"tokenizer.ggml.merges:a ", "tokenizer.ggml.merges[0] is \"a \", not two pieces"},
        {"tokenizer.ggml.merges:a x", "tokenizer.ggml.merges[0] needs \"x\""},
        {"tokenizer.ggml.bos_token_id#3", "tokenizer.ggml.bos_token_id is 3, not a whole number from 0 to 2"},
        {"tokenizer.ggml.eos_token_id#4294967295", "tokenizer.ggml.eos_token_id is 4.29497e+09"},
        {"tokenizer.ggml.eot_token_id~1.5", "tokenizer.ggml.eot_token_id is 1.5"},
        {"tokenizer.ggml.precompiled_charsmap;1,2", "tokenizer.ggml.precompiled_charsmap is set"},
        {"tokenizer.ggml.model=llama", "tokenizer.ggml.scores is missing"}};
    llm_error err;
    if (load_values("", &err)) fail_msg("%s", err.message);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llm_status status = load_values(cases[i][0], &err);
        if (!status) fail_msg("%s was not refused", cases[i][0]);
        if (!strstr(err.message, cases[i][1]))
            fail_msg("%s: \"%s\" does not say \"%s\"", cases[i][0], err.message, cases[i][1]);
        assert_non_null(strstr(err.message, "/tmp/llm-test-")); /* the message names the file */
    }
}

/* ---- Failing allocations ---- */

typedef struct starved {
    heap h;
    llm_host host;
    const llm_tokenizer *tokenizer;
    char words[8000]; /* invalid UTF-8 and a long word; too short for the cache of words */
} starved;

static llm_status load_starved(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_tokenizer *tokenizer;
    llm_status status = llm_tokenizer_load(&tokenizer, model_path(), &s->host, err);
    assert_int_equal(status == LLM_OK, tokenizer != NULL);
    llm_tokenizer_free(tokenizer);
    return status;
}

static llm_status encode_starved(void *job, llm_error *err) {
    starved *s = (starved *)job;
    return llm_encode(s->tokenizer, s->words, sizeof s->words, 0, NULL, 0, err) < 0 ? err->code : LLM_OK;
}

static void test_allocation(void **state) {
    (void)state;
    static starved s;
    uint32_t seed = 1;
    memset(s.words, 'q', sizeof s.words);
    s.words[10] = '\xFF';
    for (size_t i = 20; i < sizeof s.words; i++)
        s.words[i] = "etaoinshrdlu"[((seed = seed * 1103515245u + 12345u) >> 16) % 12];
    s.host = heap_host(&s.h);
    starve(&s.h, load_starved, &s, 1, "llm_tokenizer_load");
    llm_tokenizer *tokenizer = load_model_tokenizer(&s.host);
    s.tokenizer = tokenizer;
    starve(&s.h, encode_starved, &s, 1, "llm_encode");
    llm_tokenizer_free(tokenizer);
    assert_all_returned(&s.h);
}

/* ---- Words found in blocks of 64 bytes, and the cache of words ---- */

enum { N_WORDS = 40000 };

typedef struct remembering {
    llm_token ids[4][N_WORDS];
    char text[N_WORDS];
} remembering;

/* Writes mostly repeated words, most of them short, with spaces and punctuation, and sometimes any byte. */
static void fill_words(char *text, size_t n, uint32_t *seed) {
    static const char *const parts[] = {
        "the",
        " the",
        " cat",
        "Cat",
        " CATs",
        "'s",
        "'LL",
        "'",
        " '",
        "\n",
        "\r\n",
        "  ",
        "   ",
        "\t",
        " \n ",
        "1",
        " 22",
        "333",
        "4444",
        ".",
        " ...",
        "/",
        "?!\n/",
        "_x",
        "\xC3\xA9",
        " na\xC3\xAFve",
        "\xE4\xBD\xA0\xE5\xA5\xBD",
        "\xC2\xA0",
        "\xE2\x80\x83",
        "\xD9\xA3",
        "e\xCC\x81",
        "\xF0\x9F\x98\x80",
        " abcdefghijklmn",
        " abcdefghijklmnopq",
        " qzxjvkwbqzxjv",
        " qzxjvkwbqzxjvkwbqz",
        " abcdefghijklmnopqrstuvwxyzabcdef",
        " HHHHHHHHH",
        "QQQQQQQQQQQQQQQ",
        " VVVVVVVVVVVVVVVVVVVV",
        " HHHHHHHHHHHHHHHHHHHQ",
        " \xD0\xBF\xD1\x80\xD0\xB8\xD0\xB2\xD0\xB5\xD1\x82",
        " \xD0\xBF\xD0\xBE\xD0\xB6\xD0\xB0\xD0\xBB\xD1\x83\xD0\xB9\xD1\x81\xD1\x82\xD0\xB0",
        "\xE4\xB8\xAD\xE6\x96\x87\xE4\xBD\xA0\xE5\xA5\xBD\xE4\xB8\x96\xE7\x95\x8C",
        "\xE7\x95\x8C\xE4\xB8\x96",
        "\xED\x95\x9C\xEA\xB5\xAD\xEC\x96\xB4",
        "\x1C",
        "\x0B",
        "ABCdef",
        "aBc",
        "<",
        "\xC5\xBF"};
    for (size_t i = 0; i < n;) {
        *seed = *seed * 1103515245u + 12345u;
        const char *part = parts[(*seed >> 16) % (sizeof parts / sizeof *parts)];
        for (; *part && i < n; part++) text[i++] = *part;
        if (*seed >> 24 == 7 && i < n) text[i++] = (char)(*seed >> 16 & 127);
    }
}

/* Checks the masks of a block, which vectors may have made, against their definitions. */
static void check_block(const char *text) {
    const uint8_t *p = (const uint8_t *)text;
    llm__pre_block b = llm__pre_classify(p, true);
    for (int i = 0; i < LLM__BLOCK; i++) {
        unsigned c = p[i];
        bool upper = c >= 'A' && c <= 'Z', lower = c >= 'a' && c <= 'z', newline = c == '\n' || c == '\r';
        assert_int_equal(b.letters >> i & 1, upper || lower);
        assert_int_equal(b.upper >> i & 1, upper);
        assert_int_equal(b.digits >> i & 1, c >= '0' && c <= '9');
        assert_int_equal(b.spaces >> i & 1, c == ' ' || (c >= 9 && c <= 13));
        assert_int_equal(b.blanks >> i & 1, c == ' ');
        assert_int_equal(b.newlines >> i & 1, newline);
        assert_int_equal(b.quotes >> i & 1, c == '\'');
        assert_int_equal(b.slashes >> i & 1, c == '/');
        assert_int_equal(b.high >> i & 1, c >= 0x80);
    }
}

/* Returns the end of the word at p, found by the code for one word at a time. `digits` is a rule that is applied first,
   or NULL. */
static const uint8_t *word_end(const llm_tokenizer *t, const llm__pre_rule *digits, const llm__pre_rule *rule,
                               const uint8_t *p, const uint8_t *end) {
    const uint8_t *from = end, *to = digits ? llm__pre_find_word(t->classes, digits, p, end, &from) : end;
    return from == p ? to : llm__pre_find_word(t->classes, rule, p, from, &from);
}

/* Words found in blocks must be those that the code for one word at a time finds. Returns the number of words found in
   blocks. */
static int check_words(const llm_tokenizer *t, const llm__pre_rule *digits, const llm__pre_rule *rule, const char *text,
                       size_t n) {
    const uint8_t *p = (const uint8_t *)text, *end = p + n;
    int n_shown = 0;
    while (end - p >= LLM__BLOCK_READ) {
        uint64_t starts = llm__pre_block_starts(rule, digits != NULL, p);
        unsigned i = 0;
        assert_true(starts & 1);
        for (starts &= ~(uint64_t)1; starts; starts &= starts - 1) {
            unsigned to = (unsigned)__builtin_ctzll(starts);
            const uint8_t *expected = word_end(t, digits, rule, p + i, end);
            if (p + to != expected)
                fail_msg("rule %d, \"%.20s\": %d bytes, not %d", rule->kind, text + (p - (const uint8_t *)text) + i,
                         (int)(to - i), (int)(expected - p) - (int)i);
            i = to;
            n_shown++;
        }
        p = i ? p + i : word_end(t, digits, rule, p, end);
    }
    return n_shown;
}

/* Every byte at every place of a block, and random blocks at any address. */
static void test_blocks(void **state) {
    (void)state;
    char text[2 * LLM__BLOCK];
    uint32_t seed = 1;
    for (int i = 0; i < 20000; i++) {
        char *block = text + i % LLM__BLOCK;
        for (int k = 0; k < LLM__BLOCK; k++) block[k] = (char)((seed = seed * 1103515245u + 12345u) >> 16);
        check_block(block);
        if (i >= 256) continue;
        for (int k = 0; k < LLM__BLOCK; k++) block[k] = (char)(i + k);
        check_block(block);
    }
}

/* Appends the ids of a text in memory of its own length, so that the address sanitizer sees what is read behind it. */
static int64_t append_ids(const llm_tokenizer *t, const void *text, size_t n, llm_token *ids, int64_t count) {
    void *alone = malloc(n);
    assert_non_null(alone);
    memcpy(alone, text, n);
    int64_t more = llm_encode(t, (const char *)alone, n, 0, ids + count, N_WORDS - (size_t)count, NULL);
    free(alone);
    assert_in_range(more, 0, N_WORDS - count);
    return count + more;
}

/* A text of any length has the ids of its words, each of which is found by the code for one word at a time and encoded
   alone. */
static void test_lengths(void **state) {
    (void)state;
    static llm_token whole[N_WORDS], parts[N_WORDS];
    static char text[N_WORDS];
    uint32_t seed = 2;
    llm_tokenizer *t = load_model_tokenizer(NULL);
    assert_true(llm__pre_is_digit_rule(t->rules));
    for (size_t length = 1; length < 700; length++) {
        fill_words(text, length, &seed);
        const uint8_t *p = (const uint8_t *)text, *end = llm__utf8_check(p, p + length);
        if (end == p) continue;
        int64_t n = append_ids(t, p, (size_t)(end - p), whole, 0), n_parts = 0;
        for (const uint8_t *to; p < end; p = to) {
            to = word_end(t, t->rules, t->rules + 1, p, end);
            n_parts = append_ids(t, p, (size_t)(to - p), parts, n_parts);
        }
        if (n != n_parts || memcmp(whole, parts, (size_t)n * sizeof *whole))
            fail_msg("%d bytes: %.*s", (int)length, (int)length, text);
    }
    llm_tokenizer_free(t);
}

static void test_words(void **state) {
    (void)state;
    static const uint8_t apart[] = {'z', 0xE4};
    static remembering r;
    static heap h;
    llm_host host = heap_host(&h);
    uint32_t seed = 1;
    llm_tokenizer *t = load_model_tokenizer(&host);
    assert_true(t->ranks_grow);
    assert_true(t->drops_bytes); /* it has no tokens for a few bytes, yet other words are cut */
    assert_false(llm__bpe_may_join(t, apart, apart + 1, apart + 2));
    for (int i = 0; i < 20; i++) {
        fill_words(r.text, N_WORDS, &seed);
        size_t n = (size_t)(llm__utf8_check((const uint8_t *)r.text, (const uint8_t *)r.text + N_WORDS) -
                            (const uint8_t *)r.text);
        for (int kind = LLM__RULE_GPT2; kind <= LLM__RULE_CASED; kind++)
            for (int most = 1; most <= 3; most += 2) {
                llm__pre_rule rule;
                memset(&rule, 0, sizeof rule);
                rule.kind = (llm__pre_rule_kind)kind;
                rule.most = most;
                rule.contractions = most == 3;
                assert_true(check_words(t, NULL, &rule, r.text, n) > N_WORDS / 20);
                if (kind != LLM__RULE_GPT2) continue;
                llm__pre_rule digits[3];
                memset(digits, 0, sizeof digits);
                digits[0].kind = LLM__RULE_RUN;
                digits[0].classes = LLM__NUMBER;
                digits[0].least = digits[0].most = 1;
                digits[1] = rule;
                assert_true(llm__pre_is_digit_rule(digits));
                assert_true(check_words(t, &digits[0], &digits[1], r.text, n) > N_WORDS / 20);
            }
        int64_t counts[4];
        /* With the cache of words, without it, without room for the last ids, and merging from bytes. */
        for (int k = 0; k < 4; k++) {
            h.n_calls = 0;
            h.fail_at = k == 1 ? 1 : 0;
            t->ranks_grow = k != 3;
            counts[k] = llm_encode(t, r.text, n, 0, r.ids[k], k == 2 ? 1001 : N_WORDS, NULL);
            h.fail_at = 0;
            assert_int_equal(counts[k], counts[0]);
            assert_memory_equal(r.ids[k], r.ids[0], (size_t)(k == 2 ? 1001 : counts[0]) * sizeof(llm_token));
        }
        assert_int_equal(r.ids[2][1001], 0);
    }
    llm_tokenizer_free(t);
    assert_all_returned(&h);
}

/* ---- Merging ---- */

static uint32_t next_random(uint32_t *seed) {
    *seed = *seed * 1103515245u + 12345u;
    return *seed >> 16;
}

enum { N_RANDOM_PIECES = 40, MOST_MERGED = 700 };

/* A vocabulary of the letters a, b and c and of random pieces, each made of two others. With scores, of which some are
   equal, every way to cut a piece into two is a merge. */
static llm_tokenizer *random_vocabulary(uint32_t *seed, bool scored) {
    static char pieces[N_RANDOM_PIECES][24];
    static const char *pointers[N_RANDOM_PIECES], *merges[2 * N_RANDOM_PIECES];
    static float scores[N_RANDOM_PIECES];
    vocabulary v = byte_level(pointers, 0, merges, 0);
    for (; v.n < 3; v.n++) snprintf(pieces[v.n], sizeof *pieces, "%c", 'a' + v.n);
    for (int tries = 0; v.n < N_RANDOM_PIECES && tries < 1000; tries++) {
        const int left = (int)(next_random(seed) % (uint32_t)v.n), right = (int)(next_random(seed) % (uint32_t)v.n);
        const size_t n_left = strlen(pieces[left]), n_right = strlen(pieces[right]);
        if (n_left + n_right >= sizeof *pieces) continue;
        memcpy(pieces[v.n], pieces[left], n_left);
        memcpy(pieces[v.n] + n_left, pieces[right], n_right + 1);
        bool is_new = true;
        for (int i = 0; i < v.n && is_new; i++) is_new = strcmp(pieces[i], pieces[v.n]) != 0;
        if (!is_new) continue;
        merges[2 * v.n_merges] = pieces[left];
        merges[2 * v.n_merges++ + 1] = pieces[right];
        v.n++;
    }
    for (int i = 0; i < v.n; i++) {
        pointers[i] = pieces[i];
        scores[i] = -(float)(next_random(seed) % 20);
    }
    v.scores = scored ? scores : NULL;
    v.sentencepiece = scored;
    return build(&v);
}

/* The definition: the leftmost pair of the lowest rank merges, again and again. */
static size_t merge_plainly(const llm_tokenizer *t, llm_token *ids, size_t n) {
    for (;;) {
        llm__bpe_merge_to best = {LLM__NONE, LLM__NO_RANK};
        size_t at = 0;
        for (size_t i = 0; i + 1 < n; i++) {
            const llm__bpe_merge_to to = llm__bpe_find_pair(t, ids[i], ids[i + 1]);
            if (to.rank >= best.rank) continue;
            best = to;
            at = i;
        }
        if (best.rank == LLM__NO_RANK) return n;
        ids[at] = best.merged;
        memmove(ids + at + 1, ids + at + 2, (--n - at - 1) * sizeof *ids);
    }
}

typedef struct merging {
    const llm_tokenizer *t;
    llm_token *ids;
    size_t n;
} merging;

static void merge_body(llm__env *env, void *arg) {
    merging *m = (merging *)arg;
    m->n = llm__bpe_merge(env, m->t, m->ids, m->n);
}

/* Words of all lengths, of which most repeat a few letters, have the tokens that the definition gives. */
static void test_merging(void **state) {
    (void)state;
    uint32_t seed = 3;
    for (int i = 0; i < 60; i++) {
        llm_tokenizer *t = random_vocabulary(&seed, i % 2);
        for (int k = 0; k < 40; k++) {
            llm_token ids[MOST_MERGED], expected[MOST_MERGED];
            llm__pool pool;
            llm_error err;
            merging m = {t, ids, 1 + next_random(&seed) % MOST_MERGED};
            const size_t period = 1 + next_random(&seed) % 9, noise = 1 + next_random(&seed) % 300;
            for (size_t j = 0; j < m.n; j++) {
                const bool copy = j >= period && next_random(&seed) % noise;
                ids[j] = copy ? ids[j - period] : (llm_token)(next_random(&seed) % 3);
            }
            memcpy(expected, ids, sizeof ids);
            const size_t n = merge_plainly(t, expected, m.n);
            assert_int_equal(guarded(&pool, NULL, merge_body, &m, &err), LLM_OK);
            llm__pool_free(&pool);
            assert_int_equal(m.n, n);
            assert_memory_equal(ids, expected, n * sizeof *ids);
        }
        llm_tokenizer_free(t);
    }
}

/* ---- Threads ---- */

enum { N_THREADS = 8, N_SAMPLE = 4000 };

typedef struct worker {
    pthread_t thread;
    const llm_tokenizer *tokenizer;
    const char *text;
    llm_token ids[N_SAMPLE];
    int64_t n;
} worker;

static void *work(void *arg) {
    worker *w = (worker *)arg;
    for (int i = 0; i < 5; i++)
        w->n = llm_encode(w->tokenizer, w->text, N_SAMPLE, LLM_TOKENS_SPECIAL, w->ids, N_SAMPLE, NULL);
    return NULL;
}

static void test_threads(void **state) {
    (void)state;
    static worker workers[N_THREADS];
    static char text[N_SAMPLE];
    llm_tokenizer *tokenizer = load_model_tokenizer(NULL);
    for (int i = 0; i < N_SAMPLE; i++) text[i] = i % 500 < 400 ? "the quick  brown fox's 42\n"[i % 26] : 'x';
    for (int i = 0; i < N_THREADS; i++) {
        workers[i].tokenizer = tokenizer;
        workers[i].text = text;
        assert_int_equal(pthread_create(&workers[i].thread, NULL, work, &workers[i]), 0);
    }
    for (int i = 0; i < N_THREADS; i++) pthread_join(workers[i].thread, NULL);
    for (int i = 1; i < N_THREADS; i++) {
        assert_int_equal(workers[i].n, workers[0].n);
        assert_memory_equal(workers[i].ids, workers[0].ids, (size_t)workers[0].n * sizeof(llm_token));
    }
    llm_tokenizer_free(tokenizer);
}

/* ---- Time ---- */

/* Returns processor time, because other programs may be running. */
static double seconds_for(const llm_tokenizer *tokenizer, const char *unit, llm_token *ids) {
    enum { N = 1 << 20 };
    char *text = (char *)malloc(N);
    assert_non_null(text);
    for (size_t i = 0; i < N; i++) text[i] = unit[i % strlen(unit)];
    const clock_t begin = clock();
    for (int i = 0; i < 3; i++) llm_encode(tokenizer, text, N, 0, ids, N, NULL);
    free(text);
    return (double)(clock() - begin) / CLOCKS_PER_SEC / 3;
}

/* A megabyte of any text takes about as long as a megabyte of prose. Quadratic time would exceed the limit by far. */
static void test_time(void **state) {
    (void)state;
    static const char *const units[] = {"a",  " ",        "ab",           "\n",        "1",     "!",
                                        "aB", "\xC3\xA9", "\xE4\xBD\xA0", "e\xCC\x81", "<|im_", "'s"};
    llm_tokenizer *tokenizer = load_model_tokenizer(NULL);
    llm_token *ids = (llm_token *)malloc(((size_t)1 << 20) * sizeof *ids);
    double prose =
        seconds_for(tokenizer, "It was a bright cold day in April, and the clocks were striking thirteen. ", ids);
    for (size_t i = 0; i < sizeof units / sizeof *units; i++) {
        double took = seconds_for(tokenizer, units[i], ids);
        if (took > 30 * prose) fail_msg("1 MB of \"%s\" takes %.3f s, prose %.3f s", units[i], took, prose);
    }
    free(ids);
    llm_tokenizer_free(tokenizer);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sentencepiece), cmocka_unit_test(test_no_byte_tokens),
        cmocka_unit_test(test_dropped),       cmocka_unit_test(test_byte_level),
        cmocka_unit_test(test_characters),    cmocka_unit_test(test_piece_as_written),
        cmocka_unit_test(test_unicode),       cmocka_unit_test(test_golden),
        cmocka_unit_test(test_tokens),        cmocka_unit_test(test_buffers),
        cmocka_unit_test(test_invalid),       cmocka_unit_test(test_stream),
        cmocka_unit_test(test_hostile),       cmocka_unit_test(test_hostile_gguf),
        cmocka_unit_test(test_allocation),    cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_lengths),       cmocka_unit_test(test_words),
        cmocka_unit_test(test_merging),       cmocka_unit_test(test_threads),
        cmocka_unit_test(test_time),
    };
    if (SANITIZED) cmocka_set_skip_filter("test_time");
    if (THREAD_SANITIZED) cmocka_set_test_filter("test_threads");
    return cmocka_run_group_tests_name("tokenizer", tests, NULL, NULL);
}
