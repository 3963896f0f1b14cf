/* The model level of the public API: load, forward, losses that need nothing but the head, backward. */
#include "core/record.h"
#include "espalier/adapter.h"
#include "models/passes.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static esp_status check_options(const esp_model_config *o) {
    if (o->lora_rank < 0) return ESPI_FAIL(ESP_ERR_ARG, "lora_rank: got %d, expected 1 or more (0 = the default, 8)", o->lora_rank);
    if (!isfinite(o->lora_alpha) || o->lora_alpha < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "lora_alpha: got %g, expected a positive number (0 = twice the rank)", (double)o->lora_alpha);
    if (!isfinite(o->router_aux_coef) || !isfinite(o->router_z_coef))
        return ESPI_FAIL(ESP_ERR_ARG, "router_aux_coef, router_z_coef: got %g, %g, expected finite numbers", (double)o->router_aux_coef,
                         (double)o->router_z_coef);
    if ((unsigned)o->experts > ESP_MXFP4) return ESPI_FAIL(ESP_ERR_ARG, "experts: got %d, expected an esp_qformat", (int)o->experts);
    if ((unsigned)o->mxfp4_rule > ESP_MXFP4_ROUND_UP)
        return ESPI_FAIL(ESP_ERR_ARG, "mxfp4_rule: got %d, expected ESP_MXFP4_OCP or ESP_MXFP4_ROUND_UP", (int)o->mxfp4_rule);
    if (o->lora_targets & ~(unsigned)ESP_LORA_ALL && o->lora_targets != ESP_LORA_NOTHING)
        return ESPI_FAIL(ESP_ERR_ARG, "lora_targets: got %#x, expected a sum of ESP_LORA_ values up to %#x, or ESP_LORA_NOTHING alone",
                         o->lora_targets, ESP_LORA_ALL);
    return ESP_OK;
}

/* The form of the experts in memory: by default NF4, but what a checkpoint has in MXFP4 or FP4 stays as it is. */
static esp_status choose_experts(esp_model_config *o, const espi_config *c) {
    if (o->experts == ESP_Q_DEFAULT) o->experts = c->mxfp4 ? ESP_MXFP4 : c->fp4 ? ESP_FP4 : ESP_NF4;
    if (c->mxfp4 && o->experts != ESP_MXFP4)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "experts: got %s, expected MXFP4 or the default: this checkpoint has its experts in MXFP4, and they are used as "
                         "they are; for another form take the 16-bit checkpoint",
                         o->experts == ESP_Q_NONE ? "none"
                         : o->experts == ESP_NF4  ? "NF4"
                                                  : "FP4");
    if (o->experts == ESP_MXFP4 && (c->hidden % ESPI_MXBLOCK != 0 || c->expert_width % ESPI_MXBLOCK != 0))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "experts: got MXFP4 with hidden size %lld and expert width %lld, expected multiples of %d: choose NF4 or FP4",
                         (long long)c->hidden, (long long)c->expert_width, ESPI_MXBLOCK);
    return ESP_OK;
}

esp_status espi_model_options(esp_model_config *options, espi_lora_spec lora[ESPI_T_COUNT], const esp_model_config *config,
                              const espi_config *c) {
    ESPI_TRY(espi_struct_read(options, sizeof *options, config, "esp_model_config"));
    ESPI_TRY(check_options(options));
    ESPI_TRY(choose_experts(options, c));
    if (options->host_layers < 0 || options->host_layers > c->layers)
        return ESPI_FAIL(ESP_ERR_ARG, "host_layers: got %d, expected 0 to %lld, the layers of the model", options->host_layers,
                         (long long)c->layers);
    if (c->router_sigmoid && (options->router_aux_coef != 0 || options->router_z_coef != 0))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "router_aux_coef, router_z_coef: got %g, %g, expected 0: the router of %s has no softmax to balance",
                         (double)options->router_aux_coef, (double)options->router_z_coef, c->family->name);
    if ((options->experts == ESP_Q_NONE || options->experts == ESP_MXFP4) && options->double_quant)
        return ESPI_FAIL(ESP_ERR_ARG, "double_quant: got true with experts that have no f32 scales, expected NF4 or FP4 experts");
    if (options->adapter_dir)
        return espi_adapter_read_spec(lora, &options->lora_alpha, &options->rslora, options->adapter_dir, c, options->adapter_reading);

    if (options->lora_rank == 0) options->lora_rank = 8;
    if (options->lora_alpha == 0) options->lora_alpha = 2.0f * (float)options->lora_rank;
    if (options->lora_targets == 0) options->lora_targets = ESP_LORA_ALL;
    const double r = options->lora_rank;
    for (int i = 0; i < ESPI_T_COUNT; i++) {
        const bool on = options->lora_targets & (1u << i) && !(options->lora_targets & ESP_LORA_NOTHING);
        lora[i] = (espi_lora_spec){.r = on ? options->lora_rank : 0, .scale = options->lora_alpha / (options->rslora ? sqrt(r) : r)};
    }
    return ESP_OK;
}

