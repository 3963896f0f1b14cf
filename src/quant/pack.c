/* Double quantisation: the block scales of a 4-bit matrix become 8-bit codes themselves. */
#include "quant/quant.h"

#include "core/status.h"
#include "kernels/plain.h"

#include <math.h>

enum { NESTED = 256 };

/* The nearest entry of an ascending map; on a midpoint the lower one.  bitsandbytes' CPU build looks values up in 2^16 equal cells of
 * [-1,1] instead, so its code may be a neighbour where a value lies within 1.6e-5 of a midpoint; its GPU build searches as this does. */
static uint8_t nearest(const float *map, float v) {
    int low = 0, high = 255;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (v >= map[middle])
            low = middle;
        else
            high = middle;
    }
    return (uint8_t)(v - map[low] <= map[high] - v ? low : high);
}

esp_status esp_absmax_quantize(uint8_t *absmax8, float *nested, float *offset, const float *absmax, int64_t n) {
    if (n < 0) return ESPI_FAIL(ESP_ERR_ARG, "n: got %lld, expected 0 or more", (long long)n);
    if (!offset || (n && (!absmax8 || !nested || !absmax))) return ESPI_FAIL(ESP_ERR_ARG, "esp_absmax_quantize: an argument is NULL");
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isfinite(absmax[i]))
            return ESPI_FAIL(ESP_ERR_NONFINITE, "absmax[%lld]: got %g, expected a finite number", (long long)i, (double)absmax[i]);
        sum += absmax[i];
    }
    *offset = n ? (float)(sum / (double)n) : 0.0f;
    const float *map = esp_dynamic_map(1);
    for (int64_t first = 0; first < n; first += NESTED) {
        const int64_t end = first + NESTED < n ? first + NESTED : n;
        float most = 0;
        for (int64_t i = first; i < end; i++) most = fmaxf(most, fabsf(absmax[i] - *offset));
        nested[first / NESTED] = most;
        for (int64_t i = first; i < end; i++) absmax8[i] = nearest(map, most > 0 ? (absmax[i] - *offset) / most : 0.0f);
    }
    return ESP_OK;
}

esp_status esp_absmax_dequantize(float *absmax, const uint8_t *absmax8, const float *nested, float offset, const float *map, int64_t n) {
    if (n < 0) return ESPI_FAIL(ESP_ERR_ARG, "n: got %lld, expected 0 or more", (long long)n);
    if (n && (!absmax || !absmax8 || !nested)) return ESPI_FAIL(ESP_ERR_ARG, "esp_absmax_dequantize: an argument is NULL");
    if (!map) map = esp_dynamic_map(1);
    for (int64_t i = 0; i < n; i++) absmax[i] = espi_absmax_restore(map[absmax8[i]], nested[i / NESTED], offset);
    return ESP_OK;
}
