/* See rank_step.h. */
#include "rank_step.h"

#include "core/clock.h"
#include "core/status.h"
#include "models/model.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_BATCHES = 16, MOST_SEQS = 3 };

typedef struct step {
    const rank_setting *set;
    esp_model *model;
    esp_comm *comm;
    int64_t all; /* tokens of the step */
    uint64_t hidden[MOST_BATCHES], loss[MOST_BATCHES];
} step;

static uint64_t digest(uint64_t seed, const void *data, size_t bytes) {
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++) seed = (seed ^ p[i]) * UINT64_C(0x100000001b3);
    return seed;
}

/* Of tensor memory. */
static esp_status digest_of(uint64_t *out, esp_ctx *ctx, const void *there, size_t bytes) {
    void *host = malloc(bytes + 1);
    if (!host) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu bytes", bytes);
    const esp_status status = espi_ctx_get(ctx, host, there, bytes);
    *out = digest(UINT64_C(0xcbf29ce484222325), host, bytes);
    free(host);
    return status;
}

/* Micro-batches of different sizes, one of them empty, one of a single token, one of a token that is everywhere. */
static int64_t tokens_of(const step *s, int index) {
    const int64_t most = s->set->tokens;
    switch (index % 7) {
    case 0:
        return most / 2;
    case 1:
        return most;
    case 2:
        return 0;
    case 3:
        return 1;
    default:
        return most * (index % 7) / 7;
    }
}

static void make_batch(esp_batch *batch, int32_t *tokens, int32_t *cu, const step *s, int index) {
    const int vocab = (int)s->model->config.vocab;
    const int64_t n = index < s->set->batches ? tokens_of(s, index) : 0;
    int seqs = 0;
    cu[0] = 0;
    for (int i = 0; i < MOST_SEQS; i++) {
        const int32_t border = (int32_t)(i == MOST_SEQS - 1 ? n : n * (i + 1) / (MOST_SEQS + 1));
        if (border > cu[seqs]) cu[++seqs] = border;
    }
    for (int64_t i = 0; i < n; i++) tokens[i] = (int32_t)(index == 5 ? 7 : (index * 31 + i * i * 7 + i / 11 * 13) % (vocab - 8) + 3);
    *batch = ESP_BATCH(.tokens = tokens, .cu_seqlens = cu, .n_tokens = n, .n_seqs = seqs, .step_tokens = s->all);
}

static esp_status run_batch(step *s, int index) {
    int32_t *tokens = malloc((size_t)s->set->tokens * sizeof *tokens), cu[MOST_SEQS + 1];
    esp_batch batch;
    esp_tensor hidden, d_hidden;
    double loss;
    if (!tokens) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d tokens", s->set->tokens);
    make_batch(&batch, tokens, cu, s, index);
    esp_status status = esp_model_forward(s->model, &batch, &hidden);
    if (status == ESP_OK && index < s->set->batches)
        status = digest_of(&s->hidden[index], s->model->ctx, hidden.data,
                           (size_t)(batch.n_tokens * s->model->config.hidden) * esp_dtype_size(hidden.dtype));
    if (status == ESP_OK) status = esp_model_cross_entropy(s->model, &batch, &hidden, &loss, &d_hidden);
    if (status == ESP_OK && index < s->set->batches) s->loss[index] = digest(1, &loss, sizeof loss);
    if (status == ESP_OK) status = esp_model_backward(s->model, &batch, &d_hidden);
    free(tokens);
    return status;
}

/* B from the place in the whole tensor, so that every cut starts alike. */
static esp_status fill_b(const esp_model *model) {
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        if (!strstr(p->name, "lora_B")) continue;
        const int64_t each = p->rank == 3 ? p->dims[1] * p->dims[2] : p->dims[0] * p->dims[1];
        const int64_t first = p->rank == 3 ? model->share.first : 0, n = (p->rank == 3 ? p->dims[0] : 1) * each;
        const size_t size = esp_dtype_size(p->dtype);
        void *host = malloc((size_t)n * size + 1);
        if (!host) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %lld values", (long long)n);
        for (int64_t j = 0; j < n; j++) espi_real_set(host, j, 0.05 * sin(1.0 + 0.7 * (double)(first * each + j) + (double)i), p->dtype);
        const esp_status status = espi_ctx_put(model->ctx, p->data, host, (size_t)n * size);
        free(host);
        ESPI_TRY(status);
    }
    return ESP_OK;
}

