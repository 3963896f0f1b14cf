/* Shows intermediate tensors to whoever asked with esp_model_set_probe(). */
#include "contract/pass.h"

#include <stdlib.h>
#include <string.h>

static bool silent(const espi_pass *pass) {
    return !pass->model->probe || pass->arena->dry || pass->quiet;
}

static void show(const espi_pass *pass, const char *name, int64_t layer, const void *data, esp_dtype dtype, int rank, const int64_t *dims) {
    const esp_tensor view = esp_tensor_view((void *)data, dtype, rank, dims);
    pass->model->probe(pass->model->probe_user, name, layer, &view);
}

void espi_probe(const espi_pass *pass, const char *name, int64_t layer, const void *data, int64_t rows, int64_t cols) {
    if (silent(pass)) return;
    show(pass, name, layer, data, pass->ctx->real, 2, (int64_t[]){rows, cols});
}

void espi_probe_i32(const espi_pass *pass, const char *name, int64_t layer, const int32_t *data, int64_t rows, int64_t cols) {
    if (silent(pass)) return;
    show(pass, name, layer, data, ESP_I32, 2, (int64_t[]){rows, cols});
}

void espi_probe_slots(const espi_pass *pass, const char *name, int64_t layer, const void *data, const espi_routing *routing, int64_t cols) {
    if (silent(pass)) return;
    const int64_t slots = routing->tokens * routing->top_k;
    const size_t row = (size_t)cols * pass->ctx->real_size;
    char *ordered = malloc((size_t)slots * row + 1);
    if (!ordered) { /* a probe has no status to return: say it, and show nothing */
        espi_log(pass->ctx, ESP_LOG_ERROR, "probe %s of layer %lld: no memory for %lld rows", name, (long long)layer, (long long)slots);
        return;
    }
    for (int64_t s = 0; s < slots; s++) memcpy(ordered + (size_t)s * row, (const char *)data + (size_t)routing->slot_row[s] * row, row);
    show(pass, name, layer, ordered, pass->ctx->real, 3, (int64_t[]){routing->tokens, routing->top_k, cols});
    free(ordered);
}
