/* The families: every layout of a checkpoint's experts is the same model, byte for byte; what is missing, too much or ill-shaped is named;
 * and the family that no golden folder has is held against a few lines of its own. */
#include "core/status.h"
#include "espalier/plan.h"
#include "espalier/quant.h"
#include "gpt_oss_forms.h"
#include "loaded.h"

#include <math.h>

/* Loads what `c` is now. */
static esp_status load(loaded *l, const checkpoint *c, const char *dir, const esp_model_config *options) {
    checkpoint_write(c, dir);
    return loaded_try(l, dir, options);
}

static void expect_same(const loaded *a, const loaded *b, const char *what) {
    cr_expect_gt(a->model->weights.extent.main, 0);
    cr_expect(loaded_same(a, b), "%s", what);
    cr_expect_str_empty(a->log, "%s: %s", what, a->log);
    cr_expect_str_empty(b->log, "%s: %s", what, b->log);
}

/* ---- layouts ---- */

static const esp_model_config forms[] = {{.struct_size = sizeof(esp_model_config)},
                                         {.struct_size = sizeof(esp_model_config), .double_quant = true},
                                         {.struct_size = sizeof(esp_model_config), .experts = ESP_FP4},
                                         {.struct_size = sizeof(esp_model_config), .experts = ESP_Q_NONE},
                                         {.struct_size = sizeof(esp_model_config), .experts = ESP_MXFP4}};

#define VL "model.language_model.layers.%d.mlp.experts."

/* Either order of Qwen3-VL's stacks; in vla gate_up is square, so that only down tells. */
Test(families, either_order_of_fused_experts) {
    char dir[ESPI_PATH_MAX], name[100];
    loaded a, b;
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(forms); i++) {
        loaded_golden(&a, "vla/model", &forms[i]);
        loaded_golden(&b, "vla/model_transposed", &forms[i]);
        expect_same(&a, &b, "vla");
        loaded_free(&a);
        loaded_free(&b);
        if (forms[i].experts == ESP_MXFP4) continue; /* the experts of vl are 48 wide */
        checkpoint *c = checkpoint_open("vl/model");
        for (int layer = 0; layer < 2; layer++) {
            snprintf(name, sizeof name, VL "gate_up_proj", layer);
            turn(c, name);
            snprintf(name, sizeof name, VL "down_proj", layer);
            turn(c, name);
        }
        loaded_golden(&a, "vl/model", &forms[i]);
        OK(load(&b, c, dir, &forms[i]));
        expect_same(&a, &b, "vl");
        loaded_free(&a);
        loaded_free(&b);
        checkpoint_close(c);
    }
    scratch_remove(dir);
}

/* Rows of a stack that was read column by column are the file's columns. */
Test(families, turned_values) {
    loaded l;
    checkpoint *c = checkpoint_open("vl/model");
    loaded_golden(&l, "vl/model", &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE));
    const uint16_t *gate_up = checkpoint_item(c, "model.language_model.layers.1.mlp.experts.gate_up_proj")->data;
    const espi_stack *s = &l.model->layers[1].gate_up;
    const uint16_t *got = s->data;
    cr_assert(s->parts == 2 && s->rows == 96 && s->cols == 64 && s->dtype == ESP_BF16);
    for (int e = 0; e < 6; e++)
        for (int row = 0; row < 96; row++)
            for (int col = 0; col < 64; col++)
                cr_assert_eq(got[(e * 96 + row) * 64 + col], gate_up[(e * 64 + col) * 96 + row], "expert %d [%d,%d]", e, row, col);
    loaded_free(&l);
    checkpoint_close(c);
}

/* What newer versions hold in memory: matrices `parts` of all experts one behind the other. */
static void fuse(checkpoint *c, const char *fused, int64_t experts, int parts, const char *const *formats) {
    char name[200];
    snprintf(name, sizeof name, formats[0], 0);
    const espi_st_item first = *checkpoint_item(c, name);
    const size_t each = bytes_of(&first);
    char *all = malloc(each * (size_t)(experts * parts));
    cr_assert_not_null(all);
    for (int64_t i = 0; i < experts * parts; i++) {
        snprintf(name, sizeof name, formats[i % parts], (int)(i / parts));
        memcpy(all + (size_t)i * each, checkpoint_item(c, name)->data, each);
        checkpoint_drop(c, name);
    }
    checkpoint_add(c, fused, first.dtype, 3, (int64_t[]){experts, parts * first.dims[0], first.dims[1]}, all,
                   each * (size_t)(experts * parts));
    free(all);
}

#define OL(n) "model.layers." n ".mlp.experts."
#define MX(n) "model.layers." n ".block_sparse_moe."
#define MX5(n) "model.layers." n ".mlp."

static void fuse_olmoe(checkpoint *c) {
    static const char *const gate_up[2][2] = {{OL("0") "%d.gate_proj.weight", OL("0") "%d.up_proj.weight"},
                                              {OL("1") "%d.gate_proj.weight", OL("1") "%d.up_proj.weight"}};
    static const char *const down[2][1] = {{OL("0") "%d.down_proj.weight"}, {OL("1") "%d.down_proj.weight"}};
    fuse(c, OL("0") "gate_up_proj", 8, 2, gate_up[0]);
    fuse(c, OL("1") "gate_up_proj", 8, 2, gate_up[1]);
    fuse(c, OL("0") "down_proj", 8, 1, down[0]);
    fuse(c, OL("1") "down_proj", 8, 1, down[1]);
}

