/* The sampler: its log-probabilities are the trainer's to the bit, and neither batch nor waves show in what it draws. */
#include "demo.h"
#include "models/model.h"
#include "rl/sampler.h"

#include <criterion/parameterized.h>

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

/* A caller hears every token once, in order, and can end the call. */
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

/* ---- what training wants to know ---- */

enum { LAYERS = 3, TOP_K = 2, WIDTH = LAYERS * TOP_K, MOST = 64 };

/* All that on_drawn told, each row's routes one after the other. */
typedef struct noted {
    uint8_t prompt[36 * WIDTH], routes[ROWS * NEW * WIDTH];
    int32_t kept[ROWS * NEW * MOST], n_kept[ROWS * NEW], lengths[ROWS];
    float lp[ROWS * NEW];
    bool last[ROWS], stopped[ROWS], wrong;
} noted;

static int note(void *user, const esp_drawn *d) {
    noted *n = user;
    const int32_t cell = d->row * NEW + d->index, p = d->row / SAMPLES, length = prompt_cu[p + 1] - prompt_cu[p];
    const int32_t fed = d->index > 0 ? 1 : d->row % SAMPLES == 0 ? length : 0;
    n->wrong = n->wrong || d->index != n->lengths[d->row]++ || n->last[d->row] || (d->routed_experts && d->n_routed != fed);
    n->lp[cell] = d->logprob;
    n->last[d->row] = d->last;
    n->stopped[d->row] = d->stopped;
    n->n_kept[cell] = d->n_kept;
    if (d->n_kept > 0) memcpy(n->kept + cell * MOST, d->kept, (size_t)d->n_kept * sizeof *d->kept);
    if (d->routed_experts && d->index == 0) memcpy(n->prompt + prompt_cu[p] * WIDTH, d->routed_experts, (size_t)(d->n_routed * WIDTH));
    if (d->routed_experts && d->index > 0) memcpy(n->routes + (cell - 1) * WIDTH, d->routed_experts, WIDTH);
    return 0;
}

static void draw_noted(drawn *out, noted *n, esp_model *model, int32_t max_sequences, bool routes, const esp_generate_config *config) {
    esp_sampler *s;
    esp_generate_config c = *config;
    memset(out, 0, sizeof *out);
    memset(n, 0, sizeof *n);
    c.on_drawn = note;
    c.on_drawn_user = n;
    OK(esp_sampler_create(
        &s, model, &ESP_SAMPLER_CONFIG(.max_sequences = max_sequences, .max_length = 24, .max_kept = MOST, .record_routes = routes)));
    OK(esp_sampler_generate(s, &c, out->tokens, out->lp, out->lengths, out->stopped));
    esp_sampler_destroy(s);
    cr_assert(!n->wrong);
    cr_assert_eq(memcmp(n->lp, out->lp, sizeof n->lp), 0);
    cr_assert_eq(memcmp(n->lengths, out->lengths, sizeof n->lengths), 0);
    for (int32_t r = 0; r < ROWS; r++) cr_assert(n->last[r] && n->stopped[r] == (out->stopped[r] != 0));
}

/* The rows as a batch of training, prompts repeated or shared. */
typedef struct training {
    int32_t ids[ROWS * 24], cu[ROWS + PROMPTS + 1], prefix_of[ROWS + PROMPTS], starts[ROWS], kept[ROWS * NEW * MOST];
    int64_t kept_offsets[ROWS * 24 + 1];
    uint8_t routes[ROWS * 24 * WIDTH];
    float lp[ROWS * 24];
    esp_batch batch;
} training;

static void add_tokens(training *t, const int32_t *ids, int32_t n, const uint8_t *routes, int32_t n_routed) {
    const int64_t at = t->batch.n_tokens;
    memcpy(t->ids + at, ids, (size_t)n * sizeof *ids);
    memset(t->routes + at * WIDTH, 255, (size_t)(n * WIDTH));
    memcpy(t->routes + at * WIDTH, routes, (size_t)(n_routed * WIDTH));
    for (int32_t k = 0; k < n; k++) t->kept_offsets[at + k + 1] = t->batch.n_kept;
    t->batch.n_tokens = at + n;
}

