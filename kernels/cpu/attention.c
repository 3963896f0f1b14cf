/* The key-value cache, and causal grouped-query attention over packed sequences: keys in blocks of KEYS from the sequence's start, an
 * online softmax over the blocks.  A query meets its keys in the same blocks whether they are new or in a cache, so decoding gives the bits
 * of the prefill. */
#include "kernels/cpu/cpu.h"

enum { KEYS = 32 };

esp_status ESPI_CPU(espi_kv_append)(const espi_exec *exec, const espi_kv_append *a) {
    (void)exec;
    for (int32_t s = 0; s < a->spans.n_seqs; s++) {
        const int64_t first = a->spans.cu_q[s], n = a->spans.cu_q[s + 1] - first;
        const int64_t row = a->spans.k_start[s] + a->spans.k_len[s] - n;
        memcpy((float *)a->k_cache + row * a->width, (const float *)a->k + first * a->width, (size_t)(n * a->width) * sizeof(float));
        memcpy((float *)a->v_cache + row * a->width, (const float *)a->v + first * a->width, (size_t)(n * a->width) * sizeof(float));
    }
    return ESP_OK;
}

/* out[j] = scale * x . row j, four rows at a time so that the chains of sums overlap. */
static inline void dot_rows(float *out, const float *x, const float *rows, int64_t stride, int64_t keys, int64_t dim, float scale) {
    int64_t j = 0;
    for (; dim % LANES == 0 && j + 4 <= keys; j += 4) {
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

/* out += sum over j of p[j] * row j. */
static inline void add_rows(float *out, const float *p, const float *rows, int64_t stride, int64_t keys, int64_t dim) {
    int64_t d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES) {
        vec s0 = load(out + d), s1 = load(out + d + LANES), s2 = load(out + d + 2 * LANES), s3 = load(out + d + 3 * LANES);
        for (int64_t j = 0; j < keys; j++) {
            const float *row = rows + j * stride + d;
            const vec x = splat(p[j]);
            s0 += x * load(row);
            s1 += x * load(row + LANES);
            s2 += x * load(row + 2 * LANES);
            s3 += x * load(row + 3 * LANES);
        }
        store(out + d, s0);
        store(out + d + LANES, s1);
        store(out + d + 2 * LANES, s2);
        store(out + d + 3 * LANES, s3);
    }
    for (; d < dim; d++)
        for (int64_t j = 0; j < keys; j++) out[d] += p[j] * rows[j * stride + d];
}

/* p = e^(p - shift) over the `keys` entries of a block; returns the sum. */
static inline float exp_block(float p[KEYS], float shift, int64_t keys) {
    vec sum = {0};
    for (int64_t j = keys; j % LANES != 0; j++) p[j] = shift - 100; /* e^-100 counts as 0 */
    for (int64_t j = 0; j < keys; j += LANES) {
        const vec e = vexp(load(p + j) - splat(shift));
        store(p + j, e);
        sum += e;
    }
    return vsum(sum);
}

/* The first key that a query with `keys` keys up to its own sees. */
static int64_t first_seen(int64_t keys, int64_t window) {
    return window > 0 && keys > window ? keys - window : 0;
}

/* One query of one head against keys first .. keys - 1; the rows of k and v lie `stride` apart.  sink: NULL or one more logit. */
static void attend(float *out, float *lse, const float *q, const float *k, const float *v, const float *sink, int64_t first, int64_t keys,
                   int64_t stride, int64_t dim, float scale) {
    float max = -INFINITY, sum = 0, p[KEYS];
    memset(out, 0, (size_t)dim * sizeof *out);
    for (int64_t j0 = first, next; j0 < keys; j0 = next) {
        next = cpu_min(keys, (j0 / KEYS + 1) * KEYS);
        const int64_t n = next - j0;
        float largest = max;
        dot_rows(p, q, k + j0 * stride, stride, n, dim, scale);
        for (int64_t j = 0; j < n; j++) largest = p[j] > largest ? p[j] : largest;
        if (largest > max && j0 > first) { /* what was summed so far was relative to the old maximum */
            const float shrink = expf(max - largest);
            sum *= shrink;
            for (int64_t d = 0; d < dim; d++) out[d] *= shrink;
        }
        max = largest;
        sum += exp_block(p, max, n);
        add_rows(out, p, v + j0 * stride, stride, n, dim);
    }
    float inverse = 1 / sum;
    if (sink) {
        const float largest = *sink > max ? *sink : max, shrink = expf(max - largest);
        sum = sum * shrink + expf(*sink - largest);
        inverse = shrink / sum;
        max = largest;
    }
    for (int64_t d = 0; d < dim; d++) out[d] *= inverse;
    *lse = max + logf(sum);
}

/* Multiply-adds of the products of queries with keys, if all sequences were of the mean length: from sizes alone. */
static double attention_work(int64_t tokens, int64_t sequences, int64_t width) {
    return sequences ? (double)tokens * (double)tokens / (double)sequences * (double)width : 0;
}

esp_status ESPI_CPU(espi_attention_fwd)(const espi_exec *exec, const espi_attention_fwd *a) {
    const int64_t dim = a->head_dim, group = a->heads / a->kv_heads, stride = a->kv_heads * dim;
    const int32_t sequences = a->spans.n_seqs;
    const int64_t tokens = sequences ? a->spans.cu_q[sequences] : 0;
    const int threads = cpu_threads(exec, attention_work(tokens, sequences, a->heads * dim));
    /* A task is a head of a sequence's QUERIES queries; they are numbered through by walking the sequences. */
    enum { QUERIES = 64 };
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int32_t s = 0; s < sequences; s++) {
        const int64_t first = a->spans.cu_q[s], n = a->spans.cu_q[s + 1] - first, blocks = cpu_blocks(n, QUERIES);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < blocks * a->heads; task++) {
            const int64_t head = task % a->heads, begin = task / a->heads * QUERIES, end = cpu_min(n, begin + QUERIES);
            const int64_t key = a->spans.k_start[s] * stride + head / group * dim;
            for (int64_t i = begin; i < end; i++) {
                const int64_t row = (first + i) * a->heads + head, keys = a->spans.k_len[s] - n + i + 1;
                attend((float *)a->out + row * dim, (float *)a->lse + row, (const float *)a->q + row * dim, (const float *)a->k + key,
                       (const float *)a->v + key, a->sinks ? a->sinks + head : NULL, first_seen(keys, a->window), keys, stride, dim,
                       (float)a->scale);
            }
        }
    }
    return ESP_OK;
}

