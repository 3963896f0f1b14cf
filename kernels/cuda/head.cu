/* The head: log-probabilities, entropies, the loss gradient and sampling.  A chunk of rows at a time, whose logits lie in a bounded tile in
 * bf16: one product makes them, one kernel reads a row's statistics from them, one puts their gradient in their place, and a second product
 * makes the hidden states' gradient of that.  Of many rows on sm_90a the logits stay in registers: see below.  All that is said of a row
 * (statistics, gradient, sample) is of the rounded logits, so that it agrees. */
#include "kernels/cuda/dev.cuh"
#include "kernels/cuda/head.cuh"

#include <stdlib.h>

/* What the stream's callback is given.  The same call keeps its record: a recorded graph makes it again. */
struct espi_cuda_call {
    espi_cuda_call *next;
    espi_cuda *cuda;
    esp_status (*coef)(void *user, int64_t first, int64_t count);
    void *user;
    int64_t first, count;
};

namespace {

enum {
    MANY_ROWS = 256, /* threads a row, where there are enough rows to fill the GPU */
    FEW_ROWS = 512,  /* and where there are not */
    COPY_THREADS = 256,
    VECTOR = 8,
    LARGE_STEP = 512, /* rows of a chunk: cuBLASLt is at its best with a multiple of this, */
    SMALL_STEP = 256, /* and this is whole tiles still */
    WIDE_ROWS = 512   /* from which head_wgmma makes the logits */
};

/* Of a slice of the vocabulary, and the most rows beside it: whole waves of the GPU's blocks. */
constexpr int64_t SLICE_TILES = 66, SLICE_ROWS = 4096;

/* Bytes of a tile of logits; at most 0.3 GB with all else. */
#define TILE_BYTES ((int64_t)236 << 20)
#define SLICE_BYTES ((int64_t)270 << 20)

/* From what the product leaves to z. */
struct logit_terms {
    const float *bias;
    float logit_scale, softcap, inverse_temperature, gain; /* gain: the two factors, where nothing stands between them */
};

bool is_plain(const espi_head *head) {
    return !head->bias && head->softcap == 0 && head->logit_scale > 0;
}

logit_terms terms_of(const espi_head *head) {
    const double inverse = head->temperature == 0 ? 1 : 1 / head->temperature;
    return {head->bias, static_cast<float>(head->logit_scale), static_cast<float>(head->softcap), static_cast<float>(inverse),
            static_cast<float>(head->logit_scale * inverse)};
}

/* One definition, so that the sampler's log-probability and the trainer's are the same bits.  PLAIN: as is_plain says. */
template <bool PLAIN> __device__ float logit(const logit_terms &terms, float product, int64_t v) {
    if constexpr (PLAIN) return product * terms.gain;
    if (terms.bias) product += terms.bias[v];
    product *= terms.logit_scale;
    if (terms.softcap != 0) product = terms.softcap * tanhf(product / terms.softcap);
    return product * terms.inverse_temperature;
}

/* e^(z - most). */
__device__ float weight_of(float z, float most) {
    return dev_exp2((z - most) * LOG2_E);
}

/* Maximum, sum of exponentials and exponential-weighted sum of z, the sums relative to the maximum. */
struct partial {
    float most, sum, sum_z;
};

__device__ partial merge(partial a, partial b) {
    const float most = fmaxf(a.most, b.most);
    if (most == -INFINITY) return a;
    const float left = weight_of(a.most, most), right = weight_of(b.most, most);
    return {most, a.sum * left + b.sum * right, a.sum_z * left + b.sum_z * right};
}

/* The ids that a row is a distribution over; n = 0: the vocabulary. */
struct id_list {
    const int32_t *ids;
    int64_t n;
};

__device__ id_list list_of(const int64_t *offsets, const int32_t *kept, int64_t row) {
    if (!offsets) return {nullptr, 0};
    return {kept + offsets[row], offsets[row + 1] - offsets[row]};
}

__device__ partial add_one(partial own, float z) {
    const float most = fmaxf(own.most, z), shrink = own.sum > 0 ? weight_of(own.most, most) : 0, p = weight_of(z, most);
    return {most, own.sum * shrink + p, own.sum_z * shrink + z * p};
}

/* A thread's whole vectors of a plain row; *first is then behind them.  sum_z is made of products and scaled once. */
template <int THREADS> __device__ partial plain_partial(int64_t *first, const bf16 *row, int64_t vocab, const logit_terms &terms) {
    const float slope = terms.gain * LOG2_E;
    float most = -INFINITY, base = 0, sum = 0, sum_x = 0;
#pragma unroll 2
    for (; *first + VECTOR <= vocab; *first += THREADS * VECTOR) {
        const bf16x8 v = *reinterpret_cast<const bf16x8 *>(row + *first);
        float x[VECTOR], now = most;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            x[j] = espi_value(v.at[j]);
            now = fmaxf(now, x[j]);
        }
        if (now > most) { /* rare after the first few */
            const float shrink = most == -INFINITY ? 0 : dev_exp2((most - now) * slope);
            sum *= shrink;
            sum_x *= shrink;
            most = now;
            base = now * slope;
        }
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            const float p = dev_exp2(x[j] * slope - base);
            sum += p;
            sum_x += x[j] * p;
        }
    }
    return {most * terms.gain, sum, sum_x * terms.gain};
}

/* Of a row, in every thread. */
template <int THREADS, bool PLAIN>
__device__ partial row_partial(const bf16 *row, int64_t vocab, const id_list &list, const logit_terms &terms) {
    constexpr int WARPS = THREADS / ESPI_WARP;
    __shared__ partial parts[WARPS];
    partial own = {-INFINITY, 0, 0};
    for (int64_t j = threadIdx.x; j < list.n; j += THREADS)
        own = add_one(own, logit<PLAIN>(terms, espi_value(row[list.ids[j]]), list.ids[j]));
    int64_t first = static_cast<int64_t>(threadIdx.x) * VECTOR;
    if (PLAIN && list.n == 0) own = plain_partial<THREADS>(&first, row, vocab, terms);
    for (; list.n == 0 && first < vocab; first += THREADS * VECTOR) {
        for (int j = 0; j < VECTOR && first + j < vocab; j++)
            own = add_one(own, logit<PLAIN>(terms, espi_value(row[first + j]), first + j));
    }
    for (int other = ESPI_WARP / 2; other > 0; other /= 2)
        own = merge(own, {__shfl_xor_sync(0xffffffffu, own.most, other), __shfl_xor_sync(0xffffffffu, own.sum, other),
                          __shfl_xor_sync(0xffffffffu, own.sum_z, other)});
    __syncthreads(); /* the parts before have been read */
    if (threadIdx.x % ESPI_WARP == 0) parts[threadIdx.x / ESPI_WARP] = own;
    __syncthreads();
    own = parts[0];
    for (int warp = 1; warp < WARPS; warp++) own = merge(own, parts[warp]);
    return own;
}

/* Where a row's results go: arrays of the GPU, and of the host where the loss is made there (or NULL). */
struct row_results {
    float *lp, *entropy, *lse, *host_lp, *host_entropy;
};

