/* Sequences in a context: bad calls are refused before any work; forks, truncation, saving, cancelling, free positions.
   Variants: asan tsan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

static const tiny_spec SPEC = {2, 40, 56, 4, 2, 12, 512, 9, 0, 0, 11};
enum { N_VOCAB = 265 };

static llm_model *load_changed(const tiny_spec *spec, llm_dtype dtype, const char *key, float value) {
    llm_model_desc desc = {.dtype = dtype, .n_threads = 1};
    size_t size, n = key ? strlen(key) : 0;
    uint8_t *data = tiny_model(spec, &size);
    for (size_t at = 0; key && at + n + 8 < size; at++)
        if (!memcmp(data + at, key, n)) memcpy(data + at + n + 4, &value, 4); /* the value follows its type */
    llm_model *model = load_memory(data, size, &desc);
    free(data);
    return model;
}

static llm_model *load(uint32_t seed) {
    tiny_spec spec = SPEC;
    spec.seed = seed;
    return load_changed(&spec, LLM_DTYPE_F32, NULL, 0);
}

static llm_token token_at(int text, int i) {
    return (llm_token)((uint32_t)(text * 7919 + i * 104729 + 1) * 2654435761u % N_VOCAB);
}

/* Appends tokens [from, to) of a text to a sequence. Computes the logits of all of them if they fit, otherwise of the
   last. */
static llm_status append(llm_context *ctx, int seq, int text, int from, int to, llm_error *err) {
    llm_token tokens[512];
    int seqs[512];
    for (int i = from; i < to; i++) {
        tokens[i - from] = token_at(text, i);
        seqs[i - from] = seq;
    }
    llm_batch batch = {to - from, tokens, seqs, NULL};
    return llm_forward(ctx, &batch, err);
}

static void must_append(llm_context *ctx, int seq, int text, int from, int to) {
    llm_error err;
    if (append(ctx, seq, text, from, to, &err)) fail_msg("%s", err.message);
}

/* Computes the last logits of a text in a context that holds nothing else. All other contexts must give the same
   bits. */
static const float *reference(llm_context *own, const llm_token *tokens, int n) {
    llm_batch batch = {n, tokens, NULL, NULL};
    assert_int_equal(llm_seq_truncate(own, 0, 0, NULL), LLM_OK);
    assert_int_equal(llm_forward(own, &batch, NULL), LLM_OK);
    return llm_logits(own, n - 1);
}

static void assert_logits(llm_context *ctx, int i, int seq, llm_context *own) {
    const float *expected = reference(own, llm_seq_tokens(ctx, seq), llm_seq_length(ctx, seq)),
                *got = llm_logits(ctx, i);
    assert_non_null(got);
    assert_memory_equal(got, expected, N_VOCAB * sizeof *got);
}

/* ---- Refused calls ---- */

static void assert_refused(llm_context *ctx, const llm_batch *batch, llm_status status, const char *first,
                           const char *second) {
    llm_error err;
    int lengths[4];
    for (int i = 0; i < 4; i++) lengths[i] = llm_seq_length(ctx, i);
    assert_int_equal(llm_forward(ctx, batch, &err), status);
    assert_int_equal(err.code, status);
    if (!strstr(err.message, first) || !strstr(err.message, second))
        fail_msg("the message lacks \"%s\" or \"%s\": %s", first, second, err.message);
    for (int i = 0; i < 4; i++) assert_int_equal(llm_seq_length(ctx, i), lengths[i]);
}

