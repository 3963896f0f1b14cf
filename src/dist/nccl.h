/* What of NCCL is used, declared as its headers have it: NCCL is no part of a build.  A library is asked for these by name when it is there.
 * The interface is that of NCCL 2.28.9; within major version 2 it only grows, and what is used here is there since 2.18. */
#ifndef ESPI_DIST_NCCL_H
#define ESPI_DIST_NCCL_H

#include "espalier/ctx.h"

#include <stddef.h>

enum { ESPI_NCCL_OLDEST = 21800, ESPI_NCCL_WRITTEN_FOR = 22809, ESPI_NCCL_NEXT_MAJOR = 30000 };

typedef struct ncclComm *espi_nccl_comm;

enum { ESPI_NCCL_SUCCESS = 0, ESPI_NCCL_IN_PROGRESS = 7, ESPI_NCCL_INT8 = 0 };
typedef int espi_nccl_result; /* an enumeration there */

typedef struct espi_nccl_id {
    char internal[128];
} espi_nccl_id;

/* As of 2.18: a library reads as many bytes as `size` says, and takes its defaults for what came later. */
typedef struct espi_nccl_config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share;
} espi_nccl_config;

enum { ESPI_NCCL_UNDEFINED = -2147483647 - 1 };
#define ESPI_NCCL_MAGIC 0xcafebeefu

/* FUNCTION(name, needed, result, parameters): not needed = NULL where the library lacks it. */
#define ESPI_NCCL_FUNCTIONS(FUNCTION)                                                                                                      \
    FUNCTION(GetVersion, true, espi_nccl_result, (int *version))                                                                           \
    FUNCTION(GetUniqueId, true, espi_nccl_result, (espi_nccl_id * id))                                                                     \
    FUNCTION(GetErrorString, true, const char *, (espi_nccl_result result))                                                                \
    FUNCTION(GetLastError, false, const char *, (espi_nccl_comm comm))                                                                     \
    FUNCTION(CommInitRankConfig, true, espi_nccl_result,                                                                                   \
             (espi_nccl_comm * comm, int ranks, espi_nccl_id id, int rank, espi_nccl_config *config))                                      \
    FUNCTION(CommGetAsyncError, true, espi_nccl_result, (espi_nccl_comm comm, espi_nccl_result * error))                                   \
    FUNCTION(CommFinalize, false, espi_nccl_result, (espi_nccl_comm comm))                                                                 \
    FUNCTION(CommDestroy, true, espi_nccl_result, (espi_nccl_comm comm))                                                                   \
    FUNCTION(CommAbort, true, espi_nccl_result, (espi_nccl_comm comm))                                                                     \
    FUNCTION(GroupStart, true, espi_nccl_result, (void))                                                                                   \
    FUNCTION(GroupEnd, true, espi_nccl_result, (void))                                                                                     \
    FUNCTION(Send, true, espi_nccl_result, (const void *data, size_t count, int type, int peer, espi_nccl_comm comm, void *stream))        \
    FUNCTION(Recv, true, espi_nccl_result, (void *data, size_t count, int type, int peer, espi_nccl_comm comm, void *stream))

typedef struct espi_nccl_library {
#define FUNCTION(name, needed, result, parameters) result(*name) parameters;
    ESPI_NCCL_FUNCTIONS(FUNCTION)
#undef FUNCTION
} espi_nccl_library;

/* The library that ESP_NCCL names, else libnccl.so.2 where the loader finds it; it stays loaded.  What it is and lacks is logged.
 * ESP_ERR_UNSUPPORTED: there is none, or it is of another major version, too old, or without a function that is needed. */
esp_status espi_nccl_open(espi_nccl_library *library, const esp_ctx *ctx);

#endif
