/* Products in bf16: register tiles, panels, rounding. */
#include "kernels/cpu/bf16.h"

#define INLINE static inline __attribute__((always_inline))

enum { ROWS = 6, VECS = 4, WORDS = 16 };

/* ---- tiles ---- */

INLINE void tile(float *const *c, const bf16_left *left, const uint32_t *panel, int64_t stride, int64_t pairs, __mmask16 last, bool add,
                 const int rows, const int vecs) {
    __m512 sum[ROWS][VECS];
    CPU_UNROLL
    for (int i = 0; i < rows; i++) {
        CPU_UNROLL
        for (int j = 0; j < vecs; j++) sum[i][j] = _mm512_maskz_loadu_ps(add ? (j == vecs - 1 ? last : 0xffff) : 0, c[i] + j * WORDS);
    }
    const uint32_t *x = left->pairs;
    const int64_t row = left->row, step = left->step;
    for (int64_t p = 0; p < pairs; p++, x += step, panel += stride) {
        __m512bh b[VECS];
        CPU_UNROLL
        for (int j = 0; j < vecs; j++) b[j] = (__m512bh)_mm512_loadu_si512(panel + j * WORDS);
        CPU_UNROLL
        for (int i = 0; i < rows; i++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32((int)x[i * row]);
            CPU_UNROLL
            for (int j = 0; j < vecs; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], a, b[j]);
        }
    }
    CPU_UNROLL
    for (int i = 0; i < rows; i++) {
        CPU_UNROLL
        for (int j = 0; j < vecs; j++) _mm512_mask_storeu_ps(c[i] + j * WORDS, j == vecs - 1 ? last : 0xffff, sum[i][j]);
    }
}

typedef void tile_fn(float *const *c, const bf16_left *left, const uint32_t *panel, int64_t stride, int64_t pairs, __mmask16 last,
                     bool add);
#define TILE(rows, vecs)                                                                                                                   \
    static void tile_##rows##_##vecs(float *const *c, const bf16_left *left, const uint32_t *panel, int64_t stride, int64_t pairs,         \
                                     __mmask16 last, bool add) {                                                                           \
        tile(c, left, panel, stride, pairs, last, add, rows, vecs);                                                                        \
    }
