/* Backward of exchange.  Twin: forward/exchange.c. */
#include "contract/exchange.h"

/* Gradients on the experts' side, of the rows of one round: real [capacity,..] or act. */
typedef struct gradients {
    void *d_out, *weight;        /* as they came */
    void *d_rows, *d_row_weight; /* to go back */
} gradients;

/* The experts as they work for one source: where ranks hold copies, each source's gradients are a sum of their own. */
static espi_experts for_source(const espi_pass *pass, const espi_experts *experts, int source) {
    espi_experts e = *experts;
    if (espi_share_copies(&pass->model->share) == 1) return e;
    const size_t size = pass->ctx->real_size;
    espi_lora *gu = &e.lora_gate_up, *dn = &e.lora_down;
    const int64_t n = e.gate_up.experts * source;
    gu->d_a = espi_row(gu->d_a, n, gu->r * e.gate_up.cols, size);
    gu->d_b = espi_row(gu->d_b, n, gu->r * e.gate_up.rows, size);
    dn->d_a = espi_row(dn->d_a, n, dn->r * e.down.cols, size);
    dn->d_b = espi_row(dn->d_b, n, dn->r * e.down.rows, size);
    return e;
}

static esp_status run(espi_pass *pass, const gradients *g, const espi_experts *experts, const espi_arrivals *a,
                      const espi_experts_saved *saved) {
    const espi_share *share = &pass->model->share;
    const int64_t hidden = experts->down.rows;
    const size_t act = pass->ctx->act_size, real = pass->ctx->real_size;
    for (int m = 0; m < (pass->arena->dry ? 1 : share->spread); m++) {
        int64_t first;
        espi_routing routing = espi_arrivals_of(pass, a, m, &first);
        const espi_experts_saved part = espi_arrivals_saved(pass, experts, saved, first);
        const espi_experts own = for_source(pass, experts, m);
        routing.row_weight = espi_row(g->weight, first, 1, real);
        if (!pass->arena->dry) ESPI_TRY(espi_share_came(pass->ctx, &a->round, m)); /* in rank order, as sums are made */
        ESPI_TRY(espi_experts_backward(pass, espi_row(g->d_rows, first, hidden, act), espi_row(g->d_row_weight, first, 1, real),
                                       espi_row(g->d_out, first, hidden, act), espi_row(saved->x, first, hidden, act), &own, &routing,
                                       &part));
    }
    return ESP_OK;
}

esp_status espi_exchange_backward(espi_pass *pass, int64_t layer, void *d_rows, void *d_row_weight, const void *d_out, const void *x,
                                  const espi_experts *experts, const espi_routing *routing, const espi_experts_saved *saved) {
    const espi_share *share = &pass->model->share;
    const int64_t slots = routing->tokens * routing->top_k, hidden = experts->down.rows;
    const size_t row_bytes = (size_t)hidden * pass->ctx->act_size, real = pass->ctx->real_size;
    const bool dry = pass->arena->dry,
               again = dry || !espi_share_fits(share, saved->counts, espi_share_capacity(share, pass->tokens, routing->top_k));
    const espi_mark mark = espi_arena_mark(pass->arena);
    espi_arrivals a;
    gradients g;
    void *d_sent, *sent;
    ESPI_TRY(espi_arrivals_take(pass, &a, routing->top_k));
    ESPI_TRY(espi_take_act(pass, slots * hidden, &d_sent));
    ESPI_TRY(espi_take_act(pass, slots * hidden, &sent)); /* used where rows come in rounds; room is planned before that is known */
    ESPI_TRY(espi_take_act(pass, a.capacity * hidden, &g.d_out));
    ESPI_TRY(espi_take_act(pass, a.capacity * hidden, &g.d_rows));
    ESPI_TRY(espi_take_real(pass, a.capacity, &g.weight));
    ESPI_TRY(espi_take_real(pass, a.capacity, &g.d_row_weight));
    const espi_rows_take take_d = {.out = d_sent, .x = d_out, .from = routing->row_token, .n = slots, .hidden = hidden};
    const espi_rows_take take = {.out = sent, .x = x, .from = routing->row_token, .n = slots, .hidden = hidden};
    ESPI_TRY(espi_op_rows_take(pass->ctx, pass->arena, &take_d));
    if (again) ESPI_TRY(espi_op_rows_take(pass->ctx, pass->arena, &take));
    if (dry) {
        ESPI_TRY(espi_exchange_run(pass, layer, NULL, experts, &a, saved, false, NULL));
        ESPI_TRY(run(pass, &g, experts, &a, saved));
    } else {
        const espi_row_array rows = {.to = saved->x, .from = sent, .row_bytes = row_bytes};
        const espi_row_array there[] = {{.to = g.d_out, .from = d_sent, .row_bytes = row_bytes},
                                        {.to = g.weight, .from = routing->row_weight, .row_bytes = real}};
        const espi_row_array back[] = {{.to = d_rows, .from = g.d_rows, .row_bytes = row_bytes},
                                       {.to = d_row_weight, .from = g.d_row_weight, .row_bytes = real}};
        esp_status status = ESP_OK;
        espi_round_begin(&a.round, share, saved->counts, a.capacity);
        while (espi_arrivals_next(pass, &a, &status)) {
            if (again) {
                ESPI_TRY(espi_share_send(pass->ctx, share, (espi_place){"rows once more", layer}, &rows, 1, &a.round));
                ESPI_TRY(espi_exchange_run(pass, layer, g.d_rows, experts, &a, saved, false, NULL)); /* the results are not needed */
            }
            ESPI_TRY(espi_share_send(pass->ctx, share, (espi_place){"gradients to the experts", layer}, there, 2, &a.round));
            ESPI_TRY(run(pass, &g, experts, &a, saved));
            ESPI_TRY(espi_share_exchange(pass->ctx, share, (espi_place){"gradients of the rows", layer}, back, 2, &a.round, true));
        }
        ESPI_TRY(status);
    }
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}
