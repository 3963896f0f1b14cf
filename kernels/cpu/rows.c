/* What works on a row at a time: embedding, RMSNorm, rotary embedding, and the element-wise ops. */
#include "kernels/cpu/cpu.h"

esp_status ESPI_CPU(espi_embed_fwd)(const espi_exec *exec, const espi_embed_fwd *a) {
    (void)exec;
    const cpu_weight table = cpu_plain(&a->table, false);
    for (int64_t t = 0; t < a->tokens; t++) cpu_decode_row((float *)a->out + t * a->table.cols, &table, a->ids[t], 0, a->table.cols);
    return ESP_OK;
}

esp_status ESPI_CPU(espi_embed_bwd)(const espi_exec *exec, const espi_embed_bwd *a) {
    (void)exec;
    for (int64_t t = 0; t < a->tokens; t++) {
        float *d_table = (float *)a->d_table + a->ids[t] * a->hidden;
        const float *d_out = (const float *)a->d_out + t * a->hidden;
        for (int64_t h = 0; h < a->hidden; h++) d_table[h] += d_out[h];
    }
    return ESP_OK;
}

esp_status ESPI_CPU(espi_zero)(const espi_exec *exec, const espi_zero *a) {
    (void)exec;
    if (a->bytes > 0) memset(a->out, 0, a->bytes);
    return ESP_OK;
}

esp_status ESPI_CPU(espi_add)(const espi_exec *exec, const espi_add *a) {
    float *out = a->out;
    const float *x = a->a, *y = a->b;
    const int threads = cpu_threads(exec, (double)a->n * 4);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a->n; i++) out[i] = x[i] + y[i];
    return ESP_OK;
}

esp_status ESPI_CPU(espi_rows_add)(const espi_exec *exec, const espi_rows_add *a) {
    (void)exec;
    for (int64_t i = 0; i < a->n; i++) {
        float *out = (float *)a->out + a->to[i] * a->hidden;
        const float *x = (const float *)a->x + i * a->hidden;
        for (int64_t h = 0; h < a->hidden; h++) out[h] += x[h];
    }
    return ESP_OK;
}

esp_status ESPI_CPU(espi_rows_take)(const espi_exec *exec, const espi_rows_take *a) {
    const int threads = cpu_threads(exec, (double)(a->n * a->hidden) * 4);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a->n; i++)
        memcpy((float *)a->out + i * a->hidden, (const float *)a->x + a->from[i] * a->hidden, (size_t)a->hidden * sizeof(float));
    return ESP_OK;
}

esp_status ESPI_CPU(espi_parts_add)(const espi_exec *exec, const espi_parts_add *a) {
    float *total = a->total;
    const float *parts = a->parts;
    const int threads = cpu_threads(exec, (double)(a->n * a->n_parts) * 4);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a->n; i++) {
        float sum = total[i];
        for (int64_t p = 0; p < a->n_parts; p++) sum += parts[p * a->n + i];
        total[i] = sum;
    }
    return ESP_OK;
}

esp_status ESPI_CPU(espi_clamp_fwd)(const espi_exec *exec, const espi_clamp_fwd *a) {
    const float *x = a->x, limit = (float)a->limit;
    float *y = a->y;
    const int threads = cpu_threads(exec, (double)a->n * 4);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a->n; i++) y[i] = x[i] > limit ? limit : x[i] < -limit ? -limit : x[i];
    return ESP_OK;
}

esp_status ESPI_CPU(espi_clamp_bwd)(const espi_exec *exec, const espi_clamp_bwd *a) {
    const float *x = a->x, *d_y = a->d_y, limit = (float)a->limit;
    float *d_x = a->d_x;
    const int threads = cpu_threads(exec, (double)a->n * 4);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < a->n; i++) d_x[i] = x[i] >= -limit && x[i] <= limit ? d_y[i] : 0;
    return ESP_OK;
}

esp_status ESPI_CPU(espi_rmsnorm_fwd)(const espi_exec *exec, const espi_rmsnorm_fwd *a) {
    const int64_t n = a->n;
    const float *w = a->w;
    const int threads = cpu_threads(exec, (double)a->rows * (double)n * 4);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a->rows; row++) {
        const float *x = (const float *)a->x + row * n;
        float *y = (float *)a->y + row * n;
        vec squares = {0};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
        if (i < n) {
            const vec rest = load_part(x + i, n - i, 0);
            squares += rest * rest;
        }
        const float rstd = (float)(1 / sqrt((double)vsum(squares) / (double)n + a->eps));
        const vec r = splat(rstd);
        for (i = 0; i + LANES <= n; i += LANES) store(y + i, load(w + i) * (load(x + i) * r));
        for (; i < n; i++) y[i] = w[i] * (x[i] * rstd);
        ((float *)a->rstd)[row] = rstd;
    }
    return ESP_OK;
}

