/* The low-rank branches of the experts beside the large products: the skinny products of rank r (low), the gradients of A and B (band), and
 * the bias's share in the gradient of a routing weight.  mma.sync on any GPU from sm_80; sums run in a fixed order, nothing is atomic. */
#include "kernels/cuda/experts.cuh"

#define PASS 16     /* ranks per pass */
#define THREADS 256 /* of a block that multiplies */

/* Two bf16 of the bits of two f32. */
static __device__ __forceinline__ uint32_t packed(uint32_t lo, uint32_t hi) {
    return dev_bf16x2(__uint_as_float(lo), __uint_as_float(hi));
}

static __device__ __forceinline__ void add4(float (&sum)[4], uint4 v) {
    sum[0] += __uint_as_float(v.x), sum[1] += __uint_as_float(v.y), sum[2] += __uint_as_float(v.z), sum[3] += __uint_as_float(v.w);
}

/* ---- the product of rank r of every row: a block owns rows of one expert and 16 ranks.  Its eight warps have 32 rows each, `split` of them
 * the same, which share the columns, 32 in turn.  A lane reads 8 neighbouring values of a row: the order of the contraction is free, as long
 * as both operands follow it. ---- */
#define ROUNDS 8
#define FEW_MEAN_ROWS 48                                    /* of the batch, per expert: up to here all warps share the same 32 rows */
#define SLICES 3                                            /* of L, in shared memory */
#define SLICE(split) ((split) > 4 ? 512 : 256)              /* columns */
#define SLICE_BYTES(split) (PASS * (4 * SLICE(split) + 16)) /* 16: neighbouring rows of L are on different banks */

/* As find_tile, but the tiles come in rounds: in one all experts have about the same part of theirs, and, as an expert's rows stand in the
 * order of their tokens, about the same tokens, which are in L2 then. */
static __device__ __forceinline__ row_tile find_tile_in_rounds(const int32_t *offsets, int experts, int index, int height) {
    const int lane = threadIdx.x % 32;
    int upto[ROUNDS] = {};
    for (int e = lane; e < experts; e += 32) {
        const int tiles = (offsets[e + 1] - offsets[e] + height - 1) / height;
#pragma unroll
        for (int q = 0; q < ROUNDS; q++) upto[q] += (q + 1) * tiles / ROUNDS;
    }
    int round = 0, before = 0;
#pragma unroll
    for (int q = 0; q < ROUNDS; q++) {
        upto[q] = espi_warp_sum(upto[q]);
        if (upto[q] <= index) round = q + 1, before = upto[q];
    }
    index -= before;
    for (int first = 0; first < experts && round < ROUNDS; first += 32) {
        const int e = first + lane, begin = e < experts ? offsets[e] : 0, end = e < experts ? offsets[e + 1] : 0;
        const int all = (end - begin + height - 1) / height, skipped = round * all / ROUNDS, tiles = (round + 1) * all / ROUNDS - skipped;
        const int count = espi_warp_sum_upto(tiles, lane);
        const unsigned reached = __ballot_sync(~0u, count > index);
        if (reached) {
            const int owner = __ffs((int)reached) - 1, row0 = begin + (skipped + index - (count - tiles)) * height;
            row_tile t = {first + owner, __shfl_sync(~0u, row0, owner), 0};
            t.rows = min(height, __shfl_sync(~0u, end, owner) - t.row0);
            return t;
        }
        index -= __shfl_sync(~0u, count, 31);
    }
    return row_tile{0, 0, 0};
}

