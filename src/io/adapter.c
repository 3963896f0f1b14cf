/* Adapters as PEFT files: adapter_config.json and adapter_model.safetensors.
 *
 * Two forms of expert branches are read, told apart by their keys and never by a shape:
 *   2-D    one A [r,in] and B [out,r] per expert and projection; written too.  Our gate and up share one A, which is written twice.  A file
 *          whose gate and up have different A is held exactly with rank 2r: A = [A_gate; A_up], B = block-diagonal.
 *   fused  one pair for all experts: A [E*r,in], row e*r + k; B [out,E*r], column k*E + e (the expert FASTEST).  PEFT nests its wrappers:
 *          with both stacks trained experts.base_layer.lora_* is gate_up and experts.lora_* is down; with one, experts.lora_* is that one,
 *          and only target_parameters of the config says which. */
#include "core/status.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "kernels/plain.h"
#include "models/model.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WEIGHTS "adapter_model.safetensors"
#define CONFIG "adapter_config.json"
enum { NAME = 256, MAX_CONFIG = 1 << 20 };

/* ---- names ---- */

typedef enum projection { GATE, UP, DOWN } projection;

static void key_of(char key[NAME], const char *module, int64_t layer, int64_t expert, char matrix) {
    char name[NAME - 64];
    snprintf(name, sizeof name, module, (int)layer, (int)expert);
    snprintf(key, NAME, "base_model.model.%s.lora_%c.weight", name, matrix);
}

static const char *attention_module(const espi_family *f, int target) {
    const char *const modules[] = {f->q, f->k, f->v, f->o};
    return modules[target];
}

static const char *expert_module(const espi_family *f, projection p) {
    return p == GATE ? f->expert_gate : p == UP ? f->expert_up : f->expert_down;
}

/* ---- reading ---- */

enum { GATE_UP_STACK, DOWN_STACK, STACKS };

/* What adapter_config.json says. */
typedef struct stated {
    int64_t r;
    float alpha;
    bool rslora;
    bool fused[STACKS]; /* stacks that target_parameters names */
} stated;

static double scale_of(const stated *says) {
    return says->alpha / (says->rslora ? sqrt((double)says->r) : (double)says->r);
}

/* An open adapter.  `seen` marks the tensors that were asked for: what is left at the end is nobody's. */
typedef struct reader {
    espi_st_file *file;
    unsigned char *seen;
    const espi_config *config;
    const stated *says;
} reader;

static void fused_key(char key[NAME], const reader *r, int64_t layer, int target, char matrix) {
    char module[NAME - 64];
    const bool inner = target == ESPI_T_GATE_UP && r->says->fused[DOWN_STACK];
    snprintf(module, sizeof module, "%s%s", r->config->family->experts_module, inner ? ".base_layer" : "");
    key_of(key, module, layer, 0, matrix);
}

static esp_status reader_open(reader *r, const char *dir, const espi_config *config, const stated *says) {
    char path[ESPI_PATH_MAX];
    *r = (reader){.config = config, .says = says};
    ESPI_TRY(espi_path_join(path, dir, WEIGHTS));
    ESPI_TRY(espi_st_open(&r->file, path));
    r->seen = calloc(espi_st_count(r->file) + 1, 1);
    return r->seen ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its list of tensors", path);
}

static void reader_close(reader *r) {
    espi_st_close(r->file);
    free(r->seen);
}

static const espi_st_tensor *find(reader *r, const char *key) {
    const espi_st_tensor *t = espi_st_find(r->file, key);
    if (t) r->seen[t - espi_st_at(r->file, 0)] = 1;
    return t;
}

