/* Zeroing, sums of two arrays and of rows, clamping, and the sum of squares that gradient clipping needs. */
#include "kernels/ref/ref.h"

#include <string.h>

enum { SUMSQ_CHUNK = 4096 };

esp_status ESPI_REF_NAME(espi_zero)(const espi_exec *exec, const espi_zero *a) {
    (void)exec;
    if (a->bytes > 0) memset(a->out, 0, a->bytes);
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_add)(const espi_exec *exec, const espi_add *a) {
    (void)exec;
    real *out = a->out;
    const real *left = a->a, *right = a->b;
    for (int64_t i = 0; i < a->n; i++) out[i] = left[i] + right[i];
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_rows_add)(const espi_exec *exec, const espi_rows_add *a) {
    (void)exec;
    for (int64_t h = 0; h < a->hidden; h++) {
        for (int64_t i = 0, next; i < a->n; i = next) { /* rows i .. next - 1 go to the same one */
            real *out = (real *)a->out + a->to[i] * a->hidden + h;
            double sum = *out;
            for (next = i; next < a->n && a->to[next] == a->to[i]; next++) sum += ((const real *)a->x)[next * a->hidden + h];
            *out = (real)sum;
        }
    }
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_rows_take)(const espi_exec *exec, const espi_rows_take *a) {
    (void)exec;
    for (int64_t i = 0; i < a->n; i++)
        for (int64_t h = 0; h < a->hidden; h++) ((real *)a->out)[i * a->hidden + h] = ((const real *)a->x)[a->from[i] * a->hidden + h];
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_parts_add)(const espi_exec *exec, const espi_parts_add *a) {
    (void)exec;
    real *total = a->total;
    for (int64_t p = 0; p < a->n_parts; p++)
        for (int64_t i = 0; i < a->n; i++) total[i] += ((const real *)a->parts)[p * a->n + i];
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_clamp_fwd)(const espi_exec *exec, const espi_clamp_fwd *a) {
    (void)exec;
    const real *x = a->x, limit = (real)a->limit;
    for (int64_t i = 0; i < a->n; i++) ((real *)a->y)[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_clamp_bwd)(const espi_exec *exec, const espi_clamp_bwd *a) {
    (void)exec;
    const real *x = a->x, *d_y = a->d_y, limit = (real)a->limit;
    for (int64_t i = 0; i < a->n; i++) ((real *)a->d_x)[i] = x[i] >= -limit && x[i] <= limit ? d_y[i] : 0;
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_sumsq)(const espi_exec *exec, const espi_sumsq *a) {
    (void)exec;
    const int64_t n = a->parts ? a->n / a->parts : 0;
    for (int64_t p = 0; p < a->parts; p++) {
        const real *x = (const real *)a->x + p * n;
        for (int64_t first = 0; first < n; first += SUMSQ_CHUNK) {
            const int64_t end = n - first < SUMSQ_CHUNK ? n : first + SUMSQ_CHUNK;
            double sum = 0;
            for (int64_t i = first; i < end; i++) sum += (double)x[i] * x[i];
            a->out[p] += sum;
        }
    }
    return ESP_OK;
}
