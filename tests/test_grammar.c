/* Grammars: regular expressions and JSON Schemas allow the same texts as Python's re and jsonschema (grammar.py); GBNF;
   answers with a grammar are complete and valid, also in streams and with drafts; forced tokens need few passes and do
   not change the answer; masks of a whole vocabulary; a host's mask; bad grammars are refused with a message.
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
            for (size_t k = 0; k < length && valid; k++) /* each prefix of a valid answer must be allowed */
                if (llm_grammar_check(g, bytes, k) < 0) fail_msg("%s: the first %d bytes of '%s'", text, (int)k, bytes);
        }
        llm_grammar_free(g);
    }
    assert_true(n > 2000);
}

static void test_gbnf(void **state) {
    static const struct {
        const char *grammar, *valid, *invalid; /* answers separated by | */
    } cases[] = {
        {"root ::= \"a\" | \"b\" root", "a|ba|bba", "b|ab|"},
        {"root ::= (item \",\")* item\nitem ::= [a-z]+ # a comment", "x|x,y|ab,c,d", ",|x,|X"},
        {"root ::= root \"+\" num | num\nnum ::= [0-9]{1,3}", "1|12+3|1+2+333", "+1|1+|1234"},
        {"root ::= \"(\" root? \")\"", "()|(())|((()))", "(|(()|)("},
        {"root ::= . [^x] \"\\x41\\n\"?", "ab|abA\n|xé", "ax|a|abA"},
        {"root ::= [a\\-c]{ 2 , 3 } (\"\\-x\"{ # twice\n2})?", "ac|a-c|-a-x-x", "b|a|ab|acac|ac-x"},
        {"root ::= \"a\"{2}+ \"b\" * ?", "aa|aaaa|aabb", "a|aaab|b"},
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

/* Generates an answer at a temperature at which the random model draws any token. */
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

/* Streams with and without grammars run together. A grammar can only be used by one stream at a time. */
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

/* ---- Forced tokens ---- */

static const char *const FORCED =
    "{\"type\":\"object\",\"properties\":{\"first_name\":{\"type\":\"string\",\"maxLength\":3},\"is_a_long_name\":"
    "{\"type\":\"boolean\"},\"kind\":{\"enum\":[\"one of the kinds that there are\"]}},\"required\":[\"first_name\","
    "\"is_a_long_name\",\"kind\"],\"additionalProperties\":false}";

enum { MOST_TOKENS = 400 };

typedef struct told {
    llm_token ids[MOST_TOKENS];
    char text[2 * MOST_TOKENS];
    float chosen[MOST_TOKENS];
    llm_log_prob top[MOST_TOKENS][2];
    int n, n_log_probs, refuse_at, cancel_at; /* 0: never refused, never cancelled */
    size_t n_text;
    uint64_t n_drawn;
} told;

static bool tell_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    told *t = (told *)user;
    (void)bytes;
    (void)n_bytes;
    assert_true(t->n < MOST_TOKENS);
    t->ids[t->n++] = token;
    return t->n != t->refuse_at;
}

static bool tell_text(void *user, const char *text, size_t n) {
    told *t = (told *)user;
    assert_true(t->n_text + n < sizeof t->text);
    memcpy(t->text + t->n_text, text, n + 1);
    t->n_text += n;
    return true;
}

static void tell_log_probs(void *user, llm_log_prob chosen, const llm_log_prob *top, int n_top) {
    told *t = (told *)user;
    assert_int_equal(n_top, 2);
    assert_int_equal(t->n_log_probs, t->n);
    t->chosen[t->n_log_probs] = chosen.log_prob;
    memcpy(t->top[t->n_log_probs++], top, 2 * sizeof *top);
}

static bool told_enough(void *user) {
    const told *t = (const told *)user;
    return t->cancel_at && t->n >= t->cancel_at;
}

/* Generates the expected answer, with one pass per token. */
static void tell_one_by_one(llm_grammar *g, const char *prompt, llm_sampler sampler, told *t) {
    llm_context *ctx = create_context(model, NULL);
    const llm_tokenizer *tokenizer = llm_model_tokenizer(model);
    llm_text_stream stream = {.started = true};
    llm_token ids[64], token;
    llm_error err;
    int n = (int)llm_encode(tokenizer, prompt, strlen(prompt), LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL, ids, 64, &err);
    assert_in_range(n, 1, 64);
    llm_batch batch = {.n_tokens = n, .tokens = ids};
    memset(t, 0, sizeof *t);
    llm_grammar_begin(g, n);
    sampler.mask = llm_grammar_mask;
    sampler.mask_user = g;
    sampler.answer_begin = n;
    for (bool goes_on = true; goes_on;) {
        if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
        token = llm_sample(ctx, batch.n_tokens - 1, 0, &sampler);
        assert_true(token >= 0 && t->n < MOST_TOKENS);
        llm_log_probs(ctx, batch.n_tokens - 1, token, &t->chosen[t->n], t->top[t->n], 2);
        t->ids[t->n++] = token;
        t->n_text += llm_stream_token(tokenizer, &stream, token, t->text + t->n_text, sizeof t->text - t->n_text);
        /* With this grammar, nothing can follow a complete answer. */
        goes_on = llm_grammar_check(g, t->text, t->n_text) != 1;
        batch.n_tokens = 1;
        batch.tokens = &token;
    }
    t->n_drawn = sampler.n_drawn;
    llm_context_free(ctx);
}

/* The answer must be the first n tokens of `all`, and the sequence must hold all of them except the last. */
static void assert_told(const told *t, const told *all, int n, const llm_context *ctx, const llm_stats *stats) {
    assert_int_equal(t->n, n);
    assert_int_equal(stats->n_generated, n);
    assert_memory_equal(t->ids, all->ids, (size_t)n * sizeof *t->ids);
    /* An answer that ends inside a character ends with U+FFFD. */
    size_t n_whole = t->n_text;
    while (n_whole >= 3 && !memcmp(t->text + n_whole - 3, "\xEF\xBF\xBD", 3)) n_whole -= 3;
    if (strncmp(t->text, all->text, n_whole)) fail_msg("'%s' is not '%s'", t->text, all->text);
    assert_int_equal(llm_seq_length(ctx, stats->seq), stats->n_prompt + n - 1);
    assert_memory_equal(llm_seq_tokens(ctx, stats->seq) + stats->n_prompt, all->ids, (size_t)(n - 1) * sizeof *t->ids);
    if (!t->n_log_probs) return;
    assert_memory_equal(t->chosen, all->chosen, (size_t)n * sizeof *t->chosen);
    assert_memory_equal(t->top, all->top, (size_t)n * sizeof *t->top);
}

static llm_stats tell(llm_context *ctx, llm_generate_desc *desc, told *t, int refuse_at, int cancel_at) {
    llm_stats stats;
    llm_error err;
    memset(t, 0, sizeof *t);
    t->refuse_at = refuse_at;
    t->cancel_at = cancel_at;
    desc->user = t;
    desc->sampler->n_drawn = 0;
    if (llm_generate(ctx, desc, &stats, &err)) fail_msg("%s", err.message);
    return stats;
}

/* Ends the answer in every possible way, after different numbers of tokens. */
static void end_everywhere(llm_context *ctx, const llm_generate_desc *desc, const told *all) {
    static told t;
    for (int k = 2; k < all->n; k += 3) {
        llm_generate_desc d = *desc;
        const char *stop = t.text;
        d.max_tokens = k;
        llm_stats stats = tell(ctx, &d, &t, 0, 0);
        assert_int_equal(stats.stop, LLM_STOP_LENGTH);
        assert_told(&t, all, k, ctx, &stats);
        if (d.sampler->temperature > 0) assert_int_equal(d.sampler->n_drawn, k);
        d = *desc;
        stats = tell(ctx, &d, &t, k, 0);
        assert_int_equal(stats.stop, LLM_STOP_CALLBACK);
        assert_told(&t, all, k, ctx, &stats);
        d.cancel = told_enough;
        stats = tell(ctx, &d, &t, 0, k);
        assert_true(stats.stop == LLM_STOP_CALLBACK || (d.draft && stats.stop == LLM_STOP_END));
        /* With a draft, all right guesses of a pass are reported before `cancel` is called again. */
        if (d.draft) assert_in_range(t.n, k, k + LLM_DRAFT_MAX);
        assert_told(&t, all, d.draft ? t.n : k, ctx, &stats);
        d = *desc;
        d.stop_tokens = &all->ids[k];
        d.n_stop_tokens = 1;
        stats = tell(ctx, &d, &t, 0, 0);
        assert_int_equal(stats.stop, LLM_STOP_TOKEN);
        assert_int_equal(t.ids[t.n - 1] == all->ids[k], 0);
        assert_int_equal(llm_seq_length(ctx, 0), stats.n_prompt + t.n);
        assert_memory_equal(t.ids, all->ids, (size_t)t.n * sizeof *t.ids);
        assert_int_equal(all->ids[t.n], all->ids[k]);
        stop = "of the kinds";
        d = *desc;
        d.stop_strings = &stop;
        d.n_stop_strings = 1;
        stats = tell(ctx, &d, &t, 0, 0);
        assert_int_equal(stats.stop, LLM_STOP_STRING);
        assert_int_equal(t.n_text, strstr(all->text, stop) - all->text);
        size_t shown = strlen(stop) + t.n_text, n_bytes;
        int n = 0;
        for (size_t end = 0; end < shown; end += n_bytes)
            llm_token_bytes(llm_model_tokenizer(model), all->ids[n++], &n_bytes);
        assert_told(&t, all, n, ctx, &stats);
    }
}

static void test_forced(void **state) {
    llm_grammar *g = grammar_of(llm_grammar_from_json_schema, FORCED);
    static told all, t;
    (void)state;
    for (int kind = 0; kind < 12; kind++) {
        bool log_probs = kind & 1, drafted = kind >> 1 & 1;
        int n_logits = kind < 4 ? LLM_DRAFT_MAX + 1 : kind < 8 ? 5 : 2, n_batch = kind < 4 ? 0 : kind < 8 ? 8 : 3;
        llm_context_desc desc = {.n_threads = 1, .n_logits = log_probs || drafted ? n_logits : 1, .n_batch = n_batch};
        llm_context *ctx = create_context(model, &desc);
        for (uint64_t seed = 0; seed < 6; seed++) {
            llm_draft draft = llm_draft_lookup();
            llm_sampler sampler = {.temperature = seed % 3 ? 3 : 0, .seed = seed, .presence_penalty = 0.5f};
            llm_generate_desc text = {.prompt = "abc",
                                      .sampler = &sampler,
                                      .grammar = g,
                                      .draft = drafted ? &draft : NULL,
                                      .draft_keeps_text = true,
                                      .on_text = tell_text,
                                      .on_token = tell_token,
                                      .on_log_probs = log_probs ? tell_log_probs : NULL,
                                      .n_top_log_probs = 2};
            tell_one_by_one(g, text.prompt, sampler, &all);
            llm_stats stats = tell(ctx, &text, &t, 0, 0);
            assert_int_equal(stats.stop, LLM_STOP_END);
            assert_told(&t, &all, all.n, ctx, &stats);
            assert_string_equal(t.text, all.text);
            assert_int_equal(sampler.n_drawn, all.n_drawn);
            assert_true(stats.n_decode_passes < stats.n_generated * 3 / 4);
            assert_true(stats.draft.n_accepted >= stats.n_generated / 4);
            if (!drafted) {
                assert_int_equal(stats.draft.n_accepted, stats.draft.n_proposed);
                /* the last token of the answer may be a guess */
                assert_in_range(stats.n_decode_passes + stats.draft.n_accepted, stats.n_generated - 1,
                                stats.n_generated);
            }
            if (kind == 0) assert_true(stats.n_decode_passes < stats.n_generated / 2);
            if (seed < 2) end_everywhere(ctx, &text, &all);
            llm_draft_free(&draft);
        }
        llm_context_free(ctx);
    }
    llm_grammar_free(g);
}

/* XTC and mirostat have a state that each token changes, also a forced one. */
static void test_forced_states(void **state) {
    llm_grammar *g = grammar_of(llm_grammar_from_json_schema, FORCED);
    static told all, t;
    (void)state;
    for (int n_logits = 1; n_logits <= LLM_DRAFT_MAX + 1; n_logits += LLM_DRAFT_MAX) {
        llm_context_desc desc = {.n_threads = 1, .n_logits = n_logits};
        llm_context *ctx = create_context(model, &desc);
        for (uint64_t seed = 0; seed < 6; seed++) {
            llm_sampler sampler = {.temperature = 3, .seed = seed};
            llm_generate_desc text = {
                .prompt = "abc", .sampler = &sampler, .grammar = g, .on_text = tell_text, .on_token = tell_token};
            if (seed % 2) sampler.mirostat_tau = 1;
            else sampler.xtc_probability = 0.5f, sampler.xtc_threshold = 0.01f;
            tell_one_by_one(g, text.prompt, sampler, &all);
            llm_stats stats = tell(ctx, &text, &t, 0, 0);
            assert_told(&t, &all, all.n, ctx, &stats);
            assert_string_equal(t.text, all.text);
            assert_int_equal(sampler.n_drawn, all.n_drawn);
        }
        llm_context_free(ctx);
    }
    llm_grammar_free(g);
}

/* Forced tokens stop at a full sequence and a full cache, and do not hide an error in the biases. */
static void test_forced_limits(void **state) {
    llm_grammar *g = grammar_of(llm_grammar_from_json_schema, FORCED);
    llm_sampler sampler = {.temperature = 3, .seed = 5};
    static told all, t;
    llm_error err;
    (void)state;
    tell_one_by_one(g, "abc", sampler, &all);
    for (int n_ctx = 8; n_ctx < 100; n_ctx += 5) {
        llm_context_desc desc = {.n_threads = 1, .n_ctx = n_ctx};
        llm_context *ctx = create_context(model, &desc);
        llm_generate_desc text = {.prompt = "abc", .sampler = &sampler, .grammar = g, .on_token = tell_token};
        llm_stats stats = tell(ctx, &text, &t, 0, 0);
        int room = n_ctx - stats.n_prompt + 1;
        assert_int_equal(stats.stop, room < all.n ? LLM_STOP_CONTEXT : LLM_STOP_END);
        assert_told(&t, &all, room < all.n ? room : all.n, ctx, &stats);
        llm_context_free(ctx);
    }
    llm_context_desc desc = {.n_threads = 1, .n_ctx = 512, .n_cache = LLM_CACHE_BLOCK};
    llm_context *ctx = create_context(model, &desc);
    llm_generate_desc text = {.prompt = "abc", .sampler = &sampler, .grammar = g, .on_token = tell_token};
    llm_stats stats = tell(ctx, &text, &t, 0, 0);
    assert_int_equal(stats.stop, LLM_STOP_CACHE);
    assert_told(&t, &all, LLM_CACHE_BLOCK - stats.n_prompt + 1, ctx, &stats);
    llm_context_free(ctx);
    ctx = create_context(model, NULL);
    llm_logit_bias bias = {'k', -INFINITY}; /* forbids the "k" of "kind" */
    sampler.biases = &bias;
    sampler.n_biases = 1;
    sampler.n_drawn = 0;
    memset(&t, 0, sizeof t);
    text.user = &t;
    assert_int_equal(llm_generate(ctx, &text, &stats, &err), LLM_ERROR_ARGUMENT);
    assert_non_null(strstr(err.message, "forbidden"));
    llm_context_free(ctx);
    llm_grammar_free(g);
}

/* Streams with forced tokens run together with streams that read long prompts, in passes of few tokens. */
static void test_forced_streams(void **state) {
    enum { N = 4 };
    static told all[N], t[N];
    static const char *const prompts[N] = {"abc", "a longer prompt, of which only a part is read", "x", "abcd"};
    (void)state;
    for (int n_tokens = 1; n_tokens < 40; n_tokens = 2 * n_tokens + 1) {
        llm_context_desc desc = {.n_threads = 2, .n_seq = N, .n_logits = n_tokens % 4 ? N : 2, .n_batch = 32};
        llm_context *ctx = create_context(model, &desc);
        llm_stream *streams[N];
        llm_grammar *grammars[N];
        llm_sampler samplers[N];
        llm_error err;
        int n_running = 1, n_steps = 0, n_all = 0;
        for (int i = 0; i < N; i++) {
            grammars[i] = grammar_of(llm_grammar_from_json_schema, FORCED);
            samplers[i] = (llm_sampler){.temperature = 3, .seed = (uint64_t)i};
            tell_one_by_one(grammars[i], prompts[i], samplers[i], &all[i]);
            n_all += all[i].n;
            memset(&t[i], 0, sizeof t[i]);
            llm_generate_desc text = {.prompt = prompts[i],
                                      .seq = LLM_SEQ_ANY,
                                      .sampler = &samplers[i],
                                      .grammar = grammars[i],
                                      .on_text = tell_text,
                                      .on_token = tell_token,
                                      .on_log_probs = i == 2 ? tell_log_probs : NULL,
                                      .n_top_log_probs = 2,
                                      .user = &t[i]};
            if (llm_stream_begin(&streams[i], ctx, &text, &err)) fail_msg("%s", err.message);
        }
        for (; n_running; n_steps++)
            if (llm_step(ctx, n_tokens, &n_running, &err)) fail_msg("%s", err.message);
        for (int i = 0; i < N; i++) {
            llm_stats stats;
            if (llm_stream_result(streams[i], &stats, &err)) fail_msg("%s", err.message);
            assert_int_equal(stats.stop, LLM_STOP_END);
            assert_told(&t[i], &all[i], all[i].n, ctx, &stats);
            assert_int_equal(samplers[i].n_drawn, all[i].n_drawn);
            llm_stream_free(streams[i]);
            llm_grammar_free(grammars[i]);
        }
        if (n_tokens >= 15) assert_true(n_steps < n_all / N);
        llm_context_free(ctx);
    }
}

/* ---- Masks ---- */

/* The mask must allow exactly the tokens with which llm_grammar_check allows the longer text. */
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
        {llm_grammar_from_regex, "[\\w.]+@[\\w.]+\\.[a-z]{2,8}|[a-fé日]*\\d", "ab.c_de@fed.cab.com"},
        {llm_grammar_from_regex, "[^x]{0,25}(x|é+|[ -~]{3})", "a text é of"},
        {llm_grammar_from_regex, "[A-Z].{0,3}|[a-z].{0,12}|-.{0,1}", "hello there"},
        {llm_grammar_from_regex, "([a-z]+ ?)*\\.", "lower case words."},
        {llm_grammar_from_gbnf, "root ::= root \" \" word | word\nword ::= [A-Z]? [a-zà-ü]*", "An à word"},
        /* Plain characters lead to many states here, and all or nearly all of them fit. */
        {llm_grammar_from_json_schema,
         "{\"type\":\"object\",\"properties\":{\"hash\":{\"type\":\"string\",\"pattern\":\"[0-9a-f]{8}-|日.\"}},"
         "\"patternProperties\":{\"[0-9]{3}\":{\"type\":\"string\",\"pattern\":\"^[0-9a-zA-Z_-]{1,12}$\"}}}",
         "{\"hash\": \"é01234567-0\", \"hasp\": 1, \"a123\": \"Some_words-\"}"},
        {llm_grammar_from_regex, "[^x]*é[^x]{2}|[^x]*日|[^x]{4}x", "a é日x"},
        {llm_grammar_from_regex, "([ -~]{0,9}|[^\\x00-\\x1F]{0,6}|[^ߐ-ߟ]{3,5})-", "two é日 -"},
        {llm_grammar_from_regex, "([^!]{3}){2,4}!|([^?]|\\?{2}){5,}\\?", "in threes?!"},
        {llm_grammar_from_regex, "[a-z_]{3,7}[A-Z]{0,3}|[a-z0-9]*\\.|[a-zA-Z]{5}(ab|cd)*", "namesABC"},
        {llm_grammar_from_regex, "([^\\uD7FF]|(a|b)*c){0,15}|[^𐀀]{0,20}\\.", "abc𐀀d日."},
        {llm_grammar_from_gbnf,
         "root ::= any{0,6} end | \"<\" any{2,8} \">\" | name\nany ::= other\nother ::= [^\\x00]\n"
         "end ::= any{3} | [.]\nname ::= [a-z] name | [0-9] [a-z0-9]{0,9} tail | [^z] [^z] tail\n"
         "tail ::= [^a]{0,4} | tail \" \"",
         "ab12 é日 "},
    };
    llm_tokenizer *tokenizer = NULL;
    llm_error err;
    (void)state;
    if (llm_tokenizer_load(&tokenizer, model_path(), NULL, &err)) fail_msg("%s", err.message);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_masks(tokenizer, cases[i].make, cases[i].grammar, cases[i].text);
    llm_tokenizer_free(tokenizer);
}

