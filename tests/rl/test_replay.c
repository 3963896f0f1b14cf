/* Routing replay and kept ids on the training side: what was recorded comes back to the bit, and what was forced or filtered has the
 * gradients that differences say. */
#include "espalier/espalier.h"
#include "lora_wave.h"
#include "models/passes.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 19, SEQS = 3, MOST_ROUTED = TOKENS * 3 * 3, MOST_KEPT = 256 };
static const int32_t ids[TOKENS] = {5, 17, 143, 3, 88, 42, 7, 7, 120, 64, 31, 2, 99, 140, 55, 13, 77, 149, 1};
static const int32_t cu[SEQS + 1] = {0, 9, 10, 19}; /* a sequence of one token in the middle */

/* The middle one is the prompt of the last. */
static const int32_t prefix_of[SEQS] = {-1, -1, 1};

typedef struct subject {
    esp_ctx *ctx;
    esp_model *model;
    esp_batch batch;
    int64_t layers, top_k, experts, moe_layers, dense;
    uint8_t routes[MOST_ROUTED];
} subject;

/* The second family has a layer without experts in front, three experts a token of seven, and sigmoid scores. */
static const char *const folders[] = {"q3a", "gla"};
enum { FOLDERS = 2 };

static subject make(const char *folder, const char *backend, const esp_model_config *config) {
    char dir[512];
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s/model", ESP_SOURCE_DIR, folder);
    subject s = {.batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = TOKENS, .n_seqs = SEQS)};
    OK(esp_ctx_create(&s.ctx, &ESP_CTX_CONFIG(.backend = backend)));
    OK(esp_model_load(&s.model, s.ctx, dir, config));
    const espi_config *c = &s.model->config;
    s.layers = c->layers;
    s.top_k = c->top_k;
    s.experts = c->experts;
    s.moe_layers = c->moe_layers;
    s.dense = c->layers - c->moe_layers;
    lora_wave(s.model);
    return s;
}

static void drop(subject *s) {
    esp_model_destroy(s->model);
    esp_ctx_destroy(s->ctx);
}

static uint8_t *route_at(subject *s, int64_t t, int64_t l) {
    return s->routes + (t * s->layers + l) * s->top_k;
}

/* What a forward chooses by itself. */
static void record(subject *s) {
    esp_tensor hidden;
    s->batch.n_routed = TOKENS * s->layers * s->top_k;
    s->batch.routed_bytes = 1;
    s->batch.record_experts = s->routes;
    OK(esp_model_forward_only(s->model, &s->batch, &hidden));
    s->batch.record_experts = NULL;
}

/* Hidden states, log-probabilities, and every gradient of the cross-entropy, as bytes. */
typedef struct outcome {
    double lp[TOKENS], loss;
    unsigned char *grads;
    size_t bytes;
    int64_t flips, replayed;
} outcome;

