/* A 4-bit copy of a model folder.  Experts get the keys that bitsandbytes gives a Linear4bit (one for each matrix, or one for a whole
 * stack), or those of gpt-oss's MXFP4; formats-and-numerics 3, 5, 6.  Nothing is held: every tensor is made when its turn to be written
 * comes, from the values of one expert matrix after the other, as the loader reads them. */
#include "io/quantised.h"

#include "core/status.h"
#include "espalier/quant.h"
#include "io/folder.h"
#include "io/model_writer.h"
#include "models/load.h"
#include "models/passes.h"
#include "quant/quant.h"

#include <stdlib.h>
#include <string.h>

/* What one tensor of the new folder holds of its matrix. */
typedef enum piece { CODES, ABSMAX, ABSMAX8, NESTED, STATE, SCALES, BIAS, RENAMED } piece;

typedef struct writer writer;

/* Expert matrices that become one group of tensors: `n` of a layer's stack from `first` on. */
typedef struct matrix {
    writer *w;
    int64_t layer, first, n;
    bool down;
    esp_dtype stored; /* what the values were before */
    struct matrix *next;
} matrix;

/* A tensor of the new folder, as its fill function finds it. */
typedef struct output {
    piece piece;
    matrix *m;
    const espi_st_tensor *t; /* RENAMED: that which is copied */
    struct output *next;
} output;

struct writer {
    espi_quantised_spec spec;
    const espi_format *format;
    espi_expert_layout layout; /* of the new folder */
    esp_model model;           /* a skeleton */
    espi_loader loader;
    /* By tensor of the old folder: whether it holds expert matrices or their biases, and which groups take its place in its file. */
    bool *replaced;
    matrix **groups;
    output *outputs;
    /* One block of the context. */
    void *room;
    size_t room_bytes;
    uint8_t *part_codes; /* codes of one matrix, or MXFP4 scales of one, where they are a by-product */
    float *absmax, *nested;
    uint8_t *absmax8;
    float offset;
    const matrix *cached; /* whose scales lie there */
};

static const espi_stack *stack_of(const matrix *m) {
    const espi_layer *layer = &m->w->model.layers[m->layer];
    return m->down ? &layer->down : &layer->gate_up;
}

static int64_t blocks_of(const matrix *m) {
    return m->n * stack_of(m)->part_blocks;
}

/* ---- making tensors ---- */

/* Quantises the matrices one after the other.  codes, scales (f32, or bytes of MXFP4): where those of all go; NULL: not wanted. */
static esp_status quantise(const matrix *m, uint8_t *codes, void *scales) {
    const espi_stack *s = stack_of(m);
    writer *w = m->w;
    const size_t scale_size = s->format == ESP_MXFP4 ? 1 : sizeof(float);
    for (int64_t i = 0; i < m->n; i++) {
        espi_source from;
        espi_stack one = *s;
        one.data = codes ? codes + (size_t)i * s->part_bytes : w->part_codes;
        void *part_scales = scales ? (unsigned char *)scales + (size_t)(i * s->part_blocks) * scale_size : w->part_codes;
        one.absmax = part_scales;
        one.scales = part_scales;
        ESPI_TRY(espi_loader_source(&from, &w->loader, s, m->layer, m->down, m->first + i));
        ESPI_TRY(espi_loader_take(&w->loader, &one, 0, &from));
    }
    return ESP_OK;
}

/* The 8-bit codes of the scales are needed for three tensors; the scales themselves come with the codes. */
static esp_status scales_made(const matrix *m) {
    writer *w = m->w;
    w->cached = m;
    return w->spec.double_quant ? esp_absmax_quantize(w->absmax8, w->nested, &w->offset, w->absmax, blocks_of(m)) : ESP_OK;
}

static esp_status need_scales(const matrix *m) {
    if (m->w->cached == m) return ESP_OK;
    m->w->cached = NULL;
    ESPI_TRY(quantise(m, NULL, m->w->absmax));
    return scales_made(m);
}

