/* Attention on a Hopper GPU: the forward and the backward's two passes as attention.cu has them, with the tensor cores reading their operands
 * from shared memory.  Some warpgroups a block, each with 64 keys, or 64 query rows, of its own; the other side passes by in steps of 64. */
#include "kernels/cuda/attention.cuh"

namespace {

enum {
    GROUP = 128, /* threads of a warpgroup */
    STEP = 64    /* rows or keys that pass by at once; and those that a warpgroup has of its own */
};

/* Warpgroups of a block: the fastest number of those measured (1, 2, 3 and 4). */
constexpr int GROUPS = 2, BLOCK = GROUPS * GROUP, OWN = GROUPS * STEP;

/* A tile of ROWS rows of D values, in strips of 64 values: rows of 128 bytes, piece c of row r at c ^ (r & 7). */
template <int ROWS> __device__ uint32_t strip_of(uint32_t tile, int strip) {
    return tile + static_cast<uint32_t>(strip * ROWS * 128);
}

/* TOGETHER: copies that are worked out at once, as far as the registers reach; what is loaded once may take its time. */
template <int D, int ROWS, int TOGETHER, typename F> __device__ void load_strips(uint32_t tile, F address, const void *anything) {
    constexpr int pieces = D / 8;
#pragma unroll TOGETHER
    for (int i = 0; i < ROWS * pieces / BLOCK; i++) {
        const int at = i * BLOCK + static_cast<int>(threadIdx.x), row = at / pieces, piece = at % pieces;
        const bf16 *from = address(row);
        const uint32_t to = strip_of<ROWS>(tile, piece / 8) + static_cast<uint32_t>(row * 128 + ((piece % 8) ^ (row & 7)) * 16);
        dev_copy16_or_zero(to, from ? static_cast<const void *>(from + piece * 8) : anything, from ? 16 : 0);
    }
}

/* product [64,64] = 64 rows of `left` from row on, times the 64 rows of `right`, over all D values.  Asynchronous. */
template <int D, int LEFT> __device__ void multiply_rows(float (&product)[32], uint32_t left, int row, uint32_t right) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const uint32_t at = static_cast<uint32_t>(k % 4 * 32);
        dev_wgmma64(product, dev_tile(strip_of<LEFT>(left, k / 4) + row * 128 + at, 1024),
                    dev_tile(strip_of<STEP>(right, k / 4) + at, 1024), k > 0);
    }
}

/* 64 rows of a tile from row on, as the registers of a warpgroup hold them for products over all D values: the tensor cores then read one operand
 * of two from shared memory, which else would keep them waiting. */
template <int D> struct held_rows { uint4 at[D / 16]; };

template <int D, int ROWS> __device__ held_rows<D> hold_rows(uint32_t tile, int row) {
    const int lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const int mine = row + static_cast<int>(threadIdx.x) % GROUP / ESPI_WARP * 16 + lane % 16;
    held_rows<D> held;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
        held.at[k] = dev_ldmatrix(strip_of<ROWS>(tile, k / 4) + mine * 128 + ((k % 4 * 2 + lane / 16) ^ (mine & 7)) * 16);
    return held;
}

/* As multiply_rows; of product 32 values are used. */
template <int D> __device__ void multiply_held(float (&product)[128], const held_rows<D> &left, uint32_t right) {
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
        const uint32_t row[4] = {left.at[k].x, left.at[k].y, left.at[k].z, left.at[k].w};
        dev_wgmma<STEP / 16, 0>::run(product, row, dev_tile_low(strip_of<STEP>(right, k / 4) + static_cast<uint32_t>(k % 4 * 32)), k);
    }
}

/* What multiply_rows or multiply_held left, as operands of a product with the rows of its `right`. */
struct weights {
    uint4 at[STEP / 16];
};

template <int SIZE> __device__ weights weights_of(const float (&product)[SIZE]) {
    weights w;
#pragma unroll
    for (int k = 0; k < STEP / 16; k++)
        w.at[k] = make_uint4(dev_bf16x2(product[8 * k], product[8 * k + 1]), dev_bf16x2(product[8 * k + 2], product[8 * k + 3]),
                             dev_bf16x2(product[8 * k + 4], product[8 * k + 5]), dev_bf16x2(product[8 * k + 6], product[8 * k + 7]));
    return w;
}

