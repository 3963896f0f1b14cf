/* The GRPO loss on hidden states: rows from the head's contract, coefficients from objective.c, nothing else between them. */
#include "models/passes.h"
#include "rl/objective.h"

#include <math.h>

/* A token-aligned array of the batch, seen by row. */
static espi_scalars by_row(const float *values, const espi_head_rows *rows) {
    return (espi_scalars){values, ESP_F32, rows->token};
}

typedef struct call {
    espi_objective_run run;
    esp_dtype real;
} call;

static esp_status coefficients(void *user, const espi_head_rows *rows, int64_t first, int64_t count) {
    call *c = user;
    return espi_objective_rows(&c->run, first, count, rows->host.g, rows->host.e, c->real);
}

/* NaN says that the sampler gave none. */
static esp_status sampler_difference(esp_grpo_stats *stats, const espi_objective_input *in, const espi_head_rows *rows,
                                     const float *sampler, esp_dtype real) {
    double sum = 0;
    for (int32_t s = 0; s < in->n_seqs; s++)
        for (int32_t i = rows->cu[s]; i < rows->cu[s + 1]; i++) {
            const float given = sampler[rows->token[i]];
            const double difference = fabs((double)given - espi_real_get(rows->host.lp, i, real));
            if (isnan(given)) continue;
            if (!isfinite(difference))
                return ESPI_FAIL(ESP_ERR_NONFINITE,
                                 "batch.sampler_logprob[%d] (sequence %d) is %g, expected a finite number, or NaN: absent",
                                 (int)rows->token[i], (int)s, (double)given);
            sum += difference;
            stats->sampler_tokens++;
            stats->logp_diff_max = fmax(stats->logp_diff_max, difference);
        }
    if (stats->sampler_tokens > 0) stats->logp_diff_mean = sum / (double)stats->sampler_tokens;
    return ESP_OK;
}

static esp_status loss_of_rows(esp_model *model, const esp_batch *batch, const espi_objective *objective, const espi_head_rows *rows,
                               const void *hidden, void *d_hidden, esp_grpo_stats *stats) {
    const esp_dtype real = model->ctx->real;
    const espi_objective_input in = {.n_seqs = rows->n_seqs,
                                     .cu = rows->cu,
                                     .logprob = {rows->host.lp, real, NULL},
                                     .old = by_row(batch->old_logprob, rows),
                                     .ref = by_row(batch->ref_logprob, rows),
                                     .sampler = by_row(batch->sampler_logprob, rows),
                                     .is_ratio = by_row(batch->is_ratio, rows),
                                     .entropy = {rows->host.entropy, real, NULL},
                                     .advantage = {batch->advantage, ESP_F32, rows->seq},
                                     .step_tokens = batch->step_tokens,
                                     .step_seqs = batch->step_seqs};
    call c = {.real = real};
    ESPI_TRY(espi_objective_begin(&c.run, objective, &in));
    const bool row_local = espi_objective_row_local(objective);
    espi_log(model->ctx, ESP_LOG_SELECT, "loss %s: head in %s", espi_objective_name(objective),
             row_local ? "one pass (LH1)" : "two passes (LH2), its tokens are coupled");
    ESPI_TRY(
        espi_head_loss(model, &model->arena, rows, hidden, d_hidden, batch->n_tokens, objective->temperature, row_local, coefficients, &c));
    espi_objective_finish(&c.run, stats);
    return batch->sampler_logprob ? sampler_difference(stats, &in, rows, batch->sampler_logprob, real) : ESP_OK;
}

esp_status esp_grpo_loss(esp_model *model, const esp_batch *batch, const esp_tensor *hidden, esp_tensor *d_hidden, esp_grpo_stats *stats) {
    if (!model || !batch || !d_hidden) return ESPI_FAIL(ESP_ERR_ARG, "esp_grpo_loss: model, batch and d_hidden must not be NULL");
    espi_objective objective;
    ESPI_TRY(espi_objective_make(&objective, batch->objective));
    void *d = NULL;
    ESPI_TRY(espi_loss_begin(model, batch, hidden, &d));
    const espi_mark mark = espi_arena_mark(&model->arena);
    espi_head_rows rows;
    ESPI_TRY(espi_head_rows_make(&rows, model, &model->arena, batch));
    rows.e_is_zero = objective.entropy_coef == 0;
    esp_grpo_stats measured;
    ESPI_TRY(loss_of_rows(model, batch, &objective, &rows, hidden->data, d, &measured));
    espi_arena_release(&model->arena, mark);
    espi_loss_end(model, batch, d, d_hidden);
    return stats ? espi_struct_write(stats, &measured, sizeof measured, "esp_grpo_stats") : ESP_OK;
}