static void end_sequence(training *t, int32_t prefix) {
    t->prefix_of[t->batch.n_seqs] = prefix;
    t->cu[++t->batch.n_seqs] = (int32_t)t->batch.n_tokens;
}

static void make_training(training *t, const drawn *d, const noted *n, bool shared) {
    memset(t, 0, sizeof *t);
    t->batch = ESP_BATCH(.tokens = t->ids, .cu_seqlens = t->cu, .prefix_of = shared ? t->prefix_of : NULL, .kept_ids = t->kept,
                         .kept_offsets = t->kept_offsets, .routed_experts = t->routes, .routed_bytes = 1);
    int32_t prefix = -1;
    for (int32_t r = 0, begin = 0; r < ROWS; r++) {
        const int32_t p = r / SAMPLES, length = prompt_cu[p + 1] - prompt_cu[p];
        if (!shared || r % SAMPLES == 0) {
            add_tokens(t, prompt_ids + prompt_cu[p], length, n->prompt + prompt_cu[p] * WIDTH, length);
            if (shared) {
                prefix = t->batch.n_seqs;
                end_sequence(t, -1);
            }
        }
        t->starts[r] = begin = (int32_t)t->batch.n_tokens;
        add_tokens(t, d->tokens + r * NEW, d->lengths[r], n->routes + r * NEW * WIDTH, d->lengths[r] - 1);
        for (int32_t k = 0; k < d->lengths[r]; k++) {
            const int32_t cell = r * NEW + k;
            if (n->n_kept[cell] > 0) memcpy(t->kept + t->batch.n_kept, n->kept + cell * MOST, (size_t)n->n_kept[cell] * sizeof *t->kept);
            t->batch.n_kept += n->n_kept[cell];
            t->kept_offsets[begin + k + 1] = t->batch.n_kept;
        }
        end_sequence(t, shared ? prefix : -1);
    }
    t->batch.n_routed = t->batch.n_tokens * WIDTH;
    if (t->batch.n_kept == 0) t->batch.kept_offsets = NULL;
}

static void same_logprobs(esp_model *model, training *t, const drawn *d, float temperature) {
    esp_tensor hidden;
    OK(esp_model_forward(model, &t->batch, &hidden));
    OK(esp_model_logprob(model, &t->batch, &hidden, temperature, t->lp, NULL));
    for (int32_t r = 0; r < ROWS; r++)
        cr_assert_eq(memcmp(t->lp + t->starts[r], d->lp + r * NEW, (size_t)d->lengths[r] * sizeof(float)), 0, "row %d", r);
}

/* Replayed in training: no flip, and the same bits, with repeated prompts and with shared ones. */
Test(sampler, recorded_routes_are_the_trainers) {
    demo m = demo_model(1, true);
    static drawn d, other;
    static noted n, again;
    static training t;
    const esp_generate_config c = request(1);
    draw_noted(&d, &n, m.model, 0, true, &c);
    for (int shared = 0; shared < 2; shared++) {
        make_training(&t, &d, &n, shared);
        same_logprobs(m.model, &t, &d, 1);
        int64_t flips, replayed, expected = 0;
        OK(esp_model_route_flips(m.model, &flips, &replayed));
        for (int32_t s = 0; s < t.batch.n_seqs; s++) {
            bool prompt = false;
            for (int32_t u = s + 1; shared && u < t.batch.n_seqs; u++) prompt = prompt || t.prefix_of[u] == s;
            expected += t.cu[s + 1] - t.cu[s] - !prompt;
        }
        cr_assert_eq(flips, 0);
        cr_assert_eq(replayed, expected * LAYERS);
    }
    draw_noted(&other, &again, m.model, 7, true, &c); /* few places: samples of a prompt begin apart */
    cr_assert_eq(memcmp(&d, &other, sizeof d), 0);
    cr_assert_eq(memcmp(&n, &again, sizeof n), 0);
    t.routes[2 * WIDTH] ^= 1; /* the test can fail: another expert is another log-probability */
    if (t.routes[2 * WIDTH] == t.routes[2 * WIDTH + 1]) t.routes[2 * WIDTH] ^= 2;
    esp_tensor hidden;
    OK(esp_model_forward(m.model, &t.batch, &hidden));
    OK(esp_model_logprob(m.model, &t.batch, &hidden, 1, t.lp, NULL));
    cr_assert_neq(memcmp(t.lp + t.starts[0], d.lp, (size_t)d.lengths[0] * sizeof(float)), 0);
    demo_free(&m);
}

