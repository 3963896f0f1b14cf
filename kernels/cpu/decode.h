/* Decoding of packed experts (packed.h) by AVX-512: what the files of several instruction sets share. */
#ifndef ESPI_KERNELS_CPU_DECODE_H
#define ESPI_KERNELS_CPU_DECODE_H

#include "kernels/cpu/bf16.h"
#include "kernels/cpu/packed.h"

#include <immintrin.h>

#define INLINE static inline __attribute__((always_inline))

/* MXFP4: those of 16 rows, for k of either half. */
INLINE __m512i exponents_of(const uint8_t *record, int tile, int half) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(record + RECORD_CODES + half * RECORD_ROWS + tile * 16)));
}

/* The scales of 16 rows; half: which of MXFP4's. */
INLINE __m512 scales_of(const uint8_t *record, int tile, int half, const bool mx) {
    if (!mx) return _mm512_loadu_ps((const float *)(record + RECORD_CODES) + tile * 16);
    const __m512i exponent = _mm512_slli_epi32(exponents_of(record, tile, half), 23);
    return _mm512_castsi512_ps(_mm512_max_epi32(exponent, _mm512_set1_epi32(0x00400000))); /* 0 is the subnormal 2^-127 */
}

/* To the second cache, and to the first. */
INLINE void prefetch_record(const uint8_t *record, int64_t bytes) {
#pragma GCC unroll 18
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)record + i, _MM_HINT_T1);
}
INLINE void prefetch_lines(const uint8_t *lines, int64_t bytes) {
#pragma GCC unroll 24
    for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch((const char *)lines + i, _MM_HINT_T0);
}

/* Unit 2 i of 16 k, each twice, in 128 bytes: where the 16-bit numbers lie.  Behind them what marks the second half of a table. */
#define TWICE(i, k) (k) + 2 * (i), (k) + 2 * (i), (k) + 2 * (i) + 1, (k) + 2 * (i) + 1
#define PLACES(i)                                                                                                                          \
    { TWICE(i, 0), TWICE(i, 8), TWICE(i, 16), TWICE(i, 24), TWICE(i, 32), TWICE(i, 40), TWICE(i, 48), TWICE(i, 56) }
#define ODD 0, 16, 0, 16, 0, 16, 0, 16
static const _Alignas(64) uint16_t unit_places[5][32] = {PLACES(0), PLACES(1), PLACES(2), PLACES(3), {ODD, ODD, ODD, ODD}};

/* Constants of decoding along k.  The compiler is not to know where the places lie: it would keep them in registers, which are for sums. */
typedef struct gather {
    const uint16_t (*places)[32];
    __m512i shift[2], low;
} gather;

INLINE gather gather_make(void) {
    const uint16_t(*places)[32] = unit_places;
    __asm__("" : "+r"(places));
    return (gather){.places = places, .shift = {_mm512_set1_epi32(4 << 16), _mm512_set1_epi32(12 << 16 | 8)}, .low = _mm512_set1_epi16(15)};
}

/* 32 entries: the values of row i + 8 h of 16 rows, scaled, then those of row i + 8 h + 4. */
INLINE __m512i pair_values(__m512 lut, const float *scale, int i, int h) {
    const __m512 first = _mm512_mul_ps(lut, _mm512_set1_ps(scale[i + 8 * h]));
    const __m512 second = _mm512_mul_ps(lut, _mm512_set1_ps(scale[i + 8 * h + 4]));
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

INLINE __m512i gather_units(const gather *g, const uint8_t *codes, int i) {
    return _mm512_permutex2var_epi16(_mm512_loadu_si512(codes), _mm512_load_si512(g->places[i]), _mm512_loadu_si512(codes + 64));
}

INLINE __m512bh decode_gathered(const gather *g, __m512i units, __m512i values, int h) {
    const __m512i code = _mm512_srlv_epi16(units, g->shift[h]), odd = _mm512_load_si512(g->places[4]);
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(code, g->low, odd, 0xea), values); /* code & low | odd */
}

/* Scales of 16 rows as floats in memory, for k of either half of a record. */
INLINE const float *row_scales(float *buffer, const uint8_t *record, int tile, int half, const bool mx) {
    if (!mx) return (const float *)(record + RECORD_CODES) + tile * 16;
    _mm512_store_ps(buffer, scales_of(record, tile, half, true));
    return buffer;
}

/* The order in which 16 rows pair up. */
INLINE __m512i pairing(void) {
    return _mm512_set_epi16(31, 27, 23, 19, 30, 26, 22, 18, 29, 25, 21, 17, 28, 24, 20, 16, 15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8,
                            4, 0);
}

#endif
