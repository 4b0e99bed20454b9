/* Runs the recipes of llm.h's title comment, which test_manual.sh extracts into recipes.h, with the model named on the
   command line. Prints what failed; exits with 1 if anything did. */
#include "llm.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "recipes.h"

static int n_failed;

static void check(bool right, const char *what, const llm_error *err) {
    if (right) return;
    printf("failed: %s: %s\n", what, err->message);
    n_failed++;
}

static llm_context *create(const llm_model *model, int n_seq, int n_logits) {
    llm_context_desc desc = {.n_ctx = 512, .n_seq = n_seq, .n_logits = n_logits};
    llm_context *ctx = NULL;
    llm_error err;
    check(!llm_context_create(&ctx, model, &desc, &err), "creating a context", &err);
    if (!ctx) exit(1);
    return ctx;
}

/* Seven turns do not fit in the context together. */
static void try_chat(const llm_model *model) {
    static const char *const questions[] = {
        "What is the capital of France?",
        "And of Italy? This is a long question: I want to know its name, how many people live there, what it is famous "
        "for, since when it has been the capital, which river flows through it, how warm it is there in the summer, "
        "and what a visitor should see in a single day without a car, on foot or by bicycle, if it does not rain."};
    enum { TURNS = 7 };
    static char answers[TURNS][4096];
    llm_context *ctx = create(model, 1, 1);
    llm_message messages[2 * TURNS];
    llm_error err = {LLM_OK, "the answer is wrong"};
    for (int turn = 0, n = 0; turn < TURNS; turn++) {
        messages[n].role = "user";
        messages[n++].content = questions[turn > 0];
        bool answered = !chat(ctx, messages, &n, answers[turn], &err) && *answers[turn] && n == 2 * turn + 2;
        check(answered && (turn || strstr(answers[0], "Paris")), "a chat", &err);
    }
    llm_context_free(ctx);
}

static void try_json(const llm_model *model) {
    llm_context *ctx = create(model, 1, 1);
    static const char schema[] = "{\"type\": \"object\", \"required\": [\"capital\"], \"additionalProperties\": false, "
                                 "\"properties\": {\"capital\": {\"enum\": [\"Rome\", \"Paris\"]}}}";
    char answer[4096];
    llm_error err = {LLM_OK, "the answer is wrong"};
    bool answered = !answer_json(ctx, "What is the capital of France?", schema, answer, &err);
    check(answered && (strstr(answer, "\"Rome\"") || strstr(answer, "\"Paris\"")) && strchr(answer, '}'), "JSON", &err);
    llm_context_free(ctx);
}

/* The loop must give the same tokens as llm_generate. */
static void try_loop(const llm_model *model) {
    llm_context *ctx = create(model, 1, 1), *plain = create(model, 1, 1), *copied = create(model, 1, 1);
    llm_generate_desc desc = {.prompt = "The quick brown fox", .max_tokens = 50};
    llm_sampler sampler;
    llm_error err = {LLM_OK, "the tokens differ from llm_generate's"};
    memset(&sampler, 0, sizeof sampler);
    check(!llm_generate(plain, &desc, NULL, &err), "llm_generate", &err);
    const llm_token *tokens = llm_seq_tokens(plain, 0);
    check(!loop(ctx, desc.prompt, &sampler, &err), "a loop", &err);
    int n = llm_seq_length(ctx, 0);
    check(n > 40 && !memcmp(tokens, llm_seq_tokens(ctx, 0), (size_t)n * sizeof *tokens), "a loop", &err);
    printf("\n");
    n = llm_seq_length(plain, 0);
    check(!copy(plain, copied, &err) && llm_seq_length(copied, 0) == n, "copying", &err);
    check(!memcmp(tokens, llm_seq_tokens(copied, 0), (size_t)n * sizeof *tokens), "copying", &err);
    llm_context_free(copied);
    llm_context_free(ctx);
    llm_context_free(plain);
}

static void try_users(const llm_model *model) {
    enum { USERS = 5 };
    static const char *const prompts[USERS] = {"The quick brown fox", "Once upon a time", "The quick brown dog",
                                               "One two three", "Paris is"};
    static char answers[USERS][4096], alone[4096];
    llm_context *ctx = create(model, USERS, USERS), *plain = create(model, 1, 1);
    llm_error err = {LLM_OK, "the texts differ from llm_generate's"};
    check(!answer_all(ctx, prompts, answers, USERS, &err), "several users", &err);
    for (int u = 0; u < USERS; u++) {
        llm_generate_desc desc = {.prompt = prompts[u], .max_tokens = 50, .on_text = append, .user = alone};
        alone[0] = 0;
        check(!llm_generate(plain, &desc, NULL, &err) && !strcmp(alone, answers[u]), "several users", &err);
    }
    llm_context_free(ctx);
    llm_context_free(plain);
}

