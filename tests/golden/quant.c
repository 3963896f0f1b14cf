/* NF4, FP4 and double quantisation against bitsandbytes' own codes, scales and values. */
#include "espalier/quant.h"
#include "golden.h"

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

static uint16_t round_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

static void check_decoding(const espi_st_file *file, const quant_case *c, const uint8_t *want_codes) {
    const espi_st_tensor *scales = part(file, c->name, c->nested ? "absmax_restored" : "absmax");
    float *absmax = (float *)read_bytes(scales), *x = calloc((size_t)c->n, sizeof *x);
    unsigned char *want = read_bytes(part(file, c->name, "dequant"));
    cr_assert_eq(esp_dequantize(x, want_codes, absmax, c->n, c->block, c->format), ESP_OK, "%s", esp_last_error());
    int64_t different = 0;
    for (int64_t i = 0; i < c->n; i++) /* -0 equals 0 here */
        different +=
            c->bf16 ? (round_bf16(x[i]) & 0x7fff ? round_bf16(x[i]) : 0) != (((uint16_t *)want)[i] & 0x7fff ? ((uint16_t *)want)[i] : 0)
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