template <int THREADS, bool PLAIN>
__global__ void __launch_bounds__(THREADS)
    row_statistics(row_results to, const bf16 *tile, const int32_t *target, const int64_t *kept_offsets, const int32_t *kept,
                   int64_t stride, int64_t vocab, logit_terms terms) {
    const bf16 *row = tile + blockIdx.x * stride;
    const partial p = row_partial<THREADS, PLAIN>(row, vocab, list_of(kept_offsets, kept, blockIdx.x), terms);
    if (threadIdx.x > 0) return;
    const float log_sum = p.most + logf(p.sum), entropy = log_sum - p.sum_z / p.sum;
    const int64_t y = target[blockIdx.x];
    const float lp = logit<PLAIN>(terms, espi_value(row[y]), y) - log_sum;
    to.lse[blockIdx.x] = log_sum;
    to.entropy[blockIdx.x] = entropy;
    to.lp[blockIdx.x] = lp;
    if (!to.host_lp) return;
    to.host_lp[blockIdx.x] = lp;
    to.host_entropy[blockIdx.x] = entropy;
}

/* Where in the list the first id stands that is not below v. */
__device__ int64_t find_id(const id_list &list, int64_t v) {
    int64_t low = 0, high = list.n;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (list.ids[middle] < v)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* What the loss asks of the rows: on the GPU, or where the host has left it, from where it is copied. */
struct row_coefficients {
    const float *g, *e, *lse, *entropy; /* g may be NULL: 1; e: 0 */
    float *copy_g, *copy_e;             /* NULL: not from the host */
};

/* The gradient of the products in their place. */
template <int THREADS, bool PLAIN>
__global__ void __launch_bounds__(THREADS) row_gradient(bf16 *tile, const int32_t *target, row_coefficients c, const int64_t *kept_offsets,
                                                        const int32_t *kept, int64_t stride, int64_t vocab, logit_terms terms) {
    bf16 *row = tile + blockIdx.x * stride;
    const id_list list = list_of(kept_offsets, kept, blockIdx.x);
    const float gain = c.g ? c.g[blockIdx.x] : 1, spread = c.e ? c.e[blockIdx.x] : 0, log_sum = c.lse[blockIdx.x];
    const float h = spread != 0 ? c.entropy[blockIdx.x] : 0, factor = PLAIN ? terms.gain : terms.logit_scale * terms.inverse_temperature;
    const int64_t y = target[blockIdx.x];
    if (c.copy_g && blockIdx.y == 0 && threadIdx.x == 0) {
        c.copy_g[blockIdx.x] = gain;
        c.copy_e[blockIdx.x] = spread;
    }
    if (PLAIN && list.n == 0) {
        /* d = p (c0 - spread log p), and the gain more at the target; what stands behind the vocabulary is nobody's. */
        const float slope = terms.gain * LOG2_E, base = log_sum * LOG2_E, down = spread * factor, c0 = -(gain + spread * h) * factor;
        for (int64_t first = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * VECTOR; first < vocab;
             first += static_cast<int64_t>(gridDim.y) * THREADS * VECTOR) {
            bf16x8 v = *reinterpret_cast<const bf16x8 *>(row + first);
            float d[VECTOR];
#pragma unroll
            for (int j = 0; j < VECTOR; j++) {
                const float x = espi_value(v.at[j]);
                d[j] = dev_exp2(x * slope - base) * (c0 - down * (x * terms.gain - log_sum));
            }
            if (y >= first && y < first + VECTOR) {
#pragma unroll
                for (int j = 0; j < VECTOR; j++) d[j] += first + j == y ? gain * factor : 0;
            }
#pragma unroll
            for (int j = 0; j < VECTOR; j++) espi_store(&v.at[j], d[j]);
            *reinterpret_cast<bf16x8 *>(row + first) = v;
        }
        return;
    }
    for (int64_t first = (static_cast<int64_t>(blockIdx.y) * THREADS + threadIdx.x) * VECTOR; first < vocab;
         first += static_cast<int64_t>(gridDim.y) * THREADS * VECTOR) {
        bf16x8 v = *reinterpret_cast<const bf16x8 *>(row + first);
        int64_t next = list.n > 0 ? find_id(list, first) : 0;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            const int64_t id = first + j < vocab ? first + j : 0;
            const float z = logit<PLAIN>(terms, espi_value(v.at[j]), id), log_p = z - log_sum, p = dev_exp2(log_p * LOG2_E);
            float d = (id == y ? gain : 0) - gain * p;
            if (spread != 0) d -= spread * p * (log_p + h);
            d *= factor;
            if (!PLAIN && terms.softcap != 0) {
                const float bent = z / (terms.inverse_temperature * terms.softcap);
                d *= 1 - bent * bent;
            }
            if (list.n > 0) {
                const bool is_kept = next < list.n && list.ids[next] == id;
                next += is_kept;
                d = is_kept ? d : 0;
            }
            espi_store(&v.at[j], d);
        }
        *reinterpret_cast<bf16x8 *>(row + first) = v;
    }
}

/* Sums of consecutive rows, put where the rows are named.  late: the coefficients that the sums were made without. */
__global__ void __launch_bounds__(COPY_THREADS)
    put_sums(bf16 *to, const float *sums, const int32_t *rows, int64_t hidden, row_coefficients late) {
    const int64_t from = blockIdx.x * hidden, at = rows[blockIdx.x] * hidden;
    const float gain = late.g ? late.g[blockIdx.x] : 1;
    if (late.copy_g && threadIdx.x == 0) {
        late.copy_g[blockIdx.x] = gain;
        late.copy_e[blockIdx.x] = 0;
    }
    for (int64_t h = threadIdx.x; h < hidden; h += COPY_THREADS) espi_store(to + at + h, gain * sums[from + h]);
}

/* Rows named by an index into consecutive rows.  T: bf16, or eight of them. */
template <typename T> __global__ void __launch_bounds__(COPY_THREADS) copy_rows(T *to, const T *from, const int32_t *rows, int64_t hidden) {
    const int64_t dense = blockIdx.x * hidden, named = rows[blockIdx.x] * hidden;
    for (int64_t h = threadIdx.x; h < hidden; h += COPY_THREADS) to[dense + h] = from[named + h];
}

__global__ void __launch_bounds__(COPY_THREADS) finish_logits(float *logits, int64_t n, int64_t vocab, logit_terms terms) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * COPY_THREADS + threadIdx.x;
    if (i < n) logits[i] = logit<false>(terms, logits[i], i % vocab);
}

/* The largest z, of equal ones the lowest id. */
template <int THREADS, bool PLAIN> __device__ int64_t largest(const bf16 *row, int64_t vocab, const logit_terms &terms) {
    constexpr int WARPS = THREADS / ESPI_WARP;
    __shared__ float best_z[WARPS];
    __shared__ int best_id[WARPS];
    float z_most = -INFINITY;
    int id = INT32_MAX;
    for (int64_t v = threadIdx.x; v < vocab; v += THREADS) {
        const float z = logit<PLAIN>(terms, espi_value(row[v]), v);
        if (z > z_most) {
            z_most = z;
            id = static_cast<int>(v);
        }
    }
    for (int other = ESPI_WARP / 2; other > 0; other /= 2) {
        const float z = __shfl_xor_sync(0xffffffffu, z_most, other);
        const int v = __shfl_xor_sync(0xffffffffu, id, other);
        if (z > z_most || (z == z_most && v < id)) {
            z_most = z;
            id = v;
        }
    }
    if (threadIdx.x % ESPI_WARP == 0) {
        best_z[threadIdx.x / ESPI_WARP] = z_most;
        best_id[threadIdx.x / ESPI_WARP] = id;
    }
    __syncthreads();
    for (int warp = 0; warp < WARPS; warp++) {
        if (best_z[warp] > z_most || (best_z[warp] == z_most && best_id[warp] < id)) {
            z_most = best_z[warp];
            id = best_id[warp];
        }
    }
    return id < vocab ? id : 0;
}

