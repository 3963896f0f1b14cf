/* Device memory from rank to rank: over a library with NCCL's functions and through memory of the host, on fake devices; and how everything
 * ends that a real NCCL, or a rank, can do wrong.  Ranks are threads. */
#include "dist/link.h"

#include "fake.h"
#include "fake_nccl.h"

#include "core/clock.h"
#include "core/select.h"
#include "core/status.h"

#include <criterion/criterion.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 8, LINES = 4096 };

typedef struct rank_call {
    esp_comm *comm;
    esp_ctx *ctx;
    espi_link *link;
    esp_status (*body)(struct rank_call *r);
    int rank, size;
    esp_status status;
    char sentence[1024], log[LINES];
    int64_t wrong;
    int exit_code;
} rank_call;

static void keep_log(void *user, esp_log_level level, const char *line) {
    (void)level;
    rank_call *r = user;
    const size_t n = strlen(r->log);
    if (strstr(line, "between ranks") != NULL) snprintf(r->log + n, sizeof r->log - n, "%s\n", line);
}

static esp_status with_link(rank_call *r) {
    ESPI_TRY(fake_ctx(&r->ctx, &ESP_CTX_CONFIG(.comm = r->comm, .log = keep_log, .log_user = r, .threads = 1)));
    ESPI_TRY(espi_link_of(&r->link, r->ctx));
    return r->body(r);
}

static void *run(void *user) {
    rank_call *r = user;
    r->status = with_link(r);
    if (r->status != ESP_OK) snprintf(r->sentence, sizeof r->sentence, "%s", esp_last_error());
    r->exit_code = esp_comm_exit_code(r->comm, r->status);
    esp_ctx_destroy(r->ctx);
    esp_comm_destroy(r->comm);
    return NULL;
}

/* Assertions are made by the main thread, of what the ranks left behind. */
static void on_ranks(rank_call *ranks, int size, esp_status (*body)(rank_call *), double patience) {
    esp_comm *comms[MOST];
    pthread_t threads[MOST];
    setenv("ESP_LOG", "select", 1);
    cr_assert_eq(espi_comm_simulate(comms, size), ESP_OK);
    for (int r = 0; r < size; r++) {
        ranks[r] = (rank_call){.comm = comms[r], .body = body, .rank = r, .size = size};
        espi_comm_patience(comms[r], patience);
        cr_assert_eq(pthread_create(&threads[r], NULL, run, &ranks[r]), 0);
    }
    for (int r = 0; r < size; r++) pthread_join(threads[r], NULL);
}

/* The fake library, and what it counts. */
static fake_nccl_state *use_library(const char *path) {
    setenv("ESP_NCCL", path, 1);
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    cr_assert_not_null(handle, "%s", dlerror());
    fake_nccl_state *state = dlsym(handle, "fake_nccl");
    cr_assert_not_null(state);
    return state;
}

static void expect_all(const rank_call *ranks, int size, esp_status status, const char *sentence) {
    for (int r = 0; r < size; r++) {
        cr_expect_eq(ranks[r].status, status, "rank %d: %d, %s", r, (int)ranks[r].status, ranks[r].sentence);
        cr_expect(status == ESP_OK || strstr(ranks[r].sentence, sentence), "rank %d: %s", r, ranks[r].sentence);
        cr_expect_eq(ranks[r].wrong, 0, "rank %d: %lld wrong", r, (long long)ranks[r].wrong);
    }
}

/* ---- what arrives ---- */

static const espi_place here = {"rows to the experts", 3};

static bool through_host;

/* Some pairs send nothing; through the host some send more than goes at once. */
static int64_t rows_of(int from, int to, int size) {
    const int64_t n = (from + 2 * to) % 3;
    return n == 0 ? 0 : n == 1 ? 3 : through_host ? (16 << 20) / size / 64 + 5 : 300;
}

static int32_t content(int from, int to, int64_t row, int j) {
    return (int32_t)(from * 1000003 + to * 10007 + row * 16 + j);
}