/* YaRN's share of the divided frequency at dimension j: 0 below the fast border, 1 above the slow one. */
static double yarn_ramp(const espi_config *c, double j) {
    const double d = (double)c->rotary_dim, per_turn = c->yarn_original / (2 * acos(-1.0)), base = 2 * log(c->rope_theta);
    double low = d * log(per_turn / c->yarn_beta_fast) / base, high = d * log(per_turn / c->yarn_beta_slow) / base;
    if (c->yarn_truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = fmax(low, 0);
    high = fmin(high, d - 1);
    if (low == high) high += 0.001;
    return fmin(fmax((j - low) / (high - low), 0), 1);
}

esp_status espi_rope_frequencies(double **inv_freq, const espi_config *c) {
    const int64_t half = c->rotary_dim / 2;
    double *f = malloc((size_t)half * sizeof *f);
    if (!f) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %lld inverse frequencies", (long long)half);
    for (int64_t j = 0; j < half; j++) {
        const double plain = pow(c->rope_theta, -2.0 * (double)j / (double)c->rotary_dim), divided = plain / c->rope_factor;
        const double ramp = c->yarn ? yarn_ramp(c, (double)j) : 1;
        f[j] = divided * ramp + plain * (1 - ramp);
    }
    *inv_freq = f;
    return ESP_OK;
}

esp_status espi_model_finish(esp_model *m) {
    ESPI_TRY(espi_rope_frequencies(&m->inv_freq, &m->config));
    ESPI_TRY(espi_model_init_adapter(m));
    m->adapter_on = true;
    return espi_decoder_saved_create(&m->saved, &m->config);
}

static esp_status settle(esp_model *m, const char *dir, const esp_model_config *config) {
    ESPI_TRY(espi_config_read(&m->config, dir));
    return espi_model_options(&m->options, m->lora, config, &m->config);
}

/* What changes shapes, calls between ranks, or results. */
static esp_status check_alike(const esp_model *m) {
    const esp_model_config *o = &m->options;
    ESPI_TRY(esp_comm_same(m->ctx->comm, "config.json", &m->config.hash, sizeof m->config.hash));
    for (int i = 0; i < ESPI_T_COUNT; i++) {
        ESPI_TRY(espi_comm_same(m->ctx->comm, "model.lora_rank or model.lora_targets", (uint64_t)m->lora[i].r));
        ESPI_TRY(esp_comm_same(m->ctx->comm, "model.lora_alpha or model.rslora", &m->lora[i].scale, sizeof m->lora[i].scale));
    }
    const struct {
        const char *key;
        uint64_t value;
    } numbers[] = {{"model.experts", o->experts},
                   {"model.mxfp4_rule", o->mxfp4_rule},
                   {"model.double_quant", o->double_quant},
                   {"model.seed", o->seed},
                   {"model.activation_budget", o->activation_budget},
                   {"model.train_router", o->train_router},
                   {"model.adapter_dir (set or not)", o->adapter_dir != NULL},
                   {"model.expert_ranks", (uint64_t)o->expert_ranks},
                   {"model.expert_rows", (uint64_t)o->expert_rows}};
    for (int i = 0; i < ESPI_COUNT(numbers); i++) ESPI_TRY(espi_comm_same(m->ctx->comm, numbers[i].key, numbers[i].value));
    ESPI_TRY(esp_comm_same(m->ctx->comm, "model.router_aux_coef", &o->router_aux_coef, sizeof o->router_aux_coef));
    return esp_comm_same(m->ctx->comm, "model.router_z_coef", &o->router_z_coef, sizeof o->router_z_coef);
}

static esp_status build(esp_model *m, const char *dir) {
    ESPI_TRY(espi_model_load_weights(m, dir));
    return espi_model_finish(m);
}

esp_status esp_model_load(esp_model **model, esp_ctx *ctx, const char *dir, const esp_model_config *config) {
    if (!model || !ctx || !dir) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_load: model, ctx or dir is NULL, expected all three");
    *model = NULL;
    esp_model *m = calloc(1, sizeof *m);
    if (!m) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a model's bookkeeping");
    m->ctx = ctx;
    /* No rank goes on without the others. */
    esp_status status = espi_comm_agree(ctx->comm, (espi_place){"the model's config", -1}, settle(m, dir, config));
    if (status == ESP_OK) status = check_alike(m);
    if (status == ESP_OK) status = espi_comm_agree(ctx->comm, (espi_place){"loading a model", -1}, build(m, dir));
    if (status == ESP_OK && m->options.adapter_dir)
        status = esp_model_load_adapter_as(m, m->options.adapter_dir, m->options.adapter_reading);
    if (status != ESP_OK) {
        esp_model_destroy(m);
        return status;
    }
    m->options.adapter_dir = NULL; /* the caller's string need not outlive the call, nor what goes with it */
    m->options.adapter_reading = NULL;
    *model = m;
    return ESP_OK;
}

static void free_block(esp_ctx *ctx, espi_block *block) {
    espi_ctx_free(ctx, block->purpose, block->p, block->bytes);
    *block = (espi_block){0};
}

void esp_model_destroy(esp_model *model) {
    if (!model) return;
    espi_recordings_free(model->ctx);
    espi_room_free(&model->weights, model->ctx);
    free_block(model->ctx, &model->adapter);
    espi_room_free(&model->room, model->ctx);
    espi_decoder_saved_free(model->saved);
    espi_adapter_names_free(model);
    espi_model_skeleton_free(model);
    free(model->inv_freq);
    espi_config_free(&model->config);
    free(model);
}

esp_status esp_model_info_get(const esp_model *model, esp_model_info *out) {
    if (!model || !out) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_info_get: model or out is NULL");
    const espi_config *c = &model->config;
    esp_model_info info = {.family = c->family->name,
                           .layers = c->layers,
                           .hidden = c->hidden,
                           .heads = c->heads,
                           .kv_heads = c->kv_heads,
                           .head_dim = c->head_dim,
                           .experts = c->experts,
                           .top_k = c->top_k,
                           .expert_width = c->expert_width,
                           .vocab = c->vocab,
                           .max_position = c->max_position,
                           .bos_token_id = c->bos_id,
                           .eos_token_id = c->eos_id,
                           .pad_token_id = c->pad_id,
                           .weight_bytes = model->weights.extent.main + model->weights.extent.host - model->guest_bytes};
    for (int i = 0; i < ESPI_T_COUNT; i++)
        if (model->lora[i].r > info.lora_rank) info.lora_rank = model->lora[i].r;
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        /* Of the whole model: a rank may hold some of the experts only. */
        const int64_t copies = p->rank == 3 ? c->experts * p->dims[2] : 1;
        info.adapter_parameters += copies * (p->rank == 3 ? p->dims[1] : p->dims[0] * p->dims[1]);
    }
    return espi_struct_write(out, &info, sizeof info, "esp_model_info");
}

