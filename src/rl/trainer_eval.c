/* Evaluation on lines of their own, in a random stream of its own; what follows from it: the best adapter, early stop. */
#include "models/model.h"
#include "rl/run.h"

#include <stdlib.h>
#include <string.h>

/* What an evaluation holds beside the sampler. */
typedef struct evaluation {
    espi_prompts p;
    int32_t *tokens, *lengths;
    uint8_t *stopped;
    const char **answer;
    char **text;
    float *exact;
    int64_t n;
} evaluation;

static void release(evaluation *e) {
    for (int64_t i = 0; e->text && i < e->n; i++) free(e->text[i]);
    espi_prompts_free(&e->p);
    free(e->tokens);
    free(e->lengths);
    free(e->stopped);
    free(e->answer);
    free(e->text);
    free(e->exact);
}

static esp_status take(evaluation *e, const esp_trainer *t) {
    ESPI_TRY(espi_prompts_take(&e->p, t->eval.n, t->eval.longest_prompt));
    ESPI_TRY(espi_take_array(&e->tokens, e->n * t->c.max_new_tokens, sizeof *e->tokens));
    ESPI_TRY(espi_take_array(&e->lengths, e->n, sizeof *e->lengths));
    ESPI_TRY(espi_take_array(&e->stopped, e->n, sizeof *e->stopped));
    ESPI_TRY(espi_take_array(&e->answer, e->n, sizeof *e->answer));
    ESPI_TRY(espi_take_array(&e->exact, e->n, sizeof *e->exact));
    return espi_take_array(&e->text, e->n, sizeof *e->text);
}

/* Of the lines that are dealt to this rank: their rows of e->exact. */
static esp_status answer_lines(esp_trainer *t, evaluation *e, int32_t samples, bool greedy) {
    const int own = espi_ranks_own(t->model);
    const int64_t first = t->dealt[own], lines = t->dealt[own + 1] - first;
    for (int64_t i = 0; i < lines; i++) espi_prompts_add(&e->p, i, &t->eval.items[first + i], first + i, (uint32_t)(first + i));
    const esp_generate_config c = ESP_GENERATE_CONFIG(.prompts = e->p.ids, .cu_prompts = e->p.cu, .n_prompts = (int32_t)lines,
                                                      .samples = samples, .max_new_tokens = t->c.max_new_tokens, .greedy = greedy,
                                                      .seed = t->c.seed, .step = (uint32_t)t->step, .evaluation = true, .keys = e->p.keys);
    ESPI_TRY(esp_sampler_generate(t->sampler, &c, e->tokens, NULL, e->lengths, e->stopped));
    for (int64_t i = 0; i < lines * samples; i++) {
        ESPI_TRY(espi_completion_text(&e->text[i], t->tokenizer, e->tokens + i * t->c.max_new_tokens, e->lengths[i], e->stopped[i] != 0));
        e->answer[i] = t->eval.items[first + i / samples].answer;
    }
    const esp_reward_batch batch = {.struct_size = sizeof batch,
                                    .n = lines * samples,
                                    .group_size = samples,
                                    .completion = (const char *const *)e->text,
                                    .answer = e->answer,
                                    .stopped = e->stopped};
    esp_reward_exact(NULL, &batch, e->exact + first * samples);
    return ESP_OK;
}

static esp_status evaluate(esp_trainer *t, evaluation *e, double *share, int32_t samples, bool greedy) {
    const int64_t lines = t->eval.n;
    e->n = lines * samples;
    if (e->n > INT32_MAX)
        return ESPI_FAIL(ESP_ERR_ARG, "evaluation of %lld lines, %d samples each: expected fewer rows", (long long)lines, samples);
    ESPI_TRY(take(e, t));
    espi_ranks_deal(t->dealt, t->model, lines);
    ESPI_TRY(espi_ranks_agree(t->model, "an evaluation", answer_lines(t, e, samples, greedy)));
    for (int r = 0; r <= espi_ranks_count(t->model); r++) t->dealt[r] *= samples;
    ESPI_TRY(espi_ranks_share(e->exact, t->model, "exact answers", t->dealt, sizeof *e->exact));
    double right = 0;
    for (int64_t i = 0; i < e->n; i++) right += e->exact[i];
    *share = right / (double)e->n;
    return ESP_OK;
}

esp_status espi_evaluate(esp_trainer *t, double *share, int32_t samples, bool greedy) {
    evaluation e = {0};
    const esp_status status = evaluate(t, &e, share, samples, greedy);
    release(&e);
    return status;
}

esp_status espi_judge(esp_trainer *t) {
    if (!(t->eval_sampled > t->best)) {
        t->worse++;
        return ESP_OK;
    }
    t->best = t->eval_sampled;
    t->best_step = t->step;
    t->worse = 0;
    if (!t->c.keep_best) return ESP_OK;
    char path[ESPI_PATH_MAX];
    ESPI_TRY(espi_path_join(path, t->out_dir, "adapter-best"));
    return esp_model_save_adapter(t->model, path);
}
