/* Argument structs of the ops.  This file is the specification that kernels/ref implements in plain C.
 *
 * Dimensions: T tokens, H hidden, E experts, K top-k, S = T*K routed rows, I expert width, R LoRA rank, V vocabulary, D head dim.
 * `void *` fields marked "real" hold float, or double under the ref64 backend: parameters, their gradients, moments, statistics, routing
 * weights.  Those marked "act" hold activations and their gradients: the same type as real on a CPU, bf16 on a GPU.  On a GPU every pointer
 * of an argument struct is to device memory, unless said.  All arrays are dense row-major and do not overlap unless said.  Every op says of each output whether it overwrites or adds (rule 7: parameter gradients add, activation gradients
 * overwrite; what is added to the gradient of a LoRA, a router or sinks is one sum over the rows, formed apart from what is there: so it is the
 * same for every way in which batches are added up).  T = 0 is legal everywhere and does nothing.
 *
 * Contract on bits (CPU): a row's result does not depend on how many other rows there are, on their content, or on the thread count. */
#ifndef ESPI_KERNELS_OPS_H
#define ESPI_KERNELS_OPS_H

#include "espalier/tensor.h"
#include "kernels/plain.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A frozen row-major matrix in the dtype it is stored in: F32, BF16 or F16. */
typedef struct espi_mat {
    const void *data;
    esp_dtype dtype;
    int64_t rows, cols;
} espi_mat;

/* A low-rank branch: y += scale * (x A^T) B^T.  r = 0: absent.  A real [r,in], B real [out,r]; for experts [E,r,in] and [E,out,r].
 * d_a, d_b: gradients, added to; NULL in a forward. */
typedef struct espi_lora {
    const void *a, *b;
    void *d_a, *d_b;
    int64_t r;
    double scale;
} espi_lora;

/* E frozen matrices [rows,cols], each cut into `parts` matrices of rows/parts rows that are quantised on their own (gate and up: 2,
 * down: 1).  ESP_NF4, ESP_FP4: part p of expert e is flattened row by row; element i has its code in nibble i of the part's bytes (even i:
 * HIGH nibble, as bitsandbytes packs) and its scale at block i / 64.  ESP_Q_NONE: plain matrices in `dtype`.
 * ESP_MXFP4: element i has its code in nibble i of the part's bytes, even i in the LOW nibble, and its scale, 2^(scales - 127), at block i
 * / 32; cols is a multiple of 32, so blocks lie within rows.  value = lut[code] * 2^(scale - 127), scale byte 0 being the subnormal 2^-127.
 * The other formats: value = lut[code] * absmax(block), one f32 rounding.  absmax: f32 from `absmax`, or, where absmax8 != NULL (double
 * quantisation), f32(map[absmax8[b]] * nested[b / 256]) + offset, with b, nested and offset those of the part. */
typedef struct espi_stack {
    esp_qformat format;
    esp_dtype dtype; /* of plain matrices */
    int64_t experts, rows, cols;
    int parts;
    const void *data;       /* codes, or plain values */
    size_t part_bytes;      /* from one part to the next: ceil(n/2) for codes, n * size for plain; n = rows/parts*cols */
    const float *absmax;    /* [experts*parts, part_blocks] */
    const uint8_t *absmax8; /* the same shape, or NULL */
    const float *nested;    /* [experts*parts, part_nested] */
    const float *offset;    /* [experts*parts] */
    const uint8_t *scales;  /* [experts*parts, part_blocks] E8M0, of MXFP4; 255 never occurs */
    int64_t part_blocks;    /* ceil(n / 64); of MXFP4 n / 32 */
    int64_t part_nested;    /* ceil(part_blocks / 256) */
    const float *lut;       /* [16] value of each code */
    const float *map;       /* [256] dynamic map of double quantisation */
    const void *packed;     /* NULL, or the experts one after the other in the backend's own form (espi_backend.pack), and data, absmax,
                               absmax8, nested, offset and scales are NULL */
} espi_stack;
#define ESPI_QBLOCK 64
#define ESPI_NESTED_BLOCK 256
#define ESPI_MXBLOCK 32

