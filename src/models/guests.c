/* Layers whose frozen weights are at home in the memory of a device's host.  They stand in one place on the device in turn: each is brought
 * there while the layers before it, in the order of the pass, are computed. */
#include "kernels/backend.h"
#include "models/model.h"

bool espi_is_guest(const esp_model *m, int64_t layer) {
    const int64_t n = m->options.host_layers, all = m->config.layers;
    if (!m->ctx->device || n == 0) return false;
    /* Each in the middle of its part of the layers: a pass comes to the first one, and from one to the next, over others. */
    return ((layer + 1) * n + all / 2) / all > (layer * n + all / 2) / all;
}

esp_status espi_guest_put_home(const esp_model *m, int64_t layer) {
    const espi_layer *w = &m->layers[layer];
    if (!w->home) return ESP_OK;
    ESPI_TRY(m->ctx->device_ops->copy(m->ctx->device, ESPI_LANE_WORK, w->home, m->guest_place, w->bytes));
    return espi_ctx_zero(m->ctx, m->guest_place, m->guest_bytes); /* what stands between the arrays of the next one is 0 too */
}

esp_status espi_guest_fetch(const esp_model *m, int64_t layer) {
    const espi_layer *w = &m->layers[layer];
    if (!w->home) return ESP_OK;
    return m->ctx->device_ops->copy(m->ctx->device, ESPI_LANE_WORK, m->guest_place, w->home, w->bytes);
}

esp_status espi_guests_bring(const esp_model *m, const espi_arena *arena, int64_t layer, int step) {
    const espi_device *ops = m->ctx->device_ops;
    if (arena->dry || arena->idle) return ESP_OK;
    for (; layer >= 0 && layer < m->config.layers; layer += step) {
        const espi_layer *w = &m->layers[layer];
        if (!w->home) continue;
        ESPI_TRY(ops->order(m->ctx->device, ESPI_LANE_FETCH, ESPI_LANE_WORK));
        return ops->copy(m->ctx->device, ESPI_LANE_FETCH, m->guest_place, w->home, w->bytes);
    }
    return ESP_OK;
}

esp_status espi_guest_enter(const esp_model *m, const espi_arena *arena, int64_t layer) {
    if (arena->dry || arena->idle || !m->layers[layer].home) return ESP_OK;
    return m->ctx->device_ops->order(m->ctx->device, ESPI_LANE_WORK, ESPI_LANE_FETCH);
}

esp_status espi_guest_leave(const esp_model *m, const espi_arena *arena, int64_t layer, int step) {
    return m->layers[layer].home ? espi_guests_bring(m, arena, layer + step, step) : ESP_OK;
}
