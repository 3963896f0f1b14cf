/* Loading: where every frozen weight lies in the model's one block, how many bytes that takes, and filling it from the folder.
 * The same walk counts (with no memory behind it) and places, so the plan is exact. */
#include "models/load.h"

#include "espalier/quant.h"
#include "kernels/backend.h"
#include "quant/quant.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#define RAW_MAX ((int64_t)8 << 20) /* of 64 MiB allowed: larger pieces read no faster and leave the cache */
#define RAW_MAX_TURNED ((int64_t)32 << 20)
#define RAW_MIN INT64_C(4096)
#define SLICE_MIN ((size_t)256 << 10)  /* of the staging buffer, for one thread */
#define SLICE_TURNED ((size_t)4 << 20) /* the same where rows are gathered: the more rows, the longer the reads */
#define READ_PIECE INT64_C(262144)     /* elements checked right after they were read */

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

/* Codes and scales, or plain values. */
static void place_raw(layout *l, espi_stack *s, bool double_quant) {
    const int64_t parts = s->experts * s->parts;
    s->data = place(l, (size_t)parts * s->part_bytes);
    if (s->format == ESP_Q_NONE) return;
    if (s->format == ESP_MXFP4) {
        s->scales = place(l, (size_t)(parts * s->part_blocks));
        return;
    }
    if (!double_quant) {
        s->absmax = place_floats(l, parts * s->part_blocks);
        return;
    }
    s->absmax8 = place(l, (size_t)(parts * s->part_blocks));
    s->nested = place_floats(l, parts * s->part_nested);
    s->offset = place_floats(l, parts);
}

/* Bytes of one expert in the form that the backend's expert ops want; 0: as it is. */
static size_t packed_bytes(const esp_ctx *ctx, const espi_stack *s) {
    const espi_backend *backend = ctx->backends[0];
    return backend->packed_bytes ? backend->packed_bytes(s) : 0;
}

static void place_stack(layout *l, espi_stack *s, const esp_model *m, const float *map, const float *lut) {
    const size_t packed = packed_bytes(m->ctx, s);
    s->lut = m->ctx->device ? lut : esp_quant_table(s->format);
    s->map = map;
    if (packed)
        s->packed = place(l, (size_t)s->experts * packed);
    else
        place_raw(l, s, m->options.double_quant);
}

/* Of the embedding, a pass reads a row for each token: on a device with little to spare it stays in the host's memory, from where the op reads
 * it.  Not where it is the head too. */
static size_t table_bytes(const esp_model *m) {
    const espi_mat *table = &m->embed;
    return m->ctx->device && !m->config.tied_head ? (size_t)(table->rows * table->cols) * esp_dtype_size(table->dtype) : 0;
}

/* The weights of one layer, one behind the other; its experts' bytes. */
static size_t lay_layer(layout *l, const esp_model *m, espi_layer *w, const float *map, const float *lut) {
    const espi_config *c = &m->config;
    const size_t begin = l->used;
    w->norm1 = place_floats(l, c->hidden);
    w->norm2 = place_floats(l, c->hidden);
    w->q_norm = c->qk_norm ? place_floats(l, espi_qk_norm_size(c, c->heads)) : NULL;
    w->k_norm = c->qk_norm ? place_floats(l, espi_qk_norm_size(c, c->kv_heads)) : NULL;
    place_linear(l, &w->q, c->attention_bias);
    place_linear(l, &w->k, c->attention_bias);
    place_linear(l, &w->v, c->attention_bias);
    place_linear(l, &w->o, c->output_bias);
    w->sinks = c->sinks ? place_floats(l, c->heads) : NULL;
    if (w->mlp == ESPI_MLP_DENSE) {
        place_linear(l, &w->mlp_gate_up, false);
        place_linear(l, &w->mlp_down, false);
        w->bytes = l->used - begin;
        return 0;
    }
    place_mat(l, &w->router);
    w->router_bias = c->router_bias ? place_floats(l, c->experts) : NULL;
    w->router_correction = c->router_correction ? place_floats(l, c->experts) : NULL;
    if (c->shared_width) {
        place_linear(l, &w->shared_gate_up, false);
        place_linear(l, &w->shared_down, false);
    }
    const size_t before = l->used;
    place_stack(l, &w->gate_up, m, map, lut);
    place_stack(l, &w->down, m, map, lut);
    w->gate_up_bias = c->expert_bias ? place_floats(l, w->gate_up.experts * w->gate_up.rows) : NULL;
    w->down_bias = c->expert_bias ? place_floats(l, w->down.experts * w->down.rows) : NULL;
    w->bytes = l->used - begin;
    return l->used - before;
}

/* Guests all stand in one place on the device; their homes are one behind the other.  Bytes of the place. */
static size_t lay_guests(layout *host, esp_model *m, unsigned char *place_of_guests, const float *map, const float *lut) {
    size_t most = 0;
    for (int64_t i = 0; i < m->config.layers; i++) {
        if (!espi_is_guest(m, i)) continue;
        layout l = {.base = place_of_guests};
        (void)lay_layer(&l, m, &m->layers[i], map, lut);
        m->layers[i].home = place(host, m->layers[i].bytes);
        if (l.used > most) most = l.used;
    }
    return most;
}

/* Gives every pointer of the skeleton its place.  bytes: what there is of each kind; map: the table of double quantisation, or NULL; lut:
 * that of the experts' values, where it must lie on a device. */
static void lay_out(esp_model *m, unsigned char *base, unsigned char *host_base, espi_weight_plan *bytes, float **map, float **lut) {
    const espi_config *c = &m->config;
    const bool device = m->ctx->device != NULL;
    layout l = {.base = base}, host = {.base = host_base};
    if (table_bytes(m)) place_mat(&host, &m->embed);
    const layout homes = host;
    m->guest_bytes = lay_guests(&host, m, NULL, NULL, NULL);
    m->guest_place = place(&l, m->guest_bytes);
    bytes->experts = m->guest_bytes;
    bytes->host = host.used;
    *map = m->options.double_quant ? place(&l, 256 * sizeof(float)) : NULL;
    *lut = device && m->options.experts != ESP_Q_NONE ? place(&l, 16 * sizeof(float)) : NULL;
    host = homes;
    (void)lay_guests(&host, m, m->guest_place, *map, *lut);
    if (!table_bytes(m)) place_mat(&l, &m->embed);
    if (c->tied_head)
        m->head = m->embed;
    else
        place_mat(&l, &m->head);
    m->final_norm = place_floats(&l, c->hidden);
    for (int64_t i = 0; i < c->layers; i++)
        if (!espi_is_guest(m, i)) bytes->experts += lay_layer(&l, m, &m->layers[i], *map, *lut);
    bytes->dense = l.used - bytes->experts;
}

static int64_t larger(int64_t a, int64_t b) {
    return a > b ? a : b;
}

static int64_t mat_values(const espi_mat *m) {
    return m->rows * m->cols;
}

static int64_t part_values(const espi_stack *s) {
    return s->experts ? s->rows / s->parts * s->cols : 0;
}

