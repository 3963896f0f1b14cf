/* Plain values to 4 bits as they arrive on the GPU, with the bits of src/quant/encode.c. */
#include "kernels/cuda/device.h"

#include <cuda_fp16.h>

namespace {

struct flat_rule {
    float thresholds[15];
    uint32_t lowest, steps[15]; /* what a code grows by at each threshold below the value */
};

__device__ __forceinline__ uint32_t f32_bits(const void *x, esp_dtype dtype, int64_t i) {
    if (dtype == ESP_F32) return ((const uint32_t *)x)[i];
    const uint16_t half = ((const uint16_t *)x)[i];
    return dtype == ESP_BF16 ? (uint32_t)half << 16 : __float_as_uint(__half2float(__ushort_as_half(half)));
}

__device__ __forceinline__ uint32_t largest(uint32_t most) {
    for (int step = 16; step; step /= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
    return most;
}

/* A warp a block of 64 values; a lane two neighbours, which share a byte. */
__global__ void flat(uint8_t *codes, float *absmax, const void *x, esp_dtype dtype, int64_t n, const flat_rule rule) {
    const int64_t block = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    const int64_t first = block * ESPI_QBLOCK + threadIdx.x % 32 * 2;
    if (block * ESPI_QBLOCK >= n) return;
    const uint32_t a = first < n ? f32_bits(x, dtype, first) : 0, b = first + 1 < n ? f32_bits(x, dtype, first + 1) : 0;
    const float most = __uint_as_float(largest(max(a & 0x7fffffffu, b & 0x7fffffffu)));
    if (threadIdx.x % 32 == 0) absmax[block] = most;
    if (first >= n) return;
    const float inverse = __fdiv_rn(1.0f, fmaxf(most, 1e-38f));
    const float va = __fmul_rn(__uint_as_float(a), inverse), vb = __fmul_rn(__uint_as_float(b), inverse);
    uint32_t ca = rule.lowest, cb = rule.lowest;
#pragma unroll
    for (int k = 0; k < 15; k++) {
        ca += va > rule.thresholds[k] ? rule.steps[k] : 0;
        cb += vb > rule.thresholds[k] ? rule.steps[k] : 0;
    }
    codes[first / 2] = (uint8_t)((ca & 15u) << 4 | (cb & 15u)); /* behind an odd count stands the code of 0 */
}

struct mx_rule {
    float thresholds[7];
    bool round_up;
};

/* Half a warp a block of 32 values. */
__global__ void shared_exponent(uint8_t *codes, uint8_t *scales, const void *x, esp_dtype dtype, int64_t n, const mx_rule rule) {
    const int64_t block = (int64_t)blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16;
    const bool there = block * ESPI_MXBLOCK < n;
    const int64_t first = block * ESPI_MXBLOCK + threadIdx.x % 16 * 2;
    const uint32_t a = there ? f32_bits(x, dtype, first) : 0, b = there ? f32_bits(x, dtype, first + 1) : 0;
    uint32_t most = max(a & 0x7fffffffu, b & 0x7fffffffu);
    for (int step = 8; step; step /= 2) most = max(most, __shfl_xor_sync(~0u, most, step));
    if (!there) return;
    uint32_t scale = most >> 23 > 2 ? (most >> 23) - 2 : 0;
    if (rule.round_up) scale = (__float_as_uint(__fdiv_rn(__uint_as_float(most), 6.0f)) + 0x7fffffu) >> 23;
    const float factor = __uint_as_float((254u - scale) << 23);
    const uint32_t keep_sign = most ? 8 : 0;
    const float va = __fmul_rn(__uint_as_float(a & 0x7fffffffu), factor), vb = __fmul_rn(__uint_as_float(b & 0x7fffffffu), factor);
    uint32_t ca = a >> 28 & keep_sign, cb = b >> 28 & keep_sign;
#pragma unroll
    for (int k = 0; k < 7; k++) {
        ca += va > rule.thresholds[k];
        cb += vb > rule.thresholds[k];
    }
    codes[first / 2] = (uint8_t)(ca | cb << 4);
    if (threadIdx.x % 16 == 0) scales[block] = (uint8_t)scale;
}

const int THREADS = 256;

int grid(int64_t blocks, int per_group) {
    return (int)((blocks + per_group - 1) / per_group);
}

} // namespace

extern "C" esp_status espi_quantise_cuda(const espi_exec *exec, const espi_quantise *a) {
    const espi_cuda *cuda = (const espi_cuda *)exec->device;
    if (a->n == 0) return ESP_OK;
    if (a->format == ESP_MXFP4) {
        mx_rule rule = {};
        memcpy(rule.thresholds, a->thresholds, sizeof rule.thresholds);
        rule.round_up = a->round_up;
        shared_exponent<<<grid(a->n / ESPI_MXBLOCK, THREADS / 16), THREADS, 0, cuda->stream>>>(a->codes, a->scales, a->x, a->dtype, a->n,
                                                                                               rule);
    } else {
        flat_rule rule = {};
        rule.lowest = a->code_of_rank[0];
        for (int k = 0; k < 15; k++) {
            rule.thresholds[k] = a->thresholds[k];
            rule.steps[k] = (uint32_t)a->code_of_rank[k + 1] - a->code_of_rank[k];
        }
        flat<<<grid((a->n + ESPI_QBLOCK - 1) / ESPI_QBLOCK, THREADS / 32), THREADS, 0, cuda->stream>>>(a->codes, a->absmax, a->x, a->dtype,
                                                                                                       a->n, rule);
    }
    return ESPI_CUDA_LAUNCHED("quantise");
}
