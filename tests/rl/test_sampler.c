/* The sampler: its log-probabilities are the trainer's to the bit, and neither batch nor waves show in what it draws. */
#include "demo.h"
#include "models/model.h"

#include <math.h>

enum { PROMPTS = 5, SAMPLES = 6, NEW = 10, ROWS = PROMPTS * SAMPLES };

static const int32_t prompt_ids[] = {1,  42, 27, 25, 26, 24, 5,  1,  42, 31, 24, 5, 1,  42, 24, 25, 26, 27,
                                     28, 29, 30, 5,  1,  42, 25, 25, 31, 28, 5,  1, 42, 30, 29, 28, 27, 5};
static const int32_t prompt_cu[PROMPTS + 1] = {0, 7, 12, 22, 29, 36};

typedef struct drawn {
    int32_t tokens[ROWS * NEW], lengths[ROWS];
    float lp[ROWS * NEW];
    uint8_t stopped[ROWS];
} drawn;

static void draw(drawn *out, esp_model *model, int32_t max_sequences, const esp_generate_config *config) {
    esp_sampler *s;
    memset(out, 0, sizeof *out);
    OK(esp_sampler_create(&s, model, &ESP_SAMPLER_CONFIG(.max_sequences = max_sequences, .max_length = 24)));
    OK(esp_sampler_generate(s, config, out->tokens, out->lp, out->lengths, out->stopped));
    esp_sampler_destroy(s);
}

static esp_generate_config request(float temperature) {
    return ESP_GENERATE_CONFIG(.prompts = prompt_ids, .cu_prompts = prompt_cu, .n_prompts = PROMPTS, .samples = SAMPLES,
                               .max_new_tokens = NEW, .temperature = temperature, .seed = 7, .step = 3);
}

/* Prompt and completion of row r as one sequence. */
static int32_t sequence(int32_t *ids, const drawn *d, int32_t r) {
    const int32_t p = r / SAMPLES, n = prompt_cu[p + 1] - prompt_cu[p];
    memcpy(ids, prompt_ids + prompt_cu[p], (size_t)n * sizeof *ids);
    memcpy(ids + n, d->tokens + r * NEW, (size_t)d->lengths[r] * sizeof *ids);
    return n;
}

static void compare_with_model(float temperature) {
    demo m = demo_model(1, true);
    drawn d;
    const esp_generate_config c = request(temperature);
    draw(&d, m.model, 0, &c);
    int32_t ids[ROWS * 24], cu[ROWS + 1] = {0}, starts[ROWS];
    float lp[ROWS * 24];
    for (int32_t r = 0; r < ROWS; r++) {
        starts[r] = cu[r] + sequence(ids + cu[r], &d, r);
        cu[r + 1] = starts[r] + d.lengths[r];
    }
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = cu[ROWS], .n_seqs = ROWS);
    esp_tensor hidden;
    OK(esp_model_forward(m.model, &batch, &hidden));
    OK(esp_model_logprob(m.model, &batch, &hidden, temperature, lp, NULL));
    int stopped = 0;
    for (int32_t r = 0; r < ROWS; r++) {
        for (int32_t k = 0; k < d.lengths[r]; k++)
            cr_assert_eq(memcmp(&lp[starts[r] + k], &d.lp[r * NEW + k], sizeof(float)), 0, "row %d token %d: model %.9g, sampler %.9g", r,
                         k, (double)lp[starts[r] + k], (double)d.lp[r * NEW + k]);
        cr_assert_eq(d.stopped[r], d.tokens[r * NEW + d.lengths[r] - 1] == 2);
        cr_assert(d.stopped[r] || d.lengths[r] == NEW);
        stopped += d.stopped[r];
    }
    cr_assert_gt(stopped, ROWS / 2);
    demo_free(&m);
}

Test(sampler, logprobs_are_the_trainers_bits) {
    compare_with_model(1.0f);
}

Test(sampler, logprobs_are_the_trainers_bits_at_another_temperature) {
    compare_with_model(0.7f);
}