static size_t larger_size(size_t a, size_t b) {
    return a > b ? a : b;
}

/* One expert of the stack as it is, over `base`. */
static espi_stack one_over(const espi_stack *s, unsigned char *base, bool double_quant, size_t *bytes) {
    espi_stack one = *s;
    layout l = {.base = base};
    one.experts = 1;
    one.packed = NULL;
    place_raw(&l, &one, double_quant);
    if (bytes) *bytes = l.used;
    return one;
}

/* The parts of the staging buffer. */
typedef struct staging {
    size_t raw, absmax, one; /* bytes */
} staging;

static espi_extent staging_extent(const staging *parts, const esp_ctx *ctx) {
    const size_t all = parts->raw + parts->absmax + parts->one;
    return (espi_extent){.main = all, .host = ctx->device ? all : 0};
}

/* One buffer: room for the largest piece that is ever on its way, and, under double quantisation, for one matrix's scales.  Columns that
 * become rows are there twice, as read and turned.  On a device, or where experts are packed, also for one expert; on a device all of it there
 * too. */
static staging plan_staging(const esp_model *m) {
    const bool double_quant = m->options.double_quant;
    int64_t values = mat_values(&m->embed), blocks = 0;
    staging parts = {0};
    const int64_t copies = m->config.family->fused_order == ESPI_FUSED_OUT_IN ? 1 : 2;
    for (int64_t i = 0; i < m->config.layers; i++) {
        const espi_layer *w = &m->layers[i];
        values = larger(values, larger(mat_values(&w->q.w), mat_values(&w->k.w)));
        values = larger(values, larger(mat_values(&w->mlp_gate_up.w), mat_values(&w->router)));
        values = larger(values, mat_values(&w->shared_gate_up.w));
        values = larger(values, copies * larger(part_values(&w->gate_up), part_values(&w->down)));
        blocks = larger(blocks, larger(w->gate_up.part_blocks, w->down.part_blocks));
        size_t gate_up, down;
        (void)one_over(&w->gate_up, NULL, double_quant, &gate_up);
        (void)one_over(&w->down, NULL, double_quant, &down);
        if (m->ctx->device || packed_bytes(m->ctx, &w->gate_up)) parts.one = larger_size(parts.one, gate_up);
        if (m->ctx->device || packed_bytes(m->ctx, &w->down)) parts.one = larger_size(parts.one, down);
    }
    const int64_t raw = larger(values * (int64_t)sizeof(float), RAW_MIN), most = copies == 1 ? RAW_MAX : RAW_MAX_TURNED;
    parts.raw = (size_t)(raw < most ? (raw + 255) / 256 * 256 : most);
    parts.absmax = double_quant ? ESPI_ALIGNED((size_t)blocks * sizeof(float)) : 0;
    return parts;
}

esp_status espi_weight_plan_make(espi_weight_plan *out, esp_ctx *ctx, const espi_config *config, const esp_model_config *options,
                                 const espi_lora_spec lora[ESPI_T_COUNT]) {
    esp_model m = {.ctx = ctx, .config = *config, .options = *options};
    memcpy(m.lora, lora, sizeof m.lora);
    ESPI_TRY(espi_model_skeleton(&m));
    float *map, *lut;
    lay_out(&m, NULL, NULL, out, &map, &lut);
    espi_adapter_bytes(&out->adapter, &out->gradients, &m, ctx->real_size);
    const staging parts = plan_staging(&m);
    out->staging = staging_extent(&parts, ctx).main;
    espi_model_skeleton_free(&m);
    return ESP_OK;
}

/* ---- reading values ---- */

/* Under its own name, or as some versions of the family's code write it. */
static const espi_st_tensor *look_up(const espi_loader *loader, const char *name) {
    const espi_family *f = loader->model->config.family;
    const espi_st_tensor *t = espi_st_set_find(loader->set, name);
    const char *from = t || !f->renamed_from ? NULL : strstr(name, f->renamed_from);
    if (!from) return t;
    char other[2 * ESPI_TENSOR_NAME];
    snprintf(other, sizeof other, "%.*s%s%s", (int)(from - name), name, f->renamed_to, from + strlen(f->renamed_from));
    return espi_st_set_find(loader->set, other);
}

