/* The key-value cache, and causal grouped-query attention over packed sequences, without a matrix of scores: the forward is an online softmax,
 * the backward makes each score again from the saved log-sum-exp, once where queries are summed for a key and once where keys are summed for a
 * query.
 *
 * The query heads that share a kv head are packed: row m of a sequence is token m / group, head m % group of the group, so that keys and values
 * are read once for all of them, in decoding too.  Heads of 64 and 128 values go through the tensor cores; a general kernel takes the others. */
#include "kernels/cuda/attention.cuh"

namespace {

enum {
    THREADS = 256,
    BWD_ROWS = 32,    /* query rows that meet a tile of keys at once in the backward's sum over queries */
    DECODE_KEYS = 32, /* a tile of keys of a single warp: small, so that many warps share a multiprocessor */
    MANY_TILES = 1024,
    MOST_PARTS = 32,
    SUM_WARPS = 8
};

/* ---- Tiles in shared memory: rows of D values, 16-byte piece c of row r at c ^ (r & 7) ---- */

template <int D> __device__ uint32_t place_of(uint32_t tile, int row, int piece) {
    return tile + static_cast<uint32_t>(row * D * 2 + ((piece ^ (row & 7)) * 16));
}

/* ROWS rows of a matrix: row r comes from address(r), or is zero where that is NULL.  Asynchronous. */
template <int D, int ROWS, int BLOCK, typename F> __device__ void load_tile(uint32_t tile, F address, const void *anything) {
    constexpr int pieces = D / 8;
#pragma unroll 2 /* more would not fit the registers */
    for (int i = 0; i < ROWS * pieces / BLOCK; i++) {
        const int at = i * BLOCK + static_cast<int>(threadIdx.x), row = at / pieces, piece = at % pieces;
        const bf16 *from = address(row);
        dev_copy16_or_zero(place_of<D>(tile, row, piece), from ? static_cast<const void *>(from + piece * 8) : anything, from ? 16 : 0);
    }
}

/* Where a lane reads the operands of a product: `across` rows, then pieces.  Piece 2 k + .. of the same rows stands at (address ^ 32 k), for
 * a tile is aligned to 256 bytes. */
template <int D> __device__ uint32_t operand_at(uint32_t tile, int row, bool across) {
    const int lane = static_cast<int>(threadIdx.x) % ESPI_WARP, low = lane / 8 % 2, high = lane / 16;
    return place_of<D>(tile, row + (across ? low : high) * 8 + lane % 8, across ? high : low);
}

/* product[n][..] += rows row.. of `left` times rows 0.. of `right`, over all D values. */
template <int D, int TILES> __device__ void multiply_rows(float (&product)[TILES][4], uint32_t left, int row, uint32_t right) {
    const uint32_t left_at = operand_at<D>(left, row, true), right_at = operand_at<D>(right, 0, false);
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const uint4 a = dev_ldmatrix(left_at ^ (k * 32));
#pragma unroll
        for (int n = 0; n < TILES / 2; n++) {
            const uint4 b = dev_ldmatrix((right_at ^ (k * 32)) + n * 16 * D * 2);
            dev_mma(product[2 * n], a.x, a.y, a.z, a.w, b.x, b.y);
            dev_mma(product[2 * n + 1], a.x, a.y, a.z, a.w, b.z, b.w);
        }
    }
}

/* sum[d][..] += weights [16, 8 TILES] (as multiply_rows leaves them) times the rows of `right`. */
template <int D, int TILES> __device__ void multiply_across(float (&sum)[D / 8][4], const float (&weights)[TILES][4], uint32_t right) {
    const uint32_t right_at = operand_at<D>(right, 0, true);
#pragma unroll
    for (int k = 0; k < TILES / 2; k++) {
        const float(&even)[4] = weights[2 * k], (&odd)[4] = weights[2 * k + 1];
        const uint32_t a0 = dev_bf16x2(even[0], even[1]), a1 = dev_bf16x2(even[2], even[3]), a2 = dev_bf16x2(odd[0], odd[1]),
                       a3 = dev_bf16x2(odd[2], odd[3]);
#pragma unroll
        for (int d = 0; d < D / 16; d++) {
            const uint4 b = dev_ldmatrix_trans((right_at ^ (d * 32)) + k * 16 * D * 2);
            dev_mma(sum[2 * d], a0, a1, a2, a3, b.x, b.y);
            dev_mma(sum[2 * d + 1], a0, a1, a2, a3, b.z, b.w);
        }
    }
}

__device__ uint32_t *word_at(uint32_t address) {
    return static_cast<uint32_t *>(__cvta_shared_to_generic(address));
}

/* Writes a warp's 16 rows of sums to its rows of a tile as bf16, then each row to address(row) in whole vectors. */
template <int D, typename F>
__device__ void store_rows(uint32_t tile, int row, const float (&sum)[D / 8][4], float low, float high, F address) {
    const int lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
#pragma unroll
    for (int d = 0; d < D / 8; d++) {
        *word_at(place_of<D>(tile, row + lane / 4, d) + lane % 4 * 4) = dev_bf16x2(sum[d][0] * low, sum[d][1] * low);
        *word_at(place_of<D>(tile, row + lane / 4 + 8, d) + lane % 4 * 4) = dev_bf16x2(sum[d][2] * high, sum[d][3] * high);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * D / 8 / ESPI_WARP; i++) {
        const int at = i * ESPI_WARP + lane, r = row + at / (D / 8), piece = at % (D / 8);
        bf16 *to = address(r);
        if (to) *reinterpret_cast<uint4 *>(to + piece * 8) = dev_load_shared(place_of<D>(tile, r, piece));
    }
    __syncwarp();
}

/* ---- Forward ---- */

