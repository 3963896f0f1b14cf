/* The expert ops on a GPU beside float64, and their times: a program of its own, for machines where the test suite's libraries are not.
 *   gpu_experts check            every case; check NAME: one; list: their names
 *   gpu_experts exact            every bit of the decoded weights
 *   gpu_experts time SHAPE FORMAT TOKENS...   SHAPE: qwen3-30b-a3b | gpt-oss-20b, FORMAT: nf4 | mxfp4 | bf16
 *   gpu_experts busy SHAPE FORMAT TOKENS...   how much of a step's time a kernel is running
 *   gpu_experts once SHAPE FORMAT TOKENS      for a profiler */
#include "busy.h"
#include "core/status.h"
#include "kernels/cuda/device.h"
#include "kernels/cuda/scratch.h"
#include "kernels/stack.h"

#include <algorithm>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <dlfcn.h>
#include <functional>
#include <math.h>
#include <random>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <string>
#include <thread>
#include <vector>

typedef __nv_bfloat16 bf16;

#define MUST(call)                                                                                                                         \
    do {                                                                                                                                   \
        const cudaError_t error_ = (call);                                                                                                 \
        if (error_ != cudaSuccess) {                                                                                                       \
            printf("FAILED %s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(error_));                                       \
            exit(3);                                                                                                                       \
        }                                                                                                                                  \
    } while (0)
#define OP(call)                                                                                                                           \
    do {                                                                                                                                   \
        if ((call) != ESP_OK) {                                                                                                            \
            printf("FAILED %s: %s\n", #call, esp_last_error());                                                                            \
            exit(3);                                                                                                                       \
        }                                                                                                                                  \
    } while (0)

/* ---- a layer of experts with everything its ops touch, on the device and, where the reference needs it, on the host ---- */
enum routing_kind { SKEWED, VERY_SKEWED, BALANCED, FEW_EXPERTS, ALL_ON_ONE, BOUNDARIES, FEW_ROWS, FEW_AND_MANY };

struct shape {
    const char *name;
    int E, K, H, I, T, r;
    esp_qformat format;
    bool packed, nested, interleaved, clamped, bias;
    routing_kind routing;
};

template <typename T> struct both {
    std::vector<T> host;
    T *device = NULL;
    size_t n = 0;
    void make(size_t count) {
        n = count;
        MUST(cudaMalloc((void **)&device, std::max<size_t>(n, 1) * sizeof(T)));
    }
    void put() {
        if (!device) make(host.size());
        if (n) MUST(cudaMemcpy(device, host.data(), n * sizeof(T), cudaMemcpyHostToDevice));
    }
    void get() {
        host.resize(n);
        if (n) MUST(cudaMemcpy(host.data(), device, n * sizeof(T), cudaMemcpyDeviceToHost));
    }
    void poison() { MUST(cudaMemset(device, 0xff, n * sizeof(T))); }
    void done() {
        if (device) MUST(cudaFree(device));
        device = NULL;
    }
};

static float value(bf16 v) {
    return __bfloat162float(v);
}
static float value(float v) {
    return v;
}

struct stack {
    espi_stack host, raw, used; /* used: what the ops are given */
    both<uint8_t> data, absmax8, scales, packed;
    both<float> absmax, nested, offset, lut, map;
    std::vector<float> decoded; /* small stacks only */
};

struct layer {
    shape s;
    int S;
    stack gate_up, down;
    both<bf16> x, d_out, gu, act, u_gu, y, u_dn, d_gu, d_rows;
    both<float> a_gu, b_gu, a_dn, b_dn, bias_gu, bias_dn, weight, d_weight, da_gu, db_gu, da_dn, db_dn;
    both<int32_t> offsets, row_token, slot_row;
    std::vector<float> grad0; /* what the gradients held before */
    espi_cuda cuda;
    espi_exec exec;
    espi_gate_up_fwd gate_up_fwd;
    espi_down_fwd down_fwd;
    espi_down_bwd down_bwd;
    espi_gate_up_bwd gate_up_bwd;
    size_t scratch_bytes;
    both<bf16> out; /* of both sums over a token's rows */
    both<float> d_slot;
    espi_combine_fwd combine_fwd;
    espi_combine_bwd combine_bwd;
};

static std::mt19937_64 generator;
static std::normal_distribution<float> normal_values(0, 1);
static float normal() {
    return normal_values(generator);
}

/* Every case has its own data, whatever ran before it. */
static void seed(unsigned value) {
    generator.seed(value);
    normal_values.reset();
}
static float uniform() {
    return (float)((double)(generator() >> 11) * 0x1p-53);
}

static const float nf4[16] = {-1.0f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.0f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.0f};
static const float fp4[16] = {0.0f, 5.208333333e-03f,  0.66666667f,  1.0f,  0.33333333f,  0.5f,  0.16666667f,  0.25f,
                              0.0f, -5.208333333e-03f, -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f};
static const float e2m1[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.0f, -0.5f, -1, -1.5f, -2, -3, -4, -6};

static __device__ uint64_t mixed(uint64_t i) {
    uint64_t z = i * 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    return (z ^ z >> 27) * 0x94d049bb133111ebull;
}

/* Random bytes made on the device, then copied: stacks are large. */
static __global__ void fill_bytes(uint8_t *out, size_t n, uint64_t seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x)
        out[i] = (uint8_t)(mixed(i + seed) >> 56);
}

static __global__ void fill_bf16(bf16 *out, size_t n, uint64_t seed, float scale) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        const uint64_t z = mixed(i + seed);
        float sum = 0; /* four uniforms: near enough to normal */
        for (int j = 0; j < 4; j++) sum += (float)(z >> 16 * j & 0xffff) / 65536.0f - 0.5f;
        out[i] = __float2bfloat16(sum * 1.732f * scale);
    }
}

static void make_stack(stack &k, const shape &s, int rows, int cols, int parts, bool keep_decoded) {
    espi_stack w = {};
    w.format = s.format, w.dtype = ESP_BF16, w.experts = s.E, w.rows = rows, w.cols = cols, w.parts = parts;
    const int64_t n = (int64_t)rows / parts * cols, all = (int64_t)s.E * parts;
    const float amplitude = 1.0f / sqrtf((float)cols);
    if (s.format == ESP_Q_NONE) {
        w.part_bytes = (size_t)n * 2;
        k.data.make(all * w.part_bytes);
        fill_bf16<<<1024, 256>>>((bf16 *)k.data.device, all * n, generator(), amplitude);
    } else {
        w.part_bytes = (size_t)(n + 1) / 2;
        k.data.make(all * w.part_bytes);
        fill_bytes<<<1024, 256>>>(k.data.device, k.data.n, generator());
        const int block = s.format == ESP_MXFP4 ? 32 : 64;
        w.part_blocks = (n + block - 1) / block;
        w.part_nested = (w.part_blocks + 255) / 256;
        if (s.format == ESP_MXFP4) {
            int exponent;
            frexpf(amplitude * 0.35f, &exponent);
            k.scales.host.resize(all * w.part_blocks);
            for (auto &v : k.scales.host) v = (uint8_t)(127 + exponent - 1 - (int)(generator() % 3));
            if (s.E < 32) { /* every exponent that a file may hold, where a value times it stays finite beside the others' size */
                k.scales.host[0] = 0, k.scales.host[1] = 1, k.scales.host[2] = 2;
                k.scales.host[5] = 129, k.scales.host[6] = 128;
            }
            k.scales.put();
            w.scales = k.scales.host.data();
        } else if (s.nested) {
            k.absmax8.host.resize(all * w.part_blocks), k.nested.host.resize(all * w.part_nested), k.offset.host.resize(all),
                k.map.host.resize(256);
            for (int i = 0; i < 256; i++) k.map.host[i] = -1 + (float)i / 127.5f;
            for (auto &v : k.absmax8.host) v = (uint8_t)generator();
            for (auto &v : k.nested.host) v = amplitude * (0.5f + uniform());
            for (auto &v : k.offset.host) v = 2.0f * amplitude;
            k.absmax8.put(), k.nested.put(), k.offset.put(), k.map.put();
            w.absmax8 = k.absmax8.host.data(), w.nested = k.nested.host.data(), w.offset = k.offset.host.data(), w.map = k.map.host.data();
        } else {
            k.absmax.host.resize(all * w.part_blocks);
            for (auto &v : k.absmax.host) v = amplitude * (1.0f + 2.0f * uniform());
            k.absmax.put();
            w.absmax = k.absmax.host.data();
        }
        const float *table = s.format == ESP_NF4 ? nf4 : s.format == ESP_FP4 ? fp4 : e2m1;
        k.lut.host.assign(table, table + 16);
        k.lut.put();
        w.lut = k.lut.host.data();
    }
    MUST(cudaDeviceSynchronize());
    k.data.get();
    w.data = k.data.host.data();
    k.host = w;
    k.raw = w;
    k.raw.data = k.data.device, k.raw.absmax = k.absmax.device, k.raw.absmax8 = k.absmax8.device, k.raw.nested = k.nested.device;
    k.raw.offset = k.offset.device, k.raw.scales = k.scales.device, k.raw.lut = k.lut.device, k.raw.map = k.map.device;
    k.used = k.raw;
    if (keep_decoded) {
        k.decoded.resize((size_t)s.E * rows * cols);
        for (int e = 0; e < s.E; e++)
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < cols; c++) {
                    const float v = espi_stack_value(&k.host, e, r, c);
                    k.decoded[((size_t)e * rows + r) * cols + c] = s.format == ESP_Q_NONE ? v : value(__float2bfloat16(v));
                }
    }
}