const espi_st_tensor *espi_loader_find(espi_loader *loader, const char *name) {
    const espi_st_tensor *t = look_up(loader, name);
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

/* Without its sign, a value that is not finite is at least the pattern with an exponent of all ones: the largest tells.  No early exit: the
 * loop is then wide. */
static int64_t first_nonfinite(const void *x, esp_dtype dtype, int64_t n) {
    int64_t i = 0;
    if (dtype == ESP_F32) {
        const uint32_t *bits = x;
        int32_t most = 0;
        for (i = 0; i < n; i++) most = (int32_t)(bits[i] & 0x7fffffffu) > most ? (int32_t)(bits[i] & 0x7fffffffu) : most;
        if (most < 0x7f800000) return -1;
        for (i = 0; (bits[i] & 0x7f800000u) != 0x7f800000u;) i++;
        return i;
    }
    const uint16_t *bits = x;
    const int16_t mask = dtype == ESP_BF16 ? 0x7f80 : 0x7c00;
    int16_t most = 0;
    for (i = 0; i < n; i++) most = (int16_t)(bits[i] & 0x7fff) > most ? (int16_t)(bits[i] & 0x7fff) : most;
    if (most < mask) return -1;
    for (i = 0; (bits[i] & mask) != mask;) i++;
    return i;
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

static void convert(void *out, esp_dtype held, const void *values, esp_dtype dtype, int64_t n) {
    for (int64_t i = 0; i < n; i++) espi_plain_store(out, held, i, espi_plain_value(values, dtype, i));
}

esp_status espi_loader_store(espi_loader *loader, void *out, esp_dtype held, const void *values, esp_dtype dtype, int64_t n, void *room) {
    const bool device = loader->model->ctx->device != NULL;
    if (held != dtype) {
        convert(device ? room : out, held, values, dtype, n);
        values = device ? room : out;
    }
    return espi_ctx_put(loader->model->ctx, out, values, (size_t)n * esp_dtype_size(held));
}

/* Elements first .. first+n-1 into `out`, host memory which holds `held`: as they are, or converted. */
static esp_status read_plain(espi_loader *loader, const espi_st_tensor *t, void *out, esp_dtype held, int64_t first, int64_t n) {
    if (t->dtype == held) return espi_loader_read(t, out, first, n);
    const int64_t most = (int64_t)(loader->raw_bytes / esp_dtype_size(t->dtype));
    for (int64_t done = 0; done < n;) {
        const int64_t m = n - done < most ? n - done : most;
        ESPI_TRY(espi_loader_read(t, loader->raw, first + done, m));
        convert((unsigned char *)out + (size_t)done * esp_dtype_size(held), held, loader->raw, t->dtype, m);
        done += m;
    }
    return ESP_OK;
}

/* The same to `out` on a device. */
static esp_status send_plain(espi_loader *loader, const espi_st_tensor *t, void *out, esp_dtype held, int64_t first, int64_t n) {
    const size_t size = esp_dtype_size(t->dtype), held_size = esp_dtype_size(held);
    const int64_t most = (int64_t)(loader->raw_bytes / (size + held_size)) / 64 * 64;
    for (int64_t done = 0; done < n;) {
        const int64_t m = n - done < most ? n - done : most;
        ESPI_TRY(espi_loader_read(t, loader->raw, first + done, m));
        ESPI_TRY(espi_loader_store(loader, (unsigned char *)out + (size_t)done * held_size, held, loader->raw, t->dtype, m,
                                   loader->raw + (size_t)most * size));
        done += m;
    }
    return ESP_OK;
}

static esp_status take_values(espi_loader *loader, const espi_st_tensor *t, const void *out, esp_dtype held, int64_t first, int64_t n) {
    return loader->model->ctx->device ? send_plain(loader, t, (void *)out, held, first, n)
                                      : read_plain(loader, t, (void *)out, held, first, n);
}

/* A tensor that can be held exactly in `stated`, to where `held` is held. */
static esp_status load_values(espi_loader *loader, const void *out, esp_dtype held, const char *name, esp_dtype stated, int rank,
                              const int64_t *dims) {
    const espi_st_tensor *t;
    ESPI_TRY(need_plain(loader, &t, name, stated, rank, dims));
    return take_values(loader, t, out, held, 0, rank == 1 ? dims[0] : dims[0] * dims[1]);
}

/* ---- dense parts ---- */

/* format: a family's name with %d for the layer. */
static void layer_name(char out[ESPI_TENSOR_NAME], const char *format, int64_t layer, const char *suffix) {
    snprintf(out, ESPI_TENSOR_NAME, format, (int)layer);
    const size_t n = strlen(out);
    snprintf(out + n, ESPI_TENSOR_NAME - n, "%s", suffix);
}

static void expert_name(char out[ESPI_TENSOR_NAME], const char *format, int64_t layer, int64_t expert, const char *suffix) {
    snprintf(out, ESPI_TENSOR_NAME, format, (int)layer, (int)expert);
    const size_t n = strlen(out);
    snprintf(out + n, ESPI_TENSOR_NAME - n, "%s", suffix);
}

static esp_status load_vector(espi_loader *loader, const float *out, const char *format, int64_t layer, const char *suffix, int64_t n) {
    char name[ESPI_TENSOR_NAME];
    layer_name(name, format, layer, suffix);
    return load_values(loader, out, ESP_F32, name, ESP_F32, 1, &n);
}

static esp_status load_matrix(espi_loader *loader, const espi_mat *to, const char *format, int64_t layer) {
    char name[ESPI_TENSOR_NAME];
    layer_name(name, format, layer, ".weight");
    if (espi_bnb_present(loader, name)) return espi_bnb_load_dense(loader, to, name);
    return load_values(loader, to->data, to->dtype, name, ESP_F32, 2, (int64_t[]){to->rows, to->cols});
}

static esp_status load_linear(espi_loader *loader, const espi_linear *linear, const char *format, int64_t layer) {
    ESPI_TRY(load_matrix(loader, &linear->w, format, layer));
    return linear->bias ? load_vector(loader, linear->bias, format, layer, ".bias", linear->w.rows) : ESP_OK;
}

static esp_status load_attention(espi_loader *loader, const espi_layer *w, int64_t layer) {
    const espi_config *c = &loader->model->config;
    const espi_family *f = c->family;
    ESPI_TRY(load_vector(loader, w->norm1, f->norm1, layer, ".weight", c->hidden));
    ESPI_TRY(load_vector(loader, w->norm2, f->norm2, layer, ".weight", c->hidden));
    if (c->qk_norm) {
        ESPI_TRY(load_vector(loader, w->q_norm, f->q_norm, layer, ".weight", espi_qk_norm_size(c, c->heads)));
        ESPI_TRY(load_vector(loader, w->k_norm, f->k_norm, layer, ".weight", espi_qk_norm_size(c, c->kv_heads)));
    }
    if (c->sinks) ESPI_TRY(load_vector(loader, w->sinks, f->sinks, layer, "", c->heads));
    ESPI_TRY(load_linear(loader, &w->q, f->q, layer));
    ESPI_TRY(load_linear(loader, &w->k, f->k, layer));
    ESPI_TRY(load_linear(loader, &w->v, f->v, layer));
    return load_linear(loader, &w->o, f->o, layer);
}

/* The MLP of a dense layer, or a shared expert: gate rows, then up rows. */
static esp_status load_mlp(espi_loader *loader, const espi_linear *gate_up, const espi_linear *down, const char *const names[3],
                           int64_t layer) {
    espi_mat half = gate_up->w;
    half.rows /= 2;
    ESPI_TRY(load_matrix(loader, &half, names[0], layer));
    half.data = (const unsigned char *)half.data + (size_t)mat_values(&half) * esp_dtype_size(half.dtype);
    ESPI_TRY(load_matrix(loader, &half, names[1], layer));
    return load_linear(loader, down, names[2], layer);
}

/* ---- experts ---- */

esp_status espi_loader_set_map(espi_loader *loader, bool *same, const float *values) {
    *same = !loader->map_used ||
            memcmp(loader->map_values, values, sizeof loader->map_values) == 0; /* NOLINT(*-memory-comparison): every bit counts */
    if (loader->map_used) return ESP_OK;
    memcpy(loader->map_values, values, sizeof loader->map_values);
    loader->map_used = true;
    return espi_ctx_put(loader->model->ctx, loader->map, values, sizeof loader->map_values);
}

esp_status espi_loader_shrink_absmax(espi_loader *loader, const espi_stack *s, int64_t part) {
    bool same;
    ESPI_TRY(espi_loader_set_map(loader, &same, esp_dynamic_map(1)));
    if (!same)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: some experts bring a nested_quant_map of their own and others none, expected one for all",
                         espi_st_set_path(loader->set));
    return esp_absmax_quantize((uint8_t *)s->absmax8 + part * s->part_blocks, (float *)s->nested + part * s->part_nested,
                               (float *)s->offset + part, loader->absmax, s->part_blocks);
}

/* How the values of one matrix go through the staging buffer: every thread has a slice of it, and takes pieces of whole blocks; of whole
 * rows where rows must be gathered from columns, which are then there twice. */
typedef struct way {
    int threads;
    size_t slice;
    int64_t piece;
} way;

static esp_status find_way(way *w, const espi_loader *loader, const espi_stack *s, const espi_source *from) {
    const bool turned = from->columns != 0;
    const size_t most = loader->raw_bytes / (turned ? SLICE_TURNED : SLICE_MIN);
    const int64_t n = part_values(s);
    w->threads = loader->model->ctx->threads;
    if (most < (size_t)w->threads) w->threads = most ? (int)most : 1;
    w->slice = loader->raw_bytes / (size_t)w->threads / 256 * 256;
    const int64_t fits = (int64_t)(w->slice / esp_dtype_size(from->t->dtype)) / (turned ? 2 : 1);
    int64_t together = ESPI_QBLOCK;
    while (turned && together % s->cols != 0) together += ESPI_QBLOCK;
    const int64_t wanted = turned ? (n + w->threads - 1) / w->threads : READ_PIECE;
    w->piece = (wanted + together - 1) / together * together;
    if (w->piece > fits) w->piece = fits / together * together;
    if (w->piece > n || (w->piece == 0 && n <= fits)) w->piece = n;
    if (w->piece > 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: tensor %s: %lld values do not fit the buffer of %zu bytes, expected shorter rows",
                     espi_st_path(from->t->file), from->t->name, (long long)together, w->slice);
}

/* rows x cols values, row after row, from the same column after column; in tiles that stay in the nearest cache. */
enum { TILE = 64 };
#define TURN(name, type)                                                                                                                   \
    static void name(type *restrict out, const type *restrict in, int64_t rows, int64_t cols) {                                            \
        type tile[TILE][TILE];                                                                                                             \
        for (int64_t r0 = 0; r0 < rows; r0 += TILE)                                                                                        \
            for (int64_t c0 = 0; c0 < cols; c0 += TILE) {                                                                                  \
                const int64_t height = rows - r0 < TILE ? rows - r0 : TILE, width = cols - c0 < TILE ? cols - c0 : TILE;                   \
                for (int64_t c = 0; c < width; c++)                                                                                        \
                    for (int64_t r = 0; r < height; r++) tile[r][c] = in[(c0 + c) * rows + r0 + r];                                        \
                for (int64_t r = 0; r < height; r++) memcpy(out + (r0 + r) * cols + c0, tile[r], (size_t)width * sizeof(type));            \
            }                                                                                                                              \
    }
TURN(turn16, uint16_t)
TURN(turn32, uint32_t)

/* Elements as they are stored, looked at or not. */
static esp_status read_elements(const espi_st_tensor *t, void *out, int64_t first, int64_t n, bool look) {
    const size_t size = esp_dtype_size(t->dtype);
    return look ? espi_loader_read(t, out, first, n) : espi_st_read(t, out, (uint64_t)first * size, (size_t)n * size);
}

/* Elements first .. first+n-1 of the matrix, row after row, as they are stored.  raw: a slice of the staging buffer. */
static esp_status fetch(const void **values, unsigned char *raw, size_t raw_bytes, const espi_stack *s, const espi_source *from,
                        int64_t first, int64_t n, bool look) {
    *values = raw;
    if (!from->columns) return read_elements(from->t, raw, from->first + first, n, look);
    const int64_t rows = n / s->cols, row = first / s->cols;
    const size_t size = esp_dtype_size(from->t->dtype);
    for (int64_t c = 0; c < s->cols; c++)
        ESPI_TRY(read_elements(from->t, raw + (size_t)(c * rows) * size, from->first + c * from->columns + row, rows, look));
    void *turned = raw + raw_bytes / 2, *columns = raw;
    if (size == sizeof(uint16_t))
        turn16(turned, columns, rows, s->cols);
    else
        turn32(turned, columns, rows, s->cols);
    *values = turned;
    return ESP_OK;
}

/* n values, `first` elements into matrix `part`, in the stack's form. */
static esp_status put(espi_loader *loader, const espi_stack *s, int64_t part, const void *values, esp_dtype dtype, int64_t first,
                      int64_t n) {
    unsigned char *data = (unsigned char *)s->data + (size_t)part * s->part_bytes;
    if (s->format == ESP_Q_NONE) {
        unsigned char *out = data + (size_t)first * esp_dtype_size(s->dtype);
        if (dtype == s->dtype)
            memcpy(out, values, (size_t)n * esp_dtype_size(dtype));
        else
            convert(out, s->dtype, values, dtype, n);
        return ESP_OK;
    }
    if (s->format == ESP_MXFP4)
        return esp_mxfp4_quantize(data + first / 2, (uint8_t *)s->scales + part * s->part_blocks + first / ESPI_MXBLOCK, values, dtype, n,
                                  loader->model->options.mxfp4_rule);
    float *absmax = s->absmax8 ? loader->absmax : (float *)s->absmax + part * s->part_blocks;
    return esp_quantize(data + first / 2, absmax + first / ESPI_QBLOCK, values, dtype, n, ESPI_QBLOCK, s->format);
}

static esp_status take_piece(espi_loader *loader, unsigned char *raw, const way *w, const espi_stack *s, int64_t part,
                             const espi_source *from, int64_t i, bool look) {
    const int64_t n = part_values(s), first = i * w->piece, count = n - first < w->piece ? n - first : w->piece;
    const void *values;
    ESPI_TRY(fetch(&values, raw, w->slice, s, from, first, count, look));
    return put(loader, s, part, values, from->t->dtype, first, count);
}

/* Matrices `part` .. of the stack.  All come from tensors of one dtype and order: one parallel region serves a whole stack. */
static esp_status take_parts(espi_loader *loader, const espi_stack *s, int64_t part, const espi_source *from, int64_t parts) {
    const int64_t n = part_values(s);
    way w;
    ESPI_TRY(find_way(&w, loader, s, from));
    const int64_t per_part = (n + w.piece - 1) / w.piece, pieces = parts * per_part;
    int64_t failed = pieces;
#pragma omp parallel for schedule(dynamic, 1) num_threads(w.threads) if (w.threads > 1 && pieces > 1) reduction(min : failed)
    for (int64_t i = 0; i < pieces; i++) {
        const int64_t p = i / per_part;
        unsigned char *raw = loader->raw + (size_t)omp_get_thread_num() * w.slice;
        const bool look = s->format == ESP_Q_NONE;
        if (take_piece(loader, raw, &w, s, part + p, &from[p], i % per_part, look) != ESP_OK && i < failed) failed = i;
    }
    /* A sentence stays with the thread that said it, and a quantiser that meets a NaN does not know the tensor: from the first piece that
     * failed on, this thread tries for itself and looks. */
    for (int64_t i = failed; i < pieces; i++)
        ESPI_TRY(take_piece(loader, loader->raw, &w, s, part + i / per_part, &from[i / per_part], i % per_part, true));
    return ESP_OK;
}

esp_status espi_loader_take(espi_loader *loader, const espi_stack *s, int64_t part, const espi_source *from) {
    if (s->format == ESP_Q_NONE && !from->columns)
        return read_plain(loader, from->t, (unsigned char *)s->data + (size_t)part * s->part_bytes, s->dtype, from->first, part_values(s));
    ESPI_TRY(take_parts(loader, s, part, from, 1));
    return s->absmax8 ? espi_loader_shrink_absmax(loader, s, part) : ESP_OK;
}

/* ---- experts on their way to a device, or to be packed ---- */

/* Experts go one by one through loader->one. */
static bool goes_apart(const espi_loader *loader, const espi_stack *s) {
    return loader->d_one || s->packed;
}

/* Expert e where it is: the stack is not packed. */
static espi_stack expert_view(const espi_stack *s, int64_t e) {
    espi_stack one = *s;
    const int64_t part = e * s->parts;
    one.experts = 1;
    if (s->data) one.data = (const unsigned char *)s->data + (size_t)part * s->part_bytes;
    if (s->absmax) one.absmax = s->absmax + part * s->part_blocks;
    if (s->scales) one.scales = s->scales + part * s->part_blocks;
    if (!s->absmax8) return one;
    one.absmax8 = s->absmax8 + part * s->part_blocks;
    one.nested = s->nested + part * s->part_nested;
    one.offset = s->offset + part;
    return one;
}

/* The same on a device: where it is, or where it waits to be packed. */
static espi_stack expert_target(const espi_loader *loader, const espi_stack *s, int64_t e) {
    return s->packed ? one_over(s, loader->d_one, loader->model->options.double_quant, NULL) : expert_view(s, e);
}

espi_stack espi_loader_expert(const espi_loader *loader, const espi_stack *s, int64_t e) {
    return goes_apart(loader, s) ? one_over(s, loader->one, loader->model->options.double_quant, NULL) : expert_view(s, e);
}

static esp_status pack(espi_loader *loader, const espi_stack *s, int64_t e, const espi_stack *one) {
    if (!s->packed) return ESP_OK;
    esp_ctx *ctx = loader->model->ctx;
    const espi_exec exec = {.device = ctx->device, .threads = ctx->threads};
    return ctx->backends[0]->pack(&exec, (unsigned char *)s->packed + (size_t)e * packed_bytes(ctx, s), one);
}

static esp_status send_scales8(espi_loader *loader, const espi_stack *to, const espi_stack *from) {
    esp_ctx *ctx = loader->model->ctx;
    const size_t parts = (size_t)to->parts;
    ESPI_TRY(espi_ctx_put(ctx, (void *)to->absmax8, from->absmax8, parts * (size_t)to->part_blocks));
    ESPI_TRY(espi_ctx_put(ctx, (void *)to->nested, from->nested, parts * (size_t)to->part_nested * sizeof(float)));
    return espi_ctx_put(ctx, (void *)to->offset, from->offset, parts * sizeof(float));
}

esp_status espi_loader_expert_done(espi_loader *loader, const espi_stack *s, int64_t e, const espi_stack *one) {
    if (!loader->d_one) return pack(loader, s, e, one);
    esp_ctx *ctx = loader->model->ctx;
    const espi_stack to = expert_target(loader, s, e);
    const size_t blocks = (size_t)(to.parts * to.part_blocks);
    ESPI_TRY(espi_ctx_put(ctx, (void *)to.data, one->data, (size_t)to.parts * to.part_bytes));
    if (to.scales) ESPI_TRY(espi_ctx_put(ctx, (void *)to.scales, one->scales, blocks));
    if (to.absmax) ESPI_TRY(espi_ctx_put(ctx, (void *)to.absmax, one->absmax, blocks * sizeof(float)));
    if (to.absmax8) ESPI_TRY(send_scales8(loader, &to, one));
    return pack(loader, s, e, &to);
}

/* n values that lie in loader->raw at `values`, `first` elements into matrix `part`, quantised on the device. */
static esp_status encode(espi_loader *loader, const espi_stack *to, int64_t part, const void *values, esp_dtype dtype, int64_t first,
                         int64_t n) {
    esp_ctx *ctx = loader->model->ctx;
    const espi_exec exec = {.device = ctx->device, .threads = ctx->threads};
    void *there = loader->d_raw + ((const unsigned char *)values - loader->raw);
    espi_quantise args = {
        .codes = (uint8_t *)to->data + (size_t)part * to->part_bytes + first / 2, .x = there, .dtype = dtype, .n = n, .format = to->format};
    if (to->format == ESP_MXFP4) {
        const espi_mx_rule *rule = &espi_mx_rules[loader->model->options.mxfp4_rule];
        args.scales = (uint8_t *)to->scales + part * to->part_blocks + first / ESPI_MXBLOCK;
        args.round_up = rule->round_up;
        memcpy(args.thresholds, rule->thresholds, sizeof rule->thresholds);
    } else {
        const espi_format *f = espi_format_find(to->format);
        args.absmax = (to->absmax8 ? loader->d_absmax : (float *)to->absmax + part * to->part_blocks) + first / ESPI_QBLOCK;
        memcpy(args.thresholds, f->thresholds, sizeof f->thresholds);
        memcpy(args.code_of_rank, f->code_of_rank, sizeof f->code_of_rank);
    }
    ESPI_TRY(espi_ctx_put(ctx, there, values, (size_t)n * esp_dtype_size(dtype)));
    return ctx->backends[0]->quantise(&exec, &args);
}

/* One matrix: as many pieces as there are threads are read at a time, then go to the device one after the other. */
static esp_status encode_part(espi_loader *loader, const espi_stack *to, int64_t part, const espi_source *from) {
    const int64_t n = part_values(to);
    way w;
    ESPI_TRY(find_way(&w, loader, to, from));
    for (int64_t first = 0; first < n; first += w.piece * w.threads) {
        const int64_t left = (n - first + w.piece - 1) / w.piece, pieces = left < w.threads ? left : w.threads;
        int64_t failed = pieces;
#pragma omp parallel for schedule(static, 1) num_threads(w.threads) if (pieces > 1) reduction(min : failed)
        for (int64_t i = 0; i < pieces; i++) {
            const int64_t at = first + i * w.piece, count = n - at < w.piece ? n - at : w.piece;
            const void *values;
            if (fetch(&values, loader->raw + (size_t)i * w.slice, w.slice, to, from, at, count, true) != ESP_OK && i < failed) failed = i;
        }
        for (int64_t i = 0; i < pieces; i++) {
            const int64_t at = first + i * w.piece, count = n - at < w.piece ? n - at : w.piece;
            const void *values = loader->raw + (size_t)i * w.slice + (from->columns ? w.slice / 2 : 0);
            /* The sentence stayed with the thread that said it: this one tries for itself. */
            if (i >= failed) ESPI_TRY(fetch(&values, loader->raw, w.slice, to, from, at, count, true));
            ESPI_TRY(encode(loader, to, part, values, from->t->dtype, at, count));
        }
    }
    return ESP_OK;
}

static esp_status encode_expert(espi_loader *loader, const espi_stack *s, int64_t e, const espi_source *from) {
    const espi_stack to = expert_target(loader, s, e), one = espi_loader_expert(loader, s, e);
    for (int64_t p = 0; p < s->parts; p++) {
        ESPI_TRY(encode_part(loader, &to, p, &from[p]));
        if (!to.absmax8) continue;
        ESPI_TRY(espi_ctx_get(loader->model->ctx, loader->absmax, loader->d_absmax, (size_t)s->part_blocks * sizeof(float)));
        ESPI_TRY(espi_loader_shrink_absmax(loader, &one, p));
    }
    if (to.absmax8) ESPI_TRY(send_scales8(loader, &to, &one));
    return pack(loader, s, e, &to);
}

/* ---- where a layer's experts lie ---- */

/* What the tensors of a stack may be stored in: anything plain when it is quantised, else what config.json says. */
static esp_dtype held_dtype(const espi_loader *loader, const espi_stack *s) {
    return s->format == ESP_Q_NONE ? loader->model->config.stored_dtype : ESP_F32;
}

void espi_expert_matrix_name(char out[ESPI_TENSOR_NAME], const espi_family *f, espi_expert_layout layout, int64_t layer, bool down,
                             int64_t part) {
    if (layout == ESPI_EXPERTS_PER_EXPERT)
        expert_name(out, down ? f->expert_down : part % 2 ? f->expert_up : f->expert_gate, layer, down ? part : part / 2, ".weight");
    else if (layout == ESPI_EXPERTS_JOINED)
        expert_name(out, down ? f->joined_down : f->expert_gate_up, layer, part, ".weight");
    else
        layer_name(out, down ? f->fused_down : f->fused_gate_up, layer, layout == ESPI_EXPERTS_BLOCKS ? "_blocks" : "");
}

/* Fused: all values of the stack in one tensor, row after row, or, turned, [E,in,out]. */
static esp_status plain_source(espi_source *from, espi_loader *loader, const espi_stack *s, espi_expert_layout layout, bool turned,
                               const char *name, int64_t part) {
    const int64_t part_rows = s->rows / s->parts;
    *from = (espi_source){0};
    if (layout != ESPI_EXPERTS_FUSED) return need_plain(loader, &from->t, name, held_dtype(loader, s), 2, (int64_t[]){part_rows, s->cols});
    const int64_t dims[] = {loader->model->config.experts, turned ? s->cols : s->rows, turned ? s->rows : s->cols};
    const int64_t expert = part / s->parts, row = part % s->parts * part_rows;
    from->columns = turned ? s->rows : 0;
    from->first = expert * s->rows * s->cols + (turned ? row : row * s->cols);
    return need_plain(loader, &from->t, name, held_dtype(loader, s), 3, dims);
}

/* A stack of which some is quantised by bitsandbytes, or plain, or a mixture.  Files count experts from the model's first, stacks from this
 * rank's first. */
typedef struct stored_stack {
    const espi_stack *s;
    int64_t first;     /* part of the files that is the stack's part 0 */
    espi_source *from; /* [experts*parts] of plain values; no tensor: quantised already */
    espi_expert_layout layout;
    int64_t layer;
    bool down;
} stored_stack;

static void matrix_name(char name[ESPI_TENSOR_NAME], const espi_loader *loader, const stored_stack *k, int64_t part) {
    espi_expert_matrix_name(name, loader->model->config.family, k->layout, k->layer, k->down, k->first + part);
}

/* Where the values of the stack's matrices lie.  Those of other ranks are looked for too: a folder that lacks some is no model. */
static esp_status find_parts(espi_loader *loader, const stored_stack *k, bool turned) {
    for (int64_t part = -k->first; part < loader->model->config.experts * k->s->parts - k->first; part++) {
        char name[ESPI_TENSOR_NAME];
        const bool own = part >= 0 && part < k->s->experts * k->s->parts;
        espi_source other, *from = own ? &k->from[part] : &other;
        matrix_name(name, loader, k, part);
        if (!espi_bnb_present(loader, name))
            ESPI_TRY(plain_source(from, loader, k->s, k->layout, turned, name, k->first + part));
        else if (!own && k->layout != ESPI_EXPERTS_FUSED)
            ESPI_TRY(espi_bnb_expect_part(loader, k->s, name));
    }
    return ESP_OK;
}

static esp_status load_expert(espi_loader *loader, const stored_stack *k, int64_t e) {
    const espi_stack *s = k->s;
    const espi_source *from = k->from + e * s->parts;
    bool plain = true;
    for (int64_t p = 0; p < s->parts; p++) plain &= from[p].t != NULL;
    if (loader->d_one && plain && s->format != ESP_Q_NONE) return encode_expert(loader, s, e, from);
    const espi_stack one = espi_loader_expert(loader, s, e);
    for (int64_t p = 0; p < s->parts; p++) {
        char name[ESPI_TENSOR_NAME];
        matrix_name(name, loader, k, e * s->parts + p);
        ESPI_TRY(from[p].t ? espi_loader_take(loader, &one, p, &from[p]) : espi_bnb_load_part(loader, &one, p, name));
    }
    return espi_loader_expert_done(loader, s, e, &one);
}

static esp_status load_all_experts(espi_loader *loader, const stored_stack *k) {
    const espi_stack *s = k->s;
    const int64_t parts = s->experts * s->parts;
    char name[ESPI_TENSOR_NAME];
    matrix_name(name, loader, k, 0);
    if (k->layout == ESPI_EXPERTS_FUSED && espi_bnb_present(loader, name)) return espi_bnb_load_fused(loader, s, name);
    if (parts < 1) return ESP_OK;
    bool alike =
        !goes_apart(loader, s) && s->format != ESP_Q_NONE && !s->absmax8; /* the 8-bit scales of a matrix are made once it is complete */
    for (int64_t i = 0; i < parts; i++) alike &= k->from[i].t && k->from[0].t && k->from[i].t->dtype == k->from[0].t->dtype;
    if (alike) return take_parts(loader, s, 0, k->from, parts);
    for (int64_t e = 0; e < s->experts; e++) ESPI_TRY(load_expert(loader, k, e));
    return ESP_OK;
}

static esp_status load_stack(espi_loader *loader, const espi_stack *s, espi_expert_layout layout, bool turned, int64_t layer, bool down) {
    const int64_t parts = s->experts * s->parts;
    stored_stack k = {.s = s,
                      .layout = layout,
                      .layer = layer,
                      .down = down,
                      .first = loader->model->share.first * s->parts,
                      .from = calloc((size_t)parts + 1, sizeof(espi_source))};
    if (!k.from) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a list of %lld matrices", (long long)parts);
    esp_status status = find_parts(loader, &k, turned);
    if (status == ESP_OK) status = load_all_experts(loader, &k);
    free(k.from);
    return status;
}

/* MXFP4 as it lies in the file: the bytes of the stack. */
static esp_status load_blocks(espi_loader *loader, const espi_stack *s, const char *format, int64_t layer) {
    char name[ESPI_TENSOR_NAME];
    const espi_st_tensor *blocks, *scales;
    const espi_share *share = &loader->model->share;
    const int64_t groups = s->cols / ESPI_MXBLOCK, dims[] = {share->experts, s->rows, groups, ESPI_MXBLOCK / 2};
    layer_name(name, format, layer, "_blocks");
    if (s->format != ESP_MXFP4)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: tensor %s: stored as MXFP4, expected plain values to make other 4 bits of: load it with experts = MXFP4, or "
                         "take the 16-bit checkpoint",
                         espi_st_set_path(loader->set), name);
    ESPI_TRY(espi_loader_need(loader, &blocks, name, ESP_U8, 4, dims));
    layer_name(name, format, layer, "_scales");
    ESPI_TRY(espi_loader_need(loader, &scales, name, ESP_U8, 3, dims));
    const size_t n = (size_t)(s->parts * s->part_blocks), codes = (size_t)s->parts * s->part_bytes;
    for (int64_t e = 0; e < s->experts; e++) {
        const espi_stack one = espi_loader_expert(loader, s, e);
        uint8_t *powers = (uint8_t *)one.scales;
        const uint64_t at = (uint64_t)(share->first + e);
        ESPI_TRY(espi_st_read(blocks, (void *)one.data, at * codes, codes));
        ESPI_TRY(espi_st_read(scales, powers, at * n, n));
        const uint8_t *bad = memchr(powers, 255, n); /* NOLINT(clang-analyzer-core.NonNullParamChecker): MXFP4 has scales */
        if (bad)
            return ESPI_FAIL(ESP_ERR_NONFINITE, "%s: tensor %s: element %lld is 255, which is NaN, expected 0 to 254",
                             espi_st_path(scales->file), name, (long long)(at * n) + (long long)(bad - powers));
        ESPI_TRY(espi_loader_expert_done(loader, s, e, &one));
    }
    return ESP_OK;
}

