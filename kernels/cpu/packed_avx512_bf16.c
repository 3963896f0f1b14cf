/* Products of bf16 with packed experts, by dot products of pairs: see packed.h for the layout and for the order of the sums.
 *
 * Few rows meet codes, which are decoded in registers: forward up to 8 rows 32 columns, or up to 2 rows 64; backward up to 4 rows 64.  Of more
 * rows the first do, and leave what they have decoded: a panel of 64 columns, DEPTH steps of the sum, that the others meet. */
#include "kernels/cpu/decode.h"

enum {
    STRIP_ROWS = 8,             /* forward: rows that meet 32 columns without a panel */
    NARROW_ROWS = 2,            /* forward: rows that meet 64 columns by half vectors */
    FEW_ROWS = 4,               /* backward: rows that meet 64 columns without a panel */
    TILES = 4,                  /* of 16 columns of a panel */
    PANEL_ROWS = 6,             /* rows of a strip against a panel */
    DEPTH = 2048,               /* steps of the sum that a panel holds, and of a row that lie together */
    ROW_BYTES = DEPTH * 2 + 64, /* rows are not to share places of the first cache */
    HALF = TILES / 2,           /* of a record */
    QUARTERS = RECORD_ROWS / 8, /* of a record, of 8 columns */
    WIDTH = TILES * 16,
    GROUP = 16, /* pairs of a panel that come from one record, or from half of one */
};

/* ---- what rows become: for every DEPTH values those of all rows, a row's ROW_BYTES after the other's ---- */

/* m rows of n values, whole 32s.  paired: in the order in which rows of W pair up. */
static void convert_rows(uint8_t *to, const cpu_rows *a, int64_t m, int64_t n, bool paired) {
    const __m512i order = pairing();
    for (int64_t i = 0; i < m; i++) {
        const float *from = row_at(a, i);
        for (int64_t k = 0; k < n; k += 32) {
            const __m512i x = bf16_round_32(from + k);
            uint8_t *out = to + (k / DEPTH * m + i) * ROW_BYTES + k % DEPTH * 2;
            _mm512_store_si512(out, paired ? _mm512_permutexvar_epi16(order, x) : x);
        }
    }
}

/* Two neighbouring values of a row. */
INLINE int32_t pair_at(const uint8_t *x) {
    int32_t two;
    memcpy(&two, x, sizeof two);
    return two;
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
INLINE __m512i decode_pair(const uint8_t *codes, __m512i values, __m512i shifts) {
    const __m512i units = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)codes));
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(units, shifts), values);
}

/* MXFP4: what scales 16 columns by powers of two, added to the bits of their values. */
INLINE __m512i powers_of(const uint8_t *record, int tile, int half) {
    const __m512i above = _mm512_sub_epi32(exponents_of(record, tile, half), _mm512_set1_epi32(127));
    const __m512i power = _mm512_slli_epi32(above, 23);
    return _mm512_or_si512(power, _mm512_srli_epi32(power, 16));
}

/* A value of 0 stays one. */
INLINE __m512i scale_pair(__m512i pair, __m512i powers) {
    return _mm512_maskz_add_epi16(_mm512_test_epi16_mask(pair, _mm512_set1_epi16(0x7fff)), pair, powers);
}

/* ---- forward, codes being decoded for each strip ---- */

/* part[rows] += products of `pairs` pairs of k.  powers: MXFP4's, NULL: none.  to: where decoded pairs are left, `apart` bytes apart, or
 * NULL. */
INLINE void forward_pairs(__m512 part[STRIP_ROWS][HALF], uint8_t *to, const int apart, const uint8_t *x, const uint8_t *codes,
                          __m512i values, __m512i shifts, const __m512i *powers, const int pairs, const int rows) {
#pragma GCC unroll 4
    for (int p = 0; p < pairs; p++) {
        __m512bh b[HALF];
#pragma GCC unroll 16
        for (int t = 0; t < HALF; t++) {
            const __m512i pair = decode_pair(codes + t * (RECORD_CODES / 2) + p * 16, values, shifts);
            b[t] = (__m512bh)(powers ? scale_pair(pair, powers[t]) : pair);
            if (to) _mm512_store_si512(to + p * apart + t * 64, (__m512i)b[t]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const __m512bh xx = (__m512bh)_mm512_set1_epi32(pair_at(x + i * ROW_BYTES + p * 4));
#pragma GCC unroll 16
            for (int t = 0; t < HALF; t++) part[i][t] = _mm512_dpbf16_ps(part[i][t], xx, b[t]);
        }
    }
}

/* Sums over some of the depth, of rows against a panel: where those so far are, WIDTH floats from row to row, if there are any; where they
 * go, `wide` floats from row to row; and what the last are added to, or NULL. */
typedef struct sums_place {
    const float *from;
    bool add;
    float *to;
    int64_t wide;
    const float *bias;
} sums_place;

INLINE __m512 begin_sum(const sums_place *s, int i, int at) {
    _mm_prefetch((const char *)(s->to + i * s->wide + at), _MM_HINT_T0); /* to be there when it is written */
    return _mm512_maskz_loadu_ps(s->add ? 0xffff : 0, s->from + i * WIDTH + at);
}
INLINE void end_sum(const sums_place *s, int i, int at, __m512 x) {
    _mm512_storeu_ps(s->to + i * s->wide + at, s->bias ? _mm512_add_ps(x, _mm512_loadu_ps(s->bias + at)) : x);
}

INLINE void clear(__m512 part[][HALF], const int rows) {
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < HALF; t++) part[i][t] = _mm512_setzero_ps();
}

