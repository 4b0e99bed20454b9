/* llm_quantize_directory: the new directory, loaded as int8, has the same bits as the original loaded as int8.
   llm_quantize_gguf: the blocks have the bytes of ggml's reference quantisers, and the rest of the file is copied.
   llm_prune_directory, and directories in compressed-tensors' sparse-24-bitmask, are compared with golden/sparse.py.
   Variants: asan */
#include "tests/check.h"
#include "tests/tiny.h"
#if !defined(_WIN32)
#include <signal.h>
#include <sys/resource.h>
#endif
#define LLM__FILE_START (1u << 16) /* so that tensors are read through callbacks */
#define LLM_IMPLEMENTATION
#include "llm.h"
#include "tests/common.h"

static char folder[64];

static const char *golden(const char *name) {
    char inner[200];
    snprintf(inner, sizeof inner, "hf/%s", name);
    return golden_path(inner);
}

static void refuses(const char *from, const char *to, llm_status expected, const char *words) {
    heap h = {0};
    llm_host host = heap_host(&h);
    llm_error err;
    assert_int_equal(llm_quantize_directory(from, to, &host, &err), expected);
    assert_explained(expected, &err);
    if (!strstr(err.message, words)) fail_msg("\"%s\" does not say \"%s\"", err.message, words);
    assert_all_returned(&h);
}

/* Hashes the bytes of a model's matrices. */
static uint64_t hash_model_as(const char *path, llm_dtype dtype, uint64_t *file_bytes) {
    llm_model_desc desc = {.dtype = dtype, .n_threads = 1};
    llm_model *model = NULL;
    llm_error err;
    if (llm_model_load(&model, path, &desc, &err)) fail_msg("%s", err.message);
    const llm__cpu_model *m = (const llm__cpu_model *)model->device;
    uint64_t hash = 0;
    for (int i = 0; i < m->shape.n_layers; i++) {
        const llm__cpu_layer *l = &m->layers[i];
        const llm__matrix *all[] = {&l->qkv, &l->attention_out, &l->gate_up, &l->down, &m->embedding};
        for (size_t j = 0; j < 5; j++)
            hash = llm__hash_fnv(hash, all[j]->data,
                                 (size_t)(llm__math_round_up(all[j]->n, 16) / 16) * all[j]->tile_bytes);
    }
    *file_bytes = llm_model_get_info(model).weight_bytes;
    llm_model_free(model);
    return hash;
}

static uint64_t hash_model(const char *path, uint64_t *file_bytes) {
    return hash_model_as(path, LLM_DTYPE_INT8, file_bytes);
}

static void test_same_weights(void **state) {
    static const char *const names[] = {"llama", "qwen3", "qwen2", "sharded"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char out[128], file[160];
        uint64_t a, b;
        snprintf(out, sizeof out, "%s/%s", folder, names[i]);
        llm_error err;
        if (llm_quantize_directory(golden(names[i]), out, NULL, &err)) fail_msg("%s", err.message);
        assert_true(hash_model(golden(names[i]), &a) == hash_model(out, &b));
        assert_true(a == b);
        refuses(golden(names[i]), out, LLM_ERROR_IO, "cannot be created");
        snprintf(file, sizeof file, "%s-again", out);
        refuses(out, file, LLM_ERROR_UNSUPPORTED, "only F32, F16 and BF16");
    }
}