/* ---- A host's mask ---- */

/* Only allows the letter that follows the last one in the alphabet. */
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
    assert_refused(llm_grammar_from_gbnf, "root ::= \"a\"* + ? {1} * + ? {1} * + ?", LLM_ERROR_FORMAT,
                   "more than 10 repetitions");
    assert_refused(llm_grammar_from_json_schema, "{\"type\":", LLM_ERROR_FORMAT, "");
    assert_refused(llm_grammar_from_json_schema, "{\"type\":\"colour\"}", LLM_ERROR_UNSUPPORTED, "type");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{}}", LLM_ERROR_ARGUMENT, "");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{\"$ref\":\"#\"}}", LLM_ERROR_UNSUPPORTED, "itself");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{\"multipleOf\":2}}", LLM_ERROR_UNSUPPORTED, "multipleOf");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{\"uniqueItems\":true}}", LLM_ERROR_UNSUPPORTED,
                   "uniqueItems");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{\"const\":[1]}}", LLM_ERROR_UNSUPPORTED, "const");
    assert_refused(llm_grammar_from_json_schema, "{\"uniqueItems\":true}", LLM_ERROR_UNSUPPORTED, "uniqueItems");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"uniqueItems\":true,\"items\":{\"enum\":[1,2,3,4,5,6,7,8,9,10,11]}}", LLM_ERROR_UNSUPPORTED,
                   "uniqueItems");
    assert_refused(llm_grammar_from_json_schema, "{\"contains\":{\"const\":1},\"minContains\":5000}",
                   LLM_ERROR_UNSUPPORTED, "contains");
    assert_refused(llm_grammar_from_json_schema, "{\"propertyNames\":{\"oneOf\":[{\"maxLength\":1}]}}",
                   LLM_ERROR_UNSUPPORTED, "propertyNames");
    assert_refused(llm_grammar_from_json_schema, "{\"pattern\":\"^((a{100}){100}){100}$\",\"maxLength\":9}",
                   LLM_ERROR_UNSUPPORTED, "pattern");
    assert_refused(llm_grammar_from_json_schema, "{\"pattern\":\"^(a|b)*a(a|b){15}$\",\"not\":{\"pattern\":\"b$\"}}",
                   LLM_ERROR_UNSUPPORTED, "pattern");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{\"enum\":5}}", LLM_ERROR_FORMAT, "enum");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{\"required\":[5]}}", LLM_ERROR_UNSUPPORTED, "required");
    assert_refused(llm_grammar_from_json_schema, "{\"contains\":-1}", LLM_ERROR_FORMAT, "contains");
    assert_refused(llm_grammar_from_json_schema, "{\"maxLength\":null}", LLM_ERROR_FORMAT, "maxLength");
    assert_refused(llm_grammar_from_json_schema, "{\"not\":{\"unevaluatedItems\":false}}", LLM_ERROR_UNSUPPORTED,
                   "unevaluatedItems");
    assert_refused(
        llm_grammar_from_json_schema,
        "{\"unevaluatedProperties\":false,\"anyOf\":[{\"properties\":{\"a\":true}},{\"properties\":{\"b\":true}},"
        "{\"properties\":{\"c\":true}},{\"properties\":{\"d\":true}},{\"properties\":{\"e\":true}},"
        "{\"properties\":{\"f\":true}},{\"properties\":{\"g\":true}}]}",
        LLM_ERROR_UNSUPPORTED, "unevaluatedProperties");
    assert_refused(llm_grammar_from_json_schema, "{\"$ref\":\"http://x/y\"}", LLM_ERROR_UNSUPPORTED, "leads out");
    assert_refused(llm_grammar_from_json_schema, "{\"$ref\":\"#name\"}", LLM_ERROR_UNSUPPORTED, "nothing");
    assert_refused(llm_grammar_from_json_schema, "{\"$id\":\"http://x/#a\"}", LLM_ERROR_UNSUPPORTED, "fragment");
    assert_refused(llm_grammar_from_json_schema, "{\"$id\":5}", LLM_ERROR_FORMAT, "$id");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"$ref\":\"a\",\"$defs\":{\"x\":{\"$id\":\"a\"},\"y\":{\"$id\":\"a\",\"type\":\"null\"}}}",
                   LLM_ERROR_UNSUPPORTED, "$id");
    assert_refused(llm_grammar_from_json_schema, "{\"$ref\":\"#/x\",\"x\":{\"$id\":\"a\"}}", LLM_ERROR_UNSUPPORTED,
                   "x");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"$ref\":\"a\",\"$defs\":{\"x\":{\"$id\":\"a\",\"$dynamicRef\":\"#n\",\"$defs\":{\"n\":{"
                   "\"$dynamicAnchor\":\"n\"}}},\"y\":{\"$id\":\"b\",\"$dynamicAnchor\":\"n\"}}}",
                   LLM_ERROR_UNSUPPORTED, "$dynamicRef");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"$schema\":\"https://json-schema.org/draft/2019-09/schema\",\"$id\":\"http://x/\",\"properties\":"
                   "{\"a\":{\"$id\":\"b\",\"$recursiveRef\":\"#\"}}}",
                   LLM_ERROR_UNSUPPORTED, "$recursiveRef");
    assert_refused(llm_grammar_from_json_schema, "{\"enum\":[]}", LLM_ERROR_ARGUMENT, "");
    assert_refused(llm_grammar_from_json_schema, "{\"multipleOf\":0.01}", LLM_ERROR_UNSUPPORTED, "multipleOf");
    assert_refused(llm_grammar_from_json_schema, "{\"multipleOf\":1001}", LLM_ERROR_UNSUPPORTED, "multipleOf");
    assert_refused(llm_grammar_from_json_schema, "{\"multipleOf\":0}", LLM_ERROR_FORMAT, "multipleOf");
    assert_refused(llm_grammar_from_json_schema, "{\"minProperties\":2}", LLM_ERROR_UNSUPPORTED, "minProperties");
    assert_refused(llm_grammar_from_json_schema, "{\"minProperties\":3,\"properties\":{\"a\":{},\"b\":{},\"c\":{}}}",
                   LLM_ERROR_UNSUPPORTED, "minProperties");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"type\":\"object\",\"minProperties\":2,\"properties\":{\"a\":{}},\"additionalProperties\":false}",
                   LLM_ERROR_ARGUMENT, "");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"type\":\"object\",\"minProperties\":2,\"maxProperties\":1,"
                   "\"properties\":{\"a\":{},\"b\":{}}}",
                   LLM_ERROR_ARGUMENT, "");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"patternProperties\":{\"a\":{},\"b\":{},\"c\":{},\"d\":{},\"e\":{},\"f\":{},\"g\":{}}}",
                   LLM_ERROR_UNSUPPORTED, "patternProperties");
    assert_refused(llm_grammar_from_json_schema, "{\"items\":[{}]}", LLM_ERROR_UNSUPPORTED, "prefixItems");
    assert_refused(llm_grammar_from_json_schema, "{\"$schema\":\"https://x.org/schema\"}", LLM_ERROR_UNSUPPORTED,
                   "$schema");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"$schema\":\"http://json-schema.org/draft-07/schema#\",\"prefixItems\":[{}]}",
                   LLM_ERROR_UNSUPPORTED, "prefixItems");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"properties\":{\"a\":{\"$schema\":\"http://json-schema.org/draft-07/schema#\"}}}",
                   LLM_ERROR_UNSUPPORTED, "$schema");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"$ref\":\"#/$defs/a/$defs/b\",\"$defs\":{\"a\":{\"$id\":\"x\",\"$defs\":{\"b\":true}}}}",
                   LLM_ERROR_UNSUPPORTED, "$id");
    assert_refused(llm_grammar_from_json_schema,
                   "{\"$id\":\"http://x/r\",\"$ref\":\"b\",\"$defs\":{\"B\":{\"$id\":\"http://x/b\",\"$ref\":\"#/x-s\","
                   "\"x-s\":{\"$ref\":\"#/$defs/t\"},\"$defs\":{\"t\":true}}}}",
                   LLM_ERROR_UNSUPPORTED, "$ref");
    assert_refused(llm_grammar_from_json_schema, "{\"$ref\":\"\\u0000/$defs/t\",\"$defs\":{\"t\":{}}}",
                   LLM_ERROR_UNSUPPORTED, "$ref");
    memset(deep, '(', sizeof deep - 1);
    assert_refused(llm_grammar_from_regex, deep, LLM_ERROR_FORMAT, "deeper");
    memset(deep, '[', sizeof deep - 1);
    assert_refused(llm_grammar_from_json_schema, deep, LLM_ERROR_FORMAT, "");
}

