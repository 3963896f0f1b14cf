/* Everything between the router's choice and the block's output.  A task is (expert, panel of columns): its weights are decoded once and
 * meet all rows of the expert.  Where experts come packed (packed.h) a task has more columns, and those who have most rows go first. */
#include "kernels/cpu/packed.h"

#include "kernels/cpu/cpu.h"

#include <omp.h>

esp_status ESPI_CPU(espi_dispatch)(const espi_exec *exec, const espi_dispatch *a) {
    (void)exec;
    const int64_t slots = a->tokens * a->top_k;
    memset(a->offsets, 0, (size_t)(a->experts + 1) * sizeof *a->offsets);
    for (int64_t slot = 0; slot < slots; slot++) a->offsets[a->idx[slot] + 1]++;
    for (int64_t e = 0; e < a->experts; e++) a->offsets[e + 1] += a->offsets[e];
    /* offsets[e] serves as the next free row of e; afterwards it is the first row of e + 1, so all move up by one. */
    for (int64_t slot = 0; slot < slots; slot++) {
        const int32_t row = a->offsets[a->idx[slot]]++;
        a->row_token[row] = (int32_t)(slot / a->top_k);
        ((float *)a->row_weight)[row] = ((const float *)a->weight)[slot];
        a->slot_row[slot] = row;
    }
    memmove(a->offsets + 1, a->offsets, (size_t)a->experts * sizeof *a->offsets);
    a->offsets[0] = 0;
    return ESP_OK;
}

static inline vec sigmoid(vec x) {
    return splat(1.0f) / (splat(1.0f) + vexp(-x));
}
static inline vec vmin(vec a, vec b) {
    return pick(a > b, b, a); /* NaN in a stays */
}

/* Of pairs that lie in x, then y, the first ones and the second ones; and the way back. */
#if defined(__AVX512F__)
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define ZIP_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define ZIP_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15
#define ZIP_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define ZIP_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVENS 0, 2, 4, 6
#define ODDS 1, 3, 5, 7
#define ZIP_LOW 0, 4, 1, 5
#define ZIP_HIGH 2, 6, 3, 7
#endif
#define SHUFFLE(name, ...)                                                                                                                 \
    static inline vec name(vec x, vec y) {                                                                                                 \
        return __builtin_shufflevector(x, y, __VA_ARGS__);                                                                                 \
    }
SHUFFLE(evens, EVENS)
SHUFFLE(odds, ODDS)
SHUFFLE(zip_low, ZIP_LOW)
SHUFFLE(zip_high, ZIP_HIGH)

/* Up to LANES gates and ups of a row, from the i-th on. */
static inline void load_pair(vec *g, vec *u, const float *row, int64_t i, int64_t n, int64_t width, bool interleaved) {
    if (n == LANES) {
        const vec first = load(row + (interleaved ? 2 * i : i)), second = load(row + (interleaved ? 2 * i + LANES : width + i));
        *g = interleaved ? evens(first, second) : first;
        *u = interleaved ? odds(first, second) : second;
    } else if (!interleaved) {
        *g = load_part(row + i, n, 0);
        *u = load_part(row + width + i, n, 0);
    } else {
        float gate[LANES] = {0}, up[LANES] = {0};
        for (int64_t j = 0; j < n; j++) {
            gate[j] = row[2 * (i + j)];
            up[j] = row[2 * (i + j) + 1];
        }
        *g = load(gate);
        *u = load(up);
    }
}

static inline void store_pair(float *row, vec g, vec u, int64_t i, int64_t n, int64_t width, bool interleaved) {
    if (n == LANES) {
        store(row + (interleaved ? 2 * i : i), interleaved ? zip_low(g, u) : g);
        store(row + (interleaved ? 2 * i + LANES : width + i), interleaved ? zip_high(g, u) : u);
    } else if (!interleaved) {
        store_part(row + i, g, n);
        store_part(row + width + i, u, n);
    } else {
        for (int64_t j = 0; j < n; j++) {
            row[2 * (i + j)] = g[j];
            row[2 * (i + j) + 1] = u[j];
        }
    }
}

