/* One file of a checkpoint: an HDF5 image and a trailer with its checksum.  See checkpoint.h. */
#ifndef ESPI_IO_CHECKPOINT_FILE_H
#define ESPI_IO_CHECKPOINT_FILE_H

#include "io/checkpoint.h"
#include "io/file.h"

/* Opened: the whole of it in memory. */
typedef struct espi_saved_file {
    char path[ESPI_PATH_MAX];
    char *image;
    int64_t file; /* HDF5's; negative: none */
    uint64_t hash, bytes;
    bool tagged; /* it names parts by `tag` */
    uint64_t tag;
} espi_saved_file;

/* hash, bytes [out]: those of the file.  tag: NULL, or of the parts that belong to it.  The places of the arrays in a whole do not matter. */
esp_status espi_saved_file_write(uint64_t *hash, uint64_t *bytes, const char *path, const espi_saved_array *arrays, size_t n,
                                 const uint64_t *tag);
/* espi_saved_file_close() it, also after a failure. */
esp_status espi_saved_file_open(espi_saved_file *file, const char *path);
void espi_saved_file_close(espi_saved_file *file);
esp_status espi_saved_file_count(int64_t *count, const espi_saved_file *file, const char *name, esp_dtype dtype);
/* out [count]: values first .. of the array, which has `total`. */
esp_status espi_saved_file_read(const espi_saved_file *file, void *out, const char *name, esp_dtype dtype, int64_t first, int64_t count,
                                int64_t total);
/* Is `path` a whole file that names parts, and by which tag?  Without looking at more than its end. */
bool espi_saved_file_tag(uint64_t *tag, const char *path);

/* The array in host memory: itself, or a copy, to be freed. */
esp_status espi_saved_on_host(espi_saved_array *out, void **copy, const espi_saved_array *array, const char *path);

#endif
