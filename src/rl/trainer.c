/* The trainer: creation, the step, evaluation. */
#include "models/passes.h"
#include "rl/run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>

#define DEFAULT_STEPS 60
#define DEFAULT_PROMPTS 16
#define DEFAULT_LINES 32
#define DEFAULT_GROUP 8
#define DEFAULT_NEW_TOKENS 10
#define DEFAULT_EVAL_EVERY 10
#define DEFAULT_EVAL_SAMPLES 4
#define DEFAULT_CHECKPOINT_EVERY 20
#define SFT_EVAL_SEQUENCES 128

static const esp_reward default_rewards[] = {{.name = "exact", .fn = esp_reward_exact, .weight = 1.0},
                                             {.name = "match", .fn = esp_reward_match, .weight = 0.2}};

double espi_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

esp_status espi_take_array(void *out, int64_t count, size_t size) {
    void *p = calloc(count > 0 ? (size_t)count : 1, size);
    if (!p) return ESPI_FAIL(ESP_ERR_MEMORY, "trainer: no memory for %lld values of %zu bytes", (long long)count, size);
    memcpy(out, &p, sizeof p);
    return ESP_OK;
}

static esp_status copy_string(char **out, const char *text) {
    const size_t bytes = strlen(text) + 1;
    ESPI_TRY(espi_take_array(out, (int64_t)bytes, 1));
    memcpy(*out, text, bytes);
    return ESP_OK;
}

static void default_i32(int32_t *value, int32_t standard) {
    if (*value == 0) *value = standard;
}

static void default_i64(int64_t *value, int64_t standard) {
    if (*value == 0) *value = standard;
}

static void fill_defaults(esp_trainer_config *c) {
    const bool grpo = c->kind == ESP_TRAIN_GRPO;
    default_i64(&c->steps, DEFAULT_STEPS);
    default_i32(&c->prompts_per_step, grpo ? DEFAULT_PROMPTS : DEFAULT_LINES);
    if (grpo) default_i32(&c->group_size, DEFAULT_GROUP);
    default_i32(&c->max_new_tokens, DEFAULT_NEW_TOKENS);
    default_i32(&c->updates_per_batch, 1);
    default_i64(&c->eval_every, DEFAULT_EVAL_EVERY);
    default_i32(&c->eval_samples, DEFAULT_EVAL_SAMPLES);
    default_i64(&c->checkpoint_every, DEFAULT_CHECKPOINT_EVERY);
    if (!c->rewards) {
        c->rewards = default_rewards;
        c->n_rewards = ESPI_COUNT(default_rewards);
    }
}

static esp_status positive(const char *name, int64_t value) {
    if (value > 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG, "%s: got %lld, expected a positive number (0 = the default)", name, (long long)value);
}

static esp_status check_numbers(const esp_trainer_config *c) {
    ESPI_TRY(positive("steps", c->steps));
    ESPI_TRY(positive("prompts_per_step", c->prompts_per_step));
    ESPI_TRY(positive("max_new_tokens", c->max_new_tokens));
    ESPI_TRY(positive("updates_per_batch", c->updates_per_batch));
    ESPI_TRY(positive("eval_every", c->eval_every));
    ESPI_TRY(positive("eval_samples", c->eval_samples));
    ESPI_TRY(positive("checkpoint_every", c->checkpoint_every));
    if (c->micro_batch_tokens < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "micro_batch_tokens: got %d, expected a positive number (0 = the whole step at once)",
                         c->micro_batch_tokens);
    if (c->kind == ESP_TRAIN_SFT)
        return c->updates_per_batch == 1
                   ? ESP_OK
                   : ESPI_FAIL(ESP_ERR_ARG, "updates_per_batch: got %d with SFT, expected 1: raise steps", c->updates_per_batch);
    if (c->group_size < 2)
        return ESPI_FAIL(ESP_ERR_ARG, "group_size: got %d, expected 2 or more: a group of one has advantage 0 whatever it did",
                         c->group_size);
    return ESP_OK;
}

static esp_status check_rewards(const esp_trainer_config *c) {
    ESPI_TRY(positive("n_rewards", c->n_rewards));
    for (int32_t f = 0; f < c->n_rewards; f++) {
        const esp_reward *r = &c->rewards[f];
        if (!r->name || !r->fn) return ESPI_FAIL(ESP_ERR_ARG, "rewards[%d]: name or fn is NULL, expected both", f);
        if (!isfinite(r->weight))
            return ESPI_FAIL(ESP_ERR_ARG, "reward \"%s\": got weight %g, expected a finite number", r->name, r->weight);
    }
    return ESP_OK;
}

