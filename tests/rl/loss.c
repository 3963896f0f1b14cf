/* The loss on hidden states: one pass, two passes and the naive [T,V] form give the same gradient, which is that of the loss. */
#include "models/passes.h"
#include "rl/objective.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_T = 300, MAX_H = 24, MAX_V = 70 };

/* A model that is nothing but its head. */
typedef struct head_model {
    esp_ctx *ctx;
    esp_model model;
    float w[MAX_V * MAX_H];
    void *memory;
} head_model;

static double draw(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 11) / 9007199254740992.0 - 0.5;
}

static void head_model_make(head_model *m, const char *backend, int64_t hidden, int64_t vocab) {
    const size_t bytes = 16 << 20;
    uint64_t seed = 77;
    *m = (head_model){.memory = aligned_alloc(64, bytes)};
    cr_assert_not_null(m->memory);
    cr_assert_eq(esp_ctx_create(&m->ctx, &ESP_CTX_CONFIG(.backend = backend)), ESP_OK, "%s", esp_last_error());
    for (int64_t i = 0; i < vocab * hidden; i++) m->w[i] = (float)(2 * draw(&seed));
    m->model = (esp_model){.ctx = m->ctx,
                           .config = {.hidden = hidden, .vocab = vocab, .max_position = MAX_T},
                           .head = {.data = m->w, .dtype = ESP_F32, .rows = vocab, .cols = hidden},
                           .arena = espi_arena_over(m->memory, bytes)};
}

static void head_model_free(head_model *m) {
    esp_ctx_destroy(m->ctx);
    free(m->memory);
}

/* A batch of sequences of these lengths, all its arrays, and hidden states (in the context's dtype). */
typedef struct rollouts {
    esp_batch batch;
    esp_tensor view;
    int32_t tokens[MAX_T], cu[8];
    uint8_t mask[MAX_T];
    float advantage[8], old[MAX_T], ref[MAX_T], is_ratio[MAX_T], sampler[MAX_T];
    double hidden[MAX_T * MAX_H]; /* or floats, packed at its start */
} rollouts;

/* Log-probabilities near those of the head (log V on average), so that ratios lie around 1. */
static void rollouts_make(rollouts *r, const head_model *m, const int32_t *lengths, int32_t n_seqs) {
    const int64_t h = m->model.config.hidden, v = m->model.config.vocab;
    uint64_t seed = 5;
    *r = (rollouts){.cu = {0}};
    for (int32_t s = 0; s < n_seqs; s++) {
        r->cu[s + 1] = r->cu[s] + lengths[s];
        r->advantage[s] = (float)(s % 2 ? -0.5 + draw(&seed) / 4 : 0.8 + draw(&seed));
    }
    const int64_t t = r->cu[n_seqs];
    for (int64_t i = 0; i < t; i++) {
        r->tokens[i] = (int32_t)((draw(&seed) + 0.5) * (double)v);
        r->mask[i] = 1;
        r->is_ratio[i] = (float)(1 + 0.6 * draw(&seed));
    }
    for (int32_t s = 0; s < n_seqs; s++) r->mask[r->cu[s]] = 0;
    for (int64_t i = 0; i < t * h; i++) espi_real_set(r->hidden, i, draw(&seed), m->ctx->real);
    r->view = esp_tensor_view(r->hidden, m->ctx->real, 2, (int64_t[]){t, h});
    r->batch = ESP_BATCH(.tokens = r->tokens, .cu_seqlens = r->cu, .n_tokens = t, .n_seqs = n_seqs, .advantage = r->advantage);
}

/* old, ref and sampler: the current log-probabilities and a step away from them. */
static void add_policies(rollouts *r, head_model *m, float temperature) {
    uint64_t seed = 21;
    float lp[MAX_T];
    cr_assert_eq(esp_model_logprob(&m->model, &r->batch, &r->view, temperature, lp, NULL), ESP_OK, "%s", esp_last_error());
    for (int64_t i = 0; i < r->batch.n_tokens; i++) {
        r->old[i] = lp[i] + (float)(0.7 * draw(&seed));
        r->ref[i] = lp[i] + (float)draw(&seed);
        r->sampler[i] = lp[i] + 0.25f;
    }
    r->batch.old_logprob = r->old;
    r->batch.ref_logprob = r->ref;
}

