/* Loading: where every frozen weight lies in the model's one block, how many bytes that takes, and filling it from the folder.
 * The same walk counts (with no memory behind it) and places, so the plan is exact. */
#include "models/load.h"

#include "espalier/quant.h"

#include <stdlib.h>
#include <string.h>

#define RAW_MAX ((int64_t)8 << 20) /* of 64 MiB allowed: larger pieces read no faster and leave the cache */
#define RAW_MIN INT64_C(4096)
#define READ_PIECE INT64_C(262144) /* elements checked right after they were read */

/* ---- layout ---- */

typedef struct layout {
    unsigned char *base; /* NULL: only count */
    size_t used;
} layout;

static void *place(layout *l, size_t bytes) {
    void *p = l->base && bytes > 0 ? l->base + l->used : NULL;
    l->used += ESPI_ALIGNED(bytes);
    return p;
}

static void place_mat(layout *l, espi_mat *m) {
    m->data = place(l, (size_t)(m->rows * m->cols) * esp_dtype_size(m->dtype));
}

static const float *place_floats(layout *l, int64_t n) {
    return place(l, (size_t)n * sizeof(float));
}

static void place_linear(layout *l, espi_linear *linear, bool bias) {
    place_mat(l, &linear->w);
    linear->bias = bias ? place_floats(l, linear->w.rows) : NULL;
}

static void place_stack(layout *l, espi_stack *s, bool double_quant, const float *map) {
    const int64_t parts = s->experts * s->parts;
    s->data = place(l, (size_t)parts * s->part_bytes);
    if (s->format == ESP_Q_NONE) return;
    s->lut = esp_quant_table(s->format);
    if (!double_quant) {
        s->absmax = place_floats(l, parts * s->part_blocks);
        return;
    }
    s->absmax8 = place(l, (size_t)(parts * s->part_blocks));
    s->nested = place_floats(l, parts * s->part_nested);
    s->offset = place_floats(l, parts);
    s->map = map;
}

