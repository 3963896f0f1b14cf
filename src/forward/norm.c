/* Forward of norm.  Twin: backward/norm.c. */
#include "contract/norm.h"

esp_status espi_norm_forward(espi_pass *pass, void *y, void *rstd, const void *x, const float *w, int64_t rows, int64_t n) {
    const espi_rmsnorm_fwd args = {.y = y, .rstd = rstd, .x = x, .w = w, .rows = rows, .n = n, .eps = pass->model->config.norm_eps};
    return espi_op_rmsnorm_fwd(pass->ctx, pass->arena, &args);
}
