/* Forward of route.  Twin: backward/route.c. */
#include "contract/route.h"

#include <stdlib.h>
#include <string.h>

esp_status espi_route_take_saved(espi_pass *pass, int64_t layer, const espi_router *router, espi_route_saved *saved) {
    const int64_t t = pass->tokens, e = router->w.rows, slots = t * router->top_k;
    int32_t *offsets, *row_token, *slot_row;
    void *row_weight;
    ESPI_TRY(espi_take_real(pass, t * e, &saved->logits));
    ESPI_TRY(espi_take_real(pass, t, &saved->lse));
    if (pass->routes.kept)
        saved->idx = pass->routes.chosen ? pass->routes.chosen + layer * slots : NULL;
    else
        ESPI_TRY(espi_arena_take(pass->arena, (size_t)slots * sizeof(int32_t), &saved->idx));
    ESPI_TRY(espi_take_real(pass, slots, &saved->weight));
    ESPI_TRY(espi_arena_take(pass->arena, (size_t)(e + 1) * sizeof(int32_t), &offsets));
    ESPI_TRY(espi_arena_take(pass->arena, (size_t)slots * sizeof(int32_t), &row_token));
    ESPI_TRY(espi_arena_take(pass->arena, (size_t)slots * sizeof(int32_t), &slot_row));
    ESPI_TRY(espi_take_real(pass, slots, &row_weight));
    saved->routing = (espi_routing){.tokens = t,
                                    .experts = e,
                                    .top_k = router->top_k,
                                    .offsets = offsets,
                                    .row_token = row_token,
                                    .slot_row = slot_row,
                                    .row_weight = row_weight};
    return ESP_OK;
}

static int32_t id_at(const void *routed, int32_t bytes, int64_t i) {
    return bytes == 1 ? ((const uint8_t *)routed)[i] : ((const uint16_t *)routed)[i];
}

static void set_id(void *routed, int32_t bytes, int64_t i, int32_t id) {
    if (bytes == 1)
        ((uint8_t *)routed)[i] = (uint8_t)id;
    else
        ((uint16_t *)routed)[i] = (uint16_t)id;
}

static int32_t all_ones(int32_t bytes) {
    return bytes == 1 ? UINT8_MAX : UINT16_MAX;
}

/* The k recorded ids from `at` on, ascending; -1 where they are all ones. */
static void read_ids(int32_t *ids, const void *routed, int32_t bytes, int64_t at, int64_t k) {
    for (int64_t j = 0; j < k; j++) {
        const int32_t stored = id_at(routed, bytes, at + j), id = stored == all_ones(bytes) ? -1 : stored;
        int64_t to = j;
        for (; to > 0 && ids[to - 1] > id; to--) ids[to] = ids[to - 1];
        ids[to] = id;
    }
}

/* Where a layer's part of [T,L,K] begins. */
static int64_t part_of(const espi_config *c, int64_t token, int64_t layer) {
    return (token * c->layers + layer) * c->top_k;
}

void espi_routes_write(void *record, const espi_config *c, int64_t layer, const int32_t *idx, int64_t tokens) {
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t k = 0; k < c->top_k; k++) set_id(record, espi_route_bytes(c), part_of(c, t, layer) + k, idx[t * c->top_k + k]);
}

