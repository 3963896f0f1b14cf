/* The loader on its own: a model's frozen weights without adapter or passes. */
#ifndef ESP_TEST_LOADED_H
#define ESP_TEST_LOADED_H

#include "checkpoint.h"
#include "models/passes.h"

typedef struct loaded {
    esp_ctx *ctx;
    esp_model *model;
    char log[4096]; /* warnings, one line each */
} loaded;

static inline void loaded_log(void *user, esp_log_level level, const char *line) {
    loaded *l = user;
    const size_t n = strlen(l->log);
    if (level == ESP_LOG_WARN) snprintf(l->log + n, sizeof l->log - n, "%s\n", line);
}

/* The status of loading; the model is there to be looked at when it is ESP_OK.  In both cases: loaded_free(). */
static inline esp_status loaded_try(loaded *l, const char *dir, const esp_model_config *options) {
    *l = (loaded){0};
    OK(esp_ctx_create(&l->ctx, &ESP_CTX_CONFIG(.backend = "ref", .log = loaded_log, .log_user = l)));
    l->model = calloc(1, sizeof *l->model);
    cr_assert_not_null(l->model);
    l->model->ctx = l->ctx;
    esp_status status = espi_config_read(&l->model->config, dir);
    if (status == ESP_OK) status = espi_model_options(&l->model->options, l->model->lora, options, &l->model->config);
    return status == ESP_OK ? espi_model_load_weights(l->model, dir) : status;
}

static inline void loaded_free(loaded *l) {
    espi_room_free(&l->model->weights, l->ctx);
    espi_model_skeleton_free(l->model);
    espi_config_free(&l->model->config);
    free(l->model);
    esp_ctx_destroy(l->ctx);
}

/* model: "q3a/model" of the golden data. */
static inline void loaded_golden(loaded *l, const char *model, const esp_model_config *options) {
    char dir[ESPI_PATH_MAX];
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s", ESP_SOURCE_DIR, model);
    OK(loaded_try(l, dir, options));
}

/* All frozen bytes are equal: layouts agree, so one comparison says it of every weight. */
static inline bool loaded_same(const loaded *a, const loaded *b) {
    const espi_room *x = &a->model->weights, *y = &b->model->weights;
    return x->extent.main == y->extent.main && memcmp(x->main, y->main, x->extent.main) == 0;
}

#endif
