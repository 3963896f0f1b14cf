/* Products of bf16 with packed experts, by dot products of pairs: see packed.h for the layout and for the order of the sums.
 *
 * Forward: strips of up to 12 rows meet 32 columns, or up to 4 rows 64, codes being decoded in registers for each strip.  Backward: up to 4
 * rows likewise; more rows meet a panel that was decoded once. */
#include "kernels/cpu/decode.h"

enum {
    STRIP_ROWS = 12,   /* forward; 24 of 32 registers are sums */
    FEW_ROWS = 4,      /* both directions: rows that meet 64 columns without a panel */
    TILES = 4,         /* of 16 columns that a strip of few rows meets */
    FORWARD_ROWS = 96, /* rows that are converted together: their bf16 stays in the second cache */
    BACK_ROWS = 6,     /* rows of a strip against a panel */
    BACKWARD_ROWS = 384,
    BACK_DEPTH = 512, /* n of a panel */
};

/* ---- what a row becomes ---- */

/* 64 floats to bf16, in order: rounded to nearest, ties to even. */
INLINE void convert_line(uint8_t *to, const float *from) {
#pragma GCC unroll 16
    for (int i = 0; i < 2; i++) {
        const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i * 32 + 16), _mm512_loadu_ps(from + i * 32));
        _mm512_store_si512(to + i * 64, (__m512i)pair);
    }
}

/* The rows of a strip lie beside each other for every 64 k, so that one pointer serves all. */
static void convert_strip(uint8_t *to, const cpu_rows *a, int64_t first, int64_t rows, int64_t depth) {
    for (int64_t i = 0; i < rows; i++) {
        const float *from = row_at(a, first + i);
        for (int64_t k = 0; k < depth; k += RECORD_COLS) convert_line(to + (k * rows + i * RECORD_COLS) * 2, from + k);
    }
}

/* m rows in strips of `most` at most, as equal as can be: where strip s begins. */
static inline int64_t strip_start(int64_t m, int64_t strips, int64_t s) {
    const int64_t longer = m % strips;
    return m / strips * s + cpu_min(s, longer);
}

/* ---- decoding ---- */

INLINE __m512i values_of(const float *lut) {
    const __m256i sixteen = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(lut));
    return _mm512_inserti64x4(_mm512_castsi256_si512(sixteen), sixteen, 1);
}

/* By how much the four quarters are shifted. */
INLINE __m512i quarter_shifts(void) {
    const __m512i quarter = _mm512_set_epi64(12, 12, 8, 8, 4, 4, 0, 0);
    return _mm512_mullo_epi64(quarter, _mm512_set1_epi64(0x0001000100010001));
}

/* 16 columns of a pair of k. */
INLINE __m512bh decode_pair(const uint8_t *codes, __m512i values, __m512i shifts) {
    const __m512i units = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codes));
    return (__m512bh)_mm512_permutexvar_epi16(_mm512_srlv_epi16(units, shifts), values);
}

/* ---- forward ---- */

/* part[rows][tiles] += products of `pairs` pairs of k. */
INLINE void forward_pairs(__m512 part[STRIP_ROWS][TILES], const uint8_t *x, const uint8_t *codes, int64_t stride, __m512i values,
                          __m512i shifts, const int pairs, const int rows, const int tiles) {
#pragma GCC unroll 4
    for (int p = 0; p < pairs; p++) {
        __m512bh b[TILES];
#pragma GCC unroll 16
        for (int t = 0; t < tiles; t++) b[t] = decode_pair(codes + t / 2 * stride + t % 2 * (RECORD_CODES / 2) + p * 16, values, shifts);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            int32_t two;
            memcpy(&two, x + i * RECORD_COLS * 2 + p * 4, sizeof two);
            const __m512bh xx = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 16
            for (int t = 0; t < tiles; t++) part[i][t] = _mm512_dpbf16_ps(part[i][t], xx, b[t]);
        }
    }
}