/* Which rows an expert works on: rows offsets[e] .. offsets[e+1]-1 of the routed order, ascending by token within an expert.
 * Written by the op `dispatch`. */
typedef struct espi_routing {
    int64_t tokens, experts, top_k;
    const int32_t *offsets;   /* [E+1] */
    const int32_t *row_token; /* [S] token of a routed row */
    const int32_t *slot_row;  /* [T,K] routed row of a slot */
    const void *row_weight;   /* real [S] gate weight of a routed row */
    /* Of the batch that these rows are a part of, where a rank holds some of its experts; 0: the rows are all of it. */
    int64_t batch_rows, batch_experts;
} espi_routing;
/* At most so many rows an expert in the mean of the whole batch?  Kernels that differ in their bits are chosen by this, or for each expert by
 * its own rows, and by nothing else: ranks that share the experts then choose what one rank does.  A call has all rows that an expert has of
 * a batch, or none, and rows of one batch only. */
static inline bool espi_routing_is_few(const espi_routing *r, int64_t mean) {
    const int64_t rows = r->batch_experts > 0 ? r->batch_rows : r->tokens * r->top_k;
    return rows <= mean * (r->batch_experts > 0 ? r->batch_experts : r->experts);
}

/* Packed sequences: queries of sequence s are rows cu_q[s] .. cu_q[s+1]-1 of q; its keys are rows k_start[s] .. k_start[s]+k_len[s]-1 of k
 * and v.  The last query sees the last key: query i of n sees keys 0 .. k_len - n + i.  In training k_start = cu_q, k_len = n.
 * A sequence may have a prefix that it shares with others: rows prefix_start[s] .. prefix_start[s]+prefix_len[s]-1 of k and v stand before
 * its own keys, and every query sees them.  Key j of the prefix is at place j, own key j at place prefix_len + j; windows count in places.
 * In training a prefix is the whole of an earlier sequence that has none: prefix_start = cu_q[p], prefix_len = cu_q[p+1] - cu_q[p]. */
typedef struct espi_spans {
    const int32_t *cu_q; /* [n_seqs+1] */
    const int32_t *k_start, *k_len;
    int32_t n_seqs;
    int64_t tokens;                           /* cu_q[n_seqs], for those who cannot read it */
    const int32_t *prefix_start, *prefix_len; /* both [n_seqs], prefix_len 0 = none; or both NULL: no sequence has one */
} espi_spans;

typedef struct espi_embed_fwd {
    void *out; /* act [T,H] overwrite: table[ids[t]] */
    const int32_t *ids;
    espi_mat table; /* [V,H] */
    int64_t tokens;
} espi_embed_fwd;

typedef struct espi_embed_bwd {
    void *d_table;     /* real [V,H] add, in token order */
    const void *d_out; /* act [T,H] */
    const int32_t *ids;
    int64_t tokens, vocab, hidden;
} espi_embed_bwd;

typedef struct espi_zero {
    void *out; /* [bytes] overwrite: 0, whatever the dtype */
    size_t bytes;
} espi_zero;

typedef struct espi_add {
    void *out; /* act [n] overwrite: a + b; may be a or b */
    const void *a, *b;
    int64_t n;
} espi_add;

/* out[to[i]] += x[i], in order: rows named one after the other are summed in real and rounded once. */
typedef struct espi_rows_add {
    void *out;         /* act [.,H]: the rows named ADD, others left */
    const void *x;     /* act [n,H] */
    const int32_t *to; /* [n] a row may be named more than once */
    int64_t n, hidden;
} espi_rows_add;

/* out[i] = x[from[i]]. */
typedef struct espi_rows_take {
    void *out;           /* act [n,H] overwrite */
    const void *x;       /* act [.,H] */
    const int32_t *from; /* [n] */
    int64_t n, hidden;
} espi_rows_take;

