/* Checkpoint files: see checkpoint.h. */
#include "io/checkpoint.h"
#include "core/ctx.h"
#include "core/status.h"
#include "io/file.h"
#include "io/quiet_hdf5.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define GROW ((size_t)1 << 20)
#define MAX_CHECKPOINT ((size_t)1 << 40)

/* Behind the HDF5 image, which other readers of HDF5 do not mind. */
typedef struct trailer {
    char magic[8];
    uint64_t hash; /* XXH64 of all that stands before, seed 0 */
} trailer;
static const char trailer_magic[8] = {'E', 'S', 'P', 'C', 'K', 'P', 'T', '1'};

struct espi_checkpoint {
    char path[ESPI_PATH_MAX];
    char *image;
    hid_t file;
};

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

/* A file that lives in memory; image NULL: a new one. */
static hid_t open_in_memory(void *image, size_t bytes) {
    const hid_t access = H5Pcreate(H5P_FILE_ACCESS);
    if (access < 0) return H5I_INVALID_HID;
    hid_t file = H5I_INVALID_HID;
    if (H5Pset_fapl_core(access, GROW, 0) >= 0) {
        if (!image)
            file = H5Fcreate("checkpoint", H5F_ACC_TRUNC, H5P_DEFAULT, access);
        else if (H5Pset_file_image(access, image, bytes) >= 0)
            file = H5Fopen("checkpoint", H5F_ACC_RDONLY, access);
    }
    H5Pclose(access);
    return file;
}

static herr_t put(hid_t file, hid_t links, const espi_saved_array *a) {
    const hsize_t count = (hsize_t)a->count;
    const hid_t type = memory_type(a->dtype);
    const hid_t space = H5Screate_simple(1, &count, NULL);
    const hid_t set = space < 0 ? H5I_INVALID_HID : H5Dcreate2(file, a->name, type, space, links, H5P_DEFAULT, H5P_DEFAULT);
    herr_t result = set < 0 ? -1 : count == 0 ? 0 : H5Dwrite(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, a->data);
    if (set >= 0 && H5Dclose(set) < 0) result = -1;
    if (space >= 0) H5Sclose(space);
    return result;
}

/* The array as HDF5 can read it: itself, or a copy in host memory, to be freed. */
static esp_status on_host(espi_saved_array *out, void **copy, const espi_saved_array *a, const char *path) {
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
    const hid_t links = H5Pcreate(H5P_LINK_CREATE);
    esp_status status = ESP_OK;
    if (links < 0 || H5Pset_create_intermediate_group(links, 1) < 0)
        status = ESPI_FAIL(ESP_ERR_MEMORY, "%s: HDF5 has no memory for a property list", path);
    for (size_t i = 0; i < n && status == ESP_OK; i++) {
        espi_saved_array array;
        void *copy;
        status = on_host(&array, &copy, &arrays[i], path);
        if (status == ESP_OK && put(file, links, &array) < 0)
            status = ESPI_FAIL(ESP_ERR_MEMORY, "%s: HDF5 could not take array \"%s\" (%s, %lld values) into memory", path, arrays[i].name,
                               esp_dtype_name(arrays[i].dtype), (long long)arrays[i].count);
        free(copy);
    }
    if (links >= 0) H5Pclose(links);
    return status;
}

/* The file's bytes and the trailer behind them; free() it. */
static esp_status take_image(char **image, size_t *bytes, hid_t file, const char *path) {
    const ssize_t size = H5Fflush(file, H5F_SCOPE_GLOBAL) < 0 ? -1 : H5Fget_file_image(file, NULL, 0);
    if (size <= 0) return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: HDF5 gives no image of the checkpoint", path);
    *bytes = (size_t)size + sizeof(trailer);
    *image = malloc(*bytes);
    if (!*image) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a checkpoint of %zu bytes", path, *bytes);
    if (H5Fget_file_image(file, *image, (size_t)size) != size) {
        free(*image);
        return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: HDF5 gives no image of the checkpoint", path);
    }
    trailer end = {.hash = XXH64(*image, (size_t)size, 0)};
    memcpy(end.magic, trailer_magic, sizeof end.magic);
    memcpy(*image + size, &end, sizeof end);
    return ESP_OK;
}

static esp_status make_image(char **image, size_t *bytes, const char *path, const espi_saved_array *arrays, size_t n) {
    const hid_t file = open_in_memory(NULL, 0);
    if (file < 0) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: HDF5 cannot make a file in memory", path);
    esp_status status = fill(file, path, arrays, n);
    if (status == ESP_OK) status = take_image(image, bytes, file, path);
    H5Fclose(file);
    return status;
}

