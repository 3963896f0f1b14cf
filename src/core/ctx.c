/* The context: configuration, and the accounting of every byte of tensor memory. */
#define _DEFAULT_SOURCE /* madvise */

#include "core/ctx.h"
#include "core/record.h"
#include "core/select.h"
#include "core/threads.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define LARGE_PAGE ESPI_PIECE

static const char *const purpose_names[ESPI_MEM_COUNT] = {
    [ESPI_MEM_WEIGHTS] = "weights",         [ESPI_MEM_ADAPTER] = "adapter", [ESPI_MEM_OPTIMIZER] = "optimizer",
    [ESPI_MEM_ACTIVATIONS] = "activations", [ESPI_MEM_CACHE] = "cache",     [ESPI_MEM_STAGING] = "staging",
};

/* Large blocks ask for large pages: in small ones, their first touch costs as much time as reading the weights that go there. */
static void *default_alloc(void *user, size_t bytes) {
    (void)user;
    const size_t align = bytes < 2 * LARGE_PAGE ? ESPI_ALIGN : LARGE_PAGE, rounded = (bytes + align - 1) / align * align;
    void *p = rounded < bytes ? NULL : aligned_alloc(align, rounded);
#ifdef MADV_HUGEPAGE
    if (p && align == LARGE_PAGE) (void)madvise(p, rounded, MADV_HUGEPAGE); /* refused: as before */
#endif
    return p;
}

static void default_free(void *user, void *p, size_t bytes) {
    (void)user;
    (void)bytes;
    free(p);
}

static esp_status configure(esp_ctx *ctx, const esp_ctx_config *config) {
    if ((config->alloc == NULL) != (config->free == NULL))
        return ESPI_FAIL(ESP_ERR_ARG, "esp_ctx_config.%s is set but .%s is not: give both allocator hooks or none",
                         config->alloc ? "alloc" : "free", config->alloc ? "free" : "alloc");
    if (config->threads < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_ctx_config.threads is %d, expected a number of threads, or 0 for OMP_NUM_THREADS or the cores",
                         config->threads);
    ctx->comm = config->comm;
    ctx->threads = config->threads > 0 ? config->threads : omp_get_max_threads();
    ctx->memory_limit = config->memory_limit;
    ctx->alloc = config->alloc ? config->alloc : default_alloc;
    ctx->free = config->free ? config->free : default_free;
    ctx->alloc_user = config->alloc_user;
    ESPI_TRY(espi_log_setup(ctx, config->log, config->log_user));
    ESPI_TRY(espi_select_backends(ctx, config->backend ? config->backend : "auto"));
    if (ctx->device_ops != NULL && config->alloc != NULL)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "esp_ctx_config.alloc is set with backend \"%s\", expected no hooks: they are for memory of the host",
                         ctx->backends[0]->name);
    return ctx->device_ops != NULL ? ctx->device_ops->start(&ctx->device, esp_comm_local_rank(ctx->comm)) : espi_threads_bind(ctx, "");
}