/* One that can record, and is not asked to, needs no more: all prompts fill a pass to the last token. */
Test(sampler, recording_is_planned_for_both) {
    demo m = demo_model(1, true);
    esp_sampler *s;
    drawn d;
    esp_generate_config c = request(1);
    c.samples = 1;
    OK(esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_sequences = 12, .max_length = 24, .record_routes = true)));
    cr_assert_eq(s->pass_tokens, prompt_cu[PROMPTS]);
    OK(esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    esp_sampler_destroy(s);
    demo_free(&m);
}

static const struct {
    int32_t top_k;
    float top_p, min_p;
} filters[] = {{5, 0, 0}, {0, 0.7f, 0}, {0, 0, 0.2f}, {20, 0.9f, 0.05f}, {1, 0, 0}, {0, 1, 0}, {64, 0, 0}};
enum { FILTERS = sizeof filters / sizeof filters[0] };

/* What must be left of these logits, in double, by sorting. */
static int32_t left_of(int32_t *ids, const float *z, int32_t vocab, float temperature, int f) {
    double p[MOST], sum = 0, reached = 0;
    bool in[MOST] = {false};
    int32_t n = 0, order[MOST];
    for (int32_t i = 0; i < vocab; i++) order[i] = i;
    for (int32_t i = 0; i < vocab; i++)
        for (int32_t j = i + 1; j < vocab; j++)
            if (z[order[j]] > z[order[i]] || (z[order[j]] == z[order[i]] && order[j] < order[i])) {
                const int32_t keep = order[i];
                order[i] = order[j];
                order[j] = keep;
            }
    const int32_t most = filters[f].top_k > 0 && filters[f].top_k < vocab ? filters[f].top_k : vocab;
    for (int32_t i = 0; i < most; i++) sum += p[i] = exp(((double)z[order[i]] - (double)z[order[0]]) / (double)temperature);
    for (int32_t i = 0; i < most; i++) {
        const bool enough = filters[f].top_p > 0 && filters[f].top_p < 1 && reached >= (double)filters[f].top_p * sum;
        if (!enough && p[i] >= (double)filters[f].min_p) in[order[i]] = true;
        reached += p[i];
    }
    for (int32_t v = 0; v < vocab; v++)
        if (in[v]) ids[n++] = v;
    return n;
}

ParameterizedTestParameters(sampler, filters) {
    static int index[FILTERS];
    for (int i = 0; i < FILTERS; i++) index[i] = i;
    return cr_make_param_array(int, index, FILTERS);
}

/* The kept ids are those of the definition, the token is among them, and training on them sees the sampler's log-probabilities to the bit. */
ParameterizedTest(int *f, sampler, filters) {
    demo m = demo_model(1, true);
    static drawn d, few;
    static noted n, n_few;
    static training t;
    static float logits[ROWS * 24 * MOST];
    const float temperature = 1.3f;
    esp_generate_config c = request(temperature);
    c.top_k = filters[*f].top_k;
    c.top_p = filters[*f].top_p;
    c.min_p = filters[*f].min_p;
    draw_noted(&d, &n, m.model, 0, true, &c);
    draw_noted(&few, &n_few, m.model, 4, true, &c);
    cr_assert_eq(memcmp(&d, &few, sizeof d), 0, "the batch shows");
    cr_assert_eq(memcmp(&n, &n_few, sizeof n), 0, "the batch shows");
    make_training(&t, &d, &n, false);
    same_logprobs(m.model, &t, &d, temperature);
    esp_tensor hidden;
    OK(esp_model_forward(m.model, &t.batch, &hidden));
    OK(esp_model_logits(m.model, &hidden, logits, (size_t)t.batch.n_tokens * MOST));
    int64_t narrowed = 0;
    for (int32_t r = 0; r < ROWS; r++)
        for (int32_t k = 0; k < d.lengths[r]; k++) {
            int32_t want[MOST];
            const int32_t cell = r * NEW + k, count = left_of(want, logits + (t.starts[r] + k - 1) * MOST, MOST, temperature, *f);
            if (*f >= 5) { /* no filter at all */
                cr_assert_eq(n.n_kept[cell], 0);
                continue;
            }
            cr_assert_eq(n.n_kept[cell], count, "row %d token %d", r, k);
            cr_assert_eq(memcmp(n.kept + cell * MOST, want, (size_t)count * sizeof *want), 0, "row %d token %d", r, k);
            narrowed += count < MOST;
        }
    cr_assert(*f >= 5 || narrowed > ROWS);
    if (*f == 4)
        for (int32_t r = 0; r < ROWS; r++)
            for (int32_t k = 0; k < d.lengths[r]; k++) cr_assert_eq(d.lp[r * NEW + k], 0, "the only one left is certain");
    demo_free(&m);
}