#define TILES(vecs) TILE(1, vecs) TILE(2, vecs) TILE(3, vecs) TILE(4, vecs) TILE(5, vecs) TILE(6, vecs)
TILES(1)
TILES(2)
TILES(3)
TILES(4)
#define TABLE(vecs)                                                                                                                        \
    { tile_1_##vecs, tile_2_##vecs, tile_3_##vecs, tile_4_##vecs, tile_5_##vecs, tile_6_##vecs }
static tile_fn *const tiles[VECS][ROWS] = {TABLE(1), TABLE(2), TABLE(3), TABLE(4)};

void bf16_tiles(const cpu_rows *c, const bf16_left *left, const uint32_t *panel, int64_t stride, int64_t m, int64_t pairs, int64_t n,
                bool add) {
    for (int64_t col = 0; col < n; col += VECS * WORDS) {
        const int64_t width = cpu_min(n - col, VECS * WORDS), vecs = cpu_blocks(width, WORDS);
        const __mmask16 last = (__mmask16)(0xffffu >> (vecs * WORDS - width));
        for (int64_t first = 0; first < m; first += ROWS) {
            const int64_t rows = cpu_min(m - first, ROWS);
            const bf16_left from = {left->pairs + first * left->row, left->row, left->step};
            float *to[ROWS];
            for (int64_t i = 0; i < rows; i++) to[i] = row_at(c, first + i) + col;
            tiles[vecs - 1][rows - 1](to, &from, panel + col, stride, pairs, last, add);
        }
    }
}

/* ---- rounding and panels ---- */

/* Up to 16 floats of x from `at` on, 0 where x has no more. */
INLINE __m512 load_some(const float *x, int64_t at, int64_t n) {
    const int64_t left = n - at;
    if (left >= WORDS) return _mm512_loadu_ps(x + at);
    return _mm512_maskz_loadu_ps(left > 0 ? (__mmask16)((1u << left) - 1) : 0, x + at);
}

INLINE __m512i round_32(const float *x, int64_t at, int64_t n) {
    return (__m512i)_mm512_cvtne2ps_pbh(load_some(x, at + WORDS, n), load_some(x, at, n));
}

void bf16_round_rows(const bf16_rows *to, const cpu_rows *from, int64_t m, int64_t n) {
    for (int64_t i = 0; i < m; i++) {
        const float *x = row_at(from, i);
        uint16_t *out = to->base + i * to->stride;
        for (int64_t at = 0; at < bf16_stride(n); at += 2 * WORDS) _mm512_storeu_si512(out + at, round_32(x, at, n));
    }
}

void bf16_pair_rows(uint32_t *panel, const float *x, const float *y, int64_t n) {
    for (int64_t at = 0; at < n; at += WORDS) {
        const __m512 second = y ? load_some(y, at, n) : _mm512_setzero_ps();
        _mm512_storeu_si512(panel + at, bf16_interleave((__m512i)_mm512_cvtne2ps_pbh(second, load_some(x, at, n))));
    }
}

/* 16 rows of 16 words are to become columns: within fours of rows and of columns they do, and fours are gathered by two. */
INLINE void turn_words(__m512i x[WORDS]) {
    CPU_UNROLL
    for (int i = 0; i < WORDS; i += 4) bf16_turn_fours(x + i);
    CPU_UNROLL
    for (int i = 0; i < WORDS / 2; i++) {
        const int at = i / 4 * 8 + i % 4;
        const __m512i a = x[at], b = x[at + 4];
        x[at] = _mm512_shuffle_i32x4(a, b, 0x88);
        x[at + 4] = _mm512_shuffle_i32x4(a, b, 0xdd);
    }
}
/* Column p of what was turned. */
INLINE __m512i turned(const __m512i x[WORDS], const int p) {
    const int at = p % 8;
    return p < 8 ? _mm512_shuffle_i32x4(x[at], x[at + 8], 0x88) : _mm512_shuffle_i32x4(x[at], x[at + 8], 0xdd);
}

/* Stores the first `pairs` columns of a block that was turned. */
INLINE void store_words(uint32_t *panel, int64_t stride, const __m512i x[WORDS], int64_t pairs) {
    if (pairs >= WORDS) {
        CPU_UNROLL
        for (int i = 0; i < WORDS; i++) _mm512_storeu_si512(panel + i * stride, turned(x, i));
    } else {
        _Alignas(64) uint32_t words[WORDS][WORDS];
        CPU_UNROLL
        for (int i = 0; i < WORDS; i++) _mm512_store_si512(words[i], turned(x, i));
        for (int64_t i = 0; i < pairs; i++) memcpy(panel + i * stride, words[i], sizeof words[i]);
    }
}

/* A row that is not there. */
static const float no_floats[2 * WORDS];
static const uint16_t no_halves[2 * WORDS];

/* The lanes of 32 values that lie before the n-th, the first of them being value `at`. */
INLINE __mmask32 lanes_32(int64_t at, int64_t n) {
    return n - at >= 2 * WORDS ? 0xffffffffu : (__mmask32)((1u << (n - at)) - 1);
}

void bf16_transpose(uint32_t *panel, int64_t stride, const float *const *row, int64_t rows, int64_t n) {
    for (int64_t at = 0; at < n; at += 2 * WORDS) {
        const __mmask32 some = lanes_32(at, n);
        __m512i x[WORDS];
        CPU_UNROLL
        for (int i = 0; i < WORDS; i++) {
            const float *from = i < rows ? row[i] + at : no_floats;
            const __m512 low = _mm512_maskz_loadu_ps((__mmask16)some, from),
                         high = _mm512_maskz_loadu_ps((__mmask16)(some >> 16), from + WORDS);
            x[i] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
        }
        turn_words(x);
        store_words(panel + at / 2 * stride, stride, x, (n - at + 1) / 2);
    }
}

/* ---- products with a weight ---- */

/* A panel holds DEPTH steps of the sum for COLS columns: 64 KiB, which the second cache keeps while the rows pass; FEW rows need none. */
enum { DEPTH = 512, COLS = 64, LINE = 64, ROWS_AHEAD = 48, FEW = 8 };

/* Asks for n values of a row that will be read soon: a panel takes a piece of each of many rows, which the machine does not foresee. */
INLINE void fetch(const cpu_weight *w, int64_t row, int64_t col, int64_t n) {
    if (w->stack) return;
    const int64_t size = w->dtype == ESP_F32 ? 4 : 2;
    const char *at = (const char *)w->data + (row * w->cols + col) * size;
    for (int64_t i = 0; i < n * size; i += LINE) __builtin_prefetch(at + i, 0, 2);
}

/* A row from `col` on where it lies as floats that are only to be rounded, or NULL. */
static const float *float_row(const cpu_weight *w, int64_t row, int64_t col) {
    if (w->stack || w->dtype != ESP_F32 || w->scale != 1) return NULL;
    return (const float *)w->data + row * w->cols + col;
}

/* n values of another row as bits of bf16: where they lie, or rounded into `buffer`. */
static const uint16_t *half_row(uint16_t buffer[DEPTH], const cpu_weight *w, int64_t row, int64_t col, int64_t n) {
    if (!w->stack && w->dtype == ESP_BF16 && w->scale == 1) return (const uint16_t *)w->data + row * w->cols + col;
    float decoded[DEPTH];
    cpu_decode_row(decoded, w, row, col, n);
    for (int64_t at = 0; at < n; at += 2 * WORDS) _mm512_storeu_si512(buffer + at, round_32(decoded, at, n));
    return buffer;
}

/* panel[p][j] = pair p of row col + j of w, from k0 on. */
static void pack_transposed(uint32_t *panel, const cpu_weight *w, int64_t k0, int64_t depth, int64_t col, int64_t n) {
    _Alignas(64) uint16_t buffer[WORDS][DEPTH];
    for (int64_t j = 0; j < n; j += WORDS) {
        const int64_t rows = cpu_min(n - j, WORDS);
        const uint16_t *row[WORDS];
        const float *floats[WORDS];
        for (int64_t i = 0; i < rows; i++) {
            fetch(w, col + j + i + ROWS_AHEAD, k0, depth);
            floats[i] = float_row(w, col + j + i, k0);
            if (!floats[i]) row[i] = half_row(buffer[i], w, col + j + i, k0, depth);
        }
        if (floats[0]) {
            bf16_transpose(panel + j, COLS, floats, rows, depth);
            continue;
        }
        for (int64_t at = 0; at < depth; at += 2 * WORDS) {
            const __mmask32 some = lanes_32(at, depth);
            __m512i x[WORDS];
            CPU_UNROLL
            for (int i = 0; i < WORDS; i++) {
                const uint16_t *from = i < rows ? row[i] + at : no_halves; /* NOLINT(clang-analyzer-core.*): no row or all are floats */
                x[i] = _mm512_maskz_loadu_epi16(some, from);
            }
            turn_words(x);
            store_words(panel + at / 2 * COLS + j, COLS, x, (depth - at + 1) / 2);
        }
    }
}

/* panel[p][j] = elements col + j of rows k0 + 2 p and k0 + 2 p + 1 of w. */
static void pack_plain(uint32_t *panel, const cpu_weight *w, int64_t k0, int64_t depth, int64_t col, int64_t n) {
    _Alignas(64) uint16_t buffer[2][DEPTH];
    for (int64_t k = 0; k < depth; k += 2) {
        fetch(w, k0 + k + ROWS_AHEAD, col, n);
        fetch(w, k0 + k + ROWS_AHEAD + 1, col, n);
        const float *first = float_row(w, k0 + k, col);
        if (first) {
            bf16_pair_rows(panel + k / 2 * COLS, first, k + 1 < depth ? float_row(w, k0 + k + 1, col) : NULL, n);
            continue;
        }
        const uint16_t *x = half_row(buffer[0], w, k0 + k, col, n), *y = NULL;
        if (k + 1 < depth) y = half_row(buffer[1], w, k0 + k + 1, col, n);
        for (int64_t at = 0; at < n; at += WORDS) {
            const __mmask16 some = n - at >= WORDS ? 0xffff : (__mmask16)((1u << (n - at)) - 1);
            const __m256i first = _mm256_maskz_loadu_epi16(some, x + at), second = _mm256_maskz_loadu_epi16(y ? some : 0, y + (y ? at : 0));
            _mm512_storeu_si512(panel + k / 2 * COLS + at, bf16_interleave(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1)));
        }
    }
}

