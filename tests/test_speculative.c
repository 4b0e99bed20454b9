/* Speculative decoding: with whatever draft, the text is the model's own.
   Variants: asan tsan */
#define LLM_IMPLEMENTATION
#include "llm.h"
#include "tests/tiny.h"

#include <setjmp.h>
#include <cmocka.h>

static const tiny_spec SPEC = {2, 40, 56, 4, 2, 12, 256, 9, 1, 0, 21};
enum { N_VOCAB = 265, END = 263, ROOM = 8192 };

static llm_model *load(const tiny_spec *spec, llm_dtype dtype) {
    llm_model_desc desc = {.dtype = dtype, .n_threads = 1};
    llm_model *model = NULL;
    llm_error err;
    uint8_t *data = tiny_model(spec, &desc.data_size);
    desc.data = data;
    if (llm_model_load(&model, NULL, &desc, &err)) fail_msg("%s", err.message);
    free(data);
    return model;
}

static llm_context *create(const llm_model *model, const llm_context_desc *desc) {
    llm_context *ctx = NULL;
    llm_error err;
    if (llm_context_create(&ctx, model, desc, &err)) fail_msg("%s", err.message);
    return ctx;
}

static llm_context *open_tiny(int n_ctx, int n_seq) {
    return create(load(&SPEC, LLM_DTYPE_F32), &(llm_context_desc){.n_ctx = n_ctx, .n_seq = n_seq, .n_logits = 16, .n_threads = 1});
}

static void close_tiny(llm_context *ctx) {
    llm_model *model = (llm_model *)(uintptr_t)llm_context_model(ctx);
    llm_context_free(ctx);
    llm_model_free(model);
}

/* A model draft and what it is made of. */
static llm_draft draft_model(llm_context *ctx, const llm_model *model) {
    llm_draft draft;
    llm_error err;
    if (llm_draft_model(&draft, ctx, model, &err)) fail_msg("%s", err.message);
    return draft;
}

/* ---- Drafts of all sorts ---- */

typedef struct oracle {
    const llm_token *text; /* what will come, from the beginning of the prompt */
    int n, n_calls;
    enum { RIGHT, WRONG, HALF, OUTSIDE, TOO_MANY, TOO_FEW, FAILS, CANCELS, ODD_KIND, LIES } habit;
} oracle;

static llm_status oracle_propose(void *user, const llm_draft_request *r, llm_draft_guesses *g, llm_error *err) {
    oracle *o = (oracle *)user;
    int wanted = r->n_wanted[0];
    o->n_calls++;
    assert_int_equal(r->n_tokens, llm_seq_length(r->ctx, r->seq) + 1);
    assert_in_range(wanted, 0, LLM_DRAFT_MOST);
    assert_int_equal(g->n, 0);
    if (o->habit == FAILS) {
        err->code = LLM_ERROR_DEVICE;
        snprintf(err->message, sizeof err->message, "no ideas today");
        return LLM_ERROR_DEVICE;
    }
    if (o->habit == CANCELS && o->n_calls > 2) return LLM_ERROR_CANCELLED;
    for (; g->n < wanted; g->n++) {
        int at = r->n_tokens + g->n;
        llm_token token = at < o->n ? o->text[at] : 7;
        if (o->habit == WRONG || (o->habit == HALF && at % 4 == 0)) token = (token + 1) % N_VOCAB;
        if (o->habit == OUTSIDE && at % 3 == 0) token = at % 2 ? -1 : N_VOCAB;
        g->tokens[g->n] = token;
    }
    if (o->habit == TOO_MANY) g->n = INT32_MAX;
    if (o->habit == TOO_FEW) g->n = g->n > 1 ? g->n - 1 : o->n_calls % 2 ? 0 : -5;
    if (o->habit == ODD_KIND) g->kind = o->n_calls % 2 ? -3 : 1 << 20;
    if (o->habit == LIES) g->has_q = true; /* q may be NULL */
    return LLM_OK;
}

/* What one generation showed. */
typedef struct answer {
    char text[ROOM];
    size_t n_bytes;
    llm_token tokens[1024];
    int n_tokens;
    int last_token;         /* on_token refuses this one; 0: none */
    int n_polls, last_poll; /* cancel says so at this one */
    int length;             /* of the sequence afterwards */
    uint64_t n_drawn;
    llm_stats stats;
} answer;

