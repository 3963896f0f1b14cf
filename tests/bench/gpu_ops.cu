/* Times of the GPU's ops outside the experts, in the shapes of the models they are for, beside what the card could do: a program of its own.
 *   gpu_ops [TFLOP/s [GB/s [FILTER]]]   what the card's dense products and copies reach (790, 4300), and a part of a name
 * Each op is recorded into a graph, as a step is, and launched until 0.2 s have passed.  One JSON line an op. */
#include "core/status.h"
#include "kernels/cuda/device.h"

#include <cuda_bf16.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern "C" const espi_backend espi_backend_cuda;

namespace {

typedef __nv_bfloat16 bf16;

enum { THREADS = 256 };
#define MOST_MEMORY ((size_t)24 << 30)
#define LEAST_SECONDS 0.2

#define MUST(call)                                                                                                                         \
    do {                                                                                                                                   \
        if ((call) != ESP_OK) {                                                                                                            \
            printf("FAILED %s: %s\n", #call, esp_last_error());                                                                            \
            exit(1);                                                                                                                       \
        }                                                                                                                                  \
    } while (0)
#define CUDA(call) MUST(espi_cuda_check((call), #call))

void *gpu;
char *memory;
size_t used;
double peak_flops = 790e12, peak_bytes = 4300e9;
const char *filter = "";

__global__ void fill(void *out, bool wide, int64_t n, uint32_t seed, float size) {
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < n; i += (int64_t)gridDim.x * THREADS) {
        uint32_t z = (uint32_t)i * 2654435761u + seed;
        z = (z ^ (z >> 16)) * 0x85ebca6bu;
        z = (z ^ (z >> 13)) * 0xc2b2ae35u;
        const float value = ((float)(z >> 8) * 0x1p-23f - 1) * size;
        if (wide)
            ((float *)out)[i] = value;
        else
            ((bf16 *)out)[i] = __float2bfloat16(value);
    }
}

void *take(size_t bytes) {
    void *p = memory + used;
    used += (bytes + 255) / 256 * 256;
    if (used > MOST_MEMORY) {
        puts("FAILED: more memory than this program takes");
        exit(1);
    }
    return p;
}

void *act(int64_t n, float size = 1) {
    void *p = take((size_t)n * 2);
    fill<<<2048, THREADS, 0, ((espi_cuda *)gpu)->stream>>>(p, false, n, (uint32_t)used, size);
    return p;
}

float *real(int64_t n, float size = 1) {
    void *p = take((size_t)n * 4);
    fill<<<2048, THREADS, 0, ((espi_cuda *)gpu)->stream>>>(p, true, n, (uint32_t)used, size);
    return (float *)p;
}

template <typename T> T *put(const T *host, int64_t n) {
    void *p = take((size_t)n * sizeof(T));
    MUST(espi_backend_cuda.device->put(gpu, p, host, (size_t)n * sizeof(T)));
    return (T *)p;
}

/* Integers made by f(i). */
template <typename F> int32_t *ints(int64_t n, F f) {
    int32_t *host = (int32_t *)malloc((size_t)n * sizeof *host);
    for (int64_t i = 0; i < n; i++) host[i] = f(i);
    int32_t *p = put(host, n);
    free(host);
    return p;
}

/* flops, bytes: of the op as it is defined, not of how it is done. */
template <typename S, typename A> void measure(const char *name, const S &slot, const A &args, double flops, double bytes) {
    if (!strstr(name, filter)) return;
    espi_exec exec = {};
    exec.device = gpu;
    exec.threads = 1;
    const size_t room = slot.scratch ? slot.scratch(&exec, &args) : 0, before = used;
    exec.scratch = take(room);
    const cudaStream_t stream = ((espi_cuda *)gpu)->stream;
    const espi_device *device = espi_backend_cuda.device;
    void *graph;
    MUST(slot.run(&exec, &args));
    MUST(device->wait(gpu));
    MUST(device->record_begin(gpu));
    MUST(slot.run(&exec, &args));
    MUST(device->record_end(gpu, &graph));
    cudaEvent_t start, stop;
    CUDA(cudaEventCreate(&start));
    CUDA(cudaEventCreate(&stop));
    float ms = 0;
    int times = 1;
    for (;; times *= 4) { /* the last, longest round counts */
        CUDA(cudaEventRecord(start, stream));
        for (int i = 0; i < times; i++) MUST(device->launch(gpu, graph));
        CUDA(cudaEventRecord(stop, stream));
        CUDA(cudaEventSynchronize(stop));
        CUDA(cudaEventElapsedTime(&ms, start, stop));
        if (ms > LEAST_SECONDS * 1000) break;
    }
    MUST(device->wait(gpu));
    device->graph_free(gpu, graph);
    ms /= (float)times;
    const double by_flops = flops / peak_flops * 1e3, by_bytes = bytes / peak_bytes * 1e3, roof = by_flops > by_bytes ? by_flops : by_bytes;
    printf("{\"op\": \"%s\", \"ms\": %.4f, \"tflops\": %.1f, \"gbs\": %.0f, \"of_roof\": %.3f, \"scratch_mb\": %.1f}\n", name, ms,
           flops / ms * 1e-9, bytes / ms * 1e-6, roof / ms, (double)room / 1e6);
    fflush(stdout);
    used = before;
}

struct heads {
    const char *name;
    int64_t seqs, tokens, heads, kv_heads, dim, window;
    bool sinks;
};

void bench_attention(const heads &h) {
    const size_t before = used;
    const int64_t t = h.seqs * h.tokens;
    espi_spans spans = {};
    spans.cu_q = ints(h.seqs + 1, [&](int64_t s) { return (int32_t)(s * h.tokens); });
    spans.k_start = spans.cu_q;
    spans.k_len = ints(h.seqs, [&](int64_t) { return (int32_t)h.tokens; });
    spans.n_seqs = (int32_t)h.seqs;
    spans.tokens = t;
    espi_attention_fwd f = {};
    f.q = act(t * h.heads * h.dim);
    f.k = act(t * h.kv_heads * h.dim);
    f.v = act(t * h.kv_heads * h.dim);
    f.out = act(t * h.heads * h.dim);
    f.lse = real(t * h.heads);
    f.sinks = h.sinks ? real(h.heads) : NULL;
    f.window = h.window;
    f.spans = spans;
    f.heads = h.heads;
    f.kv_heads = h.kv_heads;
    f.head_dim = h.dim;
    f.scale = 1 / 11.0;
    double pairs = 0; /* of a query and a key that it sees, in one head of one sequence */
    for (int64_t i = 0; i < h.tokens; i++) pairs += (double)(h.window && i + 1 > h.window ? h.window : i + 1);
    const double flops = 4 * pairs * (double)(h.dim * h.heads * h.seqs), bytes = 2.0 * (double)(t * h.dim * (2 * h.heads + 2 * h.kv_heads));
    char name[96];
    snprintf(name, sizeof name, "attention_fwd %s", h.name);
    measure(name, espi_backend_cuda.attention_fwd, f, flops, bytes);
    espi_attention_bwd b = {};
    b.d_q = act(t * h.heads * h.dim);
    b.d_k = act(t * h.kv_heads * h.dim);
    b.d_v = act(t * h.kv_heads * h.dim);
    b.d_out = act(t * h.heads * h.dim);
    b.q = f.q;
    b.k = f.k;
    b.v = f.v;
    b.out = f.out;
    b.lse = f.lse;
    b.sinks = f.sinks;
    b.window = f.window;
    b.spans = spans;
    b.heads = f.heads;
    b.kv_heads = f.kv_heads;
    b.head_dim = f.head_dim;
    b.scale = f.scale;
    snprintf(name, sizeof name, "attention_bwd %s", h.name);
    measure(name, espi_backend_cuda.attention_bwd, b, 2.5 * flops, 2 * bytes);
    used = before;
}

void bench_decode(const char *name, int64_t seqs, int64_t keys, int64_t n_heads, int64_t kv_heads, int64_t dim) {
    const size_t before = used;
    espi_attention_fwd f = {};
    f.spans.cu_q = ints(seqs + 1, [](int64_t s) { return (int32_t)s; });
    f.spans.k_start = ints(seqs, [&](int64_t s) { return (int32_t)(s * keys); });
    f.spans.k_len = ints(seqs, [&](int64_t) { return (int32_t)keys; });
    f.spans.n_seqs = (int32_t)seqs;
    f.spans.tokens = seqs;
    f.q = act(seqs * n_heads * dim);
    f.k = act(seqs * keys * kv_heads * dim);
    f.v = act(seqs * keys * kv_heads * dim);
    f.out = act(seqs * n_heads * dim);
    f.lse = real(seqs * n_heads);
    f.heads = n_heads;
    f.kv_heads = kv_heads;
    f.head_dim = dim;
    f.scale = 1 / 11.0;
    measure(name, espi_backend_cuda.attention_fwd, f, 4.0 * (double)(seqs * keys * n_heads * dim),
            4.0 * (double)(seqs * keys * kv_heads * dim));
    used = before;
}

espi_lora lora_of(int64_t in, int64_t out, int64_t r) {
    espi_lora l = {};
    l.r = r;
    l.scale = 2;
    if (r == 0) return l;
    l.a = real(r * in, 0.05f);
    l.b = real(r * out, 0.05f);
    l.d_a = real(r * in);
    l.d_b = real(r * out);
    return l;
}

void bench_linear(const char *what, int64_t t, int64_t in, int64_t out, int64_t r) {
    const size_t before = used;
    char name[96];
    espi_linear_fwd f = {};
    f.y = act(t * out);
    f.u = act(t * r + 8);
    f.x = act(t * in);
    f.w = {act(out * in, 0.05f), ESP_BF16, out, in};
    f.lora = lora_of(in, out, r);
    f.tokens = t;
    const double flops = 2.0 * (double)t * (double)(in * out + r * (in + out)), bytes = 2.0 * (double)(t * (in + out) + in * out);
    snprintf(name, sizeof name, "linear_fwd %s", what);
    measure(name, espi_backend_cuda.linear_fwd, f, flops, bytes);
    espi_linear_bwd b = {};
    b.d_x = act(t * in);
    b.d_y = f.y;
    b.x = f.x;
    b.u = f.u;
    b.w = f.w;
    b.lora = f.lora;
    b.tokens = t;
    snprintf(name, sizeof name, "linear_bwd %s", what);
    measure(name, espi_backend_cuda.linear_bwd, b, 2.0 * (double)t * (double)(in * out + 2 * r * (in + out)), bytes);
    used = before;
}

esp_status as_cross_entropy(void *user, int64_t first, int64_t count) {
    const espi_head_host *host = (const espi_head_host *)user;
    for (int64_t i = first; i < first + count; i++) {
        ((float *)host->g)[i] = -1;
        ((float *)host->e)[i] = 0;
    }
    return ESP_OK;
}

void bench_head(int64_t n, int64_t vocab, int64_t hidden) {
    const size_t before = used;
    espi_head head = {};
    head.hidden = act(n * hidden);
    head.rows = ints(n, [](int64_t i) { return (int32_t)i; });
    head.target = ints(n, [&](int64_t i) { return (int32_t)(i * 977 % vocab); });
    head.w = {act(vocab * hidden, 0.05f), ESP_BF16, vocab, hidden};
    head.n = n;
    head.temperature = head.logit_scale = 1;
    const double product = 2.0 * (double)n * (double)vocab * (double)hidden, bytes = 2.0 * (double)vocab * (double)hidden;
    char name[96];
    espi_head_stats s = {};
    s.head = head;
    s.lp = real(n);
    s.entropy = real(n);
    s.lse = real(n);
    snprintf(name, sizeof name, "head_stats %lld", (long long)n);
    measure(name, espi_backend_cuda.head_stats, s, product, bytes);
    espi_head_fused f = {};
    static espi_head_host host;
    void *pinned;
    MUST(espi_backend_cuda.device->alloc_host(gpu, (size_t)n * 16, &pinned));
    host = {pinned, (float *)pinned + n, (float *)pinned + 2 * n, (float *)pinned + 3 * n};
    f.head = head;
    f.lp = s.lp;
    f.entropy = s.entropy;
    f.lse = s.lse;
    f.g = real(n);
    f.e = real(n);
    f.d_hidden = act(n * hidden);
    f.coef = as_cross_entropy;
    f.coef_user = &host;
    f.host = host;
    snprintf(name, sizeof name, "head_fused %lld", (long long)n);
    measure(name, espi_backend_cuda.head_fused, f, 2 * product, 2 * bytes);
    f.e_is_zero = true;
    snprintf(name, sizeof name, "head_fused, no entropies %lld", (long long)n);
    measure(name, espi_backend_cuda.head_fused, f, 2 * product, 2 * bytes);
    f.coef = nullptr;
    snprintf(name, sizeof name, "head_fused, coefficients given %lld", (long long)n);
    measure(name, espi_backend_cuda.head_fused, f, 2 * product, 2 * bytes);
    espi_head_sample d = {};
    double *uniform = (double *)malloc((size_t)n * sizeof *uniform);
    for (int64_t i = 0; i < n; i++) uniform[i] = (double)(i * 619 % 1009) / 1009;
    d.head = head;
    d.token = (int32_t *)real(n);
    d.lp = s.lp;
    d.uniform = put(uniform, n);
    free(uniform);
    snprintf(name, sizeof name, "head_sample %lld", (long long)n);
    if (n <= 1024) measure(name, espi_backend_cuda.head_sample, d, product, bytes);
    d.filter.top_p = 0.95;
    d.filter.top_k = 50;
    d.kept_most = 50;
    d.kept = (int32_t *)real(n * 50);
    d.kept_count = (int32_t *)real(n);
    snprintf(name, sizeof name, "head_sample filtered %lld", (long long)n);
    if (n <= 1024) measure(name, espi_backend_cuda.head_sample, d, product, bytes);
    espi_backend_cuda.device->free_host(gpu, pinned);
    used = before;
}

void bench_norm(const char *what, int64_t rows, int64_t n) {
    const size_t before = used;
    char name[96];
    espi_rmsnorm_fwd f = {};
    f.y = act(rows * n);
    f.rstd = real(rows);
    f.x = act(rows * n);
    f.w = real(n);
    f.rows = rows;
    f.n = n;
    f.eps = 1e-6;
    snprintf(name, sizeof name, "rmsnorm_fwd %s", what);
    measure(name, espi_backend_cuda.rmsnorm_fwd, f, 0, 4.0 * (double)(rows * n));
    espi_rmsnorm_bwd b = {};
    b.d_x = act(rows * n);
    b.d_y = act(rows * n);
    b.d_add = act(rows * n);
    b.x = f.x;
    b.rstd = f.rstd;
    b.w = f.w;
    b.rows = rows;
    b.n = n;
    snprintf(name, sizeof name, "rmsnorm_bwd %s", what);
    measure(name, espi_backend_cuda.rmsnorm_bwd, b, 0, 8.0 * (double)(rows * n));
    b.d_w = real(n);
    snprintf(name, sizeof name, "rmsnorm_bwd with weight %s", what);
    measure(name, espi_backend_cuda.rmsnorm_bwd, b, 0, 8.0 * (double)(rows * n));
    used = before;
}

void bench_routing(int64_t t, int64_t hidden, int64_t experts, int64_t top_k) {
    const size_t before = used;
    char name[96];
    const int64_t slots = t * top_k;
    espi_router_fwd f = {};
    f.logits = real(t * experts);
    f.lse = real(t);
    f.idx = (int32_t *)real(slots);
    f.weight = real(slots);
    f.x = act(t * hidden);
    f.w = {real(experts * hidden, 0.05f), ESP_F32, experts, hidden};
    f.counts = (int64_t *)take((size_t)experts * 8);
    f.p_sum = (double *)take((size_t)experts * 8);
    f.z_sum = (double *)take(8);
    f.tokens = t;
    f.top_k = top_k;
    f.rule.renormalise = true;
    snprintf(name, sizeof name, "router_fwd %lld", (long long)t);
    measure(name, espi_backend_cuda.router_fwd, f, 2.0 * (double)t * (double)(hidden * experts), 2.0 * (double)(t * hidden));
    espi_dispatch d = {};
    d.offsets = (int32_t *)real(experts + 1);
    d.row_token = (int32_t *)real(slots);
    d.slot_row = (int32_t *)real(slots);
    d.row_weight = real(slots);
    d.idx = f.idx;
    d.weight = f.weight;
    d.tokens = t;
    d.experts = experts;
    d.top_k = top_k;
    snprintf(name, sizeof name, "dispatch %lld", (long long)t);
    measure(name, espi_backend_cuda.dispatch, d, 0, 20.0 * (double)slots);
    espi_routing routing = {t, experts, top_k, d.offsets, d.row_token, d.slot_row, d.row_weight};
    espi_combine_fwd c = {};
    c.out = act(t * hidden);
    c.y = act(slots * hidden);
    c.add = act(t * hidden);
    c.routing = routing;
    c.hidden = hidden;
    snprintf(name, sizeof name, "combine_fwd %lld", (long long)t);
    measure(name, espi_backend_cuda.combine_fwd, c, 0, 2.0 * (double)((slots + 2 * t) * hidden));
    espi_combine_bwd cb = {};
    cb.d_x = c.out;
    cb.d_weight = real(slots);
    cb.d_rows = c.y;
    cb.d_row_weight = real(slots);
    cb.routing = routing;
    cb.hidden = hidden;
    snprintf(name, sizeof name, "combine_bwd %lld", (long long)t);
    measure(name, espi_backend_cuda.combine_bwd, cb, 0, 2.0 * (double)((slots + t) * hidden));
    espi_router_bwd b = {};
    b.d_x = c.out;
    b.d_logits = real(t * experts);
    b.d_weight = cb.d_weight;
    b.logits = f.logits;
    b.lse = f.lse;
    b.weight = f.weight;
    b.x = f.x;
    b.idx = f.idx;
    b.w = f.w;
    b.tokens = t;
    b.top_k = top_k;
    b.rule = f.rule;
    snprintf(name, sizeof name, "router_bwd %lld", (long long)t);
    measure(name, espi_backend_cuda.router_bwd, b, 2.0 * (double)t * (double)(hidden * experts), 4.0 * (double)(t * hidden));
    used = before;
}

void bench_rows(int64_t t) {
    const size_t before = used;
    espi_add add = {};
    add.out = act(t * 2048);
    add.a = act(t * 2048);
    add.b = act(t * 2048);
    add.n = t * 2048;
    measure("add", espi_backend_cuda.add, add, 0, 6.0 * (double)add.n);
    espi_rope rope = {};
    rope.x = act(t * 32 * 128);
    rope.cos = real(t * 64);
    rope.sin = real(t * 64);
    rope.tokens = t;
    rope.heads = 32;
    rope.half = 64;
    rope.head_dim = 128;
    measure("rope_fwd 32 heads", espi_backend_cuda.rope_fwd, rope, 0, 4.0 * (double)(t * 32 * 128));
    espi_embed_fwd embed = {};
    embed.out = act(t * 2048);
    embed.table = {act((int64_t)151936 * 2048), ESP_BF16, 151936, 2048};
    embed.ids = ints(t, [](int64_t i) { return (int32_t)(i * 7919 % 151936); });
    embed.tokens = t;
    measure("embed_fwd", espi_backend_cuda.embed_fwd, embed, 0, 4.0 * (double)(t * 2048));
    used = before;
}

void bench_optimiser(int64_t n) {
    const size_t before = used;
    const auto settings = [n](auto &a) {
        a.n = n;
        a.step = 3;
        a.lr = 1e-4;
        a.beta1 = 0.9;
        a.beta2 = 0.999;
        a.eps = 1e-8;
        a.grad_scale = 1;
    };
    espi_adamw a = {};
    settings(a);
    a.p = real(n);
    a.m = real(n);
    a.v = real(n);
    a.g = real(n);
    measure("adamw", espi_backend_cuda.adamw, a, 0, 28.0 * (double)n);
    espi_sumsq s = {};
    s.out = (double *)take(8);
    s.x = a.g;
    s.n = n;
    s.parts = 1;
    measure("sumsq", espi_backend_cuda.sumsq, s, 0, 4.0 * (double)n);
    espi_adamw8 q = {};
    settings(q);
    q.p = a.p;
    q.g = a.g;
    q.state1 = (uint8_t *)take((size_t)n);
    q.state2 = (uint8_t *)take((size_t)n);
    q.absmax1 = real(n / 256 + 1);
    q.absmax2 = real(n / 256 + 1);
    float map[256];
    for (int i = 0; i < 256; i++) map[i] = (float)(i - 127) / 128;
    q.map1 = put(map, 256);
    q.map2 = q.map1;
    measure("adamw8", espi_backend_cuda.adamw8, q, 0, 16.0 * (double)n);
    /* Moments in the host's memory: bytes over the bus, one way. */
    void *moments;
    a.n = n / 4;
    MUST(espi_backend_cuda.device->alloc_host(gpu, (size_t)a.n * 8, &moments));
    memset(moments, 0, (size_t)a.n * 8);
    a.m = moments;
    a.v = (float *)moments + a.n;
    a.host_moments = true;
    measure("adamw, moments in host memory", espi_backend_cuda.adamw, a, 0, 8.0 * (double)a.n);
    espi_backend_cuda.device->free_host(gpu, moments);
    used = before;
}

} // namespace

