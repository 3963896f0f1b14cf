/* Forward of embed.  Twin: backward/embed.c. */
#include "contract/embed.h"

esp_status espi_embed_forward(espi_pass *pass, void *out) {
    const espi_embed_fwd args = {.out = out, .ids = pass->ids, .table = pass->model->embed, .tokens = pass->tokens};
    return espi_op_embed_fwd(pass->ctx, pass->arena, &args);
}
