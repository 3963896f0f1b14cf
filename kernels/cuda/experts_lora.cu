/* The low-rank branches of the experts beside the large products: the skinny products of rank r (low), the gradients of A and B (outer), and
 * the bias's share in the gradient of a routing weight.  mma.sync on any GPU from sm_80; sums run in a fixed order, nothing is atomic. */
#include "kernels/cuda/experts.cuh"

#define LOW_ROWS 64
#define LOW_WARPS 8
#define PASS 16            /* ranks per pass */
#define MANY_MEAN_ROWS 192 /* mean rows per expert from which blocks are made for many */

/* Four words of two bf16: the values k .. k+7 of row n of L, zero past the rank. */
static __device__ __forceinline__ uint4 low_operand(const float *l, int64_t width, int64_t k, int n, int r) {
    if (n >= r) return make_uint4(0, 0, 0, 0);
    const float4 a = __ldg((const float4 *)(l + n * width + k)), b = __ldg((const float4 *)(l + n * width + k + 4));
    return make_uint4(dev_bf16x2(a.x, a.y), dev_bf16x2(a.z, a.w), dev_bf16x2(b.x, b.y), dev_bf16x2(b.z, b.w));
}

/* A block: `parts` times 64 rows of one expert x 16 ranks; of each part eight warps share the width, 32 columns in turn, so that all parts want
 * the same of L at about the same time.  A lane reads 8 neighbouring values of a row: the order of the contraction is free, as long as both
 * operands follow it. */
template <int parts>
static __global__ __launch_bounds__(parts *LOW_WARPS * 32, 2 / parts) void low_product(low_args p, const int32_t *offsets, int experts) {
    __shared__ float shares[LOW_WARPS][LOW_ROWS][PASS];
    const row_tile t = find_tile(offsets, experts, (int)blockIdx.x, parts * LOW_ROWS);
    if (t.rows <= 0) return;
    const int warp = threadIdx.x / 32 % LOW_WARPS, part = threadIdx.x / (LOW_WARPS * 32), lane = threadIdx.x % 32;
    const int group = lane / 4, quad = lane % 4, n0 = (int)blockIdx.y * PASS;
    const float *l = p.l + t.expert * p.width * p.r;
    uint32_t row[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int64_t s = t.row0 + min(LOW_ROWS * part + 8 * i + group, t.rows - 1);
        row[i] = (uint32_t)(p.in_row ? p.in_row[s] : s);
    }
    const bf16 *in = p.in + 8 * quad;
    const uint32_t row_width = (uint32_t)p.width;
    const int64_t width = LOW_ROWS * part < t.rows ? p.width : 0;
    float sum[4][2][4] = {};
#pragma unroll 1
    for (int64_t k = 32 * warp; k < width; k += 32 * LOW_WARPS) {
        uint4 a[8];
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] = dev_load_stream(in + (uint64_t)row[i] * row_width + k);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint4 b = low_operand(l, p.width, k + 8 * quad, n0 + 8 * h + group, p.r);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                dev_mma(sum[m][h], a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y, b.x, b.y);
                dev_mma(sum[m][h], a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w, b.z, b.w);
            }
        }
    }
    for (int turn = 0; turn < parts; turn++) {
        if (turn) __syncthreads();
        if (part == turn)
#pragma unroll
            for (int i = 0; i < 32; i++)
                shares[warp][16 * (i / 8) + 8 * (i / 2 % 2) + group][8 * (i / 4 % 2) + 2 * quad + i % 2] = sum[i / 8][i / 4 % 2][i % 4];
        __syncthreads();
        for (int i = threadIdx.x; i < LOW_ROWS * PASS; i += parts * LOW_WARPS * 32) {
            const int m = LOW_ROWS * turn + i / PASS, n = n0 + i % PASS;
            if (m >= t.rows || n >= p.r) continue;
            float total = 0;
            for (int w = 0; w < LOW_WARPS; w++) total += shares[w][i / PASS][i % PASS];
            p.low[(t.row0 + m) * p.r + n] = __float2bfloat16_rn(total);
        }
    }
}

