/* What the files of the server's source share.
 *   server.c          completions; opening and closing
 *   server_adapter.c  requests that come one at a time, and versions of the adapter by them
 *   server_open.c     what is looked at before the first rollout
 *   server_reply.c    answers to requests for completions */
#ifndef ESPI_RL_SERVER_STATE_H
#define ESPI_RL_SERVER_STATE_H

#include "rl/http.h"
#include "rl/server.h"
#include "rl/server_reply.h"

#include <jansson.h>

#define ESPI_SERVER_NAME 64
#define ESPI_SERVER_PREFIX "run-" /* of every folder and name that is made here */

/* One name that the server may know. */
typedef struct espi_published {
    int64_t version;
    bool usable; /* the server said so; else it may have loaded it or not, and is only told to unload it */
    char name[ESPI_SERVER_NAME];
} espi_published;

typedef struct espi_server {
    espi_server_config c;
    char *strings[4]; /* the config's: url, model, adapter_dir, adapter_path */
    esp_model *model;
    espi_http *http;
    char prefix[16];
    espi_published *published; /* ascending versions */
    int32_t n_published;
    espi_server_counts counts;
    bool offers_routes; /* its completions come with routed experts */
    uint32_t runs;      /* of the HTTP layer so far: keys the jitter */
} espi_server;

typedef struct espi_server_group {
    espi_reply_want want;
    espi_reply reply;
    int64_t version; /* of the adapter that wrote it; -1 = nothing came */
} espi_server_group;

/* Requests for groups, and what came of them. */
typedef struct espi_server_groups {
    espi_server *server;
    espi_server_group *groups;
    espi_http_call *calls;
    int64_t n;
} espi_server_groups;

/* server_adapter.c */
/* One request.  body: taken over, {} = GET; root: NULL = the answer's body is of no interest.  call [out] */
esp_status espi_server_ask(espi_server *s, espi_http_call *call, const char *path, json_t *body, json_t **root, double deadline,
                           const char *awaited);
/* The list of /v1/models; json_decref() it. */
esp_status espi_server_models(espi_server *s, json_t **data, double deadline);
/* Its entry of this name, or NULL. */
const json_t *espi_server_listed(const json_t *data, const char *id);
/* The newest version that the server has, or NULL. */
const espi_published *espi_server_newest(const espi_server *s);
/* The server has this version, or one that is not too old. */
esp_status espi_server_publish(espi_server *s, int64_t version, double deadline);
esp_status espi_server_load(espi_server *s, const char *name, double deadline);
/* Tells the server to forget a name, and removes its folder.  One that it does not know is forgotten already. */
esp_status espi_server_unload(espi_server *s, const char *name, double deadline);
void espi_server_remove_version(const espi_server *s, const char *name);

/* server.c */
esp_status espi_server_groups_take(espi_server_groups *gs, espi_server *s, int64_t n);
void espi_server_groups_free(espi_server_groups *gs);
/* The request for group i, from its want; id: the group's, in the request's name. */
esp_status espi_server_fill_call(espi_server_groups *gs, int64_t i, const char *model, double temperature, uint64_t seed, uint32_t step,
                                 int64_t id);
uint64_t espi_server_seed(uint64_t seed, uint32_t step, uint32_t key);
/* An espi_http_answer over groups. */
esp_status espi_server_take_reply(void *user, int64_t index, const char *body, size_t bytes);

/* server_open.c */
/* Health, model, context; clears what a run before left. */
esp_status espi_server_look_around(espi_server *s, double deadline);
/* Compares log-probabilities, by completions of prompts that mean nothing. */
esp_status espi_server_probe(espi_server *s, espi_server_groups *gs, double deadline);

#endif
