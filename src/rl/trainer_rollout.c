/* The first half of a GRPO step: prompts, completions, rewards, advantages.  A generation may take several calls of its source: groups
 * whose rewards are all equal teach nothing and may give way to others.  Between two calls a run can be stopped and resumed. */
#include "core/bytes.h"
#include "core/rng.h"
#include "models/model.h"
#include "rl/run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- text ---- */

#define REPLACEMENT "\xEF\xBF\xBD"

static esp_status append(espi_bytes *out, const char *bytes, size_t n) {
    if (espi_bytes_add(out, bytes, n)) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a completion's text of %zu bytes", out->used + n);
}

static esp_status decode(espi_bytes *out, const esp_tokenizer *tokenizer, const int32_t *ids, int32_t n) {
    esp_decode_state state = {.n_pending = 0};
    ESPI_TRY(append(out, "", 0));
    for (int32_t i = 0; i < n; i++) {
        char piece[512];
        size_t bytes = 0;
        const esp_status status = esp_tokenizer_decode_next(tokenizer, &state, ids[i], false, piece, sizeof piece, &bytes);
        /* A model may have more rows of embedding than its tokenizer has ids: such a token is a wrong answer, not a broken run. */
        if (status != ESP_OK && status != ESP_ERR_ARG) return status;
        ESPI_TRY(status == ESP_OK ? append(out, piece, bytes) : append(out, REPLACEMENT, strlen(REPLACEMENT)));
    }
    return state.n_pending > 0 ? append(out, REPLACEMENT, strlen(REPLACEMENT)) : ESP_OK;
}

esp_status espi_completion_text(char **out, const esp_tokenizer *tokenizer, const int32_t *ids, int32_t n, bool stopped) {
    espi_bytes grown = {0};
    const esp_status status = decode(&grown, tokenizer, ids, n - stopped);
    if (status != ESP_OK) {
        free(grown.data);
        return status;
    }
    *out = grown.data;
    return ESP_OK;
}

static void free_texts(char ***text, int64_t n) {
    for (int64_t i = 0; *text && i < n; i++) free((*text)[i]);
    free(*text);
    *text = NULL;
}

static int32_t completion_length(const espi_rollouts *r, int64_t row) {
    return (int32_t)(r->offsets[row + 1] - r->offsets[row]) - r->n_prompt[row];
}

static const int32_t *completion(const espi_rollouts *r, int64_t row) {
    return r->tokens + r->offsets[row] + r->n_prompt[row];
}

/* Of rows first .. first+n-1. */
static esp_status make_texts(char ***out, const esp_trainer *t, const espi_rollouts *r, int64_t first, int64_t n) {
    ESPI_TRY(espi_take_array(out, n, sizeof **out));
    for (int64_t i = 0; i < n; i++)
        ESPI_TRY(espi_completion_text(&(*out)[i], t->tokenizer, completion(r, first + i), completion_length(r, first + i),
                                      r->finish[first + i] == ESPI_FINISH_STOP));
    return ESP_OK;
}

/* ---- prompts ---- */

esp_status espi_next_line(esp_trainer *t, int64_t *line, uint32_t *key) {
    const int64_t n = t->train.n, epoch = t->cursor / n;
    if (epoch != t->order_epoch) {
        for (int64_t i = 0; i < n; i++) t->order[i] = i;
        for (int64_t i = n - 1; i > 0; i--) {
            const double u = espi_uniform(t->c.seed, ESPI_STREAM_SHUFFLE, (uint32_t)epoch, (uint32_t)i, 0, 0);
            const int64_t j = (int64_t)(u * (double)(i + 1)), other = t->order[j];
            t->order[j] = t->order[i];
            t->order[i] = other;
        }
        t->order_epoch = epoch;
    }
    *line = t->order[t->cursor % n];
    *key = (uint32_t)t->cursor;
    t->cursor++;
    return ESP_OK;
}

esp_status espi_prompts_take(espi_prompts *p, int64_t n, int64_t longest) {
    ESPI_TRY(espi_take_array(&p->ids, n * longest, sizeof *p->ids));
    ESPI_TRY(espi_take_array(&p->cu, n + 1, sizeof *p->cu));
    ESPI_TRY(espi_take_array(&p->lines, n, sizeof *p->lines));
    return espi_take_array(&p->keys, n, sizeof *p->keys);
}

