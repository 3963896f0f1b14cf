/* The calls that change files, counted, and the one at which something happens: it fails as on a full disk, or the process is killed.  For the
 * one source file of a test program: what is linked into the program calls these instead of the system's. */
#ifndef ESP_TEST_FAULTY_FILES_H
#define ESP_TEST_FAULTY_FILES_H

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

static atomic_int file_calls, fault_at; /* fault_at 0: none */
static bool fault_kills;

/* True where the call must fail. */
static inline bool file_fault(void) {
    if (atomic_load(&fault_at) == 0 || atomic_fetch_add(&file_calls, 1) + 1 != atomic_load(&fault_at)) return false;
    if (fault_kills) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return true;
}

static inline void fault_set(int at, bool kills) {
    atomic_store(&file_calls, 0);
    atomic_store(&fault_at, at);
    fault_kills = kills;
}

ssize_t write(int fd, const void *data, size_t bytes) {
    return fd > 2 && file_fault() ? -1 : syscall(SYS_write, fd, data, bytes);
}
ssize_t pwrite(int fd, const void *data, size_t bytes, off_t offset) {
    return file_fault() ? -1 : syscall(SYS_pwrite64, fd, data, bytes, offset);
}
int fsync(int fd) {
    return file_fault() ? -1 : (int)syscall(SYS_fsync, fd);
}
int rename(const char *from, const char *to) {
    return file_fault() ? -1 : (int)syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0);
}

#endif
