/*  llm_cuda.cu - llm.h's models on an NVIDIA GPU.                                       MIT licence, see LICENSE

    Compile this file with nvcc, link it with your program and with cuBLAS, and name the backend when you load a model:

        nvcc -O3 -std=c++17 -arch=sm_90 -c llm_cuda.cu           link with -lcublas -lcudart

        #define LLM_CUDA
        #include "llm.h"
        llm_model_desc desc = {.backend = llm_cuda_backend()};

    It runs every architecture llm.h does and needs compute capability 8.0 (Ampere) or newer. Weights are
    bf16, f16, int8 or int4 in groups, the KV cache is bf16; residual stream, sums, softmax and logits are f32. A row's logits
    do not depend on the other rows of a pass of up to 16 rows, to the bit; they differ from the CPU's in the last places
    of bf16.

    CONTENTS
        1 errors and launches    2 the chip's own instructions    3 what kernels are told    4 fused products
        5 fused attention        6 picking tokens                 7 plain kernels            8 the model
        9 the context           10 forward pass                  11 bursts                  12 the backend
*/
#ifndef LLM_CUDA
#define LLM_CUDA
#endif
#include "llm.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <thread>

namespace llm__cuda { /* so that the names below may be llm.h's own, should both be compiled as one */

/* ==== 1 Errors and launches =====================================================================================

   Every call's result is looked at. Work for the GPU is queued on a context's stream: the first failure is kept in the
   queue's state, what follows it does nothing, and the forward pass asks once at its end. */

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
    (void)cudaGetLastError(); /* or the next launch would report this failure again */
    if (result == cudaErrorMemoryAllocation)
        return llm__cuda_error(err, LLM_ERROR_MEMORY, "the GPU is out of memory: %s", what);
    return llm__cuda_error(err, LLM_ERROR_DEVICE, "CUDA: %s failed: %s", what, cudaGetErrorString(result));
}