static inline vec glu_act(const espi_glu *glu, vec g, vec u) {
    if (!glu->clamped) return g * sigmoid(g) * u;
    const vec limit = splat((float)glu->limit), gate = vmin(g, limit), up = vmax(-limit, vmin(u, limit));
    return (up + splat(1.0f)) * gate * sigmoid(splat((float)glu->alpha) * gate);
}

/* Activations begin .. end - 1 of a row. */
static void activate(const espi_glu *glu, float *act, const float *gu, int64_t begin, int64_t end, int64_t width) {
    for (int64_t i = begin; i < end; i += LANES) {
        const int64_t n = cpu_min(end - i, LANES);
        vec g, u;
        load_pair(&g, &u, gu, i, n, width, glu->interleaved);
        const vec y = glu_act(glu, g, u);
        if (n == LANES)
            store(act + i, y);
        else
            store_part(act + i, y, n);
    }
}

esp_status ESPI_CPU(espi_swiglu_fwd)(const espi_exec *exec, const espi_swiglu_fwd *a) {
    const int64_t width = a->width;
    const int threads = cpu_threads(exec, (double)a->rows * (double)width * 16);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a->rows; row++)
        activate(&a->glu, (float *)a->act + row * width, (const float *)a->gu + row * 2 * width, 0, width, width);
    return ESP_OK;
}

/* g and u become their gradients. */
static inline void glu_grad(const espi_glu *glu, vec *g, vec *u, vec d) {
    const vec one = splat(1.0f);
    if (!glu->clamped) {
        const vec gate = *g, s = sigmoid(gate);
        *g = d * *u * s * (one + gate * (one - s));
        *u = d * gate * s;
        return;
    }
    const vec limit = splat((float)glu->limit), alpha = splat((float)glu->alpha);
    const vec gate = vmin(*g, limit), up = vmax(-limit, vmin(*u, limit)), s = sigmoid(alpha * gate);
    const ivec up_passes = (*u < limit) & (*u > -limit);
    *g = pick(*g < limit, d * (up + one) * s * (one + alpha * gate * (one - s)), (vec){0});
    *u = pick(up_passes, d * gate * s, (vec){0});
}

/* One row; what comes to the activations is `factor` times d_act, which may be the second half of d_gu: what is written there was read. */
static void activate_grad(const espi_glu *glu, float *d_gu, const float *d_act, float factor, const float *gu, int64_t width) {
    for (int64_t i = 0; i < width; i += LANES) {
        const int64_t n = cpu_min(width - i, LANES);
        vec g, u;
        load_pair(&g, &u, gu, i, n, width, glu->interleaved);
        glu_grad(glu, &g, &u, splat(factor) * (n == LANES ? load(d_act + i) : load_part(d_act + i, n, 0)));
        store_pair(d_gu, g, u, i, n, width, glu->interleaved);
    }
}

esp_status ESPI_CPU(espi_swiglu_bwd)(const espi_exec *exec, const espi_swiglu_bwd *a) {
    const int64_t width = a->width;
    const int threads = cpu_threads(exec, (double)a->rows * (double)width * 24);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a->rows; row++)
        activate_grad(&a->glu, (float *)a->d_gu + row * 2 * width, (const float *)a->d_act + row * width, 1,
                      (const float *)a->gu + row * 2 * width, width);
    return ESP_OK;
}

/* One matrix of every expert with its bias and branch, in one of three modes.  The input of routed row s is x_s, or x of its token when
 * `gather`. */
typedef struct expert_pass {
    const espi_stack *w;
    const float *bias; /* [E,rows] or NULL */
    const espi_lora *lora;
    const espi_routing *routing;
    bool gather;
} expert_pass;

static cpu_rows input_rows(const expert_pass *p, const void *x, int64_t width, int64_t first) {
    return p->gather ? (cpu_rows){(float *)x, width, p->routing->row_token + first} : (cpu_rows){(float *)x + first * width, width, NULL};
}

