/* Rollouts from an OpenAI-compatible server.  See server.h.
 *
 * A version of the adapter is a folder and a name that no other version ever has, so nothing that the server keeps under a name (a prefix
 * cache, say) can be of another version.  What may be doubled on the way - a load whose answer was lost, a completion that was tried again -
 * is settled here: a name that is there already counts as loaded, and a group takes one answer. */
#define _XOPEN_SOURCE 700 /* realpath */

#include "rl/server.h"

#include "core/log.h"
#include "core/rng.h"
#include "io/folder.h"
#include "models/model.h"
#include "rl/http.h"
#include "rl/run.h"
#include "rl/server_reply.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define NAME_MAX 64
#define PREFIX_MAX 16
#define NAME_PREFIX "run-" /* of every folder and name that is made here */
#define FIRST_DELAY 0.25
#define LONGEST_DELAYS 32 /* times the first */
#define CLOSE_SECONDS 5.0
#define DEFAULT_DEADLINE 600.0 /* a run with a server never waits for ever */
#define SEED_BITS 53           /* a JSON number that every reader keeps */

/* The opening's probe. */
#define PROBE_PROMPTS 4
#define PROBE_SAMPLES 4
#define PROBE_PROMPT 8
#define PROBE_TOKENS 8
#define PROBE_TOLERANCE 0.5 /* mean |server's - ours|: above what 4-bit experts and 16-bit sums make of one model */

/* One name that the server may know. */
typedef struct published {
    int64_t version;
    bool usable; /* the server said so; else it may have loaded it or not, and is only told to unload it */
    char name[NAME_MAX];
} published;

typedef struct server {
    espi_server_config c;
    char *strings[4]; /* the config's: url, model, adapter_dir, adapter_path */
    esp_model *model;
    espi_http *http;
    char prefix[PREFIX_MAX];
    published *published; /* ascending versions */
    int32_t n_published;
    espi_server_counts counts;
    bool offers_routes; /* its completions come with routed experts */
    uint32_t runs;      /* of the HTTP layer so far: keys the jitter */
} server;

static double deadline_of(const server *s, double asked) {
    return asked > 0 ? asked : espi_seconds() + s->c.deadline;
}

/* ---- requests that come one at a time ---- */

/* Keeps the answer. */
typedef struct answer {
    bool is_json; /* expected */
    json_t *root;
} answer;

static esp_status keep_answer(void *user, int64_t index, const char *body, size_t bytes) {
    answer *a = user;
    json_error_t error;
    (void)index;
    if (!a->is_json) return ESP_OK;
    a->root = json_loadb(body, bytes, 0, &error);
    return a->root ? ESP_OK
                   : ESPI_FAIL(ESP_ERR_FORMAT, "an answer of %zu bytes that is no JSON: %s at byte %d", bytes, error.text, error.position);
}

/* body: taken over, {} = GET; root: NULL = the answer's body is of no interest.  call [out] */
static esp_status ask(server *s, espi_http_call *call, const char *path, json_t *body, json_t **root, double deadline,
                      const char *awaited) {
    const bool get = json_object_size(body) == 0;
    char *text = get ? NULL : json_dumps(body, JSON_COMPACT);
    const bool lacks = !body || (!get && !text);
    json_decref(body);
    if (lacks) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a request to %s", path);
    answer a = {.is_json = root != NULL};
    *call = (espi_http_call){.path = path, .body = text};
    const espi_http_limits limits = {
        .stop = s->c.stop, .stop_user = s->c.stop_user, .deadline = deadline, .all_or_none = true, .step = s->runs++, .awaited = awaited};
    const esp_status status = espi_http_run(s->http, call, 1, &limits, keep_answer, &a);
    free(text);
    call->body = NULL;
    if (root) *root = status == ESP_OK ? a.root : NULL;
    return status;
}

static esp_status list_models(server *s, json_t **data, double deadline) {
    json_t *root;
    espi_http_call call;
    ESPI_TRY(ask(s, &call, "/v1/models", json_object(), &root, deadline, "the list of models"));
    *data = json_incref(json_object_get(root, "data"));
    json_decref(root);
    if (json_is_array(*data)) return ESP_OK;
    json_decref(*data);
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s/v1/models: an answer without a list \"data\", expected one of models", s->c.url);
}

static const json_t *listed(const json_t *data, const char *id) {
    size_t i;
    json_t *entry;
    json_array_foreach(data, i, entry) {
        const char *name = json_string_value(json_object_get(entry, "id"));
        if (name && strcmp(name, id) == 0) return entry;
    }
    return NULL;
}

/* ---- versions of the adapter ---- */

static esp_status folder_of(char path[ESPI_PATH_MAX], const server *s, const char *name) {
    return espi_path_join(path, s->c.adapter_dir, name);
}

