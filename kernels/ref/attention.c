/* The key-value cache, and causal grouped-query attention over packed sequences.  No score matrix: the forward is an online softmax, the
 * backward recomputes each score from the saved log-sum-exp, once for the query's gradient and once for the key's and value's. */
#include "kernels/ref/ref.h"

static double dot(const real *x, const real *y, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)x[i] * y[i];
    return sum;
}

esp_status ESPI_REF_NAME(espi_kv_append)(const espi_exec *exec, const espi_kv_append *a) {
    (void)exec;
    for (int32_t s = 0; s < a->spans.n_seqs; s++) {
        const int64_t end = a->spans.k_start[s] + a->spans.k_len[s];
        for (int64_t i = a->spans.cu_q[s]; i < a->spans.cu_q[s + 1]; i++) {
            const int64_t row = end - (a->spans.cu_q[s + 1] - i);
            for (int64_t c = 0; c < a->width; c++) {
                ((real *)a->k_cache)[row * a->width + c] = ((const real *)a->k)[i * a->width + c];
                ((real *)a->v_cache)[row * a->width + c] = ((const real *)a->v)[i * a->width + c];
            }
        }
    }
    return ESP_OK;
}

/* What stands before the queries of a sequence: its prefix, then its own keys, in places counted through. */
static int64_t prefix_of(const espi_spans *spans, int32_t seq) {
    return spans->prefix_len ? spans->prefix_len[seq] : 0;
}
static int64_t key_row(const espi_spans *spans, int32_t seq, int64_t place) {
    const int64_t prefix = prefix_of(spans, seq);
    return place < prefix ? spans->prefix_start[seq] + place : spans->k_start[seq] + place - prefix;
}

size_t ESPI_REF_NAME(espi_attention_fwd_scratch)(const espi_exec *exec, const espi_attention_fwd *a) {
    (void)exec;
    return (size_t)a->head_dim * sizeof(double);
}

/* One query of one head, which sees the keys at places first .. last; returns the log-sum-exp.  The sink, if any, comes before the keys,
 * with no value of its own. */
static double attend(const espi_attention_fwd *a, double *sum_v, int32_t seq, int64_t q_row, int64_t head, int64_t first, int64_t last) {
    const int64_t dim = a->head_dim, kv_head = head / (a->heads / a->kv_heads);
    const real *q = (const real *)a->q + q_row * dim;
    real *out = (real *)a->out + q_row * dim;
    double max = a->sinks ? a->sinks[head] : -INFINITY, sum = a->sinks ? 1 : 0;
    for (int64_t d = 0; d < dim; d++) sum_v[d] = 0;
    for (int64_t j = first; j <= last; j++) {
        const int64_t at = (key_row(&a->spans, seq, j) * a->kv_heads + kv_head) * dim;
        const double score = a->scale * dot(q, (const real *)a->k + at, dim);
        if (score > max) { /* what was summed so far was relative to the old maximum */
            const double shrink = exp(max - score);
            sum *= shrink;
            for (int64_t d = 0; d < dim; d++) sum_v[d] *= shrink;
            max = score;
        }
        const double p = exp(score - max);
        sum += p;
        for (int64_t d = 0; d < dim; d++) sum_v[d] += p * ((const real *)a->v)[at + d];
    }
    for (int64_t d = 0; d < dim; d++) out[d] = (real)(sum_v[d] / sum);
    return max + log(sum);
}

esp_status ESPI_REF_NAME(espi_attention_fwd)(const espi_exec *exec, const espi_attention_fwd *a) {
    const espi_spans *spans = &a->spans;
    for (int32_t s = 0; s < spans->n_seqs; s++) {
        for (int64_t i = spans->cu_q[s]; i < spans->cu_q[s + 1]; i++) {
            const int64_t last = prefix_of(spans, s) + spans->k_len[s] - (spans->cu_q[s + 1] - i);
            const int64_t first = a->window > 0 && last >= a->window ? last - a->window + 1 : 0;
            for (int64_t head = 0; head < a->heads; head++) {
                const int64_t row = i * a->heads + head;
                ((real *)a->lse)[row] = (real)attend(a, exec->scratch, s, row, head, first, last);
            }
        }
    }
    return ESP_OK;
}

size_t ESPI_REF_NAME(espi_attention_bwd_scratch)(const espi_exec *exec, const espi_attention_bwd *a) {
    (void)exec;
    return (size_t)a->head_dim * 2 * sizeof(double);
}

static double delta_of(const espi_attention_bwd *a, int64_t q_row) {
    const int64_t at = q_row * a->head_dim;
    return dot((const real *)a->d_out + at, (const real *)a->out + at, a->head_dim);
}

