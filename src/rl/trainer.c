/* The trainer: creation, the step, evaluation. */
#include "io/folder.h"
#include "models/passes.h"
#include "rl/run.h"
#include "rl/sampler.h"
#include "rl/server.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define SFT_EVAL_SEQUENCES 128

esp_status espi_take_array(void *out, int64_t count, size_t size) {
    void *p = calloc(count > 0 ? (size_t)count : 1, size);
    if (!p) return ESPI_FAIL(ESP_ERR_MEMORY, "trainer: no memory for %lld values of %zu bytes", (long long)count, size);
    memcpy(out, &p, sizeof p);
    return ESP_OK;
}

esp_status espi_copy_text(char **out, const char *text) {
    const size_t bytes = strlen(text) + 1;
    ESPI_TRY(espi_take_array(out, (int64_t)bytes, 1));
    memcpy(*out, text, bytes);
    return ESP_OK;
}

static esp_status read_tasks(esp_trainer *t) {
    t->info = (esp_model_info)ESP_MODEL_INFO_INIT;
    ESPI_TRY(esp_model_info_get(t->model, &t->info));
    if (t->info.eos_token_id < 0)
        return ESPI_FAIL(ESP_ERR_FORMAT,
                         "trainer: the model's config.json states no eos_token_id, expected one: completions would not end");
    const bool grpo = t->c.kind == ESP_TRAIN_GRPO;
    espi_tasks_options options = {.tokenizer = t->tokenizer,
                                  .eos = (int32_t)t->info.eos_token_id,
                                  .vocab = t->info.vocab,
                                  .scored = grpo,
                                  .chat = {.format = t->model->config.family->chat, .no_thinking = t->c.no_thinking}};
    if (!t->c.rollouts) ESPI_TRY(espi_tasks_read(&t->train, t->c.train_file, &options));
    options.scored = true;
    if (t->c.eval_file) ESPI_TRY(espi_tasks_read(&t->eval, t->c.eval_file, &options));
    t->rows = (int64_t)t->c.prompts_per_step * (grpo ? t->c.group_size : 1);
    t->longest = grpo ? (int64_t)t->train.longest_prompt + t->c.max_new_tokens : t->train.longest_line;
    const int64_t evaluated = t->eval.n > 0 ? (int64_t)t->eval.longest_prompt + t->c.max_new_tokens : 0;
    if (t->c.rollouts) ESPI_TRY(espi_files_source(t));
    if (t->longest > t->info.max_position)
        return ESPI_FAIL(ESP_ERR_ARG, "%s: its longest sequence has %lld tokens%s, expected at most the model's context of %lld",
                         t->c.rollouts ? t->c.rollouts : t->c.train_file, (long long)t->longest,
                         grpo && !t->c.rollouts ? " with max_new_tokens" : "", (long long)t->info.max_position);
    if (evaluated > t->info.max_position)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "%s: its longest sequence has %lld tokens with max_new_tokens, expected at most the model's context of %lld",
                         t->c.eval_file, (long long)evaluated, (long long)t->info.max_position);
    if (t->rows > INT32_MAX / t->longest)
        return ESPI_FAIL(ESP_ERR_ARG, "a step of %lld sequences of up to %lld tokens, expected at most %d tokens: lower prompts_per_step",
                         (long long)t->rows, (long long)t->longest, INT32_MAX);
    return ESP_OK;
}

/* Training draws its own completions. */
static bool samples(const esp_trainer *t) {
    return t->c.kind == ESP_TRAIN_GRPO && !t->c.rollouts;
}

static bool needs_sampler(const esp_trainer *t) {
    return samples(t) || t->eval.n > 0;
}

/* Rows of one generation decode together when it serves one step; larger ones come in waves. */
static esp_sampler_config sampler_config(const esp_trainer *t) {
    const bool grpo = samples(t);
    const int32_t train = grpo ? t->train.longest_prompt : 0, eval = t->eval.longest_prompt;
    return ESP_SAMPLER_CONFIG(.max_sequences = t->c.decode_rows ? t->c.decode_rows
                                               : grpo           ? (int32_t)t->rows
                                                                : SFT_EVAL_SEQUENCES,
                              .max_length = (train > eval ? train : eval) + t->c.max_new_tokens, .max_kept = (int32_t)t->most_kept,
                              .record_routes = grpo && !t->c.server && t->c.replay != ESP_REPLAY_NONE && t->c.replay != ESP_REPLAY_R2);
}

/* Without top_k as many as the sampler holds by default. */
static int64_t most_kept(const esp_trainer *t) {
    const int64_t vocab = t->info.vocab, most = t->c.top_k > 0 ? t->c.top_k : ESPI_SAMPLER_KEPT;
    const bool filtered = t->c.kind == ESP_TRAIN_GRPO && (t->c.top_k > 0 || t->c.top_p != 1 || t->c.min_p > 0);
    return !filtered ? 0 : most < vocab ? most : vocab;
}

