/* Forward of exchange.  Twin: backward/exchange.c. */
#include "contract/exchange.h"

#include <string.h>

esp_status espi_arrivals_take(espi_pass *pass, espi_arrivals *a, int64_t top_k) {
    const espi_share *share = &pass->model->share;
    const size_t size = sizeof(int32_t);
    *a = (espi_arrivals){.capacity = espi_share_capacity(share, pass->tokens, top_k)};
    int32_t *ascending, *d_ascending;
    ESPI_TRY(espi_arena_take_shared(pass->arena, (size_t)(share->spread * (share->count + 1)) * size, &a->offsets, &a->d_offsets));
    ESPI_TRY(espi_arena_take_shared(pass->arena, (size_t)a->capacity * size, &ascending, &d_ascending));
    ESPI_TRY(espi_round_take(&a->round, share, pass->arena));
    a->ascending = d_ascending;
    if (pass->arena->dry) return ESP_OK;
    for (int64_t i = 0; i < a->capacity; i++) ascending[i] = (int32_t)i;
    return espi_ctx_put(pass->ctx, d_ascending, ascending, (size_t)a->capacity * size);
}

bool espi_arrivals_next(espi_pass *pass, espi_arrivals *a, esp_status *status) {
    const espi_share *share = &pass->model->share;
    if (*status != ESP_OK || !espi_round_next(&a->round, share)) return false;
    for (int m = 0; m < share->spread; m++) {
        const int32_t *counts = a->round.counts + (espi_share_group(share) + m) * share->experts;
        int32_t *offsets = a->offsets + m * (share->count + 1);
        offsets[0] = 0;
        for (int64_t i = 0; i < share->count; i++) {
            const int64_t e = share->first + i;
            offsets[i + 1] = offsets[i] + (e >= a->round.first[m] && e < a->round.last[m] ? counts[e] : 0);
        }
    }
    *status = espi_ctx_put(pass->ctx, a->d_offsets, a->offsets, (size_t)(share->spread * (share->count + 1)) * sizeof *a->offsets);
    return *status == ESP_OK;
}

espi_routing espi_arrivals_of(const espi_pass *pass, const espi_arrivals *a, int source, int64_t *first) {
    const espi_share *share = &pass->model->share;
    const int rank = espi_share_group(share) + source;
    const bool dry = pass->arena->dry;
    *first = dry ? 0 : a->round.in_at[rank];
    return (espi_routing){.tokens = dry ? a->capacity : a->round.in_rows[rank],
                          .experts = share->count,
                          .top_k = 1,
                          .offsets = dry ? NULL : a->d_offsets + source * (share->count + 1),
                          .row_token = a->ascending,
                          .slot_row = a->ascending,
                          .batch_rows = dry ? 0 : espi_share_batch_rows(share, a->round.counts, source),
                          .batch_experts = dry ? 0 : share->experts};
}

espi_experts_saved espi_arrivals_saved(const espi_pass *pass, const espi_experts *experts, const espi_experts_saved *saved, int64_t first) {
    const size_t size = pass->ctx->act_size;
    return (espi_experts_saved){.gu = espi_row(saved->gu, first, experts->gate_up.rows, size),
                                .u_gu = espi_row(saved->u_gu, first, experts->lora_gate_up.r, size),
                                .u_dn = espi_row(saved->u_dn, first, experts->lora_down.r, size)};
}

