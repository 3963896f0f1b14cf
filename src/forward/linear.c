/* Forward of linear.  Twin: backward/linear.c. */
#include "contract/linear.h"

esp_status espi_linear_take_saved(espi_pass *pass, const espi_linear *linear, void **u) {
    const espi_lora lora = espi_pass_lora(pass, linear->lora);
    *u = NULL;
    return lora.r ? espi_take_act(pass, pass->tokens * lora.r, u) : ESP_OK;
}

esp_status espi_linear_forward(espi_pass *pass, void *y, void *u, const void *x, const espi_linear *linear) {
    const espi_linear_fwd args = {
        .y = y, .u = u, .x = x, .w = linear->w, .bias = linear->bias, .lora = espi_pass_lora(pass, linear->lora), .tokens = pass->tokens};
    return espi_op_linear_fwd(pass->ctx, pass->arena, &args);
}
