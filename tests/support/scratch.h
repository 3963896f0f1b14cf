/* A folder of its own for a test that writes files, gone when the test ends well. */
#ifndef ESP_TEST_SCRATCH_H
#define ESP_TEST_SCRATCH_H

#include "io/file.h"
#include "outcome.h"

#include <criterion/criterion.h>
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static inline void scratch_make(char dir[ESPI_PATH_MAX]) {
    snprintf(dir, ESPI_PATH_MAX, "/tmp/espalier-test-XXXXXX");
    cr_assert_not_null(mkdtemp(dir));
}

static inline void scratch_remove(const char *dir) {
    DIR *d = opendir(dir);
    cr_assert_not_null(d);
    for (struct dirent *entry; (entry = readdir(d));) {
        char path[ESPI_PATH_MAX];
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        OK(espi_path_join(path, dir, entry->d_name));
        if (unlink(path) != 0) scratch_remove(path);
    }
    closedir(d);
    cr_assert_eq(rmdir(dir), 0);
}

static inline int scratch_count(const char *dir) {
    int n = 0;
    DIR *d = opendir(dir);
    cr_assert_not_null(d);
    while (readdir(d)) n++;
    closedir(d);
    return n - 2;
}

/* path: dir/name, written with these bytes. */
static inline void scratch_write(char path[ESPI_PATH_MAX], const char *dir, const char *name, const void *data, size_t bytes) {
    OK(espi_path_join(path, dir, name));
    FILE *f = fopen(path, "wb");
    cr_assert_not_null(f);
    cr_assert_eq(fwrite(data, 1, bytes, f), bytes);
    cr_assert_eq(fclose(f), 0);
}

/* A file of text below root, with the folders that lead to it. */
static inline void scratch_put(const char *root, const char *file, const char *text) {
    char path[ESPI_PATH_MAX];
    OK(espi_path_join(path, root, file));
    for (char *p = path + strlen(root) + 1; (p = strchr(p, '/')) != NULL; p++) {
        *p = 0;
        (void)mkdir(path, 0700);
        *p = '/';
    }
    scratch_write(path, root, file, text, strlen(text));
}

/* A safetensors file from its parts.  header_bytes: the length that the prefix claims; -1 = the true one. */
static inline void scratch_safetensors(char path[ESPI_PATH_MAX], const char *dir, const char *name, const char *header,
                                       long long header_bytes, size_t data_bytes) {
    const size_t n = strlen(header);
    unsigned char *whole = calloc(1, 8 + n + data_bytes);
    cr_assert_not_null(whole);
    const unsigned long long claimed = header_bytes < 0 ? n : (unsigned long long)header_bytes;
    for (int i = 0; i < 8; i++) whole[i] = (unsigned char)(claimed >> (8 * i));
    memcpy(whole + 8, header, n);
    for (size_t i = 0; i < data_bytes; i++) whole[8 + n + i] = (unsigned char)(i * 7 + 1);
    scratch_write(path, dir, name, whole, 8 + n + data_bytes);
    free(whole);
}

#endif