static void norm_weight_grad(const espi_rmsnorm_bwd *a) {
    float *d_w = a->d_w;
    for (int64_t row = 0; row < a->rows; row++) {
        const float *x = (const float *)a->x + row * a->n, *d_y = (const float *)a->d_y + row * a->n;
        const float r = ((const float *)a->rstd)[row];
        for (int64_t i = 0; i < a->n; i++) d_w[i] += d_y[i] * (x[i] * r);
    }
}

esp_status ESPI_CPU(espi_rmsnorm_bwd)(const espi_exec *exec, const espi_rmsnorm_bwd *a) {
    const int64_t n = a->n;
    const float *w = a->w;
    if (a->d_w) norm_weight_grad(a); /* first: d_x may lie over d_y */
    const int threads = cpu_threads(exec, (double)a->rows * (double)n * 8);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < a->rows; row++) {
        const float *x = (const float *)a->x + row * n, *d_y = (const float *)a->d_y + row * n;
        const float *d_add = a->d_add ? (const float *)a->d_add + row * n : NULL;
        float *d_x = (float *)a->d_x + row * n;
        const float r = ((const float *)a->rstd)[row];
        vec sum = {0};
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) sum += (load(d_y + i) * load(w + i)) * load(x + i);
        /* What does not fill a vector is done in double: very short rows cancel almost to nothing. */
        double slope = vsum(sum);
        for (; i < n; i++) slope += (double)d_y[i] * w[i] * x[i];
        slope *= (double)r * r / (double)n;
        for (i = 0; i + LANES <= n; i += LANES) {
            vec d = splat(r) * (load(d_y + i) * load(w + i) - load(x + i) * splat((float)slope));
            if (d_add) d += load(d_add + i);
            store(d_x + i, d);
        }
        for (; i < n; i++) {
            const double d = r * ((double)d_y[i] * w[i] - x[i] * slope);
            d_x[i] = (float)(d_add ? d + d_add[i] : d);
        }
    }
    return ESP_OK;
}

/* Sine and cosine in double are dear, and packed sequences repeat their positions: a position met before is copied from its row. */
enum { REMEMBERED = 4096 };

esp_status ESPI_CPU(espi_rope_table)(const espi_exec *exec, const espi_rope_table *a) {
    (void)exec;
    float *cosine = a->cos, *sine = a->sin;
    const size_t bytes = (size_t)a->half * sizeof(float);
    int32_t row_of[REMEMBERED];
    for (int i = 0; i < REMEMBERED; i++) row_of[i] = -1;
    for (int64_t t = 0; t < a->tokens; t++) {
        const int32_t position = a->positions[t];
        int32_t *seen = position >= 0 && position < REMEMBERED ? &row_of[position] : NULL;
        if (seen && *seen >= 0) {
            memcpy(cosine + t * a->half, cosine + *seen * a->half, bytes);
            memcpy(sine + t * a->half, sine + *seen * a->half, bytes);
            continue;
        }
        for (int64_t j = 0; j < a->half; j++) {
            const double angle = position * a->inv_freq[j];
            cosine[t * a->half + j] = (float)(a->factor * cos(angle));
            sine[t * a->half + j] = (float)(a->factor * sin(angle));
        }
        if (seen) *seen = (int32_t)t;
    }
    return ESP_OK;
}

/* direction 1: rotate; -1: the transpose, which is the same with the other sign of sin. */
static void rotate(const espi_exec *exec, const espi_rope *a, float direction) {
    const int64_t half = a->half;
    const int threads = cpu_threads(exec, (double)a->tokens * (double)(a->heads * half) * 6);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *c = (const float *)a->cos + t * half, *s = (const float *)a->sin + t * half;
        for (int64_t head = 0; head < a->heads; head++) {
            float *low = (float *)a->x + (t * a->heads + head) * a->head_dim, *high = low + half;
            int64_t j = 0;
            for (; j + LANES <= half; j += LANES) {
                const vec l = load(low + j), h = load(high + j), cosine = load(c + j), sine = splat(direction) * load(s + j);
                store(low + j, l * cosine - h * sine);
                store(high + j, h * cosine + l * sine);
            }
            for (; j < half; j++) {
                const float l = low[j], h = high[j], sine = direction * s[j];
                low[j] = l * c[j] - h * sine;
                high[j] = h * c[j] + l * sine;
            }
        }
    }
}

esp_status ESPI_CPU(espi_rope_fwd)(const espi_exec *exec, const espi_rope *a) {
    rotate(exec, a, 1);
    return ESP_OK;
}

esp_status ESPI_CPU(espi_rope_bwd)(const espi_exec *exec, const espi_rope *a) {
    rotate(exec, a, -1);
    return ESP_OK;
}