static cpu_rows routed_rows(const void *x, int64_t width, int64_t first) {
    return (cpu_rows){(float *)x + first * width, width, NULL};
}

/* To fetch a weight from memory takes as long as so many multiply-adds with it. */
enum { FETCH = 5 };

static int pass_threads(const espi_exec *exec, const expert_pass *p) {
    const int64_t slots = p->routing->tokens * p->routing->top_k, hit = cpu_min(slots, p->w->experts);
    return cpu_threads(exec, (double)(slots + FETCH * hit) * (double)p->w->rows * (double)p->w->cols);
}

/* Where part `part` of `parts` of an expert's weights begins, in whichever form. */
static const void *weights_at(const espi_stack *w, int64_t e, int64_t part, int64_t parts) {
    size_t bytes = (size_t)w->parts * w->part_bytes;
#if defined(__AVX512BF16__)
    if (w->packed) bytes = espi_cpu_packed_bytes(w);
#endif
    return (const char *)(w->packed ? w->packed : w->data) + (size_t)e * bytes + bytes / (size_t)parts * (size_t)part;
}

/* What a backward's columns need lies all over the expert: its middle stands for that. */
static const void *middle_of(const espi_stack *w, int64_t e) {
    return weights_at(w, e, 1, 2);
}

/* y_s = W_e x_s + bias_e + scale B_e u_s, u_s = A_e x_s. */
static void forward_unpacked(const espi_exec *exec, const expert_pass *p, void *y, void *u, const void *x) {
    const int64_t in = p->w->cols, out = p->w->rows, r = p->lora->r, panels = cpu_blocks(out, PANEL_COLS);
    const int32_t *offsets = p->routing->offsets;
    const int threads = pass_threads(exec, p);
    float pairs[256][2];
    cpu_pairs(pairs, p->w);
    const float(*values)[2] = (const float(*)[2])pairs;
    cpu_tasks tasks = cpu_tasks_of(exec, threads, p->w->experts * panels);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (r) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t e = 0; e < p->w->experts; e++) {
                const int64_t first = offsets[e], m = offsets[e + 1] - first;
                const cpu_weight down = cpu_floats(cpu_branch_of(p->lora, e, in, out).a, in, 1, true);
                const cpu_rows from = input_rows(p, x, in, first), to = routed_rows(u, r, first);
                cpu_product(&to, &from, &down, m, in, 0, r, false);
            }
        }
        for (cpu_turn turn = cpu_first(&tasks, omp_get_thread_num()); cpu_next(&tasks, &turn);) {
            const int64_t e = turn.task / panels, panel = turn.task % panels, col = panel * PANEL_COLS, n = cpu_min(out - col, PANEL_COLS);
            if (!cpu_near(&tasks, &turn, weights_at(p->w, e, panel, panels))) continue;
            const int64_t first = offsets[e], m = offsets[e + 1] - first;
            const cpu_branch l = cpu_branch_of(p->lora, e, in, out);
            const cpu_weight w = cpu_expert(p->w, e, values, true);
            const cpu_low low = {routed_rows(u, r, first), cpu_floats(l.b, r, l.scale, true), r};
            const cpu_rows from = input_rows(p, x, in, first), to = routed_rows((float *)y + col, out, first);
            for (int64_t i = 0; p->bias && i < m; i++) memcpy(row_at(&to, i), p->bias + e * out + col, (size_t)n * sizeof(float));
            cpu_product_low(&to, &from, &w, &low, m, in, col, n, p->bias != NULL);
        }
    }
}

