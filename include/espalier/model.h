/// The model level: load a Hugging Face folder, forward to hidden states, backward into LoRA gradients, save the adapter.
#ifndef ESPALIER_MODEL_H
#define ESPALIER_MODEL_H

#include "espalier/ctx.h"
#include "espalier/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_model esp_model;
typedef struct esp_objective esp_objective;           /* grpo.h */
typedef struct esp_adapter_config esp_adapter_config; /* adapter.h */

/// What trains: bit set for esp_model_config.lora_targets.
enum {
    ESP_LORA_Q = 1,
    ESP_LORA_K = 2,
    ESP_LORA_V = 4,
    ESP_LORA_O = 8,
    ESP_LORA_GATE_UP = 16, ///< per expert: gate and up share one A [R,H]; B is [2I,R]
    ESP_LORA_DOWN = 32,    ///< per expert
    ESP_LORA_ATTENTION = 15,
    ESP_LORA_EXPERTS = 48,
    ESP_LORA_ALL = 63,
    ESP_LORA_NOTHING = 64 ///< no adapter at all (0 means the default)
};

typedef struct esp_model_config {
    size_t struct_size;
    esp_qformat experts;      ///< default ESP_NF4; where the checkpoint has MXFP4, that is the default and the only choice
    bool double_quant;        ///< hold the block scales in 8 bits, as bitsandbytes does: about 0.37 bits a weight less
    int lora_rank;            ///< default 8
    float lora_alpha;         ///< default 2 * lora_rank
    bool rslora;              ///< scale alpha / sqrt(R) instead of alpha / R
    unsigned lora_targets;    ///< default ESP_LORA_ALL
    uint64_t seed;            ///< of the LoRA init: A uniform in +-1/sqrt(in), B = 0, Philox keyed (seed, layer, expert, matrix)
    size_t activation_budget; ///< bytes of saved activations; layers beyond it keep their input only and recompute.  0 = no bound
    float router_aux_coef;    ///< load-balancing loss added to every backward; default 0 (off)
    float router_z_coef;      ///< router z-loss; default 0 (off)
    bool train_router;        ///< also form gradients of router weights and sinks (for checks; the optimiser does not touch them)
    const char
        *adapter_dir; ///< a PEFT folder: take rank, scale and targets from it and load it (the lora_ fields and rslora are then ignored)
    const esp_adapter_config *adapter_reading; ///< how adapter_dir is read, where it does not say so itself; NULL = as it says
    esp_mxfp4_rule mxfp4_rule;                 ///< how plain experts become MXFP4; default OCP's
    /// Over how many ranks the experts of one model are spread; divides the number of ranks.  1: every rank holds all, and tokens stay; as
    /// many as there are ranks (default): one model, and tokens travel.  Results do not depend on it.
    int expert_ranks;
    int64_t expert_rows; ///< routed rows that a rank takes at once, the rest in rounds; default 1.5 times its even share
    /// Of a GPU: that many layers, evenly spread, keep their frozen weights in pinned memory of the host, and stand in one place on the GPU
    /// in turn, each brought there while the layers before it are computed.  The bits are the same.  Changes nothing on a CPU.
    int host_layers;
} esp_model_config;
#define ESP_MODEL_CONFIG(...) ((esp_model_config){.struct_size = sizeof(esp_model_config), __VA_ARGS__})

