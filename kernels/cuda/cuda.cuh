/* What the ops of kernels/cuda share: bf16 and f32 values as floats, vectors of 16 bytes, sums in a fixed order, launch
 * sizes, and the dense product of product.cu.
 *
 * Bits: every sum has an order that the sizes alone determine, and no float is added by an atomic. */
#ifndef ESPI_KERNELS_CUDA_CUDA_CUH
#define ESPI_KERNELS_CUDA_CUDA_CUH

#include "kernels/cuda/scratch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef __nv_bfloat16 bf16;

/* N values that are read at once. */
template <int N> struct alignas(2 * N) bf16s { bf16 at[N]; };

/* One load of 16 bytes. */
typedef bf16s<8> bf16x8;

static inline espi_cuda *espi_cuda_of(const espi_exec *exec) {
    return static_cast<espi_cuda *>(exec->device);
}

static inline int64_t espi_ceil_div(int64_t n, int64_t by) {
    return (n + by - 1) / by;
}

static inline unsigned espi_blocks(int64_t n, int64_t by) {
    return static_cast<unsigned>(espi_ceil_div(n, by));
}

/* Sizes of arrays inside scratch: the next one stays aligned. */
static inline size_t espi_room(int64_t n, size_t size) {
    return (static_cast<size_t>(n) * size + 255) / 256 * 256;
}

/* Cuts scratch into arrays, in the order in which the scratch function sums their rooms. */
template <typename T> static inline T *espi_cut(char **scratch, int64_t n) {
    T *array = reinterpret_cast<T *>(*scratch);
    *scratch += espi_room(n, sizeof(T));
    return array;
}

