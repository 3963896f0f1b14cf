/* The only door to the file system; see file.h. */
#include "io/file.h"

#include "core/status.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define COPY_CHUNK ((size_t)1 << 20)

struct espi_out {
    const char *path;
    int fd;
};

struct espi_log_file {
    char path[ESPI_PATH_MAX];
    int fd;
    int64_t bytes;
};

static esp_status fail_errno(const char *what, const char *path) {
    return ESPI_FAIL(ESP_ERR_IO, "%s: cannot %s: %s", path, what, strerror(errno));
}

esp_status espi_path_join(char out[ESPI_PATH_MAX], const char *dir, const char *name) {
    size_t n = strlen(dir);
    const char *slash = n > 0 && dir[n - 1] == '/' ? "" : "/";
    int length = snprintf(out, ESPI_PATH_MAX, "%s%s%s", dir, slash, name);
    if (length < 0 || length >= ESPI_PATH_MAX)
        return ESPI_FAIL(ESP_ERR_ARG, "path %.60s.../%.60s: longer than %d bytes, use a shorter one", dir, name, ESPI_PATH_MAX - 1);
    return ESP_OK;
}

bool espi_file_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

bool espi_dir_exists(const char *path) {
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

/* Opens a regular file for reading and gives its size. */
static esp_status open_regular(int *fd, uint64_t *bytes, const char *path) {
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) return fail_errno("open", path);
    struct stat st;
    esp_status status = ESP_OK;
    if (fstat(*fd, &st) != 0)
        status = fail_errno("read the size", path);
    else if (!S_ISREG(st.st_mode))
        status = ESPI_FAIL(ESP_ERR_IO, "%s: not a regular file, expected one", path);
    if (status != ESP_OK) {
        close(*fd);
        return status;
    }
    *bytes = (uint64_t)st.st_size;
    return ESP_OK;
}

