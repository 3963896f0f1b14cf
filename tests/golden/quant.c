/* NF4, FP4 and double quantisation against bitsandbytes' own codes, scales and values; MXFP4 against OCP's rule. */
#include "espalier/quant.h"
#include "golden.h"
#include "kernels/plain.h"
#include "quant/quant.h"

#include <stdbool.h>
#include <string.h>

/* Bytes of a tensor, whatever its dtype. */
static unsigned char *read_bytes(const espi_st_tensor *t) {
    unsigned char *p = calloc(1, (size_t)t->bytes + 1);
    cr_assert_not_null(p);
    cr_assert_eq(espi_st_read(t, p, 0, (size_t)t->bytes), ESP_OK, "%s", esp_last_error());
    return p;
}

static const espi_st_tensor *part(const espi_st_file *file, const char *name, const char *suffix) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", name, suffix);
    return espi_st_find(file, key);
}

/* Names are e.g. "a.nf4.bf16.dq.bs64". */
typedef struct quant_case {
    char name[64], input;
    esp_qformat format;
    bool bf16, nested;
    int64_t block, n;
} quant_case;

static bool parse(quant_case *c, const char *key) {
    char format[8], dtype[8], mode[4], rest[16];
    int block;
    if (sscanf(key, "%c.%7[^.].%7[^.].%3[^.].bs%d.%15s", &c->input, format, dtype, mode, &block, rest) != 6 || strcmp(rest, "packed") != 0)
        return false;
    snprintf(c->name, sizeof c->name, "%.*s", (int)(strlen(key) - strlen(".packed")), key);
    c->format = strcmp(format, "nf4") == 0 ? ESP_NF4 : ESP_FP4;
    c->bf16 = strcmp(dtype, "bf16") == 0;
    c->nested = strcmp(mode, "dq") == 0;
    c->block = block;
    return true;
}

/* FP4 is compared by value: bitsandbytes may store either of its two zeros. */
static int64_t different_codes(const uint8_t *got, const uint8_t *want, int64_t n, esp_qformat format) {
    const float *table = esp_quant_table(format);
    int64_t different = 0;
    for (int64_t i = 0; i < n; i++) {
        const int shift = i % 2 == 0 ? 4 : 0;
        different += table[got[i / 2] >> shift & 15] != table[want[i / 2] >> shift & 15];
    }
    return different;
}

/* Double quantisation of our own absmax, against the file's.  bitsandbytes' mean is an f32 sum: one unit in the last place; its CPU build
 * looks codes up in cells of 2^-15, so a code may be a neighbour where the value lies within 1.6e-5 of a midpoint. */
static void check_nested(const espi_st_file *file, const quant_case *c, const float *absmax, int64_t blocks) {
    uint8_t *codes = calloc((size_t)blocks, 1);
    float nested[16], offset, *want_offset = (float *)read_bytes(part(file, c->name, "offset"));
    float *want_nested = (float *)read_bytes(part(file, c->name, "nested_absmax"));
    uint8_t *want_codes = read_bytes(part(file, c->name, "absmax"));
    cr_assert_eq(esp_absmax_quantize(codes, nested, &offset, absmax, blocks), ESP_OK, "%s", esp_last_error());
    cr_expect(fabsf(offset - *want_offset) <= 1.2e-7f * fabsf(*want_offset), "%s: offset %.9g, expected %.9g", c->name, (double)offset,
              (double)*want_offset);
    for (int64_t i = 0; i < blocks; i++) {
        if (want_nested[i / 256] == 0) continue; /* all scales equal: 0/0 there, and whatever the code, nothing is added to the offset */
        const float *map = esp_dynamic_map(1);
        const float v = want_nested[i / 256] > 0 ? (absmax[i] - *want_offset) / want_nested[i / 256] : 0;
        const bool near =
            fabsf(v - (map[codes[i]] + map[want_codes[i]]) / 2) <= 1.7e-5f || fabsf(map[codes[i]] - map[want_codes[i]]) <= 3.4e-5f;
        cr_expect(codes[i] == want_codes[i] || near, "%s: scale %lld: code %d, expected %d", c->name, (long long)i, codes[i],
                  want_codes[i]);
    }
    /* Decoding the file's own codes is exact. */
    float *restored = calloc((size_t)blocks, sizeof *restored);
    float *want = (float *)read_bytes(part(file, c->name, "absmax_restored"));
    cr_assert_eq(esp_absmax_dequantize(restored, want_codes, want_nested, *want_offset, NULL, blocks), ESP_OK);
    cr_expect(memcmp(restored, want, (size_t)blocks * sizeof *want) == 0, "%s: restored scales differ", c->name);
    free(codes), free(want_offset), free(want_nested), free(want_codes), free(restored), free(want);
}

