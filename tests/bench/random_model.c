/* See random_model.h.  Numbers come from one block of random values that is used again and again from other places: no weight is like the
 * one beside it, and a model of 30 billion values is there in seconds. */
#include "random_model.h"

#include "core/status.h"
#include "espalier/quant.h"
#include "kernels/backend.h"
#include "models/passes.h"

#include <stdlib.h>
#include <string.h>

enum { BLOCK = 1 << 22 };

typedef struct source {
    esp_ctx *ctx;
    float *normal; /* [BLOCK] about N(0,1) */
    void *room;    /* for conversions: f32 [BLOCK] */
    uint64_t state;
} source;

static uint64_t draw(source *s) {
    s->state = s->state * 6364136223846793005u + 1442695040888963407u;
    return s->state >> 33;
}

static esp_status open_source(source *s, esp_ctx *ctx) {
    *s = (source){.ctx = ctx, .state = 1};
    s->normal = malloc(BLOCK * sizeof(float));
    s->room = malloc(BLOCK * sizeof(float));
    if (!s->normal || !s->room) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for random numbers");
    for (int i = 0; i < BLOCK; i++) {
        float sum = 0;
        for (int k = 0; k < 4; k++) sum += (float)draw(s) * 0x1p-31f - 0.5f;
        s->normal[i] = sum * 1.7320508f;
    }
    return ESP_OK;
}

static void close_source(source *s) {
    free(s->normal);
    free(s->room);
}

/* n values of mean 0 and this deviation, around `mean`. */
static esp_status fill(source *s, const void *to, esp_dtype dtype, int64_t n, float deviation, float mean) {
    const size_t size = esp_dtype_size(dtype);
    for (int64_t done = 0; to && done < n;) {
        const int64_t from = (int64_t)(draw(s) % (BLOCK / 2)), left = n - done;
        const int64_t m = left < BLOCK / 2 ? left : BLOCK / 2;
        for (int64_t i = 0; i < m; i++) espi_plain_store(s->room, dtype, i, mean + deviation * s->normal[from + i]);
        ESPI_TRY(espi_ctx_put(s->ctx, (unsigned char *)to + (size_t)done * size, s->room, (size_t)m * size));
        done += m;
    }
    return ESP_OK;
}

static esp_status fill_mat(source *s, const espi_mat *m) {
    return fill(s, m->data, m->dtype, m->rows * m->cols, 0.02f, 0);
}

static esp_status fill_linear(source *s, const espi_linear *l) {
    ESPI_TRY(fill_mat(s, &l->w));
    return fill(s, l->bias, ESP_F32, l->w.rows, 0.02f, 0);
}

/* One expert's codes and scales in host memory, over and over, each time turned by some bytes. */
static esp_status fill_stack(source *s, const espi_stack *w, espi_stack *one, void *room, void *d_room) {
    const espi_backend *backend = s->ctx->backends[0];
    const size_t codes = (size_t)w->parts * w->part_bytes, scales = (size_t)(w->parts * w->part_blocks);
    const size_t scale_size = w->format == ESP_MXFP4 ? 1 : sizeof(float), scales_at = ESPI_ALIGNED(codes);
    unsigned char *host = room;
    for (size_t i = 0; i < codes; i++) host[i] = (unsigned char)draw(s);
    for (size_t i = 0; i < scales; i++) {
        if (w->format == ESP_MXFP4)
            host[scales_at + i] = (unsigned char)(118 + draw(s) % 4);
        else
            ((float *)(void *)(host + scales_at))[i] = 0.04f + 0.02f * (float)(draw(s) % 64) / 64;
    }
    *one = *w;
    one->experts = 1;
    one->packed = NULL;
    one->data = d_room;
    one->absmax = (const float *)(const void *)((unsigned char *)d_room + scales_at);
    one->scales = (unsigned char *)d_room + scales_at;
    for (int64_t e = 0; e < w->experts; e++) {
        unsigned char first[64];
        memcpy(first, host, sizeof first);
        memmove(host, host + sizeof first, codes - sizeof first);
        memcpy(host + codes - sizeof first, first, sizeof first);
        if (w->packed) {
            ESPI_TRY(espi_ctx_put(s->ctx, d_room, host, scales_at + scales * scale_size));
            const espi_exec exec = {.device = s->ctx->device, .threads = s->ctx->threads};
            ESPI_TRY(backend->pack(&exec, (unsigned char *)w->packed + (size_t)e * backend->packed_bytes(w), one));
        } else {
            ESPI_TRY(espi_ctx_put(s->ctx, (unsigned char *)w->data + (size_t)e * codes, host, codes));
            void *to = w->format == ESP_MXFP4 ? (void *)(w->scales + (size_t)e * scales) : (void *)(w->absmax + (size_t)e * scales);
            ESPI_TRY(espi_ctx_put(s->ctx, to, host + scales_at, scales * scale_size));
        }
    }
    return ESP_OK;
}

