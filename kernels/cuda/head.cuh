/* Between head.cu and head_wgmma.cu: the products of many rows with a slice of the vocabulary. */
#ifndef ESPI_KERNELS_CUDA_HEAD_CUH
#define ESPI_KERNELS_CUDA_HEAD_CUH

#include "kernels/cuda/cuda.cuh"

#define HEAD_TILE 256 /* columns that have sums of their own; slices are of whole tiles */

/* What is left of a product x of a row, rounded to bf16: itself; or its weight 2^(slope x - shift), and sums of the weights, from both of which
 * the target's is left out; or the sums alone. */
enum head_output { HEAD_PRODUCTS, HEAD_WEIGHTS, HEAD_SUMS };

struct head_slice {
    bf16 *out; /* [rows, stride], column 0 the first of the slice; HEAD_WEIGHTS: stride holds whole tiles */
    int64_t stride;
    float2 *sums;          /* [rows, tiles of the vocabulary] of weights, and of weight times x */
    float *target_x;       /* [rows] the target's product, from the slice that has it */
    const float *shift;    /* [rows] */
    const int32_t *target; /* [rows] */
    int rows, vocab, hidden, first_tile, tiles;
    float slope;
};

/* sm_90a only; hidden is a multiple of 64, and x [rows, hidden] and w [vocab, hidden] are aligned to 16. */
bool head_wgmma_available();
cudaError_t head_wgmma(const head_slice *s, head_output output, const bf16 *x, const bf16 *w, int multiprocessors, cudaStream_t stream);

#endif