/* seen: the last key that each of the thread's two rows sees. */
template <int TILES> __device__ void mask_keys(float (&score)[TILES][4], const int (&seen)[2], int first_key, int window) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int key = first_key + n * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
            if (key > seen[i / 2] || key <= seen[i / 2] - window) score[n][i] = -INFINITY;
        }
    }
}

template <int D, int WARPS, int TILE> constexpr int forward_bytes() {
    return (16 * WARPS + 4 * TILE) * D * 2;
}

/* A part of the keys, where they are split among blocks: sums that are not yet divided go to `out` [count][tokens, heads, D] and what to divide
 * them by, relative to which maximum, to `sums`.  count 1: all of them, the result goes where it belongs. */
struct key_part {
    int index, count;
    float *out;
    float2 *sums;
};

template <int D, int WARPS, int TILE>
__device__ void attend(const espi_attention_fwd &a, const row_tile &rows, int kv_head, const key_part &part, uint32_t shared) {
    constexpr int block = WARPS * ESPI_WARP;
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const uint32_t q_tile = shared, k_tiles = q_tile + 16 * WARPS * D * 2, v_tiles = k_tiles + 2 * TILE * D * 2;
    const bf16 *q = static_cast<const bf16 *>(a.q), *k = static_cast<const bf16 *>(a.k), *v = static_cast<const bf16 *>(a.v);
    const int last = (min(rows.first + 16 * WARPS, rows.end) - 1) / rows.group;
    const key_range range = keys_of(rows.s, rows.token(0), last, a.window);
    const int all_tiles = (range.end + TILE - 1) / TILE - range.begin / TILE, share = (all_tiles + part.count - 1) / part.count;
    const int first_tile = range.begin / TILE + part.index * share,
              end_tile = range.begin / TILE + min((part.index + 1) * share, all_tiles);

    const auto load_keys = [&](int tile) {
        const int stage = tile % 2;
        const auto row_of = [&](const bf16 *from, int row) -> const bf16 * {
            const int key = tile * TILE + row;
            return key < rows.s.keys ? from + (rows.s.key_row(key) * a.kv_heads + kv_head) * D : nullptr;
        };
        load_tile<D, TILE, block>(
            k_tiles + stage * TILE * D * 2, [&](int row) { return row_of(k, row); }, k);
        load_tile<D, TILE, block>(
            v_tiles + stage * TILE * D * 2, [&](int row) { return row_of(v, row); }, v);
        dev_copy_commit();
    };
    load_tile<D, 16 * WARPS, block>(
        q_tile,
        [&](int row) -> const bf16 * {
            const int64_t place = rows.place(row);
            return place >= 0 ? q + place * D : nullptr;
        },
        q);
    load_keys(first_tile);

    const float scale = static_cast<float>(a.scale) * LOG2_E;
    float out[D / 8][4] = {}, most[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
    int seen[2]; /* the last key of this thread's two rows */
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = warp * 16 + lane / 4 + h * 8;
        seen[h] = rows.s.before + rows.token(row);
        if (a.sinks && part.index == 0 && rows.place(row) >= 0) {
            most[h] = a.sinks[rows.head + (rows.first + row) % rows.group] * LOG2_E;
            sum[h] = lane % 4 == 0 ? 1 : 0;
        }
    }
    const int window = a.window > 0 && a.window < rows.s.keys ? static_cast<int>(a.window) : rows.s.keys;
    for (int tile = first_tile; tile < end_tile; tile++) {
        dev_copy_wait<0>();
        __syncthreads();
        if (tile + 1 < end_tile) load_keys(tile + 1);
        const int stage = tile % 2;
        float score[TILE / 8][4] = {};
        multiply_rows<D, TILE / 8>(score, q_tile, warp * 16, k_tiles + stage * TILE * D * 2);
        if (!sees_all(rows, tile * TILE, TILE, last, window)) mask_keys(score, seen, tile * TILE, window);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float now = -INFINITY;
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) now = fmaxf(now, fmaxf(score[n][2 * h], score[n][2 * h + 1]));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
            now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2)) * scale;
            now = fmaxf(now, most[h]);
            const float base = now == -INFINITY ? 0 : now; /* no key yet: all scores are -inf */
            const float shrink = dev_exp2(most[h] - base);
            most[h] = now;
            sum[h] *= shrink;
#pragma unroll
            for (int d = 0; d < D / 8; d++) {
                out[d][2 * h] *= shrink;
                out[d][2 * h + 1] *= shrink;
            }
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const float p = dev_exp2(score[n][2 * h + i] * scale - base);
                    score[n][2 * h + i] = p;
                    sum[h] += p;
                }
            }
        }
        multiply_across<D, TILE / 8>(out, score, v_tiles + stage * TILE * D * 2);
    }
    dev_copy_wait<0>();
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        inverse[h] = 1 / sum[h];
        const int64_t place = rows.place(warp * 16 + lane / 4 + h * 8);
        if (lane % 4 == 0 && place >= 0 && part.count == 1) static_cast<float *>(a.lse)[place] = most[h] * LN_2 + logf(sum[h]);
        if (place < 0 || part.count == 1) continue;
        const int64_t at = part.index * a.spans.tokens * a.heads + place;
        if (lane % 4 == 0) part.sums[at] = make_float2(most[h], sum[h]);
#pragma unroll
        for (int d = 0; d < D / 8; d++)
            *reinterpret_cast<float2 *>(part.out + at * D + d * 8 + lane % 4 * 2) = make_float2(out[d][2 * h], out[d][2 * h + 1]);
    }
    if (part.count > 1) return;
    store_rows<D>(q_tile, warp * 16, out, inverse[0], inverse[1], [&](int row) -> bf16 * {
        const int64_t place = rows.place(row);
        return place >= 0 ? static_cast<bf16 *>(a.out) + place * D : nullptr;
    });
}

