/* Products with the packed expert stacks on sm_90a: wgmma multiplies 4-bit weights, which the warps that multiply decode themselves, with the
 * routed rows.
 *
 * D^T tile: 128 outputs (two warpgroups, 64 each) x up to 256 routed rows of one expert, the rows on the N side so that a tile wastes less
 * than 16.  Four more warps bring codes and rows (by their index: the gather is part of the load), ahead by as many k-blocks of 64 as
 * shared memory holds, also across tiles; rows that stand one after the other come in boxes, which one warp asks of the copy engine.
 * Blocks take their tiles from one list, those of experts with many rows first, as they come to bring another.  While the tensor cores are
 * at one k-block, a warpgroup decodes the next one into registers: a forward multiplies from there; a backward, which reads the same
 * records across, writes them into shared memory first.  The low-rank branch is one more, shorter k-block for each 16 ranks.  A warpgroup
 * meets the other one nowhere: while one is storing its results, the other one has the tensor cores.
 *
 * The warps that copy announce their copies on a stage's barrier and the readers order them before wgmma: a fence in the warps that copy
 * would wait for all copies under way. */
#include "kernels/cuda/boxes.cuh"
#include "kernels/cuda/experts_tile.cuh"

#define CONSUMERS 256
#define PRODUCERS 128
#define SHARED_BYTES 232448
#define MOST_STAGES 16
#define TASKS 32 /* more than there are stages, each of which may be of another tile */
#define BOX_ROWS 32

/* Who announces what several threads have read or written and have met over: one of them.  racecheck does not follow such meetings: in a build for
 * it every thread announces for itself. */
#ifdef ESPI_EACH_ANNOUNCES
#define ANNOUNCE_FOR_ALL false
#else
#define ANNOUNCE_FOR_ALL true
#endif
#define BRINGERS_ANNOUNCE (ANNOUNCE_FOR_ALL ? 1 : PRODUCERS)
#define READERS_ANNOUNCE (ANNOUNCE_FOR_ALL ? CONSUMERS / 32 : CONSUMERS)

/* Shared memory: each warpgroup's own sub-tiles (decoded weights of a backward; its results on their way out), barriers, the values of the
 * codes, indices of two tiles' rows, for each warpgroup the weights of two tiles' rows (down_back), and as many stages as there is room for.
 * A stage: rows, then records, plain weights or those of 16 ranks. */
template <int format, product_kind kind> struct form {
    static constexpr bool across = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK, coded = format != ESP_Q_NONE;
    static constexpr bool pairs = kind == PRODUCT_GATE_UP, slopes = kind == PRODUCT_DOWN_BACK; /* what its epilogue makes */
    static constexpr bool gathers = pairs || slopes;                                           /* rows by their index */
    static constexpr bool boxed = coded && !gathers;                                           /* rows by boxes */
    /* of 168 that each thread has at entry */
    static constexpr int consumer_registers = slopes ? 208 : coded ? 200 : 192, producer_registers = 3 * 168 - 2 * consumer_registers;
    static constexpr int record = RECORD_BYTES(format), weights = coded ? 5 * 1024 : 2 * SUBTILE;
    static constexpr int own = across && coded ? 3 * SUBTILE : SUBTILE;
    static constexpr int barriers = 2 * own, turns = barriers + 512, table = barriers + 576, tasks = barriers + 640,
                         indices = barriers + 1024;
    static constexpr int row_weights = indices + 8 * WIDE_ROWS, stages = row_weights + (slopes ? 4096 : 0);
};

struct row_boxes {
    CUtensorMap rows, low;
};

struct ring {
    uint32_t first, stage_bytes, rows_bytes, full, empty;
    int stages, stage, phase;
};

#if DEV_HOPPER
template <int format, product_kind kind> static __device__ __forceinline__ ring make_ring(uint32_t base, int height) {
    using F = form<format, kind>;
    ring r = {};
    r.first = base + F::stages, r.rows_bytes = (uint32_t)height * 128, r.stage_bytes = r.rows_bytes + F::weights;
    r.full = base + F::barriers, r.empty = r.full + 8 * MOST_STAGES;
    r.stages = min((SHARED_BYTES - F::stages) / (int)r.stage_bytes, MOST_STAGES);
    return r;
}

static __device__ __forceinline__ uint32_t stage_of(const ring &r) {
    return r.first + r.stage * r.stage_bytes;
}

static __device__ __forceinline__ void announce(uint32_t barrier, bool for_all) {
    if (for_all || !ANNOUNCE_FOR_ALL) dev_barrier_arrive(barrier);
}