/* Layer 0 as version 5 has it, layer 1 as published but for one name. */
static void fuse_mixtral(checkpoint *c) {
    static const char *const gate_up[] = {MX("0") "experts.%d.w1.weight", MX("0") "experts.%d.w3.weight"};
    static const char *const down[] = {MX("0") "experts.%d.w2.weight"};
    fuse(c, MX5("0") "experts.gate_up_proj", 4, 2, gate_up);
    fuse(c, MX5("0") "experts.down_proj", 4, 1, down);
    rename_item(c, MX("0") "gate.weight", MX5("0") "gate.weight");
    rename_item(c, MX("1") "experts.2.w3.weight", MX5("1") "experts.2.w3.weight");
}

Test(families, fused_as_in_memory) {
    static const struct {
        const char *model;
        void (*fuse)(checkpoint *c);
    } cases[] = {{"ol/model", fuse_olmoe}, {"mx/model", fuse_mixtral}};
    char dir[ESPI_PATH_MAX];
    loaded a, b;
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(cases) * ESPI_COUNT(forms); i++) {
        const esp_model_config *form = &forms[i % ESPI_COUNT(forms)];
        const char *model = cases[i / ESPI_COUNT(forms)].model;
        checkpoint *c = checkpoint_open(model);
        cases[i / ESPI_COUNT(forms)].fuse(c);
        loaded_golden(&a, model, form);
        OK(load(&b, c, dir, form));
        expect_same(&a, &b, model);
        loaded_free(&a);
        loaded_free(&b);
        checkpoint_close(c);
    }
    scratch_remove(dir);
}

/* ---- gpt-oss ---- */

Test(families, gpt_oss_layouts) {
    char dir[ESPI_PATH_MAX];
    loaded native, plain, listed;
    scratch_make(dir);
    loaded_golden(&native, "go2/model", NULL);
    cr_expect_eq(native.model->options.experts, ESP_MXFP4, "the default for blocks");
    for (int i = 0; i < ESPI_COUNT(forms); i++) {
        checkpoint *c = plain_gpt_oss();
        OK(load(&plain, c, dir, &forms[i]));
        cr_expect_eq(plain.model->layers[0].gate_up.parts, 1, "interleaved rows are one matrix");
        list_experts(c);
        OK(load(&listed, c, dir, &forms[i]));
        expect_same(&plain, &listed, "fused and list");
        /* The quantiser finds what the values came from. */
        if (forms[i].experts == ESP_MXFP4) expect_same(&native, &plain, "MXFP4 from the values and as stored");
        loaded_free(&plain);
        loaded_free(&listed);
        checkpoint_close(c);
    }
    loaded_free(&native);
    scratch_remove(dir);
}

/* MXFP4 bytes are the file's own. */
Test(families, blocks_are_taken_as_they_are) {
    loaded l;
    checkpoint *c = checkpoint_open("go1/model");
    loaded_golden(&l, "go1/model", &ESP_MODEL_CONFIG(.experts = ESP_MXFP4));
    const espi_layer *w = &l.model->layers[1];
    cr_expect(w->gate_up.part_bytes == 192 * 32 && w->gate_up.part_blocks == 192 * 2 && w->down.part_blocks == 64 * 3);
    cr_expect_eq(memcmp(w->gate_up.data, checkpoint_item(c, GO("1") "gate_up_proj_blocks")->data, 4 * 192 * 32), 0);
    cr_expect_eq(memcmp(w->gate_up.scales, checkpoint_item(c, GO("1") "gate_up_proj_scales")->data, 4 * 192 * 2), 0);
    cr_expect_eq(memcmp(w->down.data, checkpoint_item(c, GO("1") "down_proj_blocks")->data, 4 * 64 * 48), 0);
    cr_expect_eq(memcmp(w->down.scales, checkpoint_item(c, GO("1") "down_proj_scales")->data, 4 * 64 * 3), 0);
    cr_expect_eq(memcmp(w->gate_up_bias, checkpoint_item(c, GO("1") "gate_up_proj_bias")->data, 4 * 192 * 4), 0);
    cr_expect_eq(memcmp(w->down_bias, checkpoint_item(c, GO("1") "down_proj_bias")->data, 4 * 64 * 4), 0);
    cr_expect_eq(memcmp(w->sinks, checkpoint_item(c, "model.layers.1.self_attn.sinks")->data, 8 * 4), 0);
    cr_expect_eq(memcmp(w->router_bias, checkpoint_item(c, "model.layers.1.mlp.router.bias")->data, 4 * 4), 0);
    cr_expect_eq(w->gate_up.lut, esp_quant_table(ESP_MXFP4));
    loaded_free(&l);
    checkpoint_close(c);
}

/* ---- what is wrong ---- */

static void drop(checkpoint *c, const char *name, const char *value) {
    (void)value;
    checkpoint_drop(c, name);
}

static void extra(checkpoint *c, const char *name, const char *value) {
    (void)value;
    checkpoint_add(c, name, ESP_F32, 1, (int64_t[]){1}, &(float){1}, sizeof(float));
}

static void lose_one(checkpoint *c, const char *name, const char *value) {
    espi_st_item *item = checkpoint_item(c, name);
    (void)value;
    item->dims[item->rank - 1]--;
}

static void turn_one(checkpoint *c, const char *name, const char *value) {
    (void)value;
    turn(c, name);
}

static void spoil_byte(checkpoint *c, const char *name, const char *value) {
    ((uint8_t *)checkpoint_item(c, name)->data)[37] = (uint8_t)atoi(value);
}

static void set_key(checkpoint *c, const char *key, const char *value) {
    checkpoint_set(c, key, value);
}

