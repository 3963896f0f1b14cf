/* config.json of a Hugging Face folder: aliases resolved, every number checked, what is not offered refused by name. */
#include "core/status.h"
#include "io/file.h"
#include "models/family.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define MAX_CONFIG ((size_t)16 << 20)
#define MLP_ONLY "mlp_only_layers"
#define MAX_SIZE INT64_C(16777216) /* of any one dimension: far above any model, far below overflow */

/* The value of key or alias, with JSON null taken as absent; NULL when neither is there. */
static esp_status lookup(const json_t **out, const json_t *root, const char *path, const char *key, const char *alias) {
    const json_t *a = json_object_get(root, key), *b = alias ? json_object_get(root, alias) : NULL;
    *out = NULL;
    if (json_is_null(a)) a = NULL;
    if (json_is_null(b)) b = NULL;
    if (a && b && !json_equal(a, b))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %s and its other name %s differ, expected one of them or the same value", path, key, alias);
    *out = a ? a : b;
    return ESP_OK;
}

static esp_status missing(const char *path, const char *key, const char *alias) {
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %s%s%s is missing, expected a number", path, key, alias ? " or " : "", alias ? alias : "");
}

/* How a value looks in a sentence. */
static esp_status fail_value(const char *path, const char *key, const json_t *got, const char *expected) {
    char *text = json_dumps(got, JSON_ENCODE_ANY | JSON_COMPACT);
    const esp_status status = ESPI_FAIL(ESP_ERR_FORMAT, "%s: %s: got %.80s, expected %s", path, key, text ? text : "?", expected);
    free(text);
    return status;
}

esp_status espi_json_count(int64_t *out, const json_t *root, const char *path, const char *key, const char *alias, int64_t fallback) {
    const json_t *v;
    ESPI_TRY(lookup(&v, root, path, key, alias));
    if (!v && fallback < 0) return missing(path, key, alias);
    if (v && (!json_is_integer(v) || json_integer_value(v) < 0 || json_integer_value(v) > MAX_SIZE))
        return fail_value(path, key, v, "a whole number from 0 to 16777216");
    *out = v ? (int64_t)json_integer_value(v) : fallback;
    return ESP_OK;
}

esp_status espi_json_real(double *out, const json_t *root, const char *path, const char *key, const char *alias, double fallback) {
    const json_t *v;
    ESPI_TRY(lookup(&v, root, path, key, alias));
    *out = fallback;
    if (!v && isnan(fallback)) return missing(path, key, alias);
    if (v && !json_is_number(v)) return fail_value(path, key, v, "a number");
    if (v) *out = json_number_value(v);
    return ESP_OK;
}

esp_status espi_json_flag(bool *out, const json_t *root, const char *path, const char *key, bool fallback) {
    const json_t *v;
    ESPI_TRY(lookup(&v, root, path, key, NULL));
    if (v && !json_is_boolean(v)) return fail_value(path, key, v, "true or false");
    *out = v ? json_is_true(v) : fallback;
    return ESP_OK;
}

esp_status espi_json_only(const json_t *root, const char *path, const char *key, double only, const char *why) {
    double v = only;
    ESPI_TRY(espi_json_real(&v, root, path, key, NULL, only));
    return v == only ? ESP_OK : ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: %s: got %g, expected %g: %s", path, key, v, only, why);
}

void espi_config_set_dense(espi_config *c, int64_t layer) {
    c->moe_layers -= c->mlp_kind[layer] == ESPI_MLP_MOE;
    c->mlp_kind[layer] = ESPI_MLP_DENSE;
}

