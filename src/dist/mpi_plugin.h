/* Between the library and its MPI part, which is a shared object of its own: the library then starts on machines without MPI, and whatever
 * MPI is there is met by what was compiled against it.  Plain C functions that return 0 or MPI's error code. */
#ifndef ESPI_DIST_MPI_PLUGIN_H
#define ESPI_DIST_MPI_PLUGIN_H

#include <stddef.h>

#define ESPI_MPI_PLUGIN_SYMBOL "espalier_mpi_v2"

typedef struct espi_mpi {
    int (*start)(int *argc, char ***argv, int *rank, int *size);
    /* *request [out]: of `requests` bytes each.  bytes <= INT_MAX. */
    size_t request_bytes;
    int (*isend)(const void *data, int bytes, int rank, void *request);
    int (*irecv)(void *data, int bytes, int rank, void *request);
    /* *done: all of n requests are finished; then bytes [n] are what came, for those that receive. */
    int (*test)(int n, void *requests, int *done, int *bytes);
    void (*error_text)(int code, char *text, size_t bytes);
    void (*end_job)(int code);
    void (*stop)(void);
} espi_mpi;

#endif
