/* Pieces of a pass that run again and again with the same ops on the same memory are recorded once and launched from then on: on a device
 * that takes longer to be told than to do. */
#ifndef ESPI_CORE_RECORD_H
#define ESPI_CORE_RECORD_H

#include "core/ctx.h"

/* A piece: calls of ops on `arena`, and nothing on host memory that may not be done twice or that an op has to be done for. */
typedef esp_status (*espi_piece)(void *user);

/* Runs the piece.  It is walked first with no op being run, which tells the arguments of every op: a piece that has had the very same before
 * is launched from its recording (made the second time it comes).  So a recording is never used for other addresses, sizes or numbers.
 * allowed: false where the piece waits for the device, as under a probe. */
esp_status espi_recorded(esp_ctx *ctx, espi_arena *arena, bool allowed, const char *name, espi_piece piece, void *user);
/* Forgets all recordings: those that hold memory that goes away. */
void espi_recordings_free(esp_ctx *ctx);

/* select.c: an op's number, arguments and scratch, while a piece is walked. */
void espi_recorded_op(esp_ctx *ctx, int op, const void *args, size_t bytes, const void *scratch);

#endif