/* How a strip scales: the sums of 64 k; its sums so far whenever the power of two changes, which gives the bits of scaled values as long as
 * powers are near each other; or the values. */
enum { BY_SUMS, BY_RATIOS, BY_VALUES, WAYS };

/* Sums in units of one power of two go over to another. */
INLINE void change_power(__m512 part[STRIP_ROWS][HALF], const uint8_t *from, const uint8_t *to, const int rows) {
#pragma GCC unroll 16
    for (int t = 0; t < HALF; t++) {
        const __m512i old = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from + t));
        const __m512i new = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)to + t));
        const __m512i above = _mm512_add_epi32(_mm512_sub_epi32(old, new), _mm512_set1_epi32(127));
        const __m512 ratio = _mm512_castsi512_ps(_mm512_slli_epi32(above, 23));
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) part[i][t] = _mm512_mul_ps(part[i][t], ratio);
    }
}

/* What a strip reads: `blocks` records from w on, and rows of a, with `far` bytes from DEPTH values to the next; `stride`: from 32 columns'
 * first record to the next's.  What it may leave: decoded values and scales of a panel; its sums then go on as `sums` says. */
typedef struct strip {
    const uint8_t *a, *w;
    int64_t far, stride, blocks;
    const float *lut;
    uint8_t *panel;
    float *scales;
    sums_place sums;
} strip;

/* Records that are fetched ahead: from memory to the second cache, from there to the first. */
enum { FROM_MEMORY = 8, FROM_SECOND = 2, TURN = DEPTH / RECORD_COLS };

/* sum[rows][32] = a W^T over all of k; one that leaves has no sum. */
INLINE void forward_strip(float *sum, const strip *s, const int rows, const int way, const bool leaves) {
    enum { PAIRS = RECORD_COLS / 2 };
    const __m512i values = values_of(s->lut), shifts = quarter_shifts();
    const int64_t record = record_bytes(way == BY_SUMS ? ESP_NF4 : ESP_MXFP4);
    const bool kept = rows <= PANEL_ROWS; /* there are registers for the sums, too */
    const int apart = way == BY_SUMS ? WIDTH * 2 : WIDTH * 4;
    const uint8_t *w = s->w, *power = w + RECORD_CODES;
    uint8_t *to = leaves ? s->panel : NULL;
    float *scales = s->scales;
    __m512 part[STRIP_ROWS][HALF], total[STRIP_ROWS][HALF];
    clear(part, rows);
    clear(total, rows);
#pragma GCC unroll 16
    for (int i = 0; leaves && i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < HALF; t++) (way == BY_SUMS ? total : part)[i][t] = begin_sum(&s->sums, i, t * 16);
    for (int i = 0; way == BY_SUMS && !kept && i < rows * HALF; i++) _mm512_storeu_ps(sum + i * 16, _mm512_setzero_ps());
    for (int64_t b = 0; b < s->blocks; b++, w += record) {
        const uint8_t *x = s->a + b / TURN * s->far + b % TURN * (RECORD_COLS * 2);
        prefetch_record(w + FROM_MEMORY * record, record);
        prefetch_lines(w + FROM_SECOND * record, record);
        if (way == BY_SUMS) {
            if (!kept) __asm__ volatile("" ::: "memory"); /* sums stay in memory: registers are for the parts */
            clear(part, rows);
            forward_pairs(part, to, apart, x, w, values, shifts, NULL, PAIRS, rows);
#pragma GCC unroll 16
            for (int t = 0; t < HALF; t++) {
                const __m512 scale = scales_of(w, t, 0, false);
                if (leaves) _mm512_storeu_ps(scales + t * 16, scale);
#pragma GCC unroll 16
                for (int i = 0; i < rows; i++) {
                    float *at = sum + i * RECORD_ROWS + t * 16;
                    if (kept)
                        total[i][t] = _mm512_fmadd_ps(part[i][t], scale, total[i][t]);
                    else
                        _mm512_storeu_ps(at, _mm512_fmadd_ps(part[i][t], scale, _mm512_loadu_ps(at)));
                }
            }
            if (leaves) to += PAIRS * apart, scales += WIDTH;
            continue;
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512i powers[HALF];
            if (way == BY_VALUES) {
#pragma GCC unroll 16
                for (int t = 0; t < HALF; t++) powers[t] = powers_of(w, t, half);
            } else {
                change_power(part, power, w + RECORD_CODES + half * RECORD_ROWS, rows);
                power = w + RECORD_CODES + half * RECORD_ROWS;
            }
            forward_pairs(part, to, apart, x + half * PAIRS * 2, w + half * PAIRS * 8, values, shifts, way == BY_VALUES ? powers : NULL,
                          PAIRS / 2, rows);
            if (leaves) to += PAIRS / 2 * apart;
        }
    }
    if (way == BY_SUMS && !kept) return;
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < HALF; t++) {
            __m512 x = way == BY_SUMS ? total[i][t] : part[i][t];
            if (way == BY_RATIOS) x = _mm512_mul_ps(x, scales_of(w - record, t, 1, true));
            if (leaves)
                end_sum(&s->sums, i, t * 16, x);
            else
                _mm512_storeu_ps(sum + i * RECORD_ROWS + t * 16, x);
        }
}

