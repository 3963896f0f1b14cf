/* Products of bf16 with packed experts in tiles: see packed.h for the layout.  A tile of weights is decoded, values scaled, and meets up to
 * five tiles of 16 rows at once, whose sums stay in tiles over the whole depth.
 *
 * Forward: weights are the left factor, 16 n by 32 k, so that the scale of a row is one number, and the rows of x are the right one, turned
 * so that pairs of k lie beside each other.  Sums come out turned.  Backward: weights are the right factor, 16 pairs of n by 16 k. */
#include "kernels/cpu/decode.h"

enum {
    TILE_BYTES = 1024,
    TILE_SIDE = 16,  /* rows of a tile, and floats of a row of sums */
    TILE_DEPTH = 32, /* of a product of two tiles */
    TOGETHER = 5,    /* tiles of rows that meet a tile of weights; two more take turns in holding rows */
    ROWS_TOGETHER = TOGETHER * TILE_SIDE,
};

/* The tile of weights, as the instructions' names want it. */
#define WEIGHTS 5

/* The compiler does not know that these read and write memory. */
#define TILE_LOAD(tile, from, stride)                                                                                                      \
    do {                                                                                                                                   \
        __asm__ volatile("" ::: "memory");                                                                                                 \
        _tile_loadd(tile, from, stride);                                                                                                   \
    } while (0)
#define TILE_STORE(tile, to, stride)                                                                                                       \
    do {                                                                                                                                   \
        _tile_stored(tile, to, stride);                                                                                                    \
        __asm__ volatile("" ::: "memory");                                                                                                 \
    } while (0)

/* All eight tiles are full. */
static void tiles_begin(void) {
    _Alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; tile++) {
        config[16 + 2 * tile] = 64;
        config[48 + tile] = TILE_SIDE;
    }
    __asm__ volatile("" ::"r"(config) : "memory");
    _tile_loadconfig(config);
}

/* ---- 16 x 16 turned ---- */

/* Rows become columns: in the step of 1, 2, 4 and 8 the rows that far apart exchange the columns that far apart. */
INLINE void turn(__m512i x[TILE_SIDE]) {
#pragma GCC unroll 16
    for (int step = 1; step < TILE_SIDE; step *= 2) {
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), apart = _mm512_set1_epi32(step);
        const __mmask16 upper = _mm512_test_epi32_mask(lane, apart);
        const __m512i other = _mm512_set1_epi32(16);
        const __m512i low = _mm512_mask_add_epi32(lane, upper, _mm512_sub_epi32(lane, apart), other);
        const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, apart), upper, lane, other);
#pragma GCC unroll 16
        for (int i = 0; i < TILE_SIDE; i++) {
            if (i & step) continue;
            const __m512i a = x[i], b = x[i + step];
            x[i] = _mm512_permutex2var_epi32(a, low, b);
            x[i + step] = _mm512_permutex2var_epi32(a, high, b);
        }
    }
}

/* ---- forward ---- */

/* Where pair p of 16 pairs of k lies: decode_rows() finds every fourth one beside the next. */
static inline int place_of(int pair) {
    return pair % 4 * 4 + pair / 4;
}

/* `rows` rows, at most 16, of x to tiles of 32 k; rows beyond are 0. */
static void turn_rows(uint8_t *to, const cpu_rows *a, int64_t first, int64_t rows, int64_t depth) {
    for (int64_t k = 0; k < depth; k += TILE_DEPTH, to += TILE_BYTES) {
        __m512i x[TILE_SIDE];
        for (int i = 0; i < TILE_SIDE; i++) {
            const float *from = row_at(a, first + cpu_min(i, rows - 1)) + k;
            const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
            x[i] = i < rows ? (__m512i)pair : _mm512_setzero_si512();
        }
        turn(x);
#pragma GCC unroll 16
        for (int p = 0; p < TILE_SIDE; p++) _mm512_store_si512(to + place_of(p) * 64, x[p]);
    }
}

/* 16 n by 32 k: codes[16 pairs of k][16 bytes] to a tile whose row n holds the pairs in the order of place_of(). */
INLINE void decode_rows(uint8_t *tile, const uint8_t *codes, const __m512i *values) {
    __m512i unit[4], part[4];
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) unit[i] = _mm512_loadu_si512(codes + i * 64);
    /* unit i of the four pairs of each quarter beside each other */
    part[0] = _mm512_unpacklo_epi32(unit[0], unit[1]);
    part[1] = _mm512_unpackhi_epi32(unit[0], unit[1]);
    part[2] = _mm512_unpacklo_epi32(unit[2], unit[3]);
    part[3] = _mm512_unpackhi_epi32(unit[2], unit[3]);
    unit[0] = _mm512_unpacklo_epi64(part[0], part[2]);
    unit[1] = _mm512_unpackhi_epi64(part[0], part[2]);
    unit[2] = _mm512_unpacklo_epi64(part[1], part[3]);
    unit[3] = _mm512_unpackhi_epi64(part[1], part[3]);
