/* Merging: a checkpoint with an adapter's delta added to its weights, in f32 and once rounded; tensor by tensor. */
#include "core/status.h"
#include "espalier/quant.h"
#include "io/adapter.h"
#include "io/folder.h"
#include "io/model_writer.h"
#include "io/quantised.h"
#include "kernels/plain.h"
#include "models/load.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct merge merge;

/* What is added to one tensor of the checkpoint, or to one matrix in it: rows of a branch. */
typedef struct job {
    merge *m;
    const espi_lora *lora;
    int64_t expert, out, in; /* which of the branch's matrices, and their size */
    int64_t rows, first_row; /* of `out`, those that the tensor has */
    espi_source at;
    struct job *next;
} job;

/* A tensor that changes. */
typedef struct target {
    job *jobs;
    const espi_st_tensor *blocks, *scales; /* MXFP4: both are made anew from both */
    bool wide;                             /* written as f32, to be made 4-bit from there */
} target;

struct merge {
    esp_model *adapter;
    espi_loader loader;
    target *targets; /* one for each tensor of the set */
    bool wide;       /* experts become f32 */
    int64_t attempted, applied;
};

/* ---- what belongs where ---- */

static esp_status assign(merge *m, const job *what, bool expert) {
    job *j = malloc(sizeof *j);
    if (!j) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the list of changes", espi_st_set_path(m->loader.set));
    target *t = &m->targets[espi_st_set_index(m->loader.set, what->at.t)];
    *j = *what;
    j->m = m;
    j->next = t->jobs;
    t->jobs = j;
    t->wide = expert && m->wide;
    m->applied++;
    return ESP_OK;
}

static esp_status assign_attention(merge *m, const char *module, int64_t layer, const espi_linear *w) {
    if (w->lora.r == 0) return ESP_OK;
    char name[ESPI_TENSOR_NAME];
    snprintf(name, sizeof name, module, (int)layer);
    const size_t n = strlen(name);
    snprintf(name + n, sizeof name - n, ".weight");
    job j = {.lora = &w->lora, .out = w->w.rows, .in = w->w.cols, .rows = w->w.rows};
    m->attempted++;
    ESPI_TRY(espi_loader_need(&m->loader, &j.at.t, name, ESP_DTYPE_NONE, 2, (int64_t[]){j.out, j.in}));
    if (j.at.t->dtype != ESP_F32 && j.at.t->dtype != ESP_BF16 && j.at.t->dtype != ESP_F16)
        return ESPI_FAIL(ESP_ERR_DTYPE, "%s: tensor %s: got %s, expected F32, BF16 or F16", espi_st_path(j.at.t->file), name,
                         j.at.t->dtype_name);
    return assign(m, &j, false);
}

/* MXFP4: codes and scales of a whole stack in a tensor each. */
static esp_status assign_blocks(merge *m, int64_t layer, bool down, const espi_stack *w, const espi_lora *lora) {
    char name[ESPI_TENSOR_NAME];
    target both = {0};
    const int64_t groups = w->cols / 32, dims[] = {w->experts, w->rows, groups, 16};
    espi_expert_matrix_name(name, m->adapter->config.family, ESPI_EXPERTS_BLOCKS, layer, down, 0);
    ESPI_TRY(espi_loader_need(&m->loader, &both.blocks, name, ESP_U8, 4, dims));
    snprintf(name + strlen(name) - strlen("blocks"), sizeof "scales", "scales");
    ESPI_TRY(espi_loader_need(&m->loader, &both.scales, name, ESP_U8, 3, dims));
    target *of_scales = &m->targets[espi_st_set_index(m->loader.set, both.scales)];
    *of_scales = m->targets[espi_st_set_index(m->loader.set, both.blocks)] = both;
    for (int64_t e = w->experts; e-- > 0;) { /* the list is then ascending */
        const job j = {.lora = lora, .expert = e, .out = w->rows, .in = w->cols, .rows = w->rows, .at = {.t = both.blocks}};
        ESPI_TRY(assign(m, &j, true));
    }
    of_scales->jobs = m->targets[espi_st_set_index(m->loader.set, both.blocks)].jobs;
    return ESP_OK;
}

