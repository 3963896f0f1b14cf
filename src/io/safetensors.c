/* safetensors: reading by ranges with every check the format calls for, folders of shards, and the writer. */
#include "io/safetensors.h"

#include "core/status.h"
#include "io/file.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <jansson.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_HEADER 100000000u /* the reference reader's cap */
#define MAX_NESTING 4
#define MAX_INDEX ((size_t)256 << 20)
#define INDEX_NAME "model.safetensors.index.json"
#define SINGLE_NAME "model.safetensors"

/* Every dtype of the format, in the reference writer's ascending order (it writes descending). */
static const struct format_dtype {
    const char *name;
    unsigned bits;
    esp_dtype dtype;
} format_dtypes[] = {{"BOOL", 8, ESP_BOOL},
                     {"F4", 4, ESP_DTYPE_NONE},
                     {"F6_E2M3", 6, ESP_DTYPE_NONE},
                     {"F6_E3M2", 6, ESP_DTYPE_NONE},
                     {"U8", 8, ESP_U8},
                     {"I8", 8, ESP_I8},
                     {"F8_E5M2", 8, ESP_DTYPE_NONE},
                     {"F8_E4M3", 8, ESP_F8_E4M3},
                     {"F8_E8M0", 8, ESP_DTYPE_NONE},
                     {"F8_E4M3FNUZ", 8, ESP_DTYPE_NONE},
                     {"F8_E5M2FNUZ", 8, ESP_DTYPE_NONE},
                     {"I16", 16, ESP_I16},
                     {"U16", 16, ESP_U16},
                     {"F16", 16, ESP_F16},
                     {"BF16", 16, ESP_BF16},
                     {"I32", 32, ESP_I32},
                     {"U32", 32, ESP_U32},
                     {"F32", 32, ESP_F32},
                     {"C64", 64, ESP_DTYPE_NONE},
                     {"F64", 64, ESP_F64},
                     {"I64", 64, ESP_I64},
                     {"U64", 64, ESP_U64}};

struct espi_st_file {
    char *path;
    int fd;
    bool forget;    /* what has been read leaves the page cache */
    json_t *header; /* owns the names */
    espi_st_tensor *tensors;
    size_t n;
};

struct espi_st_set {
    char path[ESPI_PATH_MAX];
    espi_st_file **files;
    size_t n_files;
    const espi_st_tensor **tensors;
    size_t n;
};

static esp_status pread_full(int fd, void *buffer, size_t bytes, uint64_t offset, const char *path) {
    char *p = buffer;
    while (bytes > 0) {
        ssize_t n = pread(fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return ESPI_FAIL(ESP_ERR_IO, "%s: cannot read %zu bytes at %" PRIu64 ": %s", path, bytes, offset, strerror(errno));
        if (n == 0)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: ends at byte %" PRIu64 ", expected %zu bytes more: truncated", path, offset, bytes);
        p += n;
        bytes -= (size_t)n;
        offset += (uint64_t)n;
    }
    return ESP_OK;
}

/* The JSON parser recurses and keeps every level: bound the depth before it starts.  Brackets inside strings do not count. */
static int nesting(const char *text, size_t n) {
    int depth = 0, deepest = 0;
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (in_string && c == '\\')
            i++;
        else if (c == '"')
            in_string = !in_string;
        else if (!in_string && (c == '{' || c == '['))
            deepest = ++depth > deepest ? depth : deepest;
        else if (!in_string && (c == '}' || c == ']'))
            depth--;
    }
    return deepest;
}

static const struct format_dtype *find_dtype(const char *name) {
    for (int i = 0; i < ESPI_COUNT(format_dtypes); i++)
        if (strcmp(format_dtypes[i].name, name) == 0) return &format_dtypes[i];
    return NULL;
}

/* a * b, or false when it passes 64 bits. */
static bool multiply(uint64_t *product, uint64_t a, uint64_t b) {
    if (a != 0 && b > UINT64_MAX / a) return false;
    *product = a * b;
    return true;
}

