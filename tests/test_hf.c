/* Published formats: Hugging Face directories and GGUF files of every architecture and type, compared with transformers
   and the gguf package (golden/hf.py); other ways to load them; bad files.
   Variants: asan cross */
#define LLM__FILE_START 5000 /* so that a small file is read in parts */
#include "tests/check.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include "tests/common.h"

static const char *golden(const char *name) {
    char inner[200];
    snprintf(inner, sizeof inner, "hf/%s", name);
    return golden_path(inner);
}

/* ---- Blocks ---- */

static void blocks_are_read_exactly(void **state) {
    bytes b = read_file(golden("blocks.bin"));
    int n_types = 0;
    (void)state;
    for (const uint8_t *p = b.at; p < b.at + b.n; n_types++) {
        uint32_t type = llm__bytes_u32(p), n = llm__bytes_u32(p + 4), n_bytes = llm__bytes_u32(p + 8),
                 n_weights = llm__bytes_u32(p + 12);
        const llm__file_type_info *info = llm__file_type_find(type);
        assert_non_null(info);
        assert_int_equal(info->block_bytes, n_bytes);
        assert_int_equal(info->block_weights, n_weights);
        float *weights = (float *)malloc(n * n_weights * sizeof *weights);
        info->decode(p + 16, n * n_weights, weights);
        p += 16 + n * n_bytes;
        if (memcmp(weights, p, n * n_weights * 4)) fail_msg("%s is not decoded exactly", info->name);
        p += n * n_weights * 4;
        free(weights);
    }
    assert_int_equal(n_types, 12);
    free(b.at);
}

/* ---- Logits ---- */

typedef struct reference {
    bytes file;
    int n_tokens, n_rows, n_vocab;
    const llm_token *tokens;
    const int *rows;
    const float *logits;
    float peak;
} reference;

static reference read_reference(const char *name) {
    reference r;
    char file[100];
    snprintf(file, sizeof file, "%s.logits", name);
    r.file = read_file(golden(file));
    const int32_t *p = (const int32_t *)(void *)r.file.at;
    r.n_tokens = p[0];
    r.n_rows = p[1];
    r.n_vocab = p[2];
    r.tokens = p + 3;
    r.rows = p + 3 + r.n_tokens;
    r.logits = (const float *)(const void *)(r.rows + r.n_rows);
    r.peak = 0;
    for (int i = 0; i < r.n_rows * r.n_vocab; i++) r.peak = fmaxf(r.peak, fabsf(r.logits[i]));
    return r;
}

static llm_model *load(const char *path, llm_dtype dtype) {
    llm_model *model;
    llm_error err;
    llm_model_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.dtype = dtype;
    desc.n_threads = 2;
    if (llm_model_load(&model, path, &desc, &err)) fail_msg("%s", err.message);
    return model;
}