/* ---- the naive form ---- */

typedef struct naive {
    double loss, d_hidden[MAX_T * MAX_H];
} naive;

static void naive_logits(double *z, const head_model *m, const rollouts *r, int64_t row, double temperature) {
    const int64_t h = m->model.config.hidden, v = m->model.config.vocab;
    for (int64_t j = 0; j < v; j++) {
        z[j] = 0;
        for (int64_t k = 0; k < h; k++) z[j] += espi_real_get(r->hidden, row * h + k, m->ctx->real) * (double)m->w[j * h + k];
        z[j] /= temperature;
    }
}

static double log_sum_exp(const double *z, int64_t v) {
    double top = z[0], sum = 0;
    for (int64_t j = 1; j < v; j++) top = fmax(top, z[j]);
    for (int64_t j = 0; j < v; j++) sum += exp(z[j] - top);
    return top + log(sum);
}

static void naive_loss(naive *out, const head_model *m, const rollouts *r, const esp_objective *o, double temperature) {
    const int64_t h = m->model.config.hidden, v = m->model.config.vocab;
    static double lp[MAX_T], old[MAX_T], ref[MAX_T], is_ratio[MAX_T], entropy[MAX_T], g[MAX_T], e[MAX_T];
    double z[MAX_V], advantage[8];
    int32_t cu[9] = {0}, place[MAX_T], n = 0;
    for (int32_t s = 0; s < r->batch.n_seqs; s++) {
        advantage[s] = (double)r->advantage[s];
        for (int32_t t = r->cu[s]; t < r->cu[s + 1]; t++) {
            if (!r->mask[t]) continue;
            naive_logits(z, m, r, t - 1, temperature);
            const double lse = log_sum_exp(z, v);
            lp[n] = z[r->tokens[t]] - lse;
            entropy[n] = lse;
            for (int64_t j = 0; j < v; j++) entropy[n] -= exp(z[j] - lse) * z[j];
            old[n] = (double)r->old[t];
            ref[n] = (double)r->ref[t];
            is_ratio[n] = (double)r->is_ratio[t];
            place[n++] = t;
        }
        cu[s + 1] = n;
    }
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    cr_assert_eq(esp_objective_coefficients(o, r->batch.n_seqs, cu, lp, old, ref, r->batch.is_ratio ? is_ratio : NULL, entropy, advantage,
                                            r->batch.step_tokens, r->batch.step_seqs, g, e, &stats),
                 ESP_OK, "%s", esp_last_error());
    out->loss = stats.loss;
    memset(out->d_hidden, 0, sizeof out->d_hidden);
    for (int32_t i = 0; i < n; i++) {
        const int64_t row = place[i] - 1;
        naive_logits(z, m, r, row, temperature);
        const double lse = log_sum_exp(z, v);
        for (int64_t j = 0; j < v; j++) {
            const double log_p = z[j] - lse, p = exp(log_p);
            const double dz = (g[i] * ((j == r->tokens[place[i]]) - p) - e[i] * p * (log_p + entropy[i])) / temperature;
            for (int64_t k = 0; k < h; k++) out->d_hidden[row * h + k] += dz * (double)m->w[j * h + k];
        }
    }
}

