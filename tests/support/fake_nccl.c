/* See fake_nccl.h.  FAKE_NCCL_VERSION: what it says it is; FAKE_NCCL_BARE: without what can be done without; FAKE_NCCL_MUTILATED: without
 * what cannot. */
#include "fake_nccl.h"

#include "dist/nccl.h"
#include "fake.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RANKS = 64, GROUP = 4 * RANKS, LINE = 64, REMOTE_ERROR = 6, BAD_ARGUMENT = 4, BAD_USAGE = 5, LOOKS_UNTIL_ERROR = 20 };

#define PUBLIC __attribute__((visibility("default")))

PUBLIC extern fake_nccl_state fake_nccl;
fake_nccl_state fake_nccl;

/* A message on its way. */
typedef struct parcel {
    struct parcel *next;
    size_t bytes;
    unsigned char data[];
} parcel;

typedef struct post {
    void *data;
    size_t bytes;
    int peer;
    bool out;
} post;

typedef struct group {
    post posts[GROUP];
    int n;
    bool stuck;
} group;

/* Ranks with the same id. */
typedef struct hub {
    char id[128];
    int joined, size, left;
    parcel *mail[RANKS][RANKS]; /* [from][to], oldest first */
} hub;

struct ncclComm {
    hub *hub;
    int rank, size, looks;
    fake_lane *lane;
    group line[LINE]; /* queued groups */
    uint64_t queued, done;
    bool pending; /* a call is not made yet: what of, says the state of the rest */
    bool leaving, stuck;
};

static pthread_mutex_t the_lock = PTHREAD_MUTEX_INITIALIZER;
static hub *hubs[16];
static _Thread_local group collected;
static _Thread_local espi_nccl_comm collecting;
static _Thread_local fake_lane *collecting_lane;
static _Thread_local bool in_group;

static bool strikes(fake_nccl_fault fault, int rank) {
    return fake_nccl.fault == (int)fault && fake_nccl.rank == rank;
}

static hub *find_hub(const char *id, int size) {
    for (int i = 0; i < 16; i++) {
        if (hubs[i] && memcmp(hubs[i]->id, id, sizeof hubs[i]->id) == 0) return hubs[i];
        if (hubs[i]) continue;
        hubs[i] = calloc(1, sizeof **hubs);
        if (!hubs[i]) return NULL;
        memcpy(hubs[i]->id, id, sizeof hubs[i]->id);
        hubs[i]->size = size;
        return hubs[i];
    }
    return NULL;
}

PUBLIC espi_nccl_result ncclGetVersion(int *version);
espi_nccl_result ncclGetVersion(int *version) {
    *version = FAKE_NCCL_VERSION;
    return ESPI_NCCL_SUCCESS;
}

PUBLIC espi_nccl_result ncclGetUniqueId(espi_nccl_id *id);
espi_nccl_result ncclGetUniqueId(espi_nccl_id *id) {
    static atomic_int next;
    if (fake_nccl.fault == FAKE_NCCL_NO_ID) return BAD_USAGE;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "job %d", next++);
    return ESPI_NCCL_SUCCESS;
}

PUBLIC const char *ncclGetErrorString(espi_nccl_result result);
const char *ncclGetErrorString(espi_nccl_result result) {
    return result == REMOTE_ERROR ? "remote process exited" : result == BAD_ARGUMENT ? "invalid argument" : "invalid usage";
}

PUBLIC espi_nccl_result ncclCommInitRankConfig(espi_nccl_comm *comm, int ranks, espi_nccl_id id, int rank, espi_nccl_config *config);
espi_nccl_result ncclCommInitRankConfig(espi_nccl_comm *comm, int ranks, espi_nccl_id id, int rank, espi_nccl_config *config) {
    const char *nvls = getenv("NCCL_NVLS_ENABLE");
    if (config->size != sizeof *config || config->magic != ESPI_NCCL_MAGIC || config->blocking != 0 || ranks > RANKS) return BAD_ARGUMENT;
    if (!nvls || strcmp(nvls, "0") != 0 || strikes(FAKE_NCCL_NO_JOIN, rank)) return BAD_USAGE;
    espi_nccl_comm c = calloc(1, sizeof *c);
    if (!c) return BAD_USAGE;
    pthread_mutex_lock(&the_lock);
    c->hub = find_hub(id.internal, ranks);
    if (c->hub && !strikes(FAKE_NCCL_AWAY, rank)) c->hub->joined++;
    pthread_mutex_unlock(&the_lock);
    c->rank = rank;
    c->size = ranks;
    *comm = c;
    return ESPI_NCCL_IN_PROGRESS;
}