static __device__ __forceinline__ void advance(ring &r) {
    if (++r.stage == r.stages) r.stage = 0, r.phase ^= 1;
}

/* ---- the warps that bring ---- */
/* Queues the indices of a tile's rows as a group of copies of their own. */
static __device__ __forceinline__ void bring_indices(uint32_t to, const tile_args &a, const work &w, int thread) {
    for (int i = thread; i < w.rows; i += PRODUCERS) dev_copy4(to + 4 * i, a.p.in_row + w.row0 + i);
    dev_copy_commit();
}

/* A sub-tile of plain weights, queued by 64 threads; a forward of gate_up takes them as row_place has them. */
template <product_kind kind>
static __device__ __forceinline__ void bring_plain(uint32_t to, const tile_args &a, const work &w, int k, int g, int thread) {
    using F = form<ESP_Q_NONE, kind>;
    const int piece = thread & 7;
    const uint8_t *expert = a.weights + w.expert * a.expert_bytes;
#pragma unroll(F::slopes ? 1 : 4) /* where registers are short */
    for (int line = thread / 8; line < 64; line += 8) {
        int sub = g, row = line;
        if (F::pairs) {
            const int warp = line / 16, v = line / 8 % 2, q = line % 8;
            sub = a.halves ? v : g, row = a.halves ? 32 * g + 8 * warp + q : 16 * warp + 2 * q + v;
        }
        const int block = min(block_of(a, w.m, sub), a.blocks - 1);
        const int64_t rows = (F::across ? k : block) * BLOCK + row, columns = (F::across ? block : k) * BLOCK + 8 * piece;
        dev_copy16(to + line * 128 + ((piece ^ (line & 7)) << 4), expert + rows * a.row_bytes + columns * 2);
    }
}

/* Where a tile's two sub-tiles have their weights of a k-block, or of 16 ranks. */
struct weight_pair {
    const uint8_t *first, *second;
};

static __device__ __forceinline__ weight_pair weight_pair_of(const tile_args &a, const work &w, const uint8_t *expert,
                                                             int64_t block_bytes) {
    return weight_pair{expert + min(block_of(a, w.m, 0), a.blocks - 1) * block_bytes,
                       expert + min(block_of(a, w.m, 1), a.blocks - 1) * block_bytes};
}

static __device__ __forceinline__ weight_pair low_weights_of(const tile_args &a, const work &w) {
    const int64_t bytes = (int64_t)a.low_steps * LOW_BYTES;
    return weight_pair_of(a, w, a.low_weights + w.expert * a.blocks * bytes, bytes);
}

template <typename F> static __device__ __forceinline__ weight_pair records_of(const tile_args &a, const work &w) {
    return weight_pair_of(a, w, a.weights + w.expert * a.expert_bytes, (int64_t)a.block_step * F::record);
}

/* By one thread, which announces that so many bytes are to come, `more` besides. */
static __device__ __forceinline__ void bring_pair(uint32_t to, const weight_pair &from, uint32_t bytes, uint32_t more, uint32_t full) {
    dev_barrier_expect(full, 2 * bytes + more);
    dev_copy_bulk(to, from.first, bytes, full);
    dev_copy_bulk(to + bytes, from.second, bytes, full);
}

static __device__ __forceinline__ void step_on(weight_pair &from, int64_t bytes) {
    from.first += bytes, from.second += bytes;
}

/* Tiles are handed out as blocks come for them.  Who makes a tile changes no bit of it. */
static __device__ __forceinline__ int take_ticket(const tile_args &a) {
    return (int)gridDim.x + (int)atomicAdd(&a.plan[1].x, 1u);
}

/* When there are no more tiles, one without rows. */
static __device__ __forceinline__ uint2 task_of(const tile_args &a, int ticket, int tiles) {
    return ticket < tiles ? packed_work_of(a, ticket) : make_uint2(0, 0);
}

/* The block's tile of that turn. */
static __device__ __forceinline__ uint32_t task_place(uint32_t tasks, int turn) {
    return tasks + 8 * ((uint32_t)turn % TASKS);
}

static __device__ __forceinline__ work task_at(uint32_t tasks, int turn) {
    const uint2 v = dev_load_shared8(task_place(tasks, turn));
    return unpack_work(v.x, v.y);
}

