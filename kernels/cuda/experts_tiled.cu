/* Products with whole tiles of the expert stacks: which cases they take, the plan of the tiles, which the device makes from the counts, and
 * the kernel that walks it. */
#include "kernels/cuda/experts_tile.cuh"

#include <limits.h>

#define FEW_MEAN_ROWS 8   /* mean rows per expert of the batch up to which all are experts_few.cu's */
#define MANY_MEAN_ROWS 96 /* and beyond which none is */
#define LOW_MEAN_ROWS 64  /* mean rows per expert with tiles up to which the lower ones are made */

/* ---- the plan, of the experts with more than few_rows: those with the most rows first, their rows cut into even tiles; of an expert all rows
 * for one m after the other ---- */
#define PLAN_THREADS 512
#define PLAN_BLOCKS 16

/* 16 bytes of a.low_weights: eight ranks of an output, or across eight outputs of a rank; zero past the rank. */
static __device__ __forceinline__ void round_low(const tile_args &a, bool across, int64_t place) {
    const int64_t outs = (int64_t)a.blocks * BLOCK, r = a.p.r, part = place / (LOW_BYTES / 16);
    const int64_t expert = part / a.low_steps / a.blocks;
    const int i = (int)(place % (LOW_BYTES / 16)), j = (int)(part % a.low_steps), block = (int)(part / a.low_steps % a.blocks);
    const int line = across ? i / 8 : i / 2, piece = across ? i % 8 : i % 2, n = across ? 16 * j + line : 16 * j + 8 * piece;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (n < r)
        v = scaled8(across ? a.p.up + (expert * r + n) * outs + block * BLOCK + 8 * piece
                           : a.p.up + (expert * outs + block * BLOCK + line) * r + n,
                    a.p.factor);
    *(uint4 *)(a.low_weights + part * LOW_BYTES + (across ? line * 128 + ((piece ^ (line & 7)) << 4) : line * 32 + 16 * piece)) = v;
}

