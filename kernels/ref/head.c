/* The head: log-probabilities, entropies, the loss gradient and sampling, one row at a time; each logit is computed where it is needed, so
 * no vector of V values exists. */
#include "kernels/ref/ref.h"

/* z of vocabulary entry v for the i-th row named. */
static double logit(const espi_head *head, int64_t i, int64_t v) {
    const real *x = (const real *)head->hidden + head->rows[i] * head->w.cols;
    double sum = 0;
    for (int64_t h = 0; h < head->w.cols; h++) sum += (double)espi_mat_value(&head->w, v, h) * x[h];
    if (head->bias) sum += head->bias[v];
    sum *= head->logit_scale;
    if (head->softcap != 0) sum = head->softcap * tanh(sum / head->softcap);
    return sum / head->temperature;
}

typedef struct row_stats {
    double lse, entropy;
} row_stats;

/* One pass: maximum, sum of exponentials and exponential-weighted sum of z relative to the maximum so far. */
static row_stats stats_of(const espi_head *head, int64_t i) {
    double max = -INFINITY, sum = 0, sum_z = 0;
    for (int64_t v = 0; v < head->w.rows; v++) {
        const double z = logit(head, i, v);
        if (z > max) {
            sum *= exp(max - z);
            sum_z *= exp(max - z);
            max = z;
        }
        sum += exp(z - max);
        sum_z += z * exp(z - max);
    }
    const double lse = max + log(sum);
    return (row_stats){lse, lse - sum_z / sum};
}

/* One definition, so that the sampler's log-probability and the trainer's are the same bits. */
static real log_prob(const espi_head *head, int64_t i, int64_t v, double lse) {
    return (real)(logit(head, i, v) - lse);
}

static void store_stats(const espi_head *head, int64_t i, real *lp, real *entropy, real *lse) {
    const row_stats s = stats_of(head, i);
    lp[i] = log_prob(head, i, head->target[i], s.lse);
    entropy[i] = (real)s.entropy;
    lse[i] = (real)s.lse;
}

esp_status ESPI_REF_NAME(espi_head_stats)(const espi_exec *exec, const espi_head_stats *a) {
    (void)exec;
    for (int64_t i = 0; i < a->head.n; i++) store_stats(&a->head, i, a->lp, a->entropy, a->lse);
    return ESP_OK;
}

/* Row i of d_hidden from its coefficients; sum: H doubles. */
static void row_grad(real *d_hidden, double *sum, const espi_head *head, int64_t i, double g, double e, double lse, double entropy) {
    const int64_t hidden = head->w.cols;
    for (int64_t h = 0; h < hidden; h++) sum[h] = 0;
    for (int64_t v = 0; v < head->w.rows; v++) {
        const double z = logit(head, i, v), log_p = z - lse, p = exp(log_p);
        double d = g * ((v == head->target[i]) - p);
        if (e != 0) d -= e * p * (log_p + entropy);
        d *= head->logit_scale / head->temperature;
        if (head->softcap != 0) {
            const double tanh_value = head->temperature * z / head->softcap;
            d *= 1 - tanh_value * tanh_value;
        }
        for (int64_t h = 0; h < hidden; h++) sum[h] += d * espi_mat_value(&head->w, v, h);
    }
    const int64_t to = head->d_rows ? head->d_rows[i] : head->rows[i];
    for (int64_t h = 0; h < hidden; h++) d_hidden[to * hidden + h] = (real)sum[h];
}

size_t ESPI_REF_NAME(espi_head_grad_scratch)(const espi_exec *exec, const espi_head_grad *a) {
    (void)exec;
    return (size_t)a->head.w.cols * sizeof(double);
}

esp_status ESPI_REF_NAME(espi_head_grad)(const espi_exec *exec, const espi_head_grad *a) {
    const real *g = a->g, *e = a->e, *lse = a->lse, *entropy = a->entropy;
    for (int64_t i = 0; i < a->head.n; i++)
        row_grad(a->d_hidden, exec->scratch, &a->head, i, g[i], e ? e[i] : 0, lse[i], e ? entropy[i] : 0);
    return ESP_OK;
}

size_t ESPI_REF_NAME(espi_head_fused_scratch)(const espi_exec *exec, const espi_head_fused *a) {
    (void)exec;
    return (size_t)a->head.w.cols * sizeof(double);
}

esp_status ESPI_REF_NAME(espi_head_fused)(const espi_exec *exec, const espi_head_fused *a) {
    const real *g = a->g, *e = a->e, *lse = a->lse, *entropy = a->entropy;
    for (int64_t i = 0; i < a->head.n; i++) {
        store_stats(&a->head, i, a->lp, a->entropy, a->lse);
        ESPI_TRY(a->coef(a->coef_user, i, 1));
        row_grad(a->d_hidden, exec->scratch, &a->head, i, g[i], e[i], lse[i], entropy[i]);
    }
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_head_logits)(const espi_exec *exec, const espi_head_logits *a) {
    (void)exec;
    const int64_t vocab = a->head.w.rows;
    for (int64_t i = 0; i < a->head.n; i++)
        for (int64_t v = 0; v < vocab; v++) ((real *)a->logits)[i * vocab + v] = (real)logit(&a->head, i, v);
    return ESP_OK;
}

static int64_t largest(const espi_head *head, int64_t i) {
    int64_t best = 0;
    double best_z = -INFINITY;
    for (int64_t v = 0; v < head->w.rows; v++) {
        const double z = logit(head, i, v);
        if (z > best_z) {
            best_z = z;
            best = v;
        }
    }
    return best;
}

/* The first entry whose cumulative probability passes the uniform; rounding may leave none, then the last that has any probability. */
static int64_t inverse_cdf(const espi_head *head, int64_t i, double lse, double uniform) {
    int64_t last = 0;
    double below = 0;
    for (int64_t v = 0; v < head->w.rows; v++) {
        const double p = exp(logit(head, i, v) - lse);
        below += p;
        if (below > uniform) return v;
        if (p > 0) last = v;
    }
    return last;
}

esp_status ESPI_REF_NAME(espi_head_sample)(const espi_exec *exec, const espi_head_sample *a) {
    (void)exec;
    espi_head head = a->head;
    const bool greedy = head.temperature == 0;
    if (greedy) head.temperature = 1;
    for (int64_t i = 0; i < head.n; i++) {
        const double lse = stats_of(&head, i).lse;
        const int64_t token = greedy ? largest(&head, i) : inverse_cdf(&head, i, lse, a->uniform[i]);
        a->token[i] = (int32_t)token;
        ((real *)a->lp)[i] = log_prob(&head, i, token, lse);
    }
    return ESP_OK;
}
