/*  extract.c - extracts a person's name and age from a text into a C struct. The answer is JSON that fits a schema.

    cc -O2 -I. extract.c -o extract -lm -lpthread
    ./extract model.gguf "Ada Lovelace wrote the first program. She died when she was 36." */
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <stdio.h>
#include <string.h>

static const char *const SCHEMA =
    "{\"type\": \"object\", \"required\": [\"name\", \"age\"], \"additionalProperties\": false, \"properties\": {"
    "  \"name\": {\"type\": \"string\", \"pattern\": \"^[A-Z][a-z]{1,15}( [A-Z][a-z]{1,15})?$\"},"
    "  \"age\": {\"type\": \"integer\", \"minimum\": 0, \"maximum\": 130}}}";

typedef struct person {
    char name[41];
    int age;
} person;

static bool append(void *user, const char *text, size_t n_bytes) {
    if (strlen((char *)user) + n_bytes < 400) strcat((char *)user, text);
    return true;
}

int main(int argc, char **argv) {
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_grammar *grammar = NULL;
    llm_error err = {0};
    llm_stats stats;
    char answer[400] = "";
    person p;
    llm_message messages[] = {
        {.role = "system", .content = "Write the name and the age of the person in the text as JSON."},
        {.role = "user", .content = argc > 2 ? argv[2] : "My name is Bo. I am 7 years old."}};
    if (llm_model_load(&model, argc > 1 ? argv[1] : "model.gguf", NULL, &err) ||
        llm_context_create(&ctx, model, NULL, &err) ||
        llm_grammar_from_json_schema(&grammar, llm_model_tokenizer(model), SCHEMA, NULL, &err) ||
        llm_generate(ctx,
                     &(llm_generate_desc){.messages = messages,
                                          .n_messages = 2,
                                          .max_tokens = 60,
                                          .grammar = grammar,
                                          .on_text = append,
                                          .user = answer},
                     &stats, &err))
        fprintf(stderr, "%s\n", err.message);
    else if (sscanf(answer, "{ \"name\" : \"%40[^\"]\" , \"age\" : %d }", p.name, &p.age) == 2)
        printf("%s is %d.\n", p.name, p.age);
    else fprintf(stderr, "The answer is not complete: %s\n", answer);
    llm_context_free(ctx);
    llm_grammar_free(grammar);
    llm_model_free(model);
    return err.code;
}