/* sum += scale part, of one tile's columns. */
INLINE void add_scaled(float *sum, __m512 part[STRIP_ROWS][TILES], __m512 scale, const int t, const int rows, const int tiles) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        float *s = sum + (i * tiles + t) * 16;
        _mm512_storeu_ps(s, _mm512_fmadd_ps(part[i][t], scale, _mm512_loadu_ps(s)));
    }
}

/* From a record's first 32 k of MXFP4 to the others: sums go over to their scale, which is exact, or to `sum` where the two are too far apart
 * for that. */
INLINE void change_scale(float *sum, __m512 part[STRIP_ROWS][TILES], const uint8_t *record, const int t, const int rows, const int tiles) {
    const __m512i apart = _mm512_sub_epi32(exponents_of(record, t % 2, 0), exponents_of(record, t % 2, 1));
    if (_mm512_cmpgt_epi32_mask(_mm512_abs_epi32(apart), _mm512_set1_epi32(64)) == 0) {
        const __m512 ratio = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(apart, _mm512_set1_epi32(127)), 23));
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) part[i][t] = _mm512_mul_ps(part[i][t], ratio);
        return;
    }
    add_scaled(sum, part, scales_of(record, t % 2, 0, true), t, rows, tiles);
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) part[i][t] = _mm512_setzero_ps();
}

/* sum[rows][tiles * 16] = a W^T over all of k.  tiles: 2, or 4 of two records that lie `stride` apart. */
INLINE void forward_strip(float *sum, const uint8_t *a, const uint8_t *w, int64_t stride, int64_t blocks, const float *lut, const int rows,
                          const int tiles, const bool mx) {
    const __m512i values = values_of(lut), shifts = quarter_shifts();
    const int64_t record = record_bytes(mx ? ESP_MXFP4 : ESP_NF4);
    enum { HALF = RECORD_COLS / 4, AHEAD = 6 };
    for (int i = 0; i < rows * tiles; i++) _mm512_storeu_ps(sum + i * 16, _mm512_setzero_ps());
    for (int64_t b = 0; b < blocks; b++, w += record, a += rows * RECORD_COLS * 2) {
        /* From memory to the second cache: what comes behind this column of records is the next one.  From there: the next block. */
        const uint8_t *later = w + (b + AHEAD < blocks || tiles == 2 ? 0 : stride) + AHEAD * record;
#pragma GCC unroll 2
        for (int t = 0; t < tiles; t += 2) {
            prefetch_record(later + t / 2 * stride, record);
            prefetch_lines(w + record + t / 2 * stride, record);
        }
        prefetch_lines(a + rows * RECORD_COLS * 2, rows * RECORD_COLS * 2);
        __asm__ volatile("" ::: "memory"); /* sums stay in memory: registers are for the parts */
        __m512 part[STRIP_ROWS][TILES];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
            for (int t = 0; t < tiles; t++) part[i][t] = _mm512_setzero_ps();
        forward_pairs(part, a, w, stride, values, shifts, mx ? HALF : 2 * HALF, rows, tiles);
        if (mx) {
#pragma GCC unroll 16
            for (int t = 0; t < tiles; t++) change_scale(sum, part, w + t / 2 * stride, t, rows, tiles);
            forward_pairs(part, a + HALF * 4, w + HALF * 16, stride, values, shifts, HALF, rows, tiles);
        }
#pragma GCC unroll 16
        for (int t = 0; t < tiles; t++) add_scaled(sum, part, scales_of(w + t / 2 * stride, t % 2, 1, mx), t, rows, tiles);
    }
}

typedef void forward_fn(float *sum, const uint8_t *a, const uint8_t *w, int64_t stride, int64_t blocks, const float *lut);
#define FORWARD(rows, tiles, mx)                                                                                                           \
    static void forward_##rows##_##tiles##_##mx(float *sum, const uint8_t *a, const uint8_t *w, int64_t stride, int64_t blocks,            \
                                                const float *lut) {                                                                        \
        forward_strip(sum, a, w, stride, blocks, lut, rows, tiles, mx);                                                                    \
    }
