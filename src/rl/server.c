/* Rollouts from an OpenAI-compatible server: completions, and the source's opening and closing.  See server.h. */
#define _XOPEN_SOURCE 700 /* realpath */

#include "rl/server_state.h"

#include "contract/route.h"
#include "core/log.h"
#include "core/rng.h"
#include "models/model.h"
#include "rl/run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FIRST_DELAY 0.25
#define LONGEST_DELAYS 32 /* times the first */
#define CLOSE_SECONDS 5.0
#define DEFAULT_DEADLINE 600.0 /* a run with a server never waits for ever */
#define SEED_BITS 53           /* a JSON number that every reader keeps */

static double deadline_of(const espi_server *s, double asked) {
    return asked > 0 ? asked : espi_seconds() + s->c.deadline;
}

esp_status espi_server_take_reply(void *user, int64_t index, const char *body, size_t bytes) {
    espi_server_groups *gs = user;
    espi_server_group *g = &gs->groups[index];
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

void espi_server_groups_free(espi_server_groups *gs) {
    for (int64_t i = 0; i < gs->n; i++) {
        if (gs->groups) espi_reply_free(&gs->groups[i].reply);
        if (!gs->calls) continue;
        free((char *)gs->calls[i].body);
        free((char *)gs->calls[i].request_id);
    }
    free(gs->groups);
    free(gs->calls);
}

esp_status espi_server_groups_take(espi_server_groups *gs, espi_server *s, int64_t n) {
    *gs = (espi_server_groups){.server = s, .n = n};
    ESPI_TRY(espi_take_array(&gs->groups, n, sizeof *gs->groups));
    ESPI_TRY(espi_take_array(&gs->calls, n, sizeof *gs->calls));
    for (int64_t i = 0; i < n; i++) gs->groups[i].version = -1;
    return ESP_OK;
}

esp_status espi_server_fill_call(espi_server_groups *gs, int64_t i, const char *model, double temperature, uint64_t seed, uint32_t step,
                                 int64_t id) {
    const espi_server *s = gs->server;
    espi_http_call *call = &gs->calls[i];
    char *name = NULL;
    ESPI_TRY(espi_take_array(&name, 2 * ESPI_SERVER_NAME, 1));
    snprintf(name, 2 * ESPI_SERVER_NAME, "%s-s%u.%u-g%lld", s->prefix, step, s->runs, (long long)id);
    call->path = "/v1/completions";
    call->request_id = name;
    call->body = completion_body(&gs->groups[i].want, model, temperature, seed, gs->groups[i].want.route_bytes > 0);
    return call->body ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for request %s", name);
}

uint64_t espi_server_seed(uint64_t seed, uint32_t step, uint32_t key) {
    uint32_t words[4];
    espi_philox(words, seed, ESPI_STREAM_SERVER, step, key, 0, 0);
    return ((uint64_t)words[0] << 32 | words[1]) >> (64 - SEED_BITS);
}

static bool fresh(const espi_server *s, const espi_server_group *g, int64_t version) {
    return g->version >= 0 && version - g->version <= s->c.max_staleness;
}

static void copy_row(espi_rollouts *r, int64_t row, const espi_server_group *g, int32_t sample, int64_t id) {
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
static esp_status assemble(espi_rollouts *r, int64_t *kept, espi_server_groups *gs, const espi_rollout_request *q) {
    espi_server *s = gs->server;
    const espi_config *m = &s->model->config;
    espi_rollouts_shape shape = {.group_size = q->samples};
    *kept = 0;
    for (int64_t i = 0; i < gs->n; i++) {
        const espi_server_group *g = &gs->groups[i];
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

static esp_status check_request(const espi_server *s, const espi_rollout_request *q) {
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

static esp_status request_all(espi_server_groups *gs, const espi_rollout_request *q, double deadline) {
    espi_server *s = gs->server;
    const espi_config *m = &s->model->config;
    const espi_published *adapter = espi_server_newest(s);
    char awaited[64];
    for (int32_t i = 0; i < q->n_prompts; i++) {
        gs->groups[i].want = (espi_reply_want){.prompt = q->prompts + q->cu_prompts[i],
                                               .n_prompt = q->cu_prompts[i + 1] - q->cu_prompts[i],
                                               .samples = q->samples,
                                               .max_new_tokens = q->max_new_tokens,
                                               .stop_id = (int32_t)m->eos_id,
                                               .model = m,
                                               .route_bytes = q->routes ? espi_route_bytes(m) : 0};
        const uint64_t seed = espi_server_seed(q->seed, q->step, q->keys ? q->keys[i] : (uint32_t)i);
        ESPI_TRY(espi_server_fill_call(gs, i, adapter->name, (double)q->temperature, seed, q->step, q->group_ids[i]));
    }
    snprintf(awaited, sizeof awaited, "the completions of step %u", q->step);
    const espi_http_limits limits = {.stop = s->c.stop,
                                     .stop_user = s->c.stop_user,
                                     .deadline = deadline,
                                     .all_or_none = !s->c.drop_lost,
                                     .step = s->runs++,
                                     .awaited = awaited};
    return espi_http_run(s->http, gs->calls, gs->n, &limits, espi_server_take_reply, gs);
}

/* A server that was started again since the adapter was loaded knows none of its names.  The newest is then loaded once more. */
static esp_status load_again(bool *again, espi_server *s, const espi_server_groups *gs, double deadline) {
    json_t *data;
    char name[ESPI_SERVER_NAME], why[ESPI_HTTP_WHY];
    *again = false;
    for (int64_t i = 0; i < gs->n; i++) *again |= gs->calls[i].code == 404;
    if (!*again) return ESP_OK;
    snprintf(why, sizeof why, "%s", esp_last_error());
    snprintf(name, sizeof name, "%s", espi_server_newest(s)->name);
    ESPI_TRY(espi_server_models(s, &data, deadline));
    *again = !espi_server_listed(data, name);
    json_decref(data);
    if (!*again) return ESPI_FAIL(ESP_ERR_ARG, "%s", why);
    espi_log(s->model->ctx, ESP_LOG_WARN, "%s has forgotten adapter %s, as if started again: loading it once more", s->c.url, name);
    return espi_server_load(s, name, deadline);
}

/* Requests for all groups; all of them anew where the server had lost the adapter. */
static esp_status request_with_adapter(espi_server_groups *gs, const espi_rollout_request *q, double deadline) {
    espi_server *s = gs->server;
    bool again = false;
    ESPI_TRY(espi_server_groups_take(gs, s, q->n_prompts));
    const esp_status status = request_all(gs, q, deadline);
    if (status != ESP_ERR_ARG) return status;
    const esp_status reloaded = load_again(&again, s, gs, deadline);
    if (reloaded != ESP_OK || !again) return reloaded != ESP_OK ? reloaded : status;
    espi_server_groups_free(gs);
    ESPI_TRY(espi_server_groups_take(gs, s, q->n_prompts));
    return request_all(gs, q, deadline);
}

static esp_status generate_by(espi_server *s, espi_rollouts *r, const espi_rollout_request *q, espi_server_groups *gs) {
    const double deadline = deadline_of(s, q->deadline);
    int64_t kept = 0;
    ESPI_TRY(check_request(s, q));
    ESPI_TRY(espi_server_publish(s, q->version, deadline));
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
    espi_server_groups gs = {.server = self};
    const esp_status status = generate_by(self, r, request, &gs);
    espi_server_groups_free(&gs);
    return status;
}

static esp_status publish(void *self, int64_t version) {
    espi_server *s = self;
    return espi_server_publish(s, version, deadline_of(s, 0));
}

/* ---- opening and closing ---- */

static esp_status copy_config(espi_server *s, const espi_server_config *c) {
    s->c = *c;
    s->c.url = s->c.model = s->c.adapter_dir = s->c.adapter_path = NULL;
    if (!c->url || !c->adapter_dir)
        return ESPI_FAIL(ESP_ERR_ARG, "server: got no %s, expected both an address and a folder for its adapters (server_adapter_dir)",
                         c->url ? "server_adapter_dir" : "address");
    if (c->max_staleness < 0 || !(c->deadline > 0) || !(c->temperature > 0))
        return ESPI_FAIL(ESP_ERR_ARG,
                         "server: got max_staleness %d, a deadline of %g s and temperature %g, expected 0 or more and positive numbers",
                         c->max_staleness, c->deadline, (double)c->temperature);
    ESPI_TRY(espi_copy_text(&s->strings[0], c->url));
    if (c->model) ESPI_TRY(espi_copy_text(&s->strings[1], c->model));
    ESPI_TRY(espi_copy_text(&s->strings[2], c->adapter_dir));
    ESPI_TRY(espi_dir_make(c->adapter_dir));
    if (c->adapter_path) {
        ESPI_TRY(espi_copy_text(&s->strings[3], c->adapter_path));
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
static void name_run(espi_server *s) {
    struct timespec now;
    uint32_t words[4];
    clock_gettime(CLOCK_REALTIME, &now);
    espi_philox(words, (uint64_t)now.tv_sec, ESPI_STREAM_SERVER, (uint32_t)now.tv_nsec, (uint32_t)((uintptr_t)s >> 4), 0, 0);
    snprintf(s->prefix, sizeof s->prefix, ESPI_SERVER_PREFIX "%08x", (unsigned)words[0]);
}

static esp_status open_server(espi_server *s, const espi_server_config *config) {
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
    ESPI_TRY(espi_server_look_around(s, deadline));
    ESPI_TRY(espi_server_publish(s, s->c.version, deadline));
    espi_server_groups gs = {0};
    const esp_status status = espi_server_probe(s, &gs, deadline);
    espi_server_groups_free(&gs);
    return status;
}

static void close_server(void *self) {
    espi_server *s = self;
    const double deadline = espi_seconds() + CLOSE_SECONDS;
    s->c.stop = NULL; /* who stops wants this done too */
    for (int32_t i = 0; i < s->n_published; i++)
        if (espi_server_unload(s, s->published[i].name, deadline) != ESP_OK)
            espi_log(s->model->ctx, ESP_LOG_WARN, "adapter %s stays loaded: %s", s->published[i].name, esp_last_error());
    espi_http_destroy(s->http);
    for (int i = 0; i < ESPI_COUNT(s->strings); i++) free(s->strings[i]);
    free(s->published);
    free(s);
}

esp_status espi_server_open(espi_rollout_source *source, esp_model *model, const espi_server_config *config) {
    espi_server *s = calloc(1, sizeof *s);
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
    const espi_server *s = source->self;
    *counts = s->counts;
    counts->retries = espi_http_retries(s->http);
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
