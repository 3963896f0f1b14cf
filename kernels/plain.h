/* F32, BF16, F16 and E8M0 as numbers: the f32 that kernels, quantisers and the loader agree on. */
#ifndef ESPI_KERNELS_PLAIN_H
#define ESPI_KERNELS_PLAIN_H

#include "espalier/tensor.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float espi_f32_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float espi_bf16_value(uint16_t bits) {
    return espi_f32_of_bits((uint32_t)bits << 16);
}

static inline float espi_f16_value(uint16_t bits) {
    const uint32_t sign = (uint32_t)(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
    if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24 is exact in f32 */
        const float magnitude = (float)mantissa * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    const uint32_t wide = exponent == 31 ? 255u : exponent + 112u;
    return espi_f32_of_bits(sign | wide << 23 | mantissa << 13);
}

/* 2^(byte - 127); byte 0 is the one subnormal. */
static inline float espi_e8m0_value(uint8_t byte) {
    return espi_f32_of_bits(byte ? (uint32_t)byte << 23 : 0x00400000u);
}

/* Rounded to nearest, ties to even; too large a value becomes infinite. */
static inline uint16_t espi_bf16_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)(bits >> 16 | 0x40u);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static inline uint16_t espi_f16_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    bits &= 0x7fffffffu;
    if (bits > 0x7f800000u) return sign | 0x7e00u;
    if (bits < 0x38800000u) return sign | (uint16_t)lrintf(fabsf(value) * 0x1p24f); /* subnormal: a multiple of 2^-24 */
    if (bits >= 0x47800000u) return sign | 0x7c00u;
    return sign | (uint16_t)((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

/* The other way; another dtype than F32, BF16 and F16 is left as it is. */
static inline void espi_plain_store(void *data, esp_dtype dtype, int64_t i, float value) {
    if (dtype == ESP_F32)
        ((float *)data)[i] = value;
    else if (dtype == ESP_BF16)
        ((uint16_t *)data)[i] = espi_bf16_bits(value);
    else if (dtype == ESP_F16)
        ((uint16_t *)data)[i] = espi_f16_bits(value);
}

/* Element i of an array of `dtype`; NaN for another dtype. */
static inline float espi_plain_value(const void *data, esp_dtype dtype, int64_t i) {
    switch (dtype) {
    case ESP_F32:
        return ((const float *)data)[i];
    case ESP_BF16:
        return espi_bf16_value(((const uint16_t *)data)[i]);
    case ESP_F16:
        return espi_f16_value(((const uint16_t *)data)[i]);
    default:
        return NAN;
    }
}

/* The scale of a block under double quantisation: f32(mapped * nested) + offset, rounded twice whatever the flags of the caller's file. */
float espi_absmax_restore(float mapped, float nested, float offset);

#endif