static void test_refusals(void **state) {
    char out[128];
    (void)state;
    snprintf(out, sizeof out, "%s/none", folder);
    refuses("absent", out, LLM_ERROR_UNSUPPORTED, "not a directory");
    refuses(golden("llama.gguf"), out, LLM_ERROR_UNSUPPORTED, "not a directory");
    refuses(golden("int8"), out, LLM_ERROR_UNSUPPORTED, "only F32, F16 and BF16");
    assert_int_equal(llm_quantize_directory(NULL, out, NULL, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(access(out, F_OK), -1);
}

static void test_files_that_cannot_be_read(void **state) {
    char in[128], out[128], path[160], command[1100];
    (void)state;
    snprintf(in, sizeof in, "%s/in", folder);
    snprintf(out, sizeof out, "%s/out", folder);
    snprintf(path, sizeof path, "%s/merges.txt", in);
    snprintf(command, sizeof command, "cp -r %s %s", golden("llama"), in);
    assert_int_equal(system(command), 0);
    assert_int_equal(mkdir(path, 0777), 0);
    refuses(in, out, LLM_ERROR_IO, "merges.txt");
}

static const char *golden_sparse(const char *name) {
    char inner[200];
    snprintf(inner, sizeof inner, "sparse/%s", name);
    return golden_path(inner);
}

/* Pruned and quantised matrices have the same bits as those that NumPy makes. */
static void test_pruned(void **state) {
    static const llm_dtype dtypes[] = {LLM_DTYPE_BF16, LLM_DTYPE_INT8};
    (void)state;
    for (int i = 0; i < 2; i++) {
        char out[128];
        uint64_t bytes;
        llm_error err;
        snprintf(out, sizeof out, "%s/pruned-%s", folder, llm_dtype_name(dtypes[i]));
        if (llm_prune_directory(golden_sparse("dense"), out, dtypes[i], NULL, NULL, &err)) fail_msg("%s", err.message);
        assert_true(hash_model_as(out, LLM_DTYPE_F32, &bytes) ==
                    hash_model_as(golden_sparse(llm_dtype_name(dtypes[i])), LLM_DTYPE_F32, &bytes));
        assert_true(hash_model_as(out, LLM_DTYPE_FILE, &bytes) ==
                    hash_model_as(golden_sparse(llm_dtype_name(dtypes[i])), LLM_DTYPE_FILE, &bytes));
    }
    assert_int_equal(llm_prune_directory("a", "b", LLM_DTYPE_INT4, NULL, NULL, NULL), LLM_ERROR_ARGUMENT);
}

static uint8_t *find_bytes(bytes b, const void *what, size_t n) {
    for (size_t i = 0; i + n <= b.n; i++)
        if (!memcmp(b.at + i, what, n)) return b.at + i;
    fail_msg("not found");
    return NULL;
}

/* Returns the address of a tensor's data in a safetensors file. */
static uint8_t *find_data(bytes file, const char *name) {
    uint64_t header;
    memcpy(&header, file.at, 8);
    const char *entry = (const char *)find_bytes(file, name, strlen(name));
    return file.at + 8 + header + strtoull(strstr(entry, "offsets\":[") + 10, NULL, 10);
}

/* Makes a copy of a golden directory whose model.safetensors is `tensors`. */
static void copy_with(const char *from, const char *to, bytes tensors) {
    char command[1100], path[200];
    snprintf(command, sizeof command, "rm -rf %s && cp -r %s %s", to, from, to);
    assert_int_equal(system(command), 0);
    snprintf(path, sizeof path, "%s/model.safetensors", to);
    write_file(path, tensors.at, tensors.n);
}

/* Weights that are not finite as bf16 are refused, and so are rows whose length is not a multiple of four. */
static void test_not_pruned(void **state) {
    static const uint32_t bad[] = {0x7FC00000, 0xFF800000, 0x7F7FFFFF}; /* NaN, -infinity, the largest f32 */
    char in[128], out[128];
    (void)state;
    snprintf(in, sizeof in, "%s/bad", folder);
    bytes file = read_file(golden_sparse("dense/model.safetensors"));
    for (size_t i = 0; i < 3; i++) {
        snprintf(out, sizeof out, "%s/bad-out%d", folder, (int)i);
        memcpy(find_data(file, "down_proj.weight") + (64 * 3 + 5) * 4, &bad[i], 4);
        copy_with(golden_sparse("dense"), in, file);
        heap h = {0};
        llm_host host = heap_host(&h);
        llm_error err;
        assert_int_equal(llm_prune_directory(in, out, LLM_DTYPE_BF16, NULL, &host, &err), LLM_ERROR_FORMAT);
        if (!strstr(err.message, "down_proj.weight: the weight in row 3, column 5")) fail_msg("%s", err.message);
        assert_all_returned(&h);
    }
    free(file.at);
}

static void test_bitmasks(void **state) {
    static const char *const names[] = {"bf16", "int8"};
    (void)state;
    for (int i = 0; i < 2; i++) {
        char mask[100];
        uint64_t a, b;
        snprintf(mask, sizeof mask, "%s-bitmask", names[i]);
        for (int dtype = LLM_DTYPE_F32; dtype <= LLM_DTYPE_FILE; dtype++) {
            assert_true(hash_model_as(golden_sparse(names[i]), (llm_dtype)dtype, &a) ==
                        hash_model_as(golden_sparse(mask), (llm_dtype)dtype, &b));
            assert_true(a == b);
        }
        refuses(golden_sparse(mask), "never", LLM_ERROR_UNSUPPORTED, i ? "only F32" : "quantized already");
    }
}

static void refuses_to_load(const char *path, const char *words) {
    heap h = {0};
    llm_model_desc desc = {.host = heap_host(&h), .n_threads = 1};
    llm_model *model;
    llm_error err;
    if (!llm_model_load(&model, path, &desc, &err)) fail_msg("loaded, where \"%s\" was expected", words);
    if (!strstr(err.message, words)) fail_msg("\"%s\" does not say \"%s\"", err.message, words);
    assert_all_returned(&h);
}

/* Matrices with 2:4 sparsity are held as 2:4, however the file stores them. llm_model_read_info does not read the
   weights, so it does not know. */
static void test_held(void **state) {
    static const struct {
        const char *name, *held, *known;
        llm_dtype dtype;
    } cases[] = {{"bf16", "bf16 2:4", "bf16", LLM_DTYPE_DEFAULT},
                 {"bf16-bitmask", "bf16 2:4", "bf16", LLM_DTYPE_DEFAULT},
                 {"bf16", "int8 2:4", "int8", LLM_DTYPE_INT8},
                 {"int8", "int8 2:4", "int8", LLM_DTYPE_DEFAULT},
                 {"int8-bitmask", "int8 2:4", "int8", LLM_DTYPE_DEFAULT},
                 {"int8", "bf16 2:4", "bf16", LLM_DTYPE_BF16},
                 {"bf16", "f32", "f32", LLM_DTYPE_F32},
                 {"dense", "bf16", "bf16", LLM_DTYPE_DEFAULT}};
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        llm_model_desc desc = {.dtype = cases[i].dtype, .n_threads = 1};
        llm_model_info before;
        llm_model *model = NULL;
        llm_error err;
        if (llm_model_read_info(golden_sparse(cases[i].name), &desc, &before, &err)) fail_msg("%s", err.message);
        if (llm_model_load(&model, golden_sparse(cases[i].name), &desc, &err)) fail_msg("%s", err.message);
        const llm_model_info info = llm_model_get_info(model);
        const bool is_2_4 = strcmp(cases[i].held, cases[i].known);
        llm_model_free(model);
        if (!strstr(info.held, cases[i].held) || !strstr(info.held, "2:4") == is_2_4 || strstr(before.held, "2:4") ||
            !strstr(before.held, cases[i].known))
            fail_msg("%s: held as %s; read_info says %s", cases[i].name, info.held, before.held);
        assert_true(is_2_4 ? info.weight_bytes < before.weight_bytes : info.weight_bytes == before.weight_bytes);
    }
}

/* A matrix is not held as 2:4 if it has a weight that is not finite, or three of four weights that are not zero, even
   if only in its last row. */
static void test_not_held(void **state) {
    static const uint16_t weights[] = {0x7FC0, 0xFF80, 0x3F80};
    char in[128];
    (void)state;
    snprintf(in, sizeof in, "%s/not-held", folder);
    for (size_t i = 0; i < sizeof weights / sizeof *weights; i++) {
        bytes file = read_file(golden_sparse("bf16/model.safetensors"));
        llm_model *model = NULL;
        llm_error err;
        char name[] = "model.layers.0.mlp.down_proj.weight";
        uint8_t *header = find_bytes(file, name, sizeof name - 1);
        unsigned long first, end;
        const char *offsets = strstr((const char *)header, "\"data_offsets\":[");
        assert_non_null(offsets);
        assert_int_equal(sscanf(offsets + strlen("\"data_offsets\":["), "%lu,%lu", &first, &end), 2);
        uint64_t n_header;
        memcpy(&n_header, file.at, 8);
        uint16_t *last = (uint16_t *)(void *)(file.at + 8 + n_header + end) - 4; /* the last four weights */
        for (int j = 0; j < 4; j++) {
            if (weights[i] == 0x3F80 && j < 3) last[j] = weights[i];
            if (weights[i] != 0x3F80 && last[j]) last[j] = weights[i];
        }
        copy_with(golden_sparse("bf16"), in, file);
        if (llm_model_load(&model, in, NULL, &err)) fail_msg("%s", err.message);
        const llm__cpu_model *m = (const llm__cpu_model *)model->device;
        assert_int_equal(m->layers[0].down.kind, LLM__W_BF16);
        assert_int_equal(m->layers[0].qkv.kind, LLM__W_BF16_2_4);
        llm_model_free(model);
        free(file.at);
    }
}

static bool read_at(void *user, uint64_t offset, void *to, size_t n) {
    const bytes *file = (const bytes *)user;
    if (offset > file->n || n > file->n - offset) return false;
    memcpy(to, file->at + offset, n);
    return true;
}

/* A GGUF file read in parts through a callback is held in the same way. */
static void test_held_from_callback(void **state) {
    llm_model *model = NULL;
    llm_error err;
    bytes file;
    (void)state;
    file.at = tiny_model(&TINY_2_4, &file.n);
    if (llm_model_load_callback(&model, read_at, &file, file.n, NULL, &err)) fail_msg("%s", err.message);
    assert_non_null(strstr(llm_model_get_info(model).held, "bf16 2:4"));
    llm_model_free(model);
    free(file.at);
}

static void test_bad_bitmasks(void **state) {
    static const struct {
        const char *old, *new_text, *words; /* in the header, of the same length */
    } names[] = {
        {"down_proj.bitmask", "down_proj.bitmasx", "down_proj.compressed, but no model.layers.0.mlp.down_proj.b"},
        {"down_proj.shape", "down_proj.shapx", "down_proj.compressed, but no model.layers.0.mlp.down_proj.shape"},
        {"down_proj.compressed", "down_proj.compressex", "down_proj.weight is missing"},
        {"U8", "I8", "is not of type U8"},
        {"I64", "F64", "is not two numbers of type I64"},
        {"lm_head.weight", "lm_head.bitmas", "there is no tensor lm_head.weight"},
    };
    static const struct {
        const char *tensor;
        int at;
        uint8_t value;
        const char *words;
    } values[] = {
        {"down_proj.bitmask", 9, 0xFF, "down_proj.bitmask: row 1 has 4 weights at columns 8 to 11 of 64"},
        {"down_proj.bitmask", 7, 0x03, "row 0 has 0 weights at columns 60 to 63 of 64"},
        {"down_proj.shape", 0, 31, "down_proj.shape gives 31 x 64"},
        {"down_proj.shape", 7, 0x80, "down_proj.shape gives 9223372036854775840 x 64"},
        {"down_proj.shape", 8, 62, "gives 32 x 62"},
        {"down_proj.shape", 8, 68, "gives 32 x 68"},
        {"down_proj.shape", 15, 0xFF, "down_proj.shape gives 32 x 18374686479671623744"},
    };
    static const struct {
        const char *old, *new_text, *words;
    } configs[] = {
        {"\"sparse-24-bitmask\"", "\"sparse-bitmask\"", "sparsity_config.format is \"sparse-bitmask\""},
        {"\"sparse-24-bitmask\"", "\"dense\"", "q_proj.weight is missing"},
        {"\"sparse-24-bitmask\"", "24", "sparsity_config.format is a number"},
        {"\"sparsity_config\": {", "\"sparsity_config\": 1, \"x\": {", "sparsity_config is a number"},
        {"\"compressed-tensors\"", "\"other\"", "quant_method is \"other\""},
    };
    char in[128], path[200];
    (void)state;
    snprintf(in, sizeof in, "%s/bad-mask", folder);
    for (size_t i = 0; i < sizeof names / sizeof *names + sizeof values / sizeof *values; i++) {
        const size_t n_names = sizeof names / sizeof *names;
        bytes file = read_file(golden_sparse("bf16-bitmask/model.safetensors"));
        if (i < n_names)
            memcpy(find_bytes(file, names[i].old, strlen(names[i].old)), names[i].new_text, strlen(names[i].old));
        else find_data(file, values[i - n_names].tensor)[values[i - n_names].at] = values[i - n_names].value;
        copy_with(golden_sparse("bf16-bitmask"), in, file);
        refuses_to_load(in, i < n_names ? names[i].words : values[i - n_names].words);
        free(file.at);
    }
    bytes file = read_file(golden_sparse("bf16-bitmask/model.safetensors"));
    bytes config = read_file(golden_sparse("bf16-bitmask/config.json"));
    copy_with(golden_sparse("bf16-bitmask"), in, file);
    snprintf(path, sizeof path, "%s/config.json", in);
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) {
        char *at = strstr((char *)config.at, configs[i].old), text[4096];
        assert_non_null(at);
        snprintf(text, sizeof text, "%.*s%s%s", (int)(at - (char *)config.at), (char *)config.at, configs[i].new_text,
                 at + strlen(configs[i].old));
        write_file(path, text, strlen(text));
        refuses_to_load(in, configs[i].words);
    }
    free(config.at);
    free(file.at);
}

