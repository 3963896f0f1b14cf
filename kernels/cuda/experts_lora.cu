/* The low-rank branches of the experts beside the large products: the skinny products of rank r (low), the gradients of A and B (outer), and
 * the bias's share in the gradient of a routing weight.  mma.sync on any GPU from sm_80; sums run in a fixed order, nothing is atomic. */
#include "kernels/cuda/experts.cuh"

#define LOW_ROWS 64
#define LOW_WARPS 8
#define PASS 16 /* ranks per pass */

/* Four words of two bf16: the values k .. k+7 of column n of L, zero past the rank. */
template <bool across> static __device__ __forceinline__ uint4 low_operand(const float *l, int64_t width, int64_t k, int n, int r) {
    float v[8];
    if (n >= r) return make_uint4(0, 0, 0, 0);
    if (across) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = __ldg(l + (k + i) * r + n);
    } else {
        const float4 a = __ldg((const float4 *)(l + n * width + k)), b = __ldg((const float4 *)(l + n * width + k + 4));
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    }
    return make_uint4(dev_bf16x2(v[0], v[1]), dev_bf16x2(v[2], v[3]), dev_bf16x2(v[4], v[5]), dev_bf16x2(v[6], v[7]));
}

/* A block: 64 rows of one expert x 16 ranks; its warps share the width, 32 columns in turn.  A lane reads 8 neighbouring values of a row:
 * the order of the contraction is free, as long as both operands follow it. */
template <bool across>
static __global__ __launch_bounds__(LOW_WARPS * 32, across ? 1 : 2) void low_product(low_args p, const int32_t *offsets, int experts) {
    __shared__ float parts[LOW_WARPS][LOW_ROWS][PASS];
    const row_tile t = find_tile(offsets, experts, (int)blockIdx.x, LOW_ROWS);
    if (t.rows <= 0) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4, n0 = (int)blockIdx.y * PASS;
    const float *l = p.l + t.expert * p.width * p.r;
    uint32_t row[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int64_t s = t.row0 + min(8 * i + group, t.rows - 1);
        row[i] = (uint32_t)(p.in_row ? p.in_row[s] : s);
    }
    const bf16 *in = p.in + 8 * quad;
    const uint32_t row_width = (uint32_t)p.width;
    float sum[4][2][4] = {};
#pragma unroll 1
    for (int64_t k = 32 * warp; k < p.width; k += 32 * LOW_WARPS) {
        uint4 a[8];
#pragma unroll
        for (int i = 0; i < 8; i++) a[i] = __ldg((const uint4 *)(in + (uint64_t)row[i] * row_width + k));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const uint4 b = low_operand<across>(l, p.width, k + 8 * quad, n0 + 8 * h + group, p.r);
#pragma unroll
            for (int m = 0; m < 4; m++) {
                dev_mma(sum[m][h], a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y, b.x, b.y);
                dev_mma(sum[m][h], a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w, b.z, b.w);
            }
        }
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
            for (int i = 0; i < 4; i++) parts[warp][16 * m + 8 * (i / 2) + group][8 * h + 2 * quad + i % 2] = sum[m][h][i];
    __syncthreads();
    for (int i = threadIdx.x; i < LOW_ROWS * PASS; i += LOW_WARPS * 32) {
        const int m = i / PASS, n = i % PASS;
        if (m >= t.rows || n0 + n >= p.r) continue;
        float total = 0;
        for (int w = 0; w < LOW_WARPS; w++) total += parts[w][m][n];
        total *= p.factor;
        const int64_t s = t.row0 + m, at = s * p.r + n0 + n;
        p.low[at] = __float2bfloat16_rn(total);
        if (p.weight) {
            p.weighted[at] = __float2bfloat16_rn(p.weight[s] * total);
            p.other_weighted[at] = __float2bfloat16_rn(p.weight[s] * __bfloat162float(p.other[at]));
        }
    }
}

/* The same for any width and rank: one warp per routed row. */
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
        if (p.weight) {
            p.weighted[at] = __float2bfloat16_rn(p.weight[s] * (p.factor * sum));
            p.other_weighted[at] = __float2bfloat16_rn(p.weight[s] * __bfloat162float(p.other[at]));
        }
    }
}

static bool in_pieces(int64_t width, int r) {
    return width % 32 == 0 && r % 8 == 0;
}

