/* gpt-oss in every layout that its checkpoints have, from a golden folder of MXFP4 blocks; and what else is done to tensors in memory. */
#ifndef ESP_TEST_GPT_OSS_FORMS_H
#define ESP_TEST_GPT_OSS_FORMS_H

#include "checkpoint.h"
#include "espalier/quant.h"

#define GO(n) "model.layers." n ".mlp.experts."

static inline size_t bytes_of(const espi_st_item *item) {
    size_t n = esp_dtype_size(item->dtype);
    for (int i = 0; i < item->rank; i++) n *= (size_t)item->dims[i];
    return n;
}

/* [E,a,b] becomes [E,b,a]. */
static inline void turn(checkpoint *c, const char *name) {
    espi_st_item *item = checkpoint_item(c, name);
    const int64_t e = item->dims[0], a = item->dims[1], b = item->dims[2];
    const size_t size = esp_dtype_size(item->dtype);
    const char *from = item->data;
    char *to = checkpoint_own(c, malloc(bytes_of(item)));
    for (int64_t i = 0; i < e; i++)
        for (int64_t j = 0; j < a; j++)
            for (int64_t k = 0; k < b; k++)
                memcpy(to + (size_t)((i * b + k) * a + j) * size, from + (size_t)((i * a + j) * b + k) * size, size);
    item->data = to;
    item->dims[1] = b;
    item->dims[2] = a;
}

static inline void rename_item(checkpoint *c, const char *from, const char *to) {
    checkpoint_item(c, from)->name = to;
}

static inline uint16_t bf16_bits(float value) { /* of a value that BF16 holds */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    cr_assert_eq(bits & 0xffffu, 0);
    return (uint16_t)(bits >> 16);
}

/* Blocks and scales give way to their values in BF16, [E,out,in]. */
static inline void decode(checkpoint *c, const char *name) {
    char part[200];
    snprintf(part, sizeof part, "%s_blocks", name);
    const espi_st_item blocks = *checkpoint_item(c, part);
    checkpoint_drop(c, part);
    snprintf(part, sizeof part, "%s_scales", name);
    const espi_st_item scales = *checkpoint_item(c, part);
    checkpoint_drop(c, part);
    const int64_t n = (int64_t)bytes_of(&blocks) * 2;
    float *wide = malloc((size_t)n * sizeof *wide);
    uint16_t *narrow = malloc((size_t)n * sizeof *narrow);
    cr_assert(wide && narrow);
    OK(esp_mxfp4_dequantize(wide, blocks.data, scales.data, n));
    for (int64_t i = 0; i < n; i++) narrow[i] = bf16_bits(wide[i]);
    checkpoint_add(c, name, ESP_BF16, 3, (int64_t[]){blocks.dims[0], blocks.dims[1], blocks.dims[2] * 32}, narrow, (size_t)n * 2);
    free(wide);
    free(narrow);
}

/* go2 as its 16-bit checkpoint is published: [E,in,out], columns of gate and up in turn. */
static inline checkpoint *plain_gpt_oss(void) {
    static const char *const names[] = {GO("0") "gate_up_proj", GO("0") "down_proj", GO("1") "gate_up_proj", GO("1") "down_proj"};
    checkpoint *c = checkpoint_open("go2/model");
    for (int i = 0; i < (int)(sizeof names / sizeof *names); i++) {
        decode(c, names[i]);
        turn(c, names[i]);
    }
    checkpoint_set(c, "quantization_config", NULL);
    return c;
}

/* One expert after the other of `name` [E,..], as a list of tensors. */
static inline void split(checkpoint *c, const char *name, const char *format) {
    const espi_st_item whole = *checkpoint_item(c, name);
    const size_t each = bytes_of(&whole) / (size_t)whole.dims[0];
    checkpoint_drop(c, name);
    for (int64_t e = 0; e < whole.dims[0]; e++) {
        char part[200];
        snprintf(part, sizeof part, format, (int)e);
        checkpoint_add(c, part, whole.dtype, whole.rank - 1, whole.dims + 1, (const char *)whole.data + (size_t)e * each, each);
    }
}

/* Layer 1 in the layout of bitsandbytes files. */
static inline void list_experts(checkpoint *c) {
    turn(c, GO("1") "gate_up_proj");
    turn(c, GO("1") "down_proj");
    split(c, GO("1") "gate_up_proj", GO("1") "gate_up_projs.%d.weight");
    split(c, GO("1") "gate_up_proj_bias", GO("1") "gate_up_projs.%d.bias");
    split(c, GO("1") "down_proj", GO("1") "down_projs.%d.weight");
    split(c, GO("1") "down_proj_bias", GO("1") "down_projs.%d.bias");
    rename_item(c, "model.layers.1.mlp.router.weight", "model.layers.1.mlp.router.linear.weight");
    rename_item(c, "model.layers.1.mlp.router.bias", "model.layers.1.mlp.router.linear.bias");
}

#endif
