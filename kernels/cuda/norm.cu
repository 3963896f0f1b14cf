/* RMSNorm over rows; also QK-norm, whose rows are heads. */
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/dev.cuh"

namespace {

enum { THREADS = 256, FEW_THREADS = 128, HALF_WARP = ESPI_WARP / 2, MANY_ROWS = 1024, ROW_CHUNKS = 256 };

/* N values of a row: eight as words, for single values would take a register each.  Below, GROUP threads share a row: a part of a warp, or the
 * block. */
template <int N> struct values;
template <> struct alignas(16) values<8> {
    uint32_t pair[4];
    __device__ float at(int j) const { return j % 2 ? dev_hi(pair[j / 2]) : dev_lo(pair[j / 2]); }
    template <typename F> __device__ void make(F f) {
#pragma unroll
        for (int j = 0; j < 4; j++) pair[j] = dev_bf16x2(f(2 * j), f(2 * j + 1));
    }
};
template <> struct values<1> {
    bf16 one;
    __device__ float at(int) const { return espi_value(one); }
    template <typename F> __device__ void make(F f) { espi_store(&one, f(0)); }
};

/* The same number in f32. */
template <int N> struct alignas(N < 4 ? 4 : 16) floats { float at[N]; };

/* Threads of a block: a warp with a row of its own needs no others. */
template <int GROUP> constexpr int block_of = GROUP == THREADS ? THREADS : FEW_THREADS;

template <int GROUP> __device__ float group_sum(float x) {
    if constexpr (GROUP == THREADS) {
        return espi_block_sum<THREADS>(x);
    } else {
        for (int lane = GROUP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
        return x;
    }
}

/* A thread's vectors of a row: the first EACH are on their way at once and stay in registers between the two passes.  No row: zeros. */
template <int N, int GROUP, int EACH> struct reader {
    const values<N> *row;
    values<N> held[EACH];
    __device__ void open(const bf16 *from, int lane, int vectors) {
        row = reinterpret_cast<const values<N> *>(from);
#pragma unroll
        for (int e = 0; e < EACH; e++) held[e] = from && lane + e * GROUP < vectors ? row[lane + e * GROUP] : values<N>{};
    }
    __device__ values<N> at(int i) const {
        return row ? row[i] : values<N>{};
    }
};

/* f(e, i) of a lane's vectors i of a row: e is the place of those that are held, EACH that of others. */
template <int GROUP, int EACH, typename F> __device__ void each_vector(int lane, int vectors, F f) {
#pragma unroll
    for (int e = 0; e < EACH; e++)
        if (lane + e * GROUP < vectors) f(e, lane + e * GROUP);
    for (int i = lane + EACH * GROUP; i < vectors; i += GROUP) f(EACH, i);
}

/* A group has ROWS rows side by side.  In the place of a row that there is not, it does the last one again and keeps silent, for its lanes are
 * needed. */
template <int N, int GROUP, int EACH, int ROWS>
__global__ void __launch_bounds__(block_of<GROUP>, GROUP == THREADS ? 4
                                                   : EACH <= 8      ? 6
                                                                    : 5)
    normalise(bf16 *y, float *rstd, const bf16 *x, const float *w, int64_t rows, int64_t n, float eps) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * (block_of<GROUP> / GROUP) + threadIdx.x / GROUP) * ROWS;
    const int lane = static_cast<int>(threadIdx.x) % GROUP, vectors = static_cast<int>(n) / N;
    const floats<N> *weights = reinterpret_cast<const floats<N> *>(w);
    reader<N, GROUP, EACH> from[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) from[k].open(x + min(first + k, rows - 1) * n, lane, vectors);
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        float squares = 0;
        each_vector<GROUP, EACH>(lane, vectors, [&](int e, int i) {
            const values<N> v = e < EACH ? from[k].held[e] : from[k].at(i);
#pragma unroll
            for (int j = 0; j < N; j++) squares += v.at(j) * v.at(j);
        });
        squares = group_sum<GROUP>(squares);
        if (first + k >= rows) continue;
        const float r = 1 / sqrtf(squares / static_cast<float>(n) + eps);
        values<N> *to = reinterpret_cast<values<N> *>(y + (first + k) * n);
        each_vector<GROUP, EACH>(lane, vectors, [&](int e, int i) {
            values<N> v = e < EACH ? from[k].held[e] : from[k].at(i);
            const floats<N> weight = weights[i];
            v.make([&](int j) { return weight.at[j] * (v.at(j) * r); });
            to[i] = v;
        });
        if (lane == 0) rstd[first + k] = r;
    }
}

