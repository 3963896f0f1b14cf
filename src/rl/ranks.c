/* What the ranks of a trainer tell each other: see ranks.h. */
#include "rl/ranks.h"

#include "models/model.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SENTENCE 512
#define NO_LAYER (-1)

int espi_ranks_own(const esp_model *model) {
    return model->share.rank;
}

int espi_ranks_count(const esp_model *model) {
    return model->share.ranks > 1 ? model->share.ranks : 1;
}

static bool alone(const esp_model *model) {
    return espi_ranks_count(model) == 1;
}

void espi_ranks_step(const esp_model *model, int64_t step) {
    esp_comm_step(model->share.comm, step);
}

void espi_ranks_deal(int64_t *borders, const esp_model *model, int64_t n) {
    const int ranks = espi_ranks_count(model);
    for (int r = 0; r <= ranks; r++) borders[r] = n * r / ranks;
}

esp_status espi_ranks_gather(void *all, const esp_model *model, const char *what, const void *mine, size_t bytes) {
    return espi_comm_gather(model->share.comm, (espi_place){what, NO_LAYER}, all, mine, bytes);
}

/* Messages of one size, that of the largest block. */
static esp_status share_blocks(char *data, const esp_model *model, const char *what, const int64_t *borders, size_t size, char *room,
                               size_t most) {
    const int ranks = espi_ranks_count(model), own = espi_ranks_own(model);
    char *all = room + most;
    memset(room, 0, most);
    memcpy(room, data + (size_t)borders[own] * size, (size_t)(borders[own + 1] - borders[own]) * size);
    ESPI_TRY(espi_ranks_gather(all, model, what, room, most));
    for (int r = 0; r < ranks; r++)
        memcpy(data + (size_t)borders[r] * size, all + (size_t)r * most, (size_t)(borders[r + 1] - borders[r]) * size);
    return ESP_OK;
}

esp_status espi_ranks_share(void *data, const esp_model *model, const char *what, const int64_t *borders, size_t size) {
    const int ranks = espi_ranks_count(model);
    size_t most = 0;
    for (int r = 0; r < ranks; r++) {
        const size_t bytes = (size_t)(borders[r + 1] - borders[r]) * size;
        if (bytes > most) most = bytes;
    }
    if (ranks == 1 || most == 0) return ESP_OK;
    char *room = malloc((size_t)(ranks + 1) * most);
    if (!room) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %zu bytes of each of %d ranks", what, most, ranks);
    const esp_status status = share_blocks(data, model, what, borders, size, room, most);
    free(room);
    return status;
}

esp_status espi_ranks_follow(void *data, const esp_model *model, const char *what, size_t bytes) {
    const int ranks = espi_ranks_count(model);
    if (ranks == 1) return ESP_OK;
    char *all = malloc((size_t)ranks * bytes);
    if (!all) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %zu bytes of each of %d ranks", what, bytes, ranks);
    const esp_status status = espi_ranks_gather(all, model, what, data, bytes);
    if (status == ESP_OK) memcpy(data, all, bytes);
    free(all);
    return status;
}

esp_status espi_ranks_agree(const esp_model *model, const char *what, esp_status mine) {
    char own[SENTENCE] = "";
    if (alone(model)) return mine;
    if (mine != ESP_OK) snprintf(own, sizeof own, "%s", esp_last_error());
    const esp_status agreed = espi_comm_agree(model->share.comm, (espi_place){what, NO_LAYER}, mine);
    /* Why this rank failed says more than that nobody could be told. */
    return mine != ESP_OK && agreed != mine ? ESPI_FAIL(mine, "%s", own) : agreed;
}

esp_status espi_ranks_any(bool *any, const esp_model *model, const char *what, bool mine) {
    const int ranks = espi_ranks_count(model);
    *any = mine;
    if (ranks == 1) return ESP_OK;
    bool *all = calloc((size_t)ranks, sizeof *all);
    if (!all) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the answers of %d ranks", what, ranks);
    const esp_status status = espi_ranks_gather(all, model, what, &mine, sizeof mine);
    for (int r = 0; r < ranks && status == ESP_OK; r++) *any = *any || all[r];
    free(all);
    return status;
}

esp_status espi_ranks_same(const esp_model *model, const char *key, const void *value, size_t bytes) {
    return esp_comm_same(model->share.comm, key, value, bytes);
}