/* sum [64,D] += weights [64,64] times the 64 rows of `right`.  Asynchronous. */
template <int D> __device__ void multiply_across(float (&sum)[D / 64][32], const weights &w, uint32_t right) {
#pragma unroll
    for (int k = 0; k < STEP / 16; k++) {
#pragma unroll
        for (int strip = 0; strip < D / 64; strip++)
            dev_wgmma64_across(sum[strip], w.at[k], dev_tile(strip_of<STEP>(right, strip) + k * 2048, 1024));
    }
}

template <int D> __device__ void settle(float (&sum)[D / 64][32]) {
#pragma unroll
    for (int strip = 0; strip < D / 64; strip++) dev_wgmma64_settle(sum[strip]);
}

/* Element i of a thread's 32: its row (of 64) and its column. */
__device__ int row_of_element(int i) {
    return static_cast<int>(threadIdx.x) % GROUP / ESPI_WARP * 16 + static_cast<int>(threadIdx.x) % ESPI_WARP / 4 + i / 2 % 2 * 8;
}
__device__ int column_of_element(int i) {
    return i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + i % 2;
}

template <int D> constexpr int STEP_BYTES = STEP *D * 2;
/* Of what passes by in the backward: that which is read, that which the products before still read, and that which is on its way. */
enum { STAGES = 3 };
/* Bytes of shared memory, the tiles of a block's own first. */
template <int D> constexpr int KEY_GRAD_BYTES = (2 * GROUPS + 2 * STAGES) * STEP_BYTES<D> + 3 * STAGES *STEP * 4;
template <int D> constexpr int QUERY_GRAD_BYTES = (2 * GROUPS + 2 * STAGES) * STEP_BYTES<D>;
template <int D> constexpr int FORWARD_BYTES = (GROUPS + 4) * STEP_BYTES<D>;

/* Blocks go by tile first and by head then: the tiles that see most come first in every head, so that the last blocks are short ones. */
struct place_of_block {
    int tile, head;
    __device__ explicit place_of_block(int heads)
        : tile(static_cast<int>(blockIdx.x) / heads), head(static_cast<int>(blockIdx.x) % heads) {}
};

/* The online softmax of a thread's two rows. */
struct row_sums {
    float most[2], sum[2];
};

/* Scores become weights relative to the new maxima, to which what was summed before must shrink. */
__device__ void take_scores(float (&score)[128], float (&shrink)[2], row_sums *sums, float scale) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float now = -INFINITY;
#pragma unroll
        for (int i = 2 * h; i < 32; i += 4) now = fmaxf(now, fmaxf(score[i], score[i + 1]));
        now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 1));
        now = fmaxf(now, __shfl_xor_sync(0xffffffffu, now, 2)) * scale;
        now = fmaxf(now, sums->most[h]);
        const float base = now == -INFINITY ? 0 : now; /* no key yet: all scores are -inf */
        shrink[h] = dev_exp2(sums->most[h] - base);
        float sum = sums->sum[h] * shrink[h];
        sums->most[h] = now;
#pragma unroll
        for (int i = 2 * h; i < 32; i += 4) {
            score[i] = dev_exp2(score[i] * scale - base);
            score[i + 1] = dev_exp2(score[i + 1] * scale - base);
            sum += score[i] + score[i + 1];
        }
        sums->sum[h] = sum;
    }
}

