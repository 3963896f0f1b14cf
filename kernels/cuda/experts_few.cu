/* Products with packed 4-bit experts that have few rows: reading the weights is all there is to do, so they are kept streaming.  mma.sync and
 * cp.async: any GPU from sm_80.
 *
 * A tile is 256 outputs x up to 32 routed rows of one expert, the rows on the N side; four warps make it, 64 outputs each, and some blocks share
 * a multiprocessor.  A step is a k-block: each warp brings the records of its own outputs, all together the rows, several steps ahead and past the end of a tile
 * into the next one.  A forward decodes straight into fragments; a backward, which reads the same records across, turns them on the way through
 * 2 KB of the warp's shared memory.  Where gates stand before ups a warp takes 32 of both, so that it has the pairs of the activation. */
#include "kernels/cuda/experts_tile.cuh"

#include <limits.h>

#define WARPS 4
#define THREADS (WARPS * 32)
#define STAGES 4

/* What a warp's 64 outputs are: of a record, or 32 pairs of gate and up, which stand in it in turn or in two records. */
enum few_outputs { PLAIN, TURNS, HALVES };

/* Shared memory: stages; of each warp a slice being turned, or its results, and the weights of its rows; the values of the codes; the plan. */
template <int format, product_kind kind, few_outputs outputs> struct few_form {
    static constexpr bool across = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK, halves = outputs == HALVES;
    static constexpr int record = RECORD_BYTES(format), step = WARPS * record + FEW_ROWS * 128;
    static constexpr int weights = FEW_ROWS * 128, own = STAGES * step, own_bytes = weights + FEW_ROWS * 4;
    static constexpr int table = own + WARPS * own_bytes, sums = table + 64, before = sums + 4 * WARPS, bytes = before + 4 * FEW_EXPERTS;
    /* blocks on a multiprocessor: as the registers allow, and what has room */
    static constexpr int room = DEV_SHARED_KB * 1024 / (bytes + 1024), blocks = room < 3 ? room : 3;
};

/* ---- which tiles there are, of the experts of few rows: every block finds out for itself ---- */
struct few_plan {
    uint32_t before; /* shared memory: how many tiles of rows stand before an expert's own */
    int tiles;
};

static __device__ __forceinline__ int tiles_of(int rows) {
    return (rows + FEW_ROWS - 1) / FEW_ROWS;
}

template <typename F> static __device__ __forceinline__ few_plan make_plan(const tile_args &a, uint32_t base) {
    const int experts = (int)a.p.routing.experts, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int32_t *offsets = a.p.routing.offsets;
    int all = 0;
    for (int first = 0; first < experts; first += THREADS) {
        const int e = first + (int)threadIdx.x, rows = e < experts ? offsets[e + 1] - offsets[e] : 0,
                  own = rows <= a.few_rows ? tiles_of(rows) : 0;
        const int upto = espi_warp_sum_upto(own, lane);
        if (lane == 31) dev_store_shared(base + F::sums + 4 * warp, (uint32_t)upto);
        __syncthreads();
        int stand = all + upto - own;
#pragma unroll
        for (int i = 0; i < WARPS; i++) {
            const int tiles = (int)dev_load_shared4(base + F::sums + 4 * i);
            stand += i < warp ? tiles : 0;
            all += tiles;
        }
        if (e < experts) dev_store_shared(base + F::before + 4 * e, (uint32_t)stand);
        __syncthreads();
    }
    return few_plan{base + F::before, all * a.tiles_few};
}

/* The rows of an expert are cut into even tiles. */
static __device__ __forceinline__ work few_work(const tile_args &a, const few_plan &plan, int index) {
    const int tile = index / a.tiles_few;
    int low = 0, high = (int)a.p.routing.experts; /* the last expert that begins at or before the tile, which is one with rows */
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if ((int)dev_load_shared4(plan.before + 4 * middle) <= tile)
            low = middle;
        else
            high = middle;
    }
    const int begin = __ldg(a.p.routing.offsets + low), rows = __ldg(a.p.routing.offsets + low + 1) - begin;
    const int tiles = tiles_of(rows), even = ((rows + tiles - 1) / tiles + 7) / 8 * 8;
    const int skipped = (tile - (int)dev_load_shared4(plan.before + 4 * low)) * even;
    return work{low, index % a.tiles_few, begin + skipped, min(even, rows - skipped)};
}

