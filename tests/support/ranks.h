/* Simulated ranks, a thread each.  Assertions are made by the main thread, of what the ranks leave. */
#ifndef ESP_TEST_RANKS_H
#define ESP_TEST_RANKS_H

#include "dist/share.h"
#include "outcome.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define RANKS_MOST 64

typedef struct rank_job {
    esp_comm *comm;
    int rank, size, spread;
    void *user;
    esp_status (*body)(struct rank_job *job);
    esp_status status;
    char sentence[600];
    int64_t wrong; /* what the body found amiss */
} rank_job;

static inline void *rank_thread(void *user) {
    rank_job *job = user;
    job->status = job->body(job);
    if (job->status != ESP_OK) snprintf(job->sentence, sizeof job->sentence, "%s", esp_last_error());
    return NULL;
}

static inline void ranks_run(rank_job *jobs, int size, int spread, esp_status (*body)(rank_job *), void *user) {
    esp_comm *comms[RANKS_MOST];
    pthread_t threads[RANKS_MOST];
    OK(espi_comm_simulate(comms, size));
    for (int r = 0; r < size; r++) {
        jobs[r] = (rank_job){.comm = comms[r], .rank = r, .size = size, .spread = spread, .user = user, .body = body};
        espi_comm_patience(comms[r], 20);
        cr_assert_eq(pthread_create(&threads[r], NULL, rank_thread, &jobs[r]), 0);
    }
    for (int r = 0; r < size; r++) pthread_join(threads[r], NULL);
    for (int r = 0; r < size; r++) esp_comm_destroy(comms[r]);
}

/* All of them end well and find nothing amiss. */
static inline void ranks_well(int size, int spread, esp_status (*body)(rank_job *), void *user, const char *what) {
    rank_job jobs[RANKS_MOST];
    ranks_run(jobs, size, spread, body, user);
    for (int r = 0; r < size; r++) {
        cr_assert_eq(jobs[r].status, ESP_OK, "%s, rank %d of %d, spread %d: %s", what, r, size, spread, jobs[r].sentence);
        cr_assert_eq(jobs[r].wrong, 0, "%s, rank %d of %d, spread %d: %lld values", what, r, size, spread, (long long)jobs[r].wrong);
    }
}

/* All of them fail so, and each says why. */
static inline void ranks_fail(int size, int spread, esp_status (*body)(rank_job *), void *user, esp_status status, const char *words) {
    rank_job jobs[RANKS_MOST];
    ranks_run(jobs, size, spread, body, user);
    for (int r = 0; r < size; r++) {
        cr_assert_eq(jobs[r].status, status, "rank %d of %d: %s: %s", r, size, esp_status_name(jobs[r].status), jobs[r].sentence);
        cr_assert_not_null(strstr(jobs[r].sentence, words), "rank %d of %d: no \"%s\" in: %s", r, size, words, jobs[r].sentence);
        cr_assert_eq(jobs[r].wrong, 0, "rank %d of %d: %lld values", r, size, (long long)jobs[r].wrong);
    }
}

#endif
