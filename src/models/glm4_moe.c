/* GLM-4-MoE (GLM-4.5 and later): dense layers first, then MoE with sigmoid scores, a correction that ranks but does not weigh, and a
 * shared expert; the first part of each head is rotated. */
#include "models/family.h"

#include <math.h>

static esp_status read_config(espi_config *c, const json_t *root, const char *path) {
    int64_t first, shared;
    ESPI_TRY(espi_json_count(&c->experts, root, path, "n_routed_experts", "num_local_experts", -1));
    ESPI_TRY(espi_json_count(&c->top_k, root, path, "num_experts_per_tok", NULL, -1));
    ESPI_TRY(espi_json_count(&c->expert_width, root, path, "moe_intermediate_size", NULL, -1));
    ESPI_TRY(espi_json_flag(&c->renormalise, root, path, "norm_topk_prob", true));
    ESPI_TRY(espi_json_real(&c->router_scaling, root, path, "routed_scaling_factor", NULL, 1));
    ESPI_TRY(espi_json_only(root, path, "n_group", 1, "experts are chosen from all, not group by group"));
    ESPI_TRY(espi_json_only(root, path, "topk_group", 1, "experts are chosen from all, not group by group"));
    ESPI_TRY(espi_json_count(&shared, root, path, "n_shared_experts", NULL, 1));
    ESPI_TRY(espi_json_count(&first, root, path, "first_k_dense_replace", NULL, 1));
    ESPI_TRY(espi_json_count(&c->unused_layers, root, path, "num_nextn_predict_layers", NULL, 0));
    ESPI_TRY(espi_json_flag(&c->qk_norm, root, path, "use_qk_norm", false));
    if (!(c->router_scaling > 0) || !isfinite(c->router_scaling))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: routed_scaling_factor: got %g, expected a positive number", path, c->router_scaling);
    for (int64_t l = 0; l < first && l < c->layers; l++) espi_config_set_dense(c, l);
    ESPI_TRY(espi_json_count(&c->dense_width, root, path, "intermediate_size", NULL, c->moe_layers < c->layers ? -1 : 0));
    c->shared_width = shared * c->expert_width;
    c->router_sigmoid = c->router_correction = true;
    c->output_bias = false;
    return ESP_OK;
}

#define LAYER "model.layers.%d."
#define MLP LAYER "mlp."
#define EXPERTS MLP "experts."
#define SHARED MLP "shared_experts."

const espi_family espi_family_glm4_moe = {.name = "glm4_moe",
                                          .read_config = read_config,
                                          .norm_eps = 1e-5,
                                          .rope_theta = 10000,
                                          .rotary_share = 0.5,
                                          .max_position = 131072,
                                          ESPI_NAMES_DECODER("model.", LAYER),
                                          ESPI_NAMES_QK_NORM(LAYER),
                                          .router = MLP "gate",
                                          .router_correction = MLP "gate.e_score_correction_bias",
                                          ESPI_NAMES_DENSE(MLP),
                                          .shared_gate = SHARED "gate_proj",
                                          .shared_up = SHARED "up_proj",
                                          .shared_down = SHARED "down_proj",
                                          ESPI_NAMES_EXPERTS(EXPERTS),
                                          ESPI_NAMES_FUSED(EXPERTS),
                                          .experts_module = MLP "experts"};
