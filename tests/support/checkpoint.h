/* A golden model or adapter folder in memory, to be altered and written to a scratch folder. */
#ifndef ESP_TEST_CHECKPOINT_H
#define ESP_TEST_CHECKPOINT_H

#include "golden.h"
#include "scratch.h"

#include <jansson.h>

#define CHECKPOINT_MAX 512

typedef struct checkpoint {
    const char *config_name, *weights_name;
    json_t *config;
    espi_st_file *file;
    espi_st_item items[CHECKPOINT_MAX];
    size_t n;
    void *owned[CHECKPOINT_MAX + 64];
    size_t n_owned;
} checkpoint;

static inline void *checkpoint_own(checkpoint *c, void *p) {
    cr_assert_not_null(p);
    cr_assert_lt(c->n_owned, sizeof c->owned / sizeof *c->owned);
    return c->owned[c->n_owned++] = p;
}

/* folder: "q3a/model" */
static inline checkpoint *checkpoint_open_as(const char *folder, const char *config_name, const char *weights_name) {
    checkpoint *c = calloc(1, sizeof *c);
    cr_assert_not_null(c);
    char name[256], path[ESPI_PATH_MAX];
    c->config_name = config_name;
    c->weights_name = weights_name;
    snprintf(name, sizeof name, "%s/%s", folder, weights_name);
    c->file = golden_open(name);
    snprintf(path, sizeof path, "%s/tests/golden/data/%s/%s", ESP_SOURCE_DIR, folder, config_name);
    c->config = json_load_file(path, 0, NULL);
    cr_assert_not_null(c->config);
    c->n = espi_st_count(c->file);
    cr_assert_lt(c->n, CHECKPOINT_MAX);
    for (size_t i = 0; i < c->n; i++) {
        const espi_st_tensor *t = espi_st_at(c->file, i);
        void *data = checkpoint_own(c, malloc((size_t)t->bytes + 1));
        OK(espi_st_read(t, data, 0, (size_t)t->bytes));
        c->items[i] = (espi_st_item){.name = t->name, .dtype = t->dtype, .rank = t->rank, .data = data};
        memcpy(c->items[i].dims, t->dims, sizeof t->dims);
    }
    return c;
}

static inline checkpoint *checkpoint_open(const char *model) {
    return checkpoint_open_as(model, "config.json", "model.safetensors");
}

static inline void checkpoint_close(checkpoint *c) {
    for (size_t i = 0; i < c->n_owned; i++) free(c->owned[i]);
    json_decref(c->config);
    espi_st_close(c->file);
    free(c);
}

static inline espi_st_item *checkpoint_item(checkpoint *c, const char *name) {
    for (size_t i = 0; i < c->n; i++)
        if (strcmp(c->items[i].name, name) == 0) return &c->items[i];
    cr_assert_fail("no tensor %s", name);
    return NULL;
}

static inline void checkpoint_drop(checkpoint *c, const char *name) {
    espi_st_item *item = checkpoint_item(c, name);
    *item = c->items[--c->n];
}

/* bytes: of data, which is copied. */
static inline espi_st_item *checkpoint_add(checkpoint *c, const char *name, esp_dtype dtype, int rank, const int64_t *dims,
                                           const void *data, size_t bytes) {
    cr_assert_lt(c->n, CHECKPOINT_MAX);
    espi_st_item *item = &c->items[c->n++];
    *item = (espi_st_item){.name = strcpy(checkpoint_own(c, malloc(strlen(name) + 1)), name), .dtype = dtype, .rank = rank};
    memcpy(item->dims, dims, (size_t)rank * sizeof *dims);
    item->data = memcpy(checkpoint_own(c, malloc(bytes + 1)), data, bytes);
    return item;
}

/* value: JSON text; NULL takes the key away. */
static inline void checkpoint_set(checkpoint *c, const char *key, const char *value) {
    if (!value) {
        json_object_del(c->config, key);
        return;
    }
    json_t *v = json_loads(value, JSON_DECODE_ANY, NULL);
    cr_assert_not_null(v, "%s", value);
    json_object_set_new(c->config, key, v);
}

static inline void checkpoint_write_config(const checkpoint *c, const char *dir) {
    char path[ESPI_PATH_MAX], *text = json_dumps(c->config, JSON_INDENT(1));
    cr_assert_not_null(text);
    scratch_write(path, dir, c->config_name, text, strlen(text));
    free(text);
}

static inline void checkpoint_write(const checkpoint *c, const char *dir) {
    char path[ESPI_PATH_MAX];
    checkpoint_write_config(c, dir);
    OK(espi_path_join(path, dir, c->weights_name));
    OK(espi_st_write(path, c->items, c->n));
}

#endif
