/* The head's products on sm_90a: wgmma multiplies rows with the weight, and makes of a tile's products what head.cu wants of them while they are
 * in registers: logits of many rows never go through memory.
 *
 * A tile is 128 rows x 256 columns, two warpgroups of 64 rows each; a third one's first thread brings k-blocks of 64 ahead, as many as shared
 * memory holds, also across tiles.  Two blocks make two tiles of the same columns together: each brings half of the weight's rows to both.
 * Tiles of the same columns are made side by side, so that the weight is read from memory once. */
#include "kernels/cuda/boxes.cuh"
#include "kernels/cuda/dev.cuh"
#include "kernels/cuda/head.cuh"

#define ROWS 128 /* of a tile */
#define BLOCK_K 64
#define STAGES 4
#define THREADS 384
#define WARPS 8  /* that multiply */
#define LINE 128 /* bytes of BLOCK_K values */
#define X_BYTES (ROWS * LINE)
#define HALF_BYTES (HEAD_TILE / 2 * LINE)
#define STAGE_BYTES (X_BYTES + 2 * HALF_BYTES)
#define OWN_BYTES (16 * LINE) /* of a warp: 16 rows of 64 results on their way out */
#define OWN (STAGES * STAGE_BYTES)
#define BARRIERS (OWN + WARPS * OWN_BYTES)
#define SHARED_BYTES (BARRIERS + 16 * STAGES + 1024) /* the stages begin at a multiple of 1024 */

struct head_maps {
    CUtensorMap x, w;
};

struct head_ring {
    uint32_t base, stage, phase;
    __device__ uint32_t at() const { return base + stage * STAGE_BYTES; }
    __device__ uint32_t full() const { return base + BARRIERS + 8 * stage; }
    __device__ uint32_t empty() const { return full() + 8 * STAGES; }
    __device__ void advance() {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    }
};

#if DEV_HOPPER
/* Pairs of tiles, those of the same columns one after the other. */
static __device__ __forceinline__ int row_pairs(const head_slice &s) {
    return (s.rows + 2 * ROWS - 1) / (2 * ROWS);
}

static __device__ __forceinline__ void bring(const head_maps &maps, const head_slice &s, head_ring r) {
    const int pairs = row_pairs(s), half = (int)dev_cluster_rank();
    for (int index = (int)blockIdx.x / 2; index < pairs * s.tiles; index += (int)gridDim.x / 2) {
        const int row = (2 * (index % pairs) + half) * ROWS, column = (s.first_tile + index / pairs) * HEAD_TILE + half * (HEAD_TILE / 2);
        for (int k = 0; k < s.hidden; k += BLOCK_K) {
            dev_barrier_wait(r.empty(), r.phase ^ 1);
            dev_barrier_expect(r.full(), STAGE_BYTES);
            dev_copy_box(r.at(), &maps.x, k, row, r.full());
            dev_copy_box_both(r.at() + X_BYTES + half * HALF_BYTES, &maps.w, k, column, r.full());
            r.advance();
        }
    }
}

/* A lane's rows lane / 4 and 8 further on, of the 16 of a warp. */
struct lane_sums {
    float weights[2], products[2], shift[2];
};

/* Of two neighbouring products, rounded. */
static __device__ __forceinline__ uint32_t weigh(lane_sums &sums, float slope, uint32_t x2, int v) {
    const float x[2] = {dev_lo(x2), dev_hi(x2)};
    float weight[2];
#pragma unroll
    for (int w = 0; w < 2; w++) {
        weight[w] = dev_exp2(fmaf(x[w], slope, -sums.shift[v]));
        sums.weights[v] += weight[w];
        sums.products[v] = fmaf(weight[w], x[w], sums.products[v]);
    }
    return dev_bf16x2(weight[0], weight[1]);
}

/* What is to have no weight is made so small, after the target's has been taken.  Places count from the lane's first column. */
#define NO_WEIGHT -1e30f
static __device__ __forceinline__ void leave_out(float (&d)[128], float (&target_x)[2], const int (&target)[2], int end) {
#pragma unroll
    for (int at = 0; at < 128; at++) {
        const int v = at / 2 % 2, place = at / 8 * 16 + at / 4 % 2 * 8 + at % 2;
        target_x[v] = place == target[v] ? d[at] : target_x[v];
        d[at] = place == target[v] || place >= end ? NO_WEIGHT : d[at];
    }
}