/* A whole folder appears under its name, or nothing. */
static esp_status write_version(const server *s, const char *name) {
    char path[ESPI_PATH_MAX], temp[ESPI_PATH_MAX];
    ESPI_TRY(folder_of(path, s, name));
    ESPI_TRY(espi_file_temp_name(temp, path));
    esp_status status = esp_model_save_adapter(s->model, temp);
    if (status == ESP_OK) status = espi_file_commit(path, temp);
    if (status != ESP_OK) espi_folder_remove(temp);
    return status;
}

static void remove_version(const server *s, const char *name) {
    char path[ESPI_PATH_MAX];
    if (folder_of(path, s, name) == ESP_OK) espi_folder_remove(path);
}

/* Room for one more name; the list is ascending, so it goes to the end. */
static esp_status remember(server *s, int64_t version, const char *name) {
    published *longer = realloc(s->published, (size_t)(s->n_published + 1) * sizeof *longer);
    if (!longer) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the names of %d adapters", s->n_published + 1);
    s->published = longer;
    published *p = &s->published[s->n_published++];
    *p = (published){.version = version};
    snprintf(p->name, sizeof p->name, "%s", name);
    return ESP_OK;
}

static const published *newest(const server *s) {
    for (int32_t i = s->n_published - 1; i >= 0; i--)
        if (s->published[i].usable) return &s->published[i];
    return NULL;
}

/* A load may be refused because a try before did load it, and its answer was lost. */
static bool loaded_after_all(server *s, const espi_http_call *call, const char *name, double deadline) {
    json_t *data;
    if (call->tries < 2 || call->status != ESP_ERR_ARG || list_models(s, &data, deadline) != ESP_OK) return false;
    const bool there = listed(data, name) != NULL;
    json_decref(data);
    return there;
}

static esp_status load(server *s, const char *name, double deadline) {
    char path[ESPI_PATH_MAX], why[ESPI_HTTP_WHY];
    espi_http_call call;
    ESPI_TRY(espi_path_join(path, s->c.adapter_path, name));
    json_t *body = json_pack("{s:s, s:s}", "lora_name", name, "lora_path", path);
    if (body && s->model->config.family->fused_experts) json_object_set_new(body, "is_3d_lora_weight", json_true());
    const esp_status status = ask(s, &call, "/v1/load_lora_adapter", body, NULL, deadline, "an adapter to be loaded");
    if (status == ESP_OK || loaded_after_all(s, &call, name, deadline)) return ESP_OK;
    if (status != ESP_ERR_ARG) return status;
    snprintf(why, sizeof why, "%s", call.why);
    if (call.code == 404)
        return ESPI_FAIL(
            ESP_ERR_UNSUPPORTED,
            "the server takes no adapter at run time: start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and see "
            "that %s is on its machine too (server_adapter_path): %s",
            path, why);
    return ESPI_FAIL(ESP_ERR_ARG, "adapter %s: see that the server may read it there (server_adapter_path) and takes its rank: %s", path,
                     why);
}

/* Tells the server to forget a name, and removes its folder.  One that it does not know is forgotten already. */
static esp_status unload(server *s, const char *name, double deadline) {
    espi_http_call call;
    const esp_status status =
        ask(s, &call, "/v1/unload_lora_adapter", json_pack("{s:s}", "lora_name", name), NULL, deadline, "an adapter to be unloaded");
    if (status != ESP_OK && call.code != 404) return status;
    remove_version(s, name);
    s->counts.unloaded++;
    return ESP_OK;
}

/* No request is open between two calls on the source, so all versions but those that may still be asked for go.  One that does not go is
 * tried again after the next publication. */
static void unload_old(server *s, int64_t version, double deadline) {
    int32_t kept = 0;
    for (int32_t i = 0; i < s->n_published; i++) {
        const published p = s->published[i];
        const bool old = !p.usable || p.version < version - s->c.max_staleness;
        if (old && unload(s, p.name, deadline) == ESP_OK) continue;
        if (old) espi_log(s->model->ctx, ESP_LOG_WARN, "adapter %s stays loaded for now: %s", p.name, esp_last_error());
        s->published[kept++] = p;
    }
    s->n_published = kept;
}

