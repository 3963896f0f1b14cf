/* Qwen3-VL-MoE, the text tower: Qwen3-MoE whose gate weights are always renormalised, its settings and tensors one level deeper, experts
 * fused in either order.  The tower for pictures is left out, and so are the tokens that stand for pictures: with text alone the three
 * position ids of its RoPE are equal, which is plain RoPE.  Layout: formats-and-numerics 2 and 3. */
#include "models/family.h"

static esp_status read_config(espi_config *c, const json_t *root, const char *path) {
    ESPI_TRY(espi_json_count(&c->experts, root, path, "num_experts", "num_local_experts", -1));
    ESPI_TRY(espi_json_count(&c->top_k, root, path, "num_experts_per_tok", NULL, -1));
    ESPI_TRY(espi_json_count(&c->expert_width, root, path, "moe_intermediate_size", NULL, -1));
    ESPI_TRY(espi_json_real(&c->aux_coef, root, path, "router_aux_loss_coef", NULL, 0.001));
    ESPI_TRY(espi_config_sparse_layers(c, root, path));
    c->renormalise = c->qk_norm = true;
    return ESP_OK;
}

#define TEXT "model.language_model."
#define LAYER TEXT "layers.%d."
#define EXPERTS LAYER "mlp.experts."

const espi_family espi_family_qwen3_vl_moe = {.name = "qwen3_vl_moe",
                                              .read_config = read_config,
                                              .nested = "text_config",
                                              .norm_eps = 1e-6,
                                              .rope_theta = 500000,
                                              .max_position = 128000,
                                              ESPI_NAMES_DECODER(TEXT, LAYER),
                                              ESPI_NAMES_QK_NORM(LAYER),
                                              .router = LAYER "mlp.gate",
                                              ESPI_NAMES_DENSE(LAYER "mlp."),
                                              ESPI_NAMES_EXPERTS(EXPERTS),
                                              ESPI_NAMES_FUSED(EXPERTS),
                                              .fused_order = ESPI_FUSED_EITHER,
                                              .fused_experts = true,
                                              .experts_module = LAYER "mlp.experts",
                                              .skipped = "model.visual.",
                                              .refused = {{"vision_start_token_id", 151652},
                                                          {"vision_end_token_id", 151653},
                                                          {NULL, 151654}, /* padding between pictures */
                                                          {"image_token_id", 151655},
                                                          {"video_token_id", 151656}},
                                              .n_refused = 5};
