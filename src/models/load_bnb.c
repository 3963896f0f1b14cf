/* What bitsandbytes has quantised already: codes and scales of experts are taken as they are, other matrices are restored to f32.  Keys:
 * formats-and-numerics 5. */
#include "core/status.h"
#include "espalier/quant.h"
#include "models/load.h"
#include "quant/quant.h"

#include <float.h>
#include <jansson.h>
#include <math.h>
#include <string.h>

#define MAX_STATE 4096

/* What a quant_state says. */
typedef struct quant_state {
    esp_qformat format;
    int64_t block;
    int rank;
    int64_t dims[3];
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
    return find_suffix(loader, name, state_keys[0].suffix) || find_suffix(loader, name, state_keys[1].suffix) ||
           find_suffix(loader, name, "absmax");
}

/* ---- quant_state ---- */

static bool read_shape(quant_state *state, const json_t *shape) {
    state->rank = (int)json_array_size(shape);
    if (json_array_size(shape) < 2 || json_array_size(shape) > 3) return false;
    for (size_t i = 0; i < json_array_size(shape); i++) {
        if (!json_is_integer(json_array_get(shape, i))) return false;
        state->dims[i] = json_integer_value(json_array_get(shape, i));
    }
    return true;
}

static esp_status parse_state(quant_state *state, const char *text, size_t bytes, const espi_st_tensor *t, const struct state_key *key) {
    const char *path = espi_st_path(t->file);
    json_error_t error;
    json_t *root = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    const char *type = json_string_value(json_object_get(root, "quant_type"));
    const json_t *block = json_object_get(root, "blocksize");
    const json_t *nested_block = json_object_get(root, "nested_blocksize"), *offset = json_object_get(root, "nested_offset");
    *state = (quant_state){.format = key->format,
                           .block = json_integer_value(block),
                           .nested = nested_block != NULL,
                           .nested_block = json_integer_value(nested_block),
                           .offset = json_number_value(offset)};
    esp_status status = ESP_OK;
    if (!type || !json_is_integer(block) || !read_shape(state, json_object_get(root, "shape")) ||
        (nested_block != NULL) != (offset != NULL) || (nested_block && (!json_is_integer(nested_block) || !json_is_number(offset))))
        status = ESPI_FAIL(ESP_ERR_FORMAT,
                           "%s: tensor %s: not the JSON of a 4-bit matrix, expected quant_type, blocksize, shape of two or three, and "
                           "nested_blocksize with nested_offset or neither",
                           path, t->name);
    else if (strcmp(type, key->type) != 0)
        status =
            ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: quant_type \"%s\", expected \"%s\" as its name says", path, t->name, type, key->type);
    json_decref(root);
    return status;
}

static esp_status read_state(quant_state *state, espi_loader *loader, const char *name) {
    const struct state_key *key = &state_keys[0];
    const espi_st_tensor *t = find_suffix(loader, name, key->suffix);
    const espi_st_tensor *other = find_suffix(loader, name, state_keys[1].suffix);
    if (t && other)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: has a quant_state of nf4 and one of fp4, expected one",
                         espi_st_set_path(loader->set), name);
    if (!t) {
        t = other;
        key = &state_keys[1];
    }
    if (!t)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: has block scales but no %s or %s, expected one of them: no other format is known",
                         espi_st_set_path(loader->set), name, state_keys[0].suffix, state_keys[1].suffix);
    if (t->dtype != ESP_U8 || t->bytes > MAX_STATE)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: %llu bytes of %s, expected at most %d bytes of U8", espi_st_path(t->file), t->name,
                         (unsigned long long)t->bytes, t->dtype_name, MAX_STATE);
    char text[MAX_STATE];
    ESPI_TRY(espi_st_read(t, text, 0, (size_t)t->bytes));
    return parse_state(state, text, (size_t)t->bytes, t, key);
}

