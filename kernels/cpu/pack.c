/* Packing of experts for products of bf16, in any machine's instructions; packed.h says into what. */
#include "kernels/cpu/packed.h"

size_t espi_cpu_packed_bytes(const espi_stack *w) {
    if (w->format == ESP_Q_NONE || w->rows % RECORD_ROWS != 0 || w->cols % RECORD_COLS != 0) return 0;
    const size_t records = (size_t)(w->rows / RECORD_ROWS * (w->cols / RECORD_COLS) * record_bytes(w->format));
    return records + (w->format == ESP_MXFP4 ? ((size_t)(w->rows / RECORD_ROWS) + 63) / 64 * 64 : 0);
}

/* Scale bytes of MXFP4: 6 times 2^125 is the last product that bf16 holds.  Powers between which sums may go to and fro in f32. */
enum { LARGEST_SCALE = 252, NEAR_LOWEST = 96, NEAR_HIGHEST = 158 };

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

/* Where of 16 rows' codes the two units of a pair of k and of rows i, i + 4, i + 8 and i + 12 begin. */
static int64_t units_at(int64_t pair, int64_t i, bool tiles) {
    const int64_t q = pair % 16;
    return tiles ? pair / 16 * 256 + i * 64 + (q % 4 * 4 + q / 4) * 4 : pair * 16 + i * 4;
}

/* The codes of rows i, i + 4, i + 8 and i + 12 of 16: of every pair of k the two units, from four bytes. */
static void pack_units(uint8_t *codes16, const uint8_t *const codes[4], int64_t i, bool low_first, bool tiles) {
    const int first = low_first ? 0 : 4, second = 4 - first;
    for (int64_t pair = 0; pair < RECORD_COLS / 2; pair++) {
        uint8_t *out = codes16 + units_at(pair, i, tiles);
        for (int low = 0; low < 2; low++) {
            const unsigned a = codes[2 * low][pair], b = codes[2 * low + 1][pair];
            out[low] = (uint8_t)((a >> first & 15u) | (b >> first & 15u) << 4);
            out[2 + low] = (uint8_t)((a >> second & 15u) | (b >> second & 15u) << 4);
        }
    }
}

/* MXFP4: bf16 has normal numbers from 2^-126 on, so a block of 2^-127 becomes one of 2^-126 whose values are half as large; those of less
 * than 2^-126, which products of bf16 take as 0, become 0.  codes: the record's of the row, or `halved` with those blocks changed. */
static const uint8_t *normal_codes(uint8_t halved[RECORD_COLS / 2], const uint8_t *codes, const uint8_t *scales) {
    static const uint8_t half[8] = {0, 0, 0, 0, 2, 3, 4, 5}; /* of 0, 0.5, 1, 1.5, 2, 3, 4, 6; 0.75 is not normal */
    if (scales[0] != 0 && scales[1] != 0) return codes;
    for (int64_t i = 0; i < RECORD_COLS / 2; i++) {
        const unsigned code = codes[i];
        const bool small = scales[i / (ESPI_MXBLOCK / 2)] == 0;
        halved[i] = (uint8_t)(small ? (code & 0x88u) | half[code & 7u] | (unsigned)half[code >> 4 & 7u] << 4 : code);
    }
    return halved;
}

static void pack_record(uint8_t *out, const espi_stack *one, int64_t row0, int64_t col0, bool tiles) {
    record_row rows[RECORD_ROWS];
    uint8_t halved[RECORD_ROWS][RECORD_COLS / 2];
    for (int64_t n = 0; n < RECORD_ROWS; n++) {
        rows[n] = row_of(one, row0 + n, col0);
        if (one->format == ESP_MXFP4)
            rows[n].codes = normal_codes(halved[n], rows[n].codes, one->scales + rows[n].part * one->part_blocks + rows[n].block);
    }
    for (int64_t n = 0; n < RECORD_ROWS; n++) {
        const record_row *r = &rows[n];
        if (n % 16 < 4)
            pack_units(out + n / 16 * (RECORD_CODES / 2), (const uint8_t *const[4]){r[0].codes, r[4].codes, r[8].codes, r[12].codes}, n % 4,
                       one->format == ESP_MXFP4, tiles);
        if (one->format == ESP_MXFP4) {
            for (int64_t b = 0; b < RECORD_COLS / ESPI_MXBLOCK; b++) {
                const uint8_t scale = one->scales[r->part * one->part_blocks + r->block + b];
                out[RECORD_CODES + b * RECORD_ROWS + n] = scale == 0 ? 1 : scale;
            }
        } else {
            const float scale = espi_stack_absmax(one, r->part, r->block);
            memcpy(out + RECORD_CODES + (size_t)n * sizeof scale, &scale, sizeof scale);
        }
    }
}

