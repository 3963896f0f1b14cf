/* The sampler on the model: its memory, planned to the byte, and the passes.  What runs in which pass is sampler_generate.c's. */
#include "rl/sampler.h"

#include "contract/head.h"

#include <stdlib.h>

/* A GPU is not filled by the few prompts of one length that a CPU prefills at a time. */
enum { DEFAULT_SEQUENCES = 128, DEFAULT_LENGTH_CAP = 4096, DEVICE_PASS_TOKENS = 4096 };

static int64_t kv_width(const esp_model *model) {
    return model->config.kv_heads * model->config.head_dim;
}

esp_status espi_sampler_draw(esp_sampler *s, espi_arena *arena, int32_t n, double temperature, const espi_head_filter *filter) {
    const esp_model *m = s->model;
    const espi_sampler_arrays *host = &s->host, *device = &s->device;
    const size_t ints = (size_t)n * sizeof(int32_t);
    const bool filtered = espi_filters(filter);
    espi_head_sample args = {
        .head = {.hidden = s->hidden, .rows = device->row, .w = m->head, .n = n, .temperature = temperature, .logit_scale = 1.0},
        .token = device->token,
        .lp = device->lp,
        .uniform = device->uniform,
        .filter = *filter,
        .kept_most = s->kept_most};
    if (filtered) {
        args.kept = device->kept;
        args.kept_count = device->kept_count;
    }
    if (!arena->dry) {
        ESPI_TRY(espi_ctx_put(m->ctx, device->row, host->row, ints));
        ESPI_TRY(espi_ctx_put(m->ctx, device->uniform, host->uniform, (size_t)n * sizeof *host->uniform));
    }
    ESPI_TRY(espi_op_head_sample(m->ctx, arena, &args));
    if (arena->dry) return ESP_OK;
    if (filtered) {
        ESPI_TRY(espi_ctx_get(m->ctx, host->kept, device->kept, ints * (size_t)s->kept_most));
        ESPI_TRY(espi_ctx_get(m->ctx, host->kept_count, device->kept_count, ints));
    }
    ESPI_TRY(espi_ctx_get(m->ctx, host->token, device->token, ints));
    return espi_ctx_get(m->ctx, host->lp, device->lp, (size_t)n * m->ctx->real_size);
}

/* What the ops of a pass read of the spans. */
static esp_status put_spans(const esp_sampler *s, int64_t tokens, int32_t n_seqs) {
    const espi_sampler_arrays *host = &s->host, *device = &s->device;
    const size_t size = sizeof(int32_t), t = (size_t)tokens * size, n = (size_t)n_seqs * size;
    esp_ctx *ctx = s->model->ctx;
    espi_positions(host->positions,
                   &(espi_spans){.cu_q = host->cu, .k_len = host->k_len, .prefix_len = host->prefix_len, .n_seqs = n_seqs});
    ESPI_TRY(espi_ctx_put(ctx, device->ids, host->ids, t));
    ESPI_TRY(espi_ctx_put(ctx, device->positions, host->positions, t));
    ESPI_TRY(espi_ctx_put(ctx, device->cu, host->cu, n + size));
    ESPI_TRY(espi_ctx_put(ctx, device->k_start, host->k_start, n));
    ESPI_TRY(espi_ctx_put(ctx, device->k_len, host->k_len, n));
    ESPI_TRY(espi_ctx_put(ctx, device->prefix_start, host->prefix_start, n));
    return espi_ctx_put(ctx, device->prefix_len, host->prefix_len, n);
}

esp_status espi_sampler_extend(esp_sampler *s, espi_arena *arena, int64_t tokens, int32_t n_seqs, bool routes) {
    const espi_sampler_arrays *device = &s->device;
    const espi_config *c = &s->model->config;
    const espi_spans spans = {.cu_q = device->cu,
                              .k_start = device->k_start,
                              .k_len = device->k_len,
                              .prefix_start = device->prefix_start,
                              .prefix_len = device->prefix_len,
                              .n_seqs = n_seqs,
                              .tokens = tokens};
    const espi_routes kept = {.kept = s->record, .chosen = device->chosen}; /* whether they are read or not: one plan for both */
    if (!arena->dry) ESPI_TRY(put_spans(s, tokens, n_seqs));
    ESPI_TRY(espi_decoder_extend(s->model, arena, s->hidden, &s->cache, &kept, device->ids, device->positions, &spans, tokens));
    if (!routes || arena->dry) return ESP_OK;
    return espi_ctx_get(s->model->ctx, s->host.chosen, device->chosen, (size_t)(c->layers * tokens * c->top_k) * sizeof(int32_t));
}

