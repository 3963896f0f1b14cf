/* Other policies on a generation's tokens: the reference, the policy before the first update, and the sampler's distance from it, which
 * becomes a constant weight of each token (rollout correction) or takes whole sequences out. */
#include "contract/route.h"
#include "core/decimal.h"
#include "models/model.h"
#include "rl/run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LOG_RHO_MAX 20.0

/* ---- the snapshot ---- */

typedef esp_status (*tensor_fn)(esp_trainer *t, char *copy, void *data, size_t bytes);

static esp_status each_tensor(esp_trainer *t, tensor_fn visit) {
    char *copy = t->snapshot.data;
    for (int64_t i = 0; i < esp_model_param_count(t->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        ESPI_TRY(esp_model_param_get(t->model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        const size_t bytes = (size_t)esp_tensor_count(&view) * esp_dtype_size(p.dtype);
        ESPI_TRY(visit(t, copy, p.data, bytes));
        copy += bytes;
    }
    return ESP_OK;
}

static esp_status measure(esp_trainer *t, char *copy, void *data, size_t bytes) {
    (void)copy, (void)data;
    t->snapshot.bytes += bytes;
    return ESP_OK;
}

static esp_status store(esp_trainer *t, char *copy, void *data, size_t bytes) {
    return espi_ctx_get(t->model->ctx, copy, data, bytes);
}

static esp_status exchange(esp_trainer *t, char *copy, void *data, size_t bytes) {
    ESPI_TRY(espi_ctx_get(t->model->ctx, t->snapshot.spare, data, bytes));
    ESPI_TRY(espi_ctx_put(t->model->ctx, data, copy, bytes));
    memcpy(copy, t->snapshot.spare, bytes);
    return ESP_OK;
}

esp_status espi_snapshot_take(esp_trainer *t) {
    espi_snapshot *s = &t->snapshot;
    if (!s->data) {
        ESPI_TRY(each_tensor(t, measure));
        ESPI_TRY(espi_take_array(&s->data, (int64_t)s->bytes, 1));
        ESPI_TRY(espi_take_array(&s->spare, (int64_t)s->bytes, 1));
    }
    return each_tensor(t, store);
}

void espi_snapshot_free(esp_trainer *t) {
    free(t->snapshot.data);
    free(t->snapshot.spare);
    t->snapshot = (espi_snapshot){0};
}

/* ---- passes ---- */

/* What a pass chose becomes the routes of the rows it was made of; a row's last token is never fed back and stays native. */
static void keep_routes(esp_trainer *t, const espi_sequence *all) {
    espi_rollouts *r = &t->rollouts;
    const espi_packed *p = &t->packed;
    const int64_t w = p->route_width;
    for (int64_t i = 0; i < p->n; i++) {
        const espi_sequence *s = &all[p->which[i]];
        uint8_t *to = r->routes + r->offsets[s->row] * w;
        memcpy(to, p->recorded + p->prompt[i] * w, (size_t)(s->n_prompt * w));
        memcpy(to + s->n_prompt * w, p->recorded + p->middle[i] * w, (size_t)((s->n_completion - 1) * w));
    }
}

/* Of one micro-batch. */
static esp_status forward(esp_trainer *t, espi_sequence *all, esp_batch *batch, float *logprob, bool record) {
    const espi_rollouts *r = &t->rollouts;
    esp_tensor hidden;
    if (record) {
        batch->record_experts = t->packed.recorded;
        batch->routed_bytes = (int32_t)r->shape.route_bytes;
        batch->n_routed = batch->n_tokens * r->shape.layers * r->shape.top_k;
    }
    ESPI_TRY(esp_model_forward_only(t->model, batch, &hidden));
    ESPI_TRY(esp_model_logprob(t->model, batch, &hidden, t->c.temperature, t->packed.out, NULL));
    for (int64_t i = 0; i < t->packed.n; i++) {
        const espi_sequence *s = &all[t->packed.which[i]];
        float *to = logprob + r->offsets[s->row] + s->n_prompt;
        memcpy(to, t->packed.out + t->packed.middle[i], (size_t)s->n_completion * sizeof *logprob);
    }
    if (record) keep_routes(t, all);
    return ESP_OK;
}

/* Each rank has written the rows of its own micro-batch. */
static esp_status share_rows(esp_trainer *t, float *logprob, bool record) {
    const espi_rollouts *r = &t->rollouts;
    for (int k = 0; k <= espi_ranks_count(t->model); k++) t->dealt[k] = r->offsets[t->packed.borders[k]];
    ESPI_TRY(espi_ranks_share(logprob, t->model, "log-probabilities", t->dealt, sizeof *logprob));
    return record ? espi_ranks_share(r->routes, t->model, "routes", t->dealt, (size_t)t->packed.route_width) : ESP_OK;
}

/* Log-probabilities of all completions under the model as it is now; record: and the experts it chose. */
static esp_status pass(esp_trainer *t, espi_sequence *all, float *logprob, bool record) {
    for (int64_t next = 0; next < t->rollouts.shape.rows;) {
        esp_batch batch;
        ESPI_TRY(espi_pack(&batch, t, all, t->rollouts.shape.rows, &next, true));
        ESPI_TRY(espi_ranks_agree(t->model, "a pass for log-probabilities", forward(t, all, &batch, logprob, record)));
        ESPI_TRY(share_rows(t, logprob, record));
    }
    return ESP_OK;
}

static esp_status base_pass(esp_trainer *t, espi_sequence *all) {
    ESPI_TRY(esp_model_adapter_enable(t->model, false));
    const esp_status status = pass(t, all, t->rollouts.ref_logprob, false);
    ESPI_TRY(esp_model_adapter_enable(t->model, true));
    return status;
}

static esp_status snapshot_pass(esp_trainer *t, espi_sequence *all) {
    ESPI_TRY(each_tensor(t, exchange));
    const esp_status status = pass(t, all, t->rollouts.ref_logprob, false);
    ESPI_TRY(each_tensor(t, exchange));
    return status;
}

/* KL to the reference is worth a forward on evaluation steps, even when the loss has no use for it. */
static bool needs_reference(const esp_trainer *t) {
    if (t->c.objective.beta > 0) return true;
    for (int64_t step = t->step + 1; step <= t->step + t->slices; step++)
        if (step % t->c.eval_every == 0 || step == t->c.steps) return true;
    return false;
}

static bool corrects(const esp_trainer_config *c) {
    return c->correction != ESP_CORRECTION_NONE || c->reject_high != 0;
}

static bool sampler_is_complete(const espi_rollouts *r) {
    for (int64_t i = 0; i < r->shape.tokens; i++)
        if (isnan(r->sampler_logprob[i])) return false;
    return true;
}

/* Columns for routes, all native so far. */
static esp_status widen_for_routes(espi_rollouts *r, const espi_config *m) {
    espi_rollouts wide;
    espi_rollouts_shape shape = r->shape;
    shape.layers = m->layers;
    shape.top_k = m->top_k;
    shape.route_bytes = espi_route_bytes(m);
    ESPI_TRY(espi_rollouts_widen(&wide, r, &shape));
    *r = wide;
    return ESP_OK;
}

static esp_status old_logprobs(esp_trainer *t, espi_sequence *all) {
    espi_rollouts *r = &t->rollouts;
    const bool record = t->c.replay == ESP_REPLAY_R2;
    r->has_old = t->slices > 1 || corrects(&t->c);
    if (!r->has_old) return ESP_OK;
    if (!t->source.exact || !sampler_is_complete(r) || record) return pass(t, all, r->old_logprob, record);
    /* The policy that sampled is the one before the first update: its log-probabilities are the old ones, to the bit. */
    memcpy(r->old_logprob, r->sampler_logprob, (size_t)r->shape.tokens * sizeof *r->old_logprob);
    return ESP_OK;
}

/* ---- correction ---- */

static double clamp(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}

double espi_correction_weight(const esp_trainer_config *c, double log_rho) {
    const double rho = exp(clamp(log_rho, -LOG_RHO_MAX, LOG_RHO_MAX));
    const double low = espi_decimal(c->correction_low), high = espi_decimal(c->correction_high);
    switch (c->correction) {
    case ESP_CORRECTION_DEFAULT:
    case ESP_CORRECTION_NONE:
        return 1;
    case ESP_CORRECTION_TIS:
        return fmin(rho, high);
    case ESP_CORRECTION_MIS:
    case ESP_CORRECTION_ICEPOP:
        break;
    }
    return rho >= low && rho <= high ? rho : 0;
}

/* Sums of one generation on the way to its statistics. */
typedef struct sums {
    double low, high, rho, rho2, k3, weight, weight2, cut;
    double ppl, chi2;
    int64_t tokens, absent, sequences, rejected, units;
} sums;

/* One value of rho, of a token or a sequence. */
static void note_rho(sums *s, double log_rho) {
    const double rho = exp(clamp(log_rho, -LOG_RHO_MAX, LOG_RHO_MAX));
    s->low = fmin(s->low, rho);
    s->high = fmax(s->high, rho);
    s->rho += rho;
    s->units++;
}

static void correct_row(esp_trainer *t, int64_t row, sums *s) {
    espi_rollouts *r = &t->rollouts;
    const esp_trainer_config *c = &t->c;
    const int64_t first = r->offsets[row] + r->n_prompt[row], last = r->offsets[row + 1];
    const bool by_sequence = c->correction_level == ESP_IS_SEQUENCE;
    double sum = 0;
    int64_t n = 0;
    for (int64_t i = first; i < last; i++) {
        if (!r->loss_mask[i]) continue; /* no choice of the sampler's, a tool's answer say: no part of its sequence's ratio either */
        if (isnan(r->sampler_logprob[i])) {
            s->absent++;
            continue;
        }
        const double d = (double)r->old_logprob[i] - r->sampler_logprob[i], rho = exp(clamp(d, -LOG_RHO_MAX, LOG_RHO_MAX));
        if (!by_sequence) note_rho(s, d);
        s->k3 += rho - d - 1;
        s->rho2 += rho * rho;
        sum += d;
        n++;
    }
    if (n > 0 && by_sequence) note_rho(s, sum);
    const double mean = n > 0 ? sum / (double)n : 0, geometric = exp(clamp(mean, -LOG_RHO_MAX, LOG_RHO_MAX));
    s->tokens += n;
    s->sequences += n > 0;
    s->ppl += n > 0 ? 1 / geometric : 0;
    s->chi2 += n > 0 ? exp(clamp(2 * sum, -LOG_RHO_MAX, LOG_RHO_MAX)) : 0;
    const bool out = c->reject_high != 0 && (geometric < espi_decimal(c->reject_low) || geometric > espi_decimal(c->reject_high));
    s->rejected += out;
    for (int64_t i = first; i < last; i++) {
        if (!r->loss_mask[i]) continue;
        const bool absent = isnan(r->sampler_logprob[i]);
        const double d = by_sequence ? sum : (double)r->old_logprob[i] - r->sampler_logprob[i];
        const double weight = out ? 0 : absent && !by_sequence ? 1 : espi_correction_weight(c, d);
        s->cut += !absent && fabs(weight - exp(clamp(d, -LOG_RHO_MAX, LOG_RHO_MAX))) > 0;
        s->weight += weight;
        s->weight2 += weight * weight;
        r->is_ratio[i] = (float)weight;
    }
}

static void correction(esp_trainer *t) {
    espi_rollouts *r = &t->rollouts;
    sums s = {.low = INFINITY, .high = -INFINITY};
    for (int64_t i = 0; i < r->shape.rows; i++) correct_row(t, i, &s);
    const double n = (double)s.tokens, all = (double)(s.tokens + s.absent), rows = (double)s.sequences;
    r->has_ratio = corrects(&t->c);
    t->correction = (espi_correction_stats){.ratio_low = s.low,
                                            .ratio_mean = s.rho / (double)s.units,
                                            .ratio_high = s.high,
                                            .effective_share = s.weight * s.weight / (all * s.weight2),
                                            .k3 = s.k3 / n,
                                            .ppl_ratio = s.ppl / rows,
                                            .chi2_token = s.rho2 / n - 1,
                                            .chi2_sequence = s.chi2 / rows - 1,
                                            .cut_share = r->has_ratio ? s.cut / n : 0,
                                            .rejected_share = (double)s.rejected / (double)r->shape.rows,
                                            .absent_share = (double)s.absent / all};
}

static esp_status correct(esp_trainer *t, espi_sequence *all) {
    espi_rollouts *r = &t->rollouts;
    const double start = espi_seconds();
    ESPI_TRY(espi_update_routes(t));
    for (int64_t i = 0; i < r->shape.rows; i++) {
        all[i] = espi_sequence_of(r, i);
        all[i].mask = NULL;
        all[i].sampler = all[i].old = all[i].ref = all[i].ratio = NULL;
        if (t->c.replay == ESP_REPLAY_R2) all[i].routes = NULL; /* what is recorded is native */
    }
    ESPI_TRY(old_logprobs(t, all));
    for (int64_t i = 0; i < r->shape.rows; i++) all[i].routes = NULL; /* another policy has routes of its own */
    r->has_ref = needs_reference(t);
    if (r->has_ref) ESPI_TRY(t->c.reference == ESP_REFERENCE_BASE ? base_pass(t, all) : snapshot_pass(t, all));
    if (r->has_old) correction(t);
    t->sums.seconds_logprob += espi_seconds() - start;
    return ESP_OK;
}

esp_status espi_correct(esp_trainer *t) {
    espi_sequence *all = NULL;
    t->correction = (espi_correction_stats){NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN};
    if (t->c.replay == ESP_REPLAY_R2) ESPI_TRY(widen_for_routes(&t->rollouts, &t->model->config));
    ESPI_TRY(espi_take_array(&all, t->rollouts.shape.rows, sizeof *all));
    const esp_status status = correct(t, all);
    free(all);
    return status;
}