/* "text_config": the whole object with one key changed would hide what the case is about. */
static void set_text_key(checkpoint *c, const char *key, const char *value) {
    json_t *v = json_loads(value, JSON_DECODE_ANY, NULL);
    cr_assert_not_null(v);
    json_object_set_new(json_object_get(c->config, "text_config"), key, v);
}

#define L0 "model.layers.0."
#define V0 "model.language_model.layers.0."

static const struct wrong_case {
    const char *model;
    void (*spoil)(checkpoint *c, const char *name, const char *value);
    const char *name, *value;
    esp_qformat experts;
    esp_status status;
    const char *says[2];
} wrongs[] = {
    {"go1/model", drop, L0 "self_attn.sinks", "", 0, ESP_ERR_FORMAT, {L0 "self_attn.sinks is missing", "[8]"}},
    {"go1/model", drop, L0 "self_attn.o_proj.bias", "", 0, ESP_ERR_FORMAT, {L0 "self_attn.o_proj.bias is missing", "[64]"}},
    {"go1/model", drop, L0 "mlp.router.bias", "", 0, ESP_ERR_FORMAT, {L0 "mlp.router.bias is missing", "[4]"}},
    {"go1/model", drop, GO("0") "gate_up_proj_bias", "", 0, ESP_ERR_FORMAT, {GO("0") "gate_up_proj_bias is missing", "[4,192]"}},
    {"go1/model", drop, GO("0") "down_proj_blocks", "", 0, ESP_ERR_FORMAT, {GO("0") "down_proj_blocks is missing", "[4,64,3,16]"}},
    {"go1/model", drop, GO("0") "gate_up_proj_scales", "", 0, ESP_ERR_FORMAT, {GO("0") "gate_up_proj_scales is missing", "[4,192,2]"}},
    {"go1/model", lose_one, GO("0") "gate_up_proj_blocks", "", 0, ESP_ERR_SHAPE, {"[4,192,2,15]", "[4,192,2,16]"}},
    {"go1/model", lose_one, GO("0") "down_proj_scales", "", 0, ESP_ERR_SHAPE, {"[4,64,2]", "[4,64,3]"}},
    {"go1/model", lose_one, GO("0") "down_proj_bias", "", 0, ESP_ERR_SHAPE, {"[4,63]", "[4,64]"}},
    {"go1/model", spoil_byte, GO("0") "down_proj_scales", "255", 0, ESP_ERR_NONFINITE, {"down_proj_scales: element 37 is 255", "0 to 254"}},
    {"go1/model", extra, GO("0") "down_proj", "", 0, ESP_ERR_FORMAT, {"has both " GO("0") "gate_up_proj_blocks", GO("0") "down_proj,"}},
    {"go1/model", extra, L0 "self_attn.q_norm.weight", "", 0, ESP_ERR_FORMAT, {L0 "self_attn.q_norm.weight", "no such tensor"}},
    {"go1/model", set_key, "dtype", "\"float32\"", ESP_NF4, ESP_ERR_UNSUPPORTED, {"experts: got NF4", "expected MXFP4"}},
    {"go1/model", set_key, "dtype", "\"float32\"", ESP_Q_NONE, ESP_ERR_UNSUPPORTED, {"experts: got none", "16-bit checkpoint"}},
    {"go1/model", set_key, "quantization_config", NULL, ESP_NF4, ESP_ERR_UNSUPPORTED, {"gate_up_proj_blocks: stored as MXFP4", "plain"}},
    {"go1/model", set_key, "intermediate_size", "80", 0, ESP_ERR_UNSUPPORTED, {"expert width 80", "multiples of 32"}},
    {"go1/model", set_key, "rope_parameters", NULL, 0, ESP_ERR_FORMAT, {"neither rope_parameters nor rope_scaling", "yarn"}},
    {"go1/model", set_key, "layer_types", "[\"full_attention\"]", 0, ESP_ERR_FORMAT, {"layer_types: got a list of 1", "2 layers"}},
    {"go1/model",
     set_key,
     "layer_types",
     "[\"full_attention\",\"linear\"]",
     0,
     ESP_ERR_UNSUPPORTED,
     {"entry 1: got \"linear\"", "sliding"}},
    {"go1/model", set_key, "sliding_window", "0", 0, ESP_ERR_FORMAT, {"sliding_window: got 0", "layer 0"}},
    {"go1/model", set_key, "swiglu_limit", "0", 0, ESP_ERR_FORMAT, {"swiglu_limit", "positive"}},
    {"vl/model", drop, V0 "mlp.experts.down_proj", "", 0, ESP_ERR_FORMAT, {V0 "mlp.experts.down_proj is missing", "[6,48,64]"}},
    {"vl/model", turn_one, V0 "mlp.experts.down_proj", "", 0, ESP_ERR_SHAPE, {"down_proj: shape [6,64,48]", "[6,48,64]"}},
    {"vla/model", turn_one, V0 "mlp.experts.down_proj", "", 0, ESP_OK, {"", ""}}, /* then it is the other order */
    {"vla/model", lose_one, V0 "mlp.experts.down_proj", "", 0, ESP_ERR_SHAPE, {"[5,64,31]", "[5,64,32]"}},
    {"vl/model", extra, V0 "self_attn.sinks", "", 0, ESP_ERR_FORMAT, {V0 "self_attn.sinks", "no such tensor"}},
    {"vl/model", extra, "model.visual.more", "", 0, ESP_OK, {"", ""}},
    {"vl/model", set_key, "text_config", NULL, 0, ESP_ERR_FORMAT, {"text_config is missing", "settings of the text model"}},
    {"vl/model", set_text_key, "tie_word_embeddings", "true", 0, ESP_OK, {"", ""}}, /* not asked: the top level decides */
    {"vl/model", set_key, "tie_word_embeddings", "true", 0, ESP_OK, {"", ""}},
    {"vl/model", set_key, "image_token_id", "\"x\"", 0, ESP_ERR_FORMAT, {"image_token_id", "whole number"}},
    {"ol/model", drop, L0 "self_attn.q_norm.weight", "", 0, ESP_ERR_FORMAT, {L0 "self_attn.q_norm.weight is missing", "[64]"}},
    {"ol/model", lose_one, L0 "self_attn.k_norm.weight", "", 0, ESP_ERR_SHAPE, {"k_norm.weight: shape [63]", "[64]"}},
    {"ol/model", extra, L0 "mlp.experts.8.gate_proj.weight", "", 0, ESP_ERR_FORMAT, {"experts.8.gate_proj.weight", "no such tensor"}},
    {"ol/model", set_key, "clip_qkv", "-1", 0, ESP_ERR_FORMAT, {"clip_qkv: got -1", "positive"}},
    {"mx/model", drop, MX("0") "experts.1.w3.weight", "", 0, ESP_ERR_FORMAT, {MX("0") "experts.1.w3.weight is missing", "[64,64]"}},
    {"mx/model", lose_one, MX("0") "gate.weight", "", 0, ESP_ERR_SHAPE, {"gate.weight: shape [4,63]", "[4,64]"}},
    {"mx/model", extra, L0 "self_attn.q_proj.bias", "", 0, ESP_ERR_FORMAT, {"q_proj.bias", "no such tensor"}},
    {"mx/model", set_key, "router_jitter_noise", "0.1", 0, ESP_ERR_UNSUPPORTED, {"router_jitter_noise: got 0.1", "expected 0"}},
};

