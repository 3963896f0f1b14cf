/* What a checkpoint holds: adapter, moments, counters, the position in the data, and a rollout that has not been used up.  Random numbers
 * are counter-based, so the seed in the config and the counters are all their state. */
#include "io/checkpoint.h"
#include "models/passes.h"
#include "rl/run.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STATE_VERSION 3
enum {
    S_VERSION,
    S_STEP,
    S_OPTIM_STEP,
    S_OPTIM_SKIPPED,
    S_NUM_TOKENS,
    S_CURSOR,
    S_PHASE,
    S_TRIES,
    S_SLICE,
    S_GENERATION,
    S_LOST,
    S_RESAMPLED,
    S_HAS_ROLLOUTS,
    S_ENTROPY_ACTS,
    S_STARTED,
    S_BEST_STEP,
    S_WORSE,
    S_METRICS_BYTES,
    S_COMPLETIONS_BYTES,
    S_N_KEPT,
    S_KEPT,
    S_COUNT = S_KEPT + ESPI_KEPT_CHECKPOINTS_MAX
};
/* Numbers that are no counters. */
enum { R_ENTROPY_COEF, R_BEST, R_COUNT };

/* A list of arrays with names of its own: the same list says what to write and where to read to. */
typedef struct list {
    espi_saved_array *items;
    size_t n, capacity;
} list;

static void list_free(list *l) {
    for (size_t i = 0; i < l->n; i++) free((void *)l->items[i].name);
    free(l->items);
    *l = (list){0};
}

static esp_status add(list *l, const char *group, const char *name, esp_dtype dtype, int64_t count, void *data) {
    if (l->n == l->capacity) {
        const size_t capacity = 2 * l->capacity + 32;
        espi_saved_array *grown = realloc(l->items, capacity * sizeof *grown);
        if (!grown) return ESPI_FAIL(ESP_ERR_MEMORY, "checkpoint: no memory for a list of %zu arrays", capacity);
        l->items = grown;
        l->capacity = capacity;
    }
    char *full;
    const size_t bytes = strlen(group) + strlen(name) + 2;
    ESPI_TRY(espi_take_array(&full, (int64_t)bytes, 1));
    snprintf(full, bytes, "%s/%s", group, name);
    l->items[l->n++] = (espi_saved_array){.name = full, .dtype = dtype, .count = count, .data = data};
    return ESP_OK;
}

/* An array of `of` whole tensors of a parameter's shape, or of its experts' parts: of a tensor of experts this rank has its own alone. */
static esp_status add_part(list *l, const char *group, const char *name, const esp_trainer *t, const esp_param *of, esp_dtype dtype,
                           int64_t count, void *data, bool in_tensor_memory) {
    const espi_share *share = &t->model->share;
    ESPI_TRY(add(l, group, name, dtype, count, data));
    espi_saved_array *a = &l->items[l->n - 1];
    if (in_tensor_memory) a->ctx = t->model->ctx;
    if (of->rank != 3 || share->count == share->experts) return ESP_OK;
    a->first = share->count ? share->first * (count / share->count) : 0;
    a->total = share->count ? share->experts * (count / share->count) : -1;
    return ESP_OK;
}

static bool is_of(const esp_param *p, const char *moment) {
    const size_t n = strlen(p->name);
    return strncmp(moment, p->name, n) == 0 && moment[n] == '/';
}

static esp_status add_optimizer(list *l, esp_trainer *t, const esp_param *params) {
    for (int64_t i = 0, p = 0; i < esp_optim_array_count(t->optim); i++) {
        esp_optim_array a = ESP_OPTIM_ARRAY_INIT;
        ESPI_TRY(esp_optim_array_get(t->optim, i, &a));
        /* "NAME/m" of the parameter NAME; both lists are in the same order. */
        while (p < t->model->n_params && !is_of(&params[p], a.name)) p++;
        if (p == t->model->n_params) return ESPI_FAIL(ESP_ERR_INTERNAL, "checkpoint: %s is of no parameter", a.name);
        ESPI_TRY(add_part(l, "optimizer", a.name, t, &params[p], a.dtype, a.count, a.data, true));
    }
    return ESP_OK;
}