esp_status espi_config_sparse_layers(espi_config *c, const json_t *root, const char *path) {
    int64_t step;
    ESPI_TRY(espi_json_count(&step, root, path, "decoder_sparse_step", NULL, 1));
    if (step < 1) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: decoder_sparse_step: got %lld, expected 1 or more", path, (long long)step);
    for (int64_t l = 0; l < c->layers; l++)
        if ((l + 1) % step != 0) espi_config_set_dense(c, l);
    const json_t *dense;
    ESPI_TRY(lookup(&dense, root, path, MLP_ONLY, NULL));
    if (dense && !json_is_array(dense))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: " MLP_ONLY ": got no list, expected a list of layer numbers", path);
    for (size_t i = 0; i < json_array_size(dense); i++) {
        const json_t *l = json_array_get(dense, i);
        if (!json_is_integer(l) || json_integer_value(l) < 0 || json_integer_value(l) >= c->layers)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: " MLP_ONLY " entry %zu: got %lld, expected a layer number below %lld", path, i,
                             (long long)json_integer_value(l), (long long)c->layers);
        espi_config_set_dense(c, json_integer_value(l));
    }
    /* Only dense layers have this width; a model without one need not state it. */
    return espi_json_count(&c->dense_width, root, path, "intermediate_size", NULL, c->moe_layers < c->layers ? -1 : 0);
}

/* -1 when it is absent or negative; the first of a list. */
static esp_status read_token_id(int64_t *out, const json_t *root, const char *path, const char *key, int64_t vocab) {
    const json_t *v;
    ESPI_TRY(lookup(&v, root, path, key, NULL));
    *out = -1;
    if (json_is_array(v)) v = json_array_get(v, 0);
    if (!v) return ESP_OK;
    if (!json_is_integer(v) || json_integer_value(v) >= vocab) return fail_value(path, key, v, "a token id below vocab_size");
    if (json_integer_value(v) >= 0) *out = (int64_t)json_integer_value(v);
    return ESP_OK;
}

/* A number of the rope settings that must be positive. */
static esp_status read_positive(double *out, const json_t *rope, const char *path, const char *key, double fallback) {
    ESPI_TRY(espi_json_real(out, rope, path, key, NULL, fallback));
    if (*out > 0 && isfinite(*out)) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: rope %s: got %g, expected a positive number", path, key, *out);
}

static double yarn_attention(double mscale, double factor) {
    return factor <= 1 ? 1 : 0.1 * mscale * log(factor) + 1;
}

/* formats-and-numerics 4.3. */
static esp_status read_yarn(espi_config *c, const json_t *rope, const char *path) {
    c->yarn = true;
    ESPI_TRY(read_positive(&c->yarn_original, rope, path, "original_max_position_embeddings", NAN));
    ESPI_TRY(read_positive(&c->yarn_beta_fast, rope, path, "beta_fast", 32));
    ESPI_TRY(read_positive(&c->yarn_beta_slow, rope, path, "beta_slow", 1));
    ESPI_TRY(espi_json_flag(&c->yarn_truncate, rope, path, "truncate", true));
    if (!(c->rope_theta > 1))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: rope_theta: got %g, expected more than 1 with yarn", path, c->rope_theta);
    double mscale, all_dim;
    ESPI_TRY(espi_json_real(&mscale, rope, path, "mscale", NULL, 0));
    ESPI_TRY(espi_json_real(&all_dim, rope, path, "mscale_all_dim", NULL, 0));
    const bool both = mscale != 0 && all_dim != 0;
    const double derived =
        both ? yarn_attention(mscale, c->rope_factor) / yarn_attention(all_dim, c->rope_factor) : yarn_attention(1, c->rope_factor);
    return read_positive(&c->rope_attention, rope, path, "attention_factor", derived);
}

static esp_status read_rotary_share(espi_config *c, const json_t *root, const json_t *rope, const char *path) {
    double share;
    ESPI_TRY(espi_json_real(&share, root, path, "partial_rotary_factor", NULL, c->family->rotary_share ? c->family->rotary_share : 1));
    ESPI_TRY(espi_json_real(&share, rope, path, "partial_rotary_factor", NULL, share));
    if (share != 1 && c->family->rotary_share == 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: partial_rotary_factor: got %g, expected 1: %s turns whole heads", path, share,
                         c->family->name);
    if (!(share > 0 && share <= 1))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: partial_rotary_factor: got %g, expected a number above 0, at most 1", path, share);
    c->rotary_dim = (int64_t)((double)c->head_dim * share);
    if (c->rotary_dim < 2 || c->rotary_dim % 2 != 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: partial_rotary_factor: got %g, that is %lld of %lld values, expected an even number", path,
                         share, (long long)c->rotary_dim, (long long)c->head_dim);
    return ESP_OK;
}