static double weight_of(const stack &k, int e, int row, int col) {
    if (!k.decoded.empty()) return k.decoded[((size_t)e * k.host.rows + row) * k.host.cols + col];
    const float v = espi_stack_value(&k.host, e, row, col);
    return k.host.format == ESP_Q_NONE ? v : value(__float2bfloat16(v));
}

static void pack_stack(layer &l, stack &k) {
    const size_t one = espi_packed_bytes_cuda(&k.raw);
    if (!one) return;
    k.packed.make(one * l.s.E);
    k.packed.poison();
    OP(espi_pack_cuda(&l.exec, k.packed.device, &k.raw));
    k.used.data = NULL, k.used.absmax = NULL, k.used.absmax8 = NULL, k.used.nested = NULL, k.used.offset = NULL, k.used.scales = NULL;
    k.used.packed = k.packed.device;
}

static void fill(both<float> &a, size_t n, float scale) {
    a.host.resize(n);
    for (auto &v : a.host) v = scale * normal();
    a.put();
}

static void make_routing(layer &l) {
    const shape &s = l.s;
    std::vector<std::vector<int>> rows(s.E);
    if (s.routing >= BOUNDARIES) { /* K = 1: so many rows for each expert, around every size of a tile */
        static const int counts[][18] = {{1, 15, 16, 17, 0, 31, 33, 63, 64, 65, 0, 127, 129, 255, 256, 257, 300, 513},
                                         {1, 7, 0, 8, 9, 15, 16, 17, 0, 23, 24, 25, 31, 32, 33, 40, 64, 65},
                                         {0, 1, 7, 8, 9, 24, 25, 32, 33, 64, 65, 128, 129, 200, 31, 16, 0, 17}};
        int t = 0;
        for (int e = 0; e < s.E; e++)
            for (int i = 0; i < counts[s.routing - BOUNDARIES][e % 18]; i++) rows[e].push_back(t++ % s.T);
        for (auto &r : rows) std::sort(r.begin(), r.end());
    } else {
        std::vector<double> popularity(s.E);
        for (auto &p : popularity) p = s.routing == SKEWED ? exp(0.72 * normal()) : s.routing == VERY_SKEWED ? exp(1.45 * normal()) : 1;
        for (int t = 0; t < s.T; t++) {
            std::vector<std::pair<double, int>> keys;
            for (int e = 0; e < s.E; e++) {
                if (s.routing == FEW_EXPERTS && e % 3 != 1) continue;
                if (s.routing == ALL_ON_ONE && (e < 1 || e > s.K)) continue;
                keys.push_back({-log(1 - uniform()) / popularity[e], e});
            }
            std::sort(keys.begin(), keys.end());
            std::vector<int> chosen;
            for (int k = 0; k < s.K; k++) chosen.push_back(keys[k].second);
            for (int e : chosen) rows[e].push_back(t);
        }
    }
    l.offsets.host.assign(1, 0);
    l.row_token.host.clear();
    for (auto &r : rows) {
        l.row_token.host.insert(l.row_token.host.end(), r.begin(), r.end());
        l.offsets.host.push_back((int32_t)l.row_token.host.size());
    }
    l.weight.host.resize(l.S);
    for (auto &w : l.weight.host) w = 0.1f + uniform();
    l.slot_row.host.assign(l.S, 0);
    std::vector<int> used(s.T, 0);
    for (int row = 0; row < l.S; row++) {
        const int t = l.row_token.host[row];
        if (used[t] < s.K) l.slot_row.host[(size_t)t * s.K + used[t]++] = row;
    }
    l.offsets.put(), l.row_token.put(), l.weight.put(), l.slot_row.put();
}