static esp_status add_adapter(list *l, esp_trainer *t) {
    char *reference = t->snapshot.data;
    for (int64_t i = 0; i < t->model->n_params; i++) {
        const esp_param *p = &t->model->params[i];
        const esp_tensor view = esp_tensor_view(p->data, p->dtype, p->rank, p->dims);
        const int64_t count = esp_tensor_count(&view);
        ESPI_TRY(add_part(l, "adapter", p->name, t, p, p->dtype, count, p->data, true));
        if (!reference) continue;
        ESPI_TRY(add_part(l, "reference", p->name, t, p, p->dtype, count, reference, false));
        reference += (size_t)count * esp_dtype_size(p->dtype);
    }
    return add_optimizer(l, t, t->model->params);
}

static esp_status add_rollouts(list *l, espi_rollouts *r) {
    espi_saved_array arrays[ESPI_ROLLOUT_ARRAYS];
    size_t n;
    espi_rollouts_arrays(arrays, &n, r);
    for (size_t i = 0; i < n; i++) {
        const char *name = strchr(arrays[i].name, '/') + 1;
        ESPI_TRY(add(l, "rollout", name, arrays[i].dtype, arrays[i].count, arrays[i].data));
    }
    return ESP_OK;
}

#define CORRECTION_STATS ((int64_t)(sizeof(espi_correction_stats) / sizeof(double)))

/* What is read to where it is written from: everything but the config, the counters and the rollouts, whose sizes are not known before. */
static esp_status make_list(list *l, esp_trainer *t) {
    ESPI_TRY(add(l, "trainer", "correction", ESP_F64, CORRECTION_STATS, &t->correction));
    return add_adapter(l, t);
}

static int set_text(json_t *root, const char *key, const char *format, unsigned long long value) {
    char text[32];
    snprintf(text, sizeof text, format, value);
    return json_object_set_new(root, key, json_string(text));
}

/* The objective and the optimiser as they are resolved: a default that was stated is the default. */
static int set_objective(json_t *root, const espi_objective *o) {
    const struct {
        const char *key;
        double value;
    } numbers[] = {
        {"epsilon_low", o->epsilon_low},
        {"epsilon_high", o->epsilon_high},
        {"delta", isinf(o->delta) ? 0 : o->delta}, /* 0: none */
        {"beta", o->beta},
        {"kl_grad", o->kl_grad},
        {"kl_bias_correction", o->kl_bias_correction},
        {"sapo_temperature_pos", o->sapo_temperature[0]},
        {"sapo_temperature_neg", o->sapo_temperature[1]},
        {"vespo_k_pos", o->vespo_k[0]},
        {"vespo_lambda_pos", o->vespo_lambda[0]},
        {"vespo_k_neg", o->vespo_k[1]},
        {"vespo_lambda_neg", o->vespo_lambda[1]},
        {"off_policy_mask_threshold", o->off_policy_mask_threshold},
        {"top_entropy_quantile", o->top_entropy_quantile},
        {"entropy_coef", o->entropy_coef},
        {"max_completion_length", o->max_completion_length},
        {"sequence_level", o->sequence_level},
    };
    int bad = json_object_set_new(root, "loss", json_string(espi_objective_name(o)));
    for (int i = 0; i < ESPI_COUNT(numbers); i++) bad |= json_object_set_new(root, numbers[i].key, json_real(numbers[i].value));
    return bad;
}

