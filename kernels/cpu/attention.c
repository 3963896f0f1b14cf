/* The key-value cache, and causal grouped-query attention over packed sequences, cut into tasks.
 *
 * Keys stand at places, counted through a sequence's prefix and then its own keys.  They are met in blocks of places from place 0, an
 * online softmax over the blocks.  A query meets its keys in the same blocks whether they are new, in a cache or in a prefix that others
 * share: decoding gives the bits of the prefill, and a shared prompt those of a repeated one. */
#include "kernels/cpu/attention.h"

#include <omp.h>

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

/* Multiply-adds of the products of queries with keys. */
static double attention_work(const espi_spans *spans, int64_t width) {
    double pairs = 0;
    for (int32_t s = 0; s < spans->n_seqs; s++) {
        const int32_t prefix = spans->prefix_len ? spans->prefix_len[s] : 0;
        pairs += (double)(spans->cu_q[s + 1] - spans->cu_q[s]) * (double)(prefix + spans->k_len[s]);
    }
    return pairs * (double)width;
}

/* A thread's part of the scratch. */
static void *own_scratch(const espi_exec *exec, size_t bytes) {
    return (char *)exec->scratch + (size_t)omp_get_thread_num() * bytes;
}

size_t ESPI_CPU(espi_attention_fwd_scratch)(const espi_exec *exec, const espi_attention_fwd *a) {
    return (size_t)exec->threads * cpu_attend_scratch(a);
}

esp_status ESPI_CPU(espi_attention_fwd)(const espi_exec *exec, const espi_attention_fwd *a) {
    const espi_spans *spans = &a->spans;
    const int threads = cpu_threads(exec, attention_work(spans, a->heads * a->head_dim));
    const size_t bytes = cpu_attend_scratch(a);
    /* The tasks are numbered through by walking the sequences. */
#pragma omp parallel num_threads(threads) if (threads > 1)
    for (int32_t s = 0; s < spans->n_seqs; s++) {
        const int64_t first = spans->cu_q[s], last = spans->cu_q[s + 1], blocks = cpu_blocks(last - first, ATTENTION_QUERIES);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < blocks * a->kv_heads; task++) {
            const int64_t begin = first + (blocks - 1 - task / a->kv_heads) * ATTENTION_QUERIES; /* the longest first */
            cpu_attend(a, own_scratch(exec, bytes), s, task % a->kv_heads, begin, cpu_min(last, begin + ATTENTION_QUERIES));
        }
    }
    return ESP_OK;
}

/* ---- backward ---- */

static void clear_keys(const espi_attention_bwd *a, int64_t kv_head, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j++) {
        const int64_t at = (j * a->kv_heads + kv_head) * a->head_dim;
        memset((float *)a->d_k + at, 0, (size_t)a->head_dim * sizeof(float));
        memset((float *)a->d_v + at, 0, (size_t)a->head_dim * sizeof(float));
    }
}

static int64_t prefix_of(const espi_spans *spans, int64_t seq) {
    return spans->prefix_len ? spans->prefix_len[seq] : 0;
}
static bool uses(const espi_spans *spans, int64_t user, int64_t seq) {
    return prefix_of(spans, user) > 0 && spans->prefix_start[user] == spans->cu_q[seq];
}

/* All gradients of a kv head of a sequence and, after it, of those that have it as their prefix, in their order. */
static void family_grads(const espi_attention_bwd *a, void *scratch, int64_t seq, int64_t kv_head) {
    const espi_spans *spans = &a->spans;
    const attention_parts all = {true, 0, INT64_MAX};
    for (int64_t s = seq; s < spans->n_seqs; s++) {
        if (s > seq && !uses(spans, s, seq)) continue;
        clear_keys(a, kv_head, spans->cu_q[s], spans->cu_q[s + 1]);
        cpu_attention_grads(a, scratch, s, kv_head, spans->cu_q[s], spans->cu_q[s + 1], &all);
    }
}

