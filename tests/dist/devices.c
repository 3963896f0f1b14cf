/* A training step of ranks that have a device each, which is a fake one: over a library with NCCL's functions and through memory of the host it
 * has the bits of the same ranks without any (that those are the bits of one rank, says parity.c).  Host code that touches a device's memory
 * dies. */
#include "fake.h"
#include "rank_step.h"
#include "ranks.h"

#include <criterion/criterion.h>
#include <stdlib.h>
#include <string.h>

typedef struct run {
    const rank_setting *set;
    bool device;
    rank_digest digest; /* of rank 0 */
} run;

static esp_status work(rank_job *job) {
    run *r = job->user;
    rank_digest digest = {0};
    esp_ctx *ctx;
    const esp_ctx_config config = ESP_CTX_CONFIG(.comm = job->comm, .threads = 1, .backend = "ref");
    ESPI_TRY(r->device ? fake_ctx(&ctx, &config) : esp_ctx_create(&ctx, &config));
    const esp_status status = rank_step(&digest, ctx, r->set);
    esp_ctx_destroy(ctx);
    if (job->rank == 0) r->digest = digest;
    return status;
}

static rank_digest digest_of(const rank_setting *set, int size, bool device) {
    run r = {.set = set, .device = device};
    ranks_well(size, set->spread, work, &r, set->dir);
    return r.digest;
}

static void expect_alike(rank_setting set) {
    static const int cuts[][2] = {{2, 1}, {2, 2}, {4, 2}, {4, 4}, {3, 3}};
    char want[RANK_TEXT], got[RANK_TEXT];
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        set.spread = cuts[i][1];
        const rank_digest host = digest_of(&set, cuts[i][0], false), device = digest_of(&set, cuts[i][0], true);
        rank_text(want, &host);
        rank_text(got, &device);
        cr_expect_gt(host.value_of_norm, 0);
        cr_expect_str_eq(got, want, "%d ranks, spread %d:\n%s\n%s", cuts[i][0], set.spread, got, want);
    }
}

#define Q3A ESP_SOURCE_DIR "/tests/golden/data/q3a/model"
#define GO1 ESP_SOURCE_DIR "/tests/golden/data/go1/model"

Test(devices, over_nccl) {
    setenv("ESP_NCCL", FAKE_NCCL, 1);
    expect_alike((rank_setting){.dir = Q3A, .batches = 7, .tokens = 40, .steps = 2});
    expect_alike((rank_setting){.dir = GO1, .batches = 5, .tokens = 24, .steps = 1, .router = true});
}

Test(devices, in_rounds) {
    setenv("ESP_NCCL", FAKE_NCCL, 1);
    expect_alike((rank_setting){.dir = Q3A, .batches = 7, .tokens = 40, .steps = 1, .rows = 8});
}

Test(devices, through_the_host) {
    setenv("ESP_DEVICE_EXCHANGE", "host", 1);
    expect_alike((rank_setting){.dir = Q3A, .batches = 7, .tokens = 40, .steps = 1});
}
