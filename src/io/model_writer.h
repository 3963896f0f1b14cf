/* A checkpoint folder made from another one: tensors pass one at a time, shard by shard; every other file is copied. */
#ifndef ESPI_IO_MODEL_WRITER_H
#define ESPI_IO_MODEL_WRITER_H

#include "io/safetensors.h"

#include <jansson.h>

/* The tensors of one new file, while it is being planned. */
typedef struct espi_shard espi_shard;

/* Adds a tensor; item->name is copied, item->user must live until the folder is written. */
esp_status espi_shard_add(espi_shard *shard, const espi_st_item *item);
/* Adds a tensor of the old folder as it is. */
esp_status espi_shard_keep(espi_shard *shard, const espi_st_tensor *tensor);

typedef struct espi_model_edit {
    /* Called for each tensor of the old folder, ascending by name within its file, before anything is written: adds what becomes of it. */
    esp_status (*tensor)(void *user, espi_shard *shard, const espi_st_tensor *tensor);
    /* Changes config.json; NULL: none. */
    esp_status (*config)(void *user, json_t *config);
    void *user;
} espi_model_edit;

/* Same files as `in_dir` has, with an index where that has one.  config.json comes last, so a folder that was not finished does not load.
 * ESP_ERR_ARG: out_dir has a config.json already. */
esp_status espi_model_rewrite(const char *out_dir, const char *in_dir, espi_st_set *in, const espi_model_edit *edit);

#endif
