/* The last-error sentence, the names of the codes, and structs that carry their own size. */
#include "core/status.h"

#include <criterion/criterion.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

Test(status, sentence_names_the_place) {
    cr_expect_str_eq(esp_last_error(), "");
    int line = __LINE__ + 1;
    cr_expect_eq(ESPI_FAIL(ESP_ERR_SHAPE, "x has %d rows, expected %d", 3, 4), ESP_ERR_SHAPE);
    char expected[200];
    snprintf(expected, sizeof expected, "x has 3 rows, expected 4 (tests/unit/status.c:%d)", line);
    cr_expect_str_eq(esp_last_error(), expected);
}

Test(status, sentence_may_quote_the_one_before) {
    ESPI_FAIL(ESP_ERR_IO, "no such file");
    ESPI_FAIL(ESP_ERR_FORMAT, "model.json: %s", esp_last_error());
    cr_expect(strstr(esp_last_error(), "model.json: no such file (tests/unit/status.c:") == esp_last_error(), "%s", esp_last_error());
}

Test(status, long_sentence_keeps_its_place) {
    char text[10000];
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = '\0';
    ESPI_FAIL(ESP_ERR_ARG, "%s", text);
    cr_expect(strlen(esp_last_error()) < sizeof text);
    cr_expect(strstr(esp_last_error(), "x (tests/unit/status.c:") != NULL);
}

Test(status, sentence_belongs_to_the_thread) {
    bool other_is_own = false;
    ESPI_FAIL(ESP_ERR_ARG, "first");
#pragma omp parallel num_threads(2)
    if (omp_get_thread_num() == 1) {
        bool empty = esp_last_error()[0] == '\0';
        ESPI_FAIL(ESP_ERR_ARG, "second");
        other_is_own = empty && strstr(esp_last_error(), "second") != NULL;
    }
    cr_expect(other_is_own);
    cr_expect(strstr(esp_last_error(), "first") != NULL);
}

Test(status, names) {
    static const char *const names[] = {"ESP_OK",         "ESP_ERR_ARG",         "ESP_ERR_SHAPE",    "ESP_ERR_DTYPE",
                                        "ESP_ERR_STATE",  "ESP_ERR_UNSUPPORTED", "ESP_ERR_MEMORY",   "ESP_ERR_IO",
                                        "ESP_ERR_FORMAT", "ESP_ERR_NONFINITE",   "ESP_ERR_CALLBACK", "ESP_ERR_MISMATCH",
                                        "ESP_ERR_COMM",   "ESP_ERR_INTERNAL",    "ESP_ERR_DEVICE"};
    for (int i = 0; i < ESPI_COUNT(names); i++) cr_expect_str_eq(esp_status_name((esp_status)i), names[i]);
    cr_expect_str_eq(esp_status_name((esp_status)ESPI_COUNT(names)), "ESP_STATUS_UNKNOWN");
    cr_expect_str_eq(esp_status_name((esp_status)-1), "ESP_STATUS_UNKNOWN");
}

/* A struct as this library knows it, and as a newer caller was compiled; an older caller has the first fields only. */
typedef struct now {
    size_t struct_size;
    int a, b;
} now;
typedef struct newer {
    size_t struct_size;
    int a, b;
    int64_t c;
} newer;

Test(status, config_of_any_age) {
    now config;
    cr_assert_eq(espi_struct_read(&config, sizeof config, NULL, "now"), ESP_OK);
    cr_expect(config.struct_size == sizeof config && config.a == 0 && config.b == 0);
    now old = {.struct_size = offsetof(now, b), .a = 5, .b = 77}; /* b lies behind the caller's struct */
    cr_assert_eq(espi_struct_read(&config, sizeof config, &old, "now"), ESP_OK);
    cr_expect(config.struct_size == sizeof config && config.a == 5 && config.b == 0, "a %d, b %d", config.a, config.b);
    newer young = {sizeof young, 6, 7, 0};
    cr_assert_eq(espi_struct_read(&config, sizeof config, &young, "now"), ESP_OK);
    cr_expect(config.struct_size == sizeof config && config.a == 6 && config.b == 7);
    young.c = 1;
    cr_expect_eq(espi_struct_read(&config, sizeof config, &young, "now"), ESP_ERR_UNSUPPORTED);
    cr_expect(strstr(esp_last_error(), "newer fields") != NULL, "%s", esp_last_error());
    now unset = {0};
    cr_expect_eq(espi_struct_read(&config, sizeof config, &unset, "now"), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "now.struct_size is 0, expected 16") != NULL, "%s", esp_last_error());
}

Test(status, stats_of_any_age) {
    now stats = {sizeof stats, 8, 9};
    newer young = {.struct_size = sizeof young, .c = 3};
    cr_assert_eq(espi_struct_write(&young, &stats, sizeof stats, "now"), ESP_OK);
    cr_expect(young.struct_size == sizeof young && young.a == 8 && young.b == 9 && young.c == 0);
    now old = {.struct_size = offsetof(now, b), .b = 77};
    cr_assert_eq(espi_struct_write(&old, &stats, sizeof stats, "now"), ESP_OK);
    cr_expect(old.struct_size == offsetof(now, b) && old.a == 8 && old.b == 77, "written behind the caller's struct");
    old.struct_size = 0;
    cr_expect_eq(espi_struct_write(&old, &stats, sizeof stats, "now"), ESP_ERR_ARG);
    cr_expect_eq(espi_struct_write(NULL, &stats, sizeof stats, "now"), ESP_ERR_ARG);
}