/* The file's matrix must have the shape that is wanted, in blocks that a stack can hold. */
static esp_status check_state(const quant_state *q, const espi_loader *loader, const char *name, int rank, const int64_t *dims) {
    const char *path = espi_st_set_path(loader->set);
    if (q->block != ESPI_QBLOCK || (q->nested && q->nested_block != ESPI_NESTED_BLOCK))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: tensor %s: blocks of %lld (nested: %lld), expected %d and %d", path, name,
                         (long long)q->block, (long long)q->nested_block, ESPI_QBLOCK, ESPI_NESTED_BLOCK);
    if (rank != q->rank || memcmp(dims, q->dims, (size_t)rank * sizeof *dims) != 0) {
        char got[ESPI_DIMS_TEXT], expected[ESPI_DIMS_TEXT];
        espi_dims_text(got, q->rank, q->dims);
        espi_dims_text(expected, rank, dims);
        const bool turned = rank == 3 && q->rank == 3 && dims[1] != dims[2] && dims[1] == q->dims[2] && dims[2] == q->dims[1];
        return ESPI_FAIL(turned ? ESP_ERR_UNSUPPORTED : ESP_ERR_SHAPE, "%s: tensor %s: quant_state has shape %s, expected %s%s", path, name,
                         got, expected,
                         turned ? ": blocks run along the other axis there and cannot be kept; quantise the 16-bit checkpoint" : "");
    }
    if (!isfinite((float)q->offset))
        return ESPI_FAIL(ESP_ERR_NONFINITE, "%s: tensor %s: nested_offset is %g, expected a finite number", path, name, q->offset);
    return ESP_OK;
}

static esp_status check_format(const quant_state *q, const espi_loader *loader, const espi_stack *s, const char *name) {
    if (q->format == s->format) return ESP_OK;
    const espi_format *got = espi_format_find(q->format), *expected = espi_format_find(s->format);
    return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: tensor %s: stored as %s, expected %s: load it with experts = %s", espi_st_set_path(loader->set),
                     name, got->name, expected ? expected->name : "none", got->name);
}

/* The 16 values of the format are ours; a file with others means other numbers by its codes.  Builds of bitsandbytes differ in the last
 * places. */
static esp_status check_table(espi_loader *loader, esp_qformat format, const char *name) {
    const espi_st_tensor *t;
    const float *own = esp_quant_table(format);
    float table[16];
    ESPI_TRY(need_suffix(loader, &t, name, "quant_map", ESP_F32, 16));
    ESPI_TRY(espi_loader_read(t, table, 0, 16));
    for (int i = 0; i < 16; i++)
        if (!(fabsf(table[i] - own[i]) <= 4 * FLT_EPSILON * fabsf(own[i])))
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: tensor %s: element %d is %.9g, expected %.9g, the format's own table",
                             espi_st_path(t->file), t->name, i, (double)table[i], (double)own[i]);
    return ESP_OK;
}

/* The codes of n values.  quant_storage may call the same bytes by another dtype. */
static esp_status need_codes(espi_loader *loader, const espi_st_tensor **codes, const char *name, int64_t n) {
    const espi_st_tensor *t = espi_loader_find(loader, name);
    esp_dtype dtype = ESP_U8;
    if (t && (t->dtype == ESP_BF16 || t->dtype == ESP_F16 || t->dtype == ESP_F32)) dtype = t->dtype;
    const int64_t bytes = (n + 1) / 2, size = (int64_t)esp_dtype_size(dtype);
    return espi_loader_need(loader, codes, name, bytes % size == 0 ? dtype : ESP_U8, 2, (int64_t[]){bytes / size, 1});
}

/* ---- scales ---- */

/* The block scales of one stored matrix: f32, or codes of 8 bits with scales of their own. */
typedef struct scales {
    const espi_st_tensor *absmax, *nested; /* nested: NULL where absmax is f32 */
    const espi_st_tensor *map_tensor;
    float map[256], offset;
} scales;

static esp_status open_scales(espi_loader *loader, scales *s, const quant_state *q, const char *name, int64_t blocks) {
    *s = (scales){.offset = (float)q->offset};
    ESPI_TRY(need_suffix(loader, &s->absmax, name, "absmax", q->nested ? ESP_U8 : ESP_F32, blocks));
    if (!q->nested) return ESP_OK;
    const int64_t n_nested = (blocks + ESPI_NESTED_BLOCK - 1) / ESPI_NESTED_BLOCK;
    ESPI_TRY(need_suffix(loader, &s->nested, name, "nested_absmax", ESP_F32, n_nested));
    ESPI_TRY(need_suffix(loader, &s->map_tensor, name, "nested_quant_map", ESP_F32, 256));
    return espi_loader_read(s->map_tensor, s->map, 0, 256);
}