static void test_refused(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 100, .n_seq = 4, .n_cache = 192, .n_logits = 3, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc);
    llm_token tokens[200] = {5, 6, 7, 8};
    int seqs[200] = {0, 1, 2, 3};
    const bool all[4] = {true, true, true, true};
    static const llm_token bad_tokens[] = {-1, N_VOCAB, INT32_MAX, INT32_MIN};
    static const int bad_seqs[] = {-1, 4, INT32_MAX, INT32_MIN};
    (void)state;
    must_append(ctx, 0, 0, 0, 10);
    for (int i = 0; i < 4; i++) {
        tokens[3] = bad_tokens[i];
        assert_refused(ctx, &(llm_batch){4, tokens, NULL, NULL}, LLM_ERROR_ARGUMENT, "token 3", "265");
        tokens[3] = 8;
        seqs[3] = bad_seqs[i];
        assert_refused(ctx, &(llm_batch){4, tokens, seqs, NULL}, LLM_ERROR_ARGUMENT, "sequence", "4");
        seqs[3] = 3;
    }
    assert_refused(ctx, &(llm_batch){0, tokens, seqs, NULL}, LLM_ERROR_ARGUMENT, "no tokens", "");
    assert_refused(ctx, &(llm_batch){-1, tokens, seqs, NULL}, LLM_ERROR_ARGUMENT, "no tokens", "");
    assert_refused(ctx, &(llm_batch){1, NULL, seqs, NULL}, LLM_ERROR_ARGUMENT, "no tokens", "");
    assert_refused(ctx, &(llm_batch){4, tokens, NULL, all}, LLM_ERROR_ARGUMENT, "4", "3");
    assert_refused(ctx, &(llm_batch){4, tokens, seqs, NULL}, LLM_ERROR_ARGUMENT, "4", "3");
    assert_refused(ctx, &(llm_batch){91, tokens, NULL, NULL}, LLM_ERROR_CONTEXT_FULL, "91", "100");
    for (int i = 0; i < 200; i++) seqs[i] = 1 + i % 2;
    assert_refused(ctx, &(llm_batch){198, tokens, seqs, NULL}, LLM_ERROR_CONTEXT_FULL, "256",
                   "160"); /* 99 positions each, in blocks of 32 */
    assert_int_equal(llm_forward(ctx, NULL, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_forward(NULL, NULL, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_seq_length(ctx, 0), 10);
    must_append(ctx, 0, 0, 10, 100); /* fills the sequence */
    llm_context_free(ctx);
    llm_model_free(model);
}

static void test_sequence_arguments(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 100, .n_seq = 2, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc);
    char buffer[64];
    static const int bad[] = {-1, 2, INT32_MAX, INT32_MIN};
    (void)state;
    must_append(ctx, 0, 0, 0, 40);
    for (int i = 0; i < 4; i++) {
        assert_int_equal(llm_seq_length(ctx, bad[i]), 0);
        assert_null(llm_seq_tokens(ctx, bad[i]));
        assert_int_equal(llm_seq_truncate(ctx, bad[i], 0, NULL), LLM_ERROR_ARGUMENT);
        assert_int_equal(llm_seq_fork(ctx, bad[i], 0, 0, NULL), LLM_ERROR_ARGUMENT);
        assert_int_equal(llm_seq_fork(ctx, 0, bad[i], 0, NULL), LLM_ERROR_ARGUMENT);
        assert_int_equal(llm_seq_save(ctx, bad[i], buffer, sizeof buffer, NULL), LLM_ERROR_ARGUMENT);
        assert_int_equal(llm_seq_restore(ctx, bad[i], buffer, sizeof buffer, NULL), LLM_ERROR_ARGUMENT);
    }
    assert_int_equal(llm_seq_truncate(ctx, 0, 41, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_seq_truncate(ctx, 0, -1, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 41, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, -1, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_seq_length(ctx, 0), 40);
    assert_int_equal(llm_seq_fork(ctx, 0, 0, 30, NULL), LLM_OK); /* a fork of itself truncates */
    assert_int_equal(llm_seq_length(ctx, 0), 30);
    llm_context_free(ctx);
    llm_model_free(model);
}

/* ---- Logits ---- */

static void test_requested_logits(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 64, .n_seq = 3, .n_batch = 4, .n_logits = 10, .n_threads = 1},
                     one = {.n_ctx = 64, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc), *own = create_context(model, &one);
    llm_token tokens[10];
    static const int seqs[10] = {2, 0, 2, 1, 0, 0, 2, 1, 1, 0};
    static const bool wanted[10] = {false, true, false, false, true, false, true, false, false, false};
    static const int last[3] = {9, 8, 6};
    (void)state;
    for (int i = 0; i < 10; i++) tokens[i] = token_at(3, i);
    assert_null(llm_logits(ctx, 0));
    assert_int_equal(llm_forward(ctx, &(llm_batch){10, tokens, seqs, wanted}, NULL), LLM_OK);
    for (int i = -1; i < 11; i++) assert_int_equal(llm_logits(ctx, i) != NULL, i >= 0 && i < 10 && wanted[i]);
    assert_logits(ctx, 6, 2, own);
    for (int seq = 0; seq < 3; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    assert_int_equal(llm_forward(ctx, &(llm_batch){10, tokens, seqs, NULL}, NULL), LLM_OK);
    for (int i = 0; i < 10; i++)
        assert_int_equal(llm_logits(ctx, i) != NULL, i == last[0] || i == last[1] || i == last[2]);
    for (int seq = 0; seq < 3; seq++) assert_logits(ctx, last[seq], seq, own);
    static const bool none[10] = {false};
    assert_int_equal(llm_forward(ctx, &(llm_batch){10, tokens, seqs, none}, NULL), LLM_OK);
    for (int i = 0; i < 10; i++) assert_null(llm_logits(ctx, i));
    must_append(ctx, 1, 4, 0, 1); /* the pass without logits must have filled the cache */
    assert_logits(ctx, 0, 1, own);
    llm_context_free(ctx);
    llm_context_free(own);
    llm_model_free(model);
}

/* ---- Forks ---- */

static void test_forks(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 200, .n_seq = 4, .n_threads = 2};
    llm_context *ctx = create_context(model, &desc), *own = create_context(model, &desc);
    (void)state;
    must_append(ctx, 0, 0, 0, 70);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 50, NULL), LLM_OK);
    assert_int_equal(llm_seq_fork(ctx, 2, 1, 45, NULL), LLM_OK); /* a fork of a fork */
    assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK); /* the parent is emptied */
    must_append(ctx, 1, 1, 0, 1);
    assert_logits(ctx, 0, 1, own);
    must_append(ctx, 0, 2, 0, 100); /* the parent gets new text; its old blocks must stay for the forks */
    assert_logits(ctx, 99, 0, own);
    must_append(ctx, 2, 3, 0, 30);
    assert_logits(ctx, 29, 2, own);
    must_append(ctx, 1, 4, 0, 3);
    assert_logits(ctx, 2, 1, own);
    assert_int_equal(llm_seq_fork(ctx, 1, 2, 64, NULL), LLM_OK); /* replaces a fork, at the end of a block */
    must_append(ctx, 2, 5, 0, 1);
    assert_logits(ctx, 0, 2, own);
    must_append(ctx, 1, 6, 0, 1);
    assert_logits(ctx, 0, 1, own);
    assert_int_equal(llm_seq_fork(ctx, 3, 1, 0, NULL), LLM_OK);
    assert_int_equal(llm_seq_length(ctx, 3), 0);
    llm_context_free(ctx);
    llm_context_free(own);
    llm_model_free(model);
}

