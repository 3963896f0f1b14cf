/* The bundled model and tasks, and trainers on them. */
#ifndef TESTS_SUPPORT_DEMO_H
#define TESTS_SUPPORT_DEMO_H

#include <criterion/criterion.h>

#include "espalier/espalier.h"
#include "models/model.h"
#include "outcome.h"
#include "rl/run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEMO_MODEL ESP_SOURCE_DIR "/examples/models/mix-moe"
#define DEMO_PROMPTS ESP_SOURCE_DIR "/examples/tasks/mix-prompts.jsonl"
#define DEMO_LINES ESP_SOURCE_DIR "/examples/tasks/mix-train.jsonl"
#define DEMO_EVAL ESP_SOURCE_DIR "/examples/tasks/mix-eval.jsonl"

typedef struct demo {
    esp_ctx *ctx;
    esp_model *model;
    esp_tokenizer *tokenizer;
    esp_trainer *trainer;
} demo;

#define DEMO_GPT_OSS ESP_SOURCE_DIR "/examples/models/mix-gptoss"

/* A model; B of its adapter is filled too when `trained`, so that the adapter says something. */
static inline demo demo_model_of(const char *dir, uint64_t seed, bool trained) {
    demo d = {NULL, NULL, NULL, NULL};
    OK(esp_ctx_create(&d.ctx, NULL));
    OK(esp_model_load(&d.model, d.ctx, dir, &ESP_MODEL_CONFIG(.seed = seed)));
    OK(esp_tokenizer_load(&d.tokenizer, dir));
    for (int64_t i = 0; trained && i < esp_model_param_count(d.model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(d.model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        float *x = p.data;
        for (int64_t k = 0; k < esp_tensor_count(&view); k++) x[k] += 0.01f * (float)((k * 7 + i) % 11 - 5);
    }
    return d;
}

static inline demo demo_model(uint64_t seed, bool trained) {
    return demo_model_of(DEMO_MODEL, seed, trained);
}

static inline demo demo_trainer_of(const char *dir, const esp_trainer_config *config) {
    size_t foretold, host, planned, peak;
    esp_ctx *before;
    demo d = demo_model_of(dir, config->seed, false);
    OK(esp_ctx_create(&before, NULL));
    OK(esp_trainer_plan(&foretold, &host, before, dir, &ESP_MODEL_CONFIG(.seed = config->seed), d.tokenizer, config));
    esp_ctx_destroy(before);
    OK(esp_trainer_create(&d.trainer, d.model, d.tokenizer, config));
    OK(esp_trainer_memory(d.trainer, &planned, &peak));
    cr_assert_eq(host, 0);
    cr_assert_eq(foretold, planned, "%zu bytes planned before loading, %zu after it", foretold, planned);
    return d;
}

static inline demo demo_trainer(const esp_trainer_config *config) {
    return demo_trainer_of(DEMO_MODEL, config);
}

/* A run in which a step has every part that it can have. */
static inline void demo_everything(esp_trainer_config *c) {
    c->updates_per_batch = 2;
    c->steps_per_generation = 2;
    c->resample_tries = 2;
    c->reference = ESP_REFERENCE_SNAPSHOT;
    c->ref_sync_every = 3;
    c->objective.beta = 0.02f;
    c->entropy_target = 0.3f;
    c->overlong_share = 0.3f;
    c->correction = ESP_CORRECTION_TIS;
}

static inline void demo_free(demo *d) {
    esp_trainer_destroy(d->trainer);
    esp_tokenizer_destroy(d->tokenizer);
    esp_model_destroy(d->model);
    esp_ctx_destroy(d->ctx);
}

/* Adapter and moments of both are the same bits. */
static inline void demo_same_state(const demo *a, const demo *b) {
    for (int64_t i = 0; i < esp_model_param_count(a->model); i++) {
        esp_param x = ESP_PARAM_INIT, y = ESP_PARAM_INIT;
        OK(esp_model_param_get(a->model, i, &x));
        OK(esp_model_param_get(b->model, i, &y));
        const esp_tensor view = esp_tensor_view(x.data, x.dtype, x.rank, x.dims);
        cr_assert_eq(memcmp(x.data, y.data, (size_t)esp_tensor_count(&view) * esp_dtype_size(x.dtype)), 0, "%s differs", x.name);
    }
    for (int64_t i = 0; i < esp_optim_array_count(a->trainer->optim); i++) {
        esp_optim_array x = ESP_OPTIM_ARRAY_INIT, y = ESP_OPTIM_ARRAY_INIT;
        OK(esp_optim_array_get(a->trainer->optim, i, &x));
        OK(esp_optim_array_get(b->trainer->optim, i, &y));
        cr_assert_eq(memcmp(x.data, y.data, (size_t)x.count * esp_dtype_size(x.dtype)), 0, "%s differs", x.name);
    }
}

/* A folder of the test's own under the system's temporary one. */
static inline void demo_folder(char path[256], const char *name) {
    snprintf(path, 256, "%s/espalier-%ld-%s", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp", (long)getpid(), name);
}

static inline void demo_remove(const char *dir) {
    static const char *const files[] = {"metrics.jsonl",
                                        "completions.jsonl",
                                        "checkpoint.h5",
                                        "adapter/adapter_config.json",
                                        "adapter/adapter_model.safetensors",
                                        "adapter",
                                        ".lock",
                                        ""};
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", dir, files[i]);
        remove(path);
    }
}

#endif
