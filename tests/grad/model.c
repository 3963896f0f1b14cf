/* A whole model of each family against central differences in fp64, and what must not change a gradient: checkpointing, micro-batches,
 * threads. */
#include "models/model.h"
#include "espalier/espalier.h"

#include "kernels/plain.h"
#include "lora_wave.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MODEL ESP_SOURCE_DIR "/tests/golden/data/q3a/model"

enum { TOKENS = 19, SEQS = 3 };
static const int32_t ids[TOKENS] = {5, 17, 143, 3, 88, 42, 7, 7, 120, 64, 31, 2, 99, 140, 55, 13, 77, 150, 1};
static const int32_t cu[SEQS + 1] = {0, 9, 10, 19}; /* a sequence of one token in the middle */

typedef struct subject {
    esp_ctx *ctx;
    esp_model *model;
    esp_batch batch;
} subject;

static subject make(const char *dir, const char *backend, int threads, const esp_model_config *config) {
    subject s = {.batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = TOKENS, .n_seqs = SEQS)};
    cr_assert_eq(esp_ctx_create(&s.ctx, &ESP_CTX_CONFIG(.backend = backend, .threads = threads)), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_load(&s.model, s.ctx, dir, config), ESP_OK, "%s", esp_last_error());
    lora_wave(s.model);
    return s;
}

static void drop(subject *s) {
    esp_model_destroy(s->model);
    esp_ctx_destroy(s->ctx);
}

