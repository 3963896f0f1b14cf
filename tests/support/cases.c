/* A builder for each row of ops.def. */
#include "cases.h"

#include "espalier/quant.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void *in(problem *p, const char *name, int64_t n) {
    return field_add(p, name, ROLE_IN, ESP_DTYPE_NONE, n);
}
static void *out(problem *p, const char *name, int64_t n) {
    return field_add(p, name, ROLE_OUT, ESP_DTYPE_NONE, n);
}
static void *inout(problem *p, const char *name, int64_t n) {
    return field_add(p, name, ROLE_INOUT, ESP_DTYPE_NONE, n);
}
static float *in_f32(problem *p, const char *name, int64_t n) {
    return field_add(p, name, ROLE_IN, ESP_F32, n);
}
static int32_t *in_i32(problem *p, const char *name, int64_t n) {
    return field_add(p, name, ROLE_IN, ESP_I32, n);
}

static void settle(problem *p, const char *name) {
    field_settle(field_find(p, name));
}

/* The forward whose saved arrays a backward needs, run on the saver. */
static void saved(problem *f, const problem *p, espi_op_id op) {
    shape s = p->shape;
    s.in_place = s.decode = false;
    problem_run(f, op, &s, p->saver, p->saver);
}

static espi_mat mat(problem *p, int64_t rows, int64_t cols) {
    return (espi_mat){field_add(p, "w", ROLE_IN, p->shape.plain, rows * cols), p->shape.plain, rows, cols};
}

static espi_lora lora(problem *p, int64_t copies, int64_t cols, int64_t rows, bool backward) {
    const int64_t r = p->shape.rank;
    espi_lora l = {.r = r, .scale = 0.75};
    if (r == 0) return l;
    l.a = in(p, "a", copies * r * cols);
    l.b = in(p, "b", copies * rows * r);
    if (!backward) return l;
    l.d_a = inout(p, "d_a", copies * r * cols);
    l.d_b = inout(p, "d_b", copies * rows * r);
    return l;
}

static espi_stack stack(problem *p, int64_t rows, int64_t cols, int parts) {
    const shape *s = &p->shape;
    const int64_t n = rows / parts * cols, all = s->experts * parts;
    espi_stack w = {.format = s->format, .dtype = s->plain, .experts = s->experts, .rows = rows, .cols = cols, .parts = parts};
    if (s->format == ESP_Q_NONE) {
        w.part_bytes = (size_t)n * esp_dtype_size(s->plain);
        w.data = field_add(p, "w", ROLE_IN, s->plain, all * n);
        return w;
    }
    w.part_bytes = (size_t)(n + 1) / 2;
    w.data = field_add(p, "w", ROLE_IN, ESP_U8, all * (int64_t)w.part_bytes);
    w.lut = in_f32(p, "lut", 16);
    if (s->format == ESP_MXFP4) {
        memcpy((float *)(uintptr_t)w.lut, esp_quant_table(ESP_MXFP4), 16 * sizeof(float)); /* kernels may know these powers of two */
        settle(p, "lut");
        w.part_blocks = n / ESPI_MXBLOCK;
        uint8_t *scales = field_add(p, "scales", ROLE_IN, ESP_U8, all * w.part_blocks);
        /* 2^-6 .. 2^-2, and over some stretches every fifth one 2^-127 */
        for (int64_t i = 0; i < all * w.part_blocks; i++) scales[i] = (uint8_t)(i / 1280 % 2 == 0 && i % 5 == 4 ? 0 : 121 + scales[i] % 5);
        settle(p, "scales");
        w.scales = scales;
        return w;
    }
    w.part_blocks = (n + ESPI_QBLOCK - 1) / ESPI_QBLOCK;
    w.part_nested = (w.part_blocks + ESPI_NESTED_BLOCK - 1) / ESPI_NESTED_BLOCK;
    if (s->nested) {
        w.absmax8 = field_add(p, "absmax8", ROLE_IN, ESP_U8, all * w.part_blocks);
        w.nested = in_f32(p, "nested", all * w.part_nested);
        w.offset = in_f32(p, "offset", all);
        w.map = in_f32(p, "map", 256);
    } else {
        w.absmax = in_f32(p, "absmax", all * w.part_blocks);
    }
    return w;
}

/* gate and up side by side are one matrix, one above the other two. */
static espi_stack gate_up_stack(problem *p) {
    return stack(p, 2 * p->shape.width, p->shape.hidden, p->shape.interleaved ? 1 : 2);
}

/* Inputs are of order 1, so the limit is reached by half of them. */
static espi_glu glu(const shape *s) {
    return (espi_glu){s->interleaved, s->clamped, s->clamped ? 0.5 : 0, s->clamped ? 1.702 : 0};
}

/* The experts of token t, ascending: those of the k largest scores. */
static void choose(int32_t *idx, const problem *p, int64_t t) {
    const shape *s = &p->shape;
    bool taken[256] = {false};
    for (int64_t k = 0; k < s->top_k; k++) {
        int64_t best = -1;
        double best_score = -INFINITY;
        for (int64_t e = 0; e < s->experts; e++) {
            double score = value_of(p->seed, "route", t * s->experts + e);
            if (s->pattern == ROUTE_EMPTY && e % 2 == 1) score -= 10;
            if (s->pattern == ROUTE_ONE) score = -(double)((e + 1) % s->experts);
            if (s->pattern == ROUTE_SKEWED && e == 0) score += 1.5;
            if (!taken[e] && score > best_score) {
                best_score = score;
                best = e;
            }
        }
        taken[best] = true;
    }
    for (int64_t e = 0, k = 0; e < s->experts; e++)
        if (taken[e]) idx[k++] = (int32_t)e;
}

