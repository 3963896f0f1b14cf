/* Experts packed for products of bf16, and what the file of an instruction set offers on them.
 *
 * An expert [n,k] is cut into records of 32 n by 64 k, k fastest, so that a forward reads it from one end to the other.  A record holds 1024
 * bytes of codes, then its scales: of NF4 and FP4 32 floats, one a row; of MXFP4 64 bytes, never 0, the 32 rows' of the first 32 k, then of
 * the others.  Codes of 16 n by 64 k follow each other, 16 bytes for each pair of k: eight 16-bit units, unit 2i + j of k + j with rows i, i + 4,
 * i + 8, i + 12 in its nibbles.  For amx_bf16 they are 64 bytes for each i, the units of 16 pairs, every fourth pair beside the next, and
 * those for the first 16 pairs come before the others.
 * Behind the records of an MXFP4 expert there is a byte for each 32 n: whether their scales are powers of two near each other and near 1.
 *
 * Forward (a lane is one n, its halves k and k + 1): the 16 bytes are repeated four times, which puts each unit where it is wanted, and a
 * shift by the quarter's place leaves the code in the low bits.  A permutation looks 32 entries up, of which two halves are alike, so the bit
 * above the code does not matter.  Backward (a lane is one k, its halves n and n + 4): units of 16 k are gathered once for two pairs of n.
 *
 * Numbers of avx512_bf16.  Forward: the products of 64 k are summed, values unscaled, then multiplied by the scale and added to the sum so
 * far; MXFP4's values are scaled, which is exact, and their products add up over the whole depth.  Backward, and everywhere in amx_bf16:
 * values are scaled and rounded to bf16, and products add up over the whole depth.  None of it depends on how many rows there are, so a
 * row's bits do not. */
#ifndef ESPI_KERNELS_CPU_PACKED_H
#define ESPI_KERNELS_CPU_PACKED_H

#include "core/status.h"
#include "kernels/backend.h"
#include "kernels/stack.h"

enum { RECORD_ROWS = 32, RECORD_COLS = 64, RECORD_CODES = RECORD_ROWS * RECORD_COLS / 2 };

static inline int64_t record_bytes(esp_qformat format) {
    return RECORD_CODES + (format == ESP_MXFP4 ? RECORD_ROWS * RECORD_COLS / ESPI_MXBLOCK : RECORD_ROWS * (int64_t)sizeof(float));
}

/* Slots of a backend's table: 0 bytes for an expert that the layout cannot hold, which then stays as it is. */
size_t espi_cpu_packed_bytes(const espi_stack *w);
esp_status espi_cpu_pack(const espi_exec *exec, void *packed, const espi_stack *one);
esp_status espi_cpu_pack_tiles(const espi_exec *exec, void *packed, const espi_stack *one);

#if defined(__AVX512BF16__)
#include "kernels/cpu/cpu.h"

/* One expert of a packed stack. */
typedef struct cpu_packed {
    const uint8_t *records;
    const float *lut;
    esp_qformat format;
    int64_t rows, cols;
} cpu_packed;

static inline cpu_packed cpu_packed_of(const espi_stack *w, int64_t expert) {
    const uint8_t *records = (const uint8_t *)w->packed + (size_t)expert * espi_cpu_packed_bytes(w);
    return (cpu_packed){records, w->lut, w->format, w->rows, w->cols};
}

/* What a task works on: at most so many columns of one expert's y, or of its d_x, and so many rows.  Tiles take longer to convert rows, so
 * they have them for all columns; only where threads would wait for each other they have fewer, whole LEAST_COLS, as make TASKS_EACH tasks a
 * thread. */
#if defined(__AMX_BF16__)
enum { TASK_COLS = 1 << 20, TASK_ROWS = 128 };
#else
enum { TASK_COLS = 256, TASK_ROWS = 512 };
#endif
enum { LEAST_COLS = 256, TASKS_EACH = 4 };

/* Columns `first` .. first + n - 1 of an expert and, where `second` is not 0, `second` .. second + n - 1; all whole records.  Rows of c begin
 * at column 0 and lie below each other, without an index. */
typedef struct cpu_columns {
    int64_t first, second, n;
} cpu_columns;

/* Bytes that a thread needs for either, with up to so many rows at a time. */
#define cpu_packed_work ESPI_CPU(espi_cpu_packed_work)
size_t cpu_packed_work(const espi_stack *w, int64_t rows);
/* c[0..m)[columns] = bias[columns] (NULL: 0) + a[0..m) W[columns]^T.  again: the last call with this work memory went the same way and had
 * these rows of a, so what it made of them may still be used. */
#define cpu_packed_forward ESPI_CPU(espi_cpu_packed_forward)
void cpu_packed_forward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, const float *bias, int64_t m, cpu_columns columns,
                        void *work, bool again);
/* c[0..m)[columns] = a[0..m) W[.][columns]. */
#define cpu_packed_backward ESPI_CPU(espi_cpu_packed_backward)
void cpu_packed_backward(const cpu_rows *c, const cpu_rows *a, const cpu_packed *w, int64_t m, cpu_columns columns, void *work, bool again);

#endif
#endif