/* Transformers 4: rope_theta and rope_scaling (null, or a dict with "rope_type", formerly "type").  5: all in rope_parameters. */
static esp_status read_rope(espi_config *c, const json_t *root, const char *path) {
    const json_t *rope, *type;
    ESPI_TRY(lookup(&rope, root, path, "rope_parameters", "rope_scaling"));
    if (rope && !json_is_object(rope)) return fail_value(path, "rope_parameters or rope_scaling", rope, "an object or null");
    ESPI_TRY(espi_json_real(&c->rope_theta, root, path, "rope_theta", NULL, 0));
    double inner;
    ESPI_TRY(espi_json_real(&inner, rope, path, "rope_theta", NULL, c->rope_theta));
    if (c->rope_theta != 0 && c->rope_theta != inner)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: rope_theta: got %g outside and %g inside rope_parameters, expected one value", path,
                         c->rope_theta, inner);
    c->rope_theta = inner != 0 ? inner : c->family->rope_theta;
    if (!(c->rope_theta > 0) || !isfinite(c->rope_theta))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: rope_theta: got %g, expected a positive number", path, c->rope_theta);
    ESPI_TRY(read_rotary_share(c, root, rope, path));

    c->rope_factor = c->rope_attention = 1;
    ESPI_TRY(lookup(&type, rope, path, "rope_type", "type"));
    if (!type && rope && json_object_get(rope, "factor"))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: rope scaling has a factor and no rope_type, expected \"linear\", \"yarn\" or \"default\"",
                         path);
    if (!type) return ESP_OK;
    const char *name = json_string_value(type);
    if (!name) return fail_value(path, "rope_type", type, "a string");
    if (strcmp(name, "default") == 0) return ESP_OK;
    const bool yarn = strcmp(name, "yarn") == 0;
    if (!yarn && strcmp(name, "linear") != 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: rope_type: got \"%s\", expected \"default\", \"linear\" or \"yarn\": no other is offered", path, name);
    ESPI_TRY(read_positive(&c->rope_factor, rope, path, "factor", NAN));
    return yarn ? read_yarn(c, rope, path) : ESP_OK;
}

static esp_status read_dtype(espi_config *c, const json_t *root, const char *path) {
    static const struct {
        const char *name;
        esp_dtype dtype;
    } known[] = {{"bfloat16", ESP_BF16}, {"float16", ESP_F16}, {"float32", ESP_F32}};
    const json_t *v;
    ESPI_TRY(lookup(&v, root, path, "dtype", "torch_dtype"));
    const esp_dtype unsaid = c->family->stored_dtype == ESP_DTYPE_NONE ? ESP_F32 : c->family->stored_dtype;
    c->stored_dtype = v ? ESP_DTYPE_NONE : unsaid;
    for (int i = 0; i < ESPI_COUNT(known); i++)
        if (json_is_string(v) && strcmp(known[i].name, json_string_value(v)) == 0) c->stored_dtype = known[i].dtype;
    return c->stored_dtype == ESP_DTYPE_NONE ? fail_value(path, "dtype", v, "\"bfloat16\", \"float16\" or \"float32\"") : ESP_OK;
}

static esp_status read_quantisation(espi_config *c, const json_t *root, const char *path) {
    const json_t *q, *method;
    ESPI_TRY(lookup(&q, root, path, "quantization_config", NULL));
    if (!q) return ESP_OK;
    ESPI_TRY(lookup(&method, q, path, "quant_method", NULL));
    bool eight;
    ESPI_TRY(espi_json_flag(&eight, q, path, "load_in_8bit", false));
    const char *name = json_string_value(method);
    c->mxfp4 = name && strcmp(name, "mxfp4") == 0;
    c->quantised = name && strcmp(name, "bitsandbytes") == 0 && !eight;
    const char *type = json_string_value(json_object_get(q, "bnb_4bit_quant_type"));
    c->fp4 = c->quantised && type && strcmp(type, "fp4") == 0;
    if (!c->mxfp4 && !c->quantised)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: quantization_config: got quant_method \"%s\"%s, expected bitsandbytes in 4 bits, mxfp4, or none", path,
                         name ? name : "?", eight ? " in 8 bits" : "");
    return ESP_OK;
}