typedef struct rows {
    int64_t to[MOST], from[MOST], n_out, n_in;
    int32_t *host;
    void *out, *in;
    size_t out_bytes, in_bytes;
} rows;

enum { WIDTH = 16, ARRAYS = 2 };

static void free_rows(rows *x, esp_ctx *ctx) {
    espi_ctx_free(ctx, ESPI_MEM_ACTIVATIONS, x->out, x->out_bytes);
    espi_ctx_free(ctx, ESPI_MEM_ACTIVATIONS, x->in, x->in_bytes);
    free(x->host);
}

static esp_status make_rows(rows *x, const rank_call *r, int64_t add) {
    *x = (rows){.n_out = 0};
    for (int p = 0; p < r->size; p++) {
        x->n_out += x->from[p] = rows_of(r->rank, p, r->size);
        x->n_in += x->to[p] = rows_of(p, r->rank, r->size);
    }
    x->out_bytes = (size_t)x->n_out * WIDTH * 4;
    x->in_bytes = (size_t)x->n_in * WIDTH * 4;
    x->host = malloc((x->out_bytes > x->in_bytes ? x->out_bytes : x->in_bytes) + 1);
    int64_t i = 0;
    for (int p = 0; p < r->size; p++)
        for (int64_t row = 0; row < x->from[p]; row++)
            for (int j = 0; j < WIDTH; j++) x->host[i++] = content(r->rank, p, row + add, j);
    ESPI_TRY(espi_ctx_alloc(r->ctx, ESPI_MEM_ACTIVATIONS, x->out_bytes, &x->out));
    ESPI_TRY(espi_ctx_alloc(r->ctx, ESPI_MEM_ACTIVATIONS, x->in_bytes, &x->in));
    return espi_ctx_put(r->ctx, x->out, x->host, x->out_bytes);
}

static esp_status check_rows(rank_call *r, rows *x, int64_t add) {
    ESPI_TRY(espi_ctx_get(r->ctx, x->host, x->in, x->in_bytes));
    int64_t i = 0;
    for (int p = 0; p < r->size; p++)
        for (int64_t row = 0; row < x->to[p]; row++)
            for (int j = 0; j < WIDTH; j++) r->wrong += x->host[i++] != content(p, r->rank, row + add, j);
    return ESP_OK;
}

/* The messages of one exchange, the rows of a rank in two arrays: the first of them, and the rest. */
static void messages_of(espi_message *send, espi_message *recv, const rows *x, int size) {
    unsigned char *out = x->out, *in = x->in;
    for (int p = 0; p < size; p++) {
        const size_t sent = x->from[p] > 0 ? WIDTH * 4 : 0, got = x->to[p] > 0 ? WIDTH * 4 : 0;
        send[p] = (espi_message){out, sent};
        recv[p] = (espi_message){in, got};
        send[size + p] = (espi_message){out + sent, (size_t)x->from[p] * WIDTH * 4 - sent};
        recv[size + p] = (espi_message){in + got, (size_t)x->to[p] * WIDTH * 4 - got};
        out += (size_t)x->from[p] * WIDTH * 4;
        in += (size_t)x->to[p] * WIDTH * 4;
    }
}

static esp_status whole(rank_call *r, const rows *x) {
    espi_message send[ARRAYS * MOST], recv[ARRAYS * MOST];
    int ticket;
    messages_of(send, recv, x, r->size);
    ESPI_TRY(espi_link_begin(r->link, here, send, recv, ARRAYS, &ticket));
    return espi_link_end(r->link, ticket);
}

/* Over NCCL more exchanges than there are marks. */
static esp_status exchange(rank_call *r) {
    rows x;
    esp_status status = make_rows(&x, r, 0);
    const int times = through_host ? 2 : ESPI_MARKS + 3;
    for (int i = 0; i < times && status == ESP_OK; i++) {
        status = whole(r, &x);
        if (status == ESP_OK && i % 20 == 0) status = check_rows(r, &x, 0);
    }
    free_rows(&x, r->ctx);
    return status;
}

