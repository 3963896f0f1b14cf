/* config.json: every alias, every default, and every refusal by key, got and expected. */
#include "checkpoint.h"
#include "core/status.h"
#include "models/family.h"

static esp_status read_folder(espi_config *config, const checkpoint *c, const char *dir) {
    checkpoint_write_config(c, dir);
    return espi_config_read(config, dir);
}

Test(config, golden_folders) {
    espi_config a, b, c;
    OK(espi_config_read(&a, ESP_SOURCE_DIR "/tests/golden/data/q3a/model"));
    cr_expect_str_eq(a.family->name, "qwen3_moe");
    cr_expect(a.layers == 2 && a.hidden == 64 && a.heads == 4 && a.kv_heads == 2 && a.head_dim == 32 && a.vocab == 160);
    cr_expect(a.experts == 8 && a.top_k == 2 && a.expert_width == 32 && a.moe_layers == 2 && a.max_position == 4096);
    cr_expect(a.renormalise && a.qk_norm && !a.attention_bias && !a.tied_head && !a.quantised);
    cr_expect(a.stored_dtype == ESP_F32 && a.rope_theta == 10000 && a.rope_factor == 1 && a.rope_attention == 1);
    cr_expect(a.norm_eps == 1e-6 && a.aux_coef == 0.01 && a.bos_id == -1 && a.eos_id == -1 && a.pad_id == -1);
    OK(espi_config_read(&b, ESP_SOURCE_DIR "/tests/golden/data/q3b/model"));
    const espi_mlp_kind kinds[] = {ESPI_MLP_DENSE, ESPI_MLP_MOE, ESPI_MLP_DENSE, ESPI_MLP_DENSE};
    cr_expect(b.layers == 4 && b.moe_layers == 1 && b.dense_width == 96 && !b.renormalise && b.stored_dtype == ESP_BF16);
    cr_expect_eq(memcmp(b.mlp_kind, kinds, sizeof kinds), 0);
    OK(espi_config_read(&c, ESP_SOURCE_DIR "/tests/golden/data/q3c/model"));
    cr_expect(c.attention_bias && c.tied_head && c.rope_factor == 2 && c.rope_theta == 10000);
    espi_config_free(&a);
    espi_config_free(&b);
    espi_config_free(&c);
}

/* What each family's file says of its own. */
Test(config, golden_folders_of_other_families) {
    espi_config go, vl, ol, mx;
    OK(espi_config_read(&go, ESP_SOURCE_DIR "/tests/golden/data/go1/model"));
    cr_expect(go.experts == 4 && go.top_k == 2 && go.expert_width == 96 && go.moe_layers == 2 && go.renormalise && !go.qk_norm);
    cr_expect(go.attention_bias && go.output_bias && go.sinks && go.router_bias && go.expert_bias && go.mxfp4 && !go.quantised);
    cr_expect(go.window[0] == 5 && go.window[1] == 0 && go.glu.clamped && go.glu.interleaved && go.glu.limit == 7);
    cr_expect(go.yarn && !go.yarn_truncate && go.yarn_original == 256 && go.yarn_beta_fast == 4 && go.rope_factor == 4);
    OK(espi_config_read(&vl, ESP_SOURCE_DIR "/tests/golden/data/vl/model"));
    cr_expect(vl.experts == 6 && vl.hidden == 64 && vl.renormalise && vl.qk_norm && !vl.whole_qk_norm && !vl.tied_head);
    cr_expect(vl.rope_theta == 500000 && vl.rope_factor == 1 && !vl.yarn && vl.stored_dtype == ESP_BF16);
    const int64_t refused[] = {156, 157, 151654, 159, 158};
    cr_expect(vl.n_refused == 5 && memcmp(vl.refused, refused, sizeof refused) == 0);
    OK(espi_config_read(&ol, ESP_SOURCE_DIR "/tests/golden/data/ol/model"));
    cr_expect(ol.qk_norm && ol.whole_qk_norm && ol.clip_qkv == 0.5 && !ol.renormalise && ol.norm_eps == 1e-5 && ol.n_refused == 0);
    OK(espi_config_read(&mx, ESP_SOURCE_DIR "/tests/golden/data/mx/model"));
    cr_expect(mx.window[0] == 7 && mx.window[1] == 7 && mx.renormalise && !mx.qk_norm && !mx.attention_bias && mx.rope_theta == 1e6);
    espi_config_free(&go);
    espi_config_free(&vl);
    espi_config_free(&ol);
    espi_config_free(&mx);
}

