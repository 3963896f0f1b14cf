/* The objective by itself: its coefficients against finite differences, micro-batches against the whole, the policy gradient against an
 * enumeration, and everything it must refuse. */
#include "rl/objective.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { SEQS = 4, TOKENS = 16 };

/* Two halves of 8 tokens in 2 sequences each, so that a mean over a micro-batch (bnpo) is the mean over the whole too. */
static const int32_t cu[SEQS + 1] = {0, 5, 8, 9, 16};

typedef struct sample {
    double lp[TOKENS], old[TOKENS], ref[TOKENS], is_ratio[TOKENS], entropy[TOKENS], advantage[SEQS];
} sample;

/* A plain generator: the values only have to be unremarkable and the same everywhere. */
static double draw(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 11) / 9007199254740992.0;
}

static sample make_sample(uint64_t seed) {
    sample s = {.advantage = {0.9, -1.3, 0.4, -0.7}};
    for (int i = 0; i < TOKENS; i++) {
        s.lp[i] = -0.2 - 2 * draw(&seed);
        s.old[i] = s.lp[i] + 0.8 * (draw(&seed) - 0.5);
        s.ref[i] = s.lp[i] + 1.2 * (draw(&seed) - 0.5);
        s.is_ratio[i] = 0.6 + 0.8 * draw(&seed);
        s.entropy[i] = 2 * draw(&seed);
    }
    return s;
}

typedef struct result {
    double g[TOKENS], e[TOKENS];
    esp_grpo_stats stats;
} result;

static result evaluate(const esp_objective *o, const sample *s, bool old, bool is_ratio) {
    result r = {.stats = ESP_GRPO_STATS_INIT};
    cr_assert_eq(esp_objective_coefficients(o, SEQS, cu, s->lp, old ? s->old : NULL, s->ref, is_ratio ? s->is_ratio : NULL, s->entropy,
                                            s->advantage, 0, 0, r.g, r.e, &r.stats),
                 ESP_OK, "%s", esp_last_error());
    return r;
}

static void describe(char text[160], const esp_objective *o) {
    snprintf(text, 160, "%s level %d beta %g kl_grad %d corrected %d delta %g", esp_loss_type_name(o->loss), (int)o->level, (double)o->beta,
             (int)o->kl_grad, o->kl_bias_correction, (double)o->delta);
}

static bool is_clipped_loss(esp_loss_type loss) {
    return loss <= ESP_LOSS_DAPO || loss == ESP_LOSS_LUSPO;
}

/* CISPO and VESPO hold their weight constant, so only with a ratio of exactly 1 are their coefficients a derivative of their value. */
static bool holds_weight(esp_loss_type loss) {
    return loss == ESP_LOSS_CISPO || loss == ESP_LOSS_VESPO;
}

static void check_differences(const esp_objective *o, bool is_ratio) {
    const double h = 1e-6, tolerance = 1e-8; /* rounding of the loss over h is 1e-10, the second-order term h^2 */
    const bool old = !holds_weight(o->loss);
    char text[160];
    describe(text, o);
    sample s = make_sample(7);
    const result r = evaluate(o, &s, old, is_ratio);
    double largest = 0;
    for (int i = 0; i < TOKENS; i++) {
        double *const inputs[] = {&s.lp[i], &s.entropy[i]};
        const double coefficients[] = {r.g[i], r.e[i]};
        for (int k = 0; k < 2; k++) {
            const double at = *inputs[k];
            *inputs[k] = at + h;
            const double above = evaluate(o, &s, old, is_ratio).stats.loss;
            *inputs[k] = at - h;
            const double below = evaluate(o, &s, old, is_ratio).stats.loss;
            *inputs[k] = at;
            const double slope = (above - below) / (2 * h);
            cr_expect(fabs(slope - coefficients[k]) <= tolerance, "%s: %s of token %d is %.12g, difference quotient %.12g", text,
                      k == 0 ? "g" : "e", i, coefficients[k], slope);
            largest = fmax(largest, fabs(slope));
        }
    }
    cr_expect(largest > 1e-3, "%s: nothing depends on anything", text);
}

