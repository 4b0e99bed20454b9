/*  loop.c - the loop of llm_generate, written out: encode, forward, sample, show, repeat.

    build/loop MODEL [PROMPT]
*/
#define LLM_IMPLEMENTATION
#include "llm.h"

#include <stdio.h>
#include <string.h>

enum { MAX_PROMPT = 2048, MAX_TOKENS = 200 };

static llm_status continue_text(llm_context *ctx, const char *prompt, llm_error *err) {
    const llm_tokenizer *tokenizer = llm_model_tokenizer(llm_context_model(ctx));
    llm_sampler sampler = {0};                  /* greedy; for varied texts: .temperature = 0.8f, .top_p = 0.95f */
    llm_text_stream stream = {.started = true}; /* the text continues the prompt, so a first space is shown */
    llm_token ids[MAX_PROMPT], token = -1;
    char text[1024]; /* longer than any token's text */
    int64_t n =
        llm_encode(tokenizer, prompt, strlen(prompt), LLM_TOKENS_ENDS | LLM_TOKENS_SPECIAL, ids, MAX_PROMPT, err);
    if (n < 0) return err->code;
    if (n > MAX_PROMPT) {
        snprintf(err->message, sizeof err->message, "the prompt has more than %d tokens", MAX_PROMPT);
        return err->code = LLM_ERROR_ARGUMENT;
    }
    llm_batch batch = {.n_tokens = (int)n, .tokens = ids}; /* first the prompt, then one token at a time */
    for (int i = 0; i < MAX_TOKENS; i++) {
        llm_status status = llm_forward(ctx, &batch, err);
        if (status) return status;
        token = llm_sample(ctx, batch.n_tokens - 1, 0, &sampler); /* from the logits of the batch's last token */
        if (llm_token_is_end(tokenizer, token)) break;
        fwrite(text, 1, llm_stream_token(tokenizer, &stream, token, text, sizeof text), stdout);
        fflush(stdout);
        batch.tokens = &token;
        batch.n_tokens = 1;
    }
    /* -1: shows an incomplete character at the end of the text */
    fwrite(text, 1, llm_stream_token(tokenizer, &stream, -1, text, sizeof text), stdout);
    return LLM_OK;
}

int main(int argc, char **argv) {
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_error err = {0};
    if (llm_model_load(&model, argc > 1 ? argv[1] : "model.gguf", NULL, &err) ||
        llm_context_create(&ctx, model, NULL, &err) ||
        continue_text(ctx, argc > 2 ? argv[2] : "Hello, my name is", &err))
        fprintf(stderr, "%s\n", err.message);
    llm_context_free(ctx);
    llm_model_free(model);
    return err.code;
}
