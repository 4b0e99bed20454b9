/* llm_calibrate: the importance agrees with a float64 forward pass (golden/calibrate.py), and is the same for any
   number of threads and any instruction set. llm_prune_directory uses it to choose the weights that it keeps, and
   llm_quantize_gguf to round: the weighted error is never larger than without it. Also refused texts, cancelling, and
   failing allocations. Variants: asan */
#include "tests/check.h"
#include "tests/tiny.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include "tests/common.h"

static char folder[64];

/* ---- The golden data ---- */

static bytes golden_file;
static const char *golden_text;
static int32_t n_golden_text, n_golden_ids, golden_piece, n_golden_matrices;
static const uint8_t *golden_matrices, *golden_blocks;

typedef struct matrix {
    char name[64];
    int32_t rows, cols;
    const uint8_t *mean_squares; /* [cols] doubles */
    const uint8_t *kept;         /* [rows][cols] */
} matrix;

static int32_t next_int(const uint8_t **at) {
    int32_t x;
    memcpy(&x, *at, sizeof x);
    *at += sizeof x;
    return x;
}

static matrix next_matrix(const uint8_t **at) {
    matrix m;
    memcpy(m.name, *at, sizeof m.name);
    *at += sizeof m.name;
    m.rows = next_int(at);
    m.cols = next_int(at);
    m.mean_squares = *at;
    *at += sizeof(double) * (size_t)m.cols;
    m.kept = *at;
    *at += (size_t)m.rows * (size_t)m.cols;
    return m;
}

static double double_at(const uint8_t *from, int i) {
    double x;
    memcpy(&x, from + sizeof x * (size_t)i, sizeof x);
    return x;
}

static const char *dense(void) { return golden_path("sparse/dense"); }

static llm_importance *calibrate(const llm_model *model, const char *text, size_t n, int n_ctx, int n_threads) {
    llm_calibrate_desc desc = {.n_ctx = n_ctx, .n_threads = n_threads};
    llm_importance *made;
    llm_error err;
    if (llm_calibrate(&made, model, text, n, &desc, &err)) fail_msg("%s", err.message);
    return made;
}

static llm_importance *calibrate_dense(const char *isa, int n_threads) {
    llm_model_desc desc = {.dtype = LLM_DTYPE_F32, .isa = isa};
    llm_model *model = load_model(dense(), &desc);
    llm_importance *made = calibrate(model, golden_text, (size_t)n_golden_text, golden_piece, n_threads);
    llm_model_free(model);
    return made;
}

/* ---- The importance ---- */

static void test_against_float64(void **state) {
    (void)state;
    llm_importance *made = calibrate_dense(NULL, 2);
    const uint8_t *at = golden_matrices;
    assert_int_equal(llm_importance_n_tokens(made), n_golden_ids);
    for (int i = 0; i < n_golden_matrices; i++) {
        const matrix m = next_matrix(&at);
        int n;
        const float *means = llm_importance_get(made, m.name, &n);
        assert_non_null(means);
        assert_int_equal(n, m.cols);
        for (int c = 0; c < n; c++) {
            const double wanted = double_at(m.mean_squares, c);
            if (!(fabs((double)means[c] - wanted) <= 1e-5 * wanted))
                fail_msg("%s, column %d: %g instead of %g", m.name, c, (double)means[c], wanted);
        }
    }
    llm_importance_free(made);
}

static void test_names(void **state) {
    (void)state;
    static const char *const same[][2] = {{"blk.0.attn_k.weight", "model.layers.0.self_attn.v_proj.weight"},
                                          {"blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"},
                                          {"blk.0.ffn_up.weight", "model.layers.0.mlp.gate_proj.weight"},
                                          {"blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight"},
                                          {"output.weight", "lm_head.weight"}};
    static const char *const none[] = {"",
                                       "blk.",
                                       "blk.0",
                                       "blk.0.",
                                       "blk..attn_q.weight",
                                       "blk.1.attn_q.weight",
                                       "blk.99999999999999999999.attn_q.weight",
                                       "blk.0.attn_q.bias",
                                       "blk.0.attn_norm.weight",
                                       "blk.0.output.weight",
                                       "attn_q.weight",
                                       "output_norm.weight",
                                       "model.layers.0.lm_head.weight",
                                       "model.embed_tokens.weight"};
    llm_importance *made = calibrate_dense(NULL, 1);
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        assert_non_null(llm_importance_get(made, same[i][0], NULL));
        assert_ptr_equal(llm_importance_get(made, same[i][0], NULL), llm_importance_get(made, same[i][1], NULL));
    }
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        int n = 1;
        if (llm_importance_get(made, none[i], &n)) fail_msg("\"%s\" must not be a matrix", none[i]);
        assert_int_equal(n, 0);
    }
    assert_null(llm_importance_get(made, NULL, NULL));
    assert_null(llm_importance_get(NULL, "output.weight", NULL));
    llm_importance_free(made);
    llm_importance_free(NULL);
}

