/* Device memory from rank to rank over NCCL: sends and receives in groups, on the device's lane of exchanges.  The communicator does not
 * block: a call of NCCL that waits would wait for ever for a rank that hangs. */
#include "core/clock.h"
#include "core/select.h"
#include "core/status.h"
#include "dist/link.h"
#include "dist/nccl.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define FAREWELL 5.0   /* seconds that leaving in order may take */
#define BRIEFLY 0.0005 /* seconds that a group takes to be queued: not slept through, as a nap takes longer */

typedef struct party {
    espi_nccl_library nccl;
    esp_ctx *ctx;
    espi_nccl_comm comm;
    int rank, size;
    void *lane;
} party;

static esp_status failed(const party *p, espi_nccl_result result, const char *what) {
    const char *more = p->nccl.GetLastError != NULL ? p->nccl.GetLastError(p->comm) : NULL;
    return ESPI_FAIL(ESP_ERR_COMM, "NCCL failed to %s: %s%s%s", what, p->nccl.GetErrorString(result), more && more[0] ? ": " : "",
                     more ? more : "");
}

/* Until a call that NCCL has taken on is made. */
static esp_status made(const party *p, espi_nccl_result result, const char *what, double deadline) {
    const double begun = espi_seconds();
    while (result == ESPI_NCCL_IN_PROGRESS) {
        const double now = espi_seconds();
        if (now > deadline) return ESPI_FAIL(ESP_ERR_COMM, "the deadline passed while NCCL was to %s: a rank did not come", what);
        if (now - begun > BRIEFLY)
            nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL);
        else
            sched_yield();
        const espi_nccl_result asked = p->nccl.CommGetAsyncError(p->comm, &result);
        if (asked != ESPI_NCCL_SUCCESS) result = asked;
    }
    return result == ESPI_NCCL_SUCCESS ? ESP_OK : failed(p, result, what);
}

/* The first failure of a group stays. */
static void note(espi_nccl_result *first, espi_nccl_result result) {
    if (*first == ESPI_NCCL_SUCCESS && result != ESPI_NCCL_IN_PROGRESS) *first = result;
}

static bool is_sent(const party *p, int i, const espi_message *m) {
    return i % p->size != p->rank && m[i].bytes > 0;
}

/* Nothing is sent where there is nothing, and the peer knows: sizes are the same on both sides. */
static esp_status nccl_begin(void *self, espi_place place, const espi_message *send, const espi_message *recv, int n_arrays,
                             double deadline) {
    (void)place;
    const party *p = self;
    const int n = n_arrays * p->size;
    espi_nccl_result queued = ESPI_NCCL_SUCCESS;
    bool any = false;
    for (int i = 0; i < n; i++) any = any || is_sent(p, i, send) || is_sent(p, i, recv);
    if (!any) return ESP_OK;
    const espi_nccl_result start = p->nccl.GroupStart();
    if (start != ESPI_NCCL_SUCCESS) return failed(p, start, "start a group");
    for (int i = 0; i < n; i++) {
        const int peer = i % p->size;
        if (is_sent(p, i, send)) note(&queued, p->nccl.Send(send[i].data, send[i].bytes, ESPI_NCCL_INT8, peer, p->comm, p->lane));
        if (is_sent(p, i, recv)) note(&queued, p->nccl.Recv(recv[i].data, recv[i].bytes, ESPI_NCCL_INT8, peer, p->comm, p->lane));
    }
    const espi_nccl_result end = p->nccl.GroupEnd();
    return made(p, queued != ESPI_NCCL_SUCCESS ? queued : end, "send and receive", deadline);
}

static esp_status nccl_check(void *self) {
    const party *p = self;
    espi_nccl_result result = ESPI_NCCL_SUCCESS;
    const espi_nccl_result asked = p->nccl.CommGetAsyncError(p->comm, &result);
    if (asked != ESPI_NCCL_SUCCESS) result = asked;
    return result == ESPI_NCCL_SUCCESS || result == ESPI_NCCL_IN_PROGRESS ? ESP_OK : failed(p, result, "send and receive");
}

/* Leaving in order needs the peers; where they do not come in time, this rank goes alone. */
static void nccl_close(void *self, bool broken) {
    party *p = self;
    if (p->comm != NULL) {
        bool in_order = !broken;
        if (in_order && p->nccl.CommFinalize != NULL)
            in_order = made(p, p->nccl.CommFinalize(p->comm), "leave", espi_seconds() + FAREWELL) == ESP_OK;
        (void)(in_order ? p->nccl.CommDestroy(p->comm) : p->nccl.CommAbort(p->comm));
    }
    free(p);
}

static const espi_carrier carrier_nccl = {.name = "nccl", .overlaps = true, .begin = nccl_begin, .check = nccl_check, .close = nccl_close};

/* Rank 0's id to all. */
static esp_status agree_on_id(espi_nccl_id *id, const party *p) {
    esp_comm *comm = p->ctx->comm;
    espi_nccl_id mine = {.internal = ""};
    espi_nccl_result result = ESPI_NCCL_SUCCESS;
    if (p->rank == 0) result = p->nccl.GetUniqueId(&mine);
    ESPI_TRY(espi_comm_agree(comm, (espi_place){"an address for NCCL", -1},
                             result == ESPI_NCCL_SUCCESS ? ESP_OK : failed(p, result, "make an id")));
    espi_nccl_id *all = calloc((size_t)p->size, sizeof *all);
    if (all == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the ids of %d ranks", p->size);
    const esp_status status = espi_comm_gather(comm, (espi_place){"the address of NCCL", -1}, all, &mine, sizeof mine);
    *id = all[0];
    free(all);
    return status;
}

static esp_status join(party *p) {
    espi_nccl_id id;
    espi_nccl_config config = {
        .size = sizeof config,
        .magic = ESPI_NCCL_MAGIC,
        .version = ESPI_NCCL_OLDEST,
        .blocking = 0,
        .cga_cluster_size = ESPI_NCCL_UNDEFINED,
        .min_ctas = ESPI_NCCL_UNDEFINED,
        .max_ctas = ESPI_NCCL_UNDEFINED,
        .split_share = ESPI_NCCL_UNDEFINED,
    };
    ESPI_TRY(agree_on_id(&id, p));
    const double deadline = espi_seconds() + espi_comm_patience_of(p->ctx->comm);
    const espi_nccl_result result = p->nccl.CommInitRankConfig(&p->comm, p->size, id, p->rank, &config);
    const esp_status status = made(p, result, "bring the ranks together", deadline);
    if (status != ESP_OK) espi_comm_break(p->ctx->comm, espi_seconds() > deadline);
    return status;
}

esp_status espi_carrier_nccl(const espi_carrier **carrier, void **self, esp_ctx *ctx) {
    party *p = calloc(1, sizeof *p);
    esp_status status = p != NULL ? espi_nccl_open(&p->nccl, ctx) : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for NCCL's communicator");
    status = espi_comm_agree(ctx->comm, (espi_place){"has every rank NCCL", -1}, status);
    if (p == NULL) return status;
    p->ctx = ctx;
    p->rank = esp_comm_rank(ctx->comm);
    p->size = esp_comm_size(ctx->comm);
    p->lane = ctx->device_ops->lane(ctx->device, ESPI_LANE_EXCHANGE);
    if (status == ESP_OK) status = join(p);
    if (status != ESP_OK) {
        nccl_close(p, true);
        return status;
    }
    *carrier = &carrier_nccl;
    *self = p;
    return ESP_OK;
}
