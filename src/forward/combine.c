/* Forward of combine.  Twin: backward/combine.c. */
#include "contract/combine.h"

esp_status espi_combine_forward(espi_pass *pass, void *out, const void *y, const void *add, const espi_routing *routing, int64_t hidden) {
    const espi_combine_fwd args = {.out = out, .y = y, .add = add, .routing = *routing, .hidden = hidden};
    return espi_op_combine_fwd(pass->ctx, pass->arena, &args);
}
