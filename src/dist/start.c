/* Start-up: how this process learns that it is a rank, and whether all ranks are the same program under the same conditions. */
#define _GNU_SOURCE /* dladdr, environ */

#include "dist/comm.h"

#include "core/status.h"
#include "espalier/version.h"
#include "io/file.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include <xxhash.h>

static const espi_transport alone = {.name = "alone"};

static esp_status say_nothing(void *self, const espi_message *send, const espi_message *recv, double deadline) {
    (void)self, (void)send, (void)recv, (void)deadline;
    return ESPI_FAIL(ESP_ERR_INTERNAL, "a rank that is only planned was asked to talk");
}

static const espi_transport imagined = {.name = "imagined", .transfer = say_nothing};

esp_status espi_comm_imagine(esp_comm **comm, int rank, int size) {
    return espi_comm_make(comm, &imagined, NULL, rank, size);
}

/* A positive number from the environment; *found: whether it is set. */
static esp_status number(long *value, bool *found, const char *variable, long least) {
    const char *text = getenv(variable);
    *found = text != NULL && text[0] != '\0';
    if (!*found) return ESP_OK;
    char *end;
    *value = strtol(text, &end, 10);
    if (*end != '\0' || *value < least || *value > INT32_MAX)
        return ESPI_FAIL(ESP_ERR_ARG, "the environment has %s=%s, expected a whole number from %ld", variable, text, least);
    return ESP_OK;
}

static esp_status patience_of(double *seconds) {
    long value = 0;
    bool found;
    ESPI_TRY(number(&value, &found, "ESP_DEADLINE", 1));
    *seconds = found ? (double)value : ESPI_COMM_PATIENCE;
    return ESP_OK;
}

/* Started by hand: ESP_RANK, ESP_WORLD, ESP_RENDEZVOUS. */
static esp_status by_hand(esp_comm **comm, long size, double patience) {
    long rank = 0;
    bool found;
    ESPI_TRY(number(&rank, &found, "ESP_RANK", 0));
    const char *rendezvous = getenv("ESP_RENDEZVOUS");
    if (!found || rank >= size || rendezvous == NULL || rendezvous[0] == '\0')
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "ESP_WORLD=%ld: got ESP_RANK=%s and ESP_RENDEZVOUS=%s, expected a rank below ESP_WORLD and host:port or file:FOLDER", size,
            found ? getenv("ESP_RANK") : "(unset)", rendezvous ? rendezvous : "(unset)");
    return espi_comm_tcp(comm, (int)rank, (int)size, rendezvous, patience);
}

/* Open MPI's ranks of one machine talk through files of shared memory, and die by SIGBUS where there is no room for them: a container has
 * 64 MiB unless it is told otherwise. */
#define SHARED_BYTES_OF_A_RANK ((unsigned long long)6 << 20)

static esp_status room_for_messages(void) {
    static const char folder[] = "/dev/shm";
    long ranks = 1;
    bool found;
    struct statvfs at;
    ESPI_TRY(number(&ranks, &found, "OMPI_COMM_WORLD_LOCAL_SIZE", 1));
    if (!found || getenv("OMPI_MCA_btl_vader_backing_directory") != NULL || statvfs(folder, &at) != 0) return ESP_OK;
    const unsigned long long left = (unsigned long long)at.f_bavail * at.f_frsize,
                             needed = (unsigned long long)ranks * SHARED_BYTES_OF_A_RANK;
    if (left >= needed) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_IO,
                     "%s has %llu bytes left, expected %llu for the messages of %ld ranks on this machine: give the container more "
                     "(docker run --shm-size), or set OMPI_MCA_btl_vader_backing_directory=/tmp",
                     folder, left, needed, ranks);
}

static esp_status launched(esp_comm **comm, int *argc, char ***argv) {
    ESPI_TRY(room_for_messages());
    return espi_comm_mpi(comm, argc, argv);
}

esp_status espi_comm_start(esp_comm **comm, int *argc, char ***argv) {
    /* Open MPI; MPICH and what speaks its PMI. */
    static const char *const launchers[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"};
    if (comm == NULL) return ESPI_FAIL(ESP_ERR_ARG, "esp_comm_init: comm is NULL");
    *comm = NULL;
    double patience;
    ESPI_TRY(patience_of(&patience));
    long world = 1;
    bool found;
    ESPI_TRY(number(&world, &found, "ESP_WORLD", 1));
    esp_status status = ESP_OK;
    if (found) {
        if (world > 1) status = by_hand(comm, world, patience);
    } else {
        for (int i = 0; i < ESPI_COUNT(launchers) && world == 1; i++) ESPI_TRY(number(&world, &found, launchers[i], 1));
        if (world > 1) status = launched(comm, argc, argv);
    }
    if (status == ESP_OK && *comm == NULL) status = espi_comm_make(comm, &alone, NULL, 0, 1);
    if (status == ESP_OK) espi_comm_patience(*comm, patience);
    return status;
}

/* ---- are the ranks alike ---- */

#define LARGEST_PROGRAM ((size_t)4 << 30)

/* 0 where it cannot be read, on that rank. */
static uint64_t hash_of_file(const char *path) {
    char *data;
    size_t bytes;
    if (espi_file_read_all(&data, &bytes, path, LARGEST_PROGRAM) != ESP_OK) return 0;
    const uint64_t hash = XXH3_64bits(data, bytes);
    free(data);
    return hash;
}

static uint64_t hash_of_text(const char *text) {
    return text != NULL ? XXH3_64bits(text, strlen(text)) : 0;
}

/* Whatever the order in which they are listed. */
static uint64_t hash_of_variables(const char *prefix) {
    uint64_t sum = 0;
    for (char **variable = environ; *variable != NULL; variable++)
        if (strncmp(*variable, prefix, strlen(prefix)) == 0) sum += hash_of_text(*variable);
    return sum;
}

static esp_status alike(esp_comm *comm) {
    /* What changes results, or who waits how long. */
    static const char *const variables[] = {"ESP_DEADLINE", "ESP_CPU_ISA", "ESP_DENSE", "ESP_DEVICE_EXCHANGE"};
    Dl_info here;
    if (dladdr(variables, &here) == 0) here.dli_fname = "/proc/self/exe";
    ESPI_TRY(espi_comm_same(comm, "the version of espalier", hash_of_text(esp_version())));
    ESPI_TRY(espi_comm_same(comm, "the program (the file that runs)", hash_of_file("/proc/self/exe")));
    ESPI_TRY(espi_comm_same(comm, "the library (its file)", hash_of_file(here.dli_fname)));
    for (int i = 0; i < ESPI_COUNT(variables); i++) ESPI_TRY(espi_comm_same(comm, variables[i], hash_of_text(getenv(variables[i]))));
    return espi_comm_same(comm, "the environment's NCCL_ variables", hash_of_variables("NCCL_"));
}

/* Names may repeat (localhost), a boot has a number of its own. */
uint64_t espi_comm_host(void) {
    char name[256] = "";
    (void)gethostname(name, sizeof name - 1);
    return hash_of_text(name) + hash_of_file("/proc/sys/kernel/random/boot_id");
}

esp_status esp_comm_init(esp_comm **comm, int *argc, char ***argv) {
    ESPI_TRY(espi_comm_start(comm, argc, argv));
    if (esp_comm_size(*comm) == 1) return ESP_OK;
    ESPI_TRY(alike(*comm));
    return espi_comm_find_hosts(*comm, espi_comm_host());
}
