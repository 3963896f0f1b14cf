/* AdamW as torch.optim has it, and with 8-bit blockwise moments as bitsandbytes has it; kernels/ref/optim.c says in what they differ. */
#include "kernels/cuda/cuda.cuh"

#include <math.h>

namespace {

enum { THREADS = 256, ADAM8_BLOCK = 256, MAP_SIZE = 256, CODE_ZERO_SIGNED = 127, CODE_ZERO_UNSIGNED = 0 };

/* What the step makes of the settings, in the precision that the elements are computed in. */
struct adam_terms {
    float beta1, beta2, rest1, rest2, decay, step_size, root, eps, grad_scale;
};

__device__ void adam_one(float *p, float *m, float *v, float g, const adam_terms &s) {
    g *= s.grad_scale;
    *m += s.rest1 * (g - *m);
    *v = s.beta2 * *v + s.rest2 * g * g;
    *p = *p * s.decay - s.step_size * *m / (sqrtf(*v) * s.root + s.eps);
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

/* The nearest of 256 ascending values; on a midpoint the lower. */
__device__ uint8_t nearest(const float *map, float x) {
    int low = 0, high = MAP_SIZE - 1;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (map[middle] <= x)
            low = middle;
        else
            high = middle;
    }
    return static_cast<uint8_t>(x > (map[low] + map[high]) / 2 ? high : low);
}

/* One block of moments a block of threads. */
__global__ void __launch_bounds__(ADAM8_BLOCK) adam8(float *p, uint8_t *state1, uint8_t *state2, float *absmax1, float *absmax2,
                                                     const float *g, const float *map1, const float *map2, int64_t n, adam_terms s) {
    __shared__ float signed_map[MAP_SIZE], unsigned_map[MAP_SIZE];
    signed_map[threadIdx.x] = map1[threadIdx.x];
    unsigned_map[threadIdx.x] = map2[threadIdx.x];
    __syncthreads();
    const int64_t i = static_cast<int64_t>(blockIdx.x) * ADAM8_BLOCK + threadIdx.x;
    const bool is_inside = i < n;
    float m = 0, v = 0;
    if (is_inside) {
        const float grad = s.grad_scale * g[i];
        if (isfinite(grad)) {
            m = s.beta1 * (signed_map[state1[i]] * absmax1[blockIdx.x]) + s.rest1 * grad;
            v = s.beta2 * (unsigned_map[state2[i]] * absmax2[blockIdx.x]) + s.rest2 * grad * grad;
            p[i] = p[i] * s.decay - s.step_size * m / (sqrtf(v) + s.eps);
        }
    }
    const float most1 = espi_block_max<ADAM8_BLOCK>(fabsf(m)), most2 = espi_block_max<ADAM8_BLOCK>(fabsf(v));
    if (is_inside) {
        state1[i] = most1 > 0 ? nearest(signed_map, m / most1) : static_cast<uint8_t>(CODE_ZERO_SIGNED);
        state2[i] = most2 > 0 ? nearest(unsigned_map, v / most2) : static_cast<uint8_t>(CODE_ZERO_UNSIGNED);
    }
    if (threadIdx.x == 0) {
        absmax1[blockIdx.x] = most1;
        absmax2[blockIdx.x] = most2;
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

} // namespace

esp_status espi_adamw_cuda(const espi_exec *exec, const espi_adamw *a) {
    if (a->n == 0) return ESP_OK;
    const double correction1 = 1 - pow(a->beta1, static_cast<double>(a->step)),
                 correction2 = sqrt(1 - pow(a->beta2, static_cast<double>(a->step)));
    adam_terms s = terms_of(a);
    s.step_size = static_cast<float>(a->lr / correction1);
    s.root = static_cast<float>(1 / correction2);
    s.eps = static_cast<float>(a->eps);
    const cudaStream_t stream = espi_cuda_of(exec)->stream;
    if (a->n % 4 == 0 && espi_aligned16(a->p) && espi_aligned16(a->m) && espi_aligned16(a->v) && espi_aligned16(a->g))
        adam_vectors<<<espi_blocks(a->n / 4, THREADS), THREADS, 0, stream>>>(static_cast<float4 *>(a->p), static_cast<float4 *>(a->m),
                                                                             static_cast<float4 *>(a->v), static_cast<const float4 *>(a->g),
                                                                             a->n / 4, s);
    else
        adam<<<espi_blocks(a->n, THREADS), THREADS, 0, stream>>>(static_cast<float *>(a->p), static_cast<float *>(a->m),
                                                                 static_cast<float *>(a->v), static_cast<const float *>(a->g), a->n, s);
    return ESPI_CUDA_LAUNCHED("AdamW");
}

esp_status espi_adamw8_cuda(const espi_exec *exec, const espi_adamw8 *a) {
    if (a->n == 0) return ESP_OK;
    const double correction1 = 1 - pow(a->beta1, static_cast<double>(a->step)),
                 correction2 = sqrt(1 - pow(a->beta2, static_cast<double>(a->step)));
    adam_terms s = terms_of(a);
    s.step_size = static_cast<float>(a->lr * correction2 / correction1);
    s.eps = static_cast<float>(a->eps * correction2);
    adam8<<<espi_blocks(a->n, ADAM8_BLOCK), ADAM8_BLOCK, 0, espi_cuda_of(exec)->stream>>>(
        static_cast<float *>(a->p), a->state1, a->state2, a->absmax1, a->absmax2, static_cast<const float *>(a->g), a->map1, a->map2, a->n,
        s);
    return ESPI_CUDA_LAUNCHED("8-bit AdamW");
}