/* The trainer on filtered rollouts: at the first update the log-probabilities of both sides are the same bits, and no token flips. */
Test(sampler, the_trainer_sees_the_filtered_distribution) {
    demo d = demo_trainer(&ESP_TRAINER_CONFIG(.kind = ESP_TRAIN_GRPO, .train_file = DEMO_PROMPTS, .steps = 2, .seed = 5,
                                              .prompts_per_step = 4, .group_size = 4, .top_k = 12, .top_p = 0.95f));
    esp_memory memory = ESP_MEMORY_INIT;
    cr_assert_eq(d.trainer->most_kept, 12, "room for the kept ids is planned");
    for (int i = 0; i < 2; i++) {
        OK(esp_trainer_step(d.trainer, NULL));
        cr_assert_gt(d.trainer->rollouts.shape.kept, d.trainer->rollouts.shape.tokens / 2);
        cr_assert_eq(d.trainer->sums.diff_max, 0);
        cr_assert_gt(d.trainer->sums.routes_replayed, 0);
        cr_assert_eq(d.trainer->sums.route_flips, 0);
    }
    OK(esp_ctx_memory(d.ctx, &memory));
    cr_assert_eq(memory.peak, d.trainer->planned, "planned %zu, taken %zu", d.trainer->planned, memory.peak);
    demo_free(&d);
}

/* ---- order and memory ---- */

/* The prompts the other way round, each with its key: the same rows. */
Test(sampler, order_does_not_show) {
    demo m = demo_model(1, true);
    static drawn forward, backward;
    int32_t ids[36], cu[PROMPTS + 1] = {0};
    uint32_t keys[PROMPTS] = {0, 1, 2, 3, 4}, reversed[PROMPTS] = {4, 3, 2, 1, 0};
    for (int32_t p = 0; p < PROMPTS; p++) {
        const int32_t from = PROMPTS - 1 - p, n = prompt_cu[from + 1] - prompt_cu[from];
        memcpy(ids + cu[p], prompt_ids + prompt_cu[from], (size_t)n * sizeof *ids);
        cu[p + 1] = cu[p] + n;
    }
    esp_generate_config c = request(1);
    c.keys = keys;
    draw(&forward, m.model, 4, &c);
    c.prompts = ids;
    c.cu_prompts = cu;
    c.keys = reversed;
    draw(&backward, m.model, 9, &c);
    for (int32_t r = 0; r < ROWS; r++) {
        const int32_t other = (PROMPTS - 1 - r / SAMPLES) * SAMPLES + r % SAMPLES;
        cr_assert_eq(forward.lengths[r], backward.lengths[other]);
        cr_assert_eq(memcmp(forward.tokens + r * NEW, backward.tokens + other * NEW, NEW * sizeof(int32_t)), 0, "row %d", r);
        cr_assert_eq(memcmp(forward.lp + r * NEW, backward.lp + other * NEW, NEW * sizeof(float)), 0, "row %d", r);
    }
    demo_free(&m);
}

