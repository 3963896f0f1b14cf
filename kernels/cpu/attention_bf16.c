/* A task of attention in bf16: the operands of its products are rounded, its sums and its softmax are f32.
 *
 * The heads that read a kv head are worked on together: row r of them is query r / group in head r % group.  Keys are met in blocks of KEYS
 * places; what a row does not see of a block has a weight of 0 there, and that adds nothing.  Exponentials are powers of two: scores are
 * multiplied by log2(e) first. */
#include "kernels/cpu/attention.h"
#include "kernels/cpu/bf16.h"

enum { KEYS = 64, ROWS = 64, STRIP = 6, WORDS = 16 };

static const float log2_e = 1.44269504088896341f, ln_2 = 0.693147180559945309f;

/* 2^x to 2e-7; 0 far below. */
static inline __m512 exp2_of(__m512 x) {
    const __m512 y = _mm512_max_ps(x, _mm512_set1_ps(-200)), n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = y - n;
    __m512 p = _mm512_set1_ps(1.3390863365e-3f);
    p = p * r + _mm512_set1_ps(9.6760319183e-3f);
    p = p * r + _mm512_set1_ps(5.5503571142e-2f);
    p = p * r + _mm512_set1_ps(2.4022107485e-1f);
    p = p * r + _mm512_set1_ps(6.9314718803e-1f);
    p = p * r + _mm512_set1_ps(1);
    return _mm512_scalef_ps(p, n);
}

/* ---- rows and what they see ---- */

/* Queries begin .. of a sequence in the heads that read a kv head. */
typedef struct group_rows {
    key_places places;
    int64_t group, n;   /* heads; rows */
    int64_t place;      /* of the first query */
    int64_t at, heads;  /* of row 0 in [T,heads]; heads of the model */
    int64_t dim, width; /* width: words or values from row to row of what is packed */
    int64_t window;
    float scale;
} group_rows;

static group_rows rows_of(const attention_call *c, int64_t seq, int64_t kv_head, int64_t begin, int64_t end) {
    const int64_t group = c->heads / c->kv_heads;
    return (group_rows){.places = places_of(c->spans, seq, c->kv_heads, kv_head, c->dim),
                        .group = group,
                        .n = (end - begin) * group,
                        .place = places_upto(c, seq, begin) - 1,
                        .at = begin * c->heads + kv_head * group,
                        .heads = c->heads,
                        .dim = c->dim,
                        .width = bf16_stride(c->dim),
                        .window = c->window,
                        .scale = c->scale};
}

/* Which of [T,heads] row r is, counted from the first one's. */
static int32_t index_of(const group_rows *g, int64_t r) {
    return (int32_t)(r / g->group * g->heads + r % g->group);
}
static void index_rows(int32_t *index, const group_rows *g, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i++) index[i] = index_of(g, first + i);
}
static cpu_rows rows_in(const void *base, const group_rows *g, const int32_t *index) {
    return (cpu_rows){(float *)base + g->at * g->dim, g->dim, index};
}

/* Entries from .. to - 1 of the block at place `block` are seen by some of `count` rows; false: nothing is. */
typedef struct seen {
    int64_t from, to;
} seen;
static bool seen_by(seen *s, const group_rows *g, int64_t first, int64_t count, int64_t block) {
    const int64_t oldest = first_seen(g->place + first / g->group + 1, g->window) - block;
    s->from = oldest > 0 ? oldest : 0;
    s->to = cpu_min(KEYS, g->place + (first + count - 1) / g->group + 1 - block);
    return s->from < s->to;
}
/* Those of the 16 entries from `at` on. */
static inline __mmask16 mask_of(const seen *s, int64_t at) {
    const int64_t from = s->from - at, to = s->to - at;
    const uint32_t below = to >= WORDS ? 0xffff
                           : to <= 0   ? 0
                                       : (1u << to) - 1,
                   skipped = from <= 0       ? 0
                             : from >= WORDS ? 0xffff
                                             : (1u << from) - 1;
    return (__mmask16)(below & ~skipped);
}
static int64_t whole(int64_t n) {
    return cpu_blocks(n, WORDS) * WORDS;
}

/* ---- a block of keys or values in panels ---- */