/* Small schemas that would take much memory. Each of 16 parts is an anyOf of the next one twice. */
static void test_small_but_hard(void **state) {
    static char text[8000];
    size_t n = (size_t)sprintf(text, "{\"$ref\":\"#/$defs/p0\",\"unevaluatedProperties\":false,\"$defs\":{");
    (void)state;
    for (int i = 0; i < 16; i++)
        n += (size_t)sprintf(text + n, "\"p%d\":{\"anyOf\":[{\"$ref\":\"#/$defs/p%d\"},{\"$ref\":\"#/$defs/p%d\"}]},",
                             i, i + 1, i + 1);
    sprintf(text + n, "\"p16\":{\"type\":\"object\"}}}");
    assert_refused(llm_grammar_from_json_schema, text, LLM_ERROR_UNSUPPORTED, "take too long");
    n = (size_t)sprintf(text, "{\"$id\":\"http://x/");
    memset(text + n, 'a', 5000);
    strcpy(text + n + 5000, "\"}");
    assert_refused(llm_grammar_from_json_schema, text, LLM_ERROR_UNSUPPORTED, "4,000 bytes");
}

/* Counts inside counts, which a text can be read by in more and more ways: the grammar is accepted, but an answer fails
   where they are too many. What came before was shown, and the sequence and the grammar can still be used. */
