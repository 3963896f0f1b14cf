/* Adapters from PEFT files: what adapter_config.json and the keys say, then the values.
 *
 * Which form the expert branches have is told by their keys.  Where one name serves two things (one fused stack alone), target_parameters
 * says which; where two things share a name (PEFT nests its wrappers in either order, and old versions took the two widths for one
 * another), the shapes decide if only one reading fits them: with both stacks in the file that is always so, as [2I,H] and [H,I] have no
 * common pair of widths.  What then is still open is refused. */
#include "io/adapter.h"
#include "core/status.h"
#include "io/file.h"
#include "io/safetensors.h"
#include "kernels/plain.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CONFIG = 1 << 20 };

/* What adapter_config.json says. */
typedef struct stated {
    char path[ESPI_PATH_MAX];
    int64_t r;
    double alpha;
    bool rslora;
    espi_patterns *ranks, *alphas;
    bool named[ESPI_STACKS]; /* by target_parameters */
    bool slowest;            /* by lora_B_layout */
    int version[2];          /* of PEFT; -1: not said */
} stated;

/* An open adapter.  `seen` marks the tensors that were asked for: what is left at the end is nobody's. */
typedef struct reader {
    espi_st_file *file;
    unsigned char *seen;
    const espi_config *config;
    stated says;
    esp_adapter_config asked; /* for what the folder does not say */
} reader;

static const espi_st_tensor *find(reader *r, const char *key) {
    const espi_st_tensor *t = espi_st_find(r->file, key);
    if (t) r->seen[t - espi_st_at(r->file, 0)] = 1;
    return t;
}

/* A tensor of plain values [rows,cols], which must be there. */
static esp_status need(const espi_st_tensor **tensor, reader *r, const char *key, int64_t rows, int64_t cols) {
    const espi_st_tensor *t = *tensor = find(r, key);
    if (!t)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: got none, expected [%lld, %lld]", espi_st_path(r->file), key, (long long)rows,
                         (long long)cols);
    if (t->dtype != ESP_F32 && t->dtype != ESP_BF16 && t->dtype != ESP_F16)
        return ESPI_FAIL(ESP_ERR_DTYPE, "%s: tensor %s: got %s, expected F32, BF16 or F16", espi_st_path(r->file), key, t->dtype_name);
    return espi_st_expect(t, ESP_DTYPE_NONE, 2, (const int64_t[]){rows, cols});
}

/* Its elements first .. first+n-1 as f32; free() *values. */
static esp_status read_values(float **values, const espi_st_tensor *t, int64_t first, int64_t n) {
    const char *path = espi_st_path(t->file);
    const size_t size = esp_dtype_size(t->dtype), bytes = (size_t)n * size;
    void *raw = malloc(bytes + 1);
    *values = calloc((size_t)n + 1, sizeof **values);
    esp_status status = raw && *values ? espi_st_read(t, raw, (uint64_t)first * size, bytes)
                                       : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for tensor %s", path, t->name);
    for (int64_t i = 0; i < n && status == ESP_OK; i++) {
        (*values)[i] = espi_plain_value(raw, t->dtype, i);
        if (!isfinite((*values)[i]))
            status = ESPI_FAIL(ESP_ERR_NONFINITE, "%s: tensor %s, element %lld: got %g, expected a finite number", path, t->name,
                               (long long)(first + i), (double)(*values)[i]);
    }
    free(raw);
    if (status != ESP_OK) {
        free(*values);
        *values = NULL;
    }
    return status;
}

