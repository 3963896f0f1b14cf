/* HTTP requests over libcurl, many at a time: retries with backoff, one deadline for all, and a verdict of the caller on every answer.
 * A build without libcurl has these functions too; they fail with ESP_ERR_UNSUPPORTED. */
#ifndef ESPI_RL_HTTP_H
#define ESPI_RL_HTTP_H

#include "espalier/ctx.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct espi_http espi_http;

typedef struct espi_http_config {
    const char *base;                  /* "http://host:8000" */
    const char *api_key;               /* sent as a bearer token; NULL = none */
    int32_t concurrent;                /* requests in flight, at least 1 */
    int32_t retries;                   /* tries behind the first */
    double timeout;                    /* seconds of one try */
    double first_delay, longest_delay; /* seconds between tries: doubled each time, times a draw from [0.5, 1) */
    uint64_t seed;                     /* of those draws */
    const esp_ctx *ctx;                /* its log hears of every retry; NULL = nobody does */
} espi_http_config;

/* Copies what it needs.  ESP_ERR_ARG: a base that is no http:// or https:// address, or numbers out of range. */
esp_status espi_http_create(espi_http **http, const espi_http_config *config);
void espi_http_destroy(espi_http *http); /* NULL is allowed */

#define ESPI_HTTP_WHY 768

/* One request, and what became of it. */
typedef struct espi_http_call {
    const char *path;       /* "/v1/models", behind base */
    const char *body;       /* JSON to POST; NULL = GET */
    const char *request_id; /* sent as X-Request-Id with "-TRY" behind it, so that no two tries share one; NULL = none */
    esp_status status;      /* ESP_OK: an answer was accepted, once */
    int32_t code;           /* of the last answer; 0 = there was none */
    int32_t tries;
    char why[ESPI_HTTP_WHY]; /* the sentence of a call that failed */
} espi_http_call;

/* The verdict on an answer of status 2xx to calls[index]; body has a NUL behind it.  ESP_OK: accepted.  ESP_ERR_FORMAT: not what was asked
 * for, try again.  Anything else: final. */
typedef esp_status (*espi_http_answer)(void *user, int64_t index, const char *body, size_t bytes);

typedef struct espi_http_limits {
    double deadline;         /* espi_seconds() at which the run is over whatever is missing; 0 = each call has its tries */
    bool all_or_none;        /* end at the first call that fails for good */
    int (*stop)(void *user); /* asked while the run waits: non-zero ends it; NULL = nobody */
    void *stop_user;
    uint32_t step;       /* keys the jitter's draws */
    const char *awaited; /* what the run is for, in a deadline's sentence: "completions of step 12" */
} espi_http_limits;

/* Sends all calls, in order, and comes back when each is accepted or has failed.  Try again: no connection, a connection that broke, no answer
 * in time, 5xx, 408, 425, 429, an answer that the verdict calls ESP_ERR_FORMAT.  Every other status is final, the server's message quoted.
 * Returns ESP_OK when all calls were accepted, else the status and the sentence of the first that was not: ESP_ERR_COMM no answer or none in
 * time, ESP_ERR_ARG the server refuses the request, ESP_ERR_FORMAT the last answer broke the contract, ESP_ERR_CALLBACK stop was asked for. */
esp_status espi_http_run(espi_http *http, espi_http_call *calls, int64_t n, const espi_http_limits *limits, espi_http_answer answer,
                         void *user);

/* Tries beyond the first, since creation. */
int64_t espi_http_retries(const espi_http *http);

#endif