static int64_t cache_rows(const esp_sampler *s) {
    if (s->completion == 0) return s->sequences * s->length;
    return s->sequences * s->completion + s->prompts * (s->length - s->completion);
}

static esp_status take_arrays(esp_sampler *s, espi_arena *arena) {
    const esp_model *m = s->model;
    const espi_config *c = &m->config;
    const size_t n = (size_t)s->sequences, t = (size_t)s->pass_tokens, size = sizeof(int32_t);
    espi_sampler_arrays *host = &s->host, *device = &s->device;
    ESPI_TRY(espi_arena_take_shared(arena, t * size, &host->ids, &device->ids));
    ESPI_TRY(espi_arena_take_shared(arena, t * size, &host->positions, &device->positions));
    ESPI_TRY(espi_arena_take_shared(arena, (n + 1) * size, &host->cu, &device->cu));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->k_start, &device->k_start));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->k_len, &device->k_len));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->prefix_start, &device->prefix_start));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->prefix_len, &device->prefix_len));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->row, &device->row));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->token, &device->token));
    ESPI_TRY(espi_arena_take_shared(arena, n * sizeof(double), &host->uniform, &device->uniform));
    ESPI_TRY(espi_arena_take_shared(arena, n * m->ctx->real_size, &host->lp, &device->lp));
    ESPI_TRY(espi_arena_take_shared(arena, n * (size_t)s->kept_most * size, &host->kept, &device->kept));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->kept_count, &device->kept_count));
    if (!s->record) return ESP_OK;
    const size_t routed = (size_t)(c->layers * c->top_k);
    ESPI_TRY(espi_arena_take_shared(arena, routed * t * size, &host->chosen, &device->chosen));
    return espi_arena_take_host(arena, routed * (size_t)s->length * (size_t)espi_route_bytes(c), &s->routes);
}

/* Takes cache and work arrays, then walks the dearest passes when the arena is dry. */
static esp_status lay_out(esp_sampler *s, espi_arena *arena) {
    const esp_model *m = s->model;
    const int64_t rows = cache_rows(s);
    const size_t plane = (size_t)(m->config.layers * rows * kv_width(m)) * m->ctx->act_size;
    s->cache = (espi_kv_cache){.rows = arena->dry ? 0 : rows};
    ESPI_TRY(espi_arena_take(arena, plane, &s->cache.k));
    ESPI_TRY(espi_arena_take(arena, plane, &s->cache.v));
    ESPI_TRY(take_arrays(s, arena));
    ESPI_TRY(espi_arena_take(arena, (size_t)(s->pass_tokens * m->config.hidden) * m->ctx->act_size, &s->hidden));
    if (!arena->dry) return ESP_OK;
    const espi_mark mark = espi_arena_mark(arena);
    const double temperature[] = {1, 1, 0}, top_p[] = {0, 0.5, 0};
    ESPI_TRY(espi_sampler_extend(s, arena, s->pass_tokens, (int32_t)s->sequences, s->record));
    for (int i = 0; i < 3; i++) {
        ESPI_TRY(espi_sampler_draw(s, arena, (int32_t)s->sequences, temperature[i], &(espi_head_filter){.top_p = top_p[i]}));
        espi_arena_release(arena, mark);
    }
    return ESP_OK;
}