Test(families, wrong_models) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(wrongs); i++) {
        const struct wrong_case *w = &wrongs[i];
        loaded l;
        checkpoint *c = checkpoint_open(w->model);
        w->spoil(c, w->name, w->value);
        /* The bytes of a tensor that lost some must still tile the file: the writer sees to that. */
        const esp_status status = load(&l, c, dir, &ESP_MODEL_CONFIG(.experts = w->experts));
        cr_expect_eq(status, w->status, "case %d, %s %s: %s", i, w->model, w->name, status ? esp_last_error() : "taken");
        for (int j = 0; j < 2 && w->status != ESP_OK; j++)
            cr_expect_not_null(strstr(esp_last_error(), w->says[j]), "case %d: \"%s\" not said: %s", i, w->says[j], esp_last_error());
        loaded_free(&l);
        checkpoint_close(c);
    }
    scratch_remove(dir);
}

/* ---- configs ---- */

static void read_text(espi_config *config, const char *dir, const char *text) {
    char path[ESPI_PATH_MAX];
    scratch_write(path, dir, "config.json", text, strlen(text));
    OK(espi_config_read(config, dir));
}

/* gpt-oss-20b: the frequencies that two independent programs gave. */
Test(families, yarn_of_gpt_oss) {
    static const struct {
        int j;
        double value;
    } expected[] = {{0, 1},
                    {5, 0.15532298948448497},
                    {8, 0.050813274815461475},
                    {9, 0.03170569618466377},
                    {12, 0.006794959489732219},
                    {17, 1.293187012450632e-4},
                    {18, 3.8308812373753384e-05},
                    {31, 3.0235114281192144e-07}};
    char dir[ESPI_PATH_MAX];
    espi_config c;
    double *f;
    scratch_make(dir);
    read_text(&c, dir,
              "{\"model_type\":\"gpt_oss\",\"hidden_size\":2880,\"num_hidden_layers\":24,\"num_attention_heads\":64,"
              "\"num_key_value_heads\":8,\"head_dim\":64,\"intermediate_size\":2880,\"num_local_experts\":32,\"num_experts_per_tok\":4,"
              "\"experts_per_token\":4,\"vocab_size\":201088,\"rope_theta\":150000,\"rope_scaling\":{\"rope_type\":\"yarn\","
              "\"factor\":32.0,\"beta_fast\":32.0,\"beta_slow\":1.0,\"truncate\":false,\"original_max_position_embeddings\":4096}}");
    cr_expect(c.attention_bias && c.output_bias && c.sinks && c.norm_eps == 1e-5 && c.max_position == 131072);
    cr_expect(c.window[0] == 128 && c.window[1] == 0 && c.window[22] == 128 && c.window[23] == 0, "even layers slide");
    cr_expect(c.glu.clamped && c.glu.interleaved && c.glu.limit == 7 && c.glu.alpha == 1.702);
    cr_expect_float_eq(c.rope_attention, 1.3465735902799727, 1e-15);
    OK(espi_rope_frequencies(&f, &c));
    for (int i = 0; i < ESPI_COUNT(expected); i++)
        cr_expect(fabs(f[expected[i].j] / expected[i].value - 1) <= 1e-12, "%d: %.17g, expected %.17g", expected[i].j, f[expected[i].j],
                  expected[i].value);
    free(f);
    espi_config_free(&c);
    scratch_remove(dir);
}

