/* linear: a frozen projection with an optional bias and an optional LoRA branch.  Twins: forward/linear.c, backward/linear.c.
 * Saved: x (the caller's) and u = x A^T, taken here, NULL without a branch. */
#ifndef ESPI_CONTRACT_LINEAR_H
#define ESPI_CONTRACT_LINEAR_H

#include "contract/pass.h"

/* Takes u for this projection: real [T,r]. */
esp_status espi_linear_take_saved(espi_pass *pass, const espi_linear *linear, void **u);
/* y real [T,out] overwrite. */
esp_status espi_linear_forward(espi_pass *pass, void *y, void *u, const void *x, const espi_linear *linear);
/* d_x real [T,in]: overwrite, or add when accumulate; NULL: not wanted.  The branch's d_a and d_b: add. */
esp_status espi_linear_backward(espi_pass *pass, void *d_x, bool accumulate, const void *d_y, const void *x, const void *u,
                                const espi_linear *linear);

#endif
