/* What attention's files share: attention.c cuts a call into tasks, and attention_f32.c or attention_bf16.c, one of the two in each
 * instruction set, does what a task is. */
#ifndef ESPI_KERNELS_CPU_ATTENTION_H
#define ESPI_KERNELS_CPU_ATTENTION_H

#include "kernels/cpu/cpu.h"

/* Queries of a task, in each head that reads a kv head. */
enum { ATTENTION_QUERIES = 64 };

/* The keys of one kv head of a sequence: element of place j = (j < prefix ? shared : own) + j * stride. */
typedef struct key_places {
    int64_t prefix, shared, own, stride;
} key_places;

static inline key_places places_of(const espi_spans *spans, int64_t seq, int64_t kv_heads, int64_t kv_head, int64_t dim) {
    key_places places = {.stride = kv_heads * dim};
    if (spans->prefix_len) {
        places.prefix = spans->prefix_len[seq];
        places.shared = spans->prefix_start[seq] * places.stride + kv_head * dim;
    }
    places.own = (spans->k_start[seq] - places.prefix) * places.stride + kv_head * dim;
    return places;
}
static inline int64_t element(const key_places *places, int64_t place) {
    return (place < places->prefix ? places->shared : places->own) + place * places->stride;
}
/* Rows from `place` on lie `stride` apart up to this place, or `end`. */
static inline int64_t run_end(const key_places *places, int64_t place, int64_t end) {
    return place < places->prefix ? cpu_min(end, places->prefix) : end;
}

/* The first place that a query sees which has `keys` places up to its own. */
static inline int64_t first_seen(int64_t keys, int64_t window) {
    return window > 0 && keys > window ? keys - window : 0;
}

/* What forward and backward know of a call. */
typedef struct attention_call {
    const espi_spans *spans;
    int64_t heads, kv_heads, dim, window;
    float scale;
} attention_call;
#define ATTENTION_CALL(a)                                                                                                                  \
    (attention_call) {                                                                                                                     \
        &(a)->spans, (a)->heads, (a)->kv_heads, (a)->head_dim, (a)->window, (float)(a)->scale                                              \
    }
/* Places up to that of query `row` of sequence seq, itself included. */
static inline int64_t places_upto(const attention_call *c, int64_t seq, int64_t row) {
    const int64_t prefix = c->spans->prefix_len ? c->spans->prefix_len[seq] : 0;
    return prefix + c->spans->k_len[seq] - (c->spans->cu_q[seq + 1] - row) + 1;
}

/* Which gradients are formed: d_q, and d_k and d_v of the keys at places first .. end - 1. */
typedef struct attention_parts {
    bool d_q;
    int64_t first, end;
} attention_parts;

#define cpu_attend ESPI_CPU(espi_cpu_attend)
#define cpu_attend_scratch ESPI_CPU(espi_cpu_attend_scratch)
#define cpu_attention_grads ESPI_CPU(espi_cpu_attention_grads)
#define cpu_attention_grads_scratch ESPI_CPU(espi_cpu_attention_grads_scratch)

/* Outputs of queries begin .. end - 1 of a sequence, ATTENTION_QUERIES at most, in the heads that read a kv head. */
void cpu_attend(const espi_attention_fwd *a, void *scratch, int64_t seq, int64_t kv_head, int64_t begin, int64_t end);
/* Bytes that a task needs, a multiple of 64. */
size_t cpu_attend_scratch(const espi_attention_fwd *a);

/* What queries begin .. end - 1 of a sequence, in the heads that read a kv head, make of the parts: d_q overwritten, d_k and d_v added.
 * begin is the sequence's first, or that and a multiple of ATTENTION_QUERIES. */
void cpu_attention_grads(const espi_attention_bwd *a, void *scratch, int64_t seq, int64_t kv_head, int64_t begin, int64_t end,
                         const attention_parts *wanted);
size_t cpu_attention_grads_scratch(const espi_attention_bwd *a);

#endif