/// One packed batch: sequences one after the other, no padding.  Token-aligned arrays say something about the token at that place
/// (not about the one before it): old_logprob[t] is log p(tokens[t] | what stands before it).
typedef struct esp_batch {
    size_t struct_size;
    const int32_t *tokens;     ///< [T] ids in [0, V)
    const int32_t *cu_seqlens; ///< [n_seqs + 1], 0 first, T last, strictly ascending
    int64_t n_tokens;          ///< T; 0 is allowed and does nothing
    int32_t n_seqs;
    const uint8_t *loss_mask;       ///< [T] 1 = the loss counts this token; NULL = all but the first of each sequence without a prefix
    const float *advantage;         ///< [n_seqs] GRPO
    const float *old_logprob;       ///< [T] proximal policy; NULL = the current one (ratio exactly 1)
    const float *ref_logprob;       ///< [T] reference policy; needed when beta > 0
    const float *sampler_logprob;   ///< [T] the sampler's, NaN = absent; NULL = none
    const float *is_ratio;          ///< [T] rollout correction factors, constants of the loss; NULL = 1
    double step_tokens;             ///< loss tokens of the whole optimiser step; 0 = those of this batch
    double step_seqs;               ///< sequences of the whole optimiser step; 0 = those of this batch
    const esp_objective *objective; ///< GRPO: which loss; NULL = defaults
    /// [n_seqs] the sequence whose tokens stand before this one's, -1 = none; NULL = none has one.  So the prompt of a group of completions
    /// is computed once: the prompt is a sequence of its own, the completions name it.  Prefixes come before their users and have none
    /// themselves.  The first token of a sequence with a prefix is predicted by the prefix's last.  A prefix that counts no token is no
    /// sequence of the loss: its advantage is not read, and it does not count among step_seqs.
    const int32_t *prefix_of;
    /// Routing replay: [T,L,K] ids of the experts that each token was sent to when it was sampled (L all layers; what stands in layers
    /// without experts is not read), u8 where E <= 255, else u16.  All ones: routed natively, all K of a token and layer together; so is the
    /// last token of every sequence that is no prefix, which a sampler never feeds back (see last_follows).  Weights come from the current
    /// logits.  NULL: none.
    const void *routed_experts;
    void *record_experts; ///< [out] the same shape: what a forward chose (as replayed, where it was); NULL = not wanted
    int64_t n_routed;     ///< elements of these two arrays, T*L*K; 0 = neither is given
    int32_t routed_bytes; ///< of one element: 1 or 2
    int64_t n_kept;       ///< elements of kept_ids
    /// [T+1] which part of kept_ids belongs to a token: what top-k, top-p and min-p had left when it was sampled, ascending, itself among
    /// them.  Its log-probability and entropy are those of the softmax over these ids.  An empty part: over the vocabulary.  NULL: all are.
    const int64_t *kept_offsets;
    const int32_t *kept_ids;
    /// With routing replay: the caller reads nothing of what comes of the last token of a sequence that is no prefix, so it goes where the
    /// token before it went.  Then ranks that share experts know all their rows before the pass, and count them once for all layers.
    bool last_follows;
} esp_batch;
#define ESP_BATCH(...) ((esp_batch){.struct_size = sizeof(esp_batch), __VA_ARGS__})

/// Loads a folder with config.json and model.safetensors (or shards with an index).  Experts are turned to 4 bits one by one, so peak
/// memory is the packed model plus one staging buffer of at most 64 MiB.  Collective over the context's comm: a rank reads its own experts
/// alone, and all ranks have a model or none.
/// ESP_ERR_FORMAT / ESP_ERR_SHAPE name file and tensor; ESP_ERR_UNSUPPORTED names the family and what is offered; ESP_ERR_MISMATCH on all
/// ranks names what differs between them, of config.json or of `config`, before a weight is read
ESP_API esp_status esp_model_load(esp_model **model, esp_ctx *ctx, const char *dir, const esp_model_config *config);
ESP_API void esp_model_destroy(esp_model *model);

/// What the folder's config.json says, and what was made of it.
typedef struct esp_model_info {
    size_t struct_size;
    const char *family;
    int64_t layers, hidden, heads, kv_heads, head_dim, experts, top_k, expert_width, vocab, max_position;
    int64_t lora_rank, adapter_parameters;
    int64_t bos_token_id, eos_token_id, pad_token_id; ///< -1 = not stated
    size_t weight_bytes;
} esp_model_info;
#define ESP_MODEL_INFO_INIT                                                                                                                \
    { .struct_size = sizeof(esp_model_info) }
ESP_API esp_status esp_model_info_get(const esp_model *model, esp_model_info *out);

/// Forward to the final-norm hidden states.  Twin: esp_model_backward().
/// Collective over the context's ranks: every rank has a batch of its own, one of no tokens where it has nothing to do.
/// hidden [out]  [T,H] view into the activation block (f32; f64 under "ref64"), valid until the next forward or backward of this model
/// ESP_ERR_ARG: an id outside the vocabulary or that stands for a picture, a malformed cu_seqlens or prefix_of, a sequence longer than the
/// context (with its prefix)
ESP_API esp_status esp_model_forward(esp_model *model, const esp_batch *batch, esp_tensor *hidden);

/// The same without saving anything for a backward.  Collective.
ESP_API esp_status esp_model_forward_only(esp_model *model, const esp_batch *batch, esp_tensor *hidden);

/// Backward of the last esp_model_forward(): adds into the LoRA gradients.  Twin: esp_model_forward().
/// Collective: what every rank's batch adds to a gradient is added on all ranks that hold it, in rank order, so R ranks with a batch each
/// leave the bits that one rank leaves after the same batches one after the other.
/// d_hidden [in]  [T,H] gradient of the loss by the hidden states; same dtype as `hidden`
/// ESP_ERR_STATE: no forward before, or another batch; ESP_ERR_SHAPE: d_hidden is not [T,H]
ESP_API esp_status esp_model_backward(esp_model *model, const esp_batch *batch, const esp_tensor *d_hidden);

