/* A run of the trainer on any number of ranks is the run on one: the same rollouts, lines of metrics and completions, adapter.  Ranks are
 * threads of this process. */
#include "demo.h"

#include "ranks.h"
#include "rl/ranks.h"
#include "scratch.h"

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
    size_t foretold[MOST_RANKS], planned[MOST_RANKS], peak[MOST_RANKS]; /* foretold: before the model was loaded */
    uint64_t best;                                                      /* of the file of the best adapter; 0: none is kept */
} outcome;

typedef struct rank_run {
    esp_trainer_config config;
    cut c;
    int64_t until;
    outcome *out; /* shared: every rank writes what is its own */
    esp_trainer *trainer;
    int64_t stop_step; /* where a stop is asked for on this rank */
    espi_phase stop_phase;
    esp_reward reward;
    const char *dir; /* of the model */
    float aux_coef;
    int lora_rank; /* 0: the default */
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
    const double numbers[] = {t->sums.loss, t->sums.grad_norm, t->sums.entropy, t->best, t->entropy_coef};
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

static esp_status work(rank_job *job) {
    rank_run *r = (rank_run *)job->user + job->rank;
    demo d = {NULL, NULL, NULL, NULL};
    const esp_model_config config =
        ESP_MODEL_CONFIG(.seed = 5, .expert_ranks = job->spread, .router_aux_coef = r->aux_coef, .lora_rank = r->lora_rank);
    size_t host;
    esp_status status = esp_ctx_create(&d.ctx, &ESP_CTX_CONFIG(.comm = job->comm, .threads = 1));
    if (status == ESP_OK) status = esp_tokenizer_load(&d.tokenizer, DEMO_MODEL);
    if (status == ESP_OK) status = esp_trainer_plan(&r->out->foretold[job->rank], &host, d.ctx, r->dir, &config, d.tokenizer, &r->config);
    if (status == ESP_OK) status = esp_model_load(&d.model, d.ctx, r->dir, &config);
    if (status == ESP_OK) status = train(r, d.model, d.tokenizer);
    demo_free(&d);
    r->calls = espi_comm_calls(job->comm);
    return status;
}

/* ---- all ranks ---- */

/* change: what one rank is given that the others are not, or NULL. */
typedef void (*change_fn)(rank_run *r, int rank);

static void on_ranks(rank_job *jobs, rank_run *runs, outcome *out, cut c, const esp_trainer_config *config, int64_t until,
                     change_fn change) {
    for (int i = 0; i < c.ranks; i++) {
        runs[i] = (rank_run){.config = *config, .c = c, .until = until, .out = out, .dir = DEMO_MODEL};
        if (change) change(&runs[i], i);
    }
    ranks_run(jobs, c.ranks, c.spread, work, runs);
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

static uint64_t hash_of(const char *dir, const char *name) {
    char path[ESPI_PATH_MAX], *bytes;
    size_t n;
    OK(espi_path_join(path, dir, name));
    OK(espi_file_read_all(&bytes, &n, path, (size_t)1 << 26));
    const uint64_t hash = mix(1, bytes, n);
    free(bytes);
    return hash;
}

/* A run that writes into `dir`. */
static outcome *outcome_in(const char *dir, cut c, esp_trainer_config config, int64_t until, change_fn change) {
    rank_job jobs[RANKS_MOST];
    rank_run ranks[MOST_RANKS];
    outcome *out = calloc(1, sizeof *out);
    cr_assert_not_null(out);
    config.out_dir = dir;
    out->c = c;
    on_ranks(jobs, ranks, out, c, &config, until, change);
    for (int i = 0; i < c.ranks; i++)
        cr_assert_eq(jobs[i].status, ESP_OK, "rank %d of %d, spread %d: %s", i, c.ranks, c.spread, jobs[i].sentence);
    for (int i = 1; i < c.ranks; i++) {
        cr_expect_eq(ranks[i].calls, ranks[0].calls);
        cr_expect_eq(out->state[i], out->state[0], "ranks %d and 0 of %d, spread %d, have other states", i, c.ranks, c.spread);
    }
    for (int i = 0; i < c.ranks; i++)
        cr_expect_eq(out->foretold[i], out->planned[i], "rank %d of %d, spread %d, plans %zu bytes, and planned %zu before it was loaded",
                     i, c.ranks, c.spread, out->planned[i], out->foretold[i]);
    for (int i = 0; i < c.ranks; i++)
        cr_expect_eq(out->peak[i], out->planned[i], "rank %d of %d, spread %d, took %zu bytes of %zu planned", i, c.ranks, c.spread,
                     out->peak[i], out->planned[i]);
    out->metrics = read_log(dir, "metrics.jsonl");
    if (config.kind == ESP_TRAIN_GRPO) out->completions = read_log(dir, "completions.jsonl");
    if (config.keep_best) out->best = hash_of(dir, "adapter-best/adapter_model.safetensors");
    return out;
}

static outcome *outcome_of(cut c, esp_trainer_config config, int64_t until, change_fn change) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    outcome *out = outcome_in(dir, c, config, until, change);
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
    cr_expect_eq(got->best, want->best, "%d ranks, spread %d: another best adapter", ranks, spread);
    cr_expect_eq(got->state[0], want->state[0], "%d ranks, spread %d: another state", ranks, spread);
    cr_expect_str_eq(got->metrics, want->metrics, "%d ranks, spread %d: metrics\n%s\nexpected\n%s", ranks, spread, got->metrics,
                     want->metrics);
    if (want->completions) cr_expect_str_eq(got->completions, want->completions, "%d ranks, spread %d: completions", ranks, spread);
    for (int64_t i = 0; i < want->n_params; i++)
        cr_expect_arr_eq(got->weight[i], want->weight[i], (size_t)want->size[i] * sizeof(float), "%d ranks, spread %d: parameter %lld",
                         ranks, spread, (long long)i);
}

static void expect_alike(const esp_trainer_config *config, int64_t until, const cut *cuts, int n, change_fn change) {
    outcome *want = outcome_of((cut){1, 1}, *config, until, change);
    cr_assert_eq(want->steps, until);
    for (int i = 0; i < n; i++) {
        outcome *got = outcome_of(cuts[i], *config, until, change);
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

/* A loss that counts every token that a router sees. */
static void balanced(rank_run *r, int rank) {
    (void)rank;
    r->aux_coef = 0.01f;
}

/* Numbers of each completion, some of which only some ranks have. */
static int telling_reward(void *user, const esp_reward_batch *batch, float *reward) {
    (void)user;
    for (int64_t i = 0; i < batch->n; i++) {
        reward[i] = (float)(batch->completion_ids[i][0] % 5);
        esp_reward_log(batch, "length", batch->completion_length[i]);
        if (batch->completion_length[i] < 4) esp_reward_log(batch, "short", batch->completion_length[i]);
    }
    return 0;
}

static void telling(rank_run *r, int rank) {
    (void)rank;
    r->reward = (esp_reward){.name = "own", .fn = telling_reward, .user = r, .weight = 1};
    r->config.rewards = &r->reward;
    r->config.n_rewards = 1;
}

/* Several micro-batches a step, and more ranks than there are of them in some step. */
static esp_trainer_config plain(void) {
    return ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .steps = 100, .seed = 5, .prompts_per_step = 5,
                              .group_size = 4, .micro_batch_tokens = 60, .checkpoint_every = 1000, .eval_every = 2, .eval_samples = 2,
                              .eval_file = short_eval(), .keep_best = true);
}

static esp_trainer_config everything(void) {
    esp_trainer_config c = plain();
    demo_everything(&c);
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
    expect_alike(&c, 3, CUTS(cuts), NULL);
}

Test(ranks_train, grpo_with_everything) {
    const esp_trainer_config c = everything();
    expect_alike(&c, 5, CUTS(few), NULL);
}

/* Routes of the old policy's pass; kept ids of filters; rewards that change owners; numbers that a reward logs. */
Test(ranks_train, recorded_routes_and_filters) {
    esp_trainer_config c = plain();
    c.replay = ESP_REPLAY_R2;
    c.updates_per_batch = 2;
    c.top_k = 5;
    c.shuffle_rewards = true;
    expect_alike(&c, 3, CUTS(few), telling);
}

Test(ranks_train, router_loss) {
    const esp_trainer_config c = plain();
    expect_alike(&c, 2, CUTS(few), balanced);
}

Test(ranks_train, sft) {
    const esp_trainer_config c = supervised();
    expect_alike(&c, 4, CUTS(cuts), NULL);
}

/* ---- a stop, and another number of ranks that goes on ---- */

static int stop_here(void *user) {
    const rank_run *r = user;
    return r->trainer && r->trainer->step == r->stop_step && r->trainer->phase == r->stop_phase;
}

static void stop_last_rank(rank_run *r, int rank, int64_t step, espi_phase phase) {
    if (rank + 1 < r->c.ranks) return;
    r->stop_step = step;
    r->stop_phase = phase;
    r->config.stop = stop_here;
    r->config.stop_user = r;
}

static void stop_ready(rank_run *r, int rank) {
    stop_last_rank(r, rank, 3, ESPI_PHASE_READY);
}
static void stop_gathering(rank_run *r, int rank) {
    stop_last_rank(r, rank, 4, ESPI_PHASE_GATHERING);
}
static void stop_between(rank_run *r, int rank) {
    stop_last_rank(r, rank, 2, ESPI_PHASE_EMPTY);
}

static void resume_elsewhere(esp_trainer_config c, int64_t until, change_fn stop, int64_t step, cut first, cut second) {
    char dir[ESPI_PATH_MAX];
    outcome *want = outcome_of((cut){1, 1}, c, until, NULL);
    scratch_make(dir);
    outcome *half = outcome_in(dir, first, c, until, stop);
    cr_expect_eq(half->steps, step);
    c.resume_dir = dir;
    outcome *got = outcome_in(dir, second, c, until, NULL);
    expect_same(got, want);
    scratch_remove(dir);
    drop(want);
    drop(half);
    drop(got);
}

Test(ranks_train, a_stop_on_one_rank_and_others_go_on) {
    const esp_trainer_config c = everything(), sft = supervised();
    resume_elsewhere(c, 5, stop_ready, 3, (cut){3, 3}, (cut){2, 1});
    resume_elsewhere(c, 5, stop_gathering, 4, (cut){2, 1}, (cut){4, 2});
    resume_elsewhere(sft, 4, stop_between, 2, (cut){4, 4}, (cut){1, 1});
}

/* ---- what ends all ranks ---- */

static int failing_reward(void *user, const esp_reward_batch *batch, float *reward) {
    const rank_run *r = user;
    for (int64_t i = 0; i < batch->n; i++) reward[i] = (float)batch->completion_length[i];
    return batch->step == 2 && espi_ranks_own(r->trainer->model) == 1 ? esp_reward_fail(batch, "no more of this") : 0;
}

static void failing(rank_run *r, int rank) {
    telling(r, rank);
    r->reward.fn = failing_reward;
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
static void other_loss(rank_run *r, int rank) {
    if (rank == 1) r->aux_coef = 0.5f;
}
static void other_adapter(rank_run *r, int rank) {
    if (rank == 2) r->lora_rank = 4;
}
static void other_model(rank_run *r, int rank) {
    if (rank == 2) r->dir = DEMO_GPT_OSS;
}
static void by_server(rank_run *r, int rank) {
    (void)rank;
    r->config.server = "http://127.0.0.1:9";
    r->config.server_adapter_dir = "/nowhere/adapters";
}
static void no_file(rank_run *r, int rank) {
    if (rank == 1) r->config.train_file = "/nowhere/lines.jsonl";
}

static void expect_end(change_fn change, esp_status status, const char *part) {
    rank_job jobs[RANKS_MOST];
    rank_run ranks[MOST_RANKS];
    outcome *out = calloc(1, sizeof *out);
    esp_trainer_config c = plain();
    c.keep_best = false; /* there is no folder */
    on_ranks(jobs, ranks, out, (cut){3, 3}, &c, 3, change);
    for (int i = 0; i < 3; i++) {
        cr_expect_eq(jobs[i].status, status, "rank %d: %s", i, jobs[i].sentence);
        cr_expect(strstr(jobs[i].sentence, part) != NULL, "rank %d says %s, expected: %s", i, jobs[i].sentence, part);
    }
    drop(out);
}

Test(ranks_train, what_fails_on_one_rank_ends_all) {
    expect_end(failing, ESP_ERR_CALLBACK, "rank 1: reward function \"own\" failed at step 2: no more of this");
    expect_end(no_file, ESP_ERR_IO, "/nowhere/lines.jsonl");
    expect_end(by_server, ESP_ERR_UNSUPPORTED, "server: got one with 3 ranks, expected one rank");
}

Test(ranks_train, what_differs_is_named) {
    expect_end(other_seed, ESP_ERR_MISMATCH, "config.seed");
    expect_end(other_lines, ESP_ERR_MISMATCH, "config.train_file_hash");
    expect_end(other_cut, ESP_ERR_MISMATCH, "config.eval_every");
    expect_end(other_loss, ESP_ERR_MISMATCH, "model.router_aux_coef is not the same on all ranks: rank 0 has ");
    expect_end(other_adapter, ESP_ERR_MISMATCH, "model.lora_rank or model.lora_targets is not the same on all ranks");
    expect_end(other_model, ESP_ERR_MISMATCH, "config.json is not the same on all ranks");
}