/* Computes the logits at the reference's positions, in passes of n_batch tokens. */
static float *compute(const llm_model *model, const reference *r, int n_batch) {
    llm_context *ctx;
    llm_error err;
    llm_context_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.n_batch = n_batch;
    desc.n_logits = r->n_rows;
    desc.n_threads = 2;
    bool *wanted = (bool *)calloc((size_t)r->n_tokens, 1);
    float *logits = (float *)malloc((size_t)r->n_rows * (size_t)r->n_vocab * sizeof *logits);
    for (int i = 0; i < r->n_rows; i++) wanted[r->rows[i]] = true;
    llm_batch batch = {r->n_tokens, r->tokens, NULL, wanted};
    if (llm_context_create(&ctx, model, &desc, &err) || llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    for (int i = 0; i < r->n_rows; i++)
        memcpy(logits + i * r->n_vocab, llm_logits(ctx, r->rows[i]), (size_t)r->n_vocab * sizeof *logits);
    llm_context_free(ctx);
    free(wanted);
    return logits;
}

/* The largest difference, divided by the largest logit. */
static float difference(const reference *r, const float *logits) {
    float most = 0;
    for (int i = 0; i < r->n_rows * r->n_vocab; i++) {
        assert_true(isfinite(logits[i]));
        most = fmaxf(most, fabsf(logits[i] - r->logits[i]));
    }
    return most / r->peak;
}

static float difference_of(const char *path, const reference *r) {
    llm_model *model = load(path, LLM_DTYPE_F32);
    float *logits = compute(model, r, 512), *again = compute(model, r, 37);
    float d = difference(r, logits);
    if (memcmp(logits, again, (size_t)r->n_rows * (size_t)r->n_vocab * sizeof *logits))
        fail_msg("%s: the logits depend on the batch size", path);
    free(logits);
    free(again);
    llm_model_free(model);
    return d;
}

static void logits_are_those_of_transformers(void **state) {
    static const struct {
        const char *name, *gguf; /* gguf is NULL if GGUF cannot represent the model */
    } models[] = {
        {"llama", "llama.gguf"},
        {"gqa", "gqa.gguf"},
        {"llama3", "llama3.gguf"},
        {"linear", "linear.gguf"},
        {"yarn", "yarn.gguf"},
        {"yarn-mscale", NULL},
        {"mistral", "mistral.gguf"},
        {"qwen2", "qwen2.gguf"},
        {"qwen2-yarn", "qwen2-yarn.gguf"},
        {"qwen3", "qwen3.gguf"},
        {"sharded", "sharded-00001-of-00003.gguf"},
        {"int8", "int8.gguf"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        reference r = read_reference(models[i].name);
        float directory = difference_of(golden(models[i].name), &r),
              gguf = models[i].gguf ? difference_of(golden(models[i].gguf), &r) : 0;
        print_message("  %-12s directory %.1e  GGUF %.1e\n", models[i].name, (double)directory, (double)gguf);
        if (directory > 1e-4f || gguf > 1e-4f) fail_msg("%s: the logits are wrong", models[i].name);
        free(r.file.at);
    }
}

static void bf16_is_near(void **state) {
    static const char *const names[] = {"llama3", "mistral", "qwen2", "qwen3", "int8"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        reference r = read_reference(names[i]);
        llm_model *model = load(golden(names[i]), LLM_DTYPE_BF16);
        float *logits = compute(model, &r, 512), d = difference(&r, logits);
        if (d > 0.05f) fail_msg("%s: %g", names[i], (double)d);
        free(logits);
        llm_model_free(model);
        free(r.file.at);
    }
}

static void models_are_described(void **state) {
    llm_model *model = load(golden("qwen3/config.json"), LLM_DTYPE_F32);
    llm_model_info info = llm_model_get_info(model);
    llm_model_info header;
    llm_memory memory;
    llm_error err;
    (void)state;
    assert_string_equal(info.architecture, "qwen3");
    assert_int_equal(info.n_vocab, 48);
    assert_int_equal(info.n_layers, 2);
    assert_int_equal(info.n_heads, 4);
    assert_int_equal(info.n_kv_heads, 2);
    assert_int_equal(info.head_dim, 16);
    assert_int_equal(info.n_ctx_train, 1024);
    if (llm_model_read_info(golden("qwen3"), &(llm_model_desc){.dtype = LLM_DTYPE_F32}, &header, &err))
        fail_msg("%s", err.message);
    assert_int_equal(header.fingerprint, 0); /* it would require reading the weights */
    header.fingerprint = info.fingerprint;
    assert_memory_equal(&header, &info, sizeof info);
    if (llm_memory_estimate(&info, NULL, &memory, &err)) fail_msg("%s", err.message);
    assert_true(memory.weights == info.weight_bytes && memory.cache > 0);
    llm_model_free(model);
}

static void all_types_are_named(void **state) {
    static llm__model_walk walk;
    char text[64], little[12];
    (void)state;
    walk.held[0].name = "Q4_K";
    walk.held[1].name = "Q5_0";
    walk.held[2].name = "Q6_K";
    walk.held[0].n_params = walk.held[2].n_params = 5;
    walk.held[1].n_params = 10;
    llm__model_describe_held(&walk, text, sizeof text);
    assert_string_equal(text, "Q5_0 50 %, Q4_K 25 %, Q6_K 25 %");
    llm__model_describe_held(&walk, little, sizeof little);
    assert_string_equal(little, "Q5_0 50 %, ");
    walk.held[1].name = NULL; /* only one type */
    llm__model_describe_held(&walk, text, sizeof text);
    assert_string_equal(text, "Q4_K");
}

/* ---- Other ways to load ---- */

static bool read_bytes(void *user, uint64_t offset, void *to, size_t n) {
    const bytes *b = (const bytes *)user;
    if (offset > b->n || n > b->n - offset) return false;
    memcpy(to, b->at + offset, n);
    return true;
}

static void memory_and_functions_serve_too(void **state) {
    reference r = read_reference("qwen2");
    bytes file = read_file(golden("qwen2.gguf"));
    llm_model_desc desc = {.dtype = LLM_DTYPE_BF16, .n_threads = 2};
    llm_model *models[3] = {load(golden("qwen2.gguf"), LLM_DTYPE_BF16), NULL, NULL};
    llm_error err;
    (void)state;
    if (llm_model_load_memory(&models[1], file.at, file.n, &desc, &err)) fail_msg("%s", err.message);
    if (llm_model_load_callback(&models[2], read_bytes, &file, file.n, &desc, &err)) fail_msg("%s", err.message);
    float *first = NULL;
    for (int i = 0; i < 3; i++) {
        float *logits = compute(models[i], &r, 512);
        if (i) assert_memory_equal(logits, first, (size_t)r.n_rows * (size_t)r.n_vocab * sizeof *logits);
        if (i) free(logits);
        else first = logits;
        assert_true(llm_model_get_info(models[i]).fingerprint == llm_model_get_info(models[0]).fingerprint);
    }
    for (int i = 0; i < 3; i++) llm_model_free(models[i]);
    free(first);
    free(file.at);
    free(r.file.at);
}

static bool read_only_the_start(void *user, uint64_t offset, void *to, size_t n) {
    return offset == 0 && read_bytes(user, offset, to, n);
}

/* The file's metadata as text, from GGUF and from config.json. */
static void metadata_is_text(void **state) {
    llm_model *gguf = load(golden("qwen2.gguf"), LLM_DTYPE_F32), *directory = load(golden("llama3"), LLM_DTYPE_F32);
    int n = 0;
    (void)state;
    assert_string_equal(llm_model_meta(gguf, "general.architecture"), "qwen2");
    assert_string_equal(llm_model_meta(gguf, "qwen2.block_count"), "1");
    assert_string_equal(llm_model_meta(gguf, "qwen2.attention.layer_norm_rms_epsilon"), "1e-05");
    assert_null(llm_model_meta(gguf, "tokenizer.ggml.tokens")); /* an array */
    assert_null(llm_model_meta(gguf, "qwen2"));
    assert_null(llm_model_meta(gguf, NULL));
    for (const char *key; (key = llm_model_meta_key(gguf, n)) != NULL; n++) assert_non_null(llm_model_meta(gguf, key));
    assert_true(n > 10);
    assert_null(llm_model_meta_key(gguf, -1));
    assert_string_equal(llm_model_meta(directory, "model_type"), "llama");
    assert_string_equal(llm_model_meta(directory, "rope_parameters.rope_type"), "llama3");
    assert_string_equal(llm_model_meta(directory, "tie_word_embeddings"), "false");
    assert_null(llm_model_meta(directory, "architectures"));
    assert_null(llm_model_meta(directory, "rope_parameters"));
    llm_model_free(gguf);
    llm_model_free(directory);
}

/* A tokenizer loads from all sources from which a model loads. */
static void tokenizers_load_alone(void **state) {
    bytes file = read_file(golden("qwen2.gguf"));
    llm_tokenizer *all[3];
    llm_token ids[3][32];
    size_t n_bytes;
    llm_error err;
    (void)state;
    if (llm_tokenizer_load(&all[0], golden("qwen2.gguf"), NULL, &err) ||
        llm_tokenizer_load_memory(&all[1], file.at, file.n, NULL, &err))
        fail_msg("%s", err.message);
    assert_int_equal(llm_tokenizer_load_callback(&all[2], read_only_the_start, &file, file.n, NULL, &err), LLM_OK);
    free(file.at);
    for (int i = 0; i < 3; i++) {
        assert_int_equal(llm_encode(all[i], "a b cab", 7, 0, ids[i], 32, NULL),
                         llm_encode(all[0], "a b cab", 7, 0, NULL, 0, NULL));
        assert_int_equal(ids[i][0], ids[0][0]);
        assert_ptr_equal(llm_token_bytes(all[i], 3, NULL), llm_token_bytes(all[i], 3, &n_bytes));
        assert_null(llm_token_bytes(all[i], -1, NULL));
    }
    for (int i = 0; i < 3; i++) llm_tokenizer_free(all[i]);
    assert_int_equal(llm_tokenizer_load_memory(&all[0], "GGUF", 4, NULL, &err), LLM_ERROR_FORMAT);
    assert_null(all[0]);
}

static void functions_that_fail_are_reported(void **state) {
    bytes file = read_file(golden("qwen2.gguf"));
    llm_model *model;
    llm_error err;
    (void)state;
    assert_true(file.n > 2 * LLM__FILE_START);
    assert_int_equal(llm_model_load_callback(&model, read_only_the_start, &file, file.n, NULL, &err), LLM_ERROR_IO);
    assert_non_null(strstr(err.message, "the read callback failed to read"));
    assert_int_equal(llm_model_load_callback(&model, read_bytes, &file, file.n - 1, NULL, &err), LLM_ERROR_FORMAT);
    assert_non_null(strstr(err.message, "but the file ends at"));
    free(file.at);
}

/* ---- Failing allocations ---- */

static void every_allocation_may_fail(void **state) {
    static const char *const names[] = {"qwen3", "sharded", "sharded-00001-of-00003.gguf", "int8"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        load_job job;
        memset(&job, 0, sizeof job);
        job.path = golden(names[i]);
        starve(&job.h, load_model_starved, &job, 1, names[i]);
    }
}

static void a_hundred_loads_leave_nothing(void **state) {
    load_job job;
    llm_error err;
    (void)state;
    memset(&job, 0, sizeof job);
    job.path = golden("sharded");
    for (int i = 0; i < 100; i++) {
        if (load_model_starved(&job, &err)) fail_msg("%s", err.message);
        assert_all_returned(&job.h);
    }
}

/* ---- Bad files ---- */

static const char *folder; /* a temporary directory */

static const char *in_folder(const char *name) { return joined(folder, name); }

static int make_folder(void **state) {
    static char path[] = "/tmp/llm-test-hf-XXXXXX";
    (void)state;
    folder = mkdtemp(path);
    if (!folder) return -1;
    bytes tokenizer = read_file(golden("llama/tokenizer.json"));
    write_file(in_folder("tokenizer.json"), tokenizer.at, tokenizer.n);
    free(tokenizer.at);
    return 0;
}

static int remove_folder(void **state) {
    static const char *const names[] = {
        "config.json",    "model.safetensors",     "model.safetensors.index.json", "a.safetensors",        "m.gguf",
        "tokenizer.json", "s-00001-of-00003.gguf", "s-00002-of-00003.gguf",        "s-00003-of-00003.gguf"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) remove(in_folder(names[i]));
    return rmdir(folder);
}

static void expect_failure(const char *path, const char *words, const char *file) {
    llm_model *model;
    llm_error err;
    if (!llm_model_load(&model, path, NULL, &err)) fail_msg("loaded, where \"%s\" was expected", words);
    if (model) fail_msg("a failed load returned a model");
    if (!strstr(err.message, words)) fail_msg("\"%s\" was expected, not \"%s\"", words, err.message);
    if (!strstr(err.message, file)) fail_msg("%s is not named in \"%s\"", file, err.message);
}

/* Returns a copy of a text with one part replaced. Free it with free(). */
static char *replaced(const char *text, const char *old, const char *new_text) {
    const char *at = strstr(text, old);
    if (!at) fail_msg("\"%s\" is not in the text", old);
    size_t n = strlen(text) + strlen(new_text) + 1;
    char *copy = (char *)malloc(n);
    snprintf(copy, n, "%.*s%s%s", (int)(at - text), text, new_text, at + strlen(old));
    return copy;
}

#define EIGHT(x) x x x x x x x x
#define DEEP EIGHT(EIGHT("["))

static void bad_configs_are_refused(void **state) {
    static const struct {
        const char *model, *old, *new_text, *words;
    } table[] = {
        {"llama", "{", "[", "JSON"},
        {"llama", "\"vocab_size\": 48", "\"vocab_size\": 48,,", "JSON"},
        {"llama", "\"hidden_size\": 32", "\"hidden_size\": \"32\"", "hidden_size is a string, not a number"},
        {"llama", "\"hidden_size\": 32", "\"hidden_size\": 0", "hidden_size is 0"},
        {"llama", "\"hidden_size\": 32", "\"hidden_size\": 32.5", "hidden_size is 32.5, not a whole number"},
        {"llama", "\"hidden_size\": 32", "\"hidden_size\": 1e300", "hidden_size is 1e+300"},
        {"llama", "\"hidden_size\": 32", "\"hidden_size\": 64", "the hyperparameters require"},
        {"llama", "\"hidden_size\": 32,", "", "hidden_size is missing"},
        {"llama", "\"vocab_size\": 48", "\"vocab_size\": -1", "vocab_size is -1"},
        {"llama", "\"vocab_size\": 48", "\"vocab_size\": 47", "tensor model.embed_tokens.weight is 48 x 32"},
        {"llama", "\"num_hidden_layers\": 1", "\"num_hidden_layers\": 2",
         "tensor model.layers.1.input_layernorm.weight is missing"},
        {"gqa", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1", "tensor model.layers.1."},
        {"llama", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "2 query heads cannot share 3 key heads"},
        {"llama", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": -1", "rms_norm_eps is -1, not from"},
        {"llama", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e999", "rms_norm_eps is inf, not from"},
        {"llama", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": NaN", "a value is expected"},
        {"llama", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": " DEEP, "deeper than 64 levels"},
        {"llama", "\"rope_theta\": 10000.0", "\"rope_theta\": 0", "rope_parameters.rope_theta is 0, not from"},
        {"llama", "\"rope_type\": \"default\"", "\"rope_type\": \"dynamic\"", "rope_parameters is of type \"dynamic\""},
        {"llama", "\"rope_type\": \"default\"", "\"rope_type\": \"longrope\"",
         "rope_parameters is of type \"longrope\""},
        {"llama", "\"rope_type\": \"default\"", "\"rope_type\": \"linear\"", "rope_parameters.factor is missing"},
        {"llama", "\"rope_type\": \"default\"", "\"rope_type\": \"default\", \"partial_rotary_factor\": 0.5",
         "partial_rotary_factor is 0.5"},
        {"llama", "\"rope_type\": \"default\"", "\"full_attention\": {}", "rope_parameters.full_attention is set"},
        {"linear", "\"factor\": 4.0", "\"factor\": \"x\"", "rope_scaling.factor is a string, not a number"},
        {"linear", "\"factor\": 4.0", "\"factor\": -4", "rope_scaling.factor is -4, not from"},
        {"llama3", "\"high_freq_factor\": 4.0", "\"high_freq_factor\": 1.0", "RoPE is scaled between 1 and 1 turns"},
        {"yarn", "\"beta_fast\": 16.0", "\"beta_fast\": 0.5", "RoPE is scaled between 1 and 0.5 turns"},
        {"llama", "\"model_type\": \"llama\"", "\"model_type\": \"gemma2\"", "model_type is \"gemma2\""},
        {"llama", "\"LlamaForCausalLM\"", "\"LlamaForSequenceClassification\"",
         "architectures names \"LlamaForSequenceClassification\""},
        {"llama", "\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act is \"gelu\""},
        {"llama", "\"attention_bias\": false", "\"attention_bias\": true", "attention_bias is true"},
        {"llama", "\"mlp_bias\": false", "\"mlp_bias\": true", "mlp_bias is true"},
        {"llama", "\"mlp_bias\": false", "\"mlp_bias\": 0", "mlp_bias is a number, not true or false"},
        {"llama", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true",
         "tensor lm_head.weight is not model.embed_tokens.weight"},
        {"gqa", "\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", "there is no tensor lm_head.weight"},
        {"qwen3", "\"head_dim\": 16", "\"head_dim\": 8", "tensor model.layers.0.self_attn.q_proj.weight is 64 x 32"},
        {"qwen3", "\"use_sliding_window\": false",
         "\"use_sliding_window\": true, \"layer_types\": [\"full_attention\", \"sliding_attention\"]",
         "1 of 2 layers have a sliding window"},
        {"qwen3", "\"model_type\": \"qwen3\"", "\"model_type\": \"qwen3\", \"layer_types\": [\"full_attention\"]",
         "layer_types has 1 entries for 2 layers"},
        {"qwen3", "\"model_type\": \"qwen3\"", "\"model_type\": \"qwen3\", \"layer_types\": [\"linear_attention\"]",
         "layer_types names \"linear_attention\""},
        {"qwen2", "\"model_type\": \"qwen2\"", "\"model_type\": \"llama\", \"architectures\": [\"LlamaForCausalLM\"]",
         "self_attn.k_proj.bias is not part of any model"},
        {"qwen2", "\"model_type\": \"qwen2\"", "\"model_type\": \"qwen3\", \"architectures\": [], \"head_dim\": 16",
         "self_attn.q_norm.weight is missing"},
        {"int8", "\"quant_method\": \"compressed-tensors\"", "\"quant_method\": \"gptq\"", "quant_method is \"gptq\""},
        {"int8", "\"format\": \"int-quantized\"", "\"format\": \"pack-quantized\"", "format \"pack-quantized\""},
        {"int8", "\"num_bits\": 8", "\"num_bits\": 4", "config_groups.group_0: the weights are not num_bits 8"},
        {"int8", "\"strategy\": \"channel\"", "\"strategy\": \"group\"", "strategy channel"},
        {"int8", "\"kv_cache_scheme\": null", "\"kv_cache_scheme\": {}", "kv_cache_scheme is set"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        char name[100];
        snprintf(name, sizeof name, "%s/config.json", table[i].model);
        bytes config = read_file(golden(name));
        snprintf(name, sizeof name, "%s/model.safetensors", table[i].model);
        bytes tensors = read_file(golden(name));
        char *text = replaced((const char *)config.at, table[i].old, table[i].new_text);
        write_file(in_folder("config.json"), text, strlen(text));
        write_file(in_folder("model.safetensors"), tensors.at, tensors.n);
        expect_failure(folder, table[i].words, folder);
        free(text);
        free(config.at);
        free(tensors.at);
    }
}

/* A config.json may give RoPE's parameters twice. The expected values are those of transformers 5.24
   (AutoConfig(...).rope_parameters). */
static void rope_may_be_given_twice(void **state) {
#define PLAIN "\"rope_parameters\": {\"rope_type\": \"default\", \"rope_theta\": 500.0}"
#define SCALED "\"rope_scaling\": {\"rope_type\": \"linear\", \"factor\": 2.0}"
#define EMPTY "\"rope_scaling\": {}"
#define THETA "\"rope_theta\": 700.0"
    static const struct {
        const char *members;
        double theta, factor;
    } table[] = {
        {PLAIN ", " EMPTY, 500, 1},
        {PLAIN ", \"rope_scaling\": null", 500, 1},
        {PLAIN ", " EMPTY ", " THETA, 500, 1},
        {PLAIN ", " THETA, 500, 1},
        {EMPTY ", " THETA, 700, 1},
        {EMPTY, 10000, 1},
        {EMPTY ", \"rope_parameters\": {}, " THETA, 700, 1},
        {"\"rope_parameters\": {\"rope_type\": \"default\"}, " THETA, 700, 1},
        {PLAIN ", " SCALED, 10000, 2},
        {PLAIN ", " SCALED ", " THETA, 700, 2},
    };
    bytes config = read_file(golden("llama/config.json")), tensors = read_file(golden("llama/model.safetensors"));
    (void)state;
    write_file(in_folder("model.safetensors"), tensors.at, tensors.n);
    char *plain = replaced((const char *)config.at, "rope_parameters", "_other");
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        char members[300];
        snprintf(members, sizeof members, "{%s,", table[i].members);
        char *text = replaced(plain, "{", members);
        write_file(in_folder("config.json"), text, strlen(text));
        llm_model *model = load_model(folder, NULL);
        int n = model->shape.rope_dim;
        for (int k = 0; k < n / 2; k++) {
            double wanted = pow(table[i].theta, -2.0 * k / n) / table[i].factor, is = model->shape.rope_frequencies[k];
            if (fabs(is - wanted) > 1e-9 * wanted) fail_msg("%s: frequency %d is %g, not %g", members, k, is, wanted);
        }
        llm_model_free(model);
        free(text);
    }
    free(plain);
    free(config.at);
    free(tensors.at);
}

/* The scales of an int8 tensor are found by its full name, however long. */
static void find_long_scales(llm__env *env, void *arg) {
    char names[2][200];
    llm__tensor tensors[2];
    llm__checkpoint ck;
    bool used[2] = {false, false};
    (void)arg;
    memset(&ck, 0, sizeof ck);
    memset(tensors, 0, sizeof tensors);
    memset(names, 'x', sizeof names);
    snprintf(names[0] + 120, 80, ".weight");
    snprintf(names[1] + 120, 80, ".weight_scale");
    for (int i = 0; i < 2; i++) {
        tensors[i].name.at = names[i];
        tensors[i].name.n = strlen(names[i]);
        tensors[i].type = llm__file_type_find(i ? LLM__F32 : LLM__I8);
        tensors[i].rows = 4;
        tensors[i].cols = i ? 1 : 8;
    }
    ck.format = LLM__HUGGING_FACE;
    ck.tensors = tensors;
    ck.n_tensors = 2;
    ck.used = used;
    assert_ptr_equal(llm__tensor_find_scales(env, &ck, &tensors[0]), &tensors[1]);
    assert_true(used[1]);
}

static void long_names_have_scales(void **state) {
    llm__pool pool;
    llm__env env;
    llm_error err;
    (void)state;
    llm__pool_init(&pool, NULL);
    llm__env_init(&env, &pool, &err, NULL);
    if (llm__env_run(&env, find_long_scales, NULL)) fail_msg("%s", err.message);
    llm__pool_free(&pool);
}

/* Each number of a config.json is set to extreme values. The message must name the key and the value. */
static void extreme_configs_are_refused(void **state) {
    static const char *const keys[] = {
        "vocab_size",          "num_hidden_layers",       "hidden_size", "intermediate_size", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "head_dim",    "rms_norm_eps",      "rope_theta"};
    static const struct {
        const char *text, *shown;
    } values[] = {{"0", "0"},
                  {"2147483648", "2.14748e+09"},
                  {"4294967295", "4.29497e+09"},
                  {"9223372036854775808", "9.22337e+18"},
                  {"18446744073709551615", "1.84467e+19"},
                  {"-1", "-1"},
                  {"0e999", "0"}};
    bytes config = read_file(golden("llama/config.json")), tensors = read_file(golden("llama/model.safetensors"));
    (void)state;
    write_file(in_folder("model.safetensors"), tensors.at, tensors.n);
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        for (size_t j = 0; j < sizeof values / sizeof *values; j++) {
            char member[100], words[100];
            bool taken = !strcmp(keys[i], "rope_theta") && strchr(values[j].shown, '+'); /* up to 1e15 is allowed */
            if (taken) continue;
            snprintf(member, sizeof member, "\"%s\": %s, \"_", keys[i], values[j].text);
            snprintf(words, sizeof words, "%s is %s, not ", keys[i], values[j].shown);
            char *plain = replaced((const char *)config.at, keys[i], "_other"), *text = replaced(plain, "\"", member);
            write_file(in_folder("config.json"), text, strlen(text));
            expect_failure(folder, words, "config.json");
            free(text);
            free(plain);
        }
    free(config.at);
    free(tensors.at);
}

static void write_safetensors(const char *path, const char *header, size_t said, size_t n_data) {
    size_t n = strlen(header);
    uint8_t *file = (uint8_t *)calloc(8 + n + n_data, 1);
    for (int i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)said >> 8 * i);
    memcpy(file + 8, header, n);
    write_file(path, file, 8 + n + n_data);
    free(file);
}

static void bad_safetensors_are_refused(void **state) {
    static const struct {
        const char *header, *words;
    } table[] = {
        {"", "JSON"},
        {"[]", "the header is not a JSON object"},
        {"{\"a\": 1}", "tensor a lacks a dtype"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4]}}", "tensor a lacks a dtype"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4], \"data_offsets\": [0, 16, 32]}}", "tensor a lacks a dtype"},
        {"{\"a\": {\"dtype\": \"Q4_0\", \"shape\": [32], \"data_offsets\": [0, 18]}}", "unknown dtype Q4_0"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4], \"data_offsets\": [0, 12]}}", "its data_offsets are 0 and 12"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4], \"data_offsets\": [16, 0]}}", "its data_offsets are 16 and 0"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4], \"data_offsets\": [64, 80]}}", "but the file ends at"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [-4], \"data_offsets\": [0, 16]}}",
         "\"-4\" in its shape or data_offsets is no size"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [1.5], \"data_offsets\": [0, 16]}}",
         "\"1.5\" in its shape or data_offsets is no size"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [18446744073709551615], \"data_offsets\": [0, 16]}}", "is no size"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4294967296, 4294967296, 4], \"data_offsets\": [0, 16]}}",
         "overflows 64 bits"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [9007199254740992, 4294967296], \"data_offsets\": [0, 0]}}",
         "overflows 64 bits"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4], \"data_offsets\": [0, 16]}, \"b\": {\"dtype\": \"F32\", "
         "\"shape\": [4], \"data_offsets\": [12, 28]}}",
         "tensors a and b overlap"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4], \"data_offsets\": [0, 16]}, \"a\": {\"dtype\": \"F32\", "
         "\"shape\": [4], \"data_offsets\": [16, 32]}}",
         "tensor a occurs twice"},
        {"{\"a\": {\"dtype\": \"F32\", \"shape\": [4], \"data_offsets\": [0, 16]}}", "lm_head.weight"},
        {"[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", "JSON"},
    };
    bytes config = read_file(golden("llama/config.json"));
    (void)state;
    write_file(in_folder("config.json"), config.at, config.n);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        write_safetensors(in_folder("model.safetensors"), table[i].header, strlen(table[i].header), 64);
        expect_failure(folder, table[i].words, folder);
    }
    static const char *const numbers[] = {
        "0", "1", "2147483648", "4294967295", "9223372036854775808", "18446744073709551615"};
    for (int place = 0; place < 4; place++) /* two of the shape, two of the data_offsets */
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
            char header[200];
            const char *n[4] = {"2", "3", "8", "32"};
            n[place] = numbers[i];
            snprintf(header, sizeof header,
                     "{\"a\": {\"dtype\": \"F32\", \"shape\": [%s, %s], \"data_offsets\": [%s, %s]}}", n[0], n[1], n[2],
                     n[3]);
            write_safetensors(in_folder("model.safetensors"), header, strlen(header), 64);
            expect_failure(folder, "tensor a", "model.safetensors");
            expect_failure(folder, numbers[i], "model.safetensors");
        }
    static const uint64_t lengths[] = {67, 1u << 31, 0xFFFFFFFFu, (uint64_t)1 << 63, UINT64_MAX};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        write_safetensors(in_folder("model.safetensors"), "{}", (size_t)lengths[i], 64);
        expect_failure(folder, "by its first 8 bytes the file has a header of", "model.safetensors");
    }
    write_file(in_folder("model.safetensors"), "1234567", 7);
    expect_failure(folder, "but the file has 7", "model.safetensors");
    free(config.at);
}

