/* Forward of decoder.  Twin: backward/decoder.c. */
#include "contract/decoder.h"
#include "core/record.h"

#include <stdlib.h>
#include <string.h>

esp_status espi_decoder_saved_create(espi_decoder_saved **saved, const espi_config *config) {
    espi_decoder_saved *s = calloc(1, sizeof *s);
    if (s) {
        s->h = calloc((size_t)config->layers + 1, sizeof *s->h);
        s->blocks = calloc((size_t)config->layers, sizeof *s->blocks);
    }
    if (!s || !s->h || !s->blocks) {
        espi_decoder_saved_free(s);
        return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the bookkeeping of %lld layers", (long long)config->layers);
    }
    *saved = s;
    return ESP_OK;
}

void espi_decoder_saved_free(espi_decoder_saved *saved) {
    if (!saved) return;
    free(saved->h);
    free(saved->blocks);
    free(saved);
}

void espi_positions(int32_t *positions, const espi_spans *s) {
    for (int32_t i = 0; i < s->n_seqs; i++) {
        const int32_t prefix = s->prefix_len ? s->prefix_len[i] : 0, first = prefix + s->k_len[i] - (s->cu_q[i + 1] - s->cu_q[i]);
        for (int32_t t = s->cu_q[i]; t < s->cu_q[i + 1]; t++) positions[t] = first + t - s->cu_q[i];
    }
}

/* cos and sin of this batch's positions. */
static esp_status positions_table(espi_pass *pass) {
    const espi_config *c = &pass->model->config;
    const int64_t half = c->rotary_dim / 2;
    void *cos, *sin;
    ESPI_TRY(espi_take_real(pass, pass->tokens * half, &cos));
    ESPI_TRY(espi_take_real(pass, pass->tokens * half, &sin));
    const espi_rope_table args = {.cos = cos,
                                  .sin = sin,
                                  .positions = pass->positions,
                                  .inv_freq = pass->model->inv_freq,
                                  .factor = c->rope_attention,
                                  .tokens = pass->tokens,
                                  .half = half};
    ESPI_TRY(espi_op_rope_table(pass->ctx, pass->arena, &args));
    pass->cos = cos;
    pass->sin = sin;
    return ESP_OK;
}

/* How many bytes a layer keeps beyond its input and what lasts: found by walking it dry. */
static esp_status kept_bytes(const espi_pass *pass, int64_t layer, size_t *bytes) {
    espi_arena dry = espi_ctx_dry(pass->ctx);
    espi_pass walk = *pass;
    espi_block_saved saved;
    walk.arena = &dry;
    ESPI_TRY(espi_block_take_lasting(&walk, layer, &saved));
    const size_t before = dry.main.used;
    ESPI_TRY(espi_block_forward(&walk, layer, NULL, NULL, &saved, false));
    *bytes = dry.main.used - before;
    return ESP_OK;
}

esp_status espi_decoder_first_kept(int64_t *first, esp_model *model, int64_t tokens) {
    const size_t budget = model->options.activation_budget;
    const espi_pass pass = {.model = model, .ctx = model->ctx, .tokens = tokens, .adapter = model->adapter_on};
    size_t used = 0;
    *first = 0;
    if (budget == 0) return ESP_OK;
    for (int64_t l = model->config.layers - 1; l >= 0; l--) {
        size_t bytes;
        ESPI_TRY(kept_bytes(&pass, l, &bytes));
        used += bytes;
        if (used > budget) {
            *first = l + 1;
            return ESP_OK;
        }
    }
    return ESP_OK;
}

static esp_status final_norm(espi_pass *pass, void *hidden, void *rstd, const void *h) {
    const espi_config *c = &pass->model->config;
    espi_probe(pass, "h", c->layers, h, pass->tokens, c->hidden);
    ESPI_TRY(espi_norm_forward(pass, hidden, rstd, h, pass->model->final_norm, pass->tokens, c->hidden));
    espi_probe(pass, "hidden", c->layers, hidden, pass->tokens, c->hidden);
    return ESP_OK;
}