/* total += part 0, then part 1, ..: what several ranks have made of one gradient. */
typedef struct espi_parts_add {
    void *total;       /* real [n] ADDS, one rounding a part */
    const void *parts; /* real [n_parts,n] */
    int64_t n, n_parts;
} espi_parts_add;

/* y = w * (x * rstd), rstd = 1/sqrt(mean(x^2) + eps), over rows of n values. */
typedef struct espi_rmsnorm_fwd {
    void *y;    /* act [rows,n] overwrite */
    void *rstd; /* real [rows] overwrite */
    const void *x;
    const float *w; /* [n] */
    int64_t rows, n;
    double eps;
} espi_rmsnorm_fwd;

/* g = d_y*w; d_x = rstd*(g - xhat*mean(g*xhat)) + d_add; d_w += sum over rows of d_y*xhat. */
typedef struct espi_rmsnorm_bwd {
    void *d_x; /* act [rows,n] overwrite; may be d_y or d_add */
    void *d_w; /* real [n] add, or NULL: frozen */
    const void *d_y, *x, *rstd;
    const void *d_add; /* act [rows,n] gradient of the residual path, or NULL */
    const float *w;
    int64_t rows, n;
} espi_rmsnorm_bwd;

typedef struct espi_rope_table {
    void *cos, *sin; /* real [T,half] overwrite: factor*cos(pos*inv_freq), factor*sin(..); the product in double */
    const int32_t *positions;
    const double *inv_freq; /* [half], in host memory also where the rest is on a device */
    double factor;
    int64_t tokens, half;
} espi_rope_table;

/* Half-split rotation in place: pairs (j, j+half) of the first 2*half values of each head, the rest is left.  The backward is the
 * transpose. */
typedef struct espi_rope {
    void *x;               /* act [T,heads,head_dim] in place */
    const void *cos, *sin; /* real [T,half] */
    int64_t tokens, heads, half, head_dim;
} espi_rope;

/* y = x limited to [-limit, limit].  The gradient passes where |x| <= limit, the limits included. */
typedef struct espi_clamp_fwd {
    void *y;       /* act [n] overwrite; may be x */
    const void *x; /* act [n] */
    int64_t n;
    double limit;
} espi_clamp_fwd;

typedef struct espi_clamp_bwd {
    void *d_x; /* act [n] overwrite; may be d_y */
    const void *d_y, *x;
    int64_t n;
    double limit;
} espi_clamp_bwd;

/* Puts the new keys and values of each sequence behind those it has: token i of the n new ones of sequence s goes to cache row
 * k_start[s] + k_len[s] - n + i. */
typedef struct espi_kv_append {
    void *k_cache, *v_cache; /* act [rows,width]: the rows named are overwritten, others left */
    const void *k, *v;       /* act [Tq,width] */
    espi_spans spans;
    int64_t width; /* Hk*D */
} espi_kv_append;

/* Causal grouped-query attention by online softmax; query head h reads kv head h/(Hq/Hk).  S_ij = scale * q_i.k_j.
 * window w > 0: a query sees the last w keys only, itself included.  sinks: one more, unscaled logit per head in the denominator alone:
 * lse_i = log(sum_j e^S_ij + e^sink). */
typedef struct espi_attention_fwd {
    void *out; /* act [Tq,Hq,D] overwrite */
    void *lse; /* real [Tq,Hq] overwrite: log-sum-exp of the scaled scores */
    const void *q, *k, *v;
    const float *sinks; /* [Hq] or NULL */
    int64_t window;     /* 0 = all keys */
    espi_spans spans;
    int64_t heads, kv_heads, head_dim;
    double scale;
} espi_attention_fwd;

/* P = exp(S - lse); delta_i = d_out_i.out_i; dS = P (d_out.v - delta); d_sink -= sum_i e^(sink - lse_i) delta_i.
 * Training spans only (k_start = cu_q).  d_k and d_v of a row that others have as their prefix: sums over its own sequence's queries, then
 * over those of its users, in the order of the sequences. */
