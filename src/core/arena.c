/* The stack of working memory, walked dry to plan and for real to run. */
#include "core/arena.h"
#include "core/status.h"

#include <stdint.h>
#include <string.h>

espi_arena espi_arena_dry(bool split) {
    const espi_pile endless = {.capacity = SIZE_MAX};
    return (espi_arena){.main = endless, .host = endless, .dry = true, .split = split};
}

espi_arena espi_arena_over(void *base, size_t capacity) {
    return (espi_arena){.main = {.base = base, .capacity = capacity}};
}

espi_arena espi_arena_over_both(void *base, void *host, espi_extent capacity) {
    return (espi_arena){
        .main = {.base = base, .capacity = capacity.main}, .host = {.base = host, .capacity = capacity.host}, .split = true};
}

void espi_arena_reset(espi_arena *arena) {
    arena->main.used = arena->main.high = 0;
    arena->host.used = arena->host.high = 0;
}

espi_extent espi_arena_high(const espi_arena *arena) {
    return (espi_extent){arena->main.high, arena->host.high};
}

static esp_status take(espi_pile *block, bool dry, const char *what, size_t bytes, void *out) {
    unsigned char *place = NULL;
    const size_t left = block->capacity - block->used;
    if (ESPI_ALIGNED(bytes) > left || ESPI_ALIGNED(bytes) < bytes)
        return ESPI_FAIL(ESP_ERR_MEMORY, "%zu bytes of %s wanted, %zu of %zu left: the plan was made for a smaller batch", bytes, what,
                         left, block->capacity);
    if (!dry && bytes > 0) place = block->base + block->used;
    memcpy(out, &place, sizeof place);
    block->used += ESPI_ALIGNED(bytes);
    if (block->used > block->high) block->high = block->used;
    return ESP_OK;
}

esp_status espi_arena_take(espi_arena *arena, size_t bytes, void *out) {
    return take(&arena->main, arena->dry, "working memory", bytes, out);
}

esp_status espi_arena_take_host(espi_arena *arena, size_t bytes, void *out) {
    return arena->split ? take(&arena->host, arena->dry, "working memory on the host", bytes, out) : espi_arena_take(arena, bytes, out);
}

esp_status espi_arena_take_shared(espi_arena *arena, size_t bytes, void *host, void *device) {
    ESPI_TRY(espi_arena_take_host(arena, bytes, host));
    if (arena->split) return espi_arena_take(arena, bytes, device);
    memcpy(device, host, sizeof(void *));
    return ESP_OK;
}

espi_mark espi_arena_mark(const espi_arena *arena) {
    return (espi_mark){arena->main.used, arena->host.used};
}

void espi_arena_release(espi_arena *arena, espi_mark mark) {
    arena->main.used = mark.main;
    arena->host.used = mark.host;
}
