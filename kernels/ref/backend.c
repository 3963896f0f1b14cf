/* The table of the reference backend: every slot is filled. */
#include "kernels/ref/ref.h"

#include "kernels/refuse.h"

static bool always(void) {
    return true;
}

const espi_backend ESPI_REF_NAME(espi_backend) = {
    .name = ESPI_REF_LABEL,
    .real = ESPI_REF_DTYPE,
    .act = ESPI_REF_DTYPE,
    .available = always,
#define ESPI_OP(name, args) .name.run = ESPI_REF_NAME(espi_##name),
#include "kernels/ops.def"
#undef ESPI_OP
    .attention_fwd.scratch = ESPI_REF_NAME(espi_attention_fwd_scratch),
    .attention_bwd.scratch = ESPI_REF_NAME(espi_attention_bwd_scratch),
    .router_fwd.scratch = ESPI_REF_NAME(espi_router_fwd_scratch),
    .linear_bwd.scratch = ESPI_REF_NAME(espi_linear_bwd_scratch),
    .gate_up_bwd.scratch = ESPI_REF_NAME(espi_gate_up_bwd_scratch),
    .down_bwd.scratch = ESPI_REF_NAME(espi_down_bwd_scratch),
    .head_grad.scratch = ESPI_REF_NAME(espi_head_grad_scratch),
    .head_fused.scratch = ESPI_REF_NAME(espi_head_fused_scratch),
    .head_sample.scratch = ESPI_REF_NAME(espi_head_sample_scratch),
    ESPI_REFUSALS,
};