/* sum + a pair in memory times 16 pairs, as one instruction: the compiler would make two. */
INLINE __m512 dot_one(__m512 sum, __m512bh b, const uint16_t *pair) {
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*(const uint16_t(*)[2])pair));
    return sum;
}

/* Few rows meet 16 columns, rows of w, which become pairs of columns in registers: nothing is packed.  What the next 16 columns need is asked
 * for in the order in which it lies. */
INLINE void few(const cpu_rows *c, const bf16_rows *a, const char *w, int64_t stride, int64_t depth, bool add, const int rows,
                const bool floats) {
    enum { STEP = 2 * WORDS };
    const int size = floats ? 4 : 2;
    const char *next = w + WORDS * stride;
    __m512 sum[FEW];
    CPU_UNROLL
    for (int i = 0; i < rows; i++) sum[i] = _mm512_maskz_loadu_ps(add ? 0xffff : 0, row_at(c, i));
    for (int64_t k = 0; k < depth; k += STEP, w += STEP * size) {
        __m512i x[WORDS];
        for (int i = 0; i < WORDS * STEP * size / LINE; i++, next += LINE) __builtin_prefetch(next, 0, 2);
        const char *from = w;
        CPU_UNROLL
        for (int i = 0; i < WORDS; i++, from += stride) {
            x[i] = floats ? bf16_round_32((const float *)(const void *)from) : _mm512_loadu_si512(from);
            __asm__("" : "+v"(x[i]), "+r"(from)); /* sixteen multiples of the stride would take all registers */
        }
        turn_words(x);
        CPU_UNROLL
        for (int p = 0; p < WORDS; p++) {
            const __m512bh b = (__m512bh)turned(x, p);
            CPU_UNROLL
            for (int i = 0; i < rows; i++) sum[i] = dot_one(sum[i], b, a->base + i * a->stride + k + 2 * p);
        }
    }
    CPU_UNROLL
    for (int i = 0; i < rows; i++) _mm512_storeu_ps(row_at(c, i), sum[i]);
}