/* Every row of the table, its levels, KL forms whose gradient is that of the value, the ratio bound, rollout corrections, a bonus. */
Test(objective, coefficients_are_the_derivatives) {
    int cases = 0;
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++)
        for (int level = 0; level <= (loss == ESP_LOSS_VESPO ? 0 : 1); level++)
            for (int kl = 0; kl < 4; kl++)
                for (int delta = 0; delta <= (is_clipped_loss((esp_loss_type)loss) ? 1 : 0); delta++) {
                    esp_objective o = ESP_OBJECTIVE(.loss = (esp_loss_type)loss, .level = (esp_is_level)level, .entropy_coef = 0.01f,
                                                    .delta = delta ? 1.15f : 0);
                    if (kl > 0) o.beta = 0.3f;
                    o.kl_bias_correction = kl > 1;
                    o.kl_grad = kl == 3 ? ESP_KL_GRAD_K2 : ESP_KL_GRAD_K3; /* corrected k2 is a true gradient at token level */
                    if (kl == 3 && level == ESP_IS_SEQUENCE) continue;
                    if (kl > 1 && holds_weight(o.loss)) continue;
                    check_differences(&o, false);
                    check_differences(&o, true);
                    cases += 2;
                }
    cr_expect_eq(cases, 166, "%d cases", cases);
}

/* Without correction the k2 gradient is that of D^2/2: it is not the derivative of the k3 that is reported. */
Test(objective, k2_gradient_is_the_distance) {
    const sample s = make_sample(3);
    const esp_objective plain = ESP_OBJECTIVE(.loss = ESP_LOSS_DAPO), k2 = ESP_OBJECTIVE(.loss = ESP_LOSS_DAPO, .beta = 0.5f);
    const result without = evaluate(&plain, &s, true, false), with = evaluate(&k2, &s, true, false);
    double k3 = 0;
    for (int i = 0; i < TOKENS; i++) {
        const double distance = s.lp[i] - s.ref[i], expected = without.g[i] + 0.5 / TOKENS * distance;
        k3 += (exp(-distance) + distance - 1) / TOKENS;
        cr_expect(fabs(with.g[i] - expected) <= 1e-15, "token %d: %.17g, expected %.17g", i, with.g[i], expected);
    }
    cr_expect(fabs(with.stats.kl - k3) <= 1e-15, "kl %.17g, expected %.17g", with.stats.kl, k3);
}

Test(objective, micro_batches_add_up_to_the_whole) {
    const sample s = make_sample(11);
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++)
        for (int level = 0; level <= (loss == ESP_LOSS_VESPO ? 0 : 1); level++) {
            const esp_objective o = ESP_OBJECTIVE(.loss = (esp_loss_type)loss, .level = (esp_is_level)level, .beta = 0.1f,
                                                  .entropy_coef = 0.02f, .off_policy_mask_threshold = 0.05f, .max_completion_length = 9);
            char text[160];
            describe(text, &o);
            const result whole = evaluate(&o, &s, true, true);
            double sum = 0;
            for (int half = 0; half < 2; half++) {
                const int first = half * 8, first_seq = half * 2;
                const int32_t local[3] = {0, cu[first_seq + 1] - first, cu[first_seq + 2] - first};
                result part = {.stats = ESP_GRPO_STATS_INIT};
                cr_assert_eq(esp_objective_coefficients(&o, 2, local, s.lp + first, s.old + first, s.ref + first, s.is_ratio + first,
                                                        s.entropy + first, s.advantage + first_seq, TOKENS, SEQS, part.g, part.e,
                                                        &part.stats),
                             ESP_OK, "%s", esp_last_error());
                sum += part.stats.loss;
                for (int i = 0; i < 8; i++)
                    cr_expect(fabs(part.g[i] - whole.g[first + i]) <= 1e-16 && fabs(part.e[i] - whole.e[first + i]) <= 1e-16,
                              "%s: token %d has g %.17g e %.17g alone, g %.17g e %.17g in the whole", text, first + i, part.g[i], part.e[i],
                              whole.g[first + i], whole.e[first + i]);
            }
            cr_expect(fabs(sum - whole.stats.loss) <= 1e-15, "%s: losses add up to %.17g, the whole has %.17g", text, sum,
                      whole.stats.loss);
        }
}

