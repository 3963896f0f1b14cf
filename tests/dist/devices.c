/* A training step of ranks that have a device each, which is a fake one: over a library with NCCL's functions and through memory of the host it
 * has the bits of the same ranks without any (that those are the bits of one rank, says parity.c).  Host code that touches a device's memory
 * dies. */
#include "fake.h"
#include "models/model.h"
#include "rank_step.h"
#include "ranks.h"

#include <criterion/criterion.h>
#include <stdatomic.h>
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

/* ---- kernels of other bits, chosen by the rows that experts have in the mean, and for each expert by its own ---- */

enum { FEW_MEAN = 8, FEW_OWN = 6 };
static espi_backend choosing;
static espi_slot_gate_up_fwd plain;
static atomic_int chosen[2], chosen_alone[2];

static esp_status choose(const espi_exec *exec, const espi_gate_up_fwd *a) {
    const bool few = espi_routing_is_few(&a->routing, FEW_MEAN);
    const int64_t width = a->w.rows / 2;
    float *act = a->act;
    ESPI_TRY(plain.run(exec, a));
    for (int64_t e = 0; e < a->routing.experts; e++) {
        const int32_t first = a->routing.offsets[e], last = a->routing.offsets[e + 1];
        const bool alone = last - first <= FEW_OWN;
        for (int64_t i = first * width; i < last * width; i++) act[i] *= 1 + (few ? 0x1p-20f : 0) + (alone ? 0x1p-18f : 0);
        atomic_fetch_add(&chosen[few], last > first);
        atomic_fetch_add(&chosen_alone[alone], last > first);
    }
    return ESP_OK;
}

static esp_status work_choosing(rank_job *job) {
    run *r = job->user;
    rank_digest digest = {0};
    esp_ctx *ctx;
    ESPI_TRY(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = job->comm, .threads = 1, .backend = "ref")));
    ctx->backends[0] = &choosing;
    const esp_status status = rank_step(&digest, ctx, r->set);
    esp_ctx_destroy(ctx);
    if (job->rank == 0) r->digest = digest;
    return status;
}

/* Of a batch whose experts are shared every rank sees a part, of which a round may have but some experts: it chooses as one rank does that sees
 * all of it. */
static void expect_one_choice(int64_t rows) {
    static const int cuts[][2] = {{1, 1}, {2, 1}, {2, 2}, {4, 2}, {4, 4}, {3, 3}};
    char want[RANK_TEXT], got[RANK_TEXT];
    rank_setting set = {.dir = Q3A, .batches = 7, .tokens = 40, .steps = 2, .rows = rows};
    esp_ctx *ctx;
    OK(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.threads = 1, .backend = "ref")));
    choosing = *ctx->backends[0];
    plain = choosing.gate_up_fwd;
    choosing.gate_up_fwd.run = choose;
    esp_ctx_destroy(ctx);
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        run r = {.set = &set};
        set.spread = cuts[i][1];
        ranks_well(cuts[i][0], set.spread, work_choosing, &r, set.dir);
        rank_text(i == 0 ? want : got, &r.digest);
        if (i > 0) cr_expect_str_eq(got, want, "%d ranks, spread %d:\n%s\n%s", cuts[i][0], set.spread, got, want);
        for (int few = 0; few < 2; few++) {
            cr_expect_gt(atomic_exchange(&chosen[few], 0), 0, "kernels for %s rows in the mean", few ? "few" : "many");
            cr_expect_gt(atomic_exchange(&chosen_alone[few], 0), 0, "kernels for an expert's %s rows", few ? "few" : "many");
        }
    }
}

Test(devices, choose_as_one_rank_does) {
    expect_one_choice(0);
    expect_one_choice(8);
}

/* ---- how often the host waits ---- */

/* Two steps of a rank's replayed micro-batch; the second one counts: everything is set up. */
static esp_status replay(rank_job *job) {
    enum { T = 24 };
    int32_t tokens[T];
    const int32_t cu[] = {0, 10, T};
    unsigned char routes[T * 64]; /* the model is small */
    esp_ctx *ctx;
    esp_model *model = NULL;
    esp_tensor hidden, d_hidden;
    double loss;
    ESPI_TRY(fake_ctx(&ctx, &ESP_CTX_CONFIG(.comm = job->comm, .threads = 1, .backend = "ref")));
    esp_status status = esp_model_load(&model, ctx, Q3A, &ESP_MODEL_CONFIG(.lora_rank = 4));
    for (int step = 0; step < 2 && status == ESP_OK; step++) {
        const espi_config *c = &model->config;
        const int64_t n = T * c->layers * c->top_k;
        for (int t = 0; t < T; t++) tokens[t] = (t * 7 + job->rank * 5 + step) % 50;
        const int64_t each = c->layers * c->top_k;
        for (int64_t i = 0; i < n; i++) {
            const bool last = i / each == cu[1] - 1 || i / each == cu[2] - 1; /* never fed back */
            routes[i] = last ? 255 : (unsigned char)((i + job->rank) % c->experts);
        }
        const esp_batch batch = ESP_BATCH(.tokens = tokens, .cu_seqlens = cu, .n_tokens = T, .n_seqs = 2, .step_tokens = 2 * T,
                                          .routed_experts = routes, .n_routed = n, .routed_bytes = 1, .last_follows = true);
        const fake_counts before = fake_counted(ctx);
        status = esp_model_forward(model, &batch, &hidden);
        if (status == ESP_OK) status = esp_model_cross_entropy(model, &batch, &hidden, &loss, &d_hidden);
        if (status == ESP_OK) status = esp_model_backward(model, &batch, &d_hidden);
        const fake_counts after = fake_counted(ctx);
        if (step == 1) job->wrong = after.gets + after.waits - before.gets - before.waits;
    }
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    return status;
}

/* Where all routes are replayed the host waits once a micro-batch: for the loss. */
Test(devices, one_wait_a_micro_batch) {
    rank_job jobs[2];
    setenv("ESP_NCCL", FAKE_NCCL, 1);
    ranks_run(jobs, 2, 2, replay, NULL);
    for (int r = 0; r < 2; r++) {
        cr_expect_eq(jobs[r].status, ESP_OK, "rank %d: %s", r, jobs[r].sentence);
        cr_expect_eq(jobs[r].wrong, 1, "rank %d: the host waits %lld times", r, (long long)jobs[r].wrong);
    }
}
