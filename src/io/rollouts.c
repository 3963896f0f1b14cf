/* Rollouts in an HDF5 file: see rollouts.h.  One table names every dataset. */
#include "io/rollouts.h"

#include "core/status.h"
#include "io/file.h"
#include "io/quiet_hdf5.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SCHEMA 1
#define CHUNK_BYTES ((hsize_t)1 << 18) /* of routed experts; small enough that HDF5's cache of 1 MiB holds what a group needs */
#define DEFLATE 4
#define MOST_RANK 3

typedef enum unit { ROW, TOKEN, KEPT } unit;
typedef enum kind { I32, I64, F32, U8, ROUTE } kind;

typedef struct column {
    const char *name;
    kind kind;
    unit unit;
    int extra; /* one element more than there are units: offsets */
    int rank;
    bool required;
} column;

static const column columns[ESPI_COLUMN_COUNT] = {
    [ESPI_COLUMN_TOKENS] = {"tokens", I32, TOKEN, 0, 1, true},
    [ESPI_COLUMN_OFFSETS] = {"seq_offsets", I64, ROW, 1, 1, true},
    [ESPI_COLUMN_PROMPT_LEN] = {"prompt_len", I32, ROW, 0, 1, true},
    [ESPI_COLUMN_GROUP_ID] = {"group_id", I64, ROW, 0, 1, true},
    [ESPI_COLUMN_REWARDS] = {"rewards", F32, ROW, 0, 2, false},
    [ESPI_COLUMN_ADVANTAGE] = {"advantage", F32, ROW, 0, 1, false},
    [ESPI_COLUMN_LOGPROB] = {"sampler_logprob", F32, TOKEN, 0, 1, false},
    [ESPI_COLUMN_LOSS_MASK] = {"loss_mask", U8, TOKEN, 0, 1, false},
    [ESPI_COLUMN_TRUNCATED] = {"truncated", U8, ROW, 0, 1, false},
    [ESPI_COLUMN_VERSION] = {"adapter_version", I64, ROW, 0, 1, false},
    [ESPI_COLUMN_ROUTES] = {"routed_experts", ROUTE, TOKEN, 0, 3, false},
    [ESPI_COLUMN_KEPT_OFFSETS] = {"kept_offsets", I64, TOKEN, 1, 1, false},
    [ESPI_COLUMN_KEPT_IDS] = {"kept_ids", I32, KEPT, 0, 1, false},
};

struct espi_rollout_file {
    char path[ESPI_PATH_MAX];
    hid_t file;
    hid_t sets[ESPI_COLUMN_COUNT];
    espi_rollout_extent extent;
    espi_rollout_facts facts;
};

static hid_t type_of(const column *c, const espi_rollout_extent *e) {
    switch (c->kind) {
    case I32:
        return H5T_NATIVE_INT32;
    case I64:
        return H5T_NATIVE_INT64;
    case F32:
        return H5T_NATIVE_FLOAT;
    case U8:
        return H5T_NATIVE_UINT8;
    case ROUTE:
        break;
    }
    return e->route_bytes == 2 ? H5T_NATIVE_UINT16 : H5T_NATIVE_UINT8;
}

static void dims_of(hsize_t dims[MOST_RANK], const column *c, const espi_rollout_extent *e) {
    const int64_t n = c->unit == ROW ? e->rows : c->unit == TOKEN ? e->tokens : e->kept;
    dims[0] = (hsize_t)n + (hsize_t)c->extra;
    dims[1] = (hsize_t)(c->rank == 2 ? e->rewards : e->layers);
    dims[2] = (hsize_t)e->top_k;
}

/* ---- writing ---- */

static hid_t creation(const column *c, const hsize_t dims[MOST_RANK], const espi_rollout_extent *e) {
    const hid_t list = H5Pcreate(H5P_DATASET_CREATE);
    const hsize_t one = dims[1] * dims[2] * (hsize_t)e->route_bytes;
    if (list < 0 || c->kind != ROUTE || dims[0] == 0 || one == 0) return list;
    const hsize_t rows = CHUNK_BYTES / one + 1;
    const hsize_t chunk[MOST_RANK] = {rows < dims[0] ? rows : dims[0], dims[1], dims[2]};
    if (H5Pset_chunk(list, MOST_RANK, chunk) >= 0 && H5Pset_deflate(list, DEFLATE) >= 0) return list;
    H5Pclose(list);
    return H5I_INVALID_HID;
}

