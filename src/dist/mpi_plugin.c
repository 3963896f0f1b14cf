/* The shared object espalier_mpi: MPI behind plain functions, see mpi_plugin.h. */
#include "dist/mpi_plugin.h"

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>

static int start(int *argc, char ***argv, int *rank, int *size) {
    int up = 0, code = MPI_Initialized(&up);
    if (code == MPI_SUCCESS && !up) code = MPI_Init(argc, argv);
    if (code == MPI_SUCCESS) code = MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    if (code == MPI_SUCCESS) code = MPI_Comm_rank(MPI_COMM_WORLD, rank);
    if (code == MPI_SUCCESS) code = MPI_Comm_size(MPI_COMM_WORLD, size);
    return code;
}

static int isend(const void *data, int bytes, int rank, void *request) {
    return MPI_Isend(data, bytes, MPI_BYTE, rank, 0, MPI_COMM_WORLD, request);
}

static int irecv(void *data, int bytes, int rank, void *request) {
    return MPI_Irecv(data, bytes, MPI_BYTE, rank, 0, MPI_COMM_WORLD, request);
}

/* [room] of the last test: one thread makes all calls. */
static MPI_Status *statuses;
static int room;

static int test(int n, void *requests, int *done, int *bytes) {
    if (n > room) {
        MPI_Status *more = realloc(statuses, (size_t)n * sizeof *more);
        if (more == NULL) return MPI_ERR_NO_MEM;
        statuses = more;
        room = n;
    }
    int code = MPI_Testall(n, requests, done, statuses);
    for (int i = 0; i < n && *done && code == MPI_SUCCESS; i++) code = MPI_Get_count(&statuses[i], MPI_BYTE, &bytes[i]);
    return code;
}

static void error_text(int code, char *text, size_t bytes) {
    char full[MPI_MAX_ERROR_STRING];
    int length = 0;
    if (MPI_Error_string(code, full, &length) != MPI_SUCCESS) length = 0;
    snprintf(text, bytes, "%.*s", length, full);
}

static void give_up(int code) {
    MPI_Abort(MPI_COMM_WORLD, code);
}

static void stop(void) {
    int down = 0;
    if (MPI_Finalized(&down) == MPI_SUCCESS && !down) MPI_Finalize();
    free(statuses);
    statuses = NULL;
    room = 0;
}

__attribute__((visibility("default"))) extern const espi_mpi espalier_mpi_v2;
const espi_mpi espalier_mpi_v2 = {start, sizeof(MPI_Request), isend, irecv, test, error_text, give_up, stop};
