/* A lock on a folder: two runs that wrote into one would each believe the other's files to be their own. */
#define _DEFAULT_SOURCE /* flock: held by the open file, so it also keeps two runs of one process apart, and no killed process leaves one */
#include "core/status.h"
#include "io/file.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

struct espi_lock {
    int file;
};

static esp_status hold(espi_lock *lock, const char *dir) {
    char path[ESPI_PATH_MAX];
    ESPI_TRY(espi_path_join(path, dir, ".lock"));
    lock->file = open(path, O_CREAT | O_RDWR | O_CLOEXEC, 0644);
    if (lock->file < 0) return ESPI_FAIL(ESP_ERR_IO, "%s: %s", path, strerror(errno));
    if (flock(lock->file, LOCK_EX | LOCK_NB) == 0) return ESP_OK;
    const int reason = errno;
    close(lock->file);
    if (reason == EWOULDBLOCK)
        return ESPI_FAIL(ESP_ERR_STATE, "%s: another run writes into this folder, expected none: wait for it, or choose another folder",
                         dir);
    return ESPI_FAIL(ESP_ERR_IO, "%s: cannot be locked: %s", path, strerror(reason));
}

esp_status espi_lock_take(espi_lock **lock, const char *dir) {
    *lock = calloc(1, sizeof **lock);
    if (!*lock) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a lock on %s", dir);
    const esp_status status = hold(*lock, dir);
    if (status == ESP_OK) return ESP_OK;
    free(*lock);
    *lock = NULL;
    return status;
}

void espi_lock_free(espi_lock *lock) {
    if (!lock) return;
    close(lock->file);
    free(lock);
}
