/* The GPU without a model: memory, copies of any size, order, recordings, faults, and quantising with the bits of the CPU's encoder.
 * A plain main, which runs where Criterion is not; exit status 77 where there is no GPU. */
#include "check.h"

#include "kernels/backend.h"
#include "quant/quant.h"

#include <stdlib.h>
#include <string.h>

static const espi_device *ops;
static void *device;

static uint32_t state = 1;
static uint32_t draw(void) {
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static void *host(size_t bytes) {
    unsigned char *p = malloc(bytes + 1);
    for (size_t i = 0; p && i < bytes; i++) p[i] = (unsigned char)draw();
    return p;
}

/* From a byte to more than the ring of pinned memory holds; the source is spoilt right after each put. */
static void copies(void) {
    static const size_t sizes[] = {1, 3, 255, 4096, (4u << 20) - 1, 4u << 20, (4u << 20) + 5, 40u << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const size_t n = sizes[i];
        void *there;
        OK(ops->alloc(device, n, &there));
        unsigned char *sent = host(n), *kept = malloc(n), *got = malloc(n);
        memcpy(kept, sent, n);
        OK(ops->put(device, there, sent, n));
        memset(sent, 0xa5, n);
        OK(ops->get(device, got, there, n));
        EXPECT(memcmp(got, kept, n) == 0, "%zu bytes come back changed", n);
        OK(ops->zero(device, there, n));
        OK(ops->get(device, got, there, n));
        bool zero = true;
        for (size_t j = 0; j < n; j++) zero &= got[j] == 0;
        EXPECT(zero, "%zu bytes are not zeroed", n);
        ops->free(device, there);
        free(sent);
        free(kept);
        free(got);
    }
    /* Many small ones, each to its own place: as a decode step makes them. */
    enum { MANY = 40000 };
    uint32_t *there, *got = malloc(MANY * sizeof *got);
    OK(ops->alloc(device, MANY * sizeof *there, (void **)&there));
    for (uint32_t i = 0; i < MANY; i++) OK(ops->put(device, there + i, &i, sizeof i));
    OK(ops->get(device, got, there, MANY * sizeof *got));
    bool same = true;
    for (uint32_t i = 0; i < MANY; i++) same &= got[i] == i;
    EXPECT(same, "%d small puts arrive out of order or not at all", MANY);
    ops->free(device, there);
    free(got);
}

static void recordings(void) {
    enum { N = 1 << 16 };
    unsigned char *there, got[2];
    void *graph;
    const unsigned char one = 1;
    OK(ops->alloc(device, N, (void **)&there));
    OK(ops->put(device, there, &one, 1));
    OK(ops->record_begin(device));
    OK(ops->zero(device, there, N));
    EXPECT(ops->put(device, there, &one, 1) == ESP_ERR_STATE, "a put is taken into a recording");
    EXPECT(ops->get(device, got, there, 1) == ESP_ERR_STATE, "a get is taken into a recording");
    EXPECT(ops->wait(device) == ESP_ERR_STATE, "a wait is taken into a recording");
    void *more;
    EXPECT(ops->alloc(device, 16, &more) == ESP_ERR_STATE, "memory is given out while recording");
    OK(ops->record_end(device, &graph));
    OK(ops->get(device, got, there, 1));
    EXPECT(got[0] == 1, "what is recorded is also run");
    for (int i = 0; i < 3; i++) {
        OK(ops->put(device, there, &one, 1));
        OK(ops->launch(device, graph));
        OK(ops->get(device, got, there, 1));
        EXPECT(got[0] == 0, "launch %d does not run what was recorded", i);
    }
    ops->graph_free(device, graph);
    EXPECT(ops->record_end(device, &graph) == ESP_ERR_STATE, "a recording ends that never began");
    ops->free(device, there);
}

static void too_much(void) {
    void *p;
    EXPECT(ops->alloc(device, (size_t)1 << 50, &p) == ESP_ERR_MEMORY, "a petabyte is given");
    OK(ops->wait(device));
}

/* Of a GPU that nobody else takes memory of just now. */
static void what_is_left(void) {
    const size_t taken = (size_t)1 << 30;
    uint64_t before, after, number, again;
    void *p;
    OK(ops->left(device, &before, &number));
    OK(ops->alloc(device, taken, &p));
    OK(ops->left(device, &after, &again));
    EXPECT(number == again, "the GPU has the number %llx, then %llx", (unsigned long long)number, (unsigned long long)again);
    EXPECT(after + taken <= before, "%llu bytes are left, and %llu when %zu are taken", (unsigned long long)before,
           (unsigned long long)after, taken);
    ops->free(device, p);
}

static float value(int kind, int64_t i) {
    const float v = (float)(int32_t)(draw() - (1u << 23)) * 0x1p-23f;
    if (kind == 1) return i % 7 == 0 ? 0.0f : v * 1e-3f;
    if (kind == 2) return i / 64 % 3 == 0 ? -0.0f : v * 1e30f; /* whole blocks of nothing */
    if (kind == 3) return v * 1e-39f;                          /* subnormal */
    return v;
}

static void *plain_values(esp_dtype dtype, int64_t n, int kind, esp_qformat format, bool on_thresholds) {
    void *x = malloc((size_t)n * esp_dtype_size(dtype));
    const espi_format *f = espi_format_find(format);
    for (int64_t i = 0; i < n; i++) {
        float v = value(kind, i);
        /* Values on and beside the thresholds, under a largest value of 1. */
        if (on_thresholds && f->flat) {
            const float t = f->thresholds[draw() % 15];
            v = i % 64 == 0 || !isfinite(t) ? 1.0f : t;
        }
        espi_plain_store(x, dtype, i, v);
    }
    return x;
}

static void quantised(const espi_backend *backend, esp_qformat format, esp_mxfp4_rule rule, esp_dtype dtype, int64_t n, int kind) {
    const bool mx = format == ESP_MXFP4;
    const size_t size = esp_dtype_size(dtype), codes = (size_t)(n + 1) / 2;
    const size_t scales = mx ? (size_t)n / 32 : (size_t)(n + 63) / 64 * sizeof(float);
    unsigned char *there, *want = malloc(codes + scales), *got = malloc(codes + scales);
    void *x = plain_values(dtype, n, kind, format, kind == 4);
    float *want_absmax = malloc(scales + 1);
    if (mx)
        OK(esp_mxfp4_quantize(want, want + codes, x, dtype, n, rule));
    else
        OK(esp_quantize(want, want_absmax, x, dtype, n, 64, format));
    if (!mx) memcpy(want + codes, want_absmax, scales);
    const size_t scales_at = (codes + 255) / 256 * 256, x_at = (scales_at + scales + 255) / 256 * 256;
    OK(ops->alloc(device, x_at + (size_t)n * size, (void **)&there));
    OK(ops->put(device, there + x_at, x, (size_t)n * size));
    espi_quantise args = {.codes = there,
                          .absmax = (float *)(void *)(there + scales_at),
                          .scales = there + scales_at,
                          .x = there + x_at,
                          .dtype = dtype,
                          .n = n,
                          .format = format,
                          .round_up = espi_mx_rules[rule].round_up};
    if (mx) {
        memcpy(args.thresholds, espi_mx_rules[rule].thresholds, sizeof espi_mx_rules[rule].thresholds);
    } else {
        memcpy(args.thresholds, espi_format_find(format)->thresholds, sizeof args.thresholds);
        memcpy(args.code_of_rank, espi_format_find(format)->code_of_rank, sizeof args.code_of_rank);
    }
    OK(backend->quantise(&(espi_exec){.device = device}, &args));
    OK(ops->get(device, got, there, codes));
    OK(ops->get(device, got + codes, there + scales_at, scales));
    EXPECT(memcmp(got, want, codes) == 0, "format %d, %s, %lld values of kind %d: the codes differ", (int)format, esp_dtype_name(dtype),
           (long long)n, kind);
    EXPECT(memcmp(got + codes, want + codes, scales) == 0, "format %d, %s, %lld values of kind %d: the scales differ", (int)format,
           esp_dtype_name(dtype), (long long)n, kind);
    ops->free(device, there);
    free(x);
    free(want);
    free(got);
    free(want_absmax);
}

static void quantising(const espi_backend *backend) {
    static const esp_dtype dtypes[] = {ESP_F32, ESP_BF16, ESP_F16};
    static const int64_t sizes[] = {32, 64, 96, 4096, 65 * 64, 1 << 20};
    for (int d = 0; d < 3; d++)
        for (int kind = 0; kind < 5; kind++)
            for (int i = 0; i < 6; i++) {
                if (dtypes[d] == ESP_F16 && kind == 2) continue; /* does not fit */
                quantised(backend, ESP_NF4, ESP_MXFP4_OCP, dtypes[d], sizes[i] + (i == 2 ? 1 : 0), kind);
                quantised(backend, ESP_FP4, ESP_MXFP4_OCP, dtypes[d], sizes[i], kind);
                quantised(backend, ESP_MXFP4, ESP_MXFP4_OCP, dtypes[d], sizes[i], kind);
                quantised(backend, ESP_MXFP4, ESP_MXFP4_ROUND_UP, dtypes[d], sizes[i], kind);
            }
}

int main(void) {
    const espi_backend *backend = espi_backends_gpu[0];
    if (backend == NULL || !backend->available()) {
        puts("skipped: no GPU, or a build without one");
        return 77;
    }
    ops = backend->device;
    OK(ops->start(&device, 0));
    RUN(copies());
    RUN(recordings());
    RUN(too_much());
    RUN(what_is_left());
    RUN(quantising(backend));
    ops->stop(device);
    return check_end();
}
