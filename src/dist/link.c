/* Which way device memory takes between ranks, the order and the deadlines of exchanges, and the way through memory of the host. */
#include "dist/link.h"

#include "core/clock.h"
#include "core/select.h"
#include "core/status.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SENTENCE 768
#define LOOK 1e-3 /* seconds between two looks at an exchange under way */

struct espi_link {
    esp_ctx *ctx;
    const espi_carrier *carrier;
    void *self;
    espi_place places[ESPI_MARKS]; /* of the exchanges begun - ESPI_MARKS .. begun - 1, each at its number modulo ESPI_MARKS */
    uint64_t begun, passed;        /* how many; how many of them are known to be done */
    double moved, looked;          /* when an exchange was last seen to be done, or the first one begun; when that was last looked at */
    bool broken;
};

/* ---- through memory of the host ---- */

#define PINNED ((size_t)16 << 20) /* each way */
#define PIECE_LEAST ((size_t)4096)

typedef struct staged {
    esp_ctx *ctx;
    unsigned char *out, *in; /* pinned: [ranks * piece] each */
    size_t piece;            /* bytes that go to one rank at once */
    int64_t *to, *from, *to_at, *from_at, *most;
} staged;

/* How much of a message goes in the piece that starts at `first`. */
static size_t part_of(const espi_message *m, size_t first, size_t piece) {
    const size_t left = m->bytes > first ? m->bytes - first : 0;
    return left < piece ? left : piece;
}

/* The longest message of all ranks: so all of them make the same calls. */
static esp_status longest(size_t *bytes, staged *s, espi_place place, const espi_message *send) {
    const esp_comm *comm = s->ctx->comm;
    int64_t mine = 0;
    for (int r = 0; r < esp_comm_size(comm); r++)
        if (r != esp_comm_rank(comm) && (int64_t)send[r].bytes > mine) mine = (int64_t)send[r].bytes;
    ESPI_TRY(espi_comm_gather(s->ctx->comm, place, s->most, &mine, sizeof mine));
    *bytes = 0;
    for (int r = 0; r < esp_comm_size(comm); r++)
        if ((size_t)s->most[r] > *bytes) *bytes = (size_t)s->most[r];
    return ESP_OK;
}

/* Pieces that start at `first`, between device memory and pinned memory; counts [ranks]: their bytes. */
static esp_status move_pieces(staged *s, int64_t *counts, unsigned char *pinned, const espi_message *messages, size_t first, bool out) {
    const int rank = esp_comm_rank(s->ctx->comm), size = esp_comm_size(s->ctx->comm);
    for (int r = 0; r < size; r++) {
        const size_t bytes = r == rank ? 0 : part_of(&messages[r], first, s->piece);
        unsigned char *there = (unsigned char *)messages[r].data + first;
        counts[r] = (int64_t)bytes;
        if (bytes == 0) continue;
        ESPI_TRY(s->ctx->device_ops->copy(s->ctx->device, ESPI_LANE_WORK, out ? pinned : there, out ? there : pinned, bytes));
        pinned += bytes;
    }
    return ESP_OK;
}

static void count_pieces(staged *s, const espi_message *recv, size_t first) {
    for (int r = 0; r < esp_comm_size(s->ctx->comm); r++)
        s->to[r] = r == esp_comm_rank(s->ctx->comm) ? 0 : (int64_t)part_of(&recv[r], first, s->piece);
}

/* Each behind the one before. */
static void line_up(int64_t *at, const int64_t *counts, int n) {
    for (int64_t r = 0, sum = 0; r < n; sum += counts[r++]) at[r] = sum;
}

static esp_status move_array(staged *s, espi_place place, const espi_message *send, const espi_message *recv) {
    esp_ctx *ctx = s->ctx;
    size_t bytes;
    ESPI_TRY(longest(&bytes, s, place, send));
    for (size_t first = 0; first < bytes; first += s->piece) {
        ESPI_TRY(move_pieces(s, s->from, s->out, send, first, true));
        ESPI_TRY(ctx->device_ops->wait(ctx->device)); /* `out` is filled, and `in` has been read */
        count_pieces(s, recv, first);
        line_up(s->to_at, s->to, esp_comm_size(ctx->comm));
        line_up(s->from_at, s->from, esp_comm_size(ctx->comm));
        const espi_row_array bytes_of = {.to = s->in, .from = s->out, .row_bytes = 1};
        ESPI_TRY(
            espi_comm_exchange(ctx->comm, place, &bytes_of, 1, (espi_row_ranges){s->to_at, s->to}, (espi_row_ranges){s->from_at, s->from}));
        ESPI_TRY(move_pieces(s, s->to, s->in, recv, first, false));
    }
    return ESP_OK;
}

static esp_status staged_begin(void *self, espi_place place, const espi_message *send, const espi_message *recv, int n_arrays,
                               double deadline) {
    (void)deadline; /* the ranks' own calls have one */
    staged *s = self;
    const int size = esp_comm_size(s->ctx->comm);
    for (int i = 0; i < n_arrays; i++) ESPI_TRY(move_array(s, place, send + i * size, recv + i * size));
    return ESP_OK;
}