static double loss_of(subject *s, double aux_coef, double z_coef) {
    esp_tensor hidden;
    double loss, aux, z;
    cr_assert_eq(esp_model_forward(s->model, &s->batch, &hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_cross_entropy(s->model, &s->batch, &hidden, &loss, NULL), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_router_losses(s->model, &aux, &z), ESP_OK);
    return loss + aux_coef * aux + z_coef * z;
}

static void backward(subject *s) {
    esp_tensor hidden, d_hidden;
    double loss;
    cr_assert_eq(esp_model_forward(s->model, &s->batch, &hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_cross_entropy(s->model, &s->batch, &hidden, &loss, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_backward(s->model, &s->batch, &d_hidden), ESP_OK, "%s", esp_last_error());
}

/* Every gradient by central differences, each tensor within 1e-6 of its largest value. */
static void check_parameters(subject *s, double aux_coef, double z_coef, int64_t stride) {
    const double h = 1e-5;
    int64_t tensors = 0;
    for (int64_t i = 0; i < esp_model_param_count(s->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        cr_assert_eq(esp_model_param_get(s->model, i, &p), ESP_OK);
        cr_assert_eq(p.dtype, ESP_F64);
        double *data = p.data, worst = 0, largest = 0;
        const double *grad = p.grad;
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        const int64_t n = esp_tensor_count(&view);
        for (int64_t j = 0; j < n; j++) largest = fmax(largest, fabs(grad[j]));
        cr_expect(largest > 0, "%s: gradient is zero everywhere", p.name);
        for (int64_t j = i % stride; j < n; j += stride) {
            const double keep = data[j];
            data[j] = keep + h;
            const double up = loss_of(s, aux_coef, z_coef);
            data[j] = keep - h;
            const double down = loss_of(s, aux_coef, z_coef);
            data[j] = keep;
            worst = fmax(worst, fabs((up - down) / (2 * h) - grad[j]));
        }
        cr_expect(worst <= 1e-6 * largest, "%s: difference %g of the largest gradient %g", p.name, worst, largest);
        tensors++;
    }
    cr_expect_gt(tensors, 0);
}

/* The frozen parts: the router weight's own gradient, and the gradient that reaches the embedding output through everything, the frozen
 * router included.  Both are f32 in memory, so the step is what f32 makes of it. */
typedef struct catch_h0 {
    double d[TOKENS * 64];
    int64_t seen;
} catch_h0;

static void catch (void *user, const char *name, int64_t layer, const esp_tensor *t) {
    catch_h0 *c = user;
    if (layer != 0 || strcmp(name, "d_h") != 0) return;
    memcpy(c->d, t->data, sizeof c->d);
    c->seen++;
}

static double difference(subject *s, float *x, double aux, double z) {
    const float keep = *x;
    *x = keep + 1e-5f;
    const double at_up = *x, up = loss_of(s, aux, z);
    *x = keep - 1e-5f;
    const double at_down = *x, down = loss_of(s, aux, z);
    *x = keep;
    return (up - down) / (at_up - at_down);
}

/* Every stride-th gradient of a frozen array, each within 1e-6 of the largest. */
static void check_frozen(subject *s, const char *what, int64_t layer, float *data, const double *grad, int64_t n, int64_t stride,
                         double aux, double z) {
    double largest = 0;
    for (int64_t j = 0; j < n; j++) largest = fmax(largest, fabs(grad[j]));
    cr_expect(largest > 0, "%s of layer %lld: gradient is zero everywhere", what, (long long)layer);
    for (int64_t j = 0; j < n; j += stride) {
        const double error = fabs(difference(s, &data[j], aux, z) - grad[j]);
        cr_expect(error <= 1e-6 * largest, "%s of layer %lld, value %lld: difference %g of %g", what, (long long)layer, (long long)j, error,
                  largest);
    }
}

/* The model reads its embedding from an f32 copy: one that is not shared with the head, and fine enough for a small step. */
static float *own_embedding(esp_model *model) {
    const espi_mat stored = model->embed;
    float *copy = malloc((size_t)(stored.rows * stored.cols) * sizeof *copy);
    cr_assert_not_null(copy);
    for (int64_t i = 0; i < stored.rows * stored.cols; i++) copy[i] = espi_plain_value(stored.data, stored.dtype, i);
    model->embed = (espi_mat){copy, ESP_F32, stored.rows, stored.cols};
    return copy;
}

static const struct {
    const char *folder;
    esp_qformat experts;
    int64_t rank, stride; /* stride: of the parameters that are checked */
    float aux, z;
} models[] = {
    {"q3a", ESP_NF4, 3, 131, 0.02F, 0.01F},   {"q3b", ESP_Q_NONE, 2, 173, 0.02F, 0}, /* dense layers among MoE ones, weights not
                                                                                        renormalised, bf16 */
    {"go1", ESP_MXFP4, 2, 173, 0.02F, 0.01F}, {"vl", ESP_NF4, 2, 173, 0.02F, 0},     {"vla", ESP_Q_NONE, 3, 173, 0, 0.01F},
    {"ol", ESP_FP4, 2, 173, 0.02F, 0.01F},    {"mx", ESP_Q_NONE, 2, 173, 0, 0},
};
enum { MODELS = sizeof models / sizeof models[0] };

ParameterizedTestParameters(grad_model, every_gradient) {
    static int index[MODELS];
    for (int i = 0; i < MODELS; i++) index[i] = i;
    return cr_make_param_array(int, index, MODELS);
}

ParameterizedTest(int *index, grad_model, every_gradient, .timeout = 120) {
    static catch_h0 caught;
    const double aux = models[*index].aux, z = models[*index].z;
    char dir[512];
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s/model", ESP_SOURCE_DIR, models[*index].folder);
    subject s = make(dir, "ref64", 1,
                     &ESP_MODEL_CONFIG(.experts = models[*index].experts, .lora_rank = models[*index].rank, .train_router = true,
                                       .router_aux_coef = models[*index].aux, .router_z_coef = models[*index].z));
    const espi_config *c = &s.model->config;
    const espi_mat stored = s.model->embed;
    float *embedding = own_embedding(s.model);
    cr_assert_eq(esp_model_set_probe(s.model, catch, &caught), ESP_OK);
    backward(&s);
    cr_assert_eq(esp_model_set_probe(s.model, NULL, NULL), ESP_OK);
    cr_assert_eq(caught.seen, 1);

    check_parameters(&s, aux, z, models[*index].stride);
    for (int64_t l = 0; l < c->layers; l++) {
        const espi_layer *w = &s.model->layers[l];
        cr_expect_eq(w->d_router != NULL, w->mlp == ESPI_MLP_MOE);
        cr_expect_eq(w->d_sinks != NULL, c->sinks);
        if (w->d_router) check_frozen(&s, "router", l, (float *)w->router.data, w->d_router, c->experts * c->hidden, 61, aux, z);
        if (w->d_sinks) check_frozen(&s, "sinks", l, (float *)w->sinks, w->d_sinks, c->heads, 1, aux, z);
    }
    /* Token 143 occurs once, at position 2: its embedding row is that position's input. */
    check_frozen(&s, "input", 0, embedding + 143 * c->hidden, caught.d + 2 * c->hidden, c->hidden, 5, aux, z);
    s.model->embed = stored;
    free(embedding);
    drop(&s);
}

/* All gradients, one after the other, as bytes. */
static unsigned char *gradients(subject *s, size_t *bytes) {
    unsigned char *all = NULL;
    *bytes = 0;
    for (int64_t i = 0; i < esp_model_param_count(s->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        cr_assert_eq(esp_model_param_get(s->model, i, &p), ESP_OK);
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        const size_t n = (size_t)esp_tensor_count(&view) * esp_dtype_size(p.dtype);
        all = realloc(all, *bytes + n);
        cr_assert_not_null(all);
        memcpy(all + *bytes, p.grad, n);
        *bytes += n;
    }
    return all;
}

static void same_bits(const esp_model_config *a, int threads_a, const esp_model_config *b, int threads_b, const char *what) {
    subject x = make(MODEL, "cpu", threads_a, a), y = make(MODEL, "cpu", threads_b, b);
    size_t nx, ny;
    backward(&x);
    backward(&y);
    unsigned char *gx = gradients(&x, &nx), *gy = gradients(&y, &ny);
    cr_assert_eq(nx, ny);
    cr_expect(memcmp(gx, gy, nx) == 0, "%s changed the gradients", what);
    free(gx);
    free(gy);
    drop(&x);
    drop(&y);
}

Test(grad_model, checkpointing_keeps_the_bits) {
    const esp_model_config whole = ESP_MODEL_CONFIG(.lora_rank = 4), none = ESP_MODEL_CONFIG(.lora_rank = 4, .activation_budget = 1);
    same_bits(&whole, 1, &none, 1, "recomputing every layer");
    /* Room for one layer of two: found by asking what the whole takes. */
    const esp_model_config half = ESP_MODEL_CONFIG(.lora_rank = 4, .activation_budget = 60000);
    same_bits(&whole, 1, &half, 1, "recomputing some layers");
}

Test(grad_model, threads_keep_the_bits) {
    const esp_model_config config = ESP_MODEL_CONFIG(.lora_rank = 4);
    same_bits(&config, 1, &config, 2, "a second thread");
}

/* One batch of three sequences, or three batches of one: the same sum of gradients, to the rounding of a sum taken in another order. */
Test(grad_model, micro_batches_add_up) {
    const esp_model_config config = ESP_MODEL_CONFIG(.lora_rank = 4);
    subject one = make(MODEL, "cpu", 1, &config), many = make(MODEL, "cpu", 1, &config);
    backward(&one);
    for (int s = 0; s < SEQS; s++) {
        const int32_t n = cu[s + 1] - cu[s], borders[2] = {0, n};
        many.batch = ESP_BATCH(.tokens = ids + cu[s], .cu_seqlens = borders, .n_tokens = n, .n_seqs = 1, .step_tokens = TOKENS - SEQS);
        backward(&many);
    }
    for (int64_t i = 0; i < esp_model_param_count(one.model); i++) {
        esp_param p = ESP_PARAM_INIT, q = ESP_PARAM_INIT;
        cr_assert_eq(esp_model_param_get(one.model, i, &p), ESP_OK);
        cr_assert_eq(esp_model_param_get(many.model, i, &q), ESP_OK);
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        double worst = 0, largest = 0;
        for (int64_t j = 0; j < esp_tensor_count(&view); j++) {
            const double a = ((float *)p.grad)[j], b = ((float *)q.grad)[j];
            worst = fmax(worst, fabs(a - b));
            largest = fmax(largest, fabs(a));
        }
        /* 19 terms in another order: a few units in the last place of the largest. */
        cr_expect(worst <= 8 * 6e-8 * largest, "%s: %g of %g", p.name, worst, largest);
    }
    drop(&one);
    drop(&many);
}
