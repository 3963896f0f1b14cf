/* The collective calls over simulated ranks: what arrives, in which order sums are made, and how every kind of disagreement ends. */
#include "dist/comm.h"

#include "core/clock.h"
#include "core/status.h"
#include "dist/watch.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST = 64 };

/* One thread a rank.  Assertions are made by the main thread, of what the ranks left here. */
typedef struct rank_call {
    esp_comm *comm;
    esp_status (*run)(struct rank_call *r);
    int rank, size;
    esp_status status;
    char sentence[512];
    double value[4];
    uint64_t calls;
    int64_t wrong;
} rank_call;

static void *run(void *user) {
    rank_call *r = user;
    r->status = r->run(r);
    if (r->status != ESP_OK) snprintf(r->sentence, sizeof r->sentence, "%s", esp_last_error());
    r->calls = espi_comm_calls(r->comm);
    esp_comm_destroy(r->comm);
    return NULL;
}

static void on_ranks(rank_call *ranks, int size, esp_status (*body)(rank_call *), double patience) {
    esp_comm *comms[MOST];
    pthread_t threads[MOST];
    cr_assert_eq(espi_comm_simulate(comms, size), ESP_OK);
    for (int r = 0; r < size; r++) {
        ranks[r] = (rank_call){.comm = comms[r], .run = body, .rank = r, .size = size};
        espi_comm_patience(comms[r], patience);
        cr_assert_eq(pthread_create(&threads[r], NULL, run, &ranks[r]), 0);
    }
    for (int r = 0; r < size; r++) pthread_join(threads[r], NULL);
}

static const espi_place here = {"a test", 3};

static esp_status gather(rank_call *r) {
    int64_t mine[2] = {r->rank, 100 * r->rank}, all[2 * MOST];
    ESPI_TRY(espi_comm_gather(r->comm, here, all, mine, sizeof mine));
    for (int i = 0; i < r->size; i++) r->wrong += all[2 * i] != i || all[2 * i + 1] != 100 * i;
    return ESP_OK;
}

/* Ranks dealt to three hosts in turn. */
static esp_status find_hosts(rank_call *r) {
    ESPI_TRY(espi_comm_find_hosts(r->comm, 1000 + (uint64_t)(r->rank % 3)));
    r->wrong = esp_comm_local_rank(r->comm) != r->rank / 3;
    return ESP_OK;
}

/* Rank a sends (a + b) % 3 rows to rank b, each holding where it is from and where it is to. */
static int64_t rows_of(int from, int to) {
    return (from + to) % 3;
}

/* One rank's rows behind the other's. */
static espi_row_ranges packed(int64_t *at, const int64_t *rows, int size) {
    for (int p = 0; p < size; p++) at[p] = p == 0 ? 0 : at[p - 1] + rows[p - 1];
    return (espi_row_ranges){at, rows};
}

static esp_status exchange(rank_call *r) {
    int64_t to[MOST], from[MOST], to_at[MOST], from_at[MOST];
    int32_t out[3 * MOST][3], in[3 * MOST][3], more_out[3 * MOST], more_in[3 * MOST];
    int n_out = 0, n_in = 0;
    for (int p = 0; p < r->size; p++) {
        from[p] = rows_of(r->rank, p);
        to[p] = rows_of(p, r->rank);
        for (int i = 0; i < from[p]; i++, n_out++)
            out[n_out][0] = r->rank, out[n_out][1] = p, out[n_out][2] = i, more_out[n_out] = 1000 * r->rank + p;
    }
    const espi_row_array both[] = {{in, out, sizeof out[0]}, {more_in, more_out, sizeof more_out[0]}};
    ESPI_TRY(espi_comm_exchange(r->comm, here, both, 2, packed(to_at, to, r->size), packed(from_at, from, r->size)));
    for (int p = 0; p < r->size; p++)
        for (int i = 0; i < to[p]; i++, n_in++)
            r->wrong += in[n_in][0] != p || in[n_in][1] != r->rank || in[n_in][2] != i || more_in[n_in] != 1000 * p + r->rank;
    return ESP_OK;
}

/* Values whose sum depends on the order. */
static float term(int rank) {
    return rank % 2 ? 1.0f : 1e8f * (float)(rank % 4 == 0 ? 1 : -1);
}

static esp_status add(rank_call *r) {
    const int64_t n = espi_comm_piece(r->comm) + 7;
    float *total = calloc((size_t)n, sizeof *total), *mine = calloc((size_t)n, sizeof *mine), want = 0;
    void *scratch = malloc(espi_comm_add_bytes(r->comm));
    for (int64_t i = 0; i < n; i++) mine[i] = term(r->rank);
    const esp_status status = espi_comm_add(r->comm, here, total, mine, n, ESP_F32, scratch);
    for (int p = 0; p < r->size; p++) want += term(p);
    for (int64_t i = 0; i < n; i++) r->wrong += total[i] != want;
    free(total);
    free(mine);
    free(scratch);
    return status;
}

static void expect_right(esp_status (*body)(rank_call *), const char *what) {
    static const int sizes[] = {1, 2, 3, 4, 5, 7, 16, 64};
    for (size_t s = 0; s < sizeof sizes / sizeof sizes[0]; s++) {
        rank_call ranks[MOST];
        on_ranks(ranks, sizes[s], body, 30);
        for (int r = 0; r < sizes[s]; r++) {
            cr_expect_eq(ranks[r].status, ESP_OK, "%s, rank %d of %d: %s", what, r, sizes[s], ranks[r].sentence);
            cr_expect_eq(ranks[r].wrong, 0, "%s, rank %d of %d", what, r, sizes[s]);
            cr_expect_eq(ranks[r].calls, ranks[0].calls);
        }
    }
}

