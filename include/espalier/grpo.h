/// GRPO: advantages, the objective's options, and the loss on hidden states.  All formulas: Shao et al. 2402.03300 and the papers named at
/// each option; conventions are TRL's.
#ifndef ESPALIER_GRPO_H
#define ESPALIER_GRPO_H

#include "espalier/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/// Values are pinned.  0 = default = DAPO.
typedef enum esp_loss_type {
    ESP_LOSS_DEFAULT = 0,
    ESP_LOSS_GRPO = 1,    ///< mean over sequences of the mean over tokens
    ESP_LOSS_BNPO = 2,    ///< mean over the tokens of the micro-batch
    ESP_LOSS_DR_GRPO = 3, ///< sum / (sequences * max_completion_length), 2503.20783
    ESP_LOSS_DAPO = 4,    ///< mean over the tokens of the whole optimiser step, 2503.14476
    ESP_LOSS_CISPO = 5,   ///< clipped IS weight as a constant, 2506.13585; epsilon_high is the cap itself
    ESP_LOSS_SAPO = 6,    ///< soft gate, 2511.20347
    ESP_LOSS_LUSPO = 7,   ///< length-unbiased sequence policy, 2602.05261
    ESP_LOSS_VESPO = 8    ///< 2602.10693
} esp_loss_type;

/// "grpo", "dapo", ..; "?" for an unknown value.
ESP_API const char *esp_loss_type_name(esp_loss_type loss);
/// ESP_ERR_ARG on another name; the sentence lists the known ones.
ESP_API esp_status esp_loss_type_parse(esp_loss_type *loss, const char *name);

typedef enum esp_is_level { ESP_IS_TOKEN = 0, ESP_IS_SEQUENCE = 1 /* GSPO, 2507.18071 */ } esp_is_level;

/// Whose gradient the KL term has; the value reported is always k3.
typedef enum esp_kl_grad {
    ESP_KL_GRAD_K2 = 0, ///< D: the true on-policy reverse-KL gradient (default)
    ESP_KL_GRAD_K3 = 1  ///< 1 - e^-D: TRL
} esp_kl_grad;

/// Numbers mean the decimal that was written: 0.2f is taken as 0.2.
struct esp_objective {
    size_t struct_size;
    esp_loss_type loss;
    esp_is_level level;
    float epsilon_low, epsilon_high; ///< default 0.2, 0.2 (cispo: epsilon_high default 5, the cap)
    float delta;                     ///< upper bound on the ratio (2505.07291); 0 = none
    float beta;                      ///< KL coefficient; 0 = no reference needed
    esp_kl_grad kl_grad;
    bool kl_bias_correction;                                            ///< multiply the KL term by the ratio (DeepSeek-V3.2)
    float sapo_temperature_pos, sapo_temperature_neg;                   ///< default 1.0, 1.05
    float vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg; ///< default 2, 3, 3, 2
    float off_policy_mask_threshold; ///< drop sequences with A < 0 and mean(sampler - lp) above it (old - lp without a sampler's); 0 = off
    float top_entropy_quantile;      ///< keep this share of the tokens, those of highest entropy; 0 or 1 = all.  It is a share of
                                     ///< the batch of one call, as in TRL: when that is cut, each part keeps its own
    float entropy_coef;              ///< entropy bonus; 0 = none
    float temperature;               ///< default 1: logits / temperature before the log-softmax, as in the sampler
    int32_t max_completion_length;   ///< dr_grpo's constant; 0 = the longest completion of the batch
};
#define ESP_OBJECTIVE(...) ((esp_objective){.struct_size = sizeof(esp_objective), __VA_ARGS__})

