/* espalier verify: quant/.  NF4 and FP4 codes, double quantisation, bitsandbytes' Linear4bit files, and MXFP4. */
#include "cli/verify.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The 8-bit codes of the reference come from a table of 2^16 cells over [-1,1], so a code may differ from the nearest one where the value
 * lies within half a cell, 1.6e-5, of a midpoint. */
#define CELL 1.6e-5

static const struct {
    const char *name;
    esp_qformat format;
} formats[] = {{"nf4", ESP_NF4}, {"fp4", ESP_FP4}};

static void exact(espi_verify *v, const char *name, const double *got, const double *want, int64_t n) {
    espi_verify_compare(v, "", name, ESPI_RULE_EXACT, 0, got, want, n);
}

static void exact_f32(espi_verify *v, const char *name, const float *got, const espi_array *want) {
    espi_arrays a = {0};
    espi_arrays_put(&a, got, ESP_F32, want->n, "%s", name);
    exact(v, name, a.items[0].v, want->v, want->n);
    espi_arrays_free(&a);
}

/* Nearest bf16, ties to even. */
static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static uint16_t *array_bf16(const espi_array *array) {
    uint16_t *out = espi_cli_memory((size_t)array->n * sizeof *out);
    for (int64_t i = 0; i < array->n; i++) out[i] = to_bf16((float)array->v[i]);
    return out;
}

/* One quantised tensor of a file. */
typedef struct packed {
    const char *name; /* "a.nf4.f32.sq.bs64" */
    const espi_arrays *file;
    const espi_array *packed, *absmax, *nested, *offset, *restored, *dequant, *x;
    esp_qformat format;
    int64_t n, block;
} packed;

/* NF4 codes must be the reference's.  FP4 may store minus zero for a tiny positive value, so there the decoded values must be. */
static void compare_packed(espi_verify *v, const packed *q, const uint8_t *codes, const float *scales) {
    char name[96];
    snprintf(name, sizeof name, "%s.packed", q->name);
    if (q->format == ESP_NF4) {
        espi_arrays a = {0};
        espi_arrays_put(&a, codes, ESP_U8, (q->n + 1) / 2, "codes");
        exact(v, name, a.items[0].v, q->packed->v, (q->n + 1) / 2);
        espi_arrays_free(&a);
        return;
    }
    uint8_t *stored = espi_array_u8(q->packed);
    float *values[2] = {espi_cli_memory((size_t)q->n * sizeof(float)), espi_cli_memory((size_t)q->n * sizeof(float))};
    esp_status status = esp_dequantize(values[0], codes, scales, q->n, q->block, q->format);
    if (status == ESP_OK) status = esp_dequantize(values[1], stored, scales, q->n, q->block, q->format);
    espi_arrays a = {0};
    espi_arrays_put(&a, values[0], ESP_F32, q->n, "got");
    espi_arrays_put(&a, values[1], ESP_F32, q->n, "want");
    if (status != ESP_OK)
        espi_verify_error(v, name, status);
    else
        exact(v, name, a.items[0].v, a.items[1].v, q->n);
    espi_arrays_free(&a);
    free(values[0]);
    free(values[1]);
    free(stored);
}

int64_t espi_scale_codes_off(const float *scales, const uint8_t *got, const uint8_t *want, float offset, const float *nested, int64_t n) {
    const float *map = esp_dynamic_map(1);
    int64_t off = 0;
    for (int64_t i = 0; i < n; i++) {
        const double range = nested[i / 256], value = ((double)scales[i] - offset) / range;
        if (range == 0) continue; /* every code means the offset */
        off += !(fabs(fabs(map[got[i]] - value) - fabs(map[want[i]] - value)) <= 2 * CELL);
    }
    return off;
}