typedef void forward_fn(float *sum, const strip *s);
#define FORWARD(rows, way)                                                                                                                 \
    static void forward_##rows##_##way(float *sum, const strip *s) {                                                                       \
        forward_strip(sum, s, rows, way, false);                                                                                           \
    }
#define FORWARD_ALL(way)                                                                                                                   \
    FORWARD(1, way)                                                                                                                        \
    FORWARD(2, way)                                                                                                                        \
    FORWARD(3, way)                                                                                                                        \
    FORWARD(4, way)                                                                                                                        \
    FORWARD(5, way)                                                                                                                        \
    FORWARD(6, way)                                                                                                                        \
    FORWARD(7, way)                                                                                                                        \
    FORWARD(8, way)
FORWARD_ALL(0)
FORWARD_ALL(1)
FORWARD_ALL(2)
#define FORWARD_TABLE(way)                                                                                                                 \
    {                                                                                                                                      \
        forward_1_##way, forward_2_##way, forward_3_##way, forward_4_##way, forward_5_##way, forward_6_##way, forward_7_##way,             \
            forward_8_##way                                                                                                                \
    }
static forward_fn *const forward_strips[WAYS][STRIP_ROWS] = {FORWARD_TABLE(0), FORWARD_TABLE(1), FORWARD_TABLE(2)};

/* Those that leave a panel: there are so many rows that the first strip has all it can, or one less. */
#define LEAVE(rows, way)                                                                                                                   \
    static void leave_##rows##_##way(float *sum, const strip *s) {                                                                         \
        forward_strip(sum, s, rows, way, true);                                                                                            \
    }
LEAVE(5, 0)
LEAVE(6, 0)
LEAVE(5, 2)
LEAVE(6, 2)
static forward_fn *const leaving_strips[2][2] = {{leave_5_0, leave_6_0}, {leave_5_2, leave_6_2}};

/* ---- the same for the fewest rows: half vectors, which decode with less, and two records beside each other, for more sums under way ---- */

/* 16 bytes, twice.  By this form of the instruction: the one that knows more registers keeps the unit busy which permutes. */
INLINE __m256i twice(const uint8_t *from) {
    __m256i x;
    __asm__("vbroadcasti128 %1, %0" : "=x"(x) : "m"(*(const __m128i *)from));
    return x;
}

/* Bytes of 8 rows: exponents of 2. */
INLINE __m256i exponents_of_8(const uint8_t *from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from));
}

/* Where the scales of 8 of 64 columns are. */
INLINE const uint8_t *scales_of_8(const uint8_t *w, int64_t stride, int t, const int bytes) {
    return w + t / QUARTERS * stride + RECORD_CODES + t % QUARTERS * 8 * bytes;
}