/* The objective's temperature is the sampler's: one number, wherever it was set. */
static esp_status settle_objective(esp_trainer_config *c) {
    esp_objective given;
    espi_objective checked;
    if (c->objective.struct_size == 0) c->objective.struct_size = sizeof c->objective; /* all 0 = defaults, the size too */
    ESPI_TRY(espi_struct_read(&given, sizeof given, &c->objective, "esp_objective"));
    if (given.temperature != 0 && c->temperature != 0 && given.temperature != c->temperature)
        return ESPI_FAIL(ESP_ERR_ARG, "temperature: got %g, and %g in the objective, expected one of them", (double)c->temperature,
                         (double)given.temperature);
    if (c->temperature == 0) c->temperature = given.temperature != 0 ? given.temperature : 1;
    given.temperature = c->temperature;
    /* dr_grpo's constant is the same for every step. */
    if (given.max_completion_length == 0) given.max_completion_length = c->max_new_tokens;
    c->objective = given;
    return espi_objective_make(&checked, &given);
}

static esp_status settle_config(esp_trainer *t, const esp_trainer_config *config) {
    esp_trainer_config *c = &t->c;
    ESPI_TRY(espi_struct_read(c, sizeof *c, config, "esp_trainer_config"));
    if (c->kind != ESP_TRAIN_SFT && c->kind != ESP_TRAIN_GRPO)
        return ESPI_FAIL(ESP_ERR_ARG, "kind: got %d, expected ESP_TRAIN_SFT or ESP_TRAIN_GRPO", (int)c->kind);
    if (!c->train_file) return ESPI_FAIL(ESP_ERR_ARG, "train_file is NULL, expected the path of a JSONL file");
    fill_defaults(c);
    ESPI_TRY(check_numbers(c));
    ESPI_TRY(check_rewards(c));
    ESPI_TRY(settle_objective(c));
    if (c->adamw.struct_size == 0) c->adamw.struct_size = sizeof c->adamw;
    ESPI_TRY(espi_take_array(&t->rewards, c->n_rewards, sizeof *t->rewards));
    ESPI_TRY(espi_take_array(&t->weights, c->n_rewards, sizeof *t->weights));
    for (int32_t f = 0; f < c->n_rewards; f++) {
        char *name = NULL;
        ESPI_TRY(copy_string(&name, c->rewards[f].name));
        t->rewards[f] = c->rewards[f];
        t->rewards[f].name = name;
        t->weights[f] = c->rewards[f].weight;
    }
    return c->out_dir ? copy_string(&t->out_dir, c->out_dir) : ESP_OK;
}

static esp_status read_tasks(esp_trainer *t) {
    t->info = (esp_model_info)ESP_MODEL_INFO_INIT;
    ESPI_TRY(esp_model_info_get(t->model, &t->info));
    if (t->info.adapter_parameters == 0)
        return ESPI_FAIL(ESP_ERR_ARG, "trainer: the model has no adapter, expected one: nothing would train (see lora_targets)");
    if (t->info.eos_token_id < 0)
        return ESPI_FAIL(ESP_ERR_FORMAT,
                         "trainer: the model's config.json states no eos_token_id, expected one: completions would not end");
    const bool grpo = t->c.kind == ESP_TRAIN_GRPO;
    espi_tasks_options options = {.tokenizer = t->tokenizer,
                                  .eos = (int32_t)t->info.eos_token_id,
                                  .vocab = t->info.vocab,
                                  .scored = grpo,
                                  .chat = {.format = t->model->config.family->chat, .no_thinking = t->c.no_thinking}};
    ESPI_TRY(espi_tasks_read(&t->train, t->c.train_file, &options));
    options.scored = true;
    if (t->c.eval_file) ESPI_TRY(espi_tasks_read(&t->eval, t->c.eval_file, &options));
    t->rows = (int64_t)t->c.prompts_per_step * (grpo ? t->c.group_size : 1);
    t->longest = grpo ? t->train.longest_prompt + t->c.max_new_tokens : t->train.longest_line;
    if (t->longest > t->info.max_position)
        return ESPI_FAIL(ESP_ERR_ARG, "%s: its longest sequence has %lld tokens%s, expected at most the model's context of %lld",
                         t->c.train_file, (long long)t->longest, grpo ? " with max_new_tokens" : "", (long long)t->info.max_position);
    if (t->rows > INT32_MAX / t->longest)
        return ESPI_FAIL(ESP_ERR_ARG, "a step of %lld sequences of up to %lld tokens, expected at most %d tokens: lower prompts_per_step",
                         (long long)t->rows, (long long)t->longest, INT32_MAX);
    return ESP_OK;
}

static bool needs_sampler(const esp_trainer *t) {
    return t->c.kind == ESP_TRAIN_GRPO || t->eval.n > 0;
}