/* The first of n entries (those of the list, or the vocabulary) whose cumulative probability passes the uniform; rounding may leave none, then
 * the last that has any probability.  Each warp sums a stretch of them; the warp whose stretch reaches the uniform walks it. */
template <int THREADS, bool PLAIN>
__device__ int64_t inverse_cdf(const bf16 *row, int64_t n, const int32_t *ids, const logit_terms &terms, float lse, double uniform) {
    constexpr int WARPS = THREADS / ESPI_WARP;
    __shared__ double sums[WARPS];
    __shared__ int lasts[WARPS], found;
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const int64_t stretch = (n + WARPS - 1) / WARPS, first = warp * stretch, end = min(first + stretch, n);
    const auto probability = [&](int64_t at) {
        const int64_t id = ids ? ids[at] : at;
        return weight_of(logit<PLAIN>(terms, espi_value(row[id]), id), lse);
    };
    double sum = 0;
    int last = 0;
    for (int64_t at = first + lane; at < end; at += ESPI_WARP) {
        const float p = probability(at);
        sum += p;
        if (p > 0) last = static_cast<int>(at);
    }
    sum = espi_warp_sum(sum);
    last = __reduce_max_sync(0xffffffffu, last);
    if (lane == 0) {
        sums[warp] = sum;
        lasts[warp] = last;
    }
    if (threadIdx.x == 0) found = INT32_MAX;
    __syncthreads();
    double below = 0;
    for (int w = 0; w < warp; w++) below += sums[w];
    const bool reaches = below <= uniform && below + sums[warp] > uniform;
    for (int64_t at = first; reaches && at < end; at += ESPI_WARP) {
        double up_to = at + lane < end ? probability(at + lane) : 0;
        for (int by = 1; by < ESPI_WARP; by *= 2) {
            const double under = __shfl_up_sync(0xffffffffu, up_to, by);
            if (lane >= by) up_to += under;
        }
        const unsigned passed = __ballot_sync(0xffffffffu, at + lane < end && below + up_to > uniform);
        if (passed) {
            if (lane == 0) atomicMin(&found, static_cast<int>(at) + __ffs(static_cast<int>(passed)) - 1);
            break;
        }
        below += __shfl_sync(0xffffffffu, up_to, ESPI_WARP - 1);
    }
    __syncthreads();
    int64_t chosen = found;
    if (chosen >= n) {
        chosen = 0;
        for (int w = 0; w < WARPS; w++) chosen = max(chosen, static_cast<int64_t>(lasts[w]));
    }
    return ids ? ids[chosen] : chosen;
}

/* ---- What a filter leaves: the first of the entries ordered by z, of equal ones the lower id first ---- */

/* Larger for a larger z.  PLAIN: z grows with its product, and 16 bits say it. */
template <bool PLAIN> __device__ uint32_t key_of(bf16 product, float z) {
    const uint32_t bits = PLAIN ? static_cast<uint32_t>(__bfloat16_as_ushort(product)) << 16 : __float_as_uint(z);
    const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return PLAIN ? key & 0xffff0000u : key;
}

/* A cut of that order: the entries of a larger key, and the first `ties` of those that have the key itself. */
struct cut {
    uint32_t key;
    int64_t ties;
};

/* The sum over the row of value(key, z), in every thread. */
template <typename T, int THREADS, bool PLAIN, typename F>
__device__ T row_sum(const bf16 *row, int64_t vocab, const logit_terms &terms, F value) {
    T sum = 0;
    for (int64_t first = static_cast<int64_t>(threadIdx.x) * VECTOR; first < vocab; first += THREADS * VECTOR) {
        const bf16x8 v = *reinterpret_cast<const bf16x8 *>(row + first);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) {
            if (first + j >= vocab) continue;
            const float z = logit<PLAIN>(terms, espi_value(v.at[j]), first + j);
            sum += value(key_of<PLAIN>(v.at[j], z), z);
        }
    }
    return espi_block_sum<THREADS>(sum);
}

/* The largest key that is enough; enough(0) must hold, and with a key every smaller one is. */
template <bool PLAIN, typename F> __device__ uint32_t largest_key(F enough) {
    uint32_t key = 0;
    for (uint32_t bit = 0x80000000u; bit >= (PLAIN ? 0x10000u : 1u); bit /= 2)
        if (enough(key | bit)) key |= bit;
    return key;
}

template <int THREADS, bool PLAIN>
__device__ cut cut_of(const bf16 *row, int64_t vocab, const espi_head_filter &filter, float most, const logit_terms &terms) {
    cut c = {0, vocab};
    const auto count_above = [&](uint32_t least, bool itself) {
        return row_sum<int, THREADS, PLAIN>(row, vocab, terms,
                                            [=](uint32_t key, float) { return key > least || (itself && key == least) ? 1 : 0; });
    };
    if (filter.top_k > 0) {
        c.key = largest_key<PLAIN>([&](uint32_t key) { return count_above(key, true) >= filter.top_k; });
        c.ties = filter.top_k - count_above(c.key, false);
    }
    if (filter.top_p > 0) {
        const auto mass_at = [&](uint32_t at) {
            return row_sum<double, THREADS, PLAIN>(
                row, vocab, terms, [=](uint32_t key, float z) { return key == at ? static_cast<double>(weight_of(z, most)) : 0.0; });
        };
        /* The mass from `least` up, of what the first cut left. */
        const int all_ties = c.key > 0 ? count_above(c.key, true) - count_above(c.key, false) : 0;
        const double tie_mass =
            all_ties > 0 ? mass_at(c.key) / all_ties * static_cast<double>(min(static_cast<int64_t>(all_ties), c.ties)) : 0;
        const auto mass = [&](uint32_t least, bool itself) {
            const double sum = row_sum<double, THREADS, PLAIN>(row, vocab, terms, [=](uint32_t key, float z) {
                return key > c.key && (key > least || (itself && key == least)) ? static_cast<double>(weight_of(z, most)) : 0.0;
            });
            return c.key > least || (itself && c.key == least) ? sum + tie_mass : sum;
        };
        const double wanted = filter.top_p * mass(0, true);
        const uint32_t key = largest_key<PLAIN>([&](uint32_t least) { return mass(least, true) >= wanted; });
        const double above = mass(key, false);
        const int64_t n =
            key == c.key && all_ties > 0 ? min(c.ties, static_cast<int64_t>(all_ties)) : count_above(key, true) - count_above(key, false);
        const double each = (mass(key, true) - above) / static_cast<double>(n);
        const int64_t ties = each > 0 ? static_cast<int64_t>(ceil((wanted - above) / each)) : n;
        c = {key, min(max(ties, static_cast<int64_t>(1)), n)};
    }
    return c;
}

