/// The trainer level: SFT and GRPO loops on JSONL task files, with evaluation, checkpoints and logs.  Built on the public calls of the
/// other headers only.
#ifndef ESPALIER_TRAINER_H
#define ESPALIER_TRAINER_H

#include "espalier/grpo.h"
#include "espalier/optim.h"
#include "espalier/reward.h"
#include "espalier/sampler.h"
#include "espalier/tokenizer.h"

#ifdef __cplusplus
extern "C" {
#endif

/// Reference policy of the KL term and of the `kl` metric.
typedef enum esp_reference {
    ESP_REFERENCE_BASE = 0,    ///< the adapter off
    ESP_REFERENCE_SNAPSHOT = 1 ///< a copy of the adapter as it was at the start (GRPO after SFT), or at the last sync
} esp_reference;

/// Rollout correction: weights of the tokens by rho = exp(old - sampler), constants of the loss.
typedef enum esp_correction {
    ESP_CORRECTION_DEFAULT = 0, ///< none for our own sampler, tis for rollouts of another program
    ESP_CORRECTION_NONE = 1,
    ESP_CORRECTION_TIS = 2,   ///< min(rho, high); default high 2
    ESP_CORRECTION_MIS = 3,   ///< rho where rho <= high, else 0; default high 3
    ESP_CORRECTION_ICEPOP = 4 ///< rho where low <= rho <= high, else 0; default 0.5, 5
} esp_correction;

/// Routing replay: which experts the training forward takes.
typedef enum esp_replay {
    ESP_REPLAY_DEFAULT = 0, ///< r3 where the rollouts record their routes, else none
    ESP_REPLAY_NONE = 1,    ///< its own
    ESP_REPLAY_R2 = 2,      ///< those of the pass that made the old log-probabilities
    ESP_REPLAY_R3 = 3       ///< those of the sampler
} esp_replay;

/// Asked between the parts of a step (each generation call, each update).  Non-zero: the step ends where it is, with stats.interrupted, and
/// esp_trainer_save() or the next esp_trainer_step() goes on from there.  Of several ranks one is enough: all end at the same place.
typedef int (*esp_stop_fn)(void *user);

typedef enum esp_trainer_kind { ESP_TRAIN_SFT = 1, ESP_TRAIN_GRPO = 2 } esp_trainer_kind;

/// Every field is also an option of espalier-sft / espalier-grpo and a key of their --config file, under the same name (the four paths:
/// train, eval, out, resume; kind is the program, rewards are the built-in ones).
typedef struct esp_trainer_config {
    size_t struct_size;
    esp_trainer_kind kind; ///< required
    const char *
        train_file; ///< JSONL; required but with `rollouts`.  A line has "prompt" and "answer", "messages" (the chat format of the model's family),
                    ///< "prompt_ids" and "answer_ids" or "answer"; for SFT also "text", or "ids" and "mask"
    const char *eval_file;      ///< JSONL of the same form; NULL = no evaluation
    const char *out_dir;        ///< metrics.jsonl, completions.jsonl, checkpoint.h5, adapter/; NULL = nothing is written
    const char *resume_dir;     ///< an out_dir to go on from, or a checkpoint file in one; NULL = start afresh
    int64_t steps;              ///< optimiser steps; default 60
    uint64_t seed;              ///< default 0
    int32_t prompts_per_step;   ///< default 16 (GRPO), 32 lines (SFT)
    int32_t group_size;         ///< GRPO samples a prompt; default 8
    int32_t max_new_tokens;     ///< default 10
    int32_t micro_batch_tokens; ///< tokens of one forward/backward; 0 = the whole step at once.  Below the step's most tokens it is refused
                                ///< together with top_entropy_quantile below 1: each micro-batch would have a threshold of its own
    float temperature;          ///< default 1
    esp_advantage_scale scale;  ///< default none
    esp_objective objective;    ///< all 0 = DAPO, no KL, no entropy bonus
    int32_t updates_per_batch;  ///< mu: how often each generation is trained on; default 1
    esp_adamw_config adamw;     ///< all 0 = lr 1e-3, clip 1
    const esp_reward *rewards;  ///< NULL = exact + 0.2 match
    int32_t n_rewards;
    bool shuffle_rewards;     ///< control run: rewards are permuted among the completions of a step
    int64_t eval_every;       ///< default 10; before the first and after the last step in any case
    int32_t eval_samples;     ///< sampled completions a line; default 4
    int64_t checkpoint_every; ///< default 20; after the last step in any case
    bool no_skip;             ///< also run forward and backward of groups whose advantages are all zero
    bool no_thinking;         ///< "messages": the assistant's turn begins with an empty thinking block (Qwen3's enable_thinking = false)
    const char *server;       ///< address of an OpenAI-compatible server (vLLM) that writes the completions; NULL = the trainer's own
                              ///< sampler.  Its API key: the environment's ESP_SERVER_KEY
    const char *server_model; ///< the base model's id there; NULL = the only one that it lists
    const char *server_adapter_dir;  ///< folder of this run's own where each version of the adapter is written for the server; required
    const char *server_adapter_path; ///< the same folder as the server sees it; NULL = at the same path
    int32_t server_retries;          ///< tries of a request beyond the first; default 4
    int32_t server_concurrency;      ///< requests in flight; default 32
    float server_timeout;            ///< seconds of one try; default 120
    bool server_drop_lost;           ///< groups that no try brought are left out; else the step fails
    int32_t max_staleness;           ///< versions of the adapter that a completion may be behind; default 0
    int32_t steps_per_generation; ///< optimiser steps (of prompts_per_step groups each) that share one generation; default 1.  Above 1 the
                                  ///< groups are shuffled among them, anew in each of the updates_per_batch rounds
    int32_t resample_tries;       ///< DAPO: so often, groups whose rewards are all equal give way to new prompts; default 0
    float overlong_share;         ///< DAPO: a penalty rises linearly to overlong_penalty over this last share of max_new_tokens; 0 = none
    float overlong_penalty;       ///< default 1
    bool mask_truncated;          ///< completions cut at max_new_tokens have no loss (their reward still counts in their group's mean)
    esp_reference reference;      ///< default base
    int64_t ref_sync_every;       ///< steps after which the snapshot becomes the adapter as it is; 0 = never
    esp_correction correction;
    esp_is_level correction_level; ///< rho of a token, or exp(sum) of the whole completion
    float correction_low, correction_high;
    float reject_low, reject_high; ///< sequences whose geometric mean of rho is outside have no loss; 0, 0 = none
    float entropy_target;          ///< entropy bonus with a controller: entropy_coef moves by entropy_step towards this entropy, and acts
                                   ///< while the entropy is at or below it; 0 = entropy_coef as it is
    float entropy_step;            ///< default 0.005
    float entropy_max;             ///< largest coefficient of the controller; default 0.1
    esp_advantage_order order;     ///< of several rewards: sum_then_normalize (default) or normalize_then_sum
    esp_replay replay;
    int32_t top_k;      ///< sampling in training: 0 = all
    float top_p, min_p; ///< default 1, 0.  Filters are allowed where the kept ids are recorded, so that training sees the same distribution
    int32_t early_stop; ///< evaluations without a better sampled accuracy after which the run ends; 0 = never
    bool keep_best;     ///< the adapter of the best evaluation is kept in out_dir/adapter-best
    int32_t keep_checkpoints; ///< the last so many are kept as out_dir/checkpoint-STEP.h5; default 0: checkpoint.h5 only.  At most 64
    float rollout_timeout;    ///< seconds for one generation call; 0 = none
    float reward_timeout;     ///< seconds for all rewards of one batch; what is late is NaN and counted; 0 = none
    const char *rollouts; ///< HDF5 file of rollouts, or folder of such files in the order of their names, instead of train_file: prompts,
                          ///< completions and rewards (names and number of `rewards` must be the file's) or advantages, taken as they are
    const char *save_rollouts; ///< folder that gets each generation as rollouts-NUMBER.h5, as `rollouts` reads it; NULL = none
    bool no_shared_prompts; ///< every sequence runs its prompt itself.  So it is, too, when a router loss is on: that counts tokens as they
                            ///< are run
    bool no_kl_on_zero_adv; ///< groups without any advantage have no KL term either, so they may be skipped with beta > 0 as well
    int32_t decode_rows;    ///< completions sampled together: what the KV cache has room for; default: all of a step.  With it and
                            ///< micro_batch_tokens the memory of a run does not depend on how many completions a step has
    esp_stop_fn stop;
    void *stop_user;
} esp_trainer_config;
#define ESP_TRAINER_CONFIG(...) ((esp_trainer_config){.struct_size = sizeof(esp_trainer_config), __VA_ARGS__})

/// Fills in one of the known recipes: "trl-default" (TRL's: dapo loss, clip 0.2, advantages by the group's deviation, KL gradient k3),
/// "dapo" (clip 0.2/0.28, by the group's deviation, 3 tries for groups without spread, penalty over the last fifth), "dr-grpo" (constant
/// divisor, no deviation), "gspo-moe" (sequence ratios, clip 3e-4/4e-4, mean of means), "cispo" (cap 5).  What is set afterwards wins.
/// ESP_ERR_ARG on another name; the sentence lists the known ones.
ESP_API esp_status esp_trainer_preset(esp_trainer_config *config, const char *name);

typedef struct esp_trainer esp_trainer;

/// What esp_trainer_memory() will say is planned, to the byte, before a weight is read: from config.json and the task files.  For
/// esp_plan_check().  Collective over the comm of ctx.
/// host [out]  of a GPU: bytes of weights and moments in the memory of the host, which are in no peak; else 0
/// model [in]  NULL = all defaults, as for esp_model_load()
ESP_API esp_status esp_trainer_plan(size_t *peak, size_t *host, esp_ctx *ctx, const char *dir, const esp_model_config *model,
                                    const esp_tokenizer *tokenizer, const esp_trainer_config *config);

/// Reads the task files, takes all memory, restores resume_dir if given.  The model's adapter is what trains.  Destroy before the model.
/// Collective over the comm of the model's context, as is every call on the trainer but esp_trainer_steps_done, _finished, _memory and
/// _destroy: all ranks give the same config and the same files, and all get the same results.  Micro-batches, prompts, rewards and evaluation
/// are dealt to the ranks; the rollouts, the metrics (but for times and memory), and the adapter have the same bits for any number of them.
/// The first rank alone writes out_dir's logs and save_rollouts.  Rewards run where their completions were dealt to, on every rank.  A rank
/// waits for the slowest with the patience of its comm: ESP_DEADLINE must be longer than a generation or a batch's rewards may take.
/// ESP_ERR_MISMATCH: the sentence names the key of the config that differs; ESP_ERR_UNSUPPORTED: `server` with several ranks
ESP_API esp_status esp_trainer_create(esp_trainer **trainer, esp_model *model, const esp_tokenizer *tokenizer,
                                      const esp_trainer_config *config);
ESP_API void esp_trainer_destroy(esp_trainer *trainer);

typedef struct esp_step_stats {
    size_t struct_size;
    int64_t step; ///< of this step, from 1
    double loss, reward, reward_std, exact, kl, entropy, grad_norm, lr, mean_length, clipped_ratio, frac_reward_zero_std, mean_abs_g;
    double seconds, seconds_sample, seconds_train; ///< wall
    int64_t tokens;
    double eval_sampled, eval_greedy; ///< of the evaluation after this step; NaN when none was due
    double clip_ratio;                ///< share of tokens that the clip range holds back
    double tokens_per_second;         ///< prompts and completions of the step, over its seconds
    bool interrupted;                 ///< `stop` asked for it: the step is not done, nothing else in here is filled in
    bool early_stop;                  ///< early_stop evaluations brought nothing better: the run is over
} esp_step_stats;
#define ESP_STEP_STATS_INIT                                                                                                                \
    { .struct_size = sizeof(esp_step_stats) }

/// One optimiser step: (GRPO: sample and score where the last generation is used up,) forward, loss, backward, update, log, checkpoint when
/// due.  ESP_ERR_STATE when `steps` are done.
ESP_API esp_status esp_trainer_step(esp_trainer *trainer, esp_step_stats *stats);
ESP_API int64_t esp_trainer_steps_done(const esp_trainer *trainer);

/// Share of exact answers on eval_file: among eval_samples samples a line at temperature 1, and greedy.
ESP_API esp_status esp_trainer_evaluate(esp_trainer *trainer, double *sampled, double *greedy);

/// The run has ended: all steps are done, or early_stop ended it.
ESP_API bool esp_trainer_finished(const esp_trainer *trainer);

/// Writes checkpoint.h5 and adapter/ now, each under a temporary name, flushed, renamed: an older one survives any failure.
/// Of several ranks checkpoint.h5 names a file of each of them, part-*.h5 beside it, and is written when those are there; any number of
/// ranks goes on from it.  Move or copy such a checkpoint with its parts.  ESP_ERR_MISMATCH: the ranks have drifted apart; nothing is written.
ESP_API esp_status esp_trainer_save(esp_trainer *trainer);

/// What the trainer planned to take and what was measured, model, optimiser and sampler included; equal.
ESP_API esp_status esp_trainer_memory(const esp_trainer *trainer, size_t *planned_bytes, size_t *peak_bytes);

/// Draws a run's curves over its steps as an SVG, in panels: reward, accuracy, KL, entropy, length, clipping, route flips, gradient norm,
/// tokens a second, learning rate and what else metrics.jsonl has.  svg_file is replaced atomically, so it may be looked at while a run goes
/// on: a last line that is not ended yet is left out, and so are nulls.
ESP_API esp_status esp_plot_metrics(const char *metrics_file, const char *svg_file);
/// The same for several runs, one curve each in every panel.  runs: their folders, or the metrics.jsonl in them.
/// smooth: steps of the running mean that is drawn over each curve; 0 = a 25th of the longest run, negative = none
ESP_API esp_status esp_plot_runs(const char *svg_file, const char *const *runs, int32_t n_runs, double smooth);

#ifdef __cplusplus
}
#endif
#endif
