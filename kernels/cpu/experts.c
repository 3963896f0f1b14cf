/* Everything between the router's choice and the block's output.  A task is (expert, panel of columns): its weights are decoded once and
 * meet all rows of the expert. */
#include "kernels/cpu/cpu.h"

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

/* One matrix of every expert with its branch, in one of three modes.  The input of routed row s is x_s, or x of its token when `gather`. */
typedef struct expert_pass {
    const espi_stack *w;
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

static int pass_threads(const espi_exec *exec, const expert_pass *p) {
    return cpu_threads(exec, (double)p->routing->tokens * (double)p->routing->top_k * (double)p->w->rows * (double)p->w->cols);
}

/* y_s = W_e x_s + scale B_e u_s, u_s = A_e x_s. */
static void forward(const espi_exec *exec, const expert_pass *p, void *y, void *u, const void *x) {
    const int64_t in = p->w->cols, out = p->w->rows, r = p->lora->r, panels = cpu_blocks(out, PANEL_COLS);
    const int32_t *offsets = p->routing->offsets;
    const int threads = pass_threads(exec, p);
    float pairs[256][2];
    cpu_pairs(pairs, p->w);
    const float(*values)[2] = (const float(*)[2])pairs;
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
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p->w->experts * panels; task++) {
            const int64_t e = task / panels, col = task % panels * PANEL_COLS, n = cpu_min(out - col, PANEL_COLS);
            const int64_t first = offsets[e], m = offsets[e + 1] - first;
            const cpu_branch l = cpu_branch_of(p->lora, e, in, out);
            const cpu_weight w = cpu_expert(p->w, e, values, true), up = cpu_floats(l.b, r, l.scale, true);
            const cpu_rows from = input_rows(p, x, in, first), low = routed_rows(u, r, first),
                           to = routed_rows((float *)y + col, out, first);
            cpu_product(&to, &from, &w, m, in, col, n, false);
            if (r) cpu_product(&to, &low, &up, m, r, col, n, true);
        }
    }
}

/* q_s = scale B_e^T d_y_s;  d_x_s = W_e^T d_y_s + A_e^T q_s.  d_y is per token when `gather`. */
static void backward(const espi_exec *exec, const expert_pass *p, void *d_x, float *q, const void *d_y) {
    const int64_t in = p->w->cols, out = p->w->rows, r = p->lora->r, panels = cpu_blocks(in, PANEL_COLS);
    const int32_t *offsets = p->routing->offsets;
    const int threads = pass_threads(exec, p);
    float pairs[256][2];
    cpu_pairs(pairs, p->w);
    const float(*values)[2] = (const float(*)[2])pairs;
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
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < p->w->experts * panels; task++) {
            const int64_t e = task / panels, col = task % panels * PANEL_COLS, n = cpu_min(in - col, PANEL_COLS);
            const int64_t first = offsets[e], m = offsets[e + 1] - first;
            const cpu_weight w = cpu_expert(p->w, e, values, false);
            const cpu_weight down = cpu_floats(cpu_branch_of(p->lora, e, in, out).a, in, 1, false);
            const cpu_rows from = input_rows(p, d_y, out, first), low = routed_rows(q, r, first),
                           to = routed_rows((float *)d_x + col, in, first);
            cpu_product(&to, &from, &w, m, out, col, n, false);
            if (r) cpu_product(&to, &low, &down, m, r, col, n, true);
        }
    }
}

/* dB_e += scale sum d_y_s u_s^T;  dA_e += sum q_s x_s^T.  Exactly one of x and d_y is per token. */
static void branch_grads(const espi_exec *exec, const expert_pass *p, const void *x, const void *d_y, bool gather_x, const float *u,
                         const float *q) {
    const int64_t in = p->w->cols, out = p->w->rows, r = p->lora->r;
    if (r == 0) return;
    const int64_t strips = cpu_branch_strips(&(cpu_branch){.r = r, .in = in, .out = out});
    const int32_t *offsets = p->routing->offsets;
    const int threads = pass_threads(exec, p);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < p->w->experts * strips; task++) {
        const int64_t e = task / strips, first = offsets[e], count = offsets[e + 1] - first;
        if (count == 0) continue;
        const cpu_branch l = cpu_branch_of(p->lora, e, in, out);
        const int32_t *tokens = p->routing->row_token + first;
        const cpu_rows x_rows = gather_x ? (cpu_rows){(float *)x, in, tokens} : routed_rows(x, in, first);
        const cpu_rows y_rows = gather_x ? routed_rows(d_y, out, first) : (cpu_rows){(float *)d_y, out, tokens};
        cpu_branch_grad(&l, task % strips, &x_rows, &y_rows, u + first * r, q + first * r, count);
    }
}

static int64_t slots_of(const espi_routing *routing) {
    return routing->tokens * routing->top_k;
}

esp_status ESPI_CPU(espi_gate_up_fwd)(const espi_exec *exec, const espi_gate_up_fwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    forward(exec, &(expert_pass){&a->w, &a->lora, &a->routing, true}, a->gu, a->u, a->x);
    return ESP_OK;
}

