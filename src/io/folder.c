/* Folders as a whole: what is in one, and a temporary one made of links to another's files, and what killed writers left. */
#define _XOPEN_SOURCE 700 /* realpath */

#include "io/folder.h"

#include "core/status.h"

#include <dirent.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int by_name(const void *a, const void *b) {
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static esp_status append(char ***names, size_t *n, const char *name) {
    char **longer = realloc(*names, (*n + 1) * sizeof *longer);
    if (!longer) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the names of a folder");
    *names = longer;
    const size_t bytes = strlen(name) + 1;
    longer[*n] = malloc(bytes);
    if (!longer[*n]) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the name %s", name);
    memcpy(longer[(*n)++], name, bytes);
    return ESP_OK;
}

esp_status espi_folder_list(char ***names, size_t *n, const char *dir) {
    *names = NULL;
    *n = 0;
    DIR *handle = opendir(dir);
    if (!handle) return ESPI_FAIL(ESP_ERR_IO, "%s: cannot be listed: %s", dir, strerror(errno));
    esp_status status = ESP_OK;
    for (struct dirent *entry; status == ESP_OK && (entry = readdir(handle));)
        if (entry->d_name[0] != '.') status = append(names, n, entry->d_name);
    closedir(handle);
    if (status != ESP_OK)
        espi_folder_list_free(*names, *n);
    else if (*n)
        qsort(*names, *n, sizeof **names, by_name);
    return status;
}

void espi_folder_list_free(char **names, size_t n) {
    for (size_t i = 0; names && i < n; i++) free(names[i]);
    free(names);
}

static esp_status link_file(const char *place, const char *name, const char *file) {
    char link[ESPI_PATH_MAX];
    ESPI_TRY(espi_path_join(link, place, name));
    char *absolute = realpath(file, NULL);
    const int failed = !absolute || symlink(absolute, link) != 0;
    free(absolute);
    return failed ? ESPI_FAIL(ESP_ERR_IO, "%s: cannot be linked to %s: %s", link, file, strerror(errno)) : ESP_OK;
}

static esp_status link_all(const char *place, const char *dir, const char *name, const char *other) {
    char **names, file[ESPI_PATH_MAX];
    size_t n;
    ESPI_TRY(link_file(place, name, other));
    ESPI_TRY(espi_folder_list(&names, &n, dir));
    esp_status status = ESP_OK;
    for (size_t i = 0; status == ESP_OK && i < n; i++) {
        if (strcmp(names[i], name) == 0) continue;
        status = espi_path_join(file, dir, names[i]);
        if (status == ESP_OK) status = link_file(place, names[i], file);
    }
    espi_folder_list_free(names, n);
    return status;
}

esp_status espi_folder_with(char place[ESPI_PATH_MAX], const char *dir, const char *name, const char *other) {
    const char *tmp = getenv("TMPDIR");
    ESPI_TRY(espi_path_join(place, tmp ? tmp : "/tmp", "espalier-XXXXXX"));
    if (!mkdtemp(place)) return ESPI_FAIL(ESP_ERR_IO, "%s: no temporary folder: %s", place, strerror(errno));
    esp_status status = link_all(place, dir, name, other);
    if (status != ESP_OK) espi_folder_remove(place);
    return status;
}

void espi_folder_remove(const char *place) {
    char **names, path[ESPI_PATH_MAX];
    size_t n;
    if (espi_folder_list(&names, &n, place) != ESP_OK) return;
    for (size_t i = 0; i < n; i++)
        if (espi_path_join(path, place, names[i]) == ESP_OK) unlink(path);
    espi_folder_list_free(names, n);
    rmdir(place);
}

/* NAME.tmp.PROCESS, as espi_file_temp_name() makes them. */
static bool is_left_over(const char *name) {
    static const char mark[] = ".tmp.";
    const char *at = strstr(name, mark);
    if (!at || at == name) return false;
    const char *digits = at + sizeof mark - 1;
    return *digits && digits[strspn(digits, "0123456789")] == '\0';
}

esp_status espi_folder_sweep(const char *dir) {
    char **names, path[ESPI_PATH_MAX];
    size_t n;
    if (!espi_dir_exists(dir)) return ESP_OK;
    ESPI_TRY(espi_folder_list(&names, &n, dir));
    esp_status status = ESP_OK;
    for (size_t i = 0; status == ESP_OK && i < n; i++) {
        if (!is_left_over(names[i])) continue;
        status = espi_path_join(path, dir, names[i]);
        if (status == ESP_OK) espi_file_remove(path);
    }
    espi_folder_list_free(names, n);
    return status;
}
