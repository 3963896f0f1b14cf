/* Backward of block.  Twin: forward/block.c. */
#include "contract/block.h"
#include "contract/exchange.h"

esp_status espi_moe_backward(espi_pass *pass, int64_t layer, void *d_x, const void *d_out, const void *x, const espi_router *router,
                             const espi_experts *experts, const espi_moe_saved *saved) {
    const espi_routing *routing = &saved->route.routing;
    const int64_t slots = pass->tokens * router->top_k, hidden = experts->down.rows;
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *d_rows, *d_row_weight, *d_weight;
    ESPI_TRY(espi_take_act(pass, slots * hidden, &d_rows));
    ESPI_TRY(espi_take_real(pass, slots, &d_row_weight));
    ESPI_TRY(espi_take_real(pass, slots, &d_weight));
    ESPI_TRY(espi_share_travels(&pass->model->share)
                 ? espi_exchange_backward(pass, layer, d_rows, d_row_weight, d_out, x, experts, routing, &saved->experts)
                 : espi_experts_backward(pass, d_rows, d_row_weight, d_out, x, experts, routing, &saved->experts));
    ESPI_TRY(espi_combine_backward(pass, d_x, d_weight, d_rows, d_row_weight, routing, hidden));
    ESPI_TRY(espi_route_backward(pass, layer, d_x, d_weight, x, router, &saved->route));
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}

/* d_x real [T,H]: overwrite, or add when accumulate (the shared expert comes after the routed ones). */
static esp_status mlp_backward(espi_pass *pass, const espi_linear *gate_up, const espi_linear *down, void *d_x, bool accumulate,
                               const void *d_out, const espi_block_saved *saved) {
    const int64_t t = pass->tokens, width = down->w.cols;
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *act, *d_act, *d_gu;
    ESPI_TRY(espi_take_act(pass, t * width, &act));
    ESPI_TRY(espi_take_act(pass, t * width, &d_act));
    ESPI_TRY(espi_take_act(pass, t * 2 * width, &d_gu));
    const espi_swiglu_fwd again = {.act = act, .gu = saved->mlp_gu, .rows = t, .width = width};
    ESPI_TRY(espi_op_swiglu_fwd(pass->ctx, pass->arena, &again));
    ESPI_TRY(espi_linear_backward(pass, d_act, false, d_out, act, saved->u_mlp_dn, down));
    const espi_swiglu_bwd swiglu = {.d_gu = d_gu, .d_act = d_act, .gu = saved->mlp_gu, .rows = t, .width = width};
    ESPI_TRY(espi_op_swiglu_bwd(pass->ctx, pass->arena, &swiglu));
    ESPI_TRY(espi_linear_backward(pass, d_x, accumulate, d_gu, saved->norm2, saved->u_mlp_gu, gate_up));
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}

esp_status espi_block_backward(espi_pass *pass, int64_t layer, void *d, const void *x, const espi_block_saved *saved, bool to_input) {
    const espi_layer *w = &pass->model->layers[layer];
    const int64_t t = pass->tokens, hidden = pass->model->config.hidden;
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *d_norm;
    ESPI_TRY(espi_take_act(pass, t * hidden, &d_norm));
    if (w->mlp == ESPI_MLP_DENSE) {
        ESPI_TRY(mlp_backward(pass, &w->mlp_gate_up, &w->mlp_down, d_norm, false, d, saved));
    } else {
        const espi_router router = espi_layer_router(pass, layer);
        const espi_experts experts = espi_layer_experts(pass, layer);
        ESPI_TRY(espi_moe_backward(pass, layer, d_norm, d, saved->norm2, &router, &experts, &saved->moe));
        if (w->shared_down.w.rows) ESPI_TRY(mlp_backward(pass, &w->shared_gate_up, &w->shared_down, d_norm, true, d, saved));
    }
    espi_probe(pass, "d_norm2", layer, d_norm, t, hidden);
    ESPI_TRY(espi_norm_backward(pass, d, d_norm, d, saved->h1, saved->rstd2, w->norm2, t, hidden));
    espi_probe(pass, "d_h1", layer, d, t, hidden);
    ESPI_TRY(espi_attention_backward(pass, layer, to_input ? d_norm : NULL, d, saved->norm1, &saved->attention));
    if (to_input) {
        espi_probe(pass, "d_norm1", layer, d_norm, t, hidden);
        ESPI_TRY(espi_norm_backward(pass, d, d_norm, d, x, saved->rstd1, w->norm1, t, hidden));
        espi_probe(pass, "d_h", layer, d, t, hidden);
    }
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}
