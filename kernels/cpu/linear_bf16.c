/* Dense layer whose products are of bf16.  All rows are rounded once; a task is a panel of columns, packed once for a block of rows. */
#include "kernels/cpu/bf16.h"

/* Columns and rows of a task; rows that are rounded by one. */
enum { TASK_COLS = 128, TASK_ROWS = 768, ROUNDED_ROWS = 32 };

/* x [tokens,from] and low [tokens,r] by W and the branch's second matrix: what both directions do.  low = x times the branch's first. */
typedef struct layer {
    float *y, *low;
    const float *x;
    int64_t tokens, from, to, r;
    cpu_weight w, first, second;
    bool add;
    bf16_rows x_rows, low_rows;
} layer;

static size_t room_bytes(int64_t tokens, int64_t n) {
    return (size_t)(tokens * bf16_stride(n)) * sizeof(uint16_t);
}

static void enter(layer *l, void *scratch) {
    l->x_rows = (bf16_rows){scratch, bf16_stride(l->from)};
    l->low_rows = (bf16_rows){(uint16_t *)scratch + l->tokens * bf16_stride(l->from), bf16_stride(l->r)};
}

static cpu_rows rows_from(const float *base, int64_t first, int64_t stride) {
    return (cpu_rows){(float *)base + first * stride, stride, NULL};
}
static bf16_rows rounded_from(const bf16_rows *rows, int64_t first) {
    return (bf16_rows){rows->base + first * rows->stride, rows->stride};
}

/* Rounds some rows and makes their low-rank values. */
static void begin_rows(const layer *l, int64_t first, int64_t m) {
    const cpu_rows x = rows_from(l->x, first, l->from), low = rows_from(l->low, first, l->r);
    const bf16_rows x_rows = rounded_from(&l->x_rows, first), low_rows = rounded_from(&l->low_rows, first);
    bf16_round_rows(&x_rows, &x, m, l->from);
    if (l->r == 0) return;
    bf16_product(&low, &x_rows, &l->first, m, l->from, 0, l->r, false);
    bf16_round_rows(&low_rows, &low, m, l->r);
}

static void product_task(const layer *l, int64_t first, int64_t col) {
    const int64_t m = cpu_min(l->tokens - first, TASK_ROWS), n = cpu_min(l->to - col, TASK_COLS);
    const cpu_rows y = {l->y + first * l->to + col, l->to, NULL};
    const bf16_rows x_rows = rounded_from(&l->x_rows, first), low_rows = rounded_from(&l->low_rows, first);
    bf16_product(&y, &x_rows, &l->w, m, l->from, col, n, l->add);
    if (l->r) bf16_product(&y, &low_rows, &l->second, m, l->r, col, n, true);
}

/* Inside a parallel region. */
static void run(const layer *l) {
    const int64_t blocks = cpu_blocks(l->tokens, TASK_ROWS), panels = l->y ? cpu_blocks(l->to, TASK_COLS) : 0;
#pragma omp for schedule(static)
    for (int64_t first = 0; first < l->tokens; first += ROUNDED_ROWS) begin_rows(l, first, cpu_min(l->tokens - first, ROUNDED_ROWS));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < blocks * panels; task++) product_task(l, task / panels * TASK_ROWS, task % panels * TASK_COLS);
}

size_t cpu_linear_bf16_fwd_scratch(const espi_linear_fwd *a) {
    return room_bytes(a->tokens, a->w.cols) + room_bytes(a->tokens, a->lora.r);
}

void cpu_linear_bf16_fwd(const espi_exec *exec, const espi_linear_fwd *a, int threads) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    const cpu_branch b = cpu_branch_of(&a->lora, 0, in, out);
    layer l = {.y = a->y,
               .low = a->u,
               .x = a->x,
               .tokens = a->tokens,
               .from = in,
               .to = out,
               .r = r,
               .w = cpu_plain(&a->w, true),
               .first = cpu_floats(b.a, in, 1, true),
               .second = cpu_floats(b.b, r, b.scale, true),
               .add = a->bias != NULL};
    enter(&l, exec->scratch);
    for (int64_t t = 0; a->bias && t < a->tokens; t++) memcpy(l.y + t * out, a->bias, (size_t)out * sizeof(float));
#pragma omp parallel num_threads(threads) if (threads > 1)
    run(&l);
}

size_t cpu_linear_bf16_bwd_scratch(const espi_linear_bwd *a) {
    return (size_t)cpu_blocks(a->tokens * a->lora.r, LANES) * sizeof(vec) + room_bytes(a->tokens, a->w.rows) +
           room_bytes(a->tokens, a->lora.r);
}

void cpu_linear_bf16_bwd(const espi_exec *exec, const espi_linear_bwd *a, int threads) {
    const int64_t in = a->w.cols, out = a->w.rows, r = a->lora.r;
    const cpu_branch b = cpu_branch_of(&a->lora, 0, in, out);
    const int64_t strips = a->tokens ? cpu_branch_strips(&b) : 0;
    layer l = {.y = a->d_x,
               .low = exec->scratch,
               .x = a->d_y,
               .tokens = a->tokens,
               .from = out,
               .to = in,
               .r = r,
               .w = cpu_plain(&a->w, false),
               .first = cpu_floats(b.b, r, b.scale, false),
               .second = cpu_floats(b.a, in, 1, false),
               .add = a->accumulate};
    enter(&l, (vec *)exec->scratch + cpu_blocks(a->tokens * r, LANES));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        run(&l);
#pragma omp for schedule(static)
        for (int64_t strip = 0; strip < strips; strip++)
            cpu_branch_grad(&b, strip, &(cpu_rows){(float *)a->x, in, NULL}, &(cpu_rows){(float *)a->d_y, out, NULL}, a->u, l.low,
                            a->tokens);
    }
}
