/// What a training run will take, before anything is allocated.
#ifndef ESPALIER_PLAN_H
#define ESPALIER_PLAN_H

#include "espalier/optim.h"

#ifdef __cplusplus
extern "C" {
#endif

/// Bytes by part.  peak is what esp_ctx_memory().peak will read after training on such batches: exact, found by walking the run dry.
typedef struct esp_plan {
    size_t struct_size;
    size_t dense_weights,
        expert_weights; ///< frozen; experts in their 4-bit form.  Of a GPU: without an embedding that is not the head too,
                        ///< which stays in the host's memory
    size_t adapter, gradients, optimizer;
    size_t activations;        ///< one block: what the forward keeps, the loss head, the scratch of every op
    size_t head;               ///< of that, the loss head's part: constant in T but for a few values a token
    size_t staging;            ///< while loading only
    size_t total;              ///< weights + adapter + gradients + optimizer + activations
    size_t peak;               ///< the larger of total and of weights + staging while loading
    int64_t layers_recomputed; ///< layers that keep their input only, under esp_model_config.activation_budget
    size_t host_weights;       ///< of a GPU: frozen weights in pinned memory of the host, an embedding and the layers of
                               ///< esp_model_config.host_layers, for which expert_weights has the place of one; in none of the sums
    size_t host_moments;       ///< of a GPU with esp_adamw_config.host_moments: pinned memory of the host, in none of the sums
} esp_plan;
#define ESP_PLAN_INIT                                                                                                                      \
    { .struct_size = sizeof(esp_plan) }

/// From config.json alone; no weight is read.
/// config, adamw [in]  NULL = all defaults
/// n_tokens, n_seqs [in]  the largest batch of one forward and backward
ESP_API esp_status esp_plan_folder(esp_plan *out, esp_ctx *ctx, const char *dir, const esp_model_config *config,
                                   const esp_adamw_config *adamw, int64_t n_tokens, int32_t n_seqs);

/// Is there room for it?  Ask before anything is loaded: a rank that takes more than there is gets killed without a word.  Of the ranks on one
/// host the sum is compared with the smallest of its free memory and of what the limits of their control groups leave; of those on one GPU
/// with its free memory; and `peak` with esp_ctx_config.memory_limit.  A limit that cannot be read is none; the log tells (info).  Collective.
/// peak [in]  bytes that this rank is going to take: esp_plan.peak, or of esp_trainer_plan()
/// host [in]  on a GPU, bytes in the memory of the host: esp_plan.host_weights + host_moments, or of esp_trainer_plan()
/// ESP_ERR_MEMORY on all ranks: it does not fit somewhere; the sentence has the numbers
ESP_API esp_status esp_plan_check(esp_ctx *ctx, size_t peak, size_t host);

/// What a rank can do, as esp_plan_placement() reckons.
typedef struct esp_machine {
    size_t struct_size;
    double flops;            ///< operations a second in the products of a pass
    double bytes_per_second; ///< that a rank sends, all of them sending at once
    double seconds_per_call; ///< of an exchange of nothing
    size_t memory;           ///< bytes for each rank; 0 = not looked at
    /// How many weights of frozen experts a rank reads and unpacks a second: a pass reads all of them however few rows it has, once
    /// forward and once back.  0 = as fast as need be.
    double weights_per_second;
    double skew; ///< routed rows of the busiest of the ranks that share a model's experts, over their mean; 0 = 1, even
} esp_machine;
#define ESP_MACHINE(...) ((esp_machine){.struct_size = sizeof(esp_machine), __VA_ARGS__})

/// A way to place the experts of a job, and a prediction of what comes of it: products, reading of experts, messages; nothing overlapping.
typedef struct esp_placement {
    size_t struct_size;
    int32_t ranks;                            ///< [in]
    int32_t micro_batches;                    ///< [in] of each rank in an optimiser step; default 1
    int32_t expert_ranks;                     ///< over how many ranks the experts of one model are spread
    esp_plan plan;                            ///< memory of the rank that holds most experts: exact
    double exchange_bytes;                    ///< that the busiest gets for one layer of experts, forward and backward of a micro-batch
    double sum_bytes;                         ///< that a rank sends to add up gradients, after every micro-batch
    double seconds_compute, seconds_exchange; ///< of one micro-batch
    double seconds_sum;                       ///< of one micro-batch
    double seconds;                           ///< of an optimiser step
    bool fits;                                ///< plan.peak is within esp_machine.memory
} esp_placement;
#define ESP_PLACEMENT(...) ((esp_placement){.struct_size = sizeof(esp_placement), __VA_ARGS__})

/// From config.json alone, on one process.  n_tokens, n_seqs: of one micro-batch.
/// out [in,out]  ranks and micro_batches are read.  config.expert_ranks: which placement; 0 = all ranks
/// ESP_ERR_ARG: expert_ranks does not divide ranks
ESP_API esp_status esp_plan_placement(esp_placement *out, esp_ctx *ctx, const char *dir, const esp_model_config *config,
                                      const esp_adamw_config *adamw, int64_t n_tokens, int32_t n_seqs, const esp_machine *machine);

#ifdef __cplusplus
}
#endif
#endif
