/* The second half of a step: sequences become micro-batches, those gradients, and these one optimiser step.  Every micro-batch is divided
 * by the counts of the whole step, so that how it is cut does not matter. */
#include "models/passes.h"
#include "rl/run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Most tokens of one micro-batch. */
static int64_t batch_capacity(const esp_trainer *t) {
    const int64_t all = t->rows * t->longest, asked = t->c.micro_batch_tokens;
    if (asked == 0 || asked > all) return all;
    return asked > t->longest ? asked : t->longest;
}

/* Bytes of a micro-batch of this shape; take: and makes room for it. */
static esp_status candidate(size_t *most, esp_model *model, int64_t tokens, int32_t n_seqs, bool take) {
    espi_extent room;
    ESPI_TRY(espi_activation_bytes(&room, model, tokens, n_seqs, true));
    if (room.main > *most) *most = room.main;
    return take ? esp_model_reserve(model, tokens, n_seqs, true) : ESP_OK;
}

/* The largest number of tokens of which `kept` layers stay whole under the activation budget, between low and high. */
static esp_status largest_keeping(int64_t *tokens, esp_model *model, int64_t kept, int64_t low, int64_t high) {
    for (*tokens = low; high - *tokens > 0;) {
        const int64_t middle = *tokens + (high - *tokens + 1) / 2;
        int64_t first;
        ESPI_TRY(espi_decoder_first_kept(&first, model, middle));
        if (model->config.layers - first >= kept)
            *tokens = middle;
        else
            high = middle - 1;
    }
    return ESP_OK;
}

esp_status espi_update_reserve(size_t *bytes, esp_trainer *t, bool take) {
    esp_model *m = t->model;
    const int64_t capacity = batch_capacity(t);
    /* Few long sequences have most rows in the loss head, many short ones most borders. */
    const int32_t n_seqs[2] = {1, (int32_t)(t->rows < capacity ? t->rows : capacity)};
    *bytes = 0;
    for (int i = 0; i < 2; i++) {
        ESPI_TRY(candidate(bytes, m, capacity, n_seqs[i], take));
        /* Under a budget a smaller batch may keep a layer that a larger one runs again, and need more. */
        for (int64_t kept = 1; m->options.activation_budget > 0 && kept <= m->config.layers; kept++) {
            int64_t tokens;
            ESPI_TRY(largest_keeping(&tokens, m, kept, n_seqs[i], capacity));
            ESPI_TRY(candidate(bytes, m, tokens, n_seqs[i], take));
        }
    }
    return ESP_OK;
}

/* Two settings speak of the batch of one forward, as in TRL; cutting the step would silently make another objective of them. */
static esp_status check_cut(const esp_trainer *t, int64_t capacity) {
    const esp_objective *o = &t->c.objective;
    const int64_t all = t->rows * t->longest;
    if (t->c.kind != ESP_TRAIN_GRPO || capacity == all) return ESP_OK;
    if (o->loss == ESP_LOSS_BNPO)
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "micro_batch_tokens: got %d with loss bnpo, expected at least %lld, the most tokens of a step: bnpo is a mean over the "
            "tokens of one micro-batch; set micro_batch_tokens 0, or loss dapo, the mean over those of the step",
            t->c.micro_batch_tokens, (long long)all);
    if (o->top_entropy_quantile == 0 || o->top_entropy_quantile == 1) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG,
                     "micro_batch_tokens: got %d with top_entropy_quantile %g, expected at least %lld, the most tokens of a step: each "
                     "micro-batch would pick tokens by a threshold of its own; set micro_batch_tokens or top_entropy_quantile 0",
                     t->c.micro_batch_tokens, (double)o->top_entropy_quantile, (long long)all);
}

esp_status espi_update_create(esp_trainer *t) {
    espi_packed *p = &t->packed;
    const int64_t n = batch_capacity(t);
    ESPI_TRY(check_cut(t, n));
    p->capacity = n;
    ESPI_TRY(espi_take_array(&t->sequences, t->rows, sizeof *t->sequences));
    ESPI_TRY(espi_take_array(&p->tokens, n, sizeof *p->tokens));
    ESPI_TRY(espi_take_array(&p->cu, t->rows + 1, sizeof *p->cu));
    ESPI_TRY(espi_take_array(&p->mask, n, sizeof *p->mask));
    ESPI_TRY(espi_take_array(&p->advantage, t->rows, sizeof *p->advantage));
    ESPI_TRY(espi_take_array(&p->ref, n, sizeof *p->ref));
    return espi_take_array(&p->sampler, n, sizeof *p->sampler);
}

void espi_update_free(esp_trainer *t) {
    espi_packed *p = &t->packed;
    free(t->sequences);
    free(p->tokens);
    free(p->cu);
    free(p->mask);
    free(p->advantage);
    free(p->ref);
    free(p->sampler);
}

static void put(espi_packed *p, int32_t seq, const espi_sequence *s) {
    const int32_t begin = p->cu[seq], middle = begin + s->n_prompt, bytes = s->n_completion * (int32_t)sizeof(float);
    memcpy(p->tokens + begin, s->prompt, (size_t)s->n_prompt * sizeof *p->tokens);
    memcpy(p->tokens + middle, s->completion, (size_t)s->n_completion * sizeof *p->tokens);
    memset(p->mask + begin, 0, (size_t)s->n_prompt);
    memset(p->mask + middle, 1, (size_t)s->n_completion);
    if (s->mask) memcpy(p->mask + middle, s->mask, (size_t)s->n_completion);
    if (s->sampler_logprob) memcpy(p->sampler + middle, s->sampler_logprob, (size_t)bytes);
    if (s->ref_logprob) memcpy(p->ref + middle, s->ref_logprob, (size_t)bytes);
    p->advantage[seq] = (float)s->advantage;
    p->cu[seq + 1] = middle + s->n_completion;
}