static bool on_text(void *user, const char *text, size_t n_bytes) {
    answer *a = (answer *)user;
    if (a->n_bytes + n_bytes < ROOM) memcpy(a->text + a->n_bytes, text, n_bytes);
    a->n_bytes += n_bytes;
    return true;
}

static bool on_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    answer *a = (answer *)user;
    (void)bytes, (void)n_bytes;
    if (a->n_tokens < 1024) a->tokens[a->n_tokens] = token;
    return ++a->n_tokens != a->last_token;
}

static bool on_poll(void *user) {
    answer *a = (answer *)user;
    return ++a->n_polls == a->last_poll;
}

static answer *generate(llm_context *ctx, llm_generate_desc desc, const llm_sampler *sampler, int last_token, int last_poll) {
    llm_error err;
    llm_sampler own = {0};
    answer *a = (answer *)calloc(1, sizeof *a);
    assert_non_null(a);
    if (sampler) own = *sampler;
    a->last_token = last_token;
    a->last_poll = last_poll;
    desc.sampler = &own;
    desc.on_text = on_text;
    desc.on_token = on_token;
    if (last_poll) desc.cancel = on_poll;
    desc.user = a;
    assert_int_equal(llm_seq_truncate(ctx, desc.seq, 0, NULL), LLM_OK);
    if (llm_generate(ctx, &desc, &a->stats, &err)) fail_msg("%s", err.message);
    a->length = llm_seq_length(ctx, desc.seq);
    a->n_drawn = own.n_drawn;
    return a;
}

static void assert_same(const answer *a, const answer *b) {
    assert_int_equal(a->n_tokens, b->n_tokens);
    assert_memory_equal(a->tokens, b->tokens, (size_t)a->n_tokens * sizeof *a->tokens);
    assert_int_equal(a->n_bytes, b->n_bytes);
    assert_memory_equal(a->text, b->text, a->n_bytes);
    assert_int_equal(a->stats.stop, b->stats.stop);
    assert_int_equal(a->stats.stop_index, b->stats.stop_index);
    assert_int_equal(a->stats.n_generated, b->stats.n_generated);
    assert_int_equal(a->length, b->length);
    assert_true(a->n_drawn == b->n_drawn);
}

static void assert_draft_stats(const llm_stats *s) {
    const llm_draft_stats *d = &s->draft;
    int passes = 0, accepted = 0;
    for (int i = 0; i <= LLM_DRAFT_MOST; i++) {
        passes += d->n_by_accepted[i];
        accepted += i * d->n_by_accepted[i];
    }
    assert_int_equal(passes, d->n_passes);
    assert_int_equal(accepted, d->n_accepted);
    assert_true(d->n_accepted <= d->n_proposed && d->n_passes <= s->n_decode_passes);
    if (d->n_passes) assert_true(fabs(d->tokens_per_pass - 1 - (double)accepted / passes) < 1e-9);
    if (s->stop != LLM_STOP_CALLBACK) assert_true(s->n_decode_passes + d->n_accepted >= s->n_generated - 1);
}

/* The same with and without a draft, in all ways a generation can end. */
static void check_draft(llm_context *ctx, llm_generate_desc desc, const llm_sampler *sampler, llm_draft *draft) {
    answer *plain = generate(ctx, desc, sampler, 0, 0);
    desc.draft = draft;
    answer *quick = generate(ctx, desc, sampler, 0, 0);
    assert_same(quick, plain);
    assert_draft_stats(&quick->stats);
    free(plain);
    free(quick);
}

/* The prompt and all that comes after it. */
static int whole_text(llm_context *ctx, const char *prompt, const llm_sampler *sampler, int n, llm_token *text) {
    answer *a = generate(ctx, (llm_generate_desc){.prompt = prompt, .max_tokens = n, .ignore_end = true}, sampler, 0, 0);
    int n_prompt = a->stats.n_prompt;
    memcpy(text, llm_seq_tokens(ctx, 0), (size_t)n_prompt * sizeof *text);
    memcpy(text + n_prompt, a->tokens, (size_t)a->n_tokens * sizeof *text);
    n_prompt += a->n_tokens;
    free(a);
    return n_prompt;
}