/* sum[rows][64] = a W^T over all of k, as forward_strip() by sums or by ratios. */
INLINE void narrow_strip(float *sum, const strip *s, const int rows, const bool mx) {
    enum { LINES = 128, PAIRS = LINES / 32, STEPS = RECORD_CODES / LINES, PARTS = 2 * QUARTERS };
    const __m512i shifts = quarter_shifts();
    const __m256i values = _mm512_castsi512_si256(values_of(s->lut));
    const __m256i low = _mm512_castsi512_si256(shifts), high = _mm512_extracti64x4_epi64(shifts, 1);
    const int64_t record = record_bytes(mx ? ESP_MXFP4 : ESP_NF4), stride = s->stride;
    const bool kept = rows == 1; /* there are registers for the sums, too */
    const uint8_t *w = s->w, *power = w;
    __m256 part[NARROW_ROWS][PARTS], total[PARTS];
#pragma GCC unroll 16
    for (int t = 0; t < PARTS; t++) {
        total[t] = _mm256_setzero_ps();
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            part[i][t] = _mm256_setzero_ps();
            if (!mx && !kept) _mm256_storeu_ps(sum + (i * PARTS + t) * 8, part[i][t]);
        }
    }
    for (int64_t b = 0; b < s->blocks; b++, w += record) {
        /* what comes behind these two rows of records is the next two */
        const uint8_t *later = w + FROM_MEMORY * record + (b + FROM_MEMORY < s->blocks ? 0 : stride), *soon = w + FROM_SECOND * record;
        const uint8_t *x = s->a + b / TURN * s->far + b % TURN * (RECORD_COLS * 2);
        for (int64_t at = RECORD_CODES; at < record; at += 64) {
            _mm_prefetch((const char *)later + at, _MM_HINT_T1);
            _mm_prefetch((const char *)later + stride + at, _MM_HINT_T1);
        }
        if (!mx && !kept) __asm__ volatile("" ::: "memory"); /* sums stay in memory */
#pragma GCC unroll 16
        for (int t = 0; !mx && t < PARTS; t++)
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++) part[i][t] = _mm256_setzero_ps();
        for (int step = 0; step < STEPS; step++, later += LINES, soon += LINES) {
            const uint8_t *codes = w + step * (LINES / 2);
            /* lines that lie beside each other are asked for together */
            _mm_prefetch((const char *)later, _MM_HINT_T1);
            _mm_prefetch((const char *)later + 64, _MM_HINT_T1);
            _mm_prefetch((const char *)later + stride, _MM_HINT_T1);
            _mm_prefetch((const char *)later + stride + 64, _MM_HINT_T1);
            _mm_prefetch((const char *)soon, _MM_HINT_T0);
            _mm_prefetch((const char *)soon + 64, _MM_HINT_T0);
            _mm_prefetch((const char *)soon + stride, _MM_HINT_T0);
            _mm_prefetch((const char *)soon + stride + 64, _MM_HINT_T0);
            if (mx && step % (STEPS / 2) == 0) {
                const uint8_t *now = w + step / (STEPS / 2) * RECORD_ROWS;
#pragma GCC unroll 16
                for (int t = 0; t < PARTS; t++) {
                    const __m256i old = exponents_of_8(scales_of_8(power, stride, t, 1)),
                                  new = exponents_of_8(scales_of_8(now, stride, t, 1));
                    const __m256i above = _mm256_add_epi32(_mm256_sub_epi32(old, new), _mm256_set1_epi32(127));
                    const __m256 ratio = _mm256_castsi256_ps(_mm256_slli_epi32(above, 23));
#pragma GCC unroll 16
                    for (int i = 0; i < rows; i++) part[i][t] = _mm256_mul_ps(part[i][t], ratio);
                }
                power = now;
            }
#pragma GCC unroll 4
            for (int p = 0; p < PAIRS; p++, x += 4) {
#pragma GCC unroll 16
                for (int t = 0; t < PARTS; t += 2) {
                    const __m256i units = twice(codes + t / QUARTERS * stride + t / 2 % HALF * (RECORD_CODES / 2) + p * 16);
                    const __m256bh first = (__m256bh)_mm256_permutexvar_epi16(_mm256_srlv_epi16(units, low), values);
                    const __m256bh second = (__m256bh)_mm256_permutexvar_epi16(_mm256_srlv_epi16(units, high), values);
#pragma GCC unroll 16
                    for (int i = 0; i < rows; i++) {
                        const __m256bh xx = (__m256bh)_mm256_set1_epi32(pair_at(x + i * ROW_BYTES));
                        part[i][t] = _mm256_dpbf16_ps(part[i][t], xx, first);
                        part[i][t + 1] = _mm256_dpbf16_ps(part[i][t + 1], xx, second);
                    }
                }
            }
        }
#pragma GCC unroll 16
        for (int t = 0; !mx && t < PARTS; t++) {
            const __m256 scale = _mm256_loadu_ps((const float *)scales_of_8(w, stride, t, sizeof(float)));
            if (kept) total[t] = _mm256_fmadd_ps(part[0][t], scale, total[t]);
#pragma GCC unroll 16
            for (int i = 0; !kept && i < rows; i++) {
                float *at = sum + (i * PARTS + t) * 8;
                _mm256_storeu_ps(at, _mm256_fmadd_ps(part[i][t], scale, _mm256_loadu_ps(at)));
            }
        }
    }
    if (!mx && !kept) return;
#pragma GCC unroll 16
    for (int t = 0; t < PARTS; t++) {
        const __m256 scale = mx ? _mm256_castsi256_ps(_mm256_slli_epi32(exponents_of_8(scales_of_8(power, stride, t, 1)), 23)) : total[t];
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) _mm256_storeu_ps(sum + (i * PARTS + t) * 8, mx ? _mm256_mul_ps(part[i][t], scale) : scale);
    }
}