static void copy_config(llm__env *env, void *arg) { llm__quantize_config(env, (const llm__quantize_args *)arg); }

/* A config.json that is not an object any more when it is copied is an error. */
static void test_config_that_changes(void **state) {
    llm__pool pool;
    llm__env env;
    llm_error err;
    llm__checkpoint ck;
    char path[160];
    llm__quantize_args args = {folder, folder, &ck, LLM_DTYPE_INT8, false, NULL};
    (void)state;
    snprintf(path, sizeof path, "%s/config.json", folder);
    write_file(path, "[]", 2);
    memset(&ck, 0, sizeof ck);
    ck.config_path = path;
    llm__pool_init(&pool, NULL);
    llm__env_init(&env, &pool, &err, NULL);
    assert_int_equal(llm__env_run(&env, copy_config, &args), LLM_ERROR_IO);
    assert_non_null(strstr(err.message, "config.json"));
    llm__pool_free(&pool);
}

/* Each allocation fails once. No file may stay open. */
typedef struct starved {
    heap h;
    int n_tries;
} starved;

static llm_status quantize_starved(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_host host = heap_host(&s->h);
    char out[128];
    snprintf(out, sizeof out, "%s/starved%d", folder, s->n_tries++);
    return llm_quantize_directory(golden("qwen3"), out, &host, err);
}