#define FORWARD_ALL(mx)                                                                                                                    \
    FORWARD(1, 2, mx)                                                                                                                      \
    FORWARD(2, 2, mx)                                                                                                                      \
    FORWARD(3, 2, mx)                                                                                                                      \
    FORWARD(4, 2, mx)                                                                                                                      \
    FORWARD(5, 2, mx)                                                                                                                      \
    FORWARD(6, 2, mx)                                                                                                                      \
    FORWARD(7, 2, mx)                                                                                                                      \
    FORWARD(8, 2, mx)                                                                                                                      \
    FORWARD(9, 2, mx)                                                                                                                      \
    FORWARD(10, 2, mx)                                                                                                                     \
    FORWARD(11, 2, mx)                                                                                                                     \
    FORWARD(12, 2, mx)                                                                                                                     \
    FORWARD(1, 4, mx)                                                                                                                      \
    FORWARD(2, 4, mx)                                                                                                                      \
    FORWARD(3, 4, mx)                                                                                                                      \
    FORWARD(4, 4, mx)
FORWARD_ALL(0)
FORWARD_ALL(1)
#define FORWARD_TABLE(mx)                                                                                                                  \
    {                                                                                                                                      \
        forward_1_2_##mx, forward_2_2_##mx, forward_3_2_##mx, forward_4_2_##mx, forward_5_2_##mx, forward_6_2_##mx, forward_7_2_##mx,      \
            forward_8_2_##mx, forward_9_2_##mx, forward_10_2_##mx, forward_11_2_##mx, forward_12_2_##mx                                    \
    }
#define FEW_TABLE(mx)                                                                                                                      \
    { forward_1_4_##mx, forward_2_4_##mx, forward_3_4_##mx, forward_4_4_##mx }
static forward_fn *const forward_strips[2][STRIP_ROWS] = {FORWARD_TABLE(0), FORWARD_TABLE(1)};
static forward_fn *const forward_few[2][FEW_ROWS] = {FEW_TABLE(0), FEW_TABLE(1)};

/* `tiles` vectors of each row to their place. */
static void put_strip(const cpu_rows *c, const float *sum, const float *bias, int64_t first, int64_t rows, int64_t at, int64_t tiles) {
    for (int64_t i = 0; i < rows; i++) {
        float *to = row_at(c, first + i) + at;
        for (int64_t t = 0; t < tiles; t++) {
            const __m512 x = _mm512_loadu_ps(sum + (i * tiles + t) * 16);
            _mm512_storeu_ps(to + t * 16, bias ? _mm512_add_ps(x, _mm512_loadu_ps(bias + at + t * 16)) : x);
        }
    }
}

/* Rows start .. start + many - 1, which lie converted in strips at x, and n columns from `col` on. */
static void forward_columns(const cpu_rows *c, const cpu_packed *w, const float *bias, const uint8_t *x, int64_t start, int64_t many,
                            int64_t col, int64_t n) {
    const bool mx = w->format == ESP_MXFP4;
    const int64_t blocks = w->cols / RECORD_COLS, stride = blocks * record_bytes(w->format), strips = cpu_blocks(many, STRIP_ROWS);
    const int64_t end = col + n;
    _Alignas(64) float sum[STRIP_ROWS * RECORD_ROWS];
    for (; many <= FEW_ROWS && col + 2 * RECORD_ROWS <= end; col += 2 * RECORD_ROWS) {
        forward_few[mx][many - 1](sum, x, w->records + col / RECORD_ROWS * stride, stride, blocks, w->lut);
        put_strip(c, sum, bias, start, many, col, 4);
    }
    for (; col < end; col += RECORD_ROWS) {
        for (int64_t s = 0; s < strips; s++) {
            const int64_t first = strip_start(many, strips, s), rows = strip_start(many, strips, s + 1) - first;
            forward_strips[mx][rows - 1](sum, x + first * w->cols * 2, w->records + col / RECORD_ROWS * stride, stride, blocks, w->lut);
            put_strip(c, sum, bias, start + first, rows, col, 2);
        }
    }
}

void cpu_packed_forward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, const float *bias, int64_t m, cpu_columns columns,
                        void *work, bool again) {
    (void)again;
    uint8_t *x = work;
    for (int64_t start = 0; start < m; start += FORWARD_ROWS) {
        const int64_t many = cpu_min(m - start, FORWARD_ROWS), strips = cpu_blocks(many, STRIP_ROWS);
        for (int64_t s = 0; s < strips; s++) {
            const int64_t first = strip_start(many, strips, s);
            convert_strip(x + first * w->cols * 2, a, start + first, strip_start(many, strips, s + 1) - first, w->cols);
        }
        forward_columns(c, w, bias, x, start, many, columns.first, columns.n);
        if (columns.second) forward_columns(c, w, bias, x, start, many, columns.second, columns.n);
    }
}