/* Of the optimiser, the activations and the sampler; host: of the optimiser alone. */
static esp_status run_bytes(espi_extent *bytes, esp_trainer *t) {
    t->most_kept = most_kept(t);
    const esp_sampler_config sampler = sampler_config(t);
    espi_extent optim;
    size_t activations, cache = 0;
    if (t->c.server) ESPI_TRY(espi_server_reserve(t->model));
    ESPI_TRY(espi_adamw_plan(&optim, t->model, &t->c.adamw));
    ESPI_TRY(espi_update_reserve(&activations, t, false));
    if (needs_sampler(t)) ESPI_TRY(esp_sampler_plan(t->model, &sampler, &cache));
    if (activations < t->model->room.extent.main) activations = t->model->room.extent.main;
    *bytes = (espi_extent){.main = optim.main + activations + cache, .host = optim.host};
    return ESP_OK;
}

/* What the run will take, known before any of it is taken; then takes it. */
static esp_status take_memory(esp_trainer *t) {
    esp_ctx *ctx = t->model->ctx;
    espi_extent run;
    size_t activations;
    ESPI_TRY(run_bytes(&run, t));
    const esp_sampler_config sampler = sampler_config(t);
    const size_t whole = ctx->total - t->model->room.extent.main + run.main;
    t->planned = whole > ctx->peak ? whole : ctx->peak;
    ESPI_TRY(esp_adamw_create(&t->optim, t->model, &t->c.adamw));
    if (needs_sampler(t)) ESPI_TRY(esp_sampler_create(&t->sampler, t->model, &sampler));
    return espi_update_reserve(&activations, t, true);
}

static esp_status restore(esp_trainer *t) {
    char folder[ESPI_PATH_MAX] = "";
    if (t->c.resume_dir || t->out_dir || espi_ranks_count(t->model) > 1) ESPI_TRY(espi_model_fingerprint(&t->weights_hash, t->model));
    ESPI_TRY(espi_ranks_same(t->model, "the model's weights", &t->weights_hash, sizeof t->weights_hash));
    int64_t metrics_bytes = 0, completions_bytes = 0;
    if (t->c.resume_dir) ESPI_TRY(espi_state_restore(t, folder, t->c.resume_dir, &metrics_bytes, &completions_bytes));
    const bool logs = t->out_dir && espi_ranks_first(t->model);
    return espi_ranks_agree(t->model, "the logs", logs ? espi_logs_open(t, folder, metrics_bytes, completions_bytes) : ESP_OK);
}

/* Runs that were killed while they wrote leave files of no use behind. */
static esp_status sweep(const char *out_dir) {
    static const char *const folders[] = {"", "adapter", "adapter-best"};
    for (int i = 0; i < ESPI_COUNT(folders); i++) {
        char dir[ESPI_PATH_MAX];
        ESPI_TRY(espi_path_join(dir, out_dir, folders[i]));
        ESPI_TRY(espi_folder_sweep(dir));
    }
    return ESP_OK;
}

/* The folders and the lock, which there is one of. */
static esp_status take_folders(esp_trainer *t) {
    if (!espi_ranks_first(t->model)) return ESP_OK;
    if (t->out_dir) {
        ESPI_TRY(espi_dir_make(t->out_dir));
        ESPI_TRY(espi_lock_take(&t->lock, t->out_dir));
        ESPI_TRY(sweep(t->out_dir));
    }
    return t->save_rollouts ? espi_dir_make(t->save_rollouts) : ESP_OK;
}

/* What every rank does by itself. */
static esp_status prepare(esp_trainer *t, const esp_trainer_config *config) {
    ESPI_TRY(espi_trainer_settle(t, config));
    if (t->c.server && espi_ranks_count(t->model) > 1)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "server: got one with %d ranks, expected one rank: the ranks write completions themselves; leave it out, or start "
                         "one rank",
                         espi_ranks_count(t->model));
    ESPI_TRY(take_folders(t));
    ESPI_TRY(read_tasks(t));
    if (t->info.adapter_parameters == 0)
        return ESPI_FAIL(ESP_ERR_ARG, "trainer: the model has no adapter, expected one: nothing would train (see lora_targets)");
    ESPI_TRY(espi_take_array(&t->order, t->train.n, sizeof *t->order));
    return espi_update_create(t);
}