static void test_starved(void **state) {
    starved s = {{0}, 0};
    (void)state;
    starve(&s.h, quantize_starved, &s, 1, "llm_quantize_directory");
    static const char *const names[] = {"bf16", "int8-bitmask"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        load_job job;
        memset(&job, 0, sizeof job);
        job.path = golden_sparse(names[i]);
        starve(&job.h, load_model_starved, &job, 1, names[i]);
    }
}

/* ---- GGUF files ---- */

enum { N_GOLDEN_TYPES = 10 }; /* types in quantize.bin: all except F32 */

/* Two layers; the rows of ffn_down are not multiples of a block. */
static const tiny_spec with_odd_rows = {2, 64, 72, 2, 1, 32, 512, 43, 1, 0, 1};
static const tiny_spec of_whole_blocks = {2, 256, 256, 4, 2, 64, 512, 43, 1, 0, 1};

/* Rows are encoded as by the reference. */
static void test_blocks(void **state) {
    bytes b = read_file(golden_path("quantize.bin"));
    int32_t n, kind[2], n_kinds = 0;
    (void)state;
    memcpy(&n, b.at, 4);
    const float *weights = (const float *)(const void *)(b.at + 4);
    uint8_t *made = (uint8_t *)malloc((size_t)n * 4);
    for (size_t at = 4 + 4 * (size_t)n; at < b.n; at += 8 + (size_t)kind[1], n_kinds++) {
        memcpy(kind, b.at + at, 8);
        llm__encode_fn *encode = llm__encode_find((uint32_t)kind[0]);
        if (!encode) fail_msg("type %d is not written", (int)kind[0]);
        memset(made, 0xA5, (size_t)n * 4);
        encode(weights, (size_t)n, made);
        for (int32_t i = 0; i < kind[1]; i++)
            if (made[i] != b.at[at + 8 + (size_t)i]) fail_msg("type %d differs at byte %d", (int)kind[0], (int)i);
    }
    assert_int_equal(n_kinds, N_GOLDEN_TYPES);
    free(made);
    free(b.at);
}

