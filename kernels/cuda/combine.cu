/* From routed rows back to tokens: the weighted sum of a token's rows, and the transpose of the gather. */
#include "kernels/cuda/cuda.cuh"

namespace {

enum { THREADS = 256 };

/* to_t = add_t + sum over the slots of weight * rows[slot_row], in slot order; no weights: 1. */
template <int N>
__global__ void __launch_bounds__(THREADS)
    sum_slots(bf16 *to, const bf16 *rows, const bf16 *add, const float *row_weight, const int32_t *slot_row, int top_k, int64_t hidden) {
    const int64_t t = blockIdx.x, vectors = hidden / N;
    for (int64_t h = threadIdx.x; h < vectors; h += THREADS) {
        float sum[N] = {};
        if (add) {
            const bf16s<N> v = reinterpret_cast<const bf16s<N> *>(add + t * hidden)[h];
#pragma unroll
            for (int j = 0; j < N; j++) sum[j] = espi_value(v.at[j]);
        }
#pragma unroll 4
        for (int k = 0; k < top_k; k++) {
            const int64_t row = slot_row[t * top_k + k];
            const float weight = row_weight ? row_weight[row] : 1;
            const bf16s<N> v = reinterpret_cast<const bf16s<N> *>(rows + row * hidden)[h];
#pragma unroll
            for (int j = 0; j < N; j++) sum[j] += weight * espi_value(v.at[j]);
        }
        bf16s<N> result;
#pragma unroll
        for (int j = 0; j < N; j++) espi_store(&result.at[j], sum[j]);
        reinterpret_cast<bf16s<N> *>(to + t * hidden)[h] = result;
    }
}

__global__ void __launch_bounds__(THREADS)
    gather_weights(float *d_weight, const float *d_row_weight, const int32_t *slot_row, int64_t slots) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < slots) d_weight[i] = d_row_weight[slot_row[i]];
}

void launch_sum(const espi_exec *exec, void *to, const void *rows, const void *add, const void *weights, const espi_routing *r,
                int64_t hidden) {
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const unsigned blocks = static_cast<unsigned>(r->tokens);
    bf16 *out = static_cast<bf16 *>(to);
    const bf16 *y = static_cast<const bf16 *>(rows), *plus = static_cast<const bf16 *>(add);
    const float *row_weight = static_cast<const float *>(weights);
    const int top_k = static_cast<int>(r->top_k);
    if (espi_vectors(hidden, to, rows, add))
        sum_slots<8><<<blocks, THREADS, 0, stream>>>(out, y, plus, row_weight, r->slot_row, top_k, hidden);
    else
        sum_slots<1><<<blocks, THREADS, 0, stream>>>(out, y, plus, row_weight, r->slot_row, top_k, hidden);
}

} // namespace

esp_status espi_combine_fwd_cuda(const espi_exec *exec, const espi_combine_fwd *a) {
    if (a->routing.tokens * a->hidden == 0) return ESP_OK;
    launch_sum(exec, a->out, a->y, a->add, a->routing.row_weight, &a->routing, a->hidden);
    return ESPI_CUDA_LAUNCHED("combine");
}

esp_status espi_combine_bwd_cuda(const espi_exec *exec, const espi_combine_bwd *a) {
    const int64_t slots = a->routing.tokens * a->routing.top_k;
    if (slots * a->hidden == 0) return ESP_OK;
    launch_sum(exec, a->d_x, a->d_rows, NULL, NULL, &a->routing, a->hidden);
    gather_weights<<<espi_blocks(slots, THREADS), THREADS, 0, espi_cuda_of(exec)->stream>>>(
        static_cast<float *>(a->d_weight), static_cast<const float *>(a->d_row_weight), a->routing.slot_row, slots);
    return ESPI_CUDA_LAUNCHED("transpose of combine");
}