/* Where the prefix of each sequence lies. */
static void fill_prefixes(int32_t *start, int32_t *len, espi_decoder_saved *saved, const int32_t *prefix_of) {
    for (int32_t s = 0; s < saved->n_seqs; s++) {
        const int32_t p = prefix_of ? prefix_of[s] : -1;
        saved->prefix_of[s] = p;
        start[s] = p >= 0 ? saved->cu[p] : 0;
        len[s] = p >= 0 ? saved->cu[p + 1] - saved->cu[p] : 0;
        saved->prefixed = saved->prefixed || p >= 0;
    }
}

/* The batch's ids, borders, prefixes and positions, in host memory and where the ops read them. */
static esp_status take_batch(espi_pass *pass, const esp_batch *batch, espi_decoder_saved *saved) {
    const size_t t = (size_t)batch->n_tokens, n = (size_t)batch->n_seqs, size = sizeof(int32_t);
    int32_t *positions, *prefix_start, *prefix_len;
    saved->tokens = batch->n_tokens;
    saved->n_seqs = batch->n_seqs;
    saved->prefixed = false;
    ESPI_TRY(espi_arena_take_shared(pass->arena, t * size, &saved->ids, &saved->d_ids));
    ESPI_TRY(espi_arena_take_shared(pass->arena, (n + 1) * size, &saved->cu, &saved->d_cu));
    ESPI_TRY(espi_arena_take_shared(pass->arena, n * size, &saved->k_len, &saved->d_k_len));
    ESPI_TRY(espi_arena_take_host(pass->arena, n * size, &saved->prefix_of));
    ESPI_TRY(espi_arena_take_shared(pass->arena, n * size, &prefix_start, &saved->d_prefix_start));
    ESPI_TRY(espi_arena_take_shared(pass->arena, n * size, &prefix_len, &saved->d_prefix_len));
    ESPI_TRY(espi_arena_take_shared(pass->arena, t * size, &positions, &saved->d_positions));
    if (!pass->arena->dry) {
        saved->cu[0] = 0;
        if (t) memcpy(saved->ids, batch->tokens, t * size);
        if (n) memcpy(saved->cu, batch->cu_seqlens, (n + 1) * size);
        for (size_t i = 0; i < n; i++) saved->k_len[i] = saved->cu[i + 1] - saved->cu[i];
        fill_prefixes(prefix_start, prefix_len, saved, batch->prefix_of);
        espi_positions(positions,
                       &(espi_spans){.cu_q = saved->cu, .k_len = saved->k_len, .n_seqs = batch->n_seqs, .prefix_len = prefix_len});
        ESPI_TRY(espi_ctx_put(pass->ctx, saved->d_ids, saved->ids, t * size));
        ESPI_TRY(espi_ctx_put(pass->ctx, saved->d_cu, saved->cu, (n + 1) * size));
        ESPI_TRY(espi_ctx_put(pass->ctx, saved->d_k_len, saved->k_len, n * size));
        ESPI_TRY(espi_ctx_put(pass->ctx, saved->d_prefix_start, prefix_start, n * size));
        ESPI_TRY(espi_ctx_put(pass->ctx, saved->d_prefix_len, prefix_len, n * size));
        ESPI_TRY(espi_ctx_put(pass->ctx, saved->d_positions, positions, t * size));
    }
    pass->ids = saved->d_ids;
    pass->positions = saved->d_positions;
    pass->spans = espi_saved_spans(saved);
    return ESP_OK;
}

/* Where ranks share the experts and all of them know where their tokens go: the rows of every layer, told once. */
static esp_status tell_counts(espi_pass *pass, const int32_t *chosen) {
    const espi_share *share = &pass->model->share;
    const int64_t layers = pass->model->config.layers;
    const size_t one = (size_t)(layers * share->experts) * sizeof(int32_t);
    if (!espi_share_travels(share)) return ESP_OK;
    int32_t *counts, *mine;
    ESPI_TRY(espi_arena_take_host(pass->arena, (size_t)share->ranks * one, &counts));
    ESPI_TRY(espi_arena_take_host(pass->arena, one, &mine));
    if (pass->arena->dry || !share->routes_known) return ESP_OK;
    espi_routes_count(mine, pass->model, chosen, pass->tokens);
    pass->routes.counts = counts;
    return espi_share_counts_of_all(share, counts, mine, layers);
}

