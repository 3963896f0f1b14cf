/* AdamW as torch.optim has it, and with 8-bit blockwise moments as bitsandbytes has it; kernels/ref/optim.c says in what they differ. */
#include "kernels/cuda/cuda.cuh"
#include "kernels/cuda/scratch.h"

#include <math.h>

namespace {

enum { THREADS = 256, ADAM8_BLOCK = 256, EACH = 4, MAP_SIZE = 256, CODE_ZERO_SIGNED = 127, CODE_ZERO_UNSIGNED = 0 };

#define ADAM8_BLOCKS 5           /* blocks of a multiprocessor */
#define PIECE ((int64_t)1 << 20) /* moments on their way from or to the host: enough for the bus, little memory */

/* What the step makes of the settings, in the precision that the elements are computed in. */
struct adam_terms {
    float beta1, beta2, rest1, rest2, decay, step_size, root, eps, grad_scale;
};

/* Which products are fused with a sum is said, not left to the compiler: the bits are the same in every kernel. */
__device__ void adam_one(float *p, float *m, float *v, float g, const adam_terms &s) {
    g = __fmul_rn(g, s.grad_scale);
    *m = __fmaf_rn(s.rest1, __fsub_rn(g, *m), *m);
    *v = __fmaf_rn(s.beta2, *v, __fmul_rn(__fmul_rn(s.rest2, g), g));
    const float step = __fdiv_rn(__fmul_rn(s.step_size, *m), __fmaf_rn(__fsqrt_rn(*v), s.root, s.eps));
    *p = __fmaf_rn(*p, s.decay, -step);
}

__global__ void __launch_bounds__(THREADS) adam(float *p, float *m, float *v, const float *g, int64_t n, adam_terms s) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n) adam_one(p + i, m + i, v + i, g[i], s);
}

__global__ void __launch_bounds__(THREADS) adam_vectors(float4 *p, float4 *m, float4 *v, const float4 *g, int64_t n, adam_terms s) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    float4 pi = p[i], mi = m[i], vi = v[i];
    const float4 gi = g[i];
    adam_one(&pi.x, &mi.x, &vi.x, gi.x, s);
    adam_one(&pi.y, &mi.y, &vi.y, gi.y, s);
    adam_one(&pi.z, &mi.z, &vi.z, gi.z, s);
    adam_one(&pi.w, &mi.w, &vi.w, gi.w, s);
    p[i] = pi;
    m[i] = mi;
    v[i] = vi;
}

/* Of 8-bit moments: the values of the codes, and where the search for the nearest begins: for every sign, exponent and 7 bits of mantissa of a
 * number in [-1, 1] as many codes as lie below all such numbers for certain.  Smaller exponents than KEY_BASE's are taken for it. */
enum { KEY_SHIFT = 16, KEY_BASE = 102 << 7, KEYS = (127 << 7) - KEY_BASE + 1 };

struct code_map {
    float values[MAP_SIZE], midpoints[MAP_SIZE];
    uint8_t starts[2][KEYS];
};

/* As many as there are midpoints below x. */
__device__ int search(const float *midpoints, float x) {
    int code = 0;
#pragma unroll
    for (int step = MAP_SIZE / 2; step > 0; step /= 2)
        if (midpoints[code + step - 1] < x) code += step;
    return code;
}

/* By the whole block, of MAP_SIZE threads. */
__device__ void make_map(code_map *map, const float *values) {
    const unsigned own = threadIdx.x, next = min(own + 1, static_cast<unsigned>(MAP_SIZE - 1));
    map->values[own] = values[own];
    map->midpoints[own] = (values[own] + values[next]) / 2;
    __syncthreads();
    for (unsigned key = own; key < KEYS; key += MAP_SIZE) {
        const float least = key > 0 ? __uint_as_float((key + KEY_BASE) << KEY_SHIFT) : 0,
                    end = __uint_as_float((key + 1 + KEY_BASE) << KEY_SHIFT);
        map->starts[0][key] = static_cast<uint8_t>(search(map->midpoints, least));
        map->starts[1][key] = static_cast<uint8_t>(search(map->midpoints, -end));
    }
    __syncthreads();
}

