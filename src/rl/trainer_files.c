/* Files of rollouts in a run: where they come from (`rollouts`), and what is kept of them (`save_rollouts`). */
#include "models/model.h"
#include "rl/rollout_file.h"
#include "rl/run.h"

#include "core/log.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

static const char *const corrections[] = {[ESP_CORRECTION_DEFAULT] = "none",
                                          [ESP_CORRECTION_NONE] = "none",
                                          [ESP_CORRECTION_TIS] = "tis",
                                          [ESP_CORRECTION_MIS] = "mis",
                                          [ESP_CORRECTION_ICEPOP] = "icepop"};

/* The run must not ask for more groups than there are. */
static esp_status check_steps(const esp_trainer *t, const espi_rollout_summary *sum) {
    const int64_t wanted = (int64_t)t->c.prompts_per_step * t->c.steps_per_generation, generations = sum->groups / wanted;
    if ((t->c.steps + t->slices - 1) / t->slices <= generations) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG,
                     "%s: %lld groups, %lld in a generation, are enough for %lld steps, expected at least the %lld of the run: lower steps",
                     t->c.rollouts, (long long)sum->groups, (long long)wanted, (long long)(generations * t->slices), (long long)t->c.steps);
}

esp_status espi_files_source(esp_trainer *t) {
    const espi_config *config = &t->model->config;
    espi_rollout_limits limits = {.vocab = t->info.vocab, .layers = config->layers, .experts = t->info.experts, .top_k = config->top_k};
    espi_rollout_summary sum;
    const char **names = NULL;
    char told[256];
    espi_tokenizer_hash(limits.tokenizer_hash, t->tokenizer);
    ESPI_TRY(espi_take_array(&names, t->c.n_rewards, sizeof *names));
    for (int32_t f = 0; f < t->c.n_rewards; f++) names[f] = t->rewards[f].name;
    const esp_status status = espi_file_source(&t->source, &sum, t->c.rollouts, &limits, names, t->c.n_rewards);
    free(names);
    ESPI_TRY(status);
    ESPI_TRY(check_steps(t, &sum));
    if (t->c.shuffle_rewards && sum.rewards == 0)
        return ESPI_FAIL(ESP_ERR_ARG, "shuffle_rewards with %s: it has advantages and no rewards, expected rewards: leave it out",
                         t->c.rollouts);
    espi_rollout_correction_tell(told, &sum, corrections[t->c.correction]);
    espi_log(t->model->ctx, ESP_LOG_INFO, "rollouts of %s: %lld groups of %lld; correction %s", t->c.rollouts, (long long)sum.groups,
             (long long)sum.group_size, told);
    t->train.hash = XXH3_64bits(&sum, sizeof sum); /* a run that is resumed goes on with the same ones */
    t->longest = sum.longest;
    return ESP_OK;
}

/* Prompts as text, where the lines they came from are known. */
static esp_status save(const esp_trainer *t, const char *path, const espi_rollout_facts *facts) {
    const espi_rollouts *r = &t->rollouts;
    const char **prompt = NULL;
    if (t->source.own_prompts) return espi_rollouts_save(path, r, NULL, NULL, facts);
    ESPI_TRY(espi_take_array(&prompt, r->shape.rows, sizeof *prompt));
    for (int64_t i = 0; i < r->shape.rows; i++) {
        const char *text = espi_row_task(t, i)->prompt;
        prompt[i] = text ? text : "";
    }
    const esp_status status = espi_rollouts_save(path, r, prompt, (const char *const *)t->text, facts);
    free(prompt);
    return status;
}

esp_status espi_files_save(const esp_trainer *t) {
    char path[ESPI_PATH_MAX], name[64];
    espi_rollout_facts facts = {.vocab_size = t->info.vocab,
                                .adapter_version = t->step,
                                .top_k = t->c.top_k,
                                .seed = t->c.seed <= INT64_MAX ? (int64_t)t->c.seed : -1,
                                .temperature = (double)t->c.temperature,
                                .top_p = (double)t->c.top_p,
                                .min_p = (double)t->c.min_p};
    if (!t->save_rollouts || !espi_ranks_first(t->model)) return ESP_OK;
    espi_tokenizer_hash(facts.tokenizer_hash, t->tokenizer);
    snprintf(facts.model_id, sizeof facts.model_id, "%s", t->model->config.family->name);
    snprintf(name, sizeof name, "rollouts-%08lld.h5", (long long)t->generation);
    ESPI_TRY(espi_path_join(path, t->save_rollouts, name));
    ESPI_TRY(espi_take_array(&facts.reward_names, t->c.n_rewards, sizeof *facts.reward_names));
    for (int32_t f = 0; f < t->c.n_rewards; f++) snprintf(facts.reward_names[f], ESPI_ROLLOUT_TEXT, "%s", t->rewards[f].name);
    const esp_status status = save(t, path, &facts);
    free(facts.reward_names);
    return status;
}