/* q_s = scale B_e^T d_y_s;  d_x_s = W_e^T d_y_s + A_e^T q_s, `wide` floats from row to row.  d_y is per token when `gather`. */
static void backward_unpacked(const espi_exec *exec, const expert_pass *p, float *d_x, int64_t wide, float *q, const void *d_y) {
    const int64_t in = p->w->cols, out = p->w->rows, r = p->lora->r, panels = cpu_blocks(in, PANEL_COLS);
    const int32_t *offsets = p->routing->offsets;
    const int threads = pass_threads(exec, p);
    float pairs[256][2];
    cpu_pairs(pairs, p->w);
    const float(*values)[2] = (const float(*)[2])pairs;
    cpu_tasks tasks = cpu_tasks_of(exec, threads, p->w->experts * panels);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (r) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t e = 0; e < p->w->experts; e++) {
                const int64_t first = offsets[e], m = offsets[e + 1] - first;
                const cpu_branch l = cpu_branch_of(p->lora, e, in, out);
                const cpu_weight up = cpu_floats(l.b, r, l.scale, false);
                const cpu_rows from = input_rows(p, d_y, out, first), to = routed_rows(q, r, first);
                cpu_product(&to, &from, &up, m, out, 0, r, false);
            }
        }
        for (cpu_turn turn = cpu_first(&tasks, omp_get_thread_num()); cpu_next(&tasks, &turn);) {
            const int64_t e = turn.task / panels, col = turn.task % panels * PANEL_COLS, n = cpu_min(in - col, PANEL_COLS);
            if (!cpu_near(&tasks, &turn, middle_of(p->w, e))) continue;
            const int64_t first = offsets[e], m = offsets[e + 1] - first;
            const cpu_weight w = cpu_expert(p->w, e, values, false);
            const cpu_low low = {routed_rows(q, r, first), cpu_floats(cpu_branch_of(p->lora, e, in, out).a, in, 1, false), r};
            const cpu_rows from = input_rows(p, d_y, out, first), to = routed_rows(d_x + col, wide, first);
            cpu_product_low(&to, &from, &w, &low, m, out, col, n, false);
        }
    }
}

/* dB_e += scale sum d_y_s u_s^T;  dA_e += sum q_s x_s^T, of experts begin .. end - 1.  Exactly one of x and d_y is per token; x: `wide` floats
 * from row to row. */
static void branch_grads(const espi_exec *exec, const expert_pass *p, int64_t begin, int64_t end, const void *x, int64_t wide,
                         const void *d_y, bool gather_x, const float *u, const float *q) {
    const int64_t in = p->w->cols, out = p->w->rows, r = p->lora->r;
    if (r == 0) return;
    const int64_t strips = cpu_branch_strips(&(cpu_branch){.r = r, .in = in, .out = out});
    const int32_t *offsets = p->routing->offsets;
    const int threads = pass_threads(exec, p);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = begin * strips; task < end * strips; task++) {
        const int64_t e = task / strips, first = offsets[e], count = offsets[e + 1] - first;
        if (count == 0) continue;
        const cpu_branch l = cpu_branch_of(p->lora, e, in, out);
        const int32_t *tokens = p->routing->row_token + first;
        const cpu_rows x_rows = gather_x ? (cpu_rows){(float *)x, wide, tokens} : routed_rows(x, wide, first);
        const cpu_rows y_rows = gather_x ? routed_rows(d_y, out, first) : (cpu_rows){(float *)d_y, out, tokens};
        cpu_branch_grad(&l, task % strips, &x_rows, &y_rows, u + first * r, q + first * r, count);
    }
}

#if defined(__AVX512BF16__)
/* Work memory of a packed product: the hit experts, most rows first, the first task of each and the end, then every thread's own. */
static size_t plan_bytes(const espi_stack *w) {
    return (size_t)cpu_blocks((2 * w->experts + 1) * (int64_t)sizeof(int32_t), 64) * 64;
}

static size_t work_bytes(const espi_stack *w, const espi_routing *routing) {
    return cpu_packed_work(w, cpu_min(routing->tokens, TASK_ROWS)); /* a token has an expert once */
}

static size_t packed_scratch(const espi_exec *exec, const espi_stack *w, const espi_routing *routing) {
    if (espi_cpu_packed_bytes(w) == 0) return 0;
    return plan_bytes(w) + (size_t)exec->threads * work_bytes(w, routing);
}

static int64_t rows_of(const espi_routing *routing, int64_t e) {
    return routing->offsets[e + 1] - routing->offsets[e];
}