/* All of it. */
static esp_status read_matrix(float **values, reader *r, const char *key, int64_t rows, int64_t cols) {
    const espi_st_tensor *t;
    *values = NULL;
    ESPI_TRY(need(&t, r, key, rows, cols));
    return read_values(values, t, 0, rows * cols);
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
        {"use_dora", "DoRA is not offered"},
        {"bias", "trained biases are not offered"},
        {"lora_bias", "biases of the branches are not offered"},
        {"modules_to_save", "fully trained modules are not offered"},
        {"fan_in_fan_out", "transposed weights are not offered"},
        {"layer_replication", "replicated layers are not offered"},
        {"trainable_token_indices", "trained embeddings are not offered"},
        {"use_qalora", "QA-LoRA is not offered"},
        {"use_bdlora", "block-diagonal LoRA is not offered"},
        {"alora_invocation_tokens", "activated LoRA is not offered"},
    };
    for (int i = 0; i < ESPI_COUNT(refused); i++) ESPI_TRY(refuse_field(root, path, refused[i].key, refused[i].why));
    /* These start from another base than the checkpoint's: their A and B over it are another model. */
    static const char *const other_base[] = {"pissa", "olora", "corda", "loftq"};
    const char *init = json_string_value(json_object_get(root, "init_lora_weights"));
    for (int i = 0; init && i < ESPI_COUNT(other_base); i++)
        if (strncmp(init, other_base[i], strlen(other_base[i])) == 0)
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                             "%s: init_lora_weights: got %s, expected true, false or gaussian: that form changes the base weights", path,
                             init);
    const char *type = json_string_value(json_object_get(root, "peft_type"));
    if (type && strcmp(type, "LORA") != 0) return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: peft_type: got %s, expected LORA", path, type);
    return ESP_OK;
}

static esp_status read_target_parameters(bool named[ESPI_STACKS], const json_t *root, const char *path) {
    const json_t *list = json_object_get(root, "target_parameters");
    if (!list || json_is_null(list)) return ESP_OK;
    if (!json_is_array(list)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: target_parameters: got no list, expected one", path);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        const char *last = espi_adapter_last_part(name ? name : "(no string)");
        const bool gate_up = strcmp(last, ESPI_ADAPTER_GATE_UP) == 0, down = strcmp(last, ESPI_ADAPTER_DOWN) == 0;
        if (!gate_up && !down)
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                             "%s: target_parameters: got %s, expected " ESPI_ADAPTER_GATE_UP " or " ESPI_ADAPTER_DOWN " of the experts",
                             path, name ? name : "(no string)");
        named[gate_up ? ESPI_STACK_GATE_UP : ESPI_STACK_DOWN] = true;
    }
    return ESP_OK;
}

static esp_status read_columns(bool *slowest, const json_t *root, const char *path) {
    const json_t *v = json_object_get(root, "lora_B_layout");
    *slowest = false;
    if (!v || json_is_null(v)) return ESP_OK;
    const char *name = json_string_value(v);
    *slowest = name && strcmp(name, "grouped_by_expert") == 0;
    if (*slowest || (name && strcmp(name, "rank_major") == 0)) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: lora_B_layout: got %s, expected rank_major or grouped_by_expert", path,
                     name ? name : "no string");
}

static void read_version(int version[2], const json_t *root) {
    const char *text = json_string_value(json_object_get(root, "peft_version"));
    if (!text || sscanf(text, "%d.%d", &version[0], &version[1]) != 2) version[0] = version[1] = -1;
}

