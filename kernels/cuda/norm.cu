/* RMSNorm over rows; also QK-norm, whose rows are heads. */
#include "kernels/cuda/cuda.cuh"

namespace {

enum { THREADS = 256, HALF_WARP = ESPI_WARP / 2, SHORT_ROW = 512, ROW_CHUNKS = 256 };

/* The same number in f32 as in bf16s<N>.  Below, GROUP threads share a row: a part of a warp, or the block. */
template <int N> struct alignas(N < 4 ? 4 : 16) floats { float at[N]; };

template <int GROUP> __device__ float group_sum(float x) {
    if constexpr (GROUP == THREADS) {
        return espi_block_sum<THREADS>(x);
    } else {
        for (int lane = GROUP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
        return x;
    }
}

/* A thread's vectors of a row: the first stays in registers between the two passes. */
template <int N> struct reader {
    const bf16s<N> *row;
    bf16s<N> first;
    int64_t lane;
    __device__ reader(const bf16 *from, int64_t lane, int64_t n) : row(reinterpret_cast<const bf16s<N> *>(from)), first(), lane(lane) {
        if (lane < n) first = row[lane];
    }
    __device__ bf16s<N> at(int64_t i) const { return i == lane ? first : row[i]; }
};

/* A group that has no row of its own does the last one again and keeps silent, for its lanes are needed. */
template <int N, int GROUP>
__global__ void __launch_bounds__(THREADS, 4)
    normalise(bf16 *y, float *rstd, const bf16 *x, const float *w, int64_t rows, int64_t n, float eps) {
    const int64_t mine = static_cast<int64_t>(blockIdx.x) * (THREADS / GROUP) + threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
    const int64_t row = min(mine, rows - 1), vectors = n / N;
    const reader<N> from(x + row * n, lane, vectors);
    bf16s<N> *to = reinterpret_cast<bf16s<N> *>(y + row * n);
    float squares = 0;
    for (int64_t i = lane; i < vectors; i += GROUP) {
        const bf16s<N> v = from.at(i);
#pragma unroll
        for (int j = 0; j < N; j++) squares += espi_value(v.at[j]) * espi_value(v.at[j]);
    }
    squares = group_sum<GROUP>(squares);
    if (mine >= rows) return;
    const float r = 1 / sqrtf(squares / static_cast<float>(n) + eps);
    for (int64_t i = lane; i < vectors; i += GROUP) {
        bf16s<N> v = from.at(i);
        const floats<N> weight = reinterpret_cast<const floats<N> *>(w)[i];
#pragma unroll
        for (int j = 0; j < N; j++) espi_store(&v.at[j], weight.at[j] * (espi_value(v.at[j]) * r));
        to[i] = v;
    }
    if (lane == 0) rstd[row] = r;
}

template <int N, int GROUP>
__global__ void __launch_bounds__(THREADS, 3) normalise_grad(bf16 *d_x, const bf16 *d_y, const bf16 *x, const float *rstd,
                                                             const bf16 *d_add, const float *w, int64_t rows, int64_t n) {
    const int64_t mine = static_cast<int64_t>(blockIdx.x) * (THREADS / GROUP) + threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
    const int64_t row = min(mine, rows - 1), at = row * n, vectors = n / N;
    const reader<N> from(x + at, lane, vectors), above(d_y + at, lane, vectors);
    const float r = rstd[row];
    float mean = 0;
    for (int64_t i = lane; i < vectors; i += GROUP) {
        const bf16s<N> g = above.at(i), v = from.at(i);
        const floats<N> weight = reinterpret_cast<const floats<N> *>(w)[i];
#pragma unroll
        for (int j = 0; j < N; j++) mean += espi_value(g.at[j]) * weight.at[j] * (espi_value(v.at[j]) * r);
    }
    mean = group_sum<GROUP>(mean) / static_cast<float>(n);
    if (mine >= rows) return;
    for (int64_t i = lane; i < vectors; i += GROUP) {
        bf16s<N> g = above.at(i), v = from.at(i), add = {};
        const floats<N> weight = reinterpret_cast<const floats<N> *>(w)[i];
        if (d_add) add = reinterpret_cast<const bf16s<N> *>(d_add + at)[i];
#pragma unroll
        for (int j = 0; j < N; j++)
            espi_store(&g.at[j], r * (espi_value(g.at[j]) * weight.at[j] - espi_value(v.at[j]) * r * mean) + espi_value(add.at[j]));
        reinterpret_cast<bf16s<N> *>(d_x + at)[i] = g;
    }
}

/* The weight's gradient from one chunk of rows. */
__global__ void __launch_bounds__(THREADS)
    weight_chunks(float *chunks, const bf16 *d_y, const bf16 *x, const float *rstd, int64_t rows, int64_t n, int64_t chunk_rows) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    const int64_t first = blockIdx.y * chunk_rows, end = min(first + chunk_rows, rows);
    float sum = 0;
    for (int64_t row = first; row < end; row++) sum += espi_value(d_y[row * n + i]) * espi_value(x[row * n + i]) * rstd[row];
    chunks[blockIdx.y * n + i] = sum;
}

__global__ void __launch_bounds__(THREADS) add_weight_chunks(float *d_w, const float *chunks, int64_t count, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    double sum = d_w[i];
    for (int64_t c = 0; c < count; c++) sum += chunks[c * n + i];
    d_w[i] = static_cast<float>(sum);
}

int64_t rows_a_chunk(int64_t rows) {
    const int64_t least = 32, spread = espi_ceil_div(rows, ROW_CHUNKS);
    return spread > least ? spread : least;
}

} // namespace