/* P and dS of query-head row `q_row` against key-head row `k_row`. */
static void score_grad(double *p, double *d_s, const espi_attention_bwd *a, int64_t q_row, int64_t k_row) {
    const int64_t dim = a->head_dim;
    const real *d_out = (const real *)a->d_out + q_row * dim;
    const double score = a->scale * dot((const real *)a->q + q_row * dim, (const real *)a->k + k_row * dim, dim);
    *p = exp(score - ((const real *)a->lse)[q_row]);
    *d_s = *p * (dot(d_out, (const real *)a->v + k_row * dim, dim) - delta_of(a, q_row));
}

/* Query i of sequence seq. */
static void query_grad(const espi_attention_bwd *a, double *d_q, int32_t seq, int64_t i, int64_t head) {
    const int64_t dim = a->head_dim, q_row = i * a->heads + head, kv_head = head / (a->heads / a->kv_heads);
    const int64_t place = prefix_of(&a->spans, seq) + i - a->spans.cu_q[seq];
    for (int64_t d = 0; d < dim; d++) d_q[d] = 0;
    for (int64_t j = a->window > 0 && place >= a->window ? place - a->window + 1 : 0; j <= place; j++) {
        const int64_t k_row = key_row(&a->spans, seq, j) * a->kv_heads + kv_head;
        double p, d_s;
        score_grad(&p, &d_s, a, q_row, k_row);
        for (int64_t d = 0; d < dim; d++) d_q[d] += d_s * ((const real *)a->k)[k_row * dim + d];
    }
    for (int64_t d = 0; d < dim; d++) ((real *)a->d_q)[q_row * dim + d] = (real)(a->scale * d_q[d]);
}

/* What the queries of sequence seq give to the key-head row k_row, which stands at `place` before them. */
static void add_key_grad(const espi_attention_bwd *a, double *d_k, double *d_v, int32_t seq, int64_t place, int64_t k_row) {
    const int64_t dim = a->head_dim, group = a->heads / a->kv_heads, kv_head = k_row % a->kv_heads;
    const int64_t first = a->spans.cu_q[seq], own = prefix_of(&a->spans, seq);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t i = first + (place > own ? place - own : 0); i < a->spans.cu_q[seq + 1]; i++) {
            if (a->window > 0 && own + i - first - place >= a->window) break;
            const int64_t q_row = i * a->heads + head;
            double p, d_s;
            score_grad(&p, &d_s, a, q_row, k_row);
            for (int64_t d = 0; d < dim; d++) {
                d_k[d] += d_s * ((const real *)a->q)[q_row * dim + d];
                d_v[d] += p * ((const real *)a->d_out)[q_row * dim + d];
            }
        }
    }
}

/* Key j of sequence seq: the queries of its own sequence, then those of the sequences that have it as their prefix. */
static void key_grad(const espi_attention_bwd *a, double *d_k, double *d_v, int32_t seq, int64_t j, int64_t kv_head) {
    const espi_spans *spans = &a->spans;
    const int64_t dim = a->head_dim, k_row = j * a->kv_heads + kv_head, within = j - spans->cu_q[seq];
    for (int64_t d = 0; d < dim; d++) d_k[d] = d_v[d] = 0;
    add_key_grad(a, d_k, d_v, seq, prefix_of(spans, seq) + within, k_row);
    for (int32_t user = seq + 1; user < spans->n_seqs; user++)
        if (prefix_of(spans, user) > 0 && spans->prefix_start[user] == spans->cu_q[seq]) add_key_grad(a, d_k, d_v, user, within, k_row);
    for (int64_t d = 0; d < dim; d++) {
        ((real *)a->d_k)[k_row * dim + d] = (real)(a->scale * d_k[d]);
        ((real *)a->d_v)[k_row * dim + d] = (real)d_v[d];
    }
}

static void sink_grad(const espi_attention_bwd *a, int64_t head) {
    const int64_t tokens = a->spans.cu_q[a->spans.n_seqs];
    double sum = 0;
    for (int64_t i = 0; i < tokens; i++) {
        const int64_t q_row = i * a->heads + head;
        sum += exp(a->sinks[head] - (double)((const real *)a->lse)[q_row]) * delta_of(a, q_row);
    }
    ((real *)a->d_sinks)[head] = ((real *)a->d_sinks)[head] - (real)sum;
}

esp_status ESPI_REF_NAME(espi_attention_bwd)(const espi_exec *exec, const espi_attention_bwd *a) {
    double *sum = exec->scratch;
    for (int32_t s = 0; s < a->spans.n_seqs; s++) {
        for (int64_t i = a->spans.cu_q[s]; i < a->spans.cu_q[s + 1]; i++) {
            for (int64_t head = 0; head < a->heads; head++) query_grad(a, sum, s, i, head);
            for (int64_t head = 0; head < a->kv_heads; head++) key_grad(a, sum, sum + a->head_dim, s, i, head);
        }
    }
    for (int64_t head = 0; a->d_sinks && head < a->heads; head++) sink_grad(a, head);
    return ESP_OK;
}
