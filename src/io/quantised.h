/* Writing a model folder whose experts are 4-bit, of one whose experts are not. */
#ifndef ESPI_IO_QUANTISED_H
#define ESPI_IO_QUANTISED_H

#include "core/ctx.h"

#include <stdbool.h>

typedef struct espi_quantised_spec {
    esp_qformat format; /* ESP_NF4, ESP_FP4 or ESP_MXFP4 */
    bool double_quant;  /* block scales of NF4 and FP4 in 8 bits */
    /* NF4 and FP4: one array for all experts of a layer, instead of a matrix for each.  qwen3_vl_moe has no other form; MXFP4 neither. */
    bool fused;
    esp_mxfp4_rule rule;
} espi_quantised_spec;

/* The bytes of the experts are those that loading in_dir with the same format gives; every other tensor, and every file that holds none, is
 * copied.  Memory: the largest tensor, and what is cached of one matrix.
 * ESP_ERR_ARG: out_dir holds something.  ESP_ERR_UNSUPPORTED: quantised already, or sizes that the format cannot cut into blocks. */
esp_status espi_quantised_write(esp_ctx *ctx, const char *out_dir, const char *in_dir, const espi_quantised_spec *spec);

#endif
