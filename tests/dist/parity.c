/* One training step over any number of ranks has the same bits as over one: hidden states, losses, every gradient, the norm, the weights
 * after the step.  Ranks are threads; real processes run the same code over another transport (ranks.sh). */
#include "checkpoint.h"
#include "espalier/espalier.h"
#include "models/passes.h"
#include "ranks.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { BATCHES = 7, MOST_TOKENS = 40, MOST_SEQS = 3 };

/* How tokens choose experts: by the router, or as replayed routes say. */
typedef enum skew {
    NATIVE,
    BALANCED,
    HOT_EXPERT,     /* expert 0 sees every token */
    HOT_RANK,       /* the first experts, which one rank holds, see all */
    SPREAD_HOT,     /* a hot expert in every share */
    RAGGED_SOURCE,  /* every batch has experts of its own */
    DEAD_EXPERTS,   /* the upper half is never chosen */
    MOVING_HOTSPOT, /* another hot expert in every layer and batch */
    BURST,          /* one batch goes to one place, the others are balanced */
    SKEWS
} skew;

/* What is trained, and how it is cut.  rows: budget, 0 = default. */
typedef struct setting {
    const char *dir; /* of a model */
    int ranks, spread;
    int64_t rows;
    size_t activation_budget;
    bool router;
    skew skew;
} setting;

/* Everything that must not depend on the ranks, whole tensors, whoever held them. */
typedef struct outcome {
    float hidden[BATCHES][MOST_TOKENS * 64];
    double loss[BATCHES], norm;
    int64_t n_params, size[64];
    float *grad[64], *weight[64]; /* [n_params] */
    float *router;                /* gradients of all routers, or NULL */
    int64_t n_router, rows_calls; /* calls of a forward and a backward without those that add gradients up */
} outcome;

typedef struct batch_data {
    int32_t tokens[MOST_TOKENS], cu[MOST_SEQS + 1];
    unsigned char routes[MOST_TOKENS * 2 * 8];
    esp_batch batch;
} batch_data;

/* Choice k of a token. */
static int64_t chosen(skew kind, int batch, int64_t layer, int64_t t, int64_t k, const espi_config *c) {
    const int64_t e = c->experts, even = (t * c->top_k + k + layer) % e;
    switch (kind) {
    case HOT_EXPERT:
        return k == 0 ? 0 : 1 + (t + k) % (e - 1);
    case HOT_RANK:
        return k;
    case SPREAD_HOT:
        return (k * e / c->top_k + (t % 5 == 0)) % e;
    case RAGGED_SOURCE:
        return (batch + k) % e;
    case DEAD_EXPERTS:
        return (t + k) % (e / 2 > c->top_k ? e / 2 : c->top_k);
    case MOVING_HOTSPOT:
        return (3 * batch + 5 * layer + k) % e;
    case BURST:
        return batch == 1 ? e - 1 - k : even;
    default:
        return even;
    }
}

/* All ones for the last token of a sequence, which was never fed back. */
static void make_routes(batch_data *b, int index, skew kind, const espi_config *c) {
    if (kind == NATIVE) return;
    for (int64_t t = 0; t < b->batch.n_tokens; t++)
        for (int64_t l = 0; l < c->layers; l++)
            for (int64_t k = 0; k < c->top_k; k++)
                b->routes[(t * c->layers + l) * c->top_k + k] = (unsigned char)chosen(kind, index, l, t, k, c);
    for (int32_t s = 0; s < b->batch.n_seqs; s++)
        memset(b->routes + (b->cu[s + 1] - 1) * c->layers * c->top_k, 255, (size_t)(c->layers * c->top_k));
    b->batch.routed_experts = b->routes;
    b->batch.last_follows = kind % 2;
    b->batch.routed_bytes = 1;
    b->batch.n_routed = b->batch.n_tokens * c->layers * c->top_k;
}

/* Batches of 0 to 40 tokens. */
static void make_batch(batch_data *b, int index, skew kind, const espi_config *c) {
    static const int sizes[BATCHES][MOST_SEQS] = {{12, 7, 1}, {40, 0, 0}, {0, 0, 0}, {1, 0, 0}, {5, 20, 9}, {33, 0, 0}, {2, 2, 2}};
    int n = 0, seqs = 0;
    b->cu[0] = 0;
    for (int s = 0; s < MOST_SEQS; s++) {
        if (sizes[index][s] == 0) continue;
        for (int i = 0; i < sizes[index][s]; i++, n++) b->tokens[n] = (index * 31 + n * n * 7 + s * 13) % ((int)c->vocab - 8) + 3;
        b->cu[++seqs] = n;
    }
    b->batch = ESP_BATCH(.tokens = b->tokens, .cu_seqlens = b->cu, .n_tokens = n, .n_seqs = seqs, .step_tokens = 120);
    make_routes(b, index, kind, c);
}