static bool has(const espi_loader *loader, const char *format, int64_t layer, int64_t expert, const char *suffix,
                char name[ESPI_TENSOR_NAME]) {
    if (!format) return false;
    expert_name(name, format, layer, expert, suffix); /* an expert's number too many does no harm */
    return look_up(loader, name);
}

/* The layout is what the names say. */
static esp_status find_layout(espi_expert_layout *out, const espi_loader *loader, int64_t layer) {
    const espi_family *f = loader->model->config.family;
    const struct {
        espi_expert_layout layout;
        const char *format, *suffix;
    } signs[] = {{ESPI_EXPERTS_PER_EXPERT, f->expert_gate, ".weight"}, {ESPI_EXPERTS_JOINED, f->expert_gate_up, ".weight"},
                 {ESPI_EXPERTS_BLOCKS, f->fused_gate_up, "_blocks"},   {ESPI_EXPERTS_BLOCKS, f->fused_down, "_blocks"},
                 {ESPI_EXPERTS_FUSED, f->fused_gate_up, ""},           {ESPI_EXPERTS_FUSED, f->fused_down, ""}};
    char found[ESPI_TENSOR_NAME], name[ESPI_TENSOR_NAME], looked_for[4 * ESPI_TENSOR_NAME] = "";
    *out = ESPI_EXPERTS_LAYOUTS;
    for (int i = 0; i < ESPI_COUNT(signs); i++) {
        if (!signs[i].format) continue;
        if (has(loader, signs[i].format, layer, 0, signs[i].suffix, name)) {
            if (*out != ESPI_EXPERTS_LAYOUTS && *out != signs[i].layout)
                return ESPI_FAIL(ESP_ERR_FORMAT, "%s: has both %s and %s, expected the experts of a layer once",
                                 espi_st_set_path(loader->set), found, name);
            if (*out == ESPI_EXPERTS_LAYOUTS) memcpy(found, name, sizeof found);
            *out = signs[i].layout;
        } else if (i == 0 || signs[i].layout != signs[i - 1].layout) {
            const size_t n = strlen(looked_for);
            snprintf(looked_for + n, sizeof looked_for - n, n ? ", and so is %s" : "%s is missing", name);
        }
    }
    if (*out != ESPI_EXPERTS_LAYOUTS) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s, expected one of them", espi_st_set_path(loader->set), looked_for);
}