/* As attend of attention.cu.  The next scores become weights while the product with these weights is made. */
template <int D> __global__ void __launch_bounds__(BLOCK, D == 64 ? 2 : 1) forward_wgmma(const __grid_constant__ espi_attention_fwd a) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const uint32_t shared = dev_shared(memory);
    const place_of_block block(static_cast<int>(a.kv_heads));
    const int group = static_cast<int>(a.heads / a.kv_heads), kv_head = block.head;
    const int half = static_cast<int>(threadIdx.x) / GROUP * 64;
    int seq, index;
    if (!find_tile(a.spans, group, OWN, block.tile, true, &seq, &index)) return;
    const sequence s = sequence_of(a.spans, seq);
    const row_tile rows = {s, index * OWN, s.queries * group, group, kv_head * group, static_cast<int>(a.heads)};
    const uint32_t q_tile = shared, k_tiles = q_tile + OWN * D * 2, v_tiles = k_tiles + 2 * STEP_BYTES<D>;
    const bf16 *q = static_cast<const bf16 *>(a.q), *k = static_cast<const bf16 *>(a.k), *v = static_cast<const bf16 *>(a.v);
    const int last = (min(rows.first + static_cast<int>(OWN), rows.end) - 1) / group;
    const key_range range = keys_of(s, rows.token(0), last, a.window);
    const int first_step = range.begin / STEP, end_step = (range.end + STEP - 1) / STEP;
    const auto load = [&](uint32_t tiles, const bf16 *from, int step) {
        load_strips<D, STEP, 4>(
            tiles + step % 2 * STEP_BYTES<D>,
            [&](int row) -> const bf16 * {
                const int key = step * STEP + row;
                return key < s.keys ? from + (s.key_row(key) * a.kv_heads + kv_head) * D : nullptr;
            },
            from);
    };
    load_strips<D, OWN, 1>(
        q_tile,
        [&](int row) -> const bf16 * {
            const int64_t place = rows.place(row);
            return place >= 0 ? q + place * D : nullptr;
        },
        q);
    load(k_tiles, k, first_step);
    dev_copy_commit();

    const float scale = static_cast<float>(a.scale) * LOG2_E;
    float out[D / 64][32] = {}, score[128], shrink[2];
    row_sums sums = {{-INFINITY, -INFINITY}, {0, 0}};
    int seen[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = half + row_of_element(2 * h);
        seen[h] = s.before + rows.token(row);
        if (a.sinks && rows.place(row) >= 0) {
            sums.most[h] = a.sinks[rows.head + (rows.first + row) % group] * LOG2_E;
            sums.sum[h] = threadIdx.x % 4 == 0 ? 1 : 0;
        }
    }
    const int window = a.window > 0 && a.window < s.keys ? static_cast<int>(a.window) : s.keys;
    const auto take = [&](int step) {
        if (!sees_all(rows, step * STEP, STEP, last, window)) {
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const int key = step * STEP + column_of_element(i), row_seen = seen[i / 2 % 2];
                if (key > row_seen || key <= row_seen - window) score[i] = -INFINITY;
            }
        }
        take_scores(score, shrink, &sums, scale);
    };
    dev_copy_wait<0>();
    dev_fence_async();
    __syncthreads();
    if (first_step + 1 < end_step) load(k_tiles, k, first_step + 1);
    load(v_tiles, v, first_step);
    dev_copy_commit();
    const held_rows<D> held = hold_rows<D, OWN>(q_tile, half);
    dev_wgmma_begin();
    multiply_held<D>(score, held, k_tiles + first_step % 2 * STEP_BYTES<D>);
    dev_wgmma_commit();
    dev_wgmma_wait<0>();
    dev_wgmma_settle<STEP / 2>(score);
    take(first_step);
    weights p = weights_of(score);
    for (int step = first_step; step + 1 < end_step; step++) {
        dev_copy_wait<0>();
        dev_fence_async();
        __syncthreads();
        dev_wgmma_begin();
        multiply_held<D>(score, held, k_tiles + (step + 1) % 2 * STEP_BYTES<D>);
        dev_wgmma_commit();
        multiply_across<D>(out, p, v_tiles + step % 2 * STEP_BYTES<D>);
        dev_wgmma_commit();
        if (step + 2 < end_step) load(k_tiles, k, step + 2); /* while the tensor cores are busy */
        load(v_tiles, v, step + 1);
        dev_copy_commit();
        dev_wgmma_wait<1>();
        dev_wgmma_settle<STEP / 2>(score);
        take(step + 1);
        dev_wgmma_wait<0>();
        settle<D>(out);
        p = weights_of(score);
#pragma unroll
        for (int i = 0; i < 32; i++) {
#pragma unroll
            for (int strip = 0; strip < D / 64; strip++) out[strip][i] *= shrink[i / 2 % 2];
        }
    }
    dev_copy_wait<0>();
    dev_fence_async();
    __syncthreads();
    dev_wgmma_begin();
    multiply_across<D>(out, p, v_tiles + (end_step - 1) % 2 * STEP_BYTES<D>);
    dev_wgmma_commit();
    dev_wgmma_wait<0>();
    settle<D>(out);
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sums.sum[h] += __shfl_xor_sync(0xffffffffu, sums.sum[h], 1);
        sums.sum[h] += __shfl_xor_sync(0xffffffffu, sums.sum[h], 2);
        inverse[h] = 1 / sums.sum[h];
        const int64_t place = rows.place(half + row_of_element(2 * h));
        if (threadIdx.x % 4 == 0 && place >= 0) static_cast<float *>(a.lse)[place] = sums.most[h] * LN_2 + logf(sums.sum[h]);
    }
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const int64_t place = rows.place(half + row_of_element(i));
        if (place < 0) continue;
        uint32_t *to = reinterpret_cast<uint32_t *>(static_cast<bf16 *>(a.out) + place * D + column_of_element(i));
