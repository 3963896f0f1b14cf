/* Backward of head: the loss and its gradient by the hidden states.  Twin: forward/head.c. */
#include "contract/head.h"

#include "core/select.h"
#include "models/model.h"

/* The op knows of chunks of rows only; the caller's function wants the rows too. */
typedef struct coef_call {
    espi_head_coef coef;
    void *user;
    const espi_head_rows *rows;
} coef_call;

static esp_status call_coef(void *user, int64_t first, int64_t count) {
    const coef_call *c = user;
    return c->coef(c->user, c->rows, first, count);
}

/* The gradients of the hidden states that several rows name. */
static esp_status add_shared(esp_model *model, espi_arena *arena, const espi_head_rows *rows, void *d_hidden, int64_t tokens) {
    const int64_t hidden = model->config.hidden;
    const espi_rows_add args = {.out = d_hidden,
                                .x = (const char *)d_hidden + (size_t)(tokens * hidden) * model->ctx->act_size,
                                .to = rows->shared_row,
                                .n = rows->shared,
                                .hidden = hidden};
    return rows->shared ? espi_op_rows_add(model->ctx, arena, &args) : ESP_OK;
}

esp_status espi_head_loss(esp_model *model, espi_arena *arena, const espi_head_rows *rows, const void *hidden, void *d_hidden,
                          int64_t tokens, double temperature, bool row_local, espi_head_coef coef, void *user) {
    const espi_head head = espi_head_describe(model, rows, hidden, temperature);
    const espi_zero zero = {.out = d_hidden, .bytes = (size_t)(tokens * model->config.hidden) * model->ctx->act_size};
    ESPI_TRY(espi_op_zero(model->ctx, arena, &zero));
    if (row_local) {
        coef_call call = {.coef = coef, .user = user, .rows = rows};
        const espi_head_fused fused = {.head = head,
                                       .lp = rows->lp,
                                       .entropy = rows->entropy,
                                       .lse = rows->lse,
                                       .g = rows->g,
                                       .e = rows->e,
                                       .d_hidden = d_hidden,
                                       .coef = coef ? call_coef : NULL,
                                       .coef_user = &call,
                                       .e_is_zero = rows->e_is_zero,
                                       .host = rows->host};
        ESPI_TRY(espi_op_head_fused(model->ctx, arena, &fused));
        ESPI_TRY(add_shared(model, arena, rows, d_hidden, tokens));
        /* The caller's function runs from the device's queue: it and what it reads must outlive this call. */
        return arena->dry || !coef ? ESP_OK : espi_ctx_wait(model->ctx);
    }
    ESPI_TRY(espi_head_logprob(model, arena, rows, hidden, temperature));
    ESPI_TRY(espi_head_read(model, arena, rows));
    if (!arena->dry) {
        const size_t reals = (size_t)rows->n * model->ctx->real_size;
        ESPI_TRY(coef(user, rows, 0, rows->n));
        ESPI_TRY(espi_ctx_put(model->ctx, rows->g, rows->host.g, reals));
        ESPI_TRY(espi_ctx_put(model->ctx, rows->e, rows->host.e, reals));
    }
    const espi_head_grad grad = {
        .head = head, .d_hidden = d_hidden, .g = rows->g, .e = rows->e, .lse = rows->lse, .entropy = rows->entropy};
    ESPI_TRY(espi_op_head_grad(model->ctx, arena, &grad));
    return add_shared(model, arena, rows, d_hidden, tokens);
}
