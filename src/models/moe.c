/* The block level of the public API: one MoE layer on the caller's own tensors, run by the same rooms as a whole model. */
#include "espalier/moe.h"

#include "contract/block.h"
#include "core/rng.h"
#include "espalier/quant.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { PARAMS = 4 }; /* gate_up A, B; down A, B */

struct esp_moe {
    esp_model model; /* what the rooms read of a model: the context; the adapter switch; no probe */
    esp_moe_config options;
    espi_router router;
    espi_experts experts;
    espi_block weights, adapter;
    unsigned char *is_set; /* [E] */
    bool router_set;
    int64_t counts[PARAMS];
    int64_t last_tokens; /* of the last forward */
};

/* A piece of a block, as one walk lays it out: the first walk counts with base NULL, the second hands out. */
static void *piece(unsigned char *base, size_t *at, size_t bytes) {
    void *p = base ? base + *at : NULL;
    *at += ESPI_ALIGNED(bytes);
    return p;
}

static espi_stack shape(const esp_moe_config *o, int64_t rows, int64_t cols, int parts) {
    const int64_t n = rows / parts * cols;
    const bool plain = o->format == ESP_Q_NONE;
    return (espi_stack){.format = o->format,
                        .dtype = ESP_F32,
                        .experts = o->experts,
                        .rows = rows,
                        .cols = cols,
                        .parts = parts,
                        .part_bytes = plain ? (size_t)n * sizeof(float) : ((size_t)n + 1) / 2,
                        .part_blocks = plain ? 0 : (n + ESPI_QBLOCK - 1) / ESPI_QBLOCK};
}

/* Bytes of one expert in the form that a CPU backend's ops want; 0: as it is. */
static size_t packed_bytes(const esp_ctx *ctx, const espi_stack *w) {
    return !ctx->device && ctx->backends[0]->packed_bytes ? ctx->backends[0]->packed_bytes(w) : 0;
}

static void lay_stack(espi_stack *w, const esp_ctx *ctx, unsigned char *base, size_t *at) {
    const size_t parts = (size_t)w->experts * (size_t)w->parts, packed = packed_bytes(ctx, w);
    if (packed) {
        w->packed = piece(base, at, (size_t)w->experts * packed);
        return;
    }
    w->data = piece(base, at, parts * w->part_bytes);
    if (w->format != ESP_Q_NONE) w->absmax = piece(base, at, parts * (size_t)w->part_blocks * sizeof(float));
}

static size_t lay_weights(esp_moe *moe, unsigned char *base) {
    size_t at = 0;
    const float *lut = esp_quant_table(moe->options.format);
    if (moe->model.ctx->device && lut) lut = piece(base, &at, 16 * sizeof(float));
    moe->experts.gate_up.lut = moe->experts.down.lut = lut;
    moe->router.w.data = piece(base, &at, (size_t)(moe->options.experts * moe->options.hidden) * sizeof(float));
    lay_stack(&moe->experts.gate_up, moe->model.ctx, base, &at);
    lay_stack(&moe->experts.down, moe->model.ctx, base, &at);
    return at;
}

static size_t lay_adapter(esp_moe *moe, unsigned char *base) {
    const size_t real = moe->model.ctx->real_size;
    espi_lora *gu = &moe->experts.lora_gate_up, *dn = &moe->experts.lora_down;
    size_t at = 0;
    if (moe->options.lora_rank) {
        gu->a = piece(base, &at, (size_t)moe->counts[ESP_MOE_GATE_UP_A] * real);
        gu->b = piece(base, &at, (size_t)moe->counts[ESP_MOE_GATE_UP_B] * real);
        dn->a = piece(base, &at, (size_t)moe->counts[ESP_MOE_DOWN_A] * real);
        dn->b = piece(base, &at, (size_t)moe->counts[ESP_MOE_DOWN_B] * real);
        gu->d_a = piece(base, &at, (size_t)moe->counts[ESP_MOE_GATE_UP_A] * real);
        gu->d_b = piece(base, &at, (size_t)moe->counts[ESP_MOE_GATE_UP_B] * real);
        dn->d_a = piece(base, &at, (size_t)moe->counts[ESP_MOE_DOWN_A] * real);
        dn->d_b = piece(base, &at, (size_t)moe->counts[ESP_MOE_DOWN_B] * real);
    }
    if (moe->options.train_router) moe->router.d_w = piece(base, &at, (size_t)(moe->options.experts * moe->options.hidden) * real);
    return at;
}