static void build_dispatch(problem *p, espi_dispatch *a) {
    const shape *s = &p->shape;
    const int64_t slots = s->tokens * s->top_k;
    int32_t *idx = in_i32(p, "idx", slots);
    for (int64_t t = 0; t < s->tokens; t++) choose(idx + t * s->top_k, p, t);
    settle(p, "idx");
    *a = (espi_dispatch){.idx = idx,
                         .weight = in(p, "weight", slots),
                         .offsets = field_add(p, "offsets", ROLE_OUT, ESP_I32, s->experts + 1),
                         .row_token = field_add(p, "row_token", ROLE_OUT, ESP_I32, slots),
                         .slot_row = field_add(p, "slot_row", ROLE_OUT, ESP_I32, slots),
                         .row_weight = out(p, "row_weight", slots),
                         .tokens = s->tokens,
                         .experts = s->experts,
                         .top_k = s->top_k};
}

static espi_routing routing(problem *p) {
    problem sorted;
    saved(&sorted, p, ESPI_OP_dispatch);
    espi_routing r = {.tokens = p->shape.tokens,
                      .experts = p->shape.experts,
                      .top_k = p->shape.top_k,
                      .offsets = field_take(p, "offsets", &sorted),
                      .row_token = field_take(p, "row_token", &sorted),
                      .slot_row = field_take(p, "slot_row", &sorted),
                      .row_weight = field_take(p, "row_weight", &sorted)};
    problem_free(&sorted);
    return r;
}

/* Of shared sequences: which one stands before sequence s, or -1.  Users of one lie beside each other and apart, and most have the same: one
 * family has more to do than all others. */
static int64_t prefix_of(int64_t s) {
    const int64_t before[] = {-1, -1, 1, 0, -1, 1, 1, 0};
    return s < 8 ? before[s] : 1;
}

/* Sequences: one of a single token, then some of half the tokens, but no more than 80.  decode: `past` keys lie before each one's queries.
 * shared: of a seventh of the tokens, some behind others; with `past`, behind all but the last of the other's keys. */
static espi_spans spans(problem *p, int64_t past) {
    const int64_t tokens = p->shape.tokens, share = p->shape.shared ? 7 : 2, part = tokens < 80 * share ? tokens / share : 80;
    const int64_t most = part < 1 ? 1 : part, n_seqs = tokens == 0 ? 0 : 1 + (tokens - 1 + most - 1) / most;
    int32_t *cu = in_i32(p, "cu_q", n_seqs + 1), *start = in_i32(p, "k_start", n_seqs), *len = in_i32(p, "k_len", n_seqs);
    espi_spans spans = {.cu_q = cu, .k_start = start, .k_len = len, .n_seqs = (int32_t)n_seqs, .tokens = tokens};
    cu[0] = 0;
    for (int64_t s = 0; s < n_seqs; s++) {
        const int64_t end = 1 + s * most;
        cu[s + 1] = (int32_t)(end < tokens ? end : tokens);
        start[s] = (int32_t)(cu[s] + s * past);
        len[s] = (int32_t)(cu[s + 1] - cu[s] + past);
    }
    settle(p, "cu_q");
    settle(p, "k_start");
    settle(p, "k_len");
    if (!p->shape.shared) return spans;
    int32_t *prefix_start = in_i32(p, "prefix_start", n_seqs), *prefix_len = in_i32(p, "prefix_len", n_seqs);
    for (int64_t s = 0; s < n_seqs; s++) {
        const int64_t before = prefix_of(s);
        prefix_start[s] = before < 0 ? 0 : start[before];
        prefix_len[s] = before < 0 ? 0 : len[before] - (past > 0);
    }
    settle(p, "prefix_start");
    settle(p, "prefix_len");
    spans.prefix_start = prefix_start;
    spans.prefix_len = prefix_len;
    return spans;
}

static int32_t *ids(problem *p) {
    int32_t *id = in_i32(p, "ids", p->shape.tokens);
    for (int64_t t = 0; t < p->shape.tokens; t++) id[t] = (int32_t)pick(p->seed, "ids", t, p->shape.vocab);
    settle(p, "ids");
    return id;
}

static void build_embed_fwd(problem *p, espi_embed_fwd *a) {
    const shape *s = &p->shape;
    *a = (espi_embed_fwd){out(p, "out", s->tokens * s->hidden), ids(p), mat(p, s->vocab, s->hidden), s->tokens};
}

static void build_embed_bwd(problem *p, espi_embed_bwd *a) {
    const shape *s = &p->shape;
    *a = (espi_embed_bwd){
        inout(p, "d_table", s->vocab * s->hidden), in(p, "d_out", s->tokens * s->hidden), ids(p), s->tokens, s->vocab, s->hidden};
}

static void build_zero(problem *p, espi_zero *a) {
    const int64_t n = p->shape.tokens * p->shape.hidden;
    *a = (espi_zero){.out = out(p, "out", n), .bytes = (size_t)n * esp_dtype_size(p->real)};
}

static void build_add(problem *p, espi_add *a) {
    const int64_t n = p->shape.tokens * p->shape.hidden;
    *a = (espi_add){.b = in(p, "right", n), .n = n};
    if (p->shape.in_place)
        a->out = inout(p, "out", n);
    else
        a->out = out(p, "out", n);
    a->a = p->shape.in_place ? a->out : in(p, "left", n);
}

