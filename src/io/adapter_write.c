/* Adapters as PEFT files: written whole under temporary names, then renamed. */
#include "core/log.h"
#include "core/status.h"
#include "io/adapter.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "kernels/plain.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* ---- which form ---- */

/* Is B of every expert block-diagonal, gate's rows over the first half of the ranks and up's over the second?  All zero does not count. */
static bool is_separate(const espi_adapter_image *image) {
    const esp_model *m = image->model;
    const int64_t r = m->lora[ESPI_T_GATE_UP].r;
    const bool interleaved = m->config.glu.interleaved;
    bool any = false;
    if (r % 2) return false;
    for (int64_t l = 0; l < m->config.layers; l++) {
        const espi_layer *w = &m->layers[l];
        if (w->mlp != ESPI_MLP_MOE) continue;
        for (int64_t o = 0; o < w->gate_up.experts * w->gate_up.rows; o++) {
            const int64_t row = o % w->gate_up.rows;
            const bool up = interleaved ? row % 2 : row >= w->gate_up.rows / 2;
            for (int64_t k = 0; k < r; k++) {
                if (espi_adapter_image_get(image, w->lora_gate_up.b, o * r + k) == 0) continue;
                if (up != (k >= r / 2)) return false;
                any = true;
            }
        }
    }
    return any;
}

static esp_status choose_layout(espi_adapter_layout *layout, const espi_adapter_image *image, const esp_adapter_config *config) {
    const esp_model *m = image->model;
    const espi_family *f = m->config.family;
    if ((unsigned)config->form > ESP_ADAPTER_3D || (unsigned)config->columns > ESP_ADAPTER_EXPERT_SLOWEST)
        return ESPI_FAIL(ESP_ERR_ARG, "form, columns: got %d, %d, expected values of esp_adapter_form and esp_adapter_columns",
                         (int)config->form, (int)config->columns);
    if (config->widths == ESP_ADAPTER_WIDTHS_SWAPPED)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "widths: got swapped, expected true: that form is read only, nothing needs it any more");
    const bool fused = config->form == ESP_ADAPTER_3D || (config->form == ESP_ADAPTER_FORM_DEFAULT && f->fused_experts);
    const bool experts = m->lora[ESPI_T_GATE_UP].r || m->lora[ESPI_T_DOWN].r;
    if (!fused && experts && f->fused_experts)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "form: got 2-D, expected 3-D: %s has no module per expert that an adapter could name",
                         f->name);
    if (!fused && config->columns == ESP_ADAPTER_EXPERT_SLOWEST)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "columns: got expert-slowest with the 2-D form, expected the 3-D form, which has such columns");
    *layout = (espi_adapter_layout){.slowest = config->columns == ESP_ADAPTER_EXPERT_SLOWEST};
    layout->fused[ESPI_STACK_GATE_UP] = fused && m->lora[ESPI_T_GATE_UP].r;
    layout->fused[ESPI_STACK_DOWN] = fused && m->lora[ESPI_T_DOWN].r;
    layout->separate = !fused && m->lora[ESPI_T_GATE_UP].r && is_separate(image);
    return ESP_OK;
}

/* ---- tensors ---- */

typedef struct piece {
    const espi_adapter_image *image;
    const espi_adapter_entry *entry;
    esp_dtype dtype;
} piece;

static esp_status fill_piece(void *user, void *buffer, size_t bytes) {
    const piece *p = user;
    const espi_adapter_entry *e = p->entry;
    if (bytes != (size_t)(e->rows.n * e->cols.n) * esp_dtype_size(p->dtype))
        return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: %zu bytes asked", e->key, bytes);
    for (int64_t i = 0; i < e->rows.n; i++) {
        for (int64_t j = 0; j < e->cols.n; j++) {
            const int64_t at = espi_adapter_at(e, i, j);
            espi_plain_store(buffer, p->dtype, i * e->cols.n + j, espi_adapter_image_get(p->image, e->parameter, at));
        }
    }
    return ESP_OK;
}

