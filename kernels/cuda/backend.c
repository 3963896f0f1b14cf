/* The table of the cuda backend. */
#include "kernels/cuda/scratch.h"
#include "kernels/refuse.h"

#include <stdio.h>

/* Asked before anything else of CUDA is called: without driver or device the count fails, which is the answer. */
static bool available(void) {
    int n = 0, major = 0;
    if (cudaGetDeviceCount(&n) != cudaSuccess || n == 0 ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) != cudaSuccess) {
        (void)cudaGetLastError();
        return false;
    }
    return major >= 8;
}

static const char *describe(void) {
    static _Thread_local struct cudaDeviceProp properties;
    static _Thread_local char line[sizeof properties.name + 256];
    if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) return NULL;
    snprintf(line, sizeof line, "%s, experts by %s", properties.name, espi_experts_describe_cuda());
    return line;
}

const espi_backend espi_backend_cuda = {
    .name = "cuda",
    .real = ESP_F32,
    .act = ESP_BF16,
    .device = &espi_device_cuda,
    .available = available,
    .describe = describe,
    .quantise = espi_quantise_cuda,
    .packed_bytes = espi_packed_bytes_cuda,
    .pack = espi_pack_cuda,
#define ESPI_OP(op, args) .op.run = espi_##op##_cuda,
#include "kernels/ops.def"
#undef ESPI_OP
#define SCRATCH(op) .op.scratch = espi_##op##_scratch_cuda,
    ESPI_CUDA_SCRATCHES(SCRATCH)
#undef SCRATCH
        ESPI_REFUSALS,
};
