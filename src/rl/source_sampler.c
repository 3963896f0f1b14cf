/* Our own sampler as a source of rollouts: with the experts that every token was sent to, and with the ids that filters had left. */
#include "rl/run.h"
#include "rl/sampler.h"

#include <stdlib.h>
#include <string.h>

/* What the sampler writes and tells: rows of max_new_tokens, until their lengths are known. */
typedef struct drawn {
    const espi_rollout_request *q;
    int32_t *tokens, *lengths;
    float *logprobs;
    uint8_t *stopped;
    size_t routed; /* bytes of one token's routes */
    uint8_t *prompt_routes,
        *answer_routes; /* [all prompt tokens], [rows, max_new_tokens]: of the tokens that were fed; NULL: not asked for */
    bool filtered;
    int64_t *kept_at; /* [rows, max_new_tokens] where a token's kept ids begin */
    int32_t *n_kept;  /* [rows, max_new_tokens] */
    int32_t *kept;
    int64_t kept_used, kept_capacity;
} drawn;

static void drop(drawn *d) {
    void *const arrays[] = {d->tokens,        d->lengths, d->logprobs, d->stopped, d->prompt_routes,
                            d->answer_routes, d->kept_at, d->n_kept,   d->kept};
    for (int i = 0; i < ESPI_COUNT(arrays); i++) free(arrays[i]);
}

static bool keep_ids(drawn *d, int64_t cell, const esp_drawn *one) {
    if (d->kept_used + one->n_kept > d->kept_capacity) {
        const int64_t capacity = 2 * (d->kept_used + one->n_kept);
        int32_t *grown = realloc(d->kept, (size_t)capacity * sizeof *grown);
        if (!grown) return false;
        d->kept = grown;
        d->kept_capacity = capacity;
    }
    d->kept_at[cell] = d->kept_used;
    d->n_kept[cell] = one->n_kept;
    if (one->n_kept > 0) memcpy(d->kept + d->kept_used, one->kept, (size_t)one->n_kept * sizeof *d->kept);
    d->kept_used += one->n_kept;
    return true;
}

/* Before token 0 the prompt was fed, and told of with sample 0; before any other the token drawn last. */
static int take(void *user, const esp_drawn *one) {
    drawn *d = user;
    const int64_t cell = (int64_t)one->row * d->q->max_new_tokens + one->index;
    if (d->prompt_routes && one->n_routed > 0) {
        uint8_t *to = one->index > 0 ? d->answer_routes + (size_t)(cell - 1) * d->routed
                                     : d->prompt_routes + (size_t)d->q->cu_prompts[one->row / d->q->samples] * d->routed;
        memcpy(to, one->routed_experts, (size_t)one->n_routed * d->routed);
    }
    return d->filtered && !keep_ids(d, cell, one);
}

static esp_status take_room(drawn *d, const espi_config *c) {
    const espi_rollout_request *q = d->q;
    const int64_t rows = (int64_t)q->n_prompts * q->samples, cells = rows * q->max_new_tokens;
    ESPI_TRY(espi_take_array(&d->tokens, cells, sizeof *d->tokens));
    ESPI_TRY(espi_take_array(&d->lengths, rows, sizeof *d->lengths));
    ESPI_TRY(espi_take_array(&d->logprobs, cells, sizeof *d->logprobs));
    ESPI_TRY(espi_take_array(&d->stopped, rows, sizeof *d->stopped));
    if (q->routes) {
        d->routed = (size_t)(c->layers * c->top_k) * (size_t)espi_route_bytes(c);
        ESPI_TRY(espi_take_array(&d->prompt_routes, q->cu_prompts[q->n_prompts], d->routed));
        ESPI_TRY(espi_take_array(&d->answer_routes, cells, d->routed));
    }
    d->filtered = q->top_k > 0 || (q->top_p > 0 && q->top_p < 1) || q->min_p > 0;
    if (!d->filtered) return ESP_OK;
    ESPI_TRY(espi_take_array(&d->kept_at, cells, sizeof *d->kept_at));
    return espi_take_array(&d->n_kept, cells, sizeof *d->n_kept);
}

static esp_status draw(drawn *d, esp_sampler *sampler) {
    const espi_rollout_request *q = d->q;
    const esp_generate_config c =
        ESP_GENERATE_CONFIG(.prompts = q->prompts, .cu_prompts = q->cu_prompts, .n_prompts = q->n_prompts, .samples = q->samples,
                            .max_new_tokens = q->max_new_tokens, .temperature = q->temperature, .top_k = q->top_k, .top_p = q->top_p,
                            .min_p = q->min_p, .seed = q->seed, .step = q->step, .keys = q->keys,
                            .on_drawn = d->filtered || q->routes ? take : NULL, .on_drawn_user = d);
    return esp_sampler_generate(sampler, &c, d->tokens, d->logprobs, d->lengths, d->stopped);
}