/* Scales first .. first+n-1 as f32.  room: for floats, at least 1 KiB. */
static esp_status read_scales(float *out, const scales *s, int64_t first, int64_t n, void *room, size_t room_bytes) {
    if (!s->nested) return espi_loader_read(s->absmax, out, first, n);
    float *nested = room;
    const int64_t most = (int64_t)room_bytes / 2;
    for (int64_t done = 0; done < n;) {
        const int64_t from = first + done, m = n - done < most ? n - done : most, first_nested = from / ESPI_NESTED_BLOCK;
        const int64_t n_nested = (from + m - 1) / ESPI_NESTED_BLOCK - first_nested + 1;
        uint8_t *codes = (uint8_t *)(nested + n_nested);
        ESPI_TRY(espi_loader_read(s->nested, nested, first_nested, n_nested));
        ESPI_TRY(espi_st_read(s->absmax, codes, (uint64_t)from, (size_t)m));
        for (int64_t i = 0; i < m;) { /* the scales of one nested block */
            const int64_t place = (from + i) % ESPI_NESTED_BLOCK, left = ESPI_NESTED_BLOCK - place, run = m - i < left ? m - i : left;
            ESPI_TRY(esp_absmax_dequantize(out + done + i, codes + i, nested + ((from + i) / ESPI_NESTED_BLOCK - first_nested), s->offset,
                                           s->map, run));
            i += run;
        }
        done += m;
    }
    return ESP_OK;
}

/* Scales from block `first` on stay codes.  A stack has nested scales per matrix: those of the file must not straddle two of its own. */
static esp_status keep_nested(espi_loader *loader, const espi_stack *s, int64_t part, const scales *from, int64_t first) {
    bool same;
    ESPI_TRY(espi_loader_set_map(loader, &same, from->map));
    if (!same)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: tensor %s: differs from the map of the experts before, expected one for all",
                         espi_st_path(from->map_tensor->file), from->map_tensor->name);
    for (int64_t j = 0; j < s->part_nested; j++) {
        const int64_t begin = first + j * ESPI_NESTED_BLOCK, left = s->part_blocks - j * ESPI_NESTED_BLOCK;
        const int64_t end = begin + (left < ESPI_NESTED_BLOCK ? left : ESPI_NESTED_BLOCK);
        if (begin / ESPI_NESTED_BLOCK != (end - 1) / ESPI_NESTED_BLOCK)
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                             "%s: tensor %s: scales of one expert matrix lie in several nested blocks of %d, shared with others, expected "
                             "blocks of its own: load it without double quantisation, which restores them",
                             espi_st_path(from->absmax->file), from->absmax->name, ESPI_NESTED_BLOCK);
        ESPI_TRY(espi_loader_read(from->nested, (float *)s->nested + part * s->part_nested + j, begin / ESPI_NESTED_BLOCK, 1));
    }
    ((float *)s->offset)[part] = from->offset;
    return espi_st_read(from->absmax, (uint8_t *)s->absmax8 + part * s->part_blocks, (uint64_t)first, (size_t)s->part_blocks);
}

/* ---- what the loader asks for ---- */

/* Matrix `part` of the stack is that which begins at element `first` of a stored one. */
static esp_status take_part(espi_loader *loader, const espi_stack *s, int64_t part, const espi_st_tensor *codes, const scales *from,
                            int64_t first) {
    const int64_t block = first / ESPI_QBLOCK;
    ESPI_TRY(espi_st_read(codes, (uint8_t *)s->data + (size_t)part * s->part_bytes, (uint64_t)first / 2, s->part_bytes));
    if (s->absmax8 && from->nested) return keep_nested(loader, s, part, from, block);
    float *absmax = s->absmax8 ? loader->absmax : (float *)s->absmax + part * s->part_blocks;
    ESPI_TRY(read_scales(absmax, from, block, s->part_blocks, loader->raw, loader->raw_bytes));
    return s->absmax8 ? espi_loader_shrink_absmax(loader, s, part) : ESP_OK;
}

/* One matrix of a stack that is stored by itself: all that is said of it, and its codes, are what they must be. */
static esp_status open_part(espi_loader *loader, const espi_st_tensor **codes, scales *from, const espi_stack *s, const char *name) {
    const int64_t dims[] = {s->rows / s->parts, s->cols};
    quant_state state;
    ESPI_TRY(read_state(&state, loader, name));
    ESPI_TRY(check_format(&state, loader, s, name));
    ESPI_TRY(check_state(&state, loader, name, 2, dims));
    ESPI_TRY(check_table(loader, s->format, name));
    ESPI_TRY(need_codes(loader, codes, name, dims[0] * dims[1]));
    return open_scales(loader, from, &state, name, s->part_blocks);
}

