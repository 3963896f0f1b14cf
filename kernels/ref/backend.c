/* The table of the reference backend: every slot is filled. */
#include "kernels/ref/ref.h"

static bool always(void) {
    return true;
}

static const char *refuse_embed_fwd(const espi_embed_fwd *a) {
    return espi_mat_refusal(&a->table);
}
static const char *refuse_linear_fwd(const espi_linear_fwd *a) {
    return espi_mat_refusal(&a->w);
}
static const char *refuse_linear_bwd(const espi_linear_bwd *a) {
    return espi_mat_refusal(&a->w);
}
static const char *refuse_router_fwd(const espi_router_fwd *a) {
    if (a->correction && !a->rule.sigmoid) return "a correction of the ranking is defined for sigmoid scores only";
    return espi_mat_refusal(&a->w);
}
static const char *refuse_router_bwd(const espi_router_bwd *a) {
    return espi_mat_refusal(&a->w);
}
static const char *refuse_gate_up_fwd(const espi_gate_up_fwd *a) {
    return espi_stack_refusal(&a->w);
}
static const char *refuse_gate_up_bwd(const espi_gate_up_bwd *a) {
    return espi_stack_refusal(&a->w);
}
static const char *refuse_down_fwd(const espi_down_fwd *a) {
    return espi_stack_refusal(&a->w);
}
static const char *refuse_down_bwd(const espi_down_bwd *a) {
    return espi_stack_refusal(&a->w);
}
static const char *refuse_head_stats(const espi_head_stats *a) {
    return espi_mat_refusal(&a->head.w);
}
static const char *refuse_head_grad(const espi_head_grad *a) {
    return espi_mat_refusal(&a->head.w);
}
static const char *refuse_head_fused(const espi_head_fused *a) {
    return espi_mat_refusal(&a->head.w);
}
static const char *refuse_head_logits(const espi_head_logits *a) {
    return espi_mat_refusal(&a->head.w);
}
static const char *refuse_head_sample(const espi_head_sample *a) {
    return espi_mat_refusal(&a->head.w);
}

const espi_backend ESPI_REF_NAME(espi_backend) = {
    .name = ESPI_REF_LABEL,
    .real = ESPI_REF_DTYPE,
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