#define NARROW(rows, mx)                                                                                                                   \
    static void narrow_##rows##_##mx(float *sum, const strip *s) {                                                                         \
        narrow_strip(sum, s, rows, mx);                                                                                                    \
    }
NARROW(1, 0)
NARROW(2, 0)
NARROW(1, 1)
NARROW(2, 1)
static forward_fn *const narrow_strips[2][NARROW_ROWS] = {{narrow_1_0, narrow_2_0}, {narrow_1_1, narrow_2_1}};

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

/* ---- panels: both directions ---- */

/* Memory of a thread. */
typedef struct panel_work {
    uint8_t *panel;       /* [DEPTH / 2][WIDTH] pairs */
    float *scales, *sums; /* of NF4 and FP4 [DEPTH / 64][WIDTH]; [rows][WIDTH] */
    uint8_t *rows;
} panel_work;

static panel_work work_of(void *memory, int64_t rows) {
    panel_work work = {.panel = memory};
    work.scales = (float *)(work.panel + DEPTH / 2 * WIDTH * 4);
    work.sums = work.scales + DEPTH / RECORD_COLS * WIDTH;
    work.rows = (uint8_t *)(work.sums + rows * WIDTH);
    return work;
}

size_t cpu_packed_work(const espi_stack *w, int64_t rows) {
    const int64_t deepest = w->rows > w->cols ? w->rows : w->cols;
    return DEPTH / 2 * WIDTH * 4 + DEPTH / RECORD_COLS * WIDTH * sizeof(float) +
           (size_t)rows * (WIDTH * sizeof(float) + (size_t)cpu_blocks(deepest, DEPTH) * ROW_BYTES);
}

/* part[rows][TILES] += GROUP pairs. */
INLINE void panel_group(__m512 part[PANEL_ROWS][TILES], const uint8_t *a, const uint8_t *panel, const int rows) {
    for (int p = 0; p < GROUP; p++) {
        __m512bh b[TILES];
#pragma GCC unroll 16
        for (int t = 0; t < TILES; t++) b[t] = (__m512bh)_mm512_load_si512(panel + p * WIDTH * 4 + t * 64);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const __m512bh xx = (__m512bh)_mm512_set1_epi32(pair_at(a + i * ROW_BYTES + p * 4));
#pragma GCC unroll 16
            for (int t = 0; t < TILES; t++) part[i][t] = _mm512_dpbf16_ps(part[i][t], xx, b[t]);
        }
    }
}

/* Rows of a times `groups` groups of a panel. */
INLINE void panel_strip(const sums_place *sums, const uint8_t *a, const panel_work *work, int64_t groups, const int rows) {
    const uint8_t *panel = work->panel;
    __m512 part[PANEL_ROWS][TILES];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < TILES; t++) part[i][t] = begin_sum(sums, i, t * 16);
    for (int64_t g = 0; g < groups; g++, a += GROUP * 4, panel += GROUP * WIDTH * 4) {
        panel_group(part, a, panel, rows);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < TILES; t++) end_sum(sums, i, t * 16, part[i][t]);
}

