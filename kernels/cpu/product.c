/* The matrix product of the cpu backend: weights are decoded to f32 and packed a panel at a time, and a register tile runs over the rows.
 */
#include "kernels/cpu/cpu.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

/* One term of a tile's sums: `depth` steps of rows a[i] against a panel, whose rows lie `stride` apart. */
typedef struct term {
    const float *a[TILE_ROWS];
    const float *panel;
    int64_t stride, depth;
} term;

/* c[i] = (add ? c[i] : 0) + (sum of the terms' a[i] * panel) for `rows` rows and `vecs` vectors, both constants where this is inlined: the
 * accumulators are registers. */
INLINE void tile(float *const *c, const term *terms, int n_terms, bool add, const int rows, const int vecs) {
    vec sum[TILE_ROWS][TILE_VECS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) sum[i][j] = (vec){0};
    for (const term *t = terms; t < terms + n_terms; t++) {
        const float *a[TILE_ROWS], *panel = t->panel;
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) a[i] = t->a[i];
        for (int64_t k = 0, depth = t->depth, stride = t->stride; k < depth; k++) {
            vec b[TILE_VECS];
#pragma GCC unroll 8
            for (int j = 0; j < vecs; j++) b[j] = load(panel + k * stride + j * LANES);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                const vec x = splat(a[i][k]);
#pragma GCC unroll 8
                for (int j = 0; j < vecs; j++) sum[i][j] = x * b[j] + sum[i][j];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < vecs; j++) store(c[i] + j * LANES, add ? load(c[i] + j * LANES) + sum[i][j] : sum[i][j]);
}

typedef void tile_fn(float *const *c, const term *terms, int n_terms, bool add);
#define TILE(rows, vecs)                                                                                                                   \
    static void tile_##rows##_##vecs(float *const *c, const term *terms, int n_terms, bool add) {                                          \
        tile(c, terms, n_terms, add, rows, vecs);                                                                                          \
    }
#define TILES(vecs) TILE(1, vecs) TILE(2, vecs) TILE(3, vecs) TILE(4, vecs)
TILES(1)
TILES(2)
#if defined(__AVX2__)
TILE(5, 1)
TILE(6, 1)
TILE(5, 2)
TILE(6, 2)
#define TILE_TABLE(vecs)                                                                                                                   \
    { tile_1_##vecs, tile_2_##vecs, tile_3_##vecs, tile_4_##vecs, tile_5_##vecs, tile_6_##vecs }
#else
#define TILE_TABLE(vecs)                                                                                                                   \
    { tile_1_##vecs, tile_2_##vecs, tile_3_##vecs, tile_4_##vecs }
#endif
#if defined(__AVX512F__)
TILES(3)
TILES(4)
TILE(5, 3)
TILE(6, 3)
TILE(5, 4)
TILE(6, 4)
#endif
static tile_fn *const tiles[TILE_VECS][TILE_ROWS] = {
    TILE_TABLE(1),
    TILE_TABLE(2),
#if defined(__AVX512F__)
    TILE_TABLE(3),
    TILE_TABLE(4),
#endif
};

#if defined(__AVX512F__)
/* The same for half a vector of columns, as low-rank branches have them: half as wide, twice as high. */
enum { NARROW_COLS = LANES / 2, NARROW_ROWS = 12 };
typedef float narrow __attribute__((vector_size(NARROW_COLS * 4), aligned(4), may_alias));
INLINE void narrow_tile(float *const *c, const float *const *a, const float *panel, int64_t stride, int64_t depth, bool add,
                        const int rows) {
    narrow sum[NARROW_ROWS];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) sum[i] = (narrow){0};
    for (int64_t k = 0; k < depth; k++) {
        const narrow b = *(const narrow *)(panel + k * stride);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) sum[i] = a[i][k] * b + sum[i];
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        narrow *out = (narrow *)c[i];
        if (add) sum[i] += *out;
        *out = sum[i];
    }
}

