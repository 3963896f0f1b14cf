/* The GRPO objective: one row a loss, each a weight rule and a closed form of the per-token term.  What leaves here is one coefficient
 * g = d loss / d logprob a token (and e = d loss / d entropy), never a graph.
 *
 *   loss = sum over tokens of  w rho keep l  +  beta w kl  -  c_H (mean entropy of the kept tokens)
 *
 * w comes from the weight rule, rho is the caller's rollout correction, keep is 0 or 1 (off-policy mask, entropy quantile).  l depends on
 * the log-prob in two ways: directly (d_lp) and through the importance ratio (d_ratio, by the log-ratio).  At token level g is their sum;
 * at sequence level the log-ratio is the mean over the sequence, so each of its n tokens receives 1/n of the sequence's sum of d_ratio. */
#include "rl/objective.h"

#include "contract/head.h"
#include "core/decimal.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* exp() of a larger log-ratio says nothing more and would soon overflow.  Beyond it value and gradient are those at the bound. */
#define LOG_RATIO_MAX 20.0
/* VESPO's lower bound of the sequence weight. */
#define VESPO_WEIGHT_MIN 1e-8

enum { LEVEL_TOKEN = 1, LEVEL_SEQUENCE = 2 };

typedef enum weight_rule {
    PER_SEQUENCE_MEAN, /* 1 / (N n_i) */
    PER_LOCAL_TOKEN,   /* 1 / tokens of this batch, times its share of the step's sequences */
    PER_CONSTANT,      /* 1 / (N L_max) */
    PER_STEP_TOKEN,    /* 1 / tokens of the whole step */
    PER_SEQUENCE       /* 1 / N */
} weight_rule;

typedef struct token {
    double ratio, advantage, lp;
    double sequence_weight; /* of the losses that have their own (vespo) */
} token;

typedef struct term {
    double value, d_ratio, d_lp;
    int clipped; /* -1 below, 1 above */
} term;

static double clamp(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}

/* -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A).  It trains where the factor that the outer min picked is r itself. */
static term clipped_surrogate(const espi_objective *o, const token *t) {
    double low = 1 - o->epsilon_low, high = 1 + o->epsilon_high;
    double capped = fmin(t->ratio, o->delta), clipped = clamp(t->ratio, low, high);
    double used = t->advantage > 0 ? fmin(capped, clipped) : fmax(capped, clipped);
    term out = {.value = -used * t->advantage};
    if (used == t->ratio) out.d_ratio = out.value;
    if (t->advantage > 0 && capped > high) out.clipped = 1;
    if (t->advantage < 0 && capped < low) out.clipped = -1;
    return out;
}

/* -min(r, cap) A lp with the weight a constant: never zero. */
static term clipped_weight(const espi_objective *o, const token *t) {
    double weight = -fmin(t->ratio, o->epsilon_high) * t->advantage;
    return (term){.value = weight * t->lp, .d_lp = weight, .clipped = t->advantage > 0 && t->ratio > o->epsilon_high};
}

/* -(4 / tau) sigmoid(tau (r - 1)) A */
static term soft_gate(const espi_objective *o, const token *t) {
    double tau = o->sapo_temperature[t->advantage > 0 ? 0 : 1];
    double gate = 1 / (1 + exp(-tau * (t->ratio - 1)));
    return (term){.value = -4 / tau * gate * t->advantage, .d_ratio = -4 * t->advantage * gate * (1 - gate) * t->ratio};
}

/* -phi A lp with phi a constant of the sequence. */
static term sequence_weight(const espi_objective *o, const token *t) {
    (void)o;
    double weight = -t->sequence_weight * t->advantage;
    return (term){.value = weight * t->lp, .d_lp = weight};
}