static esp_status write_weights(const espi_adapter_image *image, const char *dir, const espi_adapter_layout *layout, esp_dtype dtype) {
    char path[ESPI_PATH_MAX];
    espi_adapter_entry *entries;
    size_t n;
    ESPI_TRY(espi_path_join(path, dir, ESPI_ADAPTER_WEIGHTS));
    ESPI_TRY(espi_adapter_list(&entries, &n, image->model, layout));
    espi_st_item *items = calloc(n + 1, sizeof *items);
    piece *pieces = calloc(n + 1, sizeof *pieces);
    esp_status status = items && pieces ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its list of tensors", path);
    for (size_t i = 0; i < n && status == ESP_OK; i++) {
        pieces[i] = (piece){.image = image, .entry = &entries[i], .dtype = dtype};
        items[i] = (espi_st_item){.name = entries[i].key,
                                  .dtype = dtype,
                                  .rank = 2,
                                  .dims = {entries[i].rows.n, entries[i].cols.n},
                                  .fill = fill_piece,
                                  .user = &pieces[i]};
    }
    if (status == ESP_OK) status = espi_st_write(path, items, n);
    free(items);
    free(pieces);
    free(entries);
    return status;
}

/* ---- config ---- */

/* A module as the config names it, with what it states. */
typedef struct target {
    const char *name;
    int64_t r;
    double alpha;
    bool fused;
} target;

/* s = alpha / r or alpha / sqrt(r): the alpha that a file would have said, which is a float more often than s is. */
static double alpha_of(const espi_lora_spec *spec, int64_t r, bool rslora) {
    const double divisor = rslora ? sqrt((double)r) : (double)r, exact = spec->scale * divisor, nearest = (float)exact;
    return nearest / divisor == spec->scale ? nearest : exact;
}

/* PEFT makes one fused branch of twice the rank and alpha of gate and up per expert.  Under rsLoRA that is sqrt(2) times the scale, so in
 * this form the scale is stated the plain way, alpha / r, which everybody reads alike. */
static bool says_rslora(const esp_model *m, const espi_adapter_layout *layout) {
    return m->options.rslora && (layout->fused[ESPI_STACK_GATE_UP] || m->lora[ESPI_T_GATE_UP].r == 0);
}

static int targets_of(target out[8], const esp_model *m, const espi_adapter_layout *layout) {
    const espi_family *f = m->config.family;
    int n = 0;
    for (int t = 0; t < ESPI_T_COUNT; t++) {
        if (m->lora[t].r == 0) continue;
        const bool fused = t >= ESPI_T_GATE_UP && layout->fused[t - ESPI_T_GATE_UP];
        const int64_t r = t == ESPI_T_GATE_UP && layout->separate ? m->lora[t].r / 2 : m->lora[t].r;
        target one = {.r = r, .alpha = alpha_of(&m->lora[t], r, says_rslora(m, layout)), .fused = fused};
        if (t <= ESPI_T_O)
            one.name = espi_adapter_last_part(espi_adapter_attention(f, t));
        else if (fused)
            one.name = t == ESPI_T_DOWN ? ESPI_ADAPTER_DOWN : ESPI_ADAPTER_GATE_UP;
        else
            one.name = espi_adapter_last_part(t == ESPI_T_DOWN ? f->expert_down : f->expert_gate);
        out[n++] = one;
        if (t != ESPI_T_GATE_UP || fused) continue;
        one.name = espi_adapter_last_part(f->expert_up);
        out[n++] = one;
    }
    return n;
}

/* 8, not 8.0: some readers want a whole number. */
static json_t *number(double x) {
    return x == floor(x) && fabs(x) < 1e15 ? json_integer((json_int_t)x) : json_real(x);
}

/* "model.layers.%d.mlp.experts" and "down_proj" -> "mlp.experts.down_proj" */
static json_t *parameter_name(const espi_family *f, const char *last) {
    static const char layer[] = "%d.";
    const char *module = strstr(f->experts_module, layer);
    return json_sprintf("%s.%s", module ? module + sizeof layer - 1 : f->experts_module, last);
}

