/* The calls of a model in double ("ref64"), for each family: what they promise of each other, and that the fast backend computes the same
 * model.  Both read one adapter folder, so they have the same parameters to the bit. */
#include "espalier/espalier.h"
#include "scratch.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>

enum { T = 14, SEQS = 2, VOCAB = 160 };
static const int32_t ids[T] = {5, 17, 143, 3, 88, 42, 7, 7, 120, 64, 31, 2, 99, 140}, cu[SEQS + 1] = {0, 9, T};
static const esp_batch batch = {.struct_size = sizeof batch, .tokens = ids, .cu_seqlens = cu, .n_tokens = T, .n_seqs = SEQS};

static const struct {
    const char *folder, *family;
    esp_qformat experts;
} families[] = {{"q3a", "qwen3_moe", ESP_NF4},
                {"go1", "gpt_oss", ESP_MXFP4},
                {"vl", "qwen3_vl_moe", ESP_FP4},
                {"ol", "olmoe", ESP_NF4},
                {"mx", "mixtral", ESP_Q_NONE}};
enum { FAMILIES = sizeof families / sizeof families[0] };

typedef struct subject {
    esp_ctx *ctx;
    esp_model *model;
} subject;

static subject load(int family, const char *backend, esp_model_config config) {
    subject s;
    char dir[ESPI_PATH_MAX];
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s/model", ESP_SOURCE_DIR, families[family].folder);
    config.experts = families[family].experts;
    OK(esp_ctx_create(&s.ctx, &ESP_CTX_CONFIG(.backend = backend)));
    OK(esp_model_load(&s.model, s.ctx, dir, &config));
    return s;
}

static void drop(subject *s) {
    esp_model_destroy(s->model);
    esp_ctx_destroy(s->ctx);
}

static int64_t param(esp_param *p, subject *s, int64_t i) {
    *p = (esp_param)ESP_PARAM_INIT;
    OK(esp_model_param_get(s->model, i, p));
    const esp_tensor view = esp_tensor_view(p->data, p->dtype, p->rank, p->dims);
    return esp_tensor_count(&view);
}

static double number(const void *data, esp_dtype dtype, int64_t i) {
    return dtype == ESP_F64 ? ((const double *)data)[i] : ((const float *)data)[i];
}

/* Writes an adapter whose B is not zero. */
static void write_adapter(int family, const char *dir) {
    subject s = load(family, "ref64", ESP_MODEL_CONFIG(.lora_rank = 3));
    for (int64_t i = 0; i < esp_model_param_count(s.model); i++) {
        esp_param p;
        const int64_t n = param(&p, &s, i);
        cr_assert_eq(p.dtype, ESP_F64);
        for (int64_t j = 0; strstr(p.name, "lora_B") && j < n; j++) ((double *)p.data)[j] = 0.05 * sin(1.0 + 0.7 * (double)j + (double)i);
    }
    OK(esp_model_save_adapter(s.model, dir));
    drop(&s);
}

static double loss_of(subject *s) {
    esp_tensor hidden;
    double loss;
    OK(esp_model_forward(s->model, &batch, &hidden));
    OK(esp_model_cross_entropy(s->model, &batch, &hidden, &loss, NULL));
    return loss;
}

static void backward(subject *s) {
    esp_tensor hidden, d_hidden;
    double loss;
    OK(esp_model_forward(s->model, &batch, &hidden));
    OK(esp_model_cross_entropy(s->model, &batch, &hidden, &loss, &d_hidden));
    OK(esp_model_backward(s->model, &batch, &d_hidden));
}

/* Logits, log-probabilities, entropies and the loss are of one distribution. */
static void head_agrees(subject *s, const char *family) {
    esp_tensor hidden;
    static float logits[T * VOCAB];
    float lp[T], entropy[T];
    double loss, total = 0;
    OK(esp_model_forward(s->model, &batch, &hidden));
    cr_assert_eq(hidden.dtype, ESP_F64, "%s", family);
    OK(esp_model_cross_entropy(s->model, &batch, &hidden, &loss, NULL));
    OK(esp_model_logits(s->model, &hidden, logits, T * VOCAB));
    OK(esp_model_logprob(s->model, &batch, &hidden, 1, lp, entropy));
    for (int t = 0; t < T; t++) {
        if (t == cu[0] || t == cu[1]) {
            cr_expect(lp[t] == 0 && entropy[t] == 0, "%s: token %d is a first one, and counted", family, t);
            continue;
        }
        const float *z = logits + (t - 1) * VOCAB; /* f32: as exact as the outputs */
        double sum = 0, h = 0;
        for (int v = 0; v < VOCAB; v++) sum += exp(z[v]);
        for (int v = 0; v < VOCAB; v++) h -= exp(z[v]) / sum * (z[v] - log(sum));
        cr_expect(!!(fabs(lp[t] - (z[ids[t]] - log(sum))) <= 2e-6), "%s: token %d: log-probability %g", family, t, (double)lp[t]);
        cr_expect(!!(fabs(entropy[t] - h) <= 2e-6), "%s: token %d: entropy %g, expected %g", family, t, (double)entropy[t], h);
        total -= lp[t] / (double)(T - SEQS);
    }
    cr_expect(!!(fabs(loss - total) <= 1e-6), "%s: loss %.9g, log-probabilities say %.9g", family, loss, total);
}

