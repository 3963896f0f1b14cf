/* Calls that are wrong, one by one, at the model and the block level: the status, and what the sentence says.  And calls that are unusual
 * but right. */
#include "espalier/espalier.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MODEL ESP_SOURCE_DIR "/tests/golden/data/q3a/model"
#define NARROW_MODEL ESP_SOURCE_DIR "/tests/golden/data/q3c/model"

static esp_ctx *ctx;
static esp_model *model;
static const int32_t ids[6] = {1, 2, 3, 4, 5, 6}, cu[3] = {0, 4, 6};

static void start(void) {
    cr_assert_eq(esp_ctx_create(&ctx, NULL), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_model_load(&model, ctx, MODEL, NULL), ESP_OK, "%s", esp_last_error());
}

static void stop(void) {
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
}

static esp_batch good(void) {
    return ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = 6, .n_seqs = 2);
}

#define EXPECT(call, status, ...)                                                                                                          \
    do {                                                                                                                                   \
        const char *const words[] = {__VA_ARGS__};                                                                                         \
        const esp_status got = (call);                                                                                                     \
        cr_expect_eq(got, status, "%s: got %s (%s)", #call, esp_status_name(got), esp_last_error());                                       \
        for (size_t i_ = 0; i_ < sizeof words / sizeof *words; i_++)                                                                       \
            cr_expect(strstr(esp_last_error(), words[i_]), "\"%s\" does not say \"%s\"", esp_last_error(), words[i_]);                     \
    } while (0)

TestSuite(model_calls, .init = start, .fini = stop);

Test(model_calls, bad_batches) {
    esp_tensor hidden;
    esp_batch b = good();
    int32_t wrong[6] = {1, 2, 3, 4, 160, 6};
    b.tokens = wrong;
    EXPECT(esp_model_forward(model, &b, &hidden), ESP_ERR_ARG, "tokens[4]", "160", "159");
    wrong[4] = -1;
    EXPECT(esp_model_forward(model, &b, &hidden), ESP_ERR_ARG, "tokens[4]", "-1");
    b = good();
    b.cu_seqlens = (int32_t[]){0, 4, 5};
    EXPECT(esp_model_forward(model, &b, &hidden), ESP_ERR_ARG, "cu_seqlens", "5", "6");
    b.cu_seqlens = (int32_t[]){0, 0, 6};
    EXPECT(esp_model_forward(model, &b, &hidden), ESP_ERR_ARG, "sequence 0", "at least 1");
    b = good();
    b.n_tokens = INT32_MAX / 2 + 1; /* two experts a token */
    EXPECT(esp_model_forward(model, &b, &hidden), ESP_ERR_ARG, "routed rows");
    b = good();
    b.tokens = NULL;
    EXPECT(esp_model_forward(model, &b, &hidden), ESP_ERR_ARG, "tokens");
    EXPECT(esp_model_forward(model, NULL, &hidden), ESP_ERR_ARG, "NULL");
    EXPECT(esp_model_forward(NULL, &b, &hidden), ESP_ERR_ARG, "NULL");
}

Test(model_calls, longer_than_the_context) {
    esp_tensor hidden;
    const int32_t n = 4097; /* max_position_embeddings is 4096 */
    int32_t *many = calloc((size_t)n, sizeof *many), borders[2] = {0, n};
    cr_assert_not_null(many);
    const esp_batch b = ESP_BATCH(.tokens = many, .cu_seqlens = borders, .n_tokens = n, .n_seqs = 1);
    EXPECT(esp_model_forward(model, &b, &hidden), ESP_ERR_ARG, "4097", "4096");
    free(many);
}

Test(model_calls, out_of_order) {
    esp_tensor hidden, d_hidden;
    double loss, aux, z;
    esp_batch b = good();
    float *zeros = calloc(6 * 64, sizeof *zeros);
    cr_assert_not_null(zeros);
    d_hidden = esp_tensor_view(zeros, ESP_F32, 2, (int64_t[]){6, 64});
    EXPECT(esp_model_backward(model, &b, &d_hidden), ESP_ERR_STATE, "esp_model_forward");
    EXPECT(esp_model_router_losses(model, &aux, &z), ESP_ERR_STATE, "esp_model_forward");
    cr_assert_eq(esp_model_forward(model, &b, &hidden), ESP_OK);
    cr_expect_eq(esp_model_backward(model, &b, &d_hidden), ESP_OK);
    const int32_t other[6] = {1, 2, 3, 4, 5, 7};
    b.tokens = other;
    EXPECT(esp_model_backward(model, &b, &d_hidden), ESP_ERR_STATE, "other tokens");
    b = good();
    b.n_seqs = 1;
    b.cu_seqlens = (int32_t[]){0, 6};
    EXPECT(esp_model_backward(model, &b, &d_hidden), ESP_ERR_STATE, "in 1", "in 2");
    b = good();
    cr_assert_eq(esp_model_forward_only(model, &b, &hidden), ESP_OK);
    EXPECT(esp_model_backward(model, &b, &d_hidden), ESP_ERR_STATE, "nothing is saved");
    cr_expect_eq(esp_model_cross_entropy(model, &b, &hidden, &loss, NULL), ESP_OK);
    free(zeros);
}

Test(model_calls, bad_tensors) {
    esp_tensor hidden;
    double loss;
    float lp[6];
    esp_batch b = good();
    cr_assert_eq(esp_model_forward(model, &b, &hidden), ESP_OK);
    esp_tensor wrong = hidden;
    wrong.dtype = ESP_F64;
    EXPECT(esp_model_backward(model, &b, &wrong), ESP_ERR_DTYPE, "d_hidden", "F64", "F32");
    wrong = hidden;
    wrong.dims[0] = 5;
    EXPECT(esp_model_backward(model, &b, &wrong), ESP_ERR_SHAPE, "d_hidden", "[5, 64]", "[6, 64]");
    wrong = hidden;
    wrong.strides[0] = 65;
    EXPECT(esp_model_cross_entropy(model, &b, &wrong, &loss, NULL), ESP_ERR_SHAPE, "hidden", "65");
    EXPECT(esp_model_logprob(model, &b, &hidden, 0.0f, lp, NULL), ESP_ERR_ARG, "temperature", "0");
    EXPECT(esp_model_logprob(model, &b, &hidden, -1.0f, lp, NULL), ESP_ERR_ARG, "temperature", "-1");
    const uint8_t mask[6] = {1, 1, 1, 1, 0, 1};
    b.loss_mask = mask;
    EXPECT(esp_model_cross_entropy(model, &b, &hidden, &loss, NULL), ESP_ERR_ARG, "loss_mask[0]", "sequence 0");
    float logits[10];
    EXPECT(esp_model_logits(model, &hidden, logits, 10), ESP_ERR_SHAPE, "10", "960");
}

Test(model_calls, nothing_to_do) {
    esp_tensor hidden, d_hidden;
    double loss = 1;
    const esp_batch none = ESP_BATCH(.n_tokens = 0);
    cr_expect_eq(esp_model_forward(model, &none, &hidden), ESP_OK, "%s", esp_last_error());
    cr_expect_eq(esp_model_cross_entropy(model, &none, &hidden, &loss, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_expect_eq(loss, 0);
    cr_expect_eq(esp_model_backward(model, &none, &d_hidden), ESP_OK, "%s", esp_last_error());
    /* A mask that counts nothing. */
    const uint8_t mask[6] = {0};
    esp_batch b = good();
    b.loss_mask = mask;
    cr_expect_eq(esp_model_forward(model, &b, &hidden), ESP_OK);
    cr_expect_eq(esp_model_cross_entropy(model, &b, &hidden, &loss, &d_hidden), ESP_OK, "%s", esp_last_error());
    cr_expect_eq(loss, 0);
    cr_expect_eq(esp_model_backward(model, &b, &d_hidden), ESP_OK);
    for (int i = 0; i < 6 * 64; i++) cr_assert_eq(((float *)d_hidden.data)[i], 0.0f);
}

/* The head's log-probabilities are those of the full logits. */
Test(model_calls, logprob_is_log_softmax) {
    esp_tensor hidden;
    const esp_batch b = good();
    float lp[6], entropy[6], *logits = malloc(6 * 160 * sizeof *logits);
    cr_assert_not_null(logits);
    cr_assert_eq(esp_model_forward_only(model, &b, &hidden), ESP_OK);
    cr_assert_eq(esp_model_logits(model, &hidden, logits, 6 * 160), ESP_OK);
    cr_assert_eq(esp_model_logprob(model, &b, &hidden, 0.7f, lp, entropy), ESP_OK);
    for (int t = 0; t < 6; t++) {
        if (t == 0 || t == 4) { /* first tokens: not counted */
            cr_expect_eq(lp[t], 0);
            continue;
        }
        double sum = 0, h = 0;
        for (int v = 0; v < 160; v++) sum += exp(logits[(t - 1) * 160 + v] / (double)0.7f);
        for (int v = 0; v < 160; v++) {
            const double z = logits[(t - 1) * 160 + v] / (double)0.7f - log(sum);
            h -= exp(z) * z;
        }
        const double expected = logits[(t - 1) * 160 + ids[t]] / (double)0.7f - log(sum);
        cr_expect(fabs(lp[t] - expected) <= 1e-5, "token %d: %g, expected %g", t, (double)lp[t], expected);
        cr_expect(fabs(entropy[t] - h) <= 1e-5, "token %d: entropy %g, expected %g", t, (double)entropy[t], h);
    }
    free(logits);
}

Test(model_calls, bad_configs) {
    esp_model *m;
    EXPECT(esp_model_load(&m, ctx, MODEL, &ESP_MODEL_CONFIG(.lora_rank = -1)), ESP_ERR_ARG, "lora_rank", "-1");
    EXPECT(esp_model_load(&m, ctx, MODEL, &ESP_MODEL_CONFIG(.lora_targets = ESP_LORA_ALL | ESP_LORA_NOTHING)), ESP_ERR_ARG, "lora_targets",
           "alone");
    EXPECT(esp_model_load(&m, ctx, NARROW_MODEL, &ESP_MODEL_CONFIG(.experts = ESP_MXFP4)), ESP_ERR_UNSUPPORTED, "MXFP4", "48", "24",
           "multiples of 32");
    EXPECT(esp_model_load(&m, ctx, MODEL, &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE, .double_quant = true)), ESP_ERR_ARG, "double_quant");
    EXPECT(esp_model_load(&m, ctx, "/nowhere/at/all", NULL), ESP_ERR_IO, "/nowhere/at/all");
    EXPECT(esp_model_load(&m, NULL, MODEL, NULL), ESP_ERR_ARG, "NULL");
    cr_expect_null(m);
}

Test(model_calls, memory_limit) {
    esp_ctx *small;
    esp_model *m;
    cr_assert_eq(esp_ctx_create(&small, &ESP_CTX_CONFIG(.memory_limit = 100000)), ESP_OK);
    EXPECT(esp_model_load(&m, small, MODEL, NULL), ESP_ERR_MEMORY, "100000");
    esp_memory memory = ESP_MEMORY_INIT;
    cr_assert_eq(esp_ctx_memory(small, &memory), ESP_OK);
    cr_expect_eq(memory.live, 0);
    esp_ctx_destroy(small);
}

Test(block_calls, wrong) {
    esp_moe *moe;
    float w[4 * 8] = {0}, x[8 * 2] = {0}, out[8 * 2];
    esp_moe_memory sizes = ESP_MOE_MEMORY_INIT;
    cr_assert_eq(esp_ctx_create(&ctx, NULL), ESP_OK);
    EXPECT(esp_moe_create(&moe, ctx, &ESP_MOE_CONFIG(.hidden = 8, .experts = 2, .top_k = 3, .width = 4)), ESP_ERR_ARG, "top_k 3",
           "2 experts");
    EXPECT(esp_moe_create(&moe, ctx, &ESP_MOE_CONFIG(.hidden = 8, .experts = 2, .top_k = 1)), ESP_ERR_ARG, "width 0");
    cr_assert_eq(esp_moe_create(&moe, ctx, &ESP_MOE_CONFIG(.hidden = 8, .experts = 2, .top_k = 1, .width = 4, .lora_rank = 2)), ESP_OK,
                 "%s", esp_last_error());
    EXPECT(esp_moe_sizes(moe, (int64_t)INT32_MAX + 1, &sizes), ESP_ERR_ARG, "routed rows");
    cr_assert_eq(esp_moe_sizes(moe, 2, &sizes), ESP_OK);
    void *saved = aligned_alloc(64, sizes.saved), *scratch = aligned_alloc(64, sizes.scratch);
    cr_assert(saved && scratch);
    EXPECT(esp_moe_forward(moe, out, x, 2, saved, scratch), ESP_ERR_STATE, "router", "esp_moe_set_router");
    cr_assert_eq(esp_moe_set_router(moe, w), ESP_OK);
    EXPECT(esp_moe_forward(moe, out, x, 2, saved, scratch), ESP_ERR_STATE, "expert 0");
    EXPECT(esp_moe_set_expert(moe, 2, w, w, w), ESP_ERR_ARG, "2", "0 to 1");
    w[5] = NAN;
    EXPECT(esp_moe_set_expert(moe, 0, w, w, w), ESP_ERR_NONFINITE, "gate of expert 0", "element 5");
    w[5] = 0;
    for (int e = 0; e < 2; e++) cr_assert_eq(esp_moe_set_expert(moe, e, w, w, w), ESP_OK, "%s", esp_last_error());
    /* A second setting that fails half-way leaves the expert unset, not a mixture of old and new. */
    float broken[4 * 8] = {0};
    broken[0] = INFINITY;
    EXPECT(esp_moe_set_expert(moe, 1, w, broken, w), ESP_ERR_NONFINITE, "up of expert 1");
    EXPECT(esp_moe_forward(moe, out, x, 2, saved, scratch), ESP_ERR_STATE, "expert 1");
    cr_assert_eq(esp_moe_set_expert(moe, 1, w, w, w), ESP_OK, "%s", esp_last_error());
    EXPECT(esp_moe_backward(moe, out, x, x, 2, saved, scratch), ESP_ERR_STATE, "esp_moe_forward");
    cr_assert_eq(esp_moe_forward(moe, out, x, 2, saved, scratch), ESP_OK, "%s", esp_last_error());
    EXPECT(esp_moe_backward(moe, out, x, x, 1, saved, scratch), ESP_ERR_SHAPE, "1 tokens", "2");
    EXPECT(esp_moe_forward(moe, out, x, 2, (char *)saved + 1, scratch), ESP_ERR_ARG, "aligned");
    cr_expect_eq(esp_moe_forward(moe, NULL, NULL, 0, saved, scratch), ESP_OK);
    free(saved);
    free(scratch);
    esp_moe_destroy(moe);
    esp_ctx_destroy(ctx);
}