Test(transports, hosts) {
    expect_right(find_hosts, "local ranks");
}

Test(transports, gather) {
    expect_right(gather, "gather");
}
Test(transports, exchange) {
    expect_right(exchange, "exchange");
}
Test(transports, add) {
    expect_right(add, "add");
}

/* Rank 1 is in another layer. */
static esp_status other_layer(rank_call *r) {
    int32_t all[MOST], mine = 0;
    return espi_comm_gather(r->comm, (espi_place){"counts", r->rank == 1 ? 8 : 7}, all, &mine, sizeof mine);
}
/* Rank 2 sends a row more than the others expect. */
static esp_status other_count(rank_call *r) {
    int64_t to[3] = {1, 1, 1}, from[3] = {1, 1, 1}, to_at[3], from_at[3];
    int32_t in[4] = {0}, out[4] = {0};
    if (r->rank == 2) from[0] = 2;
    const espi_row_array rows = {in, out, sizeof in[0]};
    return espi_comm_exchange(r->comm, here, &rows, 1, packed(to_at, to, r->size), packed(from_at, from, r->size));
}
/* Rank 0 leaves; the others wait for it. */
static esp_status absent(rank_call *r) {
    int32_t all[MOST], mine = 0;
    return r->rank == 0 ? ESP_OK : espi_comm_gather(r->comm, here, all, &mine, sizeof mine);
}
static esp_status failing(rank_call *r) {
    return espi_comm_agree(r->comm, here, r->rank == 1 ? ESPI_FAIL(ESP_ERR_NONFINITE, "a NaN in layer 5") : ESP_OK);
}
static esp_status unlike(rank_call *r) {
    return espi_comm_same(r->comm, "config.seed", r->rank == 2 ? 8 : 7);
}

static void expect_sentence(esp_status (*body)(rank_call *), esp_status status, const char *part, int first) {
    rank_call ranks[MOST];
    on_ranks(ranks, 3, body, 1);
    bool said = false;
    for (int r = first; r < 3; r++) {
        cr_expect_eq(ranks[r].status, status, "rank %d: %s: %s", r, esp_status_name(ranks[r].status), ranks[r].sentence);
        said = said || strstr(ranks[r].sentence, part) != NULL;
    }
    cr_expect(said, "nobody says \"%s\", rank %d says %s", part, first, ranks[first].sentence);
}

Test(transports, another_way_is_named) {
    expect_sentence(other_layer, ESP_ERR_MISMATCH, "layer 8", 0);
}
Test(transports, an_absent_rank_ends_the_wait) {
    expect_sentence(absent, ESP_ERR_COMM, "2 of 3 ranks came before the deadline", 1);
}
Test(transports, one_failure_is_everybodys) {
    expect_sentence(failing, ESP_ERR_NONFINITE, "rank 1: a NaN in layer 5", 0);
}
Test(transports, what_must_be_alike) {
    expect_sentence(unlike, ESP_ERR_MISMATCH, "config.seed is not the same on all ranks: rank 0 has 0000000000000007, rank 2", 0);
}
/* The rank that expected less says so; the others may be at the next meeting already. */
Test(transports, another_number_of_rows) {
    rank_call ranks[MOST];
    on_ranks(ranks, 3, other_count, 1);
    cr_expect_eq(ranks[0].status, ESP_ERR_MISMATCH);
    cr_expect(strstr(ranks[0].sentence, "got 8 bytes announced by rank 2, expected 4") != NULL, "%s", ranks[0].sentence);
    cr_expect(ranks[1].status == ESP_ERR_COMM && ranks[2].status == ESP_ERR_COMM);
}

/* ---- an abort ---- */

/* A transport whose abort comes back when the program has been told to end, or at once. */
typedef struct hanging {
    atomic_bool told;
    bool returns;
    int code;
    double began, seconds; /* until it was told */
    char line[512];
} hanging;

static void end_job(void *self, int code) {
    hanging *a = self;
    (void)code;
    for (int i = 0; !a->returns && !atomic_load(&a->told) && i < 1500; i++) nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
}

static void note_end(void *user, int code, const char *line) {
    hanging *a = user;
    a->code = code;
    a->seconds = espi_seconds() - a->began;
    snprintf(a->line, sizeof a->line, "%s", line);
    atomic_store(&a->told, true);
}

static void expect_cut(bool returns) {
    static const espi_transport transport = {.name = "hanging", .end_job = end_job};
    esp_comm *comm;
    hanging a = {.returns = returns};
    cr_assert_eq(espi_comm_make(&comm, &transport, &a, 0, 2), ESP_OK);
    cr_assert_eq(esp_comm_watch(comm, NULL, note_end, &a), ESP_OK);
    a.began = espi_seconds();
    esp_comm_abort(comm, 73);
    for (int i = 0; !atomic_load(&a.told) && i < 1000; i++) nanosleep(&(struct timespec){.tv_nsec = 10000000}, NULL);
    esp_comm_destroy(comm);
    cr_assert(atomic_load(&a.told), "nobody ends the program");
    cr_expect_eq(a.code, 73);
    cr_expect(a.seconds >= ESPI_WATCH_ABORT && a.seconds < ESPI_WATCH_ABORT + 2, "told after %g s", a.seconds);
    cr_expect(strstr(a.line, "the job was aborted, and this rank did not end within 5 s") != NULL, "%s", a.line);
}

Test(transports, an_abort_that_hangs_is_cut_short) {
    expect_cut(false);
}

/* A GPU may be waited for that waits for a rank which is gone. */
Test(transports, a_program_that_hangs_after_an_abort_is_cut_short) {
    expect_cut(true);
}