/// Turns the adapter off (the frozen base answers: the reference policy of GRPO) or on again.
ESP_API esp_status esp_model_adapter_enable(esp_model *model, bool on);

/// Head modes without logits.  Rows are those tokens that the mask counts; see esp_batch.
/// logprob [out] [T] f32, entropy [out] [T] f32 or NULL: 0 where the mask does not count
ESP_API esp_status esp_model_logprob(esp_model *model, const esp_batch *batch, const esp_tensor *hidden, float temperature, float *logprob,
                                     float *entropy);

/// Cross-entropy, summed over the counted tokens and divided by batch.step_tokens (one global denominator under accumulation).
/// loss [out]; d_hidden [out] view [T,H] in the activation block, NULL = loss only
ESP_API esp_status esp_model_cross_entropy(esp_model *model, const esp_batch *batch, const esp_tensor *hidden, double *loss,
                                           esp_tensor *d_hidden);

/// Full logits [T,V] for those who ask: logits [out] caller's memory, T*V f32.
ESP_API esp_status esp_model_logits(esp_model *model, const esp_tensor *hidden, float *logits, size_t logits_count);

/// Called from inside a pass with an intermediate tensor, for debugging and for `espalier verify`.  Names: "h" (residual stream before
/// layer `layer`; layer = L: input of the final norm), "norm1", "q_norm", "k_norm", "q", "k", "v", "lse", "attn", "h1", "norm2",
/// "router_logits", "topk_idx" (ESP_I32), "topk_w", "gu", "act", "down" (routed rows, in slot order [T,K,..]), "moe_out", "hidden"; and in
/// a backward the same with "d_" in front for the gradient of: "h", "h1", "norm1", "norm2", "q", "k", "v", "attn", "router_logits",
/// "topk_w", "hidden". The tensor is only valid during the call.
typedef void (*esp_probe_fn)(void *user, const char *name, int64_t layer, const esp_tensor *tensor);
ESP_API esp_status esp_model_set_probe(esp_model *model, esp_probe_fn fn, void *user);

/// Makes room for batches of up to n_tokens in n_seqs sequences now, rather than at the first call that needs it.
/// training: also for the backward and the loss head.  When room must grow, hidden, d_hidden and what a forward saved are lost.  ESP_ERR_MEMORY: the context's limit
ESP_API esp_status esp_model_reserve(esp_model *model, int64_t n_tokens, int32_t n_seqs, bool training);

/// Load-balancing loss and z-loss of the last forward, over all MoE layers and tokens (formats-and-numerics 4.9), not yet times their
/// coefficients.  Tokens count as they run: those of a shared prompt (esp_batch.prefix_of) once.  A balanced router has load-balancing loss K.
ESP_API esp_status esp_model_router_losses(esp_model *model, double *aux_loss, double *z_loss);

/// Of the last forward, with routing replay: how many pairs of a token and a layer were replayed, and how many of those the router would
/// now send to another set of experts.  Both 0 without replay.
ESP_API esp_status esp_model_route_flips(esp_model *model, int64_t *flips, int64_t *replayed);

/// One trainable tensor.  data and grad are live: f32 (f64 under "ref64"), dims as PEFT's per-expert view.  Of experts that are spread over
/// ranks (esp_model_config.expert_ranks) E counts those of this rank.
typedef struct esp_param {
    size_t struct_size;
    const char *name;  ///< "layers.0.mlp.experts.gate_up.lora_A"
    void *data, *grad; ///< [E,R,in] or [E,out,R] for experts, [R,in] or [out,R] for attention
    int64_t dims[3];
    int32_t rank;
    esp_dtype dtype;
} esp_param;
#define ESP_PARAM_INIT                                                                                                                     \
    { .struct_size = sizeof(esp_param) }
ESP_API int64_t esp_model_param_count(const esp_model *model);
ESP_API esp_status esp_model_param_get(esp_model *model, int64_t index, esp_param *out);
ESP_API esp_status esp_model_zero_grad(esp_model *model);

/// PEFT files: adapter_config.json and adapter_model.safetensors, in the form that vLLM loads for the family (adapter.h has others).
/// Written to a temporary name, flushed, renamed.  Collective over the context's comm: all ranks give one folder that all of them see, each
/// writes what it holds, and the files have the bytes that one rank would write.
ESP_API esp_status esp_model_save_adapter(esp_model *model, const char *dir);
/// Ranks, targets and shapes must be those of the model's config: ESP_ERR_MISMATCH names the first that is not.  Collective; each rank takes
/// what is its own, and the models change on all ranks or on none.
ESP_API esp_status esp_model_load_adapter(esp_model *model, const char *dir);

#ifdef __cplusplus
}
#endif
#endif
