/* Rotary position embedding, half-split: the table, the rotation, and its transpose. */
#include "kernels/ref/ref.h"

esp_status ESPI_REF_NAME(espi_rope_table)(const espi_exec *exec, const espi_rope_table *a) {
    (void)exec;
    for (int64_t t = 0; t < a->tokens; t++) {
        for (int64_t j = 0; j < a->half; j++) {
            const double angle = a->positions[t] * a->inv_freq[j];
            ((real *)a->cos)[t * a->half + j] = (real)(a->factor * cos(angle));
            ((real *)a->sin)[t * a->half + j] = (real)(a->factor * sin(angle));
        }
    }
    return ESP_OK;
}

/* direction 1: rotate; -1: the transpose, which is the same with the other sign of sin. */
static void rotate(const espi_rope *a, double direction) {
    for (int64_t t = 0; t < a->tokens; t++) {
        const real *c = (const real *)a->cos + t * a->half, *s = (const real *)a->sin + t * a->half;
        for (int64_t head = 0; head < a->heads; head++) {
            real *low = (real *)a->x + (t * a->heads + head) * a->head_dim, *high = low + a->half;
            for (int64_t j = 0; j < a->half; j++) {
                const double l = low[j], h = high[j], sine = direction * s[j];
                low[j] = (real)(l * c[j] - h * sine);
                high[j] = (real)(h * c[j] + l * sine);
            }
        }
    }
}

esp_status ESPI_REF_NAME(espi_rope_fwd)(const espi_exec *exec, const espi_rope *a) {
    (void)exec;
    rotate(a, 1);
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_rope_bwd)(const espi_exec *exec, const espi_rope *a) {
    (void)exec;
    rotate(a, -1);
    return ESP_OK;
}
