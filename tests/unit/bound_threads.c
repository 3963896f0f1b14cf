/* Threads that the user binds to processors (OMP_PLACES, which CTest sets) keep them; the nodes are those of where they are.  A plain main:
 * Criterion would start the test within the first thread's place. */
#define _GNU_SOURCE /* sched_getaffinity */
#include "core/threads.h"

#include "kernels/backend.h"
#include "scratch.h"

#include <omp.h>
#include <sched.h>

enum { SKIPPED = 77 };

static cpu_set_t here(void) {
    cpu_set_t processors;
    CPU_ZERO(&processors);
    (void)sched_getaffinity(0, sizeof processors, &processors);
    return processors;
}

int main(void) {
    char root[ESPI_PATH_MAX];
    int processor[2] = {-1, -1}, moved = 0;
    cpu_set_t before[2];
    esp_ctx *ctx = NULL;
#pragma omp parallel num_threads(2)
    {
        processor[omp_get_thread_num()] = sched_getcpu();
        before[omp_get_thread_num()] = here();
    }
    if (omp_get_proc_bind() == omp_proc_bind_false || processor[0] == processor[1]) return SKIPPED;
    scratch_make(root);
    scratch_put(root, "sys/devices/system/node/has_cpu", "0-1\n");
    for (int t = 0; t < 2; t++) {
        char file[64], line[16];
        snprintf(file, sizeof file, "sys/devices/system/node/node%d/cpulist", 1 - t);
        snprintf(line, sizeof line, "%d\n", processor[t]);
        scratch_put(root, file, line);
    }
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref", .threads = 2)));
    OK(espi_threads_bind(ctx, root));
    scratch_remove(root);
    const espi_nodes *nodes = espi_threads_nodes(ctx);
    cr_assert(nodes && nodes->count == 2 && nodes->of_thread[0] == 1 && nodes->of_thread[1] == 0, "the nodes of threads are others");
#pragma omp parallel num_threads(2) reduction(+ : moved)
    {
        espi_threads_enter(ctx);
        const cpu_set_t now = here();
        moved += !CPU_EQUAL(&now, &before[omp_get_thread_num()]);
        espi_threads_leave(ctx);
    }
    cr_assert_eq(moved, 0, "%d threads were moved", moved);
    esp_ctx_destroy(ctx);
    return 0;
}
