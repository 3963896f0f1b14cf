/* Products of bf16 with packed experts in tiles: see packed.h for the layout.  A tile of weights is decoded, values scaled, and meets up to
 * four tiles of 16 rows.  While the tile unit works on one, the vector units decode the next but one: their instructions are interleaved by
 * hand, because a processor does not look far enough ahead to do it.
 *
 * The tiles of rows stay in the first cache: of the depth so much is taken at a time that they fit, and sums wait in memory from one part of
 * the depth to the next, which does not change them.
 *
 * Forward: weights are the left factor, 16 n by 32 k, so that the scale of a row is one number, and the rows of x are the right one, turned
 * so that pairs of k lie beside each other.  Sums come out turned.  Backward: weights are the right factor, 16 pairs of n by 16 k. */
#include "kernels/cpu/decode.h"

enum {
    TILE_BYTES = 1024,
    TILE_FLOATS = 256,
    TILE_SIDE = 16,  /* rows of a tile, and floats of a row of sums */
    TILE_DEPTH = 32, /* of a product of two tiles */
    TOGETHER = 4,    /* tiles of rows that meet a tile of weights */
    ROWS_TOGETHER = TOGETHER * TILE_SIDE,
    NEAR = 32,   /* tiles of rows that stay in the first cache */
    CHUNK = 512, /* columns whose sums wait in the second */
    AHEAD = 2,   /* so many records beside are fetched before they are decoded */
};

/* The tile of weights, as the instructions' names want it. */
#define WEIGHTS 4

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

/* Four lanes' 4 x 4 each. */
INLINE void turn_lanes(__m512i x[4]) {
    const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpackhi_epi32(x[0], x[1]);
    const __m512i c = _mm512_unpacklo_epi32(x[2], x[3]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    x[0] = _mm512_unpacklo_epi64(a, c);
    x[1] = _mm512_unpackhi_epi64(a, c);
    x[2] = _mm512_unpacklo_epi64(b, d);
    x[3] = _mm512_unpackhi_epi64(b, d);
}

/* Columns 4 q .. 4 q + 3 of a tile in memory. */
INLINE void turn_quarter(__m512i x[4], const uint8_t *tile, int q) {
    const __m128i *from = (const __m128i *)tile + q;
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_castsi128_si512(_mm_load_si128(from + 4 * i));
        x[i] = _mm512_inserti32x4(x[i], _mm_load_si128(from + 4 * (i + 4)), 1);
        x[i] = _mm512_inserti32x4(x[i], _mm_load_si128(from + 4 * (i + 8)), 2);
        x[i] = _mm512_inserti32x4(x[i], _mm_load_si128(from + 4 * (i + 12)), 3);
    }
    turn_lanes(x);
}

/* ---- what is done for `rows` tiles of rows, a constant ---- */

#define EACH(of)                                                                                                                           \
    of(0);                                                                                                                                 \
    of(1);                                                                                                                                 \
    of(2);                                                                                                                                 \
    of(3)
#define BEGIN(j)                                                                                                                           \
    if (j < rows) {                                                                                                                        \
        if (add)                                                                                                                           \
            TILE_LOAD(j, sums + j * TILE_FLOATS, 64);                                                                                      \
        else                                                                                                                               \
            _tile_zero(j);                                                                                                                 \
    }
#define KEEP(j)                                                                                                                            \
    if (j < rows) TILE_STORE(j, sums + j * TILE_FLOATS, 64)
/* A quarter of decoding follows each of four products; where there are fewer, more of them. */
#define QUARTERS(j) for (int part = j * 4 / rows; part < (j + 1) * 4 / rows; part++)

/* ---- forward ---- */