/* Offset, nested scales and codes of our double quantisation against the stored ones. */
static void compare_nested(espi_verify *v, const char *prefix, const float *scales, const espi_array *codes, const espi_array *nested,
                           const espi_array *offset) {
    char name[96];
    const int64_t n = codes->n;
    uint8_t *got = espi_cli_memory((size_t)n), *want = espi_array_u8(codes);
    float *got_nested = espi_cli_memory((size_t)nested->n * sizeof *got_nested), *want_nested = espi_array_f32(nested), got_offset;
    esp_status status = esp_absmax_quantize(got, got_nested, &got_offset, scales, n);
    if (status != ESP_OK)
        espi_verify_error(v, prefix, status);
    else {
        espi_arrays a = {0};
        espi_arrays_put(&a, got_nested, ESP_F32, nested->n, "nested");
        espi_arrays_put(&a, &got_offset, ESP_F32, 1, "offset");
        /* Sums of the same values in another order: a few units in the last place. */
        snprintf(name, sizeof name, "%s.offset", prefix);
        espi_verify_compare(v, "", name, ESPI_RULE_FORWARD, 1e-6, a.items[1].v, offset->v, 1);
        snprintf(name, sizeof name, "%s.nested_absmax", prefix);
        espi_verify_compare(v, "", name, ESPI_RULE_FORWARD, 1e-6, a.items[0].v, nested->v, nested->n);
        snprintf(name, sizeof name, "%s.absmax", prefix);
        espi_verify_count(v, name, espi_scale_codes_off(scales, got, want, (float)offset->v[0], want_nested, n));
        espi_arrays_free(&a);
    }
    free(got);
    free(want);
    free(got_nested);
    free(want_nested);
}

/* Scales of a packed tensor as they are used: stored, or restored from the double quantisation (and then compared). */
static float *scales_of(espi_verify *v, const packed *q) {
    if (q->absmax->dtype != ESP_U8) return espi_array_f32(q->absmax);
    uint8_t *codes = espi_array_u8(q->absmax);
    float *nested = espi_array_f32(q->nested), *out = espi_cli_memory((size_t)q->absmax->n * sizeof *out);
    esp_status status = esp_absmax_dequantize(out, codes, nested, (float)q->offset->v[0], NULL, q->absmax->n);
    if (status != ESP_OK)
        espi_verify_error(v, q->name, status);
    else if (q->restored)
        exact_f32(v, q->restored->name, out, q->restored);
    free(codes);
    free(nested);
    return out;
}

static void compare_dequant(espi_verify *v, const packed *q, const float *scales) {
    uint8_t *codes = espi_array_u8(q->packed);
    float *values = espi_cli_memory((size_t)q->n * sizeof *values);
    esp_status status = esp_dequantize(values, codes, scales, q->n, q->block, q->format);
    espi_arrays a = {0};
    if (q->dequant->dtype == ESP_BF16) {
        uint16_t *rounded = espi_cli_memory((size_t)q->n * sizeof *rounded);
        for (int64_t i = 0; i < q->n; i++) rounded[i] = to_bf16(values[i]);
        espi_arrays_put(&a, rounded, ESP_BF16, q->n, "values");
        free(rounded);
    } else
        espi_arrays_put(&a, values, ESP_F32, q->n, "values");
    if (status != ESP_OK)
        espi_verify_error(v, q->dequant->name, status);
    else
        exact(v, q->dequant->name, a.items[0].v, q->dequant->v, q->n);
    espi_arrays_free(&a);
    free(values);
    free(codes);
}

/* Quantises x as the reference did. */
static void compare_encoding(espi_verify *v, const packed *q) {
    const bool bf16 = q->x->dtype == ESP_BF16;
    void *x = bf16 ? (void *)array_bf16(q->x) : (void *)espi_array_f32(q->x);
    const int64_t blocks = (q->n + q->block - 1) / q->block;
    uint8_t *codes = espi_cli_memory((size_t)(q->n + 1) / 2);
    float *scales = espi_cli_memory((size_t)blocks * sizeof *scales);
    esp_status status = esp_quantize(codes, scales, x, bf16 ? ESP_BF16 : ESP_F32, q->n, q->block, q->format);
    if (status != ESP_OK)
        espi_verify_error(v, q->name, status);
    else {
        compare_packed(v, q, codes, scales);
        if (q->nested)
            compare_nested(v, q->name, scales, q->absmax, q->nested, q->offset);
        else
            exact_f32(v, q->absmax->name, scales, q->absmax);
    }
    free(x);
    free(codes);
    free(scales);
}