/* Lists in order the ids that a filter leaves; their number, and no more than `room` are written. */
template <int THREADS, bool PLAIN>
__device__ int64_t list_left(int32_t *kept, int64_t room, const bf16 *row, int64_t vocab, const espi_head_filter &filter, float most,
                             const logit_terms &terms) {
    __shared__ int32_t list[THREADS], equal[THREADS];
    const cut c = cut_of<THREADS, PLAIN>(row, vocab, filter, most, terms);
    const float least = static_cast<float>(filter.min_p);
    int64_t ties = c.ties, left = 0;
    const auto z_of = [&](int64_t v) { return logit<PLAIN>(terms, espi_value(row[v]), v); };
    const auto is_likely = [&](float z) { return z == most || !(filter.min_p > 0) || weight_of(z, most) >= least; };
    for (int64_t first = 0; first < vocab; first += THREADS) {
        const int64_t mine = first + threadIdx.x;
        if (!__syncthreads_or(mine < vocab && key_of<PLAIN>(row[mine], z_of(mine)) >= c.key)) continue;
        /* Those at the key first: which of them are among the first `ties`? */
        const int n_equal = espi_list<THREADS>(equal, first, vocab, [&](int64_t v) { return key_of<PLAIN>(row[v], z_of(v)) == c.key; });
        const int64_t last = ties <= 0 ? -1 : n_equal <= ties ? INT32_MAX : equal[ties - 1];
        ties -= n_equal;
        const int n = espi_list<THREADS>(list, first, vocab, [&](int64_t v) {
            const float z = z_of(v);
            const uint32_t key = key_of<PLAIN>(row[v], z);
            return is_likely(z) && (key > c.key || (key == c.key && v <= last));
        });
        if (static_cast<int>(threadIdx.x) < n && left + threadIdx.x < room) kept[left + threadIdx.x] = list[threadIdx.x];
        left += n;
    }
    __syncthreads();
    return left;
}

struct sample_terms {
    bool greedy;
    espi_head_filter filter;
    int32_t *kept, *kept_count; /* NULL: no filter */
    int64_t kept_most;
};

template <int THREADS, bool PLAIN>
__global__ void __launch_bounds__(THREADS, 1) sample_rows(int32_t *token, float *lp, const bf16 *tile, const double *uniform,
                                                          sample_terms sample, int64_t stride, int64_t vocab, logit_terms terms) {
    const bf16 *row = tile + blockIdx.x * stride;
    partial p = row_partial<THREADS, PLAIN>(row, vocab, {nullptr, 0}, terms);
    id_list list = {nullptr, 0};
    if (sample.kept) {
        int32_t *kept = sample.kept + blockIdx.x * sample.kept_most;
        const int64_t left = list_left<THREADS, PLAIN>(kept, sample.kept_most, row, vocab, sample.filter, p.most, terms);
        if (threadIdx.x == 0) sample.kept_count[blockIdx.x] = left > sample.kept_most ? -1 : static_cast<int32_t>(left);
        if (left > sample.kept_most) return;
        list = {kept, left};
        p = row_partial<THREADS, PLAIN>(row, vocab, list, terms);
    }
    const float log_sum = p.most + logf(p.sum);
    const int64_t id = sample.greedy
                           ? largest<THREADS, PLAIN>(row, vocab, terms)
                           : inverse_cdf<THREADS, PLAIN>(row, list.n > 0 ? list.n : vocab, list.ids, terms, log_sum, uniform[blockIdx.x]);
    if (threadIdx.x > 0) return;
    token[blockIdx.x] = static_cast<int32_t>(id);
    lp[blockIdx.x] = logit<PLAIN>(terms, espi_value(row[id]), id) - log_sum;
}

/* ---- Chunks ---- */

int64_t tile_stride(const espi_head *head) {
    return espi_ceil_div(head->w.rows, VECTOR) * VECTOR;
}

/* Rows that are cut into chunks: of each at most `most`, a multiple of `step`.  There is room for the most that any number of rows up to n has
 * of a chunk: a plan is made for the largest. */
struct row_cut {
    int64_t most, step;
};

int64_t room_rows(const espi_head *head, row_cut cut) {
    return head->n < cut.most ? head->n : cut.most;
}

/* Chunks of equal size. */
int64_t cut_rows(const espi_head *head, row_cut cut) {
    if (head->n <= cut.most) return head->n;
    const int64_t even = espi_ceil_div(head->n, espi_ceil_div(head->n, cut.most));
    return espi_ceil_div(even, cut.step) * cut.step;
}

/* As large as the tile allows. */
row_cut chunk_cut(const espi_head *head) {
    const int64_t fit = TILE_BYTES / (tile_stride(head) * static_cast<int64_t>(sizeof(bf16)));
    const int64_t step = fit >= LARGE_STEP ? LARGE_STEP : SMALL_STEP;
    return {fit >= step ? fit / step * step : step, step};
}

int64_t chunk_rows(const espi_head *head) {
    return cut_rows(head, chunk_cut(head));
}

/* The arrays of a chunk: logits, the rows' hidden states, their gradient. */
struct chunk {
    int64_t first, count;
    bf16 *tile, *x;
    float *sums;
};

size_t sums_room(const espi_head *head) {
    return espi_room(room_rows(head, chunk_cut(head)) * head->w.cols, sizeof(float));
}

size_t chunk_room(const espi_head *head) {
    const int64_t rows = room_rows(head, chunk_cut(head));
    return espi_room(rows * tile_stride(head), sizeof(bf16)) + espi_room(rows * head->w.cols, sizeof(bf16));
}

chunk chunk_at(const espi_exec *exec, const espi_head *head, int64_t first) {
    char *scratch = static_cast<char *>(exec->scratch);
    const int64_t rows = chunk_rows(head), left = head->n - first, room = room_rows(head, chunk_cut(head));
    chunk c = {first, left < rows ? left : rows, nullptr, nullptr, nullptr};
    c.tile = espi_cut<bf16>(&scratch, room * tile_stride(head));
    c.x = espi_cut<bf16>(&scratch, room * head->w.cols);
    c.sums = reinterpret_cast<float *>(scratch);
    return c;
}

template <int T, bool P> struct row_kind {
    static constexpr int threads = T;
    static constexpr bool plain = P;
};

/* f of the kind of kernel that fits the head, for that many rows. */
template <typename F> void by_kind(const espi_head *head, int64_t count, F f) {
    const bool many = count >= 2 * MANY_ROWS, plain = is_plain(head);
    if (many && plain)
        f(row_kind<MANY_ROWS, true>{});
    else if (many)
        f(row_kind<MANY_ROWS, false>{});
    else if (plain)
        f(row_kind<FEW_ROWS, true>{});
    else
        f(row_kind<FEW_ROWS, false>{});
}

esp_status gather(const espi_exec *exec, bf16 *to, const bf16 *from, const int32_t *rows, int64_t hidden, int64_t count) {
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const unsigned blocks = static_cast<unsigned>(count);
    if (espi_vectors(hidden, to, from))
        copy_rows<<<blocks, COPY_THREADS, 0, stream>>>(reinterpret_cast<bf16x8 *>(to), reinterpret_cast<const bf16x8 *>(from), rows,
                                                       hidden / VECTOR);
    else
        copy_rows<<<blocks, COPY_THREADS, 0, stream>>>(to, from, rows, hidden);
    return ESPI_CUDA_LAUNCHED("rows of the head");
}

/* The products of a chunk's hidden states with the weight's rows. */
esp_status make_products(const espi_exec *exec, const espi_head *head, const chunk *c, void *out, esp_dtype dtype, int64_t stride) {
    ESPI_TRY(gather(exec, c->x, static_cast<const bf16 *>(head->hidden), head->rows + c->first, head->w.cols, c->count));
    const int64_t hidden = head->w.cols;
    espi_product p = espi_product_of(out, espi_rows_of(c->x, ESP_BF16, hidden), espi_transpose_of(head->w.data, head->w.dtype, hidden),
                                     c->count, head->w.rows, hidden);
    p.dtype = dtype;
    p.stride = stride;
    return espi_product_cuda(exec, &p);
}