/* ---- bringing ---- */
struct few_load {
    int index, k, rows; /* rows: of the tile */
    bool weights;       /* has this warp outputs in the tile? */
    const uint8_t *codes;
    int other, scales;           /* from `codes` to the same of the other 32 rows, and to the scales */
    uint32_t row[FEW_ROWS / 16]; /* of a.p.in */
};

template <typename F> static __device__ __forceinline__ void open_tile(few_load &l, const tile_args &a, const few_plan &plan, int index) {
    l.index = index, l.k = 0;
    if (index >= plan.tiles) return;
    const work w = few_work(a, plan, index);
    const int job = w.m * WARPS + (int)threadIdx.x / 32;
    l.rows = w.rows, l.weights = job < a.blocks;
    l.codes = a.weights + w.expert * a.expert_bytes + (int64_t)(F::halves ? job / 2 : job) * a.block_step * F::record;
#pragma unroll
    for (int i = 0; i < FEW_ROWS / 16; i++) {
        const int s = w.row0 + min(16 * i + (int)threadIdx.x / 8, w.rows - 1);
        l.row[i] = (uint32_t)(a.p.in_row ? a.p.in_row[s] : s);
    }
}

/* A warp's record: rows 0..31 and 32..63 of one, or the same 32 of one with gates and of the one with their ups. */
template <typename F> static __device__ __forceinline__ void bring_record(const few_load &l, const tile_args &a, uint32_t record) {
    constexpr int scale_bytes = (F::record - RECORD_CODES) / 2; /* of 32 rows */
    const int lane = threadIdx.x % 32, half = threadIdx.x / 32 % 2,
              between = F::halves ? (int)a.p.width / BLOCK * a.block_step * F::record : 512;
    const uint8_t *codes = l.codes + (F::halves ? half * 512 : 0) + 16 * lane, *scales = l.codes + RECORD_CODES + 16 * lane;
    if (F::halves) scales += half * scale_bytes + (16 * lane < scale_bytes ? 0 : between - scale_bytes);
    record += 16 * lane;
    dev_copy16(record, codes), dev_copy16(record + 512, codes + between);
    dev_copy16(record + 1024, codes + 1024), dev_copy16(record + 1536, codes + between + 1024);
    if (16 * lane < 2 * scale_bytes) dev_copy16(record + RECORD_CODES, scales);
}

/* Queues a step, as a group of its own even if there is none. */
template <typename F> static __device__ __forceinline__ void load_few(few_load &l, const tile_args &a, const few_plan &plan, uint32_t to) {
    const int warp = threadIdx.x / 32;
    if (l.index < plan.tiles) {
        const uint32_t record = to + warp * F::record, rows = to + WARPS * F::record;
        if (l.weights) bring_record<F>(l, a, record);
        const bf16 *in = a.p.in + l.k * BLOCK + threadIdx.x % 8 * 8;
#pragma unroll
        for (int i = 0; i < FEW_ROWS / 16; i++) {
            const int row = 16 * i + (int)threadIdx.x / 8;
            if (row < (l.rows + 7) / 8 * 8)
                dev_copy16(staged(rows, row, threadIdx.x % 8), in + (uint64_t)l.row[i] * (uint32_t)(a.k_blocks * BLOCK));
        }
        l.codes += (int64_t)a.k_step * F::record;
        if (++l.k == a.k_blocks) open_tile<F>(l, a, plan, l.index + (int)gridDim.x);
    }
    dev_copy_commit();
}

/* ---- multiplying: d[tile of 16 outputs][8 rows] of a warp ---- */
/* Which of the warp's outputs a lane has as row v of tile i: its row in the record. */
template <few_outputs outputs> static __device__ __forceinline__ int record_row(int i, int v) {
    const int g = threadIdx.x % 32 / 4;
    return outputs == HALVES ? 32 * v + 8 * i + g : outputs == TURNS ? 16 * i + 2 * g + v : 16 * i + 8 * v + g;
}

/* The rows of a step as fragments: their halves of two k16 steps each. */
template <int n> struct row_fragments { uint4 of[n][2]; };

/* Bytes are selected by the pipe that shifts, and it is the one that limits: so the multipliers shift, by factors of which the compiler knows
 * nothing. */
struct multiplied_shifts {
    uint32_t half, sixteenth, order;
    __device__ __forceinline__ uint32_t merge(uint32_t q) const { return dev_and_or(dev_upper(q, half), 0x44444444u, order); }
    __device__ __forceinline__ uint32_t next(uint32_t selectors) const { return dev_upper(selectors, sixteenth); }
};