static void verify_packed(espi_verify *v, const packed *q) {
    const int64_t blocks = (q->n + q->block - 1) / q->block;
    if (!q->absmax || q->absmax->n != blocks || q->packed->n != (q->n + 1) / 2 ||
        (q->absmax->dtype == ESP_U8 && (!q->nested || !q->offset))) {
        espi_verify_fail(v, q->name, "absmax, nested_absmax or offset is missing or has another size");
        return;
    }
    if (q->x) compare_encoding(v, q);
    float *scales = scales_of(v, q);
    if (q->dequant) compare_dequant(v, q, scales);
    free(scales);
}

static esp_qformat format_in(const char *name) {
    for (int i = 0; i < ESPI_COUNT(formats); i++)
        if (strstr(name, formats[i].name)) return formats[i].format;
    return ESP_Q_NONE;
}

/* ---- bnb4.safetensors ---- */

static packed describe(const espi_arrays *file, const espi_array *codes, char *prefix) {
    packed q = {.name = prefix, .file = file, .packed = codes, .block = 64, .format = format_in(prefix)};
    q.absmax = espi_arrays_find(file, "%s.absmax", prefix);
    q.nested = espi_arrays_find(file, "%s.nested_absmax", prefix);
    q.offset = espi_arrays_find(file, "%s.offset", prefix);
    q.restored = espi_arrays_find(file, "%s.absmax_restored", prefix);
    q.dequant = espi_arrays_find(file, "%s.dequant", prefix);
    q.x = espi_arrays_find(file, "%s.x", prefix); /* ties.nf4.x; the lettered cases share theirs: a.x */
    if (!q.x) q.x = espi_arrays_find(file, "%.*s.x%s", (int)strcspn(prefix, "."), prefix, strstr(prefix, ".bf16.") ? "_bf16" : "");
    const char *block = strstr(prefix, ".bs");
    if (block) q.block = strtoll(block + 3, NULL, 10);
    q.n = q.x ? q.x->n : q.dequant ? q.dequant->n : 0;
    return q;
}

static void verify_tables(espi_verify *v, const espi_arrays *file) {
    const struct {
        const char *name;
        const float *table;
        int64_t n;
    } tables[] = {{"nf4.quant_map", esp_quant_table(ESP_NF4), 16},
                  {"fp4.quant_map", esp_quant_table(ESP_FP4), 16},
                  {"dynamic_map_signed", esp_dynamic_map(1), 256},
                  {"dynamic_map_unsigned", esp_dynamic_map(0), 256}};
    for (int i = 0; i < ESPI_COUNT(tables); i++) {
        const espi_array *want = espi_arrays_find(file, "%s", tables[i].name);
        if (want && tables[i].table && want->n == tables[i].n)
            exact_f32(v, tables[i].name, tables[i].table, want);
        else if (want)
            espi_verify_fail(v, tables[i].name, "has another size, or is not offered");
    }
}

static void verify_nest(espi_verify *v, const espi_arrays *file, const espi_array *scales) {
    char prefix[32];
    snprintf(prefix, sizeof prefix, "%.*s", (int)strcspn(scales->name, "."), scales->name);
    packed q = {.name = prefix, .absmax = espi_arrays_find(file, "%s.absmax", prefix)};
    q.nested = espi_arrays_find(file, "%s.nested_absmax", prefix);
    q.offset = espi_arrays_find(file, "%s.offset", prefix);
    q.restored = espi_arrays_find(file, "%s.absmax_restored", prefix);
    if (!q.absmax || !q.nested || !q.offset || !q.restored || q.absmax->n != scales->n) {
        espi_verify_fail(v, prefix, "absmax, nested_absmax, offset or absmax_restored is missing");
        return;
    }
    float *values = espi_array_f32(scales);
    compare_nested(v, prefix, values, q.absmax, q.nested, q.offset);
    free(values);
    free(scales_of(v, &q));
}

static void verify_bnb4(espi_verify *v, const espi_arrays *file) {
    verify_tables(v, file);
    for (int64_t i = 0; i < file->n; i++) {
        const espi_array *a = &file->items[i];
        const char *dot = strrchr(a->name, '.');
        if (dot && strcmp(dot, ".absmax_f32") == 0) verify_nest(v, file, a);
        if (!dot || strcmp(dot, ".packed") != 0) continue;
        char prefix[96];
        snprintf(prefix, sizeof prefix, "%.*s", (int)(dot - a->name), a->name);
        const packed q = describe(file, a, prefix);
        if (q.format == ESP_Q_NONE)
            espi_verify_skip(v, a->name, "a format that this version does not know");
        else
            verify_packed(v, &q);
    }
}

