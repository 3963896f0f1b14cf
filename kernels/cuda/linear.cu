/* Dense layer with a frozen weight and a low-rank branch.  The branch's product goes into the output first, then the weight's is added to it:
 * the smaller of the two is what is rounded twice. */
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/dev.cuh"

namespace {

enum {
    FEW_TOKENS = 256, /* up to which a branch is one launch */
    BRANCH_WARPS = 16,
    BRANCH_ROWS = 16, /* of a block: what a fragment has */
    RANKS = 16,       /* at a time, */
    MOST_RANKS = 64,  /* and in all */
    TILES = 2         /* of 8 outputs, that a warp makes */
};

/* ---- The branch of few tokens: each block makes u of its rows, then its share of their outputs.  A and B are read as they are. ---- */

struct branch_args {
    bf16 *y, *u;
    const bf16 *x;
    const float *a, *b;
    int64_t tokens, in, out;
    int r;
    float scale;
};

/* Four words of two neighbours, from eight values. */
__device__ uint4 rounded8(const float *from) {
    const float4 a = __ldg(reinterpret_cast<const float4 *>(from)), b = __ldg(reinterpret_cast<const float4 *>(from) + 1);
    return make_uint4(dev_bf16x2(a.x, a.y), dev_bf16x2(a.z, a.w), dev_bf16x2(b.x, b.y), dev_bf16x2(b.z, b.w));
}

/* The warps share the width, 32 columns in turn, of which a lane reads 8 neighbours: the order of a contraction is free, as long as both sides
 * follow it. */
__device__ void branch_down(float (&sum)[2][4], const branch_args &p, int64_t row0, int first_rank) {
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const bf16 *x[2];
#pragma unroll
    for (int v = 0; v < 2; v++) x[v] = p.x + min(row0 + 8 * v + lane / 4, p.tokens - 1) * p.in;
#pragma unroll 4
    for (int64_t k = 32 * warp + lane % 4 * 8; k < p.in; k += 32 * BRANCH_WARPS) {
        const uint4 low = __ldg(reinterpret_cast<const uint4 *>(x[0] + k)), high = __ldg(reinterpret_cast<const uint4 *>(x[1] + k));
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int rank = first_rank + 8 * h + lane / 4;
            const uint4 w = rank < p.r ? rounded8(p.a + rank * p.in + k) : make_uint4(0, 0, 0, 0);
            dev_mma(sum[h], low.x, high.x, low.y, high.y, w.x, w.y);
            dev_mma(sum[h], low.z, high.z, low.w, high.w, w.z, w.w);
        }
    }
}

__global__ void __launch_bounds__(BRANCH_WARPS *ESPI_WARP, 1) few_branch(const __grid_constant__ branch_args p) {
    __shared__ float parts[BRANCH_WARPS][BRANCH_ROWS][RANKS];
    __shared__ __align__(16) bf16 u[BRANCH_ROWS][MOST_RANKS + 8];
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const int group = lane / 4, quad = lane % 4;
    const int64_t row0 = static_cast<int64_t>(blockIdx.x) * BRANCH_ROWS,
                  first_tile = static_cast<int64_t>(blockIdx.y) * BRANCH_WARPS + warp;
    /* what is read of B is near when it is wanted: of a tile 8 r values, of which a line has 32 */
    for (int64_t tile = first_tile; tile < p.out / 8; tile += gridDim.y * BRANCH_WARPS)
        if (4 * lane < p.r) dev_prefetch_l2(p.b + tile * 8 * p.r + 32 * lane);
    for (int first = 0; first < p.r; first += RANKS) {
        float sum[2][4] = {};
        branch_down(sum, p, row0, first);
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int i = 0; i < 4; i++) parts[warp][8 * (i / 2) + group][8 * h + 2 * quad + i % 2] = sum[h][i];
        }
        __syncthreads();
        const int row = static_cast<int>(threadIdx.x) / RANKS, rank = static_cast<int>(threadIdx.x) % RANKS;
        if (row < BRANCH_ROWS) {
            float all = 0;
#pragma unroll
            for (int w = 0; w < BRANCH_WARPS; w++) all += parts[w][row][rank];
            espi_store(&u[row][first + rank], all);
            if (blockIdx.y == 0 && row0 + row < p.tokens && first + rank < p.r) espi_store(p.u + (row0 + row) * p.r + first + rank, all);
        }
        __syncthreads();
    }
    for (int64_t tile = first_tile; tile < p.out / 8; tile += gridDim.y * BRANCH_WARPS) {
        float d[4] = {};
        const float *b = p.b + (tile * 8 + group) * p.r;
        for (int rank = 2 * quad; rank < p.r; rank += RANKS) {
            const auto left = [&](int v, int at) { return *reinterpret_cast<const uint32_t *>(&u[8 * v + group][rank + at]); };
            const float2 near = __ldg(reinterpret_cast<const float2 *>(b + rank));
            const float2 far = rank + 8 < p.r ? __ldg(reinterpret_cast<const float2 *>(b + rank + 8)) : make_float2(0, 0);
            dev_mma(d, left(0, 0), left(1, 0), left(0, 8), left(1, 8), dev_bf16x2(near.x, near.y), dev_bf16x2(far.x, far.y));
        }
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const int64_t row = row0 + 8 * v + group;
            if (row < p.tokens)
                *reinterpret_cast<uint32_t *>(p.y + row * p.out + tile * 8 + 2 * quad) =
                    dev_bf16x2(p.scale * d[2 * v], p.scale * d[2 * v + 1]);
        }
    }
}