/* Runs of one, two or three rows that go to the same one, which comes again later. */
static void build_rows_add(problem *p, espi_rows_add *a) {
    const shape *s = &p->shape;
    const int64_t rows = 1 + s->tokens / 4;
    int32_t *to = in_i32(p, "to", s->tokens);
    for (int64_t i = 0; i < s->tokens; i++) to[i] = (int32_t)(i * 4 / 7 % rows);
    settle(p, "to");
    *a = (espi_rows_add){inout(p, "out", rows * s->hidden), in(p, "x", s->tokens * s->hidden), to, s->tokens, s->hidden};
}

/* Some rows more than once, one of them never. */
static void build_rows_take(problem *p, espi_rows_take *a) {
    const shape *s = &p->shape;
    const int64_t rows = 2 + s->tokens / 2;
    int32_t *from = in_i32(p, "from", s->tokens);
    for (int64_t i = 0; i < s->tokens; i++) from[i] = (int32_t)(i * 5 % (rows - 1));
    settle(p, "from");
    *a = (espi_rows_take){out(p, "out", s->tokens * s->hidden), in(p, "x", rows * s->hidden), from, s->tokens, s->hidden};
}

static void build_parts_add(problem *p, espi_parts_add *a) {
    const int64_t n = p->shape.tokens * p->shape.hidden;
    *a = (espi_parts_add){inout(p, "total", n), in(p, "parts", 3 * n), n, 3};
}

static void build_rmsnorm_fwd(problem *p, espi_rmsnorm_fwd *a) {
    const shape *s = &p->shape;
    *a = (espi_rmsnorm_fwd){out(p, "y", s->tokens * s->hidden),
                            out(p, "rstd", s->tokens),
                            in(p, "x", s->tokens * s->hidden),
                            in_f32(p, "w", s->hidden),
                            s->tokens,
                            s->hidden,
                            1e-6};
}

static void build_rmsnorm_bwd(problem *p, espi_rmsnorm_bwd *a) {
    const shape *s = &p->shape;
    const int64_t n = s->tokens * s->hidden;
    problem f;
    saved(&f, p, ESPI_OP_rmsnorm_fwd);
    *a = (espi_rmsnorm_bwd){
        .x = in(p, "x", n), .rstd = field_take(p, "rstd", &f), .w = in_f32(p, "w", s->hidden), .rows = s->tokens, .n = s->hidden};
    problem_free(&f);
    if (s->in_place) {
        a->d_y = a->d_x = inout(p, "d_x", n);
    } else {
        a->d_y = in(p, "d_y", n);
        a->d_x = out(p, "d_x", n);
    }
    if (s->extras) a->d_add = in(p, "d_add", n);
    a->d_w = s->decode ? NULL : inout(p, "d_w", s->hidden);
}

static int64_t rotated_half(const shape *s) {
    return s->head_dim / (s->partial_rope ? 4 : 2);
}

static void build_rope_table(problem *p, espi_rope_table *a) {
    const int64_t tokens = p->shape.tokens, half = rotated_half(&p->shape);
    double *inv_freq = field_add(p, "inv_freq", ROLE_IN, ESP_F64, half);
    for (int64_t j = 0; j < half; j++) inv_freq[j] = pow(10000, -(double)j / (double)half);
    settle(p, "inv_freq");
    *a = (espi_rope_table){
        out(p, "cos", tokens * half), out(p, "sin", tokens * half), in_i32(p, "positions", tokens), inv_freq, 1.25, tokens, half};
}

static void build_rope(problem *p, espi_rope *a) {
    const shape *s = &p->shape;
    const int64_t half = rotated_half(s);
    *a = (espi_rope){inout(p, "x", s->tokens * s->heads * s->head_dim),
                     in(p, "cos", s->tokens * half),
                     in(p, "sin", s->tokens * half),
                     s->tokens,
                     s->heads,
                     half,
                     s->head_dim};
}
static void build_rope_fwd(problem *p, espi_rope *a) {
    build_rope(p, a);
}
static void build_rope_bwd(problem *p, espi_rope *a) {
    build_rope(p, a);
}

static void build_clamp_fwd(problem *p, espi_clamp_fwd *a) {
    const int64_t n = p->shape.tokens * p->shape.hidden;
    *a = (espi_clamp_fwd){out(p, "y", n), in(p, "x", n), n, 0.5};
}
static void build_clamp_bwd(problem *p, espi_clamp_bwd *a) {
    const int64_t n = p->shape.tokens * p->shape.hidden;
    *a = (espi_clamp_bwd){out(p, "d_x", n), in(p, "d_y", n), in(p, "x", n), n, 0.5};
}

enum { PAST = 3 };

static void build_kv_append(problem *p, espi_kv_append *a) {
    const int64_t width = p->shape.kv_heads * p->shape.head_dim, tokens = p->shape.tokens;
    *a = (espi_kv_append){.spans = spans(p, PAST), .width = width};
    const int64_t rows = tokens + a->spans.n_seqs * PAST;
    a->k_cache = inout(p, "k_cache", rows * width);
    a->v_cache = inout(p, "v_cache", rows * width);
    a->k = in(p, "k", tokens * width);
    a->v = in(p, "v", tokens * width);
}

/* Larger than the scores, or smaller than all. */
static float *sinks(problem *p) {
    if (!p->shape.sinks) return NULL;
    float *sink = in_f32(p, "sinks", p->shape.heads);
    for (int64_t head = 0; head < p->shape.heads; head++) sink[head] *= 4;
    settle(p, "sinks");
    return sink;
}