int main(int argc, char **argv) {
    if (!espi_backend_cuda.available()) {
        puts("no GPU");
        return 77;
    }
    if (argc > 1) peak_flops = atof(argv[1]) * 1e12;
    if (argc > 2) peak_bytes = atof(argv[2]) * 1e9;
    if (argc > 3) filter = argv[3];
    void *at;
    MUST(espi_backend_cuda.device->start(&gpu, 0));
    MUST(espi_backend_cuda.device->alloc(gpu, MOST_MEMORY, &at));
    memory = (char *)at;
    bench_rows(4096);
    bench_norm("4096 x 2048", 4096, 2048);
    bench_norm("131072 x 128", 131072, 128);
    const int64_t tokens[] = {64, 512, 4096, 16384};
    for (int64_t t : tokens) bench_routing(t, 2048, 128, 8);
    bench_linear("qwen3 q 4096 r16", 4096, 2048, 4096, 16);
    bench_linear("qwen3 q 4096 no branch", 4096, 2048, 4096, 0);
    bench_linear("qwen3 k 4096 r16", 4096, 2048, 512, 16);
    bench_linear("qwen3 o 4096 r16", 4096, 4096, 2048, 16);
    bench_linear("qwen3 q 64 r16", 64, 2048, 4096, 16);
    bench_attention({"qwen3 2x2048", 2, 2048, 32, 4, 128, 0, false});
    bench_attention({"qwen3 8x2048", 8, 2048, 32, 4, 128, 0, false});
    bench_attention({"qwen3 1x16384", 1, 16384, 32, 4, 128, 0, false});
    bench_attention({"gpt-oss 2x2048", 2, 2048, 64, 8, 64, 0, true});
    bench_attention({"gpt-oss 2x2048 window 128", 2, 2048, 64, 8, 64, 128, true});
    bench_decode("decode qwen3 64 x 1024", 64, 1024, 32, 4, 128);
    bench_decode("decode qwen3 256 x 1024", 256, 1024, 32, 4, 128);
    bench_decode("decode qwen3 4 x 8192", 4, 8192, 32, 4, 128);
    bench_decode("decode gpt-oss 256 x 1024", 256, 1024, 64, 8, 64);
    bench_head(8192, 151936, 2048);
    bench_head(256, 151936, 2048);
    bench_optimiser((int64_t)1 << 28);
    espi_backend_cuda.device->stop(gpu);
    return 0;
}
