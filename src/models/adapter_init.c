/* The adapter's memory: one block with all parameters, then all gradients, and the public view of each tensor. */
#include "core/rng.h"
#include "models/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What a target is called, where its branch hangs in a layer, and its shape: A [experts,r,in], B [experts,out,r]; without of_experts: two
 * dimensions. */
typedef struct branch {
    espi_lora *lora;
    const char *name;
    bool of_experts;
    int64_t experts, in, out;
} branch;

static int branches_of(branch out[ESPI_T_COUNT], espi_layer *w) {
    const branch all[ESPI_T_COUNT] = {
        [ESPI_T_Q] = {&w->q.lora, "self_attn.q_proj", false, 1, w->q.w.cols, w->q.w.rows},
        [ESPI_T_K] = {&w->k.lora, "self_attn.k_proj", false, 1, w->k.w.cols, w->k.w.rows},
        [ESPI_T_V] = {&w->v.lora, "self_attn.v_proj", false, 1, w->v.w.cols, w->v.w.rows},
        [ESPI_T_O] = {&w->o.lora, "self_attn.o_proj", false, 1, w->o.w.cols, w->o.w.rows},
        [ESPI_T_GATE_UP] = {&w->lora_gate_up, "mlp.experts.gate_up", true, w->gate_up.experts, w->gate_up.cols, w->gate_up.rows},
        [ESPI_T_DOWN] = {&w->lora_down, "mlp.experts.down", true, w->down.experts, w->down.cols, w->down.rows},
    };
    const int n = w->mlp == ESPI_MLP_MOE ? ESPI_T_COUNT : ESPI_T_GATE_UP;
    memcpy(out, all, (size_t)n * sizeof *out);
    return n;
}

/* The three parts of the block: parameters, gradients, and, where ranks sum theirs, what this rank adds.  Bytes of each so far. */
typedef struct layout {
    unsigned char *base;          /* NULL: counts only */
    size_t gradients_at, sums_at; /* where the parts begin */
    size_t parameters, gradients, partial;
    int64_t tensors, sums, sum_values;
    size_t real_size;
} layout;

static void *at(const layout *l, size_t offset) {
    return l->base ? l->base + offset : NULL;
}

/* Where a gradient, and what ranks add to it, lie.  *gradient: what the ops add to; total: what it belongs to in the end. */
static void *place_gradient(void **gradient, layout *l, esp_model *model, int64_t experts, int64_t each, bool of_experts) {
    const int64_t n = experts * each;
    void *total = at(l, l->gradients_at + l->gradients), *partial = at(l, l->sums_at + l->partial);
    l->gradients += ESPI_ALIGNED((size_t)n * l->real_size);
    const bool sums = espi_share_sums(&model->share, of_experts);
    if (l->base) *gradient = sums ? partial : total;
    if (!sums) return total;
    if (l->base) model->sums[l->sums] = (espi_sum){.total = total, .partial = partial, .n = n, .each = each, .of_experts = of_experts};
    /* Of experts that several ranks hold: one for each rank of the group, whose rows they see one after the other. */
    l->sum_values += espi_share_sum_values(&model->share, n, each, of_experts);
    l->partial += ESPI_ALIGNED((size_t)(n * (of_experts ? model->share.spread : 1)) * l->real_size);
    l->sums++;
    return total;
}

static void place_matrix(void **parameter, void **gradient, layout *l, esp_model *model, const branch *b, int64_t each) {
    const int64_t n = b->experts * each;
    void *data = at(l, l->parameters), *total = place_gradient(gradient, l, model, b->experts, each, b->of_experts);
    l->parameters += ESPI_ALIGNED((size_t)n * l->real_size);
    if (l->base) {
        *parameter = data;
        model->params[l->tensors].data = data;
        model->params[l->tensors].grad = total;
    }
    l->tensors++;
}

/* Where every tensor lies, for the plan and for the real block alike. */
static layout walk(esp_model *model, size_t real_size, unsigned char *base, size_t gradients_at, size_t sums_at) {
    layout l = {.base = base, .gradients_at = gradients_at, .sums_at = sums_at, .real_size = real_size};
    for (int64_t i = 0; i < model->config.layers; i++) {
        branch b[ESPI_T_COUNT];
        espi_layer *w = &model->layers[i];
        const int n = branches_of(b, w);
        for (int t = 0; t < n; t++) {
            espi_lora *lora = b[t].lora;
            if (lora->r == 0) continue;
            place_matrix((void **)&lora->a, &lora->d_a, &l, model, &b[t], lora->r * b[t].in);
            place_matrix((void **)&lora->b, &lora->d_b, &l, model, &b[t], b[t].out * lora->r);
        }
        if (!model->options.train_router) continue;
        if (w->mlp == ESPI_MLP_MOE) place_gradient(&w->d_router, &l, model, 1, w->router.rows * w->router.cols, false);
        if (model->config.sinks) place_gradient(&w->d_sinks, &l, model, 1, model->config.heads, false);
    }
    return l;
}

/* Work memory for the sums. */
static size_t scratch_bytes(const layout *l) {
    return (size_t)espi_share_sum_room(l->sum_values) * l->real_size;
}

