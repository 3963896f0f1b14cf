/* The last-error sentence of each thread, the names of the codes, and the rules for structs that carry their own size. */
#include "core/status.h"

#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#define SENTENCE_BYTES 4096
#define MAX_STRUCT_BYTES 4096 /* larger than any config or stats struct: a size beyond it was never filled in */

static _Thread_local char last_error[SENTENCE_BYTES];

const char *esp_last_error(void) {
    return last_error;
}

esp_status espi_fail(esp_status code, const char *file, int line, const char *format, ...) {
    /* Written beside last_error first: the arguments may point into it. */
    char sentence[SENTENCE_BYTES], place[256];
    int place_length = snprintf(place, sizeof place, " (%s:%d)", file, line);
    if (place_length < 0 || place_length >= (int)sizeof place) place_length = (int)strlen(place);
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(sentence, sizeof sentence - (size_t)place_length, format, arguments);
    va_end(arguments);
    if (length < 0) sentence[0] = '\0';
    memcpy(sentence + strlen(sentence), place, strlen(place) + 1);
    memcpy(last_error, sentence, sizeof last_error);
    return code;
}

const char *esp_status_name(esp_status status) {
    switch (status) {
    case ESP_OK:
        return "ESP_OK";
    case ESP_ERR_ARG:
        return "ESP_ERR_ARG";
    case ESP_ERR_SHAPE:
        return "ESP_ERR_SHAPE";
    case ESP_ERR_DTYPE:
        return "ESP_ERR_DTYPE";
    case ESP_ERR_STATE:
        return "ESP_ERR_STATE";
    case ESP_ERR_UNSUPPORTED:
        return "ESP_ERR_UNSUPPORTED";
    case ESP_ERR_MEMORY:
        return "ESP_ERR_MEMORY";
    case ESP_ERR_IO:
        return "ESP_ERR_IO";
    case ESP_ERR_FORMAT:
        return "ESP_ERR_FORMAT";
    case ESP_ERR_NONFINITE:
        return "ESP_ERR_NONFINITE";
    case ESP_ERR_CALLBACK:
        return "ESP_ERR_CALLBACK";
    case ESP_ERR_MISMATCH:
        return "ESP_ERR_MISMATCH";
    case ESP_ERR_COMM:
        return "ESP_ERR_COMM";
    case ESP_ERR_INTERNAL:
        return "ESP_ERR_INTERNAL";
    case ESP_ERR_DEVICE:
        return "ESP_ERR_DEVICE";
    }
    return "ESP_STATUS_UNKNOWN";
}

static bool sane_struct_size(size_t size) {
    return size >= sizeof(size_t) && size <= MAX_STRUCT_BYTES;
}

esp_status espi_struct_read(void *config, size_t size, const void *given, const char *type) {
    memset(config, 0, size);
    size_t given_size = size;
    if (given != NULL) {
        memcpy(&given_size, given, sizeof given_size);
        if (!sane_struct_size(given_size))
            return ESPI_FAIL(ESP_ERR_ARG, "%s.struct_size is %zu, expected %zu: fill the struct by its macro", type, given_size, size);
        memcpy(config, given, given_size < size ? given_size : size);
        /* A caller built against a newer header may pass fields that are unknown here: they may be absent (0), never ignored. */
        for (size_t i = size; i < given_size; i++)
            if (((const unsigned char *)given)[i] != 0)
                return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                                 "%s has %zu bytes and byte %zu is set, but this version of the library knows only %zu bytes: leave newer "
                                 "fields 0 or update the library",
                                 type, given_size, i, size);
    }
    memcpy(config, &size, sizeof size);
    return ESP_OK;
}

esp_status espi_struct_write(void *out, const void *stats, size_t size, const char *type) {
    if (out == NULL) return ESPI_FAIL(ESP_ERR_ARG, "%s: the result pointer is NULL", type);
    size_t out_size;
    memcpy(&out_size, out, sizeof out_size);
    if (!sane_struct_size(out_size))
        return ESPI_FAIL(ESP_ERR_ARG, "%s.struct_size is %zu, expected %zu: start from its _INIT macro", type, out_size, size);
    memset(out, 0, out_size);
    memcpy(out, stats, out_size < size ? out_size : size);
    memcpy(out, &out_size, sizeof out_size);
    return ESP_OK;
}