/* How cos and sin are scaled: given, from two scales, or from the factor. */
Test(families, yarn_attention_factor) {
    static const struct {
        const char *keys;
        double expected;
    } cases[] = {{"", 1.1386294361119891},
                 {"\"mscale\":2,", 1.1386294361119891},
                 {"\"mscale\":2,\"mscale_all_dim\":1,", 1.2772588722239782 / 1.1386294361119891},
                 {"\"attention_factor\":1.5,\"mscale\":2,\"mscale_all_dim\":1,", 1.5}};
    char dir[ESPI_PATH_MAX], text[600];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(cases); i++) {
        espi_config c;
        snprintf(text, sizeof text,
                 "{\"model_type\":\"olmoe\",\"hidden_size\":64,\"num_hidden_layers\":1,\"num_attention_heads\":4,\"num_experts\":4,"
                 "\"num_experts_per_tok\":2,\"intermediate_size\":32,\"vocab_size\":8,\"rope_parameters\":{%s\"rope_type\":\"yarn\","
                 "\"factor\":4,\"original_max_position_embeddings\":256}}",
                 cases[i].keys);
        read_text(&c, dir, text);
        cr_expect_float_eq(c.rope_attention, cases[i].expected, 1e-12, "case %d: %.17g", i, c.rope_attention);
        cr_expect(c.yarn_truncate && c.yarn_beta_fast == 32 && c.yarn_beta_slow == 1, "defaults");
        espi_config_free(&c);
    }
    scratch_remove(dir);
}

/* Tokens that stand for pictures are refused wherever text goes in, and only those. */
Test(families, pictures_are_refused) {
    esp_ctx *ctx;
    esp_model *model;
    esp_tensor hidden;
    OK(esp_ctx_create(&ctx, NULL));
    OK(esp_model_load(&model, ctx, ESP_SOURCE_DIR "/tests/golden/data/vl/model", NULL));
    int32_t ids[] = {1, 155, 3}, cu[] = {0, 3};
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = 3, .n_seqs = 1);
    OK(esp_model_forward(model, &batch, &hidden));
    for (ids[1] = 156; ids[1] < 160; ids[1]++) {
        cr_expect_eq(esp_model_forward(model, &batch, &hidden), ESP_ERR_ARG, "id %d", ids[1]);
        cr_expect_not_null(strstr(esp_last_error(), "tokens[1]"), "%s", esp_last_error());
        cr_expect_not_null(strstr(esp_last_error(), "picture"), "%s", esp_last_error());
    }
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
}

/* ---- glm4_moe: no golden folder has it, so a model is made here and its rules are written out once more ---- */

enum { H = 64, HQ = 4, HK = 2, D = 16, ROT = 8, I = 32, DENSE = 48, SHARED = 2 * I, E = 6, K = 2, V = 40, T = 9 };
#define SCALING 1.5

static const char glm_config[] =
    "{\"model_type\":\"glm4_moe\",\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_heads\":4,\"num_key_value_heads\":2,"
    "\"head_dim\":16,\"partial_rotary_factor\":0.5,\"attention_bias\":true,\"use_qk_norm\":true,\"intermediate_size\":48,"
    "\"moe_intermediate_size\":32,\"n_routed_experts\":6,\"num_experts_per_tok\":2,\"n_shared_experts\":2,\"first_k_dense_replace\":1,"
    "\"n_group\":1,\"topk_group\":1,\"norm_topk_prob\":true,\"routed_scaling_factor\":1.5,\"num_nextn_predict_layers\":1,"
    "\"rope_theta\":100,\"vocab_size\":40,\"dtype\":\"float32\",\"tie_word_embeddings\":false}";

static void add_random(checkpoint *c, uint32_t *state, const char *name, int64_t rows, int64_t cols, float mean, float spread) {
    const int64_t n = rows * (cols ? cols : 1);
    float *values = malloc((size_t)n * sizeof *values);
    cr_assert_not_null(values);
    for (int64_t i = 0; i < n; i++) {
        *state = *state * 1664525u + 1013904223u;
        values[i] = mean + spread * (float)(int32_t)*state * 0x1p-31f;
    }
    checkpoint_add(c, name, ESP_F32, cols ? 2 : 1, (int64_t[]){rows, cols}, values, (size_t)n * sizeof *values);
    free(values);
}

