/* What the kernels of attention share: where the rows of a sequence are, which tile of it a block works on, and what its rows see. */
#ifndef ESPI_KERNELS_CUDA_ATTENTION_CUH
#define ESPI_KERNELS_CUDA_ATTENTION_CUH

#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/dev.cuh"

namespace {

enum {
    KEYS = 64 /* a tile of keys */
};

/* ---- Where things are ---- */

/* A sequence's queries, and the keys they see: `prefix` that it shares with others, then its own, in places counted through. */
struct sequence {
    int64_t first_query, first_key, first_prefix; /* rows of q, and twice of k */
    int queries, keys, prefix;                    /* keys: with the prefix */
    int before;                                   /* keys before the first query's own */
    __device__ int64_t key_row(int place) const { return place < prefix ? first_prefix + place : first_key + place - prefix; }
};

__device__ int prefix_of(const espi_spans &spans, int s) {
    return spans.prefix_len ? spans.prefix_len[s] : 0;
}

__device__ sequence sequence_of(const espi_spans &spans, int s) {
    sequence q;
    q.first_query = spans.cu_q[s];
    q.queries = spans.cu_q[s + 1] - spans.cu_q[s];
    q.prefix = prefix_of(spans, s);
    q.first_prefix = q.prefix ? spans.prefix_start[s] : 0;
    q.first_key = spans.k_start[s];
    q.keys = q.prefix + spans.k_len[s];
    q.before = q.keys - q.queries;
    return q;
}

/* Which sequence tile number `tile` belongs to, sequences having ceil(queries * per_query / size) tiles each; its number there, from the last
 * down: later queries see more keys.  A whole warp calls it; false: there are fewer tiles. */
__device__ bool find_tile(const espi_spans &spans, int per_query, int size, int tile, bool from_last, int *seq, int *index) {
    const int lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    for (int first = 0; first < spans.n_seqs; first += ESPI_WARP) {
        const int s = first + lane;
        const int own = s < spans.n_seqs ? ((spans.cu_q[s + 1] - spans.cu_q[s]) * per_query + size - 1) / size : 0;
        const int sum = espi_warp_sum_upto(own, lane);
        const unsigned behind = __ballot_sync(0xffffffffu, sum > tile);
        if (behind) {
            const int chosen = __ffs(static_cast<int>(behind)) - 1;
            const int all = __shfl_sync(0xffffffffu, own, chosen), at = tile - (__shfl_sync(0xffffffffu, sum, chosen) - all);
            *seq = first + chosen;
            *index = from_last ? all - 1 - at : at;
            return true;
        }
        tile -= __shfl_sync(0xffffffffu, sum, ESPI_WARP - 1);
    }
    return false;
}

/* The rows of a group that one block of threads works on. */
struct row_tile {
    sequence s;
    int first, end;         /* rows m, those of the sequence */
    int group, head, heads; /* heads head .. head+group-1 of `heads` */
    __device__ int token(int row) const { return (first + row) / group; }
    /* The row's place among all [tokens, heads]; -1: behind the end. */
    __device__ int64_t place(int row) const {
        const int m = first + row;
        return m < end ? (s.first_query + m / group) * heads + head + m % group : -1;
    }
};

/* Keys that the tokens first..last see: [begin, end). */
struct key_range {
    int begin, end;
};

__device__ key_range keys_of(const sequence &s, int first, int last, int64_t window) {
    const int64_t begin = window > 0 ? s.before + first - window + 1 : 0;
    return {static_cast<int>(begin > 0 ? begin : 0), min(s.before + last + 1, s.keys)};
}

/* Do all rows, the last token of which is `last`, see the keys key .. key + n - 1? */
__device__ bool sees_all(const row_tile &rows, int key, int n, int last, int window) {
    return key + n - 1 <= rows.s.before + rows.token(0) && key > rows.s.before + last - window;
}

} // namespace

/* attention_wgmma.cu, for a Hopper GPU: the forward, and the backward's two passes.  parts: as key_grads in attention.cu. */
template <int D> esp_status espi_attention_fwd_wgmma(const espi_exec *exec, const espi_attention_fwd *a);
template <int D>
esp_status espi_attention_bwd_wgmma(const espi_exec *exec, const espi_attention_bwd *a, const float *delta, float *d_k_parts,
                                    float *d_v_parts, int64_t splits);

#endif