static int set_run(json_t *root, const esp_trainer *t, const espi_adamw_settings *a) {
    const esp_trainer_config *c = &t->c;
    const struct {
        const char *key;
        int64_t value;
    } numbers[] = {
        {"prompts_per_step", c->prompts_per_step},
        {"group_size", c->group_size},
        {"max_new_tokens", c->max_new_tokens},
        {"micro_batch_tokens", c->micro_batch_tokens},
        {"scale", c->scale},
        {"updates_per_batch", c->updates_per_batch},
        {"shuffle_rewards", c->shuffle_rewards},
        {"no_skip", c->no_skip},
        {"no_thinking", c->no_thinking},
        {"steps_per_generation", c->steps_per_generation},
        {"resample_tries", c->resample_tries},
        {"mask_truncated", c->mask_truncated},
        {"reference", c->reference},
        {"ref_sync_every", c->ref_sync_every},
        {"correction", c->correction},
        {"correction_level", c->correction_level},
        {"order", c->order},
        {"replay", c->replay},
        {"top_k", c->top_k},
        {"no_shared_prompts", c->no_shared_prompts},
        {"no_kl_on_zero_adv", c->no_kl_on_zero_adv},
        {"train_lines", t->train.n},
        {"layers", t->info.layers},
        {"hidden", t->info.hidden},
        {"experts", t->info.experts},
        {"vocab", t->info.vocab},
        {"lora_rank", t->info.lora_rank},
        {"adapter_parameters", t->info.adapter_parameters},
        {"experts_format", t->model->options.experts},
        {"double_quant", t->model->options.double_quant},
        {"adapter_dtype", t->model->ctx->real},
        {"adamw_eight_bit", a->eight_bit},
        {"adamw_schedule", a->schedule},
        {"adamw_warmup_steps", a->warmup_steps},
        {"adamw_total_steps", a->total_steps},
    };
    int bad = json_object_set_new(root, "kind", json_string(c->kind == ESP_TRAIN_GRPO ? "grpo" : "sft"));
    bad |= json_object_set_new(root, "family", json_string(t->info.family));
    for (int i = 0; i < ESPI_COUNT(numbers); i++) bad |= json_object_set_new(root, numbers[i].key, json_integer(numbers[i].value));
    bad |= set_text(root, "seed", "%llu", (unsigned long long)c->seed);
    bad |= set_text(root, "weights_hash", "%016llx", (unsigned long long)t->weights_hash);
    bad |= set_text(root, "train_file_hash", "%016llx", (unsigned long long)t->train.hash);
    return bad;
}

static int set_reals(json_t *root, const esp_trainer *t, const espi_adamw_settings *a) {
    const struct {
        const char *key;
        double value;
    } numbers[] = {{"temperature", t->c.temperature},
                   {"overlong_share", t->c.overlong_share},
                   {"overlong_penalty", t->c.overlong_penalty},
                   {"correction_low", t->c.correction_low},
                   {"correction_high", t->c.correction_high},
                   {"reject_low", t->c.reject_low},
                   {"reject_high", t->c.reject_high},
                   {"entropy_target", t->c.entropy_target},
                   {"entropy_step", t->c.entropy_step},
                   {"entropy_max", t->c.entropy_max},
                   {"top_p", t->c.top_p},
                   {"min_p", t->c.min_p},
                   {"lora_scale_q", t->model->lora[ESPI_T_Q].scale},
                   {"lora_scale_k", t->model->lora[ESPI_T_K].scale},
                   {"lora_scale_v", t->model->lora[ESPI_T_V].scale},
                   {"lora_scale_o", t->model->lora[ESPI_T_O].scale},
                   {"lora_scale_gate_up", t->model->lora[ESPI_T_GATE_UP].scale},
                   {"lora_scale_down", t->model->lora[ESPI_T_DOWN].scale},
                   {"adamw_lr", a->lr},
                   {"adamw_beta1", a->beta1},
                   {"adamw_beta2", a->beta2},
                   {"adamw_eps", a->eps},
                   {"adamw_weight_decay", a->weight_decay},
                   {"adamw_max_grad_norm", a->max_grad_norm},
                   {"adamw_num_cycles", a->num_cycles},
                   {"router_aux_coef", t->model->options.router_aux_coef},
                   {"router_z_coef", t->model->options.router_z_coef}};
    int bad = 0;
    for (int i = 0; i < ESPI_COUNT(numbers); i++) bad |= json_object_set_new(root, numbers[i].key, json_real(numbers[i].value));
    json_t *rewards = json_object();
    for (int32_t f = 0; f < t->c.n_rewards; f++) bad |= json_object_set_new(rewards, t->rewards[f].name, json_real(t->weights[f]));
    return bad | json_object_set_new(root, "rewards", rewards);
}

