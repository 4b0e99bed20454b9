/* Tool calls read out of answers: each form that published models use, answers cut off at every byte, mistakes, and
   allocations that fail.
   Variants: asan */
#include "tests/check.h"
#include "llm.h"
#include "tests/common.h"

/* In `calls`, each call is name, tab, arguments, tab, id or -, newline. NULL: the answer is an error that has `text`. */
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
    /* Without a mark these are text. */
    {"{\"name\": \"f\"}", "{\"name\": \"f\"}", ""},
    {"{\"name\": \"f\", \"parameters\": 1}", "{\"name\": \"f\", \"parameters\": 1}", ""},
    {"{\"name\": \"f\", \"parameters\": {}} is a call", "{\"name\": \"f\", \"parameters\": {}} is a call", ""},
    {"{\"name\": \"f\", \"parameters\": {}, \"more\": 1}", "{\"name\": \"f\", \"parameters\": {}, \"more\": 1}", ""},
    {"[{\"name\": \"f\", \"parameters\": {}}]", "[{\"name\": \"f\", \"parameters\": {}}]", ""},
    {"<tool_call", "<tool_call", ""},
    /* After a mark nothing is guessed. */
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

/* An answer that is cut off, in memory of just its size: there are fewer calls, or it is an error; what is read is a
   part of the whole. */
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

/* Every byte of an answer is changed in turn: it ends in an answer or an error. */
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

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_forms), cmocka_unit_test(test_cut),
                                       cmocka_unit_test(test_changed), cmocka_unit_test(test_arguments),
                                       cmocka_unit_test(test_memory)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