static void check_decoding(const espi_st_file *file, const quant_case *c, const uint8_t *want_codes) {
    const espi_st_tensor *scales = part(file, c->name, c->nested ? "absmax_restored" : "absmax");
    float *absmax = (float *)read_bytes(scales), *x = calloc((size_t)c->n, sizeof *x);
    unsigned char *want = read_bytes(part(file, c->name, "dequant"));
    cr_assert_eq(esp_dequantize(x, want_codes, absmax, c->n, c->block, c->format), ESP_OK, "%s", esp_last_error());
    int64_t different = 0;
    for (int64_t i = 0; i < c->n; i++) /* -0 equals 0 here */
        different += c->bf16 ? (espi_bf16_bits(x[i]) & 0x7fff ? espi_bf16_bits(x[i]) : 0) !=
                                   (((uint16_t *)want)[i] & 0x7fff ? ((uint16_t *)want)[i] : 0)
                             : x[i] != ((float *)want)[i];
    cr_expect_eq(different, 0, "%s: %lld of %lld decoded values differ", c->name, (long long)different, (long long)c->n);
    free(absmax), free(x), free(want);
}

Test(golden_quant, every_case) {
    espi_st_file *file = golden_open("quant/bnb4.safetensors");
    int cases = 0;
    for (size_t k = 0; k < espi_st_count(file); k++) {
        quant_case c;
        if (!parse(&c, espi_st_at(file, k)->name)) continue;
        char key[16];
        snprintf(key, sizeof key, c.bf16 ? "%c.x_bf16" : "%c.x", c.input);
        const espi_st_tensor *input = espi_st_find(file, key);
        cr_assert_not_null(input, "%s: no input %s", c.name, key);
        unsigned char *x = read_bytes(input), *want = read_bytes(espi_st_at(file, k));
        c.n = (int64_t)(input->bytes / esp_dtype_size(input->dtype));
        const int64_t blocks = (c.n + c.block - 1) / c.block;
        uint8_t *codes = calloc((size_t)c.n / 2 + 1, 1);
        float *absmax = calloc((size_t)blocks, sizeof *absmax);
        cr_assert_eq(esp_quantize(codes, absmax, x, input->dtype, c.n, c.block, c.format), ESP_OK, "%s", esp_last_error());
        if (c.format == ESP_NF4)
            cr_expect(memcmp(codes, want, (size_t)espi_st_at(file, k)->bytes) == 0, "%s: codes differ", c.name);
        else
            cr_expect_eq(different_codes(codes, want, c.n, c.format), 0, "%s: codes differ", c.name);
        if (c.nested) {
            check_nested(file, &c, absmax, blocks);
        } else {
            unsigned char *scales = read_bytes(part(file, c.name, "absmax"));
            cr_expect(memcmp(absmax, scales, (size_t)blocks * sizeof *absmax) == 0, "%s: scales differ", c.name);
            free(scales);
        }
        check_decoding(file, &c, want);
        free(x), free(want), free(codes), free(absmax);
        cases++;
    }
    cr_expect_eq(cases, 52, "%d cases", cases);
    espi_st_close(file);
}

/* ---- MXFP4 ---- */