/* The same with values that are not scaled, by half a panel: the scales are those of two groups. */
INLINE void scaled_half(const sums_place *sums, const uint8_t *a, const panel_work *work, int64_t groups, const int half, const int rows) {
    const uint8_t *panel = work->panel + half * (DEPTH / 2 * WIDTH * 2);
    const float *scales = work->scales + half * RECORD_ROWS;
    __m512 sum[PANEL_ROWS][HALF];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < HALF; t++) sum[i][t] = begin_sum(sums, i, half * RECORD_ROWS + t * 16);
    for (int64_t g = 0; g < groups; g += 2, scales += WIDTH) {
        __m512 part[PANEL_ROWS][HALF];
        clear(part, rows);
        for (int p = 0; p < 2 * GROUP; p++, a += 4, panel += WIDTH * 2) {
            const __m512bh b[HALF] = {(__m512bh)_mm512_load_si512(panel), (__m512bh)_mm512_load_si512(panel + 64)};
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++) {
                const __m512bh xx = (__m512bh)_mm512_set1_epi32(pair_at(a + i * ROW_BYTES));
#pragma GCC unroll 16
                for (int t = 0; t < HALF; t++) part[i][t] = _mm512_dpbf16_ps(part[i][t], xx, b[t]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
            for (int t = 0; t < HALF; t++) sum[i][t] = _mm512_fmadd_ps(part[i][t], _mm512_loadu_ps(scales + t * 16), sum[i][t]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < HALF; t++) end_sum(sums, i, half * RECORD_ROWS + t * 16, sum[i][t]);
}

INLINE void scaled_strip(const sums_place *sums, const uint8_t *a, const panel_work *work, int64_t groups, const int rows) {
    scaled_half(sums, a, work, groups, 0, rows);
    scaled_half(sums, a, work, groups, 1, rows);
}

typedef void panel_fn(const sums_place *sums, const uint8_t *a, const panel_work *work, int64_t groups);
#define PANEL(name, rows)                                                                                                                  \
    static void name##_##rows(const sums_place *sums, const uint8_t *a, const panel_work *work, int64_t groups) {                          \
        name##_strip(sums, a, work, groups, rows);                                                                                         \
    }
#define PANELS(name) PANEL(name, 1) PANEL(name, 2) PANEL(name, 3) PANEL(name, 4) PANEL(name, 5) PANEL(name, 6)
PANELS(panel)
PANELS(scaled)
static panel_fn *const panel_strips[2][PANEL_ROWS] = {{panel_1, panel_2, panel_3, panel_4, panel_5, panel_6},
                                                      {scaled_1, scaled_2, scaled_3, scaled_4, scaled_5, scaled_6}};

/* m rows of x, `depth` values each from `k` of `all` on, against the panel of the columns from `col` on. */
typedef struct panel_pass {
    const cpu_rows *c;
    const float *bias;
    const uint8_t *x;
    int64_t m, col, k, depth, all;
} panel_pass;

static sums_place sums_at(const panel_pass *p, const panel_work *work, int64_t first) {
    float *waiting = work->sums + first * WIDTH;
    if (p->k + p->depth < p->all) return (sums_place){waiting, p->k > 0, waiting, WIDTH, NULL};
    return (sums_place){waiting, p->k > 0, row_at(p->c, first) + p->col, p->c->stride, p->bias ? p->bias + p->col : NULL};
}

/* The rows from `from` on. */
static void run_panel(const panel_pass *p, const panel_work *work, int64_t from, bool scaled) {
    const int64_t m = p->m - from, strips = cpu_blocks(m, PANEL_ROWS);
    for (int64_t s = 0; s < strips; s++) {
        const int64_t first = from + strip_start(m, strips, s), rows = from + strip_start(m, strips, s + 1) - first;
        const sums_place sums = sums_at(p, work, first);
        panel_strips[scaled][rows - 1](&sums, p->x + first * ROW_BYTES, work, p->depth / 2 / GROUP);
    }
}

/* ---- forward by panels ---- */

/* n columns from `col` on of m rows; n is whole panels.  The first rows meet codes and leave the panel for the others: decoding and products
 * take different units. */
static void forward_panels(const cpu_rows *c, const cpu_packed *w, const float *bias, const panel_work *work, int64_t m, int64_t col,
                           int64_t n) {
    const bool mx = w->format == ESP_MXFP4;
    const int64_t record = record_bytes(w->format), stride = w->cols / RECORD_COLS * record;
    const int64_t first = strip_start(m, cpu_blocks(m, PANEL_ROWS), 1), half = mx ? RECORD_ROWS * 4 : DEPTH / 2 * WIDTH * 2;
    for (const int64_t end = col + n; col < end; col += WIDTH) {
        const uint8_t *records = w->records + col / RECORD_ROWS * stride;
        for (int64_t k = 0; k < w->cols; k += DEPTH, records += DEPTH / RECORD_COLS * record) {
            const panel_pass pass = {c, bias, work->rows + k / DEPTH * m * ROW_BYTES, m, col, k, cpu_min(w->cols - k, DEPTH), w->cols};
            strip s = {pass.x, records, 0, stride, pass.depth / RECORD_COLS, w->lut, work->panel, work->scales, sums_at(&pass, work, 0)};
            for (int64_t i = 0; i < TILES / HALF; i++) {
                leaving_strips[mx][first - PANEL_ROWS + 1](NULL, &s);
                s.w += stride;
                s.panel += half;
                s.scales += RECORD_ROWS;
                s.sums.from += RECORD_ROWS;
                s.sums.to += RECORD_ROWS;
                if (s.sums.bias) s.sums.bias += RECORD_ROWS;
            }
            run_panel(&pass, work, first, !mx);
        }
    }
}

/* n columns from `col` on, codes being decoded for each strip. */
static void forward_directly(const cpu_rows *c, const cpu_packed *w, const float *bias, const uint8_t *x, int64_t m, int64_t col,
                             int64_t n) {
    const bool mx = w->format == ESP_MXFP4;
    const int64_t blocks = w->cols / RECORD_COLS, stride = blocks * record_bytes(w->format), strips = cpu_blocks(m, STRIP_ROWS);
    const uint8_t *near = w->records + w->rows / RECORD_ROWS * stride; /* see packed.h */
    const int64_t end = col + n;
    _Alignas(64) float sum[STRIP_ROWS * RECORD_ROWS];
    while (col < end) {
        const int64_t at = col / RECORD_ROWS;
        strip s = {.a = x, .w = w->records + at * stride, .far = m * ROW_BYTES, .stride = stride, .blocks = blocks, .lut = w->lut};
        if (m <= NARROW_ROWS && col + WIDTH <= end && (!mx || (near[at] && near[at + 1]))) {
            narrow_strips[mx][m - 1](sum, &s);
            put_strip(c, sum, bias, 0, m, col, TILES);
            col += WIDTH;
            continue;
        }
        const int way = !mx ? BY_SUMS : near[at] ? BY_RATIOS : BY_VALUES;
        for (int64_t i = 0; i < strips; i++) {
            const int64_t first = strip_start(m, strips, i), rows = strip_start(m, strips, i + 1) - first;
            s.a = x + first * ROW_BYTES;
            forward_strips[way][rows - 1](sum, &s); /* NOLINT(clang-analyzer-core.CallAndMessage): a strip has 1 to STRIP_ROWS rows */
            put_strip(c, sum, bias, first, rows, col, HALF);
        }
        col += RECORD_ROWS;
    }
}

static void forward_columns(const cpu_rows *c, const cpu_packed *w, const float *bias, const panel_work *work, int64_t m, int64_t col,
                            int64_t n) {
    const int64_t by_panels = m <= STRIP_ROWS ? 0 : n / WIDTH * WIDTH;
    forward_panels(c, w, bias, work, m, col, by_panels);
    forward_directly(c, w, bias, work->rows, m, col + by_panels, n - by_panels);
}

void cpu_packed_forward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, const float *bias, int64_t m, cpu_columns columns,
                        void *memory, bool again) {
    const panel_work work = work_of(memory, m);
    if (!again) convert_rows(work.rows, a, m, w->cols, false);
    forward_columns(c, w, bias, &work, m, columns.first, columns.n);
    if (columns.second) forward_columns(c, w, bias, &work, m, columns.second, columns.n);
}

