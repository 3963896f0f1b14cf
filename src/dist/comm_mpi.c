/* Ranks started by mpirun, over host memory.  Messages are posted without blocking and tested until the deadline: a call of MPI that waits
 * would wait for ever for a rank that hangs. */
#define _GNU_SOURCE /* dladdr */

#include "dist/comm.h"

#include "core/clock.h"
#include "core/status.h"
#include "dist/mpi_plugin.h"

#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>

#define PIECE ((size_t)1 << 30) /* of a message: MPI counts in int */

typedef struct world {
    const espi_mpi *mpi;
    int rank, size;
    unsigned char *requests;
    int *bytes;  /* of each request */
    size_t room; /* requests */
} world;

static esp_status failed(const world *w, int code, const char *what) {
    char text[256];
    w->mpi->error_text(code, text, sizeof text);
    return ESPI_FAIL(ESP_ERR_COMM, "MPI failed to %s: %s", what, text);
}

static size_t pieces(size_t bytes) {
    return (bytes + PIECE - 1) / PIECE;
}

static esp_status make_room(world *w, size_t requests) {
    if (requests <= w->room) return ESP_OK;
    unsigned char *more = realloc(w->requests, requests * w->mpi->request_bytes);
    if (more == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu messages", requests);
    w->requests = more;
    int *bytes = realloc(w->bytes, requests * sizeof *bytes);
    if (bytes == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu messages", requests);
    w->bytes = bytes;
    w->room = requests;
    return ESP_OK;
}

static esp_status post(world *w, size_t *n, int r, const espi_message *m, bool out) {
    for (size_t first = 0; first < m->bytes; first += PIECE) {
        char *data = (char *)m->data + first;
        const int bytes = (int)(m->bytes - first < PIECE ? m->bytes - first : PIECE);
        void *request = w->requests + (*n)++ * w->mpi->request_bytes;
        const int code = out ? w->mpi->isend(data, bytes, r, request) : w->mpi->irecv(data, bytes, r, request);
        if (code != 0) return failed(w, code, out ? "send" : "receive");
    }
    return ESP_OK;
}

/* MPI takes a message that is shorter than the room for it, and leaves a hole. */
static esp_status check_lengths(const world *w, const espi_message *in) {
    size_t n = 0;
    for (int r = 0; r < w->size; r++)
        for (size_t first = 0; r != w->rank && first < in[r].bytes; first += PIECE, n++) {
            const size_t wanted = in[r].bytes - first < PIECE ? in[r].bytes - first : PIECE;
            if ((size_t)w->bytes[n] != wanted)
                return ESPI_FAIL(ESP_ERR_COMM, "a message of rank %d has %d bytes, expected %zu", r, w->bytes[n], wanted);
        }
    return ESP_OK;
}

static esp_status transfer(void *self, const espi_message *out, const espi_message *in, double deadline) {
    world *w = self;
    size_t most = 0, n = 0;
    if (in[w->rank].bytes > 0) memcpy(in[w->rank].data, out[w->rank].data, in[w->rank].bytes);
    for (int r = 0; r < w->size; r++) most += pieces(out[r].bytes) + pieces(in[r].bytes);
    ESPI_TRY(make_room(w, most));
    for (int r = 0; r < w->size; r++)
        if (r != w->rank) ESPI_TRY(post(w, &n, r, &in[r], false));
    for (int r = 0; r < w->size; r++)
        if (r != w->rank) ESPI_TRY(post(w, &n, r, &out[r], true));
    for (unsigned turn = 0;; turn++) {
        int done = 0;
        const int code = w->mpi->test((int)n, w->requests, &done, w->bytes);
        if (code != 0) return failed(w, code, "finish a message");
        if (done) return check_lengths(w, in);
        if (espi_seconds() > deadline) return ESPI_FAIL(ESP_ERR_COMM, "the deadline passed while waiting for the other ranks");
        if (turn > 200) nanosleep(&(struct timespec){.tv_nsec = 20000}, NULL); /* somebody is busy: leave the core to them */
    }
}

static void give_up(void *self, int code) {
    ((const world *)self)->mpi->end_job(code);
}

/* Leaving one by one hangs for ever when a peer is gone, so a broken job is not left that way: its program calls abort. */
static void leave(void *self, bool broken) {
    world *w = self;
    if (!broken) w->mpi->stop();
    free(w->requests);
    free(w->bytes);
    free(w);
}

static const espi_transport mpi = {.name = "mpi", .transfer = transfer, .end_job = give_up, .close = leave, .leave_together = true};

/* The shared object lies beside the library, or where the loader looks. */
static esp_status open_plugin(const espi_mpi **found) {
    char beside[4096] = "", reason[256];
    Dl_info here;
    if (dladdr(&mpi, &here) != 0 && here.dli_fname != NULL) {
        const char *slash = strrchr(here.dli_fname, '/');
        if (slash != NULL) snprintf(beside, sizeof beside, "%.*s/espalier_mpi.so", (int)(slash - here.dli_fname), here.dli_fname);
    }
    const char *stated = getenv("ESP_MPI_PLUGIN");
    void *plugin = dlopen(stated != NULL && stated[0] != '\0' ? stated : beside[0] ? beside : "espalier_mpi.so", RTLD_NOW | RTLD_GLOBAL);
    if (plugin == NULL) plugin = dlopen("espalier_mpi.so", RTLD_NOW | RTLD_GLOBAL);
    if (plugin != NULL) *found = dlsym(plugin, ESPI_MPI_PLUGIN_SYMBOL);
    if (plugin != NULL && *found != NULL) return ESP_OK;
    snprintf(reason, sizeof reason, "%s", dlerror());
    return ESPI_FAIL(
        ESP_ERR_UNSUPPORTED,
        "started by mpirun, but MPI cannot be used: %s.  Configure with ESPALIER_MPI=ON (Debian: libopenmpi-dev), or start the "
        "ranks by hand with ESP_RANK, ESP_WORLD and ESP_RENDEZVOUS",
        reason);
}

esp_status espi_comm_mpi(esp_comm **comm, int *argc, char ***argv) {
    world *w = calloc(1, sizeof *w);
    if (w == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the MPI communicator");
    esp_status status = open_plugin(&w->mpi);
    if (status == ESP_OK) {
        const int code = w->mpi->start(argc, argv, &w->rank, &w->size);
        if (code != 0) status = failed(w, code, "start");
    }
    if (status != ESP_OK) {
        free(w);
        return status;
    }
    (void)prctl(PR_SET_PDEATHSIG, SIGKILL); /* when the launcher is killed, so are its ranks */
    return espi_comm_make(comm, &mpi, w, w->rank, w->size);
}
