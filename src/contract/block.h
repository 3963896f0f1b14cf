/* block: one decoder layer, h -> h + Attn(norm1(h)) -> + MLP(norm2(.)).  Twins: forward/block.c, backward/block.c.
 * And its MoE half by itself, which the block level of the public API runs. */
#ifndef ESPI_CONTRACT_BLOCK_H
#define ESPI_CONTRACT_BLOCK_H

#include "contract/attention.h"
#include "contract/combine.h"
#include "contract/experts.h"
#include "contract/route.h"

typedef struct espi_moe_saved {
    espi_route_saved route;
    espi_experts_saved experts;
} espi_moe_saved;

typedef struct espi_block_saved {
    void *norm1, *rstd1, *norm2, *rstd2; /* real [T,H], [T] */
    void *h1;                            /* real [T,H] after attention */
    espi_attention_saved attention;
    espi_moe_saved moe;                 /* MoE layers */
    void *mlp_gu, *u_mlp_gu, *u_mlp_dn; /* dense layers and shared experts: real [T,2I], LoRA */
} espi_block_saved;

/* The routing of a layer, and what else outlives a checkpoint, is taken apart from the rest.  Nothing for a dense layer. */
esp_status espi_block_take_lasting(espi_pass *pass, int64_t layer, espi_block_saved *saved);

/* out real [T,H] overwrite; x real [T,H] must stay for the backward.  `saved` is taken here, but for what lasts (taken before).
 * replay: a checkpointed layer is run again for its backward: what lasts is there, and out (NULL) is not made. */
esp_status espi_block_forward(espi_pass *pass, int64_t layer, void *out, const void *x, espi_block_saved *saved, bool replay);
/* d real [T,H]: gradient of the layer's output on entry, of its input on return; or, when nobody asks for that (to_input false: everything
 * below is frozen), undefined on return. */
esp_status espi_block_backward(espi_pass *pass, int64_t layer, void *d, const void *x, const espi_block_saved *saved, bool to_input);

/* The MoE half.  out real [T,H] overwrite: add (or 0 when NULL) + MoE(x).  All of `saved` was taken before.
 * replay: as espi_block_forward. */
esp_status espi_moe_forward(espi_pass *pass, int64_t layer, void *out, const void *x, const void *add, const espi_router *router,
                            const espi_experts *experts, const espi_moe_saved *saved, bool replay);
/* d_x real [T,H] overwrite; d_out real [T,H]. */
esp_status espi_moe_backward(espi_pass *pass, int64_t layer, void *d_x, const void *d_out, const void *x, const espi_router *router,
                             const espi_experts *experts, const espi_moe_saved *saved);

espi_router espi_layer_router(const espi_pass *pass, int64_t layer);
espi_experts espi_layer_experts(const espi_pass *pass, int64_t layer);

#endif