/* What head_wgmma takes, and enough rows for it: every way to their logits is then this one, and they have the same bits. */
bool is_wide(const espi_head *head) {
    return head->n >= WIDE_ROWS && head->w.dtype == ESP_BF16 && head->w.cols % 64 == 0 && espi_aligned16(head->w.data) &&
           espi_aligned16(head->hidden) && head_wgmma_available();
}

esp_status make_tile(const espi_exec *exec, const espi_head *head, const chunk *c) {
    if (!is_wide(head)) return make_products(exec, head, c, c->tile, ESP_BF16, tile_stride(head));
    const espi_cuda *cuda = espi_cuda_of(exec);
    head_slice s = {};
    s.out = c->tile;
    s.stride = tile_stride(head);
    s.rows = static_cast<int>(c->count);
    s.vocab = static_cast<int>(head->w.rows);
    s.hidden = static_cast<int>(head->w.cols);
    s.tiles = static_cast<int>(espi_ceil_div(s.vocab, HEAD_TILE));
    ESPI_TRY(gather(exec, c->x, static_cast<const bf16 *>(head->hidden), head->rows + c->first, s.hidden, c->count));
    return espi_cuda_check(head_wgmma(&s, HEAD_PRODUCTS, c->x, static_cast<const bf16 *>(head->w.data), cuda->sms, cuda->stream),
                           "logits of many rows");
}

/* Offsets stay those into the list of all rows. */
const int64_t *kept_from(const espi_head *head, const chunk *c) {
    return head->kept_offsets ? head->kept_offsets + c->first : nullptr;
}

/* A chunk's part of an array of all rows. */
float *from(const void *array, const chunk *c) {
    return array ? const_cast<float *>(static_cast<const float *>(array)) + c->first : nullptr;
}

/* Statistics of a chunk; host: where they go besides, or NULL. */
esp_status make_statistics(const espi_exec *exec, const espi_head *head, const chunk *c, void *lp, void *entropy, void *lse,
                           const espi_head_host *host) {
    const row_results to = {from(lp, c), from(entropy, c), from(lse, c), host ? from(host->lp, c) : nullptr,
                            host ? from(host->entropy, c) : nullptr};
    by_kind(head, c->count, [&](auto kind) {
        row_statistics<decltype(kind)::threads, decltype(kind)::plain>
            <<<static_cast<unsigned>(c->count), decltype(kind)::threads, 0, espi_cuda_of(exec)->stream>>>(
                to, c->tile, head->target + c->first, kept_from(head, c), head->kept, tile_stride(head), head->w.rows, terms_of(head));
    });
    return ESPI_CUDA_LAUNCHED("statistics of the head");
}

/* From the tile and the coefficients to d_hidden.  late: those that the host is still making; of is then without them. */
esp_status make_gradient(const espi_exec *exec, const espi_head *head, const chunk *c, void *d_hidden, const row_coefficients *of,
                         const row_coefficients *late) {
    const int64_t stride = tile_stride(head), hidden = head->w.cols;
    const int32_t *to = (head->d_rows ? head->d_rows : head->rows) + c->first;
    by_kind(head, c->count, [&](auto kind) {
        const dim3 blocks(static_cast<unsigned>(c->count), espi_blocks(head->w.rows, 16 * decltype(kind)::threads * VECTOR));
        row_gradient<decltype(kind)::threads, decltype(kind)::plain><<<blocks, decltype(kind)::threads, 0, espi_cuda_of(exec)->stream>>>(
            c->tile, head->target + c->first, *of, kept_from(head, c), head->kept, stride, head->w.rows, terms_of(head));
    });
    ESPI_TRY(ESPI_CUDA_LAUNCHED("gradient of the head's logits"));
    espi_product p = espi_product_of(c->sums, espi_rows_of(c->tile, ESP_BF16, stride), espi_rows_of(head->w.data, head->w.dtype, hidden),
                                     c->count, hidden, head->w.rows);
    p.dtype = ESP_F32;
    ESPI_TRY(espi_product_cuda(exec, &p));
    if (late) ESPI_CUDA_TRY(cudaStreamWaitEvent(espi_cuda_of(exec)->stream, espi_cuda_of(exec)->made, 0));
    put_sums<<<static_cast<unsigned>(c->count), COPY_THREADS, 0, espi_cuda_of(exec)->stream>>>(static_cast<bf16 *>(d_hidden), c->sums, to,
                                                                                               hidden, late ? *late : row_coefficients{});
    return ESPI_CUDA_LAUNCHED("gradient of the hidden states");
}

void CUDART_CB call_back(void *user) {
    const espi_cuda_call *call = static_cast<const espi_cuda_call *>(user);
    if (call->cuda->callback_status != ESP_OK) return; /* of an earlier chunk; reported by the next wait */
    call->cuda->callback_status = call->coef(call->user, call->first, call->count);
}

/* The record of a call: that of an equal one, or a new one. */
esp_status take_call(espi_cuda_call **out, espi_cuda *cuda, const espi_head_fused *a, const chunk *c) {
    for (espi_cuda_call *call = cuda->calls; call; call = call->next) {
        if (call->coef != a->coef || call->user != a->coef_user || call->first != c->first || call->count != c->count) continue;
        *out = call;
        return ESP_OK;
    }
    espi_cuda_call *call = static_cast<espi_cuda_call *>(malloc(sizeof *call));
    if (!call) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the record of a callback (%zu bytes)", sizeof *call);
    *call = {cuda->calls, cuda, a->coef, a->coef_user, c->first, c->count};
    cuda->calls = call;
    *out = call;
    return ESP_OK;
}

/* The host makes a chunk's coefficients; aside: while the stream goes on, which waits for `made` before it reads them. */
esp_status ask(espi_cuda *cuda, const espi_head_fused *a, const chunk *c, bool aside) {
    espi_cuda_call *call = nullptr;
    ESPI_TRY(take_call(&call, cuda, a, c));
    if (!aside) return espi_cuda_check(cudaLaunchHostFunc(cuda->stream, call_back, call), "asking the host for coefficients");
    ESPI_CUDA_TRY(cudaEventRecord(cuda->asked, cuda->stream));
    ESPI_CUDA_TRY(cudaStreamWaitEvent(cuda->aside, cuda->asked, 0));
    ESPI_CUDA_TRY(cudaLaunchHostFunc(cuda->aside, call_back, call));
    return espi_cuda_check(cudaEventRecord(cuda->made, cuda->aside), "marking the host's coefficients");
}

/* ---- Many rows, the vocabulary in slices ----
 * Before anything else a row's logits are shifted by what the target has, which is found by itself.  A slice's weights e^(z - shift) then go
 * straight into the product with the slice's rows of W, and at the end the sum is scaled by all weights' sum: for a loss without a gradient of
 * the entropy that is all there is.  The target is kept apart: its share 1 - p is a quotient of sums, and nothing is lost where p is near 1. */

/* A slice's weights are powers of two up to the sum that float and the products bear, with 2^-SHIFT for the target: a target of less than
 * e^-125 is `again` computed by itself. */