/* Whether fused tensors of plain values are [E,in,out].  Where a family's files have either order, the tensor that is not square says
 * which; gate_up and down cannot both be square. */
static bool is_turned(const espi_loader *loader, const espi_layer *w, int64_t layer) {
    const espi_family *f = loader->model->config.family;
    if (f->fused_order != ESPI_FUSED_EITHER) return f->fused_order == ESPI_FUSED_IN_OUT;
    const bool square = w->gate_up.rows == w->gate_up.cols;
    const espi_stack *s = square ? &w->down : &w->gate_up;
    char name[ESPI_TENSOR_NAME];
    layer_name(name, square ? f->fused_down : f->fused_gate_up, layer, "");
    const espi_st_tensor *t = look_up(loader, name);
    return t && t->rank == 3 && t->dims[1] == s->cols && t->dims[2] == s->rows;
}

void espi_expert_bias_name(char out[ESPI_TENSOR_NAME], const espi_family *f, espi_expert_layout layout, int64_t layer, bool down,
                           int64_t part) {
    if (layout == ESPI_EXPERTS_JOINED)
        expert_name(out, down ? f->joined_down : f->expert_gate_up, layer, part, ".bias");
    else
        layer_name(out, down ? f->fused_down : f->fused_gate_up, layer, "_bias");
}