static const float *place_at(const void *base, const group_rows *g, int64_t place) {
    return (const float *)base + element(&g->places, place);
}

/* Pairs along the head's values: [width/2][KEYS]. */
static void pack_across(uint32_t *panel, const void *base, const group_rows *g, int64_t block, int64_t n) {
    for (int64_t j = 0; j < n; j += WORDS) {
        const int64_t rows = cpu_min(n - j, WORDS);
        const float *row[WORDS];
        for (int64_t i = 0; i < rows; i++) row[i] = place_at(base, g, block + j + i);
        bf16_transpose(panel + j, KEYS, row, rows, g->dim);
    }
}
/* Pairs of places: [KEYS/2][width]. */
static void pack_along(uint32_t *panel, const void *base, const group_rows *g, int64_t block, int64_t n) {
    for (int64_t j = 0; j < n; j += 2)
        bf16_pair_rows(panel + j / 2 * g->width, place_at(base, g, block + j), j + 1 < n ? place_at(base, g, block + j + 1) : NULL, g->dim);
}
static size_t panel_words(int64_t width) {
    return (size_t)(KEYS / 2 * width);
}

/* ---- forward ---- */

/* The running softmax of a row; max: of scores times log2(e). */
typedef struct row_sums {
    float max, sum;
} row_sums;

/* Takes up what a row sees of a block's scores: p becomes their weights.  Returns what the sums so far are to be multiplied by. */
static float add_scores(row_sums *sums, uint16_t *p, const float *score, const seen *s, int64_t n, float factor) {
    const __m512 scale = _mm512_set1_ps(factor);
    __m512 largest = _mm512_set1_ps(sums->max), sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < n; j += WORDS) {
        const __m512 x = _mm512_loadu_ps(score + j) * scale;
        largest = _mm512_mask_max_ps(largest, mask_of(s, j), largest, x);
    }
    const float max = _mm512_reduce_max_ps(largest), shrink = max > sums->max ? exp2f(sums->max - max) : 1;
    for (int64_t j = 0; j < n; j += WORDS) {
        const __m512 x = exp2_of(_mm512_loadu_ps(score + j) * scale - _mm512_set1_ps(max));
        const __m512 weight = _mm512_maskz_mov_ps(mask_of(s, j), x);
        sum += weight;
        _mm256_storeu_si256((__m256i *)(p + j), (__m256i)_mm512_cvtneps_pbh(weight));
    }
    sums->sum = sums->sum * shrink + vsum(sum);
    sums->max = max;
    return shrink;
}

/* What a task of the forward works with. */
typedef struct attend_room {
    uint32_t *keys, *values; /* panels of the block */
    bf16_rows q;
    row_sums *sums;
} attend_room;

static void attend_strip(const espi_attention_fwd *a, const group_rows *g, const attend_room *room, int64_t first, int64_t count,
                         int64_t block) {
    _Alignas(64) float score[STRIP][KEYS];
    _Alignas(64) uint16_t p[STRIP][KEYS];
    int32_t index[STRIP];
    seen all;
    if (!seen_by(&all, g, first, count, block)) return;
    const int64_t n = whole(all.to);
    const bf16_left q = bf16_left_of(&room->q, first, 0), weights = {(const uint32_t *)(const void *)p, KEYS / 2, 1};
    bf16_tiles(&(cpu_rows){score[0], KEYS, NULL}, &q, room->keys, KEYS, count, cpu_blocks(g->dim, 2), n, false);
    index_rows(index, g, first, count);
    const cpu_rows out = rows_in(a->out, g, index);
    for (int64_t i = 0; i < count; i++) {
        seen own;
        if (!seen_by(&own, g, first + i, 1, block)) {
            memset(p[i], 0, (size_t)n * sizeof *p[i]);
            continue;
        }
        const float shrink = add_scores(&room->sums[first + i], p[i], score[i], &own, n, g->scale * log2_e);
        float *x = row_at(&out, i);
        for (int64_t d = 0; shrink != 1 && d < g->dim; d++) x[d] *= shrink;
    }
    bf16_tiles(&out, &weights, room->values, g->width, count, cpu_blocks(all.to, 2), g->dim, true);
}