static esp_status publish_by(server *s, int64_t version, double deadline) {
    const published *last = newest(s);
    if (last && last->version == version) return ESP_OK;
    char name[NAME_MAX];
    snprintf(name, sizeof name, "%s-v%lld", s->prefix, (long long)version);
    if (!s->n_published || strcmp(s->published[s->n_published - 1].name, name) != 0) {
        ESPI_TRY(write_version(s, name));
        ESPI_TRY(remember(s, version, name));
    }
    const esp_status status = load(s, name, deadline);
    if (status == ESP_OK) {
        s->published[s->n_published - 1].usable = true;
        s->counts.published++;
        unload_old(s, version, deadline);
        return ESP_OK;
    }
    last = newest(s);
    if (status != ESP_ERR_COMM || !last || version - last->version > s->c.max_staleness) return status;
    espi_log(s->model->ctx, ESP_LOG_WARN, "adapter version %lld is not loaded, going on with version %lld (max_staleness %d): %s",
             (long long)version, (long long)last->version, s->c.max_staleness, esp_last_error());
    return ESP_OK;
}

static esp_status publish(void *self, int64_t version) {
    server *s = self;
    return publish_by(s, version, deadline_of(s, 0));
}

/* ---- completions ---- */

typedef struct group {
    espi_reply_want want;
    espi_reply reply;
    int64_t version; /* of the adapter that wrote it; -1 = nothing came */
} group;

/* What a run over groups needs. */
typedef struct groups {
    server *server;
    group *groups;
    espi_http_call *calls;
    int64_t n;
} groups;

static esp_status take_reply(void *user, int64_t index, const char *body, size_t bytes) {
    groups *gs = user;
    group *g = &gs->groups[index];
    if (g->version >= 0) return ESPI_FAIL(ESP_ERR_INTERNAL, "request %lld was answered twice", (long long)index);
    ESPI_TRY(espi_reply_read(&g->reply, body, bytes, &g->want));
    for (int32_t i = 0; i < gs->server->n_published; i++)
        if (strcmp(gs->server->published[i].name, g->reply.model) == 0) g->version = gs->server->published[i].version;
    if (g->version >= 0) return ESP_OK;
    const esp_status status =
        ESPI_FAIL(ESP_ERR_FORMAT, "an answer by model \"%s\", expected one of the adapters of this run", g->reply.model);
    espi_reply_free(&g->reply);
    return status;
}

/* All that a server might take from a default of its own is stated. */
static char *completion_body(const espi_reply_want *want, const char *model, double temperature, uint64_t seed, bool routes) {
    json_t *prompt = json_array();
    for (int32_t i = 0; i < want->n_prompt; i++) json_array_append_new(prompt, json_integer(want->prompt[i]));
    json_t *root = json_pack("{s:s, s:o, s:i, s:i, s:f, s:f, s:i, s:f, s:f, s:f, s:f, s:i, s:[i], s:[], s:b, s:b, s:i, s:b, s:b, s:I}",
                             "model", model, "prompt", prompt, "n", want->samples, "max_tokens", want->max_new_tokens, "temperature",
                             temperature, "top_p", 1.0, "top_k", -1, "min_p", 0.0, "repetition_penalty", 1.0, "presence_penalty", 0.0,
                             "frequency_penalty", 0.0, "min_tokens", 0, "stop_token_ids", want->stop_id, "stop", "ignore_eos", 1, "stream",
                             0, "logprobs", 0, "return_token_ids", 1, "add_special_tokens", 0, "seed", (json_int_t)seed);
    if (root && routes) json_object_set_new(root, "return_routed_experts", json_true());
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    return text;
}

static void free_groups(groups *gs) {
    for (int64_t i = 0; i < gs->n; i++) {
        if (gs->groups) espi_reply_free(&gs->groups[i].reply);
        if (!gs->calls) continue;
        free((char *)gs->calls[i].body);
        free((char *)gs->calls[i].request_id);
    }
    free(gs->groups);
    free(gs->calls);
}

static esp_status take_groups(groups *gs, server *s, int64_t n) {
    *gs = (groups){.server = s, .n = n};
    ESPI_TRY(espi_take_array(&gs->groups, n, sizeof *gs->groups));
    ESPI_TRY(espi_take_array(&gs->calls, n, sizeof *gs->calls));
    for (int64_t i = 0; i < n; i++) gs->groups[i].version = -1;
    return ESP_OK;
}

/* The request for one group, from its want. */
static esp_status fill_call(groups *gs, int64_t i, const char *model, double temperature, uint64_t seed, uint32_t step, int64_t id) {
    const server *s = gs->server;
    espi_http_call *call = &gs->calls[i];
    char *name = NULL;
    ESPI_TRY(espi_take_array(&name, 2 * NAME_MAX, 1));
    snprintf(name, 2 * NAME_MAX, "%s-s%u.%u-g%lld", s->prefix, step, s->runs, (long long)id);
    call->path = "/v1/completions";
    call->request_id = name;
    call->body = completion_body(&gs->groups[i].want, model, temperature, seed, gs->groups[i].want.route_bytes > 0);
    return call->body ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for request %s", name);
}

