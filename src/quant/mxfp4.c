/* MXFP4, the format of OCP's microscaling standard (E2M1 values, E8M0 scales).  A row of a matrix is cut into blocks of 32. */
#include "quant/quant.h"

#include "core/status.h"
#include "kernels/plain.h"

const espi_format espi_format_mxfp4 = {
    .name = "mxfp4",
    .id = ESP_MXFP4,
    .values = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f},
};

/* A magnitude above a threshold takes the next value.  Where a tie itself goes up, the threshold is the number just below the tie. */
const espi_mx_rule espi_mx_rules[] = {
    [ESP_MXFP4_OCP] = {.thresholds = {0.25f, 0x1.7ffffep-1f, 1.25f, 0x1.bffffep0f, 2.5f, 0x1.bffffep1f, 5.0f}},
    [ESP_MXFP4_ROUND_UP] = {.round_up = true,
                            .thresholds = {0x1.fffffep-3f, 0x1.7ffffep-1f, 0x1.3ffffep0f, 0x1.bffffep0f, 0x1.3ffffep1f, 0x1.bffffep1f,
                                           0x1.3ffffep2f}},
};

static esp_status check_count(int64_t n) {
    if (n < 0 || n % ESPI_MX_BLOCK != 0)
        return ESPI_FAIL(ESP_ERR_ARG, "n: got %lld, expected a multiple of %d: blocks of MXFP4 lie within rows", (long long)n,
                         ESPI_MX_BLOCK);
    return ESP_OK;
}

esp_status esp_mxfp4_quantize(uint8_t *codes, uint8_t *scales, const void *x, esp_dtype dtype, int64_t n, esp_mxfp4_rule rule) {
    ESPI_TRY(check_count(n));
    if (n && (!codes || !scales || !x)) return ESPI_FAIL(ESP_ERR_ARG, "esp_mxfp4_quantize: codes, scales or x is NULL, expected all three");
    if (dtype != ESP_F32 && dtype != ESP_BF16 && dtype != ESP_F16)
        return ESPI_FAIL(ESP_ERR_DTYPE, "esp_mxfp4_quantize: got %s, expected F32, BF16 or F16", esp_dtype_name(dtype));
    if ((unsigned)rule > ESP_MXFP4_ROUND_UP)
        return ESPI_FAIL(ESP_ERR_ARG, "rule: got %d, expected ESP_MXFP4_OCP or ESP_MXFP4_ROUND_UP", (int)rule);
    const int64_t done = espi_encoder_next(NULL)->mx(codes, scales, x, dtype, n, &espi_mx_rules[rule]);
    return done == n ? ESP_OK : espi_encode_nonfinite(x, dtype, done, ESPI_MX_BLOCK);
}

esp_status esp_mxfp4_dequantize(float *x, const uint8_t *codes, const uint8_t *scales, int64_t n) {
    ESPI_TRY(check_count(n));
    if (n && (!x || !codes || !scales))
        return ESPI_FAIL(ESP_ERR_ARG, "esp_mxfp4_dequantize: x, codes or scales is NULL, expected all three");
    for (int64_t b = 0; b < n / ESPI_MX_BLOCK; b++) {
        if (scales[b] == 255) return ESPI_FAIL(ESP_ERR_FORMAT, "scale %lld: got 255, which means NaN, expected 0 to 254", (long long)b);
        const float scale = espi_e8m0_value(scales[b]);
        for (int64_t i = b * ESPI_MX_BLOCK; i < (b + 1) * ESPI_MX_BLOCK; i++)
            x[i] = espi_format_mxfp4.values[codes[i / 2] >> (i % 2 * 4) & 15] * scale;
    }
    return ESP_OK;
}