/* Two sequences share their last block. If both continue, only one needs a copy of it; there is room for one copy. */
static void test_last_copy(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 96, .n_seq = 3, .n_cache = 64, .n_threads = 1},
                     one = {.n_ctx = 96, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc), *own = create_context(model, &one);
    llm_token tokens[3] = {1, 2, 3};
    static const int seqs[3] = {0, 1, 2};
    (void)state;
    must_append(ctx, 0, 0, 0, 10);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 10, NULL), LLM_OK);
    assert_int_equal(llm_forward(ctx, &(llm_batch){2, tokens, seqs, NULL}, NULL), LLM_OK);
    assert_logits(ctx, 0, 0, own);
    assert_logits(ctx, 1, 1, own);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 10, NULL), LLM_OK);
    assert_int_equal(llm_seq_fork(ctx, 2, 0, 10, NULL), LLM_OK);
    assert_refused(ctx, &(llm_batch){3, tokens, seqs, NULL}, LLM_ERROR_CONTEXT_FULL, "64",
                   "32"); /* three sequences need two copies */
    llm_context_free(ctx);
    llm_context_free(own);
    llm_model_free(model);
}

/* A fork inside a block copies the block when it continues, and frees the copy when it is truncated again. The same
   holds for its parent. If the other sequence has changed meanwhile, the copy stays. */
static void test_copy_is_freed(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 256, .n_seq = 9, .n_cache = 256, .n_threads = 1},
                     one = {.n_ctx = 256, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc), *own = create_context(model, &one);
    (void)state;
    for (int length = 33; length <= 64; length += 31) {
        must_append(ctx, 8, 0, 0, length);
        for (int seq = 0; seq < 8; seq++) {
            assert_int_equal(llm_seq_fork(ctx, seq, 8, length, NULL), LLM_OK);
            must_append(ctx, seq, seq, 0, 1);
            assert_logits(ctx, 0, seq, own);
            assert_int_equal(llm_seq_truncate(ctx, seq, length, NULL), LLM_OK);
        }
        must_append(ctx, 8, 9, 0, 1); /* the same with the parent */
        assert_int_equal(llm_seq_truncate(ctx, 8, length, NULL), LLM_OK);
        for (int seq = 0; seq < 9; seq++) { /* all must share the block again, or the cache would be full */
            must_append(ctx, seq, 20, 0, 90);
            assert_logits(ctx, 89, seq, own);
            assert_int_equal(llm_seq_truncate(ctx, seq, length, NULL), LLM_OK);
        }
        for (int seq = 0; seq < 9; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    }
    must_append(ctx, 0, 0, 0, 50);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 50, NULL), LLM_OK);
    must_append(ctx, 1, 1, 0, 3);
    assert_int_equal(llm_seq_truncate(ctx, 0, 40, NULL), LLM_OK);
    must_append(ctx, 0, 2, 0, 20); /* overwrites positions that the fork has copied */
    assert_int_equal(llm_seq_truncate(ctx, 1, 50, NULL), LLM_OK);
    must_append(ctx, 1, 3, 0, 1);
    assert_logits(ctx, 0, 1, own);
    assert_int_equal(llm_seq_truncate(ctx, 1, 38, NULL), LLM_OK);
    must_append(ctx, 1, 4, 0, 1);
    assert_logits(ctx, 0, 1, own);
    must_append(ctx, 0, 5, 0, 1);
    assert_logits(ctx, 0, 0, own);
    for (int seq = 0; seq < 9; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    must_append(ctx, 0, 0, 0, 256);
    llm_context_free(ctx);
    llm_context_free(own);
    llm_model_free(model);
}

/* ---- Saving ---- */

static void *save(llm_context *ctx, int seq, size_t *size) {
    *size = llm_seq_save_size(ctx, seq);
    void *buffer = malloc(*size);
    assert_non_null(buffer);
    assert_int_equal(llm_seq_save(ctx, seq, buffer, *size, NULL), LLM_OK);
    return buffer;
}