void espi_prompts_add(espi_prompts *p, int64_t i, const espi_task *task, int64_t line, uint32_t key) {
    memcpy(p->ids + p->cu[i], task->prompt_ids, (size_t)task->n_prompt * sizeof *p->ids);
    p->cu[i + 1] = p->cu[i] + task->n_prompt;
    p->keys[i] = key;
    p->lines[i] = line;
}

void espi_prompts_free(espi_prompts *p) {
    free(p->ids);
    free(p->cu);
    free(p->keys);
    free(p->lines);
}

const espi_task *espi_row_task(const esp_trainer *t, int64_t row) {
    return t->source.own_prompts ? NULL : &t->train.items[t->rollouts.group[row]];
}

esp_status espi_stop_asked(bool *asked, const esp_trainer *t) {
    return espi_ranks_any(asked, t->model, "is a stop asked for", t->c.stop && t->c.stop(t->c.stop_user) != 0);
}

/* ---- one call of the source ---- */

static esp_status check_answer(const esp_trainer *t, const espi_rollouts *r, int64_t prompts) {
    const espi_rollouts_shape *s = &r->shape;
    if (s->rows == 0) return ESP_OK;
    if (s->rows > prompts * t->c.group_size || s->group_size != t->c.group_size)
        return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts of the %s: got %lld rows in groups of %lld, expected at most %lld groups of %d",
                         t->source.name, (long long)s->rows, (long long)s->group_size, (long long)prompts, t->c.group_size);
    ESPI_TRY(espi_rollouts_check(r, t->info.vocab, t->info.experts));
    for (int64_t i = 0; i < s->rows; i++) {
        const int64_t n = r->offsets[i + 1] - r->offsets[i];
        if (n > t->longest)
            return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts of the %s: row %lld has %lld tokens, expected at most %lld", t->source.name,
                             (long long)i, (long long)n, (long long)t->longest);
        if (!t->source.own_prompts && (r->group[i] < 0 || r->group[i] >= t->train.n))
            return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts of the %s: row %lld belongs to line %lld, expected one of the %lld that were asked",
                             t->source.name, (long long)i, (long long)r->group[i], (long long)t->train.n);
    }
    return ESP_OK;
}

/* Of the next n lines those that are dealt to this rank; of a source's own prompts every rank gets all. */
static esp_status next_prompts(esp_trainer *t, espi_prompts *p, int64_t n, int64_t *mine) {
    const int own = espi_ranks_own(t->model);
    espi_ranks_deal(t->dealt, t->model, n);
    const int64_t first = t->dealt[own], last = t->dealt[own + 1];
    *mine = t->source.own_prompts ? n : last - first;
    ESPI_TRY(espi_prompts_take(p, *mine, t->train.longest_prompt));
    for (int64_t i = 0; i < n && !t->source.own_prompts; i++) {
        int64_t line;
        uint32_t key;
        ESPI_TRY(espi_next_line(t, &line, &key));
        if (i >= first && i < last) espi_prompts_add(p, i - first, &t->train.items[line], line, key);
    }
    return ESP_OK;
}

/* What the source gives to this rank. */
static esp_status ask(esp_trainer *t, espi_rollouts *r, espi_prompts *p, int64_t n) {
    const int64_t position = t->cursor;
    int64_t mine;
    ESPI_TRY(next_prompts(t, p, n, &mine));
    const espi_rollout_request request = {.prompts = p->ids,
                                          .cu_prompts = p->cu,
                                          .group_ids = p->lines,
                                          .keys = p->keys,
                                          .n_prompts = (int32_t)mine,
                                          .samples = t->c.group_size,
                                          .max_new_tokens = t->c.max_new_tokens,
                                          .temperature = t->c.temperature,
                                          .top_k = t->c.top_k,
                                          .top_p = t->c.top_p,
                                          .min_p = t->c.min_p,
                                          .seed = t->c.seed,
                                          .step = (uint32_t)(t->step + 1),
                                          .position = position,
                                          .version = t->step,
                                          .routes = t->c.replay == ESP_REPLAY_R3 || (t->c.replay == ESP_REPLAY_DEFAULT && t->source.routes),
                                          .deadline = t->c.rollout_timeout > 0 ? espi_seconds() + (double)t->c.rollout_timeout : 0};
    ESPI_TRY(t->source.generate(t->source.self, r, &request));
    if (t->source.own_prompts) t->cursor += n;
    return ESP_OK;
}

