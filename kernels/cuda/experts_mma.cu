/* Products with the packed expert stacks by mma.sync and cp.async: any GPU from sm_80.  A block makes tiles of 128 outputs x 64 routed rows; two
 * k-blocks are a step, of which the next one's codes wait in registers and its rows are on their way while this one is multiplied. */
#include "kernels/cuda/experts_tile.cuh"

#define THREADS 256
#define ROWS_BYTES (NARROW_ROWS * 128) /* of a k-block */
#define STEP_BYTES (2 * (2 * SUBTILE + ROWS_BYTES))
#define INDEX (2 * STEP_BYTES)
#define WEIGHTS (INDEX + NARROW_ROWS * 4) /* of the rows, for down_back */
#define TABLE (WEIGHTS + NARROW_ROWS * 4)
#define SHARED_BYTES (TABLE + 64)

static __device__ __forceinline__ uint32_t piece_at(uint32_t tile, int row, int piece) {
    return tile + row * 128 + ((piece ^ (row & 7)) << 4);
}

struct mma_place {
    const tile_args &a;
    work w;
    uint32_t base;
    int block0, block1; /* of the two sub-tiles */
};

static __device__ __forceinline__ uint32_t weights_at(uint32_t base, int step, int half) {
    return base + step % 2 * STEP_BYTES + half * 2 * SUBTILE;
}

static __device__ __forceinline__ uint32_t rows_at(uint32_t base, int step, int half) {
    return base + step % 2 * STEP_BYTES + 4 * SUBTILE + half * ROWS_BYTES;
}

/* The routed rows of a step: 16-byte pieces by row index. */
static __device__ __forceinline__ void bring_step(const mma_place &p, int step, const uint32_t *index) {
    const tile_args &a = p.a;
    for (int half = 0; half < 2; half++) {
        const int k = 2 * step + half;
        const uint32_t to = rows_at(p.base, step, half);
        for (int i = threadIdx.x; i < NARROW_ROWS * 8; i += THREADS) {
            const int row = i / 8, piece = i % 8, last = max(p.w.rows - 1, 0);
            if (k < a.k_blocks) {
                dev_copy16(piece_at(to, row, piece), a.p.in + (int64_t)index[row] * a.k_blocks * BLOCK + k * BLOCK + 8 * piece);
            } else if (k == a.k_blocks && piece < 2 * a.low_steps) {
                const bool there = 8 * piece < a.p.r;
                const bf16 *from = a.p.low + (int64_t)(p.w.row0 + min(row, last)) * a.p.r + (there ? 8 * piece : 0);
                dev_copy16_or_zero(piece_at(to, row, piece), from, there ? 16 : 0);
            }
        }
    }
    dev_copy_commit();
}

template <bool across> static __device__ __forceinline__ const uint8_t *weights_of(const mma_place &p, int k, int block, int format) {
    const uint8_t *expert = p.a.weights + p.w.expert * p.a.expert_bytes;
    if (format != ESP_Q_NONE) return expert + ((int64_t)block * p.a.block_step + (int64_t)k * p.a.k_step) * RECORD_BYTES(format);
    return expert + (across ? k : block) * BLOCK * p.a.row_bytes + (across ? block : k) * BLOCK * 2;
}

/* A thread's row of weights of a step, on its way: half the block for each k-block. */
template <int format, bool across> static __device__ __forceinline__ void load_step(coded_row &codes, const mma_place &p, int step) {
    const int half = threadIdx.x / 128, row = threadIdx.x % 128, k = 2 * step + half;
    if (format != ESP_Q_NONE && k < p.a.k_blocks)
        load_row<format>(codes, weights_of<across>(p, k, row < 64 ? p.block0 : p.block1, format), row % 64);
}

template <int format, bool across>
static __device__ __forceinline__ void decode_step(const coded_row &codes, const mma_place &p, int step) {
    const int half = threadIdx.x / 128, row = threadIdx.x % 128, warp = row / 32, lane = threadIdx.x % 32, k = 2 * step + half;
    const uint32_t to = weights_at(p.base, step, half);
    if (k < p.a.k_blocks && format != ESP_Q_NONE) {
        decode_row<format>(to + row / 64 * SUBTILE, row % 64, codes, planes_of<format>(codes.scale, load_table(p.base + TABLE)));
    } else if (k < p.a.k_blocks && warp < 2)
        copy_plain(to + warp * SUBTILE, weights_of<across>(p, k, warp ? p.block1 : p.block0, format), p.a.row_bytes, lane, 32);
    else if (k == p.a.k_blocks && p.a.low_steps && warp < 2)
        low_block<across>(to + warp * SUBTILE, p.a, p.w.expert, warp ? p.block1 : p.block0, lane, 32);
}

