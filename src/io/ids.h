/* A list of token ids that grows. */
#ifndef ESPI_IO_IDS_H
#define ESPI_IO_IDS_H

#include "espalier/tokenizer.h"

typedef struct espi_ids {
    int32_t *p; /* free() it */
    size_t n, room;
} espi_ids;

esp_status espi_ids_add(espi_ids *ids, int32_t id);
/* Special tokens in the text are text. */
esp_status espi_ids_encode(espi_ids *ids, const esp_tokenizer *tokenizer, const char *text, size_t bytes, bool add_special);

#endif