/* The same for any width and rank, and across: one warp per routed row. */
template <bool across> static __global__ void low_plain(low_args p, const int32_t *offsets, int experts) {
    const row_tile t = find_tile(offsets, experts, (int)blockIdx.x, LOW_WARPS);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= t.rows) return;
    const int64_t s = t.row0 + warp;
    const bf16 *in = p.in + (p.in_row ? p.in_row[s] : s) * p.width;
    const float *l = p.l + t.expert * p.width * p.r;
    for (int n = 0; n < p.r; n++) {
        float sum = 0;
        for (int64_t k = lane; k < p.width; k += 32) sum += __bfloat162float(in[k]) * (across ? l[k * p.r + n] : l[n * p.width + k]);
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (lane) continue;
        const int64_t at = s * p.r + n;
        p.low[at] = __float2bfloat16_rn(p.factor * sum);
        if (p.weight) p.weighted[at] = __float2bfloat16_rn(p.weight[s] * (p.factor * sum));
    }
}

static bool has_many_rows(const espi_routing *routing) {
    return routing->tokens * routing->top_k >= routing->experts * MANY_MEAN_ROWS;
}

static bool in_pieces(int64_t width, int r) {
    return width % 32 == 0 && r % 8 == 0;
}

template <bool across> static cudaError_t launch_low_plain(const low_args &a, const espi_routing *routing, cudaStream_t stream) {
    low_plain<across><<<(unsigned)tile_bound(routing, LOW_WARPS), LOW_WARPS * 32, 0, stream>>>(a, routing->offsets, (int)routing->experts);
    return cudaGetLastError();
}

template <int parts> static cudaError_t launch_low(const low_args &a, const espi_routing *routing, cudaStream_t stream) {
    const dim3 grid((unsigned)tile_bound(routing, parts * LOW_ROWS), (unsigned)((a.r + PASS - 1) / PASS));
    low_product<parts><<<grid, parts * LOW_WARPS * 32, 0, stream>>>(a, routing->offsets, (int)routing->experts);
    return cudaGetLastError();
}

cudaError_t lora_low(const low_args *a, const espi_routing *routing, cudaStream_t stream) {
    if (!in_pieces(a->width, a->r)) return launch_low_plain<false>(*a, routing, stream);
    return has_many_rows(routing) ? launch_low<2>(*a, routing, stream) : launch_low<1>(*a, routing, stream);
}

/* The expert with the n-th most rows: the longest begin first, so that none is left at the end.  Called by the whole block. */
#define SORTED_EXPERTS 1024 /* more are taken as they come */

static __device__ __forceinline__ int nth_longest(int *rows_of, const int32_t *offsets, int experts, int n) {
    __shared__ int chosen;
    if (experts > SORTED_EXPERTS) return n;
    for (int e = (int)threadIdx.x; e < experts; e += (int)blockDim.x) rows_of[e] = offsets[e + 1] - offsets[e];
    __syncthreads();
    for (int e = (int)threadIdx.x; e < experts; e += (int)blockDim.x) {
        const int rows = rows_of[e];
        int before = 0;
#pragma unroll 8
        for (int other = 0; other < experts; other++) before += rows_of[other] > rows || (rows_of[other] == rows && other < e);
        if (before == n) chosen = e;
    }
    __syncthreads();
    return chosen;
}

/* ---- the gradient of A: a block owns 128 columns of one expert.  The expert's rows are dealt, 32 at a time, to three shares, whose sums are
 * added up in order at the end: where experts have many rows three groups of four warps take one share each, or the longest expert would go on
 * alone for long; else one group takes all.  The bits are the same. ---- */
#define SLAB 128
#define GROUP 128 /* threads */
#define SHARES 3
#define STEP 32
#define IN_STRIDE (2 * SLAB + 16) /* bytes; one access width of padding keeps eight rows on different banks */
#define LOW_STRIDE (2 * PASS + 16)
#define STAGE (STEP * (IN_STRIDE + LOW_STRIDE))
#define STAGES 3

struct outer_place {
    int64_t begin, rows, slab, columns; /* columns: of this slab, a multiple of 8 */
    int n0, low_bytes;                  /* low_bytes: of a row of this pass */
    int group, groups;
};

/* 16-byte pieces of low rows [first, first + 32) into a stage; zero past the last row. */
static __device__ __forceinline__ void load_low(uint32_t to, const outer_args &p, const outer_place &at, int64_t first) {
    const int row = threadIdx.x % GROUP / 2, piece = threadIdx.x % 2;
    if (row >= STEP) return;
    const bool there = first + row < at.rows && 16 * piece < at.low_bytes;
    const bf16 *from = p.low + (at.begin + (there ? first + row : 0)) * p.r + at.n0 + (there ? 8 * piece : 0);
    dev_copy16_or_zero(to + row * LOW_STRIDE + 16 * piece, from, there ? 16 : 0);
}

