/* A core for a measurement.  The processors of a virtual machine are threads of cores whose other threads may belong to somebody else; what
 * they do cannot be seen from inside, but tiles tell: where a core is shared, products whose tiles come from the first cache take longer than
 * the same products without loads, up to three times, and elsewhere they do not. */
#ifndef ESP_BENCH_QUIET_H
#define ESP_BENCH_QUIET_H

#include "roof.h"

#include <sched.h>

/* How much longer they may take. */
#define QUIET 1.15

#if defined(__x86_64__)
/* The shortest of a few passes.  The process has leave to use tiles. */
static inline double tile_seconds(const uint8_t *tiles, bool load) {
    double least = 0;
    tiles_begin();
    for (int pass = 0; pass < 6; pass++) {
        const double start = clock_seconds(CLOCK_MONOTONIC);
        for (int64_t step = 0; step < 256; step++) {
            const uint8_t *at = tiles + step % 4 * 4096;
            if (load)
                __asm__ volatile("tileloadd (%0,%1), %%tmm4\n\ttileloadd 1024(%0,%1), %%tmm5\n\t"
                                 "tileloadd 2048(%0,%1), %%tmm6\n\ttileloadd 3072(%0,%1), %%tmm7" ::"r"(at),
                                 "r"((int64_t)64)
                                 : "memory");
            __asm__ volatile("tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n\ttdpbf16ps %%tmm6, %%tmm5, %%tmm1\n\t"
                             "tdpbf16ps %%tmm7, %%tmm4, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::
                                 : "memory");
        }
        const double seconds = clock_seconds(CLOCK_MONOTONIC) - start;
        if (pass == 0 || seconds < least) least = seconds;
    }
    tiles_end();
    return least;
}
/* Of the processor that this thread is on. */
static inline double shared_by(void) {
    static uint8_t *tiles;
    if (!tiles) memset(tiles = allocate(4 * 4096), 0, 4 * 4096);
    return tile_seconds(tiles, true) / tile_seconds(tiles, false);
}
#else
static inline double shared_by(void) {
    return 1;
}
#endif

/* Takes the thread to that processor, if it may go there. */
static inline bool go_to(int cpu) {
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    return sched_setaffinity(0, sizeof one, &one) == 0;
}

/* Takes the thread to a processor that nobody shares now, of those that the process may use, or to the one that is shared least.  Whether
 * nobody shares it. */
static inline bool settle(void) {
    static cpu_set_t all;
    if (CPU_COUNT(&all) == 0) (void)sched_getaffinity(0, sizeof all, &all);
    for (int attempt = 0; attempt < 8; attempt++) {
        double least = shared_by();
        if (least <= QUIET) return true;
        int best = -1;
        for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (!CPU_ISSET(cpu, &all) || !go_to(cpu)) continue;
            const double by = shared_by();
            if (best >= 0 && by >= least) continue;
            best = cpu;
            least = by;
        }
        if (best < 0 || !go_to(best)) return false;
    }
    return false;
}

#endif