/* The JSON of bitsandbytes; of the same length whatever the offset, so that a header can be written before the offset is known.  text NULL:
 * only the length. */
static int state_text(char *text, size_t bytes, const matrix *m, float offset) {
    static const char *const dtypes[] = {[ESP_F32] = "float32", [ESP_BF16] = "bfloat16", [ESP_F16] = "float16"};
    const espi_stack *s = stack_of(m);
    char shape[80], nested[128] = "";
    const long long rows = (long long)(s->rows / s->parts), cols = (long long)s->cols;
    if (m->w->layout == ESPI_EXPERTS_FUSED)
        snprintf(shape, sizeof shape, "[%lld, %lld, %lld]", (long long)s->experts, (long long)s->rows, cols);
    else
        snprintf(shape, sizeof shape, "[%lld, %lld]", rows, cols);
    if (m->w->spec.double_quant)
        snprintf(nested, sizeof nested, ", \"nested_blocksize\": %d, \"nested_dtype\": \"float32\", \"nested_offset\": %.9e",
                 ESPI_NESTED_BLOCK, (double)offset);
    return snprintf(text, bytes, "{\"quant_type\": \"%s\", \"blocksize\": %d, \"dtype\": \"%s\", \"shape\": %s%s}", m->w->format->name,
                    ESPI_QBLOCK, dtypes[m->stored], shape, nested);
}

/* Rows of a bias: `n` experts from `first` on, in one tensor of all or in one each. */
static esp_status fill_bias(const matrix *m, unsigned char *buffer, size_t bytes) {
    const size_t row = bytes / (size_t)m->n;
    for (int64_t i = 0; i < m->n; i++) {
        espi_source from;
        ESPI_TRY(espi_loader_bias(&from, &m->w->loader, stack_of(m), m->layer, m->down, m->first + i));
        const size_t size = esp_dtype_size(from.t->dtype);
        ESPI_TRY(espi_st_read(from.t, buffer + (size_t)i * row, (uint64_t)from.first * size, row));
    }
    return ESP_OK;
}

static esp_status fill(void *user, void *buffer, size_t bytes) {
    const output *o = user;
    const matrix *m = o->m;
    if (o->piece == RENAMED) return espi_st_read(o->t, buffer, 0, bytes);
    writer *w = m->w;
    char text[512];
    switch (o->piece) {
    case CODES:
        if (w->spec.format == ESP_MXFP4) return quantise(m, buffer, NULL);
        w->cached = NULL;
        ESPI_TRY(quantise(m, buffer, w->absmax));
        return scales_made(m);
    case SCALES:
        return quantise(m, NULL, buffer);
    case BIAS:
        return fill_bias(m, buffer, bytes);
    case STATE:
        if (w->spec.double_quant) ESPI_TRY(need_scales(m));
        state_text(text, sizeof text, m, w->offset);
        memcpy(buffer, text, bytes);
        return ESP_OK;
    case ABSMAX:
    case ABSMAX8:
    case NESTED:
    case RENAMED:
        break;
    }
    ESPI_TRY(need_scales(m));
    memcpy(buffer, o->piece == ABSMAX ? (void *)w->absmax : o->piece == ABSMAX8 ? (void *)w->absmax8 : (void *)w->nested, bytes);
    return ESP_OK;
}

/* ---- planning ---- */

static esp_status add_output(espi_shard *shard, writer *w, const output *what, const char *name, esp_dtype dtype, int rank,
                             const int64_t *dims) {
    output *o = malloc(sizeof *o);
    if (!o) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to plan tensor %s", name);
    *o = *what;
    o->next = w->outputs;
    w->outputs = o;
    espi_st_item item = {.name = name, .dtype = dtype, .rank = rank, .fill = fill, .user = o};
    memcpy(item.dims, dims, (size_t)rank * sizeof *dims);
    return espi_shard_add(shard, &item);
}

