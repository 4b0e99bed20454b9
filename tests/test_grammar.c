/* Grammars: which texts a regular expression or a JSON Schema allows, as Python's re and jsonschema say (grammar.py), and GBNF;
   answers with a grammar are whole and valid, with streams and drafts, too; masks of a whole vocabulary; a mask of the
   host; bad grammars are refused in words.
   Variants: asan */
#include "tests/check.h"
#include <jansson.h>
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

static const tiny_spec SPEC = {2, 40, 56, 4, 2, 12, 512, 9, 1, 0, 21};

/* A model whose tokens are the 256 bytes and a few more. */
static llm_model *model;

static int start(void **state) {
    (void)state;
    model = load_tiny(&SPEC, LLM_DTYPE_F32);
    return 0;
}

static int stop(void **state) {
    (void)state;
    llm_model_free(model);
    return 0;
}

typedef llm_status make_grammar(llm_grammar **out, const llm_tokenizer *tokenizer, const char *text,
                                const llm_host *host, llm_error *err);

static llm_grammar *grammar_of(make_grammar *make, const char *text) {
    llm_grammar *g = NULL;
    llm_error err;
    if (make(&g, llm_model_tokenizer(model), text, NULL, &err)) fail_msg("%.80s: %s", text, err.message);
    return g;
}

static void test_golden(void **state) {
    FILE *file = open_lines("tests/golden/grammar.jsonl");
    int n = 0;
    (void)state;
    for (json_t *line; (line = next_line(file)); json_decref(line)) {
        const char *kind = json_string_value(json_array_get(line, 0)),
                   *text = json_string_value(json_array_get(line, 1));
        llm_grammar *g =
            grammar_of(strcmp(kind, "regex") ? llm_grammar_from_json_schema : llm_grammar_from_regex, text);
        json_t *cases = json_array_get(line, 2);
        for (size_t i = 0; i < json_array_size(cases); i++, n++) {
            const json_t *answer = json_array_get(json_array_get(cases, i), 0);
            const char *bytes = json_string_value(answer);
            size_t length = json_string_length(answer);
            bool valid = json_is_true(json_array_get(json_array_get(cases, i), 1));
            if ((llm_grammar_check(g, bytes, length) == 1) != valid)
                fail_msg("%s: '%s' should be %s", text, bytes, valid ? "valid" : "invalid");
            for (size_t k = 0; k < length && valid; k++) /* each beginning of an answer can go on */
                if (llm_grammar_check(g, bytes, k) < 0) fail_msg("%s: the first %d bytes of '%s'", text, (int)k, bytes);
        }
        llm_grammar_free(g);
    }
    assert_true(n > 2000);
}

