/* Rollouts from an OpenAI-compatible server (vLLM): completions by token ids, and every version of the adapter published there under a name
 * of its own.  The server is one process of several that share a folder; it runs with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True,
 * and with --logprobs-mode processed_logprobs when the temperature is not 1.  The environment's ESP_SERVER_KEY is sent as its API key. */
#ifndef ESPI_RL_SERVER_H
#define ESPI_RL_SERVER_H

#include "espalier/model.h"
#include "rl/rollout.h"

typedef struct espi_server_config {
    const char *url;          /* "http://host:8000" */
    const char *model;        /* the base model's id there; NULL = the only one that it lists */
    const char *adapter_dir;  /* a folder of this run's own: versions are written there for the server to read */
    const char *adapter_path; /* the same folder as the server sees it; NULL = at the same path */
    int32_t max_staleness;    /* versions that a completion may be behind; 0 = none */
    int32_t retries;          /* tries of a request beyond the first */
    int32_t concurrent;       /* requests in flight */
    double first_delay;       /* seconds between the first two tries, then doubled each time; 0 = 0.25 */
    double timeout;           /* seconds of one try */
    double deadline;          /* seconds of a generation or of a publication where the request states none */
    bool drop_lost;           /* a group that no try brought is left out and counted; else the generation fails */
    float temperature;        /* of the run */
    int64_t longest;          /* most tokens of a prompt and its completion */
    int64_t version;          /* of the adapter as it is now */
    uint64_t seed;
    int (*stop)(void *user); /* asked while anything is awaited: non-zero ends it with ESP_ERR_CALLBACK; NULL = nobody */
    void *stop_user;
} espi_server_config;

/* What has happened since the opening. */
typedef struct espi_server_counts {
    int64_t published, unloaded; /* versions */
    int64_t groups, lost, stale; /* asked for; never came; came from a version beyond max_staleness.  The last two are not in any batch */
    int64_t retries;             /* tries beyond the first, of all requests */
    double logprob_difference;   /* mean |server's - ours| of the opening's probe */
} espi_server_counts;

/* Looks at the server's health, its model and context, publishes the adapter, and compares log-probabilities: all before the first rollout.
 * The model is read and run, never changed, by every call on the source; close() before it is destroyed.
 * ESP_ERR_UNSUPPORTED: no libcurl, no adapters, or log-probabilities without the temperature; ESP_ERR_MISMATCH: another model, too short a
 * context; ESP_ERR_COMM: it does not answer in time; ESP_ERR_FORMAT: it answers something else */
esp_status espi_server_open(espi_rollout_source *source, esp_model *model, const espi_server_config *config);
/* Room for the comparison that the opening makes: to be taken before the memory of a run is planned. */
esp_status espi_server_reserve(esp_model *model);
void espi_server_counts_get(espi_server_counts *counts, const espi_rollout_source *source);

#endif