typedef void few_fn(const cpu_rows *c, const bf16_rows *a, const char *w, int64_t stride, int64_t depth, bool add);
#define FEW_ROWS(rows, floats)                                                                                                             \
    static void few_##rows##_##floats(const cpu_rows *c, const bf16_rows *a, const char *w, int64_t stride, int64_t depth, bool add) {     \
        few(c, a, w, stride, depth, add, rows, floats);                                                                                    \
    }
#define FEW_ALL(floats)                                                                                                                    \
    FEW_ROWS(1, floats)                                                                                                                    \
    FEW_ROWS(2, floats)                                                                                                                    \
    FEW_ROWS(3, floats)                                                                                                                    \
    FEW_ROWS(4, floats)                                                                                                                    \
    FEW_ROWS(5, floats)                                                                                                                    \
    FEW_ROWS(6, floats)                                                                                                                    \
    FEW_ROWS(7, floats)                                                                                                                    \
    FEW_ROWS(8, floats)
FEW_ALL(0)
FEW_ALL(1)
#define FEW_TABLE(floats)                                                                                                                  \
    { few_1_##floats, few_2_##floats, few_3_##floats, few_4_##floats, few_5_##floats, few_6_##floats, few_7_##floats, few_8_##floats }
static few_fn *const few_rows[2][FEW] = {FEW_TABLE(0), FEW_TABLE(1)};

/* How many of n columns are done so. */
static int64_t few_columns(const cpu_weight *b, int64_t m, int64_t depth, int64_t n) {
    const bool plain = b->transposed && !b->stack && b->scale == 1 && (b->dtype == ESP_F32 || b->dtype == ESP_BF16);
    return plain && m <= FEW && depth % (2 * WORDS) == 0 ? n / WORDS * WORDS : 0;
}

void bf16_product(const cpu_rows *c, const bf16_rows *a, const cpu_weight *b, int64_t m, int64_t depth, int64_t col, int64_t n, bool add) {
    _Alignas(64) uint32_t panel[DEPTH / 2 * COLS];
    if (m == 0) return;
    const int64_t few = few_columns(b, m, depth, n), stride = b->cols * (b->dtype == ESP_F32 ? 4 : 2);
    for (int64_t done = 0; done < few; done += WORDS)
        few_rows[b->dtype == ESP_F32][m - 1](&(cpu_rows){c->base + done, c->stride, c->index}, a,
                                             (const char *)b->data + (col + done) * stride, stride, depth, add);
    for (int64_t done = few; done < n; done += COLS) {
        const int64_t width = cpu_min(n - done, COLS);
        const cpu_rows to = {c->base + done, c->stride, c->index};
        for (int64_t k = 0; k < depth; k += DEPTH) {
            const int64_t steps = cpu_min(depth - k, DEPTH);
            const bf16_left left = bf16_left_of(a, 0, k);
            if (b->transposed)
                pack_transposed(panel, b, k, steps, col + done, width);
            else
                pack_plain(panel, b, k, steps, col + done, width);
            bf16_tiles(&to, &left, panel, COLS, m, cpu_blocks(steps, 2), width, add || k > 0);
        }
    }
}