static esp_status check(esp_moe_config *o) {
    if (o->hidden < 1 || o->experts < 1 || o->width < 1 || o->top_k < 1)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_config: got hidden %lld, experts %lld, top_k %lld, width %lld, expected each at least 1",
                         (long long)o->hidden, (long long)o->experts, (long long)o->top_k, (long long)o->width);
    if (o->top_k > o->experts)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_config: got top_k %lld, expected at most the %lld experts", (long long)o->top_k,
                         (long long)o->experts);
    if (o->lora_rank < 0 || !isfinite(o->lora_alpha) || o->lora_alpha < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_config: got lora_rank %lld, lora_alpha %g, expected 0 or more of each, finite",
                         (long long)o->lora_rank, (double)o->lora_alpha);
    if (o->format == ESP_Q_DEFAULT) o->format = ESP_NF4;
    if (o->format != ESP_Q_NONE && o->format != ESP_NF4 && o->format != ESP_FP4)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "esp_moe_config.format: got %d, expected ESP_NF4, ESP_FP4 or ESP_Q_NONE", (int)o->format);
    if (o->lora_alpha == 0) o->lora_alpha = 2.0f * (float)o->lora_rank;
    return ESP_OK;
}

static esp_status draw(esp_moe *moe) {
    const esp_moe_config *o = &moe->options;
    if (o->lora_rank == 0) return ESP_OK;
    ESPI_TRY(espi_lora_draw_into(moe->model.ctx, (void *)moe->experts.lora_gate_up.a, o->seed, 0, ESPI_T_GATE_UP, 0, o->experts,
                                 o->lora_rank, o->hidden));
    return espi_lora_draw_into(moe->model.ctx, (void *)moe->experts.lora_down.a, o->seed, 0, ESPI_T_DOWN, 0, o->experts, o->lora_rank,
                               o->width);
}

static esp_status build(esp_moe *moe) {
    esp_ctx *ctx = moe->model.ctx;
    const esp_moe_config *o = &moe->options;
    const double scale = o->lora_rank ? o->lora_alpha / (double)o->lora_rank : 0;
    moe->model.adapter_on = true;
    moe->router = (espi_router){
        .w = {.dtype = ESP_F32, .rows = o->experts, .cols = o->hidden}, .top_k = o->top_k, .rule = {.renormalise = !o->plain_topk_weights}};
    moe->experts = (espi_experts){.gate_up = shape(o, 2 * o->width, o->hidden, 2),
                                  .down = shape(o, o->hidden, o->width, 1),
                                  .lora_gate_up = {.r = o->lora_rank, .scale = scale},
                                  .lora_down = {.r = o->lora_rank, .scale = scale}};
    const int64_t er = o->experts * o->lora_rank;
    moe->counts[ESP_MOE_GATE_UP_A] = er * o->hidden;
    moe->counts[ESP_MOE_GATE_UP_B] = er * 2 * o->width;
    moe->counts[ESP_MOE_DOWN_A] = er * o->width;
    moe->counts[ESP_MOE_DOWN_B] = er * o->hidden;
    moe->is_set = calloc((size_t)o->experts, 1);
    if (!moe->is_set) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the bookkeeping of %lld experts", (long long)o->experts);
    moe->weights = (espi_block){.purpose = ESPI_MEM_WEIGHTS, .bytes = lay_weights(moe, NULL)};
    moe->adapter = (espi_block){.purpose = ESPI_MEM_ADAPTER, .bytes = lay_adapter(moe, NULL)};
    ESPI_TRY(espi_ctx_alloc(ctx, moe->weights.purpose, moe->weights.bytes, &moe->weights.p));
    ESPI_TRY(espi_ctx_alloc(ctx, moe->adapter.purpose, moe->adapter.bytes, &moe->adapter.p));
    lay_weights(moe, moe->weights.p);
    lay_adapter(moe, moe->adapter.p);
    const espi_stack *w = &moe->experts.gate_up;
    if (ctx->device && w->lut) ESPI_TRY(espi_ctx_put(ctx, (void *)w->lut, esp_quant_table(o->format), 16 * sizeof *w->lut));
    return draw(moe);
}