/* One receive, if its message is there. */
static bool take(espi_nccl_comm c, const post *p) {
    pthread_mutex_lock(&the_lock);
    parcel **first = &c->hub->mail[p->peer][c->rank], *m = *first;
    if (m) *first = m->next;
    pthread_mutex_unlock(&the_lock);
    if (!m) return false;
    c->lane->open(c->lane->device);
    memcpy(p->data, m->data, m->bytes < p->bytes ? m->bytes : p->bytes);
    c->lane->close(c->lane->device);
    free(m);
    return true;
}

/* Does what can be done, in the order in which it was queued. */
static uint64_t advance(void *work) {
    espi_nccl_comm c = work;
    while (c->done < c->queued) {
        group *g = &c->line[c->done % LINE];
        bool waits[RANKS] = {false};
        int left = 0;
        for (int i = 0; i < g->n; i++) {
            post *p = &g->posts[i];
            if (p->out || p->peer < 0) continue;
            if (!waits[p->peer] && take(c, p)) {
                p->peer = -1;
                continue;
            }
            waits[p->peer] = true; /* or the next receive would take what this one waits for */
            left++;
        }
        if (left > 0) break;
        c->done++;
    }
    return c->done;
}

/* What a group sends leaves at once. */
static void launch(espi_nccl_comm c, const group *g) {
    for (int i = 0; i < g->n; i++) {
        const post *p = &g->posts[i];
        if (!p->out || strikes(FAKE_NCCL_MUTE, c->rank) || strikes(FAKE_NCCL_REMOTE, c->rank)) continue;
        parcel *m = malloc(sizeof *m + p->bytes);
        if (!m) continue;
        m->next = NULL;
        m->bytes = p->bytes;
        c->lane->open(c->lane->device);
        memcpy(m->data, p->data, p->bytes);
        c->lane->close(c->lane->device);
        pthread_mutex_lock(&the_lock);
        parcel **end = &c->hub->mail[c->rank][p->peer];
        while (*end) end = &(*end)->next;
        *end = m;
        pthread_mutex_unlock(&the_lock);
    }
    c->line[c->queued++ % LINE] = *g;
    c->lane->queued = c->queued;
    c->lane->done = advance;
    c->lane->work = c;
    if ((int)(c->queued - c->done) > fake_nccl.most_under_way) fake_nccl.most_under_way = (int)(c->queued - c->done);
}

PUBLIC espi_nccl_result ncclCommGetAsyncError(espi_nccl_comm comm, espi_nccl_result *error);
espi_nccl_result ncclCommGetAsyncError(espi_nccl_comm comm, espi_nccl_result *error) {
    comm->looks++;
    pthread_mutex_lock(&the_lock);
    const bool complete = comm->hub->joined == comm->hub->size;
    pthread_mutex_unlock(&the_lock);
    const bool waits =
        (!complete && !strikes(FAKE_NCCL_AWAY, comm->rank)) || comm->stuck || (comm->leaving && strikes(FAKE_NCCL_NO_FAREWELL, comm->rank));
    *error = waits ? ESPI_NCCL_IN_PROGRESS : ESPI_NCCL_SUCCESS;
    if (fake_nccl.fault == FAKE_NCCL_REMOTE && comm->queued > comm->done && comm->looks > LOOKS_UNTIL_ERROR) *error = REMOTE_ERROR;
    return ESPI_NCCL_SUCCESS;
}

