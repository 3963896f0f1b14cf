/* embed: token ids -> the residual stream before layer 0.  Twins: forward/embed.c, backward/embed.c.
 * Saved: nothing (the ids are the batch's). */
#ifndef ESPI_CONTRACT_EMBED_H
#define ESPI_CONTRACT_EMBED_H

#include "contract/pass.h"

/* out real [T,H] overwrite. */
esp_status espi_embed_forward(espi_pass *pass, void *out);
/* d_table real [V,H] add, or NULL: frozen.  d_out real [T,H]. */
esp_status espi_embed_backward(espi_pass *pass, void *d_table, const void *d_out);

#endif