/* `rows` rows, at most 16, of x to tiles of 32 k, `apart` bytes apart; rows beyond are 0. */
static void turn_rows(uint8_t *to, int64_t apart, const cpu_rows *a, int64_t first, int64_t rows, int64_t depth) {
    _Alignas(64) uint8_t line[TILE_BYTES] = {0};
    for (int64_t k = 0; k < depth; k += TILE_DEPTH, to += apart) {
        for (int i = 0; i < rows; i++) {
            const float *from = row_at(a, first + i) + k;
            const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
            _mm512_store_si512(line + i * 64, (__m512i)pair);
        }
        /* decoding leaves every fourth pair beside the next */
#pragma GCC unroll 16
        for (int q = 0; q < 4; q++) {
            __m512i x[4];
            turn_quarter(x, line, q);
#pragma GCC unroll 16
            for (int i = 0; i < 4; i++) _mm512_store_si512(to + (i * 4 + q) * 64, x[i]);
        }
    }
}

/* Where a stream of records is: tile `tile` of 16 n, record `record` of the depth. */
typedef struct place {
    int64_t tile, record;
} place;

INLINE const uint8_t *record_at(const uint8_t *w, const place *p, int64_t stride, int64_t bytes) {
    return w + p->tile / 2 * stride + p->record * bytes;
}
/* Stays at the last tile's beginning. */
INLINE void advance(place *p, int64_t tiles, int64_t records) {
    if (++p->record < records) return;
    p->record = 0;
    if (p->tile < tiles - 1) p->tile++;
}

/* For n of 16 its scaled values, twice: the bit above a code does not matter. */
INLINE void row_values(uint8_t *to, __m512 lut, const float *scale, int n) {
    const __m512 scaled = _mm512_mul_ps(lut, _mm512_set1_ps(scale[n]));
    _mm512_store_si512(to + n * 64, (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled));
}

/* Four n of a tile, whose row n holds pairs of k, every fourth one beside the next. */
INLINE void decode_rows(uint8_t *tile, const __m512i unit[4], const uint8_t *values, const int nibble) {
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        const int n = i + 4 * nibble;
        const __m512i code = nibble ? _mm512_srli_epi16(unit[i], 4 * nibble) : unit[i];
        _mm512_store_si512(tile + n * 64, _mm512_permutexvar_epi16(code, _mm512_load_si512(values + n * 64)));
    }
}

INLINE void load_units(__m512i unit[4], const uint8_t *codes) {
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) unit[i] = _mm512_loadu_si512(codes + i * 64);
    turn_lanes(unit);
}

/* sums[tiles][rows][16 n][16 rows] (+)= weights times x[2 records][rows], tiles of 16 n from w on.  next: the weights that follow these. */
INLINE void forward_tiles(float *sums, const uint8_t *x0, const uint8_t *w, const uint8_t *next, int64_t stride, int64_t records,
                          int64_t tiles, const float *lut, bool add, const int rows, const bool mx) {
    enum { TABLES = TILE_SIDE * 64 };
    _Alignas(64) uint8_t weights[2][2][TILE_BYTES], values[2][2][TABLES];
    _Alignas(64) float buffer[TILE_SIDE];
    const __m512 table = _mm512_loadu_ps(lut);
    const int64_t bytes = record_bytes(mx ? ESP_MXFP4 : ESP_NF4);
    const int sets = mx ? 2 : 1;
    place decoded = {0, 0}, scaled = {0, 0};
    for (int i = 0; i < 2; i++) {
        const uint8_t *record = record_at(w, &scaled, stride, bytes);
        for (int set = 0; set < sets; set++) {
            const float *scale = row_scales(buffer, record, (int)(scaled.tile % 2), set, mx);
            for (int n = 0; n < TILE_SIDE; n++) row_values(values[i][set], table, scale, n);
        }
        advance(&scaled, tiles, records);
    }
    for (int half = 0; half < 2; half++) {
        __m512i unit[4];
        load_units(unit, w + half * 256);
#pragma GCC unroll 16
        for (int nibble = 0; nibble < 4; nibble++) decode_rows(weights[0][half], unit, values[0][mx ? half : 0], nibble);
    }
    advance(&decoded, tiles, records);
    int now = 0;
    for (int64_t tile = 0; tile < tiles; tile++, sums += rows * TILE_FLOATS) {
        const uint8_t *x = x0;
        EACH(BEGIN);
        for (int64_t r = 0; r < records; r++, now ^= 1) {
            const uint8_t *codes = record_at(w, &decoded, stride, bytes) + decoded.tile % 2 * (RECORD_CODES / 2);
            const uint8_t *later = record_at(w, &scaled, stride, bytes);
            const int later_half = (int)(scaled.tile % 2);
            if (later_half == 0) {
                const int64_t ahead = scaled.tile / 2 + AHEAD - tiles / 2;
                prefetch_record(ahead < 0 ? later + AHEAD * stride : next + ahead * stride + scaled.record * bytes, bytes);
            }
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++, x += rows * TILE_BYTES) {
                __m512i unit[4];
                const float *scale = row_scales(buffer, later, later_half, half, mx);
                const uint8_t *from = values[now ^ 1][mx ? half : 0];
                uint8_t *to = values[now][mx ? half : 0];
                load_units(unit, codes + half * 256);
                TILE_LOAD(WEIGHTS, weights[now][half], 64);
#define LEFT(j, held)                                                                                                                      \
    if (j < rows) {                                                                                                                        \
        TILE_LOAD(held, x + j * TILE_BYTES, 64);                                                                                           \
        _tile_dpbf16ps(j, WEIGHTS, held);                                                                                                  \
        QUARTERS(j) {                                                                                                                      \
            decode_rows(weights[now ^ 1][half], unit, from, part);                                                                         \
            if (mx)                                                                                                                        \
                for (int n = 0; n < 4; n++) row_values(to, table, scale, part * 4 + n);                                                    \
            else                                                                                                                           \
                for (int n = 0; n < 2; n++) row_values(to, table, scale, half * 8 + part * 2 + n);                                         \
        }                                                                                                                                  \
    }
                LEFT(0, 5);
                LEFT(1, 6);
                LEFT(2, 7);
                LEFT(3, 5);
            }
            advance(&decoded, tiles, records);
            advance(&scaled, tiles, records);
        }
        EACH(KEEP);
    }
}

