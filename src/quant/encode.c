/* The inner loops of quantising.  They are plain C without branches that the compiler makes wide; the same body is compiled for each
 * instruction set and the machine's best is taken at run time.  Every product is a single rounding (no contraction), so the codes are the
 * same everywhere. */
#include "quant/quant.h"

#include "core/status.h"
#include "kernels/plain.h"

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

/* What a value's code grows by at each threshold that lies below it. */
typedef struct ladder {
    float thresholds[15];
    uint32_t lowest, steps[15];
} ladder;

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

BODY int64_t flat(uint8_t *codes, float *absmax, const void *x, esp_dtype dtype, int64_t n, int64_t block, const espi_format *f) {
    const size_t size = esp_dtype_size(dtype);
    uint32_t bits[ESPI_BLOCK_MAX];
    uint8_t code[CHUNK + 1];
    ladder l = {.lowest = f->code_of_rank[0]};
    for (int k = 0; k < 15; k++) {
        l.thresholds[k] = f->thresholds[k];
        l.steps[k] = (uint32_t)f->code_of_rank[k + 1] - f->code_of_rank[k];
    }
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
        for (; done + CHUNK <= count; done += CHUNK) {
            flat_codes(code, bits + done, CHUNK, inverse, &l);
            pack(out + done / 2, code, CHUNK / 2, 4);
        }
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

/* dtype is a constant in each call, so that each has loops of its own. */
#define COMPILED(isa, attributes)                                                                                                          \
    attributes static int64_t flat_##isa(FLAT_ARGS) {                                                                                      \
        if (dtype == ESP_F32) return flat(codes, absmax, x, ESP_F32, n, block, f);                                                         \
        if (dtype == ESP_BF16) return flat(codes, absmax, x, ESP_BF16, n, block, f);                                                       \
        return flat(codes, absmax, x, ESP_F16, n, block, f);                                                                               \
    }                                                                                                                                      \
    attributes static int64_t mx_##isa(MX_ARGS) {                                                                                          \
        if (dtype == ESP_F32) return shared_exponent(codes, scales, x, ESP_F32, n, rule);                                                  \
        if (dtype == ESP_BF16) return shared_exponent(codes, scales, x, ESP_BF16, n, rule);                                                \
        return shared_exponent(codes, scales, x, ESP_F16, n, rule);                                                                        \
    }

COMPILED(any, )
#ifdef __x86_64__
COMPILED(avx2, __attribute__((target("avx2"))))
COMPILED(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))

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