/* Blocks with scales that are too small to be inverted, or too large for f16. */
static void test_extreme_blocks(void **state) {
    static const float ends[] = {0, -0.0f, 1e-45f, -1e-45f, 1e-39f, -1e-38f, 65504, -65504};
    float weights[256], read[256];
    uint8_t made[1024];
    (void)state;
    for (size_t e = 0; e < sizeof ends / sizeof *ends; e++)
        for (size_t k = 0; k < sizeof llm__gguf_recipes / sizeof *llm__gguf_recipes; k++) {
            for (int i = 0; i < 256; i++) weights[i] = i % 3 ? ends[e] : i % 2 ? ends[0] : ends[i % 8];
            const llm__file_type_info *type = llm__file_type_find(llm__gguf_recipes[k].type);
            llm__encode_find(type->type)(weights, 256, made);
            type->decode(made, 256, read);
            for (int i = 0; i < 256; i++) assert_true(fabsf(read[i] - weights[i]) <= 65504.0f);
        }
}

static llm_status to_gguf(const void *data, size_t size, const char *to, const char *type, llm_error *err) {
    llm_quantize_desc desc = {.type = type, .n_threads = 2};
    return llm_quantize_gguf_memory(data, size, to, &desc, err);
}

typedef struct parsed {
    llm__pool pool;
    llm__file *file;
    llm__checkpoint *ck;
} parsed;

static void parse_body(llm__env *env, void *arg) {
    parsed *p = (parsed *)arg;
    p->ck = llm__gguf_read_whole(env, p->file);
}

static void parse(parsed *p, const void *data, size_t size) {
    static llm__file file;
    llm__env env;
    llm_error err;
    memset(&file, 0, sizeof file);
    file.data = (const uint8_t *)data;
    file.size = file.have = size;
    p->file = &file;
    llm__pool_init(&p->pool, NULL);
    llm__env_init(&env, &p->pool, &err, NULL);
    if (llm__env_run(&env, parse_body, p)) fail_msg("%s", err.message);
}