static bool whole_number(const json_t *value, int64_t *out) {
    if (!json_is_integer(value) || json_integer_value(value) < 0) return false;
    *out = (int64_t)json_integer_value(value);
    return true;
}

/* Fills everything but `file`; begin and end are counted from the start of the data. */
static esp_status read_entry(espi_st_tensor *t, const char *path, const char *name, const json_t *entry) {
    const json_t *dtype = json_object_get(entry, "dtype"), *shape = json_object_get(entry, "shape");
    const json_t *offsets = json_object_get(entry, "data_offsets");
    if (!json_is_string(dtype) || !json_is_array(shape) || !json_is_array(offsets))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: malformed entry, expected \"dtype\", \"shape\" and \"data_offsets\"", path, name);
    const struct format_dtype *known = find_dtype(json_string_value(dtype));
    if (!known)
        return ESPI_FAIL(ESP_ERR_FORMAT,
                         "%s: tensor %s: unknown dtype \"%s\", expected one of the safetensors format (F32, BF16, F16, U8, ...)", path,
                         name, json_string_value(dtype));
    size_t rank = json_array_size(shape);
    if (rank > ESP_MAX_RANK)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: %zu dimensions, expected at most %d", path, name, rank, ESP_MAX_RANK);
    *t = (espi_st_tensor){.name = name, .dtype_name = known->name, .dtype = known->dtype, .rank = (int)rank};
    uint64_t count = 1, bits;
    for (size_t i = 0; i < rank; i++) {
        if (!whole_number(json_array_get(shape, i), &t->dims[i]))
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: dimension %zu is not a whole number from 0 to 2^63-1", path, name, i);
        if (!multiply(&count, count, (uint64_t)t->dims[i]))
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: the product of its dimensions passes 64 bits", path, name);
    }
    if (!multiply(&bits, count, known->bits))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: its size in bits passes 64 bits", path, name);
    if (bits % 8 != 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: %" PRIu64 " bits, expected whole bytes", path, name, bits);
    int64_t begin, end;
    if (json_array_size(offsets) != 2 || !whole_number(json_array_get(offsets, 0), &begin) ||
        !whole_number(json_array_get(offsets, 1), &end))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: data_offsets are not two whole numbers from 0 to 2^63-1", path, name);
    if (end < begin)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: data_offsets end at %" PRId64 " before their begin %" PRId64, path, name, end,
                         begin);
    t->offset = (uint64_t)begin;
    t->bytes = (uint64_t)(end - begin);
    if (t->bytes != bits / 8)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: data_offsets span %" PRIu64 " bytes, expected %" PRIu64 " for its dtype and shape",
                         path, name, t->bytes, bits / 8);
    return ESP_OK;
}

static int by_offset(const void *a, const void *b) {
    const espi_st_tensor *x = a, *y = b;
    if (x->offset != y->offset) return x->offset < y->offset ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

static int by_name(const void *a, const void *b) {
    const espi_st_tensor *x = a, *y = b;
    return strcmp(x->name, y->name);
}

/* The tensors must tile the data: no hole, no overlap, nothing behind.  Leaves them sorted by name, with offsets of the file. */
static esp_status check_tiling(espi_st_file *f, uint64_t data_start, uint64_t data_bytes) {
    if (f->n > 1) qsort(f->tensors, f->n, sizeof *f->tensors, by_offset);
    uint64_t at = 0;
    for (size_t i = 0; i < f->n; i++) {
        espi_st_tensor *t = &f->tensors[i];
        if (t->offset != at)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s begins at data byte %" PRIu64 ", expected %" PRIu64 ": tensors %s", f->path,
                             t->name, t->offset, at, t->offset < at ? "overlap" : "leave a hole");
        at += t->bytes;
        t->offset += data_start;
        t->file = f;
    }
    if (at != data_bytes)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %" PRIu64 " bytes of data, expected %" PRIu64 ": the file is %s", f->path, data_bytes, at,
                         data_bytes < at ? "truncated" : "longer than its tensors");
    if (f->n > 1) qsort(f->tensors, f->n, sizeof *f->tensors, by_name);
    return ESP_OK;
}

