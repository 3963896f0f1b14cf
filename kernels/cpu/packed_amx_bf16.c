/* Products of bf16 with packed experts in tiles: see packed.h for the layout.  Rows meet weights two by two tiles at a time.  Of 32 columns so
 * much of the depth is decoded, values scaled, as stays in the first cache with what else there is: the first two tiles of rows meet it while
 * the next record is decoded, a piece after each product, the others find it decoded.  Sums wait in memory from one part of the depth to the
 * next, which does not change them.  Rows pass by in the order in which they lie and are not needed again soon, so their tiles are loaded past
 * the first cache.
 *
 * Forward: weights are the left factor, 16 n by 32 k, so that the scale of a row is one number, and the rows of x are the right one, turned
 * so that pairs of k lie beside each other.  Sums come out turned.  Backward: weights are the right factor, 16 pairs of n by 16 k, even k in
 * one tile and odd ones in another. */
#include "kernels/cpu/decode.h"

enum {
    TILE_BYTES = 1024,
    TILE_FLOATS = 256,
    TILE_SIDE = 16,               /* rows of a tile, and floats of a row of sums */
    TILE_DEPTH = 32,              /* of a product of two tiles */
    BLOCK = 2 * TILE_SIDE,        /* rows, and columns, of a product of two by two */
    ROWS_TOGETHER = 4 * BLOCK,    /* that meet what is decoded */
    LEFT_BYTES = 4 * TILE_BYTES,  /* of a decoded record, forward: 32 n by 64 k */
    RIGHT_BYTES = 2 * TILE_BYTES, /* and backward, of half the k */
    LEFT_PART = 5,                /* decoded records that rows meet one after the other, forward */
    RIGHT_PART = 12,              /* and backward */
    RING_BYTES = (RIGHT_PART + 1) * RIGHT_BYTES,
    SUMS_BYTES = ROWS_TOGETHER * BLOCK * (int)sizeof(float),
    AHEAD = 4,                       /* so many records behind one another are fetched before they are decoded */
    FETCHED = RECORD_CODES / 2 + 64, /* of the record behind, backward, beside the first half of one; the rest beside the other */
    PUT_AHEAD = 8,                   /* so many rows of sums are fetched before they are written */
};
_Static_assert(RING_BYTES >= (LEFT_PART + 1) * LEFT_BYTES, "a ring holds a part and a record, forward too");

/* The compiler does not know that these read and write memory. */
#define TILE_LOAD(load, tile, from)                                                                                                        \
    do {                                                                                                                                   \
        __asm__ volatile("" ::: "memory");                                                                                                 \
        load(tile, from, 64);                                                                                                              \
    } while (0)
#define TILE_STORE(tile, to)                                                                                                               \
    do {                                                                                                                                   \
        _tile_stored(tile, to, 64);                                                                                                        \
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
    bf16_turn_fours(x);
}

/* ---- rows ---- */

/* `rows` rows, at most 16, to tiles `apart` bytes apart; rows beyond are 0.  Forward, 32 k turned: */
static void turn_rows(uint8_t *to, int64_t apart, const cpu_rows *a, int64_t first, int64_t rows, int64_t depth) {
    _Alignas(64) uint8_t line[TILE_BYTES] = {0};
    for (int64_t k = 0; k < depth; k += TILE_DEPTH, to += apart) {
        for (int i = 0; i < rows; i++) _mm512_store_si512(line + i * 64, bf16_round_32(row_at(a, first + i) + k));
            /* codes have every fourth pair beside the next */
#pragma GCC unroll 16
        for (int q = 0; q < 4; q++) {
            __m512i x[4];
            turn_quarter(x, line, q);
#pragma GCC unroll 16
            for (int i = 0; i < 4; i++) _mm512_store_si512(to + (i * 4 + q) * 64, x[i]);
        }
    }
}
/* Backward, 32 n as they lie: */
static void round_rows(uint8_t *to, int64_t apart, const cpu_rows *a, int64_t first, int64_t rows, int64_t depth) {
    for (int64_t n = 0; n < depth; n += TILE_DEPTH, to += apart) {
        for (int i = 0; i < rows; i++) _mm512_store_si512(to + i * 64, bf16_round_32(row_at(a, first + i) + n));
        for (int64_t i = rows; i < TILE_SIDE; i++) _mm512_store_si512(to + i * 64, _mm512_setzero_si512());
    }
}