/* Reads until `bytes` are there or the file ends; *got says which. */
static esp_status read_full(int fd, void *buffer, size_t bytes, size_t *got, const char *path) {
    *got = 0;
    while (*got < bytes) {
        ssize_t n = read(fd, (char *)buffer + *got, bytes - *got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno("read", path);
        if (n == 0) break;
        *got += (size_t)n;
    }
    return ESP_OK;
}

static esp_status write_full(int fd, const void *data, size_t bytes, const char *path) {
    const char *p = data;
    while (bytes > 0) {
        ssize_t n = write(fd, p, bytes);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno("write", path);
        p += n;
        bytes -= (size_t)n;
    }
    return ESP_OK;
}

esp_status espi_file_read_all(char **text, size_t *bytes, const char *path, size_t max_bytes) {
    int fd;
    uint64_t size;
    ESPI_TRY(open_regular(&fd, &size, path));
    esp_status status = ESP_OK;
    char *buffer = NULL;
    size_t got = 0;
    if (size > max_bytes) {
        status = ESPI_FAIL(ESP_ERR_FORMAT, "%s: %llu bytes, expected at most %zu: not a file of this kind", path, (unsigned long long)size,
                           max_bytes);
    } else if (!(buffer = malloc((size_t)size + 1))) {
        status = ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its %llu bytes", path, (unsigned long long)size);
    } else {
        status = read_full(fd, buffer, (size_t)size, &got, path);
    }
    close(fd);
    if (status != ESP_OK) {
        free(buffer);
        return status;
    }
    buffer[got] = 0;
    *text = buffer;
    if (bytes) *bytes = got;
    return ESP_OK;
}

esp_status espi_file_read_end(void *out, size_t bytes, const char *path) {
    int fd;
    uint64_t size;
    size_t got = 0;
    ESPI_TRY(open_regular(&fd, &size, path));
    esp_status status = ESP_OK;
    if (size >= bytes && lseek(fd, -(off_t)bytes, SEEK_END) < 0)
        status = fail_errno("move to the end", path);
    else if (size >= bytes)
        status = read_full(fd, out, bytes, &got, path);
    close(fd);
    if (status != ESP_OK || got == bytes) return status;
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %llu bytes, expected at least %zu", path, (unsigned long long)size, bytes);
}

/* A rename survives a power cut only once the folder itself is on the disk. */
static esp_status flush_folder_of(const char *path) {
    char dir[ESPI_PATH_MAX];
    const char *slash = strrchr(path, '/');
    size_t n = slash ? (size_t)(slash - path) : 0;
    if (!slash)
        memcpy(dir, ".", 2);
    else if (n == 0)
        memcpy(dir, "/", 2);
    else {
        memcpy(dir, path, n);
        dir[n] = 0;
    }
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return fail_errno("open", dir);
    /* EINVAL: a file system that cannot flush folders; it has nothing more to give. */
    esp_status status = fsync(fd) == 0 || errno == EINVAL ? ESP_OK : fail_errno("flush", dir);
    close(fd);
    return status;
}

esp_status espi_file_temp_name(char out[ESPI_PATH_MAX], const char *path) {
    int length = snprintf(out, ESPI_PATH_MAX, "%s.tmp.%ld", path, (long)getpid());
    if (length < 0 || length >= ESPI_PATH_MAX)
        return ESPI_FAIL(ESP_ERR_ARG, "path %.100s...: longer than %d bytes, use a shorter one", path, ESPI_PATH_MAX - 20);
    return ESP_OK;
}

static esp_status flush_file(const char *path) {
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail_errno("open", path);
    esp_status status = fsync(fd) == 0 ? ESP_OK : fail_errno("flush", path);
    close(fd);
    return status;
}

esp_status espi_file_commit(const char *path, const char *temp) {
    esp_status status = flush_file(temp);
    if (status == ESP_OK && rename(temp, path) != 0) status = fail_errno("replace", path);
    if (status != ESP_OK) {
        unlink(temp);
        return status;
    }
    return flush_folder_of(path);
}

void espi_file_remove(const char *path) {
    unlink(path);
}

esp_status espi_out_write(espi_out *out, const void *data, size_t bytes) {
    return write_full(out->fd, data, bytes, out->path);
}

esp_status espi_file_fill_atomic(const char *path, espi_fill_fn fill, void *user) {
    char temp[ESPI_PATH_MAX];
    ESPI_TRY(espi_file_temp_name(temp, path));
    espi_out out = {.path = path, .fd = open(temp, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666)};
    if (out.fd < 0) return fail_errno("create", temp);
    esp_status status = fill(user, &out);
    if (close(out.fd) != 0 && status == ESP_OK) status = fail_errno("write", path);
    if (status != ESP_OK) {
        unlink(temp);
        return status;
    }
    return espi_file_commit(path, temp);
}

struct espi_shared {
    char path[ESPI_PATH_MAX];
    int fd;
};

esp_status espi_shared_open(espi_shared **file, const char *temp, bool make) {
    *file = NULL;
    espi_shared *f = calloc(1, sizeof *f);
    if (!f) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory to open it", temp);
    f->fd = open(temp, make ? O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC : O_WRONLY | O_CLOEXEC, 0666);
    if (f->fd < 0) {
        const int reason = errno;
        free(f);
        errno = reason;
        return fail_errno(make ? "create" : "open, which another rank has made (all need a folder that they all see)", temp);
    }
    memcpy(f->path, temp, strlen(temp) + 1); /* it was opened, so it fits */
    *file = f;
    return ESP_OK;
}

esp_status espi_shared_write(espi_shared *file, const void *data, size_t bytes, uint64_t offset) {
    const char *p = data;
    while (bytes > 0) {
        const ssize_t n = pwrite(file->fd, p, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno("write", file->path);
        p += n;
        bytes -= (size_t)n;
        offset += (uint64_t)n;
    }
    return ESP_OK;
}

esp_status espi_shared_close(espi_shared *file) {
    if (!file) return ESP_OK;
    esp_status status = fsync(file->fd) == 0 ? ESP_OK : fail_errno("flush", file->path);
    if (close(file->fd) != 0 && status == ESP_OK) status = fail_errno("write", file->path);
    free(file);
    return status;
}

typedef struct bytes_source {
    const void *data;
    size_t bytes;
} bytes_source;

static esp_status fill_bytes(void *user, espi_out *out) {
    const bytes_source *source = user;
    return espi_out_write(out, source->data, source->bytes);
}

esp_status espi_file_write_atomic(const char *path, const void *data, size_t bytes) {
    bytes_source source = {data, bytes};
    return espi_file_fill_atomic(path, fill_bytes, &source);
}

typedef struct copy_source {
    const char *path;
    int fd;
    void *buffer;
} copy_source;

static esp_status fill_copy(void *user, espi_out *out) {
    const copy_source *source = user;
    for (;;) {
        size_t got;
        ESPI_TRY(read_full(source->fd, source->buffer, COPY_CHUNK, &got, source->path));
        ESPI_TRY(espi_out_write(out, source->buffer, got));
        if (got < COPY_CHUNK) return ESP_OK;
    }
}

esp_status espi_file_copy(const char *dst, const char *src) {
    copy_source source = {.path = src};
    uint64_t size;
    ESPI_TRY(open_regular(&source.fd, &size, src));
    source.buffer = malloc(COPY_CHUNK);
    esp_status status = source.buffer ? espi_file_fill_atomic(dst, fill_copy, &source)
                                      : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a copy buffer of %zu bytes", src, COPY_CHUNK);
    free(source.buffer);
    close(source.fd);
    return status;
}

esp_status espi_dir_make(const char *path) {
    char part[ESPI_PATH_MAX];
    size_t n = strlen(path);
    if (n == 0 || n >= sizeof part) return ESPI_FAIL(ESP_ERR_ARG, "folder name of %zu bytes, expected 1 to %d", n, ESPI_PATH_MAX - 1);
    memcpy(part, path, n + 1);
    for (size_t i = 1; i <= n; i++) {
        if (part[i] != '/' && part[i] != 0) continue;
        part[i] = 0;
        /* Some file systems answer with another error than EEXIST for a folder that is there (read-only ones, for instance). */
        if (mkdir(part, 0777) != 0) {
            const int reason = errno; /* looking for the folder may leave another */
            if (!espi_dir_exists(part)) {
                errno = reason;
                return fail_errno("make the folder", part);
            }
        }
        part[i] = i < n ? '/' : 0;
    }
    return ESP_OK;
}

esp_status espi_log_file_open(espi_log_file **log, const char *path, int64_t keep_bytes) {
    espi_log_file *l = calloc(1, sizeof *l);
    if (!l) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a log", path);
    l->fd = -1;
    esp_status status = ESP_OK;
    struct stat st;
    if (strlen(path) >= sizeof l->path) {
        status = ESPI_FAIL(ESP_ERR_ARG, "path %.100s...: longer than %d bytes, use a shorter one", path, ESPI_PATH_MAX - 1);
        goto fail;
    }
    memcpy(l->path, path, strlen(path) + 1);
    l->fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    if (l->fd < 0 || fstat(l->fd, &st) != 0) {
        status = fail_errno("open for appending", path);
        goto fail;
    }
    l->bytes = keep_bytes < 0 ? (int64_t)st.st_size : keep_bytes;
    if (l->bytes > (int64_t)st.st_size) {
        status = ESPI_FAIL(ESP_ERR_MISMATCH,
                           "%s: %lld bytes, expected at least the %lld that the checkpoint knows: resume from the folder it was "
                           "written to",
                           path, (long long)st.st_size, (long long)keep_bytes);
        goto fail;
    }
    if (l->bytes < (int64_t)st.st_size && ftruncate(l->fd, (off_t)l->bytes) != 0) {
        status = fail_errno("cut", path);
        goto fail;
    }
    *log = l;
    return ESP_OK;
fail:
    if (l->fd >= 0) close(l->fd);
    free(l);
    return status;
}

esp_status espi_log_file_line(espi_log_file *log, const char *line) {
    size_t n = strlen(line);
    char *whole = malloc(n + 1);
    if (!whole) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a line of %zu bytes", log->path, n + 1);
    memcpy(whole, line, n + 1);
    whole[n] = '\n'; /* where the NUL was */
    esp_status status = write_full(log->fd, whole, n + 1, log->path);
    free(whole);
    if (status == ESP_OK) log->bytes += (int64_t)n + 1;
    return status;
}

int64_t espi_log_file_bytes(const espi_log_file *log) {
    return log->bytes;
}

esp_status espi_log_file_close(espi_log_file *log) {
    if (!log) return ESP_OK;
    esp_status status = fsync(log->fd) == 0 ? ESP_OK : fail_errno("flush", log->path);
    if (close(log->fd) != 0 && status == ESP_OK) status = fail_errno("write", log->path);
    free(log);
    return status;
}
