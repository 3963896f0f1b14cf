/* Ranks that would take more than there is where they are do not begin: all of them are told, with the numbers. */
#include "dist/room.h"

#include "espalier/plan.h"
#include "fake.h"
#include "ranks.h"

enum { RANKS = 4 };

/* Of each rank. */
typedef struct ask {
    size_t peak, limit;
    uint64_t left, number;
    size_t beside; /* in the memory of the host that has number 1, where 1000 bytes are left */
} ask;

static esp_status check(rank_job *job) {
    const ask *a = (const ask *)job->user + job->rank;
    espi_demand demands[] = {{{.number = a->number, .left = a->left, .source = "/proc/meminfo"}, a->peak},
                             {{.number = 1, .left = 1000, .name = "home", .source = "a limit"}, a->beside}};
    esp_ctx *ctx;
    snprintf(demands[0].place.name, sizeof demands[0].place.name, "host%d", (int)a->number);
    ESPI_TRY(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = job->comm, .threads = 1, .memory_limit = a->limit)));
    const esp_status status = espi_room_check(ctx, demands);
    esp_ctx_destroy(ctx);
    return status;
}

#define FITS(...) ranks_well(RANKS, 1, check, (ask[RANKS]){__VA_ARGS__}, "room")
#define REFUSED(words, ...) ranks_fail(RANKS, 1, check, (ask[RANKS]){__VA_ARGS__}, ESP_ERR_MEMORY, words)

Test(room, is_of_all_ranks_of_a_host) {
    FITS({100, 0, 201, 1}, {101, 0, 201, 1}, {900, 0, 1000, 2}, {100, 0, 1000, 2});
    REFUSED("rank 2: a run takes up to 901 bytes here, all 2 ranks that share the memory of host2 together 1001, expected at most the 1000 "
            "that are left (/proc/meminfo): lower",
            {100, 0, 201, 1}, {101, 0, 201, 1}, {901, 0, 1000, 2}, {100, 0, 1000, 2});
}

Test(room, is_the_least_that_one_of_them_saw) {
    FITS({100, 0, 900, 1}, {100, 0, 400, 1}, {100, 0, 900, 1}, {100, 0, 900, 1});
    REFUSED("together 400, expected at most the 399", {100, 0, 900, 1}, {100, 0, 399, 1}, {100, 0, 900, 1}, {100, 0, 900, 1});
}

Test(room, sums_do_not_wrap) {
    FITS({100, 0, UINT64_MAX, 1}, {100, 0, UINT64_MAX, 1}, {SIZE_MAX, 0, UINT64_MAX, 1}, {SIZE_MAX, 0, UINT64_MAX, 1});
    REFUSED("together 18446744073709551615, ", {SIZE_MAX, 0, 1000, 1}, {9, 0, 1000, 1}, {9, 0, 1000, 1}, {9, 0, 1000, 1});
}

Test(room, of_each_rank_by_its_own_limit) {
    FITS({100, 100, 1000, 1}, {100, 0, 1000, 1}, {100, 0, 1000, 1}, {100, 0, 1000, 1});
    REFUSED("rank 3: a run takes up to 100 bytes, expected at most esp_ctx_config.memory_limit, 99", {100, 0, 1000, 1}, {100, 0, 1000, 1},
            {100, 0, 1000, 1}, {100, 99, 1000, 1});
}

/* Ranks on devices, and one that has none, take memory of one host. */
Test(room, beside_devices) {
    FITS({9, 0, 9, 2, 300}, {9, 0, 9, 3, 300}, {400, 0, 1000, 1}, {9, 0, 9, 4});
    REFUSED("rank 0: a run takes up to 300 bytes here, all 3 ranks that share the memory of home together 1001, expected at most the 1000",
            {9, 0, 9, 2, 300}, {9, 0, 9, 3, 301}, {400, 0, 1000, 1}, {9, 0, 9, 4});
}

/* Of the machine that this runs on. */
static esp_status check_here(rank_job *job) {
    esp_ctx *ctx;
    ESPI_TRY(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = job->comm, .threads = 1)));
    const esp_status status = esp_plan_check(ctx, *(const size_t *)job->user, (size_t)1 << 60);
    esp_ctx_destroy(ctx);
    return status;
}

Test(room, of_this_machine) {
    ranks_well(3, 1, check_here, &(size_t){4096}, "a page");
    ranks_fail(3, 1, check_here, &(size_t){(size_t)1 << 59}, ESP_ERR_MEMORY, "all 3 ranks that share the memory of ");
}

/* On a device that of the device: there are FAKE_LEFT bytes on one that all share. */
static esp_status check_device(rank_job *job) {
    esp_ctx *ctx;
    ESPI_TRY(fake_ctx(&ctx, &ESP_CTX_CONFIG(.comm = job->comm, .threads = 1)));
    const esp_status status = esp_plan_check(ctx, ((const size_t *)job->user)[0], ((const size_t *)job->user)[1]);
    esp_ctx_destroy(ctx);
    return status;
}

Test(room, of_a_device) {
    ranks_well(3, 1, check_device, (size_t[]){FAKE_LEFT / 3, 4096}, "a third");
    ranks_fail(3, 1, check_device, (size_t[]){FAKE_LEFT / 3 + 1, 4096}, ESP_ERR_MEMORY, "that are left (free on its GPU)");
    ranks_fail(3, 1, check_device, (size_t[]){4096, (size_t)1 << 59}, ESP_ERR_MEMORY, "all 3 ranks that share the memory of ");
}