/* Two exchanges under way at once, of which the second is ended first. */
static esp_status overlapping(rank_call *r) {
    rows x[2] = {{.n_out = 0}, {.n_out = 0}};
    espi_message send[ARRAYS * MOST], recv[ARRAYS * MOST];
    int ticket[2];
    esp_status status = ESP_OK;
    for (int i = 0; i < 2 && status == ESP_OK; i++) status = make_rows(&x[i], r, i);
    for (int i = 0; i < 2 && status == ESP_OK; i++) {
        messages_of(send, recv, &x[i], r->size);
        status = espi_link_begin(r->link, here, send, recv, ARRAYS, &ticket[i]);
    }
    for (int i = 1; i >= 0 && status == ESP_OK; i--) {
        status = espi_link_end(r->link, ticket[i]);
        if (status == ESP_OK) status = check_rows(r, &x[i], i);
    }
    for (int i = 0; i < 2; i++) free_rows(&x[i], r->ctx);
    return status;
}

static void expect_right(esp_status (*body)(rank_call *)) {
    static const int sizes[] = {1, 2, 3, 4, 7};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        rank_call ranks[MOST];
        on_ranks(ranks, sizes[s], body, 30);
        expect_all(ranks, sizes[s], ESP_OK, "");
    }
}

static esp_status nothing(rank_call *r) {
    (void)r;
    return ESP_OK;
}

Test(link, nccl) {
    const fake_nccl_state *state = use_library(FAKE_NCCL);
    expect_right(exchange);
    expect_right(overlapping);
    cr_expect_gt(state->sends, 100);
    cr_expect_eq(state->sends, state->recvs);
    cr_expect_eq(state->nothing, 0, "messages of no bytes were sent");
    cr_expect_eq(state->empty, 0, "groups of nothing were made");
    cr_expect_geq(state->most_under_way, 2, "no two exchanges were under way at once");
    cr_expect_eq(state->aborted, 0);
    cr_expect_eq(state->destroyed, 2 * (1 + 2 + 3 + 4 + 7));
}

Test(link, through_the_host) {
    const fake_nccl_state *state = use_library(FAKE_NCCL);
    setenv("ESP_DEVICE_EXCHANGE", "host", 1);
    through_host = true;
    expect_right(exchange);
    expect_right(overlapping);
    cr_expect_eq(state->sends, 0);
    rank_call ranks[2];
    on_ranks(ranks, 2, nothing, 30);
    cr_expect(strstr(ranks[1].log, "pinned memory of the host"), "%s", ranks[1].log);
}

/* ---- which library ---- */

static void expect_refused(const char *path, const char *sentence) {
    rank_call ranks[2];
    setenv("ESP_NCCL", path, 1);
    on_ranks(ranks, 2, nothing, 10);
    expect_all(ranks, 2, ESP_ERR_UNSUPPORTED, sentence);
    for (int r = 0; r < 2; r++) {
        cr_expect(strstr(ranks[r].sentence, "ESP_DEVICE_EXCHANGE=host"), "%s", ranks[r].sentence);
        cr_expect(strstr(ranks[r].sentence, "ESP_NCCL"), "%s", ranks[r].sentence);
        cr_expect_eq(ranks[r].exit_code, 64);
    }
}

