/* Quantising and dequantising flat arrays in blocks, for every format of formats.def. */
#include "quant/quant.h"

#include "core/status.h"
#include "kernels/plain.h"

#include <math.h>
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

static esp_status check(const espi_format **f, int64_t n, int64_t block, esp_qformat format) {
    *f = espi_format_find(format);
    if (!*f || !(*f)->flat) return ESPI_FAIL(ESP_ERR_ARG, "format: got %d, expected ESP_NF4 or ESP_FP4", (int)format);
    if (n < 0) return ESPI_FAIL(ESP_ERR_ARG, "n: got %lld, expected 0 or more", (long long)n);
    if (block < 32 || block > ESPI_BLOCK_MAX || (block & (block - 1)))
        return ESPI_FAIL(ESP_ERR_ARG, "block: got %lld, expected 32, 64, 128, .. or 4096", (long long)block);
    return ESP_OK;
}

esp_status espi_encode_nonfinite(const void *x, esp_dtype dtype, int64_t first, int64_t n) {
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
    const int64_t done = espi_encoder_next(NULL)->flat(codes, absmax, x, dtype, n, block, f);
    return done == n ? ESP_OK : espi_encode_nonfinite(x, dtype, done, n - done < block ? n - done : block);
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
