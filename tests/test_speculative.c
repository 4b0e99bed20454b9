/* Speculative decoding: with any draft, the text is the same as without one, or has the same distribution; also with a
   mask or a grammar.
   Variants: asan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

static const tiny_spec SPEC = {2, 40, 56, 4, 2, 12, 256, 9, 1, 0, 21};
enum { N_VOCAB = 265, END = 263, ROOM = 8192 };

static llm_context *open_tiny(int n_ctx, int n_seq) {
    return create_context(load_tiny(&SPEC, LLM_DTYPE_F32),
                          &(llm_context_desc){.n_ctx = n_ctx, .n_seq = n_seq, .n_logits = 16, .n_threads = 1});
}

static llm_draft draft_model(llm_context *ctx, const llm_model *model) {
    llm_draft draft;
    llm_error err;
    if (llm_draft_model(&draft, ctx, model, &err)) fail_msg("%s", err.message);
    return draft;
}

/* ---- Drafts with all kinds of behaviour ---- */

typedef struct oracle {
    const llm_token *text; /* the prompt and the text that the model will generate */
    int n, n_calls;
    enum { RIGHT, WRONG, HALF, OUTSIDE, TOO_MANY, TOO_FEW, FAILS, CANCELS, ODD_KIND, LIES } habit;
} oracle;

static llm_status oracle_propose(void *user, const llm_draft_request *r, llm_draft_guesses *g, llm_error *err) {
    oracle *o = (oracle *)user;
    int wanted = r->n_wanted[0];
    o->n_calls++;
    assert_int_equal(r->n_tokens, llm_seq_length(r->ctx, r->seq) + 1);
    assert_in_range(wanted, 0, LLM_DRAFT_MAX);
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
    if (o->habit == LIES) g->has_q = true; /* but q is not filled, and may be NULL */
    return LLM_OK;
}

/* The output of one generation. */
typedef struct answer {
    char text[ROOM];
    size_t n_bytes;
    llm_token tokens[1024];
    int n_tokens;
    int last_token;         /* on_token returns false at this call; 0: never */
    int n_polls, last_poll; /* cancel returns true at this poll; 0: no cancel callback */
    int length;             /* length of the sequence afterwards */
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

static answer *generate(llm_context *ctx, llm_generate_desc desc, const llm_sampler *sampler, int last_token,
                        int last_poll) {
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
    for (int i = 0; i <= LLM_DRAFT_MAX; i++) {
        passes += d->n_by_accepted[i];
        accepted += i * d->n_by_accepted[i];
    }
    assert_int_equal(passes, d->n_passes);
    assert_int_equal(accepted, d->n_accepted);
    assert_true(d->n_accepted <= d->n_proposed && d->n_passes <= s->n_decode_passes);
    if (passes) assert_true(fabs(d->tokens_per_pass - 1 - (double)accepted / passes) < 1e-9);
    if (s->stop != LLM_STOP_CALLBACK) assert_true(s->n_decode_passes + d->n_accepted >= s->n_generated - 1);
}

/* Generates with and without the draft. The results must be the same. */
static void check_draft(llm_context *ctx, llm_generate_desc desc, const llm_sampler *sampler, llm_draft *draft) {
    answer *plain = generate(ctx, desc, sampler, 0, 0);
    desc.draft = draft;
    answer *quick = generate(ctx, desc, sampler, 0, 0);
    assert_same(quick, plain);
    assert_draft_stats(&quick->stats);
    free(plain);
    free(quick);
}

/* Writes the prompt and the generated tokens to `text`. Returns their number. */
static int whole_text(llm_context *ctx, const char *prompt, const llm_sampler *sampler, int n, llm_token *text) {
    answer *a =
        generate(ctx, (llm_generate_desc){.prompt = prompt, .max_tokens = n, .ignore_end = true}, sampler, 0, 0);
    int n_prompt = a->stats.n_prompt;
    memcpy(text, llm_seq_tokens(ctx, 0), (size_t)n_prompt * sizeof *text);
    memcpy(text + n_prompt, a->tokens, (size_t)a->n_tokens * sizeof *text);
    n_prompt += a->n_tokens;
    free(a);
    return n_prompt;
}

/* Sets the measured times as if passes of one token were very slow and longer passes very fast, so that guesses pay off
   until real times are known. */
static void encourage(llm_draft *draft) {
    memset(&draft->learnt, 0, sizeof draft->learnt);
    for (int i = 0; i < LLM_DRAFT_LEARNT_SIZES; i++) {
        for (int j = 0; j < LLM_DRAFT_LEARNT_TIMES; j++)
            draft->learnt.passes[i].recent[j] = i ? 1e-9f * (1 + 0.01f * (float)i) : 1000;
        draft->learnt.passes[i].n = 1 << 20;
    }
    draft->learnt.seconds = 1e9;
}

static void test_any_draft(void **state) {
    llm_context *ctx = open_tiny(200, 1);
    static const llm_sampler samplers[] = {
        {0},
        {.repeat_penalty = 1.3f, .repeat_window = 8},
        {.temperature = 1, .seed = 3},
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
                    llm_generate_desc desc = {.prompt = "abcabc",
                                              .max_tokens = tokens,
                                              .ignore_end = true,
                                              .draft_max = max,
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
    close_context(ctx);
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
    answer *a = generate(
        ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 120, .ignore_end = true, .draft = &draft}, NULL, 0, 0);
    assert_draft_stats(&a->stats);
    assert_int_equal(a->stats.draft.n_accepted, a->stats.draft.n_proposed);
    assert_true(a->stats.draft.tokens_per_pass > 2 && a->stats.n_decode_passes < 60);
    assert_true(a->stats.draft.speedup > 1);
    free(a);
    encourage(&draft);
    a = generate(
        ctx,
        (llm_generate_desc){.prompt = "abc", .max_tokens = 120, .ignore_end = true, .draft = &draft, .draft_max = 3},
        NULL, 0, 0);
    assert_true(a->stats.draft.n_by_accepted[3] > 2 && a->stats.draft.n_by_accepted[4] == 0);
    free(a);
    o.habit = WRONG;
    encourage(&draft);
    a = generate(ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 120, .ignore_end = true, .draft = &draft},
                 NULL, 0, 0);
    assert_int_equal(a->stats.draft.n_accepted, 0);
    assert_true(a->stats.n_decode_passes == 119 && a->stats.draft.n_proposed > 0);
    free(a);
    o.habit = FAILS;
    o.n_calls = 0;
    encourage(&draft);
    a = generate(ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 120, .ignore_end = true, .draft = &draft},
                 NULL, 0, 0);
    assert_true(a->stats.draft.failed && o.n_calls == 1 && a->n_tokens == 120);
    free(a);
    close_context(ctx);
}

