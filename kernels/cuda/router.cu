/* The router: scores of all experts, the k best, the gradients of the gate weights and of the two auxiliary losses; and the sort of the slots
 * by expert. */
#include "kernels/cuda/cuda.cuh"

namespace {

enum {
    THREADS = 256,
    WARPS = 4,                 /* tokens of a block that chooses or differentiates */
    STATS_TOKENS = 16,         /* a chunk of the statistics' sums */
    CHUNK = 256,               /* tokens of a chunk of the sort */
    WORDS = CHUNK / ESPI_WARP, /* bits of a chunk's tokens */
    MOST_EXPERTS = 1024,
    SCAN_THREADS = 1024
};

struct router_terms {
    bool renormalise, sigmoid;
    float scaling;
};

router_terms terms_of(const espi_router_rule *rule) {
    return {rule->renormalise, rule->sigmoid, rule->scaling == 0 ? 1 : static_cast<float>(rule->scaling)};
}

__device__ float sigmoid(float z) {
    return 1 / (1 + expf(-z));
}

__device__ int lane_of_warp() {
    return static_cast<int>(threadIdx.x) % ESPI_WARP;
}

/* An f32 weight as a sum of three in bf16, which together hold its 24 bits: [3 parts][experts*hidden]. */
__global__ void __launch_bounds__(THREADS) split(bf16 *parts, const float *w, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    float rest = w[i];
    for (int part = 0; part < 3; part++) {
        const bf16 head = __float2bfloat16(rest);
        parts[part * n + i] = head;
        rest -= espi_value(head);
    }
}

/* The same as two, the larger again behind them. */
__global__ void __launch_bounds__(THREADS) split_in_two(bf16 *parts, const void *w, esp_dtype dtype, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    const float value = espi_plain_cuda(w, dtype, i);
    const bf16 head = __float2bfloat16(value);
    parts[i] = parts[2 * n + i] = head;
    espi_store(parts + n + i, value - espi_value(head));
}

/* The larger rank, and of equal ones the lower index. */
struct candidate {
    float rank;
    int expert;
};

__device__ candidate better(candidate a, candidate b) {
    return b.rank > a.rank || (b.rank == a.rank && b.expert < a.expert) ? b : a;
}

/* A warp a token.  products: [T, parts * E], summed part by part; may be logits itself where parts is 1. */
__global__ void __launch_bounds__(WARPS *ESPI_WARP)
    choose(float *logits, float *lse, int32_t *idx, float *weight, unsigned long long *flips, uint32_t *fault, const int32_t *forced,
           const float *products, int parts, const float *bias, const float *correction, int64_t tokens, int experts, int top_k,
           router_terms rule) {
    extern __shared__ float ranks[];
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = lane_of_warp();
    const int64_t t = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
    if (t >= tokens) return;
    float *rank = ranks + warp * experts, *z = logits + t * experts;
    float most = -INFINITY;
    bool bad = false;
    for (int e = lane; e < experts; e += ESPI_WARP) {
        float sum = 0;
        for (int part = parts - 1; part >= 0; part--) sum += products[(t * parts + part) * experts + e]; /* the smallest first */
        if (bias) sum += bias[e];
        z[e] = sum;
        rank[e] = rule.sigmoid ? sigmoid(sum) + (correction ? correction[e] : 0) : sum;
        bad = bad || !isfinite(sum) || !isfinite(rank[e]);
        most = fmaxf(most, sum);
    }
    bad = __any_sync(0xffffffffu, bad);
    most = espi_warp_max(most);
    float sum = 0;
    for (int e = lane; e < experts; e += ESPI_WARP) sum += expf(z[e] - most);
    const float log_sum = most + logf(espi_warp_sum(sum));
    if (lane == 0) lse[t] = log_sum;
    if (bad) { /* distinct experts, so that the rows behind stay a permutation until the failure is reported */
        for (int k = lane; k < top_k; k += ESPI_WARP) {
            idx[t * top_k + k] = k;
            weight[t * top_k + k] = 0;
        }
        if (lane == 0) atomicOr(fault, static_cast<uint32_t>(ESPI_CUDA_FAULT_ROUTER));
        return;
    }
    for (int k = 0; k < top_k; k++) {
        candidate best = {-INFINITY, experts};
        for (int e = lane; e < experts; e += ESPI_WARP) best = better(best, {rank[e], e});
        for (int other = ESPI_WARP / 2; other > 0; other /= 2)
            best = better(best, {__shfl_xor_sync(0xffffffffu, best.rank, other), __shfl_xor_sync(0xffffffffu, best.expert, other)});
        if (best.expert % ESPI_WARP == lane) rank[best.expert] = -INFINITY; /* taken */
        __syncwarp();
    }
    if (forced && forced[t * top_k] != -1) { /* those become the ones taken */
        const int32_t *given = forced + t * top_k;
        const bool silent = given[0] < -1;
        const auto id = [given, silent](int k) { return silent ? -2 - given[k] : given[k]; };
        bool is_new = false;
        for (int k = lane; k < top_k; k += ESPI_WARP) is_new = is_new || rank[id(k)] != -INFINITY;
        if (__any_sync(0xffffffffu, is_new) && lane == 0 && flips && !silent) atomicAdd(flips, 1ull);
        for (int e = lane; e < experts; e += ESPI_WARP) rank[e] = 0;
        __syncwarp();
        for (int k = lane; k < top_k; k += ESPI_WARP) rank[id(k)] = -INFINITY;
        __syncwarp();
    }
    float selected = 0;
    for (int e = lane; e < experts; e += ESPI_WARP)
        if (rank[e] == -INFINITY) selected += rule.sigmoid ? sigmoid(z[e]) : expf(z[e] - log_sum);
    selected = espi_warp_sum(selected) + (rule.sigmoid ? 1e-20f : 0);
    int before = 0;
    for (int first = 0; first < experts; first += ESPI_WARP) {
        const int e = first + lane;
        const bool is_taken = e < experts && rank[e] == -INFINITY;
        const unsigned votes = __ballot_sync(0xffffffffu, is_taken);
        if (is_taken) {
            const int64_t slot = t * top_k + before + __popc(votes & ((1u << lane) - 1));
            const float score = rule.sigmoid ? sigmoid(z[e]) : expf(z[e] - log_sum);
            idx[slot] = e;
            weight[slot] = rule.scaling * (rule.renormalise ? score / selected : score);
        }
        before += __popc(votes);
    }
}

/* Selections, probabilities and squared log-sums of one chunk of tokens. */
__global__ void __launch_bounds__(THREADS) chunk_statistics(int32_t *counts, double *p_sums, double *z_sums, const float *logits,
                                                            const float *lse, const int32_t *idx, int64_t tokens, int experts, int top_k) {
    __shared__ int32_t count[MOST_EXPERTS];
    const int64_t first = static_cast<int64_t>(blockIdx.x) * STATS_TOKENS, end = min(first + STATS_TOKENS, tokens);
    for (int e = static_cast<int>(threadIdx.x); e < experts; e += THREADS) count[e] = 0;
    __syncthreads();
    for (int64_t slot = first * top_k + threadIdx.x; slot < end * top_k; slot += THREADS) atomicAdd(&count[idx[slot]], 1);
    __syncthreads();
    for (int e = static_cast<int>(threadIdx.x); e < experts; e += THREADS) {
        double sum = 0;
#pragma unroll 8
        for (int64_t t = first; t < end; t++) sum += expf(logits[t * experts + e] - lse[t]);
        p_sums[static_cast<int64_t>(blockIdx.x) * experts + e] = sum;
        counts[static_cast<int64_t>(blockIdx.x) * experts + e] = count[e];
    }
    if (threadIdx.x >= ESPI_WARP) return;
    double squares = 0;
    for (int64_t t = first + threadIdx.x; t < end; t += ESPI_WARP) squares += static_cast<double>(lse[t]) * lse[t];
    squares = espi_warp_sum(squares);
    if (threadIdx.x == 0) z_sums[blockIdx.x] = squares;
}

/* A warp an expert: its lanes take every 32nd chunk.  One more warp has the squares. */
__global__ void __launch_bounds__(THREADS) add_statistics(int64_t *counts, double *p_sum, double *z_sum, const int32_t *chunk_counts,
                                                          const double *p_sums, const double *z_sums, int64_t chunks, int experts) {
    const int e = static_cast<int>((blockIdx.x * THREADS + threadIdx.x) / ESPI_WARP), lane = lane_of_warp();
    if (e > experts) return;
    double sum = 0;
    int count = 0;
#pragma unroll 4
    for (int64_t c = lane; c < chunks; c += ESPI_WARP) {
        sum += e < experts ? p_sums[c * experts + e] : z_sums[c];
        count += e < experts ? chunk_counts[c * experts + e] : 0;
    }
    sum = espi_warp_sum(sum);
    count = espi_warp_sum(count);
    if (lane > 0) return;
    if (e == experts) {
        if (z_sum) *z_sum += sum;
        return;
    }
    if (p_sum) p_sum[e] += sum;
    if (counts) counts[e] += count;
}

/* A warp a token: the gradient of its logits, all losses together.  narrowed: what the product wants of it, a sum of two in bf16, the larger
 * part twice ([T, 3 E]): times the parts of the weight as split_in_two orders them. */
__global__ void __launch_bounds__(WARPS *ESPI_WARP)
    logits_grad(float *d_logits, bf16 *narrowed, const float *d_weight, const float *logits, const float *lse, const float *weight,
                const int32_t *idx, const int64_t *aux_counts, float aux_coef, float z_coef, int64_t tokens, int experts, int top_k,
                router_terms rule) {
    const int lane = lane_of_warp();
    const int64_t t = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / ESPI_WARP;
    if (t >= tokens) return;
    const float *z = logits + t * experts, log_sum = lse[t];
    float gate = 0, balance = 0;
    for (int k = lane; k < top_k; k += ESPI_WARP) gate += weight[t * top_k + k] * d_weight[t * top_k + k];
    gate = espi_warp_sum(gate);
    if (aux_counts) {
        for (int e = lane; e < experts; e += ESPI_WARP) balance += expf(z[e] - log_sum) * static_cast<float>(aux_counts[e]);
        balance = espi_warp_sum(balance);
    }
    const float shared = rule.renormalise ? gate / rule.scaling : 0; /* through the sum of the selected */
    for (int e = lane; e < experts; e += ESPI_WARP) {
        const float p = expf(z[e] - log_sum);
        float d = z_coef * 2 * log_sum * p;
        if (aux_counts) d += aux_coef * p * (static_cast<float>(aux_counts[e]) - balance);
        if (!rule.renormalise && !rule.sigmoid) d -= p * gate;
        for (int k = 0; k < top_k; k++) {
            if (idx[t * top_k + k] != e) continue;
            d += weight[t * top_k + k] * (d_weight[t * top_k + k] - shared) * (rule.sigmoid ? sigmoid(-z[e]) : 1);
        }
        d_logits[t * experts + e] = d;
        if (!narrowed) continue;
        const bf16 head = __float2bfloat16(d);
        bf16 *to = narrowed + t * 3 * experts + e;
        to[0] = to[experts] = head;
        espi_store(to + 2 * experts, d - espi_value(head));
    }
}

/* Which tokens of a chunk chose an expert, a bit each. */
__device__ void mark(uint32_t *chosen, const int32_t *idx, int64_t first, int64_t tokens, int experts, int top_k) {
    for (int i = static_cast<int>(threadIdx.x); i < experts * WORDS; i += CHUNK) chosen[i] = 0;
    __syncthreads();
    const int64_t t = first + threadIdx.x;
    for (int k = 0; t < tokens && k < top_k; k++)
        atomicOr(&chosen[idx[t * top_k + k] * WORDS + threadIdx.x / ESPI_WARP], 1u << (threadIdx.x % ESPI_WARP));
    __syncthreads();
}

__device__ int chosen_before(const uint32_t *chosen, int expert, int token) {
    int before = 0;
    for (int word = 0; word < token / ESPI_WARP; word++) before += __popc(chosen[expert * WORDS + word]);
    return token % ESPI_WARP ? before + __popc(chosen[expert * WORDS + token / ESPI_WARP] & ((1u << (token % ESPI_WARP)) - 1)) : before;
}

__global__ void __launch_bounds__(CHUNK) count_chunk(int32_t *counts, const int32_t *idx, int64_t tokens, int experts, int top_k) {
    extern __shared__ uint32_t chosen[];
    mark(chosen, idx, static_cast<int64_t>(blockIdx.x) * CHUNK, tokens, experts, top_k);
    for (int e = static_cast<int>(threadIdx.x); e < experts; e += CHUNK)
        counts[static_cast<int64_t>(blockIdx.x) * experts + e] = chosen_before(chosen, e, CHUNK);
}

/* counts[e] becomes the sum of those before it; returns the sum of all.  One warp. */
__device__ int32_t scan(int32_t *counts, int experts) {
    const int lane = lane_of_warp();
    int32_t before = 0;
    for (int first = 0; first < experts; first += ESPI_WARP) {
        const int e = first + lane;
        const int32_t own = e < experts ? counts[e] : 0;
        const int32_t sum = espi_warp_sum_upto(own, lane);
        if (e < experts) counts[e] = before + sum - own;
        before += __shfl_sync(0xffffffffu, sum, ESPI_WARP - 1);
    }
    return before;
}

/* From the counts of each chunk to the first row of each chunk and expert. */
__global__ void __launch_bounds__(SCAN_THREADS) scan_chunks(int32_t *offsets, int32_t *counts, int64_t chunks, int experts) {
    __shared__ int32_t first_row[MOST_EXPERTS];
    const int e = static_cast<int>(threadIdx.x);
    int32_t sum = 0;
    for (int64_t c = 0; e < experts && c < chunks; c++) sum += counts[c * experts + e];
    if (e < experts) first_row[e] = sum;
    __syncthreads();
    if (e < ESPI_WARP) {
        const int32_t all = scan(first_row, experts);
        if (e == 0) offsets[experts] = all;
    }
    __syncthreads();
    if (e >= experts) return;
    int32_t row = first_row[e];
    offsets[e] = row;
    for (int64_t c = 0; c < chunks; c++) {
        const int32_t own = counts[c * experts + e];
        counts[c * experts + e] = row;
        row += own;
    }
}

/* Slots to rows.  first_rows: of each chunk and expert; NULL: there is one chunk, and its block makes the offsets too. */
__global__ void __launch_bounds__(CHUNK)
    place(int32_t *offsets, int32_t *row_token, int32_t *slot_row, float *row_weight, const int32_t *idx, const float *weight,
          const int32_t *first_rows, int64_t tokens, int experts, int top_k) {
    extern __shared__ uint32_t chosen[];
    int32_t *first_row = reinterpret_cast<int32_t *>(chosen + experts * WORDS);
    const int64_t first = static_cast<int64_t>(blockIdx.x) * CHUNK, t = first + threadIdx.x;
    mark(chosen, idx, first, tokens, experts, top_k);
    for (int e = static_cast<int>(threadIdx.x); e < experts; e += CHUNK)
        first_row[e] = first_rows ? first_rows[static_cast<int64_t>(blockIdx.x) * experts + e] : chosen_before(chosen, e, CHUNK);
    __syncthreads();
    if (!first_rows) {
        if (threadIdx.x < ESPI_WARP) {
            const int32_t all = scan(first_row, experts);
            if (threadIdx.x == 0) offsets[experts] = all;
        }
        __syncthreads();
        for (int e = static_cast<int>(threadIdx.x); e < experts; e += CHUNK) offsets[e] = first_row[e];
    }
    for (int k = 0; t < tokens && k < top_k; k++) {
        const int64_t slot = t * top_k + k;
        const int expert = idx[slot], row = first_row[expert] + chosen_before(chosen, expert, static_cast<int>(threadIdx.x));
        row_token[row] = static_cast<int32_t>(t);
        slot_row[slot] = row;
        row_weight[row] = weight[slot];
    }
}

bool has_vectors(const espi_mat *w, const void *x) {
    return w->rows % 8 == 0 && w->cols % 8 == 0 && espi_aligned16(x) && espi_aligned16(w->data);
}

/* An f32 weight goes through the tensor cores in three parts; where rows are no whole vectors, through the general product as it is. */
bool is_split(const espi_mat *w) {
    return w->dtype == ESP_F32 && w->rows % 8 == 0 && w->cols % 8 == 0;
}

esp_status check_experts(int64_t experts) {
    if (experts <= MOST_EXPERTS) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%lld experts on the GPU, expected at most %d: route on the CPU", (long long)experts,
                     MOST_EXPERTS);
}

} // namespace