/* Two tensors of MXFP4, `codes` and `scales` [E,out,groups(,16)], against their values, stored as [E,in,out]. */
static void check_mx(const espi_st_file *file, const char *prefix) {
    char name[64];
    snprintf(name, sizeof name, "%sblocks", prefix);
    const espi_st_tensor *blocks = espi_st_find(file, name);
    cr_assert_not_null(blocks);
    uint8_t *codes = read_bytes(blocks);
    snprintf(name, sizeof name, "%sscales", prefix);
    uint8_t *scales = read_bytes(espi_st_find(file, name));
    snprintf(name, sizeof name, "%sf32", prefix);
    float *want = (float *)read_bytes(espi_st_find(file, name));
    const int64_t experts = blocks->dims[0], out = blocks->dims[1], in = blocks->dims[2] * 32, n = experts * out * in;
    float *got = calloc((size_t)n, sizeof *got);
    cr_assert_eq(esp_mxfp4_dequantize(got, codes, scales, n), ESP_OK, "%s", esp_last_error());
    int64_t different = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t e = i / (out * in), o = i / in % out, k = i % in;
        different += memcmp(&got[i], &want[(e * in + k) * out + o], sizeof *got) != 0;
    }
    cr_expect_eq(different, 0, "%s: %lld of %lld values differ", prefix, (long long)different, (long long)n);
    free(codes), free(scales), free(want), free(got);
}

Test(golden_quant, mxfp4_decodes) {
    espi_st_file *file = golden_open("quant/mxfp4.safetensors");
    check_mx(file, ""); /* every byte under six scales, 0 and 254 among them */
    check_mx(file, "rand.");
    espi_st_close(file);
}

/* What decodes to a value that quantising reaches comes back as the same bytes.  The random case was itself made by the rule. */
Test(golden_quant, mxfp4_encodes_what_it_decoded) {
    espi_st_file *file = golden_open("quant/mxfp4.safetensors");
    uint8_t *codes = read_bytes(espi_st_find(file, "rand.blocks")), *scales = read_bytes(espi_st_find(file, "rand.scales"));
    enum { N = 3 * 5 * 64 };
    float x[N];
    uint8_t got[N / 2], got_scales[N / 32];
    cr_assert_eq(esp_mxfp4_dequantize(x, codes, scales, N), ESP_OK);
    cr_assert_eq(esp_mxfp4_quantize(got, got_scales, x, ESP_F32, N, ESP_MXFP4_OCP), ESP_OK);
    cr_expect_eq(memcmp(got_scales, scales, sizeof got_scales), 0);
    cr_expect_eq(memcmp(got, codes, sizeof got), 0);
    free(codes), free(scales);
    espi_st_close(file);
}

static float vector_element(int i) {
    const float v = (float)(37 * i % 64 - 32) / 32.0f * 0.75f;
    return v + 0.01f;
}

static void expect_hex(const uint8_t *got, const char *want, int n) {
    char text[65];
    for (int i = 0; i < n; i++) snprintf(text + 2 * i, 3, "%02x", got[i]);
    cr_expect_str_eq(text, want);
}

/* formats-and-numerics 5 and 6: one block of 64 values in each format. */
Test(golden_quant, test_vectors) {
    float x[64], absmax;
    uint8_t codes[32], scales[2];
    for (int i = 0; i < 64; i++) x[i] = vector_element(i);
    cr_assert_eq(esp_quantize(codes, &absmax, x, ESP_F32, 64, 64, ESP_NF4), ESP_OK);
    cr_expect_eq(absmax, 0.74000001f);
    expect_hex(codes, "091c3e60a2d4f81b2e5f91c3e60a1d4f71b2e5f81c3e60a1d4e70b2d4f81c2e5", 32);
    cr_assert_eq(esp_quantize(codes, &absmax, x, ESP_F32, 64, 64, ESP_FP4), ESP_OK);
    expect_hex(codes, "b6a5c29b7a2f31a4d2e36a5c29b7a5c31b4d2e36a5d2eb6a5c39b4d2f31a4d2e", 32);
    for (int rule = ESP_MXFP4_OCP; rule <= ESP_MXFP4_ROUND_UP; rule++) {
        cr_assert_eq(esp_mxfp4_quantize(codes, scales, x, ESP_F32, 64, (esp_mxfp4_rule)rule), ESP_OK);
        cr_expect(scales[0] == 124 && scales[1] == 124);
        expect_hex(codes, "2f5e6cf9d3b5174e6d7ae2c5963f5e7c", 16);
        expect_hex(codes + 16, "e0d4a6175e6df9e2c5864f6d7be1d4a6", 16);
    }
}