#pragma unroll
        for (int strip = 0; strip < D / 64; strip++)
            to[strip * 32] = dev_bf16x2(out[strip][i] * inverse[i / 2 % 2], out[strip][i + 1] * inverse[i / 2 % 2]);
    }
}

/* As key_grads of attention.cu; blockIdx.x is the head and the part of it, of gridDim.x. */
template <int D>
__global__ void __launch_bounds__(BLOCK, 1)
    key_grads_wgmma(const __grid_constant__ espi_attention_bwd a, float *d_k_parts, float *d_v_parts, const float *delta) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const uint32_t shared = dev_shared(memory);
    const int heads = static_cast<int>(a.heads), group = heads / static_cast<int>(gridDim.x), head = static_cast<int>(blockIdx.x) * group;
    const int kv_head = head * static_cast<int>(a.kv_heads) / heads;
    const int half = static_cast<int>(threadIdx.x) / GROUP * 64; /* the first of the warpgroup's own keys */
    int seq, index;
    if (!find_tile(a.spans, 1, OWN, static_cast<int>(blockIdx.y), false, &seq, &index)) return;
    const int first_key = index * OWN;
    /* Worked out again where it is wanted, as are others: registers are scarce. */
    const auto keys_here = [&] { return min(static_cast<int>(OWN), a.spans.cu_q[seq + 1] - a.spans.cu_q[seq] - first_key); };
    const uint32_t k_tile = shared, v_tile = k_tile + OWN * D * 2, q_tiles = v_tile + OWN * D * 2,
                   d_out_tiles = q_tiles + STAGES * STEP_BYTES<D>;
    float2 *row_terms = reinterpret_cast<float2 *>(memory + 2 * OWN * D * 2 + 2 * STAGES * STEP_BYTES<D>); /* log-sum and delta */
    int *seen_rows = reinterpret_cast<int *>(row_terms + STAGES * STEP); /* the last of the tile's keys that a row sees; negative: none */
    const bf16 *k = static_cast<const bf16 *>(a.k), *v = static_cast<const bf16 *>(a.v);
    const int keys = keys_here();
    const auto key_row = [&](const bf16 *from, int row) -> const bf16 * {
        return row < keys ? from + ((a.spans.cu_q[seq] + first_key + row) * a.kv_heads + kv_head) * D : nullptr;
    };
    load_strips<D, OWN, 1>(
        k_tile, [&](int row) { return key_row(k, row); }, k);
    load_strips<D, OWN, 1>(
        v_tile, [&](int row) { return key_row(v, row); }, v);

    const float scale = static_cast<float>(a.scale) * LOG2_E;
    float d_k[D / 64][32] = {}, d_v[D / 64][32] = {};
    /* The queries of the tile's own sequence, then of those that have it as their prefix. */
    for (int user = seq; user < a.spans.n_seqs; user++) {
        if (user > seq && (prefix_of(a.spans, user) == 0 || a.spans.prefix_start[user] != a.spans.cu_q[seq])) continue;
        const sequence s = sequence_of(a.spans, user);
        const int place = first_key + (user == seq ? prefix_of(a.spans, seq) : 0); /* of the tile's first key before these queries */
        const int window = a.window > 0 && a.window < s.keys ? static_cast<int>(a.window) : s.keys;
        const int first_token = max(place - s.before, 0);
        const int end_token = min(s.queries, place + keys_here() - 1 + window - s.before);
        const int first_step = first_token * group / STEP, end_step = (end_token * group + STEP - 1) / STEP;
        if (first_token >= end_token) continue;
        const int64_t first_row = s.first_query * a.heads + blockIdx.x * (a.heads / gridDim.x); /* head, again */
        const int end_row = s.queries * group, before = s.before - place;
        const auto load_rows = [&](int step) {
            const int stage = step % STAGES;
            const auto place_of = [&](int row) { return first_row + (step * STEP + row) / group * a.heads + (step * STEP + row) % group; };
            const auto row_at = [&](const void *from, int row) -> const bf16 * {
                return step * STEP + row < end_row ? static_cast<const bf16 *>(from) + place_of(row) * D : nullptr;
            };
            load_strips<D, STEP, 2>(
                q_tiles + stage * STEP_BYTES<D>, [&](int row) { return row_at(a.q, row); }, a.q);
            load_strips<D, STEP, 2>(
                d_out_tiles + stage * STEP_BYTES<D>, [&](int row) { return row_at(a.d_out, row); }, a.d_out);
            dev_copy_commit();
            if (threadIdx.x < STEP) {
                const int row = static_cast<int>(threadIdx.x);
                const bool is_there = step * STEP + row < end_row;
                row_terms[stage * STEP + row] =
                    is_there ? make_float2(static_cast<const float *>(a.lse)[place_of(row)] * LOG2_E, delta[place_of(row)])
                             : make_float2(0, 0);
                seen_rows[stage * STEP + row] = is_there ? before + (step * STEP + row) / group : -1;
            }
        };
        float score[32], d_p[32];
        weights p, d_s;
        /* The scores of a step and the gradients of its weights.  Asynchronous. */
        const auto score_step = [&](int step) {
            multiply_rows<D, OWN>(score, k_tile, half, q_tiles + step % STAGES * STEP_BYTES<D>);
            multiply_rows<D, OWN>(d_p, v_tile, half, d_out_tiles + step % STAGES * STEP_BYTES<D>);
            dev_wgmma_commit();
        };
        /* What a step adds to the sums.  Asynchronous. */
        const auto add_step = [&](int step) {
            multiply_across<D>(d_v, p, d_out_tiles + step % STAGES * STEP_BYTES<D>);
            multiply_across<D>(d_k, d_s, q_tiles + step % STAGES * STEP_BYTES<D>);
            dev_wgmma_commit();
        };
        const auto weigh_step = [&](int step) {
            const int first = step % STAGES * STEP, *seen = seen_rows + first;
            dev_wgmma64_settle(score);
            dev_wgmma64_settle(d_p);
            if (seen[0] < OWN - 1 || seen[STEP - 1] >= window || seen[STEP - 1] < 0) {
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    const int key = half + row_of_element(i), last = seen[column_of_element(i)];
                    if (last < key || last - key >= window) score[i] = -INFINITY;
                }
            }
#pragma unroll
            for (int i = 0; i < 32; i += 2) {
                const float4 terms = *reinterpret_cast<const float4 *>(row_terms + first + column_of_element(i));
                score[i] = dev_exp2(score[i] * scale - terms.x);
                score[i + 1] = dev_exp2(score[i + 1] * scale - terms.z);
                d_p[i] = score[i] * (d_p[i] - terms.y);
                d_p[i + 1] = score[i + 1] * (d_p[i + 1] - terms.w);
            }
        };
        const auto next_stage = [&](int step) {
            dev_copy_wait<0>();
            dev_fence_async();
            __syncthreads();
            if (step + 1 < end_step) load_rows(step + 1);
        };
        __syncthreads(); /* the stages of the sequence before have been read */
        load_rows(first_step);
        next_stage(first_step);
        dev_wgmma_begin();
        score_step(first_step);
        dev_wgmma_wait<0>();
        weigh_step(first_step);
        p = weights_of(score);
        d_s = weights_of(d_p);
        /* The next scores are weighed while the products with these are made. */
        for (int step = first_step; step + 1 < end_step; step++) {
            next_stage(step + 1);
            dev_wgmma_begin();
            score_step(step + 1);
            add_step(step);
            dev_wgmma_wait<1>();
            weigh_step(step + 1);
            dev_wgmma_wait<0>();
            settle<D>(d_v);
            settle<D>(d_k);
            p = weights_of(score);
            d_s = weights_of(d_p);
        }
        dev_wgmma_begin();
        add_step(end_step - 1);
        dev_wgmma_wait<0>();
        settle<D>(d_v);
        settle<D>(d_k);
    }
    dev_copy_wait<0>();
    const float factor = static_cast<float>(a.scale);
    const int64_t first_row = a.spans.cu_q[seq] + first_key;
    const int end = keys_here();
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const int row = half + row_of_element(i);
        if (row >= end) continue;
        const int64_t at = ((first_row + row) * gridDim.x + blockIdx.x) * D + column_of_element(i);