static __device__ __forceinline__ void multiply_stage(float (&sum)[2][2][4], uint32_t in, uint32_t low) {
    const int warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
#pragma unroll
    for (int k = 0; k < STEP; k += 16) {
        const uint4 b = dev_ldmatrix_trans(low + (k + matrix % 2 * 8 + line) * LOW_STRIDE + matrix / 2 * 16);
#pragma unroll
        for (int m = 0; m < 2; m++) {
            const uint4 a = dev_ldmatrix_trans(in + (k + matrix / 2 * 8 + line) * IN_STRIDE + (32 * warp + 16 * m + matrix % 2 * 8) * 2);
            dev_mma(sum[m][0], a.x, a.y, a.z, a.w, b.x, b.y);
            dev_mma(sum[m][1], a.x, a.y, a.z, a.w, b.z, b.w);
        }
    }
}

/* The sums of all shares, in order: of this group, or by way of shared memory that no group reads any more. */
template <int shares>
static __device__ __forceinline__ void add_shares(float (&sum)[shares][2][2][4], const outer_place &at, uint32_t base) {
#pragma unroll
    for (int i = 16; i < shares * 16; i++) sum[0][i / 8 % 2][i / 4 % 2][i % 4] += sum[i / 16][i / 8 % 2][i / 4 % 2][i % 4];
    if (shares == SHARES) return;
    const uint32_t to = base + threadIdx.x % GROUP * 16;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++)
        if (at.group > 0) dev_store_shared(to + ((at.group - 1) * 4 + i) * GROUP * 16, *(const uint4 *)sum[0][i / 2][i % 2]);
    __syncthreads();
    for (int g = 1; g < SHARES && at.group == 0; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 v = dev_load_shared(to + ((g - 1) * 4 + i) * GROUP * 16);
            float *s = sum[0][i / 2][i % 2];
            s[0] += __uint_as_float(v.x), s[1] += __uint_as_float(v.y), s[2] += __uint_as_float(v.z), s[3] += __uint_as_float(v.w);
        }
}

static __device__ __forceinline__ void add_outer(const outer_args &p, const outer_place &at, int expert, const float (&sum)[2][2][4]) {
    if (at.group) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float *d = p.d + expert * p.width * p.r;
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int column = 32 * warp + 16 * m + 8 * (i / 2) + lane / 4, n = at.n0 + 8 * h + 2 * (lane % 4) + i % 2;
                if (column >= at.columns || n >= p.r) continue;
                float *to = p.across ? d + n * p.width + at.slab + column : d + (at.slab + column) * p.r + n;
                *to += p.factor * sum[m][h][i];
            }
}

template <int groups>
static __device__ __forceinline__ outer_place outer_place_of(const outer_args &p, const int32_t *offsets, int expert) {
    outer_place at;
    at.begin = offsets[expert];
    at.rows = offsets[expert + 1] - at.begin;
    at.slab = (int64_t)blockIdx.x * SLAB;
    at.columns = min((int64_t)SLAB, p.width - at.slab);
    at.n0 = (int)blockIdx.z * PASS;
    at.low_bytes = 2 * min(PASS, p.r - at.n0);
    at.group = (int)threadIdx.x / GROUP, at.groups = groups;
    return at;
}