esp_status espi_route_forward(espi_pass *pass, int64_t layer, const void *x, const espi_router *router, const espi_route_saved *saved) {
    const espi_routing *r = &saved->routing;
    const espi_router_fwd route = {.logits = saved->logits,
                                   .lse = saved->lse,
                                   .idx = saved->idx,
                                   .weight = saved->weight,
                                   .counts = pass->router_counts,
                                   .p_sum = pass->router_p_sum,
                                   .z_sum = pass->router_z_sum,
                                   .forced = pass->routes.forced ? saved->idx : NULL,
                                   .flips = pass->routes.forced ? pass->routes.flips : NULL,
                                   .x = x,
                                   .w = router->w,
                                   .bias = router->bias,
                                   .correction = router->correction,
                                   .tokens = pass->tokens,
                                   .top_k = router->top_k,
                                   .rule = router->rule};
    ESPI_TRY(espi_op_router_fwd(pass->ctx, pass->arena, &route));
    /* The routing's arrays are read-only to everybody but this, their writer. */
    const espi_dispatch sort = {.offsets = (int32_t *)r->offsets,
                                .row_token = (int32_t *)r->row_token,
                                .slot_row = (int32_t *)r->slot_row,
                                .row_weight = (void *)r->row_weight,
                                .idx = saved->idx,
                                .weight = saved->weight,
                                .tokens = pass->tokens,
                                .experts = r->experts,
                                .top_k = r->top_k};
    ESPI_TRY(espi_op_dispatch(pass->ctx, pass->arena, &sort));
    espi_probe_real(pass, "router_logits", layer, saved->logits, pass->tokens, r->experts);
    espi_probe_i32(pass, "topk_idx", layer, saved->idx, pass->tokens, r->top_k);
    espi_probe_real(pass, "topk_w", layer, saved->weight, pass->tokens, r->top_k);
    return ESP_OK;
}

static bool has_experts(const esp_model *model, int64_t layer) {
    return model->layers[layer].mlp == ESPI_MLP_MOE;
}

/* One token in one layer; ids: K of work memory.  *native: all ones. */
static esp_status check_ids(bool *native, int32_t *ids, const esp_model *model, const esp_batch *b, int64_t t, int64_t layer) {
    const espi_config *c = &model->config;
    read_ids(ids, b->routed_experts, b->routed_bytes, part_of(c, t, layer), c->top_k);
    *native = ids[c->top_k - 1] < 0;
    if (*native) return ESP_OK;
    if (ids[0] < 0)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "routed_experts: token %lld, layer %lld: some of its %lld ids are all ones (%d), expected all of them or none",
                         (long long)t, (long long)layer, (long long)c->top_k, all_ones(b->routed_bytes));
    for (int64_t k = 0; k < c->top_k; k++) {
        if (ids[k] >= c->experts)
            return ESPI_FAIL(ESP_ERR_ARG,
                             "routed_experts: token %lld, layer %lld: got expert %d, expected 0 to %lld, or all ones (%d) for all %lld: "
                             "were they recorded on this model?",
                             (long long)t, (long long)layer, ids[k], (long long)c->experts - 1, all_ones(b->routed_bytes),
                             (long long)c->top_k);
        if (k > 0 && ids[k] == ids[k - 1])
            return ESPI_FAIL(ESP_ERR_ARG, "routed_experts: token %lld, layer %lld: got expert %d twice, expected %lld different ones",
                             (long long)t, (long long)layer, ids[k], (long long)c->top_k);
    }
    return ESP_OK;
}

static esp_status check_sizes(const esp_model *model, const esp_batch *b) {
    const espi_config *c = &model->config;
    const int64_t expected = b->n_tokens * c->layers * c->top_k;
    if (b->n_routed != expected)
        return ESPI_FAIL(ESP_ERR_SHAPE,
                         "routed_experts, record_experts: got n_routed %lld, expected %lld: %lld tokens in %lld layers, %lld experts each "
                         "(prompts too, and all ones for the last token of a sequence)",
                         (long long)b->n_routed, (long long)expected, (long long)b->n_tokens, (long long)c->layers, (long long)c->top_k);
    if (b->routed_bytes != espi_route_bytes(c))
        return ESPI_FAIL(ESP_ERR_SHAPE,
                         "routed_experts, record_experts: got elements of %d bytes, expected %d: this model has %lld experts",
                         b->routed_bytes, espi_route_bytes(c), (long long)c->experts);
    return ESP_OK;
}