/* ---- backward ---- */

/* 32 rows of one record to panel[16 pairs][64]. */
INLINE void decode_record(uint8_t *panel, const gather *g, const uint8_t *record, __m512 lut, const bool mx) {
    const int halves = mx ? 2 : 1;
    for (int tile = 0; tile < 2; tile++) {
        for (int half = 0; half < halves; half++) {
            _Alignas(64) float buffer[16];
            const float *scale = row_scales(buffer, record, tile, half, mx);
#pragma GCC unroll 16
            for (int i = 0; i < 4; i++) {
                const __m512i values[2] = {pair_values(lut, scale, i, 0), pair_values(lut, scale, i, 1)};
#pragma GCC unroll 16
                for (int j = 0; j < 4 / halves; j++) {
                    const int k = half * 2 + j;
                    const __m512i units = gather_units(g, record + tile * (RECORD_CODES / 2) + k * 128, i);
                    uint8_t *to = panel + (tile * 8 + i * 2) * 256 + k * 64;
                    _mm512_store_si512(to, (__m512i)decode_gathered(g, units, values[0], 0));
                    _mm512_store_si512(to + 256, (__m512i)decode_gathered(g, units, values[1], 1));
                }
            }
        }
    }
}

static void decode_panel(uint8_t *panel, const uint8_t *w, int64_t stride, int64_t records, const float *lut, bool mx) {
    const gather g = gather_make();
    const __m512 values = _mm512_loadu_ps(lut);
    for (int64_t i = 0; i < records; i++, w += stride, panel += RECORD_ROWS * RECORD_COLS * 2) {
        prefetch_record(w + 4 * stride, record_bytes(mx ? ESP_MXFP4 : ESP_NF4));
        if (mx)
            decode_record(panel, &g, w, values, true);
        else
            decode_record(panel, &g, w, values, false);
    }
}

/* n floats, whole 32s, of each row, in pairs of rows of W: BACK_DEPTH * 2 bytes a row. */
static void convert_rows(uint8_t *to, const cpu_rows *a, int64_t first, int64_t rows, int64_t n0, int64_t n) {
    const __m512i order = pairing();
    for (int64_t i = 0; i < rows; i++, to += BACK_DEPTH * 2) {
        const float *from = row_at(a, first + i) + n0;
        for (int64_t k = 0; k < n; k += 32) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + k + 16), _mm512_loadu_ps(from + k));
            _mm512_store_si512(to + k * 2, _mm512_permutexvar_epi16(order, (__m512i)pair));
        }
    }
}

