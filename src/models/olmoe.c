/* OLMoE: every layer MoE, q/k norm over the whole projection, q, k and v limited, softmax before top-k.  Layout: formats-and-numerics 2
 * and 3. */
#include "models/family.h"

#include <math.h>

static esp_status read_config(espi_config *c, const json_t *root, const char *path) {
    ESPI_TRY(espi_json_count(&c->experts, root, path, "num_experts", "num_local_experts", -1));
    ESPI_TRY(espi_json_count(&c->top_k, root, path, "num_experts_per_tok", NULL, -1));
    ESPI_TRY(espi_json_count(&c->expert_width, root, path, "intermediate_size", NULL, -1));
    ESPI_TRY(espi_json_flag(&c->renormalise, root, path, "norm_topk_prob", false));
    ESPI_TRY(espi_json_real(&c->aux_coef, root, path, "router_aux_loss_coef", NULL, 0.01));
    ESPI_TRY(espi_json_real(&c->clip_qkv, root, path, "clip_qkv", NULL, 0));
    if (!(c->clip_qkv >= 0) || !isfinite(c->clip_qkv))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: clip_qkv: got %g, expected a positive number, or null for none", path, c->clip_qkv);
    c->qk_norm = c->whole_qk_norm = true;
    return ESP_OK;
}

#define LAYER "model.layers.%d."
#define EXPERTS LAYER "mlp.experts."

const espi_family espi_family_olmoe = {.name = "olmoe",
                                       .read_config = read_config,
                                       .norm_eps = 1e-5,
                                       .rope_theta = 10000,
                                       .max_position = 4096,
                                       ESPI_NAMES_DECODER("model.", LAYER),
                                       ESPI_NAMES_QK_NORM(LAYER),
                                       .router = LAYER "mlp.gate",
                                       ESPI_NAMES_EXPERTS(EXPERTS),
                                       ESPI_NAMES_FUSED(EXPERTS),
                                       .experts_module = LAYER "mlp.experts"};
