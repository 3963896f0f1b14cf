/* What the copy engine is told of a matrix of which it brings boxes. */
#ifndef ESPI_KERNELS_CUDA_BOXES_CUH
#define ESPI_KERNELS_CUDA_BOXES_CUH

#include "kernels/cuda/cuda.cuh"

#include <cuda.h>

#define BOX_COLUMNS 64 /* 128 bytes, as dev_tile has them */

/* Boxes of box_rows x BOX_COLUMNS of a matrix whose rows are a multiple of 16 bytes; columns past its own are 0. */
static inline cudaError_t make_boxes(CUtensorMap *map, const bf16 *from, int64_t rows, int64_t columns, int box_rows) {
    void *encode = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &encode, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (found != cudaDriverEntryPointSuccess) return cudaErrorSymbolNotFound;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
                     row_bytes[] = {static_cast<cuuint64_t>(columns) * sizeof(bf16)};
    const cuuint32_t box[] = {BOX_COLUMNS, static_cast<cuuint32_t>(box_rows)}, dense[] = {1, 1};
    const CUresult result = reinterpret_cast<decltype(cuTensorMapEncodeTiled) *>(encode)(
        map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<bf16 *>(from), sizes, row_bytes, box, dense, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#endif
