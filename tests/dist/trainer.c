/* A run of the trainer on any number of ranks is the run on one: the same rollouts, lines of metrics and completions, adapter.  Ranks are
 * threads of this process. */
#include "demo.h"

#include "dist/share.h"
#include "rl/ranks.h"
#include "scratch.h"

#include <pthread.h>
#include <xxhash.h>

enum { MOST_RANKS = 8, MOST_PARAMS = 64, EVAL_LINES = 7, NAME = 32 };

/* How a run is cut over ranks. */
typedef struct cut {
    int ranks, spread;
} cut;

/* What must not depend on the cut. */
typedef struct outcome {
    char *metrics, *completions;
    float *weight[MOST_PARAMS]; /* whole tensors */
    int64_t size[MOST_PARAMS], n_params, steps;
    uint64_t state[MOST_RANKS]; /* of each rank's rollouts and counters */
    cut c;
    size_t planned[MOST_RANKS], peak[MOST_RANKS];
} outcome;

typedef struct rank_run {
    esp_trainer_config config;
    cut c;
    int64_t until;
    esp_comm *comm;
    outcome *out; /* shared: every rank writes what is its own */
    esp_trainer *trainer;
    int64_t stop_step; /* where a stop is asked for on this rank */
    espi_phase stop_phase;
    esp_reward reward;
    esp_status status;
    char sentence[600];
    uint64_t calls;
} rank_run;

/* ---- one rank ---- */

static uint64_t mix(uint64_t seed, const void *data, size_t bytes) {
    return XXH3_64bits_withSeed(data, bytes, seed);
}

/* What a rank knows of the run beside the model. */
static uint64_t state_of(const esp_trainer *t) {
    espi_saved_array arrays[ESPI_ROLLOUT_ARRAYS];
    size_t n = 0;
    espi_rollouts r = t->rollouts;
    if (t->rollouts.shape.rows > 0) espi_rollouts_arrays(arrays, &n, &r);
    const int64_t counters[] = {t->step, t->cursor, t->num_tokens, t->phase, t->tries, t->slice, t->generation, t->resampled, t->worse};
    const double numbers[] = {t->sums.loss, t->sums.grad_norm, t->sums.entropy, t->eval_sampled, t->eval_greedy, t->best, t->entropy_coef};
    uint64_t hash = mix(mix(1, counters, sizeof counters), numbers, sizeof numbers);
    for (size_t i = 0; i < n; i++) hash = mix(hash, arrays[i].data, (size_t)arrays[i].count * esp_dtype_size(arrays[i].dtype));
    return hash;
}

/* The rank's part of every tensor to its place in the whole. */
static void keep_weights(outcome *out, const esp_model *model) {
    const espi_share *s = &model->share;
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        const bool of_experts = p->rank == 3;
        const int64_t each = of_experts ? p->dims[1] * p->dims[2] : p->dims[0] * p->dims[1], n = of_experts ? p->dims[0] : 1;
        if (!espi_share_speaks(s, of_experts)) continue;
        memcpy(out->weight[i] + (of_experts ? s->first * each : 0), p->data, (size_t)(n * each) * sizeof(float));
    }
}

static void make_room(outcome *out, const esp_model *model) {
    out->n_params = model->n_params;
    for (int64_t i = 0; i < model->n_params; i++) {
        const esp_param *p = &model->params[i];
        out->size[i] = p->rank == 3 ? model->share.experts * p->dims[1] * p->dims[2] : p->dims[0] * p->dims[1];
        out->weight[i] = calloc((size_t)out->size[i], sizeof(float));
    }
}

static esp_status steps_of(rank_run *r, esp_trainer *t) {
    while (esp_trainer_steps_done(t) < r->until) {
        esp_step_stats stats = ESP_STEP_STATS_INIT;
        ESPI_TRY(esp_trainer_step(t, &stats));
        if (stats.interrupted) return esp_trainer_save(t);
    }
    return ESP_OK;
}

