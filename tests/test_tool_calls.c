/* Reading tool calls from answers: each form that published models use, answers truncated at every byte, mistakes, and
   failing allocations. Also the form that a chat template requires, and grammars that only allow calls.
   Variants: asan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

/* In `calls`, each call is: name, tab, arguments, tab, id or -, newline. NULL: the error message must contain
   `text`. */
typedef struct answer_case {
    const char *answer, *text, *calls;
} answer_case;

static const answer_case CASES[] = {
    {"", "", ""},
    {"Hello {\"name\": 1}", "Hello {\"name\": 1}", ""},
    {"<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": [2, {}]}}\n</tool_call>", "",
     "add\t{\"a\": 1, \"b\": [2, {}]}\t-\n"},
    {"Let me see.\n<tool_call>{\"arguments\":{},\"name\":\"a\"}</tool_call>\n<tool_call> "
     "{\"name\":\"b\",\"arguments\":{\"x\":"
     "\"}</tool_call>{\\\"\"}} </tool_call>\n",
     "Let me see.\n", "a\t{}\t-\nb\t{\"x\":\"}</tool_call>{\\\"\"}\t-\n"},
    {"<tool_call>{\"name\":\"\\u00e9t\\u00e9 \\ud83d\\ude00\\n\",\"arguments\":{\"\\u0000\":\"\\\\\"}}</tool_call>", "",
     "été 😀\n\t{\"\\u0000\":\"\\\\\"}\t-\n"},
    {"<|python_tag|>{\"name\": \"f\", \"parameters\": {\"q\": \"é\"}}", "", "f\t{\"q\": \"é\"}\t-\n"},
    {"{\"name\": \"f\", \"parameters\": {}}", "", "f\t{}\t-\n"},
    {" {\"type\": \"function\", \"name\": \"f\", \"parameters\": {}} ; {\"name\": \"g\", \"parameters\": {\"k\": "
     "null}}\n",
     "", "f\t{}\t-\ng\t{\"k\": null}\t-\n"},
    {"[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": \"]\"}, \"id\": \"abcdefghi\"}, {\"name\": \"g\", "
     "\"arguments\": {}}]",
     "", "f\t{\"a\": \"]\"}\tabcdefghi\ng\t{}\t-\n"},
    {"Yes. [TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]my-tool.g[ARGS]{}", "Yes. ",
     "f\t{\"a\": 1}\t-\nmy-tool.g\t{}\t-\n"},
    /* Without a mark, these are text. */
    {"{\"name\": \"f\"}", "{\"name\": \"f\"}", ""},
    {"{\"name\": \"f\", \"parameters\": 1}", "{\"name\": \"f\", \"parameters\": 1}", ""},
    {"{\"name\": \"f\", \"parameters\": {}} is a call", "{\"name\": \"f\", \"parameters\": {}} is a call", ""},
    {"{\"name\": \"f\", \"parameters\": {}, \"more\": 1}", "{\"name\": \"f\", \"parameters\": {}, \"more\": 1}", ""},
    {"[{\"name\": \"f\", \"parameters\": {}}]", "[{\"name\": \"f\", \"parameters\": {}}]", ""},
    {"<tool_call", "<tool_call", ""},
    /* After a mark, a malformed call is an error. */
    {"<tool_call>{\"name\": \"f\", \"arguments\": {}}", "</tool_call> is expected", NULL},
    {"<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call> Done.", "text follows a tool call", NULL},
    {"<tool_call>{'name': 'f', 'arguments': {}}</tool_call>", "a string is expected", NULL},
    {"<tool_call>{\"name\": \"f\", \"arguments\": \"{}\"}</tool_call>", "must be an object", NULL},
    {"<tool_call>{\"name\": \"\", \"arguments\": {}}</tool_call>", "without name", NULL},
    {"<tool_call>{\"arguments\": {}}</tool_call>", "without name", NULL},
    {"<tool_call>{\"name\": \"f\"}</tool_call>", "without name or arguments", NULL},
    {"<tool_call>{\"name\": 1, \"arguments\": {}}</tool_call>", "a string is expected", NULL},
    {"<tool_call>{\"name\": \"a\", \"name\": \"b\", \"arguments\": {}}</tool_call>", "twice", NULL},
    {"<tool_call>{\"name\": \"a\", \"parameters\": {}, \"arguments\": {}}</tool_call>", "twice", NULL},
    {"<tool_call>{\"name\": \"a\\u0000b\", \"arguments\": {}}</tool_call>", "NUL", NULL},
    {"<tool_call>{\"name\": \"a\", \"arguments\": {\"x\": 01}}</tool_call>", "JSON", NULL},
    {"<tool_call>{\"name\": \"a\", \"arguments\": {}, \"z\": 1}</tool_call>", "nothing else", NULL},
    {"<tool_call>f(1)</tool_call>", "must be an object", NULL},
    {"<|python_tag|>print(1)", "must be an object", NULL},
    {"[TOOL_CALLS]", "a tool's name and [ARGS]", NULL},
    {"[TOOL_CALLS][]", "must be an object", NULL},
    {"[TOOL_CALLS]f{\"a\": 1}", "a tool's name and [ARGS]", NULL},
    {"[TOOL_CALLS][ARGS]{}", "must be an object", NULL},
    {"[TOOL_CALLS]f[ARGS][1]", "must be an object", NULL},
    {"[TOOL_CALLS]f[ARGS]{} and", "text follows a tool call", NULL}};