static outcome run(subject *s) {
    outcome o = {0};
    float lp[TOKENS];
    esp_tensor hidden, d_hidden;
    OK(esp_model_zero_grad(s->model));
    OK(esp_model_forward(s->model, &s->batch, &hidden));
    OK(esp_model_logprob(s->model, &s->batch, &hidden, 1, lp, NULL));
    for (int t = 0; t < TOKENS; t++) o.lp[t] = lp[t];
    OK(esp_model_cross_entropy(s->model, &s->batch, &hidden, &o.loss, &d_hidden));
    OK(esp_model_backward(s->model, &s->batch, &d_hidden));
    OK(esp_model_route_flips(s->model, &o.flips, &o.replayed));
    for (int64_t i = 0; i < esp_model_param_count(s->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(s->model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        const size_t n = (size_t)esp_tensor_count(&view) * esp_dtype_size(p.dtype);
        o.grads = realloc(o.grads, o.bytes + n);
        cr_assert_not_null(o.grads);
        memcpy(o.grads + o.bytes, p.grad, n);
        o.bytes += n;
    }
    return o;
}

static bool same(const outcome *a, const outcome *b) {
    return memcmp(a->lp, b->lp, sizeof a->lp) == 0 && a->loss == b->loss && memcmp(a->grads, b->grads, a->bytes) == 0;
}

/* An expert that token t does not have in layer l. */
static uint8_t another(subject *s, int64_t t, int64_t l) {
    const uint8_t *r = route_at(s, t, l);
    for (uint8_t e = 0;; e++) {
        bool has = false;
        for (int64_t k = 0; k < s->top_k; k++) has = has || r[k] == e;
        if (!has) return e;
    }
}

ParameterizedTestParameters(replay, what_was_recorded) {
    static int index[FOLDERS] = {0, 1};
    return cr_make_param_array(int, index, FOLDERS);
}

/* Recorded and replayed, the same bits; in another order of a token's experts too; with some tokens left to the router too. */
ParameterizedTest(int *index, replay, what_was_recorded) {
    subject s = make(folders[*index], NULL, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 3));
    outcome native = run(&s);
    cr_assert_eq(native.flips, 0);
    cr_assert_eq(native.replayed, 0);
    record(&s);
    for (int64_t t = 0; t < TOKENS; t++)
        for (int64_t l = 0; l < s.layers; l++)
            for (int64_t k = 0; k < s.top_k; k++) {
                const bool none = l < s.dense || t == 8 || t == 9 || t == 18; /* no experts; the last of a sequence */
                cr_assert_eq(route_at(&s, t, l)[k] == 255, none, "token %d, layer %d", (int)t, (int)l);
                cr_assert(none || route_at(&s, t, l)[k] < s.experts);
            }
    s.batch.routed_experts = s.routes;
    uint8_t again[MOST_ROUTED] = {0};
    s.batch.record_experts = again;
    outcome replayed = run(&s);
    s.batch.record_experts = NULL;
    cr_assert(same(&native, &replayed));
    cr_assert_eq(memcmp(again, s.routes, (size_t)s.batch.n_routed), 0, "a training forward records something else");
    cr_assert_eq(replayed.flips, 0);
    cr_assert_eq(replayed.replayed, (TOKENS - SEQS) * s.moe_layers);

    for (int64_t t = 0; t < TOKENS; t++)
        for (int64_t l = 0; l < s.layers; l++) {
            uint8_t *r = route_at(&s, t, l), first = r[0];
            memmove(r, r + 1, (size_t)s.top_k - 1);
            r[s.top_k - 1] = first;
            if (t % 3 == 0) memset(r, 255, (size_t)s.top_k);
            if (l < s.dense) memset(r, 0, (size_t)s.top_k); /* not read */
        }
    outcome mixed = run(&s);
    cr_assert(same(&native, &mixed));
    cr_assert_eq(mixed.flips, 0);
    cr_assert_eq(mixed.replayed, (TOKENS - SEQS - 5) * s.moe_layers); /* without 0 3 6 12 15; 9 and 18 had none */
    free(native.grads);
    free(replayed.grads);
    free(mixed.grads);
    drop(&s);
}

ParameterizedTestParameters(replay, flips_are_counted) {
    static int index[FOLDERS] = {0, 1};
    return cr_make_param_array(int, index, FOLDERS);
}

/* In the last layer a forced choice changes no other layer's: as many flips as were made, and other log-probabilities behind them alone. */
ParameterizedTest(int *index, replay, flips_are_counted) {
    subject s = make(folders[*index], NULL, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 3));
    outcome native = run(&s);
    record(&s);
    const int64_t changed[] = {0, 4, 5, 12, 17}, last = s.layers - 1;
    for (int i = 0; i < 5; i++) route_at(&s, changed[i], last)[i % s.top_k] = another(&s, changed[i], last);
    s.batch.routed_experts = s.routes;
    outcome forced = run(&s);
    cr_assert_eq(forced.flips, 5);
    cr_assert_eq(forced.replayed, (TOKENS - SEQS) * s.moe_layers);
    for (int t = 0; t < TOKENS; t++) {
        bool differs = false;
        for (int i = 0; i < 5; i++) differs = differs || t == changed[i] + 1; /* the token that its hidden state predicts */
        cr_assert_eq(forced.lp[t] != native.lp[t], differs, "token %d", t);
    }
    cr_assert_neq(memcmp(native.grads, forced.grads, native.bytes), 0);

    esp_tensor hidden; /* and in a forward without a backward */
    int64_t flips, replayed;
    OK(esp_model_forward_only(s.model, &s.batch, &hidden));
    OK(esp_model_route_flips(s.model, &flips, &replayed));
    cr_assert_eq(flips, 5);
    s.batch.routed_experts = NULL;
    OK(esp_model_forward_only(s.model, &s.batch, &hidden));
    OK(esp_model_route_flips(s.model, &flips, &replayed));
    cr_assert(flips == 0 && replayed == 0);
    free(native.grads);
    free(forced.grads);
    drop(&s);
}