static int64_t order_experts(int32_t *order, const espi_routing *routing) {
    int64_t hit = 0;
    for (int32_t e = 0; e < routing->experts; e++) {
        if (rows_of(routing, e) == 0) continue;
        int64_t at = hit++;
        for (; at > 0 && rows_of(routing, order[at - 1]) < rows_of(routing, e); at--) order[at] = order[at - 1];
        order[at] = e;
    }
    return hit;
}

/* The `cols` columns of task `panel`.  With an activation that has its gates first: as many gates as ups. */
static cpu_columns task_columns(int64_t panel, int64_t cols, int64_t all, const espi_glu *glu) {
    if (!glu || glu->interleaved) return (cpu_columns){panel * cols, 0, cpu_min(all - panel * cols, cols)};
    const int64_t width = all / 2, half = cols / 2, first = panel * half;
    return (cpu_columns){first, width + first, cpu_min(width - first, half)};
}

/* Adds a branch's second product to the columns of a task. */
static void add_branch(const cpu_rows *c, const cpu_columns *columns, const cpu_rows *low, const cpu_weight *weight, int64_t r, int64_t m) {
    for (int range = 0; r > 0 && range < (columns->second ? 2 : 1); range++) {
        const int64_t col = range ? columns->second : columns->first;
        const cpu_rows to = {c->base + col, c->stride, c->index};
        cpu_product(&to, low, weight, m, r, col, columns->n, true);
    }
}

/* What is done for the rows of an expert with packed weights: forward, y of x, with the activation where there is one; or backward. */
typedef struct packed_pass {
    const expert_pass *pass;
    bool backward;
    void *to;
    int64_t wide; /* floats from row to row of it */
    void *low;
    const void *from;
    void *act; /* NULL: none */
    const espi_glu *glu;
} packed_pass;

/* Work memory of a thread, and the first row of those that its last task had. */
typedef struct packed_work {
    void *memory;
    int64_t rows;
} packed_work;

/* Rows first .. first + m - 1 of all, which expert e has, and some of its columns. */
static void packed_rows(const packed_pass *k, int64_t e, const cpu_columns *columns, int64_t first, int64_t m, packed_work *work) {
    const expert_pass *p = k->pass;
    const int64_t in = k->backward ? p->w->rows : p->w->cols, out = k->backward ? p->w->cols : p->w->rows, r = p->lora->r;
    const cpu_rows from = input_rows(p, k->from, in, first), to = routed_rows(k->to, k->wide, first), low = routed_rows(k->low, r, first);
    const cpu_packed w = cpu_packed_of(p->w, e);
    const cpu_branch l = cpu_branch_of(p->lora, e, p->w->cols, p->w->rows);
    const cpu_weight weight = k->backward ? cpu_floats(l.a, l.in, 1, false) : cpu_floats(l.b, r, l.scale, true);
    const bool again = work->rows == first;
    work->rows = first;
    if (k->backward)
        cpu_packed_backward(&to, &from, &w, m, *columns, work->memory, again);
    else
        cpu_packed_forward(&to, &from, &w, p->bias ? p->bias + e * out : NULL, m, *columns, work->memory, again);
    add_branch(&to, columns, &low, &weight, r, m);
    if (!k->act) return;
    const int64_t begin = k->glu->interleaved ? columns->first / 2 : columns->first;
    const int64_t end = begin + (k->glu->interleaved ? columns->n / 2 : columns->n);
    for (int64_t s = first; s < first + m; s++)
        activate(k->glu, (float *)k->act + s * (out / 2), (const float *)k->to + s * out, begin, end, out / 2);
}

/* Columns of a task of an expert with `rows` rows.  Every task may have to convert its rows, so they are wide, unless threads would have to
 * wait for one that has much to do. */
static int64_t task_cols(const packed_pass *k, int64_t rows, int threads) {
    const espi_routing *routing = k->pass->routing;
    const int64_t out = k->backward ? k->pass->w->cols : k->pass->w->rows;
    if (threads == 1) return k->backward ? TASK_COLS : 4 * TASK_COLS;
    const int64_t share = out * routing->tokens * routing->top_k / (rows * threads * TASKS_EACH);
    return cpu_min(TASK_COLS, cpu_blocks(share + 1, LEAST_COLS) * LEAST_COLS);
}

