/* Adapters: our files come back bit for bit, PEFT's files mean what PEFT says they mean, and what is wrong with a file is named. */
#include "adapter_files.h"

/* ---- our own files ---- */

/* q3b has dense layers too.  Rank 3 is not the number of experts, nor a divisor of it. */
static void round_trip(const char *backend, const char *other_backend, bool rslora, unsigned targets) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    esp_ctx *ctx = context(backend), *other = context(other_backend);
    const esp_model_config config = ESP_MODEL_CONFIG(.lora_rank = 3, .lora_alpha = 5, .rslora = rslora, .lora_targets = targets, .seed = 7);
    esp_model *a = load(ctx, DATA "q3b/model", &config), *b = load(other, DATA "q3b/model", &config);
    fill(a);
    OK(esp_model_save_adapter(a, dir));
    cr_expect_eq(scratch_count(dir), 2, "no temporary file stays");
    OK(esp_model_load_adapter(b, dir));
    expect_equal(a, b);
    esp_model *c = load(other, DATA "q3b/model", &ESP_MODEL_CONFIG(.adapter_dir = dir));
    expect_equal(a, c);
    for (int t = 0; t < ESPI_T_COUNT; t++) cr_expect(fabs(a->lora[t].scale - c->lora[t].scale) < 1e-7 || a->lora[t].r == 0);
    esp_model_destroy(a), esp_model_destroy(b), esp_model_destroy(c);
    esp_ctx_destroy(ctx), esp_ctx_destroy(other);
    scratch_remove(dir);
}

Test(adapter, saved_and_loaded_bit_for_bit) {
    round_trip("ref", "ref", false, ESP_LORA_ALL);
}

Test(adapter, rank_stabilised_and_some_targets) {
    round_trip("ref", "ref", true, ESP_LORA_Q | ESP_LORA_DOWN);
    round_trip("ref", "ref", false, ESP_LORA_GATE_UP);
}

Test(adapter, between_precisions) {
    round_trip("ref64", "ref", false, ESP_LORA_ALL);
    round_trip("ref", "ref64", false, ESP_LORA_ALL);
}

/* The first values depend on the seed alone, not on the precision or on what else trains. */
Test(adapter, first_values) {
    esp_ctx *f32 = context("ref"), *f64 = context("ref64");
    esp_model *a = load(f32, DATA "q3a/model", &ESP_MODEL_CONFIG(.seed = 3)),
              *b = load(f64, DATA "q3a/model", &ESP_MODEL_CONFIG(.seed = 3));
    esp_model *c = load(f32, DATA "q3a/model", &ESP_MODEL_CONFIG(.seed = 4));
    esp_model *d = load(f32, DATA "q3a/model", &ESP_MODEL_CONFIG(.seed = 3, .lora_targets = ESP_LORA_DOWN));
    expect_equal(a, b);
    const espi_lora *x = &a->layers[1].lora_down, *y = &c->layers[1].lora_down, *z = &d->layers[1].lora_down;
    const int64_t n = 8 * x->r * 32;
    int64_t same = 0;
    double most = 0;
    for (int64_t i = 0; i < n; i++) {
        same += ((const float *)x->a)[i] == ((const float *)y->a)[i];
        most = fmax(most, fabs(value(x->a, i, a)));
        cr_assert_eq(((const float *)x->a)[i], ((const float *)z->a)[i]);
    }
    cr_expect_lt(same, 3, "another seed, other values");
    cr_expect(most <= 1 / sqrt(32.0) && most > 0.99 / sqrt(32.0), "uniform in +-1/sqrt(in): got %g", most);
    for (int64_t i = 0; i < 8 * 64 * x->r; i++) cr_assert_eq(((const float *)x->b)[i], 0);
    esp_model_destroy(a), esp_model_destroy(b), esp_model_destroy(c), esp_model_destroy(d);
    esp_ctx_destroy(f32), esp_ctx_destroy(f64);
}

/* ---- PEFT's files ---- */

