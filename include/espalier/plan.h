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
} esp_plan;
#define ESP_PLAN_INIT                                                                                                                      \
    { .struct_size = sizeof(esp_plan) }

/// From config.json alone; no weight is read.
/// config, adamw [in]  NULL = all defaults
/// n_tokens, n_seqs [in]  the largest batch of one forward and backward
ESP_API esp_status esp_plan_folder(esp_plan *out, esp_ctx *ctx, const char *dir, const esp_model_config *config,
                                   const esp_adamw_config *adamw, int64_t n_tokens, int32_t n_seqs);

#ifdef __cplusplus
}
#endif
#endif