static espi_rollouts_shape shape_of(const drawn *d, const espi_config *c) {
    const espi_rollout_request *q = d->q;
    espi_rollouts_shape shape = {.rows = (int64_t)q->n_prompts * q->samples, .group_size = q->samples, .kept = d->kept_used};
    for (int64_t i = 0; i < shape.rows; i++) {
        const int64_t p = i / q->samples;
        shape.tokens += q->cu_prompts[p + 1] - q->cu_prompts[p] + d->lengths[i];
    }
    shape.filtered = d->filtered;
    if (!q->routes) return shape;
    shape.layers = c->layers;
    shape.top_k = c->top_k;
    shape.route_bytes = espi_route_bytes(c);
    return shape;
}

/* The kept ids of a row, its prompt's tokens having none. */
static void pack_kept(espi_rollouts *r, const drawn *d, int64_t row, int64_t *used) {
    const int64_t first = r->offsets[row], answer = first + r->n_prompt[row], cell = row * d->q->max_new_tokens;
    for (int64_t t = first; t < answer; t++) r->kept_offsets[t + 1] = *used;
    for (int32_t k = 0; k < d->lengths[row]; k++) {
        const int32_t n = d->n_kept[cell + k]; /* 0: the filter is none on this vocabulary */
        if (n > 0) memcpy(r->kept_ids + *used, d->kept + d->kept_at[cell + k], (size_t)n * sizeof *r->kept_ids);
        *used += n;
        r->kept_offsets[answer + k + 1] = *used;
    }
}

static esp_status pack(espi_rollouts *r, const drawn *d, const espi_config *c) {
    const espi_rollout_request *q = d->q;
    const espi_rollouts_shape shape = shape_of(d, c);
    int64_t kept = 0;
    ESPI_TRY(espi_rollouts_create(r, &shape));
    for (int64_t i = 0; i < shape.rows; i++) {
        const int64_t p = i / q->samples, first = r->offsets[i], cell = i * q->max_new_tokens;
        const int32_t n_prompt = q->cu_prompts[p + 1] - q->cu_prompts[p], n = d->lengths[i];
        const int64_t answer = first + n_prompt;
        memcpy(r->tokens + first, q->prompts + q->cu_prompts[p], (size_t)n_prompt * sizeof *r->tokens);
        memcpy(r->tokens + answer, d->tokens + cell, (size_t)n * sizeof *r->tokens);
        memcpy(r->sampler_logprob + answer, d->logprobs + cell, (size_t)n * sizeof *r->sampler_logprob);
        memset(r->loss_mask + answer, 1, (size_t)n);
        if (q->routes) { /* the last token was never fed */
            memcpy(r->routes + (size_t)first * d->routed, d->prompt_routes + (size_t)q->cu_prompts[p] * d->routed,
                   (size_t)n_prompt * d->routed);
            memcpy(r->routes + (size_t)answer * d->routed, d->answer_routes + (size_t)cell * d->routed, (size_t)(n - 1) * d->routed);
        }
        r->n_prompt[i] = n_prompt;
        r->finish[i] = d->stopped[i] ? ESPI_FINISH_STOP : ESPI_FINISH_LENGTH;
        r->group[i] = q->group_ids[p];
        r->version[i] = q->version;
        r->offsets[i + 1] = answer + n;
        if (d->filtered) pack_kept(r, d, i, &kept);
    }
    return ESP_OK;
}

static esp_status generate(void *self, espi_rollouts *r, const espi_rollout_request *request) {
    esp_sampler *sampler = self;
    const espi_config *c = &sampler->model->config;
    drawn d = {.q = request};
    esp_status status = take_room(&d, c);
    if (status == ESP_OK) status = draw(&d, sampler);
    if (status == ESP_OK) status = pack(r, &d, c);
    drop(&d);
    return status;
}

void espi_sampler_source(espi_rollout_source *source, esp_sampler *sampler, const esp_model *model) {
    /* On a CPU decoding and training make every sum in the same order; a device's kernels need not. */
    *source =
        (espi_rollout_source){.name = "sampler", .self = sampler, .exact = !model->ctx->device_ops, .routes = true, .generate = generate};
}