typedef struct espi_attention_bwd {
    void *d_q, *d_k, *d_v; /* act, overwrite */
    void *d_sinks;         /* real [Hq] add, or NULL: frozen */
    const void *d_out, *q, *k, *v, *out, *lse;
    const float *sinks; /* [Hq] or NULL */
    int64_t window;     /* 0 = all keys */
    espi_spans spans;
    int64_t heads, kv_heads, head_dim;
    double scale;
} espi_attention_bwd;

/* y = x W^T + bias + scale (x A^T) B^T. */
typedef struct espi_linear_fwd {
    void *y;           /* act [T,out] overwrite */
    void *u;           /* act [T,r] overwrite: x A^T; NULL when lora.r = 0 */
    const void *x;     /* act [T,in] */
    espi_mat w;        /* [out,in] */
    const float *bias; /* [out] or NULL */
    espi_lora lora;
    int64_t tokens;
} espi_linear_fwd;

/* q = scale d_y B; d_b += scale d_y^T u; d_a += q^T x; d_x = d_y W + q A. */
typedef struct espi_linear_bwd {
    void *d_x; /* act [T,in]: overwrite, or add when accumulate; NULL: not wanted */
    bool accumulate;
    const void *d_y, *x, *u;
    espi_mat w;
    espi_lora lora;
    int64_t tokens;
} espi_linear_bwd;

/* Which scores a router ranks by, and what a weight is. */
typedef struct espi_router_rule {
    bool renormalise; /* divide the K weights by their sum */
    bool sigmoid;     /* scores are sigmoid(logit), not softmax over all E */
    double scaling;   /* factor on the weights at the end; 0 = 1 */
} espi_router_rule;

/* logits = x W^T + bias (f32 weight, no rounding in between); scores p = softmax over all E, or sigmoid; the top-K by logit, or by sigmoid
 * + correction (ties to the lower index); weights scaling * p_k or, when renormalise, scaling * p_k / (sum of the selected, + 1e-20 where
 * sigmoid).  idx ascending within a token.  A logit that is not finite: ESP_ERR_NONFINITE.
 * forced: a selection made before (routing replay).  A token whose first forced id is -1 selects by itself; of others the forced ids, which
 * the caller has checked (ascending, different, below E), become idx, and all else is computed from the logits as for any selection.
 * Ids may be given as -2 - id: such a token counts as no flip, whatever it would have selected. */
typedef struct espi_router_fwd {
    void *logits;            /* real [T,E] overwrite */
    void *lse;               /* real [T] overwrite: log-sum-exp of the logits */
    int32_t *idx;            /* [T,K] overwrite */
    void *weight;            /* real [T,K] overwrite */
    int64_t *counts;         /* [E] add: selections, or NULL */
    double *p_sum;           /* [E] add: probabilities, in token order, or NULL */
    double *z_sum;           /* [1] add: sum of lse^2, or NULL */
    const int32_t *forced;   /* [T,K] or NULL: no token is forced; may be idx itself */
    int64_t *flips;          /* [1] add: forced tokens that would have selected another set, or NULL */
    const void *x;           /* act [T,H] */
    espi_mat w;              /* [E,H] */
    const float *bias;       /* [E] added to the logits, or NULL */
    const float *correction; /* [E] added for the ranking alone (sigmoid), or NULL */
    int64_t tokens, top_k;
    espi_router_rule rule;
} espi_router_fwd;

/* From the gradient of the K weights (and the two auxiliary losses) to the logits, then to x: a frozen router still passes it on.  With
 * G = sum over k of weight_k d_weight_k:  softmax: weight_e d_weight_e - p_e G for all e, renormalised weight_e (d_weight_e - G / scaling);
 * sigmoid: that of the selected times 1 - sigmoid, without p_e G.
 * aux, with f_e = aux_counts[e]: d_logits[t,e] += aux_coef * p_te * (f_e - sum_j p_tj f_j);  z: d_logits[t,e] += z_coef * 2 * lse_t * p_te
 * (p: softmax, also where rule.sigmoid). */