/* ---- backward ---- */

/* `rows` rows, at most 16, of the gradient to tiles of 32 n, in pairs, `apart` bytes apart; rows beyond are 0. */
static void pair_rows(uint8_t *to, int64_t apart, const cpu_rows *a, int64_t first, int64_t rows, int64_t depth) {
    const __m512i order = pairing();
    for (int64_t i = 0; i < TILE_SIDE; i++) {
        const float *from = row_at(a, first + cpu_min(i, rows - 1));
        for (int64_t n = 0; n < depth; n += TILE_DEPTH) {
            const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + n + 16), _mm512_loadu_ps(from + n));
            const __m512i x = _mm512_permutexvar_epi16(order, (__m512i)pair);
            _mm512_store_si512(to + n / TILE_DEPTH * apart + i * 64, i < rows ? x : _mm512_setzero_si512());
        }
    }
}

/* Pairs of n `first` .. first + many - 1 of a record: their scaled values. */
INLINE void values_of_pairs(uint8_t *to, const uint8_t *record, __m512 lut, int first, int many, int half, const bool mx) {
    _Alignas(64) float buffer[TILE_SIDE];
    const float *scale = row_scales(buffer, record, first / 8, half, mx);
#pragma GCC unroll 16
    for (int i = first; i < first + many; i++) _mm512_store_si512(to + i * 64, pair_values(lut, scale, i % 8 / 2, i % 2));
}

/* Records one below the other and `tiles` tiles of 16 k beside each other; next: the weights that follow these. */
typedef struct column {
    const uint8_t *w, *next;
    int64_t stride, bytes, records, tiles;
} column;

INLINE const uint8_t *depth_at(const column *c, int64_t tile, int64_t record) {
    return c->w + record * c->stride + tile / 4 * c->bytes;
}

INLINE void decode_quarter(uint8_t *to, const gather *g, const uint8_t *codes, const uint8_t *values, int quarter) {
#pragma GCC unroll 16
    for (int i = 2 * quarter; i < 2 * quarter + 2; i++) {
        const __m512i units = gather_units(g, codes + i / 4 * (RECORD_CODES / 2), i % 4);
        const __m512i *pair = (const __m512i *)(values + i * 128);
        _mm512_store_si512(to + i * 128, (__m512i)decode_gathered(g, units, pair[0], 0));
        _mm512_store_si512(to + i * 128 + 64, (__m512i)decode_gathered(g, units, pair[1], 1));
    }
}

