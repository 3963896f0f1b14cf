/* Models and blocks whose experts are packed for products of bf16: loaded, planned to the byte, and near what f32 gives. */
#include "espalier/espalier.h"
#include "kernels/backend.h"
#include "models/model.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MODEL ESP_SOURCE_DIR "/examples/models/mix-moe"

enum { TOKENS = 24, HIDDEN = 128, WIDTH = 64, EXPERTS = 4 };

/* Of activations that went through two layers: some roundings to 8 bits. */
#define NEAR 0x1p-6

static double distance(const float *got, const float *want, int64_t n) {
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < n; i++) {
        if (isnan(got[i])) return NAN;
        worst = fmax(worst, fabs((double)got[i] - want[i]));
        largest = fmax(largest, fabs(want[i]));
    }
    return worst / largest;
}

static esp_ctx *context(const char *backend) {
    esp_ctx *ctx;
    cr_assert_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend, .threads = 2)), ESP_OK, "%s", esp_last_error());
    return ctx;
}

/* Loads, trains a step and compares the memory with the plan; the hidden states. */
static void hidden_of(float *out, const char *backend, const esp_model_config *config, bool packed) {
    int32_t ids[TOKENS];
    for (int32_t t = 0; t < TOKENS; t++) ids[t] = (t * 37 + 11) % 50;
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = (const int32_t[]){0, TOKENS}, .n_tokens = TOKENS, .n_seqs = 1);
    esp_ctx *ctx = context(backend);
    esp_model *model;
    esp_optim *optim;
    esp_tensor hidden, d_hidden;
    double loss;
    esp_plan plan = ESP_PLAN_INIT;
    esp_memory memory = ESP_MEMORY_INIT;
    cr_assert_eq(esp_plan_folder(&plan, ctx, MODEL, config, NULL, TOKENS, 1), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_load(&model, ctx, MODEL, config), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_adamw_create(&optim, model, NULL), ESP_OK, "%s", esp_last_error());
    cr_expect_eq(model->layers[0].gate_up.packed != NULL, packed, "%s", backend);
    cr_expect_eq(model->layers[0].down.packed != NULL, packed, "%s", backend);
    cr_assert_eq(esp_model_forward(model, &batch, &hidden), ESP_OK, "%s", esp_last_error());
    memcpy(out, hidden.data, (size_t)TOKENS * HIDDEN * sizeof *out);
    cr_assert_eq(esp_model_cross_entropy(model, &batch, &hidden, &loss, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_backward(model, &batch, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_ctx_memory(ctx, &memory), ESP_OK);
    cr_expect_eq(memory.weights, plan.dense_weights + plan.expert_weights, "%s: %zu, planned %zu", backend, memory.weights,
                 plan.dense_weights + plan.expert_weights);
    cr_expect_eq(memory.activations, plan.activations, "%s: %zu, planned %zu", backend, memory.activations, plan.activations);
    cr_expect_eq(memory.peak, plan.peak, "%s: peak %zu, planned %zu", backend, memory.peak, plan.peak);
    esp_optim_destroy(optim);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
}

/* A block of its own: out, then d_x and the gradient of gate_up's B. */
typedef struct block_values {
    float out[TOKENS * HIDDEN], d_x[TOKENS * HIDDEN], d_b[EXPERTS * 2 * WIDTH * 4];
} block_values;

static void fill(float *x, int64_t n, int64_t seed) {
    for (int64_t i = 0; i < n; i++) x[i] = (float)((i * 7919 + seed * 104729) % 2003 - 1001) / 1001.0F;
}

static void block_of(block_values *v, const char *backend) {
    static float x[TOKENS * HIDDEN], d_out[TOKENS * HIDDEN], matrix[3][WIDTH * HIDDEN], router[EXPERTS * HIDDEN];
    esp_ctx *ctx = context(backend);
    esp_moe *moe;
    esp_moe_memory sizes = ESP_MOE_MEMORY_INIT;
    cr_assert_eq(esp_moe_create(&moe, ctx,
                                &ESP_MOE_CONFIG(.hidden = HIDDEN, .experts = EXPERTS, .width = WIDTH, .top_k = 2, .format = ESP_NF4,
                                                .lora_rank = 4, .seed = 3)),
                 ESP_OK, "%s", esp_last_error());
    fill(router, EXPERTS * HIDDEN, 1);
    fill(x, TOKENS * HIDDEN, 2);
    fill(d_out, TOKENS * HIDDEN, 3);
    cr_assert_eq(esp_moe_set_router(moe, router), ESP_OK);
    for (int64_t e = 0; e < EXPERTS; e++) {
        for (int m = 0; m < 3; m++) fill(matrix[m], WIDTH * HIDDEN, 10 * e + m + 4);
        cr_assert_eq(esp_moe_set_expert(moe, e, matrix[0], matrix[1], matrix[2]), ESP_OK, "%s", esp_last_error());
    }
    float *b;
    int64_t count;
    cr_assert_eq(esp_moe_param_get(moe, ESP_MOE_GATE_UP_B, (void **)&b, NULL, &count), ESP_OK);
    cr_assert_eq(count, EXPERTS * 2 * WIDTH * 4);
    fill(b, count, 9);
    cr_assert_eq(esp_moe_sizes(moe, TOKENS, &sizes), ESP_OK);
    void *saved = aligned_alloc(64, (sizes.saved + 63) / 64 * 64), *scratch = aligned_alloc(64, (sizes.scratch + 63) / 64 * 64), *grad;
    cr_assert(saved && scratch);
    cr_assert_eq(esp_moe_forward(moe, v->out, x, TOKENS, saved, scratch), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_moe_backward(moe, v->d_x, d_out, x, TOKENS, saved, scratch), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_moe_param_get(moe, ESP_MOE_GATE_UP_B, NULL, &grad, &count), ESP_OK);
    memcpy(v->d_b, grad, sizeof v->d_b);
    esp_moe_destroy(moe);
    esp_ctx_destroy(ctx);
    free(saved);
    free(scratch);
}

Test(packed, models_near_f32_and_planned) {
    static float want[TOKENS * HIDDEN], got[TOKENS * HIDDEN];
    const esp_model_config configs[] = {ESP_MODEL_CONFIG(0), ESP_MODEL_CONFIG(.experts = ESP_FP4, .double_quant = true),
                                        ESP_MODEL_CONFIG(.experts = ESP_MXFP4)};
    for (size_t c = 0; c < sizeof configs / sizeof *configs; c++) {
        hidden_of(want, "ref", &configs[c], false);
        for (const espi_backend *const *b = espi_backends_cpu; *b; b++) {
            if (!(*b)->available() || !(*b)->pack) continue;
            hidden_of(got, (*b)->name, &configs[c], true);
            const double error = distance(got, want, TOKENS * HIDDEN);
            cr_expect(!!(error <= NEAR) && error > 1e-5, "%s, form %zu: hidden states are off by %.3g", (*b)->name, c, error);
        }
    }
}

Test(packed, a_block_near_f32) {
    static block_values want, got;
    block_of(&want, "ref");
    for (const espi_backend *const *b = espi_backends_cpu; *b; b++) {
        if (!(*b)->available() || !(*b)->pack) continue;
        block_of(&got, (*b)->name);
        const double errors[] = {distance(got.out, want.out, TOKENS * HIDDEN), distance(got.d_x, want.d_x, TOKENS * HIDDEN),
                                 distance(got.d_b, want.d_b, EXPERTS * 2 * WIDTH * 4)};
        for (int i = 0; i < 3; i++) cr_expect(!!(errors[i] <= NEAR), "%s, array %d: off by %.3g", (*b)->name, i, errors[i]);
    }
}