static void build_attention_fwd(problem *p, espi_attention_fwd *a) {
    const shape *s = &p->shape;
    const int64_t n_q = s->tokens * s->heads, past = s->decode ? PAST : 0;
    *a = (espi_attention_fwd){.out = out(p, "out", n_q * s->head_dim),
                              .lse = out(p, "lse", n_q),
                              .q = in(p, "q", n_q * s->head_dim),
                              .sinks = sinks(p),
                              .window = s->window,
                              .spans = spans(p, past),
                              .heads = s->heads,
                              .kv_heads = s->kv_heads,
                              .head_dim = s->head_dim,
                              .scale = 1.5 / sqrt((double)s->head_dim)};
    const int64_t n_kv = (s->tokens + a->spans.n_seqs * past) * s->kv_heads * s->head_dim;
    a->k = in(p, "k", n_kv);
    a->v = in(p, "v", n_kv);
}

static void build_attention_bwd(problem *p, espi_attention_bwd *a) {
    const shape *s = &p->shape;
    const int64_t n_q = s->tokens * s->heads * s->head_dim, n_kv = s->tokens * s->kv_heads * s->head_dim;
    problem f;
    saved(&f, p, ESPI_OP_attention_fwd);
    *a = (espi_attention_bwd){.d_q = out(p, "d_q", n_q),
                              .d_k = out(p, "d_k", n_kv),
                              .d_v = out(p, "d_v", n_kv),
                              .d_out = in(p, "d_out", n_q),
                              .q = in(p, "q", n_q),
                              .k = in(p, "k", n_kv),
                              .v = in(p, "v", n_kv),
                              .out = field_take(p, "out", &f),
                              .lse = field_take(p, "lse", &f),
                              .sinks = sinks(p),
                              .window = s->window,
                              .spans = spans(p, 0),
                              .heads = s->heads,
                              .kv_heads = s->kv_heads,
                              .head_dim = s->head_dim,
                              .scale = f.args.attention_fwd.scale};
    problem_free(&f);
    if (s->sinks && !s->decode) a->d_sinks = inout(p, "d_sinks", s->heads);
}

/* hidden -> width */
static void build_linear_fwd(problem *p, espi_linear_fwd *a) {
    const shape *s = &p->shape;
    *a = (espi_linear_fwd){.y = out(p, "y", s->tokens * s->width),
                           .x = in(p, "x", s->tokens * s->hidden),
                           .w = mat(p, s->width, s->hidden),
                           .lora = lora(p, 1, s->hidden, s->width, false),
                           .tokens = s->tokens};
    if (s->rank) a->u = out(p, "u", s->tokens * s->rank);
    if (s->extras) a->bias = in_f32(p, "bias", s->width);
}

static void build_linear_bwd(problem *p, espi_linear_bwd *a) {
    const shape *s = &p->shape;
    problem f;
    saved(&f, p, ESPI_OP_linear_fwd);
    *a = (espi_linear_bwd){.accumulate = s->extras,
                           .d_y = in(p, "d_y", s->tokens * s->width),
                           .x = in(p, "x", s->tokens * s->hidden),
                           .w = mat(p, s->width, s->hidden),
                           .lora = lora(p, 1, s->hidden, s->width, true),
                           .tokens = s->tokens};
    if (s->rank) a->u = field_take(p, "u", &f);
    problem_free(&f);
    if (!s->decode) a->d_x = field_add(p, "d_x", s->extras ? ROLE_INOUT : ROLE_OUT, ESP_DTYPE_NONE, s->tokens * s->hidden);
}

static espi_router_rule rule(const shape *s) {
    return (espi_router_rule){s->renormalise, s->sigmoid, s->scaling};
}

/* With in_place they lie where the op writes. */
static int32_t *forced_experts(problem *p, int32_t *idx) {
    const shape *s = &p->shape;
    int32_t *forced = s->in_place ? idx : in_i32(p, "forced", s->tokens * s->top_k);
    for (int64_t t = 0; t < s->tokens; t++) {
        choose(forced + t * s->top_k, p, t);
        for (int64_t k = 0; t % 3 == 0 && k < s->top_k; k++) forced[t * s->top_k + k] = -1;
        for (int64_t k = 0; t % 3 == 1 && t % 5 < 2 && k < s->top_k; k++) forced[t * s->top_k + k] = -2 - forced[t * s->top_k + k];
    }
    settle(p, s->in_place ? "idx" : "forced");
    return forced;
}

static void build_router_fwd(problem *p, espi_router_fwd *a) {
    const shape *s = &p->shape;
    const int64_t slots = s->tokens * s->top_k;
    const role idx = s->forced && s->in_place ? ROLE_INOUT : ROLE_OUT;
    *a = (espi_router_fwd){.logits = out(p, "logits", s->tokens * s->experts),
                           .lse = out(p, "lse", s->tokens),
                           .idx = field_add(p, "idx", idx, ESP_I32, slots),
                           .weight = out(p, "weight", slots),
                           .x = in(p, "x", s->tokens * s->hidden),
                           .w = mat(p, s->experts, s->hidden),
                           .tokens = s->tokens,
                           .top_k = s->top_k,
                           .rule = rule(s)};
    if (s->bias) a->bias = in_f32(p, "bias", s->experts);
    if (s->corrected) a->correction = in_f32(p, "correction", s->experts);
    if (s->forced) a->forced = forced_experts(p, a->idx);
    if (!s->extras) return;
    if (s->forced) a->flips = field_add(p, "flips", ROLE_INOUT, ESP_I64, 1);
    a->counts = field_add(p, "counts", ROLE_INOUT, ESP_I64, s->experts);
    a->p_sum = field_add(p, "p_sum", ROLE_INOUT, ESP_F64, s->experts);
    a->z_sum = field_add(p, "z_sum", ROLE_INOUT, ESP_F64, 1);
}

