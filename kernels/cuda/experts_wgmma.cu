/* Products with the packed expert stacks on sm_90a: 4-bit weights are decoded on their way into shared memory, where wgmma multiplies them with
 * the routed rows.
 *
 * D^T tile: 128 outputs (two warpgroups, 64 each) x up to `rows_max` routed rows of one expert, the rows on the N side so that a tile wastes
 * less than 16.  The other warps decode, each whole k-blocks of 64 in turn.  The warps that multiply bring the rows themselves, by row index
 * (the gather is part of the load), into the stage that they have just left; so all stages but one are filled ahead, also across tiles.
 * The low-rank branch is one more, shorter k-block.  A backward reads the same records across.  Two regimes, chosen by a kernel from the
 * counts: `wide` for many rows per expert, `narrow` for few. */
#include "kernels/cuda/experts_tile.cuh"

template <bool wide> struct regime {
    static constexpr int rows_max = wide ? WIDE_ROWS : NARROW_ROWS, stages = wide ? 4 : 8, decoders = wide ? 4 : 8;
    static constexpr int threads = (8 + decoders) * 32, lines = rows_max / 32; /* lines: rows that a thread brings a piece of */
    static constexpr int stage_bytes = 2 * SUBTILE + rows_max * 128, steps16 = rows_max / 16;
    static constexpr int staging = stages * stage_bytes, barriers = staging + 2 * SUBTILE;
    static constexpr int table = barriers + 16 * stages;
    static constexpr int works = table + 64, indices = works + 24; /* of this tile and the next: what it is, its rows of `in` */
    static constexpr int shared_bytes = indices + 2 * rows_max * 4;
};

#if DEV_HOPPER
/* Word 0 or 1 of the work of a tile; rows = 0 where there is none. */
static __device__ __forceinline__ uint32_t work_word(const tile_args &a, int index, int tiles, int word) {
    return index < tiles ? __ldg((const uint32_t *)(a.plan + 1 + index) + word) : 0;
}

/* Where a decoder is: k-block `k` of tile `index`; `after`: expert and m of the tile behind it, already read. */
struct decode_place {
    int index, k, expert, block[2];
    const uint8_t *from[2];
    uint32_t after;
};

template <int format, bool across> static __device__ __forceinline__ void place_at(decode_place &d, const tile_args &a) {
    for (int g = 0; g < 2; g++) {
        if (format == ESP_Q_NONE) {
            const int rows = across ? d.k : d.block[g], columns = across ? d.block[g] : d.k;
            d.from[g] = a.weights + d.expert * a.expert_bytes + rows * BLOCK * a.row_bytes + columns * BLOCK * 2;
        } else {
            d.from[g] = a.weights + d.expert * a.expert_bytes +
                        ((int64_t)d.block[g] * a.block_step + (int64_t)d.k * a.k_step) * RECORD_BYTES(format);
        }
    }
}