/* Divides by the sum, to which a sink adds one more logit.  The 0 makes -0 to 0: it could tell how many rows were worked on together. */
static void finish(float *out, float *lse, const row_sums *s, const float *sink, int64_t dim) {
    float max = s->max, sum = s->sum, inverse = 1 / sum;
    if (sink) {
        const float logit = *sink * log2_e, largest = logit > max ? logit : max, shrink = exp2f(max - largest);
        sum = sum * shrink + exp2f(logit - largest);
        inverse = shrink / sum;
        max = largest;
    }
    for (int64_t d = 0; d < dim; d++) out[d] = out[d] * inverse + 0.0f;
    *lse = max * ln_2 + logf(sum);
}

size_t cpu_attend_scratch(const espi_attention_fwd *a) {
    const int64_t rows = ATTENTION_QUERIES * (a->heads / a->kv_heads), width = bf16_stride(a->head_dim);
    return 2 * panel_words(width) * sizeof(uint32_t) + (size_t)(rows * width) * sizeof(uint16_t) + (size_t)rows * sizeof(row_sums);
}

void cpu_attend(const espi_attention_fwd *a, void *scratch, int64_t seq, int64_t kv_head, int64_t begin, int64_t end) {
    const attention_call c = ATTENTION_CALL(a);
    const group_rows g = rows_of(&c, seq, kv_head, begin, end);
    const int64_t last = g.place + (end - begin);
    attend_room room = {.keys = scratch};
    room.values = room.keys + panel_words(g.width);
    room.q = (bf16_rows){(uint16_t *)(void *)(room.values + panel_words(g.width)), g.width};
    room.sums = (row_sums *)(void *)(room.q.base + ATTENTION_QUERIES * g.group * g.width);
    for (int64_t r = 0; r < g.n; r++) {
        const int32_t index = index_of(&g, r);
        const cpu_rows q = rows_in(a->q, &g, &index), out = rows_in(a->out, &g, &index);
        bf16_round_rows(&(bf16_rows){room.q.base + r * g.width, g.width}, &q, 1, g.dim);
        memset(row_at(&out, 0), 0, (size_t)g.dim * sizeof(float));
        room.sums[r] = (row_sums){.max = -INFINITY};
    }
    for (int64_t block = first_seen(g.place + 1, g.window) / KEYS * KEYS; block < last; block += KEYS) {
        const int64_t n = cpu_min(KEYS, last - block);
        pack_across(room.keys, a->k, &g, block, n);
        pack_along(room.values, a->v, &g, block, n);
        for (int64_t r = 0; r < g.n; r += STRIP) attend_strip(a, &g, &room, r, cpu_min(STRIP, g.n - r), block);
    }
    for (int64_t r = 0; r < g.n; r++) {
        const int32_t index = index_of(&g, r);
        const cpu_rows out = rows_in(a->out, &g, &index);
        const float *sink = a->sinks ? a->sinks + kv_head * g.group + r % g.group : NULL;
        finish(row_at(&out, 0), (float *)a->lse + g.at + index, &room.sums[r], sink, g.dim);
    }
}

/* ---- backward ---- */

/* P and dS of up to ROWS rows against a block of keys, 0 where a row does not see a key: pairs of rows, and dS row by row. */
typedef struct score_grads {
    _Alignas(64) uint32_t p[ROWS / 2][KEYS], d_s[ROWS / 2][KEYS];
    _Alignas(64) uint16_t d_s_rows[ROWS][KEYS];
} score_grads;

/* What a block of rows is multiplied by and with. */
typedef struct grad_room {
    bf16_rows q, d_out;
    uint32_t *q_pairs, *d_out_pairs; /* [ROWS/2][width] */
    uint32_t *keys;                  /* of each block of keys that is met, three panels: k and v across, k along */
    int64_t first_block;
    float lse[ROWS], delta[ROWS]; /* lse: times log2(e) */
    int32_t index[ROWS];
} grad_room;

static const uint32_t *panel_of(const grad_room *room, int64_t width, int64_t block, int which) {
    return room->keys + (size_t)(3 * (block / KEYS - room->first_block) + which) * panel_words(width);
}