/* What a rank is given. */
typedef struct rank_run {
    const setting *set;
    esp_comm *comm;
    outcome *out; /* shared: every rank writes what is its own */
} rank_run;

/* B from the place in the whole tensor, so that every cut starts alike. */
static void fill_b(esp_model *model) {
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        if (!strstr(p->name, "lora_B")) continue;
        const int64_t each = p->rank == 3 ? p->dims[1] * p->dims[2] : p->dims[0] * p->dims[1];
        const int64_t first = p->rank == 3 ? model->share.first : 0, n = p->rank == 3 ? p->dims[0] : 1;
        for (int64_t j = 0; j < n * each; j++)
            espi_real_set(p->data, j, 0.05 * sin(1.0 + 0.7 * (double)(first * each + j) + (double)i), p->dtype);
    }
}

static void keep(float *to, const void *from, int64_t n, esp_dtype dtype) {
    for (int64_t i = 0; i < n; i++) to[i] = (float)espi_real_get(from, i, dtype);
}

/* The rank's part of every tensor to its place in the whole. */
static void keep_params(outcome *out, const esp_model *model, bool gradients) {
    const espi_share *s = &model->share;
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        const int64_t each = p->rank == 3 ? p->dims[1] * p->dims[2] : p->dims[0] * p->dims[1];
        if (!espi_share_speaks(s, p->rank == 3)) continue;
        float *to = (gradients ? out->grad[i] : out->weight[i]) + (p->rank == 3 ? s->first * each : 0);
        keep(to, gradients ? p->grad : p->data, p->rank == 3 ? p->dims[0] * each : each, p->dtype);
    }
}

static void make_outcome(outcome *out, const esp_model *model) {
    out->n_params = model->n_params;
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        out->size[i] = p->rank == 3 ? model->share.experts * p->dims[1] * p->dims[2] : p->dims[0] * p->dims[1];
        out->grad[i] = calloc((size_t)out->size[i], sizeof(float));
        out->weight[i] = calloc((size_t)out->size[i], sizeof(float));
    }
}

static void drop_outcome(outcome *out) {
    for (int64_t i = 0; i < out->n_params; i++) {
        free(out->grad[i]);
        free(out->weight[i]);
    }
    free(out->router);
    free(out);
}

static esp_status run_batch(rank_run *r, esp_model *model, int index) {
    batch_data b;
    esp_tensor hidden, d_hidden;
    double loss;
    if (index < BATCHES)
        make_batch(&b, index, r->set->skew, &model->config);
    else
        b.batch = ESP_BATCH(.step_tokens = 120);
    const uint64_t before = espi_comm_calls(r->comm);
    ESPI_TRY(esp_model_forward(model, &b.batch, &hidden));
    if (index < BATCHES) keep(r->out->hidden[index], hidden.data, b.batch.n_tokens * model->config.hidden, hidden.dtype);
    ESPI_TRY(esp_model_cross_entropy(model, &b.batch, &hidden, &loss, &d_hidden));
    if (index < BATCHES) r->out->loss[index] = loss;
    ESPI_TRY(esp_model_backward(model, &b.batch, &d_hidden));
    /* Two for all of these small gradients. */
    if (model->share.rank == 0) r->out->rows_calls = (int64_t)(espi_comm_calls(r->comm) - before) - 2 * (model->n_sums > 0);
    return ESP_OK;
}

static void keep_routers(outcome *out, const esp_model *model) {
    const int64_t n = model->config.experts * model->config.hidden;
    out->n_router = model->config.layers * n;
    out->router = calloc((size_t)out->n_router, sizeof *out->router);
    for (int64_t l = 0; l < model->config.layers; l++) {
        const void *total = model->layers[l].d_router;
        for (int64_t i = 0; i < model->n_sums; i++)
            if (model->sums[i].partial == total) total = model->sums[i].total;
        keep(out->router + l * n, total, n, model->ctx->real);
    }
}

static esp_status train(rank_run *r, esp_model *model) {
    esp_optim *optim;
    esp_optim_stats stats = ESP_OPTIM_STATS_INIT;
    fill_b(model);
    if (model->share.rank == 0) make_outcome(r->out, model);
    ESPI_TRY(espi_comm_meet(r->comm, (espi_place){"room for the outcome", -1}));
    ESPI_TRY(esp_adamw_create(&optim, model, &ESP_ADAMW_CONFIG(.lr = 1e-2f, .max_grad_norm = 0.01f)));
    esp_status status = ESP_OK;
    for (int first = 0; first < BATCHES && status == ESP_OK; first += model->share.ranks)
        status = run_batch(r, model, first + model->share.rank);
    if (status == ESP_OK) keep_params(r->out, model, true);
    if (status == ESP_OK && r->set->router && model->share.rank == 0) keep_routers(r->out, model);
    if (status == ESP_OK) status = esp_optim_step(optim);
    if (status == ESP_OK) status = esp_optim_stats_get(optim, &stats);
    if (status == ESP_OK) keep_params(r->out, model, false);
    if (model->share.rank == 0) r->out->norm = stats.grad_norm;
    esp_optim_destroy(optim);
    return status;
}

