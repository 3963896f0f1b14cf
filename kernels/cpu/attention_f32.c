/* A task of attention in f32.  Keys are met in blocks of KEYS places.
 *
 * Where a strip of queries sees all of a block, the products run in register tiles.  Elsewhere (on the diagonal, at the edge of a window,
 * in the block in which a prefix ends) they run query by query.  Each sum has the same terms in the same order either way. */
#include "kernels/cpu/attention.h"

/* Queries that are worked on at a time, and the height of a register tile. */
enum { KEYS = 32, QUERIES = ATTENTION_QUERIES, QUERY_BLOCK = 16, STRIP = LANES / 4 };

/* ---- products ---- */

/* Lanes i of each quad of lanes of a (i < 4) or b (i - 4). */
#define LANE(quad, i) ((i) < 4 ? 4 * (quad) + (i) : LANES + 4 * (quad) + (i)-4)
#define QUAD(quad, i, j, k, l) LANE(quad, i), LANE(quad, j), LANE(quad, k), LANE(quad, l)
#if defined(__AVX512F__)
#define IN_QUADS(a, b, i, j, k, l)                                                                                                         \
    __builtin_shufflevector(a, b, QUAD(0, i, j, k, l), QUAD(1, i, j, k, l), QUAD(2, i, j, k, l), QUAD(3, i, j, k, l))
#elif defined(__AVX2__)
#define IN_QUADS(a, b, i, j, k, l) __builtin_shufflevector(a, b, QUAD(0, i, j, k, l), QUAD(1, i, j, k, l))
#else
#define IN_QUADS(a, b, i, j, k, l) __builtin_shufflevector(a, b, QUAD(0, i, j, k, l))
#endif

