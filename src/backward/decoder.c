/* Backward of decoder.  Twin: forward/decoder.c. */
#include "contract/decoder.h"
#include "core/record.h"

/* The load-balancing loss is E * sum_e F_e P_e with means over all MoE layers and tokens at once; the z-loss is the mean of lse^2. */
static void router_loss_terms(espi_pass *pass, double loss_share, const espi_decoder_saved *saved) {
    const esp_model *model = pass->model;
    const espi_config *c = &model->config;
    const double n = (double)c->moe_layers * (double)pass->tokens;
    if (n == 0 || (model->options.router_aux_coef == 0 && model->options.router_z_coef == 0)) return;
    if (model->options.router_aux_coef != 0) pass->aux_counts = saved->router_counts;
    pass->aux_coef = loss_share * model->options.router_aux_coef * (double)c->experts / (n * n);
    pass->z_coef = loss_share * model->options.router_z_coef / n;
}

/* All of it is run from a recording. */
typedef struct piece {
    espi_pass *pass;
    const espi_decoder_saved *saved;
    const void *d_hidden;
} piece;

static esp_status run(void *user) {
    const piece *p = user;
    espi_pass *pass = p->pass;
    const espi_decoder_saved *saved = p->saved;
    const esp_model *model = pass->model;
    espi_arena *arena = pass->arena;
    const espi_config *c = &model->config;
    const int64_t t = pass->tokens;
    const espi_mark all = espi_arena_mark(arena);
    void *d;
    ESPI_TRY(espi_take_act(pass, t * c->hidden, &d));
    espi_probe(pass, "d_hidden", c->layers, p->d_hidden, t, c->hidden);
    ESPI_TRY(espi_norm_backward(pass, d, p->d_hidden, NULL, saved->h[c->layers], saved->rstd, model->final_norm, t, c->hidden));
    espi_probe(pass, "d_h", c->layers, d, t, c->hidden);
    ESPI_TRY(espi_guests_bring(model, arena, c->layers - 1, -1));
    for (int64_t l = c->layers - 1; l >= 0; l--) {
        ESPI_TRY(espi_guest_enter(model, arena, l));
        const espi_mark mark = espi_arena_mark(arena);
        espi_block_saved again = saved->blocks[l]; /* of a checkpointed layer only what lasts is alive */
        if (l < saved->first_kept) {
            pass->quiet = true;
            ESPI_TRY(espi_block_forward(pass, l, NULL, saved->h[l], &again, true));
            pass->quiet = false;
        }
        /* Below layer 0 there is only the frozen embedding: its gradient is formed for a probe alone. */
        ESPI_TRY(espi_block_backward(pass, l, d, saved->h[l], &again, l > 0 || model->probe));
        espi_arena_release(arena, mark);
        ESPI_TRY(espi_guest_leave(model, arena, l, -1));
    }
    ESPI_TRY(espi_embed_backward(pass, NULL, d)); /* frozen: no table to add to */
    espi_arena_release(arena, all);
    return ESP_OK;
}

esp_status espi_decoder_backward(esp_model *model, espi_arena *arena, const void *d_hidden, double loss_share, espi_decoder_saved *saved) {
    espi_pass pass = {
        .model = model,
        .ctx = model->ctx,
        .arena = arena,
        .tokens = saved->tokens,
        .ids = saved->d_ids,
        .spans = espi_saved_spans(saved),
        .cos = saved->cos,
        .sin = saved->sin,
        .adapter = saved->adapter,
    };
    router_loss_terms(&pass, loss_share, saved);
    piece p = {&pass, saved, d_hidden};
    return espi_recorded(pass.ctx, arena, espi_pass_recordable(&pass), "backward", run, &p);
}