static esp_status work(rank_job *job) {
    rank_run run = *(rank_run *)job->user, *r = &run;
    const setting *s = r->set;
    r->comm = job->comm;
    esp_ctx *ctx;
    esp_model *model;
    ESPI_TRY(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = r->comm, .backend = "cpu", .threads = 1)));
    esp_status status = esp_model_load(&model, ctx, s->dir,
                                       &ESP_MODEL_CONFIG(.lora_rank = 4, .expert_ranks = s->spread, .expert_rows = s->rows,
                                                         .activation_budget = s->activation_budget, .train_router = s->router,
                                                         .router_aux_coef = s->router ? 0.01f : 0));
    if (status == ESP_OK) {
        status = train(r, model);
        esp_model_destroy(model);
    }
    esp_ctx_destroy(ctx);
    return status;
}

static outcome *outcome_of(const setting *set) {
    outcome *out = calloc(1, sizeof *out);
    cr_assert_not_null(out);
    ranks_well(set->ranks, set->spread, work, &(rank_run){.set = set, .out = out}, set->dir);
    return out;
}

static void expect_same(const outcome *got, const outcome *want, const setting *s) {
    for (int b = 0; b < BATCHES; b++) {
        cr_expect_arr_eq(got->hidden[b], want->hidden[b], sizeof got->hidden[b], "%s, %d ranks, spread %d: hidden states of batch %d",
                         s->dir, s->ranks, s->spread, b);
        cr_expect(got->loss[b] == want->loss[b], "%s, %d ranks, spread %d: loss of batch %d", s->dir, s->ranks, s->spread, b);
    }
    cr_expect(got->norm == want->norm && want->norm > 0, "%s, %d ranks, spread %d: norm %.17g, expected %.17g", s->dir, s->ranks, s->spread,
              got->norm, want->norm);
    if (want->router)
        cr_expect_arr_eq(got->router, want->router, (size_t)want->n_router * sizeof(float), "%s, %d ranks, spread %d: gradients of routers",
                         s->dir, s->ranks, s->spread);
    for (int64_t i = 0; i < want->n_params; i++) {
        const size_t bytes = (size_t)want->size[i] * sizeof(float);
        cr_expect_arr_eq(got->grad[i], want->grad[i], bytes, "%s, %d ranks, spread %d: gradient %lld", s->dir, s->ranks, s->spread,
                         (long long)i);
        cr_expect_arr_eq(got->weight[i], want->weight[i], bytes, "%s, %d ranks, spread %d: weight %lld after the step", s->dir, s->ranks,
                         s->spread, (long long)i);
    }
}

static void expect_alike(setting s, const int (*cuts)[2], int n) {
    s.ranks = s.spread = 1;
    const int64_t rows = s.rows;
    s.rows = 0;
    outcome *want = outcome_of(&s);
    s.rows = rows;
    for (int i = 0; i < n; i++) {
        s.ranks = cuts[i][0];
        s.spread = cuts[i][1];
        outcome *got = outcome_of(&s);
        expect_same(got, want, &s);
        drop_outcome(got);
    }
    drop_outcome(want);
}

#define CUTS(table) (table), (int)(sizeof(table) / sizeof(table)[0])

static void golden_dir(char dir[ESPI_PATH_MAX], const char *model) {
    snprintf(dir, ESPI_PATH_MAX, "%s/tests/golden/data/%s/model", ESP_SOURCE_DIR, model);
}

/* A small model with so many experts, top_k of which see a token. */
static void make_model(const char *dir, int64_t experts, int64_t top_k) {
    char number[32];
    checkpoint *c = checkpoint_open_as("q3c/model_fused", "config.json", "model.safetensors");
    for (size_t i = 0; i < c->n; i++) {
        espi_st_item *item = &c->items[i];
        if (!strstr(item->name, "mlp.experts") && !strstr(item->name, "mlp.gate")) continue;
        int64_t n = experts;
        for (int d = 1; d < item->rank; d++) n *= item->dims[d];
        float *values = checkpoint_own(c, malloc((size_t)n * sizeof *values));
        for (int64_t j = 0; j < n; j++) values[j] = 0.08f * (float)sin(0.37 * (double)(j + 1) * (double)(i + 1) + (double)(j % 11));
        item->dims[0] = experts;
        item->dtype = ESP_F32;
        item->data = values;
    }
    snprintf(number, sizeof number, "%lld", (long long)experts);
    checkpoint_set(c, "num_local_experts", number);
    snprintf(number, sizeof number, "%lld", (long long)top_k);
    checkpoint_set(c, "num_experts_per_tok", number);
    checkpoint_set(c, "dtype", "\"float32\"");
    checkpoint_write(c, dir);
    checkpoint_close(c);
}

