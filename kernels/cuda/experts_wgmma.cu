/* Products with the packed expert stacks on sm_90a: 4-bit weights are decoded on their way into shared memory, where wgmma multiplies them with
 * the routed rows.
 *
 * D^T tile: 128 outputs (two warpgroups, 64 each) x up to `rows_max` routed rows of one expert, the rows on the N side so that a tile wastes
 * less than 16.  The other warps bring rows and decode weights, ahead by `stages` k-blocks of 64, also across tiles.  The low-rank branch is
 * one more, shorter k-block.  A backward reads the same records across.
 *
 * Two regimes, chosen by a kernel from the counts.  `wide`, many rows per expert: the rows were put in the routed order before, the copy
 * engine brings boxes of them, and four warps decode each k-block together, so that no stage is held longer than that takes.  `narrow`, few
 * rows: a warp brings the rows by their index (the gather is part of the load), the others decode whole k-blocks in turn.  Its copies
 * announce themselves on the stage's barrier and the readers order them before wgmma: a fence in the warp that copies would wait for all
 * copies under way. */
#include "kernels/cuda/experts_tile.cuh"

template <bool wide> struct regime {
    static constexpr int rows_max = wide ? WIDE_ROWS : NARROW_ROWS, stages = wide ? 4 : 8, producers = wide ? 4 : 8;
    static constexpr int arrivals =
        wide ? 5 : 33; /* at a full stage: four decoders and who queues the boxes, or one and 32 lanes that copy */
    static constexpr int threads = (8 + producers) * 32;
    static constexpr int stage_bytes = 2 * SUBTILE + rows_max * 128, steps16 = rows_max / 16;
    static constexpr int staging = stages * stage_bytes, barriers = staging + 2 * SUBTILE;
    static constexpr int table = barriers + 16 * stages, indices = table + 64, shared_bytes = indices + rows_max * 4;
};

#if DEV_HOPPER
/* Word 0 or 1 of the work of a tile; rows = 0 where there is none. */
static __device__ __forceinline__ uint32_t work_word(const tile_args &a, int index, int tiles, int word) {
    return index < tiles ? __ldg((const uint32_t *)(a.plan + 1 + index) + word) : 0;
}

/* What the epilogue of down_back will read. */
static __device__ __forceinline__ void prefetch_gu(const tile_args &a, const work &w, int thread, int threads) {
    const int pairs = a.p.glu.interleaved ? 2 : 1;
    const bool whole = w.m * 128 + 64 < a.p.width; /* else half a tile, the last of a row */
    for (int i = thread; i < w.rows; i += threads) {
        const char *row = (const char *)(a.p.gu + (int64_t)(w.row0 + i) * 2 * a.p.width + w.m * 128 * pairs);
        dev_prefetch_l2(row), dev_prefetch_l2(row + 128);
        row += pairs == 2 ? 256 : 2 * a.p.width;
        if (whole || pairs == 1) dev_prefetch_l2(row);
        if (whole) dev_prefetch_l2(row + 128);
    }
}

/* ---- producers of the wide regime ---- */
/* Where the codes are read: k-block k of tile `index`; `after`: expert and m of the tile behind it. */
struct code_place {
    int index, k;
    const uint8_t *from;
    uint32_t after;
};

/* The tile that is made, and the one behind it. */
struct row_place {
    int index, k;
    uint32_t now[2], next[2]; /* words of their works */
};

/* Queues the boxes that make 16 * steps rows from row0 on; the stage's barrier counts their bytes. */
static __device__ __forceinline__ void bring_boxes(const tile_args &a, uint32_t to, uint32_t barrier, int k, int row0, int steps) {
    dev_barrier_expect(barrier, (uint32_t)steps * 2048);
    int done = 0;
    for (int left = steps; left >= 8; left -= 8, done += 8)
        dev_copy_box(to + done * 2048, &a.boxes[0], barrier, k * BLOCK, row0 + 16 * done);
#pragma unroll
    for (int i = 1; i < 4; i++) {
        const int size = 8 >> i;
        if (!(steps & size)) continue;
        dev_copy_box(to + done * 2048, &a.boxes[i], barrier, k * BLOCK, row0 + 16 * done);
        done += size;
    }
}