#define LLM__TRY(call)                                                \
    do {                                                              \
        llm_status status_ = llm__cuda_check((call), #call, err);     \
        if (status_) return status_;                                  \
    } while (0)

typedef struct llm__queue {
    cudaStream_t stream;
    cublasHandle_t blas;
    bool can_overlap;        /* the chip starts a kernel while the one before it ends (programmatic dependent launch) */
    cudaError_t failure;     /* the first one, and what it was about */
    cublasStatus_t blas_failure;
    const char *what;
} llm__queue;

enum { LLM__SERIAL = 0, LLM__OVERLAP = 1 };

static void llm__note(llm__queue *queue, cudaError_t result, const char *what) {
    if (result == cudaSuccess || queue->failure != cudaSuccess) return;
    queue->failure = result;
    queue->what = what;
    (void)cudaGetLastError();
}

/* The only place kernels are launched from. A kernel launched with LLM__OVERLAP may start before the kernels ahead of
   it are done, and must call llm__wait_for_previous before it reads what they wrote or writes what they read. */
template <typename... Parameters, typename... Arguments>
static void llm__launch(llm__queue *queue, int overlap, const char *what, dim3 grid, int threads,
                        void (*kernel)(Parameters...), Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attribute = {};
    if (queue->failure != cudaSuccess || queue->blas_failure != CUBLAS_STATUS_SUCCESS) return;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = grid;
    config.blockDim = dim3((unsigned)threads);
    config.stream = queue->stream;
    config.attrs = &attribute;
    config.numAttrs = overlap == LLM__OVERLAP && queue->can_overlap ? 1 : 0;
    llm__note(queue, cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

static llm_status llm__queue_status(llm__queue *queue, llm_error *err) {
    cudaError_t failure = queue->failure;
    cublasStatus_t blas_failure = queue->blas_failure;
    queue->failure = cudaSuccess;
    queue->blas_failure = CUBLAS_STATUS_SUCCESS;
    if (blas_failure != CUBLAS_STATUS_SUCCESS)
        return llm__cuda_error(err, LLM_ERROR_DEVICE, "cuBLAS failed with status %d", (int)blas_failure);
    return llm__cuda_check(failure, queue->what, err);
}

/* ==== 2 The chip's own instructions =============================================================================

   Each stands beside C that does the same, for compilers of other machines. */

static __host__ __device__ int llm__least(int a, int b) { return a < b ? a : b; }

/* 16 bytes that nobody reads again soon: they go past the L1 cache. */
static __device__ uint4 llm__load_once(const void *from) {
#ifdef __CUDA_ARCH__
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
    return v;
#else
    return *(const uint4 *)from;
#endif
}

/* Waits until all kernels ahead in the stream are done and what they wrote can be seen. */
static __device__ void llm__wait_for_previous(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Lets the next kernel begin as soon as there is room for it. */
static __device__ void llm__let_next_start(void) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

#ifdef __CUDACC__
/* sums = a * b + sums */
static __device__ void llm__tensor_core(float sums[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
    float c0 = sums[0], c1 = sums[1], c2 = sums[2], c3 = sums[3]; /* not one operand with the results: they may be zeros */
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c0), "f"(c1), "f"(c2), "f"(c3));
}
#else
static __device__ float llm__low(uint32_t pair) { return __uint_as_float(pair << 16); }
static __device__ float llm__high(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

static __device__ float llm__dot_8(uint4 a, uint4 b) {
    const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += llm__low(left[i]) * llm__low(right[i]) + llm__high(left[i]) * llm__high(right[i]);
    return sum;
}

typedef struct llm__factors {
    uint4 upper, lower, column;
} llm__factors;
#endif

/* A warp multiplies 16 rows by 8 columns over 32 values of k. With g = lane / 4 and t = lane % 4 a lane brings k = 8t ..
   8t+7 of row g (`upper`), of row g + 8 (`lower`) and of column g, and keeps the sums of row g with columns 2t and 2t+1,
   then those of row g + 8. Both factors stand in memory with k running fastest, so each is one 16-byte load. (The tensor
   core numbers k otherwise, but any order is right that is the same for both factors.) */
static __device__ void llm__multiply_32(float sums[4], uint4 upper, uint4 lower, uint4 column) {
#ifdef __CUDACC__
    llm__tensor_core(sums, upper.x, lower.x, upper.y, lower.y, column.x, column.y);
    llm__tensor_core(sums, upper.z, lower.z, upper.w, lower.w, column.z, column.w);
#else
    llm__factors own = {upper, lower, column};
    const llm__factors *lanes = cuda_host_warp(own);
    int lane = (int)threadIdx.x % 32, first = lane / 4 * 4, left = lane % 4 * 8, right = left + 4;
    for (int t = 0; t < 4; t++) {
        sums[0] += llm__dot_8(lanes[first + t].upper, lanes[left + t].column);
        sums[1] += llm__dot_8(lanes[first + t].upper, lanes[right + t].column);
        sums[2] += llm__dot_8(lanes[first + t].lower, lanes[left + t].column);
        sums[3] += llm__dot_8(lanes[first + t].lower, lanes[right + t].column);
    }
#endif
}

/* a + b of two pairs of bf16, where that is exact. */
static __device__ uint32_t llm__add_pairs(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
    uint32_t sum;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
    return sum;
#else
    return __float_as_uint(llm__low(a) + llm__low(b)) >> 16 | __float_as_uint(llm__high(a) + llm__high(b));
#endif
}

/* (v & mask) | added, in one instruction: the compiler makes two of it, for two constants. */
static __device__ uint32_t llm__mask_and_add(uint32_t v, uint32_t mask, uint32_t added) {
#ifdef __CUDACC__
    uint32_t bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(bits) : "r"(v), "r"(mask), "r"(added));
    return bits;
#else
    return (v & mask) | added;
#endif
}

/* The signed bytes at bits 0 and 16 of v as bf16: 128 + the low seven bits, less 128, or less 256 if the eighth is set. */
static __device__ uint32_t llm__widen_2(uint32_t v) {
    return llm__add_pairs(llm__mask_and_add(v, 0x007F007Fu, 0x43004300u), llm__mask_and_add(v, 0x00800080u, 0xC300C300u));
}

/* Eight signed bytes as bf16. In memory the middle two of each four are exchanged, see llm__byte_place. */
static __device__ uint4 llm__widen_8(uint32_t a, uint32_t b) {
    return make_uint4(llm__widen_2(a), llm__widen_2(a >> 8), llm__widen_2(b), llm__widen_2(b >> 8));
}

static __host__ __device__ int llm__byte_place(int i) { return (i & ~3) | (i & 1) << 1 | (i >> 1 & 1); }

/* Eight numbers of four bits as bf16, 128 too large each: the bits go into the mantissa of 2^7. Nibble i and nibble i + 4
   are neighbours in k. */
static __device__ uint4 llm__widen_nibbles(uint32_t v) {
    const uint32_t mask = 0x000F000Fu, added = 0x43004300u;
    return make_uint4(llm__mask_and_add(v, mask, added), llm__mask_and_add(v >> 4, mask, added), llm__mask_and_add(v >> 8, mask, added),
                      llm__mask_and_add(v >> 12, mask, added));
}

/* The f16 in the low 16 bits, which is finite. */
static __device__ float llm__half(uint32_t bits) {
#ifdef __CUDA_ARCH__
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((uint16_t)bits));
    return x;
#else
    return __uint_as_float((bits & 0x7FFFu) << 13 | (bits & 0x8000u) << 16) * 0x1p112f;
#endif
}

/* Eight f16 w as bf16: w = high + low, exactly. The high ones have the first eight digits of w, the low ones the other three. */
typedef struct llm__enc_split {
    uint4 high, low;
} llm__enc_split;

static __device__ void llm__split_2(uint32_t pair, uint32_t *high, uint32_t *low) {
    float a = llm__half(pair & 0xFFFFu), b = llm__half(pair >> 16);
    uint32_t a_high = __float_as_uint(a) & 0xFFFF0000u, b_high = __float_as_uint(b) & 0xFFFF0000u;
    *high = a_high >> 16 | b_high;
    *low = __float_as_uint(a - __uint_as_float(a_high)) >> 16 | __float_as_uint(b - __uint_as_float(b_high));
}

static __device__ llm__enc_split llm__split_8(uint4 v) {
    llm__enc_split s;
    llm__split_2(v.x, &s.high.x, &s.low.x);
    llm__split_2(v.y, &s.high.y, &s.low.y);
    llm__split_2(v.z, &s.high.z, &s.low.z);
    llm__split_2(v.w, &s.high.w, &s.low.w);
    return s;
}

static __host__ __device__ uint16_t llm__round_bits(uint32_t u) {
    if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (uint16_t)(u >> 16 | 0x40); /* NaN stays NaN */
    return (uint16_t)((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

static __device__ uint16_t llm__to_bf16(float x) { return llm__round_bits(__float_as_uint(x)); }
static __device__ float llm__from_bf16(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }
static __device__ float llm__silu(float x) { return x / (1.0f + expf(-x)); }

static __device__ float llm__warp_sum(float x) {
    for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, step);
    return x;
}

static __device__ float llm__warp_max(float x) {
    for (int step = 16; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, step));
    return x;
}

/* ==== 3 What kernels are told =================================================================================== */

enum {
    LLM__MOST_ROWS = 65535, /* of a pass: what a grid's second dimension can be                         */
    LLM__FUSED_ROWS = 16, /* rows the fused kernels take                                               */
    LLM__WARPS = 8,       /* of a block of a fused product; they share out k                           */
    LLM__PAIRS = 8,       /* pairs of outputs such a block computes, see section 4                     */
    LLM__ATTEND_WARPS = 4,
    LLM__STEP = 64,       /* keys an attention block takes at a time, 16 for each warp                 */
    LLM__TILE_COLUMNS = 32, /* queries, over the heads that share a key head, it answers at once       */
    LLM__MOST_SPANS = 64, /* pieces the keys of one query are cut into at most                         */
    LLM__MOST_HEAD_DIM = 256,
    LLM__PAD = 128        /* activations are padded to this                                            */
};

typedef enum llm__checkpoint_format {
    LLM__BF16,
    LLM__F16,
    LLM__INT8,        /* a scale for each output                                                       */
    LLM__INT8_GROUPS, /* scale and minimum for each 32 inputs of an output, as with LLM__INT4_GROUPS   */
    LLM__INT4_GROUPS
} llm__checkpoint_format;

/* [n][k] numbers, k padded with zeros to whole turns of 64 bytes. Groups lie in a turn so that each of four lanes finds
   its inputs 8t .. 8t+7 of all groups in 16 bytes: [turn][t][group]. */
typedef struct llm__gpu_matrix {
    llm__checkpoint_format format;
    uint8_t *data;
    uint32_t *scales; /* LLM__INT8: [n] floats; groups: [n][k / 32] pairs of f16, the scale in the low half */
    int n, k;
} llm__gpu_matrix;

/* Numbers in 64 bytes of a row. */
static __host__ __device__ constexpr int llm__turn(int format) { return format <= LLM__F16 ? 32 : format == LLM__INT4_GROUPS ? 128 : 64; }

static __host__ __device__ size_t llm__row_bytes(llm__gpu_matrix m) { return (size_t)(m.k / llm__turn(m.format)) * 64; }

static __host__ __device__ int llm__pad(int n, int step) { return (n + step - 1) / step * step; }

/* From one row of a matrix's inputs to the next. */
static __host__ __device__ int llm__input_stride(llm__gpu_matrix m) { return llm__pad(m.k, LLM__PAD); }

/* Where in a row of a matrix in groups inputs i .. i+7 stand, i being a multiple of 8. */
static __host__ __device__ size_t llm__group_place(int format, int i) {
    int in_turn = i / 32 % (llm__turn(format) / 32), bytes = format == LLM__INT4_GROUPS ? 4 : 8;
    return (size_t)(i / llm__turn(format) * 64 + i % 32 / 8 * 16 + in_turn * bytes);
}

/* The pass, in the GPU's memory. A kernel reads it there, so that one recorded graph serves every position. */
typedef struct llm__fwd_rows {
    const int *counts;     /* rows, rows with logits, query tiles                        */
    const int *tokens, *positions;
    const int *slots;      /* which of the tables is the row's sequence's                */
    const int *logit_rows;
    const int *tile_first, *tile_rows; /* query tiles: neighbouring rows of one sequence */
    const int *tables;     /* [slot][blocks_per_seq]                                     */
    int blocks_per_seq;
} llm__fwd_rows;

/* Block b of the KV cache is one run of memory: [layer][keys, values][head]. A head's keys stand [place][dimension], its
   values [dimension][place], both with the dimensions padded to `stride`: so scores and weighted sums are both products
   of rows in which k runs fastest. */
typedef struct llm__kv {
    uint16_t *data;
    size_t block_size; /* in elements */
    int n_heads, stride;
} llm__kv;

static __device__ uint16_t *llm__keys(llm__kv kv, int block, int layer, int head) {
    return kv.data + (size_t)block * kv.block_size + ((size_t)layer * 2 * kv.n_heads + head) * LLM_BLOCK * kv.stride;
}

static __device__ uint16_t *llm__values(llm__kv kv, int block, int layer, int head) {
    return llm__keys(kv, block, layer, kv.n_heads + head);
}

static __device__ const int *llm__table(llm__fwd_rows rows, int row) {
    return rows.tables + (size_t)rows.slots[row] * rows.blocks_per_seq;
}

/* One head's query, key or value dimension of a row, to where attention looks for it. */
typedef struct llm__qkv_store {
    llm__kv kv;
    uint16_t *q; /* [rows][n_heads][kv.stride] */
    const float *cosines, *sines; /* [rows][rope_dim / 2] */
    int n_heads, head_dim, rope_dim, layer;
    const float *bias;            /* [(n_heads + 2 kv.n_heads) * head_dim]; NULL: none                          */
    const float *q_norm, *k_norm; /* [head_dim]; NULL: heads do not go through an RMSNorm                       */
    float eps;
} llm__qkv_store;

static __device__ void llm__store_dim(const llm__qkv_store *s, llm__fwd_rows rows, int row, int head, int dim, float value) {
    uint16_t bits = llm__to_bf16(value);
    if (head < s->n_heads) {
        s->q[((size_t)row * s->n_heads + head) * s->kv.stride + dim] = bits;
        return;
    }
    int at = rows.positions[row], place = at % LLM_BLOCK, block = llm__table(rows, row)[at / LLM_BLOCK];
    head -= s->n_heads;
    if (head < s->kv.n_heads) llm__keys(s->kv, block, s->layer, head)[(size_t)place * s->kv.stride + dim] = bits;
    else llm__values(s->kv, block, s->layer, head - s->kv.n_heads)[dim * LLM_BLOCK + place] = bits;
}

/* Dimensions of a head go in pairs: those that RoPE turns together, then what is left, by twos. */
static __device__ int llm__pair_dim(int pair, int rope_dim, int second) {
    int half = rope_dim / 2;
    return pair < half ? pair + second * half : 2 * pair + second;
}

static __device__ void llm__store_pair(const llm__qkv_store *s, llm__fwd_rows rows, int row, int head, int pair, float a, float b) {
    int half = s->rope_dim / 2, first = llm__pair_dim(pair, s->rope_dim, 0), second = llm__pair_dim(pair, s->rope_dim, 1);
    if (pair < half && head < s->n_heads + s->kv.n_heads) {
        float cosine = s->cosines[row * half + pair], sine = s->sines[row * half + pair], turned = a * cosine - b * sine;
        b = a * sine + b * cosine;
        a = turned;
    }
    if (first < s->head_dim) llm__store_dim(s, rows, row, head, first, a);
    if (second < s->head_dim) llm__store_dim(s, rows, row, head, second, b);
}

/* ==== 4 Fused products ==========================================================================================

   Up to 16 rows meet a weight matrix as the columns of a tensor-core product. The matrix is read once; everything else
   is done at the product's end. The floor is the matrix's bytes over the memory's bandwidth.

   A block computes 16 outputs, as 8 pairs (a, b) whose sums meet in one thread: the two dimensions RoPE turns together,
   a gate and its up, or just neighbours. Its 8 warps share out k in turns of 64 bytes, so a block reads 512 bytes of each
   of its 16 rows at a time, 4 such loads in flight per warp; the first are on their way before the kernels ahead are done.
   A row's sums are taken in the same order however many rows there are. int8 is widened in registers, exactly; its
   scales, one for each output, are the sums' business. f16 is split in two there, each of which meets the inputs. Of weights in groups the tensor core multiplies the whole numbers,
   32 at a time, and a matrix of ones by the same inputs: sum += scale * (q . x) + minimum * (1 . x).

   RMSNorm is folded in: whoever writes the residual stream x also writes bf16(x * norm weight), which the next product
   reads, and the squares of its 16 outputs; the product's end divides by the root of their mean. */

typedef enum llm__kernel_ending { LLM__QKV, LLM__PLAIN, LLM__RESIDUAL, LLM__SWIGLU, LLM__LOGITS } llm__kernel_ending;

typedef struct llm__product {
    llm__fwd_rows rows;
    llm__gpu_matrix weight;
    int n;                    /* outputs; LLM__SWIGLU: n_ff                                        */
    const uint16_t *x;        /* [rows][llm__input_stride(weight)]                                 */
    const float *squares;     /* [rows][n_squares] of what x was made from                         */
    int n_squares, n_embd;
    float eps;
    llm__qkv_store store;     /* LLM__QKV                                                          */
    float *residual;          /* LLM__RESIDUAL: [rows][n]; then, for the product after this one:   */
    const float *next_norm;   /* [n]                                                               */
    uint16_t *next_x;         /* [rows][next_stride]; with LLM__SWIGLU the products of the pairs   */
    int next_stride;
    float *next_squares;      /* [rows][blocks]                                                    */
    float *out;               /* LLM__PLAIN: [rows][n]; LLM__LOGITS: [rows with logits][n]         */
} llm__product;

/* The outputs of pair `pair` of block `block`; -1: there is none. */
template <int ENDING>
static __device__ int llm__output(const llm__product &p, int block, int pair, int second) {
    if (ENDING == LLM__QKV) {
        int blocks_per_head = ((p.store.head_dim + 1) / 2 + LLM__PAIRS - 1) / LLM__PAIRS;
        int dim = llm__pair_dim(block % blocks_per_head * LLM__PAIRS + pair, p.store.rope_dim, second);
        return dim < p.store.head_dim ? block / blocks_per_head * p.store.head_dim + dim : -1;
    }
    if (ENDING == LLM__SWIGLU) {
        int i = block * LLM__PAIRS + pair;
        return i < p.n ? i + second * p.n : -1;
    }
    int i = (block * 2 + second) * LLM__PAIRS + pair;
    return i < p.n ? i : -1;
}

static __device__ void llm__end_qkv(const llm__product &p, int row, int pair, int output_a, int output_b, float a, float b) {
    int blocks_per_head = ((p.store.head_dim + 1) / 2 + LLM__PAIRS - 1) / LLM__PAIRS, block = (int)blockIdx.x;
    if (p.store.bias) {
        a += p.store.bias[output_a];
        b += output_b < 0 ? 0 : p.store.bias[output_b];
    }
    llm__store_pair(&p.store, p.rows, row, block / blocks_per_head, block % blocks_per_head * LLM__PAIRS + pair, a, b);
}

/* Adds to the residual stream, and readies it for the next product. Eight neighbouring threads have the pairs of a row. */
static __device__ void llm__end_residual(const llm__product &p, int row, bool wanted, int pair, int a, int b, float sum_a, float sum_b) {
    float square = 0;
    for (int i = 0; i < 2; i++) {
        int output = i ? b : a;
        if (!wanted || output < 0) continue;
        float x = p.residual[(size_t)row * p.n + output] += i ? sum_b : sum_a;
        p.next_x[(size_t)row * p.next_stride + output] = llm__to_bf16(x * p.next_norm[output]);
        square += x * x;
    }
    for (int step = 4; step; step /= 2) square += __shfl_xor_sync(0xFFFFFFFFu, square, step);
    if (wanted && pair == 0) p.next_squares[(size_t)row * gridDim.x + blockIdx.x] = square;
}

/* 1 / sqrt(mean(x^2) + eps) of a row, by one warp. */
static __device__ float llm__inverse_norm(const llm__product &p, int row) {
    float sum = 0;
    for (int i = (int)threadIdx.x % 32; i < p.n_squares; i += 32) sum += p.squares[(size_t)row * p.n_squares + i];
    return 1.0f / sqrtf(llm__warp_sum(sum) / (float)p.n_embd + p.eps);
}

/* What a turn of groups adds; see llm__multiply_turn. Nibbles come 128 too large, which is taken off again in f32. */
template <int FORMAT>
static __device__ void llm__multiply_groups(float sums[4], uint4 upper, uint4 lower, uint4 upper_scales, uint4 lower_scales, const uint16_t *x) {
    constexpr float excess = FORMAT == LLM__INT4_GROUPS ? 128 : 0;
    const uint32_t a[4] = {upper.x, upper.y, upper.z, upper.w}, b[4] = {lower.x, lower.y, lower.z, lower.w};
    const uint32_t a_scales[4] = {upper_scales.x, upper_scales.y, upper_scales.z, upper_scales.w};
    const uint32_t b_scales[4] = {lower_scales.x, lower_scales.y, lower_scales.z, lower_scales.w};
    const uint4 ones = make_uint4(0x3F803F80u, 0x3F803F80u, 0x3F803F80u, 0x3F803F80u);
#pragma unroll
    for (int j = 0; j < llm__turn(FORMAT) / 32; j++) {
        uint4 column = *(const uint4 *)(x + 32 * j);
        float dots[4] = {}, totals[4] = {};
        if (FORMAT == LLM__INT4_GROUPS) llm__multiply_32(dots, llm__widen_nibbles(a[j]), llm__widen_nibbles(b[j]), column);
        else llm__multiply_32(dots, llm__widen_8(a[2 * j % 4], a[2 * j % 4 + 1]), llm__widen_8(b[2 * j % 4], b[2 * j % 4 + 1]), column);
        llm__multiply_32(totals, ones, ones, column);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t d = i < 2 ? a_scales[j] : b_scales[j];
            sums[i] = fmaf(llm__half(d), dots[i], fmaf(llm__half(d >> 16) - excess * llm__half(d), totals[i], sums[i]));
        }
    }
}

/* What one turn adds: a lane has 16 bytes of its two rows of the matrix, and the inputs that belong to them. */
template <int FORMAT>
static __device__ void llm__multiply_turn(float sums[4], uint4 upper, uint4 lower, uint4 upper_scales, uint4 lower_scales, const uint16_t *x) {
    if (FORMAT == LLM__BF16) {
        llm__multiply_32(sums, upper, lower, *(const uint4 *)x);
    } else if (FORMAT == LLM__F16) {
        llm__enc_split a = llm__split_8(upper), b = llm__split_8(lower);
        llm__multiply_32(sums, a.high, b.high, *(const uint4 *)x);
        llm__multiply_32(sums, a.low, b.low, *(const uint4 *)x);
    } else if (FORMAT == LLM__INT8) {
        llm__multiply_32(sums, llm__widen_8(upper.x, upper.y), llm__widen_8(lower.x, lower.y), *(const uint4 *)x);
        llm__multiply_32(sums, llm__widen_8(upper.z, upper.w), llm__widen_8(lower.z, lower.w), *(const uint4 *)(x + 8));
    } else {
        llm__multiply_groups<FORMAT>(sums, upper, lower, upper_scales, lower_scales, x);
    }
}

/* A lane's 16 bytes of a turn, and the scales and minima of its groups; turns are counted through all rows. */
template <int FORMAT>
static __device__ void llm__load_turn(const llm__gpu_matrix &m, unsigned turn, int t, uint4 *numbers, uint4 *scales) {
    *numbers = llm__load_once(m.data + (size_t)turn * 64 + 16 * t);
    if (FORMAT == LLM__INT4_GROUPS) *scales = llm__load_once(m.scales + (size_t)turn * 4);
    if (FORMAT != LLM__INT8_GROUPS) return;
    uint2 v = *(const uint2 *)(m.scales + (size_t)turn * 2);
    *scales = make_uint4(v.x, v.y, 0, 0);
}

/* TILES * 8 columns. */
template <int ENDING, int TILES, int FORMAT>
static __global__ void __launch_bounds__(LLM__WARPS * 32, FORMAT >= LLM__INT8_GROUPS ? 2 : 3) llm__fused_product(llm__product p) {
    constexpr bool GROUPS = FORMAT >= LLM__INT8_GROUPS;
    constexpr int IN_FLIGHT = GROUPS ? (TILES == 1 ? 3 : 1) : TILES == 1 ? 4 : 2, COLUMNS = TILES * 8, TURN = llm__turn(FORMAT);
    __shared__ float parts[LLM__WARPS][COLUMNS][17], scales[COLUMNS];
    int warp = (int)threadIdx.x / 32, lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4, n_turns = p.weight.k / TURN;
    int a = llm__output<ENDING>(p, (int)blockIdx.x, g, 0), b = llm__output<ENDING>(p, (int)blockIdx.x, g, 1);
    unsigned upper_row = (unsigned)(a < 0 ? 0 : a) * (unsigned)n_turns, lower_row = (unsigned)(b < 0 ? 0 : b) * (unsigned)n_turns;
    uint4 upper[IN_FLIGHT] = {}, lower[IN_FLIGHT] = {}, upper_scales[IN_FLIGHT] = {}, lower_scales[IN_FLIGHT] = {};
    float sums[TILES][4] = {};
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++) {
        int turn = warp + i * LLM__WARPS;
        if (turn >= n_turns) continue;
        llm__load_turn<FORMAT>(p.weight, upper_row + (unsigned)turn, t, &upper[i], &upper_scales[i]);
        llm__load_turn<FORMAT>(p.weight, lower_row + (unsigned)turn, t, &lower[i], &lower_scales[i]);
    }
    llm__let_next_start();
    llm__wait_for_previous();
    int n_columns = p.rows.counts[ENDING == LLM__LOGITS];
    if (n_columns == 0) return;
    const uint16_t *x[TILES];
#pragma unroll
    for (int j = 0; j < TILES; j++) {
        int column = 8 * j + g < n_columns ? 8 * j + g : 0; /* absent columns repeat the first, and are left at the end */
        x[j] = p.x + (size_t)(ENDING == LLM__LOGITS ? p.rows.logit_rows[column] : column) * llm__input_stride(p.weight) + (GROUPS ? 8 : TURN / 4) * t;
    }
    for (int first = warp; first < n_turns; first += IN_FLIGHT * LLM__WARPS) {
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            int turn = first + i * LLM__WARPS, next = turn + IN_FLIGHT * LLM__WARPS;
            if (turn >= n_turns) continue;
#pragma unroll
            for (int j = 0; j < TILES; j++)
                llm__multiply_turn<FORMAT>(sums[j], upper[i], lower[i], upper_scales[i], lower_scales[i], x[j] + turn * TURN);
            if (next >= n_turns) continue;
            llm__load_turn<FORMAT>(p.weight, upper_row + (unsigned)next, t, &upper[i], &upper_scales[i]);
            llm__load_turn<FORMAT>(p.weight, lower_row + (unsigned)next, t, &lower[i], &lower_scales[i]);
        }
    }
#pragma unroll
    for (int j = 0; j < TILES; j++)
        for (int i = 0; i < 4; i++) parts[warp][8 * j + 2 * t + i % 2][g + i / 2 * 8] = sums[j][i];
    if (ENDING != LLM__RESIDUAL)
        for (int column = warp; column < n_columns; column += LLM__WARPS) {
            float scale = llm__inverse_norm(p, ENDING == LLM__LOGITS ? p.rows.logit_rows[column] : column);
            if (lane == 0) scales[column] = scale;
        }
    __syncthreads();

    int column = (int)threadIdx.x / LLM__PAIRS, pair = (int)threadIdx.x % LLM__PAIRS;
    if (column >= COLUMNS) return; /* whole warps */
    bool wanted = column < n_columns;
    float sum_a = 0, sum_b = 0;
    for (int i = 0; i < LLM__WARPS; i++) {
        sum_a += parts[i][column][pair];
        sum_b += parts[i][column][pair + 8];
    }
    a = llm__output<ENDING>(p, (int)blockIdx.x, pair, 0);
    b = llm__output<ENDING>(p, (int)blockIdx.x, pair, 1);
    if (FORMAT == LLM__INT8) {
        sum_a *= a < 0 ? 0 : __uint_as_float(p.weight.scales[a]);
        sum_b *= b < 0 ? 0 : __uint_as_float(p.weight.scales[b]);
    }
    if (ENDING == LLM__RESIDUAL) {
        llm__end_residual(p, column, wanted, pair, a, b, sum_a, sum_b);
        return;
    }
    if (!wanted) return;
    sum_a *= scales[column];
    sum_b *= scales[column];
    if (ENDING == LLM__QKV && a >= 0) llm__end_qkv(p, column, pair, a, b, sum_a, sum_b);
    if (ENDING == LLM__SWIGLU && a >= 0) p.next_x[(size_t)column * p.next_stride + a] = llm__to_bf16(llm__silu(sum_a) * sum_b);
    if (ENDING != LLM__PLAIN && ENDING != LLM__LOGITS) return;
    if (a >= 0) p.out[(size_t)column * p.n + a] = sum_a;
    if (b >= 0) p.out[(size_t)column * p.n + b] = sum_b;
}