Test(parity, families, .timeout = 120) {
    static const int cuts[][2] = {{2, 1}, {2, 2}, {3, 3}, {4, 1}, {4, 2}, {4, 4}, {6, 3}};
    static const char *const models[] = {"q3a", "go1", "glb", "mx"};
    for (size_t i = 0; i < sizeof models / sizeof models[0]; i++) {
        char dir[ESPI_PATH_MAX];
        golden_dir(dir, models[i]);
        expect_alike((setting){.dir = dir}, CUTS(cuts));
    }
}

/* Numbers of experts that no number of ranks divides, fewer experts than ranks, ranks that nothing goes to. */
static void expect_skews(int64_t experts, int64_t top_k, const int (*cuts)[2], int n) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    make_model(dir, experts, top_k);
    for (skew kind = NATIVE; kind < SKEWS; kind++)
        if (kind != HOT_EXPERT || experts > top_k) expect_alike((setting){.dir = dir, .skew = kind}, cuts, n);
    scratch_remove(dir);
}

static const int few[][2] = {{2, 2}, {3, 3}, {4, 1}, {4, 2}, {4, 4}};
static const int many[][2] = {{2, 1}, {5, 5}, {7, 7}, {8, 4}, {12, 12}, {16, 16}, {16, 2}};
static const int most[][2] = {{13, 13}, {64, 64}, {64, 8}};

Test(parity, one_expert, .timeout = 120) {
    expect_skews(1, 1, CUTS(few));
    expect_skews(1, 1, CUTS(many));
}
Test(parity, five_experts, .timeout = 120) {
    expect_skews(5, 1, CUTS(few));
    expect_skews(5, 2, CUTS(many));
}
Test(parity, eight_experts, .timeout = 120) {
    expect_skews(8, 2, CUTS(many));
    expect_skews(8, 8, CUTS(few));
}
Test(parity, many_experts, .timeout = 120) {
    expect_skews(128, 8, CUTS(few));
    expect_skews(128, 2, CUTS(most));
}

/* With room for few rows they come in rounds, and once more in the backward. */
Test(parity, rounds, .timeout = 120) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    make_model(dir, 8, 2);
    for (skew kind = NATIVE; kind < SKEWS; kind++) {
        expect_alike((setting){.dir = dir, .skew = kind, .rows = 1}, CUTS(few));
        expect_alike((setting){.dir = dir, .skew = kind, .rows = 50}, CUTS(many));
    }
    scratch_remove(dir);
}

/* Layers that are run again in the backward. */
Test(parity, checkpointed, .timeout = 120) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    make_model(dir, 5, 2);
    for (int64_t rows = 0; rows < 2; rows++)
        for (skew kind = NATIVE; kind < SKEWS; kind++)
            expect_alike((setting){.dir = dir, .skew = kind, .activation_budget = 1, .rows = rows}, CUTS(few));
    scratch_remove(dir);
}

Test(parity, router_and_its_losses, .timeout = 120) {
    char dir[ESPI_PATH_MAX];
    golden_dir(dir, "q3a");
    expect_alike((setting){.dir = dir, .router = true}, CUTS(few));
    golden_dir(dir, "go1"); /* and sinks */
    expect_alike((setting){.dir = dir, .router = true}, CUTS(few));
}

/* A layer exchanges rows four times, and counts once. */
Test(parity, four_exchanges_a_layer) {
    char dir[ESPI_PATH_MAX];
    golden_dir(dir, "q3a");
    setting s = {.dir = dir, .ranks = 4, .spread = 4};
    outcome *out = outcome_of(&s);
    cr_expect_eq(out->rows_calls, 1 + 2 * (1 + 4), "%lld calls", (long long)out->rows_calls);
    drop_outcome(out);
    s.spread = 1;
    out = outcome_of(&s);
    cr_expect_eq(out->rows_calls, 0, "%lld calls", (long long)out->rows_calls);
    drop_outcome(out);
}

/* Where all tokens go as they were recorded, rows are counted once for all layers. */
Test(parity, counted_once_in_a_replay) {
    char dir[ESPI_PATH_MAX];
    golden_dir(dir, "q3a");
    setting s = {.dir = dir, .ranks = 4, .spread = 4, .skew = BALANCED};
    outcome *out = outcome_of(&s);
    cr_expect_eq(out->rows_calls, 2 + 2 * 4, "%lld calls", (long long)out->rows_calls);
    drop_outcome(out);
}