static esp_status add(espi_shard *shard, matrix *m, piece what, const char *name, const char *suffix, esp_dtype dtype, int rank,
                      const int64_t *dims) {
    char key[ESPI_TENSOR_NAME + 64];
    snprintf(key, sizeof key, "%s%s", name, suffix);
    return add_output(shard, m->w, &(output){.piece = what, .m = m}, key, dtype, rank, dims);
}

static esp_status add_table(espi_shard *shard, const char *name, const char *suffix, const float *table, int64_t n) {
    char key[ESPI_TENSOR_NAME + 64];
    snprintf(key, sizeof key, "%s%s", name, suffix);
    return espi_shard_add(shard, &(espi_st_item){.name = key, .dtype = ESP_F32, .rank = 1, .dims = {n}, .data = table});
}

static esp_status add_bitsandbytes(espi_shard *shard, matrix *m, const char *name) {
    const espi_stack *s = stack_of(m);
    const bool nested = m->w->spec.double_quant;
    const int64_t blocks = blocks_of(m), n_nested = (blocks + ESPI_NESTED_BLOCK - 1) / ESPI_NESTED_BLOCK;
    const int64_t length = state_text(NULL, 0, m, 1);
    char state[64];
    snprintf(state, sizeof state, ".quant_state.bitsandbytes__%s", m->w->format->name);
    ESPI_TRY(add(shard, m, CODES, name, "", ESP_U8, 2, (int64_t[]){m->n * (int64_t)s->part_bytes, 1}));
    ESPI_TRY(add(shard, m, nested ? ABSMAX8 : ABSMAX, name, ".absmax", nested ? ESP_U8 : ESP_F32, 1, &blocks));
    ESPI_TRY(add_table(shard, name, ".quant_map", s->lut, 16));
    ESPI_TRY(add(shard, m, STATE, name, state, ESP_U8, 1, &length));
    if (!nested) return ESP_OK;
    ESPI_TRY(add(shard, m, NESTED, name, ".nested_absmax", ESP_F32, 1, &n_nested));
    return add_table(shard, name, ".nested_quant_map", esp_dynamic_map(1), 256);
}

static esp_status add_mxfp4(espi_shard *shard, matrix *m, const char *blocks_name) {
    const espi_stack *s = stack_of(m);
    const int64_t dims[] = {s->experts, s->rows, s->cols / ESPI_MXBLOCK, ESPI_MXBLOCK / 2};
    char scales_name[ESPI_TENSOR_NAME + 8];
    snprintf(scales_name, sizeof scales_name, "%.*s_scales", (int)(strlen(blocks_name) - strlen("_blocks")), blocks_name);
    ESPI_TRY(add(shard, m, CODES, blocks_name, "", ESP_U8, 4, dims));
    return add(shard, m, SCALES, scales_name, "", ESP_U8, 3, dims);
}

static esp_status add_bias(espi_shard *shard, matrix *m) {
    const espi_stack *s = stack_of(m);
    char name[ESPI_TENSOR_NAME];
    espi_source from;
    ESPI_TRY(espi_loader_bias(&from, &m->w->loader, s, m->layer, m->down, m->first));
    espi_expert_bias_name(name, m->w->model.config.family, m->w->layout, m->layer, m->down, m->first);
    const bool joined = m->w->layout == ESPI_EXPERTS_JOINED;
    return add(shard, m, BIAS, name, "", from.t->dtype, joined ? 1 : 2, joined ? &s->rows : (int64_t[]){s->experts, s->rows});
}

/* A tensor that stays.  Software that knows lists of matrices for the experts knows some others by another name as well. */
static esp_status keep(espi_shard *shard, writer *w, const espi_st_tensor *t) {
    const espi_family *f = w->model.config.family;
    const char *at = w->layout == ESPI_EXPERTS_JOINED && f->renamed_from ? strstr(t->name, f->renamed_from) : NULL;
    if (!at || strstr(t->name, f->renamed_to)) return espi_shard_keep(shard, t);
    char name[ESPI_TENSOR_NAME + 64];
    snprintf(name, sizeof name, "%.*s%s%s", (int)(at - t->name), t->name, f->renamed_to, at + strlen(f->renamed_from));
    return add_output(shard, w, &(output){.piece = RENAMED, .t = t}, name, t->dtype, t->rank, t->dims);
}