/* raised: some scale of the record is above 2. */
template <int format, product_kind kind, few_outputs outputs, int n, bool raised>
static __device__ __forceinline__ void multiply_record(float (&d)[4][n][4], uint32_t record, const row_fragments<n> &b, uint32_t own,
                                                       const float (&values)[4]) {
    constexpr bool across = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK;
    const int lane =
        across && n <= 2 ? dev_opaque(threadIdx.x % 32) : threadIdx.x % 32; /* or the places in the slice would be kept in registers */
    const int matrix = lane / 8, line = lane % 8, quad = lane % 4;
    const multiplied_shifts shifts = {(uint32_t)dev_opaque(INT_MIN), (uint32_t)dev_opaque(1 << 16), (uint32_t)dev_opaque(0x32103210)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        code_places at;
        lane_codes codes;
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const int row = record_row<outputs>(i, v);
            at.code[v] = row * 16 + quad * 4, at.scale[v] = RECORD_CODES + row * (format == ESP_MXFP4 ? 2 : 4);
        }
        load_codes<format>(codes, record, at, values);
        if (across) __syncwarp(); /* the slice before is read */
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t w[8];
            decode_words<format>(w, codes, h, shifts);
            if (raised) raise_fragments(w, codes, h);
            if (across)
#pragma unroll
                for (int at = 0; at < 8; at++) dev_store_shared(staged(own, at % 2 * 8 + lane / 4, 4 * h + at / 2) + 4 * quad, w[at]);
            else
#pragma unroll
                for (int j = 0; j < n; j++) {
                    dev_mma(d[i][j], w[0], w[1], w[2], w[3], b.of[j][h].x, b.of[j][h].y);
                    dev_mma(d[i][j], w[4], w[5], w[6], w[7], b.of[j][h].z, b.of[j][h].w);
                }
        }
        if (!across) continue;
        __syncwarp();
#pragma unroll
        for (int out = 0; out < 4; out++) {
            const uint4 w = dev_ldmatrix_trans(staged(own, matrix / 2 * 8 + line, 2 * out + matrix % 2));
#pragma unroll
            for (int j = 0; j < n; j++) {
                const uint4 &v = b.of[j][i / 2];
                dev_mma(d[out][j], w.x, w.y, w.z, w.w, i % 2 ? v.z : v.x, i % 2 ? v.w : v.y);
            }
        }
    }
}

template <int format, product_kind kind, few_outputs outputs, int n>
static __device__ __forceinline__ void multiply_few(float (&d)[4][n][4], uint32_t record, uint32_t rows, uint32_t own, uint32_t table) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8, quad = lane % 4;
    float values[4] = {};
    row_fragments<n> b;
#pragma unroll
    for (int i = 0; i < n; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) b.of[i][h] = dev_ldmatrix(staged(rows, 8 * i + line, 4 * h + matrix));
    if (format == ESP_MXFP4) {
        const uint32_t scales = dev_load_shared4(record + RECORD_CODES + 4 * lane);
        const uint32_t most = max(max(scales & 255u, scales >> 8 & 255u), max(scales >> 16 & 255u, scales >> 24));
        if (__any_sync(~0u, most > 128)) {
            multiply_record<format, kind, outputs, n, true>(d, record, b, own, values);
            return;
        }
    } else { /* kept in shared memory: no registers are to spare between steps */
        const uint4 v = dev_load_shared(table + 16 * quad);
        values[0] = __uint_as_float(v.x), values[1] = __uint_as_float(v.y), values[2] = __uint_as_float(v.z),
        values[3] = __uint_as_float(v.w);
    }
    multiply_record<format, kind, outputs, n, false>(d, record, b, own, values);
}

/* ---- the low-rank branch and the bias, straight from memory ---- */
/* Output number of a lane's row v of tile i, of all that the expert has. */
template <few_outputs outputs> static __device__ __forceinline__ int64_t output_of(const tile_args &a, int job, int i, int v) {
    const int row = record_row<outputs>(i, v);
    if (outputs == HALVES) return 32 * job + row % 32 + row / 32 * a.p.width;
    return (int64_t)BLOCK * job + row;
}

