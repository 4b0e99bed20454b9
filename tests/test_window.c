/* Models with a sliding window in a small cache: blocks before the window are given back when room is needed, and all
   results are those of a large cache. What can no longer be cut back is refused or computed again.
   Variants: asan tsan */
#include "tests/check.h"
#include "llm.h"
#include "tests/tiny.h"
#include "tests/common.h"

static const tiny_spec SPEC = {2, 40, 56, 4, 2, 12, 512, 9, 0, 0, 11};
enum {
    N_VOCAB = 265,
    WINDOW = 48,
    N_BATCH = 32,
    N_CTX = 1024,
    ONE = 5 * LLM_CACHE_BLOCK, /* positions that are enough for a sequence: at most WINDOW + N_BATCH + 3 blocks */
    MOST = 1000
};

static llm_model *load(llm_dtype dtype) {
    tiny_window = WINDOW;
    llm_model *model = load_tiny(&SPEC, dtype);
    tiny_window = 0;
    assert_int_equal(llm_model_get_info(model).window, WINDOW);
    return model;
}

/* n_cache 0: room for all positions of all sequences. */
static llm_context *open(const llm_model *model, int n_seq, int n_cache) {
    llm_context_desc desc = {.n_ctx = N_CTX, .n_seq = n_seq, .n_cache = n_cache, .n_batch = N_BATCH, .n_threads = 1};
    return create_context(model, &desc);
}

static llm_token token_at(int text, int i) {
    return (llm_token)((uint32_t)(text * 7919 + i * 104729 + 1) * 2654435761u % N_VOCAB);
}

/* The tokens [from, to) of a text are appended to a sequence. */
static llm_status append(llm_context *ctx, int seq, int text, int from, int to, llm_error *err) {
    llm_token tokens[MOST];
    int seqs[MOST];
    for (int i = from; i < to; i++) {
        tokens[i - from] = token_at(text, i);
        seqs[i - from] = seq;
    }
    return llm_forward(ctx, &(llm_batch){to - from, tokens, seqs, NULL}, err);
}

static void must_append(llm_context *ctx, int seq, int text, int from, int to) {
    llm_error err;
    if (append(ctx, seq, text, from, to, &err)) fail_msg("%s", err.message);
}

/* The same in pieces, so that it needs no more room than for a piece. */
static void grow(llm_context *ctx, int seq, int text, int from, int to) {
    for (int at = from; at < to; at += N_BATCH) must_append(ctx, seq, text, at, at + N_BATCH < to ? at + N_BATCH : to);
}

static void assert_same_logits(const llm_context *a, const llm_context *b, int i) {
    const float *x = llm_logits(a, i), *y = llm_logits(b, i);
    assert_non_null(x);
    assert_non_null(y);
    assert_memory_equal(x, y, N_VOCAB * sizeof *x);
}

/* The next tokens of a text give the same logits in both contexts, which have its first `length` tokens. */
static void assert_goes_on(llm_context *ctx, int seq, llm_context *large, int large_seq, int text, int length) {
    int end = length + 5;
    must_append(ctx, seq, text, length, end);
    must_append(large, large_seq, text, length, end);
    assert_same_logits(ctx, large, 4);
}

static void assert_full(llm_status status, const llm_error *err, const char *part) {
    assert_int_equal(status, LLM_ERROR_CONTEXT_FULL);
    assert_explained(status, err);
    if (!strstr(err->message, part)) fail_msg("the message lacks \"%s\": %s", part, err->message);
}

/* ---- Texts that are longer than the cache ---- */