template <int shares>
static __device__ __forceinline__ void outer_product(float (&sum)[shares][2][2][4], const outer_args &p, const outer_place &at,
                                                     uint32_t base) {
    const int piece = threadIdx.x % 16, line = threadIdx.x % GROUP / 16; /* of 16 pieces and 8 lines a turn */
    const int64_t column = 8 * piece < at.columns ? at.slab + 8 * piece : at.slab;
    const int64_t steps = (at.rows + STEP - 1) / STEP;
    base += at.group * STAGES * STAGE;
    uint32_t filled = base, read = base;
    const uint32_t end = base + STAGES * STAGE;
    auto load = [&](int64_t step) {
        if (step < steps) {
            const uint32_t to = filled;
            filled = filled + STAGE == end ? base : filled + STAGE;
#pragma unroll
            for (int i = 0; i < STEP; i += 8) {
                const int64_t s = at.begin + min(step * STEP + i + line, at.rows - 1);
                dev_copy16(to + (i + line) * IN_STRIDE + 16 * piece, p.in + (p.in_row ? p.in_row[s] : s) * p.width + column);
            }
            load_low(to + STEP * IN_STRIDE, p, at, step * STEP);
        }
        dev_copy_commit();
    };
    for (int ahead = 0; ahead < STAGES - 1; ahead++) load(at.group + ahead * at.groups);
    for (int64_t first = at.group; first < steps; first += SHARES)
#pragma unroll
        for (int share = 0; share < shares; share++) {
            if (first + share >= steps) continue;
            dev_copy_wait<STAGES - 2>();
            dev_meet(1 + at.group, GROUP);
            load(first + share + (STAGES - 1) * at.groups);
            multiply_stage(sum[share], read, read + STEP * IN_STRIDE);
            read = read + STAGE == end ? base : read + STAGE;
        }
}

/* As outer_product, of the activation that is formed again from gu: the next rows are on their way in registers. */
template <int shares>
static __device__ __forceinline__ void outer_product_of_activation(float (&sum)[shares][2][2][4], const outer_args &p,
                                                                   const outer_place &at, uint32_t base) {
    const int piece = threadIdx.x % 16, line = threadIdx.x % GROUP / 16;
    const int64_t column = 8 * piece < at.columns ? at.slab + 8 * piece : at.slab;
    const int64_t steps = (at.rows + STEP - 1) / STEP;
    const int64_t first = p.glu.interleaved ? 2 * column : column, second = p.glu.interleaved ? first + 8 : first + p.width;
    uint4 a[STEP / 8], b[STEP / 8];
    auto load = [&](int64_t step, uint32_t to) {
#pragma unroll
        for (int i = 0; i < STEP / 8; i++) {
            const bf16 *row = p.gu + (at.begin + min(step * STEP + 8 * i + line, at.rows - 1)) * 2 * p.width;
            a[i] = __ldg((const uint4 *)(row + first));
            b[i] = __ldg((const uint4 *)(row + second));
        }
        load_low(to + STEP * IN_STRIDE, p, at, step * STEP);
        dev_copy_commit();
    };
    uint32_t in = base + at.group * STAGES * STAGE, other = in + STAGE;
    if (at.group < steps) load(at.group, in);
    for (int64_t first = at.group; first < steps; first += SHARES)
#pragma unroll
        for (int share = 0; share < shares; share++) {
            const int64_t step = first + share;
            if (step >= steps) continue;
#pragma unroll
            for (int i = 0; i < STEP / 8; i++)
                dev_store_shared(in + (8 * i + line) * IN_STRIDE + 16 * piece,
                                 activate8(split_gate_up(a[i], b[i], p.glu.interleaved), p.glu));
            dev_copy_wait<0>();
            dev_meet(1 + at.group, GROUP);
            if (step + at.groups < steps) load(step + at.groups, other);
            multiply_stage(sum[share], in, in + STEP * IN_STRIDE);
            const uint32_t now = in;
            in = other, other = now;
        }
}

template <int groups>
static __global__ __launch_bounds__(groups *GROUP, groups == 1 ? 4 : 2) void outer_products(const __grid_constant__ outer_args p,
                                                                                            const int32_t *offsets, int experts) {
    extern __shared__ __align__(16) uint8_t stages[];
    const int expert = groups > 1 ? nth_longest((int *)stages, offsets, experts, (int)blockIdx.y) : (int)blockIdx.y;
    const outer_place at = outer_place_of<groups>(p, offsets, expert);
    if (at.rows == 0) return;
    __syncthreads(); /* the counts are read */
    float sum[SHARES / groups][2][2][4] = {};
    if (p.gu)
        outer_product_of_activation(sum, p, at, dev_shared(stages));
    else
        outer_product(sum, p, at, dev_shared(stages));
    add_shares(sum, at, dev_shared(stages));
    add_outer(p, at, expert, sum[0]);
}

