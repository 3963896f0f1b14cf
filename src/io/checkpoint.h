/* Checkpoints: named arrays, with checksums.
 *
 * Of one rank: one HDF5 file with a checksum behind it.  It is made in memory and then replaced atomically, so that a full disk or a killed
 * process leaves the old one; it is checked whole before HDF5 reads a byte of it.
 *
 * Of several ranks: a file of that kind for each of them, `part-TAG-RANK.h5`, which no checkpoint knows yet, and last of all the file that is
 * the checkpoint: what all ranks have alike in host memory, and the array "manifest", JSON that says where every other value lies.  Without
 * that file there is no checkpoint; TAG is a checksum of all values, so no save writes over the files of another.  What several ranks hold
 * one of them writes, once their checksums have shown that it is the same.
 *
 * Either form is read by any number of ranks.  What the arrays mean is their writer's business. */
#ifndef ESPI_IO_CHECKPOINT_H
#define ESPI_IO_CHECKPOINT_H

#include "dist/share.h"
#include "espalier/tensor.h"

#include <stddef.h>
#include <stdint.h>

typedef struct espi_saved_array {
    const char *name; /* "group/name" */
    esp_dtype dtype;  /* F32, F64, I32, I64, U8, U64 */
    int64_t count;
    void *data;
    struct esp_ctx *ctx; /* NULL, or `data` is tensor memory of this context */
    /* Of what ranks share: `data` is values first .. first+count-1 of `total`.  0: it is the whole array, here as on every rank; negative: this
     * rank has nothing of it. */
    int64_t first, total;
} espi_saved_array;

/* Collective over the ranks of `share` (NULL: alone), which have the same arrays in the same order; a failure of one is everybody's.
 * ESP_ERR_MISMATCH, naming the array: ranks hold different values of what should be the same.
 * In the folder, parts are removed that belong to no checkpoint any more. */
esp_status espi_checkpoint_write(const char *path, const espi_saved_array *arrays, size_t n, const espi_share *share);
/* Removes a checkpoint, and what of it no other in the folder needs. */
void espi_checkpoint_remove(const char *path);

typedef struct espi_checkpoint espi_checkpoint;
/* Each rank for itself.  ESP_ERR_IO: cannot be read; ESP_ERR_FORMAT: truncated, damaged, or no checkpoint. */
esp_status espi_checkpoint_open(espi_checkpoint **checkpoint, const char *path);
void espi_checkpoint_close(espi_checkpoint *checkpoint); /* NULL is allowed */

/* Values of the array `name`, which no ranks share; ESP_ERR_FORMAT when it is not there or has another dtype. */
esp_status espi_checkpoint_count(int64_t *count, const espi_checkpoint *checkpoint, const char *name, esp_dtype dtype);
/* Reads what `into` says.  ESP_ERR_FORMAT also when the array has another size. */
esp_status espi_checkpoint_read(const espi_checkpoint *checkpoint, const espi_saved_array *into);
/* The same of many: every file that has some of them is read once, one at a time. */
esp_status espi_checkpoint_read_all(const espi_checkpoint *checkpoint, const espi_saved_array *into, size_t n);

#endif
