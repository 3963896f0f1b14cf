/* Dense layer with a frozen weight and a low-rank branch.  The branch's product goes into the output first, then the weight's is added to it:
 * the smaller of the two is what is rounded twice. */
#include "kernels/cuda/cuda.cuh"

namespace {

/* The branch's matrices as the products read them: in bf16 beside a weight for cuBLASLt, as they are beside another. */
struct branch {
    espi_operand a_rows, a_columns, b_rows, b_columns; /* A, A^T, B, B^T */
};

espi_operand weight_rows(const espi_mat *w) {
    return espi_rows_of(w->data, w->dtype, w->cols);
}

espi_operand weight_columns(const espi_mat *w) {
    return espi_transpose_of(w->data, w->dtype, w->cols);
}

size_t branch_room(const espi_lora *lora, int64_t in, int64_t out) {
    return espi_room(lora->r * in, sizeof(bf16)) + espi_room(lora->r * out, sizeof(bf16));
}

esp_status take_branch(const espi_exec *exec, branch *l, char **scratch, const espi_lora *lora, int64_t in, int64_t out, bool narrow) {
    const void *a = lora->a, *b = lora->b;
    const esp_dtype dtype = narrow ? ESP_BF16 : ESP_F32;
    if (narrow) {
        bf16 *a16 = espi_cut<bf16>(scratch, lora->r * in), *b16 = espi_cut<bf16>(scratch, lora->r * out);
        ESPI_TRY(espi_narrow_cuda(exec, a16, a, lora->r * in));
        ESPI_TRY(espi_narrow_cuda(exec, b16, b, lora->r * out));
        a = a16;
        b = b16;
    }
    *l = {espi_rows_of(a, dtype, in), espi_transpose_of(a, dtype, in), espi_rows_of(b, dtype, lora->r),
          espi_transpose_of(b, dtype, lora->r)};
    return ESP_OK;
}

} // namespace

size_t espi_linear_fwd_scratch_cuda(const espi_exec *exec, const espi_linear_fwd *a) {
    (void)exec;
    return branch_room(&a->lora, a->w.cols, a->w.rows) + espi_room(a->w.rows, sizeof(bf16));
}

esp_status espi_linear_fwd_cuda(const espi_exec *exec, const espi_linear_fwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    if (a->tokens == 0) return ESP_OK;
    char *scratch = static_cast<char *>(exec->scratch);
    espi_product main = espi_product_of(a->y, espi_rows_of(a->x, ESP_BF16, in), weight_columns(&a->w), a->tokens, out, in);
    const bool dense = espi_product_is_dense(&main);
    main.bias = a->bias;
    main.bias_dtype = ESP_F32;
    if (a->bias && dense) {
        bf16 *bias = espi_cut<bf16>(&scratch, out);
        ESPI_TRY(espi_narrow_cuda(exec, bias, a->bias, out));
        main.bias = bias;
        main.bias_dtype = ESP_BF16;
    }
    if (r > 0) {
        branch l;
        ESPI_TRY(take_branch(exec, &l, &scratch, &a->lora, in, out, dense));
        espi_product down = main, up = main;
        down.d = a->u;
        down.stride = down.n = r;
        down.b = l.a_columns;
        up.a = espi_rows_of(a->u, ESP_BF16, r);
        up.b = l.b_columns;
        up.k = r;
        up.alpha = static_cast<float>(a->lora.scale);
        down.bias = up.bias = nullptr;
        ESPI_TRY(espi_product_cuda(exec, &down));
        ESPI_TRY(espi_product_cuda(exec, &up));
        main.beta = 1;
    }
    return espi_product_cuda(exec, &main);
}

size_t espi_linear_bwd_scratch_cuda(const espi_exec *exec, const espi_linear_bwd *a) {
    (void)exec;
    return branch_room(&a->lora, a->w.cols, a->w.rows) + espi_room(a->tokens * a->lora.r, sizeof(bf16));
}

esp_status espi_linear_bwd_cuda(const espi_exec *exec, const espi_linear_bwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    if (a->tokens == 0) return ESP_OK;
    char *scratch = static_cast<char *>(exec->scratch);
    espi_product main = espi_product_of(a->d_x, espi_rows_of(a->d_y, ESP_BF16, out), weight_rows(&a->w), a->tokens, in, out);
    main.beta = a->accumulate ? 1 : 0;
    if (r > 0) {
        branch l;
        ESPI_TRY(take_branch(exec, &l, &scratch, &a->lora, in, out, espi_product_is_dense(&main)));
        bf16 *q = espi_cut<bf16>(&scratch, a->tokens * r);
        espi_product down = main, d_b = main, d_a = main, up = main;
        down.d = q;
        down.stride = down.n = r;
        down.b = l.b_rows;
        down.alpha = static_cast<float>(a->lora.scale);
        down.beta = 0;
        ESPI_TRY(espi_product_cuda(exec, &down));
        d_b.d = a->lora.d_b;
        d_b.dtype = d_a.dtype = ESP_F32;
        d_b.stride = d_b.n = r;
        d_b.a = espi_transpose_of(a->d_y, ESP_BF16, out);
        d_b.b = espi_rows_of(a->u, ESP_BF16, r);
        d_b.m = out;
        d_b.k = d_a.k = a->tokens;
        d_b.alpha = static_cast<float>(a->lora.scale);
        d_b.beta = d_a.beta = 1;
        ESPI_TRY(espi_product_cuda(exec, &d_b));
        d_a.d = a->lora.d_a;
        d_a.a = espi_transpose_of(q, ESP_BF16, r);
        d_a.b = espi_rows_of(a->x, ESP_BF16, in);
        d_a.m = r;
        ESPI_TRY(espi_product_cuda(exec, &d_a));
        if (a->d_x) {
            up.a = espi_rows_of(q, ESP_BF16, r);
            up.b = l.a_rows;
            up.k = r;
            ESPI_TRY(espi_product_cuda(exec, &up));
            main.beta = 1;
        }
    }
    return a->d_x ? espi_product_cuda(exec, &main) : ESP_OK;
}
