/* RMSNorm over rows; also QK-norm, whose rows are heads. */
#include "kernels/cuda/cuda.cuh"

namespace {

enum { THREADS = 256, WARPS = THREADS / ESPI_WARP, SHORT_ROW = 512, ROW_CHUNKS = 256 };

/* N values at a time; GROUP threads share a row: a warp, or the block. */
template <int N> struct alignas(2 * N) pack { bf16 at[N]; };

template <int GROUP> __device__ float group_sum(float x) {
    if constexpr (GROUP == ESPI_WARP)
        return espi_warp_sum(x);
    else
        return espi_block_sum<THREADS>(x);
}

template <int N, int GROUP>
__global__ void __launch_bounds__(THREADS)
    normalise(bf16 *y, float *rstd, const bf16 *x, const float *w, int64_t rows, int64_t n, double eps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / GROUP) + threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
    if (row >= rows) return;
    const pack<N> *from = reinterpret_cast<const pack<N> *>(x + row * n);
    pack<N> *to = reinterpret_cast<pack<N> *>(y + row * n);
    float squares = 0;
    for (int64_t i = lane; i < n / N; i += GROUP) {
        const pack<N> v = from[i];
#pragma unroll
        for (int j = 0; j < N; j++) squares += espi_value(v.at[j]) * espi_value(v.at[j]);
    }
    squares = group_sum<GROUP>(squares);
    const float r = static_cast<float>(1 / sqrt(static_cast<double>(squares) / static_cast<double>(n) + eps));
    for (int64_t i = lane; i < n / N; i += GROUP) {
        pack<N> v = from[i];
#pragma unroll
        for (int j = 0; j < N; j++) espi_store(&v.at[j], w[i * N + j] * (espi_value(v.at[j]) * r));
        to[i] = v;
    }
    if (lane == 0) rstd[row] = r;
}

template <int N, int GROUP>
__global__ void __launch_bounds__(THREADS) normalise_grad(bf16 *d_x, const bf16 *d_y, const bf16 *x, const float *rstd, const bf16 *d_add,
                                                          const float *w, int64_t rows, int64_t n) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / GROUP) + threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
    if (row >= rows) return;
    const int64_t at = row * n;
    const float r = rstd[row];
    float mean = 0;
    for (int64_t i = lane; i < n / N; i += GROUP) {
        const pack<N> g = reinterpret_cast<const pack<N> *>(d_y + at)[i], v = reinterpret_cast<const pack<N> *>(x + at)[i];
#pragma unroll
        for (int j = 0; j < N; j++) mean += espi_value(g.at[j]) * w[i * N + j] * (espi_value(v.at[j]) * r);
    }
    mean = group_sum<GROUP>(mean) / static_cast<float>(n);
    for (int64_t i = lane; i < n / N; i += GROUP) {
        pack<N> g = reinterpret_cast<const pack<N> *>(d_y + at)[i], v = reinterpret_cast<const pack<N> *>(x + at)[i], add = {};
        if (d_add) add = reinterpret_cast<const pack<N> *>(d_add + at)[i];
#pragma unroll
        for (int j = 0; j < N; j++)
            espi_store(&g.at[j], r * (espi_value(g.at[j]) * w[i * N + j] - espi_value(v.at[j]) * r * mean) + espi_value(add.at[j]));
        reinterpret_cast<pack<N> *>(d_x + at)[i] = g;
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
        const bool is_short = a->n <= SHORT_ROW;                                                                                           \
        const unsigned blocks = is_short ? espi_blocks(a->rows, WARPS) : static_cast<unsigned>(a->rows);                                   \
        if (vectors && is_short)                                                                                                           \
            kernel<8, ESPI_WARP><<<blocks, THREADS, 0, stream>>>(__VA_ARGS__);                                                             \
        else if (vectors)                                                                                                                  \
            kernel<8, THREADS><<<blocks, THREADS, 0, stream>>>(__VA_ARGS__);                                                               \
        else if (is_short)                                                                                                                 \
            kernel<1, ESPI_WARP><<<blocks, THREADS, 0, stream>>>(__VA_ARGS__);                                                             \
        else                                                                                                                               \
            kernel<1, THREADS><<<blocks, THREADS, 0, stream>>>(__VA_ARGS__);                                                               \
    } while (0)

esp_status espi_rmsnorm_fwd_cuda(const espi_exec *exec, const espi_rmsnorm_fwd *a) {
    if (a->rows * a->n == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const bool vectors = espi_vectors(a->n, a->y, a->x);
    LAUNCH(normalise, static_cast<bf16 *>(a->y), static_cast<float *>(a->rstd), static_cast<const bf16 *>(a->x), a->w, a->rows, a->n,
           a->eps);
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
    const bool vectors = espi_vectors(a->n, a->d_x, d_y, x, d_add);
    LAUNCH(normalise_grad, static_cast<bf16 *>(a->d_x), d_y, x, rstd, d_add, a->w, a->rows, a->n);
    return ESPI_CUDA_LAUNCHED("gradient of RMSNorm");
}
#undef LAUNCH
