/* attention: norm output -> attention output after o_proj (without the residual).  Twins: forward/attention.c, backward/attention.c.
 * q, k, v projections with LoRA; RMSNorm of q and k, per head or whole; limits; RoPE; causal grouped-query attention; output projection. */
#ifndef ESPI_CONTRACT_ATTENTION_H
#define ESPI_CONTRACT_ATTENTION_H

#include "contract/linear.h"
#include "contract/norm.h"

/* One of q, k, v on its way: x W^T (+ LoRA), RMSNorm, limits; RoPE then turns `out` in place. */
typedef struct espi_projection_saved {
    void *u;          /* LoRA */
    void *raw, *rstd; /* before the norm, and its rstd; NULL without one */
    void *free;       /* before the limits of clip_qkv; NULL without */
    void *out;        /* real [T,heads*D] as it enters attention */
} espi_projection_saved;

typedef struct espi_attention_saved {
    espi_projection_saved q, k, v;
    void *out, *lse, *u_o; /* real [T,Hq*D], [T,Hq]; LoRA of the output projection */
} espi_attention_saved;

/* The rotation of q or k, and of their gradients. */
static inline espi_rope espi_rope_of(const espi_pass *pass, void *x, int64_t heads) {
    const espi_config *c = &pass->model->config;
    return (espi_rope){.x = x,
                       .cos = pass->cos,
                       .sin = pass->sin,
                       .tokens = pass->tokens,
                       .heads = heads,
                       .half = c->rotary_dim / 2,
                       .head_dim = c->head_dim};
}

/* y real [T,H] overwrite; x real [T,H].  `saved` is taken here.  With a cache the new keys and values are appended to it first. */
esp_status espi_attention_forward(espi_pass *pass, int64_t layer, void *y, const void *x, espi_attention_saved *saved);
/* d_x real [T,H] overwrite, or NULL: not wanted.  LoRA gradients: add. */
esp_status espi_attention_backward(espi_pass *pass, int64_t layer, void *d_x, const void *d_y, const void *x,
                                   const espi_attention_saved *saved);

#endif
