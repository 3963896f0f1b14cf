/* safetensors: a file, or a folder of shards, opened for reading by ranges; and a writer.
 * Opening checks everything the format promises (header, names, types, shapes, and that the tensors tile the data exactly), so whoever
 * reads a tensor afterwards need only check what the tensor is for. */
#ifndef ESPI_IO_SAFETENSORS_H
#define ESPI_IO_SAFETENSORS_H

#include "espalier/tensor.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct espi_st_file espi_st_file;

typedef struct espi_st_tensor {
    const espi_st_file *file;
    const char *name;
    const char *dtype_name; /* as the file spells it */
    esp_dtype dtype;        /* ESP_DTYPE_NONE: legal in the format, not known to this library (e.g. F8_E5M2) */
    int rank;
    int64_t dims[ESP_MAX_RANK];
    uint64_t offset, bytes; /* in the file, from its first byte; not necessarily aligned */
    bool unmapped;          /* in a shard, but not named by the index */
} espi_st_tensor;

/* One file.  ESP_ERR_IO, or ESP_ERR_FORMAT with the file, the tensor and what is wrong. */
esp_status espi_st_open(espi_st_file **file, const char *path);
void espi_st_close(espi_st_file *file); /* NULL is allowed */
const char *espi_st_path(const espi_st_file *file);
size_t espi_st_count(const espi_st_file *file);
const espi_st_tensor *espi_st_at(const espi_st_file *file, size_t i);           /* ascending by name */
const espi_st_tensor *espi_st_find(const espi_st_file *file, const char *name); /* NULL = not there */
/* Value of a string in __metadata__, or NULL. */
const char *espi_st_metadata(const espi_st_file *file, const char *key);

/* Bytes first .. first+bytes-1 of the tensor.  ESP_ERR_ARG outside of it. */
esp_status espi_st_read(const espi_st_tensor *tensor, void *buffer, uint64_t first, size_t bytes);

/* ESP_OK when the tensor has this dtype and shape, else ESP_ERR_DTYPE or ESP_ERR_SHAPE naming file, tensor, got, expected.
 * dtype ESP_DTYPE_NONE: any. */
esp_status espi_st_expect(const espi_st_tensor *tensor, esp_dtype dtype, int rank, const int64_t *dims);

/* "[2,3]", for sentences. */
#define ESPI_DIMS_TEXT 200
void espi_dims_text(char out[ESPI_DIMS_TEXT], int rank, const int64_t *dims);

/* A folder: model.safetensors, or the shards of model.safetensors.index.json. */
typedef struct espi_st_set espi_st_set;
esp_status espi_st_set_open(espi_st_set **set, const char *dir);
void espi_st_set_close(espi_st_set *set);
/* From now on what has been read leaves the page cache behind the reader: several ranks of one machine that read a large model would fill it. */
void espi_st_set_forget(espi_st_set *set);
const char *espi_st_set_path(const espi_st_set *set); /* the single file, or the index: what to name when a tensor is missing */
size_t espi_st_set_count(const espi_st_set *set);
const espi_st_tensor *espi_st_set_at(const espi_st_set *set, size_t i); /* ascending by name */
const espi_st_tensor *espi_st_set_find(const espi_st_set *set, const char *name);
size_t espi_st_set_index(const espi_st_set *set, const espi_st_tensor *tensor); /* its place in the set */

/* What to write: `data`, or `fill` when data is NULL.  fill writes the whole tensor, row-major, into buffer. */
typedef struct espi_st_item {
    const char *name;
    esp_dtype dtype;
    int rank;
    int64_t dims[ESP_MAX_RANK];
    const void *data;
    esp_status (*fill)(void *user, void *buffer, size_t bytes);
    void *user;
} espi_st_item;

/* Replaces `path` atomically.  Layout of the reference writer: __metadata__ {"format":"pt"} first, widest dtype first, then by name, header
 * padded to 8 bytes.  ESP_ERR_ARG: a duplicate name, an unknown dtype, a negative dimension. */
esp_status espi_st_write(const char *path, const espi_st_item *items, size_t n);

/* The same file, to be written in parts: header [header_bytes] is what it begins with, free() it; offsets [n]: where each item's data begins,
 * counted from the file's first byte. */
esp_status espi_st_layout(char **header, size_t *header_bytes, uint64_t *offsets, const char *path, const espi_st_item *items, size_t n);

#endif
