/* What a run looks at before its first rollout: the server's health, model and context, what a run before left there, and whether its
 * log-probabilities are those of our model at the run's temperature. */
#include "rl/server_state.h"

#include "core/log.h"
#include "core/rng.h"
#include "io/folder.h"
#include "models/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#define PROBE_PROMPTS 4
#define PROBE_SAMPLES 4
#define PROBE_PROMPT 8
#define PROBE_TOKENS 8
#define PROBE_TOLERANCE 0.5 /* mean |server's - ours|: above what 4-bit experts and 16-bit sums make of one model */

static esp_status find_model(espi_server *s, const json_t *data, const json_t **entry) {
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

static esp_status check_context(const espi_server *s, const json_t *entry) {
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
static esp_status clear_left(espi_server *s, const json_t *data, double deadline) {
    size_t i, n;
    json_t *entry;
    char **names, path[ESPI_PATH_MAX];
    json_array_foreach(data, i, entry) {
        const char *id = json_string_value(json_object_get(entry, "id")), *root = json_string_value(json_object_get(entry, "root"));
        if (!id || !root || strncmp(id, ESPI_SERVER_PREFIX, strlen(ESPI_SERVER_PREFIX)) != 0) continue;
        ESPI_TRY(espi_path_join(path, s->c.adapter_path, id));
        if (strcmp(path, root) == 0) ESPI_TRY(espi_server_unload(s, id, deadline));
    }
    ESPI_TRY(espi_folder_list(&names, &n, s->c.adapter_dir));
    for (i = 0; i < n; i++)
        if (strncmp(names[i], ESPI_SERVER_PREFIX, strlen(ESPI_SERVER_PREFIX)) == 0) espi_server_remove_version(s, names[i]);
    espi_folder_list_free(names, n);
    return ESP_OK;
}

/* Mean distances of the server's log-probabilities from ours, at the probe's temperature and at 1. */
typedef struct distances {
    double there, at_one;
} distances;

static esp_status measure(distances *out, esp_model *model, const espi_server_groups *gs, float temperature) {
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

static esp_status judge_distances(espi_server *s, const distances *d, double temperature) {
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
esp_status espi_server_probe(espi_server *s, espi_server_groups *gs, double deadline) {
    const espi_config *m = &s->model->config;
    const float run = s->c.temperature, temperature = run == 1 ? 1 : run < 1 ? fminf(run, 0.5f) : fmaxf(run, 2);
    int32_t prompts[PROBE_PROMPTS][PROBE_PROMPT];
    distances d;
    ESPI_TRY(espi_server_groups_take(gs, s, PROBE_PROMPTS));
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
        ESPI_TRY(espi_server_fill_call(gs, p, espi_server_newest(s)->name, (double)temperature,
                                       espi_server_seed(s->c.seed, UINT32_MAX, (uint32_t)p), UINT32_MAX, p));
    }
    const espi_http_limits limits = {.stop = s->c.stop,
                                     .stop_user = s->c.stop_user,
                                     .deadline = deadline,
                                     .all_or_none = true,
                                     .step = s->runs++,
                                     .awaited = "the probe's completions"};
    ESPI_TRY(espi_http_run(s->http, gs->calls, gs->n, &limits, espi_server_take_reply, gs));
    s->offers_routes = gs->groups[0].reply.offers_routes;
    ESPI_TRY(esp_model_adapter_enable(s->model, true));
    ESPI_TRY(measure(&d, s->model, gs, temperature));
    return judge_distances(s, &d, (double)temperature);
}

esp_status espi_server_look_around(espi_server *s, double deadline) {
    json_t *data;
    const json_t *entry;
    espi_http_call call;
    ESPI_TRY(espi_server_ask(s, &call, "/health", json_object(), NULL, deadline, "the server to be well"));
    ESPI_TRY(espi_server_models(s, &data, deadline));
    esp_status status = find_model(s, data, &entry);
    if (status == ESP_OK) status = check_context(s, entry);
    if (status == ESP_OK) status = clear_left(s, data, deadline);
    json_decref(data);
    return status;
}

esp_status espi_server_reserve(esp_model *model) {
    return esp_model_reserve(model, PROBE_PROMPTS * PROBE_SAMPLES * (PROBE_PROMPT + PROBE_TOKENS), PROBE_PROMPTS * PROBE_SAMPLES, false);
}
