/// The context: backend, threads, memory accounting, log.  And the communicator it runs under.
#ifndef ESPALIER_CTX_H
#define ESPALIER_CTX_H

#include "espalier/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_ctx esp_ctx;
typedef struct esp_comm esp_comm;

/// One process, or one rank of a job, as the environment says:
///   alone     nothing set
///   mpirun    Open MPI, MPICH and what speaks its PMI; needs the shared object espalier_mpi beside the library
///   by hand   ESP_WORLD ranks, this one is ESP_RANK, they meet at ESP_RENDEZVOUS: "host:port", where rank 0 listens, or "file:FOLDER", which
///             all see.  ESP_HOST: the name under which others reach this machine (unset: all are on one machine)
/// ESP_DEADLINE: seconds that a call waits for the other ranks; default 300.
/// Collective: returns once all ranks have come and are found to be the same program, library, version and settings of the environment.
/// argc, argv [in,out]  may be NULL; what is meant for MPI is removed
/// comm [out]  not NULL where ranks have met but are not alike: for esp_comm_line() and esp_comm_abort()
/// ESP_ERR_MISMATCH: the sentence names what differs and on which rank; ESP_ERR_COMM: a rank did not come before the deadline;
/// ESP_ERR_UNSUPPORTED: under mpirun, but MPI cannot be used here
ESP_API esp_status esp_comm_init(esp_comm **comm, int *argc, char ***argv);
/// After the last collective call: the ranks wait for each other, so that none leaves while another still needs it, unless an earlier call
/// failed.  NULL is allowed.
ESP_API void esp_comm_destroy(esp_comm *comm);
/// comm may be NULL: rank 0 of 1.
ESP_API int esp_comm_rank(const esp_comm *comm);
ESP_API int esp_comm_size(const esp_comm *comm);
/// How many ranks of a lower number are on this rank's host, which is a name and a boot: containers of one machine that have names of their
/// own count as several.  0 for comm NULL.
ESP_API int esp_comm_local_rank(const esp_comm *comm);

/// What failed on one rank, its files or callbacks, must end all: collective; returns ESP_OK where every rank says ESP_OK, else on all of
/// them the status and sentence of the lowest rank that does not.  With ESP_OK: nobody goes on before all have come.
/// A pass of a model that fails on one rank alone (its batch is refused, its rows are not finite) leaves the others within it.  When that
/// rank brings the status here, they end at once with the same status; when it ends its program, as soon as that is seen; else at the deadline.
/// what [in]  names the place in messages: "the end of step 3"
ESP_API esp_status esp_comm_agree(esp_comm *comm, const char *what, esp_status mine);
/// Collective; ESP_ERR_MISMATCH, naming `key` and the ranks, where `bytes` of data are not the same on all ranks.
ESP_API esp_status esp_comm_same(esp_comm *comm, const char *key, const void *data, size_t bytes);
/// The optimiser step that messages name from now on.  Not collective.
ESP_API void esp_comm_step(esp_comm *comm, int64_t step);

/// What a program ends with after `status`, alone or as a rank:
///   0 done   64 wrong use   65 bad input   70 anything else (memory, internal, ..)   71 what must be alike differs, between ranks or between
///   files   73 files: the operating system refused, no space   74 another rank or its connection is gone   75 a deadline passed   76 not finite
ESP_API int esp_comm_exit_code(const esp_comm *comm, esp_status status);
/// The one line about a failure, without newline: rank, host, step, the call or the one before, layer, number of the call, status and
/// sentence.  Alone: status and sentence.
ESP_API void esp_comm_line(esp_comm *comm, esp_status status, char *line, size_t bytes);
/// Ends the job from this rank, whose program then exits with `code`.  Under mpirun all ranks are killed and this does not return.  By hand
/// the connections are closed, which the others find; those of this machine that do not within 3 seconds (stopped, or busy) are killed.
ESP_API void esp_comm_abort(esp_comm *comm, int code);

typedef enum esp_log_level { ESP_LOG_ERROR = 0, ESP_LOG_WARN = 1, ESP_LOG_INFO = 2, ESP_LOG_SELECT = 3, ESP_LOG_DEBUG = 4 } esp_log_level;

/// Receives one finished line (no newline).  Called on the thread that made the call.
typedef void (*esp_log_fn)(void *user, esp_log_level level, const char *line);

/// Told to a program that has to end now, by itself and without calling the library: _exit(code).  Called on a thread of the library's.
typedef void (*esp_comm_end_fn)(void *user, int code, const char *line);
/// Watches over this rank, on a thread that makes no call between ranks.  log gets a warning when a call has taken a quarter of its
/// deadline, and the last calls when one failed for its deadline or because the ranks went different ways.  end is called when the job has
/// ended without this rank, which is busy elsewhere; when a call does not return though its deadline is over; when an abort does not return.
ESP_API esp_status esp_comm_watch(esp_comm *comm, esp_log_fn log, esp_comm_end_fn end, void *user);

/// Allocator hooks.  alloc returns `bytes` bytes aligned to 64, or NULL; free takes what alloc gave.
typedef void *(*esp_alloc_fn)(void *user, size_t bytes);
typedef void (*esp_free_fn)(void *user, void *p, size_t bytes);

typedef struct esp_ctx_config {
    size_t struct_size;
    esp_comm *comm; ///< NULL: alone
    /// "auto" (default) or "cpu": products of f32, in the best instruction set there is; "cpu-bf16": the same, but products with 4-bit
    /// experts round what they multiply to bf16 (sums stay f32), which is twice as fast where the machine has it; "ref" (f32 storage, f64
    /// sums) or "ref64" (all f64); "cuda": a GPU, on which tensors that the library hands out (hidden states, parameters) lie in the GPU's
    /// memory; "any": "cuda" where there is a usable GPU, else "cpu".  Of the GPUs that CUDA_VISIBLE_DEVICES leaves a process, a rank takes
    /// the one with the number esp_comm_local_rank(), counted on from 0 behind the last
    const char *backend;
    /// OpenMP threads; 0 = OMP_NUM_THREADS or the number of cores.  Where the machine's memory has several nodes, and the process may use
    /// processors of more than one, OpenMP's threads other than the calling one are bound to the processors of a node each, and memory is
    /// spread over the nodes, until the context is destroyed; not where OMP_PROC_BIND or OMP_PLACES bind them, or with ESP_NUMA=0
    int threads;
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