/* A prompt that is one token, which late samples begin with. */
Test(sampler, prompts_of_one_token) {
    demo m = demo_model(1, true);
    const int32_t ids[] = {1, 42}, cu[] = {0, 1, 2};
    static int32_t tokens[2][2 * SAMPLES * NEW], lengths[2 * SAMPLES];
    for (int i = 0; i < 2; i++) {
        esp_sampler *s;
        esp_generate_config c = request(1);
        c.prompts = ids;
        c.cu_prompts = cu;
        c.n_prompts = 2;
        OK(esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_sequences = i == 0 ? 12 : 2, .max_length = NEW + 1)));
        OK(esp_sampler_generate(s, &c, tokens[i], NULL, lengths, NULL));
        esp_sampler_destroy(s);
    }
    cr_assert_eq(memcmp(tokens[0], tokens[1], sizeof tokens[0]), 0);
    demo_free(&m);
}

/* Places for completions and for prompts of their own: less memory, the same rows; and the peak does not grow with their number. */
Test(sampler, memory_is_for_places_not_for_rows) {
    demo m = demo_model(1, true);
    static drawn whole, tight;
    const esp_generate_config c = request(1);
    draw(&whole, m.model, 12, &c);
    const esp_sampler_config any = ESP_SAMPLER_CONFIG(.max_sequences = 12, .max_length = 24);
    const esp_sampler_config two = ESP_SAMPLER_CONFIG(.max_sequences = 12, .max_length = 24, .max_new_tokens = NEW, .max_prompts = 2);
    size_t bytes_any, bytes_two;
    OK(esp_sampler_plan(m.model, &any, &bytes_any));
    OK(esp_sampler_plan(m.model, &two, &bytes_two));
    const espi_config *k = &m.model->config;
    const size_t row = (size_t)(2 * k->layers * k->kv_heads * k->head_dim) * m.ctx->act_size;
    cr_assert_eq(bytes_any - bytes_two, row * (12 * 24 - (12 * NEW + 2 * (24 - NEW))), "%zu and %zu", bytes_any, bytes_two);
    esp_sampler *s;
    esp_memory before = ESP_MEMORY_INIT, after = ESP_MEMORY_INIT;
    memset(&tight, 0, sizeof tight);
    OK(esp_sampler_create(&s, m.model, &two));
    OK(esp_ctx_memory(m.ctx, &before));
    OK(esp_sampler_generate(s, &c, tight.tokens, tight.lp, tight.lengths, tight.stopped));
    cr_assert_eq(memcmp(&whole, &tight, sizeof whole), 0);
    esp_generate_config many = c;
    many.samples = 40;
    static int32_t tokens[PROMPTS * 40 * NEW], lengths[PROMPTS * 40];
    OK(esp_sampler_generate(s, &many, tokens, NULL, lengths, NULL));
    OK(esp_ctx_memory(m.ctx, &after));
    cr_assert_eq(before.peak, after.peak);
    cr_assert_eq(before.cache, bytes_two);
    for (int32_t p = 0; p < PROMPTS; p++) /* the first samples of 40 are those of 6 */
        cr_assert_eq(memcmp(tokens + p * 40 * NEW, whole.tokens + p * SAMPLES * NEW, SAMPLES * NEW * sizeof(int32_t)), 0, "prompt %d", p);
    esp_generate_config longer = c;
    longer.max_new_tokens = NEW + 1;
    FAILS(ESP_ERR_ARG, "got max_new_tokens 11, expected at most the sampler's, 10",
          esp_sampler_generate(s, &longer, tokens, NULL, lengths, NULL));
    esp_sampler_destroy(s);
    FAILS(ESP_ERR_ARG, "max_prompts 2 without max_new_tokens",
          esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_sequences = 12, .max_length = 24, .max_prompts = 2)));
    FAILS(
        ESP_ERR_ARG, "at most as many prompts as sequences",
        esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_sequences = 2, .max_length = 24, .max_new_tokens = 8, .max_prompts = 3)));
    OK(esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_sequences = 4, .max_length = 24, .max_new_tokens = 18)));
    FAILS(ESP_ERR_ARG, "prompt 0: got 7 tokens, expected at most 6", esp_sampler_generate(s, &c, tokens, NULL, lengths, NULL));
    esp_sampler_destroy(s);
    demo_free(&m);
}

/* ---- text ---- */

typedef struct written {
    char text[ROWS][4 * NEW + 8];
    size_t used[ROWS];
    bool ended[ROWS], wrong;
    int calls;
} written;

