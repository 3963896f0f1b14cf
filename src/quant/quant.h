/* What a 4-bit format is: 16 values, and how a block of numbers becomes codes. */
#ifndef ESPI_QUANT_QUANT_H
#define ESPI_QUANT_QUANT_H

#include "espalier/quant.h"

#include <stdbool.h>

enum { ESPI_BLOCK_MAX = 4096, ESPI_MX_BLOCK = 32 };

typedef struct espi_format {
    const char *name; /* as bitsandbytes' quant_type spells it */
    esp_qformat id;
    float values[16]; /* by code */
    bool flat;        /* blocks of any size with an f32 scale, by the two tables below; else the format has a quantiser of its own */
    /* A value's code is code_of_rank[number of thresholds strictly below it]: ascending thresholds between neighbouring values; a value on
     * a threshold takes the lower code. */
    float thresholds[15];
    uint8_t code_of_rank[16];
} espi_format;

#define ESPI_FORMAT(id, name) extern const espi_format espi_format_##name;
#include "quant/formats.def"
#undef ESPI_FORMAT

/* NULL for ESP_Q_NONE and unknown values. */
const espi_format *espi_format_find(esp_qformat format);
/* By its name, e.g. "nf4"; NULL when not known. */
const espi_format *espi_format_named(const char *name);

/* Of ESP_MXFP4_OCP and so on: how MXFP4 chooses a block's power of two, and the magnitudes (times that power) above which the next value is
 * nearer. */
typedef struct espi_mx_rule {
    bool round_up;
    float thresholds[7];
} espi_mx_rule;
extern const espi_mx_rule espi_mx_rules[];

/* encode.c: blocks of x to codes and scales, compiled for one instruction set.  Returns n, or the first element of the block where a NaN or
 * infinity stopped it. */
typedef struct espi_encoder {
    const char *isa;
    bool (*offered)(void); /* by this machine */
    int64_t (*flat)(uint8_t *codes, float *absmax, const void *x, esp_dtype dtype, int64_t n, int64_t block, const espi_format *f);
    int64_t (*mx)(uint8_t *codes, uint8_t *scales, const void *x, esp_dtype dtype, int64_t n, const espi_mx_rule *rule);
} espi_encoder;
/* Those that this machine offers, the fastest first (after = NULL); NULL at the end.  All give the same bytes. */
const espi_encoder *espi_encoder_next(const espi_encoder *after);
/* The sentence for the NaN or infinity in elements first .. first+n-1. */
esp_status espi_encode_nonfinite(const void *x, esp_dtype dtype, int64_t first, int64_t n);

#endif