#if !defined(_WIN32)
/* Opening a pipe must not wait for a writer. */
static void pipes_are_refused(void **state) {
    llm_tokenizer *tokenizer;
    llm_error err;
    (void)state;
    remove(in_folder("m.gguf"));
    assert_int_equal(mkfifo(in_folder("m.gguf"), 0600), 0);
    alarm(60);
    expect_failure(in_folder("m.gguf"), "is not a regular file", "m.gguf");
    assert_int_equal(llm_tokenizer_load(&tokenizer, in_folder("m.gguf"), NULL, &err), LLM_ERROR_IO);
    alarm(0);
    remove(in_folder("m.gguf"));
}
#endif

static void truncated_files_are_refused(void **state) {
    static const char *const names[] = {"llama/model.safetensors", "llama.gguf", "llama/config.json"};
    static const char *const places[] = {"model.safetensors", "m.gguf", "config.json"};
    llm_model *model;
    llm_error err;
    (void)state;
    for (int i = 0; i < 3; i++) {
        bytes whole = read_file(golden(names[i])), config = read_file(golden("llama/config.json"));
        write_file(in_folder("config.json"), config.at, config.n);
        for (size_t percent = 0; percent < 100; percent++) {
            write_file(in_folder(places[i]), whole.at, whole.n * percent / 100);
            if (!llm_model_load(&model, i == 1 ? in_folder("m.gguf") : folder, NULL, &err))
                fail_msg("%s loads when cut to %d %%", names[i], (int)percent);
            assert_non_null(strstr(err.message, folder));
        }
        write_file(in_folder(places[i]), whole.at, whole.n);
        free(whole.at);
        free(config.at);
    }
    llm_model_free(load(folder, LLM_DTYPE_F32));
    llm_model_free(load(in_folder("m.gguf"), LLM_DTYPE_F32));
}

