/* What the sources of one instruction set share: names, the vector type, and the matrix product that most ops are made of.
 * Every source here is compiled once per instruction set (ESPI_CPU_ISA = generic, avx2, avx512, avx512_bf16, amx_bf16) with that set's flags; vectors are those of
 * the compiler (GCC and clang), so one text serves all.
 *
 * Bits: each output of a product is made of chains of multiply-adds over PANEL_DEPTH steps of k, added in order, whatever tile it lies in.
 * So a row's result depends on that row alone, not on how many rows there are and not on the threads. */
#ifndef ESPI_KERNELS_CPU_H
#define ESPI_KERNELS_CPU_H

#include "core/status.h"
#include "kernels/backend.h"
#include "kernels/stack.h"

#include <math.h>
#include <string.h>

#define ESPI_CPU_PASTE2(name, isa) name##_##isa
#define ESPI_CPU_PASTE(name, isa) ESPI_CPU_PASTE2(name, isa)
#define ESPI_CPU(name) ESPI_CPU_PASTE(name, ESPI_CPU_ISA)

/* LANES floats a vector; register tile of the product: TILE_ROWS x TILE_VECS vectors; OUTER_ROWS x OUTER_VECS for sums over rows. */
#if defined(__AVX512F__)
enum { LANES = 16, TILE_ROWS = 6, TILE_VECS = 4, OUTER_ROWS = 8, OUTER_VECS = 2 };
#elif defined(__AVX2__)
enum { LANES = 8, TILE_ROWS = 6, TILE_VECS = 2, OUTER_ROWS = 4, OUTER_VECS = 2 };
#else
enum { LANES = 4, TILE_ROWS = 4, TILE_VECS = 2, OUTER_ROWS = 4, OUTER_VECS = 2 };
#endif

/* Columns of a packed panel, and how many steps of k it holds: 32 KiB at most. */
enum { PANEL_COLS = TILE_VECS * LANES, PANEL_DEPTH = 128 };

/* Before a loop whose variable must be a constant, so that arrays indexed by it are registers.  GCC has to be told; clang unrolls such loops
 * by itself, and after that stage when it is told. */
#if defined(__clang__)
#define CPU_UNROLL
#else
#define CPU_UNROLL _Pragma("GCC unroll 16")
#endif

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
/* The same, at any address. */
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

static inline vec load(const float *p) {
    return *(const loose_vec *)p;
}
static inline void store(float *p, vec x) {
    *(loose_vec *)p = x;
}
static inline vec splat(float x) {
    return x - (vec){0};
}
static inline vec pick(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}
static inline vec vmax(vec a, vec b) {
    return pick(a > b, a, b);
}
/* Always in the same order: halves onto halves. */
typedef float vec4 __attribute__((vector_size(16), aligned(4), may_alias));
static inline float vsum(vec x) {
#if defined(__AVX512F__)
    typedef float half __attribute__((vector_size(32)));
    const half h = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const vec h = x;
#endif
#if defined(__AVX2__)
    const vec4 q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#else
    const vec4 q = h;
#endif
    return (q[0] + q[2]) + (q[1] + q[3]);
}
static inline float vlargest(vec x) {
    float largest = x[0];
    for (int i = 1; i < LANES; i++) largest = x[i] > largest ? x[i] : largest;
    return largest;
}

/* e^x to 2 ulp: x = n ln 2 + r, a polynomial of degree 6 in r (Cephes), n put into the exponent.  Below -87 it gives 0, above 88.3 it
 * saturates at e^88.3; NaN stays NaN. */