/* A tensor [rows,cols] as f32; free() *values. */
static esp_status read_matrix(float **values, reader *r, const char *key, int64_t rows, int64_t cols) {
    const espi_st_tensor *t = find(r, key);
    if (!t)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: got none, expected [%lld, %lld]", espi_st_path(r->file), key, (long long)rows,
                         (long long)cols);
    if (t->dtype != ESP_F32 && t->dtype != ESP_BF16 && t->dtype != ESP_F16)
        return ESPI_FAIL(ESP_ERR_DTYPE, "%s: tensor %s: got %s, expected F32, BF16 or F16", espi_st_path(r->file), key, t->dtype_name);
    ESPI_TRY(espi_st_expect(t, ESP_DTYPE_NONE, 2, (const int64_t[]){rows, cols}));
    const size_t n = (size_t)(rows * cols);
    void *raw = malloc((size_t)t->bytes + 1);
    *values = malloc((n + 1) * sizeof **values);
    esp_status status = raw && *values ? espi_st_read(t, raw, 0, (size_t)t->bytes)
                                       : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for tensor %s", espi_st_path(r->file), key);
    for (size_t i = 0; i < n && status == ESP_OK; i++) {
        (*values)[i] = espi_plain_value(raw, t->dtype, (int64_t)i);
        if (!isfinite((*values)[i]))
            status = ESPI_FAIL(ESP_ERR_NONFINITE, "%s: tensor %s, element %zu: got %g, expected a finite number", espi_st_path(r->file),
                               key, i, (double)(*values)[i]);
    }
    free(raw);
    if (status != ESP_OK) {
        free(*values);
        *values = NULL;
    }
    return status;
}

/* ---- what the folder states ---- */

/* Fields of adapter_config.json that change what the weights mean, in ways that this version does not have. */
static esp_status refuse_field(const json_t *root, const char *path, const char *key, const char *why) {
    const json_t *v = json_object_get(root, key);
    const bool empty = !v || json_is_null(v) || json_is_false(v) || (json_is_object(v) && json_object_size(v) == 0) ||
                       (json_is_array(v) && json_array_size(v) == 0) || (json_is_string(v) && strcmp(json_string_value(v), "none") == 0);
    if (empty) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: %s: got a value, expected none: %s", path, key, why);
}

static esp_status check_config(const json_t *root, const char *path) {
    const struct {
        const char *key, *why;
    } refused[] = {
        {"rank_pattern", "one rank holds for all targets in this version"},
        {"alpha_pattern", "one alpha holds for all targets in this version"},
        {"use_dora", "DoRA is not offered"},
        {"bias", "trained biases are not offered"},
        {"lora_bias", "biases of the branches are not offered"},
        {"modules_to_save", "fully trained modules are not offered"},
        {"fan_in_fan_out", "transposed weights are not offered"},
        {"layer_replication", "replicated layers are not offered"},
        {"trainable_token_indices", "trained embeddings are not offered"},
        {"use_qalora", "QA-LoRA is not offered"},
        {"use_bdlora", "block-diagonal LoRA is not offered"},
    };
    for (int i = 0; i < ESPI_COUNT(refused); i++) ESPI_TRY(refuse_field(root, path, refused[i].key, refused[i].why));
    const char *type = json_string_value(json_object_get(root, "peft_type"));
    if (type && strcmp(type, "LORA") != 0) return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: peft_type: got %s, expected LORA", path, type);
    return ESP_OK;
}

/* Of a module's name: "model.layers.%d.self_attn.q_proj" -> "q_proj". */
static const char *last_part(const char *module) {
    const char *dot = strrchr(module, '.');
    return dot ? dot + 1 : module;
}

static esp_status read_target_parameters(bool fused[STACKS], const json_t *root, const char *path, const espi_family *f) {
    const json_t *list = json_object_get(root, "target_parameters");
    if (!list || json_is_null(list)) return ESP_OK;
    if (!json_is_array(list)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: target_parameters: got no list, expected one", path);
    const char *const stacks[STACKS] = {last_part(f->fused_gate_up), last_part(f->fused_down)};
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        const char *last = last_part(name ? name : "(no string)");
        const bool gate_up = strcmp(last, stacks[GATE_UP_STACK]) == 0, down = strcmp(last, stacks[DOWN_STACK]) == 0;
        if (!gate_up && !down)
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: target_parameters: got %s, expected %s or %s of the experts", path,
                             name ? name : "(no string)", stacks[GATE_UP_STACK], stacks[DOWN_STACK]);
        fused[gate_up ? GATE_UP_STACK : DOWN_STACK] = true;
    }
    return ESP_OK;
}