/* Quad i: what vsum() folds x[i] to before its last two additions. */
static inline vec fold_strip(const vec x[STRIP]) {
#if defined(__AVX512F__)
    const vec h01 = __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    __builtin_shufflevector(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    const vec h23 = __builtin_shufflevector(x[2], x[3], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    __builtin_shufflevector(x[2], x[3], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    return __builtin_shufflevector(h01, h23, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(h01, h23, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#elif defined(__AVX2__)
    return __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 8, 9, 10, 11) + __builtin_shufflevector(x[0], x[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
    return x[0];
#endif
}

/* Quad i, lane j: vsum(x[j][i]), to the bit. */
static inline vec vsum_tile(const vec x[4][STRIP]) {
    const vec f0 = fold_strip(x[0]), f1 = fold_strip(x[1]), f2 = fold_strip(x[2]), f3 = fold_strip(x[3]);
    const vec f01 = IN_QUADS(f0, f1, 0, 4, 1, 5) + IN_QUADS(f0, f1, 2, 6, 3, 7);
    const vec f23 = IN_QUADS(f2, f3, 0, 4, 1, 5) + IN_QUADS(f2, f3, 2, 6, 3, 7);
    return IN_QUADS(f01, f23, 0, 1, 4, 5) + IN_QUADS(f01, f23, 2, 3, 6, 7);
}

/* out[i][j] = scale * x_i . row j, for STRIP rows x_i and the KEYS rows of a block; dim is a multiple of LANES. */
static void dot_tile(float (*out)[KEYS], const float *x, int64_t x_stride, const float *rows, int64_t stride, int64_t dim, float scale) {
    for (int64_t j0 = 0; j0 < KEYS; j0 += 4) {
        const float *row = rows + j0 * stride;
        vec sum[4][STRIP] = {{{0}}};
        for (int64_t d = 0; d < dim; d += LANES) {
            vec q[STRIP];
#pragma GCC unroll 4
            for (int i = 0; i < STRIP; i++) q[i] = load(x + i * x_stride + d);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const vec key = load(row + j * stride + d);
#pragma GCC unroll 4
                for (int i = 0; i < STRIP; i++) sum[j][i] += q[i] * key;
            }
        }
        const vec score = splat(scale) * vsum_tile(sum);
#pragma GCC unroll 4
        for (int i = 0; i < STRIP; i++) memcpy(&out[i][j0], (const float *)&score + 4 * i, 4 * sizeof(float));
    }
}

/* out[j] = scale * x . row j. */
static void dot_rows(float *out, const float *x, const float *rows, int64_t stride, int64_t keys, int64_t dim, float scale) {
    int64_t j = 0;
    for (; dim % LANES == 0 && j + 4 <= keys; j += 4) { /* four at a time, so that the chains of sums overlap */
        const float *row = rows + j * stride;
        vec s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
        for (int64_t d = 0; d < dim; d += LANES) {
            const vec q = load(x + d);
            s0 += q * load(row + d);
            s1 += q * load(row + stride + d);
            s2 += q * load(row + 2 * stride + d);
            s3 += q * load(row + 3 * stride + d);
        }
        out[j] = scale * vsum(s0);
        out[j + 1] = scale * vsum(s1);
        out[j + 2] = scale * vsum(s2);
        out[j + 3] = scale * vsum(s3);
    }
    for (; j < keys; j++) out[j] = scale * cpu_dot(x, rows + j * stride, dim);
}

/* out_i += sum over j of p[i * p_row + j * p_step] * row j, for `height` rows out_i, a constant where this is inlined. */
static inline __attribute__((always_inline)) void add_tile(float *out, int64_t out_stride, const float *p, int64_t p_row, int64_t p_step,
                                                           const float *rows, int64_t stride, int64_t n, int64_t dim, const int height) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) {
        vec sum[STRIP][4];
#pragma GCC unroll 4
        for (int i = 0; i < height; i++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) sum[i][c] = load(out + i * out_stride + d + c * LANES);
        for (int64_t j = 0; j < n; j++) {
            const float *row = rows + j * stride + d;
            const vec r0 = load(row), r1 = load(row + LANES), r2 = load(row + 2 * LANES), r3 = load(row + 3 * LANES);
#pragma GCC unroll 4
            for (int i = 0; i < height; i++) {
                const vec x = splat(p[i * p_row + j * p_step]);
                sum[i][0] += x * r0;
                sum[i][1] += x * r1;
                sum[i][2] += x * r2;
                sum[i][3] += x * r3;
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < height; i++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) store(out + i * out_stride + d + c * LANES, sum[i][c]);
    }
    for (; d + LANES <= dim; d += LANES) {
        vec sum[STRIP];
#pragma GCC unroll 4
        for (int i = 0; i < height; i++) sum[i] = load(out + i * out_stride + d);
        for (int64_t j = 0; j < n; j++) {
            const vec row = load(rows + j * stride + d);
#pragma GCC unroll 4
            for (int i = 0; i < height; i++) sum[i] += splat(p[i * p_row + j * p_step]) * row;
        }
#pragma GCC unroll 4
        for (int i = 0; i < height; i++) store(out + i * out_stride + d, sum[i]);
    }
    for (; d < dim; d++)
        for (int i = 0; i < height; i++)
            for (int64_t j = 0; j < n; j++) out[i * out_stride + d] += p[i * p_row + j * p_step] * rows[j * stride + d];
}

static void add_strip(float *out, int64_t out_stride, const float *p, int64_t p_row, int64_t p_step, const float *rows, int64_t stride,
                      int64_t n, int64_t dim) {
    add_tile(out, out_stride, p, p_row, p_step, rows, stride, n, dim, STRIP);
}
static void add_rows(float *out, const float *p, int64_t p_step, const float *rows, int64_t stride, int64_t n, int64_t dim) {
    add_tile(out, 0, p, 0, p_step, rows, stride, n, dim, 1);
}

/* p = e^(p - shift) over the n entries of a block; returns the sum. */
static inline float exp_block(float p[KEYS], float shift, int64_t n) {
    vec sum = {0};
    for (int64_t j = n; j % LANES != 0; j++) p[j] = shift - 100; /* e^-100 counts as 0 */
    for (int64_t j = 0; j < n; j += LANES) {
        const vec e = vexp(load(p + j) - splat(shift));
        store(p + j, e);
        sum += e;
    }
    return vsum(sum);
}

/* The largest of the n entries of a block, or `largest` where that is larger. */
static inline float block_max(float p[KEYS], float largest, int64_t n) {
    vec most = splat(largest);
    for (int64_t j = n; j % LANES != 0; j++) p[j] = -INFINITY;
    for (int64_t j = 0; j < n; j += LANES) most = vmax(load(p + j), most);
    return vlargest(most);
}

/* ---- what a query sees ---- */

/* Up to QUERIES consecutive queries of one head. */
typedef struct queries {
    key_places places;
    int64_t n, place;        /* of the first */
    int64_t element, stride; /* of the first, and from one to the next, in q and out */
    int64_t row, heads;      /* the same in lse */
    int64_t window, dim;
    float scale;
} queries;

/* Queries begin .. end - 1 of sequence seq. */
static queries queries_of(const attention_call *c, int64_t seq, int64_t begin, int64_t end, int64_t head) {
    const int64_t row = begin * c->heads + head;
    queries q = {.places = places_of(c->spans, seq, c->kv_heads, head / (c->heads / c->kv_heads), c->dim),
                 .n = end - begin,
                 .element = row * c->dim,
                 .stride = c->heads * c->dim,
                 .row = row,
                 .heads = c->heads,
                 .window = c->window,
                 .dim = c->dim,
                 .scale = c->scale};
    q.place = places_upto(c, seq, begin) - 1;
    return q;
}

/* What query i sees of the block that begins at `block`: places *from .. *to - 1; false: nothing. */
static bool seen_of_block(const queries *q, int64_t i, int64_t block, int64_t *from, int64_t *to) {
    const int64_t keys = q->place + i + 1, first = first_seen(keys, q->window);
    *from = first > block ? first : block;
    *to = cpu_min(keys, block + KEYS);
    return *from < *to;
}

/* Do queries i .. i + count - 1 see all of the block, whose rows lie one after the other? */
static bool sees_whole(const queries *q, int64_t i, int64_t count, int64_t block) {
    const int64_t prefix = q->places.prefix;
    return i + count <= q->n && block + KEYS <= q->place + i + 1 && first_seen(q->place + i + count, q->window) <= block &&
           (block + KEYS <= prefix || block >= prefix) && q->dim % LANES == 0;
}

/* p[j] = scale * x . key at place from + j. */
static void dot_places(float *p, const queries *q, const float *x, const float *base, int64_t from, int64_t to, float scale) {
    for (int64_t j = from, next; j < to; j = next) {
        next = run_end(&q->places, j, to);
        dot_rows(p + j - from, x, base + element(&q->places, j), q->places.stride, next - j, q->dim, scale);
    }
}
/* out += sum of p[j] * row at place from + j. */
static void add_places(float *out, const queries *q, const float *p, const float *base, int64_t from, int64_t to) {
    for (int64_t j = from, next; j < to; j = next) {
        next = run_end(&q->places, j, to);
        add_rows(out, p + j - from, 1, base + element(&q->places, j), q->places.stride, next - j, q->dim);
    }
}

/* ---- forward ---- */

/* The running softmax of a query. */
typedef struct row_sums {
    float max, sum;
} row_sums;

/* Takes up a block of n scores, which become exponentials; out: the weighted values so far.  first: there is nothing yet. */
static void add_block(row_sums *s, float *out, float p[KEYS], int64_t n, int64_t dim, bool first) {
    const float largest = block_max(p, s->max, n);
    if (largest > s->max && !first) { /* what was summed so far was relative to the old maximum */
        const float shrink = expf(s->max - largest);
        s->sum *= shrink;
        for (int64_t d = 0; d < dim; d++) out[d] *= shrink;
    }
    s->max = largest;
    s->sum += exp_block(p, largest, n);
}

/* A strip of `count` queries against the block at `block`. */
static void attend_strip(const espi_attention_fwd *a, const queries *q, row_sums *sums, int64_t first, int64_t count, int64_t block) {
    const bool whole = count == STRIP && sees_whole(q, first, count, block);
    const float *x = (const float *)a->q + q->element + first * q->stride, *k = a->k, *v = a->v;
    float *out = (float *)a->out + q->element + first * q->stride, p[STRIP][KEYS];
    if (whole) dot_tile(p, x, q->stride, k + element(&q->places, block), q->places.stride, q->dim, q->scale);
    for (int64_t i = 0; i < count; i++) {
        int64_t from, to;
        if (!seen_of_block(q, first + i, block, &from, &to)) continue;
        if (!whole) dot_places(p[i], q, x + i * q->stride, k, from, to, q->scale);
        add_block(&sums[first + i], out + i * q->stride, p[i], to - from, q->dim, sums[first + i].sum == 0);
        if (!whole) add_places(out + i * q->stride, q, p[i], v, from, to);
    }
    if (whole) add_strip(out, q->stride, p[0], KEYS, 1, v + element(&q->places, block), q->places.stride, KEYS, q->dim);
}

/* Divides by the sum, to which a sink adds one more logit. */
static void finish(float *out, float *lse, const row_sums *s, const float *sink, int64_t dim) {
    float max = s->max, sum = s->sum, inverse = 1 / sum;
    if (sink) {
        const float largest = *sink > max ? *sink : max, shrink = expf(max - largest);
        sum = sum * shrink + expf(*sink - largest);
        inverse = shrink / sum;
        max = largest;
    }
    for (int64_t d = 0; d < dim; d++) out[d] *= inverse;
    *lse = max + logf(sum);
}

static void attend(const espi_attention_fwd *a, const queries *q, const float *sink) {
    row_sums sums[QUERIES];
    float *out = (float *)a->out + q->element;
    for (int64_t i = 0; i < q->n; i++) {
        sums[i] = (row_sums){.max = -INFINITY};
        memset(out + i * q->stride, 0, (size_t)q->dim * sizeof *out);
    }
    for (int64_t block = first_seen(q->place + 1, q->window) / KEYS * KEYS; block < q->place + q->n; block += KEYS)
        for (int64_t i = 0; i < q->n; i += STRIP) attend_strip(a, q, sums, i, cpu_min(STRIP, q->n - i), block);
    for (int64_t i = 0; i < q->n; i++) finish(out + i * q->stride, (float *)a->lse + q->row + i * q->heads, &sums[i], sink, q->dim);
}

void cpu_attend(const espi_attention_fwd *a, void *scratch, int64_t seq, int64_t kv_head, int64_t begin, int64_t end) {
    (void)scratch;
    const attention_call c = ATTENTION_CALL(a);
    const int64_t group = c.heads / c.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const queries q = queries_of(&c, seq, begin, end, head);
        attend(a, &q, a->sinks ? a->sinks + head : NULL);
    }
}

size_t cpu_attend_scratch(const espi_attention_fwd *a) {
    (void)a;
    return 0;
}

/* ---- backward ---- */

/* P and dS of up to QUERY_BLOCK queries against a block of keys; 0 where a query does not see a key. */
typedef struct score_grads {
    _Alignas(64) float p[QUERY_BLOCK][KEYS], d_s[QUERY_BLOCK][KEYS];
} score_grads;

/* From scores and dP, which are in p and d_s, to P and dS of entries first .. end - 1. */
static void score_row(float p[KEYS], float d_s[KEYS], float scale, float lse, float delta, int64_t first, int64_t end) {
    exp_block(p, lse, end);
    for (int64_t j = first; j < end; j++) d_s[j] = scale * p[j] * (d_s[j] - delta);
}

/* A strip of queries that all see the whole block. */
static void whole_strip(const espi_attention_bwd *a, const queries *q, bool d_q, float (*p)[KEYS], float (*d_s)[KEYS], const float *delta,
                        int64_t first, int64_t block) {
    const int64_t at = q->element + first * q->stride, key = element(&q->places, block), stride = q->places.stride;
    const float *k = (const float *)a->k + key, *lse = (const float *)a->lse + q->row + first * q->heads;
    dot_tile(p, (const float *)a->q + at, q->stride, k, stride, q->dim, q->scale);
    dot_tile(d_s, (const float *)a->d_out + at, q->stride, (const float *)a->v + key, stride, q->dim, 1);
    for (int64_t i = 0; i < STRIP; i++) score_row(p[i], d_s[i], q->scale, lse[i * q->heads], delta[first + i], 0, KEYS);
    if (d_q) add_strip((float *)a->d_q + at, q->stride, d_s[0], KEYS, 1, k, stride, KEYS, q->dim);
}

/* Query i, which sees some of the block or nothing. */
static void partial_row(const espi_attention_bwd *a, const queries *q, bool d_q, float p[KEYS], float d_s[KEYS], const float *delta,
                        int64_t i, int64_t block) {
    const int64_t at = q->element + i * q->stride;
    int64_t from, to;
    memset(p, 0, KEYS * sizeof *p);
    memset(d_s, 0, KEYS * sizeof *d_s);
    if (!seen_of_block(q, i, block, &from, &to)) return;
    const int64_t first = from - block;
    for (int64_t j = 0; j < first; j++) p[j] = -INFINITY;
    dot_places(p + first, q, (const float *)a->q + at, a->k, from, to, q->scale);
    dot_places(d_s + first, q, (const float *)a->d_out + at, a->v, from, to, 1);
    score_row(p, d_s, q->scale, ((const float *)a->lse)[q->row + i * q->heads], delta[i], first, to - block);
    if (d_q) add_places((float *)a->d_q + at, q, d_s + first, a->k, from, to);
}

/* What `count` queries from `first` on add to d_k and d_v of the block.  whole: each sees all of it, and all is wanted. */
static void key_grads(const espi_attention_bwd *a, const queries *q, const attention_parts *wanted, const score_grads *s, int64_t first,
                      int64_t count, int64_t block, bool whole) {
    const int64_t at = q->element + first * q->stride, stride = q->places.stride;
    const float *x = (const float *)a->q + at, *d_out = (const float *)a->d_out + at;
    float *d_k = a->d_k, *d_v = a->d_v;
    for (int64_t j = 0; whole && j < KEYS; j += STRIP) {
        const int64_t key = element(&q->places, block + j);
        add_strip(d_k + key, stride, s->d_s[0] + j, 1, KEYS, x, q->stride, count, q->dim);
        add_strip(d_v + key, stride, s->p[0] + j, 1, KEYS, d_out, q->stride, count, q->dim);
    }
    if (whole) return;
    const int64_t end = cpu_min(cpu_min(wanted->end, q->place + first + count) - block, KEYS);
    for (int64_t j = wanted->first > block ? wanted->first - block : 0; j < end; j++) {
        const int64_t key = element(&q->places, block + j), before = block + j - (q->place + first);
        const int64_t skip = before > 0 ? before : 0; /* queries before the key do not see it */
        add_rows(d_k + key, s->d_s[skip] + j, KEYS, x + skip * q->stride, q->stride, count - skip, q->dim);
        add_rows(d_v + key, s->p[skip] + j, KEYS, d_out + skip * q->stride, q->stride, count - skip, q->dim);
    }
}

/* Queries first .. first + count - 1 against the block at `block`. */
static void block_grads(const espi_attention_bwd *a, const queries *q, const attention_parts *wanted, const float *delta, int64_t first,
                        int64_t count, int64_t block) {
    score_grads s;
    bool all_whole = wanted->first <= block && block + KEYS <= wanted->end;
    for (int64_t i = 0; i < count; i += STRIP) {
        const bool whole = count - i >= STRIP && sees_whole(q, first + i, STRIP, block);
        all_whole = all_whole && whole;
        if (whole) whole_strip(a, q, wanted->d_q, s.p + i, s.d_s + i, delta, first + i, block);
        for (int64_t j = i; !whole && j < cpu_min(count, i + STRIP); j++)
            partial_row(a, q, wanted->d_q, s.p[j], s.d_s[j], delta, first + j, block);
    }
    if (wanted->first < wanted->end) key_grads(a, q, wanted, &s, first, count, block, all_whole);
}

static void query_grads(const espi_attention_bwd *a, const queries *q, const attention_parts *wanted) {
    const int64_t last = q->place + q->n, seen = first_seen(q->place + 1, q->window);
    const int64_t from = wanted->d_q || wanted->first < seen ? seen : wanted->first, to = wanted->d_q ? last : cpu_min(last, wanted->end);
    float delta[QUERIES];
    if (from >= to) return;
    for (int64_t i = 0; i < q->n; i++) {
        const int64_t at = q->element + i * q->stride;
        delta[i] = cpu_dot((const float *)a->d_out + at, (const float *)a->out + at, q->dim);
        if (wanted->d_q) memset((float *)a->d_q + at, 0, (size_t)q->dim * sizeof(float));
    }
    for (int64_t block = from / KEYS * KEYS; block < to; block += KEYS) {
        for (int64_t first = 0; first < q->n; first += QUERY_BLOCK) {
            const int64_t count = cpu_min(QUERY_BLOCK, q->n - first);
            if (block < q->place + first + count && first_seen(q->place + first + 1, q->window) < block + KEYS)
                block_grads(a, q, wanted, delta, first, count, block);
        }
    }
}

void cpu_attention_grads(const espi_attention_bwd *a, void *scratch, int64_t seq, int64_t kv_head, int64_t begin, int64_t end,
                         const attention_parts *wanted) {
    (void)scratch;
    const attention_call c = ATTENTION_CALL(a);
    const int64_t group = c.heads / c.kv_heads;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t i = begin; i < end; i += QUERIES) {
            const queries q = queries_of(&c, seq, i, cpu_min(end, i + QUERIES), head);
            query_grads(a, &q, wanted);
        }
    }
}

size_t cpu_attention_grads_scratch(const espi_attention_bwd *a) {
    (void)a;
    return 0;
}
