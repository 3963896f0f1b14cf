/* How much of the time a GPU is at work, and how often the host waits for it: from what CUPTI, CUDA's own tracer, records. */
#ifndef ESP_BENCH_BUSY_H
#define ESP_BENCH_BUSY_H

#include <stdbool.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct busy_time {
    double running, span; /* seconds: during which a kernel ran; from the first one's begin to the last one's end */
    double gaps; /* seconds between kernels, of no more than 20 us each: longer ones are the host's, which is slower while it records */
    int64_t kernels, waits; /* waits of the host for an event, a stream or everything */
} busy_time;

/* From now on all of that is recorded, graphs kernel by kernel: only those that are made from now on.  false, and a line of why: it cannot
 * be. */
bool busy_begin(void);
/* Forgets what was recorded so far. */
void busy_restart(void);
/* What was recorded since; and recording is over.  The GPU must be done. */
busy_time busy_end(void);

#ifdef __cplusplus
}
#endif
#endif