static esp_status read_config(stated *says, const char *dir, const espi_family *family) {
    char path[ESPI_PATH_MAX], *text;
    size_t bytes;
    json_error_t error;
    *says = (stated){0};
    ESPI_TRY(espi_path_join(path, dir, CONFIG));
    ESPI_TRY(espi_file_read_all(&text, &bytes, path, MAX_CONFIG));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!root) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: line %d: %s", path, error.line, error.text);
    double a;
    esp_status status =
        json_is_object(root) ? check_config(root, path) : ESPI_FAIL(ESP_ERR_FORMAT, "%s: got no object, expected one", path);
    if (status == ESP_OK) status = espi_json_count(&says->r, root, path, "r", NULL, -1);
    if (status == ESP_OK) status = espi_json_real(&a, root, path, "lora_alpha", NULL, NAN);
    if (status == ESP_OK) status = espi_json_flag(&says->rslora, root, path, "use_rslora", false);
    if (status == ESP_OK) status = read_target_parameters(says->fused, root, path, family);
    json_decref(root);
    if (status != ESP_OK) return status;
    if (says->r < 1) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: r: got %lld, expected 1 or more", path, (long long)says->r);
    if (!(a > 0) || !isfinite(a)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: lora_alpha: got %g, expected a positive number", path, a);
    says->alpha = (float)a;
    return ESP_OK;
}

static bool has(reader *r, const char *module, int64_t layer, int64_t expert) {
    char key[NAME];
    key_of(key, module, layer, expert, 'A');
    return espi_st_find(r->file, key) != NULL;
}

static int64_t first_moe_layer(const espi_config *c) {
    for (int64_t l = 0; l < c->layers; l++)
        if (c->mlp_kind[l] == ESPI_MLP_MOE) return l;
    return -1;
}

/* Is the file's form of this stack the fused one?  Both at once mean that somebody mixed two adapters. */
static esp_status form_of(bool *fused, bool *present, reader *r, int target) {
    const espi_family *f = r->config->family;
    const int64_t l = first_moe_layer(r->config);
    *fused = *present = false;
    if (l < 0) return ESP_OK;
    char key[NAME];
    const bool *named = r->says->fused;
    fused_key(key, r, l, target, 'A');
    if (espi_st_find(r->file, key) && !named[GATE_UP_STACK] && !named[DOWN_STACK])
        return ESPI_FAIL(
            ESP_ERR_FORMAT,
            "%s: tensor %s: got a config without target_parameters, expected mlp.experts.%s or mlp.experts.%s there: this name "
            "alone does not say which stack it is",
            espi_st_path(r->file), key, last_part(f->fused_gate_up), last_part(f->fused_down));
    *fused = named[target == ESPI_T_DOWN ? DOWN_STACK : GATE_UP_STACK];
    const bool flat = target == ESPI_T_DOWN ? has(r, f->expert_down, l, 0) : has(r, f->expert_gate, l, 0) || has(r, f->expert_up, l, 0);
    if (*fused && flat)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got both %s and tensors per expert, expected one form", espi_st_path(r->file), key);
    *present = *fused || flat;
    return ESP_OK;
}

/* Do gate and up of any expert have different A? */
static esp_status separate_a(bool *separate, reader *r, int64_t rank) {
    const espi_config *c = r->config;
    *separate = false;
    for (int64_t l = 0; l < c->layers && !*separate; l++) {
        for (int64_t e = 0; c->mlp_kind[l] == ESPI_MLP_MOE && e < c->experts && !*separate; e++) {
            char key[2][NAME];
            float *a[2] = {NULL, NULL};
            for (int p = GATE; p <= UP; p++) key_of(key[p], expert_module(c->family, (projection)p), l, e, 'A');
            esp_status status = read_matrix(&a[GATE], r, key[GATE], rank, c->hidden);
            if (status == ESP_OK) status = read_matrix(&a[UP], r, key[UP], rank, c->hidden);
            if (status == ESP_OK) *separate = memcmp(a[GATE], a[UP], (size_t)(rank * c->hidden) * sizeof **a) != 0;
            free(a[GATE]);
            free(a[UP]);
            ESPI_TRY(status);
        }
    }
    return ESP_OK;
}