static inline bool espi_aligned16(const void *p) {
    return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

/* Rows of n values that can be read as bf16x8. */
static inline bool espi_vectors(int64_t n, const void *a, const void *b = nullptr, const void *c = nullptr, const void *d = nullptr) {
    return n % 8 == 0 && espi_aligned16(a) && espi_aligned16(b) && espi_aligned16(c) && espi_aligned16(d);
}

__device__ static inline float espi_value(float x) {
    return x;
}
__device__ static inline float espi_value(bf16 x) {
    return __bfloat162float(x);
}
__device__ static inline void espi_store(float *to, float x) {
    *to = x;
}
__device__ static inline void espi_store(bf16 *to, float x) {
    *to = __float2bfloat16(x);
}

/* Element i of a frozen matrix in the dtype it is stored in. */
__device__ static inline float espi_plain_cuda(const void *data, esp_dtype dtype, int64_t i) {
    if (dtype == ESP_F32) return static_cast<const float *>(data)[i];
    if (dtype == ESP_BF16) return espi_value(static_cast<const bf16 *>(data)[i]);
    return __half2float(static_cast<const __half *>(data)[i]);
}

enum { ESPI_WARP = 32 };

#define LOG2_E 1.44269504088896340736f
#define LN_2 0.69314718055994530942f

template <typename T> __device__ static inline T espi_warp_sum(T x) {
    for (int lane = ESPI_WARP / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
    return x;
}

/* Of every lane, the sum over it and the lanes before. */
template <typename T> __device__ static inline T espi_warp_sum_upto(T x, int lane) {
    for (int by = 1; by < ESPI_WARP; by *= 2) {
        const T below = __shfl_up_sync(0xffffffffu, x, by);
        if (lane >= by) x += below;
    }
    return x;
}

__device__ static inline float espi_warp_max(float x) {
    for (int lane = ESPI_WARP / 2; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
    return x;
}

/* The sum over the block, in every thread.  All threads call it; may be called again at once. */
template <int THREADS, typename T> __device__ static inline T espi_block_sum(T x) {
    __shared__ T part[THREADS / ESPI_WARP];
    x = espi_warp_sum(x);
    if (threadIdx.x % ESPI_WARP == 0) part[threadIdx.x / ESPI_WARP] = x;
    __syncthreads();
    T sum = 0;
    for (int warp = 0; warp < THREADS / ESPI_WARP; warp++) sum += part[warp];
    __syncthreads();
    return sum;
}

template <int THREADS> __device__ static inline float espi_block_max(float x) {
    __shared__ float part[THREADS / ESPI_WARP];
    x = espi_warp_max(x);
    if (threadIdx.x % ESPI_WARP == 0) part[threadIdx.x / ESPI_WARP] = x;
    __syncthreads();
    float most = part[0];
    for (int warp = 1; warp < THREADS / ESPI_WARP; warp++) most = fmaxf(most, part[warp]);
    __syncthreads();
    return most;
}

/* Lists in order which of first .. first + THREADS - 1, below n, are wanted; their number, in every thread.  `list` is shared memory of
 * THREADS values and stands until the next call. */
template <int THREADS, typename F> __device__ static inline int espi_list(int32_t *list, int64_t first, int64_t n, F is_wanted) {
    __shared__ int count[THREADS / ESPI_WARP];
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP, lane = static_cast<int>(threadIdx.x) % ESPI_WARP;
    const int64_t i = first + threadIdx.x;
    const bool is_mine = i < n && is_wanted(i);
    const unsigned votes = __ballot_sync(0xffffffffu, is_mine);
    __syncthreads(); /* the list before has been read */
    if (lane == 0) count[warp] = __popc(votes);
    __syncthreads();
    int before = 0, all = 0;
    for (int w = 0; w < THREADS / ESPI_WARP; w++) {
        before += w < warp ? count[w] : 0;
        all += count[w];
    }
    if (is_mine) list[before + __popc(votes & ((1u << lane) - 1))] = static_cast<int32_t>(i);
    __syncthreads();
    return all;
}

/* Whether one of the values before place `at` is the same, in every thread.  All threads call it. */
template <int THREADS> __device__ static inline bool espi_is_seen(const int32_t *values, int64_t at) {
    const int32_t value = values[at];
    bool earlier = false;
    for (int64_t i = threadIdx.x; i < at; i += THREADS) earlier = earlier || values[i] == value;
    return __syncthreads_or(earlier);
}

/* A matrix by its strides: element (i,j) lies at data + i*row + j*col. */
typedef struct espi_operand {
    const void *data;
    esp_dtype dtype; /* F32, BF16, F16 */
    int64_t row, col;
} espi_operand;

/* d[i,j] = alpha sum_k a(i,k) b(k,j) + beta d[i,j] + bias[j], sums in f32.  d is row-major with `stride` values a row, bf16 or f32.
 * bf16 operands whose rows or columns are whole 16-byte vectors go to cuBLASLt, with a bias in bf16 or none; others to a general kernel. */
typedef struct espi_product {
    void *d;
    esp_dtype dtype;
    int64_t stride;
    espi_operand a, b;
    const void *bias; /* or NULL */
    esp_dtype bias_dtype;
    int64_t m, n, k;
    float alpha, beta;
} espi_product;

esp_status espi_product_cuda(const espi_exec *exec, const espi_product *p);
/* Would cuBLASLt take it? */
bool espi_product_is_dense(const espi_product *p);

/* f32 to bf16. */
esp_status espi_narrow_cuda(const espi_exec *exec, bf16 *out, const void *x, int64_t n);

/* Rows of `cols` values, and their transpose. */
static inline espi_operand espi_rows_of(const void *data, esp_dtype dtype, int64_t cols) {
    return {data, dtype, cols, 1};
}
static inline espi_operand espi_transpose_of(const void *data, esp_dtype dtype, int64_t cols) {
    return {data, dtype, 1, cols};
}

/* d = a b in bf16, d's rows side by side; what is otherwise, the caller sets. */
static inline espi_product espi_product_of(void *d, const espi_operand &a, const espi_operand &b, int64_t m, int64_t n, int64_t k) {
    espi_product p = {};
    p.d = d;
    p.dtype = ESP_BF16;
    p.stride = p.n = n;
    p.a = a;
    p.b = b;
    p.m = m;
    p.k = k;
    p.alpha = 1;
    return p;
}

#endif
