/* The model in memory: frozen weights, the adapter, and the block of activations. */
#ifndef ESPI_MODELS_MODEL_H
#define ESPI_MODELS_MODEL_H

#include "core/arena.h"
#include "core/ctx.h"
#include "dist/share.h"
#include "kernels/ops.h"
#include "models/family.h"

/* A dense projection: frozen weight [out,in], f32, or bf16 where activations are; optional bias f32 [out], optional LoRA branch. */
typedef struct espi_linear {
    espi_mat w;
    const float *bias;
    espi_lora lora;
} espi_linear;

typedef struct espi_layer {
    espi_mlp_kind mlp;
    const float *norm1, *norm2;   /* [H] */
    const float *q_norm, *k_norm; /* [D] or NULL */
    espi_linear q, k, v, o;
    const float *sinks; /* [Hq] or NULL */
    void *d_sinks;      /* real [Hq] gradient, or NULL: frozen */
    /* MoE */
    espi_mat router;                              /* f32 [E,H] */
    const float *router_bias, *router_correction; /* [E] or NULL */
    void *d_router;                               /* real [E,H] gradient, or NULL: frozen */
    espi_stack gate_up, down;                     /* of this rank's own experts, and so are biases and LoRA */
    const float *gate_up_bias, *down_bias;        /* [E,2I], [E,H] or NULL */
    espi_lora lora_gate_up, lora_down;
    espi_linear shared_gate_up, shared_down; /* f32 [2Is,H], [H,Is]: the expert that sees every token; no rows: none */
    /* dense */
    espi_linear mlp_gate_up, mlp_down; /* f32 [2I,H] (gate rows, then up rows), [H,I] */
    size_t bytes;                      /* of all frozen weights above, which stand in one piece from norm1 on */
    void *home;                        /* where they are when this layer is a guest, see models/guests.c; else NULL */
} espi_layer;

/* One allocation of the context, owned by the model. */
typedef struct espi_block {
    espi_purpose purpose;
    void *p;
    size_t bytes;
} espi_block;

/* What the passes of one forward/backward pair share; see contract/decoder.h. */
typedef struct espi_decoder_saved espi_decoder_saved;

/* LoRA as stated for one target: rank 0 = not trained. */
typedef struct espi_lora_spec {
    int64_t r;
    double scale;
} espi_lora_spec;
enum { ESPI_T_Q, ESPI_T_K, ESPI_T_V, ESPI_T_O, ESPI_T_GATE_UP, ESPI_T_DOWN, ESPI_T_COUNT };

struct esp_model {
    esp_ctx *ctx;
    espi_config config;
    esp_model_config options; /* defaults filled in; adapter_dir not kept */
    espi_lora_spec lora[ESPI_T_COUNT];
    espi_share share; /* which experts the layers below hold */

    espi_mat embed, head; /* stored dtype [V,H]; the same matrix when tied */
    const float *final_norm;
    espi_layer *layers;
    double *inv_freq; /* [D/2], in host memory, where the op reads it */

    espi_room weights; /* all frozen bytes: one block of the context, and in a device's host memory the embedding and guests, see load.c */
    void *guest_place; /* at the beginning of that block, for layers whose home is the host's memory; guest_bytes long */
    size_t guest_bytes;
    espi_block adapter; /* parameters, gradients, then what ranks add to them */
    esp_param *params;  /* the public view of the adapter, in canonical order: layer, then q k v o gate_up down, A before B */
    int64_t n_params;
    espi_sum *sums; /* [n_sums] the gradients that ranks add up; none where this one is alone */
    int64_t n_sums;
    int64_t sum_values;             /* of work memory for that */
    void *sum_scratch, *sums_begin; /* that memory; where what this rank adds begins */
    size_t sums_bytes;

    espi_room room; /* of activations; grows between calls only */
    espi_arena arena;
    espi_decoder_saved *saved;  /* bookkeeping of the last training forward */
    bool saved_valid;           /* ... which a backward may still read */
    espi_mark loss_mark;        /* the arena behind what the last forward left: losses and backwards start here */
    const int64_t *route_flips; /* of the last forward, in tensor memory; NULL: none */
    int64_t routes_replayed;    /* ... and how many pairs of a token and a layer it replayed */
    bool adapter_on;
    esp_probe_fn probe;
    void *probe_user;
};