static esp_status check_metadata(const char *path, json_t *metadata) {
    if (!json_is_object(metadata)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: __metadata__ is not an object, expected strings by name", path);
    const char *key;
    json_t *value;
    json_object_foreach(metadata, key, value) {
        if (!json_is_string(value)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: __metadata__ \"%s\" is not a string, expected one", path, key);
    }
    return ESP_OK;
}

static esp_status read_header(espi_st_file *f, const char *text, size_t n, uint64_t file_bytes) {
    int depth = nesting(text, n);
    if (depth > MAX_NESTING)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: header nested %d deep, expected at most %d", f->path, depth, MAX_NESTING);
    json_error_t error;
    f->header = json_loadb(text, n, JSON_REJECT_DUPLICATES, &error);
    if (!f->header)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: header byte %d of %zu: %s: not valid JSON", f->path, error.position, n, error.text);
    if (!json_is_object(f->header)) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: header is not a JSON object, expected one", f->path);
    size_t keys = json_object_size(f->header);
    f->tensors = calloc(keys + 1, sizeof *f->tensors);
    if (!f->tensors) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the entries of %zu tensors", f->path, keys);
    const char *name;
    json_t *entry;
    json_object_foreach(f->header, name, entry) {
        if (strcmp(name, "__metadata__") == 0)
            ESPI_TRY(check_metadata(f->path, entry));
        else
            ESPI_TRY(read_entry(&f->tensors[f->n++], f->path, name, entry));
    }
    return check_tiling(f, 8 + n, file_bytes - 8 - n);
}

static esp_status open_and_check(espi_st_file *f) {
    f->fd = open(f->path, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (f->fd < 0 || fstat(f->fd, &st) != 0) return ESPI_FAIL(ESP_ERR_IO, "%s: cannot open: %s", f->path, strerror(errno));
    if (!S_ISREG(st.st_mode)) return ESPI_FAIL(ESP_ERR_IO, "%s: not a regular file, expected a safetensors file", f->path);
    uint64_t file_bytes = (uint64_t)st.st_size, n = 0;
    unsigned char prefix[8];
    if (file_bytes < sizeof prefix)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %" PRIu64 " bytes, expected at least 8: not a safetensors file", f->path, file_bytes);
    ESPI_TRY(pread_full(f->fd, prefix, sizeof prefix, 0, f->path));
    for (int i = 7; i >= 0; i--) n = n << 8 | prefix[i];
    if (n > MAX_HEADER)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: header of %" PRIu64 " bytes, expected at most %u: not a safetensors file", f->path, n,
                         MAX_HEADER);
    if (n > file_bytes - 8)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %" PRIu64 " bytes, expected at least %" PRIu64 " for its header: truncated", f->path,
                         file_bytes, 8 + n);
    char *text = malloc((size_t)n + 1);
    if (!text) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a header of %" PRIu64 " bytes", f->path, n);
    esp_status status = pread_full(f->fd, text, (size_t)n, 8, f->path);
    if (status == ESP_OK) status = read_header(f, text, (size_t)n, file_bytes);
    free(text);
    return status;
}

esp_status espi_st_open(espi_st_file **file, const char *path) {
    espi_st_file *f = calloc(1, sizeof *f);
    if (!f || !(f->path = malloc(strlen(path) + 1))) {
        free(f);
        return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory to open it", path);
    }
    memcpy(f->path, path, strlen(path) + 1);
    f->fd = -1;
    esp_status status = open_and_check(f);
    if (status != ESP_OK) {
        espi_st_close(f);
        return status;
    }
    *file = f;
    return ESP_OK;
}

void espi_st_close(espi_st_file *file) {
    if (!file) return;
    if (file->forget) (void)posix_fadvise(file->fd, 0, 0, POSIX_FADV_DONTNEED);
    if (file->fd >= 0) close(file->fd);
    json_decref(file->header);
    free(file->tensors);
    free(file->path);
    free(file);
}