template <int groups> static cudaError_t launch_outer(const outer_args &a, const espi_routing *routing, cudaStream_t stream) {
    const int bytes = groups * STAGES * STAGE;
    const dim3 grid((unsigned)((a.width + SLAB - 1) / SLAB), (unsigned)routing->experts, (unsigned)((a.r + PASS - 1) / PASS));
    const cudaError_t error = cudaFuncSetAttribute(outer_products<groups>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    outer_products<groups><<<grid, groups * GROUP, bytes, stream>>>(a, routing->offsets, (int)routing->experts);
    return cudaGetLastError();
}

/* One thread per element of the gradient, for any width and rank. */
static __global__ void outer_plain(outer_args p, const int32_t *offsets) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, column = i / p.r;
    const int n = (int)(i % p.r), expert = (int)blockIdx.y;
    if (column >= p.width || offsets[expert] == offsets[expert + 1]) return;
    float sum = 0;
    for (int64_t s = offsets[expert]; s < offsets[expert + 1]; s++) {
        float in;
        if (p.gu) {
            const bf16 *gate = p.gu + s * 2 * p.width + (p.glu.interleaved ? 2 * column : column);
            in = glu<true>(__bfloat162float(*gate), __bfloat162float(gate[p.glu.interleaved ? 1 : p.width]), p.glu);
        } else {
            in = __bfloat162float(p.in[(p.in_row ? p.in_row[s] : s) * p.width + column]);
        }
        const float low = __bfloat162float(p.low[s * p.r + n]);
        sum += in * (p.weight ? __bfloat162float(__float2bfloat16_rn(p.weight[s] * low)) : low);
    }
    float *d = p.d + expert * p.width * p.r;
    *(p.across ? d + n * p.width + column : d + column * p.r + n) += p.factor * sum;
}

static cudaError_t launch_outer_plain(const outer_args &a, const espi_routing *routing, cudaStream_t stream) {
    outer_plain<<<dim3((unsigned)((a.width * a.r + 127) / 128), (unsigned)routing->experts), 128, 0, stream>>>(a, routing->offsets);
    return cudaGetLastError();
}

cudaError_t lora_outer(const outer_args *a, const espi_routing *routing, cudaStream_t stream) {
    if (!in_pieces(a->width, a->r)) return launch_outer_plain(*a, routing, stream);
    return has_many_rows(routing) ? launch_outer<SHARES>(*a, routing, stream) : launch_outer<1>(*a, routing, stream);
}

/* ---- the gradient of B and the skinny product across B take the same rows, which are read once: a block owns 256 columns of one expert,
 * whose rows are dealt to two shares, 16 at a time.  Of the product these make a share, and the shares are added up in order afterwards ---- */
#define PAIR_SLAB 256
#define PAIR_STEP 16
#define PAIR_STRIDE (2 * PAIR_SLAB + 16)
#define PAIR_STAGE (PAIR_STEP * (PAIR_STRIDE + LOW_STRIDE))
#define PAIR_STAGES 4
#define PART_STRIDE (4 * PASS + 16)
#define PART (PAIR_STEP * PART_STRIDE) /* of a warp: its share of the product of 16 rows */
#define PAIR_BYTES (PAIR_STAGES * PAIR_STAGE + 8 * PART)
#define PAIR_SHARES 2
struct pair_place {
    int64_t begin, rows, slab;
    int n0, group;
};

/* What a lane holds of L in the tensor cores' fragments: its warp's 64 columns by 16 ranks; zero past the width and the rank. */
static __device__ __forceinline__ void load_fragments(uint32_t (&b)[4][2][2], const pair_args &p, const pair_place &at, int expert) {
    const int warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32;
    const float *l = p.l + expert * p.width * p.r;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int64_t k = at.slab + 64 * warp + 16 * (i / 4) + 8 * (i % 2) + 2 * (lane % 4);
        const int n = at.n0 + 8 * (i / 2 % 2) + lane / 4;
        const bool there = k < p.width && n < p.r;
        b[i / 4][i / 2 % 2][i % 2] = there ? dev_bf16x2(__ldg(l + k * p.r + n), __ldg(l + (k + 1) * p.r + n)) : 0;
    }
}

/* Eight values times a weight. */
static __device__ __forceinline__ uint4 weighted8(uint4 v, float weight) {
    return make_uint4(dev_bf16x2(weight * dev_lo(v.x), weight * dev_hi(v.x)), dev_bf16x2(weight * dev_lo(v.y), weight * dev_hi(v.y)),
                      dev_bf16x2(weight * dev_lo(v.z), weight * dev_hi(v.z)), dev_bf16x2(weight * dev_lo(v.w), weight * dev_hi(v.w)));
}

