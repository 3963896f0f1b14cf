/* How threads share out the tasks of a region on a machine whose memory has several nodes. */
#define ESPI_CPU_ISA generic
#include "kernels/cpu/cpu.h"

#include <criterion/criterion.h>
#include <omp.h>

enum { TASKS = 100, THREADS = 4, PIECE = 64 };

/* Threads 0, 1, 3 near node 0, 2 near node 1; so are every fourth piece of memory and the tasks whose weights lie there. */
static const unsigned char of_thread[THREADS] = {0, 0, 1, 0};
static const espi_nodes two = {.count = 2, .threads = THREADS, .piece_bits = 6, .of_thread = of_thread};
static const espi_exec exec = {.threads = THREADS, .nodes = &two};

/* Never read. */
static const void *weights_of(int64_t task) {
    return (const void *)(uintptr_t)(task * PIECE + PIECE / 2);
}

static int node_of(int64_t task) {
    return task % 4 == 2;
}

/* The next task that a thread does; -1: there is none left. */
static int64_t next(cpu_tasks *tasks, cpu_turn *turn) {
    while (cpu_next(tasks, turn))
        if (cpu_near(tasks, turn, weights_of(turn->task))) return turn->task;
    return -1;
}

Test(tasks, a_thread_does_those_of_its_node_first) {
    for (int thread = 1; thread < 3; thread++) {
        cpu_tasks tasks = cpu_tasks_of(&exec, THREADS, TASKS);
        cpu_turn turn = cpu_first(&tasks, thread);
        int64_t task, before = -1, done = 0, changes = 0;
        int node = of_thread[thread];
        for (; (task = next(&tasks, &turn)) >= 0; before = task, done++) {
            if (node_of(task) != node) {
                node = node_of(task);
                changes++;
                before = -1;
            }
            cr_expect_gt(task, before, "thread %d: task %lld after %lld", thread, (long long)task, (long long)before);
        }
        cr_expect(done == TASKS && changes == 1, "thread %d: %lld tasks, from one node to another %lld times", thread, (long long)done,
                  (long long)changes);
    }
}

/* Two threads by turns: each does its own, and the one with few then helps with those that are left. */
Test(tasks, then_what_others_have_left) {
    cpu_tasks tasks = cpu_tasks_of(&exec, THREADS, TASKS);
    cpu_turn turn[2] = {cpu_first(&tasks, 0), cpu_first(&tasks, 2)};
    int done[TASKS] = {0};
    for (int64_t step = 0; step < TASKS; step++) {
        const int64_t task = next(&tasks, &turn[step % 2]);
        cr_assert_geq(task, 0);
        done[task]++;
        if (step < TASKS / 2) cr_expect_eq(node_of(task), step % 2, "step %lld: task %lld", (long long)step, (long long)task);
    }
    for (int i = 0; i < TASKS; i++) cr_expect_eq(done[i], 1, "task %d was done %d times", i, done[i]);
    cr_expect(next(&tasks, &turn[0]) == -1 && next(&tasks, &turn[1]) == -1);
}

Test(tasks, each_once_by_many_threads) {
    int done[TASKS] = {0};
    cpu_tasks tasks = cpu_tasks_of(&exec, THREADS, TASKS);
#pragma omp parallel num_threads(THREADS)
    {
        cpu_turn turn = cpu_first(&tasks, omp_get_thread_num());
        for (int64_t task; (task = next(&tasks, &turn)) >= 0;) {
#pragma omp atomic
            done[task]++;
        }
    }
    for (int i = 0; i < TASKS; i++) cr_expect_eq(done[i], 1, "task %d was done %d times", i, done[i]);
}

/* A lone thread, or one node: all tasks in order, wherever weights lie. */
Test(tasks, in_order_where_nothing_is_near_or_far) {
    const espi_exec one_node = {.threads = THREADS};
    for (int alone = 0; alone < 2; alone++) {
        cpu_tasks tasks = alone ? cpu_tasks_of(&exec, 1, TASKS) : cpu_tasks_of(&one_node, THREADS, TASKS);
        cpu_turn turn = cpu_first(&tasks, 0);
        for (int64_t i = 0; i < TASKS; i++) cr_expect_eq(next(&tasks, &turn), i);
        cr_expect_eq(next(&tasks, &turn), -1);
    }
}