typedef struct llm__start {
    llm__fwd_rows rows;
    llm__gpu_matrix embedding; /* [n_vocab][n_embd] */
    const double *frequencies;
    float *cosines, *sines, rope_scale;
    int n_embd, half;
    float *x;                  /* [rows][n_embd] */
    const float *next_norm;    /* as of llm__product; NULL in the plain pass */
    uint16_t *next_x;
    float *next_squares;
} llm__start;

/* The angles by which RoPE turns a row; in double, because positions are large. */
static __device__ void llm__find_angles(const llm__start &s, int row) {
    for (int i = (int)threadIdx.x; i < s.half; i += (int)blockDim.x) {
        double sine, cosine;
        sincos(s.rows.positions[row] * s.frequencies[i], &sine, &cosine);
        s.cosines[row * s.half + i] = (float)cosine * s.rope_scale;
        s.sines[row * s.half + i] = (float)sine * s.rope_scale;
    }
}

/* One weight. */
static __device__ float llm__element(llm__gpu_matrix m, int row, int i) {
    const uint8_t *from = m.data + row * llm__row_bytes(m);
    if (m.format == LLM__BF16) return llm__from_bf16(((const uint16_t *)from)[i]);
    if (m.format == LLM__F16) return llm__half(((const uint16_t *)from)[i]);
    if (m.format == LLM__INT8) return (float)((const int8_t *)from)[llm__byte_place(i)] * __uint_as_float(m.scales[row]);
    const uint8_t *eight = from + llm__group_place(m.format, i / 8 * 8);
    uint32_t d = m.scales[(size_t)row * (m.k / 32) + i / 32];
    int q = m.format == LLM__INT8_GROUPS ? ((const int8_t *)eight)[llm__byte_place(i % 8)] : (int)(*(const uint32_t *)eight >> (i % 8 / 2 * 4 + i % 2 * 16) & 15);
    return (float)q * llm__half(d) + llm__half(d >> 16);
}

/* The first kernel of a pass: one block a row. */
static __global__ void llm__embed(llm__start s) {
    int row = (int)blockIdx.x, n_squares = (s.n_embd + 15) / 16;
    if (row >= s.rows.counts[0]) return;
    llm__find_angles(s, row);
    for (int i = (int)threadIdx.x; i < n_squares; i += (int)blockDim.x) {
        float square = 0;
        for (int j = 16 * i; j < 16 * i + 16 && j < s.n_embd; j++) {
            float x = llm__element(s.embedding, s.rows.tokens[row], j);
            s.x[(size_t)row * s.n_embd + j] = x;
            square += x * x;
            if (s.next_norm) s.next_x[(size_t)row * llm__input_stride(s.embedding) + j] = llm__to_bf16(x * s.next_norm[j]);
        }
        if (s.next_norm) s.next_squares[(size_t)row * n_squares + i] = square;
    }
}

/* ==== 5 Fused attention =========================================================================================

   A block answers a tile of queries that share a sequence and a key head, as columns of tensor-core products: scores
   are keys times queries, the answer is values times softmax weights, and the softmax goes along step by step (Milakov
   and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, 2205.14135). When few queries are asked their keys are cut
   into spans of a fixed length, each a block's work ("flash-decoding"), and the last block to finish joins them in
   order. The floor is the bytes of the keys and values. */

typedef struct llm__attn_run {
    llm__fwd_rows rows;
    llm__kv kv;
    const uint16_t *q;   /* [rows][n_heads][kv.stride]                                           */
    uint16_t *out;       /* [rows][out_stride]                                                   */
    int out_stride, n_heads, head_dim, layer;
    int window;          /* positions a query sees, its own included; 0: all before it                */
    float scale;         /* of scores: log2(e) / sqrt(head_dim)                                  */
    int span;            /* keys in a span; 0: tiles of several rows, whose keys are not cut     */
    float *partial;      /* [row][key head][LLM__MOST_SPANS][group][kv.stride + 2]: the answer of a span, its maximum and sum */
    unsigned *n_done;    /* [row][key head] spans that are done; zero between kernels            */
} llm__attn_run;

/* What a block knows of its tile. */
template <int COLUMNS>
struct llm__tile {
    float scores[COLUMNS][LLM__STEP + 1];
    alignas(16) uint16_t weights[COLUMNS][LLM__STEP + 8];
    float max[COLUMNS], sum[COLUMNS], shrink[COLUMNS];
    int first_key[COLUMNS], last_key[COLUMNS];
};

/* The first key that a query at this position sees. */
static __device__ int llm__attn_first_key(const llm__attn_run &a, int position) {
    return a.window && position >= a.window ? position - a.window + 1 : 0;
}

/* The scores of 16 keys, from `key` on, by one warp. */
template <int COLUMNS>
static __device__ void llm__score(const llm__attn_run &a, llm__tile<COLUMNS> *tile, int first_row, int n_columns, int group,
                                  const int *table, int key, int end, int place) {
    int lane = (int)threadIdx.x % 32, g = lane / 4, t = lane % 4, head = (int)blockIdx.y;
    float sums[COLUMNS / 8][4] = {};
    if (key < end) {
        const uint16_t *keys = llm__keys(a.kv, table[key / LLM_BLOCK], a.layer, head) + (size_t)(key % LLM_BLOCK + g) * a.kv.stride + 8 * t;
        for (int d = 0; d < a.kv.stride; d += 32) {
            uint4 upper = *(const uint4 *)(keys + d), lower = *(const uint4 *)(keys + 8 * a.kv.stride + d);
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++) {
                int column = 8 * j + g;
                const uint16_t *q = a.q + ((size_t)(first_row + column / group) * a.n_heads + head * group + column % group) * a.kv.stride + d + 8 * t;
                llm__multiply_32(sums[j], upper, lower, column < n_columns ? *(const uint4 *)q : make_uint4(0, 0, 0, 0));
            }
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
        for (int i = 0; i < 4; i++) {
            int column = 8 * j + 2 * t + i % 2, at = g + i / 2 * 8;
            bool seen = key + at < end && key + at >= tile->first_key[column] && key + at <= tile->last_key[column];
            tile->scores[column][place + at] = seen ? sums[j][i] * a.scale : -INFINITY;
        }
}

/* Scores become weights 2^(score - max), by a warp for each column in turn. */
template <int COLUMNS>
static __device__ void llm__weigh(llm__tile<COLUMNS> *tile, int n_columns) {
    int lane = (int)threadIdx.x % 32;
    for (int column = (int)threadIdx.x / 32; column < n_columns; column += LLM__ATTEND_WARPS) {
        float x = tile->scores[column][lane], y = tile->scores[column][lane + 32], old = tile->max[column];
        float max = llm__warp_max(fmaxf(fmaxf(x, y), old));
        float base = max == -INFINITY ? 0 : max; /* nothing seen yet: all weights are 0 */
        x = exp2f(x - base);
        y = exp2f(y - base);
        float sum = llm__warp_sum(x + y), shrink = exp2f(old - base);
        tile->weights[column][lane] = llm__to_bf16(x);
        tile->weights[column][lane + 32] = llm__to_bf16(y);
        __syncwarp();
        if (lane) continue;
        tile->max[column] = max;
        tile->sum[column] = tile->sum[column] * shrink + sum;
        tile->shrink[column] = shrink;
    }
}

/* answer = answer * shrink + values * weights; a warp has every fourth 16 of the dimensions. */
template <int COLUMNS, int DIMS>
static __device__ void llm__gather(const llm__attn_run &a, const llm__tile<COLUMNS> *tile, const int *table, int key, int end,
                                   float answer[DIMS][COLUMNS / 8][4]) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j++)
        for (int i = 0; i < 4; i++)
            for (int d = 0; d < DIMS; d++) answer[d][j][i] *= tile->shrink[8 * j + 2 * t + i % 2];
    for (int block = 0; block < LLM__STEP / LLM_BLOCK && key + block * LLM_BLOCK < end; block++) {
        const uint16_t *values = llm__values(a.kv, table[key / LLM_BLOCK + block], a.layer, (int)blockIdx.y) + g * LLM_BLOCK + 8 * t;
#pragma unroll
        for (int d = 0; d < DIMS; d++) {
            int dim = 16 * (warp + d * LLM__ATTEND_WARPS);
            if (dim >= a.kv.stride) continue;
            uint4 upper = *(const uint4 *)(values + dim * LLM_BLOCK), lower = *(const uint4 *)(values + (dim + 8) * LLM_BLOCK);
#pragma unroll
            for (int j = 0; j < COLUMNS / 8; j++)
                llm__multiply_32(answer[d][j], upper, lower, *(const uint4 *)&tile->weights[8 * j + g][block * LLM_BLOCK + 8 * t]);
        }
    }
}

static __device__ float *llm__partial(const llm__attn_run &a, int row, int span, int in_group) {
    int group = a.n_heads / a.kv.n_heads;
    return a.partial + ((((size_t)row * a.kv.n_heads + blockIdx.y) * LLM__MOST_SPANS + span) * group + in_group) * (a.kv.stride + 2);
}

