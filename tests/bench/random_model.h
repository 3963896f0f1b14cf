/* A model of a published shape with random weights, made where it runs: what a benchmark needs, without a checkpoint. */
#ifndef ESP_BENCH_RANDOM_MODEL_H
#define ESP_BENCH_RANDOM_MODEL_H

#include "models/model.h"

/* dir: a folder with config.json.  esp_model_destroy() it. */
esp_status random_model(esp_model **model, esp_ctx *ctx, const char *dir, const esp_model_config *config);

#endif
