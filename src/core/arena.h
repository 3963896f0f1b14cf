/* One block of memory handed out as a stack.  The same code path is walked twice: once dry, with no memory behind it, to learn how many
 * bytes a call will use, and once for real.  So the planned peak and the measured peak are equal by construction, to the byte. */
#ifndef ESPI_CORE_ARENA_H
#define ESPI_CORE_ARENA_H

#include "espalier/status.h"

#include <stdbool.h>
#include <stddef.h>

#define ESPI_ALIGN 64
#define ESPI_ALIGNED(bytes) (((size_t)(bytes) + ESPI_ALIGN - 1) & ~(size_t)(ESPI_ALIGN - 1))

typedef struct espi_arena {
    unsigned char *base; /* NULL when dry */
    size_t capacity;     /* SIZE_MAX when dry */
    size_t used, high;   /* bytes handed out now; the most since espi_arena_reset() */
    bool dry;
} espi_arena;

/* An arena without memory: every take succeeds and gives NULL. */
espi_arena espi_arena_dry(void);
espi_arena espi_arena_over(void *base, size_t capacity);
void espi_arena_reset(espi_arena *arena);

/* `bytes` rounded up to ESPI_ALIGN; contents undefined.  *out is void ** in disguise: a pointer to any object pointer.
 * ESP_ERR_MEMORY when the block is exhausted: the plan was for a smaller batch. */
esp_status espi_arena_take(espi_arena *arena, size_t bytes, void *out);

size_t espi_arena_mark(const espi_arena *arena);
/* Gives back all that was taken since the mark. */
void espi_arena_release(espi_arena *arena, size_t mark);

#endif