static void expect_loss(const char *what, head_model *m, rollouts *r, const esp_objective *o, const naive *expected, double tolerance) {
    const int64_t n = r->batch.n_tokens * m->model.config.hidden;
    esp_tensor d_hidden;
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    r->batch.objective = o;
    memset(m->memory, 0xff, 1 << 20); /* NaN: whatever is not written shows */
    cr_assert_eq(esp_grpo_loss(&m->model, &r->batch, &r->view, &d_hidden, &stats), ESP_OK, "%s: %s", what, esp_last_error());
    cr_expect(fabs(stats.loss - expected->loss) <= tolerance * fmax(1, fabs(expected->loss)), "%s: loss %.17g, naive %.17g", what,
              stats.loss, expected->loss);
    double worst = 0, scale = 0;
    for (int64_t i = 0; i < n; i++) {
        const double got = espi_real_get(d_hidden.data, i, m->ctx->real), error = fabs(got - expected->d_hidden[i]);
        if (!(error <= worst)) worst = error;
        scale = fmax(scale, fabs(expected->d_hidden[i]));
    }
    cr_expect(worst <= tolerance * scale, "%s: d_hidden is off by %.3g of its largest %.3g", what, worst, scale);
}

/* Tiles are never whole: lengths around nothing in particular, a mask with a hole, a sequence of which nothing counts.  A row-local loss
 * takes one pass; an off-policy threshold that nothing reaches makes the same loss take two. */
static void check_paths(const char *backend, const int32_t *lengths, int32_t n_seqs, double tolerance) {
    static head_model m;
    static rollouts r;
    static naive expected;
    head_model_make(&m, backend, 23, 67);
    rollouts_make(&r, &m, lengths, n_seqs);
    for (int32_t t = r.cu[n_seqs - 1]; t < r.cu[n_seqs]; t++) r.mask[t] = 0;
    if (lengths[0] > 3) r.mask[2] = 0;
    r.batch.loss_mask = r.mask;
    r.batch.is_ratio = r.is_ratio;
    r.batch.step_tokens = 400;
    r.batch.step_seqs = 9;
    add_policies(&r, &m, 0.7f);
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++) {
        esp_objective o = ESP_OBJECTIVE(.loss = (esp_loss_type)loss, .beta = 0.2f, .entropy_coef = 0.03f, .temperature = 0.7f,
                                        .max_completion_length = 64);
        naive_loss(&expected, &m, &r, &o, (double)0.7f);
        expect_loss(esp_loss_type_name(o.loss), &m, &r, &o, &expected, tolerance);
        o.off_policy_mask_threshold = 1e6f;
        expect_loss("the same in two passes", &m, &r, &o, &expected, tolerance);
    }
    head_model_free(&m);
}

Test(loss, one_pass_two_passes_and_naive_agree) {
    static const int32_t shapes[][4] = {{2, 1, 2, 2}, {5, 4, 1, 3}, {17, 9, 30, 4}, {65, 64, 63, 5}, {150, 97, 31, 2}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        check_paths("ref64", shapes[i], 4, 1e-12);
        check_paths("ref", shapes[i], 4, 1e-5); /* float log-probs feed exponentials: a few 1e-7 each */
        check_paths("auto", shapes[i], 4, 1e-5);
    }
}

/* ---- the derivative, through head and objective at once ---- */

static void check_derivative(head_model *m, rollouts *r, const esp_objective *o) {
    const double h = 1e-6, tolerance = 1e-8;
    const int64_t n = r->batch.n_tokens * m->model.config.hidden;
    static double analytic[MAX_T * MAX_H];
    esp_tensor d_hidden;
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    r->batch.objective = o;
    cr_assert_eq(esp_grpo_loss(&m->model, &r->batch, &r->view, &d_hidden, &stats), ESP_OK, "%s", esp_last_error());
    memcpy(analytic, d_hidden.data, (size_t)n * sizeof *analytic);
    for (int64_t i = 0; i < n; i++) {
        double sides[2];
        const double at = r->hidden[i];
        for (int side = 0; side < 2; side++) {
            r->hidden[i] = at + (side == 0 ? h : -h);
            cr_assert_eq(esp_grpo_loss(&m->model, &r->batch, &r->view, &d_hidden, &stats), ESP_OK);
            sides[side] = stats.loss;
        }
        r->hidden[i] = at;
        const double slope = (sides[0] - sides[1]) / (2 * h);
        cr_expect(fabs(slope - analytic[i]) <= tolerance,
                  "%s level %d beta %g corrected %d delta %g: d_hidden[%d] is %.12g, quotient %.12g", esp_loss_type_name(o->loss),
                  (int)o->level, (double)o->beta, o->kl_bias_correction, (double)o->delta, (int)i, analytic[i], slope);
    }
}