typedef struct espi_router_bwd {
    void *d_x;            /* act [T,H]: ADDS (the experts wrote it first) */
    void *d_w;            /* real [E,H] add, or NULL: frozen */
    void *d_logits;       /* real [T,E] overwrite */
    const void *d_weight; /* real [T,K] */
    const void *logits, *lse, *weight, *x;
    const int32_t *idx;
    espi_mat w;
    int64_t tokens, top_k;
    espi_router_rule rule;
    const int64_t *aux_counts; /* [E] selections of each expert, or NULL: no load-balancing loss */
    double aux_coef, z_coef;
} espi_router_bwd;

/* Sorts the slots by expert, then token.  offsets, row_token, slot_row, row_weight as in espi_routing. */
typedef struct espi_dispatch {
    int32_t *offsets, *row_token, *slot_row;
    void *row_weight; /* real [S] */
    const int32_t *idx;
    const void *weight; /* real [T,K] */
    int64_t tokens, experts, top_k;
} espi_dispatch;

/* Where gate and up stand in the 2I values of a row, and what is made of them.
 * plain: act = silu(g) * u.  clamped (gpt-oss): g' = min(g, limit), u' = u limited to +-limit, act = (u' + 1) g' sigmoid(alpha g'); no
 * gradient passes at a limit itself. */
typedef struct espi_glu {
    bool interleaved; /* gate 2j, up 2j+1; else gate 0..I-1, then up */
    bool clamped;
    double limit, alpha;
} espi_glu;

/* Row s of token t = row_token[s], expert e: gu_s = W_e x_t + bias_e + scale B_e (A_e x_t), act_s = glu(gu_s).  Rows of W as espi_glu
 * says. */
typedef struct espi_gate_up_fwd {
    void *gu;          /* act [S,2I] overwrite */
    void *act;         /* act [S,I] overwrite */
    void *u;           /* act [S,R] overwrite, or NULL when lora.r = 0 */
    const void *x;     /* act [T,H] */
    espi_stack w;      /* [E,2I,H] */
    const float *bias; /* [E,2I] or NULL */
    espi_lora lora;
    espi_routing routing;
    espi_glu glu;
} espi_gate_up_fwd;

/* d_rows_s = W_e^T d_gu_s + A_e^T q_s, q_s = scale B_e^T d_gu_s; dB_e += scale sum d_gu_s u_s^T; dA_e += sum q_s x_t^T. */
typedef struct espi_gate_up_bwd {
    void *d_rows; /* act [S,H] overwrite */
    const void *d_gu, *x, *u;
    espi_stack w;
    espi_lora lora;
    espi_routing routing;
} espi_gate_up_bwd;

typedef struct espi_swiglu_fwd {
    void *act;      /* act [rows,I] overwrite */
    const void *gu; /* act [rows,2I] */
    int64_t rows, width;
    espi_glu glu;
} espi_swiglu_fwd;

typedef struct espi_swiglu_bwd {
    void *d_gu; /* act [rows,2I] overwrite; may be gu */
    const void *d_act, *gu;
    int64_t rows, width;
    espi_glu glu;
} espi_swiglu_bwd;

/* y_s = W_e act_s + bias_e + scale B_e (A_e act_s), not yet weighted. */
typedef struct espi_down_fwd {
    void *y; /* act [S,H] overwrite */
    void *u; /* act [S,R] overwrite, or NULL */
    const void *act;
    espi_stack w;      /* [E,H,I] */
    const float *bias; /* [E,H] or NULL */
    espi_lora lora;
    espi_routing routing;
} espi_down_fwd;

