/* norm: RMSNorm over rows of n values; the decoder's norms (n = H) and the per-head q/k norms (n = D).
 * Twins: forward/norm.c, backward/norm.c.  Saved: x (the caller's) and rstd. */
#ifndef ESPI_CONTRACT_NORM_H
#define ESPI_CONTRACT_NORM_H

#include "contract/pass.h"

/* y real [rows,n], rstd real [rows]: overwrite. */
esp_status espi_norm_forward(espi_pass *pass, void *y, void *rstd, const void *x, const float *w, int64_t rows, int64_t n);
/* d_x real [rows,n] overwrite, plus d_add (the gradient that came past the norm) unless NULL; may be d_y or d_add.  w is frozen. */
esp_status espi_norm_backward(espi_pass *pass, void *d_x, const void *d_y, const void *d_add, const void *x, const void *rstd,
                              const float *w, int64_t rows, int64_t n);

#endif
