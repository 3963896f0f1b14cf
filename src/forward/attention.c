/* Forward of attention.  Twin: backward/attention.c. */
#include "contract/attention.h"

#include <math.h>

static esp_status rotate(espi_pass *pass, void *x, int64_t heads) {
    const espi_rope args = {
        .x = x, .cos = pass->cos, .sin = pass->sin, .tokens = pass->tokens, .heads = heads, .half = pass->model->config.head_dim / 2};
    return espi_op_rope_fwd(pass->ctx, pass->arena, &args);
}

/* Projects, normalises per head where the family does, and rotates.  raw = x W^T is kept only when a norm follows. */
static esp_status project(espi_pass *pass, void *out, void *raw, void *rstd, void *u, const void *x, const espi_linear *linear,
                          const float *norm, int64_t heads) {
    ESPI_TRY(espi_linear_forward(pass, norm ? raw : out, u, x, linear));
    if (norm) ESPI_TRY(espi_norm_forward(pass, out, rstd, raw, norm, pass->tokens * heads, pass->model->config.head_dim));
    return ESP_OK;
}

esp_status espi_attention_forward(espi_pass *pass, int64_t layer, void *y, const void *x, espi_attention_saved *saved) {
    const espi_config *c = &pass->model->config;
    const espi_layer *w = &pass->model->layers[layer];
    const int64_t t = pass->tokens, nq = c->heads * c->head_dim, nk = c->kv_heads * c->head_dim;
    *saved = (espi_attention_saved){0};
    ESPI_TRY(espi_take_real(pass, t * nq, &saved->q));
    ESPI_TRY(espi_take_real(pass, t * nk, &saved->k));
    ESPI_TRY(espi_take_real(pass, t * nk, &saved->v));
    if (c->qk_norm) {
        ESPI_TRY(espi_take_real(pass, t * nq, &saved->q_raw));
        ESPI_TRY(espi_take_real(pass, t * nk, &saved->k_raw));
        ESPI_TRY(espi_take_real(pass, t * c->heads, &saved->q_rstd));
        ESPI_TRY(espi_take_real(pass, t * c->kv_heads, &saved->k_rstd));
    }
    ESPI_TRY(espi_take_real(pass, t * nq, &saved->out));
    ESPI_TRY(espi_take_real(pass, t * c->heads, &saved->lse));
    ESPI_TRY(espi_linear_take_saved(pass, &w->q, &saved->u_q));
    ESPI_TRY(espi_linear_take_saved(pass, &w->k, &saved->u_k));
    ESPI_TRY(espi_linear_take_saved(pass, &w->v, &saved->u_v));
    ESPI_TRY(espi_linear_take_saved(pass, &w->o, &saved->u_o));

    ESPI_TRY(project(pass, saved->q, saved->q_raw, saved->q_rstd, saved->u_q, x, &w->q, w->q_norm, c->heads));
    ESPI_TRY(project(pass, saved->k, saved->k_raw, saved->k_rstd, saved->u_k, x, &w->k, w->k_norm, c->kv_heads));
    ESPI_TRY(espi_linear_forward(pass, saved->v, saved->u_v, x, &w->v));
    if (c->qk_norm) {
        espi_probe(pass, "q_norm", layer, saved->q, t, nq);
        espi_probe(pass, "k_norm", layer, saved->k, t, nk);
    }
    ESPI_TRY(rotate(pass, saved->q, c->heads));
    ESPI_TRY(rotate(pass, saved->k, c->kv_heads));
    espi_probe(pass, "q", layer, saved->q, t, nq);
    espi_probe(pass, "k", layer, saved->k, t, nk);
    espi_probe(pass, "v", layer, saved->v, t, nk);

    const void *k = saved->k, *v = saved->v;
    if (pass->cache) {
        const size_t plane = (size_t)(pass->cache->rows * nk) * pass->ctx->real_size;
        const espi_kv_append append = {.k_cache = (char *)pass->cache->k + plane * (size_t)layer,
                                       .v_cache = (char *)pass->cache->v + plane * (size_t)layer,
                                       .k = k,
                                       .v = v,
                                       .spans = pass->spans,
                                       .width = nk};
        ESPI_TRY(espi_op_kv_append(pass->ctx, pass->arena, &append));
        k = append.k_cache;
        v = append.v_cache;
    }
    const espi_attention_fwd args = {.out = saved->out,
                                     .lse = saved->lse,
                                     .q = saved->q,
                                     .k = k,
                                     .v = v,
                                     .spans = pass->spans,
                                     .heads = c->heads,
                                     .kv_heads = c->kv_heads,
                                     .head_dim = c->head_dim,
                                     .scale = 1.0 / sqrt((double)c->head_dim)};
    ESPI_TRY(espi_op_attention_fwd(pass->ctx, pass->arena, &args));
    espi_probe(pass, "lse", layer, saved->lse, t, c->heads);
    espi_probe(pass, "attn", layer, saved->out, t, nq);
    return espi_linear_forward(pass, y, saved->u_o, saved->out, &w->o);
}
