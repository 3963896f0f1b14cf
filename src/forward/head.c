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

static esp_status fill_rows(espi_head_rows *rows, const esp_batch *batch) {
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
            rows->row[i] = t - 1;
            rows->token[i] = t;
            rows->target[i] = batch->tokens[t];
            i++;
        }
    }
    rows->cu[batch->n_seqs] = i;
    return ESP_OK;
}

esp_status espi_head_rows_make(espi_head_rows *rows, const esp_model *model, espi_arena *arena, const esp_batch *batch) {
    const int64_t n = arena->dry ? batch->n_tokens - batch->n_seqs : espi_head_count_rows(batch);
    const size_t ints = (size_t)n * sizeof(int32_t), reals = (size_t)n * model->ctx->real_size;
    *rows = (espi_head_rows){.n = n};
    ESPI_TRY(espi_arena_take(arena, ints, &rows->row));
    ESPI_TRY(espi_arena_take(arena, ints, &rows->target));
    ESPI_TRY(espi_arena_take(arena, ints, &rows->token));
    ESPI_TRY(espi_arena_take(arena, ((size_t)batch->n_seqs + 1) * sizeof(int32_t), &rows->cu));
    ESPI_TRY(espi_arena_take(arena, reals, &rows->lp));
    ESPI_TRY(espi_arena_take(arena, reals, &rows->entropy));
    ESPI_TRY(espi_arena_take(arena, reals, &rows->lse));
    ESPI_TRY(espi_arena_take(arena, reals, &rows->g));
    ESPI_TRY(espi_arena_take(arena, reals, &rows->e));
    return arena->dry ? ESP_OK : fill_rows(rows, batch);
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

esp_status espi_head_full_logits(esp_model *model, espi_arena *arena, float *logits, const void *hidden, int64_t tokens) {
    const int64_t v = model->config.vocab;
    const bool wide = model->ctx->real == ESP_F64; /* the op writes real values: a row at a time through memory of ours */
    const int64_t step = wide ? 1 : tokens;
    int32_t *rows;
    double *row = NULL;
    ESPI_TRY(espi_arena_take(arena, (size_t)step * sizeof *rows, &rows));
    if (wide) ESPI_TRY(espi_arena_take(arena, (size_t)v * sizeof *row, &row));
    for (int64_t t = 0; t < tokens; t += step) {
        espi_head_rows described = {.n = step, .row = rows};
        for (int64_t i = 0; i < step && !arena->dry; i++) rows[i] = (int32_t)(t + i);
        const espi_head_logits args = {.head = espi_head_describe(model, &described, hidden, 1.0), .logits = wide ? (void *)row : logits};
        ESPI_TRY(espi_op_head_logits(model->ctx, arena, &args));
        if (arena->dry) break;
        for (int64_t j = 0; wide && j < v; j++) logits[t * v + j] = (float)row[j];
    }
    return ESP_OK;
}