/* The first PLAN_BLOCKS blocks make the plan, the others a.low_weights, which are `places` times 16 bytes. */
static __global__ __launch_bounds__(PLAN_THREADS) void plan_tiles(const __grid_constant__ tile_args a, bool across, int64_t places,
                                                                  int low_height, int high_height) {
    extern __shared__ int rows_of[];
    dev_let_next_begin();
    if (blockIdx.x >= PLAN_BLOCKS) {
        for (int64_t place = (int64_t)(blockIdx.x - PLAN_BLOCKS) * PLAN_THREADS + threadIdx.x; place < places;
             place += (int64_t)(gridDim.x - PLAN_BLOCKS) * PLAN_THREADS)
            round_low(a, across, place);
        return;
    }
    const int32_t *offsets = a.p.routing.offsets;
    const int experts = (int)a.p.routing.experts, few_rows = a.few_rows;
    int active = 0;
    for (int first = 0; first < experts; first += PLAN_THREADS) {
        const int e = first + (int)threadIdx.x, all = e < experts ? offsets[e + 1] - offsets[e] : 0, rows = all > few_rows ? all : 0;
        if (e < experts) rows_of[e] = rows;
        active += __syncthreads_count(rows > 0);
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int total = 0, tiled = 0;
    for (int e = lane; e < experts; e += 32) tiled += rows_of[e];
    const int height = espi_warp_sum(tiled) <= active * LOW_MEAN_ROWS ? low_height : high_height;
    /* a warp per expert: how many tiles stand before its own */
    for (int e = (int)blockIdx.x * (PLAN_THREADS / 32) + warp; e < experts; e += PLAN_BLOCKS * (PLAN_THREADS / 32)) {
        const int rows = rows_of[e], tiles = (rows + height - 1) / height;
        int before = 0;
        for (int other = lane; other < experts; other += 32)
            if (rows_of[other] > rows || (rows_of[other] == rows && other < e)) before += (rows_of[other] + height - 1) / height;
        before = espi_warp_sum(before);
        const int even = tiles ? ((rows + tiles - 1) / tiles + 15) / 16 * 16 : 0, begin = offsets[e];
        for (int i = lane; i < tiles * a.tiles_m; i += 32) {
            const int m = i / tiles, skipped = i % tiles * even, left = max(min(even, rows - skipped), 0);
            a.plan[2 + before * a.tiles_m + i] = pack_work({e, m, begin + (left ? skipped : 0), left});
        }
    }
    if (blockIdx.x == 0 && warp == 0) {
        for (int e = lane; e < experts; e += 32) total += (rows_of[e] + height - 1) / height;
        total = espi_warp_sum(total);
        if (lane == 0) a.plan[0] = make_uint2((uint32_t)(total * a.tiles_m), (uint32_t)height), a.plan[1] = make_uint2(0, 0);
    }
}

/* One thread per routed row: the shares of the blocks, in order. */
static __global__ void sum_shares(float *d_row_weight, const float *partial, const int32_t *offsets, int experts, int blocks) {
    const int64_t s = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (s >= offsets[experts]) return;
    float sum = 0;
    for (int i = 0; i < blocks; i++) sum += partial[s * blocks + i];
    d_row_weight[s] = sum;
}

#define STRING2(x) #x
#define STRING(x) STRING2(x)

#define FEW_DESCRIBED                                                                                                                      \
    "4 bits, experts of up to " STRING(FEW_ROWS) " rows where the mean is up to " STRING(                                                  \
        MANY_MEAN_ROWS) ", all where it is up to " STRING(FEW_MEAN_ROWS) ": mma.sync from registers; else "

const char *product_tiled_describe() {
    return wgmma_available() ? FEW_DESCRIBED "wgmma: tiles of up to " STRING(MIDDLE_ROWS) " rows up to a mean of " STRING(
                                   LOW_MEAN_ROWS) " rows per expert, of " STRING(WIDE_ROWS) " above"
                             : FEW_DESCRIBED "mma.sync: tiles of " STRING(NARROW_ROWS) " rows";
}

const char *product_tiled_refusal(const espi_stack *w, const espi_lora *lora, const espi_routing *routing, product_kind kind) {
    const int64_t width = kind == PRODUCT_GATE_UP ? w->rows / 2 : w->cols;
    if (w->rows % BLOCK || w->cols % BLOCK || width % BLOCK) return "rows, columns or width of the experts are not multiples of 64";
    if (w->format == ESP_Q_NONE) {
        if (w->dtype != ESP_BF16) return "plain experts are not bf16";
    } else if (!w->packed) {
        return "4-bit experts are not packed";
    }
    if (lora->r % 8 || lora->r > BLOCK) return "the rank is not a multiple of 8 up to 64";
    if (routing->experts > 8192) return "more than 8192 experts";
    if (w->rows > 128 * UINT16_MAX || w->cols > 128 * UINT16_MAX) return "more outputs than tile numbers";
    if (routing->tokens * routing->top_k > INT32_MAX / 1024) return "more routed rows than tile numbers";
    return NULL;
}

/* Pairs of 64 outputs. */
static int tiles_m_of(const product_args *p, product_kind kind) {
    const int64_t outs = kind == PRODUCT_GATE_UP || kind == PRODUCT_DOWN ? p->w.rows : p->w.cols;
    return (int)((outs / BLOCK + 1) / 2);
}

static size_t plan_bytes(const product_args *p, product_kind kind) {
    return (size_t)(2 + (int64_t)tile_bound(&p->routing, NARROW_ROWS) * tiles_m_of(p, kind)) * sizeof(uint2);
}

static size_t shares_bytes(const product_args *p, product_kind kind) {
    return kind == PRODUCT_DOWN_BACK ? (size_t)(p->routing.tokens * p->routing.top_k * (p->width / BLOCK)) * sizeof(float) : 0;
}

static size_t low_weights_bytes(const product_args *p, product_kind kind) {
    const int64_t outs = kind == PRODUCT_GATE_UP || kind == PRODUCT_DOWN ? p->w.rows : p->w.cols;
    return (size_t)(p->routing.experts * (outs / BLOCK) * ((p->r + 15) / 16)) * LOW_BYTES;
}

size_t product_tiled_scratch(const product_args *p, product_kind kind) {
    return rounded(plan_bytes(p, kind)) + rounded(shares_bytes(p, kind)) + low_weights_bytes(p, kind);
}

/* Up to how many rows an expert is experts_few.cu's.  Which are, the kernels find on the device, each expert by its own rows.  Where the batch has
 * few or many rows in the mean, one of the kernels would have next to nothing to do: it is not launched.  Both are alike for one rank and for
 * ranks that share the experts. */
static int few_rows_of(const product_args *p) {
    if (p->w.format == ESP_Q_NONE || p->routing.experts > FEW_EXPERTS) return 0;
    if (espi_routing_is_few(&p->routing, FEW_MEAN_ROWS)) return INT_MAX;
    return espi_routing_is_few(&p->routing, MANY_MEAN_ROWS) ? FEW_ROWS : 0;
}

/* The plan, what has few rows, and the tiles, whose blocks begin as the multiprocessors are through with few rows: those with the most rows come
 * first, so who is late has less to do. */
static cudaError_t launch_all(tile_args a, bool back, int multiprocessors, cudaStream_t stream) {
    const bool hopper = wgmma_available();
    if (a.p.routing.tokens <= a.few_rows) return launch_few(a, multiprocessors, stream); /* no expert has more rows */
    const int64_t places = hopper ? a.p.routing.experts * a.blocks * a.low_steps * (LOW_BYTES / 16) : 0;
    const int64_t rounding = places / PLAN_THREADS < 4 * multiprocessors ? (places + PLAN_THREADS - 1) / PLAN_THREADS : 4 * multiprocessors;
    plan_tiles<<<PLAN_BLOCKS + (unsigned)rounding, PLAN_THREADS, (size_t)(a.p.routing.experts + 4) * sizeof(int), stream>>>(
        a, back, places, hopper ? MIDDLE_ROWS : NARROW_ROWS, hopper ? WIDE_ROWS : NARROW_ROWS);
    a.beside = hopper && a.few_rows > 0;
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess && a.few_rows > 0) error = launch_few(a, multiprocessors, stream);
    if (error != cudaSuccess) return error;
    return hopper ? launch_wgmma(a, multiprocessors, stream) : launch_mma(a, back, multiprocessors, stream);
}