#pragma GCC unroll 16
    for (int nibble = 0; nibble < 4; nibble++)
#pragma GCC unroll 16
        for (int i = 0; i < 4; i++) {
            const int n = i + 4 * nibble;
            const __m512i code = nibble ? _mm512_srli_epi16(unit[i], 4 * nibble) : unit[i];
            _mm512_store_si512(tile + n * 64, _mm512_permutexvar_epi16(code, values[n]));
        }
}

/* For each of 16 n its scaled values, twice: the bit above a code does not matter. */
INLINE void row_values(__m512i values[TILE_SIDE], __m512 lut, const float *scale) {
#pragma GCC unroll 16
    for (int n = 0; n < TILE_SIDE; n++) {
        const __m512 scaled = _mm512_mul_ps(lut, _mm512_set1_ps(scale[n]));
        values[n] = (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
    }
}

#define CLEAR(j)                                                                                                                           \
    if (j < together) _tile_zero(j)
/* Weights are the left factor, or the right one. */
#define LEFT(j, rows)                                                                                                                      \
    if (j < together) {                                                                                                                    \
        TILE_LOAD(rows, x + j * far, 64);                                                                                                  \
        _tile_dpbf16ps(j, WEIGHTS, rows);                                                                                                  \
    }
#define RIGHT(j, rows)                                                                                                                     \
    if (j < together) {                                                                                                                    \
        TILE_LOAD(rows, x + j * far, 64);                                                                                                  \
        _tile_dpbf16ps(j, rows, WEIGHTS);                                                                                                  \
    }
#define KEEP(j)                                                                                                                            \
    if (j < together) TILE_STORE(j, sums + j * (TILE_SIDE * TILE_SIDE), 64)

/* sums[together][16 n][16 rows] over all of k. */
INLINE void forward_tiles(float *sums, const uint8_t *x, int64_t far, const uint8_t *w, int half, int64_t blocks, const float *lut,
                          const int together, const bool mx) {
    _Alignas(64) uint8_t tile[2][TILE_BYTES];
    __m512i values[TILE_SIDE];
    const __m512 table = _mm512_loadu_ps(lut);
    const int64_t record = record_bytes(mx ? ESP_MXFP4 : ESP_NF4);
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
    CLEAR(4);
    for (int64_t b = 0; b < blocks; b++, w += record) {
        prefetch_record(w + 2 * record, record);
        for (int part = 0; part < 2; part++, x += TILE_BYTES) {
            if (part == 0 || mx) {
                _Alignas(64) float buffer[TILE_SIDE];
                row_values(values, table, row_scales(buffer, w, half, part, mx));
            }
            decode_rows(tile[part], w + half * (RECORD_CODES / 2) + part * 256, values);
            TILE_LOAD(WEIGHTS, tile[part], 64);
            LEFT(0, 6);
            LEFT(1, 7);
            LEFT(2, 6);
            LEFT(3, 7);
            LEFT(4, 6);
        }
    }
    KEEP(0);
    KEEP(1);
    KEEP(2);
    KEEP(3);
    KEEP(4);
}

/* sums[together][16 rows][16 k] over all of n.  values: those of each pair of n, one record's after the other's. */
INLINE void backward_tiles(float *sums, const uint8_t *x, int64_t far, const uint8_t *w, int64_t stride, int64_t records,
                           const uint8_t *values, const int together) {
    _Alignas(64) uint8_t tile[2][TILE_BYTES];
    const gather g = gather_make();
    CLEAR(0);
    CLEAR(1);
    CLEAR(2);
    CLEAR(3);
    CLEAR(4);
    for (int64_t r = 0; r < records; r++, w += stride, x += TILE_BYTES, values += TILE_BYTES) {
        uint8_t *to = tile[r % 2];
#pragma GCC unroll 16
        for (int i = 0; i < 8; i++) {
            const __m512i units = gather_units(&g, w + i / 4 * (RECORD_CODES / 2), i % 4);
            const __m512i *pair = (const __m512i *)(values + i * 128);
            _mm512_store_si512(to + i * 128, (__m512i)decode_gathered(&g, units, pair[0], 0));
            _mm512_store_si512(to + i * 128 + 64, (__m512i)decode_gathered(&g, units, pair[1], 1));
        }
        TILE_LOAD(WEIGHTS, to, 64);
        RIGHT(0, 6);
        RIGHT(1, 7);
        RIGHT(2, 6);
        RIGHT(3, 7);
        RIGHT(4, 6);
    }
    KEEP(0);
    KEEP(1);
    KEEP(2);
    KEEP(3);
    KEEP(4);
}

typedef void forward_fn(float *sums, const uint8_t *x, int64_t far, const uint8_t *w, int half, int64_t blocks, const float *lut);
typedef void backward_fn(float *sums, const uint8_t *x, int64_t far, const uint8_t *w, int64_t stride, int64_t records,
                         const uint8_t *values);
#define TILES(together)                                                                                                                    \
    static void forward_##together##_0(float *sums, const uint8_t *x, int64_t far, const uint8_t *w, int half, int64_t blocks,             \
                                       const float *lut) {                                                                                 \
        forward_tiles(sums, x, far, w, half, blocks, lut, together, false);                                                                \
    }                                                                                                                                      \
    static void forward_##together##_1(float *sums, const uint8_t *x, int64_t far, const uint8_t *w, int half, int64_t blocks,             \
                                       const float *lut) {                                                                                 \
        forward_tiles(sums, x, far, w, half, blocks, lut, together, true);                                                                 \
    }                                                                                                                                      \
    static void backward_##together(float *sums, const uint8_t *x, int64_t far, const uint8_t *w, int64_t stride, int64_t records,         \
                                    const uint8_t *values) {                                                                               \
        backward_tiles(sums, x, far, w, stride, records, values, together);                                                                \
    }