/* A chunked head asks for ranges: same bits, same sums. */
Test(objective, ranges_give_the_bits_of_the_whole) {
    const sample s = make_sample(5);
    const esp_objective options = ESP_OBJECTIVE(.loss = ESP_LOSS_GRPO, .beta = 0.1f, .entropy_coef = 0.02f);
    const result whole = evaluate(&options, &s, true, true);
    espi_objective o;
    cr_assert_eq(espi_objective_make(&o, &options), ESP_OK, "%s", esp_last_error());
    cr_assert(espi_objective_row_local(&o));
    const espi_objective_input in = {.n_seqs = SEQS,
                                     .cu = cu,
                                     .logprob = {s.lp, ESP_F64, NULL},
                                     .old = {s.old, ESP_F64, NULL},
                                     .ref = {s.ref, ESP_F64, NULL},
                                     .is_ratio = {s.is_ratio, ESP_F64, NULL},
                                     .entropy = {s.entropy, ESP_F64, NULL},
                                     .advantage = {s.advantage, ESP_F64, NULL}};
    espi_objective_run run;
    cr_assert_eq(espi_objective_begin(&run, &o, &in), ESP_OK, "%s", esp_last_error());
    double g[TOKENS], e[TOKENS];
    for (int first = 0, step = 1; first < TOKENS; first += step, step = step == 7 ? TOKENS - first : 7)
        cr_assert_eq(espi_objective_rows(&run, first, step < TOKENS - first ? step : TOKENS - first, g, e, ESP_F64), ESP_OK);
    esp_grpo_stats stats;
    espi_objective_finish(&run, &stats);
    cr_expect(memcmp(g, whole.g, sizeof g) == 0 && memcmp(e, whole.e, sizeof e) == 0);
    cr_expect_eq(stats.loss, whole.stats.loss);
    cr_expect_eq(stats.kl, whole.stats.kl);
    cr_expect_eq(stats.tokens, TOKENS);
}

/* On-policy: a batch whose old log-probs are its own is the batch without old ones, and nothing is clipped. */
Test(objective, first_update_has_ratio_one) {
    sample s = make_sample(2);
    memcpy(s.old, s.lp, sizeof s.old);
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++) {
        const esp_objective o = ESP_OBJECTIVE(.loss = (esp_loss_type)loss);
        const result with = evaluate(&o, &s, true, false), without = evaluate(&o, &s, false, false);
        cr_expect_eq(with.stats.ratio_mean, 1, "%s: mean ratio %.17g", esp_loss_type_name(o.loss), with.stats.ratio_mean);
        cr_expect_eq(with.stats.clip_low + with.stats.clip_high, 0, "%s clips", esp_loss_type_name(o.loss));
        cr_expect(memcmp(with.g, without.g, sizeof with.g) == 0, "%s: old = current is not the same as no old", esp_loss_type_name(o.loss));
        for (int seq = 0; seq < SEQS; seq++)
            cr_expect(with.g[cu[seq]] * s.advantage[seq] < 0, "%s: sequence %d is pushed the wrong way", esp_loss_type_name(o.loss), seq);
    }
}

/* ---- the policy gradient theorem by enumeration: 3 tokens, 3 places, 27 completions ---- */

enum { V = 3, LENGTH = 3, ALL = 27, PARAMETERS = LENGTH * V * V };

/* Logits of a place depend on the token before it. */
static const double *logits_of(const double *theta, int place, int previous) {
    return theta + (place * V + previous) * V;
}

static double logprob_of(const double *logits, int token) {
    double sum = 0;
    for (int v = 0; v < V; v++) sum += exp(logits[v]);
    return logits[token] - log(sum);
}

static int token_at(int completion, int place) {
    return place == 0 ? completion / 9 : place == 1 ? completion / 3 % 3 : completion % 3;
}

static int before(int completion, int place) {
    return place == 0 ? 0 : token_at(completion, place - 1);
}

static double reward_of(int completion) {
    return sin(1.7 * completion) + (completion % 5 == 0);
}

static double expected_reward(const double *theta) {
    double sum = 0;
    for (int c = 0; c < ALL; c++) {
        double lp = 0;
        for (int t = 0; t < LENGTH; t++) lp += logprob_of(logits_of(theta, t, before(c, t)), token_at(c, t));
        sum += exp(lp) * reward_of(c);
    }
    return sum;
}