static esp_status read_attention(espi_config *c, const json_t *root, const char *path) {
    ESPI_TRY(espi_json_count(&c->heads, root, path, "num_attention_heads", NULL, -1));
    ESPI_TRY(espi_json_count(&c->kv_heads, root, path, "num_key_value_heads", NULL, c->heads));
    if (c->heads < 1 || c->kv_heads < 1 || c->heads % c->kv_heads != 0)
        return ESPI_FAIL(ESP_ERR_FORMAT,
                         "%s: num_attention_heads, num_key_value_heads: got %lld, %lld, expected a multiple of the second for the first",
                         path, (long long)c->heads, (long long)c->kv_heads);
    ESPI_TRY(espi_json_count(&c->head_dim, root, path, "head_dim", NULL, 0));
    if (c->head_dim == 0 && c->hidden % c->heads != 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: head_dim is missing and hidden_size %lld is no multiple of %lld heads, expected head_dim",
                         path, (long long)c->hidden, (long long)c->heads);
    if (c->head_dim == 0) c->head_dim = c->hidden / c->heads;
    if (c->head_dim % 2 != 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: head_dim: got %lld, expected an even number", path, (long long)c->head_dim);
    ESPI_TRY(espi_json_flag(&c->attention_bias, root, path, "attention_bias", c->family->attention_bias));
    c->output_bias = c->attention_bias;
    double dropout;
    ESPI_TRY(espi_json_real(&dropout, root, path, "attention_dropout", NULL, 0));
    if (dropout != 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: attention_dropout: got %g, expected 0: none is offered, set it to 0 to train without",
                         path, dropout);
    return ESP_OK;
}

static esp_status read_refused(espi_config *c, const json_t *top, const char *path) {
    const espi_family *f = c->family;
    for (int i = 0; i < f->n_refused; i++) {
        int64_t *id = &c->refused[c->n_refused++];
        *id = f->refused[i].fallback;
        if (f->refused[i].key) ESPI_TRY(espi_json_count(id, top, path, f->refused[i].key, NULL, *id));
    }
    return ESP_OK;
}

/* Room for what is said layer by layer: every layer MoE, and sees everything. */
static esp_status take_layers(espi_config *c, const char *path) {
    c->window = calloc((size_t)c->layers, sizeof *c->window);
    c->mlp_kind = calloc((size_t)c->layers, sizeof *c->mlp_kind);
    if (!c->window || !c->mlp_kind)
        return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the kinds of %lld layers", path, (long long)c->layers);
    for (int64_t l = 0; l < c->layers; l++) c->mlp_kind[l] = ESPI_MLP_MOE;
    c->moe_layers = c->layers;
    return ESP_OK;
}

/* root: the text model's settings; top: the whole file, which is the same where the family nests nothing. */
static esp_status read_common(espi_config *c, const json_t *root, const json_t *top, const char *path) {
    ESPI_TRY(espi_json_count(&c->layers, root, path, "num_hidden_layers", NULL, -1));
    ESPI_TRY(espi_json_count(&c->hidden, root, path, "hidden_size", NULL, -1));
    ESPI_TRY(espi_json_count(&c->vocab, root, path, "vocab_size", NULL, -1));
    ESPI_TRY(espi_json_count(&c->max_position, root, path, "max_position_embeddings", NULL, c->family->max_position));
    if (c->layers < 1 || c->hidden < 1 || c->vocab < 1 || c->max_position < 1)
        return ESPI_FAIL(
            ESP_ERR_FORMAT,
            "%s: num_hidden_layers, hidden_size, vocab_size, max_position_embeddings: got %lld, %lld, %lld, %lld, expected 1 or "
            "more of each",
            path, (long long)c->layers, (long long)c->hidden, (long long)c->vocab, (long long)c->max_position);
    ESPI_TRY(read_attention(c, root, path));
    c->router_scaling = 1;
    ESPI_TRY(take_layers(c, path));
    ESPI_TRY(read_rope(c, root, path));
    ESPI_TRY(espi_json_real(&c->norm_eps, root, path, "rms_norm_eps", NULL, c->family->norm_eps));
    if (!(c->norm_eps >= 0) || !isfinite(c->norm_eps))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: rms_norm_eps: got %g, expected 0 or a positive number", path, c->norm_eps);
    /* The flag of the whole model decides; that of a nested text model has another default and is not asked. */
    ESPI_TRY(espi_json_flag(&c->tied_head, top, path, "tie_word_embeddings", false));
    ESPI_TRY(read_token_id(&c->bos_id, root, path, "bos_token_id", c->vocab));
    ESPI_TRY(read_token_id(&c->eos_id, root, path, "eos_token_id", c->vocab));
    ESPI_TRY(read_token_id(&c->pad_id, root, path, "pad_token_id", c->vocab));
    ESPI_TRY(read_refused(c, top, path));
    ESPI_TRY(read_dtype(c, json_object_get(top, "dtype") || json_object_get(top, "torch_dtype") ? top : root, path));
    ESPI_TRY(read_quantisation(c, top, path));
    const json_t *act;
    ESPI_TRY(lookup(&act, root, path, "hidden_act", NULL));
    const char *name = json_string_value(act);
    if (act && (!name || strcmp(name, "silu") != 0))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: hidden_act: got \"%s\", expected \"silu\": no other is offered", path,
                         name ? name : "?");
    return ESP_OK;
}