const char *espi_st_path(const espi_st_file *file) {
    return file->path;
}
size_t espi_st_count(const espi_st_file *file) {
    return file->n;
}
const espi_st_tensor *espi_st_at(const espi_st_file *file, size_t i) {
    return i < file->n ? &file->tensors[i] : NULL;
}

const espi_st_tensor *espi_st_find(const espi_st_file *file, const char *name) {
    espi_st_tensor key = {.name = name};
    return file->n > 0 ? bsearch(&key, file->tensors, file->n, sizeof key, by_name) : NULL;
}

const char *espi_st_metadata(const espi_st_file *file, const char *key) {
    return json_string_value(json_object_get(json_object_get(file->header, "__metadata__"), key));
}

esp_status espi_st_read(const espi_st_tensor *tensor, void *buffer, uint64_t first, size_t bytes) {
    const espi_st_file *f = tensor->file;
    if (first > tensor->bytes || bytes > tensor->bytes - first)
        return ESPI_FAIL(ESP_ERR_ARG, "%s: tensor %s: %zu bytes from byte %" PRIu64 " asked for, it has %" PRIu64, f->path, tensor->name,
                         bytes, first, tensor->bytes);
    ESPI_TRY(pread_full(f->fd, buffer, bytes, tensor->offset + first, f->path));
    /* All up to here: of the pages just read some are still held, and go with the next.  Advice, whose failure changes nothing. */
    if (f->forget) (void)posix_fadvise(f->fd, 0, (off_t)(tensor->offset + first + bytes), POSIX_FADV_DONTNEED);
    return ESP_OK;
}

void espi_dims_text(char out[ESPI_DIMS_TEXT], int rank, const int64_t *dims) {
    size_t at = 0;
    out[at++] = '[';
    for (int i = 0; i < rank && at < ESPI_DIMS_TEXT; i++)
        at += (size_t)snprintf(out + at, ESPI_DIMS_TEXT - at, "%s%" PRId64, i > 0 ? "," : "", dims[i]);
    snprintf(out + at, ESPI_DIMS_TEXT - at, "]"); /* eight numbers of 20 digits fit */
}

esp_status espi_st_expect(const espi_st_tensor *tensor, esp_dtype dtype, int rank, const int64_t *dims) {
    const char *path = tensor->file->path;
    if (dtype != ESP_DTYPE_NONE && dtype != tensor->dtype)
        return ESPI_FAIL(ESP_ERR_DTYPE, "%s: tensor %s: dtype %s, expected %s", path, tensor->name, tensor->dtype_name,
                         esp_dtype_name(dtype));
    if (rank == tensor->rank && memcmp(dims, tensor->dims, (size_t)rank * sizeof *dims) == 0) return ESP_OK;
    char got[ESPI_DIMS_TEXT], expected[ESPI_DIMS_TEXT];
    espi_dims_text(got, tensor->rank, tensor->dims);
    espi_dims_text(expected, rank, dims);
    return ESPI_FAIL(ESP_ERR_SHAPE, "%s: tensor %s: shape %s, expected %s", path, tensor->name, got, expected);
}

/* ---- a folder ---- */

static int pointers_by_name(const void *a, const void *b) {
    const espi_st_tensor *const *x = a, *const *y = b;
    return strcmp((*x)->name, (*y)->name);
}

/* All tensors of all files, by name; a name twice is two shards that both claim it. */
static esp_status collect(espi_st_set *set) {
    size_t total = 0;
    for (size_t i = 0; i < set->n_files; i++) total += set->files[i]->n;
    set->tensors = calloc(total + 1, sizeof *set->tensors);
    if (!set->tensors) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of %zu tensors", set->path, total);
    for (size_t i = 0; i < set->n_files; i++)
        for (size_t j = 0; j < set->files[i]->n; j++) set->tensors[set->n++] = &set->files[i]->tensors[j];
    if (set->n > 1) qsort(set->tensors, set->n, sizeof *set->tensors, pointers_by_name);
    for (size_t i = 1; i < set->n; i++)
        if (strcmp(set->tensors[i - 1]->name, set->tensors[i]->name) == 0)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s is in two shards, %s and %s, expected in one", set->path, set->tensors[i]->name,
                             set->tensors[i - 1]->file->path, set->tensors[i]->file->path);
    return ESP_OK;
}