/* sums[tiles][rows][16 rows][16 k] (+)= x[records][rows] times weights, tiles of 16 k from w on.  values: of two groups of tiles that share
 * scales, of every record. */
INLINE void backward_tiles(float *sums, const uint8_t *x0, const column *c, uint8_t *values, const float *lut, bool add, const int rows,
                           const bool mx) {
    enum { LATER = 2, ROUND = 4 };
    const int alike = mx ? 2 : 4, share = 16 / alike;
    _Alignas(64) uint8_t weights[ROUND][TILE_BYTES];
    const gather g = gather_make();
    const __m512 table = _mm512_loadu_ps(lut);
    const int64_t group = c->records * TILE_BYTES;
    for (int64_t r = 0; r < c->records; r++)
        for (int first = 0; first < 16; first += 8) values_of_pairs(values + r * TILE_BYTES, depth_at(c, 0, r), table, first, 8, 0, mx);
    place decoded = {0, 0};
    int64_t next = 0;
#define DECODE(part)                                                                                                                       \
    decode_quarter(to, &g, codes, from, part);                                                                                             \
    values_of_pairs(later, further, table, (int)(decoded.tile % alike) * share + (part) * (share / 4), share / 4, half, mx)
#define DECODE_AT                                                                                                                          \
    uint8_t *to = weights[next % ROUND];                                                                                                   \
    const uint8_t *codes = depth_at(c, decoded.tile, decoded.record) + decoded.tile % 4 * 128;                                             \
    const uint8_t *from = values + decoded.tile / alike % 2 * group + decoded.record * TILE_BYTES;                                         \
    const int64_t group_tile = cpu_min(decoded.tile / alike + 1, (c->tiles - 1) / alike) * alike;                                          \
    uint8_t *later = values + (decoded.tile / alike + 1) % 2 * group + decoded.record * TILE_BYTES;                                        \
    const uint8_t *further = depth_at(c, group_tile, decoded.record);                                                                      \
    const int half = (int)(group_tile % 4 / 2)
    for (; next < LATER; next++) {
        DECODE_AT;
#pragma GCC unroll 16
        for (int part = 0; part < 4; part++) {
            DECODE(part);
        }
        advance(&decoded, c->tiles, c->records);
    }
    for (int64_t tile = 0; tile < c->tiles; tile++, sums += rows * TILE_FLOATS) {
        const uint8_t *x = x0;
        EACH(BEGIN);
        for (int64_t r = 0; r < c->records; r++, next++, x += rows * TILE_BYTES) {
            DECODE_AT;
            if (decoded.tile % 4 == 0) {
                const int64_t ahead = decoded.tile / 4 + AHEAD - c->tiles / 4;
                const uint8_t *far = ahead < 0 ? depth_at(c, decoded.tile, decoded.record) + AHEAD * c->bytes
                                               : c->next + ahead * c->bytes + decoded.record * c->stride;
                prefetch_record(far, c->bytes);
            }
            TILE_LOAD(WEIGHTS, weights[(next - LATER) % ROUND], 64);
#define RIGHT(j, held)                                                                                                                     \
    if (j < rows) {                                                                                                                        \
        TILE_LOAD(held, x + j * TILE_BYTES, 64);                                                                                           \
        _tile_dpbf16ps(j, held, WEIGHTS);                                                                                                  \
        QUARTERS(j) {                                                                                                                      \
            DECODE(part);                                                                                                                  \
        }                                                                                                                                  \
    }
            RIGHT(0, 5);
            RIGHT(1, 6);
            RIGHT(2, 7);
            RIGHT(3, 5);
            advance(&decoded, c->tiles, c->records);
        }
        EACH(KEEP);
    }
}

/* ---- the kernels, by tiles of rows ---- */

typedef void forward_fn(float *sums, const uint8_t *x, const uint8_t *w, const uint8_t *next, int64_t stride, int64_t records,
                        int64_t tiles, const float *lut, bool add);
