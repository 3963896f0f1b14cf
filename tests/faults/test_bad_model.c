/* Model folders that are wrong in one way each: the status, and a sentence that names file, tensor, got and expected. */
#include "core/status.h"
#include "loaded.h"

#include <math.h>

static void drop(checkpoint *c, const char *name, const char *other) {
    checkpoint_drop(c, name);
    if (other) checkpoint_drop(c, other);
}

/* A copy of tensor `like` (its name in `other`) under another name. */
static void copy(checkpoint *c, const char *name, const char *other) {
    const espi_st_item item = *checkpoint_item(c, other);
    c->items[c->n] = item;
    c->items[c->n++].name = name;
}

static void rename_tensor(checkpoint *c, const char *name, const char *other) {
    checkpoint_item(c, name)->name = other;
}

static void add_one(checkpoint *c, const char *name, const char *other) {
    const float value = 1;
    (void)other;
    checkpoint_add(c, name, ESP_F32, 1, (int64_t[]){1}, &value, sizeof value);
}

/* Other dimensions for the same bytes. */
static void transpose(checkpoint *c, const char *name, const char *other) {
    espi_st_item *item = checkpoint_item(c, name);
    (void)other;
    const int64_t last = item->dims[item->rank - 1];
    item->dims[item->rank - 1] = item->dims[item->rank - 2];
    item->dims[item->rank - 2] = last;
}

static void flatten(checkpoint *c, const char *name, const char *other) {
    espi_st_item *item = checkpoint_item(c, name);
    (void)other;
    item->dims[0] *= item->dims[1];
    item->rank = 1;
}

static void lose_a_row(checkpoint *c, const char *name, const char *other) {
    (void)other;
    checkpoint_item(c, name)->dims[0]--;
}

static void as_integers(checkpoint *c, const char *name, const char *other) {
    (void)other;
    checkpoint_item(c, name)->dtype = ESP_I32;
}

static void as_f16(checkpoint *c, const char *name, const char *other) {
    (void)other;
    checkpoint_item(c, name)->dtype = ESP_F16;
}

static void as_signed(checkpoint *c, const char *name, const char *other) {
    (void)other;
    checkpoint_item(c, name)->dtype = ESP_I8;
}

static void set_config(checkpoint *c, const char *key, const char *value) {
    checkpoint_set(c, key, value);
}

/* Element 5 becomes what the text says. */
static void spoil(checkpoint *c, const char *name, const char *value) {
    espi_st_item *item = checkpoint_item(c, name);
    const float f = strtof(value, NULL);
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    const uint16_t high = (uint16_t)(bits >> 16);
    if (item->dtype == ESP_F32)
        memcpy((char *)item->data + 5 * sizeof f, &f, sizeof f);
    else
        memcpy((char *)item->data + 5 * sizeof high, &high, sizeof high);
}

/* Other bytes of the same length, from the front. */
static void overwrite(checkpoint *c, const char *name, const char *text) {
    memcpy((void *)checkpoint_item(c, name)->data, text, strlen(text));
}

/* Puts `to` where the first `from` stands in a JSON text; "from|to". */
static void edit(checkpoint *c, const char *name, const char *change) {
    espi_st_item *item = checkpoint_item(c, name);
    char from[100], text[400];
    const char *bar = strchr(change, '|');
    snprintf(from, sizeof from, "%.*s", (int)(bar - change), change);
    snprintf(text, sizeof text, "%.*s", (int)item->dims[0], (const char *)item->data);
    const char *at = strstr(text, from);
    cr_assert_not_null(at, "%s in %s", from, text);
    char *edited = checkpoint_own(c, malloc(500));
    snprintf(edited, 500, "%.*s%s%s", (int)(at - text), text, bar + 1, at + strlen(from));
    item->dims[0] = (int64_t)strlen(edited);
    item->data = edited;
}

#define L0 "model.layers.0."
#define L1 "model.layers.1."
#define E3 L1 "mlp.experts.3."
#define BNB E3 "up_proj.weight"
#define STATE BNB ".quant_state.bitsandbytes__nf4"