static esp_status assign_stack(merge *m, int64_t layer, bool down, const espi_stack *w, const espi_lora *lora) {
    if (lora->r == 0) return ESP_OK;
    if (m->adapter->config.mxfp4) {
        m->attempted += w->experts;
        return assign_blocks(m, layer, down, w, lora);
    }
    m->attempted += w->experts * w->parts;
    for (int64_t part = 0; part < w->experts * w->parts; part++) {
        job j = {.lora = lora, .expert = part / w->parts, .out = w->rows, .in = w->cols, .rows = w->rows / w->parts};
        j.first_row = part % w->parts * j.rows;
        ESPI_TRY(espi_loader_source(&j.at, &m->loader, w, layer, down, part));
        ESPI_TRY(assign(m, &j, true));
    }
    return ESP_OK;
}

static esp_status assign_all(merge *m) {
    const espi_family *f = m->adapter->config.family;
    for (int64_t l = 0; l < m->adapter->config.layers; l++) {
        const espi_layer *w = &m->adapter->layers[l];
        const espi_linear *attention[] = {&w->q, &w->k, &w->v, &w->o};
        for (int t = ESPI_T_Q; t <= ESPI_T_O; t++) ESPI_TRY(assign_attention(m, espi_adapter_attention(f, t), l, attention[t]));
        if (w->mlp != ESPI_MLP_MOE) continue;
        ESPI_TRY(assign_stack(m, l, false, &w->gate_up, &w->lora_gate_up));
        ESPI_TRY(assign_stack(m, l, true, &w->down, &w->lora_down));
    }
    if (m->applied == m->attempted) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: %lld of %lld matrices of the adapter found their weights, expected all",
                     espi_st_set_path(m->loader.set), (long long)m->applied, (long long)m->attempted);
}

/* ---- values ---- */

static float parameter(const merge *m, const void *p, int64_t i) {
    return m->adapter->ctx->real == ESP_F64 ? (float)((const double *)p)[i] : ((const float *)p)[i];
}

/* The delta of one matrix as left [rows,r] times right [r,cols], rows and cols as the tensor has them; free() left. */
typedef struct product {
    float *left, *right;
    int64_t rows, cols, stride, r; /* stride: from one row of the tensor to the next */
    float scale;
} product;

static esp_status factors_of(product *p, const job *j) {
    const int64_t r = j->lora->r, e = j->expert;
    const bool turned = j->at.columns;
    *p = (product){.rows = turned ? j->in : j->rows,
                   .cols = turned ? j->rows : j->in,
                   .stride = turned ? j->at.columns : j->in,
                   .r = r,
                   .scale = (float)j->lora->scale};
    p->left = malloc((size_t)(p->rows * r + r * p->cols) * sizeof *p->left);
    if (!p->left) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: tensor %s: no memory for its delta", espi_st_path(j->at.t->file), j->at.t->name);
    p->right = p->left + p->rows * r;
    float *of_in = turned ? p->left : p->right, *of_out = turned ? p->right : p->left;
    for (int64_t k = 0; k < r; k++) {
        for (int64_t i = 0; i < j->in; i++)
            of_in[turned ? i * r + k : k * j->in + i] = parameter(j->m, j->lora->a, (e * r + k) * j->in + i);
        for (int64_t o = 0; o < j->rows; o++)
            of_out[turned ? k * j->rows + o : o * r + k] = parameter(j->m, j->lora->b, (e * j->out + j->first_row + o) * r + k);
    }
    return ESP_OK;
}

/* Adds one row's delta; false where a sum is not finite in `dtype`. */
static bool add_row(void *values, esp_dtype dtype, const product *p, int64_t row) {
    enum { TILE = 256 };
    bool finite = true;
    for (int64_t from = 0; from < p->cols; from += TILE) {
        float sum[TILE] = {0};
        const int64_t n = p->cols - from < TILE ? p->cols - from : TILE;
        for (int64_t k = 0; k < p->r; k++) {
            const float left = p->left[row * p->r + k], *right = p->right + k * p->cols + from;
            for (int64_t c = 0; c < n; c++) sum[c] += left * right[c];
        }
        for (int64_t c = 0; c < n; c++) {
            const int64_t at = row * p->stride + from + c;
            espi_plain_store(values, dtype, at, espi_plain_value(values, dtype, at) + p->scale * sum[c]);
            finite &= isfinite(espi_plain_value(values, dtype, at)) != 0;
        }
    }
    return finite;
}