/* A tied embedding has the importance of the head. */
static void test_tied(void **state) {
    (void)state;
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_BF16);
    llm_importance *made = calibrate(model, golden_text, 200, 50, 1);
    int n;
    assert_non_null(llm_importance_get(made, "token_embd.weight", &n));
    assert_int_equal(n, TINY_ODD.n_embd);
    assert_ptr_equal(llm_importance_get(made, "token_embd.weight", NULL),
                     llm_importance_get(made, "lm_head.weight", NULL));
    llm_importance_free(made);
    llm_model_free(model);
}

static void assert_same(const llm_importance *a, const llm_importance *b) {
    assert_int_equal(a->n, b->n);
    assert_memory_equal(a->squares, b->squares, a->n * sizeof *a->squares);
    assert_memory_equal(a->means, b->means, a->n * sizeof *a->means);
}

/* Any number of threads and any instruction set give the same bits. The text ends with a piece of one token. */
static void test_same_bits(void **state) {
    static const struct {
        const tiny_spec *spec;
        llm_dtype dtype;
    } cases[] = {{&TINY_ODD, LLM_DTYPE_F32},
                 {&TINY_ODD, LLM_DTYPE_BF16},
                 {&TINY_ODD, LLM_DTYPE_INT8},
                 {&TINY_2_4, LLM_DTYPE_BF16},
                 {&TINY_ALL_TYPES, LLM_DTYPE_FILE}};
    static const char *const sets[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon"};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llm_importance *first = NULL;
        for (size_t s = 0; s < sizeof sets / sizeof *sets; s++) {
            llm_model_desc desc = {.dtype = cases[i].dtype, .isa = sets[s], .n_threads = 1};
            llm_model *model;
            llm_error err;
            if (try_tiny(&model, cases[i].spec, desc, &err)) continue; /* this machine lacks the instruction set */
            for (int threads = 1; threads <= (SANITIZED ? 3 : 5); threads += 2) {
                llm_importance *made = calibrate(model, golden_text, 151, 50, threads);
                if (first) assert_same(first, made);
                if (first) llm_importance_free(made);
                else first = made;
            }
            llm_model_free(model);
        }
        llm_importance_free(first);
    }
}

/* ---- Texts ---- */

static int64_t peak_of_refusal; /* bytes */

static void refuses(const llm_model *model, const char *text, size_t n, int n_ctx, llm_status expected,
                    const char *words) {
    heap h = {0};
    llm_calibrate_desc desc = {.n_ctx = n_ctx, .n_threads = 2, .host = heap_host(&h)};
    llm_importance *made = (llm_importance *)(uintptr_t)1;
    llm_error err;
    assert_int_equal(llm_calibrate(&made, model, text, n, &desc, &err), expected);
    assert_null(made);
    assert_explained(expected, &err);
    if (!strstr(err.message, words)) fail_msg("\"%s\" does not say \"%s\"", err.message, words);
    assert_all_returned(&h);
    peak_of_refusal = h.peak;
}

