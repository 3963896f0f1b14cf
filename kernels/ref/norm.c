/* RMSNorm over rows; also QK-norm, whose rows are heads. */
#include "kernels/ref/ref.h"

esp_status ESPI_REF_NAME(espi_rmsnorm_fwd)(const espi_exec *exec, const espi_rmsnorm_fwd *a) {
    (void)exec;
    for (int64_t row = 0; row < a->rows; row++) {
        const real *x = (const real *)a->x + row * a->n;
        real *y = (real *)a->y + row * a->n;
        double squares = 0;
        for (int64_t i = 0; i < a->n; i++) squares += (double)x[i] * x[i];
        const real rstd = (real)(1 / sqrt(squares / (double)a->n + a->eps));
        for (int64_t i = 0; i < a->n; i++) y[i] = (real)(a->w[i] * ((double)x[i] * rstd));
        ((real *)a->rstd)[row] = rstd;
    }
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_rmsnorm_bwd)(const espi_exec *exec, const espi_rmsnorm_bwd *a) {
    (void)exec;
    const real *rstd = a->rstd;
    /* First the weight's gradient: d_x may lie over d_y. */
    real *d_w = a->d_w;
    for (int64_t i = 0; d_w && i < a->n; i++) {
        double sum = 0;
        for (int64_t row = 0; row < a->rows; row++) {
            const int64_t at = row * a->n + i;
            sum += (double)((const real *)a->d_y)[at] * ((const real *)a->x)[at] * rstd[row];
        }
        d_w[i] = (real)(d_w[i] + sum);
    }
    for (int64_t row = 0; row < a->rows; row++) {
        const real *x = (const real *)a->x + row * a->n, *d_y = (const real *)a->d_y + row * a->n;
        const real *d_add = a->d_add ? (const real *)a->d_add + row * a->n : NULL;
        real *d_x = (real *)a->d_x + row * a->n;
        const double r = rstd[row];
        double mean = 0;
        for (int64_t i = 0; i < a->n; i++) mean += (double)d_y[i] * a->w[i] * (x[i] * r);
        mean /= (double)a->n;
        for (int64_t i = 0; i < a->n; i++) {
            const double d = r * ((double)d_y[i] * a->w[i] - x[i] * r * mean);
            d_x[i] = (real)(d_add ? d + d_add[i] : d);
        }
    }
    return ESP_OK;
}