TILES(1)
TILES(2)
TILES(3)
TILES(4)
TILES(5)
static forward_fn *const forward_of[2][TOGETHER] = {{forward_1_0, forward_2_0, forward_3_0, forward_4_0, forward_5_0},
                                                    {forward_1_1, forward_2_1, forward_3_1, forward_4_1, forward_5_1}};
static backward_fn *const backward_of[TOGETHER] = {backward_1, backward_2, backward_3, backward_4, backward_5};

/* Columns col .. col + 15 of `rows` rows, from sums[rows / 16][16][16]; turned: rows are the last index. */
static void put_tiles(const cpu_rows *c, const float *sums, int64_t first, int64_t rows, int64_t col, const float *bias, bool turned) {
    const __m512 start = bias ? _mm512_loadu_ps(bias + col) : _mm512_setzero_ps();
    for (int64_t done = 0; done < rows; done += TILE_SIDE, sums += TILE_SIDE * TILE_SIDE) {
        __m512i x[TILE_SIDE];
#pragma GCC unroll 16
        for (int i = 0; i < TILE_SIDE; i++) x[i] = _mm512_load_si512(sums + i * TILE_SIDE);
        if (turned) turn(x);
        for (int64_t i = 0; i < cpu_min(rows - done, TILE_SIDE); i++)
            _mm512_storeu_ps(row_at(c, first + done + i) + col, _mm512_add_ps(_mm512_castsi512_ps(x[i]), start));
    }
}

size_t cpu_packed_work(const espi_stack *w, int64_t rows) {
    (void)rows;
    const size_t forward = ROWS_TOGETHER * (size_t)w->cols * 2;
    const size_t backward = (ROWS_TOGETHER * 2 + TILE_DEPTH) * (size_t)w->rows; /* rows, and 64 bytes for each pair of n */
    return forward > backward ? forward : backward;
}

/* `many` rows from `start` on lie at x, in tiles. */
static void forward_columns(const cpu_rows *c, const cpu_packed *w, const float *bias, const uint8_t *x, int64_t start, int64_t many,
                            int64_t col, int64_t n) {
    const int64_t blocks = w->cols / RECORD_COLS, stride = blocks * record_bytes(w->format);
    _Alignas(64) float sums[TOGETHER * TILE_SIDE * TILE_SIDE];
    for (const int64_t end = col + n; col < end; col += TILE_SIDE) {
        const uint8_t *records = w->records + col / RECORD_ROWS * stride;
        forward_of[w->format == ESP_MXFP4][cpu_blocks(many, TILE_SIDE) - 1](sums, x, w->cols * TILE_SIDE * 2, records,
                                                                            (int)(col / TILE_SIDE % 2), blocks, w->lut);
        put_tiles(c, sums, start, many, col, bias, true);
    }
}