/* What becomes of one tensor of the old folder. */
static esp_status rewrite_tensor(void *user, espi_shard *shard, const espi_st_tensor *t) {
    writer *w = user;
    const espi_config *c = &w->model.config;
    const size_t index = espi_st_set_index(w->loader.set, t);
    char name[ESPI_TENSOR_NAME];
    if (!w->replaced[index]) return keep(shard, w, t);
    for (matrix *m = w->groups[index]; m; m = m->next) {
        espi_expert_matrix_name(name, c->family, w->layout, m->layer, m->down, m->first);
        ESPI_TRY(w->spec.format == ESP_MXFP4 ? add_mxfp4(shard, m, name) : add_bitsandbytes(shard, m, name));
        if (c->expert_bias) ESPI_TRY(add_bias(shard, m));
    }
    return ESP_OK;
}

/* Notes which tensors a group replaces; *first: the first of them. */
static esp_status note_sources(matrix *m, size_t *first) {
    writer *w = m->w;
    for (int64_t i = m->n - 1; i >= 0; i--) {
        espi_source from;
        if (w->model.config.expert_bias) {
            ESPI_TRY(espi_loader_bias(&from, &w->loader, stack_of(m), m->layer, m->down, m->first + i));
            w->replaced[espi_st_set_index(w->loader.set, from.t)] = true;
        }
        ESPI_TRY(espi_loader_source(&from, &w->loader, stack_of(m), m->layer, m->down, m->first + i));
        *first = espi_st_set_index(w->loader.set, from.t);
        m->stored = from.t->dtype;
        w->replaced[*first] = true;
    }
    return ESP_OK;
}