/* A block that begins with `first`, then x, then zeros. */
static void expect_mx(float first, float x, esp_mxfp4_rule rule, int scale, int code) {
    float block[32] = {first, x};
    uint8_t codes[16], scales[1];
    cr_assert_eq(esp_mxfp4_quantize(codes, scales, block, ESP_F32, 32, rule), ESP_OK, "%s", esp_last_error());
    cr_expect_eq(scales[0], scale, "%a, %a: scale %d, expected %d", (double)first, (double)x, scales[0], scale);
    cr_expect_eq(codes[0] >> 4, code, "%a, %a: code %d, expected %d", (double)first, (double)x, codes[0] >> 4, code);
}

/* Ties, and the two numbers beside each, under a block whose power of two is 1. */
Test(golden_quant, mxfp4_ties) {
    static const struct {
        float tie;
        int below, above, even;
    } ties[] = {{0.25f, 0, 1, 0}, {0.75f, 1, 2, 2}, {1.25f, 2, 3, 2}, {1.75f, 3, 4, 4}, {2.5f, 4, 5, 4}, {3.5f, 5, 6, 6}, {5, 6, 7, 6}};
    for (size_t i = 0; i < sizeof ties / sizeof ties[0]; i++)
        for (int sign = 0; sign < 2; sign++) {
            const float s = sign ? -1.0f : 1.0f, t = ties[i].tie;
            const int bit = 8 * sign;
            for (int rule = ESP_MXFP4_OCP; rule <= ESP_MXFP4_ROUND_UP; rule++) {
                expect_mx(6, s * nextafterf(t, 0), (esp_mxfp4_rule)rule, 127, bit | ties[i].below);
                expect_mx(6, s * nextafterf(t, 7), (esp_mxfp4_rule)rule, 127, bit | ties[i].above);
            }
            expect_mx(6, s * t, ESP_MXFP4_OCP, 127, bit | ties[i].even);
            expect_mx(6, s * t, ESP_MXFP4_ROUND_UP, 127, bit | ties[i].above);
        }
}

/* Where the two rules choose another power, the largest and smallest blocks, and blocks of zeros. */
Test(golden_quant, mxfp4_scales) {
    expect_mx(6.01f, 6.01f, ESP_MXFP4_OCP, 127, 7);      /* saturates */
    expect_mx(6.01f, 6.01f, ESP_MXFP4_ROUND_UP, 128, 5); /* 3.005 */
    expect_mx(7.99f, -7.99f, ESP_MXFP4_OCP, 127, 15);
    expect_mx(6, 6, ESP_MXFP4_ROUND_UP, 127, 7);
    expect_mx(0x1.fffffep127f, 0, ESP_MXFP4_OCP, 252, 0);
    expect_mx(0x1p-125f, 0x1p-125f, ESP_MXFP4_OCP, 0, 6); /* 4 * 2^-127 */
    expect_mx(0x1p-126f, 0x1p-126f, ESP_MXFP4_OCP, 0, 4); /* the power of two goes no lower */
    expect_mx(0x1p-149f, 0x1p-149f, ESP_MXFP4_OCP, 0, 0);
    expect_mx(0, 0, ESP_MXFP4_OCP, 0, 0);
    expect_mx(-0.0f, -0.0f, ESP_MXFP4_OCP, 0, 0);
    expect_mx(-0.0f, -0.0f, ESP_MXFP4_ROUND_UP, 0, 0);
}