/* Queries of one head whose score gradients are held at a time, so that the sums over them run in registers. */
enum { QUERY_BLOCK = 16 };

/* Queries begin .. end - 1 of one head against their keys, block by block: d_q of these queries, and what they add to d_k and d_v. */
static void query_grads(const espi_attention_bwd *a, float *d_k, float *d_v, const float *k, const float *v, int64_t head, int64_t first,
                        int64_t begin, int64_t end) {
    const int64_t dim = a->head_dim, stride = a->kv_heads * dim, q_stride = a->heads * dim, row = begin * a->heads + head;
    const float *q = (const float *)a->q + row * dim, *d_out = (const float *)a->d_out + row * dim, scale = (float)a->scale;
    float *d_q = (float *)a->d_q + row * dim, delta[QUERY_BLOCK];
    for (int64_t i = 0; i < end - begin; i++) {
        delta[i] = cpu_dot(d_out + i * q_stride, (const float *)a->out + (row + i * a->heads) * dim, dim);
        memset(d_q + i * q_stride, 0, (size_t)dim * sizeof(float));
    }
    for (int64_t j0 = first_seen(begin - first + 1, a->window) / KEYS * KEYS; j0 < end - first; j0 += KEYS) {
        const int64_t seen_last = cpu_min(end - first - j0, KEYS);
        float p_of[KEYS][QUERY_BLOCK] = {{0}}, d_s_of[KEYS][QUERY_BLOCK] = {{0}};
        for (int64_t i = 0; i < end - begin; i++) {
            const int64_t keys = begin + i - first + 1, n = cpu_min(keys - j0, KEYS), seen = first_seen(keys, a->window);
            const int64_t j_first = seen > j0 ? seen - j0 : 0;
            if (n <= j_first) continue;
            float p[KEYS], d_s[KEYS];
            for (int64_t j = 0; j < j_first; j++) p[j] = -INFINITY;
            dot_rows(p + j_first, q + i * q_stride, k + (j0 + j_first) * stride, stride, n - j_first, dim, scale);
            dot_rows(d_s + j_first, d_out + i * q_stride, v + (j0 + j_first) * stride, stride, n - j_first, dim, 1);
            exp_block(p, ((const float *)a->lse)[row + i * a->heads], n);
            for (int64_t j = j_first; j < n; j++) {
                d_s[j] = scale * p[j] * (d_s[j] - delta[i]);
                p_of[j][i] = p[j];
                d_s_of[j][i] = d_s[j];
            }
            add_rows(d_q + i * q_stride, d_s + j_first, k + (j0 + j_first) * stride, stride, n - j_first, dim);
        }
        for (int64_t j = 0; j < seen_last; j++) {
            const int64_t skip = j0 + j > begin - first ? j0 + j - (begin - first) : 0; /* queries before the key do not see it */
            add_rows(d_k + (j0 + j) * stride, d_s_of[j] + skip, q + skip * q_stride, q_stride, end - begin - skip, dim);
            add_rows(d_v + (j0 + j) * stride, p_of[j] + skip, d_out + skip * q_stride, q_stride, end - begin - skip, dim);
        }
    }
}

