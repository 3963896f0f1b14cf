/* attention: norm output -> attention output after o_proj (without the residual).  Twins: forward/attention.c, backward/attention.c.
 * q, k, v projections with LoRA; per-head RMSNorm of q and k; RoPE; causal grouped-query attention; output projection. */
#ifndef ESPI_CONTRACT_ATTENTION_H
#define ESPI_CONTRACT_ATTENTION_H

#include "contract/linear.h"
#include "contract/norm.h"

typedef struct espi_attention_saved {
    void *q, *k, *v;             /* real [T,Hq*D], [T,Hk*D] x 2, as they enter attention */
    void *q_raw, *k_raw;         /* before the q/k norm; NULL without one */
    void *q_rstd, *k_rstd;       /* [T*Hq], [T*Hk] */
    void *out, *lse;             /* [T,Hq*D], [T,Hq] */
    void *u_q, *u_k, *u_v, *u_o; /* LoRA */
} espi_attention_saved;

/* y real [T,H] overwrite; x real [T,H].  `saved` is taken here.  With a cache the new keys and values are appended to it first. */
esp_status espi_attention_forward(espi_pass *pass, int64_t layer, void *y, const void *x, espi_attention_saved *saved);
/* d_x real [T,H] overwrite.  LoRA gradients: add. */
esp_status espi_attention_backward(espi_pass *pass, int64_t layer, void *d_x, const void *d_y, const void *x,
                                   const espi_attention_saved *saved);

#endif
