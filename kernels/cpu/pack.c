/* Packing of experts for products of bf16, in any machine's instructions; packed.h says into what. */
#include "kernels/cpu/packed.h"

size_t espi_cpu_packed_bytes(const espi_stack *w) {
    if (w->format == ESP_Q_NONE || w->rows % RECORD_ROWS != 0 || w->cols % RECORD_COLS != 0) return 0;
    return (size_t)(w->rows / RECORD_ROWS * (w->cols / RECORD_COLS) * record_bytes(w->format));
}

static unsigned code_at(const espi_stack *one, const uint8_t *codes, int64_t k) {
    const bool low = (k % 2 == 0) == (one->format == ESP_MXFP4);
    return low ? codes[k / 2] & 15u : codes[k / 2] >> 4;
}

static void pack_record(uint8_t *out, const espi_stack *one, int64_t row0, int64_t col0) {
    const int64_t part_rows = one->rows / one->parts, cols = one->cols;
    const int64_t block = one->format == ESP_MXFP4 ? ESPI_MXBLOCK : ESPI_QBLOCK;
    memset(out, 0, RECORD_CODES);
    for (int64_t n = 0; n < RECORD_ROWS; n++) {
        const int64_t part = (row0 + n) / part_rows, at = (row0 + n) % part_rows * cols + col0;
        const uint8_t *codes = (const uint8_t *)one->data + (size_t)part * one->part_bytes + at / 2;
        uint8_t *half = out + n / 16 * (RECORD_CODES / 2);
        const int64_t unit = n % 4 * 2, nibble = n % 16 / 4;
        for (int64_t k = 0; k < RECORD_COLS; k++)
            half[k / 2 * 16 + (unit + k % 2) * 2 + nibble / 2] |= (uint8_t)(code_at(one, codes, k) << nibble % 2 * 4);
        if (one->format == ESP_MXFP4) {
            for (int64_t b = 0; b < RECORD_COLS / ESPI_MXBLOCK; b++)
                out[RECORD_CODES + b * RECORD_ROWS + n] = one->scales[part * one->part_blocks + at / block + b];
        } else {
            const float scale = espi_stack_absmax(one, part, at / block);
            memcpy(out + RECORD_CODES + (size_t)n * sizeof scale, &scale, sizeof scale);
        }
    }
}

esp_status espi_cpu_pack(const espi_exec *exec, void *packed, const espi_stack *one) {
    const int64_t across = one->cols / RECORD_COLS, records = one->rows / RECORD_ROWS * across;
    const int threads = exec->threads;
    if (espi_cpu_packed_bytes(one) == 0)
        return ESPI_FAIL(ESP_ERR_SHAPE, "packing an expert of %lld x %lld, expected whole records of %d x %d: leave it as it is",
                         (long long)one->rows, (long long)one->cols, RECORD_ROWS, RECORD_COLS);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < records; i++)
        pack_record((uint8_t *)packed + i * record_bytes(one->format), one, i / across * RECORD_ROWS, i % across * RECORD_COLS);
    return ESP_OK;
}