/* Two long texts take turns, in pieces of many sizes, so that each soon gets blocks that the other has given back. */
static void grow_two(const llm_model *model, llm_dtype cache_dtype, int n_threads) {
    static const int sizes[] = {1, N_BATCH, 3, 17, 1, 1, 8, 31};
    llm_context_desc desc = {.n_ctx = N_CTX,
                             .n_seq = 2,
                             .n_batch = N_BATCH,
                             .n_threads = n_threads,
                             .cache_dtype = cache_dtype},
                     small = desc;
    small.n_cache = 2 * ONE;
    llm_context *large = create_context(model, &desc), *ctx = create_context(model, &small);
    int lengths[2] = {0, 0};
    for (int i = 0; lengths[0] < MOST - N_BATCH; i++)
        for (int seq = 0; seq < 2; seq++) {
            int from = lengths[seq], n = sizes[(i + 3 * seq) % 8];
            if (from + n > MOST) n = MOST - from;
            if (!n) continue;
            must_append(ctx, seq, seq, from, from + n);
            must_append(large, seq, seq, from, from + n);
            assert_same_logits(ctx, large, n - 1);
            lengths[seq] += n;
        }
    assert_int_equal(llm_context_n_cache(ctx), 2 * ONE);
    for (int seq = 0; seq < 2; seq++)
        assert_memory_equal(llm_seq_tokens(ctx, seq), llm_seq_tokens(large, seq),
                            (size_t)lengths[seq] * sizeof(llm_token));
    for (int seq = 0; seq < 2; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    assert_int_equal(llm_context_n_free(ctx), llm_context_n_cache(ctx)); /* nothing is lost */
    llm_context_free(ctx);
    llm_context_free(large);
}

static void test_long_texts(void **state) {
    static const llm_dtype caches[] = {LLM_DTYPE_F32, LLM_DTYPE_BF16, LLM_DTYPE_INT8};
    llm_model *models[] = {load(LLM_DTYPE_F32), load(LLM_DTYPE_BF16)};
    (void)state;
    for (int i = 0; i < 2; i++)
        for (int c = 0; c < 3; c++) grow_two(models[i], caches[c], 1 + i);
    for (int i = 0; i < 2; i++) llm_model_free(models[i]);
}

/* A batch must have room as a whole, since all of it is taken back if a pass fails. */
static void test_long_batch(void **state) {
    llm_context *ctx = open(load(LLM_DTYPE_F32), 1, ONE);
    llm_error err;
    (void)state;
    assert_full(append(ctx, 0, 0, 0, ONE + 1, &err), &err, "n_cache");
    assert_int_equal(llm_seq_length(ctx, 0), 0);
    must_append(ctx, 0, 0, 0, ONE);
    assert_full(append(ctx, 0, 0, ONE, 2 * ONE, &err), &err, "n_cache");
    assert_int_equal(llm_seq_length(ctx, 0), ONE);
    must_append(ctx, 0, 0, ONE, ONE + N_BATCH);
    close_context(ctx);
}

/* ---- Generating ---- */

typedef struct answer {
    llm_token tokens[MOST];
    int n, stop_after; /* 0: it is not stopped */
    llm_stats stats;
} answer;

static bool take(void *user, llm_token token, const char *bytes, size_t n_bytes) {
    answer *a = (answer *)user;
    (void)bytes;
    (void)n_bytes;
    a->tokens[a->n++] = token;
    return a->n != a->stop_after;
}

/* A prompt of any length, of which some parts repeat. */
static void make_prompt(llm_token *ids, int n, int text) {
    for (int i = 0; i < n; i++) ids[i] = token_at(text, i % 90 < 60 ? i % 90 : i);
}

static llm_generate_desc describe(const llm_token *ids, int n, int seq, answer *a) {
    memset(a, 0, sizeof *a);
    return (llm_generate_desc){
        .tokens = ids, .n_tokens = n, .seq = seq, .max_tokens = 200, .ignore_end = true, .on_token = take, .user = a};
}

static void generate(llm_context *ctx, llm_generate_desc desc, answer *a) {
    llm_error err;
    if (llm_generate(ctx, &desc, &a->stats, &err)) fail_msg("%s", err.message);
}

static void assert_same_answer(const answer *a, const answer *b) {
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->tokens, b->tokens, (size_t)a->n * sizeof *a->tokens);
}

/* A prompt that is longer than the cache; the same again; one that goes on, and one that differs early. */
static void test_generate(void **state) {
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context *ctx = open(model, 1, ONE), *large = open(model, 1, 0);
    static llm_token ids[MOST];
    static answer a, b;
    (void)state;
    make_prompt(ids, 700, 1);
    assert_int_equal(llm_prefill(ctx, &(llm_generate_desc){.tokens = ids, .n_tokens = 700}, &a.stats, NULL), LLM_OK);
    assert_int_equal(llm_prefill(large, &(llm_generate_desc){.tokens = ids, .n_tokens = 700}, &b.stats, NULL), LLM_OK);
    assert_int_equal(a.stats.n_reused, 0);
    assert_same_logits(ctx, large, 699);
    generate(ctx, describe(ids, 700, 0, &a), &a);
    generate(large, describe(ids, 700, 0, &b), &b);
    assert_same_answer(&a, &b);
    assert_int_equal(a.stats.n_reused, 699);
    assert_true(a.stats.decode_bytes == b.stats.decode_bytes);
    memcpy(ids + 700, a.tokens, 100 * sizeof *ids); /* most of the answer is cut off */
    generate(ctx, describe(ids, 800, 0, &a), &a);
    generate(large, describe(ids, 800, 0, &b), &b);
    assert_same_answer(&a, &b);
    assert_int_equal(a.stats.n_reused, 0); /* computed again */
    assert_int_equal(b.stats.n_reused, 799);
    ids[400]++;
    generate(ctx, describe(ids, 800, 0, &a), &a);
    generate(large, describe(ids, 800, 0, &b), &b);
    assert_same_answer(&a, &b);
    assert_int_equal(b.stats.n_reused, 400);
    llm_context_free(ctx);
    llm_context_free(large);
    llm_model_free(model);
}