/* Packs sequences from *next on, as many as fit, those to be skipped left out unless `all`.  batch->n_seqs = 0: none is left.
 * *from: the first that was looked at. */
static esp_batch pack(esp_trainer *t, int64_t *next, bool all) {
    espi_packed *p = &t->packed;
    int32_t n_seqs = 0;
    p->cu[0] = 0;
    for (; *next < t->rows; ++*next) {
        const espi_sequence *s = &t->sequences[*next];
        if (s->skip && !all) continue;
        if (p->cu[n_seqs] + s->n_prompt + s->n_completion > p->capacity) break;
        put(p, n_seqs++, s);
    }
    return ESP_BATCH(.tokens = p->tokens, .cu_seqlens = p->cu, .n_tokens = p->cu[n_seqs], .n_seqs = n_seqs, .loss_mask = p->mask);
}

esp_status espi_reference_logprobs(esp_trainer *t) {
    for (int64_t next = 0, first = 0; next < t->rows; first = next) {
        const esp_batch batch = pack(t, &next, true);
        esp_tensor hidden;
        ESPI_TRY(esp_model_adapter_enable(t->model, false));
        esp_status status = esp_model_forward_only(t->model, &batch, &hidden);
        if (status == ESP_OK) status = esp_model_logprob(t->model, &batch, &hidden, t->c.temperature, t->packed.ref, NULL);
        ESPI_TRY(esp_model_adapter_enable(t->model, true));
        ESPI_TRY(status);
        for (int64_t i = first; i < next; i++) {
            espi_sequence *s = &t->sequences[i];
            const int32_t middle = t->packed.cu[i - first] + s->n_prompt;
            memcpy(s->ref_logprob, t->packed.ref + middle, (size_t)s->n_completion * sizeof(float));
        }
    }
    return ESP_OK;
}

static void add_stats(espi_step_sums *sums, const esp_grpo_stats *s) {
    const double n = (double)s->tokens;
    sums->loss += s->loss;
    sums->policy_loss += s->policy_loss;
    sums->kl += n * s->kl;
    sums->entropy += n * s->entropy;
    sums->ratio += n * s->ratio_mean;
    sums->clip_low += n * s->clip_low;
    sums->clip_high += n * s->clip_high;
    sums->abs_g += n * s->mean_abs_g;
    sums->diff_mean += n * s->logp_diff_mean;
    sums->diff_max = fmax(sums->diff_max, s->logp_diff_max);
    sums->tokens += n;
}

/* The gradient of one micro-batch. */
static esp_status accumulate(esp_trainer *t, esp_batch *batch) {
    esp_tensor hidden, d_hidden;
    ESPI_TRY(esp_model_forward(t->model, batch, &hidden));
    if (t->c.kind == ESP_TRAIN_SFT) {
        double loss;
        ESPI_TRY(esp_model_cross_entropy(t->model, batch, &hidden, &loss, &d_hidden));
        t->sums.loss += loss;
    } else {
        esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
        batch->objective = &t->c.objective;
        batch->advantage = t->packed.advantage;
        batch->sampler_logprob = t->packed.sampler;
        /* The first update's policy is the one that sampled: its log-probabilities are the old ones, to the bit. */
        batch->old_logprob = t->c.updates_per_batch > 1 ? t->packed.sampler : NULL;
        batch->ref_logprob = t->c.objective.beta > 0 ? t->packed.ref : NULL;
        ESPI_TRY(esp_grpo_loss(t->model, batch, &hidden, &d_hidden, &stats));
        add_stats(&t->sums, &stats);
    }
    return esp_model_backward(t->model, batch, &d_hidden);
}

esp_status espi_update(esp_trainer *t) {
    double step_tokens = 0;
    for (int64_t i = 0; i < t->rows; i++) step_tokens += t->sequences[i].n_counted;
    for (int64_t next = 0; next < t->rows;) {
        esp_batch batch = pack(t, &next, false);
        if (batch.n_seqs == 0) break;
        batch.step_tokens = step_tokens;
        batch.step_seqs = (double)t->rows;
        ESPI_TRY(accumulate(t, &batch));
    }
    for (int64_t i = 0; i < t->rows; i++) {
        const espi_sequence *s = &t->sequences[i];
        if (!s->skip) continue;
        t->sums.tokens_skipped += s->n_completion;
        /* Its entropies are not known without the forward: what was sampled stands in for them, -log p. */
        for (int32_t k = 0; k < s->n_completion; k++) t->sums.entropy -= s->sampler_logprob[k];
    }
    ESPI_TRY(esp_optim_step(t->optim));
    esp_optim_stats stats = ESP_OPTIM_STATS_INIT;
    ESPI_TRY(esp_optim_stats_get(t->optim, &stats));
    t->sums.grad_norm = stats.grad_norm;
    t->sums.lr = stats.lr;
    return ESP_OK;
}
