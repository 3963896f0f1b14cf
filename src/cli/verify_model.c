/* espalier verify: a golden model folder.  Each variant (the model as stored, with the older config, fused, quantised..) is run with and
 * without its adapter and through every loss; what comes out is kept under the names of the reference file and compared key by key. */
#include "cli/verify.h"
#include "contract/head.h"
#include "contract/route.h"
#include "core/select.h"
#include "io/folder.h"
#include "io/safetensors.h"
#include "models/model.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct variant {
    const char *label, *model, *config, *adapter;
    const char *refs[2];
    esp_qformat experts;
    bool double_quant;
    const char *same; /* label of the earlier variant that must have bit-equal logits, or NULL */
} variant;

static const variant variants[] = {
    {.label = "", .model = "model", .adapter = "adapter", .refs = {"ref.safetensors", "ref_f64.safetensors"}, .experts = ESP_Q_NONE},
    {.label = "config_v4/",
     .model = "model",
     .config = "config_v4.json",
     .adapter = "adapter",
     .refs = {"ref.safetensors"},
     .experts = ESP_Q_NONE,
     .same = ""},
    {.label = "model_fused/", .model = "model_fused", .adapter = "adapter", .refs = {"ref.safetensors"}, .experts = ESP_Q_NONE, .same = ""},
    {.label = "model_transposed/",
     .model = "model_transposed",
     .adapter = "adapter",
     .refs = {"ref.safetensors"},
     .experts = ESP_Q_NONE,
     .same = ""},
    {.label = "adapter_2d/", .model = "model", .adapter = "adapter_2d", .refs = {"adapter_2d/ref.safetensors"}, .experts = ESP_Q_NONE},
    {.label = "model_nf4/", .model = "model_nf4", .adapter = "adapter", .refs = {"ref_nf4.safetensors"}, .experts = ESP_NF4},
    {.label = "model to nf4/",
     .model = "model",
     .adapter = "adapter",
     .refs = {"ref_nf4.safetensors"},
     .experts = ESP_NF4,
     .same = "model_nf4/"},
    {.label = "model_nf4_dq/",
     .model = "model_nf4_dq",
     .adapter = "adapter",
     .refs = {"ref_nf4_dq.safetensors"},
     .experts = ESP_NF4,
     .double_quant = true},
};
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };

typedef struct loss {
    const char *name;
    double temperature;
    bool cotangent; /* sum(cotangent_lp * lp) instead of cross entropy */
    bool aux;       /* plus 0.01 aux_loss */
} loss;

static const loss losses[] = {{"ce", 1, false, false}, {"ceaux", 1, false, true}, {"lp", 1, true, false}, {"lp07", 0.7, true, false}};
static const float aux_coef = 0.01f;

typedef struct run {
    espi_verify *v;
    unsigned char *routes; /* of the reference, on a device: its rounding must not choose other experts */
    bool replayed[2];      /* without and with the adapter: may what comes out be compared? */
    esp_model *model;
    const espi_arrays *in;    /* ref.safetensors: the inputs */
    const espi_arrays *chose; /* the file that has the experts of this variant */
    espi_arrays got;
    int32_t *ids, *cu;
    int64_t tokens;
    int32_t n_seqs;
    esp_batch batch;
    const char *forward_prefix, *backward_prefix; /* of what the probe shows; NULL: not kept */
} run;

/* Families call the same thing by different names, as transformers calls its modules; what a run gives is kept under the names of this
 * table's right side. */
enum { NAME_BYTES = 256 };
static void common_name(char out[NAME_BYTES], const char *name) {
    static const struct {
        const char *theirs, *ours;
    } rows[] = {{"model.language_model.", "model."}, {".mlp.router.", ".mlp.gate."}, {".block_sparse_moe.", ".mlp."}};
    snprintf(out, NAME_BYTES, "%s", name);
    for (int i = 0; i < ESPI_COUNT(rows); i++) {
        char *at = strstr(out, rows[i].theirs);
        if (!at) continue;
        const size_t theirs = strlen(rows[i].theirs), ours = strlen(rows[i].ours);
        memmove(at + ours, at + theirs, strlen(at + theirs) + 1);
        memcpy(at, rows[i].ours, ours);
    }
}

/* n values of tensor memory in host memory, of which the caller frees; on a CPU it could read them where they are. */
static void *host_copy(esp_ctx *ctx, const void *from, esp_dtype dtype, int64_t n) {
    void *copy = espi_cli_memory((size_t)n * esp_dtype_size(dtype));
    if (from && espi_ctx_get(ctx, copy, from, (size_t)n * esp_dtype_size(dtype)) == ESP_OK) return copy;
    free(copy);
    return NULL;
}

/* Keeps n values of tensor memory. */
static esp_status keep_tensor(run *r, const void *from, esp_dtype dtype, int64_t n, const char *name) {
    void *copy = host_copy(r->v->ctx, from, dtype, n);
    if (!copy) return ESPI_FAIL(ESP_ERR_DEVICE, "%s: %lld values could not be read", name, (long long)n);
    espi_arrays_put(&r->got, copy, dtype, n, "%s", name);
    free(copy);
    return ESP_OK;
}

/* ---- what the passes show ---- */

static void keep_gate_up(run *r, int64_t layer, const esp_tensor *t) {
    const bool interleaved = r->model->config.glu.interleaved;
    int64_t n = esp_tensor_count(t), width = t->dims[t->rank - 1] / 2;
    double *g = espi_arrays_add(&r->got, n / 2, "%s.l%lld.g", r->forward_prefix, (long long)layer);
    double *u = espi_arrays_add(&r->got, n / 2, "%s.l%lld.u", r->forward_prefix, (long long)layer);
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = i / (2 * width), column = i % (2 * width), j = interleaved ? column / 2 : column % width;
        const bool is_gate = interleaved ? column % 2 == 0 : column < width;
        (is_gate ? g : u)[row * width + j] = espi_real_get(t->data, i, t->dtype);
    }
}

/* Where experts have biases, transformers' experts do not form the activation as a tensor of its own, and the reference has under "act"
 * the product of the down projection before its bias. */