/* ---- decoding ---- */

/* Of four rows' codes the first and the third in the low bits of the bytes; of the others, moved there, with the bit of the second half of
 * a table.  Forward, where that is the same bit of every byte, bits are moved and added by one operation. */
INLINE void split_left(__m512i code[2], __m512i units) {
    code[0] = _mm512_and_si512(units, _mm512_set1_epi8(15));
    code[1] = _mm512_gf2p8affine_epi64_epi8(units, _mm512_set1_epi64(0x1020408000000000), 16); /* bits 4 to 7 become 0 to 3 */
}
INLINE void split_right(__m512i code[2], __m512i units) {
    const __m512i low = _mm512_set1_epi8(15), odd = _mm512_set1_epi32(0x10100000);
    code[0] = _mm512_ternarylogic_epi32(units, low, odd, 0xea); /* units & low | odd */
    code[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi16(units, 4), low, odd, 0xea);
}

/* 32 entries: the values of one row, scaled, then those of another. */
INLINE __m512i two_tables(__m512 lut, const float *first, const float *second) {
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(lut, _mm512_set1_ps(*second)), _mm512_mul_ps(lut, _mm512_set1_ps(*first)));
}

/* Forward, 16 n by 64 k to two tiles 2 KB apart: */
typedef struct left_codes {
    __m512i units[2][4];
    const float *scale[2];
} left_codes;
INLINE void left_load(left_codes *c, float buffer[2][TILE_SIDE], const uint8_t *record, int tile, const bool mx) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const uint8_t *codes = record + tile * (RECORD_CODES / 2) + half * (RECORD_CODES / 4);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) c->units[half][i] = _mm512_loadu_si512(codes + i * 64);
        c->scale[half] = half == 0 || mx ? row_scales(buffer[half], record, tile, half, mx) : NULL;
    }
}
/* rows i, i + 4, i + 8 and i + 12. */
INLINE void left_piece(uint8_t *to, const left_codes *c, __m512 lut, const int i, const bool mx) {
    __m512i low, high;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        uint8_t *row = to + half * 2 * TILE_BYTES + i * 64;
        __m512i code[2];
        if (half == 0 || mx) {
            low = two_tables(lut, c->scale[half] + i, c->scale[half] + i + 4);
            high = two_tables(lut, c->scale[half] + i + 8, c->scale[half] + i + 12);
        }
        split_left(code, c->units[half][i]);
        _mm512_store_si512(row, _mm512_permutexvar_epi16(code[0], low));
        _mm512_store_si512(row + 4 * 64, _mm512_permutexvar_epi16(code[1], low));
        _mm512_store_si512(row + 8 * 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(code[0], 8), high));
        _mm512_store_si512(row + 12 * 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(code[1], 8), high));
    }
}

/* Backward, 32 n by 32 k to two tiles, of even k and of odd ones, every fourth beside the next.  Piece p of four: of n 16 (p / 2) .. 16 (p / 2)
 * + 15 two of every four. */
INLINE void right_piece(uint8_t *to, const uint8_t *record, int half, __m512 lut, const int p, const bool mx) {
    _Alignas(64) float buffer[TILE_SIDE];
    const int tile = p / 2, two = p % 2 * 2;
    const float *scale = row_scales(buffer, record, tile, half, mx) + two;
    const uint8_t *first = record + tile * (RECORD_CODES / 2) + half * (RECORD_CODES / 4) + two * 64, *second = first + 64;
    __m512i code[2][2];
    /* codes of the two for one k beside each other: of one every other unit from a unit further on or back */
    split_right(code[0], _mm512_mask_loadu_epi16(_mm512_loadu_si512(first), 0xaaaaaaaa, second - 2));
    split_right(code[1], _mm512_mask_loadu_epi16(_mm512_loadu_si512(second), 0x55555555, first + 2));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i values = two_tables(lut, scale + 4 * i, scale + 4 * i + 1);
        uint8_t *row = to + (tile * 8 + 2 * i + two / 2) * 64;
#pragma GCC unroll 2
        for (int parity = 0; parity < 2; parity++) {
            const __m512i at = i < 2 ? code[parity][i] : _mm512_srli_epi16(code[parity][i - 2], 8);
            _mm512_store_si512(row + parity * TILE_BYTES, _mm512_permutexvar_epi16(at, values));
        }
    }
}