Test(golden_quant, mxfp4_refused) {
    float x[64] = {0};
    uint8_t codes[32] = {0}, scales[2] = {127, 127};
    cr_expect_eq(esp_mxfp4_quantize(codes, scales, x, ESP_F32, 48, ESP_MXFP4_OCP), ESP_ERR_ARG);
    cr_expect_eq(esp_mxfp4_quantize(codes, scales, x, ESP_I32, 64, ESP_MXFP4_OCP), ESP_ERR_DTYPE);
    cr_expect_eq(esp_mxfp4_quantize(codes, scales, x, ESP_F32, 64, (esp_mxfp4_rule)2), ESP_ERR_ARG);
    cr_expect_eq(esp_mxfp4_quantize(codes, NULL, x, ESP_F32, 64, ESP_MXFP4_OCP), ESP_ERR_ARG);
    cr_expect_eq(esp_mxfp4_quantize(codes, scales, x, ESP_F32, 0, ESP_MXFP4_OCP), ESP_OK);
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        x[37] = bad[i];
        cr_expect_eq(esp_mxfp4_quantize(codes, scales, x, ESP_F32, 64, ESP_MXFP4_OCP), ESP_ERR_NONFINITE);
        cr_expect(strstr(esp_last_error(), "element 37"), "%s", esp_last_error());
    }
    scales[1] = 255;
    cr_expect_eq(esp_mxfp4_dequantize(x, codes, scales, 64), ESP_ERR_FORMAT);
    cr_expect(strstr(esp_last_error(), "scale 1"), "%s", esp_last_error());
    cr_expect_eq(esp_mxfp4_dequantize(x, codes, scales, 32), ESP_OK);
    cr_expect_eq(esp_mxfp4_dequantize(x, codes, scales, 33), ESP_ERR_ARG);
}

/* Every instruction set that this machine has gives the bytes of the fastest, whatever the dtype, the block and the count. */
Test(golden_quant, instruction_sets_agree) {
    enum { N = 4096 + 96 };
    static const esp_dtype dtypes[] = {ESP_F32, ESP_BF16, ESP_F16};
    static const int64_t counts[] = {1, 31, 64, 333, N}, blocks[] = {32, 64, 4096};
    static uint32_t x[N];
    for (int i = 0; i < N; i++) { /* finite in every dtype: no exponent is all ones, in either half */
        x[i] = (uint32_t)i * 2654435761u;
        x[i] ^= x[i] >> 15;
        x[i] &= 0xbbffbbffu;
    }
    const espi_encoder *fastest = espi_encoder_next(NULL);
    int seen = 0;
    for (const espi_encoder *e = fastest; e; e = espi_encoder_next(e), seen++)
        for (int d = 0; d < 3; d++) {
            uint8_t codes[2][N / 2], mx_scales[2][N / 32];
            float absmax[2][N / 32];
            for (int format = ESP_NF4; format <= ESP_FP4; format++)
                for (int b = 0; b < 3; b++)
                    for (int c = 0; c < 5; c++) {
                        const espi_format *f = espi_format_find((esp_qformat)format);
                        cr_assert_eq(fastest->flat(codes[0], absmax[0], x, dtypes[d], counts[c], blocks[b], f), counts[c]);
                        cr_assert_eq(e->flat(codes[1], absmax[1], x, dtypes[d], counts[c], blocks[b], f), counts[c]);
                        const size_t n = (size_t)(counts[c] + 1) / 2, scales = (size_t)((counts[c] + blocks[b] - 1) / blocks[b]);
                        cr_expect_eq(memcmp(codes[0], codes[1], n), 0, "%s of %lld in %s", f->name, (long long)counts[c], e->isa);
                        cr_expect_eq(memcmp(absmax[0], absmax[1], scales * sizeof(float)), 0);
                    }
            for (int rule = ESP_MXFP4_OCP; rule <= ESP_MXFP4_ROUND_UP; rule++) {
                cr_assert_eq(fastest->mx(codes[0], mx_scales[0], x, dtypes[d], N, &espi_mx_rules[rule]), N);
                cr_assert_eq(e->mx(codes[1], mx_scales[1], x, dtypes[d], N, &espi_mx_rules[rule]), N);
                cr_expect_eq(memcmp(codes[0], codes[1], N / 2), 0, "mxfp4 in %s", e->isa);
                cr_expect_eq(memcmp(mx_scales[0], mx_scales[1], N / 32), 0);
            }
        }
    cr_expect_geq(seen, 1);
}

/* ---- Linear4bit ---- */