/* config_v4.json says the same in the older style. */
Test(config, both_styles_say_the_same) {
    static const char *const models[] = {"q3a", "q3b", "q3c", "go1", "go2", "vl", "vla", "ol", "mx"};
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX], copy[ESPI_PATH_MAX];
    scratch_make(dir);
    OK(espi_path_join(copy, dir, "config.json"));
    for (int i = 0; i < ESPI_COUNT(models); i++) {
        espi_config v4, v5;
        snprintf(path, sizeof path, ESP_SOURCE_DIR "/tests/golden/data/%s/config_v4.json", models[i]);
        OK(espi_file_copy(copy, path));
        OK(espi_config_read(&v4, dir));
        snprintf(path, sizeof path, ESP_SOURCE_DIR "/tests/golden/data/%s/model", models[i]);
        OK(espi_config_read(&v5, path));
        cr_expect_eq(memcmp(v4.mlp_kind, v5.mlp_kind, (size_t)v4.layers * sizeof *v4.mlp_kind), 0, "%s", models[i]);
        cr_expect(v4.experts == v5.experts && v4.top_k == v5.top_k && v4.head_dim == v5.head_dim && v4.stored_dtype == v5.stored_dtype,
                  "%s", models[i]);
        cr_expect(v4.rope_theta == v5.rope_theta && v4.rope_factor == v5.rope_factor && v4.renormalise == v5.renormalise, "%s", models[i]);
        cr_expect_eq(memcmp(v4.window, v5.window, (size_t)v4.layers * sizeof *v4.window), 0, "%s", models[i]);
        cr_expect(v4.yarn == v5.yarn && v4.yarn_truncate == v5.yarn_truncate && v4.yarn_original == v5.yarn_original &&
                      v4.yarn_beta_fast == v5.yarn_beta_fast && v4.yarn_beta_slow == v5.yarn_beta_slow &&
                      v4.rope_attention == v5.rope_attention && v4.rotary_dim == v5.rotary_dim,
                  "%s", models[i]);
        cr_expect(v4.glu.clamped == v5.glu.clamped && v4.glu.limit == v5.glu.limit && v4.glu.alpha == v5.glu.alpha &&
                      v4.clip_qkv == v5.clip_qkv && v4.mxfp4 == v5.mxfp4 && v4.output_bias == v5.output_bias,
                  "%s", models[i]);
        cr_expect(v4.n_refused == v5.n_refused && memcmp(v4.refused, v5.refused, sizeof v4.refused) == 0, "%s", models[i]);
        cr_expect(v4.tied_head == v5.tied_head && v4.attention_bias == v5.attention_bias && v4.norm_eps == v5.norm_eps, "%s", models[i]);
        espi_config_free(&v4);
        espi_config_free(&v5);
    }
    scratch_remove(dir);
}

/* Two settings of q3a's config, then what one number of the result must be. */
static const struct take_case {
    const char *key, *value, *key2, *value2;
    size_t offset; /* of the field, an int64_t or a double */
    double expected;
} takes[] = {
#define FIELD(name) offsetof(espi_config, name)
    {"num_local_experts", NULL, "num_experts", "4", FIELD(experts), 4},
    {"num_local_experts", "null", "num_experts", "5", FIELD(experts), 5},
    {"num_local_experts", "6", "num_experts", "6", FIELD(experts), 6},
    {"head_dim", NULL, "num_attention_heads", "4", FIELD(head_dim), 16},
    {"head_dim", "null", "num_attention_heads", "2", FIELD(head_dim), 32},
    {"num_key_value_heads", NULL, "num_attention_heads", "4", FIELD(kv_heads), 4},
    {"rope_parameters", NULL, "rope_theta", "5000", FIELD(rope_theta), 5000},
    {"rope_parameters", NULL, "rope_theta", NULL, FIELD(rope_theta), 10000},
    {"rope_parameters", "{\"rope_type\":\"default\"}", "rope_theta", "7", FIELD(rope_theta), 7},
    {"rope_parameters", NULL, "rope_scaling", "{\"type\":\"linear\",\"factor\":4}", FIELD(rope_factor), 4},
    {"rope_parameters", NULL, "rope_scaling", "{\"rope_type\":\"linear\",\"factor\":2.5}", FIELD(rope_factor), 2.5},
    {"rope_parameters", NULL, "rope_scaling", "null", FIELD(rope_factor), 1},
    {"eos_token_id", "[7,8]", "bos_token_id", "3", FIELD(eos_id), 7},
    {"eos_token_id", "9", "bos_token_id", "3", FIELD(eos_id), 9},
    {"eos_token_id", "9", "bos_token_id", "3", FIELD(bos_id), 3},
    {"eos_token_id", "[]", "pad_token_id", "-1", FIELD(eos_id), -1},
    {"eos_token_id", NULL, "pad_token_id", "0", FIELD(pad_id), 0},
    {"decoder_sparse_step", NULL, "mlp_only_layers", "null", FIELD(moe_layers), 2},
    {"decoder_sparse_step", "2", "mlp_only_layers", "[]", FIELD(moe_layers), 1},
    {"decoder_sparse_step", "1", "mlp_only_layers", "[0,0]", FIELD(moe_layers), 1},
    {"sliding_window", "4096", "use_sliding_window", "false", FIELD(top_k), 2},
    {"intermediate_size", NULL, "new_key_of_some_version", "{\"a\":[1]}", FIELD(dense_width), 0},
};