#pragma unroll
        for (int strip = 0; strip < D / 64; strip++) {
            *reinterpret_cast<float2 *>(d_k_parts + at + strip * 64) = make_float2(d_k[strip][i] * factor, d_k[strip][i + 1] * factor);
            *reinterpret_cast<float2 *>(d_v_parts + at + strip * 64) = make_float2(d_v[strip][i], d_v[strip][i + 1]);
        }
    }
}

/* As query_grads of attention.cu. */
template <int D>
__global__ void __launch_bounds__(BLOCK, 1) query_grads_wgmma(const __grid_constant__ espi_attention_bwd a, const float *delta) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const uint32_t shared = dev_shared(memory);
    const place_of_block block(static_cast<int>(a.kv_heads));
    const int group = static_cast<int>(a.heads / a.kv_heads), kv_head = block.head;
    const int half = static_cast<int>(threadIdx.x) / GROUP * 64;
    int seq, index;
    if (!find_tile(a.spans, group, OWN, block.tile, true, &seq, &index)) return;
    const sequence s = sequence_of(a.spans, seq);
    const row_tile rows = {s, index * OWN, s.queries * group, group, kv_head * group, static_cast<int>(a.heads)};
    const uint32_t q_tile = shared, d_out_tile = q_tile + OWN * D * 2, k_tiles = d_out_tile + OWN * D * 2,
                   v_tiles = k_tiles + STAGES * STEP_BYTES<D>;
    const bf16 *q = static_cast<const bf16 *>(a.q), *k = static_cast<const bf16 *>(a.k), *v = static_cast<const bf16 *>(a.v);
    const bf16 *d_out = static_cast<const bf16 *>(a.d_out);
    const int last = (min(rows.first + static_cast<int>(OWN), rows.end) - 1) / group;
    const key_range range = keys_of(s, rows.token(0), last, a.window);
    const int first_step = range.begin / STEP, end_step = (range.end + STEP - 1) / STEP;
    const auto load_keys = [&](int step) {
        const int stage = step % STAGES;
        const auto row_at = [&](const bf16 *from, int row) -> const bf16 * {
            const int key = step * STEP + row;
            return key < s.keys ? from + (s.key_row(key) * a.kv_heads + kv_head) * D : nullptr;
        };
        load_strips<D, STEP, 4>(
            k_tiles + stage * STEP_BYTES<D>, [&](int row) { return row_at(k, row); }, k);
        load_strips<D, STEP, 4>(
            v_tiles + stage * STEP_BYTES<D>, [&](int row) { return row_at(v, row); }, v);
        dev_copy_commit();
    };
    const auto query_row = [&](const bf16 *from, int row) -> const bf16 * {
        const int64_t place = rows.place(row);
        return place >= 0 ? from + place * D : nullptr;
    };
    load_strips<D, OWN, 1>(
        q_tile, [&](int row) { return query_row(q, row); }, q);
    load_strips<D, OWN, 1>(
        d_out_tile, [&](int row) { return query_row(d_out, row); }, d_out);
    load_keys(first_step);

    const float scale = static_cast<float>(a.scale) * LOG2_E;
    float lse[2], row_delta[2];
    int seen[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = half + row_of_element(2 * h);
        const int64_t place = rows.place(row);
        lse[h] = place >= 0 ? static_cast<const float *>(a.lse)[place] * LOG2_E : 0;
        row_delta[h] = place >= 0 ? delta[place] : 0;
        seen[h] = s.before + rows.token(row);
    }
    const int window = a.window > 0 && a.window < s.keys ? static_cast<int>(a.window) : s.keys;
    float sum[D / 64][32] = {}, score[32], d_p[32];
    weights d_s;
    const auto score_step = [&](int step) {
        multiply_rows<D, OWN>(score, q_tile, half, k_tiles + step % STAGES * STEP_BYTES<D>);
        multiply_rows<D, OWN>(d_p, d_out_tile, half, v_tiles + step % STAGES * STEP_BYTES<D>);
        dev_wgmma_commit();
    };
    const auto add_step = [&](int step) {
        multiply_across<D>(sum, d_s, k_tiles + step % STAGES * STEP_BYTES<D>);
        dev_wgmma_commit();
    };
    const auto weigh_step = [&](int step) {
        dev_wgmma64_settle(score);
        dev_wgmma64_settle(d_p);
        if (!sees_all(rows, step * STEP, STEP, last, window)) {
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const int key = step * STEP + column_of_element(i), row_seen = seen[i / 2 % 2];
                if (key > row_seen || key <= row_seen - window) score[i] = -INFINITY;
            }
        }