static esp_status spec_of(espi_lora_spec lora[ESPI_T_COUNT], reader *r) {
    const int64_t rank = r->says->r;
    const double scale = scale_of(r->says);
    const espi_family *f = r->config->family;
    for (int t = ESPI_T_Q; t <= ESPI_T_O; t++)
        lora[t] = (espi_lora_spec){.r = has(r, attention_module(f, t), 0, 0) ? rank : 0, .scale = scale};
    for (int t = ESPI_T_GATE_UP; t <= ESPI_T_DOWN; t++) {
        bool fused, present, separate = false;
        ESPI_TRY(form_of(&fused, &present, r, t));
        if (t == ESPI_T_GATE_UP && present && !fused) ESPI_TRY(separate_a(&separate, r, rank));
        lora[t] = (espi_lora_spec){.r = !present ? 0 : separate ? 2 * rank : rank, .scale = scale};
    }
    return ESP_OK;
}

esp_status espi_adapter_read_spec(espi_lora_spec lora[ESPI_T_COUNT], float *alpha, bool *rslora, const char *dir,
                                  const espi_config *config) {
    stated says;
    reader r;
    ESPI_TRY(read_config(&says, dir, config->family));
    *alpha = says.alpha;
    *rslora = says.rslora;
    esp_status status = reader_open(&r, dir, config, &says);
    if (status == ESP_OK) status = spec_of(lora, &r);
    reader_close(&r);
    return status;
}

/* ---- loading ---- */

static void put(const esp_model *m, const void *tensor, int64_t i, float value) {
    if (m->ctx->real == ESP_F64)
        ((double *)tensor)[i] = value;
    else
        ((float *)tensor)[i] = value;
}

static esp_status load_attention(esp_model *m, reader *r, int64_t l, int target, const espi_linear *w) {
    const struct {
        char matrix;
        const void *to;
        int64_t rows, cols;
    } both[] = {{'A', w->lora.a, w->lora.r, w->w.cols}, {'B', w->lora.b, w->w.rows, w->lora.r}};
    for (int i = 0; i < 2 && w->lora.r; i++) {
        char key[NAME];
        float *x;
        key_of(key, attention_module(m->config.family, target), l, 0, both[i].matrix);
        ESPI_TRY(read_matrix(&x, r, key, both[i].rows, both[i].cols));
        for (int64_t j = 0; j < both[i].rows * both[i].cols; j++) put(m, both[i].to, j, x[j]);
        free(x);
    }
    return ESP_OK;
}

/* PEFT 0.17 and 0.18 took the two widths of such a stack for one another. */
static esp_status refuse_swapped(const reader *r, const char *key, int64_t rows, const espi_stack *w) {
    const espi_st_tensor *t = espi_st_find(r->file, key);
    if (!t || w->rows == w->cols || t->rank != 2 || t->dims[0] != rows || t->dims[1] != w->rows) return ESP_OK;
    return ESPI_FAIL(
        ESP_ERR_UNSUPPORTED,
        "%s: tensor %s: got width %lld, the stack's output, expected its input %lld: the file has A and B swapped, as PEFT 0.17 "
        "and 0.18 write them; save it again with a later version",
        espi_st_path(r->file), key, (long long)w->rows, (long long)w->cols);
}

static esp_status load_fused(esp_model *m, reader *r, int64_t l, int target, const espi_stack *w, const espi_lora *lora) {
    const int64_t experts = w->experts, rank = lora->r;
    char key[NAME];
    float *x;
    fused_key(key, r, l, target, 'A');
    ESPI_TRY(refuse_swapped(r, key, experts * rank, w));
    ESPI_TRY(read_matrix(&x, r, key, experts * rank, w->cols)); /* row e*r + k: our order */
    for (int64_t i = 0; i < experts * rank * w->cols; i++) put(m, lora->a, i, x[i]);
    free(x);
    fused_key(key, r, l, target, 'B');
    ESPI_TRY(read_matrix(&x, r, key, w->rows, experts * rank));
    for (int64_t e = 0; e < experts; e++)
        for (int64_t o = 0; o < w->rows; o++)
            for (int64_t k = 0; k < rank; k++) put(m, lora->b, (e * w->rows + o) * rank + k, x[o * experts * rank + k * experts + e]);
    free(x);
    return ESP_OK;
}