/* By one thread: the block's first two tiles; returns a ticket for the third. */
static __device__ __forceinline__ int open_tasks(uint32_t tasks, const tile_args &a, int tiles) {
    dev_store_shared8(task_place(tasks, 0), packed_work_of(a, dev_block()));
    dev_store_shared8(task_place(tasks, 1), task_of(a, take_ticket(a), tiles));
    return take_ticket(a);
}

template <int format, product_kind kind>
static __device__ __forceinline__ void bring(const tile_args &a, uint32_t base, ring r, int tiles) {
    using F = form<format, kind>;
    const int thread = (int)threadIdx.x - CONSUMERS, piece = thread % 8, line = thread / 8;
    const uint32_t place = line * 128 + ((piece ^ (line & 7)) << 4), row_bytes = (uint32_t)a.k_blocks * BLOCK * 2;
    const int64_t step = (int64_t)a.k_step * F::record;
    uint32_t indices = base + F::indices, other = indices + WIDE_ROWS * 4;
    int ticket = thread == 0 ? open_tasks(base + F::tasks, a, tiles) : tiles;
    if (F::gathers) bring_indices(indices, a, work_of(a, dev_block()), thread);
    for (int turn = 0;; turn++) {
        if (F::gathers) dev_copy_wait<0>(); /* of the rows only those that were queued before the indices */
        dev_meet(3, PRODUCERS);
        const work w = task_at(base + F::tasks, turn);
        if (w.rows == 0) break;
        const uint2 after = task_of(a, ticket, tiles); /* both long before they are wanted */
        if (thread == 0) ticket = take_ticket(a);
        uint32_t rows[16];
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const int row = min(16 * i + line, w.rows - 1);
            rows[i] = F::gathers ? dev_load_shared4(indices + 4 * row) : (uint32_t)(w.row0 + row);
        }
        if (F::gathers) {
            bring_indices(other, a, task_at(base + F::tasks, turn + 1), thread);
            const uint32_t now = indices;
            indices = other, other = now;
        }
        weight_pair records = records_of<F>(a, w), low = low_weights_of(a, w);
        const char *in = (const char *)(a.p.in + 8 * piece);
        for (int k = 0; k < a.k_blocks; k++) {
            const uint32_t to = stage_of(r), full = r.full + 8 * r.stage;
            dev_barrier_wait(r.empty + 8 * r.stage, r.phase ^ 1);
            if (F::coded) {
                if (thread == 0)
                    bring_pair(to + r.rows_bytes, records, F::record, 0, full);
                else
                    announce(full, false);
                step_on(records, step);
            } else {
                bring_plain<kind>(to + r.rows_bytes + thread / 64 * SUBTILE, a, w, k, thread / 64, thread % 64);
                announce(full, thread == 0);
            }
#pragma unroll
            for (int i = 0; i < 16; i++)
                if (16 * i < w.rows) dev_copy16(to + place + 2048 * i, in + (uint64_t)rows[i] * row_bytes);
            dev_copy_arrive(full);
            in += BLOCK * 2;
            advance(r);
        }
        for (int j = 0; j < a.low_steps; j++) {
            const uint32_t to = stage_of(r), full = r.full + 8 * r.stage;
            dev_barrier_wait(r.empty + 8 * r.stage, r.phase ^ 1);
            for (int i = thread; i < (w.rows + 15) / 16 * 32; i += PRODUCERS) {
                const int row = i / 2, at = i % 2, n = 16 * j + 8 * at;
                const bool there = n < a.p.r;
                const bf16 *from = a.p.low + (int64_t)(w.row0 + min(row, w.rows - 1)) * a.p.r + (there ? n : 0);
                dev_copy16_or_zero(to + row * 128 + ((at ^ (row & 7)) << 4), from, there ? 16 : 0);
            }
            if (thread == 0)
                bring_pair(to + r.rows_bytes, low, LOW_BYTES, 0, full);
            else
                announce(full, false);
            dev_copy_arrive(full);
            step_on(low, LOW_BYTES);
            advance(r);
        }
        if (thread == 0) dev_store_shared8(task_place(base + F::tasks, turn + 2), after);
    }
    /* a stage of the tile without rows */
    dev_barrier_wait(r.empty + 8 * r.stage, r.phase ^ 1);
    announce(r.full + 8 * r.stage, thread == 0);
    dev_copy_arrive(r.full + 8 * r.stage);
    dev_copy_wait_all(); /* the block may not end before its copies */
    dev_wait_for_last();
}