template <int format, bool across, bool wide>
static __device__ __forceinline__ void decode(const tile_args &a, uint32_t base, int decoder, int lane, int tiles) {
    using R = regime<wide>;
    const uint32_t full = base + R::barriers, empty = full + 8 * R::stages;
    const int blocks_k = a.k_blocks + (a.low_steps > 0);
    decode_place next;
    next.index = (int)(blockIdx.x - gridDim.x), next.k = decoder + blocks_k - R::decoders;
    next.after = work_word(a, (int)blockIdx.x, tiles, 0);
    auto advance = [&]() { /* rolls over into the next tiles of this block */
                           next.k += R::decoders;
                           while (next.k >= blocks_k) {
                               next.k -= blocks_k, next.index += (int)gridDim.x;
                               const work w = unpack_work(next.after, 0);
                               next.expert = w.expert;
                               for (int g = 0; g < 2; g++) next.block[g] = min(block_of(a, w.m, g), a.blocks - 1);
                               next.after = work_word(a, next.index + (int)gridDim.x, tiles, 0);
                           }
                           if (next.index < tiles) place_at<format, across>(next, a);
    };
    advance();
    coded_row codes[4];
    auto load = [&](int i) {
        if (format != ESP_Q_NONE) load_row<format>(codes[i], next.from[i / 2], lane + 32 * (i % 2));
    };
    if (next.index < tiles && next.k < a.k_blocks)
#pragma unroll
        for (int i = 0; i < 4; i++) load(i);
    for (uint32_t it = (uint32_t)decoder; next.index < tiles; it += R::decoders) {
        const uint32_t stage = it % R::stages, to = base + stage * R::stage_bytes, parity = (it / R::stages & 1) ^ 1;
        if (next.k < a.k_blocks && format != ESP_Q_NONE) {
            advance();
            const bool more = next.index < tiles && next.k < a.k_blocks;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const byte_planes planes = planes_of<format>(codes[i].scale, base + R::table);
                uint4 values[4];
                decode_half<format>(values, codes[i], 0, planes);
                if (i == 0) dev_barrier_wait(empty + 8 * stage, parity); /* the first values are decoded before the stage is free */
                store_half(to + i / 2 * SUBTILE, lane + 32 * (i % 2), 0, values);
                decode_half<format>(values, codes[i], 1, planes);
                if (more) load(i);
                store_half(to + i / 2 * SUBTILE, lane + 32 * (i % 2), 1, values);
            }
        } else {
            dev_barrier_wait(empty + 8 * stage, parity);
#pragma unroll 1
            for (int g = 0; g < 2; g++) {
                if (next.k < a.k_blocks)
                    copy_plain(to + g * SUBTILE, g ? next.from[1] : next.from[0], a.row_bytes, lane);
                else
                    low_block<across>(to + g * SUBTILE, a, next.expert, g ? next.block[1] : next.block[0], lane);
            }
            dev_copy_wait<0>();
            advance();
            if (next.index < tiles && next.k < a.k_blocks)
#pragma unroll
                for (int i = 0; i < 4; i++) load(i);
        }
        dev_fence_async();
        __syncwarp();
        if (lane == 0) dev_barrier_arrive(full + 8 * stage);
    }
}

/* ---- the rows: a thread brings the same 16-byte piece of every 32nd row ---- */
/* What the warps that multiply know.  Their tiles (three: one warpgroup may still finish the tile before) and rows of `in` stand in shared
 * memory, by turns; those of the next tile but one are on
 * their way in registers, a thread holding one row. */
template <bool wide> struct pipeline {
    uint32_t base, it; /* it: k-blocks so far, of all tiles */
    int turn;          /* tiles so far */
    int row;           /* of the next tile, not yet in shared memory, as is */
    uint32_t word;     /* this one of its work */
    uint32_t range;    /* row0 and rows of the tile behind it */
};

/* k-blocks of rows on their way: all stages but one, less where a tile is shorter than that. */
template <bool wide> static __device__ __forceinline__ int ahead_of(const tile_args &a) {
    return min(regime<wide>::stages - 1, a.k_blocks + (a.low_steps > 0));
}

static __device__ __forceinline__ int row_of(const tile_args &a, uint32_t range) {
    const work w = unpack_work(0, range);
    const int s = w.row0 + min((int)threadIdx.x, max(w.rows - 1, 0));
    return a.p.in_row ? __ldg(a.p.in_row + s) : s;
}

template <bool wide> static __device__ __forceinline__ uint32_t works_at(uint32_t base, int turn) {
    return base + regime<wide>::works + turn % 3 * 8;
}

template <bool wide> static __device__ __forceinline__ work shared_work(uint32_t base, int turn) {
    return unpack_work(dev_load_shared4(works_at<wide>(base, turn)), dev_load_shared4(works_at<wide>(base, turn) + 4));
}

/* Puts the next tile into shared memory, and asks for what comes after. */
template <bool wide> static __device__ __forceinline__ void publish(const tile_args &a, pipeline<wide> &p, int index, int tiles) {
    using R = regime<wide>;
    const int slot = (p.turn + 1) % 2, step = (int)gridDim.x;
    if (threadIdx.x < R::rows_max) dev_store_shared(p.base + R::indices + (slot * R::rows_max + threadIdx.x) * 4, (uint32_t)p.row);
    if (threadIdx.x < 2) dev_store_shared(works_at<wide>(p.base, p.turn + 1) + 4 * threadIdx.x, p.word);
    p.row = row_of(a, p.range);
    p.word = work_word(a, index + 2 * step, tiles, threadIdx.x % 2);
    p.range = work_word(a, index + 3 * step, tiles, 1);
}