template <int D, int WARPS>
__global__ void __launch_bounds__(WARPS *ESPI_WARP) forward_tiles(const __grid_constant__ espi_attention_fwd a) {
    extern __shared__ __align__(256) unsigned char shared[];
    const int group = static_cast<int>(a.heads / a.kv_heads), kv_head = static_cast<int>(blockIdx.y);
    int seq, index;
    if (!find_tile(a.spans, group, 16 * WARPS, static_cast<int>(blockIdx.x), true, &seq, &index)) return;
    const sequence s = sequence_of(a.spans, seq);
    const row_tile rows = {s, index * 16 * WARPS, s.queries * group, group, kv_head * group, static_cast<int>(a.heads)};
    attend<D, WARPS, KEYS>(a, rows, kv_head, {0, 1, nullptr, nullptr}, dev_shared(shared));
}

/* Few queries a sequence: a warp for each sequence, kv head and part of the keys. */
template <int D>
__global__ void __launch_bounds__(ESPI_WARP) forward_decode(const __grid_constant__ espi_attention_fwd a, float *parts, float2 *sums) {
    extern __shared__ __align__(256) unsigned char shared[];
    const int group = static_cast<int>(a.heads / a.kv_heads), kv_head = static_cast<int>(blockIdx.y);
    const sequence s = sequence_of(a.spans, static_cast<int>(blockIdx.x));
    for (int first = 0; first < s.queries * group; first += 16) {
        const row_tile rows = {s, first, s.queries * group, group, kv_head * group, static_cast<int>(a.heads)};
        attend<D, 1, DECODE_KEYS>(a, rows, kv_head, {static_cast<int>(blockIdx.z), static_cast<int>(gridDim.z), parts, sums},
                                  dev_shared(shared));
        __syncwarp();
    }
}

/* The parts of a row, in order: a warp a row. */
template <int D>
__global__ void __launch_bounds__(THREADS)
    join_parts(bf16 *out, float *lse, const float *parts, const float2 *sums, int count, int64_t rows) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / ESPI_WARP) + threadIdx.x / ESPI_WARP, lane = threadIdx.x % ESPI_WARP;
    if (row >= rows) return;
    float most = -INFINITY, sum = 0, value[D / ESPI_WARP] = {};
    for (int part = 0; part < count; part++) most = fmaxf(most, sums[part * rows + row].x);
    for (int part = 0; part < count; part++) {
        const float2 own = sums[part * rows + row];
        const float weight = own.y > 0 ? dev_exp2(own.x - most) : 0;
        sum += own.y * weight;
#pragma unroll
        for (int i = 0; i < D / ESPI_WARP; i++) value[i] += weight * parts[(part * rows + row) * D + i * ESPI_WARP + lane];
    }
#pragma unroll
    for (int i = 0; i < D / ESPI_WARP; i++) espi_store(out + row * D + i * ESPI_WARP + lane, value[i] / sum);
    if (lane == 0) lse[row] = most * LN_2 + logf(sum);
}

/* ---- Backward ---- */

/* Of a warp. */
__device__ float dot(const bf16 *x, const bf16 *y, int64_t n) {
    float sum = 0;
    for (int64_t i = threadIdx.x % ESPI_WARP; i < n; i += ESPI_WARP) sum += espi_value(x[i]) * espi_value(y[i]);
    return espi_warp_sum(sum);
}

/* delta = d_out . out of each row of n values: a warp a row. */
__global__ void __launch_bounds__(THREADS) row_products(float *delta, const bf16 *d_out, const bf16 *out, int64_t rows, int64_t n) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (THREADS / ESPI_WARP) + threadIdx.x / ESPI_WARP;
    if (row >= rows) return;
    const float sum = dot(d_out + row * n, out + row * n, n);
    if (threadIdx.x % ESPI_WARP == 0) delta[row] = sum;
}

__global__ void __launch_bounds__(THREADS)
    sink_grad(float *d_sinks, const float *sinks, const float *lse, const float *delta, int64_t tokens, int64_t heads) {
    const int64_t head = blockIdx.x;
    float sum = 0;
    for (int64_t t = threadIdx.x; t < tokens; t += THREADS) sum += expf(sinks[head] - lse[t * heads + head]) * delta[t * heads + head];
    sum = espi_block_sum<THREADS>(sum);
    if (threadIdx.x == 0) d_sinks[head] -= sum;
}

/* Keys at once: as many as the registers hold beside the sums. */
template <int D> constexpr int QUERY_KEYS = D == 128 ? KEYS / 2 : KEYS;

template <int D, int WARPS> constexpr int query_grad_bytes() {
    return (2 * 16 * WARPS + 4 * QUERY_KEYS<D>)*D * 2;
}

