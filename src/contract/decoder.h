/* decoder: ids -> final hidden states through all layers.  Twins: forward/decoder.c, backward/decoder.c.
 * A layer keeps all its saved tensors, or, beyond the activation budget, only its input, its routing and what is small, and is run again in the backward
 * with the same bits. */
#ifndef ESPI_CONTRACT_DECODER_H
#define ESPI_CONTRACT_DECODER_H

#include "contract/block.h"
#include "contract/embed.h"

struct espi_decoder_saved {
    int64_t tokens;
    int32_t n_seqs;
    int32_t *ids, *cu, *k_len;                     /* copies in host memory: [T], [n_seqs+1], [n_seqs] */
    int32_t *d_ids, *d_cu, *d_k_len, *d_positions; /* the same for the ops, and [T] */
    int32_t *prefix_of;                            /* [n_seqs] a copy of the batch's in host memory, -1 = none */
    int32_t *d_prefix_start, *d_prefix_len;        /* [n_seqs] for the ops */
    bool prefixed;                                 /* has any sequence one? */
    void *cos, *sin;
    void **h;                 /* [L+1] real [T,H]: the residual stream at the layer borders */
    void *rstd;               /* real [T] of the final norm */
    void *hidden;             /* real [T,H] */
    espi_block_saved *blocks; /* [L] */
    int64_t first_kept;       /* layers before it are checkpointed */
    bool adapter;             /* was the adapter on? */
    /* Router statistics over all MoE layers and tokens. */
    int64_t *router_counts;
    double *router_p_sum, *router_z_sum;
    int64_t *route_flips; /* of a replay */
    espi_mark mark;       /* the arena behind everything saved */
};

/* Its sequences as the ops take them. */
static inline espi_spans espi_saved_spans(const espi_decoder_saved *saved) {
    espi_spans spans = {
        .cu_q = saved->d_cu, .k_start = saved->d_cu, .k_len = saved->d_k_len, .n_seqs = saved->n_seqs, .tokens = saved->tokens};
    if (!saved->prefixed) return spans;
    spans.prefix_start = saved->d_prefix_start;
    spans.prefix_len = saved->d_prefix_len;
    return spans;
}

/* Bookkeeping of a model's saved state: arrays of pointers, not tensor memory. */
esp_status espi_decoder_saved_create(espi_decoder_saved **saved, const espi_config *config);
void espi_decoder_saved_free(espi_decoder_saved *saved);

/* The last layers are kept whole, as many as model->options.activation_budget holds: they are the first that the backward needs.
 * *first: layers before it are checkpointed. */
esp_status espi_decoder_first_kept(int64_t *first, esp_model *model, int64_t tokens);

/* Training forward.  On a dry arena only n_tokens and n_seqs of the batch are read.  Fills saved->hidden. */
esp_status espi_decoder_forward(esp_model *model, espi_arena *arena, const esp_batch *batch, espi_decoder_saved *saved);
/* d_hidden real [T,H].  loss_share: this batch's share of the optimiser step, for the router losses.  LoRA gradients: add. */
esp_status espi_decoder_backward(esp_model *model, espi_arena *arena, const void *d_hidden, double loss_share, espi_decoder_saved *saved);

/* positions [T] overwrite: token i of the n new ones of sequence s stands at prefix_len[s] + k_len[s] - n + i.  All in host memory. */
void espi_positions(int32_t *positions, const espi_spans *spans);

/* Forward without anything kept but hidden real [T,H] (the caller's).  cache: NULL, or where keys and values go and are read: the token i
 * of the n new ones of sequence s stands at cache row k_start[s] + k_len[s] - n + i and at the position that espi_positions gives it. */
esp_status espi_decoder_extend(esp_model *model, espi_arena *arena, void *hidden, espi_kv_cache *cache, const espi_routes *routes,
                               const int32_t *ids, const int32_t *positions, const espi_spans *spans, int64_t tokens);

/* The same on a batch of its own, without a cache: *hidden real [T,H] and *flips are taken here and stay, the rest is given back. */
esp_status espi_decoder_forward_only(void **hidden, int64_t **flips, esp_model *model, espi_arena *arena, const esp_batch *batch);

#endif