/* What holds for every family once it has read its part. */
static esp_status check(const espi_config *c, const char *path) {
    if (c->experts < 1 || c->expert_width < 1)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: experts, expert width: got %lld, %lld, expected 1 or more of each", path,
                         (long long)c->experts, (long long)c->expert_width);
    if (c->top_k < 1 || c->top_k > c->experts)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: num_experts_per_tok: got %lld, expected 1 to the number of experts, %lld", path,
                         (long long)c->top_k, (long long)c->experts);
    if (c->moe_layers < c->layers && c->dense_width < 1)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: intermediate_size: got %lld, expected 1 or more: there are dense layers", path,
                         (long long)c->dense_width);
    /* Later sums of bytes are made in 64 bits. */
    const double h = (double)c->hidden, d = (double)(c->heads + c->kv_heads) * (double)c->head_dim, i = (double)c->expert_width;
    const double values =
        2 * (double)c->vocab * h +
        (double)c->layers * h * (2 * d + 3 * (double)(c->dense_width + c->shared_width) + (double)c->experts * (3 * i + 1));
    if (!(values < 0x1p56))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: describes %g weights, expected less than 2^56: a dimension is wrong", path, values);
    return ESP_OK;
}

static esp_status read_root(espi_config *c, const json_t *root, const char *path) {
    if (!json_is_object(root)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: not a JSON object, expected one", path);
    const char *type = json_string_value(json_object_get(root, "model_type"));
    if (!type) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: model_type is missing, expected one of: %s", path, espi_family_list());
    c->family = espi_family_find(type);
    if (!c->family)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: model_type: got \"%s\", expected one of: %s", path, type, espi_family_list());
    const char *nested = c->family->nested;
    const json_t *text = nested ? json_object_get(root, nested) : root;
    if (!json_is_object(text))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %s is missing or no object, expected the settings of the text model", path, nested);
    ESPI_TRY(read_common(c, text, root, path));
    ESPI_TRY(c->family->read_config(c, text, path));
    return check(c, path);
}

esp_status espi_config_read(espi_config *config, const char *dir) {
    *config = (espi_config){0};
    char path[ESPI_PATH_MAX], *text;
    size_t bytes;
    ESPI_TRY(espi_path_join(path, dir, "config.json"));
    ESPI_TRY(espi_file_read_all(&text, &bytes, path, MAX_CONFIG));
    json_error_t error;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    const uint64_t hash = XXH3_64bits(text, bytes);
    free(text);
    const esp_status status =
        root ? read_root(config, root, path) : ESPI_FAIL(ESP_ERR_FORMAT, "%s: line %d: %s: not valid JSON", path, error.line, error.text);
    json_decref(root);
    config->hash = hash;
    if (status != ESP_OK) espi_config_free(config);
    return status;
}

void espi_config_free(espi_config *config) {
    free(config->mlp_kind);
    free(config->window);
    *config = (espi_config){0};
}
