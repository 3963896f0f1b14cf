/* What a rank remembers of its calls, and the thread that sees when one takes long, or when the job has ended without this rank: because it
 * is busy outside the calls, or does not end after an abort.  The library ends no process: it tells the program, which does. */
#ifndef ESPI_DIST_WATCH_H
#define ESPI_DIST_WATCH_H

#include "dist/comm.h"

typedef struct espi_watch espi_watch;

/* Seconds: how long an ended job may go unnoticed by a rank that makes no call; how much longer than its deadline a call may take; how long
 * an abort may take, and all that the program does afterwards: what waits for a device may wait for ever. */
#define ESPI_WATCH_GRACE 2.0
#define ESPI_WATCH_OVERTIME 3.0
#define ESPI_WATCH_ABORT 5.0

esp_status espi_watch_make(espi_watch **watch, int rank, int size);
/* Starts the thread.  lost(self): whether a rank has left, may be NULL. */
esp_status espi_watch_start(espi_watch *w, bool (*lost)(void *self), void *self, esp_log_fn log, esp_comm_end_fn end, void *user);
/* Stops the thread; NULL is allowed. */
void espi_watch_free(espi_watch *w);

/* Around every call. */
void espi_watch_enter(espi_watch *w, uint64_t number, espi_place place, size_t sent, size_t taken, double patience);
void espi_watch_leave(espi_watch *w, bool failed);
/* The calls remembered, to the log, the last one last. */
void espi_watch_tell(espi_watch *w);

void espi_watch_step(espi_watch *w, int64_t step);
/* From now on ranks may leave: this one is about to. */
void espi_watch_leaving(espi_watch *w);
/* An abort with `code` begins: until espi_watch_free the program has ESPI_WATCH_ABORT. */
void espi_watch_abort(espi_watch *w, int code);

/* "rank 1 of 4 (node7), step 12, in \"rows back\", layer 3 (call 811)" */
void espi_watch_place(espi_watch *w, char *text, size_t bytes);

#endif