static uint64_t seed_of(uint64_t seed, uint32_t step, uint32_t key) {
    uint32_t words[4];
    espi_philox(words, seed, ESPI_STREAM_SERVER, step, key, 0, 0);
    return ((uint64_t)words[0] << 32 | words[1]) >> (64 - SEED_BITS);
}

static bool fresh(const server *s, const group *g, int64_t version) {
    return g->version >= 0 && version - g->version <= s->c.max_staleness;
}

static void copy_row(espi_rollouts *r, int64_t row, const group *g, int32_t sample, int64_t id) {
    const espi_reply_want *w = &g->want;
    const int64_t first = r->offsets[row], n = g->reply.lengths[sample], from = (int64_t)sample * w->max_new_tokens;
    const int64_t answer = first + w->n_prompt;
    memcpy(r->tokens + first, w->prompt, (size_t)w->n_prompt * sizeof *r->tokens);
    memcpy(r->tokens + answer, g->reply.tokens + from, (size_t)n * sizeof *r->tokens);
    memcpy(r->sampler_logprob + answer, g->reply.logprobs + from, (size_t)n * sizeof *r->sampler_logprob);
    memset(r->loss_mask + answer, 1, (size_t)n);
    r->n_prompt[row] = w->n_prompt;
    r->finish[row] = g->reply.stopped[sample] ? ESPI_FINISH_STOP : ESPI_FINISH_LENGTH;
    r->group[row] = id;
    r->version[row] = g->version;
    r->offsets[row + 1] = answer + n;
    if (!w->route_bytes) return;
    const int64_t token = w->model->layers * w->model->top_k * w->route_bytes;
    /* All but the last token: what lies there stays all ones. */
    memcpy(r->routes + first * token, g->reply.routes + sample * (int64_t)(w->n_prompt + w->max_new_tokens) * token,
           (size_t)((w->n_prompt + n - 1) * token));
}

/* The groups that came and are fresh enough; *kept: how many. */
static esp_status assemble(espi_rollouts *r, int64_t *kept, groups *gs, const espi_rollout_request *q) {
    server *s = gs->server;
    const espi_config *m = &s->model->config;
    espi_rollouts_shape shape = {.group_size = q->samples};
    *kept = 0;
    for (int64_t i = 0; i < gs->n; i++) {
        const group *g = &gs->groups[i];
        if (g->version < 0) s->counts.lost++;
        if (g->version >= 0 && !fresh(s, g, q->version)) s->counts.stale++;
        if (!fresh(s, g, q->version)) continue;
        ++*kept;
        for (int32_t k = 0; k < q->samples; k++) shape.tokens += g->want.n_prompt + g->reply.lengths[k];
    }
    s->counts.groups += gs->n;
    if (*kept == 0) return ESP_OK;
    shape.rows = *kept * q->samples;
    if (q->routes) {
        shape.layers = m->layers;
        shape.top_k = m->top_k;
        shape.route_bytes = gs->groups[0].want.route_bytes;
    }
    ESPI_TRY(espi_rollouts_create(r, &shape));
    int64_t row = 0;
    for (int64_t i = 0; i < gs->n; i++)
        for (int32_t k = 0; k < q->samples && fresh(s, &gs->groups[i], q->version); k++)
            copy_row(r, row++, &gs->groups[i], k, q->group_ids[i]);
    return ESP_OK;
}

static esp_status check_request(const server *s, const espi_rollout_request *q) {
    if (q->top_k > 0 || (q->top_p > 0 && q->top_p < 1) || q->min_p > 0)
        return ESPI_FAIL(
            ESP_ERR_UNSUPPORTED,
            "server: got top_k %d, top_p %g, min_p %g, expected none of them: a server does not say which ids they left, so training "
            "would not see the distribution that was sampled from",
            q->top_k, (double)q->top_p, (double)q->min_p);
    if (s->model->config.eos_id < 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "server: the model's config.json states no eos_token_id, expected one: completions would not end");
    return ESP_OK;
}

static esp_status request_all(groups *gs, const espi_rollout_request *q, double deadline) {
    server *s = gs->server;
    const espi_config *m = &s->model->config;
    const published *adapter = newest(s);
    char awaited[64];
    for (int32_t i = 0; i < q->n_prompts; i++) {
        gs->groups[i].want = (espi_reply_want){.prompt = q->prompts + q->cu_prompts[i],
                                               .n_prompt = q->cu_prompts[i + 1] - q->cu_prompts[i],
                                               .samples = q->samples,
                                               .max_new_tokens = q->max_new_tokens,
                                               .stop_id = (int32_t)m->eos_id,
                                               .model = m,
                                               .route_bytes = !q->routes                           ? 0
                                                              : m->experts <= ESPI_ROUTE_NATIVE_U8 ? 1
                                                                                                   : 2};
        const uint64_t seed = seed_of(q->seed, q->step, q->keys ? q->keys[i] : (uint32_t)i);
        ESPI_TRY(fill_call(gs, i, adapter->name, (double)q->temperature, seed, q->step, q->group_ids[i]));
    }
    snprintf(awaited, sizeof awaited, "the completions of step %u", q->step);
    const espi_http_limits limits = {.stop = s->c.stop,
                                     .stop_user = s->c.stop_user,
                                     .deadline = deadline,
                                     .all_or_none = !s->c.drop_lost,
                                     .step = s->runs++,
                                     .awaited = awaited};
    return espi_http_run(s->http, gs->calls, gs->n, &limits, take_reply, gs);
}

