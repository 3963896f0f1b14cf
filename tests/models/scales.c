/* Scales of double quantisation are restored with two roundings on every backend: a model that keeps them in 8 bits gives the bits of one that
 * holds them restored.  A backend that packs experts restores them when it does, by the library's function. */
#include "espalier/espalier.h"
#include "kernels/backend.h"
#include "models/model.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

#define MODEL ESP_SOURCE_DIR "/tests/golden/data/q3a/model"

enum { TOKENS = 24 };

static void hidden_of(float *out, esp_model *model) {
    int32_t ids[TOKENS];
    for (int32_t t = 0; t < TOKENS; t++) ids[t] = (t * 37 + 11) % 160;
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = (const int32_t[]){0, TOKENS}, .n_tokens = TOKENS, .n_seqs = 1);
    esp_tensor hidden;
    cr_assert_eq(esp_model_forward_only(model, &batch, &hidden), ESP_OK, "%s", esp_last_error());
    memcpy(out, hidden.data, (size_t)TOKENS * 64 * sizeof *out);
}

/* The same stack with its scales restored by the library's own function, whose file has no contraction. */
static float *restore(espi_stack *w) {
    const int64_t parts = w->experts * w->parts;
    float *absmax = malloc((size_t)(parts * w->part_blocks) * sizeof *absmax);
    cr_assert_not_null(absmax);
    for (int64_t p = 0; p < parts; p++)
        cr_assert_eq(esp_absmax_dequantize(absmax + p * w->part_blocks, w->absmax8 + p * w->part_blocks, w->nested + p * w->part_nested,
                                           w->offset[p], w->map, w->part_blocks),
                     ESP_OK);
    w->absmax8 = NULL;
    w->absmax = absmax;
    return absmax;
}

Test(scales, restored_alike_on_every_backend) {
    int backends = 0;
    for (const espi_backend *const *b = espi_backends_cpu; *b; b++) {
        if (!(*b)->available() || (*b)->pack) continue;
        esp_ctx *ctx;
        esp_model *model;
        float kept[TOKENS * 64], restored[TOKENS * 64], *owned[8];
        int n = 0;
        cr_assert_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = (*b)->name)), ESP_OK, "%s", esp_last_error());
        cr_assert_eq(esp_model_load(&model, ctx, MODEL, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .double_quant = true)), ESP_OK, "%s",
                     esp_last_error());
        hidden_of(kept, model);
        for (int64_t l = 0; l < model->config.layers; l++) {
            cr_assert_not_null(model->layers[l].gate_up.absmax8);
            owned[n++] = restore(&model->layers[l].gate_up);
            owned[n++] = restore(&model->layers[l].down);
        }
        hidden_of(restored, model);
        cr_expect(memcmp(kept, restored, sizeof kept) == 0, "%s: 8-bit scales give other bits", (*b)->name);
        while (n > 0) free(owned[--n]);
        esp_model_destroy(model);
        esp_ctx_destroy(ctx);
        backends++;
    }
    cr_expect_gt(backends, 0);
}
