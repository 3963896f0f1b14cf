/* The run's logs: metrics.jsonl with TRL's names, one object a step, and completions.jsonl, one object a completion. */
#include "models/model.h"
#include "rl/run.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

esp_status espi_logs_open(esp_trainer *t, int64_t metrics_bytes, int64_t completions_bytes) {
    static const char *const names[2] = {"metrics.jsonl", "completions.jsonl"};
    const int64_t keep[2] = {metrics_bytes, completions_bytes};
    espi_log_file **logs[2] = {&t->metrics, &t->completions};
    ESPI_TRY(espi_dir_make(t->out_dir));
    if (!t->c.resume_dir) { /* a new run takes the folder over: a checkpoint of the old one would fit none of the new logs */
        char old[ESPI_PATH_MAX];
        ESPI_TRY(espi_path_join(old, t->out_dir, "checkpoint.h5"));
        espi_file_remove(old);
    }
    for (int i = 0; i < (t->c.kind == ESP_TRAIN_GRPO ? 2 : 1); i++) {
        char path[ESPI_PATH_MAX], from[ESPI_PATH_MAX];
        ESPI_TRY(espi_path_join(path, t->out_dir, names[i]));
        if (t->c.resume_dir && strcmp(t->c.resume_dir, t->out_dir) != 0) {
            ESPI_TRY(espi_path_join(from, t->c.resume_dir, names[i]));
            ESPI_TRY(espi_file_copy(path, from));
        }
        ESPI_TRY(espi_log_file_open(logs[i], path, keep[i]));
    }
    return ESP_OK;
}

void espi_logs_close(esp_trainer *t) {
    /* Each line was written when it was made; a failure to flush now has nobody to hear of it. */
    (void)espi_log_file_close(t->metrics);
    (void)espi_log_file_close(t->completions);
    t->metrics = t->completions = NULL;
}

/* A finite number, or null. */
static json_t *number(double value) {
    return isfinite(value) ? json_real(value) : json_null();
}

static esp_status write_line(espi_log_file *log, json_t *object) {
    char *text = json_dumps(object, JSON_COMPACT | JSON_PRESERVE_ORDER | JSON_REAL_PRECISION(9));
    json_decref(object);
    if (!text) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a line of a log");
    const esp_status status = espi_log_file_line(log, text);
    free(text);
    return status;
}

typedef struct spread {
    double mean, deviation, low, high; /* deviation unbiased */
    int64_t n;
} spread;

/* Of x[0], x[stride], ..; NaN is left out. */
static spread measure(const double *x, int64_t n, int64_t stride) {
    spread s = {.low = INFINITY, .high = -INFINITY};
    double sum = 0, square = 0;
    for (int64_t i = 0; i < n; i++) {
        const double value = x[i * stride];
        if (isnan(value)) continue;
        s.n++;
        sum += value;
        s.low = fmin(s.low, value);
        s.high = fmax(s.high, value);
    }
    s.mean = s.n ? sum / (double)s.n : NAN;
    for (int64_t i = 0; i < n; i++)
        if (!isnan(x[i * stride])) square += (x[i * stride] - s.mean) * (x[i * stride] - s.mean);
    s.deviation = s.n > 1 ? sqrt(square / (double)(s.n - 1)) : s.n ? 0 : NAN;
    return s;
}

/* k3 of the sampled tokens against the base, while the policy is the one that sampled them. */
static double measured_kl(const esp_trainer *t) {
    if (!t->rollout.has_ref) return NAN;
    double sum = 0, n = 0;
    for (int64_t i = 0; i < t->rows; i++) {
        const espi_sequence *s = &t->sequences[i];
        for (int32_t k = 0; k < s->n_completion; k++, n++) {
            const double d = (double)s->ref_logprob[k] - s->sampler_logprob[k];
            sum += exp(d) - 1 - d;
        }
    }
    return sum / n;
}

typedef struct lengths {
    double mean, low, high, clipped;
} lengths;

