/* Products with the expert stacks for any shape, format and layout: tiles of 16 rows x 16 outputs in f32.  What does not fill the tiles of
 * the tensor cores goes here, and it is what the fast kernels are compared with. */
#include "kernels/cuda/experts.cuh"

#include <cuda_fp16.h>

#define TILE 16

static __device__ float plain_element(const void *data, esp_dtype dtype, int64_t i) {
    if (dtype == ESP_F32) return ((const float *)data)[i];
    if (dtype == ESP_BF16) return __bfloat162float(((const bf16 *)data)[i]);
    return __half2float(((const __half *)data)[i]);
}

static __device__ float e8m0(uint8_t byte) {
    return __uint_as_float(byte ? (uint32_t)byte << 23 : 0x00400000u);
}

/* One element of a packed stack. */
static __device__ float record_element(const espi_stack &w, int64_t expert, int64_t row, int64_t col) {
    const int64_t record = (expert * (w.rows / 64) + row / 64) * (w.cols / 64) + col / 64;
    const uint8_t *at = (const uint8_t *)w.packed + record * RECORD_BYTES(w.format);
    const int r = (int)(row % 64), c = (int)(col % 64), half = c / 32;
    const uint8_t *scales = at + RECORD_CODES;
    const uint32_t word = *(const uint32_t *)(at + half * 1024 + r * 16 + c % 8 / 2 * 4);
    const int j = c % 32 / 8 * 2 + c % 2;
    if (w.format == ESP_MXFP4) { /* four codes in each half of a word: kernels/cuda/pack.cu */
        const uint32_t q = j % 2 ? word >> 16 : word;
        const int low = 6 - 3 * (j / 2), sign = 15 - 3 * (j / 2);
        const uint32_t code = j / 2 < 3 ? (q >> low & 7u) | (q >> sign & 1u) << 3
                                        : (q >> 13 & 1u) << 2 | (q >> 11 & 1u) << 1 | (q >> 10 & 1u) | (q >> 14 & 1u) << 3;
        return w.lut[code] * e8m0(scales[r * 2 + half]);
    }
    return w.lut[word >> 4 * j & 15u] * ((const float *)scales)[r];
}

static __device__ float stack_element(const espi_stack &w, int64_t expert, int64_t row, int64_t col) {
    if (w.packed) return record_element(w, expert, row, col);
    const int64_t part_rows = w.rows / w.parts, part = expert * w.parts + row / part_rows, i = row % part_rows * w.cols + col;
    const uint8_t *data = (const uint8_t *)w.data + part * (int64_t)w.part_bytes;
    if (w.format == ESP_Q_NONE) return plain_element(data, w.dtype, i);
    const uint8_t byte = data[i / 2];
    if (w.format == ESP_MXFP4) return w.lut[i % 2 == 0 ? byte & 15u : byte >> 4] * e8m0(w.scales[part * w.part_blocks + i / ESPI_MXBLOCK]);
    const int64_t block = i / ESPI_QBLOCK;
    float absmax;
    if (w.absmax8) {
        const float nested = w.nested[part * w.part_nested + block / ESPI_NESTED_BLOCK];
        absmax = __fadd_rn(__fmul_rn(w.map[w.absmax8[part * w.part_blocks + block]], nested), w.offset[part]);
    } else {
        absmax = w.absmax[part * w.part_blocks + block];
    }
    return w.lut[i % 2 == 0 ? byte >> 4 : byte & 15u] * absmax;
}

/* product: [S,out] in f32 (`wide`) or bf16 (`narrow`).  4-bit weights are rounded to bf16 first, as the fast kernels hold them. */
template <bool back> static __global__ void product_tile(product_args p, float *wide, bf16 *narrow) {
    __shared__ float in_tile[TILE][TILE + 1], w_tile[TILE][TILE + 1];
    const row_tile t = find_tile(p.routing.offsets, (int)p.routing.experts, (int)blockIdx.x, TILE);
    if (t.rows <= 0) return;
    const int64_t contracted = back ? p.w.rows : p.w.cols, outs = back ? p.w.cols : p.w.rows, out0 = (int64_t)blockIdx.y * TILE;
    const int x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    const bool row_valid = y < t.rows;
    const int64_t s = t.row0 + (row_valid ? y : 0);
    const bf16 *in = p.in + (p.in_row ? p.in_row[s] : s) * contracted;
    const bool round = p.w.format != ESP_Q_NONE;
    float sum = 0;
    for (int64_t k0 = 0; k0 < contracted; k0 += TILE) {
        in_tile[y][x] = row_valid && k0 + x < contracted ? __bfloat162float(in[k0 + x]) : 0;
        const int64_t o = out0 + (back ? x : y), k = k0 + (back ? y : x); /* neighbours read neighbouring columns */
        float value = 0;
        if (o < outs && k < contracted) value = back ? stack_element(p.w, t.expert, k, o) : stack_element(p.w, t.expert, o, k);
        if (round) value = __bfloat162float(__float2bfloat16_rn(value));
        if (back)
            w_tile[x][y] = value;
        else
            w_tile[y][x] = value;
        __syncthreads();
        for (int j = 0; j < TILE; j++) sum += in_tile[y][j] * w_tile[x][j];
        __syncthreads();
    }
    const int64_t o = out0 + x;
    if (!row_valid || o >= outs) return;
    float branch = 0;
    for (int j = 0; j < p.r; j++) {
        const float l = back ? p.up[(t.expert * (int64_t)p.r + j) * outs + o] : p.up[(t.expert * outs + o) * p.r + j];
        branch += l * __bfloat162float(p.low[s * p.r + j]);
    }
    sum += p.factor * branch;
    if (p.bias) sum += p.bias[t.expert * outs + o];
    if (wide)
        wide[s * outs + o] = sum;
    else
        narrow[s * outs + o] = __float2bfloat16_rn(sum);
}