static void packed_task(const packed_pass *k, int64_t e, int64_t panel, int64_t cols, packed_work *work) {
    const espi_routing *routing = k->pass->routing;
    const cpu_columns columns = task_columns(panel, cols, k->backward ? k->pass->w->cols : k->pass->w->rows, k->glu);
    for (int64_t first = routing->offsets[e], end = routing->offsets[e + 1]; first < end; first += TASK_ROWS)
        packed_rows(k, e, &columns, first, cpu_min(end - first, TASK_ROWS), work);
}

/* A branch's first product, of all rows of an expert. */
static void low_task(const packed_pass *k, int64_t e) {
    const expert_pass *p = k->pass;
    const int64_t in = p->w->cols, r = p->lora->r, width = k->backward ? p->w->rows : in;
    const int64_t first = p->routing->offsets[e], m = p->routing->offsets[e + 1] - first;
    const cpu_branch l = cpu_branch_of(p->lora, e, in, p->w->rows);
    const cpu_weight weight = k->backward ? cpu_floats(l.b, r, l.scale, false) : cpu_floats(l.a, in, 1, true);
    const cpu_rows from = input_rows(p, k->from, width, first), to = routed_rows(k->low, r, first);
    if (r) cpu_product(&to, &from, &weight, m, width, 0, r, false);
}

static void run_packed(const espi_exec *exec, const packed_pass *k, char *scratch) {
    const expert_pass *p = k->pass;
    const int64_t in = p->w->cols, out = p->w->rows;
    const int threads = pass_threads(exec, p);
    int32_t *order = (int32_t *)scratch, *begins = order + p->w->experts;
    char *memory = scratch + plan_bytes(p->w);
    const int64_t hit = order_experts(order, p->routing);
    begins[0] = 0;
    for (int64_t i = 0; i < hit; i++)
        begins[i + 1] = begins[i] + (int32_t)cpu_blocks(k->backward ? in : out, task_cols(k, rows_of(p->routing, order[i]), threads));
    cpu_tasks tasks = cpu_tasks_of(exec, threads, begins[hit]);
    const size_t each = work_bytes(p->w, p->routing);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        packed_work work = {memory + (size_t)omp_get_thread_num() * each, -1};
        if (threads > 1) {
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < hit; i++) low_task(k, order[i]);
        }
        for (cpu_turn turn = cpu_first(&tasks, omp_get_thread_num()); cpu_next(&tasks, &turn);) {
            int64_t i = 0;
            while (turn.task >= begins[i + 1]) i++;
            const int64_t panel = turn.task - begins[i], panels = begins[i + 1] - begins[i];
            if (!cpu_near(&tasks, &turn, k->backward ? middle_of(p->w, order[i]) : weights_at(p->w, order[i], panel, panels))) continue;
            if (threads == 1 && panel == 0) low_task(k, order[i]); /* the tasks read the same rows */
            packed_task(k, order[i], panel, task_cols(k, rows_of(p->routing, order[i]), threads), &work);
        }
    }
}

/* Whether columns of gates and of ups are whole records, so that an activation can follow the products at once. */
static bool activates_at_once(const espi_stack *w, const espi_glu *glu) {
    return w->packed && (glu->interleaved || w->rows / 2 % RECORD_ROWS == 0);
}
#else
static size_t packed_scratch(const espi_exec *exec, const espi_stack *w, const espi_routing *routing) {
    (void)exec, (void)w, (void)routing;
    return 0;
}
#endif

static int64_t slots_of(const espi_routing *routing) {
    return routing->tokens * routing->top_k;
}

/* Either form.  scratch: that of the packed one. */
static void forward(const espi_exec *exec, const expert_pass *p, void *y, void *u, const void *x, void *scratch) {
#if defined(__AVX512BF16__)
    if (p->w->packed) {
        run_packed(exec, &(packed_pass){.pass = p, .to = y, .wide = p->w->rows, .low = u, .from = x}, scratch);
        return;
    }
#endif
    (void)scratch;
    forward_unpacked(exec, p, y, u, x);
}