/* One row for each expert, in tensors of their own or in one. */
static esp_status load_bias(espi_loader *loader, const float *out, const espi_stack *s, espi_expert_layout layout, int64_t layer,
                            bool down) {
    const espi_share *share = &loader->model->share;
    const bool joined = layout == ESPI_EXPERTS_JOINED;
    for (int64_t e = 0; e < (joined ? share->experts : 1); e++) {
        char name[ESPI_TENSOR_NAME];
        const espi_st_tensor *t;
        espi_expert_bias_name(name, loader->model->config.family, layout, layer, down, e);
        ESPI_TRY(need_plain(loader, &t, name, ESP_F32, joined ? 1 : 2, joined ? &s->rows : (int64_t[]){share->experts, s->rows}));
        const int64_t own = e - share->first;
        if (!joined)
            ESPI_TRY(take_values(loader, t, out, ESP_F32, share->first * s->rows, s->experts * s->rows));
        else if (own >= 0 && own < s->experts)
            ESPI_TRY(take_values(loader, t, out + own * s->rows, ESP_F32, 0, s->rows));
    }
    return ESP_OK;
}

static esp_status load_experts(espi_loader *loader, const espi_layer *w, int64_t layer) {
    const espi_config *c = &loader->model->config;
    const espi_family *f = c->family;
    espi_expert_layout layout = ESPI_EXPERTS_LAYOUTS;
    ESPI_TRY(find_layout(&layout, loader, layer));
    if (layout == ESPI_EXPERTS_BLOCKS) {
        ESPI_TRY(load_blocks(loader, &w->gate_up, f->fused_gate_up, layer));
        ESPI_TRY(load_blocks(loader, &w->down, f->fused_down, layer));
    } else {
        if (c->mxfp4)
            espi_log(loader->model->ctx, ESP_LOG_WARN, "%s: config.json says MXFP4, but layer %lld has plain values: they become MXFP4 now",
                     espi_st_set_path(loader->set), (long long)layer);
        const bool turned = layout == ESPI_EXPERTS_FUSED && is_turned(loader, w, layer);
        ESPI_TRY(load_stack(loader, &w->gate_up, layout, turned, layer, false));
        ESPI_TRY(load_stack(loader, &w->down, layout, turned, layer, true));
    }
    if (!c->expert_bias) return ESP_OK;
    ESPI_TRY(load_bias(loader, w->gate_up_bias, &w->gate_up, layout, layer, false));
    return load_bias(loader, w->down_bias, &w->down, layout, layer, true);
}