cudaError_t product_tiled(const product_args *p, product_kind kind, void *scratch, int multiprocessors, cudaStream_t stream) {
    const bool back = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK;
    const int row_blocks = (int)(p->w.rows / BLOCK), column_blocks = (int)(p->w.cols / BLOCK);
    tile_args a = {};
    a.p = *p;
    a.plan = (uint2 *)scratch;
    a.partial = (float *)((char *)scratch + rounded(plan_bytes(p, kind)));
    a.low_weights = (uint8_t *)a.partial + rounded(shares_bytes(p, kind));
    a.weights = (const uint8_t *)(p->w.format == ESP_Q_NONE ? p->w.data : p->w.packed);
    a.row_bytes = p->w.cols * 2;
    a.expert_bytes = p->w.format == ESP_Q_NONE ? p->w.rows * a.row_bytes : (int64_t)row_blocks * column_blocks * RECORD_BYTES(p->w.format);
    a.block_step = back ? 1 : column_blocks;
    a.k_step = back ? column_blocks : 1;
    a.k_blocks = back ? row_blocks : column_blocks;
    a.blocks = back ? column_blocks : row_blocks;
    a.tiles_m = tiles_m_of(p, kind);
    a.low_steps = (p->r + 15) / 16;
    a.kind = kind;
    a.halves = kind == PRODUCT_GATE_UP && !p->glu.interleaved;
    a.tiles_few = (a.blocks + 3) / 4;
    a.few_rows = few_rows_of(p);
    const cudaError_t error = launch_all(a, back, multiprocessors, stream);
    if (error != cudaSuccess || kind != PRODUCT_DOWN_BACK) return error;
    const unsigned rows = (unsigned)(p->routing.tokens * p->routing.top_k);
    sum_shares<<<(rows + 255) / 256, 256, 0, stream>>>(p->d_row_weight, a.partial, p->routing.offsets, (int)p->routing.experts, a.blocks);
    return cudaGetLastError();
}