/* Bytes of the frozen weights and of the adapter, from the config alone: what models/load.c will take, exactly. */
typedef struct espi_weight_plan {
    size_t dense, experts, adapter, gradients; /* the place of guests is counted with the experts */
    size_t staging;                            /* while loading only */
    size_t host;                               /* of a device: frozen weights that stay in the host's memory */
} espi_weight_plan;
/* Of a run that takes `rest` beside weights, adapter and gradients: the larger of that and of loading. */
static inline size_t espi_weight_plan_peak(const espi_weight_plan *plan, size_t rest) {
    const size_t weights = plan->dense + plan->experts, whole = weights + plan->adapter + plan->gradients + rest;
    return whole > weights + plan->staging ? whole : weights + plan->staging;
}
esp_status espi_weight_plan_make(espi_weight_plan *out, esp_ctx *ctx, const espi_config *config, const esp_model_config *options,
                                 const espi_lora_spec lora[ESPI_T_COUNT]);

/* models/skeleton.c: model->layers with every shape, format and LoRA rank filled in from config, options and lora, and no data yet; embed
 * and head likewise.  Enough to walk a pass dry; the loader and the adapter then fill the pointers. */
esp_status espi_model_skeleton(esp_model *model);
void espi_model_skeleton_free(esp_model *model);
/* models/plan.c: such a model of a folder, for plans.  espi_model_outline_free() also where this fails. */
esp_status espi_model_outline(esp_model *model, esp_ctx *ctx, const char *dir, const esp_model_config *config);
void espi_model_outline_free(esp_model *model);

/* models/guests.c: whether a layer is at home in the host's memory; whoever has filled the weights of a layer puts them there, and whoever
 * reads them outside of a pass fetches them. */
bool espi_is_guest(const esp_model *model, int64_t layer);
esp_status espi_guest_put_home(const esp_model *model, int64_t layer);
esp_status espi_guest_fetch(const esp_model *model, int64_t layer);
/* A pass that goes through the layers by `step` says at its beginning that the guests from its first layer on may come, enters and leaves
 * every layer.  Nothing happens while an arena is dry or idle. */
esp_status espi_guests_bring(const esp_model *model, const espi_arena *arena, int64_t layer, int step);
esp_status espi_guest_enter(const esp_model *model, const espi_arena *arena, int64_t layer);
esp_status espi_guest_leave(const esp_model *model, const espi_arena *arena, int64_t layer, int step);

/* models/load.c: the block of a skeleton's frozen weights, not yet filled.  map: the table of double quantisation, or NULL; lut: that of the
 * experts' values where it lies on a device, or NULL. */
esp_status espi_model_take_weights(esp_model *model, float **map, float **lut);
/* models/fingerprint.c: tells these weights from others, and is the same on any number of ranks.  Collective. */
esp_status espi_model_fingerprint(uint64_t *hash, const esp_model *model);
/* models/model.c: all that a model has beside its weights. */
esp_status espi_model_finish(esp_model *model);

/* models/load.c: layers, embed, head, norms, stacks from the folder.  Peak = the weights + one staging buffer of <= 64 MiB. */
esp_status espi_model_load_weights(esp_model *model, const char *dir);

/* models/adapter_init.c: allocates parameters and gradients, names them, draws A (uniform in +-1/sqrt(in), Philox keyed by seed, layer,
 * expert, matrix), B = 0. */
esp_status espi_model_init_adapter(esp_model *model);
/* Bytes of the two halves of that block, from a skeleton. */
void espi_adapter_bytes(size_t *parameters, size_t *gradients, esp_model *model, size_t real_size);
/* The bookkeeping of model->params (the tensors themselves are the block model->adapter). */
void espi_adapter_names_free(esp_model *model);
/* A of one target for `experts` experts from `first` on (one for attention): real [experts,r,in], uniform in +-1/sqrt(in). */
void espi_lora_draw(void *a, esp_dtype real, uint64_t seed, int64_t layer, int target, int64_t first, int64_t experts, int64_t r,
                    int64_t in);
/* The same into tensor memory. */
esp_status espi_lora_draw_into(esp_ctx *ctx, void *a, uint64_t seed, int64_t layer, int target, int64_t first, int64_t experts, int64_t r,
                               int64_t in);

/* io/adapter.c: rank, scale and targets that a PEFT folder states, before a model exists. */
esp_status espi_adapter_read_spec(espi_lora_spec lora[ESPI_T_COUNT], float *alpha, bool *rslora, const char *dir, const espi_config *config,
                                  const esp_adapter_config *reading);

#endif