enum { CASE_COUNT = sizeof CASES / sizeof *CASES };

static void write_calls(const llm_tool_calls *read, char *text, size_t room) {
    size_t n = 0;
    text[0] = 0;
    for (int i = 0; i < read->n_calls; i++) {
        const llm_tool_call *call = &read->calls[i];
        n += (size_t)snprintf(text + n, room - n, "%s\t%s\t%s\n", call->name, call->arguments,
                              call->id ? call->id : "-");
        assert_true(n < room);
    }
}

static void test_forms(void **state) {
    (void)state;
    for (int i = 0; i < CASE_COUNT; i++) {
        const answer_case *c = &CASES[i];
        llm_tool_calls *read = (llm_tool_calls *)(uintptr_t)1;
        char calls[1024];
        llm_error err;
        llm_status status = llm_tool_calls_read(&read, c->answer, strlen(c->answer), NULL, &err);
        if (!c->calls) {
            if (status != LLM_ERROR_FORMAT || read) fail_msg("%s is not refused", c->answer);
            if (!strstr(err.message, c->text)) fail_msg("%s: %s", c->answer, err.message);
            continue;
        }
        if (status) fail_msg("%s: %s", c->answer, err.message);
        write_calls(read, calls, sizeof calls);
        assert_string_equal(read->text, c->text);
        assert_int_equal(read->n_bytes, strlen(c->text));
        assert_string_equal(calls, c->calls);
        llm_tool_calls_free(read);
    }
}

/* An answer truncated at any byte, in memory of exactly its size, is an error or gives fewer calls, which must be the
   first calls of the whole answer. */
static void test_cut(void **state) {
    (void)state;
    for (int i = 0; i < CASE_COUNT; i++)
        for (size_t n = 0; n < strlen(CASES[i].answer); n++) {
            char *part = (char *)malloc(n + !n), calls[1024];
            llm_tool_calls *read = NULL;
            assert_non_null(part);
            memcpy(part, CASES[i].answer, n);
            llm_status status = llm_tool_calls_read(&read, part, n, NULL, NULL);
            free(part);
            if (status) {
                assert_int_equal(status, LLM_ERROR_FORMAT);
                assert_null(read);
                continue;
            }
            write_calls(read, calls, sizeof calls);
            if (CASES[i].calls && *CASES[i].calls) assert_memory_equal(calls, CASES[i].calls, strlen(calls));
            assert_memory_equal(read->text, CASES[i].answer, read->n_bytes);
            if (!read->n_calls) assert_int_equal(read->n_bytes, n);
            llm_tool_calls_free(read);
        }
}

