/* Models in Meta's format: logits compared with golden/meta.py, for one file and two, like Llama 2 and like Llama 3.1;
   several ranks; files that are truncated, changed, or do not belong together; failing allocations.
   Variants: asan */
#include "tests/check.h"
#define LLM_IMPLEMENTATION
#include "llm.h"
#include "tests/common.h"
#include "tests/ranks.h"

static void logits_are_those_of_the_reference(void **state) {
    static const char *const names[] = {"hf/meta-1", "hf/meta-2", "hf/meta-3"};
    (void)state;
    for (int k = 0; k < 3; k++) {
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

enum { N_TOKENS = 5, MOST_VOCAB = 700 };

typedef struct rank_job {
    const char *path;
    llm_dtype dtype;
    bool staged;                         /* a pipeline; else tensor parallel */
    float logits[N_TOKENS * MOST_VOCAB]; /* computed without ranks */
} rank_job;

/* Computes the logits of some tokens. Without ranks they are stored in the job; with ranks they must equal the stored
   ones. */
static void run_rank(llm_comm *comm, void *arg) {
    static const llm_token tokens[N_TOKENS] = {1, 5, 9, 3, 7};
    static const bool all[N_TOKENS] = {true, true, true, true, true};
    rank_job *job = (rank_job *)arg;
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_error err;
    llm_model_desc desc;
    llm_context_desc context;
    llm_batch batch = {N_TOKENS, tokens, NULL, all};
    memset(&desc, 0, sizeof desc);
    memset(&context, 0, sizeof context);
    desc.dtype = job->dtype;
    desc.n_threads = context.n_threads = 1;
    if (job->staged) desc.pipeline = comm;
    else desc.tensor = comm;
    context.n_logits = N_TOKENS;
    RANK_CHECK(llm_model_load(&model, job->path, &desc, &err) == LLM_OK, err.message);
    RANK_CHECK(llm_context_create(&ctx, model, &context, &err) == LLM_OK, err.message);
    RANK_CHECK(llm_forward(ctx, &batch, &err) == LLM_OK, err.message);
    const int n = llm_tokenizer_n_vocab(llm_model_tokenizer(model));
    for (int i = 0; i < N_TOKENS; i++)
        if (comm)
            RANK_CHECK(!memcmp(job->logits + i * n, llm_logits(ctx, i), (size_t)n * sizeof(float)),
                       "the logits have other bits");
        else memcpy(job->logits + i * n, llm_logits(ctx, i), (size_t)n * sizeof(float));
    llm_context_free(ctx);
    llm_model_free(model);
}

static void ranks_give_the_bits_of_one(void **state) {
    static const char *const names[] = {"hf/meta-1", "hf/meta-2", "hf/meta-3"};
    static rank_job job;
    (void)state;
    for (int k = 0; k < 3; k++)
        for (int type = 0; type < 4; type++) {
            static const llm_dtype dtypes[] = {LLM_DTYPE_DEFAULT, LLM_DTYPE_F32, LLM_DTYPE_INT8, LLM_DTYPE_F16};
            char path[1000];
            snprintf(path, sizeof path, "%s", golden_path(names[k]));
            job.path = path;
            job.dtype = dtypes[type];
            run_rank(NULL, &job);
            for (int staged = 0; staged < 2; staged++) {
                job.staged = staged != 0;
                on_ranks(2, NULL, run_rank, &job);
                if (!staged) on_ranks(3, NULL, run_rank, &job);
            }
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

/* Finds where the bytes of a storage begin in a file written by torch.save. */
static size_t find_storage(bytes file, const char *key) {
    char wanted[100];
    snprintf(wanted, sizeof wanted, "/data/%s", key);
    const size_t n = strlen(wanted);
    for (size_t at = 0; at + 30 < file.n; at++) {
        const uint8_t *p = file.at + at;
        const size_t n_name = p[26] + 256u * p[27], n_extra = p[28] + 256u * p[29];
        if (!memcmp(p, "PK\3\4", 4) && n_name >= n && !memcmp(p + 30 + n_name - n, wanted, n))
            return at + 30 + n_name + n_extra;
    }
    fail_msg("storage %s is missing", key);
    return 0;
}

/* Each file of a model has a copy of the norms. If the copies differ, the files do not belong together. */
static void norms_must_be_the_same_in_all_files(void **state) {
    static const char *const names[] = {"params.json", "tokenizer.model", "consolidated.00.pth", "consolidated.01.pth"};
    char file[1000], copy[] = "/tmp/llm-test-meta-XXXXXX", path[4][100];
    llm_model *model;
    llm_error err;
    (void)state;
    assert_non_null(mkdtemp(copy));
    for (int i = 0; i < 4; i++) {
        snprintf(file, sizeof file, "%s/%s", golden_path("hf/meta-2"), names[i]);
        snprintf(path[i], sizeof path[i], "%s/%s", copy, names[i]);
        bytes b = read_file(file);
        if (i == 3) b.at[find_storage(b, "1") + 6] ^= 1; /* the fourth number of norm.weight, the second tensor */
        write_file(path[i], b.at, b.n);
        free(b.at);
    }
    assert_int_equal(llm_model_load(&model, copy, NULL, &err), LLM_ERROR_FORMAT);
    assert_non_null(strstr(err.message, "tensor norm.weight has other numbers in consolidated.01.pth"));
    for (int i = 0; i < 4; i++) remove(path[i]);
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
        cmocka_unit_test(logits_are_those_of_the_reference), cmocka_unit_test(ranks_give_the_bits_of_one),
        cmocka_unit_test(damaged_files_are_refused_or_read), cmocka_unit_test(norms_must_be_the_same_in_all_files),
        cmocka_unit_test(every_allocation_may_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