/* values: where the matrix begins. */
static esp_status add_delta(void *values, esp_dtype dtype, const job *j) {
    product p;
    ESPI_TRY(factors_of(&p, j));
    int wrong = 0;
#pragma omp parallel for num_threads(j->m->adapter->ctx->threads) reduction(| : wrong)
    for (int64_t row = 0; row < p.rows; row++) wrong |= !add_row(values, dtype, &p, row);
    free(p.left);
    if (!wrong) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_NONFINITE, "%s: tensor %s: got a NaN or infinity with the delta added, expected finite values",
                     espi_st_path(j->at.t->file), j->at.t->name);
}

/* The tensor as it is, or widened to f32. */
static esp_status read_values(void *buffer, const espi_st_tensor *t, bool wide) {
    if (!wide || t->dtype == ESP_F32) return espi_st_read(t, buffer, 0, (size_t)t->bytes);
    void *raw = malloc((size_t)t->bytes + 1);
    esp_status status = raw ? espi_st_read(t, raw, 0, (size_t)t->bytes)
                            : ESPI_FAIL(ESP_ERR_MEMORY, "%s: tensor %s: no memory to widen it", espi_st_path(t->file), t->name);
    const int64_t n = (int64_t)(t->bytes / esp_dtype_size(t->dtype));
    for (int64_t i = 0; i < n && status == ESP_OK; i++) ((float *)buffer)[i] = espi_plain_value(raw, t->dtype, i);
    free(raw);
    return status;
}

static esp_status fill_plain(void *user, void *buffer, size_t bytes) {
    (void)bytes;
    const target *t = user;
    const esp_dtype dtype = t->wide ? ESP_F32 : t->jobs->at.t->dtype;
    ESPI_TRY(read_values(buffer, t->jobs->at.t, t->wide));
    for (const job *j = t->jobs; j; j = j->next)
        ESPI_TRY(add_delta((unsigned char *)buffer + (size_t)j->at.first * esp_dtype_size(dtype), dtype, j));
    return ESP_OK;
}

/* One matrix decoded, changed, and made MXFP4 again. */
static esp_status remake(float *values, uint8_t *codes, uint8_t *scales, const target *t, const job *j) {
    const int64_t n = j->rows * j->in;
    const size_t n_codes = (size_t)n / 2, n_scales = (size_t)n / 32;
    ESPI_TRY(espi_st_read(t->blocks, codes, (uint64_t)j->expert * n_codes, n_codes));
    ESPI_TRY(espi_st_read(t->scales, scales, (uint64_t)j->expert * n_scales, n_scales));
    ESPI_TRY(esp_mxfp4_dequantize(values, codes, scales, n));
    ESPI_TRY(add_delta(values, ESP_F32, j));
    return esp_mxfp4_quantize(codes, scales, values, ESP_F32, n, ESP_MXFP4_OCP);
}

static esp_status fill_mxfp4(const target *t, unsigned char *buffer, bool want_scales) {
    const size_t n = (size_t)(t->jobs->rows * t->jobs->in), piece = want_scales ? n / 32 : n / 2;
    float *values = malloc(n * sizeof *values);
    uint8_t *codes = malloc(n / 2 + n / 32 + 1);
    esp_status status = ESP_OK;
    if (!values || !codes)
        status = ESPI_FAIL(ESP_ERR_MEMORY, "%s: tensor %s: no memory for one expert", espi_st_path(t->blocks->file), t->blocks->name);
    for (const job *j = t->jobs; j && status == ESP_OK; j = j->next) {
        status = remake(values, codes, codes + n / 2, t, j);
        memcpy(buffer + (size_t)j->expert * piece, want_scales ? codes + n / 2 : codes, piece);
    }
    free(values);
    free(codes);
    return status;
}

static esp_status fill_blocks(void *user, void *buffer, size_t bytes) {
    (void)bytes;
    return fill_mxfp4(user, buffer, false);
}

static esp_status fill_scales(void *user, void *buffer, size_t bytes) {
    (void)bytes;
    return fill_mxfp4(user, buffer, true);
}

/* ---- the folder ---- */

static esp_status edit_tensor(void *user, espi_shard *shard, const espi_st_tensor *tensor) {
    merge *m = user;
    target *t = &m->targets[espi_st_set_index(m->loader.set, tensor)];
    if (!t->jobs) return espi_shard_keep(shard, tensor);
    espi_st_item item = {.name = tensor->name, .dtype = t->wide && !t->scales ? ESP_F32 : tensor->dtype, .rank = tensor->rank, .user = t};
    item.fill = !t->scales ? fill_plain : tensor == t->scales ? fill_scales : fill_blocks;
    memcpy(item.dims, tensor->dims, sizeof item.dims);
    return espi_shard_add(shard, &item);
}