#pragma unroll
        for (int i = 0; i < 32; i++) d_p[i] = dev_exp2(score[i] * scale - lse[i / 2 % 2]) * (d_p[i] - row_delta[i / 2 % 2]);
    };
    const auto next_stage = [&](int step) {
        dev_copy_wait<0>();
        dev_fence_async();
        __syncthreads();
        if (step + 1 < end_step) load_keys(step + 1);
    };
    next_stage(first_step);
    dev_wgmma_begin();
    score_step(first_step);
    dev_wgmma_wait<0>();
    weigh_step(first_step);
    d_s = weights_of(d_p);
    for (int step = first_step; step + 1 < end_step; step++) { /* as key_grads_wgmma */
        next_stage(step + 1);
        dev_wgmma_begin();
        score_step(step + 1);
        add_step(step);
        dev_wgmma_wait<1>();
        weigh_step(step + 1);
        dev_wgmma_wait<0>();
        settle<D>(sum);
        d_s = weights_of(d_p);
    }
    dev_wgmma_begin();
    add_step(end_step - 1);
    dev_wgmma_wait<0>();
    settle<D>(sum);
    const float factor = static_cast<float>(a.scale);
#pragma unroll
    for (int i = 0; i < 32; i += 2) {
        const int64_t place = rows.place(half + row_of_element(i));
        if (place < 0) continue;
        uint32_t *to = reinterpret_cast<uint32_t *>(static_cast<bf16 *>(a.d_q) + place * D + column_of_element(i));
#pragma unroll
        for (int strip = 0; strip < D / 64; strip++) to[strip * 32] = dev_bf16x2(sum[strip][i] * factor, sum[strip][i + 1] * factor);
    }
}

} // namespace