/* The operands of the main product are whole vectors. */
bool is_few(const espi_linear_fwd *a) {
    const bool whole = a->w.cols % 32 == 0 && a->w.rows % 8 == 0 && a->lora.r % 8 == 0 && espi_aligned16(a->lora.a);
    return whole && a->tokens <= FEW_TOKENS && a->lora.r <= MOST_RANKS && reinterpret_cast<uintptr_t>(a->lora.b) % sizeof(float2) == 0;
}

/* y = scale B u, and u = A x. */
esp_status branch_of_few(const espi_exec *exec, const espi_linear_fwd *a) {
    const branch_args p = {static_cast<bf16 *>(a->y),
                           static_cast<bf16 *>(a->u),
                           static_cast<const bf16 *>(a->x),
                           static_cast<const float *>(a->lora.a),
                           static_cast<const float *>(a->lora.b),
                           a->tokens,
                           a->w.cols,
                           a->w.rows,
                           static_cast<int>(a->lora.r),
                           static_cast<float>(a->lora.scale)};
    const dim3 blocks(espi_blocks(a->tokens, BRANCH_ROWS), espi_blocks(a->w.rows, static_cast<int64_t>(8) * TILES * BRANCH_WARPS));
    few_branch<<<blocks, BRANCH_WARPS * ESPI_WARP, 0, espi_cuda_of(exec)->stream>>>(p);
    return ESPI_CUDA_LAUNCHED("low-rank branch");
}

/* ---- The branch of many ---- */

/* The branch's matrices as the products read them: in bf16 beside a weight for cuBLASLt, as they are beside another. */
struct branch {
    espi_operand a_rows, a_columns, b_rows, b_columns; /* A, A^T, B, B^T */
};

espi_operand weight_rows(const espi_mat *w) {
    return espi_rows_of(w->data, w->dtype, w->cols);
}

espi_operand weight_columns(const espi_mat *w) {
    return espi_transpose_of(w->data, w->dtype, w->cols);
}

size_t branch_room(const espi_lora *lora, int64_t in, int64_t out) {
    return espi_room(lora->r * in, sizeof(bf16)) + espi_room(lora->r * out, sizeof(bf16));
}

esp_status take_branch(const espi_exec *exec, branch *l, char **scratch, const espi_lora *lora, int64_t in, int64_t out, bool narrow) {
    const void *a = lora->a, *b = lora->b;
    const esp_dtype dtype = narrow ? ESP_BF16 : ESP_F32;
    if (narrow) {
        bf16 *a16 = espi_cut<bf16>(scratch, lora->r * in), *b16 = espi_cut<bf16>(scratch, lora->r * out);
        ESPI_TRY(espi_narrow_cuda(exec, a16, a, lora->r * in));
        ESPI_TRY(espi_narrow_cuda(exec, b16, b, lora->r * out));
        a = a16;
        b = b16;
    }
    *l = {espi_rows_of(a, dtype, in), espi_transpose_of(a, dtype, in), espi_rows_of(b, dtype, lora->r),
          espi_transpose_of(b, dtype, lora->r)};
    return ESP_OK;
}

} // namespace

