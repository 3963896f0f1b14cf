/* The inner loops of quantising.  They are plain C without branches that the compiler makes wide; the same body is compiled for each
 * instruction set and the machine's best is taken at run time.  AVX-512 has permutations that look codes up, and a loop of its own for that.
 * Every product is a single rounding (no contraction), so the codes are the same everywhere. */
#include "quant/quant.h"

#include "core/status.h"
#include "kernels/plain.h"

#include <math.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#define BODY static inline __attribute__((always_inline))

enum { CHUNK = 64, RANK_OF_ZERO = 7 };
#define INFINITE_BITS 0x7f800000u

/* The values as bits of f32; returns the largest magnitude, as bits: those of NaN and infinity are the largest of all. */
BODY uint32_t widen(uint32_t *bits, const void *x, esp_dtype dtype, int64_t n) {
    if (dtype == ESP_F32) {
        memcpy(bits, x, (size_t)n * sizeof *bits);
    } else if (dtype == ESP_BF16) {
        const uint16_t *half = x;
        for (int64_t i = 0; i < n; i++) bits[i] = (uint32_t)half[i] << 16;
    } else {
        const uint16_t *half = x;
        for (int64_t i = 0; i < n; i++) {
            const float value = espi_f16_value(half[i]);
            memcpy(&bits[i], &value, sizeof value);
        }
    }
    uint32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        const uint32_t magnitude = bits[i] & 0x7fffffffu;
        most = magnitude > most ? magnitude : most;
    }
    return most;
}

/* Values are in [-1, 1]: bin i holds those from (i - BIN_OF_ZERO) / BIN_OF_ZERO on.  No bin has two thresholds in any format. */
enum { BINS = 32, BIN_OF_ZERO = BINS / 2 };

/* What a value's code grows by at each threshold that lies below it; the same by bins: the code below the bin's threshold (or of all of it,
 * the threshold being infinite), and what it grows by above. */
typedef struct ladder {
    float thresholds[15];
    uint32_t lowest, steps[15];
    float bin_threshold[BINS];
    uint32_t bin_code[BINS], bin_step[BINS];
} ladder;

static uint32_t bin_of(float v) {
    const int bin = (int)(v * BIN_OF_ZERO + BIN_OF_ZERO);
    return (uint32_t)(bin < 0 ? 0 : bin >= BINS ? BINS - 1 : bin);
}

static void make_ladder(ladder *l, const espi_format *f) {
    l->lowest = f->code_of_rank[0];
    uint32_t bin = 0;
    for (int k = 0; k <= 15; k++) {
        const uint32_t next = k < 15 ? bin_of(f->thresholds[k]) : BINS;
        for (; bin < next; bin++) {
            l->bin_threshold[bin] = INFINITY;
            l->bin_code[bin] = f->code_of_rank[k];
            l->bin_step[bin] = 0;
        }
        if (k == 15) break;
        l->thresholds[k] = f->thresholds[k];
        l->steps[k] = (uint32_t)f->code_of_rank[k + 1] - f->code_of_rank[k];
        l->bin_threshold[bin] = f->thresholds[k];
        l->bin_code[bin] = f->code_of_rank[k];
        l->bin_step[bin++] = l->steps[k];
    }
}

/* Codes of up to CHUNK values, one a byte. */
BODY void flat_codes(uint8_t *code, const uint32_t *bits, int64_t n, float inverse, const ladder *l) {
    for (int64_t i = 0; i < n; i++) {
        const float v = espi_f32_of_bits(bits[i]) * inverse;
        uint32_t sum = l->lowest;
        for (int k = 0; k < 15; k++) sum += v > l->thresholds[k] ? l->steps[k] : 0;
        code[i] = (uint8_t)sum;
    }
}

BODY void pack(uint8_t *codes, const uint8_t *code, int64_t pairs, int even_shift) {
    for (int64_t i = 0; i < pairs; i++) codes[i] = (uint8_t)(code[2 * i] << even_shift | code[2 * i + 1] << (4 - even_shift));
}

