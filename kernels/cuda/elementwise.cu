/* Zeroing, sums of two arrays and of rows, clamping, gated activation, and the sum of squares that gradient clipping needs. */
#include "kernels/cuda/cuda.cuh"

namespace {

enum { THREADS = 256, SUMSQ_CHUNK = 4096, SUMSQ_THREADS = 1024 };

/* A value made of one or two others, eight at a time where the arrays allow. */
template <typename F>
__global__ void __launch_bounds__(THREADS) map_vectors(bf16 *out, const bf16 *a, const bf16 *b, int64_t vectors, F f) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= vectors) return;
    const bf16x8 left = reinterpret_cast<const bf16x8 *>(a)[i], right = reinterpret_cast<const bf16x8 *>(b)[i];
    bf16x8 result;
#pragma unroll
    for (int j = 0; j < 8; j++) espi_store(&result.at[j], f(espi_value(left.at[j]), espi_value(right.at[j])));
    reinterpret_cast<bf16x8 *>(out)[i] = result;
}

template <typename F> __global__ void __launch_bounds__(THREADS) map_values(bf16 *out, const bf16 *a, const bf16 *b, int64_t n, F f) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n) espi_store(out + i, f(espi_value(a[i]), espi_value(b[i])));
}

struct sum_of {
    __device__ float operator()(float a, float b) const { return a + b; }
};

struct clamped {
    float limit;
    __device__ float operator()(float x, float) const { return x > limit ? limit : x < -limit ? -limit : x; }
};

struct clamped_grad {
    float limit;
    __device__ float operator()(float d_y, float x) const { return x >= -limit && x <= limit ? d_y : 0; }
};

template <typename F> esp_status map(const espi_exec *exec, void *out, const void *a, const void *b, int64_t n, F f, const char *what) {
    if (n == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    bf16 *o = static_cast<bf16 *>(out);
    const bf16 *x = static_cast<const bf16 *>(a), *y = static_cast<const bf16 *>(b);
    if (espi_vectors(n, out, a, b))
        map_vectors<<<espi_blocks(n / 8, THREADS), THREADS, 0, stream>>>(o, x, y, n / 8, f);
    else
        map_values<<<espi_blocks(n, THREADS), THREADS, 0, stream>>>(o, x, y, n, f);
    return ESPI_CUDA_LAUNCHED(what);
}

/* The block of the first row of x that goes to a row adds all those that do, run by run; those of the others have nothing to do. */
__global__ void __launch_bounds__(THREADS) add_rows(bf16 *out, const bf16 *x, const int32_t *to, int64_t n, int64_t hidden) {
    __shared__ int32_t runs[THREADS];
    const int64_t mine = blockIdx.x;
    const int32_t row = to[mine];
    if (espi_is_seen<THREADS>(to, mine)) return;
    for (int64_t first = mine; first < n; first += THREADS) {
        const int count = espi_list<THREADS>(runs, first, n, [&](int64_t i) { return to[i] == row && (i == 0 || to[i - 1] != row); });
        for (int64_t h = threadIdx.x; count > 0 && h < hidden; h += THREADS) {
            bf16 *at = out + row * hidden + h;
            for (int run = 0; run < count; run++) {
                float sum = espi_value(*at);
                for (int64_t i = runs[run]; i < n && to[i] == row; i++) sum += espi_value(x[i * hidden + h]);
                espi_store(at, sum);
            }
        }
    }
}

__global__ void __launch_bounds__(THREADS) add_parts(float *total, const float *parts, int64_t n, int64_t count) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    float sum = total[i];
    for (int64_t p = 0; p < count; p++) sum += parts[p * n + i];
    total[i] = sum;
}

/* Gate and up of a row as the activation sees them. */
struct glu_terms {
    float g, u, sigma, slope;
    bool gate_passes, up_passes;
};