static esp_status train(rank_run *r, esp_model *model, const esp_tokenizer *tokenizer) {
    const int rank = espi_ranks_own(model);
    if (rank == 0) make_room(r->out, model);
    ESPI_TRY(esp_trainer_create(&r->trainer, model, tokenizer, &r->config));
    esp_trainer *t = r->trainer;
    esp_status status = steps_of(r, t);
    if (status == ESP_OK) status = esp_trainer_memory(t, &r->out->planned[rank], &r->out->peak[rank]);
    r->out->state[rank] = state_of(t);
    if (rank == 0) r->out->steps = esp_trainer_steps_done(t);
    keep_weights(r->out, model);
    esp_trainer_destroy(t);
    return status;
}

static esp_status work(rank_run *r) {
    esp_ctx *ctx = NULL;
    esp_model *model = NULL;
    esp_tokenizer *tokenizer = NULL;
    esp_status status = esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = r->comm, .threads = 1));
    if (status == ESP_OK)
        status = esp_model_load(&model, ctx, DEMO_MODEL, &ESP_MODEL_CONFIG(.seed = r->config.seed, .expert_ranks = r->c.spread));
    if (status == ESP_OK) status = esp_tokenizer_load(&tokenizer, DEMO_MODEL);
    if (status == ESP_OK) status = train(r, model, tokenizer);
    esp_tokenizer_destroy(tokenizer);
    esp_model_destroy(model);
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

/* ---- all ranks ---- */

/* change: what one rank is given that the others are not, or NULL. */
typedef void (*change_fn)(rank_run *r, int rank);

static void on_ranks(rank_run *ranks, outcome *out, cut c, const esp_trainer_config *config, int64_t until, change_fn change) {
    esp_comm *comms[MOST_RANKS];
    pthread_t threads[MOST_RANKS];
    OK(espi_comm_simulate(comms, c.ranks));
    for (int i = 0; i < c.ranks; i++) {
        ranks[i] = (rank_run){.config = *config, .c = c, .until = until, .comm = comms[i], .out = out};
        espi_comm_patience(comms[i], 60);
        if (change) change(&ranks[i], i);
    }
    for (int i = 0; i < c.ranks; i++) cr_assert_eq(pthread_create(&threads[i], NULL, run, &ranks[i]), 0);
    for (int i = 0; i < c.ranks; i++) pthread_join(threads[i], NULL);
}

/* A log without what depends on the machine: memory and clocks, which end a line. */
static char *read_log(const char *dir, const char *name) {
    char path[ESPI_PATH_MAX], *text;
    OK(espi_path_join(path, dir, name));
    OK(espi_file_read_all(&text, NULL, path, (size_t)1 << 24));
    for (char *p = text; (p = strstr(p, ",\"mem/peak_bytes\"")) != NULL;) {
        char *end = strchr(p, '\n');
        memmove(p, end, strlen(end) + 1);
    }
    return text;
}

/* A run that writes into `dir`. */
static outcome *outcome_in(const char *dir, cut c, esp_trainer_config config, int64_t until, change_fn change) {
    rank_run ranks[MOST_RANKS];
    outcome *out = calloc(1, sizeof *out);
    cr_assert_not_null(out);
    config.out_dir = dir;
    out->c = c;
    on_ranks(ranks, out, c, &config, until, change);
    for (int i = 0; i < c.ranks; i++)
        cr_assert_eq(ranks[i].status, ESP_OK, "rank %d of %d, spread %d: %s", i, c.ranks, c.spread, ranks[i].sentence);
    for (int i = 1; i < c.ranks; i++) {
        cr_expect_eq(ranks[i].calls, ranks[0].calls);
        cr_expect_eq(out->state[i], out->state[0], "ranks %d and 0 of %d, spread %d, have other states", i, c.ranks, c.spread);
    }
    for (int i = 0; i < c.ranks; i++)
        cr_expect_eq(out->peak[i], out->planned[i], "rank %d of %d, spread %d, took %zu bytes of %zu planned", i, c.ranks, c.spread,
                     out->peak[i], out->planned[i]);
    out->metrics = read_log(dir, "metrics.jsonl");
    if (config.kind == ESP_TRAIN_GRPO) out->completions = read_log(dir, "completions.jsonl");
    return out;
}