/* Of one tensor: its experts' digests, each made by an owner, in the experts' order. */
static esp_status digest_param(uint64_t *out, const step *s, const esp_param *p, const void *data) {
    const espi_share *share = &s->model->share;
    const size_t size = esp_dtype_size(p->dtype), experts = (size_t)share->experts;
    if (p->rank != 3) return digest_of(out, s->model->ctx, data, (size_t)(p->dims[0] * p->dims[1]) * size);
    const size_t each = (size_t)(p->dims[1] * p->dims[2]) * size;
    uint64_t *own = calloc(experts * (1 + (size_t)share->ranks), sizeof *own), *all = own + experts;
    if (!own) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the digests of %zu experts", experts);
    esp_status status = ESP_OK;
    for (int64_t e = 0; e < share->count && status == ESP_OK; e++)
        status = digest_of(&own[share->first + e], s->model->ctx, (const char *)data + (size_t)e * each, each);
    if (status == ESP_OK) status = espi_comm_gather(s->comm, (espi_place){"digests", -1}, all, own, experts * sizeof *own);
    for (int m = 0; m < share->spread && status == ESP_OK; m++) {
        const size_t first = (size_t)espi_share_border(share, m), end = (size_t)espi_share_border(share, m + 1);
        *out = digest(m == 0 ? 2 : *out, all + (size_t)m * experts + first, (end - first) * sizeof *all);
        for (int r = m; r < share->ranks; r += share->spread) /* copies of an expert are the same */
            if (memcmp(all + (size_t)r * experts + first, all + (size_t)m * experts + first, (end - first) * sizeof *all) != 0)
                status = ESPI_FAIL(ESP_ERR_MISMATCH, "%s: ranks %d and %d hold other values of the same experts", p->name, m, r);
    }
    free(own);
    return status;
}

static esp_status digest_params(uint64_t *experts, uint64_t *others, const step *s, bool gradients) {
    for (int64_t i = 0; i < s->model->n_params; i++) {
        const esp_param *p = &s->model->params[i];
        uint64_t one = 0, *to = p->rank == 3 ? experts : others;
        ESPI_TRY(digest_param(&one, s, p, gradients ? p->grad : p->data));
        *to = digest(*to, &one, sizeof one);
    }
    return ESP_OK;
}

/* What every rank has of its own micro-batches, in their order. */
static esp_status digest_batches(uint64_t *out, const step *s, const uint64_t *mine) {
    uint64_t *all = calloc(MOST_BATCHES * (size_t)s->model->share.ranks, sizeof *all);
    if (!all) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for digests");
    const esp_status status = espi_comm_gather(s->comm, (espi_place){"digests", -1}, all, mine, MOST_BATCHES * sizeof *mine);
    for (int b = 0; b < s->set->batches; b++) *out = digest(*out, &all[b % s->model->share.ranks * MOST_BATCHES + b], sizeof *all);
    free(all);
    return status;
}

static esp_status one_step(rank_digest *out, step *s, esp_optim *optim) {
    const espi_share *share = &s->model->share;
    esp_optim_stats stats = ESP_OPTIM_STATS_INIT;
    *out = (rank_digest){.seconds = 0};
    ESPI_TRY(espi_comm_meet(s->comm, (espi_place){"the start of a step", -1}));
    const double start = espi_seconds();
    for (int first = 0; first < s->set->batches; first += share->ranks) ESPI_TRY(run_batch(s, first + share->rank));
    ESPI_TRY(espi_ctx_wait(s->model->ctx));
    out->seconds = espi_seconds() - start;
    ESPI_TRY(digest_batches(&out->hidden, s, s->hidden));
    ESPI_TRY(digest_batches(&out->loss, s, s->loss));
    ESPI_TRY(digest_params(&out->experts, &out->others, s, true));
    ESPI_TRY(esp_optim_step(optim));
    ESPI_TRY(esp_optim_stats_get(optim, &stats));
    out->value_of_norm = stats.grad_norm;
    out->norm = digest(3, &stats.grad_norm, sizeof stats.grad_norm);
    return digest_params(&out->weights, &out->weights, s, false);
}

esp_status rank_step(rank_digest *out, esp_ctx *ctx, const rank_setting *setting) {
    step s = {.set = setting, .comm = ctx->comm};
    esp_optim *optim = NULL;
    ESPI_TRY(esp_model_load(
        &s.model, ctx, setting->dir,
        &ESP_MODEL_CONFIG(.lora_rank = 4, .expert_ranks = setting->spread, .expert_rows = setting->rows, .train_router = setting->router)));
    for (int b = 0; b < setting->batches; b++) s.all += tokens_of(&s, b);
    esp_status status = fill_b(s.model);
    if (status == ESP_OK) status = esp_adamw_create(&optim, s.model, &ESP_ADAMW_CONFIG(.lr = 1e-2f, .max_grad_norm = 0.01f));
    for (int i = 0; i < setting->steps && status == ESP_OK; i++) status = one_step(out, &s, optim);
    esp_optim_destroy(optim);
    esp_model_destroy(s.model);
    return status;
}

void rank_text(char text[RANK_TEXT], const rank_digest *d) {
    snprintf(text, RANK_TEXT,
             "hidden %016" PRIx64 " loss %016" PRIx64 " experts %016" PRIx64 " others %016" PRIx64 " norm %016" PRIx64
             " weights %016" PRIx64,
             d->hidden, d->loss, d->experts, d->others, d->norm, d->weights);
}
