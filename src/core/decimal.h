/* What a caller meant by a float: 0.2f is 0.200000003 in double, but 0.2 was written. */
#ifndef ESPI_CORE_DECIMAL_H
#define ESPI_CORE_DECIMAL_H

#include <stdio.h>
#include <stdlib.h>

/* The shortest decimal that rounds to `value`, as a double.  Options are floats in the public structs and doubles in the formulas; widened
 * bit by bit, a beta2 of 0.999f would give 1 - beta2 an error of 1e-5. */
static inline double espi_decimal(float value) {
    for (int digits = 6; digits < 9; digits++) {
        char text[32];
        snprintf(text, sizeof text, "%.*g", digits, (double)value);
        double written = strtod(text, NULL);
        if ((float)written == value) return written;
    }
    return value;
}

/* The same for an option whose 0 stands for a default. */
static inline double espi_decimal_or(float value, double standard) {
    return value == 0 ? standard : espi_decimal(value);
}

#endif