static void test_refused_texts(void **state) {
    (void)state;
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_BF16);
    refuses(model, "", 0, 0, LLM_ERROR_ARGUMENT, "is empty");
    refuses(model, NULL, 0, 0, LLM_ERROR_ARGUMENT, "is empty");
    refuses(model, NULL, 5, 0, LLM_ERROR_ARGUMENT, "text is NULL");
    refuses(model, "too few", 7, 0, LLM_ERROR_ARGUMENT, "is too short: it has 7 tokens, a piece needs 512");
    refuses(model, "too few", 7, 8, LLM_ERROR_ARGUMENT, "is too short: it has 7 tokens, a piece needs 8");
    assert_true(peak_of_refusal < 64 << 10); /* no context was made */
    refuses(model, "a\0text", 6, 2, LLM_ERROR_ARGUMENT, "is not UTF-8: byte 1 is 0x00");
    refuses(model, "abc\xFF", 4, 2, LLM_ERROR_ARGUMENT, "is not UTF-8: byte 3 is 0xFF");
    refuses(model, "abcd\xC3", 5, 2, LLM_ERROR_ARGUMENT, "is not UTF-8: byte 4 is 0xC3");
    refuses(model, golden_text, 100, 1, LLM_ERROR_ARGUMENT, "n_ctx is 1");
    refuses(model, golden_text, 100, -1, LLM_ERROR_ARGUMENT, "n_ctx is -1");
    refuses(model, golden_text, 100, 1 << 30, LLM_ERROR_ARGUMENT, "it has 100 tokens, a piece needs 1073741824");
    refuses(NULL, golden_text, 100, 0, LLM_ERROR_ARGUMENT, "model or text is NULL");
    assert_int_equal(llm_calibrate(NULL, model, golden_text, 100, NULL, NULL), LLM_ERROR_ARGUMENT);
    llm_model_free(model);
}

/* If the tokenizer adds BOS, each piece begins with it. The text of a special token is read as this token. */
static void test_pieces(void **state) {
    static const char text[] = "abcdefgh<|end|>ijk";
    (void)state;
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_F32);
    llm_importance *plain = calibrate(model, text, sizeof text - 1, 6, 1);
    assert_int_equal(llm_importance_n_tokens(plain), 12);
    assert_true(model->tokenizer->bos >= 0);
    model->tokenizer->add_bos = true;
    llm_importance *with = calibrate(model, text, sizeof text - 1, 7, 1);
    assert_int_equal(llm_importance_n_tokens(with), 14);
    assert_memory_not_equal(plain->means, with->means, plain->n * sizeof *plain->means);
    llm_importance_free(plain);
    llm_importance_free(with);
    llm_model_free(model);
}

typedef struct stopper {
    heap h; /* must be first: the allocator gets the same pointer */
    int n_calls, stop_at;
    float last;
} stopper;

static bool count_progress(void *user, float done) {
    stopper *s = (stopper *)user;
    assert_true(done >= s->last && done <= 1);
    s->last = done;
    return ++s->n_calls != s->stop_at;
}

static void test_cancelled(void **state) {
    (void)state;
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_BF16);
    stopper s = {{0}, 0, 0, 0};
    llm_calibrate_desc desc = {.n_ctx = 40, .n_threads = 2, .host = heap_host(&s.h)};
    llm_importance *made;
    llm_error err;
    desc.host.progress = count_progress;
    assert_int_equal(llm_calibrate(&made, model, golden_text, 200, &desc, &err), LLM_OK);
    llm_importance_free(made);
    assert_true(s.last == 1);
    const int n_calls = s.n_calls;
    assert_true(n_calls >= 5);
    for (int i = 1; i <= n_calls; i++) {
        s.n_calls = 0;
        s.last = 0;
        s.stop_at = i;
        assert_int_equal(llm_calibrate(&made, model, golden_text, 200, &desc, &err), LLM_ERROR_CANCELLED);
        assert_explained(LLM_ERROR_CANCELLED, &err);
        assert_null(made);
        assert_all_returned(&s.h);
    }
    llm_model_free(model);
}

typedef struct starved {
    heap h;
    const llm_model *model;
} starved;

static llm_status calibrate_starved(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_calibrate_desc desc = {.n_ctx = 40, .n_threads = 2, .host = heap_host(&s->h)};
    llm_importance *made;
    llm_status status = llm_calibrate(&made, s->model, golden_text, 100, &desc, err);
    assert_int_equal(status == LLM_OK, made != NULL);
    llm_importance_free(made);
    return status;
}

static void test_starved(void **state) {
    (void)state;
    llm_model *model = load_tiny(&TINY_ODD, LLM_DTYPE_BF16);
    starved s = {{0}, model};
    starve(&s.h, calibrate_starved, &s, 1, "llm_calibrate");
    llm_model_free(model);
}

/* ---- 2:4 sparsity ---- */