esp_status espi_exchange_run(espi_pass *pass, int64_t layer, void *results, const espi_experts *experts, const espi_arrivals *a,
                             const espi_experts_saved *saved, bool replay, const espi_row_array *back) {
    const espi_share *share = &pass->model->share;
    const int64_t hidden = experts->down.rows;
    const bool quiet = pass->quiet; /* what a probe would see here are rows of other ranks */
    esp_status status = ESP_OK;
    pass->quiet = true;
    for (int turn = 0; turn < (pass->arena->dry ? 1 : share->spread) && status == ESP_OK; turn++) {
        const int m = espi_share_turn(share, turn);
        int64_t first;
        const espi_routing routing = espi_arrivals_of(pass, a, m, &first);
        const espi_experts_saved part = espi_arrivals_saved(pass, experts, saved, first);
        if (!pass->arena->dry) status = espi_share_came(pass->ctx, &a->round, m);
        if (status == ESP_OK)
            status = espi_experts_forward(pass, layer, espi_row(results, first, hidden, pass->ctx->act_size),
                                          espi_row(saved->x, first, hidden, pass->ctx->act_size), experts, &routing, &part, replay);
        if (status == ESP_OK && back)
            status = espi_share_return(pass->ctx, share, (espi_place){"results of the experts", layer}, back, 1, &a->round, turn);
    }
    pass->quiet = quiet;
    return status;
}

static esp_status count(espi_pass *pass, int64_t layer, const espi_routing *routing, const espi_experts_saved *saved) {
    const espi_share *share = &pass->model->share;
    const size_t e = (size_t)share->experts;
    const espi_mark mark = espi_arena_mark(pass->arena);
    int32_t *offsets, *mine;
    ESPI_TRY(espi_arena_take_host(pass->arena, (e + 1) * sizeof *offsets, &offsets));
    ESPI_TRY(espi_arena_take_host(pass->arena, e * sizeof *mine, &mine));
    if (pass->routes.counts) {
        const int32_t *known = pass->routes.counts + layer * share->experts;
        for (int64_t r = 0; r < share->ranks; r++)
            memcpy(saved->counts + r * share->experts, known + r * pass->model->config.layers * share->experts, e * sizeof *known);
    } else if (!pass->arena->dry) {
        ESPI_TRY(espi_ctx_get(pass->ctx, offsets, routing->offsets, (e + 1) * sizeof *offsets));
        ESPI_TRY(espi_share_counts(share, layer, saved->counts, offsets, mine));
    }
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}

esp_status espi_exchange_forward(espi_pass *pass, int64_t layer, void *y, const void *x, const espi_experts *experts,
                                 const espi_routing *routing, const espi_experts_saved *saved, bool replay) {
    const espi_share *share = &pass->model->share;
    const int64_t slots = routing->tokens * routing->top_k, hidden = experts->down.rows;
    const size_t row_bytes = (size_t)hidden * pass->ctx->act_size;
    const bool dry = pass->arena->dry;
    const espi_mark mark = espi_arena_mark(pass->arena);
    espi_arrivals a;
    void *rows, *results;
    if (!replay) ESPI_TRY(count(pass, layer, routing, saved));
    ESPI_TRY(espi_arrivals_take(pass, &a, routing->top_k));
    ESPI_TRY(espi_take_act(pass, slots * hidden, &rows));
    ESPI_TRY(espi_take_act(pass, a.capacity * hidden, &results));
    const espi_rows_take take = {.out = rows, .x = x, .from = routing->row_token, .n = slots, .hidden = hidden};
    ESPI_TRY(espi_op_rows_take(pass->ctx, pass->arena, &take));
    if (dry) {
        ESPI_TRY(espi_exchange_run(pass, layer, NULL, experts, &a, saved, replay, NULL));
    } else if (!replay || espi_share_fits(share, saved->counts, a.capacity)) { /* else the backward asks for all of it again */
        esp_status status = ESP_OK;
        espi_round_begin(&a.round, share, saved->counts, a.capacity);
        while (espi_arrivals_next(pass, &a, &status)) {
            const espi_row_array out = {.to = saved->x, .from = rows, .row_bytes = row_bytes};
            const espi_row_array back = {.to = y, .from = results, .row_bytes = row_bytes};
            ESPI_TRY(espi_share_send(pass->ctx, share, (espi_place){"rows to the experts", layer}, &out, 1, &a.round));
            ESPI_TRY(espi_exchange_run(pass, layer, results, experts, &a, saved, replay, replay ? NULL : &back));
            if (!replay) ESPI_TRY(espi_share_returned(pass->ctx, share, &a.round));
        }
        ESPI_TRY(status);
    }
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}
