/* The table of the cpu backend of one instruction set. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/dense.h"

#define STRING2(x) #x
#define STRING(x) STRING2(x)

#define REFUSE_MAT(op, weight)                                                                                                             \
    static const char *refuse_##op(const espi_##op *a) {                                                                                   \
        return espi_mat_refusal(&a->weight);                                                                                               \
    }
#define REFUSE_STACK(op)                                                                                                                   \
    static const char *refuse_##op(const espi_##op *a) {                                                                                   \
        return espi_stack_refusal(&a->w);                                                                                                  \
    }
REFUSE_MAT(embed_fwd, table)
REFUSE_MAT(linear_fwd, w)
REFUSE_MAT(linear_bwd, w)
static const char *refuse_router_fwd(const espi_router_fwd *a) {
    return a->correction && !a->rule.sigmoid ? "a router correction without sigmoid scores" : espi_mat_refusal(&a->w);
}
REFUSE_MAT(router_bwd, w)
REFUSE_STACK(gate_up_fwd)
REFUSE_STACK(gate_up_bwd)
REFUSE_STACK(down_fwd)
REFUSE_STACK(down_bwd)
REFUSE_MAT(head_stats, head.w)
REFUSE_MAT(head_grad, head.w)
REFUSE_MAT(head_fused, head.w)
REFUSE_MAT(head_logits, head.w)
REFUSE_MAT(head_sample, head.w)

/* cpu.c, which is compiled for any machine. */
bool ESPI_CPU(espi_cpu_available)(void);

extern const espi_backend ESPI_CPU(espi_backend_cpu);
const espi_backend ESPI_CPU(espi_backend_cpu) = {
    .name = "cpu-" STRING(ESPI_CPU_ISA),
    .real = ESP_F32,
    .available = ESPI_CPU(espi_cpu_available),
#define ESPI_OP(op, args) .op.run = ESPI_CPU(espi_##op),
#include "kernels/ops.def"
#undef ESPI_OP
    .describe = espi_dense_describe,
    .linear_fwd.scratch = ESPI_CPU(espi_linear_fwd_scratch),
    .linear_bwd.scratch = ESPI_CPU(espi_linear_bwd_scratch),
    .gate_up_bwd.scratch = ESPI_CPU(espi_gate_up_bwd_scratch),
    .down_bwd.scratch = ESPI_CPU(espi_down_bwd_scratch),
    .embed_fwd.refuse = refuse_embed_fwd,
    .linear_fwd.refuse = refuse_linear_fwd,
    .linear_bwd.refuse = refuse_linear_bwd,
    .router_fwd.refuse = refuse_router_fwd,
    .router_bwd.refuse = refuse_router_bwd,
    .gate_up_fwd.refuse = refuse_gate_up_fwd,
    .gate_up_bwd.refuse = refuse_gate_up_bwd,
    .down_fwd.refuse = refuse_down_fwd,
    .down_bwd.refuse = refuse_down_bwd,
    .head_stats.refuse = refuse_head_stats,
    .head_grad.refuse = refuse_head_grad,
    .head_fused.refuse = refuse_head_fused,
    .head_logits.refuse = refuse_head_logits,
    .head_sample.refuse = refuse_head_sample,
};