static esp_status read_fields(stated *says, const json_t *root) {
    const char *path = says->path;
    if (!json_is_object(root)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got no object, expected one", path);
    ESPI_TRY(check_config(root, path));
    ESPI_TRY(espi_json_count(&says->r, root, path, "r", NULL, -1));
    ESPI_TRY(espi_json_real(&says->alpha, root, path, "lora_alpha", NULL, NAN));
    ESPI_TRY(espi_json_flag(&says->rslora, root, path, "use_rslora", false));
    ESPI_TRY(espi_patterns_read(&says->ranks, root, path, "rank_pattern"));
    ESPI_TRY(espi_patterns_read(&says->alphas, root, path, "alpha_pattern"));
    ESPI_TRY(read_target_parameters(says->named, root, path));
    ESPI_TRY(read_columns(&says->slowest, root, path));
    read_version(says->version, root);
    if (says->r < 1) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: r: got %lld, expected 1 or more", path, (long long)says->r);
    if (!(says->alpha > 0) || !isfinite(says->alpha))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: lora_alpha: got %g, expected a positive number", path, says->alpha);
    return ESP_OK;
}

static esp_status read_config(stated *says, const char *dir) {
    char *text;
    size_t bytes;
    json_error_t error;
    ESPI_TRY(espi_path_join(says->path, dir, ESPI_ADAPTER_CONFIG));
    ESPI_TRY(espi_file_read_all(&text, &bytes, says->path, MAX_CONFIG));
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    free(text);
    if (!root) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: line %d: %s", says->path, error.line, error.text);
    const esp_status status = read_fields(says, root);
    json_decref(root);
    return status;
}

/* ---- the folder as a whole ---- */

static void reader_close(reader *r) {
    espi_st_close(r->file);
    espi_patterns_free(r->says.ranks);
    espi_patterns_free(r->says.alphas);
    free(r->seen);
}

static esp_status open_parts(reader *r, const char *dir, const esp_adapter_config *asked) {
    char path[ESPI_PATH_MAX];
    ESPI_TRY(espi_struct_read(&r->asked, sizeof r->asked, asked, "esp_adapter_config"));
    if ((unsigned)r->asked.columns > ESP_ADAPTER_EXPERT_SLOWEST || (unsigned)r->asked.widths > ESP_ADAPTER_WIDTHS_SWAPPED)
        return ESPI_FAIL(ESP_ERR_ARG, "columns, widths: got %d, %d, expected values of esp_adapter_columns and esp_adapter_widths",
                         (int)r->asked.columns, (int)r->asked.widths);
    ESPI_TRY(read_config(&r->says, dir));
    ESPI_TRY(espi_path_join(path, dir, ESPI_ADAPTER_WEIGHTS));
    ESPI_TRY(espi_st_open(&r->file, path));
    r->seen = calloc(espi_st_count(r->file) + 1, 1);
    return r->seen ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its list of tensors", path);
}

static esp_status reader_open(reader *r, const char *dir, const espi_config *config, const esp_adapter_config *asked) {
    *r = (reader){.config = config};
    const esp_status status = open_parts(r, dir, asked);
    if (status != ESP_OK) reader_close(r);
    return status;
}

static bool has(reader *r, const char *module, int64_t layer) {
    char key[ESPI_ADAPTER_KEY];
    if (!module) return false;
    espi_adapter_key(key, module, layer, 0, 'A');
    return espi_st_find(r->file, key) != NULL;
}

/* ---- layout ---- */

static int64_t first_moe_layer(const espi_config *c) {
    for (int64_t l = 0; l < c->layers; l++)
        if (c->mlp_kind[l] == ESPI_MLP_MOE) return l;
    return -1;
}

/* The widths of a fused pair: of A, then of B. */
typedef struct widths {
    int64_t a, b;
} widths;

static widths widths_of(const espi_config *c, int stack, bool swapped) {
    const widths w = stack == ESPI_STACK_DOWN ? (widths){c->expert_width, c->hidden} : (widths){c->hidden, 2 * c->expert_width};
    return swapped ? (widths){w.b, w.a} : w;
}

/* Does the file's pair have these widths?  What is missing or no matrix is found out when it is read. */
static bool fits(reader *r, int64_t layer, bool inner, widths w) {
    char key[2][ESPI_ADAPTER_KEY];
    for (int i = 0; i < 2; i++) espi_adapter_fused_key(key[i], r->config->family, layer, inner, "AB"[i]);
    const espi_st_tensor *a = espi_st_find(r->file, key[0]), *b = espi_st_find(r->file, key[1]);
    return a && b && a->rank == 2 && b->rank == 2 && a->dims[1] == w.a && b->dims[0] == w.b;
}

/* Both stacks: of the four readings the one that the widths allow; none: the usual one, whose first tensor is then named. */
static void settle_both(espi_adapter_layout *layout, reader *r, int64_t layer) {
    for (int i = 0; i < 4; i++) {
        const bool down_inside = i >= 2, swapped = i & 1;
        if (r->asked.widths && swapped != (r->asked.widths == ESP_ADAPTER_WIDTHS_SWAPPED)) continue;
        const int inner = down_inside ? ESPI_STACK_DOWN : ESPI_STACK_GATE_UP, outer = ESPI_STACK_DOWN - inner;
        if (!fits(r, layer, true, widths_of(r->config, inner, swapped)) || !fits(r, layer, false, widths_of(r->config, outer, swapped)))
            continue;
        layout->down_inside = down_inside;
        layout->swapped = swapped;
        return;
    }
    layout->swapped = r->asked.widths == ESP_ADAPTER_WIDTHS_SWAPPED;
}

/* One stack alone: by what is asked, by its widths, by the version that wrote it. */
static esp_status settle_one(espi_adapter_layout *layout, reader *r, int64_t layer, int stack) {
    const bool straight = fits(r, layer, false, widths_of(r->config, stack, false));
    const bool swapped = fits(r, layer, false, widths_of(r->config, stack, true));
    layout->swapped = r->asked.widths ? r->asked.widths == ESP_ADAPTER_WIDTHS_SWAPPED : swapped && !straight;
    if (r->asked.widths || !straight || !swapped) return ESP_OK;
    const int *version = r->says.version;
    if (version[0] < 0 || r->config->family->fused_experts)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: the fused %s is square and alone, so its shape does not say whether A has the input or the output width, and "
                         "neither does %s: pass widths (true or swapped)",
                         espi_st_path(r->file), stack == ESPI_STACK_DOWN ? ESPI_ADAPTER_DOWN : ESPI_ADAPTER_GATE_UP,
                         version[0] < 0 ? "a peft_version, which is absent" : "peft_version for this family");
    layout->swapped = version[0] == 0 && version[1] < 19; /* 0.19 mended it */
    return ESP_OK;
}