/* An answer with any byte changed must give calls or an error. */
static void test_changed(void **state) {
    static const char bytes[] = "\0\"\\{}[]<:,;ux\x80\xFF";
    (void)state;
    for (int i = 0; i < CASE_COUNT; i++)
        for (size_t at = 0; at < strlen(CASES[i].answer); at++)
            for (size_t b = 0; b < sizeof bytes - 1; b++) {
                char answer[512];
                llm_tool_calls *read = NULL;
                size_t n = strlen(CASES[i].answer);
                memcpy(answer, CASES[i].answer, n);
                answer[at] = bytes[b];
                llm_status status = llm_tool_calls_read(&read, answer, n, NULL, NULL);
                assert_true(status == LLM_OK || status == LLM_ERROR_FORMAT);
                llm_tool_calls_free(read);
            }
}

static void test_arguments(void **state) {
    llm_tool_calls *read;
    char deep[3000] = "<tool_call>{\"name\":\"a\",\"arguments\":{\"x\":";
    (void)state;
    assert_int_equal(llm_tool_calls_read(NULL, "", 0, NULL, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_tool_calls_read(&read, NULL, 1, NULL, NULL), LLM_ERROR_ARGUMENT);
    assert_null(read);
    assert_int_equal(llm_tool_calls_read(&read, NULL, 0, NULL, NULL), LLM_OK);
    assert_int_equal(read->n_calls, 0);
    llm_tool_calls_free(read);
    llm_tool_calls_free(NULL);
    memset(deep + strlen(deep), '[', 2000);
    assert_int_equal(llm_tool_calls_read(&read, deep, strlen(deep), NULL, NULL), LLM_ERROR_FORMAT);
}

static llm_status read_starved(void *job, llm_error *err) {
    llm_host host = heap_host((heap *)job);
    llm_status status = LLM_OK;
    for (int i = 0; i < CASE_COUNT && !status; i++) {
        llm_tool_calls *read = NULL;
        if (!CASES[i].calls) continue;
        status = llm_tool_calls_read(&read, CASES[i].answer, strlen(CASES[i].answer), &host, err);
        if (status) assert_null(read);
        llm_tool_calls_free(read);
    }
    return status;
}

static void test_memory(void **state) {
    heap h = {0};
    (void)state;
    starve(&h, read_starved, &h, 1, "reading tool calls");
    assert_all_returned(&h);
}

/* ---- Grammars of calls ---- */

/* A vocabulary of all bytes, the marks and <|end|>. Most marks are control tokens, as in published models. */
static llm_tokenizer *load_marks(const char *chat_template) {
    static const char *const marks[] = {"[TOOL_CALLS]", "[ARGS]",       "<|python_tag|>", "[INST]",
                                        "<tool_call>",  "</tool_call>", "<|end|>"};
    enum { MARKS = sizeof marks / sizeof *marks, VOCAB = 256 + MARKS };
    tiny_file f;
    llm_tokenizer *tokenizer;
    llm_error err;
    char piece[3];
    memset(&f, 0, sizeof f);
    tiny_put(&f, "GGUF", 4);
    tiny_u32(&f, 3);
    tiny_u64(&f, 0);
    tiny_u64(&f, 7);
    tiny_key_str(&f, "tokenizer.ggml.model", "gpt2");
    tiny_key_str(&f, "tokenizer.ggml.pre", "gpt-2");
    tiny_key_array(&f, "tokenizer.ggml.tokens", 8, VOCAB);
    for (int i = 0; i < 256; i++) {
        tiny_byte_piece(i, piece);
        tiny_str(&f, piece);
    }
    for (int i = 0; i < MARKS; i++) tiny_str(&f, marks[i]);
    tiny_key_array(&f, "tokenizer.ggml.token_type", 5, VOCAB);
    for (int i = 0; i < VOCAB; i++) tiny_u32(&f, i < 256 ? 1 : i == 260 || i == 261 ? 4 : 3);
    tiny_key_array(&f, "tokenizer.ggml.merges", 8, 0);
    tiny_key_u32(&f, "tokenizer.ggml.eos_token_id", VOCAB - 1);
    tiny_key_str(&f, "tokenizer.chat_template", chat_template);
    if (llm_tokenizer_load_memory(&tokenizer, f.data, f.size, NULL, &err)) fail_msg("%s", err.message);
    free(f.data);
    return tokenizer;
}

static void test_form_of(void **state) {
    static const struct {
        const char *chat_template;
        llm_tool_form form;
    } cases[] = {
        {"{{ messages[0].content }}", LLM_TOOL_FORM_NONE},
        {"{% if tools %}{{ tools | tojson }}{% endif %}", LLM_TOOL_FORM_NONE},
        {"{% if tools %}{{ '<tool_call>\n{\"name\": \"f\", \"arguments\": {}}' }}{% endif %}", LLM_TOOL_FORM_HERMES},
        {"{% if tools %}{{ \"<tool_call>{\\\"name\\\": <name>, \\\"arguments\\\": <object>}\" }}{% endif %}",
         LLM_TOOL_FORM_HERMES},
        {"{{ '<tool_call>{\"name\": \"f\", \"arguments\": {}}' }}", LLM_TOOL_FORM_NONE},
        {"{% if tools %}{{ '<tool_call><function=f><parameter=a>arguments' }}{% endif %}", LLM_TOOL_FORM_NONE},
        {"{% if tools %}{{ '<tool_calls>[{\"name\": 1, \"arguments\": 2}] in <tool_call>' }}{% endif %}",
         LLM_TOOL_FORM_NONE},
        {"{% if tools %}{{ 'Respond with {\"name\": function name, \"parameters\": dictionary of arguments}' }}{% "
         "endif %}",
         LLM_TOOL_FORM_LLAMA},
        {"{% if tools %}{{ '[TOOL_CALLS][' }}{% endif %}", LLM_TOOL_FORM_MISTRAL},
        {"{% if tools %}{{ '[TOOL_CALLS]f[ARGS]{}' }}{% endif %}", LLM_TOOL_FORM_NAMED},
        {"{% if tools %}{{ '[TOOL_CALLS]f[CALL_ID]1[ARGS]{}' }}{% endif %}", LLM_TOOL_FORM_NONE},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llm_tokenizer *tokenizer = load_marks(cases[i].chat_template);
        if (llm_tool_form_of(tokenizer) != cases[i].form) fail_msg("%s", cases[i].chat_template);
        llm_tokenizer_free(tokenizer);
    }
}

static const char TOOLS[] =
    "[{\"type\":\"function\",\"function\":{\"name\":\"add\",\"parameters\":{\"properties\":{\"a\":{\"$ref\":\"#/$defs/"
    "digit\"},\"b\":{\"$ref\":\"#/$defs/digit\"}},\"required\":[\"a\"],\"additionalProperties\":false,\"$defs\":{"
    "\"digit\":{\"enum\":[1,2]}}}}},"
    "{\"type\":\"function\",\"function\":{\"name\":\"say \\\"it\\\"\",\"description\":\"Says "
    "it.\",\"parameters\":{\"type\":"
    "\"object\",\"properties\":{\"it\":{\"type\":\"string\",\"maxLength\":3}},\"required\":[\"it\"],"
    "\"additionalProperties\""
    ":false}}},"
    "{\"type\":\"function\",\"function\":{\"name\":\"now\"}}]";
/* The form [TOOL_CALLS]name[ARGS] cannot represent names with spaces. */
static const char NAMED_TOOLS[] = "[{\"function\":{\"name\":\"add\",\"parameters\":{\"type\":\"object\",\"properties\":"
                                  "{\"a\":{\"enum\":[1]}},\"required\":["
                                  "\"a\"],\"additionalProperties\":false}}},{\"function\":{\"name\":\"now\"}}]";

static llm_grammar *tools_grammar(const llm_tokenizer *tokenizer, llm_tools_desc desc) {
    llm_grammar *g;
    llm_error err;
    if (llm_grammar_from_tools(&g, tokenizer, &desc, NULL, &err)) fail_msg("%s", err.message);
    return g;
}

/* The first character of each text is the expected result of llm_grammar_check: 1, 0, or - for -1. The rest is
   checked. */
static void test_tools(void **state) {
    static const struct {
        llm_tool_form form;
        const char *name, *answer_schema;
        bool one, text;
        const char *texts[9];
    } cases[] = {
        {LLM_TOOL_FORM_HERMES,
         NULL,
         NULL,
         false,
         false,
         {"1<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>",
          "1<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>\n<tool_call>{\"name\": \"say \\\"it\\\"\", "
          "\"arguments\": {\"it\":\"</\"}}</tool_call>",
          "0<tool_call>{\"name\": \"add\", \"arguments\": {\"a\": 2,\"b\":", "0", "-{",
          "-<tool_call>{\"name\": \"sub\"", "-<tool_call>{\"name\": \"add\", \"arguments\": 1",
          "-<tool_call>{\"name\": \"now\", \"arguments\": {\""}},
        {LLM_TOOL_FORM_HERMES,
         "now",
         NULL,
         true,
         false,
         {"1<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>", "-<tool_call>{\"name\": \"a",
          "-<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>\n<"}},
        {LLM_TOOL_FORM_HERMES,
         NULL,
         "{\"enum\":[\"yes\",{\"x\":1}]}",
         false,
         false,
         {"1\"yes\"", "1{\"x\":1}", "0\"y", "-no", "1<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>"}},
        {LLM_TOOL_FORM_LLAMA,
         NULL,
         NULL,
         false,
         false,
         {"1{\"name\": \"add\", \"parameters\": {\"a\":1}}", "0{\"name\": \"now\", \"parameters\": {}}; {",
          "1{\"name\": \"now\", \"parameters\": {}};{\"name\": \"now\", \"parameters\": {}}", "-<"}},
        {LLM_TOOL_FORM_LLAMA,
         NULL,
         "{\"type\":\"object\"}",
         true,
         false,
         {"1{\"name\": \"add\", \"parameters\": {\"a\":1}}", "1{\"name\": 7}",
          "-{\"name\": \"now\", \"parameters\": {}};"}},
        {LLM_TOOL_FORM_MISTRAL,
         NULL,
         NULL,
         false,
         false,
         {"1[TOOL_CALLS][{\"name\": \"add\", \"arguments\": {\"a\":1,\"b\":2}}]",
          "1[TOOL_CALLS] [{\"name\": \"now\", \"arguments\": {}}, {\"name\": \"now\", \"arguments\": {}}]",
          "-[TOOL_CALLS][]"}},
        {LLM_TOOL_FORM_MISTRAL,
         NULL,
         NULL,
         true,
         false,
         {"1[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}]",
          "-[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}},"}},
        {LLM_TOOL_FORM_HERMES,
         NULL,
         NULL,
         true,
         true,
         {"1", "1Hello < <t\xC3\xA9 <tool_<tool_cal", "1<<tool_callx{\"name\"", "0<tool_call>",
          "1Yes.\n<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>", "-<<tool_call>x",
          "-a <tool_ca<tool_call>{}", "-<tool_call>{\"name\": \"now\", \"arguments\": {}}</tool_call>.",
          "-<tool_call>{\"name\": \"sub\""}},
        {LLM_TOOL_FORM_LLAMA,
         NULL,
         NULL,
         false,
         true,
         {"1", "1 \n", "1 a {\"name\"", "1{\"name\": \"now\", \"parameters\": {}}", "-{\"a\"", "-\n{"}},
        {LLM_TOOL_FORM_MISTRAL,
         NULL,
         NULL,
         false,
         true,
         {"1[TOOL_[TOOL_CALLS", "1a[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}]", "-[TOOL_CALLS]a"}},
        {LLM_TOOL_FORM_NAMED,
         NULL,
         NULL,
         false,
         false,
         {"1[TOOL_CALLS]add[ARGS]{\"a\": 1}", "1[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}", "-[TOOL_CALLS]nov"}},
    };
    llm_tokenizer *tokenizer = load_marks("");
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bool named = cases[i].form == LLM_TOOL_FORM_NAMED;
        llm_tools_desc desc = {.form = cases[i].form,
                               .tools_json = named ? NAMED_TOOLS : TOOLS,
                               .name = cases[i].name,
                               .one = cases[i].one,
                               .text = cases[i].text,
                               .answer_schema = cases[i].answer_schema};
        llm_grammar *g = tools_grammar(tokenizer, desc);
        for (int j = 0; j < 9 && cases[i].texts[j]; j++) {
            const char *text = cases[i].texts[j];
            int expected = *text == '-' ? -1 : *text - '0', found = llm_grammar_check(g, text + 1, strlen(text + 1));
            if (found != expected) fail_msg("case %d: %d for %s", (int)i, found, text);
        }
        llm_grammar_free(g);
    }
    llm_tokenizer_free(tokenizer);
}