Test(sampler, batch_and_waves_do_not_show) {
    demo m = demo_model(1, true);
    static drawn whole, waves, alone;
    const uint32_t keys[PROMPTS] = {10, 11, 12, 13, 14};
    esp_generate_config c = request(1);
    c.keys = keys;
    draw(&whole, m.model, 0, &c);
    const int32_t sizes[] = {1, 4, 7, ROWS};
    for (int i = 0; i < 4; i++) {
        draw(&waves, m.model, sizes[i], &c);
        cr_assert_eq(memcmp(&whole, &waves, sizeof whole), 0, "waves of %d", sizes[i]);
    }
    for (int32_t p = 0; p < PROMPTS; p++) {
        esp_generate_config one = c;
        const int32_t cu[2] = {0, prompt_cu[p + 1] - prompt_cu[p]};
        one.prompts = prompt_ids + prompt_cu[p];
        one.cu_prompts = cu;
        one.n_prompts = 1;
        one.keys = keys + p;
        draw(&alone, m.model, 0, &one);
        const size_t first = (size_t)p * SAMPLES * NEW;
        cr_assert_eq(memcmp(whole.tokens + first, alone.tokens, SAMPLES * NEW * sizeof(int32_t)), 0, "prompt %d", p);
        cr_assert_eq(memcmp(whole.lp + first, alone.lp, SAMPLES * NEW * sizeof(float)), 0, "prompt %d", p);
    }
    demo_free(&m);
}

Test(sampler, seed_step_and_stream_change_the_draws) {
    demo m = demo_model(1, false);
    static drawn a, b;
    const esp_generate_config c = request(1);
    draw(&a, m.model, 0, &c);
    for (int i = 0; i < 3; i++) {
        esp_generate_config other = c;
        other.seed += i == 0;
        other.step += i == 1;
        other.evaluation = i == 2;
        draw(&b, m.model, 0, &other);
        cr_assert_neq(memcmp(a.tokens, b.tokens, sizeof a.tokens), 0, "change %d", i);
    }
    demo_free(&m);
}

Test(sampler, greedy_takes_the_largest_logit) {
    demo m = demo_model(1, false);
    drawn d;
    esp_generate_config c = request(0);
    c.samples = 1;
    c.greedy = true;
    draw(&d, m.model, 0, &c);
    for (int32_t p = 0; p < PROMPTS; p++) {
        int32_t ids[24], cu[2] = {0, 0};
        static float logits[24 * 64];
        const int32_t n = prompt_cu[p + 1] - prompt_cu[p];
        memcpy(ids, prompt_ids + prompt_cu[p], (size_t)n * sizeof *ids);
        memcpy(ids + n, d.tokens + p * NEW, (size_t)d.lengths[p] * sizeof *ids);
        cu[1] = n + d.lengths[p];
        const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = cu[1], .n_seqs = 1);
        esp_tensor hidden;
        OK(esp_model_forward_only(m.model, &batch, &hidden));
        OK(esp_model_logits(m.model, &hidden, logits, (size_t)cu[1] * 64));
        for (int32_t k = 0; k < d.lengths[p]; k++) {
            const float *z = logits + (n + k - 1) * 64;
            int best = 0;
            for (int v = 1; v < 64; v++)
                if (z[v] > z[best]) best = v;
            cr_assert_eq(d.tokens[p * NEW + k], best, "prompt %d token %d", p, k);
        }
    }
    demo_free(&m);
}

Test(sampler, stop_ids_of_the_caller) {
    demo m = demo_model(1, false);
    drawn d;
    const int32_t stops[] = {24, 25, 26, 27};
    esp_generate_config c = request(1);
    c.stop_ids = stops;
    c.n_stop_ids = 4;
    draw(&d, m.model, 0, &c);
    for (int32_t r = 0; r < ROWS; r++)
        for (int32_t k = 0; k < d.lengths[r]; k++) {
            const int32_t id = d.tokens[r * NEW + k];
            cr_assert_eq(id >= 24 && id <= 27, d.stopped[r] && k == d.lengths[r] - 1, "row %d token %d", r, k);
        }
    demo_free(&m);
}

Test(sampler, plan_is_what_is_taken) {
    demo m = demo_model(1, false);
    const int32_t sizes[][2] = {{128, 19}, {3, 40}, {1, 512}, {0, 64}};
    for (int i = 0; i < 4; i++) {
        const esp_sampler_config c = ESP_SAMPLER_CONFIG(.max_sequences = sizes[i][0], .max_length = sizes[i][1]);
        esp_memory memory = ESP_MEMORY_INIT;
        size_t planned;
        esp_sampler *s;
        OK(esp_sampler_plan(m.model, &c, &planned));
        OK(esp_sampler_create(&s, m.model, &c));
        OK(esp_ctx_memory(m.ctx, &memory));
        cr_assert_eq(memory.cache, planned);
        esp_sampler_destroy(s);
    }
    demo_free(&m);
}

