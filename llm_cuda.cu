/*  llm_cuda.cu - llm.h's models on an NVIDIA GPU.                                 MIT licence, at the end of this file

    Compile this file with nvcc, link it with your program and with cuBLAS, and name the backend when you load a model:

        nvcc -O3 -std=c++17 -arch=sm_90 -c llm_cuda.cu           link with -lcublas -lcudart -ldl

        #define LLM_CUDA
        #include "llm.h"
        llm_model_desc desc = {.backend = llm_cuda_backend()};

    It runs every architecture that llm.h runs and needs compute capability 8.0 (Ampere) or newer. Weights are bf16,
    f16, int8 or int4 in groups; of bf16 and int8 with 2:4 sparsity only half is held. The KV cache is bf16. The
    residual stream, sums, softmax and logits are f32. In a pass of up to 16 rows, the bits of a row's logits depend
    neither on the other rows nor on the number of ranks. They differ from the CPU's logits by about the rounding error
    of bf16.

    CONTENTS
        1 errors and launches    2 the chip's own instructions    3 parameters of kernels    4 fused products
        5 attention              6 picking tokens                 7 plain kernels            8 the model
        9 the context           10 forward pass                  11 bursts                  12 the backend
        7b meetings of ranks
*/
#ifndef LLM_CUDA
#define LLM_CUDA
#endif
#include "llm.h"

#include <chrono>
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <initializer_list>
#include <math.h>
#include <random>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <thread>
#include <unistd.h>

namespace llm__cuda { /* names here may equal names in llm.h, which may be compiled in the same source file */

/* ==== 1 Errors and launches =====================================================================================

   The result of every call is checked. Work for the GPU is queued on a context's stream. The queue keeps the first
   failure; after it, nothing more is launched, and the forward pass reports it at its end. */

static llm_status llm__cuda_error(llm_error *err, llm_status code, const char *format, ...) {
    if (!err) return code;
    va_list args;
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    err->code = code;
    return code;
}

static llm_status llm__cuda_check(cudaError_t result, const char *what, llm_error *err) {
    if (result == cudaSuccess) return LLM_OK;
    (void)cudaGetLastError(); /* otherwise the next launch would report this failure again */
    if (result == cudaErrorMemoryAllocation)
        return llm__cuda_error(err, LLM_ERROR_MEMORY, "the GPU is out of memory: %s", what);
    return llm__cuda_error(err, LLM_ERROR_DEVICE, "CUDA: %s failed: %s", what, cudaGetErrorString(result));
}

#define LLM__TRY(call)                                            \
    do {                                                          \
        llm_status status_ = llm__cuda_check((call), #call, err); \
        if (status_) return status_;                              \
    } while (0)

typedef struct llm__queue {
    cudaStream_t stream;
    cublasHandle_t blas;
    bool can_overlap;    /* a kernel may start while the one before it ends (programmatic dependent launch) */
    bool is_after_nccl;  /* the next kernel does not overlap: the one before it is NCCL's                   */
    unsigned left_out;   /* kinds of kernels that are not launched: a bit for each */
    cudaError_t failure; /* the first failure */
    cublasStatus_t blas_failure;
    const char *what; /* which failed */
    llm_error parted; /* why the other ranks cannot be reached; its code is LLM_OK while they can */
} llm__queue;

enum { LLM__SERIAL = 0, LLM__OVERLAP = 1 };

/* What a kernel does. A measurement can leave out those before LLM__KIND_READ, see llm__cuda_vary. */
typedef enum llm__kernel_kind {
    LLM__KIND_QKV,
    LLM__KIND_ROPE,
    LLM__KIND_ATTENTION,
    LLM__KIND_ATTENTION_OUT,
    LLM__KIND_GATE_UP,
    LLM__KIND_DOWN,
    LLM__KIND_HEAD,
    LLM__KIND_EMBED,
    LLM__KIND_PICK,
    LLM__KIND_NORM,
    LLM__KIND_WIDEN,
    LLM__KIND_SCALE,
    LLM__KIND_VALUES,
    LLM__KIND_SWIGLU,
    LLM__KIND_KEEP,
    LLM__KIND_SCORE,
    LLM__KIND_READ,
    LLM__KIND_FILL,
    LLM__KIND_MEET,
    LLM__KIND_CLEAR,
    LLM__KINDS
} llm__kernel_kind;

static const char *llm__kind_name(int kind) {
    static const char *const names[LLM__KINDS] = {"QKV",
                                                  "RoPE",
                                                  "attention",
                                                  "attention's output",
                                                  "gates and ups",
                                                  "down",
                                                  "the logits",
                                                  "the embedding",
                                                  "picking a token",
                                                  "a norm",
                                                  "widening weights",
                                                  "scaling sums",
                                                  "storing values",
                                                  "SwiGLU",
                                                  "keeping rows",
                                                  "scoring",
                                                  "reading all weights",
                                                  "filling with random numbers",
                                                  "a meeting of ranks",
                                                  "clearing the other ranks' share"};
    return names[kind];
}

static void llm__queue_note(llm__queue *queue, cudaError_t result, const char *what) {
    if (result == cudaSuccess || queue->failure != cudaSuccess) return;
    queue->failure = result;
    queue->what = what;
    (void)cudaGetLastError();
}

static bool llm__queue_failed(const llm__queue *queue) {
    return queue->failure != cudaSuccess || queue->blas_failure != CUBLAS_STATUS_SUCCESS || queue->parted.code;
}

/* All kernels are launched here. A grid without blocks is not launched: a rank may have no share of a matrix.

   A kernel launched with LLM__OVERLAP may start before earlier kernels are done. It must call
   llm__chip_wait_for_previous before it reads anything that a kernel of this pass has written, and before it writes
   anything. Before that it may read weights and llm__rows: they were complete before the pass's first kernel began,
   which is launched with LLM__SERIAL. A block may return without waiting if another block of its kernel always waits.
   If no block waited, the next kernel could begin too early. */
template <typename... Parameters, typename... Arguments>
static void llm__queue_launch_with(llm__queue *queue, int overlap, llm__kernel_kind kind, dim3 grid, int threads,
                                   size_t shared_bytes, void (*kernel)(Parameters...), Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    if (llm__queue_failed(queue) || queue->left_out >> kind & 1 || !grid.x || !grid.y || !grid.z) return;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = queue->stream;
    config.attrs = &attribute;
    config.numAttrs = overlap == LLM__OVERLAP && queue->can_overlap && !queue->is_after_nccl ? 1 : 0;
    queue->is_after_nccl = false;
    llm__queue_note(queue, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...),
                    llm__kind_name(kind));
}

/* The same for a kernel whose shared memory has the size that it declares. */
template <typename... Parameters, typename... Arguments>
static void llm__queue_launch(llm__queue *queue, int overlap, llm__kernel_kind kind, dim3 grid, int threads,
                              void (*kernel)(Parameters...), Arguments... arguments) {
    llm__queue_launch_with(queue, overlap, kind, grid, threads, 0, kernel, arguments...);
}

static llm_status llm__queue_status(llm__queue *queue, llm_error *err) {
    cudaError_t failure = queue->failure;
    cublasStatus_t blas_failure = queue->blas_failure;
    llm_error parted = queue->parted;
    queue->failure = cudaSuccess;
    queue->blas_failure = CUBLAS_STATUS_SUCCESS;
    queue->parted.code = LLM_OK;
    if (parted.code) return llm__cuda_error(err, parted.code, "%s", parted.message);
    if (blas_failure != CUBLAS_STATUS_SUCCESS)
        return llm__cuda_error(err, LLM_ERROR_DEVICE, "cuBLAS failed with status %d", (int)blas_failure);
    return llm__cuda_check(failure, queue->what, err);
}

/* ==== 2 The chip's own instructions =============================================================================

   Each function also has C code that does the same, for compilers that do not compile for a GPU. */

static __host__ __device__ int llm__min(int a, int b) { return a < b ? a : b; }
static __host__ __device__ int llm__divide_up(int a, int b) { return (a + b - 1) / b; }

/* Loads 16 bytes that are read once, bypassing the L1 cache. */
static __device__ uint4 llm__chip_load_once(const void *from) {
#ifdef __CUDA_ARCH__
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
#else
    return *(const uint4 *)from;
#endif
}

/* Prefetches `bytes` into the L2 cache. Both arguments are multiples of 16. */
static __device__ void llm__chip_prefetch(const void *from, unsigned bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#elif !defined(__CUDACC__)
    cuda_host_prefetch(from, bytes);
#else
    (void)from, (void)bytes;
#endif
}

/* The same for the 128 bytes around an address. */
static __device__ void llm__chip_prefetch_line(const void *at) {
#ifdef __CUDA_ARCH__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
    (void)at;
#endif
}

/* Starts copying the first `bytes` of 16 bytes to shared memory. The others become zero. The L1 cache has no part in
   it, neither its content nor its room. */
static __device__ void llm__chip_copy_16(void *to, const void *from, int bytes) {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(bytes)
                 : "memory");
#elif !defined(__CUDACC__)
    cuda_host_copy(to, from, bytes, 16);
#else
    (void)to, (void)from, (void)bytes;
#endif
}

/* The same for 8 bytes. */
static __device__ void llm__chip_copy_8(void *to, const void *from) {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from)
                 : "memory");
#elif !defined(__CUDACC__)
    cuda_host_copy(to, from, 8, 8);
#else
    (void)to, (void)from;
#endif
}

/* Makes a group of the copies that this thread has started since the last group. */
static __device__ void llm__chip_group_copies(void) {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif !defined(__CUDACC__)
    cuda_host_group_copies();
#endif
}

/* Waits until this thread's copies are done, but for those of the last N groups. */
template <int N> static __device__ void llm__chip_wait_for_copies(void) {
#ifdef __CUDA_ARCH__
    if (N == 0) asm volatile("cp.async.wait_all;" ::: "memory");
    else asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#elif !defined(__CUDACC__)
    cuda_host_wait_for_copies(N);
#endif
}

/* Adds 1 and returns the old count. A block that calls this later sees what this block wrote before its last
   barrier. */
static __device__ unsigned llm__chip_count_up(unsigned *at) {
#ifdef __CUDA_ARCH__
    unsigned before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
#else
    return atomicAdd(at, 1u);
#endif
}

/* Sets a word in any GPU's memory. A block that reads the value with llm__chip_get_flag also sees what this block wrote
   before its last barrier. */
static __device__ void llm__chip_set_flag(unsigned *at, unsigned value) {
#ifdef __CUDACC__
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
#else
    cuda_host_set_flag(at, value);
#endif
}

static __device__ unsigned llm__chip_get_flag(const unsigned *at) {
#ifdef __CUDACC__
    unsigned value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
    return value;
#else
    return cuda_host_get_flag(at);
#endif
}

/* A clock that all blocks share. */
static __device__ uint64_t llm__chip_nanoseconds(void) {
#ifdef __CUDACC__
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
#else
    return cuda_host_nanoseconds();
#endif
}

/* Waits until all earlier kernels in the stream are done and their results are visible. */
static __device__ void llm__chip_wait_for_previous(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#elif !defined(__CUDACC__)
    cuda_host_wait();
#endif
}

/* Allows the next kernel to begin as soon as there is room for it. */
static __device__ void llm__chip_let_next_start(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#ifdef __CUDACC__
/* sums = a * b + sums */
static __device__ void llm__chip_tensor_core(float sums[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
    /* Separate operands from the results, because the compiler may pass zeros for them. */
    float c0 = sums[0], c1 = sums[1], c2 = sums[2], c3 = sums[3];
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%10, %11, %12, %13};"
                 : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
#else
static __device__ float llm__chip_low(uint32_t pair) { return __uint_as_float(pair << 16); }
static __device__ float llm__chip_high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

static __device__ float llm__chip_dot_8(uint4 a, uint4 b) {
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
    float sum = 0;
    for (int i = 0; i < 4; i++)
        sum += llm__chip_low(left[i]) * llm__chip_low(right[i]) + llm__chip_high(left[i]) * llm__chip_high(right[i]);
    return sum;
}

typedef struct llm__factors {
    uint4 upper, lower, column;
} llm__factors;
#endif

/* A warp multiplies 16 rows by 8 columns over 32 values of k. Let g = lane / 4 and t = lane % 4. A lane passes k = 8t
   .. 8t+7 of row g (`upper`), of row g + 8 (`lower`) and of column g. It gets the sums of row g with columns 2t and
   2t+1, then those of row g + 8. In memory k is the fastest index of both factors, so each argument is one 16-byte
   load. (The tensor core numbers k in another order, but any order gives the right sums if it is the same for both
   factors.) */
static __device__ void llm__chip_multiply_32(float sums[4], uint4 upper, uint4 lower, uint4 column) {
#ifdef __CUDACC__
    llm__chip_tensor_core(sums, upper.x, lower.x, upper.y, lower.y, column.x, column.y);
    llm__chip_tensor_core(sums, upper.z, lower.z, upper.w, lower.w, column.z, column.w);
#else
    llm__factors own = {upper, lower, column};
    const llm__factors *lanes = cuda_host_warp(own);
    int lane = (int)threadIdx.x % 32, first = lane / 4 * 4, left = lane % 4 * 8, right = left + 4;
    for (int t = 0; t < 4; t++) {
        sums[0] += llm__chip_dot_8(lanes[first + t].upper, lanes[left + t].column);
        sums[1] += llm__chip_dot_8(lanes[first + t].upper, lanes[right + t].column);
        sums[2] += llm__chip_dot_8(lanes[first + t].lower, lanes[left + t].column);
        sums[3] += llm__chip_dot_8(lanes[first + t].lower, lanes[right + t].column);
    }
#endif
}

/* a + b of two pairs of bf16. Only used where the sums are exact. */
static __device__ uint32_t llm__chip_add_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return sum;
#else
    return __float_as_uint(llm__chip_low(a) + llm__chip_low(b)) >> 16 |
           __float_as_uint(llm__chip_high(a) + llm__chip_high(b));
#endif
}

/* (v & mask) | added, in one instruction; the compiler would use two, one for each constant. */
static __device__ uint32_t llm__chip_mask_and_add(uint32_t v, uint32_t mask, uint32_t added) {
#ifdef __CUDACC__
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(bits) : "r"(v), "r"(mask), "r"(added));
    return bits;
#else
    return (v & mask) | added;
#endif
}

/* The signed bytes at bits 0 and 16 of v as bf16. It makes 128 + the low seven bits, then subtracts 128, or 256 if the
   eighth bit is set. */
static __device__ uint32_t llm__chip_widen_2(uint32_t v) {
    return llm__chip_add_pairs(llm__chip_mask_and_add(v, 0x007F007Fu, 0x43004300u),
                               llm__chip_mask_and_add(v, 0x00800080u, 0xC300C300u));
}

/* Eight signed bytes as bf16. In memory the middle two of each four are swapped, see llm__chip_byte_place. */
static __device__ uint4 llm__chip_widen_8(uint32_t a, uint32_t b) {
    return make_uint4(llm__chip_widen_2(a), llm__chip_widen_2(a >> 8), llm__chip_widen_2(b), llm__chip_widen_2(b >> 8));
}

static __host__ __device__ int llm__chip_byte_place(int i) { return (i & ~3) | (i & 1) << 1 | (i >> 1 & 1); }

/* Four of the eight bytes of a (0 .. 3) and b (4 .. 7): the four low nibbles of `which` are their numbers. */
static __device__ uint32_t llm__chip_pick_bytes(uint32_t a, uint32_t b, uint32_t which) {
    uint32_t bytes = 0;
#ifdef __CUDACC__
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(which));
#else
    for (int i = 0; i < 4; i++) {
        uint32_t n = which >> 4 * i & 7;
        bytes |= ((n < 4 ? a : b) >> n % 4 * 8 & 0xFFu) << 8 * i;
    }
#endif
    return bytes;
}

/* Puts two of each four numbers (bf16) in their places, the others are zero. A word of `pairs` has the two of a four. A
   nibble of `patterns` says where they belong: 0 .. 5 are the places 01, 02, 03, 12, 13 and 23. `first` gets the fours
   of the first two words. */
static __device__ void llm__chip_spread_pairs(uint4 pairs, uint32_t patterns, uint4 *first, uint4 *second) {
    /* A byte for each four: which bytes of its pair its number 0 .. 3 consists of. 0x10 is the pair's first number,
       0x32 the second, 0x44 is zero. The constants have a byte for each pattern. */
    uint32_t n0 = llm__chip_pick_bytes(0x44101010u, 0x4444u, patterns),
             n1 = llm__chip_pick_bytes(0x10444432u, 0x4410u, patterns),
             n2 = llm__chip_pick_bytes(0x32443244u, 0x1044u, patterns),
             n3 = llm__chip_pick_bytes(0x44324444u, 0x3232u, patterns);
    first->x = llm__chip_pick_bytes(pairs.x, 0, llm__chip_pick_bytes(n0, n1, 0x40));
    first->y = llm__chip_pick_bytes(pairs.x, 0, llm__chip_pick_bytes(n2, n3, 0x40));
    first->z = llm__chip_pick_bytes(pairs.y, 0, llm__chip_pick_bytes(n0, n1, 0x51));
    first->w = llm__chip_pick_bytes(pairs.y, 0, llm__chip_pick_bytes(n2, n3, 0x51));
    second->x = llm__chip_pick_bytes(pairs.z, 0, llm__chip_pick_bytes(n0, n1, 0x62));
    second->y = llm__chip_pick_bytes(pairs.z, 0, llm__chip_pick_bytes(n2, n3, 0x62));
    second->z = llm__chip_pick_bytes(pairs.w, 0, llm__chip_pick_bytes(n0, n1, 0x73));
    second->w = llm__chip_pick_bytes(pairs.w, 0, llm__chip_pick_bytes(n2, n3, 0x73));
}

/* Eight numbers of four bits as bf16. Each is 128 too large, because the bits are put into the mantissa of 2^7. Nibbles
   i and i + 4 are neighbours in k. */
static __device__ uint4 llm__chip_widen_nibbles(uint32_t v) {
    const uint32_t mask = 0x000F000Fu, added = 0x43004300u;
    return make_uint4(llm__chip_mask_and_add(v, mask, added), llm__chip_mask_and_add(v >> 4, mask, added),
                      llm__chip_mask_and_add(v >> 8, mask, added), llm__chip_mask_and_add(v >> 12, mask, added));
}

/* The f16 in the low 16 bits as a float. It must be finite. */
static __device__ float llm__chip_half(uint32_t bits) {
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)bits));
    return x;
#else
    return __uint_as_float((bits & 0x7FFFu) << 13 | (bits & 0x8000u) << 16) * 0x1p112f;
#endif
}

/* Eight f16 w as pairs of bf16: w = high + low, exactly. `high` has the first eight binary digits, `low` the other
   three. */
typedef struct llm__chip_halves {
    uint4 high, low;
} llm__chip_halves;

static __device__ void llm__chip_split_2(uint32_t pair, uint32_t *high, uint32_t *low) {
    float a = llm__chip_half(pair & 0xFFFFu), b = llm__chip_half(pair >> 16);
    uint32_t a_high = __float_as_uint(a) & 0xFFFF0000u, b_high = __float_as_uint(b) & 0xFFFF0000u;
    *high = a_high >> 16 | b_high;
    *low = __float_as_uint(a - __uint_as_float(a_high)) >> 16 | __float_as_uint(b - __uint_as_float(b_high));
}

static __device__ llm__chip_halves llm__chip_split_8(uint4 v) {
    llm__chip_halves s;
    llm__chip_split_2(v.x, &s.high.x, &s.low.x);
    llm__chip_split_2(v.y, &s.high.y, &s.low.y);
    llm__chip_split_2(v.z, &s.high.z, &s.low.z);
    llm__chip_split_2(v.w, &s.high.w, &s.low.w);
    return s;
}