template <int format, bool across>
static __device__ __forceinline__ void produce(const tile_args &a, uint32_t base, int producer, int lane, int tiles) {
    using R = regime<true>;
    const int w = producer, row = w % 2 * 32 + lane, blocks_k = a.k_blocks + (a.low_steps > 0);
    const int pieces = 2 * a.low_steps, jump = (int)gridDim.x;
    const uint32_t full = base + R::barriers, empty = full + 8 * R::stages;
    auto block_of_word = [&](uint32_t word) { return min(block_of(a, (int)(word & 0xffffu), w / 2), a.blocks - 1); };

    code_place c;
    c.index = (int)blockIdx.x - jump, c.k = blocks_k, c.from = NULL, c.after = work_word(a, (int)blockIdx.x, tiles, 0);
    auto settle = [&]() { /* into the next tile when this one is through */
                          const int64_t stride = (int64_t)a.k_step * RECORD_BYTES(format);
                          while (c.k >= blocks_k) {
                              c.k -= blocks_k, c.index += jump;
                              const int block = block_of_word(c.after), expert = (int)(c.after >> 16);
                              c.from =
                                  a.weights + expert * a.expert_bytes + (int64_t)block * a.block_step * RECORD_BYTES(format) + c.k * stride;
                              c.after = work_word(a, c.index + jump, tiles, 0);
                          }
    };
    auto fetch = [&](coded_row &codes) {
        if (c.index < tiles && c.k < a.k_blocks) load_row<format>(codes, c.from, row);
        c.k++, c.from += (int64_t)a.k_step * RECORD_BYTES(format);
        settle();
    };
    coded_row codes0, codes1;
    if (format != ESP_Q_NONE) settle(), fetch(codes0), fetch(codes1);

    row_place p;
    p.index = (int)blockIdx.x - jump, p.k = blocks_k;
    for (int i = 0; i < 2; i++) p.next[i] = work_word(a, (int)blockIdx.x, tiles, i);
    auto enter = [&]() {
        while (p.k >= blocks_k) {
            p.k -= blocks_k, p.index += jump;
            for (int i = 0; i < 2; i++) p.now[i] = p.next[i], p.next[i] = work_word(a, p.index + jump, tiles, i);
            if (a.kind == PRODUCT_DOWN_BACK && p.index < tiles) prefetch_gu(a, unpack_work(p.now[0], p.now[1]), w * 32 + lane, 128);
        }
    };
    enter();
    uint32_t it = 0;
    auto make = [&](coded_row &codes) {
        const uint32_t stage = it % R::stages, to = base + stage * R::stage_bytes, rows_to = to + 2 * SUBTILE;
        const work now = unpack_work(p.now[0], p.now[1]);
        const int steps = max((now.rows + 15) / 16, 1), k = p.k;
        const bool coded = k < a.k_blocks && format != ESP_Q_NONE;
        const byte_planes planes = planes_of<format>(codes.scale, load_table(base + R::table));
        dev_barrier_wait(empty + 8 * stage, (it / R::stages & 1) ^ 1);
        if (w == 0 && lane == 0) {
            if (k < a.k_blocks)
                bring_boxes(a, rows_to, full + 8 * stage, k, now.row0, steps);
            else
                dev_barrier_arrive(full + 8 * stage);
        }
        if (k < a.k_blocks && format == ESP_Q_NONE) {
            const int block = min(block_of(a, now.m, w / 2), a.blocks - 1), rows = across ? k : block, columns = across ? block : k;
            copy_plain(to + w / 2 * SUBTILE, a.weights + now.expert * a.expert_bytes + rows * BLOCK * a.row_bytes + columns * BLOCK * 2,
                       a.row_bytes, row, 64);
            dev_copy_wait_all();
        } else if (k == a.k_blocks) {
            for (int i = w * 32 + lane; i < 16 * steps * pieces; i += 128) {
                const int line = i / pieces, at = i % pieces;
                const bool there = 8 * at < a.p.r;
                const bf16 *from = a.p.low + (int64_t)(now.row0 + min(line, max(now.rows - 1, 0))) * a.p.r + (there ? 8 * at : 0);
                dev_copy16_or_zero(rows_to + line * 128 + ((at ^ (line & 7)) << 4), from, there ? 16 : 0);
            }
            low_block<across>(to + w / 2 * SUBTILE, a, now.expert, min(block_of(a, now.m, w / 2), a.blocks - 1), row, 64);
            dev_copy_wait_all();
        }
        if (coded) decode_row<format>(to + w / 2 * SUBTILE, row, codes, planes);
        if (format != ESP_Q_NONE) fetch(codes);
        dev_fence_async();
        __syncwarp();
        if (lane == 0) dev_barrier_arrive(full + 8 * stage);
        it++, p.k++;
        enter();
    };
    while (p.index < tiles) {
        make(codes0);
        if (p.index < tiles) make(codes1);
    }
}