static void backward(const espi_exec *exec, const expert_pass *p, float *d_x, int64_t wide, float *q, const void *d_y, void *scratch) {
#if defined(__AVX512BF16__)
    if (p->w->packed) {
        run_packed(exec, &(packed_pass){.pass = p, .backward = true, .to = d_x, .wide = wide, .low = q, .from = d_y}, scratch);
        return;
    }
#endif
    (void)scratch;
    backward_unpacked(exec, p, d_x, wide, q, d_y);
}

/* Floats that begin a scratch; what packed products need follows them. */
static size_t floats_first(int64_t n) {
    return (size_t)cpu_blocks(n * (int64_t)sizeof(float), 64) * 64;
}

size_t ESPI_CPU(espi_gate_up_fwd_scratch)(const espi_exec *exec, const espi_gate_up_fwd *a) {
    return packed_scratch(exec, &a->w, &a->routing);
}

esp_status ESPI_CPU(espi_gate_up_fwd)(const espi_exec *exec, const espi_gate_up_fwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    const expert_pass p = {&a->w, a->bias, &a->lora, &a->routing, true};
#if defined(__AVX512BF16__)
    if (activates_at_once(&a->w, &a->glu)) {
        run_packed(exec, &(packed_pass){&p, false, a->gu, a->w.rows, a->u, a->x, a->act, &a->glu}, exec->scratch);
        return ESP_OK;
    }
#endif
    forward(exec, &p, a->gu, a->u, a->x, exec->scratch);
    return ESPI_CPU(espi_swiglu_fwd)(exec, &(espi_swiglu_fwd){a->act, a->gu, slots_of(&a->routing), a->w.rows / 2, a->glu});
}

size_t ESPI_CPU(espi_down_fwd_scratch)(const espi_exec *exec, const espi_down_fwd *a) {
    return packed_scratch(exec, &a->w, &a->routing);
}

esp_status ESPI_CPU(espi_down_fwd)(const espi_exec *exec, const espi_down_fwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    forward(exec, &(expert_pass){&a->w, a->bias, &a->lora, &a->routing, false}, a->y, a->u, a->act, exec->scratch);
    return ESP_OK;
}

/* q. */
size_t ESPI_CPU(espi_gate_up_bwd_scratch)(const espi_exec *exec, const espi_gate_up_bwd *a) {
    return floats_first(slots_of(&a->routing) * a->lora.r) + packed_scratch(exec, &a->w, &a->routing);
}

esp_status ESPI_CPU(espi_gate_up_bwd)(const espi_exec *exec, const espi_gate_up_bwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    const expert_pass p = {&a->w, NULL, &a->lora, &a->routing, false};
    float *q = exec->scratch;
    backward(exec, &p, a->d_rows, a->w.cols, q, a->d_gu, (char *)q + floats_first(slots_of(&a->routing) * a->lora.r));
    branch_grads(exec, &p, 0, a->w.experts, a->x, a->w.cols, a->d_gu, true, a->u, q);
    return ESP_OK;
}

/* q, and u times the row's weight. */
static size_t down_floats(const espi_down_bwd *a) {
    return floats_first(slots_of(&a->routing) * 2 * a->lora.r);
}

size_t ESPI_CPU(espi_down_bwd_scratch)(const espi_exec *exec, const espi_down_bwd *a) {
    return down_floats(a) + packed_scratch(exec, &a->w, &a->routing);
}

/* A row of d_gu holds act_s, then a_s, which came to it, until they have become the gradient of its gates and ups.  This makes act_s, and
 * d_row_weight_s = act_s . a_s, to which bias_e . d_out_t is yet to come. */
static void remake_row(const espi_down_bwd *a, int64_t s) {
    const int64_t width = a->w.cols;
    float *act = (float *)a->d_gu + s * 2 * width;
    activate(&a->glu, act, (const float *)a->gu + s * 2 * width, 0, width, width);
    ((float *)a->d_row_weight)[s] = cpu_dot(act, act + width, width);
}