/* Returns the weights of a tensor in a file that llm_prune_directory wrote. */
static const uint8_t *find_tensor(bytes file, const char *name) {
    char key[100];
    uint64_t n;
    snprintf(key, sizeof key, "\"%s\": ", name);
    memcpy(&n, file.at, sizeof n);
    const char *entry = strstr((const char *)file.at + sizeof n, key);
    assert_non_null(entry);
    return file.at + sizeof n + n + strtoull(strstr(entry, "offsets\": [") + 11, NULL, 10);
}

static bool is_zero(const uint8_t *weights, size_t i, bool int8) {
    return int8 ? !weights[i] : !weights[2 * i] && !weights[2 * i + 1];
}

static void check_kept(const char *path, bool int8) {
    bytes file = read_file(joined(path, "model.safetensors"));
    const uint8_t *at = golden_matrices;
    size_t n_kept = 0, n_all = 0;
    for (int i = 0; i < n_golden_matrices; i++) {
        const matrix m = next_matrix(&at);
        if (!strstr(m.name, "_proj.")) continue;
        const uint8_t *weights = find_tensor(file, m.name);
        for (size_t j = 0; j < (size_t)m.rows * (size_t)m.cols; j++) {
            if (!is_zero(weights, j, int8) && !m.kept[j]) fail_msg("%s: weight %d should be zero", m.name, (int)j);
            n_kept += !is_zero(weights, j, int8);
            n_all++;
        }
    }
    assert_true(n_kept > n_all * 2 / 5); /* nearly half: some kept weights are zero or round to zero */
    free(file.at);
}

/* Weights that NumPy does not keep are zero, for both types. The model is held as 2:4. */
static void test_pruned(void **state) {
    static const llm_dtype dtypes[] = {LLM_DTYPE_BF16, LLM_DTYPE_INT8};
    (void)state;
    llm_importance *made = calibrate_dense(NULL, 2);
    for (int i = 0; i < 2; i++) {
        char out[128];
        llm_error err;
        snprintf(out, sizeof out, "%s/wanda-%s", folder, llm_dtype_name(dtypes[i]));
        if (llm_prune_directory(dense(), out, dtypes[i], made, NULL, &err)) fail_msg("%s", err.message);
        check_kept(out, dtypes[i] == LLM_DTYPE_INT8);
        llm_model *model = load_model(out, NULL);
        assert_non_null(strstr(llm_model_get_info(model).held, "2:4"));
        llm_model_free(model);
    }
    llm_importance_free(made);
}

/* If the importance is zero or equal everywhere, the weights are chosen by magnitude. */
static void test_pruned_by_magnitude(void **state) {
    static const float values[] = {0, 3};
    (void)state;
    llm_importance *made = calibrate_dense(NULL, 1);
    llm_error err;
    char plain[128];
    snprintf(plain, sizeof plain, "%s/magnitude", folder);
    if (llm_prune_directory(dense(), plain, LLM_DTYPE_BF16, NULL, NULL, &err)) fail_msg("%s", err.message);
    bytes a = read_file(joined(plain, "model.safetensors"));
    for (int v = 0; v < 2; v++) {
        char out[128];
        snprintf(out, sizeof out, "%s/even%d", folder, v);
        for (size_t i = 0; i < made->n; i++) made->means[i] = values[v];
        if (llm_prune_directory(dense(), out, LLM_DTYPE_BF16, made, NULL, &err)) fail_msg("%s", err.message);
        bytes b = read_file(joined(out, "model.safetensors"));
        assert_int_equal(a.n, b.n);
        assert_memory_equal(a.at, b.at, a.n);
        free(b.at);
    }
    free(a.at);
    llm_importance_free(made);
}

/* ---- Rounding ---- */

static double weighted_error(const llm__file_type_info *type, const float *x, const float *h, const uint8_t *block,
                             size_t n) {
    float made[256];
    double error = 0;
    type->decode(block, n, made);
    for (size_t i = 0; i < n; i++) error += (double)h[i] * pow((double)made[i] - (double)x[i], 2);
    return error;
}

/* No block has a larger error than without importance, and the sum is close to the least error that NumPy found. The
   limits are wider for types with blocks of 256, whose scales have few bits, unlike NumPy's, and for Q8_0. */