static checkpoint *glm_checkpoint(void) {
    static const struct {
        const char *name;
        int64_t rows, cols;
        float mean, spread;
    } parts[] = {{"input_layernorm.weight", H, 0, 1, 0.3f},       {"post_attention_layernorm.weight", H, 0, 1, 0.3f},
                 {"self_attn.q_proj.weight", HQ * D, H, 0, 0.3f}, {"self_attn.k_proj.weight", HK * D, H, 0, 0.3f},
                 {"self_attn.v_proj.weight", HK * D, H, 0, 0.3f}, {"self_attn.o_proj.weight", H, HQ * D, 0, 0.3f},
                 {"self_attn.q_proj.bias", HQ * D, 0, 0, 0.5f},   {"self_attn.k_proj.bias", HK * D, 0, 0, 0.5f},
                 {"self_attn.v_proj.bias", HK * D, 0, 0, 0.5f},   {"self_attn.q_norm.weight", D, 0, 1, 0.3f},
                 {"self_attn.k_norm.weight", D, 0, 1, 0.3f}};
    checkpoint *c = calloc(1, sizeof *c);
    cr_assert_not_null(c);
    c->config_name = "config.json";
    c->weights_name = "model.safetensors";
    c->config = json_loads(glm_config, 0, NULL);
    cr_assert_not_null(c->config);
    uint32_t s = 2024;
    char name[200];
    add_random(c, &s, "model.embed_tokens.weight", V, H, 0, 1);
    add_random(c, &s, "lm_head.weight", V, H, 0, 0.3f);
    add_random(c, &s, "model.norm.weight", H, 0, 1, 0.3f);
    for (int i = 0; i < 2 * ESPI_COUNT(parts); i++) {
        const int part = i % ESPI_COUNT(parts);
        snprintf(name, sizeof name, "model.layers.%d.%s", i / (int)ESPI_COUNT(parts), parts[part].name);
        add_random(c, &s, name, parts[part].rows, parts[part].cols, parts[part].mean, parts[part].spread);
    }
    add_random(c, &s, "model.layers.0.mlp.gate_proj.weight", DENSE, H, 0, 0.3f);
    add_random(c, &s, "model.layers.0.mlp.up_proj.weight", DENSE, H, 0, 0.3f);
    add_random(c, &s, "model.layers.0.mlp.down_proj.weight", H, DENSE, 0, 0.3f);
    add_random(c, &s, "model.layers.1.mlp.gate.weight", E, H, 0, 0.3f);
    add_random(c, &s, "model.layers.1.mlp.gate.e_score_correction_bias", E, 0, 0, 0.7f);
    add_random(c, &s, "model.layers.1.mlp.shared_experts.gate_proj.weight", SHARED, H, 0, 0.3f);
    add_random(c, &s, "model.layers.1.mlp.shared_experts.up_proj.weight", SHARED, H, 0, 0.3f);
    add_random(c, &s, "model.layers.1.mlp.shared_experts.down_proj.weight", H, SHARED, 0, 0.3f);
    for (int e = 0; e < E; e++) {
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.gate_proj.weight", e);
        add_random(c, &s, name, I, H, 0, 0.3f);
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.up_proj.weight", e);
        add_random(c, &s, name, I, H, 0, 0.3f);
        snprintf(name, sizeof name, "model.layers.1.mlp.experts.%d.down_proj.weight", e);
        add_random(c, &s, name, H, I, 0, 0.3f);
    }
    /* A layer that predicts the token after the next: no part of the model. */
    add_random(c, &s, "model.layers.2.eh_proj.weight", H, 2 * H, 0, 1);
    return c;
}

static const float *weight(checkpoint *c, const char *name) {
    char full[200];
    snprintf(full, sizeof full, "model.layers.1.%s", name);
    return checkpoint_item(c, full)->data;
}

/* y = W x (+ bias) */
static void product(double *y, const float *w, const float *bias, const double *x, int rows, int cols) {
    for (int r = 0; r < rows; r++) {
        y[r] = bias ? (double)bias[r] : 0;
        for (int i = 0; i < cols; i++) y[r] += (double)w[r * cols + i] * x[i];
    }
}

/* y += factor * down(silu(gate x) * up x) */
static void add_mlp(double *y, double factor, checkpoint *c, const char *module, const double *x, int width) {
    double g[SHARED], u[SHARED], out[H];
    char name[200];
    snprintf(name, sizeof name, "mlp.%s.gate_proj.weight", module);
    product(g, weight(c, name), NULL, x, width, H);
    snprintf(name, sizeof name, "mlp.%s.up_proj.weight", module);
    product(u, weight(c, name), NULL, x, width, H);
    for (int i = 0; i < width; i++) g[i] *= u[i] / (1 + exp(-g[i]));
    snprintf(name, sizeof name, "mlp.%s.down_proj.weight", module);
    product(out, weight(c, name), NULL, g, H, width);
    for (int i = 0; i < H; i++) y[i] += factor * out[i];
}

/* Ranked by corrected scores, weighed by the scores themselves.  chosen: ascending.  True when the correction changed the choice. */
static bool route(int chosen[K], double weights[K], checkpoint *c, const double *x) {
    const float *correction = weight(c, "mlp.gate.e_score_correction_bias");
    double score[E];
    bool taken[E] = {false}, plain[E] = {false}, changed = false;
    product(score, weight(c, "mlp.gate.weight"), NULL, x, E, H);
    for (int e = 0; e < E; e++) score[e] = 1 / (1 + exp(-score[e]));
    for (int k = 0; k < K; k++) {
        int best = -1, best_plain = -1;
        for (int e = 0; e < E; e++) {
            if (!taken[e] && (best < 0 || score[e] + (double)correction[e] > score[best] + (double)correction[best])) best = e;
            if (!plain[e] && (best_plain < 0 || score[e] > score[best_plain])) best_plain = e;
        }
        taken[best] = plain[best_plain] = true;
    }
    double sum = 0;
    for (int e = 0, k = 0; e < E; e++) {
        changed |= taken[e] != plain[e];
        if (!taken[e]) continue;
        chosen[k] = e;
        weights[k++] = score[e];
        sum += score[e];
    }
    for (int k = 0; k < K; k++) weights[k] *= SCALING / sum;
    return changed;
}

/* Query or key of one token: bias, norm of each head, rotation of its first ROT values at `position`. */
static void project(double *y, checkpoint *c, char which, const double *x, int heads, int position) {
    char name[200];
    snprintf(name, sizeof name, "self_attn.%c_proj.bias", which);
    const float *bias = weight(c, name);
    snprintf(name, sizeof name, "self_attn.%c_proj.weight", which);
    product(y, weight(c, name), bias, x, heads * D, H);
    snprintf(name, sizeof name, "self_attn.%c_norm.weight", which);
    const float *norm = weight(c, name);
    for (double *head = y; head < y + heads * D; head += D) {
        double square = 0;
        for (int i = 0; i < D; i++) square += head[i] * head[i];
        for (int i = 0; i < D; i++) head[i] *= (double)norm[i] / sqrt(square / D + 1e-5);
        for (int j = 0; j < ROT / 2; j++) {
            const double angle = position * pow(100, -2.0 * j / ROT), a = head[j], b = head[j + ROT / 2];
            head[j] = a * cos(angle) - b * sin(angle);
            head[j + ROT / 2] = b * cos(angle) + a * sin(angle);
        }
    }
}

