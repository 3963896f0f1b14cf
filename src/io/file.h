/* The only door to the file system: whole small files, atomic replacement, folders, JSONL logs.
 * Every failure is ESP_ERR_IO with the path and the operating system's reason. */
#ifndef ESPI_IO_FILE_H
#define ESPI_IO_FILE_H

#include "espalier/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ESPI_PATH_MAX 4096

/* out [out]: dir + "/" + name.  ESP_ERR_ARG when it does not fit. */
esp_status espi_path_join(char out[ESPI_PATH_MAX], const char *dir, const char *name);

bool espi_file_exists(const char *path); /* a regular file, or a link to one */
bool espi_dir_exists(const char *path);

/* The whole file with a NUL behind it; free() it.  bytes may be NULL.  ESP_ERR_FORMAT when it has more than max_bytes. */
esp_status espi_file_read_all(char **text, size_t *bytes, const char *path, size_t max_bytes);

/* The last bytes of the file.  ESP_ERR_FORMAT when it has fewer. */
esp_status espi_file_read_end(void *out, size_t bytes, const char *path);

/* Replaces `path` atomically: written under a temporary name in the same folder, flushed to the disk, renamed, the folder flushed.  When
 * anything fails (a full disk included) the temporary is removed and the old file is untouched. */
esp_status espi_file_write_atomic(const char *path, const void *data, size_t bytes);

/* The same for content that is produced piece by piece: fill() calls espi_out_write() as often as it likes. */
typedef struct espi_out espi_out;
typedef esp_status (*espi_fill_fn)(void *user, espi_out *out);
esp_status espi_out_write(espi_out *out, const void *data, size_t bytes);
esp_status espi_file_fill_atomic(const char *path, espi_fill_fn fill, void *user);

/* The same for a library that writes files by name (HDF5): take a temporary name, write that file, then commit it, or remove it. */
esp_status espi_file_temp_name(char out[ESPI_PATH_MAX], const char *path);
esp_status espi_file_commit(const char *path, const char *temp);
void espi_file_remove(const char *path); /* a file that is not there is no failure */

/* A file that several processes write parts of, under a temporary name: one makes it, then the others open it; all close it, which flushes it
 * to the disk; then one commits it. */
typedef struct espi_shared espi_shared;
esp_status espi_shared_open(espi_shared **file, const char *temp, bool make);
esp_status espi_shared_write(espi_shared *file, const void *data, size_t bytes, uint64_t offset);
esp_status espi_shared_close(espi_shared *file); /* NULL is allowed */

/* dst is replaced atomically. */
esp_status espi_file_copy(const char *dst, const char *src);

/* The folder and those above it; one that exists is no failure. */
esp_status espi_dir_make(const char *path);

/* Keeps other runs out of a folder that exists, until it is freed or the process ends.  ESP_ERR_STATE: another has it. */
typedef struct espi_lock espi_lock;
esp_status espi_lock_take(espi_lock **lock, const char *dir);
void espi_lock_free(espi_lock *lock); /* NULL is allowed */

/* A file of lines that grows; each line is one write, so a killed process leaves whole lines. */
typedef struct espi_log_file espi_log_file;
/* keep_bytes: what to keep of a file that exists: -1 all, 0 nothing, n the first n bytes (a resume forgets lines behind its checkpoint).
 * ESP_ERR_MISMATCH when the file has fewer than n bytes. */
esp_status espi_log_file_open(espi_log_file **log, const char *path, int64_t keep_bytes);
esp_status espi_log_file_line(espi_log_file *log, const char *line); /* without newline */
int64_t espi_log_file_bytes(const espi_log_file *log);
esp_status espi_log_file_close(espi_log_file *log); /* flushes to the disk; NULL is allowed */

#endif