/* A server that was started again since the adapter was loaded knows none of its names.  The newest is then loaded once more. */
static esp_status load_again(bool *again, server *s, const groups *gs, double deadline) {
    json_t *data;
    char name[NAME_MAX], why[ESPI_HTTP_WHY];
    *again = false;
    for (int64_t i = 0; i < gs->n; i++) *again |= gs->calls[i].code == 404;
    if (!*again) return ESP_OK;
    snprintf(why, sizeof why, "%s", esp_last_error());
    snprintf(name, sizeof name, "%s", newest(s)->name);
    ESPI_TRY(list_models(s, &data, deadline));
    *again = !listed(data, name);
    json_decref(data);
    if (!*again) return ESPI_FAIL(ESP_ERR_ARG, "%s", why);
    espi_log(s->model->ctx, ESP_LOG_WARN, "%s has forgotten adapter %s, as if started again: loading it once more", s->c.url, name);
    return load(s, name, deadline);
}

/* Requests for all groups; all of them anew where the server had lost the adapter. */
static esp_status request_with_adapter(groups *gs, const espi_rollout_request *q, double deadline) {
    server *s = gs->server;
    bool again = false;
    ESPI_TRY(take_groups(gs, s, q->n_prompts));
    const esp_status status = request_all(gs, q, deadline);
    if (status != ESP_ERR_ARG) return status;
    const esp_status reloaded = load_again(&again, s, gs, deadline);
    if (reloaded != ESP_OK || !again) return reloaded != ESP_OK ? reloaded : status;
    free_groups(gs);
    ESPI_TRY(take_groups(gs, s, q->n_prompts));
    return request_all(gs, q, deadline);
}

static esp_status generate_by(server *s, espi_rollouts *r, const espi_rollout_request *q, groups *gs) {
    const double deadline = deadline_of(s, q->deadline);
    int64_t kept = 0;
    ESPI_TRY(check_request(s, q));
    ESPI_TRY(publish_by(s, q->version, deadline));
    const esp_status status = request_with_adapter(gs, q, deadline);
    if (status != ESP_OK && (!s->c.drop_lost || status == ESP_ERR_MEMORY || status == ESP_ERR_INTERNAL || status == ESP_ERR_CALLBACK))
        return status;
    char why[ESPI_HTTP_WHY];
    snprintf(why, sizeof why, "%s",
             status == ESP_OK ? "all came from older versions of the adapter than max_staleness allows" : esp_last_error());
    ESPI_TRY(assemble(r, &kept, gs, q));
    if (kept == 0)
        return ESPI_FAIL(status == ESP_OK ? ESP_ERR_MISMATCH : status, "step %u: no group of %d came: %s", q->step, q->n_prompts, why);
    if (kept < q->n_prompts)
        espi_log(s->model->ctx, ESP_LOG_WARN, "step %u: %lld of %d groups are left out: %s", q->step, (long long)(q->n_prompts - kept),
                 q->n_prompts, why);
    return ESP_OK;
}

static esp_status generate(void *self, espi_rollouts *r, const espi_rollout_request *request) {
    groups gs = {.server = self};
    const esp_status status = generate_by(self, r, request, &gs);
    free_groups(&gs);
    return status;
}

/* ---- the opening ---- */

static esp_status find_model(server *s, const json_t *data, const json_t **entry) {
    size_t i;
    json_t *one;
    char names[512] = "";
    int bases = 0;
    *entry = NULL;
    json_array_foreach(data, i, one) {
        const char *id = json_string_value(json_object_get(one, "id"));
        if (!id || json_is_string(json_object_get(one, "parent"))) continue;
        const size_t n = strlen(names);
        snprintf(names + n, sizeof names - n, "%s%s", bases++ ? ", " : "", id);
        if (!s->c.model || strcmp(s->c.model, id) == 0) *entry = one;
    }
    if (!*entry || (!s->c.model && bases > 1))
        return ESPI_FAIL(ESP_ERR_MISMATCH, "server_model: got %s, expected one of those that %s serves: %s",
                         s->c.model ? s->c.model : "none", s->c.url, bases ? names : "(none)");
    return ESP_OK;
}

