/* Threads on their memory nodes: threads.h says how.  Elsewhere than on Linux all is one node. */
#if defined(__linux__)
#define _GNU_SOURCE /* sched_setaffinity */
#endif
#include "core/threads.h"

#include "io/machine.h"
#include "kernels/backend.h"

#include <omp.h>
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sched.h>

_Static_assert((int)ESPI_NODES == (int)ESPI_MACHINE_NODES && (int)ESPI_MACHINE_PROCESSORS <= CPU_SETSIZE, "sizes of one thing");

typedef struct espi_threads {
    espi_nodes nodes;
    bool by_user;     /* who has bound the threads */
    cpu_set_t all;    /* the processors that this process may use */
    cpu_set_t caller; /* where the calling thread is to be after the touch */
    cpu_set_t of_node[ESPI_NODES];
    unsigned char of_thread[];
} espi_threads;

static bool bind(const cpu_set_t *processors) {
    return sched_setaffinity(0, sizeof *processors, processors) == 0;
}

/* Thread t goes where the t-th part of the processors is, nodes in order.  Whether they are on several. */
static bool share_out(espi_threads *b, int threads, const unsigned char node_of[ESPI_MACHINE_PROCESSORS]) {
    int64_t n = 0, here = 0;
    for (int p = 0; p < ESPI_MACHINE_PROCESSORS; p++) {
        if (!CPU_ISSET(p, &b->all)) continue;
        CPU_SET(p, &b->of_node[node_of[p]]);
        n++;
    }
    for (int node = 0, t = 0; node < ESPI_NODES; node++)
        for (here += CPU_COUNT(&b->of_node[node]); t < threads && t * n / threads < here; t++) b->of_thread[t] = (unsigned char)node;
    return threads > 1 && b->of_thread[0] != b->of_thread[threads - 1];
}

/* The same of threads that the user has bound: where they are. */
static bool look_up(espi_threads *b, int threads, const unsigned char node_of[ESPI_MACHINE_PROCESSORS]) {
    bool several = false;
#pragma omp parallel num_threads(threads)
    {
        const int processor = sched_getcpu();
        if (processor >= 0 && processor < ESPI_MACHINE_PROCESSORS) b->of_thread[omp_get_thread_num()] = node_of[processor];
    }
    for (int t = 1; t < threads; t++) several = several || b->of_thread[t] != b->of_thread[0];
    return several;
}

static esp_status is_wanted(bool *wanted) {
    const char *numa = getenv("ESP_NUMA");
    *wanted = numa == NULL || strcmp(numa, "0") != 0;
    if (numa == NULL || strcmp(numa, "0") == 0 || strcmp(numa, "1") == 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG,
                     "ESP_NUMA is \"%s\", expected 1 (as when it is not set) or 0, which leaves threads and memory to the system", numa);
}

esp_status espi_threads_bind(esp_ctx *ctx, const char *root) {
    unsigned char node_of[ESPI_MACHINE_PROCESSORS];
    bool wanted;
    espi_threads_release(ctx);
    ESPI_TRY(is_wanted(&wanted));
    const int threads = ctx->threads;
    if (!wanted || threads == 1 || espi_machine_nodes_read(node_of, root) == 1) return ESP_OK;
    espi_threads *b = calloc(1, sizeof *b + (size_t)threads);
    if (b == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the nodes of %d threads", threads);
    b->by_user = omp_get_proc_bind() != omp_proc_bind_false;
    const bool known = sched_getaffinity(0, sizeof b->all, &b->all) == 0;
    if (!known || !(b->by_user ? look_up : share_out)(b, threads, node_of)) {
        free(b);
        return ESP_OK;
    }
    b->nodes = (espi_nodes){.threads = threads, .piece_bits = ESPI_PIECE_BITS, .of_thread = b->of_thread};
    for (int t = 0; t < threads; t++)
        if (b->of_thread[t] >= b->nodes.count) b->nodes.count = b->of_thread[t] + 1;
    ctx->bound = b;
    int refused = 0;
#pragma omp parallel num_threads(threads) reduction(+ : refused)
    refused += !b->by_user && omp_get_thread_num() > 0 && !bind(&b->of_node[b->of_thread[omp_get_thread_num()]]);
    if (refused > 0) espi_log(ctx, ESP_LOG_WARN, "%d threads could not be bound to memory nodes: memory may be far from them", refused);
    espi_log(ctx, ESP_LOG_SELECT, "%d threads on %d memory nodes%s", threads, b->nodes.count, b->by_user ? ", bound by the user" : "");
    return ESP_OK;
}

void espi_threads_release(esp_ctx *ctx) {
    espi_threads *b = ctx->bound;
    if (b == NULL) return;
#pragma omp parallel num_threads(ctx->threads)
    if (!b->by_user && omp_get_thread_num() > 0) (void)bind(&b->all);
    free(b);
    ctx->bound = NULL;
}

const espi_nodes *espi_threads_nodes(const esp_ctx *ctx) {
    return ctx->bound ? &ctx->bound->nodes : NULL;
}

void espi_threads_enter(const esp_ctx *ctx) {
    espi_threads *b = ctx->bound;
    const int thread = omp_get_thread_num();
    if (b == NULL || b->by_user) return;
    if (thread == 0 && sched_getaffinity(0, sizeof b->caller, &b->caller) != 0) b->caller = b->all;
    (void)bind(&b->of_node[b->of_thread[thread]]); /* refused: as before */
}

void espi_threads_leave(const esp_ctx *ctx) {
    const espi_threads *b = ctx->bound;
    if (b != NULL && !b->by_user && omp_get_thread_num() == 0) (void)bind(&b->caller);
}

#else
esp_status espi_threads_bind(esp_ctx *ctx, const char *root) {
    (void)ctx, (void)root;
    return ESP_OK;
}
void espi_threads_release(esp_ctx *ctx) {
    (void)ctx;
}
const espi_nodes *espi_threads_nodes(const esp_ctx *ctx) {
    (void)ctx;
    return NULL;
}
void espi_threads_enter(const esp_ctx *ctx) {
    (void)ctx;
}
void espi_threads_leave(const esp_ctx *ctx) {
    (void)ctx;
}
#endif