/* Writes the answers of keys [begin, end), whole or to be joined. */
template <int COLUMNS, int DIMS>
static __device__ void llm__attend_span(const llm__attn_run &a, llm__tile<COLUMNS> *tile, int first_row, int n_columns, int span,
                                        int begin, int end, bool whole) {
    int lane = (int)threadIdx.x % 32, warp = (int)threadIdx.x / 32, g = lane / 4, t = lane % 4, group = a.n_heads / a.kv.n_heads;
    const int *table = llm__table(a.rows, first_row);
    float answer[DIMS][COLUMNS / 8][4] = {};
    for (int i = (int)threadIdx.x; i < COLUMNS; i += (int)blockDim.x) {
        tile->max[i] = -INFINITY;
        tile->sum[i] = 0;
        tile->shrink[i] = 0;
        tile->last_key[i] = i < n_columns ? a.rows.positions[first_row + i / group] : -1;
        tile->first_key[i] = llm__attn_first_key(a, tile->last_key[i]);
        for (int j = 0; i >= n_columns && j < LLM__STEP; j++) tile->weights[i][j] = 0;
    }
    __syncthreads();
    for (int key = begin; key < end; key += LLM__STEP) {
        llm__score<COLUMNS>(a, tile, first_row, n_columns, group, table, key + 16 * warp, end, 16 * warp);
        __syncthreads();
        llm__weigh<COLUMNS>(tile, n_columns);
        __syncthreads();
        llm__gather<COLUMNS, DIMS>(a, tile, table, key, end, answer);
    }
#pragma unroll
    for (int d = 0; d < DIMS; d++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
            for (int i = 0; i < 4; i++) {
                int dim = 16 * (warp + d * LLM__ATTEND_WARPS) + g + i / 2 * 8, column = 8 * j + 2 * t + i % 2;
                if (dim >= a.head_dim || column >= n_columns) continue;
                int row = first_row + column / group, head = (int)blockIdx.y * group + column % group;
                if (whole) a.out[(size_t)row * a.out_stride + head * a.head_dim + dim] = llm__to_bf16(answer[d][j][i] / tile->sum[column]);
                else llm__partial(a, row, span, column)[dim] = answer[d][j][i];
            }
    if (!whole && (int)threadIdx.x < n_columns) {
        float *stats = llm__partial(a, first_row, span, (int)threadIdx.x) + a.kv.stride;
        stats[0] = tile->max[threadIdx.x];
        stats[1] = tile->sum[threadIdx.x];
    }
    __syncthreads();
}

/* Joins spans [first, n_spans) of one row, in order. */
static __device__ void llm__join_spans(const llm__attn_run &a, int row, int first, int n_spans) {
    int group = a.n_heads / a.kv.n_heads;
    for (int i = (int)threadIdx.x; i < group * a.head_dim; i += (int)blockDim.x) {
        int in_group = i / a.head_dim, dim = i % a.head_dim;
        float max = -INFINITY, sum = 0, answer = 0;
        for (int span = first; span < n_spans; span++) max = fmaxf(max, __ldcg(llm__partial(a, row, span, in_group) + a.kv.stride));
        for (int span = first; span < n_spans; span++) {
            const float *from = llm__partial(a, row, span, in_group);
            float weight = exp2f(__ldcg(from + a.kv.stride) - max);
            sum += __ldcg(from + a.kv.stride + 1) * weight;
            answer += __ldcg(from + dim) * weight;
        }
        a.out[(size_t)row * a.out_stride + ((int)blockIdx.y * group + in_group) * a.head_dim + dim] = llm__to_bf16(answer / sum);
    }
}

/* Grid: blocks that share out the spans; key heads; tiles (with spans: rows). DIMS * 64 dimensions. */
template <int COLUMNS, int DIMS>
static __global__ void __launch_bounds__(LLM__ATTEND_WARPS * 32, 2) llm__fused_attention(llm__attn_run a) {
    __shared__ llm__tile<COLUMNS> tile;
    __shared__ bool is_last;
    llm__let_next_start();
    llm__wait_for_previous();
    int group = a.n_heads / a.kv.n_heads, n_tiles = a.rows.counts[a.span ? 0 : 2];
    if ((int)blockIdx.z >= n_tiles) return;
    if (!a.span) {
        int i = n_tiles - 1 - (int)blockIdx.z, first = a.rows.tile_first[i], n = a.rows.tile_rows[i]; /* the longest first */
        int begin = llm__attn_first_key(a, a.rows.positions[first]) / LLM__STEP * LLM__STEP;
        llm__attend_span<COLUMNS, DIMS>(a, &tile, first, n * group, 0, begin, a.rows.positions[first + n - 1] + 1, true);
        return;
    }
    int row = (int)blockIdx.z, n_keys = a.rows.positions[row] + 1, n_spans = (n_keys + a.span - 1) / a.span;
    int first_step = llm__attn_first_key(a, n_keys - 1) / LLM__STEP * LLM__STEP, first_span = first_step / a.span;
    for (int span = first_span + (int)blockIdx.x; span < n_spans; span += (int)gridDim.x) {
        int begin = span == first_span ? first_step : span * a.span, end = llm__least((span + 1) * a.span, n_keys);
        bool whole = n_spans - first_span == 1;
        llm__attend_span<COLUMNS, DIMS>(a, &tile, row, group, span, begin, end, whole);
        if (whole) return;
        if (threadIdx.x == 0) {
            __threadfence(); /* after the barrier at the span's end: the whole block's writes come before the count */
            is_last = atomicAdd(&a.n_done[row * a.kv.n_heads + (int)blockIdx.y], 1u) + 1 == (unsigned)(n_spans - first_span);
            __threadfence();
        }
        __syncthreads();
        if (!is_last) continue;
        llm__join_spans(a, row, first_span, n_spans);
        if (threadIdx.x == 0) a.n_done[row * a.kv.n_heads + (int)blockIdx.y] = 0;
        return;
    }
}

/* ==== 6 Picking tokens ==========================================================================================

   What llm_sample does, where the logits are: one block reads them a few times, which next to the weights is nothing. A
   token's weight is a whole number, so that sums are exact and a seed means the same text on every run. Tokens in order
   of weight are cut to a prefix by top-k, top-p and min-p alike, so of each cut only the weight of what it leaves is
   needed; the least of the three is drawn in, and the token found where that much has gone by. */

enum { LLM__PICK_THREADS = 1024, LLM__WEIGHT_BITS = 27, LLM__LOW_BITS = 14, LLM__MOST_VOCAB = 1 << 18 };

/* In the GPU's memory; a kernel counts n_drawn and n_picked on. */
typedef struct llm__picker_state {
    float scale, top_p, min_p; /* log2(e) / temperature, 0: greedy */
    int top_k;
    unsigned long long seed, n_drawn;
    int n_picked;
} llm__picker_state;

typedef struct llm__picker {
    llm__fwd_rows rows; /* the first is the token's to be */
    const float *logits;
    int n_vocab;
    llm__picker_state *state;
    int *picked;    /* in the host's memory */
} llm__picker;

/* What the block shares. The sums of a step of the descent are in two parts, as atomics have 32 bits. */
typedef struct llm__pick_memory {
    unsigned counts[LLM__PICK_THREADS], low[LLM__PICK_THREADS], high[LLM__PICK_THREADS];
    unsigned long long warps[LLM__PICK_THREADS / 32];
    int bin;
    unsigned n_before;
    unsigned long long weight_before;
} llm__pick_memory;

/* The tokens of a weight, in the order of weights: `key` numbers the weights, the tokens above it are counted. */
typedef struct llm__place {
    uint32_t key;
    unsigned long long n_above, weight_above;
} llm__place;

static __device__ float llm__likelihood(const llm__picker &p, float max, float scale, int token) { return exp2f((p.logits[token] - max) * scale); }
static __device__ unsigned llm__weight(float likelihood) { return (unsigned)(likelihood * (float)(1 << LLM__WEIGHT_BITS)); }

/* Of likelihoods from 2^-WEIGHT_BITS to 1: 28 bits in the same order. */
static __device__ uint32_t llm__key_base(void) { return (uint32_t)(127 - LLM__WEIGHT_BITS) << 23; }

/* The sum of the values of this thread and those before it. */
static __device__ unsigned long long llm__scan(unsigned long long value, unsigned long long *warps) {
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

static __device__ unsigned long long llm__block_sum(unsigned long long value, llm__pick_memory *m) {
    value = llm__scan(value, m->warps);
    if (threadIdx.x == blockDim.x - 1) m->weight_before = value;
    __syncthreads();
    value = m->weight_before;
    __syncthreads();
    return value;
}

/* The first token of those with the largest logit: orders them by logit, then by number downwards. */
static __device__ int llm__best_token(const llm__picker &p, llm__pick_memory *m) {
    unsigned long long best = 0;
    for (int i = (int)threadIdx.x; i < p.n_vocab; i += (int)blockDim.x) {
        uint32_t bits = __float_as_uint(p.logits[i]), order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
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
    return (int)~(uint32_t)best;
}

/* Going down from the heaviest token, the place where the sum of weights (or with BY_COUNT the number of tokens) first
   exceeds `target`, which all of them together do: ten bits of its key, then nine, then nine. A thread has a bin. */
template <bool BY_COUNT>
static __device__ llm__place llm__descend(const llm__picker &p, float max, float scale, unsigned long long target, llm__pick_memory *m) {
    int thread = (int)threadIdx.x, bin = LLM__PICK_THREADS - 1 - thread;
    llm__place place = {0, 0, 0};
    for (int shift = 18; shift >= 0; shift -= 9) {
        m->counts[thread] = m->low[thread] = m->high[thread] = 0;
        __syncthreads();
        for (int i = thread; i < p.n_vocab; i += LLM__PICK_THREADS) {
            float likelihood = llm__likelihood(p, max, scale, i);
            unsigned weight = llm__weight(likelihood);
            uint32_t key = __float_as_uint(likelihood) - llm__key_base(), above = shift == 18 ? 28 : shift + 9;
            if (!weight || key >> above != place.key >> above) continue;
            uint32_t to = key >> shift & ((1u << (above - shift)) - 1);
            atomicAdd(&m->counts[to], 1u);
            atomicAdd(&m->low[to], weight & ((1u << LLM__LOW_BITS) - 1));
            atomicAdd(&m->high[to], weight >> LLM__LOW_BITS);
        }
        __syncthreads();
        unsigned long long n = m->counts[bin], weight = ((unsigned long long)m->high[bin] << LLM__LOW_BITS) + m->low[bin];
        unsigned long long n_through = place.n_above + llm__scan(n, m->warps), through = place.weight_above + llm__scan(weight, m->warps);
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

/* Among tokens of one weight, those of lower number come first. */
static __device__ int llm__nth_of_weight(const llm__picker &p, float max, float scale, uint32_t key, unsigned long long n, llm__pick_memory *m) {
    int some = (p.n_vocab + LLM__PICK_THREADS - 1) / LLM__PICK_THREADS, first = llm__least((int)threadIdx.x * some, p.n_vocab);
    int end = llm__least(first + some, p.n_vocab);
    unsigned long long found = 0;
    for (int i = first; i < end; i++) found += __float_as_uint(llm__likelihood(p, max, scale, i)) == key + llm__key_base();
    unsigned long long before = llm__scan(found, m->warps) - found;
    for (int i = first; i < end && before <= n; i++)
        if (__float_as_uint(llm__likelihood(p, max, scale, i)) == key + llm__key_base() && before++ == n) m->bin = i;
    __syncthreads();
    return m->bin;
}

/* The weight of what top-k, top-p and min-p leave. */
static __device__ unsigned long long llm__cut(const llm__picker &p, const llm__picker_state &s, float max, llm__pick_memory *m) {
    unsigned long long n = 0, all = 0, likely = 0;
    for (int i = (int)threadIdx.x; i < p.n_vocab; i += LLM__PICK_THREADS) {
        float likelihood = llm__likelihood(p, max, s.scale, i);
        unsigned weight = llm__weight(likelihood);
        n += weight > 0;
        all += weight;
        likely += likelihood >= s.min_p ? weight : 0;
    }
    n = llm__block_sum(n, m);
    all = llm__block_sum(all, m);
    likely = llm__block_sum(likely, m);
    if (s.top_k > 0 && (unsigned long long)s.top_k < n) {
        llm__place kth = llm__descend<true>(p, max, s.scale, (unsigned long long)s.top_k - 1, m);
        all = kth.weight_above + ((unsigned long long)s.top_k - kth.n_above) * llm__weight(__uint_as_float(kth.key + llm__key_base()));
    }
    if (s.top_p > 0 && s.top_p < 1) {
        unsigned long long enough = (unsigned long long)((double)s.top_p * (double)all) + 1;
        if (enough > all) enough = all;
        llm__place last = llm__descend<false>(p, max, s.scale, enough - 1, m);
        unsigned long long weight = llm__weight(__uint_as_float(last.key + llm__key_base()));
        all = last.weight_above + (enough - last.weight_above + weight - 1) / weight * weight;
    }
    return all < likely ? all : likely;
}

/* The same numbers as llm_sample's (splitmix64). */
static __device__ double llm__sampler_random(unsigned long long seed, unsigned long long n) {
    unsigned long long z = seed + n * 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return (double)((z ^ z >> 31) >> 11) * (1.0 / 9007199254740992.0);
}

/* Picks a token and makes it the next pass's, one position on; one block. */
static __global__ void __launch_bounds__(LLM__PICK_THREADS, 1) llm__pick(llm__picker p) {
    __shared__ llm__pick_memory m;
    llm__let_next_start();
    llm__wait_for_previous();
    llm__picker_state s = *p.state;
    int token = llm__best_token(p, &m);
    if (s.scale > 0) {
        float max = p.logits[token];
        unsigned long long at = (unsigned long long)(llm__sampler_random(s.seed, s.n_drawn + 1) * (double)llm__cut(p, s, max, &m));
        llm__place place = llm__descend<false>(p, max, s.scale, at, &m);
        unsigned weight = llm__weight(__uint_as_float(place.key + llm__key_base()));
        token = llm__nth_of_weight(p, max, s.scale, place.key, (at - place.weight_above) / weight, &m);
    }
    if (threadIdx.x) return;
    p.state->n_drawn = s.n_drawn + 1;
    p.state->n_picked = s.n_picked + 1;
    p.picked[s.n_picked] = token;
    const_cast<int *>(p.rows.tokens)[0] = token;
    const_cast<int *>(p.rows.positions)[0]++;
}

/* ==== 7 Plain kernels ===========================================================================================

   One operation each. They are what eager passes consist of; longer passes put cuBLAS's products and the attention of
   section 5 between them. */

/* out = x / rms(x) * weight in bf16; a block a row. */
static __global__ void llm__norm(const float *x, const float *weight, int n, float eps, uint16_t *out, int stride) {
    __shared__ float parts[32];
    const float *from = x + (size_t)blockIdx.x * n;
    float sum = 0;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) sum += from[i] * from[i];
    sum = llm__warp_sum(sum);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < (int)blockDim.x / 32; i++) sum += parts[i];
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) out[(size_t)blockIdx.x * stride + i] = llm__to_bf16(from[i] * scale * weight[i]);
}

/* y[row][output] = (or, with `add`, +=) W[output] . x[row]; a warp an output, eight in a block. */
static __global__ void llm__matrix_product(llm__gpu_matrix m, const uint16_t *x, float *y, bool add) {
    int output = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = (int)threadIdx.x % 32, row = (int)blockIdx.y;
    if (output >= m.n) return;
    float sum = 0;
    for (int i = lane; i < m.k; i += 32) sum += llm__element(m, output, i) * llm__from_bf16(x[(size_t)row * llm__input_stride(m) + i]);
    sum = llm__warp_sum(sum);
    if (lane == 0) y[(size_t)row * m.n + output] = add ? y[(size_t)row * m.n + output] + sum : sum;
}

/* Rows [first, first + n) as bf16, for cuBLAS: int8 exactly and without its scales, of f16 the high parts or the low ones; a
   thread for each eight. */
static __global__ void llm__widen(llm__gpu_matrix m, int first, int n, bool low, uint16_t *to) {
    size_t at = 8 * ((size_t)blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= (size_t)n * m.k) return;
    if (m.format == LLM__F16) {
        llm__enc_split s = llm__split_8(*(const uint4 *)(m.data + 2 * ((size_t)first * m.k + at)));
        *(uint4 *)(to + at) = low ? s.low : s.high;
        return;
    }
    if (m.format == LLM__INT8) {
        uint2 bytes = *(const uint2 *)(m.data + (size_t)first * m.k + at);
        *(uint4 *)(to + at) = llm__widen_8(bytes.x, bytes.y);
        return;
    }
    int row = first + (int)(at / m.k), i = (int)(at % m.k);
    for (int j = 0; j < 8; j++) to[at + j] = llm__to_bf16(llm__element(m, row, i + j));
}

/* What is left to do after a product with int8: y = (or, with `add`, +=) sums * scales; a thread an output. */
static __global__ void llm__scale(const float *sums, const uint32_t *scales, int n, float *y, bool add) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    size_t at = (size_t)blockIdx.y * n + i;
    if (i < n) y[at] = (add ? y[at] : 0) + sums[at] * __uint_as_float(scales[i]);
}

/* One head's query, key or value before RoPE. */
typedef struct llm__head {
    const float *from, *bias, *norm; /* [head_dim]; the last two may be NULL */
    float scale;                     /* 1 / sqrt(mean(x^2) + eps), with norm */
} llm__head;

static __device__ float llm__head_dim(const llm__head &h, int dim) {
    float x = h.from[dim] + (h.bias ? h.bias[dim] : 0);
    return h.norm ? x * h.scale * h.norm[dim] : x;
}

static __device__ llm__head llm__find_head(const llm__qkv_store &s, const float *qkv, int row, int head) {
    int n_heads = s.n_heads + 2 * s.kv.n_heads;
    const float *norm = head < s.n_heads ? s.q_norm : head < s.n_heads + s.kv.n_heads ? s.k_norm : NULL;
    llm__head h = {qkv + ((size_t)row * n_heads + head) * s.head_dim, s.bias ? s.bias + head * s.head_dim : NULL, NULL, 0};
    if (!norm) return h;
    float sum = 0;
    for (int dim = (int)threadIdx.x % 32; dim < s.head_dim; dim += 32) sum += llm__head_dim(h, dim) * llm__head_dim(h, dim);
    h.scale = 1.0f / sqrtf(llm__warp_sum(sum) / (float)s.head_dim + s.eps);
    h.norm = norm;
    return h;
}

/* Adds the bias, norms and turns queries and keys, and puts all three in place; a warp a head of a row. */
static __global__ void llm__hparams_rope(llm__fwd_rows rows, llm__qkv_store s, const float *qkv) {
    int lane = (int)threadIdx.x % 32, head = (int)(blockIdx.x * blockDim.x + threadIdx.x) / 32, row = (int)blockIdx.y;
    llm__let_next_start();
    llm__wait_for_previous();
    if (head >= s.n_heads + 2 * s.kv.n_heads || row >= rows.counts[0]) return;
    llm__head h = llm__find_head(s, qkv, row, head);
    for (int pair = lane; pair < (s.head_dim + 1) / 2; pair += 32) {
        int first = llm__pair_dim(pair, s.rope_dim, 0), second = llm__pair_dim(pair, s.rope_dim, 1);
        llm__store_pair(&s, rows, row, head, pair, llm__head_dim(h, first), second < s.head_dim ? llm__head_dim(h, second) : 0);
    }
}

/* softmax(q . keys) . values; a warp for one head of one row, a lane for each key of a block. */
static __global__ void llm__plain_attention(llm__attn_run a) {
    __shared__ float answer[LLM__MOST_HEAD_DIM], weights[LLM_BLOCK];
    int head = (int)blockIdx.x, row = (int)blockIdx.y, lane = (int)threadIdx.x, n_keys = a.rows.positions[row] + 1;
    int key_head = head / (a.n_heads / a.kv.n_heads);
    const uint16_t *q = a.q + ((size_t)row * a.n_heads + head) * a.kv.stride;
    float max = -INFINITY, sum = 0;
    for (int dim = lane; dim < a.head_dim; dim += 32) answer[dim] = 0;
    int first_key = llm__attn_first_key(a, n_keys - 1);
    for (int first = first_key / LLM_BLOCK * LLM_BLOCK; first < n_keys; first += LLM_BLOCK) {
        int block = llm__table(a.rows, row)[first / LLM_BLOCK];
        const uint16_t *key = llm__keys(a.kv, block, a.layer, key_head) + (size_t)lane * a.kv.stride;
        const uint16_t *values = llm__values(a.kv, block, a.layer, key_head);
        float score = 0;
        for (int dim = 0; dim < a.head_dim; dim++) score += llm__from_bf16(q[dim]) * llm__from_bf16(key[dim]);
        score = first + lane >= first_key && first + lane < n_keys ? score * a.scale : -INFINITY;
        float new_max = fmaxf(max, llm__warp_max(score)), shrink = exp2f(max - new_max), weight = exp2f(score - new_max);
        sum = sum * shrink + llm__warp_sum(weight);
        max = new_max;
        weights[lane] = weight;
        __syncwarp();
        for (int dim = lane; dim < a.head_dim; dim += 32) {
            float x = answer[dim] * shrink;
            for (int i = 0; i < LLM_BLOCK && first + i < n_keys; i++) x += weights[i] * llm__from_bf16(values[dim * LLM_BLOCK + i]);
            answer[dim] = x;
        }
        __syncwarp();
    }
    for (int dim = lane; dim < a.head_dim; dim += 32)
        a.out[(size_t)row * a.out_stride + head * a.head_dim + dim] = llm__to_bf16(answer[dim] / sum);
}

/* out[row][i] = silu(gate) * up; gates and ups stand one after the other in a row. */
static __global__ void llm__swiglu(const float *gate_up, int n_ff, uint16_t *out, int stride) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), row = (int)blockIdx.y;
    if (i >= n_ff) return;
    const float *from = gate_up + (size_t)row * 2 * n_ff;
    out[(size_t)row * stride + i] = llm__to_bf16(llm__silu(from[i]) * from[n_ff + i]);
}