static esp_status check_context(const server *s, const json_t *entry) {
    const json_t *length = json_object_get(entry, "max_model_len");
    if (!json_is_integer(length)) {
        espi_log(s->model->ctx, ESP_LOG_WARN, "%s does not say how long its context is", s->c.url);
        return ESP_OK;
    }
    if (json_integer_value(length) < s->c.longest)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: its context is %lld tokens, expected at least %lld (the longest prompt and its completion)",
                         s->c.url, (long long)json_integer_value(length), (long long)s->c.longest);
    return ESP_OK;
}

/* Names and folders that a run before this one left in this run's folder. */
static esp_status clear_left(server *s, const json_t *data, double deadline) {
    size_t i, n;
    json_t *entry;
    char **names, path[ESPI_PATH_MAX];
    json_array_foreach(data, i, entry) {
        const char *id = json_string_value(json_object_get(entry, "id")), *root = json_string_value(json_object_get(entry, "root"));
        if (!id || !root || strncmp(id, NAME_PREFIX, strlen(NAME_PREFIX)) != 0) continue;
        ESPI_TRY(espi_path_join(path, s->c.adapter_path, id));
        if (strcmp(path, root) == 0) ESPI_TRY(unload(s, id, deadline));
    }
    ESPI_TRY(espi_folder_list(&names, &n, s->c.adapter_dir));
    for (i = 0; i < n; i++)
        if (strncmp(names[i], NAME_PREFIX, strlen(NAME_PREFIX)) == 0) remove_version(s, names[i]);
    espi_folder_list_free(names, n);
    return ESP_OK;
}

/* Mean distances of the server's log-probabilities from ours, at the probe's temperature and at 1. */
typedef struct distances {
    double there, at_one;
} distances;

static esp_status measure(distances *out, esp_model *model, const groups *gs, float temperature) {
    int32_t tokens[PROBE_PROMPTS * PROBE_SAMPLES * (PROBE_PROMPT + PROBE_TOKENS)], cu[PROBE_PROMPTS * PROBE_SAMPLES + 1] = {0};
    float theirs[ESPI_COUNT(tokens)], ours[ESPI_COUNT(tokens)];
    uint8_t mask[ESPI_COUNT(tokens)] = {0};
    int32_t n = 0, rows = 0;
    for (int64_t g = 0; g < gs->n; g++)
        for (int32_t k = 0; k < PROBE_SAMPLES; k++) {
            const espi_reply *reply = &gs->groups[g].reply;
            memcpy(tokens + n, gs->groups[g].want.prompt, PROBE_PROMPT * sizeof *tokens);
            n += PROBE_PROMPT;
            for (int32_t i = 0; i < reply->lengths[k]; i++, n++) {
                tokens[n] = reply->tokens[k * PROBE_TOKENS + i];
                theirs[n] = reply->logprobs[k * PROBE_TOKENS + i];
                mask[n] = 1;
            }
            cu[++rows] = n;
        }
    const esp_batch batch = ESP_BATCH(.tokens = tokens, .cu_seqlens = cu, .n_tokens = n, .n_seqs = rows, .loss_mask = mask);
    esp_tensor hidden;
    ESPI_TRY(esp_model_forward_only(model, &batch, &hidden));
    double sums[2] = {0, 0};
    int32_t counted = 0;
    for (int pass = 0; pass < 2; pass++) {
        ESPI_TRY(esp_model_logprob(model, &batch, &hidden, pass ? 1.0f : temperature, ours, NULL));
        for (int32_t t = 0; t < n; t++)
            if (mask[t]) sums[pass] += fabs((double)theirs[t] - (double)ours[t]);
    }
    for (int32_t t = 0; t < n; t++) counted += mask[t];
    *out = (distances){sums[0] / counted, sums[1] / counted};
    return ESP_OK;
}

static esp_status judge_distances(server *s, const distances *d, double temperature) {
    const double least = fmin(d->there, d->at_one);
    s->counts.logprob_difference = d->there;
    if (!(least <= PROBE_TOLERANCE))
        return ESPI_FAIL(
            ESP_ERR_MISMATCH,
            "%s: its log-probabilities differ from this model's by %.3g on average at temperature %g, expected at most %g: it serves "
            "other weights, or answers without the adapter",
            s->c.url, least, temperature, PROBE_TOLERANCE);
    if (temperature == 1) return ESP_OK;
    if (d->at_one < d->there / 2)
        return ESPI_FAIL(
            ESP_ERR_UNSUPPORTED,
            "%s gives log-probabilities without the temperature (%.3g from ours at 1, %.3g at %g), expected those of the distribution "
            "that it samples from: start it with --logprobs-mode processed_logprobs, or train at temperature 1",
            s->c.url, d->at_one, d->there, temperature);
    if (!(d->there < d->at_one / 2))
        return ESPI_FAIL(
            ESP_ERR_UNSUPPORTED,
            "%s: whether its log-probabilities are with the temperature cannot be told (%.3g from ours at %g, %.3g at 1), expected one "
            "to be at most half of the other: train at temperature 1",
            s->c.url, d->there, temperature, d->at_one);
    return ESP_OK;
}