/* The nearest of 256 ascending values to x in [-1, 1], on a midpoint the lower. */
__device__ uint8_t nearest(const code_map &map, float x) {
    const uint32_t bits = __float_as_uint(x);
    const int key = static_cast<int>((bits & 0x7fffffffu) >> KEY_SHIFT) - KEY_BASE;
    int code = isnan(x) ? 0 : map.starts[bits >> 31][min(max(key, 0), KEYS - 1)];
    while (code < MAP_SIZE - 1 && map.midpoints[code] < x) code++;
    return static_cast<uint8_t>(code);
}

/* Codes of EACH moments by their block's largest magnitude, which goes to absmax. */
__device__ void requantise(uint8_t (&codes)[EACH], float *absmax, const float (&x)[EACH], const code_map &map, int zero_code,
                           float *largest) {
    const int warp = static_cast<int>(threadIdx.x) / ESPI_WARP;
    float most = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++) most = fmaxf(most, fabsf(x[i]));
    most = espi_warp_max(most);
    __syncthreads(); /* those of the other moment have been read */
    if (threadIdx.x % ESPI_WARP == 0) largest[warp] = most;
    __syncthreads();
    most = fmaxf(largest[warp], largest[warp ^ 1]); /* two warps share a block of moments */
#pragma unroll
    for (int i = 0; i < EACH; i++) codes[i] = most > 0 ? nearest(map, x[i] / most) : static_cast<uint8_t>(zero_code);
    if (absmax && threadIdx.x % (ADAM8_BLOCK / EACH) == 0) *absmax = most;
}

/* EACH values at once where they lie so, else those below n one by one, the rest 0. */
template <typename T, typename V> __device__ void load(T (&to)[EACH], const T *from, int64_t first, int64_t n, bool vectors) {
    if (vectors && first + EACH <= n) {
        *reinterpret_cast<V *>(to) = *reinterpret_cast<const V *>(from + first);
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) to[i] = first + i < n ? from[first + i] : static_cast<T>(0);
}

template <typename T, typename V> __device__ void store(T *to, const T (&from)[EACH], int64_t first, int64_t n, bool vectors) {
    if (vectors && first + EACH <= n) {
        *reinterpret_cast<V *>(to + first) = *reinterpret_cast<const V *>(from);
        return;
    }
#pragma unroll
    for (int i = 0; i < EACH; i++)
        if (first + i < n) to[first + i] = from[i];
}