/* Both products of 16 rows: sum, of the gradient; the share of the skinny product goes to `part`. */
static __device__ __forceinline__ void multiply_pair(float (&sum)[4][2][4], const uint32_t (&b)[4][2][2], uint32_t in, uint32_t low,
                                                     uint32_t part) {
    const int warp = threadIdx.x % GROUP / 32, lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
    const uint4 u = dev_ldmatrix_trans(low + (matrix % 2 * 8 + line) * LOW_STRIDE + matrix / 2 * 16);
    float share[2][4] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int column = 64 * warp + 16 * i;
        const uint4 a = dev_ldmatrix(in + (matrix % 2 * 8 + line) * PAIR_STRIDE + (column + matrix / 2 * 8) * 2);
        dev_mma(share[0], a.x, a.y, a.z, a.w, b[i][0][0], b[i][0][1]);
        dev_mma(share[1], a.x, a.y, a.z, a.w, b[i][1][0], b[i][1][1]);
        const uint4 t = dev_ldmatrix_trans(in + (matrix / 2 * 8 + line) * PAIR_STRIDE + (column + matrix % 2 * 8) * 2);
        dev_mma(sum[i][0], t.x, t.y, t.z, t.w, u.x, u.y);
        dev_mma(sum[i][1], t.x, t.y, t.z, t.w, u.z, u.w);
    }
#pragma unroll
    for (int i = 0; i < 8; i++)
        dev_store_shared(part + warp * PART + (lane / 4 + 8 * (i / 2 % 2)) * PART_STRIDE + (8 * (i / 4) + 2 * (lane % 4) + i % 2) * 4,
                         __float_as_uint(share[i / 4][i % 4]));
}

/* The four warps' shares of 16 rows from `first` on, in order. */
static __device__ __forceinline__ void store_shares(const pair_args &p, const pair_place &at, uint32_t part, int64_t first, float *to) {
    const int row = threadIdx.x % GROUP / 8, pair = threadIdx.x % 8;
    if (first + row >= at.rows) return;
    float2 total = make_float2(0, 0);
#pragma unroll
    for (int w = 0; w < 4; w++) {
        total.x += __uint_as_float(dev_load_shared4(part + w * PART + row * PART_STRIDE + 8 * pair));
        total.y += __uint_as_float(dev_load_shared4(part + w * PART + row * PART_STRIDE + 8 * pair + 4));
    }
    *(float2 *)(to + (at.begin + first + row) * PASS + 2 * pair) = total;
}

template <int groups>
static __global__ __launch_bounds__(groups *GROUP, groups == 1 ? 3 : 2) void pair_products(const __grid_constant__ pair_args p,
                                                                                           const int32_t *offsets, int experts) {
    extern __shared__ __align__(16) uint8_t stages[];
    const int expert = groups > 1 ? nth_longest((int *)stages, offsets, experts, (int)blockIdx.y) : (int)blockIdx.y;
    const int thread = (int)threadIdx.x % GROUP;
    pair_place at;
    at.begin = offsets[expert], at.rows = offsets[expert + 1] - at.begin, at.slab = (int64_t)blockIdx.x * PAIR_SLAB;
    at.n0 = (int)blockIdx.z * PASS, at.group = (int)threadIdx.x / GROUP;
    if (at.rows == 0) return;
    __syncthreads(); /* the counts are read */
    const uint32_t base = dev_shared(stages) + at.group * PAIR_BYTES, end = base + PAIR_STAGES * PAIR_STAGE;
    const int piece = thread % 32, line = thread / 32; /* of 32 pieces and 4 lines a turn */
    const bf16 *in = p.in + (at.slab + 8 * piece < p.width ? at.slab + 8 * piece : at.slab);
    const int steps = (int)((at.rows + PAIR_STEP - 1) / PAIR_STEP);
    const int u_row = thread / 2, u_n = at.n0 + thread % 2 * 8;
    uint32_t filled = base, read = base, u_to = 0;
    int32_t row[4]; /* the rows of the next load */
    uint4 u = make_uint4(0, 0, 0, 0);
    auto find = [&](int step) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int64_t s = at.begin + min((int64_t)step * PAIR_STEP + 4 * i + line, at.rows - 1);
            row[i] = p.in_row ? __ldg(p.in_row + s) : (int32_t)s;
        }
    };
    auto load = [&](int step) { /* what u is of the load before is stored now, when it is there */
                                if (u_to) dev_store_shared(u_to, u);
                                u_to = 0;
                                if (step < steps) {
#pragma unroll
                                    for (int i = 0; i < 4; i++)
                                        dev_copy16(filled + (4 * i + line) * PAIR_STRIDE + 16 * piece, in + row[i] * p.width);
                                    if (thread < 2 * PAIR_STEP) {
                                        const int64_t first = (int64_t)step * PAIR_STEP + u_row;
                                        const int64_t s = at.begin + min(first, at.rows - 1);
                                        u = make_uint4(0, 0, 0, 0);
                                        if (first < at.rows && u_n < p.r) {
                                            u = __ldg((const uint4 *)(p.u + s * p.r + u_n));
                                            if (p.weight) u = weighted8(u, __ldg(p.weight + s));
                                        }
                                        u_to = filled + PAIR_STEP * PAIR_STRIDE + u_row * LOW_STRIDE + thread % 2 * 16;
                                    }
                                    filled = filled + PAIR_STAGE == end ? base : filled + PAIR_STAGE;
                                    find(step + groups);
                                }
                                dev_copy_commit();
    };
    uint32_t b[4][2][2];
    float sum[PAIR_SHARES / groups][4][2][4] = {};
    float *shares = p.shares + ((int64_t)blockIdx.z * gridDim.x + blockIdx.x) * p.slots * PASS;
    int parity = 0;
    find(at.group);
    for (int ahead = 0; ahead < PAIR_STAGES - 1; ahead++) load(at.group + ahead * groups);
    load_fragments(b, p, at, expert);
    for (int first = at.group; first < steps; first += PAIR_SHARES)