esp_status esp_model_set_probe(esp_model *model, esp_probe_fn fn, void *user) {
    if (!model) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_set_probe: model is NULL");
    model->probe = fn;
    model->probe_user = user;
    return ESP_OK;
}

esp_status esp_model_adapter_enable(esp_model *model, bool on) {
    if (!model) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_adapter_enable: model is NULL");
    model->adapter_on = on;
    return ESP_OK;
}

/* *before: the tokens of the prefix of sequence s. */
static esp_status check_prefix(int64_t *before, const esp_batch *b, int32_t s) {
    const int32_t p = b->prefix_of ? b->prefix_of[s] : -1;
    *before = 0;
    if (p == -1) return ESP_OK;
    if (p < 0 || p >= s)
        return ESPI_FAIL(ESP_ERR_ARG, "batch.prefix_of[%d]: got %d, expected -1 or a sequence before this one: put prompts first", s, p);
    if (b->prefix_of[p] != -1)
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "batch.prefix_of[%d]: got sequence %d, which has a prefix itself (%d), expected one without: a prefix is one whole "
            "sequence; make one of the two",
            s, p, b->prefix_of[p]);
    *before = b->cu_seqlens[p + 1] - b->cu_seqlens[p];
    return ESP_OK;
}

static esp_status check_batch(const esp_model *model, const esp_batch *b) {
    if (!model || !b) return ESPI_FAIL(ESP_ERR_ARG, "model or batch is NULL");
    /* Routed rows, T*K, are counted in int32. */
    if (b->n_tokens < 0 || b->n_seqs < 0 || b->n_tokens > INT32_MAX || b->n_tokens * model->config.top_k > INT32_MAX)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "batch: got %lld tokens in %d sequences, %lld experts a token, expected 0 or more and at most %d routed rows",
                         (long long)b->n_tokens, b->n_seqs, (long long)model->config.top_k, INT32_MAX);
    if (b->n_tokens == 0 && b->n_seqs == 0) return ESP_OK;
    if (!b->tokens || !b->cu_seqlens) return ESPI_FAIL(ESP_ERR_ARG, "batch: tokens or cu_seqlens is NULL, expected both");
    if (b->cu_seqlens[0] != 0 || b->cu_seqlens[b->n_seqs] != b->n_tokens)
        return ESPI_FAIL(ESP_ERR_ARG, "batch.cu_seqlens: got first %d and last %d, expected 0 and n_tokens = %lld", b->cu_seqlens[0],
                         b->cu_seqlens[b->n_seqs], (long long)b->n_tokens);
    for (int32_t s = 0; s < b->n_seqs; s++) {
        const int64_t n = (int64_t)b->cu_seqlens[s + 1] - b->cu_seqlens[s];
        if (n <= 0) return ESPI_FAIL(ESP_ERR_ARG, "batch: sequence %d has %lld tokens, expected at least 1", s, (long long)n);
        int64_t before;
        ESPI_TRY(check_prefix(&before, b, s));
        if (before + n > model->config.max_position)
            return ESPI_FAIL(ESP_ERR_ARG, "batch: sequence %d has %lld tokens, expected at most the model's context of %lld: shorten it", s,
                             (long long)(before + n), (long long)model->config.max_position);
    }
    for (int64_t t = 0; t < b->n_tokens; t++) {
        if (b->tokens[t] < 0 || b->tokens[t] >= model->config.vocab)
            return ESPI_FAIL(ESP_ERR_ARG, "batch.tokens[%lld]: got id %d, expected 0 to %lld (the vocabulary)", (long long)t, b->tokens[t],
                             (long long)model->config.vocab - 1);
        if (espi_token_refused(&model->config, b->tokens[t]))
            return ESPI_FAIL(ESP_ERR_ARG,
                             "batch.tokens[%lld]: got id %d, which stands for a picture, expected text: this is the text model alone",
                             (long long)t, b->tokens[t]);
    }
    return ESP_OK;
}