/* Gate and up with an A each: held at twice the rank, the same product. */
Test(adapter, separate_gate_and_up) {
    esp_ctx *ctx = context("ref");
    esp_model *m = load(ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.adapter_dir = DATA "q3a/adapter_2d"));
    const espi_layer *w = &m->layers[1];
    cr_assert_eq(m->lora[ESPI_T_GATE_UP].r, 8);
    cr_assert_eq(m->lora[ESPI_T_DOWN].r, 4);
    cr_assert_eq(m->lora[ESPI_T_K].r, 0);
    cr_expect(fabs(m->lora[ESPI_T_GATE_UP].scale - 2) < 1e-12, "alpha / r of the file, not of the doubled rank");
    espi_st_file *file = golden_open("q3a/adapter_2d/adapter_model.safetensors");
    double want[64 * 64] = {0};
    static const char *const names[] = {"gate_proj", "up_proj"};
    for (int half = 0; half < 2; half++) {
        char name[256];
        snprintf(name, sizeof name, "base_model.model.model.layers.1.mlp.experts.7.%s.lora_A.weight", names[half]);
        double *a = golden_read(file, name, NULL);
        *strstr(name, "lora_A") = 0;
        strcat(name, "lora_B.weight");
        double *b = golden_read(file, name, NULL);
        for (int o = 0; o < 32; o++)
            for (int k = 0; k < 4; k++)
                for (int i = 0; i < 64; i++) want[(half * 32 + o) * 64 + i] += 2 * b[o * 4 + k] * a[k * 64 + i];
        free(a), free(b);
    }
    expect_delta(m, &w->gate_up, &w->lora_gate_up, 7, want, "expert 7");
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    OK(esp_model_save_adapter(m, dir));
    esp_model *again = load(ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.adapter_dir = dir));
    expect_equal(m, again);
    esp_model_destroy(again);
    scratch_remove(dir);
    espi_st_close(file);
    esp_model_destroy(m);
    esp_ctx_destroy(ctx);
}

/* With one stack trained its keys have no base_layer; the config says which it is. */
Test(adapter, one_fused_stack) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    checkpoint *c = adapter_open("q3a/adapter");
    for (size_t i = c->n; i-- > 0;) {
        char *inner = strstr(c->items[i].name, ".base_layer");
        if (strstr(c->items[i].name, "experts.lora_")) {
            checkpoint_drop(c, c->items[i].name);
        } else if (inner) {
            char *name = checkpoint_own(c, calloc(1, 256));
            snprintf(name, 256, "%.*s%s", (int)(inner - c->items[i].name), c->items[i].name, inner + strlen(".base_layer"));
            c->items[i].name = name;
        }
    }
    checkpoint_set(c, "target_parameters", "[\"mlp.experts.gate_up_proj\"]");
    checkpoint_write(c, dir);
    esp_ctx *ctx = context("ref");
    esp_model *one = load(ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.adapter_dir = dir));
    esp_model *both = load(ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.adapter_dir = DATA "q3a/adapter"));
    cr_expect_eq(one->lora[ESPI_T_DOWN].r, 0);
    cr_assert_eq(one->lora[ESPI_T_GATE_UP].r, 4);
    cr_expect_eq(memcmp(one->layers[1].lora_gate_up.b, both->layers[1].lora_gate_up.b, 8 * 64 * 4 * sizeof(float)), 0);
    checkpoint_set(c, "target_parameters", NULL);
    checkpoint_write(c, dir);
    esp_model *none = NULL;
    cr_expect_eq(esp_model_load(&none, ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.adapter_dir = dir)), ESP_ERR_FORMAT);
    cr_expect(strstr(esp_last_error(), "target_parameters"), "%s", esp_last_error());
    esp_model_destroy(one), esp_model_destroy(both);
    esp_ctx_destroy(ctx);
    checkpoint_close(c);
    scratch_remove(dir);
}

/* ---- what is wrong is named ---- */