template <int split>
static __global__ __launch_bounds__(THREADS, 2) void low_product(const __grid_constant__ low_args p, const int32_t *offsets, int experts) {
    extern __shared__ __align__(16) uint8_t memory[];
    constexpr int columns = SLICE(split), stride = 4 * columns + 16, turns = columns / 32 / split, height = 32 * 8 / split;
    const row_tile t = find_tile_in_rounds(offsets, experts, (int)blockIdx.x, height);
    if (t.rows <= 0) return;
    const int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32, group = lane / 4, quad = lane % 4;
    const int part = warp % split, row0 = 32 * (warp / split), n0 = (int)blockIdx.y * PASS, width = (int)p.width;
    const bool active = row0 < t.rows;
    const bf16 *in[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int64_t s = t.row0 + min(row0 + 8 * i + group, t.rows - 1);
        in[i] = p.in + (p.in_row ? p.in_row[s] : s) * width + 32 * part + 8 * quad;
    }
    const uint32_t base = dev_shared(memory);
    const float *l = p.l + (int64_t)t.expert * p.r * width;
    const int slices = (width + columns - 1) / columns,
              steps = (width - 32 * part + 32 * split - 1) / (32 * split); /* steps: of this part */
    auto load_slice = [&](int slice) {
#pragma unroll
        for (int i = 0; i < PASS * columns / 4 / THREADS && slice < slices; i++) {
            const int at = thread + THREADS * i, n = at / (columns / 4), k = slice * columns + at % (columns / 4) * 4;
            const bool there = n0 + n < p.r && k < width;
            dev_copy16_or_zero(base + slice % SLICES * SLICE_BYTES(split) + n * stride + at % (columns / 4) * 16,
                               l + (there ? (int64_t)(n0 + n) * width + k : 0), there ? 16 : 0);
        }
        dev_copy_commit();
    };
    uint4 ahead[2][4];
    auto load = [&](int turn, int step) {
        if (active && step < steps)
#pragma unroll
            for (int i = 0; i < 4; i++) ahead[turn % 2][i] = dev_load_stream(in[i] + step * (32 * split));
    };
    float sum[2][2][4] = {};
    load_slice(0), load_slice(1);
    load(0, 0), load(1, 1);
    for (int slice = 0, step = 0; slice < slices; slice++) {
        dev_copy_wait<SLICES - 2>();
        __syncthreads();
        load_slice(slice + SLICES - 1);
        const uint32_t from = base + slice % SLICES * SLICE_BYTES(split) + group * stride + quad * 32 + part * 128;
#pragma unroll
        for (int turn = 0; turn < turns; turn++, step++) {
            uint4 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = ahead[turn % 2][i];
            load(turn, step + 2);
            if (step >= steps) continue;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t at = from + turn * split * 128 + 8 * h * stride;
                const uint4 v = dev_load_shared(at), w = dev_load_shared(at + 16);
                const uint32_t b[4] = {packed(v.x, v.y), packed(v.z, v.w), packed(w.x, w.y), packed(w.z, w.w)};
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    dev_mma(sum[m][h], a[2 * m].x, a[2 * m + 1].x, a[2 * m].y, a[2 * m + 1].y, b[0], b[1]);
                    dev_mma(sum[m][h], a[2 * m].z, a[2 * m + 1].z, a[2 * m].w, a[2 * m + 1].w, b[2], b[3]);
                }
            }
        }
    }
    __syncthreads(); /* L is read: its place takes the parts' sums, which are added up in order */
    const uint32_t parts = base + thread * 16;
#pragma unroll
    for (int i = 0; i < 4 && part > 0; i++) dev_store_shared(parts + i * THREADS * 16, *(const uint4 *)sum[i / 2][i % 2]);
    __syncthreads();
    if (part > 0 || !active) return;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float(&s)[4] = sum[i / 2][i % 2];
#pragma unroll
        for (int other = 1; other < split; other++) add4(s, dev_load_shared(parts + (i * THREADS + 32 * other) * 16));
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const int row = row0 + 16 * (i / 2) + 8 * v + group, n = n0 + 8 * (i % 2) + 2 * quad;
            if (row < t.rows && n < p.r) *(uint32_t *)(p.low + (int64_t)(t.row0 + row) * p.r + n) = dev_bf16x2(s[2 * v], s[2 * v + 1]);
        }
    }
}

/* The same for any width and rank, and across: one warp per routed row. */
template <bool across> static __global__ void low_plain(low_args p, const int32_t *offsets, int experts) {
    const row_tile t = find_tile(offsets, experts, (int)blockIdx.x, 8);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp >= t.rows) return;
    const int64_t s = t.row0 + warp;
    const bf16 *in = p.in + (p.in_row ? p.in_row[s] : s) * p.width;
    const float *l = p.l + t.expert * p.width * p.r;
    for (int n = 0; n < p.r; n++) {
        float sum = 0;
        for (int64_t k = lane; k < p.width; k += 32) sum += __bfloat162float(in[k]) * (across ? l[k * p.r + n] : l[n * p.width + k]);
        sum = espi_warp_sum(sum);
        if (lane) continue;
        const int64_t at = s * p.r + n;
        p.low[at] = __float2bfloat16_rn(p.factor * sum);
        if (p.weight) p.weighted[at] = __float2bfloat16_rn(p.weight[s] * (p.factor * sum));
    }
}

static bool in_pieces(int64_t width, int r) {
    return width % 32 == 0 && r % 8 == 0;
}