Test(link, libraries) {
    expect_refused("/nowhere/libnccl.so.2", "cannot be loaded: /nowhere/libnccl.so.2");
    expect_refused(FAKE_NCCL_OLD, "is NCCL 2.10.5, expected 2.18 or a later 2");
    expect_refused(FAKE_NCCL_NEXT, "is NCCL 3.0.1, expected");
    expect_refused(FAKE_NCCL_MUTILATED_LIBRARY, "lacks ncclCommAbort, ncclGroupStart, expected the interface");
    rank_call ranks[2];
    use_library(FAKE_NCCL);
    on_ranks(ranks, 2, nothing, 10);
    cr_expect(strstr(ranks[0].log, "NCCL 2.30.7 of"), "%s", ranks[0].log);
    cr_expect_null(strstr(ranks[0].log, "lacks"), "%s", ranks[0].log);
    use_library(FAKE_NCCL_BARE_LIBRARY);
    on_ranks(ranks, 2, exchange, 10);
    expect_all(ranks, 2, ESP_OK, "");
    cr_expect(strstr(ranks[0].log, "without what it lacks: ncclGetLastError, ncclCommFinalize"), "%s", ranks[0].log);
    setenv("ESP_DEVICE_EXCHANGE", "sometimes", 1);
    on_ranks(ranks, 2, nothing, 10);
    expect_all(ranks, 2, ESP_ERR_ARG, "ESP_DEVICE_EXCHANGE=sometimes, expected nccl or host");
}

/* ---- what goes wrong ---- */

static void strike(fake_nccl_fault fault, int rank, rank_call *ranks, int size, double patience) {
    fake_nccl_state *state = use_library(FAKE_NCCL);
    state->rank = rank;
    state->fault = (int)fault;
    const double start = espi_seconds();
    on_ranks(ranks, size, exchange, patience);
    cr_expect_lt(espi_seconds() - start, patience + 7, "fault %d took %.1f s", (int)fault, espi_seconds() - start);
}

Test(link, no_id) {
    rank_call ranks[3];
    strike(FAKE_NCCL_NO_ID, 0, ranks, 3, 1);
    expect_all(ranks, 3, ESP_ERR_COMM, "rank 0: NCCL failed to make an id: invalid usage");
    cr_expect_eq(ranks[2].exit_code, 74);
}

Test(link, does_not_join) {
    rank_call ranks[3];
    strike(FAKE_NCCL_NO_JOIN, 1, ranks, 3, 1);
    expect_all(ranks, 3, ESP_ERR_COMM, "bring the ranks together");
    cr_expect(strstr(ranks[1].sentence, "invalid usage: the fake says so"), "%s", ranks[1].sentence);
    cr_expect(strstr(ranks[2].sentence, "the deadline passed"), "%s", ranks[2].sentence);
    cr_expect_eq(ranks[1].exit_code, 74);
    cr_expect_eq(ranks[2].exit_code, 75);
}

Test(link, is_away) {
    rank_call ranks[2];
    strike(FAKE_NCCL_AWAY, 1, ranks, 2, 1);
    cr_expect_eq(ranks[0].status, ESP_ERR_COMM);
    cr_expect(strstr(ranks[0].sentence, "bring the ranks together"), "%s", ranks[0].sentence);
    cr_expect_eq(ranks[0].exit_code, 75);
}

Test(link, refused_send) {
    rank_call ranks[3];
    strike(FAKE_NCCL_BAD_SEND, 1, ranks, 3, 1);
    expect_all(ranks, 3, ESP_ERR_COMM, "at \"rows to the experts\", layer 3: ");
    cr_expect(strstr(ranks[1].sentence, "rank 1 of 3"), "%s", ranks[1].sentence);
    cr_expect(strstr(ranks[1].sentence, "invalid argument"), "%s", ranks[1].sentence);
    cr_expect_eq(ranks[1].exit_code, 74);
    cr_expect_eq(ranks[0].exit_code, 75);
}

Test(link, group_that_is_never_launched) {
    rank_call ranks[2];
    strike(FAKE_NCCL_STUCK, 0, ranks, 2, 1);
    expect_all(ranks, 2, ESP_ERR_COMM, "at \"rows to the experts\", layer 3: the deadline passed");
    cr_expect(strstr(ranks[0].sentence, "NCCL was to send and receive"), "%s", ranks[0].sentence);
    cr_expect_eq(ranks[0].exit_code, 75);
    cr_expect_eq(ranks[1].exit_code, 75);
}

