/* How every internal function reports failure: a code, and one sentence in thread-local memory. */
#ifndef ESPI_CORE_STATUS_H
#define ESPI_CORE_STATUS_H

#include "espalier/status.h"

#include <stddef.h>

/* Records "what, got, expected (file:line)" for esp_last_error() and returns `code`. */
esp_status espi_fail(esp_status code, const char *file, int line, const char *format, ...) __attribute__((format(printf, 4, 5)));

#ifdef __clang_analyzer__ /* which cannot see into espi_fail, and would follow paths on which a failure is ESP_OK */
#define ESPI_FAIL(code, ...) (espi_fail((code), __FILE__, __LINE__, __VA_ARGS__), (code))
#else
#define ESPI_FAIL(code, ...) espi_fail((code), __FILE__, __LINE__, __VA_ARGS__)
#endif

/* Returns from the calling function when `call` failed.  Functions that own something use `goto done` instead. */
#define ESPI_TRY(call)                                                                                                                     \
    do {                                                                                                                                   \
        esp_status espi_try_status_ = (call);                                                                                              \
        if (espi_try_status_ != ESP_OK) return espi_try_status_;                                                                           \
    } while (0)

/* Structs that start with `size_t struct_size`.  Read: zeroes `config` (`size` bytes), then copies what `given` has, NULL = all defaults;
 * config->struct_size becomes `size`.  ESP_ERR_ARG when the size was never filled in, ESP_ERR_UNSUPPORTED when a field that this version
 * does not know is set.  Write: the opposite way, `stats` into the smaller or larger struct of the caller, whose struct_size stays. */
esp_status espi_struct_read(void *config, size_t size, const void *given, const char *type);
esp_status espi_struct_write(void *out, const void *stats, size_t size, const char *type);

#define ESPI_COUNT(array) ((int)(sizeof(array) / sizeof((array)[0])))

#endif