cudaError_t lora_low(const low_args *a, const espi_routing *routing, cudaStream_t stream) {
    const int experts = (int)routing->experts;
    if (in_pieces(a->width, a->r)) {
        const dim3 grid((unsigned)tile_bound(routing, LOW_ROWS), (unsigned)((a->r + PASS - 1) / PASS));
        if (a->across)
            low_product<true><<<grid, LOW_WARPS * 32, 0, stream>>>(*a, routing->offsets, experts);
        else
            low_product<false><<<grid, LOW_WARPS * 32, 0, stream>>>(*a, routing->offsets, experts);
    } else {
        const unsigned blocks = (unsigned)tile_bound(routing, LOW_WARPS);
        if (a->across)
            low_plain<true><<<blocks, LOW_WARPS * 32, 0, stream>>>(*a, routing->offsets, experts);
        else
            low_plain<false><<<blocks, LOW_WARPS * 32, 0, stream>>>(*a, routing->offsets, experts);
    }
    return cudaGetLastError();
}

/* ---- gradients of A and B: a block owns 128 columns of one expert and walks its rows in order, 32 at a time ---- */
#define SLAB 128
#define STEP 32
#define IN_STRIDE (2 * SLAB + 16) /* bytes; one access width of padding keeps eight rows on different banks */
#define LOW_STRIDE (2 * PASS + 16)
#define STAGE (STEP * (IN_STRIDE + LOW_STRIDE))
#define STAGES 4

struct outer_place {
    int64_t begin, rows, slab, columns; /* columns: of this slab, a multiple of 8 */
    int n0, low_bytes;                  /* low_bytes: of a row of this pass */
};

/* 16-byte pieces of low rows [first, first + 32) into a stage; zero past the last row. */
static __device__ __forceinline__ void load_low(uint32_t to, const outer_args &p, const outer_place &at, int64_t first) {
    const int row = threadIdx.x / 2, piece = threadIdx.x % 2;
    if (row >= STEP) return;
    const bool there = first + row < at.rows && 16 * piece < at.low_bytes;
    const bf16 *from = p.low + (at.begin + (there ? first + row : 0)) * p.r + at.n0 + (there ? 8 * piece : 0);
    dev_copy16_or_zero(to + row * LOW_STRIDE + 16 * piece, from, there ? 16 : 0);
}

static __device__ __forceinline__ void multiply_stage(float (&sum)[2][2][4], uint32_t in, uint32_t low) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
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

