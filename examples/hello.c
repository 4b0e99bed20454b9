/*  hello.c - load a model and stream a text.

    build/hello MODEL [PROMPT]
*/
#define LLM_IMPLEMENTATION
#define LLM_STATIC /* leave out what this program does not use */
#include "llm.h"

#include <stdio.h>

static bool print(void *user, const char *text, size_t n_bytes) {
    (void)user;
    fwrite(text, 1, n_bytes, stdout);
    return fflush(stdout) == 0; /* false stops the answer */
}

int main(int argc, char **argv) {
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_error err = {0};
    llm_generate_desc desc = {.prompt = "Hello, my name is", .max_tokens = 200, .on_text = print};
    if (argc > 2) desc.prompt = argv[2];
    if (llm_model_load(&model, argc > 1 ? argv[1] : "model.gguf", NULL, &err) ||
        llm_context_create(&ctx, model, NULL, &err) || llm_generate(ctx, &desc, NULL, &err))
        fprintf(stderr, "%s\n", err.message);
    llm_context_free(ctx);
    llm_model_free(model);
    return err.code;
}