size_t espi_linear_fwd_scratch_cuda(const espi_exec *exec, const espi_linear_fwd *a) {
    (void)exec;
    return branch_room(&a->lora, a->w.cols, a->w.rows) + espi_room(a->w.rows, sizeof(bf16));
}

esp_status espi_linear_fwd_cuda(const espi_exec *exec, const espi_linear_fwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    if (a->tokens == 0) return ESP_OK;
    char *scratch = static_cast<char *>(exec->scratch);
    espi_product main = espi_product_of(a->y, espi_rows_of(a->x, ESP_BF16, in), weight_columns(&a->w), a->tokens, out, in);
    const bool dense = espi_product_is_dense(&main);
    main.bias = a->bias;
    main.bias_dtype = ESP_F32;
    if (a->bias && dense) {
        bf16 *bias = espi_cut<bf16>(&scratch, out);
        ESPI_TRY(espi_narrow_cuda(exec, bias, a->bias, out));
        main.bias = bias;
        main.bias_dtype = ESP_BF16;
    }
    if (r > 0 && dense && is_few(a)) {
        ESPI_TRY(branch_of_few(exec, a));
        main.beta = 1;
    } else if (r > 0) {
        branch l;
        ESPI_TRY(take_branch(exec, &l, &scratch, &a->lora, in, out, dense));
        espi_product down = main, up = main;
        down.d = a->u;
        down.stride = down.n = r;
        down.b = l.a_columns;
        up.a = espi_rows_of(a->u, ESP_BF16, r);
        up.b = l.b_columns;
        up.k = r;
        up.alpha = static_cast<float>(a->lora.scale);
        down.bias = up.bias = nullptr;
        ESPI_TRY(espi_product_cuda(exec, &down));
        ESPI_TRY(espi_product_cuda(exec, &up));
        main.beta = 1;
    }
    return espi_product_cuda(exec, &main);
}

size_t espi_linear_bwd_scratch_cuda(const espi_exec *exec, const espi_linear_bwd *a) {
    (void)exec;
    return branch_room(&a->lora, a->w.cols, a->w.rows) + espi_room(a->tokens * a->lora.r, sizeof(bf16));
}

esp_status espi_linear_bwd_cuda(const espi_exec *exec, const espi_linear_bwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    if (a->tokens == 0) return ESP_OK;
    char *scratch = static_cast<char *>(exec->scratch);
    espi_product main = espi_product_of(a->d_x, espi_rows_of(a->d_y, ESP_BF16, out), weight_rows(&a->w), a->tokens, in, out);
    main.beta = a->accumulate ? 1 : 0;
    if (r > 0) {
        branch l;
        ESPI_TRY(take_branch(exec, &l, &scratch, &a->lora, in, out, espi_product_is_dense(&main)));
        bf16 *q = espi_cut<bf16>(&scratch, a->tokens * r);
        espi_product down = main, d_b = main, d_a = main, up = main;
        down.d = q;
        down.stride = down.n = r;
        down.b = l.b_rows;
        down.alpha = static_cast<float>(a->lora.scale);
        down.beta = 0;
        ESPI_TRY(espi_product_cuda(exec, &down));
        d_b.d = a->lora.d_b;
        d_b.dtype = d_a.dtype = ESP_F32;
        d_b.stride = d_b.n = r;
        d_b.a = espi_transpose_of(a->d_y, ESP_BF16, out);
        d_b.b = espi_rows_of(a->u, ESP_BF16, r);
        d_b.m = out;
        d_b.k = d_a.k = a->tokens;
        d_b.alpha = static_cast<float>(a->lora.scale);
        d_b.beta = d_a.beta = 1;
        ESPI_TRY(espi_product_cuda(exec, &d_b));
        d_a.d = a->lora.d_a;
        d_a.a = espi_transpose_of(q, ESP_BF16, r);
        d_a.b = espi_rows_of(a->x, ESP_BF16, in);
        d_a.m = r;
        ESPI_TRY(espi_product_cuda(exec, &d_a));
        if (a->d_x) {
            up.a = espi_rows_of(q, ESP_BF16, r);
            up.b = l.a_rows;
            up.k = r;
            ESPI_TRY(espi_product_cuda(exec, &up));
            main.beta = 1;
        }
    }
    return a->d_x ? espi_product_cuda(exec, &main) : ESP_OK;
}