static void bad_indexes_are_refused(void **state) {
    static const struct {
        const char *index, *words;
    } table[] = {
        {"{}", "weight_map is not an object"},
        {"{\"weight_map\": []}", "weight_map is not an object"},
        {"{\"weight_map\": {\"a\": 1}}", "which is not the name of a file"},
        {"{\"weight_map\": {\"a\": \"../x.safetensors\"}}", "which is not the name of a file"},
        {"{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "which is not the name of a file"},
        {"{\"weight_map\": {\"a\": \"b\\u0000c\"}}", "which is not the name of a file"},
        {"{\"weight_map\": {\"a\": \"\"}}", "which is not the name of a file"},
        {"{\"weight_map\": {\"a\": \"absent.safetensors\"}}", "absent.safetensors: the file cannot be read"},
        {"{\"weight_map\": {\"a\": \"a.safetensors\"}}", "tensor lm_head.weight"},
        {"{\"weight_map\": {\"a\": \"model.safetensors.index.json\"}}",
         "by its first 8 bytes the file has a header of"}, /* itself */
    };
    bytes config = read_file(golden("llama/config.json"));
    (void)state;
    write_file(in_folder("config.json"), config.at, config.n);
    write_safetensors(in_folder("a.safetensors"), "{}", 2, 0);
    remove(in_folder("model.safetensors"));
    remove(in_folder("model.safetensors.index.json"));
    expect_failure(folder, "there is neither model.safetensors nor", folder);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        write_file(in_folder("model.safetensors.index.json"), table[i].index, strlen(table[i].index));
        expect_failure(folder, table[i].words, folder);
    }
    remove(in_folder("config.json"));
    expect_failure(folder, "config.json: the file cannot be read", folder);
    free(config.at);
}

