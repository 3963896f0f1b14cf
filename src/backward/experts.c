/* Backward of experts.  Twin: forward/experts.c. */
#include "contract/experts.h"

esp_status espi_experts_backward(espi_pass *pass, void *d_rows, void *d_row_weight, const void *d_out, const void *x,
                                 const espi_experts *experts, const espi_routing *routing, const espi_experts_saved *saved) {
    const int64_t slots = routing->tokens * routing->top_k, width = experts->down.cols;
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *d_gu;
    ESPI_TRY(espi_take_act(pass, slots * 2 * width, &d_gu));
    const espi_down_bwd down = {.d_gu = d_gu,
                                .d_row_weight = d_row_weight,
                                .d_out = d_out,
                                .gu = saved->gu,
                                .u = saved->u_dn,
                                .w = experts->down,
                                .bias = experts->down_bias,
                                .lora = espi_pass_lora(pass, experts->lora_down),
                                .routing = *routing,
                                .glu = experts->glu};
    ESPI_TRY(espi_op_down_bwd(pass->ctx, pass->arena, &down));
    const espi_gate_up_bwd gate_up = {.d_rows = d_rows,
                                      .d_gu = d_gu,
                                      .x = x,
                                      .u = saved->u_gu,
                                      .w = experts->gate_up,
                                      .lora = espi_pass_lora(pass, experts->lora_gate_up),
                                      .routing = *routing};
    ESPI_TRY(espi_op_gate_up_bwd(pass->ctx, pass->arena, &gate_up));
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}