#define SHIFT 80.0f
#define LARGEST_SUM 0x1p100f

/* Arrays of a round of rows. */
struct sliced_rows {
    bf16 *x, *weights;
    float *sums; /* [rows, hidden] */
    float2 *tiles;
    float *shift, *target_x, *scale, *target_scale; /* the last two: d_hidden = g (scale sums + target_scale W_target) */
    int32_t *again;
};

__global__ void __launch_bounds__(COPY_THREADS) open_rows(bf16 *x, float *shift, const bf16 *hidden, const int32_t *rows,
                                                          const int32_t *target, const bf16 *w, int64_t width, float slope) {
    const bf16 *from = hidden + rows[blockIdx.x] * width, *with = w + target[blockIdx.x] * width;
    float sum = 0;
    for (int64_t h = threadIdx.x * VECTOR; h < width; h += COPY_THREADS * VECTOR) {
        const bf16x8 a = *reinterpret_cast<const bf16x8 *>(from + h), b = *reinterpret_cast<const bf16x8 *>(with + h);
        *reinterpret_cast<bf16x8 *>(x + blockIdx.x * width + h) = a;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) sum += espi_value(a.at[j]) * espi_value(b.at[j]);
    }
    sum = espi_block_sum<COPY_THREADS>(sum);
    if (threadIdx.x == 0) shift[blockIdx.x] = sum * slope + SHIFT;
}

__device__ void close_row(const row_results &to, const sliced_rows &r, int64_t row, float target_z, float log_sum, float entropy,
                          float scale, float target_scale) {
    to.lse[row] = log_sum;
    to.entropy[row] = entropy;
    to.lp[row] = target_z - log_sum;
    r.scale[row] = scale;
    r.target_scale[row] = target_scale;
    if (!to.host_lp) return;
    to.host_lp[row] = target_z - log_sum;
    to.host_entropy[row] = entropy;
}

/* A warp per row: the sums of the tiles, always in the same order. */
__global__ void __launch_bounds__(COPY_THREADS) close_rows(row_results to, sliced_rows r, int64_t rows, int64_t tiles, logit_terms terms) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (COPY_THREADS / ESPI_WARP) + threadIdx.x / ESPI_WARP;
    if (row >= rows) return;
    float others = 0, others_x = 0;
    for (int64_t tile = threadIdx.x % ESPI_WARP; tile < tiles; tile += ESPI_WARP) {
        const float2 sums = r.tiles[row * tiles + tile];
        others += sums.x;
        others_x += sums.y;
    }
    others = espi_warp_sum(others);
    others_x = espi_warp_sum(others_x);
    if (threadIdx.x % ESPI_WARP > 0) return;
    const float x = r.target_x[row], shift = r.shift[row], own = dev_exp2(x * terms.gain * LOG2_E - shift), all = others + own;
    const float log_sum = (shift + log2f(all)) * LN_2;
    r.again[row] = !(all < LARGEST_SUM) && !isnan(shift); /* with NaN among its logits a row is NaN either way */
    close_row(to, r, row, terms.gain * x, log_sum, log_sum - terms.gain * (others_x + own * x) / all, -terms.gain / all,
              terms.gain * others / all);
}

/* The rounded product of a row, in every lane of the warp. */
__device__ float product_of(const bf16 *x, const bf16 *w, int64_t width) {
    float sum = 0;
#pragma unroll 1
    for (int64_t h = threadIdx.x % ESPI_WARP * VECTOR; h < width; h += ESPI_WARP * VECTOR) {
        const bf16x8 a = *reinterpret_cast<const bf16x8 *>(x + h), b = *reinterpret_cast<const bf16x8 *>(w + h);
#pragma unroll
        for (int j = 0; j < VECTOR; j++) sum += espi_value(a.at[j]) * espi_value(b.at[j]);
    }
    return espi_value(__float2bfloat16(espi_warp_sum(sum)));
}

/* Rows whose target is so improbable that no shift by it serves, which should not be many: from the beginning, by their largest logit. */
template <bool GRADIENT>
__global__ void __launch_bounds__(FEW_ROWS) rows_again(row_results to, sliced_rows r, int64_t rows, const int32_t *target, const bf16 *w,
                                                       int64_t vocab, int64_t width, logit_terms terms) {
    constexpr int WARPS = FEW_ROWS / ESPI_WARP;
    __shared__ partial parts[WARPS];
    __shared__ float p[FEW_ROWS];
    const int warp = threadIdx.x / ESPI_WARP;
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        if (!r.again[row]) continue;
        const bf16 *x = r.x + row * width;
        const int64_t y = target[row];
        if (!GRADIENT) {
            partial others = {-INFINITY, 0, 0};
            for (int64_t v = warp; v < vocab; v += WARPS)
                if (v != y) others = add_one(others, terms.gain * product_of(x, w + v * width, width));
            __syncthreads(); /* the row before is read */
            if (threadIdx.x % ESPI_WARP == 0) parts[warp] = others;
            __syncthreads();
            if (threadIdx.x >= ESPI_WARP) continue;
            others = parts[0];
            for (int other = 1; other < WARPS; other++) others = merge(others, parts[other]);
            const float z = terms.gain * product_of(x, w + y * width, width);
            const partial all = add_one(others, z);
            const float log_sum = all.most + logf(all.sum);
            if (threadIdx.x == 0)
                close_row(to, r, row, z, log_sum, log_sum - all.sum_z / all.sum, -terms.gain,
                          terms.gain * others.sum * weight_of(others.most, log_sum));
            continue;
        }
        float *sums = r.sums + row * width;
        for (int64_t first = 0; first < vocab; first += FEW_ROWS) {
            const int n = static_cast<int>(min(vocab - first, static_cast<int64_t>(FEW_ROWS)));
            __syncthreads(); /* those before are read */
            for (int i = warp; i < n; i += WARPS) {
                const float z = terms.gain * product_of(x, w + (first + i) * width, width);
                if (threadIdx.x % ESPI_WARP == 0) p[i] = first + i == y ? 0 : weight_of(z, to.lse[row]);
            }
            __syncthreads();
            for (int64_t h = threadIdx.x; h < width; h += FEW_ROWS) {
                float sum = first > 0 ? sums[h] : 0;
                for (int i = 0; i < n; i++) sum += p[i] * espi_value(w[(first + i) * width + h]);
                sums[h] = sum;
            }
        }
    }
}

/* The hidden states' gradient of the sums, put where it is named. */
__global__ void __launch_bounds__(COPY_THREADS)
    put_sliced(bf16 *to, sliced_rows r, const int32_t *rows, const int32_t *target, const bf16 *w, int64_t width, row_coefficients c) {
    const float gain = c.g[blockIdx.x], scale = gain * r.scale[blockIdx.x], target_scale = gain * r.target_scale[blockIdx.x];
    const float *sums = r.sums + blockIdx.x * width;
    const bf16 *with = w + target[blockIdx.x] * width;
    bf16 *at = to + rows[blockIdx.x] * width;
    if (c.copy_g && threadIdx.x == 0) {
        c.copy_g[blockIdx.x] = gain;
        c.copy_e[blockIdx.x] = 0;
    }
    for (int64_t h = threadIdx.x * VECTOR; h < width; h += COPY_THREADS * VECTOR) {
        const bf16x8 v = *reinterpret_cast<const bf16x8 *>(with + h);
        bf16x8 d;
#pragma unroll
        for (int j = 0; j < VECTOR; j++) espi_store(&d.at[j], scale * sums[h + j] + target_scale * espi_value(v.at[j]));
        *reinterpret_cast<bf16x8 *>(at + h) = d;
    }
}