INLINE void put_sums(const cpu_rows *c, int64_t first, int64_t at, bool add, __m512 (*part)[4], const int rows) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        float *to = row_at(c, first + i) + at;
#pragma GCC unroll 16
        for (int t = 0; t < 4; t++)
            _mm512_storeu_ps(to + t * 16, add ? _mm512_add_ps(_mm512_loadu_ps(to + t * 16), part[i][t]) : part[i][t]);
    }
}

/* c[rows][64] = (add ? c : 0) + a times a panel of `pairs` pairs. */
INLINE void panel_strip(const cpu_rows *c, int64_t first, int64_t at, bool add, const uint8_t *a, const uint8_t *panel, int64_t pairs,
                        const int rows) {
    __m512 part[BACK_ROWS][4];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < 4; t++) part[i][t] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh b[4];
#pragma GCC unroll 16
        for (int t = 0; t < 4; t++) b[t] = (__m512bh)_mm512_load_si512(panel + p * 256 + t * 64);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            int32_t two;
            memcpy(&two, a + i * BACK_DEPTH * 2 + p * 4, sizeof two);
            const __m512bh xx = (__m512bh)_mm512_set1_epi32(two);
#pragma GCC unroll 16
            for (int t = 0; t < 4; t++) part[i][t] = _mm512_dpbf16_ps(part[i][t], xx, b[t]);
        }
    }
    put_sums(c, first, at, add, part, rows);
}

/* The same, decoding on the way. */
INLINE void backward_strip(const cpu_rows *c, int64_t first, int64_t at, bool add, const uint8_t *a, const uint8_t *w, int64_t stride,
                           int64_t records, const float *lut, const int rows, const bool mx) {
    const gather g = gather_make();
    const int halves = mx ? 2 : 1;
    __m512 part[BACK_ROWS][4];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < 4; t++) part[i][t] = _mm512_setzero_ps();
    for (int64_t r = 0; r < records; r++, w += stride) {
        prefetch_record(w + 4 * stride, record_bytes(mx ? ESP_MXFP4 : ESP_NF4));
        for (int tile = 0; tile < 2; tile++, a += 32) {
#pragma GCC unroll 16
            for (int half = 0; half < halves; half++) {
                _Alignas(64) float buffer[16];
                const float *scale = row_scales(buffer, w, tile, half, mx);
#pragma GCC unroll 16
                for (int i = 0; i < 4; i++) {
                    const __m512i pair[2] = {pair_values(_mm512_loadu_ps(lut), scale, i, 0),
                                             pair_values(_mm512_loadu_ps(lut), scale, i, 1)};
#pragma GCC unroll 16
                    for (int j = 0; j < 4 / halves; j++) {
                        __asm__ volatile("" ::: "memory"); /* what follows is not begun before: registers would not do */
                        const int k = half * 2 + j;
                        const __m512i units = gather_units(&g, w + tile * (RECORD_CODES / 2) + k * 128, i);
#pragma GCC unroll 16
                        for (int h = 0; h < 2; h++) {
                            const __m512bh b = decode_gathered(&g, units, pair[h], h);
#pragma GCC unroll 16
                            for (int m = 0; m < rows; m++) {
                                int32_t two;
                                memcpy(&two, a + m * BACK_DEPTH * 2 + (i * 2 + h) * 4, sizeof two);
                                part[m][k] = _mm512_dpbf16_ps(part[m][k], (__m512bh)_mm512_set1_epi32(two), b);
                            }
                        }
                    }
                }
            }
        }
    }
    put_sums(c, first, at, add, part, rows);
}

typedef void panel_fn(const cpu_rows *c, int64_t first, int64_t at, bool add, const uint8_t *a, const uint8_t *panel, int64_t pairs);
typedef void backward_fn(const cpu_rows *c, int64_t first, int64_t at, bool add, const uint8_t *a, const uint8_t *w, int64_t stride,
                         int64_t records, const float *lut);