/* Draws random tokens that the mask allows. Each text must be readable as calls. The only control tokens that may be
   drawn are marks. */
static void test_random_calls(void **state) {
    llm_tokenizer *tokenizer = load_marks("");
    int n_vocab = llm_tokenizer_n_vocab(tokenizer);
    uint32_t random = 1;
    int n_after_text = 0;
    bool marked[3] = {false, false, false}; /* [TOOL_CALLS], [ARGS] and <tool_call> were drawn as tokens */
    (void)state;
    for (int round = 0; round < 200; round++) {
        llm_tool_form form = (llm_tool_form)(1 + round % 4);
        llm_tools_desc desc = {.form = form,
                               .tools_json = form == LLM_TOOL_FORM_NAMED ? NAMED_TOOLS : TOOLS,
                               .one = round % 8 < 4,
                               .text = round % 16 < 8};
        llm_grammar *g = tools_grammar(tokenizer, desc);
        llm_token ids[2000];
        char answer[8000];
        size_t n_answer = 0;
        int n = 0;
        llm_grammar_begin(g, 0);
        for (;; n++) {
            float logits[300];
            llm_token allowed[300];
            int n_allowed = 0;
            memset(logits, 0, sizeof logits);
            assert_true(n < 2000 && n_vocab <= 300);
            llm_grammar_mask(g, ids, n, logits, n_vocab);
            for (int id = 0; id < n_vocab; id++)
                if (logits[id] == 0) allowed[n_allowed++] = id;
            assert_true(n_allowed > 0);
            random = random * 1664525 + 1013904223;
            llm_token token = allowed[(random >> 8) % (uint32_t)n_allowed];
            bool may_end = llm_token_is_end(tokenizer, allowed[n_allowed - 1]);
            if (may_end && (!desc.text || random >> 28 == 0)) token = allowed[n_allowed - 1];
            if (llm_token_is_end(tokenizer, token)) break;
            size_t n_bytes;
            const char *bytes = llm_token_bytes(tokenizer, token, &n_bytes);
            assert_true(n_answer + n_bytes < sizeof answer);
            memcpy(answer + n_answer, bytes, n_bytes);
            n_answer += n_bytes;
            assert_true(token != 259); /* [INST] */
            if (token == 256 || token == 257) marked[token - 256] = true;
            if (token == 260) marked[2] = true;
            ids[n] = token;
        }
        llm_tool_calls *read;
        llm_error err;
        if (llm_tool_calls_read(&read, answer, n_answer, NULL, &err))
            fail_msg("%.*s: %s", (int)n_answer, answer, err.message);
        assert_in_range(read->n_calls, desc.text ? 0 : 1, desc.one ? 1 : 1000);
        assert_true(desc.text || !read->n_bytes);
        n_after_text += desc.text && read->n_calls;
        llm_tool_calls_free(read);
        llm_grammar_free(g);
    }
    assert_true(marked[0] && marked[1] && marked[2] && n_after_text);
    llm_tokenizer_free(tokenizer);
}