/* Two rows' scores and dP become words of P and dS. */
static void score_pair(score_grads *s, const float (*score)[KEYS], const float (*d_p)[KEYS], const seen sees[2], const float *lse,
                       const float *delta, int64_t row, int64_t n, float scale) {
    const __m512 factor = _mm512_set1_ps(scale * log2_e);
    for (int64_t j = 0; j < n; j += WORDS) {
        __m512 p[2], d_s[2];
        CPU_UNROLL
        for (int i = 0; i < 2; i++) {
            const __mmask16 mask = mask_of(&sees[i], j);
            p[i] = _mm512_maskz_mov_ps(mask, exp2_of(_mm512_loadu_ps(score[i] + j) * factor - _mm512_set1_ps(lse[i])));
            d_s[i] = _mm512_maskz_mul_ps(mask, p[i] * _mm512_set1_ps(scale), _mm512_loadu_ps(d_p[i] + j) - _mm512_set1_ps(delta[i]));
        }
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(d_s[1], d_s[0]);
        _mm512_storeu_si512(s->p[row / 2] + j, bf16_interleave((__m512i)_mm512_cvtne2ps_pbh(p[1], p[0])));
        _mm512_storeu_si512(s->d_s[row / 2] + j, bf16_interleave(both));
        _mm256_storeu_si256((__m256i *)(s->d_s_rows[row] + j), _mm512_castsi512_si256(both));
        _mm256_storeu_si256((__m256i *)(s->d_s_rows[row + 1] + j), _mm512_extracti64x4_epi64(both, 1));
    }
}

/* Entries 0 .. n - 1 of the block for `count` rows; first: the block of rows' first. */
static void form_scores(score_grads *s, const group_rows *g, const grad_room *room, int64_t first, int64_t count, int64_t block,
                        int64_t n) {
    const uint32_t *keys = panel_of(room, g->width, block, 0), *values = panel_of(room, g->width, block, 1);
    for (int64_t i = 0; i < count; i += STRIP) {
        _Alignas(64) float score[STRIP][KEYS], d_p[STRIP][KEYS];
        const int64_t rows = cpu_min(STRIP, count - i), pairs = cpu_blocks(g->dim, 2);
        const bf16_left q = bf16_left_of(&room->q, i, 0), d_out = bf16_left_of(&room->d_out, i, 0);
        bf16_tiles(&(cpu_rows){score[0], KEYS, NULL}, &q, keys, KEYS, rows, pairs, n, false);
        bf16_tiles(&(cpu_rows){d_p[0], KEYS, NULL}, &d_out, values, KEYS, rows, pairs, n, false);
        for (int64_t j = 0; j < rows; j += 2) {
            seen sees[2] = {{0, 0}, {0, 0}};
            for (int64_t k = j; k < cpu_min(rows, j + 2); k++) seen_by(&sees[k - j], g, first + i + k, 1, block);
            score_pair(s, (const float(*)[KEYS])score + j, (const float(*)[KEYS])d_p + j, sees, room->lse + i + j, room->delta + i + j,
                       i + j, n, g->scale);
        }
    }
}

/* What a block of rows adds to the d_k and d_v of entries from .. to - 1 of a block of keys. */
static void key_grads(const espi_attention_bwd *a, const group_rows *g, const grad_room *room, const score_grads *s, int64_t count,
                      int64_t block, int64_t from, int64_t to) {
    for (int64_t j = from, next; j < to; j = next) {
        next = run_end(&g->places, block + j, block + to) - block;
        const int64_t at = element(&g->places, block + j), pairs = cpu_blocks(count, 2);
        const cpu_rows d_k = {(float *)a->d_k + at, g->places.stride, NULL}, d_v = {(float *)a->d_v + at, g->places.stride, NULL};
        bf16_tiles(&d_v, &(bf16_left){s->p[0] + j, 1, KEYS}, room->d_out_pairs, g->width, next - j, pairs, g->dim, true);
        bf16_tiles(&d_k, &(bf16_left){s->d_s[0] + j, 1, KEYS}, room->q_pairs, g->width, next - j, pairs, g->dim, true);
    }
}