/* The host goes on; where it waits for the device, it finds that nothing comes. */
Test(link, messages_that_never_come) {
    rank_call ranks[3];
    strike(FAKE_NCCL_MUTE, 2, ranks, 3, 1);
    cr_expect(strstr(ranks[0].sentence, "rank 0 of 3, at \"rows to the experts\", layer 3: the deadline passed: nothing came in 1 seconds"),
              "%s", ranks[0].sentence);
    cr_expect_eq(ranks[0].exit_code, 75);
    cr_expect_neq(ranks[1].status, ESP_OK);
}

Test(link, peer_that_fails) {
    rank_call ranks[2];
    strike(FAKE_NCCL_REMOTE, 1, ranks, 2, 20);
    cr_expect_eq(ranks[0].status, ESP_ERR_COMM);
    cr_expect(strstr(ranks[0].sentence, "layer 3: NCCL failed to send and receive: remote process exited: the fake says so"), "%s",
              ranks[0].sentence);
    cr_expect_eq(ranks[0].exit_code, 74);
}

Test(link, farewell_that_never_ends) {
    fake_nccl_state *state = use_library(FAKE_NCCL);
    rank_call ranks[2];
    state->rank = 1;
    state->fault = FAKE_NCCL_NO_FAREWELL;
    on_ranks(ranks, 2, exchange, 10);
    expect_all(ranks, 2, ESP_OK, "");
    cr_expect_eq(state->aborted, 1);
    cr_expect_eq(state->destroyed, 1);
}

static esp_status after_failure(rank_call *r) {
    int ticket;
    espi_message none[MOST] = {{NULL, 0}};
    if (exchange(r) == ESP_OK) return ESP_OK;
    r->wrong += espi_link_begin(r->link, here, none, none, 1, &ticket) != ESP_ERR_COMM;
    r->wrong += strcmp(espi_link_name(r->link), "broken") != 0;
    return espi_comm_meet(r->comm, here);
}

/* What the link found, all later calls of the ranks find too. */
Test(link, nothing_after_a_failure) {
    rank_call ranks[2];
    fake_nccl_state *state = use_library(FAKE_NCCL);
    state->rank = 0;
    state->fault = FAKE_NCCL_BAD_SEND;
    on_ranks(ranks, 2, after_failure, 1);
    expect_all(ranks, 2, ESP_ERR_COMM, "an earlier call between the ranks failed");
}

static esp_status broken_elsewhere(rank_call *r) {
    ESPI_TRY(exchange(r));
    espi_comm_break(r->ctx->comm, false);
    return ESP_OK;
}

/* Where the ranks' own connections are gone, nobody would answer a farewell. */
Test(link, no_farewell_to_those_who_are_gone) {
    rank_call ranks[2];
    const fake_nccl_state *state = use_library(FAKE_NCCL);
    on_ranks(ranks, 2, broken_elsewhere, 10);
    expect_all(ranks, 2, ESP_OK, "");
    cr_expect_eq(state->aborted, 2);
    cr_expect_eq(state->destroyed, 0);
}

/* A recording would run the exchange again without the peers. */
static esp_status recorded(rank_call *r) {
    int ticket;
    espi_message none[MOST] = {{NULL, 0}};
    ESPI_TRY(r->ctx->device_ops->record_begin(r->ctx->device));
    const esp_status status = espi_link_begin(r->link, here, none, none, 1, &ticket);
    void *graph = NULL;
    ESPI_TRY(r->ctx->device_ops->record_end(r->ctx->device, &graph));
    r->ctx->device_ops->graph_free(r->ctx->device, graph);
    r->wrong += status != ESP_ERR_STATE;
    return ESP_OK;
}

Test(link, not_in_a_recording) {
    rank_call ranks[2];
    use_library(FAKE_NCCL);
    on_ranks(ranks, 2, recorded, 10);
    expect_all(ranks, 2, ESP_OK, "");
}
