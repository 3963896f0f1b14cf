/* What bitsandbytes has quantised besides single experts of Qwen3-MoE: dense matrices, whole stacks, other storage dtypes, some tensors and
 * not others. */
#include "core/status.h"
#include "espalier/quant.h"
#include "loaded.h"
#include "models/load.h"
#include "quantise_item.h"

#include <math.h>

/* Writes the checkpoint, loads it, closes it. */
static esp_status load_edited(loaded *l, checkpoint *c, const esp_model_config *options) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    checkpoint_write(c, dir);
    const esp_status status = loaded_try(l, dir, options);
    scratch_remove(dir);
    return status;
}

/* Attention and head-less dense matrices are restored exactly, in either format, nested or not; the experts beside them are quantised as
 * ever, and one of a kind may be 4-bit where the next is not. */
Test(bnb, dense_matrices_are_restored) {
    static const char *const names[] = {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight",
                                        "model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight"};
    loaded l, plain;
    const float *want[4];
    checkpoint *c = checkpoint_open("q3a/model");
    for (int i = 0; i < 4; i++) want[i] = quantise_item(c, names[i], i & 1 ? ESP_FP4 : ESP_NF4, i & 2);
    OK(load_edited(&l, c, NULL));
    loaded_golden(&plain, "q3a/model", NULL);
    const espi_layer *w = l.model->layers;
    const espi_mat *got[] = {&w[0].q.w, &w[0].k.w, &w[1].v.w, &w[1].o.w};
    for (int i = 0; i < 4; i++)
        cr_expect_eq(memcmp(got[i]->data, want[i], (size_t)(got[i]->rows * got[i]->cols) * sizeof(float)), 0, "%s", names[i]);
    const espi_stack *s = &w[1].gate_up, *p = &plain.model->layers[1].gate_up;
    cr_expect_eq(memcmp(s->data, p->data, (size_t)(s->experts * s->parts) * s->part_bytes), 0);
    cr_expect_eq(memcmp(w[1].q.w.data, plain.model->layers[1].q.w.data, 128 * 64 * sizeof(float)), 0, "a plain one beside them");
    cr_expect_str_empty(l.log, "%s", l.log);
    loaded_free(&l);
    loaded_free(&plain);
    checkpoint_close(c);
}

/* More values than the staging buffer takes at once: a nested block then begins in one piece and ends in the next. */
Test(bnb, dense_matrix_in_pieces) {
    char dir[ESPI_PATH_MAX], name[] = "model.layers.0.self_attn.q_proj.weight";
    loaded l;
    espi_loader loader;
    float got[128 * 64];
    checkpoint *c = checkpoint_open("q3a/model");
    const float *want = quantise_item(c, name, ESP_NF4, true);
    scratch_make(dir);
    checkpoint_write(c, dir);
    OK(loaded_try(&l, dir, NULL));
    OK(espi_loader_open(&loader, l.model, dir));
    loader.raw_bytes = 32 * 192;
    OK(espi_bnb_load_dense(&loader, &(espi_mat){.data = got, .dtype = ESP_F32, .rows = 128, .cols = 64}, name));
    cr_expect_eq(memcmp(got, want, sizeof got), 0);
    espi_loader_close(&loader);
    loaded_free(&l);
    checkpoint_close(c);
    scratch_remove(dir);
}

/* Experts in 4 bits and not, within one layer. */
Test(bnb, decided_per_tensor) {
    loaded a, b;
    checkpoint *c = checkpoint_open("q3a/model");
    for (int e = 0; e < 8; e += 3) {
        char name[100];
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.down_proj.weight", e);
        quantise_item(c, name, ESP_NF4, false);
    }
    OK(load_edited(&a, c, NULL));
    loaded_golden(&b, "q3a/model", NULL);
    cr_expect(loaded_same(&a, &b));
    loaded_free(&a);
    loaded_free(&b);
    checkpoint_close(c);
}