Test(config, aliases_and_defaults) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(takes); i++) {
        const struct take_case *t = &takes[i];
        checkpoint *c = checkpoint_open("q3a/model");
        checkpoint_set(c, t->key, t->value);
        checkpoint_set(c, t->key2, t->value2);
        espi_config config;
        const esp_status status = read_folder(&config, c, dir);
        cr_expect_eq(status, ESP_OK, "case %d, %s: %s", i, t->key, esp_last_error());
        const char *field = (const char *)&config + t->offset;
        const bool is_real = t->offset == FIELD(rope_theta) || t->offset == FIELD(rope_factor);
        const double got = is_real ? *(const double *)(const void *)field : (double)*(const int64_t *)(const void *)field;
        cr_expect_eq(got, t->expected, "case %d, %s: got %g, expected %g", i, t->key, got, t->expected);
        espi_config_free(&config);
        checkpoint_close(c);
    }
    scratch_remove(dir);
}

Test(config, dtypes_by_either_name) {
    static const struct {
        const char *key, *value;
        esp_dtype dtype;
    } cases[] = {{"dtype", "\"bfloat16\"", ESP_BF16},
                 {"torch_dtype", "\"float16\"", ESP_F16},
                 {"torch_dtype", "\"float32\"", ESP_F32},
                 {"torch_dtype", NULL, ESP_F32}};
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(cases); i++) {
        checkpoint *c = checkpoint_open("q3a/model");
        checkpoint_set(c, "dtype", NULL);
        checkpoint_set(c, cases[i].key, cases[i].value);
        espi_config config;
        OK(read_folder(&config, c, dir));
        cr_expect_eq(config.stored_dtype, cases[i].dtype, "case %d", i);
        espi_config_free(&config);
        checkpoint_close(c);
    }
    scratch_remove(dir);
}

