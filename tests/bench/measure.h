/* What the benchmarks share: the clock, medians, and the names that go into a recorded figure. */
#ifndef ESP_BENCH_MEASURE_H
#define ESP_BENCH_MEASURE_H

#include "espalier/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { MAX_ROUNDS = 101, LINE = 160 };

static const char *program = "esp_bench";

static inline double clock_seconds(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* One thread: its processor time, which busy neighbours disturb least; several: the time that passes. */
static clockid_t stopwatch = CLOCK_THREAD_CPUTIME_ID;

static inline double now(void) {
    return clock_seconds(stopwatch);
}

static inline void die(const char *what) {
    fprintf(stderr, "%s: %s: %s\n", program, what, esp_last_error());
    exit(1);
}

/* In large pages where it is much, as a context takes its memory. */
static inline void *allocate(size_t bytes) {
    const size_t align = bytes >= (2u << 20) ? 2u << 20 : 64;
    const size_t rounded = (bytes + align) / align * align;
    void *p = aligned_alloc(align, rounded);
    if (!p) die("out of memory");
#ifdef MADV_HUGEPAGE
    if (align > 64) (void)madvise(p, rounded, MADV_HUGEPAGE);
#endif
    return p;
}

static inline int by_value(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static inline double median(const double *values, int n) {
    double sorted[MAX_ROUNDS];
    memcpy(sorted, values, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, by_value);
    return sorted[n / 2];
}

static inline const char *cpu_name(void) {
    static char line[LINE];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f)) {
        char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !value) continue;
        line[strcspn(line, "\n")] = '\0';
        fclose(f);
        return value + 2;
    }
    if (f) fclose(f);
    return "unknown";
}

static inline void date_now(char date[LINE]) {
    const time_t today = time(NULL);
    strftime(date, LINE, "%Y-%m-%dT%H:%M:%SZ", gmtime(&today));
}

#endif