/* By one warp: a stage of boxes from column x on, lane i's from row `row` on, and of weights. */
template <uint32_t bytes>
static __device__ __forceinline__ void bring_stage(ring &r, const weight_pair &from, const CUtensorMap *map, int x, int row, int boxes) {
    const int lane = threadIdx.x % 32;
    const uint32_t to = stage_of(r), full = r.full + 8 * r.stage;
    dev_barrier_wait(r.empty + 8 * r.stage, r.phase ^ 1);
    if (lane == 0) bring_pair(to + r.rows_bytes, from, bytes, (uint32_t)(boxes * BOX_ROWS) * 128, full);
    if (lane < boxes) dev_copy_box(to + lane * BOX_ROWS * 128, map, x, row, full);
    advance(r);
}

/* By one warp, whose lanes have a box of rows each. */
template <int format, product_kind kind>
static __device__ __forceinline__ void bring_boxes(const tile_args &a, const row_boxes &maps, uint32_t base, ring r, int tiles) {
    using F = form<format, kind>;
    const int lane = threadIdx.x % 32;
    int ticket = lane == 0 ? open_tasks(base + F::tasks, a, tiles) : tiles;
    for (int turn = 0;; turn++) {
        __syncwarp();
        const work w = task_at(base + F::tasks, turn);
        if (w.rows == 0) break;
        const uint2 after = task_of(a, ticket, tiles);
        if (lane == 0) ticket = take_ticket(a);
        const int boxes = (w.rows + BOX_ROWS - 1) / BOX_ROWS, row = w.row0 + lane * BOX_ROWS;
        weight_pair records = records_of<F>(a, w), low = low_weights_of(a, w);
        for (int k = 0; k < a.k_blocks; k++, step_on(records, (int64_t)a.k_step * F::record))
            bring_stage<F::record>(r, records, &maps.rows, k * BLOCK, row, boxes);
        for (int j = 0; j < a.low_steps; j++, step_on(low, LOW_BYTES)) bring_stage<LOW_BYTES>(r, low, &maps.low, 16 * j, row, boxes);
        if (lane == 0) dev_store_shared8(task_place(base + F::tasks, turn + 2), after);
    }
    dev_barrier_wait(r.empty + 8 * r.stage, r.phase ^ 1);
    if (lane == 0) dev_barrier_arrive(r.full + 8 * r.stage); /* a stage of the tile without rows */
    dev_wait_for_last();
}

/* ---- the warps that multiply ---- */
/* Where a lane's two rows of weights (v = 0, 1: rows 8 v + lane / 4 of the warp's 16) stand: in the sub-tiles `sub`, rows `row`.  gate_up takes
 * gates and ups for v, so that a warpgroup has both of its 32 pairs. */
struct lane_rows {
    int sub[2], row[2];
};

template <product_kind kind> static __device__ __forceinline__ lane_rows row_place(const tile_args &a, int g, int warp, int lane) {
    using F = form<ESP_NF4, kind>;
    lane_rows at;
    const int q = lane / 4;
#pragma unroll
    for (int v = 0; v < 2; v++) {
        at.sub[v] = g, at.row[v] = 16 * warp + 8 * v + q;
        if (F::pairs) {
            if (a.halves) at.sub[v] = v;
            at.row[v] = a.halves ? 32 * g + 8 * warp + q : 16 * warp + 2 * q + v;
        }
    }
    return at;
}

/* Half a k-block from registers, queued; the half before is read when it returns. */
template <int n> static __device__ __forceinline__ void multiply_half(float (&d)[128], const uint32_t (&a)[8], uint32_t rows, int keep) {
    dev_wgmma_begin();
    dev_wgmma<n, 0>::run(d, a, rows, keep);
    dev_wgmma<n, 0>::run(d, a + 4, rows + 2, 1);
    dev_wgmma_commit();
    dev_wgmma_wait<1>();
}

/* The k-blocks of a forward: while the tensor cores are at one half, the next one is decoded.  ptxas keeps products in flight side by side only
 * if none is across the loop's end: there the first half of the next k-block is ready to go. */