static const struct refuse_case {
    const char *key, *value;
    esp_status status;
    const char *says;
} refuses[] = {
    {"model_type", "\"llama\"", ESP_ERR_UNSUPPORTED, "model_type: got \"llama\", expected one of: qwen3_moe"},
    {"model_type", NULL, ESP_ERR_FORMAT, "model_type is missing, expected one of: qwen3_moe"},
    {"num_experts_per_tok", "9", ESP_ERR_FORMAT, "num_experts_per_tok: got 9, expected 1 to the number of experts, 8"},
    {"num_experts_per_tok", "0", ESP_ERR_FORMAT, "num_experts_per_tok: got 0"},
    {"num_experts_per_tok", NULL, ESP_ERR_FORMAT, "num_experts_per_tok is missing"},
    {"num_local_experts", NULL, ESP_ERR_FORMAT, "num_experts or num_local_experts is missing"},
    {"num_local_experts", "0", ESP_ERR_FORMAT, "experts, expert width: got 0, 32"},
    {"num_experts", "9", ESP_ERR_FORMAT, "num_experts and its other name num_local_experts differ"},
    {"moe_intermediate_size", NULL, ESP_ERR_FORMAT, "moe_intermediate_size is missing"},
    {"moe_intermediate_size", "0", ESP_ERR_FORMAT, "experts, expert width: got 8, 0"},
    {"head_dim", "31", ESP_ERR_FORMAT, "head_dim: got 31, expected an even number"},
    {"num_key_value_heads", "3", ESP_ERR_FORMAT, "num_key_value_heads: got 4, 3"},
    {"num_attention_heads", "0", ESP_ERR_FORMAT, "num_attention_heads"},
    {"num_attention_heads", "-4", ESP_ERR_FORMAT, "num_attention_heads: got -4"},
    {"num_attention_heads", "4.5", ESP_ERR_FORMAT, "num_attention_heads: got 4.5"},
    {"num_attention_heads", "\"4\"", ESP_ERR_FORMAT, "num_attention_heads: got \"4\", expected a whole number"},
    {"hidden_size", NULL, ESP_ERR_FORMAT, "hidden_size is missing"},
    {"hidden_size", "0", ESP_ERR_FORMAT, "hidden_size"},
    {"hidden_size", "16777217", ESP_ERR_FORMAT, "hidden_size: got 16777217"},
    {"num_hidden_layers", "0", ESP_ERR_FORMAT, "num_hidden_layers"},
    {"num_hidden_layers", NULL, ESP_ERR_FORMAT, "num_hidden_layers is missing"},
    {"vocab_size", "0", ESP_ERR_FORMAT, "vocab_size"},
    {"max_position_embeddings", "0", ESP_ERR_FORMAT, "max_position_embeddings"},
    {"hidden_act", "\"gelu\"", ESP_ERR_UNSUPPORTED, "hidden_act: got \"gelu\", expected \"silu\""},
    {"rope_parameters", "{\"rope_type\":\"dynamic\",\"rope_theta\":1,\"factor\":4}", ESP_ERR_UNSUPPORTED,
     "rope_type: got \"dynamic\", expected \"default\", \"linear\" or \"yarn\""},
    {"rope_parameters", "{\"rope_type\":\"yarn\",\"factor\":4}", ESP_ERR_FORMAT, "original_max_position_embeddings is missing"},
    {"rope_parameters", "{\"rope_type\":\"yarn\",\"original_max_position_embeddings\":256}", ESP_ERR_FORMAT, "factor is missing"},
    {"rope_parameters", "{\"rope_type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":256,\"beta_fast\":0}", ESP_ERR_FORMAT,
     "rope beta_fast: got 0"},
    {"rope_parameters", "{\"rope_type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":256,\"rope_theta\":1}", ESP_ERR_FORMAT,
     "rope_theta: got 1, expected more than 1 with yarn"},
    {"rope_parameters", "{\"rope_type\":\"yarn\",\"factor\":4,\"original_max_position_embeddings\":256,\"attention_factor\":-1}",
     ESP_ERR_FORMAT, "rope attention_factor: got -1"},
    {"rope_parameters", "{\"rope_type\":\"linear\"}", ESP_ERR_FORMAT, "factor is missing"},
    {"rope_parameters", "{\"rope_type\":\"linear\",\"factor\":0}", ESP_ERR_FORMAT, "rope factor: got 0"},
    {"rope_parameters", "{\"rope_type\":3}", ESP_ERR_FORMAT, "rope_type: got 3"},
    {"rope_parameters", "{\"factor\":2}", ESP_ERR_FORMAT, "a factor and no rope_type"},
    {"rope_parameters", "[1]", ESP_ERR_FORMAT, "expected an object or null"},
    {"rope_parameters", "{\"rope_theta\":-1}", ESP_ERR_FORMAT, "rope_theta: got -1"},
    {"rope_parameters", "{\"partial_rotary_factor\":0.5}", ESP_ERR_UNSUPPORTED, "partial_rotary_factor: got 0.5"},
    {"rope_theta", "5", ESP_ERR_FORMAT, "rope_theta: got 5 outside and 10000 inside"},
    {"rope_scaling", "{\"type\":\"linear\",\"factor\":2}", ESP_ERR_FORMAT, "rope_parameters and its other name rope_scaling differ"},
    {"use_sliding_window", "true", ESP_ERR_UNSUPPORTED, "use_sliding_window: got true, expected false"},
    {"attention_dropout", "0.1", ESP_ERR_UNSUPPORTED, "attention_dropout: got 0.1, expected 0"},
    {"rms_norm_eps", "-1", ESP_ERR_FORMAT, "rms_norm_eps: got -1"},
    {"rms_norm_eps", "\"small\"", ESP_ERR_FORMAT, "rms_norm_eps: got \"small\", expected a number"},
    {"norm_topk_prob", "1", ESP_ERR_FORMAT, "norm_topk_prob: got 1, expected true or false"},
    {"decoder_sparse_step", "0", ESP_ERR_FORMAT, "decoder_sparse_step: got 0"},
    {"mlp_only_layers", "[2]", ESP_ERR_FORMAT, "mlp_only_layers entry 0: got 2, expected a layer number below 2"},
    {"mlp_only_layers", "[-1]", ESP_ERR_FORMAT, "mlp_only_layers entry 0: got -1"},
    {"mlp_only_layers", "1", ESP_ERR_FORMAT, "mlp_only_layers: got no list"},
    {"eos_token_id", "160", ESP_ERR_FORMAT, "eos_token_id: got 160, expected a token id below vocab_size"},
    {"eos_token_id", "[\"x\"]", ESP_ERR_FORMAT, "eos_token_id"},
    {"dtype", "\"float8\"", ESP_ERR_FORMAT, "dtype: got \"float8\""},
    {"torch_dtype", "\"bfloat16\"", ESP_ERR_FORMAT, "dtype and its other name torch_dtype differ"},
    {"quantization_config", "{\"quant_method\":\"gptq\"}", ESP_ERR_UNSUPPORTED, "got quant_method \"gptq\", expected bitsandbytes"},
    {"quantization_config", "{\"quant_method\":\"bitsandbytes\",\"load_in_8bit\":true}", ESP_ERR_UNSUPPORTED, "in 8 bits"},
};