/* What else decides the course of a run. */
static int set_course(json_t *root, const esp_trainer *t) {
    const esp_trainer_config *c = &t->c;
    const struct {
        const char *key;
        int64_t value;
    } numbers[] = {
        {"steps", c->steps},
        {"eval_every", c->eval_every},
        {"eval_samples", c->eval_samples},
        {"eval_lines", t->eval.n},
        {"checkpoint_every", c->checkpoint_every},
        {"keep_checkpoints", c->keep_checkpoints},
        {"keep_best", c->keep_best},
        {"early_stop", c->early_stop},
        {"decode_rows", c->decode_rows},
        {"out", t->out_dir != NULL},
        {"resume", c->resume_dir != NULL},
        {"save_rollouts", t->save_rollouts != NULL},
        {"lora_targets", t->model->options.lora_targets},
        {"expert_rows", t->model->options.expert_rows},
    };
    int bad = set_text(root, "model_seed", "%llu", (unsigned long long)t->model->options.seed);
    bad |= set_text(root, "eval_file_hash", "%016llx", (unsigned long long)t->eval.hash);
    bad |= json_object_set_new(root, "backend", json_string(esp_ctx_backend(t->model->ctx)));
    for (int i = 0; i < ESPI_COUNT(numbers); i++) bad |= json_object_set_new(root, numbers[i].key, json_integer(numbers[i].value));
    return bad;
}

/* What two runs must have in common for one to go on with the other's state.  How long it runs and where it writes is not among it. */
static esp_status describe(json_t **config, const esp_trainer *t) {
    espi_objective objective;
    espi_adamw_settings adamw;
    ESPI_TRY(espi_objective_make(&objective, &t->c.objective));
    ESPI_TRY(espi_adamw_settings_read(&adamw, &t->c.adamw));
    json_t *root = json_object();
    if (!root || set_run(root, t, &adamw) | set_reals(root, t, &adamw) | set_objective(root, &objective)) {
        json_decref(root);
        return ESPI_FAIL(ESP_ERR_MEMORY, "checkpoint: no memory for the config as JSON");
    }
    *config = root;
    return ESP_OK;
}

static esp_status same_key(const esp_trainer *t, const char *key, const json_t *value) {
    char name[128];
    char *text = json_dumps(value, JSON_ENCODE_ANY | JSON_SORT_KEYS);
    if (!text) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the text of %s", key);
    snprintf(name, sizeof name, "config.%s", key);
    const esp_status status = espi_ranks_same(t->model, name, text, strlen(text));
    free(text);
    return status;
}

esp_status espi_state_alike(const esp_trainer *t) {
    const char *key;
    json_t *config, *value;
    if (espi_ranks_count(t->model) == 1) return ESP_OK;
    ESPI_TRY(describe(&config, t));
    esp_status status = set_course(config, t) ? ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the config as JSON") : ESP_OK;
    json_object_foreach(config, key, value) if (status == ESP_OK) status = same_key(t, key, value);
    json_decref(config);
    return status;
}

static esp_status write_list(esp_trainer *t, list *l, const char *path, char *config_text) {
    int64_t logs[] = {t->metrics ? espi_log_file_bytes(t->metrics) : 0, t->completions ? espi_log_file_bytes(t->completions) : 0};
    ESPI_TRY(espi_ranks_follow(logs, t->model, "the sizes of the logs", sizeof logs));
    esp_optim_stats optim = ESP_OPTIM_STATS_INIT;
    ESPI_TRY(esp_optim_stats_get(t->optim, &optim));
    const bool has_rollouts = t->phase != ESPI_PHASE_EMPTY && t->rollouts.shape.rows > 0;
    int64_t state[S_COUNT] = {[S_VERSION] = STATE_VERSION,
                              [S_STEP] = t->step,
                              [S_OPTIM_STEP] = optim.step,
                              [S_OPTIM_SKIPPED] = optim.skipped,
                              [S_NUM_TOKENS] = t->num_tokens,
                              [S_CURSOR] = t->cursor,
                              [S_PHASE] = t->phase,
                              [S_TRIES] = t->tries,
                              [S_SLICE] = t->slice,
                              [S_GENERATION] = t->generation,
                              [S_LOST] = t->lost,
                              [S_RESAMPLED] = t->resampled,
                              [S_HAS_ROLLOUTS] = has_rollouts,
                              [S_ENTROPY_ACTS] = t->entropy_acts,
                              [S_STARTED] = t->started,
                              [S_BEST_STEP] = t->best_step,
                              [S_WORSE] = t->worse,
                              [S_METRICS_BYTES] = logs[0],
                              [S_COMPLETIONS_BYTES] = logs[1],
                              [S_N_KEPT] = t->n_kept};
    double reals[R_COUNT] = {[R_ENTROPY_COEF] = t->entropy_coef, [R_BEST] = t->best};
    memcpy(state + S_KEPT, t->kept, sizeof t->kept);
    ESPI_TRY(add(l, "trainer", "state", ESP_I64, S_COUNT, state));
    ESPI_TRY(add(l, "trainer", "reals", ESP_F64, R_COUNT, reals));
    ESPI_TRY(add(l, "trainer", "config", ESP_U8, (int64_t)strlen(config_text), config_text));
    ESPI_TRY(make_list(l, t));
    if (has_rollouts) ESPI_TRY(add_rollouts(l, &t->rollouts));
    return espi_checkpoint_write(path, l->items, l->n, &t->model->share);
}

