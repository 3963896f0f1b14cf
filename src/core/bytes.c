/* Bytes that grow: see bytes.h. */
#include "core/bytes.h"

#include <stdlib.h>
#include <string.h>

bool espi_bytes_reserve(espi_bytes *b, size_t n) {
    if (b->used + n + 1 <= b->capacity) return true;
    const size_t capacity = 2 * (b->used + n + 1) + 64;
    char *grown = realloc(b->data, capacity);
    if (!grown) return false;
    b->data = grown;
    b->capacity = capacity;
    return true;
}

bool espi_bytes_add(espi_bytes *b, const void *data, size_t n) {
    if (!espi_bytes_reserve(b, n)) return false;
    if (n > 0) memcpy(b->data + b->used, data, n);
    b->used += n;
    b->data[b->used] = '\0';
    return true;
}