esp_status esp_ctx_create(esp_ctx **ctx, const esp_ctx_config *config) {
    if (ctx == NULL) return ESPI_FAIL(ESP_ERR_ARG, "esp_ctx_create: ctx is NULL");
    *ctx = NULL;
    esp_ctx_config settings;
    ESPI_TRY(espi_struct_read(&settings, sizeof settings, config, "esp_ctx_config"));
    esp_ctx *made = calloc(1, sizeof *made);
    if (made == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a context (%zu bytes)", sizeof *made);
    esp_status status = configure(made, &settings);
    if (status != ESP_OK) {
        esp_ctx_destroy(made);
        return status;
    }
    *ctx = made;
    return ESP_OK;
}

void esp_ctx_destroy(esp_ctx *ctx) {
    if (ctx == NULL) return;
    espi_recordings_free(ctx);
    if (ctx->link != NULL) ctx->close_link(ctx->link);
    if (ctx->device != NULL) ctx->device_ops->stop(ctx->device);
    espi_threads_release(ctx);
    free(ctx);
}

const char *esp_ctx_backend(const esp_ctx *ctx) {
    const char *name = ctx->backends[0]->name;
    return strncmp(name, "cpu-", 4) == 0 ? "cpu" : name;
}

esp_status esp_ctx_memory(const esp_ctx *ctx, esp_memory *out) {
    esp_memory memory = {
        .live = ctx->total,
        .peak = ctx->peak,
        .weights = ctx->live[ESPI_MEM_WEIGHTS],
        .adapter = ctx->live[ESPI_MEM_ADAPTER],
        .optimizer = ctx->live[ESPI_MEM_OPTIMIZER],
        .activations = ctx->live[ESPI_MEM_ACTIVATIONS],
        .cache = ctx->live[ESPI_MEM_CACHE],
        .staging = ctx->live[ESPI_MEM_STAGING],
        .activations_used = ctx->activations_used,
        .pinned = ctx->pinned,
    };
    return espi_struct_write(out, &memory, sizeof memory, "esp_memory");
}

/* Large memory by all threads: what takes the time is the first touch of its pages, and it says on which node they lie. */
static void zero(const esp_ctx *ctx, unsigned char *p, size_t bytes) {
    const int threads = ctx->threads;
    const uintptr_t begin = (uintptr_t)p, end = begin + bytes;
    const int64_t first = (int64_t)(begin / ESPI_PIECE), after = (int64_t)((end - 1) / ESPI_PIECE) + 1;
#pragma omp parallel num_threads(threads) if (threads > 1 && after - first >= 8 * threads)
    {
        espi_threads_enter(ctx);
#pragma omp for schedule(static, 1)
        for (int64_t piece = first - first % threads; piece < after; piece++) {
            const uintptr_t low = (uintptr_t)piece * ESPI_PIECE, from = low > begin ? low : begin;
            const uintptr_t to = low + ESPI_PIECE < end ? low + ESPI_PIECE : end;
            if (from < to) memset(p + (from - begin), 0, to - from);
        }
        espi_threads_leave(ctx);
    }
}

/* Zeroed host memory from the caller's hooks. */
static esp_status host_memory(esp_ctx *ctx, size_t bytes, void **out) {
    void *p = ctx->alloc(ctx->alloc_user, bytes);
    if (p == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "%zu bytes wanted, but the allocator gave none (%zu are taken)", bytes, ctx->total);
    if ((uintptr_t)p % ESPI_ALIGN != 0) {
        ctx->free(ctx->alloc_user, p, bytes);
        return ESPI_FAIL(ESP_ERR_ARG, "esp_ctx_config.alloc gave memory that is not aligned to %d bytes", ESPI_ALIGN);
    }
    zero(ctx, p, bytes);
    *out = p;
    return ESP_OK;
}

static esp_status device_memory(esp_ctx *ctx, size_t bytes, void **out) {
    ESPI_TRY(ctx->device_ops->alloc(ctx->device, bytes, out));
    const esp_status status = ctx->device_ops->zero(ctx->device, *out, bytes);
    if (status != ESP_OK) ctx->device_ops->free(ctx->device, *out);
    return status;
}

esp_status espi_ctx_alloc(esp_ctx *ctx, espi_purpose purpose, size_t bytes, void *out) {
    void *p = NULL;
    memcpy(out, &p, sizeof p);
    if (bytes == 0) return ESP_OK;
    if (ctx->memory_limit != 0 && (ctx->total > ctx->memory_limit || bytes > ctx->memory_limit - ctx->total))
        return ESPI_FAIL(
            ESP_ERR_MEMORY,
            "%zu bytes wanted for %s, but %zu are taken and esp_ctx_config.memory_limit is %zu: raise the limit or make batch, rank "
            "or context smaller",
            bytes, purpose_names[purpose], ctx->total, ctx->memory_limit);
    ESPI_TRY(ctx->device != NULL ? device_memory(ctx, bytes, &p) : host_memory(ctx, bytes, &p));
    ctx->live[purpose] += bytes;
    ctx->total += bytes;
    if (ctx->total > ctx->peak) ctx->peak = ctx->total;
    memcpy(out, &p, sizeof p);
    return ESP_OK;
}

void espi_ctx_free(esp_ctx *ctx, espi_purpose purpose, void *p, size_t bytes) {
    if (p == NULL) return;
    if (ctx->device != NULL)
        ctx->device_ops->free(ctx->device, p);
    else
        ctx->free(ctx->alloc_user, p, bytes);
    ctx->live[purpose] -= bytes;
    ctx->total -= bytes;
}

esp_status espi_ctx_alloc_host(esp_ctx *ctx, espi_purpose purpose, size_t bytes, void *out) {
    if (ctx->device == NULL) return espi_ctx_alloc(ctx, purpose, bytes, out);
    void *p = NULL;
    memcpy(out, &p, sizeof p);
    if (bytes == 0) return ESP_OK;
    ESPI_TRY(ctx->device_ops->alloc_host(ctx->device, bytes, &p));
    memset(p, 0, bytes);
    ctx->pinned += bytes;
    memcpy(out, &p, sizeof p);
    return ESP_OK;
}

void espi_ctx_free_host(esp_ctx *ctx, espi_purpose purpose, void *p, size_t bytes) {
    if (ctx->device == NULL) {
        espi_ctx_free(ctx, purpose, p, bytes);
    } else if (p != NULL) {
        ctx->device_ops->free_host(ctx->device, p);
        ctx->pinned -= bytes;
    }
}

esp_status espi_ctx_put(esp_ctx *ctx, void *to, const void *from, size_t bytes) {
    if (bytes == 0 || to == from) return ESP_OK;
    if (ctx->device != NULL) return ctx->device_ops->put(ctx->device, to, from, bytes);
    memcpy(to, from, bytes);
    return ESP_OK;
}

esp_status espi_ctx_get(esp_ctx *ctx, void *to, const void *from, size_t bytes) {
    if (bytes == 0 || to == from) return ESP_OK;
    if (ctx->device != NULL) return ctx->device_ops->get(ctx->device, to, from, bytes);
    memcpy(to, from, bytes);
    return ESP_OK;
}

esp_status espi_ctx_zero(esp_ctx *ctx, void *p, size_t bytes) {
    if (bytes == 0) return ESP_OK;
    if (ctx->device != NULL) return ctx->device_ops->zero(ctx->device, p, bytes);
    zero(ctx, p, bytes);
    return ESP_OK;
}

esp_status espi_ctx_wait(esp_ctx *ctx) {
    return ctx->device != NULL ? ctx->device_ops->wait(ctx->device) : ESP_OK;
}

esp_status espi_room_take(espi_room *room, esp_ctx *ctx, espi_purpose purpose, espi_extent extent) {
    *room = (espi_room){.purpose = purpose, .extent = extent};
    ESPI_TRY(espi_ctx_alloc(ctx, purpose, extent.main, &room->main));
    if (ctx->device == NULL) return ESP_OK;
    const esp_status status = espi_ctx_alloc_host(ctx, purpose, extent.host, &room->host);
    if (status != ESP_OK) espi_room_free(room, ctx);
    return status;
}

void espi_room_free(espi_room *room, esp_ctx *ctx) {
    espi_ctx_free(ctx, room->purpose, room->main, room->extent.main);
    espi_ctx_free_host(ctx, room->purpose, room->host, room->extent.host);
    *room = (espi_room){0};
}

espi_arena espi_room_arena(const espi_room *room, const esp_ctx *ctx) {
    return ctx->device != NULL ? espi_arena_over_both(room->main, room->host, room->extent)
                               : espi_arena_over(room->main, room->extent.main);
}

espi_arena espi_ctx_dry(const esp_ctx *ctx) {
    return espi_arena_dry(ctx->device != NULL);
}