/* The state dict of one layer, decoded: bitsandbytes' own weights, and its product with x. */
static void check_linear(const char *kind, esp_qformat format, bool nested) {
    char name[96];
    snprintf(name, sizeof name, "quant/linear4bit_%s.safetensors", kind);
    espi_st_file *file = golden_open(name);
    snprintf(name, sizeof name, "quant/linear4bit_%s_ref.safetensors", kind);
    espi_st_file *ref = golden_open(name);
    const espi_st_tensor *dequant = espi_st_find(ref, "dequant"), *scales = espi_st_find(file, "layer.weight.absmax");
    const int64_t out = dequant->dims[0], in = dequant->dims[1], n = out * in, blocks = (n + 63) / 64,
                  rows = espi_st_find(ref, "x")->dims[0];
    uint8_t *codes = read_bytes(espi_st_find(file, "layer.weight")), *stored = read_bytes(scales);
    float *absmax = calloc((size_t)blocks, sizeof *absmax), *w = calloc((size_t)n, sizeof *w);
    cr_assert_eq(scales->dims[0], blocks);
    if (nested) {
        char text[512];
        const espi_st_tensor *state = espi_st_find(file, format == ESP_NF4 ? "layer.weight.quant_state.bitsandbytes__nf4"
                                                                           : "layer.weight.quant_state.bitsandbytes__fp4");
        cr_assert(state->bytes < sizeof text);
        cr_assert_eq(espi_st_read(state, text, 0, (size_t)state->bytes), ESP_OK);
        text[state->bytes] = '\0';
        const char *offset = strstr(text, "\"nested_offset\":");
        cr_assert_not_null(offset);
        float *nested_absmax = (float *)read_bytes(espi_st_find(file, "layer.weight.nested_absmax"));
        float *map = (float *)read_bytes(espi_st_find(file, "layer.weight.nested_quant_map"));
        cr_assert_eq(esp_absmax_dequantize(absmax, stored, nested_absmax, strtof(offset + 16, NULL), map, blocks), ESP_OK);
        free(nested_absmax), free(map);
    } else {
        memcpy(absmax, stored, (size_t)blocks * sizeof *absmax);
    }
    cr_assert_eq(esp_dequantize(w, codes, absmax, n, 64, format), ESP_OK);
    uint16_t *want = (uint16_t *)read_bytes(dequant);
    int64_t different = 0;
    for (int64_t i = 0; i < n; i++) different += espi_bf16_bits(w[i]) != want[i] && (espi_bf16_bits(w[i]) | want[i]) != 0x8000;
    cr_expect_eq(different, 0, "%s: %lld of %lld weights differ", kind, (long long)different, (long long)n);
    double *x = golden_read(ref, "x", NULL), *y = golden_read(ref, "y_exact", NULL), *bias = golden_read(file, "layer.bias", NULL);
    double *got = calloc((size_t)(rows * out), sizeof *got);
    for (int64_t i = 0; i < rows * out; i++) {
        got[i] = bias[i % out];
        for (int64_t k = 0; k < in; k++) {
            const uint32_t bits = (uint32_t)espi_bf16_bits(w[i % out * in + k]) << 16;
            float value;
            memcpy(&value, &bits, sizeof value);
            got[i] += x[i / out * in + k] * (double)value;
        }
    }
    const double error = golden_error(got, y, rows * out);
    cr_expect(error <= 1e-6, "%s: y is off by %g of its largest value: more than f32 rounding of sums of %lld", kind, error, (long long)in);
    free(codes), free(stored), free(absmax), free(w), free(want), free(x), free(y), free(bias), free(got);
    espi_st_close(file);
    espi_st_close(ref);
}

Test(golden_quant, linear4bit) {
    check_linear("nf4_plain", ESP_NF4, false);
    check_linear("nf4_nested", ESP_NF4, true);
    check_linear("fp4_plain", ESP_FP4, false);
    check_linear("fp4_nested", ESP_FP4, true);
}