static void keep_down(run *r, int64_t layer, const esp_tensor *t) {
    const int64_t n = esp_tensor_count(t), width = r->model->config.hidden;
    espi_arrays_put(&r->got, t->data, t->dtype, n, "%s.l%lld.down", r->forward_prefix, (long long)layer);
    const espi_config *c = &r->model->config;
    const espi_array *expert = espi_arrays_find(&r->got, "%s.l%lld.topk_idx", r->forward_prefix, (long long)layer);
    float *bias = expert ? host_copy(r->v->ctx, r->model->layers[layer].down_bias, ESP_F32, c->experts * c->hidden) : NULL;
    if (!bias) return;
    double *before = espi_arrays_add(&r->got, n, "%s.l%lld.act", r->forward_prefix, (long long)layer);
    expert = espi_arrays_find(&r->got, "%s.l%lld.topk_idx", r->forward_prefix, (long long)layer); /* the list has moved */
    for (int64_t i = 0; i < n; i++)
        before[i] = espi_real_get(t->data, i, t->dtype) - bias[(int64_t)expert->v[i / width] * width + i % width];
    free(bias);
}

static void on_probe(void *user, const char *name, int64_t layer, const esp_tensor *tensor) {
    run *r = user;
    bool backward = strncmp(name, "d_", 2) == 0;
    const char *prefix = backward ? r->backward_prefix : r->forward_prefix;
    const char *key = backward ? name + 2 : name;
    if (!prefix) return;
    int64_t n = esp_tensor_count(tensor);
    if (strcmp(key, "gu") == 0)
        keep_gate_up(r, layer, tensor);
    else if (strcmp(name, "down") == 0)
        keep_down(r, layer, tensor);
    else if (strcmp(name, "act") == 0 && r->model->config.expert_bias)
        return;
    else if (strcmp(key, "h") == 0)
        espi_arrays_put(&r->got, tensor->data, tensor->dtype, n, "%s.h.%lld", prefix, (long long)layer);
    else if (strcmp(key, "hidden") == 0)
        espi_arrays_put(&r->got, tensor->data, tensor->dtype, n, "%s.hidden", prefix);
    else
        espi_arrays_put(&r->got, tensor->data, tensor->dtype, n, "%s.l%lld.%s", prefix, (long long)layer, key);
}

/* Does any key of the file begin with this? */
static bool wanted(const espi_arrays *want, const char *prefix) {
    for (int64_t i = 0; i < want->n; i++)
        if (strncmp(want->items[i].name, prefix, strlen(prefix)) == 0) return true;
    return false;
}

/* The experts that the reference chose with its adapter, or without, for this run's batch to replay; where it tells none, the router is free
 * to choose others, and nothing is compared. */
static void replay_routes(run *r, const espi_arrays *want, bool adapter) {
    const espi_config *c = &r->model->config;
    const size_t token = (size_t)(c->layers * c->top_k) * (size_t)espi_route_bytes(c);
    r->replayed[adapter] = !r->v->ctx->device;
    if (!r->v->ctx->device) return;
    free(r->routes);
    r->routes = espi_cli_memory((size_t)r->tokens * token);
    memset(r->routes, UINT8_MAX, (size_t)r->tokens * token);
    for (int64_t l = 0; l < c->layers; l++) {
        const espi_array *idx = espi_arrays_find(want, "%s.l%lld.topk_idx", adapter ? "lora" : "base", (long long)l);
        if (!idx || idx->n != r->tokens * c->top_k) continue;
        int32_t *chosen = espi_cli_memory((size_t)idx->n * sizeof *chosen);
        for (int64_t i = 0; i < idx->n; i++) chosen[i] = (int32_t)idx->v[i];
        espi_routes_write(r->routes, c, l, chosen, r->tokens);
        r->replayed[adapter] = true;
        free(chosen);
    }
    for (int32_t s = 0; s < r->n_seqs; s++) memset(r->routes + token * (size_t)(r->cu[s + 1] - 1), UINT8_MAX, token);
    r->batch.routed_experts = r->routes;
    r->batch.routed_bytes = espi_route_bytes(c);
    r->batch.n_routed = r->tokens * c->layers * c->top_k;
}

/* ---- forward ---- */

typedef struct logits_walk {
    run *r;
    const esp_tensor *hidden;
    const char *name;
} logits_walk;

/* The public call gives f32; the op gives what the context computes in. */
static esp_status take_logits(void *user, espi_arena *arena) {
    const logits_walk *w = user;
    const esp_model *m = w->r->model;
    int64_t tokens = w->hidden->dims[0], n = tokens * m->config.vocab;
    int32_t *rows;
    void *logits;
    ESPI_TRY(espi_arena_take(arena, (size_t)tokens * sizeof *rows, &rows));
    ESPI_TRY(espi_arena_take(arena, (size_t)n * m->ctx->real_size, &logits));
    for (int64_t t = 0; t < tokens && !arena->dry; t++) rows[t] = (int32_t)t;
    const espi_head_logits op = {
        .head = {.hidden = w->hidden->data, .rows = rows, .target = rows, .w = m->head, .n = tokens, .temperature = 1, .logit_scale = 1},
        .logits = logits};
    ESPI_TRY(espi_op_head_logits(m->ctx, arena, &op));
    if (!arena->dry) espi_arrays_put(&w->r->got, logits, m->ctx->real, n, "%s", w->name);
    return ESP_OK;
}

static esp_status keep_logits(run *r, const esp_tensor *hidden, const char *name) {
    int64_t n = hidden->dims[0] * r->model->config.vocab;
    if (r->v->ctx->real == ESP_F64) return espi_verify_walk(r->v, take_logits, &(logits_walk){r, hidden, name});
    float *logits = espi_cli_memory((size_t)n * sizeof *logits);
    esp_status status = esp_model_logits(r->model, hidden, logits, (size_t)n);
    if (status == ESP_OK) espi_arrays_put(&r->got, logits, ESP_F32, n, "%s", name);
    free(logits);
    return status;
}

/* The head with its log-probabilities or with a loss, on memory of its own. */
typedef struct head_walk {
    run *r;
    const esp_tensor *hidden;
    double temperature;
    const char *name; /* of the log-probabilities */
    const double *g;  /* the loss's coefficients, or NULL: log-probabilities only */
    void *d_hidden;
} head_walk;

static esp_status give_coefficients(void *user, const espi_head_rows *rows, int64_t first, int64_t count) {
    const head_walk *w = user;
    for (int64_t i = first; i < first + count; i++) {
        espi_real_set(rows->host.g, i, w->g[i], w->r->v->ctx->real);
        espi_real_set(rows->host.e, i, 0, w->r->v->ctx->real);
    }
    return ESP_OK;
}