template <int D> esp_status espi_attention_fwd_wgmma(const espi_exec *exec, const espi_attention_fwd *a) {
    const int64_t rows = a->spans.tokens * (a->heads / a->kv_heads);
    const unsigned blocks = static_cast<unsigned>((rows / OWN + a->spans.n_seqs) * a->kv_heads);
    ESPI_CUDA_TRY(cudaFuncSetAttribute(forward_wgmma<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, FORWARD_BYTES<D>));
    forward_wgmma<D><<<blocks, BLOCK, FORWARD_BYTES<D>, espi_cuda_of(exec)->stream>>>(*a);
    return ESPI_CUDA_LAUNCHED("attention");
}

template esp_status espi_attention_fwd_wgmma<64>(const espi_exec *, const espi_attention_fwd *);
template esp_status espi_attention_fwd_wgmma<128>(const espi_exec *, const espi_attention_fwd *);

template <int D>
esp_status espi_attention_bwd_wgmma(const espi_exec *exec, const espi_attention_bwd *a, const float *delta, float *d_k_parts,
                                    float *d_v_parts, int64_t splits) {
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const int64_t rows = a->spans.tokens * (a->heads / a->kv_heads);
    const dim3 key_blocks(static_cast<unsigned>(a->kv_heads * splits), static_cast<unsigned>(a->spans.tokens / OWN + a->spans.n_seqs));
    const unsigned query_blocks = static_cast<unsigned>((rows / OWN + a->spans.n_seqs) * a->kv_heads);
    ESPI_CUDA_TRY(cudaFuncSetAttribute(key_grads_wgmma<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, KEY_GRAD_BYTES<D>));
    ESPI_CUDA_TRY(cudaFuncSetAttribute(query_grads_wgmma<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, QUERY_GRAD_BYTES<D>));
    key_grads_wgmma<D><<<key_blocks, BLOCK, KEY_GRAD_BYTES<D>, stream>>>(*a, d_k_parts, d_v_parts, delta);
    query_grads_wgmma<D><<<query_blocks, BLOCK, QUERY_GRAD_BYTES<D>, stream>>>(*a, delta);
    return ESPI_CUDA_LAUNCHED("gradient of attention");
}

template esp_status espi_attention_bwd_wgmma<64>(const espi_exec *, const espi_attention_bwd *, const float *, float *, float *, int64_t);
template esp_status espi_attention_bwd_wgmma<128>(const espi_exec *, const espi_attention_bwd *, const float *, float *, float *, int64_t);