/* ---- The library's own drafts ---- */

/* Drafts: the model's own weights in several types, on the same cache; another model; prompt lookup. */
static void test_own_drafts(void **state) {
    llm_context *ctx = open_tiny(200, 2);
    tiny_spec small = {1, 16, 24, 2, 1, 8, 64, 9, 0, 0, 3}; /* its context is shorter than the text */
    llm_model *models[] = {load_tiny(&SPEC, LLM_DTYPE_F32), load_tiny(&SPEC, LLM_DTYPE_INT8),
                           load_tiny(&SPEC, LLM_DTYPE_INT4), load_tiny(&small, LLM_DTYPE_BF16)};
    static const llm_sampler samplers[] = {{0}, {.temperature = 1, .top_k = 30, .seed = 3}};
    (void)state;
    for (int i = 0; i < 5; i++) {
        llm_draft draft = i < 4 ? draft_model(ctx, models[i]) : llm_draft_lookup();
        for (int j = 0; j < 2; j++)
            for (int seq = 0; seq < 2; seq++)
                for (int tokens = 0; tokens < 150; tokens += 60) {
                    llm_generate_desc desc = {.prompt = tokens == 60 ? "abcdabcdabcd"
                                                                     : "some other prompt, some other prompt",
                                              .seq = seq,
                                              .max_tokens = tokens,
                                              .ignore_end = true,
                                              .draft_keeps_text = true};
                    encourage(&draft);
                    check_draft(ctx, desc, &samplers[j], &draft);
                }
        encourage(&draft);
        answer *a = generate(
            ctx, (llm_generate_desc){.prompt = "abcdabcd", .max_tokens = 150, .ignore_end = true, .draft = &draft},
            NULL, 0, 0);
        if (!a->stats.draft.n_proposed || a->stats.draft.failed)
            fail_msg("draft %d: %d guesses", i, a->stats.draft.n_proposed);
        if (i == 0) assert_int_equal(a->stats.draft.n_accepted, a->stats.draft.n_proposed); /* the same model */
        if (i == 1) assert_true(a->stats.draft.n_accepted > a->stats.draft.n_proposed / 2);
        free(a);
        llm_draft_free(&draft);
        llm_draft_free(&draft);
    }
    for (int i = 0; i < 4; i++) llm_model_free(models[i]);
    close_context(ctx);
}

/* Two sequences that alternate and share a draft; a fork; a sequence that is saved and restored. */
static void test_sequences(void **state) {
    llm_context *ctx = open_tiny(200, 3);
    llm_model *model = load_tiny(&SPEC, LLM_DTYPE_INT8);
    llm_draft drafts[] = {draft_model(ctx, model), llm_draft_lookup()};
    llm_generate_desc desc[2] = {{.prompt = "one thing one thing", .max_tokens = 60, .ignore_end = true},
                                 {.prompt = "another another", .max_tokens = 60, .ignore_end = true, .seq = 1}};
    (void)state;
    for (int d = 0; d < 2; d++) {
        encourage(&drafts[d]);
        for (int i = 0; i < 4; i++) check_draft(ctx, desc[i % 2], NULL, &drafts[d]);
        answer *whole = generate(ctx, desc[0], NULL, 0, 0), *rest;
        llm_token text[256];
        int n = whole->stats.n_prompt, half = n + 25;
        memcpy(text, llm_seq_tokens(ctx, 0), (size_t)(n + 59) * sizeof *text);
        desc[0].draft = &drafts[d];
        for (int restored = 0; restored < 2; restored++) {
            size_t size;
            assert_int_equal(llm_seq_fork(ctx, 2, 0, half, NULL), LLM_OK);
            size = llm_seq_save_size(ctx, 2);
            void *saved = malloc(size);
            assert_int_equal(llm_seq_save(ctx, 2, saved, size, NULL), LLM_OK);
            if (restored) assert_int_equal(llm_seq_truncate(ctx, 2, 0, NULL), LLM_OK);
            if (restored) assert_int_equal(llm_seq_restore(ctx, 2, saved, size, NULL), LLM_OK);
            free(saved);
            llm_stats stats;
            answer *a = (answer *)calloc(1, sizeof *a);
            llm_generate_desc on = {.tokens = text,
                                    .n_tokens = half,
                                    .seq = 2,
                                    .max_tokens = 35,
                                    .ignore_end = true,
                                    .draft = &drafts[d],
                                    .on_token = on_token,
                                    .user = a};
            encourage(&drafts[d]);
            assert_int_equal(llm_generate(ctx, &on, &stats, NULL), LLM_OK);
            assert_int_equal(stats.n_reused, half - 1);
            assert_memory_equal(a->tokens, whole->tokens + 25, 35 * sizeof *a->tokens);
            free(a);
        }
        rest = generate(ctx, desc[0], NULL, 0, 0);
        assert_same(rest, whole);
        free(rest);
        free(whole);
        desc[0].draft = NULL;
        llm_draft_free(&drafts[d]);
    }
    llm_model_free(model);
    close_context(ctx);
}

