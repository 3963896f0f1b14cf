/* Qwen3-MoE: dense or MoE layers in any mix, q/k norm per head, softmax before top-k.  Layout: formats-and-numerics 2 and 3. */
#include "models/family.h"

#include <math.h>
#include <stdlib.h>

#define MLP_ONLY "mlp_only_layers"

/* Layer l is MoE iff it is not listed in mlp_only_layers and (l+1) is a multiple of decoder_sparse_step. */
static esp_status read_layer_kinds(espi_config *c, const json_t *root, const char *path) {
    int64_t step;
    ESPI_TRY(espi_json_count(&step, root, path, "decoder_sparse_step", NULL, 1));
    if (step < 1) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: decoder_sparse_step: got %lld, expected 1 or more", path, (long long)step);
    c->mlp_kind = calloc((size_t)c->layers, sizeof *c->mlp_kind);
    if (!c->mlp_kind) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the kinds of %lld layers", path, (long long)c->layers);
    for (int64_t l = 0; l < c->layers; l++) c->mlp_kind[l] = (l + 1) % step == 0 ? ESPI_MLP_MOE : ESPI_MLP_DENSE;
    const json_t *dense = json_object_get(root, MLP_ONLY);
    if (dense && !json_is_null(dense) && !json_is_array(dense))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: " MLP_ONLY ": got no list, expected a list of layer numbers", path);
    for (size_t i = 0; i < json_array_size(dense); i++) {
        const json_t *l = json_array_get(dense, i);
        if (!json_is_integer(l) || json_integer_value(l) < 0 || json_integer_value(l) >= c->layers)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: " MLP_ONLY " entry %zu: got %lld, expected a layer number below %lld", path, i,
                             (long long)json_integer_value(l), (long long)c->layers);
        c->mlp_kind[json_integer_value(l)] = ESPI_MLP_DENSE;
    }
    for (int64_t l = 0; l < c->layers; l++) c->moe_layers += c->mlp_kind[l] == ESPI_MLP_MOE;
    return ESP_OK;
}

static esp_status read_config(espi_config *c, const json_t *root, const char *path) {
    ESPI_TRY(espi_json_count(&c->experts, root, path, "num_experts", "num_local_experts", -1));
    ESPI_TRY(espi_json_count(&c->top_k, root, path, "num_experts_per_tok", NULL, -1));
    ESPI_TRY(espi_json_count(&c->expert_width, root, path, "moe_intermediate_size", NULL, -1));
    ESPI_TRY(espi_json_flag(&c->renormalise, root, path, "norm_topk_prob", false));
    ESPI_TRY(espi_json_real(&c->aux_coef, root, path, "router_aux_loss_coef", NULL, 0.001));
    ESPI_TRY(read_layer_kinds(c, root, path));
    /* Only dense layers have this width; a model without one need not state it. */
    ESPI_TRY(espi_json_count(&c->dense_width, root, path, "intermediate_size", NULL, c->moe_layers < c->layers ? -1 : 0));
    bool sliding;
    ESPI_TRY(espi_json_flag(&sliding, root, path, "use_sliding_window", false));
    if (sliding)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: use_sliding_window: got true, expected false: this version attends to the whole sequence", path);
    c->qk_norm = true;
    return ESP_OK;
}

#define LAYER "model.layers.%d."
#define EXPERTS LAYER "mlp.experts."

const espi_family espi_family_qwen3_moe = {.name = "qwen3_moe",
                                           .read_config = read_config,
                                           .embed = "model.embed_tokens.weight",
                                           .final_norm = "model.norm.weight",
                                           .head = "lm_head.weight",
                                           .norm1 = LAYER "input_layernorm",
                                           .norm2 = LAYER "post_attention_layernorm",
                                           .q = LAYER "self_attn.q_proj",
                                           .k = LAYER "self_attn.k_proj",
                                           .v = LAYER "self_attn.v_proj",
                                           .o = LAYER "self_attn.o_proj",
                                           .q_norm = LAYER "self_attn.q_norm",
                                           .k_norm = LAYER "self_attn.k_norm",
                                           .router = LAYER "mlp.gate",
                                           .dense_gate = LAYER "mlp.gate_proj",
                                           .dense_up = LAYER "mlp.up_proj",
                                           .dense_down = LAYER "mlp.down_proj",
                                           .expert_gate = EXPERTS "%d.gate_proj",
                                           .expert_up = EXPERTS "%d.up_proj",
                                           .expert_down = EXPERTS "%d.down_proj",
                                           .fused_gate_up = EXPERTS "gate_up_proj",
                                           .fused_down = EXPERTS "down_proj",
                                           .experts_module = LAYER "mlp.experts"};
