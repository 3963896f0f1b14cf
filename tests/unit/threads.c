/* Threads bound to memory nodes, and who touches memory first.  The machine is a folder that says two nodes of one processor each; what a real
 * one does with pages is looked at where it has several nodes. */
#define _GNU_SOURCE /* sched_getaffinity */
#include "core/threads.h"

#include "io/machine.h"
#include "kernels/backend.h"
#include "scratch.h"

#include <omp.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { THREADS = 4, PIECES = 45 };

static char root[ESPI_PATH_MAX];
static cpu_set_t both, of_node[2]; /* the two processors that this process may use */

static void make_root(void) {
    static const char *const files[] = {"sys/devices/system/node/node0/cpulist", "sys/devices/system/node/node1/cpulist"};
    cpu_set_t all;
    int n = 0;
    scratch_make(root);
    unsetenv("ESP_NUMA");
    cr_assert_eq(sched_getaffinity(0, sizeof all, &all), 0);
    for (int p = 0; p < CPU_SETSIZE && n < 2; p++) {
        char line[16];
        if (!CPU_ISSET(p, &all)) continue;
        snprintf(line, sizeof line, "%d\n", p);
        scratch_put(root, files[n], line);
        CPU_SET(p, &both);
        CPU_SET(p, &of_node[n++]);
    }
    scratch_put(root, "sys/devices/system/node/has_cpu", "0-1\n");
    if (n == 2) cr_assert_eq(sched_setaffinity(0, sizeof both, &both), 0);
}
static void remove_root(void) {
    scratch_remove(root);
}

TestSuite(threads, .init = make_root, .fini = remove_root);

static esp_ctx *make(esp_ctx_config config) {
    esp_ctx *ctx = NULL;
    config.backend = "ref";
    config.threads = config.threads ? config.threads : THREADS;
    OK(esp_ctx_create(&ctx, &config));
    if (CPU_COUNT(&both) < 2) cr_skip("one processor");
    if (omp_get_proc_bind() != omp_proc_bind_false) cr_skip("threads are bound by OMP_PROC_BIND");
    OK(espi_threads_bind(ctx, root));
    return ctx;
}

static cpu_set_t here(void) {
    cpu_set_t processors;
    CPU_ZERO(&processors);
    (void)sched_getaffinity(0, sizeof processors, &processors);
    return processors;
}

/* Whether the threads of a region are where they should be, the caller everywhere. */
static bool are_at(const cpu_set_t *first, const cpu_set_t *second) {
    const cpu_set_t *const at[THREADS] = {&both, first, second, second};
    int elsewhere = 0;
#pragma omp parallel num_threads(THREADS) reduction(+ : elsewhere)
    {
        const cpu_set_t processors = here();
        elsewhere += !CPU_EQUAL(&processors, at[omp_get_thread_num()]);
    }
    return elsewhere == 0;
}

Test(threads, are_bound_to_nodes_and_let_go) {
    esp_ctx *ctx = make(ESP_CTX_CONFIG(0));
    const espi_nodes *nodes = espi_threads_nodes(ctx);
    cr_assert_not_null(nodes);
    cr_expect(nodes->count == 2 && nodes->threads == THREADS && nodes->piece_bits == 21);
    for (int t = 0; t < THREADS; t++) cr_expect_eq(nodes->of_thread[t], t / 2, "thread %d: node %d", t, nodes->of_thread[t]);
    cr_expect(are_at(&of_node[0], &of_node[1]));
    esp_ctx_destroy(ctx);
    cr_expect(are_at(&both, &both));
}

Test(threads, are_left_alone) {
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.threads = 1));
    cr_expect_null(espi_threads_nodes(ctx), "one thread");
    esp_ctx_destroy(ctx);
    ctx = make(ESP_CTX_CONFIG(0));
    setenv("ESP_NUMA", "0", 1);
    OK(espi_threads_bind(ctx, root));
    cr_expect_null(espi_threads_nodes(ctx));
    cr_expect(are_at(&both, &both));
    setenv("ESP_NUMA", "yes", 1);
    cr_expect_eq(espi_threads_bind(ctx, root), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "ESP_NUMA is \"yes\""), "%s", esp_last_error());
    setenv("ESP_NUMA", "1", 1);
    scratch_put(root, "sys/devices/system/node/has_cpu", "0\n");
    OK(espi_threads_bind(ctx, root));
    cr_expect_null(espi_threads_nodes(ctx), "one node");
    scratch_put(root, "sys/devices/system/node/has_cpu", "0-1\n");
    cr_assert_eq(sched_setaffinity(0, sizeof both, &of_node[1]), 0);
    OK(espi_threads_bind(ctx, root));
    cr_expect_null(espi_threads_nodes(ctx), "processors of one node");
    esp_ctx_destroy(ctx);
}

