/* Dense layer with a frozen weight and a low-rank branch. */
#include "kernels/cpu/cpu.h"

/* Rows of one task: enough to pay for packing a panel again. */
enum { ROW_BLOCK = 768 };

esp_status ESPI_CPU(espi_linear_fwd)(const espi_exec *exec, const espi_linear_fwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    const cpu_branch l = cpu_branch_of(&a->lora, 0, in, out);
    const cpu_weight w = cpu_plain(&a->w, true), down = cpu_floats(l.a, in, 1, true), up = cpu_floats(l.b, r, l.scale, true);
    const int64_t blocks = cpu_blocks(a->tokens, ROW_BLOCK), panels = cpu_blocks(out, PANEL_COLS);
    const int threads = cpu_threads(exec, (double)a->tokens * (double)in * (double)out);
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
            for (int64_t t = 0; a->bias && t < m; t++) memcpy(row_at(&y, t), a->bias + col, (size_t)n * sizeof(float));
            cpu_product(&y, &(cpu_rows){(float *)a->x + first * in, in, NULL}, &w, m, in, col, n, a->bias != NULL);
            if (r) cpu_product(&y, &(cpu_rows){(float *)a->u + first * r, r, NULL}, &up, m, r, col, n, true);
        }
    }
    return ESP_OK;
}

size_t ESPI_CPU(espi_linear_bwd_scratch)(const espi_exec *exec, const espi_linear_bwd *a) {
    (void)exec;
    return (size_t)(a->tokens * a->lora.r) * sizeof(float);
}

esp_status ESPI_CPU(espi_linear_bwd)(const espi_exec *exec, const espi_linear_bwd *a) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    const cpu_branch l = cpu_branch_of(&a->lora, 0, in, out);
    const cpu_weight w = cpu_plain(&a->w, false), up = cpu_floats(l.b, r, l.scale, false), down = cpu_floats(l.a, in, 1, false);
    const int64_t blocks = cpu_blocks(a->tokens, ROW_BLOCK), panels = a->d_x ? cpu_blocks(in, PANEL_COLS) : 0;
    const int64_t strips = a->tokens ? cpu_branch_strips(&l) : 0;
    float *q = exec->scratch;
    const int threads = cpu_threads(exec, (double)a->tokens * (double)in * (double)out);
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
            cpu_product(&d_x, &(cpu_rows){(float *)a->d_y + first * out, out, NULL}, &w, m, out, col, n, a->accumulate);
            if (r) cpu_product(&d_x, &(cpu_rows){q + first * r, r, NULL}, &down, m, r, col, n, true);
        }
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips; strip++)
            cpu_branch_grad(&l, strip, &(cpu_rows){(float *)a->x, in, NULL}, &(cpu_rows){(float *)a->d_y, out, NULL}, a->u, q, a->tokens);
    }
    return ESP_OK;
}
