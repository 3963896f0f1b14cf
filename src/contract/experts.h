/* experts: gather by expert, gate_up with LoRA, SwiGLU, down with LoRA.  Twins: forward/experts.c, backward/experts.c. */
#ifndef ESPI_CONTRACT_EXPERTS_H
#define ESPI_CONTRACT_EXPERTS_H

#include "contract/pass.h"

typedef struct espi_experts {
    espi_stack gate_up, down;
    const float *gate_up_bias, *down_bias; /* [E,2I], [E,H] or NULL */
    espi_lora lora_gate_up, lora_down;
    espi_glu glu;
} espi_experts;

typedef struct espi_experts_saved {
    void *gu;          /* real [S,2I] pre-activations; the activation is formed again in the backward */
    void *u_gu, *u_dn; /* real [S,R] x A^T of the two branches, NULL without */
    /* Where ranks share the experts, S is what espi_share_capacity() says, and: */
    void *x;         /* real [S,H] rows that came */
    int32_t *counts; /* [ranks,E] in host memory: whose rows went where; lasts */
} espi_experts_saved;

/* u_dn outlives a checkpoint, so it is taken apart from the rest: it is small, and the product that it comes with is not made again. */
esp_status espi_experts_take_lasting(espi_pass *pass, const espi_experts *experts, int64_t top_k, espi_experts_saved *saved);
esp_status espi_experts_take_saved(espi_pass *pass, const espi_experts *experts, int64_t top_k, espi_experts_saved *saved);
/* y real [S,H] overwrite: each routed row's output, not yet weighted.  replay: a checkpointed layer is run again
 * for its backward, which reads no y: it is not made. */
esp_status espi_experts_forward(espi_pass *pass, int64_t layer, void *y, const void *x, const espi_experts *experts,
                                const espi_routing *routing, const espi_experts_saved *saved, bool replay);
/* d_rows real [S,H] overwrite: gradient of each routed row's input; d_row_weight real [S] overwrite: of its gate weight.
 * d_out real [T,H] gradient of the combined output.  LoRA gradients: add. */
esp_status espi_experts_backward(espi_pass *pass, void *d_rows, void *d_row_weight, const void *d_out, const void *x,
                                 const espi_experts *experts, const espi_routing *routing, const espi_experts_saved *saved);

#endif
