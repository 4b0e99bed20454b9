/* llm_quantize_gguf from Hugging Face directories. The file must give the same logits and token ids as the directory,
   and have the keys and tensors of the files that golden/hf.py made with the gguf package. Models that GGUF cannot
   represent are refused.
   Variants: asan */
#include "tests/check.h"
#define LLM_IMPLEMENTATION
#define LLM_NO_SIMD
#include "llm.h"

#include <jansson.h>

#include "tests/common.h"

static char folder[] = "/tmp/llm-test-convert-XXXXXX";

static int make_folder(void **state) {
    (void)state;
    return mkdtemp(folder) ? 0 : 1;
}

static int remove_folder(void **state) {
    (void)state;
    return rmdir(folder);
}

static const char *golden(const char *kind, const char *name, const char *end) {
    char inner[200];
    snprintf(inner, sizeof inner, "%s/%s%s", kind, name, end);
    return golden_path(inner);
}

static const char *out_path(void) { return joined(folder, "out.gguf"); }

static void convert(const char *from, const char *type) {
    llm_quantize_desc desc;
    llm_error err;
    memset(&desc, 0, sizeof desc);
    desc.type = type;
    desc.n_threads = 2;
    if (llm_quantize_gguf(from, out_path(), &desc, &err)) fail_msg("%s: %s", from, err.message);
}

/* ---- Models ---- */

/* Returns the logits [n][n_vocab] of n tokens. Free them with free(). */
static float *compute_logits(const char *path, llm_dtype dtype, int n, int *n_vocab) {
    llm_token tokens[300];
    bool all[300];
    llm_batch batch = {n, tokens, NULL, all};
    llm_model_desc desc;
    llm_context_desc context;
    llm_error err;
    memset(&desc, 0, sizeof desc);
    memset(&context, 0, sizeof context);
    desc.dtype = dtype;
    llm_model *model = load_model(path, &desc);
    context.n_ctx = context.n_logits = n;
    llm_context *ctx = create_context(model, &context);
    *n_vocab = llm_model_get_info(model).n_vocab;
    for (int i = 0; i < n; i++) {
        tokens[i] = (7 * i + i / 9) % *n_vocab;
        all[i] = true;
    }
    if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    float *logits = (float *)malloc((size_t)n * (size_t)*n_vocab * sizeof *logits);
    assert_non_null(logits);
    for (int i = 0; i < n; i++) memcpy(logits + i * *n_vocab, llm_logits(ctx, i), (size_t)*n_vocab * sizeof *logits);
    llm_context_free(ctx);
    llm_model_free(model);
    return logits;
}

static void compare_logits(const char *directory, llm_dtype dtype, bool exact) {
    enum { N = 250 }; /* more than the window of "mistral" */
    int n_vocab, n_other;
    float *a = compute_logits(directory, dtype, N, &n_vocab), *b = compute_logits(out_path(), dtype, N, &n_other);
    assert_int_equal(n_vocab, n_other);
    for (int i = 0; i < N * n_vocab; i++)
        if (exact ? memcmp(&a[i], &b[i], sizeof a[i]) != 0 : !(fabsf(a[i] - b[i]) <= 1e-4f))
            fail_msg("%s: logit %d is %g, not %g", directory, i, (double)b[i], (double)a[i]);
    free(a);
    free(b);
}

typedef struct open_job {
    const char *path;
    llm__checkpoint *ck;
} open_job;

static void open_body(llm__env *env, void *arg) {
    open_job *job = (open_job *)arg;
    job->ck = llm__gguf_open(env, job->path);
}

/* Opens two files with the library's reader. Both live in one pool. */
static void open_both(llm__pool *pool, open_job jobs[2]) {
    llm__env env;
    llm_error err;
    llm__pool_init(pool, NULL);
    for (int i = 0; i < 2; i++) {
        llm__env_init(&env, pool, &err, jobs[i].path);
        if (llm__env_run(&env, open_body, &jobs[i])) fail_msg("%s", err.message);
    }
}