static void note_use(esp_model *model) {
    if (model->arena.main.high > model->ctx->activations_used) model->ctx->activations_used = model->arena.main.high;
}

esp_status espi_model_reserve(esp_model *model, const esp_batch *shape, bool training) {
    espi_extent need;
    ESPI_TRY(espi_batch_bytes(&need, model, shape, training));
    const espi_extent have = model->room.extent;
    if (need.main <= have.main && need.host <= have.host) return ESP_OK;
    /* The old block goes first, so that growing never holds two; what it held is lost. */
    espi_room_free(&model->room, model->ctx);
    model->arena = espi_arena_over(NULL, 0);
    model->saved_valid = false;
    model->route_flips = NULL;
    if (need.main < have.main) need.main = have.main;
    if (need.host < have.host) need.host = have.host;
    ESPI_TRY(espi_room_take(&model->room, model->ctx, ESPI_MEM_ACTIVATIONS, need));
    model->arena = espi_room_arena(&model->room, model->ctx);
    return ESP_OK;
}

esp_status esp_model_reserve(esp_model *model, int64_t n_tokens, int32_t n_seqs, bool training) {
    if (!model) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_reserve: model is NULL");
    if (n_tokens < n_seqs || n_seqs < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_model_reserve: got %lld tokens in %d sequences, expected at least one token each",
                         (long long)n_tokens, n_seqs);
    return espi_model_reserve(model, &ESP_BATCH(.n_tokens = n_tokens, .n_seqs = n_seqs), training);
}

