/* HDF5 prints its errors unless told not to; the library never prints. */
#ifndef ESPI_IO_QUIET_HDF5_H
#define ESPI_IO_QUIET_HDF5_H

#include <hdf5.h>

typedef struct espi_quiet {
    H5E_auto2_t fn;
    void *user;
} espi_quiet;

static inline espi_quiet espi_quiet_begin(void) {
    espi_quiet before = {NULL, NULL};
    H5Eget_auto2(H5E_DEFAULT, &before.fn, &before.user);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    return before;
}

static inline void espi_quiet_end(espi_quiet before) {
    H5Eset_auto2(H5E_DEFAULT, before.fn, before.user);
}

#endif
