/* Qwen3-MoE: dense or MoE layers in any mix, q/k norm per head, softmax before top-k.  Layout: formats-and-numerics 2 and 3. */
#include "models/family.h"

static esp_status read_config(espi_config *c, const json_t *root, const char *path) {
    ESPI_TRY(espi_json_count(&c->experts, root, path, "num_experts", "num_local_experts", -1));
    ESPI_TRY(espi_json_count(&c->top_k, root, path, "num_experts_per_tok", NULL, -1));
    ESPI_TRY(espi_json_count(&c->expert_width, root, path, "moe_intermediate_size", NULL, -1));
    ESPI_TRY(espi_json_flag(&c->renormalise, root, path, "norm_topk_prob", false));
    ESPI_TRY(espi_json_real(&c->aux_coef, root, path, "router_aux_loss_coef", NULL, 0.001));
    ESPI_TRY(espi_config_sparse_layers(c, root, path));
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
                                           .chat = ESPI_CHAT_CHATML,
                                           .norm_eps = 1e-6,
                                           .rope_theta = 10000,
                                           .max_position = 32768,
                                           ESPI_NAMES_DECODER("model.", LAYER),
                                           ESPI_NAMES_QK_NORM(LAYER),
                                           .router = LAYER "mlp.gate",
                                           ESPI_NAMES_DENSE(LAYER "mlp."),
                                           ESPI_NAMES_EXPERTS(EXPERTS),
                                           ESPI_NAMES_FUSED(EXPERTS),
                                           .experts_module = LAYER "mlp.experts"};
