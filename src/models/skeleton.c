/* The model's shapes without its data: what a plan walks, and what the loader fills. */
#include "models/model.h"

#include <stdlib.h>

static espi_lora branch(const esp_model *model, int target) {
    return (espi_lora){.r = model->lora[target].r, .scale = model->lora[target].scale};
}

/* What a matrix is held in for which config.json says `stated`: a GPU multiplies in bf16. */
static esp_dtype held(const esp_model *model, esp_dtype stated) {
    return model->ctx->act == ESP_BF16 ? ESP_BF16 : stated;
}

static espi_linear projection(const esp_model *model, int64_t out, int64_t in, espi_lora lora) {
    return (espi_linear){.w = {.dtype = held(model, ESP_F32), .rows = out, .cols = in}, .lora = lora};
}

static espi_stack stack(const esp_model *model, int64_t rows, int64_t cols, int parts) {
    const espi_config *c = &model->config;
    const esp_qformat format = model->options.experts;
    const int64_t n = rows / parts * cols, block = format == ESP_MXFP4 ? ESPI_MXBLOCK : ESPI_QBLOCK, blocks = (n + block - 1) / block;
    return (espi_stack){.format = format,
                        .dtype = held(model, c->stored_dtype),
                        .experts = model->share.count,
                        .rows = rows,
                        .cols = cols,
                        .parts = parts,
                        .part_bytes = format == ESP_Q_NONE ? (size_t)n * esp_dtype_size(held(model, c->stored_dtype)) : ((size_t)n + 1) / 2,
                        .part_blocks = format == ESP_Q_NONE ? 0 : blocks,
                        .part_nested = model->options.double_quant ? (blocks + ESPI_NESTED_BLOCK - 1) / ESPI_NESTED_BLOCK : 0};
}

esp_status espi_model_skeleton(esp_model *model) {
    const espi_config *c = &model->config;
    const int64_t h = c->hidden, nq = c->heads * c->head_dim, nk = c->kv_heads * c->head_dim;
    ESPI_TRY(espi_share_make(&model->share, model->ctx->comm, c->experts, model->options.expert_ranks, model->options.expert_rows));
    model->layers = calloc((size_t)c->layers, sizeof *model->layers);
    if (!model->layers) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the bookkeeping of %lld layers", (long long)c->layers);
    model->embed = model->head = (espi_mat){.dtype = held(model, c->stored_dtype), .rows = c->vocab, .cols = h};
    for (int64_t l = 0; l < c->layers; l++) {
        espi_layer *w = &model->layers[l];
        w->mlp = c->mlp_kind[l];
        w->q = projection(model, nq, h, branch(model, ESPI_T_Q));
        w->k = projection(model, nk, h, branch(model, ESPI_T_K));
        w->v = projection(model, nk, h, branch(model, ESPI_T_V));
        w->o = projection(model, h, nq, branch(model, ESPI_T_O));
        if (w->mlp == ESPI_MLP_DENSE) {
            w->mlp_gate_up = projection(model, 2 * c->dense_width, h, (espi_lora){0});
            w->mlp_down = projection(model, h, c->dense_width, (espi_lora){0});
            continue;
        }
        w->router = (espi_mat){.dtype = ESP_F32, .rows = c->experts, .cols = h};
        /* Interleaved rows cannot be told apart by a border: gate and up are one matrix then. */
        w->gate_up = stack(model, 2 * c->expert_width, h, c->glu.interleaved ? 1 : 2);
        w->down = stack(model, h, c->expert_width, 1);
        w->lora_gate_up = branch(model, ESPI_T_GATE_UP);
        w->lora_down = branch(model, ESPI_T_DOWN);
        if (c->shared_width) {
            w->shared_gate_up = projection(model, 2 * c->shared_width, h, (espi_lora){0});
            w->shared_down = projection(model, h, c->shared_width, (espi_lora){0});
        }
    }
    return ESP_OK;
}

void espi_model_skeleton_free(esp_model *model) {
    free(model->layers);
    model->layers = NULL;
}