/* The gradient of a tile of query rows: over all keys that they see. */
template <int D, int WARPS>
__global__ void __launch_bounds__(WARPS *ESPI_WARP) query_grads(const __grid_constant__ espi_attention_bwd a, const float *delta) {
    extern __shared__ __align__(256) unsigned char memory[];
    constexpr int block = WARPS * ESPI_WARP, TILE = QUERY_KEYS<D>;
    const uint32_t shared = dev_shared(memory);
    const int group = static_cast<int>(a.heads / a.kv_heads), kv_head = static_cast<int>(blockIdx.y);
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    int seq, index;
    if (!find_tile(a.spans, group, 16 * WARPS, static_cast<int>(blockIdx.x), true, &seq, &index)) return;
    const sequence s = sequence_of(a.spans, seq);
    const row_tile rows = {s, index * 16 * WARPS, s.queries * group, group, kv_head * group, static_cast<int>(a.heads)};
    const uint32_t q_tile = shared, d_out_tile = q_tile + 16 * WARPS * D * 2, k_tiles = d_out_tile + 16 * WARPS * D * 2,
                   v_tiles = k_tiles + 2 * TILE * D * 2;
    const bf16 *q = static_cast<const bf16 *>(a.q), *k = static_cast<const bf16 *>(a.k), *v = static_cast<const bf16 *>(a.v);
    const bf16 *d_out = static_cast<const bf16 *>(a.d_out);
    const int last = (min(rows.first + 16 * WARPS, rows.end) - 1) / group;
    const key_range range = keys_of(s, rows.token(0), last, a.window);
    const int first_tile = range.begin / TILE, end_tile = (range.end + TILE - 1) / TILE;

    const auto load_keys = [&](int tile) {
        const int stage = tile % 2;
        const auto row_of = [&](const bf16 *from, int row) -> const bf16 * {
            const int key = tile * TILE + row;
            return key < s.keys ? from + (s.key_row(key) * a.kv_heads + kv_head) * D : nullptr;
        };
        load_tile<D, TILE, block>(
            k_tiles + stage * TILE * D * 2, [&](int row) { return row_of(k, row); }, k);
        load_tile<D, TILE, block>(
            v_tiles + stage * TILE * D * 2, [&](int row) { return row_of(v, row); }, v);
        dev_copy_commit();
    };
    const auto query_row = [&](const bf16 *from, int row) -> const bf16 * {
        const int64_t place = rows.place(row);
        return place >= 0 ? from + place * D : nullptr;
    };
    load_tile<D, 16 * WARPS, block>(
        q_tile, [&](int row) { return query_row(q, row); }, q);
    load_tile<D, 16 * WARPS, block>(
        d_out_tile, [&](int row) { return query_row(d_out, row); }, d_out);
    load_keys(first_tile);

    const float scale = static_cast<float>(a.scale) * LOG2_E;
    float lse[2], row_delta[2];
    int seen[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = warp * 16 + lane / 4 + h * 8;
        const int64_t place = rows.place(row);
        lse[h] = place >= 0 ? static_cast<const float *>(a.lse)[place] * LOG2_E : 0;
        row_delta[h] = place >= 0 ? delta[place] : 0;
        seen[h] = s.before + rows.token(row);
    }
    const int window = a.window > 0 && a.window < s.keys ? static_cast<int>(a.window) : s.keys;
    float sum[D / 8][4] = {};
    for (int tile = first_tile; tile < end_tile; tile++) {
        dev_copy_wait<0>();
        __syncthreads();
        if (tile + 1 < end_tile) load_keys(tile + 1);
        const uint32_t k_tile = k_tiles + tile % 2 * TILE * D * 2, v_tile = v_tiles + tile % 2 * TILE * D * 2;
        float score[TILE / 8][4] = {}, d_p[TILE / 8][4] = {};
        multiply_rows<D, TILE / 8>(score, q_tile, warp * 16, k_tile);
        multiply_rows<D, TILE / 8>(d_p, d_out_tile, warp * 16, v_tile);
        if (!sees_all(rows, tile * TILE, TILE, last, window)) mask_keys(score, seen, tile * TILE, window);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float p = dev_exp2(score[n][i] * scale - lse[i / 2]);
                score[n][i] = p * (d_p[n][i] - row_delta[i / 2]);
            }
        }
        multiply_across<D, TILE / 8>(sum, score, k_tile);
    }
    const float factor = static_cast<float>(a.scale);
    store_rows<D>(q_tile, warp * 16, sum, factor, factor, [&](int row) -> bf16 * {
        const int64_t place = rows.place(row);
        return place >= 0 ? static_cast<bf16 *>(a.d_q) + place * D : nullptr;
    });
}

template <int D> constexpr int key_grad_bytes() {
    return (2 * KEYS + 4 * BWD_ROWS) * D * 2 + 3 * 2 * BWD_ROWS * static_cast<int>(sizeof(float));
}

/* The gradients of a tile of keys and their values over the query rows of some heads of the group: part blockIdx.z of `splits`.
 * parts: [tokens, kv_heads, splits, D]. */