/* ---- products ---- */

/* Of 32 columns a part of the depth: `records` of them, `stride` apart, which lie decoded, or are about to, in a ring from `slot` on. */
typedef struct part {
    uint8_t *ring;
    int64_t slots, slot;
    const uint8_t *record;
    int64_t stride, records;
    bool decode;          /* all but the first, which is decoded */
    int half;             /* backward: which k of the records */
    const uint8_t *after; /* what is decoded last, behind all; NULL: nothing */
    int after_half;
} part;

#define MULTIPLY(sum, weights, row)                                                                                                        \
    if (multiply && left)                                                                                                                  \
        _tile_dpbf16ps(sum, weights, row);                                                                                                 \
    else if (multiply)                                                                                                                     \
    _tile_dpbf16ps(sum, row, weights)
#define TAKE(load, tile, from)                                                                                                             \
    if (multiply) TILE_LOAD(load, tile, from)

/* `rows` tiles at x meet two at w; pieces of something else are done in between. */
#define TWO_BY_TWO(w, x, PIECE)                                                                                                            \
    TAKE(_tile_loadd, 4, w);                                                                                                               \
    TAKE(_tile_stream_loadd, 6, x);                                                                                                        \
    MULTIPLY(0, 4, 6);                                                                                                                     \
    PIECE(0);                                                                                                                              \
    TAKE(_tile_loadd, 5, (w) + TILE_BYTES);                                                                                                \
    MULTIPLY(1, 5, 6);                                                                                                                     \
    PIECE(1);                                                                                                                              \
    if (rows == 2) {                                                                                                                       \
        TAKE(_tile_stream_loadd, 7, (x) + TILE_BYTES);                                                                                     \
        MULTIPLY(2, 4, 7);                                                                                                                 \
    }                                                                                                                                      \
    PIECE(2);                                                                                                                              \
    if (rows == 2) {                                                                                                                       \
        MULTIPLY(3, 5, 7);                                                                                                                 \
    }                                                                                                                                      \
    PIECE(3)

INLINE void left_step(const uint8_t *x, const uint8_t *w, uint8_t *to, const uint8_t *from, __m512 lut, const int rows, const bool mx,
                      const bool decode, const bool multiply) {
    const bool left = true;
    _Alignas(64) float buffer[2][TILE_SIDE];
    left_codes codes;
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) {
#define PIECE(i)                                                                                                                           \
    if (decode && i == 0) left_load(&codes, buffer, from, k, mx);                                                                          \
    if (decode) left_piece(to + k * TILE_BYTES, &codes, lut, i, mx)
        TWO_BY_TWO(w + k * 2 * TILE_BYTES, x + k * rows * TILE_BYTES, PIECE);
#undef PIECE
    }
}

INLINE void right_step(const uint8_t *x, const uint8_t *w, uint8_t *to, const uint8_t *from, int half, __m512 lut, const int rows,
                       const bool mx, const bool decode, const bool multiply) {
    const bool left = false;
#define PIECE(i)                                                                                                                           \
    if (decode) right_piece(to, from, half, lut, i, mx)
    TWO_BY_TWO(w, x, PIECE);
#undef PIECE
}

#define SUMS(of)                                                                                                                           \
    of(0);                                                                                                                                 \
    of(1);                                                                                                                                 \
    of(2);                                                                                                                                 \
    of(3)
#define BEGIN(j)                                                                                                                           \
    if (j / 2 < rows) {                                                                                                                    \
        if (add)                                                                                                                           \
            TILE_LOAD(_tile_loadd, j, sums + j * TILE_FLOATS);                                                                             \
        else                                                                                                                               \
            _tile_zero(j);                                                                                                                 \
    }