/* The opened shard of that name, or NULL. */
static espi_st_file *opened(const espi_st_set *set, const char *path) {
    for (size_t i = set->n_files; i-- > 0;) /* the map is mostly in order: the last one is the likely one */
        if (strcmp(set->files[i]->path, path) == 0) return set->files[i];
    return NULL;
}

static esp_status open_shards(espi_st_set *set, const char *dir, const json_t *map) {
    set->files = calloc(json_object_size(map) + 1, sizeof(espi_st_file *));
    if (!set->files) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a list of shards", set->path);
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)map, name, value) {
        const char *shard = json_string_value(value);
        if (!shard) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: its shard is not a string, expected a file name", set->path, name);
        if (strchr(shard, '/') || strchr(shard, '\\') || strstr(shard, "..") || !*shard)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s: shard \"%s\", expected a plain file name of this folder", set->path, name,
                             shard);
        char path[ESPI_PATH_MAX];
        ESPI_TRY(espi_path_join(path, dir, shard));
        espi_st_file *file = opened(set, path);
        if (!file) {
            ESPI_TRY(espi_st_open(&file, path));
            for (size_t i = 0; i < file->n; i++) file->tensors[i].unmapped = true;
            set->files[set->n_files++] = file;
        }
        espi_st_tensor key = {.name = name};
        espi_st_tensor *t = file->n > 0 ? bsearch(&key, file->tensors, file->n, sizeof key, by_name) : NULL;
        if (!t) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: tensor %s is not in %s, expected there by the index", set->path, name, path);
        t->unmapped = false;
    }
    return ESP_OK;
}

static esp_status open_index(espi_st_set *set, const char *dir) {
    char *text;
    size_t bytes;
    ESPI_TRY(espi_file_read_all(&text, &bytes, set->path, MAX_INDEX));
    json_error_t error;
    json_t *root = nesting(text, bytes) > 64 ? NULL : json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    free(text);
    json_t *map = json_object_get(root, "weight_map");
    esp_status status =
        !root ? ESPI_FAIL(ESP_ERR_FORMAT, "%s: not valid JSON without duplicates", set->path)
        : !json_is_object(map)
            ? ESPI_FAIL(ESP_ERR_FORMAT, "%s: \"weight_map\" is missing or no object, expected shards by tensor name", set->path)
            : open_shards(set, dir, map);
    json_decref(root);
    return status;
}

static esp_status open_set(espi_st_set *set, const char *dir) {
    char single[ESPI_PATH_MAX];
    ESPI_TRY(espi_path_join(single, dir, SINGLE_NAME));
    ESPI_TRY(espi_path_join(set->path, dir, INDEX_NAME));
    bool has_single = espi_file_exists(single), has_index = espi_file_exists(set->path);
    if (has_single && has_index)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: has both %s and %s, expected one of them: move away the one that is not meant", dir,
                         SINGLE_NAME, INDEX_NAME);
    if (!has_single && !has_index)
        return ESPI_FAIL(ESP_ERR_IO, "%s: neither %s nor %s is there, expected one of them", dir, SINGLE_NAME, INDEX_NAME);
    if (has_index) {
        ESPI_TRY(open_index(set, dir));
    } else {
        memcpy(set->path, single, sizeof single);
        set->files = calloc(1, sizeof(espi_st_file *));
        if (!set->files) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory to open it", single);
        ESPI_TRY(espi_st_open(&set->files[0], single));
        set->n_files = 1;
    }
    return collect(set);
}

esp_status espi_st_set_open(espi_st_set **set, const char *dir) {
    espi_st_set *s = calloc(1, sizeof *s);
    if (!s) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory to open it", dir);
    esp_status status = open_set(s, dir);
    if (status != ESP_OK) {
        espi_st_set_close(s);
        return status;
    }
    *set = s;
    return ESP_OK;
}

