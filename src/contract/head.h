/* head: hidden states -> log-probabilities, entropies, losses; never [T,V].  Twins: forward/head.c, backward/head.c.
 *
 * The loss is the caller's: it sees log-probabilities and entropies of the counted tokens and answers with one coefficient a token,
 * g = d loss / d logprob (and e = d loss / d entropy).  Nothing else about a loss ever reaches the head.
 *   LH0  forward only: espi_head_logprob()
 *   LH1  one pass, for losses whose coefficients of a row depend on that row alone: espi_head_loss(row_local = true)
 *   LH2  two passes, any loss: espi_head_loss(row_local = false)
 * Work memory of every mode is constant in the number of tokens, but for the O(n) scalars in espi_head_rows. */
#ifndef ESPI_CONTRACT_HEAD_H
#define ESPI_CONTRACT_HEAD_H

#include "core/arena.h"
#include "core/ctx.h"
#include "espalier/model.h"
#include "kernels/ops.h"

/* The counted tokens of a batch: row = the position whose hidden state predicts the token, target = that token.  The last hidden state of
 * a prefix predicts the first token of each of its users: such a row is named by several, and each puts its gradient in a row of its own
 * behind the T of d_hidden, from where they are added up. */
typedef struct espi_head_rows {
    int64_t n;
    int32_t *row, *target;            /* [n] */
    int32_t *d_row;                   /* [n] row of d_hidden, or NULL: row */
    int64_t shared;                   /* rows of d_hidden behind the T */
    int32_t *shared_row;              /* [shared] the row that each belongs to */
    int32_t *token;                   /* [n] index of the target in the batch; host memory */
    int32_t n_seqs;                   /* sequences of the loss: all but prefixes that count no token */
    int32_t *cu, *seq;                /* [n_seqs+1] rows of each, [n_seqs] which sequence of the batch it is; host memory */
    void *lp, *entropy, *lse, *g, *e; /* real [n] */
    int64_t *kept_offsets;            /* [n+1] as in espi_head; NULL: the batch has no kept ids */
    int32_t *kept;
    espi_head_host host; /* what a loss reads and writes of them */
    bool e_is_zero;      /* said by the loss: every e is 0 */
} espi_head_rows;

/* Collects the rows of `batch` (by loss_mask, see esp_batch) and takes the arrays from the arena.
 * On a dry arena n is the largest possible, one less than the tokens, and nothing is written.
 * ESP_ERR_ARG when the mask counts the first token of a sequence without a prefix: nothing stands before it to predict it; or when a counted
 * token's kept ids do not ascend within the vocabulary, or lack the token. */
esp_status espi_head_rows_make(espi_head_rows *rows, const esp_model *model, espi_arena *arena, const esp_batch *batch);

/* Rows of d_hidden that a loss on a batch of this shape may need: T, and one for each sequence that may have a prefix. */
static inline int64_t espi_head_d_rows(const esp_batch *batch) {
    return batch->n_tokens + batch->n_seqs;
}

/* The op's arguments for these rows. */
espi_head espi_head_describe(const esp_model *model, const espi_head_rows *rows, const void *hidden, double temperature);

/* How many tokens the batch counts. */
int64_t espi_head_count_rows(const esp_batch *batch);

/* Full logits, for those who ask: logits [T,V] f32, the caller's.  Temperature 1. */
esp_status espi_head_full_logits(esp_model *model, espi_arena *arena, float *logits, const void *hidden, int64_t tokens);

/* LH0: fills lp, entropy and lse.  Not on the host's side: see espi_head_read. */
esp_status espi_head_logprob(esp_model *model, espi_arena *arena, const espi_head_rows *rows, const void *hidden, double temperature);

/* Brings lp and entropy to rows->host. */
esp_status espi_head_read(esp_model *model, espi_arena *arena, const espi_head_rows *rows);

/* Reads rows->host.lp and .entropy from `first` on, `count` of them, and writes .g and .e there. */
typedef esp_status (*espi_head_coef)(void *user, const espi_head_rows *rows, int64_t first, int64_t count);

/* LH1 or LH2.  coef NULL, row_local: rows->g and ->e are there, and nobody waits: see espi_head_read.  d_hidden act [T + rows->shared, H]: the first T overwritten, 0 where no row is; the others are work memory. */
esp_status espi_head_loss(esp_model *model, espi_arena *arena, const espi_head_rows *rows, const void *hidden, void *d_hidden,
                          int64_t tokens, double temperature, bool row_local, espi_head_coef coef, void *user);

#endif