static esp_status fused_layout(espi_adapter_layout *layout, reader *r, int64_t layer) {
    char outer[ESPI_ADAPTER_KEY], inner[ESPI_ADAPTER_KEY];
    espi_adapter_fused_key(outer, r->config->family, layer, false, 'A');
    espi_adapter_fused_key(inner, r->config->family, layer, true, 'A');
    const char *path = espi_st_path(r->file);
    const bool *named = r->says.named, has_inner = espi_st_find(r->file, inner);
    const bool any = has_inner || espi_st_find(r->file, outer) || named[0] || named[1];
    if (!any) return ESP_OK;
    if (!espi_st_find(r->file, outer) || (!has_inner && named[0] && named[1]))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: got none, expected it: the other stack's or target_parameters ask for it", path,
                         has_inner || !espi_st_find(r->file, outer) ? outer : inner);
    if (!has_inner && !named[0] && !named[1])
        return ESPI_FAIL(ESP_ERR_FORMAT,
                         "%s: tensor %s: got a config without target_parameters, expected mlp.experts." ESPI_ADAPTER_GATE_UP
                         " or mlp.experts." ESPI_ADAPTER_DOWN " there: this name alone does not say which stack it is",
                         path, outer);
    for (int i = 0; i < ESPI_STACKS; i++) layout->fused[i] = has_inner || named[i];
    if (has_inner)
        settle_both(layout, r, layer);
    else
        ESPI_TRY(settle_one(layout, r, layer, named[ESPI_STACK_DOWN] ? ESPI_STACK_DOWN : ESPI_STACK_GATE_UP));
    layout->slowest = r->asked.columns ? r->asked.columns == ESP_ADAPTER_EXPERT_SLOWEST : r->says.slowest;
    return ESP_OK;
}

/* ---- ranks and scales ---- */