/* ---- backward ---- */

/* 16 scales of MXFP4, which are powers of two, for the pairs of rows: a number for each. */
INLINE void pair_powers(int32_t pair[16], const uint8_t *record, int tile, int half) {
    const __m512i powers = powers_of(record, tile, half);
    _mm512_store_si512(pair, _mm512_mask_blend_epi16(0xaaaaaaaa, powers, _mm512_alignr_epi32(powers, powers, 4)));
    __asm__ volatile("" : "+m"(*(int32_t(*)[16])pair)); /* a number is read from there: the compiler would pick it out of the vector */
}

/* `records` records one below the other, `stride` apart.  Those that are fetched from memory lie `wrap` bytes before the place where the next
 * would be once they are behind the last. */
typedef struct column {
    const uint8_t *w;
    int64_t stride, records, wrap;
    const float *lut;
} column;

/* Rows of a times a column of records.  Values are scaled: of NF4 and FP4 in a table for every pair of rows of W.  panel: where they are left. */
INLINE void backward_strip(const sums_place *sums, uint8_t *panel, const uint8_t *a, const column *c, const int rows, const bool mx,
                           const bool leaves) {
    enum { FAR = 4, BESIDE = 2 }; /* records from memory; tiles of 16 k that meet what is read of a row */
    const gather g = gather_make();
    const __m512 lut = _mm512_loadu_ps(c->lut);
    const __m512i odd = _mm512_load_si512(g.places[4]), plain = values_of(c->lut);
    const int64_t stride = c->stride, record = record_bytes(mx ? ESP_MXFP4 : ESP_NF4);
    const uint8_t *w = c->w;
    __m512 part[FEW_ROWS][TILES];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < TILES; t++) part[i][t] = begin_sum(sums, i, t * 16);
    for (int64_t r = 0; r < c->records; r++, w += stride) {
        const uint8_t *later = w + FAR * stride - (r + FAR < c->records ? 0 : c->wrap), *soon = w + stride;
        for (int64_t at = RECORD_CODES; at < record; at += 64) _mm_prefetch((const char *)later + at, _MM_HINT_T1);
        for (int tile = 0; tile < 2; tile++, a += 32) {
            _Alignas(64) int32_t powers[2][16];
            const float *scale = (const float *)(w + RECORD_CODES) + tile * 16;
            if (mx) {
                pair_powers(powers[0], w, tile, 0);
                pair_powers(powers[1], w, tile, 1);
            }
#pragma GCC unroll 16
            for (int i = 0; i < 4; i++) {
                __m512i table[2];
#pragma GCC unroll 16
                for (int h = 0; h < 2; h++) table[h] = mx ? plain : pair_values(lut, scale, i, h);
                _mm_prefetch((const char *)later + (tile * 4 + i) * 128, _MM_HINT_T1);
                _mm_prefetch((const char *)later + (tile * 4 + i) * 128 + 64, _MM_HINT_T1);
                _mm_prefetch((const char *)soon + (tile * 4 + i) * 128, _MM_HINT_T0);
                _mm_prefetch((const char *)soon + (tile * 4 + i) * 128 + 64, _MM_HINT_T0);
#pragma GCC unroll 16
                for (int t = 0; t < TILES; t += BESIDE) {
                    const uint8_t *codes = w + tile * (RECORD_CODES / 2) + t * 128;
                    __m512i units[BESIDE];
                    __asm__ volatile("" ::: "memory"); /* what follows is not begun before: registers would not do */
#pragma GCC unroll 16
                    for (int k = 0; k < BESIDE; k++) units[k] = gather_units(&g, codes + k * 128, i);
#pragma GCC unroll 16
                    for (int h = 0; h < 2; h++) {
                        __m512i b[BESIDE];
#pragma GCC unroll 16
                        for (int k = 0; k < BESIDE; k++) {
                            const __m512i code = _mm512_srlv_epi16(units[k], g.shift[h]);
                            const __m512i at = mx ? code : _mm512_ternarylogic_epi32(code, g.low, odd, 0xea); /* code & low | odd */
                            b[k] = _mm512_permutexvar_epi16(at, table[h]);
                            if (mx) b[k] = scale_pair(b[k], _mm512_set1_epi32(powers[t / BESIDE][i + 8 * h]));
                            if (leaves) _mm512_store_si512(panel + (i * 2 + h) * (WIDTH * 4) + (t + k) * 64, b[k]);
                        }
#pragma GCC unroll 16
                        for (int m = 0; m < rows; m++) {
                            const __m512bh xx = (__m512bh)_mm512_set1_epi32(pair_at(a + m * ROW_BYTES + (i * 2 + h) * 4));
#pragma GCC unroll 16
                            for (int k = 0; k < BESIDE; k++) part[m][t + k] = _mm512_dpbf16_ps(part[m][t + k], xx, (__m512bh)b[k]);
                        }
                    }
                }
            }
            if (leaves) panel += GROUP / 2 * WIDTH * 4;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 16
        for (int t = 0; t < TILES; t++) end_sum(sums, i, t * 16, part[i][t]);
}

typedef void backward_fn(const sums_place *sums, uint8_t *panel, const uint8_t *a, const column *c);
#define BACKWARD(name, rows, mx, leaves)                                                                                                   \
    static void name##_##rows##_##mx(const sums_place *sums, uint8_t *panel, const uint8_t *a, const column *c) {                          \
        backward_strip(sums, panel, a, c, rows, mx, leaves);                                                                               \
    }