/* A warp makes 32 outputs x 32 rows of its sub-tile: d[16 outputs][8 rows]. */
template <bool across> static __device__ __forceinline__ void multiply_step(float (&d)[2][4][4], const mma_place &p, int step) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, matrix = lane / 8, line = lane % 8;
    const int outs = warp % 4 / 2 * 32, rows = warp % 2 * 32;
    for (int half = 0; half < 2; half++) {
        const int k = 2 * step + half, steps = k < p.a.k_blocks ? 4 : k == p.a.k_blocks ? p.a.low_steps : 0;
        const uint32_t weights = weights_at(p.base, step, half) + warp / 4 * SUBTILE, tokens = rows_at(p.base, step, half);
#pragma unroll 2
        for (int j = 0; j < steps; j++) {
            uint4 b[2];
#pragma unroll
            for (int i = 0; i < 2; i++) b[i] = dev_ldmatrix(piece_at(tokens, rows + 16 * i + matrix / 2 * 8 + line, 2 * j + matrix % 2));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int out = outs + 16 * i;
                const uint4 v = across ? dev_ldmatrix_trans(piece_at(weights, 16 * j + matrix / 2 * 8 + line, out / 8 + matrix % 2))
                                       : dev_ldmatrix(piece_at(weights, out + matrix % 2 * 8 + line, 2 * j + matrix / 2));
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    dev_mma(d[i][2 * n], v.x, v.y, v.z, v.w, b[n].x, b[n].y);
                    dev_mma(d[i][2 * n + 1], v.x, v.y, v.z, v.w, b[n].z, b[n].w);
                }
            }
        }
    }
}

template <int format, bool across> static __device__ void make_tile(const tile_args &a, uint8_t *shared, int index) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = warp / 4;
    const work w = work_of(a, index);
    const mma_place p = {a, w, dev_shared(shared), min(block_of(a, w.m, 0), a.blocks - 1), min(block_of(a, w.m, 1), a.blocks - 1)};
    uint32_t *row_index = (uint32_t *)(shared + INDEX);
    if (threadIdx.x < NARROW_ROWS) {
        const int s = p.w.row0 + min((int)threadIdx.x, max(p.w.rows - 1, 0));
        row_index[threadIdx.x] = (uint32_t)(a.p.in_row ? a.p.in_row[s] : s);
        if (a.kind == PRODUCT_DOWN_BACK) ((float *)(shared + WEIGHTS))[threadIdx.x] = ((const float *)a.p.routing.row_weight)[s];
    }
    __syncthreads();
    const int steps = (a.k_blocks + (a.low_steps > 0) + 1) / 2;
    coded_row codes;
    load_step<format, across>(codes, p, 0);
    bring_step(p, 0, row_index);
    float d[2][4][4] = {};
    for (int step = 0; step < steps; step++) {
        decode_step<format, across>(codes, p, step);
        if (step + 1 < steps) load_step<format, across>(codes, p, step + 1);
        dev_copy_wait<0>();
        __syncthreads();
        if (step + 1 < steps) bring_step(p, step + 1, row_index);
        multiply_step<across>(d, p, step);
    }
    __syncthreads();
    const int block = block_of(a, p.w.m, g), first = warp % 4 / 2 * 32 + lane / 4;
    bf16 *staging = (bf16 *)(shared + g * SUBTILE);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int v = 0; v < 2; v++) {
            const int out = first + 16 * i + 8 * v;
            const float bias =
                !across && a.p.bias && block < a.blocks ? a.p.bias[((int64_t)p.w.expert * a.blocks + block) * BLOCK + out] : 0.0f;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const int row = warp % 2 * 32 + 8 * (n / 2) + 2 * (lane % 4) + n % 2;
                staging[row * 64 + ((out / 8 ^ (row & 7)) << 3) + out % 8] = __float2bfloat16_rn(d[i][n / 2][2 * v + n % 2] + bias);
            }
        }
    __syncthreads();
    if (a.kind == PRODUCT_GATE_UP) {
        finish_gate_up(a, p.w, p.base, 0);
    } else if (block < a.blocks && a.kind == PRODUCT_DOWN_BACK) {
        const int thread = (int)threadIdx.x % 128;
        for (int i = 0; i < 4; i++) {
            gu_row gu;
            load_gu(gu, a, p.w, block, thread, 0, i);
            finish_down_back(a, p.w, p.base + g * SUBTILE, p.base + WEIGHTS, block, thread, 0, i, gu);
        }
    } else if (block < a.blocks) {
        finish_rows(a, p.w, p.base + g * SUBTILE, block, (int)threadIdx.x % 128, 0);
    }
    __syncthreads();
}

template <bool across> static __global__ __launch_bounds__(THREADS, 1) void product_mma_kernel(const __grid_constant__ tile_args a) {
    extern __shared__ __align__(1024) uint8_t shared[];
    const int tiles = (int)a.plan[0].x;
    if (a.p.w.format != ESP_Q_NONE && threadIdx.x < 16) ((float *)(shared + TABLE))[threadIdx.x] = a.p.w.lut[threadIdx.x];
    __syncthreads();
    for (int index = (int)blockIdx.x; index < tiles; index += (int)gridDim.x) {
        if (a.p.w.format == ESP_MXFP4)
            make_tile<ESP_MXFP4, across>(a, shared, index);
        else if (a.p.w.format == ESP_Q_NONE)
            make_tile<ESP_Q_NONE, across>(a, shared, index);
        else
            make_tile<ESP_NF4, across>(a, shared, index);
    }
}

template <bool across> static cudaError_t launch(const tile_args &a, int multiprocessors, cudaStream_t stream) {
    const cudaError_t error = cudaFuncSetAttribute(product_mma_kernel<across>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (error != cudaSuccess) return error;
    product_mma_kernel<across><<<2 * multiprocessors, THREADS, SHARED_BYTES, stream>>>(a);
    return cudaGetLastError();
}

cudaError_t launch_mma(const tile_args &a, bool back, int multiprocessors, cudaStream_t stream) {
    return back ? launch<true>(a, multiprocessors, stream) : launch<false>(a, multiprocessors, stream);
}
