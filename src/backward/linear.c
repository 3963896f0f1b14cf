/* Backward of linear.  Twin: forward/linear.c. */
#include "contract/linear.h"

esp_status espi_linear_backward(espi_pass *pass, void *d_x, bool accumulate, const void *d_y, const void *x, const void *u,
                                const espi_linear *linear) {
    const espi_linear_bwd args = {.d_x = d_x,
                                  .accumulate = accumulate,
                                  .d_y = d_y,
                                  .x = x,
                                  .u = u,
                                  .w = linear->w,
                                  .lora = espi_pass_lora(pass, linear->lora),
                                  .tokens = pass->tokens};
    return espi_op_linear_bwd(pass->ctx, pass->arena, &args);
}