size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

int64_t vocab_tiles(const espi_head *head) {
    return espi_ceil_div(head->w.rows, HEAD_TILE);
}

/* Columns of a slice. */
int64_t slice_width(const espi_head *head) {
    const int64_t tiles = vocab_tiles(head);
    return HEAD_TILE * (tiles < SLICE_TILES ? tiles : SLICE_TILES);
}

row_cut round_cut(const espi_head *head) {
    constexpr int64_t STEP = 256; /* head_wgmma's tiles side by side */
    const int64_t hidden = head->w.cols, each = 6 * hidden + 2 * slice_width(head) + 8 * vocab_tiles(head) + 20;
    const int64_t fit = SLICE_BYTES / each / STEP * STEP;
    return {fit < STEP ? STEP : fit < SLICE_ROWS ? fit : SLICE_ROWS, STEP};
}

int64_t round_rows(const espi_head *head) {
    return cut_rows(head, round_cut(head));
}

/* Bytes of a round's arrays, which are cut from scratch where it is there. */
size_t cut_round(sliced_rows *r, char *scratch, const espi_head *head, bool gradient) {
    const int64_t rows = room_rows(head, round_cut(head)), hidden = head->w.cols, tiles = vocab_tiles(head),
                  rows_of_gradient = gradient ? rows : 0;
    const char *begin = scratch;
    r->x = espi_cut<bf16>(&scratch, rows * hidden);
    r->tiles = espi_cut<float2>(&scratch, rows * tiles);
    r->shift = espi_cut<float>(&scratch, rows);
    r->target_x = espi_cut<float>(&scratch, rows);
    r->scale = espi_cut<float>(&scratch, rows);
    r->target_scale = espi_cut<float>(&scratch, rows);
    r->again = espi_cut<int32_t>(&scratch, rows);
    r->weights = espi_cut<bf16>(&scratch, rows_of_gradient * slice_width(head));
    r->sums = espi_cut<float>(&scratch, rows_of_gradient * hidden);
    return static_cast<size_t>(scratch - begin);
}

/* By the sizes alone: whether all that is_sliced asks is there, is known later. */
size_t round_room(const espi_head *head, bool gradient) {
    sliced_rows unused;
    return head->n >= WIDE_ROWS && head->w.cols % 64 == 0 ? cut_round(&unused, nullptr, head, gradient) : 0;
}

bool is_sliced(const espi_head *head) {
    return is_wide(head) && is_plain(head) && !head->kept_offsets;
}

/* A round, and the slice that it is at. */
struct sliced_round {
    const espi_exec *exec;
    const espi_head *head;
    sliced_rows r;
    row_results to;
    chunk c;
    head_slice slice;
    logit_terms terms;
    const bf16 *w;
};

sliced_round open_round(const espi_exec *exec, const espi_head *head, int64_t first, bool gradient, void *lp, void *entropy, void *lse,
                        const espi_head_host *host) {
    sliced_round o = {exec, head, {}, {}, {}, {}, terms_of(head), static_cast<const bf16 *>(head->w.data)};
    const int64_t rows = round_rows(head), left = head->n - first;
    o.c = {first, left < rows ? left : rows, nullptr, nullptr, nullptr};
    o.to = {from(lp, &o.c), from(entropy, &o.c), from(lse, &o.c), host ? from(host->lp, &o.c) : nullptr,
            host ? from(host->entropy, &o.c) : nullptr};
    (void)cut_round(&o.r, static_cast<char *>(exec->scratch), head, gradient);
    o.slice = {o.r.weights,
               slice_width(head),
               o.r.tiles,
               o.r.target_x,
               o.r.shift,
               head->target + first,
               static_cast<int>(o.c.count),
               static_cast<int>(head->w.rows),
               static_cast<int>(head->w.cols),
               0,
               static_cast<int>(vocab_tiles(head)),
               o.terms.gain * LOG2_E};
    return o;
}

esp_status begin_round(const sliced_round *o) {
    open_rows<<<static_cast<unsigned>(o->c.count), COPY_THREADS, 0, espi_cuda_of(o->exec)->stream>>>(
        o->r.x, o->r.shift, static_cast<const bf16 *>(o->head->hidden), o->head->rows + o->c.first, o->slice.target, o->w, o->head->w.cols,
        o->slice.slope);
    return ESPI_CUDA_LAUNCHED("rows of the head and their shifts");
}

esp_status weigh_slice(const sliced_round *o, head_output output) {
    const espi_cuda *cuda = espi_cuda_of(o->exec);
    return espi_cuda_check(head_wgmma(&o->slice, output, o->r.x, o->w, cuda->sms, cuda->stream), "weights of many rows");
}

template <bool GRADIENT> esp_status make_again(const sliced_round *o) {
    const espi_cuda *cuda = espi_cuda_of(o->exec);
    rows_again<GRADIENT><<<static_cast<unsigned>(cuda->sms), FEW_ROWS, 0, cuda->stream>>>(o->to, o->r, o->c.count, o->slice.target, o->w,
                                                                                          o->head->w.rows, o->head->w.cols, o->terms);
    return ESPI_CUDA_LAUNCHED("rows of improbable targets");
}

esp_status end_statistics(const sliced_round *o) {
    close_rows<<<espi_blocks(o->c.count, COPY_THREADS / ESPI_WARP), COPY_THREADS, 0, espi_cuda_of(o->exec)->stream>>>(
        o->to, o->r, o->c.count, vocab_tiles(o->head), o->terms);
    ESPI_TRY(ESPI_CUDA_LAUNCHED("statistics of the head"));
    return make_again<false>(o);
}

esp_status sliced_stats(const espi_exec *exec, const espi_head_stats *a) {
    for (int64_t first = 0; first < a->head.n; first += round_rows(&a->head)) {
        const sliced_round o = open_round(exec, &a->head, first, false, a->lp, a->entropy, a->lse, nullptr);
        ESPI_TRY(begin_round(&o));
        ESPI_TRY(weigh_slice(&o, HEAD_SUMS));
        ESPI_TRY(end_statistics(&o));
    }
    return ESP_OK;
}

/* sums += the weights of the slice times its rows of W. */
esp_status add_slice(const sliced_round *o) {
    const int64_t hidden = o->head->w.cols, first = static_cast<int64_t>(o->slice.first_tile) * HEAD_TILE,
                  width = static_cast<int64_t>(o->slice.tiles) * HEAD_TILE, left = o->head->w.rows - first;
    espi_product p =
        espi_product_of(o->r.sums, espi_rows_of(o->r.weights, ESP_BF16, o->slice.stride),
                        espi_rows_of(o->w + first * hidden, ESP_BF16, hidden), o->c.count, hidden, left < width ? left : width);
    p.dtype = ESP_F32;
    p.beta = first > 0 ? 1 : 0;
    return espi_product_cuda(o->exec, &p);
}

