/* The default model is compared with independent references: the logits of a float64 forward pass and the greedy text
   of llama.cpp. The perplexity of the other types, and their divergence from f32, have limits.
   tests/golden/README.md says where the data come from. */
#include "tests/check.h"
#include "llm.h"
#include "tests/common.h"

#include <errno.h>

static int argmax(const float *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++)
        if (logits[i] > logits[best]) best = i;
    return best;
}

static llm_context *open_model(llm_dtype dtype, int n_ctx, int n_seq, int n_logits) {
    llm_model *model = load_model(model_path(), &(llm_model_desc){.dtype = dtype});
    return create_context(model, &(llm_context_desc){.n_ctx = n_ctx, .n_seq = n_seq, .n_logits = n_logits});
}

/* ---- Logits ---- */

static uint32_t word(const char *data, size_t i) {
    uint32_t x;
    memcpy(&x, data + 4 * i, 4);
    return x;
}

static float number(const char *data, size_t i) {
    float x;
    memcpy(&x, data + 4 * i, 4);
    return x;
}

/* The file is made of 4-byte words: "LGT1", the counts of positions, vocabulary, probes and top ids; the tokens; the
   probed ids; then for each position the largest |logit|, the argmax, the probes' logits, the top ids and logits. */
static double worst_logit_error(llm_context *ctx, const char *data, int *n_argmax) {
    size_t n = word(data, 1), n_vocab = word(data, 2), n_probe = word(data, 3), n_top = word(data, 4),
           at = 5 + n + n_probe;
    llm_token tokens[64];
    bool logits[64];
    double worst = 0;
    llm_error err;
    assert_int_equal(n, 64);
    for (size_t i = 0; i < n; i++) {
        tokens[i] = (llm_token)word(data, 5 + i);
        logits[i] = true;
    }
    llm_batch batch = {64, tokens, NULL, logits};
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    for (size_t i = 0; i < n; i++, at += 2 + n_probe + 2 * n_top) {
        const float *ours = llm_logits(ctx, (int)i);
        double peak = number(data, at);
        for (size_t j = 0; j < n_probe; j++) {
            double error = fabs(ours[word(data, 5 + n + j)] - number(data, at + 2 + j)) / peak;
            if (!(error <= worst)) worst = error;
        }
        for (size_t j = 0; j < n_top; j++) {
            double error =
                fabs(ours[word(data, at + 2 + n_probe + j)] - number(data, at + 2 + n_probe + n_top + j)) / peak;
            if (!(error <= worst)) worst = error;
        }
        *n_argmax += argmax(ours, (int)n_vocab) == (int)word(data, at + 1);
    }
    return worst;
}

static void check_logits(llm_dtype dtype, double bound, int least_argmax) {
    int n_argmax = 0;
    bytes data = read_file(golden_path("logits.bin"));
    llm_context *ctx = open_model(dtype, 64, 1, 64);
    double worst = worst_logit_error(ctx, (const char *)data.at, &n_argmax);
    close_context(ctx);
    free(data.at);
    print_message("largest error %.2e of the largest logit, argmax %d of 64\n", worst, n_argmax);
    assert_true(worst <= bound);
    assert_true(n_argmax >= least_argmax);
}

static void test_logits_f32(void **state) {
    (void)state;
    check_logits(LLM_DTYPE_F32, 1e-4, 64);
}

/* Rounding only the weights to bf16 changes the float64 reference's logits by 1e-2. */
static void test_logits_bf16(void **state) {
    (void)state;
    check_logits(LLM_DTYPE_BF16, 2e-2, 62);
}

/* ---- Greedy text ---- */

enum { PROMPTS = 20, TOKENS = 100, PROMPT_ROOM = 512 };

typedef struct text {
    int n_prompt, n_new, n_done;
    llm_token prompt[PROMPT_ROOM], new_tokens[TOKENS];
    double gaps[TOKENS];
    bool over;
} text;

/* Lines of "n_prompt id ... n_new id gap id gap ..."; those that begin with # are comments. */
static int read_texts(const char *data, text *texts) {
    int n = 0;
    for (const char *line = data; line && *line; line = strchr(line, '\n'), line += line != NULL) {
        char *at = (char *)(uintptr_t)line;
        if (*line == '#') continue;
        assert_true(n < PROMPTS);
        text *t = &texts[n++];
        t->n_prompt = (int)strtol(at, &at, 10);
        assert_true(t->n_prompt > 0 && t->n_prompt <= PROMPT_ROOM);
        for (int i = 0; i < t->n_prompt; i++) t->prompt[i] = (llm_token)strtol(at, &at, 10);
        t->n_new = (int)strtol(at, &at, 10);
        assert_true(t->n_new > 0 && t->n_new <= TOKENS);
        for (int i = 0; i < t->n_new; i++) {
            t->new_tokens[i] = (llm_token)strtol(at, &at, 10);
            t->gaps[i] = strtod(at, &at);
        }
    }
    return n;
}

