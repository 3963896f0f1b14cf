/* One training step of a model on a rank, wherever its memory is, and what came of it as digests: the same for every number of ranks. */
#ifndef ESP_TEST_RANK_STEP_H
#define ESP_TEST_RANK_STEP_H

#include "espalier/espalier.h"

#include <stdint.h>

typedef struct rank_setting {
    const char *dir; /* the model's folder */
    int spread;
    int64_t rows;        /* budget, 0 = default */
    int batches, tokens; /* micro-batches in the step, and of how many tokens the largest is */
    bool router;
    int steps;
} rank_setting;

typedef struct rank_digest {
    uint64_t hidden, loss, experts, others, norm, weights; /* of the last step; experts, others: gradients */
    double value_of_norm, seconds;                         /* seconds: of the last step */
} rank_digest;

/* Collective over the context's ranks; the same digest on all of them. */
esp_status rank_step(rank_digest *out, esp_ctx *ctx, const rank_setting *setting);

/* "hidden 0123.. loss .. experts .. others .. norm .. weights ..", without what is measured. */
#define RANK_TEXT 256
void rank_text(char text[RANK_TEXT], const rank_digest *digest);

#endif