static json_t *config_json(const esp_model *model, const espi_adapter_layout *layout, const target *targets, int n) {
    json_t *modules = json_array(), *parameters = json_array(), *ranks = json_object(), *alphas = json_object();
    for (int i = 0; i < n; i++) {
        const target *t = &targets[i];
        if (t->fused)
            json_array_append_new(parameters, parameter_name(model->config.family, t->name));
        else
            json_array_append_new(modules, json_string(t->name));
        if (t->r != targets[0].r) json_object_set_new(ranks, t->name, json_integer((json_int_t)t->r));
        if (t->alpha != targets[0].alpha) json_object_set_new(alphas, t->name, number(t->alpha));
    }
    if (json_array_size(parameters) == 0) {
        json_decref(parameters);
        parameters = json_null();
    }
    json_t *root =
        json_pack("{s:s, s:s, s:s, s:I, s:o, s:b, s:o, s:o, s:f, s:s, s:b, s:b, s:b, s:b, s:n, s:o, s:o}", "peft_type", "LORA", "task_type",
                  "CAUSAL_LM", "base_model_name_or_path", "", "r", (json_int_t)targets[0].r, "lora_alpha", number(targets[0].alpha),
                  "use_rslora", (int)says_rslora(model, layout), "target_modules", modules, "target_parameters", parameters, "lora_dropout",
                  0.0, "bias", "none", "use_dora", 0, "fan_in_fan_out", 0, "init_lora_weights", 1, "inference_mode", 1, "modules_to_save",
                  "rank_pattern", ranks, "alpha_pattern", alphas);
    if (root && layout->slowest) json_object_set_new(root, "lora_B_layout", json_string("grouped_by_expert"));
    return root;
}

static esp_status write_config(const esp_model *model, const char *dir, const espi_adapter_layout *layout) {
    char path[ESPI_PATH_MAX];
    target targets[8];
    const int n = targets_of(targets, model, layout);
    for (int i = 1; i < n; i++)
        if (fabs(targets[i].alpha / (double)targets[i].r - targets[0].alpha / (double)targets[0].r) > 1e-12 && !says_rslora(model, layout))
            espi_log(model->ctx, ESP_LOG_WARN, "%s: %s and %s have different scales: vLLM, which ignores alpha_pattern, takes one for both",
                     dir, targets[0].name, targets[i].name);
    ESPI_TRY(espi_path_join(path, dir, ESPI_ADAPTER_CONFIG));
    json_t *root = config_json(model, layout, targets, n);
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    const esp_status status = text ? espi_file_write_atomic(path, text, strlen(text)) : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory", path);
    free(text);
    json_decref(root);
    return status;
}

esp_status espi_adapter_write(esp_model *model, const char *dir, const esp_adapter_config *config, esp_dtype dtype) {
    esp_adapter_config asked;
    espi_adapter_layout layout;
    ESPI_TRY(espi_struct_read(&asked, sizeof asked, config, "esp_adapter_config"));
    bool trained = false;
    for (int t = 0; t < ESPI_T_COUNT; t++) trained |= model->lora[t].r > 0;
    if (!trained) return ESPI_FAIL(ESP_ERR_STATE, "adapter: the model trains nothing, expected at least one LoRA target");
    espi_adapter_image image;
    esp_status status = espi_adapter_image_take(&image, model, false);
    if (status == ESP_OK) status = choose_layout(&layout, &image, &asked);
    if (status == ESP_OK) status = espi_dir_make(dir);
    if (status == ESP_OK) status = write_weights(&image, dir, &layout, dtype);
    espi_adapter_image_free(&image);
    return status == ESP_OK ? write_config(model, dir, &layout) : status;
}

esp_status esp_model_save_adapter_as(esp_model *model, const char *dir, const esp_adapter_config *config) {
    if (!model || !dir) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_save_adapter: model or dir is NULL");
    return espi_adapter_write(model, dir, config, ESP_F32);
}

esp_status esp_model_save_adapter(esp_model *model, const char *dir) {
    return esp_model_save_adapter_as(model, dir, NULL);
}
