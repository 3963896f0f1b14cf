/* gpt-oss: sinks, sliding and full layers in turn, YaRN, biases everywhere, clamped SwiGLU over interleaved rows, top-k before softmax,
 * MXFP4 experts.  Layout: formats-and-numerics 2 and 3. */
#include "models/family.h"

#include <string.h>

#define TYPES "layer_types"

/* Without a list of layer kinds, even layers slide. */
static esp_status read_windows(espi_config *c, const json_t *root, const char *path) {
    int64_t window;
    ESPI_TRY(espi_json_count(&window, root, path, "sliding_window", NULL, 128));
    const json_t *types = json_object_get(root, TYPES);
    const bool listed = types && !json_is_null(types);
    if (listed && (!json_is_array(types) || (int64_t)json_array_size(types) != c->layers))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: " TYPES ": got a list of %zu, expected one entry for each of %lld layers", path,
                         json_array_size(types), (long long)c->layers);
    for (int64_t l = 0; l < c->layers; l++) {
        const char *type = listed ? json_string_value(json_array_get(types, (size_t)l)) : l % 2 ? "full_attention" : "sliding_attention";
        const bool slides = type && strcmp(type, "sliding_attention") == 0;
        if (!slides && (!type || strcmp(type, "full_attention") != 0))
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                             "%s: " TYPES " entry %lld: got \"%s\", expected \"sliding_attention\" or \"full_attention\"", path,
                             (long long)l, type ? type : "?");
        if (slides && window < 1)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: sliding_window: got %lld, expected 1 or more: layer %lld slides", path, (long long)window,
                             (long long)l);
        c->window[l] = slides ? window : 0;
    }
    return ESP_OK;
}

static esp_status read_config(espi_config *c, const json_t *root, const char *path) {
    ESPI_TRY(espi_json_count(&c->experts, root, path, "num_local_experts", "num_experts", -1));
    ESPI_TRY(espi_json_count(&c->top_k, root, path, "num_experts_per_tok", "experts_per_token", -1));
    ESPI_TRY(espi_json_count(&c->expert_width, root, path, "intermediate_size", NULL, -1));
    ESPI_TRY(espi_json_real(&c->aux_coef, root, path, "router_aux_loss_coef", NULL, 0.001));
    ESPI_TRY(espi_json_real(&c->glu.limit, root, path, "swiglu_limit", NULL, 7));
    ESPI_TRY(espi_json_real(&c->glu.alpha, root, path, "swiglu_alpha", NULL, 1.702));
    if (!(c->glu.limit > 0) || !(c->glu.alpha > 0))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: swiglu_limit, swiglu_alpha: got %g, %g, expected positive numbers", path, c->glu.limit,
                         c->glu.alpha);
    const json_t *rope = json_object_get(root, "rope_parameters");
    if (!json_is_object(rope)) rope = json_object_get(root, "rope_scaling");
    if (!json_is_object(rope))
        return ESPI_FAIL(ESP_ERR_FORMAT,
                         "%s: neither rope_parameters nor rope_scaling is there, expected one of them: yarn as the model was trained "
                         "with, or rope_type \"default\"",
                         path);
    ESPI_TRY(read_windows(c, root, path));
    c->glu.interleaved = c->glu.clamped = true;
    c->renormalise = true; /* softmax over the selected logits alone is the renormalised softmax over all */
    c->sinks = c->router_bias = c->expert_bias = true;
    return ESP_OK;
}

#define LAYER "model.layers.%d."
#define EXPERTS LAYER "mlp.experts."

/* bitsandbytes files have the router one module deeper, and the experts in lists of matrices. */
const espi_family espi_family_gpt_oss = {.name = "gpt_oss",
                                         .read_config = read_config,
                                         .chat = ESPI_CHAT_HARMONY,
                                         .norm_eps = 1e-5,
                                         .rope_theta = 150000,
                                         .max_position = 131072,
                                         .attention_bias = true,
                                         .stored_dtype = ESP_BF16, /* the published files are, and their config.json does not say */
                                         ESPI_NAMES_DECODER("model.", LAYER),
                                         .sinks = LAYER "self_attn.sinks",
                                         .router = LAYER "mlp.router",
                                         .expert_gate_up = EXPERTS "gate_up_projs.%d",
                                         .joined_down = EXPERTS "down_projs.%d",
                                         ESPI_NAMES_FUSED(EXPERTS),
                                         .fused_order = ESPI_FUSED_IN_OUT,
                                         .fused_experts = true,
                                         .experts_module = LAYER "mlp.experts",
                                         .renamed_from = ".mlp.router.",
                                         .renamed_to = ".mlp.router.linear."};