/* Makes room for a forward of this batch, and forgets the last one. */
static esp_status forward_begin(esp_model *model, const esp_batch *batch, bool training) {
    model->route_flips = NULL;
    ESPI_TRY(check_batch(model, batch));
    ESPI_TRY(espi_routes_check(&model->routes_replayed, model, batch));
    ESPI_TRY(espi_share_meet(&model->share, batch->n_tokens, espi_routes_whole(model, batch, model->routes_replayed)));
    ESPI_TRY(espi_model_reserve(model, batch, training));
    model->saved_valid = false;
    espi_arena_release(&model->arena, (espi_mark){0});
    return ESP_OK;
}

static void forward_end(esp_model *model, const int64_t *flips, espi_mark mark) {
    model->route_flips = flips;
    model->loss_mark = mark;
    note_use(model);
}

static esp_tensor act_view(const esp_model *model, void *data, int64_t tokens) {
    return esp_tensor_view(data, model->ctx->act, 2, (int64_t[]){tokens, model->config.hidden});
}

esp_status esp_model_forward(esp_model *model, const esp_batch *batch, esp_tensor *hidden) {
    if (!model || !batch || !hidden) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_forward: model, batch or hidden is NULL");
    ESPI_TRY(forward_begin(model, batch, true));
    ESPI_TRY(espi_decoder_forward(model, &model->arena, batch, model->saved));
    forward_end(model, model->saved->route_flips, model->saved->mark);
    model->saved_valid = true;
    *hidden = act_view(model, model->saved->hidden, batch->n_tokens);
    return ESP_OK;
}

esp_status esp_model_forward_only(esp_model *model, const esp_batch *batch, esp_tensor *hidden) {
    if (!model || !batch || !hidden) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_forward_only: model, batch or hidden is NULL");
    ESPI_TRY(forward_begin(model, batch, false));
    void *out;
    int64_t *flips;
    ESPI_TRY(espi_decoder_forward_only(&out, &flips, model, &model->arena, batch));
    forward_end(model, flips, espi_arena_mark(&model->arena));
    *hidden = act_view(model, out, batch->n_tokens);
    return ESP_OK;
}

/* The batch must be the one that the saved tensors came from. */
static esp_status check_saved(const esp_model *model, const esp_batch *batch) {
    const espi_decoder_saved *s = model->saved;
    if (!model->saved_valid)
        return ESPI_FAIL(ESP_ERR_STATE, "esp_model_backward: nothing is saved, expected esp_model_forward() on this batch right before");
    if (batch->n_tokens != s->tokens || batch->n_seqs != s->n_seqs)
        return ESPI_FAIL(ESP_ERR_STATE,
                         "esp_model_backward: got a batch of %lld tokens in %d sequences, expected that of the forward: %lld in %d",
                         (long long)batch->n_tokens, batch->n_seqs, (long long)s->tokens, s->n_seqs);
    for (int32_t q = 0; q < s->n_seqs; q++)
        if ((batch->prefix_of ? batch->prefix_of[q] : -1) != s->prefix_of[q])
            return ESPI_FAIL(ESP_ERR_STATE, "esp_model_backward: prefix_of[%d] is another than the forward had (%d), expected the same", q,
                             s->prefix_of[q]);
    if (batch->n_tokens && (memcmp(batch->tokens, s->ids, (size_t)s->tokens * sizeof *s->ids) != 0 ||
                            memcmp(batch->cu_seqlens, s->cu, ((size_t)s->n_seqs + 1) * sizeof *s->cu) != 0))
        return ESPI_FAIL(ESP_ERR_STATE,
                         "esp_model_backward: got a batch with other tokens or borders than the forward had, expected the same");
    return ESP_OK;
}