static void compare_tensors(const llm__checkpoint *a, const llm__checkpoint *b) {
    assert_int_equal(a->n_tensors, b->n_tensors);
    for (size_t i = 0; i < a->n_tensors; i++) {
        const llm__tensor *x = &a->tensors[i], *y = &b->tensors[i];
        float rows[2][512];
        assert_true(llm__str_equal(x->name, y->name) && x->rows == y->rows && x->cols == y->cols && x->cols <= 512);
        for (uint64_t r = 0; r < x->rows; r++) {
            x->type->decode(x->data + r * x->row_bytes, (size_t)x->cols, rows[0]);
            y->type->decode(y->data + r * y->row_bytes, (size_t)y->cols, rows[1]);
            for (uint64_t k = 0; k < x->cols; k++)
                if (!(fabsf(rows[0][k] - rows[1][k]) <= 1e-6f * fabsf(rows[0][k])))
                    fail_msg("%.*s: weight %d of row %d differs", LLM__SHOW(x->name), (int)k, (int)r);
        }
    }
}

/* Each key of a must be in b with the same value, except the model's name and the keys of a split file. */
static void compare_keys(const llm__checkpoint *a, const llm__checkpoint *b) {
    for (size_t i = 0; i < a->n_values; i++) {
        const llm__gguf_value *x = &a->values[i];
        if (llm__str_is(x->key, "general.name") || llm__gguf_drops(x->key)) continue;
        char key[100];
        snprintf(key, sizeof key, "%.*s", LLM__SHOW(x->key));
        const llm__gguf_value *y = llm__gguf_find(b, key);
        if (!y || x->type != y->type || x->is_array != y->is_array || x->count != y->count ||
            memcmp(x->data, y->data, llm__gguf_value_bytes(x)))
            fail_msg("%s is missing or has another value", key);
    }
}

static void models_stay_the_same(void **state) {
    static const struct {
        const char *name, *gguf;
        bool exact; /* llama3's scaling is rounded to f32 */
    } models[] = {{"llama", "llama.gguf", true},    {"gqa", "gqa.gguf", true},
                  {"llama3", "llama3.gguf", false}, {"linear", "linear.gguf", true},
                  {"yarn", "yarn.gguf", true},      {"mistral", "mistral.gguf", true},
                  {"qwen2", "qwen2.gguf", true},    {"qwen2-yarn", "qwen2-yarn.gguf", true},
                  {"qwen3", "qwen3.gguf", true},    {"sharded", "sharded-00001-of-00003.gguf", true}};
    (void)state;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        char directory[300], made_by_gguf[300];
        snprintf(directory, sizeof directory, "%s", golden("hf", models[i].name, ""));
        snprintf(made_by_gguf, sizeof made_by_gguf, "%s", golden("hf", models[i].gguf, ""));
        convert(directory, "F32");
        compare_logits(directory, LLM_DTYPE_F32, models[i].exact);
        compare_logits(directory, LLM_DTYPE_DEFAULT, models[i].exact);
        open_job jobs[2] = {{made_by_gguf, NULL}, {out_path(), NULL}};
        llm__pool pool;
        open_both(&pool, jobs);
        compare_keys(jobs[0].ck, jobs[1].ck);
        compare_tensors(jobs[0].ck, jobs[1].ck);
        llm__pool_free(&pool);
        assert_int_equal(remove(out_path()), 0);
    }
}

/* A directory and the F32 file made from it give the same quantized file. */
static void types_match_those_from_a_file(void **state) {
    static const char *const types[] = {"F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q4_K_M"};
    char f32[100];
    (void)state;
    snprintf(f32, sizeof f32, "%s/f32.gguf", folder);
    convert(golden("hf", "gqa", ""), "F32");
    assert_int_equal(rename(out_path(), f32), 0);
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        convert(f32, types[i]);
        bytes a = read_file(out_path());
        assert_int_equal(remove(out_path()), 0);
        convert(golden("hf", "gqa", ""), types[i]);
        bytes b = read_file(out_path());
        assert_int_equal(remove(out_path()), 0);
        assert_int_equal(a.n, b.n);
        assert_memory_equal(a.at, b.at, a.n);
        free(a.at);
        free(b.at);
    }
    assert_int_equal(remove(f32), 0);
}

/* ---- Tokenizers ---- */

enum { EXTRA_ROWS = 3 };

typedef struct vocab_job {
    const char *directory;
    llm_tokenizer *of_directory, *of_gguf;
} vocab_job;

static void vocab_body(llm__env *env, void *arg) {
    vocab_job *job = (vocab_job *)arg;
    llm__as_gguf m = {env, (llm__checkpoint *)llm__alloc_zero(env, 1, sizeof *m.ck), "llama"};
    m.ck->format = LLM__GGUF;
    job->of_directory = llm__tokenizer_from_directory(env, job->directory);
    llm__as_gguf_vocab(&m, job->directory, (size_t)llm_tokenizer_n_vocab(job->of_directory) + EXTRA_ROWS);
    job->of_gguf = llm__tokenizer_from_gguf(env, m.ck);
    llm__as_gguf_check_tokenizer(&m, job->directory);
}