/* What it gives to all of them. */
static esp_status ask_on_all_ranks(esp_trainer *t, espi_rollouts *r, espi_prompts *p, int64_t n) {
    ESPI_TRY(espi_ranks_agree(t->model, "a generation", ask(t, r, p, n)));
    if (!t->source.own_prompts) ESPI_TRY(espi_rollouts_gather(r, t->model));
    return check_answer(t, r, n);
}

/* The source has the adapter as it is now. */
static esp_status publish(esp_trainer *t) {
    if (!t->source.publish || t->published == t->step) return ESP_OK;
    const double start = espi_seconds();
    ESPI_TRY(t->source.publish(t->source.self, t->step));
    t->published = t->step;
    t->sums.seconds_sync += espi_seconds() - start;
    return ESP_OK;
}

/* ---- scoring ---- */

/* One batch for the reward functions: pointers into what the caller has. */
typedef struct scoring {
    esp_reward_batch batch;
    const char **prompt, **answer;
    const int32_t **ids, **prompt_ids;
    int32_t *lengths;
    uint8_t *stopped;
    char **text;
    float *exact;
} scoring;

static void free_scoring(scoring *s) {
    free_texts(&s->text, s->batch.n);
    free(s->prompt);
    free(s->answer);
    free(s->ids);
    free(s->prompt_ids);
    free(s->lengths);
    free(s->stopped);
    free(s->exact);
}

/* Rows first .. first+n-1. */
static esp_status take_scoring(scoring *s, const esp_trainer *t, const espi_rollouts *r, int64_t first, int64_t n) {
    s->batch = (esp_reward_batch){.struct_size = sizeof s->batch,
                                  .n = n,
                                  .group_size = t->c.group_size,
                                  .step = t->step + 1,
                                  .prompt_length = r->n_prompt + first,
                                  .max_completion = t->c.max_new_tokens};
    ESPI_TRY(espi_take_array(&s->prompt, n, sizeof *s->prompt));
    ESPI_TRY(espi_take_array(&s->answer, n, sizeof *s->answer));
    ESPI_TRY(espi_take_array(&s->ids, n, sizeof *s->ids));
    ESPI_TRY(espi_take_array(&s->lengths, n, sizeof *s->lengths));
    ESPI_TRY(espi_take_array(&s->stopped, n, sizeof *s->stopped));
    ESPI_TRY(espi_take_array(&s->prompt_ids, n, sizeof *s->prompt_ids));
    ESPI_TRY(espi_take_array(&s->exact, n, sizeof *s->exact));
    ESPI_TRY(make_texts(&s->text, t, r, first, n));
    s->batch.prompt = s->prompt;
    s->batch.completion = (const char *const *)s->text;
    s->batch.answer = s->answer;
    s->batch.completion_ids = s->ids;
    s->batch.prompt_ids = s->prompt_ids;
    s->batch.completion_length = s->lengths;
    s->batch.stopped = s->stopped;
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = first + i;
        const espi_task *task = &t->train.items[r->group[row]];
        s->prompt[i] = task->prompt;
        s->answer[i] = task->answer;
        s->ids[i] = completion(r, row);
        s->prompt_ids[i] = r->tokens + r->offsets[row];
        s->lengths[i] = completion_length(r, row);
        s->stopped[i] = r->finish[row] == ESPI_FINISH_STOP;
    }
    return ESP_OK;
}

static esp_status run_rewards(esp_trainer *t, espi_rollouts *r, scoring *s, int64_t first) {
    ESPI_TRY(espi_rewards_score(r->rewards + first * t->c.n_rewards, t->scorer, &s->batch));
    esp_reward_exact(NULL, &s->batch, s->exact);
    for (int64_t i = 0; i < s->batch.n; i++) r->exact[first + i] = (double)s->exact[i];
    return ESP_OK;
}