esp_status esp_moe_create(esp_moe **moe, esp_ctx *ctx, const esp_moe_config *config) {
    if (!moe || !ctx || !config) return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_create: moe, ctx or config is NULL, expected all three");
    *moe = NULL;
    esp_moe_config options;
    ESPI_TRY(espi_struct_read(&options, sizeof options, config, "esp_moe_config"));
    ESPI_TRY(check(&options));
    esp_moe *m = calloc(1, sizeof *m);
    if (!m) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a block's bookkeeping");
    m->model.ctx = ctx;
    m->model.share = (espi_share){.ranks = 1, .spread = 1}; /* a block is not shared */
    m->options = options;
    m->last_tokens = -1;
    const esp_status status = build(m);
    if (status != ESP_OK) {
        esp_moe_destroy(m);
        return status;
    }
    *moe = m;
    return ESP_OK;
}

void esp_moe_destroy(esp_moe *moe) {
    if (!moe) return;
    if (moe->weights.p) espi_ctx_free(moe->model.ctx, moe->weights.purpose, moe->weights.p, moe->weights.bytes);
    if (moe->adapter.p) espi_ctx_free(moe->model.ctx, moe->adapter.purpose, moe->adapter.p, moe->adapter.bytes);
    free(moe->is_set);
    free(moe);
}

esp_status esp_moe_set_router(esp_moe *moe, const float *router) {
    if (!moe || !router) return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_set_router: moe or router is NULL");
    const int64_t n = moe->options.experts * moe->options.hidden;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(router[i]))
            return ESPI_FAIL(ESP_ERR_NONFINITE, "router[%lld]: got %g, expected a finite number", (long long)i, (double)router[i]);
    ESPI_TRY(espi_ctx_put(moe->model.ctx, (void *)moe->router.w.data, router, (size_t)n * sizeof *router));
    moe->router_set = true;
    return ESP_OK;
}

/* One matrix of one expert into its place in the stack. */
static esp_status put(esp_ctx *ctx, const espi_stack *w, int64_t e, int part, const float *x, const char *name) {
    const int64_t n = w->rows / w->parts * w->cols, at = e * w->parts + part;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(x[i]))
            return ESPI_FAIL(ESP_ERR_NONFINITE, "%s of expert %lld, element %lld: got %g, expected a finite number", name, (long long)e,
                             (long long)i, (double)x[i]);
    unsigned char *data = (unsigned char *)w->data + (size_t)at * w->part_bytes;
    if (w->format == ESP_Q_NONE) return espi_ctx_put(ctx, data, x, (size_t)n * sizeof *x);
    float *absmax = (float *)w->absmax + at * w->part_blocks;
    if (!ctx->device) return esp_quantize(data, absmax, x, ESP_F32, n, ESPI_QBLOCK, w->format);
    const size_t scales = (size_t)w->part_blocks * sizeof *absmax;
    float *made = malloc(scales + w->part_bytes);
    if (!made) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to quantise %s (%zu bytes)", name, scales + w->part_bytes);
    uint8_t *codes = (uint8_t *)(made + w->part_blocks);
    esp_status status = esp_quantize(codes, made, x, ESP_F32, n, ESPI_QBLOCK, w->format);
    if (status == ESP_OK) status = espi_ctx_put(ctx, absmax, made, scales);
    if (status == ESP_OK) status = espi_ctx_put(ctx, data, codes, w->part_bytes);
    free(made);
    return status;
}

/* The n matrices of one expert of a stack. */
static esp_status put_parts(esp_ctx *ctx, const espi_stack *w, int64_t e, const float *const x[], const char *const names[], int n) {
    if (!w->packed) {
        for (int p = 0; p < n; p++) ESPI_TRY(put(ctx, w, e, p, x[p], names[p]));
        return ESP_OK;
    }
    const size_t scales = (size_t)(w->parts * w->part_blocks) * sizeof(float), codes = (size_t)w->parts * w->part_bytes;
    unsigned char *memory = malloc(scales + codes);
    if (!memory) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to pack %s (%zu bytes)", names[0], scales + codes);
    espi_stack one = *w;
    one.experts = 1;
    one.packed = NULL;
    one.absmax = (const float *)(void *)memory;
    one.data = memory + scales;
    esp_status status = ESP_OK;
    for (int p = 0; p < n && status == ESP_OK; p++) status = put(ctx, &one, 0, p, x[p], names[p]);
    const espi_exec exec = {.threads = ctx->threads};
    unsigned char *to = (unsigned char *)w->packed + (size_t)e * packed_bytes(ctx, w);
    if (status == ESP_OK) status = ctx->backends[0]->pack(&exec, to, &one);
    free(memory);
    return status;
}