static esp_status check_format(const espi_config *c, const char *model_dir, esp_qformat format) {
    if (format != ESP_Q_DEFAULT && format != ESP_NF4 && format != ESP_FP4 && format != ESP_MXFP4)
        return ESPI_FAIL(ESP_ERR_ARG, "format: got %d, expected ESP_NF4, ESP_FP4, ESP_MXFP4 or 0", (int)format);
    if (c->quantised)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: got bitsandbytes weights, expected plain ones: merge into the 16-bit checkpoint and pass format", model_dir);
    if (c->mxfp4 && format != ESP_MXFP4)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: got MXFP4 experts, expected plain ones, or format mxfp4 to round them anew with the delta added", model_dir);
    return ESP_OK;
}

static esp_status write_folder(merge *m, const char *out_dir, const char *model_dir) {
    ESPI_TRY(espi_loader_open(&m->loader, m->adapter, model_dir));
    m->targets = calloc(espi_st_set_count(m->loader.set) + 1, sizeof *m->targets);
    if (!m->targets) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of its tensors", espi_st_set_path(m->loader.set));
    ESPI_TRY(assign_all(m));
    const espi_model_edit edit = {.tensor = edit_tensor, .user = m};
    return espi_model_rewrite(out_dir, model_dir, m->loader.set, &edit);
}

/* Two steps: a folder beside the new one with the sums in f32, then its experts in 4 bits, so that they are rounded once. */
static esp_status write_quantised(merge *m, const char *out_dir, const char *model_dir, esp_qformat format) {
    char between[ESPI_PATH_MAX];
    const int n = snprintf(between, sizeof between, "%s.f32", out_dir);
    if (n < 0 || (size_t)n >= sizeof between) return ESPI_FAIL(ESP_ERR_ARG, "%s: is too long a name, expected a shorter one", out_dir);
    if (espi_dir_exists(between)) return ESPI_FAIL(ESP_ERR_ARG, "%s: is there already, expected room for a temporary folder", between);
    m->wide = true;
    esp_status status = write_folder(m, between, model_dir);
    if (status == ESP_OK) status = espi_quantised_write(m->adapter->ctx, out_dir, between, &(espi_quantised_spec){.format = format});
    if (espi_dir_exists(between)) espi_folder_remove(between);
    return status;
}

static void merge_free(merge *m) {
    const size_t n = m->targets ? espi_st_set_count(m->loader.set) : 0;
    for (size_t i = 0; i < n; i++) {
        const target *t = &m->targets[i];
        if (t->scales && t->scales == espi_st_set_at(m->loader.set, i)) continue; /* the list is that of the blocks */
        for (job *j = t->jobs, *next; j; j = next) {
            next = j->next;
            free(j);
        }
    }
    free(m->targets);
    if (m->loader.model) espi_loader_close(&m->loader);
    esp_model_destroy(m->adapter);
}

esp_status esp_adapter_merge(esp_ctx *ctx, esp_merge_stats *stats, const char *out_dir, const char *model_dir, const char *adapter_dir,
                             const esp_merge_config *config) {
    if (!ctx || !out_dir || !model_dir || !adapter_dir)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_adapter_merge: ctx or a folder is NULL, expected all four");
    if (ctx->device)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: got a context on a GPU, expected one on the CPU to write files with", out_dir);
    esp_merge_config asked;
    ESPI_TRY(espi_struct_read(&asked, sizeof asked, config, "esp_merge_config"));
    merge m = {0};
    esp_dtype dtype;
    ESPI_TRY(espi_adapter_open(&m.adapter, &dtype, ctx, adapter_dir, model_dir, asked.reading));
    const espi_config *c = &m.adapter->config;
    esp_status status = check_format(c, model_dir, asked.format);
    if (status == ESP_OK)
        status = asked.format == ESP_Q_DEFAULT || c->mxfp4 ? write_folder(&m, out_dir, model_dir)
                                                           : write_quantised(&m, out_dir, model_dir, asked.format);
    const esp_merge_stats counts = {.struct_size = sizeof counts, .attempted = m.attempted, .applied = m.applied};
    if (stats && status == ESP_OK) status = espi_struct_write(stats, &counts, sizeof counts, "esp_merge_stats");
    merge_free(&m);
    return status;
}
