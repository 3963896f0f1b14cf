/* The trainer's options: presets, defaults, and the pairs that make no sense, each refused with both names. */
#include "core/decimal.h"
#include "rl/run.h"

#include <math.h>
#include <string.h>

#define DEFAULT_STEPS 60
#define DEFAULT_PROMPTS 16
#define DEFAULT_LINES 32
#define DEFAULT_GROUP 8
#define DEFAULT_NEW_TOKENS 10
#define DEFAULT_EVAL_EVERY 10
#define DEFAULT_EVAL_SAMPLES 4
#define DEFAULT_CHECKPOINT_EVERY 20
#define DEFAULT_SERVER_RETRIES 4
#define DEFAULT_SERVER_CONCURRENCY 32
#define DEFAULT_SERVER_TIMEOUT 120
#define DEFAULT_ENTROPY_STEP 0.005f
#define DEFAULT_ENTROPY_MAX 0.1f

static const esp_reward default_rewards[] = {{.name = "exact", .fn = esp_reward_exact, .weight = 1.0},
                                             {.name = "match", .fn = esp_reward_match, .weight = 0.2}};

/* ---- presets ---- */

static void preset_trl(esp_trainer_config *c) {
    c->objective.loss = ESP_LOSS_DAPO;
    c->objective.epsilon_low = c->objective.epsilon_high = 0.2f;
    c->objective.kl_grad = ESP_KL_GRAD_K3;
    c->scale = ESP_SCALE_GROUP;
}

static void preset_dapo(esp_trainer_config *c) {
    c->objective.loss = ESP_LOSS_DAPO;
    c->objective.epsilon_low = 0.2f;
    c->objective.epsilon_high = 0.28f;
    c->scale = ESP_SCALE_GROUP;
    c->resample_tries = 3;
    c->overlong_share = 0.2f;
}

static void preset_dr_grpo(esp_trainer_config *c) {
    c->objective.loss = ESP_LOSS_DR_GRPO;
    c->objective.epsilon_low = c->objective.epsilon_high = 0.2f;
    c->scale = ESP_SCALE_NONE;
}

static void preset_gspo_moe(esp_trainer_config *c) {
    c->objective.loss = ESP_LOSS_GRPO;
    c->objective.level = ESP_IS_SEQUENCE;
    c->objective.epsilon_low = 3e-4f;
    c->objective.epsilon_high = 4e-4f;
    c->scale = ESP_SCALE_GROUP;
}

static void preset_cispo(esp_trainer_config *c) {
    c->objective.loss = ESP_LOSS_CISPO;
    c->objective.epsilon_high = 5;
    c->scale = ESP_SCALE_GROUP;
}

static const struct {
    const char *name;
    void (*fill)(esp_trainer_config *c);
} presets[] = {{"trl-default", preset_trl},
               {"dapo", preset_dapo},
               {"dr-grpo", preset_dr_grpo},
               {"gspo-moe", preset_gspo_moe},
               {"cispo", preset_cispo}};

esp_status esp_trainer_preset(esp_trainer_config *config, const char *name) {
    if (!config || !name) return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_preset: config or name is NULL, expected both");
    if (config->struct_size != sizeof *config)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_trainer_preset: struct_size is %zu, expected %zu: start from ESP_TRAINER_CONFIG()",
                         config->struct_size, sizeof *config);
    for (int i = 0; i < ESPI_COUNT(presets); i++)
        if (!strcmp(presets[i].name, name)) {
            presets[i].fill(config);
            return ESP_OK;
        }
    return ESPI_FAIL(ESP_ERR_ARG, "preset: got \"%s\", expected trl-default, dapo, dr-grpo, gspo-moe or cispo", name);
}

/* ---- defaults ---- */

static void default_i32(int32_t *value, int32_t standard) {
    if (*value == 0) *value = standard;
}

static void default_i64(int64_t *value, int64_t standard) {
    if (*value == 0) *value = standard;
}

static void default_real(float *value, float standard) {
    if (*value == 0) *value = standard;
}