static esp_status build(esp_trainer *t, const esp_trainer_config *config) {
    ESPI_TRY(espi_ranks_agree(t->model, "the settings", prepare(t, config)));
    ESPI_TRY(espi_state_alike(t));
    ESPI_TRY(espi_ranks_agree(t->model, "the memory of a run", take_memory(t)));
    if (samples(t) && !t->c.server) espi_sampler_source(&t->source, t->sampler, t->model);
    ESPI_TRY(esp_model_zero_grad(t->model));
    if (t->c.reference == ESP_REFERENCE_SNAPSHOT) ESPI_TRY(espi_snapshot_take(t));
    ESPI_TRY(restore(t));
    if (t->c.server) ESPI_TRY(espi_server_source(t));
    /* The caller's strings and list need not outlive the call. */
    t->c.train_file = t->c.eval_file = t->c.out_dir = t->c.resume_dir = NULL;
    t->c.rollouts = t->c.save_rollouts = NULL;
    t->c.server = t->c.server_model = t->c.server_adapter_dir = t->c.server_adapter_path = NULL;
    return ESP_OK;
}

static esp_status make(esp_trainer **trainer, esp_model *model, const esp_tokenizer *tokenizer) {
    esp_trainer *t = calloc(1, sizeof *t);
    if (!t) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a trainer's bookkeeping");
    t->model = model;
    t->tokenizer = tokenizer;
    t->order_epoch = t->eval_step = t->published = -1;
    t->best = -1;
    *trainer = t;
    return ESP_OK;
}

esp_status esp_trainer_create(esp_trainer **trainer, esp_model *model, const esp_tokenizer *tokenizer, const esp_trainer_config *config) {
    if (!trainer || !model || !tokenizer || !config)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_create: trainer, model, tokenizer or config is NULL, expected all four");
    *trainer = NULL;
    esp_trainer *t = NULL;
    ESPI_TRY(make(&t, model, tokenizer));
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
    if (trainer->source.close) trainer->source.close(trainer->source.self);
    esp_sampler_destroy(trainer->sampler);
    esp_optim_destroy(trainer->optim);
    espi_rollout_free(trainer);
    espi_update_free(trainer);
    espi_snapshot_free(trainer);
    espi_tasks_free(&trainer->train);
    espi_tasks_free(&trainer->eval);
    espi_rewards_destroy(trainer->scorer);
    for (int32_t f = 0; trainer->rewards && f < trainer->c.n_rewards; f++) free((void *)trainer->rewards[f].name);
    free(trainer->rewards);
    free(trainer->weights);
    free(trainer->order);
    free(trainer->out_dir);
    free(trainer->save_rollouts);
    espi_lock_free(trainer->lock);
    free(trainer);
}

/* The same sums as of a trainer. */
static esp_status plan_on(size_t *peak, size_t *host, esp_model *model, const esp_tokenizer *tokenizer, const esp_trainer_config *config) {
    esp_trainer *t = NULL;
    espi_weight_plan w;
    espi_extent run = {0};
    ESPI_TRY(espi_weight_plan_make(&w, model->ctx, &model->config, &model->options, model->lora));
    ESPI_TRY(make(&t, model, tokenizer));
    esp_status status = espi_trainer_settle(t, config);
    if (status == ESP_OK) status = read_tasks(t);
    if (status == ESP_OK) status = run_bytes(&run, t);
    esp_trainer_destroy(t);
    *peak = espi_weight_plan_peak(&w, run.main);
    *host = w.host + run.host;
    return status;
}

esp_status esp_trainer_plan(size_t *peak, size_t *host, esp_ctx *ctx, const char *dir, const esp_model_config *model,
                            const esp_tokenizer *tokenizer, const esp_trainer_config *config) {
    if (!peak || !host || !ctx || !dir || !tokenizer || !config)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_plan: peak, host, ctx, dir, tokenizer or config is NULL, expected all six");
    esp_model outline;
    unsigned char reported[sizeof ctx->reported];
    const esp_log_fn log = ctx->log;
    memcpy(reported, ctx->reported, sizeof reported);
    ctx->log = NULL; /* what there is to tell is told by the trainer */
    esp_status status = espi_model_outline(&outline, ctx, dir, model);
    if (status == ESP_OK) status = plan_on(peak, host, &outline, tokenizer, config);
    espi_model_outline_free(&outline);
    ctx->log = log;
    memcpy(ctx->reported, reported, sizeof reported);
    return esp_comm_agree(ctx->comm, "the plan of a run", status);
}

int64_t esp_trainer_steps_done(const esp_trainer *trainer) {
    return trainer ? trainer->step : 0;
}

static bool stopped_early(const esp_trainer *t) {
    return t->c.early_stop > 0 && t->worse >= t->c.early_stop;
}