Test(config, refusals) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    for (int i = 0; i < ESPI_COUNT(refuses); i++) {
        const struct refuse_case *r = &refuses[i];
        checkpoint *c = checkpoint_open("q3a/model");
        checkpoint_set(c, r->key, r->value);
        espi_config config;
        const esp_status status = read_folder(&config, c, dir);
        cr_expect_eq(status, r->status, "%s = %s: %s", r->key, r->value ? r->value : "(absent)", status ? esp_last_error() : "taken");
        cr_expect_not_null(strstr(esp_last_error(), r->says), "%s: \"%s\" not said: %s", r->key, r->says, esp_last_error());
        cr_expect_not_null(strstr(esp_last_error(), "/config.json"), "%s: file not named: %s", r->key, esp_last_error());
        cr_expect_null(config.mlp_kind, "%s: something is left to free", r->key);
        if (status == ESP_OK) espi_config_free(&config);
        checkpoint_close(c);
    }
    scratch_remove(dir);
}

Test(config, dimensions_that_are_fine_one_by_one_but_not_together) {
    char dir[ESPI_PATH_MAX];
    scratch_make(dir);
    checkpoint *c = checkpoint_open("q3a/model");
    static const char *const keys[] = {"hidden_size", "num_hidden_layers", "num_local_experts", "moe_intermediate_size"};
    for (int i = 0; i < ESPI_COUNT(keys); i++) checkpoint_set(c, keys[i], "1000000");
    espi_config config;
    cr_expect_eq(read_folder(&config, c, dir), ESP_ERR_FORMAT);
    cr_expect_not_null(strstr(esp_last_error(), "expected less than 2^56"), "%s", esp_last_error());
    checkpoint_close(c);
    scratch_remove(dir);
}

Test(config, files_that_are_no_config) {
    static const char *const texts[] = {"", "[]", "{", "{\"model_type\":\"qwen3_moe\",\"model_type\":\"qwen3_moe\"}", "{} x"};
    char dir[ESPI_PATH_MAX], path[ESPI_PATH_MAX];
    scratch_make(dir);
    espi_config config;
    cr_expect_eq(espi_config_read(&config, dir), ESP_ERR_IO);
    cr_expect_not_null(strstr(esp_last_error(), "config.json"), "%s", esp_last_error());
    for (int i = 0; i < ESPI_COUNT(texts); i++) {
        scratch_write(path, dir, "config.json", texts[i], strlen(texts[i]));
        cr_expect_eq(espi_config_read(&config, dir), ESP_ERR_FORMAT, "%s", texts[i]);
        cr_expect_not_null(strstr(esp_last_error(), path), "%s", esp_last_error());
    }
    scratch_remove(dir);
}