/* All prompts run in one batch. Each token must be the reference's, unless the reference's top two logits were nearly
   equal. */
static void test_greedy(void **state) {
    bytes data = read_file(golden_path("greedy.txt"));
    text *texts = (text *)calloc(PROMPTS, sizeof *texts);
    llm_context *ctx = open_model(LLM_DTYPE_F32, 1024, PROMPTS, PROMPTS);
    int checked = 0, left = PROMPTS;
    llm_error err;
    (void)state;
    assert_non_null(texts);
    assert_int_equal(read_texts((const char *)data.at, texts), PROMPTS);
    for (int round = 0; left; round++) {
        llm_token tokens[PROMPTS * PROMPT_ROOM];
        int seqs[PROMPTS * PROMPT_ROOM], n = 0, last[PROMPTS];
        for (int i = 0; i < PROMPTS; i++) {
            const text *t = &texts[i];
            if (t->over) continue;
            int count = round ? 1 : t->n_prompt;
            for (int j = 0; j < count; j++, n++) {
                tokens[n] = round ? t->new_tokens[t->n_done - 1] : t->prompt[j];
                seqs[n] = i;
            }
            last[i] = n - 1;
        }
        llm_batch batch = {n, tokens, seqs, NULL};
        if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
        for (int i = 0; i < PROMPTS; i++) {
            text *t = &texts[i];
            if (t->over) continue;
            llm_token got =
                argmax(llm_logits(ctx, last[i]), llm_tokenizer_n_vocab(llm_model_tokenizer(llm_context_model(ctx))));
            if (got != t->new_tokens[t->n_done]) {
                print_message("prompt %d, token %d: %d instead of %d, which led by %g\n", i, t->n_done, got,
                              t->new_tokens[t->n_done], t->gaps[t->n_done]);
                assert_true(t->gaps[t->n_done] < 1e-3);
                t->over = true;
            }
            checked++;
            t->over = t->over || ++t->n_done == t->n_new;
            left -= t->over;
        }
    }
    print_message("%d greedy tokens of %d prompts\n", checked, PROMPTS);
    close_context(ctx);
    free(texts);
    free(data.at);
}

/* ---- Perplexity and divergence ---- */

enum { WINDOW = 512, READERS = 5, MOST_SCORED = 10000 };

/* A type of weights and its results on the text. */
typedef struct reader {
    llm_dtype dtype;
    llm_context *ctx;
    double loss;       /* sum of -log p of the text's tokens */
    double perplexity; /* exp of the mean loss */
    double mean, p99;  /* Kullback-Leibler divergence from the first reader (f32), in nats per token */
    double divergences[MOST_SCORED];
} reader;

static double log_sum_exp(const float *row, int n) {
    double total = 0, most = row[argmax(row, n)];
    for (int i = 0; i < n; i++) total += exp(row[i] - most);
    return most + log(total);
}

/* Scores the token after position i of the window with all readers. `p` is scratch for n_vocab probabilities. */
static void score_position(reader *readers, int i, llm_token next, int n_vocab, int n_scored, double *p) {
    const float *first = llm_logits(readers[0].ctx, i);
    double first_log_sum = log_sum_exp(first, n_vocab);
    for (int j = 0; j < n_vocab; j++) p[j] = exp(first[j] - first_log_sum);
    for (reader *r = readers; r < readers + READERS; r++) {
        const float *row = llm_logits(r->ctx, i);
        double log_sum = r == readers ? first_log_sum : log_sum_exp(row, n_vocab), divergence = 0;
        for (int j = 0; j < n_vocab && r != readers; j++)
            divergence += p[j] * ((first[j] - first_log_sum) - (row[j] - log_sum));
        r->divergences[n_scored] = divergence;
        r->loss += log_sum - row[next];
    }
}

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void summarize(reader *r, int n_scored) {
    double sum = 0;
    for (int i = 0; i < n_scored; i++) sum += r->divergences[i];
    qsort(r->divergences, (size_t)n_scored, sizeof *r->divergences, compare_doubles);
    r->perplexity = exp(r->loss / n_scored);
    r->mean = sum / n_scored;
    r->p99 = r->divergences[n_scored * 99 / 100];
}