void cpu_packed_forward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, const float *bias, int64_t m, cpu_columns columns,
                        void *work, bool again) {
    (void)again;
    tiles_begin();
    for (int64_t start = 0; start < m; start += ROWS_TOGETHER) {
        const int64_t many = cpu_min(m - start, ROWS_TOGETHER);
        for (int64_t i = 0; i < many; i += TILE_SIDE)
            turn_rows((uint8_t *)work + i * w->cols * 2, a, start + i, cpu_min(many - i, TILE_SIDE), w->cols);
        forward_columns(c, w, bias, work, start, many, columns.first, columns.n);
        if (columns.second) forward_columns(c, w, bias, work, start, many, columns.second, columns.n);
    }
    _tile_release();
}

/* `rows` rows, at most 16, of the gradient to tiles of 32 n, in pairs; rows beyond are 0. */
static void pair_rows(uint8_t *to, const cpu_rows *a, int64_t first, int64_t rows, int64_t depth) {
    const __m512i order = pairing();
    for (int64_t i = 0; i < TILE_SIDE; i++) {
        const float *from = row_at(a, first + cpu_min(i, rows - 1));
        for (int64_t n = 0; n < depth; n += TILE_DEPTH) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + n + 16), _mm512_loadu_ps(from + n));
            const __m512i x = _mm512_permutexvar_epi16(order, (__m512i)pair);
            _mm512_store_si512(to + n / TILE_DEPTH * TILE_BYTES + i * 64, i < rows ? x : _mm512_setzero_si512());
        }
    }
}

/* The scaled values of all pairs of n, for 64 k, or for either half of them. */
static void values_of_pairs(uint8_t *to, const uint8_t *w, int64_t stride, int64_t records, const float *lut, int half, bool mx) {
    const __m512 table = _mm512_loadu_ps(lut);
    for (int64_t r = 0; r < records; r++, w += stride) {
        prefetch_record(w + 4 * stride, record_bytes(mx ? ESP_MXFP4 : ESP_NF4));
        for (int tile = 0; tile < 2; tile++) {
            _Alignas(64) float buffer[TILE_SIDE];
            const float *scale = row_scales(buffer, w, tile, half, mx);
            for (int i = 0; i < 8; i++, to += 64) _mm512_store_si512(to, pair_values(table, scale, i / 2, i % 2));
        }
    }
}

static void backward_columns(const cpu_rows *c, const cpu_packed *w, const uint8_t *y, uint8_t *values, int64_t start, int64_t many,
                             int64_t col, int64_t n) {
    const bool mx = w->format == ESP_MXFP4;
    const int64_t record = record_bytes(w->format), stride = w->cols / RECORD_COLS * record, records = w->rows / RECORD_ROWS;
    const int64_t alike = mx ? ESPI_MXBLOCK : RECORD_COLS; /* columns that share scales */
    _Alignas(64) float sums[TOGETHER * TILE_SIDE * TILE_SIDE];
    for (const int64_t end = col + n; col < end; col += TILE_SIDE) {
        const uint8_t *column = w->records + col / RECORD_COLS * record;
        if (col % alike == 0) values_of_pairs(values, column, stride, records, w->lut, (int)(col % RECORD_COLS / ESPI_MXBLOCK), mx);
        backward_of[cpu_blocks(many, TILE_SIDE) - 1](sums, y, w->rows * TILE_SIDE * 2, column + col % RECORD_COLS / TILE_SIDE * 128, stride,
                                                     records, values);
        put_tiles(c, sums, start, many, col, NULL, false);
    }
}

void cpu_packed_backward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, int64_t m, cpu_columns columns, void *work,
                         bool again) {
    (void)again;
    uint8_t *values = work, *y = values + w->rows * TILE_DEPTH;
    tiles_begin();
    for (int64_t start = 0; start < m; start += ROWS_TOGETHER) {
        const int64_t many = cpu_min(m - start, ROWS_TOGETHER);
        for (int64_t i = 0; i < many; i += TILE_SIDE) pair_rows(y + i * w->rows * 2, a, start + i, cpu_min(many - i, TILE_SIDE), w->rows);
        backward_columns(c, w, y, values, start, many, columns.first, columns.n);
        if (columns.second) backward_columns(c, w, y, values, start, many, columns.second, columns.n);
    }
    _tile_release();
}