/* The rows whose logits are wanted, close together; after the last layer's attention no others are needed. */
static __global__ void llm__fwd_keep_rows(llm__fwd_rows rows, const float *x, float *kept_x, int n_embd, const uint16_t *attention,
                                      uint16_t *kept_attention, int stride) {
    size_t to = blockIdx.x, from = (size_t)rows.logit_rows[blockIdx.x];
    for (int i = (int)threadIdx.x; i < n_embd; i += (int)blockDim.x) kept_x[to * n_embd + i] = x[from * n_embd + i];
    for (int i = (int)threadIdx.x; i < stride; i += (int)blockDim.x) kept_attention[to * stride + i] = attention[from * stride + i];
}

/* log p = logit - max - log(sum of exp(logit - max)) for those of n targets that follow rows `first` and up, of which
   these are the logits; a block a row. */
static __global__ void llm__score_row(const float *logits, int n_vocab, int first, const int *targets, const int *target_rows,
                                      int n_targets, float *log_probs) {
    __shared__ float maxima[32], sums[32];
    int thread = (int)threadIdx.x, n_threads = (int)blockDim.x, n_warps = n_threads / 32;
    const float *row = logits + (size_t)blockIdx.x * n_vocab;
    float max = -INFINITY, sum = 0;
    for (int i = thread; i < n_vocab; i += n_threads) max = fmaxf(max, row[i]);
    max = llm__warp_max(max);
    if (thread % 32 == 0) maxima[thread / 32] = max;
    __syncthreads();
    for (int i = 0; i < n_warps; i++) max = fmaxf(max, maxima[i]);
    for (int i = thread; i < n_vocab; i += n_threads) sum += expf(row[i] - max);
    sum = llm__warp_sum(sum);
    if (thread % 32 == 0) sums[thread / 32] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < n_warps; i++) sum += sums[i];
    for (int i = thread; i < n_targets; i += n_threads)
        if (target_rows[i] == first + (int)blockIdx.x) log_probs[i] = row[targets[i]] - max - logf(sum);
}

/* Reads and does next to nothing: the limit of decoding. */
static __global__ void llm__read_all(const uint8_t *data, size_t n_vectors, unsigned *sink) {
    unsigned seen = 0;
    size_t step = (size_t)gridDim.x * blockDim.x;
    for (size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x; i < n_vectors; i += 4 * step)
#pragma unroll
        for (size_t j = 0; j < 4; j++) {
            if (i + j * step >= n_vectors) continue;
            uint4 v = llm__load_once(data + 16 * (i + j * step));
            seen ^= v.x ^ v.y ^ v.z ^ v.w;
        }
    if (seen == 0x9E3779B9u) *sink = seen; /* so that the loads are not left out */
}

/* ==== 8 The model ===============================================================================================

   Matrices stand row by row as the file has them. They are converted by the host's threads into one of two pinned
   buffers while the other is on its way. */

typedef struct llm__gpu_layer {
    float *attention_norm, *ffn_norm;
    float *qkv_bias, *q_norm, *k_norm; /* NULL: the model has none */
    llm__gpu_matrix qkv, attention_out, gate_up, down;
} llm__gpu_layer;

typedef struct llm__gpu_model {
    llm_host host;
    llm_shape shape;
    llm_cuda_mode mode;
    llm_dtype dtype;
    int n_threads, n_processors;
    bool can_overlap;
    double *frequencies; /* on the GPU */
    llm__gpu_layer *layers;
    float *output_norm;
    llm__gpu_matrix embedding, head; /* the same if tied */
    cudaStream_t stream;
    uint8_t *staging[2]; /* pinned */
    cudaEvent_t sent[2];
    int turn;            /* which of the two is next */
} llm__gpu_model;

enum { LLM__STAGING = 4 << 20 };

static void *llm__host_resize(const llm_host *host, void *ptr, size_t size) {
    if (host->resize) return host->resize(host->user, ptr, size);
    if (size) return realloc(ptr, size);
    free(ptr);
    return NULL;
}

static void *llm__host_zero(const llm_host *host, size_t size, llm_error *err) {
    void *ptr = llm__host_resize(host, NULL, size);
    if (ptr) return memset(ptr, 0, size);
    llm__cuda_error(err, LLM_ERROR_MEMORY, "out of memory: %llu bytes were asked for", (unsigned long long)size);
    return NULL;
}

/* A matrix without memory. */
static llm__gpu_matrix llm__describe_matrix(llm_dtype dtype, const llm_weight *weight) {
    llm__gpu_matrix m;
    memset(&m, 0, sizeof m);
    if (dtype == LLM_DTYPE_F16) m.format = LLM__F16;
    if (dtype == LLM_DTYPE_INT8) m.format = LLM__INT8;
    if (dtype == LLM_DTYPE_INT4) m.format = weight->has_q8_0 ? LLM__INT8_GROUPS : LLM__INT4_GROUPS;
    m.n = weight->rows;
    m.k = llm__pad(weight->cols, dtype == LLM_DTYPE_INT4 ? 128 : 64);
    return m;
}

/* Scales that belong to a row. */
static size_t llm__row_scales(llm__gpu_matrix m) { return m.format <= LLM__F16 ? 0 : m.format == LLM__INT8 ? 1 : (size_t)m.k / 32; }

static uint64_t llm__gpu_weight_bytes(llm_dtype dtype, const llm_weight *weight) {
    llm__gpu_matrix m = llm__describe_matrix(dtype, weight);
    return (uint64_t)m.n * (llm__row_bytes(m) + llm__row_scales(m) * 4);
}

/* A GPU that can run this: compute capability 8.0 has the bf16 tensor cores. */
static llm_status llm__find_gpu(llm__gpu_model *m, llm_error *err) {
    int n = 0, device = 0, major = 0, minor = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0) {
        const char *why = cudaGetErrorString(cudaGetLastError());
        return llm__cuda_error(err, LLM_ERROR_DEVICE, "no GPU can be used (%s); load without desc.backend to run on the CPU", why);
    }
    LLM__TRY(cudaGetDevice(&device));
    LLM__TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    LLM__TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    LLM__TRY(cudaDeviceGetAttribute(&m->n_processors, cudaDevAttrMultiProcessorCount, device));
    if (major < 8)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "the GPU has compute capability %d.%d; 8.0 or newer is needed", major, minor);
    m->can_overlap = major >= 9;
    return LLM_OK;
}

static llm_status llm__check_shape(const llm_shape *s, llm_dtype dtype, llm_error *err) {
    if (dtype == LLM_DTYPE_F32)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "on the GPU weights are bf16, f16, int8 or int4; desc.dtype asks for f32");
    if (s->n_vocab > LLM__MOST_VOCAB)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "the vocabulary has %d tokens; on the GPU at most %d are run", s->n_vocab,
                               (int)LLM__MOST_VOCAB);
    if (s->head_dim > LLM__MOST_HEAD_DIM)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "heads have %d dimensions; on the GPU at most %d are run", s->head_dim,
                               (int)LLM__MOST_HEAD_DIM);
    if (s->n_heads / s->n_kv_heads > LLM__TILE_COLUMNS)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "%d query heads share a key head; on the GPU at most %d can",
                               s->n_heads / s->n_kv_heads, (int)LLM__TILE_COLUMNS);
    return LLM_OK;
}

static size_t llm__staging_bytes(const llm_shape *s) {
    int q = s->n_heads * s->head_dim, most = s->n_embd > s->n_ff ? s->n_embd : s->n_ff;
    size_t row = (size_t)llm__pad(most > q ? most : q, LLM__PAD) * 2;
    return row > LLM__STAGING ? row : (size_t)LLM__STAGING;
}

static llm_status llm__open_gpu(llm__gpu_model *m, const llm_model_desc *desc, llm_error *err) {
    llm_status status = llm__find_gpu(m, err);
    if (!status) status = llm__check_shape(&m->shape, desc->dtype, err);
    if (status) return status;
    size_t frequencies = ((size_t)m->shape.rope_dim / 2 + 1) * sizeof(double);
    m->layers = (llm__gpu_layer *)llm__host_zero(&m->host, (size_t)m->shape.n_layers * sizeof *m->layers, err);
    if (!m->layers) return LLM_ERROR_MEMORY;
    LLM__TRY(cudaStreamCreateWithFlags(&m->stream, cudaStreamNonBlocking));
    for (int i = 0; i < 2; i++) {
        LLM__TRY(cudaMallocHost((void **)&m->staging[i], llm__staging_bytes(&m->shape)));
        LLM__TRY(cudaEventCreateWithFlags(&m->sent[i], cudaEventDisableTiming));
    }
    LLM__TRY(cudaMalloc((void **)&m->frequencies, frequencies));
    memcpy(m->staging[0], m->shape.rope_frequencies, (size_t)m->shape.rope_dim / 2 * sizeof(double));
    LLM__TRY(cudaMemcpyAsync(m->frequencies, m->staging[0], frequencies, cudaMemcpyHostToDevice, m->stream));
    LLM__TRY(cudaStreamSynchronize(m->stream));
    return LLM_OK;
}

static llm_status llm__gpu_open(void **out, const llm_shape *shape, const llm_model_desc *desc, llm_cuda_mode mode, llm_error *err) {
    *out = NULL;
    llm__gpu_model *m = (llm__gpu_model *)llm__host_zero(&desc->host, sizeof *m, err);
    *out = m;
    if (!m) return LLM_ERROR_MEMORY;
    m->host = desc->host;
    m->shape = *shape;
    m->mode = mode;
    m->dtype = desc->dtype;
    m->n_threads = desc->n_threads;
    return llm__open_gpu(m, desc, err);
}

static llm_status llm__open_graph(void **out, const llm_shape *shape, const llm_model_desc *desc, llm_error *err) {
    return llm__gpu_open(out, shape, desc, LLM_CUDA_GRAPH, err);
}

static llm_status llm__open_fused(void **out, const llm_shape *shape, const llm_model_desc *desc, llm_error *err) {
    return llm__gpu_open(out, shape, desc, LLM_CUDA_FUSED, err);
}

static llm_status llm__open_eager(void **out, const llm_shape *shape, const llm_model_desc *desc, llm_error *err) {
    return llm__gpu_open(out, shape, desc, LLM_CUDA_EAGER, err);
}

static void llm__free_matrix(llm__gpu_matrix m) {
    cudaFree(m.data);
    cudaFree(m.scales);
}

static void llm__gpu_close(void *model) {
    llm__gpu_model *m = (llm__gpu_model *)model;
    if (!m) return;
    if (m->stream) cudaStreamSynchronize(m->stream);
    for (int i = 0; m->layers && i < m->shape.n_layers; i++) {
        llm__gpu_layer *layer = &m->layers[i];
        llm__gpu_matrix matrices[] = {layer->qkv, layer->attention_out, layer->gate_up, layer->down};
        for (int j = 0; j < 4; j++) llm__free_matrix(matrices[j]);
        float *vectors[] = {layer->attention_norm, layer->ffn_norm, layer->qkv_bias, layer->q_norm, layer->k_norm};
        for (int j = 0; j < 5; j++) cudaFree(vectors[j]);
    }
    if (m->head.data != m->embedding.data) llm__free_matrix(m->head);
    llm__free_matrix(m->embedding);
    cudaFree(m->output_norm);
    cudaFree(m->frequencies);
    for (int i = 0; i < 2; i++) {
        if (m->sent[i]) cudaEventDestroy(m->sent[i]);
        if (m->staging[i]) cudaFreeHost(m->staging[i]);
    }
    if (m->stream) cudaStreamDestroy(m->stream);
    llm_host host = m->host;
    if (m->layers) llm__host_resize(&host, m->layers, 0);
    llm__host_resize(&host, m, 0);
}

/* From memory that is not pinned; done when it returns. */
static cudaError_t llm__copy_in(llm__gpu_model *m, void *to, const void *from, size_t bytes) {
    cudaError_t result = cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, m->stream);
    return result == cudaSuccess ? cudaStreamSynchronize(m->stream) : result;
}

/* Rows [first, first + n) of a weight, to be converted into a pinned buffer. */
typedef struct llm__conversion {
    const llm_weight *weight;
    llm__gpu_matrix matrix; /* with n rows, in the buffer */
    int first, n_threads;
    size_t scratch_bytes;   /* of a thread: a row of floats and one of groups, see llm__conversion_bytes */
    uint8_t *scratch;
} llm__conversion;

/* Groups come behind the floats. */
static size_t llm__conversion_bytes(const llm_weight *weight) {
    size_t n_groups = (size_t)llm__pad(weight->cols, 32) / 32;
    return n_groups * 32 * sizeof(float) + n_groups * sizeof(llm_group);
}

static void llm__bf16_row(const float *row, int n, uint16_t *out) {
    for (int i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &row[i], 4);
        out[i] = llm__round_bits(bits);
    }
}

/* To the nearest f16, of two the even one; too large a number becomes infinite, as on the CPU. */
static uint16_t llm__round_to_f16(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, 4);
    sign = bits >> 16 & 0x8000u;
    bits &= 0x7FFFFFFFu;
    if (bits >= 0x47800000u) return (uint16_t)(sign | (bits > 0x7F800000u ? 0x7E00u : 0x7C00u)); /* 65536 and up; NaN */
    if (bits >= 0x38800000u) return (uint16_t)(sign | (bits - 0x38000000u + 0xFFFu + (bits >> 13 & 1)) >> 13);
    float steps = fabsf(x) + 0.5f; /* numbers below 2^-14 are multiples of 2^-24, as those around 0.5 are */
    memcpy(&bits, &steps, 4);
    return (uint16_t)(sign | (bits - 0x3F000000u));
}

/* q = round(127 w / max|row|), the same numbers as on the CPU. Returns the scale. */
static float llm__int8_row(const float *row, int n, int8_t *out) {
    float most = 0;
    for (int i = 0; i < n; i++) most = fmaxf(most, fabsf(row[i]));
    double inverse = most > 0 ? 127.0 / most : 0;
    for (int i = 0; i < n; i++) out[llm__byte_place(i)] = (int8_t)floor(row[i] * inverse + 0.5);
    return most / 127.0f;
}

/* The same groups as on the CPU, in the order of llm__gpu_matrix. */
static void llm__group_row(int format, const llm_group *groups, int n_groups, uint8_t *out, uint32_t *scales) {
    for (int g = 0; g < n_groups; g++) {
        scales[g] = groups[g].scale | (uint32_t)groups[g].minimum << 16;
        for (int t = 0; t < 4; t++) {
            const int8_t *q = groups[g].q + 8 * t;
            uint8_t *to = out + llm__group_place(format, 32 * g + 8 * t);
            uint32_t nibbles = 0;
            for (int i = 0; i < 8; i++) nibbles |= (uint32_t)(q[i] & 15) << (i / 2 * 4 + i % 2 * 16);
            if (format == LLM__INT4_GROUPS) memcpy(to, &nibbles, 4);
            else for (int i = 0; i < 8; i++) to[llm__byte_place(i)] = (uint8_t)q[i];
        }
    }
}

/* Thread `index` takes every n_threads-th row. */
static void llm__convert_rows(const llm__conversion *c, int index) {
    const llm__gpu_matrix *m = &c->matrix;
    size_t row_bytes = llm__row_bytes(*m), row_scales = llm__row_scales(*m);
    int n_groups = llm__pad(c->weight->cols, 32) / 32;
    float *row = (float *)(void *)(c->scratch + (size_t)index * c->scratch_bytes);
    llm_group *groups = (llm_group *)(void *)(row + 32 * n_groups);
    for (int r = index; r < m->n; r += c->n_threads) {
        uint8_t *to = m->data + r * row_bytes;
        uint32_t *scales = m->scales + r * row_scales;
        memset(to, 0, row_bytes);
        memset(scales, 0, row_scales * 4);
        if (m->format >= LLM__INT8_GROUPS) {
            llm_weight_groups(c->weight, c->first + r, row, groups);
            llm__group_row(m->format, groups, n_groups, to, scales);
            continue;
        }
        c->weight->read_row(c->weight, c->first + r, row);
        if (m->format == LLM__BF16) {
            llm__bf16_row(row, c->weight->cols, (uint16_t *)(void *)to);
        } else if (m->format == LLM__F16) {
            for (int i = 0; i < c->weight->cols; i++) ((uint16_t *)(void *)to)[i] = llm__round_to_f16(row[i]);
        } else {
            float scale = llm__int8_row(row, c->weight->cols, (int8_t *)to);
            memcpy(scales, &scale, 4);
        }
    }
}