/* quant_storage: the same bytes under other names. */
Test(bnb, storage_dtypes) {
    static const esp_dtype dtypes[] = {ESP_BF16, ESP_F16, ESP_F32};
    for (int i = 0; i < 3; i++) {
        loaded a, b;
        checkpoint *c = checkpoint_open("q3a/model_nf4");
        for (size_t k = 0; k < c->n; k++) {
            espi_st_item *item = &c->items[k];
            if (!strstr(item->name, "_proj.weight") || item->dtype != ESP_U8 || strstr(item->name, "quant_state")) continue;
            item->dtype = dtypes[i];
            item->dims[0] /= (int64_t)esp_dtype_size(dtypes[i]);
        }
        OK(load_edited(&a, c, NULL));
        loaded_golden(&b, "q3a/model_nf4", NULL);
        cr_expect(loaded_same(&a, &b), "%s", esp_dtype_name(dtypes[i]));
        loaded_free(&a);
        loaded_free(&b);
        checkpoint_close(c);
    }
}

/* A table whose last places differ, as GPU builds have it, is the format's. */
Test(bnb, table_within_rounding) {
    loaded a, b;
    checkpoint *c = checkpoint_open("q3a/model_nf4");
    float *table = (float *)checkpoint_item(c, "model.layers.0.mlp.experts.1.up_proj.weight.quant_map")->data;
    table[3] = nextafterf(table[3], 0);
    OK(load_edited(&a, c, NULL));
    loaded_golden(&b, "q3a/model_nf4", NULL);
    cr_expect(loaded_same(&a, &b));
    loaded_free(&a);
    loaded_free(&b);
    checkpoint_close(c);
}

static void expect_refused(checkpoint *c, const esp_model_config *options, esp_status status, const char *said) {
    loaded l;
    cr_expect_eq(load_edited(&l, c, options), status, "%s", esp_last_error());
    cr_expect(strstr(esp_last_error(), said), "'%s' not said: %s", said, esp_last_error());
    loaded_free(&l);
    checkpoint_close(c);
}

#define FUSED_DOWN "model.layers.0.mlp.experts.down_proj"
#define FUSED "model.layers.0.mlp.experts.gate_up_proj"

static void turn_last_dims(checkpoint *c, const char *name) {
    espi_st_item *item = checkpoint_item(c, name);
    const int64_t last = item->dims[2];
    item->dims[2] = item->dims[1];
    item->dims[1] = last;
}

/* Stacks stored as one array that cannot be taken as they are. */
Test(bnb, fused_refused) {
    checkpoint *c = checkpoint_open("q3c/model_fused");
    turn_last_dims(c, FUSED_DOWN); /* [E,in,out], as gpt-oss's class has its parameters; gate_up is square here and does not tell */
    quantise_item(c, FUSED_DOWN, ESP_NF4, false);
    expect_refused(c, NULL, ESP_ERR_UNSUPPORTED, "blocks run along the other axis");

    c = checkpoint_open("q3c/model_fused");
    quantise_item(c, FUSED, ESP_FP4, false);
    expect_refused(c, NULL, ESP_ERR_MISMATCH, "stored as fp4, expected nf4: load it with experts = fp4");

    c = checkpoint_open("q3c/model_fused");
    checkpoint_item(c, FUSED)->dims[0] = 5;
    quantise_item(c, FUSED, ESP_NF4, false);
    expect_refused(c, NULL, ESP_ERR_SHAPE, "quant_state has shape [5,48,48], expected [6,48,48]");

    c = checkpoint_open("q3c/model_fused");
    quantise_item(c, FUSED, ESP_NF4, false);
    checkpoint_item(c, FUSED ".absmax")->dims[0]--;
    expect_refused(c, NULL, ESP_ERR_SHAPE, "expected [216]");

    /* Experts of one layer in both layouts: which of them is meant? */
    c = checkpoint_open("q3a/model_nf4");
    checkpoint_add(c, FUSED, ESP_U8, 2, (int64_t[]){2, 1}, "xx", 2);
    expect_refused(c, NULL, ESP_ERR_FORMAT, "expected the experts of a layer once");

    /* 4-bit experts asked for as plain values. */
    c = checkpoint_open("q3a/model_nf4");
    expect_refused(c, &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE), ESP_ERR_MISMATCH, "stored as nf4, expected none");
}