/* Converts a directory's tokenizer to GGUF keys. If words is not NULL, that must fail with a message that contains
   them. */
static void convert_tokenizer(const char *directory, const char *texts, const char *words) {
    vocab_job job = {directory, NULL, NULL};
    llm__pool pool;
    llm__env env;
    llm_error err;
    llm__pool_init(&pool, NULL);
    llm__env_init(&env, &pool, &err, directory);
    const llm_status status = llm__env_run(&env, vocab_body, &job);
    if (status && (!words || !strstr(err.message, words))) fail_msg("%s: %s", directory, err.message);
    if (!status && words) fail_msg("%s is not refused", directory);
    FILE *file = words ? NULL : open_lines(texts);
    for (json_t *line; file && (line = next_line(file)) != NULL; json_decref(line)) {
        const json_t *text = json_array_get(line, 0);
        for (unsigned flags = 0; flags < 4; flags++) {
            llm_token ids[2][2048];
            int64_t n[2];
            for (int k = 0; k < 2; k++)
                n[k] = llm_encode(k ? job.of_gguf : job.of_directory, json_string_value(text), json_string_length(text),
                                  flags, ids[k], 2048, NULL);
            assert_true(n[0] == n[1] && n[0] >= 0 && n[0] <= 2048);
            assert_memory_equal(ids[0], ids[1], (size_t)n[0] * sizeof **ids);
        }
    }
    if (!words)
        assert_int_equal(llm_tokenizer_n_vocab(job.of_gguf), llm_tokenizer_n_vocab(job.of_directory) + EXTRA_ROWS);
    llm__pool_free(&pool);
}

static void tokenizers_stay_the_same(void **state) {
    static const struct {
        const char *name, *words;
    } all[] = {{"gpt-2", NULL},
               {"mpt", NULL},
               {"smollm", NULL},
               {"llama-3", NULL},
               {"qwen2", NULL},
               {"gpt-4o", NULL},
               {"tekken", NULL},
               {"falcon", NULL},
               {"deepseek-coder", NULL},
               {"spm", NULL},
               {"spm-plain", NULL},
               {"spm-symbols", "how special tokens are recognised"},
               {"added", "how special tokens are recognised"},
               {"prefix-space", "where spaces are put in front of a text"},
               {"llama-2", "GGUF needs the scores of these pieces"}};
    (void)state;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        char directory[300];
        snprintf(directory, sizeof directory, "%s", golden("tokenizers", all[i].name, ""));
        convert_tokenizer(directory, golden("tokenizers", all[i].name, ".jsonl"), all[i].words);
    }
}

static void add_special(json_t *list, const char *text, int id) {
    json_array_append_new(list, json_pack("{s:i,s:s,s:b}", "id", id, "content", text, "special", true));
}

typedef struct json_job {
    const char *directory;
    int change; /* 0: none; 1: one piece is changed; 2: the first merge becomes the last one */
} json_job;

/* Writes tokenizer.json as Hugging Face makes it from SentencePiece's file: each split of a piece into two pieces is a
   merge, ordered by score. */
