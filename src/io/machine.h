/* What the operating system says of the machine: memory that this process may still take, and which processors are near which memory. */
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

/* The memory node that each processor is near to, counted from 0 in the order of their numbers, from the ESPI_MACHINE_NODES-th on from 0 again;
 * 0 of a processor that is not listed.  Returns how many of those numbers there are; 1 where nothing is said. */
enum { ESPI_MACHINE_PROCESSORS = 1024, ESPI_MACHINE_NODES = 16 };
int espi_machine_nodes_read(unsigned char node[ESPI_MACHINE_PROCESSORS], const char *root);

#endif