static void run_narrow(const cpu_rows *c, const cpu_rows *a, const float *panel, int64_t stride, int64_t m, int64_t k0, int64_t depth,
                       int64_t col, bool add) {
    float *to[NARROW_ROWS];
    const float *from[NARROW_ROWS];
    for (int64_t first = 0; first < m; first += NARROW_ROWS) {
        const int64_t rows = cpu_min(m - first, NARROW_ROWS);
        for (int64_t i = 0; i < rows; i++) {
            from[i] = row_at(a, first + i) + k0;
            to[i] = row_at(c, first + i) + col;
        }
        if (rows == NARROW_ROWS)
            narrow_tile(to, from, panel, stride, depth, add, NARROW_ROWS);
        else
            for (int64_t i = 0; i < rows; i++) narrow_tile(to + i, from + i, panel, stride, depth, add, 1);
    }
}
#endif

static void scale_by(float *x, float scale, int64_t n) {
    for (int64_t i = 0; i < n; i++) x[i] *= scale;
}

/* A few floats, a panel's row or less: a call of memcpy would take longer. */
INLINE void copy_few(float *to, const float *from, int64_t n) {
    for (; n >= LANES; n -= LANES, to += LANES, from += LANES) store(to, load(from));
    for (; n >= 4; n -= 4, to += 4, from += 4) *(vec4 *)to = *(const vec4 *)from;
    for (int64_t j = 0; j < n; j++) to[j] = from[j];
}

static void decode_plain(float *dst, const void *data, esp_dtype dtype, int64_t at, int64_t n) {
    if (dtype == ESP_F32) {
        copy_few(dst, (const float *)data + at, n);
    } else if (dtype == ESP_BF16) {
        const uint16_t *bits = (const uint16_t *)data + at;
        uint32_t wide[PANEL_DEPTH];
        for (int64_t done = 0; done < n; done += PANEL_DEPTH) {
            const int64_t count = cpu_min(n - done, PANEL_DEPTH);
            for (int64_t i = 0; i < count; i++) wide[i] = (uint32_t)bits[done + i] << 16;
            memcpy(dst + done, wide, (size_t)count * sizeof *dst);
        }
    } else {
        for (int64_t i = 0; i < n; i++) dst[i] = espi_plain_value(data, dtype, at + i);
    }
}

/* What the values of a block's codes are multiplied by. */
static float block_scale(const espi_stack *w, int64_t part, int64_t block) {
    if (w->format != ESP_MXFP4) return espi_stack_absmax(w, part, block);
    return espi_e8m0_value(w->scales[part * w->part_blocks + block]);
}

#if defined(__AVX512F__)
/* Of n values beginning with an even element the first that fill vectors; returns how many. */
static int64_t decode_vectors(float *out, const espi_stack *w, const uint8_t *codes, float scale, int64_t n) {
    const __m512 values = _mm512_loadu_ps(w->lut), factor = _mm512_set1_ps(scale);
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const __m128i low = _mm_loadl_epi64((const __m128i *)(codes + i / 2)), high = _mm_srli_epi16(low, 4);
        const __m128i in_order = w->format == ESP_MXFP4 ? _mm_unpacklo_epi8(low, high) : _mm_unpacklo_epi8(high, low);
        /* The permutation reads the lowest four bits of an index alone. */
        const __m512 value = _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(in_order), values);
        _mm512_storeu_ps(out + i, _mm512_mul_ps(value, factor));
    }
    return i;
}
#else
static int64_t decode_vectors(float *out, const espi_stack *w, const uint8_t *codes, float scale, int64_t n) {
    (void)out, (void)w, (void)codes, (void)scale, (void)n;
    return 0;
}
#endif

/* n values of a part from element `at` on.  ahead: how many elements further on the next call of the same panel column will read: a panel
 * takes a line of codes from each of many rows, which the machine does not foresee. */