#define FUSED "base_model.model.model.layers.1.mlp.experts.base_layer."
#define Q "base_model.model.model.layers.1.self_attn.q_proj."

typedef struct wrong {
    const char *key, *json; /* a field of the config and its new value */
    const char *tensor;
    char what; /* to the tensor: d dropped, x one more of that name, s another shape, n NaN, i I32 */
    esp_status status;
    const char *names; /* in the sentence */
} wrong;

static const wrong wrongs[] = {
    {.key = "rank_pattern", .json = "{\"q_proj\": 2}", .status = ESP_ERR_SHAPE, .names = "q_proj"},
    {.key = "rank_pattern", .json = "{\"q_proj\": 2.5}", .status = ESP_ERR_FORMAT, .names = "rank_pattern"},
    {.key = "rank_pattern", .json = "{\"q_proj\": \"2\"}", .status = ESP_ERR_FORMAT, .names = "rank_pattern"},
    {.key = "rank_pattern", .json = "{\"layers.1.self_attn.q_proj\": 2}", .status = ESP_ERR_UNSUPPORTED, .names = "layer 1"},
    {.key = "alpha_pattern", .json = "{\"layers.1.mlp.experts.down_proj\": 2}", .status = ESP_ERR_UNSUPPORTED, .names = "layer 1"},
    {.key = "alpha_pattern", .json = "{\"q_proj(\": 2}", .status = ESP_ERR_FORMAT, .names = "q_proj("},
    {.key = "alpha_pattern", .json = "3", .status = ESP_ERR_FORMAT, .names = "alpha_pattern"},
    {.key = "alpha_pattern", .json = "{\"q_proj\": -1}", .status = ESP_ERR_FORMAT, .names = "q_proj"},
    {.key = "lora_B_layout", .json = "\"expert_major\"", .status = ESP_ERR_UNSUPPORTED, .names = "expert_major"},
    {.key = "init_lora_weights", .json = "\"pissa_niter_4\"", .status = ESP_ERR_UNSUPPORTED, .names = "pissa_niter_4"},
    {.key = "alora_invocation_tokens", .json = "[1, 2]", .status = ESP_ERR_UNSUPPORTED, .names = "alora_invocation_tokens"},
    {.key = "use_dora", .json = "true", .status = ESP_ERR_UNSUPPORTED, .names = "use_dora"},
    {.key = "bias", .json = "\"all\"", .status = ESP_ERR_UNSUPPORTED, .names = "bias"},
    {.key = "lora_bias", .json = "true", .status = ESP_ERR_UNSUPPORTED, .names = "lora_bias"},
    {.key = "modules_to_save", .json = "[\"lm_head\"]", .status = ESP_ERR_UNSUPPORTED, .names = "modules_to_save"},
    {.key = "peft_type", .json = "\"LOHA\"", .status = ESP_ERR_UNSUPPORTED, .names = "LOHA"},
    {.key = "target_parameters", .json = "[\"mlp.gate.weight\"]", .status = ESP_ERR_UNSUPPORTED, .names = "mlp.gate.weight"},
    {.key = "r", .json = "0", .status = ESP_ERR_FORMAT, .names = "r: got 0"},
    {.key = "r", .json = NULL, .status = ESP_ERR_FORMAT, .names = "adapter_config.json"},
    {.key = "r", .json = "5", .status = ESP_ERR_SHAPE, .names = "lora_A"},
    {.key = "lora_alpha", .json = "-1", .status = ESP_ERR_FORMAT, .names = "lora_alpha"},
    {.tensor = Q "lora_B.weight", .what = 'd', .status = ESP_ERR_FORMAT, .names = Q "lora_B.weight"},
    {.tensor = FUSED "lora_A.weight", .what = 'd', .status = ESP_ERR_FORMAT, .names = FUSED "lora_A.weight"},
    {.tensor = "base_model.model.lm_head.lora_A.weight", .what = 'x', .status = ESP_ERR_MISMATCH, .names = "lm_head.lora_A"},
    {.tensor = Q "lora_A.weight", .what = 's', .status = ESP_ERR_SHAPE, .names = Q "lora_A.weight"},
    {.tensor = FUSED "lora_B.weight", .what = 's', .status = ESP_ERR_SHAPE, .names = FUSED "lora_B.weight"},
    {.tensor = Q "lora_A.weight", .what = 'n', .status = ESP_ERR_NONFINITE, .names = Q "lora_A.weight, element 3"},
    {.tensor = Q "lora_A.weight", .what = 'i', .status = ESP_ERR_DTYPE, .names = Q "lora_A.weight"},
};

