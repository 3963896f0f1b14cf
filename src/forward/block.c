/* Forward of block.  Twin: backward/block.c. */
#include "contract/block.h"
#include "contract/exchange.h"

espi_router espi_layer_router(const espi_pass *pass, int64_t layer) {
    const espi_layer *w = &pass->model->layers[layer];
    const espi_config *c = &pass->model->config;
    return (espi_router){.w = w->router,
                         .d_w = w->d_router,
                         .top_k = c->top_k,
                         .bias = w->router_bias,
                         .correction = w->router_correction,
                         .rule = {.renormalise = c->renormalise, .sigmoid = c->router_sigmoid, .scaling = c->router_scaling}};
}

espi_experts espi_layer_experts(const espi_pass *pass, int64_t layer) {
    const espi_layer *w = &pass->model->layers[layer];
    return (espi_experts){.gate_up = w->gate_up,
                          .down = w->down,
                          .gate_up_bias = w->gate_up_bias,
                          .down_bias = w->down_bias,
                          .lora_gate_up = w->lora_gate_up,
                          .lora_down = w->lora_down,
                          .glu = pass->model->config.glu};
}

esp_status espi_block_take_lasting(espi_pass *pass, int64_t layer, espi_block_saved *saved) {
    *saved = (espi_block_saved){0};
    if (pass->model->layers[layer].mlp != ESPI_MLP_MOE) return ESP_OK;
    const espi_router router = espi_layer_router(pass, layer);
    const espi_experts experts = espi_layer_experts(pass, layer);
    ESPI_TRY(espi_route_take_saved(pass, layer, &router, &saved->moe.route));
    return espi_experts_take_lasting(pass, &experts, router.top_k, &saved->moe.experts);
}

esp_status espi_moe_forward(espi_pass *pass, int64_t layer, void *out, const void *x, const void *add, const espi_router *router,
                            const espi_experts *experts, const espi_moe_saved *saved, bool replay) {
    const espi_routing *routing = &saved->route.routing;
    const int64_t slots = pass->tokens * router->top_k, hidden = experts->down.rows;
    const bool travels = espi_share_travels(&pass->model->share);
    if (replay)
        return travels ? espi_exchange_forward(pass, layer, NULL, x, experts, routing, &saved->experts, true)
                       : espi_experts_forward(pass, layer, NULL, x, experts, routing, &saved->experts, true);
    ESPI_TRY(espi_route_forward(pass, layer, x, router, &saved->route));
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *y;
    ESPI_TRY(espi_take_act(pass, slots * hidden, &y));
    ESPI_TRY(travels ? espi_exchange_forward(pass, layer, y, x, experts, routing, &saved->experts, false)
                     : espi_experts_forward(pass, layer, y, x, experts, routing, &saved->experts, false));
    if (pass->model->probe) {
        void *alone; /* the block's output without the residual exists for the probe only */
        ESPI_TRY(espi_take_act(pass, pass->tokens * hidden, &alone));
        ESPI_TRY(espi_combine_forward(pass, alone, y, NULL, routing, hidden));
        espi_probe(pass, "moe_out", layer, alone, pass->tokens, hidden);
    }
    ESPI_TRY(espi_combine_forward(pass, out, y, add, routing, hidden));
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}

/* The SwiGLU MLP of a dense layer, or the shared expert of a MoE layer: out = add + MLP(norm2); out may be add.  replay: out is not made. */
static esp_status mlp_forward(espi_pass *pass, const espi_linear *gate_up, const espi_linear *down, void *out, const void *add,
                              espi_block_saved *saved, bool replay) {
    const int64_t t = pass->tokens, width = down->w.cols;
    ESPI_TRY(espi_take_act(pass, t * 2 * width, &saved->mlp_gu));
    ESPI_TRY(espi_linear_take_saved(pass, gate_up, &saved->u_mlp_gu));
    ESPI_TRY(espi_linear_take_saved(pass, down, &saved->u_mlp_dn));
    ESPI_TRY(espi_linear_forward(pass, saved->mlp_gu, saved->u_mlp_gu, saved->norm2, gate_up));
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *act, *y;
    ESPI_TRY(espi_take_act(pass, t * width, &act));
    ESPI_TRY(espi_take_act(pass, t * down->w.rows, &y));
    const espi_swiglu_fwd swiglu = {.act = act, .gu = saved->mlp_gu, .rows = t, .width = width};
    ESPI_TRY(espi_op_swiglu_fwd(pass->ctx, pass->arena, &swiglu));
    ESPI_TRY(espi_linear_forward(pass, y, saved->u_mlp_dn, act, down));
    const espi_add sum = {.out = out, .a = add, .b = y, .n = t * down->w.rows};
    if (!replay) ESPI_TRY(espi_op_add(pass->ctx, pass->arena, &sum));
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}

esp_status espi_block_forward(espi_pass *pass, int64_t layer, void *out, const void *x, espi_block_saved *saved, bool replay) {
    const espi_layer *w = &pass->model->layers[layer];
    const int64_t t = pass->tokens, hidden = pass->model->config.hidden;
    ESPI_TRY(espi_take_act(pass, t * hidden, &saved->norm1));
    ESPI_TRY(espi_take_real(pass, t, &saved->rstd1));
    ESPI_TRY(espi_take_act(pass, t * hidden, &saved->h1));
    ESPI_TRY(espi_take_act(pass, t * hidden, &saved->norm2));
    ESPI_TRY(espi_take_real(pass, t, &saved->rstd2));

    espi_probe(pass, "h", layer, x, t, hidden);
    ESPI_TRY(espi_norm_forward(pass, saved->norm1, saved->rstd1, x, w->norm1, t, hidden));
    espi_probe(pass, "norm1", layer, saved->norm1, t, hidden);
    ESPI_TRY(espi_attention_forward(pass, layer, saved->h1, saved->norm1, &saved->attention));
    const espi_add add = {.out = saved->h1, .a = x, .b = saved->h1, .n = t * hidden};
    ESPI_TRY(espi_op_add(pass->ctx, pass->arena, &add));
    espi_probe(pass, "h1", layer, saved->h1, t, hidden);
    ESPI_TRY(espi_norm_forward(pass, saved->norm2, saved->rstd2, saved->h1, w->norm2, t, hidden));
    espi_probe(pass, "norm2", layer, saved->norm2, t, hidden);
    if (w->mlp == ESPI_MLP_DENSE) return mlp_forward(pass, &w->mlp_gate_up, &w->mlp_down, out, saved->h1, saved, replay);
    const espi_router router = espi_layer_router(pass, layer);
    const espi_experts experts = espi_layer_experts(pass, layer);
    ESPI_TRY(espi_experts_take_saved(pass, &experts, router.top_k, &saved->moe.experts));
    ESPI_TRY(espi_moe_forward(pass, layer, out, saved->norm2, saved->h1, &router, &experts, &saved->moe, replay));
    return w->shared_down.w.rows ? mlp_forward(pass, &w->shared_gate_up, &w->shared_down, out, out, saved, replay) : ESP_OK;
}