/* The table.  A new loss is a row here and a value of esp_loss_type. */
struct espi_loss_row {
    const char *name;
    weight_rule weight;
    term (*term)(const espi_objective *o, const token *t);
    unsigned levels;
    bool clips;               /* has the ratio bound delta */
    bool own_sequence_weight; /* takes rho into a weight of the whole sequence, so its rows are coupled */
};
static const struct espi_loss_row rows[] = {
    [ESP_LOSS_GRPO] = {"grpo", PER_SEQUENCE_MEAN, clipped_surrogate, LEVEL_TOKEN | LEVEL_SEQUENCE, .clips = true},
    [ESP_LOSS_BNPO] = {"bnpo", PER_LOCAL_TOKEN, clipped_surrogate, LEVEL_TOKEN | LEVEL_SEQUENCE, .clips = true},
    [ESP_LOSS_DR_GRPO] = {"dr_grpo", PER_CONSTANT, clipped_surrogate, LEVEL_TOKEN | LEVEL_SEQUENCE, .clips = true},
    [ESP_LOSS_DAPO] = {"dapo", PER_STEP_TOKEN, clipped_surrogate, LEVEL_TOKEN | LEVEL_SEQUENCE, .clips = true},
    [ESP_LOSS_CISPO] = {"cispo", PER_STEP_TOKEN, clipped_weight, LEVEL_TOKEN | LEVEL_SEQUENCE},
    [ESP_LOSS_SAPO] = {"sapo", PER_SEQUENCE_MEAN, soft_gate, LEVEL_TOKEN | LEVEL_SEQUENCE},
    [ESP_LOSS_LUSPO] = {"luspo", PER_SEQUENCE, clipped_surrogate, LEVEL_TOKEN | LEVEL_SEQUENCE, .clips = true},
    [ESP_LOSS_VESPO] = {"vespo", PER_STEP_TOKEN, sequence_weight, LEVEL_TOKEN, .own_sequence_weight = true},
};

const char *esp_loss_type_name(esp_loss_type loss) {
    if (loss == ESP_LOSS_DEFAULT) loss = ESP_LOSS_DAPO;
    return (int)loss > 0 && (int)loss < ESPI_COUNT(rows) ? rows[loss].name : "?";
}

esp_status esp_loss_type_parse(esp_loss_type *loss, const char *name) {
    if (!loss || !name) return ESPI_FAIL(ESP_ERR_ARG, "esp_loss_type_parse: loss and name must not be NULL");
    for (int i = 1; i < ESPI_COUNT(rows); i++)
        if (!strcmp(rows[i].name, name)) {
            *loss = (esp_loss_type)i;
            return ESP_OK;
        }
    return ESPI_FAIL(ESP_ERR_ARG, "unknown loss \"%s\"; expected grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo or vespo", name);
}

/* ---- options ---- */

/* The float itself, where others (the sampler, TRL's tensor of SAPO temperatures) hold a float too. */
static double float_or(float value, float standard) {
    return value == 0 ? standard : value;
}

static esp_status check_range(const char *name, double value, double low, double high) {
    if (value >= low && value <= high && isfinite(value)) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG, "objective: %s is %g, expected a number in [%g, %g]", name, value, low, high);
}

