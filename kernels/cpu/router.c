/* The router: logits by the common product, then softmax, top-k and their gradients a token at a time. */
#include "kernels/cpu/cpu.h"

enum { ROUTER_ROWS = 384 };

static float log_sum_exp(const float *z, int64_t n) {
    vec largest = splat(-INFINITY), sum = {0};
    int64_t e = 0;
    for (; e + LANES <= n; e += LANES) largest = vmax(load(z + e), largest);
    if (e < n) largest = vmax(load_part(z + e, n - e, -INFINITY), largest);
    const float max = vlargest(largest);
    for (e = 0; e + LANES <= n; e += LANES) sum += vexp(load(z + e) - splat(max));
    if (e < n) sum += vexp(load_part(z + e, n - e, max - 100) - splat(max)); /* e^-100 counts as 0 */
    return max + logf(vsum(sum));
}

/* What an expert is weighed by, and what it is ranked by. */
static float score_of(const espi_router_fwd *a, float z, float lse) {
    return a->rule.sigmoid ? 1 / (1 + expf(-z)) : expf(z - lse);
}
static float rank_of(const espi_router_fwd *a, const float *z, int64_t e) {
    return a->rule.sigmoid ? score_of(a, z[e], 0) + (a->correction ? a->correction[e] : 0) : z[e];
}

/* The k of the highest rank, ties to the lower index; idx ascending.  best: k ranks of work memory. */
static void select_top(int32_t *idx, float *best, const espi_router_fwd *a, const float *z) {
    const int64_t k = a->top_k;
    int64_t taken = 0;
    for (int64_t e = 0; e < a->w.rows; e++) {
        const float rank = rank_of(a, z, e);
        if (taken == k && !(rank > best[k - 1])) continue;
        int64_t j = taken < k ? taken++ : k - 1;
        for (; j > 0 && rank > best[j - 1]; j--) {
            best[j] = best[j - 1];
            idx[j] = idx[j - 1];
        }
        best[j] = rank;
        idx[j] = (int32_t)e;
    }
    for (int64_t i = 1; i < k; i++) {
        const int32_t e = idx[i];
        int64_t j = i;
        for (; j > 0 && idx[j - 1] > e; j--) idx[j] = idx[j - 1];
        idx[j] = e;
    }
}

/* Would the router select another set?  Not when the last of these beats every other expert. */
static bool flipped(const espi_router_fwd *a, const float *z, const int32_t *idx) {
    float lowest = INFINITY;
    int32_t last = 0;
    for (int64_t k = 0; k < a->top_k; k++) {
        const float rank = rank_of(a, z, idx[k]);
        if (rank > lowest) continue;
        lowest = rank;
        last = idx[k];
    }
    int64_t k = 0; /* idx ascends, so one walk over the experts meets the selected in order */
    for (int64_t e = 0; e < a->w.rows; e++) {
        if (k < a->top_k && idx[k] == e) {
            k++;
            continue;
        }
        const float rank = rank_of(a, z, e);
        if (rank > lowest || (rank == lowest && e < last)) return true;
    }
    return false;
}

/* Returns whether the token was forced to another selection than its own. */
static bool route_token(const espi_router_fwd *a, int64_t t) {
    const int64_t experts = a->w.rows;
    const float *z = (const float *)a->logits + t * experts;
    float *weight = (float *)a->weight + t * a->top_k;
    float selected = a->rule.sigmoid ? 1e-20f : 0; /* all sigmoids can vanish at once */
    int32_t *idx = a->idx + t * a->top_k;
    const float lse = log_sum_exp(z, experts), scaling = a->rule.scaling != 0 ? (float)a->rule.scaling : 1;
    ((float *)a->lse)[t] = lse;
    const int32_t *forced = a->forced && a->forced[t * a->top_k] != -1 ? a->forced + t * a->top_k : NULL;
    const bool silent = forced && forced[0] < -1;
    if (!forced) select_top(idx, weight, a, z);
    for (int64_t k = 0; forced && k < a->top_k; k++) idx[k] = silent ? -2 - forced[k] : forced[k]; /* forced may be idx */
    for (int64_t k = 0; k < a->top_k; k++) {
        weight[k] = score_of(a, z[idx[k]], lse);
        selected += weight[k];
    }
    for (int64_t k = 0; k < a->top_k; k++) weight[k] = scaling * (a->rule.renormalise ? weight[k] / selected : weight[k]);
    return forced && !silent && a->flips && flipped(a, z, idx);
}

