/* What all ranks are going to take, against what is left where they are: before they take it, for the operating system says nothing when
 * it is too much, but kills one of them. */
#define _DEFAULT_SOURCE /* gethostname */
#include "dist/room.h"

#include "dist/comm.h"
#include "espalier/plan.h"
#include "io/machine.h"
#include "kernels/backend.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

enum { HOST_NAME = 63 };

static const char advice[] =
    "lower micro_batch_tokens or decode_rows, set activation_budget or eight_bit, take more hosts or let more ranks "
    "share the experts (expert_ranks)";

/* What is taken where `mine` is, by all ranks, against what this one saw is left there: they looked at different times, and the one that saw
 * least speaks for all.  all [n] */
static esp_status judge(const esp_ctx *ctx, const espi_demand *mine, const espi_demand *all, int n) {
    const espi_memory_place *place = &mine->place;
    uint64_t sum = 0;
    int sharing = 0;
    if (mine->bytes == 0) return ESP_OK;
    for (int i = 0; i < n; i++) {
        if (all[i].place.number != place->number || all[i].bytes == 0) continue;
        sharing++;
        sum = sum > UINT64_MAX - all[i].bytes ? UINT64_MAX : sum + all[i].bytes;
    }
    char left[320] = "of which nothing says how much is left";
    if (place->left < UINT64_MAX)
        snprintf(left, sizeof left, "of which %llu bytes are left (%s)", (unsigned long long)place->left, place->source);
    espi_log(ctx, ESP_LOG_INFO, "memory: rank %d takes up to %llu bytes, the %d of %d ranks that share that of %s together %llu, %s",
             esp_comm_rank(ctx->comm), (unsigned long long)mine->bytes, sharing, n / ESPI_ROOMS, place->name, (unsigned long long)sum,
             left);
    if (sum <= place->left) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_MEMORY,
                     "a run takes up to %llu bytes here, all %d ranks that share the memory of %s together %llu, expected at most the %llu "
                     "that are left (%s): %s",
                     (unsigned long long)mine->bytes, sharing, place->name, (unsigned long long)sum, (unsigned long long)place->left,
                     place->source, advice);
}

static esp_status judge_all(const esp_ctx *ctx, const espi_demand *mine, const espi_demand *all, int n) {
    const uint64_t tensors = mine[ESPI_ROOM_TENSORS].bytes;
    if (ctx->memory_limit && tensors > ctx->memory_limit)
        return ESPI_FAIL(ESP_ERR_MEMORY, "a run takes up to %llu bytes, expected at most esp_ctx_config.memory_limit, %zu: raise it, %s",
                         (unsigned long long)tensors, ctx->memory_limit, advice);
    for (int i = 0; i < ESPI_ROOMS; i++) ESPI_TRY(judge(ctx, &mine[i], all, n));
    return ESP_OK;
}

esp_status espi_room_check(esp_ctx *ctx, const espi_demand demands[ESPI_ROOMS]) {
    const int ranks = esp_comm_size(ctx->comm);
    const espi_place at = {"the memory that is left", -1};
    espi_demand *all = calloc((size_t)ranks * ESPI_ROOMS, sizeof *all);
    if (!all) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the plans of %d ranks", ranks);
    esp_status status = espi_comm_gather(ctx->comm, at, all, demands, ESPI_ROOMS * sizeof *all);
    if (status == ESP_OK) status = espi_comm_agree(ctx->comm, at, judge_all(ctx, demands, all, ranks * ESPI_ROOMS));
    free(all);
    return status;
}

static void find_host(espi_memory_place *place) {
    espi_memory_left left;
    espi_memory_left_read(&left, "");
    *place = (espi_memory_place){.number = espi_comm_host(), .left = left.bytes};
    if (gethostname(place->name, HOST_NAME) != 0) snprintf(place->name, sizeof place->name, "this host");
    snprintf(place->source, sizeof place->source, "%.*s", (int)sizeof place->source - 1, left.source);
}

static esp_status find_device(espi_memory_place *place, const esp_ctx *ctx, const espi_memory_place *host) {
    uint64_t number = 0;
    *place = (espi_memory_place){.left = UINT64_MAX, .source = "free on its GPU"};
    snprintf(place->name, sizeof place->name, "a GPU of %.*s", HOST_NAME, host->name);
    if (ctx->device_ops->left) ESPI_TRY(ctx->device_ops->left(ctx->device, &place->left, &number));
    place->number = host->number + 1 + number;
    return ESP_OK;
}

esp_status esp_plan_check(esp_ctx *ctx, size_t peak, size_t host) {
    if (!ctx) return ESPI_FAIL(ESP_ERR_ARG, "esp_plan_check: ctx is NULL, expected one");
    espi_demand demands[ESPI_ROOMS] = {[ESPI_ROOM_TENSORS] = {.bytes = peak}, [ESPI_ROOM_HOST] = {.bytes = ctx->device ? host : 0}};
    espi_memory_place *here = &demands[ESPI_ROOM_HOST].place, *tensors = &demands[ESPI_ROOM_TENSORS].place;
    esp_status status = ESP_OK;
    find_host(here);
    if (ctx->device)
        status = find_device(tensors, ctx, here);
    else
        *tensors = *here;
    ESPI_TRY(esp_comm_agree(ctx->comm, "the memory that is left", status));
    return espi_room_check(ctx, demands);
}