/* Every e is 0. */
esp_status sliced_fused(const espi_exec *exec, const espi_head_fused *a) {
    espi_cuda *cuda = espi_cuda_of(exec);
    const bool asks = a->coef != nullptr;
    for (int64_t first = 0; first < a->head.n; first += round_rows(&a->head)) {
        sliced_round o = open_round(exec, &a->head, first, true, a->lp, a->entropy, a->lse, asks ? &a->host : nullptr);
        const int tiles = o.slice.tiles;
        ESPI_TRY(begin_round(&o));
        for (; o.slice.first_tile < tiles; o.slice.first_tile += static_cast<int>(SLICE_TILES)) {
            const int left = tiles - o.slice.first_tile;
            o.slice.tiles = left < SLICE_TILES ? left : static_cast<int>(SLICE_TILES);
            ESPI_TRY(weigh_slice(&o, HEAD_WEIGHTS));
            if (left <= SLICE_TILES) { /* while the last slice is added, the host makes the coefficients */
                ESPI_TRY(end_statistics(&o));
                if (asks) ESPI_TRY(ask(cuda, a, &o.c, true));
            }
            ESPI_TRY(add_slice(&o));
        }
        ESPI_TRY(make_again<true>(&o));
        if (asks) ESPI_CUDA_TRY(cudaStreamWaitEvent(cuda->stream, cuda->made, 0));
        const row_coefficients of = {from(asks ? a->host.g : a->g, &o.c), nullptr, nullptr, nullptr, asks ? from(a->g, &o.c) : nullptr,
                                     asks ? from(a->e, &o.c) : nullptr};
        put_sliced<<<static_cast<unsigned>(o.c.count), COPY_THREADS, 0, cuda->stream>>>(
            static_cast<bf16 *>(a->d_hidden), o.r, (a->head.d_rows ? a->head.d_rows : a->head.rows) + first, o.slice.target, o.w,
            a->head.w.cols, of);
        ESPI_TRY(ESPI_CUDA_LAUNCHED("gradient of the hidden states"));
    }
    return ESP_OK;
}

} // namespace

void espi_cuda_calls_free(espi_cuda *cuda) {
    while (cuda->calls) {
        espi_cuda_call *call = cuda->calls;
        cuda->calls = call->next;
        free(call);
    }
}

size_t espi_head_stats_scratch_cuda(const espi_exec *exec, const espi_head_stats *a) {
    (void)exec;
    return larger(chunk_room(&a->head), round_room(&a->head, false));
}

esp_status espi_head_stats_cuda(const espi_exec *exec, const espi_head_stats *a) {
    if (is_sliced(&a->head)) return sliced_stats(exec, a);
    for (int64_t first = 0; first < a->head.n; first += chunk_rows(&a->head)) {
        const chunk c = chunk_at(exec, &a->head, first);
        ESPI_TRY(make_tile(exec, &a->head, &c));
        ESPI_TRY(make_statistics(exec, &a->head, &c, a->lp, a->entropy, a->lse, nullptr));
    }
    return ESP_OK;
}

size_t espi_head_grad_scratch_cuda(const espi_exec *exec, const espi_head_grad *a) {
    (void)exec;
    return chunk_room(&a->head) + sums_room(&a->head);
}

esp_status espi_head_grad_cuda(const espi_exec *exec, const espi_head_grad *a) {
    for (int64_t first = 0; first < a->head.n; first += chunk_rows(&a->head)) {
        const chunk c = chunk_at(exec, &a->head, first);
        const row_coefficients of = {from(a->g, &c), from(a->e, &c), from(a->lse, &c), from(a->entropy, &c), nullptr, nullptr};
        ESPI_TRY(make_tile(exec, &a->head, &c));
        ESPI_TRY(make_gradient(exec, &a->head, &c, a->d_hidden, &of, nullptr));
    }
    return ESP_OK;
}

size_t espi_head_fused_scratch_cuda(const espi_exec *exec, const espi_head_fused *a) {
    (void)exec;
    return larger(chunk_room(&a->head) + sums_room(&a->head), round_room(&a->head, true));
}

/* The host's arrays are pinned: the kernels write and read them where they are. */
esp_status espi_head_fused_cuda(const espi_exec *exec, const espi_head_fused *a) {
    if (is_sliced(&a->head) && a->e_is_zero) return sliced_fused(exec, a);
    espi_cuda *cuda = espi_cuda_of(exec);
    for (int64_t first = 0; first < a->head.n; first += chunk_rows(&a->head)) {
        const chunk c = chunk_at(exec, &a->head, first);
        const bool asks = a->coef != nullptr, late = asks && a->e_is_zero;
        const row_coefficients of = {
            from(asks ? a->host.g : a->g, &c), from(asks ? a->host.e : a->e, &c), from(a->lse, &c), from(a->entropy, &c),
            asks ? from(a->g, &c) : nullptr,   asks ? from(a->e, &c) : nullptr};
        ESPI_TRY(make_tile(exec, &a->head, &c));
        ESPI_TRY(make_statistics(exec, &a->head, &c, a->lp, a->entropy, a->lse, asks ? &a->host : nullptr));
        if (asks) ESPI_TRY(ask(cuda, a, &c, late));
        const row_coefficients without = {nullptr, nullptr, of.lse, of.entropy, nullptr, nullptr};
        ESPI_TRY(make_gradient(exec, &a->head, &c, a->d_hidden, late ? &without : &of, late ? &of : nullptr));
    }
    return ESP_OK;
}

size_t espi_head_logits_scratch_cuda(const espi_exec *exec, const espi_head_logits *a) {
    (void)exec;
    return espi_room(a->head.n * a->head.w.cols, sizeof(bf16));
}

esp_status espi_head_logits_cuda(const espi_exec *exec, const espi_head_logits *a) {
    const int64_t n = a->head.n * a->head.w.rows;
    if (n == 0) return ESP_OK;
    const chunk all = {0, a->head.n, nullptr, static_cast<bf16 *>(exec->scratch), nullptr};
    ESPI_TRY(make_products(exec, &a->head, &all, a->logits, ESP_F32, a->head.w.rows));
    finish_logits<<<espi_blocks(n, COPY_THREADS), COPY_THREADS, 0, espi_cuda_of(exec)->stream>>>(static_cast<float *>(a->logits), n,
                                                                                                 a->head.w.rows, terms_of(&a->head));
    return ESPI_CUDA_LAUNCHED("logits");
}

size_t espi_head_sample_scratch_cuda(const espi_exec *exec, const espi_head_sample *a) {
    (void)exec;
    return chunk_room(&a->head);
}

esp_status espi_head_sample_cuda(const espi_exec *exec, const espi_head_sample *a) {
    for (int64_t first = 0; first < a->head.n; first += chunk_rows(&a->head)) {
        const chunk c = chunk_at(exec, &a->head, first);
        ESPI_TRY(make_tile(exec, &a->head, &c));
        sample_terms sample = {a->head.temperature == 0, a->filter, nullptr, nullptr, a->kept_most};
        if (a->kept) {
            sample.kept = a->kept + c.first * a->kept_most;
            sample.kept_count = a->kept_count + c.first;
        }
        by_kind(&a->head, c.count, [&](auto kind) {
            sample_rows<decltype(kind)::threads, decltype(kind)::plain>
                <<<static_cast<unsigned>(c.count), decltype(kind)::threads, 0, espi_cuda_of(exec)->stream>>>(
                    a->token + c.first, static_cast<float *>(a->lp) + c.first, c.tile, a->uniform + c.first, sample, tile_stride(&a->head),
                    a->head.w.rows, terms_of(&a->head));
        });
        ESPI_TRY(ESPI_CUDA_LAUNCHED("sample"));
    }
    return ESP_OK;
}
