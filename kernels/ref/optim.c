/* AdamW as torch.optim has it, and with 8-bit blockwise moments as bitsandbytes has it. */
#include "kernels/ref/ref.h"

enum { ADAM8_BLOCK = 256, MAP_SIZE = 256, CODE_ZERO_SIGNED = 127, CODE_ZERO_UNSIGNED = 0 };

esp_status ESPI_REF_NAME(espi_adamw)(const espi_exec *exec, const espi_adamw *a) {
    (void)exec;
    real *p = a->p, *m = a->m, *v = a->v;
    const double correction1 = 1 - pow(a->beta1, (double)a->step), correction2 = sqrt(1 - pow(a->beta2, (double)a->step));
    for (int64_t i = 0; i < a->n; i++) {
        const double g = a->grad_scale * ((const real *)a->g)[i];
        m[i] = (real)(m[i] + (1 - a->beta1) * (g - m[i]));
        v[i] = (real)(a->beta2 * v[i] + (1 - a->beta2) * g * g);
        p[i] = (real)(p[i] * (1 - a->lr * a->weight_decay) - a->lr / correction1 * m[i] / (sqrt(v[i]) / correction2 + a->eps));
    }
    return ESP_OK;
}

/* The nearest of 256 ascending values; on a midpoint the lower. */
static uint8_t nearest(const float *map, float x) {
    int low = 0, high = MAP_SIZE - 1; /* map[low] <= x < map[high] once x is inside the map */
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (map[middle] <= x)
            low = middle;
        else
            high = middle;
    }
    return (uint8_t)(x > (map[low] + map[high]) / 2 ? high : low);
}

/* New scale and codes of one block of moments.  A block of zeros has scale 0: nothing may be divided by it. */
static float requantise(uint8_t *codes, const float *x, int64_t n, const float *map, uint8_t zero_code) {
    float absmax = 0;
    for (int64_t i = 0; i < n; i++) absmax = fabsf(x[i]) > absmax ? fabsf(x[i]) : absmax;
    for (int64_t i = 0; i < n; i++) codes[i] = absmax > 0 ? nearest(map, x[i] / absmax) : zero_code;
    return absmax;
}

/* As bitsandbytes' CPU build: decay before the update, no sign correction of the first moment; but codes by nearest value where that build
 * looks them up in 2^16 cells, so a code may differ from its by one next to a midpoint.  The parameter sees the moments before they are
 * quantised.  An element whose gradient is not finite loses its moments and keeps its value. */
esp_status ESPI_REF_NAME(espi_adamw8)(const espi_exec *exec, const espi_adamw8 *a) {
    (void)exec;
    const double correction1 = 1 - pow(a->beta1, (double)a->step), correction2 = sqrt(1 - pow(a->beta2, (double)a->step));
    const double step_size = a->lr * correction2 / correction1, eps = a->eps * correction2;
    for (int64_t first = 0; first < a->n; first += ADAM8_BLOCK) {
        const int64_t block = first / ADAM8_BLOCK, n = a->n - first < ADAM8_BLOCK ? a->n - first : ADAM8_BLOCK;
        real *p = (real *)a->p + first;
        uint8_t *code1 = a->state1 + first, *code2 = a->state2 + first;
        float m[ADAM8_BLOCK], v[ADAM8_BLOCK];
        for (int64_t i = 0; i < n; i++) {
            const double g = a->grad_scale * ((const real *)a->g)[first + i];
            m[i] = v[i] = 0;
            if (!isfinite(g)) continue;
            const double old_m = (double)a->map1[code1[i]] * a->absmax1[block], old_v = (double)a->map2[code2[i]] * a->absmax2[block];
            m[i] = (float)(a->beta1 * old_m + (1 - a->beta1) * g);
            v[i] = (float)(a->beta2 * old_v + (1 - a->beta2) * g * g);
            p[i] = (real)(p[i] * (1 - a->lr * a->weight_decay) - step_size * m[i] / (sqrt((double)v[i]) + eps));
        }
        a->absmax1[block] = requantise(code1, m, n, a->map1, CODE_ZERO_SIGNED);
        a->absmax2[block] = requantise(code2, v, n, a->map2, CODE_ZERO_UNSIGNED);
    }
    return ESP_OK;
}
