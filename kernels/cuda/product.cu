/* The dense product behind linear, router and head: cuBLASLt where it takes the operands, else a general kernel. */
#include "kernels/cuda/cuda.cuh"

namespace {

enum { THREADS = 256, TILE = 64, STEP = 16, EACH = 4, PAD = 4, MOST_ALIGNED = 256 };

/* A tile of TILE x STEP values of an operand, as tile[k][i]; `inner` is the stride of k. */
__device__ void load_tile(float (*tile)[TILE + PAD], const espi_operand &o, int64_t outer, int64_t inner, int64_t first, int64_t end,
                          int64_t step, int64_t steps) {
    const bool is_inner_dense = inner <= outer;
    for (int at = static_cast<int>(threadIdx.x); at < TILE * STEP; at += THREADS) {
        const int i = is_inner_dense ? at / STEP : at % TILE, k = is_inner_dense ? at % STEP : at / TILE;
        const bool is_inside = first + i < end && step + k < steps;
        tile[k][i] = is_inside ? espi_plain_cuda(o.data, o.dtype, (first + i) * outer + (step + k) * inner) : 0;
    }
}

template <typename D> __global__ void __launch_bounds__(THREADS) general(espi_product p) {
    __shared__ float left[STEP][TILE + PAD], right[STEP][TILE + PAD];
    const int64_t row0 = static_cast<int64_t>(blockIdx.y) * TILE, col0 = static_cast<int64_t>(blockIdx.x) * TILE;
    const int ty = static_cast<int>(threadIdx.x) / (TILE / EACH) * EACH, tx = static_cast<int>(threadIdx.x) % (TILE / EACH) * EACH;
    float sum[EACH][EACH] = {};
    for (int64_t step = 0; step < p.k; step += STEP) {
        load_tile(left, p.a, p.a.row, p.a.col, row0, p.m, step, p.k);
        load_tile(right, p.b, p.b.col, p.b.row, col0, p.n, step, p.k);
        __syncthreads();
#pragma unroll
        for (int k = 0; k < STEP; k++) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
#pragma unroll
                for (int j = 0; j < EACH; j++) sum[i][j] += left[k][ty + i] * right[k][tx + j];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int64_t row = row0 + ty + i, col = col0 + tx + j;
            if (row >= p.m || col >= p.n) continue;
            D *to = static_cast<D *>(p.d) + row * p.stride + col;
            float value = p.alpha * sum[i][j];
            if (p.beta != 0) value += p.beta * espi_value(*to);
            if (p.bias) value += espi_plain_cuda(p.bias, p.bias_dtype, col);
            espi_store(to, value);
        }
    }
}

__global__ void __launch_bounds__(THREADS) narrow(bf16 *out, const float *x, int64_t n) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i < n) espi_store(out + i, x[i]);
}

/* Which stride is 1 decides the transposition; the other is the leading dimension. */
bool is_by_row(const espi_operand *o) {
    return o->col == 1 && o->row % 8 == 0;
}

bool fits(const espi_operand *o) {
    return o->dtype == ESP_BF16 && espi_aligned16(o->data) && (is_by_row(o) || (o->row == 1 && o->col % 8 == 0));
}

uint32_t alignment_of(const void *p) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(p);
    uint32_t bytes = 16;
    while (bytes < MOST_ALIGNED && address % (2 * static_cast<uintptr_t>(bytes)) == 0) bytes *= 2;
    return bytes;
}

/* One call of cuBLASLt and what it is described by. */
struct dense_call {
    cublasLtMatmulDesc_t matmul;
    cublasLtMatrixLayout_t left, right, out;
    cublasLtMatmulPreference_t preference;
    cublasStatus_t status; /* once it is no success, nothing more is tried */
};

void set(dense_call *c, cublasLtMatmulDescAttributes_t what, const void *value, size_t size) {
    if (c->status == CUBLAS_STATUS_SUCCESS) c->status = cublasLtMatmulDescSetAttribute(c->matmul, what, value, size);
}

void prefer(dense_call *c, cublasLtMatmulPreferenceAttributes_t what, const void *value, size_t size) {
    if (c->status == CUBLAS_STATUS_SUCCESS) c->status = cublasLtMatmulPreferenceSetAttribute(c->preference, what, value, size);
}

/* By columns, as cuBLASLt counts: `stride` values from one column to the next. */
void describe(dense_call *c, cublasLtMatrixLayout_t *layout, cudaDataType_t type, int64_t rows, int64_t cols, int64_t stride) {
    if (c->status == CUBLAS_STATUS_SUCCESS)
        c->status = cublasLtMatrixLayoutCreate(layout, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(cols), stride);
}

void drop(const dense_call *c) {
    if (c->preference) (void)cublasLtMatmulPreferenceDestroy(c->preference);
    if (c->left) (void)cublasLtMatrixLayoutDestroy(c->left);
    if (c->right) (void)cublasLtMatrixLayoutDestroy(c->right);
    if (c->out) (void)cublasLtMatrixLayoutDestroy(c->out);
    if (c->matmul) (void)cublasLtMatmulDescDestroy(c->matmul);
}