static __host__ __device__ uint16_t llm__chip_round_bits(uint32_t u) {
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(u >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

/* Two numbers as bf16, the first in the low half. */
static __device__ uint32_t llm__chip_pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return llm__chip_round_bits(__float_as_uint(low)) | (uint32_t)llm__chip_round_bits(__float_as_uint(high)) << 16;
#endif
}

static __device__ uint16_t llm__chip_to_bf16(float x) { return (uint16_t)llm__chip_pack_bf16(x, 0); }
static __device__ float llm__chip_from_bf16(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
static __device__ float llm__chip_silu(float x) { return x / (1.0f + expf(-x)); }

static __device__ float llm__chip_warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

static __device__ float llm__chip_warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

/* ==== 3 Parameters of kernels =================================================================================== */

enum {
    LLM__MAX_ROWS = 65535,  /* of a pass: the limit of a grid's second dimension                     */
    LLM__FUSED_ROWS = 16,   /* max rows of the fused kernels                                         */
    LLM__WARPS = 8,         /* of a block of a fused product; each has every eighth part of k        */
    LLM__SLOTS = 6,         /* of a warp, for turns of weights that are on their way */
    LLM__PAIRS = 8,         /* pairs of outputs in a tile of a fused product, see section 4          */
    LLM__ATTEND_WARPS = 4,  /* of a block of attention                                               */
    LLM__STEP = 64,         /* keys that a block of attention reads at a time                        */
    LLM__MIN_STEPS = 3,     /* min steps in a span: shorter ones are not worth joining               */
    LLM__MAX_SPANS = 64,    /* max spans into which the keys of one query are cut                    */
    LLM__MAX_GROUP = 32,    /* query heads that share a key head                                     */
    LLM__TILE_QUERIES = 64, /* queries in a tile of a long pass; a warp has 16                       */
    LLM__MAX_HEAD_DIM = 256,
    LLM__PAD = 128 /* rows of activations are padded to a multiple of this                  */
};

typedef enum llm__matrix_format {
    LLM__BF16,
    LLM__F16,
    LLM__INT8,        /* a scale for each output                                                       */
    LLM__INT8_GROUPS, /* scale and minimum for each 32 inputs of an output, as with LLM__INT4_GROUPS   */
    LLM__INT4_GROUPS,
    LLM__BF16_2_4, /* two of each four numbers of LLM__BF16, the others are zero                    */
    LLM__INT8_2_4, /* the same of LLM__INT8                                                         */
    LLM__FORMATS
} llm__matrix_format;

static __host__ __device__ constexpr bool llm__matrix_is_2_4(int format) { return format >= LLM__BF16_2_4; }
static __host__ __device__ constexpr bool llm__matrix_has_groups(int format) {
    return format == LLM__INT8_GROUPS || format == LLM__INT4_GROUPS;
}
static __host__ __device__ constexpr bool llm__matrix_has_row_scales(int format) {
    return format == LLM__INT8 || format == LLM__INT8_2_4;
}

/* [n][k] numbers. k is padded with zeros to whole turns of 64 bytes. In a turn, groups are stored as [t][group], so
   that each of four lanes (t) loads its inputs 8t .. 8t+7 of all groups as 16 bytes.

   A turn of a 2:4 matrix has the numbers of two turns of the same matrix with its zeros: turn 8 i + j those of 16 i + j
   and of 16 i + j + 8. So a warp multiplies the same numbers in the same order, see section 4. If there is no second
   turn, its half is zero. A lane's 16 bytes have pairs of numbers from the first turn, then from the second, and
   `places` has a nibble for each pair, see llm__chip_spread_pairs. */
typedef struct llm__gpu_matrix {
    llm__matrix_format format;
    uint8_t *data;
    uint8_t *places;  /* 2:4: [n][turns][4] nibbles of each of the four lanes' pairs, in the same memory as the data */
    uint32_t *scales; /* LLM__INT8: [n] floats; groups: [n][k / 32] pairs of f16, the scale in the low half */
    int n, k;
} llm__gpu_matrix;

/* Numbers in 64 bytes of a row. */
static __host__ __device__ constexpr int llm__matrix_turn(int format) {
    return format <= LLM__F16 ? 32 : format == LLM__INT4_GROUPS || format == LLM__INT8_2_4 ? 128 : 64;
}

/* Turns of a row. */
static __host__ __device__ constexpr int llm__matrix_turns(int format, int k) {
    int turn = llm__matrix_turn(format), n = 2 * k / turn;
    return !llm__matrix_is_2_4(format) ? k / turn : n / 16 * 8 + (n % 16 < 8 ? n % 16 : 8);
}

/* The first number of a turn. The other half of a turn of a 2:4 matrix begins four times llm__matrix_turn after it. */
static __host__ __device__ constexpr int llm__matrix_turn_start(int format, int turn) {
    return llm__matrix_is_2_4(format) ? (turn + turn / 8 * 8) * (llm__matrix_turn(format) / 2)
                                      : turn * llm__matrix_turn(format);
}

static __host__ __device__ size_t llm__matrix_row_bytes(llm__gpu_matrix m) {
    return (size_t)llm__matrix_turns(m.format, m.k) * 64;
}

/* Bytes of a row's places. */
static __host__ __device__ size_t llm__matrix_row_places(llm__gpu_matrix m) {
    int turn_bytes = m.format == LLM__INT8_2_4 ? 16 : m.format == LLM__BF16_2_4 ? 8 : 0;
    return (size_t)(llm__matrix_turns(m.format, m.k) * turn_bytes);
}

/* Which pair of a row of a 2:4 matrix has the numbers of a four. Fours 2i and 2i + 1 have neighbouring pairs. Pair i is
   numbers 2i and 2i + 1 of the row. */
static __host__ __device__ int llm__matrix_pair(int format, int four) {
    unsigned bits = format == LLM__BF16_2_4 ? 1 : 2, own = 1u << bits; /* a lane's fours of a turn with zeros */
    unsigned turn = (unsigned)four >> (bits + 2), lane = (unsigned)four >> bits & 3, i = (unsigned)four & (own - 1);
    return (int)((((turn / 16 * 8 + turn % 8) * 4 + lane) * 2 + turn / 8 % 2) * own + i);
}

static __host__ __device__ int llm__pad(int n, int step) { return (n + step - 1) / step * step; }

/* The distance from one row of a matrix's inputs to the next, in numbers. */
static __host__ __device__ int llm__matrix_input_stride(llm__gpu_matrix m) { return llm__pad(m.k, LLM__PAD); }

/* The position of inputs i .. i+7 in a row of a matrix in groups; i is a multiple of 8. */
static __host__ __device__ size_t llm__matrix_group_place(int format, int i) {
    int in_turn = i / 32 % (llm__matrix_turn(format) / 32), bytes = format == LLM__INT4_GROUPS ? 4 : 8;
    return (size_t)(i / llm__matrix_turn(format) * 64 + i % 32 / 8 * 16 + in_turn * bytes);
}

/* Describes the pass, in the GPU's memory. Kernels read it there, so one recorded graph works for all positions. */
typedef struct llm__rows {
    const int *counts; /* rows, rows with logits, query tiles                        */
    const int *tokens, *positions;
    const int *slots; /* which of the tables belongs to the row's sequence          */
    const int *logit_rows;
    const int *tile_first, *tile_rows; /* query tiles: neighbouring rows of one sequence */
    const int *tables;                 /* [slot][blocks_per_seq]                                     */
    int blocks_per_seq;
} llm__rows;

/* Block b of the KV cache is contiguous: [layer][keys, values][head]. The keys of a head are [position][dimension], its
   values [dimension][position]. Both have their dimensions padded to `stride`. So for scores and for weighted sums, k
   is the fastest index of the factors. */
typedef struct llm__kv {
    uint16_t *data;
    size_t block_size; /* in elements */
    int n_heads, stride;
} llm__kv;

static __device__ uint16_t *llm__cache_keys(llm__kv kv, int block, int layer, int head) {
    return kv.data + (size_t)block * kv.block_size +
           ((size_t)layer * 2 * kv.n_heads + head) * LLM_CACHE_BLOCK * kv.stride;
}

static __device__ uint16_t *llm__cache_values(llm__kv kv, int block, int layer, int head) {
    return llm__cache_keys(kv, block, layer, kv.n_heads + head);
}

/* The block table of a row's sequence. It must be read with __ldcg, bypassing the L1 cache, like all of llm__rows:
   a kernel may read them before it waits. */
static __device__ const int *llm__rows_table(llm__rows rows, int row) {
    return rows.tables + (size_t)__ldcg(rows.slots + row) * rows.blocks_per_seq;
}

/* Where and how queries, keys and values of the rows are stored for attention. */
typedef struct llm__qkv_store {
    llm__kv kv;
    uint16_t *q;                  /* [rows][n_heads][kv.stride] */
    const float *cosines, *sines; /* [rows][rope_dim / 2] */
    int n_heads, head_dim, rope_dim, layer;
    int tiles;                    /* tiles of a fused product in a head                                         */
    const float *bias;            /* [(n_heads + 2 kv.n_heads) * head_dim]; NULL: none                          */
    const float *q_norm, *k_norm; /* [head_dim]; NULL: heads have no RMSNorm                                    */
    float eps;
} llm__qkv_store;

/* The place of a row's key and value in the KV cache: a block, and a position in it. */
typedef struct llm__cell {
    int block, place;
} llm__cell;

static __device__ llm__cell llm__rows_cell(llm__rows rows, int row) {
    int position = __ldcg(rows.positions + row);
    llm__cell cell = {__ldcg(llm__rows_table(rows, row) + position / LLM_CACHE_BLOCK), position % LLM_CACHE_BLOCK};
    return cell;
}

static __device__ void llm__store_dim(const llm__qkv_store &s, llm__cell cell, int row, int head, int dim,
                                      float value) {
    uint16_t bits = llm__chip_to_bf16(value);
    if (head < s.n_heads) {
        s.q[((size_t)row * s.n_heads + head) * s.kv.stride + dim] = bits;
        return;
    }
    head -= s.n_heads;
    if (head < s.kv.n_heads)
        llm__cache_keys(s.kv, cell.block, s.layer, head)[(size_t)cell.place * s.kv.stride + dim] = bits;
    else llm__cache_values(s.kv, cell.block, s.layer, head - s.kv.n_heads)[dim * LLM_CACHE_BLOCK + cell.place] = bits;
}

/* The dimensions of a head form pairs: first those that RoPE rotates together, then the others, two neighbours each. */
static __device__ int llm__store_pair_dim(int pair, int rope_dim, int second) {
    int half = rope_dim / 2;
    return pair < half ? pair + second * half : 2 * pair + second;
}

/* The cosine and sine of the angle by which RoPE rotates a pair; 1 and 0 if it does not rotate it. */
typedef struct llm__turn_by {
    float cosine, sine;
} llm__turn_by;

static __device__ llm__turn_by llm__store_find_turn(const llm__qkv_store &s, int row, int head, int pair) {
    int half = s.rope_dim / 2;
    llm__turn_by turn = {1, 0};
    if (pair < half && head < s.n_heads + s.kv.n_heads) {
        turn.cosine = s.cosines[row * half + pair];
        turn.sine = s.sines[row * half + pair];
    }
    return turn;
}

static __device__ void llm__store_pair(const llm__qkv_store &s, llm__cell cell, llm__turn_by turn, int row, int head,
                                       int pair, float a, float b) {
    int first = llm__store_pair_dim(pair, s.rope_dim, 0), second = llm__store_pair_dim(pair, s.rope_dim, 1);
    if (first < s.head_dim) llm__store_dim(s, cell, row, head, first, a * turn.cosine - b * turn.sine);
    if (second < s.head_dim) llm__store_dim(s, cell, row, head, second, a * turn.sine + b * turn.cosine);
}

/* ==== 4 Fused products ==========================================================================================

   Up to 16 rows are multiplied by a weight matrix, as the columns of a tensor-core product. The matrix is read once,
   and the operations after the product are done at its end. The time limit is the matrix's bytes over the memory's
   bandwidth.

   A tile is 16 outputs, as 8 pairs (a, b). One thread gets both sums of a pair: the two dimensions that RoPE rotates
   together, a gate and its up, or two neighbours. A block computes tiles blockIdx.x, blockIdx.x + gridDim.x, ...; the
   GPU holds all blocks at once. The 8 warps of a block take k in turns of 64 bytes, so a block reads 512 bytes of each
   of 16 rows at a time. A warp copies its weights to its own slots of shared memory, several turns before it multiplies
   them. The copies never stop: the last turns of a tile start those of the next tile, which arrive while this tile's
   sums are added up. The first copies start before the earlier kernels are done. (Loads into registers were slower:
   fewer fit, and on their way they need room in the L1 cache, which shared memory is cut from.)

   The inputs are kept in shared memory too, if they fit. A warp reads each of them once for a tile, so the L1 cache
   would not help, and while weights arrive at full speed, a load from the L2 cache takes about 1 us.

   A row's sums are added in the same order for any number of rows. int8 is widened in registers, exactly; each output
   has a scale, which is applied to its sum. f16 is split into two bf16 in registers, and each part is multiplied by the
   inputs. For weights in groups the tensor core multiplies the integers by 32 inputs at a time, and also a matrix of
   ones by the same inputs: sum += scale * (q . x) + minimum * (1 . x).

   The numbers of a 2:4 matrix get their zeros back in registers, and a warp multiplies the same numbers in the same
   order as those of the matrix with its zeros. So the sums are the same bits. (A zero is 0 even if it was -0. That
   changes no sum, since all sums begin with 0.) The tensor core could multiply them as they are, but in another order.

   RMSNorm is fused, too. The kernel that writes the residual stream x also writes bf16(x * norm weight), which the next
   product reads, and the sum of squares of its 16 outputs. That product divides its results by the root of their
   mean. */

typedef enum llm__product_ending {
    LLM__QKV,
    LLM__PLAIN,
    LLM__RESIDUAL,
    LLM__SWIGLU,
    LLM__LOGITS,
    LLM__ENDINGS
} llm__product_ending;

typedef struct llm__product {
    llm__rows rows;
    llm__gpu_matrix weight;
    int n, n_tiles;       /* outputs (LLM__SWIGLU: n_ff), and tiles of 16                      */
    int count;            /* index into rows.counts of the number of columns                   */
    const int *gather;    /* the rows of x that are the columns; NULL: the first ones          */
    int n_held;           /* inputs for which a block has shared memory                        */
    const uint16_t *x;    /* [rows][llm__matrix_input_stride(weight)]                                 */
    const float *squares; /* [rows][n_squares] sums of squares of the residual stream          */
    int n_squares, n_embd;
    float eps;
    llm__qkv_store store; /* LLM__QKV                                                          */
    /* Where the first output goes. Rows are longer than n if other ranks have outputs, too. */
    float *residual;        /* LLM__RESIDUAL: [rows][n_embd]; then, for the product after this one: */
    const float *next_norm; /* [n]                                                               */
    uint16_t *next_x;       /* [rows][next_stride]; with LLM__SWIGLU the products of the pairs   */
    int next_stride;
    float *next_squares; /* [rows][n_squares]                                                 */
    float *out;          /* LLM__PLAIN, LLM__LOGITS: [columns][out_stride]                    */
    int out_stride;
} llm__product;

/* The first or second output of a pair of a tile; -1: there is none. */
template <int ENDING> static __device__ int llm__product_output(const llm__product &p, int tile, int pair, int second) {
    if (ENDING == LLM__QKV) {
        int tiles = p.store.tiles;
        int dim = llm__store_pair_dim(tile % tiles * LLM__PAIRS + pair, p.store.rope_dim, second);
        return dim < p.store.head_dim ? tile / tiles * p.store.head_dim + dim : -1;
    }
    if (ENDING == LLM__SWIGLU) {
        int i = tile * LLM__PAIRS + pair;
        return i < p.n ? i + second * p.n : -1;
    }
    int i = (tile * 2 + second) * LLM__PAIRS + pair;
    return i < p.n ? i : -1;
}

/* The numbers that the end of a tile needs for a pair of a column. Their loads start before the barrier, so they have
   arrived after it. */
typedef struct llm__end_inputs {
    float scale_a, scale_b; /* LLM__INT8: of the two outputs                                  */
    float add_a, add_b;     /* LLM__RESIDUAL: the residual stream; LLM__QKV: the bias         */
    float norm_a, norm_b;   /* LLM__RESIDUAL: the next norm's weights                         */
    llm__turn_by turn;      /* LLM__QKV                                                       */
} llm__end_inputs;

template <int ENDING, int FORMAT>
static __device__ llm__end_inputs llm__product_load_end(const llm__product &p, int tile, int column, int pair) {
    llm__end_inputs in = {1, 1, 0, 0, 0, 0, {1, 0}};
    int a = llm__product_output<ENDING>(p, tile, pair, 0), b = llm__product_output<ENDING>(p, tile, pair, 1);
    if (llm__matrix_has_row_scales(FORMAT)) {
        if (a >= 0) in.scale_a = __uint_as_float(p.weight.scales[a]);
        if (b >= 0) in.scale_b = __uint_as_float(p.weight.scales[b]);
    }
    if (ENDING == LLM__RESIDUAL) {
        const float *residual = p.residual + (size_t)column * p.n_embd;
        if (a >= 0) in.add_a = residual[a], in.norm_a = p.next_norm[a];
        if (b >= 0) in.add_b = residual[b], in.norm_b = p.next_norm[b];
    }
    if (ENDING == LLM__QKV) {
        int tiles = p.store.tiles;
        if (p.store.bias && a >= 0) in.add_a = p.store.bias[a];
        if (p.store.bias && b >= 0) in.add_b = p.store.bias[b];
        in.turn = llm__store_find_turn(p.store, column, tile / tiles, tile % tiles * LLM__PAIRS + pair);
    }
    return in;
}

/* Adds to the residual stream, and computes the next product's inputs. Eight neighbouring threads have the pairs of a
   row. */
static __device__ void llm__product_end_residual(const llm__product &p, const llm__end_inputs &in, int tile, int row,
                                                 bool wanted, int pair, float sum_a, float sum_b) {
    int a = llm__product_output<LLM__RESIDUAL>(p, tile, pair, 0),
        b = llm__product_output<LLM__RESIDUAL>(p, tile, pair, 1);
    float x_a = a < 0 ? 0 : in.add_a + sum_a, x_b = b < 0 ? 0 : in.add_b + sum_b, square = x_a * x_a + x_b * x_b;
    for (int step = 4; step; step /= 2) square += __shfl_xor_sync(0xFFFFFFFFu, square, step);
    if (!wanted) return;
    if (a >= 0) p.residual[(size_t)row * p.n_embd + a] = x_a;
    if (b >= 0) p.residual[(size_t)row * p.n_embd + b] = x_b;
    if (a >= 0) p.next_x[(size_t)row * p.next_stride + a] = llm__chip_to_bf16(x_a * in.norm_a);
    if (b >= 0) p.next_x[(size_t)row * p.next_stride + b] = llm__chip_to_bf16(x_b * in.norm_b);
    if (pair == 0) p.next_squares[(size_t)row * p.n_squares + tile] = square;
}

/* The operation after a product, for the sums of a pair of a tile and one column. Whole warps call this. */
template <int ENDING>
static __device__ void llm__product_end_tile(const llm__product &p, const llm__end_inputs &in, llm__cell cell, int tile,
                                             int column, bool wanted, int pair, float scale, float sum_a, float sum_b) {
    sum_a *= in.scale_a;
    sum_b *= in.scale_b;
    if (ENDING == LLM__RESIDUAL) {
        llm__product_end_residual(p, in, tile, column, wanted, pair, sum_a, sum_b);
        return;
    }
    if (!wanted) return;
    sum_a *= scale;
    sum_b *= scale;
    int a = llm__product_output<ENDING>(p, tile, pair, 0), b = llm__product_output<ENDING>(p, tile, pair, 1);
    if (ENDING == LLM__QKV) {
        int tiles = p.store.tiles;
        if (a >= 0)
            llm__store_pair(p.store, cell, in.turn, column, tile / tiles, tile % tiles * LLM__PAIRS + pair,
                            sum_a + in.add_a, sum_b + in.add_b);
    } else if (ENDING == LLM__SWIGLU) {
        if (a >= 0) p.next_x[(size_t)column * p.next_stride + a] = llm__chip_to_bf16(llm__chip_silu(sum_a) * sum_b);
    } else {
        if (a >= 0) p.out[(size_t)column * p.out_stride + a] = sum_a;
        if (b >= 0) p.out[(size_t)column * p.out_stride + b] = sum_b;
    }
}

/* 1 / sqrt(mean(x^2) + eps) of a row, by one warp. */
static __device__ float llm__product_inverse_norm(const llm__product &p, int row) {
    float sum = 0;
    for (int i = (int)threadIdx.x % 32; i < p.n_squares; i += 32) sum += p.squares[(size_t)row * p.n_squares + i];
    return 1.0f / sqrtf(llm__chip_warp_sum(sum) / (float)p.n_embd + p.eps);
}

/* The same as llm__product_multiply_turn, for weights in groups. Nibbles are 128 too large; that is subtracted again in
   f32. */
template <int FORMAT>
static __device__ void llm__product_multiply_groups(float sums[4], uint4 upper, uint4 lower, uint4 upper_scales,
                                                    uint4 lower_scales, const uint16_t *x) {
    constexpr float excess = FORMAT == LLM__INT4_GROUPS ? 128 : 0;
    const uint32_t a[4] = {upper.x, upper.y, upper.z, upper.w}, b[4] = {lower.x, lower.y, lower.z, lower.w};
    const uint32_t a_scales[4] = {upper_scales.x, upper_scales.y, upper_scales.z, upper_scales.w};
    const uint32_t b_scales[4] = {lower_scales.x, lower_scales.y, lower_scales.z, lower_scales.w};
    const uint4 ones = make_uint4(0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u);
#pragma unroll
    for (int j = 0; j < llm__matrix_turn(FORMAT) / 32; j++) {
        uint4 column = *(const uint4 *)(x + 32 * j);
        float dots[4] = {}, totals[4] = {};
        if (FORMAT == LLM__INT4_GROUPS)
            llm__chip_multiply_32(dots, llm__chip_widen_nibbles(a[j]), llm__chip_widen_nibbles(b[j]), column);
        else
            llm__chip_multiply_32(dots, llm__chip_widen_8(a[2 * j % 4], a[2 * j % 4 + 1]),
                                  llm__chip_widen_8(b[2 * j % 4], b[2 * j % 4 + 1]), column);
        llm__chip_multiply_32(totals, ones, ones, column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t d = i < 2 ? a_scales[j] : b_scales[j];
            sums[i] = fmaf(llm__chip_half(d), dots[i],
                           fmaf(llm__chip_half(d >> 16) - excess * llm__chip_half(d), totals[i], sums[i]));
        }
    }
}

/* Adds the products of one turn to the sums. A lane has 16 bytes of each of its two rows of the matrix, and the inputs
   for them. */
template <int FORMAT>
static __device__ void llm__product_multiply_turn(float sums[4], uint4 upper, uint4 lower, uint4 upper_scales,
                                                  uint4 lower_scales, const uint16_t *x) {
    if (FORMAT == LLM__BF16) {
        llm__chip_multiply_32(sums, upper, lower, *(const uint4 *)x);
    } else if (FORMAT == LLM__F16) {
        llm__chip_halves a = llm__chip_split_8(upper), b = llm__chip_split_8(lower);
        llm__chip_multiply_32(sums, a.high, b.high, *(const uint4 *)x);
        llm__chip_multiply_32(sums, a.low, b.low, *(const uint4 *)x);
    } else if (FORMAT == LLM__INT8) {
        llm__chip_multiply_32(sums, llm__chip_widen_8(upper.x, upper.y), llm__chip_widen_8(lower.x, lower.y),
                              *(const uint4 *)x);
        llm__chip_multiply_32(sums, llm__chip_widen_8(upper.z, upper.w), llm__chip_widen_8(lower.z, lower.w),
                              *(const uint4 *)(x + 8));
    } else {
        llm__product_multiply_groups<FORMAT>(sums, upper, lower, upper_scales, lower_scales, x);
    }
}

/* The same for 2:4. The numbers are spread out, so the tensor core gets what it gets of the matrix with its zeros.
   `x` are the inputs of the first half, `x_second` those of the second half, NULL if there is none. */
template <int FORMAT>
static __device__ void llm__product_multiply_2_4(float sums[4], uint4 upper, uint4 lower, uint32_t upper_places,
                                                 uint32_t lower_places, const uint16_t *x, const uint16_t *x_second) {
    uint4 a, b, a_next, b_next;
    if (FORMAT == LLM__BF16_2_4) {
        llm__chip_spread_pairs(upper, upper_places, &a, &a_next);
        llm__chip_spread_pairs(lower, lower_places, &b, &b_next);
        llm__chip_multiply_32(sums, a, b, *(const uint4 *)x);
        if (x_second) llm__chip_multiply_32(sums, a_next, b_next, *(const uint4 *)x_second);
        return;
    }
    llm__chip_spread_pairs(llm__chip_widen_8(upper.x, upper.y), upper_places, &a, &a_next);
    llm__chip_spread_pairs(llm__chip_widen_8(lower.x, lower.y), lower_places, &b, &b_next);
    llm__chip_multiply_32(sums, a, b, *(const uint4 *)x);
    llm__chip_multiply_32(sums, a_next, b_next, *(const uint4 *)(x + 8));
    if (!x_second) return;
    llm__chip_spread_pairs(llm__chip_widen_8(upper.z, upper.w), upper_places >> 16, &a, &a_next);
    llm__chip_spread_pairs(llm__chip_widen_8(lower.z, lower.w), lower_places >> 16, &b, &b_next);
    llm__chip_multiply_32(sums, a, b, *(const uint4 *)x_second);
    llm__chip_multiply_32(sums, a_next, b_next, *(const uint4 *)(x_second + 8));
}

/* Bytes of a warp's slot: a turn's numbers, [2][lane], and the scales or places of its 16 rows. */
static __host__ __device__ constexpr int llm__product_slot_bytes(int format) {
    return 1024 + (format == LLM__INT4_GROUPS || format == LLM__INT8_2_4   ? 256
                   : format == LLM__INT8_GROUPS || format == LLM__BF16_2_4 ? 128
                                                                           : 0);
}

/* The nibbles for the pairs in 16 bytes of a slot. */
template <int FORMAT> static __device__ uint32_t llm__product_get_places(const uint4 *slot, int i) {
    if (FORMAT == LLM__INT8_2_4) return ((const uint32_t *)(slot + 64))[i];
    return ((const uint16_t *)(slot + 64))[i];
}

/* The shared memory of a block, before the warps' slots and the inputs. */
template <int COLUMNS> struct alignas(16) llm__product_memory {
    float parts[2][LLM__WARPS][COLUMNS][20], scales[COLUMNS]; /* 20: warps write without bank conflicts */
    llm__cell cells[COLUMNS];
};

#ifdef __CUDACC__
extern __shared__ uint4 llm__block_memory[]; /* of the size with which a kernel is launched */
#else
alignas(16) __shared__ uint8_t llm__block_memory[227 << 10];
#endif

/* Where a tile's rows g and g + 8 begin, in turns. For an output that does not exist, the first row is used; the result
   is dropped. */
typedef struct llm__matrix_tile_rows {
    unsigned upper, lower;
} llm__matrix_tile_rows;

template <int ENDING>
static __device__ llm__matrix_tile_rows llm__product_find_rows(const llm__product &p, int tile, int pair, int n_turns) {
    int a = llm__product_output<ENDING>(p, tile, pair, 0), b = llm__product_output<ENDING>(p, tile, pair, 1);
    llm__matrix_tile_rows rows = {(unsigned)(a < 0 ? 0 : a) * (unsigned)n_turns,
                                  (unsigned)(b < 0 ? 0 : b) * (unsigned)n_turns};
    return rows;
}

/* What a warp copies next: a turn of the tile of which it has the rows. */
typedef struct llm__fetch {
    llm__matrix_tile_rows rows;
    int tile, turn;
} llm__fetch;

/* Starts copying a warp's next turn to a slot. The copies of a call are a group, even if there is nothing left. */
template <int ENDING, int FORMAT>
static __device__ void llm__product_fetch_turn(const llm__product &p, int n_turns, llm__fetch *fetch, uint4 *slot) {
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4;
    if (fetch->tile < p.n_tiles && fetch->turn < n_turns) {
        size_t upper = fetch->rows.upper + (unsigned)fetch->turn, lower = fetch->rows.lower + (unsigned)fetch->turn;
        llm__chip_copy_16(slot + lane, p.weight.data + upper * 64 + 16 * t, 16);
        llm__chip_copy_16(slot + 32 + lane, p.weight.data + lower * 64 + 16 * t, 16);
        if (FORMAT == LLM__INT4_GROUPS && t < 2)
            llm__chip_copy_16(slot + 64 + 8 * t + g, p.weight.scales + (t ? lower : upper) * 4, 16);
        if (FORMAT == LLM__INT8_GROUPS && t < 2)
            llm__chip_copy_8((uint2 *)(slot + 64) + 8 * t + g, p.weight.scales + (t ? lower : upper) * 2);
        if (FORMAT == LLM__INT8_2_4 && t < 2)
            llm__chip_copy_16(slot + 64 + 8 * t + g, p.weight.places + (t ? lower : upper) * 16, 16);
        if (FORMAT == LLM__BF16_2_4 && t < 2)
            llm__chip_copy_8((uint2 *)(slot + 64) + 8 * t + g, p.weight.places + (t ? lower : upper) * 8);
    }
    llm__chip_group_copies();
    fetch->turn += LLM__WARPS;
    if (fetch->turn < n_turns) return;
    fetch->turn = warp;
    fetch->tile += (int)gridDim.x;
    if (fetch->tile < p.n_tiles) fetch->rows = llm__product_find_rows<ENDING>(p, fetch->tile, g, n_turns);
}

/* Prefetches what the ends of this block's first 16 tiles need from memory that no kernel writes. A thread has a row of
   a tile. */
template <int ENDING, int FORMAT> static __device__ void llm__product_prefetch_ends(const llm__product &p) {
    int row = (int)threadIdx.x % 16, tile = (int)(blockIdx.x + threadIdx.x / 16 * gridDim.x);
    int output = tile < p.n_tiles ? llm__product_output<ENDING>(p, tile, row % 8, row / 8) : -1;
    if (output < 0) return;
    if (llm__matrix_has_row_scales(FORMAT)) llm__chip_prefetch_line(p.weight.scales + output);
    if (ENDING == LLM__RESIDUAL) llm__chip_prefetch_line(p.next_norm + output);
    if (ENDING == LLM__QKV && p.store.bias) llm__chip_prefetch_line(p.store.bias + output);
}

/* Copies the inputs of all columns to shared memory. 32 more inputs a column: no bank conflicts, and with int8 few. */
static __device__ void llm__product_hold_inputs(const llm__product &p, int n_columns, uint16_t *held) {
    for (int column = 0; column < n_columns; column++) {
        size_t row = (size_t)(p.gather ? __ldcg(p.gather + column) : column);
        const uint16_t *from = p.x + row * (size_t)llm__matrix_input_stride(p.weight);
        uint16_t *to = held + column * (p.weight.k + 32);
#pragma unroll 4
        for (int i = (int)threadIdx.x * 8; i < p.weight.k; i += LLM__WARPS * 32 * 8)
            *(uint4 *)(to + i) = __ldcg((const uint4 *)(from + i));
    }
}

/* The most blocks of a fused product that a multiprocessor holds at once, for their registers. Their shared memory may
   leave room for fewer. */
static __host__ __device__ constexpr int llm__product_blocks_per_processor(int format, int tiles) {
    return llm__matrix_has_groups(format) || tiles == 2 ? 2 : 3;
}

/* The kernel of a fused product, for TILES * 8 columns. */
template <int ENDING, int TILES, int FORMAT>
static __global__ void __launch_bounds__(LLM__WARPS * 32, llm__product_blocks_per_processor(FORMAT, TILES))
    llm__fused_product(llm__product p) {
    constexpr bool GROUPS = llm__matrix_has_groups(FORMAT), IS_2_4 = llm__matrix_is_2_4(FORMAT);
    constexpr int COLUMNS = TILES * 8, TURN = llm__matrix_turn(FORMAT), SLOT = llm__product_slot_bytes(FORMAT) / 16;
    llm__product_memory<COLUMNS> *m = (llm__product_memory<COLUMNS> *)llm__block_memory;
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4,
        n_turns = llm__matrix_turns(FORMAT, p.weight.k);
    uint4 *slots = (uint4 *)(m + 1) + warp * LLM__SLOTS * SLOT;
    uint16_t *held = (uint16_t *)((uint4 *)(m + 1) + LLM__WARPS * LLM__SLOTS * SLOT);
    int n_columns = __ldcg(p.rows.counts + p.count), tile = (int)blockIdx.x;
    if (ENDING == LLM__LOGITS && n_columns == 0) { /* a pass without logits does not read the head */
        llm__chip_let_next_start();
        llm__chip_wait_for_previous();
        return;
    }
    llm__fetch fetch = {llm__product_find_rows<ENDING>(p, tile, g, n_turns), tile, warp};
#pragma unroll 1
    for (int i = 0; i < LLM__SLOTS - 1; i++)
        llm__product_fetch_turn<ENDING, FORMAT>(p, n_turns, &fetch, slots + i * SLOT);
    llm__chip_let_next_start();
    llm__product_prefetch_ends<ENDING, FORMAT>(p);
    if (ENDING == LLM__QKV && (int)threadIdx.x < n_columns)
        m->cells[threadIdx.x] = llm__rows_cell(p.rows, (int)threadIdx.x);
    llm__chip_wait_for_previous();
    bool holds = p.n_held > 0;
    if (holds) llm__product_hold_inputs(p, n_columns, held);
    if (ENDING != LLM__RESIDUAL)
        for (int column = warp; column < n_columns; column += LLM__WARPS) {
            float scale = llm__product_inverse_norm(p, p.gather ? __ldcg(p.gather + column) : column);
            if (lane == 0) m->scales[column] = scale;
        }
    const uint16_t *x = holds ? held : p.x;
    unsigned x_at[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        int column = 8 * j + g < n_columns
                         ? 8 * j + g
                         : 0; /* columns that do not exist repeat the first one; the end of a tile skips them */
        unsigned row = (unsigned)(holds || !p.gather ? column : __ldcg(p.gather + column));
        x_at[j] = row * (unsigned)(holds ? p.weight.k + 32 : llm__matrix_input_stride(p.weight)) +
                  (GROUPS ? 8u : TURN / (IS_2_4 ? 8u : 4u)) * (unsigned)t;
    }
    __syncthreads();
    for (int round = 0, at = 0; tile < p.n_tiles; round ^= 1, tile += (int)gridDim.x) {
        float sums[TILES][4] = {};
#pragma unroll 1
        for (int turn = warp; turn < n_turns; turn += LLM__WARPS) {
            const uint4 *slot = slots + at * SLOT;
            llm__chip_wait_for_copies<LLM__SLOTS - 2>();
            if (GROUPS || IS_2_4) __syncwarp(); /* the scales or places were copied by other lanes */
            /* To the slot of the turn before, of which no lane needs anything any more. */
            llm__product_fetch_turn<ENDING, FORMAT>(p, n_turns, &fetch, slots + (at ? at - 1 : LLM__SLOTS - 1) * SLOT);
            at = at == LLM__SLOTS - 1 ? 0 : at + 1;
            uint4 upper_scales = make_uint4(0, 0, 0, 0), lower_scales = upper_scales;
            if (FORMAT == LLM__INT4_GROUPS) upper_scales = slot[64 + g], lower_scales = slot[72 + g];
            if (FORMAT == LLM__INT8_GROUPS) {
                uint2 a = ((const uint2 *)(slot + 64))[g], b = ((const uint2 *)(slot + 64))[8 + g];
                upper_scales = make_uint4(a.x, a.y, 0, 0);
                lower_scales = make_uint4(b.x, b.y, 0, 0);
            }
            int start = llm__matrix_turn_start(FORMAT, turn);
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                const uint16_t *inputs = x + (x_at[j] + (unsigned)start);
                if constexpr (IS_2_4)
                    llm__product_multiply_2_4<FORMAT>(sums[j], slot[lane], slot[32 + lane],
                                                      llm__product_get_places<FORMAT>(slot, lane),
                                                      llm__product_get_places<FORMAT>(slot, 32 + lane), inputs,
                                                      start + 4 * TURN < p.weight.k ? inputs + 4 * TURN : NULL);
                else
                    llm__product_multiply_turn<FORMAT>(sums[j], slot[lane], slot[32 + lane], upper_scales, lower_scales,
                                                       inputs);
            }
        }
#pragma unroll
        for (int j = 0; j < TILES; j++)
            for (int i = 0; i < 4; i++) m->parts[round][warp][8 * j + 2 * t + i % 2][g + i / 2 * 8] = sums[j][i];
        int column = (int)threadIdx.x / LLM__PAIRS, pair = (int)threadIdx.x % LLM__PAIRS;
        bool wanted = column < n_columns, ends = column < COLUMNS; /* whole warps end the tile */
        llm__end_inputs end = {};
        if (wanted) end = llm__product_load_end<ENDING, FORMAT>(p, tile, column, pair);
        /* The only barrier of a tile: the half of `parts` that is read now is written again after the next barrier. */
        __syncthreads();
        if (ends) {
            float sum_a = 0, sum_b = 0;
#pragma unroll
            for (int i = 0; i < LLM__WARPS; i++) {
                sum_a += m->parts[round][i][column][pair];
                sum_b += m->parts[round][i][column][pair + 8];
            }
            llm__product_end_tile<ENDING>(p, end, m->cells[column], tile, column, wanted, pair, m->scales[column],
                                          sum_a, sum_b);
        }
    }
}

typedef struct llm__start {
    llm__rows rows;
    llm__gpu_matrix embedding; /* of this rank's tokens, from first_token on; none on a later stage, which gets x */
    int first_token;
    const double *frequencies;
    float *cosines, *sines, rope_scale;
    int n_embd, half;
    bool is_given;          /* x and the squares came from the previous stage */
    float *x;               /* [rows][n_embd] */
    const float *next_norm; /* as of llm__product; NULL in the plain pass */
    uint16_t *next_x;
    int next_stride;
    float *next_squares;
} llm__start;

/* Cosines and sines of the angles by which RoPE rotates a row. In double, because positions are large. */
static __device__ void llm__embed_find_angles(const llm__start &s, int row) {
    for (int i = (int)threadIdx.x; i < s.half; i += (int)blockDim.x) {
        double sine, cosine;
        sincos(s.rows.positions[row] * s.frequencies[i], &sine, &cosine);
        s.cosines[row * s.half + i] = (float)cosine * s.rope_scale;
        s.sines[row * s.half + i] = (float)sine * s.rope_scale;
    }
}

/* One weight as a float. */
static __device__ float llm__matrix_element(llm__gpu_matrix m, int row, int i) {
    const uint8_t *from = m.data + row * llm__matrix_row_bytes(m);
    if (m.format == LLM__BF16) return llm__chip_from_bf16(((const uint16_t *)from)[i]);
    if (m.format == LLM__F16) return llm__chip_half(((const uint16_t *)from)[i]);
    if (m.format == LLM__INT8)
        return (float)((const int8_t *)from)[llm__chip_byte_place(i)] * __uint_as_float(m.scales[row]);
    if (llm__matrix_is_2_4(m.format)) {
        int pair = llm__matrix_pair(m.format, i / 4), at = 2 * pair;
        int pattern = m.places[row * llm__matrix_row_places(m) + (size_t)(pair / 2)] >> pair % 2 * 4 & 15;
        int first = pattern / 3 + pattern / 5; /* its places, see llm__chip_spread_pairs */
        int second = pattern < 3 ? pattern + 1 : pattern - first;
        if (i % 4 != first && i % 4 != second) return 0;
        if (i % 4 == second) at++;
        if (m.format == LLM__BF16_2_4) return llm__chip_from_bf16(((const uint16_t *)from)[at]);
        return (float)((const int8_t *)from)[llm__chip_byte_place(at)] * __uint_as_float(m.scales[row]);
    }
    const uint8_t *eight = from + llm__matrix_group_place(m.format, i / 8 * 8);
    uint32_t d = m.scales[(size_t)row * (m.k / 32) + i / 32];
    int q = m.format == LLM__INT8_GROUPS ? ((const int8_t *)eight)[llm__chip_byte_place(i % 8)]
                                         : (int)(*(const uint32_t *)eight >> (i % 8 / 2 * 4 + i % 2 * 16) & 15);
    return (float)q * llm__chip_half(d) + llm__chip_half(d >> 16);
}

/* The first kernel of a pass: one block per row. It is launched with LLM__SERIAL, so it needs no wait. It skips tokens
   whose embedding another rank has; these rows are exchanged later. */
static __global__ void llm__embed(llm__start s) {
    int row = (int)blockIdx.x, n_squares = (s.n_embd + 15) / 16;
    llm__chip_let_next_start();
    if (row >= s.rows.counts[0]) return;
    llm__embed_find_angles(s, row);
    int token = s.rows.tokens[row] - s.first_token;
    if (!s.is_given && (token < 0 || token >= s.embedding.n)) return;
    for (int i = (int)threadIdx.x; i < n_squares; i += (int)blockDim.x) {
        float square = 0;
        for (int j = 16 * i; j < 16 * i + 16 && j < s.n_embd; j++) {
            float *at = s.x + (size_t)row * s.n_embd + j,
                  x = s.is_given ? *at : llm__matrix_element(s.embedding, token, j);
            if (!s.is_given) *at = x;
            square += x * x;
            if (s.next_norm) s.next_x[(size_t)row * s.next_stride + j] = llm__chip_to_bf16(x * s.next_norm[j]);
        }
        if (s.next_norm && !s.is_given) s.next_squares[(size_t)row * n_squares + i] = square;
    }
}

/* ==== 5 Attention ===============================================================================================

   Scores and the weighted sum of values are tensor-core products. The softmax is updated after each step of keys
   (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, 2205.14135). There are two kernels: for few queries
   (up to 16 rows) and for many.

   Few: a block has the queries of one row that share a key head, as columns. Scores are keys times queries, the answer
   is values times weights. The row's keys are cut into spans; a block computes one of them ("flash-decoding"), and the
   last block to finish joins them in order. The length of a span depends only on the row's own position, so a row's
   answer does not depend on other rows. The time limit is the bytes of the keys and values, and in short contexts the
   latency of memory: all loads of a step are in flight at once.

   Many: a block has a tile of up to 64 queries of one sequence that share a key head, 16 for each warp. Queries are the
   rows of the products and keys the columns. So a warp has its weights already in the registers in which the second
   product needs them (Dao 2023, arXiv:2307.08691). Keys and values are copied through shared memory; one is copied
   while the other is used. */

typedef struct llm__attn_run {
    llm__rows rows;
    llm__kv kv;
    const uint16_t *q; /* [rows][n_heads][kv.stride]                                    */
    uint16_t *out;     /* [rows][out_stride]                                            */
    int out_stride, n_heads, head_dim, layer;
    int group;     /* query heads that share a key head                             */
    int skipped;   /* query heads of the first key head that another rank has       */
    int window;    /* positions a query sees, its own included; 0: all before it    */
    float scale;   /* of scores: log2(e) / sqrt(head_dim)                           */
    int max_spans; /* max spans into which a row's keys are cut                     */
    float
        *partial; /* [row][key head][LLM__MAX_SPANS][group][kv.stride + 2]: the answer of a span, its maximum and sum */
    unsigned *n_done; /* [row][key head] spans that are done; zero between kernels     */
} llm__attn_run;

/* Returns true if this rank has query head `in_group` of the block's key head. */
static __device__ bool llm__attend_has(const llm__attn_run &a, int in_group) {
    int head = (int)blockIdx.y * a.group + in_group - a.skipped;
    return in_group < a.group && head >= 0 && head < a.n_heads;
}

/* The first key that a query at this position sees. */
static __device__ int llm__attend_first_key(const llm__attn_run &a, int position) {
    return a.window && position >= a.window ? position - a.window + 1 : 0;
}

/* ---- Few queries ---- */

/* The shared memory of a block. While spans are joined, `scores` holds the weights of the spans. */
template <int COLUMNS> struct llm__span_memory {
    float scores[COLUMNS][LLM__STEP + 4]; /* 4 and 32: no bank conflicts */
    alignas(16) uint16_t weights[COLUMNS][LLM__STEP + 32];
    float max[COLUMNS], sum[COLUMNS], shrink[COLUMNS];
    bool is_last;
};

/* The keys that a row's query sees, cut into spans. */
typedef struct llm__spans {
    int first_key, first_step, n_keys; /* keys [first_key, n_keys); a step's first key is a multiple of LLM__STEP */
    int n, length;                     /* spans, and keys of each                                                 */
} llm__spans;

static __device__ llm__spans llm__attend_cut_spans(const llm__attn_run &a, int row) {
    llm__spans spans;
    spans.n_keys = __ldcg(a.rows.positions + row) + 1;
    spans.first_key = llm__attend_first_key(a, spans.n_keys - 1);
    spans.first_step = spans.first_key / LLM__STEP * LLM__STEP;
    int n_steps = llm__divide_up(spans.n_keys - spans.first_step, LLM__STEP),
        steps = llm__divide_up(n_steps, a.max_spans);
    if (steps < LLM__MIN_STEPS) steps = LLM__MIN_STEPS;
    spans.n = llm__divide_up(n_steps, steps);
    spans.length = steps * LLM__STEP;
    return spans;
}

/* Prefetches a step's keys and values: for each cache block one thread for the keys, one for the values. Lines that are
   being written do no harm, because all multiprocessors share the L2 cache. */
static __device__ void llm__attend_prefetch_step(const llm__attn_run &a, const int *table, int key, int end) {
    int thread = (int)threadIdx.x, block = thread / 2 * LLM_CACHE_BLOCK, head = (int)blockIdx.y;
    if (thread >= 2 * LLM__STEP / LLM_CACHE_BLOCK || key + block >= end) return;
    const uint16_t *from = llm__cache_keys(a.kv, __ldcg(table + (key + block) / LLM_CACHE_BLOCK), a.layer,
                                           thread % 2 ? a.kv.n_heads + head : head);
    llm__chip_prefetch(from, (unsigned)(LLM_CACHE_BLOCK * a.kv.stride) * 2);
}

/* The cache blocks of a step: that of the warp's 16 keys, and all, for the values; 0 after the last one. They are found
   a step ahead, because that takes as long as loading the keys. */
typedef struct llm__step_blocks {
    int own, all[LLM__STEP / LLM_CACHE_BLOCK];
} llm__step_blocks;

static __device__ llm__step_blocks llm__attend_find_blocks(const int *table, int key, int end) {
    llm__step_blocks blocks;
    int own = key + 16 * ((int)threadIdx.x / 32);
    blocks.own = own < end ? __ldcg(table + own / LLM_CACHE_BLOCK) : 0;
#pragma unroll
    for (int i = 0; i < LLM__STEP / LLM_CACHE_BLOCK; i++)
        blocks.all[i] = key + i * LLM_CACHE_BLOCK < end ? __ldcg(table + key / LLM_CACHE_BLOCK + i) : 0;
    return blocks;
}

/* The operands that a warp loads in a step: all dimensions of 16 keys, and for 64 positions every fourth group of 16
   dimensions of the values. A head has up to DIMS * 64 dimensions. */
template <int DIMS> struct llm__step_loads {
    uint4 upper_keys[2 * DIMS], lower_keys[2 * DIMS], upper_values[LLM__STEP / LLM_CACHE_BLOCK][DIMS],
        lower_values[LLM__STEP / LLM_CACHE_BLOCK][DIMS];
};

/* The first n of eight numbers, the others zero. */
static __device__ uint4 llm__attend_first_of_8(uint4 v, int n) {
    v.x &= n > 1 ? 0xFFFFFFFFu : n > 0 ? 0xFFFFu : 0;
    v.y &= n > 3 ? 0xFFFFFFFFu : n > 2 ? 0xFFFFu : 0;
    v.z &= n > 5 ? 0xFFFFFFFFu : n > 4 ? 0xFFFFu : 0;
    v.w &= n > 7 ? 0xFFFFFFFFu : n > 6 ? 0xFFFFu : 0;
    return v;
}

template <int DIMS>
static __device__ void llm__attend_load_step(const llm__attn_run &a, const llm__step_blocks &blocks, int key, int end,
                                             llm__step_loads<DIMS> *loads) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4, head = (int)blockIdx.y;
    const uint4 zeros = make_uint4(0, 0, 0, 0);
    int own = key + 16 * warp;
    const uint16_t *keys =
        llm__cache_keys(a.kv, blocks.own, a.layer, head) + (size_t)(own % LLM_CACHE_BLOCK + g) * a.kv.stride + 8 * t;
#pragma unroll
    for (int i = 0; i < 2 * DIMS; i++) {
        bool there = own < end && 32 * i < a.kv.stride;
        loads->upper_keys[i] = there ? *(const uint4 *)(keys + 32 * i) : zeros;
        loads->lower_keys[i] = there ? *(const uint4 *)(keys + 8 * a.kv.stride + 32 * i) : zeros;
    }
#pragma unroll
    for (int block = 0; block < LLM__STEP / LLM_CACHE_BLOCK; block++) {
        bool has_block = key + block * LLM_CACHE_BLOCK < end;
        const uint16_t *values =
            llm__cache_values(a.kv, blocks.all[block], a.layer, head) + g * LLM_CACHE_BLOCK + 8 * t;
#pragma unroll
        for (int d = 0; d < DIMS; d++) {
            int dim = 16 * (warp + d * LLM__ATTEND_WARPS);
            bool there = has_block && dim < a.kv.stride;
            loads->upper_values[block][d] = there ? *(const uint4 *)(values + dim * LLM_CACHE_BLOCK) : zeros;
            loads->lower_values[block][d] = there ? *(const uint4 *)(values + (dim + 8) * LLM_CACHE_BLOCK) : zeros;
        }
    }
}

