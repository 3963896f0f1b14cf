/* What a model family is: how its config.json reads, how its tensors are called, and which rules its layers follow.
 * A family is one file here and one row in families.def; nothing else in the library asks for a family's name. */
#ifndef ESPI_MODELS_FAMILY_H
#define ESPI_MODELS_FAMILY_H

#include "core/ctx.h"
#include "espalier/model.h"
#include "io/chat.h"
#include "kernels/ops.h"

#include <jansson.h>

/* A layer's feed-forward part. */
typedef enum espi_mlp_kind { ESPI_MLP_DENSE, ESPI_MLP_MOE } espi_mlp_kind;

/* How routed experts lie in the checkpoint; stated by the family and the tensor names present, never by a shape. */
typedef enum espi_expert_layout {
    ESPI_EXPERTS_PER_EXPERT, /* expert_gate, expert_up, expert_down: one matrix [out,in] each */
    ESPI_EXPERTS_JOINED,     /* expert_gate_up [2I,H] and joined_down [H,I]: rows of gate and up as in the stack */
    ESPI_EXPERTS_FUSED,      /* fused_gate_up, fused_down: plain values, in the family's espi_fused_order */
    ESPI_EXPERTS_BLOCKS,     /* MXFP4: fused_gate_up, fused_down with "_blocks" [E,out,in/32,16] and "_scales" [E,out,in/32] behind */
    ESPI_EXPERTS_LAYOUTS
} espi_expert_layout;

/* The order of a family's fused tensors of plain values. */
typedef enum espi_fused_order {
    ESPI_FUSED_OUT_IN, /* gate_up [E,2I,H], down [E,H,I] */
    ESPI_FUSED_IN_OUT, /* gate_up [E,H,2I], down [E,I,H] */
    ESPI_FUSED_EITHER  /* both occur in published files; that of the tensor that is not square holds for both */
} espi_fused_order;

/* A token that a text model cannot take: its id stands under `key` at the top of config.json, or is `fallback` (key NULL: always). */
typedef struct espi_refused_token {
    const char *key;
    int64_t fallback;
} espi_refused_token;
#define ESPI_REFUSED_TOKENS 5

struct espi_family;

/* config.json with every alias resolved and every number checked. */
typedef struct espi_config {
    const struct espi_family *family;
    uint64_t hash; /* of the file */
    int64_t layers, hidden, heads, kv_heads, head_dim, vocab, max_position;
    int64_t experts, top_k, expert_width; /* expert_width: I of a routed expert */
    int64_t dense_width;                  /* I of a dense layer */
    espi_mlp_kind *mlp_kind;              /* [layers], owned */
    int64_t moe_layers;
    bool renormalise;    /* norm_topk_prob */
    bool attention_bias; /* q, k and v have biases */
    bool output_bias;    /* o has one */
    bool qk_norm;
    bool tied_head;
    double norm_eps, aux_coef;
    int64_t rotary_dim; /* how many values of a head are rotated: the first; head_dim for most */
    int64_t *window;    /* [layers], owned: keys a query sees, itself included; 0 = all */
    bool sinks;         /* one more logit per head in the softmax's denominator */
    bool whole_qk_norm; /* q/k norm over all heads at once, not per head */
    double clip_qkv;    /* q, k, v limited to +- this after the norm; 0 = not */
    bool router_bias, router_sigmoid, router_correction;
    double router_scaling; /* factor on the gate weights; 1 = none */
    bool expert_bias;      /* gate_up and down have biases */
    espi_glu glu;
    int64_t shared_width;                                 /* I of the expert that sees every token; 0 = none */
    double rope_theta, rope_factor;                       /* rope_factor: inverse frequencies are divided by it ("linear"); 1 = none */
    bool yarn;                                            /* blend the plain and the divided frequencies (formats-and-numerics 4.3) */
    double yarn_beta_fast, yarn_beta_slow, yarn_original; /* yarn_original: the context length before scaling */
    bool yarn_truncate;
    double rope_attention;                           /* factor on cos and sin; 1 = none */
    int64_t bos_id, eos_id, pad_id;                  /* -1 = not stated; of a list the first */
    int64_t refused[ESPI_REFUSED_TOKENS], n_refused; /* ids that stand for something other than text */
    esp_dtype stored_dtype; /* in which embedding, head and plain experts are held; what the file has narrower is widened */
    bool quantised;         /* config.json has a quantization_config of bitsandbytes; the tensors present decide what is quantised */
    bool fp4;               /* ... which says FP4: the default form of the experts */
    bool mxfp4;             /* config.json has one of MXFP4: the experts are kept as they are */
    int64_t unused_layers;  /* behind the model's own in the checkpoint: layers that predict further tokens, left out */
} espi_config;

/* How many weights the q or k norm has, of a projection to `heads` heads. */
static inline int64_t espi_qk_norm_size(const espi_config *c, int64_t heads) {
    return c->whole_qk_norm ? heads * c->head_dim : c->head_dim;
}

/* A token that the family's text model refuses. */
static inline bool espi_token_refused(const espi_config *c, int32_t id) {
    for (int64_t i = 0; i < c->n_refused; i++)
        if (c->refused[i] == id) return true;
    return false;
}

