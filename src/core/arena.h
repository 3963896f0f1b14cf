/* One block of memory handed out as a stack.  The same code path is walked twice: once dry, with no memory behind it, to learn how many
 * bytes a call will use, and once for real.  So the planned peak and the measured peak are equal by construction, to the byte.
 *
 * On a device there are two stacks side by side: device memory, and host memory for what both sides read (ids, borders of sequences, the
 * scalars of a loss).  On a CPU there is one, and a shared array is one array. */
#ifndef ESPI_CORE_ARENA_H
#define ESPI_CORE_ARENA_H

#include "espalier/status.h"

#include <stdbool.h>
#include <stddef.h>

#define ESPI_ALIGN 64
#define ESPI_ALIGNED(bytes) (((size_t)(bytes) + ESPI_ALIGN - 1) & ~(size_t)(ESPI_ALIGN - 1))

typedef struct espi_pile {
    unsigned char *base; /* NULL when dry */
    size_t capacity;     /* SIZE_MAX when dry */
    size_t used, high;   /* bytes handed out now; the most since espi_arena_reset() */
} espi_pile;

typedef struct espi_arena {
    espi_pile main, host; /* host is used when split only */
    bool dry, split;
    bool idle; /* real places, but no op is run: see record.h */
} espi_arena;

/* How much memory an arena needs, or has. */
typedef struct espi_extent {
    size_t main, host;
} espi_extent;

typedef struct espi_mark {
    size_t main, host;
} espi_mark;

/* An arena without memory: every take succeeds and gives NULL.  split: as it would be on a device. */
espi_arena espi_arena_dry(bool split);
espi_arena espi_arena_over(void *base, size_t capacity);
espi_arena espi_arena_over_both(void *base, void *host, espi_extent capacity);
void espi_arena_reset(espi_arena *arena);
/* The most that was in use. */
espi_extent espi_arena_high(const espi_arena *arena);

/* `bytes` of tensor memory, rounded up to ESPI_ALIGN; contents undefined.  *out is void ** in disguise: a pointer to any object pointer.
 * ESP_ERR_MEMORY when the block is exhausted: the plan was for a smaller batch. */
esp_status espi_arena_take(espi_arena *arena, size_t bytes, void *out);
/* `bytes` of host memory. */
esp_status espi_arena_take_host(espi_arena *arena, size_t bytes, void *out);
/* An array for both sides: *host is written, or read after espi_ctx_get; *device is what ops are given.  The same pointer on a CPU. */
esp_status espi_arena_take_shared(espi_arena *arena, size_t bytes, void *host, void *device);

espi_mark espi_arena_mark(const espi_arena *arena);
/* Gives back all that was taken since the mark. */
void espi_arena_release(espi_arena *arena, espi_mark mark);

#endif
