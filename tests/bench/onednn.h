/* One product of bf16 by oneDNN whose weights it has packed for itself: the strongest public peer of an expert that has many rows. */
#ifndef ESP_BENCH_ONEDNN_H
#define ESP_BENCH_ONEDNN_H

#include <stdbool.h>
#include <stdint.h>

/* c [rows,out] = a [rows,in] w[copy] [in,out]. */
typedef struct onednn_product onednn_product;

/* floats: a and c are those, and a is rounded first.  NULL where there is no oneDNN of version 2. */
onednn_product *onednn_make(int64_t rows, int64_t out, int64_t in, int copies, int threads, bool floats);
void onednn_run(const onednn_product *p, int copy);

#endif