static herr_t write_set(hid_t parent, const char *name, hid_t type, hid_t space, hid_t list, const void *data, bool empty) {
    const hid_t set = space < 0 || list < 0 ? H5I_INVALID_HID : H5Dcreate2(parent, name, type, space, H5P_DEFAULT, list, H5P_DEFAULT);
    herr_t result = set < 0 ? -1 : empty ? 0 : H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data);
    if (set >= 0 && H5Dclose(set) < 0) result = -1;
    if (space >= 0) H5Sclose(space);
    if (list >= 0 && list != H5P_DEFAULT) H5Pclose(list);
    return result;
}

static herr_t write_column(hid_t file, const column *c, const espi_rollout_extent *e, const void *data) {
    hsize_t dims[MOST_RANK];
    dims_of(dims, c, e);
    const bool empty = dims[0] == 0 || (c->rank > 1 && dims[1] == 0);
    return write_set(file, c->name, type_of(c, e), H5Screate_simple(c->rank, dims, NULL), creation(c, dims, e), data, empty);
}

/* UTF-8 of any length, as h5py reads and writes it; close it. */
static hid_t text_type(void) {
    const hid_t type = H5Tcopy(H5T_C_S1);
    if (type >= 0 && H5Tset_size(type, H5T_VARIABLE) >= 0 && H5Tset_cset(type, H5T_CSET_UTF8) >= 0) return type;
    if (type >= 0) H5Tclose(type);
    return H5I_INVALID_HID;
}

static herr_t write_texts(hid_t group, const char *name, const char *const *texts, int64_t n) {
    const hsize_t count = (hsize_t)n;
    const hid_t type = text_type();
    if (type < 0) return -1;
    const herr_t result = write_set(group, name, type, H5Screate_simple(1, &count, NULL), H5Pcreate(H5P_DATASET_CREATE), texts, n == 0);
    H5Tclose(type);
    return result;
}