/* Completions of prompts that mean nothing, far enough from temperature 1 to tell which distribution the log-probabilities are of. */
static esp_status probe(server *s, groups *gs, double deadline) {
    const espi_config *m = &s->model->config;
    const float run = s->c.temperature, temperature = run == 1 ? 1 : run < 1 ? fminf(run, 0.5f) : fmaxf(run, 2);
    int32_t prompts[PROBE_PROMPTS][PROBE_PROMPT];
    distances d;
    ESPI_TRY(take_groups(gs, s, PROBE_PROMPTS));
    for (int32_t p = 0; p < PROBE_PROMPTS; p++) {
        for (int32_t i = 0; i < PROBE_PROMPT; i++) {
            const double u = espi_uniform(s->c.seed, ESPI_STREAM_SERVER, UINT32_MAX, (uint32_t)p, (uint32_t)i, 0);
            prompts[p][i] = (int32_t)(u * (double)m->vocab);
            while (espi_token_refused(m, prompts[p][i])) prompts[p][i]--;
        }
        gs->groups[p].want = (espi_reply_want){.prompt = prompts[p],
                                               .n_prompt = PROBE_PROMPT,
                                               .samples = PROBE_SAMPLES,
                                               .max_new_tokens = PROBE_TOKENS,
                                               .stop_id = (int32_t)m->eos_id,
                                               .model = m};
        ESPI_TRY(fill_call(gs, p, newest(s)->name, (double)temperature, seed_of(s->c.seed, UINT32_MAX, (uint32_t)p), UINT32_MAX, p));
    }
    const espi_http_limits limits = {.stop = s->c.stop,
                                     .stop_user = s->c.stop_user,
                                     .deadline = deadline,
                                     .all_or_none = true,
                                     .step = s->runs++,
                                     .awaited = "the probe's completions"};
    ESPI_TRY(espi_http_run(s->http, gs->calls, gs->n, &limits, take_reply, gs));
    s->offers_routes = gs->groups[0].reply.offers_routes;
    ESPI_TRY(esp_model_adapter_enable(s->model, true));
    ESPI_TRY(measure(&d, s->model, gs, temperature));
    return judge_distances(s, &d, (double)temperature);
}

static esp_status look_around(server *s, double deadline) {
    json_t *data;
    const json_t *entry;
    espi_http_call call;
    ESPI_TRY(ask(s, &call, "/health", json_object(), NULL, deadline, "the server to be well"));
    ESPI_TRY(list_models(s, &data, deadline));
    esp_status status = find_model(s, data, &entry);
    if (status == ESP_OK) status = check_context(s, entry);
    if (status == ESP_OK) status = clear_left(s, data, deadline);
    json_decref(data);
    return status;
}

static esp_status copy(char **out, const char *text) {
    ESPI_TRY(espi_take_array(out, (int64_t)strlen(text) + 1, 1));
    memcpy(*out, text, strlen(text));
    return ESP_OK;
}

static esp_status copy_config(server *s, const espi_server_config *c) {
    s->c = *c;
    s->c.url = s->c.model = s->c.adapter_dir = s->c.adapter_path = NULL;
    if (!c->url || !c->adapter_dir)
        return ESPI_FAIL(ESP_ERR_ARG, "server: got no %s, expected both an address and a folder for its adapters (server_adapter_dir)",
                         c->url ? "server_adapter_dir" : "address");
    if (c->max_staleness < 0 || !(c->deadline > 0) || !(c->temperature > 0))
        return ESPI_FAIL(ESP_ERR_ARG,
                         "server: got max_staleness %d, a deadline of %g s and temperature %g, expected 0 or more and positive numbers",
                         c->max_staleness, c->deadline, (double)c->temperature);
    ESPI_TRY(copy(&s->strings[0], c->url));
    if (c->model) ESPI_TRY(copy(&s->strings[1], c->model));
    ESPI_TRY(copy(&s->strings[2], c->adapter_dir));
    ESPI_TRY(espi_dir_make(c->adapter_dir));
    if (c->adapter_path) {
        ESPI_TRY(copy(&s->strings[3], c->adapter_path));
    } else {
        s->strings[3] = realpath(c->adapter_dir, NULL);
        if (!s->strings[3]) return ESPI_FAIL(ESP_ERR_IO, "%s: its whole path cannot be told", c->adapter_dir);
    }
    s->c.url = s->strings[0];
    s->c.model = s->strings[1];
    s->c.adapter_dir = s->strings[2];
    s->c.adapter_path = s->strings[3];
    return ESP_OK;
}

