/* Where a context's threads run and its memory lies, on a machine whose memory has several nodes.
 *
 * Each thread is bound to a node, to all of its processors that this process may use: as many threads to each node as it has of those.  So
 * processes that have the same processors do not meet on one of them, and where a process may use those of one node only, nothing is bound.
 * The calling thread is the program's: it is bound while it touches memory first, no longer.  Memory is cut into pieces of ESPI_PIECE bytes;
 * piece p of the address space is touched first by thread p % threads, and an op's threads take the tasks first whose weights lie near
 * (espi_nodes).
 *
 * Where the user binds threads (OMP_PROC_BIND, OMP_PLACES), only what is near is looked at.  ESP_NUMA=0: nothing of all this. */
#ifndef ESPI_CORE_THREADS_H
#define ESPI_CORE_THREADS_H

#include "core/ctx.h"

#define ESPI_PIECE_BITS 21
#define ESPI_PIECE ((size_t)1 << ESPI_PIECE_BITS) /* a large page */

struct espi_nodes;

/* root [in]  "" but for tests: what stands before /sys */
esp_status espi_threads_bind(esp_ctx *ctx, const char *root);
void espi_threads_release(esp_ctx *ctx);
/* NULL: one node. */
const struct espi_nodes *espi_threads_nodes(const esp_ctx *ctx);

/* By each thread of a region, around the first touch of memory. */
void espi_threads_enter(const esp_ctx *ctx);
void espi_threads_leave(const esp_ctx *ctx);

#endif
