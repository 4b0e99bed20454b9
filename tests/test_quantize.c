/* llm_quantize_directory: its directory, loaded as int8, has the same bits as the original directory loaded as int8.
   Variants: asan */
#include "tests/check.h"
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

/* The bytes of a model's matrices as int8. */
static uint64_t hash_model(const char *path, uint64_t *file_bytes) {
    llm_model_desc desc = {.dtype = LLM_DTYPE_INT8, .n_threads = 1};
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

static void copy_config(llm__env *env, void *arg) { llm__quantize_config(env, (const llm__quantize_args *)arg); }

/* A config.json that is no object any more when it is copied. */
static void test_config_that_changes(void **state) {
    llm__pool pool;
    llm__env env;
    llm_error err;
    llm__checkpoint ck;
    char path[160];
    llm__quantize_args args = {folder, folder, &ck};
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

/* Each allocation fails once; what was begun does not stay open. */
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
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_same_weights), cmocka_unit_test(test_refusals),
                                       cmocka_unit_test(test_files_that_cannot_be_read),
                                       cmocka_unit_test(test_config_that_changes), cmocka_unit_test(test_starved)};
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