static void build_router_bwd(problem *p, espi_router_bwd *a) {
    const shape *s = &p->shape;
    const int64_t n = s->tokens * s->hidden;
    problem f;
    saved(&f, p, ESPI_OP_router_fwd);
    *a = (espi_router_bwd){.d_x = inout(p, "d_x", n),
                           .d_w = s->decode ? NULL : inout(p, "d_w", s->experts * s->hidden),
                           .d_logits = out(p, "d_logits", s->tokens * s->experts),
                           .d_weight = in(p, "d_weight", s->tokens * s->top_k),
                           .logits = field_take(p, "logits", &f),
                           .lse = field_take(p, "lse", &f),
                           .weight = field_take(p, "weight", &f),
                           .x = in(p, "x", n),
                           .idx = field_take(p, "idx", &f),
                           .w = mat(p, s->experts, s->hidden),
                           .tokens = s->tokens,
                           .top_k = s->top_k,
                           .rule = rule(s)};
    problem_free(&f);
    if (!s->extras) return;
    int64_t *counts = field_add(p, "aux_counts", ROLE_IN, ESP_I64, s->experts);
    for (int64_t e = 0; e < s->experts; e++) counts[e] = pick(p->seed, "aux_counts", e, 20);
    settle(p, "aux_counts");
    a->aux_counts = counts;
    a->aux_coef = AUX_COEF;
    a->z_coef = Z_COEF;
}

static void build_gate_up_fwd(problem *p, espi_gate_up_fwd *a) {
    const shape *s = &p->shape;
    const int64_t rows = s->tokens * s->top_k;
    *a = (espi_gate_up_fwd){.gu = out(p, "gu", rows * 2 * s->width),
                            .act = out(p, "act", rows * s->width),
                            .glu = glu(s),
                            .x = in(p, "x", s->tokens * s->hidden),
                            .w = gate_up_stack(p),
                            .lora = lora(p, s->experts, s->hidden, 2 * s->width, false),
                            .routing = routing(p)};
    if (s->bias) a->bias = in_f32(p, "bias", s->experts * 2 * s->width);
    if (s->rank) a->u = out(p, "u", rows * s->rank);
}

static void build_gate_up_bwd(problem *p, espi_gate_up_bwd *a) {
    const shape *s = &p->shape;
    const int64_t rows = s->tokens * s->top_k;
    problem f;
    saved(&f, p, ESPI_OP_gate_up_fwd);
    *a = (espi_gate_up_bwd){.d_rows = out(p, "d_rows", rows * s->hidden),
                            .d_gu = in(p, "d_gu", rows * 2 * s->width),
                            .x = in(p, "x", s->tokens * s->hidden),
                            .w = gate_up_stack(p),
                            .lora = lora(p, s->experts, s->hidden, 2 * s->width, true),
                            .routing = routing(p)};
    if (s->rank) a->u = field_take(p, "u", &f);
    problem_free(&f);
}

static void build_swiglu_fwd(problem *p, espi_swiglu_fwd *a) {
    const int64_t rows = p->shape.tokens, width = p->shape.width;
    *a = (espi_swiglu_fwd){out(p, "act", rows * width), in(p, "gu", rows * 2 * width), rows, width, glu(&p->shape)};
}

static void build_swiglu_bwd(problem *p, espi_swiglu_bwd *a) {
    const int64_t rows = p->shape.tokens, width = p->shape.width;
    *a = (espi_swiglu_bwd){.d_act = in(p, "d_act", rows * width), .rows = rows, .width = width, .glu = glu(&p->shape)};
    if (p->shape.in_place) {
        a->gu = a->d_gu = inout(p, "d_gu", rows * 2 * width);
    } else {
        a->gu = in(p, "gu", rows * 2 * width);
        a->d_gu = out(p, "d_gu", rows * 2 * width);
    }
}

espi_stack *expert_stack(problem *p) {
    if (p->op == ESPI_OP_gate_up_fwd) return &p->args.gate_up_fwd.w;
    if (p->op == ESPI_OP_gate_up_bwd) return &p->args.gate_up_bwd.w;
    if (p->op == ESPI_OP_down_fwd) return &p->args.down_fwd.w;
    return p->op == ESPI_OP_down_bwd ? &p->args.down_bwd.w : NULL;
}

void form_activation(problem *p) {
    const shape *s = &p->shape;
    const espi_swiglu_fwd a = {field_find(p, "act")->data, field_find(p, "gu")->data, s->tokens * s->top_k, s->width, glu(s)};
    const espi_backend *reference = p->real == ESP_F64 ? &espi_backend_ref64 : &espi_backend_ref;
    cr_assert_eq(reference->swiglu_fwd.run(&(espi_exec){.threads = 1}, &a), ESP_OK);
}

/* What the gate_up before it makes: glu of "gu", so that both directions speak of the same numbers. */
static void *activation(problem *p) {
    const int64_t rows = p->shape.tokens * p->shape.top_k;
    in(p, "gu", rows * 2 * p->shape.width);
    void *act = in(p, "act", rows * p->shape.width);
    form_activation(p);
    settle(p, "act");
    return act;
}

static void build_down_fwd(problem *p, espi_down_fwd *a) {
    const shape *s = &p->shape;
    const int64_t rows = s->tokens * s->top_k;
    *a = (espi_down_fwd){.y = out(p, "y", rows * s->hidden),
                         .act = activation(p),
                         .w = stack(p, s->hidden, s->width, 1),
                         .lora = lora(p, s->experts, s->width, s->hidden, false),
                         .routing = routing(p)};
    if (s->bias) a->bias = in_f32(p, "bias", s->experts * s->hidden);
    if (s->rank) a->u = out(p, "u", rows * s->rank);
}