/* n < 0: a scalar. */
static herr_t write_attribute(hid_t file, const char *name, hid_t type, const void *value, int64_t n) {
    const hsize_t count = (hsize_t)n;
    const hid_t space = n < 0 ? H5Screate(H5S_SCALAR) : H5Screate_simple(1, &count, NULL);
    const hid_t attribute = space < 0 ? H5I_INVALID_HID : H5Acreate2(file, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    herr_t result = attribute < 0 ? -1 : H5Awrite(attribute, type, value);
    if (attribute >= 0 && H5Aclose(attribute) < 0) result = -1;
    if (space >= 0) H5Sclose(space);
    return result;
}

static herr_t write_names(hid_t file, hid_t text, const espi_rollout_extent *e, const espi_rollout_facts *f) {
    const char **names = calloc((size_t)e->rewards + 1, sizeof *names);
    if (!names) return -1;
    for (int64_t i = 0; i < e->rewards; i++) names[i] = f->reward_names[i];
    const herr_t result = write_attribute(file, "reward_names", text, names, e->rewards);
    free(names);
    return result;
}

static herr_t write_facts(hid_t file, const espi_rollout_extent *e, const espi_rollout_facts *f) {
    const int64_t schema = SCHEMA;
    const struct {
        const char *name;
        const int64_t *value;
    } whole[] = {{"version", &schema},
                 {"vocab_size", &f->vocab_size},
                 {"adapter_version", &f->adapter_version},
                 {"top_k", &f->top_k},
                 {"seed", &f->seed}};
    const struct {
        const char *name;
        const double *value;
    } real[] = {{"temperature", &f->temperature}, {"top_p", &f->top_p}, {"min_p", &f->min_p}};
    const char *const texts[] = {f->tokenizer_hash, f->model_id};
    static const char *const names[] = {"tokenizer_hash", "model_id"};
    const hid_t text = text_type();
    herr_t result = text < 0 ? -1 : 0;
    for (int i = 0; i < ESPI_COUNT(whole) && result >= 0; i++)
        if (*whole[i].value >= 0) result = write_attribute(file, whole[i].name, H5T_NATIVE_INT64, whole[i].value, -1);
    for (int i = 0; i < ESPI_COUNT(real) && result >= 0; i++)
        if (!isnan(*real[i].value)) result = write_attribute(file, real[i].name, H5T_NATIVE_DOUBLE, real[i].value, -1);
    for (int i = 0; i < ESPI_COUNT(texts) && result >= 0; i++)
        if (*texts[i]) result = write_attribute(file, names[i], text, &texts[i], -1);
    if (result >= 0 && f->reward_names && e->rewards > 0) result = write_names(file, text, e, f);
    if (text >= 0) H5Tclose(text);
    return result;
}

static herr_t fill(hid_t file, const espi_rollout_extent *e, const void *const data[ESPI_COLUMN_COUNT], const char *const *prompt,
                   const char *const *completion, const espi_rollout_facts *facts) {
    herr_t result = write_facts(file, e, facts);
    for (int i = 0; i < ESPI_COLUMN_COUNT && result >= 0; i++)
        if (data[i]) result = write_column(file, &columns[i], e, data[i]);
    if (result < 0 || !prompt || !completion) return result;
    const hid_t group = H5Gcreate2(file, "text", H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    result = group < 0 ? -1 : write_texts(group, "prompt", prompt, e->rows);
    if (result >= 0) result = write_texts(group, "completion", completion, e->rows);
    if (group >= 0) H5Gclose(group);
    return result;
}

esp_status espi_rollout_file_write(const char *path, const espi_rollout_extent *extent, const void *const data[ESPI_COLUMN_COUNT],
                                   const char *const *prompt, const char *const *completion, const espi_rollout_facts *facts) {
    char temp[ESPI_PATH_MAX];
    for (int i = 0; i < ESPI_COLUMN_COUNT; i++)
        if (columns[i].required && !data[i]) return ESPI_FAIL(ESP_ERR_ARG, "%s: no /%s to write, expected one", path, columns[i].name);
    ESPI_TRY(espi_file_temp_name(temp, path));
    const espi_quiet before = espi_quiet_begin();
    const hid_t file = H5Fcreate(temp, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    herr_t result = file < 0 ? -1 : fill(file, extent, data, prompt, completion, facts);
    if (file >= 0 && H5Fclose(file) < 0) result = -1;
    espi_quiet_end(before);
    if (result >= 0) return espi_file_commit(path, temp);
    espi_file_remove(temp);
    return ESPI_FAIL(ESP_ERR_IO, "%s: HDF5 cannot write %lld rollouts there: is the folder there and the disk not full?", path,
                     (long long)extent->rows);
}

/* ---- reading ---- */

/* "int64 [3,4]" */
static void describe(char out[96], hid_t set) {
    hsize_t dims[8] = {0};
    const hid_t type = H5Dget_type(set), space = H5Dget_space(set);
    const H5T_class_t class = H5Tget_class(type);
    const int rank = H5Sget_simple_extent_ndims(space), shown = rank > 8 ? 0 : rank;
    const char *name = class == H5T_FLOAT ? "float" : class != H5T_INTEGER ? "no number" : H5Tget_sign(type) ? "int" : "uint";
    if (shown > 0) H5Sget_simple_extent_dims(space, dims, NULL);
    int n = class == H5T_FLOAT || class == H5T_INTEGER ? snprintf(out, 96, "%s%zu [", name, 8 * H5Tget_size(type))
                                                       : snprintf(out, 96, "%s [", name);
    for (int i = 0; i < shown && n < 70; i++) n += snprintf(out + n, 96 - (size_t)n, "%s%llu", i ? "," : "", (unsigned long long)dims[i]);
    snprintf(out + n, 96 - (size_t)n, "]");
    if (type >= 0) H5Tclose(type);
    if (space >= 0) H5Sclose(space);
}

static esp_status fail_column(const espi_rollout_file *f, const column *c, hid_t set) {
    static const char *const types[] = {"int32", "int64", "float32", "uint8", "uint8 or uint16"};
    static const char *const units[] = {"rows", "tokens", "kept ids"};
    static const char *const more[] = {"", ",rewards", ",layers,experts a token"};
    char got[96];
    describe(got, set);
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: /%s is %s, expected %s [%s%s%s] (rows %lld, tokens %lld): write it as that", f->path, c->name,
                     got, types[c->kind], units[c->unit], c->extra ? "+1" : "", more[c->rank - 1], (long long)f->extent.rows,
                     (long long)f->extent.tokens);
}

static bool type_fits(const column *c, hid_t set, const espi_rollout_extent *e) {
    const hid_t type = H5Dget_type(set), want = type_of(c, e);
    bool fits = H5Tget_class(type) == H5Tget_class(want) && H5Tget_size(type) == H5Tget_size(want);
    if (fits && H5Tget_class(want) == H5T_INTEGER) fits = H5Tget_sign(type) == H5Tget_sign(want);
    if (type >= 0) H5Tclose(type);
    return fits;
}

/* The extent that this column tells: those that are read first give the rows, tokens and widths that the others must have. */
static bool take_extent(espi_rollout_extent *e, espi_rollout_column id, const hsize_t *dims, hid_t set) {
    if (id == ESPI_COLUMN_TOKENS) e->tokens = (int64_t)dims[0];
    if (id == ESPI_COLUMN_PROMPT_LEN) e->rows = (int64_t)dims[0];
    if (id == ESPI_COLUMN_REWARDS) e->rewards = (int64_t)dims[1];
    if (id == ESPI_COLUMN_KEPT_IDS) e->kept = (int64_t)dims[0];
    if (id != ESPI_COLUMN_ROUTES) return true;
    const hid_t type = H5Dget_type(set);
    e->layers = (int64_t)dims[1];
    e->top_k = (int64_t)dims[2];
    e->route_bytes = (int64_t)H5Tget_size(type);
    H5Tclose(type);
    return e->route_bytes <= 2;
}

static esp_status open_column(espi_rollout_file *f, espi_rollout_column id) {
    const column *c = &columns[id];
    hsize_t dims[MOST_RANK] = {0}, want[MOST_RANK];
    if (H5Lexists(f->file, c->name, H5P_DEFAULT) <= 0)
        return c->required ? ESPI_FAIL(ESP_ERR_FORMAT, "%s: no dataset /%s, expected one: see the schema of rollouts", f->path, c->name)
                           : ESP_OK;
    const hid_t set = f->sets[id] = H5Dopen2(f->file, c->name, H5P_DEFAULT);
    if (set < 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: /%s is no dataset, expected one", f->path, c->name);
    const hid_t space = H5Dget_space(set);
    const bool ranked = H5Sget_simple_extent_ndims(space) == c->rank && H5Sget_simple_extent_dims(space, dims, NULL) >= 0;
    H5Sclose(space);
    bool fits = ranked && take_extent(&f->extent, id, dims, set) && type_fits(c, set, &f->extent);
    dims_of(want, c, &f->extent);
    for (int i = 0; i < c->rank; i++) fits = fits && dims[i] == want[i];
    return fits ? ESP_OK : fail_column(f, c, set);
}

static esp_status fail_attribute(const espi_rollout_file *f, const char *name, const char *expected) {
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: attribute \"%s\" is something else than %s, expected that or none", f->path, name, expected);
}

/* A number into *value, a native type's; left alone when the file has none. */
static esp_status read_number(const espi_rollout_file *f, const char *name, hid_t type, void *value) {
    if (H5Aexists(f->file, name) <= 0) return ESP_OK;
    const hid_t attribute = H5Aopen(f->file, name, H5P_DEFAULT), space = H5Aget_space(attribute), stored = H5Aget_type(attribute);
    const H5T_class_t class = H5Tget_class(stored), want = H5Tget_class(type);
    const bool fits = H5Sget_simple_extent_npoints(space) == 1 && (class == H5T_INTEGER || (class == H5T_FLOAT && want == H5T_FLOAT)) &&
                      H5Aread(attribute, type, value) >= 0;
    H5Tclose(stored);
    H5Sclose(space);
    H5Aclose(attribute);
    return fits ? ESP_OK : fail_attribute(f, name, want == H5T_FLOAT ? "a number" : "a whole number");
}

/* Texts of either kind, n of them, each cut to its place. */
static esp_status read_texts(const espi_rollout_file *f, const char *name, char (*out)[ESPI_ROLLOUT_TEXT], int64_t n) {
    if (H5Aexists(f->file, name) <= 0) return ESP_OK;
    const hid_t attribute = H5Aopen(f->file, name, H5P_DEFAULT), space = H5Aget_space(attribute), stored = H5Aget_type(attribute);
    const size_t size = H5Tget_size(stored);
    const bool variable = H5Tis_variable_str(stored) > 0;
    bool fits = H5Tget_class(stored) == H5T_STRING && H5Sget_simple_extent_npoints(space) == n && size < 65536;
    char *raw = fits ? calloc((size_t)n + 1, size) : NULL;
    fits = raw && H5Aread(attribute, stored, raw) >= 0;
    for (int64_t i = 0; fits && i < n; i++) {
        const char *text = raw + (size_t)i * size;
        if (variable) memcpy(&text, raw + (size_t)i * size, sizeof text);
        size_t length = 0;
        while (text && length < (variable ? ESPI_ROLLOUT_TEXT : size) && length < ESPI_ROLLOUT_TEXT - 1 && text[length]) length++;
        if (length) memcpy(out[i], text, length);
        out[i][length] = '\0';
    }
    if (fits && variable) H5Dvlen_reclaim(stored, space, H5P_DEFAULT, raw);
    free(raw);
    H5Tclose(stored);
    H5Sclose(space);
    H5Aclose(attribute);
    return fits ? ESP_OK : fail_attribute(f, name, "a text, one for each reward where they have names");
}

static esp_status read_facts(espi_rollout_file *f) {
    int64_t schema = -1;
    espi_rollout_facts *facts = &f->facts;
    ESPI_TRY(read_number(f, "version", H5T_NATIVE_INT64, &schema));
    if (schema != SCHEMA)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: attribute \"version\" is %lld (-1: absent), expected %d: the schema of rollouts", f->path,
                         (long long)schema, SCHEMA);
    ESPI_TRY(read_number(f, "vocab_size", H5T_NATIVE_INT64, &facts->vocab_size));
    ESPI_TRY(read_number(f, "adapter_version", H5T_NATIVE_INT64, &facts->adapter_version));
    ESPI_TRY(read_number(f, "top_k", H5T_NATIVE_INT64, &facts->top_k));
    ESPI_TRY(read_number(f, "seed", H5T_NATIVE_INT64, &facts->seed));
    ESPI_TRY(read_number(f, "temperature", H5T_NATIVE_DOUBLE, &facts->temperature));
    ESPI_TRY(read_number(f, "top_p", H5T_NATIVE_DOUBLE, &facts->top_p));
    ESPI_TRY(read_number(f, "min_p", H5T_NATIVE_DOUBLE, &facts->min_p));
    ESPI_TRY(read_texts(f, "tokenizer_hash", &facts->tokenizer_hash, 1));
    ESPI_TRY(read_texts(f, "model_id", &facts->model_id, 1));
    if (f->extent.rewards == 0 || H5Aexists(f->file, "reward_names") <= 0) return ESP_OK;
    facts->reward_names = calloc((size_t)f->extent.rewards, sizeof *facts->reward_names);
    if (!facts->reward_names) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the names of its rewards", f->path);
    return read_texts(f, "reward_names", facts->reward_names, f->extent.rewards);
}

static esp_status open_parts(espi_rollout_file *f) {
    static const espi_rollout_column first[] = {ESPI_COLUMN_TOKENS, ESPI_COLUMN_PROMPT_LEN};
    for (int i = 0; i < ESPI_COUNT(first); i++) ESPI_TRY(open_column(f, first[i]));
    for (int i = 0; i < ESPI_COLUMN_COUNT; i++)
        if (f->sets[i] < 0) ESPI_TRY(open_column(f, (espi_rollout_column)i));
    if (f->sets[ESPI_COLUMN_REWARDS] < 0 && f->sets[ESPI_COLUMN_ADVANTAGE] < 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: neither /rewards nor /advantage, expected one of them", f->path);
    if ((f->sets[ESPI_COLUMN_KEPT_IDS] < 0) != (f->sets[ESPI_COLUMN_KEPT_OFFSETS] < 0))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: only one of /kept_offsets and /kept_ids, expected both or none", f->path);
    return read_facts(f);
}

esp_status espi_rollout_file_open(espi_rollout_file **file, const char *path) {
    *file = NULL;
    if (!espi_file_exists(path)) return ESPI_FAIL(ESP_ERR_IO, "%s: no such file, expected rollouts in HDF5", path);
    espi_rollout_file *f = calloc(1, sizeof *f);
    if (!f) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its bookkeeping", path);
    snprintf(f->path, sizeof f->path, "%s", path);
    f->facts = (espi_rollout_facts)ESPI_ROLLOUT_FACTS_NONE;
    for (int i = 0; i < ESPI_COLUMN_COUNT; i++) f->sets[i] = H5I_INVALID_HID;
    const espi_quiet before = espi_quiet_begin();
    f->file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    const esp_status status =
        f->file >= 0 ? open_parts(f) : ESPI_FAIL(ESP_ERR_FORMAT, "%s: HDF5 does not read it: truncated, or no HDF5 file", path);
    espi_quiet_end(before);
    if (status != ESP_OK) {
        espi_rollout_file_close(f);
        return status;
    }
    *file = f;
    return ESP_OK;
}

void espi_rollout_file_close(espi_rollout_file *file) {
    if (!file) return;
    for (int i = 0; i < ESPI_COLUMN_COUNT; i++)
        if (file->sets[i] >= 0) H5Dclose(file->sets[i]);
    if (file->file >= 0) H5Fclose(file->file);
    free(file->facts.reward_names);
    free(file);
}

const char *espi_rollout_file_path(const espi_rollout_file *file) {
    return file->path;
}

const espi_rollout_extent *espi_rollout_file_extent(const espi_rollout_file *file) {
    return &file->extent;
}

const espi_rollout_facts *espi_rollout_file_facts(const espi_rollout_file *file) {
    return &file->facts;
}

bool espi_rollout_file_has(const espi_rollout_file *file, espi_rollout_column column) {
    return file->sets[column] >= 0;
}

esp_status espi_rollout_file_read(void *into, const espi_rollout_file *file, espi_rollout_column column, int64_t first, int64_t n) {
    const struct column *c = &columns[column];
    hsize_t dims[MOST_RANK];
    if (n == 0) return ESP_OK;
    dims_of(dims, c, &file->extent);
    const hsize_t start[MOST_RANK] = {(hsize_t)first, 0, 0}, count[MOST_RANK] = {(hsize_t)n, dims[1], dims[2]};
    const espi_quiet before = espi_quiet_begin();
    const hid_t stored = H5Screate_simple(c->rank, dims, NULL), memory = H5Screate_simple(c->rank, count, NULL);
    const bool read = stored >= 0 && memory >= 0 && H5Sselect_hyperslab(stored, H5S_SELECT_SET, start, NULL, count, NULL) >= 0 &&
                      H5Dread(file->sets[column], type_of(c, &file->extent), memory, stored, H5P_DEFAULT, into) >= 0;
    if (stored >= 0) H5Sclose(stored);
    if (memory >= 0) H5Sclose(memory);
    espi_quiet_end(before);
    if (read) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_IO, "%s: HDF5 cannot read %lld values of /%s from %lld on: the file is damaged", file->path, (long long)n,
                     c->name, (long long)first);
}