bool esp_trainer_finished(const esp_trainer *trainer) {
    return !trainer || trainer->step >= trainer->c.steps || stopped_early(trainer);
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

static bool evaluation_due(const esp_trainer *t) {
    return t->eval.n > 0 && (t->step % t->c.eval_every == 0 || t->step == t->c.steps);
}

esp_status espi_trainer_sample(esp_trainer *t) {
    t->sums = (espi_step_sums){0};
    espi_rewards_reset(t->scorer);
    if (t->phase != ESPI_PHASE_READY) ESPI_TRY(espi_rollout_make(t));
    if (t->phase == ESPI_PHASE_READY) espi_rollout_sequences(t);
    return ESP_OK;
}

static void next_lines(esp_trainer *t) {
    t->sums = (espi_step_sums){0};
    t->n_sequences = t->rows;
    for (int64_t i = 0; i < t->rows; i++) {
        int64_t line;
        uint32_t key;
        espi_next_line(t, &line, &key);
        const espi_task *task = &t->train.items[line];
        t->sequences[i] = (espi_sequence){.tokens = task->prompt_ids,
                                          .n_prompt = task->n_prompt,
                                          .n_completion = task->n_answer,
                                          .mask = task->answer_mask,
                                          .n_counted = task->n_counted,
                                          .row = -1,
                                          .group = -1};
    }
}

static esp_status evaluate_and_judge(esp_trainer *t, esp_step_stats *stats) {
    ESPI_TRY(esp_trainer_evaluate(t, &stats->eval_sampled, &stats->eval_greedy));
    return espi_judge(t);
}

/* Counts the step, evaluates and saves when due, writes its line. */
static esp_status finish_step(esp_trainer *t, esp_step_stats *stats) {
    for (int64_t i = 0; i < t->n_sequences; i++) t->num_tokens += t->sequences[i].n_prompt + t->sequences[i].n_completion;
    t->step++;
    ESPI_TRY(espi_rewards_gather(t->scorer, t->model));
    espi_stats_fill(t, stats);
    if (evaluation_due(t)) ESPI_TRY(evaluate_and_judge(t, stats));
    stats->early_stop = stopped_early(t);
    ESPI_TRY(espi_ranks_agree(t->model, "a step's line", t->metrics ? espi_log_step(t, stats) : ESP_OK));
    if (t->c.ref_sync_every > 0 && t->step % t->c.ref_sync_every == 0) ESPI_TRY(espi_snapshot_take(t));
    if (t->c.kind == ESP_TRAIN_GRPO && ++t->slice == t->slices) t->phase = ESPI_PHASE_EMPTY;
    const bool save = t->out_dir && (t->step % t->c.checkpoint_every == 0 || esp_trainer_finished(t));
    return save ? espi_state_save(t) : ESP_OK;
}

esp_status espi_trainer_update(esp_trainer *t, esp_step_stats *stats) {
    ESPI_TRY(espi_update(t));
    return finish_step(t, stats);
}

static esp_status step(esp_trainer *t, esp_step_stats *stats) {
    if (!t->started && t->eval.n > 0) {
        ESPI_TRY(evaluate_and_judge(t, stats));
        ESPI_TRY(espi_ranks_agree(t->model, "the first line", t->metrics ? espi_log_start(t) : ESP_OK));
    }
    t->started = true;
    if (t->c.kind == ESP_TRAIN_SFT) {
        ESPI_TRY(espi_stop_asked(&stats->interrupted, t));
        if (stats->interrupted) return ESP_OK;
        next_lines(t);
        return espi_trainer_update(t, stats);
    }
    ESPI_TRY(espi_trainer_sample(t));
    ESPI_TRY(espi_stop_asked(&stats->interrupted, t));
    stats->interrupted = stats->interrupted || t->phase != ESPI_PHASE_READY;
    return stats->interrupted ? ESP_OK : espi_trainer_update(t, stats);
}

esp_status esp_trainer_step(esp_trainer *trainer, esp_step_stats *stats) {
    if (!trainer) return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_step: trainer is NULL");
    if (trainer->step >= trainer->c.steps)
        return ESPI_FAIL(ESP_ERR_STATE, "esp_trainer_step: all %lld steps are done, expected fewer: raise steps",
                         (long long)trainer->c.steps);
    if (stopped_early(trainer))
        return ESPI_FAIL(ESP_ERR_STATE, "esp_trainer_step: early_stop ended the run at step %lld: raise early_stop",
                         (long long)trainer->step);
    esp_step_stats measured = ESP_STEP_STATS_INIT;
    espi_ranks_step(trainer->model, trainer->step + 1);
    ESPI_TRY(step(trainer, &measured));
    return stats ? espi_struct_write(stats, &measured, sizeof measured, "esp_step_stats") : ESP_OK;
}