static void build_down_bwd(problem *p, espi_down_bwd *a) {
    const shape *s = &p->shape;
    const int64_t rows = s->tokens * s->top_k;
    problem f;
    saved(&f, p, ESPI_OP_down_fwd);
    *a = (espi_down_bwd){.d_gu = out(p, "d_gu", rows * 2 * s->width),
                         .glu = glu(s),
                         .d_row_weight = out(p, "d_row_weight", rows),
                         .d_out = in(p, "d_out", s->tokens * s->hidden),
                         .gu = in(p, "gu", rows * 2 * s->width),
                         .w = stack(p, s->hidden, s->width, 1),
                         .lora = lora(p, s->experts, s->width, s->hidden, true),
                         .routing = routing(p)};
    if (s->bias) a->bias = in_f32(p, "bias", s->experts * s->hidden);
    if (s->rank) a->u = field_take(p, "u", &f);
    problem_free(&f);
}

static void build_combine_fwd(problem *p, espi_combine_fwd *a) {
    const shape *s = &p->shape;
    const int64_t n = s->tokens * s->hidden;
    *a = (espi_combine_fwd){.y = in(p, "y", n * s->top_k), .routing = routing(p), .hidden = s->hidden};
    if (s->in_place)
        a->add = a->out = inout(p, "out", n);
    else
        a->out = out(p, "out", n);
    if (!s->in_place && s->extras) a->add = in(p, "add", n);
}

static void build_combine_bwd(problem *p, espi_combine_bwd *a) {
    const shape *s = &p->shape;
    const int64_t slots = s->tokens * s->top_k;
    *a = (espi_combine_bwd){.d_x = out(p, "d_x", s->tokens * s->hidden),
                            .d_weight = out(p, "d_weight", slots),
                            .d_rows = in(p, "d_rows", slots * s->hidden),
                            .d_row_weight = in(p, "d_row_weight", slots),
                            .routing = routing(p),
                            .hidden = s->hidden};
}

/* Of every third row all entries; of the others the target and about one in three. */
static void kept_lists(problem *p, espi_head *h) {
    const int64_t vocab = p->shape.vocab;
    int64_t *offsets = field_add(p, "kept_offsets", ROLE_IN, ESP_I64, h->n + 1);
    int32_t *kept = in_i32(p, "kept", h->n * vocab);
    int64_t count = 0;
    for (int64_t i = 0; i < h->n; i++) {
        offsets[i] = count;
        for (int64_t v = 0; i % 3 != 0 && v < vocab; v++)
            if (v == h->target[i] || value_of(p->seed, "kept", i * vocab + v) > 0.4) kept[count++] = (int32_t)v;
    }
    offsets[h->n] = count;
    settle(p, "kept_offsets");
    settle(p, "kept");
    h->kept_offsets = offsets;
    h->kept = kept;
}

/* Every second row of hidden, from the last down; repeated: half as many of those, each of them twice. */
static espi_head head(problem *p) {
    const shape *s = &p->shape;
    const int64_t n = (s->tokens + 1) / 2;
    int32_t *rows = in_i32(p, "rows", n), *target = in_i32(p, "target", n), *d_rows = s->repeated ? in_i32(p, "d_rows", n) : NULL;
    for (int64_t i = 0; i < n; i++) {
        rows[i] = (int32_t)(s->tokens - 1 - 2 * i);
        if (d_rows) d_rows[i] = rows[i];
        if (d_rows) rows[i] = rows[i / 2];
        target[i] = (int32_t)pick(p->seed, "target", i, s->vocab);
    }
    settle(p, "rows");
    settle(p, "target");
    if (d_rows) settle(p, "d_rows");
    espi_head h = {.hidden = in(p, "hidden", s->tokens * s->hidden),
                   .rows = rows,
                   .d_rows = d_rows,
                   .target = target,
                   .w = mat(p, s->vocab, s->hidden),
                   .n = n,
                   .temperature = 1,
                   .logit_scale = 1};
    if (s->filtered) kept_lists(p, &h);
    if (!s->extras) return h;
    h.bias = in_f32(p, "bias", s->vocab);
    h.temperature = 0.8;
    h.logit_scale = 0.7;
    h.softcap = 5;
    return h;
}

static void build_head_stats(problem *p, espi_head_stats *a) {
    a->head = head(p);
    a->lp = out(p, "lp", a->head.n);
    a->entropy = out(p, "entropy", a->head.n);
    a->lse = out(p, "lse", a->head.n);
}

static void build_head_grad(problem *p, espi_head_grad *a) {
    problem f;
    saved(&f, p, ESPI_OP_head_stats);
    a->head = head(p);
    a->d_hidden = inout(p, "d_hidden", p->shape.tokens * p->shape.hidden);
    a->g = in(p, "g", a->head.n);
    a->e = p->shape.extras ? in(p, "e", a->head.n) : NULL;
    a->lse = field_take(p, "lse", &f);
    a->entropy = field_take(p, "entropy", &f);
    problem_free(&f);
}

/* Some smooth function of the row's own numbers, refused when chunks are out of order. */
static esp_status row_coefficients(void *user, int64_t first, int64_t count) {
    problem *p = user;
    if (first != p->coef_next || first + count > field_find(p, "lp")->count) return ESP_ERR_CALLBACK;
    for (int64_t i = first; i < first + count; i++) {
        field_set(field_find(p, "g"), i, -1 + 0.25 * field_get(field_find(p, "lp"), i));
        field_set(field_find(p, "e"), i, p->shape.extras ? 0.5 * field_get(field_find(p, "entropy"), i) : 0);
    }
    p->coef_next = first + count;
    return ESP_OK;
}

