/* Quantising and dequantising flat arrays in blocks, for every format of formats.def. */
#include "quant/quant.h"

#include "core/status.h"
#include "kernels/plain.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

static const espi_format *const formats[] = {
#define ESPI_FORMAT(id, name) &espi_format_##name,
#include "quant/formats.def"
#undef ESPI_FORMAT
};

const espi_format *espi_format_find(esp_qformat format) {
    for (int i = 0; i < ESPI_COUNT(formats); i++)
        if (formats[i]->id == format) return formats[i];
    return NULL;
}

const espi_format *espi_format_named(const char *name) {
    for (int i = 0; i < ESPI_COUNT(formats); i++)
        if (strcmp(formats[i]->name, name) == 0) return formats[i];
    return NULL;
}

const float *esp_quant_table(esp_qformat format) {
    const espi_format *f = espi_format_find(format);
    return f ? f->values : NULL;
}

enum { MAX_BLOCK = 4096, RANK_OF_ZERO = 7 };

static esp_status check(const espi_format **f, int64_t n, int64_t block, esp_qformat format) {
    *f = espi_format_find(format);
    if (!*f) return ESPI_FAIL(ESP_ERR_ARG, "format: got %d, expected ESP_NF4 or ESP_FP4", (int)format);
    if (n < 0) return ESPI_FAIL(ESP_ERR_ARG, "n: got %lld, expected 0 or more", (long long)n);
    if (block < 32 || block > MAX_BLOCK || (block & (block - 1)))
        return ESPI_FAIL(ESP_ERR_ARG, "block: got %lld, expected 32, 64, 128, .. or 4096", (long long)block);
    return ESP_OK;
}

/* x: up to MAX_BLOCK values as f32.  False when one of them is not finite. */
static bool widen(float *x, const void *from, esp_dtype dtype, int64_t first, int64_t n) {
    float poison = 0; /* stays 0 unless something is NaN or infinite: no branch per element */
    if (dtype == ESP_F32) {
        memcpy(x, (const float *)from + first, (size_t)n * sizeof *x);
    } else if (dtype == ESP_BF16) {
        const uint16_t *bits = (const uint16_t *)from + first;
        for (int64_t i = 0; i < n; i++) x[i] = espi_bf16_value(bits[i]);
    } else {
        const uint16_t *bits = (const uint16_t *)from + first;
        for (int64_t i = 0; i < n; i++) x[i] = espi_f16_value(bits[i]);
    }
    for (int64_t i = 0; i < n; i++) poison += x[i] * 0.0f;
    return poison == 0.0f;
}

/* rank[i] = how many thresholds lie strictly below x[i] / absmax. */
static void rank_block(uint8_t *rank, const float *x, int64_t n, float absmax, const espi_format *f) {
    float v[MAX_BLOCK];
    /* bitsandbytes on the CPU keeps the divisor away from 0, so an all-zero block has the code of 0;
     * it multiplies by the reciprocal, which decides values that lie on a threshold. */
    const float inverse = 1.0f / fmaxf(absmax, 1e-38f);
    for (int64_t i = 0; i < n; i++) v[i] = x[i] * inverse;
    memset(rank, 0, (size_t)n);
    for (int k = 0; k + 1 < f->ranks; k++)
        for (int64_t i = 0; i < n; i++) rank[i] = (uint8_t)(rank[i] + (v[i] > f->thresholds[k]));
}

static esp_status nonfinite(const void *x, esp_dtype dtype, int64_t first, int64_t n) {
    for (int64_t i = first; i < first + n; i++) {
        const float value = espi_plain_value(x, dtype, i);
        if (!isfinite(value))
            return ESPI_FAIL(ESP_ERR_NONFINITE, "element %lld: got %g, expected a finite number", (long long)i, (double)value);
    }
    return ESPI_FAIL(ESP_ERR_INTERNAL, "a block was found not finite, but all its elements are");
}

esp_status esp_quantize(uint8_t *codes, float *absmax, const void *x, esp_dtype dtype, int64_t n, int64_t block, esp_qformat format) {
    const espi_format *f;
    ESPI_TRY(check(&f, n, block, format));
    if (n && (!codes || !absmax || !x)) return ESPI_FAIL(ESP_ERR_ARG, "esp_quantize: codes, absmax or x is NULL, expected all three");
    if (dtype != ESP_F32 && dtype != ESP_BF16 && dtype != ESP_F16)
        return ESPI_FAIL(ESP_ERR_DTYPE, "esp_quantize: got %s, expected F32, BF16 or F16", esp_dtype_name(dtype));
    float values[MAX_BLOCK];
    uint8_t rank[MAX_BLOCK + 1];
    for (int64_t first = 0; first < n; first += block) {
        const int64_t count = n - first < block ? n - first : block;
        if (!widen(values, x, dtype, first, count)) return nonfinite(x, dtype, first, count);
        float most = 0;
        for (int64_t i = 0; i < count; i++) most = fmaxf(most, fabsf(values[i]));
        absmax[first / block] = most;
        rank_block(rank, values, count, most, f);
        if (count % 2) rank[count] = RANK_OF_ZERO; /* bitsandbytes pads an odd count with a zero */
        for (int64_t i = 0; i < count; i += 2)
            codes[(first + i) / 2] = (uint8_t)(f->code_of_rank[rank[i]] << 4 | f->code_of_rank[rank[i + 1]]);
    }
    return ESP_OK;
}

esp_status esp_dequantize(float *x, const uint8_t *codes, const float *absmax, int64_t n, int64_t block, esp_qformat format) {
    const espi_format *f;
    ESPI_TRY(check(&f, n, block, format));
    if (n && (!codes || !absmax || !x)) return ESPI_FAIL(ESP_ERR_ARG, "esp_dequantize: x, codes or absmax is NULL, expected all three");
    for (int64_t i = 0; i < n; i++) {
        const unsigned code = i % 2 == 0 ? codes[i / 2] >> 4 : codes[i / 2] & 15u;
        x[i] = f->values[code] * absmax[i / block];
    }
    return ESP_OK;
}