esp_status espi_checkpoint_write(const char *path, const espi_saved_array *arrays, size_t n) {
    char *image = NULL;
    size_t bytes = 0;
    const espi_quiet before = espi_quiet_begin();
    const esp_status made = make_image(&image, &bytes, path, arrays, n);
    espi_quiet_end(before);
    ESPI_TRY(made);
    const esp_status status = espi_file_write_atomic(path, image, bytes);
    free(image);
    return status;
}

static esp_status check_image(const char *path, const char *image, size_t bytes) {
    trailer end;
    if (bytes <= sizeof end) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got %zu bytes, expected a checkpoint: take an older one", path, bytes);
    memcpy(&end, image + bytes - sizeof end, sizeof end);
    if (memcmp(end.magic, trailer_magic, sizeof end.magic) != 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no checkpoint's end mark at byte %zu: the file is truncated or no checkpoint", path,
                         bytes - sizeof end);
    const uint64_t hash = XXH64(image, bytes - sizeof end, 0);
    if (hash != end.hash)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: got checksum %016llx, expected %016llx: the file is damaged, take an older one", path,
                         (unsigned long long)hash, (unsigned long long)end.hash);
    return ESP_OK;
}

esp_status espi_checkpoint_open(espi_checkpoint **checkpoint, const char *path) {
    size_t bytes;
    *checkpoint = NULL;
    espi_checkpoint *c = calloc(1, sizeof *c);
    if (!c) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a checkpoint's bookkeeping", path);
    c->file = H5I_INVALID_HID;
    esp_status status = espi_file_read_all(&c->image, &bytes, path, MAX_CHECKPOINT);
    if (status == ESP_OK) status = check_image(path, c->image, bytes);
    if (status == ESP_OK) {
        memcpy(c->path, path, strlen(path) + 1); /* it was opened, so it fits */
        const espi_quiet before = espi_quiet_begin();
        c->file = open_in_memory(c->image, bytes - sizeof(trailer));
        espi_quiet_end(before);
        if (c->file < 0) status = ESPI_FAIL(ESP_ERR_FORMAT, "%s: HDF5 does not read it", path);
    }
    if (status != ESP_OK) {
        espi_checkpoint_close(c);
        return status;
    }
    *checkpoint = c;
    return ESP_OK;
}

void espi_checkpoint_close(espi_checkpoint *checkpoint) {
    if (!checkpoint) return;
    if (checkpoint->file >= 0) H5Fclose(checkpoint->file);
    free(checkpoint->image);
    free(checkpoint);
}

/* Opens the dataset and measures it. */
static esp_status find(hid_t *set, int64_t *count, const espi_checkpoint *c, const char *name, esp_dtype dtype) {
    const espi_quiet before = espi_quiet_begin();
    bool same = false;
    *count = -1;
    *set = H5Dopen2(c->file, name, H5P_DEFAULT);
    if (*set >= 0) {
        const hid_t space = H5Dget_space(*set), type = H5Dget_type(*set);
        if (space >= 0) *count = (int64_t)H5Sget_simple_extent_npoints(space);
        same = type >= 0 && H5Tequal(type, memory_type(dtype)) > 0;
        if (space >= 0) H5Sclose(space);
        if (type >= 0) H5Tclose(type);
    }
    espi_quiet_end(before);
    if (*set < 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no array \"%s\", expected one", c->path, name);
    if (same && *count >= 0) return ESP_OK;
    H5Dclose(*set);
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: array \"%s\" has another type, expected %s", c->path, name, esp_dtype_name(dtype));
}

esp_status espi_checkpoint_count(int64_t *count, const espi_checkpoint *checkpoint, const char *name, esp_dtype dtype) {
    hid_t set;
    ESPI_TRY(find(&set, count, checkpoint, name, dtype));
    H5Dclose(set);
    return ESP_OK;
}

esp_status espi_checkpoint_read(const espi_checkpoint *checkpoint, const espi_saved_array *into) {
    hid_t set;
    int64_t count;
    ESPI_TRY(find(&set, &count, checkpoint, into->name, into->dtype));
    herr_t result = 0;
    if (count == into->count && count > 0) {
        const espi_quiet before = espi_quiet_begin();
        result = H5Dread(set, memory_type(into->dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, into->data);
        espi_quiet_end(before);
    }
    H5Dclose(set);
    if (count != into->count)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: array \"%s\" has %lld values, expected %lld", checkpoint->path, into->name, (long long)count,
                         (long long)into->count);
    if (result < 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: HDF5 cannot read array \"%s\"", checkpoint->path, into->name);
    return ESP_OK;
}