/* ---- linear4bit_*.safetensors ---- */

/* The JSON that bitsandbytes stores as a tensor of bytes. */
static json_t *quant_state(const espi_arrays *file, const char *format) {
    const espi_array *bytes = espi_arrays_find(file, "layer.weight.quant_state.bitsandbytes__%s", format);
    if (!bytes) return NULL;
    char *text = espi_cli_memory((size_t)bytes->n + 1);
    for (int64_t i = 0; i < bytes->n; i++) text[i] = (char)bytes->v[i];
    json_t *state = json_loads(text, 0, NULL);
    free(text);
    return state;
}

/* x W^T + bias on the dequantised weight, in double. */
static void compare_output(espi_verify *v, const char *label, const espi_arrays *file, const espi_arrays *ref) {
    char place[96];
    snprintf(place, sizeof place, "%s.", label);
    const espi_array *x = espi_arrays_find(ref, "x"), *w = espi_arrays_find(ref, "dequant"), *want = espi_arrays_find(ref, "y_exact");
    const espi_array *bias = espi_arrays_find(file, "layer.bias");
    if (!x || !w || !want || !bias || w->rank != 2 || x->n / w->dims[1] * w->dims[0] != want->n) return;
    const int64_t in = w->dims[1], out = w->dims[0];
    double *y = espi_cli_memory((size_t)want->n * sizeof *y);
    for (int64_t i = 0; i < want->n; i++) {
        y[i] = bias->v[i % out];
        for (int64_t k = 0; k < in; k++) y[i] += x->v[i / out * in + k] * w->v[i % out * in + k];
    }
    espi_verify_compare(v, place, "y_exact", ESPI_RULE_FORWARD, espi_verify_limit(v, ESPI_RULE_FORWARD, want->dtype), y, want->v, want->n);
    /* The layer's own output was computed in bf16. */
    const espi_array *rounded = espi_arrays_find(ref, "y");
    if (rounded && rounded->n == want->n) espi_verify_compare(v, place, "y", ESPI_RULE_GRADIENT, 2e-2, y, rounded->v, rounded->n);
    free(y);
}

static void verify_linear(espi_verify *v, const char *name, const espi_arrays *file, const espi_arrays *ref) {
    const char *format = strstr(name, "nf4") ? "nf4" : "fp4";
    json_t *state = quant_state(file, format);
    const double offset_value = json_number_value(json_object_get(state, "nested_offset"));
    espi_array offset = {.n = 1, .v = (double[]){offset_value}};
    packed q = {.name = name, .file = file, .format = format_in(name)};
    q.packed = espi_arrays_find(file, "layer.weight");
    q.absmax = espi_arrays_find(file, "layer.weight.absmax");
    q.nested = espi_arrays_find(file, "layer.weight.nested_absmax");
    q.offset = q.nested ? &offset : NULL;
    q.dequant = espi_arrays_find(ref, "dequant");
    q.x = espi_arrays_find(ref, "w");
    q.block = json_integer_value(json_object_get(state, "blocksize"));
    q.n = q.dequant ? q.dequant->n : 0;
    if (!state || q.block < 1 || !q.packed || !q.dequant)
        espi_verify_fail(v, name, "quant_state, layer.weight or dequant is missing");
    else {
        verify_packed(v, &q);
        compare_output(v, name, file, ref);
    }
    json_decref(state);
}

/* One case of the MXFP4 file: blocks U8 [E,out,groups,16] and scales U8 [E,out,groups], decoded as [E,in,out]. */
typedef struct mxfp4_case {
    int64_t experts, out, in;
    uint8_t *blocks, *scales;
    float *value; /* [E,out,in] */
} mxfp4_case;

static void compare_decoded(espi_verify *v, const mxfp4_case *c, const espi_array *want) {
    char name[96];
    const int64_t n = c->experts * c->out * c->in;
    snprintf(name, sizeof name, "mxfp4.%s", want->name);
    if (want->n != n) {
        espi_verify_fail(v, name, "has another size than its blocks");
        return;
    }
    double *got = espi_cli_memory((size_t)n * sizeof *got);
    for (int64_t i = 0; i < n; i++) {
        const int64_t e = i / (c->out * c->in), column = i / c->out % c->in, row = i % c->out;
        got[i] = c->value[(e * c->out + row) * c->in + column];
    }
    exact(v, name, got, want->v, n);
    free(got);
}