static int write_text(void *user, int32_t row, const char *text, size_t bytes, bool last) {
    written *w = user;
    w->calls++;
    w->wrong = w->wrong || w->ended[row] || strlen(text) != bytes || (bytes == 0 && !last);
    memcpy(w->text[row] + w->used[row], text, bytes);
    w->used[row] += bytes;
    w->ended[row] = last;
    return 0;
}

/* Text of the first n tokens, specials skipped. */
static void plain_text(char *out, size_t capacity, const esp_tokenizer *tokenizer, const int32_t *ids, int32_t n) {
    size_t bytes;
    OK(esp_tokenizer_decode(tokenizer, ids, (size_t)n, true, out, capacity, &bytes));
}

/* Rows as without stop strings up to the token that completes one; their text stops before it. */
Test(sampler, stop_strings) {
    demo m = demo_model(1, true);
    static drawn free_run, d;
    static written w;
    char whole[128], cut[128];
    esp_generate_config c = request(1.5f);
    draw(&free_run, m.model, 0, &c);
    whole[0] = '\0';
    for (int32_t r = 0; strlen(whole) < 4 && r < ROWS; r++)
        plain_text(whole, sizeof whole, m.tokenizer, free_run.tokens + r * NEW, free_run.lengths[r]);
    cr_assert_geq(strlen(whole), 4);
    char of_two[3] = {whole[1], whole[2], '\0'}; /* two tokens of some row */
    const char *stops[] = {of_two, "zzzzz"};
    c.stop_strings = stops;
    c.n_stop_strings = 2;
    c.tokenizer = m.tokenizer;
    c.on_text = write_text;
    c.on_text_user = &w;
    draw(&d, m.model, 7, &c);
    int cuts = 0;
    cr_assert(!w.wrong);
    for (int32_t r = 0; r < ROWS; r++) {
        const int32_t n = d.lengths[r];
        cr_assert(w.ended[r]);
        cr_assert_eq(memcmp(d.tokens + r * NEW, free_run.tokens + r * NEW, (size_t)n * sizeof(int32_t)), 0, "row %d", r);
        plain_text(whole, sizeof whole, m.tokenizer, free_run.tokens + r * NEW, free_run.lengths[r]);
        plain_text(cut, sizeof cut, m.tokenizer, d.tokens + r * NEW, n);
        const char *found = strstr(whole, of_two);
        if (found) {
            cuts++;
            cr_assert_eq(strlen(cut), (size_t)(found - whole) + 2, "row %d ends with the token that completes it", r);
            cr_assert(d.stopped[r]);
            whole[found - whole] = '\0';
        } else {
            cr_assert_eq(n, free_run.lengths[r]);
            cr_assert_eq(d.stopped[r], free_run.stopped[r]);
        }
        cr_assert_str_eq(w.text[r], whole, "row %d", r);
    }
    cr_assert(cuts > 0 && cuts < ROWS);
    cr_assert_gt(w.calls, 2 * ROWS, "told as it comes");
    demo_free(&m);
}

/* Feeds a text token by token; what was certain so far, and where it stopped. */
static bool feed_text(char *out, const esp_tokenizer *tokenizer, const char *text, const char *const *stops, int32_t n_stops, int32_t *at) {
    const esp_generate_config c = ESP_GENERATE_CONFIG(.tokenizer = tokenizer, .stop_strings = stops, .n_stop_strings = n_stops);
    int32_t ids[256];
    size_t n, used = 0;
    OK(esp_tokenizer_encode(tokenizer, text, strlen(text), false, false, ids, 256, &n));
    espi_row_text row = {0};
    bool stopped = false;
    for (*at = 0; *at < (int32_t)n && !stopped; ++*at) {
        size_t certain;
        OK(espi_row_text_add(&row, &certain, &stopped, &c, ids[*at]));
        cr_assert(certain == row.held.used || ((unsigned char)row.held.data[certain] & 0xC0) != 0x80, "a character was cut");
        memcpy(out + used, row.held.data, certain);
        used += certain;
        espi_row_text_drop(&row, certain);
    }
    if (!stopped) {
        OK(espi_row_text_end(&row));
        memcpy(out + used, row.held.data, row.held.used);
        used += row.held.used;
    }
    out[used] = '\0';
    free(row.held.data);
    return stopped;
}

