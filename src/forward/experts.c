/* Forward of experts.  Twin: backward/experts.c. */
#include "contract/experts.h"

/* Rows that the experts here see. */
static int64_t rows_of(const espi_pass *pass, int64_t top_k) {
    const espi_share *share = &pass->model->share;
    return espi_share_travels(share) ? espi_share_capacity(share, pass->tokens, top_k) : pass->tokens * top_k;
}

esp_status espi_experts_take_lasting(espi_pass *pass, const espi_experts *experts, int64_t top_k, espi_experts_saved *saved) {
    const espi_share *share = &pass->model->share;
    const espi_lora down = espi_pass_lora(pass, experts->lora_down);
    *saved = (espi_experts_saved){0};
    if (espi_share_travels(share))
        ESPI_TRY(espi_arena_take_host(pass->arena, (size_t)(share->ranks * share->experts) * sizeof *saved->counts, &saved->counts));
    return down.r ? espi_take_act(pass, rows_of(pass, top_k) * down.r, &saved->u_dn) : ESP_OK;
}

esp_status espi_experts_take_saved(espi_pass *pass, const espi_experts *experts, int64_t top_k, espi_experts_saved *saved) {
    const espi_lora gate_up = espi_pass_lora(pass, experts->lora_gate_up);
    const int64_t rows = rows_of(pass, top_k);
    ESPI_TRY(espi_take_act(pass, rows * experts->gate_up.rows, &saved->gu));
    if (espi_share_travels(&pass->model->share)) ESPI_TRY(espi_take_act(pass, rows * experts->gate_up.cols, &saved->x));
    return gate_up.r ? espi_take_act(pass, rows * gate_up.r, &saved->u_gu) : ESP_OK;
}

static esp_status down(espi_pass *pass, int64_t layer, void *y, const void *act, const espi_experts *experts, const espi_routing *routing,
                       const espi_experts_saved *saved) {
    const espi_down_fwd args = {.y = y,
                                .u = saved->u_dn,
                                .act = act,
                                .w = experts->down,
                                .bias = experts->down_bias,
                                .lora = espi_pass_lora(pass, experts->lora_down),
                                .routing = *routing};
    ESPI_TRY(espi_op_down_fwd(pass->ctx, pass->arena, &args));
    espi_probe_slots(pass, "down", layer, y, routing, experts->down.rows);
    return ESP_OK;
}

esp_status espi_experts_forward(espi_pass *pass, int64_t layer, void *y, const void *x, const espi_experts *experts,
                                const espi_routing *routing, const espi_experts_saved *saved, bool replay) {
    const int64_t slots = routing->tokens * routing->top_k, width = experts->down.cols;
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *act;
    ESPI_TRY(espi_take_act(pass, slots * width, &act));
    const espi_gate_up_fwd gate_up = {.gu = saved->gu,
                                      .act = act,
                                      .u = saved->u_gu,
                                      .x = x,
                                      .w = experts->gate_up,
                                      .bias = experts->gate_up_bias,
                                      .lora = espi_pass_lora(pass, experts->lora_gate_up),
                                      .routing = *routing,
                                      .glu = experts->glu};
    ESPI_TRY(espi_op_gate_up_fwd(pass->ctx, pass->arena, &gate_up));
    espi_probe_slots(pass, "gu", layer, saved->gu, routing, 2 * width);
    espi_probe_slots(pass, "act", layer, act, routing, width);
    if (!replay) ESPI_TRY(down(pass, layer, y, act, experts, routing, saved));
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}