esp_status esp_moe_set_expert(esp_moe *moe, int64_t e, const float *gate, const float *up, const float *down) {
    if (!moe || !gate || !up || !down) return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_set_expert: an argument is NULL");
    if (e < 0 || e >= moe->options.experts)
        return ESPI_FAIL(ESP_ERR_ARG, "expert: got %lld, expected 0 to %lld", (long long)e, (long long)moe->options.experts - 1);
    moe->is_set[e] = 0; /* until all three are in: a failure must not leave a mixture */
    ESPI_TRY(put_parts(moe->model.ctx, &moe->experts.gate_up, e, (const float *const[]){gate, up}, (const char *const[]){"gate", "up"}, 2));
    ESPI_TRY(put_parts(moe->model.ctx, &moe->experts.down, e, &down, (const char *const[]){"down"}, 1));
    moe->is_set[e] = 1;
    return ESP_OK;
}

esp_status esp_moe_param_get(esp_moe *moe, esp_moe_param which, void **data, void **grad, int64_t *count) {
    if (!moe) return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_param_get: moe is NULL");
    const espi_lora *lora = which <= ESP_MOE_GATE_UP_B ? &moe->experts.lora_gate_up : &moe->experts.lora_down;
    const bool is_a = which == ESP_MOE_GATE_UP_A || which == ESP_MOE_DOWN_A;
    if ((unsigned)which > ESP_MOE_ROUTER)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_param_get: which: got %d, expected 0 to %d", (int)which, ESP_MOE_ROUTER);
    if (which == ESP_MOE_ROUTER) {
        if (data) *data = (void *)moe->router.w.data;
        if (grad) *grad = moe->router.d_w;
        if (count) *count = moe->options.experts * moe->options.hidden;
        return ESP_OK;
    }
    if (data) *data = (void *)(is_a ? lora->a : lora->b);
    if (grad) *grad = is_a ? lora->d_a : lora->d_b;
    if (count) *count = moe->counts[which];
    return ESP_OK;
}

static espi_pass make_pass(esp_moe *moe, espi_arena *arena, int64_t tokens) {
    return (espi_pass){
        .model = &moe->model, .ctx = moe->model.ctx, .arena = arena, .tokens = tokens, .adapter = moe->options.lora_rank > 0};
}

static esp_status take_saved(espi_pass *pass, esp_moe *moe, espi_moe_saved *saved) {
    *saved = (espi_moe_saved){0};
    ESPI_TRY(espi_route_take_saved(pass, 0, &moe->router, &saved->route));
    ESPI_TRY(espi_experts_take_lasting(pass, &moe->experts, moe->options.top_k, &saved->experts));
    return espi_experts_take_saved(pass, &moe->experts, moe->options.top_k, &saved->experts);
}

/* The rooms take what they keep and their scratch from an arena; here these are two memories of the caller. */
esp_status esp_moe_sizes(esp_moe *moe, int64_t n_tokens, esp_moe_memory *out) {
    if (!moe || !out || n_tokens < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_sizes: got moe or out NULL, or n_tokens %lld, expected both and 0 or more",
                         (long long)n_tokens);
    if (n_tokens > INT32_MAX / moe->options.top_k)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_moe_sizes: got %lld tokens, %lld experts a token, expected at most %d routed rows",
                         (long long)n_tokens, (long long)moe->options.top_k, INT32_MAX);
    espi_arena kept = espi_arena_dry(false), forward = espi_arena_dry(false), backward = espi_arena_dry(false);
    espi_moe_saved saved;
    espi_pass pass = make_pass(moe, &kept, n_tokens);
    ESPI_TRY(take_saved(&pass, moe, &saved));
    pass.arena = &forward;
    ESPI_TRY(espi_moe_forward(&pass, 0, NULL, NULL, NULL, &moe->router, &moe->experts, &saved, false));
    pass.arena = &backward;
    ESPI_TRY(espi_moe_backward(&pass, 0, NULL, NULL, NULL, &moe->router, &moe->experts, &saved));
    const esp_moe_memory m = {.saved = kept.main.high,
                              .scratch = forward.main.high > backward.main.high ? forward.main.high : backward.main.high};
    return espi_struct_write(out, &m, sizeof m, "esp_moe_memory");
}