/* Gives every pointer of the skeleton its place.  dense, experts: bytes of each kind; map: the table of double quantisation, or NULL. */
static void lay_out(esp_model *m, unsigned char *base, size_t *dense, size_t *experts, float **map) {
    const espi_config *c = &m->config;
    layout l = {.base = base};
    *experts = 0;
    *map = m->options.double_quant ? place(&l, 256 * sizeof(float)) : NULL;
    place_mat(&l, &m->embed);
    if (c->tied_head)
        m->head = m->embed;
    else
        place_mat(&l, &m->head);
    m->final_norm = place_floats(&l, c->hidden);
    for (int64_t i = 0; i < c->layers; i++) {
        espi_layer *w = &m->layers[i];
        w->norm1 = place_floats(&l, c->hidden);
        w->norm2 = place_floats(&l, c->hidden);
        w->q_norm = c->qk_norm ? place_floats(&l, c->head_dim) : NULL;
        w->k_norm = c->qk_norm ? place_floats(&l, c->head_dim) : NULL;
        place_linear(&l, &w->q, c->attention_bias);
        place_linear(&l, &w->k, c->attention_bias);
        place_linear(&l, &w->v, c->attention_bias);
        place_linear(&l, &w->o, c->attention_bias);
        if (w->mlp == ESPI_MLP_DENSE) {
            place_linear(&l, &w->mlp_gate_up, false);
            place_linear(&l, &w->mlp_down, false);
            continue;
        }
        place_mat(&l, &w->router);
        const size_t before = l.used;
        place_stack(&l, &w->gate_up, m->options.double_quant, *map);
        place_stack(&l, &w->down, m->options.double_quant, *map);
        *experts += l.used - before;
    }
    *dense = l.used - *experts;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

/* One buffer: room for the largest piece that is ever on its way, and, under double quantisation, for one matrix's scales. */
static size_t staging_bytes(size_t *raw_bytes, const esp_model *m) {
    int64_t values = m->embed.rows * m->embed.cols, blocks = 0;
    for (int64_t i = 0; i < m->config.layers; i++) {
        const espi_layer *w = &m->layers[i];
        values = larger(values, larger(w->q.w.rows, w->k.w.rows) * w->q.w.cols);
        values = larger(values, larger(w->mlp_gate_up.w.rows * w->mlp_gate_up.w.cols, w->router.rows * w->router.cols));
        values = larger(values, larger(w->gate_up.rows / 2 * w->gate_up.cols, w->down.rows * w->down.cols));
        blocks = larger(blocks, larger(w->gate_up.part_blocks, w->down.part_blocks));
    }
    const int64_t raw = larger(values * (int64_t)sizeof(float), RAW_MIN);
    *raw_bytes = raw < RAW_MAX ? (size_t)(raw + 255) / 256 * 256 : (size_t)RAW_MAX;
    return *raw_bytes + (m->options.double_quant ? ESPI_ALIGNED((size_t)blocks * sizeof(float)) : 0);
}

esp_status espi_weight_plan_make(espi_weight_plan *out, const espi_config *config, const esp_model_config *options,
                                 const espi_lora_spec lora[ESPI_T_COUNT], size_t real_size) {
    esp_model m = {.config = *config, .options = *options};
    memcpy(m.lora, lora, sizeof m.lora);
    ESPI_TRY(espi_model_skeleton(&m));
    float *map;
    lay_out(&m, NULL, &out->dense, &out->experts, &map);
    espi_adapter_bytes(&out->adapter, &out->gradients, &m, real_size);
    size_t raw_bytes;
    out->staging = staging_bytes(&raw_bytes, &m);
    espi_model_skeleton_free(&m);
    return ESP_OK;
}

/* ---- reading values ---- */

const espi_st_tensor *espi_loader_find(espi_loader *loader, const char *name) {
    const espi_st_tensor *t = espi_st_set_find(loader->set, name);
    if (t) loader->used[espi_st_set_index(loader->set, t)] = true;
    return t;
}

esp_status espi_loader_need(espi_loader *loader, const espi_st_tensor **tensor, const char *name, esp_dtype dtype, int rank,
                            const int64_t *dims) {
    *tensor = espi_loader_find(loader, name);
    if (*tensor) return espi_st_expect(*tensor, dtype, rank, dims);
    char expected[ESPI_DIMS_TEXT];
    espi_dims_text(expected, rank, dims);
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s is missing, expected one of shape %s", espi_st_set_path(loader->set), name, expected);
}

/* The exponent of NaN and infinity is all ones.  No early exit inside a piece: the loop is then wide. */
static int64_t first_nonfinite(const void *x, esp_dtype dtype, int64_t n) {
    bool bad = false;
    if (dtype == ESP_F32) {
        const uint32_t *bits = x;
        for (int64_t i = 0; i < n; i++) bad |= (bits[i] & 0x7f800000u) == 0x7f800000u;
        for (int64_t i = 0; bad && i < n; i++)
            if ((bits[i] & 0x7f800000u) == 0x7f800000u) return i;
        return -1;
    }
    const uint16_t *bits = x, mask = dtype == ESP_BF16 ? 0x7f80u : 0x7c00u;
    for (int64_t i = 0; i < n; i++) bad |= (bits[i] & mask) == mask;
    for (int64_t i = 0; bad && i < n; i++)
        if ((bits[i] & mask) == mask) return i;
    return -1;
}

esp_status espi_loader_read(const espi_st_tensor *tensor, void *out, int64_t first, int64_t n) {
    const size_t size = esp_dtype_size(tensor->dtype);
    for (int64_t done = 0; done < n;) {
        const int64_t m = n - done < READ_PIECE ? n - done : READ_PIECE;
        unsigned char *piece = (unsigned char *)out + (size_t)done * size;
        ESPI_TRY(espi_st_read(tensor, piece, (uint64_t)(first + done) * size, (size_t)m * size));
        const int64_t bad = first_nonfinite(piece, tensor->dtype, m);
        if (bad >= 0)
            return ESPI_FAIL(ESP_ERR_NONFINITE, "%s: tensor %s: element %lld is %g, expected finite values", espi_st_path(tensor->file),
                             tensor->name, (long long)(first + done + bad), (double)espi_plain_value(piece, tensor->dtype, bad));
        done += m;
    }
    return ESP_OK;
}

/* A tensor of plain values that can be held exactly in `held`. */
static esp_status need_plain(espi_loader *loader, const espi_st_tensor **tensor, const char *name, esp_dtype held, int rank,
                             const int64_t *dims) {
    ESPI_TRY(espi_loader_need(loader, tensor, name, ESP_DTYPE_NONE, rank, dims));
    const espi_st_tensor *t = *tensor;
    if (t->dtype != ESP_F32 && t->dtype != ESP_BF16 && t->dtype != ESP_F16)
        return ESPI_FAIL(ESP_ERR_DTYPE, "%s: tensor %s: dtype %s, expected F32, BF16 or F16", espi_st_path(t->file), name, t->dtype_name);
    if (t->dtype != held && held != ESP_F32)
        return ESPI_FAIL(ESP_ERR_DTYPE,
                         "%s: tensor %s: dtype %s, expected %s as dtype in config.json says: state float32 there to hold both",
                         espi_st_path(t->file), name, t->dtype_name, esp_dtype_name(held));
    return ESP_OK;
}

/* Elements first .. first+n-1 into `out`, which holds `held`: as they are, or widened to f32. */
static esp_status read_plain(espi_loader *loader, const espi_st_tensor *t, void *out, esp_dtype held, int64_t first, int64_t n) {
    if (t->dtype == held) return espi_loader_read(t, out, first, n);
    float *wide = out;
    const int64_t most = (int64_t)(loader->raw_bytes / esp_dtype_size(t->dtype));
    for (int64_t done = 0; done < n;) {
        const int64_t m = n - done < most ? n - done : most;
        ESPI_TRY(espi_loader_read(t, loader->raw, first + done, m));
        for (int64_t i = 0; i < m; i++) wide[done + i] = espi_plain_value(loader->raw, t->dtype, i);
        done += m;
    }
    return ESP_OK;
}

static esp_status load_values(espi_loader *loader, const void *out, const char *name, esp_dtype held, int rank, const int64_t *dims) {
    const espi_st_tensor *t;
    ESPI_TRY(need_plain(loader, &t, name, held, rank, dims));
    return read_plain(loader, t, (void *)out, held, 0, rank == 1 ? dims[0] : dims[0] * dims[1]);
}

/* ---- dense parts ---- */

/* format: a family's name with %d for the layer. */
static void layer_name(char out[ESPI_TENSOR_NAME], const char *format, int64_t layer, const char *suffix) {
    snprintf(out, ESPI_TENSOR_NAME, format, (int)layer);
    const size_t n = strlen(out);
    snprintf(out + n, ESPI_TENSOR_NAME - n, "%s", suffix);
}

static void expert_name(char out[ESPI_TENSOR_NAME], const char *format, int64_t layer, int64_t expert) {
    snprintf(out, ESPI_TENSOR_NAME, format, (int)layer, (int)expert);
    const size_t n = strlen(out);
    snprintf(out + n, ESPI_TENSOR_NAME - n, ".weight");
}

static esp_status load_vector(espi_loader *loader, const float *out, const char *format, int64_t layer, const char *suffix, int64_t n) {
    char name[ESPI_TENSOR_NAME];
    layer_name(name, format, layer, suffix);
    return load_values(loader, out, name, ESP_F32, 1, &n);
}

static esp_status load_matrix(espi_loader *loader, const float *out, const char *format, int64_t layer, int64_t rows, int64_t cols) {
    char name[ESPI_TENSOR_NAME];
    layer_name(name, format, layer, ".weight");
    return load_values(loader, out, name, ESP_F32, 2, (int64_t[]){rows, cols});
}

static esp_status load_linear(espi_loader *loader, const espi_linear *linear, const char *format, int64_t layer) {
    ESPI_TRY(load_matrix(loader, linear->w.data, format, layer, linear->w.rows, linear->w.cols));
    return linear->bias ? load_vector(loader, linear->bias, format, layer, ".bias", linear->w.rows) : ESP_OK;
}

static esp_status load_attention(espi_loader *loader, const espi_layer *w, int64_t layer) {
    const espi_config *c = &loader->model->config;
    const espi_family *f = c->family;
    ESPI_TRY(load_vector(loader, w->norm1, f->norm1, layer, ".weight", c->hidden));
    ESPI_TRY(load_vector(loader, w->norm2, f->norm2, layer, ".weight", c->hidden));
    if (w->q_norm) ESPI_TRY(load_vector(loader, w->q_norm, f->q_norm, layer, ".weight", c->head_dim));
    if (w->k_norm) ESPI_TRY(load_vector(loader, w->k_norm, f->k_norm, layer, ".weight", c->head_dim));
    ESPI_TRY(load_linear(loader, &w->q, f->q, layer));
    ESPI_TRY(load_linear(loader, &w->k, f->k, layer));
    ESPI_TRY(load_linear(loader, &w->v, f->v, layer));
    return load_linear(loader, &w->o, f->o, layer);
}

static esp_status load_dense_mlp(espi_loader *loader, const espi_layer *w, int64_t layer) {
    const espi_config *c = &loader->model->config;
    const float *gate = w->mlp_gate_up.w.data, *up = gate + c->dense_width * c->hidden;
    ESPI_TRY(load_matrix(loader, gate, c->family->dense_gate, layer, c->dense_width, c->hidden));
    ESPI_TRY(load_matrix(loader, up, c->family->dense_up, layer, c->dense_width, c->hidden));
    return load_linear(loader, &w->mlp_down, c->family->dense_down, layer);
}

/* ---- experts ---- */

esp_status espi_loader_shrink_absmax(espi_loader *loader, const espi_stack *s, int64_t part) {
    const float *own = esp_dynamic_map(1);
    if (!loader->map_used)
        memcpy(loader->map, own, 256 * sizeof(float));
    else if (memcmp(loader->map, own, 256 * sizeof(float)) != 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: some experts bring a nested_quant_map of their own and others none, expected one for all",
                         espi_st_set_path(loader->set));
    loader->map_used = true;
    return esp_absmax_quantize((uint8_t *)s->absmax8 + part * s->part_blocks, (float *)s->nested + part * s->part_nested,
                               (float *)s->offset + part, loader->absmax, s->part_blocks);
}

/* Elements first .. of the tensor become matrix `part` of the stack, in pieces of whole blocks. */
static esp_status quantise_part(espi_loader *loader, const espi_stack *s, int64_t part, const espi_st_tensor *t, int64_t first, int64_t n) {
    uint8_t *codes = (uint8_t *)s->data + (size_t)part * s->part_bytes;
    float *absmax = s->absmax8 ? loader->absmax : (float *)s->absmax + part * s->part_blocks;
    const int64_t most = (int64_t)(loader->raw_bytes / esp_dtype_size(t->dtype));
    for (int64_t done = 0; done < n;) {
        const int64_t m = n - done < most ? n - done : most;
        ESPI_TRY(espi_loader_read(t, loader->raw, first + done, m));
        ESPI_TRY(esp_quantize(codes + done / 2, absmax + done / ESPI_QBLOCK, loader->raw, t->dtype, m, ESPI_QBLOCK, s->format));
        done += m;
    }
    return s->absmax8 ? espi_loader_shrink_absmax(loader, s, part) : ESP_OK;
}

/* Matrix `part` of the stack from elements first .. of a tensor of plain values. */
static esp_status load_part(espi_loader *loader, const espi_stack *s, int64_t part, const espi_st_tensor *t, int64_t first) {
    const int64_t n = s->rows / s->parts * s->cols;
    if (s->format != ESP_Q_NONE) return quantise_part(loader, s, part, t, first, n);
    return read_plain(loader, t, (unsigned char *)s->data + (size_t)part * s->part_bytes, s->dtype, first, n);
}

/* What the tensors of a stack may be stored in: anything plain when it is quantised, else what is held. */
static esp_dtype held_dtype(const espi_stack *s) {
    return s->format == ESP_Q_NONE ? s->dtype : ESP_F32;
}

static esp_status load_one_expert(espi_loader *loader, const espi_stack *s, int64_t part, const char *format, int64_t layer,
                                  int64_t expert) {
    char name[ESPI_TENSOR_NAME];
    expert_name(name, format, layer, expert);
    if (espi_bnb_present(loader, name)) return espi_bnb_load_part(loader, s, part, name);
    const espi_st_tensor *t;
    ESPI_TRY(need_plain(loader, &t, name, held_dtype(s), 2, (int64_t[]){s->rows / s->parts, s->cols}));
    return load_part(loader, s, part, t, 0);
}

static esp_status load_fused(espi_loader *loader, const espi_stack *s, const char *format, int64_t layer) {
    char name[ESPI_TENSOR_NAME];
    layer_name(name, format, layer, "");
    const espi_st_tensor *t;
    ESPI_TRY(need_plain(loader, &t, name, held_dtype(s), 3, (int64_t[]){s->experts, s->rows, s->cols}));
    const int64_t n = s->rows / s->parts * s->cols;
    for (int64_t part = 0; part < s->experts * s->parts; part++) ESPI_TRY(load_part(loader, s, part, t, part * n));
    return ESP_OK;
}

/* The layout is what the names say: fused when a fused tensor is there. */
static esp_status find_layout(espi_expert_layout *out, const espi_loader *loader, int64_t layer) {
    const espi_family *f = loader->model->config.family;
    char fused[2][ESPI_TENSOR_NAME], single[ESPI_TENSOR_NAME];
    layer_name(fused[0], f->fused_gate_up, layer, "");
    layer_name(fused[1], f->fused_down, layer, "");
    expert_name(single, f->expert_gate, layer, 0);
    const bool has_single = espi_st_set_find(loader->set, single);
    const bool has_fused = espi_st_set_find(loader->set, fused[0]) || espi_st_set_find(loader->set, fused[1]);
    const char *path = espi_st_set_path(loader->set);
    if (has_single && has_fused)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: has both %s and %s, expected the experts of a layer once", path, single, fused[0]);
    if (!has_single && !has_fused)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s is missing, and so is %s, expected one of them", path, single, fused[0]);
    *out = has_fused ? ESPI_EXPERTS_FUSED : ESPI_EXPERTS_PER_EXPERT;
    return ESP_OK;
}

static esp_status load_moe(espi_loader *loader, const espi_layer *w, int64_t layer) {
    const espi_config *c = &loader->model->config;
    const espi_family *f = c->family;
    ESPI_TRY(load_matrix(loader, w->router.data, f->router, layer, c->experts, c->hidden));
    espi_expert_layout layout = ESPI_EXPERTS_PER_EXPERT;
    ESPI_TRY(find_layout(&layout, loader, layer));
    if (layout == ESPI_EXPERTS_FUSED) {
        ESPI_TRY(load_fused(loader, &w->gate_up, f->fused_gate_up, layer));
        return load_fused(loader, &w->down, f->fused_down, layer);
    }
    for (int64_t e = 0; e < c->experts; e++) {
        ESPI_TRY(load_one_expert(loader, &w->gate_up, 2 * e, f->expert_gate, layer, e));
        ESPI_TRY(load_one_expert(loader, &w->gate_up, 2 * e + 1, f->expert_up, layer, e));
        ESPI_TRY(load_one_expert(loader, &w->down, e, f->expert_down, layer, e));
    }
    return ESP_OK;
}

/* ---- the whole ---- */

static esp_status take_staging(espi_loader *loader) {
    loader->staging_bytes = staging_bytes(&loader->raw_bytes, loader->model);
    ESPI_TRY(espi_ctx_alloc(loader->model->ctx, ESPI_MEM_STAGING, loader->staging_bytes, &loader->staging));
    loader->raw = loader->staging;
    loader->absmax = (float *)(void *)(loader->raw + loader->raw_bytes);
    return ESP_OK;
}

/* Tensors nobody asked for.  One that the model's own names begin means that config and weights disagree; others are only reported. */
static esp_status check_unused(const espi_loader *loader) {
    const espi_st_tensor *first = NULL;
    size_t wrong = 0;
    for (size_t i = 0; i < espi_st_set_count(loader->set); i++) {
        const espi_st_tensor *t = espi_st_set_at(loader->set, i);
        if (loader->used[i] || strstr(t->name, "rotary_emb.inv_freq")) continue;
        if (!t->unmapped && strncmp(t->name, "model.", 6) == 0) {
            if (wrong++ == 0) first = t;
        } else {
            espi_log(loader->model->ctx, ESP_LOG_WARN, "%s: tensor %s is not used", espi_st_path(t->file), t->name);
        }
    }
    if (wrong == 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s%s: got what the model of config.json does not have, expected no such tensor",
                     espi_st_path(first->file), first->name, wrong > 1 ? " and others" : "");
}

static esp_status load_all(espi_loader *loader) {
    const esp_model *m = loader->model;
    const espi_config *c = &m->config;
    const int64_t table[] = {c->vocab, c->hidden};
    ESPI_TRY(load_values(loader, m->embed.data, c->family->embed, m->embed.dtype, 2, table));
    if (!c->tied_head) ESPI_TRY(load_values(loader, m->head.data, c->family->head, m->head.dtype, 2, table));
    ESPI_TRY(load_values(loader, m->final_norm, c->family->final_norm, ESP_F32, 1, &c->hidden));
    for (int64_t l = 0; l < c->layers; l++) {
        const espi_layer *w = &m->layers[l];
        ESPI_TRY(load_attention(loader, w, l));
        ESPI_TRY(w->mlp == ESPI_MLP_DENSE ? load_dense_mlp(loader, w, l) : load_moe(loader, w, l));
    }
    return check_unused(loader);
}

esp_status espi_model_load_weights(esp_model *model, const char *dir) {
    espi_loader loader = {.model = model};
    size_t dense, experts;
    ESPI_TRY(espi_model_skeleton(model));
    lay_out(model, NULL, &dense, &experts, &loader.map);
    ESPI_TRY(espi_st_set_open(&loader.set, dir));
    esp_status status = ESP_OK;
    loader.used = calloc(espi_st_set_count(loader.set) + 1, sizeof *loader.used);
    if (!loader.used) status = ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of its tensors", espi_st_set_path(loader.set));
    if (status == ESP_OK) {
        model->weights = (espi_block){.purpose = ESPI_MEM_WEIGHTS, .bytes = dense + experts};
        status = espi_ctx_alloc(model->ctx, ESPI_MEM_WEIGHTS, dense + experts, &model->weights.p);
        if (status != ESP_OK) model->weights = (espi_block){0};
    }
    if (status == ESP_OK) {
        lay_out(model, model->weights.p, &dense, &experts, &loader.map);
        status = take_staging(&loader);
    }
    if (status == ESP_OK) status = load_all(&loader);
    espi_ctx_free(model->ctx, ESPI_MEM_STAGING, loader.staging, loader.staging_bytes);
    free(loader.used);
    espi_st_set_close(loader.set);
    return status;
}