/* Rounds a block of rows in both forms and reads what belongs to each. */
static void enter_rows(grad_room *room, const espi_attention_bwd *a, const group_rows *g, int64_t first, int64_t count) {
    index_rows(room->index, g, first, count);
    const cpu_rows q = rows_in(a->q, g, room->index), d_out = rows_in(a->d_out, g, room->index), out = rows_in(a->out, g, room->index);
    bf16_round_rows(&room->q, &q, count, g->dim);
    bf16_round_rows(&room->d_out, &d_out, count, g->dim);
    for (int64_t i = 0; i < count; i++) {
        room->delta[i] = cpu_dot(row_at(&d_out, i), row_at(&out, i), g->dim);
        room->lse[i] = ((const float *)a->lse)[g->at + room->index[i]] * log2_e;
    }
    for (int64_t i = 0; i < count; i += 2) {
        const bool two = i + 1 < count;
        bf16_pair_rows(room->q_pairs + i / 2 * g->width, row_at(&q, i), two ? row_at(&q, i + 1) : NULL, g->dim);
        bf16_pair_rows(room->d_out_pairs + i / 2 * g->width, row_at(&d_out, i), two ? row_at(&d_out, i + 1) : NULL, g->dim);
    }
}

static void row_grads(const espi_attention_bwd *a, const group_rows *g, grad_room *room, const attention_parts *wanted, int64_t first,
                      int64_t count, int64_t from, int64_t to) {
    score_grads s;
    enter_rows(room, a, g, first, count);
    const cpu_rows d_q = rows_in(a->d_q, g, room->index);
    for (int64_t i = 0; wanted->d_q && i < count; i++) memset(row_at(&d_q, i), 0, (size_t)g->dim * sizeof(float));
    for (int64_t block = from / KEYS * KEYS; block < to; block += KEYS) {
        seen all;
        if (!seen_by(&all, g, first, count, block)) continue;
        form_scores(&s, g, room, first, count, block, whole(all.to));
        const int64_t begin = wanted->first - block > all.from ? wanted->first - block : all.from;
        key_grads(a, g, room, &s, count, block, begin, cpu_min(all.to, wanted->end - block));
        if (wanted->d_q)
            bf16_tiles(&d_q, &(bf16_left){(const uint32_t *)(const void *)s.d_s_rows, KEYS / 2, 1}, panel_of(room, g->width, block, 2),
                       g->width, count, cpu_blocks(all.to, 2), g->dim, true);
    }
}

size_t cpu_attention_grads_scratch(const espi_attention_bwd *a) {
    const size_t words = panel_words(bf16_stride(a->head_dim)); /* ROWS rows take as much as KEYS keys */
    return (4 + 3 * (size_t)cpu_blocks(a->spans.tokens, KEYS)) * words * sizeof(uint32_t);
}

void cpu_attention_grads(const espi_attention_bwd *a, void *scratch, int64_t seq, int64_t kv_head, int64_t begin, int64_t end,
                         const attention_parts *wanted) {
    const attention_call c = ATTENTION_CALL(a);
    const group_rows g = rows_of(&c, seq, kv_head, begin, end);
    const int64_t last = g.place + (end - begin), oldest = first_seen(g.place + 1, g.window);
    const int64_t from = wanted->d_q || wanted->first < oldest ? oldest : wanted->first,
                  to = wanted->d_q ? last : cpu_min(last, wanted->end);
    const size_t words = panel_words(g.width);
    if (from >= to) return;
    grad_room room = {.q_pairs = scratch, .first_block = from / KEYS};
    room.d_out_pairs = room.q_pairs + words;
    room.q = (bf16_rows){(uint16_t *)(void *)(room.d_out_pairs + words), g.width};
    room.d_out = (bf16_rows){(uint16_t *)(void *)(room.d_out_pairs + 2 * words), g.width};
    room.keys = room.d_out_pairs + 3 * words;
    uint32_t *panel = room.keys;
    for (int64_t block = from / KEYS * KEYS; block < to; block += KEYS, panel += 3 * words) {
        const int64_t n = cpu_min(KEYS, last - block);
        pack_across(panel, a->k, &g, block, n);
        pack_across(panel + words, a->v, &g, block, n);
        if (wanted->d_q) pack_along(panel + 2 * words, a->k, &g, block, n);
    }
    for (int64_t r = 0; r < g.n; r += ROWS) row_grads(a, &g, &room, wanted, r, cpu_min(ROWS, g.n - r), from, to);
}