static void llm__convert(llm__conversion *c, int n_threads) {
    std::thread threads[64];
    int n_started = 1; /* this thread is the first; where the system gives no more, it does their work too */
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

/* A buffer holds rows and behind them their scales. */
static llm_status llm__upload_rows(llm__gpu_model *m, const llm_weight *weight, uint8_t *scratch, llm__gpu_matrix matrix, llm_error *err) {
    size_t row_bytes = llm__row_bytes(matrix), scale_bytes = llm__row_scales(matrix) * 4;
    int some = (int)(llm__staging_bytes(&m->shape) / (row_bytes + scale_bytes));
    llm__conversion c = {weight, matrix, 0, 0, llm__conversion_bytes(weight), scratch};
    for (; c.first < weight->rows; c.first += some, m->turn ^= 1) {
        size_t n = (size_t)llm__least(weight->rows - c.first, some), first = (size_t)c.first;
        c.matrix.n = (int)n;
        c.matrix.data = m->staging[m->turn];
        c.matrix.scales = (uint32_t *)(void *)(c.matrix.data + n * row_bytes);
        LLM__TRY(cudaEventSynchronize(m->sent[m->turn]));
        llm__convert(&c, m->n_threads);
        LLM__TRY(cudaMemcpyAsync(matrix.data + first * row_bytes, c.matrix.data, n * row_bytes, cudaMemcpyHostToDevice, m->stream));
        if (scale_bytes)
            LLM__TRY(cudaMemcpyAsync(matrix.scales + first * (scale_bytes / 4), c.matrix.scales, n * scale_bytes, cudaMemcpyHostToDevice, m->stream));
        LLM__TRY(cudaEventRecord(m->sent[m->turn], m->stream));
    }
    return LLM_OK;
}

static llm_status llm__upload_matrix(llm__gpu_model *m, const llm_weight *weight, llm__gpu_matrix *matrix, llm_error *err) {
    *matrix = llm__describe_matrix(m->dtype, weight);
    size_t n = (size_t)matrix->n, scale_bytes = n * llm__row_scales(*matrix) * 4;
    if (scale_bytes) LLM__TRY(cudaMalloc((void **)&matrix->scales, scale_bytes));
    LLM__TRY(cudaMalloc((void **)&matrix->data, n * llm__row_bytes(*matrix)));
    uint8_t *scratch = (uint8_t *)llm__host_zero(&m->host, (size_t)m->n_threads * llm__conversion_bytes(weight), err);
    if (!scratch) return LLM_ERROR_MEMORY;
    llm_status status = llm__upload_rows(m, weight, scratch, *matrix, err);
    llm__host_resize(&m->host, scratch, 0);
    return status;
}

/* A row, or a column. */
static llm_status llm__upload_vector(llm__gpu_model *m, const llm_weight *weight, float **vector, llm_error *err) {
    size_t bytes = (size_t)weight->rows * (size_t)weight->cols * sizeof(float);
    LLM__TRY(cudaMalloc((void **)vector, bytes));
    float *row = (float *)llm__host_zero(&m->host, bytes, err);
    if (!row) return LLM_ERROR_MEMORY;
    for (int i = 0; i < weight->rows; i++) weight->read_row(weight, i, row + (size_t)i * (size_t)weight->cols);
    cudaError_t result = llm__copy_in(m, *vector, row, bytes);
    llm__host_resize(&m->host, row, 0);
    return llm__cuda_check(result, "copying a vector to the GPU", err);
}

static llm_status llm__gpu_upload(void *model, const llm_weight *w, llm_error *err) {
    llm__gpu_model *m = (llm__gpu_model *)model;
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
    if (m->shape.tied_head) m->head = m->embedding;
    return status;
}

/* ==== 9 The context =============================================================================================

   A stream, and all the memory a pass needs: one piece on the GPU, one pinned on the host. Both are laid out by walking
   over their parts twice, first to learn how much there is. */

enum {
    LLM__BUCKETS = 5, /* passes of 1, 2, 4, 8 and 16 rows have each their graph          */
    LLM__AHEAD = 4    /* passes of a burst under way behind the one whose token is awaited */
};

typedef struct llm__recording {
    bool loaded;           /* its kernels are on the GPU */
    cudaGraphExec_t graph; /* NULL: not recorded yet     */
} llm__recording;

typedef struct llm__sizes {
    int n_embd, q, ffn, fused_rows, n_tables;       /* strides of activations; rows the fused buffers have; tables  */
    int n_wide, n_squares, rows_ints;               /* widest product; blocks of an n_embd product; ints of llm__fwd_rows */
    size_t blas_bytes, widened;                     /* cuBLAS's own; elements of int8 widened for it at a time */
} llm__sizes;

typedef struct llm__gpu_context {
    llm__gpu_model *model;
    llm_backend_desc desc;
    llm__queue queue;
    llm__sizes sizes;
    uint8_t *memory, *pinned;
    size_t memory_bytes, cache_bytes, pinned_bytes;
    llm__kv kv;
    int *rows, *host_rows;           /* what the parts of llm__fwd_rows point into                    */
    float *cosines, *sines;          /* [n_batch][rope_dim / 2]                                   */
    float *x, *kept_x, *wide;        /* [n_batch][n_embd], the same, [n_batch][n_wide]            */
    uint16_t *normed, *q, *attention, *kept_attention, *ffn; /* [n_batch][padded]                 */
    float *squares;                  /* [fused_rows][n_squares]                                   */
    float *partial;                  /* see llm__attn_run                                           */
    unsigned *n_done;
    float *logits, *host_logits;     /* [n_logits][n_vocab]                                       */
    int *targets, *host_targets;     /* [2][n_batch] tokens, and the rows they come after         */
    float *log_probs, *host_log_probs; /* [n_batch]                                               */
    void *blas_memory;
    uint16_t *widened;               /* a piece of a matrix                                       */
    llm__recording passes[LLM__BUCKETS];
    llm__picker_state *picker, *host_picker;
    int *host_picked;                /* [LLM_BURST]                                               */
    cudaEvent_t picked[LLM__AHEAD + 1];
    llm__recording burst_pass;       /* of one row, and the picking of the next                   */
} llm__gpu_context;

/* Elements of the widest and longest matrix there could be, or of whole rows of at most 64 MB; at least of one. */
static size_t llm__widest_piece(const llm_shape *s, const llm__sizes *z) {
    size_t k = (size_t)(z->n_embd > z->ffn ? z->n_embd : z->ffn), n = (size_t)(s->n_vocab > z->n_wide ? s->n_vocab : z->n_wide);
    if (k < (size_t)z->q) k = (size_t)z->q;
    size_t most = (size_t)32 << 20, all = n * k;
    return all < most ? all : k > most ? k : most;
}

static llm__sizes llm__find_sizes(const llm_shape *s, const llm_backend_desc *d) {
    llm__sizes z;
    int qkv = (s->n_heads + 2 * s->n_kv_heads) * s->head_dim;
    z.n_embd = llm__pad(s->n_embd, LLM__PAD);
    z.q = llm__pad(s->n_heads * s->head_dim, LLM__PAD);
    z.ffn = llm__pad(s->n_ff, LLM__PAD);
    z.fused_rows = llm__least(d->n_batch, LLM__FUSED_ROWS);
    z.n_tables = llm__least(d->n_seq, d->n_batch);
    z.n_wide = qkv > 2 * s->n_ff ? qkv : 2 * s->n_ff;
    if (z.n_wide < s->n_embd) z.n_wide = s->n_embd;
    z.n_squares = (s->n_embd + 15) / 16;
    z.rows_ints = 3 + 6 * llm__pad(d->n_batch, LLM__FUSED_ROWS) + z.n_tables * d->blocks_per_seq;
    z.blas_bytes = d->n_batch > LLM__FUSED_ROWS ? (size_t)32 << 20 : 0; /* what cuBLAS asks for on Hopper */
    z.widened = d->n_batch > LLM__FUSED_ROWS ? llm__widest_piece(s, &z) : 0;
    return z;
}

/* The next `bytes` of a memory that is being laid out. */
static void *llm__part(uint8_t *memory, size_t *used, size_t bytes) {
    uint8_t *at = memory ? memory + *used : NULL;
    *used += (bytes + 255) / 256 * 256;
    return at;
}

static int llm__head_stride(const llm_shape *s) { return llm__pad(s->head_dim, 32); }

static uint64_t llm__gpu_block_bytes(const llm_shape *s, llm_dtype cache_dtype) {
    (void)cache_dtype;
    return (uint64_t)s->n_layers * 2 * (uint64_t)s->n_kv_heads * LLM_BLOCK * (uint64_t)llm__head_stride(s) * 2;
}

/* Lays out c->memory: the cache, then everything else. With c->memory NULL only the sizes are found. */
static void llm__lay_out(llm__gpu_context *c, const llm_shape *s) {
    const llm_backend_desc *d = &c->desc;
    const llm__sizes *z = &c->sizes;
    uint8_t *m = c->memory;
    size_t used = 0, n = (size_t)d->n_batch, half = (size_t)s->rope_dim / 2, fused = (size_t)z->fused_rows, n_logits = (size_t)d->n_logits;
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
    c->partial = (float *)llm__part(m, &used, fused * (size_t)s->n_heads * LLM__MOST_SPANS * (size_t)(c->kv.stride + 2) * 4);
    c->n_done = (unsigned *)llm__part(m, &used, fused * (size_t)s->n_kv_heads * 4);
    c->logits = (float *)llm__part(m, &used, n_logits * (size_t)s->n_vocab * 4);
    c->targets = (int *)llm__part(m, &used, 2 * n * 4);
    c->log_probs = (float *)llm__part(m, &used, n * 4);
    c->picker = (llm__picker_state *)llm__part(m, &used, sizeof *c->picker);
    c->blas_memory = llm__part(m, &used, z->blas_bytes);
    c->widened = (uint16_t *)llm__part(m, &used, z->widened * 2);
    c->memory_bytes = used;
    used = 0;
    c->host_rows = (int *)llm__part(c->pinned, &used, (size_t)z->rows_ints * 4);
    c->host_logits = (float *)llm__part(c->pinned, &used, n_logits * (size_t)s->n_vocab * 4);
    c->host_targets = (int *)llm__part(c->pinned, &used, 2 * n * 4);
    c->host_log_probs = (float *)llm__part(c->pinned, &used, n * 4);
    c->host_picker = (llm__picker_state *)llm__part(c->pinned, &used, sizeof *c->host_picker);
    c->host_picked = (int *)llm__part(c->pinned, &used, LLM_BURST * sizeof *c->host_picked);
    c->pinned_bytes = used;
}

static uint64_t llm__gpu_scratch_bytes(const llm_shape *s, const llm_backend_desc *d) {
    llm__gpu_context c;
    memset(&c, 0, sizeof c);
    c.desc = *d;
    c.sizes = llm__find_sizes(s, d);
    llm__lay_out(&c, s);
    return c.memory_bytes - c.cache_bytes + c.pinned_bytes;
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

static llm_status llm__create_context(llm__gpu_context *c, llm_error *err) {
    const llm_shape *s = &c->model->shape;
    if (c->desc.cache_dtype != LLM_DTYPE_BF16)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "on the GPU the KV cache is bf16; cache_dtype asks for %s",
                               llm_dtype_name(c->desc.cache_dtype));
    if (c->desc.lender) return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "on the GPU a context lends nothing to another");
    if (c->desc.n_batch > LLM__MOST_ROWS)
        return llm__cuda_error(err, LLM_ERROR_UNSUPPORTED, "n_batch is %d; on the GPU a pass has at most %d rows", c->desc.n_batch, (int)LLM__MOST_ROWS);
    LLM__TRY(cudaStreamSynchronize(c->model->stream)); /* the weights are there */
    LLM__TRY(cudaStreamCreateWithFlags(&c->queue.stream, cudaStreamNonBlocking));
    c->queue.can_overlap = c->model->can_overlap;
    for (int i = 0; i <= LLM__AHEAD; i++) LLM__TRY(cudaEventCreateWithFlags(&c->picked[i], cudaEventDisableTiming));
    c->sizes = llm__find_sizes(s, &c->desc);
    llm__lay_out(c, s);
    LLM__TRY(cudaMalloc((void **)&c->memory, c->memory_bytes));
    LLM__TRY(cudaMallocHost((void **)&c->pinned, c->pinned_bytes));
    llm__lay_out(c, s);
    /* Padding is zero and stays so; places of the cache that hold nothing yet must not hold NaN. */
    LLM__TRY(cudaMemsetAsync(c->memory, 0, c->memory_bytes, c->queue.stream));
    LLM__TRY(cudaStreamSynchronize(c->queue.stream));
    return c->sizes.blas_bytes ? llm__create_blas(c, err) : LLM_OK;
}

static void llm__gpu_context_free(void *context) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    if (!c) return;
    if (c->queue.stream) cudaStreamSynchronize(c->queue.stream);
    for (int i = 0; i < LLM__BUCKETS; i++)
        if (c->passes[i].graph) cudaGraphExecDestroy(c->passes[i].graph);
    if (c->burst_pass.graph) cudaGraphExecDestroy(c->burst_pass.graph);
    for (int i = 0; i <= LLM__AHEAD; i++)
        if (c->picked[i]) cudaEventDestroy(c->picked[i]);
    if (c->queue.blas) cublasDestroy(c->queue.blas);
    cudaFree(c->memory);
    if (c->pinned) cudaFreeHost(c->pinned);
    if (c->queue.stream) cudaStreamDestroy(c->queue.stream);
    llm_host host = c->desc.host;
    llm__host_resize(&host, c, 0);
}

static llm_status llm__gpu_context_create(void **out, void *model, const llm_backend_desc *desc, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)llm__host_zero(&desc->host, sizeof *c, err);
    *out = NULL;
    if (!c) return LLM_ERROR_MEMORY;
    c->model = (llm__gpu_model *)model;
    c->desc = *desc;
    llm_status status = llm__create_context(c, err);
    if (status) llm__gpu_context_free(c);
    else *out = c;
    return status;
}

/* ==== 10 Forward pass ============================================================================================ */