static void test_gbnf(void **state) {
    static const struct {
        const char *grammar, *valid, *invalid; /* answers with | between them */
    } cases[] = {
        {"root ::= \"a\" | \"b\" root", "a|ba|bba", "b|ab|"},
        {"root ::= (item \",\")* item\nitem ::= [a-z]+ # a comment", "x|x,y|ab,c,d", ",|x,|X"},
        {"root ::= root \"+\" num | num\nnum ::= [0-9]{1,3}", "1|12+3|1+2+333", "+1|1+|1234"},
        {"root ::= \"(\" root? \")\"", "()|(())|((()))", "(|(()|)("},
        {"root ::= . [^x] \"\\x41\\n\"?", "ab|abA\n|xé", "ax|a|abA"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llm_grammar *g = grammar_of(llm_grammar_from_gbnf, cases[i].grammar);
        for (int valid = 0; valid < 2; valid++)
            for (const char *at = valid ? cases[i].valid : cases[i].invalid, *end; at; at = *end ? end + 1 : NULL) {
                end = at + strcspn(at, "|");
                if ((llm_grammar_check(g, at, (size_t)(end - at)) == 1) != valid)
                    fail_msg("%s: '%.*s'", cases[i].grammar, (int)(end - at), at);
            }
        llm_grammar_free(g);
    }
}

/* ---- Answers ---- */

typedef struct answer {
    char text[4096];
    size_t n;
} answer;

static bool keep_text(void *user, const char *text, size_t n) {
    answer *a = (answer *)user;
    assert_true(a->n + n < sizeof a->text);
    memcpy(a->text + a->n, text, n + 1);
    a->n += n;
    return true;
}

static const char *const REGEX = "[a-e]{3,40}(-[0-9]{2}é)*!";
static const char *const SCHEMA = "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\",\"maxLength\":12}"
                                  ",\"age\":{\"type\":\"integer\","
                                  "\"minimum\":0,\"maximum\":130},\"tags\":{\"type\":\"array\",\"items\":{\"enum\":["
                                  "\"red\",\"blue\"]},\"maxItems\":3}},"
                                  "\"required\":[\"name\",\"age\",\"tags\"],\"additionalProperties\":false}";

/* An answer at a temperature at which the random model says anything. */
static llm_stats ask(llm_context *ctx, llm_grammar *g, uint64_t seed, llm_draft *draft, int max_tokens, answer *a) {
    llm_sampler sampler = {.temperature = 4, .seed = seed};
    llm_stats stats;
    llm_error err;
    llm_generate_desc desc = {.prompt = "abc",
                              .max_tokens = max_tokens,
                              .sampler = &sampler,
                              .grammar = g,
                              .draft = draft,
                              .draft_keeps_text = true,
                              .on_text = keep_text,
                              .user = a};
    memset(a, 0, sizeof *a);
    if (llm_generate(ctx, &desc, &stats, &err)) fail_msg("%s", err.message);
    return stats;
}

static void test_answers(void **state) {
    llm_context_desc desc = {.n_threads = 1, .n_logits = LLM_DRAFT_MAX + 1};
    llm_context *ctx = create_context(model, &desc);
    make_grammar *const makes[2] = {llm_grammar_from_regex, llm_grammar_from_json_schema};
    int n_whole = 0;
    (void)state;
    for (int kind = 0; kind < 2; kind++) {
        llm_grammar *g = grammar_of(makes[kind], kind ? SCHEMA : REGEX);
        for (uint64_t seed = 0; seed < 20; seed++) {
            answer plain, drafted;
            llm_draft draft = llm_draft_lookup();
            llm_stats stats = ask(ctx, g, seed, NULL, 300, &plain);
            bool whole = stats.stop == LLM_STOP_END;
            assert_int_equal(llm_grammar_check(g, plain.text, plain.n), whole);
            n_whole += whole;
            json_t *value = kind && whole ? json_loadb(plain.text, plain.n, 0, NULL) : NULL;
            if (kind && whole) assert_non_null(value);
            json_decref(value);
            ask(ctx, g, seed, &draft, 300, &drafted);
            assert_string_equal(plain.text, drafted.text);
            llm_draft_free(&draft);
            assert_int_equal(ask(ctx, g, seed, NULL, 2, &plain).stop, LLM_STOP_LENGTH);
            assert_int_equal(llm_grammar_check(g, plain.text, plain.n), 0);
        }
        llm_grammar_free(g);
    }
    assert_true(n_whole > 20);
    llm_context_free(ctx);
}

/* Streams with grammars beside others without; a grammar serves one of them. */
static void test_streams(void **state) {
    enum { N = 6 };
    llm_context_desc desc = {.n_threads = 2, .n_seq = N, .n_logits = N};
    llm_context *ctx = create_context(model, &desc), *alone = create_context(model, NULL);
    llm_stream *streams[N];
    llm_grammar *grammars[N] = {NULL};
    llm_sampler samplers[N];
    static answer answers[N], expected;
    llm_error err;
    int n_running = 1;
    (void)state;
    for (int i = 0; i < N; i++) {
        if (i % 3)
            grammars[i] = grammar_of(i % 3 == 1 ? llm_grammar_from_regex : llm_grammar_from_json_schema,
                                     i % 3 == 1 ? REGEX : SCHEMA);
        samplers[i] = (llm_sampler){.temperature = 4, .seed = (uint64_t)i};
        llm_generate_desc text = {.prompt = "abc",
                                  .seq = LLM_SEQ_ANY,
                                  .max_tokens = 60,
                                  .sampler = &samplers[i],
                                  .grammar = grammars[i],
                                  .on_text = keep_text,
                                  .user = &answers[i]};
        if (llm_stream_begin(&streams[i], ctx, &text, &err)) fail_msg("%s", err.message);
        if (!grammars[i]) continue;
        llm_stream *second;
        text.sampler = NULL;
        assert_int_equal(llm_stream_begin(&second, ctx, &text, &err), LLM_ERROR_ARGUMENT);
        assert_non_null(strstr(err.message, "grammar"));
    }
    while (n_running)
        if (llm_step(ctx, 0, &n_running, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < N; i++) {
        if (llm_stream_result(streams[i], NULL, &err)) fail_msg("%s", err.message);
        llm_stream_free(streams[i]);
        ask(alone, grammars[i], (uint64_t)i, NULL, 60, &expected);
        assert_string_equal(answers[i].text, expected.text);
        llm_grammar_free(grammars[i]);
    }
    llm_context_free(alone);
    llm_context_free(ctx);
}

/* ---- Masks ---- */

/* The mask of a whole vocabulary is what llm_grammar_check says of the text with each token behind it. */
static void check_masks(const llm_tokenizer *tokenizer, make_grammar *make, const char *grammar, const char *text) {
    enum { ROOM = 256 };
    int n_vocab = llm_tokenizer_n_vocab(tokenizer), n_allowed = 0;
    llm_token ids[ROOM];
    char longer[1024];
    llm_grammar *g = NULL;
    llm_error err;
    float *logits = (float *)malloc((size_t)n_vocab * sizeof *logits);
    assert_non_null(logits);
    if (make(&g, tokenizer, grammar, NULL, &err)) fail_msg("%.80s: %s", grammar, err.message);
    int n = (int)llm_encode(tokenizer, text, strlen(text), 0, ids, ROOM, &err);
    assert_in_range(n, 1, ROOM);
    llm_grammar_begin(g, 0);
    size_t length = 0;
    for (int i = 0; i <= n; i++) {
        bool whole = llm_grammar_check(g, longer, length) == 1;
        for (int id = 0; id < n_vocab; id++) logits[id] = (float)id;
        llm_grammar_mask(g, ids, i, logits, n_vocab);
        for (int id = 0; id < n_vocab; id++) {
            size_t n_bytes;
            const char *bytes = llm_token_bytes(tokenizer, id, &n_bytes);
            bool allowed = logits[id] == (float)id, expected = whole;
            if (!llm_token_is_end(tokenizer, id)) {
                assert_true(length + n_bytes < sizeof longer);
                memcpy(longer + length, bytes, n_bytes);
                expected = n_bytes && !llm_token_is_special(tokenizer, id) &&
                           llm_grammar_check(g, longer, length + n_bytes) >= 0;
            }
            if (allowed != expected || (!allowed && logits[id] != -INFINITY))
                fail_msg("%.60s: after '%.*s' token %d (%.*s) should be %s", grammar, (int)length, longer, id,
                         (int)n_bytes, bytes, expected ? "allowed" : "forbidden");
            n_allowed += allowed;
        }
        if (i == n) break;
        size_t n_bytes;
        const char *bytes = llm_token_bytes(tokenizer, ids[i], &n_bytes);
        memcpy(longer + length, bytes, n_bytes);
        length += n_bytes;
    }
    assert_true(n_allowed > 0);
    free(logits);
    llm_grammar_free(g);
}

static void test_masks(void **state) {
    static const struct {
        make_grammar *make;
        const char *grammar, *text;
    } cases[] = {
        {llm_grammar_from_json_schema, "{}", "{\"a b\": [1.5e3, \"\\u00e9, 日本\"], \"c\": null}"},
        {llm_grammar_from_json_schema,
         "{\"type\":\"object\",\"properties\":{\"title\":{\"type\":\"string\",\"maxLength\":9},\"kind\":"
         "{\"type\":\"string\",\"pattern\":\"^[\\\\w.]{2,5}-?$\"}},\"additionalProperties\":{\"type\":\"string\"}}",
         "{\"title\": \"nine é it\", \"kind\": \"ab.\", \"title2\": \"a long one\"}"},
        {llm_grammar_from_regex, "[^x]{0,25}(x|é+|[ -~]{3})", "a text é of"},
        {llm_grammar_from_regex, "[A-Z].{0,3}|[a-z].{0,12}|-.{0,1}", "hello there"},
        {llm_grammar_from_regex, "([a-z]+ ?)*\\.", "lower case words."},
        {llm_grammar_from_gbnf, "root ::= root \" \" word | word\nword ::= [A-Z]? [a-zà-ü]*", "An à word"},
    };
    llm_tokenizer *tokenizer = NULL;
    llm_error err;
    (void)state;
    if (llm_tokenizer_load(&tokenizer, model_path(), NULL, &err)) fail_msg("%s", err.message);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_masks(tokenizer, cases[i].make, cases[i].grammar, cases[i].text);
    llm_tokenizer_free(tokenizer);
}

/* ---- A mask of the host ---- */

/* Allows the token that follows the last one in the alphabet, and nothing else. */
static void next_letter(void *user, const llm_token *tokens, int n, float *logits, int n_vocab) {
    llm_token next = tokens[n - 1] == 'z' ? 'a' : tokens[n - 1] + 1;
    ++*(int *)user;
    for (int i = 0; i < n_vocab; i++)
        if (i != next) logits[i] = -INFINITY;
}

static void test_mask(void **state) {
    llm_context_desc desc = {.n_threads = 1, .n_logits = LLM_DRAFT_MAX + 1};
    llm_context *ctx = create_context(model, &desc);
    llm_error err;
    (void)state;
    for (int drafted = 0; drafted < 2; drafted++) {
        answer a = {{0}, 0};
        int n_calls = 0;
        llm_draft draft = llm_draft_lookup();
        llm_sampler sampler = {.temperature = 1, .mask = next_letter, .mask_user = &n_calls};
        llm_generate_desc text = {.prompt = "x",
                                  .max_tokens = 30,
                                  .sampler = &sampler,
                                  .draft = drafted ? &draft : NULL,
                                  .on_text = keep_text,
                                  .user = &a};
        if (llm_generate(ctx, &text, NULL, &err)) fail_msg("%s", err.message);
        assert_string_equal(a.text, "yzabcdefghijklmnopqrstuvwxyzab");
        assert_true(n_calls >= 30);
        llm_draft_free(&draft);
    }
    llm_context_free(ctx);
}

/* ---- Bad grammars ---- */

static void assert_refused(make_grammar *make, const char *text, llm_status status, const char *word) {
    llm_grammar *g = NULL;
    llm_error err;
    llm_status got = make(&g, llm_model_tokenizer(model), text, NULL, &err);
    if (got != status || !strstr(err.message, word)) fail_msg("%.60s: %d, %s", text, (int)got, got ? err.message : "");
    assert_null(g);
}

static void test_bad(void **state) {
    static char deep[200001];
    (void)state;
    assert_refused(llm_grammar_from_regex, "(a", LLM_ERROR_FORMAT, "character");
    assert_refused(llm_grammar_from_regex, "a{3,2}", LLM_ERROR_FORMAT, "character");
    assert_refused(llm_grammar_from_regex, "(?=a)b", LLM_ERROR_FORMAT, "supported");
    assert_refused(llm_grammar_from_regex, "(a)\\1", LLM_ERROR_FORMAT, "supported");
    assert_refused(llm_grammar_from_regex, "[]", LLM_ERROR_ARGUMENT, "");
    assert_refused(llm_grammar_from_gbnf, "root ::= missing", LLM_ERROR_FORMAT, "missing");
    assert_refused(llm_grammar_from_gbnf, "x ::= \"a\"", LLM_ERROR_FORMAT, "root");
    assert_refused(llm_grammar_from_gbnf, "root ::= \"a", LLM_ERROR_FORMAT, "");
    assert_refused(llm_grammar_from_gbnf, "root ::= root", LLM_ERROR_ARGUMENT, "");
    assert_refused(llm_grammar_from_json_schema, "{\"type\":", LLM_ERROR_FORMAT, "");
    assert_refused(llm_grammar_from_json_schema, "{\"type\":\"colour\"}", LLM_ERROR_UNSUPPORTED, "type");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{}}", LLM_ERROR_UNSUPPORTED, "not");
    assert_refused(llm_grammar_from_json_schema, "{\"$ref\":\"http://x/y\"}", LLM_ERROR_UNSUPPORTED, "");
    assert_refused(llm_grammar_from_json_schema, "{\"enum\":[]}", LLM_ERROR_ARGUMENT, "");
    memset(deep, '(', sizeof deep - 1);
    assert_refused(llm_grammar_from_regex, deep, LLM_ERROR_FORMAT, "deeper");
    memset(deep, '[', sizeof deep - 1);
    assert_refused(llm_grammar_from_json_schema, deep, LLM_ERROR_FORMAT, "");
}

typedef struct starved {
    make_grammar *make;
    const char *text;
    llm_host host;
} starved;

static llm_status make_starved(void *user, llm_error *err) {
    starved *job = (starved *)user;
    llm_grammar *g = NULL;
    llm_status status = job->make(&g, llm_model_tokenizer(model), job->text, &job->host, err);
    if (!status && llm_grammar_check(g, "abc", 3) < 0) { /* its states need memory, too */
        status = err->code = LLM_ERROR_MEMORY;
        snprintf(err->message, sizeof err->message, "the states ran out of memory");
    }
    llm_grammar_free(g);
    return status;
}

/* Memory may run out at any allocation. */
static void test_memory(void **state) {
    heap h = {0};
    starved job = {llm_grammar_from_regex, "[a-e]{3,40}(-[0-9]{2})*", heap_host(&h)};
    (void)state;
    starve(&h, make_starved, &job, 1, "a grammar");
    assert_all_returned(&h);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),  cmocka_unit_test(test_gbnf),   cmocka_unit_test(test_answers),
        cmocka_unit_test(test_streams), cmocka_unit_test(test_masks),  cmocka_unit_test(test_mask),
        cmocka_unit_test(test_bad),     cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