/* Names of this process: a resumed run publishes versions again that the one before it has published. */
static void name_run(server *s) {
    struct timespec now;
    uint32_t words[4];
    clock_gettime(CLOCK_REALTIME, &now);
    espi_philox(words, (uint64_t)now.tv_sec, ESPI_STREAM_SERVER, (uint32_t)now.tv_nsec, (uint32_t)((uintptr_t)s >> 4), 0, 0);
    snprintf(s->prefix, sizeof s->prefix, NAME_PREFIX "%08x", (unsigned)words[0]);
}

static esp_status open_server(server *s, const espi_server_config *config) {
    ESPI_TRY(copy_config(s, config));
    name_run(s);
    const double delay = config->first_delay > 0 ? config->first_delay : FIRST_DELAY;
    const espi_http_config http = {.base = s->c.url,
                                   .api_key = getenv("ESP_SERVER_KEY"),
                                   .concurrent = s->c.concurrent,
                                   .retries = s->c.retries,
                                   .timeout = s->c.timeout,
                                   .first_delay = delay,
                                   .longest_delay = LONGEST_DELAYS * delay,
                                   .seed = s->c.seed,
                                   .ctx = s->model->ctx};
    ESPI_TRY(espi_http_create(&s->http, &http));
    const double deadline = deadline_of(s, 0);
    ESPI_TRY(look_around(s, deadline));
    ESPI_TRY(publish_by(s, s->c.version, deadline));
    groups gs = {0};
    const esp_status status = probe(s, &gs, deadline);
    free_groups(&gs);
    return status;
}

static void close_server(void *self) {
    server *s = self;
    const double deadline = espi_seconds() + CLOSE_SECONDS;
    s->c.stop = NULL; /* who stops wants this done too */
    for (int32_t i = 0; i < s->n_published; i++)
        if (unload(s, s->published[i].name, deadline) != ESP_OK)
            espi_log(s->model->ctx, ESP_LOG_WARN, "adapter %s stays loaded: %s", s->published[i].name, esp_last_error());
    espi_http_destroy(s->http);
    for (int i = 0; i < ESPI_COUNT(s->strings); i++) free(s->strings[i]);
    free(s->published);
    free(s);
}

esp_status espi_server_open(espi_rollout_source *source, esp_model *model, const espi_server_config *config) {
    server *s = calloc(1, sizeof *s);
    if (!s) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a server's bookkeeping");
    s->model = model;
    const esp_status status = open_server(s, config);
    if (status != ESP_OK) {
        /* Closing talks to the server too: its sentence must not take this one's place. */
        char why[ESPI_HTTP_WHY];
        snprintf(why, sizeof why, "%s", esp_last_error());
        close_server(s);
        return ESPI_FAIL(status, "%s", why);
    }
    *source = (espi_rollout_source){
        .name = "server", .self = s, .routes = s->offers_routes, .generate = generate, .publish = publish, .close = close_server};
    return ESP_OK;
}

void espi_server_counts_get(espi_server_counts *counts, const espi_rollout_source *source) {
    const server *s = source->self;
    *counts = s->counts;
    counts->retries = espi_http_retries(s->http);
}

esp_status espi_server_reserve(esp_model *model) {
    return esp_model_reserve(model, PROBE_PROMPTS * PROBE_SAMPLES * (PROBE_PROMPT + PROBE_TOKENS), PROBE_PROMPTS * PROBE_SAMPLES, false);
}

esp_status espi_server_source(esp_trainer *t) {
    const esp_trainer_config *c = &t->c;
    const espi_server_config config = {.url = c->server,
                                       .model = c->server_model,
                                       .adapter_dir = c->server_adapter_dir,
                                       .adapter_path = c->server_adapter_path,
                                       .max_staleness = c->max_staleness,
                                       .retries = c->server_retries,
                                       .concurrent = c->server_concurrency,
                                       .timeout = (double)c->server_timeout,
                                       .deadline = c->rollout_timeout > 0 ? (double)c->rollout_timeout : DEFAULT_DEADLINE,
                                       .drop_lost = c->server_drop_lost,
                                       .temperature = c->temperature,
                                       .longest = t->longest,
                                       .version = t->step,
                                       .seed = c->seed,
                                       .stop = c->stop,
                                       .stop_user = c->stop_user};
    return espi_server_open(&t->source, t->model, &config);
}
