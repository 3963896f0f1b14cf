/* The reference backend, compiled once with float storage ("ref") and once with double storage ("ref64").  Every sum is made in double and
 * rounded once, when stored. */
#ifndef ESPI_KERNELS_REF_H
#define ESPI_KERNELS_REF_H

#include "core/status.h"
#include "kernels/backend.h"
#include "kernels/stack.h"

#if defined(ESPI_REF_double)
typedef double real;
#define ESPI_REF_NAME(name) name##_ref64
#define ESPI_REF_LABEL "ref64"
#define ESPI_REF_DTYPE ESP_F64
#elif defined(ESPI_REF_float)
typedef float real;
#define ESPI_REF_NAME(name) name##_ref
#define ESPI_REF_LABEL "ref"
#define ESPI_REF_DTYPE ESP_F32
#else
#error "define ESPI_REF_float or ESPI_REF_double"
#endif

#define ESPI_OP(name, args) esp_status ESPI_REF_NAME(espi_##name)(const espi_exec *exec, const args *a);
#include "kernels/ops.def"
#undef ESPI_OP

/* Scratch of the ops that need some. */
size_t ESPI_REF_NAME(espi_attention_fwd_scratch)(const espi_exec *exec, const espi_attention_fwd *a);
size_t ESPI_REF_NAME(espi_attention_bwd_scratch)(const espi_exec *exec, const espi_attention_bwd *a);
size_t ESPI_REF_NAME(espi_router_fwd_scratch)(const espi_exec *exec, const espi_router_fwd *a);
size_t ESPI_REF_NAME(espi_linear_bwd_scratch)(const espi_exec *exec, const espi_linear_bwd *a);
size_t ESPI_REF_NAME(espi_gate_up_bwd_scratch)(const espi_exec *exec, const espi_gate_up_bwd *a);
size_t ESPI_REF_NAME(espi_down_bwd_scratch)(const espi_exec *exec, const espi_down_bwd *a);
size_t ESPI_REF_NAME(espi_head_grad_scratch)(const espi_exec *exec, const espi_head_grad *a);
size_t ESPI_REF_NAME(espi_head_fused_scratch)(const espi_exec *exec, const espi_head_fused *a);
size_t ESPI_REF_NAME(espi_head_sample_scratch)(const espi_exec *exec, const espi_head_sample *a);

/* The low-rank branch of one matrix, or of expert e of a stack; r may be 0.  Shared by linear and experts; defined in linear.c. */
typedef struct branch {
    const real *a, *b; /* [r,in], [out,r] */
    real *d_a, *d_b;
    int64_t r, in, out;
    double scale;
} branch;

#define branch_of ESPI_REF_NAME(espi_branch_of)
#define branch_down ESPI_REF_NAME(espi_branch_down)
#define branch_up ESPI_REF_NAME(espi_branch_up)
#define branch_down_bwd ESPI_REF_NAME(espi_branch_down_bwd)
#define branch_up_bwd ESPI_REF_NAME(espi_branch_up_bwd)
#define branch_grads ESPI_REF_NAME(espi_branch_grads)

branch branch_of(const espi_lora *lora, int64_t expert, int64_t in, int64_t out);
/* u = A x. */
void branch_down(const branch *l, real *u, const real *x);
/* scale (B u)[o]. */
double branch_up(const branch *l, const real *u, int64_t o);
/* q = scale B^T d_y. */
void branch_up_bwd(const branch *l, double *q, const real *d_y);
/* d_x += A^T q. */
void branch_down_bwd(const branch *l, double *d_x, const double *q);

/* Rows begin..end-1 of a batch: row s has input x[x_index[s]], upstream gradient weight[s] * d_y[y_index[s]], and u, q at s.
 * A NULL index means s itself, a NULL weight 1. */
typedef struct branch_rows {
    const real *x, *d_y, *u, *weight;
    const int32_t *x_index, *y_index;
    const double *q; /* as branch_up_bwd made it from d_y, not yet weighted */
    int64_t begin, end;
} branch_rows;

/* d_b += scale sum_s d_y_s u_s^T;  d_a += sum_s q_s x_s^T: each element one sum over the rows in order. */
void branch_grads(const branch *l, const branch_rows *rows);

#endif