/// What a call of esp_grpo_loss measured.  Means are over the counted tokens of the batch.
typedef struct esp_grpo_stats {
    size_t struct_size;
    double loss;        ///< policy_loss less the entropy bonus
    double policy_loss; ///< policy and KL terms
    double kl, entropy, ratio_mean;
    double clip_low, clip_high;           ///< share of tokens clipped below / above
    double mean_abs_g;                    ///< mean |d loss / d lp|: why a loss of 0 still trains
    double logp_diff_mean, logp_diff_max; ///< |sampler_logprob - logprob|, where given
    int64_t tokens, tokens_skipped;       ///< counted; of those without any gradient (exactly zero coefficients)
    int64_t sampler_tokens;               ///< of the counted ones, those that have a sampler_logprob: what logp_diff_mean is a mean of
} esp_grpo_stats;
#define ESP_GRPO_STATS_INIT                                                                                                                \
    { .struct_size = sizeof(esp_grpo_stats) }

/// Loss and its gradient by the hidden states; never holds [T,V].  Options come from batch.objective.
/// One pass over the head (LH1) when a token's coefficient depends on that token alone, two passes (LH2) otherwise; ESP_LOG=select says which.
/// d_hidden [out]  [T,H] view in the activation block; rows that the mask does not count are 0
/// ESP_ERR_ARG: advantage missing, ref_logprob missing with beta > 0, contradicting options (the sentence names both)
/// ESP_ERR_NONFINITE: an advantage or log-probability that is NaN or infinite (names the sequence)
ESP_API esp_status esp_grpo_loss(esp_model *model, const esp_batch *batch, const esp_tensor *hidden, esp_tensor *d_hidden,
                                 esp_grpo_stats *stats);

/// The same on plain arrays, for those who own their forward: one coefficient a token.  Arrays are [n_tokens] of the counted tokens only,
/// sequence after sequence; cu [n_seqs+1]; advantage [n_seqs].  old, ref, is_ratio, entropy may be NULL where the options do not need them.
/// step_tokens, step_seqs: of the whole optimiser step, as in esp_batch; 0 = those given here.  Micro-batches then add up to the gradient
/// of the whole (bnpo, a mean over each micro-batch by definition, only when all have the same tokens a sequence; top_entropy_quantile
/// below 1 not at all, as each micro-batch keeps its share of the tokens given here).
/// g [out] d loss / d logprob; e [out] d loss / d entropy (0 without an entropy bonus)
ESP_API esp_status esp_objective_coefficients(const esp_objective *objective, int32_t n_seqs, const int32_t *cu, const double *logprob,
                                              const double *old, const double *ref, const double *is_ratio, const double *entropy,
                                              const double *advantage, double step_tokens, double step_seqs, double *g, double *e,
                                              esp_grpo_stats *stats);

/// How advantages are scaled after the group mean is taken off.
typedef enum esp_advantage_scale { ESP_SCALE_NONE = 0, ESP_SCALE_GROUP = 1, ESP_SCALE_BATCH = 2 } esp_advantage_scale;
/// Several rewards: weighted sum then normalise, or normalise each then sum, then by the batch (GDPO).
typedef enum esp_advantage_order { ESP_SUM_THEN_NORMALIZE = 0, ESP_NORMALIZE_THEN_SUM = 1 } esp_advantage_order;

/// rewards [n_groups*group_size, n_rewards], NaN = that function abstained; weights [n_rewards] or NULL = 1.
/// advantage [out] [n]; reward [out] [n] or NULL: the weighted sum (NaN where all abstained, which leaves mean and deviation and has
/// advantage 0); deviation [out] [n] or NULL: of the row's group, of the batch with ESP_SCALE_BATCH, of the summed scores of the batch with
/// ESP_NORMALIZE_THEN_SUM; unbiased, the divisor is deviation + 1e-4 (1 with ESP_SCALE_NONE).
/// ESP_ERR_NONFINITE: an infinite reward (names the row)
ESP_API esp_status esp_advantages(double *advantage, double *reward, double *deviation, const double *rewards, const double *weights,
                                  int64_t n_groups, int64_t group_size, int64_t n_rewards, esp_advantage_scale scale,
                                  esp_advantage_order order);

#ifdef __cplusplus
}
#endif
#endif
