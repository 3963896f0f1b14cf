/* Dense layer with a frozen weight and a low-rank branch; the branch's own products serve the experts too. */
#include "kernels/ref/ref.h"

branch branch_of(const espi_lora *lora, int64_t expert, int64_t in, int64_t out) {
    const int64_t a_at = expert * lora->r * in, b_at = expert * out * lora->r;
    branch l = {.r = lora->r, .in = in, .out = out, .scale = lora->scale};
    if (lora->r == 0) return l;
    l.a = (const real *)lora->a + a_at;
    l.b = (const real *)lora->b + b_at;
    if (lora->d_a) l.d_a = (real *)lora->d_a + a_at;
    if (lora->d_b) l.d_b = (real *)lora->d_b + b_at;
    return l;
}

void branch_down(const branch *l, real *u, const real *x) {
    for (int64_t k = 0; k < l->r; k++) {
        double sum = 0;
        for (int64_t i = 0; i < l->in; i++) sum += (double)l->a[k * l->in + i] * x[i];
        u[k] = (real)sum;
    }
}

double branch_up(const branch *l, const real *u, int64_t o) {
    double sum = 0;
    for (int64_t k = 0; k < l->r; k++) sum += (double)l->b[o * l->r + k] * u[k];
    return l->scale * sum;
}

void branch_up_bwd(const branch *l, double *q, const real *d_y) {
    for (int64_t k = 0; k < l->r; k++) {
        double sum = 0;
        for (int64_t o = 0; o < l->out; o++) sum += (double)d_y[o] * l->b[o * l->r + k];
        q[k] = l->scale * sum;
    }
}

void branch_down_bwd(const branch *l, double *d_x, const double *q) {
    for (int64_t k = 0; k < l->r; k++)
        for (int64_t i = 0; i < l->in; i++) d_x[i] += q[k] * l->a[k * l->in + i];
}

static int64_t at(const int32_t *index, int64_t s) {
    return index ? index[s] : s;
}

static double weight_of(const branch_rows *rows, int64_t s) {
    return rows->weight ? rows->weight[s] : 1;
}

void branch_grads(const branch *l, const branch_rows *rows) {
    for (int64_t o = 0; o < l->out; o++) {
        for (int64_t k = 0; k < l->r; k++) {
            double sum = 0;
            for (int64_t s = rows->begin; s < rows->end; s++)
                sum += weight_of(rows, s) * rows->d_y[at(rows->y_index, s) * l->out + o] * rows->u[s * l->r + k];
            l->d_b[o * l->r + k] = l->d_b[o * l->r + k] + (real)(l->scale * sum);
        }
    }
    for (int64_t k = 0; k < l->r; k++) {
        for (int64_t i = 0; i < l->in; i++) {
            double sum = 0;
            for (int64_t s = rows->begin; s < rows->end; s++)
                sum += weight_of(rows, s) * rows->q[s * l->r + k] * rows->x[at(rows->x_index, s) * l->in + i];
            l->d_a[k * l->in + i] = l->d_a[k * l->in + i] + (real)sum;
        }
    }
}

esp_status ESPI_REF_NAME(espi_linear_fwd)(const espi_exec *exec, const espi_linear_fwd *a) {
    (void)exec;
    const int64_t in = a->w.cols, out = a->w.rows;
    const branch l = branch_of(&a->lora, 0, in, out);
    for (int64_t t = 0; t < a->tokens; t++) {
        const real *x = (const real *)a->x + t * in;
        real *y = (real *)a->y + t * out, *u = l.r ? (real *)a->u + t * l.r : NULL;
        branch_down(&l, u, x);
        for (int64_t o = 0; o < out; o++) {
            double sum = a->bias ? a->bias[o] : 0;
            for (int64_t i = 0; i < in; i++) sum += (double)espi_mat_value(&a->w, o, i) * x[i];
            y[o] = (real)(sum + branch_up(&l, u, o));
        }
    }
    return ESP_OK;
}

/* q of every token, then one row of d_x. */
size_t ESPI_REF_NAME(espi_linear_bwd_scratch)(const espi_exec *exec, const espi_linear_bwd *a) {
    (void)exec;
    return (size_t)(a->tokens * a->lora.r + a->w.cols) * sizeof(double);
}

esp_status ESPI_REF_NAME(espi_linear_bwd)(const espi_exec *exec, const espi_linear_bwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows;
    const branch l = branch_of(&a->lora, 0, in, out);
    double *q = exec->scratch, *sum = q + a->tokens * l.r;
    for (int64_t t = 0; t < a->tokens; t++) {
        const real *d_y = (const real *)a->d_y + t * out;
        branch_up_bwd(&l, q + t * l.r, d_y);
        if (!a->d_x) continue;
        real *d_x = (real *)a->d_x + t * in;
        for (int64_t i = 0; i < in; i++) sum[i] = a->accumulate ? d_x[i] : 0;
        for (int64_t o = 0; o < out; o++)
            for (int64_t i = 0; i < in; i++) sum[i] += (double)d_y[o] * espi_mat_value(&a->w, o, i);
        branch_down_bwd(&l, sum, q + t * l.r);
        for (int64_t i = 0; i < in; i++) d_x[i] = (real)sum[i];
    }
    branch_grads(&l, &(branch_rows){.x = a->x, .d_y = a->d_y, .u = a->u, .q = q, .end = a->tokens});
    return ESP_OK;
}
