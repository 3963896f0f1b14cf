/* The adapter's memory: one block with all parameters, then all gradients, and the public view of each tensor. */
#include "core/rng.h"
#include "models/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a target is called, where its branch hangs in a layer, and its shape: A [experts,r,in], B [experts,out,r]; experts 0: two
 * dimensions. */
typedef struct branch {
    espi_lora *lora;
    const char *name;
    int64_t experts, in, out;
} branch;

static int branches_of(branch out[ESPI_T_COUNT], const espi_config *c, espi_layer *w) {
    const branch all[ESPI_T_COUNT] = {
        [ESPI_T_Q] = {&w->q.lora, "self_attn.q_proj", 0, w->q.w.cols, w->q.w.rows},
        [ESPI_T_K] = {&w->k.lora, "self_attn.k_proj", 0, w->k.w.cols, w->k.w.rows},
        [ESPI_T_V] = {&w->v.lora, "self_attn.v_proj", 0, w->v.w.cols, w->v.w.rows},
        [ESPI_T_O] = {&w->o.lora, "self_attn.o_proj", 0, w->o.w.cols, w->o.w.rows},
        [ESPI_T_GATE_UP] = {&w->lora_gate_up, "mlp.experts.gate_up", c->experts, w->gate_up.cols, w->gate_up.rows},
        [ESPI_T_DOWN] = {&w->lora_down, "mlp.experts.down", c->experts, w->down.cols, w->down.rows},
    };
    const int n = w->mlp == ESPI_MLP_MOE ? ESPI_T_COUNT : ESPI_T_GATE_UP;
    memcpy(out, all, (size_t)n * sizeof *out);
    return n;
}

static int64_t matrices(const branch *b) {
    return b->experts ? b->experts : 1;
}

/* What the walk below has passed. */
typedef struct layout {
    size_t parameters, gradients; /* bytes of the two halves */
    int64_t tensors;
} layout;

static void place(layout *at, const branch *b, size_t real_size, unsigned char *base, size_t gradients_from) {
    espi_lora *lora = b->lora;
    const size_t a = ESPI_ALIGNED((size_t)(matrices(b) * lora->r * b->in) * real_size);
    const size_t both = a + ESPI_ALIGNED((size_t)(matrices(b) * b->out * lora->r) * real_size);
    if (base) {
        unsigned char *p = base + at->parameters, *g = base + gradients_from + at->gradients;
        lora->a = p;
        lora->b = p + a;
        lora->d_a = g;
        lora->d_b = g + a;
    }
    at->parameters += both;
    at->gradients += both;
    at->tensors += 2;
}

/* A gradient without a parameter of ours. */
static void place_frozen(void **gradient, layout *at, int64_t n, size_t real_size, unsigned char *base, size_t gradients_from) {
    if (base) *gradient = base + gradients_from + at->gradients;
    at->gradients += ESPI_ALIGNED((size_t)n * real_size);
}

/* Where every tensor lies, for the plan and for the real block alike.  base NULL: counts only. */
static layout walk(esp_model *model, size_t real_size, unsigned char *base, size_t gradients_from) {
    layout at = {0};
    for (int64_t l = 0; l < model->config.layers; l++) {
        branch b[ESPI_T_COUNT];
        espi_layer *w = &model->layers[l];
        const int n = branches_of(b, &model->config, w);
        for (int i = 0; i < n; i++)
            if (b[i].lora->r) place(&at, &b[i], real_size, base, gradients_from);
        if (!model->options.train_router) continue;
        if (w->mlp == ESPI_MLP_MOE) place_frozen(&w->d_router, &at, w->router.rows * w->router.cols, real_size, base, gradients_from);
        if (model->config.sinks) place_frozen(&w->d_sinks, &at, model->config.heads, real_size, base, gradients_from);
    }
    return at;
}

void espi_adapter_bytes(size_t *parameters, size_t *gradients, esp_model *model, size_t real_size) {
    const layout at = walk(model, real_size, NULL, 0);
    *parameters = at.parameters;
    *gradients = at.gradients;
}