#define PANEL(rows)                                                                                                                        \
    static void panel_##rows(const cpu_rows *c, int64_t first, int64_t at, bool add, const uint8_t *a, const uint8_t *panel,               \
                             int64_t pairs) {                                                                                              \
        panel_strip(c, first, at, add, a, panel, pairs, rows);                                                                             \
    }
PANEL(1)
PANEL(2)
PANEL(3)
PANEL(4)
PANEL(5)
PANEL(6)
static panel_fn *const panel_strips[BACK_ROWS] = {panel_1, panel_2, panel_3, panel_4, panel_5, panel_6};
#define BACKWARD(rows, mx)                                                                                                                 \
    static void backward_##rows##_##mx(const cpu_rows *c, int64_t first, int64_t at, bool add, const uint8_t *a, const uint8_t *w,         \
                                       int64_t stride, int64_t records, const float *lut) {                                                \
        backward_strip(c, first, at, add, a, w, stride, records, lut, rows, mx);                                                           \
    }
#define BACKWARD_ALL(mx) BACKWARD(1, mx) BACKWARD(2, mx) BACKWARD(3, mx) BACKWARD(4, mx)
BACKWARD_ALL(0)
BACKWARD_ALL(1)
static backward_fn *const backward_few[2][FEW_ROWS] = {{backward_1_0, backward_2_0, backward_3_0, backward_4_0},
                                                       {backward_1_1, backward_2_1, backward_3_1, backward_4_1}};

size_t cpu_packed_work(const espi_stack *w, int64_t rows) {
    (void)rows;
    const size_t forward = FORWARD_ROWS * (size_t)w->cols * 2;
    const size_t backward = BACKWARD_ROWS * BACK_DEPTH * 2 + BACK_DEPTH * RECORD_COLS * 2;
    return forward > backward ? forward : backward;
}

/* Rows start .. start + many - 1, whose n0 .. n0 + depth - 1 lie converted at y, and n columns from `col` on. */
static void backward_columns(const cpu_rows *c, const cpu_packed *w, const uint8_t *y, uint8_t *panel, int64_t start, int64_t many,
                             int64_t n0, int64_t depth, int64_t col, int64_t n) {
    const bool mx = w->format == ESP_MXFP4, add = n0 > 0;
    const int64_t record = record_bytes(w->format), stride = w->cols / RECORD_COLS * record, strips = cpu_blocks(many, BACK_ROWS);
    for (const int64_t end = col + n; col < end; col += RECORD_COLS) {
        const uint8_t *records = w->records + n0 / RECORD_ROWS * stride + col / RECORD_COLS * record;
        if (many <= FEW_ROWS) {
            backward_few[mx][many - 1](c, start, col, add, y, records, stride, depth / RECORD_ROWS, w->lut);
            continue;
        }
        decode_panel(panel, records, stride, depth / RECORD_ROWS, w->lut, mx);
        for (int64_t s = 0; s < strips; s++) {
            const int64_t first = strip_start(many, strips, s), rows = strip_start(many, strips, s + 1) - first;
            panel_strips[rows - 1](c, start + first, col, add, y + first * BACK_DEPTH * 2, panel, depth / 2);
        }
    }
}

void cpu_packed_backward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, int64_t m, cpu_columns columns, void *work,
                         bool again) {
    (void)again;
    uint8_t *panel = work, *y = panel + BACK_DEPTH * RECORD_COLS * 2;
    for (int64_t start = 0; start < m; start += BACKWARD_ROWS) {
        const int64_t many = cpu_min(m - start, BACKWARD_ROWS);
        for (int64_t n0 = 0; n0 < w->rows; n0 += BACK_DEPTH) {
            const int64_t depth = cpu_min(w->rows - n0, BACK_DEPTH);
            convert_rows(y, a, start, many, n0, depth);
            backward_columns(c, w, y, panel, start, many, n0, depth, columns.first, columns.n);
            if (columns.second) backward_columns(c, w, y, panel, start, many, n0, depth, columns.second, columns.n);
        }
    }
}
