/* Dense layer with a frozen weight and a low-rank branch. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/dense.h"
#if defined(__AVX512BF16__)
#include "kernels/cpu/bf16.h"
enum { OWN_BF16 = true };
#else
enum { OWN_BF16 = false };
#endif

/* Rows of one task: enough to pay for packing a panel again. */
enum { ROW_BLOCK = 768 };

/* Work memory of a library's product of this matrix; none for the own kernel. */
static size_t dense_scratch(const espi_mat *w) {
    espi_dense choice;
    const bool library =
        w->dtype == ESP_F32 && espi_dense_choose(&choice, w->rows, w->cols, OWN_BF16) == ESP_OK && choice != ESPI_DENSE_OWN;
    return library ? (size_t)(ESPI_DENSE_ROWS * (w->rows + w->cols)) * sizeof(float) : 0;
}

static esp_status choose(espi_dense *choice, const espi_mat *w) {
    *choice = ESPI_DENSE_OWN;
    return w->dtype == ESP_F32 ? espi_dense_choose(choice, w->rows, w->cols, OWN_BF16) : ESP_OK;
}

size_t ESPI_CPU(espi_linear_fwd_scratch)(const espi_exec *exec, const espi_linear_fwd *a) {
    (void)exec;
#if defined(__AVX512BF16__)
    if (dense_scratch(&a->w) == 0) return cpu_linear_bf16_fwd_scratch(a);
#endif
    return dense_scratch(&a->w);
}

esp_status ESPI_CPU(espi_linear_fwd)(const espi_exec *exec, const espi_linear_fwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    const cpu_branch l = cpu_branch_of(&a->lora, 0, in, out);
    const cpu_weight w = cpu_plain(&a->w, true), down = cpu_floats(l.a, in, 1, true), up = cpu_floats(l.b, r, l.scale, true);
    const int64_t blocks = cpu_blocks(a->tokens, ROW_BLOCK), panels = cpu_blocks(out, PANEL_COLS);
    const int threads = cpu_threads(exec, (double)a->tokens * (double)in * (double)out);
    espi_dense dense;
    ESPI_TRY(choose(&dense, &a->w));
#if defined(__AVX512BF16__)
    if (dense == ESPI_DENSE_OWN) {
        cpu_linear_bf16_fwd(exec, a, threads);
        return ESP_OK;
    }
#endif
    for (int64_t t = 0; a->bias && t < a->tokens; t++) memcpy((float *)a->y + t * out, a->bias, (size_t)out * sizeof(float));
    if (dense != ESPI_DENSE_OWN)
        ESPI_TRY(espi_dense_product(dense, a->y, a->x, a->w.data, exec->scratch, a->tokens, out, in, true, a->bias != NULL, threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (r) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = block * ROW_BLOCK, m = cpu_min(a->tokens - first, ROW_BLOCK);
                cpu_product(&(cpu_rows){(float *)a->u + first * r, r, NULL}, &(cpu_rows){(float *)a->x + first * in, in, NULL}, &down, m,
                            in, 0, r, false);
            }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < blocks * panels; task++) {
            const int64_t first = task / panels * ROW_BLOCK, m = cpu_min(a->tokens - first, ROW_BLOCK);
            const int64_t col = task % panels * PANEL_COLS, n = cpu_min(out - col, PANEL_COLS);
            const cpu_rows y = {(float *)a->y + first * out + col, out, NULL};
            const cpu_low low = {{(float *)a->u + first * r, r, NULL}, up, r};
            if (dense == ESPI_DENSE_OWN)
                cpu_product_low(&y, &(cpu_rows){(float *)a->x + first * in, in, NULL}, &w, &low, m, in, col, n, a->bias != NULL);
            else if (r)
                cpu_product(&y, &low.rows, &up, m, r, col, n, true);
        }
    }
    return ESP_OK;
}

size_t ESPI_CPU(espi_linear_bwd_scratch)(const espi_exec *exec, const espi_linear_bwd *a) {
    (void)exec;
#if defined(__AVX512BF16__)
    if (dense_scratch(&a->w) == 0) return cpu_linear_bf16_bwd_scratch(a);
#endif
    return (size_t)(a->tokens * a->lora.r) * sizeof(float) + dense_scratch(&a->w);
}

esp_status ESPI_CPU(espi_linear_bwd)(const espi_exec *exec, const espi_linear_bwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    const cpu_branch l = cpu_branch_of(&a->lora, 0, in, out);
    const cpu_weight w = cpu_plain(&a->w, false), up = cpu_floats(l.b, r, l.scale, false), down = cpu_floats(l.a, in, 1, false);
    const int64_t blocks = cpu_blocks(a->tokens, ROW_BLOCK), panels = a->d_x ? cpu_blocks(in, PANEL_COLS) : 0;
    const int64_t strips = a->tokens ? cpu_branch_strips(&l) : 0;
    float *q = exec->scratch;
    const int threads = cpu_threads(exec, (double)a->tokens * (double)in * (double)out);
    espi_dense dense;
    ESPI_TRY(choose(&dense, &a->w));
#if defined(__AVX512BF16__)
    if (dense == ESPI_DENSE_OWN) {
        cpu_linear_bf16_bwd(exec, a, threads);
        return ESP_OK;
    }
#endif
    if (a->d_x && dense != ESPI_DENSE_OWN)
        ESPI_TRY(
            espi_dense_product(dense, a->d_x, a->d_y, a->w.data, q + a->tokens * r, a->tokens, in, out, false, a->accumulate, threads));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (r) {
#pragma omp for schedule(static)
            for (int64_t block = 0; block < blocks; block++) {
                const int64_t first = block * ROW_BLOCK, m = cpu_min(a->tokens - first, ROW_BLOCK);
                cpu_product(&(cpu_rows){q + first * r, r, NULL}, &(cpu_rows){(float *)a->d_y + first * out, out, NULL}, &up, m, out, 0, r,
                            false);
            }
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < blocks * panels; task++) {
            const int64_t first = task / panels * ROW_BLOCK, m = cpu_min(a->tokens - first, ROW_BLOCK);
            const int64_t col = task % panels * PANEL_COLS, n = cpu_min(in - col, PANEL_COLS);
            const cpu_rows d_x = {(float *)a->d_x + first * in + col, in, NULL};
            const cpu_low low = {{q + first * r, r, NULL}, down, r};
            if (dense == ESPI_DENSE_OWN)
                cpu_product_low(&d_x, &(cpu_rows){(float *)a->d_y + first * out, out, NULL}, &w, &low, m, out, col, n, a->accumulate);
            else if (r)
                cpu_product(&d_x, &low.rows, &down, m, r, col, n, true);
        }
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips; strip++)
            cpu_branch_grad(&l, strip, &(cpu_rows){(float *)a->x, in, NULL}, &(cpu_rows){(float *)a->d_y, out, NULL}, a->u, q, a->tokens);
    }
    return ESP_OK;
}
