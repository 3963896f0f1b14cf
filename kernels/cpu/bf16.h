/* Products whose operands are rounded to bf16 and whose sums are f32, for instruction sets that multiply bf16 pairs (compiled for them alone).
 *
 * Two neighbours along the sum make a pair, a 32-bit word with the first in its low half.  The left operand is read pair by pair from where
 * it lies; the right one is a panel, a word for each pair and column.
 *
 * Bits: each output is one chain over the pairs in order, whatever tile it lies in and wherever the sum is cut: a cut sum goes on from what
 * was stored.  Pairs of zeros change nothing. */
#ifndef ESPI_KERNELS_CPU_BF16_H
#define ESPI_KERNELS_CPU_BF16_H

#include "kernels/cpu/cpu.h"

#include <immintrin.h>

/* Pair p of row i is pairs[i * row + p * step]. */
typedef struct bf16_left {
    const uint32_t *pairs;
    int64_t row, step;
} bf16_left;

/* Row-major values, an even number of them from row to row, what is behind a row's last up to the next even place being 0. */
typedef struct bf16_rows {
    uint16_t *base;
    int64_t stride;
} bf16_rows;
static inline bf16_left bf16_left_of(const bf16_rows *rows, int64_t first, int64_t col) {
    return (bf16_left){(const uint32_t *)(const void *)(rows->base + first * rows->stride + col), rows->stride / 2, 1};
}
/* Values from row to row: whole vectors of pairs, so that rows can be read by those; and never so that many rows meet in few sets of a cache. */
static inline int64_t bf16_stride(int64_t n) {
    const int64_t whole = (n + 31) / 32 * 32;
    return whole % 512 == 0 ? whole + 32 : whole;
}

/* 32 floats, rounded to nearest, ties to even. */
static inline __attribute__((always_inline)) __m512i bf16_round_32(const float *from) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
}

/* Of four rows of 16 words each fours of columns are turned: row i of a lane becomes its column i. */
static inline __attribute__((always_inline)) void bf16_turn_fours(__m512i x[4]) {
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi64(a, c);
    x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d);
    x[3] = _mm512_unpackhi_epi64(b, d);
}

/* Words (x, y) of two vectors of 16 values each, x the lower half of `both`. */
static inline __m512i bf16_interleave(__m512i both) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                           18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, both);
}

#define bf16_tiles ESPI_CPU(espi_bf16_tiles)
#define bf16_product ESPI_CPU(espi_bf16_product)
#define bf16_round_rows ESPI_CPU(espi_bf16_round_rows)
#define bf16_pair_rows ESPI_CPU(espi_bf16_pair_rows)
#define bf16_transpose ESPI_CPU(espi_bf16_transpose)

/* c[0..m)[0..n) = (add ? c : 0) + left[0..m)[0..pairs) * panel[0..pairs)[0..n); panel: `stride` words from pair to pair, a multiple of 16,
 * of which whole vectors are read. */
void bf16_tiles(const cpu_rows *c, const bf16_left *left, const uint32_t *panel, int64_t stride, int64_t m, int64_t pairs, int64_t n,
                bool add);

/* As cpu_product, with `a` rounded and the weight rounded on the way into its panel. */
void bf16_product(const cpu_rows *c, const bf16_rows *a, const cpu_weight *b, int64_t m, int64_t depth, int64_t col, int64_t n, bool add);

/* m rows of n values; the rest of a row's bf16_stride(n) becomes 0. */
void bf16_round_rows(const bf16_rows *to, const cpu_rows *from, int64_t m, int64_t n);

/* panel[j] = (x[j], y[j]) for n columns, 0 behind them up to a whole vector.  y = NULL: 0. */
void bf16_pair_rows(uint32_t *panel, const float *x, const float *y, int64_t n);

/* panel[p][0..16) = pair p of `rows` <= 16 rows of n floats, 0 for those that lack, up to pair (n + 1) / 2. */
void bf16_transpose(uint32_t *panel, int64_t stride, const float *const *row, int64_t rows, int64_t n);

/* The dense layer by these products: linear_bf16.c. */
#define cpu_linear_bf16_fwd ESPI_CPU(espi_cpu_linear_bf16_fwd)
#define cpu_linear_bf16_bwd ESPI_CPU(espi_cpu_linear_bf16_bwd)
#define cpu_linear_bf16_fwd_scratch ESPI_CPU(espi_cpu_linear_bf16_fwd_scratch)
#define cpu_linear_bf16_bwd_scratch ESPI_CPU(espi_cpu_linear_bf16_bwd_scratch)
void cpu_linear_bf16_fwd(const espi_exec *exec, const espi_linear_fwd *a, int threads);
void cpu_linear_bf16_bwd(const espi_exec *exec, const espi_linear_bwd *a, int threads);
size_t cpu_linear_bf16_fwd_scratch(const espi_linear_fwd *a);
size_t cpu_linear_bf16_bwd_scratch(const espi_linear_bwd *a);

#endif