/* Passes that take no time make guessing look useless, so the drafts under test are given a state in which it pays. */
static void encourage(llm_draft *draft) {
    static const float seconds[LLM_DRAFT_SIZES] = {1, 1.01f, 1.02f, 1.03f, 1.04f};
    memset(&draft->state, 0, sizeof draft->state);
    for (int i = 0; i < LLM_DRAFT_SIZES; i++) {
        for (int j = 0; j < LLM_DRAFT_RECENT; j++) draft->state.passes[i].recent[j] = 1000 * seconds[i];
        draft->state.passes[i].n = 1 << 20;
    }
}

static void test_any_draft(void **state) {
    llm_context *ctx = open_tiny(200, 1);
    static const llm_sampler samplers[] = {{0}, {.repeat_penalty = 1.3f, .repeat_window = 8}, {.temperature = 1, .seed = 3},
                                           {.temperature = 1.4f, .top_k = 20, .top_p = 0.9f, .min_p = 0.01f, .repeat_penalty = 1.2f, .seed = 4}};
    llm_token text[256];
    (void)state;
    for (size_t i = 0; i < sizeof samplers / sizeof *samplers; i++) {
        int n = whole_text(ctx, "abcabc", &samplers[i], 180, text);
        for (int habit = RIGHT; habit <= LIES; habit++) {
            oracle o = {text, n, 0, habit};
            llm_draft draft = {.name = "oracle", .propose = oracle_propose, .user = &o};
            if (habit == CANCELS) continue;
            for (int max = 0; max < 20; max += 1 + max / 2)
                for (int tokens = 1; tokens < 180; tokens += 1 + tokens) {
                    llm_generate_desc desc = {.prompt = "abcabc", .max_tokens = tokens, .ignore_end = true, .draft_max = max,
                                              .draft_keeps_text = habit == LIES};
                    encourage(&draft);
                    check_draft(ctx, desc, &samplers[i], &draft);
                }
            llm_generate_desc endless = {.prompt = "abcabc", .ignore_end = true, .draft_keeps_text = habit == LIES};
            encourage(&draft);
            check_draft(ctx, endless, &samplers[i], &draft);
            assert_true(o.n_calls > 0);
        }
    }
    close_tiny(ctx);
}

/* Drafts that are always right, or never. */
static void test_statistics(void **state) {
    llm_context *ctx = open_tiny(200, 1);
    llm_token text[256];
    int n = whole_text(ctx, "abc", NULL, 180, text);
    oracle o = {text, n, 0, RIGHT};
    llm_draft draft = {.name = "oracle", .propose = oracle_propose, .user = &o};
    (void)state;
    encourage(&draft);
    answer *a = generate(ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 120, .ignore_end = true, .draft = &draft}, NULL, 0, 0);
    assert_draft_stats(&a->stats);
    assert_int_equal(a->stats.draft.n_accepted, a->stats.draft.n_proposed);
    assert_true(a->stats.draft.tokens_per_pass > 8 && a->stats.n_decode_passes < 20);
    assert_true(a->stats.draft.speedup > 1);
    free(a);
    encourage(&draft);
    a = generate(ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 120, .ignore_end = true, .draft = &draft, .draft_max = 3}, NULL, 0, 0);
    assert_true(a->stats.draft.n_by_accepted[3] > 20 && a->stats.draft.n_by_accepted[4] == 0);
    free(a);
    o.habit = WRONG;
    encourage(&draft);
    a = generate(ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 120, .ignore_end = true, .draft = &draft}, NULL, 0, 0);
    assert_int_equal(a->stats.draft.n_accepted, 0);
    assert_true(a->stats.n_decode_passes == 119 && a->stats.draft.n_passes == a->stats.draft.n_by_accepted[0]);
    free(a);
    o.habit = FAILS;
    o.n_calls = 0;
    encourage(&draft);
    a = generate(ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 120, .ignore_end = true, .draft = &draft}, NULL, 0, 0);
    assert_true(a->stats.draft.failed && o.n_calls == 1 && a->n_tokens == 120);
    free(a);
    close_tiny(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_any_draft), cmocka_unit_test(test_statistics)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
