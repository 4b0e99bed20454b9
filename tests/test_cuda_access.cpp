/* The kernels of llm_cuda.cu use memory correctly: no races in shared memory, no misaligned access, no access before
   earlier kernels are done. tests/cuda_host/cuda_watch.h checks every access. Faulty kernels prove that it finds
   faults. */
#define LLM_CUDA
#include "llm.h"
#include "llm_cuda.cu"
#include "tests/tiny.h"

extern "C" {
#include "tests/common.h"
}

/* ---- Kernels with one fault each, except the first ---- */

enum { N = 64 };

static __global__ void fault_none(unsigned *memory, unsigned *out) {
    __shared__ unsigned shared[N];
    unsigned thread = threadIdx.x, constant = memory[thread];
    llm__cuda::llm__chip_let_next_start();
    llm__cuda::llm__chip_wait_for_previous();
    shared[thread] = constant + out[thread];
    __syncthreads();
    unsigned other = shared[N - 1 - thread];
    __syncwarp();
    shared[N - 1 - thread] = other + 1; /* only this thread has read this element */
    __syncthreads();
    out[thread] = shared[thread];
}

static __global__ void fault_race(unsigned *memory, unsigned *out) {
    __shared__ unsigned shared[N];
    llm__cuda::llm__chip_wait_for_previous();
    shared[threadIdx.x] = memory[threadIdx.x];
    out[threadIdx.x] = shared[(threadIdx.x + 32) % N]; /* written by the other warp; no barrier */
}

static __global__ void fault_race_in_warp(unsigned *memory, unsigned *out) {
    __shared__ unsigned shared[N];
    llm__cuda::llm__chip_wait_for_previous();
    shared[threadIdx.x] = memory[threadIdx.x];
    out[threadIdx.x] = shared[threadIdx.x ^ 1]; /* written by a neighbour; no __syncwarp */
}