static void test_too_ambiguous(void **state) {
    static const llm_logit_bias never = {'!', -INFINITY};
    llm_context_desc context = {.n_threads = 1, .n_logits = LLM_DRAFT_MAX + 1};
    llm_context *ctx = create_context(model, &context);
    llm_grammar *g = grammar_of(llm_grammar_from_regex, "([a-f]{1,300}){2,300}!");
    (void)state;
    for (int n = 10; n <= 300; n += 290) {
        answer a = {{0}, 0};
        llm_error err;
        llm_stats stats;
        llm_sampler sampler = {.temperature = 1, .seed = 1, .biases = &never, .n_biases = 1};
        llm_generate_desc desc = {
            .prompt = "abc", .max_tokens = n, .sampler = &sampler, .grammar = g, .on_text = keep_text, .user = &a};
        llm_status status = llm_generate(ctx, &desc, &stats, &err);
        assert_int_equal(status, n > 10 ? LLM_ERROR_UNSUPPORTED : LLM_OK);
        if (status) {
            assert_non_null(strstr(err.message, "too ambiguous"));
            assert_in_range(stats.n_generated, 50, n - 1);
            assert_int_equal(llm_grammar_check(g, a.text, 300), -1);
        }
        assert_in_range(a.n, stats.n_generated, 3 * n);
        assert_int_equal(strspn(a.text, "abcdef"), a.n);
        assert_int_equal(llm_seq_length(ctx, stats.seq), stats.n_prompt + stats.n_generated - 1);
    }
    answer again;
    assert_int_equal(ask(ctx, g, 1, NULL, 20, &again).stop, LLM_STOP_LENGTH);
    assert_int_equal(llm_grammar_check(g, "abcdef!", 7), 1);
    llm_grammar_free(g);
    llm_context_free(ctx);
}