template <bool across> static cudaError_t launch_low_plain(const low_args &a, const espi_routing *routing, cudaStream_t stream) {
    low_plain<across><<<(unsigned)tile_bound(routing, 8), THREADS, 0, stream>>>(a, routing->offsets, (int)routing->experts);
    return cudaGetLastError();
}

template <int split> static cudaError_t launch_low(const low_args &a, const espi_routing *routing, cudaStream_t stream) {
    const dim3 grid((unsigned)tile_bound(routing, 32 * 8 / split), (unsigned)((a.r + PASS - 1) / PASS));
    const int bytes = SLICES * SLICE_BYTES(split);
    const cudaError_t error = cudaFuncSetAttribute(low_product<split>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    low_product<split><<<grid, THREADS, bytes, stream>>>(a, routing->offsets, (int)routing->experts);
    return cudaGetLastError();
}

cudaError_t lora_low(const low_args *a, const espi_routing *routing, cudaStream_t stream) {
    if (!in_pieces(a->width, a->r)) return launch_low_plain<false>(*a, routing, stream);
    if (espi_routing_is_few(routing, FEW_MEAN_ROWS)) return launch_low<8>(*a, routing, stream);
    return launch_low<2>(*a, routing, stream);
}

/* ---- the gradients: a block owns a chunk of one expert's rows in a band of 512 bytes.  It brings 32 rows at a time into shared memory, where
 * its eight warps, a quarter of the columns by half of the rows each, multiply them with what they have of rank r (BAND_OUTER), form the
 * activation from gu first (BAND_GLU), or make of the same rows the skinny product across B besides (BAND_PAIR): of that the share of the
 * band.  The sums of an expert's chunks and of a row's bands are added up in order afterwards. ---- */
enum band_kind { BAND_OUTER, BAND_GLU, BAND_PAIR };

#define BAND 256
#define BAND_ROWS 32
#define BAND_STRIDE (2 * BAND + 16) /* bytes; one access width of padding keeps eight rows on different banks */
#define LOW_STRIDE (2 * PASS + 16)
#define STAGE (BAND_ROWS * (BAND_STRIDE + LOW_STRIDE))
#define BAND_BLOCKS(kind) ((kind) == BAND_PAIR || DEV_SHARED_KB < 228 ? 2 : 3) /* on a multiprocessor: what fits */
#define STAGES(kind) ((kind) == BAND_PAIR ? 4 : 3)
#define STRIPS 4
#define SHARE (BAND_ROWS * PASS * 4) /* of a strip: its share of the skinny product of 32 rows */
#define CHUNK 1024                   /* rows at most; how an expert's rows are cut depends on their number alone */
#define BAND_BYTES(kind) (STAGES(kind) * STAGE + ((kind) == BAND_PAIR ? 2 * STRIPS * SHARE : 0) + 4 * CHUNK)

struct row_chunk {
    int expert, row0, rows, place; /* place: of its sums among all chunks of experts with more than one; negative: the only one */
};

static __device__ __forceinline__ int chunks_of(int rows) {
    return (rows + CHUNK - 1) / CHUNK;
}

/* Called by whole warps; no expert: negative.  A count and the count of those with a place go in one word. */
static __device__ __forceinline__ row_chunk find_chunk(const int32_t *offsets, int experts, int index) {
    const int lane = threadIdx.x % 32;
    int places = 0;
    for (int first = 0; first < experts; first += 32) {
        const int e = first + lane, begin = e < experts ? offsets[e] : 0, rows = e < experts ? offsets[e + 1] - begin : 0;
        const int chunks = chunks_of(rows), both = chunks > 1 ? chunks << 16 | chunks : chunks, upto = espi_warp_sum_upto(both, lane),
                  before = upto - both;
        const unsigned reached = __ballot_sync(~0u, (upto & 0xffff) > index);
        if (reached) {
            const int owner = __ffs((int)reached) - 1, i = index - (before & 0xffff);
            const int even = chunks ? ((rows + chunks - 1) / chunks + BAND_ROWS - 1) / BAND_ROWS * BAND_ROWS : 0;
            row_chunk c;
            c.expert = first + owner;
            c.row0 = __shfl_sync(~0u, begin + i * even, owner);
            c.rows = __shfl_sync(~0u, max(min(even, rows - i * even), 0), owner);
            c.place = __shfl_sync(~0u, chunks > 1 ? places + (before >> 16) + i : -1, owner);
            return c;
        }
        const int all = __shfl_sync(~0u, upto, 31);
        index -= all & 0xffff, places += all >> 16;
    }
    return row_chunk{-1, 0, 0, -1};
}

struct band_args {
    outer_args o;
    bf16 *low, *weighted; /* of BAND_PAIR, as l and shares: the skinny product */
    const float *l;
    float *sums, *shares; /* sums: of chunks with a place */
    int64_t slots;        /* routed rows */
    bool in_turn;         /* blocks take all chunks of a band, then the next band; else all bands of a chunk */
};

/* Eight values times a weight. */
static __device__ __forceinline__ uint4 weighted8(uint4 v, float weight) {
    return make_uint4(dev_bf16x2(weight * dev_lo(v.x), weight * dev_hi(v.x)), dev_bf16x2(weight * dev_lo(v.y), weight * dev_hi(v.y)),
                      dev_bf16x2(weight * dev_lo(v.z), weight * dev_hi(v.z)), dev_bf16x2(weight * dev_lo(v.w), weight * dev_hi(v.w)));
}

/* What a lane holds of L in the tensor cores' fragments: its strip's 64 columns by 16 ranks; zero past the width and the rank. */
static __device__ __forceinline__ void load_fragments(uint32_t (&b)[4][2][2], const float *l, int64_t width, int r, int column0, int n0) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int first = 0; first < 4; first += 2) {
        float value[16];
#pragma unroll
        for (int i = 0; i < 16; i++) { /* in the place of what is not there something else, so that all are on their way at once */
            const int k = column0 + 16 * (first + i / 8) + 8 * (i / 2 % 2) + 2 * (lane % 4) + i % 2, n = n0 + 8 * (i / 4 % 2) + lane / 4;
            const bool there = k < width && n < r;
            value[i] = __ldg(l + (there ? k * r + n : 0));
            if (!there) value[i] = 0;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) b[first + i / 4][i / 2 % 2][i % 2] = dev_bf16x2(value[2 * i], value[2 * i + 1]);
    }
}

