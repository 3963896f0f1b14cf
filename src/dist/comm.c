/* The collective calls, over any transport, and their public face.  Start-up is in start.c. */
#include "dist/comm.h"

#include "core/clock.h"
#include "core/status.h"
#include "dist/watch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>

#define SENTENCE 512

/* Two ranks that make the same call send the same header, but for the bytes. */
#define MARK UINT64_C(0x65737072616e6b73) /* "espranks" */
typedef struct header {
    uint64_t mark, call, bytes;
    int32_t layer, status; /* status: of a rank that comes to say that it failed, wherever the others are */
    char what[40];
} header;

struct esp_comm {
    const espi_transport *transport;
    void *self;
    int rank, size, local;
    double patience;
    uint64_t calls;
    bool broken, late; /* a call failed; because its deadline passed */
    espi_watch *watch;
    esp_status failing;        /* what the next call is to say */
    header *ours, *theirs;     /* [size] each: the headers of a call */
    espi_message *send, *recv; /* [size] each: where those are */
};

uint64_t espi_comm_calls(const esp_comm *comm) {
    return comm == NULL ? 0 : comm->calls;
}

int esp_comm_local_rank(const esp_comm *comm) {
    return comm == NULL ? 0 : comm->local;
}

esp_status espi_comm_find_hosts(esp_comm *comm, uint64_t host) {
    uint64_t *all = calloc((size_t)comm->size, sizeof *all);
    if (all == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the hosts of %d ranks", comm->size);
    const esp_status status = espi_comm_gather(comm, (espi_place){"who is on which host", -1}, all, &host, sizeof host);
    comm->local = 0;
    for (int r = 0; r < comm->rank; r++) comm->local += all[r] == host;
    free(all);
    return status;
}

void espi_comm_patience(esp_comm *comm, double seconds) {
    if (comm != NULL) comm->patience = seconds;
}

double espi_comm_patience_of(const esp_comm *comm) {
    return comm == NULL ? ESPI_COMM_PATIENCE : comm->patience;
}

bool espi_comm_broken(const esp_comm *comm) {
    return comm != NULL && comm->broken;
}

void espi_comm_break(esp_comm *comm, bool late) {
    if (comm == NULL || comm->broken) return;
    comm->broken = true;
    comm->late = late;
}

void espi_place_text(char text[ESPI_PLACE_TEXT], espi_place place) {
    const int n = snprintf(text, ESPI_PLACE_TEXT, "\"%.40s\"", place.what);
    if (place.layer >= 0) snprintf(text + n, ESPI_PLACE_TEXT - (size_t)n, ", layer %lld", (long long)place.layer);
}

esp_status espi_comm_make(esp_comm **comm, const espi_transport *transport, void *self, int rank, int size) {
    esp_comm *c = calloc(1, sizeof *c);
    if (c != NULL) {
        *c = (esp_comm){.transport = transport, .self = self, .rank = rank, .size = size, .patience = ESPI_COMM_PATIENCE};
        c->send = calloc((size_t)size, sizeof *c->send);
        c->recv = calloc((size_t)size, sizeof *c->recv);
        c->ours = calloc((size_t)size, sizeof *c->ours);
        c->theirs = calloc((size_t)size, sizeof *c->theirs);
        const esp_status watched = espi_watch_make(&c->watch, rank, size);
        if (watched == ESP_OK && c->send != NULL && c->recv != NULL && c->ours != NULL && c->theirs != NULL) {
            for (int r = 0; r < size; r++) {
                c->send[r] = (espi_message){c->ours + r, sizeof *c->ours};
                c->recv[r] = (espi_message){c->theirs + r, sizeof *c->theirs};
            }
            *comm = c;
            return ESP_OK;
        }
        c->broken = true;
        esp_comm_destroy(c);
    } else if (transport->close != NULL) {
        transport->close(self, true);
    }
    return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a communicator of %d ranks", size);
}

/* "exchange of rows to the experts, layer 3 (call 812)" */
static void describe(char out[SENTENCE], const header *h) {
    char place[ESPI_PLACE_TEXT];
    espi_place_text(place, (espi_place){h->what, h->layer});
    snprintf(out, SENTENCE, "%s (call %llu)", place, (unsigned long long)h->call);
}

static esp_status transfer(esp_comm *c, const header *mine, const espi_message *send, const espi_message *recv, double deadline) {
    const esp_status status = c->transport->transfer(c->self, send, recv, deadline);
    if (status == ESP_OK) return ESP_OK;
    c->broken = true;
    c->late = espi_seconds() >= deadline;
    char where[SENTENCE], reason[SENTENCE];
    describe(where, mine);
    snprintf(reason, sizeof reason, "%s", esp_last_error());
    return ESPI_FAIL(status, "rank %d of %d, at %s: %s", c->rank, c->size, where, reason);
}

static size_t bytes_of(const espi_message *messages, int rank, int n, int size) {
    size_t bytes = 0;
    for (int i = 0; i < n; i++) bytes += messages[i * size + rank].bytes;
    return bytes;
}

/* The headers first; then what send and recv say: n messages [size] each, one after the other. */
static esp_status headers_and_messages(esp_comm *c, espi_place place, const espi_message *send, const espi_message *recv, int n) {
    header mine = {.mark = MARK, .call = c->calls, .layer = (int32_t)place.layer, .status = (int32_t)c->failing};
    snprintf(mine.what, sizeof mine.what, "%s", place.what);
    for (int r = 0; r < c->size; r++) {
        c->ours[r] = mine;
        c->ours[r].bytes = bytes_of(send, r, n, c->size);
    }
    const double deadline = espi_seconds() + c->patience;
    esp_status status = transfer(c, &mine, c->send, c->recv, deadline);
    for (int r = 0; r < c->size && status == ESP_OK; r++) {
        const header *theirs = c->theirs + r;
        char here[SENTENCE], there[SENTENCE];
        describe(here, &mine);
        describe(there, theirs);
        if (theirs->mark != MARK)
            status =
                ESPI_FAIL(ESP_ERR_COMM, "rank %d, at %s: what rank %d sent is no header: a message before it was cut", c->rank, here, r);
        else if (theirs->call != mine.call || theirs->layer != mine.layer || memcmp(theirs->what, mine.what, sizeof mine.what) != 0)
            status =
                theirs->status != ESP_OK
                    ? ESPI_FAIL((esp_status)theirs->status, "rank %d failed before %s, while rank %d was at %s", r, there, c->rank, here)
                    : ESPI_FAIL(ESP_ERR_MISMATCH, "rank %d is at %s, rank %d at %s: the ranks went different ways", c->rank, here, r,
                                there);
        else if (theirs->bytes != bytes_of(recv, r, n, c->size))
            status = ESPI_FAIL(ESP_ERR_MISMATCH, "rank %d, at %s: got %llu bytes announced by rank %d, expected %zu", c->rank, here,
                               (unsigned long long)theirs->bytes, r, bytes_of(recv, r, n, c->size));
    }
    if (status != ESP_OK) {
        c->broken = true;
        return status;
    }
    for (int i = 0; i < n && status == ESP_OK; i++) status = transfer(c, &mine, send + i * c->size, recv + i * c->size, deadline);
    return status;
}

esp_status espi_comm_messages(esp_comm *c, espi_place place, const espi_message *send, const espi_message *recv, int n) {
    if (c->broken) return ESPI_FAIL(ESP_ERR_COMM, "rank %d: an earlier call between the ranks failed: nothing more can be said", c->rank);
    espi_watch_enter(c->watch, ++c->calls, place, bytes_of(send, 0, n * c->size, 1), bytes_of(recv, 0, n * c->size, 1), c->patience);
    const esp_status status = headers_and_messages(c, place, send, recv, n);
    espi_watch_leave(c->watch, status != ESP_OK);
    if (status != ESP_OK && (c->late || status == ESP_ERR_MISMATCH)) espi_watch_tell(c->watch);
    return status;
}

/* Room for the messages of one call: 2 [n][size]. */
static esp_status messages(espi_message **send, espi_message **recv, const esp_comm *c, int n) {
    *send = calloc(2 * (size_t)n * (size_t)c->size, sizeof **send);
    *recv = *send == NULL ? NULL : *send + n * c->size;
    return *send != NULL ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the messages of %d ranks", c->size);
}

esp_status espi_comm_gather(esp_comm *comm, espi_place place, void *out, const void *in, size_t bytes) {
    if (esp_comm_size(comm) == 1) {
        if (bytes > 0 && out != in) memcpy(out, in, bytes);
        return ESP_OK;
    }
    espi_message *send = NULL, *recv = NULL;
    ESPI_TRY(messages(&send, &recv, comm, 1));
    for (int r = 0; r < comm->size; r++) {
        send[r] = (espi_message){(void *)in, bytes};
        recv[r] = (espi_message){(char *)out + (size_t)r * bytes, bytes};
    }
    const esp_status status = espi_comm_messages(comm, place, send, recv, 1);
    free(send);
    return status;
}

static espi_message rows_of(const void *base, espi_row_ranges ranges, int rank, size_t row_bytes) {
    const size_t bytes = (size_t)ranges.rows[rank] * row_bytes;
    return (espi_message){bytes > 0 ? (char *)base + (size_t)ranges.at[rank] * row_bytes : NULL, bytes};
}

esp_status espi_comm_exchange(esp_comm *comm, espi_place place, const espi_row_array *arrays, int n_arrays, espi_row_ranges to,
                              espi_row_ranges from) {
    if (esp_comm_size(comm) == 1) {
        for (int i = 0; i < n_arrays; i++) {
            const espi_message out = rows_of(arrays[i].from, from, 0, arrays[i].row_bytes),
                               in = rows_of(arrays[i].to, to, 0, arrays[i].row_bytes);
            if (in.data != NULL && out.data != NULL) memcpy(in.data, out.data, out.bytes);
        }
        return ESP_OK;
    }
    espi_message *send = NULL, *recv = NULL;
    ESPI_TRY(messages(&send, &recv, comm, n_arrays));
    for (int i = 0; i < n_arrays; i++)
        for (int r = 0; r < comm->size; r++) {
            send[i * comm->size + r] = rows_of(arrays[i].from, from, r, arrays[i].row_bytes);
            recv[i * comm->size + r] = rows_of(arrays[i].to, to, r, arrays[i].row_bytes);
        }
    const esp_status status = espi_comm_messages(comm, place, send, recv, n_arrays);
    free(send);
    return status;
}

/* Many ranks take small pieces: every rank holds one of each. */
int64_t espi_comm_piece(const esp_comm *comm) {
    const int64_t most = 65536, all = 4 * most, each = all / esp_comm_size(comm);
    return each < most ? each : most;
}

size_t espi_comm_add_bytes(const esp_comm *comm) {
    return (size_t)esp_comm_size(comm) * (size_t)espi_comm_piece(comm) * sizeof(double);
}

static void add_values(void *total, const void *partial, int64_t n, esp_dtype dtype) {
    if (dtype == ESP_F64)
        for (int64_t i = 0; i < n; i++) ((double *)total)[i] += ((const double *)partial)[i];
    else
        for (int64_t i = 0; i < n; i++) ((float *)total)[i] += ((const float *)partial)[i];
}

esp_status espi_comm_add(esp_comm *comm, espi_place place, void *total, const void *partial, int64_t n, esp_dtype dtype, void *scratch) {
    const size_t size = esp_dtype_size(dtype);
    const int ranks = esp_comm_size(comm);
    const int64_t piece = espi_comm_piece(comm);
    for (int64_t first = 0; first < n; first += piece) {
        const int64_t count = n - first < piece ? n - first : piece;
        char *sum = (char *)total + (size_t)first * size;
        const char *mine = (const char *)partial + (size_t)first * size;
        if (ranks == 1) {
            add_values(sum, mine, count, dtype);
            continue;
        }
        ESPI_TRY(espi_comm_gather(comm, place, scratch, mine, (size_t)count * size));
        for (int r = 0; r < ranks; r++) add_values(sum, (char *)scratch + (size_t)r * (size_t)count * size, count, dtype);
    }
    return ESP_OK;
}

esp_status espi_comm_agree(esp_comm *comm, espi_place place, esp_status mine) {
    if (esp_comm_size(comm) == 1) return mine;
    typedef struct verdict {
        int32_t status;
        char sentence[SENTENCE];
    } verdict;
    verdict own = {.status = (int32_t)mine};
    if (mine != ESP_OK) snprintf(own.sentence, sizeof own.sentence, "%s", esp_last_error());
    verdict *all = calloc((size_t)comm->size, sizeof *all);
    if (all == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the verdicts of %d ranks", comm->size);
    comm->failing = mine;
    esp_status status = espi_comm_gather(comm, place, all, &own, sizeof own);
    comm->failing = ESP_OK;
    if (status != ESP_OK && mine != ESP_OK) status = ESPI_FAIL(mine, "%s", own.sentence); /* the others are elsewhere, or gone */
    for (int r = 0; r < comm->size && status == ESP_OK; r++)
        if (all[r].status != ESP_OK) status = ESPI_FAIL((esp_status)all[r].status, "rank %d: %s", r, all[r].sentence);
    free(all);
    return status;
}

esp_status espi_comm_meet(esp_comm *comm, espi_place place) {
    return espi_comm_agree(comm, place, ESP_OK);
}

esp_status espi_comm_same(esp_comm *comm, const char *key, uint64_t value) {
    const int size = esp_comm_size(comm);
    if (size == 1) return ESP_OK;
    uint64_t *all = calloc((size_t)size, sizeof *all);
    if (all == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for what %d ranks say", size);
    esp_status status = espi_comm_gather(comm, (espi_place){"are we alike", -1}, all, &value, sizeof value);
    for (int r = 1; r < size && status == ESP_OK; r++)
        if (all[r] != all[0])
            status = ESPI_FAIL(ESP_ERR_MISMATCH, "%s is not the same on all ranks: rank 0 has %016llx, rank %d has %016llx", key,
                               (unsigned long long)all[0], r, (unsigned long long)all[r]);
    free(all);
    return status;
}

int esp_comm_exit_code(const esp_comm *comm, esp_status status) {
    switch (status) {
    case ESP_OK:
        return 0;
    case ESP_ERR_ARG:
    case ESP_ERR_UNSUPPORTED:
        return 64;
    case ESP_ERR_SHAPE:
    case ESP_ERR_DTYPE:
    case ESP_ERR_FORMAT:
        return 65;
    case ESP_ERR_MISMATCH:
        return 71;
    case ESP_ERR_IO:
        return 73;
    case ESP_ERR_COMM:
        return comm != NULL && comm->late ? 75 : 74;
    case ESP_ERR_NONFINITE:
        return 76;
    default:
        return 70;
    }
}

void esp_comm_line(esp_comm *comm, esp_status status, char *line, size_t bytes) {
    char where[SENTENCE] = "";
    if (esp_comm_size(comm) > 1) espi_watch_place(comm->watch, where, sizeof where);
    snprintf(line, bytes, "%s%s%s: %s", where, where[0] ? ": " : "", esp_status_name(status), esp_last_error());
}

/* How much later than rank 0 the others end the job, so that what it has to say is said. */
#define AFTER_RANK_0 0.3

void esp_comm_abort(esp_comm *comm, int code) {
    if (esp_comm_size(comm) == 1 || comm->transport->end_job == NULL) return;
    comm->broken = true;
    espi_watch_abort(comm->watch, code);
    if (comm->rank > 0) nanosleep(&(struct timespec){.tv_nsec = (long)(AFTER_RANK_0 * 1e9)}, NULL);
    comm->transport->end_job(comm->self, code);
}

void esp_comm_step(esp_comm *comm, int64_t step) {
    if (comm != NULL) espi_watch_step(comm->watch, step);
}

esp_status esp_comm_agree(esp_comm *comm, const char *what, esp_status mine) {
    return espi_comm_agree(comm, (espi_place){what, -1}, mine);
}

esp_status esp_comm_same(esp_comm *comm, const char *key, const void *data, size_t bytes) {
    return espi_comm_same(comm, key, XXH3_64bits(data, bytes));
}

esp_status esp_comm_watch(esp_comm *comm, esp_log_fn log, esp_comm_end_fn end, void *user) {
    if (esp_comm_size(comm) == 1) return ESP_OK;
    return espi_watch_start(comm->watch, comm->transport->lost, comm->self, log, end, user);
}

void esp_comm_destroy(esp_comm *comm) {
    if (comm == NULL) return;
    if (comm->watch != NULL) espi_watch_leaving(comm->watch);
    /* MPI waits for ever for a rank that is gone; over TCP a rank that closes early looks as if it had died. */
    if (comm->transport->leave_together && !comm->broken) (void)espi_comm_meet(comm, (espi_place){"the end", -1});
    espi_watch_free(comm->watch);
    if (comm->transport->close != NULL) comm->transport->close(comm->self, comm->broken);
    free(comm->send);
    free(comm->recv);
    free(comm->ours);
    free(comm->theirs);
    free(comm);
}

int esp_comm_rank(const esp_comm *comm) {
    return comm == NULL ? 0 : comm->rank;
}

int esp_comm_size(const esp_comm *comm) {
    return comm == NULL ? 1 : comm->size;
}