/* Choices of experts that come from the host or go there: in one array, so that nothing of it happens on the way. */
static esp_status take_routes(espi_pass *pass, const esp_batch *batch, int64_t **flips, int32_t **host) {
    const bool kept = batch->n_routed > 0;
    const size_t bytes = (size_t)batch->n_routed * sizeof **host;
    ESPI_TRY(espi_arena_take(pass->arena, sizeof **flips, flips));
    pass->routes = (espi_routes){.kept = kept, .forced = kept && batch->routed_experts, .flips = *flips};
    if (kept) ESPI_TRY(espi_arena_take_shared(pass->arena, bytes, host, &pass->routes.chosen));
    if (!pass->arena->dry) ESPI_TRY(espi_ctx_zero(pass->ctx, *flips, sizeof **flips));
    if (!pass->arena->dry && pass->routes.forced) {
        espi_routes_read(*host, pass->model, batch);
        ESPI_TRY(espi_ctx_put(pass->ctx, pass->routes.chosen, *host, bytes));
    }
    return tell_counts(pass, *host);
}

static esp_status record_routes(const espi_pass *pass, const esp_batch *batch, int32_t *host) {
    if (!batch->record_experts || !pass->routes.kept || pass->arena->dry) return ESP_OK;
    ESPI_TRY(espi_ctx_get(pass->ctx, host, pass->routes.chosen, (size_t)batch->n_routed * sizeof *host));
    espi_routes_record(pass->model, batch, host);
    return ESP_OK;
}

static esp_status take_statistics(espi_pass *pass, espi_decoder_saved *saved) {
    const size_t e = (size_t)pass->model->config.experts;
    ESPI_TRY(espi_arena_take(pass->arena, e * sizeof(int64_t), &saved->router_counts));
    ESPI_TRY(espi_arena_take(pass->arena, e * sizeof(double), &saved->router_p_sum));
    ESPI_TRY(espi_arena_take(pass->arena, sizeof(double), &saved->router_z_sum));
    if (!pass->arena->dry) {
        ESPI_TRY(espi_ctx_zero(pass->ctx, saved->router_counts, e * sizeof(int64_t)));
        ESPI_TRY(espi_ctx_zero(pass->ctx, saved->router_p_sum, e * sizeof(double)));
        ESPI_TRY(espi_ctx_zero(pass->ctx, saved->router_z_sum, sizeof(double)));
    }
    pass->router_counts = saved->router_counts;
    pass->router_p_sum = saved->router_p_sum;
    pass->router_z_sum = saved->router_z_sum;
    return ESP_OK;
}

/* What of a pass is run from a recording: all behind the batch. */
typedef struct training_piece {
    espi_pass *pass;
    espi_decoder_saved *saved;
} training_piece;

static esp_status run_training(void *user) {
    espi_pass *pass = ((training_piece *)user)->pass;
    espi_decoder_saved *saved = ((training_piece *)user)->saved;
    const espi_config *c = &pass->model->config;
    const int64_t t = pass->tokens;
    ESPI_TRY(positions_table(pass));
    saved->cos = (void *)pass->cos;
    saved->sin = (void *)pass->sin;
    ESPI_TRY(espi_take_act(pass, t * c->hidden, &saved->hidden));
    ESPI_TRY(espi_take_real(pass, t, &saved->rstd));
    ESPI_TRY(espi_take_act(pass, t * c->hidden, &saved->h[0]));
    ESPI_TRY(espi_embed_forward(pass, saved->h[0]));
    ESPI_TRY(espi_guests_bring(pass->model, pass->arena, 0, 1));
    for (int64_t l = 0; l < c->layers; l++) {
        ESPI_TRY(espi_guest_enter(pass->model, pass->arena, l));
        ESPI_TRY(espi_take_act(pass, t * c->hidden, &saved->h[l + 1]));
        ESPI_TRY(espi_block_take_lasting(pass, l, &saved->blocks[l]));
        const espi_mark mark = espi_arena_mark(pass->arena);
        ESPI_TRY(espi_block_forward(pass, l, saved->h[l + 1], saved->h[l], &saved->blocks[l], false));
        if (l < saved->first_kept) espi_arena_release(pass->arena, mark);
        ESPI_TRY(espi_guest_leave(pass->model, pass->arena, l, 1));
    }
    return final_norm(pass, saved->hidden, saved->rstd, saved->h[c->layers]);
}