/* So that what the end of a tile reads of the branch is near when it is wanted. */
template <product_kind kind, few_outputs outputs>
static __device__ __forceinline__ void prefetch_low(const tile_args &a, const work &w, int job) {
    constexpr bool across = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK;
    const int r = a.p.r, lane = threadIdx.x % 32;
    const int64_t outs = (int64_t)a.blocks * BLOCK, first = across ? w.expert * r * outs : w.expert * outs * r;
    for (int line = lane; line < 2 * r; line += 32) {
        int64_t at = (int64_t)BLOCK * job * r + line * 32;
        if (across) at = line / 2 * outs + BLOCK * job + line % 2 * 32;
        if (outputs == HALVES) at = (32 * job + (line < r ? 0 : a.p.width)) * r + line % r * 32;
        dev_prefetch_l2(a.p.up + first + at);
    }
}

template <product_kind kind, few_outputs outputs, int n>
static __device__ __forceinline__ void multiply_low(float (&d)[4][n][4], const tile_args &a, const work &w, int job) {
    constexpr bool across = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK;
    const int lane = threadIdx.x % 32, quad = lane % 4, r = a.p.r;
    const int64_t outs = (int64_t)a.blocks * BLOCK;
#pragma unroll 1
    for (int j = 0; j < a.low_steps; j++) {
        const int rank = 16 * j + 2 * quad; /* and the next, and both 8 further */
        uint32_t b[n][2];
#pragma unroll
        for (int i = 0; i < n; i++) {
            const bf16 *row = a.p.low + (int64_t)(w.row0 + min(8 * i + lane / 4, w.rows - 1)) * r + rank;
#pragma unroll
            for (int half = 0; half < 2; half++) b[i][half] = rank + 8 * half < r ? __ldg((const uint32_t *)(row + 8 * half)) : 0;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            uint32_t l[4];
#pragma unroll
            for (int at = 0; at < 4; at++) {
                const int v = at % 2, from = rank + at / 2 * 8;
                float2 pair = make_float2(0, 0);
                if (from < r && across) {
                    const float *column = a.p.up + (w.expert * r + from) * outs + output_of<outputs>(a, job, i, v);
                    pair = make_float2(__ldg(column), __ldg(column + outs));
                } else if (from < r) {
                    pair = __ldg((const float2 *)(a.p.up + (w.expert * outs + output_of<outputs>(a, job, i, v)) * r + from));
                }
                l[at] = dev_bf16x2(a.p.factor * pair.x, a.p.factor * pair.y);
            }
#pragma unroll
            for (int row = 0; row < n; row++) dev_mma(d[i][row], l[0], l[1], l[2], l[3], b[row][0], b[row][1]);
        }
    }
}

/* ---- results: rows of a warp's 64 outputs by way of its own shared memory, gates before ups ---- */
template <product_kind kind, few_outputs outputs, int n>
static __device__ __forceinline__ void finish_few(const float (&d)[4][n][4], const tile_args &a, const work &w, int job, uint32_t own,
                                                  uint32_t row_weights) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const bool biased = (kind == PRODUCT_GATE_UP || kind == PRODUCT_DOWN) && a.p.bias;
            const float bias = biased ? __ldg(a.p.bias + (int64_t)w.expert * a.blocks * BLOCK + output_of<outputs>(a, job, i, v)) : 0.0f;
            const int piece = kind == PRODUCT_GATE_UP ? 4 * v + i : 2 * i + v;
#pragma unroll
            for (int j = 0; j < n; j++)
                dev_store_shared(staged(own, 8 * j + lane / 4, piece) + lane % 4 * 4,
                                 dev_transposed(dev_bf16x2(d[i][j][2 * v] + bias, d[i][j][2 * v + 1] + bias)));
        }
    if (kind == PRODUCT_DOWN_BACK && lane < w.rows)
        dev_store_shared(row_weights + 4 * lane, __float_as_uint(((const float *)a.p.routing.row_weight)[w.row0 + lane]));
    __syncwarp();
    if (kind == PRODUCT_GATE_UP) {
        for (int i = lane; i < 4 * w.rows; i += 32) {
            const int row = i / 4, c = i % 4;
            const gate_up_words v = split_gate_up(dev_load_shared(staged(own, row, c)), dev_load_shared(staged(own, row, 4 + c)), false);
            store_gate_up(a, w.row0 + row, 32 * job + 8 * c, v);
        }
    } else if (kind == PRODUCT_DOWN_BACK) {
#pragma unroll 1
        for (int row = 0; row < w.rows; row += 4) { /* as the threads of a warpgroup have them: back_row */
            const int thread = row % 16 * 8 + lane;
            gu_row gu;
            load_gu(gu, a, w, job, thread, 0, row / 16);
            finish_down_back(a, w, own, row_weights, job, thread, 0, row / 16, gu);
        }
    } else {
        const int64_t outs = (int64_t)a.blocks * BLOCK;
        for (int i = lane; i < 8 * w.rows; i += 32)
            *(uint4 *)(a.p.out + (w.row0 + i / 8) * outs + job * BLOCK + 8 * (i % 8)) = dev_load_shared(staged(own, i / 8, i % 8));
    }
    __syncwarp();
}

