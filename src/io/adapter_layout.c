/* Adapters: the names of the tensors in each form, and where their values lie in a model's parameters. */
#include "core/status.h"
#include "io/adapter.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void espi_adapter_key(char key[ESPI_ADAPTER_KEY], const char *module, int64_t layer, int64_t expert, char matrix) {
    char name[ESPI_ADAPTER_KEY - 64];
    snprintf(name, sizeof name, module, (int)layer, (int)expert);
    snprintf(key, ESPI_ADAPTER_KEY, "base_model.model.%s.lora_%c.weight", name, matrix);
}

void espi_adapter_fused_key(char key[ESPI_ADAPTER_KEY], const espi_family *family, int64_t layer, bool inner, char matrix) {
    char module[ESPI_ADAPTER_KEY - 64];
    snprintf(module, sizeof module, "%s%s", family->experts_module, inner ? ".base_layer" : "");
    espi_adapter_key(key, module, layer, 0, matrix);
}

const char *espi_adapter_attention(const espi_family *family, int target) {
    const char *const modules[] = {family->q, family->k, family->v, family->o};
    return modules[target];
}

const char *espi_adapter_expert(const espi_family *family, espi_projection projection) {
    const char *const modules[] = {family->expert_gate, family->expert_up, family->expert_down};
    return modules[projection];
}

const char *espi_adapter_last_part(const char *module) {
    const char *dot = strrchr(module, '.');
    return dot ? dot + 1 : module;
}

typedef struct list {
    espi_adapter_entry *entries;
    size_t n;
} list;

static espi_adapter_axis plain(int64_t n, int64_t step) {
    return (espi_adapter_axis){.n = n, .inner = n, .minor = step};
}

static espi_adapter_entry *add(list *l, const void *parameter, int64_t first, espi_adapter_axis rows, espi_adapter_axis cols) {
    espi_adapter_entry *e = &l->entries[l->n++];
    *e = (espi_adapter_entry){.parameter = parameter, .first = first, .rows = rows, .cols = cols};
    return e;
}

static void list_attention(list *l, const char *module, int64_t layer, const espi_linear *w) {
    const espi_lora *lora = &w->lora;
    if (lora->r == 0) return;
    espi_adapter_key(add(l, lora->a, 0, plain(lora->r, w->w.cols), plain(w->w.cols, 1))->key, module, layer, 0, 'A');
    espi_adapter_key(add(l, lora->b, 0, plain(w->w.rows, lora->r), plain(lora->r, 1))->key, module, layer, 0, 'B');
}

/* With a stack's A [E,r,in] and B [E,out,r] in memory. */
static void list_fused(list *l, const espi_family *f, int64_t layer, bool inner, const espi_adapter_layout *layout, const espi_stack *w,
                       const espi_lora *lora, const espi_share *share) {
    const int64_t r = lora->r, n = share->experts;
    const int64_t per_a = r * w->cols, per_b = w->rows * r; /* of one expert */
    /* The long axis of the file's A is always e*r + k, that of its B one of two; the steps say in which of our parameters. */
    const bool s = layout->swapped;
    const int64_t a_e = s ? per_b : per_a, a_k = s ? 1 : w->cols, b_e = s ? per_a : per_b, b_k = s ? w->cols : 1;
    const espi_adapter_axis rank_of_a = {n * r, r, a_e, a_k};
    const espi_adapter_axis rank_of_b = layout->slowest ? (espi_adapter_axis){n * r, r, b_e, b_k} : (espi_adapter_axis){n * r, n, b_k, b_e};
    const espi_adapter_axis in = plain(w->cols, 1), out = plain(w->rows, r);
    espi_adapter_entry *a = add(l, s ? lora->b : lora->a, -share->first * a_e, rank_of_a, s ? out : in);
    a->of = ESPI_OF_EXPERT_ROWS;
    a->r = r;
    espi_adapter_fused_key(a->key, f, layer, inner, 'A');
    espi_adapter_entry *b = add(l, s ? lora->a : lora->b, -share->first * b_e, s ? in : out, rank_of_b);
    b->of = ESPI_OF_EXPERT_COLS;
    b->r = r;
    b->slowest = layout->slowest;
    espi_adapter_fused_key(b->key, f, layer, inner, 'B');
}

/* One projection of every expert: `out` rows of B from first_out on, out_step apart; ranks first_rank .. first_rank + r - 1. */
typedef struct part {
    espi_projection projection;
    int64_t out, first_out, out_step, r, first_rank;
} part;

