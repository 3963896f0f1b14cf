/// The optimiser: AdamW over the adapter, with clipping and a schedule.
#ifndef ESPALIER_OPTIM_H
#define ESPALIER_OPTIM_H

#include "espalier/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_optim esp_optim;

/// Multipliers of the base learning rate, as transformers has them.
typedef enum esp_schedule {
    ESP_SCHEDULE_CONSTANT = 0,
    ESP_SCHEDULE_LINEAR = 1,
    ESP_SCHEDULE_COSINE = 2,
    ESP_SCHEDULE_COSINE_WITH_RESTARTS = 3 ///< falls from 1 to 0 in every cycle
} esp_schedule;

typedef struct esp_adamw_config {
    size_t struct_size;
    float lr;                          ///< default 1e-3
    float beta1, beta2;                ///< default 0.9, 0.999
    float eps;                         ///< default 1e-8
    float weight_decay;                ///< default 0
    float max_grad_norm;               ///< default 1; negative = no clipping
    esp_schedule schedule;             ///< default constant
    float num_cycles;                  ///< of the cosine schedules; default 0.5 (cosine: falls once), 1 (with restarts)
    int64_t warmup_steps, total_steps; ///< total_steps is needed by all schedules but constant
    bool eight_bit;                    ///< moments in bitsandbytes' blockwise 8-bit form, for tensors of at least 4096 values
    bool host_moments; ///< of a GPU: moments stay in pinned memory of the host, and go over the bus piece by piece while they
                       ///< are updated; the bits are the same.  Changes nothing on a CPU
} esp_adamw_config;
#define ESP_ADAMW_CONFIG(...) ((esp_adamw_config){.struct_size = sizeof(esp_adamw_config), __VA_ARGS__})

/// torch.optim.AdamW (decay before the update, eps after the bias correction), or bitsandbytes' AdamW8bit.
/// The optimiser keeps a reference to the model and must be destroyed before it.
ESP_API esp_status esp_adamw_create(esp_optim **optim, esp_model *model, const esp_adamw_config *config);
ESP_API void esp_optim_destroy(esp_optim *optim);

/// Collective.  Clips by the global norm (max_norm / (norm + 1e-6), at most 1), updates, zeroes the gradients.  A norm that is not finite skips the
/// update, counts it and logs a warning; the gradients are zeroed all the same.
ESP_API esp_status esp_optim_step(esp_optim *optim);

typedef struct esp_optim_stats {
    size_t struct_size;
    int64_t step;     ///< completed steps, skipped ones not counted
    int64_t skipped;  ///< steps skipped because the norm was not finite
    double grad_norm; ///< of the last step, before clipping
    double lr;        ///< used by the last step
} esp_optim_stats;
#define ESP_OPTIM_STATS_INIT                                                                                                               \
    { .struct_size = sizeof(esp_optim_stats) }
ESP_API esp_status esp_optim_stats_get(const esp_optim *optim, esp_optim_stats *out);

/// The multiplier for optimiser step n = 0, 1, ..: with warm-up the first is 0.  num_cycles as in esp_adamw_config, 0 = its default.
ESP_API double esp_schedule_multiplier(esp_schedule schedule, int64_t n, int64_t warmup_steps, int64_t total_steps, double num_cycles);

/// One saved state array, for checkpoints: moments, their block scales.  count values of `dtype`.
typedef struct esp_optim_array {
    size_t struct_size;
    const char *name; ///< "layers.0.self_attn.q_proj.lora_A/m", "../v", "../absmax_m", "../absmax_v"
    void *data;
    int64_t count;
    esp_dtype dtype;
} esp_optim_array;
#define ESP_OPTIM_ARRAY_INIT                                                                                                               \
    { .struct_size = sizeof(esp_optim_array) }
ESP_API int64_t esp_optim_array_count(const esp_optim *optim);
ESP_API esp_status esp_optim_array_get(esp_optim *optim, int64_t index, esp_optim_array *out);
/// Sets the step counters (after the arrays have been filled from a checkpoint).
ESP_API esp_status esp_optim_restore(esp_optim *optim, int64_t step, int64_t skipped);

#ifdef __cplusplus
}
#endif
#endif