static const struct bad_case {
    const char *what, *model;
    void (*spoil)(checkpoint *c, const char *name, const char *argument);
    const char *name, *argument;
    esp_status status;
    const char *says[2];
} cases[] = {
    {"no embedding",
     "q3a/model",
     drop,
     "model.embed_tokens.weight",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor model.embed_tokens.weight is missing", "shape [160,64]"}},
    {"no head where it is not tied",
     "q3a/model",
     drop,
     "lm_head.weight",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor lm_head.weight is missing", "shape [160,64]"}},
    {"no final norm", "q3a/model", drop, "model.norm.weight", NULL, ESP_ERR_FORMAT, {"tensor model.norm.weight is missing", "shape [64]"}},
    {"no layer norm",
     "q3a/model",
     drop,
     L1 "input_layernorm.weight",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " L1 "input_layernorm.weight is missing", "shape [64]"}},
    {"no q norm",
     "q3a/model",
     drop,
     L1 "self_attn.q_norm.weight",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " L1 "self_attn.q_norm.weight is missing", "shape [32]"}},
    {"no value projection",
     "q3a/model",
     drop,
     L0 "self_attn.v_proj.weight",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " L0 "self_attn.v_proj.weight is missing", "shape [64,64]"}},
    {"no bias where attention_bias is true",
     "q3c/model",
     drop,
     L0 "self_attn.o_proj.bias",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " L0 "self_attn.o_proj.bias is missing", "shape [48]"}},
    {"no router",
     "q3a/model",
     drop,
     L1 "mlp.gate.weight",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " L1 "mlp.gate.weight is missing", "shape [8,64]"}},
    {"no up matrix of an expert",
     "q3a/model",
     drop,
     E3 "up_proj.weight",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " E3 "up_proj.weight is missing", "shape [32,64]"}},
    {"neither layout of experts",
     "q3a/model",
     drop,
     L1 "mlp.experts.0.gate_proj.weight",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " L1 "mlp.experts.0.gate_proj.weight is missing", L1 "mlp.experts.gate_up_proj"}},
    {"no fused down",
     "q3c/model_fused",
     drop,
     L1 "mlp.experts.down_proj",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " L1 "mlp.experts.down_proj is missing", "shape [6,48,24]"}},
    {"no fused tensors",
     "q3c/model_fused",
     drop,
     L1 "mlp.experts.down_proj",
     L1 "mlp.experts.gate_up_proj",
     ESP_ERR_FORMAT,
     {L1 "mlp.experts.0.gate_proj.weight is missing", L1 "mlp.experts.gate_up_proj"}},
    {"both layouts of experts",
     "q3c/model_fused",
     copy,
     L1 "mlp.experts.0.gate_proj.weight",
     L1 "mlp.gate.weight",
     ESP_ERR_FORMAT,
     {L1 "mlp.experts.0.gate_proj.weight", "expected the experts of a layer once"}},
    {"a bias where attention_bias is false",
     "q3a/model",
     copy,
     L0 "self_attn.q_proj.bias",
     L0 "self_attn.q_norm.weight",
     ESP_ERR_FORMAT,
     {"tensor " L0 "self_attn.q_proj.bias", "expected no such tensor"}},
    {"an expert more than config.json says",
     "q3a/model",
     copy,
     L0 "mlp.experts.8.up_proj.weight",
     L0 "mlp.experts.7.up_proj.weight",
     ESP_ERR_FORMAT,
     {"tensor " L0 "mlp.experts.8.up_proj.weight", "expected no such tensor"}},
    {"a layer more",
     "q3a/model",
     copy,
     "model.layers.2.input_layernorm.weight",
     L0 "input_layernorm.weight",
     ESP_ERR_FORMAT,
     {"tensor model.layers.2.input_layernorm.weight", "expected no such tensor"}},
    {"an unknown tensor",
     "q3a/model",
     add_one,
     L0 "self_attn.sinks",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " L0 "self_attn.sinks", "expected no such tensor"}},
    {"q transposed",
     "q3a/model",
     transpose,
     L0 "self_attn.q_proj.weight",
     NULL,
     ESP_ERR_SHAPE,
     {"tensor " L0 "self_attn.q_proj.weight: shape [64,128]", "expected [128,64]"}},
    {"router transposed",
     "q3a/model",
     transpose,
     L0 "mlp.gate.weight",
     NULL,
     ESP_ERR_SHAPE,
     {"tensor " L0 "mlp.gate.weight: shape [64,8]", "expected [8,64]"}},
    {"an expert's down transposed",
     "q3a/model",
     transpose,
     E3 "down_proj.weight",
     NULL,
     ESP_ERR_SHAPE,
     {"tensor " E3 "down_proj.weight: shape [32,64]", "expected [64,32]"}},
    {"fused experts in the order of another family",
     "q3c/model_fused",
     transpose,
     L0 "mlp.experts.down_proj",
     NULL,
     ESP_ERR_SHAPE,
     {"tensor " L0 "mlp.experts.down_proj: shape [6,24,48]", "expected [6,48,24]"}},
    {"an embedding of another vocabulary",
     "q3a/model",
     lose_a_row,
     "model.embed_tokens.weight",
     NULL,
     ESP_ERR_SHAPE,
     {"tensor model.embed_tokens.weight: shape [159,64]", "expected [160,64]"}},
    {"a flat matrix",
     "q3a/model",
     flatten,
     L1 "self_attn.o_proj.weight",
     NULL,
     ESP_ERR_SHAPE,
     {"tensor " L1 "self_attn.o_proj.weight: shape [8192]", "expected [64,128]"}},
    {"a norm of integers",
     "q3a/model",
     as_integers,
     L1 "input_layernorm.weight",
     NULL,
     ESP_ERR_DTYPE,
     {"tensor " L1 "input_layernorm.weight: dtype I32", "expected F32, BF16 or F16"}},
    {"an expert of integers",
     "q3a/model",
     as_integers,
     E3 "gate_proj.weight",
     NULL,
     ESP_ERR_DTYPE,
     {"tensor " E3 "gate_proj.weight: dtype I32", "expected F32, BF16 or F16"}},
    {"an embedding in another dtype than config.json says",
     "q3c/model",
     as_f16,
     "model.embed_tokens.weight",
     NULL,
     ESP_ERR_DTYPE,
     {"tensor model.embed_tokens.weight: dtype F16", "expected BF16"}},
    {"NaN in the embedding",
     "q3a/model",
     spoil,
     "model.embed_tokens.weight",
     "nan",
     ESP_ERR_NONFINITE,
     {"tensor model.embed_tokens.weight: element 5 is", "expected finite"}},
    {"infinity in a bf16 bias",
     "q3c/model",
     spoil,
     L1 "self_attn.k_proj.bias",
     "-inf",
     ESP_ERR_NONFINITE,
     {"tensor " L1 "self_attn.k_proj.bias: element 5 is -inf", "expected finite"}},
    {"NaN in a norm",
     "q3a/model",
     spoil,
     "model.norm.weight",
     "nan",
     ESP_ERR_NONFINITE,
     {"tensor model.norm.weight: element 5 is", "expected finite"}},
    {"NaN in an expert",
     "q3a/model",
     spoil,
     E3 "down_proj.weight",
     "nan",
     ESP_ERR_NONFINITE,
     {"tensor " E3 "down_proj.weight: element 5 is", "expected finite"}},
    {"infinity in fused experts",
     "q3c/model_fused",
     spoil,
     L1 "mlp.experts.gate_up_proj",
     "inf",
     ESP_ERR_NONFINITE,
     {"tensor " L1 "mlp.experts.gate_up_proj: element 5 is inf", "expected finite"}},
    {"another family",
     "q3a/model",
     set_config,
     "model_type",
     "\"llama\"",
     ESP_ERR_UNSUPPORTED,
     {"model_type: got \"llama\"", "expected one of: qwen3_moe"}},
    {"K > E", "q3a/model", set_config, "num_experts_per_tok", "9", ESP_ERR_FORMAT, {"num_experts_per_tok: got 9", "expected 1 to"}},
    {"fewer experts than stored",
     "q3a/model",
     set_config,
     "num_local_experts",
     "7",
     ESP_ERR_SHAPE,
     {"tensor " L0 "mlp.gate.weight: shape [8,64]", "expected [7,64]"}},
    {"more layers than stored",
     "q3a/model",
     set_config,
     "num_hidden_layers",
     "3",
     ESP_ERR_FORMAT,
     {"tensor model.layers.2.input_layernorm.weight is missing", "shape [64]"}},
    {"a 4-bit expert without codes", "q3a/model_nf4", drop, BNB, NULL, ESP_ERR_FORMAT, {"tensor " BNB " is missing", "shape [1024,1]"}},
    {"a 4-bit expert with fewer codes",
     "q3a/model_nf4",
     lose_a_row,
     BNB,
     NULL,
     ESP_ERR_SHAPE,
     {"tensor " BNB ": shape [1023,1]", "expected [1024,1]"}},
    {"a 4-bit expert without scales",
     "q3a/model_nf4",
     drop,
     BNB ".absmax",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " BNB ".absmax is missing", "shape [32]"}},
    {"a 4-bit expert without its table",
     "q3a/model_nf4",
     drop,
     BNB ".quant_map",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " BNB ".quant_map is missing", "shape [16]"}},
    {"a 4-bit expert without quant_state",
     "q3a/model_nf4",
     drop,
     STATE,
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " BNB ": has block scales but no quant_state.bitsandbytes__nf4 or", "expected one of them"}},
    {"a 4-bit format that nobody knows",
     "q3a/model_nf4",
     rename_tensor,
     STATE,
     BNB ".quant_state.bitsandbytes__nf3",
     ESP_ERR_FORMAT,
     {"tensor " BNB ": has block scales but no quant_state.bitsandbytes__nf4 or", "no other format is known"}},
    {"an expert in two 4-bit formats",
     "q3a/model_nf4",
     copy,
     BNB ".quant_state.bitsandbytes__fp4",
     STATE,
     ESP_ERR_FORMAT,
     {"tensor " BNB ": has a quant_state of nf4 and one of fp4", "expected one"}},
    {"codes under a dtype that is no storage",
     "q3a/model_nf4",
     as_signed,
     BNB,
     NULL,
     ESP_ERR_DTYPE,
     {"tensor " BNB ": dtype I8", "expected U8"}},
    {"scales with a NaN",
     "q3a/model_nf4",
     spoil,
     BNB ".absmax",
     "nan",
     ESP_ERR_NONFINITE,
     {"tensor " BNB ".absmax: element 5 is", "expected finite"}},
    {"a table of its own",
     "q3a/model_nf4",
     spoil,
     BNB ".quant_map",
     "-0.2",
     ESP_ERR_UNSUPPORTED,
     {"tensor " BNB ".quant_map: element 5 is -0.2", "expected -0.18477"}},
    {"blocks of 128", "q3a/model_nf4", edit, STATE, "64|128", ESP_ERR_UNSUPPORTED, {"tensor " BNB ": blocks of 128", "expected 64"}},
    {"a quant_state of another shape",
     "q3a/model_nf4",
     edit,
     STATE,
     "[32, 64]|[64, 32]",
     ESP_ERR_SHAPE,
     {"tensor " BNB ": quant_state has shape [64,32]", "expected [32,64]"}},
    {"a quant_state of another type than its name",
     "q3a/model_nf4",
     edit,
     STATE,
     "\"nf4\"|\"fp4\"",
     ESP_ERR_FORMAT,
     {"tensor " STATE ": quant_type \"fp4\"", "expected \"nf4\""}},
    {"a quant_state of rank 3",
     "q3a/model_nf4",
     edit,
     STATE,
     "[32, 64]|[1, 32, 64]",
     ESP_ERR_SHAPE,
     {"tensor " BNB ": quant_state has shape [1,32,64]", "expected [32,64]"}},
    {"a quant_state of rank 1",
     "q3a/model_nf4",
     edit,
     STATE,
     "[32, 64]|[2048]",
     ESP_ERR_FORMAT,
     {"tensor " STATE, "shape of two or three"}},
    {"a quant_state that is no JSON", "q3a/model_nf4", overwrite, STATE, "[[[", ESP_ERR_FORMAT, {"tensor " STATE, "expected quant_type"}},
    {"a quant_state of signed bytes",
     "q3a/model_nf4",
     as_signed,
     STATE,
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " STATE, "expected at most 4096 bytes of U8"}},
    {"nested scales in blocks of 128",
     "q3a/model_nf4_dq",
     edit,
     STATE,
     "256|128",
     ESP_ERR_UNSUPPORTED,
     {"tensor " BNB ": blocks of 64 (nested: 128)", "256"}},
    {"nested scales without an offset",
     "q3a/model_nf4_dq",
     edit,
     STATE,
     "nested_offset|nested_other",
     ESP_ERR_FORMAT,
     {"tensor " STATE, "nested_offset or neither"}},
    {"an offset past f32",
     "q3a/model_nf4_dq",
     edit,
     STATE,
     "nested_offset\": 0|nested_offset\": 1e99, \"was\": 0",
     ESP_ERR_NONFINITE,
     {"tensor " BNB ": nested_offset is 1e+99", "expected a finite number"}},
    {"nested scales without their own",
     "q3a/model_nf4_dq",
     drop,
     BNB ".nested_absmax",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " BNB ".nested_absmax is missing", "shape [1]"}},
    {"nested scales without a map",
     "q3a/model_nf4_dq",
     drop,
     BNB ".nested_quant_map",
     NULL,
     ESP_ERR_FORMAT,
     {"tensor " BNB ".nested_quant_map is missing", "shape [256]"}},
    {"a nested map with a NaN",
     "q3a/model_nf4_dq",
     spoil,
     BNB ".nested_quant_map",
     "nan",
     ESP_ERR_NONFINITE,
     {"tensor " BNB ".nested_quant_map: element 5 is", "expected finite"}},
};

static void expect_failure(const struct bad_case *b, const char *dir, const esp_model_config *options) {
    loaded l;
    const esp_status status = loaded_try(&l, dir, options);
    cr_expect_eq(status, b->status, "%s: %s: %s", b->what, esp_status_name(status), status ? esp_last_error() : "taken");
    cr_expect_not_null(strstr(esp_last_error(), dir), "%s: file not named: %s", b->what, esp_last_error());
    for (int i = 0; i < 2; i++)
        cr_expect_not_null(strstr(esp_last_error(), b->says[i]), "%s: \"%s\" not said: %s", b->what, b->says[i], esp_last_error());
    esp_memory m = ESP_MEMORY_INIT;
    OK(esp_ctx_memory(l.ctx, &m));
    cr_expect_eq(m.staging, 0, "%s: staging is left", b->what);
    loaded_free(&l);
}

Test(bad_model, one_by_one, .timeout = 60) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(cases); i++) {
        checkpoint *c = checkpoint_open(cases[i].model);
        cases[i].spoil(c, cases[i].name, cases[i].argument);
        checkpoint_write(c, dir);
        expect_failure(&cases[i], dir, NULL);
        checkpoint_close(c);
    }
    scratch_remove(dir);
}

/* What is only wrong for these options. */
Test(bad_model, formats_that_do_not_agree) {
    static const struct bad_case fp4 = {.what = "NF4 codes where FP4 is asked for",
                                        .status = ESP_ERR_MISMATCH,
                                        .says = {"tensor " L0 "mlp.experts.0.gate_proj.weight: stored as nf4", "expected fp4"}};
    static const struct bad_case none = {.what = "NF4 codes where plain values are asked for",
                                         .status = ESP_ERR_MISMATCH,
                                         .says = {"tensor " L0 "mlp.experts.0.gate_proj.weight: stored as nf4", "expected none"}};
    static const struct bad_case narrow = {.what = "plain experts in another dtype than config.json says",
                                           .status = ESP_ERR_DTYPE,
                                           .says = {"tensor " L0 "mlp.experts.0.gate_proj.weight: dtype F16", "expected BF16"}};
    static const struct bad_case map = {.what = "two maps of nested scales",
                                        .status = ESP_ERR_UNSUPPORTED,
                                        .says = {"tensor " BNB ".nested_quant_map: differs", "expected one for all"}};
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    checkpoint *c = checkpoint_open("q3a/model_nf4");
    checkpoint_write(c, dir);
    expect_failure(&fp4, dir, &ESP_MODEL_CONFIG(.experts = ESP_FP4));
    expect_failure(&none, dir, &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE));
    checkpoint_close(c);
    c = checkpoint_open("q3c/model");
    as_f16(c, L0 "mlp.experts.0.gate_proj.weight", NULL);
    checkpoint_write(c, dir);
    expect_failure(&narrow, dir, &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE));
    checkpoint_close(c);
    c = checkpoint_open("q3a/model_nf4_dq");
    spoil(c, BNB ".nested_quant_map", "0.5");
    checkpoint_write(c, dir);
    expect_failure(&map, dir, &ESP_MODEL_CONFIG(.double_quant = true));
    checkpoint_close(c);
    scratch_remove(dir);
}

/* A good folder cut at any of many lengths. */
Test(bad_model, truncated_weights) {
    static const struct bad_case cut = {.what = "truncated", .status = ESP_ERR_FORMAT, .says = {"model.safetensors", "expected"}};
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    OK(espi_path_join(path, dir, "model.safetensors"));
    checkpoint *c = checkpoint_open("q3c/model");
    checkpoint_write(c, dir);
    static const off_t lengths[] = {144431, 100000, 6800, 6799, 5000, 9, 8, 7, 0};
    for (int i = 0; i < ESPI_COUNT(lengths); i++) {
        cr_assert_eq(truncate(path, lengths[i]), 0);
        expect_failure(&cut, dir, NULL);
    }
    espi_file_remove(path);
    static const struct bad_case absent = {
        .what = "no weights", .status = ESP_ERR_IO, .says = {"model.safetensors", "expected one of them"}};
    expect_failure(&absent, dir, NULL);
    checkpoint_close(c);
    scratch_remove(dir);
}

/* A limit below the model: an error that says so, and nothing is kept. */
Test(bad_model, memory_limit) {
    esp_ctx *ctx;
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref", .memory_limit = 100000)));
    esp_model *model = NULL;
    cr_expect_eq(esp_model_load(&model, ctx, ESP_SOURCE_DIR "/tests/golden/data/q3a/model", NULL), ESP_ERR_MEMORY);
    cr_expect_null(model);
    esp_memory m = ESP_MEMORY_INIT;
    OK(esp_ctx_memory(ctx, &m));
    cr_expect_eq(m.live, 0);
    esp_ctx_destroy(ctx);
}