static void staged_close(void *self, bool broken) {
    staged *s = self;
    const size_t bytes = s->piece * (size_t)esp_comm_size(s->ctx->comm);
    if (!broken && s->in != NULL) (void)s->ctx->device_ops->wait(s->ctx->device); /* the last pieces are still being read */
    espi_ctx_free_host(s->ctx, ESPI_MEM_STAGING, s->out, bytes);
    espi_ctx_free_host(s->ctx, ESPI_MEM_STAGING, s->in, bytes);
    free(s->to);
    free(s);
}

static const espi_carrier carrier_host = {.name = "host", .begin = staged_begin, .close = staged_close};

static esp_status make_staged(const espi_carrier **carrier, void **self, esp_ctx *ctx) {
    const size_t size = (size_t)esp_comm_size(ctx->comm), even = PINNED / size / ESPI_ALIGN * ESPI_ALIGN;
    staged *s = calloc(1, sizeof *s);
    if (s == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the way between ranks");
    *s = (staged){.ctx = ctx, .piece = even > PIECE_LEAST ? even : PIECE_LEAST};
    s->to = calloc(5 * size, sizeof *s->to);
    esp_status status = s->to != NULL ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the counts of %zu ranks", size);
    if (status == ESP_OK) status = espi_ctx_alloc_host(ctx, ESPI_MEM_STAGING, size * s->piece, &s->out);
    if (status == ESP_OK) status = espi_ctx_alloc_host(ctx, ESPI_MEM_STAGING, size * s->piece, &s->in);
    if (status != ESP_OK) {
        staged_close(s, true);
        return status;
    }
    s->from = s->to + size;
    s->to_at = s->to + 2 * size;
    s->from_at = s->to + 3 * size;
    s->most = s->to + 4 * size;
    *carrier = &carrier_host;
    *self = s;
    espi_log(ctx, ESP_LOG_SELECT, "rows between ranks: through pinned memory of the host, as ESP_DEVICE_EXCHANGE=host asks");
    return ESP_OK;
}

/* ---- exchanges ---- */

/* What went wrong in an exchange is the end of all of them. */
static esp_status give_up(espi_link *l, esp_status status, espi_place place, bool late) {
    esp_comm *comm = l->ctx->comm;
    if (l->broken) return status; /* found while the device was waited for */
    char where[ESPI_PLACE_TEXT], reason[SENTENCE];
    espi_place_text(where, place);
    snprintf(reason, sizeof reason, "%s", esp_last_error());
    l->broken = true;
    l->carrier->close(l->self, true);
    l->carrier = NULL;
    espi_comm_break(comm, late);
    return ESPI_FAIL(status, "rank %d of %d, at %s: %s", esp_comm_rank(comm), esp_comm_size(comm), where, reason);
}

/* Where the device is waited for: exchanges that are done are counted; one that is not, and that has failed or been waited for too long,
 * ends the wait. */
static esp_status watch(void *user) {
    espi_link *l = user;
    const double now = espi_seconds(), patience = espi_comm_patience_of(l->ctx->comm);
    if (l->broken) return ESPI_FAIL(ESP_ERR_COMM, "an earlier exchange between the ranks failed: what waits for it never ends");
    if (now - l->looked < LOOK) return ESP_OK;
    l->looked = now;
    for (bool passed = true; l->passed < l->begun; l->passed++) {
        ESPI_TRY(l->ctx->device_ops->passed(l->ctx->device, (int)(l->passed % ESPI_MARKS), &passed));
        if (!passed) break;
        l->moved = now;
    }
    if (l->passed == l->begun) return ESP_OK;
    const espi_place place = l->places[l->passed % ESPI_MARKS];
    const esp_status status = l->carrier->check != NULL ? l->carrier->check(l->self) : ESP_OK;
    if (status != ESP_OK) return give_up(l, status, place, false);
    if (now - l->moved <= patience) return ESP_OK;
    return give_up(
        l, ESPI_FAIL(ESP_ERR_COMM, "the deadline passed: nothing came in %.0f seconds, a rank hangs or is gone (ESP_DEADLINE)", patience),
        place, true);
}

static esp_status queue(espi_link *l, espi_place place, const espi_message *send, const espi_message *recv, int n_arrays, int ticket,
                        double deadline) {
    const espi_device *ops = l->ctx->device_ops;
    ESPI_TRY(ops->order(l->ctx->device, ESPI_LANE_EXCHANGE, ESPI_LANE_WORK));
    for (int i = 0; i < n_arrays; i++) {
        const int own = i * esp_comm_size(l->ctx->comm) + esp_comm_rank(l->ctx->comm);
        if (recv[own].bytes > 0) ESPI_TRY(ops->copy(l->ctx->device, ESPI_LANE_EXCHANGE, recv[own].data, send[own].data, recv[own].bytes));
    }
    ESPI_TRY(l->carrier->begin(l->self, place, send, recv, n_arrays, deadline));
    return ops->mark(l->ctx->device, ESPI_LANE_EXCHANGE, ticket);
}

esp_status espi_link_begin(espi_link *link, espi_place place, const espi_message *send, const espi_message *recv, int n_arrays,
                           int *ticket) {
    if (link->broken) return ESPI_FAIL(ESP_ERR_COMM, "an earlier exchange between the ranks failed: no other can be made");
    const double now = espi_seconds(), deadline = now + espi_comm_patience_of(link->ctx->comm);
    if (link->begun - link->passed == ESPI_MARKS) link->passed++; /* the device is far behind: the younger ones are watched */
    if (link->passed == link->begun) link->moved = now;
    *ticket = (int)(link->begun % ESPI_MARKS);
    const esp_status status = queue(link, place, send, recv, n_arrays, *ticket, deadline);
    if (status != ESP_OK) return give_up(link, status, place, espi_seconds() >= deadline);
    link->places[*ticket] = place;
    link->begun++;
    return ESP_OK;
}

esp_status espi_link_end(espi_link *link, int ticket) {
    return link->ctx->device_ops->after(link->ctx->device, ESPI_LANE_WORK, ticket);
}

static espi_message rows_of(void *rows, espi_row_ranges ranges, int r, size_t row_bytes) {
    return (espi_message){(unsigned char *)rows + (size_t)ranges.at[r] * row_bytes, (size_t)ranges.rows[r] * row_bytes};
}

esp_status espi_link_begin_rows(espi_link *link, espi_place place, const espi_row_array *arrays, int n_arrays, espi_row_ranges to,
                                espi_row_ranges from, espi_pair pair, int *ticket) {
    const int size = esp_comm_size(link->ctx->comm), n = n_arrays * size;
    espi_message *send = calloc(2 * (size_t)n, sizeof *send);
    if (send == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d messages", 2 * n);
    espi_message *recv = send + n;
    for (int i = 0; i < n; i++) {
        const espi_row_array *array = &arrays[i / size];
        const int r = i % size;
        void *rows;
        memcpy(&rows, &array->from, sizeof rows); /* a message is of either direction */
        if (pair.to < 0 || pair.to == r) send[i] = rows_of(rows, from, r, array->row_bytes);
        if (pair.from < 0 || pair.from == r) recv[i] = rows_of(array->to, to, r, array->row_bytes);
    }
    const esp_status status = espi_link_begin(link, place, send, recv, n_arrays, ticket);
    free(send);
    return status;
}

esp_status espi_link_exchange(espi_link *link, espi_place place, const espi_row_array *arrays, int n_arrays, espi_row_ranges to,
                              espi_row_ranges from) {
    int ticket;
    ESPI_TRY(espi_link_begin_rows(link, place, arrays, n_arrays, to, from, (espi_pair){-1, -1}, &ticket));
    return espi_link_end(link, ticket);
}

bool espi_link_overlaps(const espi_link *link) {
    return link->carrier != NULL && link->carrier->overlaps;
}

/* ---- which way ---- */

static esp_status choose(espi_link *l) {
    const char *stated = getenv("ESP_DEVICE_EXCHANGE");
    const bool host = stated != NULL && strcmp(stated, "host") == 0;
    esp_ctx *ctx = l->ctx;
    ESPI_TRY(espi_comm_same(ctx->comm, "ESP_DEVICE_EXCHANGE", host));
    if (host) return make_staged(&l->carrier, &l->self, ctx);
    if (stated != NULL && stated[0] != '\0' && strcmp(stated, "nccl") != 0)
        return ESPI_FAIL(ESP_ERR_ARG, "the environment has ESP_DEVICE_EXCHANGE=%s, expected nccl or host", stated);
    const esp_status status = espi_carrier_nccl(&l->carrier, &l->self, ctx);
    if (status != ESP_ERR_UNSUPPORTED) return status;
    char reason[SENTENCE];
    snprintf(reason, sizeof reason, "%s", esp_last_error());
    return ESPI_FAIL(
        status,
        "ranks on GPUs need a way between them: %s.  Either install NCCL 2.18 or newer (ESP_NCCL names a libnccl.so.2 that the "
        "loader does not find), or set ESP_DEVICE_EXCHANGE=host on every rank: slower, through memory of the host",
        reason);
}

static void close_link(espi_link *link) {
    if (link->carrier != NULL) link->carrier->close(link->self, espi_comm_broken(link->ctx->comm));
    link->ctx->device_ops->set_watch(link->ctx->device, NULL, NULL);
    free(link);
}

esp_status espi_link_of(espi_link **link, esp_ctx *ctx) {
    if (ctx->link == NULL) {
        espi_link *l = calloc(1, sizeof *l);
        if (l == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the way between %d ranks", esp_comm_size(ctx->comm));
        l->ctx = ctx;
        const esp_status status = choose(l);
        if (status != ESP_OK) {
            free(l);
            return status;
        }
        ctx->device_ops->set_watch(ctx->device, watch, l);
        ctx->link = l;
        ctx->close_link = close_link;
    }
    *link = ctx->link;
    return ESP_OK;
}

const char *espi_link_name(const espi_link *link) {
    return link->carrier != NULL ? link->carrier->name : "broken";
}