esp_status espi_check_hidden(const esp_model *model, const esp_batch *batch, const esp_tensor *hidden, const char *name) {
    if (!hidden) return ESPI_FAIL(ESP_ERR_ARG, "%s is NULL", name);
    if (hidden->dtype != model->ctx->act)
        return ESPI_FAIL(ESP_ERR_DTYPE, "%s: got %s, expected %s as esp_model_forward gives it", name, esp_dtype_name(hidden->dtype),
                         esp_dtype_name(model->ctx->act));
    if (hidden->rank != 2 || hidden->dims[0] != batch->n_tokens || hidden->dims[1] != model->config.hidden)
        return ESPI_FAIL(ESP_ERR_SHAPE, "%s: got rank %d, first dims [%lld, %lld], expected [%lld, %lld]", name, hidden->rank,
                         (long long)hidden->dims[0], (long long)hidden->dims[1], (long long)batch->n_tokens,
                         (long long)model->config.hidden);
    if (hidden->strides[1] != 1 || hidden->strides[0] != hidden->dims[1])
        return ESPI_FAIL(ESP_ERR_SHAPE, "%s: got strides [%lld, %lld], expected a dense row-major tensor", name,
                         (long long)hidden->strides[0], (long long)hidden->strides[1]);
    return ESP_OK;
}

double espi_loss_share(const esp_batch *batch) {
    return batch->step_tokens > 0 ? (double)espi_head_count_rows(batch) / batch->step_tokens : 1.0;
}

/* What this rank's batch added to gradients that belong to all ranks. */
static esp_status add_up(esp_model *model) {
    if (model->n_sums == 0) return ESP_OK;
    ESPI_TRY(espi_share_sum(model->ctx, &model->share, model->sums, model->n_sums, model->sum_scratch, model->sum_values));
    espi_arena none = espi_arena_over(NULL, 0);
    return espi_op_zero(model->ctx, &none, &(espi_zero){.out = model->sums_begin, .bytes = model->sums_bytes});
}

esp_status esp_model_backward(esp_model *model, const esp_batch *batch, const esp_tensor *d_hidden) {
    ESPI_TRY(check_batch(model, batch));
    ESPI_TRY(check_saved(model, batch));
    ESPI_TRY(espi_check_hidden(model, batch, d_hidden, "d_hidden"));
    ESPI_TRY(espi_decoder_backward(model, &model->arena, d_hidden->data, espi_loss_share(batch), model->saved));
    note_use(model);
    return add_up(model);
}

esp_status espi_loss_begin(esp_model *model, const esp_batch *batch, const esp_tensor *hidden, void *d_hidden) {
    ESPI_TRY(check_batch(model, batch));
    ESPI_TRY(espi_check_hidden(model, batch, hidden, "hidden"));
    espi_arena_release(&model->arena, model->loss_mark);
    return d_hidden
               ? espi_arena_take(&model->arena, (size_t)(espi_head_d_rows(batch) * model->config.hidden) * model->ctx->act_size, d_hidden)
               : ESP_OK;
}

void espi_loss_end(esp_model *model, const esp_batch *batch, void *data, esp_tensor *d_hidden) {
    note_use(model);
    if (d_hidden) *d_hidden = act_view(model, data, batch->n_tokens);
}

