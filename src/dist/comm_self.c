/* The communicator of a process that runs alone. */
#include "core/status.h"
#include "espalier/ctx.h"

#include <stdlib.h>

struct esp_comm {
    int rank, size;
};

/* What launchers tell their processes: Open MPI, MPICH and Slurm's PMI, and our own. */
static const char *const world_variables[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "ESP_WORLD"};

esp_status esp_comm_init(esp_comm **comm, int *argc, char ***argv) {
    (void)argc; /* no launcher options exist in this version */
    (void)argv;
    if (comm == NULL) return ESPI_FAIL(ESP_ERR_ARG, "esp_comm_init: comm is NULL");
    *comm = NULL;
    for (int i = 0; i < ESPI_COUNT(world_variables); i++) {
        const char *text = getenv(world_variables[i]);
        if (text == NULL || text[0] == '\0') continue;
        char *end;
        long size = strtol(text, &end, 10);
        if (*end != '\0' || size < 1)
            return ESPI_FAIL(ESP_ERR_ARG, "the environment has %s=%s, expected a number of ranks", world_variables[i], text);
        if (size > 1)
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                             "started as one of %ld ranks (%s), but this version runs alone: start it without a launcher, or with one rank",
                             size, world_variables[i]);
    }
    *comm = malloc(sizeof **comm);
    if (*comm == NULL) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a communicator (%zu bytes)", sizeof **comm);
    **comm = (esp_comm){.rank = 0, .size = 1};
    return ESP_OK;
}

void esp_comm_destroy(esp_comm *comm) {
    free(comm);
}

int esp_comm_rank(const esp_comm *comm) {
    return comm == NULL ? 0 : comm->rank;
}

int esp_comm_size(const esp_comm *comm) {
    return comm == NULL ? 1 : comm->size;
}
