/* Golden tensors for the tests, as doubles whatever their dtype.  Every failure ends the test that asked. */
#ifndef ESP_TEST_GOLDEN_H
#define ESP_TEST_GOLDEN_H

#include "io/safetensors.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

/* name: relative to tests/golden/data. */
static inline espi_st_file *golden_open(const char *name) {
    char path[4096];
    snprintf(path, sizeof path, "%s/tests/golden/data/%s", ESP_SOURCE_DIR, name);
    espi_st_file *file = NULL;
    cr_assert_eq(espi_st_open(&file, path), ESP_OK, "%s", esp_last_error());
    return file;
}

/* The values of a tensor, their number in *count (may be NULL); free() them. */
static inline double *golden_read(const espi_st_file *file, const char *name, int64_t *count) {
    const espi_st_tensor *t = espi_st_find(file, name);
    cr_assert_not_null(t, "%s has no tensor %s", espi_st_path(file), name);
    const size_t size = esp_dtype_size(t->dtype), n = (size_t)(t->bytes / size);
    void *raw = malloc((size_t)t->bytes + 1);
    double *values = malloc((n + 1) * sizeof *values);
    cr_assert(raw && values);
    cr_assert_eq(espi_st_read(t, raw, 0, (size_t)t->bytes), ESP_OK, "%s", esp_last_error());
    for (size_t i = 0; i < n; i++) switch (t->dtype) {
        case ESP_F64:
            values[i] = ((const double *)raw)[i];
            break;
        case ESP_F32:
            values[i] = (double)((const float *)raw)[i];
            break;
        case ESP_I32:
            values[i] = ((const int32_t *)raw)[i];
            break;
        case ESP_I64:
            values[i] = (double)((const int64_t *)raw)[i];
            break;
        case ESP_U8:
            values[i] = ((const uint8_t *)raw)[i];
            break;
        default:
            cr_assert_fail("%s: dtype %s is not for tests", name, t->dtype_name);
        }
    free(raw);
    if (count) *count = (int64_t)n;
    return values;
}

static inline double golden_scalar(const espi_st_file *file, const char *name) {
    double *values = golden_read(file, name, NULL), first = values[0];
    free(values);
    return first;
}

/* max |got - expected| / max |expected|; NaN when a value is NaN. */
static inline double golden_error(const double *got, const double *expected, int64_t n) {
    double worst = 0, scale = 0;
    for (int64_t i = 0; i < n; i++) {
        const double error = fabs(got[i] - expected[i]);
        if (!(error <= worst)) worst = error;
        scale = fmax(scale, fabs(expected[i]));
    }
    return scale > 0 ? worst / scale : worst;
}

#endif