typedef struct espi_family {
    const char *name; /* model_type */
    /* Fills the family's part of `config` from the parsed object that holds the text model's settings: everything about experts and
     * layer kinds.  What config.json says for every family has been read, with the defaults below.  path: for error sentences. */
    esp_status (*read_config)(espi_config *config, const json_t *root, const char *path);
    const char *nested; /* the key of that object inside config.json; NULL: it is the whole */
    /* What holds where config.json does not say: */
    double norm_eps, rope_theta;
    double rotary_share; /* partial_rotary_factor; 0: whole heads, and nothing else is known of this family */
    int64_t max_position;
    bool attention_bias;
    esp_dtype stored_dtype; /* NONE: f32 */
    /* Tensor names; %d where the layer number goes, a second %d where the expert's does.  NULL: the family has none. */
    const char *embed, *final_norm, *head;
    const char *norm1, *norm2, *q, *k, *v, *o, *q_norm, *k_norm; /* without ".weight" / ".bias" */
    const char *sinks;                                           /* complete */
    const char *router, *router_correction;                      /* without ".weight" / ".bias"; complete */
    const char *dense_gate, *dense_up, *dense_down, *shared_gate, *shared_up, *shared_down;
    const char *expert_gate, *expert_up, *expert_down; /* per expert, without ".weight" */
    const char *expert_gate_up, *joined_down;          /* per expert, gate and up in one, without ".weight" / ".bias" */
    const char *fused_gate_up, *fused_down;            /* fused, complete names; their biases have "_bias" behind */
    espi_fused_order fused_order;
    const char *experts_module; /* what PEFT wraps when it trains the fused stacks */
    /* The published model class holds a layer's experts as one parameter (gpt_oss, qwen3_vl_moe).  Serving software then wants fused
     * adapters; and as those classes have had the parameter in both orders, PEFT's version does not say which way round an adapter is. */
    bool fused_experts;
    /* Some versions write `renamed_from` in tensor names as `renamed_to`. */
    const char *renamed_from, *renamed_to;
    const char *skipped; /* beginning of the names of tensors that are no part of the text model */
    espi_refused_token refused[ESPI_REFUSED_TOKENS];
    int n_refused;
    espi_chat_format chat; /* how messages become tokens */
} espi_family;

/* The names that most families share, for the row of a family: `model` and `layer` are the beginnings of its names, `experts` that of its
 * experts' (each a string with its dot behind). */
#define ESPI_NAMES_DECODER(model, layer)                                                                                                   \
    .embed = model "embed_tokens.weight", .final_norm = model "norm.weight", .head = "lm_head.weight", .norm1 = layer "input_layernorm",   \
    .norm2 = layer "post_attention_layernorm", .q = layer "self_attn.q_proj", .k = layer "self_attn.k_proj",                               \
    .v = layer "self_attn.v_proj", .o = layer "self_attn.o_proj"
#define ESPI_NAMES_QK_NORM(layer) .q_norm = layer "self_attn.q_norm", .k_norm = layer "self_attn.k_norm"
#define ESPI_NAMES_DENSE(mlp) .dense_gate = mlp "gate_proj", .dense_up = mlp "up_proj", .dense_down = mlp "down_proj"
#define ESPI_NAMES_EXPERTS(experts)                                                                                                        \
    .expert_gate = experts "%d.gate_proj", .expert_up = experts "%d.up_proj", .expert_down = experts "%d.down_proj"
#define ESPI_NAMES_FUSED(experts) .fused_gate_up = experts "gate_up_proj", .fused_down = experts "down_proj"

#define ESPI_FAMILY(name) extern const espi_family espi_family_##name;
#include "models/families.def"
#undef ESPI_FAMILY

/* NULL when not known; espi_family_list() gives the known names, comma-separated. */
const espi_family *espi_family_find(const char *model_type);
const char *espi_family_list(void);

/* io/hf_config.c: reads DIR/config.json.  ESP_ERR_IO, ESP_ERR_FORMAT (names key, got, expected), ESP_ERR_UNSUPPORTED (family, activation,
 * rope type). */
esp_status espi_config_read(espi_config *config, const char *dir);
void espi_config_free(espi_config *config);

/* For read_config: the value of `key`, or of its alias (NULL: none); null = absent; both there and different is ESP_ERR_FORMAT.
 * Absent: `fallback`, where that is -1 (count) or NAN (real) ESP_ERR_FORMAT. */
esp_status espi_json_count(int64_t *out, const json_t *root, const char *path, const char *key, const char *alias, int64_t fallback);
esp_status espi_json_real(double *out, const json_t *root, const char *path, const char *key, const char *alias, double fallback);
esp_status espi_json_flag(bool *out, const json_t *root, const char *path, const char *key, bool fallback);
/* For a family of which one value only is offered: any other is ESP_ERR_UNSUPPORTED with `why`. */
esp_status espi_json_only(const json_t *root, const char *path, const char *key, double only, const char *why);

/* For read_config.  Every layer is MoE until one of these says otherwise.  Qwen's rule: layer l is MoE iff it is not listed in
 * mlp_only_layers and (l+1) is a multiple of decoder_sparse_step; dense layers are intermediate_size wide. */
void espi_config_set_dense(espi_config *config, int64_t layer);
esp_status espi_config_sparse_layers(espi_config *config, const json_t *root, const char *path);

#endif