/* The rank and scale of one module, which must be those of the modules before it. */
static esp_status agree(espi_lora_spec *spec, const reader *r, const char *module, int64_t layer, int64_t expert) {
    const stated *says = &r->says;
    char name[ESPI_ADAPTER_KEY];
    snprintf(name, sizeof name, module, (int)layer, (int)expert);
    double rank = (double)says->r, alpha = says->alpha;
    ESPI_TRY(espi_patterns_apply(&rank, says->ranks, name));
    ESPI_TRY(espi_patterns_apply(&alpha, says->alphas, name));
    if (rank != floor(rank) || !(rank <= INT32_MAX))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: rank_pattern for %s: got %g, expected a whole number", says->path, name, rank);
    const espi_lora_spec here = {.r = (int64_t)rank, .scale = alpha / (says->rslora ? sqrt(rank) : rank)};
    if (spec->r && (spec->r != here.r || spec->scale != here.scale))
        return ESPI_FAIL(
            ESP_ERR_UNSUPPORTED,
            "%s: layer %lld: %s: got rank %lld and scale %g by rank_pattern and alpha_pattern, expected rank %lld and scale %g "
            "as before it: one of each holds for a target in all layers",
            says->path, (long long)layer, name, (long long)here.r, here.scale, (long long)spec->r, spec->scale);
    *spec = here;
    return ESP_OK;
}

static bool has_patterns(const reader *r) {
    return !espi_patterns_empty(r->says.ranks) || !espi_patterns_empty(r->says.alphas);
}

static esp_status agree_per_expert(espi_lora_spec *spec, const reader *r, int target, int64_t layer) {
    const espi_family *f = r->config->family;
    for (int64_t e = 0; e < (has_patterns(r) ? r->config->experts : 1); e++) {
        if (target == ESPI_T_GATE_UP) {
            ESPI_TRY(agree(spec, r, f->expert_gate, layer, e));
            ESPI_TRY(agree(spec, r, f->expert_up, layer, e));
        } else {
            ESPI_TRY(agree(spec, r, f->expert_down, layer, e));
        }
    }
    return ESP_OK;
}

static esp_status experts_spec(espi_lora_spec *spec, const reader *r, int target, bool fused) {
    char parameter[ESPI_ADAPTER_KEY];
    snprintf(parameter, sizeof parameter, "%s.%s", r->config->family->experts_module,
             target == ESPI_T_DOWN ? ESPI_ADAPTER_DOWN : ESPI_ADAPTER_GATE_UP);
    for (int64_t l = 0; l < r->config->layers; l++) {
        if (r->config->mlp_kind[l] != ESPI_MLP_MOE) continue;
        ESPI_TRY(fused ? agree(spec, r, parameter, l, 0) : agree_per_expert(spec, r, target, l));
    }
    return ESP_OK;
}

/* Do gate and up of any expert have different A? */
static esp_status separate_a(bool *separate, reader *r, int64_t rank) {
    const espi_config *c = r->config;
    *separate = false;
    for (int64_t l = 0; l < c->layers && !*separate; l++) {
        for (int64_t e = 0; c->mlp_kind[l] == ESPI_MLP_MOE && e < c->experts && !*separate; e++) {
            char key[2][ESPI_ADAPTER_KEY];
            float *a[2] = {NULL, NULL};
            for (int p = ESPI_P_GATE; p <= ESPI_P_UP; p++)
                espi_adapter_key(key[p], espi_adapter_expert(c->family, (espi_projection)p), l, e, 'A');
            esp_status status = read_matrix(&a[0], r, key[0], rank, c->hidden);
            if (status == ESP_OK) status = read_matrix(&a[1], r, key[1], rank, c->hidden);
            if (status == ESP_OK) *separate = memcmp(a[0], a[1], (size_t)(rank * c->hidden) * sizeof **a) != 0;
            free(a[0]);
            free(a[1]);
            ESPI_TRY(status);
        }
    }
    return ESP_OK;
}