static void fill_correction(esp_trainer_config *c) {
    if (c->correction == ESP_CORRECTION_DEFAULT) c->correction = c->server || c->rollouts ? ESP_CORRECTION_TIS : ESP_CORRECTION_NONE;
    if (c->correction == ESP_CORRECTION_TIS) default_real(&c->correction_high, 2);
    if (c->correction == ESP_CORRECTION_MIS) default_real(&c->correction_high, 3);
    if (c->correction == ESP_CORRECTION_ICEPOP) {
        default_real(&c->correction_low, 0.5f);
        default_real(&c->correction_high, 5);
    }
}

static void fill_defaults(esp_trainer_config *c) {
    const bool grpo = c->kind == ESP_TRAIN_GRPO;
    default_i64(&c->steps, DEFAULT_STEPS);
    default_i32(&c->prompts_per_step, grpo ? DEFAULT_PROMPTS : DEFAULT_LINES);
    if (grpo) default_i32(&c->group_size, DEFAULT_GROUP);
    default_i32(&c->max_new_tokens, DEFAULT_NEW_TOKENS);
    default_i32(&c->updates_per_batch, 1);
    default_i32(&c->steps_per_generation, 1);
    default_i64(&c->eval_every, DEFAULT_EVAL_EVERY);
    default_i32(&c->eval_samples, DEFAULT_EVAL_SAMPLES);
    default_i64(&c->checkpoint_every, DEFAULT_CHECKPOINT_EVERY);
    if (c->overlong_share != 0) default_real(&c->overlong_penalty, 1);
    if (c->entropy_target != 0) {
        default_real(&c->entropy_step, DEFAULT_ENTROPY_STEP);
        default_real(&c->entropy_max, DEFAULT_ENTROPY_MAX);
    }
    default_real(&c->top_p, 1);
    fill_correction(c);
    if (c->server) {
        default_i32(&c->server_retries, DEFAULT_SERVER_RETRIES);
        default_i32(&c->server_concurrency, DEFAULT_SERVER_CONCURRENCY);
        default_real(&c->server_timeout, DEFAULT_SERVER_TIMEOUT);
    }
    if (!c->rewards) {
        c->rewards = default_rewards;
        c->n_rewards = ESPI_COUNT(default_rewards);
    }
}

/* ---- checks ---- */

static esp_status positive(const char *name, int64_t value) {
    if (value > 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG, "%s: got %lld, expected a positive number (0 = the default)", name, (long long)value);
}

static esp_status between(const char *name, float value, double low, double high) {
    if (value >= low && value <= high && isfinite(value)) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG, "%s: got %g, expected a number in [%g, %g]", name, (double)value, low, high);
}

static esp_status check_enums(const esp_trainer_config *c) {
    const struct {
        const char *name;
        int value, last;
    } enums[] = {{"scale", c->scale, ESP_SCALE_BATCH},
                 {"reference", c->reference, ESP_REFERENCE_SNAPSHOT},
                 {"correction", c->correction, ESP_CORRECTION_ICEPOP},
                 {"correction_level", c->correction_level, ESP_IS_SEQUENCE},
                 {"order", c->order, ESP_NORMALIZE_THEN_SUM},
                 {"replay", c->replay, ESP_REPLAY_R3}};
    for (int i = 0; i < ESPI_COUNT(enums); i++)
        if (enums[i].value < 0 || enums[i].value > enums[i].last)
            return ESPI_FAIL(ESP_ERR_ARG, "%s: got %d, expected 0 to %d", enums[i].name, enums[i].value, enums[i].last);
    return ESP_OK;
}