static bool zeros(const uint8_t *codes) {
    unsigned any = 0;
    for (int64_t i = 0; i < ESPI_MXBLOCK / 2; i++) any |= codes[i];
    return (any & 0x77) == 0;
}

/* The scale of a block of zeros says nothing: it becomes the highest of the 32 rows.  Whether all are near. */
static bool settle_scales(uint8_t *records, const espi_stack *one, int64_t row0) {
    const int64_t blocks = one->cols / ESPI_MXBLOCK, per_record = RECORD_COLS / ESPI_MXBLOCK;
    uint8_t lowest = NEAR_HIGHEST, highest = NEAR_LOWEST;
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t n = 0; n < RECORD_ROWS; n++) {
            for (int64_t b = 0; b < blocks; b++) {
                uint8_t *scale = records + b / per_record * record_bytes(ESP_MXFP4) + RECORD_CODES + b % per_record * RECORD_ROWS + n;
                const bool empty = zeros(row_of(one, row0 + n, b * ESPI_MXBLOCK).codes);
                if (pass == 1 && empty) *scale = highest;
                if (pass == 1 || empty) continue;
                lowest = *scale < lowest ? *scale : lowest;
                highest = *scale > highest ? *scale : highest;
            }
        }
    }
    return lowest >= NEAR_LOWEST && highest <= NEAR_HIGHEST;
}

static esp_status pack(const espi_exec *exec, void *packed, const espi_stack *one, bool tiles) {
    const int64_t across = one->cols / RECORD_COLS, strips = one->rows / RECORD_ROWS, record = record_bytes(one->format);
    uint8_t *near = (uint8_t *)packed + strips * across * record;
    const int threads = exec->threads;
    if (espi_cpu_packed_bytes(one) == 0)
        return ESPI_FAIL(ESP_ERR_SHAPE, "packing an expert of %lld x %lld, expected whole records of %d x %d: leave it as it is",
                         (long long)one->rows, (long long)one->cols, RECORD_ROWS, RECORD_COLS);
    for (int64_t b = 0; one->format == ESP_MXFP4 && b < one->parts * one->part_blocks; b++)
        if (one->scales[b] > LARGEST_SCALE)
            return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                             "packing an expert whose block %lld of 32 has scale byte %d, expected at most %d (2^%d): use a "
                             "backend that multiplies in f32",
                             (long long)b, one->scales[b], LARGEST_SCALE, LARGEST_SCALE - 127);
    if (one->format == ESP_MXFP4) memset(near, 0, espi_cpu_packed_bytes(one) - (size_t)(near - (uint8_t *)packed));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < strips; i++) {
        uint8_t *out = (uint8_t *)packed + i * across * record;
        for (int64_t k = 0; k < across; k++) pack_record(out + k * record, one, i * RECORD_ROWS, k * RECORD_COLS, tiles);
        if (one->format == ESP_MXFP4) near[i] = settle_scales(out, one, i * RECORD_ROWS);
    }
    return ESP_OK;
}

esp_status espi_cpu_pack(const espi_exec *exec, void *packed, const espi_stack *one) {
    return pack(exec, packed, one, false);
}

esp_status espi_cpu_pack_tiles(const espi_exec *exec, void *packed, const espi_stack *one) {
    return pack(exec, packed, one, true);
}
