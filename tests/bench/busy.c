/* The times of kernels, from CUPTI; without it there are none. */
#include "busy.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#if defined(ESPI_HAVE_CUDA) && __has_include(<cupti.h>)
#include <cupti.h>
#endif

#if defined(CUPTI_API_VERSION) && CUPTI_API_VERSION >= 130000
typedef struct interval {
    uint64_t begin, end; /* ns */
} interval;

enum { ROOM = 8 << 20, LONGEST_GAP = 20000 };
static const CUpti_ActivityKind kinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_SYNCHRONIZATION};
enum { KINDS = sizeof kinds / sizeof *kinds };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* buffers may be handed over on a thread of CUPTI's */
static interval *intervals;
static size_t n_intervals, room_for;
static int64_t waits;

static struct {
    CUptiResult(CUPTIAPI *enable)(CUpti_ActivityKind kind);
    CUptiResult(CUPTIAPI *disable)(CUpti_ActivityKind kind);
    CUptiResult(CUPTIAPI *flush)(uint32_t flag);
    CUptiResult(CUPTIAPI *callbacks)(CUpti_BuffersCallbackRequestFunc request, CUpti_BuffersCallbackCompleteFunc complete);
    CUptiResult(CUPTIAPI *next)(uint8_t *buffer, size_t valid, CUpti_Activity **record);
} cupti;

static void CUPTIAPI give_buffer(uint8_t **buffer, size_t *size, size_t *most) {
    *buffer = malloc(ROOM);
    *size = *buffer ? ROOM : 0;
    *most = 0;
}

static void keep(uint64_t begin, uint64_t end) {
    if (n_intervals == room_for) {
        room_for = room_for ? 2 * room_for : 4096;
        intervals = realloc(intervals, room_for * sizeof *intervals);
        if (!intervals) {
            fprintf(stderr, "no memory for the times of %zu kernels\n", room_for);
            exit(1);
        }
    }
    intervals[n_intervals++] = (interval){begin, end};
}

static void CUPTIAPI take_buffer(CUcontext context, uint32_t stream, uint8_t *buffer, size_t size, size_t valid) {
    (void)context, (void)stream, (void)size;
    CUpti_Activity *record = NULL;
    pthread_mutex_lock(&lock);
    while (cupti.next(buffer, valid, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            const CUpti_ActivityKernel10 *k = (const void *)record;
            keep(k->start, k->end);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_SYNCHRONIZATION) {
            const CUpti_ActivitySynchronization2 *s = (const void *)record;
            waits += s->type != CUPTI_ACTIVITY_SYNCHRONIZATION_TYPE_STREAM_WAIT_EVENT;
        }
    }
    pthread_mutex_unlock(&lock);
    free(buffer);
}

/* A function's address, as a function pointer. */
static bool find(void *library, const char *name, void *function) {
    void *const address = dlsym(library, name);
    *(void **)function = address;
    return address != NULL;
}

static bool open_cupti(void) {
    static const char *const names[] = {"libcupti.so.13", "libcupti.so", "/usr/local/cuda/lib64/libcupti.so",
                                        "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so"};
    void *library = NULL;
    for (size_t i = 0; i < sizeof names / sizeof *names && !library; i++) library = dlopen(names[i], RTLD_NOW);
    return library && find(library, "cuptiActivityEnable", &cupti.enable) && find(library, "cuptiActivityDisable", &cupti.disable) &&
           find(library, "cuptiActivityFlushAll", &cupti.flush) && find(library, "cuptiActivityRegisterCallbacks", &cupti.callbacks) &&
           find(library, "cuptiActivityGetNextRecord", &cupti.next) && cupti.callbacks(give_buffer, take_buffer) == CUPTI_SUCCESS;
}

bool busy_begin(void) {
    if (!cupti.next && !open_cupti()) {
        printf("times of kernels: CUPTI is not here\n");
        return false;
    }
    for (int i = 0; i < KINDS; i++) {
        const CUptiResult result = cupti.enable(kinds[i]);
        if (result == CUPTI_SUCCESS) continue;
        printf("times of kernels: CUPTI refuses with %d\n", (int)result);
        return false;
    }
    busy_restart();
    return true;
}

void busy_restart(void) {
    cupti.flush(0);
    n_intervals = 0;
    waits = 0;
}

static int by_begin(const void *a, const void *b) {
    const interval *x = a, *y = b;
    return (x->begin > y->begin) - (x->begin < y->begin);
}

busy_time busy_end(void) {
    uint64_t running = 0, reached = 0, gaps = 0;
    cupti.flush(0);
    for (int i = 0; i < KINDS; i++) cupti.disable(kinds[i]);
    qsort(intervals, n_intervals, sizeof *intervals, by_begin);
    for (size_t i = 0; i < n_intervals; i++) {
        const uint64_t begin = intervals[i].begin > reached ? intervals[i].begin : reached;
        if (i > 0 && begin > reached && begin - reached <= LONGEST_GAP) gaps += begin - reached;
        if (intervals[i].end <= begin) continue;
        running += intervals[i].end - begin;
        reached = intervals[i].end;
    }
    return (busy_time){.running = 1e-9 * (double)running,
                       .span = n_intervals ? 1e-9 * (double)(reached - intervals[0].begin) : 0,
                       .gaps = 1e-9 * (double)gaps,
                       .kernels = (int64_t)n_intervals,
                       .waits = waits};
}
#else
bool busy_begin(void) {
    printf("times of kernels: this build has no CUPTI\n");
    return false;
}

void busy_restart(void) {}

busy_time busy_end(void) {
    return (busy_time){0};
}
#endif