/* The scores of a warp's 16 keys, which begin at `key`. */
template <int COLUMNS, int DIMS>
static __device__ void llm__attend_score(const llm__attn_run &a, llm__span_memory<COLUMNS> *m,
                                         const llm__step_loads<DIMS> &loads, int row, int key, llm__spans spans) {
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4, place = (int)threadIdx.x / 32 * 16;
    float sums[COLUMNS / 8][4] = {};
#pragma unroll
    for (int i = 0; i < 2 * DIMS; i++) {
        if (32 * i >= a.kv.stride) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
            int column = 8 * j + g;
            const uint16_t *q =
                a.q + (ptrdiff_t)(row * a.n_heads + (int)blockIdx.y * a.group + column - a.skipped) * a.kv.stride +
                32 * i + 8 * t;
            llm__chip_multiply_32(sums[j], loads.upper_keys[i], loads.lower_keys[i],
                                  llm__attend_has(a, column) ? *(const uint4 *)q : make_uint4(0, 0, 0, 0));
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
        for (int i = 0; i < 4; i++) {
            int at = key + g + i / 2 * 8;
            bool seen = at >= spans.first_key && at < spans.n_keys;
            m->scores[8 * j + 2 * t + i % 2][place + g + i / 2 * 8] = seen ? sums[j][i] * a.scale : -INFINITY;
        }
}

/* Turns scores into weights 2^(score - max). A warp has every fourth column. */
template <int COLUMNS> static __device__ void llm__attend_weigh(llm__span_memory<COLUMNS> *m, int n_columns) {
    int lane = (int)threadIdx.x % 32;
    for (int column = (int)threadIdx.x / 32; column < n_columns; column += LLM__ATTEND_WARPS) {
        float x = m->scores[column][lane], y = m->scores[column][lane + 32], old = m->max[column];
        float max = llm__chip_warp_max(fmaxf(fmaxf(x, y), old));
        float base = max == -INFINITY ? 0 : max; /* no key was seen so far: all weights are 0 */
        x = exp2f(x - base);
        y = exp2f(y - base);
        float sum = llm__chip_warp_sum(x + y), shrink = exp2f(old - base);
        m->weights[column][lane] = llm__chip_to_bf16(x);
        m->weights[column][lane + 32] = llm__chip_to_bf16(y);
        __syncwarp();
        if (lane) continue;
        m->max[column] = max;
        m->sum[column] = m->sum[column] * shrink + sum;
        m->shrink[column] = shrink;
    }
}

/* answer = answer * shrink + values * weights. Positions after the last key may hold anything, even NaN; they count as
   zero. */
template <int COLUMNS, int DIMS>
static __device__ void llm__attend_gather(const llm__attn_run &a, const llm__span_memory<COLUMNS> *m,
                                          llm__step_loads<DIMS> &loads, int n_keys,
                                          float answer[DIMS][COLUMNS / 8][4]) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
        for (int i = 0; i < 4; i++)
            for (int d = 0; d < DIMS; d++) answer[d][j][i] *= m->shrink[8 * j + 2 * t + i % 2];
    if (n_keys < LLM__STEP) {
#pragma unroll
        for (int block = 0; block < LLM__STEP / LLM_CACHE_BLOCK; block++)
#pragma unroll
            for (int d = 0; d < DIMS; d++) {
                int n = n_keys - block * LLM_CACHE_BLOCK - 8 * t;
                loads.upper_values[block][d] = llm__attend_first_of_8(loads.upper_values[block][d], n);
                loads.lower_values[block][d] = llm__attend_first_of_8(loads.lower_values[block][d], n);
            }
    }
#pragma unroll
    for (int block = 0; block < LLM__STEP / LLM_CACHE_BLOCK; block++)
#pragma unroll
        for (int d = 0; d < DIMS; d++) {
            if (16 * (warp + d * LLM__ATTEND_WARPS) >= a.kv.stride) continue;
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++)
                llm__chip_multiply_32(answer[d][j], loads.upper_values[block][d], loads.lower_values[block][d],
                                      *(const uint4 *)&m->weights[8 * j + g][block * LLM_CACHE_BLOCK + 8 * t]);
        }
}

static __device__ float *llm__attend_partial(const llm__attn_run &a, int row, int span, int in_group) {
    return a.partial + ((((size_t)row * a.kv.n_heads + blockIdx.y) * LLM__MAX_SPANS + span) * a.group + in_group) *
                           (a.kv.stride + 2);
}

static __device__ uint16_t *llm__attend_answer(const llm__attn_run &a, int row, int in_group) {
    return a.out + (ptrdiff_t)row * a.out_stride + ((int)blockIdx.y * a.group + in_group - a.skipped) * a.head_dim;
}

/* Writes the answer of a row's span to a.out if it is the only span, otherwise to a.partial. `blocks` are those of the
   span's first step. */
template <int COLUMNS, int DIMS>
static __device__ void llm__attend_span(const llm__attn_run &a, llm__span_memory<COLUMNS> *m, int row, const int *table,
                                        llm__spans spans, int span, llm__step_blocks blocks) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int begin = spans.first_step + span * spans.length, end = llm__min(begin + spans.length, spans.n_keys);
    constexpr bool AHEAD = DIMS <= 2; /* larger heads leave no registers for the next step's blocks */
    float answer[DIMS][COLUMNS / 8][4] = {};
    for (int i = (int)threadIdx.x; i < COLUMNS; i += (int)blockDim.x) {
        m->max[i] = -INFINITY;
        m->sum[i] = 0;
        m->shrink[i] = 0;
        for (int j = 0; i >= a.group && j < LLM__STEP; j++) m->weights[i][j] = 0;
    }
    __syncthreads();
    for (int key = begin; key < end; key += LLM__STEP) {
        llm__step_loads<DIMS> loads;
        llm__attend_prefetch_step(a, table, key + LLM__STEP, end);
        if (!AHEAD) blocks = llm__attend_find_blocks(table, key, end);
        llm__attend_load_step<DIMS>(a, blocks, key, end, &loads);
        if (AHEAD) blocks = llm__attend_find_blocks(table, key + LLM__STEP, end);
        llm__attend_score<COLUMNS, DIMS>(a, m, loads, row, key + 16 * warp, spans);
        __syncthreads();
        llm__attend_weigh<COLUMNS>(m, a.group);
        __syncthreads();
        llm__attend_gather<COLUMNS, DIMS>(a, m, loads, end - key, answer);
    }
#pragma unroll
    for (int d = 0; d < DIMS; d++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
            for (int i = 0; i < 4; i++) {
                int dim = 16 * (warp + d * LLM__ATTEND_WARPS) + g + i / 2 * 8, column = 8 * j + 2 * t + i % 2;
                if (dim >= a.head_dim || !llm__attend_has(a, column)) continue;
                if (spans.n == 1)
                    llm__attend_answer(a, row, column)[dim] = llm__chip_to_bf16(answer[d][j][i] / m->sum[column]);
                else llm__attend_partial(a, row, span, column)[dim] = answer[d][j][i];
            }
    if (spans.n > 1 && (int)threadIdx.x < a.group) {
        float *stats = llm__attend_partial(a, row, span, (int)threadIdx.x) + a.kv.stride;
        stats[0] = m->max[threadIdx.x];
        stats[1] = m->sum[threadIdx.x];
    }
    __syncthreads();
}

/* Joins the spans of one row, in order. First a warp per query computes the weights of the spans, then a thread per
   dimension adds them up. */
template <int COLUMNS>
static __device__ void llm__attend_join_spans(const llm__attn_run &a, llm__span_memory<COLUMNS> *m, int row,
                                              int n_spans) {
    int lane = (int)threadIdx.x % 32;
    for (int in_group = (int)threadIdx.x / 32; in_group < a.group; in_group += LLM__ATTEND_WARPS) {
        float max[2], sum[2], weight[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int span = lane + 32 * i;
            const float *stats = llm__attend_partial(a, row, span, in_group) + a.kv.stride;
            max[i] = span < n_spans ? __ldcg(stats) : -INFINITY;
            sum[i] = span < n_spans ? __ldcg(stats + 1) : 0;
        }
        float most = llm__chip_warp_max(fmaxf(max[0], max[1]));
        for (int i = 0; i < 2; i++) weight[i] = exp2f(max[i] - most);
        float all = llm__chip_warp_sum(weight[0] * sum[0] + weight[1] * sum[1]);
        for (int i = 0; i < 2; i++) m->scores[in_group][lane + 32 * i] = weight[i] / all;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < a.group * a.head_dim; i += (int)blockDim.x) {
        int in_group = i / a.head_dim, dim = i % a.head_dim;
        if (!llm__attend_has(a, in_group)) continue;
        size_t step = (size_t)a.group * (a.kv.stride + 2);
        const float *from = llm__attend_partial(a, row, 0, in_group) + dim;
        float answer = 0;
#pragma unroll 8
        for (int span = 0; span < n_spans; span++) answer += __ldcg(from + span * step) * m->scores[in_group][span];
        llm__attend_answer(a, row, in_group)[dim] = llm__chip_to_bf16(answer);
    }
}

/* Grid: blocks that share the spans; key heads; rows. DIMS * 64 dimensions. */
template <int COLUMNS, int DIMS>
static __global__ void __launch_bounds__(LLM__ATTEND_WARPS * 32, COLUMNS == 8 && DIMS <= 2 ? 4 : 2)
    llm__fused_attention(llm__attn_run a) {
    __shared__ llm__span_memory<COLUMNS> m;
    int row = (int)blockIdx.z;
    llm__chip_let_next_start();
    if (row >= __ldcg(a.rows.counts)) return; /* need not wait, because the first block of row 0 always does */
    llm__spans spans = llm__attend_cut_spans(a, row);
    const int *table = llm__rows_table(a.rows, row);
    int first = spans.first_step + (int)blockIdx.x * spans.length;
    if ((int)blockIdx.x >= spans.n) return;
    llm__step_blocks blocks = llm__attend_find_blocks(table, first, spans.n_keys);
    llm__attend_prefetch_step(a, table, first, llm__min(first + spans.length, spans.n_keys));
    llm__chip_wait_for_previous();
    for (int span = (int)blockIdx.x; span < spans.n; span += (int)gridDim.x) {
        unsigned *n_done = &a.n_done[row * a.kv.n_heads + (int)blockIdx.y];
        if (span != (int)blockIdx.x)
            blocks = llm__attend_find_blocks(table, spans.first_step + span * spans.length, spans.n_keys);
        llm__attend_span<COLUMNS, DIMS>(a, &m, row, table, spans, span, blocks);
        if (spans.n == 1) return;
        if (threadIdx.x == 0) m.is_last = llm__chip_count_up(n_done) + 1 == (unsigned)spans.n;
        __syncthreads();
        if (!m.is_last) continue; /* the next span has a barrier before it writes is_last again */
        llm__attend_join_spans<COLUMNS>(a, &m, row, spans.n);
        if (threadIdx.x == 0) *n_done = 0;
        return;
    }
}

/* ---- Many queries ---- */

/* The place of a piece of 16 bytes in a row. In rows of 128 bytes and more, the pieces of odd rows change places. So
   the lanes of a warp have no bank conflicts when they read four pieces of each of eight rows. */
static __device__ int llm__attend_swizzle(int row, int piece, int pieces) {
    return row * pieces + (pieces >= 8 ? piece ^ (row & 1) << 2 : piece);
}

/* A step's keys [KEYS][CHUNKS * 32] and values [CHUNKS * 32][KEYS] in shared memory. */
template <int CHUNKS, int KEYS> struct llm__tile_memory { uint4 keys[KEYS * CHUNKS * 4], values[KEYS * CHUNKS * 4]; };

/* Starts copying the keys of a step from `key` on. Keys after the row's last block become zero. */
template <int CHUNKS, int KEYS>
static __device__ void llm__attend_copy_keys(const llm__attn_run &a, uint4 *to, const int *table, int key, int end) {
    constexpr int PIECES = CHUNKS * 4, ROWS = LLM__ATTEND_WARPS * 32 / PIECES; /* rows copied at a time */
    int row = (int)threadIdx.x / PIECES, piece = (int)threadIdx.x % PIECES;
#pragma unroll
    for (int block = 0; block < KEYS / LLM_CACHE_BLOCK; block++) {
        bool there = key + block * LLM_CACHE_BLOCK < end && 8 * piece < a.kv.stride;
        const uint16_t *from =
            llm__cache_keys(a.kv, there ? table[key / LLM_CACHE_BLOCK + block] : 0, a.layer, (int)blockIdx.y);
        if (there) from += row * a.kv.stride + 8 * piece;
#pragma unroll
        for (int i = 0; i < LLM_CACHE_BLOCK; i += ROWS)
            llm__chip_copy_16(&to[llm__attend_swizzle(row, piece, PIECES) + (block * LLM_CACHE_BLOCK + i) * PIECES],
                              from + (there ? i * a.kv.stride : 0), there ? 16 : 0);
    }
}

/* The same for the values. Positions after the last key may hold anything, even NaN; they become zero. */
template <int CHUNKS, int KEYS>
static __device__ void llm__attend_copy_values(const llm__attn_run &a, uint4 *to, const int *table, int key, int end) {
    constexpr int PIECES = KEYS / 8, DIMS = LLM__ATTEND_WARPS * 32 / PIECES; /* dimensions copied at a time */
    int dim = (int)threadIdx.x / PIECES, piece = (int)threadIdx.x % PIECES, n = llm__min(end - key - 8 * piece, 8);
    const uint16_t *from =
        llm__cache_values(a.kv, n > 0 ? table[(key + 8 * piece) / LLM_CACHE_BLOCK] : 0, a.layer, (int)blockIdx.y);
    if (n > 0) from += dim * LLM_CACHE_BLOCK + 8 * piece % LLM_CACHE_BLOCK;
#pragma unroll
    for (int i = 0; i < CHUNKS * 32; i += DIMS) {
        bool there = n > 0 && dim + i < a.kv.stride;
        llm__chip_copy_16(&to[llm__attend_swizzle(dim, piece, PIECES) + i * PIECES],
                          from + (there ? i * LLM_CACHE_BLOCK : 0), there ? 2 * n : 0);
    }
}

/* The state that a lane keeps for two of its warp's 16 queries, g and g + 8 (index 0 and 1): the softmax so far, and
   the keys that they see. */
typedef struct llm__query_pair {
    float max[2], sum[2];
    int last_key[2]; /* the last key that it sees; -1: there is no such query */
} llm__query_pair;

/* Turns scores into weights, in place, and adds up the weights. The lane has the scores of keys
   32 h + 8 t + 2 j + b, in scores[4 h + j][b] for query g and [2 + b] for query g + 8. Returns the factors by which the
   answers so far shrink. */
template <int KEYS>
static __device__ float2 llm__attend_weigh_queries(const llm__attn_run &a, llm__query_pair *q,
                                                   float scores[KEYS / 8][4], int key) {
    int t = (int)threadIdx.x % 4;
    float shrink[2];
#pragma unroll
    for (int query = 0; query < 2; query++) {
        float max = q->max[query], sum = 0;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
            for (int b = 0; b < 2; b++) {
                float *score = &scores[j][2 * query + b];
                int at = key + j / 4 * 32 + 8 * t + 2 * (j % 4) + b;
                bool seen = at <= q->last_key[query] && (!a.window || at + a.window > q->last_key[query]);
                *score = seen ? *score * a.scale : -INFINITY;
                max = fmaxf(max, *score);
            }
        for (int step = 1; step <= 2; step *= 2) max = fmaxf(max, __shfl_xor_sync(0xFFFFFFFFu, max, step));
        float base = max == -INFINITY ? 0 : max; /* no key was seen so far: all weights are 0 */
        shrink[query] = exp2f(q->max[query] - base);
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
            for (int b = 0; b < 2; b++) sum += scores[j][2 * query + b] = exp2f(scores[j][2 * query + b] - base);
        q->max[query] = max;
        q->sum[query] = q->sum[query] * shrink[query] + sum;
    }
    return make_float2(shrink[0], shrink[1]);
}

/* A lane's part of 32 dimensions of a query; zeros if the query is not `there`. */
static __device__ uint4 llm__attend_load_query(const llm__attn_run &a, int first_row, int query, int chunk,
                                               bool there) {
    if (!there || 32 * chunk >= a.kv.stride || !llm__attend_has(a, query % a.group)) return make_uint4(0, 0, 0, 0);
    int head = (int)blockIdx.y * a.group + query % a.group - a.skipped;
    const uint16_t *from = a.q + ((size_t)(first_row + query / a.group) * a.n_heads + head) * a.kv.stride;
    return *(const uint4 *)(from + 32 * chunk + threadIdx.x % 4 * 8);
}

/* Grid: 1; key heads; tiles. CHUNKS * 32 dimensions, KEYS keys a step. */
template <int CHUNKS, int KEYS>
static __global__ void __launch_bounds__(LLM__ATTEND_WARPS * 32, CHUNKS == 8 ? 1 : 2)
    llm__tile_attention(llm__attn_run a) {
    __shared__ llm__tile_memory<CHUNKS, KEYS> m;
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4,
        n_tiles = a.rows.counts[2];
    int tile = n_tiles - 1 - (int)blockIdx.z, first_row = a.rows.tile_first[tile],
        n_rows = a.rows.tile_rows[tile]; /* the longest first */
    int begin = llm__attend_first_key(a, a.rows.positions[first_row]) / KEYS * KEYS,
        end = a.rows.positions[first_row + n_rows - 1] + 1;
    const int *table = llm__rows_table(a.rows, first_row);
    bool works = 16 * warp < n_rows * a.group; /* the warp has queries */
    float answer[CHUNKS * 4][4] = {};
    constexpr bool KEEPS_QUERIES =
        CHUNKS <= 4;                    /* otherwise there are no registers for them, and each step loads them again */
    uint4 upper[CHUNKS], lower[CHUNKS]; /* queries g and g + 8 */
    llm__query_pair q;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int query = 16 * warp + 8 * i + g;
        bool there = query < n_rows * a.group;
        q.max[i] = -INFINITY;
        q.sum[i] = 0;
        q.last_key[i] = there ? a.rows.positions[first_row + query / a.group] : -1;
    }
#pragma unroll
    for (int c = 0; KEEPS_QUERIES && c < CHUNKS; c++) {
        upper[c] = llm__attend_load_query(a, first_row, 16 * warp + g, c, q.last_key[0] >= 0);
        lower[c] = llm__attend_load_query(a, first_row, 16 * warp + 8 + g, c, q.last_key[1] >= 0);
    }
    llm__attend_copy_keys<CHUNKS, KEYS>(a, m.keys, table, begin, end);
    for (int key = begin; key < end; key += KEYS) {
        llm__chip_wait_for_copies<0>();
        __syncthreads(); /* the keys have arrived, and no thread still reads the values of the previous step */
        llm__attend_copy_values<CHUNKS, KEYS>(a, m.values, table, key, end);
        float scores[KEYS / 8][4] = {};
        float2 shrink = make_float2(1, 1);
        if (works) {
            /* The keys of the columns are chosen so that lane t gets keys 8 t .. 8 t + 7 of each 32, as the second
               product needs them. */
#pragma unroll(KEEPS_QUERIES ? CHUNKS : 1)
            for (int c = 0; c < CHUNKS; c++) {
                uint4 up = KEEPS_QUERIES ? upper[c]
                                         : llm__attend_load_query(a, first_row, 16 * warp + g, c, q.last_key[0] >= 0);
                uint4 low = KEEPS_QUERIES
                                ? lower[c]
                                : llm__attend_load_query(a, first_row, 16 * warp + 8 + g, c, q.last_key[1] >= 0);
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) {
                    int row = j / 4 * 32 + g / 2 * 8 + j % 4 * 2 + g % 2;
                    llm__chip_multiply_32(scores[j], up, low, m.keys[llm__attend_swizzle(row, 4 * c + t, CHUNKS * 4)]);
                }
            }
            shrink = llm__attend_weigh_queries<KEYS>(a, &q, scores, key);
        }
        llm__chip_wait_for_copies<0>();
        __syncthreads(); /* the values have arrived, and no thread still reads this step's keys */
        if (key + KEYS < end) llm__attend_copy_keys<CHUNKS, KEYS>(a, m.keys, table, key + KEYS, end);
        if (!works) continue;
#pragma unroll
        for (int n = 0; n < CHUNKS * 4; n++) {
            for (int i = 0; i < 4; i++) answer[n][i] *= i < 2 ? shrink.x : shrink.y;
#pragma unroll
            for (int h = 0; h < KEYS / 32; h++) {
                uint32_t weights[2][4];
#pragma unroll
                for (int j = 0; j < 4; j++)
                    for (int i = 0; i < 2; i++)
                        weights[i][j] = llm__chip_pack_bf16(scores[4 * h + j][2 * i], scores[4 * h + j][2 * i + 1]);
                llm__chip_multiply_32(answer[n], make_uint4(weights[0][0], weights[0][1], weights[0][2], weights[0][3]),
                                      make_uint4(weights[1][0], weights[1][1], weights[1][2], weights[1][3]),
                                      m.values[llm__attend_swizzle(8 * n + g, 4 * h + t, KEYS / 8)]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        int query = 16 * warp + 8 * i + g;
        float sum = q.sum[i];
        for (int step = 1; step <= 2; step *= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
        float inverse = 1 / sum;
        if (query >= n_rows * a.group || !llm__attend_has(a, query % a.group)) continue;
        uint16_t *out = llm__attend_answer(a, first_row + query / a.group, query % a.group);
#pragma unroll
        for (int n = 0; n < CHUNKS * 4; n++)
            for (int b = 0; b < 2; b++)
                if (8 * n + 2 * t + b < a.head_dim)
                    out[8 * n + 2 * t + b] = llm__chip_to_bf16(answer[n][2 * i + b] * inverse);
    }
}

/* ==== 6 Picking tokens ==========================================================================================

   This is llm_sample on the GPU. One block reads the logits a few times; that takes little time compared with reading
   the weights of the model. The likelihood of a token is an integer here, its "weight", so sums are exact and a seed
   gives the same text on every run. Top-k, top-p and min-p each cut the list of tokens, ordered by weight, to a prefix.
   So it is enough to know the total weight of each prefix. A random number below the smallest of the three is drawn.
   The picked token is the first one at which the sum of the weights exceeds this number. */

enum { LLM__PICK_THREADS = 1024, LLM__WEIGHT_BITS = 27, LLM__LOW_BITS = 14, LLM__MAX_VOCAB = 1 << 18 };

/* The sampler's settings and state, in the GPU's memory. The kernel increases n_drawn and n_picked. */
typedef struct llm__picker_state {
    float scale, top_p, min_p; /* log2(e) / temperature, 0: greedy */
    int top_k;
    unsigned long long seed, n_drawn;
    int n_picked;
} llm__picker_state;

typedef struct llm__picker {
    llm__rows rows; /* the first row is for the picked token */
    const float *logits;
    int n_vocab;
    llm__picker_state *state;
    int *picked; /* in the host's memory; -1: the logits have a NaN or an infinity, or all tokens are forbidden */
} llm__picker;

/* The block's shared memory. The sums of a step of the descent are in two parts, because atomics have 32 bits. */
typedef struct llm__pick_memory {
    unsigned counts[LLM__PICK_THREADS], low[LLM__PICK_THREADS], high[LLM__PICK_THREADS];
    unsigned long long warps[LLM__PICK_THREADS / 32];
    int bin;
    unsigned n_before;
    unsigned long long weight_before;
} llm__pick_memory;

/* The place of a weight in the order of weights: `key` identifies the weight, and the tokens above it are counted. */
typedef struct llm__place {
    uint32_t key;
    unsigned long long n_above, weight_above;
} llm__place;

static __device__ float llm__pick_likelihood(const llm__picker &p, float max, float scale, int token) {
    return exp2f((p.logits[token] - max) * scale);
}
static __device__ unsigned llm__pick_weight(float likelihood) {
    return (unsigned)(likelihood * (float)(1 << LLM__WEIGHT_BITS));
}

/* Subtract this from the bits of a likelihood from 2^-WEIGHT_BITS to 1: that gives a key of 28 bits in the same
   order. */
static __device__ uint32_t llm__pick_key_base(void) { return (uint32_t)(127 - LLM__WEIGHT_BITS) << 23; }

/* The sum of the values of this thread and those before it. */
static __device__ unsigned long long llm__pick_scan(unsigned long long value, unsigned long long *warps) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32;
    for (int step = 1; step < 32; step *= 2) {
        unsigned long long other = __shfl_up_sync(0xFFFFFFFFu, value, step);
        if (lane >= step) value += other;
    }
    if (lane == 31) warps[warp] = value;
    __syncthreads();
    for (int i = 0; i < warp; i++) value += warps[i];
    __syncthreads();
    return value;
}

static __device__ unsigned long long llm__pick_block_sum(unsigned long long value, llm__pick_memory *m) {
    value = llm__pick_scan(value, m->warps);
    if (threadIdx.x == blockDim.x - 1) m->weight_before = value;
    __syncthreads();
    value = m->weight_before;
    __syncthreads();
    return value;
}

/* The token with the largest logit, the first if there are several. Returns -1 if a logit is NaN or +infinity, or if
   all are -infinity. */
static __device__ int llm__pick_best_token(const llm__picker &p, llm__pick_memory *m) {
    unsigned long long best = 0;
    for (int i = (int)threadIdx.x; i < p.n_vocab; i += (int)blockDim.x) {
        uint32_t bits = __float_as_uint(p.logits[i]), order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
        if ((bits & 0x7FFFFFFFu) > 0x7F800000u) order = 0xFFFFFFFFu; /* NaN, of either sign, comes before all others */
        unsigned long long key = (unsigned long long)order << 32 | (uint32_t)~i;
        best = key > best ? key : best;
    }
    for (int step = 16; step; step /= 2) {
        unsigned long long other = __shfl_xor_sync(0xFFFFFFFFu, best, step);
        best = other > best ? other : best;
    }
    if (threadIdx.x % 32 == 0) m->warps[threadIdx.x / 32] = best;
    __syncthreads();
    for (int i = 0; i < (int)blockDim.x / 32; i++) best = m->warps[i] > best ? m->warps[i] : best;
    __syncthreads();
    uint32_t order = (uint32_t)(best >> 32); /* +infinity has 0xFF800000, -infinity 0x007FFFFF */
    return order >= 0xFF800000u || order <= 0x007FFFFFu ? -1 : (int)~(uint32_t)best;
}

/* Goes down from the heaviest token, and finds the place where the sum of weights (or with BY_COUNT, the number of
   tokens) first exceeds `target`. The sum over all tokens must exceed it. This finds ten bits of the key, then nine,
   then nine. Each thread has a bin. */
template <bool BY_COUNT>
static __device__ llm__place llm__pick_descend(const llm__picker &p, float max, float scale, unsigned long long target,
                                               llm__pick_memory *m) {
    int thread = (int)threadIdx.x, bin = LLM__PICK_THREADS - 1 - thread;
    llm__place place = {0, 0, 0};
    for (int shift = 18; shift >= 0; shift -= 9) {
        m->counts[thread] = m->low[thread] = m->high[thread] = 0;
        __syncthreads();
        for (int i = thread; i < p.n_vocab; i += LLM__PICK_THREADS) {
            float likelihood = llm__pick_likelihood(p, max, scale, i);
            unsigned weight = llm__pick_weight(likelihood);
            uint32_t key = __float_as_uint(likelihood) - llm__pick_key_base(), above = shift == 18 ? 28 : shift + 9;
            if (!weight || key >> above != place.key >> above) continue;
            uint32_t to = key >> shift & ((1u << (above - shift)) - 1);
            atomicAdd(&m->counts[to], 1u);
            atomicAdd(&m->low[to], weight & ((1u << LLM__LOW_BITS) - 1));
            atomicAdd(&m->high[to], weight >> LLM__LOW_BITS);
        }
        __syncthreads();
        unsigned long long n = m->counts[bin],
                           weight = ((unsigned long long)m->high[bin] << LLM__LOW_BITS) + m->low[bin];
        unsigned long long n_through = place.n_above + llm__pick_scan(n, m->warps),
                           through = place.weight_above + llm__pick_scan(weight, m->warps);
        if (BY_COUNT ? n_through > target && n_through - n <= target : through > target && through - weight <= target) {
            m->bin = bin;
            m->n_before = (unsigned)(n_through - n);
            m->weight_before = through - weight;
        }
        __syncthreads();
        place.key |= (uint32_t)m->bin << shift;
        place.n_above = m->n_before;
        place.weight_above = m->weight_before;
        __syncthreads();
    }
    return place;
}

/* Finds the n-th token of a weight. Among equal weights, lower ids come first. */
static __device__ int llm__pick_nth_of_weight(const llm__picker &p, float max, float scale, uint32_t key,
                                              unsigned long long n, llm__pick_memory *m) {
    int some = (p.n_vocab + LLM__PICK_THREADS - 1) / LLM__PICK_THREADS,
        first = llm__min((int)threadIdx.x * some, p.n_vocab);
    int end = llm__min(first + some, p.n_vocab);
    unsigned long long found = 0;
    for (int i = first; i < end; i++)
        found += __float_as_uint(llm__pick_likelihood(p, max, scale, i)) == key + llm__pick_key_base();
    unsigned long long before = llm__pick_scan(found, m->warps) - found;
    for (int i = first; i < end && before <= n; i++)
        if (__float_as_uint(llm__pick_likelihood(p, max, scale, i)) == key + llm__pick_key_base() && before++ == n)
            m->bin = i;
    __syncthreads();
    return m->bin;
}

/* The total weight of the tokens that top-k, top-p and min-p leave. */
static __device__ unsigned long long llm__pick_cut(const llm__picker &p, const llm__picker_state &s, float max,
                                                   llm__pick_memory *m) {
    unsigned long long n = 0, all = 0, likely = 0;
    for (int i = (int)threadIdx.x; i < p.n_vocab; i += LLM__PICK_THREADS) {
        float likelihood = llm__pick_likelihood(p, max, s.scale, i);
        unsigned weight = llm__pick_weight(likelihood);
        n += weight > 0;
        all += weight;
        likely += likelihood >= s.min_p ? weight : 0;
    }
    n = llm__pick_block_sum(n, m);
    all = llm__pick_block_sum(all, m);
    likely = llm__pick_block_sum(likely, m);
    if (s.top_k > 0 && (unsigned long long)s.top_k < n) {
        llm__place kth = llm__pick_descend<true>(p, max, s.scale, (unsigned long long)s.top_k - 1, m);
        all = kth.weight_above + ((unsigned long long)s.top_k - kth.n_above) *
                                     llm__pick_weight(__uint_as_float(kth.key + llm__pick_key_base()));
    }
    if (s.top_p > 0 && s.top_p < 1) {
        unsigned long long enough = (unsigned long long)((double)s.top_p * (double)all) + 1;
        if (enough > all) enough = all;
        llm__place last = llm__pick_descend<false>(p, max, s.scale, enough - 1, m);
        unsigned long long weight = llm__pick_weight(__uint_as_float(last.key + llm__pick_key_base()));
        all = last.weight_above + (enough - last.weight_above + weight - 1) / weight * weight;
    }
    return all < likely ? all : likely;
}

/* The same numbers as llm_sample's (splitmix64). */
static __device__ double llm__pick_random(unsigned long long seed, unsigned long long n) {
    unsigned long long z = seed + n * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (double)((z ^ z >> 31) >> 11) * (1.0 / 9007199254740992.0);
}

/* Picks a token and puts it into the next pass, at the next position. One block. */
static __global__ void __launch_bounds__(LLM__PICK_THREADS, 1) llm__pick(llm__picker p) {
    __shared__ llm__pick_memory m;
    llm__chip_let_next_start();
    llm__chip_wait_for_previous();
    llm__picker_state s = *p.state;
    int token = llm__pick_best_token(p, &m);
    if (s.scale > 0 && token >= 0) {
        float max = p.logits[token];
        unsigned long long at =
            (unsigned long long)(llm__pick_random(s.seed, s.n_drawn + 1) * (double)llm__pick_cut(p, s, max, &m));
        llm__place place = llm__pick_descend<false>(p, max, s.scale, at, &m);
        unsigned weight = llm__pick_weight(__uint_as_float(place.key + llm__pick_key_base()));
        token = llm__pick_nth_of_weight(p, max, s.scale, place.key, (at - place.weight_above) / weight, &m);
    }
    if (threadIdx.x) return;
    p.state->n_drawn = s.n_drawn + 1;
    p.state->n_picked = s.n_picked + 1;
    p.picked[s.n_picked] = token;
    const_cast<int *>(p.rows.tokens)[0] =
        token < 0 ? 0 : token; /* after an error the next pass still runs, but its result is not used */
    const_cast<int *>(p.rows.positions)[0]++;
}

/* ==== 7 Plain kernels ===========================================================================================

   Each kernel does one operation. Passes of LLM_CUDA_EAGER use only these. Passes of more than 16 rows use these, the
   products of cuBLAS, and the attention of section 5. */

/* out = x / rms(x) * weight in bf16. One block per row. */
static __global__ void llm__norm(const float *x, const float *weight, int n, float eps, uint16_t *out, int stride) {
    __shared__ float parts[32];
    const float *from = x + (size_t)blockIdx.x * n;
    float sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) sum += from[i] * from[i];
    sum = llm__chip_warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) sum += parts[i];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x)
        out[(size_t)blockIdx.x * stride + i] = llm__chip_to_bf16(from[i] * scale * weight[i]);
}

/* y[row][output] = W[output] . x[row], or += with `add`. One warp per output, eight in a block. */
static __global__ void llm__matrix_product(llm__gpu_matrix m, const uint16_t *x, float *y, int stride, bool add) {
    int output = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = (int)threadIdx.x % 32, row = (int)blockIdx.y;
    if (output >= m.n) return;
    float sum = 0;
    for (int i = lane; i < m.k; i += 32)
        sum +=
            llm__matrix_element(m, output, i) * llm__chip_from_bf16(x[(size_t)row * llm__matrix_input_stride(m) + i]);
    sum = llm__chip_warp_sum(sum);
    float *to = y + (size_t)row * stride + output;
    if (lane == 0) *to = add ? *to + sum : sum;
}

/* Converts rows [first, first + n) to bf16, for cuBLAS. int8 is exact, without its scales. Of f16 it makes the high
   parts, or with `low` the low parts. One thread per eight numbers. */
static __global__ void llm__widen(llm__gpu_matrix m, int first, int n, bool low, uint16_t *to) {
    unsigned eight = blockIdx.x * blockDim.x + threadIdx.x, per_row = (unsigned)m.k / 8;
    if (eight >= (unsigned)n * per_row) return;
    int row = first + (int)(eight / per_row), i = (int)(eight % per_row) * 8;
    const uint8_t *from = m.data + row * llm__matrix_row_bytes(m);
    uint4 out;
    if (m.format == LLM__F16) {
        llm__chip_halves s = llm__chip_split_8(*(const uint4 *)(from + 2 * i));
        out = low ? s.low : s.high;
    } else if (m.format == LLM__INT8) {
        uint2 bytes = *(const uint2 *)(from + i);
        out = llm__chip_widen_8(bytes.x, bytes.y);
    } else if (llm__matrix_is_2_4(m.format)) {
        int pair = llm__matrix_pair(m.format, i / 4);
        uint32_t patterns = m.places[row * llm__matrix_row_places(m) + (size_t)(pair / 2)];
        uint4 pairs = make_uint4(0, 0, 0, 0), none;
        if (m.format == LLM__BF16_2_4) {
            uint2 words = *(const uint2 *)(from + 4 * pair);
            pairs.x = words.x, pairs.y = words.y;
        } else {
            pairs = llm__chip_widen_8(*(const uint32_t *)(from + 2 * pair), 0);
        }
        llm__chip_spread_pairs(pairs, patterns, &out, &none);
    } else {
        const uint8_t *place = from + llm__matrix_group_place(m.format, i);
        uint32_t d = m.scales[(size_t)row * (m.k / 32) + i / 32], pairs[4];
        float scale = llm__chip_half(d), minimum = llm__chip_half(d >> 16);
        uint4 q; /* pairs of integers as bf16, which is exact */
        if (m.format == LLM__INT4_GROUPS) {
            q = llm__chip_widen_nibbles(*(const uint32_t *)place);
            minimum -= 128 * scale;
        } else {
            uint2 bytes = *(const uint2 *)place;
            q = llm__chip_widen_8(bytes.x, bytes.y);
        }
        const uint32_t whole[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int j = 0; j < 4; j++)
            pairs[j] = llm__chip_pack_bf16(fmaf(__uint_as_float(whole[j] << 16), scale, minimum),
                                           fmaf(__uint_as_float(whole[j] & 0xFFFF0000u), scale, minimum));
        out = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    }
    *(uint4 *)(to + 8 * (size_t)eight) = out;
}

