/* The clock that durations and deadlines are told by. */
#ifndef ESPI_CORE_CLOCK_H
#define ESPI_CORE_CLOCK_H

/* Seconds of the monotonic clock. */
double espi_seconds(void);

#endif
