/* The stack of working memory, walked dry to plan and for real to run. */
#include "core/arena.h"
#include "core/status.h"

#include <stdint.h>
#include <string.h>

espi_arena espi_arena_dry(void) {
    return (espi_arena){.capacity = SIZE_MAX, .dry = true};
}

espi_arena espi_arena_over(void *base, size_t capacity) {
    return (espi_arena){.base = base, .capacity = capacity};
}

void espi_arena_reset(espi_arena *arena) {
    arena->used = arena->high = 0;
}

esp_status espi_arena_take(espi_arena *arena, size_t bytes, void *out) {
    unsigned char *place = NULL;
    size_t left = arena->capacity - arena->used;
    if (ESPI_ALIGNED(bytes) > left || ESPI_ALIGNED(bytes) < bytes)
        return ESPI_FAIL(ESP_ERR_MEMORY, "%zu bytes of working memory wanted, %zu of %zu left: the plan was made for a smaller batch",
                         bytes, left, arena->capacity);
    if (!arena->dry && bytes > 0) place = arena->base + arena->used;
    memcpy(out, &place, sizeof place);
    arena->used += ESPI_ALIGNED(bytes);
    if (arena->used > arena->high) arena->high = arena->used;
    return ESP_OK;
}

size_t espi_arena_mark(const espi_arena *arena) {
    return arena->used;
}

void espi_arena_release(espi_arena *arena, size_t mark) {
    arena->used = mark;
}