/* Four blocks of moments at a time a block of threads, EACH elements a thread. */
__global__ void __launch_bounds__(THREADS, ADAM8_BLOCKS)
    adam8(float *p, uint8_t *state1, uint8_t *state2, float *absmax1, float *absmax2, const float *g, const float *map1, const float *map2,
          int64_t n, adam_terms s, bool vectors) {
    __shared__ code_map maps[2];
    __shared__ float largest[THREADS / ESPI_WARP];
    make_map(&maps[0], map1);
    make_map(&maps[1], map2);
    for (int64_t turn = blockIdx.x; turn * THREADS * EACH < n; turn += gridDim.x) {
        const int64_t block = turn * (THREADS * EACH / ADAM8_BLOCK) + threadIdx.x / (ADAM8_BLOCK / EACH);
        const int64_t first = (turn * THREADS + threadIdx.x) * EACH;
        const bool has_block = block * ADAM8_BLOCK < n;
        const float scale1 = has_block ? absmax1[block] : 0, scale2 = has_block ? absmax2[block] : 0;
        alignas(16) float grad[EACH], value[EACH], m[EACH] = {}, v[EACH] = {};
        alignas(4) uint8_t code1[EACH], code2[EACH];
        load<float, float4>(grad, g, first, n, vectors);
        load<float, float4>(value, p, first, n, vectors);
        load<uint8_t, uchar4>(code1, state1, first, n, vectors);
        load<uint8_t, uchar4>(code2, state2, first, n, vectors);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const float scaled = s.grad_scale * grad[i];
            if (first + i >= n || !isfinite(scaled)) continue;
            m[i] = s.beta1 * (maps[0].values[code1[i]] * scale1) + s.rest1 * scaled;
            v[i] = s.beta2 * (maps[1].values[code2[i]] * scale2) + s.rest2 * scaled * scaled;
            value[i] = value[i] * s.decay - s.step_size * m[i] / (sqrtf(v[i]) + s.eps);
        }
        requantise(code1, has_block ? absmax1 + block : nullptr, m, maps[0], CODE_ZERO_SIGNED, largest);
        requantise(code2, has_block ? absmax2 + block : nullptr, v, maps[1], CODE_ZERO_UNSIGNED, largest);
        store<float, float4>(p, value, first, n, vectors);
        store<uint8_t, uchar4>(state1, code1, first, n, vectors);
        store<uint8_t, uchar4>(state2, code2, first, n, vectors);
    }
}

template <typename A> adam_terms terms_of(const A *a) {
    adam_terms s = {};
    s.beta1 = static_cast<float>(a->beta1);
    s.beta2 = static_cast<float>(a->beta2);
    s.rest1 = static_cast<float>(1 - a->beta1);
    s.rest2 = static_cast<float>(1 - a->beta2);
    s.decay = static_cast<float>(1 - a->lr * a->weight_decay);
    s.grad_scale = static_cast<float>(a->grad_scale);
    return s;
}

esp_status update(cudaStream_t stream, float *p, float *m, float *v, const float *g, int64_t n, const adam_terms &s) {
    if (n % 4 == 0 && espi_aligned16(p) && espi_aligned16(m) && espi_aligned16(v) && espi_aligned16(g))
        adam_vectors<<<espi_blocks(n / 4, THREADS), THREADS, 0, stream>>>(reinterpret_cast<float4 *>(p), reinterpret_cast<float4 *>(m),
                                                                          reinterpret_cast<float4 *>(v),
                                                                          reinterpret_cast<const float4 *>(g), n / 4, s);
    else
        adam<<<espi_blocks(n, THREADS), THREADS, 0, stream>>>(p, m, v, g, n, s);
    return ESPI_CUDA_LAUNCHED("AdamW");
}

/* Moments at home in the host's memory: while a piece of them is updated, the next one comes in and the last one goes back, both ways of the
 * bus at once. */