static void test_bad_tools(void **state) {
    static const struct {
        llm_tool_form form;
        const char *tools, *name, *answer_schema;
        llm_status status;
        const char *words;
    } cases[] = {
        {LLM_TOOL_FORM_NONE, TOOLS, NULL, NULL, LLM_ERROR_ARGUMENT, "form"},
        {(llm_tool_form)9, TOOLS, NULL, NULL, LLM_ERROR_ARGUMENT, "form"},
        {LLM_TOOL_FORM_HERMES, NULL, NULL, NULL, LLM_ERROR_ARGUMENT, "NULL"},
        {LLM_TOOL_FORM_HERMES, "[", NULL, NULL, LLM_ERROR_FORMAT, "line"},
        {LLM_TOOL_FORM_HERMES, "{}", NULL, NULL, LLM_ERROR_FORMAT, "no list"},
        {LLM_TOOL_FORM_HERMES, "[7]", NULL, NULL, LLM_ERROR_FORMAT, "no object"},
        {LLM_TOOL_FORM_HERMES, "[]", NULL, NULL, LLM_ERROR_ARGUMENT, "there is no tool"},
        {LLM_TOOL_FORM_HERMES, "[{}]", NULL, NULL, LLM_ERROR_FORMAT, "function is missing"},
        {LLM_TOOL_FORM_HERMES, "[{\"function\":{}}]", NULL, NULL, LLM_ERROR_FORMAT, "function.name is missing"},
        {LLM_TOOL_FORM_HERMES, "[{\"function\":{\"name\":\"\"}}]", NULL, NULL, LLM_ERROR_FORMAT, "empty"},
        {LLM_TOOL_FORM_HERMES, "[{\"function\":{\"name\":\"a\\u0000\"}}]", NULL, NULL, LLM_ERROR_FORMAT, "NUL"},
        {LLM_TOOL_FORM_HERMES, TOOLS, "nothing", NULL, LLM_ERROR_ARGUMENT, "no tool \"nothing\""},
        {LLM_TOOL_FORM_NAMED, TOOLS, NULL, NULL, LLM_ERROR_UNSUPPORTED, "before [ARGS]"},
        {LLM_TOOL_FORM_HERMES, TOOLS, NULL, "{\"nonsense\":1}", LLM_ERROR_UNSUPPORTED, "the JSON schema: "},
        {LLM_TOOL_FORM_HERMES, "[{\"function\":{\"name\":\"f\",\"parameters\":{\"nonsense\":1}}}]", NULL, NULL,
         LLM_ERROR_UNSUPPORTED, "of the tool \"f\""},
        {LLM_TOOL_FORM_HERMES, "[{\"function\":{\"name\":\"f\",\"parameters\":{\"type\":\"string\"}}}]", NULL, NULL,
         LLM_ERROR_ARGUMENT, "no text fits"},
    };
    llm_tokenizer *tokenizer = load_marks("");
    llm_error err;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llm_tools_desc desc = {.form = cases[i].form,
                               .tools_json = cases[i].tools,
                               .name = cases[i].name,
                               .answer_schema = cases[i].answer_schema};
        llm_grammar *g = (llm_grammar *)(uintptr_t)1;
        llm_status status = llm_grammar_from_tools(&g, tokenizer, &desc, NULL, &err);
        if (status != cases[i].status || g || !strstr(err.message, cases[i].words))
            fail_msg("case %d: status %d, %s", (int)i, status, err.message);
        assert_explained(status, &err);
    }
    llm_grammar *g = (llm_grammar *)(uintptr_t)1;
    assert_int_equal(llm_grammar_from_tools(&g, tokenizer, NULL, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_null(g);
    llm_tokenizer_free(tokenizer);
}

typedef struct tools_job {
    heap h;
    const llm_tokenizer *tokenizer;
} tools_job;

static llm_status build_starved(void *user, llm_error *err) {
    tools_job *job = (tools_job *)user;
    llm_host host = heap_host(&job->h);
    llm_tools_desc desc = {.form = LLM_TOOL_FORM_HERMES, .tools_json = TOOLS, .answer_schema = "{\"type\":\"string\"}"};
    llm_grammar *g;
    llm_status status = llm_grammar_from_tools(&g, job->tokenizer, &desc, &host, err);
    if (status) assert_null(g);
    llm_grammar_free(g);
    return status;
}

static void test_tools_memory(void **state) {
    llm_tokenizer *tokenizer = load_marks("");
    tools_job job = {{0}, tokenizer};
    (void)state;
    starve(&job.h, build_starved, &job, 1, "a grammar from tools");
    assert_all_returned(&job.h);
    llm_tokenizer_free(tokenizer);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_forms),     cmocka_unit_test(test_cut),
                                       cmocka_unit_test(test_changed),   cmocka_unit_test(test_arguments),
                                       cmocka_unit_test(test_memory),    cmocka_unit_test(test_form_of),
                                       cmocka_unit_test(test_tools),     cmocka_unit_test(test_random_calls),
                                       cmocka_unit_test(test_bad_tools), cmocka_unit_test(test_tools_memory)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
