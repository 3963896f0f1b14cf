/* Batches of texts for tests of rewards. */
#ifndef TESTS_SUPPORT_REWARDS_H
#define TESTS_SUPPORT_REWARDS_H

#include "rl/reward.h"
#include "scratch.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { MOST = 64 };

/* A batch of texts.  Ids are the characters of the completion. */
typedef struct texts {
    esp_reward_batch batch;
    const char *prompt[MOST], *completion[MOST], *answer[MOST];
    int32_t ids[MOST][256];
    const int32_t *id_rows[MOST];
    int32_t length[MOST];
    uint8_t stopped[MOST];
} texts;

static inline void add(texts *t, const char *completion, const char *answer) {
    const int64_t i = t->batch.n++;
    t->prompt[i] = "say:";
    t->completion[i] = completion;
    t->answer[i] = answer;
    t->length[i] = (int32_t)strlen(completion);
    for (int32_t k = 0; k < t->length[i] && k < 256; k++) t->ids[i][k] = (unsigned char)completion[k];
    t->id_rows[i] = t->ids[i];
    t->stopped[i] = 1;
    t->batch.struct_size = sizeof t->batch;
    t->batch.group_size = 1;
    t->batch.step = 7;
    t->batch.prompt = t->prompt;
    t->batch.completion = t->completion;
    t->batch.answer = t->answer;
    t->batch.completion_ids = t->id_rows;
    t->batch.completion_length = t->length;
    t->batch.stopped = t->stopped;
}

/* The value of an extra scalar; NaN = not there. */
static inline double extra(const espi_rewards *set, const char *name) {
    for (int64_t i = 0; i < espi_rewards_extra_count(set); i++) {
        double value;
        if (strcmp(espi_rewards_extra_get(&value, set, i), name) == 0) return value;
    }
    return NAN;
}

#endif