static void decode_codes(float *dst, const cpu_weight *w, int64_t part, int64_t at, int64_t n, int64_t ahead) {
    const uint8_t *codes = (const uint8_t *)w->stack->data + (size_t)part * w->stack->part_bytes;
    if (at / 2 + ahead / 2 < (int64_t)w->stack->part_bytes) __builtin_prefetch(codes + at / 2 + ahead / 2);
    const int64_t block_size = w->stack->format == ESP_MXFP4 ? ESPI_MXBLOCK : ESPI_QBLOCK;
    for (int64_t done = 0; done < n;) {
        const int64_t i = at + done, block = i / block_size;
        const int64_t count = cpu_min(n - done, (block + 1) * block_size - i);
        const float scale = block_scale(w->stack, part, block);
        float *out = dst + done;
        const int64_t ready = i % 2 == 0 ? decode_vectors(out, w->stack, codes + i / 2, scale, count) : 0;
        int64_t j = ready;
        if (i % 2 != 0) out[j++] = w->pairs[codes[i / 2]][1];
        for (; j + 1 < count; j += 2) memcpy(out + j, w->pairs[codes[(i + j) / 2]], 2 * sizeof *out);
        if (j < count) out[j] = w->pairs[codes[(i + j) / 2]][0];
        scale_by(out + ready, scale, count - ready);
        done += count;
    }
}

static void decode_row(float *dst, const cpu_weight *w, int64_t row, int64_t col, int64_t n, int64_t ahead) {
    if (w->stack) {
        const int64_t part_rows = w->stack->rows / w->stack->parts;
        const int64_t part = w->expert * w->stack->parts + row / part_rows, at = row % part_rows * w->cols + col;
        if (w->stack->format == ESP_Q_NONE)
            decode_plain(dst, (const uint8_t *)w->stack->data + (size_t)part * w->stack->part_bytes, w->dtype, at, n);
        else
            decode_codes(dst, w, part, at, n, ahead);
    } else {
        decode_plain(dst, w->data, w->dtype, row * w->cols + col, n);
    }
    if (w->scale != 1) scale_by(dst, w->scale, n);
}

void cpu_decode_row(float *dst, const cpu_weight *w, int64_t row, int64_t col, int64_t n) {
    decode_row(dst, w, row, col, n, 0);
}

/* panel[k][at .. at + 4) = row[0..4)[k]. */
static void transpose4(float *panel, const float *const row[4], int64_t depth) {
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4, panel += 4 * PANEL_COLS) {
        const vec4 a = *(const vec4 *)(row[0] + k), b = *(const vec4 *)(row[1] + k);
        const vec4 c = *(const vec4 *)(row[2] + k), d = *(const vec4 *)(row[3] + k);
        const vec4 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        const vec4 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        *(vec4 *)(panel) = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
        *(vec4 *)(panel + PANEL_COLS) = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
        *(vec4 *)(panel + 2 * PANEL_COLS) = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
        *(vec4 *)(panel + 3 * PANEL_COLS) = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
    }
    for (; k < depth; k++, panel += PANEL_COLS)
        for (int i = 0; i < 4; i++) panel[i] = row[i][k];
}

/* panel[k][at .. at + LANES) = row[0..LANES)[k]. */
static void transpose_rows(float *panel, const float *const row[LANES], int64_t depth) {
    int64_t k = 0;
#if defined(__AVX512F__)
    for (; k + LANES <= depth; k += LANES) {
        __m512 x[LANES], y[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) x[i] = _mm512_loadu_ps(row[i] + k);
#pragma GCC unroll 8
        for (int i = 0; i < LANES; i += 2) {
            y[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
            y[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < LANES; i += 4) {
            x[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(y[i]), _mm512_castps_pd(y[i + 2])));
            x[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(y[i]), _mm512_castps_pd(y[i + 2])));
            x[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(y[i + 1]), _mm512_castps_pd(y[i + 3])));
            x[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(y[i + 1]), _mm512_castps_pd(y[i + 3])));
        }
        /* x[4 g + i] holds of rows 4 g .. 4 g + 3 the steps i, 4 + i, 8 + i, 12 + i. */
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m512 low = _mm512_shuffle_f32x4(x[i], x[4 + i], 0x88), high = _mm512_shuffle_f32x4(x[i], x[4 + i], 0xdd);
            const __m512 low2 = _mm512_shuffle_f32x4(x[8 + i], x[12 + i], 0x88), high2 = _mm512_shuffle_f32x4(x[8 + i], x[12 + i], 0xdd);
            _mm512_storeu_ps(panel + (k + i) * PANEL_COLS, _mm512_shuffle_f32x4(low, low2, 0x88));
            _mm512_storeu_ps(panel + (k + 4 + i) * PANEL_COLS, _mm512_shuffle_f32x4(high, high2, 0x88));
            _mm512_storeu_ps(panel + (k + 8 + i) * PANEL_COLS, _mm512_shuffle_f32x4(low, low2, 0xdd));
            _mm512_storeu_ps(panel + (k + 12 + i) * PANEL_COLS, _mm512_shuffle_f32x4(high, high2, 0xdd));
        }
    }
