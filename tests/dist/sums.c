/* Gradients that ranks add up: the same bits as if one rank added every rank's part in order, however the work memory cuts them, for numbers of
 * values that ranks do not divide, and where some ranks of a group hold other experts, or none. */
#include "core/ctx.h"
#include "core/status.h"
#include "dist/share.h"

#include <criterion/criterion.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { SUMS = 90, MOST = 12, EACH = 7, LONGEST = 300 };

typedef struct setting {
    int ranks, spread;
    int64_t experts, values; /* of work memory; 0: as many as are best */
} setting;

typedef struct rank_sum {
    const setting *set;
    esp_comm *comm;
    int rank;
    esp_status status;
    int64_t wrong, calls;
} rank_sum;

static bool of_experts(int i) {
    return i % 3 == 1;
}

static int64_t length_of(int i) {
    return i % 5 == 0 ? 1 + i % 3 : 20 + i * 31 % (LONGEST - 20);
}

/* What rank r of group member m's experts, or of a shared tensor, adds; and what was there.  Sums of such values depend on their order. */
static float part_of(int i, int rank, int64_t expert, int64_t k) {
    const uint64_t x = (uint64_t)(i * 977 + rank * 131 + (expert + 1) * 31 + k) * 6364136223846793005u + 1442695040888963407u;
    return (float)((int32_t)(x >> 40) - (1 << 23)) * (x >> 33 & 1 ? 1e-7f : 3e-3f);
}

static esp_status fill(espi_sum *sum, const espi_share *s, int i) {
    const bool experts = of_experts(i);
    *sum = (espi_sum){.n = experts ? s->count * EACH : length_of(i), .each = EACH, .of_experts = experts};
    const int parts = experts ? s->spread : 1;
    float *total = malloc((size_t)(sum->n + 1) * sizeof *total), *partial = malloc((size_t)(sum->n * parts + 1) * sizeof *partial);
    sum->total = total;
    sum->partial = partial;
    if (!total || !partial) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a sum");
    for (int64_t k = 0; k < sum->n; k++) {
        const int64_t expert = experts ? s->first + k / EACH : -1, at = experts ? k % EACH : k;
        total[k] = part_of(i, 1000, expert, at);
        /* Of experts: what came from every rank of this group. */
        for (int m = 0; m < parts; m++) partial[m * sum->n + k] = part_of(i, experts ? espi_share_group(s) + m : s->rank, expert, at);
    }
    return ESP_OK;
}

static int64_t count_wrong(const espi_sum *sum, const espi_share *s, int i) {
    int64_t wrong = 0;
    for (int64_t k = 0; k < sum->n; k++) {
        const int64_t expert = sum->of_experts ? s->first + k / EACH : -1, at = sum->of_experts ? k % EACH : k;
        float want = part_of(i, 1000, expert, at);
        for (int r = 0; r < s->ranks; r++) want += part_of(i, r, expert, at);
        wrong += memcmp(&want, (const float *)sum->total + k, sizeof want) != 0;
    }
    return wrong;
}

static esp_status add(rank_sum *r, esp_ctx *ctx, espi_sum *sums) {
    espi_share s;
    ESPI_TRY(espi_share_make(&s, r->comm, r->set->experts, r->set->spread, 0));
    int n = 0;
    int64_t values = 0;
    for (int i = 0; i < SUMS; i++) {
        if (!espi_share_sums(&s, of_experts(i))) continue;
        ESPI_TRY(fill(&sums[i], &s, i));
        values += espi_share_sum_values(&s, sums[i].n, EACH, of_experts(i));
        n++;
    }
    espi_sum *some = calloc((size_t)n + 1, sizeof *some);
    values = r->set->values ? r->set->values : espi_share_sum_room(values);
    float *scratch = malloc((size_t)(values + 1) * sizeof *scratch);
    esp_status status = some && scratch ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %d sums", n);
    for (int i = 0, k = 0; i < SUMS && some; i++)
        if (sums[i].total) some[k++] = sums[i];
    const uint64_t before = espi_comm_calls(r->comm);
    if (status == ESP_OK) {
        scratch[values] = 42;
        status = espi_share_sum(ctx, &s, some, n, scratch, values);
        r->wrong += scratch[values] != 42;
    }
    r->calls = (int64_t)(espi_comm_calls(r->comm) - before);
    for (int i = 0; i < SUMS; i++)
        if (sums[i].total) r->wrong += count_wrong(&sums[i], &s, i);
    free(some);
    free(scratch);
    return status;
}

static void *run(void *user) {
    rank_sum *r = user;
    esp_ctx *ctx;
    espi_sum sums[SUMS] = {{.total = NULL}};
    r->status = esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.comm = r->comm, .backend = "ref", .threads = 1));
    if (r->status == ESP_OK) {
        r->status = add(r, ctx, sums);
        esp_ctx_destroy(ctx);
    }
    for (int i = 0; i < SUMS; i++) {
        free(sums[i].total);
        free(sums[i].partial);
    }
    esp_comm_destroy(r->comm);
    return NULL;
}

/* Exchanges that were made. */
static int64_t expect_right(setting set) {
    rank_sum ranks[MOST];
    pthread_t threads[MOST];
    esp_comm *comms[MOST];
    cr_assert_eq(espi_comm_simulate(comms, set.ranks), ESP_OK);
    for (int r = 0; r < set.ranks; r++) {
        ranks[r] = (rank_sum){.set = &set, .comm = comms[r], .rank = r};
        cr_assert_eq(pthread_create(&threads[r], NULL, run, &ranks[r]), 0);
    }
    for (int r = 0; r < set.ranks; r++) pthread_join(threads[r], NULL);
    for (int r = 0; r < set.ranks; r++) {
        cr_expect_eq(ranks[r].status, ESP_OK, "%d ranks, spread %d: rank %d: %d", set.ranks, set.spread, r, ranks[r].status);
        cr_expect_eq(ranks[r].wrong, 0, "%d ranks, spread %d, %lld values of memory: rank %d: %lld wrong", set.ranks, set.spread,
                     (long long)set.values, r, (long long)ranks[r].wrong);
    }
    return ranks[0].calls;
}

Test(sums, in_rank_order, .timeout = 60) {
    static const struct {
        int ranks, spread;
        int64_t experts;
    } jobs[] = {{2, 1, 3}, {2, 2, 3}, {3, 1, 2}, {4, 2, 5}, {6, 3, 8}, {6, 2, 1}, {12, 4, 6}, {12, 3, 2}, {5, 5, 3}};
    for (size_t i = 0; i < sizeof jobs / sizeof *jobs; i++)
        for (int64_t memory = 0; memory < 4; memory++)
            expect_right((setting){jobs[i].ranks, jobs[i].spread, jobs[i].experts,
                                   (const int64_t[]){0, jobs[i].ranks, 3 * jobs[i].ranks + 1, 1000}[memory]});
}

/* Small gradients go together, two exchanges for all of them. */
Test(sums, together) {
    const int64_t calls = expect_right((setting){.ranks = 4, .spread = 2, .experts = 5});
    cr_expect_eq(calls, 2 * ((SUMS + ESPI_SUMS_TOGETHER - 1) / ESPI_SUMS_TOGETHER), "%lld exchanges", (long long)calls);
}