esp_status espi_decoder_forward(esp_model *model, espi_arena *arena, const esp_batch *batch, espi_decoder_saved *saved) {
    const int64_t t = batch->n_tokens;
    espi_pass pass = {.model = model, .ctx = model->ctx, .arena = arena, .tokens = t, .adapter = model->adapter_on};
    int32_t *chosen = NULL;
    saved->adapter = model->adapter_on;
    ESPI_TRY(take_batch(&pass, batch, saved));
    ESPI_TRY(take_statistics(&pass, saved));
    ESPI_TRY(take_routes(&pass, batch, &saved->route_flips, &chosen));
    ESPI_TRY(espi_decoder_first_kept(&saved->first_kept, model, t));
    training_piece piece = {&pass, saved};
    ESPI_TRY(espi_recorded(pass.ctx, arena, espi_pass_recordable(&pass), "forward", run_training, &piece));
    saved->mark = espi_arena_mark(arena);
    return record_routes(&pass, batch, chosen);
}

/* A pass of which nothing is kept but its result. */
typedef struct inference_piece {
    espi_pass *pass;
    void *hidden;
} inference_piece;

static esp_status run_inference(void *user) {
    espi_pass *pass = ((inference_piece *)user)->pass;
    espi_arena *arena = pass->arena;
    const espi_config *c = &pass->model->config;
    const espi_mark all = espi_arena_mark(arena);
    void *h[2], *rstd;
    ESPI_TRY(positions_table(pass));
    ESPI_TRY(espi_take_act(pass, pass->tokens * c->hidden, &h[0]));
    ESPI_TRY(espi_take_act(pass, pass->tokens * c->hidden, &h[1]));
    ESPI_TRY(espi_take_real(pass, pass->tokens, &rstd));
    ESPI_TRY(espi_embed_forward(pass, h[0]));
    ESPI_TRY(espi_guests_bring(pass->model, arena, 0, 1));
    for (int64_t l = 0; l < c->layers; l++) {
        ESPI_TRY(espi_guest_enter(pass->model, arena, l));
        espi_block_saved saved;
        const espi_mark mark = espi_arena_mark(arena);
        ESPI_TRY(espi_block_take_lasting(pass, l, &saved));
        ESPI_TRY(espi_block_forward(pass, l, h[(l + 1) % 2], h[l % 2], &saved, false));
        espi_arena_release(arena, mark);
        ESPI_TRY(espi_guest_leave(pass->model, arena, l, 1));
    }
    ESPI_TRY(final_norm(pass, ((inference_piece *)user)->hidden, rstd, h[c->layers % 2]));
    espi_arena_release(arena, all);
    return ESP_OK;
}

esp_status espi_decoder_extend(esp_model *model, espi_arena *arena, void *hidden, espi_kv_cache *cache, const espi_routes *routes,
                               const int32_t *ids, const int32_t *positions, const espi_spans *spans, int64_t tokens) {
    espi_pass pass = {.model = model,
                      .ctx = model->ctx,
                      .arena = arena,
                      .tokens = tokens,
                      .ids = ids,
                      .positions = positions,
                      .spans = *spans,
                      .cache = cache,
                      .routes = *routes,
                      .adapter = model->adapter_on};
    inference_piece piece = {&pass, hidden};
    return espi_recorded(pass.ctx, arena, espi_pass_recordable(&pass), "inference", run_inference, &piece);
}

esp_status espi_decoder_forward_only(void **hidden, int64_t **flips, esp_model *model, espi_arena *arena, const esp_batch *batch) {
    espi_decoder_saved copy = {0};
    espi_pass pass = {.model = model, .ctx = model->ctx, .arena = arena, .tokens = batch->n_tokens};
    int32_t *chosen = NULL;
    ESPI_TRY(take_routes(&pass, batch, flips, &chosen));
    ESPI_TRY(espi_take_act(&pass, batch->n_tokens * model->config.hidden, hidden));
    const espi_mark mark = espi_arena_mark(arena);
    ESPI_TRY(take_batch(&pass, batch, &copy));
    ESPI_TRY(espi_decoder_extend(model, arena, *hidden, NULL, &pass.routes, pass.ids, pass.positions, &pass.spans, batch->n_tokens));
    espi_arena_release(arena, mark);
    return record_routes(&pass, batch, chosen);
}