static void build_head_fused(problem *p, espi_head_fused *a) {
    a->head = head(p);
    a->lp = out(p, "lp", a->head.n);
    a->entropy = out(p, "entropy", a->head.n);
    a->lse = out(p, "lse", a->head.n);
    const bool given = p->shape.in_place; /* the coefficients are known before */
    a->g = given ? in(p, "g", a->head.n) : out(p, "g", a->head.n);
    a->e = given ? in(p, "e", a->head.n) : out(p, "e", a->head.n);
    a->d_hidden = inout(p, "d_hidden", p->shape.tokens * p->shape.hidden);
    a->coef = given ? NULL : row_coefficients;
    a->coef_user = p;
    a->e_is_zero = !p->shape.extras;
    if (given && a->e_is_zero) {
        for (int64_t i = 0; i < a->head.n; i++) field_set(field_find(p, "e"), i, 0);
        settle(p, "e");
    }
    a->host = (espi_head_host){a->lp, a->entropy, a->g, a->e};
}

static void build_head_logits(problem *p, espi_head_logits *a) {
    a->head = head(p);
    a->logits = out(p, "logits", a->head.n * p->shape.vocab);
}

/* All filters at once, or one of them. */
static void filter(problem *p, espi_head_sample *a) {
    const int64_t vocab = p->shape.vocab, few = vocab < 9 ? vocab : 9;
    const espi_head_filter by_pattern[] = {[ROUTE_RANDOM] = {.top_k = few, .top_p = 0.9, .min_p = 0.05},
                                           [ROUTE_EMPTY] = {.min_p = 0.2},
                                           [ROUTE_ONE] = {.top_k = few},
                                           [ROUTE_SKEWED] = {.top_p = 0.8}};
    a->filter = by_pattern[p->shape.pattern];
    a->kept_most = a->filter.top_k ? a->filter.top_k : vocab;
    a->kept = field_add(p, "left", ROLE_INOUT, ESP_I32, a->head.n * a->kept_most);
    a->kept_count = field_add(p, "left_count", ROLE_OUT, ESP_I32, a->head.n);
}

static void build_head_sample(problem *p, espi_head_sample *a) {
    a->head = head(p);
    if (p->shape.in_place) a->head.temperature = 0;
    a->token = field_add(p, "token", ROLE_OUT, ESP_I32, a->head.n);
    a->lp = out(p, "lp", a->head.n);
    double *uniform = field_add(p, "uniform", ROLE_IN, ESP_F64, a->head.n);
    for (int64_t i = 0; i < a->head.n; i++) uniform[i] = i == 0 ? 0 : fabs(uniform[i]) * 0.999;
    settle(p, "uniform");
    a->uniform = uniform;
    if (p->shape.filtered) filter(p, a);
}

static void build_sumsq(problem *p, espi_sumsq *a) {
    const int64_t n = p->shape.tokens * p->shape.hidden * 3;
    *a = (espi_sumsq){field_add(p, "sum", ROLE_INOUT, ESP_F64, 3), in(p, "x", n), n, 3};
}

static void build_adamw(problem *p, espi_adamw *a) {
    const int64_t n = p->shape.tokens * p->shape.hidden;
    *a = (espi_adamw){.p = inout(p, "p", n),
                      .m = inout(p, "m", n),
                      .v = inout(p, "v", n),
                      .g = in(p, "g", n),
                      .n = n,
                      .step = 3,
                      .lr = 1e-2,
                      .beta1 = 0.9,
                      .beta2 = 0.99,
                      .eps = 1e-8,
                      .weight_decay = 0.1,
                      .grad_scale = 0.5,
                      .host_moments = p->shape.in_place};
    field *v = field_find(p, "v");
    for (int64_t i = 0; i < n; i++) field_set(v, i, fabs(field_get(v, i)));
    settle(p, "v");
}

static void build_adamw8(problem *p, espi_adamw8 *a) {
    const int64_t n = p->shape.tokens * p->shape.hidden, blocks = (n + 255) / 256;
    float *map1 = in_f32(p, "map1", 256), *map2 = in_f32(p, "map2", 256);
    for (int i = 0; i < 256; i++) { /* dense at zero, as the dynamic maps are */
        map1[i] = (float)(i - 127) * (float)abs(i - 127) / 16384;
        map2[i] = (float)i * (float)i / 65025;
    }
    settle(p, "map1");
    settle(p, "map2");
    *a = (espi_adamw8){.p = inout(p, "p", n),
                       .state1 = field_add(p, "state1", ROLE_INOUT, ESP_U8, n),
                       .state2 = field_add(p, "state2", ROLE_INOUT, ESP_U8, n),
                       .absmax1 = field_add(p, "absmax1", ROLE_INOUT, ESP_F32, blocks),
                       .absmax2 = field_add(p, "absmax2", ROLE_INOUT, ESP_F32, blocks),
                       .g = in(p, "g", n),
                       .map1 = map1,
                       .map2 = map2,
                       .n = n,
                       .step = 3,
                       .lr = 1e-2,
                       .beta1 = 0.9,
                       .beta2 = 0.99,
                       .eps = 1e-8,
                       .weight_decay = 0.1,
                       .grad_scale = 0.5};
    for (int64_t b = 0; b < blocks; b++) {
        a->absmax1[b] = fabsf(a->absmax1[b]);
        a->absmax2[b] = fabsf(a->absmax2[b]);
    }
    settle(p, "absmax1");
    settle(p, "absmax2");
}

