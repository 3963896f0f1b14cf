/* The context's inside: backends, threads, and the one door through which tensor memory is taken. */
#ifndef ESPI_CORE_CTX_H
#define ESPI_CORE_CTX_H

#include "core/arena.h"
#include "core/log.h"
#include "core/status.h"
#include "espalier/ctx.h"
#include "espalier/tensor.h"

struct espi_backend;

/* What a piece of memory is for; the order is that of esp_memory's fields. */
typedef enum espi_purpose {
    ESPI_MEM_WEIGHTS,
    ESPI_MEM_ADAPTER,
    ESPI_MEM_OPTIMIZER,
    ESPI_MEM_ACTIVATIONS,
    ESPI_MEM_CACHE,
    ESPI_MEM_STAGING,
    ESPI_MEM_COUNT
} espi_purpose;

#define ESPI_MAX_BACKENDS 4

struct esp_ctx {
    esp_comm *comm;
    const struct espi_backend *backends[ESPI_MAX_BACKENDS]; /* tried in this order for every op */
    int n_backends;
    esp_dtype real, act; /* dtypes of parameters and statistics, and of activations: see ops.h */
    size_t real_size, act_size;
    const struct espi_device *device_ops; /* NULL: tensor memory is host memory */
    void *device;
    struct espi_link *link; /* the way between the devices of ranks, once it was needed: see dist/link.h */
    void (*close_link)(struct espi_link *link);
    int threads;
    struct espi_threads *bound; /* threads.h; NULL: as the system places them */
    size_t memory_limit;
    esp_log_fn log;
    void *log_user;
    esp_log_level log_level;
    esp_alloc_fn alloc;
    esp_free_fn free;
    void *alloc_user;
    size_t live[ESPI_MEM_COUNT], total, peak;
    size_t activations_used, pinned;
    struct espi_recordings *recordings; /* record.h */
    unsigned char reported[256];        /* select.c: which op choices have been logged */
};

/* `bytes` of zeroed memory aligned to ESPI_ALIGN.  All tensor memory of the library comes from here, so esp_ctx_memory() is exact.
 * out: a pointer to any object pointer.  bytes = 0 gives NULL and ESP_OK. */
esp_status espi_ctx_alloc(esp_ctx *ctx, espi_purpose purpose, size_t bytes, void *out);
/* The same in host memory that the device copies from and to at full speed (on a CPU: as espi_ctx_alloc). */
esp_status espi_ctx_alloc_host(esp_ctx *ctx, espi_purpose purpose, size_t bytes, void *out);
void espi_ctx_free_host(esp_ctx *ctx, espi_purpose purpose, void *p, size_t bytes);

/* Moves bytes between host arrays and tensor memory.  Where they are the same memory (to == from, on a CPU) nothing happens.  put returns
 * once `from` may be used again; get returns when the bytes are there, after all that was queued before. */
esp_status espi_ctx_put(esp_ctx *ctx, void *to, const void *from, size_t bytes);
esp_status espi_ctx_get(esp_ctx *ctx, void *to, const void *from, size_t bytes);
/* Sets tensor memory to zero. */
esp_status espi_ctx_zero(esp_ctx *ctx, void *p, size_t bytes);
/* Waits for all that was queued, and returns what failed on the way.  Nothing on a CPU. */
esp_status espi_ctx_wait(esp_ctx *ctx);

/* Reads or writes element i of a real array whatever the context's dtype is. */
static inline double espi_real_get(const void *p, int64_t i, esp_dtype real) {
    return real == ESP_F64 ? ((const double *)p)[i] : (double)((const float *)p)[i];
}
static inline void espi_real_set(void *p, int64_t i, double value, esp_dtype real) {
    if (real == ESP_F64)
        ((double *)p)[i] = value;
    else
        ((float *)p)[i] = (float)value;
}

/* Takes what espi_ctx_alloc gave, with the same purpose and size.  NULL is allowed. */
void espi_ctx_free(esp_ctx *ctx, espi_purpose purpose, void *p, size_t bytes);

/* A block of tensor memory and, on a device, one of host memory beside it: what an arena lies over. */
typedef struct espi_room {
    espi_purpose purpose;
    void *main, *host;
    espi_extent extent;
} espi_room;

esp_status espi_room_take(espi_room *room, esp_ctx *ctx, espi_purpose purpose, espi_extent extent);
void espi_room_free(espi_room *room, esp_ctx *ctx);
espi_arena espi_room_arena(const espi_room *room, const esp_ctx *ctx);
/* A dry arena as this context would have it. */
espi_arena espi_ctx_dry(const esp_ctx *ctx);

#endif