/* Tokens of several characters and characters of several tokens. */
Test(sampler, stop_strings_lie_anywhere) {
    esp_tokenizer *t;
    char out[512];
    int32_t at;
    OK(esp_tokenizer_load(&t, ESP_SOURCE_DIR "/tests/golden/data/tokenizer"));
    const char *text = "The answer is \xF0\x9F\xA6\x99\xF0\x9F\xA6\x9A, \xE4\xBD\xA0\xE5\xA5\xBD! Finally: forty-two";
    cr_assert(!feed_text(out, t, text, NULL, 0, &at));
    cr_assert_str_eq(out, text);
    const struct {
        const char *stop[2], *left;
    } cases[] = {{{"Finally", "zz"}, "The answer is \xF0\x9F\xA6\x99\xF0\x9F\xA6\x9A, \xE4\xBD\xA0\xE5\xA5\xBD! "},
                 {{"swer i", "answer"}, "The "}, /* the earlier one, though the other ends first */
                 {{"\xF0\x9F\xA6\x9A", "zz"}, "The answer is \xF0\x9F\xA6\x99"},
                 {{"\xA5\xBD!", "\xE5\xA5\xBD! F"}, NULL},
                 {{"ally: f", "y-twoo"}, "The answer is \xF0\x9F\xA6\x99\xF0\x9F\xA6\x9A, \xE4\xBD\xA0\xE5\xA5\xBD! Fin"},
                 {{"T", "zz"}, ""}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const int first = cases[i].left ? 0 : 1;
        cr_assert(feed_text(out, t, text, cases[i].stop + first, 2 - first, &at), "case %zu", i);
        cr_assert_str_eq(out, cases[i].left ? cases[i].left : "The answer is \xF0\x9F\xA6\x99\xF0\x9F\xA6\x9A, \xE4\xBD\xA0", "case %zu",
                         i);
    }
    const char *nearly[] = {"forty-twos", "answers"};
    cr_assert(!feed_text(out, t, text, nearly, 2, &at));
    cr_assert_str_eq(out, text);
    esp_tokenizer_destroy(t);
}

Test(sampler, wrong_filters_and_texts) {
    demo m = demo_model(1, false);
    static drawn d;
    static written w;
    esp_sampler *s;
    OK(esp_sampler_create(&s, m.model, &ESP_SAMPLER_CONFIG(.max_sequences = 4, .max_length = 24, .max_kept = 3)));
    esp_generate_config c = request(1);
    c.top_k = 2;
    FAILS(ESP_ERR_ARG, "training would see another distribution", esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    c.evaluation = true;
    OK(esp_sampler_generate(s, &c, d.tokens, d.lp, d.lengths, d.stopped));
    c.evaluation = false;
    OK(esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, d.stopped));
    c.top_k = 4;
    FAILS(ESP_ERR_ARG, "got top_k 4, expected at most the sampler's max_kept, 3",
          esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    c = request(4);
    c.top_p = 0.99f;
    FAILS(ESP_ERR_UNSUPPORTED, "leave more than the sampler's max_kept, 3 ids",
          esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    c.greedy = true;
    FAILS(ESP_ERR_ARG, "got greedy with top_k 0, top_p 0.99", esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    c = request(1);
    c.top_p = NAN;
    FAILS(ESP_ERR_ARG, "top_p nan", esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    c.top_p = 0;
    c.min_p = 1;
    FAILS(ESP_ERR_ARG, "min_p 1", esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    c.min_p = 0;
    c.on_text = write_text;
    c.on_text_user = &w;
    FAILS(ESP_ERR_ARG, "tokenizer NULL", esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    c.tokenizer = m.tokenizer;
    const char *stops[] = {"a", ""}, *inside[] = {"\xBD"};
    c.stop_strings = stops;
    c.n_stop_strings = 2;
    FAILS(ESP_ERR_ARG, "stop string 1 is empty", esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    c.stop_strings = inside;
    c.n_stop_strings = 1;
    FAILS(ESP_ERR_ARG, "stop string 0 is not UTF-8", esp_sampler_generate(s, &c, d.tokens, NULL, d.lengths, NULL));
    esp_sampler_destroy(s);
    demo_free(&m);
}
