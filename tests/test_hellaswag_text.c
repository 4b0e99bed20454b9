/* hellaswag.c prepares questions as the LM evaluation harness does, with all kinds of letters and white space
   (golden/prepared.py).
   Variants: asan */
#define main hellaswag_main
#include "examples/hellaswag.c"
#undef main

/* hellaswag.c uses these names, too. */
#define read_file read_whole_file
#define create_context make_context
#include "tests/common.h"

static void test_texts(void **state) {
    (void)state;
    FILE *file = open_lines(golden_path("prepared.jsonl"));
    int number = 0;
    know_letters();
    for (json_t *line; (line = next_line(file)) != NULL; number++) {
        char *text = json_dumps(line, 0);
        question q;
        memset(&q, 0, sizeof q);
        read_json_question("prepared.jsonl", number + 1, text, strlen(text), false, &q);
        const char *query = json_string_value(json_object_get(line, "query"));
        if (strcmp(q.context, query)) fail_msg("line %d: \"%s\" instead of \"%s\"", number + 1, q.context, query);
        for (size_t e = 0; e < ENDINGS; e++) {
            const char *choice = json_string_value(json_array_get(json_object_get(line, "choices"), e));
            if (strcmp(q.endings[e], choice))
                fail_msg("line %d: \"%s\" instead of \"%s\"", number + 1, q.endings[e], choice);
            free(q.endings[e]);
        }
        free(q.context);
        free(text);
        json_decref(line);
    }
    assert_true(number >= 700);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_texts)};
    return cmocka_run_group_tests_name("hellaswag's texts", tests, NULL, NULL);
}