template <int D>
__global__ void __launch_bounds__(KEYS / 16 * ESPI_WARP)
    key_grads(const __grid_constant__ espi_attention_bwd a, float *d_k_parts, float *d_v_parts, const float *delta) {
    extern __shared__ __align__(256) unsigned char memory[];
    constexpr int block = KEYS / 16 * ESPI_WARP;
    const uint32_t shared = dev_shared(memory);
    const int group = static_cast<int>(a.heads / a.kv_heads / gridDim.z), kv_head = static_cast<int>(blockIdx.y);
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    int seq, index;
    if (!find_tile(a.spans, 1, KEYS, static_cast<int>(blockIdx.x), false, &seq, &index)) return;
    const sequence own = sequence_of(a.spans, seq);
    const int first_key = index * KEYS, keys = min(KEYS, own.queries - first_key);
    const int head = (kv_head * static_cast<int>(gridDim.z) + static_cast<int>(blockIdx.z)) * group;
    const uint32_t k_tile = shared, v_tile = k_tile + KEYS * D * 2, q_tiles = v_tile + KEYS * D * 2,
                   d_out_tiles = q_tiles + 2 * BWD_ROWS * D * 2;
    float *lse_rows = reinterpret_cast<float *>(memory + (2 * KEYS + 4 * BWD_ROWS) * D * 2), *delta_rows = lse_rows + 2 * BWD_ROWS;
    int *seen_rows = reinterpret_cast<int *>(delta_rows + 2 * BWD_ROWS); /* the last place that a row sees; -1: no row */
    const bf16 *q = static_cast<const bf16 *>(a.q), *k = static_cast<const bf16 *>(a.k), *v = static_cast<const bf16 *>(a.v);
    const bf16 *d_out = static_cast<const bf16 *>(a.d_out);
    const auto key_row = [&](const bf16 *from, int row) -> const bf16 * {
        return row < keys ? from + ((own.first_query + first_key + row) * a.kv_heads + kv_head) * D : nullptr;
    };
    load_tile<D, KEYS, block>(
        k_tile, [&](int row) { return key_row(k, row); }, k);
    load_tile<D, KEYS, block>(
        v_tile, [&](int row) { return key_row(v, row); }, v);

    const float scale = static_cast<float>(a.scale) * LOG2_E;
    float d_k[D / 8][4] = {}, d_v[D / 8][4] = {};
    /* The queries of the tile's own sequence, then of those that have it as their prefix. */
    for (int user = seq; user < a.spans.n_seqs; user++) {
        if (user > seq && (prefix_of(a.spans, user) == 0 || a.spans.prefix_start[user] != own.first_query)) continue;
        const sequence s = sequence_of(a.spans, user);
        const int place = first_key + (user == seq ? own.prefix : 0); /* of the tile's first key before these queries */
        const int64_t window = a.window > 0 ? a.window : s.keys;
        /* The tokens that see the first key or a later one, up to the last that sees the last. */
        const int first_token = max(place - s.before, 0);
        const int end_token = static_cast<int>(min(static_cast<int64_t>(s.queries), place + keys - 1 + window - s.before));
        const int first_step = first_token * group / BWD_ROWS, end_step = (end_token * group + BWD_ROWS - 1) / BWD_ROWS;
        if (first_token >= end_token) continue;
        const auto rows_of = [&](int step) {
            return row_tile{s, step * BWD_ROWS, s.queries * group, group, head, static_cast<int>(a.heads)};
        };
        const auto load_rows = [&](int step) {
            const int stage = step % 2;
            const row_tile rows = rows_of(step);
            const auto row_of = [&](const bf16 *from, int row) -> const bf16 * {
                const int64_t at = rows.place(row);
                return at >= 0 ? from + at * D : nullptr;
            };
            load_tile<D, BWD_ROWS, block>(
                q_tiles + stage * BWD_ROWS * D * 2, [&](int row) { return row_of(q, row); }, q);
            load_tile<D, BWD_ROWS, block>(
                d_out_tiles + stage * BWD_ROWS * D * 2, [&](int row) { return row_of(d_out, row); }, d_out);
            dev_copy_commit();
            if (threadIdx.x < BWD_ROWS) {
                const int64_t at = rows.place(static_cast<int>(threadIdx.x));
                lse_rows[stage * BWD_ROWS + threadIdx.x] = at >= 0 ? static_cast<const float *>(a.lse)[at] * LOG2_E : 0;
                delta_rows[stage * BWD_ROWS + threadIdx.x] = at >= 0 ? delta[at] : 0;
                seen_rows[stage * BWD_ROWS + threadIdx.x] = at >= 0 ? s.before + rows.token(static_cast<int>(threadIdx.x)) : -1;
            }
        };
        __syncthreads(); /* the stages of the sequence before have been read */
        load_rows(first_step);
        for (int step = first_step; step < end_step; step++) {
            dev_copy_wait<0>();
            __syncthreads();
            if (step + 1 < end_step) load_rows(step + 1);
            const int stage = step % 2;
            const uint32_t q_tile = q_tiles + stage * BWD_ROWS * D * 2, d_out_tile = d_out_tiles + stage * BWD_ROWS * D * 2;
            const int *seen = seen_rows + stage * BWD_ROWS;
            float score[BWD_ROWS / 8][4] = {}, d_p[BWD_ROWS / 8][4] = {};
            multiply_rows<D, BWD_ROWS / 8>(score, k_tile, warp * 16, q_tile);
            multiply_rows<D, BWD_ROWS / 8>(d_p, v_tile, warp * 16, d_out_tile);
            if (seen[0] < place + KEYS - 1 || seen[BWD_ROWS - 1] - place >= window || seen[BWD_ROWS - 1] < 0) {
#pragma unroll
                for (int n = 0; n < BWD_ROWS / 8; n++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int key = place + warp * 16 + lane / 4 + i / 2 * 8, last = seen[n * 8 + lane % 4 * 2 + i % 2];
                        if (last < key || last - key >= window) score[n][i] = -INFINITY;
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < BWD_ROWS / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = stage * BWD_ROWS + n * 8 + lane % 4 * 2 + i % 2;
                    const float p = dev_exp2(score[n][i] * scale - lse_rows[row]);
                    score[n][i] = p;
                    d_p[n][i] = p * (d_p[n][i] - delta_rows[row]);
                }
            }
            multiply_across<D, BWD_ROWS / 8>(d_v, score, d_out_tile);
            multiply_across<D, BWD_ROWS / 8>(d_k, d_p, q_tile);
        }
    }
    const float factor = static_cast<float>(a.scale);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int key = first_key + warp * 16 + lane / 4 + h * 8;
        if (key >= first_key + keys) continue;
        const int64_t at = (((own.first_query + key) * a.kv_heads + kv_head) * gridDim.z + blockIdx.z) * D + lane % 4 * 2;
#pragma unroll
        for (int d = 0; d < D / 8; d++) {
            *reinterpret_cast<float2 *>(d_k_parts + at + d * 8) = make_float2(d_k[d][2 * h] * factor, d_k[d][2 * h + 1] * factor);
            *reinterpret_cast<float2 *>(d_v_parts + at + d * 8) = make_float2(d_v[d][2 * h], d_v[d][2 * h + 1]);
        }
    }
}

template <int D> __global__ void __launch_bounds__(THREADS) sum_parts(bf16 *out, const float *parts, int splits, int64_t n) {
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * 4;
    if (i >= n) return;
    const float *own = parts + i / D * splits * D + i % D;
    float4 sum = *reinterpret_cast<const float4 *>(own);
    for (int p = 1; p < splits; p++) {
        const float4 part = *reinterpret_cast<const float4 *>(own + p * D);
        sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
    }
    *reinterpret_cast<uint2 *>(out + i) = make_uint2(dev_bf16x2(sum.x, sum.y), dev_bf16x2(sum.z, sum.w));
}