/* From the gradient of the block's output to that of gu, and the gate gradient in its exact form (no stored y, no division):
 * act_s = glu(gu_s);  a_s = W_e^T d_out_t + scale A_e^T (B_e^T d_out_t);  d_row_weight_s = act_s . a_s + bias_e . d_out_t;
 * d_gu_s = glu'(gu_s) (w_s a_s);  LoRA gradients from w_s d_out_t and act_s. */
typedef struct espi_down_bwd {
    void *d_gu;         /* act [S,2I] overwrite */
    void *d_row_weight; /* real [S] overwrite */
    const void *d_out;  /* act [T,H] gradient of the block's output */
    const void *gu, *u; /* act [S,2I], act [S,R] as the forward wrote them */
    espi_stack w;
    const float *bias; /* [E,H] or NULL */
    espi_lora lora;
    espi_routing routing;
    espi_glu glu;
} espi_down_bwd;

/* out_t = add_t + sum over k of weight_tk * y[slot_row(t,k)], in slot order. */
typedef struct espi_combine_fwd {
    void *out;       /* act [T,H] overwrite; may be add */
    const void *y;   /* act [S,H] */
    const void *add; /* act [T,H] or NULL */
    espi_routing routing;
    int64_t hidden;
} espi_combine_fwd;

/* The transpose of the gather: d_x_t = sum over k of d_rows[slot_row(t,k)], in slot order; d_weight_tk = d_row_weight[slot_row(t,k)]. */
typedef struct espi_combine_bwd {
    void *d_x;      /* act [T,H] overwrite */
    void *d_weight; /* real [T,K] overwrite */
    const void *d_rows, *d_row_weight;
    espi_routing routing;
    int64_t hidden;
} espi_combine_bwd;

/* The head: z = softcap(logit_scale (h W^T + bias)) / temperature;  lse = log sum e^z;  lp = z[target] - lse;  entropy = lse - sum p z.
 * softcap(v) = cap tanh(v/cap), or v when cap = 0.  Work memory is a fixed number of bytes, whatever n: never [n,V].
 * A row whose sampler left only some ids is a distribution over those alone: its sums go over kept[kept_offsets[i] .. kept_offsets[i+1]-1],
 * ascending and with the target among them, and neither the other entries' logits nor their rows of W are touched.  An empty range: all V. */
typedef struct espi_head {
    const void *hidden;    /* act [T,H] */
    const int32_t *rows;   /* [n] which row of hidden; a row may be named more than once */
    const int32_t *d_rows; /* [n] which row of d_hidden, all different; NULL = rows */
    const int32_t *target; /* [n] */
    espi_mat w;            /* [V,H] */
    const float *bias;     /* [V] or NULL */
    int64_t n;
    double temperature, logit_scale, softcap; /* logit_scale 1 and softcap 0 = plain */
    const int64_t *kept_offsets;              /* [n+1], or NULL: every row is over all V; not read by head_logits and head_sample */
    const int32_t *kept;
} espi_head;

/* LH0, and pass A of LH2. */
typedef struct espi_head_stats {
    espi_head head;
    void *lp, *entropy, *lse; /* real [n] overwrite */
} espi_head_stats;

/* Pass B of LH2.  dz_j = g (1[j=y] - p_j) - e p_j (log p_j + entropy);  d_hidden = (dz through temperature, softcap and scale) W. */
typedef struct espi_head_grad {
    espi_head head;
    void *d_hidden;    /* act [.,H]: the rows named by d_rows are overwritten, others left */
    const void *g, *e; /* real [n]: d loss / d lp, d loss / d entropy; e may be NULL */
    const void *lse, *entropy;
} espi_head_grad;

/* What a loss reads and writes of the rows, in host memory: real [n] each. */
typedef struct espi_head_host {
    void *lp, *entropy, *g, *e;
} espi_head_host;

