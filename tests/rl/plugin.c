/* A reward as a shared object: `factor` times the length.  VARIANT makes the ones that must be refused. */
#include "espalier/reward.h"

#include <stdlib.h>
#include <string.h>

static int begin(void **user, const char *parameters) {
    static const char key[] = "factor=";
    int *factor = malloc(sizeof *factor);
    char *end = NULL;
    if (!factor) return 2;
    *factor = 2;
    if (strncmp(parameters, key, sizeof key - 1) == 0) *factor = (int)strtol(parameters + sizeof key - 1, &end, 10);
    if (end && (*end || end == parameters + sizeof key - 1)) {
        free(factor);
        return 3;
    }
    *user = factor;
    return 0;
}

static int score(void *user, const esp_reward_batch *batch, float *reward) {
    for (int64_t i = 0; i < batch->n; i++) reward[i] = (float)(*(int *)user * batch->completion_length[i]);
    esp_reward_log(batch, "rows", (double)batch->n);
    return 0;
}

#define GOOD 0
#define OTHER 1 /* another ABI */
#define SHORT 2 /* another struct */
#define NAMELESS 3

#if VARIANT == NAMELESS
#define NAME somebody_else
#else
#define NAME esp_reward_plugin_v1
#endif

extern const esp_reward_plugin NAME;
const esp_reward_plugin NAME = {.abi = VARIANT == OTHER ? 99 : ESP_REWARD_ABI,
                                .struct_size = VARIANT == SHORT ? 4 : sizeof(esp_reward_plugin),
                                .begin = begin,
                                .score = score,
                                .end = free};
