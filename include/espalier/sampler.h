/// Generation with a KV cache on the training model itself: its log-probabilities are bit-equal to the trainer's on CPU.
#ifndef ESPALIER_SAMPLER_H
#define ESPALIER_SAMPLER_H

#include "espalier/model.h"
#include "espalier/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct esp_sampler esp_sampler;

typedef struct esp_sampler_config {
    size_t struct_size;
    int32_t max_sequences;  ///< rows decoded together; default 128.  Where more are asked for, one begins when another has ended
    int32_t max_length;     ///< prompt + completion of one sequence; default: the model's context, at most 4096
    int32_t max_kept;       ///< most ids that top_k, top_p or min_p may leave for a token; default: the vocabulary, at most 1024
    bool record_routes;     ///< esp_drawn.routed_experts can be asked for
    int32_t max_new_tokens; ///< longest completion, and
    int32_t max_prompts;    ///< prompts held at once: with both, the cache has max_sequences completions of max_new_tokens and max_prompts
                            ///< prompts of the rest of max_length, each held once for all its samples.  Default: any cut of max_length
} esp_sampler_config;
#define ESP_SAMPLER_CONFIG(...) ((esp_sampler_config){.struct_size = sizeof(esp_sampler_config), __VA_ARGS__})

/// Takes cache and working memory once.  Destroy before the model.
ESP_API esp_status esp_sampler_create(esp_sampler **sampler, esp_model *model, const esp_sampler_config *config);
ESP_API void esp_sampler_destroy(esp_sampler *sampler);

/// Token number `index` of row `row`, in order within a row; rows of one pass from the lowest up.  A non-zero return ends the call with
/// ESP_ERR_CALLBACK; what was drawn until then is in the caller's arrays.
typedef int (*esp_token_fn)(void *user, int32_t row, int32_t index, int32_t id, float logprob);

/// One drawn token with all that training wants to know of it.  What it points to is valid during the call.
typedef struct esp_drawn {
    size_t struct_size;
    int32_t row, index, id;
    float logprob;       ///< under the distribution that it was drawn from: filtered, at the request's temperature
    bool last, stopped;  ///< the row ends with it (but for one cut before a token that the model does not take); by a stop id or string
    const int32_t *kept; ///< [n_kept] ids that the filters left, ascending; see esp_batch.kept_ids
    int32_t n_kept;      ///< 0 = nothing was filtered
    int32_t n_routed;    ///< tokens that the row was fed since its last draw: the prompt before token 0, then the token drawn last
    const void *routed_experts; ///< [n_routed,L,K] of theirs, in esp_batch's form; NULL unless record_routes
} esp_drawn;
typedef int (*esp_drawn_fn)(void *user, const esp_drawn *drawn);

/// Text of a row as it becomes certain: whole characters, never part of a stop string, and together the completion without the stop string
/// or stop id.  text is NUL-terminated; bytes may be 0 with `last`.  Special tokens give no text.
typedef int (*esp_text_fn)(void *user, int32_t row, const char *text, size_t bytes, bool last);

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
    int32_t top_k;         ///< filters, in this order, ties to the lower id: the top_k most likely tokens; 0 = all
    float top_p;           ///< of those the fewest that have top_p of their probability; 0 or 1 = all
    float min_p;           ///< of those the ones with at least min_p of the largest probability; 0 = all
    esp_drawn_fn on_drawn; ///< as on_token, with kept ids and routed experts; NULL: none
    void *on_drawn_user;
    const esp_tokenizer *tokenizer;  ///< for stop_strings and on_text
    const char *const *stop_strings; ///< [n_stop_strings] a row ends with the token that completes one of these in its text
    int32_t n_stop_strings;
    esp_text_fn on_text; ///< NULL: none
    void *on_text_user;
} esp_generate_config;
#define ESP_GENERATE_CONFIG(...) ((esp_generate_config){.struct_size = sizeof(esp_generate_config), __VA_ARGS__})

/// Row p*samples + g belongs to sample g of prompt p.
/// tokens   [out] [n_prompts*samples, max_new_tokens] ids, the stop id included, 0 behind the end
/// logprobs [out] the same shape f32, or NULL
/// lengths  [out] [n_prompts*samples]
/// stopped  [out] [n_prompts*samples] 1 = ended with a stop id or stop string, 0 = cut at max_new_tokens, or before a token that the model does not take
///                (one that stands for a picture); or NULL
/// Collective where experts are spread over ranks (esp_model_config.expert_ranks): every rank calls it, on a sampler of the same config, with
/// prompts of its own or with none, and all return when the last is done.
/// Rows are independent: tokens and log-probabilities are the same bits alone, in any batch, in any order.
/// ESP_ERR_ARG: an empty prompt, an id outside the vocabulary, a prompt that leaves no room for max_new_tokens (names the prompt); a filter
/// with logprobs asked for, no on_drawn, and not `evaluation`: training must see the distribution that was sampled from, so it needs the
/// kept ids.  ESP_ERR_UNSUPPORTED: filters that left more ids than max_kept
ESP_API esp_status esp_sampler_generate(esp_sampler *sampler, const esp_generate_config *config, int32_t *tokens, float *logprobs,
                                        int32_t *lengths, uint8_t *stopped);

/// Bytes that esp_sampler_create would take, exactly.
ESP_API esp_status esp_sampler_plan(esp_model *model, const esp_sampler_config *config, size_t *bytes);

#ifdef __cplusplus
}
#endif
#endif
