/* Scoring a batch by several rewards, and what the kinds of rewards share.
 *   reward.c          the set: deadline, threads, extra scalars; exact and match
 *   reward_open.c     a description -> a reward; shared objects
 *   reward_builtin.c  regex, number, json, length, repetition, overlong
 *   reward_command.c  child processes */
#ifndef ESPI_RL_REWARD_H
#define ESPI_RL_REWARD_H

#include "core/status.h"
#include "espalier/model.h"
#include "espalier/reward.h"

#define ESPI_REWARD_NAME 64 /* bytes of a reward's name, NUL included; also of an extra scalar's */

typedef struct espi_rewards espi_rewards;

/* Copies the list; what the entries point to must outlive it.  deadline: seconds for all rewards of one batch together, 0 = none.
 * ESP_ERR_ARG: a name or function that is NULL, a weight that is not finite, two rewards of one name. */
esp_status espi_rewards_create(espi_rewards **rewards, const esp_reward *list, int32_t n, double deadline);
/* From now on functions of this library ask `stop` while they wait, and fail when it says so. */
void espi_rewards_stop_by(espi_rewards *rewards, int (*stop)(void *user), void *user);
/* A function that overran its deadline and still runs keeps its own copy of the batch. */
void espi_rewards_destroy(espi_rewards *rewards);

/* parts [out] [batch->n, n]: what each function gave, NaN = abstained.  batch: without the fields that only a function sees.
 * ESP_ERR_CALLBACK: a function failed; ESP_ERR_NONFINITE: it gave an infinite number. */
esp_status espi_rewards_score(double *parts, espi_rewards *rewards, const esp_reward_batch *batch);

/* Extra scalars of all batches since the last reset: "<reward>/<name>" and its mean, or its sum for what is counted. */
void espi_rewards_reset(espi_rewards *rewards);
/* Those of all ranks together, in their order.  Collective. */
esp_status espi_rewards_gather(espi_rewards *rewards, const esp_model *model);
int64_t espi_rewards_extra_count(const espi_rewards *rewards);
const char *espi_rewards_extra_get(double *value, const espi_rewards *rewards, int64_t i);

/* An event, counted in the extra scalar `name`; for functions of this library. */
void espi_reward_count(const esp_reward_batch *batch, const char *name, double events);

/* The run was asked to stop; for functions of this library that are punctual, so on the caller's thread. */
bool espi_reward_stopped(const esp_reward_batch *batch);

/* A description that was taken apart.  Strings point into `text`. */
typedef struct espi_reward_description {
    char *text;                  /* owned */
    const char *kind, *argument; /* argument NULL: none */
    char *parameters;            /* as written, without name=; "" = none */
    char name[ESPI_REWARD_NAME];
    double weight;
} espi_reward_description;

/* A number among the parameters; *value holds the default before, and what was written afterwards. */
typedef struct espi_reward_number {
    const char *key;
    double *value;
    double low, high;
    bool whole;
} espi_reward_number;

/* ESP_ERR_ARG on a key that is not in the list, a value that is no number or out of its range. */
esp_status espi_reward_numbers(const espi_reward_description *d, const espi_reward_number *numbers, int n);

/* What every opened reward's user data starts with. */
typedef struct espi_reward_head {
    char name[ESPI_REWARD_NAME];
} espi_reward_head;

/* Takes `bytes` zeroed for the user data, whose head gets the name; close is free() until the kind says otherwise. */
esp_status espi_reward_take(esp_reward *reward, const espi_reward_description *d, size_t bytes, esp_reward_fn fn);

esp_status espi_reward_open_regex(esp_reward *reward, const espi_reward_description *d);
esp_status espi_reward_open_number(esp_reward *reward, const espi_reward_description *d);
esp_status espi_reward_open_json(esp_reward *reward, const espi_reward_description *d);
esp_status espi_reward_open_length(esp_reward *reward, const espi_reward_description *d);
esp_status espi_reward_open_repetition(esp_reward *reward, const espi_reward_description *d);
esp_status espi_reward_open_overlong(esp_reward *reward, const espi_reward_description *d);
esp_status espi_reward_open_command(esp_reward *reward, const espi_reward_description *d);

/* How far a completion is into the last `buffer` of `max` tokens: 0 before them, 1 at max and beyond. */
double espi_overlong(int32_t length, double max, double buffer);

#endif
