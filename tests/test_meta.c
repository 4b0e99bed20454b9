/* Models as Meta publishes them: logits against golden/meta.py, with one file and two; files that are cut off or
   changed; failing allocations.
   Variants: asan */
#include "tests/check.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include "tests/common.h"

static void logits_are_those_of_the_reference(void **state) {
    static const char *const names[] = {"hf/meta-1", "hf/meta-2"};
    (void)state;
    for (int k = 0; k < 2; k++) {
        const char *path = golden_path(names[k]);
        char file[1000];
        snprintf(file, sizeof file, "%s/logits.bin", path);
        bytes b = read_file(file);
        const int32_t *head = (const int32_t *)(const void *)b.at;
        const float *wanted = (const float *)(const void *)(head + 2 + head[0]);
        llm_model_desc desc;
        llm_context_desc context;
        llm_error err;
        memset(&desc, 0, sizeof desc);
        memset(&context, 0, sizeof context);
        desc.dtype = LLM_DTYPE_F32;
        llm_model *model = load_model(path, &desc);
        context.n_logits = 1;
        llm_context *ctx = create_context(model, &context);
        for (int i = 0; i < head[0]; i++) {
            llm_batch batch = {1, head + 2 + i, NULL, NULL};
            if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
            const float *logits = llm_logits(ctx, 0);
            for (int j = 0; j < head[1]; j++)
                assert_true(fabsf(logits[j] - wanted[i * head[1] + j]) < 1e-4f * (1 + fabsf(logits[j])));
        }
        llm_context_free(ctx);
        llm_model_free(model);
        free(b.at);
    }
}

static void damaged_files_are_refused_or_read(void **state) {
    static const char *const names[] = {"params.json", "tokenizer.model", "consolidated.00.pth"};
    char file[1000], copy[] = "/tmp/llm-test-meta-XXXXXX", path[3][100];
    bytes b[3];
    (void)state;
    assert_non_null(mkdtemp(copy));
    for (int i = 0; i < 3; i++) {
        snprintf(file, sizeof file, "%s/%s", golden_path("hf/meta-1"), names[i]);
        snprintf(path[i], sizeof path[i], "%s/%s", copy, names[i]);
        b[i] = read_file(file);
        write_file(path[i], b[i].at, b[i].n);
    }
    for (size_t i = 0; i < b[2].n; i += i < 3000 || i + 6000 > b[2].n ? 11 : 97)
        for (int cut = 0; cut < 2; cut++) {
            llm_error err;
            llm_model *model;
            llm_model_desc desc;
            const uint8_t flip = cut ? 0 : (uint8_t)(1 + i % 255);
            if (cut && !i) continue;
            memset(&desc, 0, sizeof desc);
            desc.n_threads = 1;
            b[2].at[i] ^= flip;
            write_file(path[2], b[2].at, cut ? i : b[2].n);
            b[2].at[i] ^= flip;
            const llm_status status = llm_model_load(&model, copy, &desc, &err);
            if (cut) assert_true(status != LLM_OK);
            if (status) assert_explained(status, &err);
            llm_model_free(model);
        }
    for (int i = 0; i < 3; i++) {
        remove(path[i]);
        free(b[i].at);
    }
    rmdir(copy);
}

static void every_allocation_may_fail(void **state) {
    load_job job;
    (void)state;
    memset(&job, 0, sizeof job);
    job.path = golden_path("hf/meta-2");
    starve(&job.h, load_model_starved, &job, 7, "meta-2");
}

int main(void) {
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logits_are_those_of_the_reference),
        cmocka_unit_test(damaged_files_are_refused_or_read),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