esp_status espi_bnb_expect_part(espi_loader *loader, const espi_stack *s, const char *name) {
    const espi_st_tensor *codes;
    scales from;
    return open_part(loader, &codes, &from, s, name);
}

esp_status espi_bnb_load_part(espi_loader *loader, const espi_stack *s, int64_t part, const char *name) {
    const espi_st_tensor *codes;
    scales from;
    ESPI_TRY(open_part(loader, &codes, &from, s, name));
    return take_part(loader, s, part, codes, &from, 0);
}

esp_status espi_bnb_load_fused(espi_loader *loader, const espi_stack *s, const char *name) {
    const espi_share *share = &loader->model->share;
    const int64_t dims[] = {share->experts, s->rows, s->cols}, n = s->rows / s->parts * s->cols, parts = share->experts * s->parts;
    quant_state state;
    const espi_st_tensor *codes;
    scales from;
    ESPI_TRY(read_state(&state, loader, name));
    ESPI_TRY(check_format(&state, loader, s, name));
    ESPI_TRY(check_state(&state, loader, name, 3, dims));
    if (n % ESPI_QBLOCK != 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "%s: tensor %s: a block of %d values belongs to two matrices of %lld values, expected whole blocks in each: "
                         "quantise the 16-bit checkpoint",
                         espi_st_set_path(loader->set), name, ESPI_QBLOCK, (long long)n);
    ESPI_TRY(check_table(loader, s->format, name));
    ESPI_TRY(need_codes(loader, &codes, name, parts * n));
    ESPI_TRY(open_scales(loader, &from, &state, name, parts * s->part_blocks));
    for (int64_t e = 0; e < s->experts; e++) {
        const espi_stack one = espi_loader_expert(loader, s, e);
        for (int64_t p = 0; p < s->parts; p++) ESPI_TRY(take_part(loader, &one, p, codes, &from, ((share->first + e) * s->parts + p) * n));
        ESPI_TRY(espi_loader_expert_done(loader, s, e, &one));
    }
    return ESP_OK;
}

esp_status espi_bnb_load_dense(espi_loader *loader, const espi_mat *to, const char *name) {
    const int64_t n = to->rows * to->cols;
    quant_state state;
    const espi_st_tensor *codes;
    scales from;
    ESPI_TRY(read_state(&state, loader, name));
    ESPI_TRY(check_state(&state, loader, name, 2, (int64_t[]){to->rows, to->cols}));
    ESPI_TRY(check_table(loader, state.format, name));
    ESPI_TRY(need_codes(loader, &codes, name, n));
    ESPI_TRY(open_scales(loader, &from, &state, name, (n + ESPI_QBLOCK - 1) / ESPI_QBLOCK));
    /* The staging buffer: scales of a piece, room to restore them in, and from the middle on the codes, the values, and room for them in
     * the dtype that is held. */
    const int64_t most = (int64_t)loader->raw_bytes / 32 / ESPI_QBLOCK * ESPI_QBLOCK;
    float *absmax = (float *)(void *)loader->raw;
    unsigned char *middle = loader->raw + loader->raw_bytes / 2;
    float *values = (float *)(void *)(middle + most / 2);
    for (int64_t done = 0; done < n;) {
        const int64_t m = n - done < most ? n - done : most, blocks = (m + ESPI_QBLOCK - 1) / ESPI_QBLOCK;
        ESPI_TRY(espi_st_read(codes, middle, (uint64_t)done / 2, (size_t)(m + 1) / 2));
        ESPI_TRY(
            read_scales(absmax, &from, done / ESPI_QBLOCK, blocks, absmax + blocks, (size_t)(middle - (unsigned char *)(absmax + blocks))));
        ESPI_TRY(esp_dequantize(values, middle, absmax, m, ESPI_QBLOCK, state.format));
        ESPI_TRY(espi_loader_store(loader, (unsigned char *)to->data + (size_t)done * esp_dtype_size(to->dtype), to->dtype, values, ESP_F32,
                                   m, values + most));
        done += m;
    }
    return ESP_OK;
}