template <int N, int GROUP, int EACH, int ROWS>
__global__ void __launch_bounds__(block_of<GROUP>, GROUP == THREADS ? 3
                                                   : EACH <= 2      ? 5
                                                   : EACH <= 8      ? 3
                                                                    : 2)
    normalise_grad(bf16 *d_x, const bf16 *d_y, const bf16 *x, const float *rstd, const bf16 *d_add, const float *w, int64_t rows,
                   int64_t n) {
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * (block_of<GROUP> / GROUP) + threadIdx.x / GROUP) * ROWS;
    const int lane = static_cast<int>(threadIdx.x) % GROUP, vectors = static_cast<int>(n) / N;
    const floats<N> *weights = reinterpret_cast<const floats<N> *>(w);
    reader<N, GROUP, EACH> from[ROWS], above[ROWS], beside[ROWS];
    float rs[ROWS];
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        const int64_t row = min(first + k, rows - 1);
        rs[k] = rstd[row];
        from[k].open(x + row * n, lane, vectors);
        above[k].open(d_y + row * n, lane, vectors);
        beside[k].open(d_add ? d_add + row * n : nullptr, lane, vectors);
    }
#pragma unroll
    for (int k = 0; k < ROWS; k++) {
        const float r = rs[k];
        float mean = 0;
        each_vector<GROUP, EACH>(lane, vectors, [&](int e, int i) {
            const values<N> g = e < EACH ? above[k].held[e] : above[k].at(i), v = e < EACH ? from[k].held[e] : from[k].at(i);
            const floats<N> weight = weights[i];
#pragma unroll
            for (int j = 0; j < N; j++) mean += g.at(j) * weight.at[j] * (v.at(j) * r);
        });
        mean = group_sum<GROUP>(mean) / static_cast<float>(n);
        if (first + k >= rows) continue;
        values<N> *to = reinterpret_cast<values<N> *>(d_x + (first + k) * n);
        each_vector<GROUP, EACH>(lane, vectors, [&](int e, int i) {
            const values<N> g = e < EACH ? above[k].held[e] : above[k].at(i), v = e < EACH ? from[k].held[e] : from[k].at(i);
            const values<N> add = e < EACH ? beside[k].held[e] : beside[k].at(i);
            const floats<N> weight = weights[i];
            values<N> d;
            d.make([&](int j) { return r * (g.at(j) * weight.at[j] - v.at(j) * r * mean) + add.at(j); });
            to[i] = d;
        });
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

#define LAUNCH_AS(kernel, n, group, each, side, ...)                                                                                       \
    kernel<n, group, each, side><<<espi_blocks(a->rows, block_of<group> / (group) * (side)), block_of<group>, 0, stream>>>(__VA_ARGS__)

/* A row that a warp can hold needs no meeting of the block; few rows, as in decoding, want all threads.  side: how many short rows a group has. */
#define LAUNCH(kernel, side, ...)                                                                                                          \
    do {                                                                                                                                   \
        const bool is_many = a->rows >= MANY_ROWS;                                                                                         \
        if (vectors && a->n <= 8 * HALF_WARP)                                                                                              \
            LAUNCH_AS(kernel, 8, HALF_WARP, 1, side, __VA_ARGS__);                                                                         \
        else if (vectors && a->n <= 16 * ESPI_WARP)                                                                                        \
            LAUNCH_AS(kernel, 8, ESPI_WARP, 2, (side) / 2, __VA_ARGS__);                                                                   \
        else if (vectors && is_many && a->n <= 64 * ESPI_WARP)                                                                             \
            LAUNCH_AS(kernel, 8, ESPI_WARP, 8, 1, __VA_ARGS__);                                                                            \
        else if (vectors && is_many && a->n <= 96 * ESPI_WARP)                                                                             \
            LAUNCH_AS(kernel, 8, ESPI_WARP, 12, 1, __VA_ARGS__);                                                                           \
        else if (vectors)                                                                                                                  \
            LAUNCH_AS(kernel, 8, THREADS, 1, 1, __VA_ARGS__);                                                                              \
        else if (a->n <= 16 * ESPI_WARP)                                                                                                   \
            LAUNCH_AS(kernel, 1, ESPI_WARP, 1, 1, __VA_ARGS__);                                                                            \
        else                                                                                                                               \
            LAUNCH_AS(kernel, 1, THREADS, 1, 1, __VA_ARGS__);                                                                              \
    } while (0)

esp_status espi_rmsnorm_fwd_cuda(const espi_exec *exec, const espi_rmsnorm_fwd *a) {
    if (a->rows * a->n == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const bool vectors = espi_vectors(a->n, a->y, a->x, a->w);
    LAUNCH(normalise, 4, static_cast<bf16 *>(a->y), static_cast<float *>(a->rstd), static_cast<const bf16 *>(a->x), a->w, a->rows, a->n,
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
    LAUNCH(normalise_grad, 2, static_cast<bf16 *>(a->d_x), d_y, x, rstd, d_add, a->w, a->rows, a->n);
    return ESPI_CUDA_LAUNCHED("gradient of RMSNorm");
}
#undef LAUNCH
#undef LAUNCH_AS
