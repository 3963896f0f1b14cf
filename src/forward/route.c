/* Forward of route.  Twin: backward/route.c. */
#include "contract/route.h"

esp_status espi_route_take_saved(espi_pass *pass, const espi_router *router, espi_route_saved *saved) {
    const int64_t t = pass->tokens, e = router->w.rows, slots = t * router->top_k;
    int32_t *offsets, *row_token, *slot_row;
    void *row_weight;
    ESPI_TRY(espi_take_real(pass, t * e, &saved->logits));
    ESPI_TRY(espi_take_real(pass, t, &saved->lse));
    ESPI_TRY(espi_arena_take(pass->arena, (size_t)slots * sizeof(int32_t), &saved->idx));
    ESPI_TRY(espi_take_real(pass, slots, &saved->weight));
    ESPI_TRY(espi_arena_take(pass->arena, (size_t)(e + 1) * sizeof(int32_t), &offsets));
    ESPI_TRY(espi_arena_take(pass->arena, (size_t)slots * sizeof(int32_t), &row_token));
    ESPI_TRY(espi_arena_take(pass->arena, (size_t)slots * sizeof(int32_t), &slot_row));
    ESPI_TRY(espi_take_real(pass, slots, &row_weight));
    saved->routing = (espi_routing){.tokens = t,
                                    .experts = e,
                                    .top_k = router->top_k,
                                    .offsets = offsets,
                                    .row_token = row_token,
                                    .slot_row = slot_row,
                                    .row_weight = row_weight};
    return ESP_OK;
}

esp_status espi_route_forward(espi_pass *pass, int64_t layer, const void *x, const espi_router *router, const espi_route_saved *saved) {
    const espi_routing *r = &saved->routing;
    const espi_router_fwd route = {.logits = saved->logits,
                                   .lse = saved->lse,
                                   .idx = saved->idx,
                                   .weight = saved->weight,
                                   .counts = pass->router_counts,
                                   .p_sum = pass->router_p_sum,
                                   .z_sum = pass->router_z_sum,
                                   .x = x,
                                   .w = router->w,
                                   .bias = router->bias,
                                   .correction = router->correction,
                                   .tokens = pass->tokens,
                                   .top_k = router->top_k,
                                   .rule = router->rule};
    ESPI_TRY(espi_op_router_fwd(pass->ctx, pass->arena, &route));
    /* The routing's arrays are read-only to everybody but this, their writer. */
    const espi_dispatch sort = {.offsets = (int32_t *)r->offsets,
                                .row_token = (int32_t *)r->row_token,
                                .slot_row = (int32_t *)r->slot_row,
                                .row_weight = (void *)r->row_weight,
                                .idx = saved->idx,
                                .weight = saved->weight,
                                .tokens = pass->tokens,
                                .experts = r->experts,
                                .top_k = r->top_k};
    ESPI_TRY(espi_op_dispatch(pass->ctx, pass->arena, &sort));
    espi_probe_real(pass, "router_logits", layer, saved->logits, pass->tokens, r->experts);
    espi_probe_i32(pass, "topk_idx", layer, saved->idx, pass->tokens, r->top_k);
    espi_probe_real(pass, "topk_w", layer, saved->weight, pass->tokens, r->top_k);
    return ESP_OK;
}