static inline vec vexp(vec x) {
    const vec low = splat(-87.0f), high = splat(88.3f), magic = splat(12582912.0f); /* adding 1.5 * 2^23 rounds to an integer */
    const ivec tiny = x < low;
    const vec y = pick(x > high, high, pick(tiny, low, x));
    const vec n = (y * splat(1.44269504088896341f) + magic) - magic;
    const vec r = (y - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
    vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
    return pick(tiny, (vec){0}, p * (vec)exponent);
}

/* The first n < LANES floats; the other lanes hold `fill`. */
static inline vec load_part(const float *p, int64_t n, float fill) {
    vec x = splat(fill);
    memcpy(&x, p, (size_t)n * sizeof(float));
    return x;
}
static inline void store_part(float *p, vec x, int64_t n) {
    memcpy(p, &x, (size_t)n * sizeof(float));
}

static inline float cpu_dot(const float *x, const float *y, int64_t n) {
    vec sum = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sum += load(x + i) * load(y + i);
    if (i < n) sum += load_part(x + i, n - i, 0) * load_part(y + i, n - i, 0);
    return vsum(sum);
}

/* Rows of a matrix: row i lies at base + (index ? index[i] : i) * stride. */
typedef struct cpu_rows {
    float *base;
    int64_t stride;
    const int32_t *index;
} cpu_rows;
static inline float *row_at(const cpu_rows *rows, int64_t i) {
    return rows->base + (rows->index ? rows->index[i] : i) * rows->stride;
}

/* The right-hand side of a product, b(k, n), times `scale`: W[n][k] when transposed (y = x W^T), else W[k][n] (d_x = d_y W).
 * W: a plain row-major matrix, or expert `expert` of a stack. */
typedef struct cpu_weight {
    const void *data;
    esp_dtype dtype;
    int64_t cols;
    const espi_stack *stack; /* NULL: plain */
    int64_t expert;
    float scale;
    bool transposed;
    const float (*pairs)[2]; /* stack of codes: the two values of a byte; see cpu_pairs() */
} cpu_weight;

#define cpu_decode_row ESPI_CPU(espi_cpu_decode_row)
#define cpu_product ESPI_CPU(espi_cpu_product)
#define cpu_product_low ESPI_CPU(espi_cpu_product_low)
#define cpu_outer ESPI_CPU(espi_cpu_outer)

/* dst = n values of row `row` from column `col` on, times the scale. */
void cpu_decode_row(float *dst, const cpu_weight *w, int64_t row, int64_t col, int64_t n);

/* c[0..m)[0..n) = (add ? c : 0) + a[0..m)[0..depth) * b(0..depth, col .. col + n). */
void cpu_product(const cpu_rows *c, const cpu_rows *a, const cpu_weight *b, int64_t m, int64_t depth, int64_t col, int64_t n, bool add);

/* The same and a low-rank branch's second product: + rows[0..m)[0..r) * weight(0..r, col .. col + n).  r = 0: none. */
typedef struct cpu_low {
    cpu_rows rows;
    cpu_weight weight;
    int64_t r;
} cpu_low;
void cpu_product_low(const cpu_rows *c, const cpu_rows *a, const cpu_weight *b, const cpu_low *low, int64_t m, int64_t depth, int64_t col,
                     int64_t n, bool add);

/* sum over s of a[s][i] * b_row(s)[col + j], i < rows <= OUTER_ROWS, j < n <= OUTER_VECS * LANES, s ascending.
 * a: stride a_stride from s to s + 1.  out: [OUTER_ROWS][OUTER_VECS * LANES]. */
void cpu_outer(float *out, const float *a, int64_t a_stride, const cpu_rows *b, int64_t count, int64_t rows, int64_t col, int64_t n);

static inline void cpu_pairs(float pairs[256][2], const espi_stack *w) {
    const bool low_first = w->format == ESP_MXFP4;
    for (int byte = 0; byte < 256 && w->format != ESP_Q_NONE; byte++) {
        pairs[byte][low_first] = w->lut[byte >> 4];
        pairs[byte][!low_first] = w->lut[byte & 15];
    }
}
static inline cpu_weight cpu_plain(const espi_mat *w, bool transposed) {
    return (cpu_weight){.data = w->data, .dtype = w->dtype, .cols = w->cols, .scale = 1, .transposed = transposed};
}
static inline cpu_weight cpu_floats(const float *w, int64_t cols, float scale, bool transposed) {
    return (cpu_weight){.data = w, .dtype = ESP_F32, .cols = cols, .scale = scale, .transposed = transposed};
}
static inline cpu_weight cpu_expert(const espi_stack *w, int64_t expert, const float (*pairs)[2], bool transposed) {
    return (cpu_weight){
        .dtype = w->dtype, .cols = w->cols, .stack = w, .expert = expert, .scale = 1, .transposed = transposed, .pairs = pairs};
}

/* Threads for `work` multiply-adds or element visits: a parallel region costs more than it saves below some milliseconds, in processor time
 * above all, since the idle threads of a region spin.  From sizes alone. */
static inline int cpu_threads(const espi_exec *exec, double work) {
    return exec->threads > 1 && (exec->always_split || work > 1.0e8) ? exec->threads : 1;
}

/* Tasks 0 .. count - 1 of a region.  For each memory node they are gone through once, by whichever threads come to that: those that run on
 * the node, and those that have nothing left to do on their own.  Of them, the ones whose weights lie there are done. */
typedef struct cpu_tasks {
    int64_t count;
    const espi_nodes *nodes; /* NULL: one */
    struct {
        _Alignas(64) int64_t gone;
    } of_node[ESPI_NODES];
} cpu_tasks;
typedef struct cpu_turn {
    int64_t task;
    int node, nodes_left;
} cpu_turn;

static inline cpu_tasks cpu_tasks_of(const espi_exec *exec, int threads, int64_t count) {
    return (cpu_tasks){.count = count, .nodes = threads > 1 ? exec->nodes : NULL};
}
static inline cpu_turn cpu_first(const cpu_tasks *tasks, int thread) {
    const espi_nodes *nodes = tasks->nodes;
    return nodes ? (cpu_turn){.node = nodes->of_thread[thread], .nodes_left = nodes->count} : (cpu_turn){.nodes_left = 1};
}
static inline bool cpu_next(cpu_tasks *tasks, cpu_turn *turn) {
    for (; turn->nodes_left > 0; turn->nodes_left--) {
        turn->task = __atomic_fetch_add(&tasks->of_node[turn->node].gone, 1, __ATOMIC_RELAXED);
        if (turn->task < tasks->count) return true;
        turn->node = tasks->nodes && turn->node + 1 < tasks->nodes->count ? turn->node + 1 : 0;
    }
    return false;
}
static inline bool cpu_near(const cpu_tasks *tasks, const cpu_turn *turn, const void *weights) {
    const espi_nodes *nodes = tasks->nodes;
    return !nodes || nodes->of_thread[((uintptr_t)weights >> nodes->piece_bits) % (uintptr_t)nodes->threads] == turn->node;
}

/* The low-rank branch of one matrix or expert; r = 0: absent. */
typedef struct cpu_branch {
    const float *a, *b;
    float *d_a, *d_b;
    int64_t r, in, out;
    float scale;
} cpu_branch;
static inline cpu_branch cpu_branch_of(const espi_lora *lora, int64_t expert, int64_t in, int64_t out) {
    const int64_t a_at = expert * lora->r * in, b_at = expert * out * lora->r;
    cpu_branch l = {.r = lora->r, .in = in, .out = out, .scale = (float)lora->scale};
    if (lora->r == 0) return l;
    l.a = (const float *)lora->a + a_at;
    l.b = (const float *)lora->b + b_at;
    if (lora->d_a) l.d_a = (float *)lora->d_a + a_at;
    if (lora->d_b) l.d_b = (float *)lora->d_b + b_at;
    return l;
}
static inline int64_t cpu_blocks(int64_t n, int64_t block) {
    return (n + block - 1) / block;
}
static inline int64_t cpu_min(int64_t a, int64_t b) {
    return a < b ? a : b;
}

/* Gradients of a branch, in strips of OUTER_VECS * LANES columns: strips 0.. of d_a^T's side, then those of d_b's.
 * d_a += q^T x;  d_b += scale d_y^T u.  Each strip has one owner. */
#define cpu_branch_strips ESPI_CPU(espi_cpu_branch_strips)
#define cpu_branch_grad ESPI_CPU(espi_cpu_branch_grad)
int64_t cpu_branch_strips(const cpu_branch *l);
void cpu_branch_grad(const cpu_branch *l, int64_t strip, const cpu_rows *x, const cpu_rows *d_y, const float *u, const float *q,
                     int64_t count);

/* The ops. */
#define ESPI_OP(name, args) esp_status ESPI_CPU(espi_##name)(const espi_exec *exec, const args *a);
#include "kernels/ops.def"
#undef ESPI_OP
size_t ESPI_CPU(espi_attention_fwd_scratch)(const espi_exec *exec, const espi_attention_fwd *a);
size_t ESPI_CPU(espi_attention_bwd_scratch)(const espi_exec *exec, const espi_attention_bwd *a);
size_t ESPI_CPU(espi_linear_fwd_scratch)(const espi_exec *exec, const espi_linear_fwd *a);
size_t ESPI_CPU(espi_linear_bwd_scratch)(const espi_exec *exec, const espi_linear_bwd *a);
size_t ESPI_CPU(espi_gate_up_fwd_scratch)(const espi_exec *exec, const espi_gate_up_fwd *a);
size_t ESPI_CPU(espi_down_fwd_scratch)(const espi_exec *exec, const espi_down_fwd *a);
size_t ESPI_CPU(espi_gate_up_bwd_scratch)(const espi_exec *exec, const espi_gate_up_bwd *a);
size_t ESPI_CPU(espi_down_bwd_scratch)(const espi_exec *exec, const espi_down_bwd *a);
size_t ESPI_CPU(espi_head_stats_scratch)(const espi_exec *exec, const espi_head_stats *a);
size_t ESPI_CPU(espi_head_grad_scratch)(const espi_exec *exec, const espi_head_grad *a);
size_t ESPI_CPU(espi_head_fused_scratch)(const espi_exec *exec, const espi_head_fused *a);
size_t ESPI_CPU(espi_head_logits_scratch)(const espi_exec *exec, const espi_head_logits *a);
size_t ESPI_CPU(espi_head_sample_scratch)(const espi_exec *exec, const espi_head_sample *a);

#endif