/* Losses x levels x KL forms x ratio bound x temperature, each with an entropy bonus. */
Test(loss, gradient_of_every_row_by_differences) {
    static head_model m;
    static rollouts r;
    static const int32_t lengths[] = {4, 3, 2};
    static const float temperatures[] = {1, 0.7f};
    int cases = 0;
    head_model_make(&m, "ref64", 5, 11);
    for (int t = 0; t < 2; t++) {
        rollouts_make(&r, &m, lengths, 3);
        add_policies(&r, &m, temperatures[t]);
        r.batch.is_ratio = r.is_ratio;
        for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++) {
            /* Where the weight is a constant of the loss, only a ratio of exactly 1 makes the coefficient a derivative. */
            const bool holds_weight = loss == ESP_LOSS_CISPO || loss == ESP_LOSS_VESPO;
            const bool bounded = loss <= ESP_LOSS_DAPO || loss == ESP_LOSS_LUSPO;
            r.batch.old_logprob = holds_weight ? NULL : r.old;
            for (int level = 0; level <= (loss == ESP_LOSS_VESPO ? 0 : 1); level++)
                for (int kl = 0; kl < (holds_weight ? 2 : 3); kl++)
                    for (int delta = 0; delta <= (bounded ? 1 : 0); delta++) {
                        const esp_objective o =
                            ESP_OBJECTIVE(.loss = (esp_loss_type)loss, .level = (esp_is_level)level, .entropy_coef = 0.05f,
                                          .temperature = temperatures[t], .beta = kl ? 0.3f : 0, .kl_grad = ESP_KL_GRAD_K3,
                                          .kl_bias_correction = kl == 2, .delta = delta ? 1.15f : 0);
                        check_derivative(&m, &r, &o);
                        cases++;
                    }
        }
    }
    cr_expect_eq(cases, 144, "%d cases", cases);
    head_model_free(&m);
}

/* ---- statistics and refusals ---- */

static esp_status run(head_model *m, rollouts *r, const esp_objective *o, esp_grpo_stats *stats) {
    esp_tensor d_hidden;
    r->batch.objective = o;
    return esp_grpo_loss(&m->model, &r->batch, &r->view, &d_hidden, stats);
}

Test(loss, statistics) {
    static head_model m;
    static rollouts r;
    static const int32_t lengths[] = {9, 6};
    head_model_make(&m, "ref", 8, 20);
    rollouts_make(&r, &m, lengths, 2);
    add_policies(&r, &m, 1);
    r.batch.sampler_logprob = r.sampler;
    r.batch.old_logprob = NULL;
    r.advantage[1] = 0;
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    cr_assert_eq(run(&m, &r, NULL, &stats), ESP_OK, "%s", esp_last_error());
    cr_expect_eq(stats.tokens, 13);
    cr_expect_eq(stats.tokens_skipped, 5);
    cr_expect_eq(stats.ratio_mean, 1);
    cr_expect_eq(stats.clip_low + stats.clip_high, 0);
    cr_expect(fabs(stats.logp_diff_mean - 0.25) <= 1e-6 && fabs(stats.logp_diff_max - 0.25) <= 1e-6, "%g %g", stats.logp_diff_mean,
              stats.logp_diff_max);
    cr_expect(fabs(stats.mean_abs_g - 8.0 / 13 / 13 * (double)r.advantage[0]) <= 1e-7, "%g", stats.mean_abs_g);
    cr_expect(stats.entropy > 0 && stats.entropy < log(20) + 1e-6, "%g", stats.entropy);
    head_model_free(&m);
}

