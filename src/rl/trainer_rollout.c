/* The first half of a GRPO step: prompts, completions, rewards, advantages.  And evaluation, which is the same without the advantages. */
#include "core/rng.h"
#include "models/model.h"
#include "rl/run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

esp_status espi_rollout_create(esp_trainer *t) {
    espi_rollout *r = &t->rollout;
    const int64_t n = t->rows, cells = n * t->c.max_new_tokens;
    r->n = n;
    ESPI_TRY(espi_take_array(&r->line, t->c.prompts_per_step, sizeof *r->line));
    ESPI_TRY(espi_take_array(&r->tokens, cells, sizeof *r->tokens));
    ESPI_TRY(espi_take_array(&r->logprobs, cells, sizeof *r->logprobs));
    ESPI_TRY(espi_take_array(&r->ref, cells, sizeof *r->ref));
    ESPI_TRY(espi_take_array(&r->lengths, n, sizeof *r->lengths));
    ESPI_TRY(espi_take_array(&r->stopped, n, sizeof *r->stopped));
    ESPI_TRY(espi_take_array(&r->text, n, sizeof *r->text));
    ESPI_TRY(espi_take_array(&r->parts, n * t->c.n_rewards, sizeof *r->parts));
    ESPI_TRY(espi_take_array(&r->reward, n, sizeof *r->reward));
    ESPI_TRY(espi_take_array(&r->advantage, n, sizeof *r->advantage));
    return espi_take_array(&r->exact, n, sizeof *r->exact);
}

static void free_texts(char **text, int64_t n) {
    for (int64_t i = 0; text && i < n; i++) {
        free(text[i]);
        text[i] = NULL;
    }
}

void espi_rollout_free(esp_trainer *t) {
    espi_rollout *r = &t->rollout;
    free_texts(r->text, r->n);
    free(r->line);
    free(r->tokens);
    free(r->logprobs);
    free(r->ref);
    free(r->lengths);
    free(r->stopped);
    free(r->text);
    free(r->parts);
    free(r->reward);
    free(r->advantage);
    free(r->exact);
    *r = (espi_rollout){0};
}

#define REPLACEMENT "\xEF\xBF\xBD"

/* Text that grows. */
typedef struct text {
    char *bytes;
    size_t used, capacity;
} text;

static esp_status append(text *out, const char *bytes, size_t n) {
    if (out->used + n + 1 > out->capacity) {
        const size_t capacity = 2 * (out->used + n + 1) + 32;
        char *grown = realloc(out->bytes, capacity);
        if (!grown) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a completion's text of %zu bytes", capacity);
        out->bytes = grown;
        out->capacity = capacity;
    }
    memcpy(out->bytes + out->used, bytes, n);
    out->used += n;
    out->bytes[out->used] = '\0';
    return ESP_OK;
}

static esp_status decode(text *out, const esp_tokenizer *tokenizer, const int32_t *ids, int32_t n) {
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
    text grown = {NULL, 0, 0};
    const esp_status status = decode(&grown, tokenizer, ids, n - stopped);
    if (status != ESP_OK) {
        free(grown.bytes);
        return status;
    }
    *out = grown.bytes;
    return ESP_OK;
}

esp_status espi_rollout_texts(esp_trainer *t) {
    espi_rollout *r = &t->rollout;
    free_texts(r->text, r->n);
    for (int64_t i = 0; i < r->n; i++)
        ESPI_TRY(espi_completion_text(&r->text[i], t->tokenizer, r->tokens + i * t->c.max_new_tokens, r->lengths[i], r->stopped[i] != 0));
    return ESP_OK;
}

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

/* Prompts of the given lines, packed. */
typedef struct prompts {
    int32_t *ids, *cu;
    uint32_t *keys;
} prompts;

static void free_prompts(prompts *p) {
    free(p->ids);
    free(p->cu);
    free(p->keys);
}

static esp_status take_prompts(prompts *p, int64_t n, int64_t longest) {
    ESPI_TRY(espi_take_array(&p->ids, n * longest, sizeof *p->ids));
    ESPI_TRY(espi_take_array(&p->cu, n + 1, sizeof *p->cu));
    return espi_take_array(&p->keys, n, sizeof *p->keys);
}

static void add_prompt(prompts *p, int64_t i, const espi_task *task, uint32_t key) {
    memcpy(p->ids + p->cu[i], task->prompt_ids, (size_t)task->n_prompt * sizeof *p->ids);
    p->cu[i + 1] = p->cu[i] + task->n_prompt;
    p->keys[i] = key;
}