static esp_status take_head(void *user, espi_arena *arena) {
    const head_walk *w = user;
    esp_model *m = w->r->model;
    espi_head_rows rows;
    ESPI_TRY(espi_head_rows_make(&rows, m, arena, &w->r->batch));
    if (w->g)
        return espi_head_loss(m, arena, &rows, w->hidden->data, w->d_hidden, w->r->tokens, w->temperature, true, give_coefficients, user);
    ESPI_TRY(espi_head_logprob(m, arena, &rows, w->hidden->data, w->temperature));
    ESPI_TRY(espi_head_read(m, arena, &rows));
    if (!arena->dry) espi_arrays_put(&w->r->got, rows.host.lp, m->ctx->real, rows.n, "%s", w->name);
    return ESP_OK;
}

static esp_status keep_logprobs(run *r, const esp_tensor *hidden, const char *prefix, const char *key, double temperature) {
    char name[32];
    snprintf(name, sizeof name, "%s.%s", prefix, key);
    return espi_verify_walk(r->v, take_head, &(head_walk){.r = r, .hidden = hidden, .temperature = temperature, .name = name});
}

/* The second sequence on its own. */
static esp_status run_single(run *r, const char *prefix) {
    if (r->n_seqs < 2) return ESP_OK;
    const int32_t length = r->cu[2] - r->cu[1], cu[2] = {0, length};
    esp_batch batch = ESP_BATCH(.tokens = r->ids + r->cu[1], .cu_seqlens = cu, .n_tokens = length, .n_seqs = 1);
    if (r->routes) {
        const int64_t token = r->model->config.layers * r->model->config.top_k;
        batch.routed_experts = r->routes + r->cu[1] * token * r->batch.routed_bytes;
        batch.routed_bytes = r->batch.routed_bytes;
        batch.n_routed = length * token;
    }
    char name[32];
    snprintf(name, sizeof name, "%s.single1.logits", prefix);
    esp_tensor hidden;
    ESPI_TRY(esp_model_forward_only(r->model, &batch, &hidden));
    return keep_logits(r, &hidden, name);
}

static esp_status run_forward(run *r, const char *prefix, bool adapter) {
    char name[32];
    snprintf(name, sizeof name, "%s.logits", prefix);
    esp_tensor hidden;
    double ce, aux, z;
    ESPI_TRY(esp_model_adapter_enable(r->model, adapter));
    r->forward_prefix = prefix;
    esp_status status = esp_model_forward(r->model, &r->batch, &hidden);
    r->forward_prefix = NULL;
    ESPI_TRY(status);
    ESPI_TRY(esp_model_router_losses(r->model, &aux, &z));
    ESPI_TRY(keep_logits(r, &hidden, name));
    ESPI_TRY(keep_logprobs(r, &hidden, prefix, "lp", 1));
    ESPI_TRY(keep_logprobs(r, &hidden, prefix, "lp07", 0.7));
    ESPI_TRY(esp_model_cross_entropy(r->model, &r->batch, &hidden, &ce, NULL));
    espi_arrays_put(&r->got, &ce, ESP_F64, 1, "%s.ce_loss", prefix);
    espi_arrays_put(&r->got, &aux, ESP_F64, 1, "%s.aux_loss", prefix);
    return run_single(r, prefix);
}

/* ---- gradients ---- */

/* "layers.0.self_attn.q_proj.lora_A", "layers.0.mlp.experts.gate_up.lora_B" under PEFT's fused names; B of the experts from [E,out,R] to
 * [out,R*E] with the expert fastest. */
static esp_status keep_parameter(run *r, const esp_param *p, const char *loss_name) {
    const char *base = "base_model.model.model", *experts = strstr(p->name, ".experts.");
    int64_t n = p->dims[0] * p->dims[1] * (p->rank == 3 ? p->dims[2] : 1);
    if (!experts) {
        char name[NAME_BYTES];
        snprintf(name, sizeof name, "grad.%s.%s.%s.weight", loss_name, base, p->name);
        return keep_tensor(r, p->grad, p->dtype, n, name);
    }
    void *grad = host_copy(r->v->ctx, p->grad, p->dtype, n);
    if (!grad) return ESPI_FAIL(ESP_ERR_DEVICE, "the gradient of %s could not be read", p->name);
    const espi_lora_spec *lora = r->model->lora;
    bool nested = strstr(experts, ".gate_up.") && lora[ESPI_T_DOWN].r > 0;
    const char *matrix = strrchr(p->name, '.');
    double *out = espi_arrays_add(&r->got, n, "grad.%s.%s.%.*s.experts%s%s.weight", loss_name, base, (int)(experts - p->name), p->name,
                                  nested ? ".base_layer" : "", matrix);
    bool is_b = strcmp(matrix, ".lora_B") == 0;
    int64_t e_count = p->dims[0], rows = p->dims[1], rank = p->dims[2];
    for (int64_t i = 0; i < n; i++) {
        int64_t e = i / (rows * rank), row = i / rank % rows, k = i % rank;
        out[is_b ? (row * rank + k) * e_count + e : i] = espi_real_get(grad, i, p->dtype);
    }
    free(grad);
    return ESP_OK;
}

/* Router and sinks of a layer.  A bias's gradient is the sum over tokens of the gradient of what it was added to. */
static esp_status keep_frozen(run *r, int64_t layer, const char *loss_name) {
    const espi_config *c = &r->model->config;
    const espi_layer *w = &r->model->layers[layer];
    const esp_dtype real = r->v->ctx->real;
    char prefix[64], name[NAME_BYTES];
    snprintf(prefix, sizeof prefix, "grad.%s.param.model.layers.%lld", loss_name, (long long)layer);
    snprintf(name, sizeof name, "%s.mlp.gate.weight", prefix);
    if (w->d_router) ESPI_TRY(keep_tensor(r, w->d_router, real, c->experts * c->hidden, name));
    snprintf(name, sizeof name, "%s.self_attn.sinks", prefix);
    if (w->d_sinks) ESPI_TRY(keep_tensor(r, w->d_sinks, real, c->heads, name));
    if (!w->router_bias) return ESP_OK;
    double *bias = espi_arrays_add(&r->got, c->experts, "%s.mlp.gate.bias", prefix);
    const espi_array *logits = espi_arrays_find(&r->got, "grad.%s.l%lld.router_logits", loss_name, (long long)layer);
    for (int64_t i = 0; logits && i < logits->n; i++) bias[i % c->experts] += logits->v[i];
    return ESP_OK;
}

