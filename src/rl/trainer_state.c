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

#define STATE_VERSION 1
enum {
    S_VERSION,
    S_STEP,
    S_OPTIM_STEP,
    S_OPTIM_SKIPPED,
    S_NUM_TOKENS,
    S_CURSOR,
    S_PENDING,
    S_UPDATES_DONE,
    S_HAS_REF,
    S_METRICS_BYTES,
    S_COMPLETIONS_BYTES,
    S_COUNT
};

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

static esp_status add_adapter(list *l, esp_trainer *t) {
    for (int64_t i = 0; i < esp_model_param_count(t->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        ESPI_TRY(esp_model_param_get(t->model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        ESPI_TRY(add(l, "adapter", p.name, p.dtype, esp_tensor_count(&view), p.data));
    }
    for (int64_t i = 0; i < esp_optim_array_count(t->optim); i++) {
        esp_optim_array a = ESP_OPTIM_ARRAY_INIT;
        ESPI_TRY(esp_optim_array_get(t->optim, i, &a));
        ESPI_TRY(add(l, "optimizer", a.name, a.dtype, a.count, a.data));
    }
    return ESP_OK;
}

static esp_status add_rollout(list *l, esp_trainer *t) {
    const espi_rollout *r = &t->rollout;
    const int64_t n = r->n, cells = n * t->c.max_new_tokens;
    ESPI_TRY(add(l, "rollout", "line", ESP_I64, t->c.prompts_per_step, r->line));
    ESPI_TRY(add(l, "rollout", "tokens", ESP_I32, cells, r->tokens));
    ESPI_TRY(add(l, "rollout", "sampler_logprob", ESP_F32, cells, r->logprobs));
    ESPI_TRY(add(l, "rollout", "ref_logprob", ESP_F32, cells, r->ref));
    ESPI_TRY(add(l, "rollout", "length", ESP_I32, n, r->lengths));
    ESPI_TRY(add(l, "rollout", "stopped", ESP_U8, n, r->stopped));
    ESPI_TRY(add(l, "rollout", "reward_parts", ESP_F64, n * t->c.n_rewards, r->parts));
    ESPI_TRY(add(l, "rollout", "reward", ESP_F64, n, r->reward));
    ESPI_TRY(add(l, "rollout", "advantage", ESP_F64, n, r->advantage));
    ESPI_TRY(add(l, "rollout", "exact", ESP_F64, n, r->exact));
    return add(l, "rollout", "sums", ESP_F64, ESPI_STEP_SUMS, &t->sums);
}

/* Everything but the config and the counters. */
static esp_status make_list(list *l, esp_trainer *t, bool pending) {
    ESPI_TRY(add_adapter(l, t));
    return pending ? add_rollout(l, t) : ESP_OK;
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

static esp_status write_list(esp_trainer *t, list *l, const char *path, char *config_text) {
    esp_optim_stats optim = ESP_OPTIM_STATS_INIT;
    ESPI_TRY(esp_optim_stats_get(t->optim, &optim));
    int64_t state[S_COUNT] = {[S_VERSION] = STATE_VERSION,
                              [S_STEP] = t->step,
                              [S_OPTIM_STEP] = optim.step,
                              [S_OPTIM_SKIPPED] = optim.skipped,
                              [S_NUM_TOKENS] = t->num_tokens,
                              [S_CURSOR] = t->cursor,
                              [S_PENDING] = t->pending,
                              [S_UPDATES_DONE] = t->updates_done,
                              [S_HAS_REF] = t->rollout.has_ref,
                              [S_METRICS_BYTES] = espi_log_file_bytes(t->metrics),
                              [S_COMPLETIONS_BYTES] = t->completions ? espi_log_file_bytes(t->completions) : 0};
    ESPI_TRY(add(l, "trainer", "state", ESP_I64, S_COUNT, state));
    ESPI_TRY(add(l, "trainer", "config", ESP_U8, (int64_t)strlen(config_text), config_text));
    ESPI_TRY(make_list(l, t, t->pending));
    return espi_checkpoint_write(path, l->items, l->n);
}

esp_status espi_state_save(esp_trainer *t) {
    char path[ESPI_PATH_MAX], adapter[ESPI_PATH_MAX];
    json_t *config;
    ESPI_TRY(espi_path_join(path, t->out_dir, "checkpoint.h5"));
    ESPI_TRY(espi_path_join(adapter, t->out_dir, "adapter"));
    ESPI_TRY(describe(&config, t));
    char *text = json_dumps(config, JSON_SORT_KEYS | JSON_INDENT(1));
    json_decref(config);
    if (!text) return ESPI_FAIL(ESP_ERR_MEMORY, "checkpoint: no memory for the config's text");
    list l = {0};
    const esp_status status = write_list(t, &l, path, text);
    list_free(&l);
    free(text);
    ESPI_TRY(status);
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
    if (s[S_PENDING] > 1 || s[S_UPDATES_DONE] > t->c.updates_per_batch || (s[S_PENDING] && t->c.kind != ESP_TRAIN_GRPO))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: trainer/state: got pending %lld after %lld updates", path, (long long)s[S_PENDING],
                         (long long)s[S_UPDATES_DONE]);
    return ESP_OK;
}

/* A restored rollout must not send the trainer outside of its arrays. */
static esp_status check_rollout(const esp_trainer *t, const list *staged, const char *path) {
    const int32_t *length = NULL, *token = NULL;
    const int64_t *line = NULL;
    for (size_t i = 0; i < staged->n; i++) {
        if (!strcmp(staged->items[i].name, "rollout/length")) length = staged->items[i].data;
        if (!strcmp(staged->items[i].name, "rollout/tokens")) token = staged->items[i].data;
        if (!strcmp(staged->items[i].name, "rollout/line")) line = staged->items[i].data;
    }
    if (!length || !token || !line) return ESP_OK; /* nothing pending */
    bool good = true;
    for (int64_t i = 0; i < t->rows; i++) good = good && length[i] >= 1 && length[i] <= t->c.max_new_tokens;
    for (int64_t i = 0; i < t->c.prompts_per_step; i++) good = good && line[i] >= 0 && line[i] < t->train.n;
    for (int64_t i = 0; i < t->rows * t->c.max_new_tokens; i++) good = good && token[i] >= 0 && token[i] < t->info.vocab;
    return good ? ESP_OK : ESPI_FAIL(ESP_ERR_FORMAT, "%s: the pending rollout has a length, a line or an id out of range", path);
}

/* Reads every array beside its place first, then moves all: a checkpoint is taken whole or not at all. */
static esp_status read_list(esp_trainer *t, const espi_checkpoint *c, const list *places, list *staged, const char *path) {
    for (size_t i = 0; i < places->n; i++) {
        const espi_saved_array *to = &places->items[i];
        void *data;
        ESPI_TRY(add(staged, "", to->name, to->dtype, to->count, NULL));
        espi_saved_array *from = &staged->items[i];
        memmove((char *)from->name, from->name + 1, strlen(from->name)); /* its group is in the name already */
        ESPI_TRY(espi_take_array(&data, to->count, esp_dtype_size(to->dtype)));
        from->data = data;
        ESPI_TRY(espi_checkpoint_read(c, from));
    }
    ESPI_TRY(check_rollout(t, staged, path));
    for (size_t i = 0; i < places->n; i++)
        memcpy(places->items[i].data, staged->items[i].data, (size_t)places->items[i].count * esp_dtype_size(places->items[i].dtype));
    return ESP_OK;
}

static esp_status apply(esp_trainer *t, const espi_checkpoint *c, const char *path, int64_t *s) {
    ESPI_TRY(espi_checkpoint_read(c, &(espi_saved_array){"trainer/state", ESP_I64, S_COUNT, s}));
    ESPI_TRY(check_state(t, s, path));
    ESPI_TRY(check_config(t, c, path));
    list places = {0}, staged = {0};
    esp_status status = make_list(&places, t, s[S_PENDING] != 0);
    if (status == ESP_OK) status = read_list(t, c, &places, &staged, path);
    for (size_t i = 0; i < staged.n; i++) free(staged.items[i].data);
    list_free(&staged);
    list_free(&places);
    return status;
}

static esp_status adopt(esp_trainer *t, const int64_t *s) {
    ESPI_TRY(esp_optim_restore(t->optim, s[S_OPTIM_STEP], s[S_OPTIM_SKIPPED]));
    t->step = s[S_STEP];
    t->num_tokens = s[S_NUM_TOKENS];
    t->cursor = s[S_CURSOR];
    t->pending = s[S_PENDING] != 0;
    t->updates_done = s[S_UPDATES_DONE];
    t->rollout.has_ref = s[S_HAS_REF] != 0;
    if (!t->pending) return ESP_OK;
    ESPI_TRY(espi_rollout_texts(t));
    espi_rollout_sequences(t);
    return ESP_OK;
}

esp_status espi_state_restore(esp_trainer *t, const char *dir, int64_t *metrics_bytes, int64_t *completions_bytes) {
    char path[ESPI_PATH_MAX];
    espi_checkpoint *c;
    int64_t s[S_COUNT];
    ESPI_TRY(espi_path_join(path, dir, "checkpoint.h5"));
    ESPI_TRY(espi_checkpoint_open(&c, path));
    const esp_status status = apply(t, c, path, s);
    espi_checkpoint_close(c);
    ESPI_TRY(status);
    *metrics_bytes = s[S_METRICS_BYTES];
    *completions_bytes = s[S_COMPLETIONS_BYTES];
    return adopt(t, s);
}
