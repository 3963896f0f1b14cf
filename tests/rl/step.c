/* GRPO on a whole model: the loss's gradient by the adapter, micro-batches, and a step in the right direction. */
#include "contract/head.h"
#include "espalier/espalier.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MODEL ESP_SOURCE_DIR "/tests/golden/data/q3a/model"

enum { TOKENS = 20, SEQS = 4 };
static const int32_t ids[TOKENS] = {5, 17, 159, 3, 88, 42, 7, 7, 120, 64, 31, 2, 99, 140, 55, 13, 77, 150, 1, 30};
static const int32_t cu[SEQS + 1] = {0, 6, 10, 16, 20}; /* halves of 10 tokens in 2 sequences */
static const uint8_t mask[TOKENS] = {0, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 1, 1};
static const float advantage[SEQS] = {0.9f, -0.6f, -1.1f, 0.7f};

typedef struct subject {
    esp_ctx *ctx;
    esp_model *model;
    float old[TOKENS], ref[TOKENS];
} subject;

static esp_batch batch_of(const subject *s, const esp_objective *o, int32_t first_seq, int32_t n_seqs, const int32_t *borders) {
    const int32_t first = cu[first_seq];
    return ESP_BATCH(.tokens = ids + first, .cu_seqlens = borders, .n_tokens = borders[n_seqs], .n_seqs = n_seqs, .loss_mask = mask + first,
                     .advantage = advantage + first_seq, .old_logprob = s->old + first, .ref_logprob = s->ref + first, .step_tokens = 12,
                     .step_seqs = SEQS, .objective = o);
}