static lengths completion_lengths(const esp_trainer *t) {
    lengths l = {.low = INFINITY, .high = -INFINITY};
    for (int64_t i = 0; i < t->rows; i++) {
        const double n = t->rollout.lengths[i];
        l.mean += n / (double)t->rows;
        l.low = fmin(l.low, n);
        l.high = fmax(l.high, n);
        l.clipped += t->rollout.stopped[i] ? 0 : 1.0 / (double)t->rows;
    }
    return l;
}

static void reward_stats(const esp_trainer *t, esp_step_stats *stats) {
    const espi_rollout *r = &t->rollout;
    const int64_t g = t->c.group_size;
    double deviation = 0, zero = 0;
    for (int64_t p = 0; p < t->c.prompts_per_step; p++) {
        const spread group = measure(r->reward + p * g, g, 1);
        deviation += group.n ? group.deviation : 0;
        zero += !group.n || group.low == group.high;
    }
    stats->reward = measure(r->reward, r->n, 1).mean;
    stats->reward_std = deviation / t->c.prompts_per_step;
    stats->frac_reward_zero_std = zero / t->c.prompts_per_step;
    stats->exact = measure(r->exact, r->n, 1).mean;
}

void espi_stats_fill(esp_trainer *t, esp_step_stats *stats) {
    const espi_step_sums *s = &t->sums;
    const double updates = t->c.updates_per_batch, all = s->tokens + s->tokens_skipped;
    *stats = (esp_step_stats){.struct_size = sizeof *stats,
                              .step = t->step,
                              .loss = s->loss / updates,
                              .grad_norm = s->grad_norm,
                              .lr = s->lr,
                              .reward = NAN,
                              .reward_std = NAN,
                              .exact = NAN,
                              .kl = NAN,
                              .entropy = NAN,
                              .mean_length = NAN,
                              .clipped_ratio = NAN,
                              .frac_reward_zero_std = NAN,
                              .mean_abs_g = NAN,
                              .seconds = s->seconds_sample + s->seconds_reward + s->seconds_train,
                              .seconds_sample = s->seconds_sample,
                              .seconds_train = s->seconds_train,
                              .eval_sampled = NAN,
                              .eval_greedy = NAN};
    for (int64_t i = 0; i < t->rows; i++) stats->tokens += t->sequences[i].n_counted;
    if (t->c.kind != ESP_TRAIN_GRPO) return;
    const lengths l = completion_lengths(t);
    reward_stats(t, stats);
    stats->mean_length = l.mean;
    stats->clipped_ratio = l.clipped;
    stats->kl = t->c.objective.beta > 0 ? s->kl / s->tokens : measured_kl(t);
    stats->entropy = s->entropy / all;
    stats->mean_abs_g = s->abs_g / all;
}

static void add_rewards(json_t *line, const esp_trainer *t) {
    for (int32_t f = 0; f < t->c.n_rewards; f++) {
        const spread s = measure(t->rollout.parts + f, t->rollout.n, t->c.n_rewards);
        char key[256];
        snprintf(key, sizeof key, "rewards/%s/mean", t->rewards[f].name);
        json_object_set_new(line, key, number(s.mean));
        snprintf(key, sizeof key, "rewards/%s/std", t->rewards[f].name);
        json_object_set_new(line, key, number(s.deviation));
    }
}