typedef void backward_fn(float *sums, const uint8_t *x, const column *c, uint8_t *values, const float *lut, bool add);
#define TILES(rows, mx)                                                                                                                    \
    static void forward_##rows##_##mx(float *sums, const uint8_t *x, const uint8_t *w, const uint8_t *next, int64_t stride,                \
                                      int64_t records, int64_t tiles, const float *lut, bool add) {                                        \
        forward_tiles(sums, x, w, next, stride, records, tiles, lut, add, rows, mx);                                                       \
    }                                                                                                                                      \
    static void backward_##rows##_##mx(float *sums, const uint8_t *x, const column *c, uint8_t *values, const float *lut, bool add) {      \
        backward_tiles(sums, x, c, values, lut, add, rows, mx);                                                                            \
    }
TILES(1, 0)
TILES(2, 0)
TILES(3, 0)
TILES(4, 0)
TILES(1, 1)
TILES(2, 1)
TILES(3, 1)
TILES(4, 1)
static forward_fn *const forward_of[2][TOGETHER] = {{forward_1_0, forward_2_0, forward_3_0, forward_4_0},
                                                    {forward_1_1, forward_2_1, forward_3_1, forward_4_1}};
static backward_fn *const backward_of[2][TOGETHER] = {{backward_1_0, backward_2_0, backward_3_0, backward_4_0},
                                                      {backward_1_1, backward_2_1, backward_3_1, backward_4_1}};

/* 16 columns of up to 16 rows, from a tile; turned: rows are the last index. */
INLINE void put_tile(const cpu_rows *c, const uint8_t *sums, int64_t first, int64_t rows, int64_t col, __m512 start, const bool turned) {
#pragma GCC unroll 16
    for (int q = 0; q < 4; q++) {
        __m512i x[4];
        if (turned) turn_quarter(x, sums, q);
        for (int i = 0; i < 4 && q * 4 + i < rows; i++) {
            const __m512 y = turned ? _mm512_castsi512_ps(x[i]) : _mm512_load_ps((const float *)sums + (q * 4 + i) * TILE_SIDE);
            _mm512_storeu_ps(row_at(c, first + q * 4 + i) + col, turned ? _mm512_add_ps(y, start) : y);
        }
    }
}

/* Columns col .. col + n - 1 of `many` rows from sums[n / 16][many / 16]. */
static void put_sums(const cpu_rows *c, const float *sums, int64_t first, int64_t many, int64_t col, int64_t n, const float *bias,
                     bool turned) {
    for (const int64_t end = col + n; col < end; col += TILE_SIDE) {
        const __m512 start = bias ? _mm512_loadu_ps(bias + col) : _mm512_setzero_ps();
        for (int64_t done = 0; done < many; done += TILE_SIDE, sums += TILE_FLOATS) {
            if (turned)
                put_tile(c, (const uint8_t *)sums, first + done, cpu_min(many - done, TILE_SIDE), col, start, true);
            else
                put_tile(c, (const uint8_t *)sums, first + done, cpu_min(many - done, TILE_SIDE), col, start, false);
        }
    }
}

size_t cpu_packed_work(const espi_stack *w, int64_t rows) {
    (void)rows;
    const size_t sums = ROWS_TOGETHER * CHUNK * sizeof(float), values = 2 * NEAR * TILE_BYTES;
    const size_t depth = (size_t)(w->cols > w->rows ? w->cols : w->rows);
    return sums + values + ROWS_TOGETHER * depth * 2;
}

/* `many` rows from `start` on lie at x, in tiles. */
static void forward_columns(const cpu_rows *c, const cpu_packed *w, const float *bias, const uint8_t *x, float *sums, int64_t start,
                            int64_t many, int64_t col, int64_t n) {
    const int64_t bytes = record_bytes(w->format), blocks = w->cols / RECORD_COLS, stride = blocks * bytes;
    const int64_t tiles = cpu_blocks(many, TILE_SIDE), near = NEAR / 2 / tiles;
    for (const int64_t end = col + n; col < end; col += CHUNK) {
        const int64_t width = cpu_min(end - col, CHUNK);
        const uint8_t *records = w->records + col / RECORD_ROWS * stride;
        for (int64_t b = 0; b < blocks; b += near) {
            const uint8_t *part = records + b * bytes,
                          *next = b + near < blocks ? part + near * bytes : records + width / RECORD_ROWS * stride;
            forward_of[w->format == ESP_MXFP4][tiles - 1](sums, x + b * 2 * tiles * TILE_BYTES, part, next, stride,
                                                          cpu_min(near, blocks - b), width / TILE_SIDE, w->lut, b > 0);
        }
        put_sums(c, sums, start, many, col, width, bias, true);
    }
}