static esp_sampler_config sampler_config(const esp_trainer *t) {
    const bool grpo = t->c.kind == ESP_TRAIN_GRPO;
    const int32_t train = grpo ? t->train.longest_prompt : 0, eval = t->eval.longest_prompt;
    return ESP_SAMPLER_CONFIG(.max_sequences = grpo ? (int32_t)t->rows : SFT_EVAL_SEQUENCES,
                              .max_length = (train > eval ? train : eval) + t->c.max_new_tokens);
}

/* What the run will take, known before any of it is taken; then takes it. */
static esp_status take_memory(esp_trainer *t) {
    esp_ctx *ctx = t->model->ctx;
    const esp_sampler_config sampler = sampler_config(t);
    size_t optim, activations, cache = 0;
    ESPI_TRY(espi_adamw_plan(&optim, t->model, &t->c.adamw));
    ESPI_TRY(espi_update_reserve(&activations, t, false));
    if (needs_sampler(t)) ESPI_TRY(esp_sampler_plan(t->model, &sampler, &cache));
    if (activations < t->model->room.extent.main) activations = t->model->room.extent.main;
    const size_t whole = ctx->total - t->model->room.extent.main + activations + optim + cache;
    t->planned = whole > ctx->peak ? whole : ctx->peak;
    ESPI_TRY(esp_adamw_create(&t->optim, t->model, &t->c.adamw));
    if (needs_sampler(t)) ESPI_TRY(esp_sampler_create(&t->sampler, t->model, &sampler));
    return espi_update_reserve(&activations, t, true);
}

static esp_status restore(esp_trainer *t) {
    if (t->c.resume_dir || t->out_dir) t->weights_hash = XXH3_64bits(t->model->weights.p, t->model->weights.bytes);
    int64_t metrics_bytes = 0, completions_bytes = 0;
    if (t->c.resume_dir) ESPI_TRY(espi_state_restore(t, t->c.resume_dir, &metrics_bytes, &completions_bytes));
    return t->out_dir ? espi_logs_open(t, metrics_bytes, completions_bytes) : ESP_OK;
}

static esp_status build(esp_trainer *t, const esp_trainer_config *config) {
    ESPI_TRY(settle_config(t, config));
    ESPI_TRY(read_tasks(t));
    ESPI_TRY(espi_take_array(&t->order, t->train.n, sizeof *t->order));
    ESPI_TRY(espi_update_create(t));
    if (t->c.kind == ESP_TRAIN_GRPO) ESPI_TRY(espi_rollout_create(t));
    ESPI_TRY(take_memory(t));
    ESPI_TRY(esp_model_zero_grad(t->model));
    ESPI_TRY(restore(t));
    /* The caller's strings and list need not outlive the call. */
    t->c.train_file = t->c.eval_file = t->c.out_dir = t->c.resume_dir = NULL;
    t->c.rewards = t->rewards;
    return ESP_OK;
}

esp_status esp_trainer_create(esp_trainer **trainer, esp_model *model, const esp_tokenizer *tokenizer, const esp_trainer_config *config) {
    if (!trainer || !model || !tokenizer || !config)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_create: trainer, model, tokenizer or config is NULL, expected all four");
    *trainer = NULL;
    esp_trainer *t = calloc(1, sizeof *t);
    if (!t) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a trainer's bookkeeping");
    t->model = model;
    t->tokenizer = tokenizer;
    t->order_epoch = -1;
    t->eval_step = -1;
    const esp_status status = build(t, config);
    if (status != ESP_OK) {
        esp_trainer_destroy(t);
        return status;
    }
    *trainer = t;
    return ESP_OK;
}

void esp_trainer_destroy(esp_trainer *trainer) {
    if (!trainer) return;
    espi_logs_close(trainer);
    esp_sampler_destroy(trainer->sampler);
    esp_optim_destroy(trainer->optim);
    espi_rollout_free(trainer);
    espi_update_free(trainer);
    espi_tasks_free(&trainer->train);
    espi_tasks_free(&trainer->eval);
    for (int32_t f = 0; trainer->rewards && f < trainer->c.n_rewards; f++) free((void *)trainer->rewards[f].name);
    free(trainer->rewards);
    free(trainer->weights);
    free(trainer->order);
    free(trainer->out_dir);
    free(trainer);
}

int64_t esp_trainer_steps_done(const esp_trainer *trainer) {
    return trainer ? trainer->step : 0;
}

esp_status esp_trainer_evaluate(esp_trainer *trainer, double *sampled, double *greedy) {
    if (!trainer || !sampled || !greedy) return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_evaluate: an argument is NULL, expected none");
    if (trainer->eval.n == 0) return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_evaluate: no eval_file in the config, expected one");
    if (trainer->eval_step != trainer->step) {
        ESPI_TRY(espi_evaluate(trainer, &trainer->eval_sampled, trainer->c.eval_samples, false));
        ESPI_TRY(espi_evaluate(trainer, &trainer->eval_greedy, 1, true));
        trainer->eval_step = trainer->step;
    }
    *sampled = trainer->eval_sampled;
    *greedy = trainer->eval_greedy;
    return ESP_OK;
}