template <int n, int format>
static __device__ __forceinline__ void multiply_forward(float (&d)[128], const tile_args &a, ring &r, const code_places &at,
                                                        const float (&values)[4]) {
    const int lane = threadIdx.x % 32;
    uint32_t first[8], second[8], ahead[8];
    lane_codes codes, next;
    dev_barrier_wait(r.full + 8 * r.stage, r.phase);
    load_codes<format>(codes, stage_of(r) + r.rows_bytes, at, values);
    decode_fragments<format>(first, codes, 0);
#pragma unroll 1
    for (int k = 0; k + 1 < a.k_blocks; k++) {
        const uint32_t rows = dev_tile_low(stage_of(r));
        const uint32_t empty = r.empty + 8 * r.stage;
        dev_fence_async();
        multiply_half<n>(d, first, rows, k);
        decode_fragments<format>(second, codes, 1);
        multiply_half<n>(d, second, rows + 4, 1);
        advance(r);
        dev_barrier_wait(r.full + 8 * r.stage, r.phase);
        load_codes<format>(next, stage_of(r) + r.rows_bytes, at, values);
        decode_fragments<format>(ahead, next, 0);
        dev_pin(ahead);
        dev_wgmma_wait<0>();
        announce(empty, lane == 0);
        codes = next;
#pragma unroll
        for (int i = 0; i < 8; i++) first[i] = ahead[i];
    }
    const uint32_t rows = dev_tile_low(stage_of(r));
    dev_fence_async();
    multiply_half<n>(d, first, rows, a.k_blocks > 1);
    decode_fragments<format>(second, codes, 1);
    multiply_half<n>(d, second, rows + 4, 1);
    dev_wgmma_wait<0>();
    announce(r.empty + 8 * r.stage, lane == 0);
    advance(r);
}

/* What a warpgroup's epilogue of down_back will read. */
static __device__ __forceinline__ void prefetch_gu(const tile_args &a, const work &w, int g) {
    const int block = block_of(a, w.m, g), width = (int)a.p.width;
    const int first = a.p.glu.interleaved ? 2 * block * BLOCK : block * BLOCK, second = a.p.glu.interleaved ? first + BLOCK : first + width;
    for (int i = (int)threadIdx.x % 128; i < w.rows && block < a.blocks; i += 128) {
        const bf16 *row = a.p.gu + (int64_t)(w.row0 + i) * 2 * width;
        dev_prefetch_l2(row + first), dev_prefetch_l2(row + second);
    }
}

/* Of plain weights the k-blocks, from shared memory. */
template <int n, int format, product_kind kind>
static __device__ __forceinline__ void multiply_plain(float (&d)[128], const tile_args &a, const work &w, ring &r, int g) {
    using F = form<format, kind>;
    const int lane = threadIdx.x % 32;
    int before = 0;
#pragma unroll 1
    for (int k = 0; k < a.k_blocks; k++) {
        const uint32_t rows = stage_of(r), left = dev_tile_low(rows + r.rows_bytes + g * SUBTILE), right = dev_tile_low(rows);
        if (F::slopes && k == max(a.k_blocks - 6, 0)) prefetch_gu(a, w, g);
        dev_barrier_wait(r.full + 8 * r.stage, r.phase);
        dev_fence_async();
        dev_wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) dev_wgmma<n, F::across>::run(d, left + j * (F::across ? 128 : 2), right + 2 * j, k | j);
        dev_wgmma_commit();
        dev_wgmma_wait<1>();
        if (k > 0) announce(r.empty + 8 * before, lane == 0); /* the block before is read */
        before = r.stage;
        advance(r);
    }
    dev_wgmma_wait<0>();
    announce(r.empty + 8 * before, lane == 0);
}

/* What a lane decodes of a k-block in a backward: 32 columns of one row.  The lane 16 further on has the row's other columns: each makes half
 * of the scale's products, and has its own half first. */
struct line_codes {
    uint4 q;
    uint32_t scale;
};

template <int format> static __device__ __forceinline__ void load_line(line_codes &c, uint32_t record, int row, int half) {
    c.q = dev_load_shared(record + half * 1024 + row * 16);
    c.scale = format == ESP_MXFP4 ? dev_load_shared2(record + RECORD_CODES + 2 * row) >> 8 * half & 255u
                                  : dev_load_shared4(record + RECORD_CODES + 4 * row);
}

static __device__ __forceinline__ byte_planes line_planes(uint32_t scale, uint32_t table, int half) {
    const float absmax = __uint_as_float(scale);
    byte_planes p;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 v = dev_load_shared(table + 32 * half + 16 * i);
        const uint32_t a = dev_bf16x2(__uint_as_float(v.x) * absmax, __uint_as_float(v.y) * absmax);
        const uint32_t b = dev_bf16x2(__uint_as_float(v.z) * absmax, __uint_as_float(v.w) * absmax);
        p.low[i] = dev_prmt(a, b, 0x6420u), p.high[i] = dev_prmt(a, b, 0x7531u);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) p.low[2 + i] = __shfl_xor_sync(~0u, p.low[i], 16), p.high[2 + i] = __shfl_xor_sync(~0u, p.high[i], 16);
    return p;
}