esp_status ESPI_CPU(espi_down_fwd)(const espi_exec *exec, const espi_down_fwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    forward(exec, &(expert_pass){&a->w, &a->lora, &a->routing, false}, a->y, a->u, a->act);
    return ESP_OK;
}

/* q. */
size_t ESPI_CPU(espi_gate_up_bwd_scratch)(const espi_exec *exec, const espi_gate_up_bwd *a) {
    (void)exec;
    return (size_t)(slots_of(&a->routing) * a->lora.r) * sizeof(float);
}

esp_status ESPI_CPU(espi_gate_up_bwd)(const espi_exec *exec, const espi_gate_up_bwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    const expert_pass p = {&a->w, &a->lora, &a->routing, false};
    backward(exec, &p, a->d_rows, exec->scratch, a->d_gu);
    branch_grads(exec, &p, a->x, a->d_gu, true, a->u, exec->scratch);
    return ESP_OK;
}

/* q, and u times the row's weight. */
size_t ESPI_CPU(espi_down_bwd_scratch)(const espi_exec *exec, const espi_down_bwd *a) {
    (void)exec;
    return (size_t)(slots_of(&a->routing) * a->lora.r * 2) * sizeof(float);
}

esp_status ESPI_CPU(espi_down_bwd)(const espi_exec *exec, const espi_down_bwd *a) {
    if (a->routing.tokens == 0) return ESP_OK;
    const int64_t slots = slots_of(&a->routing), r = a->lora.r, width = a->w.cols;
    float *q = exec->scratch, *u = q + slots * r;
    const float *weight = a->routing.row_weight, *act = a->act;
    const expert_pass p = {&a->w, &a->lora, &a->routing, true};
    backward(exec, &p, a->d_act, q, a->d_out);
    for (int64_t s = 0; s < slots; s++) {
        for (int64_t k = 0; k < r; k++) {
            q[s * r + k] *= weight[s];
            u[s * r + k] = weight[s] * ((const float *)a->u)[s * r + k];
        }
        float *d_act = (float *)a->d_act + s * width;
        vec sum = {0};
        int64_t i = 0;
        const vec w = splat(weight[s]);
        for (; i + LANES <= width; i += LANES) {
            const vec d = load(d_act + i);
            sum += d * load(act + s * width + i);
            store(d_act + i, d * w);
        }
        float total = vsum(sum);
        for (; i < width; i++) {
            total += d_act[i] * act[s * width + i];
            d_act[i] *= weight[s];
        }
        ((float *)a->d_row_weight)[s] = total;
    }
    branch_grads(exec, &p, a->act, a->d_out, false, u, q);
    return ESP_OK;
}

/* silu(g) u, and its gradient: sigma = 1 / (1 + e^-g). */
static inline vec sigmoid(vec g) {
    return splat(1.0f) / (splat(1.0f) + vexp(-g));
}

esp_status ESPI_CPU(espi_swiglu_fwd)(const espi_exec *exec, const espi_swiglu_fwd *a) {
    const int64_t width = a->width;
    const int threads = cpu_threads(exec, (double)a->rows * (double)width * 16);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a->rows; row++) {
        const float *g = (const float *)a->gu + row * 2 * width, *u = g + width;
        float *act = (float *)a->act + row * width;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) store(act + i, load(g + i) * sigmoid(load(g + i)) * load(u + i));
        if (i < width) {
            const int64_t n = width - i;
            const vec gate = load_part(g + i, n, 0);
            store_part(act + i, gate * sigmoid(gate) * load_part(u + i, n, 0), n);
        }
    }
    return ESP_OK;
}

static inline void swiglu_grad(vec *d_g, vec *d_u, vec d, vec g, vec u) {
    const vec s = sigmoid(g);
    *d_g = d * u * s * (splat(1.0f) + g * (splat(1.0f) - s));
    *d_u = d * g * s;
}

esp_status ESPI_CPU(espi_swiglu_bwd)(const espi_exec *exec, const espi_swiglu_bwd *a) {
    const int64_t width = a->width;
    const int threads = cpu_threads(exec, (double)a->rows * (double)width * 24);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a->rows; row++) {
        const float *g = (const float *)a->gu + row * 2 * width, *u = g + width, *d = (const float *)a->d_act + row * width;
        float *d_g = (float *)a->d_gu + row * 2 * width, *d_u = d_g + width;
        vec to_g, to_u;
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) {
            swiglu_grad(&to_g, &to_u, load(d + i), load(g + i), load(u + i));
            store(d_g + i, to_g);
            store(d_u + i, to_u);
        }
        if (i < width) {
            const int64_t n = width - i;
            swiglu_grad(&to_g, &to_u, load_part(d + i, n, 0), load_part(g + i, n, 0), load_part(u + i, n, 0));
            store_part(d_g + i, to_g, n);
            store_part(d_u + i, to_u, n);
        }
    }
    return ESP_OK;
}

esp_status ESPI_CPU(espi_combine_fwd)(const espi_exec *exec, const espi_combine_fwd *a) {
    const espi_routing *routing = &a->routing;
    const int64_t k_count = routing->top_k, hidden = a->hidden;
    const int threads = cpu_threads(exec, (double)routing->tokens * (double)(k_count * hidden));
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
    const int threads = cpu_threads(exec, (double)routing->tokens * (double)(k_count * hidden));
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