#endif
    for (int j = 0; j < LANES && k < depth; j += 4)
        transpose4(panel + k * PANEL_COLS + j, (const float *const[4]){row[j] + k, row[j + 1] + k, row[j + 2] + k, row[j + 3] + k},
                   depth - k);
}

enum { ROWS_AHEAD = 16 };

/* panel[k][j] = b(k0 + k, col + j), columns beyond n up to a whole vector are 0. */
static void pack(float *panel, const cpu_weight *w, int64_t k0, int64_t depth, int64_t col, int64_t n) {
    const int64_t whole = cpu_blocks(n, LANES) * LANES;
    if (!w->transposed) {
        for (int64_t k = 0; k < depth; k++) {
            decode_row(panel + k * PANEL_COLS, w, k0 + k, col, n, ROWS_AHEAD * w->cols);
            for (int64_t j = n; j < whole; j++) panel[k * PANEL_COLS + j] = 0;
        }
        return;
    }
    static const float zero[PANEL_DEPTH];
    float decoded[LANES][PANEL_DEPTH];
    const bool direct = !w->stack && w->dtype == ESP_F32 && w->scale == 1;
    for (int64_t j = 0; j < whole; j += LANES) {
        const float *row[LANES];
        for (int i = 0; i < LANES; i++) {
            if (j + i >= n) {
                row[i] = zero;
            } else if (direct) {
                row[i] = (const float *)w->data + (col + j + i) * w->cols + k0;
            } else {
                decode_row(decoded[i], w, col + j + i, k0, depth, PANEL_DEPTH);
                row[i] = decoded[i];
            }
        }
        transpose_rows(panel + j, row, depth);
    }
}

/* A term of all rows: steps k0 .. k0 + depth - 1 of `a`. */
typedef struct rows_term {
    const cpu_rows *a;
    const float *panel;
    int64_t stride, k0, depth;
} rows_term;

/* m rows.  Columns that do not fill a vector go through a buffer: the tile is the same. */
static void run_tiles(const cpu_rows *c, const rows_term *terms, int n_terms, int64_t m, int64_t col, int64_t n, bool add) {
#if defined(__AVX512F__)
    if (n == NARROW_COLS && n_terms == 1) {
        run_narrow(c, terms->a, terms->panel, terms->stride, m, terms->k0, terms->depth, col, add);
        return;
    }
#endif
    const int64_t vecs = cpu_blocks(n, LANES);
    const bool ragged = n % LANES != 0;
    _Alignas(64) float buffer[TILE_ROWS][PANEL_COLS];
    term of_tile[2];
    for (int t = 0; t < n_terms; t++) of_tile[t] = (term){.panel = terms[t].panel, .stride = terms[t].stride, .depth = terms[t].depth};
    for (int64_t first = 0; first < m; first += TILE_ROWS) {
        const int64_t rows = cpu_min(m - first, TILE_ROWS);
        float *to[TILE_ROWS];
        for (int64_t i = 0; i < rows; i++) {
            for (int t = 0; t < n_terms; t++) of_tile[t].a[i] = row_at(terms[t].a, first + i) + terms[t].k0;
            to[i] = row_at(c, first + i) + col;
            if (!ragged) continue;
            if (add) copy_few(buffer[i], to[i], n);
            to[i] = buffer[i];
        }
        tiles[vecs - 1][rows - 1](to, of_tile, n_terms, add);
        for (int64_t i = 0; ragged && i < rows; i++) copy_few(row_at(c, first + i) + col, buffer[i], n);
    }
}

/* Rows of floats that lie this close need no packing; a branch of this rank is added in the registers of the product it belongs to. */
enum { IN_PLACE_COLS = 512, FUSED_RANK = 32 };