/* ---- Any head size: a warp for each row, its sums in shared memory ---- */

__device__ int sequence_at(const espi_spans &spans, int64_t token) {
    int low = 0, high = spans.n_seqs - 1; /* the last sequence that starts at or before the token */
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (spans.cu_q[middle] <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

__global__ void __launch_bounds__(SUM_WARPS *ESPI_WARP) forward_any(const __grid_constant__ espi_attention_fwd a) {
    extern __shared__ float sums[];
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * SUM_WARPS + warp, dim = a.head_dim;
    if (row >= a.spans.tokens * a.heads) return;
    float *sum_v = sums + warp * dim;
    const int64_t token = row / a.heads, head = row % a.heads, kv_head = head / (a.heads / a.kv_heads);
    const sequence s = sequence_of(a.spans, sequence_at(a.spans, token));
    const int i = static_cast<int>(token - s.first_query);
    const key_range range = keys_of(s, i, i, a.window);
    float most = a.sinks ? a.sinks[head] : -INFINITY, sum = a.sinks ? 1 : 0;
    for (int64_t d = lane; d < dim; d += ESPI_WARP) sum_v[d] = 0;
    for (int key = range.begin; key < range.end; key++) {
        const int64_t at = (s.key_row(key) * a.kv_heads + kv_head) * dim;
        const float score =
            static_cast<float>(a.scale) * dot(static_cast<const bf16 *>(a.q) + row * dim, static_cast<const bf16 *>(a.k) + at, dim);
        const float now = fmaxf(most, score), shrink = expf(most - now), p = expf(score - now);
        most = now;
        sum = sum * shrink + p;
        for (int64_t d = lane; d < dim; d += ESPI_WARP)
            sum_v[d] = sum_v[d] * shrink + p * espi_value(static_cast<const bf16 *>(a.v)[at + d]);
    }
    for (int64_t d = lane; d < dim; d += ESPI_WARP) espi_store(static_cast<bf16 *>(a.out) + row * dim + d, sum_v[d] / sum);
    if (lane == 0) static_cast<float *>(a.lse)[row] = most + logf(sum);
}

/* P and dS of a query row against a key row. */
__device__ void score_grad(float *p, float *d_s, const espi_attention_bwd &a, const float *delta, int64_t q_row, int64_t k_row) {
    const int64_t dim = a.head_dim;
    const float score =
        static_cast<float>(a.scale) * dot(static_cast<const bf16 *>(a.q) + q_row * dim, static_cast<const bf16 *>(a.k) + k_row * dim, dim);
    const float d_p = dot(static_cast<const bf16 *>(a.d_out) + q_row * dim, static_cast<const bf16 *>(a.v) + k_row * dim, dim);
    *p = expf(score - static_cast<const float *>(a.lse)[q_row]);
    *d_s = *p * (d_p - delta[q_row]);
}

__global__ void __launch_bounds__(SUM_WARPS *ESPI_WARP) query_grad_any(const __grid_constant__ espi_attention_bwd a, const float *delta) {
    extern __shared__ float sums[];
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * SUM_WARPS + warp, dim = a.head_dim;
    if (row >= a.spans.tokens * a.heads) return;
    float *d_q = sums + warp * dim;
    const int64_t token = row / a.heads, kv_head = row % a.heads / (a.heads / a.kv_heads);
    const sequence s = sequence_of(a.spans, sequence_at(a.spans, token));
    const int i = static_cast<int>(token - s.first_query);
    const key_range range = keys_of(s, i, i, a.window);
    for (int64_t d = lane; d < dim; d += ESPI_WARP) d_q[d] = 0;
    for (int key = range.begin; key < range.end; key++) {
        const int64_t k_row = s.key_row(key) * a.kv_heads + kv_head;
        float p, d_s;
        score_grad(&p, &d_s, a, delta, row, k_row);
        for (int64_t d = lane; d < dim; d += ESPI_WARP) d_q[d] += d_s * espi_value(static_cast<const bf16 *>(a.k)[k_row * dim + d]);
    }
    for (int64_t d = lane; d < dim; d += ESPI_WARP)
        espi_store(static_cast<bf16 *>(a.d_q) + row * dim + d, static_cast<float>(a.scale) * d_q[d]);
}

__global__ void __launch_bounds__(SUM_WARPS *ESPI_WARP, 1) key_grad_any(const __grid_constant__ espi_attention_bwd a, const float *delta) {
    extern __shared__ float sums[];
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * SUM_WARPS + warp, dim = a.head_dim, group = a.heads / a.kv_heads;
    if (row >= a.spans.tokens * a.kv_heads) return;
    float *d_k = sums + warp * 2 * dim, *d_v = d_k + dim;
    const int64_t token = row / a.kv_heads, kv_head = row % a.kv_heads;
    const int seq = sequence_at(a.spans, token);
    const int within = static_cast<int>(token) - a.spans.cu_q[seq];
    for (int64_t d = lane; d < dim; d += ESPI_WARP) d_k[d] = d_v[d] = 0;
    for (int user = seq; user < a.spans.n_seqs; user++) { /* as key_grads */
        if (user > seq && (prefix_of(a.spans, user) == 0 || a.spans.prefix_start[user] != a.spans.cu_q[seq])) continue;
        const sequence s = sequence_of(a.spans, user);
        const int64_t place = within + (user == seq ? s.prefix : 0), window = a.window > 0 ? a.window : s.keys;
        const int64_t first = place > s.before ? place - s.before : 0,
                      end = min(static_cast<int64_t>(s.queries), place + window - s.before);
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
#pragma unroll 1
            for (int64_t i = first; i < end; i++) {
                const int64_t q_row = (s.first_query + i) * a.heads + head;
                float p, d_s;
                score_grad(&p, &d_s, a, delta, q_row, row);
                for (int64_t d = lane; d < dim; d += ESPI_WARP) {
                    d_k[d] += d_s * espi_value(static_cast<const bf16 *>(a.q)[q_row * dim + d]);
                    d_v[d] += p * espi_value(static_cast<const bf16 *>(a.d_out)[q_row * dim + d]);
                }
            }
        }
    }
    for (int64_t d = lane; d < dim; d += ESPI_WARP) {
        espi_store(static_cast<bf16 *>(a.d_k) + row * dim + d, static_cast<float>(a.scale) * d_k[d]);
        espi_store(static_cast<bf16 *>(a.d_v) + row * dim + d, d_v[d]);
    }
}

/* ---- The cache ---- */

template <int N>
__global__ void __launch_bounds__(THREADS)
    append(bf16 *k_cache, bf16 *v_cache, const bf16 *k, const bf16 *v, espi_spans spans, int64_t width) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x, groups = width / N;
    if (i >= spans.tokens * groups) return;
    const int64_t token = i / groups, c = i % groups;
    const sequence s = sequence_of(spans, sequence_at(spans, token));
    const int64_t row = s.key_row(s.before + static_cast<int>(token - s.first_query)), to = row * groups + c;
    reinterpret_cast<bf16s<N> *>(k_cache)[to] = reinterpret_cast<const bf16s<N> *>(k)[i];
    reinterpret_cast<bf16s<N> *>(v_cache)[to] = reinterpret_cast<const bf16s<N> *>(v)[i];
}

