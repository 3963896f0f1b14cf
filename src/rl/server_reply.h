/* The answer to a request for completions, read with suspicion: everything that it promises is checked against what was asked. */
#ifndef ESPI_RL_SERVER_REPLY_H
#define ESPI_RL_SERVER_REPLY_H

#include "models/family.h"

/* What was asked. */
typedef struct espi_reply_want {
    const int32_t *prompt;
    int32_t n_prompt, samples, max_new_tokens;
    int32_t stop_id;          /* the only one */
    const espi_config *model; /* vocabulary, tokens that it does not take, layers, experts */
    int32_t route_bytes;      /* 1 or 2: routed experts must be there; 0: they are not read */
} espi_reply_want;

/* Arrays over [samples, max_new_tokens] and [samples]; free with espi_reply_free(). */
typedef struct espi_reply {
    char *model; /* as the server names it */
    int32_t *tokens, *lengths;
    float *logprobs;
    uint8_t *stopped;
    bool offers_routes; /* its first choice has routed experts, wanted or not */
    /* [samples, n_prompt + max_new_tokens, layers, top_k] of route_bytes each; all ones at the last token that the server sent and behind it, and in layers
     * without experts; or NULL */
    uint8_t *routes;
} espi_reply;

/* reply [out]: empty after any failure.  ESP_ERR_FORMAT, naming the choice: it is no JSON, or its choices are not `samples` different ones; ids
 * are missing or outside the vocabulary; there are more or fewer log-probabilities than ids, or one that is none; the end is not what
 * finish_reason says; the prompt is another; routed experts are of other lengths, or do not exist.
 * ESP_ERR_UNSUPPORTED: there are no routed experts. */
esp_status espi_reply_read(espi_reply *reply, const char *body, size_t bytes, const espi_reply_want *want);
void espi_reply_free(espi_reply *reply);

#endif