/* ---- producers of the narrow regime ---- */
#define DECODERS (regime<false>::producers - 1)

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

template <int format, bool across>
static __device__ __forceinline__ void decode(const tile_args &a, uint32_t base, int decoder, int lane, int tiles) {
    using R = regime<false>;
    const uint32_t full = base + R::barriers, empty = full + 8 * R::stages;
    const int blocks_k = a.k_blocks + (a.low_steps > 0);
    decode_place next;
    next.index = (int)(blockIdx.x - gridDim.x), next.k = decoder + blocks_k - DECODERS;
    next.after = work_word(a, (int)blockIdx.x, tiles, 0);
    auto advance = [&]() { /* rolls over into the next tiles of this block */
                           next.k += DECODERS;
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
    for (uint32_t it = (uint32_t)decoder; next.index < tiles; it += DECODERS) {
        const uint32_t stage = it % R::stages, to = base + stage * R::stage_bytes, parity = (it / R::stages & 1) ^ 1;
        if (next.k < a.k_blocks && format != ESP_Q_NONE) {
            advance();
            const bool more = next.index < tiles && next.k < a.k_blocks;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const byte_planes planes = planes_of<format>(codes[i].scale, load_table(base + R::table));
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
                    copy_plain(to + g * SUBTILE, g ? next.from[1] : next.from[0], a.row_bytes, lane, 32);
                else
                    low_block<across>(to + g * SUBTILE, a, next.expert, g ? next.block[1] : next.block[0], lane, 32);
            }
            dev_copy_wait_all();
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

/* A warp brings the rows in 16-byte pieces, by their index. */
static __device__ __forceinline__ void bring_rows(const tile_args &a, uint32_t base, int lane, int tiles) {
    using R = regime<false>;
    const uint32_t full = base + R::barriers, empty = full + 8 * R::stages, indices = base + R::indices;
    const int blocks_k = a.k_blocks + (a.low_steps > 0), quarter = lane / 8, piece = lane % 8, pieces = 2 * a.low_steps;
    const uint32_t row_bytes = (uint32_t)a.k_blocks * BLOCK * 2;
    uint32_t it = 0, place[4];
#pragma unroll
    for (int i = 0; i < 4; i++) place[i] = (4 * quarter + i) * 128 + ((piece ^ (4 * (quarter & 1) + i)) << 4);
    work next = work_of(a, (int)blockIdx.x);
    for (int index = (int)blockIdx.x; index < tiles; index += (int)gridDim.x) {
        const work w = next;
        if (index + (int)gridDim.x < tiles) next = work_of(a, index + (int)gridDim.x);
        const int last = max(w.rows - 1, 0), steps = max((w.rows + 15) / 16, 1);
        __syncwarp();
        for (int i = lane; i < 16 * steps; i += 32) {
            const int s = w.row0 + min(i, last);
            dev_store_shared(indices + 4 * i, a.p.in_row ? (uint32_t)__ldg(a.p.in_row + s) : (uint32_t)s);
        }
        __syncwarp();
        if (a.kind == PRODUCT_DOWN_BACK) prefetch_gu(a, w, lane, 32);
        for (int k = 0; k < blocks_k; k++, it++) {
            const uint32_t stage = it % R::stages, to = base + stage * R::stage_bytes + 2 * SUBTILE;
            dev_barrier_wait(empty + 8 * stage, (it / R::stages & 1) ^ 1);
            if (k < a.k_blocks) {
                const char *from = (const char *)(a.p.in + k * BLOCK + 8 * piece);
#pragma unroll 4
                for (int i = 0; i < steps; i++) {
                    const uint4 rows = dev_load_shared(indices + 64 * i + 16 * quarter);
                    dev_copy16(to + i * 2048 + place[0], from + (uint64_t)rows.x * row_bytes);
                    dev_copy16(to + i * 2048 + place[1], from + (uint64_t)rows.y * row_bytes);
                    dev_copy16(to + i * 2048 + place[2], from + (uint64_t)rows.z * row_bytes);
                    dev_copy16(to + i * 2048 + place[3], from + (uint64_t)rows.w * row_bytes);
                }
            } else {
                for (int i = lane; i < 16 * steps * pieces; i += 32) {
                    const int row = i / pieces, c = i % pieces;
                    const bool there = 8 * c < a.p.r;
                    const bf16 *from = a.p.low + (int64_t)(w.row0 + min(row, last)) * a.p.r + (there ? 8 * c : 0);
                    dev_copy16_or_zero(to + row * 128 + ((c ^ (row & 7)) << 4), from, there ? 16 : 0);
                }
            }
            dev_copy_arrive(full + 8 * stage);
        }
    }
    dev_copy_wait_all(); /* the block may not end before its copies */
}

/* ---- the products ---- */
/* Until a block is in shared memory, as the tensor cores see it. */
template <bool wide> static __device__ __forceinline__ void await_block(uint32_t barrier, uint32_t parity) {
    dev_barrier_wait(barrier, parity);
    if (!wide) dev_fence_async();
}

template <int n, bool across, bool wide>
static __device__ __forceinline__ void multiply(float (&d)[128], const tile_args &a, uint32_t base, uint32_t &it, int g, int lane) {
    using R = regime<wide>;
    constexpr uint64_t a_step = across ? 128 : 2;
    const uint32_t full = base + R::barriers, empty = full + 8 * R::stages;
    for (int k = 0; k < a.k_blocks; k++, it++) {
        const uint32_t stage = it % R::stages, at = base + stage * R::stage_bytes;
        await_block<wide>(full + 8 * stage, it / R::stages & 1);
        const uint64_t weights = dev_tile(at + g * SUBTILE, 1024), rows = dev_tile(at + 2 * SUBTILE, 1024);
        dev_wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) dev_wgmma<n, across>::run(d, weights + j * a_step, rows + 2 * j, k | j);
        dev_wgmma_commit();
        dev_wgmma_wait<1>();
        if (k > 0 && lane == 0) dev_barrier_arrive(empty + 8 * ((it - 1) % R::stages)); /* the block before is read */
    }
    dev_wgmma_wait<0>();
    if (lane == 0) dev_barrier_arrive(empty + 8 * ((it - 1) % R::stages));
    if (a.low_steps > 0) {
        const uint32_t stage = it % R::stages, at = base + stage * R::stage_bytes;
        await_block<wide>(full + 8 * stage, it / R::stages & 1);
        const uint64_t weights = dev_tile(at + g * SUBTILE, 1024), rows = dev_tile(at + 2 * SUBTILE, 1024);
        for (int j = 0; j < a.low_steps; j++) {
            dev_wgmma_begin();
            dev_wgmma<n, across>::run(d, weights + j * a_step, rows + 2 * j, 1);
            dev_wgmma_commit();
            dev_wgmma_wait<0>();
        }
        if (lane == 0) dev_barrier_arrive(empty + 8 * stage);
        it++;
    }
    dev_wgmma_settle<8 * n>(d);
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
            dev_barrier_init(base + R::barriers + 8 * i, R::arrivals);
            dev_barrier_init(base + R::barriers + 8 * (R::stages + i), 8); /* empty: the warps that multiply */
        }
        dev_fence_async();
    }
    __syncthreads();
    if (warp >= 8) {
        if (wide) dev_registers_shrink<120>();
        if (wide && a.p.w.format == ESP_MXFP4)
            produce<ESP_MXFP4, across>(a, base, warp - 8, lane, tiles);
        else if (wide && a.p.w.format == ESP_Q_NONE)
            produce<ESP_Q_NONE, across>(a, base, warp - 8, lane, tiles);
        else if (wide)
            produce<ESP_NF4, across>(a, base, warp - 8, lane, tiles);
        else if (warp == 8)
            bring_rows(a, base, lane, tiles);
        else if (a.p.w.format == ESP_MXFP4)
            decode<ESP_MXFP4, across>(a, base, warp - 9, lane, tiles);
        else if (a.p.w.format == ESP_Q_NONE)
            decode<ESP_Q_NONE, across>(a, base, warp - 9, lane, tiles);
        else
            decode<ESP_NF4, across>(a, base, warp - 9, lane, tiles);
    } else {
        if (wide) dev_registers_grow<192>();
        const int g = warp / 4;
        uint32_t it = 0;
        work w = work_of(a, (int)blockIdx.x);
        for (int index = (int)blockIdx.x; index < tiles; index += (int)gridDim.x) {
            const work next = index + (int)gridDim.x < tiles ? work_of(a, index + (int)gridDim.x) : w;
            float d[128];
#define MULTIPLY(n)                                                                                                                        \
    case n:                                                                                                                                \
        if (n <= R::steps16) multiply<n <= R::steps16 ? n : 1, across, wide>(d, a, base, it, g, lane);                                     \
        break
            switch (max((w.rows + 15) / 16, 1)) {
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
            finish<across, wide>(d, a, w, base, g, lane);
            w = next;
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
    static_assert(R::shared_bytes <= 232448 && R::producers <= R::stages, "");
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
