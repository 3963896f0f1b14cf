/* Checks of a call by its status: it must succeed, or fail as it should. */
#ifndef ESP_TEST_OUTCOME_H
#define ESP_TEST_OUTCOME_H

#include "espalier/status.h"

#include <criterion/criterion.h>
#include <string.h>

#define OK(call)                                                                                                                           \
    do {                                                                                                                                   \
        const esp_status ok_status_ = (call);                                                                                              \
        cr_assert_eq(ok_status_, ESP_OK, "%s: %s: %s", #call, esp_status_name(ok_status_), esp_last_error());                              \
    } while (0)

/* The call fails with this code, and its sentence has these words. */
#define FAILS(code, words, call)                                                                                                           \
    do {                                                                                                                                   \
        const esp_status got_ = (call);                                                                                                    \
        cr_assert_eq(got_, (code), "%s: got %s: %s", #call, esp_status_name(got_), esp_last_error());                                      \
        cr_assert_not_null(strstr(esp_last_error(), (words)), "no \"%s\" in: %s", (words), esp_last_error());                              \
    } while (0)

#endif