static esp_status sample_step(esp_trainer *t, prompts *p) {
    espi_rollout *r = &t->rollout;
    ESPI_TRY(take_prompts(p, t->c.prompts_per_step, t->train.longest_prompt));
    for (int32_t i = 0; i < t->c.prompts_per_step; i++) {
        uint32_t key;
        ESPI_TRY(espi_next_line(t, &r->line[i], &key));
        add_prompt(p, i, &t->train.items[r->line[i]], key);
    }
    const esp_generate_config c =
        ESP_GENERATE_CONFIG(.prompts = p->ids, .cu_prompts = p->cu, .n_prompts = t->c.prompts_per_step, .samples = t->c.group_size,
                            .max_new_tokens = t->c.max_new_tokens, .temperature = t->c.temperature, .seed = t->c.seed,
                            .step = (uint32_t)(t->step + 1), .keys = p->keys);
    return esp_sampler_generate(t->sampler, &c, r->tokens, r->logprobs, r->lengths, r->stopped);
}

/* One batch for the reward functions: pointers into what the caller has. */
typedef struct scoring {
    esp_reward_batch batch;
    const char **prompt, **completion, **answer;
    const int32_t **ids;
    float *reward;
} scoring;

static void free_scoring(scoring *s) {
    free(s->prompt);
    free(s->completion);
    free(s->answer);
    free(s->ids);
    free(s->reward);
}

static esp_status take_scoring(scoring *s, int64_t n, int64_t group_size, int64_t step) {
    ESPI_TRY(espi_take_array(&s->prompt, n, sizeof *s->prompt));
    ESPI_TRY(espi_take_array(&s->completion, n, sizeof *s->completion));
    ESPI_TRY(espi_take_array(&s->answer, n, sizeof *s->answer));
    ESPI_TRY(espi_take_array(&s->ids, n, sizeof *s->ids));
    ESPI_TRY(espi_take_array(&s->reward, n, sizeof *s->reward));
    s->batch = (esp_reward_batch){.struct_size = sizeof s->batch,
                                  .n = n,
                                  .group_size = group_size,
                                  .prompt = s->prompt,
                                  .completion = s->completion,
                                  .answer = s->answer,
                                  .completion_ids = s->ids,
                                  .step = step};
    return ESP_OK;
}

static esp_status run_rewards(esp_trainer *t, scoring *s) {
    espi_rollout *r = &t->rollout;
    for (int32_t f = 0; f < t->c.n_rewards; f++) {
        const int code = t->rewards[f].fn(t->rewards[f].user, &s->batch, s->reward);
        if (code != 0)
            return ESPI_FAIL(ESP_ERR_CALLBACK, "reward function \"%s\" returned %d at step %lld, expected 0: see its own message",
                             t->rewards[f].name, code, (long long)s->batch.step);
        for (int64_t i = 0; i < r->n; i++) {
            if (isinf(s->reward[i]))
                return ESPI_FAIL(ESP_ERR_NONFINITE,
                                 "reward function \"%s\" gave %g for completion %lld of step %lld, expected a finite number, or NaN to "
                                 "abstain",
                                 t->rewards[f].name, (double)s->reward[i], (long long)i, (long long)s->batch.step);
            r->parts[i * t->c.n_rewards + f] = s->reward[i];
        }
    }
    esp_reward_exact(NULL, &s->batch, s->reward);
    for (int64_t i = 0; i < r->n; i++) r->exact[i] = s->reward[i];
    return ESP_OK;
}

static esp_status score(esp_trainer *t, scoring *s) {
    espi_rollout *r = &t->rollout;
    ESPI_TRY(espi_rollout_texts(t));
    ESPI_TRY(take_scoring(s, r->n, t->c.group_size, t->step + 1));
    for (int64_t i = 0; i < r->n; i++) {
        const espi_task *task = &t->train.items[r->line[i / t->c.group_size]];
        s->prompt[i] = task->prompt;
        s->answer[i] = task->answer;
        s->completion[i] = r->text[i];
        s->ids[i] = r->tokens + i * t->c.max_new_tokens;
    }
    s->batch.completion_length = r->lengths;
    s->batch.stopped = r->stopped;
    return run_rewards(t, s);
}

/* The control run: rewards change owners within the step, so that they say nothing about what was written. */
static void shuffle_rewards(esp_trainer *t) {
    espi_rollout *r = &t->rollout;
    for (int64_t i = r->n - 1; i > 0; i--) {
        const double u = espi_uniform(t->c.seed, ESPI_STREAM_CONTROL, (uint32_t)(t->step + 1), (uint32_t)i, 0, 0);
        const int64_t j = (int64_t)(u * (double)(i + 1));
        for (int32_t f = 0; f < t->c.n_rewards; f++) {
            double *a = &r->parts[i * t->c.n_rewards + f], *b = &r->parts[j * t->c.n_rewards + f], keep = *a;
            *a = *b;
            *b = keep;
        }
    }
}

/* May a sequence without an advantage be left out?  Only when nothing else of the loss pulls on it, and no normaliser sees it. */
static bool may_skip(const esp_trainer *t) {
    const esp_objective *o = &t->c.objective;
    const esp_model_config *m = &t->model->options;
    return !t->c.no_skip && o->beta == 0 && o->entropy_coef == 0 && m->router_aux_coef == 0 && m->router_z_coef == 0 &&
           o->loss != ESP_LOSS_BNPO && (o->top_entropy_quantile == 0 || o->top_entropy_quantile == 1);
}