/* K-block k of the rows of a tile into a stage. */
template <bool wide> static __device__ __forceinline__ void bring_rows(const tile_args &a, uint32_t base, uint32_t stage, int k, int turn) {
    using R = regime<wide>;
    const int piece = threadIdx.x % 8, line = threadIdx.x / 8;
    const work w = unpack_work(0, dev_load_shared4(works_at<wide>(base, turn) + 4));
    const int valid = max(w.rows, 1), rows = valid + 15 & ~15;
    const uint32_t to = stage + 2 * SUBTILE + line * 128 + ((piece ^ (line & 7)) << 4), row_bytes = (uint32_t)a.k_blocks * BLOCK * 2;
    if (k < a.k_blocks) {
        const char *from = (const char *)(a.p.in + k * BLOCK + 8 * piece);
        const uint32_t index = base + R::indices + (turn % 2 * R::rows_max + line) * 4;
#pragma unroll
        for (int i = 0; i < R::lines; i++)
            if (line + 32 * i < rows) dev_copy16(to + 4096 * i, from + (uint64_t)dev_load_shared4(index + 128 * i) * row_bytes);
    } else if (piece < 2 * a.low_steps) {
        const bool there = 8 * piece < a.p.r;
        const bf16 *from = a.p.low + (there ? 8 * piece : 0);
#pragma unroll 1
        for (int i = line; i < rows; i += 32)
            dev_copy16_or_zero(to + (i - line) * 128, from + (int64_t)(w.row0 + min(i, valid - 1)) * a.p.r, there ? 16 : 0);
    }
}

/* ---- the products ---- */
/* Queues the rows of the k-block `ahead` of block k of this tile. */
template <bool wide> static __device__ __forceinline__ void bring_ahead(const tile_args &a, const pipeline<wide> &p, int k, int blocks_k) {
    using R = regime<wide>;
    const int ahead = ahead_of<wide>(a), other = k + ahead >= blocks_k; /* other: of the next tile */
    const uint32_t block = p.it + ahead, stage = block % R::stages;
    if (!other || shared_work<wide>(p.base, p.turn + 1).rows) {
        dev_barrier_wait(p.base + R::barriers + 8 * (R::stages + stage), (block / R::stages & 1) ^ 1);
        bring_rows<wide>(a, p.base, p.base + stage * R::stage_bytes, k + ahead - (other ? blocks_k : 0), p.turn + other);
    }
    dev_copy_commit();
}

/* Until block `it` is in shared memory: the rows that this thread brought, then everybody's and the decoder's. */
template <bool wide> static __device__ __forceinline__ void await_block(const tile_args &a, const pipeline<wide> &p, int lane) {
    using R = regime<wide>;
    const uint32_t full = p.base + R::barriers + 8 * (p.it % R::stages);
    if (ahead_of<wide>(a) == R::stages - 1)
        dev_copy_wait<R::stages - 2>();
    else
        dev_copy_wait<0>();
    dev_fence_async();
    __syncwarp();
    if (lane == 0) dev_barrier_arrive(full);
    dev_barrier_wait(full, p.it / R::stages & 1);
}

template <bool wide> static __device__ __forceinline__ void release(const pipeline<wide> &p, uint32_t block, int lane) {
    using R = regime<wide>;
    if (lane == 0) dev_barrier_arrive(p.base + R::barriers + 8 * (R::stages + block % R::stages));
}

template <int n, bool across, bool wide>
static __device__ __forceinline__ void multiply(float (&d)[128], const tile_args &a, pipeline<wide> &p, int g, int lane) {
    using R = regime<wide>;
    constexpr uint64_t a_step = across ? 128 : 2;
    const int blocks_k = a.k_blocks + (a.low_steps > 0);
    for (int k = 0; k < a.k_blocks; k++, p.it++) {
        const uint32_t at = p.base + p.it % R::stages * R::stage_bytes;
        await_block(a, p, lane);
        const uint64_t weights = dev_tile(at + g * SUBTILE, 1024), rows = dev_tile(at + 2 * SUBTILE, 1024);
        dev_wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) dev_wgmma<n, across>::run(d, weights + j * a_step, rows + 2 * j, k | j);
        dev_wgmma_commit();
        dev_wgmma_wait<1>();
        if (k > 0) release(p, p.it - 1, lane);
        bring_ahead(a, p, k, blocks_k);
    }
    dev_wgmma_wait<0>();
    release(p, p.it - 1, lane);
    if (a.low_steps > 0) {
        const uint32_t at = p.base + p.it % R::stages * R::stage_bytes;
        await_block(a, p, lane);
        const uint64_t weights = dev_tile(at + g * SUBTILE, 1024), rows = dev_tile(at + 2 * SUBTILE, 1024);
        for (int j = 0; j < a.low_steps; j++) {
            dev_wgmma_begin();
            dev_wgmma<n, across>::run(d, weights + j * a_step, rows + 2 * j, 1);
            dev_wgmma_commit();
            dev_wgmma_wait<0>();
        }
        release(p, p.it, lane);
        bring_ahead(a, p, a.k_blocks, blocks_k);
        p.it++;
    }
    dev_wgmma_settle<8 * n>(d);
}