/* A conversation whose oldest turns are left out: what stays cannot be moved to its new place, because some of it was
   given back. So it is computed again. */
static void test_conversation(void **state) {
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context_desc desc = {.n_ctx = 512, .n_batch = N_BATCH, .n_threads = 1}, small = desc;
    small.n_cache = ONE;
    llm_context *ctx = create_context(model, &small), *large = create_context(model, &desc);
    llm_message messages[9];
    char texts[9][80];
    int n_left_out = 0;
    static answer a, b;
    (void)state;
    for (int i = 0; i < 9; i++) {
        snprintf(texts[i], sizeof texts[i], "the text of message %d, which has a few words more", i);
        messages[i] = (llm_message){i % 2 ? "assistant" : "user", texts[i]};
    }
    for (int n = 1; n <= 9; n += 2) {
        llm_generate_desc shifted = describe(NULL, 0, 0, &a);
        shifted.messages = messages;
        shifted.n_messages = n;
        shifted.keep_free = 140;
        shifted.max_tokens = 130;
        llm_generate_desc plain = shifted;
        shifted.shift = true;
        plain.user = memset(&b, 0, sizeof b);
        generate(ctx, shifted, &a);
        generate(large, plain, &b);
        assert_same_answer(&a, &b);
        n_left_out += a.stats.n_left_out;
    }
    assert_true(n_left_out > 0);
    llm_context_free(ctx);
    llm_context_free(large);
    llm_model_free(model);
}

/* After a cancelled prompt, the same call goes on from its last whole pass. */
static bool is_zero(void *user) { return --*(int *)user < 0; }

static void test_cancelled(void **state) {
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context *ctx = open(model, 1, ONE), *large = open(model, 1, 0);
    static llm_token ids[MOST];
    static answer a, b;
    llm_stats stats;
    (void)state;
    make_prompt(ids, 700, 2);
    generate(large, describe(ids, 700, 0, &b), &b);
    for (int n = 0, reached = 0;; n += 5) {
        int left = n;
        llm_generate_desc desc = {.tokens = ids, .n_tokens = 700, .cancel = is_zero, .user = &left};
        assert_int_equal(llm_prefill(ctx, &desc, &stats, NULL), LLM_OK);
        assert_int_equal(stats.n_reused, reached);
        reached = llm_seq_length(ctx, 0);
        if (stats.stop != LLM_STOP_CALLBACK) break;
        assert_int_equal(reached % N_BATCH, 0);
        assert_true(reached < 700);
    }
    generate(ctx, describe(ids, 700, 0, &a), &a);
    assert_int_equal(a.stats.n_reused, 699);
    assert_same_answer(&a, &b);
    llm_context_free(ctx);
    llm_context_free(large);
    llm_model_free(model);
}

/* Streams whose prompts begin alike, in a cache that has room for each only if all give blocks back. */
static void test_streams(void **state) {
    enum { N = 4 };
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context *ctx = open(model, N, N * ONE), *large = open(model, N, 0);
    static llm_token ids[N][MOST];
    static answer got[N], expected[N];
    (void)state;
    for (int i = 0; i < N; i++) {
        make_prompt(ids[i], 300, 3);
        make_prompt(ids[i] + 300, 100 * i + 1, 4 + i);
        generate(large, describe(ids[i], 301 + 100 * i, 0, &expected[i]), &expected[i]);
    }
    for (int round = 0; round < 2; round++) { /* the second time on what the first has left */
        llm_stream *streams[N];
        int n_running = 1;
        for (int i = 0; i < N; i++) {
            llm_error err;
            llm_generate_desc desc = describe(ids[i], 301 + 100 * i, LLM_SEQ_ANY, &got[i]);
            if (llm_stream_begin(&streams[i], ctx, &desc, &err)) fail_msg("%s", err.message);
        }
        while (n_running) assert_int_equal(llm_step(ctx, 0, &n_running, NULL), LLM_OK);
        for (int i = 0; i < N; i++) {
            llm_error err;
            if (llm_stream_result(streams[i], &got[i].stats, &err)) fail_msg("%s", err.message);
            llm_stream_free(streams[i]);
            assert_int_equal(got[i].stats.stop, LLM_STOP_LENGTH);
            assert_same_answer(&got[i], &expected[i]);
        }
    }
    llm_context_free(ctx);
    llm_context_free(large);
    llm_model_free(model);
}