/* After a product with int8: y = sums * scales, or y += sums * scales. `y` and `sums` may be the same. One thread per
   output. */
static __global__ void llm__scale(const float *sums, int sums_stride, const uint32_t *scales, int n, float *y,
                                  int stride, bool add) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), row = (int)blockIdx.y;
    if (i >= n) return;
    float *to = y + (size_t)row * stride + i, x = sums[(size_t)row * sums_stride + i] * __uint_as_float(scales[i]);
    *to = add ? *to + x : x;
}

/* The outputs of a wide product (queries, keys and values; or gates and ups) for the next kernel. */
typedef struct llm__wide {
    const void *data; /* [rows][n] f32 or bf16 */
    bool is_bf16;
    const uint32_t *scales; /* [n] floats by which the outputs must still be multiplied; NULL: none */
    int n;
} llm__wide;

static __device__ float llm__wide_at(const llm__wide &w, int row, int i) {
    size_t at = (size_t)row * w.n + i;
    float x = w.is_bf16 ? llm__chip_from_bf16(((const uint16_t *)w.data)[at]) : ((const float *)w.data)[at];
    return w.scales ? x * __uint_as_float(w.scales[i]) : x;
}

/* The same for eight neighbours. */
static __device__ void llm__wide_8(const llm__wide &w, int row, int i, float to[8]) {
    size_t at = (size_t)row * w.n + i;
    bool whole = w.is_bf16 && at % 8 == 0;
    uint4 v = whole ? *(const uint4 *)((const uint16_t *)w.data + at) : make_uint4(0, 0, 0, 0);
    const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 8; j++) {
        float x = __uint_as_float(j % 2 ? pairs[j / 2] & 0xFFFF0000u : pairs[j / 2] << 16);
        to[j] = !whole ? llm__wide_at(w, row, i + j) : w.scales ? x * __uint_as_float(w.scales[i + j]) : x;
    }
}

/* One head's query, key or value before RoPE. */
typedef struct llm__head {
    int row, first;           /* where it is in llm__wide */
    const float *bias, *norm; /* [head_dim]; NULL: none */
    float scale;              /* 1 / sqrt(mean(x^2) + eps), with norm */
} llm__head;

static __device__ float llm__head_dim(const llm__wide &w, const llm__head &h, int dim) {
    float x = llm__wide_at(w, h.row, h.first + dim) + (h.bias ? h.bias[dim] : 0);
    return h.norm ? x * h.scale * h.norm[dim] : x;
}

static __device__ llm__head llm__find_head(const llm__qkv_store &s, const llm__wide &w, int row, int head) {
    const float *norm = head < s.n_heads ? s.q_norm : head < s.n_heads + s.kv.n_heads ? s.k_norm : NULL;
    llm__head h = {row, head * s.head_dim, s.bias ? s.bias + head * s.head_dim : NULL, NULL, 0};
    if (!norm) return h;
    float sum = 0;
    for (int dim = (int)threadIdx.x % 32; dim < s.head_dim; dim += 32) {
        float x = llm__head_dim(w, h, dim);
        sum += x * x;
    }
    h.scale = 1.0f / sqrtf(llm__chip_warp_sum(sum) / (float)s.head_dim + s.eps);
    h.norm = norm;
    return h;
}

/* Adds the bias, norms, rotates and stores the first n_heads heads of queries, keys and values. One warp per head of a
   row. */
static __global__ void llm__rope(llm__rows rows, llm__qkv_store s, llm__wide w, int n_heads) {
    int lane = (int)threadIdx.x % 32, head = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32, row = (int)blockIdx.y;
    llm__chip_let_next_start();
    llm__chip_wait_for_previous();
    if (head >= n_heads || row >= rows.counts[0]) return;
    llm__head h = llm__find_head(s, w, row, head);
    llm__cell cell = llm__rows_cell(rows, row);
    for (int pair = lane; pair < (s.head_dim + 1) / 2; pair += 32) {
        int first = llm__store_pair_dim(pair, s.rope_dim, 0), second = llm__store_pair_dim(pair, s.rope_dim, 1);
        llm__store_pair(s, cell, llm__store_find_turn(s, row, head, pair), row, head, pair, llm__head_dim(w, h, first),
                        second < s.head_dim ? llm__head_dim(w, h, second) : 0);
    }
}

/* Stores the values of 32 rows of a key head, in a long pass. In the cache, the positions of a dimension are
   consecutive. So the values are transposed in shared memory, and a warp writes one dimension of 32 rows, whose
   positions are usually consecutive. */
static __global__ void llm__store_values(llm__rows rows, llm__qkv_store s, llm__wide w) {
    __shared__ uint16_t values[32][LLM__MAX_HEAD_DIM + 2];
    int first = (int)blockIdx.x * 32, n = llm__min(rows.counts[0] - first, 32),
        head = s.n_heads + s.kv.n_heads + (int)blockIdx.y;
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, n_warps = (int)blockDim.x / 32;
    for (int i = warp; i < n; i += n_warps) {
        llm__head h = llm__find_head(s, w, first + i, head);
        for (int dim = lane; dim < s.head_dim; dim += 32) values[i][dim] = llm__chip_to_bf16(llm__head_dim(w, h, dim));
    }
    __syncthreads();
    if (lane >= n) return;
    llm__cell cell = llm__rows_cell(rows, first + lane);
    uint16_t *to = llm__cache_values(s.kv, cell.block, s.layer, (int)blockIdx.y) + cell.place;
    for (int dim = warp; dim < s.head_dim; dim += n_warps) to[dim * LLM_CACHE_BLOCK] = values[lane][dim];
}

/* softmax(q . keys) . values. One warp per head of a row, one lane per key of a cache block. */
static __global__ void llm__plain_attention(llm__attn_run a) {
    __shared__ float answer[LLM__MAX_HEAD_DIM], weights[LLM_CACHE_BLOCK];
    int head = (int)blockIdx.x, row = (int)blockIdx.y, lane = (int)threadIdx.x, n_keys = a.rows.positions[row] + 1;
    int key_head = (head + a.skipped) / a.group;
    const uint16_t *q = a.q + ((size_t)row * a.n_heads + head) * a.kv.stride;
    float max = -INFINITY, sum = 0;
    for (int dim = lane; dim < a.head_dim; dim += 32) answer[dim] = 0;
    int first_key = llm__attend_first_key(a, n_keys - 1);
    for (int first = first_key / LLM_CACHE_BLOCK * LLM_CACHE_BLOCK; first < n_keys; first += LLM_CACHE_BLOCK) {
        int block = llm__rows_table(a.rows, row)[first / LLM_CACHE_BLOCK];
        const uint16_t *key = llm__cache_keys(a.kv, block, a.layer, key_head) + (size_t)lane * a.kv.stride;
        const uint16_t *values = llm__cache_values(a.kv, block, a.layer, key_head);
        float score = 0;
        for (int dim = 0; dim < a.head_dim; dim++) score += llm__chip_from_bf16(q[dim]) * llm__chip_from_bf16(key[dim]);
        score = first + lane >= first_key && first + lane < n_keys ? score * a.scale : -INFINITY;
        float new_max = fmaxf(max, llm__chip_warp_max(score)), shrink = exp2f(max - new_max),
              weight = exp2f(score - new_max);
        sum = sum * shrink + llm__chip_warp_sum(weight);
        max = new_max;
        weights[lane] = weight;
        __syncwarp();
        for (int dim = lane; dim < a.head_dim; dim += 32) {
            float x = answer[dim] * shrink;
            for (int i = 0; i < LLM_CACHE_BLOCK && first + i < n_keys; i++)
                x += weights[i] * llm__chip_from_bf16(values[dim * LLM_CACHE_BLOCK + i]);
            answer[dim] = x;
        }
        __syncwarp();
    }
    for (int dim = lane; dim < a.head_dim; dim += 32)
        a.out[(size_t)row * a.out_stride + head * a.head_dim + dim] = llm__chip_to_bf16(answer[dim] / sum);
}

/* out[row][i] = silu(gate) * up. A row of w has all gates, then all ups. A thread has eight neighbours. */
static __global__ void llm__swiglu(llm__wide w, int n_ff, uint16_t *out, int stride) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x) * 8, row = (int)blockIdx.y;
    out += (size_t)row * stride + i;
    if (i + 8 <= n_ff && (uintptr_t)out % 16 == 0) {
        float gates[8], ups[8];
        llm__wide_8(w, row, i, gates);
        llm__wide_8(w, row, n_ff + i, ups);
        uint32_t pairs[4];
#pragma unroll
        for (int j = 0; j < 4; j++)
            pairs[j] = llm__chip_pack_bf16(llm__chip_silu(gates[2 * j]) * ups[2 * j],
                                           llm__chip_silu(gates[2 * j + 1]) * ups[2 * j + 1]);
        *(uint4 *)out = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        return;
    }
    for (int j = 0; j < 8 && i + j < n_ff; j++)
        out[j] = llm__chip_to_bf16(llm__chip_silu(llm__wide_at(w, row, i + j)) * llm__wide_at(w, row, n_ff + i + j));
}

/* Copies the rows that need logits into consecutive rows. After the attention of the last layer no others are
   needed. */
static __global__ void llm__keep_rows(llm__rows rows, const float *x, float *kept_x, int n_embd,
                                      const uint16_t *attention, uint16_t *kept_attention, int stride) {
    size_t to = blockIdx.x, from = (size_t)rows.logit_rows[blockIdx.x];
    for (int i = (int)threadIdx.x; i < n_embd; i += (int)blockDim.x) kept_x[to * n_embd + i] = x[from * n_embd + i];
    for (int i = (int)threadIdx.x; i < stride; i += (int)blockDim.x)
        kept_attention[to * stride + i] = attention[from * stride + i];
}

/* log p = logit - max - log(sum of exp(logit - max)) for the targets (of n) that follow rows from `first` on. `logits`
   has the logits of these rows. One block per row. */
static __global__ void llm__score_row(const float *logits, int n_vocab, int first, const int *targets,
                                      const int *target_rows, int n_targets, float *log_probs) {
    __shared__ float maxima[32], sums[32];
    int thread = (int)threadIdx.x, n_threads = (int)blockDim.x, n_warps = n_threads / 32;
    const float *row = logits + (size_t)blockIdx.x * n_vocab;
    float max = -INFINITY, sum = 0;
    for (int i = thread; i < n_vocab; i += n_threads) max = fmaxf(max, row[i]);
    max = llm__chip_warp_max(max);
    if (thread % 32 == 0) maxima[thread / 32] = max;
    __syncthreads();
    for (int i = 0; i < n_warps; i++) max = fmaxf(max, maxima[i]);
    for (int i = thread; i < n_vocab; i += n_threads) sum += expf(row[i] - max);
    sum = llm__chip_warp_sum(sum);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < n_warps; i++) sum += sums[i];
    for (int i = thread; i < n_targets; i += n_threads)
        if (target_rows[i] == first + (int)blockIdx.x) log_probs[i] = row[targets[i]] - max - logf(sum);
}

/* A matrix's numbers, for llm__read_all. */
typedef struct llm__region {
    const uint8_t *data;
    size_t n_vectors; /* of 16 bytes */
} llm__region;

/* Reads all regions one after the other without a pause, and computes almost nothing. Its time is the lower limit of
   decoding. */
static __global__ void llm__read_all(const llm__region *regions, int n_regions, unsigned *sink) {
    unsigned seen = 0;
    size_t step = (size_t)gridDim.x * blockDim.x, thread = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (int r = 0; r < n_regions; r++) {
        llm__region region = regions[r];
        for (size_t i = thread; i < region.n_vectors; i += 4 * step)
#pragma unroll
            for (size_t j = 0; j < 4; j++) {
                if (i + j * step >= region.n_vectors) continue;
                uint4 v = llm__chip_load_once(region.data + 16 * (i + j * step));
                seen ^= v.x ^ v.y ^ v.z ^ v.w;
            }
    }
    if (seen == 0x9E3779B9u) *sink = seen; /* otherwise the compiler could leave out the loads */
}

/* Random bf16 from -1 to 1, for measuring the rate of the tensor cores, which depends on the numbers. */
static __global__ void llm__fill(uint16_t *to, size_t n) {
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        uint32_t x = (uint32_t)i * 2654435761u;
        x = (x ^ x >> 15) * 2246822519u;
        to[i] = llm__chip_to_bf16((float)(int)(x ^ x >> 13) * 0x1p-31f);
    }
}

/* ==== 7b Meetings of ranks ======================================================================================

   Where the GPUs of a tensor group can use each other's memory, ranks bring rows together by a kernel. Each rank has a
   mailbox on its GPU. A rank writes its share of the rows into the mailboxes of all others, and after that a flag. It
   waits for the flags of the others, and copies their shares from its own mailbox to where they belong. Nothing is
   computed, so the bits are those of the way through the host's memory.

   Blocks of the same number meet, and write their flags before they wait. So no block waits for a later one, and the
   kernel cannot block itself if the GPU holds only some of its blocks. A mailbox has two halves that meetings use in
   turn: a rank begins meeting n + 2 after it has seen all flags of meeting n + 1, and the others wrote these after
   their kernel of meeting n was done, which read the half. */

enum { LLM__MEET_RANKS = 8, LLM__MEET_BLOCKS = 32, LLM__MEET_PARTS = 3, LLM__MEET_HEAD = 2048 };

/* The head of a mailbox; zero at first. Its halves follow LLM__MEET_HEAD bytes after its begin. */
typedef struct llm__meet_box {
    unsigned n_meetings; /* that this rank has completed                                                 */
    unsigned n_done;     /* blocks that have completed this one                                          */
    unsigned late;       /* 1 + a rank that did not come, 0: none. From then on meetings do nothing      */
    unsigned ended;      /* 1 + a rank that has failed, which wrote this; 0: none                        */
    unsigned flags[LLM__MEET_BLOCKS][LLM__MEET_RANKS]; /* the last meeting that a block of a rank has come to */
} llm__meet_box;

static_assert(sizeof(llm__meet_box) <= LLM__MEET_HEAD, "the halves follow");

/* Rows that stand `stride` bytes apart, in `data` and, from `offset` on, in a half of a mailbox. */
typedef struct llm__meet_part {
    uint8_t *data;
    size_t stride, offset;
    unsigned row_bytes, first, end; /* of each row; bytes [first, end) are this rank's share */
    unsigned word;                  /* bytes that are copied at once                         */
} llm__meet_part;

typedef struct llm__meet_run {
    llm__meet_part parts[LLM__MEET_PARTS];
    int n_parts, n_rows;
    const int *count;  /* the number of rows, NULL: n_rows                                         */
    const int *tokens; /* not NULL: this rank has the whole rows of [first_token, end_token), and no others */
    int first_token, end_token;
    uint8_t *boxes[LLM__MEET_RANKS];
    int rank, size;
    size_t half;       /* bytes */
    uint64_t patience; /* nanoseconds to wait for a rank */
} llm__meet_run;

/* Copies this block's words of a part: this rank's share to the others' mailboxes, or their shares from its own. A word
   belongs to the same block on all ranks. */
template <typename Word>
static __device__ void llm__meet_copy(const llm__meet_run &m, const llm__meet_part &part, size_t half, int n_rows,
                                      bool sends) {
    unsigned words = part.row_bytes / (unsigned)sizeof(Word), n = (unsigned)n_rows * words;
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        unsigned row = i / words, byte = (i - row * words) * (unsigned)sizeof(Word);
        bool own = m.tokens ? m.tokens[row] >= m.first_token && m.tokens[row] < m.end_token
                            : byte >= part.first && byte < part.end;
        size_t at = row * part.stride + byte;
        Word *data = (Word *)(void *)(part.data + at);
        if (own != sends) continue;
        if (!sends) *data = *(const Word *)(const void *)(m.boxes[m.rank] + half + part.offset + at);
        for (int i = 1; i < m.size && sends; i++) {
            int other = m.rank + i < m.size ? m.rank + i : m.rank + i - m.size;
            *(Word *)(void *)(m.boxes[other] + half + part.offset + at) = *data;
        }
    }
}

static __device__ void llm__meet_copy_parts(const llm__meet_run &m, size_t half, int n_rows, bool sends) {
    for (int i = 0; i < m.n_parts; i++) {
        if (m.parts[i].word == 16) llm__meet_copy<uint4>(m, m.parts[i], half, n_rows, sends);
        else if (m.parts[i].word == 4) llm__meet_copy<uint32_t>(m, m.parts[i], half, n_rows, sends);
        else llm__meet_copy<uint16_t>(m, m.parts[i], half, n_rows, sends);
    }
}

/* Waits until this block of rank `other` has come. Gives up if it does not come in time after `start`, or if a rank has
   failed. */
static __device__ void llm__meet_await(const llm__meet_run &m, llm__meet_box *own, unsigned meeting, int other,
                                       uint64_t start) {
    while ((int)(llm__chip_get_flag(&own->flags[blockIdx.x][other]) - meeting) < 0) {
        unsigned ended = llm__chip_get_flag(&own->ended);
        if (!ended && llm__chip_nanoseconds() - start < m.patience) continue;
        own->late = ended ? ended : (unsigned)other + 1;
        return;
    }
}

static __global__ void llm__meet_ranks(llm__meet_run m) {
    __shared__ unsigned meeting, late;
    llm__meet_box *own = (llm__meet_box *)(void *)m.boxes[m.rank];
    int thread = (int)threadIdx.x;
    llm__chip_let_next_start();
    llm__chip_wait_for_previous();
    if (thread == 0) {
        meeting = own->n_meetings + 1;
        late = own->late;
    }
    __syncthreads();
    if (late) return;
    size_t half = LLM__MEET_HEAD + meeting % 2 * m.half;
    int n_rows = m.count ? *m.count : m.n_rows;
    llm__meet_copy_parts(m, half, n_rows, true);
    __syncthreads();
    bool meets = thread < m.size && thread != m.rank;
    if (meets) {
        llm__meet_box *box = (llm__meet_box *)(void *)m.boxes[thread];
        llm__chip_set_flag(&box->flags[blockIdx.x][m.rank], meeting);
    }
    uint64_t start = llm__chip_nanoseconds();
    __syncthreads(); /* all have been told before this rank waits for any */
    if (meets) llm__meet_await(m, own, meeting, thread, start);
    __syncthreads();
    llm__meet_copy_parts(m, half, n_rows, false);
    __syncthreads();
    if (thread == 0 && llm__chip_count_up(&own->n_done) == gridDim.x - 1) {
        own->n_done = 0;
        own->n_meetings = meeting;
    }
}

/* ---- NCCL ----

   Where the GPUs cannot use each other's memory, and each rank is a process with a GPU of its own, NCCL exchanges the
   rows. A kernel first clears what this rank does not have. Then NCCL adds up the rows of all ranks as integers. Only
   one rank has a byte that is not zero, so the sums are exact, and the bits are those of the other ways. If there is
   only one row and all shares are equal, nothing is cleared, and NCCL gathers the shares.

   The library is loaded when it is needed, so that programs need it neither to be built nor to run. What is used of it
   is declared here. A communicator is made such that no call waits for other ranks: a call that is not done returns
   LLM__NCCL_IN_PROGRESS, and get_async_error tells when it is. */

enum {
    LLM__NCCL_OLDEST = 21800, /* version 2.18.0 */
    LLM__NCCL_DONE = 0,
    LLM__NCCL_CUDA_ERROR = 1,
    LLM__NCCL_IN_PROGRESS = 7,
    LLM__NCCL_BYTES = 1,
    LLM__NCCL_WORDS = 3, /* of 32 bits, without a sign */
    LLM__NCCL_SUM = 0,
    LLM__NCCL_START = 4 /* starting NCCL may take this many times the patience of an exchange */
};

typedef struct llm__nccl_id {
    char bytes[128];
} llm__nccl_id;

/* That of version 2.14; newer versions give their new members the usual values. */
typedef struct llm__nccl_config {
    size_t size;
    unsigned magic, version;
    int blocking;
} llm__nccl_config;

typedef struct llm__nccl_library {
    char problem[300]; /* why it cannot be used; "": it can */
    int version;
    int (*get_version)(int *version);
    int (*get_id)(llm__nccl_id *id);
    int (*init)(void **comm, int size, llm__nccl_id id, int rank, llm__nccl_config *config);
    int (*get_async_error)(void *comm, int *result);
    int (*all_reduce)(const void *from, void *to, size_t n, int type, int operation, void *comm, cudaStream_t stream);
    int (*all_gather)(const void *from, void *to, size_t n, int type, void *comm, cudaStream_t stream);
    int (*group_start)(void);
    int (*group_end)(void);
    int (*finalize)(void *comm);
    int (*destroy)(void *comm);
    int (*abort)(void *comm);
    const char *(*get_error_string)(int result);
} llm__nccl_library;

/* Returns false if the library has no such function. */
template <typename Function> static bool llm__nccl_find(void *library, const char *name, Function **out) {
    *out = (Function *)dlsym(library, name);
    return *out != NULL;
}

static void llm__nccl_find_all(void *library, llm__nccl_library *n) {
    const int v = LLM__NCCL_OLDEST;
    if (!llm__nccl_find(library, "ncclGetVersion", &n->get_version) || n->get_version(&n->version)) n->version = 0;
    int thousands = n->version < 10000 ? 1000 : 10000; /* until version 2.8, and since then */
    if (n->version < v)
        snprintf(n->problem, sizeof n->problem, "NCCL is too old: libnccl.so.2 is version %d.%d, and %d.%d is needed",
                 n->version / thousands, n->version % thousands / 100, v / 10000, v % 10000 / 100);
    else if (!llm__nccl_find(library, "ncclGetUniqueId", &n->get_id) ||
             !llm__nccl_find(library, "ncclCommInitRankConfig", &n->init) ||
             !llm__nccl_find(library, "ncclCommGetAsyncError", &n->get_async_error) ||
             !llm__nccl_find(library, "ncclAllReduce", &n->all_reduce) ||
             !llm__nccl_find(library, "ncclAllGather", &n->all_gather) ||
             !llm__nccl_find(library, "ncclGroupStart", &n->group_start) ||
             !llm__nccl_find(library, "ncclGroupEnd", &n->group_end) ||
             !llm__nccl_find(library, "ncclCommFinalize", &n->finalize) ||
             !llm__nccl_find(library, "ncclCommDestroy", &n->destroy) ||
             !llm__nccl_find(library, "ncclCommAbort", &n->abort) ||
             !llm__nccl_find(library, "ncclGetErrorString", &n->get_error_string))
        snprintf(n->problem, sizeof n->problem, "libnccl.so.2 lacks functions of NCCL");
}

/* Loads the library, once for all. */
static const llm__nccl_library *llm__nccl_load(void) {
    static const llm__nccl_library loaded = [] {
        llm__nccl_library n = {};
        void *library = dlopen("libnccl.so.2", RTLD_NOW | RTLD_LOCAL);
        const char *why = library ? NULL : dlerror();
        if (library) llm__nccl_find_all(library, &n);
        else snprintf(n.problem, sizeof n.problem, "NCCL cannot be loaded: %s", why ? why : "libnccl.so.2");
        return n;
    }();
    return &loaded;
}

/* Clears the words of a row that this rank does not have. */
template <typename Word>
static __device__ void llm__meet_clear(const llm__meet_part &part, int row, bool is_whole, bool is_none) {
    Word *data = (Word *)(void *)(part.data + (size_t)row * part.stride);
    const Word zero = {};
    unsigned step = gridDim.x * blockDim.x, words = is_whole ? 0 : part.row_bytes / (unsigned)sizeof(Word);
    for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step) {
        unsigned byte = i * (unsigned)sizeof(Word);
        if (is_none || byte < part.first || byte >= part.end) data[i] = zero;
    }
}

/* Leaves of each row only what this rank has. Rows from the count on are nobody's. Blocks with the same y have a row.
   *progress changes, so that the host sees that the GPU has not stopped. */
static __global__ void llm__meet_clear_rows(llm__meet_run m, unsigned *progress) {
    int row = (int)blockIdx.y;
    llm__chip_wait_for_previous();
    int n_rows = m.count ? *m.count : m.n_rows;
    bool is_whole = m.tokens && row < n_rows && m.tokens[row] >= m.first_token && m.tokens[row] < m.end_token,
         is_none = row >= n_rows || (m.tokens && !is_whole);
    for (int i = 0; i < m.n_parts; i++) {
        if (m.parts[i].word == 16) llm__meet_clear<uint4>(m.parts[i], row, is_whole, is_none);
        else if (m.parts[i].word == 4) llm__meet_clear<uint32_t>(m.parts[i], row, is_whole, is_none);
        else llm__meet_clear<uint16_t>(m.parts[i], row, is_whole, is_none);
    }
    if (row == 0 && blockIdx.x == 0 && threadIdx.x == 0) *progress = (unsigned)llm__chip_nanoseconds();
}

/* ==== 8 The model ===============================================================================================

   Matrices are stored row by row, as in the file. Threads of the host convert rows into one of two pinned buffers while
   the other buffer is being copied to the GPU. */

typedef struct llm__gpu_layer {
    float *attention_norm, *ffn_norm;
    float *qkv_bias, *q_norm, *k_norm; /* NULL: the model has none */
    llm__gpu_matrix qkv, attention_out, gate_up, down;
} llm__gpu_layer;

typedef struct llm__gpu_model {
    llm_host host;
    llm_backend_shape whole, shape; /* of the whole model; with this rank's layers, heads and key heads */
    llm_backend_ranks own;          /* its shares                                                       */
    int group;                      /* query heads that share a key head                                */
    bool is_first_stage, is_last_stage;
    llm_cuda_mode mode;
    llm_dtype dtype;
    int n_threads, n_processors;
    int shared_bytes, block_bytes; /* shared memory of a multiprocessor, and the most that a block can have */
    int device;                    /* the GPU that all calls of this model and its contexts use, see llm__on_device */
    bool can_overlap;
    double *frequencies; /* on the GPU */
    llm__gpu_layer *layers;
    float *output_norm;
    llm__gpu_matrix embedding, head; /* the same if tied */
    cudaStream_t stream;
    uint8_t *staging[2]; /* pinned */
    cudaEvent_t sent[2];
    int turn; /* the staging buffer that is used next */
} llm__gpu_model;

enum { LLM__STAGING = 4 << 20 };

static void llm__host_free(const llm_host *host, void *ptr) {
    if (host->alloc) (host->free)(host->user, ptr);
    else (free)(ptr);
}

/* Makes a GPU the current one of the calling thread. The destructor restores the previous one. */
struct llm__on_device {
    int device, before;
    explicit llm__on_device(int device_) : device(device_), before(device_) {
        if (cudaGetDevice(&before) == cudaSuccess && before != device)
            (void)cudaSetDevice(device); /* if this fails, later calls fail, too */
    }
    ~llm__on_device() {
        if (before != device) (void)cudaSetDevice(before);
    }
};

static void *llm__host_zero(const llm_host *host, size_t size, llm_error *err) {
    void *ptr = host->alloc ? host->alloc(host->user, size) : malloc(size);
    if (ptr) return memset(ptr, 0, size);
    llm__cuda_error(err, LLM_ERROR_MEMORY, "out of memory: %llu bytes could not be allocated",
                    (unsigned long long)size);
    return NULL;
}

/* Number of scales of a row. */
static size_t llm__matrix_row_scales(llm__gpu_matrix m) {
    return llm__matrix_has_groups(m.format) ? (size_t)m.k / 32 : llm__matrix_has_row_scales(m.format) ? 1 : 0;
}

/* Bytes that are read of a row: its numbers, places and scales. */
static size_t llm__matrix_all_bytes(llm__gpu_matrix m) {
    return llm__matrix_row_bytes(m) + llm__matrix_row_places(m) + llm__matrix_row_scales(m) * 4;
}

/* Describes a matrix. Its memory is not allocated yet. A short row can be longer as 2:4, and then it is not used. */
static llm__gpu_matrix llm__matrix_describe(llm_dtype dtype, const llm_backend_weight *weight) {
    llm__gpu_matrix m;
    memset(&m, 0, sizeof m);
    if (dtype == LLM_DTYPE_F16) m.format = LLM__F16;
    if (dtype == LLM_DTYPE_INT8) m.format = LLM__INT8;
    if (dtype == LLM_DTYPE_INT4) m.format = weight->has_q8_0 ? LLM__INT8_GROUPS : LLM__INT4_GROUPS;
    m.n = weight->rows;
    m.k = llm__pad(weight->cols, dtype == LLM_DTYPE_INT4 ? 128 : 64);
    llm__gpu_matrix pairs = m;
    if (m.format == LLM__BF16) pairs.format = LLM__BF16_2_4;
    if (m.format == LLM__INT8) pairs.format = LLM__INT8_2_4;
    return weight->is_2_4 && llm__matrix_all_bytes(pairs) < llm__matrix_all_bytes(m) ? pairs : m;
}

static uint64_t llm__gpu_weight_bytes(llm_dtype dtype, const llm_backend_weight *weight) {
    llm__gpu_matrix m = llm__matrix_describe(dtype, weight);
    return (uint64_t)m.n * llm__matrix_all_bytes(m);
}

/* The GPU for a rank. If the calling thread's current GPU is not GPU 0, the host has chosen it. Otherwise ranks are
   assigned to the visible GPUs in turn. */
static int llm__device_of_rank(const llm_model_desc *desc, int current, int n) {
    int shard = desc->tensor ? desc->tensor->rank : 0, n_shards = desc->tensor ? desc->tensor->size : 1;
    return current ? current : (shard + n_shards * (desc->pipeline ? desc->pipeline->rank : 0)) % n;
}

/* Chooses the GPU and checks that it can run this: bf16 tensor cores need compute capability 8.0. Kernels may overlap
   only if both the chip and the compiled code support it. (If the driver compiles PTX that was made for older chips,
   its kernels do not wait.) */
static llm_status llm__find_gpu(llm__gpu_model *m, const llm_model_desc *desc, llm_error *err) {
    int n = 0, major = 0, minor = 0;
    cudaFuncAttributes code;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) {
        const char *why = cudaGetErrorString(cudaGetLastError());
        return llm__cuda_error(err, LLM_ERROR_DEVICE,
                               "no GPU can be used (%s); load without desc.backend to run on the CPU", why);
    }
    LLM__TRY(cudaGetDevice(&m->device));
    m->device = llm__device_of_rank(desc, m->device, n);
    LLM__TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, m->device));
    LLM__TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, m->device));
    LLM__TRY(cudaDeviceGetAttribute(&m->n_processors, cudaDevAttrMultiProcessorCount, m->device));
    LLM__TRY(cudaDeviceGetAttribute(&m->shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, m->device));
    LLM__TRY(cudaDeviceGetAttribute(&m->block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, m->device));
    if (major < 8)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED,
                               "the GPU has compute capability %d.%d; 8.0 or newer is needed", major, minor);
    LLM__TRY(cudaFuncGetAttributes(&code, llm__pick));
    m->can_overlap = major >= 9 && code.ptxVersion >= 90;
    return LLM_OK;
}

static llm_status llm__check_shape(const llm_backend_shape *s, llm_dtype dtype, llm_error *err) {
    if (dtype == LLM_DTYPE_F32 || dtype == LLM_DTYPE_FILE)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED,
                               "on the GPU weights are bf16, f16, int8 or int4; desc.dtype asks for %s",
                               llm_dtype_name(dtype));
    if (s->n_vocab > LLM__MAX_VOCAB)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED,
                               "the vocabulary has %d tokens; the GPU backend supports at most %d", s->n_vocab,
                               (int)LLM__MAX_VOCAB);
    if (s->head_dim > LLM__MAX_HEAD_DIM)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED,
                               "heads have %d dimensions; the GPU backend supports at most %d", s->head_dim,
                               (int)LLM__MAX_HEAD_DIM);
    if (s->n_heads / s->n_kv_heads > LLM__MAX_GROUP)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "%d query heads share a key head; on the GPU at most %d can",
                               s->n_heads / s->n_kv_heads, (int)LLM__MAX_GROUP);
    return LLM_OK;
}

static size_t llm__staging_bytes(const llm_backend_shape *s) {
    int q = s->n_heads * s->head_dim, most = s->n_embd > s->n_ff ? s->n_embd : s->n_ff;
    size_t row = (size_t)llm__pad(most > q ? most : q, LLM__PAD) * 2;
    return row > LLM__STAGING ? row : (size_t)LLM__STAGING;
}

static llm_status llm__open_gpu(llm__gpu_model *m, const llm_model_desc *desc, llm_error *err) {
    llm_status status = llm__find_gpu(m, desc, err);
    if (!status) status = llm__check_shape(&m->whole, desc->dtype, err);
    if (status) return status;
    llm__on_device on(m->device);
    size_t frequencies = ((size_t)m->shape.rope_dim / 2 + 1) * sizeof(double);
    m->layers = (llm__gpu_layer *)llm__host_zero(&m->host, (size_t)m->shape.n_layers * sizeof *m->layers, err);
    if (!m->layers) return LLM_ERROR_MEMORY;
    LLM__TRY(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; i++) {
        LLM__TRY(cudaMallocHost((void **)&m->staging[i], llm__staging_bytes(&m->whole)));
        LLM__TRY(cudaEventCreateWithFlags(&m->sent[i], cudaEventDisableTiming));
    }
    LLM__TRY(cudaMalloc((void **)&m->frequencies, frequencies));
    memcpy(m->staging[0], m->shape.rope_frequencies, (size_t)m->shape.rope_dim / 2 * sizeof(double));
    LLM__TRY(cudaMemcpyAsync(m->frequencies, m->staging[0], frequencies, cudaMemcpyHostToDevice, m->stream));
    LLM__TRY(cudaStreamSynchronize(m->stream));
    return LLM_OK;
}

static llm_status llm__gpu_open(void **out, const llm_backend_shape *shape, const llm_model_desc *desc,
                                llm_cuda_mode mode, llm_error *err) {
    *out = NULL;
    llm__gpu_model *m = (llm__gpu_model *)llm__host_zero(&desc->host, sizeof *m, err);
    *out = m;
    if (!m) return LLM_ERROR_MEMORY;
    m->host = desc->host;
    m->whole = *shape;
    m->own = llm_backend_find_ranks(shape, desc->tensor, desc->pipeline);
    m->shape = m->own.shape;
    m->group = shape->n_heads / shape->n_kv_heads;
    m->is_first_stage = !desc->pipeline || desc->pipeline->rank == 0;
    m->is_last_stage = !desc->pipeline || desc->pipeline->rank == desc->pipeline->size - 1;
    m->mode = mode;
    m->dtype = desc->dtype;
    m->n_threads = desc->n_threads;
    return llm__open_gpu(m, desc, err);
}

static llm_status llm__open_graph(void **out, const llm_backend_shape *shape, const llm_model_desc *desc,
                                  llm_error *err) {
    return llm__gpu_open(out, shape, desc, LLM_CUDA_GRAPH, err);
}