/* Other experts everywhere, but for the tokens that are left to the router. */
static void force_others(subject *s) {
    record(s);
    for (int64_t t = 0; t < TOKENS; t++)
        for (int64_t l = s->dense; l < s->layers; l++)
            if (route_at(s, t, l)[0] != 255) route_at(s, t, l)[t % s->top_k] = another(s, t, l);
    memset(route_at(s, 3, 0), 255, (size_t)(s->layers * s->top_k));
    s->batch.routed_experts = s->routes;
}

static double loss_of(subject *s) {
    esp_tensor hidden;
    double loss;
    OK(esp_model_forward(s->model, &s->batch, &hidden));
    OK(esp_model_cross_entropy(s->model, &s->batch, &hidden, &loss, NULL));
    return loss;
}

/* Each tensor's gradients within 1e-6 of its largest value. */
static void check_gradients(subject *s, int64_t stride) {
    const double h = 1e-5;
    esp_tensor hidden, d_hidden;
    double loss;
    OK(esp_model_zero_grad(s->model));
    OK(esp_model_forward(s->model, &s->batch, &hidden));
    OK(esp_model_cross_entropy(s->model, &s->batch, &hidden, &loss, &d_hidden));
    OK(esp_model_backward(s->model, &s->batch, &d_hidden));
    int64_t flips, replayed;
    OK(esp_model_route_flips(s->model, &flips, &replayed));
    cr_assert_gt(flips, TOKENS / 2, "the choices are not forced");
    for (int64_t i = 0; i < esp_model_param_count(s->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(s->model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        double *data = p.data, largest = 0;
        const double *grad = p.grad;
        for (int64_t j = 0; j < esp_tensor_count(&view); j++) largest = fmax(largest, fabs(grad[j]));
        cr_assert_gt(largest, 0, "%s", p.name);
        for (int64_t j = i % stride; j < esp_tensor_count(&view); j += stride) {
            const double keep = data[j];
            data[j] = keep + h;
            const double up = loss_of(s);
            data[j] = keep - h;
            const double down = loss_of(s);
            data[j] = keep;
            const double error = fabs((up - down) / (2 * h) - grad[j]);
            cr_assert(!!(error <= 1e-6 * largest), "%s[%d]: difference %g of the largest gradient %g", p.name, (int)j, error, largest);
        }
    }
}

ParameterizedTestParameters(replay, gradients) {
    static int index[FOLDERS] = {0, 1};
    return cr_make_param_array(int, index, FOLDERS);
}

/* Through forced choices, and with the middle sequence as the prompt of the last. */
ParameterizedTest(int *index, replay, gradients, .timeout = 60) {
    subject s = make(folders[*index], "ref64", &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 2));
    force_others(&s);
    check_gradients(&s, 401);
    s.batch.prefix_of = prefix_of;
    s.batch.routed_experts = NULL;
    force_others(&s);
    cr_assert_lt(route_at(&s, 9, s.layers - 1)[0], s.experts, "a prompt's last token was fed");
    check_gradients(&s, 401);
    drop(&s);
}

Test(replay, a_layer_that_is_run_again_keeps_its_routes) {
    subject s = make("gla", NULL, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 3));
    subject again = make("gla", NULL, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 3, .activation_budget = 1));
    force_others(&s);
    force_others(&again);
    outcome kept = run(&s), rerun = run(&again);
    cr_assert(same(&kept, &rerun));
    cr_assert_gt(kept.flips, 0);
    cr_assert_eq(kept.flips, rerun.flips);
    free(kept.grads);
    free(rerun.grads);
    drop(&s);
    drop(&again);
}