/* What the epilogue of down_back will read: a thread asks for one row of gu. */
static __device__ __forceinline__ void prefetch_gu(const tile_args &a, const work &w) {
    if ((int)threadIdx.x >= w.rows) return;
    const int pairs = a.p.glu.interleaved ? 2 : 1;
    const char *row = (const char *)(a.p.gu + (int64_t)(w.row0 + (int)threadIdx.x) * 2 * a.p.width + w.m * 128 * pairs);
    dev_prefetch_l2(row), dev_prefetch_l2(row + 128);
    row += pairs == 2 ? 256 : 2 * a.p.width;
    const bool whole = w.m * 128 + 64 < a.p.width; /* else half a tile, the last of a row */
    if (whole || pairs == 1) dev_prefetch_l2(row);
    if (whole) dev_prefetch_l2(row + 128);
}

/* Turns D^T into rows of 64 outputs by way of shared memory, 64 routed rows at a time. */
template <bool across, bool wide>
static __device__ __forceinline__ void finish(float (&d)[128], const tile_args &a, const work &w, uint32_t base, int g, int lane) {
    using R = regime<wide>;
    const bool both = !across && a.kind == PRODUCT_GATE_UP;
    const int warp = (int)(threadIdx.x / 32) % 4, meeting = both ? 1 : 1 + g, members = both ? 256 : 128;
    const int block = block_of(a, w.m, g);
    const uint32_t staging = base + R::staging, own = staging + g * SUBTILE;
    float bias0 = 0, bias1 = 0;
    if (!across && a.p.bias && block < a.blocks) {
        const float *bias = a.p.bias + ((int64_t)w.expert * a.blocks + block) * BLOCK + 16 * warp + lane / 4;
        bias0 = __ldg(bias), bias1 = __ldg(bias + 8);
    }
#pragma unroll
    for (int chunk = 0; chunk < R::rows_max / 64; chunk++) {
        if (64 * chunk < w.rows) {
            dev_meet(meeting, members); /* the staging is read */
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *v = d + 32 * chunk + 8 * i;
                dev_stmatrix_trans(staged(own, 16 * i + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2),
                                   dev_bf16x2(v[0] + bias0, v[1] + bias0), dev_bf16x2(v[2] + bias1, v[3] + bias1),
                                   dev_bf16x2(v[4] + bias0, v[5] + bias0), dev_bf16x2(v[6] + bias1, v[7] + bias1));
            }
            dev_meet(meeting, members);
            if (both)
                finish_gate_up(a, w, staging, chunk);
            else if (block < a.blocks && across && a.kind == PRODUCT_DOWN_BACK)
                finish_down_back(a, w, own, block, chunk);
            else if (block < a.blocks)
                finish_rows(a, w, own, block, chunk);
        }
    }
}

#endif