#define KEEP(j)                                                                                                                            \
    if (j / 2 < rows) TILE_STORE(j, sums + j * TILE_FLOATS)

/* sums[rows][2] (+)= `rows` tiles of rows times two of weights, over a part of the depth. */
INLINE void multiply_part(float *sums, const uint8_t *x, const part *p, const float *table, bool add, const int rows, const bool left,
                          const bool mx) {
    const int64_t decoded = left ? LEFT_BYTES : RIGHT_BYTES, bytes = record_bytes(mx ? ESP_MXFP4 : ESP_NF4);
    const __m512 lut = _mm512_loadu_ps(table);
    const uint8_t *record = p->record;
    int64_t slot = p->slot;
    SUMS(BEGIN);
    for (int64_t r = 0; r < p->records; r++, x += rows * (decoded / 2)) {
        const uint8_t *w = p->ring + slot * decoded;
        const bool last = r + 1 == p->records;
        record += p->stride;
        slot = slot + 1 == p->slots ? 0 : slot + 1;
        const uint8_t *from = last ? p->after : p->decode ? record : NULL;
        uint8_t *to = p->ring + slot * decoded;
        const int half = last ? p->after_half : p->half;
        if (left && from) {
            prefetch_record(from + AHEAD * bytes, bytes);
            left_step(x, w, to, from, lut, rows, mx, true, true);
        } else if (left) {
            left_step(x, w, to, from, lut, rows, mx, false, true);
        } else if (from) {
            prefetch_record(from + bytes + half * FETCHED, half ? bytes - FETCHED : FETCHED);
            right_step(x, w, to, from, half, lut, rows, mx, true, true);
        } else {
            right_step(x, w, to, from, half, lut, rows, mx, false, true);
        }
    }
    SUMS(KEEP);
}

typedef void multiply_fn(float *sums, const uint8_t *x, const part *p, const float *lut, bool add);
typedef void decode_fn(uint8_t *to, const uint8_t *record, int half, const float *lut);
#define MULTIPLIES(rows, mx)                                                                                                               \
    static void left_##rows##_##mx(float *sums, const uint8_t *x, const part *p, const float *lut, bool add) {                             \
        multiply_part(sums, x, p, lut, add, rows, true, mx);                                                                               \
    }                                                                                                                                      \
    static void right_##rows##_##mx(float *sums, const uint8_t *x, const part *p, const float *lut, bool add) {                            \
        multiply_part(sums, x, p, lut, add, rows, false, mx);                                                                              \
    }
MULTIPLIES(1, 0)
MULTIPLIES(2, 0)
MULTIPLIES(1, 1)
MULTIPLIES(2, 1)
#define DECODES(mx)                                                                                                                        \
    static void decode_left_##mx(uint8_t *to, const uint8_t *record, int half, const float *lut) {                                         \
        (void)half;                                                                                                                        \
        left_step(NULL, NULL, to, record, _mm512_loadu_ps(lut), 2, mx, true, false);                                                       \
    }                                                                                                                                      \
    static void decode_right_##mx(uint8_t *to, const uint8_t *record, int half, const float *lut) {                                        \
        right_step(NULL, NULL, to, record, half, _mm512_loadu_ps(lut), 2, mx, true, false);                                                \
    }
DECODES(0)
DECODES(1)
/* [left][MXFP4][tiles of rows - 1] */
static multiply_fn *const multiply_of[2][2][2] = {{{right_1_0, right_2_0}, {right_1_1, right_2_1}},
                                                  {{left_1_0, left_2_0}, {left_1_1, left_2_1}}};
static decode_fn *const decode_of[2][2] = {{decode_right_0, decode_right_1}, {decode_left_0, decode_left_1}};

/* ---- sums to where they belong ---- */