static void damage(checkpoint *c, const wrong *w) {
    if (w->key) checkpoint_set(c, w->key, w->json);
    if (!w->tensor) return;
    const float one = 1;
    if (w->what == 'x') {
        checkpoint_add(c, w->tensor, ESP_F32, 1, (int64_t[]){1}, &one, sizeof one);
        return;
    }
    espi_st_item *item = checkpoint_item(c, w->tensor);
    if (w->what == 'd') checkpoint_drop(c, w->tensor);
    if (w->what == 's') item->dims[0] *= 2, item->dims[1] /= 2;
    if (w->what == 'n') ((float *)item->data)[3] = NAN;
    if (w->what == 'i') item->dtype = ESP_I32;
}

/* Each in a folder of its own; a model that has an adapter keeps it. */
Test(adapter, wrong_files) {
    esp_ctx *ctx = context("ref");
    esp_model *m = load(ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.adapter_dir = DATA "q3a/adapter"));
    esp_model *same = load(ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.adapter_dir = DATA "q3a/adapter"));
    for (size_t i = 0; i < sizeof wrongs / sizeof *wrongs; i++) {
        const wrong *w = &wrongs[i];
        char dir[ESPI_PATH_MAX];
        scratch_make(dir);
        checkpoint *c = adapter_open("q3a/adapter");
        damage(c, w);
        checkpoint_write(c, dir);
        esp_model *fresh = NULL;
        const esp_status status = esp_model_load(&fresh, ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.adapter_dir = dir));
        cr_expect_eq(status, w->status, "%zu: %s %s: got %s: %s", i, w->key ? w->key : "", w->tensor ? w->tensor : "",
                     esp_status_name(status), esp_last_error());
        cr_expect(strstr(esp_last_error(), w->names), "%zu: %s", i, esp_last_error());
        cr_expect(strstr(esp_last_error(), dir), "%zu: no file: %s", i, esp_last_error());
        cr_expect_null(fresh);
        cr_expect_neq(esp_model_load_adapter(m, dir), ESP_OK, "%zu", i);
        expect_equal(m, same);
        checkpoint_close(c);
        scratch_remove(dir);
    }
    esp_model_destroy(m), esp_model_destroy(same);
    esp_ctx_destroy(ctx);
}

/* An adapter that another model trained. */
Test(adapter, another_rank_or_scale) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    esp_ctx *ctx = context("ref");
    esp_model *a = load(ctx, DATA "q3a/model", &ESP_MODEL_CONFIG(.lora_rank = 3));
    OK(esp_model_save_adapter(a, dir));
    const esp_model_config others[] = {ESP_MODEL_CONFIG(.lora_rank = 4), ESP_MODEL_CONFIG(.lora_rank = 3, .lora_alpha = 1),
                                       ESP_MODEL_CONFIG(.lora_rank = 3, .rslora = true),
                                       ESP_MODEL_CONFIG(.lora_rank = 3, .lora_targets = ESP_LORA_EXPERTS)};
    for (int i = 0; i < 4; i++) {
        esp_model *b = load(ctx, DATA "q3a/model", &others[i]);
        cr_expect_eq(esp_model_load_adapter(b, dir), ESP_ERR_MISMATCH, "%d: %s", i, esp_last_error());
        esp_model_destroy(b);
    }
    esp_model_destroy(a);
    esp_ctx_destroy(ctx);
    scratch_remove(dir);
}
