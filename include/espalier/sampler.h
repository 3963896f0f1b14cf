/// Generation with a KV cache on the training model itself: its log-probabilities are bit-equal to the trainer's on CPU.
#ifndef ESPALIER_SAMPLER_H
#define ESPALIER_SAMPLER_H

#include "espalier/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_sampler esp_sampler;

typedef struct esp_sampler_config {
    size_t struct_size;
    int32_t max_sequences; ///< rows decoded together; default 128.  More requests are served in waves
    int32_t max_length;    ///< prompt + completion of one sequence; default: the model's context, at most 4096
} esp_sampler_config;
#define ESP_SAMPLER_CONFIG(...) ((esp_sampler_config){.struct_size = sizeof(esp_sampler_config), __VA_ARGS__})

/// Takes cache and working memory once.  Destroy before the model.
ESP_API esp_status esp_sampler_create(esp_sampler **sampler, esp_model *model, const esp_sampler_config *config);
ESP_API void esp_sampler_destroy(esp_sampler *sampler);

/// Token number `index` of row `row`, in order within a row; rows of one pass from the lowest up.  A non-zero return ends the call with
/// ESP_ERR_CALLBACK; what was drawn until then is in the caller's arrays.
typedef int (*esp_token_fn)(void *user, int32_t row, int32_t index, int32_t id, float logprob);

/// A request: each prompt is prefilled once and continued `samples` times.
typedef struct esp_generate_config {
    size_t struct_size;
    const int32_t *prompts;    ///< packed ids
    const int32_t *cu_prompts; ///< [n_prompts+1], 0 first, strictly ascending
    int32_t n_prompts;
    int32_t samples;         ///< per prompt; default 1
    int32_t max_new_tokens;  ///< default 16
    float temperature;       ///< default 1
    bool greedy;             ///< largest logit, lowest id on ties; log-probabilities at temperature 1
    const int32_t *stop_ids; ///< generation ends with (and includes) one of these; NULL: the model's eos
    int32_t n_stop_ids;
    uint64_t seed; ///< with step, key and the sample's number: the Philox counter, so no draw depends on the batch
    uint32_t step;
    bool evaluation;       ///< a stream of its own, so evaluating never changes training
    const uint32_t *keys;  ///< [n_prompts] a stable number of each prompt; NULL: its index
    esp_token_fn on_token; ///< called with every token as it is drawn; NULL: none
    void *on_token_user;
} esp_generate_config;
#define ESP_GENERATE_CONFIG(...) ((esp_generate_config){.struct_size = sizeof(esp_generate_config), __VA_ARGS__})

/// Row p*samples + g belongs to sample g of prompt p.
/// tokens   [out] [n_prompts*samples, max_new_tokens] ids, the stop id included, 0 behind the end
/// logprobs [out] the same shape f32, or NULL
/// lengths  [out] [n_prompts*samples]
/// stopped  [out] [n_prompts*samples] 1 = ended with a stop id, 0 = cut at max_new_tokens, or before a token that the model does not take
///                (one that stands for a picture); or NULL
/// ESP_ERR_ARG: an empty prompt, an id outside the vocabulary, a prompt that leaves no room for max_new_tokens (names the prompt)
ESP_API esp_status esp_sampler_generate(esp_sampler *sampler, const esp_generate_config *config, int32_t *tokens, float *logprobs,
                                        int32_t *lengths, uint8_t *stopped);

/// Bytes that esp_sampler_create would take, exactly.
ESP_API esp_status esp_sampler_plan(esp_model *model, const esp_sampler_config *config, size_t *bytes);

#ifdef __cplusplus
}
#endif
#endif