/* CHUNK values to packed codes. */
typedef void flat_chunk_fn(uint8_t *out, const uint32_t *bits, float inverse, const ladder *l);

BODY void flat_chunk(uint8_t *out, const uint32_t *bits, float inverse, const ladder *l) {
    uint8_t code[CHUNK];
    flat_codes(code, bits, CHUNK, inverse, l);
    pack(out, code, CHUNK / 2, 4);
}

#ifdef __x86_64__
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))

/* By bins.  A value and a threshold fall into bins by the same sum, which does not decrease, so only in one bin they have to be compared. */
AVX512 BODY void flat_chunk_avx512(uint8_t *out, const uint32_t *bits, float inverse, const ladder *l) {
    const __m512 low_threshold = _mm512_loadu_ps(l->bin_threshold), high_threshold = _mm512_loadu_ps(l->bin_threshold + 16);
    const __m512i low_code = _mm512_loadu_si512(l->bin_code), high_code = _mm512_loadu_si512(l->bin_code + 16);
    const __m512i low_step = _mm512_loadu_si512(l->bin_step), high_step = _mm512_loadu_si512(l->bin_step + 16);
    const __m512 factor = _mm512_set1_ps(inverse), half = _mm512_set1_ps(BIN_OF_ZERO);
    for (int i = 0; i < CHUNK; i += 16) {
        const __m512 v = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_loadu_si512(bits + i)), factor);
        __m512i bin = _mm512_cvttps_epi32(_mm512_add_ps(_mm512_mul_ps(v, half), half));
        bin = _mm512_min_epi32(_mm512_max_epi32(bin, _mm512_setzero_si512()), _mm512_set1_epi32(BINS - 1));
        const __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutex2var_ps(low_threshold, bin, high_threshold), _CMP_GT_OQ);
        const __m512i below = _mm512_permutex2var_epi32(low_code, bin, high_code);
        const __m512i code = _mm512_mask_add_epi32(below, above, below, _mm512_permutex2var_epi32(low_step, bin, high_step));
        /* Two neighbours are the halves of 64 bits: the first one's code goes into the high nibble of the lowest byte. */
        const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
        _mm_storel_epi64((__m128i *)(void *)(out + i / 2), _mm512_cvtepi64_epi8(pair));
    }
}
#endif

BODY int64_t flat(uint8_t *codes, float *absmax, const void *x, esp_dtype dtype, int64_t n, int64_t block, const espi_format *f,
                  flat_chunk_fn *chunk) {
    const size_t size = esp_dtype_size(dtype);
    uint32_t bits[ESPI_BLOCK_MAX];
    uint8_t code[CHUNK + 1];
    ladder l;
    make_ladder(&l, f);
    for (int64_t first = 0; first < n; first += block) {
        const int64_t count = n - first < block ? n - first : block;
        const uint32_t most = widen(bits, (const unsigned char *)x + (size_t)first * size, dtype, count);
        if (most >= INFINITE_BITS) return first;
        absmax[first / block] = espi_f32_of_bits(most);
        /* bitsandbytes on the CPU keeps the divisor away from 0, so an all-zero block has the code of 0;
         * it multiplies by the reciprocal, which decides values that lie on a threshold. */
        const float inverse = 1.0f / fmaxf(absmax[first / block], 1e-38f);
        uint8_t *out = codes + first / 2;
        int64_t done = 0;
        for (; done + CHUNK <= count; done += CHUNK) chunk(out + done / 2, bits + done, inverse, &l);
        if (done == count) continue;
        flat_codes(code, bits + done, count - done, inverse, &l);
        code[count - done] = f->code_of_rank[RANK_OF_ZERO]; /* bitsandbytes pads an odd count with a zero */
        pack(out + done / 2, code, (count - done + 1) / 2, 4);
    }
    return n;
}

/* The scale byte of a block whose largest magnitude has these bits.  OCP: floor(log2(most)) - 2, from the exponent field.  Round up: the
 * smallest power of two that is most / 6 or more. */