static esp_status check_options(const espi_objective *o, const esp_objective *options) {
    const double any = HUGE_VAL;
    ESPI_TRY(check_range("epsilon_low", o->epsilon_low, 0, 1));
    ESPI_TRY(check_range("epsilon_high", o->epsilon_high, 0, any));
    ESPI_TRY(check_range("beta", o->beta, 0, any));
    ESPI_TRY(check_range("sapo_temperature_pos", o->sapo_temperature[0], 0, any));
    ESPI_TRY(check_range("sapo_temperature_neg", o->sapo_temperature[1], 0, any));
    ESPI_TRY(check_range("vespo_k_pos", o->vespo_k[0], 0, any));
    ESPI_TRY(check_range("vespo_k_neg", o->vespo_k[1], 0, any));
    ESPI_TRY(check_range("vespo_lambda_pos", o->vespo_lambda[0], 0, any));
    ESPI_TRY(check_range("vespo_lambda_neg", o->vespo_lambda[1], 0, any));
    ESPI_TRY(check_range("off_policy_mask_threshold", o->off_policy_mask_threshold, 0, any));
    ESPI_TRY(check_range("top_entropy_quantile", o->top_entropy_quantile, 0, 1));
    ESPI_TRY(check_range("entropy_coef", o->entropy_coef, -any, any));
    ESPI_TRY(check_range("temperature", o->temperature, 0, any));
    ESPI_TRY(check_range("max_completion_length", o->max_completion_length, 0, any));
    const char *loss = o->row->name;
    if (options->delta != 0) {
        ESPI_TRY(check_range("delta", o->delta, 1, any));
        if (!o->row->clips)
            return ESPI_FAIL(ESP_ERR_ARG, "objective: delta %g bounds a clipped ratio, and loss %s clips none; leave delta 0", o->delta,
                             loss);
    }
    if (options->loss == ESP_LOSS_CISPO && o->epsilon_high < 1)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "objective: loss cispo takes epsilon_high as the cap of the ratio itself, got %g; expected at least 1",
                         o->epsilon_high);
    if (!(o->row->levels & (o->sequence_level ? LEVEL_SEQUENCE : LEVEL_TOKEN)))
        return ESPI_FAIL(ESP_ERR_ARG, "objective: loss %s has its own sequence weight and takes no level sequence; set level token", loss);
    if (o->kl_bias_correction && o->beta == 0)
        return ESPI_FAIL(ESP_ERR_ARG, "objective: kl_bias_correction without a KL term; set beta above 0 or kl_bias_correction off");
    return ESP_OK;
}

esp_status espi_objective_make(espi_objective *objective, const esp_objective *options) {
    esp_objective given;
    ESPI_TRY(espi_struct_read(&given, sizeof given, options, "esp_objective"));
    if (given.loss == ESP_LOSS_DEFAULT) given.loss = ESP_LOSS_DAPO;
    if ((int)given.loss < 0 || (int)given.loss >= ESPI_COUNT(rows))
        return ESPI_FAIL(ESP_ERR_ARG, "objective: loss is %d, expected 0 to %d (esp_loss_type)", (int)given.loss, ESPI_COUNT(rows) - 1);
    if (given.level != ESP_IS_TOKEN && given.level != ESP_IS_SEQUENCE)
        return ESPI_FAIL(ESP_ERR_ARG, "objective: level is %d, expected 0 or 1 (esp_is_level)", (int)given.level);
    if (given.kl_grad != ESP_KL_GRAD_K2 && given.kl_grad != ESP_KL_GRAD_K3)
        return ESPI_FAIL(ESP_ERR_ARG, "objective: kl_grad is %d, expected 0 or 1 (esp_kl_grad)", (int)given.kl_grad);
    *objective = (espi_objective){
        .row = &rows[given.loss],
        .sequence_level = given.level == ESP_IS_SEQUENCE,
        .kl_bias_correction = given.kl_bias_correction,
        .kl_grad = given.kl_grad,
        .epsilon_low = espi_decimal_or(given.epsilon_low, 0.2),
        .epsilon_high = espi_decimal_or(given.epsilon_high, given.loss == ESP_LOSS_CISPO ? 5 : 0.2),
        .beta = espi_decimal(given.beta),
        .off_policy_mask_threshold = espi_decimal(given.off_policy_mask_threshold),
        .top_entropy_quantile = espi_decimal_or(given.top_entropy_quantile, 1),
        .entropy_coef = espi_decimal(given.entropy_coef),
        .temperature = float_or(given.temperature, 1), /* bit for bit the sampler's */
        .delta = espi_decimal_or(given.delta, HUGE_VAL),
        .sapo_temperature = {float_or(given.sapo_temperature_pos, 1), float_or(given.sapo_temperature_neg, 1.05f)},
        .vespo_k = {espi_decimal_or(given.vespo_k_pos, 2), espi_decimal_or(given.vespo_k_neg, 3)},
        .vespo_lambda = {espi_decimal_or(given.vespo_lambda_pos, 3), espi_decimal_or(given.vespo_lambda_neg, 2)},
        .max_completion_length = given.max_completion_length,
    };
    return check_options(objective, &given);
}

