/* Backward of route.  Twin: forward/route.c. */
#include "contract/route.h"

esp_status espi_route_backward(espi_pass *pass, int64_t layer, void *d_x, const void *d_weight, const void *x, const espi_router *router,
                               const espi_route_saved *saved) {
    const espi_mark mark = espi_arena_mark(pass->arena);
    void *d_logits;
    ESPI_TRY(espi_take_real(pass, pass->tokens * router->w.rows, &d_logits));
    const espi_router_bwd args = {.d_x = d_x,
                                  .d_w = router->d_w,
                                  .d_logits = d_logits,
                                  .d_weight = d_weight,
                                  .logits = saved->logits,
                                  .lse = saved->lse,
                                  .weight = saved->weight,
                                  .x = x,
                                  .idx = saved->idx,
                                  .w = router->w,
                                  .tokens = pass->tokens,
                                  .top_k = router->top_k,
                                  .rule = router->rule,
                                  .aux_counts = pass->aux_counts,
                                  .aux_coef = pass->aux_coef,
                                  .z_coef = pass->z_coef};
    ESPI_TRY(espi_op_router_bwd(pass->ctx, pass->arena, &args));
    espi_probe_real(pass, "d_topk_w", layer, d_weight, pass->tokens, router->top_k);
    espi_probe_real(pass, "d_router_logits", layer, d_logits, pass->tokens, router->w.rows);
    espi_arena_release(pass->arena, mark);
    return ESP_OK;
}