#pragma unroll
        for (int share = 0; share < PAIR_SHARES / groups; share++) {
            const int step = first + share;
            if (step >= steps) continue;
            dev_copy_wait<PAIR_STAGES - 2>();
            dev_meet(1 + at.group, GROUP);
            if (step >= groups) store_shares(p, at, end + (parity ^ 1) * 4 * PART, (int64_t)(step - groups) * PAIR_STEP, shares);
            load(step + (PAIR_STAGES - 1) * groups);
            multiply_pair(sum[share], b, read, read + PAIR_STEP * PAIR_STRIDE, end + parity * 4 * PART);
            read = read + PAIR_STAGE == end ? base : read + PAIR_STAGE;
            parity ^= 1;
        }
    const int last = steps - 1 - (steps - 1 - at.group + groups) % groups; /* of this group; negative: none */
    dev_meet(1 + at.group, GROUP);
    if (last >= at.group) store_shares(p, at, end + (parity ^ 1) * 4 * PART, (int64_t)last * PAIR_STEP, shares);
    __syncthreads(); /* all stages are read */
    const uint32_t sums = dev_shared(stages) + thread * 16;
    if (at.group > 0)
#pragma unroll
        for (int i = 0; i < 8; i++) dev_store_shared(sums + ((at.group - 1) * 8 + i) * GROUP * 16, *(const uint4 *)sum[0][i / 2][i % 2]);
    __syncthreads();
    if (at.group > 0) return;
    const int warp = thread / 32, lane = thread % 32;
    float *d = p.d + expert * p.width * p.r;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float(&total)[4] = sum[0][i / 2][i % 2];
#pragma unroll
        for (int share = 1; share < PAIR_SHARES / groups; share++)
#pragma unroll
            for (int j = 0; j < 4; j++) total[j] += sum[share][i / 2][i % 2][j];
        for (int g = 1; g < groups; g++) {
            const uint4 v = dev_load_shared(sums + ((g - 1) * 8 + i) * GROUP * 16);
            total[0] += __uint_as_float(v.x), total[1] += __uint_as_float(v.y), total[2] += __uint_as_float(v.z),
                total[3] += __uint_as_float(v.w);
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t column = at.slab + 64 * warp + 16 * (i / 2) + 8 * (j / 2) + lane / 4;
            const int n = at.n0 + 8 * (i % 2) + 2 * (lane % 4) + j % 2;
            if (column < p.width && n < p.r) d[column * p.r + n] += p.factor * total[j];
        }
    }
}