static llm_status llm__open_fused(void **out, const llm_backend_shape *shape, const llm_model_desc *desc,
                                  llm_error *err) {
    return llm__gpu_open(out, shape, desc, LLM_CUDA_FUSED, err);
}

static llm_status llm__open_eager(void **out, const llm_backend_shape *shape, const llm_model_desc *desc,
                                  llm_error *err) {
    return llm__gpu_open(out, shape, desc, LLM_CUDA_EAGER, err);
}

static void llm__matrix_free(llm__gpu_matrix m) {
    cudaFree(m.data);
    cudaFree(m.scales);
}

static void llm__gpu_close(void *model) {
    llm__gpu_model *m = (llm__gpu_model *)model;
    if (!m) return;
    llm__on_device on(m->device);
    if (m->stream) cudaStreamSynchronize(m->stream);
    for (int i = 0; m->layers && i < m->shape.n_layers; i++) {
        llm__gpu_layer *layer = &m->layers[i];
        llm__gpu_matrix matrices[] = {layer->qkv, layer->attention_out, layer->gate_up, layer->down};
        for (int j = 0; j < 4; j++) llm__matrix_free(matrices[j]);
        float *vectors[] = {layer->attention_norm, layer->ffn_norm, layer->qkv_bias, layer->q_norm, layer->k_norm};
        for (int j = 0; j < 5; j++) cudaFree(vectors[j]);
    }
    if (m->head.data != m->embedding.data) llm__matrix_free(m->head); /* otherwise they are one matrix, or both NULL */
    llm__matrix_free(m->embedding);
    cudaFree(m->output_norm);
    cudaFree(m->frequencies);
    for (int i = 0; i < 2; i++) {
        if (m->sent[i]) cudaEventDestroy(m->sent[i]);
        if (m->staging[i]) cudaFreeHost(m->staging[i]);
    }
    if (m->stream) cudaStreamDestroy(m->stream);
    llm_host host = m->host;
    if (m->layers) llm__host_free(&host, m->layers);
    llm__host_free(&host, m);
}

/* Copies from memory that is not pinned. The copy is complete when this returns. */
static cudaError_t llm__copy_in(llm__gpu_model *m, void *to, const void *from, size_t bytes) {
    cudaError_t result = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, m->stream);
    return result == cudaSuccess ? cudaStreamSynchronize(m->stream) : result;
}

/* The conversion of rows [first, first + n) of a weight into a pinned buffer. */
typedef struct llm__conversion {
    const llm_backend_weight *weight;
    llm__gpu_matrix matrix; /* with n rows, in the buffer */
    int first, n_threads;
    size_t scratch_bytes; /* per thread, see llm__conversion_bytes */
    uint8_t *scratch;
} llm__conversion;

/* Bytes of scratch memory per thread: a row of floats, then a row of groups, or one of bf16 or int8. */
static size_t llm__conversion_bytes(const llm_backend_weight *weight) {
    size_t n = (size_t)llm__pad(weight->cols, 64);
    static_assert(sizeof(llm_backend_group) <= 32 * 2, "a row of bf16 is longer than one of groups");
    return n * sizeof(float) + n * 2;
}

static void llm__bf16_row(const float *row, int n, uint16_t *out) {
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &row[i], 4);
        out[i] = llm__chip_round_bits(bits);
    }
}

/* Rounds to the nearest f16, ties to even. A number that is too large becomes infinite, as on the CPU. */
static uint16_t llm__round_to_f16(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000u;
    bits &= 0x7FFFFFFFu;
    if (bits >= 0x47800000u) return (uint16_t)(sign | (bits > 0x7F800000u ? 0x7E00u : 0x7C00u)); /* 65536 and up; NaN */
    if (bits >= 0x38800000u) return (uint16_t)(sign | (bits - 0x38000000u + 0xFFFu + (bits >> 13 & 1)) >> 13);
    float steps = fabsf(x) + 0.5f; /* f16 below 2^-14 are multiples of 2^-24, like floats around 0.5 */
    memcpy(&bits, &steps, 4);
    return (uint16_t)(sign | (bits - 0x3F000000u));
}

/* q = round(127 w / max|row|), the same numbers as on the CPU. Returns the scale. */
static float llm__int8_row(const float *row, int n, int8_t *out) {
    float most = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(row[i]));
    double inverse = most > 0 ? 127.0 / most : 0;
    for (int i = 0; i < n; i++) out[llm__chip_byte_place(i)] = (int8_t)floor(row[i] * inverse + 0.5);
    return most / 127.0f;
}

/* The same groups as on the CPU, in the order of llm__gpu_matrix. */
static void llm__group_row(int format, const llm_backend_group *groups, int n_groups, uint8_t *out, uint32_t *scales) {
    for (int g = 0; g < n_groups; g++) {
        scales[g] = groups[g].scale | (uint32_t)groups[g].minimum << 16;
        for (int t = 0; t < 4; t++) {
            const int8_t *q = groups[g].q + 8 * t;
            uint8_t *to = out + llm__matrix_group_place(format, 32 * g + 8 * t);
            uint32_t nibbles = 0;
            for (int i = 0; i < 8; i++) nibbles |= (uint32_t)(q[i] & 15) << (i / 2 * 4 + i % 2 * 16);
            if (format == LLM__INT4_GROUPS) memcpy(to, &nibbles, 4);
            else
                for (int i = 0; i < 8; i++) to[llm__chip_byte_place(i)] = (uint8_t)q[i];
        }
    }
}

/* Makes a row 2:4 that has its zeros. If more than two of a four are zero, so are numbers of its pair. */
static void llm__pair_row(llm__gpu_matrix m, const uint8_t *dense, uint8_t *out, uint8_t *places) {
    bool is_bf16 = m.format == LLM__BF16_2_4;
    for (int four = 0; four < m.k / 4; four++) {
        int pair = llm__matrix_pair(m.format, four), from[2] = {0, 0}, n = 0;
        for (int j = 0; j < 4 && n < 2; j++) {
            int i = 4 * four + j;
            uint16_t number = dense[llm__chip_byte_place(i)];
            if (is_bf16) memcpy(&number, dense + 2 * i, 2);
            if (number & 0x7FFF || j == 2 + n) from[n++] = j;
        }
        for (int j = 0; j < 2; j++) {
            int i = 4 * four + from[j], to = 2 * pair + j;
            if (is_bf16) memcpy(out + 2 * to, dense + 2 * i, 2);
            else out[llm__chip_byte_place(to)] = dense[llm__chip_byte_place(i)];
        }
        int pattern = from[0] == 0 ? from[1] - 1 : from[0] + from[1];
        places[pair / 2] |= (uint8_t)(pattern << pair % 2 * 4);
    }
}

/* Thread `index` takes every n_threads-th row. */
static void llm__convert_rows(const llm__conversion *c, int index) {
    const llm__gpu_matrix *m = &c->matrix;
    size_t row_bytes = llm__matrix_row_bytes(*m), row_places = llm__matrix_row_places(*m),
           row_scales = llm__matrix_row_scales(*m);
    int n_groups = llm__pad(c->weight->cols, 32) / 32, k = llm__pad(c->weight->cols, 64);
    bool is_2_4 = llm__matrix_is_2_4(m->format);
    float *row = (float *)(void *)(c->scratch + (size_t)index * c->scratch_bytes);
    llm_backend_group *groups = (llm_backend_group *)(void *)(row + k);
    for (int r = index; r < m->n; r += c->n_threads) {
        uint8_t *held = m->data + r * row_bytes, *places = m->places + r * row_places,
                *to = is_2_4 ? (uint8_t *)(row + k) : held;
        uint32_t *scales = m->scales + r * row_scales;
        memset(held, 0, row_bytes);
        memset(places, 0, row_places);
        memset(scales, 0, row_scales * 4);
        if (is_2_4) memset(to, 0, (size_t)k * 2);
        if (llm__matrix_has_groups(m->format)) {
            llm_backend_weight_groups(c->weight, c->first + r, row, groups);
            llm__group_row(m->format, groups, n_groups, to, scales);
            continue;
        }
        c->weight->read_row(c->weight, c->first + r, row);
        if (m->format == LLM__BF16 || m->format == LLM__BF16_2_4) {
            llm__bf16_row(row, c->weight->cols, (uint16_t *)(void *)to);
        } else if (m->format == LLM__F16) {
            for (int i = 0; i < c->weight->cols; i++) ((uint16_t *)(void *)to)[i] = llm__round_to_f16(row[i]);
        } else {
            float scale = llm__int8_row(row, c->weight->cols, (int8_t *)to);
            memcpy(scales, &scale, 4);
        }
        if (is_2_4) llm__pair_row(*m, to, held, places);
    }
}

static void llm__convert(llm__conversion *c, int n_threads) {
    std::thread threads[64];
    int n_started = 1; /* this thread counts; if no more threads can be started, it also does their work */
    c->n_threads = (size_t)c->matrix.n * c->weight->cols < 100000 ? 1 : n_threads < 64 ? n_threads : 64;
    for (; n_started < c->n_threads; n_started++) {
        try {
            threads[n_started] = std::thread(llm__convert_rows, c, n_started);
        } catch (...) {
            break;
        }
    }
    llm__convert_rows(c, 0);
    for (int i = n_started; i < c->n_threads; i++) llm__convert_rows(c, i);
    for (int i = 1; i < n_started; i++) threads[i].join();
}

/* A buffer holds rows, then their scales, then their places. */
static llm_status llm__upload_rows(llm__gpu_model *m, const llm_backend_weight *weight, uint8_t *scratch,
                                   llm__gpu_matrix matrix, llm_error *err) {
    size_t row_bytes = llm__matrix_row_bytes(matrix), scale_bytes = llm__matrix_row_scales(matrix) * 4,
           place_bytes = llm__matrix_row_places(matrix);
    int some = (int)(llm__staging_bytes(&m->whole) / llm__matrix_all_bytes(matrix));
    llm__conversion c = {weight, matrix, 0, 0, llm__conversion_bytes(weight), scratch};
    for (; c.first < weight->rows; c.first += some, m->turn ^= 1) {
        size_t n = (size_t)llm__min(weight->rows - c.first, some), first = (size_t)c.first;
        c.matrix.n = (int)n;
        c.matrix.data = m->staging[m->turn];
        c.matrix.scales = (uint32_t *)(void *)(c.matrix.data + n * row_bytes);
        c.matrix.places = c.matrix.data + n * (row_bytes + scale_bytes);
        LLM__TRY(cudaEventSynchronize(m->sent[m->turn]));
        llm__convert(&c, m->n_threads);
        LLM__TRY(cudaMemcpyAsync(matrix.data + first * row_bytes, c.matrix.data, n * row_bytes, cudaMemcpyHostToDevice,
                                 m->stream));
        if (scale_bytes)
            LLM__TRY(cudaMemcpyAsync(matrix.scales + first * (scale_bytes / 4), c.matrix.scales, n * scale_bytes,
                                     cudaMemcpyHostToDevice, m->stream));
        if (place_bytes)
            LLM__TRY(cudaMemcpyAsync(matrix.places + first * place_bytes, c.matrix.places, n * place_bytes,
                                     cudaMemcpyHostToDevice, m->stream));
        LLM__TRY(cudaEventRecord(m->sent[m->turn], m->stream));
    }
    return LLM_OK;
}

static llm_status llm__upload_matrix(llm__gpu_model *m, const llm_backend_weight *weight, llm__gpu_matrix *matrix,
                                     llm_error *err) {
    *matrix = llm__matrix_describe(m->dtype, weight);
    size_t n = (size_t)matrix->n, scale_bytes = n * llm__matrix_row_scales(*matrix) * 4,
           row_bytes = n * llm__matrix_row_bytes(*matrix);
    if (n == 0) return LLM_OK; /* this rank has no share of this matrix */
    if (scale_bytes) LLM__TRY(cudaMalloc((void **)&matrix->scales, scale_bytes));
    LLM__TRY(cudaMalloc((void **)&matrix->data, row_bytes + n * llm__matrix_row_places(*matrix)));
    matrix->places = matrix->data + row_bytes;
    uint8_t *scratch = (uint8_t *)llm__host_zero(&m->host, (size_t)m->n_threads * llm__conversion_bytes(weight), err);
    if (!scratch) return LLM_ERROR_MEMORY;
    llm_status status = llm__upload_rows(m, weight, scratch, *matrix, err);
    llm__host_free(&m->host, scratch);
    return status;
}

/* Uploads a norm or a bias, as floats. */
static llm_status llm__upload_vector(llm__gpu_model *m, const llm_backend_weight *weight, float **vector,
                                     llm_error *err) {
    size_t bytes = (size_t)weight->rows * (size_t)weight->cols * sizeof(float);
    if (bytes == 0) return LLM_OK;
    LLM__TRY(cudaMalloc((void **)vector, bytes));
    float *row = (float *)llm__host_zero(&m->host, bytes, err);
    if (!row) return LLM_ERROR_MEMORY;
    for (int i = 0; i < weight->rows; i++) weight->read_row(weight, i, row + (size_t)i * (size_t)weight->cols);
    cudaError_t result = llm__copy_in(m, *vector, row, bytes);
    llm__host_free(&m->host, row);
    return llm__cuda_check(result, "copying a vector to the GPU", err);
}

static llm_status llm__gpu_upload(void *model, const llm_backend_weight *w, llm_error *err) {
    llm__gpu_model *m = (llm__gpu_model *)model;
    llm__on_device on(m->device);
    llm__gpu_layer *layer = &m->layers[w->layer];
    llm_status status = LLM_OK;
    switch (w->kind) {
    case LLM_WEIGHT_EMBEDDING: status = llm__upload_matrix(m, w, &m->embedding, err); break;
    case LLM_WEIGHT_ATTENTION_NORM: return llm__upload_vector(m, w, &layer->attention_norm, err);
    case LLM_WEIGHT_QKV_BIAS: return llm__upload_vector(m, w, &layer->qkv_bias, err);
    case LLM_WEIGHT_Q_NORM: return llm__upload_vector(m, w, &layer->q_norm, err);
    case LLM_WEIGHT_K_NORM: return llm__upload_vector(m, w, &layer->k_norm, err);
    case LLM_WEIGHT_QKV: return llm__upload_matrix(m, w, &layer->qkv, err);
    case LLM_WEIGHT_ATTENTION_OUT: return llm__upload_matrix(m, w, &layer->attention_out, err);
    case LLM_WEIGHT_FFN_NORM: return llm__upload_vector(m, w, &layer->ffn_norm, err);
    case LLM_WEIGHT_GATE_UP: return llm__upload_matrix(m, w, &layer->gate_up, err);
    case LLM_WEIGHT_DOWN: return llm__upload_matrix(m, w, &layer->down, err);
    case LLM_WEIGHT_OUTPUT_NORM: return llm__upload_vector(m, w, &m->output_norm, err);
    case LLM_WEIGHT_HEAD: return llm__upload_matrix(m, w, &m->head, err);
    }
    if (m->shape.tied_head && m->is_last_stage) m->head = m->embedding;
    return status;
}

/* ==== 9 The context =============================================================================================

   A context is a stream and all the memory that a pass needs: one allocation on the GPU, and a pinned one on the host.
   The layout is computed twice: first to find the sizes, then to place the parts. */

enum {
    LLM__BUCKETS = 5,       /* passes of 1, 2, 4, 8 and 16 rows each have a graph              */
    LLM__AHEAD = 4,         /* passes of a burst that are queued after the one whose token is awaited */
    LLM__MESSAGE_HEAD = 64, /* bytes before the rows that go to the next stage of a pipeline   */
    LLM__LINK_HEAD = 256    /* bytes before the places for messages in a stage's box           */
};

typedef struct llm__recording {
    bool loaded;           /* its kernels are on the GPU                                              */
    bool refused;          /* it could not be recorded, so its kernels are launched one by one        */
    cudaGraphExec_t graph; /* NULL: not recorded so far                                               */
} llm__recording;

typedef struct llm__sizes {
    int n_embd, q, ffn, fused_rows, n_tables; /* strides of activations; rows the fused buffers have; tables  */
    int n_wide, n_squares, rows_ints;         /* widest product; sums of squares in a row; ints of llm__rows */
    size_t blas_bytes, widened;               /* workspace of cuBLAS; elements that are widened for it at a time */
    size_t meeting, message;                  /* bytes that ranks exchange at once; of a message to the next stage */
    size_t half;                              /* bytes of half a mailbox; 0: there is none */
    size_t place, link, leaving; /* bytes of a message's place, of a stage's box, and of a message that leaves it */
} llm__sizes;

/* How tensor ranks exchange rows. */
typedef enum llm__meet_way { LLM__MEET_ANY, LLM__MEET_HOST, LLM__MEET_PEERS, LLM__MEET_NCCL } llm__meet_way;

/* A mailbox of a tensor rank, or a stage's box. It is freed once neither its own rank nor other ranks of this process
   that have found it use it any more. */
typedef struct llm__meet_memory {
    uint8_t *data;
    cudaEvent_t arrived[2]; /* of a stage: its last message of even, of odd number has arrived at the next stage */
    int device, n_users;    /* n_users is atomic */
    bool opened;            /* it belongs to another process, and is closed instead of freed */
} llm__meet_memory;

/* The head of a stage's box; zero at first. Two places for messages from the previous stage follow LLM__LINK_HEAD bytes
   after its begin. */
typedef struct llm__link_head {
    unsigned n_taken; /* messages that this stage has copied from their places */
    unsigned unused;
    uint64_t probe; /* the first thing that the previous stage writes */
} llm__link_head;

static_assert(sizeof(llm__link_head) <= LLM__LINK_HEAD, "the places follow");

/* What a rank tells the others about itself. */
typedef struct llm__meet_address {
    uint64_t process;      /* a random number, which differs between processes           */
    llm__meet_memory *box; /* an address of that process                                 */
    int device;            /* its number in that process                                 */
    llm__meet_way asked;   /* the way that is wanted                                     */
    bool has_handle;       /* of the mailbox, which other processes can open             */
    bool has_events;       /* of a stage: handles of its events                          */
    bool has_gpu;          /* the next member is known                                   */
    cudaUUID_t gpu;        /* the GPU's number, which no other GPU in the world has      */
    char bus[32];          /* the GPU's PCI bus id                                       */
    char machine[40];      /* Linux's random number of the machine's start; "": unknown  */
    cudaIpcMemHandle_t handle;
    cudaIpcEventHandle_t arrived[2];
} llm__meet_address;

typedef struct llm__gpu_context {
    llm__gpu_model *model;
    llm_backend_desc desc;
    llm__queue queue;
    llm__sizes sizes;
    uint8_t *memory, *pinned;
    size_t memory_bytes, cache_bytes, pinned_bytes;
    llm__kv kv;
    int *rows, *host_rows;    /* the members of llm__rows point into this memory           */
    float *cosines, *sines;   /* [n_batch][rope_dim / 2]                                   */
    float *x, *kept_x, *wide; /* [n_batch][n_embd], the same, [n_batch][n_wide]            */
    llm__region *regions;     /* [4 * n_layers + 1] all matrices of weights                */
    uint16_t *normed, *q, *attention, *kept_attention, *ffn; /* [n_batch][padded]                 */
    float *squares; /* [fused_rows][n_squares]                                   */
    float *partial; /* see llm__attn_run                                           */
    unsigned *n_done;
    float *logits, *host_logits;       /* [n_logits][n_vocab]                                       */
    int *targets, *host_targets;       /* [2][n_batch] tokens, and the rows that predict them       */
    float *log_probs, *host_log_probs; /* [n_batch]                                               */
    void *blas_memory;
    uint16_t *widened; /* a piece of a matrix                                       */
    llm__recording passes[LLM__BUCKETS];
    llm__picker_state *picker, *host_picker;
    int *host_picked; /* [LLM_BACKEND_BURST]                                               */
    cudaEvent_t picked[LLM__AHEAD + 1];
    llm__recording burst_pass; /* a pass of one row, and picking the next token             */
    /* With ranks, all pinned: rows that they exchange, and the tokens of these rows; a message from the previous stage;
       two messages to the next stage, used in turn. */
    uint8_t *meeting, *incoming, *outgoing[2];
    int *meeting_tokens;
    llm__meet_memory *boxes[LLM__MEET_RANKS];     /* of the tensor ranks; those of others once they are found  */
    unsigned *host_late;                          /* llm__meet_box.late, pinned                                */
    llm__meet_address *addresses;                 /* of all tensor ranks                                       */
    llm__meet_way asked;                          /* the way that LLM_CUDA_RANKS names                         */
    bool looked_for_peers, has_peers;             /* has_peers: ranks meet in the GPUs' memory                 */
    void *nccl;                                   /* NCCL's communicator; NULL: NCCL is not used               */
    unsigned *host_progress;                      /* see llm__meet_clear_rows, pinned                          */
    bool can_record;                              /* NCCL's kernels may be recorded                            */
    bool has_room[LLM__ENDINGS][2][LLM__FORMATS]; /* products, by tiles - 1, that may have much shared memory */
    /* Links to the neighbouring stages of a pipeline, see there. */
    cudaStream_t copies;                         /* copies messages to the next stage                          */
    cudaEvent_t computed;                        /* the message to the next stage is in `leaving`              */
    uint8_t *leaving;                            /* on the GPU                                                 */
    llm__meet_memory *link, *previous, *next;    /* the boxes of this stage and of its neighbours              */
    llm__meet_address *stages;                   /* of all stages, pinned                                      */
    unsigned char *link_works;                   /* for each stage, see llm__link_choose_way                   */
    unsigned *host_taken;                        /* [2] messages taken here, and at the next stage; pinned     */
    uint64_t *host_probe;                        /* [2] the probe that is sent, and the one received; pinned   */
    bool looked_for_links, is_link_open;         /* is_link_open: another process may have opened a stage's box */
    bool is_sending_directly, is_given_directly; /* to the next stage; by the previous stage                  */
    int n_sent, n_received;
    bool cancelled, stopped; /* this pass; also the rest of the call, so that all stages end it together */
    bool is_box_open;        /* another process may have opened this rank's mailbox */
} llm__gpu_context;

/* Elements that are widened at a time: the whole of the largest matrix, or as many rows as fit into 64 MB, at least
   one. */
static size_t llm__widest_piece(const llm_backend_shape *s, const llm__sizes *z) {
    size_t k = (size_t)(z->n_embd > z->ffn ? z->n_embd : z->ffn),
           n = (size_t)(s->n_vocab > z->n_wide ? s->n_vocab : z->n_wide);
    if (k < (size_t)z->q) k = (size_t)z->q;
    size_t most = (size_t)32 << 20, all = n * k;
    return all < most ? all : k > most ? k : most;
}

/* Half a mailbox has room for what ranks exchange in a fused pass. Longer passes exchange a few rows at a time, in a
   few megabytes. */
static size_t llm__meet_half(const llm_backend_shape *s, const llm_backend_desc *d, const llm__sizes *z) {
    size_t row = (size_t)z->n_wide * 4,
           embedded = (size_t)s->n_embd * 4 + (size_t)z->n_embd * 2 + (size_t)z->n_squares * 4,
           logits = (size_t)s->n_vocab * 4, q = (size_t)z->q * 2, some = (size_t)8 << 20;
    if (!d->tensor || d->tensor->size > LLM__MEET_RANKS) return 0;
    if (row < embedded) row = embedded;
    if (row < q) row = q;
    if (row < logits) row = logits;
    row += LLM__MEET_PARTS * 256;
    size_t fused = (size_t)z->fused_rows * row, all = (size_t)d->n_batch * row;
    size_t half = fused > some ? fused : all < some ? all : some;
    return (half + 255) / 256 * 256;
}

/* The sizes are those of the whole model, even if a rank has only a share of it, so that all ranks have the same row
   strides. */
static llm__sizes llm__find_sizes(const llm_backend_shape *s, const llm_backend_desc *d) {
    llm__sizes z;
    int qkv = (s->n_heads + 2 * s->n_kv_heads) * s->head_dim;
    z.n_embd = llm__pad(s->n_embd, LLM__PAD);
    z.q = llm__pad(s->n_heads * s->head_dim, LLM__PAD);
    z.ffn = llm__pad(s->n_ff, LLM__PAD);
    z.fused_rows = llm__min(d->n_batch, LLM__FUSED_ROWS);
    z.n_tables = llm__min(d->n_seq, d->n_batch);
    z.n_wide = qkv > 2 * s->n_ff ? qkv : 2 * s->n_ff;
    if (z.n_wide < s->n_embd) z.n_wide = s->n_embd;
    z.n_squares = (s->n_embd + 15) / 16;
    z.rows_ints = 3 + 6 * llm__pad(d->n_batch, LLM__FUSED_ROWS) + z.n_tables * d->blocks_per_seq;
    z.blas_bytes = d->n_batch > LLM__FUSED_ROWS ? (size_t)32 << 20 : 0; /* recommended for cuBLAS on Hopper */
    z.widened = d->n_batch > LLM__FUSED_ROWS ? llm__widest_piece(s, &z) : 0;
    size_t row = (size_t)z.n_wide * 4, n_batch = (size_t)d->n_batch,
           logits = (size_t)d->n_logits * (size_t)s->n_vocab * 4;
    if (row < (size_t)z.q * 2) row = (size_t)z.q * 2;
    z.meeting = !d->tensor ? 0 : n_batch * row > logits ? n_batch * row : logits;
    z.half = llm__meet_half(s, d, &z);
    z.message = !d->pipeline ? 0
                             : LLM__MESSAGE_HEAD + n_batch * (size_t)s->n_embd * 4 +
                                   (size_t)z.fused_rows * (size_t)z.n_squares * 4;
    z.place = (z.message + 255) / 256 * 256;
    z.link = !d->pipeline ? 0 : LLM__LINK_HEAD + (d->pipeline->rank > 0 ? 2 * z.place : 0);
    z.leaving = d->pipeline && d->pipeline->rank < d->pipeline->size - 1 ? z.message : 0;
    return z;
}

/* Places the next `bytes` of a memory. */
static void *llm__part(uint8_t *memory, size_t *used, size_t bytes) {
    uint8_t *at = memory ? memory + *used : NULL;
    *used += (bytes + 255) / 256 * 256;
    return at;
}

static int llm__head_stride(const llm_backend_shape *s) { return llm__pad(s->head_dim, 32); }

static uint64_t llm__gpu_block_bytes(const llm_backend_shape *s, llm_dtype cache_dtype) {
    (void)cache_dtype;
    return (uint64_t)s->n_layers * 2 * (uint64_t)s->n_kv_heads * LLM_CACHE_BLOCK * (uint64_t)llm__head_stride(s) * 2;
}

/* Lays out c->memory: the cache, then everything else. If c->memory is NULL, it only computes the sizes. */
static void llm__lay_out(llm__gpu_context *c, const llm_backend_shape *s, int group) {
    const llm_backend_desc *d = &c->desc;
    const llm__sizes *z = &c->sizes;
    uint8_t *m = c->memory;
    size_t used = 0, n = (size_t)d->n_batch, half = (size_t)s->rope_dim / 2, fused = (size_t)z->fused_rows,
           n_logits = (size_t)d->n_logits;
    c->kv.n_heads = s->n_kv_heads;
    c->kv.stride = llm__head_stride(s);
    c->kv.block_size = (size_t)llm__gpu_block_bytes(s, d->cache_dtype) / 2;
    c->kv.data = (uint16_t *)llm__part(m, &used, (size_t)d->n_cache_blocks * c->kv.block_size * 2);
    c->cache_bytes = used;
    c->rows = (int *)llm__part(m, &used, (size_t)z->rows_ints * 4);
    c->cosines = (float *)llm__part(m, &used, n * half * 4);
    c->sines = (float *)llm__part(m, &used, n * half * 4);
    c->x = (float *)llm__part(m, &used, n * (size_t)s->n_embd * 4);
    c->kept_x = (float *)llm__part(m, &used, n * (size_t)s->n_embd * 4);
    c->wide = (float *)llm__part(m, &used, n * (size_t)z->n_wide * 4);
    c->normed = (uint16_t *)llm__part(m, &used, n * (size_t)z->n_embd * 2);
    c->q = (uint16_t *)llm__part(m, &used, n * (size_t)s->n_heads * (size_t)c->kv.stride * 2);
    c->attention = (uint16_t *)llm__part(m, &used, n * (size_t)z->q * 2);
    c->kept_attention = (uint16_t *)llm__part(m, &used, n * (size_t)z->q * 2);
    c->ffn = (uint16_t *)llm__part(m, &used, n * (size_t)z->ffn * 2);
    c->squares = (float *)llm__part(m, &used, fused * (size_t)z->n_squares * 4);
    c->partial = (float *)llm__part(
        m, &used, fused * (size_t)(s->n_kv_heads * group) * LLM__MAX_SPANS * (size_t)(c->kv.stride + 2) * 4);
    c->n_done = (unsigned *)llm__part(m, &used, fused * (size_t)s->n_kv_heads * 4);
    c->logits = (float *)llm__part(m, &used, n_logits * (size_t)s->n_vocab * 4);
    c->targets = (int *)llm__part(m, &used, 2 * n * 4);
    c->log_probs = (float *)llm__part(m, &used, n * 4);
    c->picker = (llm__picker_state *)llm__part(m, &used, sizeof *c->picker);
    c->regions = (llm__region *)llm__part(m, &used, (4 * (size_t)s->n_layers + 1) * sizeof *c->regions);
    c->blas_memory = llm__part(m, &used, z->blas_bytes);
    c->widened = (uint16_t *)llm__part(m, &used, z->widened * 2);
    c->leaving = (uint8_t *)llm__part(m, &used, z->leaving);
    c->memory_bytes = used;
    used = 0;
    c->host_rows = (int *)llm__part(c->pinned, &used, (size_t)z->rows_ints * 4);
    c->host_logits = (float *)llm__part(c->pinned, &used, n_logits * (size_t)s->n_vocab * 4);
    c->host_targets = (int *)llm__part(c->pinned, &used, 2 * n * 4);
    c->host_log_probs = (float *)llm__part(c->pinned, &used, n * 4);
    c->host_picker = (llm__picker_state *)llm__part(c->pinned, &used, sizeof *c->host_picker);
    c->host_picked = (int *)llm__part(c->pinned, &used, LLM_BACKEND_BURST * sizeof *c->host_picked);
    c->meeting = (uint8_t *)llm__part(c->pinned, &used, z->meeting);
    c->meeting_tokens = (int *)llm__part(c->pinned, &used, z->meeting ? n * 4 : 0);
    c->addresses =
        !d->tensor ? NULL
                   : (llm__meet_address *)llm__part(c->pinned, &used, (size_t)d->tensor->size * sizeof *c->addresses);
    c->host_progress = d->tensor ? (unsigned *)llm__part(c->pinned, &used, sizeof *c->host_progress) : NULL;
    c->host_late = z->half ? (unsigned *)llm__part(c->pinned, &used, 2 * sizeof *c->host_late) : NULL;
    size_t n_stages = d->pipeline ? (size_t)d->pipeline->size : 0;
    c->stages = (llm__meet_address *)llm__part(c->pinned, &used, n_stages * sizeof *c->stages);
    c->link_works = (unsigned char *)llm__part(c->pinned, &used, n_stages);
    c->host_taken = (unsigned *)llm__part(c->pinned, &used, n_stages ? 2 * sizeof *c->host_taken : 0);
    c->host_probe = (uint64_t *)llm__part(c->pinned, &used, n_stages ? 2 * sizeof *c->host_probe : 0);
    c->incoming = (uint8_t *)llm__part(c->pinned, &used, z->message);
    for (int i = 0; i < 2; i++) c->outgoing[i] = (uint8_t *)llm__part(c->pinned, &used, z->message);
    c->pinned_bytes = used;
}

static size_t llm__meet_bytes(const llm__sizes *z) { return z->half ? LLM__MEET_HEAD + 2 * z->half : 0; }

static uint64_t llm__gpu_scratch_bytes(const llm_backend_shape *s, const llm_backend_desc *d) {
    llm__gpu_context c;
    memset(&c, 0, sizeof c);
    c.desc = *d;
    llm_comm second; /* the stage that needs the most */
    if (d->pipeline) {
        second = *d->pipeline;
        second.rank = llm__min(1, second.size - 1);
        c.desc.pipeline = &second;
    }
    c.sizes = llm__find_sizes(s, &c.desc);
    llm__lay_out(&c, s, s->n_heads / s->n_kv_heads);
    return c.memory_bytes - c.cache_bytes + c.pinned_bytes + llm__meet_bytes(&c.sizes) + c.sizes.link;
}

static llm_status llm__blas_check(cublasStatus_t result, llm_error *err) {
    if (result == CUBLAS_STATUS_SUCCESS) return LLM_OK;
    return llm__cuda_error(err, result == CUBLAS_STATUS_ALLOC_FAILED ? LLM_ERROR_MEMORY : LLM_ERROR_DEVICE,
                           "cuBLAS failed with status %d", (int)result);
}

static llm_status llm__create_blas(llm__gpu_context *c, llm_error *err) {
    llm_status status = llm__blas_check(cublasCreate(&c->queue.blas), err);
    if (!status) status = llm__blas_check(cublasSetStream(c->queue.blas, c->queue.stream), err);
    if (!status) status = llm__blas_check(cublasSetWorkspace(c->queue.blas, c->blas_memory, c->sizes.blas_bytes), err);
    return status;
}

/* Creates a box of this rank, with zeroed memory. It may outlive the context, so its description is not allocated with
   the host's functions. */
static llm_status llm__meet_create(llm__gpu_context *c, llm__meet_memory **out, size_t bytes, llm_error *err) {
    const llm_host none = {};
    llm__meet_memory *box = *out = (llm__meet_memory *)llm__host_zero(&none, sizeof *box, err);
    if (!box) return LLM_ERROR_MEMORY;
    box->device = c->model->device;
    box->n_users = 1;
    LLM__TRY(cudaMalloc((void **)&box->data, bytes));
    LLM__TRY(cudaMemsetAsync(box->data, 0, bytes, c->queue.stream));
    return LLM_OK;
}

/* Creates what a stage needs for its links. Other processes can open its events, if the system supports that. */
static llm_status llm__link_create(llm__gpu_context *c, llm_error *err) {
    llm_status status = llm__meet_create(c, &c->link, c->sizes.link, err);
    if (status) return status;
    for (cudaEvent_t &event : c->link->arrived) {
        if (cudaEventCreateWithFlags(&event, cudaEventDisableTiming | cudaEventInterprocess) == cudaSuccess) continue;
        (void)cudaGetLastError();
        LLM__TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    }
    LLM__TRY(cudaEventCreateWithFlags(&c->computed, cudaEventDisableTiming));
    LLM__TRY(cudaStreamCreateWithFlags(&c->copies, cudaStreamNonBlocking));
    memset(c->host_taken, 0, 2 * sizeof *c->host_taken);
    return LLM_OK;
}

/* This rank uses a box no longer. */
static void llm__meet_leave(llm__meet_memory **box) {
    const llm_host none = {};
    llm__meet_memory *left = *box;
    *box = NULL;
    if (!left || __atomic_sub_fetch(&left->n_users, 1, __ATOMIC_ACQ_REL)) return;
    llm__on_device on(left->device);
    for (cudaEvent_t event : left->arrived)
        if (event) cudaEventDestroy(event);
    if (!left->opened) cudaFree(left->data);
    else if (left->data) cudaIpcCloseMemHandle(left->data);
    llm__host_free(&none, left);
}