const char *espi_objective_name(const espi_objective *objective) {
    return objective->row->name;
}

bool espi_objective_row_local(const espi_objective *o) {
    return !o->sequence_level && !o->row->own_sequence_weight && o->off_policy_mask_threshold == 0 && o->top_entropy_quantile == 1;
}

/* ---- one evaluation ---- */

static double get(const espi_scalars *a, int64_t i) {
    return espi_real_get(a->data, a->index ? a->index[i] : i, a->dtype);
}

static esp_status check_finite(const char *name, const espi_scalars *a, int32_t seq, int64_t first, int64_t last) {
    for (int64_t i = first; a->data && i < last; i++)
        if (!isfinite(get(a, i)))
            return ESPI_FAIL(ESP_ERR_NONFINITE, "objective: %s of sequence %d is %g at its counted token %lld, expected a finite number",
                             name, (int)seq, get(a, i), (long long)(i - first));
    return ESP_OK;
}

esp_status espi_objective_begin(espi_objective_run *run, const espi_objective *objective, const espi_objective_input *in) {
    *run = (espi_objective_run){.objective = objective, .in = in};
    const bool any = in->n_seqs > 0; /* a rank may have no sequence, and then has no arrays either */
    if (any && !in->advantage.data) return ESPI_FAIL(ESP_ERR_ARG, "objective: advantage is missing; give one number a sequence");
    if (any && objective->beta > 0 && !in->ref.data)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "objective: beta is %g but ref_logprob is missing; give the reference's log-probabilities or set beta 0",
                         objective->beta);
    if (any && (objective->entropy_coef != 0 || objective->top_entropy_quantile < 1) && !in->entropy.data)
        return ESPI_FAIL(ESP_ERR_ARG, "objective: entropy_coef or top_entropy_quantile is set but the entropies are missing");
    if (!(in->step_tokens >= 0 && isfinite(in->step_tokens)) || !(in->step_seqs >= 0 && isfinite(in->step_seqs)))
        return ESPI_FAIL(ESP_ERR_ARG, "objective: step_tokens is %g and step_seqs is %g, expected finite numbers, 0 = those of this batch",
                         in->step_tokens, in->step_seqs);
    int32_t longest = 0;
    for (int32_t s = 0; s < in->n_seqs; s++) {
        int32_t first = in->cu[s], last = in->cu[s + 1];
        if (last < first)
            return ESPI_FAIL(ESP_ERR_ARG, "objective: cu[%d] is %d after %d, expected an ascending list", (int)s + 1, (int)last,
                             (int)first);
        if (last - first > longest) longest = last - first;
        if (!isfinite(get(&in->advantage, s)))
            return ESPI_FAIL(ESP_ERR_NONFINITE, "objective: the advantage of sequence %d is %g, expected a finite number", (int)s,
                             get(&in->advantage, s));
        ESPI_TRY(check_finite("old_logprob", &in->old, s, first, last));
        ESPI_TRY(check_finite("is_ratio", &in->is_ratio, s, first, last));
        if (objective->beta > 0) ESPI_TRY(check_finite("ref_logprob", &in->ref, s, first, last));
    }
    run->step_tokens = in->step_tokens > 0 ? in->step_tokens : in->cu[in->n_seqs];
    run->step_seqs = in->step_seqs > 0 ? in->step_seqs : in->n_seqs;
    run->longest = objective->max_completion_length > 0 ? objective->max_completion_length : longest;
    if (objective->row->weight == PER_CONSTANT && objective->max_completion_length == 0 && run->step_seqs != in->n_seqs)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "objective: loss %s over several micro-batches (step_seqs %g, here %d) needs one constant for all of them; "
                         "set max_completion_length",
                         objective->row->name, run->step_seqs, (int)in->n_seqs);
    return ESP_OK;
}

