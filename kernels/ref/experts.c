/* Everything between the router's choice and the block's output: sorting slots by expert, the frozen expert matrices with their low-rank
 * branches, the activation, and the weighted sum per token. */
#include "kernels/ref/ref.h"

esp_status ESPI_REF_NAME(espi_dispatch)(const espi_exec *exec, const espi_dispatch *a) {
    (void)exec;
    int32_t row = 0;
    for (int64_t e = 0; e < a->experts; e++) {
        a->offsets[e] = row;
        for (int64_t slot = 0; slot < a->tokens * a->top_k; slot++) {
            if (a->idx[slot] != e) continue;
            a->row_token[row] = (int32_t)(slot / a->top_k);
            ((real *)a->row_weight)[row] = ((const real *)a->weight)[slot];
            a->slot_row[slot] = row++;
        }
    }
    a->offsets[a->experts] = row;
    return ESP_OK;
}

/* Gate j of a row stands at j * step, its up value `up` behind it. */
typedef struct glu_places {
    int64_t step, up;
} glu_places;

static glu_places places_of(const espi_glu *glu, int64_t width) {
    return glu->interleaved ? (glu_places){2, 1} : (glu_places){1, width};
}

/* What a gate and its up value are after the limits, and whether a gradient passes them. */
typedef struct glu_pair {
    double g, u, sigma, slope;
    bool gate_passes, up_passes;
} glu_pair;

static glu_pair pair_of(const espi_glu *glu, const real *gate, glu_places at) {
    const real limit = (real)glu->limit;
    glu_pair p = {.g = gate[0], .u = gate[at.up], .slope = 1, .gate_passes = true, .up_passes = true};
    if (glu->clamped) {
        p.gate_passes = !(p.g >= limit);
        p.up_passes = !(p.u >= limit || p.u <= -limit);
        p.g = p.g > limit ? limit : p.g;
        p.u = 1 + (p.u > limit ? limit : p.u < -limit ? -limit : p.u);
        p.slope = glu->alpha;
    }
    p.sigma = 1 / (1 + exp(-p.slope * p.g));
    return p;
}

/* act = glu(gu), one row. */
static void glu_row(real *act, const real *gu, int64_t width, const espi_glu *glu) {
    const glu_places at = places_of(glu, width);
    for (int64_t i = 0; i < width; i++) {
        const glu_pair p = pair_of(glu, gu + i * at.step, at);
        act[i] = (real)(p.g * p.sigma * p.u);
    }
}

/* d_gu = glu'(gu) d, for value i of a row. */
static void glu_bwd(real *d_gu, const real *gu, double d, int64_t i, int64_t width, const espi_glu *glu) {
    const glu_places at = places_of(glu, width);
    const int64_t place = i * at.step;
    const glu_pair p = pair_of(glu, gu + place, at);
    d_gu[place] = (real)(p.gate_passes ? d * p.u * p.sigma * (1 + p.slope * p.g * (1 - p.sigma)) : 0);
    d_gu[place + at.up] = (real)(p.up_passes ? d * p.g * p.sigma : 0);
}

esp_status ESPI_REF_NAME(espi_swiglu_fwd)(const espi_exec *exec, const espi_swiglu_fwd *a) {
    (void)exec;
    for (int64_t row = 0; row < a->rows; row++)
        glu_row((real *)a->act + row * a->width, (const real *)a->gu + row * 2 * a->width, a->width, &a->glu);
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_swiglu_bwd)(const espi_exec *exec, const espi_swiglu_bwd *a) {
    (void)exec;
    for (int64_t row = 0; row < a->rows; row++) {
        const int64_t first = row * 2 * a->width;
        for (int64_t i = 0; i < a->width; i++)
            glu_bwd((real *)a->d_gu + first, (const real *)a->gu + first, ((const real *)a->d_act)[row * a->width + i], i, a->width,
                    &a->glu);
    }
    return ESP_OK;
}

