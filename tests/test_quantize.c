/* quantize.c: what it writes is, loaded as int8, to the bit what the original is when it is loaded as int8.
   Variants: asan */
#define main quantize_main
#include "examples/quantize.c"
#undef main

#include <setjmp.h>
#include <stdarg.h>
#include <cmocka.h>
#include <unistd.h>

static char folder[64];

static const char *golden(const char *name) {
    static char path[512];
    const char *dir = getenv("LLM_TEST_DIR");
    snprintf(path, sizeof path, "%s/golden/hf/%s", dir ? dir : "tests", name);
    return path;
}

static int run(const char *in, const char *out) {
    char name[] = "quantize", from[512], to[512], *argv[] = {name, from, to, NULL};
    snprintf(from, sizeof from, "%s", in);
    snprintf(to, sizeof to, "%s", out);
    return quantize_main(3, argv);
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
            hash = llm__hash_fnv(hash, all[j]->data, (size_t)(llm__math_round_up(all[j]->n, 16) / 16) * all[j]->tile_bytes);
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
        assert_int_equal(run(golden(names[i]), out), 0);
        assert_true(hash_model(golden(names[i]), &a) == hash_model(out, &b));
        assert_true(a == b);
        assert_int_not_equal(run(golden(names[i]), out), 0); /* it is there already */
        snprintf(file, sizeof file, "%s-again", out);
        assert_int_not_equal(run(out, file), 0); /* it is quantised already */
    }
}

static void test_refusals(void **state) {
    char out[128];
    (void)state;
    snprintf(out, sizeof out, "%s/none", folder);
    assert_int_not_equal(run("absent", out), 0);
    assert_int_not_equal(run(golden("llama.gguf"), out), 0);
    assert_int_not_equal(run(golden("int8"), out), 0);
    assert_int_equal(access(out, F_OK), -1);
}

/* Links the files of a directory into a new one. */
static void link_files(const char *from, const char *to) {
    char command[1100], path[512];
    assert_non_null(realpath(from, path));
    snprintf(command, sizeof command, "mkdir %s && ln -s %s/* %s", to, path, to);
    assert_int_equal(system(command), 0);
}

static void test_files_that_cannot_be_read(void **state) {
    char in[128], out[128], path[160];
    (void)state;
    snprintf(in, sizeof in, "%s/in", folder);
    snprintf(out, sizeof out, "%s/out", folder);
    snprintf(path, sizeof path, "%s/merges.txt", in);
    link_files(golden("llama"), in);
    assert_int_equal(mkdir(path, 0777), 0); /* can be opened, but not read */
    assert_int_not_equal(run(in, out), 0);
}

static void write_changed_config(llm__env *env, void *arg) {
    llm__json object;
    llm__checkpoint ck;
    memset(&object, 0, sizeof object);
    memset(&ck, 0, sizeof ck);
    object.type = LLM__JSON_OBJECT;
    ck.config = &object;
    write_config(env, (const job *)arg, &ck);
}

/* A config.json that is no object any more when it is copied. */
static void test_config_that_changes(void **state) {
    llm__pool pool;
    llm__env env;
    llm_error err;
    char path[160];
    job job = {folder, folder};
    (void)state;
    snprintf(path, sizeof path, "%s/config.json", folder);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    fputs("[]", file);
    fclose(file);
    alarm(20);
    llm__pool_init(&pool, NULL);
    llm__env_init(&env, &pool, &err, NULL);
    assert_int_equal(llm__env_run(&env, write_changed_config, &job), LLM_ERROR_IO);
    assert_non_null(strstr(err.message, "config.json"));
    llm__pool_free(&pool);
    alarm(0);
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
                                       cmocka_unit_test(test_files_that_cannot_be_read), cmocka_unit_test(test_config_that_changes)};
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