static esp_status check_numbers(const esp_trainer_config *c) {
    ESPI_TRY(positive("steps", c->steps));
    ESPI_TRY(positive("prompts_per_step", c->prompts_per_step));
    ESPI_TRY(positive("max_new_tokens", c->max_new_tokens));
    ESPI_TRY(positive("updates_per_batch", c->updates_per_batch));
    ESPI_TRY(positive("steps_per_generation", c->steps_per_generation));
    ESPI_TRY(positive("eval_every", c->eval_every));
    ESPI_TRY(positive("eval_samples", c->eval_samples));
    ESPI_TRY(positive("checkpoint_every", c->checkpoint_every));
    if (c->micro_batch_tokens < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "micro_batch_tokens: got %d, expected a positive number (0 = the whole step at once)",
                         c->micro_batch_tokens);
    if (c->resample_tries < 0 || c->early_stop < 0 || c->ref_sync_every < 0 || c->top_k < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "%s: got a negative number, expected 0 or more",
                         c->resample_tries < 0   ? "resample_tries"
                         : c->early_stop < 0     ? "early_stop"
                         : c->ref_sync_every < 0 ? "ref_sync_every"
                                                 : "top_k");
    if (c->decode_rows < 0) return ESPI_FAIL(ESP_ERR_ARG, "decode_rows: got %d, expected a positive number (0 = all)", c->decode_rows);
    if (c->keep_checkpoints < 0 || c->keep_checkpoints > ESPI_KEPT_CHECKPOINTS_MAX)
        return ESPI_FAIL(ESP_ERR_ARG, "keep_checkpoints: got %d, expected 0 to %d", c->keep_checkpoints, ESPI_KEPT_CHECKPOINTS_MAX);
    const double any = 1e30;
    ESPI_TRY(between("overlong_share", c->overlong_share, 0, 1));
    ESPI_TRY(between("overlong_penalty", c->overlong_penalty, 0, any));
    ESPI_TRY(between("correction_low", c->correction_low, 0, any));
    ESPI_TRY(between("correction_high", c->correction_high, 0, any));
    ESPI_TRY(between("reject_low", c->reject_low, 0, any));
    ESPI_TRY(between("reject_high", c->reject_high, 0, any));
    ESPI_TRY(between("entropy_target", c->entropy_target, 0, any));
    ESPI_TRY(between("entropy_step", c->entropy_step, 0, any));
    ESPI_TRY(between("entropy_max", c->entropy_max, 0, any));
    ESPI_TRY(between("top_p", c->top_p, 1e-6, 1));
    ESPI_TRY(between("min_p", c->min_p, 0, 1));
    ESPI_TRY(between("reward_timeout", c->reward_timeout, 0, any));
    return between("rollout_timeout", c->rollout_timeout, 0, any);
}

static esp_status check_sft(const esp_trainer_config *c) {
    const struct {
        const char *name;
        bool set;
    } options[] = {{"updates_per_batch", c->updates_per_batch != 1},
                   {"steps_per_generation", c->steps_per_generation != 1},
                   {"resample_tries", c->resample_tries != 0},
                   {"overlong_share", c->overlong_share != 0},
                   {"mask_truncated", c->mask_truncated},
                   {"reference", c->reference != ESP_REFERENCE_BASE},
                   {"correction", c->correction != ESP_CORRECTION_NONE},
                   {"entropy_target", c->entropy_target != 0},
                   {"replay", c->replay != ESP_REPLAY_DEFAULT},
                   {"server", c->server}};
    for (int i = 0; i < ESPI_COUNT(options); i++)
        if (options[i].set)
            return ESPI_FAIL(ESP_ERR_ARG, "%s: set with SFT, which samples nothing; expected it left alone", options[i].name);
    return ESP_OK;
}

static esp_status pair(const char *a, const char *b, const char *why) {
    return ESPI_FAIL(ESP_ERR_ARG, "%s together with %s makes no sense: %s", a, b, why);
}