esp_status ESPI_CPU(espi_router_fwd)(const espi_exec *exec, const espi_router_fwd *a) {
    const int64_t experts = a->w.rows, hidden = a->w.cols;
    const cpu_weight w = cpu_plain(&a->w, true);
    float *logits = a->logits;
    const int threads = cpu_threads(exec, (double)a->tokens * (double)experts * (double)hidden);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < a->tokens; first += ROUTER_ROWS) {
        const int64_t m = cpu_min(a->tokens - first, ROUTER_ROWS);
        const cpu_rows to = {logits + first * experts, experts, NULL}, from = {(float *)a->x + first * hidden, hidden, NULL};
        for (int64_t i = 0; a->bias && i < m; i++) memcpy(row_at(&to, i), a->bias, (size_t)experts * sizeof(float));
        cpu_product(&to, &from, &w, m, hidden, 0, experts, a->bias != NULL);
    }
    for (int64_t e = 0; a->correction && e < experts; e++) {
        if (isfinite(a->correction[e])) continue;
        return ESPI_FAIL(ESP_ERR_NONFINITE, "correction of expert %lld in the router's ranking is %g, expected a finite number",
                         (long long)e, (double)a->correction[e]);
    }
    for (int64_t i = 0; i < a->tokens * experts; i++) {
        if (isfinite(logits[i])) continue;
        return ESPI_FAIL(
            ESP_ERR_NONFINITE,
            "router logit of token %lld, expert %lld is %g, expected a finite number: look for NaN or infinity in the weights or "
            "the input",
            (long long)(i / experts), (long long)(i % experts), (double)logits[i]);
    }
    int64_t flips = 0;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : flips) if (threads > 1)
    for (int64_t t = 0; t < a->tokens; t++) flips += route_token(a, t);
    if (a->flips) *a->flips += flips;
    for (int64_t i = 0; a->counts && i < a->tokens * a->top_k; i++) a->counts[a->idx[i]]++;
    for (int64_t t = 0; t < a->tokens; t++) {
        const double lse = ((const float *)a->lse)[t];
        for (int64_t e = 0; a->p_sum && e < experts; e++) a->p_sum[e] += expf(logits[t * experts + e] - (float)lse);
        if (a->z_sum) *a->z_sum += lse * lse;
    }
    return ESP_OK;
}

/* d_z [out] of one token, all losses together. */
static void logits_grad(float *d_z, const espi_router_bwd *a, int64_t t) {
    const int64_t experts = a->w.rows;
    const float *z = (const float *)a->logits + t * experts, *weight = (const float *)a->weight + t * a->top_k;
    const float *d_weight = (const float *)a->d_weight + t * a->top_k, lse = ((const float *)a->lse)[t];
    const int32_t *idx = a->idx + t * a->top_k;
    const bool through_all = !a->rule.renormalise && !a->rule.sigmoid; /* the softmax ties all logits to the weights */
    const double scaling = a->rule.scaling != 0 ? a->rule.scaling : 1;
    double gate = 0, balance = 0;
    for (int64_t k = 0; k < a->top_k; k++) gate += (double)weight[k] * d_weight[k];
    for (int64_t e = 0; a->aux_counts && e < experts; e++) balance += expf(z[e] - lse) * (double)a->aux_counts[e];
    for (int64_t e = 0; e < experts; e++) {
        double d = 0;
        if (through_all || a->aux_counts || a->z_coef != 0) {
            const double p = expf(z[e] - lse);
            d = a->z_coef * 2 * lse * p;
            if (a->aux_counts) d += a->aux_coef * p * ((double)a->aux_counts[e] - balance);
            if (through_all) d -= p * gate;
        }
        d_z[e] = (float)d;
    }
    for (int64_t k = 0; k < a->top_k; k++) {
        double d = weight[k] * (d_weight[k] - (a->rule.renormalise ? gate / scaling : 0));
        if (a->rule.sigmoid) d *= 1 / (1 + exp((double)z[idx[k]])); /* 1 - sigmoid */
        d_z[idx[k]] += (float)d;
    }
}

esp_status ESPI_CPU(espi_router_bwd)(const espi_exec *exec, const espi_router_bwd *a) {
    const int64_t experts = a->w.rows, hidden = a->w.cols;
    const cpu_weight w = cpu_plain(&a->w, false);
    const cpu_rows x = {(float *)a->x, hidden, NULL};
    float *d_logits = a->d_logits, *d_w = a->d_w;
    const int threads = cpu_threads(exec, (double)a->tokens * (double)experts * (double)hidden);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < a->tokens; first += ROUTER_ROWS) {
        const int64_t m = cpu_min(a->tokens - first, ROUTER_ROWS);
        for (int64_t t = first; t < first + m; t++) logits_grad(d_logits + t * experts, a, t);
        cpu_product(&(cpu_rows){(float *)a->d_x + first * hidden, hidden, NULL}, &(cpu_rows){d_logits + first * experts, experts, NULL}, &w,
                    m, experts, 0, hidden, true);
    }
    if (!d_w) return ESP_OK;
    const int64_t strip = OUTER_VECS * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t col = 0; col < hidden; col += strip) {
        float sum[OUTER_ROWS][OUTER_VECS * LANES];
        const int64_t n = cpu_min(hidden - col, strip);
        for (int64_t e = 0; e < experts; e += OUTER_ROWS) {
            const int64_t rows = cpu_min(experts - e, OUTER_ROWS);
            cpu_outer(sum[0], d_logits + e, experts, &x, a->tokens, rows, col, n);
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < n; j++) d_w[(e + i) * hidden + col + j] += sum[i][j];
        }
    }
    return ESP_OK;
}