/* Returns the expected type of a matrix. Mixes use Q6_K for some matrices of layer 1, the last of the two. */
static llm__file_type expected_type(const llm__checkpoint *ck, const llm__tensor *t, const llm__gguf_recipe *recipe) {
    static const llm__file_type smaller[] = {LLM__Q5_0, LLM__Q5_1, LLM__Q8_0};
    llm__file_type type = recipe->type;
    if (recipe->mixed && (llm__str_is(t->name, "blk.1.attn_v.weight") || llm__str_is(t->name, "blk.1.ffn_down.weight")))
        type = LLM__Q6_K;
    if (recipe->mixed &&
        llm__str_is(t->name, llm__tensor_find(ck, "output.weight") ? "output.weight" : "token_embd.weight"))
        type = LLM__Q6_K;
    if (type >= LLM__Q4_K && type <= LLM__Q6_K && t->cols % 256) type = smaller[type - LLM__Q4_K];
    return t->cols % llm__file_type_find(type)->block_weights ? LLM__F16 : type;
}

/* Each tensor of b must be the encoded tensor of a, and each key of a must have the same value; b has two more keys. */
static void compare_files(const llm__checkpoint *a, const llm__checkpoint *b, const llm__gguf_recipe *recipe) {
    assert_int_equal(a->n_tensors, b->n_tensors);
    for (size_t i = 0; i < a->n_tensors; i++) {
        const llm__tensor *x = &a->tensors[i], *y = &b->tensors[i];
        assert_true(llm__str_equal(x->name, y->name));
        assert_true(x->rows == y->rows && x->cols == y->cols);
        assert_int_equal(y->type->type, x->rows > 1 ? expected_type(a, x, recipe) : LLM__F32);
        float *row = (float *)malloc(x->cols * sizeof *row);
        uint8_t *made = (uint8_t *)malloc(y->row_bytes);
        for (uint64_t r = 0; r < x->rows; r++) {
            x->type->decode(x->data + r * x->row_bytes, x->cols, row);
            llm__encode_find(y->type->type)(row, x->cols, made);
            if (x->type == y->type) memcpy(made, x->data + r * x->row_bytes, x->row_bytes); /* copied unchanged */
            assert_memory_equal(made, y->data + r * y->row_bytes, y->row_bytes);
        }
        free(made);
        free(row);
    }
    size_t n_same = 0;
    for (size_t i = 0; i < a->n_values; i++) {
        const llm__gguf_value *x = &a->values[i];
        if (llm__gguf_drops(x->key)) continue;
        const llm__gguf_value *y = &b->values[n_same++];
        assert_true(llm__str_equal(x->key, y->key) && x->type == y->type && x->count == y->count);
        assert_memory_equal(x->data, y->data, llm__gguf_value_bytes(x));
    }
    assert_int_equal(b->n_values, n_same + 2);
    assert_true(llm__gguf_value_number(llm__gguf_find(b, "general.file_type"), 0) == recipe->file_type);
    assert_true(llm__gguf_value_number(llm__gguf_find(b, "general.quantization_version"), 0) == 2);
}

static void compare_gguf(const tiny_spec *spec, const llm__gguf_recipe *recipe) {
    char to[128];
    size_t size;
    uint8_t *from = tiny_model(spec, &size);
    llm_error err;
    parsed a, b;
    snprintf(to, sizeof to, "%s/%s.gguf", folder, recipe->name);
    if (to_gguf(from, size, to, recipe->name, &err)) fail_msg("%s", err.message);
    bytes made = read_file(to);
    parse(&a, from, size);
    parse(&b, made.at, made.n);
    compare_files(a.ck, b.ck, recipe);
    llm__pool_free(&a.pool);
    llm__pool_free(&b.pool);
    llm_model_free(load_model(to, NULL));
    /* Converting the file again gives the same bytes. */
    assert_int_equal(remove(to), 0);
    if (to_gguf(made.at, made.n, to, recipe->name, &err)) fail_msg("%s", err.message);
    bytes again = read_file(to);
    assert_int_equal(again.n, made.n);
    assert_memory_equal(again.at, made.at, made.n);
    assert_int_equal(remove(to), 0);
    free(again.at);
    free(made.at);
    free(from);
}

static void test_gguf(void **state) {
    tiny_spec from_blocks = of_whole_blocks, mixed = TINY_ALL_TYPES;
    (void)state;
    from_blocks.type = 8;
    for (size_t i = 0; i < sizeof llm__gguf_recipes / sizeof *llm__gguf_recipes; i++) {
        compare_gguf(&with_odd_rows, &llm__gguf_recipes[i]);
        compare_gguf(&from_blocks, &llm__gguf_recipes[i]);
        compare_gguf(&mixed, &llm__gguf_recipes[i]);
    }
}

