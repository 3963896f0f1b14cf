/* Rollouts in files: what a trainer generated, saved and read back as a source.  The format: io/rollouts.h. */
#ifndef ESPI_RL_ROLLOUT_FILE_H
#define ESPI_RL_ROLLOUT_FILE_H

#include "espalier/tokenizer.h"
#include "io/file.h"
#include "io/rollouts.h"
#include "rl/rollout.h"

/* h = XXH64(bytes of token id, seed h) for id 0, 1, .., from h = 0 on; as 16 hexadecimal digits. */
void espi_tokenizer_hash(char out[17], const esp_tokenizer *tokenizer);

/* Saves a batch whose rewards, or advantages where it has none, are there.  Rewards must be floats' values, as reward functions give them.
 * prompt, completion: texts, or NULL. */
esp_status espi_rollouts_save(const char *path, const espi_rollouts *r, const char *const *prompt, const char *const *completion,
                              const espi_rollout_facts *facts);

/* What a file must agree with; -1 and "" = not known. */
typedef struct espi_rollout_limits {
    int64_t vocab, layers, experts, top_k;
    char tokenizer_hash[17];
} espi_rollout_limits;
#define ESPI_ROLLOUT_LIMITS_NONE                                                                                                           \
    { .vocab = -1, .layers = -1, .experts = -1, .top_k = -1 }

/* What a file that was checked holds. */
typedef struct espi_rollout_summary {
    int64_t rows, groups, group_size, tokens, counted; /* counted: by the loss */
    int64_t longest, longest_completion, truncated;    /* in tokens; rows */
    int64_t with_logprob;                              /* of the counted tokens */
    int64_t rewards;                                   /* of a row; 0 = advantages only, in one of the files at least */
    int64_t unscored, without_spread;                  /* rewards that are NaN; groups whose first reward is the same in all rows */
    int64_t first_version, last_version;               /* of the adapter; -1 = not said */
} espi_rollout_summary;

/* Reads all of the file.  ESP_ERR_FORMAT: the first thing that is wrong and where it is; ESP_ERR_MISMATCH: another vocabulary, tokenizer
 * or number of experts. */
esp_status espi_rollout_file_check(espi_rollout_summary *summary, const espi_rollout_file *file, const espi_rollout_limits *limits);

/* What becomes of the correction "none", "tis", .. with this file, in words. */
void espi_rollout_correction_tell(char out[256], const espi_rollout_summary *summary, const char *correction);

/* A file, or all *.h5 of a folder in the order of their names, as a source; all are checked before.  n_rewards, names: of the run; a file
 * with rewards has these.  After the last group: ESP_ERR_STATE.  total [out]: of all files together. */
esp_status espi_file_source(espi_rollout_source *source, espi_rollout_summary *total, const char *path, const espi_rollout_limits *limits,
                            const char *const *reward_names, int64_t n_rewards);

#endif
