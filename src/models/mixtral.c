/* Mixtral: every layer MoE, one sliding window for all layers where it is set, renormalised top-k.  Layout: formats-and-numerics 2 and 3.
 */
#include "models/family.h"

static esp_status read_config(espi_config *c, const json_t *root, const char *path) {
    ESPI_TRY(espi_json_count(&c->experts, root, path, "num_local_experts", "num_experts", -1));
    ESPI_TRY(espi_json_count(&c->top_k, root, path, "num_experts_per_tok", NULL, -1));
    ESPI_TRY(espi_json_count(&c->expert_width, root, path, "intermediate_size", NULL, -1));
    ESPI_TRY(espi_json_real(&c->aux_coef, root, path, "router_aux_loss_coef", NULL, 0.001));
    ESPI_TRY(espi_json_only(root, path, "router_jitter_noise", 0, "none is offered, set it to 0 to train without"));
    int64_t window;
    ESPI_TRY(espi_json_count(&window, root, path, "sliding_window", NULL, 0));
    for (int64_t l = 0; l < c->layers; l++) c->window[l] = window;
    c->renormalise = true;
    c->attention_bias = c->output_bias = false; /* the architecture has none, whatever the file says */
    return ESP_OK;
}

#define LAYER "model.layers.%d."
#define MOE LAYER "block_sparse_moe."

const espi_family espi_family_mixtral = {.name = "mixtral",
                                         .read_config = read_config,
                                         .norm_eps = 1e-5,
                                         .rope_theta = 1e6,
                                         .max_position = 131072,
                                         ESPI_NAMES_DECODER("model.", LAYER),
                                         .router = MOE "gate",
                                         .expert_gate = MOE "experts.%d.w1",
                                         .expert_up = MOE "experts.%d.w3",
                                         .expert_down = MOE "experts.%d.w2",
                                         ESPI_NAMES_FUSED(MOE "experts."),
                                         .experts_module = LAYER "mlp.experts",
                                         .renamed_from = ".block_sparse_moe.",
                                         .renamed_to = ".mlp."};