/* Leaves the mailboxes of the other ranks. */
static void llm__meet_leave_others(llm__gpu_context *c) {
    for (int i = 0; c->desc.tensor && i < LLM__MEET_RANKS; i++)
        if (i != c->desc.tensor->rank) llm__meet_leave(&c->boxes[i]);
}

static double llm__seconds(void) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/* Waits until a call of NCCL is done, which returned `result`. Returns LLM__NCCL_IN_PROGRESS if it does not end in
   time. */
static int llm__nccl_settle(const llm__gpu_context *c, int result, double patience) {
    double start = llm__seconds();
    while (result == LLM__NCCL_IN_PROGRESS && llm__seconds() - start < patience) {
        std::this_thread::yield();
        int failure = llm__nccl_load()->get_async_error(c->nccl, &result);
        if (failure) result = failure;
    }
    return result;
}

static void llm__forget_graphs(llm__gpu_context *c) {
    for (int i = 0; i <= LLM__BUCKETS; i++) {
        llm__recording *r = i < LLM__BUCKETS ? &c->passes[i] : &c->burst_pass;
        if (r->graph) cudaGraphExecDestroy(r->graph);
        memset(r, 0, sizeof *r);
    }
}

/* Aborts NCCL's communicator. Its kernels then end, even if they wait for other ranks. Destroying a graph may wait for
   its kernels, and so for the abort; and the abort waits until no graph has such kernels. So they are done side by
   side. */
static void llm__nccl_abort(llm__gpu_context *c) {
    const llm__nccl_library *nccl = llm__nccl_load();
    std::thread aborting;
    try {
        aborting = std::thread([=] {
            llm__on_device on(c->model->device);
            nccl->abort(c->nccl);
        });
    } catch (...) {
        llm__forget_graphs(c); /* which waits for no kernel in newer versions of CUDA */
        nccl->abort(c->nccl);
        return;
    }
    llm__forget_graphs(c);
    aborting.join();
}

/* Ends NCCL's communicator. Unless the ranks do it together, and none of its kernels runs any more, it is aborted. */
static void llm__nccl_end(llm__gpu_context *c, bool together) {
    if (!c->nccl) return;
    const llm__nccl_library *nccl = llm__nccl_load();
    if (together) llm__forget_graphs(c);
    together = together && llm__nccl_settle(c, nccl->finalize(c->nccl), c->desc.tensor->patience) == LLM__NCCL_DONE;
    if (together) nccl->destroy(c->nccl);
    else llm__nccl_abort(c);
    c->nccl = NULL;
}

/* Memory must not be freed while another process uses it. So the ranks first wait until all have closed the mailboxes
   of the others, and until NCCL has no more work. If a rank does not come to that, this rank's mailbox stays until its
   process ends. */
static void llm__meet_free(llm__gpu_context *c) {
    llm_comm *tensor = c->desc.tensor;
    unsigned flags = 0;
    if (!tensor) return;
    const llm_exchange nothing = {NULL, 0, 0, 0, 0, tensor->size, NULL, 0};
    llm__meet_leave_others(c);
    bool together =
        (c->is_box_open || c->nccl) && !c->queue.parted.code && !tensor->exchange(tensor, &nothing, &flags, NULL);
    if (c->nccl) llm__nccl_end(c, together);
    if (c->sizes.half && (!c->is_box_open || together)) llm__meet_leave(&c->boxes[tensor->rank]);
}

/* The same for the stages of a pipeline. */
static void llm__link_free(llm__gpu_context *c) {
    llm_comm *pipeline = c->desc.pipeline;
    unsigned flags = 0;
    if (!pipeline) return;
    const llm_exchange nothing = {NULL, 0, 0, 0, 0, pipeline->size, NULL, 0};
    llm__meet_leave(&c->previous);
    llm__meet_leave(&c->next);
    bool together = c->is_link_open && !c->queue.parted.code && !pipeline->exchange(pipeline, &nothing, &flags, NULL);
    if (!c->is_link_open || together) llm__meet_leave(&c->link);
}

/* Which way LLM_CUDA_RANKS in the environment asks for. */
static llm_status llm__meet_ask_way(llm__gpu_context *c, llm_error *err) {
    static const struct {
        const char *name;
        llm__meet_way way;
    } ways[] = {{"", LLM__MEET_ANY}, {"host", LLM__MEET_HOST}, {"peer", LLM__MEET_PEERS}, {"nccl", LLM__MEET_NCCL}};
    const char *asked = getenv("LLM_CUDA_RANKS");
    for (const auto &way : ways) {
        if (strcmp(asked ? asked : "", way.name) != 0) continue;
        c->asked = way.way;
        if (c->asked != LLM__MEET_NCCL || !c->desc.tensor || !llm__nccl_load()->problem[0]) return LLM_OK;
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "LLM_CUDA_RANKS is nccl, but %s", llm__nccl_load()->problem);
    }
    return llm__cuda_error(err, LLM_ERROR_ARGUMENT, "LLM_CUDA_RANKS is \"%s\"; it may be host, peer or nccl", asked);
}

static llm_status llm__create_context(llm__gpu_context *c, llm_error *err) {
    const llm_backend_shape *s = &c->model->shape;
    if (c->desc.cache_dtype != LLM_DTYPE_BF16)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "on the GPU the KV cache is bf16; cache_dtype asks for %s",
                               llm_dtype_name(c->desc.cache_dtype));
    if (c->desc.lender)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "on the GPU a context lends nothing to another");
    if (c->desc.n_batch > LLM__MAX_ROWS)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "n_batch is %d; on the GPU a pass has at most %d rows",
                               c->desc.n_batch, (int)LLM__MAX_ROWS);
    llm_status status = c->desc.tensor || c->desc.pipeline ? llm__meet_ask_way(c, err) : LLM_OK;
    if (status) return status;
    LLM__TRY(cudaStreamSynchronize(c->model->stream)); /* wait for the weights */
    LLM__TRY(cudaStreamCreateWithFlags(&c->queue.stream, cudaStreamNonBlocking));
    c->queue.can_overlap = c->model->can_overlap;
    for (int i = 0; i <= LLM__AHEAD; i++) LLM__TRY(cudaEventCreateWithFlags(&c->picked[i], cudaEventDisableTiming));
    c->sizes = llm__find_sizes(&c->model->whole, &c->desc);
    llm__lay_out(c, s, c->model->group);
    LLM__TRY(cudaMalloc((void **)&c->memory, c->memory_bytes));
    LLM__TRY(cudaMallocHost((void **)&c->pinned, c->pinned_bytes));
    llm__lay_out(c, s, c->model->group);
    size_t bytes = llm__meet_bytes(&c->sizes);
    if (bytes) status = llm__meet_create(c, &c->boxes[c->desc.tensor->rank], bytes, err);
    if (!status && c->desc.pipeline) status = llm__link_create(c, err);
    if (status) return status;
    if (c->host_late) memset(c->host_late, 0, 2 * sizeof *c->host_late);
    /* Padding must be zero, and is never written. */
    LLM__TRY(cudaMemsetAsync(c->memory, 0, c->memory_bytes, c->queue.stream));
    LLM__TRY(cudaStreamSynchronize(c->queue.stream));
    return c->sizes.blas_bytes ? llm__create_blas(c, err) : LLM_OK;
}

static void llm__gpu_context_free(void *context) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    if (!c) return;
    llm__on_device on(c->model->device);
    if (c->queue.stream) cudaStreamSynchronize(c->queue.stream);
    if (c->copies) cudaStreamSynchronize(c->copies);
    llm__forget_graphs(c);
    for (int i = 0; i <= LLM__AHEAD; i++)
        if (c->picked[i]) cudaEventDestroy(c->picked[i]);
    if (c->queue.blas) cublasDestroy(c->queue.blas);
    cudaFree(c->memory);
    llm__meet_free(c);
    llm__link_free(c);
    if (c->computed) cudaEventDestroy(c->computed);
    if (c->copies) cudaStreamDestroy(c->copies);
    if (c->pinned) cudaFreeHost(c->pinned);
    if (c->queue.stream) cudaStreamDestroy(c->queue.stream);
    llm_host host = c->desc.host;
    llm__host_free(&host, c);
}

static llm_status llm__gpu_context_create(void **out, void *model, const llm_backend_desc *desc, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)llm__host_zero(&desc->host, sizeof *c, err);
    *out = NULL;
    if (!c) return LLM_ERROR_MEMORY;
    c->model = (llm__gpu_model *)model;
    c->desc = *desc;
    llm__on_device on(c->model->device);
    llm_status status = llm__create_context(c, err);
    if (status) llm__gpu_context_free(c);
    else *out = c;
    return status;
}

/* ==== 10 Forward pass ============================================================================================ */

/* Places the arrays of llm__rows one after the other in `ints`, for `capacity` rows. */
static llm__rows llm__place_rows(const llm__gpu_context *c, const int *ints, int capacity) {
    llm__rows rows;
    rows.counts = ints;
    rows.tokens = ints + 3;
    rows.positions = rows.tokens + capacity;
    rows.slots = rows.positions + capacity;
    rows.logit_rows = rows.slots + capacity;
    rows.tile_first = rows.logit_rows + capacity;
    rows.tile_rows = rows.tile_first + capacity;
    rows.tables = rows.tile_rows + capacity;
    rows.blocks_per_seq = c->desc.blocks_per_seq;
    return rows;
}

/* Cuts the rows into tiles: runs of at most `most` neighbouring rows of one sequence. */
static int llm__make_tiles(const llm_backend_pass *pass, int most, int *first, int *n) {
    int n_tiles = 0;
    for (int row = 0; row < pass->n_rows; row++) {
        if (n_tiles && n[n_tiles - 1] < most && pass->seqs[row] == pass->seqs[row - 1]) {
            n[n_tiles - 1]++;
        } else {
            first[n_tiles] = row;
            n[n_tiles++] = 1;
        }
    }
    return n_tiles;
}

/* Sends the pass to the GPU, with the tables of its sequences. Returns the number of query tiles. */
static int llm__send_rows(llm__gpu_context *c, const llm_backend_pass *pass, int capacity) {
    llm__rows rows = llm__place_rows(c, c->host_rows, capacity);
    int slot = -1, n_tiles;
    for (int row = 0; row < pass->n_rows; row++) {
        int seq = pass->seqs[row], used = pass->positions[row] / LLM_CACHE_BLOCK + 1;
        if (row == 0 || seq != pass->seqs[row - 1]) slot++;
        ((int *)rows.tokens)[row] = pass->tokens[row];
        ((int *)rows.positions)[row] = pass->positions[row];
        ((int *)rows.slots)[row] = slot;
        memcpy((int *)rows.tables + (size_t)slot * c->desc.blocks_per_seq,
               pass->blocks + (size_t)seq * pass->blocks_per_seq, (size_t)used * sizeof(int));
    }
    memcpy((int *)rows.logit_rows, pass->logit_rows, (size_t)pass->n_logits * sizeof(int));
    n_tiles = llm__make_tiles(pass, LLM__TILE_QUERIES / c->model->group, (int *)rows.tile_first, (int *)rows.tile_rows);
    c->host_rows[0] = pass->n_rows;
    c->host_rows[1] = pass->n_logits;
    c->host_rows[2] = n_tiles;
    size_t n_ints = (size_t)(rows.tables - c->host_rows) + (size_t)(slot + 1) * (size_t)c->desc.blocks_per_seq;
    llm__queue_note(
        &c->queue,
        cudaMemcpyAsync(c->rows, c->host_rows, n_ints * sizeof(int), cudaMemcpyHostToDevice, c->queue.stream),
        "sending the rows");
    return n_tiles;
}

static llm__start llm__make_start(const llm__gpu_context *c, llm__rows rows, bool fused) {
    const llm__gpu_model *m = c->model;
    llm__start s;
    memset(&s, 0, sizeof s);
    s.rows = rows;
    s.embedding = m->embedding;
    s.first_token = m->own.vocab.first;
    s.frequencies = m->frequencies;
    s.cosines = c->cosines;
    s.sines = c->sines;
    s.rope_scale = m->shape.rope_scale;
    s.n_embd = m->shape.n_embd;
    s.half = m->shape.rope_dim / 2;
    s.is_given = !m->is_first_stage;
    s.x = c->x;
    if (!fused) return s;
    s.next_norm = m->layers[0].attention_norm;
    s.next_x = c->normed;
    s.next_stride = c->sizes.n_embd;
    s.next_squares = c->squares;
    return s;
}

static llm__qkv_store llm__make_store(const llm__gpu_context *c, int layer) {
    const llm_backend_shape *s = &c->model->shape;
    const llm__gpu_layer *l = &c->model->layers[layer];
    llm__qkv_store store = {c->kv,       c->q,       c->cosines,
                            c->sines,    s->n_heads, s->head_dim,
                            s->rope_dim, layer,      llm__divide_up(llm__divide_up(s->head_dim, 2), LLM__PAIRS),
                            l->qkv_bias, l->q_norm,  l->k_norm,
                            s->rms_eps};
    return store;
}

/* The max number of spans of a row: a pass of a single row then has about four blocks for every multiprocessor. This
   depends only on the whole model, so a row's answer depends neither on other rows nor on the number of ranks. */
static int llm__max_spans(const llm__gpu_model *m) {
    int n = 4 * m->n_processors / m->whole.n_kv_heads;
    return n < 1 ? 1 : llm__min(n, LLM__MAX_SPANS);
}

static llm__attn_run llm__make_attend(const llm__gpu_context *c, llm__rows rows, int layer) {
    const llm_backend_shape *s = &c->model->shape;
    llm__attn_run a;
    memset(&a, 0, sizeof a);
    a.rows = rows;
    a.kv = c->kv;
    a.q = c->q;
    a.out = c->attention + c->model->own.heads.first * s->head_dim;
    a.out_stride = c->sizes.q;
    a.n_heads = s->n_heads;
    a.head_dim = s->head_dim;
    a.layer = layer;
    a.group = c->model->group;
    a.skipped = c->model->own.heads.first - c->model->own.key_heads.first * c->model->group;
    a.window = s->window;
    a.scale = (float)(1.4426950408889634 / sqrt((double)s->head_dim));
    a.max_spans = llm__max_spans(c->model);
    a.partial = c->partial;
    a.n_done = c->n_done;
    return a;
}

typedef void (*llm__attention_fn)(llm__attn_run);

template <int COLUMNS> static llm__attention_fn llm__choose_dims(int head_stride) {
    if (head_stride <= 64) return llm__fused_attention<COLUMNS, 1>;
    return head_stride <= 128 ? llm__fused_attention<COLUMNS, 2> : llm__fused_attention<COLUMNS, 4>;
}

static llm__attention_fn llm__choose_attention(int n_columns, int head_stride) {
    if (n_columns <= 8) return llm__choose_dims<8>(head_stride);
    return n_columns <= 16 ? llm__choose_dims<16>(head_stride) : llm__choose_dims<32>(head_stride);
}

static llm__attention_fn llm__choose_tile_attention(int head_stride) {
    if (head_stride <= 64) return llm__tile_attention<2, 64>;
    return head_stride <= 128 ? llm__tile_attention<4, 64> : llm__tile_attention<8, 32>;
}

/* ---- Ranks ----

   As on the CPU, tensor ranks divide the outputs of each matrix. They exchange the results of attention, the results of
   SwiGLU, and the residual stream after each half of a layer. Every output is computed as on one GPU, with its sum in
   the same order, so in passes of up to 16 rows the bits are the same for any number of ranks. (In longer passes cuBLAS
   may choose another kernel for a matrix of another size.) The fused kernels need the residual stream only in the form
   in which the next product reads it: in bf16, with the sums of squares of its tiles.

   If the ranks run on one machine and their GPUs reach each other's memory, they exchange data there, see section 7b. A
   rank opens the mailboxes of ranks in other processes by CUDA's IPC handles. Otherwise NCCL exchanges the data, if it
   is installed and each rank is a process with a GPU of its own. Otherwise the data goes through the host and the comm.
   Both work across machines, too, but through the host an exchange costs two copies and two waits. */

/* Describes this rank, whose box is `box`. */
static void llm__meet_describe_self(const llm__gpu_context *c, llm__meet_memory *box, llm__meet_address *own) {
    static const uint64_t number = (uint64_t)std::random_device()() << 32 | std::random_device()();
    memset(own, 0, sizeof *own);
    own->process = number + (uint64_t)getpid(); /* a forked process has the same number */
    own->box = box;
    own->device = c->model->device;
    own->asked = c->asked;
    own->has_handle = box && cudaIpcGetMemHandle(&own->handle, box->data) == cudaSuccess;
    own->has_events = box && box->arrived[0];
    for (int i = 0; i < 2 && own->has_events; i++)
        own->has_events = cudaIpcGetEventHandle(&own->arrived[i], box->arrived[i]) == cudaSuccess;
    if (cudaDeviceGetPCIBusId(own->bus, (int)sizeof own->bus, own->device) != cudaSuccess) own->bus[0] = 0;
    cudaDeviceProp properties;
    own->has_gpu = cudaGetDeviceProperties(&properties, own->device) == cudaSuccess;
    if (own->has_gpu) own->gpu = properties.uuid;
    (void)cudaGetLastError();
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (!file) return;
    if (!fgets(own->machine, (int)sizeof own->machine, file)) own->machine[0] = 0;
    fclose(file);
}

/* Lets this rank's GPU use the memory of another GPU of this process. Returns false if it cannot. */
static bool llm__meet_reach(const llm__gpu_context *c, int device) {
    int can = 0;
    if (cudaDeviceCanAccessPeer(&can, c->model->device, device) == cudaSuccess && can) {
        cudaError_t result = cudaDeviceEnablePeerAccess(device, 0);
        can = result == cudaSuccess || result == cudaErrorPeerAccessAlreadyEnabled;
    }
    (void)cudaGetLastError(); /* it is not an error if access was enabled already */
    return can;
}

/* Opens a mailbox of another process. That process's GPU may be hidden from this one, which then cannot ask whether
   access is possible, and only tries it. Returns NULL if it is not possible. */
static llm__meet_memory *llm__meet_open(const llm__gpu_context *c, const llm__meet_address *other) {
    const llm_host none = {};
    int device = 0, can = 1;
    void *data = NULL;
    if (cudaDeviceGetByPCIBusId(&device, other->bus) == cudaSuccess && device != c->model->device &&
        cudaDeviceCanAccessPeer(&can, c->model->device, device) != cudaSuccess)
        can = 0;
    llm__meet_memory *box = can ? (llm__meet_memory *)llm__host_zero(&none, sizeof *box, NULL) : NULL;
    if (box && cudaIpcOpenMemHandle(&data, other->handle, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) {
        llm__host_free(&none, box);
        box = NULL;
    }
    (void)cudaGetLastError();
    if (!box) return NULL;
    box->data = (uint8_t *)data;
    box->device = c->model->device;
    box->n_users = 1;
    box->opened = true;
    return box;
}

/* Do two ranks have the same GPU? True also if that is not known. */
static bool llm__meet_share_gpu(const llm__meet_address *a, const llm__meet_address *b) {
    return !a->has_gpu || !b->has_gpu || memcmp(&a->gpu, &b->gpu, sizeof a->gpu) == 0;
}

/* Are two ranks on the same machine? */
static bool llm__meet_is_near(const llm__meet_address *own, const llm__meet_address *other) {
    return own->machine[0] && memcmp(own->machine, other->machine, sizeof own->machine) == 0;
}

/* Finds the mailbox of another rank. Returns NULL if this rank's GPU cannot use it. Two ranks on one GPU do not meet in
   its memory, because their kernels may not run at the same time. */
static llm__meet_memory *llm__meet_find(const llm__gpu_context *c, const llm__meet_address *own,
                                        const llm__meet_address *other) {
    if (!own->bus[0] || !other->bus[0] || llm__meet_share_gpu(own, other)) return NULL;
    if (own->process != other->process) {
        return llm__meet_is_near(own, other) && other->has_handle ? llm__meet_open(c, other) : NULL;
    }
    if (!llm__meet_reach(c, other->device)) return NULL;
    __atomic_add_fetch(&other->box->n_users, 1, __ATOMIC_ACQ_REL);
    return other->box;
}

static void llm__meet_log(const llm__gpu_context *c, const char *why) {
    const llm_host *host = &c->desc.host;
    const llm__nccl_library *nccl = c->nccl ? llm__nccl_load() : NULL;
    char line[400], way[40] = "in the host's memory";
    if (!host->log || c->desc.tensor->rank) return;
    if (c->has_peers) snprintf(way, sizeof way, "in the GPUs' memory");
    if (nccl) snprintf(way, sizeof way, "through NCCL %d.%d", nccl->version / 10000, nccl->version % 10000 / 100);
    snprintf(line, sizeof line, "CUDA: %d tensor ranks meet %s%s%s", c->desc.tensor->size, way, *why ? "; " : "", why);
    host->log(host->user, line);
}

/* Returns true if any tensor rank says so. */
static bool llm__meet_any(llm__gpu_context *c, bool here) {
    llm_comm *tensor = c->desc.tensor;
    const llm_exchange nothing = {NULL, 0, 0, 0, 0, tensor->size, NULL, 0};
    unsigned flags = here;
    if (!c->queue.parted.code) tensor->exchange(tensor, &nothing, &flags, &c->queue.parted);
    return flags || c->queue.parted.code;
}

/* All ranks find out whether each of them can reach all others' memory. */
static void llm__meet_find_peers(llm__gpu_context *c) {
    const llm_comm *tensor = c->desc.tensor;
    const llm__meet_address *all = c->addresses, *own = &all[tensor->rank];
    bool lacks = false;
    for (int i = 0; i < tensor->size; i++) c->is_box_open = c->is_box_open || all[i].process != own->process;
    for (int i = 0; i < tensor->size && !lacks; i++) {
        if (i == tensor->rank) continue;
        c->boxes[i] = llm__meet_find(c, own, &all[i]);
        lacks = !c->boxes[i];
    }
    lacks = llm__meet_any(c, lacks);
    if (c->queue.parted.code) return;
    c->has_peers = !lacks;
    if (lacks) llm__meet_leave_others(c);
    if (lacks) c->is_box_open = false; /* once the other ranks have begun the pass, whose exchanges follow */
}

/* The first exchange, of zeros. Since version 2.22, NCCL connects the ranks only when they exchange something, which
   takes long and must not be recorded. Returns LLM__NCCL_IN_PROGRESS if it is not done in time. */
static int llm__nccl_connect(llm__gpu_context *c, double patience) {
    const llm__nccl_library *nccl = llm__nccl_load();
    int rank = c->desc.tensor->rank, size = c->desc.tensor->size;
    double start = llm__seconds();
    float *data = c->wide; /* zero before the first pass */
    int result = nccl->group_start();
    int more = nccl->all_gather(data + rank, data, sizeof *data, LLM__NCCL_BYTES, c->nccl, c->queue.stream);
    if (more != LLM__NCCL_IN_PROGRESS && !result) result = more;
    more = nccl->all_reduce(data, data, (size_t)size, LLM__NCCL_WORDS, LLM__NCCL_SUM, c->nccl, c->queue.stream);
    if (more != LLM__NCCL_IN_PROGRESS && !result) result = more;
    more = llm__nccl_settle(c, nccl->group_end(), patience);
    if (!result) result = more;
    cudaError_t state = cudaErrorNotReady;
    while (result == LLM__NCCL_DONE && (state = cudaStreamQuery(c->queue.stream)) == cudaErrorNotReady) {
        std::this_thread::yield();
        (void)nccl->get_async_error(c->nccl, &result);
        if (result == LLM__NCCL_IN_PROGRESS) result = LLM__NCCL_DONE; /* NCCL works on it */
        if (llm__seconds() - start > patience) result = LLM__NCCL_IN_PROGRESS;
    }
    if (result == LLM__NCCL_DONE && state != cudaSuccess) result = LLM__NCCL_CUDA_ERROR;
    (void)cudaGetLastError(); /* it is no error that something is not done */
    return result;
}

/* Starts NCCL on all ranks. If any of them cannot, no rank uses it. Why this rank cannot goes to `why`. */
static void llm__nccl_start(llm__gpu_context *c, char *why, size_t size) {
    llm_comm *tensor = c->desc.tensor;
    const llm__nccl_library *nccl = llm__nccl_load();
    const int32_t first = 0;
    llm__nccl_id id = {};
    llm__nccl_config config = {sizeof config, 0xCAFEBEEF, 21400, 0};
    const llm_exchange x = {&id, 1, sizeof id, sizeof id, sizeof id, tensor->size, &first, 1};
    int result = LLM__NCCL_DONE;
    unsigned flags = 0;
    snprintf(why, size, "%s", nccl->problem);
    if (!*why && tensor->rank == 0) result = nccl->get_id(&id);
    flags = *why || result;
    if (tensor->exchange(tensor, &x, &flags, &c->queue.parted)) return;
    if (!flags) {
        double patience = LLM__NCCL_START * tensor->patience, usual = tensor->patience;
        result = nccl->init(&c->nccl, tensor->size, id, tensor->rank, &config);
        if (c->nccl) result = llm__nccl_settle(c, result, patience);
        if (result == LLM__NCCL_DONE) result = llm__nccl_connect(c, patience);
        tensor->patience = usual + 2 * patience; /* another rank may still wait for NCCL */
        flags = llm__meet_any(c, result != LLM__NCCL_DONE);
        tensor->patience = usual;
    }
    if (!flags) return;
    if (result == LLM__NCCL_IN_PROGRESS) snprintf(why, size, "NCCL does not start in time");
    else if (result) snprintf(why, size, "NCCL does not start: %s", nccl->get_error_string(result));
    else if (!*why) snprintf(why, size, "NCCL does not start on another rank");
    llm__nccl_end(c, false);
}

/* NCCL needs a GPU for each rank. It is used without being asked for only if each rank is a process. If a process has
   several, recorded graphs of NCCL's kernels may block each other. */
static void llm__meet_find_nccl(llm__gpu_context *c, llm__meet_way asked, char *why, size_t size) {
    const llm__meet_address *all = c->addresses;
    int n = c->desc.tensor->size;
    bool apart = true;
    c->can_record = true;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++) {
            apart = apart && !llm__meet_share_gpu(&all[i], &all[j]);
            c->can_record = c->can_record && all[i].process != all[j].process;
        }
    if (!apart) snprintf(why, size, "NCCL needs a GPU for each rank");
    else if (asked == LLM__MEET_NCCL || c->can_record) llm__nccl_start(c, why, size);
}

/* Before the first pass the ranks choose a way to exchange rows: the GPUs' memory, or NCCL, or the host's memory.
   LLM_CUDA_RANKS in the environment of any rank asks for one of them. */
static void llm__meet_choose_way(llm__gpu_context *c) {
    llm_comm *tensor = c->desc.tensor;
    char why[300] = "";
    if (!tensor || c->looked_for_peers || c->queue.parted.code) return;
    size_t n = sizeof *c->addresses * (size_t)tensor->size;
    const llm_exchange addresses = {c->addresses, 1, n, n, sizeof *c->addresses, tensor->size, NULL, 0};
    unsigned flags = 0;
    c->looked_for_peers = true;
    llm__meet_describe_self(c, c->sizes.half ? c->boxes[tensor->rank] : NULL, &c->addresses[tensor->rank]);
    if (tensor->exchange(tensor, &addresses, &flags, &c->queue.parted)) return;
    llm__meet_way asked = LLM__MEET_ANY;
    bool differs = false;
    for (int i = 0; i < tensor->size; i++) {
        llm__meet_way other = c->addresses[i].asked;
        differs = differs || (asked && other && other != asked);
        if (other) asked = other;
    }
    if (differs) {
        llm__cuda_error(&c->queue.parted, LLM_ERROR_ARGUMENT, "the ranks have different values of LLM_CUDA_RANKS");
        return;
    }
    if (c->sizes.half && (asked == LLM__MEET_ANY || asked == LLM__MEET_PEERS)) llm__meet_find_peers(c);
    if (!c->queue.parted.code && !c->has_peers && (asked == LLM__MEET_ANY || asked == LLM__MEET_NCCL))
        llm__meet_find_nccl(c, asked, why, sizeof why);
    if (c->queue.parted.code) return;
    if (asked == LLM__MEET_PEERS && !c->has_peers)
        llm__cuda_error(&c->queue.parted, LLM_ERROR_UNSUPPORTED,
                        "LLM_CUDA_RANKS is peer, but not every rank's GPU can use the memory of all others");
    else if (asked == LLM__MEET_NCCL && !c->nccl)
        llm__cuda_error(&c->queue.parted, LLM_ERROR_UNSUPPORTED, "LLM_CUDA_RANKS is nccl, but %s", why);
    else llm__meet_log(c, why);
}

/* Rows of n numbers of `size` bytes. Each rank has whole units of every row. */
typedef struct llm__shared_rows {
    void *data;
    size_t stride, n, unit, size; /* of rows, in numbers */
    bool by_token;                /* the rank that has a row's token has the whole row */
} llm__shared_rows;

/* The number of rows that ranks exchange. A recorded graph reads it on the GPU, because the passes of one bucket have
   different numbers of rows. */
typedef struct llm__meet_count {
    int n;
    const int *at; /* the number on the GPU; NULL: not there */
    int most;      /* its maximum                            */
} llm__meet_count;

static llm__meet_part llm__meet_describe(const llm__gpu_context *c, const llm__shared_rows &r, int first) {
    const llm_comm *tensor = c->desc.tensor;
    size_t n_units = (r.n + r.unit - 1) / r.unit, rank = (size_t)tensor->rank, size = (size_t)tensor->size;
    size_t begin = n_units * rank / size * r.unit, end = n_units * (rank + 1) / size * r.unit;
    llm__meet_part part = {};
    part.stride = r.stride * r.size;
    part.data = (uint8_t *)r.data + (size_t)first * part.stride;
    part.row_bytes = (unsigned)(r.n * r.size);
    part.first = (unsigned)((begin < r.n ? begin : r.n) * r.size);
    part.end = (unsigned)((end < r.n ? end : r.n) * r.size);
    size_t all = part.stride | part.row_bytes | r.unit * r.size; /* a power of two divides all if it divides this */
    part.word = all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 2;
    return part;
}

/* A meeting that has no parts so far. */
static llm__meet_run llm__meet_begin(const llm__gpu_context *c, llm__meet_count n) {
    const llm_comm *tensor = c->desc.tensor;
    const llm_backend_range vocab = c->model->own.vocab;
    llm__meet_run m = {};
    m.n_rows = n.n;
    m.count = n.at;
    m.first_token = vocab.first;
    m.end_token = vocab.first + vocab.n;
    m.rank = tensor->rank;
    m.size = tensor->size;
    return m;
}

/* The kernel for rows [first, first + most) of all parts. */
static void llm__meet_launch(llm__gpu_context *c, llm__meet_count n, std::initializer_list<llm__shared_rows> parts,
                             int first) {
    const llm_comm *tensor = c->desc.tensor;
    size_t used = 0;
    llm__meet_run m = llm__meet_begin(c, n);
    for (const llm__shared_rows &r : parts) {
        llm__meet_part *part = &m.parts[m.n_parts++];
        *part = llm__meet_describe(c, r, first);
        part->offset = used;
        used += ((size_t)n.most * part->stride + 255) / 256 * 256;
        if (r.by_token) m.tokens = c->rows + 3 + first;
    }
    for (int i = 0; i < tensor->size; i++) m.boxes[i] = c->boxes[i]->data;
    m.half = c->sizes.half;
    m.patience = (uint64_t)(tensor->patience * 1e9);
    int n_blocks = llm__min((int)(used / 4096) + 1, LLM__MEET_BLOCKS);
    llm__queue_launch(&c->queue, n.at ? LLM__OVERLAP : LLM__SERIAL, LLM__KIND_MEET, dim3((unsigned)n_blocks), 256,
                      llm__meet_ranks, m);
}

/* Exchanges rows through mailboxes. In a long pass it exchanges as many rows at a time as fit into half a mailbox. */
static void llm__meet_peers(llm__gpu_context *c, llm__meet_count n, std::initializer_list<llm__shared_rows> parts) {
    size_t row = 0;
    for (const llm__shared_rows &r : parts) row += r.stride * r.size;
    int some = (int)((c->sizes.half - LLM__MEET_PARTS * 256) / row);
    if (n.at) llm__meet_launch(c, n, parts, 0);
    for (int first = 0; first < n.n && !n.at; first += some) {
        int now = llm__min(n.n - first, some);
        llm__meet_launch(c, {now, NULL, now}, parts, first);
    }
}

/* Keeps what went wrong with NCCL. A result of LLM__NCCL_IN_PROGRESS means that the time was up. */
static void llm__nccl_note(llm__gpu_context *c, int result) {
    int rank = c->desc.tensor->rank;
    if (result == LLM__NCCL_DONE || c->queue.parted.code) return;
    if (result == LLM__NCCL_IN_PROGRESS)
        llm__cuda_error(&c->queue.parted, LLM_ERROR_DEVICE,
                        "another rank did not come to an exchange with rank %d; it has failed, hangs, or makes other "
                        "calls",
                        rank);
    else
        llm__cuda_error(&c->queue.parted, LLM_ERROR_DEVICE, "NCCL failed on rank %d: %s", rank,
                        llm__nccl_load()->get_error_string(result));
}

/* Waits until an event has come, or with NULL until the stream is done. Meanwhile it looks for failures of NCCL. If
   NCCL's kernels wait for longer than is allowed, it ends them. */
static void llm__nccl_await(llm__gpu_context *c, cudaEvent_t event) {
    double start = llm__seconds();
    unsigned seen = 0;
    while (c->nccl && (event ? cudaEventQuery(event) : cudaStreamQuery(c->queue.stream)) == cudaErrorNotReady) {
        unsigned progress = *(volatile unsigned *)c->host_progress;
        int failure = LLM__NCCL_DONE;
        if (progress != seen) start = llm__seconds();
        seen = progress;
        (void)llm__nccl_load()->get_async_error(c->nccl, &failure);
        if (failure != LLM__NCCL_IN_PROGRESS) llm__nccl_note(c, failure);
        if (llm__seconds() - start > c->desc.tensor->patience) llm__nccl_note(c, LLM__NCCL_IN_PROGRESS);
        if (c->queue.parted.code) llm__nccl_end(c, false);
        std::this_thread::yield();
    }
    (void)cudaGetLastError(); /* it is no error that something is not done */
}

/* The same with and without NCCL. */
static void llm__await(llm__gpu_context *c, cudaEvent_t event, const char *what) {
    if (c->nccl) llm__nccl_await(c, event);
    llm__queue_note(&c->queue, event ? cudaEventSynchronize(event) : cudaStreamSynchronize(c->queue.stream), what);
}

/* Are all ranks' shares of the rows equal, and there is only one row, so that the shares are one after the other? */
static bool llm__nccl_gathers(const llm__gpu_context *c, const llm__shared_rows &r, llm__meet_count n) {
    return n.most == 1 && !r.by_token && r.n % (r.unit * (size_t)c->desc.tensor->size) == 0;
}