esp_status esp_model_logprob(esp_model *model, const esp_batch *batch, const esp_tensor *hidden, float temperature, float *logprob,
                             float *entropy) {
    if (!model || !batch || !logprob) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_logprob: model, batch or logprob is NULL");
    if (!(temperature > 0) || !isfinite(temperature))
        return ESPI_FAIL(ESP_ERR_ARG, "temperature: got %g, expected a positive number", (double)temperature);
    ESPI_TRY(espi_loss_begin(model, batch, hidden, NULL));
    const espi_mark mark = espi_arena_mark(&model->arena);
    espi_head_rows rows;
    ESPI_TRY(espi_head_rows_make(&rows, model, &model->arena, batch));
    ESPI_TRY(espi_head_logprob(model, &model->arena, &rows, hidden->data, temperature));
    ESPI_TRY(espi_head_read(model, &model->arena, &rows));
    for (int64_t t = 0; t < batch->n_tokens; t++) {
        logprob[t] = 0;
        if (entropy) entropy[t] = 0;
    }
    for (int64_t i = 0; i < rows.n; i++) {
        logprob[rows.token[i]] = (float)espi_real_get(rows.host.lp, i, model->ctx->real);
        if (entropy) entropy[rows.token[i]] = (float)espi_real_get(rows.host.entropy, i, model->ctx->real);
    }
    espi_arena_release(&model->arena, mark);
    espi_loss_end(model, batch, NULL, NULL);
    return ESP_OK;
}

/* Cross-entropy: every counted token has the same coefficient. */
static esp_status put_coefficients(const esp_model *model, const espi_head_rows *rows, double g) {
    const esp_dtype real = model->ctx->real;
    const size_t reals = (size_t)rows->n * model->ctx->real_size;
    for (int64_t i = 0; i < rows->n; i++) {
        espi_real_set(rows->host.g, i, g, real);
        espi_real_set(rows->host.e, i, 0.0, real);
    }
    ESPI_TRY(espi_ctx_put(model->ctx, rows->g, rows->host.g, reals));
    return espi_ctx_put(model->ctx, rows->e, rows->host.e, reals);
}

esp_status esp_model_cross_entropy(esp_model *model, const esp_batch *batch, const esp_tensor *hidden, double *loss, esp_tensor *d_hidden) {
    if (!model || !batch || !loss) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_cross_entropy: model, batch or loss is NULL");
    void *d = NULL;
    ESPI_TRY(espi_loss_begin(model, batch, hidden, d_hidden ? &d : NULL));
    const espi_mark mark = espi_arena_mark(&model->arena);
    espi_head_rows rows;
    ESPI_TRY(espi_head_rows_make(&rows, model, &model->arena, batch));
    const double tokens = batch->step_tokens > 0 ? batch->step_tokens : (double)rows.n, g = tokens > 0 ? -1.0 / tokens : 0.0;
    rows.e_is_zero = true;
    if (d_hidden) {
        ESPI_TRY(put_coefficients(model, &rows, g));
        ESPI_TRY(espi_head_loss(model, &model->arena, &rows, hidden->data, d, batch->n_tokens, 1.0, true, NULL, NULL));
    } else {
        ESPI_TRY(espi_head_logprob(model, &model->arena, &rows, hidden->data, 1.0));
    }
    ESPI_TRY(espi_ctx_get(model->ctx, rows.host.lp, rows.lp, (size_t)rows.n * model->ctx->real_size));
    *loss = 0;
    for (int64_t i = 0; i < rows.n; i++) *loss += g * espi_real_get(rows.host.lp, i, model->ctx->real);
    espi_arena_release(&model->arena, mark);
    espi_loss_end(model, batch, d, d_hidden);
    return ESP_OK;
}

esp_status esp_model_logits(esp_model *model, const esp_tensor *hidden, float *logits, size_t logits_count) {
    if (!model || !hidden || !logits) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_logits: model, hidden or logits is NULL");
    const esp_batch shape = ESP_BATCH(.n_tokens = hidden->dims[0]);
    ESPI_TRY(espi_check_hidden(model, &shape, hidden, "hidden"));
    const size_t v = (size_t)model->config.vocab, t = (size_t)hidden->dims[0];
    if (logits_count < t * v) return ESPI_FAIL(ESP_ERR_SHAPE, "logits: got room for %zu values, expected T*V = %zu", logits_count, t * v);
    if (t == 0) return ESP_OK;
    espi_arena dry = espi_ctx_dry(model->ctx);
    ESPI_TRY(espi_head_full_logits(model, &dry, NULL, NULL, hidden->dims[0]));
    espi_room room;
    ESPI_TRY(espi_room_take(&room, model->ctx, ESPI_MEM_STAGING, espi_arena_high(&dry)));
    espi_arena arena = espi_room_arena(&room, model->ctx);
    const esp_status status = espi_head_full_logits(model, &arena, logits, hidden->data, hidden->dims[0]);
    espi_room_free(&room, model->ctx);
    return status;
}