Test(replay, wrong_routes) {
    subject s = make("gla", NULL, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 3));
    esp_tensor hidden;
    record(&s);
    s.batch.routed_experts = s.routes;
    s.batch.n_routed -= s.layers * s.top_k;
    FAILS(ESP_ERR_SHAPE, "got n_routed 162, expected 171: 19 tokens in 3 layers, 3 experts each",
          esp_model_forward(s.model, &s.batch, &hidden));
    s.batch.n_routed += s.layers * s.top_k;
    s.batch.routed_bytes = 2;
    FAILS(ESP_ERR_SHAPE, "got elements of 2 bytes, expected 1: this model has 7 experts", esp_model_forward(s.model, &s.batch, &hidden));
    s.batch.routed_bytes = 1;
    uint8_t *r = route_at(&s, 4, 2), keep[3];
    memcpy(keep, r, 3);
    r[1] = 7;
    FAILS(ESP_ERR_ARG, "token 4, layer 2: got expert 7, expected 0 to 6", esp_model_forward(s.model, &s.batch, &hidden));
    r[1] = r[0];
    FAILS(ESP_ERR_ARG, "token 4, layer 2: got expert", esp_model_forward_only(s.model, &s.batch, &hidden));
    cr_assert_not_null(strstr(esp_last_error(), "twice"));
    r[1] = 255;
    FAILS(ESP_ERR_ARG, "some of its 3 ids are all ones", esp_model_forward(s.model, &s.batch, &hidden));
    memcpy(r, keep, 3);
    memmove(s.routes + s.layers * s.top_k, s.routes, (size_t)((TOKENS - 1) * s.layers * s.top_k)); /* as if for the token before */
    FAILS(ESP_ERR_ARG, "the last token of sequence 0 (token 8, layer 1) has experts", esp_model_forward(s.model, &s.batch, &hidden));
    int64_t flips, replayed;
    FAILS(ESP_ERR_STATE, "no forward before", esp_model_route_flips(s.model, &flips, &replayed));
    drop(&s);
}