/* The rows of the groups that are dealt to this rank. */
static esp_status score_rows(esp_trainer *t, espi_rollouts *r) {
    const int64_t first = t->dealt[espi_ranks_own(t->model)], n = t->dealt[espi_ranks_own(t->model) + 1] - first;
    if (n == 0) return ESP_OK;
    scoring s = {0};
    esp_status status = take_scoring(&s, t, r, first, n);
    if (status == ESP_OK) status = run_rewards(t, r, &s, first);
    free_scoring(&s);
    return status;
}

/* Weighted sums, by the rule that also makes the advantages. */
static esp_status advantages(esp_trainer *t, espi_rollouts *r) {
    return esp_advantages(r->advantage, r->reward, NULL, r->rewards, t->weights, r->shape.rows / t->c.group_size, t->c.group_size,
                          r->shape.rewards, t->c.scale, t->c.order);
}

/* `from` becomes a batch with columns for our rewards, filled in. */
static esp_status score(esp_trainer *t, espi_rollouts *from) {
    espi_rollouts wide;
    espi_rollouts_shape shape = from->shape;
    shape.rewards = t->c.n_rewards;
    ESPI_TRY(espi_rollouts_widen(&wide, from, &shape));
    *from = wide;
    espi_ranks_deal(t->dealt, t->model, shape.rows / shape.group_size);
    for (int r = 0; r <= espi_ranks_count(t->model); r++) t->dealt[r] *= shape.group_size;
    ESPI_TRY(espi_ranks_agree(t->model, "rewards", score_rows(t, from)));
    ESPI_TRY(espi_ranks_share(from->rewards, t->model, "rewards", t->dealt, (size_t)t->c.n_rewards * sizeof *from->rewards));
    ESPI_TRY(espi_ranks_share(from->exact, t->model, "exact answers", t->dealt, sizeof *from->exact));
    return advantages(t, from);
}

/* The control run: rewards change owners within the generation, so that they say nothing about what was written. */
static void shuffle_rewards(esp_trainer *t) {
    espi_rollouts *r = &t->rollouts;
    const int64_t n_rewards = r->shape.rewards;
    for (int64_t i = r->shape.rows - 1; i > 0; i--) {
        const double u = espi_uniform(t->c.seed, ESPI_STREAM_CONTROL, (uint32_t)(t->step + 1), (uint32_t)i, 0, 0);
        const int64_t j = (int64_t)(u * (double)(i + 1));
        for (int64_t f = 0; f < n_rewards; f++) {
            double *a = &r->rewards[i * n_rewards + f], *b = &r->rewards[j * n_rewards + f], keep = *a;
            *a = *b;
            *b = keep;
        }
    }
}

/* ---- a generation ---- */

static int64_t groups_wanted(const esp_trainer *t) {
    return (int64_t)t->c.prompts_per_step * t->c.steps_per_generation;
}

/* Its rewards differ, so it teaches something. */
static bool has_spread(const espi_rollouts *r, int64_t group) {
    const int64_t g = r->shape.group_size;
    double low = INFINITY, high = -INFINITY;
    for (int64_t i = group * g; i < (group + 1) * g; i++) {
        if (isnan(r->reward[i])) continue;
        low = fmin(low, r->reward[i]);
        high = fmax(high, r->reward[i]);
    }
    return low < high;
}

static int64_t count_spread(const espi_rollouts *r) {
    int64_t n = 0;
    for (int64_t g = 0; r->shape.rows > 0 && g < r->shape.rows / r->shape.group_size; g++) n += has_spread(r, g);
    return n;
}

/* Groups still missing; 0: no more calls. */
static int64_t missing(const esp_trainer *t) {
    const int64_t wanted = groups_wanted(t);
    if (t->tries == 0) return wanted;
    if (t->tries > t->c.resample_tries) return 0;
    return wanted - count_spread(&t->rollouts);
}

static esp_status join(esp_trainer *t, espi_rollouts *fresh) {
    if (!fresh->has_rewards && !fresh->has_advantages) ESPI_TRY(score(t, fresh));
    return espi_rollouts_append(&t->rollouts, fresh);
}