/* LH1: one pass for losses whose coefficients of a row depend on that row alone.  coef() is called for consecutive chunks of rows, in
 * order, and reads lp[first..], entropy[first..] and writes g[first..], e[first..] (real) of `host`: [n] each, in host memory, pinned where
 * the backend is a GPU; on a CPU they are lp, entropy, g and e themselves.  A GPU calls it from the stream, on a thread of the driver, in
 * the order of the stream: it must not call the device.  Its failure is the op's on a CPU, and that of the next espi_device.wait on a GPU.
 * coef NULL: the coefficients are known before: g and e are read, and `host` is not looked at.
 * e_is_zero: every e is 0, those that coef() writes or those given.  The gradient is then g times what it is for g = 1, and nothing need wait
 * for coef() before that. */
typedef struct espi_head_fused {
    espi_head head;
    void *lp, *entropy, *lse, *g, *e; /* real [n] overwrite; g and e: see above */
    void *d_hidden;                   /* as in espi_head_grad */
    esp_status (*coef)(void *user, int64_t first, int64_t count);
    void *coef_user;
    bool e_is_zero;
    espi_head_host host;
} espi_head_fused;

typedef struct espi_head_logits {
    espi_head head; /* target unused */
    void *logits;   /* real [n,V] overwrite: z */
} espi_head_logits;

/* Filters narrow what is drawn from, in this order, ties to the lower id: the top_k largest; of those the fewest largest whose share of
 * their sum of e^z reaches top_p; of those the ones with e^z of at least min_p times the largest.  All 0: no filter. */
typedef struct espi_head_filter {
    int64_t top_k;       /* at most V; 0 = all */
    double top_p, min_p; /* in (0,1); 0 = all */
} espi_head_filter;
static inline bool espi_filters(const espi_head_filter *f) {
    return f->top_k != 0 || f->top_p != 0 || f->min_p != 0;
}

/* Draws from softmax(z), or from the softmax over what the filter left, by inverse CDF in ascending id order with the caller's uniforms;
 * temperature 0 takes the largest logit of temperature 1 (lowest id on ties; no filter).  lp is bit-equal to what head_stats gives for that
 * token and row, with the kept ids as its list where there is a filter. */
typedef struct espi_head_sample {
    espi_head head;        /* target unused */
    int32_t *token;        /* [n] overwrite */
    void *lp;              /* real [n] overwrite */
    const double *uniform; /* [n] in [0,1) */
    espi_head_filter filter;
    int32_t *kept;       /* [n,kept_most] overwrite the first kept_count: the ids that were left, ascending; NULL without a filter */
    int32_t *kept_count; /* [n] overwrite; NULL without a filter.  -1: more than kept_most were left, and token and lp are undefined */
    int64_t kept_most;   /* top_k, where there is one, is at most this */
} espi_head_sample;

typedef struct espi_sumsq {
    double *out;   /* [parts] ADDS the sum of squares of each n / parts values: chunks of 4096 in order, each summed in double */
    const void *x; /* real [n] */
    int64_t n, parts;
} espi_sumsq;

/* torch.optim.AdamW: g' = grad_scale g;  p *= 1 - lr wd;  m += (1-b1)(g'-m);  v = b2 v + (1-b2) g'^2;
 * p -= lr/(1-b1^step) m / (sqrt(v)/sqrt(1-b2^step) + eps). */
typedef struct espi_adamw {
    void *p, *m, *v; /* real [n] in place */
    const void *g;
    int64_t n, step; /* step counts from 1 */
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
    bool host_moments; /* of a device: m and v are in pinned memory of the host */
} espi_adamw;

/* bitsandbytes' blockwise 8-bit AdamW (blocks of 256): see spec/formats 9.  map1 signed, map2 unsigned, [256] ascending. */
typedef struct espi_adamw8 {
    void *p;                  /* real [n] in place */
    uint8_t *state1, *state2; /* [n] */
    float *absmax1, *absmax2; /* [ceil(n/256)] */
    const void *g;
    const float *map1, *map2;
    int64_t n, step;
    double lr, beta1, beta2, eps, weight_decay, grad_scale;
} espi_adamw8;

#endif
