/* What every room of one forward or backward pass is handed: the model, the memory, and the shape of the batch.
 *
 * Saved tensors are taken from the arena by a forward and read by its twin; scratch is taken above them and released before the call
 * returns. On a dry arena a room takes the same bytes in the same order and touches no data, so a plan is the walk itself. */
#ifndef ESPI_CONTRACT_PASS_H
#define ESPI_CONTRACT_PASS_H

#include "core/select.h"
#include "models/model.h"

/* Keys and values of every layer for the sequences being generated: real [L, rows, Hk*D]. */
typedef struct espi_kv_cache {
    void *k, *v;
    int64_t rows;
} espi_kv_cache;

/* Where the layers' choices of experts go when they are wanted together, and whether they were made before.  Zeroed: neither. */
typedef struct espi_routes {
    bool kept;             /* in `chosen`, not in each layer's own memory; said of a dry arena too */
    bool forced;           /* chosen holds what was recorded, -1 where the router is to choose: see espi_router_fwd */
    int32_t *chosen;       /* [L,T,K] tensor memory, overwritten in layers with experts */
    int64_t *flips;        /* [1] add; NULL: not counted */
    const int32_t *counts; /* [ranks,L,E] in host memory: the rows of every rank, where all of them were known before; else NULL */
} espi_routes;

typedef struct espi_pass {
    esp_model *model;
    esp_ctx *ctx;
    espi_arena *arena;
    int64_t tokens;
    const int32_t *ids, *positions; /* [T] */
    espi_spans spans;
    const void *cos, *sin; /* real [T,D/2] */
    espi_kv_cache *cache;  /* NULL: keys and values are those of this batch */
    bool adapter;          /* LoRA branches on */
    bool quiet;            /* no probe: a layer is being run again */
    espi_routes routes;
    /* Router statistics of a training forward, added up over its MoE layers; NULL where nobody asks. */
    int64_t *router_counts; /* [E] */
    double *router_p_sum;   /* [E] */
    double *router_z_sum;   /* [1] */
    /* Backward only: gradients of the router losses, see espi_router_bwd. */
    const int64_t *aux_counts; /* [E] or NULL */
    double aux_coef, z_coef;
} espi_pass;

/* Whether a later sequence of the batch stands behind this one: the token after its last is then that sequence's first. */
static inline bool espi_is_prefix(const esp_batch *batch, int32_t seq) {
    for (int32_t s = seq + 1; batch->prefix_of && s < batch->n_seqs; s++)
        if (batch->prefix_of[s] == seq) return true;
    return false;
}

/* Whether the passes may be run from a recording: nobody looks on, and no other rank has a part in them. */
static inline bool espi_pass_recordable(const espi_pass *pass) {
    return !pass->model->probe && !espi_share_travels(&pass->model->share);
}

/* `count` values of the dtype of statistics, or of activations. */
static inline esp_status espi_take_real(espi_pass *pass, int64_t count, void *out) {
    return espi_arena_take(pass->arena, (size_t)count * pass->ctx->real_size, out);
}
static inline esp_status espi_take_act(espi_pass *pass, int64_t count, void *out) {
    return espi_arena_take(pass->arena, (size_t)count * pass->ctx->act_size, out);
}

/* The LoRA branch as this pass sees it: absent when the adapter is off. */
static inline espi_lora espi_pass_lora(const espi_pass *pass, espi_lora lora) {
    return pass->adapter ? lora : (espi_lora){0};
}

/* Shows rows x cols activations (_real: of the dtype of statistics) to the model's probe, if it has one, in host memory; bf16 as f32.
 * models/probe.c */
void espi_probe_real(const espi_pass *pass, const char *name, int64_t layer, const void *data, int64_t rows, int64_t cols);
void espi_probe(const espi_pass *pass, const char *name, int64_t layer, const void *data, int64_t rows, int64_t cols);
void espi_probe_i32(const espi_pass *pass, const char *name, int64_t layer, const int32_t *data, int64_t rows, int64_t cols);
/* The same for routed rows [S,cols], put back into slot order [T,K,cols]. */
void espi_probe_slots(const espi_pass *pass, const char *name, int64_t layer, const void *data, const espi_routing *routing, int64_t cols);

#endif