/* One projection of one expert into rows first_out.. of B and rows first_rank.. of A, both of a branch of rank lora->r. */
static esp_status load_projection(esp_model *m, reader *r, int64_t l, int64_t e, projection p, const espi_stack *w, const espi_lora *lora,
                                  int64_t rank, int64_t first_rank, int64_t first_out, int64_t out) {
    char key[NAME];
    float *a = NULL, *b = NULL;
    key_of(key, expert_module(m->config.family, p), l, e, 'A');
    esp_status status = read_matrix(&a, r, key, rank, w->cols);
    key_of(key, expert_module(m->config.family, p), l, e, 'B');
    if (status == ESP_OK) status = read_matrix(&b, r, key, out, rank);
    for (int64_t i = 0; i < rank * w->cols && status == ESP_OK; i++) {
        const int64_t at = (e * lora->r + first_rank) * w->cols + i;
        /* up's A goes where gate's went when they share it: it must be the same */
        if (p == UP && first_rank == 0) {
            const float before = m->ctx->real == ESP_F64 ? (float)((const double *)lora->a)[at] : ((const float *)lora->a)[at];
            if (before != a[i])
                status = ESPI_FAIL(
                    ESP_ERR_MISMATCH,
                    "%s: %s differs from gate's A, expected the same: load the model with adapter_dir, which holds both (rank %lld)",
                    espi_st_path(r->file), key, (long long)(2 * rank));
        } else {
            put(m, lora->a, at, a[i]);
        }
    }
    for (int64_t o = 0; o < out && status == ESP_OK; o++)
        for (int64_t k = 0; k < rank; k++) put(m, lora->b, (e * w->rows + first_out + o) * lora->r + first_rank + k, b[o * rank + k]);
    free(a);
    free(b);
    return status;
}

static esp_status load_per_expert(esp_model *m, reader *r, int64_t l, int target, const espi_stack *w, const espi_lora *lora,
                                  int64_t rank) {
    const int64_t half = w->rows / 2;
    for (int64_t e = 0; e < w->experts; e++) {
        if (target == ESPI_T_DOWN) {
            ESPI_TRY(load_projection(m, r, l, e, DOWN, w, lora, rank, 0, 0, w->rows));
            continue;
        }
        const bool separate = lora->r == 2 * rank;
        for (int64_t i = 0; separate && i < w->rows * lora->r; i++) put(m, lora->b, e * w->rows * lora->r + i, 0.0f);
        ESPI_TRY(load_projection(m, r, l, e, GATE, w, lora, rank, 0, 0, half));
        ESPI_TRY(load_projection(m, r, l, e, UP, w, lora, rank, separate ? rank : 0, half, half));
    }
    return ESP_OK;
}

static esp_status load_tensors(esp_model *m, reader *r) {
    bool fused[2], present[2];
    for (int i = 0; i < 2; i++) ESPI_TRY(form_of(&fused[i], &present[i], r, ESPI_T_GATE_UP + i));
    for (int64_t l = 0; l < m->config.layers; l++) {
        const espi_layer *w = &m->layers[l];
        const espi_linear *attention[] = {&w->q, &w->k, &w->v, &w->o};
        for (int t = ESPI_T_Q; t <= ESPI_T_O; t++) ESPI_TRY(load_attention(m, r, l, t, attention[t]));
        if (w->mlp != ESPI_MLP_MOE) continue;
        const espi_stack *stacks[] = {&w->gate_up, &w->down};
        const espi_lora *loras[] = {&w->lora_gate_up, &w->lora_down};
        for (int i = 0; i < 2; i++) {
            if (loras[i]->r == 0) continue;
            if (fused[i])
                ESPI_TRY(load_fused(m, r, l, ESPI_T_GATE_UP + i, stacks[i], loras[i]));
            else
                ESPI_TRY(load_per_expert(m, r, l, ESPI_T_GATE_UP + i, stacks[i], loras[i], r->says->r));
        }
    }
    for (size_t i = 0; i < espi_st_count(r->file); i++)
        if (!r->seen[i])
            return ESPI_FAIL(ESP_ERR_MISMATCH,
                             "%s: tensor %s: got a target that the model does not train, expected none: change lora_targets",
                             espi_st_path(r->file), espi_st_at(r->file, i)->name);
    return ESP_OK;
}