Test(objective, gradient_is_the_exact_policy_gradient) {
    double theta[PARAMETERS], lp[ALL * LENGTH], advantage[ALL], baseline = 0.4;
    int32_t borders[ALL + 1];
    uint64_t seed = 9;
    for (int i = 0; i < PARAMETERS; i++) theta[i] = 2 * draw(&seed) - 1;
    for (int c = 0; c <= ALL; c++) borders[c] = c * LENGTH;
    for (int c = 0; c < ALL; c++) {
        double total = 0;
        for (int t = 0; t < LENGTH; t++) total += lp[c * LENGTH + t] = logprob_of(logits_of(theta, t, before(c, t)), token_at(c, t));
        advantage[c] = exp(total) * (reward_of(c) - baseline); /* the weight of a completion is its probability */
    }
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++) {
        const esp_objective o = ESP_OBJECTIVE(.loss = (esp_loss_type)loss);
        const double weight = loss == ESP_LOSS_LUSPO ? 1.0 / ALL : 1.0 / (ALL * LENGTH); /* all lengths are equal */
        double g[ALL * LENGTH], e[ALL * LENGTH], gradient[PARAMETERS] = {0};
        cr_assert_eq(esp_objective_coefficients(&o, ALL, borders, lp, NULL, NULL, NULL, NULL, advantage, 0, 0, g, e, NULL), ESP_OK, "%s",
                     esp_last_error());
        for (int c = 0; c < ALL; c++)
            for (int t = 0; t < LENGTH; t++) {
                const double *logits = logits_of(theta, t, before(c, t));
                for (int v = 0; v < V; v++)
                    gradient[logits - theta + v] -= g[c * LENGTH + t] / weight * ((v == token_at(c, t)) - exp(logprob_of(logits, v)));
            }
        for (int i = 0; i < PARAMETERS; i++) {
            const double at = theta[i], h = 1e-5;
            theta[i] = at + h;
            const double above = expected_reward(theta);
            theta[i] = at - h;
            const double below = expected_reward(theta);
            theta[i] = at;
            cr_expect(fabs(gradient[i] - (above - below) / (2 * h)) <= 1e-9, "%s: parameter %d has %.12g, E[R] moves by %.12g",
                      esp_loss_type_name(o.loss), i, gradient[i], (above - below) / (2 * h));
        }
    }
}

/* ---- what costs nothing, what is extreme, what is refused ---- */

Test(objective, zero_advantage_has_exactly_no_gradient) {
    sample s = make_sample(4);
    s.advantage[1] = s.advantage[2] = 0;
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++) {
        const esp_objective o = ESP_OBJECTIVE(.loss = (esp_loss_type)loss, .epsilon_low = 1, .epsilon_high = 9);
        const result r = evaluate(&o, &s, true, false);
        for (int i = cu[1]; i < cu[3]; i++) cr_expect_eq(r.g[i], 0);
        cr_expect_eq(r.stats.tokens_skipped, cu[3] - cu[1], "%s skips %lld", esp_loss_type_name(o.loss), (long long)r.stats.tokens_skipped);
    }
}

Test(objective, extreme_ratios_stay_finite) {
    sample s = make_sample(6);
    for (int i = 0; i < TOKENS; i++) {
        s.old[i] = i % 2 ? -2000 : 0;
        s.lp[i] = i % 3 ? -1000 : -0.1;
        s.ref[i] = i % 5 ? -3000 : 0;
    }
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++)
        for (int level = 0; level <= (loss == ESP_LOSS_VESPO ? 0 : 1); level++) {
            const esp_objective o = ESP_OBJECTIVE(.loss = (esp_loss_type)loss, .level = (esp_is_level)level, .beta = 0.1f,
                                                  .kl_grad = ESP_KL_GRAD_K3, .kl_bias_correction = true);
            const result r = evaluate(&o, &s, true, true);
            cr_expect(isfinite(r.stats.loss), "%s: loss %g", esp_loss_type_name(o.loss), r.stats.loss);
            for (int i = 0; i < TOKENS; i++) cr_expect(isfinite(r.g[i]), "%s: g[%d] is %g", esp_loss_type_name(o.loss), i, r.g[i]);
        }
}

