/* Runs a program of this build and keeps what it printed.  Every failure to run ends the test that asked. */
#ifndef ESP_TESTS_PROGRAM_H
#define ESP_TESTS_PROGRAM_H

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct program_run {
    int code;
    char *out; /* standard output and error together */
} program_run;

/* A shell command line; free out. */
static inline program_run program(const char *command) {
    char *line = malloc(strlen(command) + 16);
    cr_assert(line);
    sprintf(line, "{ %s ; } 2>&1", command);
    FILE *pipe = popen(line, "r");
    cr_assert(pipe, "%s could not be run", command);
    size_t n = 0, capacity = 1 << 16;
    char *out = malloc(capacity);
    cr_assert(out);
    for (size_t got; (got = fread(out + n, 1, capacity - n - 1, pipe)) > 0;) {
        n += got;
        if (n + 1 < capacity) continue;
        capacity *= 2;
        out = realloc(out, capacity);
        cr_assert(out);
    }
    out[n] = '\0';
    int status = pclose(pipe);
    free(line);
    return (program_run){.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1, .out = out};
}

/* An empty folder of this test's own; program_remove() it. */
static inline char *program_folder(void) {
    char *path = strdup("/tmp/espalier-test-XXXXXX");
    cr_assert(path && mkdtemp(path));
    return path;
}

static inline void program_remove(char *path) {
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", path);
    free(program(command).out);
    free(path);
}

#endif