static void make_layer(layer &l, const shape &s) {
    l.s = s, l.S = s.T * s.K;
    const bool small = (int64_t)s.E * s.H * s.I < (1 << 24);
    l.cuda = {};
    MUST(cudaStreamCreate(&l.cuda.stream));
    MUST(cudaDeviceGetAttribute(&l.cuda.sms, cudaDevAttrMultiProcessorCount, 0));
    l.exec = {};
    l.exec.device = &l.cuda;
    make_stack(l.gate_up, s, 2 * s.I, s.H, s.interleaved ? 1 : 2, small);
    make_stack(l.down, s, s.H, s.I, 1, small);
    if (s.packed) pack_stack(l, l.gate_up), pack_stack(l, l.down);
    const size_t S = l.S, E = s.E, r = s.r, H = s.H, I = s.I;
    make_routing(l);
    l.x.make((size_t)s.T * H), l.d_out.make((size_t)s.T * H);
    fill_bf16<<<1024, 256>>>(l.x.device, l.x.n, generator(), 1);
    fill_bf16<<<1024, 256>>>(l.d_out.device, l.d_out.n, generator(), 1);
    MUST(cudaDeviceSynchronize());
    l.x.get(), l.d_out.get();
    fill(l.a_gu, E * r * H, 1 / sqrtf((float)H)), fill(l.b_gu, E * 2 * I * r, 0.5f);
    fill(l.a_dn, E * r * I, 1 / sqrtf((float)I)), fill(l.b_dn, E * H * r, 0.5f);
    fill(l.bias_gu, s.bias ? E * 2 * I : 0, 0.5f), fill(l.bias_dn, s.bias ? E * H : 0, 0.5f);
    fill(l.da_gu, l.a_gu.n, 1), fill(l.db_gu, l.b_gu.n, 1), fill(l.da_dn, l.a_dn.n, 1), fill(l.db_dn, l.b_dn.n, 1);
    l.gu.make(S * 2 * I), l.act.make(S * I), l.u_gu.make(S * r), l.y.make(S * H), l.u_dn.make(S * r);
    l.d_gu.make(S * 2 * I), l.d_rows.make(S * H), l.d_weight.make(S);
    espi_routing routing = {};
    routing.tokens = s.T, routing.experts = s.E, routing.top_k = s.K;
    routing.offsets = l.offsets.device, routing.row_token = l.row_token.device, routing.slot_row = l.slot_row.device,
    routing.row_weight = l.weight.device;
    espi_glu glu = {};
    glu.interleaved = s.interleaved, glu.clamped = s.clamped, glu.limit = s.clamped ? 1.5 : 0, glu.alpha = s.clamped ? 1.702 : 0;
    espi_lora gu = {}, dn = {};
    gu.r = dn.r = s.r, gu.scale = dn.scale = 2.0;
    if (s.r) gu.a = l.a_gu.device, gu.b = l.b_gu.device, gu.d_a = l.da_gu.device, gu.d_b = l.db_gu.device;
    if (s.r) dn.a = l.a_dn.device, dn.b = l.b_dn.device, dn.d_a = l.da_dn.device, dn.d_b = l.db_dn.device;
    const float *bias_gu = s.bias ? l.bias_gu.device : NULL, *bias_dn = s.bias ? l.bias_dn.device : NULL;
    l.gate_up_fwd = {.gu = l.gu.device,
                     .act = l.act.device,
                     .u = l.u_gu.device,
                     .x = l.x.device,
                     .w = l.gate_up.used,
                     .bias = bias_gu,
                     .lora = gu,
                     .routing = routing,
                     .glu = glu};
    l.down_fwd = {
        .y = l.y.device, .u = l.u_dn.device, .act = l.act.device, .w = l.down.used, .bias = bias_dn, .lora = dn, .routing = routing};
    l.down_bwd = {.d_gu = l.d_gu.device,
                  .d_row_weight = l.d_weight.device,
                  .d_out = l.d_out.device,
                  .gu = l.gu.device,
                  .u = l.u_dn.device,
                  .w = l.down.used,
                  .bias = bias_dn,
                  .lora = dn,
                  .routing = routing,
                  .glu = glu};
    l.gate_up_bwd = {.d_rows = l.d_rows.device,
                     .d_gu = l.d_gu.device,
                     .x = l.x.device,
                     .u = l.u_gu.device,
                     .w = l.gate_up.used,
                     .lora = gu,
                     .routing = routing};
    size_t scratch = espi_gate_up_fwd_scratch_cuda(&l.exec, &l.gate_up_fwd);
    scratch = std::max(scratch, espi_down_fwd_scratch_cuda(&l.exec, &l.down_fwd));
    scratch = std::max(scratch, espi_down_bwd_scratch_cuda(&l.exec, &l.down_bwd));
    scratch = std::max(scratch, espi_gate_up_bwd_scratch_cuda(&l.exec, &l.gate_up_bwd));
    l.scratch_bytes = scratch;
    MUST(cudaMalloc(&l.exec.scratch, scratch + 256));
    MUST(cudaMemset(l.exec.scratch, 0xff, scratch + 256));
    l.out.make((size_t)s.T * H), l.d_slot.make(S);
    l.combine_fwd = {}, l.combine_bwd = {};
    l.combine_fwd.out = l.out.device, l.combine_fwd.y = l.y.device, l.combine_fwd.routing = routing, l.combine_fwd.hidden = s.H;
    l.combine_bwd.d_x = l.out.device, l.combine_bwd.d_rows = l.d_rows.device, l.combine_bwd.routing = routing;
    l.combine_bwd.hidden = s.H, l.combine_bwd.d_row_weight = l.d_weight.device, l.combine_bwd.d_weight = l.d_slot.device;
}

static void free_layer(layer &l) {
    for (both<bf16> *b : {&l.x, &l.d_out, &l.gu, &l.act, &l.u_gu, &l.y, &l.u_dn, &l.d_gu, &l.d_rows, &l.out}) b->done();
    for (both<float> *b : {&l.a_gu, &l.b_gu, &l.a_dn, &l.b_dn, &l.bias_gu, &l.bias_dn, &l.weight, &l.d_weight, &l.da_gu, &l.db_gu, &l.da_dn,
                           &l.db_dn, &l.d_slot})
        b->done();
    for (both<int32_t> *b : {&l.offsets, &l.row_token, &l.slot_row}) b->done();
    for (stack *k : {&l.gate_up, &l.down}) {
        for (both<uint8_t> *b : {&k->data, &k->absmax8, &k->scales, &k->packed}) b->done();
        for (both<float> *b : {&k->absmax, &k->nested, &k->offset, &k->lut, &k->map}) b->done();
    }
    MUST(cudaFree(l.exec.scratch));
    MUST(cudaStreamDestroy(l.cuda.stream));
}

/* ---- float64 ---- */
static int expert_of(const layer &l, int row) {
    return (int)(std::upper_bound(l.offsets.host.begin(), l.offsets.host.end(), row) - l.offsets.host.begin()) - 1;
}

static double dot_low(const float *a, const bf16 *x, int n, int stride) {
    double sum = 0;
    for (int i = 0; i < n; i++) sum += (double)a[(size_t)i * stride] * value(x[i]);
    return sum;
}

struct glu_result {
    double act, gate, up;
};
static glu_result reference_glu(const shape &s, double g, double u) {
    bool gate_passes = true, up_passes = true;
    double slope = 1, limit = (float)1.5;
    if (s.clamped) {
        gate_passes = !(g >= limit), up_passes = !(u >= limit || u <= -limit);
        g = g > limit ? limit : g;
        u = 1 + (u > limit ? limit : u < -limit ? -limit : u);
        slope = 1.702;
    }
    const double sigma = 1 / (1 + exp(-slope * g));
    return {g * sigma * u, gate_passes ? u * sigma * (1 + slope * g * (1 - sigma)) : 0, up_passes ? g * sigma : 0};
}
static void gate_up_at(const layer &l, int row, int i, double &g, double &u, size_t *gate = NULL, size_t *up = NULL) {
    const size_t I = l.s.I, at = (size_t)row * 2 * I + (l.s.interleaved ? 2 * (size_t)i : i), to = at + (l.s.interleaved ? 1 : I);
    g = value(l.gu.host[at]), u = value(l.gu.host[to]);
    if (gate) *gate = at, *up = to;
}

