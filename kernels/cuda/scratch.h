/* Scratch of the ops of kernels/cuda that need some: beside cuda.cuh so that the table, which is C, knows them too. */
#ifndef ESPI_KERNELS_CUDA_SCRATCH_H
#define ESPI_KERNELS_CUDA_SCRATCH_H

#include "kernels/cuda/device.h"

#ifdef __cplusplus
extern "C" {
#endif

#define ESPI_CUDA_SCRATCHES(SCRATCH)                                                                                                       \
    SCRATCH(rmsnorm_bwd)                                                                                                                   \
    SCRATCH(attention_fwd)                                                                                                                 \
    SCRATCH(attention_bwd)                                                                                                                 \
    SCRATCH(linear_fwd)                                                                                                                    \
    SCRATCH(linear_bwd)                                                                                                                    \
    SCRATCH(router_fwd)                                                                                                                    \
    SCRATCH(router_bwd)                                                                                                                    \
    SCRATCH(dispatch)                                                                                                                      \
    SCRATCH(gate_up_fwd)                                                                                                                   \
    SCRATCH(gate_up_bwd)                                                                                                                   \
    SCRATCH(down_fwd)                                                                                                                      \
    SCRATCH(down_bwd)                                                                                                                      \
    SCRATCH(head_stats)                                                                                                                    \
    SCRATCH(head_grad)                                                                                                                     \
    SCRATCH(head_fused)                                                                                                                    \
    SCRATCH(head_logits)                                                                                                                   \
    SCRATCH(head_sample)                                                                                                                   \
    SCRATCH(sumsq)                                                                                                                         \
    SCRATCH(adamw)

#define ESPI_CUDA_SCRATCH(op) size_t espi_##op##_scratch_cuda(const espi_exec *exec, const espi_##op *a);
ESPI_CUDA_SCRATCHES(ESPI_CUDA_SCRATCH)
#undef ESPI_CUDA_SCRATCH

#ifdef __cplusplus
}
#endif

#endif