/* Memory that nobody may touch until a touch has been noted. */
static unsigned char *memory, *pieces;
static int toucher[PIECES];
static bool bound[PIECES];

static void note(int number, siginfo_t *info, void *context) {
    (void)number, (void)context;
    const size_t piece = (size_t)((unsigned char *)info->si_addr - pieces) / ESPI_PIECE;
    if ((unsigned char *)info->si_addr < pieces || piece >= PIECES) _exit(1);
    const cpu_set_t processors = here();
    toucher[piece] = omp_get_thread_num();
    bound[piece] = CPU_EQUAL(&processors, &of_node[toucher[piece] / 2]);
    (void)mprotect(pieces + piece * ESPI_PIECE, ESPI_PIECE, PROT_READ | PROT_WRITE);
}

/* Begins and ends within pieces. */
static void *give(void *user, size_t bytes) {
    (void)user, (void)bytes;
    return pieces + 4096;
}
static void take(void *user, void *p, size_t bytes) {
    (void)user, (void)p, (void)bytes;
}

Test(threads, memory_is_touched_first_where_it_is_used) {
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.alloc = give, .free = take));
    memory = mmap(NULL, (PIECES + 1) * ESPI_PIECE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    cr_assert(memory != MAP_FAILED);
    pieces = (unsigned char *)(((uintptr_t)memory + ESPI_PIECE - 1) / ESPI_PIECE * ESPI_PIECE);
    const struct sigaction noting = {.sa_sigaction = note, .sa_flags = SA_SIGINFO | SA_NODEFER};
    cr_assert_eq(sigaction(SIGSEGV, &noting, NULL), 0);
    void *p;
    OK(espi_ctx_alloc(ctx, ESPI_MEM_WEIGHTS, (size_t)PIECES * ESPI_PIECE - 10000, &p));
    for (size_t i = 0; i < PIECES; i++) {
        const int owner = (int)(((uintptr_t)pieces / ESPI_PIECE + i) % THREADS);
        cr_expect_eq(toucher[i], owner, "piece %zu was touched by thread %d, expected %d", i, toucher[i], owner);
        cr_expect(bound[i], "piece %zu was touched by a thread that was not bound to its node", i);
    }
    for (size_t i = 0; i < (size_t)PIECES * ESPI_PIECE - 10000; i++)
        if (((unsigned char *)p)[i]) cr_assert_fail("byte %zu is not zero", i);
    cr_expect(are_at(&of_node[0], &of_node[1]), "the calling thread is free again");
    espi_ctx_free(ctx, ESPI_MEM_WEIGHTS, p, (size_t)PIECES * ESPI_PIECE - 10000);
    esp_ctx_destroy(ctx);
}

/* The node that a page lies on, as the system says; negative: it does not say. */
static int node_of_page(void *page) {
    int node = -1;
    return syscall(SYS_move_pages, 0, 1UL, &page, NULL, &node, 0) == 0 ? node : -1;
}

Test(threads, pages_lie_there) {
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.threads = omp_get_num_procs()));
    OK(espi_threads_bind(ctx, ""));
    const espi_nodes *nodes = espi_threads_nodes(ctx);
    if (!nodes) cr_skip("one node");
    int number[ESPI_NODES];
    size_t bytes = (size_t)nodes->threads * 9 * ESPI_PIECE;
    unsigned char *p;
    OK(espi_ctx_alloc(ctx, ESPI_MEM_WEIGHTS, bytes, &p));
    for (int i = 0; i < ESPI_NODES; i++) number[i] = -1;
    for (size_t i = 0; i < bytes; i += ESPI_PIECE / 2) {
        const int node = nodes->of_thread[((uintptr_t)(p + i) >> nodes->piece_bits) % (uintptr_t)nodes->threads], got = node_of_page(p + i);
        if (number[node] < 0) number[node] = got;
        cr_expect_eq(got, number[node], "byte %zu lies on node %d, others of node %d on %d", i, got, node, number[node]);
        for (int other = 0; other < nodes->count; other++) cr_expect(other == node || number[other] < 0 || number[other] != got);
    }
    espi_ctx_free(ctx, ESPI_MEM_WEIGHTS, p, bytes);
    esp_ctx_destroy(ctx);
}