/* Eleven tokens of entropy 0..10: the quantile 1 - 0.7 lies exactly at 3, though 10 * (1 - 0.7) is a little more in double. */
Test(objective, entropy_quantile_keeps_its_share) {
    enum { N = 11 };
    const int32_t one[2] = {0, N};
    const double advantage = 1;
    double lp[N], entropy[N], g[N], e[N];
    for (int i = 0; i < N; i++) {
        lp[i] = -1;
        entropy[i] = i;
    }
    const esp_objective o = ESP_OBJECTIVE(.top_entropy_quantile = 0.7f, .entropy_coef = 0.5f);
    cr_assert_eq(esp_objective_coefficients(&o, 1, one, lp, NULL, NULL, NULL, entropy, &advantage, 0, 0, g, e, NULL), ESP_OK, "%s",
                 esp_last_error());
    for (int i = 0; i < N; i++) {
        cr_expect_eq(g[i], i >= 3 ? -1.0 / N : 0, "token %d has g %g", i, g[i]);
        cr_expect_eq(e[i], i >= 3 ? -0.5 / 8 : 0, "token %d has e %g", i, e[i]);
    }
}

Test(objective, nothing_counted_is_nothing) {
    const int32_t empty[3] = {0, 0, 0};
    const double advantage[2] = {1, 2};
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    cr_expect_eq(esp_objective_coefficients(NULL, 2, empty, NULL, NULL, NULL, NULL, NULL, advantage, 0, 0, NULL, NULL, &stats), ESP_OK,
                 "%s", esp_last_error());
    cr_expect_eq(stats.loss, 0);
    cr_expect_eq(stats.tokens, 0);
    cr_expect_eq(esp_objective_coefficients(NULL, 0, empty, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, NULL), ESP_OK);
}

static const struct {
    esp_objective options;
    const char *words[2]; /* both must be in the sentence */
} contradictions[] = {
    {{.struct_size = sizeof(esp_objective), .loss = 9}, {"loss is 9", "esp_loss_type"}},
    {{.struct_size = sizeof(esp_objective), .level = 2}, {"level is 2", "esp_is_level"}},
    {{.struct_size = sizeof(esp_objective), .kl_grad = 7}, {"kl_grad is 7", "esp_kl_grad"}},
    {{.struct_size = sizeof(esp_objective), .epsilon_low = -0.1f}, {"epsilon_low is -0.1", "expected"}},
    {{.struct_size = sizeof(esp_objective), .epsilon_low = 1.5f}, {"epsilon_low is 1.5", "expected"}},
    {{.struct_size = sizeof(esp_objective), .epsilon_high = -0.1f}, {"epsilon_high is -0.1", "expected"}},
    {{.struct_size = sizeof(esp_objective), .epsilon_high = NAN}, {"epsilon_high is", "expected"}},
    {{.struct_size = sizeof(esp_objective), .delta = 0.9f}, {"delta is 0.9", "expected"}},
    {{.struct_size = sizeof(esp_objective), .beta = -0.1f}, {"beta is -0.1", "expected"}},
    {{.struct_size = sizeof(esp_objective), .beta = INFINITY}, {"beta is inf", "expected"}},
    {{.struct_size = sizeof(esp_objective), .temperature = -1}, {"temperature is -1", "expected"}},
    {{.struct_size = sizeof(esp_objective), .top_entropy_quantile = 1.1f}, {"top_entropy_quantile is 1.1", "expected"}},
    {{.struct_size = sizeof(esp_objective), .entropy_coef = NAN}, {"entropy_coef is", "expected"}},
    {{.struct_size = sizeof(esp_objective), .sapo_temperature_neg = -1}, {"sapo_temperature_neg", "expected"}},
    {{.struct_size = sizeof(esp_objective), .vespo_lambda_pos = -1}, {"vespo_lambda_pos", "expected"}},
    {{.struct_size = sizeof(esp_objective), .off_policy_mask_threshold = -1}, {"off_policy_mask_threshold", "expected"}},
    {{.struct_size = sizeof(esp_objective), .max_completion_length = -1}, {"max_completion_length", "expected"}},
    {{.struct_size = sizeof(esp_objective), .loss = ESP_LOSS_SAPO, .delta = 2}, {"delta 2", "sapo"}},
    {{.struct_size = sizeof(esp_objective), .loss = ESP_LOSS_CISPO, .epsilon_high = 0.28f}, {"cispo", "epsilon_high"}},
    {{.struct_size = sizeof(esp_objective), .loss = ESP_LOSS_VESPO, .level = ESP_IS_SEQUENCE}, {"vespo", "level sequence"}},
    {{.struct_size = sizeof(esp_objective), .kl_bias_correction = true}, {"kl_bias_correction", "beta"}},
};