static uint8_t *find(bytes file, const char *text) {
    size_t n = strlen(text);
    for (size_t i = 0; i + n <= file.n; i++)
        if (!memcmp(file.at + i, text, n)) return file.at + i;
    fail_msg("\"%s\" is not in the file", text);
    return NULL;
}

static void other_types_are_refused_by_name(void **state) {
    static const struct {
        uint8_t type;
        const char *words;
    } table[] = {
        {23, "tensor output.weight has 32 columns and 48 rows of type IQ4_XS"},
        {99, "tensor output.weight has the unknown type number 99"},
        {12, "tensor output.weight has 32 columns and 48 rows of type Q4_K"},
        {39, "tensor output.weight is of type MXFP4"},
    };
    bytes file = read_file(golden("qwen2.gguf"));
    uint8_t *type =
        find(file, "output.weight") + strlen("output.weight") + 4 + 16; /* after the dimensions: 2, 32, 48 */
    (void)state;
    assert_int_equal(*type, LLM__Q4_0);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        *type = table[i].type;
        write_file(in_folder("m.gguf"), file.at, file.n);
        expect_failure(in_folder("m.gguf"), table[i].words, "m.gguf");
    }
    free(file.at);
}

static void put(uint8_t *to, size_t *at, uint64_t value, int n) {
    for (int i = 0; i < n; i++) to[(*at)++] = (uint8_t)(value >> 8 * i);
}

