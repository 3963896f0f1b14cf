/// 4-bit formats on plain arrays, as bitsandbytes has them (flat blocks of `block` values, even element in the high nibble) and as
/// OCP does (MXFP4).
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

/// MXFP4 as OCP has it: blocks of 32 values along the rows of a matrix share a power of two; even element in the low nibble.
/// codes [out] n/2 bytes; scales [out] n/32 bytes b, meaning 2^(b-127).  x [in] [n] in `dtype` (ESP_F32, ESP_BF16 or ESP_F16).
/// n: a multiple of 32.  A block of zeros has scale 0 and codes 0.  Values that the scale cannot reach become +-6.
/// ESP_ERR_NONFINITE: a NaN or infinity in x (names the element)
ESP_API esp_status esp_mxfp4_quantize(uint8_t *codes, uint8_t *scales, const void *x, esp_dtype dtype, int64_t n, esp_mxfp4_rule rule);
/// x [out] [n] f32, exact (infinite where value * 2^(b-127) is beyond f32).  ESP_ERR_FORMAT: a scale of 255, which means NaN
ESP_API esp_status esp_mxfp4_dequantize(float *x, const uint8_t *codes, const uint8_t *scales, int64_t n);

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