/* Rows of a part: parts have as many tiles as others, or one more. */
static int64_t rows_of_part(int64_t m, int64_t start) {
    const int64_t tiles = cpu_blocks(m - start, TILE_SIDE), parts = cpu_blocks(tiles, TOGETHER);
    return cpu_min(m - start, cpu_blocks(tiles, parts) * TILE_SIDE);
}

void cpu_packed_forward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, const float *bias, int64_t m, cpu_columns columns,
                        void *work, bool again) {
    (void)again;
    float *sums = work;
    uint8_t *x = (uint8_t *)(sums + ROWS_TOGETHER * CHUNK);
    tiles_begin();
    for (int64_t start = 0, many; start < m; start += many) {
        many = rows_of_part(m, start);
        const int64_t apart = cpu_blocks(many, TILE_SIDE) * TILE_BYTES;
        for (int64_t i = 0; i < many; i += TILE_SIDE)
            turn_rows(x + i / TILE_SIDE * TILE_BYTES, apart, a, start + i, cpu_min(many - i, TILE_SIDE), w->cols);
        forward_columns(c, w, bias, x, sums, start, many, columns.first, columns.n);
        if (columns.second) forward_columns(c, w, bias, x, sums, start, many, columns.second, columns.n);
    }
    _tile_release();
}

static void backward_columns(const cpu_rows *c, const cpu_packed *w, const uint8_t *y, float *sums, uint8_t *values, int64_t start,
                             int64_t many, int64_t col, int64_t n) {
    const int64_t bytes = record_bytes(w->format), stride = w->cols / RECORD_COLS * bytes, blocks = w->rows / RECORD_ROWS;
    const int64_t tiles = cpu_blocks(many, TILE_SIDE), near = NEAR / TOGETHER;
    for (const int64_t end = col + n; col < end; col += CHUNK) {
        const int64_t width = cpu_min(end - col, CHUNK);
        for (int64_t b = 0; b < blocks; b += near) {
            const uint8_t *records = w->records + b * stride + col / RECORD_COLS * bytes;
            const uint8_t *next = b + near < blocks ? records + near * stride : w->records + (col + width) / RECORD_COLS * bytes;
            const column part = {records, next, stride, bytes, cpu_min(near, blocks - b), width / TILE_SIDE};
            backward_of[w->format == ESP_MXFP4][tiles - 1](sums, y + b * tiles * TILE_BYTES, &part, values, w->lut, b > 0);
        }
        put_sums(c, sums, start, many, col, width, NULL, false);
    }
}

void cpu_packed_backward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, int64_t m, cpu_columns columns, void *work,
                         bool again) {
    (void)again;
    float *sums = work;
    uint8_t *values = (uint8_t *)(sums + ROWS_TOGETHER * CHUNK), *y = values + 2 * NEAR * TILE_BYTES;
    tiles_begin();
    for (int64_t start = 0, many; start < m; start += many) {
        many = rows_of_part(m, start);
        const int64_t apart = cpu_blocks(many, TILE_SIDE) * TILE_BYTES;
        for (int64_t i = 0; i < many; i += TILE_SIDE)
            pair_rows(y + i / TILE_SIDE * TILE_BYTES, apart, a, start + i, cpu_min(many - i, TILE_SIDE), w->rows);
        backward_columns(c, w, y, sums, values, start, many, columns.first, columns.n);
        if (columns.second) backward_columns(c, w, y, sums, values, start, many, columns.second, columns.n);
    }
    _tile_release();
}