static esp_status check_objective_pairs(const esp_trainer_config *c) {
    const esp_objective *o = &c->objective;
    const esp_loss_type loss = o->loss == ESP_LOSS_DEFAULT ? ESP_LOSS_DAPO : o->loss;
    char name[64];
    snprintf(name, sizeof name, "loss %s", esp_loss_type_name(loss));
    if (o->level == ESP_IS_SEQUENCE && (loss == ESP_LOSS_DAPO || loss == ESP_LOSS_BNPO || loss == ESP_LOSS_DR_GRPO))
        return pair("level sequence", name,
                    "its weights add up tokens, so a sequence's one ratio would count as often as it is long; set loss grpo or luspo");
    if (o->level == ESP_IS_TOKEN && loss == ESP_LOSS_LUSPO)
        return pair("level token", name, "luspo is a loss of whole sequences; set level sequence");
    if (c->entropy_target != 0 && o->top_entropy_quantile != 0 && o->top_entropy_quantile != 1)
        return pair("entropy_target", "top_entropy_quantile", "the controller looks at the entropy of all tokens; set one of them to 0");
    if (c->entropy_target != 0 && o->entropy_coef < 0)
        return pair("entropy_target", "entropy_coef below 0", "the controller's coefficient starts there and is never negative");
    if (c->entropy_target == 0 && c->entropy_step != 0)
        return pair("entropy_step", "entropy_target 0", "there is no controller to step; set entropy_target");
    if (c->entropy_target == 0 && c->entropy_max != 0)
        return pair("entropy_max", "entropy_target 0", "there is no controller to bound; set entropy_target");
    if (c->order == ESP_NORMALIZE_THEN_SUM && c->scale != ESP_SCALE_GROUP)
        return pair("order normalize_then_sum", "scale other than group", "each reward is divided by its group's deviation");
    return ESP_OK;
}

static esp_status check_reference_pairs(const esp_trainer_config *c) {
    if (c->ref_sync_every > 0 && c->reference != ESP_REFERENCE_SNAPSHOT)
        return pair("ref_sync_every", "reference base", "the frozen base has nothing to be synced; set reference snapshot");
    if (c->no_kl_on_zero_adv && c->objective.beta == 0)
        return pair("no_kl_on_zero_adv", "beta 0", "there is no KL term to leave out; set beta");
    if (c->no_kl_on_zero_adv && c->no_skip) return pair("no_kl_on_zero_adv", "no_skip", "their KL term is left out by skipping them");
    if (c->ref_sync_every > 0 && c->objective.beta == 0)
        return pair("ref_sync_every", "beta 0", "nothing pulls towards the reference; set beta");
    return ESP_OK;
}

static esp_status check_correction_pairs(const esp_trainer_config *c) {
    const bool any = c->correction != ESP_CORRECTION_NONE, rejects = c->reject_low != 0 || c->reject_high != 0;
    if (!any && c->correction_level != ESP_IS_TOKEN)
        return pair("correction_level sequence", "correction none", "nothing is corrected; set correction tis, mis or icepop");
    if (!any && (c->correction_low != 0 || c->correction_high != 0))
        return pair(c->correction_low != 0 ? "correction_low" : "correction_high", "correction none",
                    "nothing is corrected; set correction tis, mis or icepop");
    if (c->correction_low != 0 && c->correction != ESP_CORRECTION_ICEPOP && any)
        return pair("correction_low", c->correction == ESP_CORRECTION_TIS ? "correction tis" : "correction mis",
                    "it has an upper bound only; set correction icepop");
    if (any && !(c->correction_low < c->correction_high))
        return ESPI_FAIL(ESP_ERR_ARG, "correction_low %g with correction_high %g, expected the lower one below", (double)c->correction_low,
                         (double)c->correction_high);
    if (rejects && !(c->reject_low < c->reject_high))
        return ESPI_FAIL(ESP_ERR_ARG, "reject_low %g with reject_high %g, expected the lower one below (0.999 and 1.001, say)",
                         (double)c->reject_low, (double)c->reject_high);
    if (c->objective.loss == ESP_LOSS_VESPO && any && c->correction_level == ESP_IS_SEQUENCE)
        return pair("correction_level sequence", "loss vespo",
                    "it multiplies the tokens' corrections into a sequence's weight itself; set correction_level token");
    return ESP_OK;
}