static double reference_gu(const layer &l, int row, int o) {
    const int e = expert_of(l, row), H = l.s.H, r = l.s.r, O = 2 * l.s.I;
    const bf16 *x = &l.x.host[(size_t)l.row_token.host[row] * H];
    double sum = l.s.bias ? l.bias_gu.host[(size_t)e * O + o] : 0;
    for (int i = 0; i < H; i++) sum += weight_of(l.gate_up, e, o, i) * value(x[i]);
    for (int n = 0; n < r; n++) sum += 2.0 * l.b_gu.host[((size_t)e * O + o) * r + n] * value(l.u_gu.host[(size_t)row * r + n]);
    return sum;
}
static double reference_y(const layer &l, int row, int o) {
    const int e = expert_of(l, row), H = l.s.H, I = l.s.I, r = l.s.r;
    const bf16 *x = &l.act.host[(size_t)row * I];
    double sum = l.s.bias ? l.bias_dn.host[(size_t)e * H + o] : 0;
    for (int i = 0; i < I; i++) sum += weight_of(l.down, e, o, i) * value(x[i]);
    for (int n = 0; n < r; n++) sum += 2.0 * l.b_dn.host[((size_t)e * H + o) * r + n] * value(l.u_dn.host[(size_t)row * r + n]);
    return sum;
}
static double reference_q(const layer &l, int row, int n, bool down) {
    const int e = expert_of(l, row), r = l.s.r, O = down ? l.s.H : 2 * l.s.I;
    const bf16 *d = down ? &l.d_out.host[(size_t)l.row_token.host[row] * O] : &l.d_gu.host[(size_t)row * O];
    return value(__float2bfloat16((float)(2.0 * dot_low((down ? l.b_dn : l.b_gu).host.data() + (size_t)e * O * r + n, d, O, r))));
}
/* W^T d + A^T q, q rounded as a plain bf16 product would store it; the q of the row before are kept. */
static double reference_through(const layer &l, int row, int i, bool down) {
    static thread_local const layer *q_layer;
    static thread_local int q_row, q_down;
    static thread_local std::vector<double> q;
    const int e = expert_of(l, row), r = l.s.r, O = down ? l.s.H : 2 * l.s.I, in = down ? l.s.I : l.s.H;
    if (q_layer != &l || q_row != row || q_down != down || (int)q.size() != r) {
        q.resize(r);
        for (int n = 0; n < r; n++) q[n] = reference_q(l, row, n, down);
        q_layer = &l, q_row = row, q_down = down;
    }
    const bf16 *d = down ? &l.d_out.host[(size_t)l.row_token.host[row] * O] : &l.d_gu.host[(size_t)row * O];
    double sum = 0;
    for (int o = 0; o < O; o++) sum += weight_of(down ? l.down : l.gate_up, e, o, i) * value(d[o]);
    for (int n = 0; n < r; n++) sum += (down ? l.a_dn : l.a_gu).host[((size_t)e * r + n) * in + i] * q[n];
    return sum;
}

/* ---- comparisons: relative Frobenius error, the largest single error beside the size of the array, elements never written ---- */
struct report {
    int failures = 0;
};

template <typename T>
static void compare(report &rep, const layer &l, const char *what, const std::vector<T> &got, int rows, int cols, double limit, int samples,
                    const std::function<double(int, int)> &reference) {
    if (got.empty()) return;
    size_t unwritten = 0, first_unwritten = 0;
    for (size_t i = 0; i < got.size(); i++)
        if (!(fabs((double)value(got[i])) < 1e30) && !unwritten++) first_unwritten = i;
    std::vector<std::pair<int, int>> places;
    if ((int64_t)rows * cols <= samples)
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < cols; c++) places.push_back({r, c});
    else
        for (int i = 0; i < samples; i++) places.push_back({(int)(generator() % rows), (int)(generator() % cols)});
    std::vector<double> want(places.size());
    const int workers = (int)std::min<size_t>(std::max(1u, std::thread::hardware_concurrency()), 16);
    std::vector<std::thread> threads;
    for (int w = 0; w < workers; w++)
        threads.emplace_back([&, w] {
            for (size_t i = w; i < places.size(); i += workers) want[i] = reference(places[i].first, places[i].second);
        });
    for (auto &t : threads) t.join();
    double error2 = 0, size2 = 0, worst = 0;
    for (size_t i = 0; i < places.size(); i++) {
        const double g = value(got[(size_t)places[i].first * cols + places[i].second]), d = g - want[i];
        error2 += d * d, size2 += want[i] * want[i];
    }
    const double rms = sqrt(size2 / (double)places.size());
    int shown = 0, wrong = 0;
    for (size_t i = 0; i < places.size(); i++) {
        const int r = places[i].first, c = places[i].second;
        const double g = value(got[(size_t)r * cols + c]), d = fabs(g - want[i]), scaled = d / (fabs(want[i]) + rms);
        if (!(scaled <= worst)) worst = scaled;
        if (!(scaled <= 12 * limit)) { /* rows differ in size: a wrong fragment is off by its own size or more */
            wrong++;
            if (shown++ < 4) {
                const int e = rows == l.S ? expert_of(l, r) : -1;
                printf("    %s[%d,%d] got %.6g want %.6g", what, r, c, g, want[i]);
                if (e >= 0) printf(" (expert %d, its row %d of %d)", e, r - l.offsets.host[e], l.offsets.host[e + 1] - l.offsets.host[e]);
                printf("\n");
            }
        }
    }
    const double relative = sqrt(error2 / size2);
    const bool bad = !(relative <= limit) || wrong || unwritten;
    printf("  %-13s rel %.2e (limit %.1e) worst %.2e wrong %d of %zu unwritten %zu%s\n", what, relative, limit, worst, wrong, places.size(),
           unwritten, bad ? "  <-- FAILED" : "");
    if (unwritten) printf("    first not written or not finite: [%zu,%zu]\n", first_unwritten / cols, first_unwritten % cols);
    rep.failures += bad;
}

template <typename T> static void same_bits(report &rep, const char *what, const both<T> &a, const std::vector<T> &before) {
    if (before.empty()) return;
    std::vector<T> now(a.n);
    MUST(cudaMemcpy(now.data(), a.device, a.n * sizeof(T), cudaMemcpyDeviceToHost));
    if (memcmp(now.data(), before.data(), a.n * sizeof(T)) != 0) {
        size_t i = 0;
        while (memcmp(&now[i], &before[i], sizeof(T)) == 0) i++;
        printf("  %s differs from run to run, first at %zu  <-- FAILED\n", what, i);
        rep.failures++;
    }
}

