/* Token embedding: a gather, and the scatter that is its transpose. */
#include "kernels/cuda/cuda.cuh"

namespace {

enum { THREADS = 256 };

__global__ void __launch_bounds__(THREADS) gather(bf16 *out, const int32_t *ids, const void *table, esp_dtype dtype, int64_t hidden) {
    const int64_t from = ids[blockIdx.x] * hidden, to = blockIdx.x * hidden;
    for (int64_t h = threadIdx.x; h < hidden; h += THREADS) espi_store(out + to + h, espi_plain_cuda(table, dtype, from + h));
}

__global__ void __launch_bounds__(THREADS) gather_vectors(bf16x8 *out, const int32_t *ids, const bf16x8 *table, int64_t vectors) {
    const int64_t from = ids[blockIdx.x] * vectors, to = blockIdx.x * vectors;
    for (int64_t h = threadIdx.x; h < vectors; h += THREADS) out[to + h] = table[from + h];
}

/* The block of an id's first token adds all its tokens, in order; those of the others have nothing to do. */
__global__ void __launch_bounds__(THREADS) scatter(float *d_table, const bf16 *d_out, const int32_t *ids, int64_t tokens, int64_t hidden) {
    __shared__ int32_t same[THREADS];
    const int64_t mine = blockIdx.x;
    const int32_t id = ids[mine];
    if (espi_is_seen<THREADS>(ids, mine)) return;
    float *row = d_table + id * hidden;
    for (int64_t first = mine; first < tokens; first += THREADS) {
        const int n = espi_list<THREADS>(same, first, tokens, [&](int64_t t) { return ids[t] == id; });
        for (int64_t h = threadIdx.x; n > 0 && h < hidden; h += THREADS) {
            float sum = row[h];
            for (int i = 0; i < n; i++) sum += espi_value(d_out[same[i] * hidden + h]);
            row[h] = sum;
        }
    }
}

} // namespace

esp_status espi_embed_fwd_cuda(const espi_exec *exec, const espi_embed_fwd *a) {
    const int64_t hidden = a->table.cols;
    if (a->tokens * hidden == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const unsigned blocks = static_cast<unsigned>(a->tokens);
    if (a->table.dtype == ESP_BF16 && espi_vectors(hidden, a->out, a->table.data))
        gather_vectors<<<blocks, THREADS, 0, stream>>>(static_cast<bf16x8 *>(a->out), a->ids, static_cast<const bf16x8 *>(a->table.data),
                                                       hidden / 8);
    else
        gather<<<blocks, THREADS, 0, stream>>>(static_cast<bf16 *>(a->out), a->ids, a->table.data, a->table.dtype, hidden);
    return ESPI_CUDA_LAUNCHED("embedding");
}

esp_status espi_embed_bwd_cuda(const espi_exec *exec, const espi_embed_bwd *a) {
    if (a->tokens * a->hidden == 0) return ESP_OK;
    scatter<<<static_cast<unsigned>(a->tokens), THREADS, 0, espi_cuda_of(exec)->stream>>>(
        static_cast<float *>(a->d_table), static_cast<const bf16 *>(a->d_out), a->ids, a->tokens, a->hidden);
    return ESPI_CUDA_LAUNCHED("gradient of embedding");
}