void espi_rollout_sequences(esp_trainer *t) {
    const espi_rollout *r = &t->rollout;
    const bool skip = may_skip(t);
    for (int64_t p = 0; p < t->c.prompts_per_step; p++) {
        const espi_task *task = &t->train.items[r->line[p]];
        bool zero = true;
        for (int64_t i = p * t->c.group_size; i < (p + 1) * t->c.group_size; i++) zero = zero && r->advantage[i] == 0;
        for (int64_t i = p * t->c.group_size; i < (p + 1) * t->c.group_size; i++)
            t->sequences[i] = (espi_sequence){.prompt = task->prompt_ids,
                                              .n_prompt = task->n_prompt,
                                              .completion = r->tokens + i * t->c.max_new_tokens,
                                              .n_completion = r->lengths[i],
                                              .n_counted = r->lengths[i],
                                              .sampler_logprob = r->logprobs + i * t->c.max_new_tokens,
                                              .ref_logprob = r->ref + i * t->c.max_new_tokens,
                                              .advantage = r->advantage[i],
                                              .skip = skip && zero};
    }
}

esp_status espi_rollout_make(esp_trainer *t) {
    espi_rollout *r = &t->rollout;
    prompts p = {0};
    scoring s = {0};
    const double start = espi_seconds();
    esp_status status = sample_step(t, &p);
    const double sampled = espi_seconds();
    if (status == ESP_OK) status = score(t, &s);
    free_prompts(&p);
    free_scoring(&s);
    ESPI_TRY(status);
    if (t->c.shuffle_rewards) shuffle_rewards(t);
    ESPI_TRY(esp_advantages(r->advantage, r->reward, NULL, r->parts, t->weights, t->c.prompts_per_step, t->c.group_size, t->c.n_rewards,
                            t->c.scale, ESP_SUM_THEN_NORMALIZE));
    t->sums.seconds_sample = sampled - start;
    t->sums.seconds_reward = espi_seconds() - sampled;
    return ESP_OK;
}

/* What an evaluation holds beside the sampler. */
typedef struct evaluation {
    prompts p;
    scoring s;
    int32_t *tokens, *lengths;
    uint8_t *stopped;
    char **text;
} evaluation;

static esp_status evaluate(esp_trainer *t, evaluation *e, double *share, int32_t samples, bool greedy) {
    const int64_t lines = t->eval.n, n = lines * samples;
    if (n > INT32_MAX)
        return ESPI_FAIL(ESP_ERR_ARG, "evaluation of %lld lines, %d samples each: expected fewer rows", (long long)lines, samples);
    ESPI_TRY(take_prompts(&e->p, lines, t->eval.longest_prompt));
    ESPI_TRY(espi_take_array(&e->tokens, n * t->c.max_new_tokens, sizeof *e->tokens));
    ESPI_TRY(espi_take_array(&e->lengths, n, sizeof *e->lengths));
    ESPI_TRY(espi_take_array(&e->stopped, n, sizeof *e->stopped));
    ESPI_TRY(espi_take_array(&e->text, n, sizeof *e->text));
    ESPI_TRY(take_scoring(&e->s, n, samples, t->step));
    for (int64_t i = 0; i < lines; i++) add_prompt(&e->p, i, &t->eval.items[i], (uint32_t)i);
    const esp_generate_config c = ESP_GENERATE_CONFIG(.prompts = e->p.ids, .cu_prompts = e->p.cu, .n_prompts = (int32_t)lines,
                                                      .samples = samples, .max_new_tokens = t->c.max_new_tokens, .greedy = greedy,
                                                      .seed = t->c.seed, .step = (uint32_t)t->step, .evaluation = true, .keys = e->p.keys);
    ESPI_TRY(esp_sampler_generate(t->sampler, &c, e->tokens, NULL, e->lengths, e->stopped));
    for (int64_t i = 0; i < n; i++) {
        ESPI_TRY(espi_completion_text(&e->text[i], t->tokenizer, e->tokens + i * t->c.max_new_tokens, e->lengths[i], e->stopped[i] != 0));
        e->s.answer[i] = t->eval.items[i / samples].answer;
        e->s.completion[i] = e->text[i];
    }
    e->s.batch.stopped = e->stopped;
    esp_reward_exact(NULL, &e->s.batch, e->s.reward);
    double right = 0;
    for (int64_t i = 0; i < n; i++) right += e->s.reward[i];
    *share = right / (double)n;
    return ESP_OK;
}

esp_status espi_evaluate(esp_trainer *t, double *share, int32_t samples, bool greedy) {
    evaluation e = {0};
    const esp_status status = evaluate(t, &e, share, samples, greedy);
    free_texts(e.text, t->eval.n * samples);
    free_prompts(&e.p);
    free_scoring(&e.s);
    free(e.tokens);
    free(e.lengths);
    free(e.stopped);
    free(e.text);
    return status;
}
