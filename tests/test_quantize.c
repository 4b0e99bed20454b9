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
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_same_weights), cmocka_unit_test(test_refusals)};
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