static esp_status check_rollout_pairs(const esp_trainer_config *c) {
    if (c->mask_truncated && c->overlong_share != 0)
        return pair("mask_truncated", "overlong_share", "what is masked cannot learn from its penalty; set one of them");
    if (c->overlong_penalty != 0 && c->overlong_share == 0)
        return pair("overlong_penalty", "overlong_share 0", "there is no range for the penalty to rise in; set overlong_share");
    if (c->resample_tries > 0 && c->shuffle_rewards)
        return pair("resample_tries", "shuffle_rewards", "groups would be picked by rewards that are then given to others");
    if (c->replay == ESP_REPLAY_R2 && c->updates_per_batch * c->steps_per_generation == 1)
        return pair("replay r2", "one update per generation",
                    "there is no pass of the old policy to record; raise updates_per_batch or steps_per_generation, or set replay r3");
    return ESP_OK;
}

static esp_status check_server_pairs(const esp_trainer_config *c) {
    const struct {
        const char *name;
        bool set;
    } without[] = {{"server_model", c->server_model},
                   {"server_adapter_dir", c->server_adapter_dir},
                   {"server_adapter_path", c->server_adapter_path},
                   {"server_retries", c->server_retries},
                   {"server_concurrency", c->server_concurrency},
                   {"server_timeout", c->server_timeout != 0},
                   {"server_drop_lost", c->server_drop_lost},
                   {"max_staleness", c->max_staleness}};
    for (int i = 0; i < ESPI_COUNT(without) && !c->server; i++)
        if (without[i].set) return pair(without[i].name, "no server", "the trainer samples itself; set server");
    if (!c->server) return ESP_OK;
    if (!c->server_adapter_dir) return pair("server", "no server_adapter_dir", "it would answer without what is trained");
    ESPI_TRY(positive("server_retries", c->server_retries));
    ESPI_TRY(positive("server_concurrency", c->server_concurrency));
    ESPI_TRY(between("server_timeout", c->server_timeout, 1e-3, 1e6));
    if (c->max_staleness < 0) return ESPI_FAIL(ESP_ERR_ARG, "max_staleness: got %d, expected 0 or more", c->max_staleness);
    if (c->top_k > 0 || c->top_p != 1 || c->min_p > 0)
        return pair("server",
                    c->top_k > 0    ? "top_k"
                    : c->top_p != 1 ? "top_p"
                                    : "min_p",
                    "it does not say which ids were left, so training would not see the distribution that was sampled from");
    return ESP_OK;
}

static esp_status check_file_pairs(const esp_trainer_config *c) {
    if (c->kind != ESP_TRAIN_GRPO && (c->rollouts || c->save_rollouts))
        return pair(c->rollouts ? "rollouts" : "save_rollouts", "supervised fine-tuning", "it has none; leave it out");
    if (!c->rollouts) return ESP_OK;
    if (c->train_file) return pair("rollouts", "train", "a file brings its own prompts; set one of them");
    if (c->server) return pair("rollouts", "server", "completions come from one place; set one of them");
    if (c->resample_tries > 0) return pair("rollouts", "resample_tries", "a file has no other prompts to give; set it to 0");
    return ESP_OK;
}

static esp_status check_evaluation_pairs(const esp_trainer_config *c) {
    if (c->early_stop > 0 && !c->eval_file) return pair("early_stop", "no eval", "there is no evaluation to judge by; set eval");
    if (c->keep_best && !c->eval_file) return pair("keep_best", "no eval", "there is no evaluation to judge by; set eval");
    if (c->keep_best && !c->out_dir) return pair("keep_best", "no out", "there is no folder to keep it in; set out");
    if (c->keep_checkpoints > 0 && !c->out_dir) return pair("keep_checkpoints", "no out", "there is no folder to keep them in; set out");
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
    ESPI_TRY(between("temperature", c->temperature, 1e-6, 1e6)); /* logits are divided by it in 32 bits */
    given.temperature = c->temperature;
    /* dr_grpo's constant is the same for every step. */
    if (given.max_completion_length == 0) given.max_completion_length = c->max_new_tokens;
    c->objective = given;
    return espi_objective_make(&checked, &given);
}