/* One thread per routed row and four ranks: the slabs' shares, in order. */
static __global__ void sum_pair_shares(pair_args p, const int32_t *offsets, int experts, int slabs) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, s = i / 4;
    const int n = (int)blockIdx.y * PASS + (int)(i % 4) * 4;
    if (s >= offsets[experts] || n >= p.r) return;
    const float4 *from = (const float4 *)(p.shares + (int64_t)blockIdx.y * slabs * p.slots * PASS) + i;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int slab = 0; slab < slabs; slab++) {
        const float4 v = __ldcs(from + slab * p.slots * 4);
        total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    total.x *= p.factor, total.y *= p.factor, total.z *= p.factor, total.w *= p.factor;
    *(uint2 *)(p.low + s * p.r + n) = make_uint2(dev_bf16x2(total.x, total.y), dev_bf16x2(total.z, total.w));
    if (!p.weight) return;
    const float w = p.weight[s];
    *(uint2 *)(p.weighted + s * p.r + n) = make_uint2(dev_bf16x2(w * total.x, w * total.y), dev_bf16x2(w * total.z, w * total.w));
}

static int slabs_of(int64_t width) {
    return (int)((width + PAIR_SLAB - 1) / PAIR_SLAB);
}

size_t lora_pair_scratch(int64_t width, int r, const espi_routing *routing) {
    return (size_t)(slabs_of(width) * ((r + PASS - 1) / PASS) * routing->tokens * routing->top_k * PASS) * sizeof(float);
}

template <int groups> static cudaError_t launch_pair(const pair_args &p, const espi_routing *routing, cudaStream_t stream) {
    const int bytes = groups * PAIR_BYTES, slabs = slabs_of(p.width), passes = (p.r + PASS - 1) / PASS;
    cudaError_t error = cudaFuncSetAttribute(pair_products<groups>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    pair_products<groups><<<dim3((unsigned)slabs, (unsigned)routing->experts, (unsigned)passes), groups * GROUP, bytes, stream>>>(
        p, routing->offsets, (int)routing->experts);
    error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    sum_pair_shares<<<dim3((unsigned)((p.slots * 4 + 255) / 256), (unsigned)passes), 256, 0, stream>>>(p, routing->offsets,
                                                                                                       (int)routing->experts, slabs);
    return cudaGetLastError();
}

static cudaError_t pair_plain(const pair_args &p, const espi_routing *routing, cudaStream_t stream) {
    low_args low = {};
    low.low = p.low, low.weighted = p.weighted, low.in = p.in, low.in_row = p.in_row, low.l = p.l, low.weight = p.weight;
    low.r = p.r, low.width = p.width, low.factor = p.factor;
    const cudaError_t error = launch_low_plain<true>(low, routing, stream);
    outer_args outer = {};
    outer.d = p.d, outer.in = p.in, outer.low = p.u, outer.weight = p.weight, outer.in_row = p.in_row;
    outer.r = p.r, outer.width = p.width, outer.factor = p.factor;
    return error != cudaSuccess ? error : launch_outer_plain(outer, routing, stream);
}

cudaError_t lora_pair(const pair_args *a, const espi_routing *routing, cudaStream_t stream) {
    pair_args p = *a;
    p.slots = routing->tokens * routing->top_k;
    if (!in_pieces(p.width, p.r)) return pair_plain(p, routing, stream);
    return has_many_rows(routing) ? launch_pair<PAIR_SHARES>(p, routing, stream) : launch_pair<1>(p, routing, stream);
}

/* ---- the bias in the gradient of a routing weight: one warp per routed row ---- */
static __global__ void bias_product(float *d_row_weight, const float *bias, const bf16 *d_out, int64_t width, const int32_t *offsets,
                                    const int32_t *row_token, int experts) {
    const row_tile t = find_tile(offsets, experts, (int)blockIdx.x, 8);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= t.rows) return;
    const int64_t s = t.row0 + warp;
    const bf16 *d = d_out + row_token[s] * width;
    const float *b = bias + t.expert * width;
    float sum = 0;
    for (int64_t i = lane; i < width; i += 32) sum += b[i] * __bfloat162float(d[i]);
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    if (lane == 0) d_row_weight[s] += sum;
}

cudaError_t bias_share(float *d_row_weight, const float *bias, const bf16 *d_out, int64_t width, const espi_routing *routing,
                       cudaStream_t stream) {
    bias_product<<<(unsigned)tile_bound(routing, 8), 256, 0, stream>>>(d_row_weight, bias, d_out, width, routing->offsets,
                                                                       routing->row_token, (int)routing->experts);
    return cudaGetLastError();
}