/* Clears what this rank does not have, before NCCL adds up the rows of all ranks. */
static void llm__nccl_clear(llm__gpu_context *c, llm__meet_count n, std::initializer_list<llm__shared_rows> parts) {
    llm__meet_run m = llm__meet_begin(c, n);
    int n_words = 0;
    for (const llm__shared_rows &r : parts) {
        if (llm__nccl_gathers(c, r, n)) continue;
        llm__meet_part *part = &m.parts[m.n_parts++];
        *part = llm__meet_describe(c, r, 0);
        int words = (int)(part->row_bytes / part->word);
        if (n_words < words) n_words = words;
        if (r.by_token) m.tokens = c->rows + 3;
    }
    dim3 grid((unsigned)llm__divide_up(n_words, 1024), (unsigned)n.most); /* four words a thread */
    llm__queue_launch(&c->queue, n.at ? LLM__OVERLAP : LLM__SERIAL, LLM__KIND_CLEAR, grid, 256, llm__meet_clear_rows, m,
                      c->host_progress);
}

/* Exchanges rows with NCCL. A recorded graph exchanges as many rows as there can be. */
static void llm__meet_nccl(llm__gpu_context *c, llm__meet_count n, std::initializer_list<llm__shared_rows> parts) {
    const llm__nccl_library *nccl = llm__nccl_load();
    if (n.most == 0 || llm__queue_failed(&c->queue)) return;
    llm__nccl_clear(c, n, parts);
    int result = nccl->group_start();
    for (const llm__shared_rows &r : parts) {
        const llm__meet_part part = llm__meet_describe(c, r, 0);
        size_t share = part.end - part.first, bytes = (size_t)n.most * part.stride;
        int more = llm__nccl_gathers(c, r, n) ? nccl->all_gather(part.data + part.first, part.data, share,
                                                                 LLM__NCCL_BYTES, c->nccl, c->queue.stream)
                                              : nccl->all_reduce(part.data, part.data, bytes / 4, LLM__NCCL_WORDS,
                                                                 LLM__NCCL_SUM, c->nccl, c->queue.stream);
        if (more != LLM__NCCL_IN_PROGRESS && !result) result = more;
    }
    int more = llm__nccl_settle(c, nccl->group_end(), c->desc.tensor->patience);
    llm__nccl_note(c, result ? result : more);
    c->queue.is_after_nccl = true;
}

/* Exchanges rows through the host. If that fails, the queue keeps the error and reports it at the end of the pass. */
static void llm__meet_host(llm__gpu_context *c, int n_rows, const llm__shared_rows &r) {
    llm_comm *tensor = c->desc.tensor;
    llm__queue *queue = &c->queue;
    unsigned flags = 0;
    size_t stride = r.stride * r.size, bytes = (size_t)n_rows * stride;
    if (n_rows == 0 || llm__queue_failed(queue)) return;
    llm_exchange x = {
        c->meeting, (size_t)n_rows, stride, r.n * r.size, r.unit * r.size, (int)((r.n + r.unit - 1) / r.unit), NULL, 0};
    llm__queue_note(queue, cudaMemcpyAsync(c->meeting, r.data, bytes, cudaMemcpyDeviceToHost, queue->stream),
                    "fetching this rank's rows");
    if (r.by_token) {
        const llm_backend_ranks *own = &c->model->own;
        llm__queue_note(queue,
                        cudaMemcpyAsync(c->meeting_tokens, c->rows + 3, (size_t)n_rows * sizeof(int),
                                        cudaMemcpyDeviceToHost, queue->stream),
                        "fetching the tokens");
        x.unit_bytes = x.row_bytes;
        x.n_units = llm__divide_up(c->model->shape.n_vocab, own->vocab_unit);
        x.tokens = c->meeting_tokens;
        x.tokens_per_unit = own->vocab_unit;
    }
    llm__queue_note(queue, cudaStreamSynchronize(queue->stream), "fetching this rank's rows");
    if (llm__queue_failed(queue)) return;
    if (tensor->exchange(tensor, &x, &flags, &queue->parted)) return;
    llm__queue_note(queue, cudaMemcpyAsync(r.data, c->meeting, bytes, cudaMemcpyHostToDevice, queue->stream),
                    "sending the other ranks' rows");
}

/* Exchanges the rows of several arrays, which have the same number of rows. */
static void llm__meet(llm__gpu_context *c, llm__meet_count n, std::initializer_list<llm__shared_rows> parts) {
    if (!c->desc.tensor || c->queue.left_out >> LLM__KIND_MEET & 1) return;
    if (c->has_peers) llm__meet_peers(c, n, parts);
    else if (c->nccl) llm__meet_nccl(c, n, parts);
    else
        for (const llm__shared_rows &r : parts) llm__meet_host(c, n.n, r);
}

/* The number of rows of a pass without a graph. */
static llm__meet_count llm__meet_all(int n) { return {n, NULL, n}; }

/* Queues a copy to the host of the flag that says whether a rank did not come. */
static void llm__meet_ask(llm__gpu_context *c) {
    if (!c->has_peers || llm__queue_failed(&c->queue)) return;
    const llm__meet_box *own = (const llm__meet_box *)(void *)c->boxes[c->desc.tensor->rank]->data;
    llm__queue_note(
        &c->queue, cudaMemcpyAsync(c->host_late, &own->late, sizeof own->late, cudaMemcpyDeviceToHost, c->queue.stream),
        "asking whether all ranks came");
}

static void llm__meet_check(llm__gpu_context *c) {
    if (!c->has_peers || c->queue.parted.code || !*c->host_late) return;
    llm__cuda_error(&c->queue.parted, LLM_ERROR_DEVICE,
                    "rank %d did not come to a meeting with rank %d; it has failed, hangs, or makes other calls",
                    (int)*c->host_late - 1, c->desc.tensor->rank);
}

/* Ends the waiting of the other ranks and tells them which rank failed, if this rank's GPU can still be used. */
static void llm__meet_end(llm__gpu_context *c) {
    llm__nccl_end(c, false);
    if (!c->has_peers) return;
    const llm_comm *tensor = c->desc.tensor;
    c->host_late[1] = *c->host_late ? *c->host_late : (unsigned)tensor->rank + 1;
    for (int i = 0; i < tensor->size; i++) {
        llm__meet_box *box = (llm__meet_box *)(void *)c->boxes[i]->data;
        if (i != tensor->rank)
            (void)cudaMemcpyAsync(&box->ended, &c->host_late[1], sizeof box->ended, cudaMemcpyHostToDevice,
                                  c->queue.stream);
    }
    (void)cudaStreamSynchronize(c->queue.stream);
    (void)cudaGetLastError();
}

static void llm__meet_attention(llm__gpu_context *c, llm__meet_count n) {
    const llm_backend_shape *s = &c->model->whole;
    size_t head_dim = (size_t)s->head_dim;
    llm__meet(c, n, {{c->attention, (size_t)c->sizes.q, (size_t)s->n_heads * head_dim, head_dim, 2, false}});
}

static void llm__meet_ffn(llm__gpu_context *c, llm__meet_count n) {
    llm__meet(c, n,
              {{c->ffn, (size_t)c->sizes.ffn, (size_t)c->model->shape.n_ff, (size_t)c->model->own.ff_unit, 2, false}});
}

static void llm__meet_x(llm__gpu_context *c, float *x, llm__meet_count n) {
    size_t n_embd = (size_t)c->model->shape.n_embd;
    llm__meet(c, n, {{x, n_embd, n_embd, (size_t)c->model->own.embd_unit, 4, false}});
}

/* Exchanges the inputs of the next product. A unit is a tile, which has one sum of squares. */
static void llm__meet_normed(llm__gpu_context *c, llm__meet_count n) {
    size_t n_squares = (size_t)c->sizes.n_squares, unit = (size_t)c->model->own.embd_unit;
    llm__meet(c, n,
              {{c->normed, (size_t)c->sizes.n_embd, (size_t)c->model->shape.n_embd, unit, 2, false},
               {c->squares, n_squares, n_squares, unit / 16, 4, false}});
}

static void llm__meet_logits(llm__gpu_context *c, float *logits, llm__meet_count n) {
    size_t n_vocab = (size_t)c->model->shape.n_vocab;
    llm__meet(c, n, {{logits, n_vocab, n_vocab, (size_t)c->model->own.vocab_unit, 4, false}});
}

/* Exchanges the embedded rows. A row comes from the rank that has its token. */
static void llm__meet_embedded(llm__gpu_context *c, llm__meet_count count, bool fused) {
    size_t n = (size_t)c->model->shape.n_embd, n_squares = (size_t)c->sizes.n_squares;
    const llm__shared_rows x = {c->x, n, n, n, 4, true}, normed = {c->normed, (size_t)c->sizes.n_embd, n, n, 2, true},
                           squares = {c->squares, n_squares, n_squares, n_squares, 4, true};
    if (!c->model->is_first_stage) return;
    if (fused) llm__meet(c, count, {x, normed, squares});
    else llm__meet(c, count, {x});
}

/* Returns true if any tensor rank wants to cancel. */
static bool llm__poll_cancel(llm__gpu_context *c, const llm_backend_pass *pass) {
    bool cancel = pass->cancel && pass->cancel(pass->cancel_user);
    return c->desc.tensor ? llm__meet_any(c, cancel) : cancel;
}

/* ---- Stages of a pipeline ----

   A stage sends the residual stream of each pass to the next stage. If its GPU can write into the memory of the next
   stage's GPU, a copy engine does that on a stream of its own, while the next pass is computed. The rows are first
   copied to `leaving`, because the next pass overwrites them. From there they go to one of two places in the next
   stage's box. That stage is told by a short message through the comm, waits for the event that follows the copy, and
   copies the rows from their place. No kernel waits for another stage, so stages may share a GPU. Hosts wait for other
   stages no longer than llm_comm.patience. In other processes, boxes and events are opened by CUDA's IPC handles.

   A link that cannot do that sends the rows with the message, through the host's memory. Each link has its own way. */

/* Bytes of a message to the next stage: a flag, its own size, the residual stream, and in a fused pass the sums of
   squares of its tiles. */
static size_t llm__message_bytes(const llm__gpu_context *c, int n, bool fused) {
    return LLM__MESSAGE_HEAD + (size_t)n * (size_t)(c->model->shape.n_embd + (fused ? c->sizes.n_squares : 0)) * 4;
}

/* Copies the rows of the pass to a message (`sends`), or from a message. */
static void llm__copy_message(llm__gpu_context *c, uint8_t *message, int n, bool fused, bool sends,
                              cudaMemcpyKind kind) {
    size_t x_bytes = (size_t)n * (size_t)c->model->shape.n_embd * 4,
           squares = (size_t)n * (size_t)c->sizes.n_squares * 4;
    const struct {
        void *rows, *there;
        size_t bytes;
    } parts[2] = {{c->x, message + LLM__MESSAGE_HEAD, x_bytes},
                  {c->squares, message + LLM__MESSAGE_HEAD + x_bytes, fused ? squares : 0}};
    for (const auto &part : parts)
        if (part.bytes)
            llm__queue_note(&c->queue,
                            cudaMemcpyAsync(sends ? part.there : part.rows, sends ? part.rows : part.there, part.bytes,
                                            kind, c->queue.stream),
                            "a message between stages");
}

/* Where message i is in a stage's box. */
static uint8_t *llm__link_place(const llm__gpu_context *c, const llm__meet_memory *box, int i) {
    return box->data + LLM__LINK_HEAD + (size_t)(i % 2) * c->sizes.place;
}

/* Queues a copy from `leaving` to the next stage's box. */
static cudaError_t llm__link_copy(const llm__gpu_context *c, void *to, const void *from, size_t bytes) {
    if (c->next->opened) return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, c->copies);
    return cudaMemcpyPeerAsync(to, c->next->device, from, c->model->device, bytes, c->copies);
}

/* Waits until the next stage has taken the message whose place is needed now, the last but one. */
static void llm__link_await_place(llm__gpu_context *c) {
    const llm__link_head *head = (const llm__link_head *)(void *)c->next->data;
    double start = llm__seconds();
    while ((int)c->host_taken[1] < c->n_sent - 1 && !llm__queue_failed(&c->queue)) {
        llm__queue_note(
            &c->queue,
            cudaMemcpyAsync(&c->host_taken[1], &head->n_taken, sizeof head->n_taken, cudaMemcpyDeviceToHost, c->copies),
            "asking for the next stage's progress");
        llm__queue_note(&c->queue, cudaStreamSynchronize(c->copies), "asking for the next stage's progress");
        if ((int)c->host_taken[1] >= c->n_sent - 1 || llm__queue_failed(&c->queue)) return;
        if (llm__seconds() - start > c->desc.pipeline->patience)
            llm__cuda_error(
                &c->queue.parted, LLM_ERROR_DEVICE,
                "rank %d of the pipeline did not take a message of rank %d in time; it has failed, or hangs",
                c->desc.pipeline->rank + 1, c->desc.pipeline->rank);
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
}

/* Waits until a message of the previous stage has arrived. Returns false if it does not come in time. */
static bool llm__link_await_arrival(const llm__gpu_context *c, int message, double patience) {
    double start = llm__seconds();
    cudaError_t state;
    while ((state = cudaEventQuery(c->previous->arrived[message % 2])) == cudaErrorNotReady &&
           llm__seconds() - start < patience)
        std::this_thread::yield();
    (void)cudaGetLastError(); /* it is no error that something is not done */
    return state == cudaSuccess;
}

/* Queues the copy of this pass's rows to the next stage. */
static void llm__link_send(llm__gpu_context *c, int n, bool fused) {
    llm__queue *queue = &c->queue;
    const size_t head = LLM__MESSAGE_HEAD;
    int i = c->n_sent;
    llm__queue_note(queue, cudaStreamWaitEvent(queue->stream, c->link->arrived[(i + 1) % 2]),
                    "waiting until the previous message has left");
    llm__copy_message(c, c->leaving, n, fused, true, cudaMemcpyDeviceToDevice);
    llm__queue_note(queue, cudaEventRecord(c->computed, queue->stream), "marking a message");
    llm__link_await_place(c);
    if (llm__queue_failed(queue)) return;
    llm__queue_note(queue, cudaStreamWaitEvent(c->copies, c->computed), "waiting for the rows");
    llm__queue_note(queue,
                    llm__link_copy(c, llm__link_place(c, c->next, i) + head, c->leaving + head,
                                   llm__message_bytes(c, n, fused) - head),
                    "copying to the next stage");
    llm__queue_note(queue, cudaEventRecord(c->link->arrived[i % 2], c->copies), "marking a copy");
}

/* Takes the rows of a message from their place, and tells the previous stage. */
static void llm__link_take(llm__gpu_context *c, int n, bool fused) {
    llm__link_head *head = (llm__link_head *)(void *)c->link->data;
    if (!llm__link_await_arrival(c, c->n_received, c->desc.pipeline->patience)) {
        llm__cuda_error(&c->queue.parted, LLM_ERROR_DEVICE,
                        "the rows of rank %d of the pipeline did not arrive at rank %d; it has failed, or hangs",
                        c->desc.pipeline->rank - 1, c->desc.pipeline->rank);
        return;
    }
    llm__copy_message(c, llm__link_place(c, c->link, c->n_received), n, fused, false, cudaMemcpyDeviceToDevice);
    c->host_taken[0] = (unsigned)++c->n_received; /* which is not changed before the end of this pass */
    llm__queue_note(
        &c->queue,
        cudaMemcpyAsync(&head->n_taken, c->host_taken, sizeof head->n_taken, cudaMemcpyHostToDevice, c->queue.stream),
        "telling that a message was taken");
}

/* Opens the events of the previous stage, which is another process. Returns NULL if that is not possible. */
static llm__meet_memory *llm__link_open_events(const llm__gpu_context *c, const llm__meet_address *other) {
    const llm_host none = {};
    llm__meet_memory *box = (llm__meet_memory *)llm__host_zero(&none, sizeof *box, NULL);
    if (!box) return NULL;
    box->device = c->model->device;
    box->n_users = 1;
    box->opened = true;
    for (int i = 0; i < 2 && box; i++)
        if (cudaIpcOpenEventHandle(&box->arrived[i], other->arrived[i]) != cudaSuccess) {
            box->arrived[i] = NULL;
            llm__meet_leave(&box);
        }
    (void)cudaGetLastError();
    return box;
}

/* Finds the box of a neighbour: of the next stage for its memory, or of the previous one for its events. Returns NULL
   if this stage cannot use it. */
static llm__meet_memory *llm__link_find(const llm__gpu_context *c, const llm__meet_address *own,
                                        const llm__meet_address *other, bool is_next) {
    if (!own->bus[0] || !other->bus[0]) return NULL;
    if (own->process != other->process) {
        if (!llm__meet_is_near(own, other) || !other->has_handle || !other->has_events) return NULL;
        return is_next ? llm__meet_open(c, other) : llm__link_open_events(c, other);
    }
    if (is_next && other->device != own->device && !llm__meet_reach(c, other->device)) return NULL;
    __atomic_add_fetch(&other->box->n_users, 1, __ATOMIC_ACQ_REL);
    return other->box;
}

/* Writes a number into the next stage's box, in the way in which rows go there. Returns false if that is not
   possible. */
static bool llm__link_send_probe(llm__gpu_context *c) {
    llm__link_head *head = (llm__link_head *)(void *)c->next->data;
    size_t bytes = sizeof head->probe;
    c->host_probe[0] = c->stages[c->desc.pipeline->rank].process;
    bool sent = cudaMemcpyAsync(c->leaving, c->host_probe, bytes, cudaMemcpyHostToDevice, c->copies) == cudaSuccess &&
                llm__link_copy(c, &head->probe, c->leaving, bytes) == cudaSuccess &&
                cudaEventRecord(c->link->arrived[0], c->copies) == cudaSuccess;
    (void)cudaGetLastError();
    return sent;
}

/* Has the previous stage's number arrived? It waits for a part of the time in which the other stages wait for its
   answer. */
static bool llm__link_has_probe(llm__gpu_context *c) {
    const llm__link_head *head = (const llm__link_head *)(void *)c->link->data;
    cudaStream_t stream = c->queue.stream;
    bool came = llm__link_await_arrival(c, 0, c->desc.pipeline->patience / 4) &&
                cudaMemcpyAsync(&c->host_probe[1], &head->probe, sizeof head->probe, cudaMemcpyDeviceToHost, stream) ==
                    cudaSuccess &&
                cudaStreamSynchronize(stream) == cudaSuccess;
    (void)cudaGetLastError();
    return came && c->host_probe[1] == c->stages[c->desc.pipeline->rank - 1].process;
}

/* Gives all stages each stage's answer. Returns false if that fails. */
static bool llm__link_agree(llm__gpu_context *c, unsigned char answer) {
    llm_comm *pipeline = c->desc.pipeline;
    size_t n = (size_t)pipeline->size;
    const llm_exchange x = {c->link_works, 1, n, n, 1, pipeline->size, NULL, 0};
    unsigned flags = 0;
    c->link_works[pipeline->rank] = answer;
    return !pipeline->exchange(pipeline, &x, &flags, &c->queue.parted);
}

/* The first stage tells how many links copy from GPU to GPU. */
static void llm__link_log(const llm__gpu_context *c) {
    const llm_host *host = &c->desc.host;
    int n_links = c->desc.pipeline->size - 1, n_direct = 0;
    char line[200];
    if (!host->log || c->desc.pipeline->rank || (c->desc.tensor && c->desc.tensor->rank)) return;
    for (int i = 1; i <= n_links; i++) n_direct += c->link_works[i];
    snprintf(line, sizeof line, "CUDA: %d of %d links between the stages of the pipeline copy from GPU to GPU",
             n_direct, n_links);
    host->log(host->user, line);
}

/* Before the first pass the stages find out which of them can write into the next one's memory, and try it. All links
   go through the host's memory if any stage's environment has LLM_CUDA_RANKS=host. */
static void llm__link_choose_way(llm__gpu_context *c) {
    llm_comm *pipeline = c->desc.pipeline;
    enum { TO_NEXT = 1, TO_PREVIOUS = 2 };
    if (!pipeline || c->looked_for_links || c->queue.parted.code) return;
    const int rank = pipeline->rank, size = pipeline->size;
    const llm__meet_address *own = &c->stages[rank];
    size_t n = sizeof *own * (size_t)size;
    const llm_exchange addresses = {c->stages, 1, n, n, sizeof *own, size, NULL, 0};
    bool by_host = false;
    unsigned flags = 0;
    c->looked_for_links = true;
    llm__meet_describe_self(c, c->link, &c->stages[rank]);
    if (pipeline->exchange(pipeline, &addresses, &flags, &c->queue.parted)) return;
    for (int i = 0; i < size; i++) {
        by_host = by_host || c->stages[i].asked == LLM__MEET_HOST;
        c->is_link_open = c->is_link_open || c->stages[i].process != own->process;
    }
    c->is_link_open = c->is_link_open && !by_host;
    if (rank + 1 < size && !by_host) c->next = llm__link_find(c, own, &c->stages[rank + 1], true);
    if (rank > 0 && !by_host) c->previous = llm__link_find(c, own, &c->stages[rank - 1], false);
    int answer = (c->next && llm__link_send_probe(c) ? TO_NEXT : 0) | (c->previous ? TO_PREVIOUS : 0);
    if (!llm__link_agree(c, (unsigned char)answer)) return;
    bool arrives = rank > 0 && c->link_works[rank - 1] & TO_NEXT && c->previous && llm__link_has_probe(c);
    if (!llm__link_agree(c, arrives)) return;
    c->is_given_directly = arrives;
    c->is_sending_directly = rank + 1 < size && c->link_works[rank + 1];
    if (!c->is_given_directly) llm__meet_leave(&c->previous);
    if (c->next && !c->is_sending_directly) {
        (void)cudaStreamSynchronize(c->copies); /* a probe may still be on its way */
        llm__meet_leave(&c->next);
    }
    llm__link_log(c);
}

/* Receives the rows that the previous stage has computed. */
static void llm__receive_message(llm__gpu_context *c, int n, bool fused) {
    llm_comm *pipeline = c->desc.pipeline;
    int stop = 0;
    size_t bytes = llm__message_bytes(c, n, fused), told = 0, head = LLM__MESSAGE_HEAD;
    if (c->model->is_first_stage || c->queue.parted.code) return;
    if (pipeline->receive(pipeline, pipeline->rank - 1, c->incoming, c->is_given_directly ? head : bytes,
                          &c->queue.parted))
        return;
    memcpy(&stop, c->incoming, sizeof stop);
    memcpy(&told, c->incoming + 8, sizeof told);
    c->cancelled = c->cancelled || stop;
    if (told != bytes)
        llm__cuda_error(&c->queue.parted, LLM_ERROR_DEVICE,
                        "rank %d of the pipeline makes a different call than rank %d", pipeline->rank - 1,
                        pipeline->rank);
    else if (c->is_given_directly) llm__link_take(c, n, fused);
    else llm__copy_message(c, c->incoming, n, fused, false, cudaMemcpyHostToDevice);
}

/* Sends rows to the next stage. There are two buffers, so it first waits until at most one message is still being
   sent. */
static void llm__send_message(llm__gpu_context *c, int n, bool fused) {
    llm_comm *pipeline = c->desc.pipeline;
    uint8_t *message = c->outgoing[c->n_sent % 2];
    int stop = c->cancelled;
    size_t bytes = llm__message_bytes(c, n, fused), head = LLM__MESSAGE_HEAD;
    if (c->model->is_last_stage || llm__queue_failed(&c->queue)) return;
    if (pipeline->drain(pipeline, pipeline->rank + 1, 1, &c->queue.parted)) return;
    if (c->is_sending_directly) llm__link_send(c, n, fused);
    else llm__copy_message(c, message, n, fused, true, cudaMemcpyDeviceToHost);
    llm__await(c, NULL, "computing a stage");
    if (llm__queue_failed(&c->queue)) return;
    memcpy(message, &stop, sizeof stop);
    memcpy(message + 8, &bytes, sizeof bytes);
    c->n_sent++;
    pipeline->send(pipeline, pipeline->rank + 1, message, c->is_sending_directly ? head : bytes, &c->queue.parted);
}

/* Gives all stages the logits of a call, and tells them whether any stage has cancelled it. */
static void llm__share_logits(llm__gpu_context *c, const llm_backend_pass *pass) {
    llm_comm *pipeline = c->desc.pipeline;
    const int32_t last = pipeline->size - 1;
    unsigned flags = c->cancelled;
    size_t n = (size_t)(pass->first_logits + pass->n_logits) * (size_t)c->model->shape.n_vocab * sizeof(float);
    const llm_exchange x = {c->host_logits, 1, n, n, n, pipeline->size, &last, 1};
    if (!c->queue.parted.code) pipeline->exchange(pipeline, &x, &flags, &c->queue.parted);
    c->cancelled = flags != 0;
}

/* Makes a call that failed on one rank fail on all ranks. */
static llm_status llm__end_call(llm__gpu_context *c, llm_error *err) {
    llm_error own = {};
    llm__meet_check(c);
    llm_status status = llm__queue_status(&c->queue, &own);
    if (status && err) *err = own;
    if (status) llm__meet_end(c);
    llm_comm *comms[2] = {c->desc.tensor, c->desc.pipeline};
    for (llm_comm *comm : comms)
        if (status && comm) comm->abort(comm, own.message);
    return status;
}

/* ---- Up to 16 rows: five kernels a layer, six with norms of queries and keys ---- */

typedef void (*llm__product_fn)(llm__product);

template <int ENDING, int TILES> static llm__product_fn llm__choose_format(llm__matrix_format format) {
    switch (format) {
    case LLM__F16: return llm__fused_product<ENDING, TILES, LLM__F16>;
    case LLM__INT8: return llm__fused_product<ENDING, TILES, LLM__INT8>;
    case LLM__INT8_GROUPS: return llm__fused_product<ENDING, TILES, LLM__INT8_GROUPS>;
    case LLM__INT4_GROUPS: return llm__fused_product<ENDING, TILES, LLM__INT4_GROUPS>;
    case LLM__BF16_2_4: return llm__fused_product<ENDING, TILES, LLM__BF16_2_4>;
    case LLM__INT8_2_4: return llm__fused_product<ENDING, TILES, LLM__INT8_2_4>;
    default: return llm__fused_product<ENDING, TILES, LLM__BF16>;
    }
}

static size_t llm__product_bytes(llm__matrix_format format, int tiles, int n_held) {
    size_t memory = tiles == 1 ? sizeof(llm__product_memory<8>) : sizeof(llm__product_memory<16>);
    return memory + (size_t)(LLM__WARPS * LLM__SLOTS * llm__product_slot_bytes(format)) + (size_t)n_held * 2;
}

/* How many such blocks a multiprocessor holds. Each takes 1 KB of shared memory more than it asks for. If there is no
   room for one, launching it fails. */
static int llm__product_blocks(const llm__gpu_context *c, llm__matrix_format format, int tiles, int n_held) {
    size_t most = (size_t)c->model->shared_bytes / (llm__product_bytes(format, tiles, n_held) + 1024);
    return llm__min(most ? (int)most : 1, llm__product_blocks_per_processor(format, tiles));
}

/* Allows a kernel as much shared memory as a block can have. Once is enough. */
static void llm__allow_shared(llm__gpu_context *c, llm__kernel_kind kind, llm__product_fn kernel, bool *allowed) {
    if (*allowed) return;
    cudaError_t result =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, c->model->block_bytes);
    llm__queue_note(&c->queue, result, llm__kind_name(kind));
    *allowed = result == cudaSuccess;
}

/* There are at most as many blocks as the GPU holds at once, and their numbers of tiles differ by at most one. They
   hold the inputs if there is still room for two blocks, or for as many as there are without inputs. */
template <int ENDING>
static void llm__run_product(llm__gpu_context *c, llm__kernel_kind kind, int bucket, llm__product p) {
    llm__matrix_format format = p.weight.format;
    int tiles = bucket <= 8 ? 1 : 2, n_held = bucket * (p.weight.k + 32);
    llm__product_fn kernel = tiles == 1 ? llm__choose_format<ENDING, 1>(format) : llm__choose_format<ENDING, 2>(format);
    if (p.n_tiles == 0) return;
    int blocks = llm__product_blocks(c, format, tiles, 0), holding = llm__product_blocks(c, format, tiles, n_held);
    if (holding >= llm__min(blocks, 2) && llm__product_bytes(format, tiles, n_held) <= (size_t)c->model->block_bytes) {
        blocks = holding;
        p.n_held = n_held;
    }
    int n_blocks = llm__divide_up(p.n_tiles, llm__divide_up(p.n_tiles, c->model->n_processors * blocks));
    llm__allow_shared(c, kind, kernel, &c->has_room[ENDING][tiles - 1][format]);
    llm__queue_launch_with(&c->queue, LLM__OVERLAP, kind, dim3((unsigned)n_blocks), LLM__WARPS * 32,
                           llm__product_bytes(format, tiles, p.n_held), kernel, p);
}

/* The rows of a pass that a fused product multiplies: all, or only those with logits. */
typedef enum llm__columns { LLM__ALL_ROWS = 0, LLM__LOGIT_ROWS = 1 } llm__columns;

static llm__product llm__make_product(const llm__gpu_context *c, llm__rows rows, llm__columns columns,
                                      llm__gpu_matrix matrix, const uint16_t *x) {
    llm__product p;
    memset(&p, 0, sizeof p);
    p.rows = rows;
    p.weight = matrix;
    p.n = matrix.n;
    p.n_tiles = llm__divide_up(matrix.n, 16);
    p.count = columns;
    p.x = x;
    p.out_stride = matrix.n;
    p.squares = c->squares;
    p.n_squares = c->sizes.n_squares;
    p.n_embd = c->model->shape.n_embd;
    p.eps = c->model->shape.rms_eps;
    return p;
}

static llm__meet_count llm__meet_some(const llm__gpu_context *c, llm__rows rows, llm__columns columns, int bucket) {
    int most = columns == LLM__LOGIT_ROWS ? c->desc.n_logits : c->desc.n_batch;
    return {c->host_rows[columns], rows.counts + columns, llm__min(bucket, most)};
}

static void llm__fused_residual(llm__gpu_context *c, llm__kernel_kind kind, llm__rows rows, llm__columns columns,
                                int bucket, llm__gpu_matrix matrix, const uint16_t *in, float *x,
                                const float *next_norm) {
    llm__product p = llm__make_product(c, rows, columns, matrix, in);
    int first = c->model->own.embd.first;
    p.residual = x + first;
    p.next_norm = next_norm + first;
    p.next_x = c->normed + first;
    p.next_stride = c->sizes.n_embd;
    p.next_squares = c->squares + first / 16;
    llm__run_product<LLM__RESIDUAL>(c, kind, bucket, p);
    llm__meet_normed(c, llm__meet_some(c, rows, columns, bucket));
}

static void llm__run_rope(llm__gpu_context *c, int overlap, llm__rows rows, int n_rows, int layer, llm__wide wide,
                          int n_heads) {
    llm__queue_launch(&c->queue, overlap, LLM__KIND_ROPE, dim3((unsigned)llm__divide_up(n_heads, 4), (unsigned)n_rows),
                      128, llm__rope, rows, llm__make_store(c, layer), wide, n_heads);
}

static void llm__fused_attention_in(llm__gpu_context *c, llm__rows rows, int bucket, int layer) {
    const llm__gpu_model *m = c->model;
    const llm_backend_shape *s = &m->shape;
    const llm__gpu_layer *l = &m->layers[layer];
    int n_heads = s->n_heads + 2 * s->n_kv_heads;
    llm__product qkv = llm__make_product(c, rows, LLM__ALL_ROWS, l->qkv, c->normed);
    if (s->qk_norm) { /* the norm is of whole heads, which have more outputs than a tile */
        llm__wide wide = {c->wide, false, NULL, qkv.n};
        qkv.out = c->wide;
        llm__run_product<LLM__PLAIN>(c, LLM__KIND_QKV, bucket, qkv);
        llm__run_rope(c, LLM__OVERLAP, rows, bucket, layer, wide, n_heads);
    } else {
        qkv.store = llm__make_store(c, layer);
        qkv.n_tiles = n_heads * qkv.store.tiles;
        llm__run_product<LLM__QKV>(c, LLM__KIND_QKV, bucket, qkv);
    }

    /* A block for each possible span, but with many rows not many more blocks than the GPU holds. */
    if (s->n_kv_heads == 0) return;
    int blocks = llm__divide_up(4 * m->n_processors, s->n_kv_heads * bucket);
    dim3 grid((unsigned)llm__min(llm__max_spans(m), blocks), (unsigned)s->n_kv_heads, (unsigned)bucket);
    llm__queue_launch(&c->queue, LLM__OVERLAP, LLM__KIND_ATTENTION, grid, LLM__ATTEND_WARPS * 32,
                      llm__choose_attention(m->group, c->kv.stride), llm__make_attend(c, rows, layer));
}

/* The rest of a layer after attention. `x` is the residual stream of the rows that are still needed. */
static void llm__fused_rest(llm__gpu_context *c, llm__rows rows, llm__columns columns, int bucket, int layer,
                            const uint16_t *attention, float *x) {
    const llm__gpu_model *m = c->model;
    const llm_backend_shape *s = &m->shape;
    const llm__gpu_layer *l = &m->layers[layer];
    /* The next stage of a pipeline applies its own first norm. The result with the norm that is passed here is not
       used. */
    const float *next_norm = layer + 1 < s->n_layers ? l[1].attention_norm
                             : m->is_last_stage      ? m->output_norm
                                                     : l->ffn_norm;
    llm__fused_residual(c, LLM__KIND_ATTENTION_OUT, rows, columns, bucket, l->attention_out, attention, x, l->ffn_norm);
    llm__product gate_up = llm__make_product(c, rows, columns, l->gate_up, c->normed);
    gate_up.n = m->own.ff.n;
    gate_up.n_tiles = llm__divide_up(gate_up.n, LLM__PAIRS);
    gate_up.next_x = c->ffn + m->own.ff.first;
    gate_up.next_stride = c->sizes.ffn;
    llm__run_product<LLM__SWIGLU>(c, LLM__KIND_GATE_UP, bucket, gate_up);
    llm__meet_ffn(c, llm__meet_some(c, rows, columns, bucket));
    llm__fused_residual(c, LLM__KIND_DOWN, rows, columns, bucket, l->down, c->ffn, x, next_norm);
}

/* The rows of c->normed are all rows of the pass, or with `gathered` only those with logits. */
static void llm__fused_head(llm__gpu_context *c, llm__rows rows, bool gathered, int bucket) {
    llm__product head = llm__make_product(c, rows, LLM__LOGIT_ROWS, c->model->head, c->normed);
    head.gather = gathered ? NULL : rows.logit_rows;
    head.out = c->logits + c->model->own.vocab.first;
    head.out_stride = c->model->shape.n_vocab;
    llm__run_product<LLM__LOGITS>(c, LLM__KIND_HEAD, bucket, head);
    llm__meet_logits(c, c->logits, llm__meet_some(c, rows, LLM__LOGIT_ROWS, bucket));
}

static void llm__fused_pass(llm__gpu_context *c, int bucket) {
    llm__rows rows = llm__place_rows(c, c->rows, LLM__FUSED_ROWS);
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_EMBED, dim3((unsigned)bucket), 256, llm__embed,
                      llm__make_start(c, rows, true));
    const llm__meet_count count = llm__meet_some(c, rows, LLM__ALL_ROWS, bucket);
    llm__meet_embedded(c, count, true);
    for (int layer = 0; layer < c->model->shape.n_layers; layer++) {
        llm__fused_attention_in(c, rows, bucket, layer);
        llm__meet_attention(c, count);
        llm__fused_rest(c, rows, LLM__ALL_ROWS, bucket, layer, c->attention, c->x);
    }
    if (c->model->is_last_stage) llm__fused_head(c, rows, false, bucket);
    else llm__meet_x(c, c->x, count); /* the next stage needs whole rows to compute its inputs */
}

