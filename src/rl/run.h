/* What the files of the trainer share: its state, and the parts of a step.
 *   trainer.c          create, step
 *   trainer_config.c   defaults, presets, pairs that make no sense
 *   trainer_rollout.c  prompts -> completions -> rewards -> advantages, try after try
 *   trainer_files.c    rollouts from files, and into files
 *   trainer_correct.c  log-probabilities of other policies, and what the loss makes of their distance
 *   trainer_update.c   sequences -> micro-batches -> gradients -> one optimiser step
 *   trainer_eval.c     evaluation, early stop, the best adapter
 *   trainer_state.c    what a checkpoint holds
 *   trainer_log.c      metrics.jsonl, completions.jsonl */
#ifndef ESPI_RL_RUN_H
#define ESPI_RL_RUN_H

#include "core/clock.h"
#include "espalier/trainer.h"
#include "io/file.h"
#include "rl/objective.h"
#include "rl/ranks.h"
#include "rl/reward.h"
#include "rl/rollout.h"
#include "rl/tasks.h"

/* One sequence of an optimiser step; arrays begin at its prompt's first token.  NULL = absent. */
typedef struct espi_sequence {
    const int32_t *tokens;
    int32_t n_prompt, n_completion;
    const uint8_t *mask;                      /* [n_completion] 0 = no part of the loss; NULL = all are */
    int32_t n_counted;                        /* how many are */
    const float *sampler, *old, *ref, *ratio; /* [n_prompt + n_completion] */
    const uint8_t *routes;                    /* [n_prompt + n_completion] tokens of espi_packed.route_width bytes */
    const int64_t *kept_offsets;              /* [n_prompt + n_completion + 1] into the rollouts' kept_ids */
    double advantage;
    int64_t row, group; /* of the rollouts; -1: SFT.  Neighbours of one group may share their prompt */
    bool skip;          /* its gradient is exactly zero */
} espi_sequence;

typedef enum espi_phase {
    ESPI_PHASE_EMPTY = 0,     /* the last generation is used up */
    ESPI_PHASE_GATHERING = 1, /* some generation calls are done; more may follow */
    ESPI_PHASE_READY = 2      /* scored; its minibatches are being trained on */
} espi_phase;

/* Sums over the micro-batches of a step, until its line is written. */
typedef struct espi_step_sums {
    double loss, policy_loss, kl, entropy, ratio, clip_low, clip_high, abs_g, diff_mean, diff_max; /* per-token ones: times tokens */
    double clip_low_least, clip_high_most;                                                         /* over the micro-batches */
    double aux_loss, forward_tokens; /* times tokens of the forwards, and those */
    double tokens, tokens_skipped, diff_tokens, grad_norm, lr, route_flips, routes_replayed;
    double seconds_sample, seconds_reward, seconds_logprob, seconds_forward, seconds_backward, seconds_optim, seconds_sync;
} espi_step_sums;

/* Of one generation's rollout correction and sampler distance; NaN where not measured. */
typedef struct espi_correction_stats {
    double ratio_low, ratio_mean, ratio_high; /* rho before it is cut */
    double effective_share;                   /* (sum w)^2 / (n sum w^2) of the weights used */
    double k3, ppl_ratio, chi2_token, chi2_sequence;
    double cut_share, rejected_share, absent_share; /* of tokens; of sequences; tokens without the sampler's log-probability */
} espi_correction_stats;

/* What a micro-batch tells of itself.  Ranks run one each at the same time; then all add those of all, in the order of the micro-batches. */
typedef struct espi_micro_stats {
    esp_grpo_stats grpo;
    double loss, aux_loss; /* of SFT; of the routers */
    int64_t forward_tokens, route_flips, routes_replayed;
    int64_t load[]; /* [experts] token-expert pairs over all layers */
} espi_micro_stats;

/* Arrays of one micro-batch, token-aligned. */
typedef struct espi_packed {
    int64_t capacity, most_seqs; /* most_seqs: shared prompts included */
    int32_t *tokens, *cu, *prefix_of;
    uint8_t *mask;
    float *advantage, *sampler, *old, *ref, *ratio;
    float *out;                 /* what a log-probability pass gives */
    bool share;                 /* a group's prompt is one sequence, and its completions stand behind it */
    uint8_t *routes, *recorded; /* [capacity, route_width]; NULL: no replay, or nothing to record */
    int64_t route_width;        /* bytes of a token: layers * top_k of one or two bytes */
    int64_t *kept_offsets;
    int32_t *kept_ids;
    int64_t kept_capacity;
    /* Of the sequences that were packed: which of those given, and where prompt and completion begin. */
    int64_t n;
    int64_t *which;           /* [rows] */
    int32_t *prompt, *middle; /* [rows] */
    /* Of the micro-batches that are run at the same time: borders[r] .. borders[r+1]-1 are the sequences of rank r's. */
    int64_t *borders; /* [ranks+1] */
    int n_batches;    /* how many have any: those of the first ranks; 0: none is left */
} espi_packed;

