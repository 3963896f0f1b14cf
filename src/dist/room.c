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

typedef struct word {
    espi_memory_place place;
    uint64_t peak;
} word;

static const char advice[] =
    "lower micro_batch_tokens or decode_rows, set activation_budget or eight_bit, take more hosts or let more ranks "
    "share the experts (expert_ranks)";

/* What the ranks that share this one's memory take together, against what this one saw is left: they looked at different times, and the one
 * that saw least speaks for all. */
static esp_status judge(const esp_ctx *ctx, const word *all, int rank, int ranks) {
    const word *mine = &all[rank];
    const espi_memory_place *place = &mine->place;
    uint64_t sum = 0;
    int sharing = 0;
    for (int r = 0; r < ranks; r++) {
        if (all[r].place.number != place->number) continue;
        sharing++;
        sum = sum > UINT64_MAX - all[r].peak ? UINT64_MAX : sum + all[r].peak;
    }
    char left[320] = "of which nothing says how much is left";
    if (place->left < UINT64_MAX)
        snprintf(left, sizeof left, "of which %llu bytes are left (%s)", (unsigned long long)place->left, place->source);
    espi_log(ctx, ESP_LOG_INFO, "memory: rank %d takes up to %llu bytes, the %d of %d ranks that share that of %s together %llu, %s", rank,
             (unsigned long long)mine->peak, sharing, ranks, place->name, (unsigned long long)sum, left);
    if (ctx->memory_limit && mine->peak > ctx->memory_limit)
        return ESPI_FAIL(ESP_ERR_MEMORY, "a run takes up to %llu bytes, expected at most esp_ctx_config.memory_limit, %zu: raise it, %s",
                         (unsigned long long)mine->peak, ctx->memory_limit, advice);
    if (sum <= place->left) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_MEMORY,
                     "a run takes up to %llu bytes here, all %d ranks that share the memory of %s together %llu, expected at most the %llu "
                     "that are left (%s): %s",
                     (unsigned long long)mine->peak, sharing, place->name, (unsigned long long)sum, (unsigned long long)place->left,
                     place->source, advice);
}

esp_status espi_room_check(esp_ctx *ctx, size_t peak, const espi_memory_place *place) {
    const int ranks = esp_comm_size(ctx->comm);
    const espi_place at = {"the memory that is left", -1};
    const word mine = {.place = *place, .peak = peak};
    word *all = calloc((size_t)ranks, sizeof *all);
    if (!all) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the plans of %d ranks", ranks);
    esp_status status = espi_comm_gather(ctx->comm, at, all, &mine, sizeof mine);
    if (status == ESP_OK) status = espi_comm_agree(ctx->comm, at, judge(ctx, all, esp_comm_rank(ctx->comm), ranks));
    free(all);
    return status;
}

/* On a device its own memory is what runs out. */
static esp_status find_place(espi_memory_place *place, const esp_ctx *ctx) {
    *place = (espi_memory_place){.left = UINT64_MAX};
    if (gethostname(place->name, sizeof place->name - 1) != 0) snprintf(place->name, sizeof place->name, "this host");
    place->number = espi_comm_host();
    if (ctx->device) {
        uint64_t number;
        if (!ctx->device_ops->left) return ESP_OK;
        ESPI_TRY(ctx->device_ops->left(ctx->device, &place->left, &number));
        place->number += 1 + number;
        snprintf(place->source, sizeof place->source, "free on its GPU");
        return ESP_OK;
    }
    espi_memory_left left;
    espi_memory_left_read(&left, "");
    place->left = left.bytes;
    snprintf(place->source, sizeof place->source, "%.*s", (int)sizeof place->source - 1, left.source);
    return ESP_OK;
}

esp_status esp_plan_check(esp_ctx *ctx, size_t peak) {
    if (!ctx) return ESPI_FAIL(ESP_ERR_ARG, "esp_plan_check: ctx is NULL, expected one");
    espi_memory_place place;
    ESPI_TRY(espi_comm_agree(ctx->comm, (espi_place){"the memory that is left", -1}, find_place(&place, ctx)));
    return espi_room_check(ctx, peak, &place);
}
