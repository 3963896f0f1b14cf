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

/* The entries that row i is a distribution over: ids[0..n), or all n when ids is NULL. */
typedef struct entries {
    const int32_t *ids;
    int64_t n;
} entries;

static entries entries_of(const espi_head *head, int64_t i) {
    const int64_t n = head->kept_offsets ? head->kept_offsets[i + 1] - head->kept_offsets[i] : 0;
    return n > 0 ? (entries){head->kept + head->kept_offsets[i], n} : (entries){NULL, head->w.rows};
}

static int64_t entry(const entries *of, int64_t j) {
    return of->ids ? of->ids[j] : j;
}

typedef struct row_stats {
    double lse, entropy;
} row_stats;

/* One pass: maximum, sum of exponentials and exponential-weighted sum of z relative to the maximum so far. */
static row_stats stats_of(const espi_head *head, int64_t i, const entries *of) {
    double max = -INFINITY, sum = 0, sum_z = 0;
    for (int64_t j = 0; j < of->n; j++) {
        const double z = logit(head, i, entry(of, j));
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
    const entries of = entries_of(head, i);
    const row_stats s = stats_of(head, i, &of);
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
    const entries of = entries_of(head, i);
    for (int64_t h = 0; h < hidden; h++) sum[h] = 0;
    for (int64_t j = 0; j < of.n; j++) {
        const int64_t v = entry(&of, j);
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
        if (a->coef) ESPI_TRY(a->coef(a->coef_user, i, 1));
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
static int64_t inverse_cdf(const espi_head *head, int64_t i, const entries *of, double lse, double uniform) {
    int64_t last = entry(of, 0);
    double below = 0;
    for (int64_t j = 0; j < of->n; j++) {
        const int64_t v = entry(of, j);
        const double p = exp(logit(head, i, v) - lse);
        below += p;
        if (below > uniform) return v;
        if (p > 0) last = v;
    }
    return last;
}

/* An entry of the list of the largest. */
typedef struct candidate {
    double z;
    int32_t id;
} candidate;

/* One more than may be left, so that too many are noticed. */
static int64_t list_length(const espi_head_sample *a) {
    return a->filter.top_k ? a->filter.top_k : a->kept_most + 1;
}

size_t ESPI_REF_NAME(espi_head_sample_scratch)(const espi_exec *exec, const espi_head_sample *a) {
    (void)exec;
    return espi_filters(&a->filter) ? (size_t)list_length(a) * sizeof(candidate) : 0;
}

/* The largest entries of row i, largest first, ties in order of ids; returns how many there are. */
static int64_t list_largest(candidate *list, const espi_head_sample *a, int64_t i) {
    const int64_t most = list_length(a);
    int64_t n = 0;
    for (int64_t v = 0; v < a->head.w.rows; v++) {
        const double z = logit(&a->head, i, v);
        if (n == most && !(z > list[n - 1].z)) continue;
        int64_t at = n < most ? n++ : n - 1;
        for (; at > 0 && z > list[at - 1].z; at--) list[at] = list[at - 1];
        list[at] = (candidate){z, (int32_t)v};
    }
    return n;
}

/* How many of the n largest the filter leaves. */
static int64_t leave(const candidate *list, int64_t n, const espi_head_sample *a, double lse) {
    double all = a->filter.top_k ? 0 : exp(lse - list[0].z), reached = 0;
    for (int64_t j = 0; a->filter.top_k && j < n; j++) all += exp(list[j].z - list[0].z);
    int64_t left = 0;
    for (bool enough = false; left < n && !enough; left++) {
        reached += exp(list[left].z - list[0].z);
        enough = a->filter.top_p > 0 && reached >= a->filter.top_p * all;
    }
    while (a->filter.min_p > 0 && exp(list[left - 1].z - list[0].z) < a->filter.min_p) left--;
    return left;
}

/* The ids that are left of row i, ascending; none: too many. */
static entries filtered(candidate *list, const espi_head_sample *a, int64_t i, double lse) {
    int32_t *kept = a->kept + i * a->kept_most;
    const int64_t left = leave(list, list_largest(list, a, i), a, lse);
    a->kept_count[i] = left > a->kept_most ? -1 : (int32_t)left;
    if (left > a->kept_most) return (entries){NULL, 0};
    for (int64_t j = 0; j < left; j++) {
        int64_t at = j;
        for (; at > 0 && kept[at - 1] > list[j].id; at--) kept[at] = kept[at - 1];
        kept[at] = list[j].id;
    }
    return (entries){kept, left};
}

esp_status ESPI_REF_NAME(espi_head_sample)(const espi_exec *exec, const espi_head_sample *a) {
    espi_head head = a->head;
    const bool greedy = head.temperature == 0;
    if (greedy) head.temperature = 1;
    for (int64_t i = 0; i < head.n; i++) {
        entries of = {NULL, head.w.rows};
        double lse = stats_of(&head, i, &of).lse;
        if (espi_filters(&a->filter)) {
            of = filtered(exec->scratch, a, i, lse);
            if (of.n == 0) continue;
            lse = stats_of(&head, i, &of).lse;
        }
        const int64_t token = greedy ? largest(&head, i) : inverse_cdf(&head, i, &of, lse, a->uniform[i]);
        a->token[i] = (int32_t)token;
        ((real *)a->lp)[i] = log_prob(&head, i, token, lse);
    }
    return ESP_OK;
}
