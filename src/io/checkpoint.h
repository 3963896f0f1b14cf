/* Checkpoints: named arrays in one HDF5 file, with a checksum behind it.
 * The file is made in memory and then replaced atomically, so that a full disk or a killed process leaves the old one; it is checked whole
 * before HDF5 reads a byte of it.  What the arrays mean is their writer's business. */
#ifndef ESPI_IO_CHECKPOINT_H
#define ESPI_IO_CHECKPOINT_H

#include "espalier/tensor.h"

#include <stddef.h>
#include <stdint.h>

typedef struct espi_saved_array {
    const char *name; /* "group/name" */
    esp_dtype dtype;  /* F32, F64, I32, I64, U8, U64 */
    int64_t count;
    void *data;
    struct esp_ctx *ctx; /* NULL, or `data` is tensor memory of this context */
} espi_saved_array;

esp_status espi_checkpoint_write(const char *path, const espi_saved_array *arrays, size_t n);

typedef struct espi_checkpoint espi_checkpoint;
/* ESP_ERR_IO: cannot be read; ESP_ERR_FORMAT: truncated, damaged, or no checkpoint. */
esp_status espi_checkpoint_open(espi_checkpoint **checkpoint, const char *path);
void espi_checkpoint_close(espi_checkpoint *checkpoint); /* NULL is allowed */

/* Values of the array `name`; ESP_ERR_FORMAT when it is not there or has another dtype. */
esp_status espi_checkpoint_count(int64_t *count, const espi_checkpoint *checkpoint, const char *name, esp_dtype dtype);
/* Reads it whole.  ESP_ERR_FORMAT also when it has another count. */
esp_status espi_checkpoint_read(const espi_checkpoint *checkpoint, const espi_saved_array *into);

#endif
