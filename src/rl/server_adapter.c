/* Requests to the server that come one at a time, and the versions of the adapter that they are about.
 *
 * A version is a folder and a name that no other version ever has, so nothing that the server keeps under a name (a prefix cache, say) can be
 * of another version.  A load whose answer was lost is settled here: a name that is there already counts as loaded. */
#include "rl/server_state.h"

#include "core/log.h"
#include "io/folder.h"
#include "models/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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

esp_status espi_server_ask(espi_server *s, espi_http_call *call, const char *path, json_t *body, json_t **root, double deadline,
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

esp_status espi_server_models(espi_server *s, json_t **data, double deadline) {
    json_t *root;
    espi_http_call call;
    ESPI_TRY(espi_server_ask(s, &call, "/v1/models", json_object(), &root, deadline, "the list of models"));
    *data = json_incref(json_object_get(root, "data"));
    json_decref(root);
    if (json_is_array(*data)) return ESP_OK;
    json_decref(*data);
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s/v1/models: an answer without a list \"data\", expected one of models", s->c.url);
}

const json_t *espi_server_listed(const json_t *data, const char *id) {
    size_t i;
    json_t *entry;
    json_array_foreach(data, i, entry) {
        const char *name = json_string_value(json_object_get(entry, "id"));
        if (name && strcmp(name, id) == 0) return entry;
    }
    return NULL;
}

/* ---- versions of the adapter ---- */

static esp_status folder_of(char path[ESPI_PATH_MAX], const espi_server *s, const char *name) {
    return espi_path_join(path, s->c.adapter_dir, name);
}

/* A whole folder appears under its name, or nothing. */
static esp_status write_version(const espi_server *s, const char *name) {
    char path[ESPI_PATH_MAX], temp[ESPI_PATH_MAX];
    ESPI_TRY(folder_of(path, s, name));
    ESPI_TRY(espi_file_temp_name(temp, path));
    esp_status status = esp_model_save_adapter(s->model, temp);
    if (status == ESP_OK) status = espi_file_commit(path, temp);
    if (status != ESP_OK) espi_folder_remove(temp);
    return status;
}

void espi_server_remove_version(const espi_server *s, const char *name) {
    char path[ESPI_PATH_MAX];
    if (folder_of(path, s, name) == ESP_OK) espi_folder_remove(path);
}

/* Room for one more name; the list is ascending, so it goes to the end. */
static esp_status remember(espi_server *s, int64_t version, const char *name) {
    espi_published *longer = realloc(s->published, (size_t)(s->n_published + 1) * sizeof *longer);
    if (!longer) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the names of %d adapters", s->n_published + 1);
    s->published = longer;
    espi_published *p = &s->published[s->n_published++];
    *p = (espi_published){.version = version};
    snprintf(p->name, sizeof p->name, "%s", name);
    return ESP_OK;
}

const espi_published *espi_server_newest(const espi_server *s) {
    for (int32_t i = s->n_published - 1; i >= 0; i--)
        if (s->published[i].usable) return &s->published[i];
    return NULL;
}

/* A load may be refused because a try before did load it, and its answer was lost. */
static bool loaded_after_all(espi_server *s, const espi_http_call *call, const char *name, double deadline) {
    json_t *data;
    if (call->tries < 2 || call->status != ESP_ERR_ARG || espi_server_models(s, &data, deadline) != ESP_OK) return false;
    const bool there = espi_server_listed(data, name) != NULL;
    json_decref(data);
    return there;
}

esp_status espi_server_load(espi_server *s, const char *name, double deadline) {
    char path[ESPI_PATH_MAX];
    espi_http_call call;
    ESPI_TRY(espi_path_join(path, s->c.adapter_path, name));
    json_t *body = json_pack("{s:s, s:s}", "lora_name", name, "lora_path", path);
    if (body && s->model->config.family->fused_experts) json_object_set_new(body, "is_3d_lora_weight", json_true());
    const esp_status status = espi_server_ask(s, &call, "/v1/load_lora_adapter", body, NULL, deadline, "an adapter to be loaded");
    if (status == ESP_OK || loaded_after_all(s, &call, name, deadline)) return ESP_OK;
    if (status != ESP_ERR_ARG) return status;
    if (call.code == 404)
        return ESPI_FAIL(
            ESP_ERR_UNSUPPORTED,
            "the server takes no adapter at run time: start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and see "
            "that %s is on its machine too (server_adapter_path): %s",
            path, call.why);
    return ESPI_FAIL(ESP_ERR_ARG, "adapter %s: see that the server may read it there (server_adapter_path) and takes its rank: %s", path,
                     call.why);
}

esp_status espi_server_unload(espi_server *s, const char *name, double deadline) {
    espi_http_call call;
    const esp_status status = espi_server_ask(s, &call, "/v1/unload_lora_adapter", json_pack("{s:s}", "lora_name", name), NULL, deadline,
                                              "an adapter to be unloaded");
    if (status != ESP_OK && call.code != 404) return status;
    espi_server_remove_version(s, name);
    s->counts.unloaded++;
    return ESP_OK;
}

/* No request is open between two calls on the source, so all versions but those that may still be asked for go.  One that does not go is
 * tried again after the next publication. */
static void unload_old(espi_server *s, int64_t version, double deadline) {
    int32_t kept = 0;
    for (int32_t i = 0; i < s->n_published; i++) {
        const espi_published p = s->published[i];
        const bool old = !p.usable || p.version < version - s->c.max_staleness;
        if (old && espi_server_unload(s, p.name, deadline) == ESP_OK) continue;
        if (old) espi_log(s->model->ctx, ESP_LOG_WARN, "adapter %s stays loaded for now: %s", p.name, esp_last_error());
        s->published[kept++] = p;
    }
    s->n_published = kept;
}

esp_status espi_server_publish(espi_server *s, int64_t version, double deadline) {
    const espi_published *last = espi_server_newest(s);
    if (last && last->version == version) return ESP_OK;
    char name[ESPI_SERVER_NAME];
    snprintf(name, sizeof name, "%s-v%lld", s->prefix, (long long)version);
    if (!s->n_published || strcmp(s->published[s->n_published - 1].name, name) != 0) {
        ESPI_TRY(write_version(s, name));
        ESPI_TRY(remember(s, version, name));
    }
    const esp_status status = espi_server_load(s, name, deadline);
    if (status == ESP_OK) {
        s->published[s->n_published - 1].usable = true;
        s->counts.published++;
        unload_old(s, version, deadline);
        return ESP_OK;
    }
    last = espi_server_newest(s);
    if (status != ESP_ERR_COMM || !last || version - last->version > s->c.max_staleness) return status;
    espi_log(s->model->ctx, ESP_LOG_WARN, "adapter version %lld is not loaded, going on with version %lld (max_staleness %d): %s",
             (long long)version, (long long)last->version, s->c.max_staleness, esp_last_error());
    return ESP_OK;
}
