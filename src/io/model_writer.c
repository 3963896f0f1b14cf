/* A checkpoint folder made from another one. */
#include "io/model_writer.h"

#include "core/status.h"
#include "io/file.h"
#include "io/folder.h"

#include <stdlib.h>
#include <string.h>

#define INDEX "model.safetensors.index.json"
#define CONFIG "config.json"
enum { MAX_CONFIG = 16 << 20 };

struct espi_shard {
    const espi_st_file *from;
    const char *name; /* of both files, without the folder */
    espi_st_item *items;
    size_t n, room;
};

esp_status espi_shard_add(espi_shard *shard, const espi_st_item *item) {
    if (shard->n == shard->room) {
        const size_t room = shard->room ? 2 * shard->room : 64;
        espi_st_item *more = realloc(shard->items, room * sizeof *more);
        if (!more) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of %zu tensors", shard->name, room);
        shard->items = more;
        shard->room = room;
    }
    const size_t bytes = strlen(item->name) + 1;
    char *name = malloc(bytes);
    if (!name) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the name %s", shard->name, item->name);
    memcpy(name, item->name, bytes);
    shard->items[shard->n] = *item;
    shard->items[shard->n++].name = name;
    return ESP_OK;
}

static esp_status read_whole(void *user, void *buffer, size_t bytes) {
    return espi_st_read(user, buffer, 0, bytes);
}

esp_status espi_shard_keep(espi_shard *shard, const espi_st_tensor *tensor) {
    if (tensor->dtype == ESP_DTYPE_NONE)
        return ESPI_FAIL(ESP_ERR_DTYPE, "%s: tensor %s: got %s, expected a dtype that can be written again", espi_st_path(tensor->file),
                         tensor->name, tensor->dtype_name);
    espi_st_item item = {.name = tensor->name, .dtype = tensor->dtype, .rank = tensor->rank, .fill = read_whole, .user = (void *)tensor};
    memcpy(item.dims, tensor->dims, sizeof item.dims);
    return espi_shard_add(shard, &item);
}

static void shard_free(espi_shard *shard) {
    for (size_t i = 0; i < shard->n; i++) free((char *)shard->items[i].name);
    free(shard->items);
}

static uint64_t item_bytes(const espi_st_item *item) {
    uint64_t n = esp_dtype_size(item->dtype);
    for (int i = 0; i < item->rank; i++) n *= (uint64_t)item->dims[i];
    return n;
}

/* One shard for every file of the old folder, in the order in which its tensors are met. */
static esp_status plan_shards(espi_shard *shards, size_t *n, espi_st_set *in, const espi_model_edit *edit) {
    *n = 0;
    for (size_t i = 0; i < espi_st_set_count(in); i++) {
        const espi_st_file *file = espi_st_set_at(in, i)->file;
        size_t s = 0;
        while (s < *n && shards[s].from != file) s++;
        if (s == *n) {
            const char *path = espi_st_path(file), *slash = strrchr(path, '/');
            shards[(*n)++] = (espi_shard){.from = file, .name = slash ? slash + 1 : path};
        }
        ESPI_TRY(edit->tensor(edit->user, &shards[s], espi_st_set_at(in, i)));
    }
    return ESP_OK;
}

static esp_status write_json(const char *dir, const char *name, const json_t *root) {
    char path[ESPI_PATH_MAX];
    ESPI_TRY(espi_path_join(path, dir, name));
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    const esp_status status = text ? espi_file_write_atomic(path, text, strlen(text)) : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory", path);
    free(text);
    return status;
}

static esp_status write_index(const char *out_dir, const espi_shard *shards, size_t n) {
    json_t *map = json_object();
    uint64_t total = 0;
    for (size_t s = 0; s < n; s++) {
        for (size_t i = 0; i < shards[s].n; i++) {
            json_object_set_new(map, shards[s].items[i].name, json_string(shards[s].name));
            total += item_bytes(&shards[s].items[i]);
        }
    }
    json_t *root = json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    const esp_status status = write_json(out_dir, INDEX, root);
    json_decref(root);
    return status;
}

static esp_status write_config(const char *out_dir, const char *in_dir, const espi_model_edit *edit) {
    char path[ESPI_PATH_MAX], *text;
    size_t bytes;
    json_error_t error;
    ESPI_TRY(espi_path_join(path, in_dir, CONFIG));
    ESPI_TRY(espi_file_read_all(&text, &bytes, path, MAX_CONFIG));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!root) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: line %d: %s", path, error.line, error.text);
    esp_status status = edit->config ? edit->config(edit->user, root) : ESP_OK;
    if (status == ESP_OK) status = write_json(out_dir, CONFIG, root);
    json_decref(root);
    return status;
}

static bool ends_with(const char *name, const char *end) {
    const size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

/* The tokenizer's files and what else lies there; weights in whatever format are those of the old model. */
static esp_status copy_others(const char *out_dir, const char *in_dir) {
    static const char *const weights[] = {".safetensors", ".index.json", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack"};
    char **names, from[ESPI_PATH_MAX], to[ESPI_PATH_MAX];
    size_t n;
    ESPI_TRY(espi_folder_list(&names, &n, in_dir));
    esp_status status = ESP_OK;
    for (size_t i = 0; i < n && status == ESP_OK; i++) {
        bool skip = strcmp(names[i], CONFIG) == 0;
        for (int j = 0; j < ESPI_COUNT(weights); j++) skip |= ends_with(names[i], weights[j]);
        status = espi_path_join(from, in_dir, names[i]);
        if (status != ESP_OK || skip || !espi_file_exists(from)) continue;
        status = espi_path_join(to, out_dir, names[i]);
        if (status == ESP_OK) status = espi_file_copy(to, from);
    }
    espi_folder_list_free(names, n);
    return status;
}

static esp_status write_all(const char *out_dir, const char *in_dir, const espi_shard *shards, size_t n, const espi_model_edit *edit) {
    char path[ESPI_PATH_MAX];
    ESPI_TRY(espi_dir_make(out_dir));
    for (size_t s = 0; s < n; s++) {
        ESPI_TRY(espi_path_join(path, out_dir, shards[s].name));
        ESPI_TRY(espi_st_write(path, shards[s].items, shards[s].n));
    }
    ESPI_TRY(espi_path_join(path, in_dir, INDEX));
    if (espi_file_exists(path)) ESPI_TRY(write_index(out_dir, shards, n));
    ESPI_TRY(copy_others(out_dir, in_dir));
    return write_config(out_dir, in_dir, edit);
}

esp_status espi_model_rewrite(const char *out_dir, const char *in_dir, espi_st_set *in, const espi_model_edit *edit) {
    char path[ESPI_PATH_MAX];
    ESPI_TRY(espi_path_join(path, out_dir, CONFIG));
    if (espi_file_exists(path)) return ESPI_FAIL(ESP_ERR_ARG, "%s: is there already, expected a new or empty folder to write to", path);
    espi_shard *shards = calloc(espi_st_set_count(in) + 1, sizeof *shards); /* no more than tensors */
    if (!shards) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the list of its files", out_dir);
    size_t n;
    esp_status status = plan_shards(shards, &n, in, edit);
    if (status == ESP_OK) status = write_all(out_dir, in_dir, shards, n, edit);
    for (size_t s = 0; s < n; s++) shard_free(&shards[s]);
    free(shards);
    return status;
}
