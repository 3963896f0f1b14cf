/* Between whoever writes completions and the trainer: one batch of rollouts, and the source it comes from (our sampler, a server, a file).
 *
 * A batch is ragged: tokens of row i, prompt and completion, are offsets[i] .. offsets[i+1]-1, and every token-aligned array has the same
 * index.  Rows of a group are neighbours, group_size of them; a source gives whole groups or none. */
#ifndef ESPI_RL_ROLLOUT_H
#define ESPI_RL_ROLLOUT_H

#include "espalier/model.h"
#include "io/checkpoint.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum espi_finish { ESPI_FINISH_STOP = 0, ESPI_FINISH_LENGTH = 1, ESPI_FINISH_ABORTED = 2 } espi_finish;

/* An expert id of all ones says: route this token natively in this layer. */
#define ESPI_ROUTE_NATIVE_U8 0xFFu
#define ESPI_ROUTE_NATIVE_U16 0xFFFFu

/* How large a batch is; 0 where it has no such part. */
typedef struct espi_rollouts_shape {
    int64_t rows, group_size, tokens;
    int64_t rewards;                    /* functions that scored it */
    int64_t layers, top_k, route_bytes; /* routed experts; route_bytes: 1 or 2 */
    int64_t kept;                       /* ids kept by top-k, top-p, min-p, over all tokens */
    int64_t filtered;                   /* 1 = kept ids are recorded (kept may then still be 0) */
} espi_rollouts_shape;
#define ESPI_ROLLOUTS_SHAPE ((int64_t)(sizeof(espi_rollouts_shape) / sizeof(int64_t)))

typedef struct espi_rollouts {
    espi_rollouts_shape shape;
    /* What a source fills in. */
    int64_t *offsets;       /* [rows+1] */
    int32_t *n_prompt;      /* [rows] */
    int32_t *tokens;        /* [tokens] */
    uint8_t *loss_mask;     /* [tokens] 1 = the loss counts it; 0 on prompts */
    float *sampler_logprob; /* [tokens] under the distribution that was sampled from; NaN = absent; 0 on prompts */
    uint8_t *finish;        /* [rows] espi_finish */
    int64_t *group;         /* [rows] the request's group_ids, or the file's */
    int64_t *version;       /* [rows] of the adapter that wrote it, the oldest where several did */
    uint8_t *routes; /* [tokens, layers, top_k] of route_bytes each, or NULL; all ones at each row's last token, which was never fed back */
    int64_t *kept_offsets; /* [tokens+1], or NULL: nothing was filtered.  An empty range: the whole vocabulary */
    int32_t *kept_ids;     /* [kept] ascending within a token */
    double *rewards;       /* [rows, shape.rewards] NaN = not scorable */
    double *advantage;     /* [rows] */
    /* The trainer's own. */
    double *reward, *exact; /* [rows] */
    float *old_logprob;     /* [tokens] of the policy before the first update on this batch */
    float *ref_logprob;     /* [tokens] */
    float *is_ratio;        /* [tokens] rollout correction */
    /* Which of them are there: rewards and advantages from the source (nothing is then scored again), the others from the trainer. */
    uint8_t has_rewards, has_advantages, has_old, has_ref, has_ratio;
} espi_rollouts;
#define ESPI_ROLLOUTS_FLAGS 5

/* Takes all arrays, zeroed (routes: all ones).  ESP_ERR_MEMORY leaves it empty. */
esp_status espi_rollouts_create(espi_rollouts *r, const espi_rollouts_shape *shape);
void espi_rollouts_free(espi_rollouts *r); /* an empty one is allowed */

/* Adds the rows of `from`; an empty `r` becomes a copy.  ESP_ERR_MISMATCH when only one has routes, kept ids, or other rewards. */
esp_status espi_rollouts_append(espi_rollouts *r, const espi_rollouts *from);
/* `from` with columns for other rewards (shape: its own but for `rewards`), which are 0; `from` is freed. */
esp_status espi_rollouts_widen(espi_rollouts *r, espi_rollouts *from, const espi_rollouts_shape *shape);
/* Becomes the given groups of itself (numbers of groups, not ids), in that order. */
esp_status espi_rollouts_select(espi_rollouts *r, const int64_t *groups, int64_t n_groups);

/* Becomes what all ranks have, one after the other: what a source gave each of them, not the trainer's own columns.  Collective. */
esp_status espi_rollouts_gather(espi_rollouts *r, const esp_model *model);

/* ESP_ERR_FORMAT, naming the row: offsets that do not ascend, an empty prompt or completion, an id at or beyond vocab, a mask on a prompt,
 * an expert at or beyond `experts` that is not all ones, a kept list that lacks its token. */
esp_status espi_rollouts_check(const espi_rollouts *r, int64_t vocab, int64_t experts);

/* For a checkpoint: arrays[0 .. *n-1] point into r.  ESPI_ROLLOUT_ARRAYS are enough. */
#define ESPI_ROLLOUT_ARRAYS 24
void espi_rollouts_arrays(espi_saved_array *arrays, size_t *n, espi_rollouts *r);
/* Takes and reads what espi_rollouts_arrays gave. */
esp_status espi_rollouts_read(espi_rollouts *r, const espi_checkpoint *checkpoint);

/* What the trainer asks for.  Row p*samples + g of the answer is sample g of prompt p. */
typedef struct espi_rollout_request {
    const int32_t *prompts;    /* packed ids */
    const int32_t *cu_prompts; /* [n_prompts+1] */
    const int64_t *group_ids;  /* [n_prompts] */
    const uint32_t *keys;      /* [n_prompts] no other prompt of the run has the same */
    int32_t n_prompts, samples, max_new_tokens;
    float temperature;
    int32_t top_k;      /* 0 = all */
    float top_p, min_p; /* 1, 0 = all */
    uint64_t seed;
    uint32_t step;
    int64_t position; /* groups that this run asked for before: where a file goes on */
    int64_t version;  /* of the adapter as it is now */
    bool routes;      /* record routed experts; a source that cannot fails with ESP_ERR_UNSUPPORTED */
    double
        deadline; /* espi_seconds() at which it must have returned; 0 = none.  Passed: ESP_ERR_COMM, naming what was awaited, or the groups that are there */
} espi_rollout_request;

/* Where rollouts come from. */
typedef struct espi_rollout_source {
    const char *name; /* "sampler", "file", "server" */
    void *self;
    bool own_prompts; /* a file: prompts, completions and rewards are its own; of a request only n_prompts and samples count */
    bool routes;      /* it can record routed experts */
    bool exact;       /* its log-probabilities are the trainer's to the bit, so they may stand for the old policy's */
    /* r [out]: an empty batch, filled in with at most n_prompts groups; fewer only when groups were lost (the trainer counts them) */
    esp_status (*generate)(void *self, espi_rollouts *r, const espi_rollout_request *request);
    /* The adapter changed: `version` counts its updates.  NULL: nothing to do. */
    esp_status (*publish)(void *self, int64_t version);
    void (*close)(void *self);
} espi_rollout_source;

#endif
