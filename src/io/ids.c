/* A list of token ids that grows. */
#include "io/ids.h"

#include "core/status.h"

#include <stdlib.h>

static esp_status grow(espi_ids *ids, size_t n) {
    if (ids->n + n <= ids->room) return ESP_OK;
    const size_t room = 2 * (ids->n + n);
    int32_t *p = realloc(ids->p, room * sizeof *p);
    if (!p) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu ids", room);
    ids->p = p;
    ids->room = room;
    return ESP_OK;
}

esp_status espi_ids_add(espi_ids *ids, int32_t id) {
    ESPI_TRY(grow(ids, 1));
    ids->p[ids->n++] = id;
    return ESP_OK;
}

esp_status espi_ids_encode(espi_ids *ids, const esp_tokenizer *tokenizer, const char *text, size_t bytes, bool add_special) {
    size_t n = bytes + 1; /* a token has at least one byte, but what is put around a text and NFC may ask for more */
    esp_status status = ESP_ERR_SHAPE;
    for (int attempt = 0; attempt < 2 && status == ESP_ERR_SHAPE; attempt++) {
        ESPI_TRY(grow(ids, n));
        status = esp_tokenizer_encode(tokenizer, text, bytes, add_special, true, ids->p + ids->n, ids->room - ids->n, &n);
    }
    ESPI_TRY(status);
    ids->n += n;
    return ESP_OK;
}