#define BACKWARD_ALL(mx)                                                                                                                   \
    BACKWARD(backward, 1, mx, false)                                                                                                       \
    BACKWARD(backward, 2, mx, false)                                                                                                       \
    BACKWARD(backward, 3, mx, false)                                                                                                       \
    BACKWARD(backward, 4, mx, false)                                                                                                       \
    BACKWARD(backward_leave, 4, mx, true)
BACKWARD_ALL(0)
BACKWARD_ALL(1)
static backward_fn *const backward_strips[2][FEW_ROWS + 1] = {{backward_1_0, backward_2_0, backward_3_0, backward_4_0, backward_leave_4_0},
                                                              {backward_1_1, backward_2_1, backward_3_1, backward_4_1, backward_leave_4_1}};

/* n columns from `col` on of m rows.  As forward: the first rows meet codes, and leave a panel if there are others. */
static void backward_columns(const cpu_rows *c, const cpu_packed *w, const panel_work *work, int64_t m, int64_t col, int64_t n) {
    const bool mx = w->format == ESP_MXFP4;
    const int64_t record = record_bytes(w->format), stride = w->cols / RECORD_COLS * record,
                  around = w->rows / RECORD_ROWS * stride - record;
    for (const int64_t end = col + n; col < end; col += WIDTH) {
        for (int64_t k = 0; k < w->rows; k += DEPTH) {
            const uint8_t *records = w->records + k / RECORD_ROWS * stride + col / RECORD_COLS * record;
            const panel_pass pass = {c, NULL, work->rows + k / DEPTH * m * ROW_BYTES, m, col, k, cpu_min(w->rows - k, DEPTH), w->rows};
            const column part = {records, stride, pass.depth / RECORD_ROWS, k + DEPTH < w->rows ? 0 : around, w->lut};
            const sums_place sums = sums_at(&pass, work, 0);
            backward_strips[mx][cpu_min(m, FEW_ROWS + 1) - 1](&sums, work->panel, pass.x, &part);
            run_panel(&pass, work, FEW_ROWS, false);
        }
    }
}

void cpu_packed_backward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, int64_t m, cpu_columns columns, void *memory,
                         bool again) {
    const panel_work work = work_of(memory, m);
    if (!again) convert_rows(work.rows, a, m, w->rows, true);
    backward_columns(c, w, &work, m, columns.first, columns.n);
    if (columns.second) backward_columns(c, w, &work, m, columns.second, columns.n);
}
