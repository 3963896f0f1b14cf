/* Several ranks run one trainer: all of them decide the same from the same state, and each does a share of the work.  What they have to
 * tell each other so that this stays true goes through here; alone, nothing is sent.  Every call is collective. */
#ifndef ESPI_RL_RANKS_H
#define ESPI_RL_RANKS_H

#include "core/status.h"
#include "espalier/model.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Which rank this is, and of how many. */
int espi_ranks_own(const esp_model *model);
int espi_ranks_count(const esp_model *model);
/* The one that writes what there is one of. */
static inline bool espi_ranks_first(const esp_model *model) {
    return espi_ranks_own(model) == 0;
}

/* The step that messages about failures name. */
void espi_ranks_step(const esp_model *model, int64_t step);

/* borders [ranks+1]: n things in blocks, one a rank, in the order of the ranks; rank r has borders[r] .. borders[r+1]-1.  Sends nothing. */
void espi_ranks_deal(int64_t *borders, const esp_model *model, int64_t n);

/* data: of its elements of `size` bytes rank r has made those from borders[r] to borders[r+1]; afterwards every rank has all of them. */
esp_status espi_ranks_share(void *data, const esp_model *model, const char *what, const int64_t *borders, size_t size);
/* all [ranks] of `bytes` each, in the order of the ranks. */
esp_status espi_ranks_gather(void *all, const esp_model *model, const char *what, const void *mine, size_t bytes);
/* What the first rank has becomes everybody's. */
esp_status espi_ranks_follow(void *data, const esp_model *model, const char *what, size_t bytes);

/* ESP_OK where all say so; otherwise one rank's failure, with its sentence, is everybody's. */
esp_status espi_ranks_agree(const esp_model *model, const char *what, esp_status mine);
/* *any: whether one of them says so. */
esp_status espi_ranks_any(bool *any, const esp_model *model, const char *what, bool mine);
/* ESP_ERR_MISMATCH, naming the key, where the value is not everybody's. */
esp_status espi_ranks_same(const esp_model *model, const char *key, const void *value, size_t bytes);

#endif
