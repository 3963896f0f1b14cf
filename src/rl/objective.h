/* The objective's inside: options with their defaults, and coefficients for any range of rows.  One walk over the table in objective.c
 * serves esp_objective_coefficients() (plain arrays) and esp_grpo_loss() (rows of the head). */
#ifndef ESPI_RL_OBJECTIVE_H
#define ESPI_RL_OBJECTIVE_H

#include "core/status.h"
#include "espalier/grpo.h"

struct espi_loss_row;

/* esp_objective with defaults filled in and checked. */
typedef struct espi_objective {
    const struct espi_loss_row *row;
    bool sequence_level, kl_bias_correction;
    esp_kl_grad kl_grad;
    double epsilon_low, epsilon_high, beta, off_policy_mask_threshold, top_entropy_quantile, entropy_coef, temperature;
    double delta;                       /* infinite = none */
    double sapo_temperature[2];         /* of a positive advantage, of any other */
    double vespo_k[2], vespo_lambda[2]; /* of an advantage >= 0, of a negative one */
    int32_t max_completion_length;      /* 0 = the longest of the batch */
} espi_objective;

/* options NULL or all 0 = defaults.  ESP_ERR_ARG names the option, or the two that contradict each other. */
esp_status espi_objective_make(espi_objective *objective, const esp_objective *options);

/* Name of its loss. */
const char *espi_objective_name(const espi_objective *objective);

/* Do a token's coefficients depend on that token (and on counts) alone?  Then the head may run in one pass. */
bool espi_objective_row_local(const espi_objective *objective);

/* One number a row: element index[i], or i where index is NULL, of an array of ESP_F32 or ESP_F64.  data NULL = absent. */
typedef struct espi_scalars {
    const void *data;
    esp_dtype dtype;
    const int32_t *index;
} espi_scalars;

/* What the coefficients are made of.  Rows of sequence s are cu[s] .. cu[s+1]-1. */
typedef struct espi_objective_input {
    int32_t n_seqs;
    const int32_t *cu;
    espi_scalars logprob, old, ref, sampler, is_ratio, entropy; /* by row; sampler: NaN = absent */
    espi_scalars advantage;                                     /* by sequence */
    double step_tokens, step_seqs;                              /* 0 = those of these rows */
} espi_objective_input;

/* One evaluation: what is fixed before the first row, and the sums that become the statistics. */
typedef struct espi_objective_run {
    const espi_objective *objective;
    const espi_objective_input *in;
    double step_tokens, step_seqs, longest;
    double policy_loss, bonus, kl, entropy, ratio, abs_g;
    int64_t tokens, skipped, clipped_low, clipped_high;
} espi_objective_run;

/* Checks all that is known before the log-probabilities.  ESP_ERR_ARG: something the options need is absent; ESP_ERR_NONFINITE names the
 * sequence. */
esp_status espi_objective_begin(espi_objective_run *run, const espi_objective *objective, const espi_objective_input *in);

/* Writes g and e (of dtype `real`) for rows first .. first+count-1.  Ranges come in order; one range of all rows unless row-local. */
esp_status espi_objective_rows(espi_objective_run *run, int64_t first, int64_t count, void *g, void *e, esp_dtype real);

/* Fills all of `stats` but logp_diff. */
void espi_objective_finish(const espi_objective_run *run, esp_grpo_stats *stats);

#endif