/* A value that MXFP4 holds is held again, whatever scale the rule chooses for its block. */
static void compare_again(espi_verify *v, const mxfp4_case *c, const char *prefix) {
    const int64_t n = c->experts * c->out * c->in;
    char name[96];
    snprintf(name, sizeof name, "mxfp4.%squantised again", prefix);
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(c->value[i])) return;
    float *again = espi_cli_memory((size_t)n * sizeof *again);
    esp_status status = esp_mxfp4_quantize(c->blocks, c->scales, c->value, ESP_F32, n, ESP_MXFP4_OCP);
    if (status == ESP_OK) status = esp_mxfp4_dequantize(again, c->blocks, c->scales, n);
    int64_t different = 0;
    for (int64_t i = 0; i < n; i++) different += again[i] != c->value[i];
    if (status == ESP_OK)
        espi_verify_count(v, name, different);
    else
        espi_verify_error(v, name, status);
    free(again);
}

static void verify_mxfp4_case(espi_verify *v, const espi_arrays *file, const char *prefix, const espi_array *blocks) {
    const espi_array *scales = espi_arrays_find(file, "%sscales", prefix);
    if (!scales || blocks->rank != 4 || blocks->dims[3] != 16 || scales->n * 16 != blocks->n) {
        espi_verify_fail(v, blocks->name, "is not [E,out,groups,16], or has no scales [E,out,groups] beside it");
        return;
    }
    mxfp4_case c = {.experts = blocks->dims[0], .out = blocks->dims[1], .in = 32 * blocks->dims[2]};
    c.blocks = espi_array_u8(blocks);
    c.scales = espi_array_u8(scales);
    c.value = espi_cli_memory((size_t)(2 * blocks->n) * sizeof *c.value);
    const esp_status status = esp_mxfp4_dequantize(c.value, c.blocks, c.scales, 2 * blocks->n);
    if (status != ESP_OK) espi_verify_error(v, blocks->name, status);
    static const char *const decoded[] = {"f32", "bf16"};
    for (int i = 0; i < ESPI_COUNT(decoded) && status == ESP_OK; i++) {
        const espi_array *want = espi_arrays_find(file, "%s%s", prefix, decoded[i]);
        if (want) compare_decoded(v, &c, want);
    }
    if (status == ESP_OK) compare_again(v, &c, prefix);
    free(c.blocks);
    free(c.scales);
    free(c.value);
}

static void verify_mxfp4(espi_verify *v, const espi_arrays *file) {
    static const char end[] = "blocks";
    for (int64_t i = 0; i < file->n; i++) {
        const size_t length = strlen(file->items[i].name), prefix = length - (sizeof end - 1);
        if (length < sizeof end - 1 || strcmp(file->items[i].name + prefix, end) != 0) continue;
        char name[64];
        snprintf(name, sizeof name, "%.*s", (int)prefix, file->items[i].name);
        verify_mxfp4_case(v, file, name, &file->items[i]);
    }
}

void espi_verify_quant(espi_verify *v, const char *dir) {
    espi_arrays file, ref;
    if (espi_verify_open(v, &file, dir, "bnb4.safetensors")) verify_bnb4(v, &file);
    espi_arrays_free(&file);
    static const char *const linears[] = {"linear4bit_nf4_plain", "linear4bit_nf4_nested", "linear4bit_fp4_plain", "linear4bit_fp4_nested"};
    for (int i = 0; i < ESPI_COUNT(linears); i++) {
        char name[64], ref_name[64];
        snprintf(name, sizeof name, "%s.safetensors", linears[i]);
        snprintf(ref_name, sizeof ref_name, "%s_ref.safetensors", linears[i]);
        if (espi_verify_open(v, &file, dir, name) && espi_verify_open(v, &ref, dir, ref_name)) {
            verify_linear(v, linears[i], &file, &ref);
            espi_arrays_free(&ref);
        }
        espi_arrays_free(&file);
    }
    if (espi_is_file(dir, "mxfp4.safetensors") && espi_verify_open(v, &file, dir, "mxfp4.safetensors")) {
        verify_mxfp4(v, &file);
        espi_arrays_free(&file);
    }
}
