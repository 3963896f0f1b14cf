/* Which cases no backend takes: weights that cannot be read, and settings that mean nothing.  One list for all, so that what one backend
 * refuses another does not take silently. */
#ifndef ESPI_KERNELS_REFUSE_H
#define ESPI_KERNELS_REFUSE_H

#include "kernels/backend.h"
#include "kernels/stack.h"

#define ESPI_REFUSE_MAT(op, weight)                                                                                                        \
    static inline const char *espi_refuse_##op(const espi_##op *a) {                                                                       \
        return espi_mat_refusal(&a->weight);                                                                                               \
    }
#define ESPI_REFUSE_STACK(op)                                                                                                              \
    static inline const char *espi_refuse_##op(const espi_##op *a) {                                                                       \
        return espi_stack_refusal(&a->w);                                                                                                  \
    }
ESPI_REFUSE_MAT(embed_fwd, table)
ESPI_REFUSE_MAT(linear_fwd, w)
ESPI_REFUSE_MAT(linear_bwd, w)
ESPI_REFUSE_MAT(router_bwd, w)
ESPI_REFUSE_STACK(gate_up_fwd)
ESPI_REFUSE_STACK(gate_up_bwd)
ESPI_REFUSE_STACK(down_fwd)
ESPI_REFUSE_STACK(down_bwd)
ESPI_REFUSE_MAT(head_stats, head.w)
ESPI_REFUSE_MAT(head_grad, head.w)
ESPI_REFUSE_MAT(head_fused, head.w)
ESPI_REFUSE_MAT(head_logits, head.w)
#undef ESPI_REFUSE_MAT
#undef ESPI_REFUSE_STACK

static inline const char *espi_refuse_router_fwd(const espi_router_fwd *a) {
    if (a->correction && !a->rule.sigmoid) return "a correction of the ranking is defined for sigmoid scores only";
    return espi_mat_refusal(&a->w);
}

static inline const char *espi_refuse_head_sample(const espi_head_sample *a) {
    const espi_head_filter *f = &a->filter;
    const bool any = espi_filters(f);
    if (f->top_k < 0 || f->top_k > a->head.w.rows) return "a filter keeps fewer than none or more tokens than the vocabulary has";
    if (!(f->top_p >= 0 && f->top_p < 1) || !(f->min_p >= 0 && f->min_p < 1)) return "a filter's share of the probability is not in [0,1)";
    if (any && a->head.temperature == 0) return "the largest logit is drawn without a filter";
    if (any && (a->kept_most < 1 || f->top_k > a->kept_most)) return "a filter keeps more tokens than there is room for";
    return espi_mat_refusal(&a->head.w);
}

/* The slots of a backend's table. */
#define ESPI_REFUSALS                                                                                                                      \
    .embed_fwd.refuse = espi_refuse_embed_fwd, .linear_fwd.refuse = espi_refuse_linear_fwd, .linear_bwd.refuse = espi_refuse_linear_bwd,   \
    .router_fwd.refuse = espi_refuse_router_fwd, .router_bwd.refuse = espi_refuse_router_bwd,                                              \
    .gate_up_fwd.refuse = espi_refuse_gate_up_fwd, .gate_up_bwd.refuse = espi_refuse_gate_up_bwd, .down_fwd.refuse = espi_refuse_down_fwd, \
    .down_bwd.refuse = espi_refuse_down_bwd, .head_stats.refuse = espi_refuse_head_stats, .head_grad.refuse = espi_refuse_head_grad,       \
    .head_fused.refuse = espi_refuse_head_fused, .head_logits.refuse = espi_refuse_head_logits,                                            \
    .head_sample.refuse = espi_refuse_head_sample

#endif
