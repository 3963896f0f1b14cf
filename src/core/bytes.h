/* Bytes that grow as they come. */
#ifndef ESPI_CORE_BYTES_H
#define ESPI_CORE_BYTES_H

#include <stdbool.h>
#include <stddef.h>

/* {0} is empty; free(data). */
typedef struct espi_bytes {
    char *data;
    size_t used, capacity;
} espi_bytes;

/* Room for n more and a NUL.  False: no memory, and nothing has changed. */
bool espi_bytes_reserve(espi_bytes *b, size_t n);
/* n more, with a NUL behind them. */
bool espi_bytes_add(espi_bytes *b, const void *data, size_t n);

#endif