/* Copies of the adapter's tensors, in the host's memory; NULL: none. */
typedef struct espi_snapshot {
    char *data, *spare; /* all tensors one after the other; room for the largest */
    size_t bytes;
} espi_snapshot;

#define ESPI_KEPT_CHECKPOINTS_MAX 64

struct esp_trainer {
    esp_model *model;
    const esp_tokenizer *tokenizer;
    esp_trainer_config c; /* defaults filled in; its strings are not kept */
    char *out_dir;        /* NULL: nothing is written */
    char *save_rollouts;  /* folder; NULL: they are not kept */
    espi_lock *lock;      /* on out_dir */
    esp_reward *rewards;  /* [c.n_rewards], names owned; the overlong penalty is the last where there is one */
    double *weights;
    espi_rewards *scorer; /* of them */
    espi_tasks train, eval;
    esp_model_info info;
    uint64_t weights_hash; /* XXH3 of the frozen weights as they lie in memory: a checkpoint belongs to one base */
    esp_optim *optim;
    esp_sampler *sampler; /* NULL: SFT without evaluation */
    espi_rollout_source source;

    int64_t rows, longest; /* most sequences of a step; tokens of the longest */
    int64_t slices;        /* steps that one generation serves: steps_per_generation * updates_per_batch */
    int64_t step;          /* completed */
    int64_t cursor;        /* lines taken from the training file */
    int64_t num_tokens;    /* seen so far */
    int64_t *order;        /* permutation of the training lines of epoch order_epoch */
    int64_t order_epoch;

    espi_phase phase;
    espi_rollouts rollouts; /* gathered so far, or ready */
    char **text;            /* [n_text] of the completions, without the end token */
    int64_t n_text;
    int64_t tries;      /* generation calls done for this batch */
    int64_t slice;      /* steps done on it */
    int64_t generation; /* batches made ready so far */
    int64_t lost;       /* groups that the source did not bring, in this batch */
    int64_t resampled;  /* groups that gave way to others */
    int64_t published;  /* version that the source has; -1 none */

    espi_sequence *sequences; /* [rows] */
    int64_t n_sequences;      /* of this step */
    int64_t most_kept;        /* ids that the request's filters leave for a token; 0 = there are none */
    int64_t *groups;          /* order of the generation's groups in its slices */
    espi_packed packed;
    espi_step_sums sums;
    int64_t *load; /* [experts] token-expert pairs of the step's forwards, over all layers */
    char *told;    /* [ranks+1] espi_micro_stats of told_bytes: those of all ranks, and this one's */
    size_t told_bytes;
    int64_t *dealt; /* [ranks+1] borders of what is dealt to the ranks in blocks */
    espi_correction_stats correction;
    espi_snapshot snapshot;
    double entropy_coef; /* the controller's, or the objective's */
    bool entropy_acts;   /* the controller's: the last entropy was at or below its target */

    bool started;      /* the evaluation before the first step is told and judged */
    int64_t eval_step; /* of the cached result, -1 = none */
    double eval_sampled, eval_greedy;
    double best;                                     /* sampled accuracy; negative: none yet */
    int64_t best_step, worse;                        /* evaluations since */
    int64_t kept[ESPI_KEPT_CHECKPOINTS_MAX], n_kept; /* steps of the kept checkpoints, oldest first */
    espi_log_file *metrics, *completions;
    size_t planned;
};

/* The next line of the training file, in the order of its epoch; *key: a number no other draw of the run has. */
esp_status espi_next_line(esp_trainer *t, int64_t *line, uint32_t *key);

/* `count` zeroed values; *out: address of a pointer; free() it. */
esp_status espi_take_array(void *out, int64_t count, size_t size);
/* free() it. */
esp_status espi_copy_text(char **out, const char *text);

/* trainer_config.c */
esp_status espi_trainer_settle(esp_trainer *t, const esp_trainer_config *config);

/* rl/source_sampler.c: our own sampler as a source. */
void espi_sampler_source(espi_rollout_source *source, esp_sampler *sampler, const esp_model *model);
/* rl/server.c: t->source becomes the server that the config names; once the state is restored. */
esp_status espi_server_source(esp_trainer *t);

