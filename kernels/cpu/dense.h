/* Which library multiplies dense f32 matrices, and the call.  ESP_DENSE = onednn, cblas or own; unset: oneDNN where it was built in and the
 * matrix is large enough to pay, else own.  Compiled once: libraries choose their instruction set themselves. */
#ifndef ESPI_KERNELS_CPU_DENSE_H
#define ESPI_KERNELS_CPU_DENSE_H

#include "core/status.h"

#include <stdbool.h>
#include <stdint.h>

typedef enum espi_dense { ESPI_DENSE_OWN, ESPI_DENSE_ONEDNN, ESPI_DENSE_CBLAS } espi_dense;

/* From the matrix's sizes alone, never from the number of rows.  bf16: the own kernel is one of bf16, and is taken unless ESP_DENSE names
 * another, which then multiplies in f32.  ESP_ERR_ARG when ESP_DENSE names what is not known or not built in. */
esp_status espi_dense_choose(espi_dense *choice, int64_t out, int64_t in, bool bf16);

/* Rows of one oneDNN call, always as many: so a row has the same bits wherever it stands and however many there are. */
enum { ESPI_DENSE_ROWS = 64 };

/* c[m][n] = (add ? c : 0) + a[m][k] b, b = w[n][k]^T when transposed, else w[k][n]; all dense.
 * tail: ESPI_DENSE_ROWS * (n + k) floats, used by oneDNN. */
esp_status espi_dense_product(espi_dense choice, float *c, const float *a, const float *w, float *tail, int64_t m, int64_t n, int64_t k,
                              bool transposed, bool add, int threads);

/* One line for ESP_LOG=select. */
const char *espi_dense_describe(void);
/* Where the own kernel is one of bf16. */
const char *espi_dense_describe_bf16(void);

#endif