__device__ glu_terms glu_of(const espi_glu &glu, float g, float u) {
    glu_terms t = {g, u, 0, 1, true, true};
    if (glu.clamped) {
        const float limit = static_cast<float>(glu.limit);
        t.gate_passes = g < limit;
        t.up_passes = u > -limit && u < limit;
        t.g = g > limit ? limit : g;
        t.u = 1 + (u > limit ? limit : u < -limit ? -limit : u);
        t.slope = static_cast<float>(glu.alpha);
    }
    t.sigma = 1 / (1 + expf(-t.slope * t.g));
    return t;
}

/* Element j of row r: where its gate lies, and how far behind it its up. */
__device__ int64_t gate_at(const espi_glu &glu, int64_t row, int64_t j, int64_t width) {
    return row * 2 * width + (glu.interleaved ? 2 * j : j);
}
__device__ int64_t up_behind(const espi_glu &glu, int64_t width) {
    return glu.interleaved ? 1 : width;
}

__global__ void __launch_bounds__(THREADS) glu_forward(bf16 *act, const bf16 *gu, int64_t n, int64_t width, espi_glu glu) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    const int64_t at = gate_at(glu, i / width, i % width, width);
    const glu_terms t = glu_of(glu, espi_value(gu[at]), espi_value(gu[at + up_behind(glu, width)]));
    espi_store(act + i, t.g * t.sigma * t.u);
}

__global__ void __launch_bounds__(THREADS) take_rows(bf16 *out, const bf16 *x, const int32_t *from, int64_t hidden) {
    const int64_t to = blockIdx.x, at = from[to];
    for (int64_t h = threadIdx.x; h < hidden; h += THREADS) out[to * hidden + h] = x[at * hidden + h];
}

__global__ void __launch_bounds__(THREADS)
    glu_backward(bf16 *d_gu, const bf16 *d_act, const bf16 *gu, int64_t n, int64_t width, espi_glu glu) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    const int64_t at = gate_at(glu, i / width, i % width, width), up = up_behind(glu, width);
    const glu_terms t = glu_of(glu, espi_value(gu[at]), espi_value(gu[at + up]));
    const float d = espi_value(d_act[i]);
    espi_store(d_gu + at, t.gate_passes ? d * t.u * t.sigma * (1 + t.slope * t.g * (1 - t.sigma)) : 0);
    espi_store(d_gu + at + up, t.up_passes ? d * t.g * t.sigma : 0);
}