/* 32 columns of a row that will be written soon. */
INLINE void fetch_row(const cpu_rows *c, int64_t row, int64_t end, int64_t col) {
    if (row >= end) return;
    const char *line = (const char *)(row_at(c, row) + col);
    _mm_prefetch(line, _MM_HINT_T0);
    _mm_prefetch(line + 64, _MM_HINT_T0);
}
/* Of two tiles whose rows are columns: 32 columns of up to 16 rows, of those before `end`. */
static void put_turned(const cpu_rows *c, const float *sums, int64_t first, int64_t rows, int64_t end, int64_t col, const float *bias) {
    for (int q = 0; q < 4 && q * 4 < rows; q++) {
        for (int i = 0; i < 4; i++) fetch_row(c, first + q * 4 + i + PUT_AHEAD, end, col);
        for (int n = 0; n < 2; n++) {
            const __m512 start = bias ? _mm512_loadu_ps(bias + col + n * TILE_SIDE) : _mm512_setzero_ps();
            __m512i x[4];
            turn_quarter(x, (const uint8_t *)(sums + n * TILE_FLOATS), q);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                if (q * 4 + i < rows)
                    _mm512_storeu_ps(row_at(c, first + q * 4 + i) + col + n * TILE_SIDE, _mm512_add_ps(_mm512_castsi512_ps(x[i]), start));
        }
    }
}
/* Of one with even and one with odd columns. */
static void put_zipped(const cpu_rows *c, const float *sums, int64_t first, int64_t rows, int64_t end, int64_t col) {
    const __m512i low = _mm512_set_epi32(29, 13, 25, 9, 21, 5, 17, 1, 28, 12, 24, 8, 20, 4, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(2));
    for (int64_t i = 0; i < rows; i++, sums += TILE_SIDE) {
        const __m512 even = _mm512_load_ps(sums), odd = _mm512_load_ps(sums + TILE_FLOATS);
        float *to = row_at(c, first + i) + col;
        fetch_row(c, first + i + PUT_AHEAD, end, col);
        _mm512_storeu_ps(to, _mm512_permutex2var_ps(even, low, odd));
        _mm512_storeu_ps(to + TILE_SIDE, _mm512_permutex2var_ps(even, high, odd));
    }
}

/* ---- the kernels ---- */

size_t cpu_packed_work(const espi_stack *w, int64_t rows) {
    const int64_t depth = w->cols > w->rows ? w->cols : w->rows, together = cpu_min(cpu_blocks(rows, BLOCK) * BLOCK, ROWS_TOGETHER);
    return SUMS_BYTES + RING_BYTES + (size_t)(together * depth * 2);
}

/* A product.  Its rows start .. start + many - 1 lie at x, in tiles; the first record of the next columns lies decoded in `slot`. */
typedef struct product {
    const cpu_rows *c;
    const cpu_packed *w;
    const float *bias;
    bool left;
    float *sums;
    uint8_t *ring, *x;
    int64_t start, many, slot;
} product;

/* Rows of tile t, and tiles of the pair that it begins. */
static int64_t rows_of(const product *p, int64_t t) {
    return cpu_min(p->many - t * TILE_SIDE, TILE_SIDE);
}
static int64_t tiles_of(const product *p, int64_t t) {
    return cpu_min(cpu_blocks(p->many, TILE_SIDE) - t, 2);
}

/* Pairs of tiles lie step by step of the depth beside each other. */
static void take_rows(const product *p, const cpu_rows *a) {
    const int64_t depth = p->left ? p->w->cols : p->w->rows;
    for (int64_t t = 0; t * TILE_SIDE < p->many; t++) {
        uint8_t *to = p->x + t / 2 * depth * BLOCK * 2 + t % 2 * TILE_BYTES;
        const int64_t apart = tiles_of(p, t / 2 * 2) * TILE_BYTES;
        (p->left ? turn_rows : round_rows)(to, apart, a, p->start + t * TILE_SIDE, rows_of(p, t), depth);
    }
}

static void put_block(const product *p, int64_t col) {
    const int64_t end = p->start + p->many;
    for (int i = 0; i < PUT_AHEAD; i++) fetch_row(p->c, p->start + i, end, col);
    for (int64_t t = 0; t * TILE_SIDE < p->many; t++) {
        const float *sums = p->sums + t * 2 * TILE_FLOATS;
        const int64_t first = p->start + t * TILE_SIDE;
        if (p->left)
            put_turned(p->c, sums, first, rows_of(p, t), end, col, p->bias);
        else
            put_zipped(p->c, sums, first, rows_of(p, t), end, col);
    }
}