Test(golden_quant, tables) {
    espi_st_file *file = golden_open("quant/bnb4.safetensors");
    const struct {
        const char *name;
        const float *ours;
        size_t n;
    } tables[] = {{"nf4.quant_map", esp_quant_table(ESP_NF4), 16},
                  {"fp4.quant_map", esp_quant_table(ESP_FP4), 16},
                  {"dynamic_map_signed", esp_dynamic_map(1), 256},
                  {"dynamic_map_unsigned", esp_dynamic_map(0), 256}};
    for (size_t i = 0; i < 4; i++) {
        float *want = (float *)read_bytes(espi_st_find(file, tables[i].name));
        for (size_t j = 0; j < tables[i].n; j++) cr_expect_eq(tables[i].ours[j], want[j], "%s[%zu]", tables[i].name, j);
        free(want);
    }
    espi_st_close(file);
}

/* Every midpoint of neighbouring values and its two f32 neighbours. */
Test(golden_quant, ties) {
    espi_st_file *file = golden_open("quant/bnb4.safetensors");
    const char *names[] = {"ties.nf4", "ties.fp4"};
    for (int i = 0; i < 2; i++) {
        const esp_qformat format = i == 0 ? ESP_NF4 : ESP_FP4;
        unsigned char *x = read_bytes(part(file, names[i], "x")), *want = read_bytes(part(file, names[i], "packed"));
        uint8_t codes[32];
        float absmax;
        cr_assert_eq(esp_quantize(codes, &absmax, x, ESP_F32, 64, 64, format), ESP_OK);
        cr_expect_eq(different_codes(codes, want, 64, format), 0, "%s", names[i]);
        free(x), free(want);
    }
    espi_st_close(file);
}

/* All 256 bytes under 8 scales. */
Test(golden_quant, every_byte_decodes) {
    espi_st_file *file = golden_open("quant/bnb4.safetensors");
    const char *names[] = {"allcodes.nf4", "allcodes.fp4"};
    for (int i = 0; i < 2; i++) {
        unsigned char *codes = read_bytes(part(file, names[i], "packed"));
        float *absmax = (float *)read_bytes(part(file, names[i], "absmax")), *want = (float *)read_bytes(part(file, names[i], "dequant")),
              x[512];
        cr_assert_eq(esp_dequantize(x, codes, absmax, 512, 64, i == 0 ? ESP_NF4 : ESP_FP4), ESP_OK);
        for (int j = 0; j < 512; j++) cr_expect_eq(x[j], want[j], "%s[%d]", names[i], j);
        free(codes), free(absmax), free(want);
    }
    espi_st_close(file);
}

/* Double quantisation of 1, 255, 256 and 257 scales. */
Test(golden_quant, borders_of_nested_blocks) {
    espi_st_file *file = golden_open("quant/bnb4.safetensors");
    const int counts[] = {1, 255, 256, 257};
    for (int i = 0; i < 4; i++) {
        quant_case c;
        snprintf(c.name, sizeof c.name, "nest%d", counts[i]);
        float *absmax = (float *)read_bytes(part(file, c.name, "absmax_f32"));
        check_nested(file, &c, absmax, counts[i]);
        free(absmax);
    }
    espi_st_close(file);
}

Test(golden_quant, refused) {
    uint8_t codes[32];
    float absmax[1], x[64] = {0};
    x[7] = NAN;
    cr_expect_eq(esp_quantize(codes, absmax, x, ESP_F32, 64, 64, ESP_NF4), ESP_ERR_NONFINITE);
    cr_expect(strstr(esp_last_error(), "element 7"));
    x[7] = -INFINITY;
    cr_expect_eq(esp_quantize(codes, absmax, x, ESP_F32, 64, 64, ESP_FP4), ESP_ERR_NONFINITE);
    x[7] = 0;
    cr_expect_eq(esp_quantize(codes, absmax, x, ESP_F32, 64, 48, ESP_NF4), ESP_ERR_ARG);
    cr_expect_eq(esp_quantize(codes, absmax, x, ESP_I32, 64, 64, ESP_NF4), ESP_ERR_DTYPE);
    cr_expect_eq(esp_quantize(codes, absmax, x, ESP_F32, 64, 64, ESP_MXFP4), ESP_ERR_ARG);
    cr_expect_eq(esp_quantize(codes, absmax, x, ESP_F32, 64, 64, ESP_NF4), ESP_OK, "%s", esp_last_error());
    for (int i = 0; i < 32; i++) cr_expect_eq(codes[i], 0x77); /* an all-zero block */
}