/* Scratch of exactly the bytes asked for, all NaN, between guards. */
static esp_status with_scratch(espi_exec *exec, size_t bytes) {
    unsigned char *block = aligned_alloc(GUARD, (bytes + GUARD - 1) / GUARD * GUARD + (size_t)2 * GUARD);
    if (!block) return ESP_ERR_MEMORY;
    memset(block, 0xA5, GUARD);
    memset(block + GUARD, 0xFF, bytes);
    memset(block + GUARD + bytes, 0xA5, GUARD);
    exec->scratch = block + GUARD;
    return ESP_OK;
}

static bool drop_scratch(const espi_exec *exec, size_t bytes) {
    unsigned char *scratch = exec->scratch;
    bool whole = true;
    for (size_t i = 0; i < GUARD; i++) whole = whole && scratch[-1 - (ptrdiff_t)i] == 0xA5 && scratch[bytes + i] == 0xA5;
    free(scratch - GUARD);
    return whole;
}

/* Three threads are as on a machine whose memory has two nodes, in pieces small enough that every stack lies on both. */
static const espi_nodes *nodes_of(int threads) {
    static const unsigned char of_thread[] = {0, 1, 1};
    static const espi_nodes two = {.count = 2, .threads = 3, .piece_bits = 8, .of_thread = of_thread};
    return threads == two.threads ? &two : NULL;
}

#define ESPI_OP(op, args_type)                                                                                                             \
    static void make_##op(problem *p) {                                                                                                    \
        build_##op(p, &p->args.op);                                                                                                        \
    }                                                                                                                                      \
    static esp_status run_##op(const espi_backend *backend, problem *p, int threads, const char **refusal) {                               \
        const args_type *a = &p->args.op;                                                                                                  \
        *refusal = backend->op.run == NULL ? "no such kernel" : backend->op.refuse ? backend->op.refuse(a) : NULL;                         \
        if (*refusal) return ESP_OK;                                                                                                       \
        espi_exec exec = {.threads = threads, .nodes = nodes_of(threads), .always_split = true};                                           \
        const size_t bytes = backend->op.scratch ? backend->op.scratch(&exec, a) : 0;                                                      \
        esp_status status = with_scratch(&exec, bytes);                                                                                    \
        if (status != ESP_OK) return status;                                                                                               \
        status = backend->op.run(&exec, a);                                                                                                \
        cr_assert(drop_scratch(&exec, bytes), "%s on %s, %s: wrote outside its scratch", #op, backend->name, p->shape.name);               \
        return status;                                                                                                                     \
    }
#include "kernels/ops.def"
#undef ESPI_OP

const op_case op_cases[ESPI_OP_COUNT] = {
#define ESPI_OP(name, args) {#name, make_##name, run_##name},
#include "kernels/ops.def"
#undef ESPI_OP
};

int backends(const espi_backend *all[BACKENDS]) {
    int n = 0;
    all[n++] = &espi_backend_ref;
    all[n++] = &espi_backend_ref64;
    for (int i = 0; espi_backends_cpu[i] && n < BACKENDS; i++)
        if (espi_backends_cpu[i]->available()) all[n++] = espi_backends_cpu[i];
    return n;
}

void problem_build(problem *p, espi_op_id op, const shape *shape, esp_dtype real, const espi_backend *saver) {
    *p = (problem){.shape = *shape, .op = op, .real = real, .saver = saver, .seed = seed_of(shape->name)};
    op_cases[op].build(p);
}

bool problem_pack(problem *p, const espi_backend *backend) {
    espi_stack *w = expert_stack(p);
    const size_t bytes = p->shape.packed && w && backend->packed_bytes ? backend->packed_bytes(w) : 0;
    if (bytes == 0) return false;
    unsigned char *packed = field_add(p, "packed", ROLE_IN, ESP_U8, w->experts * (int64_t)bytes);
    for (int64_t e = 0; e < w->experts; e++) {
        espi_stack one = *w;
        const int64_t part = e * w->parts;
        one.experts = 1;
        one.data = (const char *)w->data + (size_t)part * w->part_bytes;
        if (w->absmax) one.absmax += part * w->part_blocks;
        if (w->scales) one.scales += part * w->part_blocks;
        if (w->absmax8) one.absmax8 += part * w->part_blocks, one.nested += part * w->part_nested, one.offset += part;
        cr_assert_eq(backend->pack(&(espi_exec){.threads = 2}, packed + (size_t)e * bytes, &one), ESP_OK, "%s", esp_last_error());
    }
    settle(p, "packed");
    w->packed = packed;
    w->data = w->absmax8 = w->scales = NULL;
    w->absmax = w->nested = w->offset = NULL;
    return true;
}

void problem_call(problem *p, const espi_backend *backend) {
    const char *refusal = NULL, *name = "";
    const esp_status status = op_cases[p->op].run(backend, p, 1, &refusal);
    cr_assert(status == ESP_OK && !refusal, "%s on %s, shape %s, seed %llu: status %d, refusal %s, %s", op_cases[p->op].name, backend->name,
              p->shape.name, (unsigned long long)p->seed, status, refusal ? refusal : "none", esp_last_error());
    const char *damage = problem_damage(p, &name);
    cr_assert_null(damage, "%s on %s, shape %s: array %s: %s", op_cases[p->op].name, backend->name, p->shape.name, name, damage);
}

void problem_run(problem *p, espi_op_id op, const shape *shape, const espi_backend *backend, const espi_backend *saver) {
    problem_build(p, op, shape, backend->real, saver);
    problem_pack(p, backend);
    problem_call(p, backend);
}