static esp_status checkpoint_name(char path[ESPI_PATH_MAX], const esp_trainer *t, int64_t step) {
    char name[64];
    snprintf(name, sizeof name, "checkpoint-%lld.h5", (long long)step);
    return espi_path_join(path, t->out_dir, name);
}

/* Of the steps that are kept, the oldest gives way. */
static esp_status note_kept(esp_trainer *t, char removed[ESPI_PATH_MAX]) {
    *removed = '\0';
    if (t->n_kept > 0 && t->kept[t->n_kept - 1] == t->step) return ESP_OK;
    if (t->n_kept >= t->c.keep_checkpoints) {
        ESPI_TRY(checkpoint_name(removed, t, t->kept[0]));
        memmove(t->kept, t->kept + 1, (size_t)(--t->n_kept) * sizeof *t->kept);
    }
    t->kept[t->n_kept++] = t->step;
    return ESP_OK;
}

/* Of several ranks, the file that names their parts; those stay as long as some file names them. */
static esp_status keep(const esp_trainer *t, const char *path, const char *removed) {
    char copy[ESPI_PATH_MAX];
    if (!espi_ranks_first(t->model)) return ESP_OK;
    ESPI_TRY(checkpoint_name(copy, t, t->step));
    ESPI_TRY(espi_file_copy(copy, path));
    if (*removed) espi_checkpoint_remove(removed);
    return ESP_OK;
}

esp_status espi_state_save(esp_trainer *t) {
    char path[ESPI_PATH_MAX], adapter[ESPI_PATH_MAX], removed[ESPI_PATH_MAX] = "";
    json_t *config;
    ESPI_TRY(espi_path_join(path, t->out_dir, "checkpoint.h5"));
    ESPI_TRY(espi_path_join(adapter, t->out_dir, "adapter"));
    ESPI_TRY(describe(&config, t));
    char *text = json_dumps(config, JSON_SORT_KEYS | JSON_INDENT(1));
    json_decref(config);
    if (!text) return ESPI_FAIL(ESP_ERR_MEMORY, "checkpoint: no memory for the config's text");
    list l = {0};
    esp_status status = t->c.keep_checkpoints > 0 ? note_kept(t, removed) : ESP_OK;
    if (status == ESP_OK) status = write_list(t, &l, path, text);
    list_free(&l);
    free(text);
    ESPI_TRY(status);
    if (t->c.keep_checkpoints > 0) ESPI_TRY(espi_ranks_agree(t->model, "a kept checkpoint", keep(t, path, removed)));
    return esp_model_save_adapter(t->model, adapter);
}

static esp_status compare(const json_t *mine, const json_t *theirs, const char *path) {
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)mine, key, value) {
        json_t *other = json_object_get(theirs, key);
        if (other && json_equal(value, other)) continue;
        char *got = json_dumps(value, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9));
        char *expected = other ? json_dumps(other, JSON_ENCODE_ANY | JSON_COMPACT | JSON_REAL_PRECISION(9)) : NULL;
        const esp_status status =
            ESPI_FAIL(ESP_ERR_MISMATCH, "%s: %s: got %s, expected %s as in the checkpoint: resume with its settings, or start afresh", path,
                      key, got ? got : "?", expected ? expected : "nothing");
        free(got);
        free(expected);
        return status;
    }
    return ESP_OK;
}