static void leave(espi_nccl_comm c) {
    if (c->lane) *c->lane = (fake_lane){c->lane->device, c->lane->open, c->lane->close, c->queued, NULL, NULL};
    pthread_mutex_lock(&the_lock);
    if (++c->hub->left == c->hub->size) {
        for (int from = 0; from < RANKS; from++)
            for (int to = 0; to < RANKS; to++)
                for (parcel *m = c->hub->mail[from][to], *next; m; m = next) next = m->next, free(m);
        for (int i = 0; i < 16; i++)
            if (hubs[i] == c->hub) hubs[i] = NULL;
        free(c->hub);
    }
    pthread_mutex_unlock(&the_lock);
    free(c);
}

PUBLIC espi_nccl_result ncclCommDestroy(espi_nccl_comm comm);
espi_nccl_result ncclCommDestroy(espi_nccl_comm comm) {
    fake_nccl.destroyed++;
    leave(comm);
    return ESPI_NCCL_SUCCESS;
}

#ifndef FAKE_NCCL_MUTILATED
PUBLIC espi_nccl_result ncclCommAbort(espi_nccl_comm comm);
espi_nccl_result ncclCommAbort(espi_nccl_comm comm) {
    fake_nccl.aborted++;
    leave(comm);
    return ESPI_NCCL_SUCCESS;
}

PUBLIC espi_nccl_result ncclGroupStart(void);
espi_nccl_result ncclGroupStart(void) {
    fake_nccl.groups++;
    in_group = true;
    collecting = NULL;
    collected.n = 0;
    return ESPI_NCCL_SUCCESS;
}
#endif

static espi_nccl_result collect(post p, espi_nccl_comm comm, void *stream) {
    if (p.bytes == 0) fake_nccl.nothing++;
    if (!in_group || p.peer == comm->rank || p.peer >= comm->size || collected.n == GROUP) return BAD_ARGUMENT;
    collecting = comm;
    collecting_lane = stream;
    collected.posts[collected.n++] = p;
    return ESPI_NCCL_SUCCESS;
}

PUBLIC espi_nccl_result ncclSend(const void *data, size_t count, int type, int peer, espi_nccl_comm comm, void *stream);
espi_nccl_result ncclSend(const void *data, size_t count, int type, int peer, espi_nccl_comm comm, void *stream) {
    post p = {.bytes = count, .peer = peer, .out = true};
    memcpy(&p.data, &data, sizeof p.data);
    fake_nccl.sends++;
    return type != ESPI_NCCL_INT8 || strikes(FAKE_NCCL_BAD_SEND, comm->rank) ? BAD_ARGUMENT : collect(p, comm, stream);
}

PUBLIC espi_nccl_result ncclRecv(void *data, size_t count, int type, int peer, espi_nccl_comm comm, void *stream);
espi_nccl_result ncclRecv(void *data, size_t count, int type, int peer, espi_nccl_comm comm, void *stream) {
    fake_nccl.recvs++;
    return type != ESPI_NCCL_INT8 ? BAD_ARGUMENT : collect((post){data, count, peer, false}, comm, stream);
}

/* Nothing is launched when a call of the group was refused. */
PUBLIC espi_nccl_result ncclGroupEnd(void);
espi_nccl_result ncclGroupEnd(void) {
    in_group = false;
    if (!collecting) {
        fake_nccl.empty++;
        return ESPI_NCCL_SUCCESS;
    }
    espi_nccl_comm c = collecting;
    if (fake_nccl.fault == FAKE_NCCL_BAD_SEND && fake_nccl.rank == c->rank) return BAD_ARGUMENT;
    c->lane = collecting_lane;
    c->looks = 0;
    c->stuck = strikes(FAKE_NCCL_STUCK, c->rank);
    if (!c->stuck) launch(c, &collected);
    return ESPI_NCCL_IN_PROGRESS;
}

#ifndef FAKE_NCCL_BARE
PUBLIC const char *ncclGetLastError(espi_nccl_comm comm);
const char *ncclGetLastError(espi_nccl_comm comm) {
    (void)comm;
    return "the fake says so";
}

PUBLIC espi_nccl_result ncclCommFinalize(espi_nccl_comm comm);
espi_nccl_result ncclCommFinalize(espi_nccl_comm comm) {
    comm->leaving = true;
    return ESPI_NCCL_IN_PROGRESS;
}
#endif