/* The k-blocks of a backward, by way of shared memory. */
template <int n, int format, product_kind kind>
static __device__ __forceinline__ void multiply_back(float (&d)[128], const tile_args &a, const work &w, uint32_t base, ring &r, int g) {
    using F = form<format, kind>;
    const int lane = threadIdx.x % 32, row = (int)(threadIdx.x / 32) % 4 * 16 + lane % 16, half = lane / 16;
    const uint32_t own = base + g * F::own, records = r.rows_bytes + g * F::record, order = half ? 0x76547654u : 0x32103210u;
    uint32_t buffer = own + SUBTILE; /* the last tile's results may still be in the first one */
    int before = 0;
    line_codes codes;
    dev_barrier_wait(r.full + 8 * r.stage, r.phase);
    load_line<format>(codes, stage_of(r) + records, row, half);
#pragma unroll 1
    for (int k = 0; k < a.k_blocks; k++) {
        const int stage = r.stage;
        const uint32_t left = dev_tile_low(buffer), right = dev_tile_low(stage_of(r));
        if (F::slopes && k == max(a.k_blocks - 6, 0)) prefetch_gu(a, w, g); /* earlier, and it would be gone again when it is wanted */
        uint4 values[4];
        byte_planes planes;
        if (format != ESP_MXFP4) planes = line_planes(codes.scale, base + F::table, half);
        decode_words<format>(values, codes.q, codes.scale, planes, order);
        store_half(buffer, row, half, values);
        buffer = buffer == own + 2 * SUBTILE ? own : buffer + SUBTILE;
        dev_fence_async();
        dev_meet(1 + g, 128);
        dev_wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) dev_wgmma<n, 1>::run(d, left + j * 128, right + 2 * j, k | j);
        dev_wgmma_commit();
        advance(r);
        if (k + 1 < a.k_blocks) {
            dev_barrier_wait(r.full + 8 * r.stage, r.phase);
            load_line<format>(codes, stage_of(r) + records, row, half);
        }
        dev_wgmma_wait<1>();
        if (k > 0) announce(r.empty + 8 * before, lane == 0); /* the block before is read */
        before = stage;
    }
    dev_wgmma_wait<0>();
    announce(r.empty + 8 * before, lane == 0);
}

template <int n, int format, product_kind kind>
static __device__ __forceinline__ void multiply(float (&d)[128], const tile_args &a, const work &w, uint32_t base, ring &r, int g,
                                                const lane_rows &rows, const code_places &at, const float (&values)[4]) {
    using F = form<format, kind>;
    const int lane = threadIdx.x % 32;
    if constexpr (!F::coded)
        multiply_plain<n, format, kind>(d, a, w, r, g);
    else if constexpr (F::across)
        multiply_back<n, format, kind>(d, a, w, base, r, g);
    else
        multiply_forward<n, format>(d, a, r, at, values);
#pragma unroll 1
    for (int j = 0; j < a.low_steps; j++) {
        dev_barrier_wait(r.full + 8 * r.stage, r.phase);
        dev_fence_async();
        const uint32_t weights = stage_of(r) + r.rows_bytes;
        const uint32_t right = dev_tile_low(stage_of(r));
        uint32_t low[4];
#pragma unroll
        for (int i = 0; i < 4 && !F::across; i++)
            low[i] = dev_load_shared4(weights + rows.sub[i % 2] * LOW_BYTES + rows.row[i % 2] * 32 + i / 2 * 16 + lane % 4 * 4);
        dev_wgmma_begin();
        if (F::across)
            dev_wgmma<n, F::across>::run(d, dev_tile_low(weights + g * LOW_BYTES), right, 1);
        else
            dev_wgmma<n, F::across>::run(d, low, right, 1);
        dev_wgmma_commit();
        dev_wgmma_wait<0>();
        announce(r.empty + 8 * r.stage, lane == 0);
        advance(r);
    }
    dev_wgmma_settle<8 * n>(d);
}

/* Rows 64 chunk .. of a warpgroup's 32 pairs, from its staging: gates, then ups. */
static __device__ __forceinline__ void finish_pairs(const tile_args &a, const work &w, uint32_t staging, int g, int thread, int chunk) {
#pragma unroll
    for (int i = thread; i < 256; i += 128) {
        const int row = i / 4, c = i % 4;
        if (64 * chunk + row >= w.rows) continue;
        const gate_up_words v =
            split_gate_up(dev_load_shared(staged(staging, row, c)), dev_load_shared(staged(staging, row, 4 + c)), false);
        store_gate_up(a, w.row0 + 64 * chunk + row, w.m * BLOCK + 32 * g + 8 * c, v);
    }
}

