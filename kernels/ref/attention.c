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

size_t ESPI_REF_NAME(espi_attention_fwd_scratch)(const espi_exec *exec, const espi_attention_fwd *a) {
    (void)exec;
    return (size_t)a->head_dim * sizeof(double);
}

/* One query of one head over `keys` keys, the rows of k and v lying `stride` apart; returns the log-sum-exp.  The sink, if any, comes
 * before the keys, with no value of its own. */
static double attend(real *out, double *sum_v, const float *sink, const real *q, const real *k, const real *v, int64_t keys, int64_t stride,
                     int64_t dim, double scale) {
    double max = sink ? *sink : -INFINITY, sum = sink ? 1 : 0;
    for (int64_t d = 0; d < dim; d++) sum_v[d] = 0;
    for (int64_t j = 0; j < keys; j++) {
        const double score = scale * dot(q, k + j * stride, dim);
        if (score > max) { /* what was summed so far was relative to the old maximum */
            const double shrink = exp(max - score);
            sum *= shrink;
            for (int64_t d = 0; d < dim; d++) sum_v[d] *= shrink;
            max = score;
        }
        const double p = exp(score - max);
        sum += p;
        for (int64_t d = 0; d < dim; d++) sum_v[d] += p * v[j * stride + d];
    }
    for (int64_t d = 0; d < dim; d++) out[d] = (real)(sum_v[d] / sum);
    return max + log(sum);
}

esp_status ESPI_REF_NAME(espi_attention_fwd)(const espi_exec *exec, const espi_attention_fwd *a) {
    const int64_t dim = a->head_dim, group = a->heads / a->kv_heads, stride = a->kv_heads * dim;
    for (int32_t s = 0; s < a->spans.n_seqs; s++) {
        const int64_t n = a->spans.cu_q[s + 1] - a->spans.cu_q[s];
        for (int64_t i = 0; i < n; i++) {
            const int64_t before = a->spans.k_len[s] - n + i + 1, keys = a->window > 0 && a->window < before ? a->window : before;
            for (int64_t head = 0; head < a->heads; head++) {
                const int64_t row = (a->spans.cu_q[s] + i) * a->heads + head;
                const int64_t first_key = (a->spans.k_start[s] + before - keys) * stride + head / group * dim;
                ((real *)a->lse)[row] = (real)attend((real *)a->out + row * dim, exec->scratch, a->sinks ? a->sinks + head : NULL,
                                                     (const real *)a->q + row * dim, (const real *)a->k + first_key,
                                                     (const real *)a->v + first_key, keys, stride, dim, a->scale);
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

static void query_grad(const espi_attention_bwd *a, double *d_q, int64_t first, int64_t i, int64_t head) {
    const int64_t dim = a->head_dim, q_row = i * a->heads + head, kv_head = head / (a->heads / a->kv_heads);
    for (int64_t d = 0; d < dim; d++) d_q[d] = 0;
    for (int64_t j = a->window > 0 && i - first >= a->window ? i - a->window + 1 : first; j <= i; j++) {
        const int64_t k_row = j * a->kv_heads + kv_head;
        double p, d_s;
        score_grad(&p, &d_s, a, q_row, k_row);
        for (int64_t d = 0; d < dim; d++) d_q[d] += d_s * ((const real *)a->k)[k_row * dim + d];
    }
    for (int64_t d = 0; d < dim; d++) ((real *)a->d_q)[q_row * dim + d] = (real)(a->scale * d_q[d]);
}

static void key_grad(const espi_attention_bwd *a, double *d_k, double *d_v, int64_t j, int64_t end, int64_t kv_head) {
    const int64_t dim = a->head_dim, k_row = j * a->kv_heads + kv_head, group = a->heads / a->kv_heads;
    for (int64_t d = 0; d < dim; d++) d_k[d] = d_v[d] = 0;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        for (int64_t i = j; i < end && (a->window == 0 || i - j < a->window); i++) {
            const int64_t q_row = i * a->heads + head;
            double p, d_s;
            score_grad(&p, &d_s, a, q_row, k_row);
            for (int64_t d = 0; d < dim; d++) {
                d_k[d] += d_s * ((const real *)a->q)[q_row * dim + d];
                d_v[d] += p * ((const real *)a->d_out)[q_row * dim + d];
            }
        }
    }
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
    ((real *)a->d_sinks)[head] = (real)(((real *)a->d_sinks)[head] - sum);
}

esp_status ESPI_REF_NAME(espi_attention_bwd)(const espi_exec *exec, const espi_attention_bwd *a) {
    double *sum = exec->scratch;
    for (int32_t s = 0; s < a->spans.n_seqs; s++) {
        const int64_t first = a->spans.cu_q[s], end = a->spans.cu_q[s + 1];
        for (int64_t i = first; i < end; i++) {
            for (int64_t head = 0; head < a->heads; head++) query_grad(a, sum, first, i, head);
            for (int64_t head = 0; head < a->kv_heads; head++) key_grad(a, sum, sum + a->head_dim, i, end, head);
        }
    }
    for (int64_t head = 0; a->d_sinks && head < a->heads; head++) sink_grad(a, head);
    return ESP_OK;
}
