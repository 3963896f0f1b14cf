/* Files of checkpoints: see checkpoint_file.h. */
#include "io/checkpoint_file.h"

#include "core/ctx.h"
#include "core/status.h"
#include "io/quiet_hdf5.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define GROW ((size_t)1 << 20)
#define MAX_CHECKPOINT ((size_t)1 << 40)

/* Behind the HDF5 image, which other readers of HDF5 do not mind.  In a file that names parts their tag stands before it. */
typedef struct trailer {
    char magic[8];
    uint64_t hash; /* XXH64 of all that stands before, seed 0 */
} trailer;
static const char plain_magic[8] = {'E', 'S', 'P', 'C', 'K', 'P', 'T', '1'}, tagged_magic[8] = {'E', 'S', 'P', 'C', 'K', 'P', 'M', '1'};

/* HDF5 as distributions build it bears one caller at a time, and ranks may be threads. */
static pthread_mutex_t one_caller = PTHREAD_MUTEX_INITIALIZER;

static espi_quiet enter(void) {
    pthread_mutex_lock(&one_caller);
    return espi_quiet_begin();
}

static void leave(espi_quiet before) {
    espi_quiet_end(before);
    pthread_mutex_unlock(&one_caller);
}

static hid_t memory_type(esp_dtype dtype) {
    switch (dtype) {
    case ESP_F32:
        return H5T_NATIVE_FLOAT;
    case ESP_F64:
        return H5T_NATIVE_DOUBLE;
    case ESP_I32:
        return H5T_NATIVE_INT32;
    case ESP_I64:
        return H5T_NATIVE_INT64;
    case ESP_U8:
        return H5T_NATIVE_UINT8;
    case ESP_U64:
        return H5T_NATIVE_UINT64;
    default:
        return H5I_INVALID_HID;
    }
}

/* A file that lives in memory; image NULL: a new one.  Each has a name of its own: HDF5 takes files of one name for the same file. */
static hid_t open_in_memory(void *image, size_t bytes) {
    static unsigned long made;
    char name[48];
    snprintf(name, sizeof name, "checkpoint %lu", made++);
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    if (access < 0) return H5I_INVALID_HID;
    hid_t file = H5I_INVALID_HID;
    if (H5Pset_fapl_core(access, GROW, 0) >= 0) {
        if (!image)
            file = H5Fcreate(name, H5F_ACC_TRUNC, H5P_DEFAULT, access);
        else if (H5Pset_file_image(access, image, bytes) >= 0)
            file = H5Fopen(name, H5F_ACC_RDONLY, access);
    }
    H5Pclose(access);
    return file;
}

/* No times: the same arrays are the same bytes. */
static herr_t put(hid_t file, hid_t links, hid_t sets, const espi_saved_array *a) {
    const hsize_t count = (hsize_t)a->count;
    const hid_t type = memory_type(a->dtype);
    const hid_t space = H5Screate_simple(1, &count, NULL);
    const hid_t set = space < 0 ? H5I_INVALID_HID : H5Dcreate2(file, a->name, type, space, links, sets, H5P_DEFAULT);
    herr_t result = set < 0 ? -1 : count == 0 ? 0 : H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, a->data);
    if (set >= 0 && H5Dclose(set) < 0) result = -1;
    if (space >= 0) H5Sclose(space);
    return result;
}

esp_status espi_saved_on_host(espi_saved_array *out, void **copy, const espi_saved_array *a, const char *path) {
    *out = *a;
    *copy = NULL;
    if (!a->ctx || !a->ctx->device || a->count == 0) return ESP_OK;
    const size_t bytes = (size_t)a->count * esp_dtype_size(a->dtype);
    *copy = malloc(bytes);
    if (!*copy) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a copy of array \"%s\" (%zu bytes)", path, a->name, bytes);
    out->data = *copy;
    return espi_ctx_get(a->ctx, *copy, a->data, bytes);
}

