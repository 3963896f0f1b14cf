/* What the benchmarks of CPU kernels share: the roofs of the machine, backends by name, options, and arrays of noise. */
#ifndef ESP_BENCH_ROOF_H
#define ESP_BENCH_ROOF_H

#include "kernels/backend.h"
#include "measure.h"

#include <getopt.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Deterministic, of order 1 and without structure. */
static inline float noise(uint64_t i) {
    i = (i + 1) * 0x9e3779b97f4a7c15u;
    i = (i ^ i >> 29) * 0xbf58476d1ce4e5b9u;
    return (float)(i >> 40) * 0x1p-23f - 1;
}
static inline float *floats(size_t n, float scale) {
    float *x = allocate(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = scale * noise(i);
    return x;
}

/* Scratch of at least so many bytes, the same from call to call. */
static inline void *room(size_t bytes) {
    static void *kept;
    static size_t size;
    if (bytes > size) {
        free(kept);
        kept = allocate(size = bytes);
        memset(kept, 0, size);
    }
    return kept;
}

enum { CHAINS = 12, COPIED = 256 << 20, AHEAD = 4096 };

/* Multiply-adds of f32 and dot products of bf16 pairs a second, in as many independent chains as hide their latency; 0 where there is no such
 * instruction. */
#if defined(__x86_64__)
#define EACH(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
#define CHAIN(i) __m512 c##i = _mm512_set1_ps(i);
#define SUM(i) sum = _mm512_add_ps(sum, c##i);
#define FMA(i) __asm__("vfmadd231ps %1, %1, %0" : "+v"(c##i) : "v"(x));
#define DOT(i) __asm__("vdpbf16ps %1, %1, %0" : "+v"(c##i) : "v"(x));
#define ROOF(name, STEP)                                                                                                                   \
    __attribute__((target("avx512f"), noinline)) static float name(int64_t steps) {                                                        \
        __m512 sum = _mm512_setzero_ps();                                                                                                  \
        const __m512 x = _mm512_set1_ps(1e-9f);                                                                                            \
        EACH(CHAIN)                                                                                                                        \
        for (int64_t k = 0; k < steps; k++) {                                                                                              \
            EACH(STEP)                                                                                                                     \
        }                                                                                                                                  \
        EACH(SUM)                                                                                                                          \
        return _mm512_cvtss_f32(sum);                                                                                                      \
    }
ROOF(fma_chains, FMA)
ROOF(dot_chains, DOT)
#endif

static inline double rate(float (*chains)(int64_t), double per_step) {
    const int64_t steps = 2000000;
    const double start = now();
    volatile float keep = chains(steps);
    (void)keep;
    return per_step * (double)steps / (now() - start);
}
static inline double fma_roof(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return rate(fma_chains, 2.0 * 16 * CHAINS);
#endif
    return 0;
}
static inline double dot_roof(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bf16")) return rate(dot_chains, 4.0 * 16 * CHAINS);
#endif
    return 0;
}

/* Bytes read and written a second, past the caches. */
static inline double copy_roof(void) {
    static char *from, *to;
    if (!from) {
        from = allocate(COPIED);
        to = allocate(COPIED);
        memset(from, 1, COPIED);
        memset(to, 2, COPIED);
    }
    const double start = now();
#if defined(__x86_64__)
    for (size_t i = 0; i < COPIED; i += sizeof(__m128i))
        _mm_stream_si128((__m128i *)(void *)(to + i), _mm_load_si128((const __m128i *)(const void *)(from + i)));
#else
    memcpy(to, from, COPIED);
#endif
    return 2.0 * COPIED / (now() - start);
}

/* Bytes read a second from memory, of which each of `parts` threads reads one. */
static inline double read_roof(int part, int parts) {
    static char *all;
    if (!all) memset(all = allocate(COPIED + AHEAD), 1, COPIED + AHEAD);
    const size_t bytes = (size_t)(COPIED / parts / 64 * 64);
    const char *from = all + (size_t)part * bytes;
    const double start = now();
    uint64_t sum[8] = {0};
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(from + i + AHEAD);
        const uint64_t *line = (const uint64_t *)(const void *)(from + i);
        for (int k = 0; k < 8; k++) sum[k] |= line[k];
    }
    volatile uint64_t keep = sum[0] ^ sum[1] ^ sum[2] ^ sum[3] ^ sum[4] ^ sum[5] ^ sum[6] ^ sum[7];
    (void)keep;
    return (double)bytes / (now() - start);
}