static void assert_not_restored(llm_context *ctx, const void *buffer, size_t size, llm_status status) {
    llm_error err;
    int length = llm_seq_length(ctx, 0);
    llm_status got = llm_seq_restore(ctx, 0, buffer, size, &err);
    if (status ? got != status : got == LLM_OK) fail_msg("status %d instead of %d", got, status);
    assert_int_equal(err.code, got);
    assert_true(strlen(err.message) > 10);
    assert_int_equal(llm_seq_length(ctx, 0), length);
}

static void test_saved(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 100, .n_seq = 2, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc), *other = create_context(model, &desc),
                *own = create_context(model, &desc);
    size_t size, empty_size;
    (void)state;
    void *empty = save(ctx, 0, &empty_size);
    must_append(ctx, 0, 0, 0, 70);
    assert_int_equal(llm_seq_save(ctx, 0, empty, empty_size, NULL), LLM_ERROR_ARGUMENT);
    void *buffer = save(ctx, 0, &size);
    assert_int_equal(llm_seq_save(ctx, 0, buffer, size - 1, NULL), LLM_ERROR_ARGUMENT);
    must_append(other, 1, 1, 0, 50);
    assert_int_equal(llm_seq_restore(other, 1, buffer, size, NULL), LLM_OK);
    assert_int_equal(llm_seq_length(other, 1), 70);
    must_append(other, 1, 2, 0, 5);
    assert_logits(other, 4, 1, own);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 70, NULL), LLM_OK); /* restoring over a fork must not change its parent */
    assert_int_equal(llm_seq_restore(ctx, 1, buffer, size, NULL), LLM_OK);
    must_append(ctx, 0, 3, 0, 1);
    assert_logits(ctx, 0, 0, own);
    must_append(ctx, 1, 4, 0, 1);
    assert_logits(ctx, 0, 1, own);
    assert_int_equal(llm_seq_restore(other, 1, empty, empty_size, NULL), LLM_OK);
    assert_int_equal(llm_seq_length(other, 1), 0);
    free(buffer);
    free(empty);
    llm_context_free(ctx);
    llm_context_free(other);
    llm_context_free(own);
    llm_model_free(model);
}

static void test_saved_damaged(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 100, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc), *own = create_context(model, &desc);
    size_t size;
    (void)state;
    must_append(ctx, 0, 0, 0, 20);
    uint8_t *buffer = (uint8_t *)save(ctx, 0, &size);
    for (size_t at = 0; at < size; at += at < 200 ? 1 : 13) {
        buffer[at] ^= 0x10;
        assert_not_restored(ctx, buffer, size, LLM_OK);
        buffer[at] ^= 0x10;
    }
    for (size_t n = 0; n < size; n += n < 200 ? 1 : 97) {
        uint8_t *cut = (uint8_t *)malloc(n ? n : 1);
        assert_non_null(cut);
        memcpy(cut, buffer, n);
        assert_not_restored(ctx, cut, n, LLM_ERROR_FORMAT);
        free(cut);
    }
    must_append(ctx, 0, 1, 0, 1);
    assert_logits(ctx, 0, 0, own);
    free(buffer);
    llm_context_free(ctx);
    llm_context_free(own);
    llm_model_free(model);
}

static void test_saved_elsewhere(void **state) {
    llm_model *model = load(1);
    llm_context_desc desc = {.n_ctx = 100, .n_threads = 1}, bf16 = desc, narrow = desc, small = desc;
    llm_context *ctx = create_context(model, &desc);
    size_t size;
    tiny_spec spec = SPEC;
    (void)state;
    spec.seed = 1;
    must_append(ctx, 0, 0, 0, 70);
    void *buffer = save(ctx, 0, &size);
    llm_model *others[] = {load(2), load_changed(&spec, LLM_DTYPE_BF16, NULL, 0),
                           load_changed(&spec, LLM_DTYPE_F32, "llama.rope.freq_base", 5000),
                           load_changed(&spec, LLM_DTYPE_F32, "llama.attention.layer_norm_rms_epsilon", 1e-3f)};
    for (int i = 0; i < 4; i++) {
        llm_context_desc f32 = desc;
        f32.cache_dtype = LLM_DTYPE_F32;
        llm_context *other = create_context(others[i], &f32);
        assert_not_restored(other, buffer, size, LLM_ERROR_FORMAT);
        llm_context_free(other);
        llm_model_free(others[i]);
    }
    bf16.cache_dtype = LLM_DTYPE_BF16;
    narrow.n_ctx = 69;
    small.n_cache = 64;
    llm_context *contexts[] = {create_context(model, &bf16), create_context(model, &narrow),
                               create_context(model, &small)};
    assert_not_restored(contexts[0], buffer, size, LLM_ERROR_FORMAT);
    assert_not_restored(contexts[1], buffer, size, LLM_ERROR_CONTEXT_FULL);
    must_append(contexts[2], 0, 0, 0, 40);
    assert_not_restored(contexts[2], buffer, size, LLM_ERROR_CONTEXT_FULL);
    for (int i = 0; i < 3; i++) llm_context_free(contexts[i]);
    llm_model *same = load(1); /* the same model, loaded again */
    llm_context *again = create_context(same, &desc);
    assert_int_equal(llm_seq_restore(again, 0, buffer, size, NULL), LLM_OK);
    llm_context_free(again);
    llm_model_free(same);
    free(buffer);
    llm_context_free(ctx);
    llm_model_free(model);
}