/* The activation of interleaved gates and ups, whose columns `x` and `y` (eight each) are across the lanes: a lane gets the gate or up that it
 * lacks from its neighbour, and has then column `turned_column` of eight. */
template <bool clamped> static __device__ __forceinline__ uint32_t activate_turned(uint32_t x, uint32_t y, const glu_rule &rule) {
    const bool odd = threadIdx.x / 4 % 2;
    const uint32_t got = __shfl_xor_sync(~0u, odd ? x : y, 4), gate = odd ? got : x, up = odd ? y : got;
    return dev_bf16x2(glu<clamped>(dev_lo(gate), dev_lo(up), rule), glu<clamped>(dev_hi(gate), dev_hi(up), rule));
}

static __device__ __forceinline__ int turned_column(int lane) {
    return lane / 8 + 4 * (lane / 4 % 2);
}

/* 16 rows of 16 columns of the activation, as dev_ldmatrix_trans has them, of the gates and ups from `at` on. */
static __device__ __forceinline__ uint4 load_activation(uint32_t at, int column, const glu_rule &rule) {
    if (!rule.interleaved) {
        const uint4 gate = dev_ldmatrix_trans(at + 2 * column), up = dev_ldmatrix_trans(at + 2 * column + BAND);
        return activate8(gate_up_words{{gate.x, gate.y, gate.z, gate.w}, {up.x, up.y, up.z, up.w}}, rule);
    }
    const uint4 a = dev_ldmatrix_trans(at + 4 * column), b = dev_ldmatrix_trans(at + 4 * column + 32);
    if (is_clamped(rule))
        return make_uint4(activate_turned<true>(a.x, a.y, rule), activate_turned<true>(b.x, b.y, rule),
                          activate_turned<true>(a.z, a.w, rule), activate_turned<true>(b.z, b.w, rule));
    return make_uint4(activate_turned<false>(a.x, a.y, rule), activate_turned<false>(b.x, b.y, rule),
                      activate_turned<false>(a.z, a.w, rule), activate_turned<false>(b.z, b.w, rule));
}

/* Where a thread's piece of 16 bytes of row 0 stands; past the width, one that is there. */
template <band_kind kind> static __device__ __forceinline__ const char *band_piece(const outer_args &p, int column0, int piece) {
    if (kind != BAND_GLU) return (const char *)(p.in + (column0 + 8 * piece < p.width ? column0 + 8 * piece : column0));
    if (p.glu.interleaved) return (const char *)(p.gu + 2 * (column0 + 4 * piece < p.width ? column0 + 4 * piece : column0));
    return (const char *)(p.gu + (column0 + piece % 16 * 8 < p.width ? column0 + piece % 16 * 8 : column0) + piece / 16 * p.width);
}

