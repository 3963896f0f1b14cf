/* Token embedding: a gather, and the scatter that is its transpose. */
#include "kernels/ref/ref.h"

esp_status ESPI_REF_NAME(espi_embed_fwd)(const espi_exec *exec, const espi_embed_fwd *a) {
    (void)exec;
    const int64_t hidden = a->table.cols;
    real *out = a->out;
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t h = 0; h < hidden; h++) out[t * hidden + h] = espi_mat_value(&a->table, a->ids[t], h);
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_embed_bwd)(const espi_exec *exec, const espi_embed_bwd *a) {
    (void)exec;
    real *d_table = a->d_table;
    const real *d_out = a->d_out;
    for (int64_t t = 0; t < a->tokens; t++)
        for (int64_t h = 0; h < a->hidden; h++) d_table[a->ids[t] * a->hidden + h] += d_out[t * a->hidden + h];
    return ESP_OK;
}
