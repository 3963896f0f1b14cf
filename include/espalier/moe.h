/// The block level: one Mixture-of-Experts layer on your own tensors.
#ifndef ESPALIER_MOE_H
#define ESPALIER_MOE_H

#include "espalier/ctx.h"
#include "espalier/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_moe esp_moe;

typedef struct esp_moe_config {
    size_t struct_size;
    int64_t hidden, experts, top_k, width; ///< H, E, K, I: all required
    bool plain_topk_weights;               ///< use the softmax probabilities as they are; default: renormalise them over the K selected
    esp_qformat format;                    ///< default ESP_NF4; ESP_Q_NONE keeps f32
    int64_t lora_rank;                     ///< 0 = no LoRA
    float lora_alpha;                      ///< default 2 * lora_rank
    uint64_t seed;
    bool train_router; ///< give the router a gradient too
} esp_moe_config;
#define ESP_MOE_CONFIG(...) ((esp_moe_config){.struct_size = sizeof(esp_moe_config), __VA_ARGS__})

ESP_API esp_status esp_moe_create(esp_moe **moe, esp_ctx *ctx, const esp_moe_config *config);
ESP_API void esp_moe_destroy(esp_moe *moe);

/// router [in] [E,H] f32, copied.
ESP_API esp_status esp_moe_set_router(esp_moe *moe, const float *router);
/// gate, up [in] [I,H]; down [in] [H,I], f32, quantised as they come; e in [0,E).
ESP_API esp_status esp_moe_set_expert(esp_moe *moe, int64_t e, const float *gate, const float *up, const float *down);

/// Trainable tensors: data and gradient, dtype of the context's activations.  Any pointer argument may be NULL.
typedef enum esp_moe_param {
    ESP_MOE_GATE_UP_A = 0, ///< [E,R,H]
    ESP_MOE_GATE_UP_B = 1, ///< [E,2I,R]
    ESP_MOE_DOWN_A = 2,    ///< [E,R,I]
    ESP_MOE_DOWN_B = 3,    ///< [E,H,R]
    ESP_MOE_ROUTER = 4     ///< [E,H]; data is read-only f32, gradient only with train_router
} esp_moe_param;
ESP_API esp_status esp_moe_param_get(esp_moe *moe, esp_moe_param which, void **data, void **grad, int64_t *count);

/// Bytes of the two memories that a pair of calls on T tokens needs.
typedef struct esp_moe_memory {
    size_t struct_size;
    size_t saved, scratch;
} esp_moe_memory;
#define ESP_MOE_MEMORY_INIT                                                                                                                \
    { .struct_size = sizeof(esp_moe_memory) }
ESP_API esp_status esp_moe_sizes(esp_moe *moe, int64_t n_tokens, esp_moe_memory *out);

/// Forward of one MoE block.  Twin: esp_moe_backward().
/// out     [out]    [T,H] overwritten; dtype of the context (f32; f64 under "ref64")
/// x       [in]     [T,H]
/// saved   [out]    esp_moe_sizes().saved bytes, aligned to 64; what the twin reads; x must stay unchanged until then
/// scratch [in,out] contents lost
/// ESP_ERR_STATE: router or an expert was never set
ESP_API esp_status esp_moe_forward(esp_moe *moe, void *out, const void *x, int64_t n_tokens, void *saved, void *scratch);

/// Backward of one MoE block: d_out -> d_x; adds into LoRA (and, if trained, router) gradients.  Twin: esp_moe_forward().
/// d_x     [out]    [T,H]  overwritten; may not overlap d_out
/// d_out   [in]     [T,H]
/// x       [in]     as the twin had it
/// saved   [in]     exactly what the twin wrote for this batch
/// scratch [in,out] contents lost
/// ESP_ERR_SHAPE if T differs from the twin's call; ESP_ERR_STATE without a forward before; ESP_ERR_ARG if a memory is NULL or not aligned to 64
ESP_API esp_status esp_moe_backward(esp_moe *moe, void *d_x, const void *d_out, const void *x, int64_t n_tokens, void *saved,
                                    void *scratch);

#ifdef __cplusplus
}
#endif
#endif