/* 16 rows of 64 results from the warp's own shared memory. */
static __device__ __forceinline__ void store_lines(const head_slice &s, uint32_t own, int row0, int column) {
    const int lane = threadIdx.x % 32, row = row0 + lane / 8;
    const uint32_t from = own + lane / 8 * LINE + ((lane % 8 ^ lane / 8) << 4);
    bf16 *to = s.out + row * s.stride + column + 8 * (lane % 8);
    const int rows = column + 8 * (lane % 8) < s.stride ? s.rows - row : 0;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint4 v = dev_load_shared((from ^ (i % 2 * 64)) + 4 * i * LINE);
        if (4 * i < rows) *reinterpret_cast<uint4 *>(to + 4 * i * s.stride) = v;
    }
    __syncwarp();
}

/* d as dev_wgmma has it. */
template <head_output output>
static __device__ __forceinline__ void finish(const float (&d)[128], lane_sums &sums, const head_slice &s, int row0, int column,
                                              uint32_t own) {
    const int lane = threadIdx.x % 32;
    const uint32_t to = own + lane % 16 * LINE + ((lane / 16 ^ lane % 8) << 4);
#pragma unroll
    for (int part = 0; part < HEAD_TILE / BLOCK_K; part++) {
#pragma unroll
        for (int i = 4 * part; i < 4 * part + 4; i++) {
            uint32_t result[4];
#pragma unroll
            for (int at = 0; at < 4; at++) {
                const float *pair = d + 8 * i + 4 * (at / 2) + 2 * (at % 2);
                result[at] = dev_bf16x2(pair[0], pair[1]);
                if (output != HEAD_PRODUCTS) result[at] = weigh(sums, s.slope, result[at], at % 2);
            }
            if (output != HEAD_SUMS) dev_stmatrix(to ^ (i % 4 * 32), result[0], result[1], result[2], result[3]);
        }
        if (output != HEAD_SUMS) store_lines(s, own, row0, column + part * BLOCK_K);
    }
}

template <head_output output>
static __device__ __forceinline__ void finish_weights(float (&d)[128], const head_slice &s, int row0, int tile, uint32_t own) {
    const int lane = threadIdx.x % 32, first = tile * HEAD_TILE + 2 * (lane % 4), end = s.vocab - first;
    lane_sums sums = {};
    int target[2];
    float target_x[2] = {};
    bool touched = end < HEAD_TILE;
#pragma unroll
    for (int v = 0; v < 2; v++) {
        const int row = min(row0 + 8 * v + lane / 4, s.rows - 1);
        sums.shift[v] = __ldg(s.shift + row);
        target[v] = __ldg(s.target + row) - first;
        if (target[v] >= HEAD_TILE || target[v] % 8 >= 2) target[v] = -1; /* another lane's, or another tile's */
        touched = touched || target[v] >= 0;
    }
    if (__any_sync(~0u, touched)) leave_out(d, target_x, target, end);
    finish<output>(d, sums, s, row0, (tile - s.first_tile) * HEAD_TILE, own);
    const int tiles = (s.vocab + HEAD_TILE - 1) / HEAD_TILE;
#pragma unroll
    for (int v = 0; v < 2; v++) {
        const int row = row0 + 8 * v + lane / 4;
#pragma unroll
        for (int other = 1; other < 4; other *= 2) {
            sums.weights[v] += __shfl_xor_sync(~0u, sums.weights[v], other);
            sums.products[v] += __shfl_xor_sync(~0u, sums.products[v], other);
        }
        if (row >= s.rows) continue;
        if (target[v] >= 0) s.target_x[row] = dev_lo(dev_bf16x2(target_x[v], 0));
        if (lane % 4 == 0) s.sums[(int64_t)row * tiles + tile] = make_float2(sums.weights[v], sums.products[v]);
    }
}

