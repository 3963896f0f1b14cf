/* exchange: the experts' part of a layer where several ranks hold them.  Twins: forward/exchange.c, backward/exchange.c.
 * Routed rows go to the ranks that hold their experts, which run the experts' room once for each rank that rows came from, in rank order:
 * the very calls that one rank makes batch after batch, so all sums have the same bits.  Results go back, and are combined where the token
 * is.  Four exchanges a layer, forward and backward together.
 *
 * A rank that would get more rows than it has room for takes them in rounds.  Of such a layer nothing is kept, and the backward asks for
 * the rows again.  Saved, on the side of the experts: espi_experts_saved, over espi_share_capacity() rows. */
#ifndef ESPI_CONTRACT_EXCHANGE_H
#define ESPI_CONTRACT_EXCHANGE_H

#include "contract/experts.h"

/* As espi_experts_forward. */
esp_status espi_exchange_forward(espi_pass *pass, int64_t layer, void *y, const void *x, const espi_experts *experts,
                                 const espi_routing *routing, const espi_experts_saved *saved, bool replay);
/* As espi_experts_backward. */
esp_status espi_exchange_backward(espi_pass *pass, int64_t layer, void *d_rows, void *d_row_weight, const void *d_out, const void *x,
                                  const espi_experts *experts, const espi_routing *routing, const espi_experts_saved *saved);

/* What both directions need on the side of the experts. */
typedef struct espi_arrivals {
    espi_round round;
    int64_t capacity;
    int32_t *offsets, *d_offsets; /* [spread, count+1] of the rows of each source in this round, counted from its first */
    const int32_t *ascending;     /* [capacity] 0, 1, 2, ..: arrived rows are in routed order already */
} espi_arrivals;
esp_status espi_arrivals_take(espi_pass *pass, espi_arrivals *arrivals, int64_t top_k);
/* The next round of `saved->counts`; false: all are done. */
bool espi_arrivals_next(espi_pass *pass, espi_arrivals *arrivals, esp_status *status);
/* The routing of what came from member `source`, and that part of what is kept.  *first: its first row. */
espi_routing espi_arrivals_of(const espi_pass *pass, const espi_arrivals *arrivals, int source, int64_t *first);
espi_experts_saved espi_arrivals_saved(const espi_pass *pass, const espi_experts *experts, const espi_experts_saved *saved, int64_t first);
/* The experts' side of one round of a forward: results act [capacity,H] of the rows in saved->x, source by source as they come.  back: results
 * go back as they are made, or NULL. */
esp_status espi_exchange_run(espi_pass *pass, int64_t layer, void *results, const espi_experts *experts, const espi_arrivals *arrivals,
                             const espi_experts_saved *saved, bool replay, const espi_row_array *back);
/* Rows of an array of values of the given size; NULL of a dry one. */
static inline void *espi_row(const void *base, int64_t row, int64_t width, size_t size) {
    return base ? (unsigned char *)base + (size_t)(row * width) * size : NULL;
}

#endif
