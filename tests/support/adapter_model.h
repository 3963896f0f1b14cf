/* A model that is nothing but an adapter: attention projections of one layer, so that the optimiser can be tried on tensors of any size. */
#ifndef ESP_TEST_ADAPTER_MODEL_H
#define ESP_TEST_ADAPTER_MODEL_H

#include "models/passes.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

/* q: A [r,in], B [out,r]. */
typedef struct adapter_shape {
    int64_t r, in, out;
} adapter_shape;

typedef struct adapter_model {
    esp_model model;
    espi_layer layer;
    esp_param params[4];
    void *memory;
} adapter_model;

static inline void adapter_branch(adapter_model *m, espi_linear *linear, adapter_shape shape) {
    static const char *const names[] = {"layers.0.q.lora_A", "layers.0.q.lora_B", "layers.0.k.lora_A", "layers.0.k.lora_B"};
    linear->w.rows = shape.out;
    linear->w.cols = shape.in;
    linear->lora.r = shape.r;
    for (int side = 0; side < 2 && shape.r; side++) {
        const int64_t i = m->model.n_params++;
        m->params[i] = (esp_param)ESP_PARAM_INIT;
        m->params[i].name = names[i];
        m->params[i].rank = 2;
        m->params[i].dims[0] = side == 0 ? shape.r : shape.out;
        m->params[i].dims[1] = side == 0 ? shape.in : shape.r;
        m->params[i].dtype = m->model.ctx->real;
    }
}

/* k.r = 0: q alone.  Not to be moved afterwards: the model points into it. */
static inline void adapter_model_make(adapter_model *m, esp_ctx *ctx, adapter_shape q, adapter_shape k) {
    *m = (adapter_model){.model = {.ctx = ctx, .config = {.layers = 1}, .share = {.ranks = 1, .spread = 1}}};
    m->model.layers = &m->layer;
    m->model.params = m->params;
    adapter_branch(m, &m->layer.q, q);
    adapter_branch(m, &m->layer.k, k);
    size_t values = 0;
    for (int64_t i = 0; i < m->model.n_params; i++) values += (size_t)(m->params[i].dims[0] * m->params[i].dims[1]);
    unsigned char *next = m->memory = calloc(2 * values, ctx->real_size);
    cr_assert_not_null(next);
    for (int64_t i = 0; i < m->model.n_params; i++) {
        const size_t bytes = (size_t)(m->params[i].dims[0] * m->params[i].dims[1]) * ctx->real_size;
        m->params[i].data = next;
        m->params[i].grad = next + bytes;
        next += 2 * bytes;
    }
}

#endif
