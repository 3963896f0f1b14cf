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
    esp_dtype real;   /* dtype of activations and trainable parameters: ESP_F32, or ESP_F64 under "ref64" */
    size_t real_size; /* its bytes */
    int threads;
    size_t memory_limit;
    esp_log_fn log;
    void *log_user;
    esp_log_level log_level;
    esp_alloc_fn alloc;
    esp_free_fn free;
    void *alloc_user;
    size_t live[ESPI_MEM_COUNT], total, peak;
    size_t activations_used;
    unsigned char reported[256]; /* select.c: which op choices have been logged */
};

/* `bytes` of zeroed memory aligned to ESPI_ALIGN.  All tensor memory of the library comes from here, so esp_ctx_memory() is exact.
 * out: a pointer to any object pointer.  bytes = 0 gives NULL and ESP_OK. */
esp_status espi_ctx_alloc(esp_ctx *ctx, espi_purpose purpose, size_t bytes, void *out);
/* Takes what espi_ctx_alloc gave, with the same purpose and size.  NULL is allowed. */
void espi_ctx_free(esp_ctx *ctx, espi_purpose purpose, void *p, size_t bytes);

#endif