/* All gradients of one kv head of one sequence: the task owns d_q of the group's heads, d_k and d_v there. */
static void head_grads(const espi_attention_bwd *a, int64_t first, int64_t end, int64_t kv_head) {
    const int64_t dim = a->head_dim, group = a->heads / a->kv_heads, stride = a->kv_heads * dim, key0 = first * stride + kv_head * dim;
    const float *k = (const float *)a->k + key0, *v = (const float *)a->v + key0;
    float *d_k = (float *)a->d_k + key0, *d_v = (float *)a->d_v + key0;
    for (int64_t j = 0; j < end - first; j++) {
        memset(d_k + j * stride, 0, (size_t)dim * sizeof(float));
        memset(d_v + j * stride, 0, (size_t)dim * sizeof(float));
    }
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
        for (int64_t i = first; i < end; i += QUERY_BLOCK) query_grads(a, d_k, d_v, k, v, head, first, i, cpu_min(end, i + QUERY_BLOCK));
}

/* d_sink_h -= sum over all queries, in order, of e^(sink - lse) delta. */
static void sink_grad(const espi_attention_bwd *a, int64_t head, int64_t tokens) {
    double sum = 0;
    for (int64_t t = 0; t < tokens; t++) {
        const int64_t row = t * a->heads + head;
        const float delta = cpu_dot((const float *)a->d_out + row * a->head_dim, (const float *)a->out + row * a->head_dim, a->head_dim);
        sum += (double)delta * expf(a->sinks[head] - ((const float *)a->lse)[row]);
    }
    ((float *)a->d_sinks)[head] -= (float)sum;
}

esp_status ESPI_CPU(espi_attention_bwd)(const espi_exec *exec, const espi_attention_bwd *a) {
    const int64_t sequences = a->spans.n_seqs, tokens = sequences ? a->spans.cu_q[sequences] : 0;
    const int threads = cpu_threads(exec, 3 * attention_work(tokens, sequences, a->heads * a->head_dim));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < sequences * a->kv_heads; task++) {
        const int64_t s = task / a->kv_heads;
        head_grads(a, a->spans.cu_q[s], a->spans.cu_q[s + 1], task % a->kv_heads);
    }
    for (int64_t head = 0; a->d_sinks && a->sinks && head < a->heads; head++) sink_grad(a, head, tokens);
    return ESP_OK;
}
