/* How what lies in a device's memory gets from rank to rank.  Over NCCL from device to device; or, where ESP_DEVICE_EXCHANGE=host asks for
 * it, through pinned memory of the host and the ranks' own messages.  Never the one for the other unasked.
 *
 * An exchange is begun, and goes on beside what is queued after it until its end is queued: begin(next); compute(this); end(next).  One
 * thread makes all calls of a rank, and all ranks make the same ones in the same order, also those with nothing to send. */
#ifndef ESPI_DIST_LINK_H
#define ESPI_DIST_LINK_H

#include "dist/comm.h"

/* One way of doing it.  Messages are of device memory, [n_arrays][ranks]; the own rank's have been copied. */
typedef struct espi_carrier {
    const char *name; /* "nccl", "host" */
    bool overlaps;    /* begin does not wait */
    esp_status (*begin)(void *self, espi_place place, const espi_message *send, const espi_message *recv, int n_arrays, double deadline);
    /* What was begun has failed since; or NULL. */
    esp_status (*check)(void *self);
    /* broken: a peer may be gone; what is under way is given up. */
    void (*close)(void *self, bool broken);
} espi_carrier;

typedef struct espi_link espi_link;

/* That of the context, over all ranks of ctx->comm: opened, collectively, when it is first asked for, and closed with the context.
 * ESP_DEVICE_EXCHANGE: "nccl" (also when unset) or "host".
 * ESP_ERR_UNSUPPORTED, on all ranks, where one of them has no NCCL that can be used; the sentence says what can be done. */
esp_status espi_link_of(espi_link **link, esp_ctx *ctx);
const char *espi_link_name(const espi_link *link);

/* Messages of `n_arrays` arrays: [n_arrays][ranks], send to and recv from each rank, in sizes that the peers have too.  They are read at once;
 * the memory that they name is the exchange's until its end.  *ticket [out]: what its end is asked for with. */
esp_status espi_link_begin(espi_link *link, espi_place place, const espi_message *send, const espi_message *recv, int n_arrays,
                           int *ticket);
/* What is queued from now on finds the exchange done. */
esp_status espi_link_end(espi_link *link, int ticket);

/* espi_comm_exchange() for arrays in device memory, begun: between all ranks, or only what goes to the one rank and comes from the other. */
typedef struct espi_pair {
    int to, from; /* -1: all */
} espi_pair;
esp_status espi_link_begin_rows(espi_link *link, espi_place place, const espi_row_array *arrays, int n_arrays, espi_row_ranges to,
                                espi_row_ranges from, espi_pair pair, int *ticket);
/* The same between all ranks, begun and ended. */
esp_status espi_link_exchange(espi_link *link, espi_place place, const espi_row_array *arrays, int n_arrays, espi_row_ranges to,
                              espi_row_ranges from);
/* Does an exchange go on beside the device's work? */
bool espi_link_overlaps(const espi_link *link);

/* comm_nccl.c.  Collective; *self belongs to the carrier. */
esp_status espi_carrier_nccl(const espi_carrier **carrier, void **self, esp_ctx *ctx);

#endif
