/* Backward of attention.  Twin: forward/attention.c. */
#include "contract/attention.h"

#include <math.h>

static esp_status rotate_back(espi_pass *pass, void *d_x, int64_t heads) {
    const espi_rope args = espi_rope_of(pass, d_x, heads);
    return espi_op_rope_bwd(pass->ctx, pass->arena, &args);
}

/* d real [T,heads*D] is used up: limits and norm are undone in it, then the projection. */
static esp_status project_back(espi_pass *pass, void *d_x, bool accumulate, void *d, const void *x, const espi_linear *linear,
                               const float *norm, int64_t heads, const espi_projection_saved *saved) {
    const espi_config *c = &pass->model->config;
    const int64_t width = heads * c->head_dim, n = c->whole_qk_norm ? width : c->head_dim;
    if (saved->free) {
        const espi_clamp_bwd clamp = {.d_x = d, .d_y = d, .x = saved->free, .n = pass->tokens * width, .limit = c->clip_qkv};
        ESPI_TRY(espi_op_clamp_bwd(pass->ctx, pass->arena, &clamp));
    }
    if (norm) ESPI_TRY(espi_norm_backward(pass, d, d, NULL, saved->raw, saved->rstd, norm, pass->tokens * width / n, n));
    return espi_linear_backward(pass, d_x, accumulate, d, x, saved->u, linear);
}

esp_status espi_attention_backward(espi_pass *pass, int64_t layer, void *d_x, const void *d_y, const void *x,
                                   const espi_attention_saved *saved) {
    const espi_config *c = &pass->model->config;
    const espi_layer *w = &pass->model->layers[layer];
    const int64_t t = pass->tokens, nq = c->heads * c->head_dim, nk = c->kv_heads * c->head_dim;
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *d_out, *d_q, *d_k, *d_v;
    ESPI_TRY(espi_take_act(pass, t * nq, &d_out));
    ESPI_TRY(espi_take_act(pass, t * nq, &d_q));
    ESPI_TRY(espi_take_act(pass, t * nk, &d_k));
    ESPI_TRY(espi_take_act(pass, t * nk, &d_v));
    ESPI_TRY(espi_linear_backward(pass, d_out, false, d_y, saved->out, saved->u_o, &w->o));
    espi_probe(pass, "d_attn", layer, d_out, t, nq);
    const espi_attention_bwd args = {.d_q = d_q,
                                     .d_k = d_k,
                                     .d_v = d_v,
                                     .d_sinks = w->d_sinks,
                                     .d_out = d_out,
                                     .q = saved->q.out,
                                     .k = saved->k.out,
                                     .v = saved->v.out,
                                     .out = saved->out,
                                     .lse = saved->lse,
                                     .sinks = w->sinks,
                                     .window = c->window[layer],
                                     .spans = pass->spans,
                                     .heads = c->heads,
                                     .kv_heads = c->kv_heads,
                                     .head_dim = c->head_dim,
                                     .scale = 1.0 / sqrt((double)c->head_dim)};
    ESPI_TRY(espi_op_attention_bwd(pass->ctx, pass->arena, &args));
    espi_probe(pass, "d_q", layer, d_q, t, nq);
    espi_probe(pass, "d_k", layer, d_k, t, nk);
    espi_probe(pass, "d_v", layer, d_v, t, nk);
    ESPI_TRY(rotate_back(pass, d_q, c->heads));
    ESPI_TRY(rotate_back(pass, d_k, c->kv_heads));
    ESPI_TRY(project_back(pass, d_x, false, d_q, x, &w->q, w->q_norm, c->heads, &saved->q));
    ESPI_TRY(project_back(pass, d_x, true, d_k, x, &w->k, w->k_norm, c->kv_heads, &saved->k));
    ESPI_TRY(project_back(pass, d_x, true, d_v, x, &w->v, NULL, c->kv_heads, &saved->v));
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}