/* Writes a GGUF file with one more value (a number or a string), and a string that keeps the data aligned. */
static void write_with(const char *path, bytes file, const char *key, float number, const char *string) {
    uint8_t more[512];
    size_t n = 0;
    uint32_t bits;
    memcpy(&bits, &number, 4);
    put(more, &n, strlen(key), 8);
    for (const char *p = key; *p; p++) put(more, &n, (uint8_t)*p, 1);
    put(more, &n, string ? LLM__GGUF_STRING : LLM__GGUF_F32, 4);
    put(more, &n, string ? strlen(string) : bits, string ? 8 : 4);
    for (const char *p = string; p && *p; p++) put(more, &n, (uint8_t)*p, 1);
    size_t rest = 32 - (n + 8 + 1 + 4 + 8) % 32;
    put(more, &n, 1, 8);
    put(more, &n, '_', 1);
    put(more, &n, LLM__GGUF_STRING, 4);
    put(more, &n, rest, 8);
    while (rest--) put(more, &n, '_', 1);
    uint8_t *whole = (uint8_t *)malloc(file.n + n);
    memcpy(whole, file.at, 24);
    whole[16] = (uint8_t)(whole[16] + 2); /* the number of values */
    memcpy(whole + 24, more, n);
    memcpy(whole + 24 + n, file.at + 24, file.n - 24);
    write_file(path, whole, file.n + n);
    free(whole);
}