/* d_k and d_v of a sequence's keys first .. end - 1, counted within it: its own queries', then those of its users. */
static void keys_alone(const espi_attention_bwd *a, void *scratch, int64_t seq, int64_t kv_head, int64_t first, int64_t end) {
    const espi_spans *spans = &a->spans;
    const int64_t before = prefix_of(spans, seq);
    clear_keys(a, kv_head, spans->cu_q[seq] + first, spans->cu_q[seq] + end);
    for (int64_t s = seq; s < spans->n_seqs; s++) {
        if (s > seq && !uses(spans, s, seq)) continue;
        const int64_t place = s == seq ? before : 0;
        cpu_attention_grads(a, scratch, s, kv_head, spans->cu_q[s], spans->cu_q[s + 1],
                            &(attention_parts){.first = place + first, .end = place + end});
    }
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

/* A kv head of a family is one task, unless the largest would keep the other threads waiting for longer than it takes to form the scores
 * twice, once for the gradients of the queries and once for those of the keys: 7 products instead of 5. */
static bool families_balance(const espi_attention_bwd *a, int threads) {
    const espi_spans *spans = &a->spans;
    double all = 0, largest = 0;
    for (int64_t s = 0; s < spans->n_seqs; s++) {
        double pairs = 0;
        for (int64_t u = s; u < spans->n_seqs && prefix_of(spans, s) == 0; u++)
            if (u == s || uses(spans, u, s)) pairs += (double)spans->k_len[u] * (double)(2 * prefix_of(spans, u) + spans->k_len[u]);
        all += pairs * (double)a->kv_heads;
        largest = pairs > largest ? pairs : largest;
    }
    return largest * threads <= 1.4 * all;
}

/* The same sums in the same order, in more tasks. */
static void split_grads(const espi_exec *exec, const espi_attention_bwd *a, int threads) {
    const size_t bytes = cpu_attention_grads_scratch(a);
    const espi_spans *spans = &a->spans;
#pragma omp parallel num_threads(threads)
    for (int64_t s = 0; s < spans->n_seqs; s++) {
        const int64_t begin = spans->cu_q[s], n = spans->cu_q[s + 1] - begin, blocks = cpu_blocks(n, ATTENTION_QUERIES);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < blocks * a->kv_heads; task++) {
            const int64_t first = task / a->kv_heads * ATTENTION_QUERIES;
            keys_alone(a, own_scratch(exec, bytes), s, task % a->kv_heads, first, cpu_min(n, first + ATTENTION_QUERIES));
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t task = 0; task < blocks * a->kv_heads; task++) {
            const int64_t first = task / a->kv_heads * ATTENTION_QUERIES, end = cpu_min(n, first + ATTENTION_QUERIES);
            cpu_attention_grads(a, own_scratch(exec, bytes), s, task % a->kv_heads, begin + first, begin + end,
                                &(attention_parts){.d_q = true});
        }
    }
}

size_t ESPI_CPU(espi_attention_bwd_scratch)(const espi_exec *exec, const espi_attention_bwd *a) {
    return (size_t)exec->threads * cpu_attention_grads_scratch(a);
}

esp_status ESPI_CPU(espi_attention_bwd)(const espi_exec *exec, const espi_attention_bwd *a) {
    const espi_spans *spans = &a->spans;
    const int threads = cpu_threads(exec, 3 * attention_work(spans, a->heads * a->head_dim));
    if (families_balance(a, threads)) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
        for (int64_t task = 0; task < spans->n_seqs * a->kv_heads; task++)
            if (prefix_of(spans, task / a->kv_heads) == 0)
                family_grads(a, own_scratch(exec, cpu_attention_grads_scratch(a)), task / a->kv_heads, task % a->kv_heads);
    } else {
        split_grads(exec, a, threads);
    }
    for (int64_t head = 0; a->d_sinks && a->sinks && head < a->heads; head++) sink_grad(a, head, spans->tokens);
    return ESP_OK;
}