static esp_status keep_gradients(run *r, const char *loss_name) {
    for (int64_t i = 0; i < esp_model_param_count(r->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        ESPI_TRY(esp_model_param_get(r->model, i, &p));
        ESPI_TRY(keep_parameter(r, &p, loss_name));
    }
    for (int64_t l = 0; l < r->model->config.layers; l++) ESPI_TRY(keep_frozen(r, l, loss_name));
    return ESP_OK;
}

/* The norms are frozen in the model, so their weights' gradients are formed here by the op from what the passes showed: the norm's output y
 * stands for x (x^ = y / w, rstd = 1). */
typedef struct norm_walk {
    run *r;
    const double *y, *d_y;
    const float *w;
    int64_t rows, n;
    int64_t heads; /* > 0: d_y came behind limit and RoPE: undo them first */
    char name[96];
} norm_walk;

static esp_status turn_back(const norm_walk *w, espi_arena *arena, void *d_y) {
    const esp_model *m = w->r->model;
    const int64_t tokens = w->r->tokens, half = m->config.rotary_dim / 2, n = w->rows * w->n;
    int32_t *positions;
    void *cos_table, *sin_table;
    ESPI_TRY(espi_arena_take(arena, (size_t)tokens * sizeof *positions, &positions));
    ESPI_TRY(espi_arena_take(arena, (size_t)(tokens * half) * m->ctx->real_size, &cos_table));
    ESPI_TRY(espi_arena_take(arena, (size_t)(tokens * half) * m->ctx->real_size, &sin_table));
    for (int32_t s = 0; s < w->r->n_seqs && !arena->dry; s++)
        for (int32_t t = w->r->cu[s]; t < w->r->cu[s + 1]; t++) positions[t] = t - w->r->cu[s];
    const espi_rope_table table = {cos_table, sin_table, positions, m->inv_freq, m->config.rope_attention, tokens, half};
    ESPI_TRY(espi_op_rope_table(m->ctx, arena, &table));
    const espi_rope rope = {d_y, cos_table, sin_table, tokens, w->heads, half, m->config.head_dim};
    ESPI_TRY(espi_op_rope_bwd(m->ctx, arena, &rope));
    if (m->config.clip_qkv == 0) return ESP_OK;
    void *y;
    ESPI_TRY(espi_arena_take(arena, (size_t)n * m->ctx->real_size, &y));
    for (int64_t i = 0; i < n && !arena->dry; i++) espi_real_set(y, i, w->y[i], m->ctx->real);
    const espi_clamp_bwd clamp = {.d_x = d_y, .d_y = d_y, .x = y, .n = n, .limit = m->config.clip_qkv};
    return espi_op_clamp_bwd(m->ctx, arena, &clamp);
}

static esp_status take_norm(void *user, espi_arena *arena) {
    const norm_walk *w = user;
    esp_ctx *ctx = w->r->v->ctx;
    int64_t n = w->rows * w->n;
    void *x, *d_y, *rstd, *d_w;
    ESPI_TRY(espi_arena_take(arena, (size_t)n * ctx->real_size, &x));
    ESPI_TRY(espi_arena_take(arena, (size_t)n * ctx->real_size, &d_y));
    ESPI_TRY(espi_arena_take(arena, (size_t)w->rows * ctx->real_size, &rstd));
    ESPI_TRY(espi_arena_take(arena, (size_t)w->n * ctx->real_size, &d_w));
    for (int64_t i = 0; i < n && !arena->dry; i++) {
        espi_real_set(x, i, w->y[i] / w->w[i % w->n], ctx->real);
        espi_real_set(d_y, i, w->d_y[i], ctx->real);
        espi_real_set(rstd, i / w->n, 1, ctx->real);
        espi_real_set(d_w, i % w->n, 0, ctx->real);
    }
    if (w->heads > 0) ESPI_TRY(turn_back(w, arena, d_y));
    const espi_rmsnorm_bwd op = {.d_x = d_y, .d_w = d_w, .d_y = d_y, .x = x, .rstd = rstd, .w = w->w, .rows = w->rows, .n = w->n};
    ESPI_TRY(espi_op_rmsnorm_bwd(ctx, arena, &op));
    if (!arena->dry) espi_arrays_put(&w->r->got, d_w, ctx->real, w->n, "%s", w->name);
    return ESP_OK;
}

/* `key` names the output as the forward showed it, `d_key` its gradient. */
static esp_status keep_norm(run *r, norm_walk *w, const char *key, const char *d_key) {
    const espi_array *y = espi_arrays_find(&r->got, "lora.%s", key), *d_y = espi_arrays_find(&r->got, "grad.ce.%s", d_key);
    if (!y || !d_y || !w->w) return ESP_OK;
    w->r = r;
    w->y = y->v;
    w->d_y = d_y->v;
    return espi_verify_walk(r->v, take_norm, w);
}

static esp_status keep_layer_norm(run *r, int64_t layer, const char *value, const char *d_value, const char *weight, norm_walk w) {
    char key[32], d_key[32];
    snprintf(key, sizeof key, "l%lld.%s", (long long)layer, value);
    snprintf(d_key, sizeof d_key, "l%lld.%s", (long long)layer, d_value);
    snprintf(w.name, sizeof w.name, "grad.ce.param.model.layers.%lld.%s.weight", (long long)layer, weight);
    return keep_norm(r, &w, key, d_key);
}

static esp_status keep_norms(run *r) {
    const espi_config *c = &r->model->config;
    const int64_t t = r->tokens, q_norm = c->whole_qk_norm ? c->heads : 1, k_norm = c->whole_qk_norm ? c->kv_heads : 1; /* heads a norm */
    for (int64_t l = 0; l < c->layers; l++) {
        const espi_layer *layer = &r->model->layers[l];
        const norm_walk norm1 = {.w = layer->norm1, .rows = t, .n = c->hidden}, norm2 = {.w = layer->norm2, .rows = t, .n = c->hidden};
        const norm_walk q = {.w = layer->q_norm, .rows = t * c->heads / q_norm, .n = q_norm * c->head_dim, .heads = c->heads};
        const norm_walk k = {.w = layer->k_norm, .rows = t * c->kv_heads / k_norm, .n = k_norm * c->head_dim, .heads = c->kv_heads};
        ESPI_TRY(keep_layer_norm(r, l, "norm1", "norm1", "input_layernorm", norm1));
        ESPI_TRY(keep_layer_norm(r, l, "norm2", "norm2", "post_attention_layernorm", norm2));
        ESPI_TRY(keep_layer_norm(r, l, "q_norm", "q", "self_attn.q_norm", q));
        ESPI_TRY(keep_layer_norm(r, l, "k_norm", "k", "self_attn.k_norm", k));
    }
    norm_walk final = {.w = r->model->final_norm, .rows = t, .n = c->hidden, .name = "grad.ce.param.model.norm.weight"};
    return keep_norm(r, &final, "hidden", "hidden");
}

/* The gradient of cross entropy by the logits, by the head's own op: with the logits as hidden states and the unit matrix as weight,
 * d_hidden is the gradient of the logits. */
static esp_status take_logits_gradient(void *user, espi_arena *arena) {
    run *r = user;
    esp_ctx *ctx = r->v->ctx;
    const int64_t vocab = r->model->config.vocab;
    const espi_array *logits = espi_arrays_find(&r->got, "lora.logits");
    espi_head_rows rows;
    float *unit;
    void *z, *d_z;
    ESPI_TRY(espi_head_rows_make(&rows, r->model, arena, &r->batch));
    ESPI_TRY(espi_arena_take(arena, (size_t)(vocab * vocab) * sizeof *unit, &unit));
    ESPI_TRY(espi_arena_take(arena, (size_t)logits->n * ctx->real_size, &z));
    ESPI_TRY(espi_arena_take(arena, (size_t)logits->n * ctx->real_size, &d_z));
    if (!arena->dry) {
        for (int64_t i = 0; i < vocab; i++) unit[i * vocab + i] = 1;
        for (int64_t i = 0; i < logits->n; i++) espi_real_set(z, i, logits->v[i], ctx->real);
        for (int64_t i = 0; i < rows.n; i++) {
            espi_real_set(rows.g, i, -1.0 / (double)rows.n, ctx->real);
            espi_real_set(rows.e, i, 0, ctx->real);
        }
    }
    espi_head head = espi_head_describe(r->model, &rows, z, 1);
    head.w = (espi_mat){unit, ESP_F32, vocab, vocab};
    const espi_head_stats stats = {head, rows.lp, rows.entropy, rows.lse};
    ESPI_TRY(espi_op_head_stats(ctx, arena, &stats));
    const espi_head_grad grad = {head, d_z, rows.g, rows.e, rows.lse, rows.entropy};
    ESPI_TRY(espi_op_head_grad(ctx, arena, &grad));
    if (!arena->dry) espi_arrays_put(&r->got, d_z, ctx->real, logits->n, "grad.ce.logits");
    return ESP_OK;
}

static esp_status run_loss(run *r, const loss *l) {
    char prefix[16];
    snprintf(prefix, sizeof prefix, "grad.%s", l->name);
    esp_ctx *ctx = r->v->ctx;
    esp_tensor hidden, d_hidden;
    void *own = NULL;
    ESPI_TRY(esp_model_adapter_enable(r->model, true));
    ESPI_TRY(esp_model_zero_grad(r->model));
    ESPI_TRY(esp_model_forward(r->model, &r->batch, &hidden));
    size_t bytes = (size_t)esp_tensor_count(&hidden) * ctx->act_size;
    esp_status status;
    if (l->cotangent) {
        const espi_array *g = espi_arrays_find(r->in, "cotangent_lp");
        ESPI_TRY(espi_ctx_alloc(ctx, ESPI_MEM_STAGING, bytes, &own));
        d_hidden = hidden;
        d_hidden.data = own;
        status = espi_verify_walk(r->v, take_head,
                                  &(head_walk){.r = r, .hidden = &hidden, .temperature = l->temperature, .g = g->v, .d_hidden = own});
    } else {
        double ce;
        status = esp_model_cross_entropy(r->model, &r->batch, &hidden, &ce, &d_hidden);
    }
    r->backward_prefix = prefix;
    if (status == ESP_OK) status = esp_model_backward(r->model, &r->batch, &d_hidden);
    r->backward_prefix = NULL;
    espi_ctx_free(ctx, ESPI_MEM_STAGING, own, bytes);
    return status == ESP_OK ? keep_gradients(r, l->name) : status;
}

static esp_status run_losses(run *r, const espi_arrays *want, bool aux) {
    for (int i = 0; i < ESPI_COUNT(losses); i++) {
        char prefix[16];
        snprintf(prefix, sizeof prefix, "grad.%s.", losses[i].name);
        const espi_array *cotangent = espi_arrays_find(r->in, "cotangent_lp");
        const bool possible = !losses[i].cotangent || (cotangent && cotangent->n == r->tokens - r->n_seqs);
        if (losses[i].aux == aux && possible && wanted(want, prefix)) ESPI_TRY(run_loss(r, &losses[i]));
    }
    if (aux || r->v->ctx->device) return ESP_OK;
    if (wanted(want, "grad.ce.param.")) ESPI_TRY(keep_norms(r));
    return espi_arrays_find(want, "grad.ce.logits") ? espi_verify_walk(r->v, take_logits_gradient, r) : ESP_OK;
}

/* ---- the adapter's deltas ---- */

/* Delta of one expert, scale * B_e A_e, for "model.layers.{l}.mlp.experts.{gate_up_proj|down_proj}.expert{e}". */
static esp_status keep_delta(run *r, const char *name) {
    int layer, expert;
    char which[16], common[NAME_BYTES];
    common_name(common, name);
    const bool known = sscanf(common, "model.layers.%d.mlp.experts.%15[a-z_].expert%d", &layer, which, &expert) == 3;
    const espi_config *c = &r->model->config;
    if (!known || layer < 0 || layer >= c->layers || expert < 0 || expert >= c->experts) return ESP_OK;
    const bool down = strcmp(which, "down_proj") == 0;
    const espi_layer *l = &r->model->layers[layer];
    const espi_lora *lora = down ? &l->lora_down : &l->lora_gate_up;
    const int64_t out = down ? c->hidden : 2 * c->expert_width, in = down ? c->expert_width : c->hidden, rank = lora->r;
    if (rank == 0) return ESP_OK;
    const esp_dtype real = r->v->ctx->real;
    void *a = host_copy(r->v->ctx, lora->a, real, c->experts * rank * in),
         *b = host_copy(r->v->ctx, lora->b, real, c->experts * out * rank);
    double *delta = a && b ? espi_arrays_add(&r->got, out * in, "%s", common) : NULL;
    for (int64_t i = 0; delta && i < out * in; i++)
        for (int64_t k = 0; k < rank; k++)
            delta[i] += lora->scale * espi_real_get(b, (expert * out + i / in) * rank + k, real) *
                        espi_real_get(a, (expert * rank + k) * in + i % in, real);
    free(a);
    free(b);
    return delta ? ESP_OK : ESPI_FAIL(ESP_ERR_DEVICE, "%s: the adapter could not be read", name);
}

/* ---- one variant ---- */

static bool ends_with(const char *text, const char *end) {
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static bool is_input(const char *name) {
    static const char *const inputs[] = {"packed_ids", "cu_seqlens", "cotangent_lp"};
    for (int i = 0; i < ESPI_COUNT(inputs); i++)
        if (strcmp(name, inputs[i]) == 0) return true;
    return false;
}

static espi_rule rule_of(const char *name) {
    if (strncmp(name, "grad.", 5) == 0) return ESPI_RULE_GRADIENT;
    static const char *const exact[] = {"topk_idx", "ids", "mask", "lengths"};
    for (int i = 0; i < ESPI_COUNT(exact); i++)
        if (ends_with(name, exact[i])) return ESPI_RULE_EXACT;
    return ESPI_RULE_FORWARD;
}

/* The padded form of the inputs, and the tables that the config gives. */
static void keep_inputs(run *r) {
    const espi_array *ids = espi_arrays_find(r->in, "ids");
    int64_t width = ids && ids->rank == 2 ? ids->dims[1] : 0;
    if (width > 0) {
        double *padded = espi_arrays_add(&r->got, r->n_seqs * width, "ids"), *mask = espi_arrays_add(&r->got, r->n_seqs * width, "mask");
        for (int32_t s = 0; s < r->n_seqs; s++)
            for (int32_t t = r->cu[s]; t < r->cu[s + 1] && t - r->cu[s] < width; t++) {
                padded[s * width + t - r->cu[s]] = r->ids[t];
                mask[s * width + t - r->cu[s]] = 1;
            }
    }
    double *lengths = espi_arrays_add(&r->got, r->n_seqs, "lengths");
    for (int32_t s = 0; s < r->n_seqs; s++) lengths[s] = r->cu[s + 1] - r->cu[s];
    espi_arrays_put(&r->got, r->model->inv_freq, ESP_F64, r->model->config.rotary_dim / 2, "inv_freq");
    espi_arrays_put(&r->got, &r->model->config.rope_attention, ESP_F64, 1, "rope_scale");
}

static bool is_of_run(const char *name) {
    return strncmp(name, "base.", 5) == 0 || strncmp(name, "lora.", 5) == 0 || strncmp(name, "grad.", 5) == 0;
}

/* Gradients of what is frozen, or of what no pass holds whole. */
static bool is_formed_here(const char *name) {
    return strcmp(name, "grad.ce.logits") == 0 || (strncmp(name, "grad.ce.param.", 14) == 0 && strstr(name, "norm"));
}

static void compare_all(run *r, const char *label, const espi_arrays *want) {
    for (int64_t i = 0; i < want->n; i++) {
        const espi_array *a = &want->items[i];
        char name[NAME_BYTES];
        common_name(name, a->name);
        if (is_input(a->name)) continue;
        if (is_of_run(name) && !r->replayed[strncmp(name, "base.", 5) != 0]) {
            espi_verify_skip(r->v, name, "the reference has no experts to replay, and bf16 may choose others");
            continue;
        }
        const espi_array *got = espi_arrays_find(&r->got, "%s", name);
        if (!got && r->v->ctx->device && is_formed_here(name))
            espi_verify_skip(r->v, name, "no pass forms it: the CPU's ops form it here, with --device cpu");
        else
            espi_verify_array(r->v, label, rule_of(name), got, a);
    }
}

/* Experts as the checkpoint has them: what is in MXFP4 stays so. */
static esp_status stored_experts(esp_qformat *out, const char *model_dir) {
    espi_config config;
    ESPI_TRY(espi_config_read(&config, model_dir));
    *out = config.mxfp4 ? ESP_MXFP4 : ESP_Q_NONE;
    espi_config_free(&config);
    return ESP_OK;
}

static esp_status load(esp_model **model, espi_verify *v, const char *model_dir, const char *adapter_dir, const variant *form, float aux) {
    esp_qformat experts = form->experts;
    if (experts == ESP_Q_NONE) ESPI_TRY(stored_experts(&experts, model_dir));
    return esp_model_load(model, v->ctx, model_dir,
                          &ESP_MODEL_CONFIG(.experts = experts, .double_quant = form->double_quant, .train_router = true,
                                            .router_aux_coef = aux, .adapter_dir = adapter_dir, .lora_targets = ESP_LORA_NOTHING));
}

/* One loaded model through everything that the reference file has.  aux: it was loaded with the load-balancing loss. */
static esp_status run_model(run *r, const espi_arrays *want, bool adapter, bool aux) {
    ESPI_TRY(esp_model_set_probe(r->model, on_probe, r));
    if (aux) {
        replay_routes(r, r->chose, true);
        return run_losses(r, want, true);
    }
    keep_inputs(r);
    replay_routes(r, r->chose, false);
    if (wanted(want, "base.")) ESPI_TRY(run_forward(r, "base", false));
    if (!adapter) return ESP_OK;
    replay_routes(r, r->chose, true);
    if (wanted(want, "lora.") || wanted(want, "grad.")) ESPI_TRY(run_forward(r, "lora", true));
    return run_losses(r, want, false);
}

static esp_status run_variant(run *r, const char *model_dir, const char *adapter_dir, const variant *form, const espi_arrays *want,
                              const espi_arrays *deltas) {
    for (int aux = 0; aux < 2; aux++) {
        if (aux && (!adapter_dir || !wanted(want, "grad.ceaux."))) break;
        ESPI_TRY(load(&r->model, r->v, model_dir, adapter_dir, form, aux ? aux_coef : 0));
        esp_status status = run_model(r, want, adapter_dir != NULL, aux);
        for (int64_t i = 0; deltas && !aux && status == ESP_OK && i < deltas->n; i++) status = keep_delta(r, deltas->items[i].name);
        esp_model_destroy(r->model);
        r->model = NULL;
        ESPI_TRY(status);
    }
    return ESP_OK;
}

/* Logits of two variants that must not differ in a bit. */
static void compare_same(espi_verify *v, const variant *form, const espi_arrays *got, const espi_arrays *earlier) {
    static const char *const keys[] = {"base.logits", "lora.logits"};
    for (int i = 0; i < ESPI_COUNT(keys); i++) {
        const espi_array *a = espi_arrays_find(got, "%s", keys[i]), *b = espi_arrays_find(earlier, "%s", keys[i]);
        if (!a || !b) continue;
        char name[64];
        snprintf(name, sizeof name, "%s same bits as %s", keys[i], form->same[0] ? form->same : "model/");
        espi_verify_compare(v, form->label, name, ESPI_RULE_EXACT, 0, a->v, b->v, a->n);
    }
}

/* What the variants of one folder share. */
typedef struct folder {
    espi_verify *v;
    const char *dir;
    espi_arrays in, deltas;
    int32_t *ids, *cu; /* the packed batch */
    int64_t tokens;
    int32_t n_seqs;
    espi_arrays logits[N_VARIANTS]; /* what each variant gave, for those that must give the same */
} folder;

static void verify_refs(folder *f, int which, run *r, const char *model_dir, const char *adapter_dir) {
    const variant *form = &variants[which];
    espi_arrays want[ESPI_COUNT(form->refs)] = {{0}};
    espi_arrays all = {0}; /* views: the names of all reference files, to know what to run */
    for (int i = 0; i < ESPI_COUNT(form->refs); i++)
        if (form->refs[i] && espi_is_file(f->dir, form->refs[i]) && espi_verify_open(f->v, &want[i], f->dir, form->refs[i]))
            for (int64_t k = 0; k < want[i].n; k++) espi_arrays_add(&all, 0, "%s", want[i].items[k].name);
    const bool first = which == 0;
    r->chose = &want[0];
    esp_status status = run_variant(r, model_dir, adapter_dir, form, &all, first ? &f->deltas : NULL);
    if (status != ESP_OK)
        espi_verify_error(f->v, form->label, status);
    else {
        for (int i = 0; i < ESPI_COUNT(form->refs); i++) {
            char label[64];
            snprintf(label, sizeof label, "%s%s", form->label, i == 1 ? "f64/" : "");
            compare_all(r, label, &want[i]);
        }
        if (first) compare_all(r, "delta/", &f->deltas);
        for (int k = 0; form->same && k < which; k++)
            if (strcmp(variants[k].label, form->same) == 0) compare_same(f->v, form, &r->got, &f->logits[k]);
    }
    f->logits[which] = r->got;
    r->chose = NULL;
    espi_arrays_free(&all);
    for (int i = 0; i < ESPI_COUNT(form->refs); i++) espi_arrays_free(&want[i]);
}

/* The same in a temporary folder that has the other config.json. */
static void verify_with_config(folder *f, int which, run *r, const char *model_dir, const char *adapter_dir) {
    char place[ESPI_PATH_MAX], *config = espi_cli_path(f->dir, variants[which].config);
    esp_status status = espi_folder_with(place, model_dir, "config.json", config);
    free(config);
    if (status != ESP_OK) {
        espi_verify_error(f->v, variants[which].label, status);
        return;
    }
    verify_refs(f, which, r, place, adapter_dir);
    espi_folder_remove(place);
}

static void verify_variant(folder *f, int which) {
    const variant *form = &variants[which];
    if (which > 0 && (!espi_is_folder(f->dir, form->model) || !espi_is_file(f->dir, form->refs[0]))) return;
    if (form->config && !espi_is_file(f->dir, form->config)) return;
    run r = {.v = f->v, .in = &f->in, .ids = f->ids, .cu = f->cu, .tokens = f->tokens, .n_seqs = f->n_seqs};
    r.batch = ESP_BATCH(.tokens = r.ids, .cu_seqlens = r.cu, .n_tokens = r.tokens, .n_seqs = r.n_seqs);
    char *model_dir = espi_cli_path(f->dir, form->model);
    char *adapter_dir = espi_is_folder(f->dir, form->adapter) ? espi_cli_path(f->dir, form->adapter) : NULL;
    if (form->config)
        verify_with_config(f, which, &r, model_dir, adapter_dir);
    else
        verify_refs(f, which, &r, model_dir, adapter_dir);
    free(model_dir);
    free(adapter_dir);
    free(r.routes);
}

/* ---- quantising on load ---- */

static int64_t bytes_off(const void *got, const void *want, size_t bytes) {
    int64_t off = 0;
    for (size_t i = 0; i < bytes; i++) off += ((const unsigned char *)got)[i] != ((const unsigned char *)want)[i];
    return off;
}

/* plain: the same weights without double quantisation, for the scales that were quantised. */
static int64_t scales_off(const espi_stack *got, const espi_stack *want, const espi_stack *plain) {
    const int64_t parts = want->experts * want->parts, blocks = want->part_blocks;
    if (!want->absmax8) return bytes_off(got->absmax, want->absmax, (size_t)(parts * blocks) * sizeof *want->absmax);
    int64_t off = 0;
    for (int64_t p = 0; p < parts; p++)
        off += espi_scale_codes_off(plain->absmax + p * blocks, got->absmax8 + p * blocks, want->absmax8 + p * blocks, want->offset[p],
                                    want->nested + p * want->part_nested, blocks);
    return off;
}

static void compare_stack(espi_verify *v, const char *label, int64_t layer, const char *part, const espi_stack *got, const espi_stack *want,
                          const espi_stack *plain) {
    char name[96];
    snprintf(name, sizeof name, "%slayers.%lld.%s codes", label, (long long)layer, part);
    if (got->part_bytes != want->part_bytes || got->part_blocks != want->part_blocks || !got->absmax8 != !want->absmax8) {
        espi_verify_fail(v, name, "are held in another form");
        return;
    }
    espi_verify_count(v, name, bytes_off(got->data, want->data, (size_t)(want->experts * want->parts) * want->part_bytes));
    snprintf(name, sizeof name, "%slayers.%lld.%s scales", label, (long long)layer, part);
    espi_verify_count(v, name, scales_off(got, want, plain));
}

/* Quantising model/ while loading gives the bytes of the quantised checkpoint. */
static void verify_quantised(espi_verify *v, const char *dir, const variant *form) {
    if (!espi_is_folder(dir, form->model) || !espi_is_folder(dir, "model")) return;
    if (v->ctx->device) {
        espi_verify_skip(v, form->label, "a GPU holds codes packed: their bytes with --device cpu");
        return;
    }
    char *stored_dir = espi_cli_path(dir, form->model), *model_dir = espi_cli_path(dir, "model");
    const variant simple = {.experts = form->experts};
    esp_model *want = NULL, *got = NULL, *plain = NULL;
    esp_status status = load(&want, v, stored_dir, NULL, form, 0);
    if (status == ESP_OK) status = load(&got, v, model_dir, NULL, form, 0);
    if (status == ESP_OK) status = load(&plain, v, model_dir, NULL, &simple, 0);
    if (status != ESP_OK) espi_verify_error(v, form->label, status);
    for (int64_t l = 0; status == ESP_OK && l < want->config.layers; l++) {
        const espi_layer *a = &got->layers[l], *b = &want->layers[l], *c = &plain->layers[l];
        if (b->mlp != ESPI_MLP_MOE) continue;
        compare_stack(v, form->label, l, "gate_up", &a->gate_up, &b->gate_up, &c->gate_up);
        compare_stack(v, form->label, l, "down", &a->down, &b->down, &c->down);
    }
    esp_model_destroy(want);
    esp_model_destroy(got);
    esp_model_destroy(plain);
    free(stored_dir);
    free(model_dir);
}

/* ---- MXFP4 as it is stored ---- */

/* The bytes that a stack holds are those of the file's tensor NAME_blocks or NAME_scales. */
static void compare_stored(espi_verify *v, const espi_st_set *set, const char *format, int64_t layer, const char *end, const void *held) {
    char name[NAME_BYTES], line[NAME_BYTES + 16];
    snprintf(name, sizeof name, format, (int)layer);
    snprintf(name + strlen(name), sizeof name - strlen(name), "%s", end);
    snprintf(line, sizeof line, "%s as stored", name);
    const espi_st_tensor *t = espi_st_set_find(set, name);
    if (!t) return; /* another layout, which has other bytes */
    unsigned char *bytes = espi_cli_memory(t->bytes);
    const esp_status status = espi_st_read(t, bytes, 0, t->bytes);
    if (status == ESP_OK)
        espi_verify_count(v, line, bytes_off(held, bytes, t->bytes));
    else
        espi_verify_error(v, line, status);
    free(bytes);
}

static esp_status compare_stacks(espi_verify *v, const esp_model *m, const char *model_dir) {
    const espi_family *f = m->config.family;
    espi_st_set *set;
    ESPI_TRY(espi_st_set_open(&set, model_dir));
    for (int64_t l = 0; l < m->config.layers; l++) {
        const espi_stack *gate_up = &m->layers[l].gate_up, *down = &m->layers[l].down;
        if (gate_up->format != ESP_MXFP4) continue;
        compare_stored(v, set, f->fused_gate_up, l, "_blocks", gate_up->data);
        compare_stored(v, set, f->fused_gate_up, l, "_scales", gate_up->scales);
        compare_stored(v, set, f->fused_down, l, "_blocks", down->data);
        compare_stored(v, set, f->fused_down, l, "_scales", down->scales);
    }
    espi_st_set_close(set);
    return ESP_OK;
}

/* A checkpoint in MXFP4 is run on its own bytes, converted to nothing else. */
static void verify_stored(espi_verify *v, const char *dir) {
    static const variant as_stored = {.experts = ESP_Q_NONE};
    char *model_dir = espi_cli_path(dir, "model");
    esp_model *m = NULL;
    esp_qformat experts;
    esp_status status = stored_experts(&experts, model_dir);
    if (status == ESP_OK && experts == ESP_MXFP4 && v->ctx->device) {
        espi_verify_skip(v, "MXFP4 as stored", "a GPU holds codes packed: their bytes with --device cpu");
    } else if (status == ESP_OK && experts == ESP_MXFP4) {
        status = load(&m, v, model_dir, NULL, &as_stored, 0);
        if (status == ESP_OK) status = compare_stacks(v, m, model_dir);
    }
    if (status != ESP_OK) espi_verify_error(v, "MXFP4 as stored", status);
    esp_model_destroy(m);
    free(model_dir);
}

/* ---- the folder ---- */

/* The packed batch, from packed_ids and cu_seqlens or from the padded ids and lengths. */
static bool read_batch(folder *f) {
    const espi_array *packed = espi_arrays_find(&f->in, "packed_ids"), *cu = espi_arrays_find(&f->in, "cu_seqlens");
    const espi_array *ids = espi_arrays_find(&f->in, "ids"), *lengths = espi_arrays_find(&f->in, "lengths");
    const bool is_packed = packed && cu && cu->n > 1 && cu->v[0] == 0 && cu->v[cu->n - 1] == (double)packed->n;
    if (!is_packed && !(ids && ids->rank == 2 && lengths && lengths->n == ids->dims[0])) return false;
    f->n_seqs = (int32_t)(is_packed ? cu->n - 1 : lengths->n);
    f->cu = espi_cli_memory((size_t)(f->n_seqs + 1) * sizeof *f->cu);
    f->ids = espi_cli_memory((size_t)(is_packed ? packed->n : ids->n) * sizeof *f->ids);
    for (int32_t s = 0; s < f->n_seqs; s++) {
        const int64_t length = (int64_t)(is_packed ? cu->v[s + 1] - cu->v[s] : lengths->v[s]);
        if (length < 1 || (!is_packed && length > ids->dims[1])) return false;
        const double *from = is_packed ? packed->v + f->tokens : ids->v + s * ids->dims[1];
        for (int64_t t = 0; t < length; t++) f->ids[f->tokens++] = (int32_t)from[t];
        f->cu[s + 1] = (int32_t)f->tokens;
    }
    return true;
}

/* False: nothing can be run; told. */
static bool open_folder(folder *f) {
    char *model = espi_cli_path(f->dir, "model");
    espi_config config;
    esp_status status = espi_config_read(&config, model);
    free(model);
    if (status == ESP_ERR_UNSUPPORTED) {
        espi_verify_skip(f->v, "", esp_last_error());
        return false;
    }
    if (status != ESP_OK) {
        espi_verify_error(f->v, "model/config.json", status);
        return false;
    }
    f->v->clamped = config.clip_qkv > 0 || config.glu.clamped;
    espi_config_free(&config);
    if (!espi_is_file(f->dir, "ref.safetensors")) {
        espi_verify_fail(f->v, "ref.safetensors", "is missing beside model/");
        return false;
    }
    if (!espi_verify_open(f->v, &f->in, f->dir, "ref.safetensors")) return false;
    if (read_batch(f)) return true;
    espi_verify_fail(f->v, "ref.safetensors", "ids and lengths, or packed_ids and cu_seqlens, do not describe a batch");
    return false;
}

void espi_verify_model(espi_verify *v, const char *dir) {
    folder f = {.v = v, .dir = dir};
    if (open_folder(&f)) {
        bool adapted = wanted(&f.in, "lora.") || wanted(&f.in, "grad.");
        if (adapted && !espi_is_folder(dir, "adapter")) espi_verify_fail(v, "adapter", "is missing beside lora.* and grad.*");
        if (espi_is_file(dir, "delta.safetensors")) espi_verify_open(v, &f.deltas, dir, "delta.safetensors");
        for (int i = 0; i < N_VARIANTS; i++) verify_variant(&f, i);
        for (int i = 0; i < N_VARIANTS; i++)
            if (strncmp(variants[i].label, "model_nf4", 9) == 0) verify_quantised(v, dir, &variants[i]);
        verify_stored(v, dir);
    }
    for (int i = 0; i < N_VARIANTS; i++) espi_arrays_free(&f.logits[i]);
    espi_arrays_free(&f.in);
    espi_arrays_free(&f.deltas);
    free(f.ids);
    free(f.cu);
}