/* What the passes showed of layer 1, as doubles; "end" is the residual stream behind it. */
typedef struct seen {
    double norm1[T * H], q[T * HQ * D], k[T * HK * D], h1[T * H], norm2[T * H], topk_w[T * K], end[T * H];
    int32_t topk_idx[T * K];
} seen;

static void look(void *user, const char *name, int64_t layer, const esp_tensor *t) {
    seen *s = user;
    const struct {
        const char *name;
        int64_t layer;
        double *to;
    } wanted[] = {{"norm1", 1, s->norm1}, {"q", 1, s->q},           {"k", 1, s->k},  {"h1", 1, s->h1},
                  {"norm2", 1, s->norm2}, {"topk_w", 1, s->topk_w}, {"h", 2, s->end}};
    for (int i = 0; i < ESPI_COUNT(wanted); i++)
        if (layer == wanted[i].layer && strcmp(name, wanted[i].name) == 0)
            for (int64_t j = 0; j < esp_tensor_count(t); j++)
                wanted[i].to[j] = t->dtype == ESP_F64 ? ((const double *)t->data)[j] : (double)((const float *)t->data)[j];
    if (layer == 1 && strcmp(name, "topk_idx") == 0) memcpy(s->topk_idx, t->data, sizeof s->topk_idx);
}

static void check_glm(checkpoint *c, const char *dir, const char *backend, double tolerance) {
    esp_ctx *ctx;
    esp_model *model;
    esp_tensor hidden;
    static seen s;
    int32_t ids[T], cu[] = {0, T};
    for (int t = 0; t < T; t++) ids[t] = (t * 7 + 3) % V;
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = T, .n_seqs = 1);
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend)));
    OK(esp_model_load(&model, ctx, dir, &ESP_MODEL_CONFIG(.experts = ESP_Q_NONE)));
    OK(esp_model_set_probe(model, look, &s));
    OK(esp_model_forward(model, &batch, &hidden));
    int changed = 0;
    for (int t = 0; t < T; t++) {
        double q[HQ * D], k[HK * D], weights[K], end[H];
        int chosen[K];
        char module[40];
        project(q, c, 'q', s.norm1 + t * H, HQ, t);
        project(k, c, 'k', s.norm1 + t * H, HK, t);
        cr_expect(golden_error(s.q + t * HQ * D, q, HQ * D) <= tolerance, "%s: q of token %d", backend, t);
        cr_expect(golden_error(s.k + t * HK * D, k, HK * D) <= tolerance, "%s: k of token %d", backend, t);
        changed += route(chosen, weights, c, s.norm2 + t * H);
        memcpy(end, s.h1 + t * H, sizeof end);
        for (int i = 0; i < K; i++) {
            cr_expect_eq(s.topk_idx[t * K + i], chosen[i], "%s: expert of token %d", backend, t);
            snprintf(module, sizeof module, "experts.%d", chosen[i]);
            add_mlp(end, weights[i], c, module, s.norm2 + t * H, I);
        }
        cr_expect(golden_error(s.topk_w + t * K, weights, K) <= tolerance, "%s: weights of token %d", backend, t);
        add_mlp(end, 1, c, "shared_experts", s.norm2 + t * H, SHARED);
        cr_expect(golden_error(s.end + t * H, end, H) <= tolerance, "%s: token %d", backend, t);
    }
    cr_expect(changed > 0 && changed < T, "the correction changed the choice of %d tokens of %d", changed, T);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
}

Test(families, glm4_moe_by_hand) {
    char dir[ESPI_PATH_MAX];
    checkpoint *c = glm_checkpoint();
    scratch_make(dir);
    checkpoint_write(c, dir);
    check_glm(c, dir, "ref64", 1e-12);
    check_glm(c, dir, "ref", 2e-5);
    check_glm(c, dir, "cpu", 2e-5);
    checkpoint_close(c);
    scratch_remove(dir);
}

static double cross_entropy(esp_model *model, const esp_batch *batch, esp_tensor *d_hidden) {
    esp_tensor hidden;
    double loss;
    OK(esp_model_forward(model, batch, &hidden));
    OK(esp_model_cross_entropy(model, batch, &hidden, &loss, d_hidden));
    return loss;
}

/* Its backward by central differences, through the shared expert, the sigmoid router and the part of a head that is not rotated; and what
 * it has learned comes back from a folder. */