void espi_st_set_close(espi_st_set *set) {
    if (!set) return;
    for (size_t i = 0; i < set->n_files; i++) espi_st_close(set->files[i]);
    free(set->files);
    free(set->tensors);
    free(set);
}

void espi_st_set_forget(espi_st_set *set) {
    for (size_t i = 0; i < set->n_files; i++) set->files[i]->forget = true;
}
const char *espi_st_set_path(const espi_st_set *set) {
    return set->path;
}
size_t espi_st_set_count(const espi_st_set *set) {
    return set->n;
}
const espi_st_tensor *espi_st_set_at(const espi_st_set *set, size_t i) {
    return i < set->n ? set->tensors[i] : NULL;
}

static const espi_st_tensor **place_in_set(const espi_st_set *set, const char *name) {
    const espi_st_tensor key = {.name = name}, *pointer = &key;
    return set->n > 0 ? bsearch(&pointer, set->tensors, set->n, sizeof pointer, pointers_by_name) : NULL;
}

const espi_st_tensor *espi_st_set_find(const espi_st_set *set, const char *name) {
    const espi_st_tensor **found = place_in_set(set, name);
    return found ? *found : NULL;
}

size_t espi_st_set_index(const espi_st_set *set, const espi_st_tensor *tensor) {
    return (size_t)(place_in_set(set, tensor->name) - set->tensors);
}

/* ---- the writer ---- */

typedef struct plan_item {
    const espi_st_item *item;
    int order; /* place of the dtype in the format's list */
    size_t bytes;
} plan_item;

typedef struct write_plan {
    plan_item *items;
    size_t n;
    const char *path;
} write_plan;

/* Widest dtype first, then by name. */
static int in_file_order(const void *a, const void *b) {
    const plan_item *x = a, *y = b;
    if (x->order != y->order) return x->order > y->order ? -1 : 1;
    return strcmp(x->item->name, y->item->name);
}

static int items_by_name(const void *a, const void *b) {
    const plan_item *x = a, *y = b;
    return strcmp(x->item->name, y->item->name);
}

static esp_status plan_one(plan_item *p, const espi_st_item *item, const char *path) {
    p->item = item;
    p->order = -1;
    for (int i = 0; i < ESPI_COUNT(format_dtypes); i++)
        if (item->dtype != ESP_DTYPE_NONE && format_dtypes[i].dtype == item->dtype) p->order = i;
    if (p->order < 0 || item->rank < 0 || item->rank > ESP_MAX_RANK)
        return ESPI_FAIL(ESP_ERR_ARG, "%s: tensor %s: dtype %d and rank %d, expected a dtype of the format and at most %d dimensions", path,
                         item->name, (int)item->dtype, item->rank, ESP_MAX_RANK);
    uint64_t bytes = format_dtypes[p->order].bits / 8;
    for (int i = 0; i < item->rank; i++)
        if (item->dims[i] < 0 || !multiply(&bytes, bytes, (uint64_t)item->dims[i]) || bytes > INT64_MAX)
            return ESPI_FAIL(ESP_ERR_ARG, "%s: tensor %s: dimension %d is %" PRId64 ", expected one from 0 whose product fits 64 bits",
                             path, item->name, i, item->dims[i]);
    p->bytes = (size_t)bytes;
    return ESP_OK;
}

static json_t *describe(const plan_item *p, uint64_t begin) {
    json_t *dims = json_array();
    for (int i = 0; i < p->item->rank; i++) json_array_append_new(dims, json_integer(p->item->dims[i]));
    const json_int_t from = (json_int_t)begin, bytes = (json_int_t)p->bytes;
    return json_pack("{s:s, s:o, s:[I, I]}", "dtype", format_dtypes[p->order].name, "shape", dims, "data_offsets", from, from + bytes);
}

