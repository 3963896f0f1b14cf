/* Ranks that are threads of one process: every dispatch and reduction can be tested with dozens of them and without MPI. */
#include "dist/comm.h"

#include "core/status.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* Where the threads meet.  A call has two meetings: all have said where their messages are; all have taken theirs. */
typedef struct hub {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    int size, open;              /* open: who still needs it: the communicators, and espi_comm_simulate until it returns */
    int arrived;                 /* at the meeting under way */
    uint64_t meeting;            /* how many have been held */
    bool broken;                 /* a rank gave up or is gone */
    const espi_message *sends[]; /* [size] what each rank sends, valid between the two meetings */
} hub;

typedef struct member {
    hub *hub;
    int rank;
} member;

/* Deadlines are of the monotonic clock; the condition is made for it. */
static struct timespec moment(double seconds) {
    struct timespec t = {.tv_sec = (time_t)seconds};
    t.tv_nsec = (long)((seconds - (double)t.tv_sec) * 1e9);
    return t;
}

static esp_status meet(hub *h, double deadline) {
    const struct timespec until = moment(deadline);
    const uint64_t mine = h->meeting;
    if (h->broken) return ESPI_FAIL(ESP_ERR_COMM, "another rank gave up");
    if (++h->arrived == h->size) {
        h->arrived = 0;
        h->meeting++;
        pthread_cond_broadcast(&h->moved);
        return ESP_OK;
    }
    while (h->meeting == mine && !h->broken) {
        if (pthread_cond_timedwait(&h->moved, &h->lock, &until) != ETIMEDOUT) continue;
        if (h->meeting != mine) return ESP_OK;
        h->broken = true;
        pthread_cond_broadcast(&h->moved);
        return ESPI_FAIL(ESP_ERR_COMM, "%d of %d ranks came before the deadline", h->arrived, h->size);
    }
    return h->meeting != mine ? ESP_OK : ESPI_FAIL(ESP_ERR_COMM, "another rank gave up");
}

static esp_status transfer(void *self, const espi_message *send, const espi_message *recv, double deadline) {
    const member *m = self;
    hub *h = m->hub;
    pthread_mutex_lock(&h->lock);
    h->sends[m->rank] = send;
    esp_status status = meet(h, deadline);
    pthread_mutex_unlock(&h->lock);
    if (status != ESP_OK) return status;
    for (int r = 0; r < h->size; r++)
        if (recv[r].bytes > 0) memcpy(recv[r].data, h->sends[r][m->rank].data, recv[r].bytes);
    pthread_mutex_lock(&h->lock);
    status = meet(h, deadline);
    pthread_mutex_unlock(&h->lock);
    return status;
}

static void give_up(void *self, int code) {
    (void)code;
    hub *h = ((const member *)self)->hub;
    pthread_mutex_lock(&h->lock);
    h->broken = true;
    pthread_cond_broadcast(&h->moved);
    pthread_mutex_unlock(&h->lock);
}

static void release(hub *h) {
    pthread_mutex_lock(&h->lock);
    const bool last = --h->open == 0;
    pthread_mutex_unlock(&h->lock);
    if (!last) return;
    pthread_cond_destroy(&h->moved);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

static void leave(void *self, bool broken) {
    member *m = self;
    hub *h = m->hub;
    if (broken) give_up(m, 0);
    release(h);
    free(m);
}

static const espi_transport simulated = {.name = "simulated", .transfer = transfer, .end_job = give_up, .close = leave};

static hub *make_hub(int size) {
    hub *h = calloc(1, sizeof *h + (size_t)size * sizeof h->sends[0]);
    if (h == NULL) return NULL;
    h->size = size;
    h->open = 1;
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&h->lock, NULL);
    pthread_cond_init(&h->moved, &clock);
    pthread_condattr_destroy(&clock);
    return h;
}

esp_status espi_comm_simulate(esp_comm **comms, int size) {
    for (int r = 0; r < size; r++) comms[r] = NULL;
    hub *h = make_hub(size);
    if (h == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d simulated ranks", size);
    esp_status status = ESP_OK;
    for (int r = 0; r < size && status == ESP_OK; r++) {
        member *m = malloc(sizeof *m);
        if (m == NULL) {
            status = ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d simulated ranks", size);
            break;
        }
        *m = (member){h, r};
        h->open++;
        status = espi_comm_make(&comms[r], &simulated, m, r, size);
    }
    for (int r = 0; r < size && status != ESP_OK; r++) {
        esp_comm_destroy(comms[r]);
        comms[r] = NULL;
    }
    release(h);
    return status;
}