/* ---- Cancelling ---- */

typedef struct canceller {
    int n, stop_at;
} canceller;

static bool cancel(void *user) {
    canceller *c = (canceller *)user;
    return ++c->n == c->stop_at;
}

/* Cancels at every poll of a pass over two sequences, one of them a fork inside a block. */
static void test_cancelled(void **state) {
    llm_model *model = load(1);
    canceller c = {0, 0};
    llm_context_desc desc = {
        .n_ctx = 100, .n_seq = 2, .n_batch = 16, .n_threads = 2, .cancel = cancel, .cancel_user = &c};
    llm_context *ctx = create_context(model, &desc),
                *own = create_context(model, &(llm_context_desc){.n_ctx = 100, .n_threads = 1});
    llm_token tokens[60];
    int seqs[60], n_polls = 0;
    llm_error err;
    (void)state;
    for (int i = 0; i < 60; i++) {
        tokens[i] = token_at(9, i);
        seqs[i] = i % 3 == 0;
    }
    llm_batch batch = {60, tokens, seqs, NULL};
    for (int stop_at = 0; stop_at <= n_polls; stop_at++) { /* 0: not cancelled, to count the polls */
        c.stop_at = 0;
        assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
        must_append(ctx, 0, 0, 0, 40);
        assert_int_equal(llm_seq_fork(ctx, 1, 0, 37, NULL), LLM_OK);
        c.n = 0;
        c.stop_at = stop_at;
        llm_status status = llm_forward(ctx, &batch, &err);
        assert_int_equal(status, stop_at ? LLM_ERROR_CANCELLED : LLM_OK);
        if (!stop_at) {
            n_polls = c.n;
            continue;
        }
        assert_true(strlen(err.message) > 10);
        assert_int_equal(c.n, stop_at);
        assert_int_equal(llm_seq_length(ctx, 0), 40);
        assert_int_equal(llm_seq_length(ctx, 1), 37);
        for (int i = 0; i < 60; i++) assert_null(llm_logits(ctx, i));
        assert_int_equal(llm_forward(ctx, &batch, &err), LLM_OK);
        assert_logits(ctx, 59, 0, own);
        assert_logits(ctx, 57, 1, own);
    }
    assert_true(n_polls >= 4 * SPEC.n_layers);
    llm_context_free(ctx);
    llm_context_free(own);
    llm_model_free(model);
}

/* Leaves a pass by longjmp at every poll, as a C++ exception would, while other threads wait for the calling thread. */
static jmp_buf left;

static bool leave(void *user) {
    canceller *c = (canceller *)user;
    if (++c->n == c->stop_at) longjmp(left, 1);
    return false;
}

static void test_longjmp(void **state) {
    llm_model *model = load(1);
    static canceller c;
    static volatile int stop_at, n_polls;
    llm_context_desc desc = {
        .n_ctx = 100, .n_seq = 2, .n_batch = 16, .n_threads = 3, .cancel = leave, .cancel_user = &c};
    llm_context *volatile ctx = create_context(model, &desc);
    llm_context *own = create_context(model, &(llm_context_desc){.n_ctx = 100, .n_threads = 1});
    (void)state;
    must_append(ctx, 0, 0, 0, 40);
    n_polls = c.n;
    for (stop_at = 1; stop_at <= n_polls; stop_at++) {
        c.stop_at = 0;
        assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
        must_append(ctx, 0, 1, 0, 7);
        c.n = 0;
        c.stop_at = stop_at;
        if (!setjmp(left)) {
            append(ctx, 0, 2, 0, 40, NULL);
            fail();
        }
        assert_int_equal(c.n, stop_at);
        assert_int_equal(llm_seq_length(ctx, 0), 7);
        c.stop_at = 0;
        must_append(ctx, 0, 3, 0, 20);
        assert_logits(ctx, 19, 0, own);
    }
    c.n = 0;
    c.stop_at = 2;
    if (!setjmp(left)) append(ctx, 0, 2, 0, 40, NULL);
    llm_context_free(ctx); /* works without another call in between */
    llm_context_free(own);
    llm_model_free(model);
}

/* ---- *err after a success ---- */

static llm_error *stale(void) {
    static llm_error err;
    memset(&err, 0x41, sizeof err);
    err.code = LLM_ERROR_CONTEXT_FULL;
    return &err;
}

