/* Forward of attention.  Twin: backward/attention.c. */
#include "contract/attention.h"

#include <math.h>

static esp_status rotate(espi_pass *pass, void *x, int64_t heads) {
    const espi_rope args = espi_rope_of(pass, x, heads);
    return espi_op_rope_fwd(pass->ctx, pass->arena, &args);
}

/* A norm covers one head, or, in families that say so, all heads of a token at once. */
static esp_status take_projection(espi_pass *pass, const espi_linear *linear, bool normed, int64_t heads, espi_projection_saved *saved) {
    const espi_config *c = &pass->model->config;
    const int64_t n = pass->tokens * heads * c->head_dim;
    ESPI_TRY(espi_take_act(pass, n, &saved->out));
    if (normed) {
        ESPI_TRY(espi_take_act(pass, n, &saved->raw));
        ESPI_TRY(espi_take_real(pass, pass->tokens * (c->whole_qk_norm ? 1 : heads), &saved->rstd));
    }
    if (c->clip_qkv > 0) ESPI_TRY(espi_take_act(pass, n, &saved->free));
    return espi_linear_take_saved(pass, linear, &saved->u);
}

static esp_status project(espi_pass *pass, int64_t layer, const char *probe, const void *x, const espi_linear *linear, const float *norm,
                          int64_t heads, const espi_projection_saved *saved) {
    const espi_config *c = &pass->model->config;
    const int64_t width = heads * c->head_dim, n = c->whole_qk_norm ? width : c->head_dim;
    void *normed = saved->free ? saved->free : saved->out;
    ESPI_TRY(espi_linear_forward(pass, norm ? saved->raw : normed, saved->u, x, linear));
    if (norm) {
        ESPI_TRY(espi_norm_forward(pass, normed, saved->rstd, saved->raw, norm, pass->tokens * width / n, n));
        espi_probe(pass, probe, layer, normed, pass->tokens, width);
    }
    if (!saved->free) return ESP_OK;
    const espi_clamp_fwd clamp = {.y = saved->out, .x = saved->free, .n = pass->tokens * width, .limit = c->clip_qkv};
    return espi_op_clamp_fwd(pass->ctx, pass->arena, &clamp);
}

/* The keys and values that the queries see: this batch's, or the cache with this batch's behind. */
static esp_status keys_and_values(const void **k, const void **v, espi_pass *pass, int64_t layer, const espi_attention_saved *saved) {
    *k = saved->k.out;
    *v = saved->v.out;
    if (!pass->cache) return ESP_OK;
    const espi_config *c = &pass->model->config;
    const int64_t width = c->kv_heads * c->head_dim;
    const size_t plane = (size_t)(pass->cache->rows * width) * pass->ctx->act_size;
    const espi_kv_append append = {.k_cache = (char *)pass->cache->k + plane * (size_t)layer,
                                   .v_cache = (char *)pass->cache->v + plane * (size_t)layer,
                                   .k = *k,
                                   .v = *v,
                                   .spans = pass->spans,
                                   .width = width};
    *k = append.k_cache;
    *v = append.v_cache;
    return espi_op_kv_append(pass->ctx, pass->arena, &append);
}

esp_status espi_attention_forward(espi_pass *pass, int64_t layer, void *y, const void *x, espi_attention_saved *saved) {
    const espi_config *c = &pass->model->config;
    const espi_layer *w = &pass->model->layers[layer];
    const int64_t t = pass->tokens, nq = c->heads * c->head_dim, nk = c->kv_heads * c->head_dim;
    *saved = (espi_attention_saved){0};
    ESPI_TRY(take_projection(pass, &w->q, c->qk_norm, c->heads, &saved->q));
    ESPI_TRY(take_projection(pass, &w->k, c->qk_norm, c->kv_heads, &saved->k));
    ESPI_TRY(take_projection(pass, &w->v, false, c->kv_heads, &saved->v));
    ESPI_TRY(espi_take_act(pass, t * nq, &saved->out));
    ESPI_TRY(espi_take_real(pass, t * c->heads, &saved->lse));
    ESPI_TRY(espi_linear_take_saved(pass, &w->o, &saved->u_o));

    ESPI_TRY(project(pass, layer, "q_norm", x, &w->q, w->q_norm, c->heads, &saved->q));
    ESPI_TRY(project(pass, layer, "k_norm", x, &w->k, w->k_norm, c->kv_heads, &saved->k));
    ESPI_TRY(project(pass, layer, "", x, &w->v, NULL, c->kv_heads, &saved->v));
    ESPI_TRY(rotate(pass, saved->q.out, c->heads));
    ESPI_TRY(rotate(pass, saved->k.out, c->kv_heads));
    espi_probe(pass, "q", layer, saved->q.out, t, nq);
    espi_probe(pass, "k", layer, saved->k.out, t, nk);
    espi_probe(pass, "v", layer, saved->v.out, t, nk);

    const void *k, *v;
    ESPI_TRY(keys_and_values(&k, &v, pass, layer, saved));
    const espi_attention_fwd args = {.out = saved->out,
                                     .lse = saved->lse,
                                     .q = saved->q.out,
                                     .k = k,
                                     .v = v,
                                     .sinks = w->sinks,
                                     .window = c->window[layer],
                                     .spans = pass->spans,
                                     .heads = c->heads,
                                     .kv_heads = c->kv_heads,
                                     .head_dim = c->head_dim,
                                     .scale = 1.0 / sqrt((double)c->head_dim)};
    ESPI_TRY(espi_op_attention_fwd(pass->ctx, pass->arena, &args));
    espi_probe_real(pass, "lse", layer, saved->lse, t, c->heads);
    espi_probe(pass, "attn", layer, saved->out, t, nq);
    return espi_linear_forward(pass, y, saved->u_o, saved->out, &w->o);
}