/* Beyond 255 experts an id takes two bytes, and all ones are 65535; 255 is an expert like any other. */
Test(replay, ids_of_two_bytes) {
    const espi_config few = {.experts = 255};
    espi_layer layers[2] = {{.mlp = ESPI_MLP_DENSE}, {.mlp = ESPI_MLP_MOE}};
    esp_model model = {.config = {.experts = 300, .top_k = 2, .layers = 2}, .layers = layers};
    uint16_t routes[TOKENS][2][2];
    int64_t replayed;
    int32_t chosen[2][TOKENS][2], again[2][TOKENS][2];
    cr_assert_eq(espi_route_bytes(&few), 1);
    cr_assert_eq(espi_route_bytes(&(espi_config){.experts = 256}), 2);
    for (int32_t t = 0; t < TOKENS; t++) memcpy(chosen[1][t], (const int32_t[]){t, t % 2 == 0 ? 255 : 299}, sizeof chosen[1][t]);
    esp_batch b = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = TOKENS, .n_seqs = SEQS, .routed_experts = routes,
                            .record_experts = routes, .n_routed = TOKENS * 4, .routed_bytes = 2);
    espi_routes_record(&model, &b, chosen[0][0]);
    for (int32_t t = 0; t < TOKENS; t++) {
        const bool last = t == 8 || t == 9 || t == 18;
        cr_assert_eq(routes[t][0][1], 65535);
        cr_assert_eq(routes[t][1][0], last ? 65535 : t);
        cr_assert_eq(routes[t][1][1], last ? 65535 : t % 2 == 0 ? 255 : 299);
    }
    OK(espi_routes_check(&replayed, &model, &b));
    cr_assert_eq(replayed, TOKENS - SEQS);
    espi_routes_read(again[0][0], &model, &b);
    for (int32_t t = 0; t < TOKENS; t++) cr_assert_eq(again[1][t][1], routes[t][1][0] == 65535 ? -1 : chosen[1][t][1]);
    b.last_follows = true;
    espi_routes_read(again[0][0], &model, &b);
    for (int32_t t = 0; t < TOKENS; t++) { /* the last goes where the one before it went, and a single one to the first experts */
        const int32_t sent = t == 9 ? -2 - 1 : -2 - chosen[1][t > 0 ? t - 1 : 0][1];
        cr_assert_eq(again[1][t][1], routes[t][1][0] == 65535 ? sent : chosen[1][t][1], "token %d", t);
    }
    routes[3][1][1] = 300;
    FAILS(ESP_ERR_ARG, "token 3, layer 1: got expert 300, expected 0 to 299, or all ones (65535)",
          espi_routes_check(&replayed, &model, &b));
}

/* Of every second token every fifth id and the token itself; of the others all. */
typedef struct kept {
    int64_t offsets[TOKENS + 1];
    int32_t ids[TOKENS * 64];
} kept;

static void keep_some(kept *k, esp_batch *b, int32_t vocab) {
    int64_t n = 0;
    for (int32_t t = 0; t < TOKENS; t++) {
        k->offsets[t] = n;
        for (int32_t v = 0; t % 2 == 0 && v < vocab; v++)
            if (v % 5 == t % 5 || v == ids[t]) k->ids[n++] = v;
    }
    k->offsets[TOKENS] = n;
    b->kept_offsets = k->offsets;
    b->kept_ids = k->ids;
    b->n_kept = n;
}

/* By hand from the logits. */
Test(replay, kept_ids_are_the_distribution) {
    static float logits[TOKENS * 160];
    static kept k;
    const float temperature = 0.7f;
    subject s = make("q3a", "ref64", &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 2));
    float all[TOKENS], lp[TOKENS], entropy[TOKENS];
    esp_tensor hidden;
    OK(esp_model_forward_only(s.model, &s.batch, &hidden));
    OK(esp_model_logprob(s.model, &s.batch, &hidden, temperature, all, NULL));
    OK(esp_model_logits(s.model, &hidden, logits, TOKENS * 160));
    keep_some(&k, &s.batch, 160);
    OK(esp_model_forward_only(s.model, &s.batch, &hidden));
    OK(esp_model_logprob(s.model, &s.batch, &hidden, temperature, lp, entropy));
    for (int t = 1; t < TOKENS; t++) {
        if (t == 9 || t == 10) continue; /* first of a sequence */
        if (t % 2 == 1) {
            cr_assert_eq(lp[t], all[t]);
            continue;
        }
        double sum = 0, mean = 0;
        for (int64_t i = k.offsets[t]; i < k.offsets[t + 1]; i++) {
            const double z = (double)logits[(t - 1) * 160 + k.ids[i]] / temperature;
            sum += exp(z);
            mean += z * exp(z);
        }
        const double want = (double)logits[(t - 1) * 160 + ids[t]] / temperature - log(sum);
        cr_assert_float_eq(lp[t], want, 2e-6, "token %d: %g, by hand %g", t, (double)lp[t], want);
        cr_assert_float_eq(entropy[t], log(sum) - mean / sum, 2e-6, "token %d", t);
    }
    drop(&s);
}