/* Turns D^T into rows of 64 outputs by way of shared memory, 64 routed rows at a time. */
template <product_kind kind>
static __device__ __forceinline__ void finish(float (&d)[128], const tile_args &a, const work &w, uint32_t own, uint32_t row_weights, int g,
                                              const lane_rows &rows) {
    using F = form<ESP_NF4, kind>;
    const int warp = (int)(threadIdx.x / 32) % 4, lane = threadIdx.x % 32, block = block_of(a, w.m, g);
    const int piece = F::pairs ? warp + lane / 8 % 2 * 4 : 2 * warp + lane / 8 % 2;
    const bool there = F::pairs || block < a.blocks;
    float bias[2] = {};
    if (F::slopes) dev_copy_wait_all(); /* the rows' weights */
    if (!F::across && a.p.bias && there)
#pragma unroll
        for (int v = 0; v < 2; v++)
            bias[v] = __ldg(a.p.bias + ((int64_t)w.expert * a.blocks + block_of(a, w.m, rows.sub[v])) * BLOCK + rows.row[v]);
#pragma unroll
    for (int chunk = 0; chunk < WIDE_ROWS / 64; chunk++) {
        if (64 * chunk < w.rows) {
            const bool back = F::slopes && there;
            const int thread = dev_opaque((int)threadIdx.x % 128); /* or the places of all chunks would be in registers at once */
            gu_row gu[2];
            if (back && chunk > 0) load_gu(gu[0], a, w, block, thread, chunk, 0);
            dev_meet(1 + g, 128); /* the staging is read */
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float *v = d + 32 * chunk + 8 * i;
                dev_stmatrix_trans(staged(own, 16 * i + lane / 16 * 8 + lane % 8, piece), dev_bf16x2(v[0] + bias[0], v[1] + bias[0]),
                                   dev_bf16x2(v[2] + bias[1], v[3] + bias[1]), dev_bf16x2(v[4] + bias[0], v[5] + bias[0]),
                                   dev_bf16x2(v[6] + bias[1], v[7] + bias[1]));
            }
            if (back && chunk == 0) load_gu(gu[0], a, w, block, thread, chunk, 0); /* in the place of sums that are stored */
            dev_meet(1 + g, 128);
            if (F::pairs)
                finish_pairs(a, w, own, g, thread, chunk);
            else if (back)
#pragma unroll 1
                for (int i = 0; i < 4; i += 2) {
                    load_gu(gu[1], a, w, block, thread, chunk, i + 1);
                    finish_down_back(a, w, own, row_weights, block, thread, chunk, i, gu[0]);
                    load_gu(gu[0], a, w, block, thread, chunk, (i + 2) % 4);
                    finish_down_back(a, w, own, row_weights, block, thread, chunk, i + 1, gu[1]);
                }
            else if (there)
                finish_rows(a, w, own, block, thread, chunk);
        }
    }
}
#endif