static void run_all(layer &l) {
    OP(espi_gate_up_fwd_cuda(&l.exec, &l.gate_up_fwd));
    OP(espi_down_fwd_cuda(&l.exec, &l.down_fwd));
    OP(espi_down_bwd_cuda(&l.exec, &l.down_bwd));
    OP(espi_gate_up_bwd_cuda(&l.exec, &l.gate_up_bwd));
}

/* From the gather to the sum over a token's rows. */
static void run_forward(layer &l) {
    OP(espi_gate_up_fwd_cuda(&l.exec, &l.gate_up_fwd));
    OP(espi_down_fwd_cuda(&l.exec, &l.down_fwd));
    OP(espi_combine_fwd_cuda(&l.exec, &l.combine_fwd));
}

static void run_step(layer &l) {
    run_forward(l);
    OP(espi_down_bwd_cuda(&l.exec, &l.down_bwd));
    OP(espi_gate_up_bwd_cuda(&l.exec, &l.gate_up_bwd));
    OP(espi_combine_bwd_cuda(&l.exec, &l.combine_bwd));
}

static int check(layer &l, int samples) {
    report rep;
    const shape &s = l.s;
    std::vector<float> da_gu = l.da_gu.host, db_gu = l.db_gu.host, da_dn = l.da_dn.host, db_dn = l.db_dn.host; /* before */
    l.gu.poison(), l.act.poison(), l.u_gu.poison(), l.y.poison(), l.u_dn.poison(), l.d_gu.poison(), l.d_rows.poison(), l.d_weight.poison();
    run_all(l);
    MUST(cudaStreamSynchronize(l.cuda.stream));
    l.gu.get(), l.act.get(), l.u_gu.get(), l.y.get(), l.u_dn.get(), l.d_gu.get(), l.d_rows.get(), l.d_weight.get();
    l.da_gu.get(), l.db_gu.get(), l.da_dn.get(), l.db_dn.get();
    const int S = l.S, H = s.H, I = s.I, r = s.r;
    compare(rep, l, "gu", l.gu.host, S, 2 * I, 3e-3, samples, [&](int row, int c) { return reference_gu(l, row, c); });
    compare(rep, l, "act", l.act.host, S, I, 3e-3, samples, [&](int row, int c) {
        double g, u;
        gate_up_at(l, row, c, g, u);
        return reference_glu(s, g, u).act;
    });
    compare(rep, l, "u gate_up", l.u_gu.host, S, r, 3e-3, samples, [&](int row, int n) {
        return dot_low(&l.a_gu.host[((size_t)expert_of(l, row) * r + n) * H], &l.x.host[(size_t)l.row_token.host[row] * H], H, 1);
    });
    compare(rep, l, "u down", l.u_dn.host, S, r, 3e-3, samples, [&](int row, int n) {
        return dot_low(&l.a_dn.host[((size_t)expert_of(l, row) * r + n) * I], &l.act.host[(size_t)row * I], I, 1);
    });
    compare(rep, l, "y", l.y.host, S, H, 3e-3, samples, [&](int row, int c) { return reference_y(l, row, c); });
    compare(rep, l, "d_gu", l.d_gu.host, S, 2 * I, 5e-3, samples, [&](int row, int c) {
        const int i = s.interleaved ? c / 2 : c % I;
        const bool up = s.interleaved ? c % 2 : c / I;
        double g, u;
        gate_up_at(l, row, i, g, u);
        const glu_result v = reference_glu(s, g, u);
        return (up ? v.up : v.gate) * l.weight.host[row] * reference_through(l, row, i, true);
    });
    compare(rep, l, "d_row_weight", l.d_weight.host, S, 1, 6e-3, std::max(32, std::min(S, samples / I)), [&](int row, int) {
        const int e = expert_of(l, row);
        double sum = 0;
        for (int i = 0; i < I; i++) {
            double g, u;
            gate_up_at(l, row, i, g, u);
            sum += reference_glu(s, g, u).act * reference_through(l, row, i, true);
        }
        for (int o = 0; s.bias && o < H; o++)
            sum += (double)l.bias_dn.host[(size_t)e * H + o] * value(l.d_out.host[(size_t)l.row_token.host[row] * H + o]);
        return sum;
    });
    compare(rep, l, "d_rows", l.d_rows.host, S, H, 4e-3, samples, [&](int row, int c) { return reference_through(l, row, c, false); });
    const int few = std::max(64, samples / 64);
    auto sum_rows = [&](int e, const std::function<double(int)> &term) {
        double sum = 0;
        for (int row = l.offsets.host[e]; row < l.offsets.host[e + 1]; row++) sum += term(row);
        return sum;
    };
    compare(rep, l, "dB gate_up", l.db_gu.host, s.E * 2 * I, r, 5e-3, few, [&](int at, int n) {
        const int e = at / (2 * I), o = at % (2 * I);
        return db_gu[(size_t)at * r + n] +
               2.0 * sum_rows(e, [&](int row) {
                   return (double)value(l.d_gu.host[(size_t)row * 2 * I + o]) * value(l.u_gu.host[(size_t)row * r + n]);
               });
    });
    compare(rep, l, "dA gate_up", l.da_gu.host, s.E * r, H, 5e-3, few, [&](int at, int c) {
        const int e = at / r, n = at % r;
        return da_gu[(size_t)at * H + c] +
               sum_rows(e, [&](int row) { return reference_q(l, row, n, false) * value(l.x.host[(size_t)l.row_token.host[row] * H + c]); });
    });
    compare(rep, l, "dB down", l.db_dn.host, s.E * H, r, 5e-3, few, [&](int at, int n) {
        const int e = at / H, o = at % H;
        return db_dn[(size_t)at * r + n] + 2.0 * sum_rows(e, [&](int row) {
                                               return (double)l.weight.host[row] *
                                                      value(l.d_out.host[(size_t)l.row_token.host[row] * H + o]) *
                                                      value(l.u_dn.host[(size_t)row * r + n]);
                                           });
    });
    compare(rep, l, "dA down", l.da_dn.host, s.E * r, I, 5e-3, few, [&](int at, int c) {
        const int e = at / r, n = at % r;
        return da_dn[(size_t)at * I + c] + sum_rows(e, [&](int row) {
                   double g, u;
                   gate_up_at(l, row, c, g, u);
                   return l.weight.host[row] * reference_q(l, row, n, true) * reference_glu(s, g, u).act;
               });
    });
    for (int round = 0; round < 3; round++) {
        MUST(cudaMemcpy(l.da_gu.device, da_gu.data(), da_gu.size() * 4, cudaMemcpyHostToDevice));
        MUST(cudaMemcpy(l.db_gu.device, db_gu.data(), db_gu.size() * 4, cudaMemcpyHostToDevice));
        MUST(cudaMemcpy(l.da_dn.device, da_dn.data(), da_dn.size() * 4, cudaMemcpyHostToDevice));
        MUST(cudaMemcpy(l.db_dn.device, db_dn.data(), db_dn.size() * 4, cudaMemcpyHostToDevice));
        run_all(l);
        MUST(cudaStreamSynchronize(l.cuda.stream));
        same_bits(rep, "gu", l.gu, l.gu.host), same_bits(rep, "act", l.act, l.act.host), same_bits(rep, "y", l.y, l.y.host);
        same_bits(rep, "d_gu", l.d_gu, l.d_gu.host), same_bits(rep, "d_rows", l.d_rows, l.d_rows.host),
            same_bits(rep, "d_row_weight", l.d_weight, l.d_weight.host);
        same_bits(rep, "dA gate_up", l.da_gu, l.da_gu.host), same_bits(rep, "dB gate_up", l.db_gu, l.db_gu.host);
        same_bits(rep, "dA down", l.da_dn, l.da_dn.host), same_bits(rep, "dB down", l.db_dn, l.db_dn.host);
    }
    return rep.failures;
}