/* Into L2, what a block will add to. */
static __device__ __forceinline__ void prefetch_gradient(const outer_args &p, int expert, int column0, int columns, int n0) {
    const int thread = (int)threadIdx.x, column = column0 + (p.across ? thread % PASS * (columns / PASS) : thread);
    const int n = n0 + (p.across ? thread / PASS : 0);
    if (column < p.width && n < p.r) dev_prefetch_l2(p.d + expert * p.width * p.r + (p.across ? n * p.width + column : column * p.r + n));
}

/* Of two neighbouring ranks of a row in a strip's share: sixteen lanes that store have four rows, or load two whole ones, on all banks. */
static __device__ __forceinline__ uint32_t share_place(int row, int pair) {
    return row * PASS * 4 + (pair ^ (row & 2) << 1) * 8;
}

template <band_kind kind>
static __global__ __launch_bounds__(THREADS, BAND_BLOCKS(kind)) void band_products(const __grid_constant__ band_args a,
                                                                                   const int32_t *offsets, int experts) {
    extern __shared__ __align__(16) uint8_t memory[];
    constexpr int columns = kind == BAND_GLU ? BAND / 2 : BAND, strip_columns = columns / STRIPS, tiles = strip_columns / 16;
    const outer_args &p = a.o;
    const row_chunk c = find_chunk(offsets, experts, (int)(a.in_turn ? blockIdx.x : blockIdx.y));
    if (c.expert < 0) return;
    const int thread = (int)threadIdx.x, warp = thread / 32, lane = thread % 32, strip = warp % STRIPS, half = warp / STRIPS;
    const int band = (int)(a.in_turn ? blockIdx.y : blockIdx.x), bands = (int)(a.in_turn ? gridDim.y : gridDim.x);
    const int column0 = band * columns, n0 = (int)blockIdx.z * PASS, steps = (c.rows + BAND_ROWS - 1) / BAND_ROWS;
    const uint32_t stages = (uint32_t)dev_opaque((int)dev_shared(memory)), parts = stages + STAGES(kind) * STAGE;
    const uint32_t indices = parts + (kind == BAND_PAIR ? 2 * STRIPS * SHARE : 0);
    for (int i = thread; i < steps * BAND_ROWS; i += THREADS) {
        const int s = c.row0 + min(i, c.rows - 1);
        dev_store_shared(indices + 4 * i, (uint32_t)(p.in_row ? p.in_row[s] : s));
    }
    __syncthreads();
    /* of 32 pieces and 8 rows a turn; of low, 64 threads have a piece each, which is stored with the next load, when it is there */
    const int line = thread / 32, low_row = thread / 2, low_n = n0 + thread % 2 * 8;
    const char *in = band_piece<kind>(p, column0, thread % 32);
    const uint32_t row_bytes = (uint32_t)((kind == BAND_GLU ? 4 : 2) * p.width), place = line * BAND_STRIDE + thread % 32 * 16;
    uint32_t filled = stages, read = stages, part = parts, index = indices + 4 * line, low_to = 0;
    uint4 low = make_uint4(0, 0, 0, 0);
    float weight = 1;
    auto load = [&](int step) {
        if (low_to) dev_store_shared(low_to, kind == BAND_PAIR && p.weight ? weighted8(low, weight) : low);
        low_to = 0;
        if (step < steps) {
#pragma unroll
            for (int i = 0; i < BAND_ROWS / 8; i++)
                dev_copy16(filled + place + 8 * i * BAND_STRIDE, in + (uint64_t)dev_load_shared4(index + 32 * i) * row_bytes);
            index += 4 * BAND_ROWS;
            if (thread < 2 * BAND_ROWS) {
                const int row = step * BAND_ROWS + low_row, s = c.row0 + row;
                low = make_uint4(0, 0, 0, 0);
                if (row < c.rows && low_n < p.r) {
                    low = __ldg((const uint4 *)(p.low + (int64_t)s * p.r + low_n));
                    if (kind == BAND_PAIR && p.weight) weight = __ldg(p.weight + s);
                }
                low_to = filled + BAND_ROWS * BAND_STRIDE + low_row * LOW_STRIDE + thread % 2 * 16;
            }
            filled = filled + STAGE == parts ? stages : filled + STAGE;
        }
        dev_copy_commit();
    };
    for (int ahead = 0; ahead < STAGES(kind) - 1; ahead++) load(ahead);
    if (c.place < 0) prefetch_gradient(p, c.expert, column0, columns, n0);
    uint32_t b[4][2][2];
    if (kind == BAND_PAIR) load_fragments(b, a.l + c.expert * p.width * p.r, p.width, p.r, column0 + strip_columns * strip, n0);
    float *share_to = a.shares + (((int64_t)blockIdx.z * bands + band) * a.slots + c.row0 + thread / 8) * PASS + thread % 8 * 2;
    const uint32_t share_from = share_place(thread / 8, thread % 8);
    auto store_shares = [&](uint32_t from, int step) {
        if (step * BAND_ROWS + thread / 8 >= c.rows) return;
        float2 total = make_float2(0, 0);
#pragma unroll
        for (int w = 0; w < STRIPS; w++) { /* in order */
            const uint2 v = dev_load_shared8(from + w * SHARE + share_from);
            total.x += __uint_as_float(v.x), total.y += __uint_as_float(v.y);
        }
        *(float2 *)(share_to + step * (BAND_ROWS * PASS)) = total;
    };
    auto other_part = [&] { return part == parts ? parts + STRIPS * SHARE : parts; };
    const int matrix = lane / 8, eighth = lane % 8;
    float sum[tiles][2][4] = {};
    for (int step = 0; step < steps; step++) {
        dev_copy_wait<STAGES(kind) - 2>();
        __syncthreads();
        if (kind == BAND_PAIR && step > 0) store_shares(other_part(), step - 1);
        load(step + STAGES(kind) - 1);
        const uint32_t rows = read + 16 * half * BAND_STRIDE, across = rows + (matrix / 2 * 8 + eighth) * BAND_STRIDE + matrix % 2 * 16;
        const uint32_t along = rows + (matrix % 2 * 8 + eighth) * BAND_STRIDE + matrix / 2 * 16;
        const uint4 v =
            dev_ldmatrix_trans(read + BAND_ROWS * BAND_STRIDE + (16 * half + matrix % 2 * 8 + eighth) * LOW_STRIDE + matrix / 2 * 16);
        float share[2][4] = {};
#pragma unroll
        for (int i = 0; i < tiles; i++) {
            const int column = strip_columns * strip + 16 * i;
            if (kind == BAND_PAIR) {
                const uint4 r = dev_ldmatrix(along + 2 * column);
#pragma unroll
                for (int h = 0; h < 2; h++) dev_mma(share[h], r.x, r.y, r.z, r.w, b[i][h][0], b[i][h][1]);
            }
            const uint4 t = kind == BAND_GLU ? load_activation(across, column, p.glu) : dev_ldmatrix_trans(across + 2 * column);
            dev_mma(sum[i][0], t.x, t.y, t.z, t.w, v.x, v.y);
            dev_mma(sum[i][1], t.x, t.y, t.z, t.w, v.z, v.w);
        }
#pragma unroll
        for (int i = 0; i < 4 && kind == BAND_PAIR; i++)
            dev_store_shared8(part + strip * SHARE + share_place(16 * half + 8 * (i % 2) + lane / 4, i / 2 * 4 + lane % 4),
                              make_uint2(__float_as_uint(share[i / 2][2 * (i % 2)]), __float_as_uint(share[i / 2][2 * (i % 2) + 1])));
        part = other_part();
        read = read + STAGE == parts ? stages : read + STAGE;
    }
    __syncthreads(); /* all stages are read */
    if (kind == BAND_PAIR && steps > 0) store_shares(other_part(), steps - 1);
    const uint32_t halves = stages + thread % (THREADS / 2) * 16;
#pragma unroll
    for (int i = 0; i < 2 * tiles && half; i++) dev_store_shared(halves + i * THREADS / 2 * 16, *(const uint4 *)sum[i / 2][i % 2]);
    __syncthreads();
    if (half) return;
#pragma unroll
    for (int i = 0; i < 2 * tiles; i++) add4(sum[i / 2][i % 2], dev_load_shared(halves + i * THREADS / 2 * 16));
    const int column1 = column0 + strip_columns * strip + (kind == BAND_GLU && p.glu.interleaved ? turned_column(lane) : lane / 4);
    const int n1 = n0 + lane % 4 * 2, by_column = p.across ? 1 : p.r, by_rank = p.across ? (int)p.width : 1;
    const int columns_left = (int)p.width - column1, ranks_left = p.r - n1;
    const int64_t size = p.width * p.r;
    float *to = (c.place < 0 ? p.d + c.expert * size : a.sums + c.place * size) + n1 * by_rank + column1 * by_column;
    auto is_there = [&](int i) { return 16 * (i / 8) + 8 * (i / 2 % 2) < columns_left && 8 * (i / 4 % 2) + i % 2 < ranks_left; };
    auto offset = [&](int i) { return (8 * (i / 4 % 2) + i % 2) * by_rank + (16 * (i / 8) + 8 * (i / 2 % 2)) * by_column; };
#pragma unroll
    for (int first = 0; first < tiles * 8; first += 16) {
        float before[16]; /* all on their way at once */
#pragma unroll
        for (int i = 0; i < 16; i++) before[i] = c.place < 0 && is_there(first + i) ? to[offset(first + i)] : 0;
#pragma unroll
        for (int i = 0; i < 16; i++)
            if (is_there(first + i)) to[offset(first + i)] = before[i] + p.factor * sum[(first + i) / 8][i / 4 % 2][i % 4];
    }
}

