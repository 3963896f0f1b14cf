/* What a model family is: how its config.json reads, how its tensors are called, and which rules its layers follow.
 * A family is one file here and one row in families.def; nothing else in the library asks for a family's name. */
#ifndef ESPI_MODELS_FAMILY_H
#define ESPI_MODELS_FAMILY_H

#include "core/ctx.h"
#include "espalier/model.h"
#include "kernels/ops.h"

#include <jansson.h>

/* A layer's feed-forward part. */
typedef enum espi_mlp_kind { ESPI_MLP_DENSE, ESPI_MLP_MOE } espi_mlp_kind;

/* How routed experts lie in the checkpoint; stated by the family and the tensor names present, never by a shape. */
typedef enum espi_expert_layout {
    ESPI_EXPERTS_PER_EXPERT, /* experts.{e}.gate_proj|up_proj|down_proj.weight, [out,in] */
    ESPI_EXPERTS_FUSED       /* experts.gate_up_proj [E,2I,H], experts.down_proj [E,H,I] */
} espi_expert_layout;

struct espi_family;

/* config.json with every alias resolved and every number checked. */
typedef struct espi_config {
    const struct espi_family *family;
    int64_t layers, hidden, heads, kv_heads, head_dim, vocab, max_position;
    int64_t experts, top_k, expert_width; /* expert_width: I of a routed expert */
    int64_t dense_width;                  /* I of a dense layer */
    espi_mlp_kind *mlp_kind;              /* [layers], owned */
    int64_t moe_layers;
    bool renormalise;    /* norm_topk_prob */
    bool attention_bias; /* q, k, v and o have biases */
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
    double rope_attention;          /* factor on cos and sin; 1 = none */
    int64_t bos_id, eos_id, pad_id; /* -1 = not stated; of a list the first */
    esp_dtype stored_dtype;         /* in which embedding, head and plain experts are held; what the file has narrower is widened */
    bool quantised; /* config.json has a quantization_config of bitsandbytes; the tensors present decide what is quantised */
} espi_config;

typedef struct espi_family {
    const char *name; /* model_type */
    /* Fills the family's part of `config` from the parsed file: everything about experts and layer kinds.  path: for error sentences. */
    esp_status (*read_config)(espi_config *config, const json_t *root, const char *path);
    /* Tensor names; %d where the layer number goes, a second %d where the expert's does. */
    const char *embed, *final_norm, *head;
    const char *norm1, *norm2, *q, *k, *v, *o, *q_norm, *k_norm; /* without ".weight" / ".bias" */
    const char *router, *dense_gate, *dense_up, *dense_down;
    const char *expert_gate, *expert_up, *expert_down; /* per expert, without ".weight" */
    const char *fused_gate_up, *fused_down;            /* fused, complete names */
    const char *experts_module;                        /* what PEFT wraps when it trains the fused stacks */
    /* The published model class holds a layer's experts as one parameter (gpt_oss, qwen3_vl_moe).  Serving software then wants fused
     * adapters; and as those classes have had the parameter in both orders, PEFT's version does not say which way round an adapter is. */
    bool fused_experts;
} espi_family;

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

#endif