static void what_gguf_asks_for_is_refused_by_name(void **state) {
    static const struct {
        const char *key;
        float number;
        const char *string, *words; /* words is NULL if the value is accepted */
    } table[] = {
        {"llama.expert_count", 8, NULL, "llama.expert_count is set"},
        {"llama.expert_count", 0, NULL, NULL},
        {"llama.attention.scale", 0.5f, NULL, "llama.attention.scale is set"},
        {"llama.attn_logit_softcapping", 30, NULL, "llama.attn_logit_softcapping is set"},
        {"llama.final_logit_softcapping", 30, NULL, "llama.final_logit_softcapping is set"},
        {"llama.logit_scale", 2, NULL, "llama.logit_scale is set"},
        {"llama.attention.sliding_window_pattern", 4, NULL, "sliding_window_pattern is set"},
        {"llama.attention.value_length", 8, NULL, "attention.value_length is 8 and attention.key_length 16"},
        {"llama.attention.sliding_window", -1, NULL, "llama.attention.sliding_window is -1"},
        {"llama.attention.sliding_window", NAN, NULL, "llama.attention.sliding_window is nan"},
        {"llama.rope.scaling.yarn_ext_factor", 0, NULL, "yarn_ext_factor is set"},
        {"llama.rope.scaling.yarn_log_multiplier", 0.1f, NULL, "yarn_log_multiplier is set"},
        {"llama.rope.scaling.attn_factor", 1, NULL, NULL},
        {"llama.rope.scaling.type", 0, "longrope", "llama.rope.scaling.type is \"longrope\""},
        {"llama.rope.scaling.type", 0, "none", NULL},
        {"llama.rope.scaling.type", 0, "yarn", "rope.scaling.factor is missing"},
        {"llama.rope.scaling.type", 1, NULL, "llama.rope.scaling.type is not a string"},
        {"llama.rope.scaling.factor", -1, NULL, "llama.rope.scaling.factor is -1, not from"},
        {"llama.rope.scaling.factor", NAN, NULL, "llama.rope.scaling.factor is nan, not from"},
        {"split.count", 2, NULL, "this is part 1 of 2"},
        {"split.tensors.count", 3, NULL, "split.tensors.count is 3, but the 1 parts hold 12 tensors"},
    };
    bytes file = read_file(golden("llama.gguf"));
    (void)state;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        write_with(in_folder("m.gguf"), file, table[i].key, table[i].number, table[i].string);
        if (table[i].words) expect_failure(in_folder("m.gguf"), table[i].words, "m.gguf");
        else llm_model_free(load(in_folder("m.gguf"), LLM_DTYPE_F32));
    }
    free(file.at);
}