static esp_status check_sequence(int64_t *replayed, int32_t *ids, const esp_model *model, const esp_batch *b, int32_t s) {
    const int64_t last = b->cu_seqlens[s + 1] - 1;
    const bool prefix = espi_is_prefix(b, s);
    for (int64_t t = b->cu_seqlens[s]; t <= last; t++)
        for (int64_t l = 0; l < model->config.layers; l++) {
            bool native = true;
            if (has_experts(model, l)) ESPI_TRY(check_ids(&native, ids, model, b, t, l));
            *replayed += !native;
            if (!native && t == last && !prefix)
                return ESPI_FAIL(ESP_ERR_ARG,
                                 "routed_experts: the last token of sequence %d (token %lld, layer %lld) has experts, expected all ones: "
                                 "that token was never fed back, so these are likely those of the tokens before, moved by one",
                                 s, (long long)t, (long long)l);
        }
    return ESP_OK;
}

esp_status espi_routes_check(int64_t *replayed, const esp_model *model, const esp_batch *batch) {
    *replayed = 0;
    if (!batch->routed_experts && !batch->record_experts && batch->n_routed == 0) return ESP_OK;
    ESPI_TRY(check_sizes(model, batch));
    if (!batch->routed_experts) return ESP_OK;
    int32_t *ids = malloc((size_t)model->config.top_k * sizeof *ids);
    if (!ids) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the experts of one token");
    esp_status status = ESP_OK;
    for (int32_t s = 0; s < batch->n_seqs && status == ESP_OK; s++) status = check_sequence(replayed, ids, model, batch, s);
    free(ids);
    return status;
}

bool espi_routes_whole(const esp_model *model, const esp_batch *batch, int64_t replayed) {
    int64_t own = batch->n_tokens;
    for (int32_t s = 0; batch->last_follows && s < batch->n_seqs; s++) own -= !espi_is_prefix(batch, s);
    return replayed == own * model->config.moe_layers && (batch->routed_experts || batch->n_tokens == 0);
}

/* The last token of a sequence of n tokens, in one layer; ids: its place. */
static void send_last(int32_t *ids, int64_t n, int64_t k) {
    const int32_t *before = ids - k;
    if (ids[0] != -1 || (n > 1 && before[0] == -1)) return;
    for (int64_t j = 0; j < k; j++) ids[j] = -2 - (n > 1 ? before[j] : (int32_t)j);
}

void espi_routes_read(int32_t *chosen, const esp_model *model, const esp_batch *batch) {
    const espi_config *c = &model->config;
    for (int64_t l = 0; l < c->layers; l++) {
        int32_t *ids = chosen + l * batch->n_tokens * c->top_k;
        if (!has_experts(model, l)) continue;
        for (int64_t t = 0; t < batch->n_tokens; t++)
            read_ids(ids + t * c->top_k, batch->routed_experts, batch->routed_bytes, part_of(c, t, l), c->top_k);
        for (int32_t s = 0; batch->last_follows && s < batch->n_seqs; s++) {
            const int64_t last = batch->cu_seqlens[s + 1] - 1;
            send_last(ids + last * c->top_k, last + 1 - batch->cu_seqlens[s], c->top_k);
        }
    }
}

void espi_routes_count(int32_t *counts, const esp_model *model, const int32_t *chosen, int64_t tokens) {
    const espi_config *c = &model->config;
    memset(counts, 0, (size_t)(c->layers * c->experts) * sizeof *counts);
    for (int64_t l = 0; l < c->layers; l++)
        for (int64_t i = l * tokens * c->top_k; has_experts(model, l) && i < (l + 1) * tokens * c->top_k; i++)
            counts[l * c->experts + (chosen[i] < 0 ? -2 - chosen[i] : chosen[i])]++;
}

void espi_routes_record(const esp_model *model, const esp_batch *batch, const int32_t *chosen) {
    const espi_config *c = &model->config;
    const size_t token = (size_t)(c->layers * c->top_k) * (size_t)espi_route_bytes(c);
    char *record = batch->record_experts;
    memset(record, UINT8_MAX, token * (size_t)batch->n_tokens);
    for (int64_t l = 0; l < c->layers; l++)
        if (has_experts(model, l)) espi_routes_write(record, c, l, chosen + l * batch->n_tokens * c->top_k, batch->n_tokens);
    for (int32_t s = 0; s < batch->n_seqs; s++)
        if (!espi_is_prefix(batch, s)) memset(record + token * (size_t)(batch->cu_seqlens[s + 1] - 1), UINT8_MAX, token);
}