/* llm_generate does not wait for a stream that is about to read a prompt that begins like its own. */
static void test_beside_stream(void **state) {
    llm_context *ctx = open(load(LLM_DTYPE_F32), 2, 0);
    static llm_token ids[MOST];
    static answer a, b;
    llm_stream *stream;
    (void)state;
    make_prompt(ids, 100, 40);
    llm_generate_desc desc = describe(ids, 100, 0, &a);
    assert_int_equal(llm_stream_begin(&stream, ctx, &desc, NULL), LLM_OK);
    generate(ctx, describe(ids, 100, 1, &b), &b);
    for (int n_running = 1; n_running;) assert_int_equal(llm_step(ctx, 0, &n_running, NULL), LLM_OK);
    llm_stream_free(stream);
    assert_same_answer(&a, &b);
    close_context(ctx);
}

/* Guesses that are wrong are cut off again, and drafts have caches of their own. */
static void test_drafts(void **state) {
    llm_model *model = load(LLM_DTYPE_F32), *other = load(LLM_DTYPE_INT4);
    llm_context_desc desc = {
        .n_ctx = N_CTX, .n_cache = ONE, .n_batch = N_BATCH, .n_logits = LLM_DRAFT_MAX + 1, .n_threads = 1};
    llm_context *ctx = create_context(model, &desc), *large = open(model, 1, 0);
    static llm_token ids[MOST];
    static answer a, b;
    tiny_spec small = {1, 16, 24, 2, 1, 8, 64, 9, 0, 0, 3};
    llm_model *stranger = load_tiny(&small, LLM_DTYPE_F32);
    llm_draft drafts[3] = {llm_draft_lookup()};
    (void)state;
    assert_int_equal(llm_draft_model(&drafts[1], ctx, other, NULL), LLM_OK); /* uses the same cache */
    assert_int_equal(llm_draft_model(&drafts[2], ctx, stranger, NULL), LLM_OK);
    for (int d = 0; d < 3; d++)
        for (int text = 0; text < 3; text++) {
            make_prompt(ids, 500, 10 + text);
            generate(large, describe(ids, 500, 0, &b), &b);
            llm_generate_desc with_draft = describe(ids, 500, 0, &a);
            for (int i = 0; i < LLM_DRAFT_MAX; i++) drafts[d].learnt.n_right[0][i] = drafts[d].learnt.n_known[0][i] = 9;
            with_draft.draft = &drafts[d];
            generate(ctx, with_draft, &a);
            assert_same_answer(&a, &b);
        }
    for (int d = 0; d < 3; d++) llm_draft_free(&drafts[d]);
    llm_context_free(ctx);
    llm_context_free(large);
    llm_model_free(model);
    llm_model_free(other);
    llm_model_free(stranger);
}

/* ---- Cutting back ---- */

/* As long as there is room, a sequence can be cut back and forked anywhere, as without a window. */
static void test_room(void **state) {
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context *ctx = open(model, 2, 0), *large = open(model, 1, 0);
    (void)state;
    grow(ctx, 0, 0, 0, 600);
    for (int length = 5; length < 600; length += 85) {
        assert_int_equal(llm_seq_fork(ctx, 1, 0, length, NULL), LLM_OK);
        assert_int_equal(llm_seq_truncate(large, 0, 0, NULL), LLM_OK);
        grow(large, 0, 0, 0, length);
        assert_goes_on(ctx, 1, large, 0, 0, length);
    }
    llm_context_free(ctx);
    llm_context_free(large);
    llm_model_free(model);
}