#define LAUNCH(kernel, ...)                                                                                                                \
    do {                                                                                                                                   \
        const bool is_short = a->n <= SHORT_ROW, is_shortest = a->n <= HALF_WARP * 8;                                                      \
        if (vectors && is_shortest)                                                                                                        \
            kernel<8, HALF_WARP><<<espi_blocks(a->rows, THREADS / HALF_WARP), THREADS, 0, stream>>>(__VA_ARGS__);                          \
        else if (vectors && is_short)                                                                                                      \
            kernel<8, ESPI_WARP><<<espi_blocks(a->rows, THREADS / ESPI_WARP), THREADS, 0, stream>>>(__VA_ARGS__);                          \
        else if (vectors)                                                                                                                  \
            kernel<8, THREADS><<<static_cast<unsigned>(a->rows), THREADS, 0, stream>>>(__VA_ARGS__);                                       \
        else if (is_short)                                                                                                                 \
            kernel<1, ESPI_WARP><<<espi_blocks(a->rows, THREADS / ESPI_WARP), THREADS, 0, stream>>>(__VA_ARGS__);                          \
        else                                                                                                                               \
            kernel<1, THREADS><<<static_cast<unsigned>(a->rows), THREADS, 0, stream>>>(__VA_ARGS__);                                       \
    } while (0)

esp_status espi_rmsnorm_fwd_cuda(const espi_exec *exec, const espi_rmsnorm_fwd *a) {
    if (a->rows * a->n == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const bool vectors = espi_vectors(a->n, a->y, a->x, a->w);
    LAUNCH(normalise, static_cast<bf16 *>(a->y), static_cast<float *>(a->rstd), static_cast<const bf16 *>(a->x), a->w, a->rows, a->n,
           static_cast<float>(a->eps));
    return ESPI_CUDA_LAUNCHED("RMSNorm");
}

size_t espi_rmsnorm_bwd_scratch_cuda(const espi_exec *exec, const espi_rmsnorm_bwd *a) {
    (void)exec;
    if (a->rows == 0) return 0;
    return espi_room(espi_ceil_div(a->rows, rows_a_chunk(a->rows)) * a->n, sizeof(float));
}

esp_status espi_rmsnorm_bwd_cuda(const espi_exec *exec, const espi_rmsnorm_bwd *a) {
    if (a->rows * a->n == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const bf16 *d_y = static_cast<const bf16 *>(a->d_y), *x = static_cast<const bf16 *>(a->x), *d_add = static_cast<const bf16 *>(a->d_add);
    const float *rstd = static_cast<const float *>(a->rstd);
    if (a->d_w) { /* first: d_x may lie over d_y */
        const int64_t chunk_rows = rows_a_chunk(a->rows), count = espi_ceil_div(a->rows, chunk_rows);
        float *chunks = static_cast<float *>(exec->scratch);
        weight_chunks<<<dim3(espi_blocks(a->n, THREADS), static_cast<unsigned>(count)), THREADS, 0, stream>>>(chunks, d_y, x, rstd, a->rows,
                                                                                                              a->n, chunk_rows);
        add_weight_chunks<<<espi_blocks(a->n, THREADS), THREADS, 0, stream>>>(static_cast<float *>(a->d_w), chunks, count, a->n);
    }
    const bool vectors = espi_vectors(a->n, a->d_x, d_y, x, d_add) && espi_aligned16(a->w);
    LAUNCH(normalise_grad, static_cast<bf16 *>(a->d_x), d_y, x, rstd, d_add, a->w, a->rows, a->n);
    return ESPI_CUDA_LAUNCHED("gradient of RMSNorm");
}
#undef LAUNCH
