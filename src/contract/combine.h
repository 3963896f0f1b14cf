/* combine: routed rows back to tokens, weighted, in slot order.  Twins: forward/combine.c, backward/combine.c.  Saved: nothing of its own.
 */
#ifndef ESPI_CONTRACT_COMBINE_H
#define ESPI_CONTRACT_COMBINE_H

#include "contract/pass.h"

/* out real [T,H] overwrite: add (or 0 when NULL) + sum over slots of weight * y; may be `add`. */
esp_status espi_combine_forward(espi_pass *pass, void *out, const void *y, const void *add, const espi_routing *routing, int64_t hidden);
/* d_x real [T,H] overwrite; d_weight real [T,K] overwrite.  d_rows real [S,H], d_row_weight real [S], as experts' backward wrote them. */
esp_status espi_combine_backward(espi_pass *pass, void *d_x, void *d_weight, const void *d_rows, const void *d_row_weight,
                                 const espi_routing *routing, int64_t hidden);

#endif