BODY uint32_t mx_scale(uint32_t most, bool round_up) {
    if (!round_up) return most >> 23 > 2 ? (most >> 23) - 2 : 0;
    const float sixth = espi_f32_of_bits(most) / 6.0f;
    uint32_t bits;
    memcpy(&bits, &sixth, sizeof bits);
    return (bits + 0x7fffffu) >> 23;
}

BODY int64_t shared_exponent(uint8_t *codes, uint8_t *scales, const void *x, esp_dtype dtype, int64_t n, const espi_mx_rule *rule) {
    const size_t size = esp_dtype_size(dtype);
    uint32_t bits[ESPI_MX_BLOCK];
    uint8_t code[ESPI_MX_BLOCK];
    const espi_mx_rule r = *rule; /* nothing written may be part of it */
    for (int64_t first = 0; first < n; first += ESPI_MX_BLOCK) {
        const uint32_t most = widen(bits, (const unsigned char *)x + (size_t)first * size, dtype, ESPI_MX_BLOCK);
        if (most >= INFINITE_BITS) return first;
        const uint32_t scale = mx_scale(most, r.round_up);
        const float factor = espi_f32_of_bits((254u - scale) << 23); /* 2^(127 - scale): exact, as are the products that matter */
        const uint32_t keep_sign = most ? 8 : 0;
        for (int i = 0; i < ESPI_MX_BLOCK; i++) {
            const float v = espi_f32_of_bits(bits[i] & 0x7fffffffu) * factor;
            uint32_t sum = bits[i] >> 28 & keep_sign;
            for (int k = 0; k < 7; k++) sum += v > r.thresholds[k] ? 1 : 0;
            code[i] = (uint8_t)sum;
        }
        pack(codes + first / 2, code, ESPI_MX_BLOCK / 2, 0);
        scales[first / ESPI_MX_BLOCK] = (uint8_t)scale;
    }
    return n;
}

#define FLAT_ARGS uint8_t *codes, float *absmax, const void *x, esp_dtype dtype, int64_t n, int64_t block, const espi_format *f
#define MX_ARGS uint8_t *codes, uint8_t *scales, const void *x, esp_dtype dtype, int64_t n, const espi_mx_rule *rule

/* dtype and chunk are constants in each call, so that each has loops of its own. */
#define COMPILED(isa, attributes, chunk)                                                                                                   \
    attributes static int64_t flat_##isa(FLAT_ARGS) {                                                                                      \
        if (dtype == ESP_F32) return flat(codes, absmax, x, ESP_F32, n, block, f, chunk);                                                  \
        if (dtype == ESP_BF16) return flat(codes, absmax, x, ESP_BF16, n, block, f, chunk);                                                \
        return flat(codes, absmax, x, ESP_F16, n, block, f, chunk);                                                                        \
    }                                                                                                                                      \
    attributes static int64_t mx_##isa(MX_ARGS) {                                                                                          \
        if (dtype == ESP_F32) return shared_exponent(codes, scales, x, ESP_F32, n, rule);                                                  \
        if (dtype == ESP_BF16) return shared_exponent(codes, scales, x, ESP_BF16, n, rule);                                                \
        return shared_exponent(codes, scales, x, ESP_F16, n, rule);                                                                        \
    }

COMPILED(any, , flat_chunk)
#ifdef __x86_64__
COMPILED(avx2, __attribute__((target("avx2"))), flat_chunk)
COMPILED(avx512, AVX512, flat_chunk_avx512)

static bool has_avx2(void) {
    return __builtin_cpu_supports("avx2");
}

static bool has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
}
#endif

static bool has_any(void) {
    return true;
}

static const espi_encoder encoders[] = {
#ifdef __x86_64__
    {"avx512", has_avx512, flat_avx512, mx_avx512},
    {"avx2", has_avx2, flat_avx2, mx_avx2},
#endif
    {"any", has_any, flat_any, mx_any},
};

const espi_encoder *espi_encoder_next(const espi_encoder *after) {
    const espi_encoder *e = after ? after + 1 : encoders;
    while (e < encoders + ESPI_COUNT(encoders) && !e->offered()) e++;
    return e < encoders + ESPI_COUNT(encoders) ? e : NULL;
}