/* trainer_rollout.c */
/* Goes on with the generation until it is ready, or `stop` asks (phase is then still GATHERING or EMPTY). */
esp_status espi_rollout_make(esp_trainer *t);
/* What a generation is made of after its rows are there, made or restored: texts, order of its groups. */
esp_status espi_rollout_ready(esp_trainer *t);
/* A row as a sequence; skip is false. */
espi_sequence espi_sequence_of(const espi_rollouts *r, int64_t row);
/* sequences[] of the slice that comes next. */
void espi_rollout_sequences(esp_trainer *t);
/* Text of a completion without its end token; free() it. */
esp_status espi_completion_text(char **text, const esp_tokenizer *tokenizer, const int32_t *ids, int32_t n, bool stopped);
/* The task line a row came from; NULL where the source brought its own prompts. */
const espi_task *espi_row_task(const esp_trainer *t, int64_t row);
void espi_rollout_free(esp_trainer *t);
/* *asked: by anyone, on any rank. */
esp_status espi_stop_asked(bool *asked, const esp_trainer *t);

/* Packed prompts of a request. */
typedef struct espi_prompts {
    int32_t *ids, *cu;
    uint32_t *keys;
    int64_t *lines;
} espi_prompts;
esp_status espi_prompts_take(espi_prompts *p, int64_t n, int64_t longest);
void espi_prompts_add(espi_prompts *p, int64_t i, const espi_task *task, int64_t line, uint32_t key);
void espi_prompts_free(espi_prompts *p);

/* trainer_files.c */
/* The source of `rollouts`; settles t->longest. */
esp_status espi_files_source(esp_trainer *t);
/* The generation that is ready, into the folder of save_rollouts, if there is one. */
esp_status espi_files_save(const esp_trainer *t);

/* trainer_correct.c */
esp_status espi_snapshot_take(esp_trainer *t);
void espi_snapshot_free(esp_trainer *t);
/* Old and reference log-probabilities and correction factors of a generation, those that are needed. */
esp_status espi_correct(esp_trainer *t);
/* mean rho cut by the rule; for tests. */
double espi_correction_weight(const esp_trainer_config *c, double log_rho);

/* trainer_update.c */
/* Bytes of the model's activation block that no micro-batch of this trainer passes; take: makes it that large. */
esp_status espi_update_reserve(size_t *bytes, esp_trainer *t, bool take);
esp_status espi_update_create(esp_trainer *t);
void espi_update_free(esp_trainer *t);
/* Cuts micro-batches from sequence *next on, one for each rank, as many sequences as fit, those to be skipped left out unless `all`; packs
 * this rank's, which is empty where none is left for it: it is run all the same, as passes are of all ranks.  See packed.n_batches. */
esp_status espi_pack(esp_batch *batch, esp_trainer *t, const espi_sequence *sequences, int64_t n, int64_t *next, bool all);
/* Room for the routes that the rollouts have. */
esp_status espi_update_routes(esp_trainer *t);
/* One optimiser step on sequences[0..n_sequences). */
esp_status espi_update(esp_trainer *t);

/* The two halves of a GRPO step: a checkpoint may be taken between them. */
esp_status espi_trainer_sample(esp_trainer *t);
esp_status espi_trainer_update(esp_trainer *t, esp_step_stats *stats);

/* trainer_eval.c */
/* Exact answers among `samples` of every evaluation line. */
esp_status espi_evaluate(esp_trainer *t, double *share, int32_t samples, bool greedy);
/* After an evaluation: is it the best so far? */
esp_status espi_judge(esp_trainer *t);

/* trainer_log.c */
esp_status espi_logs_open(esp_trainer *t, const char *resume_folder, int64_t metrics_bytes, int64_t completions_bytes);
void espi_logs_close(esp_trainer *t);
void espi_stats_fill(esp_trainer *t, esp_step_stats *stats);
esp_status espi_log_step(esp_trainer *t, const esp_step_stats *stats);
esp_status espi_log_start(esp_trainer *t);

/* trainer_state.c */
esp_status espi_state_save(esp_trainer *t);
/* ESP_ERR_MISMATCH, naming the key, where the ranks were given different runs.  Collective. */
esp_status espi_state_alike(const esp_trainer *t);
/* from: a folder or a checkpoint file.  folder [out]: where the logs beside it are. */
esp_status espi_state_restore(esp_trainer *t, char folder[ESPI_PATH_MAX], const char *from, int64_t *metrics_bytes,
                              int64_t *completions_bytes);

#endif
