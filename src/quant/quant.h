/* What a 4-bit format is: 16 values, and how a block of numbers becomes codes. */
#ifndef ESPI_QUANT_QUANT_H
#define ESPI_QUANT_QUANT_H

#include "espalier/quant.h"

typedef struct espi_format {
    const char *name; /* as bitsandbytes' quant_type spells it */
    esp_qformat id;
    float values[16]; /* by code */
    /* A value's code is code_of_rank[number of thresholds strictly below it]: ascending thresholds between neighbouring values; a value on
     * a threshold takes the lower code.  FP4 has one value less, for its second zero. */
    float thresholds[15];
    uint8_t code_of_rank[16];
    int ranks;
} espi_format;

#define ESPI_FORMAT(id, name) extern const espi_format espi_format_##name;
#include "quant/formats.def"
#undef ESPI_FORMAT

/* NULL for ESP_Q_NONE, ESP_MXFP4 and unknown values. */
const espi_format *espi_format_find(esp_qformat format);
/* By bitsandbytes' quant_type, e.g. "nf4"; NULL when not known. */
const espi_format *espi_format_named(const char *name);

#endif