static esp_status check_config(const esp_trainer *t, const espi_checkpoint *c, const char *path) {
    int64_t bytes;
    char *text;
    json_t *mine;
    json_error_t error;
    ESPI_TRY(espi_checkpoint_count(&bytes, c, "trainer/config", ESP_U8));
    ESPI_TRY(espi_take_array(&text, bytes, 1));
    const esp_status status = espi_checkpoint_read(c, &(espi_saved_array){"trainer/config", ESP_U8, bytes, text});
    json_t *theirs = status == ESP_OK ? json_loadb(text, (size_t)bytes, 0, &error) : NULL;
    free(text);
    ESPI_TRY(status);
    if (!json_is_object(theirs)) {
        json_decref(theirs);
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: trainer/config is no JSON object", path);
    }
    esp_status same = describe(&mine, t);
    if (same == ESP_OK) {
        same = compare(mine, theirs, path);
        json_decref(mine);
    }
    json_decref(theirs);
    return same;
}

static esp_status check_state(const esp_trainer *t, const int64_t *s, const char *path) {
    if (s[S_VERSION] != STATE_VERSION)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: got version %lld, expected %d", path, (long long)s[S_VERSION], STATE_VERSION);
    for (int i = 0; i < S_COUNT; i++)
        if (s[i] < 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: trainer/state[%d]: got %lld, expected 0 or more", path, i, (long long)s[i]);
    if (s[S_STEP] > t->c.steps)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: got %lld steps done, expected at most the %lld of this run: raise steps", path,
                         (long long)s[S_STEP], (long long)t->c.steps);
    if (s[S_PHASE] > ESPI_PHASE_READY || (s[S_PHASE] && t->c.kind != ESP_TRAIN_GRPO) || (s[S_HAS_ROLLOUTS] && !s[S_PHASE]) ||
        (s[S_PHASE] == ESPI_PHASE_READY && (!s[S_HAS_ROLLOUTS] || s[S_SLICE] >= t->slices)) || s[S_N_KEPT] > ESPI_KEPT_CHECKPOINTS_MAX)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: trainer/state: got phase %lld at slice %lld of %lld, %lld kept checkpoints", path,
                         (long long)s[S_PHASE], (long long)s[S_SLICE], (long long)t->slices, (long long)s[S_N_KEPT]);
    return ESP_OK;
}

/* A restored rollout must not send the trainer outside of its arrays. */
static esp_status check_rollouts(const esp_trainer *t, const espi_rollouts *r, const char *path) {
    const int64_t g = t->c.group_size, most = (int64_t)t->c.prompts_per_step * t->c.steps_per_generation * (1 + t->c.resample_tries);
    ESPI_TRY(espi_rollouts_check(r, t->info.vocab, t->info.experts));
    bool good = r->shape.group_size == g && r->shape.rows <= most * g && r->shape.rewards == t->c.n_rewards;
    for (int64_t i = 0; i < r->shape.rows; i++) {
        good = good && r->offsets[i + 1] - r->offsets[i] <= t->longest;
        good = good && (t->source.own_prompts || (r->group[i] >= 0 && r->group[i] < t->train.n));
    }
    return good ? ESP_OK : ESPI_FAIL(ESP_ERR_FORMAT, "%s: the pending rollouts have a group, a length or a line out of range", path);
}

/* Reads every array beside its place first, then moves all: a checkpoint is taken whole or not at all. */
static esp_status read_list(const espi_checkpoint *c, const list *places, list *staged) {
    for (size_t i = 0; i < places->n; i++) {
        const espi_saved_array *to = &places->items[i];
        void *data;
        ESPI_TRY(add(staged, "", to->name, to->dtype, to->count, NULL));
        espi_saved_array *from = &staged->items[i];
        memmove((char *)from->name, from->name + 1, strlen(from->name)); /* its group is in the name already */
        ESPI_TRY(espi_take_array(&data, to->count, esp_dtype_size(to->dtype)));
        from->data = data;
        from->first = to->first;
        from->total = to->total;
    }
    return espi_checkpoint_read_all(c, staged->items, staged->n);
}

static void adopt(esp_trainer *t, const int64_t *s, const double *reals) {
    t->step = s[S_STEP];
    t->num_tokens = s[S_NUM_TOKENS];
    t->cursor = s[S_CURSOR];
    t->phase = (espi_phase)s[S_PHASE];
    t->tries = s[S_TRIES];
    t->slice = s[S_SLICE];
    t->generation = s[S_GENERATION];
    t->lost = s[S_LOST];
    t->resampled = s[S_RESAMPLED];
    t->entropy_acts = s[S_ENTROPY_ACTS] != 0;
    t->started = s[S_STARTED] != 0;
    t->best_step = s[S_BEST_STEP];
    t->worse = s[S_WORSE];
    t->n_kept = s[S_N_KEPT];
    memcpy(t->kept, s + S_KEPT, sizeof t->kept);
    t->entropy_coef = reals[R_ENTROPY_COEF];
    t->best = reals[R_BEST];
}