/* The model's ranks and scales must be the file's. */
static esp_status check_spec(const esp_model *m, reader *r, const char *dir) {
    espi_lora_spec lora[ESPI_T_COUNT];
    ESPI_TRY(spec_of(lora, r));
    static const char *const names[ESPI_T_COUNT] = {"q", "k", "v", "o", "gate_up", "down"};
    for (int t = 0; t < ESPI_T_COUNT; t++) {
        if (lora[t].r != m->lora[t].r)
            return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: rank of %s: got %lld, expected the model's %lld (0 = not trained)", dir, names[t],
                             (long long)lora[t].r, (long long)m->lora[t].r);
        if (lora[t].r && fabs(lora[t].scale - m->lora[t].scale) > 1e-7 * fabs(m->lora[t].scale))
            return ESPI_FAIL(ESP_ERR_MISMATCH,
                             "%s: scale of %s (alpha / r, or alpha / sqrt(r) with rsLoRA): got %g, expected the model's %g", dir, names[t],
                             lora[t].scale, m->lora[t].scale);
    }
    memset(r->seen, 0, espi_st_count(r->file));
    return ESP_OK;
}

esp_status esp_model_load_adapter(esp_model *model, const char *dir) {
    if (!model || !dir) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_load_adapter: model or dir is NULL");
    stated says;
    ESPI_TRY(read_config(&says, dir, model->config.family));
    /* A file that fails half-way must leave the old values: keep them until all is read. */
    size_t parameters, gradients;
    espi_adapter_bytes(&parameters, &gradients, model, model->ctx->real_size);
    void *before = malloc(parameters + 1);
    if (!before) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory to keep the present adapter while loading", dir);
    if (parameters) memcpy(before, model->adapter.p, parameters);
    reader r;
    esp_status status = reader_open(&r, dir, &model->config, &says);
    if (status == ESP_OK) status = check_spec(model, &r, dir);
    if (status == ESP_OK) status = load_tensors(model, &r);
    if (status != ESP_OK && parameters) memcpy(model->adapter.p, before, parameters);
    reader_close(&r);
    free(before);
    return status;
}

/* ---- saving ---- */

/* One tensor to write: `rows` rows of `cols` values that lie one after the other in a parameter. */
typedef struct piece {
    char key[NAME];
    const esp_model *model;
    const void *from;
    int64_t first, count;
} piece;

static esp_status fill_piece(void *user, void *buffer, size_t bytes) {
    const piece *p = user;
    float *out = buffer;
    if (bytes != (size_t)p->count * sizeof *out) return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: %zu bytes asked", p->key, bytes);
    for (int64_t i = 0; i < p->count; i++)
        out[i] = p->model->ctx->real == ESP_F64 ? (float)((const double *)p->from)[p->first + i] : ((const float *)p->from)[p->first + i];
    return ESP_OK;
}

typedef struct writer {
    const esp_model *model;
    espi_st_item *items;
    piece *pieces;
    size_t n;
} writer;

static void add(writer *w, const char *module, int64_t layer, int64_t expert, char matrix, const void *from, int64_t first, int64_t rows,
                int64_t cols) {
    piece *p = &w->pieces[w->n];
    *p = (piece){.model = w->model, .from = from, .first = first, .count = rows * cols};
    key_of(p->key, module, layer, expert, matrix);
    w->items[w->n++] = (espi_st_item){.name = p->key, .dtype = ESP_F32, .rank = 2, .dims = {rows, cols}, .fill = fill_piece, .user = p};
}

static void add_layer(writer *w, int64_t l) {
    const espi_layer *layer = &w->model->layers[l];
    const espi_family *f = w->model->config.family;
    const espi_linear *attention[] = {&layer->q, &layer->k, &layer->v, &layer->o};
    for (int t = ESPI_T_Q; t <= ESPI_T_O; t++) {
        const espi_lora *lora = &attention[t]->lora;
        if (lora->r == 0) continue;
        add(w, attention_module(f, t), l, 0, 'A', lora->a, 0, lora->r, attention[t]->w.cols);
        add(w, attention_module(f, t), l, 0, 'B', lora->b, 0, attention[t]->w.rows, lora->r);
    }
    if (layer->mlp != ESPI_MLP_MOE) return;
    const espi_lora *gu = &layer->lora_gate_up, *dn = &layer->lora_down;
    const int64_t rows = layer->gate_up.rows, cols = layer->gate_up.cols, half = rows / 2;
    for (int64_t e = 0; e < layer->gate_up.experts; e++) {
        for (int p = GATE; p <= UP && gu->r; p++) {
            add(w, expert_module(f, (projection)p), l, e, 'A', gu->a, e * gu->r * cols, gu->r, cols);
            add(w, expert_module(f, (projection)p), l, e, 'B', gu->b, (e * rows + p * half) * gu->r, half, gu->r);
        }
        if (dn->r == 0) continue;
        add(w, f->expert_down, l, e, 'A', dn->a, e * dn->r * layer->down.cols, dn->r, layer->down.cols);
        add(w, f->expert_down, l, e, 'B', dn->b, e * layer->down.rows * dn->r, layer->down.rows, dn->r);
    }
}