static void test_blocks(void **state) {
    const uint8_t *at = golden_blocks;
    const int n = next_int(&at), n_types = next_int(&at);
    float *x = (float *)malloc(2 * sizeof *x * (size_t)n), *h = x + n; /* aligned, as the file is not */
    uint8_t *plain = (uint8_t *)malloc((size_t)n * 4), *made = (uint8_t *)malloc((size_t)n * 4);
    (void)state;
    assert_int_equal(n % 256, 0);
    assert_int_equal(n_types, 8);
    memcpy(x, at, 2 * sizeof *x * (size_t)n);
    at += 2 * sizeof *x * (size_t)n;
    for (int t = 0; t < n_types; t++) {
        const llm__file_type_info *type = llm__file_type_find((uint32_t)next_int(&at));
        const size_t step = type->block_weights, bytes_of_block = type->block_bytes;
        double sum_plain = 0, sum_made = 0, sum_least = 0;
        llm__weigh_row(type, x, NULL, (size_t)n, plain);
        llm__weigh_row(type, x, h, (size_t)n, made);
        for (size_t i = 0; i < (size_t)n; i += 256) {
            const double least = double_at(at, (int)(i / 256));
            double error = 0;
            for (size_t j = i; j < i + 256; j += step) {
                const size_t block = j / step * bytes_of_block;
                const double before = weighted_error(type, x + j, h + j, plain + block, step),
                             after = weighted_error(type, x + j, h + j, made + block, step);
                if (!(after <= before)) fail_msg("%s: block at %d: %g, was %g", type->name, (int)j, after, before);
                sum_plain += before;
                error += after;
            }
            sum_made += error;
            sum_least += least;
        }
        at += sizeof(double) * (size_t)(n / 256);
        print_message("%s: error %.4g, without importance %.4g, least %.4g\n", type->name, sum_made, sum_plain,
                      sum_least);
        assert_true(sum_made < 0.9 * sum_plain);
        assert_true(sum_made < (step == 256 ? 1.15 : type->type == LLM__Q8_0 ? 1.35 : 1.05) * sum_least);
    }
    free(x);
    free(plain);
    free(made);
}

/* If the importance of a whole block is zero, the block is the same as without importance. Extreme weights do not
   give numbers that are much larger. */
static void test_blocks_without(void **state) {
    static const float ends[] = {0, -0.0f, 1e-45f, -1e-45f, 1e-39f, -1e-38f, 65504, -65504};
    float x[256], h[256] = {0}, read[256];
    uint8_t plain[1024], made[1024];
    (void)state;
    for (size_t k = 0; k < sizeof llm__gguf_recipes / sizeof *llm__gguf_recipes; k++) {
        const llm__file_type_info *type = llm__file_type_find(llm__gguf_recipes[k].type);
        const size_t n = 256 / type->block_weights * type->block_bytes;
        for (int i = 0; i < 256; i++) x[i] = (float)(i * 37 % 101 - 50), h[i] = 0;
        llm__weigh_row(type, x, NULL, 256, plain);
        llm__weigh_row(type, x, h, 256, made);
        assert_memory_equal(plain, made, n);
        for (size_t e = 0; e < sizeof ends / sizeof *ends; e++) {
            for (int i = 0; i < 256; i++) {
                x[i] = i % 3 ? ends[e] : i % 2 ? ends[0] : ends[i % 8];
                h[i] = i % 5 ? 1e-38f : i % 7 ? 0 : 1;
            }
            llm__weigh_row(type, x, h, 256, made);
            type->decode(made, 256, read);
            for (int i = 0; i < 256; i++) assert_true(fabsf(read[i]) <= 2 * 65504.0f);
        }
    }
}

