/* Rollouts in an HDF5 file, schema version 1: plain datasets that any program can write and read.
 *
 *   /tokens            i32 [Nt]        prompt and completion of row after row
 *   /seq_offsets       i64 [Ns+1]      row i is tokens seq_offsets[i] .. seq_offsets[i+1]-1
 *   /prompt_len        i32 [Ns]
 *   /group_id          i64 [Ns]        rows of a group are neighbours
 *   /rewards           f32 [Ns,F]      NaN = not scorable   } at least one of the two
 *   /advantage         f32 [Ns]                             }
 *   /sampler_logprob   f32 [Nt]        NaN = absent; optional, as are all below
 *   /loss_mask         u8  [Nt]        1 = the loss counts it; absent: completions
 *   /truncated         u8  [Ns]        0 = ended by itself, 1 = cut at the limit, 2 = cut off otherwise; absent: 0
 *   /adapter_version   i64 [Ns]        of the adapter that wrote the row
 *   /routed_experts    u8|u16 [Nt,L,k] all ones = not recorded; chunked, deflated
 *   /kept_offsets      i64 [Nt+1], /kept_ids i32 [..]: ids that top-k, top-p or min-p left, ascending; an empty range: all
 *   /text/prompt, /text/completion     UTF-8 [Ns]
 *
 * Attributes of the root: version (1, required), vocab_size, tokenizer_hash, model_id, adapter_version, temperature, top_p, top_k, min_p,
 * seed, reward_names [F].  What they mean is the business of src/rl. */
#ifndef ESPI_IO_ROLLOUTS_H
#define ESPI_IO_ROLLOUTS_H

#include "espalier/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum espi_rollout_column {
    ESPI_COLUMN_TOKENS,
    ESPI_COLUMN_OFFSETS,
    ESPI_COLUMN_PROMPT_LEN,
    ESPI_COLUMN_GROUP_ID,
    ESPI_COLUMN_REWARDS,
    ESPI_COLUMN_ADVANTAGE,
    ESPI_COLUMN_LOGPROB,
    ESPI_COLUMN_LOSS_MASK,
    ESPI_COLUMN_TRUNCATED,
    ESPI_COLUMN_VERSION,
    ESPI_COLUMN_ROUTES,
    ESPI_COLUMN_KEPT_OFFSETS,
    ESPI_COLUMN_KEPT_IDS,
    ESPI_COLUMN_COUNT
} espi_rollout_column;

/* How much a file holds; 0 where it has no such part. */
typedef struct espi_rollout_extent {
    int64_t rows, tokens, rewards, layers, top_k, route_bytes, kept;
} espi_rollout_extent;

#define ESPI_ROLLOUT_TEXT 256 /* bytes of an attribute's text, NUL included */

/* The attributes.  Absent: numbers NaN or -1, texts "". */
typedef struct espi_rollout_facts {
    int64_t vocab_size, adapter_version, top_k, seed;
    double temperature, top_p, min_p;
    char tokenizer_hash[ESPI_ROLLOUT_TEXT], model_id[ESPI_ROLLOUT_TEXT];
    char (*reward_names)[ESPI_ROLLOUT_TEXT]; /* [extent.rewards], or NULL */
} espi_rollout_facts;
#define ESPI_ROLLOUT_FACTS_NONE                                                                                                            \
    { .vocab_size = -1, .adapter_version = -1, .top_k = -1, .seed = -1, .temperature = NAN, .top_p = NAN, .min_p = NAN }

/* Replaces `path` atomically.  data: one array a column, NULL = absent.  prompt, completion: [rows], or NULL. */
esp_status espi_rollout_file_write(const char *path, const espi_rollout_extent *extent, const void *const data[ESPI_COLUMN_COUNT],
                                   const char *const *prompt, const char *const *completion, const espi_rollout_facts *facts);

typedef struct espi_rollout_file espi_rollout_file;
/* Datasets have the types and sizes that the schema says: ESP_ERR_FORMAT names the one that has not, what it is, and what it should be.
 * What is in them is not looked at. */
esp_status espi_rollout_file_open(espi_rollout_file **file, const char *path);
void espi_rollout_file_close(espi_rollout_file *file); /* NULL is allowed */
const char *espi_rollout_file_path(const espi_rollout_file *file);
const espi_rollout_extent *espi_rollout_file_extent(const espi_rollout_file *file);
const espi_rollout_facts *espi_rollout_file_facts(const espi_rollout_file *file);
bool espi_rollout_file_has(const espi_rollout_file *file, espi_rollout_column column);
/* Elements first .. first+n-1 of a column: rows, tokens or kept ids, each with all that it has. */
esp_status espi_rollout_file_read(void *into, const espi_rollout_file *file, espi_rollout_column column, int64_t first, int64_t n);

#endif