/* What is computed is the transpose of d, b^T a^T: a row-major matrix is its transpose by columns. */
cublasStatus_t dense(const espi_cuda *cuda, const espi_product *p) {
    dense_call c = {};
    const cudaDataType_t type = p->dtype == ESP_F32 ? CUDA_R_32F : CUDA_R_16BF, bias_type = CUDA_R_16BF;
    const cublasOperation_t op_left = is_by_row(&p->b) ? CUBLAS_OP_N : CUBLAS_OP_T, op_right = is_by_row(&p->a) ? CUBLAS_OP_N : CUBLAS_OP_T;
    const cublasLtEpilogue_t epilogue = p->bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    const uint32_t aligned_left = alignment_of(p->b.data), aligned_right = alignment_of(p->a.data), aligned_out = alignment_of(p->d);
    const size_t workspace = cuda->workspace_bytes;
    cublasLtMatmulHeuristicResult_t found;
    int n_found = 0;
    c.status = cublasLtMatmulDescCreate(&c.matmul, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    set(&c, CUBLASLT_MATMUL_DESC_TRANSA, &op_left, sizeof op_left);
    set(&c, CUBLASLT_MATMUL_DESC_TRANSB, &op_right, sizeof op_right);
    if (p->bias) {
        set(&c, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue, sizeof epilogue);
        set(&c, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &p->bias, sizeof p->bias);
        set(&c, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &bias_type, sizeof bias_type);
    }
    if (op_left == CUBLAS_OP_N)
        describe(&c, &c.left, CUDA_R_16BF, p->n, p->k, p->b.row);
    else
        describe(&c, &c.left, CUDA_R_16BF, p->k, p->n, p->b.col);
    if (op_right == CUBLAS_OP_N)
        describe(&c, &c.right, CUDA_R_16BF, p->k, p->m, p->a.row);
    else
        describe(&c, &c.right, CUDA_R_16BF, p->m, p->k, p->a.col);
    describe(&c, &c.out, type, p->n, p->m, p->stride);
    if (c.status == CUBLAS_STATUS_SUCCESS) c.status = cublasLtMatmulPreferenceCreate(&c.preference);
    prefer(&c, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &workspace, sizeof workspace);
    prefer(&c, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &aligned_left, sizeof aligned_left);
    prefer(&c, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &aligned_right, sizeof aligned_right);
    prefer(&c, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &aligned_out, sizeof aligned_out);
    prefer(&c, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &aligned_out, sizeof aligned_out);
    if (c.status == CUBLAS_STATUS_SUCCESS)
        c.status = cublasLtMatmulAlgoGetHeuristic(cuda->blas, c.matmul, c.left, c.right, c.out, c.out, c.preference, 1, &found, &n_found);
    if (c.status == CUBLAS_STATUS_SUCCESS && n_found == 0) c.status = CUBLAS_STATUS_NOT_SUPPORTED;
    if (c.status == CUBLAS_STATUS_SUCCESS)
        c.status = cublasLtMatmul(cuda->blas, c.matmul, &p->alpha, p->b.data, c.left, p->a.data, c.right, &p->beta, p->d, c.out, p->d,
                                  c.out, &found.algo, cuda->workspace, workspace, cuda->stream);
    drop(&c);
    return c.status;
}

} // namespace

bool espi_product_is_dense(const espi_product *p) {
    return fits(&p->a) && fits(&p->b) && espi_aligned16(p->d) && p->stride % 8 == 0 && (!p->bias || p->bias_dtype == ESP_BF16);
}

esp_status espi_product_cuda(const espi_exec *exec, const espi_product *p) {
    if (p->m * p->n == 0) return ESP_OK;
    if (espi_product_is_dense(p) && p->k > 0) {
        const cublasStatus_t status = dense(espi_cuda_of(exec), p);
        if (status == CUBLAS_STATUS_SUCCESS) return ESP_OK;
        return ESPI_FAIL(
            ESP_ERR_DEVICE,
            "cuBLASLt gave status %d for a product of %lld x %lld x %lld, expected 0: is another version of the library installed "
            "than was compiled for?",
            static_cast<int>(status), (long long)p->m, (long long)p->n, (long long)p->k);
    }
    const dim3 blocks(espi_blocks(p->n, TILE), espi_blocks(p->m, TILE));
    if (blocks.y > 65535)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "a general product on the GPU has %lld rows, expected at most %d: use bf16 weights with rows of a "
                         "multiple of 8",
                         (long long)p->m, 65535 * TILE);
    if (p->dtype == ESP_F32)
        general<float><<<blocks, THREADS, 0, espi_cuda_of(exec)->stream>>>(*p);
    else
        general<bf16><<<blocks, THREADS, 0, espi_cuda_of(exec)->stream>>>(*p);
    return ESPI_CUDA_LAUNCHED("general product");
}

esp_status espi_narrow_cuda(const espi_exec *exec, bf16 *out, const void *x, int64_t n) {
    if (n == 0) return ESP_OK;
    narrow<<<espi_blocks(n, THREADS), THREADS, 0, espi_cuda_of(exec)->stream>>>(out, static_cast<const float *>(x), n);
    return ESPI_CUDA_LAUNCHED("rounding to bf16");
}