/* ---- what the blocks of band_products left ---- */
#define SUM_BLOCKS 8 /* of an expert */

/* The sums of an expert's chunks; by SUM_BLOCKS blocks. */
static __device__ __forceinline__ void add_chunks(const band_args &a, const int32_t *offsets, int expert, int block) {
    const int lane = threadIdx.x % 32, chunks = chunks_of(offsets[expert + 1] - offsets[expert]);
    if (chunks < 2) return;
    int before = 0;
    for (int e = lane; e < expert; e += 32) {
        const int others = chunks_of(offsets[e + 1] - offsets[e]);
        before += others > 1 ? others : 0;
    }
    for (int step = 16; step; step /= 2) before += __shfl_xor_sync(~0u, before, step);
    const int size = (int)(a.o.width * a.o.r / 4);
    const float4 *from = (const float4 *)a.sums + (int64_t)before * size;
    float4 *to = (float4 *)a.o.d + (int64_t)expert * size;
    for (int i = block * THREADS + (int)threadIdx.x; i < size; i += SUM_BLOCKS * THREADS) {
        float4 total = make_float4(0, 0, 0, 0);
        const float4 d = to[i];
#pragma unroll 4
        for (int chunk = 0; chunk < chunks; chunk++) {
            const float4 v = __ldcs(from + i + (int64_t)chunk * size);
            total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
        }
        to[i] = make_float4(d.x + total.x, d.y + total.y, d.z + total.z, d.w + total.w);
    }
}