static esp_status check(esp_trainer_config *c) {
    ESPI_TRY(check_enums(c));
    ESPI_TRY(check_numbers(c));
    ESPI_TRY(check_evaluation_pairs(c));
    ESPI_TRY(check_file_pairs(c));
    ESPI_TRY(settle_objective(c));
    if (c->kind == ESP_TRAIN_SFT) return check_sft(c);
    if (c->group_size < 2)
        return ESPI_FAIL(ESP_ERR_ARG, "group_size: got %d, expected 2 or more: a group of one has advantage 0 whatever it did",
                         c->group_size);
    ESPI_TRY(check_objective_pairs(c));
    ESPI_TRY(check_reference_pairs(c));
    ESPI_TRY(check_correction_pairs(c));
    ESPI_TRY(check_server_pairs(c));
    return check_rollout_pairs(c);
}

/* DAPO's soft punishment: 0 up to the buffer, -1 at max_new_tokens, a line between. */
static int overlong(void *user, const esp_reward_batch *batch, float *reward) {
    const esp_trainer_config *c = user;
    const double buffer = fmax(1, round(espi_decimal(c->overlong_share) * c->max_new_tokens));
    for (int64_t i = 0; i < batch->n; i++) reward[i] = (float)-espi_overlong(batch->completion_length[i], c->max_new_tokens, buffer);
    return 0;
}

static esp_status take_rewards(esp_trainer *t) {
    esp_trainer_config *c = &t->c;
    const esp_reward *given = c->rewards;
    const int32_t n = c->n_rewards, all = n + (c->overlong_share != 0);
    ESPI_TRY(positive("n_rewards", n));
    ESPI_TRY(espi_take_array(&t->rewards, all, sizeof *t->rewards));
    ESPI_TRY(espi_take_array(&t->weights, all, sizeof *t->weights));
    c->n_rewards = all;
    for (int32_t f = 0; f < all; f++) {
        const esp_reward penalty = {
            .name = "overlong", .fn = overlong, .user = c, .weight = espi_decimal(c->overlong_penalty), .punctual = true};
        const esp_reward *from = f < n ? &given[f] : &penalty;
        char *name = NULL;
        if (from->name) ESPI_TRY(espi_copy_text(&name, from->name));
        t->rewards[f] = *from;
        t->rewards[f].name = name;
        t->weights[f] = from->weight;
    }
    c->rewards = t->rewards;
    ESPI_TRY(espi_rewards_create(&t->scorer, t->rewards, all, espi_decimal(c->reward_timeout)));
    espi_rewards_stop_by(t->scorer, c->stop, c->stop_user);
    return ESP_OK;
}

esp_status espi_trainer_settle(esp_trainer *t, const esp_trainer_config *config) {
    esp_trainer_config *c = &t->c;
    ESPI_TRY(espi_struct_read(c, sizeof *c, config, "esp_trainer_config"));
    if (c->kind != ESP_TRAIN_SFT && c->kind != ESP_TRAIN_GRPO)
        return ESPI_FAIL(ESP_ERR_ARG, "kind: got %d, expected ESP_TRAIN_SFT or ESP_TRAIN_GRPO", (int)c->kind);
    if (!c->train_file && !c->rollouts) return ESPI_FAIL(ESP_ERR_ARG, "train_file is NULL, expected the path of a JSONL file");
    fill_defaults(c);
    ESPI_TRY(check(c));
    if (c->adamw.struct_size == 0) c->adamw.struct_size = sizeof c->adamw;
    t->slices = (int64_t)c->updates_per_batch * c->steps_per_generation;
    t->entropy_coef = espi_decimal(c->objective.entropy_coef);
    ESPI_TRY(take_rewards(t));
    if (c->save_rollouts) ESPI_TRY(espi_copy_text(&t->save_rollouts, c->save_rollouts));
    return c->out_dir ? espi_copy_text(&t->out_dir, c->out_dir) : ESP_OK;
}