/* All that a restore needs, read and checked. */
typedef struct restored {
    list places, staged;
    int64_t s[S_COUNT];
    double reals[R_COUNT];
} restored;

static void restored_free(restored *r) {
    for (size_t i = 0; i < r->staged.n; i++) free(r->staged.items[i].data);
    list_free(&r->staged);
    list_free(&r->places);
}

static esp_status read_state(restored *r, esp_trainer *t, const espi_checkpoint *c, const char *path) {
    ESPI_TRY(espi_checkpoint_read(c, &(espi_saved_array){"trainer/state", ESP_I64, S_COUNT, r->s}));
    ESPI_TRY(espi_checkpoint_read(c, &(espi_saved_array){"trainer/reals", ESP_F64, R_COUNT, r->reals}));
    ESPI_TRY(check_state(t, r->s, path));
    ESPI_TRY(check_config(t, c, path));
    ESPI_TRY(make_list(&r->places, t));
    ESPI_TRY(read_list(c, &r->places, &r->staged));
    if (!r->s[S_HAS_ROLLOUTS]) return ESP_OK;
    ESPI_TRY(espi_rollouts_read(&t->rollouts, c));
    return check_rollouts(t, &t->rollouts, path);
}

static esp_status read_file(restored *r, esp_trainer *t, const char *path) {
    espi_checkpoint *c;
    ESPI_TRY(espi_checkpoint_open(&c, path));
    const esp_status status = read_state(r, t, c, path);
    espi_checkpoint_close(c);
    return status;
}

static esp_status apply(esp_trainer *t, const restored *r) {
    for (size_t i = 0; i < r->places.n; i++) {
        const espi_saved_array *to = &r->places.items[i];
        const size_t bytes = (size_t)to->count * esp_dtype_size(to->dtype);
        if (to->ctx)
            ESPI_TRY(espi_ctx_put(to->ctx, to->data, r->staged.items[i].data, bytes));
        else
            memcpy(to->data, r->staged.items[i].data, bytes);
    }
    ESPI_TRY(esp_optim_restore(t->optim, r->s[S_OPTIM_STEP], r->s[S_OPTIM_SKIPPED]));
    adopt(t, r->s, r->reals);
    return t->phase == ESPI_PHASE_READY ? espi_rollout_ready(t) : ESP_OK;
}

/* A folder, or a checkpoint file in one. */
static esp_status locate(char folder[ESPI_PATH_MAX], char path[ESPI_PATH_MAX], const char *from) {
    if (!espi_file_exists(from)) {
        ESPI_TRY(espi_path_join(path, from, "checkpoint.h5"));
        snprintf(folder, ESPI_PATH_MAX, "%s", from);
        return ESP_OK;
    }
    const char *slash = strrchr(from, '/');
    if (strlen(from) >= ESPI_PATH_MAX)
        return ESPI_FAIL(ESP_ERR_ARG, "resume: got a path of %zu bytes, expected fewer than %d", strlen(from), ESPI_PATH_MAX);
    snprintf(path, ESPI_PATH_MAX, "%s", from);
    snprintf(folder, ESPI_PATH_MAX, "%.*s", slash ? (int)(slash - from) : 1, slash ? from : ".");
    return ESP_OK;
}

esp_status espi_state_restore(esp_trainer *t, char folder[ESPI_PATH_MAX], const char *from, int64_t *metrics_bytes,
                              int64_t *completions_bytes) {
    char path[ESPI_PATH_MAX];
    restored r = {0};
    esp_status status = locate(folder, path, from);
    if (status == ESP_OK) status = read_file(&r, t, path);
    /* None goes on from a state that another could not read. */
    status = espi_ranks_agree(t->model, "reading a checkpoint", status);
    if (status == ESP_OK) status = apply(t, &r);
    *metrics_bytes = r.s[S_METRICS_BYTES];
    *completions_bytes = r.s[S_COMPLETIONS_BYTES];
    restored_free(&r);
    return status;
}