/* Rows of an identity make the products the decoded weights themselves: every bit must be that of bf16(value * scale). */
static int check_exact(esp_qformat format, bool nested) {
    const shape s = {"exact", 1, 1, 256, 128, 256, 0, format, true, nested, false, false, false, BALANCED};
    layer l = {};
    make_layer(l, s);
    std::vector<bf16> identity(256 * 256);
    for (int i = 0; i < 256; i++) identity[i * 257] = __float2bfloat16(1);
    MUST(cudaMemcpy(l.x.device, identity.data(), identity.size() * 2, cudaMemcpyHostToDevice));
    OP(espi_gate_up_fwd_cuda(&l.exec, &l.gate_up_fwd));
    MUST(cudaMemcpyAsync(l.d_gu.device, identity.data(), identity.size() * 2, cudaMemcpyHostToDevice, l.cuda.stream));
    OP(espi_gate_up_bwd_cuda(&l.exec, &l.gate_up_bwd));
    MUST(cudaStreamSynchronize(l.cuda.stream));
    l.gu.get(), l.d_rows.get();
    int wrong = 0;
    for (int o = 0; o < 256; o++)
        for (int c = 0; c < 256; c++) {
            const float want = (float)weight_of(l.gate_up, 0, o, c), forward = value(l.gu.host[c * 256 + o]),
                        back = value(l.d_rows.host[o * 256 + c]);
            if (!(want == forward && want == back) && wrong++ < 4)
                printf("  weight [%d,%d]: forward %.9g back %.9g want %.9g\n", o, c, forward, back, want);
        }
    printf("%s exact decode of format %d nested %d: %d wrong of 65536\n", wrong ? "FAILED" : "passed", format, nested, wrong);
    free_layer(l);
    return wrong;
}

/* T of the boundary cases: the sum of their counts. */
#define BOUNDARY_ROWS 2142
#define FEW_ROWS_ROWS 410
#define FEW_AND_MANY_ROWS 789
static const shape cases[] = {
    /* any shape: the plain path */
    {"plain-nf4", 6, 2, 40, 24, 33, 3, ESP_NF4, false, false, false, false, false, SKEWED},
    {"plain-nf4-nested", 6, 2, 72, 40, 50, 4, ESP_NF4, false, true, true, true, true, SKEWED},
    {"plain-mxfp4", 5, 2, 96, 32, 41, 5, ESP_MXFP4, false, false, true, true, true, FEW_EXPERTS},
    {"plain-fp4", 4, 1, 64, 64, 37, 0, ESP_FP4, false, false, false, false, false, ALL_ON_ONE},
    {"plain-bf16", 4, 2, 50, 30, 20, 8, ESP_Q_NONE, false, false, false, false, true, SKEWED},
    /* packed, in whole tiles */
    {"nf4-r0", 4, 1, 128, 64, 70, 0, ESP_NF4, true, false, false, false, false, SKEWED},
    {"nf4-one-tile", 1, 1, 128, 64, 16, 0, ESP_NF4, true, false, false, false, false, BALANCED},
    {"mxfp4-one-tile", 1, 1, 128, 64, 16, 0, ESP_MXFP4, true, false, false, false, false, BALANCED},
    {"bf16-one-tile", 1, 1, 128, 64, 16, 0, ESP_Q_NONE, true, false, false, false, false, BALANCED},
    {"nf4-wide-one-tile", 1, 1, 128, 64, 256, 0, ESP_NF4, true, false, false, false, false, BALANCED},
    {"nf4-r16", 4, 2, 192, 128, 150, 16, ESP_NF4, true, false, false, false, false, SKEWED},
    {"nf4-nested-r8", 6, 2, 256, 192, 90, 8, ESP_NF4, true, true, false, false, true, FEW_EXPERTS},
    {"fp4-r64", 4, 2, 192, 64, 200, 64, ESP_FP4, true, false, false, false, false, SKEWED},
    {"mxfp4-r16-clamped", 4, 2, 192, 192, 200, 16, ESP_MXFP4, true, false, true, true, true, SKEWED},
    {"mxfp4-r32", 5, 3, 320, 128, 333, 32, ESP_MXFP4, true, false, false, false, true, SKEWED},
    {"bf16-r16", 4, 2, 192, 128, 150, 16, ESP_Q_NONE, true, false, true, true, true, SKEWED},
    {"nf4-all-on-one", 5, 1, 128, 128, 1100, 16, ESP_NF4, true, false, false, false, false, ALL_ON_ONE},
    {"nf4-few-rows", 12, 2, 192, 128, 40, 16, ESP_NF4, true, false, false, false, false, SKEWED},
    {"mxfp4-few-rows", 12, 2, 192, 192, 40, 16, ESP_MXFP4, true, false, true, true, true, SKEWED},
    {"nf4-boundaries", 18, 1, 192, 128, BOUNDARY_ROWS, 16, ESP_NF4, true, false, false, false, false, BOUNDARIES},
    {"mxfp4-boundaries", 18, 1, 192, 192, BOUNDARY_ROWS, 16, ESP_MXFP4, true, false, true, true, true, BOUNDARIES},
    {"bf16-boundaries", 18, 1, 192, 128, BOUNDARY_ROWS, 0, ESP_Q_NONE, true, false, false, false, false, BOUNDARIES},
    {"nf4-few-boundaries", 18, 1, 192, 128, FEW_ROWS_ROWS, 16, ESP_NF4, true, true, false, false, true, FEW_ROWS},
    {"fp4-few-boundaries", 18, 1, 320, 64, FEW_ROWS_ROWS, 0, ESP_FP4, true, false, false, false, false, FEW_ROWS},
    {"mxfp4-few-boundaries", 18, 1, 192, 192, FEW_ROWS_ROWS, 24, ESP_MXFP4, true, false, true, true, true, FEW_ROWS},
    {"nf4-few-and-many", 18, 1, 192, 128, FEW_AND_MANY_ROWS, 16, ESP_NF4, true, false, false, false, false, FEW_AND_MANY},
    {"mxfp4-few-and-many", 18, 1, 320, 192, FEW_AND_MANY_ROWS, 8, ESP_MXFP4, true, false, true, true, true, FEW_AND_MANY},
    {"nf4-one-token", 8, 2, 128, 64, 1, 16, ESP_NF4, true, false, false, false, false, SKEWED},
    /* long contraction, as real layers have it */
    {"nf4-deep", 3, 2, 2048, 768, 300, 16, ESP_NF4, true, false, false, false, false, SKEWED},
    {"mxfp4-deep", 3, 2, 2880, 2880, 300, 16, ESP_MXFP4, true, false, true, true, true, SKEWED},
};

