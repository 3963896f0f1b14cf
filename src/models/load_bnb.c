/* Experts that bitsandbytes has quantised already: codes and scales are taken as they are.  Keys: formats-and-numerics 5. */
#include "core/status.h"
#include "espalier/quant.h"
#include "models/load.h"

#include <jansson.h>
#include <math.h>
#include <string.h>

#define MAX_STATE 4096

/* What a quant_state says. */
typedef struct quant_state {
    esp_qformat format;
    int64_t block, dims[2];
    bool nested;
    int64_t nested_block;
    double offset;
} quant_state;

static const struct state_key {
    const char *suffix, *type;
    esp_qformat format;
} state_keys[] = {{"quant_state.bitsandbytes__nf4", "nf4", ESP_NF4}, {"quant_state.bitsandbytes__fp4", "fp4", ESP_FP4}};

static const espi_st_tensor *find_suffix(espi_loader *loader, const char *name, const char *suffix) {
    char key[ESPI_TENSOR_NAME + 64];
    snprintf(key, sizeof key, "%s.%s", name, suffix);
    return espi_loader_find(loader, key);
}

static esp_status need_suffix(espi_loader *loader, const espi_st_tensor **tensor, const char *name, const char *suffix, esp_dtype dtype,
                              int64_t n) {
    char key[ESPI_TENSOR_NAME + 64];
    snprintf(key, sizeof key, "%s.%s", name, suffix);
    return espi_loader_need(loader, tensor, key, dtype, 1, &n);
}

bool espi_bnb_present(espi_loader *loader, const char *name) {
    return find_suffix(loader, name, state_keys[0].suffix) || find_suffix(loader, name, state_keys[1].suffix);
}

static esp_status parse_state(quant_state *state, const char *text, size_t bytes, const espi_st_tensor *t, const struct state_key *key) {
    const char *path = espi_st_path(t->file);
    json_error_t error;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    const char *type = json_string_value(json_object_get(root, "quant_type"));
    const json_t *block = json_object_get(root, "blocksize"), *shape = json_object_get(root, "shape");
    const json_t *nested_block = json_object_get(root, "nested_blocksize"), *offset = json_object_get(root, "nested_offset");
    esp_status status = ESP_OK;
    if (!type || !json_is_integer(block) || json_array_size(shape) != 2 || !json_is_integer(json_array_get(shape, 0)) ||
        !json_is_integer(json_array_get(shape, 1)) || (nested_block != NULL) != (offset != NULL) ||
        (nested_block && (!json_is_integer(nested_block) || !json_is_number(offset))))
        status = ESPI_FAIL(ESP_ERR_FORMAT,
                           "%s: tensor %s: not the JSON of a 4-bit matrix, expected quant_type, blocksize, shape of two, and "
                           "nested_blocksize with nested_offset or neither",
                           path, t->name);
    else if (strcmp(type, key->type) != 0)
        status =
            ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: quant_type \"%s\", expected \"%s\" as its name says", path, t->name, type, key->type);
    else
        *state = (quant_state){.format = key->format,
                               .block = json_integer_value(block),
                               .dims = {json_integer_value(json_array_get(shape, 0)), json_integer_value(json_array_get(shape, 1))},
                               .nested = nested_block != NULL,
                               .nested_block = json_integer_value(nested_block),
                               .offset = json_number_value(offset)};
    json_decref(root);
    return status;
}

static esp_status read_state(quant_state *state, espi_loader *loader, const char *name) {
    const struct state_key *key = &state_keys[0];
    const espi_st_tensor *t = find_suffix(loader, name, key->suffix);
    if (!t) t = find_suffix(loader, name, (++key)->suffix);
    if (t->dtype != ESP_U8 || t->bytes > MAX_STATE)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: %llu bytes of %s, expected at most %d bytes of U8", espi_st_path(t->file), t->name,
                         (unsigned long long)t->bytes, t->dtype_name, MAX_STATE);
    char text[MAX_STATE];
    ESPI_TRY(espi_st_read(t, text, 0, (size_t)t->bytes));
    return parse_state(state, text, (size_t)t->bytes, t, key);
}