static void llm__run_picker(llm__gpu_context *c) {
    llm__picker p = {llm__place_rows(c, c->rows, LLM__FUSED_ROWS), c->logits, c->model->shape.n_vocab, c->picker,
                     c->host_picked};
    llm__queue_launch(&c->queue, LLM__OVERLAP, LLM__KIND_PICK, dim3(1), LLM__PICK_THREADS, llm__pick, p);
}

/* Exchanges through the host cannot be recorded. */
static bool llm__uses_graphs(const llm__gpu_context *c) {
    return c->model->mode == LLM_CUDA_GRAPH && (!c->desc.tensor || c->has_peers || (c->nccl && c->can_record));
}

static void llm__run_one_by_one(llm__gpu_context *c, int bucket, bool pick) {
    llm__fused_pass(c, bucket);
    if (pick) llm__run_picker(c);
}

/* Records the launches of a pass, once for each bucket and for bursts. Meanwhile other threads may use the GPU. */
static void llm__record_graph(llm__gpu_context *c, int bucket, bool pick, cudaGraphExec_t *out) {
    cudaGraph_t graph = NULL;
    llm__queue_note(&c->queue, cudaStreamBeginCapture(c->queue.stream, cudaStreamCaptureModeThreadLocal),
                    "starting to record the pass");
    if (llm__queue_failed(&c->queue)) return;
    llm__run_one_by_one(c, bucket, pick);
    llm__queue_note(&c->queue, cudaStreamEndCapture(c->queue.stream, &graph), "recording the pass");
    if (!llm__queue_failed(&c->queue))
        llm__queue_note(&c->queue, cudaGraphInstantiate(out, graph, 0), "making a graph of the pass");
    if (graph) cudaGraphDestroy(graph);
}

/* Tells the host's log that a pass could not be recorded. */
static void llm__log_refusal(const llm__gpu_context *c) {
    const llm_host *host = &c->desc.host;
    char line[200];
    if (!host->log) return;
    snprintf(line, sizeof line, "CUDA: %s failed: %s; kernels are launched one by one instead, which is slower",
             c->queue.what, cudaGetErrorString(c->queue.failure));
    host->log(host->user, line);
}

/* NCCL allows no rank to launch a recorded pass if another rank could not record it. */
static void llm__refuse_recording(llm__recording *r) {
    if (r->graph) cudaGraphExecDestroy(r->graph);
    r->graph = NULL;
    r->refused = true;
}

/* Runs a recorded pass. The first time, the kernels are launched one by one: that loads them, and loading may be
   forbidden while recording. The second time they are recorded. If that fails, they are always launched one by one. */
static void llm__run_graph(llm__gpu_context *c, int bucket, bool pick, llm__recording *r) {
    if (llm__queue_failed(&c->queue)) return;
    if (r->loaded && !r->graph && !r->refused) {
        llm__record_graph(c, bucket, pick, &r->graph);
        r->refused = c->queue.failure != cudaSuccess;
        if (r->refused) llm__log_refusal(c);
        c->queue.failure = cudaSuccess;
        if (c->nccl && llm__meet_any(c, r->refused)) llm__refuse_recording(r);
        if (llm__queue_failed(&c->queue)) return;
    }
    if (r->graph) {
        llm__queue_note(&c->queue, cudaGraphLaunch(r->graph, c->queue.stream), "launching the graph");
        return;
    }
    llm__run_one_by_one(c, bucket, pick);
    r->loaded = c->queue.failure == cudaSuccess;
}

static void llm__fused_forward(llm__gpu_context *c, const llm_backend_pass *pass) {
    int index = 0;
    while (1 << index < pass->n_rows) index++;
    llm__send_rows(c, pass, LLM__FUSED_ROWS);
    if (llm__uses_graphs(c)) llm__run_graph(c, 1 << index, false, &c->passes[index]);
    else llm__fused_pass(c, 1 << index);
}

/* ---- Any number of rows: one operation after the other ----

   cuBLAS multiplies, and also adds to the residual stream (beta = 1). The epilogues of cuBLASLt are a bias, ReLU and
   GELU. None of them multiplies SiLU(gate) by up, rotates queries and keys, or squares a row, which are the operations
   that could be fused here. A bias is added where RoPE reads the outputs anyway. So plain cuBLAS is used. (cuBLASLt
   could scale the outputs of int8 by a vector for alpha, but only for some types.) Gates and ups are written as bf16,
   which is half the bytes. Queries and keys are not: if they were rounded before RoPE and again after it, the error of
   the logits would double. */

/* Where the outputs of a product go. Rows are `stride` numbers apart. */
typedef struct llm__target {
    void *data;
    int stride;
    bool is_bf16, add;
} llm__target;

/* Outputs [first, first + n) of y = W x, or y += W x, for bf16 weights. cuBLAS stores matrices by columns: y' = (W')'
   x'. */
static void llm__blas_product(llm__gpu_context *c, llm__gpu_matrix m, const void *weight, int first, int n,
                              const uint16_t *x, int rows, llm__target y) {
    float one = 1, beta = y.add ? 1.0f : 0.0f;
    if (llm__queue_failed(&c->queue) || n == 0) return;
    uint8_t *out = (uint8_t *)y.data + (size_t)first * (y.is_bf16 ? 2 : 4);
    c->queue.blas_failure =
        cublasGemmEx(c->queue.blas, CUBLAS_OP_T, CUBLAS_OP_N, n, rows, m.k, &one, weight, CUDA_R_16BF, m.k, x,
                     CUDA_R_16BF, llm__matrix_input_stride(m), &beta, out, y.is_bf16 ? CUDA_R_16BF : CUDA_R_32F,
                     y.stride, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}

/* The same for all formats. Weights are converted to bf16 piece by piece: int8 without its scales, f16 in two parts. */
static void llm__widened_product(llm__gpu_context *c, llm__gpu_matrix m, const uint16_t *x, int rows, llm__target y) {
    if (m.n == 0) return; /* this rank has no share of this matrix */
    if (m.format == LLM__BF16) {
        llm__blas_product(c, m, m.data, 0, m.n, x, rows, y);
        return;
    }
    /* Equal pieces, because a small one fills fewer multiprocessors; whole tiles of cuBLAS's. */
    int most = llm__min((int)(c->sizes.widened / (size_t)m.k), m.n);
    if (most >= 128 && most < m.n) most -= most % 128;
    int some = llm__min(llm__pad(llm__divide_up(m.n, llm__divide_up(m.n, most)), 128), most);
    for (int first = 0; first < m.n; first += some) {
        int n = llm__min(m.n - first, some);
        unsigned n_blocks = (unsigned)(((size_t)n * (size_t)m.k + 2047) / 2048);
        llm__target to = y;
        for (int part = 0; part < (m.format == LLM__F16 ? 2 : 1); part++, to.add = true) {
            llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_WIDEN, dim3(n_blocks), 256, llm__widen, m, first, n,
                              part == 1, c->widened);
            llm__blas_product(c, m, c->widened, first, n, x, rows, to);
        }
    }
}

/* Eager passes, and contexts for few rows, do not use cuBLAS. */
static bool llm__has_blas(const llm__gpu_context *c) { return c->queue.blas && c->model->mode != LLM_CUDA_EAGER; }

static void llm__eager_product(llm__gpu_context *c, llm__gpu_matrix m, const uint16_t *x, int rows, llm__target y) {
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_QKV, dim3((unsigned)llm__divide_up(m.n, 8), (unsigned)rows),
                      256, llm__matrix_product, m, x, (float *)y.data, y.stride, y.add);
}

/* y = W x, or y += W x, in f32. Rows of y are `stride` numbers apart. If a sum must be scaled before it is added to y,
   it goes to c->wide first. That has room for it, because only residual streams are added to. */
static void llm__plain_product(llm__gpu_context *c, llm__gpu_matrix m, const uint16_t *x, int rows, float *y,
                               int stride, bool add) {
    bool scales = llm__matrix_has_row_scales(m.format) && llm__has_blas(c), apart = scales && add;
    const llm__target to = {apart ? c->wide : y, apart ? m.n : stride, false, add && !apart};
    if (!llm__has_blas(c)) llm__eager_product(c, m, x, rows, to);
    else llm__widened_product(c, m, x, rows, to);
    if (!scales) return;
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_SCALE, dim3((unsigned)llm__divide_up(m.n, 256), (unsigned)rows),
                      256, llm__scale, (const float *)to.data, to.stride, m.scales, m.n, y, stride, add);
}

/* W x into c->wide, for a kernel that reads it once. It may be rounded to bf16, but not with weights in f16, because
   the products of their two parts are added up. */
static llm__wide llm__wide_product(llm__gpu_context *c, llm__gpu_matrix m, const uint16_t *x, int rows,
                                   bool may_round) {
    llm__wide wide = {c->wide, may_round && llm__has_blas(c) && m.format != LLM__F16,
                      llm__has_blas(c) && llm__matrix_has_row_scales(m.format) ? m.scales : NULL, m.n};
    const llm__target to = {c->wide, m.n, wide.is_bf16, false};
    if (llm__has_blas(c)) llm__widened_product(c, m, x, rows, to);
    else llm__eager_product(c, m, x, rows, to);
    return wide;
}

static void llm__plain_norm(llm__gpu_context *c, const float *x, const float *weight, int rows) {
    const llm_backend_shape *s = &c->model->shape;
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_NORM, dim3((unsigned)rows), 256, llm__norm, x, weight,
                      s->n_embd, s->rms_eps, c->normed, c->sizes.n_embd);
}

static void llm__plain_qkv(llm__gpu_context *c, llm__rows rows, int n_rows, int layer) {
    const llm_backend_shape *s = &c->model->shape;
    llm__wide wide = llm__wide_product(c, c->model->layers[layer].qkv, c->normed, n_rows, false);
    bool values_apart = llm__has_blas(c);
    llm__run_rope(c, LLM__SERIAL, rows, n_rows, layer, wide, s->n_heads + (values_apart ? 1 : 2) * s->n_kv_heads);
    if (!values_apart) return;
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_VALUES,
                      dim3((unsigned)llm__divide_up(n_rows, 32), (unsigned)s->n_kv_heads), 256, llm__store_values, rows,
                      llm__make_store(c, layer), wide);
}

static void llm__run_attention(llm__gpu_context *c, llm__rows rows, int n_rows, int n_tiles, int layer) {
    const llm_backend_shape *s = &c->model->shape;
    llm__attn_run a = llm__make_attend(c, rows, layer);
    if (c->model->mode == LLM_CUDA_EAGER)
        llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_ATTENTION, dim3((unsigned)s->n_heads, (unsigned)n_rows), 32,
                          llm__plain_attention, a);
    else
        llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_ATTENTION,
                          dim3(1, (unsigned)s->n_kv_heads, (unsigned)n_tiles), LLM__ATTEND_WARPS * 32,
                          llm__choose_tile_attention(c->kv.stride), a);
}

/* x += W in. A rank has a share of the outputs. */
static void llm__plain_residual(llm__gpu_context *c, llm__gpu_matrix m, const uint16_t *in, int n, float *x) {
    llm__plain_product(c, m, in, n, x + c->model->own.embd.first, c->model->shape.n_embd, true);
    llm__meet_x(c, x, llm__meet_all(n));
}

static void llm__plain_ffn(llm__gpu_context *c, const llm__gpu_layer *l, int n, float *x) {
    const llm_backend_range ff = c->model->own.ff;
    llm__plain_norm(c, x, l->ffn_norm, n);
    llm__wide wide = llm__wide_product(c, l->gate_up, c->normed, n, true);
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_SWIGLU, dim3((unsigned)llm__divide_up(ff.n, 2048), (unsigned)n),
                      256, llm__swiglu, wide, ff.n, c->ffn + ff.first, c->sizes.ffn);
    llm__meet_ffn(c, llm__meet_all(n));
    llm__plain_residual(c, l->down, c->ffn, n, x);
}

/* Logits of n rows. A rank has a share of the vocabulary. */
static void llm__plain_logits(llm__gpu_context *c, const uint16_t *normed, int n, float *logits) {
    llm__plain_product(c, c->model->head, normed, n, logits + c->model->own.vocab.first, c->model->shape.n_vocab,
                       false);
    llm__meet_logits(c, logits, llm__meet_all(n));
}

/* Runs the head for rows [first, end), and computes the log-probabilities of the n targets that follow them. It
   computes as many rows of logits at a time as fit into c->logits, or into c->wide, which the layers no longer use. */
static void llm__score_rows(llm__gpu_context *c, int first, int end, int n_targets) {
    int n_vocab = c->model->shape.n_vocab;
    size_t in_wide = (size_t)c->desc.n_batch * (size_t)c->sizes.n_wide / (size_t)n_vocab,
           in_logits = (size_t)c->desc.n_logits;
    size_t most = in_wide > in_logits ? in_wide : in_logits, n_rows = (size_t)(end - first),
           n_pieces = (n_rows + most - 1) / most;
    int some = (int)((n_rows + n_pieces - 1) / n_pieces); /* equal pieces, because a piece of few rows is slow */
    float *logits = in_wide > in_logits ? c->wide : c->logits;
    for (; first < end; first += some) {
        int n = llm__min(end - first, some);
        llm__plain_logits(c, c->normed + (size_t)first * (size_t)c->sizes.n_embd, n, logits);
        llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_SCORE, dim3((unsigned)n), 256, llm__score_row, logits,
                          n_vocab, first, c->targets, c->targets + c->desc.n_batch, n_targets, c->log_probs);
    }
}

/* Computes the targets' log-probabilities, which llm_backend_pass requests instead of logits. Usually there is room for
   all targets at once. */
static void llm__score_targets(llm__gpu_context *c, const llm_backend_pass *pass) {
    int most = c->desc.n_batch;
    for (int first = 0; first < pass->n_targets; first += most) {
        int n = llm__min(pass->n_targets - first, most);
        size_t bytes = (size_t)n * sizeof(int);
        memcpy(c->host_targets, pass->targets + first, bytes);
        memcpy(c->host_targets + most, pass->target_rows + first, bytes);
        llm__queue_note(&c->queue,
                        cudaMemcpyAsync(c->targets, c->host_targets, (size_t)most * sizeof(int) + bytes,
                                        cudaMemcpyHostToDevice, c->queue.stream),
                        "sending the targets");
        llm__score_rows(c, pass->target_rows[first], pass->target_rows[first + n - 1] + 1, n);
        llm__queue_note(
            &c->queue, cudaMemcpyAsync(c->host_log_probs, c->log_probs, bytes, cudaMemcpyDeviceToHost, c->queue.stream),
            "fetching log-probabilities");
        llm__await(c, NULL, "scoring");
        memcpy(pass->log_probs + first, c->host_log_probs, bytes);
    }
}

/* The rest of the last layer and the head, only for rows with logits. If they are few, the fused kernels compute
   them. */
static void llm__plain_end(llm__gpu_context *c, const llm_backend_pass *pass, llm__rows rows, int layer) {
    const llm__gpu_model *m = c->model;
    const llm__gpu_layer *l = &m->layers[layer];
    int n = pass->n_logits;
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_KEEP, dim3((unsigned)n), 256, llm__keep_rows, rows, c->x,
                      c->kept_x, m->shape.n_embd, c->attention, c->kept_attention, c->sizes.q);
    if (n <= LLM__FUSED_ROWS && !pass->n_targets && m->mode != LLM_CUDA_EAGER) {
        llm__fused_rest(c, rows, LLM__LOGIT_ROWS, n, layer, c->kept_attention, c->kept_x);
        llm__fused_head(c, rows, true, n);
        return;
    }
    llm__plain_residual(c, l->attention_out, c->kept_attention, n, c->kept_x);
    llm__plain_ffn(c, l, n, c->kept_x);
    llm__plain_norm(c, c->kept_x, m->output_norm, n);
    if (pass->n_targets) llm__score_targets(c, pass);
    else llm__plain_logits(c, c->normed, n, c->logits);
}

static void llm__plain_forward(llm__gpu_context *c, const llm_backend_pass *pass) {
    const llm__gpu_model *m = c->model;
    int capacity = llm__pad(pass->n_rows, LLM__FUSED_ROWS), n_tiles = llm__send_rows(c, pass, capacity),
        n = pass->n_rows;
    llm__rows rows = llm__place_rows(c, c->rows, capacity);
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_EMBED, dim3((unsigned)n), 256, llm__embed,
                      llm__make_start(c, rows, false));
    llm__meet_embedded(c, llm__meet_all(n), false);
    for (int layer = 0; layer < m->shape.n_layers && !c->cancelled; layer++) {
        const llm__gpu_layer *l = &m->layers[layer];
        bool is_last = m->is_last_stage && layer == m->shape.n_layers - 1;
        llm__plain_norm(c, c->x, l->attention_norm, n);
        llm__plain_qkv(c, rows, n, layer);
        if (is_last && pass->n_logits == 0) break; /* only keys and values are needed */
        llm__run_attention(c, rows, n, n_tiles, layer);
        llm__meet_attention(c, llm__meet_all(n));
        if (is_last) {
            llm__plain_end(c, pass, rows, layer);
            break;
        }
        llm__plain_residual(c, l->attention_out, c->attention, n, c->x);
        llm__plain_ffn(c, l, n, c->x);
        c->cancelled = llm__poll_cancel(c, pass);
    }
}

static llm_status llm__gpu_forward(void *context, const llm_backend_pass *pass, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    llm__on_device on(c->model->device);
    size_t n_vocab = (size_t)c->model->shape.n_vocab;
    bool has_next = c->desc.pipeline && pass->more,
         fused = pass->n_rows <= LLM__FUSED_ROWS && !pass->n_targets && c->model->mode != LLM_CUDA_EAGER;
    llm__meet_choose_way(c);
    llm__link_choose_way(c);
    c->cancelled = llm__poll_cancel(c, pass) || c->stopped;
    llm__receive_message(c, pass->n_rows, fused);
    if (!c->cancelled && fused) llm__fused_forward(c, pass);
    else if (!c->cancelled) llm__plain_forward(c, pass);
    llm__send_message(c, pass->n_rows, fused);
    if (!c->cancelled && c->model->is_last_stage && pass->n_logits && !pass->n_targets && !llm__queue_failed(&c->queue))
        llm__queue_note(&c->queue,
                        cudaMemcpyAsync(c->host_logits + (size_t)pass->first_logits * n_vocab, c->logits,
                                        (size_t)pass->n_logits * n_vocab * sizeof(float), cudaMemcpyDeviceToHost,
                                        c->queue.stream),
                        "fetching the logits");
    llm__meet_ask(c);
    llm__await(c, NULL, "computing the pass");
    llm__meet_check(c);
    c->stopped = c->cancelled && has_next; /* all stages end the call together */
    if (pass->stopped) *pass->stopped = c->cancelled;
    else if (c->desc.pipeline && !has_next && !llm__queue_failed(&c->queue)) llm__share_logits(c, pass);
    llm_status status = llm__end_call(c, err);
    if (status || c->stopped || pass->stopped || !c->cancelled) return status;
    return llm__cuda_error(err, LLM_ERROR_CANCELLED, "the forward pass was cancelled");
}

static const float *llm__gpu_logits(void *context, int i) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    return c->host_logits + (size_t)i * (size_t)c->model->shape.n_vocab;
}

/* ==== 11 Bursts =================================================================================================

   Each pass ends by picking the token of the next pass, so the host queues passes without knowing their tokens. It
   stays a few passes ahead of the token that it waits for. So the GPU never waits for the host, and if that token ends
   the text, only a few passes are wasted. */

static void llm__send_burst(llm__gpu_context *c, const llm_backend_burst *burst) {
    llm__rows rows = llm__place_rows(c, c->host_rows, LLM__FUSED_ROWS);
    const llm_sampler *s = burst->sampler;
    size_t n_blocks = (size_t)(burst->position + burst->n - 1 + LLM_CACHE_BLOCK - 1) / LLM_CACHE_BLOCK;
    memset(c->host_rows, 0, (size_t)(rows.tables - c->host_rows) * sizeof(int));
    for (int i = 0; i < 3; i++) c->host_rows[i] = 1; /* llm__rows.counts */
    const_cast<int *>(rows.positions)[0] = burst->position - 1;
    const_cast<int *>(rows.tile_rows)[0] = 1;
    memcpy(const_cast<int *>(rows.tables), burst->blocks, n_blocks * sizeof(int));
    size_t n_ints = (size_t)(rows.tables - c->host_rows) + n_blocks;
    llm__picker_state state = {s->temperature >= 1e-30f ? 1.44269504f / s->temperature : 0,
                               s->top_p,
                               s->min_p,
                               s->top_k,
                               s->seed,
                               s->n_drawn,
                               0};
    *c->host_picker = state;
    llm__queue_note(
        &c->queue,
        cudaMemcpyAsync(c->rows, c->host_rows, n_ints * sizeof(int), cudaMemcpyHostToDevice, c->queue.stream),
        "sending the burst");
    llm__queue_note(&c->queue,
                    cudaMemcpyAsync(c->picker, c->host_picker, sizeof state, cudaMemcpyHostToDevice, c->queue.stream),
                    "sending the sampler");
}

/* Queues the pass that picks token i of a burst. */
static void llm__queue_token(llm__gpu_context *c, int i) {
    if (i && llm__uses_graphs(c)) {
        llm__run_graph(c, 1, true, &c->burst_pass);
    } else {
        if (i) llm__fused_pass(c, 1);
        llm__run_picker(c);
    }
    llm__meet_ask(c);
    llm__queue_note(&c->queue, cudaEventRecord(c->picked[i % (LLM__AHEAD + 1)], c->queue.stream), "marking a token");
}

static llm_status llm__gpu_burst(void *context, const llm_backend_burst *burst, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    llm__on_device on(c->model->device);
    bool wanted = true, is_wrong = false;
    llm__send_burst(c, burst);
    for (int i = 0, n_queued = 0; i < burst->n && wanted; i++) {
        for (; n_queued < burst->n && n_queued <= i + LLM__AHEAD; n_queued++) llm__queue_token(c, n_queued);
        llm__await(c, c->picked[i % (LLM__AHEAD + 1)], "awaiting a token");
        llm__meet_check(c);
        wanted = !llm__queue_failed(&c->queue);
        is_wrong = wanted && c->host_picked[i] < 0;
        wanted = wanted && !is_wrong && burst->on_token(burst->user, c->host_picked[i]);
    }
    llm__await(c, NULL, "ending the burst");
    llm_status status = llm__end_call(c, err);
    if (status || !is_wrong) return status;
    return llm__cuda_error(
        err, LLM_ERROR_FORMAT,
        "no token can be picked: a logit is NaN or infinite, or all are -infinity; the model file may be damaged, "
        "or its numbers too large for this type");
}

/* ==== 12 The backend ============================================================================================ */

static llm_status llm__gpu_copy_block(void *context, int to, int from, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    llm__on_device on(c->model->device);
    size_t size = c->kv.block_size;
    LLM__TRY(cudaMemcpyAsync(c->kv.data + (size_t)to * size, c->kv.data + (size_t)from * size, size * 2,
                             cudaMemcpyDeviceToDevice, c->queue.stream));
    return LLM_OK;
}

/* A saved block has the data of all ranks: [layer][keys, values][head]. Calls copy(device, host, bytes) for each
   contiguous part of a block that this rank has. */
template <typename Copy>
static cudaError_t llm__copy_planes(const llm__gpu_context *c, int block, uint8_t *bytes, Copy copy) {
    const llm__gpu_model *m = c->model;
    size_t head = (size_t)LLM_CACHE_BLOCK * (size_t)c->kv.stride, n = (size_t)m->shape.n_kv_heads;
    for (int i = 0; i < 2 * m->shape.n_layers && n; i++) {
        size_t whole =
            (size_t)(2 * m->own.layers.first + i) * (size_t)m->whole.n_kv_heads + (size_t)m->own.key_heads.first;
        cudaError_t result = copy(c->kv.data + (size_t)block * c->kv.block_size + (size_t)i * n * head,
                                  bytes + whole * head * 2, n * head * 2);
        if (result != cudaSuccess) return result;
    }
    return cudaStreamSynchronize(c->queue.stream);
}

/* Exchanges the parts of a saved block. If two ranks have a key head, its data may come from either. */
static llm_status llm__share_planes(llm__gpu_context *c, uint8_t *bytes, llm_error *err) {
    const llm__gpu_model *m = c->model;
    llm_comm *tensor = c->desc.tensor, *pipeline = c->desc.pipeline;
    size_t head = (size_t)LLM_CACHE_BLOCK * (size_t)c->kv.stride * 2, plane = (size_t)m->whole.n_kv_heads * head;
    llm_status status = LLM_OK;
    unsigned flags = 0;
    if (tensor) {
        const llm_exchange x = {bytes + 2 * (size_t)m->own.layers.first * plane,
                                2 * (size_t)m->own.layers.n,
                                plane,
                                plane,
                                head,
                                m->whole.n_kv_heads,
                                NULL,
                                0};
        status = tensor->exchange(tensor, &x, &flags, err);
    }
    for (int32_t stage = 0; pipeline && stage < pipeline->size && !status; stage++) {
        llm_comm other = *pipeline;
        other.rank = stage;
        const llm_backend_range layers = llm_backend_find_ranks(&m->whole, NULL, &other).layers;
        size_t n = 2 * (size_t)layers.n * plane;
        const llm_exchange x = {bytes + 2 * (size_t)layers.first * plane, 1, n, n, n, pipeline->size, &stage, 1};
        status = pipeline->exchange(pipeline, &x, &flags, err);
    }
    return status;
}

static llm_status llm__gpu_read_block(void *context, int block, void *bytes, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    llm__on_device on(c->model->device);
    cudaStream_t stream = c->queue.stream;
    cudaError_t result = llm__copy_planes(c, block, (uint8_t *)bytes, [=](void *device, void *host, size_t n) {
        return cudaMemcpyAsync(host, device, n, cudaMemcpyDeviceToHost, stream);
    });
    llm_status status = llm__cuda_check(result, "reading a block of the cache", err);
    return status ? status : llm__share_planes(c, (uint8_t *)bytes, err);
}

static llm_status llm__gpu_write_block(void *context, int block, const void *bytes, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    llm__on_device on(c->model->device);
    cudaStream_t stream = c->queue.stream;
    cudaError_t result = llm__copy_planes(c, block, (uint8_t *)bytes, [=](void *device, void *host, size_t n) {
        return cudaMemcpyAsync(device, host, n, cudaMemcpyHostToDevice, stream);
    });
    return llm__cuda_check(result, "writing a block of the cache", err);
}

static void llm__add_region(llm__region *regions, int *n, llm__gpu_matrix m) {
    llm__region region = {m.data, (size_t)m.n * (llm__matrix_row_bytes(m) + llm__matrix_row_places(m)) / 16};
    regions[(*n)++] = region;
}

/* Reads all weights, but not their scales, with one kernel. */
static double llm__read_weights(llm__gpu_context *c) {
    const llm__gpu_model *m = c->model;
    size_t size = (4 * (size_t)m->shape.n_layers + 1) * sizeof(llm__region);
    llm__region *regions = (llm__region *)llm__host_zero(&c->desc.host, size, NULL);
    double bytes = 0;
    int n = 0;
    if (!regions) return 0;
    llm__add_region(regions, &n, m->head);
    for (int i = 0; i < m->shape.n_layers; i++) {
        const llm__gpu_layer *l = &m->layers[i];
        llm__add_region(regions, &n, l->qkv);
        llm__add_region(regions, &n, l->attention_out);
        llm__add_region(regions, &n, l->gate_up);
        llm__add_region(regions, &n, l->down);
    }
    for (int i = 0; i < n; i++) bytes += (double)regions[i].n_vectors * 16;
    llm__queue_note(&c->queue, cudaMemcpyAsync(c->regions, regions, size, cudaMemcpyHostToDevice, c->queue.stream),
                    "measuring");
    llm__queue_note(&c->queue, cudaStreamSynchronize(c->queue.stream), "measuring");
    llm__host_free(&c->desc.host, regions);
    return bytes;
}

static void llm__run_reading(llm__gpu_context *c) {
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_READ, dim3((unsigned)c->model->n_processors * 8), 256,
                      llm__read_all, c->regions, 4 * c->model->shape.n_layers + 1, c->n_done);
}

static void llm__run_filling(llm__gpu_context *c, uint16_t *to, size_t n) {
    llm__queue_launch(&c->queue, LLM__SERIAL, LLM__KIND_FILL, dim3((unsigned)c->model->n_processors * 8), 256,
                      llm__fill, to, n);
}

/* Fills the inputs of the widest product with random numbers. Returns the operations of ten such products. */
static double llm__fill_products(llm__gpu_context *c) {
    llm__gpu_matrix m = c->model->layers[0].gate_up;
    if (!c->queue.blas || m.n == 0) return 0;
    llm__run_filling(c, c->normed, (size_t)c->desc.n_batch * (size_t)c->sizes.n_embd);
    llm__run_filling(c, c->widened, c->sizes.widened);
    return 20.0 * llm__min((int)(c->sizes.widened / (size_t)m.k), m.n) * m.k * c->desc.n_batch;
}

/* Runs ten products of cuBLAS in bf16. */
static void llm__run_products(llm__gpu_context *c) {
    llm__gpu_matrix m = c->model->layers[0].gate_up;
    int n = llm__min((int)(c->sizes.widened / (size_t)m.k), m.n);
    const llm__target to = {c->wide, m.n, true, false};
    for (int i = 0; i < 10 && c->queue.blas; i++)
        llm__blas_product(c, m, c->widened, 0, n, c->normed, c->desc.n_batch, to);
}

/* The best rate of several runs: the amount of work that `prepare` returns, divided by the seconds that `work` takes.
   Returns 0 if it cannot be measured. */
static double llm__measure(llm__gpu_context *c, double (*prepare)(llm__gpu_context *c),
                           void (*work)(llm__gpu_context *c)) {
    llm__on_device on(c->model->device);
    cudaEvent_t start = NULL, end = NULL;
    double best = 0, amount = prepare(c);
    llm__queue_note(&c->queue, cudaEventCreateWithFlags(&start, cudaEventDefault), "measuring");
    llm__queue_note(&c->queue, cudaEventCreateWithFlags(&end, cudaEventDefault), "measuring");
    for (int i = 0; i < 8 && start && end && amount > 0; i++) {
        float ms = 0;
        llm__queue_note(&c->queue, cudaEventRecord(start, c->queue.stream), "measuring");
        work(c);
        llm__queue_note(&c->queue, cudaEventRecord(end, c->queue.stream), "measuring");
        llm__queue_note(&c->queue, cudaStreamSynchronize(c->queue.stream), "measuring");
        if (c->queue.failure == cudaSuccess)
            llm__queue_note(&c->queue, cudaEventElapsedTime(&ms, start, end), "measuring");
        if (c->queue.failure == cudaSuccess && ms > 0) best = fmax(best, amount / (ms * 1e-3));
    }
    if (start) cudaEventDestroy(start);
    if (end) cudaEventDestroy(end);
    cudaMemsetAsync(c->n_done, 0, sizeof *c->n_done, c->queue.stream); /* llm__read_all may have written to it */
    cudaMemsetAsync(c->normed, 0, (size_t)c->desc.n_batch * (size_t)c->sizes.n_embd * 2,
                    c->queue.stream); /* its padding must be zero again */
    return llm__queue_status(&c->queue, NULL) ? 0 : best;
}

/* Bandwidth: one pass over all weights. Flops: cuBLAS on the widest matrix. */
static double llm__gpu_measure_bandwidth(void *context) {
    return llm__measure((llm__gpu_context *)context, llm__read_weights, llm__run_reading);
}

static double llm__gpu_measure_flops(void *context) {
    return llm__measure((llm__gpu_context *)context, llm__fill_products, llm__run_products);
}

#define LLM__GPU_BACKEND(open, burst)                                                                                  \
    {                                                                                                                  \
        "cuda", open, llm__gpu_upload, llm__gpu_close, llm__gpu_weight_bytes, llm__gpu_block_bytes,                    \
            llm__gpu_scratch_bytes, llm__gpu_context_create, llm__gpu_context_free, llm__gpu_forward, llm__gpu_logits, \
            llm__gpu_copy_block, llm__gpu_read_block, llm__gpu_write_block, llm__gpu_measure_bandwidth,                \
            llm__gpu_measure_flops, burst, NULL                                                                        \
    }

} // namespace llm__cuda

LLM_API const llm_backend *llm_cuda_backend_mode(llm_cuda_mode mode) {
    using namespace llm__cuda;
    static const llm_backend graph = LLM__GPU_BACKEND(llm__open_graph, llm__gpu_burst);
    static const llm_backend fused = LLM__GPU_BACKEND(llm__open_fused, llm__gpu_burst);
    static const llm_backend eager = LLM__GPU_BACKEND(llm__open_eager, NULL);
    return mode == LLM_CUDA_EAGER ? &eager : mode == LLM_CUDA_FUSED ? &fused : &graph;
}

LLM_API const llm_backend *llm_cuda_backend(void) { return llm_cuda_backend_mode(LLM_CUDA_GRAPH); }

/* ---- For bench/gpu.cpp, which declares these itself ---- */

/* Changes how a context decodes from now on: whether kernels overlap, and which kinds of kernels are launched. `kinds`
   has a bit for each kind of llm__kernel_kind that a pass launches, and bit 31 for the exchanges between ranks. If some
   kinds are left out, the results are meaningless, but the times of the others are still right. */
LLM_API void llm__cuda_vary(void *context, bool overlap, unsigned kinds) {
    using namespace llm__cuda;
    llm__gpu_context *c = (llm__gpu_context *)context;
    llm__on_device on(c->model->device);
    c->queue.can_overlap = overlap && c->model->can_overlap;
    c->queue.left_out = (~kinds & ((1u << LLM__KIND_READ) - 1)) | (~kinds >> 31) << LLM__KIND_MEET;
    cudaStreamSynchronize(c->queue.stream);
    llm__forget_graphs(c);
}

/* Returns the name of such a kind, or NULL after the last. *n_kernels: how many of its kernels run in each token,
   between the embedding and the choice of the next token. *bytes: how many bytes of weights these read. */
LLM_API const char *llm__cuda_kind(void *context, int kind, int *n_kernels, double *bytes) {
    using namespace llm__cuda;
    const llm__gpu_model *m = ((llm__gpu_context *)context)->model;
    const llm__gpu_layer *l = m->layers;
    const llm__gpu_matrix none = {};
    const llm__gpu_matrix matrices[] = {l->qkv, none, none, l->attention_out, l->gate_up, l->down, m->head};
    *n_kernels = 0;
    *bytes = 0;
    if (kind < 0 || kind >= LLM__KIND_READ) return NULL;
    if (kind > LLM__KIND_HEAD) return llm__kind_name(kind);
    *n_kernels = kind == LLM__KIND_HEAD ? 1 : kind == LLM__KIND_ROPE && !m->shape.qk_norm ? 0 : m->shape.n_layers;
    llm__gpu_matrix matrix = matrices[kind];
    *bytes = matrix.n == 0 ? 0 : (double)*n_kernels * matrix.n * (double)llm__matrix_all_bytes(matrix);
    return llm__kind_name(kind);
}

/*
MIT License

Copyright (c) 2026 llm.h authors

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
*/