static outcome *outcome_of(cut c, esp_trainer_config config, int64_t until) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    outcome *out = outcome_in(dir, c, config, until, NULL);
    scratch_remove(dir);
    return out;
}

static void drop(outcome *out) {
    for (int64_t i = 0; i < out->n_params; i++) free(out->weight[i]);
    free(out->metrics);
    free(out->completions);
    free(out);
}

static void expect_same(const outcome *got, const outcome *want) {
    const int ranks = got->c.ranks, spread = got->c.spread;
    cr_expect_eq(got->steps, want->steps);
    cr_expect_eq(got->state[0], want->state[0], "%d ranks, spread %d: another state", ranks, spread);
    cr_expect_str_eq(got->metrics, want->metrics, "%d ranks, spread %d: metrics\n%s\nexpected\n%s", ranks, spread, got->metrics,
                     want->metrics);
    if (want->completions) cr_expect_str_eq(got->completions, want->completions, "%d ranks, spread %d: completions", ranks, spread);
    for (int64_t i = 0; i < want->n_params; i++)
        cr_expect_arr_eq(got->weight[i], want->weight[i], (size_t)want->size[i] * sizeof(float), "%d ranks, spread %d: parameter %lld",
                         ranks, spread, (long long)i);
}

static void expect_alike(const esp_trainer_config *config, int64_t until, const cut *cuts, int n) {
    outcome *want = outcome_of((cut){1, 1}, *config, until);
    cr_assert_eq(want->steps, until);
    for (int i = 0; i < n; i++) {
        outcome *got = outcome_of(cuts[i], *config, until);
        expect_same(got, want);
        drop(got);
    }
    drop(want);
}

/* ---- runs ---- */

/* The first lines of the evaluation's file. */
static const char *short_eval(void) {
    static char path[ESPI_PATH_MAX];
    char *text, *end;
    if (*path) return path;
    OK(espi_file_read_all(&text, NULL, DEMO_EVAL, (size_t)1 << 24));
    end = text;
    for (int i = 0; i < EVAL_LINES; i++) end = strchr(end, '\n') + 1;
    snprintf(path, sizeof path, "/tmp/espalier-%ld-eval.jsonl", (long)getpid());
    FILE *f = fopen(path, "wb");
    cr_assert_not_null(f);
    fwrite(text, 1, (size_t)(end - text), f);
    fclose(f);
    free(text);
    return path;
}

/* Several micro-batches a step, and more ranks than there are of them in some step. */
static esp_trainer_config plain(void) {
    return ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .steps = 100, .seed = 5, .prompts_per_step = 5,
                              .group_size = 4, .micro_batch_tokens = 60, .checkpoint_every = 1000, .eval_every = 2, .eval_samples = 2,
                              .eval_file = short_eval());
}

static esp_trainer_config everything(void) {
    esp_trainer_config c = plain();
    c.updates_per_batch = 2;
    c.steps_per_generation = 2;
    c.resample_tries = 2;
    c.reference = ESP_REFERENCE_SNAPSHOT;
    c.ref_sync_every = 3;
    c.objective.beta = 0.02f;
    c.entropy_target = 0.3f;
    c.overlong_share = 0.3f;
    c.correction = ESP_CORRECTION_TIS;
    c.decode_rows = 6;
    return c;
}

static esp_trainer_config supervised(void) {
    return ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_SFT, .train_file = DEMO_LINES, .steps = 100, .seed = 5, .prompts_per_step = 7,
                              .micro_batch_tokens = 60, .checkpoint_every = 1000, .eval_every = 3, .eval_samples = 1,
                              .eval_file = short_eval());
}