/* A successful call sets LLM_OK and an empty message, even if an attempt inside the call failed. */
static void test_success_clears_error(void **state) {
    llm_model *model = NULL, *again = NULL;
    llm_context *ctx = NULL;
    llm_draft draft;
    llm_memory memory;
    llm_token ids[8] = {1, 2};
    llm_model_desc desc = {.n_threads = 1};
    llm_model_info info;
    const llm_message message = {"user", "a"};
    const llm_chat_desc chat = {.messages = &message, .n_messages = 1, .open_answer = true};
    llm_tokenizer *alone;
    const llm_tokenizer *tokenizer;
    const llm_token *endings[] = {ids};
    const int two = 2;
    llm_question question = {ids, 2, 1, endings, &two};
    double likelihood;
    int64_t n_context;
    size_t n_data;
    uint8_t *data = tiny_model(&SPEC, &n_data);
    (void)state;
#define SUCCEEDS(call)                         \
    {                                          \
        llm_error *err = stale();              \
        assert_true((call) >= 0);              \
        assert_int_equal(err->code, LLM_OK);   \
        assert_string_equal(err->message, ""); \
    }
    SUCCEEDS(-(int)llm_model_load_memory(&model, data, n_data, &desc, err))
    SUCCEEDS(-(int)llm_model_load_memory(&again, data, n_data, &desc, err))
    SUCCEEDS(-(int)llm_model_read_info_memory(data, n_data, &desc, &info, err))
    SUCCEEDS(-(int)llm_memory_estimate(&info, NULL, &memory, err))
    SUCCEEDS(-(int)llm_tokenizer_load_memory(&alone, data, n_data, NULL, err))
    tokenizer = llm_model_tokenizer(model);
    SUCCEEDS(-(int)llm_context_create(&ctx, model, &(llm_context_desc){.n_ctx = 64, .n_seq = 2, .n_threads = 1}, err))
    SUCCEEDS(llm_encode(tokenizer, "ab", 2, 0, ids, 8, err))
    SUCCEEDS(llm_chat_encode(tokenizer, &chat, NULL, 0, err))
    SUCCEEDS(llm_chat_render(tokenizer, &chat, NULL, 0, err))
    SUCCEEDS(llm_encode_pair(tokenizer, "ab", "c", 0, ids, 8, &n_context, err))
    SUCCEEDS(-(int)llm_forward(ctx, &(llm_batch){2, ids, NULL, NULL}, err))
    SUCCEEDS(-(int)llm_seq_truncate(ctx, 0, 1, err))
    SUCCEEDS(-(int)llm_seq_fork(ctx, 1, 0, 1, err))
    SUCCEEDS(-(int)llm_seq_fork(ctx, 1, 1, 1, err))
    size_t size = llm_seq_save_size(ctx, 0);
    void *saved = malloc(size);
    SUCCEEDS(-(int)llm_seq_save(ctx, 0, saved, size, err))
    SUCCEEDS(-(int)llm_seq_restore(ctx, 1, saved, size, err))
    SUCCEEDS(-(int)llm_draft_model(&draft, ctx, again, err))
    SUCCEEDS(-(int)llm_generate(ctx, &(llm_generate_desc){.prompt = "abc", .max_tokens = 2}, NULL, err))
    SUCCEEDS(-(int)llm_prefill(ctx, &(llm_generate_desc){.prompt = "abc"}, NULL, err))
    SUCCEEDS(-(int)llm_score(ctx, &question, 1, NULL, &likelihood, NULL, err))
    free(saved);
    free(data);
    llm_tokenizer_free(alone);
    llm_draft_free(&draft);
    llm_context_free(ctx);
    llm_model_free(again);
    llm_model_free(model);
}

/* ---- Random operations, compared with plain arrays of tokens ---- */

enum { N_SEQ = 6, N_CTX = 320, N_STEPS = 10000 };

typedef struct shadow {
    llm_token tokens[N_SEQ][N_CTX];
    int lengths[N_SEQ], longest[N_SEQ]; /* the longest that it, or what it was forked from, has been */
    int window, n_cache;
    uint32_t random;
} shadow;

static int below(shadow *s, int n) {
    s->random ^= s->random << 13;
    s->random ^= s->random >> 17;
    s->random ^= s->random << 5;
    return (int)(s->random % (uint32_t)n);
}

static void assert_shadow(const llm_context *ctx, const shadow *s) {
    for (int i = 0; i < N_SEQ; i++) {
        assert_int_equal(llm_seq_length(ctx, i), s->lengths[i]);
        assert_memory_equal(llm_seq_tokens(ctx, i), s->tokens[i], (size_t)s->lengths[i] * sizeof(llm_token));
    }
}

/* Number of positions needed if no blocks were shared, rounded up to whole blocks, without those that can be given
   back. */
static int unshared(const shadow *s, const int *more) {
    int n = 0;
    for (int i = 0; i < N_SEQ; i++) {
        int end = (s->lengths[i] + more[i] + LLM_CACHE_BLOCK - 1) / LLM_CACHE_BLOCK,
            first = s->window ? (s->lengths[i] - s->window) / LLM_CACHE_BLOCK - 1 : 0;
        n += (end - (first > 0 ? first : 0)) * LLM_CACHE_BLOCK;
    }
    return n;
}