static esp_status read_config(esp_sampler *s, const esp_sampler_config *config) {
    esp_sampler_config c;
    ESPI_TRY(espi_struct_read(&c, sizeof c, config, "esp_sampler_config"));
    const espi_config *m = &s->model->config;
    const int64_t context = m->max_position;
    if (c.max_sequences < 0 || c.max_length < 0 || c.max_length > context || c.max_kept < 0)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "sampler: got max_sequences %d, max_length %d and max_kept %d, expected positive numbers (0 = default) and a "
                         "length of at most the model's context, %lld",
                         c.max_sequences, c.max_length, c.max_kept, (long long)context);
    s->sequences = c.max_sequences ? c.max_sequences : DEFAULT_SEQUENCES;
    s->length = c.max_length ? c.max_length : (context < DEFAULT_LENGTH_CAP ? context : DEFAULT_LENGTH_CAP);
    s->kept_most = c.max_kept ? c.max_kept : ESPI_SAMPLER_KEPT;
    if (s->kept_most > m->vocab) s->kept_most = m->vocab;
    s->record = c.record_routes;
    s->completion = c.max_new_tokens;
    s->prompts = c.max_prompts ? c.max_prompts : s->sequences;
    if (s->completion < 0 || s->completion >= s->length || s->prompts < 0 || s->prompts > s->sequences)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "sampler: got max_new_tokens %d and max_prompts %d, expected fewer tokens than max_length, %lld, and at most as "
                         "many prompts as sequences, %lld (0 = whatever is asked for)",
                         c.max_new_tokens, c.max_prompts, (long long)s->length, (long long)s->sequences);
    if (s->prompts < s->sequences && s->completion == 0)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "sampler: got max_prompts %d without max_new_tokens, expected both: prompts have rows of their own then, of "
                         "max_length - max_new_tokens tokens",
                         c.max_prompts);
    return ESP_OK;
}

static esp_status plan(esp_sampler *s, esp_model *model, const esp_sampler_config *config, espi_extent *room) {
    s->model = model;
    ESPI_TRY(read_config(s, config));
    s->pass_tokens = s->sequences + (s->sequences > s->length ? s->sequences : s->length);
    if (model->ctx->device && s->pass_tokens < DEVICE_PASS_TOKENS) s->pass_tokens = DEVICE_PASS_TOKENS;
    if (s->sequences > INT32_MAX / s->length || s->pass_tokens > INT32_MAX / model->config.top_k)
        return ESPI_FAIL(ESP_ERR_ARG, "sampler: got %lld sequences of up to %lld tokens, expected at most %d cache rows: lower one of them",
                         (long long)s->sequences, (long long)s->length, INT32_MAX);
    espi_arena dry = espi_ctx_dry(model->ctx);
    const bool on = model->adapter_on;
    model->share.most_tokens = s->pass_tokens; /* on every rank */
    model->adapter_on = true;                  /* the dearer case */
    const esp_status status = lay_out(s, &dry);
    model->adapter_on = on;
    *room = espi_arena_high(&dry);
    return status;
}

esp_status esp_sampler_plan(esp_model *model, const esp_sampler_config *config, size_t *bytes) {
    if (!model || !bytes) return ESPI_FAIL(ESP_ERR_ARG, "esp_sampler_plan: model or bytes is NULL, expected both");
    esp_sampler s = {0};
    espi_extent room = {0};
    const esp_status status = plan(&s, model, config, &room);
    *bytes = room.main;
    return status;
}

static esp_status build(esp_sampler *s, esp_model *model, const esp_sampler_config *config) {
    espi_extent extent;
    ESPI_TRY(plan(s, model, config, &extent));
    s->live = calloc((size_t)s->sequences, sizeof *s->live);
    s->taken = calloc((size_t)s->sequences, sizeof *s->taken);
    s->users = calloc((size_t)s->prompts, sizeof *s->users);
    if (!s->live || !s->taken || !s->users)
        return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the bookkeeping of %lld sequences", (long long)s->sequences);
    ESPI_TRY(espi_room_take(&s->room, model->ctx, ESPI_MEM_CACHE, extent));
    s->arena = espi_room_arena(&s->room, model->ctx);
    return lay_out(s, &s->arena);
}

esp_status esp_sampler_create(esp_sampler **sampler, esp_model *model, const esp_sampler_config *config) {
    if (!sampler || !model) return ESPI_FAIL(ESP_ERR_ARG, "esp_sampler_create: sampler or model is NULL, expected both");
    *sampler = NULL;
    esp_sampler *s = calloc(1, sizeof *s);
    if (!s) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a sampler's bookkeeping");
    s->model = model;
    const esp_status status = build(s, model, config);
    if (status != ESP_OK) {
        esp_sampler_destroy(s);
        return status;
    }
    *sampler = s;
    return ESP_OK;
}

void esp_sampler_destroy(esp_sampler *sampler) {
    if (!sampler) return;
    espi_room_free(&sampler->room, sampler->model->ctx);
    free(sampler->live);
    free(sampler->taken);
    free(sampler->users);
    free(sampler);
}
