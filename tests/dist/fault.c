/* What goes wrong, on purpose: a shared object that is loaded before a program (LD_PRELOAD) and stands between it and the system.  The program
 * and the library are those that users have.
 *
 * ESP_FAULT="RANK ACTION [WHAT [LAYER [NTH]]]": rank RANK, when it sends the header of the NTH call (1) named WHAT (".." for blanks) in layer
 * LAYER (-2: any), does ACTION:
 *   kill stop exit   at once: SIGKILL, SIGSTOP, _exit(0)
 *   busy delay       never goes on, without a call; goes on after 3 seconds
 *   short            its next message is a byte shorter
 *   nan              its next message of floats has NaN in it
 *   full             from then on files cannot be written: no space
 *   noroom           (from the start) /dev/shm has no room */
#define _GNU_SOURCE

#include <dlfcn.h>
#include <errno.h>
#ifdef ESPALIER_HAVE_MPI
#include <mpi.h>
#endif
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <unistd.h>

/* As src/dist/comm.c has it. */
typedef struct header {
    uint64_t mark, call, bytes;
    int32_t layer, status;
    char what[40];
} header;

static struct {
    bool mine, full, spoil;
    char action[16], what[40];
    int layer, nth, seen;
    uint64_t call;
} fault = {.layer = -2, .nth = 1};

__attribute__((constructor)) static void read_fault(void) {
    const char *text = getenv("ESP_FAULT"), *rank = getenv("OMPI_COMM_WORLD_RANK");
    int victim = -1;
    if (rank == NULL) rank = getenv("ESP_RANK");
    if (text == NULL || sscanf(text, "%d %15s %39s %d %d", &victim, fault.action, fault.what, &fault.layer, &fault.nth) < 2) return;
    fault.mine = rank != NULL && atoi(rank) == victim;
    for (char *c = fault.what; *c; c++)
        if (c[0] == '.' && c[1] == '.') {
            *c = ' ';
            memmove(c + 1, c + 2, strlen(c + 1));
        }
}

static bool is(const char *action) {
    return strcmp(fault.action, action) == 0;
}

static void happen(void) {
    if (is("kill")) raise(SIGKILL);
    if (is("stop")) raise(SIGSTOP);
    if (is("exit")) _exit(0);
    if (is("busy"))
        for (;;) pause();
    if (is("delay")) sleep(3);
    if (is("full")) fault.full = true;
    if (is("short") || is("nan")) fault.spoil = true;
}

/* Before a message leaves; true: this one is to be spoilt. */
static bool spoils(const void *data, size_t bytes) {
    header h;
    if (!fault.mine) return false;
    if (bytes == sizeof h) {
        memcpy(&h, data, sizeof h);
        const bool right = strcmp(h.what, fault.what) == 0 && (fault.layer == -2 || h.layer == fault.layer);
        if (right && h.call != fault.call && ++fault.seen == fault.nth) happen();
        if (right) fault.call = h.call;
        if (right || !fault.spoil) return false;
    }
    return fault.spoil && bytes > sizeof h;
}

static void *next(const char *name) {
    void *f = dlsym(RTLD_NEXT, name);
    return f ? f : dlsym(RTLD_DEFAULT, name);
}

/* A copy with a NaN at its front; lives until the process ends, as the message may. */
static const void *with_nan(const void *data, size_t bytes) {
    static const float nan = __builtin_nanf("");
    char *copy = malloc(bytes);
    if (copy == NULL) abort();
    memcpy(copy, data, bytes);
    memcpy(copy, &nan, sizeof nan);
    return copy;
}

#ifdef ESPALIER_HAVE_MPI
int MPI_Isend(const void *data, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm, MPI_Request *request) {
    int (*send_on)(const void *, int, MPI_Datatype, int, int, MPI_Comm, MPI_Request *);
    *(void **)&send_on = next("PMPI_Isend");
    if (spoils(data, (size_t)count)) {
        fault.spoil = false;
        if (is("short")) count--;
        if (is("nan")) data = with_nan(data, (size_t)count);
    }
    return send_on(data, count, type, to, tag, comm, request);
}
#endif

ssize_t send(int fd, const void *data, size_t bytes, int flags) {
    static ssize_t (*send_on)(int, const void *, size_t, int);
    if (send_on == NULL) *(void **)&send_on = next("send");
    if (spoils(data, bytes)) {
        fault.spoil = false;
        if (is("nan")) data = with_nan(data, bytes);
        if (is("short")) { /* the last byte is lost on the way */
            const ssize_t sent = send_on(fd, data, bytes - 1, flags);
            return sent == (ssize_t)bytes - 1 ? (ssize_t)bytes : sent;
        }
    }
    return send_on(fd, data, bytes, flags);
}

/* Files, not sockets or what a shell reads. */
static bool refuses(int fd) {
    char link[32], path[256];
    if (!fault.full) return false;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    const ssize_t n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = '\0';
    if (path[0] != '/' || strncmp(path, "/dev/", 5) == 0) return false;
    errno = ENOSPC;
    return true;
}

#define REFUSED(name, parameters, arguments)                                                                                               \
    ssize_t name parameters {                                                                                                              \
        static ssize_t(*go_on) parameters;                                                                                                 \
        if (go_on == NULL) *(void **)&go_on = next(#name);                                                                                 \
        return refuses(fd) ? -1 : go_on arguments;                                                                                         \
    }
REFUSED(write, (int fd, const void *data, size_t bytes), (fd, data, bytes))
REFUSED(pwrite, (int fd, const void *data, size_t bytes, off_t at), (fd, data, bytes, at))
REFUSED(pwrite64, (int fd, const void *data, size_t bytes, off64_t at), (fd, data, bytes, at))

int statvfs(const char *path, struct statvfs *at) {
    int (*go_on)(const char *, struct statvfs *);
    *(void **)&go_on = next("statvfs");
    const int code = go_on(path, at);
    if (code == 0 && fault.mine && is("noroom") && strcmp(path, "/dev/shm") == 0) at->f_bavail = 1;
    return code;
}