/* ---- a tile ---- */
template <int format, product_kind kind, few_outputs outputs, int n>
static __device__ __forceinline__ void make_few(const tile_args &a, const few_plan &plan, int index, few_load &l, uint32_t base,
                                                int &stage) {
    using F = few_form<format, kind, outputs>;
    const int warp = threadIdx.x / 32, job = index % a.tiles_few * WARPS + warp;
    const uint32_t own = base + F::own + warp * F::own_bytes;
    const bool there = job < a.blocks;
    float d[4][n][4] = {};
    if (there && a.low_steps > 0) prefetch_low<kind, outputs>(a, few_work(a, plan, index), job);
#pragma unroll 1
    for (int k = 0; k < a.k_blocks; k++) {
        dev_copy_wait<STAGES - 2>();
        __syncthreads();
        load_few<F>(l, a, plan, base + (stage == 0 ? STAGES - 1 : stage - 1) * F::step);
        const uint32_t step = base + stage * F::step;
        if (there) multiply_few<format, kind, outputs, n>(d, step + warp * F::record, step + WARPS * F::record, own, base + F::table);
        stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    if (!there) return;
    const work w = few_work(a, plan, dev_opaque(index)); /* found again: no registers are to spare in the loop */
    multiply_low<kind, outputs, n>(d, a, w, job);
    finish_few<kind, outputs, n>(d, a, w, job, own, own + F::weights);
}

template <int format, product_kind kind, few_outputs outputs>
static __global__
__launch_bounds__(THREADS, (few_form<format, kind, outputs>::blocks)) void product_few_kernel(const __grid_constant__ tile_args a) {
    using F = few_form<format, kind, outputs>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint32_t base = dev_shared(shared);
    if (format == ESP_NF4 && threadIdx.x < 16) ((float *)(shared + F::table))[threadIdx.x] = a.p.w.lut[threadIdx.x];
    const few_plan plan = make_plan<F>(a, base);
    int stage = 0; /* of the step to be multiplied */
    few_load l;
    open_tile<F>(l, a, plan, (int)blockIdx.x);
    for (int i = 0; i < STAGES - 1; i++) load_few<F>(l, a, plan, base + i * F::step);
    dev_wait_for_last(); /* the plan is there for those that begin now */
    dev_let_next_begin();
    for (int index = (int)blockIdx.x; index < plan.tiles; index += (int)gridDim.x) {
        switch ((few_work(a, plan, index).rows + 7) / 8) {
        case 1:
            make_few<format, kind, outputs, 1>(a, plan, index, l, base, stage);
            break;
        case 2:
            make_few<format, kind, outputs, 2>(a, plan, index, l, base, stage);
            break;
        case 3:
            make_few<format, kind, outputs, 3>(a, plan, index, l, base, stage);
            break;
        default:
            make_few<format, kind, outputs, 4>(a, plan, index, l, base, stage);
        }
    }
    dev_copy_wait<0>();
}

template <int format, product_kind kind, few_outputs outputs = PLAIN>
static cudaError_t launch(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    using F = few_form<format, kind, outputs>;
    const auto kernel = product_few_kernel<format, kind, outputs>;
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::bytes);
    if (error != cudaSuccess) return error;
    return launch_beside(kernel, a, F::blocks * multiprocessors, THREADS, F::bytes, stream);
}

template <int format> static cudaError_t launch_kind(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    return with_kind(a.kind, [&](auto constant) {
        constexpr product_kind kind = decltype(constant)::value;
        if constexpr (kind == PRODUCT_GATE_UP)
            return a.halves ? launch<format, kind, HALVES>(a, multiprocessors, stream)
                            : launch<format, kind, TURNS>(a, multiprocessors, stream);
        else
            return launch<format, kind>(a, multiprocessors, stream);
    });
}

cudaError_t launch_few(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    return a.p.w.format == ESP_MXFP4 ? launch_kind<ESP_MXFP4>(a, multiprocessors, stream)
                                     : launch_kind<ESP_NF4>(a, multiprocessors, stream);
}