/* y = W_e x + bias_e + scale B_e u, u = A_e x, for one row. */
static void expert_row(real *y, real *u, const real *x, const espi_stack *w, const float *bias, const branch *l, int64_t e) {
    branch_down(l, u, x);
    for (int64_t o = 0; o < w->rows; o++) {
        double sum = bias ? bias[e * w->rows + o] : 0;
        for (int64_t i = 0; i < w->cols; i++) sum += (double)espi_stack_value(w, e, o, i) * x[i];
        y[o] = (real)(sum + branch_up(l, u, o));
    }
}

/* d_x = W_e^T d_y + A_e^T q, q = scale B_e^T d_y, for one row. */
static void expert_row_bwd(double *d_x, double *q, const real *d_y, const espi_stack *w, const branch *l, int64_t e) {
    branch_up_bwd(l, q, d_y);
    for (int64_t i = 0; i < w->cols; i++) d_x[i] = 0;
    for (int64_t o = 0; o < w->rows; o++)
        for (int64_t i = 0; i < w->cols; i++) d_x[i] += (double)d_y[o] * espi_stack_value(w, e, o, i);
    branch_down_bwd(l, d_x, q);
}

/* q of every routed row, then one row of the input's gradient. */
static size_t expert_scratch(const espi_stack *w, const espi_lora *lora, const espi_routing *routing) {
    return (size_t)(routing->tokens * routing->top_k * lora->r + w->cols) * sizeof(double);
}

esp_status ESPI_REF_NAME(espi_gate_up_fwd)(const espi_exec *exec, const espi_gate_up_fwd *a) {
    (void)exec;
    const espi_stack *w = &a->w;
    for (int64_t e = 0; e < w->experts; e++) {
        const branch l = branch_of(&a->lora, e, w->cols, w->rows);
        for (int64_t s = a->routing.offsets[e]; s < a->routing.offsets[e + 1]; s++) {
            real *u = l.r ? (real *)a->u + s * l.r : NULL;
            real *gu = (real *)a->gu + s * w->rows;
            expert_row(gu, u, (const real *)a->x + a->routing.row_token[s] * w->cols, w, a->bias, &l, e);
            glu_row((real *)a->act + s * w->rows / 2, gu, w->rows / 2, &a->glu);
        }
    }
    return ESP_OK;
}

size_t ESPI_REF_NAME(espi_gate_up_bwd_scratch)(const espi_exec *exec, const espi_gate_up_bwd *a) {
    (void)exec;
    return expert_scratch(&a->w, &a->lora, &a->routing);
}

esp_status ESPI_REF_NAME(espi_gate_up_bwd)(const espi_exec *exec, const espi_gate_up_bwd *a) {
    const espi_stack *w = &a->w;
    double *sum = exec->scratch, *q = sum + w->cols;
    for (int64_t e = 0; e < w->experts; e++) {
        const branch l = branch_of(&a->lora, e, w->cols, w->rows);
        const int64_t begin = a->routing.offsets[e], end = a->routing.offsets[e + 1];
        for (int64_t s = begin; s < end; s++) {
            expert_row_bwd(sum, q + s * l.r, (const real *)a->d_gu + s * w->rows, w, &l, e);
            for (int64_t i = 0; i < w->cols; i++) ((real *)a->d_rows)[s * w->cols + i] = (real)sum[i];
        }
        branch_grads(
            &l, &(branch_rows){.x = a->x, .x_index = a->routing.row_token, .d_y = a->d_gu, .u = a->u, .q = q, .begin = begin, .end = end});
    }
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_down_fwd)(const espi_exec *exec, const espi_down_fwd *a) {
    (void)exec;
    const espi_stack *w = &a->w;
    for (int64_t e = 0; e < w->experts; e++) {
        const branch l = branch_of(&a->lora, e, w->cols, w->rows);
        for (int64_t s = a->routing.offsets[e]; s < a->routing.offsets[e + 1]; s++)
            expert_row((real *)a->y + s * w->rows, l.r ? (real *)a->u + s * l.r : NULL, (const real *)a->act + s * w->cols, w, a->bias, &l,
                       e);
    }
    return ESP_OK;
}

