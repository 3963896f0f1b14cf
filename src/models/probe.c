/* Shows intermediate tensors to whoever asked with esp_model_set_probe(). */
#include "contract/pass.h"

#include <stdlib.h>
#include <string.h>

static bool silent(const espi_pass *pass) {
    return !pass->model->probe || pass->arena->dry || pass->quiet;
}

/* A probe has no status to return: say it, and show nothing. */
static void *room_for(const espi_pass *pass, const char *name, int64_t layer, int64_t rows, size_t bytes) {
    void *p = malloc(bytes + 1);
    if (!p) espi_log(pass->ctx, ESP_LOG_ERROR, "probe %s of layer %lld: no memory for %lld rows", name, (long long)layer, (long long)rows);
    return p;
}

/* `count` values from where the ops left them, in host memory and in one dtype more convenient than bf16; free() it. */
static void *fetch(const espi_pass *pass, const char *name, int64_t layer, const void *data, esp_dtype dtype, int64_t rows, int64_t cols) {
    const int64_t count = rows * cols;
    const size_t size = esp_dtype_size(dtype);
    char *got = room_for(pass, name, layer, rows, (size_t)count * sizeof(double));
    if (!got) return NULL;
    /* Narrow values stand at the end of the room and are widened from its beginning on. */
    char *from = dtype == ESP_BF16 ? got + (size_t)count * (sizeof(float) - size) : got;
    if (espi_ctx_get(pass->ctx, from, data, (size_t)count * size) != ESP_OK) {
        espi_log(pass->ctx, ESP_LOG_ERROR, "probe %s of layer %lld: %s", name, (long long)layer, esp_last_error());
        free(got);
        return NULL;
    }
    for (int64_t i = 0; i < count && dtype == ESP_BF16; i++) {
        const float value = espi_plain_value(from, dtype, i);
        memcpy(got + (size_t)i * sizeof value, &value, sizeof value);
    }
    return got;
}

static esp_dtype shown(esp_dtype dtype) {
    return dtype == ESP_BF16 ? ESP_F32 : dtype;
}

static void show(const espi_pass *pass, const char *name, int64_t layer, const void *data, esp_dtype dtype, int rank, const int64_t *dims) {
    const esp_tensor view = esp_tensor_view((void *)data, dtype, rank, dims);
    pass->model->probe(pass->model->probe_user, name, layer, &view);
}

static void show_matrix(const espi_pass *pass, const char *name, int64_t layer, const void *data, esp_dtype dtype, int64_t rows,
                        int64_t cols) {
    if (silent(pass)) return;
    void *got = pass->ctx->device ? fetch(pass, name, layer, data, dtype, rows, cols) : NULL;
    if (!pass->ctx->device || got) show(pass, name, layer, got ? got : data, shown(dtype), 2, (int64_t[]){rows, cols});
    free(got);
}

void espi_probe(const espi_pass *pass, const char *name, int64_t layer, const void *data, int64_t rows, int64_t cols) {
    show_matrix(pass, name, layer, data, pass->ctx->act, rows, cols);
}

void espi_probe_real(const espi_pass *pass, const char *name, int64_t layer, const void *data, int64_t rows, int64_t cols) {
    show_matrix(pass, name, layer, data, pass->ctx->real, rows, cols);
}

void espi_probe_i32(const espi_pass *pass, const char *name, int64_t layer, const int32_t *data, int64_t rows, int64_t cols) {
    show_matrix(pass, name, layer, data, ESP_I32, rows, cols);
}

void espi_probe_slots(const espi_pass *pass, const char *name, int64_t layer, const void *data, const espi_routing *routing, int64_t cols) {
    if (silent(pass)) return;
    const int64_t slots = routing->tokens * routing->top_k;
    const esp_dtype dtype = shown(pass->ctx->act);
    const size_t row = (size_t)cols * esp_dtype_size(dtype);
    char *ordered = room_for(pass, name, layer, slots, (size_t)slots * row);
    char *rows = fetch(pass, name, layer, data, pass->ctx->act, slots, cols);
    int32_t *slot_row = fetch(pass, name, layer, routing->slot_row, ESP_I32, slots, 1);
    if (ordered && rows && slot_row) {
        for (int64_t s = 0; s < slots; s++) memcpy(ordered + (size_t)s * row, rows + (size_t)slot_row[s] * row, row);
        show(pass, name, layer, ordered, dtype, 3, (int64_t[]){routing->tokens, routing->top_k, cols});
    }
    free(slot_row);
    free(rows);
    free(ordered);
}
