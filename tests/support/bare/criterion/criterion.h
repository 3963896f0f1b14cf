/* What tests/support asks of Criterion, for programs that run where it is not installed (a machine with a GPU): a failure ends the program. */
#ifndef ESP_TESTS_BARE_CRITERION_H
#define ESP_TESTS_BARE_CRITERION_H

#include <stdio.h>
#include <stdlib.h>

#define cr_assert_fail(...) (fprintf(stderr, "%s:%d: ", __FILE__, __LINE__), fprintf(stderr, " " __VA_ARGS__), fputc('\n', stderr), exit(1))
#define cr_assert(condition, ...) ((condition) ? (void)0 : cr_assert_fail(__VA_ARGS__))
#define cr_assert_eq(a, b, ...) cr_assert((a) == (b), __VA_ARGS__)
#define cr_assert_not_null(pointer, ...) cr_assert((pointer) != NULL, __VA_ARGS__)
#define cr_assert_null(pointer, ...) cr_assert((pointer) == NULL, __VA_ARGS__)

#endif