static __device__ __forceinline__ void add_outer(const outer_args &p, const outer_place &at, int expert, const float (&sum)[2][2][4]) {
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

static __device__ __forceinline__ outer_place outer_place_of(const outer_args &p, const int32_t *offsets) {
    const int expert = (int)blockIdx.y;
    outer_place at;
    at.begin = offsets[expert];
    at.rows = offsets[expert + 1] - at.begin;
    at.slab = (int64_t)blockIdx.x * SLAB;
    at.columns = min((int64_t)SLAB, p.width - at.slab);
    at.n0 = (int)(blockIdx.z / 2) * PASS;
    at.low_bytes = 2 * min(PASS, p.r - at.n0);
    return at;
}

static __device__ __forceinline__ void outer_product(const outer_args &p, const outer_place &at, uint32_t base) {
    const int piece = threadIdx.x % 16, line = threadIdx.x / 16; /* of 16 pieces and 8 lines a turn */
    const int64_t column = 8 * piece < at.columns ? at.slab + 8 * piece : at.slab;
    const int64_t steps = (at.rows + STEP - 1) / STEP;
    auto load = [&](int64_t step) {
        if (step < steps) {
            const uint32_t to = base + (uint32_t)(step % STAGES) * STAGE;
#pragma unroll
            for (int i = 0; i < STEP; i += 8) {
                const int64_t s = at.begin + min(step * STEP + i + line, at.rows - 1);
                dev_copy16(to + (i + line) * IN_STRIDE + 16 * piece, p.in + (p.in_row ? p.in_row[s] : s) * p.width + column);
            }
            load_low(to + STEP * IN_STRIDE, p, at, step * STEP);
        }
        dev_copy_commit();
    };
    for (int step = 0; step < STAGES - 1; step++) load(step);
    float sum[2][2][4] = {};
    for (int64_t step = 0; step < steps; step++) {
        dev_copy_wait<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        const uint32_t in = base + (uint32_t)(step % STAGES) * STAGE;
        multiply_stage(sum, in, in + STEP * IN_STRIDE);
    }
    add_outer(p, at, (int)blockIdx.y, sum);
}

/* The activation of eight neighbouring values from their gates and ups. */
static __device__ __forceinline__ uint4 activate8(uint4 first, uint4 second, const glu_rule &rule) {
    const gate_up_words v = split_gate_up(first, second, rule.interleaved);
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
        out[i] = dev_bf16x2(glu(dev_lo(v.gate[i]), dev_lo(v.up[i]), rule), glu(dev_hi(v.gate[i]), dev_hi(v.up[i]), rule));
    return make_uint4(out[0], out[1], out[2], out[3]);
}

/* As outer_product, of the activation that is formed again from gu: the next rows are on their way in registers. */
static __device__ __forceinline__ void outer_product_of_activation(const outer_args &p, const outer_place &at, uint32_t base) {
    const int piece = threadIdx.x % 16, line = threadIdx.x / 16;
    const int64_t column = 8 * piece < at.columns ? at.slab + 8 * piece : at.slab;
    const int64_t steps = (at.rows + STEP - 1) / STEP;
    const int64_t first = p.glu.interleaved ? 2 * column : column, second = p.glu.interleaved ? first + 8 : first + p.width;
    uint4 a[STEP / 8], b[STEP / 8];
    auto load = [&](int64_t step) {
#pragma unroll
        for (int i = 0; i < STEP / 8; i++) {
            const bf16 *row = p.gu + (at.begin + min(step * STEP + 8 * i + line, at.rows - 1)) * 2 * p.width;
            a[i] = __ldg((const uint4 *)(row + first));
            b[i] = __ldg((const uint4 *)(row + second));
        }
        load_low(base + (uint32_t)(step % 2) * STAGE + STEP * IN_STRIDE, p, at, step * STEP);
        dev_copy_commit();
    };
    load(0);
    float sum[2][2][4] = {};
    for (int64_t step = 0; step < steps; step++) {
        const uint32_t in = base + (uint32_t)(step % 2) * STAGE;
#pragma unroll
        for (int i = 0; i < STEP / 8; i++) dev_store_shared(in + (8 * i + line) * IN_STRIDE + 16 * piece, activate8(a[i], b[i], p.glu));
        dev_copy_wait<0>();
        __syncthreads();
        if (step + 1 < steps) load(step + 1);
        multiply_stage(sum, in, in + STEP * IN_STRIDE);
    }
    add_outer(p, at, (int)blockIdx.y, sum);
}

/* The gradients of A and of B in one launch: what one leaves idle at its end the other one fills. */
static __global__ __launch_bounds__(128) void outer_products(const __grid_constant__ outer_args first,
                                                             const __grid_constant__ outer_args second, const int32_t *offsets) {
    __shared__ __align__(16) uint8_t stages[STAGES][STAGE];
    const outer_args &p = blockIdx.z % 2 ? second : first;
    if ((int64_t)blockIdx.x * SLAB >= p.width) return;
    const outer_place at = outer_place_of(p, offsets);
    if (at.rows == 0) return;
    if (p.gu)
        outer_product_of_activation(p, at, dev_shared(stages));
    else
        outer_product(p, at, dev_shared(stages));
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
            in = glu(__bfloat162float(*gate), __bfloat162float(gate[p.glu.interleaved ? 1 : p.width]), p.glu);
        } else {
            in = __bfloat162float(p.in[(p.in_row ? p.in_row[s] : s) * p.width + column]);
        }
        sum += in * __bfloat162float(p.low[s * p.r + n]);
    }
    float *d = p.d + expert * p.width * p.r;
    *(p.across ? d + n * p.width + column : d + column * p.r + n) += p.factor * sum;
}

cudaError_t lora_outers(const outer_args *first, const outer_args *second, const espi_routing *routing, cudaStream_t stream) {
    const unsigned experts = (unsigned)routing->experts;
    if (in_pieces(first->width, first->r) && in_pieces(second->width, second->r)) {
        const int64_t width = first->width > second->width ? first->width : second->width;
        const dim3 grid((unsigned)((width + SLAB - 1) / SLAB), experts, 2 * (unsigned)((first->r + PASS - 1) / PASS));
        outer_products<<<grid, 128, 0, stream>>>(*first, *second, routing->offsets);
        return cudaGetLastError();
    }
    for (const outer_args *a : {first, second}) {
        const dim3 grid((unsigned)((a->width * a->r + 127) / 128), experts);
        outer_plain<<<grid, 128, 0, stream>>>(*a, routing->offsets);
    }
    return cudaGetLastError();
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