void espi_lora_draw(void *a, esp_dtype real, uint64_t seed, int64_t layer, int target, int64_t experts, int64_t r, int64_t in) {
    const double bound = 1.0 / sqrt((double)in);
#pragma omp parallel for schedule(static) if (experts * r * in > (1 << 16))
    for (int64_t e = 0; e < experts; e++) {
        for (int64_t i = 0; i < r * in; i++) {
            const double u = espi_uniform(seed, ESPI_STREAM_LORA_INIT, (uint32_t)layer, (uint32_t)e, (uint32_t)target, (uint32_t)i);
            const float value = (float)(bound * (2.0 * u - 1.0)); /* the same under f64, so that backends start alike */
            if (real == ESP_F64)
                ((double *)a)[e * r * in + i] = value;
            else
                ((float *)a)[e * r * in + i] = value;
        }
    }
}

esp_status espi_lora_draw_into(esp_ctx *ctx, void *a, uint64_t seed, int64_t layer, int target, int64_t experts, int64_t r, int64_t in) {
    const size_t bytes = (size_t)(experts * r * in) * ctx->real_size;
    void *drawn = ctx->device ? malloc(bytes) : a;
    if (!drawn) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to draw an adapter (%zu bytes)", bytes);
    espi_lora_draw(drawn, ctx->real, seed, layer, target, experts, r, in);
    const esp_status status = espi_ctx_put(ctx, a, drawn, bytes);
    if (ctx->device) free(drawn);
    return status;
}

static char *name_of(int64_t layer, const char *target, char matrix) {
    char name[96];
    snprintf(name, sizeof name, "layers.%lld.%s.lora_%c", (long long)layer, target, matrix);
    char *copy = malloc(strlen(name) + 1);
    if (copy) strcpy(copy, name);
    return copy;
}

/* dims: leading expert dimension only where there is one. */
static esp_status describe(esp_model *model, int64_t layer, const branch *b, char matrix, int64_t rows, int64_t cols) {
    const espi_lora *lora = b->lora;
    esp_param *p = &model->params[model->n_params];
    *p = (esp_param){.struct_size = sizeof *p,
                     .name = name_of(layer, b->name, matrix),
                     .data = (void *)(matrix == 'A' ? lora->a : lora->b),
                     .grad = matrix == 'A' ? lora->d_a : lora->d_b,
                     .dims = {rows, cols},
                     .rank = 2,
                     .dtype = model->ctx->real};
    if (!p->name) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a parameter's name");
    if (b->experts) {
        memcpy(p->dims, (const int64_t[]){b->experts, rows, cols}, sizeof p->dims);
        p->rank = 3;
    }
    model->n_params++;
    return ESP_OK;
}

esp_status espi_model_init_adapter(esp_model *model) {
    const size_t real_size = model->ctx->real_size;
    const layout count = walk(model, real_size, NULL, 0);
    model->params = calloc((size_t)count.tensors + 1, sizeof *model->params);
    if (!model->params) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the names of %lld parameters", (long long)count.tensors);
    void *p;
    ESPI_TRY(espi_ctx_alloc(model->ctx, ESPI_MEM_ADAPTER, count.parameters + count.gradients, &p));
    model->adapter = (espi_block){.purpose = ESPI_MEM_ADAPTER, .p = p, .bytes = count.parameters + count.gradients};
    walk(model, real_size, p, count.parameters);
    for (int64_t l = 0; l < model->config.layers; l++) {
        branch b[ESPI_T_COUNT];
        const int n = branches_of(b, &model->config, &model->layers[l]);
        for (int i = 0; i < n; i++) {
            const int64_t r = b[i].lora->r;
            if (r == 0) continue;
            ESPI_TRY(espi_lora_draw_into(model->ctx, (void *)b[i].lora->a, model->options.seed, l, i, matrices(&b[i]), r, b[i].in));
            ESPI_TRY(describe(model, l, &b[i], 'A', r, b[i].in));
            ESPI_TRY(describe(model, l, &b[i], 'B', b[i].out, r));
        }
    }
    return ESP_OK;
}

void espi_adapter_names_free(esp_model *model) {
    for (int64_t i = 0; i < model->n_params; i++) free((char *)model->params[i].name);
    free(model->params);
    model->params = NULL;
    model->n_params = 0;
}
