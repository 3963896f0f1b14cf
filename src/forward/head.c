/* Forward of head.  Twin: backward/head.c. */
#include "contract/head.h"

#include "core/select.h"
#include "models/model.h"

int64_t espi_head_count_rows(const esp_batch *batch) {
    if (!batch->loss_mask) return batch->n_tokens - batch->n_seqs;
    int64_t n = 0;
    for (int64_t t = 0; t < batch->n_tokens; t++) n += batch->loss_mask[t] != 0;
    return n;
}

/* row and target: the host's side of them. */
static esp_status fill_rows(const espi_head_rows *rows, int32_t *row, int32_t *target, const esp_batch *batch) {
    int32_t i = 0;
    for (int32_t s = 0; s < batch->n_seqs; s++) {
        const int32_t begin = batch->cu_seqlens[s];
        rows->cu[s] = i;
        if (batch->loss_mask && batch->loss_mask[begin])
            return ESPI_FAIL(ESP_ERR_ARG,
                             "loss_mask[%d]: got 1 at the first token of sequence %d, expected 0: nothing stands before it to predict it",
                             begin, s);
        for (int32_t t = begin + 1; t < batch->cu_seqlens[s + 1]; t++) {
            if (batch->loss_mask && !batch->loss_mask[t]) continue;
            row[i] = t - 1;
            rows->token[i] = t;
            target[i] = batch->tokens[t];
            i++;
        }
    }
    rows->cu[batch->n_seqs] = i;
    return ESP_OK;
}

esp_status espi_head_rows_make(espi_head_rows *rows, const esp_model *model, espi_arena *arena, const esp_batch *batch) {
    const int64_t n = arena->dry ? batch->n_tokens - batch->n_seqs : espi_head_count_rows(batch);
    const size_t ints = (size_t)n * sizeof(int32_t), reals = (size_t)n * model->ctx->real_size;
    int32_t *row, *target;
    *rows = (espi_head_rows){.n = n};
    ESPI_TRY(espi_arena_take_shared(arena, ints, &row, &rows->row));
    ESPI_TRY(espi_arena_take_shared(arena, ints, &target, &rows->target));
    ESPI_TRY(espi_arena_take_host(arena, ints, &rows->token));
    ESPI_TRY(espi_arena_take_host(arena, ((size_t)batch->n_seqs + 1) * sizeof(int32_t), &rows->cu));
    ESPI_TRY(espi_arena_take_shared(arena, reals, &rows->host.lp, &rows->lp));
    ESPI_TRY(espi_arena_take_shared(arena, reals, &rows->host.entropy, &rows->entropy));
    ESPI_TRY(espi_arena_take(arena, reals, &rows->lse));
    ESPI_TRY(espi_arena_take_shared(arena, reals, &rows->host.g, &rows->g));
    ESPI_TRY(espi_arena_take_shared(arena, reals, &rows->host.e, &rows->e));
    if (arena->dry) return ESP_OK;
    ESPI_TRY(fill_rows(rows, row, target, batch));
    ESPI_TRY(espi_ctx_put(model->ctx, rows->row, row, ints));
    return espi_ctx_put(model->ctx, rows->target, target, ints);
}

esp_status espi_head_read(esp_model *model, espi_arena *arena, const espi_head_rows *rows) {
    const size_t reals = (size_t)rows->n * model->ctx->real_size;
    if (arena->dry) return ESP_OK;
    ESPI_TRY(espi_ctx_get(model->ctx, rows->host.lp, rows->lp, reals));
    return espi_ctx_get(model->ctx, rows->host.entropy, rows->entropy, reals);
}

espi_head espi_head_describe(const esp_model *model, const espi_head_rows *rows, const void *hidden, double temperature) {
    return (espi_head){.hidden = hidden,
                       .rows = rows->row,
                       .target = rows->target,
                       .w = model->head,
                       .n = rows->n,
                       .temperature = temperature,
                       .logit_scale = 1.0};
}

esp_status espi_head_logprob(esp_model *model, espi_arena *arena, const espi_head_rows *rows, const void *hidden, double temperature) {
    const espi_head_stats args = {
        .head = espi_head_describe(model, rows, hidden, temperature), .lp = rows->lp, .entropy = rows->entropy, .lse = rows->lse};
    return espi_op_head_stats(model->ctx, arena, &args);
}

enum { LOGIT_ROWS = 32 }; /* of one call: what stands in working memory at a time */

esp_status espi_head_full_logits(esp_model *model, espi_arena *arena, float *logits, const void *hidden, int64_t tokens) {
    const int64_t v = model->config.vocab, step = tokens < LOGIT_ROWS ? tokens : LOGIT_ROWS;
    const size_t real = model->ctx->real_size;
    int32_t *rows, *d_rows;
    void *values, *d_values;
    ESPI_TRY(espi_arena_take_shared(arena, (size_t)step * sizeof *rows, &rows, &d_rows));
    ESPI_TRY(espi_arena_take_shared(arena, (size_t)(step * v) * real, &values, &d_values));
    for (int64_t t = 0; t < tokens; t += step) {
        const int64_t n = tokens - t < step ? tokens - t : step;
        const espi_head_rows described = {.n = n, .row = d_rows};
        for (int64_t i = 0; i < n && !arena->dry; i++) rows[i] = (int32_t)(t + i);
        if (!arena->dry) ESPI_TRY(espi_ctx_put(model->ctx, d_rows, rows, (size_t)n * sizeof *rows));
        const espi_head_logits args = {.head = espi_head_describe(model, &described, hidden, 1.0), .logits = d_values};
        ESPI_TRY(espi_op_head_logits(model->ctx, arena, &args));
        if (arena->dry) break;
        ESPI_TRY(espi_ctx_get(model->ctx, values, d_values, (size_t)(n * v) * real));
        for (int64_t j = 0; j < n * v; j++) logits[t * v + j] = (float)espi_real_get(values, j, model->ctx->real);
    }
    return ESP_OK;
}