typedef struct starved {
    make_grammar *make;
    const char *text, *answer; /* answer: the beginning of an answer */
    llm_host host;
    llm_context *ctx;
} starved;

static llm_status make_starved(void *user, llm_error *err) {
    starved *job = (starved *)user;
    llm_grammar *g = NULL;
    llm_status status = job->make(&g, llm_model_tokenizer(model), job->text, &job->host, err);
    if (!status && llm_grammar_check(g, job->answer, strlen(job->answer)) < 0) { /* its states need memory, too */
        status = err->code = LLM_ERROR_MEMORY;
        snprintf(err->message, sizeof err->message, "the states ran out of memory");
    }
    llm_grammar_free(g);
    return status;
}

/* Makes the grammar and generates an answer. */
static llm_status answer_starved(void *user, llm_error *err) {
    starved *job = (starved *)user;
    llm_grammar *g = NULL;
    llm_sampler sampler = {.temperature = 3, .seed = 1};
    llm_status status = job->make(&g, llm_model_tokenizer(model), job->text, &job->host, err);
    if (!status) {
        llm_generate_desc desc = {.prompt = "abc", .sampler = &sampler, .grammar = g};
        status = llm_generate(job->ctx, &desc, NULL, err);
    }
    llm_grammar_free(g);
    return status;
}