Test(sampler, wrong_calls) {
    demo m = demo_model(1, false);
    static drawn d;
    esp_sampler *s;
    OK(esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_sequences = 4, .max_length = 20)));
    const int32_t empty[] = {0, 3, 3}, lying[] = {1, 64, 5};
    esp_generate_config c = request(1);
    c.cu_prompts = empty;
    c.n_prompts = 2;
    FAILS(ESP_ERR_ARG, "prompt 1: got 0 tokens", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    c.n_prompts = 1;
    c.prompts = lying;
    FAILS(ESP_ERR_ARG, "got id 64", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    c.cu_prompts = (const int32_t[]){1, 3};
    FAILS(ESP_ERR_ARG, "cu_prompts[0]: got 1", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    c = request(1);
    c.max_new_tokens = 11;
    FAILS(ESP_ERR_ARG, "prompt 2: got 10 tokens", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    c = request(-1);
    FAILS(ESP_ERR_ARG, "set greedy", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    c = request(NAN);
    FAILS(ESP_ERR_ARG, "temperature nan", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    FAILS(ESP_ERR_ARG, "context", esp_sampler_create(&(esp_sampler *){NULL}, m.model, &ESP_SAMPLER_CONFIG(.max_length = 4096)));
    c = request(1);
    c.n_prompts = 0;
    OK(esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    esp_sampler_destroy(s);
    demo_free(&m);
}

typedef struct heard {
    int32_t tokens[ROWS * NEW], lengths[ROWS];
    float lp[ROWS * NEW];
    int calls, fail_at;
} heard;

static int listen(void *user, int32_t row, int32_t index, int32_t id, float logprob) {
    heard *h = user;
    if (++h->calls == h->fail_at) return 7;
    if (index != h->lengths[row]++) return 1; /* in order within a row */
    h->tokens[row * NEW + index] = id;
    h->lp[row * NEW + index] = logprob;
    return 0;
}

/* A caller hears every token once, in order, and can end the call. */
/* Weights that have gone bad: an error, not a token; and a pass that failed half-way takes no memory from the next. */
Test(sampler, bad_weights) {
    demo m = demo_model(1, false);
    static drawn d;
    esp_sampler *s;
    OK(esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_sequences = 4, .max_length = 20)));
    const esp_generate_config c = request(1);
    float *inner = (float *)m.model->layers[1].norm2, *last = (float *)m.model->final_norm;
    const float kept_inner = inner[0], kept_last = last[0];
    for (int i = 0; i < 20; i++) {
        inner[0] = NAN;
        FAILS(ESP_ERR_NONFINITE, "", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
        inner[0] = kept_inner;
    }
    last[0] = NAN; /* behind the last router */
    FAILS(ESP_ERR_NONFINITE, "log-probability", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    last[0] = kept_last;
    OK(esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    esp_sampler_destroy(s);
    demo_free(&m);
}

Test(sampler, tokens_are_told_as_they_are_drawn) {
    demo m = demo_model(1, true);
    static drawn d;
    static heard h;
    esp_generate_config c = request(1);
    c.on_token = listen;
    c.on_token_user = &h;
    draw(&d, m.model, 7, &c);
    cr_assert_eq(memcmp(h.tokens, d.tokens, sizeof d.tokens), 0);
    cr_assert_eq(memcmp(h.lp, d.lp, sizeof d.lp), 0);
    cr_assert_eq(memcmp(h.lengths, d.lengths, sizeof d.lengths), 0);
    h = (heard){.fail_at = 3};
    esp_sampler *s;
    OK(esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_length = 24)));
    FAILS(ESP_ERR_CALLBACK, "on_token returned 7", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    cr_assert_eq(h.calls, 3);
    esp_sampler_destroy(s);
    demo_free(&m);
}

/* A token that the model does not take (here the end token, for the sake of the test) cuts its row before it; as the first it is a failure.
 */
Test(sampler, refused_tokens_cut_a_row) {
    demo m = demo_model(1, false);
    static drawn d;
    esp_generate_config c = request(1);
    const int32_t never = 63, answered[] = {1, 42, 24, 25, 31, 5, 24, 25, 31}, cu[2] = {0, 9};
    int cut = 0;
    m.model->config.refused[0] = 2;
    m.model->config.n_refused = 1;
    draw(&d, m.model, 0, &c);
    for (int r = 0; r < ROWS; r++) {
        cut += d.lengths[r] < NEW;
        cr_assert(!d.stopped[r] && d.lengths[r] > 0);
        for (int k = 0; k < d.lengths[r]; k++) cr_assert_neq(d.tokens[r * NEW + k], 2);
    }
    cr_assert_gt(cut, ROWS / 2);
    c.prompts = answered;
    c.cu_prompts = cu;
    c.n_prompts = 1;
    c.greedy = true;
    c.stop_ids = &never;
    c.n_stop_ids = 1;
    esp_sampler *s;
    OK(esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_length = 24)));
    FAILS(ESP_ERR_UNSUPPORTED, "first token is 2", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    esp_sampler_destroy(s);
    demo_free(&m);
}