static double token_weight(const espi_objective_run *run, int64_t length) {
    switch (run->objective->row->weight) {
    case PER_SEQUENCE_MEAN:
        return 1 / (run->step_seqs * (double)length);
    case PER_LOCAL_TOKEN:
        return run->in->n_seqs / (run->step_seqs * run->in->cu[run->in->n_seqs]);
    case PER_CONSTANT:
        return 1 / (run->step_seqs * run->longest);
    case PER_STEP_TOKEN:
        return 1 / run->step_tokens;
    case PER_SEQUENCE:
        break;
    }
    return 1 / run->step_seqs;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The entropy from which on tokens are kept: the quantile 1 - q with linear interpolation, as torch.quantile has it. */
static esp_status entropy_threshold(const espi_objective_run *run, double *threshold, int64_t *kept) {
    int64_t n = run->in->cu[run->in->n_seqs];
    double *sorted = malloc((size_t)n * sizeof *sorted);
    if (!sorted) return ESPI_FAIL(ESP_ERR_MEMORY, "objective: no memory to sort %lld entropies", (long long)n);
    for (int64_t i = 0; i < n; i++) sorted[i] = get(&run->in->entropy, i);
    qsort(sorted, (size_t)n, sizeof *sorted, ascending);
    double place = (double)(n - 1) * (1 - run->objective->top_entropy_quantile);
    if (fabs(place - round(place)) < 1e-9 * (double)n) place = round(place); /* 35 * (1 - 0.8) is meant to be 7 */
    int64_t below = (int64_t)place;
    double between = place - (double)below;
    *threshold = below + 1 < n ? sorted[below] + between * (sorted[below + 1] - sorted[below]) : sorted[n - 1];
    *kept = 0;
    for (int64_t i = 0; i < n; i++) *kept += sorted[i] >= *threshold;
    free(sorted);
    return ESP_OK;
}

/* VESPO: phi = e^(lambda + k log W - lambda W), W the product of the sequence's ratios and rollout corrections. */
static double vespo_weight(const espi_objective_run *run, int64_t first, int64_t last, double advantage) {
    const espi_objective_input *in = run->in;
    double log_floor = log(VESPO_WEIGHT_MIN), log_w = 0, log_correction = 0;
    for (int64_t i = first; i < last; i++) {
        if (in->old.data) log_w += clamp(get(&in->logprob, i) - get(&in->old, i), -LOG_RATIO_MAX, LOG_RATIO_MAX);
        if (in->is_ratio.data) log_correction += clamp(log(get(&in->is_ratio, i)), log_floor, LOG_RATIO_MAX);
    }
    log_w = clamp(log_w + log_correction, log_floor, LOG_RATIO_MAX);
    int side = advantage >= 0 ? 0 : 1;
    double k = run->objective->vespo_k[side], lambda = run->objective->vespo_lambda[side];
    return exp(lambda + k * log_w - lambda * exp(log_w));
}

/* The KL term of one token, k3 as value.  Times the ratio under bias correction: d/dlp of r k3 is r D, of which r k3 comes through the
 * ratio, so the k2 form has nothing left to pass through it. */
static term kl_term(const espi_objective *o, double lp, double ref, double ratio) {
    double distance = clamp(lp - ref, -LOG_RATIO_MAX, LOG_RATIO_MAX), inverse = exp(-distance);
    double scale = o->kl_bias_correction ? ratio : 1;
    term kl = {.value = scale * (inverse + distance - 1)};
    kl.d_lp = scale * (o->kl_grad == ESP_KL_GRAD_K3 ? 1 - inverse : distance);
    if (o->kl_bias_correction && o->kl_grad == ESP_KL_GRAD_K3) kl.d_ratio = kl.value;
    return kl;
}

/* What all tokens of one sequence share. */
typedef struct sequence {
    double advantage, weight, log_ratio, own_weight;
    bool dropped; /* by the off-policy mask: no policy term */
} sequence;

/* Mean of lp - other over a sequence; tokens for which the other has none (NaN) are left out. */
static double mean_log_ratio(const espi_objective_input *in, const espi_scalars *other, int64_t first, int64_t last) {
    double sum = 0, n = 0;
    for (int64_t i = first; i < last; i++) {
        const double there = get(other, i);
        if (isnan(there)) continue;
        sum += get(&in->logprob, i) - there;
        n++;
    }
    return n > 0 ? sum / n : 0;
}

static sequence sequence_start(const espi_objective_run *run, int32_t s) {
    const espi_objective *o = run->objective;
    const espi_objective_input *in = run->in;
    int64_t first = in->cu[s], last = in->cu[s + 1];
    sequence seq = {.advantage = get(&in->advantage, s), .weight = token_weight(run, last - first)};
    if (o->sequence_level && in->old.data) seq.log_ratio = mean_log_ratio(in, &in->old, first, last);
    if (o->off_policy_mask_threshold > 0 && seq.advantage < 0) {
        const espi_scalars *behaviour = in->sampler.data ? &in->sampler : &in->old;
        seq.dropped = behaviour->data && -mean_log_ratio(in, behaviour, first, last) > o->off_policy_mask_threshold;
    }
    if (o->row->own_sequence_weight) seq.own_weight = vespo_weight(run, first, last, seq.advantage);
    return seq;
}

/* One token: adds to the sums, gives its own part of g and what it sends through the sequence's ratio. */
static void token_terms(espi_objective_run *run, const sequence *seq, int64_t i, bool kept, double *own, double *through_ratio) {
    const espi_objective *o = run->objective;
    const espi_objective_input *in = run->in;
    double lp = get(&in->logprob, i), log_ratio = 0;
    if (in->old.data) log_ratio = o->sequence_level ? seq->log_ratio : lp - get(&in->old, i);
    token t = {exp(clamp(log_ratio, -LOG_RATIO_MAX, LOG_RATIO_MAX)), seq->advantage, lp, seq->own_weight};
    run->ratio += t.ratio;
    *own = *through_ratio = 0;
    term policy = o->row->term(o, &t);
    run->clipped_low += policy.clipped < 0;
    run->clipped_high += policy.clipped > 0;
    if (kept && !seq->dropped) {
        double rho = in->is_ratio.data && !o->row->own_sequence_weight ? get(&in->is_ratio, i) : 1;
        double weight = seq->weight * rho;
        run->policy_loss += weight * policy.value;
        *own += weight * policy.d_lp;
        *through_ratio += weight * policy.d_ratio;
    }
    if (in->ref.data && o->beta > 0) {
        term kl = kl_term(o, lp, get(&in->ref, i), t.ratio);
        double weight = o->beta * seq->weight;
        run->kl += kl.value;
        run->policy_loss += weight * kl.value;
        *own += weight * kl.d_lp;
        *through_ratio += weight * kl.d_ratio;
    }
}

esp_status espi_objective_rows(espi_objective_run *run, int64_t first, int64_t count, void *g, void *e, esp_dtype real) {
    const espi_objective *o = run->objective;
    const espi_objective_input *in = run->in;
    if (count == 0) return ESP_OK;
    int64_t total = in->cu[in->n_seqs], kept_tokens = total;
    double threshold = -HUGE_VAL;
    if (!espi_objective_row_local(o) && (first != 0 || count != total))
        return ESPI_FAIL(ESP_ERR_INTERNAL, "objective: rows %lld + %lld of %lld for a loss whose rows are coupled", (long long)first,
                         (long long)count, (long long)total);
    if (o->top_entropy_quantile < 1) ESPI_TRY(entropy_threshold(run, &threshold, &kept_tokens));
    /* The bonus is a mean over the kept tokens; this batch has its share of the step's tokens. */
    double bonus = o->entropy_coef * ((double)total / run->step_tokens) / (double)kept_tokens;
    for (int32_t s = 0; s < in->n_seqs; s++) {
        int64_t a = in->cu[s] > first ? in->cu[s] : first, b = in->cu[s + 1] < first + count ? in->cu[s + 1] : first + count;
        if (a >= b) continue;
        ESPI_TRY(check_finite("logprob", &in->logprob, s, a, b));
        ESPI_TRY(check_finite("entropy", &in->entropy, s, a, b));
        sequence seq = sequence_start(run, s);
        double shared = 0;
        for (int64_t i = a; i < b; i++) {
            double entropy = in->entropy.data ? get(&in->entropy, i) : 0, own, through_ratio;
            bool kept = entropy >= threshold;
            token_terms(run, &seq, i, kept, &own, &through_ratio);
            run->entropy += entropy;
            if (kept) run->bonus += bonus * entropy;
            espi_real_set(e, i, kept ? -bonus : 0, real);
            if (o->sequence_level)
                shared += through_ratio;
            else
                own += through_ratio;
            espi_real_set(g, i, own, real);
        }
        shared /= (double)(b - a);
        espi_scalars out_g = {g, real, NULL}, out_e = {e, real, NULL};
        for (int64_t i = a; i < b; i++) {
            if (shared != 0) espi_real_set(g, i, get(&out_g, i) + shared, real);
            run->abs_g += fabs(get(&out_g, i));
            run->skipped += get(&out_g, i) == 0 && get(&out_e, i) == 0;
        }
        run->tokens += b - a;
    }
    return ESP_OK;
}

void espi_objective_finish(const espi_objective_run *run, esp_grpo_stats *stats) {
    double n = run->tokens > 0 ? (double)run->tokens : 1;
    *stats = (esp_grpo_stats){
        .struct_size = sizeof *stats,
        .loss = run->policy_loss - run->bonus,
        .policy_loss = run->policy_loss,
        .kl = run->kl / n,
        .entropy = run->entropy / n,
        .ratio_mean = run->ratio / n,
        .clip_low = (double)run->clipped_low / n,
        .clip_high = (double)run->clipped_high / n,
        .mean_abs_g = run->abs_g / n,
        .tokens = run->tokens,
        .tokens_skipped = run->skipped,
    };
}

esp_status esp_objective_coefficients(const esp_objective *objective, int32_t n_seqs, const int32_t *cu, const double *logprob,
                                      const double *old, const double *ref, const double *is_ratio, const double *entropy,
                                      const double *advantage, double step_tokens, double step_seqs, double *g, double *e,
                                      esp_grpo_stats *stats) {
    if (n_seqs < 0 || !cu || cu[0] != 0)
        return ESPI_FAIL(ESP_ERR_ARG, "objective: %d sequences with cu %s, expected cu[0] = 0", (int)n_seqs, cu ? "not from 0" : "NULL");
    espi_objective resolved;
    ESPI_TRY(espi_objective_make(&resolved, objective));
    espi_objective_input in = {.n_seqs = n_seqs,
                               .cu = cu,
                               .logprob = {logprob, ESP_F64, NULL},
                               .old = {old, ESP_F64, NULL},
                               .ref = {ref, ESP_F64, NULL},
                               .is_ratio = {is_ratio, ESP_F64, NULL},
                               .entropy = {entropy, ESP_F64, NULL},
                               .advantage = {advantage, ESP_F64, NULL},
                               .step_tokens = step_tokens,
                               .step_seqs = step_seqs};
    espi_objective_run run;
    ESPI_TRY(espi_objective_begin(&run, &resolved, &in));
    if (cu[n_seqs] > 0 && (!logprob || !g || !e))
        return ESPI_FAIL(ESP_ERR_ARG, "objective: logprob, g and e must not be NULL for %d tokens", (int)cu[n_seqs]);
    ESPI_TRY(espi_objective_rows(&run, 0, cu[n_seqs], g, e, ESP_F64));
    if (!stats) return ESP_OK;
    esp_grpo_stats measured;
    espi_objective_finish(&run, &measured);
    return espi_struct_write(stats, &measured, sizeof measured, "esp_grpo_stats");
}
