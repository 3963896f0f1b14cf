/// 4-bit formats on plain arrays, as bitsandbytes has them: flat blocks of `block` values, even element in the high nibble.
#ifndef ESPALIER_QUANT_H
#define ESPALIER_QUANT_H

#include "espalier/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/// codes [out] ceil(n/2) bytes; absmax [out] ceil(n/block).  x [in] [n] in `dtype` (ESP_F32, ESP_BF16 or ESP_F16).
/// block: 32, 64, 128, .. 4096 (bitsandbytes' list).
/// ESP_ERR_NONFINITE: a NaN or infinity in x (names the element)
ESP_API esp_status esp_quantize(uint8_t *codes, float *absmax, const void *x, esp_dtype dtype, int64_t n, int64_t block,
                                esp_qformat format);
/// x [out] [n] f32: lut[code] * absmax, one rounding.
ESP_API esp_status esp_dequantize(float *x, const uint8_t *codes, const float *absmax, int64_t n, int64_t block, esp_qformat format);

/// Double quantisation of block scales: offset = mean, 8-bit dynamic-map codes of absmax - offset in blocks of 256.
/// absmax8 [out] [n]; nested [out] [ceil(n/256)]; offset [out] one value.
ESP_API esp_status esp_absmax_quantize(uint8_t *absmax8, float *nested, float *offset, const float *absmax, int64_t n);
/// map [in] [256], or NULL = the library's own; a file's own map is authoritative.
ESP_API esp_status esp_absmax_dequantize(float *absmax, const uint8_t *absmax8, const float *nested, float offset, const float *map,
                                         int64_t n);

/// The 16 values of a format; NULL for formats without a table.
ESP_API const float *esp_quant_table(esp_qformat format);
/// bitsandbytes' signed or unsigned dynamic map, 256 ascending values.
ESP_API const float *esp_dynamic_map(int is_signed);

#ifdef __cplusplus
}
#endif
#endif
