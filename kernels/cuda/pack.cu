/* Packs a raw 4-bit stack (ops.h: espi_stack) into the 64 x 64 records of experts.cuh: one copy, which forward and backward both read. */
#include "kernels/cuda/experts.cuh"

/* Eight e2m1 codes, element j at nibble j, as bf16 arithmetic wants them: even elements in the low half of the word, odd ones in the high
 * half, each as sign and 3 bits at 15|8..6, 12|5..3, 9|2..0 and 14|13,11,10. */
static __device__ uint32_t interleave_mx(uint32_t nibbles) {
    uint32_t word = 0;
    for (int j = 0; j < 8; j++) {
        const uint32_t code = nibbles >> 4 * j & 15u, sign = code >> 3, field = code & 7u;
        const uint32_t half =
            j / 2 < 3 ? sign << (15 - 3 * (j / 2)) | field << (6 - 3 * (j / 2)) : sign << 14 | (field >> 2) << 13 | (field & 3u) << 10;
        word |= half << 16 * (j % 2);
    }
    return word;
}

/* A block is a record, a thread 32 columns of one of its rows. */
static __global__ __launch_bounds__(128) void pack(uint8_t *records, espi_stack w, int row_blocks, int column_blocks) {
    const int64_t record = blockIdx.x;
    const int row = threadIdx.x % 64, half = threadIdx.x / 64;
    const int64_t expert = record / ((int64_t)row_blocks * column_blocks);
    const int64_t line = record / column_blocks % row_blocks * 64 + row, column = record % column_blocks * 64 + 32 * half;
    const int64_t part_rows = w.rows / w.parts, part = expert * w.parts + line / part_rows, i = line % part_rows * w.cols + column;
    uint8_t *to = records + record * RECORD_BYTES(w.format);
    const uint4 raw = *(const uint4 *)((const uint8_t *)w.data + part * (int64_t)w.part_bytes + i / 2);
    const uint32_t in[4] = {raw.x, raw.y, raw.z, raw.w};
    uint32_t out[4];
    for (int j = 0; j < 4; j++) {
        uint32_t word = 0;
        for (int i = 0; i < 4; i++) word |= (in[i] >> 8 * j & 255u) << 8 * i;
        out[j] = w.format == ESP_MXFP4 ? interleave_mx(word) : (word & 0x0f0f0f0fu) << 4 | (word >> 4 & 0x0f0f0f0fu);
    }
    *(uint4 *)(to + half * 1024 + row * 16) = make_uint4(out[0], out[1], out[2], out[3]);
    if (w.format == ESP_MXFP4) {
        to[RECORD_CODES + 2 * row + half] = w.scales[part * w.part_blocks + i / ESPI_MXBLOCK];
    } else if (half == 0) {
        const int64_t block = i / ESPI_QBLOCK;
        float absmax;
        if (w.absmax8)
            absmax = __fadd_rn(
                __fmul_rn(w.map[w.absmax8[part * w.part_blocks + block]], w.nested[part * w.part_nested + block / ESPI_NESTED_BLOCK]),
                w.offset[part]);
        else
            absmax = w.absmax[part * w.part_blocks + block];
        ((float *)(to + RECORD_CODES))[row] = absmax;
    }
}

size_t espi_record_bytes(const espi_stack *w) {
    const bool whole = w->rows % 64 == 0 && w->cols % 64 == 0 && w->rows / w->parts % 64 == 0;
    if (!whole || (w->format != ESP_NF4 && w->format != ESP_FP4 && w->format != ESP_MXFP4)) return 0;
    return (size_t)(w->rows / 64 * (w->cols / 64)) * RECORD_BYTES(w->format);
}

cudaError_t espi_pack_records(void *records, const espi_stack *w, cudaStream_t stream) {
    const int row_blocks = (int)(w->rows / 64), column_blocks = (int)(w->cols / 64);
    pack<<<(unsigned)(w->experts * row_blocks * column_blocks), 128, 0, stream>>>((uint8_t *)records, *w, row_blocks, column_blocks);
    return cudaGetLastError();
}