template <bool across, bool wide>
static __global__ __launch_bounds__(regime<wide>::threads, 1) void product_wgmma_kernel(const __grid_constant__ tile_args a) {
#if DEV_HOPPER
    using R = regime<wide>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint2 counts = __ldg(a.plan);
    const int tiles = (int)(wide ? counts.x : counts.y);
    if ((int)blockIdx.x >= tiles) return;
    const uint32_t base = dev_shared(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (a.p.w.format != ESP_Q_NONE && threadIdx.x < 16)
        dev_store_shared(base + R::table + 4 * threadIdx.x, __float_as_uint(a.p.w.lut[threadIdx.x]));
    if (threadIdx.x == 0) {
        for (int i = 0; i < R::stages; i++) {
            dev_barrier_init(base + R::barriers + 8 * i, 9);               /* full: a decoder and the warps that bring rows */
            dev_barrier_init(base + R::barriers + 8 * (R::stages + i), 8); /* empty: the same warps, which multiply */
        }
        dev_fence_async();
    }
    __syncthreads();
    if (warp >= 8) {
        if (wide) dev_registers_shrink<120>();
        if (a.p.w.format == ESP_MXFP4)
            decode<ESP_MXFP4, across, wide>(a, base, warp - 8, lane, tiles);
        else if (a.p.w.format == ESP_Q_NONE)
            decode<ESP_Q_NONE, across, wide>(a, base, warp - 8, lane, tiles);
        else
            decode<ESP_NF4, across, wide>(a, base, warp - 8, lane, tiles);
    } else {
        if (wide) dev_registers_grow<192>();
        const int g = warp / 4, step = (int)gridDim.x;
        pipeline<wide> p;
        p.base = base, p.it = 0, p.turn = -1;
        p.row = row_of(a, work_word(a, (int)blockIdx.x, tiles, 1));
        p.word = work_word(a, (int)blockIdx.x, tiles, threadIdx.x % 2);
        p.range = work_word(a, (int)blockIdx.x + step, tiles, 1);
        publish(a, p, (int)blockIdx.x - step, tiles);
        p.turn = 0;
        dev_meet(1, 256);
        for (int k = 0; k < ahead_of<wide>(a); k++) {
            bring_rows<wide>(a, base, base + k * R::stage_bytes, k, 0);
            dev_copy_commit();
        }
        for (int index = (int)blockIdx.x; index < tiles; index += step, p.turn++) {
            publish(a, p, index, tiles);
            const int rows = shared_work<wide>(base, p.turn).rows;
            if (across && a.kind == PRODUCT_DOWN_BACK) prefetch_gu(a, shared_work<wide>(base, p.turn));
            float d[128];
#define MULTIPLY(n)                                                                                                                        \
    case n:                                                                                                                                \
        if (n <= R::steps16) multiply<n <= R::steps16 ? n : 1, across, wide>(d, a, p, g, lane);                                            \
        break
            switch (max((rows + 15) / 16, 1)) {
                MULTIPLY(1);
                MULTIPLY(2);
                MULTIPLY(3);
                MULTIPLY(4);
                MULTIPLY(5);
                MULTIPLY(6);
                MULTIPLY(7);
                MULTIPLY(8);
                MULTIPLY(9);
                MULTIPLY(10);
                MULTIPLY(11);
                MULTIPLY(12);
                MULTIPLY(13);
                MULTIPLY(14);
                MULTIPLY(15);
                MULTIPLY(16);
            }
#undef MULTIPLY
            finish<across, wide>(d, a, shared_work<wide>(base, p.turn), base, g, lane);
        }
    }
#endif
}

/* Built for other targets the kernel is empty: it has no registers to speak of. */
bool wgmma_available() {
    cudaFuncAttributes attributes;
    const bool known = cudaFuncGetAttributes(&attributes, product_wgmma_kernel<false, true>) == cudaSuccess;
    if (!known) (void)cudaGetLastError();
    return known && attributes.binaryVersion == 90 && attributes.numRegs > 64;
}

template <bool across, bool wide> static cudaError_t launch(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    using R = regime<wide>;
    static_assert(R::shared_bytes <= 232448 && R::decoders <= R::stages, "");
    const cudaError_t error =
        cudaFuncSetAttribute(product_wgmma_kernel<across, wide>, cudaFuncAttributeMaxDynamicSharedMemorySize, R::shared_bytes);
    if (error != cudaSuccess) return error;
    product_wgmma_kernel<across, wide><<<multiprocessors, R::threads, R::shared_bytes, stream>>>(a);
    return cudaGetLastError();
}

/* Both regimes: the one that the plan has no tiles for ends at once. */
template <bool across> static cudaError_t launch_regimes(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    const cudaError_t error = launch<across, true>(a, multiprocessors, stream);
    return error != cudaSuccess ? error : launch<across, false>(a, multiprocessors, stream);
}

cudaError_t launch_wgmma(const tile_args &a, bool back, int multiprocessors, cudaStream_t stream) {
    return back ? launch_regimes<true>(a, multiprocessors, stream) : launch_regimes<false>(a, multiprocessors, stream);
}