/* ---- Ends ---- */

static void test_stops(void **state) {
    llm_context *ctx = open_tiny(200, 1);
    static const llm_logit_bias bias = {END, 2};
    llm_sampler sampler = {.temperature = 1, .seed = 5, .biases = &bias, .n_biases = 1};
    llm_token text[256];
    int n = whole_text(ctx, "abc", &sampler, 180, text), n_ended = 0;
    oracle o = {text, n, 0, RIGHT};
    llm_draft draft = {.name = "oracle", .propose = oracle_propose, .user = &o};
    answer *all =
        generate(ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 60, .ignore_end = true}, &sampler, 0, 0);
    (void)state;
    for (int i = 0; i < 60; i++) {
        char stop[4] = {0};
        const char *stops[] = {stop};
        memcpy(stop, all->text + i, 2);
        llm_generate_desc desc = {
            .prompt = "abc", .max_tokens = 60, .stop_tokens = &all->tokens[i], .n_stop_tokens = 1, .ignore_end = true};
        encourage(&draft);
        check_draft(ctx, desc, &sampler, &draft);
        desc.n_stop_tokens = 0;
        desc.stop_strings = stops;
        desc.n_stop_strings = stop[0] != 0;
        check_draft(ctx, desc, &sampler, &draft);
        desc.n_stop_strings = 0;
        desc.ignore_end = false;
        sampler.seed = (uint64_t)i;
        check_draft(ctx, desc, &sampler, &draft);
        answer *plain = generate(ctx, desc, &sampler, i + 1, 0);
        n_ended += plain->stats.stop == LLM_STOP_END;
        desc.draft = &draft;
        answer *quick = generate(ctx, desc, &sampler, i + 1, 0);
        assert_same(quick, plain);
        free(plain);
        free(quick);
        sampler.seed = 5;
    }
    assert_true(n_ended > 5);
    free(all);
    close_context(ctx);
}

/* The text ends at the end of the context, or when a cache shared with another sequence is full. */
static void test_full(void **state) {
    llm_context *wide = open_tiny(256, 1);
    llm_model *int8 = load_tiny(&SPEC, LLM_DTYPE_INT8);
    llm_token ids[40] = {1, 2, 3};
    (void)state;
    for (int n_ctx = 33; n_ctx < 70; n_ctx += 5) {
        llm_context *ctx = create_context(
            llm_context_model(wide),
            &(llm_context_desc){.n_ctx = n_ctx, .n_seq = 2, .n_cache = 96, .n_logits = 16, .n_threads = 1});
        for (int shared = 0; shared < 2; shared++) {
            llm_draft drafts[] = {llm_draft_lookup(), draft_model(ctx, int8)};
            assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
            if (shared)
                free(generate(ctx, (llm_generate_desc){.tokens = ids, .n_tokens = 33, .max_tokens = 1, .seq = 1}, NULL,
                              0, 0));
            for (int d = 0; d < 2; d++) {
                encourage(&drafts[d]);
                check_draft(ctx, (llm_generate_desc){.tokens = ids, .n_tokens = 3, .ignore_end = true}, NULL,
                            &drafts[d]);
                llm_draft_free(&drafts[d]);
            }
            assert_int_equal(llm_seq_length(ctx, 0), shared && n_ctx > 32 ? 32 : n_ctx);
        }
        llm_context_free(ctx);
    }
    llm_model_free(int8);
    close_context(wide);
}

/* Cancels at every poll, including those in the draft's passes. The shown text must be a prefix of the full text, the
   sequence must hold the tokens computed so far, and the next call must give the full text. */
