/* What the programs of this folder say and count: they have no Criterion where they run. */
#ifndef ESP_TESTS_CUDA_CHECK_H
#define ESP_TESTS_CUDA_CHECK_H

#include "core/status.h"

#include <stdbool.h>
#include <stdio.h>

static int check_failures, check_asserted;

/* Prints the first 20 failures, counts all. */
#define EXPECT(condition, ...)                                                                                                             \
    do {                                                                                                                                   \
        check_asserted++;                                                                                                                  \
        if (!(condition) && check_failures++ < 20) {                                                                                       \
            printf("%s:%d: ", __FILE__, __LINE__);                                                                                         \
            printf(__VA_ARGS__);                                                                                                           \
            printf("\n");                                                                                                                  \
        }                                                                                                                                  \
    } while (0)
#define OK(call)                                                                                                                           \
    do {                                                                                                                                   \
        const esp_status check_status_ = (call);                                                                                           \
        EXPECT(check_status_ == ESP_OK, "%s: %s", #call, esp_last_error());                                                                \
    } while (0)
/* One test: its name, and whether it failed. */
#define RUN(call)                                                                                                                          \
    do {                                                                                                                                   \
        const int before_ = check_failures;                                                                                                \
        call;                                                                                                                              \
        printf("%s %s\n", check_failures == before_ ? "ok  " : "FAIL", #call);                                                             \
        fflush(stdout);                                                                                                                    \
    } while (0)

/* The exit status; no check at all is a failure too. */
static inline int check_end(void) {
    printf("%d checks, %d failed\n", check_asserted, check_failures);
    return check_failures > 0 || check_asserted == 0;
}

#endif