/* Runs all readers over the text. They score the second half of each window of 512 tokens, as llama.cpp does. */
static void read_text_with(reader *readers, const char *data, size_t size) {
    const llm_tokenizer *tokenizer = llm_model_tokenizer(llm_context_model(readers[0].ctx));
    int n_vocab = llm_tokenizer_n_vocab(tokenizer), n_scored = 0;
    llm_token *ids = (llm_token *)malloc((size + 8) * sizeof *ids);
    double *p = (double *)malloc((size_t)n_vocab * sizeof *p);
    bool logits[WINDOW];
    llm_error err;
    assert_non_null(ids);
    assert_non_null(p);
    int64_t n = llm_encode(tokenizer, data, size, 0, ids, size + 8, &err);
    for (int i = 0; i < WINDOW; i++) logits[i] = i >= WINDOW / 2 && i < WINDOW - 1;
    for (int64_t first = 0; first + WINDOW <= n; first += WINDOW) {
        llm_batch batch = {WINDOW, ids + first, NULL, logits};
        for (reader *r = readers; r < readers + READERS; r++) {
            assert_int_equal(llm_seq_truncate(r->ctx, 0, 0, NULL), LLM_OK);
            if (llm_forward(r->ctx, &batch, &err)) fail_msg("%s", err.message);
        }
        for (int i = WINDOW / 2; i < WINDOW - 1; i++, n_scored++) {
            assert_true(n_scored < MOST_SCORED);
            score_position(readers, i, ids[first + i + 1], n_vocab, n_scored, p);
        }
    }
    for (reader *r = readers; r < readers + READERS; r++) summarize(r, n_scored);
    free(p);
    free(ids);
}

static void test_perplexity(void **state) {
    static reader readers[READERS] = {{.dtype = LLM_DTYPE_F32},
                                      {.dtype = LLM_DTYPE_BF16},
                                      {.dtype = LLM_DTYPE_INT8},
                                      {.dtype = LLM_DTYPE_INT4},
                                      {.dtype = LLM_DTYPE_FILE}};
    bytes data = read_file(golden_path("heldout.txt"));
    double f32;
    (void)state;
    for (reader *r = readers; r < readers + READERS; r++) r->ctx = open_model(r->dtype, WINDOW, 1, WINDOW / 2);
    read_text_with(readers, (const char *)data.at, data.n);
    f32 = readers[0].perplexity;
    for (reader *r = readers; r < readers + READERS; r++) {
        print_message("%-4s perplexity %.4f (%+.3f %%), divergence from f32: mean %.5f, 99 %% below %.5f\n",
                      llm_dtype_name(r->dtype), r->perplexity, 100 * (r->perplexity / f32 - 1), r->mean, r->p99);
        close_context(r->ctx);
    }
    assert_true(fabs(f32 / 28.8670 - 1) < 1e-3); /* llama.cpp's result */
    assert_true(fabs(readers[1].perplexity / f32 - 1) < 2e-3);
    assert_true(fabs(readers[2].perplexity / f32 - 1) < 5e-3);
    for (int i = 3; i < READERS; i++) /* the file's own weights, with activations of 8 bits */
        assert_true(fabs(readers[i].perplexity / f32 - 1) < 5e-3);
    static const double means[READERS] = {0, 0.0003, 0.006, 0.004, 0.004},
                        p99s[READERS] = {0, 0.0014, 0.026, 0.02, 0.02};
    for (int i = 0; i < READERS; i++) /* limits are 1.5 times the measured values */
        assert_true(readers[i].mean <= means[i] && readers[i].p99 <= p99s[i] && (i == 0 || readers[i].mean > 0));
    free(data.at);
}

/* A value in kilobytes from /proc/self/status; 0 if it is missing. */
static long status_kb(const char *name) {
    char line[128];
    long n = 0;
    FILE *file = fopen("/proc/self/status", "rb");
    while (file && fgets(line, sizeof line, file))
        if (!strncmp(line, name, strlen(name))) n = strtol(line + strlen(name), NULL, 10);
    if (file) fclose(file);
    return n;
}

/* Loading a model does not need memory for the whole file in addition to the weights. Its threads end afterwards. */
static void test_loading(void **state) {
    (void)state;
    FILE *file = fopen("/proc/self/clear_refs", "wb");
    if (!file && errno == ENOENT) {
        print_message("skipped: this kernel was built without /proc/self/clear_refs\n");
        skip();
    }
    assert_non_null(file);
    fputs("5", file); /* resets the peak (VmHWM) */
    assert_int_equal(fclose(file), 0);
    long before = status_kb("VmRSS:"), threads = status_kb("Threads:");
    llm_model *model = load_model(model_path(), &(llm_model_desc){.dtype = LLM_DTYPE_INT4, .n_threads = 2});
    long weights = (long)(llm_model_get_info(model).weight_bytes >> 10), more = status_kb("VmHWM:") - before - weights;
    print_message("loading takes %ld KB in addition to %ld KB of weights\n", more, weights);
    assert_true(more < 64 << 10);
    assert_int_equal(status_kb("Threads:"), threads);
    llm_model_free(model);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_loading), cmocka_unit_test(test_logits_f32),
                                       cmocka_unit_test(test_logits_bf16), cmocka_unit_test(test_greedy),
                                       cmocka_unit_test(test_perplexity)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