/* A group of a block of 256 whose importance is zero is rounded about as well as without importance. */
static void test_groups_without(void **state) {
    static const char *const types[] = {"Q4_K", "Q5_K", "Q6_K"};
    (void)state;
    for (size_t k = 0; k < sizeof types / sizeof *types; k++) {
        const llm__file_type_info *type = NULL;
        for (size_t i = 0; i < sizeof llm__gguf_recipes / sizeof *llm__gguf_recipes; i++)
            if (!strcmp(llm__gguf_recipes[i].name, types[k])) type = llm__file_type_find(llm__gguf_recipes[i].type);
        for (int scale = 0; scale < 3; scale++) {
            float x[256], h[256];
            uint8_t plain[256], made[256];
            for (int i = 0; i < 256; i++) {
                x[i] = (float)(i * 37 % 101 - 50) * (i / 32 == 3 ? (float[]){0.1f, 1, 4}[scale] : 1);
                h[i] = i / 32 == 3 ? 0 : (float)(1 + i % 7) / 7;
            }
            llm__weigh_row(type, x, NULL, 256, plain);
            llm__weigh_row(type, x, h, 256, made);
            assert_memory_not_equal(plain, made, type->block_bytes);
            const double before = weighted_error(type, x, h, plain, 256), after = weighted_error(type, x, h, made, 256);
            assert_true(after <= before);
            float read[2][256];
            double errors[2] = {0, 0};
            type->decode(plain, 256, read[0]);
            type->decode(made, 256, read[1]);
            for (int v = 0; v < 2; v++)
                for (int i = 96; i < 128; i++) errors[v] += pow((double)read[v][i] - (double)x[i], 2);
            print_message("%s: error of the group %.4g, without importance %.4g\n", types[k], errors[1], errors[0]);
            assert_true(errors[1] <= 2 * errors[0]);
        }
    }
}

static llm_status to_gguf(const tiny_spec *spec, const char *to, const char *type, const llm_importance *importance,
                          int n_threads, llm_error *err) {
    llm_quantize_desc desc = {.type = type, .n_threads = n_threads, .importance = importance};
    size_t size;
    uint8_t *data = tiny_model(spec, &size);
    llm_status status = llm_quantize_gguf_memory(data, size, to, &desc, err);
    free(data);
    return status;
}

static const tiny_spec whole_blocks = {2, 256, 256, 4, 2, 64, 512, 43, 1, 0, 1};
static const tiny_spec one_layer = {1, 256, 256, 4, 2, 64, 512, 43, 1, 0, 1};
static const tiny_spec wider = {2, 256, 512, 4, 2, 64, 512, 43, 1, 0, 1};

/* Importance changes the blocks of a file, but not its size. The number of threads does not matter. Types without
   blocks do not change. */
static void test_files(void **state) {
    static const char *const types[] = {"F32", "F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K_M", "Q6_K"};
    (void)state;
    llm_model *model = load_tiny(&whole_blocks, LLM_DTYPE_F32);
    llm_importance *made = calibrate(model, golden_text, 200, 50, 1);
    llm_model_free(model);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        char path[3][128];
        bytes files[3];
        llm_error err;
        for (int j = 0; j < 3; j++) {
            snprintf(path[j], sizeof path[j], "%s/%s-%d.gguf", folder, types[i], j);
            if (to_gguf(&whole_blocks, path[j], types[i], j ? made : NULL, j == 2 ? 3 : 1, &err))
                fail_msg("%s", err.message);
            files[j] = read_file(path[j]);
            assert_int_equal(files[j].n, files[0].n);
        }
        assert_memory_equal(files[1].at, files[2].at, files[1].n);
        assert_int_equal(memcmp(files[0].at, files[1].at, files[0].n) == 0, i < 3);
        llm_model_free(load_model(path[1], NULL));
        for (int j = 0; j < 3; j++) free(files[j].at);
    }
    llm_importance_free(made);
}

/* The importance of a model with other numbers of layers or columns is refused. */
static void test_other_models(void **state) {
    (void)state;
    const tiny_spec *const others[] = {&one_layer, &wider};
    llm_importance *of_dense = calibrate_dense(NULL, 1);
    const char *out = joined(folder, "never");
    llm_error err;
    for (int i = 0; i < 2; i++) {
        llm_model *model = load_tiny(others[i], LLM_DTYPE_BF16);
        llm_importance *made = calibrate(model, golden_text, 200, 50, 1);
        llm_model_free(model);
        assert_int_equal(to_gguf(&whole_blocks, out, "Q4_0", made, 1, &err), LLM_ERROR_ARGUMENT);
        if (!strstr(err.message, "the importance is of another model")) fail_msg("%s", err.message);
        assert_int_equal(to_gguf(i ? &one_layer : &whole_blocks, out, "Q4_0", made, 1, &err), LLM_ERROR_ARGUMENT);
        assert_int_equal(llm_prune_directory(dense(), out, LLM_DTYPE_BF16, made, NULL, &err), LLM_ERROR_ARGUMENT);
        assert_non_null(strstr(err.message, " columns, there it has "));
        assert_int_equal(access(out, F_OK), -1);
        llm_importance_free(made);
    }
    llm_importance_free(of_dense);
}

