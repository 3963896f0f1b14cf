/* Reading frozen weights (kernels/stack.h) against a decoder written the other way round: walk the bytes, not the elements. */
#include "kernels/stack.h"
#include "problem.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>

enum { EXPERTS = 3, ROWS = 10, COLS = 37, PARTS = 2, N = ROWS / PARTS * COLS, BYTES = (N + 1) / 2, BLOCKS = (N + 63) / 64 };

/* One part: high nibble first, a new scale every 32 bytes. */
static void check_part(const espi_stack *w, int part, const float *scales) {
    const uint8_t *bytes = (const uint8_t *)w->data + part * BYTES;
    for (int i = 0; i < N; i++) {
        const int code = i & 1 ? bytes[i >> 1] & 0x0f : (bytes[i >> 1] & 0xf0) / 16;
        const float want = w->lut[code] * scales[i / 64];
        const int row = part % PARTS * (ROWS / PARTS) + i / COLS;
        cr_assert_eq(espi_stack_value(w, part / PARTS, row, i % COLS), want, "part %d, element %d", part, i);
    }
}

Test(stack, four_bit) {
    static uint8_t codes[EXPERTS * PARTS * BYTES], absmax8[EXPERTS * PARTS * BLOCKS];
    float lut[16], map[256], absmax[EXPERTS * PARTS * BLOCKS], nested[EXPERTS * PARTS], offset[EXPERTS * PARTS];
    for (int i = 0; i < (int)sizeof codes; i++) codes[i] = (uint8_t)pick(1, "codes", i, 256);
    for (int i = 0; i < 16; i++) lut[i] = (float)value_of(1, "lut", i);
    for (int i = 0; i < 256; i++) map[i] = (float)value_of(1, "map", i);
    for (int i = 0; i < EXPERTS * PARTS * BLOCKS; i++) {
        absmax[i] = (float)value_of(1, "absmax", i);
        absmax8[i] = (uint8_t)pick(1, "absmax8", i, 256);
    }
    for (int i = 0; i < EXPERTS * PARTS; i++) {
        nested[i] = (float)value_of(1, "nested", i);
        offset[i] = (float)value_of(1, "offset", i);
    }
    espi_stack w = {.format = ESP_NF4,
                    .experts = EXPERTS,
                    .rows = ROWS,
                    .cols = COLS,
                    .parts = PARTS,
                    .data = codes,
                    .part_bytes = BYTES,
                    .absmax = absmax,
                    .part_blocks = BLOCKS,
                    .part_nested = 1,
                    .lut = lut};
    for (int part = 0; part < EXPERTS * PARTS; part++) check_part(&w, part, absmax + part * BLOCKS);
    w.absmax8 = absmax8;
    w.nested = nested;
    w.offset = offset;
    w.map = map;
    for (int part = 0; part < EXPERTS * PARTS; part++) {
        float scales[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) {
            const float product = map[absmax8[part * BLOCKS + b]] * nested[part];
            scales[b] = product + offset[part];
        }
        check_part(&w, part, scales);
    }
}

/* Low nibble first, a power of two every 16 bytes, parts beginning with a block of their own. */
Test(stack, mxfp4) {
    enum { MX_EXPERTS = 2, MX_PARTS = 3, MX_ROWS = 6, MX_COLS = 64, MX_BLOCKS = MX_ROWS / MX_PARTS * MX_COLS / 32 };
    static const float table[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};
    static const uint8_t scale_bytes[] = {127, 0, 1, 254, 126, 140, 100};
    uint8_t codes[MX_EXPERTS * MX_PARTS * MX_BLOCKS * 16], scales[MX_EXPERTS * MX_PARTS * MX_BLOCKS];
    for (int i = 0; i < (int)sizeof codes; i++) codes[i] = (uint8_t)pick(2, "codes", i, 256);
    for (int i = 0; i < (int)sizeof scales; i++) scales[i] = scale_bytes[i % 7];
    const espi_stack w = {.format = ESP_MXFP4,
                          .experts = MX_EXPERTS,
                          .rows = MX_ROWS,
                          .cols = MX_COLS,
                          .parts = MX_PARTS,
                          .data = codes,
                          .part_bytes = MX_BLOCKS * 16,
                          .scales = scales,
                          .part_blocks = MX_BLOCKS,
                          .lut = table};
    cr_assert_null(espi_stack_refusal(&w));
    for (int b = 0; b < (int)sizeof scales; b++) {
        for (int i = 0; i < 32; i++) {
            const int byte = codes[b * 16 + i / 2], code = i & 1 ? (byte & 0xf0) / 16 : byte & 0x0f, row = b * 32 / MX_COLS;
            const float want = (float)ldexp(table[code], scales[b] - 127); /* 4 and 6 times 2^127 are infinite */
            const float got = espi_stack_value(&w, row / MX_ROWS, row % MX_ROWS, b % 2 * 32 + i);
            cr_assert(got == want && !signbit(got) == !signbit(want), "block %d, element %d: %a, expected %a", b, i, got, want);
        }
    }
}

/* Every half-precision number against its definition: (-1)^s 2^(e-15) (1 + m/1024), 2^-14 m/1024 when e = 0. */
Test(stack, every_f16) {
    for (int bits = 0; bits < 0x10000; bits++) {
        const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
        const double sign = bits & 0x8000 ? -1 : 1;
        const float got = espi_f16_value((uint16_t)bits);
        if (exponent == 31 && mantissa) {
            cr_assert(isnan(got), "0x%04x", bits);
            continue;
        }
        double want = exponent ? ldexp(1 + mantissa / 1024.0, exponent - 15) : ldexp(mantissa / 1024.0, -14);
        if (exponent == 31) want = INFINITY;
        cr_assert_eq(got, (float)(sign * want), "0x%04x", bits);
    }
}

Test(stack, some_bf16) {
    cr_expect_eq(espi_bf16_value(0x3f80), 1.0f);
    cr_expect_eq(espi_bf16_value(0xc049), -3.140625f);
    cr_expect_eq(espi_bf16_value(0x0001), 0x1p-133f);
    cr_expect(isinf(espi_bf16_value(0x7f80)));
}