/* The right layers of a mix have more bits. */
static void test_gguf_mix(void **state) {
    tiny_spec spec = {17, 256, 256, 1, 1, 32, 64, 3, 1, 0, 1};
    char to[128];
    size_t size;
    uint8_t *from = tiny_model(&spec, &size);
    llm_error err;
    parsed p;
    (void)state;
    snprintf(to, sizeof to, "%s/mix.gguf", folder);
    if (to_gguf(from, size, to, "Q4_K_M", &err)) fail_msg("%s", err.message);
    bytes made = read_file(to);
    parse(&p, made.at, made.n);
    for (int i = 0; i < 17; i++) {
        static const char more[] = "11001001001001111"; /* llama.cpp's choice */
        char name[64];
        llm__file_type type = more[i] == '1' ? LLM__Q6_K : LLM__Q4_K;
        snprintf(name, sizeof name, "blk.%d.attn_v.weight", i);
        assert_int_equal(llm__tensor_find(p.ck, name)->type->type, type);
        snprintf(name, sizeof name, "blk.%d.ffn_down.weight", i);
        assert_int_equal(llm__tensor_find(p.ck, name)->type->type, type);
        snprintf(name, sizeof name, "blk.%d.attn_q.weight", i);
        assert_int_equal(llm__tensor_find(p.ck, name)->type->type, LLM__Q4_K);
    }
    assert_int_equal(llm__tensor_find(p.ck, "output.weight")->type->type, LLM__Q6_K);
    assert_int_equal(llm__tensor_find(p.ck, "token_embd.weight")->type->type, LLM__Q4_K);
    llm__pool_free(&p.pool);
    assert_int_equal(remove(to), 0);
    free(made.at);
    free(from);
}

static bool read_bytes(void *user, uint64_t offset, void *to, size_t n) {
    bytes *b = (bytes *)user;
    if (offset + n > b->n) return false;
    memcpy(to, b->at + offset, n);
    return true;
}

/* The result is the same from a path, from memory, and through a callback. A split model becomes one file. */
static void test_gguf_sources(void **state) {
    static const char *const names[] = {"llama.gguf", "llama3.gguf", "sharded-00001-of-00003.gguf"};
    llm_quantize_desc desc = {.type = "Q8_0", .n_threads = 1};
    char a[128], b[128];
    llm_error err;
    (void)state;
    snprintf(a, sizeof a, "%s/a.gguf", folder);
    snprintf(b, sizeof b, "%s/b.gguf", folder);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (llm_quantize_gguf(golden(names[i]), a, &desc, &err)) fail_msg("%s", err.message);
        llm_model_free(load_model(a, NULL));
        bytes in = read_file(i == 2 ? a : golden(names[i])), x = read_file(a);
        if (llm_quantize_gguf_callback(read_bytes, &in, in.n, b, &desc, &err)) fail_msg("%s", err.message);
        bytes y = read_file(b);
        assert_int_equal(x.n, y.n);
        assert_memory_equal(x.at, y.at, x.n);
        assert_int_equal(remove(a) | remove(b), 0);
        free(in.at);
        free(x.at);
        free(y.at);
    }
}

static void refuses_gguf(const bytes *from, const char *to, const llm_quantize_desc *wanted, llm_status expected,
                         const char *words) {
    heap h = {0};
    llm_quantize_desc desc = *wanted;
    desc.host = heap_host(&h);
    desc.host.progress = wanted->host.progress;
    llm_error err;
    char unfinished[160];
    snprintf(unfinished, sizeof unfinished, "%s.tmp", to);
    assert_int_equal(llm_quantize_gguf_memory(from->at, from->n, to, &desc, &err), expected);
    assert_explained(expected, &err);
    if (!strstr(err.message, words)) fail_msg("\"%s\" does not say \"%s\"", err.message, words);
    assert_all_returned(&h);
    assert_int_equal(access(unfinished, F_OK), -1);
}

static bool no_progress(void *user, float done) {
    (void)user;
    return done < 0.5f;
}

static bool read_header(void *user, uint64_t offset, void *to, size_t n) {
    return offset < 64 && read_bytes(user, offset, to, n);
}