Test(families, glm4_moe_trains) {
    char dir[ESPI_PATH_MAX], adapter[ESPI_PATH_MAX];
    const int32_t ids[T] = {3, 10, 17, 24, 31, 38, 5, 12, 19}, cu[] = {0, 4, T};
    const esp_batch batch = ESP_BATCH(.tokens = ids, .cu_seqlens = cu, .n_tokens = T, .n_seqs = 2);
    const double h = 1e-5;
    esp_ctx *ctx;
    esp_model *model, *again;
    esp_tensor d_hidden;
    checkpoint *c = glm_checkpoint();
    scratch_make(dir);
    checkpoint_write(c, dir);
    OK(espi_path_join(adapter, dir, "adapter"));
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref64")));
    OK(esp_model_load(&model, ctx, dir, &ESP_MODEL_CONFIG(.lora_rank = 2)));
    for (int64_t i = 0; i < esp_model_param_count(model); i++) { /* B = 0 would hide a wrong gradient of A */
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        for (int64_t j = 0; strstr(p.name, "lora_B") && j < esp_tensor_count(&view); j++)
            ((double *)p.data)[j] = (double)(float)(0.05 * sin(1.0 + 0.7 * (double)j + (double)i)); /* a file holds f32 */
    }
    const double loss = cross_entropy(model, &batch, &d_hidden);
    OK(esp_model_backward(model, &batch, &d_hidden));
    esp_plan plan = ESP_PLAN_INIT;
    esp_memory memory = ESP_MEMORY_INIT;
    OK(esp_plan_folder(&plan, ctx, dir, &ESP_MODEL_CONFIG(.lora_rank = 2), NULL, T, 2));
    OK(esp_ctx_memory(ctx, &memory));
    cr_expect_eq(memory.weights, plan.dense_weights + plan.expert_weights);
    cr_expect_eq(memory.adapter, plan.adapter + plan.gradients);
    cr_expect_eq(memory.activations, plan.activations);
    cr_expect_eq(memory.activations_used, plan.activations);
    for (int64_t i = 0; i < esp_model_param_count(model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(model, i, &p));
        double *data = p.data, worst = 0, largest = 0;
        const double *grad = p.grad;
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        for (int64_t j = 0; j < esp_tensor_count(&view); j++) largest = fmax(largest, fabs(grad[j]));
        for (int64_t j = i % 37; j < esp_tensor_count(&view); j += 37) {
            const double keep = data[j];
            data[j] = keep + h;
            const double up = cross_entropy(model, &batch, NULL);
            data[j] = keep - h;
            worst = fmax(worst, fabs((up - cross_entropy(model, &batch, NULL)) / (2 * h) - grad[j]));
            data[j] = keep;
        }
        cr_expect(largest > 0 && worst <= 1e-6 * largest, "%s: difference %g of the largest gradient %g", p.name, worst, largest);
    }
    OK(esp_model_save_adapter(model, adapter));
    OK(esp_model_load(&again, ctx, dir, &ESP_MODEL_CONFIG(.adapter_dir = adapter)));
    cr_expect(fabs(cross_entropy(again, &batch, NULL) - loss) <= 1e-6 * fabs(loss), "the adapter read back gives another loss");
    esp_model_destroy(model);
    esp_model_destroy(again);
    esp_ctx_destroy(ctx);
    checkpoint_close(c);
    scratch_remove(dir);
}

Test(families, glm4_moe_layouts_and_refusals) {
    static const struct {
        const char *key, *value;
        esp_status status;
        const char *says;
    } refused[] = {{"n_group", "2", ESP_ERR_UNSUPPORTED, "n_group: got 2, expected 1"},
                   {"topk_group", "3", ESP_ERR_UNSUPPORTED, "topk_group: got 3, expected 1"},
                   {"routed_scaling_factor", "0", ESP_ERR_FORMAT, "routed_scaling_factor: got 0"},
                   {"partial_rotary_factor", "0.3", ESP_OK, ""}, /* 4 of 16 */
                   {"partial_rotary_factor", "0.2", ESP_ERR_FORMAT, "3 of 16"},
                   {"partial_rotary_factor", "1.5", ESP_ERR_FORMAT, "at most 1"},
                   {"n_shared_experts", "1", ESP_ERR_SHAPE, "shared_experts.gate_proj.weight: shape [64,64]"},
                   {"n_shared_experts", "0", ESP_ERR_FORMAT, "no such tensor"},
                   {"num_nextn_predict_layers", "0", ESP_ERR_FORMAT, "model.layers.2.eh_proj.weight"},
                   {"attention_bias", "false", ESP_ERR_FORMAT, "_proj.bias"},
                   {"use_qk_norm", "false", ESP_ERR_FORMAT, "_norm.weight"},
                   {"first_k_dense_replace", "0", ESP_ERR_FORMAT, "model.layers.0.mlp.gate.weight is missing"}};
    static const char *const gate_up[] = {"model.layers.1.mlp.experts.%d.gate_proj.weight", "model.layers.1.mlp.experts.%d.up_proj.weight"};
    static const char *const down[] = {"model.layers.1.mlp.experts.%d.down_proj.weight"};
    char dir[ESPI_PATH_MAX];
    loaded a, b;
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(forms); i++) {
        checkpoint *c = glm_checkpoint();
        OK(load(&a, c, dir, &forms[i]));
        fuse(c, "model.layers.1.mlp.experts.gate_up_proj", E, 2, gate_up);
        fuse(c, "model.layers.1.mlp.experts.down_proj", E, 1, down);
        OK(load(&b, c, dir, &forms[i]));
        expect_same(&a, &b, "glm4_moe");
        loaded_free(&a);
        loaded_free(&b);
        checkpoint_close(c);
    }
    for (int i = 0; i < ESPI_COUNT(refused); i++) {
        checkpoint *c = glm_checkpoint();
        checkpoint_set(c, refused[i].key, refused[i].value);
        const esp_status status = load(&a, c, dir, NULL);
        cr_expect_eq(status, refused[i].status, "%s: %s", refused[i].key, status ? esp_last_error() : "taken");
        cr_expect(status == ESP_OK || strstr(esp_last_error(), refused[i].says), "\"%s\" not said: %s", refused[i].says, esp_last_error());
        loaded_free(&a);
        checkpoint_close(c);
    }
    checkpoint *c = glm_checkpoint();
    cr_expect_eq(load(&a, c, dir, &ESP_MODEL_CONFIG(.router_aux_coef = 0.1f)), ESP_ERR_UNSUPPORTED);
    loaded_free(&a);
    checkpoint_close(c);
    scratch_remove(dir);
}