Test(loss, bad_input_is_refused_by_name) {
    static head_model m;
    static rollouts r;
    static const int32_t lengths[] = {3, 5, 4};
    head_model_make(&m, "ref", 8, 20);
    rollouts_make(&r, &m, lengths, 3);
    add_policies(&r, &m, 1);
    r.batch.sampler_logprob = r.sampler;
    const esp_objective kl = ESP_OBJECTIVE(.beta = 0.1f);
    float *const fields[] = {&r.old[5], &r.ref[5], &r.sampler[5], &r.advantage[1]};
    for (int i = 0; i < 4; i++) {
        const float good = *fields[i];
        *fields[i] = fields[i] == &r.sampler[5] ? -INFINITY : NAN; /* a sampler's NaN says: absent */
        cr_expect_eq(run(&m, &r, &kl, NULL), ESP_ERR_NONFINITE, "field %d", i);
        cr_expect(strstr(esp_last_error(), "sequence 1"), "field %d: %s", i, esp_last_error());
        *fields[i] = good;
    }
    const double good = espi_real_get(r.hidden, 5 * 8, ESP_F32);
    espi_real_set(r.hidden, 5 * 8, NAN, ESP_F32);
    cr_expect_eq(run(&m, &r, &kl, NULL), ESP_ERR_NONFINITE);
    cr_expect(strstr(esp_last_error(), "sequence 1"), "%s", esp_last_error());
    espi_real_set(r.hidden, 5 * 8, good, ESP_F32);
    r.batch.ref_logprob = NULL;
    cr_expect_eq(run(&m, &r, &kl, NULL), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "ref_logprob"), "%s", esp_last_error());
    r.batch.advantage = NULL;
    cr_expect_eq(run(&m, &r, NULL, NULL), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "advantage"), "%s", esp_last_error());
    head_model_free(&m);
}

/* A log-probability that the sampler did not give leaves the distance and the off-policy mask to the others. */
Test(loss, absent_sampler_logprobs_are_left_out) {
    static head_model m;
    static rollouts r;
    static const int32_t lengths[] = {3, 5, 4};
    head_model_make(&m, "ref", 8, 20);
    rollouts_make(&r, &m, lengths, 3);
    add_policies(&r, &m, 1);
    r.batch.old_logprob = NULL;
    r.batch.sampler_logprob = r.sampler; /* 0.25 above each log-probability */
    for (int i = 0; i < 3; i++) r.advantage[i] = -1;
    r.sampler[1] = r.sampler[6] = NAN;
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    cr_assert_eq(run(&m, &r, NULL, &stats), ESP_OK, "%s", esp_last_error());
    cr_expect(fabs(stats.logp_diff_mean - 0.25) < 1e-6 && fabs(stats.logp_diff_max - 0.25) < 1e-6, "%g", stats.logp_diff_mean);
    cr_expect_eq(stats.sampler_tokens, stats.tokens - 2);
    const esp_objective low = ESP_OBJECTIVE(.off_policy_mask_threshold = 0.2f), high = ESP_OBJECTIVE(.off_policy_mask_threshold = 0.3f);
    cr_assert_eq(run(&m, &r, &low, &stats), ESP_OK, "%s", esp_last_error());
    cr_expect(stats.policy_loss == 0 && stats.tokens_skipped == stats.tokens, "the mask keeps %g", stats.policy_loss);
    cr_assert_eq(run(&m, &r, &high, &stats), ESP_OK, "%s", esp_last_error());
    cr_expect(stats.policy_loss != 0 && stats.tokens_skipped == 0);
    head_model_free(&m);
}

Test(loss, no_tokens_do_nothing) {
    static head_model m;
    static rollouts r;
    head_model_make(&m, "ref", 8, 20);
    rollouts_make(&r, &m, NULL, 0);
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    cr_expect_eq(run(&m, &r, NULL, &stats), ESP_OK, "%s", esp_last_error());
    cr_expect(stats.loss == 0 && stats.tokens == 0);
    head_model_free(&m);
}