/* ---- Launches ---- */

/* The dynamic shared memory of a kernel, above 48 KB only by asking. */
template <typename K> esp_status allow_bytes(K kernel, int bytes) {
    return espi_cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "shared memory of attention");
}

/* So few rows a sequence that a warp takes them all. */
bool is_decode(const espi_attention_fwd *a) {
    return a->spans.tokens * (a->heads / a->kv_heads) <= 16 * static_cast<int64_t>(a->spans.n_seqs);
}

/* Into how many parts the keys are split: enough blocks to fill the GPU. */
int64_t parts_of(const espi_attention_fwd *a) {
    const int64_t blocks = a->spans.n_seqs * a->kv_heads, most = MOST_PARTS, wanted = blocks > 0 ? MANY_TILES / blocks : 1;
    return wanted < 1 ? 1 : wanted > most ? most : wanted;
}

template <int D> esp_status decode(const espi_exec *exec, const espi_attention_fwd *a) {
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const int64_t rows = a->spans.tokens * a->heads, count = parts_of(a);
    char *scratch = static_cast<char *>(exec->scratch);
    float *parts = count > 1 ? espi_cut<float>(&scratch, count * rows * D) : nullptr;
    float2 *sums = count > 1 ? espi_cut<float2>(&scratch, count * rows) : nullptr;
    const dim3 blocks(static_cast<unsigned>(a->spans.n_seqs), static_cast<unsigned>(a->kv_heads), static_cast<unsigned>(count));
    ESPI_TRY(allow_bytes(forward_decode<D>, forward_bytes<D, 1, DECODE_KEYS>()));
    forward_decode<D><<<blocks, ESPI_WARP, forward_bytes<D, 1, DECODE_KEYS>(), stream>>>(*a, parts, sums);
    if (count > 1)
        join_parts<D><<<espi_blocks(rows, THREADS / ESPI_WARP), THREADS, 0, stream>>>(
            static_cast<bf16 *>(a->out), static_cast<float *>(a->lse), parts, sums, static_cast<int>(count), rows);
    return ESPI_CUDA_LAUNCHED("attention");
}

template <int D> esp_status forward(const espi_exec *exec, const espi_attention_fwd *a) {
    constexpr int warps = 4;
    if (is_decode(a)) return decode<D>(exec, a);
    if (espi_cuda_of(exec)->major == 9) return espi_attention_fwd_wgmma<D>(exec, a);
    const unsigned tiles = static_cast<unsigned>(a->spans.tokens * (a->heads / a->kv_heads) / (16 * warps) + a->spans.n_seqs);
    ESPI_TRY(allow_bytes(forward_tiles<D, warps>, forward_bytes<D, warps, KEYS>()));
    forward_tiles<D, warps><<<dim3(tiles, static_cast<unsigned>(a->kv_heads)), warps * ESPI_WARP, forward_bytes<D, warps, KEYS>(),
                              espi_cuda_of(exec)->stream>>>(*a);
    return ESPI_CUDA_LAUNCHED("attention");
}

/* Into how many parts the heads of a group are split where the sum over queries would have too few tiles to fill the GPU. */
int64_t splits_of(const espi_attention_bwd *a) {
    const int64_t group = a->heads / a->kv_heads, tiles = espi_ceil_div(a->spans.tokens, KEYS) * a->kv_heads;
    int64_t splits = 1;
    while (group % (2 * splits) == 0 && tiles * splits < MANY_TILES) splits *= 2;
    return splits;
}

bool is_fast(int64_t head_dim) {
    return head_dim == 64 || head_dim == 128;
}

