/* Adapters in tests: models that carry them, their values, and what PEFT says that they mean. */
#ifndef ESP_TEST_ADAPTER_FILES_H
#define ESP_TEST_ADAPTER_FILES_H

#include "checkpoint.h"
#include "core/rng.h"
#include "io/adapter.h"
#include "models/passes.h"

#define DATA ESP_SOURCE_DIR "/tests/golden/data/"

static inline checkpoint *adapter_open(const char *folder) {
    return checkpoint_open_as(folder, "adapter_config.json", "adapter_model.safetensors");
}

static inline esp_ctx *context(const char *backend) {
    esp_ctx *ctx = NULL;
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend)));
    return ctx;
}

static inline esp_model *load(esp_ctx *ctx, const char *dir, const esp_model_config *config) {
    esp_model *model = NULL;
    OK(esp_model_load(&model, ctx, dir, config));
    return model;
}

static inline double value(const void *p, int64_t i, const esp_model *m) {
    return m->ctx->real == ESP_F64 ? ((const double *)p)[i] : (double)((const float *)p)[i];
}

static inline int64_t count(const esp_param *p) {
    return p->rank == 3 ? p->dims[0] * p->dims[1] * p->dims[2] : p->dims[0] * p->dims[1];
}

/* Every element of every parameter gets a value that occurs nowhere else. */
static inline void fill(esp_model *m) {
    for (int64_t i = 0; i < esp_model_param_count(m); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(m, i, &p));
        for (int64_t j = 0; j < count(&p); j++) {
            const float x = (float)(espi_uniform(5, ESPI_STREAM_CONTROL, (uint32_t)i, (uint32_t)j, 0, 0) - 0.5);
            if (p.dtype == ESP_F64)
                ((double *)p.data)[j] = x;
            else
                ((float *)p.data)[j] = x;
        }
    }
}

static inline void expect_equal(esp_model *a, esp_model *b) {
    cr_assert_eq(esp_model_param_count(a), esp_model_param_count(b));
    for (int64_t i = 0; i < esp_model_param_count(a); i++) {
        esp_param x = ESP_PARAM_INIT, y = ESP_PARAM_INIT;
        OK(esp_model_param_get(a, i, &x));
        OK(esp_model_param_get(b, i, &y));
        cr_assert_str_eq(x.name, y.name);
        cr_assert_eq(count(&x), count(&y), "%s", x.name);
        for (int64_t j = 0; j < count(&x); j++)
            cr_assert_eq(value(x.data, j, a), value(y.data, j, b), "%s element %lld", x.name, (long long)j);
    }
}

/* scale * B A of one expert against `want` [rows,cols], to f32 rounding. */
static inline void expect_delta(const esp_model *m, const espi_stack *w, const espi_lora *lora, int64_t e, const double *want,
                                const char *what) {
    double *got = calloc((size_t)(w->rows * w->cols), sizeof *got);
    cr_assert_not_null(got);
    for (int64_t o = 0; o < w->rows; o++)
        for (int64_t k = 0; k < lora->r; k++)
            for (int64_t i = 0; i < w->cols; i++)
                got[o * w->cols + i] +=
                    lora->scale * value(lora->b, (e * w->rows + o) * lora->r + k, m) * value(lora->a, (e * lora->r + k) * w->cols + i, m);
    const double error = golden_error(got, want, w->rows * w->cols);
    cr_expect(error <= 1e-6, "%s: error %g", what, error);
    free(got);
}

#endif