esp_status ESPI_CPU(espi_down_bwd)(const espi_exec *exec, const espi_down_bwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    const int64_t slots = slots_of(&a->routing), r = a->lora.r, width = a->w.cols;
    float *q = exec->scratch, *u = q + slots * r, *d_gu = a->d_gu;
    const float *weight = a->routing.row_weight, *gu = a->gu;
    const expert_pass p = {&a->w, NULL, &a->lora, &a->routing, true};
    const int threads = pass_threads(exec, &p);
    const int64_t together = threads > 1 ? a->w.experts : 1; /* a lone thread meets an expert's rows again while they are near */
    backward(exec, &p, d_gu + width, 2 * width, q, a->d_out, (char *)q + down_floats(a));
    for (int64_t e = 0; e < a->w.experts; e += together) {
        const int64_t first = a->routing.offsets[e], end = a->routing.offsets[e + together];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t s = first; s < end; s++) {
            remake_row(a, s);
            for (int64_t k = 0; k < r; k++) {
                q[s * r + k] *= weight[s];
                u[s * r + k] = weight[s] * ((const float *)a->u)[s * r + k];
            }
        }
        branch_grads(exec, &p, e, e + together, d_gu, 2 * width, a->d_out, false, u, q);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t s = first; s < end; s++)
            activate_grad(&a->glu, d_gu + s * 2 * width, d_gu + s * 2 * width + width, weight[s], gu + s * 2 * width, width);
    }
    if (!a->bias) return ESP_OK;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t e = 0; e < a->w.experts; e++)
        for (int64_t s = a->routing.offsets[e]; s < a->routing.offsets[e + 1]; s++)
            ((float *)a->d_row_weight)[s] +=
                cpu_dot(a->bias + e * a->w.rows, (const float *)a->d_out + a->routing.row_token[s] * a->w.rows, a->w.rows);
    return ESP_OK;
}

/* A combination's work is to fetch rows from memory, which takes so many times as long as a multiply-add of theirs. */
enum { FAR = 16 };

esp_status ESPI_CPU(espi_combine_fwd)(const espi_exec *exec, const espi_combine_fwd *a) {
    const espi_routing *routing = &a->routing;
    const int64_t k_count = routing->top_k, hidden = a->hidden;
    const int threads = cpu_threads(exec, (double)routing->tokens * (double)(k_count * hidden) * FAR);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < routing->tokens; t++) {
        float *out = (float *)a->out + t * hidden;
        if (!a->add) memset(out, 0, (size_t)hidden * sizeof *out);
        if (a->add && a->add != a->out) memcpy(out, (const float *)a->add + t * hidden, (size_t)hidden * sizeof *out);
        for (int64_t k = 0; k < k_count; k++) {
            const int32_t row = routing->slot_row[t * k_count + k];
            const float weight = ((const float *)routing->row_weight)[row], *y = (const float *)a->y + row * hidden;
            for (int64_t h = 0; h < hidden; h++) out[h] += weight * y[h];
        }
    }
    return ESP_OK;
}

esp_status ESPI_CPU(espi_combine_bwd)(const espi_exec *exec, const espi_combine_bwd *a) {
    const espi_routing *routing = &a->routing;
    const int64_t k_count = routing->top_k, hidden = a->hidden;
    const int threads = cpu_threads(exec, (double)routing->tokens * (double)(k_count * hidden) * FAR);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < routing->tokens; t++) {
        float *d_x = (float *)a->d_x + t * hidden;
        for (int64_t k = 0; k < k_count; k++) {
            const int32_t row = routing->slot_row[t * k_count + k];
            const float *d_row = (const float *)a->d_rows + row * hidden;
            for (int64_t h = 0; h < hidden; h++) d_x[h] = k == 0 ? d_row[h] : d_x[h] + d_row[h];
            ((float *)a->d_weight)[t * k_count + k] = ((const float *)a->d_row_weight)[row];
        }
    }
    return ESP_OK;
}