/* The length of the header's text, then the text, padded with spaces so that the data begins at a multiple of 8.  free() *out. */
static esp_status make_header(char **out, size_t *bytes, const write_plan *plan) {
    json_t *root = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    uint64_t at = 0;
    bool good = root != NULL;
    for (size_t i = 0; good && i < plan->n; at += plan->items[i++].bytes)
        good = json_object_set_new(root, plan->items[i].item->name, describe(&plan->items[i], at)) == 0;
    char *json = good ? json_dumps(root, JSON_COMPACT) : NULL;
    const size_t n = json ? strlen(json) : 0, padded = (n + 7) / 8 * 8;
    *out = json ? malloc(8 + padded) : NULL;
    *bytes = 8 + padded;
    if (*out) {
        for (int i = 0; i < 8; i++) (*out)[i] = (char)((uint64_t)padded >> (8 * i));
        memset(*out + 8, ' ', padded);
        memcpy(*out + 8, json, n);
    }
    free(json);
    json_decref(root);
    if (*out) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_MEMORY, "%s: cannot make the header: no memory, or a tensor name that is not UTF-8", plan->path);
}

static esp_status write_items(const write_plan *plan, espi_out *out) {
    size_t largest = 1;
    for (size_t i = 0; i < plan->n; i++)
        if (!plan->items[i].item->data && plan->items[i].bytes > largest) largest = plan->items[i].bytes;
    void *buffer = malloc(largest);
    if (!buffer) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a tensor of %zu bytes", plan->path, largest);
    esp_status status = ESP_OK;
    for (size_t i = 0; status == ESP_OK && i < plan->n; i++) {
        const plan_item *p = &plan->items[i];
        const void *data = p->item->data;
        if (!data) {
            status = p->item->fill(p->item->user, buffer, p->bytes);
            data = buffer;
        }
        if (status == ESP_OK) status = espi_out_write(out, data, p->bytes);
    }
    free(buffer);
    return status;
}

static esp_status fill_file(void *user, espi_out *out) {
    const write_plan *plan = user;
    size_t bytes;
    char *header;
    ESPI_TRY(make_header(&header, &bytes, plan));
    const esp_status status = espi_out_write(out, header, bytes);
    free(header);
    return status == ESP_OK ? write_items(plan, out) : status;
}

/* The items in the order of the file; free() plan->items, also after a failure. */
static esp_status make_plan(write_plan *plan, const char *path, const espi_st_item *items, size_t n) {
    *plan = (write_plan){.items = calloc(n + 1, sizeof(plan_item)), .n = n, .path = path};
    if (!plan->items) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the entries of %zu tensors", path, n);
    for (size_t i = 0; i < n; i++) ESPI_TRY(plan_one(&plan->items[i], &items[i], path));
    if (n > 1) qsort(plan->items, n, sizeof *plan->items, items_by_name);
    for (size_t i = 0; i < n; i++)
        if (strcmp(plan->items[i].item->name, "__metadata__") == 0 ||
            (i > 0 && strcmp(plan->items[i - 1].item->name, plan->items[i].item->name) == 0))
            return ESPI_FAIL(ESP_ERR_ARG, "%s: tensor name %s is given twice or reserved, expected distinct names", path,
                             plan->items[i].item->name);
    if (n > 1) qsort(plan->items, n, sizeof *plan->items, in_file_order);
    return ESP_OK;
}

esp_status espi_st_layout(char **header, size_t *header_bytes, uint64_t *offsets, const char *path, const espi_st_item *items, size_t n) {
    write_plan plan;
    esp_status status = make_plan(&plan, path, items, n);
    if (status == ESP_OK) status = make_header(header, header_bytes, &plan);
    uint64_t at = status == ESP_OK ? *header_bytes : 0;
    for (size_t i = 0; i < n && status == ESP_OK; at += plan.items[i++].bytes) offsets[plan.items[i].item - items] = at;
    free(plan.items);
    return status;
}

esp_status espi_st_write(const char *path, const espi_st_item *items, size_t n) {
    write_plan plan;
    esp_status status = make_plan(&plan, path, items, n);
    if (status == ESP_OK) status = espi_file_fill_atomic(path, fill_file, &plan);
    free(plan.items);
    return status;
}