template <head_output output> static __device__ __forceinline__ void multiply(const head_slice &s, head_ring r) {
    const int pairs = row_pairs(s), half = (int)dev_cluster_rank(), warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, group = warp / 4;
    float d[128];
    for (int index = (int)blockIdx.x / 2; index < pairs * s.tiles; index += (int)gridDim.x / 2) {
        uint32_t before = 0;
#pragma unroll 1
        for (int k = 0; k < s.hidden; k += BLOCK_K) {
            const uint32_t left = dev_tile_low(r.at() + group * 64 * LINE), right = dev_tile_low(r.at() + X_BYTES);
            dev_barrier_wait(r.full(), r.phase);
            dev_wgmma_begin();
#pragma unroll
            for (int j = 0; j < 4; j++) dev_wgmma<16, 0>::run(d, left + 2 * j, right + 2 * j, k | j);
            dev_wgmma_commit();
            dev_wgmma_wait<1>();
            if (k > 0 && lane < 2) dev_barrier_arrive_in(before, lane); /* the block before is read */
            before = r.empty();
            r.advance();
        }
        dev_wgmma_wait<0>();
        if (lane < 2) dev_barrier_arrive_in(before, lane);
        dev_wgmma_settle<128>(d);
        const int row0 = (2 * (index % pairs) + half) * ROWS + 16 * warp, tile = index / pairs;
        const uint32_t own = r.base + OWN + warp * OWN_BYTES;
        if constexpr (output == HEAD_PRODUCTS) {
            lane_sums none = {};
            finish<output>(d, none, s, row0, tile * HEAD_TILE, own);
        } else {
            finish_weights<output>(d, s, row0, s.first_tile + tile, own);
        }
    }
}
#endif

template <head_output output>
static __global__ void __launch_bounds__(THREADS, 1)
    head_kernel(const __grid_constant__ head_maps maps, const __grid_constant__ head_slice s) {
#if DEV_HOPPER
    extern __shared__ uint8_t shared[];
    const head_ring ring = {(dev_shared(shared) + 1023) / 1024 * 1024, 0, 0};
    if (threadIdx.x == 0) {
        head_ring each = ring;
        for (int i = 0; i < STAGES; i++, each.advance()) {
            dev_barrier_init(each.full(), 1);
            dev_barrier_init(each.empty(), 2 * WARPS);
        }
    }
    dev_cluster_meet();
    if (threadIdx.x < 128) {
        dev_registers_shrink<24>();
        if (threadIdx.x == 0) bring(maps, s, ring);
        __syncwarp();
    } else {
        dev_registers_grow<240>();
        multiply<output>(s, ring);
    }
    dev_cluster_meet(); /* the other block may still arrive here, and write */
#endif
}

/* Built for other targets the kernel is empty: it has no registers to speak of. */
bool head_wgmma_available() {
    cudaFuncAttributes attributes;
    const bool known = cudaFuncGetAttributes(&attributes, head_kernel<HEAD_SUMS>) == cudaSuccess;
    if (!known) (void)cudaGetLastError();
    return known && attributes.binaryVersion == 90 && attributes.numRegs > 64;
}

template <head_output output>
static cudaError_t launch(const head_maps &maps, const head_slice &s, int multiprocessors, cudaStream_t stream) {
    const cudaError_t error = cudaFuncSetAttribute(head_kernel<output>, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute pairs = {};
    pairs.id = cudaLaunchAttributeClusterDimension;
    pairs.val.clusterDim = {2, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(multiprocessors) / 2 * 2;
    config.blockDim = THREADS;
    config.dynamicSmemBytes = SHARED_BYTES;
    config.stream = stream;
    config.attrs = &pairs;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, head_kernel<output>, maps, s);
}

cudaError_t head_wgmma(const head_slice *s, head_output output, const bf16 *x, const bf16 *w, int multiprocessors, cudaStream_t stream) {
    head_maps maps;
    cudaError_t error = make_boxes(&maps.x, x, s->rows, s->hidden, ROWS);
    if (error == cudaSuccess) error = make_boxes(&maps.w, w, s->vocab, s->hidden, ROWS);
    if (error != cudaSuccess) return error;
    if (output == HEAD_PRODUCTS) return launch<HEAD_PRODUCTS>(maps, *s, multiprocessors, stream);
    if (output == HEAD_WEIGHTS) return launch<HEAD_WEIGHTS>(maps, *s, multiprocessors, stream);
    return launch<HEAD_SUMS>(maps, *s, multiprocessors, stream);
}
