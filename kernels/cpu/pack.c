/* Packing of experts for products of bf16, in any machine's instructions; packed.h says into what. */
#include "kernels/cpu/packed.h"

size_t espi_cpu_packed_bytes(const espi_stack *w) {
    if (w->format == ESP_Q_NONE || w->rows % RECORD_ROWS != 0 || w->cols % RECORD_COLS != 0) return 0;
    return (size_t)(w->rows / RECORD_ROWS * (w->cols / RECORD_COLS) * record_bytes(w->format));
}

/* Where a row's codes of a record begin, and which part's block is its first. */
typedef struct record_row {
    const uint8_t *codes;
    int64_t part, block;
} record_row;

static record_row row_of(const espi_stack *one, int64_t row, int64_t col) {
    const int64_t part_rows = one->rows / one->parts, part = row / part_rows, at = row % part_rows * one->cols + col;
    return (record_row){(const uint8_t *)one->data + (size_t)part * one->part_bytes + at / 2, part,
                        at / (one->format == ESP_MXFP4 ? ESPI_MXBLOCK : ESPI_QBLOCK)};
}

/* The codes of rows i, i + 4, i + 8 and i + 12 of 16: of every pair of k the two units, from four bytes. */
static void pack_units(uint8_t *out, const uint8_t *const codes[4], bool low_first) {
    const int first = low_first ? 0 : 4, second = 4 - first;
    for (int64_t pair = 0; pair < RECORD_COLS / 2; pair++, out += 16) {
        for (int low = 0; low < 2; low++) {
            const unsigned a = codes[2 * low][pair], b = codes[2 * low + 1][pair];
            out[low] = (uint8_t)((a >> first & 15u) | (b >> first & 15u) << 4);
            out[2 + low] = (uint8_t)((a >> second & 15u) | (b >> second & 15u) << 4);
        }
    }
}

static void pack_record(uint8_t *out, const espi_stack *one, int64_t row0, int64_t col0) {
    record_row rows[RECORD_ROWS];
    for (int64_t n = 0; n < RECORD_ROWS; n++) rows[n] = row_of(one, row0 + n, col0);
    for (int64_t n = 0; n < RECORD_ROWS; n++) {
        const record_row *r = &rows[n];
        if (n % 16 < 4)
            pack_units(out + n / 16 * (RECORD_CODES / 2) + n % 4 * 4,
                       (const uint8_t *const[4]){r[0].codes, r[4].codes, r[8].codes, r[12].codes}, one->format == ESP_MXFP4);
        if (one->format == ESP_MXFP4) {
            for (int64_t b = 0; b < RECORD_COLS / ESPI_MXBLOCK; b++)
                out[RECORD_CODES + b * RECORD_ROWS + n] = one->scales[r->part * one->part_blocks + r->block + b];
        } else {
            const float scale = espi_stack_absmax(one, r->part, r->block);
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