static void other_names_are_refused(void **state) {
    static const struct {
        const char *model, *old, *new_text, *words; /* old and new_text are equally long */
    } table[] = {
        {"qwen2.gguf", "qwen2", "gemma", "the architecture is \"gemma\""},
        {"llama3.gguf", "rope_freqs.weight", "rope_freqz.weight", "tensor rope_freqz.weight is not part of any model"},
        {"qwen3.gguf", "blk.0.attn_q_norm", "blk.0.attn_q_nork", "blk.0.attn_q_norm.weight is missing"},
        {"qwen2.gguf", "blk.0.attn_k.bias", "blk.0.attn_z.bias", "blk.0.attn_k.bias is missing"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        bytes file = read_file(golden(table[i].model));
        for (size_t at = 0, n = strlen(table[i].old); at + n <= file.n; at++)
            if (!memcmp(file.at + at, table[i].old, n)) memcpy(file.at + at, table[i].new_text, n);
        write_file(in_folder("m.gguf"), file.at, file.n);
        expect_failure(in_folder("m.gguf"), table[i].words, "m.gguf");
        free(file.at);
    }
}

static void split_files_need_all_their_parts(void **state) {
    bytes parts[3];
    char name[100];
    (void)state;
    expect_failure(golden("sharded-00002-of-00003.gguf"), "this is part 2 of 3", "sharded-00002-of-00003.gguf");
    for (int i = 0; i < 3; i++) {
        snprintf(name, sizeof name, "sharded-%05d-of-00003.gguf", i + 1);
        parts[i] = read_file(golden(name));
    }
    write_file(in_folder("m.gguf"), parts[0].at, parts[0].n);
    expect_failure(in_folder("m.gguf"), "whose name ends in -00001-of-00003.gguf", "m.gguf");
    write_file(in_folder("s-00001-of-00003.gguf"), parts[0].at, parts[0].n);
    write_file(in_folder("s-00002-of-00003.gguf"), parts[1].at, parts[1].n);
    expect_failure(in_folder("s-00001-of-00003.gguf"), "the file cannot be read", "s-00003-of-00003.gguf");
    write_file(in_folder("s-00003-of-00003.gguf"), parts[1].at, parts[1].n);
    expect_failure(in_folder("s-00001-of-00003.gguf"), "do not say that this is part 3 of 3", "s-00003-of-00003.gguf");
    write_file(in_folder("s-00003-of-00003.gguf"), parts[2].at, parts[2].n);
    llm_model_free(load(in_folder("s-00001-of-00003.gguf"), LLM_DTYPE_F32));
    for (int i = 0; i < 3; i++) free(parts[i].at);
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_are_read_exactly),
        cmocka_unit_test(logits_are_those_of_transformers),
        cmocka_unit_test(bf16_is_near),
        cmocka_unit_test(models_are_described),
        cmocka_unit_test(all_types_are_named),
        cmocka_unit_test(memory_and_functions_serve_too),
        cmocka_unit_test(functions_that_fail_are_reported),
        cmocka_unit_test(metadata_is_text),
        cmocka_unit_test(tokenizers_load_alone),
        cmocka_unit_test(every_allocation_may_fail),
        cmocka_unit_test(a_hundred_loads_leave_nothing),
        cmocka_unit_test(bad_configs_are_refused),
        cmocka_unit_test(rope_may_be_given_twice),
        cmocka_unit_test(long_names_have_scales),
        cmocka_unit_test(extreme_configs_are_refused),
        cmocka_unit_test(bad_safetensors_are_refused),
#if !defined(_WIN32)
        cmocka_unit_test(pipes_are_refused),
#endif
        cmocka_unit_test(truncated_files_are_refused),
        cmocka_unit_test(bad_indexes_are_refused),
        cmocka_unit_test(other_types_are_refused_by_name),
        cmocka_unit_test(what_gguf_asks_for_is_refused_by_name),
        cmocka_unit_test(other_names_are_refused),
        cmocka_unit_test(split_files_need_all_their_parts),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