esp_status espi_loader_bias(espi_source *from, espi_loader *loader, const espi_stack *s, int64_t layer, bool down, int64_t part) {
    espi_expert_layout layout = ESPI_EXPERTS_LAYOUTS;
    char name[ESPI_TENSOR_NAME];
    ESPI_TRY(find_layout(&layout, loader, layer));
    espi_expert_bias_name(name, loader->model->config.family, layout, layer, down, part);
    *from = (espi_source){0};
    if (layout == ESPI_EXPERTS_JOINED) return need_plain(loader, &from->t, name, ESP_F32, 1, &s->rows);
    from->first = part * s->rows;
    return need_plain(loader, &from->t, name, ESP_F32, 2, (int64_t[]){loader->model->config.experts, s->rows});
}

esp_status espi_loader_source(espi_source *from, espi_loader *loader, const espi_stack *s, int64_t layer, bool down, int64_t part) {
    const espi_layer *w = &loader->model->layers[layer];
    espi_expert_layout layout = ESPI_EXPERTS_LAYOUTS;
    char name[ESPI_TENSOR_NAME];
    ESPI_TRY(find_layout(&layout, loader, layer));
    espi_expert_matrix_name(name, loader->model->config.family, layout, layer, down, part);
    if (layout == ESPI_EXPERTS_BLOCKS || espi_bnb_present(loader, name))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: tensor %s: is quantised already, expected 16-bit or f32 values to quantise",
                         espi_st_set_path(loader->set), name);
    return plain_source(from, loader, s, layout, layout == ESPI_EXPERTS_FUSED && is_turned(loader, w, layer), name, part);
}