/* With 5 groups: ranks that have none of them; with uneven parts of the experts. */
static const cut cuts[] = {{2, 1}, {2, 2}, {3, 1}, {3, 3}, {4, 1}, {4, 2}, {4, 4}, {7, 7}}, few[] = {{2, 2}, {3, 1}, {4, 2}};
#define CUTS(table) (table), (int)(sizeof(table) / sizeof(table)[0])

static void remove_eval(void) {
    remove(short_eval());
}

TestSuite(ranks_train, .fini = remove_eval, .timeout = 180);

Test(ranks_train, grpo) {
    const esp_trainer_config c = plain();
    expect_alike(&c, 3, CUTS(cuts));
}

Test(ranks_train, grpo_with_everything) {
    const esp_trainer_config c = everything();
    expect_alike(&c, 5, CUTS(few));
}

/* Routes of the old policy's pass; kept ids of filters; rewards that give everybody's to others. */
Test(ranks_train, recorded_routes_and_filters) {
    esp_trainer_config c = plain();
    c.replay = ESP_REPLAY_R2;
    c.updates_per_batch = 2;
    c.top_k = 5;
    c.shuffle_rewards = true;
    expect_alike(&c, 3, CUTS(few));
}

Test(ranks_train, sft) {
    const esp_trainer_config c = supervised();
    expect_alike(&c, 4, CUTS(cuts));
}

/* ---- what ends all ranks ---- */

static int failing_reward(void *user, const esp_reward_batch *batch, float *reward) {
    const rank_run *r = user;
    for (int64_t i = 0; i < batch->n; i++) reward[i] = (float)batch->completion_length[i];
    return r->comm && batch->step == 2 && espi_ranks_own(r->trainer->model) == 1 ? esp_reward_fail(batch, "no more of this") : 0;
}

static void own_reward(rank_run *r, int rank) {
    (void)rank;
    r->reward = (esp_reward){.name = "own", .fn = failing_reward, .user = r, .weight = 1};
    r->config.rewards = &r->reward;
    r->config.n_rewards = 1;
}

static void other_seed(rank_run *r, int rank) {
    if (rank == 1) r->config.seed++;
}
static void other_lines(rank_run *r, int rank) {
    if (rank == 1) r->config.train_file = DEMO_LINES;
}
static void other_cut(rank_run *r, int rank) {
    if (rank == 1) r->config.eval_every = 3;
}
static void no_file(rank_run *r, int rank) {
    if (rank == 1) r->config.train_file = "/nowhere/lines.jsonl";
}

static void expect_end(change_fn change, esp_status status, const char *part) {
    rank_run ranks[MOST_RANKS];
    outcome *out = calloc(1, sizeof *out);
    const esp_trainer_config c = plain();
    on_ranks(ranks, out, (cut){3, 3}, &c, 3, change);
    for (int i = 0; i < 3; i++) {
        cr_expect_eq(ranks[i].status, status, "rank %d: %s", i, ranks[i].sentence);
        cr_expect(strstr(ranks[i].sentence, part) != NULL, "rank %d says %s, expected: %s", i, ranks[i].sentence, part);
    }
    drop(out);
}

Test(ranks_train, what_fails_on_one_rank_ends_all) {
    expect_end(own_reward, ESP_ERR_CALLBACK, "rank 1: reward function \"own\" failed at step 2: no more of this");
    expect_end(no_file, ESP_ERR_IO, "/nowhere/lines.jsonl");
}

Test(ranks_train, what_differs_is_named) {
    expect_end(other_seed, ESP_ERR_MISMATCH, "config.seed");
    expect_end(other_lines, ESP_ERR_MISMATCH, "config.train_file_hash");
    expect_end(other_cut, ESP_ERR_MISMATCH, "config.eval_every");
}
