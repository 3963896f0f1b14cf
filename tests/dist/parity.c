/* One training step over any number of ranks has the same bits as over one: hidden states, losses, every gradient, the norm, the weights
 * after the step.  Ranks are threads; real processes run the same code over another transport (ranks.sh). */
#include "dist/share.h"
#include "espalier/espalier.h"
#include "models/passes.h"
#include "outcome.h"

#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

enum { MOST_RANKS = 64, BATCHES = 7, MOST_TOKENS = 40, MOST_SEQS = 3 };

/* What is trained, and how it is cut.  rows: budget, 0 = default. */
typedef struct setting {
    const char *model;
    int ranks, spread;
    int64_t rows;
    size_t activation_budget;
    bool replay, router;
    const char *backend;
} setting;

/* Everything that must not depend on the ranks, whole tensors, whoever held them. */
typedef struct outcome {
    float hidden[BATCHES][MOST_TOKENS * 64];
    double loss[BATCHES], norm;
    int64_t n_params, size[64];
    float *grad[64], *weight[64]; /* [n_params]; the router's behind them */
    int64_t n_values;
} outcome;

typedef struct batch_data {
    int32_t tokens[MOST_TOKENS], cu[MOST_SEQS + 1];
    uint16_t *unused;
    esp_batch batch;
} batch_data;

/* Batches of 0 to 40 tokens; one hot expert comes of one token that is everywhere in some of them. */
static void make_batch(batch_data *b, int index, int vocab) {
    static const int sizes[BATCHES][MOST_SEQS] = {{12, 7, 1}, {40, 0, 0}, {0, 0, 0}, {1, 0, 0}, {5, 20, 9}, {33, 0, 0}, {2, 2, 2}};
    int n = 0, seqs = 0;
    b->cu[0] = 0;
    for (int s = 0; s < MOST_SEQS; s++) {
        if (sizes[index][s] == 0) continue;
        for (int i = 0; i < sizes[index][s]; i++, n++) b->tokens[n] = index == 5 ? 7 : (index * 31 + n * n * 7 + s * 13) % (vocab - 8) + 3;
        b->cu[++seqs] = n;
    }
    b->batch = ESP_BATCH(.tokens = b->tokens, .cu_seqlens = b->cu, .n_tokens = n, .n_seqs = seqs, .step_tokens = 120);
}

typedef struct rank_run {
    const setting *set;
    esp_comm *comm;
    outcome *out; /* shared: every rank writes what is its own */
    esp_status status;
    char sentence[600];
    uint64_t calls;
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
    free(out);
}

static esp_status run_batch(rank_run *r, esp_model *model, int index) {
    batch_data b;
    esp_tensor hidden, d_hidden;
    double loss;
    if (index < BATCHES)
        make_batch(&b, index, (int)model->config.vocab);
    else
        b.batch = ESP_BATCH(.step_tokens = 120);
    ESPI_TRY(esp_model_forward(model, &b.batch, &hidden));
    if (index < BATCHES) keep(r->out->hidden[index], hidden.data, b.batch.n_tokens * model->config.hidden, hidden.dtype);
    ESPI_TRY(esp_model_cross_entropy(model, &b.batch, &hidden, &loss, &d_hidden));
    if (index < BATCHES) r->out->loss[index] = loss;
    return esp_model_backward(model, &b.batch, &d_hidden);
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
    if (status == ESP_OK) status = esp_optim_step(optim);
    if (status == ESP_OK) status = esp_optim_stats_get(optim, &stats);
    if (status == ESP_OK) keep_params(r->out, model, false);
    if (model->share.rank == 0) r->out->norm = stats.grad_norm;
    esp_optim_destroy(optim);
    return status;
}

static esp_status work(rank_run *r) {
    const setting *s = r->set;
    char dir[512];
    esp_ctx *ctx;
    esp_model *model;
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s/model", ESP_SOURCE_DIR, s->model);
    ESPI_TRY(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = r->comm, .backend = s->backend ? s->backend : "cpu", .threads = 1)));
    esp_status status = esp_model_load(&model, ctx, dir,
                                       &ESP_MODEL_CONFIG(.lora_rank = 4, .expert_ranks = s->spread, .expert_rows = s->rows,
                                                         .activation_budget = s->activation_budget, .train_router = s->router));
    if (status == ESP_OK) {
        status = train(r, model);
        esp_model_destroy(model);
    }
    esp_ctx_destroy(ctx);
    return status;
}

static void *run(void *user) {
    rank_run *r = user;
    r->status = work(r);
    if (r->status != ESP_OK) snprintf(r->sentence, sizeof r->sentence, "%s", esp_last_error());
    r->calls = espi_comm_calls(r->comm);
    esp_comm_destroy(r->comm);
    return NULL;
}

static outcome *outcome_of(const setting *set) {
    rank_run ranks[MOST_RANKS];
    esp_comm *comms[MOST_RANKS];
    pthread_t threads[MOST_RANKS];
    outcome *out = calloc(1, sizeof *out);
    cr_assert_not_null(out);
    OK(espi_comm_simulate(comms, set->ranks));
    for (int i = 0; i < set->ranks; i++) {
        ranks[i] = (rank_run){.set = set, .comm = comms[i], .out = out};
        cr_assert_eq(pthread_create(&threads[i], NULL, run, &ranks[i]), 0);
    }
    for (int i = 0; i < set->ranks; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < set->ranks; i++)
        cr_assert_eq(ranks[i].status, ESP_OK, "%s, rank %d of %d, spread %d: %s", set->model, i, set->ranks, set->spread, ranks[i].sentence);
    return out;
}

static void expect_same(const outcome *got, const outcome *want, const setting *s) {
    for (int b = 0; b < BATCHES; b++) {
        cr_expect_arr_eq(got->hidden[b], want->hidden[b], sizeof got->hidden[b], "%s, %d ranks, spread %d: hidden states of batch %d", s->model,
                         s->ranks, s->spread, b);
        cr_expect(got->loss[b] == want->loss[b], "%s, %d ranks, spread %d: loss of batch %d", s->model, s->ranks, s->spread, b);
    }
    cr_expect(got->norm == want->norm && want->norm > 0, "%s, %d ranks, spread %d: norm %.17g, expected %.17g", s->model, s->ranks, s->spread,
              got->norm, want->norm);
    for (int64_t i = 0; i < want->n_params; i++) {
        const size_t bytes = (size_t)want->size[i] * sizeof(float);
        cr_expect_arr_eq(got->grad[i], want->grad[i], bytes, "%s, %d ranks, spread %d: gradient %lld", s->model, s->ranks, s->spread,
                         (long long)i);
        cr_expect_arr_eq(got->weight[i], want->weight[i], bytes, "%s, %d ranks, spread %d: weight %lld after the step", s->model, s->ranks,
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

static const int some[][2] = {{2, 1}, {2, 2}, {3, 3}, {4, 1}, {4, 2}, {4, 4}, {6, 3}};
#define CUTS(table) (table), (int)(sizeof(table) / sizeof(table)[0])

Test(parity, families, .timeout = 120) {
    expect_alike((setting){.model = "q3a"}, CUTS(some));
    expect_alike((setting){.model = "go1"}, CUTS(some));
    expect_alike((setting){.model = "glb"}, CUTS(some));
}