static void json_body(llm__env *env, void *arg) {
    const json_job *job = (const json_job *)arg;
    llm__vocab_source v;
    llm__vocab_parts parts;
    json_t *vocab = json_object(), *merges = json_array(), *added = json_array();
    llm__vocab_read_file(env, job->directory, joined(job->directory, "tokenizer.model"), &parts, &v);
    const llm_tokenizer *t = llm__tokenizer_build(env, &v);
    for (size_t i = 0; i < v.n_pieces; i++) {
        char piece[600];
        snprintf(piece, sizeof piece, "%.*s%s", LLM__SHOW(v.pieces[i]), job->change == 1 && i == 70 ? "x" : "");
        json_object_set_new(vocab, piece, json_integer((json_int_t)i));
    }
    for (uint32_t rank = 0; rank < t->n_ranks; rank++)
        for (size_t i = 0; i <= t->pair_mask; i++) {
            const llm__bpe_pair_slot *p = &t->pairs[i];
            if (p->left == LLM__NONE || p->rank != rank) continue;
            const llm__str left = v.pieces[p->left], right = v.pieces[p->right];
            json_array_append_new(merges, json_pack("[s#,s#]", left.at, (int)left.n, right.at, (int)right.n));
        }
    if (job->change == 2) {
        json_array_append(merges, json_array_get(merges, 0));
        json_array_remove(merges, 0);
    }
    add_special(added, "<unk>", 0);
    add_special(added, "<s>", 1);
    add_special(added, "</s>", 2);
    json_t *root = json_pack("{s:o,s:{s:s,s:s,s:b,s:b,s:o,s:o}}", "added_tokens", added, "model", "type", "BPE",
                             "unk_token", "<unk>", "byte_fallback", 1, "fuse_unk", 1, "vocab", vocab, "merges", merges);
    static const char rest[] =
        "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\xE2\x96\x81\"},"
        "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\xE2\x96\x81\"}]},"
        "\"decoder\":{\"type\":\"Strip\",\"content\":\" \"},"
        "\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":[{\"SpecialToken\":{\"id\":\"<s>\"}},"
        "{\"Sequence\":{\"id\":\"A\"}}],\"special_tokens\":{\"<s>\":{\"ids\":[1]}}}}";
    json_t *more = json_loads(rest, 0, NULL);
    assert_non_null(root);
    assert_int_equal(json_object_update(root, more), 0);
    assert_int_equal(json_dump_file(root, joined(job->directory, "tokenizer.json"), 0), 0);
    json_decref(more);
    json_decref(root);
}

/* tokenizer.json has no scores. Those of tokenizer.model are used if they give the same merges. */
static void scores_come_from_tokenizer_model(void **state) {
    static const char *const words[] = {NULL, "piece 70 of tokenizer.model is another one", "which pieces are merged"};
    bytes model = read_file(golden("tokenizers", "spm", "/tokenizer.model"));
    (void)state;
    write_file(joined(folder, "tokenizer.model"), model.at, model.n);
    write_file(joined(folder, "tokenizer_config.json"), "{\"eos_token\":\"</s>\"}", 20);
    free(model.at);
    for (int change = 0; change < 3; change++) {
        json_job job = {folder, change};
        llm__pool pool;
        llm__env env;
        llm_error err;
        llm__pool_init(&pool, NULL);
        llm__env_init(&env, &pool, &err, folder);
        if (llm__env_run(&env, json_body, &job)) fail_msg("%s", err.message);
        llm__pool_free(&pool);
        convert_tokenizer(folder, golden("tokenizers", "spm", ".jsonl"), words[change]);
        assert_int_equal(remove(joined(folder, "tokenizer.json")), 0);
    }
    remove(joined(folder, "tokenizer_config.json"));
    remove(joined(folder, "tokenizer.model"));
}

/* ---- Refusals and failing allocations ---- */

static void models_beyond_gguf_are_refused(void **state) {
    static const char *const all[][2] = {{"yarn-mscale", "truncate, mscale or mscale_all_dim, which GGUF cannot say"},
                                         {"int8", "only F32, F16 and BF16 can be quantized"},
                                         {"meta-1", "as Meta publishes them"}};
    (void)state;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        llm_quantize_desc desc;
        llm_error err;
        memset(&desc, 0, sizeof desc);
        desc.type = "Q8_0";
        assert_int_equal(llm_quantize_gguf(golden("hf", all[i][0], ""), out_path(), &desc, &err),
                         LLM_ERROR_UNSUPPORTED);
        if (!strstr(err.message, all[i][1])) fail_msg("\"%s\" does not say \"%s\"", err.message, all[i][1]);
        assert_int_equal(access(out_path(), F_OK), -1);
    }
}

static llm_status convert_starved(void *job, llm_error *err) {
    llm_quantize_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.type = "Q8_0";
    desc.n_threads = 1;
    desc.host = heap_host((heap *)job);
    const llm_status status = llm_quantize_gguf(golden("hf", "llama3", ""), out_path(), &desc, err);
    assert_int_equal(access(out_path(), F_OK), status ? -1 : 0);
    if (!status) remove(out_path());
    return status;
}

static void every_allocation_may_fail(void **state) {
    heap h = {0};
    (void)state;
    starve(&h, convert_starved, &h, 1, "llama3");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(models_stay_the_same),           cmocka_unit_test(types_match_those_from_a_file),
        cmocka_unit_test(tokenizers_stay_the_same),       cmocka_unit_test(scores_come_from_tokenizer_model),
        cmocka_unit_test(models_beyond_gguf_are_refused), cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
