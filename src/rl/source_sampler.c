/* Our own sampler as a source of rollouts. */
#include "models/model.h"
#include "rl/run.h"

#include <stdlib.h>
#include <string.h>

/* What the sampler writes: rows of max_new_tokens. */
typedef struct drawn {
    int32_t *tokens, *lengths;
    float *logprobs;
    uint8_t *stopped;
} drawn;

static esp_status draw(drawn *d, esp_sampler *sampler, const espi_rollout_request *q) {
    const int64_t rows = (int64_t)q->n_prompts * q->samples, cells = rows * q->max_new_tokens;
    ESPI_TRY(espi_take_array(&d->tokens, cells, sizeof *d->tokens));
    ESPI_TRY(espi_take_array(&d->lengths, rows, sizeof *d->lengths));
    ESPI_TRY(espi_take_array(&d->logprobs, cells, sizeof *d->logprobs));
    ESPI_TRY(espi_take_array(&d->stopped, rows, sizeof *d->stopped));
    const esp_generate_config c = ESP_GENERATE_CONFIG(.prompts = q->prompts, .cu_prompts = q->cu_prompts, .n_prompts = q->n_prompts,
                                                      .samples = q->samples, .max_new_tokens = q->max_new_tokens,
                                                      .temperature = q->temperature, .seed = q->seed, .step = q->step, .keys = q->keys);
    return esp_sampler_generate(sampler, &c, d->tokens, d->logprobs, d->lengths, d->stopped);
}

static esp_status pack(espi_rollouts *r, const drawn *d, const espi_rollout_request *q) {
    espi_rollouts_shape shape = {.rows = (int64_t)q->n_prompts * q->samples, .group_size = q->samples};
    for (int64_t i = 0; i < shape.rows; i++) {
        const int64_t p = i / q->samples;
        shape.tokens += q->cu_prompts[p + 1] - q->cu_prompts[p] + d->lengths[i];
    }
    ESPI_TRY(espi_rollouts_create(r, &shape));
    for (int64_t i = 0; i < shape.rows; i++) {
        const int64_t p = i / q->samples, first = r->offsets[i], cell = i * q->max_new_tokens;
        const int32_t n_prompt = q->cu_prompts[p + 1] - q->cu_prompts[p], n = d->lengths[i];
        const int64_t answer = first + n_prompt;
        memcpy(r->tokens + first, q->prompts + q->cu_prompts[p], (size_t)n_prompt * sizeof *r->tokens);
        memcpy(r->tokens + answer, d->tokens + cell, (size_t)n * sizeof *r->tokens);
        memcpy(r->sampler_logprob + answer, d->logprobs + cell, (size_t)n * sizeof *r->sampler_logprob);
        memset(r->loss_mask + answer, 1, (size_t)n);
        r->n_prompt[i] = n_prompt;
        r->finish[i] = d->stopped[i] ? ESPI_FINISH_STOP : ESPI_FINISH_LENGTH;
        r->group[i] = q->group_ids[p];
        r->version[i] = q->version;
        r->offsets[i + 1] = answer + n;
    }
    return ESP_OK;
}

static esp_status generate(void *self, espi_rollouts *r, const espi_rollout_request *request) {
    drawn d = {0};
    esp_status status = draw(&d, self, request);
    if (status == ESP_OK) status = pack(r, &d, request);
    free(d.tokens);
    free(d.lengths);
    free(d.logprobs);
    free(d.stopped);
    return status;
}

void espi_sampler_source(espi_rollout_source *source, esp_sampler *sampler, const esp_model *model) {
    /* On a CPU decoding and training make every sum in the same order; a device's kernels need not. */
    *source = (espi_rollout_source){.name = "sampler", .self = sampler, .exact = !model->ctx->device_ops, .generate = generate};
}