static __global__ void sum_chunks(const __grid_constant__ band_args a, const int32_t *offsets) {
    add_chunks(a, offsets, (int)blockIdx.x / SUM_BLOCKS, (int)blockIdx.x % SUM_BLOCKS);
}

/* Blocks below share_blocks: one thread per routed row and four ranks, the shares of the bands; the others: chunks. */
static __global__ void sum_pair(const __grid_constant__ band_args a, const int32_t *offsets, int experts, int bands, int share_blocks) {
    if ((int)blockIdx.x >= share_blocks) {
        if (blockIdx.y == 0)
            add_chunks(a, offsets, ((int)blockIdx.x - share_blocks) / SUM_BLOCKS, ((int)blockIdx.x - share_blocks) % SUM_BLOCKS);
        return;
    }
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x, s = i / 4;
    const int n = (int)blockIdx.y * PASS + (int)(i % 4) * 4;
    if (s >= offsets[experts] || n >= a.o.r) return;
    const float4 *from = (const float4 *)(a.shares + (int64_t)blockIdx.y * bands * a.slots * PASS) + i;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 4
    for (int band = 0; band < bands; band++) {
        const float4 v = __ldcs(from + band * a.slots * 4);
        total.x += v.x, total.y += v.y, total.z += v.z, total.w += v.w;
    }
    total.x *= a.o.factor, total.y *= a.o.factor, total.z *= a.o.factor, total.w *= a.o.factor;
    *(uint2 *)(a.low + s * a.o.r + n) = make_uint2(dev_bf16x2(total.x, total.y), dev_bf16x2(total.z, total.w));
    if (!a.o.weight) return;
    const float w = a.o.weight[s];
    *(uint2 *)(a.weighted + s * a.o.r + n) = make_uint2(dev_bf16x2(w * total.x, w * total.y), dev_bf16x2(w * total.z, w * total.w));
}

static int bands_of(int64_t width, int columns) {
    return (int)((width + columns - 1) / columns);
}

static int passes_of(int r) {
    return (r + PASS - 1) / PASS;
}