static void test_cancelled(void **state) {
    llm_context *ctx = open_tiny(128, 1);
    llm_model *int8 = load_tiny(&SPEC, LLM_DTYPE_INT8);
    llm_draft draft = draft_model(ctx, int8);
    llm_generate_desc desc = {.prompt = "abcabcabc", .max_tokens = 40, .ignore_end = true, .draft = &draft};
    (void)state;
    encourage(&draft);
    answer *all = generate(ctx, desc, NULL, 0, INT32_MAX);
    for (int poll = 1; poll <= all->n_polls; poll++) {
        encourage(&draft);
        answer *a = generate(ctx, desc, NULL, 0, poll);
        if (a->n_polls < poll) { /* the number of passes depends on measured times */
            assert_same(a, all);
            free(a);
            continue;
        }
        assert_int_equal(a->stats.stop, LLM_STOP_CALLBACK);
        assert_int_equal(a->n_polls, poll);
        assert_memory_equal(a->tokens, all->tokens, (size_t)a->n_tokens * sizeof *a->tokens);
        assert_int_equal(a->length, a->n_tokens ? a->stats.n_prompt + a->n_tokens - 1 : 0);
        free(a);
        a = generate(ctx, desc, NULL, 0, 0);
        assert_same(a, all);
        free(a);
    }
    oracle o = {NULL, 0, 0, CANCELS};
    llm_draft lazy = {.name = "oracle", .propose = oracle_propose, .user = &o};
    desc.draft = &lazy;
    encourage(&lazy);
    answer *a = generate(ctx, desc, NULL, 0, 0);
    assert_int_equal(a->stats.stop, LLM_STOP_CALLBACK);
    assert_memory_equal(a->tokens, all->tokens, (size_t)a->n_tokens * sizeof *a->tokens);
    free(a);
    free(all);
    llm_draft_free(&draft);
    llm_model_free(int8);
    close_context(ctx);
}

/* ---- Mistakes ---- */