static esp_status fill(hid_t file, const char *path, const espi_saved_array *arrays, size_t n) {
    const hid_t links = H5Pcreate(H5P_LINK_CREATE), sets = H5Pcreate(H5P_DATASET_CREATE);
    esp_status status = ESP_OK;
    if (links < 0 || sets < 0 || H5Pset_create_intermediate_group(links, 1) < 0 || H5Pset_obj_track_times(sets, 0) < 0)
        status = ESPI_FAIL(ESP_ERR_MEMORY, "%s: HDF5 has no memory for a property list", path);
    for (size_t i = 0; i < n && status == ESP_OK; i++) {
        espi_saved_array array;
        void *copy;
        status = espi_saved_on_host(&array, &copy, &arrays[i], path);
        if (status == ESP_OK && put(file, links, sets, &array) < 0)
            status = ESPI_FAIL(ESP_ERR_MEMORY, "%s: HDF5 could not take array \"%s\" (%s, %lld values) into memory", path, arrays[i].name,
                               esp_dtype_name(arrays[i].dtype), (long long)arrays[i].count);
        free(copy);
    }
    if (links >= 0) H5Pclose(links);
    if (sets >= 0) H5Pclose(sets);
    return status;
}

/* The file's bytes, the tag if there is one, and the trailer behind them; free() it. */
static esp_status take_image(char **image, size_t *bytes, uint64_t *hash, hid_t file, const char *path, const uint64_t *tag) {
    const ssize_t size = H5Fflush(file, H5F_SCOPE_GLOBAL) < 0 ? -1 : H5Fget_file_image(file, NULL, 0);
    if (size <= 0) return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: HDF5 gives no image of the checkpoint", path);
    const size_t hashed = (size_t)size + (tag ? sizeof *tag : 0);
    *bytes = hashed + sizeof(trailer);
    *image = malloc(*bytes);
    if (!*image) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a checkpoint of %zu bytes", path, *bytes);
    if (H5Fget_file_image(file, *image, (size_t)size) != size) {
        free(*image);
        return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: HDF5 gives no image of the checkpoint", path);
    }
    if (tag) memcpy(*image + size, tag, sizeof *tag);
    trailer end = {.hash = XXH64(*image, hashed, 0)};
    memcpy(end.magic, tag ? tagged_magic : plain_magic, sizeof end.magic);
    memcpy(*image + hashed, &end, sizeof end);
    *hash = end.hash;
    return ESP_OK;
}

static esp_status make_image(char **image, size_t *bytes, uint64_t *hash, const char *path, const espi_saved_array *arrays, size_t n,
                             const uint64_t *tag) {
    const hid_t file = open_in_memory(NULL, 0);
    if (file < 0) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: HDF5 cannot make a file in memory", path);
    esp_status status = fill(file, path, arrays, n);
    if (status == ESP_OK) status = take_image(image, bytes, hash, file, path, tag);
    H5Fclose(file);
    return status;
}

esp_status espi_saved_file_write(uint64_t *hash, uint64_t *bytes, const char *path, const espi_saved_array *arrays, size_t n,
                                 const uint64_t *tag) {
    char *image = NULL;
    size_t size = 0;
    const espi_quiet before = enter();
    const esp_status made = make_image(&image, &size, hash, path, arrays, n, tag);
    leave(before);
    ESPI_TRY(made);
    const esp_status status = espi_file_write_atomic(path, image, size);
    free(image);
    *bytes = size;
    return status;
}

static bool is_tagged(const trailer *end) {
    return memcmp(end->magic, tagged_magic, sizeof end->magic) == 0;
}

/* image_bytes: of the HDF5 file before the trailer. */
static esp_status check_image(espi_saved_file *f, size_t *image_bytes, const char *path) {
    trailer end;
    if (f->bytes <= sizeof end + sizeof f->tag)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got %llu bytes, expected a checkpoint: take an older one", path,
                         (unsigned long long)f->bytes);
    const size_t hashed = (size_t)f->bytes - sizeof end;
    memcpy(&end, f->image + hashed, sizeof end);
    f->tagged = is_tagged(&end);
    if (!f->tagged && memcmp(end.magic, plain_magic, sizeof end.magic) != 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no checkpoint's end mark at byte %zu: the file is truncated or no checkpoint", path, hashed);
    f->hash = XXH64(f->image, hashed, 0);
    if (f->hash != end.hash)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got checksum %016llx, expected %016llx: the file is damaged, take an older one", path,
                         (unsigned long long)f->hash, (unsigned long long)end.hash);
    *image_bytes = hashed - (f->tagged ? sizeof f->tag : 0);
    if (f->tagged) memcpy(&f->tag, f->image + *image_bytes, sizeof f->tag);
    return ESP_OK;
}

