/* Backward of norm.  Twin: forward/norm.c. */
#include "contract/norm.h"

esp_status espi_norm_backward(espi_pass *pass, void *d_x, const void *d_y, const void *d_add, const void *x, const void *rstd,
                              const float *w, int64_t rows, int64_t n) {
    const espi_rmsnorm_bwd args = {.d_x = d_x, .d_y = d_y, .x = x, .rstd = rstd, .d_add = d_add, .w = w, .rows = rows, .n = n};
    return espi_op_rmsnorm_bwd(pass->ctx, pass->arena, &args);
}