/* When the cache is full, it can be cut back by a block at least, and what is refused changes nothing. */
static void test_cut_back(void **state) {
    llm_model *model = load(LLM_DTYPE_F32);
    llm_error err;
    (void)state;
    for (int length = 400; length < 464; length += 7) {
        llm_context *ctx = open(model, 2, ONE), *large = open(model, 1, 0);
        int least = length;
        grow(ctx, 0, 0, 0, length);
        while (llm_seq_fork(ctx, 1, 0, least - 1, &err) == LLM_OK) least--;
        assert_full(llm_seq_fork(ctx, 1, 0, least - 1, &err), &err, "sliding window");
        assert_int_equal(llm_seq_length(ctx, 1), least);
        assert_true(length - least >= LLM_CACHE_BLOCK);
        assert_true(length - least < ONE);
        assert_full(llm_seq_truncate(ctx, 0, least - 1, &err), &err, "sliding window");
        assert_full(llm_seq_truncate(ctx, 0, 1, &err), &err, "sliding window");
        assert_full(llm_seq_fork(ctx, 0, 0, 1, &err), &err, "sliding window");
        assert_full(llm_seq_shift(ctx, 0, 10, 20, &err), &err, "sliding window"); /* whether blocks are shared */
        assert_int_equal(llm_seq_truncate(ctx, 1, 0, NULL), LLM_OK);
        assert_full(llm_seq_shift(ctx, 0, 10, 20, &err), &err, "sliding window"); /* or not */
        assert_int_equal(llm_seq_length(ctx, 0), length);
        grow(large, 0, 0, 0, length);
        assert_goes_on(ctx, 0, large, 0, 0, length);
        assert_int_equal(llm_seq_truncate(ctx, 0, length - LLM_CACHE_BLOCK, NULL), LLM_OK);
        assert_int_equal(llm_seq_truncate(large, 0, length - LLM_CACHE_BLOCK, NULL), LLM_OK);
        assert_goes_on(ctx, 0, large, 0, 0, length - LLM_CACHE_BLOCK);
        assert_int_equal(llm_seq_shift(ctx, 0, length - LLM_CACHE_BLOCK, 3, NULL), LLM_OK); /* near the end */
        assert_int_equal(llm_seq_shift(large, 0, length - LLM_CACHE_BLOCK, 3, NULL), LLM_OK);
        assert_goes_on(ctx, 0, large, 0, 0, length - LLM_CACHE_BLOCK + 2);
        assert_int_equal(llm_seq_truncate(ctx, 0, 0, NULL), LLM_OK);
        assert_int_equal(llm_context_n_free(ctx), ONE);
        must_append(ctx, 0, 1, 0, ONE);
        llm_context_free(ctx);
        llm_context_free(large);
    }
    llm_model_free(model);
}

/* A fork keeps the blocks that its parent gives back, and the other way round. */
static void test_forks(void **state) {
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context *ctx = open(model, 3, 3 * ONE), *large = open(model, 3, 0);
    (void)state;
    grow(ctx, 0, 0, 0, 250);
    grow(large, 0, 0, 0, 250);
    for (int seq = 1; seq < 3; seq++) {
        assert_int_equal(llm_seq_fork(ctx, seq, 0, 250 - 50 * seq, NULL), LLM_OK);
        assert_int_equal(llm_seq_fork(large, seq, 0, 250 - 50 * seq, NULL), LLM_OK);
    }
    for (int at = 250; at < 800; at += 10)
        for (int seq = 0; seq < 3; seq++) {
            int from = seq == 0 ? at : seq == 1 ? at - 50 : at - 250;
            if (from < 150) continue; /* the last one stays where it was for a while */
            must_append(ctx, seq, seq, from, from + 10);
            must_append(large, seq, seq, from, from + 10);
            assert_same_logits(ctx, large, 9);
        }
    for (int seq = 0; seq < 3; seq++) assert_int_equal(llm_seq_truncate(ctx, seq, 0, NULL), LLM_OK);
    assert_int_equal(llm_context_n_free(ctx), 3 * ONE);
    llm_context_free(ctx);
    llm_context_free(large);
    llm_model_free(model);
}