/* Beside that, the activation of every row. */
size_t ESPI_REF_NAME(espi_down_bwd_scratch)(const espi_exec *exec, const espi_down_bwd *a) {
    (void)exec;
    return expert_scratch(&a->w, &a->lora, &a->routing) + (size_t)(a->routing.tokens * a->routing.top_k * a->w.cols) * sizeof(real);
}

esp_status ESPI_REF_NAME(espi_down_bwd)(const espi_exec *exec, const espi_down_bwd *a) {
    const espi_stack *w = &a->w;
    const real *weight = a->routing.row_weight;
    const int32_t *token = a->routing.row_token;
    double *through = exec->scratch, *q = through + w->cols;
    real *act = (real *)(q + a->routing.tokens * a->routing.top_k * a->lora.r);
    for (int64_t e = 0; e < w->experts; e++) {
        const branch l = branch_of(&a->lora, e, w->cols, w->rows);
        const int64_t begin = a->routing.offsets[e], end = a->routing.offsets[e + 1];
        for (int64_t s = begin; s < end; s++) {
            const real *d_out = (const real *)a->d_out + token[s] * w->rows, *gu = (const real *)a->gu + s * 2 * w->cols;
            glu_row(act + s * w->cols, gu, w->cols, &a->glu);
            expert_row_bwd(through, q + s * l.r, d_out, w, &l, e);
            double d_weight = 0;
            for (int64_t o = 0; a->bias && o < w->rows; o++) d_weight += (double)a->bias[e * w->rows + o] * d_out[o];
            for (int64_t i = 0; i < w->cols; i++) {
                d_weight += act[s * w->cols + i] * through[i];
                glu_bwd((real *)a->d_gu + s * 2 * w->cols, gu, weight[s] * through[i], i, w->cols, &a->glu);
            }
            ((real *)a->d_row_weight)[s] = (real)d_weight;
        }
        branch_grads(&l, &(branch_rows){
                             .x = act, .d_y = a->d_out, .y_index = token, .weight = weight, .u = a->u, .q = q, .begin = begin, .end = end});
    }
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_combine_fwd)(const espi_exec *exec, const espi_combine_fwd *a) {
    (void)exec;
    const int64_t hidden = a->hidden, top_k = a->routing.top_k;
    for (int64_t t = 0; t < a->routing.tokens; t++) {
        for (int64_t h = 0; h < hidden; h++) {
            double sum = a->add ? ((const real *)a->add)[t * hidden + h] : 0;
            for (int64_t k = 0; k < top_k; k++) {
                const int64_t row = a->routing.slot_row[t * top_k + k];
                sum += (double)((const real *)a->routing.row_weight)[row] * ((const real *)a->y)[row * hidden + h];
            }
            ((real *)a->out)[t * hidden + h] = (real)sum;
        }
    }
    return ESP_OK;
}

esp_status ESPI_REF_NAME(espi_combine_bwd)(const espi_exec *exec, const espi_combine_bwd *a) {
    (void)exec;
    const int64_t hidden = a->hidden, top_k = a->routing.top_k;
    for (int64_t t = 0; t < a->routing.tokens; t++) {
        const int32_t *row = a->routing.slot_row + t * top_k;
        for (int64_t h = 0; h < hidden; h++) {
            double sum = 0;
            for (int64_t k = 0; k < top_k; k++) sum += ((const real *)a->d_rows)[row[k] * hidden + h];
            ((real *)a->d_x)[t * hidden + h] = (real)sum;
        }
        for (int64_t k = 0; k < top_k; k++) ((real *)a->d_weight)[t * top_k + k] = ((const real *)a->d_row_weight)[row[k]];
    }
    return ESP_OK;
}