/* The parts of llm__fwd_rows, for `capacity` rows, one after the other in `ints`. */
static llm__fwd_rows llm__place_rows(const llm__gpu_context *c, const int *ints, int capacity) {
    llm__fwd_rows rows;
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

/* Neighbouring rows of one sequence are answered together, as many as fit. */
static int llm__make_tiles(const llm_pass *pass, int most, int *first, int *n) {
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

/* Sends the pass to the GPU, with the tables of the sequences that are in it. Returns how many query tiles there are. */
static int llm__send_rows(llm__gpu_context *c, const llm_pass *pass, int capacity) {
    llm__fwd_rows rows = llm__place_rows(c, c->host_rows, capacity);
    const llm_shape *s = &c->model->shape;
    int slot = -1, n_tiles;
    for (int row = 0; row < pass->n_rows; row++) {
        int seq = pass->seqs[row], used = pass->positions[row] / LLM_BLOCK + 1;
        if (row == 0 || seq != pass->seqs[row - 1]) slot++;
        ((int *)rows.tokens)[row] = pass->tokens[row];
        ((int *)rows.positions)[row] = pass->positions[row];
        ((int *)rows.slots)[row] = slot;
        memcpy((int *)rows.tables + (size_t)slot * c->desc.blocks_per_seq, pass->blocks + (size_t)seq * pass->blocks_per_seq,
               (size_t)used * sizeof(int));
    }
    memcpy((int *)rows.logit_rows, pass->logit_rows, (size_t)pass->n_logits * sizeof(int));
    n_tiles = llm__make_tiles(pass, LLM__TILE_COLUMNS / (s->n_heads / s->n_kv_heads), (int *)rows.tile_first, (int *)rows.tile_rows);
    c->host_rows[0] = pass->n_rows;
    c->host_rows[1] = pass->n_logits;
    c->host_rows[2] = n_tiles;
    size_t n_ints = (size_t)(rows.tables - c->host_rows) + (size_t)(slot + 1) * (size_t)c->desc.blocks_per_seq;
    llm__note(&c->queue, cudaMemcpyAsync(c->rows, c->host_rows, n_ints * sizeof(int), cudaMemcpyHostToDevice, c->queue.stream),
              "sending the rows");
    return n_tiles;
}

static llm__start llm__make_start(const llm__gpu_context *c, llm__fwd_rows rows, bool fused) {
    const llm__gpu_model *m = c->model;
    llm__start s = {rows, m->embedding, m->frequencies, c->cosines, c->sines, m->shape.rope_scale, m->shape.n_embd, m->shape.rope_dim / 2,
                    c->x, NULL, NULL, NULL};
    if (!fused) return s;
    s.next_norm = m->layers[0].attention_norm;
    s.next_x = c->normed;
    s.next_squares = c->squares;
    return s;
}

static llm__qkv_store llm__make_store(const llm__gpu_context *c, int layer) {
    const llm_shape *s = &c->model->shape;
    const llm__gpu_layer *l = &c->model->layers[layer];
    llm__qkv_store store = {c->kv, c->q, c->cosines, c->sines, s->n_heads, s->head_dim, s->rope_dim, layer, l->qkv_bias, l->q_norm,
                            l->k_norm, s->rms_eps};
    return store;
}

/* Spans are as long for every pass of a context, so that a row's answer does not depend on the others. */
static llm__attn_run llm__make_attend(const llm__gpu_context *c, llm__fwd_rows rows, int layer, bool in_spans) {
    const llm_shape *s = &c->model->shape;
    llm__attn_run a;
    memset(&a, 0, sizeof a);
    a.rows = rows;
    a.kv = c->kv;
    a.q = c->q;
    a.out = c->attention;
    a.out_stride = c->sizes.q;
    a.n_heads = s->n_heads;
    a.head_dim = s->head_dim;
    a.layer = layer;
    a.window = s->window;
    a.scale = (float)(1.4426950408889634 / sqrt((double)s->head_dim));
    a.span = in_spans ? llm__pad((c->desc.blocks_per_seq * LLM_BLOCK + LLM__MOST_SPANS - 1) / LLM__MOST_SPANS, LLM__STEP) : 0;
    a.partial = c->partial;
    a.n_done = c->n_done;
    return a;
}

typedef void (*llm__attention_fn)(llm__attn_run);

template <int COLUMNS>
static llm__attention_fn llm__choose_dims(int head_stride) {
    if (head_stride <= 64) return llm__fused_attention<COLUMNS, 1>;
    return head_stride <= 128 ? llm__fused_attention<COLUMNS, 2> : llm__fused_attention<COLUMNS, 4>;
}

static llm__attention_fn llm__choose_attention(int n_columns, int head_stride) {
    if (n_columns <= 8) return llm__choose_dims<8>(head_stride);
    return n_columns <= 16 ? llm__choose_dims<16>(head_stride) : llm__choose_dims<32>(head_stride);
}

static bool llm__is_cancelled(const llm_pass *pass) { return pass->cancel && pass->cancel(pass->cancel_user); }

/* ---- Up to 16 rows: five kernels a layer, six with norms of queries and keys ---- */

typedef void (*llm__kernel_product_fn)(llm__product);

template <int ENDING, int TILES>
static llm__kernel_product_fn llm__choose_format(llm__checkpoint_format format) {
    switch (format) {
    case LLM__F16: return llm__fused_product<ENDING, TILES, LLM__F16>;
    case LLM__INT8: return llm__fused_product<ENDING, TILES, LLM__INT8>;
    case LLM__INT8_GROUPS: return llm__fused_product<ENDING, TILES, LLM__INT8_GROUPS>;
    case LLM__INT4_GROUPS: return llm__fused_product<ENDING, TILES, LLM__INT4_GROUPS>;
    default: return llm__fused_product<ENDING, TILES, LLM__BF16>;
    }
}

template <int ENDING>
static void llm__run_product(llm__gpu_context *c, const char *what, int n_blocks, int bucket, const llm__product &p) {
    llm__kernel_product_fn kernel = bucket <= 8 ? llm__choose_format<ENDING, 1>(p.weight.format) : llm__choose_format<ENDING, 2>(p.weight.format);
    llm__launch(&c->queue, LLM__OVERLAP, what, dim3((unsigned)n_blocks), LLM__WARPS * 32, kernel, p);
}

static llm__product llm__make_product(const llm__gpu_context *c, llm__fwd_rows rows, llm__gpu_matrix matrix, const uint16_t *x) {
    llm__product p;
    memset(&p, 0, sizeof p);
    p.rows = rows;
    p.weight = matrix;
    p.n = matrix.n;
    p.x = x;
    p.squares = c->squares;
    p.n_squares = c->sizes.n_squares;
    p.n_embd = c->model->shape.n_embd;
    p.eps = c->model->shape.rms_eps;
    return p;
}

static void llm__fused_residual(llm__gpu_context *c, llm__fwd_rows rows, int bucket, llm__gpu_matrix matrix, const uint16_t *x,
                                const float *next_norm) {
    llm__product p = llm__make_product(c, rows, matrix, x);
    p.residual = c->x;
    p.next_norm = next_norm;
    p.next_x = c->normed;
    p.next_stride = c->sizes.n_embd;
    p.next_squares = c->squares;
    llm__run_product<LLM__RESIDUAL>(c, "the product into the residual stream", c->sizes.n_squares, bucket, p);
}

static void llm__run_rope(llm__gpu_context *c, int overlap, llm__fwd_rows rows, int n_rows, int layer) {
    const llm_shape *s = &c->model->shape;
    llm__launch(&c->queue, overlap, "RoPE", dim3((unsigned)(s->n_heads + 2 * s->n_kv_heads + 3) / 4, (unsigned)n_rows), 128, llm__hparams_rope, rows,
                llm__make_store(c, layer), c->wide);
}

static void llm__fused_layer(llm__gpu_context *c, llm__fwd_rows rows, int bucket, int layer) {
    const llm__gpu_model *m = c->model;
    const llm_shape *s = &m->shape;
    const llm__gpu_layer *l = &m->layers[layer];
    int blocks_per_head = ((s->head_dim + 1) / 2 + LLM__PAIRS - 1) / LLM__PAIRS, group = s->n_heads / s->n_kv_heads;
    const float *next_norm = layer + 1 < s->n_layers ? l[1].attention_norm : m->output_norm;

    llm__product qkv = llm__make_product(c, rows, l->qkv, c->normed);
    qkv.store = llm__make_store(c, layer);
    qkv.out = c->wide;
    if (s->qk_norm) { /* of whole heads, which are more than one block's outputs */
        llm__run_product<LLM__PLAIN>(c, "queries, keys and values", (qkv.n + 15) / 16, bucket, qkv);
        llm__run_rope(c, LLM__OVERLAP, rows, bucket, layer);
    } else {
        llm__run_product<LLM__QKV>(c, "queries, keys and values", (s->n_heads + 2 * s->n_kv_heads) * blocks_per_head, bucket, qkv);
    }

    /* About four blocks for every processor, over all spans that there could be. */
    int most_spans = llm__least(c->desc.blocks_per_seq / 2 + 1, LLM__MOST_SPANS), blocks = 4 * m->n_processors / (s->n_kv_heads * bucket) + 1;
    dim3 grid((unsigned)llm__least(most_spans, blocks), (unsigned)s->n_kv_heads, (unsigned)bucket);
    llm__launch(&c->queue, LLM__OVERLAP, "attention", grid, LLM__ATTEND_WARPS * 32, llm__choose_attention(group, c->kv.stride),
                llm__make_attend(c, rows, layer, true));

    llm__fused_residual(c, rows, bucket, l->attention_out, c->attention, l->ffn_norm);

    llm__product gate_up = llm__make_product(c, rows, l->gate_up, c->normed);
    gate_up.n = s->n_ff;
    gate_up.next_x = c->ffn;
    gate_up.next_stride = c->sizes.ffn;
    llm__run_product<LLM__SWIGLU>(c, "gates and ups", (s->n_ff + LLM__PAIRS - 1) / LLM__PAIRS, bucket, gate_up);

    llm__fused_residual(c, rows, bucket, l->down, c->ffn, next_norm);
}

static void llm__fused_pass(llm__gpu_context *c, int bucket) {
    llm__fwd_rows rows = llm__place_rows(c, c->rows, LLM__FUSED_ROWS);
    llm__launch(&c->queue, LLM__SERIAL, "the embedding", dim3((unsigned)bucket), 256, llm__embed, llm__make_start(c, rows, true));
    for (int layer = 0; layer < c->model->shape.n_layers; layer++) llm__fused_layer(c, rows, bucket, layer);
    llm__product head = llm__make_product(c, rows, c->model->head, c->normed);
    head.out = c->logits;
    llm__run_product<LLM__LOGITS>(c, "the logits", (head.n + 15) / 16, bucket, head);
}

static void llm__run_picker(llm__gpu_context *c) {
    llm__picker p = {llm__place_rows(c, c->rows, LLM__FUSED_ROWS), c->logits, c->model->shape.n_vocab, c->picker, c->host_picked};
    llm__launch(&c->queue, LLM__OVERLAP, "picking a token", dim3(1), LLM__PICK_THREADS, llm__pick, p);
}

/* The same launches, recorded once for each bucket, and for bursts. Other threads may go on using the GPU meanwhile. */
static void llm__record_graph(llm__gpu_context *c, int bucket, bool pick, cudaGraphExec_t *out) {
    cudaGraph_t graph = NULL;
    llm__note(&c->queue, cudaStreamBeginCapture(c->queue.stream, cudaStreamCaptureModeThreadLocal), "starting to record the pass");
    if (c->queue.failure != cudaSuccess) return;
    llm__fused_pass(c, bucket);
    if (pick) llm__run_picker(c);
    llm__note(&c->queue, cudaStreamEndCapture(c->queue.stream, &graph), "recording the pass");
    if (c->queue.failure == cudaSuccess) llm__note(&c->queue, cudaGraphInstantiate(out, graph, 0), "making a graph of the pass");
    if (graph) cudaGraphDestroy(graph);
}

/* The first time kernels are launched one by one: then they are loaded, which may need what must not be done while recording.
   The second time they are recorded. */
static void llm__run_graph(llm__gpu_context *c, int bucket, bool pick, llm__recording *r) {
    if (!r->loaded) {
        llm__fused_pass(c, bucket);
        if (pick) llm__run_picker(c);
        r->loaded = c->queue.failure == cudaSuccess;
        return;
    }
    if (!r->graph && c->queue.failure == cudaSuccess) llm__record_graph(c, bucket, pick, &r->graph);
    if (c->queue.failure == cudaSuccess) llm__note(&c->queue, cudaGraphLaunch(r->graph, c->queue.stream), "launching the graph");
}

static void llm__fused_forward(llm__gpu_context *c, const llm_pass *pass) {
    int index = 0;
    while (1 << index < pass->n_rows) index++;
    llm__send_rows(c, pass, LLM__FUSED_ROWS);
    if (c->model->mode == LLM_CUDA_GRAPH) llm__run_graph(c, 1 << index, false, &c->passes[index]);
    else llm__fused_pass(c, 1 << index);
}

/* ---- Any number of rows: one operation after the other ----

   Of what follows a product cuBLAS itself does the addition to the residual stream (beta = 1). cuBLASLt's epilogues are a
   bias, ReLU and GELU: none multiplies SiLU(gate) by up, turns queries and keys, or squares a row, which are what there is to
   fuse here; a bias is added where RoPE reads anyway. So plain cuBLAS it is. (Lt could scale int8's outputs one by one, by a
   vector for alpha, for types that only the device's own library names.) */

/* Outputs [first, first + n) of y = W x, or y += W x, for bf16. cuBLAS counts columns first: y' = (W')' x'. */
static void llm__blas_product(llm__gpu_context *c, llm__gpu_matrix m, const void *weight, int first, int n, const uint16_t *x, int rows,
                              float *y, bool add) {
    float one = 1, beta = add ? 1.0f : 0.0f;
    if (c->queue.failure != cudaSuccess || c->queue.blas_failure != CUBLAS_STATUS_SUCCESS) return;
    c->queue.blas_failure = cublasGemmEx(c->queue.blas, CUBLAS_OP_T, CUBLAS_OP_N, n, rows, m.k, &one, weight, CUDA_R_16BF, m.k, x,
                                         CUDA_R_16BF, llm__input_stride(m), &beta, y + first, CUDA_R_32F, m.n, CUBLAS_COMPUTE_32F,
                                         CUBLAS_GEMM_DEFAULT);
}

/* The same for what is not bf16, piece by piece; int8 without its scales, f16 in two goes. */
static void llm__widened_product(llm__gpu_context *c, llm__gpu_matrix m, const uint16_t *x, int rows, float *y, bool add) {
    int some = llm__least((int)(c->sizes.widened / (size_t)m.k), m.n);
    for (int first = 0; first < m.n; first += some) {
        int n = llm__least(m.n - first, some);
        unsigned n_blocks = (unsigned)(((size_t)n * (size_t)m.k + 2047) / 2048);
        for (int part = 0; part < (m.format == LLM__F16 ? 2 : 1); part++) {
            llm__launch(&c->queue, LLM__SERIAL, "widening", dim3(n_blocks), 256, llm__widen, m, first, n, part == 1, c->widened);
            llm__blas_product(c, m, c->widened, first, n, x, rows, y, add || part);
        }
    }
}

static void llm__int8_product(llm__gpu_context *c, llm__gpu_matrix m, const uint16_t *x, int rows, float *y, bool add) {
    float *sums = add ? c->wide : y;
    llm__widened_product(c, m, x, rows, sums, false);
    llm__launch(&c->queue, LLM__SERIAL, "scaling", dim3((unsigned)(m.n + 255) / 256, (unsigned)rows), 256, llm__scale, sums, m.scales, m.n, y, add);
}

/* y = W x, or y += W x. */
static void llm__plain_product(llm__gpu_context *c, llm__gpu_matrix m, const uint16_t *x, int rows, float *y, bool add) {
    if (rows <= LLM__FUSED_ROWS)
        llm__launch(&c->queue, LLM__SERIAL, "a product", dim3((unsigned)(m.n + 7) / 8, (unsigned)rows), 256, llm__matrix_product, m, x, y, add);
    else if (m.format == LLM__BF16) llm__blas_product(c, m, m.data, 0, m.n, x, rows, y, add);
    else if (m.format == LLM__INT8) llm__int8_product(c, m, x, rows, y, add);
    else llm__widened_product(c, m, x, rows, y, add);
}

static void llm__plain_norm(llm__gpu_context *c, const float *x, const float *weight, int rows) {
    const llm_shape *s = &c->model->shape;
    llm__launch(&c->queue, LLM__SERIAL, "a norm", dim3((unsigned)rows), 256, llm__norm, x, weight, s->n_embd, s->rms_eps, c->normed, c->sizes.n_embd);
}

static void llm__run_attention(llm__gpu_context *c, llm__fwd_rows rows, int n_rows, int n_tiles, int layer) {
    const llm_shape *s = &c->model->shape;
    llm__attn_run a = llm__make_attend(c, rows, layer, false);
    if (c->model->mode == LLM_CUDA_EAGER)
        llm__launch(&c->queue, LLM__SERIAL, "attention", dim3((unsigned)s->n_heads, (unsigned)n_rows), 32, llm__plain_attention, a);
    else
        llm__launch(&c->queue, LLM__SERIAL, "attention", dim3(1, (unsigned)s->n_kv_heads, (unsigned)n_tiles), LLM__ATTEND_WARPS * 32,
                    llm__choose_attention(LLM__TILE_COLUMNS, c->kv.stride), a);
}

static void llm__plain_ffn(llm__gpu_context *c, const llm__gpu_layer *l, int n, float *x) {
    const llm_shape *s = &c->model->shape;
    llm__plain_norm(c, x, l->ffn_norm, n);
    llm__plain_product(c, l->gate_up, c->normed, n, c->wide, false);
    llm__launch(&c->queue, LLM__SERIAL, "SwiGLU", dim3((unsigned)(s->n_ff + 255) / 256, (unsigned)n), 256, llm__swiglu, c->wide, s->n_ff,
                c->ffn, c->sizes.ffn);
    llm__plain_product(c, l->down, c->ffn, n, x, true);
}

/* The head for rows [first, end), and the log-probabilities of the n targets that follow them. Logits are made for as
   many rows at a time as fit into the context's, or into what the layers' products went to, which is idle by now. */
static void llm__fwd_score_rows(llm__gpu_context *c, int first, int end, int n_targets) {
    llm__gpu_matrix head = c->model->head;
    size_t in_wide = (size_t)c->desc.n_batch * (size_t)c->sizes.n_wide / (size_t)head.n, in_logits = (size_t)c->desc.n_logits;
    size_t most = in_wide > in_logits ? in_wide : in_logits, n_rows = (size_t)(end - first), n_pieces = (n_rows + most - 1) / most;
    int some = (int)((n_rows + n_pieces - 1) / n_pieces); /* all alike: a last piece of few rows would go without cuBLAS */
    float *logits = in_wide > in_logits ? c->wide : c->logits;
    for (; first < end; first += some) {
        int n = llm__least(end - first, some);
        llm__plain_product(c, head, c->normed + (size_t)first * (size_t)c->sizes.n_embd, n, logits, false);
        llm__launch(&c->queue, LLM__SERIAL, "scoring", dim3((unsigned)n), 256, llm__score_row, logits, head.n, first, c->targets,
                    c->targets + c->desc.n_batch, n_targets, c->log_probs);
    }
}

/* What llm_pass wants instead of logits; usually there is room for all targets at once. */
static void llm__score_targets(llm__gpu_context *c, const llm_pass *pass) {
    int most = c->desc.n_batch;
    for (int first = 0; first < pass->n_targets; first += most) {
        int n = llm__least(pass->n_targets - first, most);
        size_t bytes = (size_t)n * sizeof(int);
        memcpy(c->host_targets, pass->targets + first, bytes);
        memcpy(c->host_targets + most, pass->target_rows + first, bytes);
        llm__note(&c->queue, cudaMemcpyAsync(c->targets, c->host_targets, (size_t)most * sizeof(int) + bytes, cudaMemcpyHostToDevice, c->queue.stream),
                  "sending the targets");
        llm__fwd_score_rows(c, pass->target_rows[first], pass->target_rows[first + n - 1] + 1, n);
        llm__note(&c->queue, cudaMemcpyAsync(c->host_log_probs, c->log_probs, bytes, cudaMemcpyDeviceToHost, c->queue.stream),
                  "fetching log-probabilities");
        llm__note(&c->queue, cudaStreamSynchronize(c->queue.stream), "scoring");
        memcpy(pass->log_probs + first, c->host_log_probs, bytes);
    }
}

/* Returns false if it was cancelled. */
static bool llm__plain_forward(llm__gpu_context *c, const llm_pass *pass) {
    const llm__gpu_model *m = c->model;
    const llm_shape *s = &m->shape;
    int capacity = llm__pad(pass->n_rows, LLM__FUSED_ROWS), n_tiles = llm__send_rows(c, pass, capacity), n = pass->n_rows;
    llm__fwd_rows rows = llm__place_rows(c, c->rows, capacity);
    const uint16_t *attention = c->attention;
    float *x = c->x;
    llm__launch(&c->queue, LLM__SERIAL, "the embedding", dim3((unsigned)n), 256, llm__embed, llm__make_start(c, rows, false));
    for (int layer = 0; layer < s->n_layers && n; layer++) {
        const llm__gpu_layer *l = &m->layers[layer];
        if (llm__is_cancelled(pass)) return false;
        llm__plain_norm(c, x, l->attention_norm, n);
        llm__plain_product(c, l->qkv, c->normed, n, c->wide, false);
        llm__run_rope(c, LLM__SERIAL, rows, n, layer);
        if (layer == s->n_layers - 1 && pass->n_logits == 0) return true;
        llm__run_attention(c, rows, n, n_tiles, layer);
        if (layer == s->n_layers - 1) {
            n = pass->n_logits;
            llm__launch(&c->queue, LLM__SERIAL, "keeping rows", dim3((unsigned)n), 256, llm__fwd_keep_rows, rows, x, c->kept_x, s->n_embd,
                        attention, c->kept_attention, c->sizes.q);
            x = c->kept_x;
            attention = c->kept_attention;
        }
        llm__plain_product(c, l->attention_out, attention, n, x, true);
        llm__plain_ffn(c, l, n, x);
    }
    llm__plain_norm(c, x, m->output_norm, n);
    if (pass->n_targets) llm__score_targets(c, pass);
    else llm__plain_product(c, m->head, c->normed, n, c->logits, false);
    return true;
}

static llm_status llm__gpu_forward(void *context, const llm_pass *pass, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    size_t n_vocab = (size_t)c->model->shape.n_vocab;
    bool finished = !llm__is_cancelled(pass);
    bool fused = pass->n_rows <= LLM__FUSED_ROWS && !pass->n_targets && c->model->mode != LLM_CUDA_EAGER;
    if (finished && fused) llm__fused_forward(c, pass);
    else if (finished) finished = llm__plain_forward(c, pass);
    if (finished && pass->n_logits && !pass->n_targets && c->queue.failure == cudaSuccess)
        llm__note(&c->queue, cudaMemcpyAsync(c->host_logits + (size_t)pass->first_logits * n_vocab, c->logits,
                                             (size_t)pass->n_logits * n_vocab * sizeof(float), cudaMemcpyDeviceToHost, c->queue.stream),
                  "fetching the logits");
    llm__note(&c->queue, cudaStreamSynchronize(c->queue.stream), "computing the pass");
    llm_status status = llm__queue_status(&c->queue, err);
    return status || finished ? status : llm__cuda_error(err, LLM_ERROR_CANCELLED, "the forward pass was cancelled");
}

static const float *llm__gpu_logits(void *context, int i) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    return c->host_logits + (size_t)i * (size_t)c->model->shape.n_vocab;
}

/* ==== 11 Bursts =================================================================================================

   Each pass ends by picking the token of the next, so the host queues passes without knowing their tokens. It is a few
   ahead of the token it awaits: the GPU never waits for it, and little is in vain when that token ends the text. */

static void llm__send_burst(llm__gpu_context *c, const llm_burst *burst) {
    llm__fwd_rows rows = llm__place_rows(c, c->host_rows, LLM__FUSED_ROWS);
    const llm_sampler *s = burst->sampler;
    size_t n_blocks = (size_t)(burst->position + burst->n - 1 + LLM_BLOCK - 1) / LLM_BLOCK;
    memset(c->host_rows, 0, (size_t)(rows.tables - c->host_rows) * sizeof(int));
    for (int i = 0; i < 3; i++) c->host_rows[i] = 1; /* llm__fwd_rows.counts */
    const_cast<int *>(rows.positions)[0] = burst->position - 1;
    const_cast<int *>(rows.tile_rows)[0] = 1;
    memcpy(const_cast<int *>(rows.tables), burst->blocks, n_blocks * sizeof(int));
    size_t n_ints = (size_t)(rows.tables - c->host_rows) + n_blocks;
    llm__picker_state state = {s->temperature >= 1e-30f ? 1.44269504f / s->temperature : 0, s->top_p, s->min_p, s->top_k, s->seed, s->n_drawn, 0};
    *c->host_picker = state;
    llm__note(&c->queue, cudaMemcpyAsync(c->rows, c->host_rows, n_ints * sizeof(int), cudaMemcpyHostToDevice, c->queue.stream),
              "sending the burst");
    llm__note(&c->queue, cudaMemcpyAsync(c->picker, c->host_picker, sizeof state, cudaMemcpyHostToDevice, c->queue.stream),
              "sending the sampler");
}

/* Token i of a burst. */
static void llm__queue_token(llm__gpu_context *c, int i) {
    if (i && c->model->mode == LLM_CUDA_GRAPH) {
        llm__run_graph(c, 1, true, &c->burst_pass);
    } else {
        if (i) llm__fused_pass(c, 1);
        llm__run_picker(c);
    }
    llm__note(&c->queue, cudaEventRecord(c->picked[i % (LLM__AHEAD + 1)], c->queue.stream), "marking a token");
}

static llm_status llm__gpu_burst(void *context, const llm_burst *burst, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    bool wanted = true;
    llm__send_burst(c, burst);
    for (int i = 0, n_queued = 0; i < burst->n && wanted; i++) {
        for (; n_queued < burst->n && n_queued <= i + LLM__AHEAD; n_queued++) llm__queue_token(c, n_queued);
        llm__note(&c->queue, cudaEventSynchronize(c->picked[i % (LLM__AHEAD + 1)]), "awaiting a token");
        wanted = c->queue.failure == cudaSuccess && burst->on_token(burst->user, c->host_picked[i]);
    }
    llm__note(&c->queue, cudaStreamSynchronize(c->queue.stream), "ending the burst");
    return llm__queue_status(&c->queue, err);
}

/* ==== 12 The backend ============================================================================================ */

static llm_status llm__gpu_copy_block(void *context, int to, int from, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    size_t size = c->kv.block_size;
    LLM__TRY(cudaMemcpyAsync(c->kv.data + (size_t)to * size, c->kv.data + (size_t)from * size, size * 2, cudaMemcpyDeviceToDevice,
                             c->queue.stream));
    return LLM_OK;
}

static llm_status llm__gpu_read_block(void *context, int block, void *bytes, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    size_t size = c->kv.block_size;
    LLM__TRY(cudaMemcpyAsync(bytes, c->kv.data + (size_t)block * size, size * 2, cudaMemcpyDeviceToHost, c->queue.stream));
    LLM__TRY(cudaStreamSynchronize(c->queue.stream));
    return LLM_OK;
}

static llm_status llm__gpu_write_block(void *context, int block, const void *bytes, llm_error *err) {
    llm__gpu_context *c = (llm__gpu_context *)context;
    size_t size = c->kv.block_size;
    LLM__TRY(cudaMemcpyAsync(c->kv.data + (size_t)block * size, bytes, size * 2, cudaMemcpyHostToDevice, c->queue.stream));
    LLM__TRY(cudaStreamSynchronize(c->queue.stream));
    return LLM_OK;
}

static double llm__read_matrix(llm__gpu_context *c, llm__gpu_matrix m) {
    size_t n_vectors = (size_t)m.n * llm__row_bytes(m) / 16;
    llm__launch(&c->queue, LLM__SERIAL, "reading", dim3((unsigned)c->model->n_processors * 8), 256, llm__read_all, m.data, n_vectors, c->n_done);
    return (double)n_vectors * 16;
}

static double llm__read_weights(llm__gpu_context *c) {
    const llm__gpu_model *m = c->model;
    double bytes = llm__read_matrix(c, m->head);
    for (int i = 0; i < m->shape.n_layers; i++) {
        const llm__gpu_layer *l = &m->layers[i];
        bytes += llm__read_matrix(c, l->qkv) + llm__read_matrix(c, l->attention_out) + llm__read_matrix(c, l->gate_up) + llm__read_matrix(c, l->down);
    }
    return bytes;
}

/* cuBLAS on bf16; what the numbers are does not matter. */
static double llm__multiply_much(llm__gpu_context *c) {
    llm__gpu_matrix m = c->model->layers[0].gate_up;
    int n = m.format == LLM__BF16 ? m.n : llm__least((int)(c->sizes.widened / (size_t)m.k), m.n), rows = c->desc.n_batch;
    const void *weight = m.format == LLM__BF16 ? (void *)m.data : c->widened;
    for (int i = 0; i < 10 && c->queue.blas; i++) llm__blas_product(c, m, weight, 0, n, c->normed, rows, c->wide, false);
    return c->queue.blas ? 20.0 * n * m.k * rows : 0;
}

/* What `work` says it does, over the seconds it takes: the best of several times; 0 if it could not be measured. */
static double llm__measure(llm__gpu_context *c, double (*work)(llm__gpu_context *c)) {
    cudaEvent_t start = NULL, end = NULL;
    double best = 0;
    llm__note(&c->queue, cudaEventCreateWithFlags(&start, cudaEventDefault), "measuring");
    llm__note(&c->queue, cudaEventCreateWithFlags(&end, cudaEventDefault), "measuring");
    for (int i = 0; i < 8 && start && end; i++) {
        float ms = 0;
        llm__note(&c->queue, cudaEventRecord(start, c->queue.stream), "measuring");
        double done = work(c);
        llm__note(&c->queue, cudaEventRecord(end, c->queue.stream), "measuring");
        llm__note(&c->queue, cudaStreamSynchronize(c->queue.stream), "measuring");
        if (c->queue.failure == cudaSuccess) llm__note(&c->queue, cudaEventElapsedTime(&ms, start, end), "measuring");
        if (c->queue.failure == cudaSuccess && ms > 0) best = fmax(best, done / (ms * 1e-3));
    }
    if (start) cudaEventDestroy(start);
    if (end) cudaEventDestroy(end);
    cudaMemsetAsync(c->n_done, 0, sizeof *c->n_done, c->queue.stream); /* the reading kernels' sink */
    return llm__queue_status(&c->queue, NULL) ? 0 : best;
}

/* Each matrix is a kernel, as in a pass. */
static double llm__gpu_measure_bandwidth(void *context) { return llm__measure((llm__gpu_context *)context, llm__read_weights); }
static double llm__gpu_measure_flops(void *context) { return llm__measure((llm__gpu_context *)context, llm__multiply_much); }

#define LLM__GPU_BACKEND(open, burst)                                                                                    \
    {"cuda", open, llm__gpu_upload, llm__gpu_close, llm__gpu_weight_bytes, llm__gpu_block_bytes, llm__gpu_scratch_bytes, \
     llm__gpu_context_create, llm__gpu_context_free, llm__gpu_forward, llm__gpu_logits, llm__gpu_copy_block,             \
     llm__gpu_read_block, llm__gpu_write_block, llm__gpu_measure_bandwidth, llm__gpu_measure_flops, burst}

} // namespace llm__cuda

extern const llm_backend *llm_cuda_backend_mode(llm_cuda_mode mode) {
    using namespace llm__cuda;
    static const llm_backend graph = LLM__GPU_BACKEND(llm__open_graph, llm__gpu_burst);
    static const llm_backend fused = LLM__GPU_BACKEND(llm__open_fused, llm__gpu_burst);
    static const llm_backend eager = LLM__GPU_BACKEND(llm__open_eager, NULL);
    return mode == LLM_CUDA_EAGER ? &eager : mode == LLM_CUDA_FUSED ? &fused : &graph;
}

extern const llm_backend *llm_cuda_backend(void) { return llm_cuda_backend_mode(LLM_CUDA_GRAPH); }
