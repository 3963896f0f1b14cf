/* The left operand of a large product, and the product: rows as they are, or rounded to bf16 where the instruction set multiplies those. */
#ifndef ESPI_KERNELS_CPU_OPERAND_H
#define ESPI_KERNELS_CPU_OPERAND_H

#include "kernels/cpu/cpu.h"

#if defined(__AVX512BF16__)
#include "kernels/cpu/bf16.h"

typedef bf16_rows operand;

/* Bytes that m rows of n values need beside them, a multiple of 64. */
static inline size_t operand_bytes(int64_t m, int64_t n) {
    return (size_t)(m * bf16_stride(n)) * sizeof(uint16_t);
}
static inline operand make_operand(void *room, const cpu_rows *from, int64_t m, int64_t n) {
    const operand a = {room, bf16_stride(n)};
    bf16_round_rows(&a, from, m, n);
    return a;
}
/* From row `first` and value `col` on; col is even. */
static inline operand operand_at(const operand *a, int64_t first, int64_t col) {
    return (operand){a->base + first * a->stride + col, a->stride};
}
/* As cpu_product(). */
static inline void multiply(const cpu_rows *c, const operand *a, const cpu_weight *b, int64_t m, int64_t depth, int64_t col, int64_t n,
                            bool add) {
    bf16_product(c, a, b, m, depth, col, n, add);
}
#else
typedef cpu_rows operand;

static inline size_t operand_bytes(int64_t m, int64_t n) {
    (void)m, (void)n;
    return 0;
}
static inline operand make_operand(void *room, const cpu_rows *from, int64_t m, int64_t n) {
    (void)room, (void)m, (void)n;
    return *from;
}
static inline operand operand_at(const operand *a, int64_t first, int64_t col) {
    if (a->index) return (operand){a->base + col, a->stride, a->index + first};
    return (operand){a->base + first * a->stride + col, a->stride, NULL};
}
static inline void multiply(const cpu_rows *c, const operand *a, const cpu_weight *b, int64_t m, int64_t depth, int64_t col, int64_t n,
                            bool add) {
    cpu_product(c, a, b, m, depth, col, n, add);
}
#endif

#endif