/* blockIdx.y: which of the parts of n values. */
__global__ void __launch_bounds__(THREADS) chunk_squares(double *chunks, const float *x, int64_t n) {
    const int64_t first = static_cast<int64_t>(blockIdx.x) * SUMSQ_CHUNK, end = min(first + SUMSQ_CHUNK, n);
    double sum = 0;
    x += blockIdx.y * n;
    chunks += static_cast<int64_t>(blockIdx.y) * gridDim.x;
    for (int64_t i = first + threadIdx.x; i < end; i += THREADS) sum += static_cast<double>(x[i]) * x[i];
    sum = espi_block_sum<THREADS>(sum);
    if (threadIdx.x == 0) chunks[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(SUMSQ_THREADS) add_chunks(double *out, const double *chunks, int64_t n) {
    double sum = 0;
    chunks += blockIdx.x * n;
    for (int64_t i = threadIdx.x; i < n; i += SUMSQ_THREADS) sum += chunks[i];
    sum = espi_block_sum<SUMSQ_THREADS>(sum);
    if (threadIdx.x == 0) out[blockIdx.x] += sum;
}

} // namespace

esp_status espi_zero_cuda(const espi_exec *exec, const espi_zero *a) {
    if (a->bytes == 0) return ESP_OK;
    return espi_cuda_check(cudaMemsetAsync(a->out, 0, a->bytes, espi_cuda_of(exec)->stream), "zero");
}

esp_status espi_add_cuda(const espi_exec *exec, const espi_add *a) {
    return map(exec, a->out, a->a, a->b, a->n, sum_of{}, "add");
}

esp_status espi_rows_add_cuda(const espi_exec *exec, const espi_rows_add *a) {
    if (a->n * a->hidden == 0) return ESP_OK;
    add_rows<<<static_cast<unsigned>(a->n), THREADS, 0, espi_cuda_of(exec)->stream>>>(
        static_cast<bf16 *>(a->out), static_cast<const bf16 *>(a->x), a->to, a->n, a->hidden);
    return ESPI_CUDA_LAUNCHED("sum of rows");
}

esp_status espi_rows_take_cuda(const espi_exec *exec, const espi_rows_take *a) {
    if (a->n * a->hidden == 0) return ESP_OK;
    take_rows<<<static_cast<unsigned>(a->n), THREADS, 0, espi_cuda_of(exec)->stream>>>(static_cast<bf16 *>(a->out),
                                                                                       static_cast<const bf16 *>(a->x), a->from, a->hidden);
    return ESPI_CUDA_LAUNCHED("copy of rows");
}

esp_status espi_parts_add_cuda(const espi_exec *exec, const espi_parts_add *a) {
    if (a->n * a->n_parts == 0) return ESP_OK;
    add_parts<<<espi_blocks(a->n, THREADS), THREADS, 0, espi_cuda_of(exec)->stream>>>(
        static_cast<float *>(a->total), static_cast<const float *>(a->parts), a->n, a->n_parts);
    return ESPI_CUDA_LAUNCHED("sum of parts");
}

esp_status espi_clamp_fwd_cuda(const espi_exec *exec, const espi_clamp_fwd *a) {
    return map(exec, a->y, a->x, a->x, a->n, clamped{static_cast<float>(a->limit)}, "clamp");
}

esp_status espi_clamp_bwd_cuda(const espi_exec *exec, const espi_clamp_bwd *a) {
    return map(exec, a->d_x, a->d_y, a->x, a->n, clamped_grad{static_cast<float>(a->limit)}, "gradient of clamp");
}

esp_status espi_swiglu_fwd_cuda(const espi_exec *exec, const espi_swiglu_fwd *a) {
    const int64_t n = a->rows * a->width;
    if (n == 0) return ESP_OK;
    glu_forward<<<espi_blocks(n, THREADS), THREADS, 0, espi_cuda_of(exec)->stream>>>(static_cast<bf16 *>(a->act),
                                                                                     static_cast<const bf16 *>(a->gu), n, a->width, a->glu);
    return ESPI_CUDA_LAUNCHED("gated activation");
}

esp_status espi_swiglu_bwd_cuda(const espi_exec *exec, const espi_swiglu_bwd *a) {
    const int64_t n = a->rows * a->width;
    if (n == 0) return ESP_OK;
    glu_backward<<<espi_blocks(n, THREADS), THREADS, 0, espi_cuda_of(exec)->stream>>>(
        static_cast<bf16 *>(a->d_gu), static_cast<const bf16 *>(a->d_act), static_cast<const bf16 *>(a->gu), n, a->width, a->glu);
    return ESPI_CUDA_LAUNCHED("gradient of gated activation");
}

size_t espi_sumsq_scratch_cuda(const espi_exec *exec, const espi_sumsq *a) {
    (void)exec;
    return a->n == 0 ? 0 : espi_room(a->parts * espi_ceil_div(a->n / a->parts, SUMSQ_CHUNK), sizeof(double));
}

esp_status espi_sumsq_cuda(const espi_exec *exec, const espi_sumsq *a) {
    if (a->n == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    double *chunks = static_cast<double *>(exec->scratch);
    const int64_t each = a->n / a->parts;
    const unsigned n = espi_blocks(each, SUMSQ_CHUNK), parts = static_cast<unsigned>(a->parts);
    chunk_squares<<<dim3(n, parts), THREADS, 0, stream>>>(chunks, static_cast<const float *>(a->x), each);
    add_chunks<<<parts, SUMSQ_THREADS, 0, stream>>>(a->out, chunks, n);
    return ESPI_CUDA_LAUNCHED("sum of squares");
}