Test(objective, contradictions_are_refused_by_name) {
    for (size_t i = 0; i < sizeof contradictions / sizeof contradictions[0]; i++) {
        espi_objective o;
        cr_expect_eq(espi_objective_make(&o, &contradictions[i].options), ESP_ERR_ARG, "case %zu is accepted", i);
        for (int w = 0; w < 2; w++)
            cr_expect(strstr(esp_last_error(), contradictions[i].words[w]), "case %zu: \"%s\" does not say \"%s\"", i, esp_last_error(),
                      contradictions[i].words[w]);
    }
}

static esp_status call(const esp_objective *o, const sample *s, const double *old, const double *ref, const double *entropy,
                       const double *advantage, double step_seqs) {
    double g[TOKENS], e[TOKENS];
    return esp_objective_coefficients(o, SEQS, cu, s->lp, old, ref, NULL, entropy, advantage, 0, step_seqs, g, e, NULL);
}

Test(objective, missing_inputs_are_refused_by_name) {
    const sample s = make_sample(1);
    const esp_objective kl = ESP_OBJECTIVE(.beta = 0.1f), bonus = ESP_OBJECTIVE(.entropy_coef = 0.1f),
                        constant = ESP_OBJECTIVE(.loss = ESP_LOSS_DR_GRPO);
    cr_expect_eq(call(NULL, &s, NULL, NULL, NULL, NULL, 0), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "advantage"), "%s", esp_last_error());
    cr_expect_eq(call(&kl, &s, NULL, NULL, NULL, s.advantage, 0), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "beta") && strstr(esp_last_error(), "ref_logprob"), "%s", esp_last_error());
    cr_expect_eq(call(&bonus, &s, NULL, NULL, NULL, s.advantage, 0), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "entropy_coef"), "%s", esp_last_error());
    cr_expect_eq(call(&constant, &s, NULL, NULL, NULL, s.advantage, 8), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "dr_grpo") && strstr(esp_last_error(), "max_completion_length"), "%s", esp_last_error());
    cr_expect_eq(call(NULL, &s, NULL, NULL, NULL, s.advantage, NAN), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "step_seqs"), "%s", esp_last_error());
}

Test(objective, values_that_are_not_finite_are_refused_with_their_sequence) {
    const esp_objective o = ESP_OBJECTIVE(.beta = 0.1f, .entropy_coef = 0.1f);
    const double bad[] = {NAN, INFINITY, -INFINITY};
    for (int b = 0; b < 3; b++)
        for (int field = 0; field < 6; field++) {
            sample s = make_sample(1);
            double *const fields[] = {s.lp + 10, s.old + 10, s.ref + 10, s.is_ratio + 10, s.entropy + 10, s.advantage + 3};
            *fields[field] = bad[b];
            double g[TOKENS], e[TOKENS];
            cr_expect_eq(esp_objective_coefficients(&o, SEQS, cu, s.lp, s.old, s.ref, s.is_ratio, s.entropy, s.advantage, 0, 0, g, e, NULL),
                         ESP_ERR_NONFINITE, "field %d with %g is accepted", field, bad[b]);
            cr_expect(strstr(esp_last_error(), "sequence 3"), "field %d: %s", field, esp_last_error());
        }
}

Test(objective, names_go_both_ways) {
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++) {
        esp_loss_type parsed;
        cr_expect_eq(esp_loss_type_parse(&parsed, esp_loss_type_name((esp_loss_type)loss)), ESP_OK, "%s", esp_last_error());
        cr_expect_eq(parsed, (esp_loss_type)loss);
    }
    esp_loss_type parsed;
    cr_expect_eq(esp_loss_type_parse(&parsed, "ppo"), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "ppo") && strstr(esp_last_error(), "dapo"), "%s", esp_last_error());
    cr_expect_str_eq(esp_loss_type_name(ESP_LOSS_DEFAULT), "dapo");
    cr_expect_str_eq(esp_loss_type_name((esp_loss_type)99), "?");
}