static void test_refused(void **state) {
    llm_context *ctx = open_tiny(64, 1);
    tiny_spec other = SPEC;
    llm_error err;
    llm_draft draft, none;
    (void)state;
    other.n_extra = 40; /* the special tokens get other ids */
    llm_model *model = load_tiny(&other, LLM_DTYPE_F32), *same = load_tiny(&SPEC, LLM_DTYPE_INT8);
    assert_int_equal(llm_draft_model(&draft, ctx, model, &err), LLM_ERROR_ARGUMENT);
    assert_true(strstr(err.message, "token 263") && strstr(err.message, "<|end|>"));
    llm_model_free(model);
    assert_int_equal(llm_draft_model(NULL, ctx, same, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_draft_model(&draft, NULL, same, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_draft_model(&draft, ctx, NULL, &err), LLM_ERROR_ARGUMENT);
    llm_draft_free(NULL);

    llm_generate_desc desc = {.prompt = "abc", .max_tokens = 5, .draft = &draft};
    llm_context *narrow = create_context(llm_context_model(ctx), &(llm_context_desc){.n_ctx = 64, .n_threads = 1});
    draft = llm_draft_lookup();
    assert_int_equal(llm_generate(narrow, &desc, NULL, &err), LLM_ERROR_ARGUMENT);
    assert_true(strstr(err.message, "n_logits"));
    desc.draft_max = -1;
    assert_int_equal(llm_generate(ctx, &desc, NULL, &err), LLM_ERROR_ARGUMENT);
    memset(&none, 0, sizeof none);
    desc.draft_max = 0;
    desc.draft = &none;
    assert_int_equal(llm_generate(ctx, &desc, NULL, &err), LLM_ERROR_ARGUMENT);

    /* A draft made for another context fails, but the text is generated. */
    llm_context *second =
        create_context(llm_context_model(ctx), &(llm_context_desc){.n_ctx = 64, .n_logits = 8, .n_threads = 1});
    llm_stats stats;
    draft = draft_model(ctx, same);
    encourage(&draft);
    desc.draft = &draft;
    desc.max_tokens = 20;
    assert_int_equal(llm_generate(second, &desc, &stats, &err), LLM_OK);
    assert_true(stats.draft.failed && stats.n_generated > 0);
    llm_draft_free(&draft);
    llm_context_free(second);
    llm_context_free(narrow);
    llm_model_free(same);
    close_context(ctx);
}

/* A draft may have a padded vocabulary. Its extra ids are never guessed. */
static void test_padded(void **state) {
    llm_context *ctx = open_tiny(200, 1);
    llm_model_desc desc = {.dtype = LLM_DTYPE_BF16, .n_threads = 1};
    size_t size;
    uint8_t *data = tiny_padded(&SPEC, 20, &size);
    llm_model *model = load_memory(data, size, &desc);
    free(data);
    llm_draft draft = draft_model(ctx, model);
    static const llm_sampler samplers[] = {{0}, {.temperature = 1, .seed = 3}};
    (void)state;
    assert_int_equal(llm_model_get_info(model).n_vocab, N_VOCAB + 20);
    for (int i = 0; i < 2; i++) {
        llm_sampler sampler = samplers[i];
        encourage(&draft);
        llm_stats stats;
        llm_generate_desc desc = {
            .prompt = "abc", .max_tokens = 100, .ignore_end = true, .sampler = &sampler, .draft = &draft};
        assert_int_equal(llm_generate(ctx, &desc, &stats, NULL), LLM_OK);
        assert_true(stats.draft.n_proposed > 0 && !stats.draft.failed);
        for (int j = 0; j < llm_seq_length(ctx, 0); j++) assert_in_range(llm_seq_tokens(ctx, 0)[j], 0, N_VOCAB - 1);
    }
    llm_draft_free(&draft);
    llm_model_free(model);
    close_context(ctx);
}

/* ---- Masks and grammars ---- */

/* Forbids the last token, and all but a few letters. */
static void no_letter_twice(void *user, const llm_token *tokens, int n, float *logits, int n_vocab) {
    (void)user;
    for (llm_token i = 0; i < n_vocab; i++)
        if (i < 'a' || i > 'f' || i == tokens[n - 1]) logits[i] = -INFINITY;
}

static llm_grammar *grammar_of(llm_context *ctx, const char *regex) {
    llm_grammar *g = NULL;
    llm_error err;
    if (llm_grammar_from_regex(&g, llm_model_tokenizer(llm_context_model(ctx)), regex, NULL, &err))
        fail_msg("%s", err.message);
    return g;
}

/* Drafts keep to a grammar or a mask, and the text stays the same: at temperature 0, and with draft_keeps_text. Some
   guesses are right, and some are refused. */
static void test_constrained(void **state) {
    static const char *const regexes[] = {NULL, "[a-f]{2,60}!", "(name: [a-z]{1,9}, size: [0-9]+(cm|mm);\\n){2,4}"};
    llm_context *ctx = open_tiny(200, 2);
    tiny_spec small = {1, 16, 24, 2, 1, 8, 256, 9, 0, 0, 3};
    llm_model *models[] = {load_tiny(&SPEC, LLM_DTYPE_INT4), load_tiny(&small, LLM_DTYPE_BF16)};
    int n_proposed = 0, n_accepted = 0;
    (void)state;
    for (int d = 0; d < 3; d++) {
        llm_draft draft = d < 2 ? draft_model(ctx, models[d]) : llm_draft_lookup();
        for (int i = 0; i < 12; i++) {
            const char *regex = regexes[i % 3];
            llm_grammar *g = regex ? grammar_of(ctx, regex) : NULL;
            const bool keeps = i / 3 % 2 != 0;
            llm_sampler sampler = {.temperature = keeps ? 1.5f : 0, .seed = (uint64_t)i, .repeat_penalty = 1.1f};
            if (!g) sampler.mask = no_letter_twice;
            llm_generate_desc desc = {.prompt = "abcabcabc",
                                      .seq = i % 2,
                                      .max_tokens = 70,
                                      .grammar = g,
                                      .draft = &draft,
                                      .draft_keeps_text = keeps};
            encourage(&draft);
            check_draft(ctx, desc, &sampler, &draft);
            desc.draft_keeps_text = false; /* another text, but an allowed one */
            encourage(&draft);
            answer *a = generate(ctx, desc, &sampler, 0, 0);
            assert_false(a->stats.draft.failed);
            if (g) assert_int_equal(llm_grammar_check(g, a->text, a->n_bytes), a->stats.stop == LLM_STOP_END);
            for (int k = 0; !g && k < a->n_tokens; k++)
                assert_true(a->tokens[k] >= 'a' && a->tokens[k] <= 'f' && (!k || a->tokens[k] != a->tokens[k - 1]));
            if (!g) { /* the tokens that a grammar forces count as right guesses */
                n_proposed += a->stats.draft.n_proposed;
                n_accepted += a->stats.draft.n_accepted;
            }
            free(a);
            llm_grammar_free(g);
        }
        llm_draft_free(&draft);
    }
    assert_true(n_accepted > 20 && n_accepted < n_proposed);
    for (int i = 0; i < 2; i++) llm_model_free(models[i]);
    close_context(ctx);
}

/* ---- The distribution ---- */

/* Biases allow only these tokens, so that all texts of three tokens can be counted. */
enum { FEW = 6, CELLS = FEW * FEW * FEW };
static const llm_token allowed[FEW] = {'a', 'b', 'c', 'd', 'e', 'f'};

/* What else forbids tokens. */
typedef enum rule { NO_MORE, MASK, GRAMMAR } rule;

/* Of each pair of letters, the first may be any. After f, the second is forced. */
static const char *const PAIRS = "([a-e][a-f]|fe){3}";

/* Whether the i-th of the allowed tokens may follow a text of n tokens, the first of which is the prompt. */
static bool may_follow(rule rule, const llm_token *text, int n, int i) {
    if (rule == MASK) return allowed[i] != text[n - 1];
    return rule == NO_MORE || n % 2 || text[n - 1] != 'f' || allowed[i] == 'e';
}

typedef struct gambler {
    uint64_t random;
    enum { STEADY, STOPS, STOPS_LATE, PICKS_KIND } habit; /* how earlier guesses change what it does */
} gambler;

/* Draws guesses from a distribution unrelated to the model's: probabilities 1, 2 .. FEW divided by their sum. Depending
   on the drawn token, it may stop or change the kind of its guesses. */
static llm_status gamble(void *user, const llm_draft_request *r, llm_draft_guesses *g, llm_error *err) {
    gambler *own = (gambler *)user;
    bool stop = false;
    (void)err;
    for (g->has_q = true; g->n < r->n_wanted[0] && !stop; g->n++) {
        own->random = own->random * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX */
        int at = (int)((own->random >> 33) % (FEW * (FEW + 1) / 2)), i = 0;
        while (at > i) at -= ++i;
        g->tokens[g->n] = allowed[i];
        memset(g->q[g->n], 0, N_VOCAB * sizeof(float));
        for (int j = 0; j < FEW; j++) g->q[g->n][allowed[j]] = (float)(j + 1) / (FEW * (FEW + 1) / 2);
        stop = i > 3 && (own->habit == STOPS || (own->habit == STOPS_LATE && g->n));
        if (own->habit == PICKS_KIND) g->kind = i > 3 ? 5 : 0;
    }
    return LLM_OK;
}

/* Computes the probabilities of the allowed tokens after a text from its logits, in double. */
static void reference(llm_context *ctx, rule rule, const llm_token *text, int n, const llm_sampler *s, double *p) {
    double logits[FEW], sum = 0, kept = 0;
    int order[FEW], left = FEW;
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
    assert_int_equal(llm_forward(ctx, &(llm_batch){n, text, NULL, NULL}, NULL), LLM_OK);
    for (int i = 0; i < FEW; i++) {
        bool seen = false;
        for (int j = 0; j < n; j++) seen = seen || text[j] == allowed[i];
        logits[i] = llm_logits(ctx, n - 1)[allowed[i]];
        if (seen && s->repeat_penalty > 0)
            logits[i] = logits[i] > 0 ? logits[i] / s->repeat_penalty : logits[i] * s->repeat_penalty;
        if (!may_follow(rule, text, n, i)) logits[i] = -INFINITY;
        order[i] = i;
    }
    for (int i = 0; i < FEW; i++)
        for (int j = i + 1; j < FEW; j++)
            if (logits[order[j]] > logits[order[i]]) {
                int t = order[i];
                order[i] = order[j];
                order[j] = t;
            }
    if (s->top_k && s->top_k < left) left = s->top_k;
    for (int i = 0; i < FEW; i++) p[i] = 0;
    for (int i = 0; i < left; i++)
        sum += p[order[i]] = exp((logits[order[i]] - logits[order[0]]) / (double)s->temperature);
    for (int i = 0; i < left; i++) {
        if ((s->top_p > 0 && kept >= (double)s->top_p * sum) || p[order[i]] < (double)s->min_p * p[order[0]])
            p[order[i]] = 0;
        kept += p[order[i]];
    }
    for (int i = 0; i < FEW; i++) p[i] /= kept;
}

static void check_distribution(llm_context *ctx, rule rule, llm_sampler sampler, llm_draft *draft, int n_texts) {
    llm_grammar *g = rule == GRAMMAR ? grammar_of(ctx, PAIRS) : NULL;
    llm_token text[4] = {'b'};
    llm_logit_bias biases[N_VOCAB];
    double expected[CELLS], p[3][FEW], chi = 0;
    int seen[CELLS] = {0}, n_cells = 0, n_proposed = 0, n_accepted = 0;
    for (int i = 0; i < FEW; i++) {
        reference(ctx, rule, text, 1, &sampler, p[0]);
        text[1] = allowed[i];
        reference(ctx, rule, text, 2, &sampler, p[1]);
        for (int j = 0; j < FEW; j++) {
            text[2] = allowed[j];
            reference(ctx, rule, text, 3, &sampler, p[2]);
            for (int k = 0; k < FEW; k++) expected[(i * FEW + j) * FEW + k] = n_texts * p[0][i] * p[1][j] * p[2][k];
        }
    }
    if (rule == MASK) sampler.mask = no_letter_twice;
    sampler.biases = biases;
    for (llm_token i = 0; i < N_VOCAB; i++)
        if (i < 'a' || i >= 'a' + FEW) {
            biases[sampler.n_biases].token = i;
            biases[sampler.n_biases++].bias = -INFINITY;
        }
    encourage(draft);
    draft->learnt.guess.n = 1; /* as if guesses cost nothing and were always right: many are checked at once */
    for (int i = 0; i < LLM_DRAFT_MAX; i++) draft->learnt.n_right[0][i] = draft->learnt.n_known[0][i] = 100;
    const llm_draft_learnt willing = draft->learnt;
    for (int t = 0; t < n_texts; t++) {
        answer a;
        memset(&a.stats, 0, sizeof a.stats);
        a.n_tokens = a.last_token = 0;
        /* The prompt is a single 'b' each time, so only this token is computed again. */
        llm_generate_desc desc = {.tokens = text,
                                  .n_tokens = 1,
                                  .max_tokens = 5,
                                  .sampler = &sampler,
                                  .grammar = g,
                                  .draft = draft,
                                  .on_token = on_token,
                                  .user = &a};
        draft->learnt = willing;
        if (llm_generate(ctx, &desc, &a.stats, NULL)) fail();
        assert_int_equal(a.n_tokens, 5);
        seen[((a.tokens[0] - 'a') * FEW + a.tokens[1] - 'a') * FEW + a.tokens[2] - 'a']++;
        n_proposed += a.stats.draft.n_proposed;
        n_accepted += a.stats.draft.n_accepted;
    }
    double rest_expected = 0, rest_seen = 0;
    for (int i = 0; i <= CELLS; i++) { /* rare texts are counted together */
        bool rare = i < CELLS && expected[i] < 20;
        if (rare && expected[i] == 0) assert_int_equal(seen[i], 0);
        if (rare) rest_expected += expected[i];
        if (rare) rest_seen += seen[i];
        if (rare || (i == CELLS && rest_expected < 5)) continue;
        double e = i < CELLS ? expected[i] : rest_expected, off = (i < CELLS ? seen[i] : rest_seen) - e;
        chi += off * off / e;
        n_cells++;
    }
    double k = n_cells - 1,
           z = (pow(chi / k, 1.0 / 3) - 1 + 2 / (9 * k)) / sqrt(2 / (9 * k)); /* normal, by Wilson and Hilferty */
    print_message("%d texts by %s, %.0f %% of %d guesses right: %d cells, chi-square %.1f, %.2f standard deviations "
                  "from its mean\n",
                  n_texts, draft->name, 100.0 * n_accepted / n_proposed, n_proposed, n_cells, chi, z);
    assert_true(n_cells > 10 && fabs(z) < 3.3);
    assert_true(n_proposed > 2 * n_texts && n_accepted > n_texts / 10 && n_accepted < n_proposed);
    llm_grammar_free(g);
}

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SLOW
#endif
#endif
#if defined(__SANITIZE_THREAD__) || defined(SLOW)
enum { TEXTS = 3000 };
#else
enum { TEXTS = 40000 }; /* texts of five tokens */
#endif

static void free_draws(llm_context *ctx, gambler *own, llm_draft drafts[2]) {
    for (uint64_t d = 0; d < 2; d++) {
        check_distribution(ctx, NO_MORE, (llm_sampler){.temperature = 1, .seed = 1 + d}, &drafts[d], TEXTS);
        check_distribution(ctx, NO_MORE, (llm_sampler){.temperature = 1.5f, .top_k = 4, .seed = 3 + d}, &drafts[d],
                           TEXTS / 2);
        check_distribution(ctx, NO_MORE, (llm_sampler){.temperature = 1.2f, .top_p = 0.85f, .seed = 5 + d}, &drafts[d],
                           TEXTS / 2);
        check_distribution(
            ctx, NO_MORE,
            (llm_sampler){
                .temperature = 2, .top_k = 5, .top_p = 0.95f, .min_p = 0.05f, .repeat_penalty = 1.3f, .seed = 7 + d},
            &drafts[d], TEXTS / 2);
    }
    static const char *const names[] = {"", "one that stops", "one that stops late", "one that picks a kind"};
    for (own->habit = STOPS; own->habit <= PICKS_KIND; own->habit++) {
        drafts[1].name = names[own->habit];
        check_distribution(ctx, NO_MORE, (llm_sampler){.temperature = 1, .seed = 20 + own->habit}, &drafts[1], TEXTS);
    }
}

/* With a mask, which depends on the text so far, and with a grammar, which forces some tokens. */
static void constrained_draws(llm_context *ctx, gambler *own, llm_draft drafts[2]) {
    (void)own;
    for (uint64_t d = 0; d < 2; d++)
        for (rule rule = MASK; rule <= GRAMMAR; rule++) {
            check_distribution(ctx, rule, (llm_sampler){.temperature = 1, .seed = 30 + d}, &drafts[d], TEXTS / 16);
            check_distribution(ctx, rule,
                               (llm_sampler){.temperature = 1.5f, .top_k = 4, .repeat_penalty = 1.3f, .seed = 32 + d},
                               &drafts[d], TEXTS / 16);
        }
}

/* Runs a check with two drafts: the model itself as int4, and a gambler. */
static void with_drafts(void (*check)(llm_context *ctx, gambler *own, llm_draft drafts[2]), uint64_t random) {
    llm_context *ctx = open_tiny(32, 1);
    llm_model *int4 = load_tiny(&SPEC, LLM_DTYPE_INT4);
    gambler own = {random, STEADY};
    llm_draft drafts[] = {draft_model(ctx, int4), {.name = "a gambler", .propose = gamble, .user = &own}};
    check(ctx, &own, drafts);
    llm_draft_free(&drafts[0]);
    llm_model_free(int4);
    close_context(ctx);
}

static void test_distribution(void **state) {
    (void)state;
    with_drafts(free_draws, 99);
}

static void test_distribution_constrained(void **state) {
    (void)state;
    with_drafts(constrained_draws, 7);
}

/* Guesses with probabilities in the draft's own memory, whether or not the library offers memory for them. */
static llm_status propose_own_q(void *user, const llm_draft_request *r, llm_draft_guesses *g, llm_error *err) {
    static float even[N_VOCAB];
    uint32_t *random = (uint32_t *)user;
    (void)err;
    for (int i = 0; i < N_VOCAB; i++) even[i] = 1.0f / N_VOCAB;
    for (g->has_q = true; g->n < r->n_wanted[0]; g->n++) {
        *random = *random * 1664525u + 1013904223u;
        g->tokens[g->n] = (llm_token)((*random >> 8) % N_VOCAB);
        g->q[g->n] = even;
    }
    return LLM_OK;
}

static void test_keeps_text(void **state) {
    llm_context *ctx = open_tiny(64, 1);
    uint32_t random = 1;
    llm_draft draft = {.name = "own q", .propose = propose_own_q, .user = &random};
    (void)state;
    for (uint64_t seed = 0; seed < 10; seed++) {
        encourage(&draft);
        draft.learnt.guess.n = 1;
        check_draft(
            ctx, (llm_generate_desc){.prompt = "abc", .max_tokens = 20, .ignore_end = true, .draft_keeps_text = true},
            &(llm_sampler){.temperature = 1, .seed = seed}, &draft);
    }
    close_context(ctx);
}

/* ---- Calls that end early ---- */

typedef struct breaker {
    jmp_buf back;
    heap h;
    llm_context *ctx;
    int n_tokens, last_token, n_polls, last_poll; /* the call at which it leaves; 0: none */
} breaker;

static bool break_token(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    breaker *b = (breaker *)user;
    (void)token, (void)bytes, (void)n_bytes;
    if (++b->n_tokens == b->last_token) longjmp(b->back, 1);
    return true;
}

static bool break_poll(void *user) {
    breaker *b = (breaker *)user;
    if (++b->n_polls == b->last_poll) longjmp(b->back, 1);
    return false;
}

static llm_status break_generate(void *user, llm_error *err) {
    breaker *b = (breaker *)user;
    llm_draft draft = llm_draft_lookup();
    b->n_tokens = 0;
    encourage(&draft);
    return llm_generate(b->ctx,
                        &(llm_generate_desc){.prompt = "abcabcabc",
                                             .max_tokens = 40,
                                             .ignore_end = true,
                                             .draft = &draft,
                                             .on_token = break_token,
                                             .user = b},
                        NULL, err);
}

/* Wherever an allocation fails, the sequence must not hold guesses that were not accepted. */
static void test_starved(void **state) {
    breaker b;
    llm_context *plain = open_tiny(128, 1);
    llm_error err;
    memset(&b, 0, sizeof b);
    (void)state;
    b.ctx = create_context(llm_context_model(plain),
                           &(llm_context_desc){.n_ctx = 128, .n_logits = 16, .n_threads = 1, .host = heap_host(&b.h)});
    llm_token text[256];
    int n = whole_text(plain, "abcabcabc", NULL, 40, text);
    for (int64_t k = 1, done = 0; !done; k++) {
        assert_int_equal(llm_seq_truncate(b.ctx, 0, 0, NULL), LLM_OK);
        b.h.n_calls = 0;
        b.h.fail_at = k;
        llm_status status = break_generate(&b, &err);
        b.h.fail_at = 0;
        done = status == LLM_OK;
        if (!done) assert_int_equal(status, LLM_ERROR_MEMORY);
        int length = llm_seq_length(b.ctx, 0);
        assert_true(length == 0 || length == n - 40 + b.n_tokens - 1);
        assert_memory_equal(llm_seq_tokens(b.ctx, 0), text, (size_t)length * sizeof *text);
    }
    llm_context_free(b.ctx);
    assert_all_returned(&b.h);
    close_context(plain);
}

/* Callbacks leave by longjmp, as a C++ exception would, also during a draft's pass. The next call must continue from
   the accepted tokens; nothing may hang or leak. */
static void test_left_by_longjmp(void **state) {
    llm_context *plain = open_tiny(128, 1);
    llm_model *int8 = load_tiny(&SPEC, LLM_DTYPE_INT8);
    static breaker b;
    static volatile int at, kind;
    static llm_token text[256];
    static int n;
    (void)state;
    n = whole_text(plain, "abcabcabc", NULL, 40, text);
    for (kind = 0; kind < 3; kind++) {
        static llm_draft draft;
        memset(&b, 0, sizeof b);
        b.ctx = create_context(
            llm_context_model(plain),
            &(llm_context_desc){
                .n_ctx = 128, .n_cache = 128, .n_batch = 16, .n_logits = 16, .n_threads = 2, .host = heap_host(&b.h)});
        draft = kind == 2 ? draft_model(b.ctx, int8) : llm_draft_lookup();
        llm_generate_desc desc = {.prompt = "abcabcabc",
                                  .max_tokens = 40,
                                  .ignore_end = true,
                                  .draft = &draft,
                                  .on_token = break_token,
                                  .user = &b};
        if (kind) desc.cancel = break_poll;
        for (at = 1; at < (kind ? 200 : 40); at += kind ? 7 : 1) {
            static int64_t live;
            static volatile bool broke;
            assert_int_equal(llm_seq_truncate(b.ctx, 0, 0, NULL), LLM_OK);
            encourage(&draft);
            live = b.h.live;
            b.n_tokens = b.n_polls = 0;
            b.last_token = kind ? 0 : at;
            b.last_poll = kind ? at : 0;
            broke = true;
            if (!setjmp(b.back)) {
                assert_int_equal(llm_generate(b.ctx, &desc, NULL, NULL), LLM_OK);
                broke = false;
            }
            b.last_token = b.last_poll = 0;
            int length = llm_seq_length(b.ctx, 0);
            assert_true(length == 0 || length == n - 40 + b.n_tokens - 1);
            assert_memory_equal(llm_seq_tokens(b.ctx, 0), text, (size_t)length * sizeof *text);
            encourage(&draft);
            assert_int_equal(llm_generate(b.ctx, &desc, NULL, NULL), LLM_OK);
            assert_memory_equal(llm_seq_tokens(b.ctx, 0), text, (size_t)(n - 1) * sizeof *text);
            assert_int_equal(b.h.live, live);
            if (!broke) break;
        }
        assert_int_equal(llm_seq_truncate(b.ctx, 0, 0, NULL), LLM_OK);
        free(generate(b.ctx, (llm_generate_desc){.prompt = "abc", .ignore_end = true}, NULL, 0,
                      0)); /* no block of the cache is lost */
        assert_int_equal(llm_seq_length(b.ctx, 0), 128);
        llm_draft_free(&draft);
        llm_context_free(b.ctx);
        assert_all_returned(&b.h);
    }
    llm_model_free(int8);
    close_context(plain);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_any_draft),
                                       cmocka_unit_test(test_statistics),
                                       cmocka_unit_test(test_own_drafts),
                                       cmocka_unit_test(test_sequences),
                                       cmocka_unit_test(test_stops),
                                       cmocka_unit_test(test_full),
                                       cmocka_unit_test(test_cancelled),
                                       cmocka_unit_test(test_refused),
                                       cmocka_unit_test(test_padded),
                                       cmocka_unit_test(test_keeps_text),
                                       cmocka_unit_test(test_starved),
                                       cmocka_unit_test(test_left_by_longjmp),
                                       cmocka_unit_test(test_constrained),
                                       cmocka_unit_test(test_distribution),
                                       cmocka_unit_test(test_distribution_constrained)};
    if (SANITIZED) cmocka_set_skip_filter("test_distribution*");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