/* A saved sequence has only the blocks that are there, and goes on elsewhere. */
static void test_saved(void **state) {
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context *ctx = open(model, 1, ONE), *large = open(model, 1, 0), *other = open(model, 2, ONE + 64);
    llm_error err;
    (void)state;
    grow(ctx, 0, 0, 0, 600);
    grow(large, 0, 0, 0, 600);
    grow(other, 0, 1, 0, 500);
    size_t size = llm_seq_save_size(ctx, 0);
    assert_true(size < llm_seq_save_size(large, 0) / 2);
    uint8_t *buffer = (uint8_t *)malloc(size);
    assert_non_null(buffer);
    assert_int_equal(llm_seq_save(ctx, 0, buffer, size, NULL), LLM_OK);
    assert_full(llm_seq_restore(other, 1, buffer, size, &err), &err, "positions of the cache");
    assert_int_equal(llm_seq_restore(other, 0, buffer, size, NULL), LLM_OK);
    assert_int_equal(llm_seq_length(other, 0), 600);
    assert_memory_equal(llm_seq_tokens(other, 0), llm_seq_tokens(large, 0), 600 * sizeof(llm_token));
    assert_goes_on(other, 0, large, 0, 0, 600);
    grow(other, 0, 0, 605, 700);
    grow(large, 0, 0, 605, 700);
    assert_goes_on(other, 0, large, 0, 0, 700);
    assert_full(llm_seq_truncate(other, 0, 100, &err), &err, "sliding window");
    for (size_t at = 0; at < size; at += at < 200 ? 1 : 97) {
        buffer[at] ^= 0x10;
        assert_int_not_equal(llm_seq_restore(ctx, 0, buffer, size, NULL), LLM_OK);
        buffer[at] ^= 0x10;
    }
    assert_int_equal(llm_seq_restore(ctx, 0, buffer, size, NULL), LLM_OK); /* over itself */
    free(buffer);
    llm_context_free(ctx);
    llm_context_free(large);
    llm_context_free(other);
    llm_model_free(model);
}

/* What is before windows goes before the ends of texts that wait for a prompt that begins like them. */
static void test_order(void **state) {
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context *ctx = open(model, 3, 640);
    static llm_token ids[MOST];
    static answer a;
    (void)state;
    for (int i = 0; i < 3; i++) { /* 300 tokens each, of which the windows need 120 at most */
        make_prompt(ids, 100, 20 + i);
        generate(ctx, describe(ids, 100, LLM_SEQ_ANY, &a), &a);
        memcpy(ids + 100, a.tokens, 200 * sizeof *ids);
    }
    assert_int_equal(llm_seq_length(ctx, 0), 299);
    assert_int_equal(llm_seq_length(ctx, 1), 299);
    assert_int_equal(llm_seq_length(ctx, 2), 299);
    generate(ctx, describe(ids, 300, LLM_SEQ_ANY, &a), &a); /* the last one goes on */
    assert_int_equal(a.stats.n_reused, 299);
    llm_context_free(ctx);
    llm_model_free(model);
}

/* ---- Scores ---- */

static void test_score(void **state) {
    enum { N = 6 };
    llm_model *model = load(LLM_DTYPE_F32);
    llm_context *ctx = open(model, 4, 16 * LLM_CACHE_BLOCK), *large = open(model, 4, 0);
    static llm_token contexts[N][300], ending[80];
    const llm_token *endings[2] = {ending, ending + 3};
    const int lengths[2] = {70, 40};
    llm_question questions[N];
    double got[2 * N], expected[2 * N];
    llm_error err;
    (void)state;
    for (int i = 0; i < 80; i++) ending[i] = token_at(30, i);
    for (int i = 0; i < N; i++) {
        make_prompt(contexts[i], 150, 31); /* they begin alike */
        make_prompt(contexts[i] + 150, 10 * i + 1, 32 + i);
        questions[i] = (llm_question){contexts[i], 151 + 10 * i, 2, endings, lengths};
    }
    if (llm_score(large, questions, N, NULL, expected, NULL, &err)) fail_msg("%s", err.message);
    if (llm_score(ctx, questions, N, NULL, got, NULL, &err)) fail_msg("%s", err.message);
    assert_memory_equal(got, expected, sizeof got);
    llm_context_free(ctx);
    llm_context_free(large);
    llm_model_free(model);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_long_texts),   cmocka_unit_test(test_long_batch),    cmocka_unit_test(test_generate),
        cmocka_unit_test(test_conversation), cmocka_unit_test(test_cancelled),     cmocka_unit_test(test_streams),
        cmocka_unit_test(test_drafts),       cmocka_unit_test(test_beside_stream), cmocka_unit_test(test_room),
        cmocka_unit_test(test_cut_back),     cmocka_unit_test(test_forks),         cmocka_unit_test(test_saved),
        cmocka_unit_test(test_order),        cmocka_unit_test(test_score)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