static void logprobs(subject *s, float lp[TOKENS]) {
    const esp_batch batch = batch_of(s, NULL, 0, SEQS, cu);
    esp_tensor hidden;
    cr_assert_eq(esp_model_forward_only(s->model, &batch, &hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_logprob(s->model, &batch, &hidden, 1, lp, NULL), ESP_OK, "%s", esp_last_error());
}

/* B is not zero, and old and ref lie beside the current policy. */
static void make(subject *s, const char *backend) {
    *s = (subject){.ctx = NULL};
    cr_assert_eq(esp_ctx_create(&s->ctx, &ESP_CTX_CONFIG(.backend = backend)), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_load(&s->model, s->ctx, MODEL, &ESP_MODEL_CONFIG(.lora_rank = 3)), ESP_OK, "%s", esp_last_error());
    for (int64_t i = 0; i < esp_model_param_count(s->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        cr_assert_eq(esp_model_param_get(s->model, i, &p), ESP_OK, "%s", esp_last_error());
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        for (int64_t j = 0; j < esp_tensor_count(&view) && strstr(p.name, "lora_B"); j++)
            espi_real_set(p.data, j, 0.05 * sin(1 + 0.7 * (double)j + (double)i), p.dtype);
    }
    float lp[TOKENS];
    logprobs(s, lp);
    for (int t = 0; t < TOKENS; t++) {
        s->old[t] = lp[t] + 0.3f * sinf(2 + 3.1f * (float)t);
        s->ref[t] = lp[t] + 0.5f * sinf(1 + 1.7f * (float)t);
    }
}

static void drop(subject *s) {
    esp_model_destroy(s->model);
    esp_ctx_destroy(s->ctx);
}

static double loss_of(subject *s, const esp_batch *batch, bool train) {
    esp_tensor hidden, d_hidden;
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    cr_assert_eq(esp_model_forward(s->model, batch, &hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_grpo_loss(s->model, batch, &hidden, &d_hidden, &stats), ESP_OK, "%s", esp_last_error());
    if (train) cr_assert_eq(esp_model_backward(s->model, batch, &d_hidden), ESP_OK, "%s", esp_last_error());
    return stats.loss;
}

/* All gradients in one row, and how many. */
static double *gradients(subject *s, int64_t *count) {
    *count = 0;
    double *all = NULL;
    for (int64_t i = 0; i < esp_model_param_count(s->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        cr_assert_eq(esp_model_param_get(s->model, i, &p), ESP_OK, "%s", esp_last_error());
        const esp_tensor view = esp_tensor_view(p.grad, p.dtype, p.rank, p.dims);
        const int64_t n = esp_tensor_count(&view);
        all = realloc(all, (size_t)(*count + n) * sizeof *all);
        cr_assert_not_null(all);
        for (int64_t j = 0; j < n; j++) all[*count + j] = espi_real_get(p.grad, j, p.dtype);
        *count += n;
    }
    cr_assert_eq(esp_model_zero_grad(s->model), ESP_OK, "%s", esp_last_error());
    return all;
}

static esp_objective rows_of(int loss) {
    return ESP_OBJECTIVE(.loss = (esp_loss_type)loss, .level = loss == ESP_LOSS_DR_GRPO ? ESP_IS_SEQUENCE : ESP_IS_TOKEN, .beta = 0.2f,
                         .kl_grad = ESP_KL_GRAD_K3, .entropy_coef = 0.02f, .max_completion_length = 6);
}

/* The whole adapter goes `distance` along a fixed direction. */
static void move(subject *s, double distance) {
    int64_t at = 0;
    for (int64_t i = 0; i < esp_model_param_count(s->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        cr_assert_eq(esp_model_param_get(s->model, i, &p), ESP_OK, "%s", esp_last_error());
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        for (int64_t j = 0; j < esp_tensor_count(&view); j++, at++) ((double *)p.data)[j] += distance * cos(0.3 * (double)at);
    }
}

Test(step, gradient_of_the_adapter_by_differences) {
    static const int losses[] = {ESP_LOSS_GRPO, ESP_LOSS_DR_GRPO, ESP_LOSS_SAPO, ESP_LOSS_LUSPO};
    const double h = 1e-5;
    subject s;
    make(&s, "ref64");
    for (size_t l = 0; l < sizeof losses / sizeof losses[0]; l++) {
        const esp_objective o = rows_of(losses[l]);
        const esp_batch batch = batch_of(&s, &o, 0, SEQS, cu);
        int64_t n;
        loss_of(&s, &batch, true);
        double *g = gradients(&s, &n), slope = 0, norm = 0;
        move(&s, h);
        const double above = loss_of(&s, &batch, false);
        move(&s, -2 * h);
        const double below = loss_of(&s, &batch, false);
        move(&s, h);
        for (int64_t j = 0; j < n; j++) {
            slope += g[j] * cos(0.3 * (double)j);
            norm += g[j] * g[j];
        }
        const double quotient = (above - below) / (2 * h);
        cr_expect(fabs(quotient - slope) <= 1e-7 * sqrt(norm) && fabs(slope) > 1e-3 * sqrt(norm), "%s: %.12g, quotient %.12g, norm %.3g",
                  esp_loss_type_name(o.loss), slope, quotient, sqrt(norm));
        free(g);
    }
    drop(&s);
}

static void check_micro_batches(const char *backend, double tolerance) {
    subject s;
    make(&s, backend);
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++) {
        const esp_objective o = rows_of(loss);
        const esp_batch whole = batch_of(&s, &o, 0, SEQS, cu);
        const int32_t halves[2][3] = {{0, 6, 10}, {0, 6, 10}};
        int64_t n;
        const double loss_whole = loss_of(&s, &whole, true);
        double *g = gradients(&s, &n), sum = 0, worst = 0, largest = 0;
        for (int half = 0; half < 2; half++) {
            const esp_batch part = batch_of(&s, &o, half * 2, 2, halves[half]);
            sum += loss_of(&s, &part, true);
        }
        double *parts = gradients(&s, &n);
        for (int64_t j = 0; j < n; j++) {
            const double error = fabs(parts[j] - g[j]);
            if (!(error <= worst)) worst = error;
            largest = fmax(largest, fabs(g[j]));
        }
        cr_expect(worst <= tolerance * largest && largest > 0, "%s on %s: gradients differ by %.3g of %.3g", esp_loss_type_name(o.loss),
                  backend, worst, largest);
        cr_expect(fabs(sum - loss_whole) <= tolerance * fmax(1, fabs(loss_whole)), "%s: losses add up to %.9g, whole %.9g",
                  esp_loss_type_name(o.loss), sum, loss_whole);
        free(g);
        free(parts);
    }
    drop(&s);
}

/* Only the order of sums differs. */
Test(step, micro_batches_give_the_gradient_of_the_whole) {
    check_micro_batches("ref64", 1e-13);
    check_micro_batches("auto", 1e-5);
}

Test(step, rewarded_sequences_become_likelier) {
    subject s;
    esp_optim *optim;
    float before[TOKENS], after[TOKENS];
    make(&s, "auto");
    logprobs(&s, before);
    cr_assert_eq(esp_adamw_create(&optim, s.model, &ESP_ADAMW_CONFIG(.lr = 1e-3f)), ESP_OK, "%s", esp_last_error());
    esp_batch batch = batch_of(&s, NULL, 0, SEQS, cu);
    batch.old_logprob = NULL;
    loss_of(&s, &batch, true);
    cr_assert_eq(esp_optim_step(optim), ESP_OK, "%s", esp_last_error());
    logprobs(&s, after);
    for (int i = 0; i < SEQS; i++) {
        double moved = 0;
        for (int t = cu[i]; t < cu[i + 1]; t++) moved += (double)(after[t] - before[t]);
        cr_expect(moved * (double)advantage[i] > 0, "sequence %d with advantage %g moved by %g", i, (double)advantage[i], moved);
    }
    esp_optim_destroy(optim);
    drop(&s);
}

/* A rank without a micro-batch makes the same calls with nothing in them. */
Test(step, an_empty_batch_has_no_loss) {
    subject s;
    make(&s, "auto");
    for (int loss = ESP_LOSS_GRPO; loss <= ESP_LOSS_VESPO; loss++) {
        const esp_objective o = rows_of(loss);
        const esp_batch batch = ESP_BATCH(.step_tokens = 12, .step_seqs = SEQS, .objective = &o);
        esp_tensor hidden, d_hidden;
        esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
        double ce = 1;
        cr_assert_eq(esp_model_forward(s.model, &batch, &hidden), ESP_OK, "%s", esp_last_error());
        cr_assert_eq(esp_model_cross_entropy(s.model, &batch, &hidden, &ce, &d_hidden), ESP_OK, "%s", esp_last_error());
        cr_assert_eq(esp_grpo_loss(s.model, &batch, &hidden, &d_hidden, &stats), ESP_OK, "%s", esp_last_error());
        cr_assert_eq(esp_model_backward(s.model, &batch, &d_hidden), ESP_OK, "%s", esp_last_error());
        const double all[] = {ce, stats.loss, stats.policy_loss, stats.kl, stats.entropy, stats.ratio_mean, stats.mean_abs_g};
        for (size_t i = 0; i < sizeof all / sizeof all[0]; i++)
            cr_expect(all[i] == 0, "%s: number %zu is %g", esp_loss_type_name(o.loss), i, all[i]);
        cr_expect_eq(stats.tokens, 0);
        int64_t n;
        double *g = gradients(&s, &n);
        for (int64_t j = 0; j < n; j++) cr_assert(g[j] == 0, "gradient %lld is %g", (long long)j, g[j]);
        free(g);
    }
    drop(&s);
}
