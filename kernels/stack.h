/* Frozen weights as numbers: one element of a plain matrix or of a stack of (4-bit) expert matrices as the f32 that all backends agree on.
 */
#ifndef ESPI_KERNELS_STACK_H
#define ESPI_KERNELS_STACK_H

#include "kernels/ops.h"

static inline float espi_mat_value(const espi_mat *w, int64_t row, int64_t col) {
    return espi_plain_value(w->data, w->dtype, row * w->cols + col);
}

/* The scale of block b of a part, parts counted through all experts. */
static inline float espi_stack_absmax(const espi_stack *w, int64_t part, int64_t b) {
    if (!w->absmax8) return w->absmax[part * w->part_blocks + b];
    const float nested = w->nested[part * w->part_nested + b / ESPI_NESTED_BLOCK];
    return espi_absmax_restore(w->map[w->absmax8[part * w->part_blocks + b]], nested, w->offset[part]);
}

static inline float espi_stack_value(const espi_stack *w, int64_t expert, int64_t row, int64_t col) {
    const int64_t part_rows = w->rows / w->parts;
    const int64_t part = expert * w->parts + row / part_rows;
    const int64_t i = row % part_rows * w->cols + col;
    const uint8_t *data = (const uint8_t *)w->data + (size_t)part * w->part_bytes;
    if (w->format == ESP_Q_NONE) return espi_plain_value(data, w->dtype, i);
    const uint8_t byte = data[i / 2];
    if (w->format == ESP_MXFP4) {
        const unsigned code = i % 2 == 0 ? byte & 15u : byte >> 4;
        return w->lut[code] * espi_e8m0_value(w->scales[part * w->part_blocks + i / ESPI_MXBLOCK]);
    }
    const unsigned code = i % 2 == 0 ? byte >> 4 : byte & 15u;
    return w->lut[code] * espi_stack_absmax(w, part, i / ESPI_QBLOCK);
}

/* The reason why a weight cannot be read, or NULL. */
static inline const char *espi_mat_refusal(const espi_mat *w) {
    const bool known = w->dtype == ESP_F32 || w->dtype == ESP_BF16 || w->dtype == ESP_F16;
    return known ? NULL : "weight is neither F32 nor BF16 nor F16";
}

static inline const char *espi_stack_refusal(const espi_stack *w) {
    if (w->format == ESP_NF4 || w->format == ESP_FP4) return NULL;
    if (w->format == ESP_MXFP4) return w->cols % ESPI_MXBLOCK == 0 ? NULL : "rows of MXFP4 experts are not whole blocks of 32";
    if (w->format != ESP_Q_NONE) return "experts are neither NF4 nor FP4 nor MXFP4 nor plain";
    const espi_mat plain = {.dtype = w->dtype};
    return espi_mat_refusal(&plain);
}

#endif
