/* What the device plumbing (device.c) hands to the ops in espi_exec.device: one GPU, its one stream and what the ops share on it.
 * Kernels and copies are queued on that stream alone; nothing of an op may wait, allocate or copy from host memory that is not pinned, for
 * it may be running into a recording.  cuBLASLt is called by its own names: cublaslt.c finds the library at run time. */
#ifndef ESPI_KERNELS_CUDA_DEVICE_H
#define ESPI_KERNELS_CUDA_DEVICE_H

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "core/status.h"
#include "kernels/backend.h"

/* Bits of espi_cuda.fault.  The next wait clears them and fails with the status that stands beside each. */
enum {
    ESPI_CUDA_FAULT_ROUTER = 1, /* a router logit is not finite: ESP_ERR_NONFINITE */
};

/* How many pieces are on their way at once. */
#define ESPI_CUDA_PIECES 3

typedef struct espi_cuda {
    cudaStream_t stream;
    cublasLtHandle_t blas;
    void *workspace; /* of cuBLASLt; aligned to 256 */
    size_t workspace_bytes;
    int sms, major; /* multiprocessors; compute capability */
    /* For what the host makes (head.cu) and what comes from it and goes there (optim.cu) while the stream goes on.  An op that uses them ends
     * with the stream waiting for all that it put there. */
    cudaStream_t aside, away;
    cudaEvent_t asked, made, gone[ESPI_CUDA_PIECES];
    uint32_t *fault; /* device memory: bits set by atomicOr, 0 when all is well */
    /* Host callbacks that the stream makes (head.cu): the first failure, which the next wait takes and clears, and what they are called with.
     * A record lives until espi_cuda_calls_free, for a recorded graph may run it again. */
    volatile esp_status callback_status;
    struct espi_cuda_call *calls;
} espi_cuda;

void espi_cuda_calls_free(espi_cuda *cuda);

/* The failure of a call of the runtime as a status; cudaSuccess: ESP_OK.  what: "copying to the GPU". */
esp_status espi_cuda_check(cudaError_t error, const char *what);
/* Whether the kernel just launched was taken. */
#define ESPI_CUDA_LAUNCHED(name) espi_cuda_check(cudaGetLastError(), name)
/* Of a call that returns cudaError_t. */
#define ESPI_CUDA_TRY(call) ESPI_TRY(espi_cuda_check((call), #call))

/* cublaslt.c: NULL, or why the library cannot be used. */
const char *espi_cublaslt_open(void);

#define ESPI_OP(name, args) esp_status espi_##name##_cuda(const espi_exec *exec, const args *a);
#include "kernels/ops.def"
#undef ESPI_OP

/* experts.cu: espi_backend.packed_bytes and pack, and which kernels make the products with whole tiles. */
const char *espi_experts_describe_cuda(void);
size_t espi_packed_bytes_cuda(const espi_stack *w);
esp_status espi_pack_cuda(const espi_exec *exec, void *packed, const espi_stack *one);

/* quant.cu: espi_backend.quantise. */
esp_status espi_quantise_cuda(const espi_exec *exec, const espi_quantise *a);

extern const espi_device espi_device_cuda;

#ifdef __cplusplus
}
#endif

#endif