/* What lies where, and the ranks and scales of the targets that are there. */
static esp_status settle(espi_adapter_layout *layout, espi_lora_spec lora[ESPI_T_COUNT], reader *r) {
    const espi_family *f = r->config->family;
    const int64_t l = first_moe_layer(r->config);
    *layout = (espi_adapter_layout){0};
    memset(lora, 0, ESPI_T_COUNT * sizeof *lora);
    for (int t = ESPI_T_Q; t <= ESPI_T_O; t++)
        for (int64_t i = 0; i < r->config->layers && has(r, espi_adapter_attention(f, t), 0); i++)
            ESPI_TRY(agree(&lora[t], r, espi_adapter_attention(f, t), i, 0));
    if (l < 0) return ESP_OK;
    ESPI_TRY(fused_layout(layout, r, l));
    for (int t = ESPI_T_GATE_UP; t <= ESPI_T_DOWN; t++) {
        const bool fused = layout->fused[t - ESPI_T_GATE_UP];
        const bool flat = t == ESPI_T_DOWN ? has(r, f->expert_down, l) : has(r, f->expert_gate, l) || has(r, f->expert_up, l);
        if (fused && flat)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got both fused tensors and tensors per expert of one stack, expected one form",
                             espi_st_path(r->file));
        if (fused || flat) ESPI_TRY(experts_spec(&lora[t], r, t, fused));
        if (t == ESPI_T_GATE_UP && flat) ESPI_TRY(separate_a(&layout->separate, r, lora[t].r));
    }
    if (layout->separate) lora[ESPI_T_GATE_UP].r *= 2;
    return ESP_OK;
}

esp_status espi_adapter_read_spec(espi_lora_spec lora[ESPI_T_COUNT], float *alpha, bool *rslora, const char *dir, const espi_config *config,
                                  const esp_adapter_config *asked) {
    reader r;
    espi_adapter_layout layout;
    ESPI_TRY(reader_open(&r, dir, config, asked));
    const esp_status status = settle(&layout, lora, &r);
    *alpha = (float)r.says.alpha;
    *rslora = r.says.rslora;
    reader_close(&r);
    return status;
}

/* ---- loading ---- */

static void put(const espi_adapter_image *image, const void *parameter, int64_t i, float value) {
    espi_real_set(espi_adapter_image_at(image, parameter), i, value, image->model->ctx->real);
}

/* Rows first .. first+n-1, what is this rank's of them. */
static esp_status load_rows(const espi_adapter_image *image, const espi_st_tensor *t, const espi_adapter_entry *e, int64_t first,
                            int64_t n) {
    const espi_share *share = &image->model->share;
    float *x;
    ESPI_TRY(read_values(&x, t, first * e->cols.n, n * e->cols.n));
    esp_status status = ESP_OK;
    for (int64_t i = 0; i < n; i++) {
        for (int64_t j = 0; j < e->cols.n; j++) {
            const float value = x[i * e->cols.n + j];
            if (!espi_adapter_own_column(e, share, j)) continue;
            const int64_t at = espi_adapter_at(e, first + i, j);
            if (!e->repeated)
                put(image, e->parameter, at, value);
            else if (espi_adapter_image_get(image, e->parameter, at) != value)
                status = ESPI_FAIL(ESP_ERR_INTERNAL, "%s: %s differs from gate's A, expected the same", espi_st_path(t->file), e->key);
        }
    }
    free(x);
    return status;
}

static esp_status load_entry(const espi_adapter_image *image, reader *r, const espi_adapter_entry *e) {
    const espi_st_tensor *t;
    int64_t begin, end;
    ESPI_TRY(need(&t, r, e->key, e->rows.n, e->cols.n));
    espi_adapter_own_rows(&begin, &end, e, &image->model->share);
    const int64_t most = ESPI_ADAPTER_PIECE / e->cols.n > 0 ? ESPI_ADAPTER_PIECE / e->cols.n : 1;
    for (int64_t i = begin; i < end; i += most) ESPI_TRY(load_rows(image, t, e, i, end - i < most ? end - i : most));
    return ESP_OK;
}