/* A term whose panel is packed into `panel`, or lies ready. */
static rows_term make_term(float *panel, const cpu_rows *a, const cpu_weight *b, int64_t k, int64_t depth, int64_t col, int64_t n) {
    const bool in_place = !b->stack && b->dtype == ESP_F32 && !b->transposed && b->scale == 1 && b->cols <= IN_PLACE_COLS;
    if (in_place && n % LANES == 0) return (rows_term){a, (const float *)b->data + k * b->cols + col, b->cols, k, depth};
    pack(panel, b, k, depth, col, n);
    return (rows_term){a, panel, PANEL_COLS, k, depth};
}

void cpu_product_low(const cpu_rows *c, const cpu_rows *a, const cpu_weight *b, const cpu_low *low, int64_t m, int64_t depth, int64_t col,
                     int64_t n, bool add) {
    _Alignas(64) float panel[PANEL_DEPTH * PANEL_COLS], low_panel[FUSED_RANK * PANEL_COLS];
    const bool fused = low->r > 0 && low->r <= FUSED_RANK;
    if (m == 0) return;
    for (int64_t done = 0; done < n; done += PANEL_COLS) {
        const int64_t width = cpu_min(n - done, PANEL_COLS);
        for (int64_t k = 0; k < depth; k += PANEL_DEPTH) {
            const int64_t steps = cpu_min(depth - k, PANEL_DEPTH);
            const bool last = k + steps == depth;
            rows_term terms[2];
            terms[0] = make_term(panel, a, b, k, steps, col + done, width);
            if (fused && last) terms[1] = make_term(low_panel, &low->rows, &low->weight, 0, low->r, col + done, width);
            run_tiles(c, terms, fused && last ? 2 : 1, m, done, width, add || k > 0);
        }
    }
    if (low->r > FUSED_RANK) cpu_product(c, &low->rows, &low->weight, m, low->r, col, n, true);
}

void cpu_product(const cpu_rows *c, const cpu_rows *a, const cpu_weight *b, int64_t m, int64_t depth, int64_t col, int64_t n, bool add) {
    cpu_product_low(c, a, b, &(cpu_low){.r = 0}, m, depth, col, n, add);
}

INLINE void outer(float *out, const float *a, int64_t a_stride, const cpu_rows *b, int64_t count, int64_t col, const int rows) {
    vec sum[OUTER_ROWS][OUTER_VECS];
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < OUTER_VECS; j++) sum[i][j] = (vec){0};
    for (int64_t s = 0; s < count; s++) {
        const float *row = row_at(b, s) + col;
        vec y[OUTER_VECS];
#pragma GCC unroll 8
        for (int j = 0; j < OUTER_VECS; j++) {
            y[j] = load(row + j * LANES);
            __builtin_prefetch(row + (OUTER_VECS + j) * LANES); /* rows lie too far apart for the machine to foresee what comes next */
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++) {
            const vec x = splat(a[s * a_stride + i]);
#pragma GCC unroll 8
            for (int j = 0; j < OUTER_VECS; j++) sum[i][j] = x * y[j] + sum[i][j];
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 8
        for (int j = 0; j < OUTER_VECS; j++) store(out + (i * OUTER_VECS + j) * LANES, sum[i][j]);
}

void cpu_outer(float *out, const float *a, int64_t a_stride, const cpu_rows *b, int64_t count, int64_t rows, int64_t col, int64_t n) {
    if (n == OUTER_VECS * LANES && rows == OUTER_ROWS) {
        outer(out, a, a_stride, b, count, col, OUTER_ROWS);
    } else if (n == OUTER_VECS * LANES && rows == 4) {
        outer(out, a, a_stride, b, count, col, 4);
    } else {
        memset(out, 0, OUTER_ROWS * OUTER_VECS * LANES * sizeof *out);
        for (int64_t s = 0; s < count; s++)
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < n; j++) out[i * OUTER_VECS * LANES + j] += a[s * a_stride + i] * (row_at(b, s) + col)[j];
    }
}

enum { STRIP = OUTER_VECS * LANES };

