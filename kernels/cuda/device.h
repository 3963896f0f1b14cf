/* What the device plumbing (device.cu) hands to the ops in espi_exec.device: one GPU, its one stream and what the ops share on it. */
#ifndef ESPI_KERNELS_CUDA_DEVICE_H
#define ESPI_KERNELS_CUDA_DEVICE_H

#include "core/status.h"

#include <cublasLt.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

/* Bits of espi_cuda.fault.  The next wait clears them and fails with the status that stands beside each. */
enum {
    ESPI_CUDA_FAULT_ROUTER = 1, /* a router logit is not finite: ESP_ERR_NONFINITE */
};

typedef struct espi_cuda {
    cudaStream_t stream;
    cublasLtHandle_t blas;
    void *workspace; /* of cuBLASLt; aligned to 256 */
    size_t workspace_bytes;
    int sms;
    uint32_t *fault; /* device memory: bits set by atomicOr, 0 when all is well */
    /* Host callbacks that the stream makes (head.cu): the first failure, which the next wait takes and clears, and what they are called with.
     * A record lives until espi_cuda_calls_free, for a recorded graph may run it again. */
    volatile esp_status callback_status;
    struct espi_cuda_call *calls;
} espi_cuda;

void espi_cuda_calls_free(espi_cuda *cuda);

#endif