/* The group of `n` matrices from `first` on, in the place of the tensor that holds the first of them. */
static esp_status plan_matrix(writer *w, int64_t layer, bool down, int64_t first, int64_t n) {
    matrix *m = malloc(sizeof *m);
    if (!m) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to plan the experts of layer %lld", (long long)layer);
    *m = (matrix){.w = w, .layer = layer, .down = down, .first = first, .n = n};
    size_t place = 0;
    const esp_status status = note_sources(m, &place);
    if (status != ESP_OK) {
        free(m);
        return status;
    }
    m->next = w->groups[place];
    w->groups[place] = m;
    return ESP_OK;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static esp_status plan_stack(writer *w, int64_t layer, bool down, int64_t *bytes, int64_t *blocks) {
    espi_layer *l = &w->model.layers[layer];
    espi_stack *s = down ? &l->down : &l->gate_up;
    const int64_t parts = s->experts * s->parts, n = s->rows / s->parts * s->cols;
    const bool whole = w->layout == ESPI_EXPERTS_FUSED || w->layout == ESPI_EXPERTS_BLOCKS;
    s->lut = esp_quant_table(s->format);
    if (w->layout == ESPI_EXPERTS_FUSED && n % ESPI_QBLOCK != 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "layer %lld: matrices of %lld values, expected a multiple of %d to write them as one array: leave out --fused",
                         (long long)layer, (long long)n, ESPI_QBLOCK);
    *bytes = larger(*bytes, larger((int64_t)s->part_bytes, s->part_blocks * (int64_t)sizeof(float)));
    *blocks = larger(*blocks, (whole ? parts : 1) * s->part_blocks);
    for (int64_t part = 0; part < parts; part += whole ? parts : 1) ESPI_TRY(plan_matrix(w, layer, down, part, whole ? parts : 1));
    return ESP_OK;
}

static esp_status plan_all(writer *w) {
    int64_t bytes = 0, blocks = 0;
    const size_t tensors = espi_st_set_count(w->loader.set) + 1;
    w->replaced = calloc(tensors, sizeof *w->replaced);
    w->groups = calloc(tensors, sizeof *w->groups);
    if (!w->replaced || !w->groups)
        return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of its tensors", espi_st_set_path(w->loader.set));
    for (int64_t l = 0; l < w->model.config.layers; l++) {
        if (w->model.layers[l].mlp != ESPI_MLP_MOE) continue;
        ESPI_TRY(plan_stack(w, l, false, &bytes, &blocks));
        ESPI_TRY(plan_stack(w, l, true, &bytes, &blocks));
    }
    const size_t codes = ESPI_ALIGNED((size_t)bytes), absmax = ESPI_ALIGNED((size_t)blocks * sizeof(float));
    const size_t nested = ESPI_ALIGNED(((size_t)blocks / ESPI_NESTED_BLOCK + 1) * sizeof(float));
    w->room_bytes = codes + absmax + nested + ESPI_ALIGNED((size_t)blocks);
    ESPI_TRY(espi_ctx_alloc(w->model.ctx, ESPI_MEM_STAGING, w->room_bytes, &w->room));
    w->part_codes = w->room;
    w->absmax = (float *)(void *)(w->part_codes + codes);
    w->nested = (float *)(void *)(w->part_codes + codes + absmax);
    w->absmax8 = w->part_codes + codes + absmax + nested;
    return ESP_OK;
}

/* ---- config.json ---- */

/* "model.layers.3.self_attn.q_proj" of the family's format; parent: the module that holds it; star: of all layers. */
static void append_module(json_t *list, const char *format, int64_t layer, bool parent) {
    char name[ESPI_TENSOR_NAME];
    if (!format) return;
    const char *number = strstr(format, "%d");
    if (layer < 0 && number)
        snprintf(name, sizeof name, "%.*s*%s", (int)(number - format), format, number + 2);
    else
        snprintf(name, sizeof name, format, (int)layer);
    const size_t n = strlen(name), weight = strlen(".weight");
    char *dot = parent ? strrchr(name, '.') : NULL;
    if (dot)
        *dot = '\0';
    else if (n > weight && strcmp(name + n - weight, ".weight") == 0)
        name[n - weight] = '\0';
    json_array_append_new(list, json_string(name));
}

static json_t *mxfp4_config(const writer *w) {
    const espi_family *f = w->model.config.family;
    json_t *kept = json_array();
    append_module(kept, f->q, -1, true);
    append_module(kept, f->router, -1, false);
    append_module(kept, f->embed, -1, false);
    append_module(kept, f->head, -1, false);
    return json_pack("{s:s, s:o}", "quant_method", "mxfp4", "modules_to_not_convert", kept);
}

/* What is left as it was is named in full, layer by layer: every version of transformers compares these names in another way. */
static json_t *bitsandbytes_config(const writer *w) {
    const espi_config *c = &w->model.config;
    const espi_family *f = c->family;
    json_t *kept = json_array();
    append_module(kept, f->head, 0, false);
    for (int64_t l = 0; l < c->layers; l++) {
        const bool moe = c->mlp_kind[l] == ESPI_MLP_MOE;
        const char *const modules[] = {f->q,
                                       f->k,
                                       f->v,
                                       f->o,
                                       moe ? f->router : f->dense_gate,
                                       moe ? f->shared_gate : f->dense_up,
                                       moe ? f->shared_up : f->dense_down,
                                       moe ? f->shared_down : NULL};
        for (int i = 0; i < ESPI_COUNT(modules); i++) append_module(kept, modules[i], l, false);
    }
    return json_pack("{s:s, s:b, s:b, s:s, s:b, s:s, s:s, s:o}", "quant_method", "bitsandbytes", "load_in_4bit", 1, "load_in_8bit", 0,
                     "bnb_4bit_quant_type", w->format->name, "bnb_4bit_use_double_quant", w->spec.double_quant, "bnb_4bit_compute_dtype",
                     "bfloat16", "bnb_4bit_quant_storage", "uint8", "llm_int8_skip_modules", kept);
}

static esp_status rewrite_config(void *user, json_t *config) {
    const writer *w = user;
    json_t *quantisation = w->spec.format == ESP_MXFP4 ? mxfp4_config(w) : bitsandbytes_config(w);
    if (json_object_set_new(config, "quantization_config", quantisation) == 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for quantization_config");
}

/* ---- the whole ---- */

static esp_status check_spec(const espi_quantised_spec *spec) {
    if (spec->format != ESP_NF4 && spec->format != ESP_FP4 && spec->format != ESP_MXFP4)
        return ESPI_FAIL(ESP_ERR_ARG, "format: got %d, expected ESP_NF4, ESP_FP4 or ESP_MXFP4", (int)spec->format);
    if (spec->format == ESP_MXFP4 && spec->double_quant)
        return ESPI_FAIL(ESP_ERR_ARG, "double quantisation: got true with MXFP4, expected NF4 or FP4: a scale of MXFP4 has 8 bits already");
    return ESP_OK;
}

static esp_status check_out(const char *out_dir) {
    char **names;
    size_t n;
    if (!espi_dir_exists(out_dir)) return ESP_OK;
    ESPI_TRY(espi_folder_list(&names, &n, out_dir));
    const esp_status status =
        n == 0 ? ESP_OK : ESPI_FAIL(ESP_ERR_ARG, "%s: holds %s, expected a new or empty folder to write to", out_dir, names[0]);
    espi_folder_list_free(names, n);
    return status;
}

static espi_expert_layout layout_for(const espi_quantised_spec *spec, const espi_family *f) {
    if (spec->format == ESP_MXFP4) return ESPI_EXPERTS_BLOCKS;
    if (spec->fused || (!f->expert_gate && !f->expert_gate_up)) return ESPI_EXPERTS_FUSED;
    return f->expert_gate ? ESPI_EXPERTS_PER_EXPERT : ESPI_EXPERTS_JOINED;
}

static esp_status open_model(writer *w, const char *in_dir) {
    esp_model *m = &w->model;
    ESPI_TRY(espi_config_read(&m->config, in_dir));
    if (m->config.quantised || m->config.mxfp4)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: config.json says that it is quantised already, expected a 16-bit or f32 checkpoint",
                         in_dir);
    ESPI_TRY(
        espi_model_options(&m->options, m->lora, &ESP_MODEL_CONFIG(.experts = w->spec.format, .mxfp4_rule = w->spec.rule), &m->config));
    w->layout = layout_for(&w->spec, m->config.family);
    ESPI_TRY(espi_model_skeleton(m));
    return espi_loader_open(&w->loader, m, in_dir);
}

static void writer_free(writer *w) {
    espi_ctx_free(w->model.ctx, ESPI_MEM_STAGING, w->room, w->room_bytes);
    for (size_t i = 0; w->groups && i < espi_st_set_count(w->loader.set); i++)
        for (matrix *m = w->groups[i], *next; m; m = next) {
            next = m->next;
            free(m);
        }
    free(w->groups);
    free(w->replaced);
    if (w->loader.model) espi_loader_close(&w->loader);
    espi_model_skeleton_free(&w->model);
    espi_config_free(&w->model.config);
    for (output *o = w->outputs, *next; o; o = next) {
        next = o->next;
        free(o);
    }
}

esp_status espi_quantised_write(esp_ctx *ctx, const char *out_dir, const char *in_dir, const espi_quantised_spec *spec) {
    ESPI_TRY(check_spec(spec));
    if (ctx->device)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: got a context on a GPU, expected one on the CPU to write files with", out_dir);
    ESPI_TRY(check_out(out_dir));
    writer w = {.spec = *spec, .format = espi_format_find(spec->format), .model = {.ctx = ctx}};
    esp_status status = open_model(&w, in_dir);
    if (status == ESP_OK) status = plan_all(&w);
    const espi_model_edit edit = {.tensor = rewrite_tensor, .config = rewrite_config, .user = &w};
    if (status == ESP_OK) status = espi_model_rewrite(out_dir, in_dir, w.loader.set, &edit);
    writer_free(&w);
    return status;
}