template <int D> esp_status backward(const espi_exec *exec, const espi_attention_bwd *a, const float *delta, float *parts) {
    constexpr int warps = 4;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const int64_t rows = a->spans.tokens * (a->heads / a->kv_heads), n = a->spans.tokens * a->kv_heads * D, splits = splits_of(a);
    const unsigned kv_heads = static_cast<unsigned>(a->kv_heads);
    float *d_k_parts = parts, *d_v_parts = parts + splits * n;
    if (espi_cuda_of(exec)->major == 9) {
        ESPI_TRY(espi_attention_bwd_wgmma<D>(exec, a, delta, d_k_parts, d_v_parts, splits));
    } else {
        const unsigned query_tiles = static_cast<unsigned>(rows / (16 * warps) + a->spans.n_seqs);
        const unsigned key_tiles = static_cast<unsigned>(a->spans.tokens / KEYS + a->spans.n_seqs);
        const dim3 key_blocks(key_tiles, kv_heads, static_cast<unsigned>(splits));
        ESPI_TRY(allow_bytes(key_grads<D>, key_grad_bytes<D>()));
        key_grads<D><<<key_blocks, KEYS / 16 * ESPI_WARP, key_grad_bytes<D>(), stream>>>(*a, d_k_parts, d_v_parts, delta);
        ESPI_TRY(allow_bytes(query_grads<D, warps>, query_grad_bytes<D, warps>()));
        query_grads<D, warps><<<dim3(query_tiles, kv_heads), warps * ESPI_WARP, query_grad_bytes<D, warps>(), stream>>>(*a, delta);
    }
    sum_parts<D><<<espi_blocks(n / 4, THREADS), THREADS, 0, stream>>>(static_cast<bf16 *>(a->d_k), d_k_parts, static_cast<int>(splits), n);
    sum_parts<D><<<espi_blocks(n / 4, THREADS), THREADS, 0, stream>>>(static_cast<bf16 *>(a->d_v), d_v_parts, static_cast<int>(splits), n);
    return ESPI_CUDA_LAUNCHED("gradient of attention");
}

esp_status backward_any(const espi_exec *exec, const espi_attention_bwd *a, const float *delta) {
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const int threads = SUM_WARPS * ESPI_WARP, bytes = SUM_WARPS * 2 * static_cast<int>(a->head_dim * sizeof(float));
    ESPI_TRY(allow_bytes(key_grad_any, bytes));
    query_grad_any<<<espi_blocks(a->spans.tokens * a->heads, SUM_WARPS), threads, bytes / 2, stream>>>(*a, delta);
    key_grad_any<<<espi_blocks(a->spans.tokens * a->kv_heads, SUM_WARPS), threads, bytes, stream>>>(*a, delta);
    return ESPI_CUDA_LAUNCHED("gradient of attention");
}

} // namespace

esp_status espi_kv_append_cuda(const espi_exec *exec, const espi_kv_append *a) {
    const int64_t n = a->spans.tokens * a->width;
    if (n == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    bf16 *k_cache = static_cast<bf16 *>(a->k_cache), *v_cache = static_cast<bf16 *>(a->v_cache);
    const bf16 *k = static_cast<const bf16 *>(a->k), *v = static_cast<const bf16 *>(a->v);
    if (espi_vectors(a->width, k_cache, v_cache, k, v))
        append<8><<<espi_blocks(n / 8, THREADS), THREADS, 0, stream>>>(k_cache, v_cache, k, v, a->spans, a->width);
    else
        append<1><<<espi_blocks(n, THREADS), THREADS, 0, stream>>>(k_cache, v_cache, k, v, a->spans, a->width);
    return ESPI_CUDA_LAUNCHED("new keys and values");
}

size_t espi_attention_fwd_scratch_cuda(const espi_exec *exec, const espi_attention_fwd *a) {
    (void)exec;
    const int64_t rows = a->spans.tokens * a->heads, count = parts_of(a);
    if (!is_decode(a) || !is_fast(a->head_dim) || count == 1) return 0;
    return espi_room(count * rows * a->head_dim, sizeof(float)) + espi_room(count * rows, sizeof(float2));
}

esp_status espi_attention_fwd_cuda(const espi_exec *exec, const espi_attention_fwd *a) {
    if (a->spans.tokens == 0) return ESP_OK;
    if (is_fast(a->head_dim) && espi_vectors(a->head_dim, a->out, a->q, a->k, a->v))
        return a->head_dim == 64 ? forward<64>(exec, a) : forward<128>(exec, a);
    const int bytes = SUM_WARPS * static_cast<int>(a->head_dim * sizeof(float));
    ESPI_TRY(allow_bytes(forward_any, bytes));
    forward_any<<<espi_blocks(a->spans.tokens * a->heads, SUM_WARPS), SUM_WARPS * ESPI_WARP, bytes, espi_cuda_of(exec)->stream>>>(*a);
    return ESPI_CUDA_LAUNCHED("attention");
}

size_t espi_attention_bwd_scratch_cuda(const espi_exec *exec, const espi_attention_bwd *a) {
    (void)exec;
    const size_t delta = espi_room(a->spans.tokens * a->heads, sizeof(float));
    return is_fast(a->head_dim) ? delta + espi_room(2 * splits_of(a) * a->spans.tokens * a->kv_heads * a->head_dim, sizeof(float)) : delta;
}

esp_status espi_attention_bwd_cuda(const espi_exec *exec, const espi_attention_bwd *a) {
    const int64_t tokens = a->spans.tokens;
    if (tokens == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    char *scratch = static_cast<char *>(exec->scratch);
    float *delta = espi_cut<float>(&scratch, tokens * a->heads);
    row_products<<<espi_blocks(tokens * a->heads, THREADS / ESPI_WARP), THREADS, 0, stream>>>(
        delta, static_cast<const bf16 *>(a->d_out), static_cast<const bf16 *>(a->out), tokens * a->heads, a->head_dim);
    if (a->d_sinks)
        sink_grad<<<static_cast<unsigned>(a->heads), THREADS, 0, stream>>>(static_cast<float *>(a->d_sinks), a->sinks,
                                                                           static_cast<const float *>(a->lse), delta, tokens, a->heads);
    const bool vectors = espi_vectors(a->head_dim, a->d_q, a->q, a->k, a->v) && espi_vectors(a->head_dim, a->d_k, a->d_v, a->d_out);
    if (!is_fast(a->head_dim) || !vectors) return backward_any(exec, a, delta);
    float *parts = reinterpret_cast<float *>(scratch);
    return a->head_dim == 64 ? backward<64>(exec, a, delta, parts) : backward<128>(exec, a, delta, parts);
}