esp_status update_by_pieces(const espi_exec *exec, float *p, float *m, float *v, const float *g, int64_t n, const adam_terms &s) {
    espi_cuda *cuda = espi_cuda_of(exec);
    const int64_t room = n < PIECE ? n : PIECE;
    char *scratch = static_cast<char *>(exec->scratch);
    float *here[ESPI_CUDA_PIECES][2];
    for (auto &place : here)
        for (float *&moments : place) moments = espi_cut<float>(&scratch, room);
    ESPI_CUDA_TRY(cudaEventRecord(cuda->asked, cuda->stream));
    ESPI_CUDA_TRY(cudaStreamWaitEvent(cuda->aside, cuda->asked, 0));
    for (int64_t first = 0; first < n; first += room) {
        const int at = static_cast<int>(first / room % ESPI_CUDA_PIECES);
        const int64_t count = n - first < room ? n - first : room;
        const size_t bytes = static_cast<size_t>(count) * sizeof(float);
        float *const *const place = here[at];
        if (first >= ESPI_CUDA_PIECES * room) ESPI_CUDA_TRY(cudaStreamWaitEvent(cuda->aside, cuda->gone[at], 0));
        ESPI_CUDA_TRY(cudaMemcpyAsync(place[0], m + first, bytes, cudaMemcpyDefault, cuda->aside));
        ESPI_CUDA_TRY(cudaMemcpyAsync(place[1], v + first, bytes, cudaMemcpyDefault, cuda->aside));
        ESPI_CUDA_TRY(cudaEventRecord(cuda->made, cuda->aside));
        ESPI_CUDA_TRY(cudaStreamWaitEvent(cuda->stream, cuda->made, 0));
        ESPI_TRY(update(cuda->stream, p + first, place[0], place[1], g + first, count, s));
        ESPI_CUDA_TRY(cudaEventRecord(cuda->asked, cuda->stream));
        ESPI_CUDA_TRY(cudaStreamWaitEvent(cuda->away, cuda->asked, 0));
        ESPI_CUDA_TRY(cudaMemcpyAsync(m + first, place[0], bytes, cudaMemcpyDefault, cuda->away));
        ESPI_CUDA_TRY(cudaMemcpyAsync(v + first, place[1], bytes, cudaMemcpyDefault, cuda->away));
        ESPI_CUDA_TRY(cudaEventRecord(cuda->gone[at], cuda->away));
    }
    ESPI_CUDA_TRY(cudaEventRecord(cuda->made, cuda->away));
    return espi_cuda_check(cudaStreamWaitEvent(cuda->stream, cuda->made, 0), "waiting for moments on their way to the host");
}

} // namespace

size_t espi_adamw_scratch_cuda(const espi_exec *exec, const espi_adamw *a) {
    (void)exec;
    return a->host_moments ? 2 * ESPI_CUDA_PIECES * espi_room(a->n < PIECE ? a->n : PIECE, sizeof(float)) : 0;
}

esp_status espi_adamw_cuda(const espi_exec *exec, const espi_adamw *a) {
    if (a->n == 0) return ESP_OK;
    const double correction1 = 1 - pow(a->beta1, static_cast<double>(a->step)),
                 correction2 = sqrt(1 - pow(a->beta2, static_cast<double>(a->step)));
    adam_terms s = terms_of(a);
    s.step_size = static_cast<float>(a->lr / correction1);
    s.root = static_cast<float>(1 / correction2);
    s.eps = static_cast<float>(a->eps);
    float *p = static_cast<float *>(a->p), *m = static_cast<float *>(a->m), *v = static_cast<float *>(a->v);
    const float *g = static_cast<const float *>(a->g);
    return a->host_moments ? update_by_pieces(exec, p, m, v, g, a->n, s) : update(espi_cuda_of(exec)->stream, p, m, v, g, a->n, s);
}

esp_status espi_adamw8_cuda(const espi_exec *exec, const espi_adamw8 *a) {
    if (a->n == 0) return ESP_OK;
    const double correction1 = 1 - pow(a->beta1, static_cast<double>(a->step)),
                 correction2 = sqrt(1 - pow(a->beta2, static_cast<double>(a->step)));
    adam_terms s = terms_of(a);
    s.step_size = static_cast<float>(a->lr * correction2 / correction1);
    s.eps = static_cast<float>(a->eps * correction2);
    const bool vectors = espi_aligned16(a->p) && espi_aligned16(a->g) && espi_aligned16(a->state1) && espi_aligned16(a->state2);
    const int64_t turns = espi_ceil_div(a->n, THREADS * EACH), most = ADAM8_BLOCKS * static_cast<int64_t>(espi_cuda_of(exec)->sms);
    adam8<<<static_cast<unsigned>(turns < most ? turns : most), THREADS, 0, espi_cuda_of(exec)->stream>>>(
        static_cast<float *>(a->p), a->state1, a->state2, a->absmax1, a->absmax2, static_cast<const float *>(a->g), a->map1, a->map2, a->n,
        s, vectors);
    return ESPI_CUDA_LAUNCHED("8-bit AdamW");
}