esp_status esp_model_router_losses(esp_model *model, double *aux_loss, double *z_loss) {
    if (!model || !aux_loss || !z_loss) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_router_losses: an argument is NULL");
    if (!model->saved_valid) return ESPI_FAIL(ESP_ERR_STATE, "esp_model_router_losses: no forward before, expected esp_model_forward()");
    const espi_decoder_saved *s = model->saved;
    const double n = (double)model->config.moe_layers * (double)s->tokens;
    *aux_loss = *z_loss = 0;
    if (n == 0) return ESP_OK;
    for (int64_t e = 0; e < model->config.experts; e++) {
        int64_t count;
        double p_sum;
        ESPI_TRY(espi_ctx_get(model->ctx, &count, s->router_counts + e, sizeof count));
        ESPI_TRY(espi_ctx_get(model->ctx, &p_sum, s->router_p_sum + e, sizeof p_sum));
        *aux_loss += (double)count / n * (p_sum / n);
    }
    *aux_loss *= (double)model->config.experts;
    ESPI_TRY(espi_ctx_get(model->ctx, z_loss, s->router_z_sum, sizeof *z_loss));
    *z_loss /= n;
    return ESP_OK;
}

esp_status esp_model_route_flips(esp_model *model, int64_t *flips, int64_t *replayed) {
    if (!model || !flips || !replayed) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_route_flips: an argument is NULL");
    if (!model->route_flips)
        return ESPI_FAIL(ESP_ERR_STATE, "esp_model_route_flips: no forward before, expected esp_model_forward() or forward_only()");
    *replayed = model->routes_replayed;
    return espi_ctx_get(model->ctx, flips, model->route_flips, sizeof *flips);
}

int64_t esp_model_param_count(const esp_model *model) {
    return model ? model->n_params : 0;
}

esp_status esp_model_param_get(esp_model *model, int64_t index, esp_param *out) {
    if (!model || !out) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_param_get: model or out is NULL");
    if (index < 0 || index >= model->n_params)
        return ESPI_FAIL(ESP_ERR_ARG, "parameter index: got %lld, expected 0 to %lld", (long long)index, (long long)model->n_params - 1);
    return espi_struct_write(out, &model->params[index], sizeof *out, "esp_param");
}

esp_status esp_model_zero_grad(esp_model *model) {
    if (!model) return ESPI_FAIL(ESP_ERR_ARG, "esp_model_zero_grad: model is NULL");
    const size_t real = model->ctx->real_size;
    espi_arena none = espi_arena_over(NULL, 0);
    if (model->ctx->device) { /* one call for all: they stand behind the parameters */
        size_t parameters, gradients;
        espi_adapter_bytes(&parameters, &gradients, model, real);
        const espi_zero all = {.out = (unsigned char *)model->adapter.p + parameters, .bytes = gradients};
        return espi_op_zero(model->ctx, &none, &all);
    }
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        const esp_tensor view = esp_tensor_view(p->grad, p->dtype, p->rank, p->dims);
        const espi_zero args = {.out = p->grad, .bytes = (size_t)esp_tensor_count(&view) * model->ctx->real_size};
        ESPI_TRY(espi_op_zero(model->ctx, &none, &args));
    }
    for (int64_t l = 0; l < model->config.layers; l++) {
        const espi_zero router = {.out = model->layers[l].d_router, .bytes = (size_t)(model->config.experts * model->config.hidden) * real};
        const espi_zero sinks = {.out = model->layers[l].d_sinks, .bytes = (size_t)model->config.heads * real};
        if (router.out) ESPI_TRY(espi_op_zero(model->ctx, &none, &router));
        if (sinks.out) ESPI_TRY(espi_op_zero(model->ctx, &none, &sinks));
    }
    for (int64_t i = 0; i < model->n_sums; i++) { /* routers and sinks again: what the layers point to is this rank's part */
        const espi_zero total = {.out = model->sums[i].total, .bytes = (size_t)model->sums[i].n * real};
        ESPI_TRY(espi_op_zero(model->ctx, &none, &total));
    }
    return ESP_OK;
}