/* ---- times ---- */
struct blas {
    cublasHandle_t handle = NULL;
    cublasStatus_t (*gemm)(cublasHandle_t, cublasOperation_t, cublasOperation_t, int, int, int, const void *, const void *, cudaDataType,
                           int, const void *, cudaDataType, int, const void *, void *, cudaDataType, int, cublasComputeType_t,
                           cublasGemmAlgo_t);
};

static blas open_blas(cudaStream_t stream) {
    blas b;
    void *library = dlopen("libcublas.so.13", RTLD_NOW);
    if (!library) library = dlopen("libcublas.so", RTLD_NOW);
    if (!library) {
        printf("no cuBLAS: %s\n", dlerror());
        return b;
    }
    auto create = (cublasStatus_t(*)(cublasHandle_t *))dlsym(library, "cublasCreate_v2");
    auto set = (cublasStatus_t(*)(cublasHandle_t, cudaStream_t))dlsym(library, "cublasSetStream_v2");
    b.gemm = (decltype(b.gemm))dlsym(library, "cublasGemmEx");
    if (create(&b.handle) != CUBLAS_STATUS_SUCCESS || set(b.handle, stream) != CUBLAS_STATUS_SUCCESS) b.handle = NULL;
    return b;
}

/* Mean ms of a call: `warm` seconds first, then as many windows as fit into `seconds`. */
static double time_call(cudaStream_t stream, double warm, double seconds, const std::function<void()> &call) {
    cudaEvent_t begin, end;
    MUST(cudaEventCreate(&begin));
    MUST(cudaEventCreate(&end));
    auto window = [&](int n) {
        MUST(cudaEventRecord(begin, stream));
        for (int i = 0; i < n; i++) call();
        MUST(cudaEventRecord(end, stream));
        MUST(cudaEventSynchronize(end));
        float ms;
        MUST(cudaEventElapsedTime(&ms, begin, end));
        return (double)ms;
    };
    window(1);
    const double once = std::max(window(2) / 2, 1e-3);
    const int n = std::max(1, (int)(20 / once));
    for (double spent = 0; spent < warm * 1e3;) spent += window(n);
    double spent = 0;
    int calls = 0;
    while (spent < seconds * 1e3) spent += window(n), calls += n;
    MUST(cudaEventDestroy(begin));
    MUST(cudaEventDestroy(end));
    return spent / calls;
}

static cudaGraphExec_t record(const layer &l, const std::function<void()> &call) {
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    call();
    MUST(cudaStreamSynchronize(l.cuda.stream));
    MUST(cudaStreamBeginCapture(l.cuda.stream, cudaStreamCaptureModeThreadLocal));
    call();
    MUST(cudaStreamEndCapture(l.cuda.stream, &graph));
    MUST(cudaGraphInstantiate(&replay, graph, 0));
    MUST(cudaGraphDestroy(graph));
    return replay;
}

/* The call recorded once and replayed: device time alone. */
static double time_graph(layer &l, double warm, double seconds, const std::function<void()> &call) {
    const cudaGraphExec_t replay = record(l, call);
    const double ms = time_call(l.cuda.stream, warm, seconds, [&] { MUST(cudaGraphLaunch(replay, l.cuda.stream)); });
    MUST(cudaGraphExecDestroy(replay));
    return ms;
}

/* Variation of the rows per expert. */
static double routing_cv(const layer &l) {
    double sum2 = 0;
    for (int e = 0; e < l.s.E; e++) {
        const double rows = l.offsets.host[e + 1] - l.offsets.host[e];
        sum2 += rows * rows;
    }
    const double mean = (double)l.S / l.s.E;
    return sqrt(std::max(0.0, sum2 / l.s.E - mean * mean)) / mean;
}

static const char *name_of(esp_qformat format) {
    return format == ESP_NF4 ? "nf4" : format == ESP_MXFP4 ? "mxfp4" : "bf16";
}

template <typename T> static size_t bytes_of(const both<T> &b) {
    return b.n * sizeof(T);
}

/* One JSON line a size: the four ops; forward and forward + backward, from the gather to the sum over a token's rows, with and without LoRA;
 * both with LoRA again with balanced and with very skewed routing; and cuBLAS in bf16 at the same products.  And the memory that all of it lies in:
 * what a layer keeps for its backward, the router's probabilities apart; the kernels' work memory; and the rows between the ops of a forward
 * and of a backward, which layers share. */