/* 32 columns, whose records begin at `record`; next: those of the columns that follow, or NULL. */
static void multiply_block(product *p, const uint8_t *record, int64_t stride, const uint8_t *next, int64_t col) {
    const bool mx = p->w->format == ESP_MXFP4;
    const int64_t decoded = p->left ? LEFT_BYTES : RIGHT_BYTES, most = p->left ? LEFT_PART : RIGHT_PART;
    const int64_t all = p->left ? p->w->cols / RECORD_COLS : p->w->rows / RECORD_ROWS, tile_bytes = all * (decoded / 2);
    const int half = (int)(col / BLOCK % 2);
    part k = {.ring = p->ring, .slots = most + 1, .stride = stride, .half = half};
    for (int64_t done = 0; done < all; done += k.records) {
        k.slot = p->slot;
        k.record = record + done * stride;
        k.records = cpu_min(most, all - done);
        const bool last = done + k.records == all;
        k.after_half = last ? !half : half;
        for (int64_t t = 0; t * TILE_SIDE < p->many; t += 2) {
            const int64_t tiles = tiles_of(p, t);
            k.decode = t == 0;
            k.after = (t + 2) * TILE_SIDE < p->many ? NULL : last ? next : k.record + k.records * stride;
            multiply_of[p->left][mx][tiles - 1](p->sums + t * 2 * TILE_FLOATS, p->x + t * tile_bytes + done * tiles * (decoded / 2), &k,
                                                p->w->lut, done > 0);
        }
        p->slot = (p->slot + k.records) % k.slots;
    }
    put_block(p, col);
}

/* The record with which a block of columns begins. */
static const uint8_t *record_of(const product *p, int64_t col) {
    const int64_t bytes = record_bytes(p->w->format);
    return p->w->records + (p->left ? col / RECORD_ROWS * (p->w->cols / RECORD_COLS) : col / RECORD_COLS) * bytes;
}

static void multiply_columns(product *p, int64_t col, int64_t n) {
    const int64_t bytes = record_bytes(p->w->format), stride = p->left ? bytes : p->w->cols / RECORD_COLS * bytes;
    p->slot = 0;
    decode_of[p->left][p->w->format == ESP_MXFP4](p->ring, record_of(p, col), 0, p->w->lut);
    for (const int64_t end = col + n; col < end; col += BLOCK)
        multiply_block(p, record_of(p, col), stride, col + BLOCK < end ? record_of(p, col + BLOCK) : NULL, col);
}

/* Parts of the rows have as many pairs of tiles as others, or one more. */
static void multiply_rows(product p, void *memory, const cpu_rows *a, int64_t m, cpu_columns columns) {
    const int64_t pairs = cpu_blocks(m, BLOCK), most = cpu_blocks(pairs, cpu_blocks(pairs, ROWS_TOGETHER / BLOCK)) * BLOCK;
    p.sums = memory;
    p.ring = (uint8_t *)memory + SUMS_BYTES;
    p.x = p.ring + RING_BYTES;
    tiles_begin();
    for (; p.start < m; p.start += p.many) {
        p.many = cpu_min(m - p.start, most);
        take_rows(&p, a);
        multiply_columns(&p, columns.first, columns.n);
        if (columns.second) multiply_columns(&p, columns.second, columns.n);
    }
    _tile_release();
}

void cpu_packed_forward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, const float *bias, int64_t m, cpu_columns columns,
                        void *memory, bool again) {
    (void)again;
    multiply_rows((product){.c = c, .w = w, .bias = bias, .left = true}, memory, a, m, columns);
}

void cpu_packed_backward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, int64_t m, cpu_columns columns, void *memory,
                         bool again) {
    (void)again;
    multiply_rows((product){.c = c, .w = w, .left = false}, memory, a, m, columns);
}