template <int format, product_kind kind>
static __global__ __launch_bounds__(CONSUMERS + PRODUCERS, 1) void product_wgmma_kernel(const __grid_constant__ tile_args a,
                                                                                        const __grid_constant__ row_boxes maps) {
#if DEV_HOPPER
    using F = form<format, kind>;
    extern __shared__ __align__(1024) uint8_t shared[];
    const uint2 plan = __ldg(a.plan);
    const int tiles = (int)plan.x;
    if ((int)blockIdx.x >= tiles) {
        dev_wait_for_last();
        return;
    }
    const uint32_t base = dev_shared(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        const ring r = make_ring<format, kind>(base, (int)plan.y);
        for (int i = 0; i < r.stages; i++) {
            /* every one's copies, and what is stored or the records; or what the copy engine brings */
            dev_barrier_init(r.full + 8 * i, F::boxed ? 1 : PRODUCERS + BRINGERS_ANNOUNCE);
            dev_barrier_init(r.empty + 8 * i, READERS_ANNOUNCE);
        }
        for (int g = 0; g < 2; g++) dev_store_shared(base + F::turns + 4 * g, 0u);
        for (int i = 0; i < 16 && format == ESP_NF4; i++) dev_store_shared(base + F::table + 4 * i, __float_as_uint(a.p.w.lut[i]));
        dev_fence_async();
    }
    __syncthreads();
    if (warp >= CONSUMERS / 32) {
        dev_registers_shrink<F::producer_registers>();
        if constexpr (!F::boxed)
            bring<format, kind>(a, base, make_ring<format, kind>(base, (int)plan.y), tiles);
        else if (warp == CONSUMERS / 32)
            bring_boxes<format, kind>(a, maps, base, make_ring<format, kind>(base, (int)plan.y), tiles);
    } else {
        dev_registers_grow<F::consumer_registers>();
        ring r = make_ring<format, kind>(base, (int)plan.y);
        const int g = warp / 4;
        const lane_rows rows = row_place<kind>(a, g, warp % 4, lane);
        code_places at;
        float values[4];
#pragma unroll
        for (int v = 0; v < 2; v++) {
            at.code[v] = rows.sub[v] * F::record + rows.row[v] * 16 + lane % 4 * 4;
            at.scale[v] = rows.sub[v] * F::record + RECORD_CODES + rows.row[v] * (format == ESP_MXFP4 ? 2 : 4);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) values[i] = format == ESP_NF4 && !F::across ? __ldg(a.p.w.lut + lane % 4 * 4 + i) : 0;
        for (;;) {
            /* kept in shared memory: the compiler would put it on the stack */
            const int turn = (int)dev_load_shared4(base + F::turns + 4 * g);
            dev_barrier_wait(r.full + 8 * r.stage, r.phase);
            const work w = task_at(base + F::tasks, turn);
            if (w.rows == 0) break;
            const uint32_t row_weights = base + F::row_weights + 2048 * g + turn % 2 * 1024; /* the last tile's may still be read */
            if (F::slopes)
                for (int i = (int)threadIdx.x % 128; i < w.rows; i += 128)
                    dev_copy4(row_weights + 4 * i, (const float *)a.p.routing.row_weight + w.row0 + i);
            float d[128];
#define MULTIPLY(n)                                                                                                                        \
    case n:                                                                                                                                \
        multiply<n, format, kind>(d, a, w, base, r, g, rows, at, values);                                                                  \
        break
            int steps = (w.rows + 15) / 16;
            if (steps == 5 || steps == 7) steps++;
            switch (steps) {
                MULTIPLY(1);
                MULTIPLY(2);
                MULTIPLY(3);
                MULTIPLY(4);
                MULTIPLY(6);
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
            dev_meet(1 + g, 128); /* all have read it, and are through with the shared memory of their own */
            if (threadIdx.x % 128 == 0) dev_store_shared(base + F::turns + 4 * g, (uint32_t)turn + 1);
            /* the tile is looked up again: beside the sums no registers are to spare */
            finish<kind>(d, a, task_at(base + F::tasks, turn), base + g * F::own, row_weights, g, rows);
        }
    }
#endif
}

/* Built for other targets the kernel is empty: it has no registers to speak of. */
bool wgmma_available() {
    cudaFuncAttributes attributes;
    const bool known = cudaFuncGetAttributes(&attributes, product_wgmma_kernel<ESP_NF4, PRODUCT_DOWN>) == cudaSuccess;
    if (!known) (void)cudaGetLastError();
    return known && attributes.binaryVersion == 90 && attributes.numRegs > 64;
}

template <int format, product_kind kind> static cudaError_t launch(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    const int64_t rows = a.p.routing.tokens * a.p.routing.top_k;
    row_boxes maps = {};
    cudaError_t error = cudaFuncSetAttribute(product_wgmma_kernel<format, kind>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (error == cudaSuccess && form<format, kind>::boxed) {
        error = make_boxes(&maps.rows, a.p.in, rows, (int64_t)a.k_blocks * BLOCK, BOX_ROWS);
        if (error == cudaSuccess && a.low_steps) error = make_boxes(&maps.low, a.p.low, rows, a.p.r, BOX_ROWS);
    }
    if (error != cudaSuccess) return error;
    return launch_beside(product_wgmma_kernel<format, kind>, a, multiprocessors, CONSUMERS + PRODUCERS, SHARED_BYTES, stream, maps);
}

template <int format> static cudaError_t launch_kind(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    return with_kind(a.kind, [&](auto constant) { return launch<format, decltype(constant)::value>(a, multiprocessors, stream); });
}

cudaError_t launch_wgmma(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    if (a.p.w.format == ESP_MXFP4) return launch_kind<ESP_MXFP4>(a, multiprocessors, stream);
    if (a.p.w.format == ESP_Q_NONE) return launch_kind<ESP_Q_NONE>(a, multiprocessors, stream);
    return launch_kind<ESP_NF4>(a, multiprocessors, stream);
}