static esp_status load_moe(espi_loader *loader, const espi_layer *w, int64_t layer) {
    const espi_config *c = &loader->model->config;
    const espi_family *f = c->family;
    ESPI_TRY(load_matrix(loader, &w->router, f->router, layer));
    if (c->router_bias) ESPI_TRY(load_vector(loader, w->router_bias, f->router, layer, ".bias", c->experts));
    if (c->router_correction) ESPI_TRY(load_vector(loader, w->router_correction, f->router_correction, layer, "", c->experts));
    const char *const shared[] = {f->shared_gate, f->shared_up, f->shared_down};
    if (c->shared_width) ESPI_TRY(load_mlp(loader, &w->shared_gate_up, &w->shared_down, shared, layer));
    return load_experts(loader, w, layer);
}

/* ---- the whole ---- */

esp_status espi_loader_open(espi_loader *loader, esp_model *model, const char *dir) {
    *loader = (espi_loader){.model = model};
    ESPI_TRY(espi_st_set_open(&loader->set, dir));
    if (model->share.ranks > 1) espi_st_set_forget(loader->set);
    loader->used = calloc(espi_st_set_count(loader->set) + 1, sizeof *loader->used);
    if (!loader->used) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of its tensors", espi_st_set_path(loader->set));
    const staging parts = plan_staging(model);
    ESPI_TRY(espi_room_take(&loader->staging, model->ctx, ESPI_MEM_STAGING, staging_extent(&parts, model->ctx)));
    const bool device = model->ctx->device != NULL;
    loader->raw_bytes = parts.raw;
    loader->raw = device ? loader->staging.host : loader->staging.main;
    loader->absmax = (float *)(void *)(loader->raw + parts.raw);
    loader->one = loader->raw + parts.raw + parts.absmax;
    if (!device) return ESP_OK;
    loader->d_raw = loader->staging.main;
    loader->d_absmax = (float *)(void *)(loader->d_raw + parts.raw);
    loader->d_one = loader->d_raw + parts.raw + parts.absmax;
    return ESP_OK;
}

void espi_loader_close(espi_loader *loader) {
    espi_room_free(&loader->staging, loader->model->ctx);
    free(loader->used);
    espi_st_set_close(loader->set);
    *loader = (espi_loader){0};
}

/* What the family knows to be no part of the model: another tower, or layers behind the last that predict further tokens. */
static bool left_out(const espi_config *c, const char *name) {
    if (c->family->skipped && strncmp(name, c->family->skipped, strlen(c->family->skipped)) == 0) return true;
    const char *number = strstr(c->family->norm1, "%d");
    const size_t n = (size_t)(number - c->family->norm1);
    if (strncmp(name, c->family->norm1, n) != 0) return false;
    char *end;
    const long long layer = strtoll(name + n, &end, 10);
    return end > name + n && *end == '.' && layer >= c->layers && layer < c->layers + c->unused_layers;
}

/* Tensors nobody asked for.  One that the model's own names begin means that config and weights disagree; others are only reported. */
static esp_status check_unused(const espi_loader *loader) {
    const espi_st_tensor *first = NULL;
    size_t wrong = 0;
    for (size_t i = 0; i < espi_st_set_count(loader->set); i++) {
        const espi_st_tensor *t = espi_st_set_at(loader->set, i);
        if (loader->used[i] || strstr(t->name, "rotary_emb.inv_freq") || left_out(&loader->model->config, t->name)) continue;
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
    if (loader->lut) ESPI_TRY(espi_ctx_put(m->ctx, loader->lut, esp_quant_table(m->options.experts), 16 * sizeof(float)));
    ESPI_TRY(load_values(loader, m->embed.data, m->embed.dtype, c->family->embed, c->stored_dtype, 2, table));
    if (!c->tied_head) ESPI_TRY(load_values(loader, m->head.data, m->head.dtype, c->family->head, c->stored_dtype, 2, table));
    ESPI_TRY(load_values(loader, m->final_norm, ESP_F32, c->family->final_norm, ESP_F32, 1, &c->hidden));
    for (int64_t l = 0; l < c->layers; l++) {
        const espi_layer *w = &m->layers[l];
        ESPI_TRY(load_attention(loader, w, l));
        const char *const dense[] = {c->family->dense_gate, c->family->dense_up, c->family->dense_down};
        ESPI_TRY(w->mlp == ESPI_MLP_DENSE ? load_mlp(loader, &w->mlp_gate_up, &w->mlp_down, dense, l) : load_moe(loader, w, l));
        ESPI_TRY(espi_guest_put_home(m, l));
    }
    return check_unused(loader);
}

esp_status espi_model_take_weights(esp_model *model, float **map, float **lut) {
    espi_weight_plan bytes;
    lay_out(model, NULL, NULL, &bytes, map, lut);
    ESPI_TRY(espi_room_take(&model->weights, model->ctx, ESPI_MEM_WEIGHTS,
                            (espi_extent){.main = bytes.dense + bytes.experts, .host = bytes.host}));
    lay_out(model, model->weights.main, model->weights.host, &bytes, map, lut);
    return ESP_OK;
}

esp_status espi_model_load_weights(esp_model *model, const char *dir) {
    espi_loader loader;
    ESPI_TRY(espi_model_skeleton(model));
    ESPI_TRY(espi_share_open(&model->share, model->ctx));
    esp_status status = espi_loader_open(&loader, model, dir);
    if (status == ESP_OK) status = espi_model_take_weights(model, &loader.map, &loader.lut);
    if (status == ESP_OK) status = load_all(&loader);
    if (status == ESP_OK) status = espi_ctx_wait(model->ctx);
    espi_loader_close(&loader);
    return status;
}