/* A sequence may be refused a shorter length if blocks before its window may have been given back. */
static bool must_be_held(const shadow *s, int seq, int length) {
    return !s->window || !length || length >= s->longest[seq] - LLM_CACHE_BLOCK || s->longest[seq] <= s->window;
}

static void set_length(shadow *s, int seq, int length, int longest) {
    s->lengths[seq] = length;
    s->longest[seq] = length ? longest : 0;
}

/* Appends random tokens to one to three sequences. */
static void step_append(llm_context *ctx, llm_context *own, shadow *s, bool check) {
    llm_token tokens[120];
    int seqs[120], more[N_SEQ] = {0}, n = 1 + below(s, below(s, 4) ? 6 : 120), n_seqs = 1 + below(s, 3),
                   first = below(s, N_SEQ), last = 0;
    bool fits = true;
    for (int i = 0; i < n; i++) {
        tokens[i] = (llm_token)below(s, N_VOCAB);
        seqs[i] = (first + below(s, n_seqs)) % N_SEQ;
        if (seqs[i] == first) last = i;
        more[seqs[i]]++;
    }
    for (int i = 0; i < N_SEQ; i++) fits = fits && s->lengths[i] + more[i] <= N_CTX;
    llm_status status = llm_forward(ctx, &(llm_batch){n, tokens, seqs, NULL}, NULL);
    if (status) {
        assert_int_equal(status, LLM_ERROR_CONTEXT_FULL);
        assert_true(!fits || unshared(s, more) > s->n_cache);
        return;
    }
    assert_true(fits);
    for (int i = 0; i < n; i++) s->tokens[seqs[i]][s->lengths[seqs[i]]++] = tokens[i];
    for (int i = 0; i < N_SEQ; i++)
        if (s->longest[i] < s->lengths[i]) s->longest[i] = s->lengths[i];
    if (check && more[first]) assert_logits(ctx, last, first, own);
}

static void step_fork(llm_context *ctx, shadow *s) {
    int seq = below(s, N_SEQ), parent = below(s, N_SEQ), length = below(s, s->lengths[parent] + 1);
    llm_status status = llm_seq_fork(ctx, seq, parent, length, NULL);
    if (status) {
        assert_int_equal(status, LLM_ERROR_CONTEXT_FULL);
        assert_false(must_be_held(s, parent, length));
        return;
    }
    if (seq != parent) memcpy(s->tokens[seq], s->tokens[parent], (size_t)length * sizeof(llm_token));
    set_length(s, seq, length, s->longest[parent]);
}

static void step_truncate(llm_context *ctx, shadow *s) {
    int seq = below(s, N_SEQ), length = below(s, 3) ? below(s, s->lengths[seq] + 1) : 0;
    llm_status status = llm_seq_truncate(ctx, seq, length, NULL);
    if (status) {
        assert_int_equal(status, LLM_ERROR_CONTEXT_FULL);
        assert_false(must_be_held(s, seq, length));
    } else set_length(s, seq, length, s->longest[seq]);
}

static void step_restore(llm_context *ctx, shadow *s) {
    int from = below(s, N_SEQ), to = below(s, N_SEQ);
    size_t size;
    void *buffer = save(ctx, from, &size);
    if (llm_seq_restore(ctx, to, buffer, size, NULL) == LLM_OK) {
        if (from != to) memcpy(s->tokens[to], s->tokens[from], (size_t)s->lengths[from] * sizeof(llm_token));
        set_length(s, to, s->lengths[from], s->longest[from]);
    }
    free(buffer);
}

/* window 0: none */
static void random_operations(int window, int n_cache) {
    tiny_window = window;
    llm_model *model = load(1);
    tiny_window = 0;
    llm_context_desc desc = {.n_ctx = N_CTX, .n_seq = N_SEQ, .n_cache = n_cache, .n_batch = 50, .n_threads = 1},
                     one = {.n_ctx = N_CTX, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc), *own = create_context(model, &one);
    shadow *s = (shadow *)calloc(1, sizeof *s);
    assert_non_null(s);
    s->random = 987654321;
    s->window = window;
    s->n_cache = n_cache;
    for (int i = 0; i < N_STEPS; i++) {
        int what = below(s, 10);
        if (what < 5) step_append(ctx, own, s, i % 20 == 0);
        else if (what < 7) step_fork(ctx, s);
        else if (what < 9) step_truncate(ctx, s);
        else step_restore(ctx, s);
        assert_shadow(ctx, s);
    }
    for (int i = 0; i < N_SEQ; i++) assert_int_equal(llm_seq_truncate(ctx, i, 0, NULL), LLM_OK);
    assert_int_equal(llm_context_n_free(ctx), n_cache);
    for (int i = 0; i < n_cache / N_CTX; i++) must_append(ctx, i, i, 0, N_CTX); /* all blocks must be free again */
    if (!window) assert_int_equal(append(ctx, 2, 0, 0, 1, NULL), LLM_ERROR_CONTEXT_FULL);
    free(s);
    llm_context_free(ctx);
    llm_context_free(own);
    llm_model_free(model);
}

