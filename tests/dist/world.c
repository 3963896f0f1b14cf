/* A rank of a real job: tests/dist/transports.sh starts several of these under mpirun and by hand, and some of them misbehave.
 * world MODE: "right" runs every collective call; with "die", "stop", "leave", "early" (done before the others), "busy" (outside the calls, for
 * ever) and "desync" rank 1 does that in the middle. */
#include "dist/comm.h"

#include "core/status.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define CHECK(condition)                                                                                                                   \
    do {                                                                                                                                   \
        if (!(condition)) return ESPI_FAIL(ESP_ERR_INTERNAL, "not true: %s", #condition);                                                  \
    } while (0)

enum { ROWS = 70000 }; /* more than a socket's buffers hold */

static esp_status exchange_rows(esp_comm *comm, int rank, int size) {
    int64_t *counts = calloc(4 * (size_t)size, sizeof *counts), *to = counts, *from = counts + size, n = 0, m = 0;
    int64_t *to_at = from + size, *from_at = to_at + size;
    for (int p = 0; p < size; p++) {
        from[p] = (rank + 2 * p) % 3 * ROWS / size;
        to[p] = (p + 2 * rank) % 3 * ROWS / size;
        from_at[p] = n;
        to_at[p] = m;
        n += from[p];
        m += to[p];
    }
    int32_t *out = malloc((size_t)n * 8 + 1), *in = malloc((size_t)m * 8 + 1);
    for (int64_t p = 0, i = 0; p < size; p++)
        for (int64_t k = 0; k < from[p]; k++, i++) out[2 * i] = rank * size + (int32_t)p, out[2 * i + 1] = (int32_t)k;
    const espi_row_array rows = {in, out, 8};
    const esp_status status =
        espi_comm_exchange(comm, (espi_place){"rows", 2}, &rows, 1, (espi_row_ranges){to_at, to}, (espi_row_ranges){from_at, from});
    int64_t wrong = 0;
    for (int64_t p = 0, i = 0; status == ESP_OK && p < size; p++)
        for (int64_t k = 0; k < to[p]; k++, i++) wrong += in[2 * i] != (int32_t)p * size + rank || in[2 * i + 1] != k;
    free(counts);
    free(out);
    free(in);
    ESPI_TRY(status);
    CHECK(wrong == 0);
    return ESP_OK;
}

static esp_status right(esp_comm *comm) {
    const int rank = esp_comm_rank(comm), size = esp_comm_size(comm);
    int32_t all[64] = {0}, mine = rank + 5;
    ESPI_TRY(espi_comm_gather(comm, (espi_place){"numbers", -1}, all, &mine, sizeof mine));
    for (int r = 0; r < size; r++) CHECK(all[r] == r + 5);
    for (int i = 0; i < 3; i++) ESPI_TRY(exchange_rows(comm, rank, size));
    double total[3] = {0}, part[3] = {rank, 1, 0.5};
    void *scratch = malloc(espi_comm_add_bytes(comm));
    const esp_status status = espi_comm_add(comm, (espi_place){"sums", -1}, total, part, 3, ESP_F64, scratch);
    free(scratch);
    ESPI_TRY(status);
    CHECK(total[0] == size * (size - 1) / 2.0 && total[1] == size && total[2] == size / 2.0);
    return espi_comm_same(comm, "key", 7);
}

static esp_status misbehave(esp_comm *comm, const char *mode) {
    ESPI_TRY(espi_comm_meet(comm, (espi_place){"the start", -1}));
    if (esp_comm_rank(comm) == 1) {
        if (strcmp(mode, "die") == 0) raise(SIGKILL);
        if (strcmp(mode, "stop") == 0) raise(SIGSTOP);
        if (strcmp(mode, "leave") == 0) _exit(0);
        if (strcmp(mode, "early") == 0) return ESP_OK;
        while (strcmp(mode, "busy") == 0) pause();
        if (strcmp(mode, "desync") == 0) return espi_comm_meet(comm, (espi_place){"another place", 4});
    }
    return espi_comm_meet(comm, (espi_place){"the middle", 4});
}

static void print_log(void *user, esp_log_level level, const char *line) {
    (void)user;
    fprintf(stderr, "%s%s\n", level == ESP_LOG_WARN ? "warning: " : "", line);
}

static void end(void *user, int code, const char *line) {
    (void)user;
    fprintf(stderr, "world: %s\n", line);
    _exit(code);
}

int main(int argc, char **argv) {
    esp_comm *comm = NULL;
    esp_status status = espi_comm_start(&comm, &argc, &argv);
    const char *mode = argc > 1 ? argv[1] : "right";
    if (status == ESP_OK) status = esp_comm_watch(comm, print_log, end, NULL);
    if (status == ESP_OK) status = strcmp(mode, "right") == 0 ? right(comm) : misbehave(comm, mode);
    if (status == ESP_OK) status = esp_comm_agree(comm, "the end", ESP_OK);
    if (status == ESP_OK) {
        printf("rank %d of %d: right\n", esp_comm_rank(comm), esp_comm_size(comm));
        esp_comm_destroy(comm);
        return 0;
    }
    char line[1024];
    const int code = esp_comm_exit_code(comm, status);
    esp_comm_line(comm, status, line, sizeof line);
    fprintf(stderr, "world: %s\n", line);
    esp_comm_abort(comm, code);
    return code;
}