static void time_shape(shape s, double warm, double seconds, bool checked) {
    layer l = {};
    make_layer(l, s);
    if (checked) {
        const int failures = check(l, 2048);
        printf("sampled check at this size: %s\n", failures ? "FAILED" : "passed");
    }
    auto time = [&](const std::function<void()> &call) { return time_graph(l, warm, seconds, call); };
    auto forward = [&] { run_forward(l); };
    auto step = [&] { run_step(l); };
    const double gu = time([&] { OP(espi_gate_up_fwd_cuda(&l.exec, &l.gate_up_fwd)); });
    const double dn = time([&] { OP(espi_down_fwd_cuda(&l.exec, &l.down_fwd)); });
    const double dnb = time([&] { OP(espi_down_bwd_cuda(&l.exec, &l.down_bwd)); });
    const double gub = time([&] { OP(espi_gate_up_bwd_cuda(&l.exec, &l.gate_up_bwd)); });
    const double fwd = time(forward), all = time(step), cv = routing_cv(l);
    auto set_rank = [&](int r) {
        for (espi_lora *lora : {&l.gate_up_fwd.lora, &l.down_fwd.lora, &l.down_bwd.lora, &l.gate_up_bwd.lora}) lora->r = r;
    };
    set_rank(0);
    const double fwd0 = time(forward), all0 = time(step);
    set_rank(s.r);
    double balanced[2], skewed[2], skewed_cv = 0;
    for (routing_kind kind : {BALANCED, VERY_SKEWED}) {
        l.s.routing = kind;
        make_routing(l);
        double *to = kind == BALANCED ? balanced : skewed;
        to[0] = time(forward), to[1] = time(step);
        skewed_cv = routing_cv(l);
    }
    double dense[4] = {};
    const blas b = open_blas(l.cuda.stream);
    if (b.handle) {
        bf16 *w;
        MUST(cudaMalloc((void **)&w, (size_t)2 * s.I * s.H * 2));
        fill_bf16<<<1024, 256, 0, l.cuda.stream>>>(w, (size_t)2 * s.I * s.H, 7, 0.02f);
        const float one = 1, zero = 0;
        bf16 *rows = l.d_rows.device;
        auto gemm = [&](cublasOperation_t op, int m, int k, const bf16 *in,
                        bf16 *to) { /* to [S,m] = in [S,k] times a matrix */
                                    b.gemm(b.handle, op, CUBLAS_OP_N, m, l.S, k, &one, w, CUDA_R_16BF, op == CUBLAS_OP_T ? k : m, in,
                                           CUDA_R_16BF, k, &zero, to, CUDA_R_16BF, m, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
        };
        dense[0] = time_call(l.cuda.stream, warm, seconds, [&] { gemm(CUBLAS_OP_T, 2 * s.I, s.H, rows, l.d_gu.device); });
        dense[1] = time_call(l.cuda.stream, warm, seconds, [&] { gemm(CUBLAS_OP_T, s.H, s.I, l.act.device, l.y.device); });
        dense[2] = time_call(l.cuda.stream, warm, seconds, [&] { gemm(CUBLAS_OP_N, s.I, s.H, rows, l.act.device); });
        dense[3] = time_call(l.cuda.stream, warm, seconds, [&] { gemm(CUBLAS_OP_N, s.H, 2 * s.I, l.d_gu.device, rows); });
        MUST(cudaFree(w));
    }
    const size_t kept = bytes_of(l.x) + bytes_of(l.gu) + bytes_of(l.u_gu) + bytes_of(l.u_dn) + bytes_of(l.offsets) + bytes_of(l.row_token) +
                        bytes_of(l.slot_row) + bytes_of(l.weight);
    printf("{\"shape\": \"%s\", \"format\": \"%s\", \"tokens\": %d, \"rank\": %d, \"gate_up_ms\": %.3f, \"down_ms\": %.3f, "
           "\"down_bwd_ms\": %.3f, \"gate_up_bwd_ms\": %.3f, \"forward_ms\": %.3f, \"forward_backward_ms\": %.3f, "
           "\"forward_no_lora_ms\": %.3f, \"forward_backward_no_lora_ms\": %.3f, \"lora_overhead\": %.2f, \"routing_cv\": %.2f, "
           "\"balanced_ms\": [%.3f, %.3f], \"skewed_ms\": [%.3f, %.3f], \"skewed_cv\": %.2f, \"dense_ms\": [%.3f, %.3f, %.3f, %.3f], "
           "\"kept_mb\": %.1f, \"work_mb\": %.1f, \"rows_mb\": [%.1f, %.1f]}\n",
           s.name, name_of(s.format), s.T, s.r, gu, dn, dnb, gub, fwd, all, fwd0, all0, all / all0, cv, balanced[0], balanced[1], skewed[0],
           skewed[1], skewed_cv, dense[0], dense[1], dense[2], dense[3], 1e-6 * (double)kept, 1e-6 * (double)l.scratch_bytes,
           1e-6 * (double)(bytes_of(l.act) + bytes_of(l.y)), 1e-6 * (double)(bytes_of(l.d_gu) + bytes_of(l.d_rows)));
    fflush(stdout);
    free_layer(l);
}

/* A step with LoRA, forward and backward, replayed from a graph: its time, and what of it some kernel was running, by the times that CUPTI
 * records of each, as the same replays come one after the other. */
static void time_busy(const shape &s, double seconds) {
    layer l = {};
    make_layer(l, s);
    const double ms = time_graph(l, seconds, seconds, [&] { run_step(l); });
    if (busy_begin()) {
        const int n = (int)(100 / ms) + 2;
        const cudaGraphExec_t replay = record(l, [&] { run_step(l); });
        auto replays = [&] {
            for (int i = 0; i < n; i++) MUST(cudaGraphLaunch(replay, l.cuda.stream));
            MUST(cudaStreamSynchronize(l.cuda.stream));
        };
        replays();
        busy_restart();
        replays();
        const busy_time b = busy_end();
        MUST(cudaGraphExecDestroy(replay));
        printf("{\"shape\": \"%s\", \"format\": \"%s\", \"tokens\": %d, \"rank\": %d, \"kernels\": %.1f, \"step_ms\": %.4f, "
               "\"traced_step_ms\": %.4f, \"kernels_ms\": %.4f, \"gaps_ms\": %.4f, \"busy\": %.4f}\n",
               s.name, name_of(s.format), s.T, s.r, (double)b.kernels / n, ms, 1e3 * b.span / n, 1e3 * b.running / n, 1e3 * b.gaps / n,
               b.running / b.span);
    }
    free_layer(l);
}

static shape shape_of(const char *model, const char *experts, int tokens, int r) {
    const esp_qformat format = strcmp(experts, "nf4") == 0 ? ESP_NF4 : strcmp(experts, "mxfp4") == 0 ? ESP_MXFP4 : ESP_Q_NONE;
    if (strcmp(model, "gpt-oss-20b") != 0)
        return {"qwen3-30b-a3b", 128, 8, 2048, 768, tokens, r, format, true, false, false, false, false, SKEWED};
    return {"gpt-oss-20b", 32, 4, 2880, 2880, tokens, r, format, true, false, true, true, true, SKEWED};
}

int main(int argc, char **argv) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    const std::string mode = argc > 1 ? argv[1] : "check";
    if (mode == "list") {
        for (const shape &s : cases) printf("%s\n", s.name);
        return 0;
    }
    if (mode == "exact") {
        int wrong = 0;
        for (esp_qformat f : {ESP_NF4, ESP_FP4, ESP_MXFP4, ESP_Q_NONE}) wrong += check_exact(f, false);
        return wrong + check_exact(ESP_NF4, true) != 0;
    }
    if (mode == "check") {
        int failed = 0;
        for (const shape &s : cases) {
            if (argc > 2 && strcmp(argv[2], s.name) != 0) continue;
            seed(1234);
            layer l = {};
            printf("%s\n", s.name);
            make_layer(l, s);
            const int failures = check(l, (int64_t)s.H * s.I > 1 << 20 ? 1500 : 40000);
            printf("%s %s\n", failures ? "FAILED" : "passed", s.name);
            failed += failures != 0;
            free_layer(l);
        }
        return failed != 0;
    }
    if (mode == "once" && argc > 4) { /* for a profiler: every op twice */
        seed(99);
        layer l = {};
        make_layer(l, shape_of(argv[2], argv[3], atoi(argv[4]), 16));
        run_all(l), run_all(l);
        MUST(cudaStreamSynchronize(l.cuda.stream));
        free_layer(l);
        return 0;
    }
    if ((mode == "time" || mode == "busy") && argc > 4) {
        const double seconds = getenv("SECONDS_PER_ROW") ? atof(getenv("SECONDS_PER_ROW")) : 0.15;
        const int r = getenv("RANK") ? atoi(getenv("RANK")) : 16;
        for (int i = 4; i < argc; i++) {
            const shape s = shape_of(argv[2], argv[3], atoi(argv[i]), r);
            seed(99);
            if (mode == "busy")
                time_busy(s, seconds);
            else
                time_shape(s, seconds, seconds, getenv("CHECKED") != NULL);
        }
        return 0;
    }
    printf(
        "gpu_experts check [NAME] | list | exact | time SHAPE FORMAT TOKENS... | busy SHAPE FORMAT TOKENS... | once SHAPE FORMAT TOKENS\n");
    return 2;
}