/* Rounding aside, the fast backend has the same hidden states, losses and gradients. */
static void fast_agrees(subject *exact, subject *fast, const char *family) {
    esp_tensor want, got;
    double aux[2], z[2], worst = 0, largest = 0;
    backward(exact);
    backward(fast);
    for (int64_t i = 0; i < esp_model_param_count(exact->model); i++) {
        esp_param p, q;
        const int64_t n = param(&p, exact, i);
        double off = 0, all = 0;
        cr_assert_eq(param(&q, fast, i), n);
        for (int64_t j = 0; j < n; j++) {
            off += pow(number(q.grad, q.dtype, j) - number(p.grad, p.dtype, j), 2);
            all += pow(number(p.grad, p.dtype, j), 2);
        }
        cr_expect(!!(sqrt(off) <= 1e-4 * sqrt(all)) && all > 0, "%s: gradient of %s is off by %g of %g", family, p.name, sqrt(off),
                  sqrt(all));
    }
    OK(esp_model_router_losses(exact->model, &aux[0], &z[0]));
    OK(esp_model_router_losses(fast->model, &aux[1], &z[1]));
    cr_expect(!!(fabs(aux[1] - aux[0]) <= 2e-5 * aux[0]), "%s: load-balancing loss %g, expected %g", family, aux[1], aux[0]);
    cr_expect(!!(fabs(z[1] - z[0]) <= 2e-5 * z[0]), "%s: z-loss %g, expected %g", family, z[1], z[0]);
    OK(esp_model_forward_only(exact->model, &batch, &want));
    OK(esp_model_forward_only(fast->model, &batch, &got));
    for (int64_t i = 0; i < esp_tensor_count(&want); i++) {
        worst = fmax(worst, fabs(number(got.data, got.dtype, i) - number(want.data, want.dtype, i)));
        largest = fmax(largest, fabs(number(want.data, want.dtype, i)));
    }
    cr_expect(!!(worst <= 2e-5 * largest) && largest > 0, "%s: hidden states are off by %g of %g", family, worst, largest);
}

/* Gradients add up, and zero_grad is where they begin. */
static void gradients_add(subject *s, const char *family) {
    OK(esp_model_zero_grad(s->model));
    backward(s);
    double *once[64];
    const int64_t params = esp_model_param_count(s->model);
    cr_assert(params > 0 && params <= 64);
    for (int64_t i = 0; i < params; i++) {
        esp_param p;
        const size_t bytes = (size_t)param(&p, s, i) * sizeof(double);
        once[i] = malloc(bytes);
        cr_assert_not_null(once[i]);
        memcpy(once[i], p.grad, bytes);
    }
    OK(esp_model_zero_grad(s->model));
    backward(s);
    backward(s);
    for (int64_t i = 0; i < params; i++) {
        esp_param p;
        const int64_t n = param(&p, s, i);
        double worst = 0, largest = 0;
        for (int64_t j = 0; j < n; j++) {
            worst = fmax(worst, fabs(((double *)p.grad)[j] - 2 * once[i][j]));
            largest = fmax(largest, fabs(once[i][j]));
        }
        cr_expect(!!(worst <= 1e-14 * largest), "%s: %s: two backwards are not twice one: %g of %g", family, p.name, worst, largest);
        free(once[i]);
    }
}

static void adapter_switches(subject *s, int family) {
    subject bare = load(family, "ref64", ESP_MODEL_CONFIG(.lora_targets = ESP_LORA_NOTHING));
    const double on = loss_of(s), without = loss_of(&bare);
    OK(esp_model_adapter_enable(s->model, false));
    const double off = loss_of(s);
    OK(esp_model_adapter_enable(s->model, true));
    cr_expect_eq(esp_model_param_count(bare.model), 0);
    cr_expect_eq(off, without, "%s: switched off %.17g, never there %.17g", families[family].folder, off, without);
    cr_expect(fabs(on - off) > 1e-3, "%s: the adapter changes nothing", families[family].folder);
    OK(esp_model_reserve(s->model, 3 * (int64_t)T, SEQS, true));
    cr_expect_eq(loss_of(s), on, "%s: more room, another loss", families[family].folder);
    drop(&bare);
}

ParameterizedTestParameters(ref64, calls) {
    static int index[FAMILIES];
    for (int i = 0; i < FAMILIES; i++) index[i] = i;
    return cr_make_param_array(int, index, FAMILIES);
}

ParameterizedTest(int *index, ref64, calls, .timeout = 60) {
    char dir[ESPI_PATH_MAX], adapter[ESPI_PATH_MAX];
    scratch_make(dir);
    OK(espi_path_join(adapter, dir, "adapter"));
    write_adapter(*index, adapter);
    subject exact = load(*index, "ref64", ESP_MODEL_CONFIG(.adapter_dir = adapter));
    subject fast = load(*index, "cpu", ESP_MODEL_CONFIG(.adapter_dir = adapter));
    esp_model_info info = ESP_MODEL_INFO_INIT;
    OK(esp_model_info_get(exact.model, &info));
    cr_expect_str_eq(info.family, families[*index].family);
    cr_expect_eq(info.lora_rank, 3);
    head_agrees(&exact, info.family);
    fast_agrees(&exact, &fast, info.family);
    gradients_add(&exact, info.family);
    adapter_switches(&exact, *index);
    drop(&exact);
    drop(&fast);
    scratch_remove(dir);
}