/* A failure while a stop was asked for is the stop. */
static esp_status by_stop(bool *stopped, const esp_trainer *t, esp_status failed) {
    char why[512];
    snprintf(why, sizeof why, "%s", esp_last_error());
    if (espi_stop_asked(stopped, t) != ESP_OK) return ESPI_FAIL(failed, "%s", why);
    return *stopped ? ESP_OK : failed;
}

/* One call, scored, joined to what is there.  *stopped: source or rewards failed while the run was asked to stop.  After any failure the same lines
 * are asked for again. */
static esp_status gather(esp_trainer *t, int64_t n, bool *stopped) {
    espi_rollouts fresh = {0};
    espi_prompts p = {0};
    const int64_t position = t->cursor;
    esp_status status = publish(t);
    const double start = espi_seconds();
    if (status == ESP_OK) status = ask_on_all_ranks(t, &fresh, &p, n);
    const double sampled = espi_seconds();
    const int64_t brought = status == ESP_OK && fresh.shape.rows > 0 ? fresh.shape.rows / fresh.shape.group_size : 0;
    espi_prompts_free(&p);
    if (brought > 0) status = join(t, &fresh);
    espi_rollouts_free(&fresh);
    if (status != ESP_OK) {
        t->cursor = position;
        return by_stop(stopped, t, status);
    }
    t->sums.seconds_sample += sampled - start;
    t->sums.seconds_reward += espi_seconds() - sampled;
    t->lost += n - brought;
    t->tries++;
    t->phase = ESPI_PHASE_GATHERING;
    return ESP_OK;
}

/* As many groups as were wanted: those with a spread first, in the order they came. */
static esp_status pick(esp_trainer *t) {
    espi_rollouts *r = &t->rollouts;
    const int64_t wanted = groups_wanted(t), all = r->shape.rows / t->c.group_size;
    if (all <= wanted) return ESP_OK;
    int64_t *picked = NULL, n = 0;
    ESPI_TRY(espi_take_array(&picked, all, sizeof *picked));
    for (int spread = 1; spread >= 0; spread--)
        for (int64_t g = 0; g < all; g++)
            if (has_spread(r, g) == spread && n < wanted) picked[n++] = g;
    t->resampled = all - wanted;
    const esp_status status = espi_rollouts_select(r, picked, n);
    free(picked);
    return status;
}

/* A completion that was cut has no loss; its reward stays in the mean of its group. */
static void mask_truncated(espi_rollouts *r) {
    for (int64_t i = 0; i < r->shape.rows; i++)
        if (r->finish[i] != ESPI_FINISH_STOP) memset(r->loss_mask + r->offsets[i], 0, (size_t)(r->offsets[i + 1] - r->offsets[i]));
}

static esp_status complete(esp_trainer *t) {
    espi_rollouts *r = &t->rollouts;
    if (r->shape.rows < (int64_t)t->c.steps_per_generation * t->c.group_size)
        return ESPI_FAIL(ESP_ERR_COMM, "the %s brought %lld groups of the %lld of a generation, expected at least %d: one a step",
                         t->source.name, (long long)(r->shape.rows / t->c.group_size), (long long)groups_wanted(t),
                         t->c.steps_per_generation);
    ESPI_TRY(pick(t));
    if (t->c.shuffle_rewards) shuffle_rewards(t);
    if (!r->has_advantages) ESPI_TRY(advantages(t, r));
    if (t->c.mask_truncated) mask_truncated(r);
    ESPI_TRY(espi_correct(t));
    t->slice = 0;
    t->generation++;
    t->phase = ESPI_PHASE_READY;
    const esp_status status = espi_rollout_ready(t);
    return espi_ranks_agree(t->model, "a file of rollouts", status == ESP_OK ? espi_files_save(t) : status);
}

esp_status espi_rollout_ready(esp_trainer *t) {
    free_texts(&t->text, t->n_text);
    t->n_text = espi_ranks_first(t->model) ? t->rollouts.shape.rows : 0; /* for the files */
    return make_texts(&t->text, t, &t->rollouts, 0, t->n_text);
}

