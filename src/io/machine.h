/* What the operating system says of the memory that this process may still take. */
#ifndef ESPI_IO_MACHINE_H
#define ESPI_IO_MACHINE_H

#include "io/file.h"

typedef struct espi_memory_left {
    uint64_t bytes;             /* UINT64_MAX: nothing that could be read states a limit */
    char source[ESPI_PATH_MAX]; /* the file that does */
} espi_memory_left;

/* The smallest of MemAvailable and of what is left under the limit of this process's control group (version 2 or 1) and of those above it.
 * root [in]  "" but for tests: what stands before /proc and /sys */
void espi_memory_left_read(espi_memory_left *left, const char *root);

#endif