void espi_adapter_bytes(size_t *parameters, size_t *gradients, esp_model *model, size_t real_size) {
    const layout all = walk(model, real_size, NULL, 0, 0);
    *parameters = all.parameters;
    *gradients = all.gradients + all.partial + scratch_bytes(&all);
}

void espi_lora_draw(void *a, esp_dtype real, uint64_t seed, int64_t layer, int target, int64_t first, int64_t experts, int64_t r,
                    int64_t in) {
    const double bound = 1.0 / sqrt((double)in);
#pragma omp parallel for schedule(static) if (experts * r * in > (1 << 16))
    for (int64_t e = 0; e < experts; e++) {
        for (int64_t i = 0; i < r * in; i++) {
            const double u =
                espi_uniform(seed, ESPI_STREAM_LORA_INIT, (uint32_t)layer, (uint32_t)(first + e), (uint32_t)target, (uint32_t)i);
            const float value = (float)(bound * (2.0 * u - 1.0)); /* the same under f64, so that backends start alike */
            if (real == ESP_F64)
                ((double *)a)[e * r * in + i] = value;
            else
                ((float *)a)[e * r * in + i] = value;
        }
    }
}

esp_status espi_lora_draw_into(esp_ctx *ctx, void *a, uint64_t seed, int64_t layer, int target, int64_t first, int64_t experts, int64_t r,
                               int64_t in) {
    const size_t bytes = (size_t)(experts * r * in) * ctx->real_size;
    void *drawn = ctx->device ? malloc(bytes) : a;
    if (!drawn) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to draw an adapter (%zu bytes)", bytes);
    espi_lora_draw(drawn, ctx->real, seed, layer, target, first, experts, r, in);
    const esp_status status = espi_ctx_put(ctx, a, drawn, bytes);
    if (ctx->device) free(drawn);
    return status;
}

static char *name_of(int64_t layer, const char *target, char matrix) {
    char name[96];
    snprintf(name, sizeof name, "layers.%lld.%s.lora_%c", (long long)layer, target, matrix);
    const size_t bytes = strlen(name) + 1;
    char *copy = malloc(bytes);
    return copy ? memcpy(copy, name, bytes) : NULL;
}

/* dims: leading expert dimension only where there is one. */
static esp_status describe(esp_model *model, int64_t layer, const branch *b, char matrix, int64_t rows, int64_t cols) {
    esp_param *p = &model->params[model->n_params];
    p->struct_size = sizeof *p;
    p->name = name_of(layer, b->name, matrix);
    p->rank = 2;
    p->dims[0] = rows;
    p->dims[1] = cols;
    p->dtype = model->ctx->real;
    if (!p->name) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a parameter's name");
    if (b->of_experts) {
        memcpy(p->dims, (const int64_t[]){b->experts, rows, cols}, sizeof p->dims);
        p->rank = 3;
    }
    model->n_params++;
    return ESP_OK;
}

esp_status espi_model_init_adapter(esp_model *model) {
    const layout all = walk(model, model->ctx->real_size, NULL, 0, 0);
    const size_t sums_at = all.parameters + all.gradients, bytes = sums_at + all.partial + scratch_bytes(&all);
    model->params = calloc((size_t)all.tensors + 1, sizeof *model->params);
    model->sums = calloc((size_t)all.sums + 1, sizeof *model->sums);
    if (!model->params || !model->sums)
        return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the names of %lld parameters", (long long)all.tensors);
    void *p;
    ESPI_TRY(espi_ctx_alloc(model->ctx, ESPI_MEM_ADAPTER, bytes, &p));
    model->adapter = (espi_block){.purpose = ESPI_MEM_ADAPTER, .p = p, .bytes = bytes};
    walk(model, model->ctx->real_size, p, all.parameters, sums_at);
    model->n_sums = all.sums;
    model->sums_begin = (unsigned char *)p + sums_at;
    model->sums_bytes = all.partial;
    model->sum_scratch = (unsigned char *)p + sums_at + all.partial;
    model->sum_values = espi_share_sum_room(all.sum_values);
    for (int64_t l = 0; l < model->config.layers; l++) {
        branch b[ESPI_T_COUNT];
        const int n = branches_of(b, &model->layers[l]);
        for (int i = 0; i < n; i++) {
            const int64_t r = b[i].lora->r, first = b[i].of_experts ? model->share.first : 0;
            if (r == 0) continue;
            ESPI_TRY(espi_lora_draw_into(model->ctx, (void *)b[i].lora->a, model->options.seed, l, i, first, b[i].experts, r, b[i].in));
            ESPI_TRY(describe(model, l, &b[i], 'A', r, b[i].in));
            ESPI_TRY(describe(model, l, &b[i], 'B', b[i].out, r));
        }
    }
    return ESP_OK;
}

void espi_adapter_names_free(esp_model *model) {
    for (int64_t i = 0; i < model->n_params; i++) free((char *)model->params[i].name);
    free(model->params);
    free(model->sums);
    model->params = NULL;
    model->sums = NULL;
    model->n_params = 0;
}