static esp_status write_weights(const esp_model *model, const char *dir) {
    char path[ESPI_PATH_MAX];
    ESPI_TRY(espi_path_join(path, dir, WEIGHTS));
    const size_t most = (size_t)model->config.layers * (8 + 6 * (size_t)model->config.experts);
    writer w = {.model = model, .items = calloc(most, sizeof *w.items), .pieces = calloc(most, sizeof *w.pieces)};
    esp_status status = w.items && w.pieces ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its list of tensors", path);
    for (int64_t l = 0; l < model->config.layers && status == ESP_OK; l++) add_layer(&w, l);
    if (status == ESP_OK) status = espi_st_write(path, w.items, w.n);
    free(w.items);
    free(w.pieces);
    return status;
}

static json_t *target_modules(const esp_model *model) {
    const espi_family *f = model->config.family;
    json_t *list = json_array();
    for (int t = ESPI_T_Q; t <= ESPI_T_O; t++)
        if (model->lora[t].r) json_array_append_new(list, json_string(last_part(attention_module(f, t))));
    for (int p = GATE; p <= DOWN; p++)
        if (model->lora[p == DOWN ? ESPI_T_DOWN : ESPI_T_GATE_UP].r)
            json_array_append_new(list, json_string(last_part(expert_module(f, (projection)p))));
    return list;
}

/* Every trained target must state one rank: PEFT's config has room for no other in this form. */
static esp_status common_rank(int64_t *r, const esp_model *model) {
    *r = 0;
    for (int t = 0; t < ESPI_T_COUNT; t++) {
        if (model->lora[t].r == 0) continue;
        if (*r && model->lora[t].r != *r)
            return ESPI_FAIL(
                ESP_ERR_UNSUPPORTED,
                "adapter: got ranks %lld and %lld, expected one: an adapter with separate A of gate and up is held at twice the "
                "rank and cannot be saved in this form",
                (long long)*r, (long long)model->lora[t].r);
        *r = model->lora[t].r;
    }
    return *r ? ESP_OK : ESPI_FAIL(ESP_ERR_STATE, "adapter: the model trains nothing, expected at least one LoRA target");
}

static esp_status write_config(const esp_model *model, const char *dir, int64_t r) {
    char path[ESPI_PATH_MAX];
    ESPI_TRY(espi_path_join(path, dir, CONFIG));
    json_t *root =
        json_pack("{s:s, s:s, s:s, s:i, s:f, s:b, s:o, s:n, s:f, s:s, s:b, s:b, s:b, s:b, s:n, s:{}, s:{}}", "peft_type", "LORA",
                  "task_type", "CAUSAL_LM", "base_model_name_or_path", "", "r", (int)r, "lora_alpha", (double)model->options.lora_alpha,
                  "use_rslora", (int)model->options.rslora, "target_modules", target_modules(model), "target_parameters", "lora_dropout",
                  0.0, "bias", "none", "use_dora", 0, "fan_in_fan_out", 0, "init_lora_weights", 1, "inference_mode", 1, "modules_to_save",
                  "rank_pattern", "alpha_pattern");
    char *text = root ? json_dumps(root, JSON_INDENT(2)) : NULL;
    const esp_status status = text ? espi_file_write_atomic(path, text, strlen(text)) : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory", path);
    free(text);
    json_decref(root);
    return status;
}

esp_status esp_model_save_adapter(esp_model *model, const char *dir) {
    if (!model || !dir) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_save_adapter: model or dir is NULL");
    int64_t r;
    ESPI_TRY(common_rank(&r, model));
    ESPI_TRY(espi_dir_make(dir));
    ESPI_TRY(write_weights(model, dir));
    return write_config(model, dir, r);
}
