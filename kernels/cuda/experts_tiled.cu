/* Products with whole tiles of the expert stacks: which cases they take, the plan of the tiles, which the device makes from the counts, and
 * the kernel that walks it. */
#include "kernels/cuda/experts_tile.cuh"

#include <cudaTypedefs.h>

#define NARROW_MEAN_ROWS 96 /* mean rows per expert up to which the narrow regime runs */

/* ---- the plan: experts with the most rows first, their rows cut into even tiles; of an expert all rows for one m after the other ---- */
#define PLAN_THREADS 512
#define PLAN_BLOCKS 16

static __global__ __launch_bounds__(PLAN_THREADS) void plan_tiles(uint2 *plan, const int32_t *offsets, int experts, int tiles_m,
                                                                  int narrow_rows) {
    extern __shared__ int rows_of[];
    int active = 0;
    for (int first = 0; first < experts; first += PLAN_THREADS) {
        const int e = first + (int)threadIdx.x, rows = e < experts ? offsets[e + 1] - offsets[e] : 0;
        if (e < experts) rows_of[e] = rows;
        active += __syncthreads_count(rows > 0);
    }
    const bool narrow = offsets[experts] <= (int64_t)active * narrow_rows;
    const int height = narrow ? NARROW_ROWS : WIDE_ROWS, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int total = 0;
    /* a warp per expert: how many tiles stand before its own */
    for (int e = (int)blockIdx.x * (PLAN_THREADS / 32) + warp; e < experts; e += PLAN_BLOCKS * (PLAN_THREADS / 32)) {
        const int rows = rows_of[e], tiles = (rows + height - 1) / height;
        int before = 0;
        for (int other = lane; other < experts; other += 32)
            if (rows_of[other] > rows || (rows_of[other] == rows && other < e)) before += (rows_of[other] + height - 1) / height;
        for (int step = 16; step; step /= 2) before += __shfl_xor_sync(~0u, before, step);
        const int even = tiles ? ((rows + tiles - 1) / tiles + 15) / 16 * 16 : 0, begin = offsets[e];
        for (int i = lane; i < tiles * tiles_m; i += 32) {
            const int m = i / tiles, skipped = i % tiles * even, left = max(min(even, rows - skipped), 0);
            plan[1 + before * tiles_m + i] = pack_work({e, m, begin + (left ? skipped : 0), left});
        }
    }
    if (blockIdx.x == 0 && warp == 0) {
        for (int e = lane; e < experts; e += 32) total += (rows_of[e] + height - 1) / height;
        for (int step = 16; step; step /= 2) total += __shfl_xor_sync(~0u, total, step);
        if (lane == 0) plan[0] = make_uint2(narrow ? 0 : total * tiles_m, narrow ? total * tiles_m : 0);
    }
}

/* Rows of `in` in the routed order, for the wide regime. */
static __global__ void gather_rows(uint4 *out, const uint4 *in, const int32_t *in_row, const int32_t *offsets, int experts, int pieces,
                                   const uint2 *plan) {
    const int64_t s = (int64_t)blockIdx.x * blockDim.y + threadIdx.y;
    if (plan[0].x == 0 || s >= offsets[experts]) return;
    const uint4 *from = in + (int64_t)in_row[s] * pieces;
    for (int i = threadIdx.x; i < pieces; i += blockDim.x) out[s * pieces + i] = __ldg(from + i);
}