static void list_part(list *l, const espi_family *f, int64_t layer, int64_t e, const espi_stack *w, const espi_lora *lora, part p,
                      const espi_share *share) {
    const char *module = espi_adapter_expert(f, p.projection);
    const int64_t here = e - share->first;
    espi_adapter_entry *a = add(l, lora->a, (here * lora->r + p.first_rank) * w->cols, plain(p.r, w->cols), plain(w->cols, 1));
    a->repeated = p.projection == ESPI_P_UP && p.first_rank == 0;
    a->of = ESPI_OF_ONE;
    a->expert = e;
    espi_adapter_key(a->key, module, layer, e, 'A');
    espi_adapter_entry *b =
        add(l, lora->b, (here * w->rows + p.first_out) * lora->r + p.first_rank, plain(p.out, p.out_step * lora->r), plain(p.r, 1));
    b->of = ESPI_OF_ONE;
    b->expert = e;
    espi_adapter_key(b->key, module, layer, e, 'B');
}

static void list_experts(list *l, const espi_config *c, int64_t i, const espi_adapter_layout *layout, const espi_layer *w,
                         const espi_share *share) {
    const espi_family *f = c->family;
    const espi_lora *gu = &w->lora_gate_up, *dn = &w->lora_down;
    const bool both = layout->fused[ESPI_STACK_GATE_UP] && layout->fused[ESPI_STACK_DOWN];
    if (gu->r && layout->fused[ESPI_STACK_GATE_UP]) list_fused(l, f, i, both && !layout->down_inside, layout, &w->gate_up, gu, share);
    if (dn->r && layout->fused[ESPI_STACK_DOWN]) list_fused(l, f, i, both && layout->down_inside, layout, &w->down, dn, share);
    const int64_t half = w->gate_up.rows / 2, r = layout->separate ? gu->r / 2 : gu->r;
    const bool interleaved = c->glu.interleaved;
    for (int64_t e = 0; e < share->experts; e++) {
        for (int64_t up = 0; up < 2 && gu->r && !layout->fused[ESPI_STACK_GATE_UP]; up++)
            list_part(l, f, i, e, &w->gate_up, gu,
                      (part){.projection = up ? ESPI_P_UP : ESPI_P_GATE,
                             .out = half,
                             .first_out = interleaved ? up : up * half,
                             .out_step = interleaved ? 2 : 1,
                             .r = r,
                             .first_rank = layout->separate ? up * r : 0},
                      share);
        if (dn->r && !layout->fused[ESPI_STACK_DOWN])
            list_part(l, f, i, e, &w->down, dn, (part){.projection = ESPI_P_DOWN, .out = w->down.rows, .out_step = 1, .r = dn->r}, share);
    }
}

esp_status espi_adapter_list(espi_adapter_entry **entries, size_t *n, const esp_model *model, const espi_adapter_layout *layout) {
    const espi_config *c = &model->config;
    list l = {.entries = calloc((size_t)c->layers * (8 + 6 * (size_t)c->experts), sizeof *l.entries)};
    if (!l.entries) return ESPI_FAIL(ESP_ERR_MEMORY, "adapter: no memory for the list of its tensors");
    for (int64_t i = 0; i < c->layers; i++) {
        const espi_layer *w = &model->layers[i];
        const espi_linear *attention[] = {&w->q, &w->k, &w->v, &w->o};
        for (int t = ESPI_T_Q; t <= ESPI_T_O; t++) list_attention(&l, espi_adapter_attention(c->family, t), i, attention[t]);
        if (w->mlp == ESPI_MLP_MOE) list_experts(&l, c, i, layout, w, &model->share);
    }
    *entries = l.entries;
    *n = l.n;
    return ESP_OK;
}

/* ---- parameters in host memory ---- */

esp_status espi_adapter_image_take(espi_adapter_image *image, const esp_model *model, bool to_change) {
    size_t gradients;
    esp_model *walked = (esp_model *)model; /* only counted */
    *image = (espi_adapter_image){.model = model, .copied = to_change || model->ctx->device != NULL};
    espi_adapter_bytes(&image->size, &gradients, walked, model->ctx->real_size);
    if (!image->copied) {
        image->bytes = model->adapter.p;
        return ESP_OK;
    }
    image->bytes = malloc(image->size + 1);
    if (!image->bytes) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a copy of the adapter (%zu bytes)", image->size);
    return espi_ctx_get(model->ctx, image->bytes, model->adapter.p, image->size);
}

esp_status espi_adapter_image_put(const espi_adapter_image *image) {
    return espi_ctx_put(image->model->ctx, image->model->adapter.p, image->bytes, image->size);
}

void espi_adapter_image_free(espi_adapter_image *image) {
    if (image->copied) free(image->bytes);
    *image = (espi_adapter_image){0};
}

void *espi_adapter_image_at(const espi_adapter_image *image, const void *parameter) {
    return image->bytes + ((const unsigned char *)parameter - (const unsigned char *)image->model->adapter.p);
}

float espi_adapter_image_get(const espi_adapter_image *image, const void *parameter, int64_t i) {
    return (float)espi_real_get(espi_adapter_image_at(image, parameter), i, image->model->ctx->real);
}