esp_status espi_saved_file_open(espi_saved_file *f, const char *path) {
    size_t bytes, image_bytes = 0;
    *f = (espi_saved_file){.file = H5I_INVALID_HID};
    ESPI_TRY(espi_file_read_all(&f->image, &bytes, path, MAX_CHECKPOINT));
    f->bytes = bytes;
    memcpy(f->path, path, strlen(path) + 1); /* it was opened, so it fits */
    ESPI_TRY(check_image(f, &image_bytes, path));
    const espi_quiet before = enter();
    f->file = open_in_memory(f->image, image_bytes);
    leave(before);
    return f->file < 0 ? ESPI_FAIL(ESP_ERR_FORMAT, "%s: HDF5 does not read it", path) : ESP_OK;
}

void espi_saved_file_close(espi_saved_file *f) {
    if (f->file >= 0) {
        const espi_quiet before = enter();
        H5Fclose(f->file);
        leave(before);
    }
    free(f->image);
    *f = (espi_saved_file){.file = H5I_INVALID_HID};
}

bool espi_saved_file_tag(uint64_t *tag, const char *path) {
    struct {
        uint64_t tag;
        trailer end;
    } last;
    if (espi_file_read_end(&last, sizeof last, path) != ESP_OK || !is_tagged(&last.end)) return false;
    *tag = last.tag;
    return true;
}

/* Opens the dataset and measures it. */
static esp_status find(hid_t *set, int64_t *count, const espi_saved_file *f, const char *name, esp_dtype dtype) {
    bool same = false;
    *count = -1;
    *set = H5Dopen2(f->file, name, H5P_DEFAULT);
    if (*set < 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no array \"%s\", expected one", f->path, name);
    const hid_t space = H5Dget_space(*set), type = H5Dget_type(*set);
    if (space >= 0) *count = (int64_t)H5Sget_simple_extent_npoints(space);
    same = type >= 0 && H5Tequal(type, memory_type(dtype)) > 0;
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    if (same && *count >= 0) return ESP_OK;
    H5Dclose(*set);
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: array \"%s\" has another type, expected %s", f->path, name, esp_dtype_name(dtype));
}

esp_status espi_saved_file_count(int64_t *count, const espi_saved_file *f, const char *name, esp_dtype dtype) {
    hid_t set;
    const espi_quiet before = enter();
    const esp_status status = find(&set, count, f, name, dtype);
    if (status == ESP_OK) H5Dclose(set);
    leave(before);
    return status;
}

static herr_t read_values(hid_t set, void *out, esp_dtype dtype, int64_t first, int64_t count) {
    const hsize_t begin = (hsize_t)first, n = (hsize_t)count;
    const hid_t from = H5Dget_space(set), to = H5Screate_simple(1, &n, NULL);
    herr_t result = -1;
    if (from >= 0 && to >= 0 && H5Sselect_hyperslab(from, H5S_SELECT_SET, &begin, NULL, &n, NULL) >= 0)
        result = H5Dread(set, memory_type(dtype), to, from, H5P_DEFAULT, out);
    if (from >= 0) H5Sclose(from);
    if (to >= 0) H5Sclose(to);
    return result;
}

static esp_status read_array(const espi_saved_file *f, void *out, const char *name, esp_dtype dtype, int64_t first, int64_t count,
                             int64_t total) {
    hid_t set;
    int64_t has;
    ESPI_TRY(find(&set, &has, f, name, dtype));
    const herr_t result = has == total && count > 0 ? read_values(set, out, dtype, first, count) : 0;
    H5Dclose(set);
    if (has != total)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: array \"%s\" has %lld values, expected %lld", f->path, name, (long long)has,
                         (long long)total);
    return result < 0 ? ESPI_FAIL(ESP_ERR_FORMAT, "%s: HDF5 cannot read array \"%s\"", f->path, name) : ESP_OK;
}

esp_status espi_saved_file_read(const espi_saved_file *f, void *out, const char *name, esp_dtype dtype, int64_t first, int64_t count,
                                int64_t total) {
    const espi_quiet before = enter();
    const esp_status status = read_array(f, out, name, dtype, first, count, total);
    leave(before);
    return status;
}
