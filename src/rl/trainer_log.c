/* The run's logs: metrics.jsonl with TRL's names, one object a step, and completions.jsonl, one object a completion. */
#include "models/model.h"
#include "rl/run.h"
#include "rl/server.h"

#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

esp_status espi_logs_open(esp_trainer *t, const char *resume_folder, int64_t metrics_bytes, int64_t completions_bytes) {
    static const char *const names[2] = {"metrics.jsonl", "completions.jsonl"};
    const int64_t keep[2] = {metrics_bytes, completions_bytes};
    espi_log_file **logs[2] = {&t->metrics, &t->completions};
    if (!t->c.resume_dir) { /* a new run takes the folder over: a checkpoint of the old one would fit none of the new logs */
        char old[ESPI_PATH_MAX];
        ESPI_TRY(espi_path_join(old, t->out_dir, "checkpoint.h5"));
        espi_file_remove(old);
    }
    for (int i = 0; i < (t->c.kind == ESP_TRAIN_GRPO ? 2 : 1); i++) {
        char path[ESPI_PATH_MAX], from[ESPI_PATH_MAX];
        ESPI_TRY(espi_path_join(path, t->out_dir, names[i]));
        if (t->c.resume_dir && strcmp(resume_folder, t->out_dir) != 0) {
            ESPI_TRY(espi_path_join(from, resume_folder, names[i]));
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

/* k3 of the sampled tokens against the reference, while the policy is the one that sampled them. */
static double measured_kl(const esp_trainer *t) {
    double sum = 0, n = 0;
    for (int64_t i = 0; i < t->n_sequences; i++) {
        const espi_sequence *s = &t->sequences[i];
        for (int32_t k = s->n_prompt; s->ref && k < s->n_prompt + s->n_completion; k++) {
            const double d = (double)s->ref[k] - (s->old ? s->old : s->sampler)[k];
            if (isnan(d) || !s->mask[k - s->n_prompt]) continue;
            sum += exp(d) - 1 - d;
            n++;
        }
    }
    return sum / n;
}

/* Of the rows of this step. */
typedef struct lengths {
    double mean, low, high, clipped;                   /* all; clipped: share that did not end */
    double ended_mean, ended_low, ended_high, n_ended; /* those that ended; NaN without any */
} lengths;

static lengths completion_lengths(const esp_trainer *t) {
    lengths l = {.low = INFINITY, .high = -INFINITY, .ended_low = INFINITY, .ended_high = -INFINITY};
    const double rows = (double)t->n_sequences;
    for (int64_t i = 0; i < t->n_sequences; i++) {
        const double n = t->sequences[i].n_completion;
        l.mean += n / rows;
        l.low = fmin(l.low, n);
        l.high = fmax(l.high, n);
        if (t->rollouts.finish[t->sequences[i].row] != ESPI_FINISH_STOP) {
            l.clipped += 1 / rows;
            continue;
        }
        l.ended_mean += n;
        l.ended_low = fmin(l.ended_low, n);
        l.ended_high = fmax(l.ended_high, n);
        l.n_ended++;
    }
    l.ended_mean /= l.n_ended;
    return l;
}

/* Sequences of a step are whole groups, one after the other. */
static void reward_stats(const esp_trainer *t, esp_step_stats *stats) {
    const espi_rollouts *r = &t->rollouts;
    const int64_t g = t->c.group_size, groups = t->n_sequences / g;
    double deviation = 0, zero = 0, reward = 0, n = 0, exact = 0, n_exact = 0;
    for (int64_t p = 0; p < groups; p++) {
        const int64_t row = t->sequences[p * g].row;
        const spread group = measure(r->reward + row, g, 1);
        deviation += group.n ? group.deviation : 0;
        zero += !group.n || group.low == group.high;
        for (int64_t i = row; i < row + g; i++) {
            if (!isnan(r->reward[i])) reward += r->reward[i], n++;
            if (!isnan(r->exact[i])) exact += r->exact[i], n_exact++;
        }
    }
    stats->reward = reward / n;
    stats->reward_std = deviation / (double)groups;
    stats->frac_reward_zero_std = zero / (double)groups;
    stats->exact = exact / n_exact;
}

void espi_stats_fill(esp_trainer *t, esp_step_stats *stats) {
    const espi_step_sums *s = &t->sums;
    const double all = s->tokens + s->tokens_skipped;
    const double train = s->seconds_logprob + s->seconds_forward + s->seconds_backward + s->seconds_optim;
    *stats = (esp_step_stats){.struct_size = sizeof *stats,
                              .step = t->step,
                              .loss = s->loss,
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
                              .clip_ratio = NAN,
                              .seconds = s->seconds_sample + s->seconds_reward + s->seconds_sync + train,
                              .seconds_sample = s->seconds_sample,
                              .seconds_train = train,
                              .eval_sampled = NAN,
                              .eval_greedy = NAN};
    double whole = 0;
    for (int64_t i = 0; i < t->n_sequences; i++) {
        stats->tokens += t->sequences[i].n_counted;
        whole += t->sequences[i].n_prompt + t->sequences[i].n_completion;
    }
    stats->tokens_per_second = stats->seconds > 0 ? whole / stats->seconds : NAN;
    if (t->c.kind != ESP_TRAIN_GRPO) return;
    const lengths l = completion_lengths(t);
    reward_stats(t, stats);
    stats->mean_length = l.mean;
    stats->clipped_ratio = l.clipped;
    stats->kl = t->c.objective.beta > 0 ? s->kl / s->tokens : measured_kl(t);
    stats->entropy = s->entropy / all;
    stats->mean_abs_g = s->abs_g / all;
    stats->clip_ratio = (s->clip_low + s->clip_high) / all;
}

static void add_rewards(json_t *line, const esp_trainer *t) {
    for (int32_t f = 0; f < t->c.n_rewards; f++) {
        const spread s = measure(t->rollouts.rewards + f, t->rollouts.shape.rows, t->c.n_rewards);
        char key[256];
        snprintf(key, sizeof key, "rewards/%s/mean", t->rewards[f].name);
        json_object_set_new(line, key, number(s.mean));
        snprintf(key, sizeof key, "rewards/%s/std", t->rewards[f].name);
        json_object_set_new(line, key, number(s.deviation));
    }
    for (int64_t i = 0; i < espi_rewards_extra_count(t->scorer); i++) {
        char key[256];
        double value;
        snprintf(key, sizeof key, "rewards/%s", espi_rewards_extra_get(&value, t->scorer, i));
        json_object_set_new(line, key, number(value));
    }
}

typedef struct entry {
    const char *key;
    double value;
} entry;

static void add_numbers(json_t *line, const entry *numbers, int n) {
    for (int i = 0; i < n; i++) json_object_set_new(line, numbers[i].key, number(numbers[i].value));
}

/* Load shares of the experts times their number, less 1: 0 is balance. */
static void add_load(json_t *line, const esp_trainer *t) {
    const double experts = (double)t->info.experts;
    double all = 0, low = INFINITY, high = -INFINITY, sum = 0;
    for (int64_t e = 0; e < t->info.experts; e++) all += (double)t->load[e];
    for (int64_t e = 0; e < t->info.experts; e++) {
        const double violation = (double)t->load[e] / all * experts - 1;
        low = fmin(low, violation);
        high = fmax(high, violation);
        sum += fabs(violation);
    }
    const entry numbers[] = {{"moe/max_vio", high}, {"moe/min_vio", low}, {"moe/avg_vio", sum / experts}};
    add_numbers(line, numbers, all > 0 ? ESPI_COUNT(numbers) : 0);
    if (t->model->options.router_aux_coef != 0) json_object_set_new(line, "aux_loss", number(t->sums.aux_loss / t->sums.forward_tokens));
}

/* Numbers of a GRPO step.  Shares of tokens are over all of them: a skipped one is not clipped. */
static void add_grpo(json_t *line, const esp_trainer *t, const esp_step_stats *stats) {
    const espi_step_sums *s = &t->sums;
    const lengths l = completion_lengths(t);
    const double all = s->tokens + s->tokens_skipped;
    const bool cispo = t->c.objective.loss == ESP_LOSS_CISPO;
    const entry numbers[] = {
        {"reward", stats->reward},
        {"reward_std", stats->reward_std},
        {"frac_reward_zero_std", stats->frac_reward_zero_std},
        {"exact", stats->exact},
        {"kl", stats->kl},
        {"entropy", stats->entropy},
        {"entropy_coef", t->entropy_coef},
        {"policy_loss", s->policy_loss},
        {"mean_abs_g", stats->mean_abs_g},
        {"clip_ratio/low_mean", s->clip_low / all},
        {"clip_ratio/low_min", s->clip_low_least},
        {"clip_ratio/high_mean", s->clip_high / all},
        {"clip_ratio/high_max", s->clip_high_most},
        {"clip_ratio/region_mean", stats->clip_ratio},
        {"completions/mean_length", l.mean},
        {"completions/min_length", l.low},
        {"completions/max_length", l.high},
        {"completions/mean_terminated_length", l.ended_mean},
        {"completions/min_terminated_length", l.ended_low},
        {"completions/max_terminated_length", l.ended_high},
        {"completions/clipped_ratio", l.clipped},
        {"sampling/sampling_logp_difference/mean", s->diff_mean / s->diff_tokens},
        {"sampling/sampling_logp_difference/max", s->diff_tokens > 0 ? s->diff_max : NAN},
        {"moe/route_flip_rate", s->route_flips / s->routes_replayed},
        {"skip/zero_adv_frac", s->tokens_skipped / all},
        {"rollout/generation", (double)t->generation},
        {"rollout/calls", (double)t->tries},
        {"rollout/groups_resampled", (double)t->resampled},
        {"rollout/groups_lost", (double)t->lost},
    };
    add_numbers(line, numbers, ESPI_COUNT(numbers));
    if (cispo) json_object_set_new(line, "cispo_clip_ratio", number(s->clip_high / all));
    add_rewards(line, t);
}

static void add_server(json_t *line, const esp_trainer *t) {
    espi_server_counts c;
    espi_server_counts_get(&c, &t->source);
    const entry numbers[] = {{"server/retries", (double)c.retries},
                             {"server/groups_lost", (double)c.lost},
                             {"server/groups_stale", (double)c.stale},
                             {"server/adapters_published", (double)c.published}};
    add_numbers(line, numbers, ESPI_COUNT(numbers));
}

/* The sampler's distance from the policy before the first update; what the correction made of it. */
static void add_correction(json_t *line, const espi_correction_stats *s) {
    const entry numbers[] = {{"sampling/importance_sampling_ratio/min", s->ratio_low},
                             {"sampling/importance_sampling_ratio/mean", s->ratio_mean},
                             {"sampling/importance_sampling_ratio/max", s->ratio_high},
                             {"rollout_is_eff_sample_size", s->effective_share},
                             {"k3_kl", s->k3},
                             {"ppl_ratio", s->ppl_ratio},
                             {"chi2_token", s->chi2_token},
                             {"chi2_seq", s->chi2_sequence},
                             {"correction/cut_frac", s->cut_share},
                             {"correction/rejected_frac", s->rejected_share},
                             {"sampling/absent_frac", s->absent_share}};
    add_numbers(line, numbers, ESPI_COUNT(numbers));
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

static const char *finish_name(uint8_t finish) {
    static const char *const names[] = {"stop", "length", "abort"};
    return names[finish];
}

static esp_status log_completion(esp_trainer *t, int64_t i) {
    const espi_rollouts *r = &t->rollouts;
    const espi_task *task = espi_row_task(t, i);
    json_t *parts = json_object();
    for (int32_t f = 0; f < t->c.n_rewards; f++) json_object_set_new(parts, t->rewards[f].name, number(r->rewards[i * t->c.n_rewards + f]));
    json_t *line =
        json_pack("{s:I, s:I, s:s?, s:s, s:s?, s:o, s:o, s:o, s:s, s:i}", "step", (json_int_t)t->step, "group",
                  (json_int_t)(i / t->c.group_size), "prompt", task ? task->prompt : NULL, "completion", t->text[i], "answer",
                  task ? task->answer : NULL, "rewards", parts, "reward", number(r->reward[i]), "advantage", number(r->advantage[i]),
                  "finish", finish_name(r->finish[i]), "tokens", (int)(r->offsets[i + 1] - r->offsets[i]) - r->n_prompt[i]);
    if (!line)
        return ESPI_FAIL(ESP_ERR_INTERNAL, "completion %lld of step %lld cannot be written as JSON", (long long)i, (long long)t->step);
    return write_line(t->completions, line);
}

/* A generation's completions are told once, with its first step. */
static esp_status log_completions(esp_trainer *t) {
    for (int64_t i = 0; t->completions && t->slice == 0 && i < t->rollouts.shape.rows; i++) ESPI_TRY(log_completion(t, i));
    return ESP_OK;
}

static void add_times(json_t *line, const esp_trainer *t, const esp_step_stats *stats) {
    const espi_step_sums *s = &t->sums;
    const entry numbers[] = {{"step_time", stats->seconds},      {"tokens_per_second", stats->tokens_per_second},
                             {"time/sample", s->seconds_sample}, {"time/reward", s->seconds_reward},
                             {"time/logp", s->seconds_logprob},  {"time/fwd", s->seconds_forward},
                             {"time/bwd", s->seconds_backward},  {"time/optim", s->seconds_optim},
                             {"time/sync", s->seconds_sync}};
    add_numbers(line, numbers, ESPI_COUNT(numbers));
}

esp_status espi_log_step(esp_trainer *t, const esp_step_stats *stats) {
    json_t *line = json_object();
    if (!line) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a line of metrics");
    json_object_set_new(line, "step", json_integer(t->step));
    json_object_set_new(line, "loss", number(stats->loss));
    json_object_set_new(line, "grad_norm", number(stats->grad_norm));
    json_object_set_new(line, "learning_rate", number(stats->lr));
    json_object_set_new(line, "num_tokens", json_integer(t->num_tokens));
    if (t->c.kind == ESP_TRAIN_GRPO) {
        add_grpo(line, t, stats);
        if (t->rollouts.has_old) add_correction(line, &t->correction);
        if (strcmp(t->source.name, "server") == 0) add_server(line, t);
    }
    add_load(line, t);
    if (!isnan(stats->eval_sampled)) add_evaluation(line, stats->eval_sampled, stats->eval_greedy);
    json_object_set_new(line, "mem/peak_bytes", json_integer((json_int_t)t->model->ctx->peak));
    add_times(line, t, stats);
    ESPI_TRY(write_line(t->metrics, line));
    return log_completions(t);
}