static const char *const EVERYTHING = "{\"type\":\"object\",\"if\":{\"properties\":{\"a\":{\"const\":1}},\"required\":["
                                      "\"a\"]},\"then\":{\"required\":[\"b\"]},"
                                      "\"patternProperties\":{\"^b\":{\"type\":\"array\",\"contains\":{\"type\":"
                                      "\"null\"},\"maxContains\":2}},\"propertyNames\":"
                                      "{\"pattern\":\"^[a-c]+$\",\"maxLength\":3,\"not\":{\"const\":\"aa\"}},"
                                      "\"dependentRequired\":{\"b\":[\"c\"]},\"properties\":"
                                      "{\"c\":{\"uniqueItems\":true,\"items\":{\"enum\":[1,2,\"x\"]}},\"ac\":{"
                                      "\"oneOf\":[{\"minLength\":2},{\"maxLength\":3},"
                                      "{\"$ref\":\"#/properties/ac/oneOf/0\"}]}}}";

static const char *const REFERENCES =
    "{\"$id\":\"http://x.org/a\",\"anyOf\":[{\"$ref\":\"b\"},{\"$ref\":\"#n\"}],\"unevaluatedProperties\":{\"type\":"
    "\"null\"},\"$defs\":{\"x\":{\"$id\":\"b\",\"properties\":{\"a\":{\"type\":\"integer\"}},\"required\":[\"a\"]},"
    "\"y\":{"
    "\"$anchor\":\"n\",\"properties\":{\"c\":{\"prefixItems\":[true],\"unevaluatedItems\":false}},\"required\":[\"c\"]}"
    "}}";