/* Where the gate of value i of a row stands, and its up value. */
static __device__ __forceinline__ void glu_places(int64_t &gate, int64_t &up, int64_t i, int64_t width, int interleaved) {
    gate = interleaved ? 2 * i : i;
    up = interleaved ? gate + 1 : gate + width;
}

static __global__ void activate(bf16 *act, const bf16 *gu, const int32_t *offsets, int64_t experts, int64_t width, glu_rule rule) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, s = i / width;
    if (s >= offsets[experts]) return;
    int64_t gate, up;
    glu_places(gate, up, i % width, width, rule.interleaved);
    const bf16 *row = gu + s * 2 * width;
    act[i] = __float2bfloat16_rn(glu<true>(__bfloat162float(row[gate]), __bfloat162float(row[up]), rule));
}

/* One warp per routed row: d_gu and the row weight's gradient from a_s = W^T d_out. */
static __global__ void activate_back(product_args p, const float *wide) {
    const int64_t s = (int64_t)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (s >= p.routing.offsets[p.routing.experts]) return;
    const float weight = ((const float *)p.routing.row_weight)[s];
    const bf16 *gu = p.gu + s * 2 * p.width;
    bf16 *d_gu = p.out + s * 2 * p.width;
    float dot = 0;
    for (int64_t i = threadIdx.x % 32; i < p.width; i += 32) {
        int64_t gate, up;
        glu_places(gate, up, i, p.width, p.glu.interleaved);
        const float a = wide[s * p.width + i];
        const glu_value v = glu_slopes<true>(__bfloat162float(gu[gate]), __bfloat162float(gu[up]), p.glu);
        dot += v.act * a;
        d_gu[gate] = __float2bfloat16_rn(v.d_gate * weight * a);
        d_gu[up] = __float2bfloat16_rn(v.d_up * weight * a);
    }
    dot = espi_warp_sum(dot);
    if (threadIdx.x % 32 == 0) p.d_row_weight[s] = dot;
}

size_t product_plain_scratch(const product_args *p, product_kind kind) {
    return kind == PRODUCT_DOWN_BACK ? (size_t)(p->routing.tokens * p->routing.top_k * p->width) * sizeof(float) : 0;
}

cudaError_t product_plain(const product_args *p, product_kind kind, void *scratch, cudaStream_t stream) {
    const bool back = kind == PRODUCT_DOWN_BACK || kind == PRODUCT_GATE_UP_BACK;
    const int64_t outs = back ? p->w.cols : p->w.rows, rows = p->routing.tokens * p->routing.top_k;
    const dim3 grid((unsigned)tile_bound(&p->routing, TILE), (unsigned)((outs + TILE - 1) / TILE));
    float *wide = kind == PRODUCT_DOWN_BACK ? (float *)scratch : NULL;
    if (back)
        product_tile<true><<<grid, TILE * TILE, 0, stream>>>(*p, wide, p->out);
    else
        product_tile<false><<<grid, TILE * TILE, 0, stream>>>(*p, wide, p->out);
    if (kind == PRODUCT_GATE_UP)
        activate<<<(unsigned)((rows * p->width + 255) / 256), 256, 0, stream>>>(p->act, p->out, p->routing.offsets, p->routing.experts,
                                                                                p->width, p->glu);
    if (kind == PRODUCT_DOWN_BACK) activate_back<<<(unsigned)((rows + 7) / 8), 256, 0, stream>>>(*p, wide);
    return cudaGetLastError();
}