/* The file's matrix must be the one that the stack has room for. */
static esp_status check_state(const quant_state *q, const espi_loader *loader, const espi_stack *s, const char *name) {
    static const char *const formats[] = {[ESP_Q_NONE] = "none", [ESP_NF4] = "nf4", [ESP_FP4] = "fp4"};
    const char *path = espi_st_set_path(loader->set);
    if (q->format != s->format)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: tensor %s: stored as %s, expected %s: load it with experts = %s", path, name,
                         formats[q->format], formats[s->format], formats[q->format]);
    if (q->block != ESPI_QBLOCK || (q->nested && q->nested_block != ESPI_NESTED_BLOCK))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: tensor %s: blocks of %lld (nested: %lld), expected %d and %d", path, name,
                         (long long)q->block, (long long)q->nested_block, ESPI_QBLOCK, ESPI_NESTED_BLOCK);
    const int64_t dims[] = {s->rows / s->parts, s->cols};
    if (memcmp(dims, q->dims, sizeof dims) != 0)
        return ESPI_FAIL(ESP_ERR_SHAPE, "%s: tensor %s: quant_state has shape [%lld,%lld], expected [%lld,%lld]", path, name,
                         (long long)q->dims[0], (long long)q->dims[1], (long long)dims[0], (long long)dims[1]);
    if (!isfinite((float)q->offset))
        return ESPI_FAIL(ESP_ERR_NONFINITE, "%s: tensor %s: nested_offset is %g, expected a finite number", path, name, q->offset);
    return ESP_OK;
}

/* The 16 values of the format are ours; a file with others means other numbers by its codes. */
static esp_status check_table(espi_loader *loader, const espi_stack *s, const char *name) {
    const espi_st_tensor *t;
    float table[16];
    ESPI_TRY(need_suffix(loader, &t, name, "quant_map", ESP_F32, 16));
    ESPI_TRY(espi_loader_read(t, table, 0, 16));
    for (int i = 0; i < 16; i++)
        if (!(table[i] == s->lut[i]))
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: tensor %s: element %d is %.9g, expected %.9g, the format's own table",
                             espi_st_path(t->file), t->name, i, (double)table[i], (double)s->lut[i]);
    return ESP_OK;
}

/* Nested scales: kept as codes where the stack keeps codes, else restored to f32. */
static esp_status load_nested(espi_loader *loader, const espi_stack *s, int64_t part, const char *name, double offset) {
    const espi_st_tensor *codes_t, *nested_t, *map_t;
    const int64_t blocks = s->part_blocks, n_nested = (blocks + ESPI_NESTED_BLOCK - 1) / ESPI_NESTED_BLOCK;
    float map[256];
    ESPI_TRY(need_suffix(loader, &codes_t, name, "absmax", ESP_U8, blocks));
    ESPI_TRY(need_suffix(loader, &nested_t, name, "nested_absmax", ESP_F32, n_nested));
    ESPI_TRY(need_suffix(loader, &map_t, name, "nested_quant_map", ESP_F32, 256));
    ESPI_TRY(espi_loader_read(map_t, map, 0, 256));
    if (!s->absmax8) {
        float *nested = (float *)(void *)loader->raw;
        uint8_t *codes = (uint8_t *)(nested + n_nested);
        ESPI_TRY(espi_loader_read(nested_t, nested, 0, n_nested));
        ESPI_TRY(espi_st_read(codes_t, codes, 0, (size_t)blocks));
        return esp_absmax_dequantize((float *)s->absmax + part * blocks, codes, nested, (float)offset, map, blocks);
    }
    if (!loader->map_used)
        memcpy(loader->map, map, sizeof map);
    else if (memcmp(loader->map, map, sizeof map) != 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: tensor %s: differs from the map of the experts before, expected one for all",
                         espi_st_path(map_t->file), map_t->name);
    loader->map_used = true;
    ((float *)s->offset)[part] = (float)offset;
    ESPI_TRY(espi_loader_read(nested_t, (float *)s->nested + part * s->part_nested, 0, n_nested));
    return espi_st_read(codes_t, (uint8_t *)s->absmax8 + part * blocks, 0, (size_t)blocks);
}

esp_status espi_bnb_load_part(espi_loader *loader, const espi_stack *s, int64_t part, const char *name) {
    quant_state state;
    ESPI_TRY(read_state(&state, loader, name));
    ESPI_TRY(check_state(&state, loader, s, name));
    ESPI_TRY(check_table(loader, s, name));
    const espi_st_tensor *t;
    ESPI_TRY(espi_loader_need(loader, &t, name, ESP_U8, 2, (int64_t[]){(int64_t)s->part_bytes, 1}));
    ESPI_TRY(espi_st_read(t, (uint8_t *)s->data + (size_t)part * s->part_bytes, 0, s->part_bytes));
    if (state.nested) return load_nested(loader, s, part, name, state.offset);
    ESPI_TRY(need_suffix(loader, &t, name, "absmax", ESP_F32, s->part_blocks));
    float *absmax = s->absmax8 ? loader->absmax : (float *)s->absmax + part * s->part_blocks;
    ESPI_TRY(espi_loader_read(t, absmax, 0, s->part_blocks));
    return s->absmax8 ? espi_loader_shrink_absmax(loader, s, part) : ESP_OK;
}
