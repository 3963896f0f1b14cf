/* Rotary position embedding, half-split: the table, the rotation, and its transpose. */
#include "kernels/cuda/cuda.cuh"

#define PI 3.14159265358979323846

namespace {

enum { THREADS = 256, FREQUENCIES = 128 };

/* inv_freq lies in host memory: it travels with the launch, some columns at a time. */
struct frequencies {
    double at[FREQUENCIES];
};

__global__ void __launch_bounds__(THREADS)
    fill_table(float *cosines, float *sines, const int32_t *positions, const __grid_constant__ frequencies inv_freq, double factor,
               int64_t tokens, int64_t half, int64_t first, int64_t columns) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= tokens * columns) return;
    const int64_t t = i / columns, j = i % columns;
    double sine, cosine;
    sincospi(positions[t] * inv_freq.at[j] / PI, &sine, &cosine); /* needs no table in local memory to reduce a large angle */
    cosines[t * half + first + j] = static_cast<float>(factor * cosine);
    sines[t * half + first + j] = static_cast<float>(factor * sine);
}

/* N pairs of one head of one token.  direction 1: rotate; -1: the transpose. */
template <int N>
__global__ void __launch_bounds__(THREADS)
    rotate(bf16 *x, const float *cosines, const float *sines, int64_t n, int64_t heads, int64_t half, int64_t head_dim, float direction) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, groups = half / N;
    if (i >= n) return;
    const int64_t row = i / groups, j = i % groups * N, at = row / heads * half + j;
    bf16s<N> *low_at = reinterpret_cast<bf16s<N> *>(x + row * head_dim + j),
             *high_at = reinterpret_cast<bf16s<N> *>(x + row * head_dim + half + j);
    bf16s<N> low = *low_at, high = *high_at;
#pragma unroll
    for (int k = 0; k < N; k++) {
        const float l = espi_value(low.at[k]), h = espi_value(high.at[k]), c = cosines[at + k], s = direction * sines[at + k];
        espi_store(&low.at[k], l * c - h * s);
        espi_store(&high.at[k], h * c + l * s);
    }
    *low_at = low;
    *high_at = high;
}

esp_status rotate_all(const espi_exec *exec, const espi_rope *a, float direction) {
    const int64_t pairs = a->tokens * a->heads * a->half;
    if (pairs == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    bf16 *x = static_cast<bf16 *>(a->x);
    const float *cosines = static_cast<const float *>(a->cos), *sines = static_cast<const float *>(a->sin);
    if (a->half % 8 == 0 && espi_vectors(a->head_dim, x))
        rotate<8><<<espi_blocks(pairs / 8, THREADS), THREADS, 0, stream>>>(x, cosines, sines, pairs / 8, a->heads, a->half, a->head_dim,
                                                                           direction);
    else
        rotate<1><<<espi_blocks(pairs, THREADS), THREADS, 0, stream>>>(x, cosines, sines, pairs, a->heads, a->half, a->head_dim, direction);
    return ESPI_CUDA_LAUNCHED("rotary embedding");
}

} // namespace

esp_status espi_rope_table_cuda(const espi_exec *exec, const espi_rope_table *a) {
    if (a->tokens == 0) return ESP_OK;
    for (int64_t first = 0; first < a->half; first += FREQUENCIES) {
        const int64_t left = a->half - first, most = FREQUENCIES, columns = left < most ? left : most;
        frequencies inv_freq = {};
        for (int64_t j = 0; j < columns; j++) inv_freq.at[j] = a->inv_freq[first + j];
        fill_table<<<espi_blocks(a->tokens * columns, THREADS), THREADS, 0, espi_cuda_of(exec)->stream>>>(
            static_cast<float *>(a->cos), static_cast<float *>(a->sin), a->positions, inv_freq, a->factor, a->tokens, a->half, first,
            columns);
    }
    return ESPI_CUDA_LAUNCHED("table of the rotary embedding");
}

esp_status espi_rope_fwd_cuda(const espi_exec *exec, const espi_rope *a) {
    return rotate_all(exec, a, 1);
}

esp_status espi_rope_bwd_cuda(const espi_exec *exec, const espi_rope *a) {
    return rotate_all(exec, a, -1);
}
