/* The router: scores of all experts, the k best, and the gradients of the gate weights and of the two auxiliary losses. */
#include "kernels/ref/ref.h"

static double log_sum_exp(const real *z, int64_t n) {
    double max = -INFINITY, sum = 0;
    for (int64_t e = 0; e < n; e++) max = z[e] > max ? z[e] : max;
    for (int64_t e = 0; e < n; e++) sum += exp(z[e] - max);
    return max + log(sum);
}

/* An expert is selected when fewer than k others beat it: a larger rank beats, and so does an equal one of a lower index. */
static void select_top(int32_t *idx, const double *rank, int64_t experts, int64_t k) {
    int64_t taken = 0;
    for (int64_t e = 0; e < experts; e++) {
        int64_t better = 0;
        for (int64_t other = 0; other < experts; other++) better += rank[other] > rank[e] || (rank[other] == rank[e] && other < e);
        if (better < k && taken < k) idx[taken++] = (int32_t)e;
    }
}

static double scaling_of(const espi_router_rule *rule) {
    return rule->scaling == 0 ? 1 : rule->scaling;
}

static double sigmoid(double z) {
    return 1 / (1 + exp(-z));
}

static double score_of(const espi_router_rule *rule, double z, double lse) {
    return rule->sigmoid ? sigmoid(z) : exp(z - lse);
}

/* What the experts of one token are ranked by, and the selection that would be made of a forced token. */
size_t ESPI_REF_NAME(espi_router_fwd_scratch)(const espi_exec *exec, const espi_router_fwd *a) {
    (void)exec;
    return (size_t)a->w.rows * sizeof(double) + (size_t)a->top_k * sizeof(int32_t);
}

esp_status ESPI_REF_NAME(espi_router_fwd)(const espi_exec *exec, const espi_router_fwd *a) {
    const int64_t experts = a->w.rows, hidden = a->w.cols;
    double *rank = exec->scratch;
    int32_t *native = (int32_t *)(rank + experts);
    for (int64_t t = 0; t < a->tokens; t++) {
        const real *x = (const real *)a->x + t * hidden;
        real *z = (real *)a->logits + t * experts, *weight = (real *)a->weight + t * a->top_k;
        int32_t *idx = a->idx + t * a->top_k;
        for (int64_t e = 0; e < experts; e++) {
            double sum = a->bias ? a->bias[e] : 0;
            for (int64_t h = 0; h < hidden; h++) sum += (double)espi_mat_value(&a->w, e, h) * x[h];
            z[e] = (real)sum;
            rank[e] = a->rule.sigmoid ? sigmoid(z[e]) + (a->correction ? a->correction[e] : 0) : z[e];
            if (!isfinite(z[e]) || !isfinite(rank[e]))
                return ESPI_FAIL(ESP_ERR_NONFINITE,
                                 "router logit of token %lld, expert %lld is %g and its rank %g, expected finite numbers: look for NaN or "
                                 "infinity in the weights or the input",
                                 (long long)t, (long long)e, (double)z[e], rank[e]);
        }
        const int32_t *forced = a->forced && a->forced[t * a->top_k] != -1 ? a->forced + t * a->top_k : NULL;
        const bool silent = forced && forced[0] < -1;
        select_top(forced ? native : idx, rank, experts, a->top_k);
        for (int64_t k = 0; forced && k < a->top_k; k++) idx[k] = silent ? -2 - forced[k] : forced[k];
        if (forced && !silent && a->flips) *a->flips += memcmp(native, idx, (size_t)a->top_k * sizeof *idx) != 0;
        const double lse = log_sum_exp(z, experts);
        double selected = a->rule.sigmoid ? 1e-20 : 0; /* all sigmoids can vanish at once */
        for (int64_t k = 0; k < a->top_k; k++) selected += score_of(&a->rule, z[idx[k]], lse);
        for (int64_t k = 0; k < a->top_k; k++) {
            const double score = score_of(&a->rule, z[idx[k]], lse);
            weight[k] = (real)(scaling_of(&a->rule) * (a->rule.renormalise ? score / selected : score));
            if (a->counts) a->counts[idx[k]]++;
        }
        for (int64_t e = 0; a->p_sum && e < experts; e++) a->p_sum[e] += exp(z[e] - lse);
        if (a->z_sum) *a->z_sum += lse * lse;
        ((real *)a->lse)[t] = (real)lse;
    }
    return ESP_OK;
}

/* d_z [out] of one token, all losses together. */
static void logits_grad(real *d_z, const espi_router_bwd *a, int64_t t) {
    const int64_t experts = a->w.rows;
    const real *z = (const real *)a->logits + t * experts, *weight = (const real *)a->weight + t * a->top_k;
    const real *d_weight = (const real *)a->d_weight + t * a->top_k;
    const int32_t *idx = a->idx + t * a->top_k;
    const double lse = ((const real *)a->lse)[t];
    double gate = 0, balance = 0;
    for (int64_t k = 0; k < a->top_k; k++) gate += (double)weight[k] * d_weight[k];
    const double shared = a->rule.renormalise ? gate / scaling_of(&a->rule) : 0; /* through the sum of the selected */
    for (int64_t e = 0; a->aux_counts && e < experts; e++) balance += exp(z[e] - lse) * (double)a->aux_counts[e];
    int64_t k = 0; /* idx ascends, so one walk over the experts meets the selected in order */
    for (int64_t e = 0; e < experts; e++) {
        const double p = exp(z[e] - lse);
        double d = a->z_coef * 2 * lse * p;
        if (a->aux_counts) d += a->aux_coef * p * ((double)a->aux_counts[e] - balance);
        if (!a->rule.renormalise && !a->rule.sigmoid) d -= p * gate;
        if (k < a->top_k && idx[k] == e) {
            d += weight[k] * (d_weight[k] - shared) * (a->rule.sigmoid ? sigmoid(-(double)z[e]) : 1);
            k++;
        }
        d_z[e] = (real)d;
    }
}

esp_status ESPI_REF_NAME(espi_router_bwd)(const espi_exec *exec, const espi_router_bwd *a) {
    (void)exec;
    const int64_t experts = a->w.rows, hidden = a->w.cols;
    const real *x = a->x;
    real *d_logits = a->d_logits, *d_x = a->d_x, *d_w = a->d_w;
    for (int64_t t = 0; t < a->tokens; t++) {
        logits_grad(d_logits + t * experts, a, t);
        for (int64_t h = 0; h < hidden; h++) {
            double sum = d_x[t * hidden + h];
            for (int64_t e = 0; e < experts; e++) sum += (double)d_logits[t * experts + e] * espi_mat_value(&a->w, e, h);
            d_x[t * hidden + h] = (real)sum;
        }
    }
    for (int64_t e = 0; d_w && e < experts; e++) {
        for (int64_t h = 0; h < hidden; h++) {
            double sum = 0;
            for (int64_t t = 0; t < a->tokens; t++) sum += (double)d_logits[t * experts + e] * x[t * hidden + h];
            d_w[e * hidden + h] = d_w[e * hidden + h] + (real)sum;
        }
    }
    return ESP_OK;
}