static void try_share(const llm_model *model) {
    llm_context *ctx = create(model, 3, 3);
    const char *prefix = "This text is longer than a block of the cache has positions, for forks begin where a block "
                         "ends. It goes on for "
                         "a while, and then it ends.";
    llm_error err = {LLM_OK, "the sequences do not share it"};
    int n_free = llm_context_n_free(ctx);
    check(!share(ctx, prefix, &err), "sharing", &err);
    for (int seq = 0; seq < 3; seq++) check(llm_seq_length(ctx, seq) == LLM_CACHE_BLOCK, "sharing", &err);
    check(llm_context_n_free(ctx) == n_free - LLM_CACHE_BLOCK, "sharing", &err);
    llm_context_free(ctx);
}

static void try_draft(const llm_model *model) {
    llm_context *ctx = create(model, 1, LLM_DRAFT_MAX + 1);
    llm_stats stats;
    llm_error err = {LLM_OK, "nothing was generated"};
    check(!faster(ctx, "one two three one two three one two three one two", &stats, &err) && stats.n_generated == 100,
          "a draft", &err);
    llm_context_free(ctx);
}

static void try_cancel(const llm_model *model) {
    llm_context *ctx = create(model, 1, 1);
    llm_error err = {LLM_OK, "it was not cancelled"};
    bool stop = true;
    check(until_stopped(ctx, "Once upon a time", &stop, &err), "cancelling", &err);
    llm_context_free(ctx);
}

static void try_host(const llm_model *model) {
    llm_context *ctx = NULL;
    llm_generate_desc desc = {.prompt = "Once upon a time", .max_tokens = 3};
    llm_error err = {LLM_OK, "memory was not counted"};
    int n_blocks = 0;
    check(!open_own(&ctx, model, &n_blocks, &err) && n_blocks > 0, "a host's allocator", &err);
    check(!answer(ctx, &desc, 0, &err), "a host's threads", &err);
    llm_context_free(ctx);
    check(n_blocks == 0, "a host's allocator", &err);
}

static void try_score(const llm_model *model) {
    llm_context *ctx = create(model, 4, 4);
    const char *const endings[2] = {" banana.", " Paris."};
    llm_error err = {LLM_OK, "the wrong ending"};
    check(likelier(ctx, "The capital of France is", endings, &err) == 1, "scoring", &err);
    llm_context_free(ctx);
}

static void try_full_cache(const llm_model *model) {
    llm_context_desc desc = {.n_ctx = 64, .n_seq = 2, .n_cache = 64};
    llm_context *ctx = NULL;
    llm_generate_desc first = {.prompt = "Once upon a time", .max_tokens = 40},
                      second = {.prompt = "Once upon a time", .seq = 1, .max_tokens = 40};
    llm_error err = {LLM_OK, "no cache was freed"};
    check(!llm_context_create(&ctx, model, &desc, &err), "a small context", &err);
    check(!llm_generate(ctx, &first, NULL, &err) && !answer(ctx, &second, 0, &err), "a full cache", &err);
    check(llm_seq_length(ctx, 0) == 0 && llm_seq_length(ctx, 1) > 4, "a full cache", &err);
    llm_context_free(ctx);
}

int main(int argc, char **argv) {
    llm_model *model = NULL;
    llm_model_desc desc = {.dtype = LLM_DTYPE_INT8}; /* a type that largest_type tries */
    llm_error err = {LLM_OK, "another type"};
    if (argc != 2 || llm_model_load(&model, argv[1], &desc, &err)) {
        printf("%s\n", err.message);
        return 1;
    }
    try_chat(model);
    try_json(model);
    try_loop(model);
    try_users(model);
    try_share(model);
    try_draft(model);
    try_cancel(model);
    try_host(model);
    try_score(model);
    try_full_cache(model);
    llm_model_info info = llm_model_get_info(model);
    check(largest_type(argv[1], UINT64_MAX) == LLM_DTYPE_BF16, "a type", &err);
    check(largest_type(argv[1], 2 * info.weight_bytes) == LLM_DTYPE_INT8, "a type", &err);
    check(largest_type(argv[1], 1 << 20) == LLM_DTYPE_DEFAULT, "a type", &err);
    check(shrink(argv[1], "never", "Too short.", &err) == LLM_ERROR_ARGUMENT, "a text that is too short", &err);
    llm_model_free(model);
    return n_failed > 0;
}