#if defined(__x86_64__)
/* All eight tiles are full, and 0. */
static inline void tiles_begin(void) {
    _Alignas(64) uint8_t config[64] = {1};
    for (int tile = 0; tile < 8; tile++) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
static inline void tiles_end(void) {
    __asm__ volatile("tilerelease");
}
#endif

/* Floating-point operations a second of products of full bf16 tiles; 0 where there are none.  Of noise, as other products are: those of zeros
 * take less power, and some machines are quicker at them than at any others.  The process has leave to use tiles once the backend has been
 * found available. */
static inline double tile_roof(const espi_backend *b, bool zeros) {
#if defined(__x86_64__)
    if (strstr(b->name, "amx")) {
        uint16_t tiles[2][512];
        for (int i = 0; i < 1024; i++) {
            uint32_t bits;
            memcpy(&bits, &(float){noise((uint64_t)i)}, sizeof bits);
            tiles[i / 512][i % 512] = (uint16_t)(bits >> 16);
        }
        const int steps = 50000;
        tiles_begin();
        if (!zeros)
            __asm__ volatile("tileloadd (%0,%2), %%tmm6\n\ttileloadd (%1,%2), %%tmm7" ::"r"(tiles[0]), "r"(tiles[1]), "r"((int64_t)64)
                             : "memory");
        const double start = now();
        for (int k = 0; k < steps; k++)
            __asm__ volatile("tdpbf16ps %%tmm7, %%tmm6, %%tmm0\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm1\n\t"
                             "tdpbf16ps %%tmm7, %%tmm6, %%tmm2\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm3\n\t"
                             "tdpbf16ps %%tmm7, %%tmm6, %%tmm4\n\ttdpbf16ps %%tmm7, %%tmm6, %%tmm5" ::
                                 : "memory");
        const double seconds = now() - start;
        tiles_end();
        return 6.0 * 2 * 16 * 16 * 32 * steps / seconds;
    }
#endif
    (void)b;
    (void)zeros;
    return 0;
}

static inline const espi_backend *find_backend(const char *name) {
    for (const espi_backend *const *b = espi_backends_cpu; *b; b++)
        if ((*b)->available() && (!name || strcmp((*b)->name, name) == 0)) return *b;
    fprintf(stderr, "%s: no backend %s on this machine\n", program, name ? name : "(any)");
    exit(2);
}

/* What a benchmark against these roofs is asked. */
typedef struct bench_options {
    const espi_backend *backend;
    const char *only, *json, *commit;
    int threads, rounds;
} bench_options;

/* sections: what --only takes.  Ends the program where the options make no sense. */
static inline bench_options bench_read(int argc, char **argv, const char *name, int rounds, const char *sections) {
    static const struct option options[] = {{"backend", required_argument, NULL, 'b'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"rounds", required_argument, NULL, 'r'},
                                            {"only", required_argument, NULL, 'o'},
                                            {"json", required_argument, NULL, 'j'},
                                            {"commit", required_argument, NULL, 'c'},
                                            {NULL, 0, NULL, 0}};
    bench_options b = {.threads = 1, .rounds = rounds, .commit = "unknown"};
    const char *backend = NULL;
    program = name;
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (o == 'b') backend = optarg;
        if (o == 't') b.threads = atoi(optarg);
        if (o == 'r') b.rounds = atoi(optarg);
        if (o == 'o') b.only = optarg;
        if (o == 'j') b.json = optarg;
        if (o == 'c') b.commit = optarg;
        if (o == '?') b.rounds = 0;
    }
    if (b.rounds < 1 || b.rounds > MAX_ROUNDS || b.threads < 1) {
        fprintf(stderr, "usage: %s [--backend NAME] [--threads N] [--rounds 1..%d] [--json FILE]\n       [--commit HASH] [--only %s]\n",
                program, MAX_ROUNDS, sections);
        exit(2);
    }
    if (b.threads > 1) stopwatch = CLOCK_MONOTONIC;
    b.backend = find_backend(backend);
    return b;
}

#endif