static __global__ void fault_overwritten(unsigned *memory, unsigned *out) {
    __shared__ unsigned shared[N];
    llm__cuda::llm__chip_wait_for_previous();
    shared[threadIdx.x] = memory[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[N - 1 - threadIdx.x];
    shared[threadIdx.x] = 0; /* another thread may not have read it yet */
}

static __global__ void fault_early_read(unsigned *memory, unsigned *out) {
    unsigned early = out[threadIdx.x];
    llm__cuda::llm__chip_wait_for_previous();
    out[threadIdx.x] = early + memory[threadIdx.x];
}

static __global__ void fault_early_write(unsigned *memory, unsigned *out) {
    out[threadIdx.x] = memory[threadIdx.x];
    llm__cuda::llm__chip_wait_for_previous();
}

static __global__ void fault_no_wait(unsigned *memory, unsigned *out) {
    if (memory[threadIdx.x] == 1) out[threadIdx.x] = 1;
}

static __global__ void fault_alignment(unsigned *memory, unsigned *out) {
    llm__cuda::llm__chip_wait_for_previous();
    uint4 v = llm__cuda::llm__chip_load_once(memory + 1);
    out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

static __global__ void fault_prefetch(unsigned *memory, unsigned *out) {
    llm__cuda::llm__chip_prefetch(memory, 4 * N + 16);
    llm__cuda::llm__chip_wait_for_previous();
    out[threadIdx.x] = 0;
}

/* Runs fault_none and then `kernel`, which overlaps it. `device` holds the output. Returns the only fault, or "". */
static std::string fault_of(void (*kernel)(unsigned *, unsigned *), int device = 0) {
    llm__cuda::llm__queue queue = {};
    unsigned *memory = NULL, *out = NULL;
    assert_int_equal(cudaStreamCreateWithFlags(&queue.stream, cudaStreamNonBlocking), cudaSuccess);
    assert_int_equal(cudaMalloc((void **)&memory, N * sizeof(unsigned)), cudaSuccess);
    cuda_host_device = device;
    assert_int_equal(cudaMalloc((void **)&out, N * sizeof(unsigned)), cudaSuccess);
    cuda_host_device = 0;
    queue.can_overlap = true;
    cuda_host.keeps_faults = true;
    cuda_host.faults.clear();
    llm__queue_launch(&queue, llm__cuda::LLM__SERIAL, llm__cuda::LLM__KIND_NORM, dim3(1), N, fault_none, memory, out);
    llm__queue_launch(&queue, llm__cuda::LLM__OVERLAP, llm__cuda::LLM__KIND_NORM, dim3(1), N, kernel, memory, out);
    assert_int_equal(cudaStreamSynchronize(queue.stream), cudaSuccess);
    cuda_host.keeps_faults = false;
    cudaFree(memory);
    cudaFree(out);
    cudaStreamDestroy(queue.stream);
    assert_true(cuda_host.faults.size() <= 1);
    return cuda_host.faults.empty() ? "" : *cuda_host.faults.begin();
}

static void finds(void (*kernel)(unsigned *, unsigned *), const char *words) {
    std::string fault = fault_of(kernel);
    if (fault.find(words) == std::string::npos) fail_msg("found \"%s\" instead of \"%s\"", fault.c_str(), words);
}

static void test_faults_are_found(void **state) {
    (void)state;
    assert_string_equal(fault_of(fault_none).c_str(), "");
    finds(fault_race, "race");
    finds(fault_race_in_warp, "race");
    finds(fault_overwritten, "race");
    finds(fault_early_read, "reads an earlier kernel's output");
    finds(fault_early_write, "writes before");
    finds(fault_no_wait, "no block");
    finds(fault_alignment, "aligned");
    finds(fault_prefetch, "beyond");
    std::string fault = fault_of(fault_none, 1);
    if (fault.find("another device") == std::string::npos) fail_msg("found \"%s\"", fault.c_str());
    assert_int_equal(cudaDeviceEnablePeerAccess(1, 0), cudaErrorInvalidValue); /* device 1 does not exist */
    cuda_host.n_devices = 2;
    assert_int_equal(cudaDeviceEnablePeerAccess(1, 0), cudaSuccess);
    assert_string_equal(fault_of(fault_none, 1).c_str(), "");
    cuda_host_peers.clear();
    cuda_host.n_devices = 1;
}

/* ---- The kernels of llm_cuda.cu ---- */

/* The same specs as in test_cuda.cpp. */
static const tiny_spec MANY_GROUPS = {2, 64, 96, 12, 1, 32, 512, 43, 1, 30, 2};
static const tiny_spec WIDE_HEADS = {1, 96, 130, 2, 2, 136, 512, 43, 0, 0, 3};
static const tiny_spec LONG_HEADS = {2, 128, 300, 2, 1, 128, 512, 43, 0, 30, 6};
static const tiny_spec FOUR_BITS = {1, 96, 160, 6, 2, 32, 512, 43, 1, 3, 7};
static const tiny_spec EIGHT_BITS = {1, 160, 96, 5, 1, 32, 512, 43, 0, 8, 9};
static const tiny_spec PAIRS = {1, 301, 790, 5, 1, 68, 512, 43, 0, TINY_ALL_SPARSE, 11};

/* Runs a long pass, short passes of one and of several rows, a burst, and scoring. */
static void use(const tiny_spec *spec, llm_dtype dtype, llm_cuda_mode mode) {
    static llm_token tokens[300];
    static int seqs[300];
    const int sizes[] = {110, 1, 1, 9, 3};
    llm_model_desc model_desc = {};
    llm_context_desc desc = {};
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_generate_desc text = {};
    llm_sampler sampler = {};
    sampler.temperature = 0.8f;
    sampler.top_k = 20;
    sampler.top_p = 0.9f;
    sampler.min_p = 0.01f;
    sampler.seed = 3;
    sampler.n_drawn = 5;
    llm_error err;
    model_desc.dtype = dtype;
    model_desc.backend = llm_cuda_backend_mode(mode);
    model_desc.n_threads = 1;
    try_tiny(&model, spec, model_desc, &err);
    if (!model) fail_msg("%s", err.message);
    desc.n_ctx = 300;
    desc.n_seq = 3;
    desc.n_batch = 100;
    desc.n_logits = 100;
    if (llm_context_create(&ctx, model, &desc, &err)) fail_msg("%s", err.message);
    for (int size : sizes) {
        for (int i = 0; i < size; i++) tokens[i] = i * 7 % 290, seqs[i] = size > 100 ? i >= 90 : i * 3 / size;
        llm_batch batch = {size, tokens, seqs, NULL};
        if (llm_forward(ctx, &batch, &err)) fail_msg("%s", err.message);
    }
    text.tokens = tokens;
    text.n_tokens = 1;
    text.max_tokens = 2;
    text.ignore_end = true;
    text.sampler = &sampler;
    if (llm_generate(ctx, &text, NULL, &err)) fail_msg("%s", err.message);
    const llm_token *endings[] = {tokens + 10, tokens + 20};
    const int lengths[] = {7, 9};
    const llm_question question = {tokens, 12, 2, endings, lengths};
    double results[2];
    if (llm_score(ctx, &question, 1, NULL, results, NULL, &err)) fail_msg("%s", err.message);
    llm_context_free(ctx);
    llm_model_free(model);
}

static void test_kernels_have_no_faults(void **state) {
    (void)state;
    use(&TINY_ODD, LLM_DTYPE_BF16, LLM_CUDA_GRAPH);
    use(&MANY_GROUPS, LLM_DTYPE_F16, LLM_CUDA_FUSED);
    use(&EIGHT_BITS, LLM_DTYPE_INT8, LLM_CUDA_EAGER);
    use(&MANY_GROUPS, LLM_DTYPE_INT8, LLM_CUDA_GRAPH);
    use(&WIDE_HEADS, LLM_DTYPE_BF16, LLM_CUDA_GRAPH);
    use(&LONG_HEADS, LLM_DTYPE_BF16, LLM_CUDA_GRAPH);
    use(&FOUR_BITS, LLM_DTYPE_INT4, LLM_CUDA_GRAPH);
    use(&EIGHT_BITS, LLM_DTYPE_INT4, LLM_CUDA_GRAPH);
    use(&PAIRS, LLM_DTYPE_BF16, LLM_CUDA_GRAPH);
    use(&PAIRS, LLM_DTYPE_INT8, LLM_CUDA_GRAPH);
}

/* Ranks on separate GPUs, which exchange data in each other's memory: embeddings, short and long passes, logits. */
static void use_rank(int rank, llm_comm *tensor) {
    static const llm_token tokens[40] = {3, 1, 4, 1, 5, 9, 2, 6};
    llm_model_desc model_desc = {};
    llm_context_desc desc = {};
    llm_model *model = NULL;
    llm_context *ctx = NULL;
    llm_error err = {};
    model_desc.dtype = LLM_DTYPE_BF16;
    model_desc.backend = llm_cuda_backend();
    model_desc.n_threads = 1;
    model_desc.tensor = tensor;
    desc.n_ctx = 64;
    desc.n_batch = 40;
    llm_status status = try_tiny(&model, &TINY_ODD, model_desc, &err);
    if (!status) status = llm_context_create(&ctx, model, &desc, &err);
    for (int n : {20, 1, 1, 3}) {
        llm_batch batch = {n, tokens, NULL, NULL};
        if (!status) status = llm_forward(ctx, &batch, &err);
    }
    if (status) fprintf(stderr, "rank %d: %s\n", rank, err.message), abort();
    llm_context_free(ctx);
    llm_model_free(model);
    llm_comm_free(tensor);
}

static void test_ranks_have_no_faults(void **state) {
    llm_comm *comms[3];
    std::vector<std::thread> threads;
    (void)state;
    cuda_host.n_devices = 3;
    assert_int_equal(llm_comm_threads(comms, 3, NULL, NULL), LLM_OK);
    for (int i = 0; i < 3; i++) threads.emplace_back(use_rank, i, comms[i]);
    for (std::thread &thread : threads) thread.join();
    assert_false(cuda_host_peers.empty()); /* they did use each other's memory */
    cuda_host.n_devices = 1;
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_faults_are_found),
                                       cmocka_unit_test(test_kernels_have_no_faults),
                                       cmocka_unit_test(test_ranks_have_no_faults)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