/* ---- The default model ---- */

enum { PIECES = 4, PIECE = 512 };

/* Returns the perplexity of the second half of each piece. */
static double perplexity(const char *path, const char *text, size_t n) {
    llm_model *model = load_model(path, NULL);
    llm_context_desc desc = {.n_ctx = PIECE, .n_seq = 2, .n_batch = PIECE};
    llm_context *ctx = create_context(model, &desc);
    static llm_token ids[1 << 16];
    const llm_token *endings[PIECES];
    llm_question questions[PIECES];
    const int n_ending = PIECE / 2 - 1;
    double log_likelihoods[PIECES], sum = 0;
    llm_error err;
    int64_t n_ids = llm_encode(llm_model_tokenizer(model), text, n, 0, ids, 1 << 16, &err);
    assert_true(n_ids >= PIECES * PIECE && n_ids <= 1 << 16);
    for (int i = 0; i < PIECES; i++) {
        endings[i] = ids + i * PIECE + PIECE / 2 + 1;
        const llm_question q = {ids + i * PIECE, PIECE / 2 + 1, 1, &endings[i], &n_ending};
        questions[i] = q;
    }
    if (llm_score(ctx, questions, PIECES, NULL, log_likelihoods, NULL, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < PIECES; i++) sum -= log_likelihoods[i];
    close_context(ctx);
    return exp(sum / (PIECES * n_ending));
}

/* Rounding with importance brings the default model's perplexity closer to that of the original, on another part of the
   text. */
static void test_perplexity(void **state) {
    (void)state;
    bytes text = read_file(golden_path("heldout.txt"));
    const size_t n_scored = 12000; /* bytes at the beginning of the text; the calibration uses a later part */
    llm_model *model = load_model(model_path(), NULL);
    llm_importance *made = calibrate(model, strchr((const char *)text.at + 3 * n_scored, '\n'), 8000, 0, 0);
    llm_model_free(model);
    double found[2];
    for (int i = 0; i < 2; i++) {
        llm_quantize_desc desc = {.type = "Q4_0", .importance = i ? made : NULL};
        llm_error err;
        const char *path = joined(folder, i ? "weighed.gguf" : "plain.gguf");
        if (llm_quantize_gguf(model_path(), path, &desc, &err)) fail_msg("%s", err.message);
        found[i] = perplexity(path, (const char *)text.at, n_scored);
        remove(path);
    }
    const double of_file = perplexity(model_path(), (const char *)text.at, n_scored);
    print_message("perplexity: original %.3f, Q4_0 %.3f, Q4_0 with importance %.3f\n", of_file, found[0], found[1]);
    assert_true(found[1] - of_file < 0.75 * (found[0] - of_file));
    llm_importance_free(made);
    free(text.at);
}

static int set_up(void **state) {
    (void)state;
    golden_file = read_file(golden_path("calibrate.bin"));
    const uint8_t *at = golden_file.at;
    n_golden_text = next_int(&at);
    golden_text = (const char *)at;
    at += n_golden_text;
    n_golden_ids = next_int(&at);
    at += 4 * n_golden_ids;
    golden_piece = next_int(&at);
    n_golden_matrices = next_int(&at);
    golden_matrices = at;
    for (int i = 0; i < n_golden_matrices; i++) next_matrix(&at);
    golden_blocks = at;
    strcpy(folder, "/tmp/llm_calibrate_XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int tear_down(void **state) {
    char command[128];
    (void)state;
    free(golden_file.at);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_float64),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_tied),
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_refused_texts),
        cmocka_unit_test(test_pieces),
        cmocka_unit_test(test_cancelled),
        cmocka_unit_test(test_starved),
        cmocka_unit_test(test_pruned),
        cmocka_unit_test(test_pruned_by_magnitude),
        cmocka_unit_test(test_blocks),
        cmocka_unit_test(test_blocks_without),
        cmocka_unit_test(test_groups_without),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_other_models),
    };
    const struct CMUnitTest large[] = {cmocka_unit_test(test_perplexity)};
    const int failed = cmocka_run_group_tests(tests, set_up, tear_down);
    return failed || SANITIZED || emulated() ? failed : cmocka_run_group_tests(large, set_up, tear_down);
}