/* The copy engine's view of rows x columns bf16: boxes of 128, 64, 32 and 16 rows x 64 columns, swizzled as the tiles are. */
static cudaError_t make_boxes(CUtensorMap (&boxes)[4], const bf16 *in, int64_t rows, int64_t columns) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode;
    if (!encode) {
        void *entry = NULL;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) return error != cudaSuccess ? error : cudaErrorNotSupported;
        encode = (PFN_cuTensorMapEncodeTiled_v12000)entry;
    }
    const cuuint64_t sizes[2] = {(cuuint64_t)columns, (cuuint64_t)rows}, strides[1] = {(cuuint64_t)columns * sizeof(bf16)};
    const cuuint32_t steps[2] = {1, 1};
    for (int i = 0; i < 4; i++) {
        const cuuint32_t box[2] = {BLOCK, 128u >> i};
        if (encode(&boxes[i], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)in, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
            return cudaErrorInvalidValue;
    }
    return cudaSuccess;
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

const char *product_tiled_describe() {
    return wgmma_available() ? "wgmma: tiles of " STRING(NARROW_ROWS) " rows up to a mean of " STRING(
                                   NARROW_MEAN_ROWS) " rows per expert, of " STRING(WIDE_ROWS) " above"
                             : "mma.sync: tiles of " STRING(NARROW_ROWS) " rows";
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
    return (size_t)(1 + (int64_t)tile_bound(&p->routing, NARROW_ROWS) * tiles_m_of(p, kind)) * sizeof(uint2);
}

static size_t shares_bytes(const product_args *p, product_kind kind) {
    return kind == PRODUCT_DOWN_BACK ? (size_t)(p->routing.tokens * p->routing.top_k * (p->width / BLOCK)) * sizeof(float) : 0;
}

/* These read rows of tokens, the others routed rows.  By the kind, not by p->in_row: a plan is made before there are pointers. */
static bool gathers(product_kind kind) {
    return kind == PRODUCT_GATE_UP || kind == PRODUCT_DOWN_BACK;
}

size_t product_tiled_scratch(const product_args *p, product_kind kind) {
    const size_t shares = shares_bytes(p, kind);
    const int64_t contracted = kind == PRODUCT_GATE_UP || kind == PRODUCT_DOWN ? p->w.cols : p->w.rows;
    const size_t gathered = gathers(kind) ? (size_t)(p->routing.tokens * p->routing.top_k * contracted) * sizeof(bf16) : 0;
    return rounded(plan_bytes(p, kind)) + rounded(shares) + gathered;
}

cudaError_t product_tiled(const product_args *p, product_kind kind, void *scratch, int multiprocessors, cudaStream_t stream) {
    const bool back = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK;
    const int row_blocks = (int)(p->w.rows / BLOCK), column_blocks = (int)(p->w.cols / BLOCK), experts = (int)p->routing.experts;
    const bool hopper = wgmma_available();
    tile_args a = {};
    a.p = *p;
    a.plan = (const uint2 *)scratch;
    a.partial = (float *)((char *)scratch + rounded(plan_bytes(p, kind)));
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
    plan_tiles<<<PLAN_BLOCKS, PLAN_THREADS, (experts + 4) * sizeof(int), stream>>>((uint2 *)scratch, p->routing.offsets, experts, a.tiles_m,
                                                                                   hopper ? NARROW_MEAN_ROWS : INT32_MAX / 8192);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    if (hopper) {
        const int64_t rows = p->routing.tokens * p->routing.top_k, contracted = (int64_t)a.k_blocks * BLOCK;
        const bf16 *in = p->in;
        if (gathers(kind)) {
            uint4 *gathered = (uint4 *)((char *)scratch + rounded(plan_bytes(p, kind)) + rounded(shares_bytes(p, kind)));
            gather_rows<<<(unsigned)((rows + 3) / 4), dim3(64, 4), 0, stream>>>(
                gathered, (const uint4 *)p->in, p->in_row, p->routing.offsets, experts, (int)(contracted / 8), (const uint2 *)scratch);
            in = (const bf16 *)gathered;
        }
        error = make_boxes(a.boxes, in, rows, contracted);
        if (error != cudaSuccess) return error;
    }
    error = hopper ? launch_wgmma(a, back, multiprocessors, stream) : launch_mma(a, back, multiprocessors, stream);
    if (error != cudaSuccess || kind != PRODUCT_DOWN_BACK) return error;
    const unsigned rows = (unsigned)(p->routing.tokens * p->routing.top_k);
    sum_shares<<<(rows + 255) / 256, 256, 0, stream>>>(p->d_row_weight, a.partial, p->routing.offsets, experts, a.blocks);
    return cudaGetLastError();
}
