/*  cublas_v2.h - the one product of cuBLAS that llm_cuda.cu uses, in plain loops. cuda_runtime.h explains the rest. */
#ifndef CUDA_HOST_CUBLAS_H
#define CUDA_HOST_CUBLAS_H

#include <cuda_runtime.h>

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_ALLOC_FAILED = 3, CUBLAS_STATUS_EXECUTION_FAILED = 13 };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType { CUDA_R_32F = 0, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT = -1 };

struct cuda_host_blas {
    cudaStream_t stream = nullptr;
};
typedef cuda_host_blas *cublasHandle_t;

static inline cublasStatus_t cublasCreate(cublasHandle_t *out) {
    return cuda_host_new(out) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}

static inline cublasStatus_t cublasDestroy(cublasHandle_t handle) {
    cuda_host_delete(handle);
    return CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasSetStream(cublasHandle_t handle, cudaStream_t stream) {
    handle->stream = stream;
    return cuda_host_fails() ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}

static inline cublasStatus_t cublasSetWorkspace(cublasHandle_t, void *, size_t) {
    return cuda_host_fails() ? CUBLAS_STATUS_EXECUTION_FAILED : CUBLAS_STATUS_SUCCESS;
}

static inline float cuda_host_bf16(uint16_t bits) { return __uint_as_float((uint32_t)bits << 16); }

static inline uint16_t cuda_host_to_bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* c[j][i] = alpha * a[i] . b[j] + beta * c[j][i]; only these combinations of types and transpositions are there. */
static inline cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                                          int n, int k, const void *alpha, const void *a, cudaDataType a_type, int lda,
                                          const void *b, cudaDataType b_type, int ldb, const void *beta, void *c,
                                          cudaDataType c_type, int ldc, cublasComputeType_t, cublasGemmAlgo_t) {
    if (ta != CUBLAS_OP_T || tb != CUBLAS_OP_N || a_type != CUDA_R_16BF || b_type != CUDA_R_16BF ||
        (c_type != CUDA_R_32F && c_type != CUDA_R_16BF))
        return CUBLAS_STATUS_EXECUTION_FAILED;
    float scale = *(const float *)alpha, keep = *(const float *)beta;
    cudaError_t result = cuda_host_enqueue(handle->stream, [=] {
        for (int j = 0; j < n; j++)
            for (int i = 0; i < m; i++) {
                const uint16_t *row = (const uint16_t *)a + (size_t)i * lda,
                               *column = (const uint16_t *)b + (size_t)j * ldb;
                size_t at = (size_t)j * ldc + i;
                float sum = 0;
                for (int l = 0; l < k; l++) sum += cuda_host_bf16(row[l]) * cuda_host_bf16(column[l]);
                sum *= scale;
                if (c_type == CUDA_R_16BF) {
                    uint16_t *out = (uint16_t *)c + at;
                    *out = cuda_host_to_bf16(sum + (keep != 0 ? keep * cuda_host_bf16(*out) : 0));
                } else {
                    float *out = (float *)c + at;
                    *out = sum + (keep != 0 ? keep * *out : 0);
                }
            }
    });
    return result == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}

#endif
