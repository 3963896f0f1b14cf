/* What the files of the trainer share: its state, and the parts of a step.
 *   trainer.c          create, step, evaluate
 *   trainer_rollout.c  prompts -> completions -> rewards -> advantages
 *   trainer_update.c   sequences -> micro-batches -> gradients -> one optimiser step
 *   trainer_state.c    what a checkpoint holds
 *   trainer_log.c      metrics.jsonl, completions.jsonl */
#ifndef ESPI_RL_RUN_H
#define ESPI_RL_RUN_H

#include "espalier/trainer.h"
#include "io/file.h"
#include "rl/objective.h"
#include "rl/tasks.h"

/* One sequence of an optimiser step. */
typedef struct espi_sequence {
    const int32_t *prompt, *completion;
    int32_t n_prompt, n_completion;
    const uint8_t *mask;          /* [n_completion] 0 = no part of the loss; NULL = all are */
    int32_t n_counted;            /* how many are */
    const float *sampler_logprob; /* [n_completion], or NULL: SFT */
    float *ref_logprob;           /* [n_completion] */
    double advantage;
    bool skip; /* its gradient is exactly zero */
} espi_sequence;

/* Completions of one step, and what became of them.  It outlives the step: mu updates, and a checkpoint in between. */
typedef struct espi_rollout {
    int64_t n;        /* rows = prompts_per_step * group_size */
    int64_t *line;    /* [prompts_per_step] of the task file */
    int32_t *tokens;  /* [n, max_new_tokens] */
    float *logprobs;  /* [n, max_new_tokens] */
    float *ref;       /* the same, of the adapter-off model */
    int32_t *lengths; /* [n] */
    uint8_t *stopped; /* [n] */
    char **text;      /* [n] */
    double *parts;    /* [n, n_rewards] what each function gave */
    double *reward;   /* [n] weighted sum */
    double *advantage;
    double *exact; /* [n] 0 or 1 */
    bool has_ref;
} espi_rollout;

/* Sums over the updates of a step, until its line is written. */
typedef struct espi_step_sums {
    double loss, policy_loss, kl, entropy, ratio, clip_low, clip_high, abs_g, diff_mean, diff_max; /* per-token ones: times tokens */
    double tokens, tokens_skipped, grad_norm, lr;
    double seconds_sample, seconds_reward, seconds_train;
} espi_step_sums;
#define ESPI_STEP_SUMS ((int64_t)(sizeof(espi_step_sums) / sizeof(double)))

/* Arrays of one micro-batch, token-aligned. */
typedef struct espi_packed {
    int64_t capacity;
    int32_t *tokens, *cu;
    uint8_t *mask;
    float *advantage, *ref, *sampler;
} espi_packed;

struct esp_trainer {
    esp_model *model;
    const esp_tokenizer *tokenizer;
    esp_trainer_config c; /* defaults filled in; its strings are not kept */
    char *out_dir;        /* NULL: nothing is written */
    esp_reward *rewards;  /* [c.n_rewards], names owned */
    double *weights;
    espi_tasks train, eval;
    esp_model_info info;
    uint64_t weights_hash; /* XXH3 of the frozen weights as they lie in memory: a checkpoint belongs to one base */
    esp_optim *optim;
    esp_sampler *sampler; /* NULL: SFT without evaluation */

    int64_t rows, longest; /* sequences of a step; tokens of the longest */
    int64_t step;          /* completed */
    int64_t cursor;        /* lines taken from the training file */
    int64_t num_tokens;    /* seen so far */
    int64_t updates_done;  /* of the pending rollout */
    bool pending;          /* sampled, not yet updated on all updates_per_batch times */
    int64_t *order;        /* permutation of the training lines of epoch order_epoch */
    int64_t order_epoch;
    espi_rollout rollout;
    espi_sequence *sequences; /* [rows] */
    espi_packed packed;
    espi_step_sums sums;

    int64_t eval_step; /* of the cached result, -1 = none */
    double eval_sampled, eval_greedy;
    espi_log_file *metrics, *completions;
    size_t planned;
};

double espi_seconds(void);

/* The next line of the training file, in the order of its epoch; *key: a number no other draw of the run has. */
esp_status espi_next_line(esp_trainer *t, int64_t *line, uint32_t *key);

/* `count` zeroed values; *out: address of a pointer; free() it. */
esp_status espi_take_array(void *out, int64_t count, size_t size);

/* trainer_rollout.c */
esp_status espi_rollout_create(esp_trainer *t);
void espi_rollout_free(esp_trainer *t);
esp_status espi_rollout_make(esp_trainer *t);
/* sequences[] from a rollout that is there (made, or restored). */
void espi_rollout_sequences(esp_trainer *t);
/* Text of a completion without its end token; free() it. */
esp_status espi_completion_text(char **text, const esp_tokenizer *tokenizer, const int32_t *ids, int32_t n, bool stopped);
esp_status espi_rollout_texts(esp_trainer *t);
/* Lines to score: exact answers among `samples` of every evaluation line. */
esp_status espi_evaluate(esp_trainer *t, double *share, int32_t samples, bool greedy);

/* trainer_update.c */
/* Bytes of the model's activation block that no micro-batch of this trainer passes; take: makes it that large. */
esp_status espi_update_reserve(size_t *bytes, esp_trainer *t, bool take);
esp_status espi_update_create(esp_trainer *t);
void espi_update_free(esp_trainer *t);
/* Log-probabilities of the adapter-off model into each sequence's ref_logprob. */
esp_status espi_reference_logprobs(esp_trainer *t);
/* One optimiser step on sequences[0..rows). */
esp_status espi_update(esp_trainer *t);

/* The two halves of a GRPO step: a checkpoint may be taken between them. */
esp_status espi_trainer_sample(esp_trainer *t);
esp_status espi_trainer_update(esp_trainer *t, esp_step_stats *stats);

/* trainer_log.c */
esp_status espi_logs_open(esp_trainer *t, int64_t metrics_bytes, int64_t completions_bytes);
void espi_logs_close(esp_trainer *t);
void espi_stats_fill(esp_trainer *t, esp_step_stats *stats);
esp_status espi_log_step(esp_trainer *t, const esp_step_stats *stats);
esp_status espi_log_start(esp_trainer *t);

/* trainer_state.c */
esp_status espi_state_save(esp_trainer *t);
esp_status espi_state_restore(esp_trainer *t, const char *dir, int64_t *metrics_bytes, int64_t *completions_bytes);

#endif