esp_status espi_rollout_make(esp_trainer *t) {
    if (t->phase == ESPI_PHASE_EMPTY) {
        espi_rollouts_free(&t->rollouts);
        t->tries = t->lost = t->resampled = 0;
    }
    bool stopped = false;
    for (int64_t n; (n = missing(t)) > 0;) {
        ESPI_TRY(espi_stop_asked(&stopped, t));
        if (!stopped) ESPI_TRY(gather(t, n, &stopped));
        if (stopped) return ESP_OK;
    }
    ESPI_TRY(espi_stop_asked(&stopped, t));
    return stopped ? ESP_OK : complete(t);
}

void espi_rollout_free(esp_trainer *t) {
    free_texts(&t->text, t->n_text);
    espi_rollouts_free(&t->rollouts);
}

/* ---- slices ---- */

/* May a sequence without an advantage be left out?  Only when nothing else of the loss pulls on it, and no normaliser sees it. */
static bool may_skip(const esp_trainer *t) {
    const esp_objective *o = &t->c.objective;
    const esp_model_config *m = &t->model->options;
    return !t->c.no_skip && (o->beta == 0 || t->c.no_kl_on_zero_adv) && o->entropy_coef == 0 && t->c.entropy_target == 0 &&
           m->router_aux_coef == 0 && m->router_z_coef == 0 && o->loss != ESP_LOSS_BNPO &&
           (o->top_entropy_quantile == 0 || o->top_entropy_quantile == 1);
}

/* The order in which the groups of this generation come in this round. */
static void order_groups(esp_trainer *t, int64_t n, uint32_t round) {
    for (int64_t i = 0; i < n; i++) t->groups[i] = i;
    for (int64_t i = n - 1; i > 0 && t->c.steps_per_generation > 1; i--) {
        const double u = espi_uniform(t->c.seed, ESPI_STREAM_SLICES, (uint32_t)t->generation, round, (uint32_t)i, 0);
        const int64_t j = (int64_t)(u * (double)(i + 1)), other = t->groups[j];
        t->groups[j] = t->groups[i];
        t->groups[i] = other;
    }
}

espi_sequence espi_sequence_of(const espi_rollouts *r, int64_t row) {
    const int64_t first = r->offsets[row], answer = first + r->n_prompt[row];
    espi_sequence s = {.tokens = r->tokens + first,
                       .n_prompt = r->n_prompt[row],
                       .n_completion = completion_length(r, row),
                       .mask = r->loss_mask + answer,
                       .sampler = r->sampler_logprob + first,
                       .old = r->has_old ? r->old_logprob + first : NULL,
                       .ref = r->has_ref ? r->ref_logprob + first : NULL,
                       .ratio = r->has_ratio ? r->is_ratio + first : NULL,
                       .routes = r->routes ? r->routes + first * r->shape.layers * r->shape.top_k * r->shape.route_bytes : NULL,
                       .kept_offsets = r->kept_offsets ? r->kept_offsets + first : NULL,
                       .advantage = r->advantage[row],
                       .row = row,
                       .group = row / r->shape.group_size};
    for (int32_t k = 0; k < s.n_completion; k++) s.n_counted += s.mask[k];
    return s;
}

void espi_rollout_sequences(esp_trainer *t) {
    const espi_rollouts *r = &t->rollouts;
    const int64_t g = t->c.group_size, groups = r->shape.rows / g, steps = t->c.steps_per_generation, part = t->slice % steps;
    const bool skip = may_skip(t);
    order_groups(t, groups, (uint32_t)(t->slice / steps));
    t->n_sequences = 0;
    for (int64_t i = part * groups / steps; i < (part + 1) * groups / steps; i++) {
        const int64_t first = t->groups[i] * g;
        bool zero = true;
        for (int64_t k = 0; k < g; k++) zero = zero && r->advantage[first + k] == 0;
        for (int64_t k = 0; k < g; k++) {
            espi_sequence *s = &t->sequences[t->n_sequences++];
            *s = espi_sequence_of(r, first + k);
            s->skip = skip && (zero || s->n_counted == 0);
        }
    }
}
