/// The context: backend, threads, memory accounting, log.  And the communicator it runs under.
#ifndef ESPALIER_CTX_H
#define ESPALIER_CTX_H

#include "espalier/status.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_ctx esp_ctx;
typedef struct esp_comm esp_comm;

/// One process, or one rank of a job.  This version runs alone: under a launcher with more than one rank it returns
/// ESP_ERR_UNSUPPORTED and says so, rather than training the same model N times.
/// argc, argv [in,out]  may be NULL; launcher options would be removed
ESP_API esp_status esp_comm_init(esp_comm **comm, int *argc, char ***argv);
ESP_API void esp_comm_destroy(esp_comm *comm);
/// comm may be NULL: rank 0 of 1.
ESP_API int esp_comm_rank(const esp_comm *comm);
ESP_API int esp_comm_size(const esp_comm *comm);

typedef enum esp_log_level { ESP_LOG_ERROR = 0, ESP_LOG_WARN = 1, ESP_LOG_INFO = 2, ESP_LOG_SELECT = 3, ESP_LOG_DEBUG = 4 } esp_log_level;

/// Receives one finished line (no newline).  Called on the thread that made the call.
typedef void (*esp_log_fn)(void *user, esp_log_level level, const char *line);

/// Allocator hooks.  alloc returns `bytes` bytes aligned to 64, or NULL; free takes what alloc gave.
typedef void *(*esp_alloc_fn)(void *user, size_t bytes);
typedef void (*esp_free_fn)(void *user, void *p, size_t bytes);

typedef struct esp_ctx_config {
    size_t struct_size;
    esp_comm *comm; ///< NULL: alone
    /// "auto" (default) or "cpu": products of f32, in the best instruction set there is; "cpu-bf16": the same, but products with 4-bit experts
    /// round what they multiply to bf16 (sums stay f32), which is twice as fast where the machine has it; "ref" (f32 storage, f64 sums) or "ref64" (all f64); "cuda": a GPU, on which tensors that the library hands
    /// out (hidden states, parameters) lie in the GPU's memory; "any": "cuda" where there is a usable GPU, else "cpu"
    const char *backend;
    int threads;         ///< OpenMP threads; 0 = OMP_NUM_THREADS or the number of cores
    size_t memory_limit; ///< bytes; 0 = none.  Passing it is ESP_ERR_MEMORY, never an abort
    esp_log_fn log;      ///< NULL: standard error, when the environment asks (ESP_LOG=error|warn|info|select|debug)
    void *log_user;
    esp_alloc_fn alloc; ///< NULL: aligned_alloc.  Both hooks or none
    esp_free_fn free;
    void *alloc_user;
} esp_ctx_config;
#define ESP_CTX_CONFIG(...) ((esp_ctx_config){.struct_size = sizeof(esp_ctx_config), __VA_ARGS__})

/// Not collective.  One context per thread of the caller; a context is not to be used from two threads at once.
/// config [in]  NULL = all defaults
/// ESP_ERR_ARG on an unknown backend name (the sentence lists the known ones); ESP_ERR_UNSUPPORTED: "cuda" where there is no usable GPU,
/// "cpu-bf16" where the machine has no such products
ESP_API esp_status esp_ctx_create(esp_ctx **ctx, const esp_ctx_config *config);

/// NULL is allowed.  Objects made with the context must be destroyed first.
ESP_API void esp_ctx_destroy(esp_ctx *ctx);

/// Name of the backend in use: "cpu", "cuda", "ref" or "ref64".
ESP_API const char *esp_ctx_backend(const esp_ctx *ctx);

/// Bytes taken through the context's allocator, by purpose.  `peak` is the high-water mark of the sum of the live ones.
typedef struct esp_memory {
    size_t struct_size;
    size_t live, peak;
    size_t weights, adapter, optimizer, activations, cache, staging; ///< live bytes of each purpose
    size_t activations_used; ///< high-water mark inside the activation block; equals `activations` when the plan was exact
    size_t pinned;           ///< host memory taken beside a GPU's, not part of the other figures; 0 on a CPU
} esp_memory;
#define ESP_MEMORY_INIT                                                                                                                    \
    { .struct_size = sizeof(esp_memory) }
ESP_API esp_status esp_ctx_memory(const esp_ctx *ctx, esp_memory *out);

#ifdef __cplusplus
}
#endif
#endif