static void test_gguf_refusals(void **state) {
    llm_quantize_desc desc = {.type = "Q8_0"};
    char to[128];
    llm_error err;
    bytes b;
    (void)state;
    b.at = tiny_model(&of_whole_blocks, &b.n);
    snprintf(to, sizeof to, "%s/refused.gguf", folder);
    assert_int_equal(llm_quantize_gguf(NULL, to, &desc, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_quantize_gguf(to, NULL, &desc, &err), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_quantize_gguf(to, to, NULL, NULL), LLM_ERROR_ARGUMENT);
    assert_int_equal(llm_quantize_gguf("absent.gguf", to, &desc, &err), LLM_ERROR_IO);
    assert_int_equal(llm_quantize_gguf_callback(read_header, &b, b.n, to, &desc, &err), LLM_ERROR_IO);
    assert_non_null(strstr(err.message, "read callback"));
    desc.type = "Q9";
    refuses_gguf(&b, to, &desc, LLM_ERROR_ARGUMENT, "the types are F32");
    desc.type = NULL;
    refuses_gguf(&b, to, &desc, LLM_ERROR_ARGUMENT, "the types are F32");
    desc.type = "Q8_0";
    refuses_gguf(&b, folder, &desc, LLM_ERROR_IO, "exists already");
    refuses_gguf(&b, "/tmp/absent/x.gguf", &desc, LLM_ERROR_IO, "cannot be written");
    desc.host.progress = no_progress;
    refuses_gguf(&b, to, &desc, LLM_ERROR_CANCELLED, "cancelled");
    desc.host.progress = NULL;
    static const float bad[] = {INFINITY, NAN, 70000};
    for (int i = 0; i < 3; i++) {
        bytes spoilt = {(uint8_t *)malloc(b.n), b.n};
        memcpy(spoilt.at, b.at, b.n);
        memcpy(spoilt.at + b.n - 4096, &bad[i], 4);
        refuses_gguf(&spoilt, to, &desc, LLM_ERROR_UNSUPPORTED, "not finite or too large");
        spoilt.n -= 64;
        refuses_gguf(&spoilt, to, &desc, LLM_ERROR_FORMAT, "the file ends");
        free(spoilt.at);
    }
#if !defined(_WIN32)
    /* A full disk: no file may be longer than 64 kB. */
    struct rlimit old, low;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    low = old;
    low.rlim_cur = 65536;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &low), 0);
    refuses_gguf(&b, to, &desc, LLM_ERROR_IO, ".tmp failed");
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
#endif
    assert_int_equal(access(to, F_OK), -1);
    free(b.at);
}

/* A damaged header gives an error message, or a file. */
static void test_gguf_damaged(void **state) {
    tiny_spec spec = with_odd_rows;
    llm_error err;
    char to[128];
    bytes b;
    (void)state;
    b.at = tiny_model(&spec, &b.n);
    snprintf(to, sizeof to, "%s/damaged.gguf", folder);
    uint32_t random = 1;
    for (int i = 0; i < 300; i++) {
        random = random * 1664525u + 1013904223u;
        size_t at = (random >> 8) % 3000;
        uint8_t was = b.at[at];
        b.at[at] = (uint8_t)(random >> 3);
        llm_status status = to_gguf(b.at, b.n, to, "Q4_0", &err);
        if (status) assert_explained(status, &err);
        else assert_int_equal(remove(to), 0);
        assert_int_equal(access(to, F_OK), -1);
        b.at[at] = was;
    }
    free(b.at);
}

static llm_status gguf_starved(void *job, llm_error *err) {
    starved *s = (starved *)job;
    llm_quantize_desc desc = {.type = "Q5_1", .n_threads = 2, .host = heap_host(&s->h)};
    char out[128];
    snprintf(out, sizeof out, "%s/starved%d.gguf", folder, s->n_tries++);
    llm_status status = llm_quantize_gguf(golden("qwen2.gguf"), out, &desc, err);
    assert_int_equal(access(out, F_OK), status ? -1 : 0);
    return status;
}

static void test_gguf_starved(void **state) {
    starved s = {{0}, 0};
    (void)state;
    starve(&s.h, gguf_starved, &s, 1, "llm_quantize_gguf");
}

static int make_folder(void **state) {
    (void)state;
    strcpy(folder, "/tmp/llm_quantize_XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state) {
    char command[128];
    (void)state;
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_same_weights),
                                       cmocka_unit_test(test_refusals),
                                       cmocka_unit_test(test_files_that_cannot_be_read),
                                       cmocka_unit_test(test_config_that_changes),
                                       cmocka_unit_test(test_pruned),
                                       cmocka_unit_test(test_not_pruned),
                                       cmocka_unit_test(test_bitmasks),
                                       cmocka_unit_test(test_held),
                                       cmocka_unit_test(test_not_held),
                                       cmocka_unit_test(test_held_from_callback),
                                       cmocka_unit_test(test_bad_bitmasks),
                                       cmocka_unit_test(test_starved),
                                       cmocka_unit_test(test_blocks),
                                       cmocka_unit_test(test_extreme_blocks),
                                       cmocka_unit_test(test_gguf),
                                       cmocka_unit_test(test_gguf_mix),
                                       cmocka_unit_test(test_gguf_sources),
                                       cmocka_unit_test(test_gguf_refusals),
                                       cmocka_unit_test(test_gguf_damaged),
                                       cmocka_unit_test(test_gguf_starved)};
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
