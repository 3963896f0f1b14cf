/* Backward of embed.  Twin: forward/embed.c. */
#include "contract/embed.h"

esp_status espi_embed_backward(espi_pass *pass, void *d_table, const void *d_out) {
    if (!d_table) return ESP_OK; /* frozen: the gradient ends here */
    const espi_mat *table = &pass->model->embed;
    const espi_embed_bwd args = {
        .d_table = d_table, .d_out = d_out, .ids = pass->ids, .tokens = pass->tokens, .vocab = table->rows, .hidden = table->cols};
    return espi_op_embed_bwd(pass->ctx, pass->arena, &args);
}
