/* Backward of combine.  Twin: forward/combine.c. */
#include "contract/combine.h"

esp_status espi_combine_backward(espi_pass *pass, void *d_x, void *d_weight, const void *d_rows, const void *d_row_weight,
                                 const espi_routing *routing, int64_t hidden) {
    const espi_combine_bwd args = {
        .d_x = d_x, .d_weight = d_weight, .d_rows = d_rows, .d_row_weight = d_row_weight, .routing = *routing, .hidden = hidden};
    return espi_op_combine_bwd(pass->ctx, pass->arena, &args);
}