static void test_random_operations(void **state) {
    (void)state;
    random_operations(0, 2 * N_CTX);
    random_operations(1, 480);
    random_operations(20, 512);
    random_operations(70, 640);
}

/* ---- Getters ---- */

static void test_getters(void **state) {
    llm_model *model = load(11);
    llm_context *plain = create_context(model, &(llm_context_desc){.n_ctx = 50, .n_threads = 1});
    llm_context *ctx = create_context(model, &(llm_context_desc){.n_ctx = 100,
                                                                 .n_seq = 3,
                                                                 .n_cache = 192,
                                                                 .n_batch = 7,
                                                                 .n_logits = 2,
                                                                 .n_threads = 1,
                                                                 .cache_dtype = LLM_DTYPE_INT8});
    (void)state;
    assert_int_equal(llm_context_n_seq(plain), 1);
    assert_int_equal(llm_context_n_batch(plain), 512);
    assert_int_equal(llm_context_n_logits(plain), 1);
    assert_int_equal(llm_context_n_cache(plain), 64); /* rounded up to whole blocks */
    assert_ptr_equal(llm_context_model(ctx), model);
    assert_int_equal(llm_context_n_ctx(ctx), 100);
    assert_int_equal(llm_context_n_seq(ctx), 3);
    assert_int_equal(llm_context_n_cache(ctx), 192);
    assert_int_equal(llm_context_n_batch(ctx), 7);
    assert_int_equal(llm_context_n_logits(ctx), 2);
    assert_int_equal(llm_context_n_threads(ctx), 1);
    assert_int_equal(llm_context_cache_dtype(plain), LLM_DTYPE_F32);
    assert_int_equal(llm_context_cache_dtype(ctx), LLM_DTYPE_INT8);
    assert_int_equal(llm_version(), LLM_VERSION_NUMBER);
    int major, minor, patch;
    assert_int_equal(sscanf(LLM_VERSION, "%d.%d.%d", &major, &minor, &patch), 3);
    assert_int_equal(10000 * major + 100 * minor + patch, LLM_VERSION_NUMBER);
    assert_string_equal(llm_status_name(LLM_OK), "LLM_OK");
    assert_string_equal(llm_status_name(LLM_ERROR_CONTEXT_FULL), "LLM_ERROR_CONTEXT_FULL");
    assert_string_equal(llm_status_name(LLM_ERROR_DEVICE), "LLM_ERROR_DEVICE");
    assert_null(llm_status_name((llm_status)(LLM_ERROR_DEVICE + 1)));
    assert_null(llm_status_name((llm_status)-1));
    llm_context_free(plain);
    close_context(ctx);
}

/* A sequence uses whole blocks. A fork from the middle of a block needs a block of its own when it grows. */
static void test_free_positions(void **state) {
    llm_context *ctx = create_context(load(11), &(llm_context_desc){.n_ctx = 96, .n_seq = 3, .n_threads = 1});
    (void)state;
    int all = llm_context_n_free(ctx);
    assert_int_equal(all, llm_context_n_cache(ctx));
    must_append(ctx, 0, 0, 0, 33);
    assert_int_equal(llm_context_n_free(ctx), all - 2 * LLM_CACHE_BLOCK);
    assert_int_equal(llm_seq_fork(ctx, 1, 0, 33, NULL), LLM_OK);
    assert_int_equal(llm_seq_fork(ctx, 2, 0, 32, NULL), LLM_OK);
    assert_int_equal(llm_context_n_free(ctx), all - 2 * LLM_CACHE_BLOCK);
    must_append(ctx, 1, 1, 33, 34); /* copies the block that it shares in part */
    assert_int_equal(llm_context_n_free(ctx), all - 3 * LLM_CACHE_BLOCK);
    must_append(ctx, 2, 2, 32, 33); /* begins a block */
    assert_int_equal(llm_context_n_free(ctx), all - 4 * LLM_CACHE_BLOCK);
    assert_int_equal(llm_seq_truncate(ctx, 1, 32, NULL), LLM_OK);
    assert_int_equal(llm_context_n_free(ctx), all - 3 * LLM_CACHE_BLOCK);
    for (int seq = 0; seq < 3; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    assert_int_equal(llm_context_n_free(ctx), all);
    close_context(ctx);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_getters),          cmocka_unit_test(test_free_positions),
        cmocka_unit_test(test_refused),          cmocka_unit_test(test_sequence_arguments),
        cmocka_unit_test(test_requested_logits), cmocka_unit_test(test_forks),
        cmocka_unit_test(test_last_copy),        cmocka_unit_test(test_saved),
        cmocka_unit_test(test_saved_damaged),    cmocka_unit_test(test_saved_elsewhere),
        cmocka_unit_test(test_cancelled),        cmocka_unit_test(test_copy_is_freed),
        cmocka_unit_test(test_longjmp),          cmocka_unit_test(test_success_clears_error),
        cmocka_unit_test(test_random_operations)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