/* Whether an expert may have more than one chunk: of a token it has one row. */
static bool may_have_chunks(const espi_routing *routing) {
    return routing->tokens > CHUNK;
}

static size_t shares_bytes(int64_t width, int r, const espi_routing *routing) {
    return rounded((size_t)(bands_of(width, BAND) * passes_of(r) * routing->tokens * routing->top_k * PASS) * sizeof(float));
}

/* An expert with a second chunk has more rows than half of its chunks would hold. */
static size_t sums_bytes(int64_t width, int r, const espi_routing *routing) {
    return may_have_chunks(routing) ? (size_t)(routing->tokens * routing->top_k * 2 / CHUNK * width * r) * sizeof(float) : 0;
}

size_t lora_outer_scratch(int64_t width, int r, const espi_routing *routing) {
    return in_pieces(width, r) ? sums_bytes(width, r, routing) : 0;
}

size_t lora_pair_scratch(int64_t width, int r, const espi_routing *routing) {
    return in_pieces(width, r) ? shares_bytes(width, r, routing) + sums_bytes(width, r, routing) : 0;
}

template <band_kind kind> static cudaError_t launch_band(band_args a, const espi_routing *routing, cudaStream_t stream) {
    const unsigned chunks = (unsigned)tile_bound(routing, CHUNK), passes = (unsigned)passes_of(a.o.r);
    const unsigned bands = (unsigned)bands_of(a.o.width, kind == BAND_GLU ? BAND / 2 : BAND);
    const cudaError_t error = cudaFuncSetAttribute(band_products<kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, BAND_BYTES(kind));
    if (error != cudaSuccess) return error;
    a.in_turn = a.o.in_row != NULL; /* tokens' rows are wanted several times: those of a band fit into L2 */
    a.slots = routing->tokens * routing->top_k;
    band_products<kind><<<a.in_turn ? dim3(chunks, bands, passes) : dim3(bands, chunks, passes), THREADS, BAND_BYTES(kind), stream>>>(
        a, routing->offsets, (int)routing->experts);
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

cudaError_t lora_outer(const outer_args *o, const espi_routing *routing, cudaStream_t stream) {
    if (!in_pieces(o->width, o->r)) return launch_outer_plain(*o, routing, stream);
    band_args a = {};
    a.o = *o, a.sums = (float *)o->scratch;
    const cudaError_t error = o->gu ? launch_band<BAND_GLU>(a, routing, stream) : launch_band<BAND_OUTER>(a, routing, stream);
    if (error != cudaSuccess || !may_have_chunks(routing)) return error;
    sum_chunks<<<(unsigned)routing->experts * SUM_BLOCKS, THREADS, 0, stream>>>(a, routing->offsets);
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

cudaError_t lora_pair(const pair_args *p, const espi_routing *routing, cudaStream_t stream) {
    if (!in_pieces(p->width, p->r)) return pair_plain(*p, routing, stream);
    band_args a = {};
    a.o.d = p->d, a.o.in = p->in, a.o.in_row = p->in_row, a.o.low = p->u, a.o.weight = p->weight;
    a.o.r = p->r, a.o.width = p->width, a.o.factor = p->factor;
    a.low = p->low, a.weighted = p->weighted, a.l = p->l, a.slots = routing->tokens * routing->top_k;
    a.shares = (float *)p->scratch, a.sums = (float *)((char *)p->scratch + shares_bytes(p->width, p->r, routing));
    const cudaError_t error = launch_band<BAND_PAIR>(a, routing, stream);
    if (error != cudaSuccess) return error;
    const unsigned share_blocks = (unsigned)((a.slots * 4 + THREADS - 1) / THREADS);
    const unsigned chunk_blocks = may_have_chunks(routing) ? (unsigned)routing->experts * SUM_BLOCKS : 0;
    sum_pair<<<dim3(share_blocks + chunk_blocks, (unsigned)passes_of(p->r)), THREADS, 0, stream>>>(
        a, routing->offsets, (int)routing->experts, bands_of(p->width, BAND), (int)share_blocks);
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
    sum = espi_warp_sum(sum);
    if (lane == 0) d_row_weight[s] += sum;
}

cudaError_t bias_share(float *d_row_weight, const float *bias, const bf16 *d_out, int64_t width, const espi_routing *routing,
                       cudaStream_t stream) {
    bias_product<<<(unsigned)tile_bound(routing, 8), 256, 0, stream>>>(d_row_weight, bias, d_out, width, routing->offsets,
                                                                       routing->row_token, (int)routing->experts);
    return cudaGetLastError();
}