Test(replay, kept_ids_have_gradients, .timeout = 60) {
    static kept k;
    subject s = make("q3a", "ref64", &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 2));
    keep_some(&k, &s.batch, 160);
    force_others(&s);
    check_gradients(&s, 301);
    drop(&s);
}

/* What a plan says of kept ids holds them, to the byte: one byte less does not. */
Test(replay, kept_ids_are_planned) {
    static kept k;
    subject s = make("q3a", NULL, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 2));
    espi_head_rows rows;
    espi_arena dry = espi_ctx_dry(s.ctx);
    for (int32_t t = 0; t < TOKENS; t++)
        for (int32_t v = 0; v < 64; v++) k.ids[t * 64 + v] = ids[t] < 64 ? v : ids[t] - 63 + v;
    for (int32_t t = 0; t <= TOKENS; t++) k.offsets[t] = t * 64;
    s.batch.loss_mask = (const uint8_t[TOKENS]){0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}; /* as many rows as a plan has */
    s.batch.cu_seqlens = (const int32_t[]){0, TOKENS};
    s.batch.n_seqs = 1;
    s.batch.n_kept = TOKENS * 64;
    OK(espi_head_rows_make(&rows, s.model, &dry, &s.batch));
    s.batch.kept_offsets = k.offsets;
    s.batch.kept_ids = k.ids;
    const size_t bytes = espi_arena_high(&dry).main;
    cr_assert_gt(bytes, (size_t)s.batch.n_kept * sizeof(int32_t));
    void *block = aligned_alloc(ESPI_ALIGN, bytes);
    cr_assert_not_null(block);
    espi_arena whole = espi_arena_over(block, bytes), short_of_one = espi_arena_over(block, bytes - 1);
    OK(espi_head_rows_make(&rows, s.model, &whole, &s.batch));
    cr_assert_eq(espi_arena_high(&whole).main, bytes);
    FAILS(ESP_ERR_MEMORY, "", espi_head_rows_make(&rows, s.model, &short_of_one, &s.batch));
    free(block);
    drop(&s);
}

Test(replay, wrong_kept_ids) {
    static kept k;
    subject s = make("q3a", NULL, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 2));
    esp_tensor hidden;
    float lp[TOKENS];
    keep_some(&k, &s.batch, 160);
    OK(esp_model_forward_only(s.model, &s.batch, &hidden));
    s.batch.n_kept--;
    FAILS(ESP_ERR_SHAPE, "kept ids: got n_kept", esp_model_logprob(s.model, &s.batch, &hidden, 1, lp, NULL));
    s.batch.n_kept++;
    s.batch.tokens = (const int32_t[TOKENS]){5, 17, 144, 3, 88, 42, 7, 7, 120, 64, 31, 2, 99, 140, 55, 13, 77, 149, 1};
    FAILS(ESP_ERR_ARG, "without the token itself, 144", esp_model_logprob(s.model, &s.batch, &hidden, 1, lp, NULL));
    s.batch.tokens = ids;
    k.ids[k.offsets[4] + 2] = k.ids[k.offsets[4] + 1];
    FAILS(ESP_ERR_ARG, "kept_ids of token 4", esp_model_logprob(s.model, &s.batch, &hidden, 1, lp, NULL));
    k.ids[k.offsets[4] + 2] = 160;
    FAILS(ESP_ERR_ARG, "kept_ids of token 4: got 160", esp_model_logprob(s.model, &s.batch, &hidden, 1, lp, NULL));
    k.offsets[3] = k.offsets[2] - 1;
    FAILS(ESP_ERR_ARG, "kept_offsets[3]", esp_model_logprob(s.model, &s.batch, &hidden, 1, lp, NULL));
    drop(&s);
}