static esp_status fill_experts(source *s, const espi_layer *w) {
    size_t bytes = 0;
    for (int i = 0; i < 2; i++) {
        const espi_stack *k = i ? &w->down : &w->gate_up;
        const size_t one = ESPI_ALIGNED((size_t)k->parts * k->part_bytes) + (size_t)(k->parts * k->part_blocks) * sizeof(float);
        if (one > bytes) bytes = one;
    }
    void *room = malloc(bytes), *d_room = NULL;
    esp_status status = room ? espi_ctx_alloc(s->ctx, ESPI_MEM_STAGING, bytes, &d_room) : ESPI_FAIL(ESP_ERR_MEMORY, "no memory");
    espi_stack one;
    if (status == ESP_OK) status = fill_stack(s, &w->gate_up, &one, room, d_room);
    if (status == ESP_OK) status = fill_stack(s, &w->down, &one, room, d_room);
    if (status == ESP_OK) status = espi_ctx_wait(s->ctx);
    espi_ctx_free(s->ctx, ESPI_MEM_STAGING, d_room, bytes);
    free(room);
    return status;
}

static esp_status fill_layer(source *s, const espi_config *c, const espi_layer *w) {
    ESPI_TRY(fill(s, w->norm1, ESP_F32, c->hidden, 0.1f, 1));
    ESPI_TRY(fill(s, w->norm2, ESP_F32, c->hidden, 0.1f, 1));
    ESPI_TRY(fill(s, w->q_norm, ESP_F32, espi_qk_norm_size(c, c->heads), 0.1f, 1));
    ESPI_TRY(fill(s, w->k_norm, ESP_F32, espi_qk_norm_size(c, c->kv_heads), 0.1f, 1));
    ESPI_TRY(fill(s, w->sinks, ESP_F32, c->heads, 1, 0));
    ESPI_TRY(fill_linear(s, &w->q));
    ESPI_TRY(fill_linear(s, &w->k));
    ESPI_TRY(fill_linear(s, &w->v));
    ESPI_TRY(fill_linear(s, &w->o));
    ESPI_TRY(fill_mat(s, &w->router));
    ESPI_TRY(fill(s, w->router_bias, ESP_F32, c->experts, 0.02f, 0));
    ESPI_TRY(fill(s, w->gate_up_bias, ESP_F32, w->gate_up.experts * w->gate_up.rows, 0.02f, 0));
    ESPI_TRY(fill(s, w->down_bias, ESP_F32, w->down.experts * w->down.rows, 0.02f, 0));
    return fill_experts(s, w);
}

static esp_status fill_model(esp_model *m) {
    source s;
    const espi_config *c = &m->config;
    esp_status status = open_source(&s, m->ctx);
    if (status == ESP_OK) status = fill_mat(&s, &m->embed);
    if (status == ESP_OK && !c->tied_head) status = fill_mat(&s, &m->head);
    if (status == ESP_OK) status = fill(&s, m->final_norm, ESP_F32, c->hidden, 0.1f, 1);
    for (int64_t l = 0; l < c->layers && status == ESP_OK; l++) {
        status = fill_layer(&s, c, &m->layers[l]);
        if (status == ESP_OK) status = espi_guest_put_home(m, l);
    }
    close_source(&s);
    return status;
}

static esp_status build(esp_model *m, const char *dir, const esp_model_config *config) {
    ESPI_TRY(espi_config_read(&m->config, dir));
    ESPI_TRY(espi_model_options(&m->options, m->lora, config, &m->config));
    ESPI_TRY(espi_model_skeleton(m));
    float *map, *lut;
    ESPI_TRY(espi_model_take_weights(m, &map, &lut));
    if (lut) ESPI_TRY(espi_ctx_put(m->ctx, lut, esp_quant_table(m->options.experts), 16 * sizeof(float)));
    ESPI_TRY(fill_model(m));
    return espi_model_finish(m);
}

esp_status random_model(esp_model **model, esp_ctx *ctx, const char *dir, const esp_model_config *config) {
    esp_model *m = calloc(1, sizeof *m);
    if (!m) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a model's bookkeeping");
    m->ctx = ctx;
    const esp_status status = build(m, dir, config);
    if (status != ESP_OK) {
        esp_model_destroy(m);
        return status;
    }
    *model = m;
    return ESP_OK;
}