size_t espi_router_fwd_scratch_cuda(const espi_exec *exec, const espi_router_fwd *a) {
    (void)exec;
    const int64_t experts = a->w.rows, chunks = espi_ceil_div(a->tokens, STATS_TOKENS);
    size_t room =
        espi_room(chunks * experts, sizeof(int32_t)) + espi_room(chunks * experts, sizeof(double)) + espi_room(chunks, sizeof(double));
    if (is_split(&a->w)) room += espi_room(3 * experts * a->w.cols, sizeof(bf16)) + espi_room(3 * experts * a->tokens, sizeof(float));
    return room;
}

esp_status espi_router_fwd_cuda(const espi_exec *exec, const espi_router_fwd *a) {
    const int64_t experts = a->w.rows, hidden = a->w.cols, chunks = espi_ceil_div(a->tokens, STATS_TOKENS);
    ESPI_TRY(check_experts(experts));
    if (a->tokens == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    char *scratch = static_cast<char *>(exec->scratch);
    int32_t *counts = espi_cut<int32_t>(&scratch, chunks * experts);
    double *p_sums = espi_cut<double>(&scratch, chunks * experts), *z_sums = espi_cut<double>(&scratch, chunks);
    const int parts = is_split(&a->w) && has_vectors(&a->w, a->x) ? 3 : 1;
    float *logits = static_cast<float *>(a->logits), *lse = static_cast<float *>(a->lse);
    espi_product p = espi_product_of(logits, espi_rows_of(a->x, ESP_BF16, hidden), espi_transpose_of(a->w.data, a->w.dtype, hidden),
                                     a->tokens, parts * experts, hidden);
    p.dtype = ESP_F32;
    if (parts == 3) {
        bf16 *w = espi_cut<bf16>(&scratch, 3 * experts * hidden);
        split<<<espi_blocks(experts * hidden, THREADS), THREADS, 0, stream>>>(w, static_cast<const float *>(a->w.data), experts * hidden);
        p.b = espi_transpose_of(w, ESP_BF16, hidden);
        p.d = espi_cut<float>(&scratch, 3 * experts * a->tokens);
    }
    ESPI_TRY(espi_product_cuda(exec, &p));
    const int n_experts = static_cast<int>(experts), top_k = static_cast<int>(a->top_k);
    choose<<<espi_blocks(a->tokens, WARPS), WARPS * ESPI_WARP, WARPS * experts * sizeof(float), stream>>>(
        logits, lse, a->idx, static_cast<float *>(a->weight), reinterpret_cast<unsigned long long *>(a->flips), espi_cuda_of(exec)->fault,
        a->forced, static_cast<const float *>(p.d), parts, a->bias, a->correction, a->tokens, n_experts, top_k, terms_of(&a->rule));
    if (a->counts || a->p_sum || a->z_sum) {
        chunk_statistics<<<static_cast<unsigned>(chunks), THREADS, 0, stream>>>(counts, p_sums, z_sums, logits, lse, a->idx, a->tokens,
                                                                                n_experts, top_k);
        add_statistics<<<espi_blocks((experts + 1) * ESPI_WARP, THREADS), THREADS, 0, stream>>>(a->counts, a->p_sum, a->z_sum, counts,
                                                                                                p_sums, z_sums, chunks, n_experts);
    }
    return ESPI_CUDA_LAUNCHED("router");
}

size_t espi_router_bwd_scratch_cuda(const espi_exec *exec, const espi_router_bwd *a) {
    (void)exec;
    return espi_room(3 * a->tokens * a->w.rows, sizeof(bf16)) + espi_room(3 * a->w.rows * a->w.cols, sizeof(bf16));
}

esp_status espi_router_bwd_cuda(const espi_exec *exec, const espi_router_bwd *a) {
    const int64_t experts = a->w.rows, hidden = a->w.cols;
    ESPI_TRY(check_experts(experts));
    if (a->tokens == 0) return ESP_OK;
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    char *scratch = static_cast<char *>(exec->scratch);
    bf16 *narrowed = espi_cut<bf16>(&scratch, 3 * a->tokens * experts), *w = espi_cut<bf16>(&scratch, 3 * experts * hidden);
    const bool dense = has_vectors(&a->w, a->x) && espi_aligned16(a->d_x);
    logits_grad<<<espi_blocks(a->tokens, WARPS), WARPS * ESPI_WARP, 0, stream>>>(
        static_cast<float *>(a->d_logits), dense ? narrowed : nullptr, static_cast<const float *>(a->d_weight),
        static_cast<const float *>(a->logits), static_cast<const float *>(a->lse), static_cast<const float *>(a->weight), a->idx,
        a->aux_counts, static_cast<float>(a->aux_coef), static_cast<float>(a->z_coef), a->tokens, static_cast<int>(experts),
        static_cast<int>(a->top_k), terms_of(&a->rule));
    ESPI_TRY(ESPI_CUDA_LAUNCHED("gradient of the router's logits"));
    espi_product d_x = espi_product_of(a->d_x, espi_rows_of(a->d_logits, ESP_F32, experts), espi_rows_of(a->w.data, a->w.dtype, hidden),
                                       a->tokens, hidden, experts);
    d_x.beta = 1;
    if (dense) {
        split_in_two<<<espi_blocks(experts * hidden, THREADS), THREADS, 0, stream>>>(w, a->w.data, a->w.dtype, experts * hidden);
        d_x.k = 3 * experts;
        d_x.a = espi_rows_of(narrowed, ESP_BF16, d_x.k);
        d_x.b = espi_rows_of(w, ESP_BF16, hidden);
    }
    ESPI_TRY(espi_product_cuda(exec, &d_x));
    if (!a->d_w) return ESP_OK;
    espi_product d_w = d_x;
    d_w.d = a->d_w;
    d_w.dtype = ESP_F32;
    d_w.a = dense ? espi_transpose_of(narrowed, ESP_BF16, 3 * experts) : espi_transpose_of(a->d_logits, ESP_F32, experts);
    d_w.b = espi_rows_of(a->x, ESP_BF16, hidden);
    d_w.m = experts;
    d_w.k = a->tokens;
    return espi_product_cuda(exec, &d_w);
}

size_t espi_dispatch_scratch_cuda(const espi_exec *exec, const espi_dispatch *a) {
    (void)exec;
    return espi_room(espi_ceil_div(a->tokens, CHUNK) * a->experts, sizeof(int32_t));
}

esp_status espi_dispatch_cuda(const espi_exec *exec, const espi_dispatch *a) {
    ESPI_TRY(check_experts(a->experts));
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    const int experts = static_cast<int>(a->experts), top_k = static_cast<int>(a->top_k);
    const int64_t chunks = a->tokens ? espi_ceil_div(a->tokens, CHUNK) : 1; /* without tokens there are still offsets to write */
    const size_t marks = static_cast<size_t>(experts) * WORDS * sizeof(uint32_t),
                 shared = marks + static_cast<size_t>(experts) * sizeof(int32_t);
    int32_t *counts = chunks > 1 ? static_cast<int32_t *>(exec->scratch) : nullptr;
    const unsigned blocks = static_cast<unsigned>(chunks);
    if (counts) {
        count_chunk<<<blocks, CHUNK, marks, stream>>>(counts, a->idx, a->tokens, experts, top_k);
        scan_chunks<<<1, SCAN_THREADS, 0, stream>>>(a->offsets, counts, chunks, experts);
    }
    place<<<blocks, CHUNK, shared, stream>>>(a->offsets, a->row_token, a->slot_row, static_cast<float *>(a->row_weight), a->idx,
                                             static_cast<const float *>(a->weight), counts, a->tokens, experts, top_k);
    return ESPI_CUDA_LAUNCHED("sort of the slots");
}