static esp_status check_call(const esp_moe *moe, const char *call, const void *out, const void *in, const void *x, int64_t n_tokens,
                             const void *saved, const void *scratch) {
    if (!moe) return ESPI_FAIL(ESP_ERR_ARG, "%s: moe is NULL", call);
    if (n_tokens < 0) return ESPI_FAIL(ESP_ERR_ARG, "%s: got n_tokens %lld, expected 0 or more", call, (long long)n_tokens);
    if (n_tokens && (!out || !in || !x || !saved || !scratch))
        return ESPI_FAIL(ESP_ERR_ARG, "%s: a tensor, saved or scratch is NULL, expected memory of esp_moe_sizes()", call);
    if ((uintptr_t)saved % ESPI_ALIGN || (uintptr_t)scratch % ESPI_ALIGN)
        return ESPI_FAIL(ESP_ERR_ARG, "%s: saved or scratch is not aligned to %d bytes", call, ESPI_ALIGN);
    if (!moe->router_set) return ESPI_FAIL(ESP_ERR_STATE, "%s: the router was never set, call esp_moe_set_router() first", call);
    for (int64_t e = 0; e < moe->options.experts; e++)
        if (!moe->is_set[e])
            return ESPI_FAIL(ESP_ERR_STATE, "%s: expert %lld was never set, call esp_moe_set_expert() for each of %lld", call, (long long)e,
                             (long long)moe->options.experts);
    return ESP_OK;
}

esp_status esp_moe_forward(esp_moe *moe, void *out, const void *x, int64_t n_tokens, void *saved, void *scratch) {
    ESPI_TRY(check_call(moe, "esp_moe_forward", out, x, x, n_tokens, saved, scratch));
    esp_moe_memory sizes = ESP_MOE_MEMORY_INIT;
    ESPI_TRY(esp_moe_sizes(moe, n_tokens, &sizes));
    espi_arena kept = espi_arena_over(saved, sizes.saved), work = espi_arena_over(scratch, sizes.scratch);
    espi_moe_saved s;
    espi_pass pass = make_pass(moe, &kept, n_tokens);
    ESPI_TRY(take_saved(&pass, moe, &s));
    pass.arena = &work;
    ESPI_TRY(espi_moe_forward(&pass, 0, out, x, NULL, &moe->router, &moe->experts, &s, false));
    moe->last_tokens = n_tokens;
    return ESP_OK;
}

esp_status esp_moe_backward(esp_moe *moe, void *d_x, const void *d_out, const void *x, int64_t n_tokens, void *saved, void *scratch) {
    ESPI_TRY(check_call(moe, "esp_moe_backward", d_x, d_out, x, n_tokens, saved, scratch));
    if (moe->last_tokens < 0) return ESPI_FAIL(ESP_ERR_STATE, "esp_moe_backward: no forward before, call esp_moe_forward() first");
    if (n_tokens != moe->last_tokens)
        return ESPI_FAIL(ESP_ERR_SHAPE, "esp_moe_backward: got %lld tokens, expected the %lld of the last esp_moe_forward()",
                         (long long)n_tokens, (long long)moe->last_tokens);
    esp_moe_memory sizes = ESP_MOE_MEMORY_INIT;
    ESPI_TRY(esp_moe_sizes(moe, n_tokens, &sizes));
    espi_arena kept = espi_arena_over(saved, sizes.saved), work = espi_arena_over(scratch, sizes.scratch);
    espi_moe_saved s;
    espi_pass pass = make_pass(moe, &kept, n_tokens);
    ESPI_TRY(take_saved(&pass, moe, &s)); /* the same walk gives the same places: what the twin wrote is there */
    pass.arena = &work;
    return espi_moe_backward(&pass, 0, d_x, d_out, x, &moe->router, &moe->experts, &s);
}
