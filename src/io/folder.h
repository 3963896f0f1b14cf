/* Folders as a whole: what is in one, and a temporary one made of links to another's files. */
#ifndef ESPI_IO_FOLDER_H
#define ESPI_IO_FOLDER_H

#include "io/file.h"

/* Names in `dir`, ascending, hidden ones left out; espi_folder_list_free() them.  ESP_ERR_IO. */
esp_status espi_folder_list(char ***names, size_t *n, const char *dir);
void espi_folder_list_free(char **names, size_t n);

/* place [out]: a new temporary folder with a link to every file of `dir`, but `name` links to the file `other`. */
esp_status espi_folder_with(char place[ESPI_PATH_MAX], const char *dir, const char *name, const char *other);
/* Removes what espi_folder_with() made; the files that the links name stay. */
void espi_folder_remove(const char *place);

/* Removes files that a killed writer of espi_file_fill_atomic() left.  Only for a folder that is locked: a writer at work would lose its own. */
esp_status espi_folder_sweep(const char *dir);

#endif