/* Numbers of a GRPO step.  Shares of tokens are over all of them: a skipped one is not clipped. */
static void add_grpo(json_t *line, const esp_trainer *t, const esp_step_stats *stats) {
    const espi_step_sums *s = &t->sums;
    const lengths l = completion_lengths(t);
    const double all = s->tokens + s->tokens_skipped;
    const struct {
        const char *key;
        double value;
    } numbers[] = {{"reward", stats->reward},
                   {"reward_std", stats->reward_std},
                   {"frac_reward_zero_std", stats->frac_reward_zero_std},
                   {"exact", stats->exact},
                   {"kl", stats->kl},
                   {"entropy", stats->entropy},
                   {"policy_loss", s->policy_loss / t->c.updates_per_batch},
                   {"mean_abs_g", stats->mean_abs_g},
                   {"clip_ratio/low_mean", s->clip_low / all},
                   {"clip_ratio/high_mean", s->clip_high / all},
                   {"clip_ratio/region_mean", (s->clip_low + s->clip_high) / all},
                   {"completions/mean_length", l.mean},
                   {"completions/min_length", l.low},
                   {"completions/max_length", l.high},
                   {"completions/clipped_ratio", l.clipped},
                   {"sampling/sampling_logp_difference/mean", s->diff_mean / s->tokens},
                   {"sampling/sampling_logp_difference/max", s->tokens > 0 ? s->diff_max : NAN},
                   {"sampling/importance_sampling_ratio/mean", s->ratio / s->tokens},
                   {"skip/zero_adv_frac", s->tokens_skipped / all}};
    for (int i = 0; i < ESPI_COUNT(numbers); i++) json_object_set_new(line, numbers[i].key, number(numbers[i].value));
    add_rewards(line, t);
}

static void add_evaluation(json_t *line, double sampled, double greedy) {
    json_object_set_new(line, "eval/sampled_exact", number(sampled));
    json_object_set_new(line, "eval/greedy_exact", number(greedy));
}

esp_status espi_log_start(esp_trainer *t) {
    json_t *line = json_object();
    if (!line) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a line of metrics");
    json_object_set_new(line, "step", json_integer(0));
    add_evaluation(line, t->eval_sampled, t->eval_greedy);
    return write_line(t->metrics, line);
}

static esp_status log_completion(esp_trainer *t, int64_t i) {
    const espi_rollout *r = &t->rollout;
    const espi_task *task = &t->train.items[r->line[i / t->c.group_size]];
    json_t *parts = json_object();
    for (int32_t f = 0; f < t->c.n_rewards; f++) json_object_set_new(parts, t->rewards[f].name, number(r->parts[i * t->c.n_rewards + f]));
    json_t *line = json_pack("{s:I, s:I, s:s, s:s, s:s, s:o, s:o, s:o, s:s, s:i}", "step", (json_int_t)t->step, "group",
                             (json_int_t)(i / t->c.group_size), "prompt", task->prompt, "completion", r->text[i], "answer", task->answer,
                             "rewards", parts, "reward", number(r->reward[i]), "advantage", number(r->advantage[i]), "finish",
                             r->stopped[i] ? "stop" : "length", "tokens", r->lengths[i]);
    if (!line)
        return ESPI_FAIL(ESP_ERR_INTERNAL, "completion %lld of step %lld cannot be written as JSON", (long long)i, (long long)t->step);
    return write_line(t->completions, line);
}

esp_status espi_log_step(esp_trainer *t, const esp_step_stats *stats) {
    json_t *line = json_object();
    if (!line) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a line of metrics");
    json_object_set_new(line, "step", json_integer(t->step));
    json_object_set_new(line, "loss", number(stats->loss));
    json_object_set_new(line, "grad_norm", number(stats->grad_norm));
    json_object_set_new(line, "learning_rate", number(stats->lr));
    json_object_set_new(line, "num_tokens", json_integer(t->num_tokens));
    if (t->c.kind == ESP_TRAIN_GRPO) add_grpo(line, t, stats);
    if (!isnan(stats->eval_sampled)) add_evaluation(line, stats->eval_sampled, stats->eval_greedy);
    json_object_set_new(line, "mem/peak_bytes", json_integer((json_int_t)t->model->ctx->peak));
    json_object_set_new(line, "step_time", number(stats->seconds));
    json_object_set_new(line, "time/sample", number(t->sums.seconds_sample));
    json_object_set_new(line, "time/reward", number(t->sums.seconds_reward));
    json_object_set_new(line, "time/train", number(t->sums.seconds_train));
    ESPI_TRY(write_line(t->metrics, line));
    for (int64_t i = 0; t->completions && i < t->rows; i++) ESPI_TRY(log_completion(t, i));
    return ESP_OK;
}
