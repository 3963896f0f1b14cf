/* A tensor of a checkpoint in memory as bitsandbytes stores it. */
#ifndef ESP_TEST_QUANTISE_ITEM_H
#define ESP_TEST_QUANTISE_ITEM_H

#include "checkpoint.h"
#include "espalier/quant.h"

/* The matrix `name` becomes what a Linear4bit of it is stored as; rows and columns as its dims say.  Returns its decoded values. */
static inline float *quantise_item(checkpoint *c, const char *name, esp_qformat format, bool nested) {
    const espi_st_item item = *checkpoint_item(c, name);
    int64_t n = 1;
    for (int i = 0; i < item.rank; i++) n *= item.dims[i];
    const int64_t blocks = (n + 63) / 64, n_nested = (blocks + 255) / 256;
    const char *type = format == ESP_NF4 ? "nf4" : "fp4";
    uint8_t *codes = checkpoint_own(c, calloc((size_t)n / 2 + 1, 1)), *absmax8 = checkpoint_own(c, malloc((size_t)blocks));
    float *absmax = checkpoint_own(c, malloc((size_t)blocks * sizeof *absmax)), *own = checkpoint_own(c, malloc((size_t)n_nested * 4));
    float *values = checkpoint_own(c, malloc((size_t)n * sizeof *values)), offset = 0;
    char key[200], state[300], shape[80], tail[120] = "";
    OK(esp_quantize(codes, absmax, item.data, item.dtype, n, 64, format));
    if (nested) {
        OK(esp_absmax_quantize(absmax8, own, &offset, absmax, blocks));
        OK(esp_absmax_dequantize(absmax, absmax8, own, offset, NULL, blocks));
        snprintf(tail, sizeof tail, ", \"nested_blocksize\": 256, \"nested_dtype\": \"float32\", \"nested_offset\": %.9g", (double)offset);
    }
    OK(esp_dequantize(values, codes, absmax, n, 64, format));
    if (item.rank == 3)
        snprintf(shape, sizeof shape, "%lld, %lld, %lld", (long long)item.dims[0], (long long)item.dims[1], (long long)item.dims[2]);
    else
        snprintf(shape, sizeof shape, "%lld, %lld", (long long)item.dims[0], (long long)item.dims[1]);
    snprintf(state, sizeof state, "{\"quant_type\": \"%s\", \"blocksize\": 64, \"dtype\": \"float32\", \"shape\": [%s]%s}", type, shape,
             tail);
    checkpoint_drop(c, name);
    checkpoint_add(c, name, ESP_U8, 2, (int64_t[]){(n + 1) / 2, 1}, codes, (size_t)(n + 1) / 2);
    snprintf(key, sizeof key, "%s.absmax", name);
    checkpoint_add(c, key, nested ? ESP_U8 : ESP_F32, 1, &blocks, nested ? (void *)absmax8 : (void *)absmax,
                   (size_t)blocks * (nested ? 1 : sizeof *absmax));
    snprintf(key, sizeof key, "%s.quant_map", name);
    checkpoint_add(c, key, ESP_F32, 1, (int64_t[]){16}, esp_quant_table(format), 16 * sizeof(float));
    snprintf(key, sizeof key, "%s.quant_state.bitsandbytes__%s", name, type);
    checkpoint_add(c, key, ESP_U8, 1, (int64_t[]){(int64_t)strlen(state)}, state, strlen(state));
    if (!nested) return values;
    snprintf(key, sizeof key, "%s.nested_absmax", name);
    checkpoint_add(c, key, ESP_F32, 1, &n_nested, own, (size_t)n_nested * sizeof *own);
    snprintf(key, sizeof key, "%s.nested_quant_map", name);
    checkpoint_add(c, key, ESP_F32, 1, (int64_t[]){256}, esp_dynamic_map(1), 256 * sizeof(float));
    return values;
}

#endif