esp_status esp_trainer_save(esp_trainer *trainer) {
    if (!trainer) return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_save: trainer is NULL");
    if (!trainer->out_dir) return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_save: no out_dir in the config, expected one");
    return espi_state_save(trainer);
}

esp_status esp_trainer_memory(const esp_trainer *trainer, size_t *planned_bytes, size_t *peak_bytes) {
    if (!trainer || !planned_bytes || !peak_bytes) return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_memory: an argument is NULL, expected none");
    *planned_bytes = trainer->planned;
    *peak_bytes = trainer->model->ctx->peak;
    return ESP_OK;
}

/* KL to the base is worth a forward on evaluation steps, even when the loss has no use for it. */
static bool evaluation_due(const esp_trainer *t, int64_t step) {
    return step % t->c.eval_every == 0 || step == t->c.steps;
}

esp_status espi_trainer_sample(esp_trainer *t) {
    t->sums = (espi_step_sums){0};
    ESPI_TRY(espi_rollout_make(t));
    espi_rollout_sequences(t);
    t->rollout.has_ref = t->c.objective.beta > 0 || evaluation_due(t, t->step + 1);
    const double start = espi_seconds();
    if (t->rollout.has_ref) ESPI_TRY(espi_reference_logprobs(t));
    t->sums.seconds_train = espi_seconds() - start;
    t->updates_done = 0;
    t->pending = true;
    return ESP_OK;
}

static void next_lines(esp_trainer *t) {
    t->sums = (espi_step_sums){0};
    for (int64_t i = 0; i < t->rows; i++) {
        int64_t line;
        uint32_t key;
        espi_next_line(t, &line, &key);
        const espi_task *task = &t->train.items[line];
        t->sequences[i] = (espi_sequence){.prompt = task->prompt_ids,
                                          .n_prompt = task->n_prompt,
                                          .completion = task->answer_ids,
                                          .n_completion = task->n_answer,
                                          .mask = task->answer_mask,
                                          .n_counted = task->n_counted};
    }
}

/* Counts the step, evaluates and saves when due, writes its line. */
static esp_status finish_step(esp_trainer *t, esp_step_stats *stats) {
    for (int64_t i = 0; i < t->rows; i++) t->num_tokens += t->sequences[i].n_prompt + t->sequences[i].n_completion;
    t->step++;
    espi_stats_fill(t, stats);
    if (t->eval.n > 0 && evaluation_due(t, t->step)) ESPI_TRY(esp_trainer_evaluate(t, &stats->eval_sampled, &stats->eval_greedy));
    t->pending = false;
    if (t->out_dir) ESPI_TRY(espi_log_step(t, stats));
    const bool save = t->out_dir && (t->step % t->c.checkpoint_every == 0 || t->step == t->c.steps);
    return save ? espi_state_save(t) : ESP_OK;
}

esp_status espi_trainer_update(esp_trainer *t, esp_step_stats *stats) {
    while (t->updates_done < t->c.updates_per_batch) {
        const double start = espi_seconds();
        ESPI_TRY(espi_update(t));
        t->sums.seconds_train += espi_seconds() - start;
        t->updates_done++;
    }
    return finish_step(t, stats);
}

static esp_status step(esp_trainer *t, esp_step_stats *stats) {
    if (t->step == 0 && !t->pending && t->eval.n > 0) {
        ESPI_TRY(esp_trainer_evaluate(t, &stats->eval_sampled, &stats->eval_greedy));
        if (t->out_dir) ESPI_TRY(espi_log_start(t));
    }
    if (t->c.kind == ESP_TRAIN_SFT) {
        next_lines(t);
        t->updates_done = 0;
        return espi_trainer_update(t, stats);
    }
    if (!t->pending) ESPI_TRY(espi_trainer_sample(t));
    return espi_trainer_update(t, stats);
}

esp_status esp_trainer_step(esp_trainer *trainer, esp_step_stats *stats) {
    if (!trainer) return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_step: trainer is NULL");
    if (trainer->step >= trainer->c.steps)
        return ESPI_FAIL(ESP_ERR_STATE, "esp_trainer_step: all %lld steps are done, expected fewer: raise steps",
                         (long long)trainer->c.steps);
    esp_step_stats measured = ESP_STEP_STATS_INIT;
    ESPI_TRY(step(trainer, &measured));
    return stats ? espi_struct_write(stats, &measured, sizeof measured, "esp_step_stats") : ESP_OK;
}