int64_t cpu_branch_strips(const cpu_branch *l) {
    return l->r == 0 ? 0 : cpu_blocks(l->in, STRIP) + cpu_blocks(l->out, STRIP);
}

/* What is added to a gradient is a number of its own, not one half of a fused multiply-add: the compiler must go through memory here. */
#define ROUNDED(values) __asm__("" : "+m"(values))

/* d_b's rows o .. o + rows - 1, LANES columns: a vector of u meets the values of d_y, and what comes out lies as d_b does. */
enum { FAR = 2 };
INLINE void rows_of_b(float *d_b, const cpu_rows *d_y, const float *u, int64_t r, int64_t count, int64_t o, float scale, const int rows) {
    vec all[LANES] = {{0}};
    for (int64_t first = 0; first < count; first += PANEL_DEPTH) {
        const int64_t end = cpu_min(count, first + PANEL_DEPTH);
        vec sum[LANES];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) sum[i] = (vec){0};
        for (int64_t s = first; s < end; s++) {
            const float *y = row_at(d_y, s) + o;
            const vec x = load(u + s * r);
            __builtin_prefetch(y + FAR * LANES);
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++) sum[i] = splat(y[i]) * x + sum[i];
        }
        for (int i = 0; i < rows; i++) all[i] = first == 0 ? sum[i] : all[i] + sum[i];
    }
    for (int i = 0; i < rows; i++) all[i] = splat(scale) * all[i];
    ROUNDED(all);
    for (int i = 0; i < rows; i++) store(d_b + i * r, all[i] + load(d_b + i * r));
}

/* d_b's rows col .. col + n - 1 where a row is whole vectors. */
static void grad_of_b(const cpu_branch *l, const cpu_rows *d_y, const float *u, int64_t count, int64_t col, int64_t n) {
    for (int64_t o = col, end = col + n; o < end;) {
        const int64_t rows = end - o < LANES ? 1 : LANES;
        for (int64_t k = 0; k < l->r; k += LANES) {
            if (rows == LANES)
                rows_of_b(l->d_b + o * l->r + k, d_y, u + k, l->r, count, o, l->scale, LANES);
            else
                rows_of_b(l->d_b + o * l->r + k, d_y, u + k, l->r, count, o, l->scale, 1);
        }
        o += rows;
    }
}

void cpu_branch_grad(const cpu_branch *l, int64_t strip, const cpu_rows *x, const cpu_rows *d_y, const float *u, const float *q,
                     int64_t count) {
    const int64_t in_strips = cpu_blocks(l->in, STRIP);
    const bool of_a = strip < in_strips;
    const int64_t col = (of_a ? strip : strip - in_strips) * STRIP, n = cpu_min((of_a ? l->in : l->out) - col, STRIP);
    float sum[OUTER_ROWS][STRIP], all[OUTER_ROWS][STRIP];
    const cpu_rows *rows = of_a ? x : d_y;
    if (!of_a && l->r % LANES == 0 && count > 0) {
        grad_of_b(l, d_y, u, count, col, n);
        return;
    }
    for (int64_t k = 0; k < l->r && count > 0; k += OUTER_ROWS) {
        const int64_t height = cpu_min(l->r - k, OUTER_ROWS);
        for (int64_t s = 0; s < count; s += PANEL_DEPTH) {
            const cpu_rows part = {rows->index ? rows->base : row_at(rows, s), rows->stride, rows->index ? rows->index + s : NULL};
            cpu_outer(sum[0], (of_a ? q : u) + s * l->r + k, l->r, &part, cpu_min(count - s, PANEL_DEPTH), height, col, n);
            for (int64_t i = 0; i < height; i++)
                for (int64_t j = 0; j < n; j++) all[i][j] = s == 0 ? sum[i][j] : all[i][j] + sum[i][j];
        }
        for (int64_t i = 0; !of_a && i < height; i++)
            for (int64_t j = 0; j < n; j++) all[i][j] *= l->scale;
        ROUNDED(all);
        for (int64_t i = 0; i < height; i++)
            for (int64_t j = 0; j < n; j++) *(of_a ? &l->d_a[(k + i) * l->in + col + j] : &l->d_b[(col + j) * l->r + k + i]) += all[i][j];
    }
}