static esp_status load_tensors(const espi_adapter_image *image, reader *r, const espi_adapter_layout *layout) {
    const esp_model *m = image->model;
    espi_adapter_entry *entries;
    size_t n;
    memset(r->seen, 0, espi_st_count(r->file));
    ESPI_TRY(espi_adapter_list(&entries, &n, m, layout));
    /* A block-diagonal B is written by its two blocks: the rest must not keep what was there. */
    for (int64_t l = 0; l < m->config.layers && layout->separate; l++) {
        const espi_layer *w = &m->layers[l];
        if (w->mlp != ESPI_MLP_MOE) continue;
        for (int64_t i = 0; i < w->gate_up.experts * w->gate_up.rows * w->lora_gate_up.r; i++) put(image, w->lora_gate_up.b, i, 0);
    }
    esp_status status = ESP_OK;
    for (size_t i = 0; i < n && status == ESP_OK; i++) status = load_entry(image, r, &entries[i]);
    free(entries);
    for (size_t i = 0; i < espi_st_count(r->file) && status == ESP_OK; i++)
        if (!r->seen[i])
            status =
                ESPI_FAIL(ESP_ERR_MISMATCH, "%s: tensor %s: got a target that the model does not train, expected none: change lora_targets",
                          espi_st_path(r->file), espi_st_at(r->file, i)->name);
    return status;
}

/* The model's ranks and scales must be the file's. */
static esp_status check_spec(const esp_model *m, const espi_lora_spec lora[ESPI_T_COUNT], const char *dir) {
    static const char *const names[ESPI_T_COUNT] = {"q", "k", "v", "o", "gate_up", "down"};
    for (int t = 0; t < ESPI_T_COUNT; t++) {
        if (lora[t].r != m->lora[t].r)
            return ESPI_FAIL(
                ESP_ERR_MISMATCH,
                "%s: rank of %s: got %lld, expected the model's %lld (0 = not trained; gate and up with an A each: twice theirs): "
                "load the model with adapter_dir",
                dir, names[t], (long long)lora[t].r, (long long)m->lora[t].r);
        if (lora[t].r && fabs(lora[t].scale - m->lora[t].scale) > 1e-7 * fabs(m->lora[t].scale))
            return ESPI_FAIL(ESP_ERR_MISMATCH,
                             "%s: scale of %s (alpha / r, or alpha / sqrt(r) with rsLoRA): got %g, expected the model's %g", dir, names[t],
                             lora[t].scale, m->lora[t].scale);
    }
    return ESP_OK;
}

static esp_status load_checked(const espi_adapter_image *image, reader *r, const char *dir) {
    espi_adapter_layout layout;
    espi_lora_spec lora[ESPI_T_COUNT];
    ESPI_TRY(settle(&layout, lora, r));
    ESPI_TRY(check_spec(image->model, lora, dir));
    return load_tensors(image, r, &layout);
}

/* A file that fails half-way must leave the old values: the new ones become the model's when all are read, by every rank. */
static esp_status read_folder(espi_adapter_image *image, const esp_model *model, const char *dir, const esp_adapter_config *config) {
    reader r;
    ESPI_TRY(espi_adapter_image_take(image, model, true));
    ESPI_TRY(reader_open(&r, dir, &model->config, config));
    const esp_status status = load_checked(image, &r, dir);
    reader_close(&r);
    return status;
}

esp_status esp_model_load_adapter_as(esp_model *model, const char *dir, const esp_adapter_config *config) {
    if (!model || !dir) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_load_adapter: model or dir is NULL");
    espi_adapter_image image = {0};
    esp_status status = read_folder(&image, model, dir, config);
    status = espi_comm_agree(model->share.comm, (espi_place){"reading an adapter", -1}, status);
    if (status == ESP_OK) status = espi_adapter_image_put(&image);
    espi_adapter_image_free(&image);
    return status;
}

esp_status esp_model_load_adapter(esp_model *model, const char *dir) {
    return esp_model_load_adapter_as(model, dir, NULL);
}