/* Any allocation may fail. */
static void test_memory(void **state) {
    heap h = {0};
    starved job = {llm_grammar_from_regex, "[a-e]{3,40}(-[0-9]{2})*", "abc", heap_host(&h),
                   create_context(model, NULL)};
    (void)state;
    starve(&h, make_starved, &job, 1, "a grammar");
    job.make = llm_grammar_from_json_schema;
    job.text = EVERYTHING;
    job.answer = "{\"c\":[1,2],\"b\":";
    starve(&h, make_starved, &job, 5, "a grammar from a schema");
    job.text = REFERENCES;
    job.answer = "{\"c\":[1],\"d\":";
    starve(&h, make_starved, &job, 5, "a grammar from a schema with references");
    job.text = FORCED;
    starve(&h, answer_starved, &job, 7, "an answer with a grammar");
    llm_context_free(job.ctx);
    assert_all_returned(&h);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_golden),        cmocka_unit_test(test_gbnf),
        cmocka_unit_test(test_answers),       cmocka_unit_test(test_streams),
        cmocka_unit_test(test_forced),        cmocka_unit_test(test_forced_states),
        cmocka_unit_test(test_forced_limits), cmocka_unit_test(test_forced_streams),
        cmocka_unit_test(test_masks),         cmocka_unit_test(test_mask),
        cmocka_unit_test(test_bad),           cmocka_unit_test(test_small_but_hard),
        cmocka_unit_test(test_too_ambiguous), cmocka_unit_test(test_memory),
    };
    return cmocka_run_group_tests(tests, start, stop);
}
