/* Gradient norm and AdamW. */
#include "kernels/cpu/cpu.h"

#include <float.h>

enum { SUMSQ_CHUNK = 4096, ADAM8_BLOCK = 256, MAP_SIZE = 256, CODE_ZERO_SIGNED = 127, CODE_ZERO_UNSIGNED = 0 };

typedef double dvec __attribute__((vector_size(LANES * 8)));

static void add_squares(double *out, const float *x, int64_t n) {
    for (int64_t first = 0; first < n; first += SUMSQ_CHUNK) {
        const int64_t end = cpu_min(n, first + SUMSQ_CHUNK);
        dvec lanes = {0};
        int64_t i = first;
        for (; i + LANES <= end; i += LANES) {
            const dvec d = __builtin_convertvector(load(x + i), dvec);
            lanes += d * d;
        }
        double sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
        for (; i < end; i++) sum += (double)x[i] * x[i];
        *out += sum;
    }
}

esp_status ESPI_CPU(espi_sumsq)(const espi_exec *exec, const espi_sumsq *a) {
    const int64_t n = a->parts ? a->n / a->parts : 0;
    const int threads = cpu_threads(exec, (double)a->n * 2);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && a->parts > 1)
    for (int64_t p = 0; p < a->parts; p++) add_squares(a->out + p, (const float *)a->x + p * n, n);
    return ESP_OK;
}

esp_status ESPI_CPU(espi_adamw)(const espi_exec *exec, const espi_adamw *a) {
    float *restrict p = a->p, *restrict m = a->m, *restrict v = a->v;
    const float *restrict g = a->g;
    const float keep = (float)(1 - a->lr * a->weight_decay), step_size = (float)(a->lr / (1 - pow(a->beta1, (double)a->step)));
    const float correction = (float)(1 / sqrt(1 - pow(a->beta2, (double)a->step)));
    const float new1 = (float)(1 - a->beta1), old2 = (float)a->beta2, new2 = (float)(1 - a->beta2), eps = (float)a->eps;
    const float grad_scale = (float)a->grad_scale;
    const int threads = cpu_threads(exec, (double)a->n * 16);
#pragma omp parallel for simd schedule(static) num_threads(threads) if (parallel : threads > 1)
    for (int64_t i = 0; i < a->n; i++) {
        const float d = grad_scale * g[i], first = m[i] + new1 * (d - m[i]), second = old2 * v[i] + new2 * d * d;
        m[i] = first;
        v[i] = second;
        p[i] = p[i] * keep - step_size * first / (sqrtf(second) * correction + eps);
    }
    return ESP_OK;
}

/* Halfway between the values of a map and their next ones. */
static void midpoints(float middle[MAP_SIZE - 1], const float *map) {
    for (int i = 0; i < MAP_SIZE - 1; i++) middle[i] = (map[i] + map[i + 1]) / 2;
}

/* New scale and codes of one block of moments: the nearest values of an ascending map, on a midpoint the lower, are as many as midpoints are
 * below.  A block of zeros has scale 0: nothing may be divided by it. */
static float requantise(uint8_t *codes, const float *x, int64_t n, const float middle[MAP_SIZE - 1], uint8_t zero_code) {
    int32_t below[ADAM8_BLOCK] = {0};
    vec largest = {0};
    for (int64_t i = 0; i < n; i += LANES) {
        const vec y = n - i < LANES ? load_part(x + i, n - i, 0) : load(x + i);
        largest = vmax(vmax(y, -y), largest);
    }
    const float absmax = vlargest(largest);
    for (int32_t span = MAP_SIZE / 2; span >= 1 && absmax > 0; span /= 2)
        for (int64_t i = 0; i < n; i++) below[i] += middle[below[i] + span - 1] < x[i] / absmax ? span : 0;
    for (int64_t i = 0; i < n; i++) codes[i] = absmax > 0 ? (uint8_t)below[i] : zero_code;
    return absmax;
}

/* As the reference: decay before the update, codes by nearest value, the parameter sees the moments before they are quantised, an element
 * whose gradient is not finite loses its moments and keeps its value. */
esp_status ESPI_CPU(espi_adamw8)(const espi_exec *exec, const espi_adamw8 *a) {
    const double correction1 = 1 - pow(a->beta1, (double)a->step), correction2 = sqrt(1 - pow(a->beta2, (double)a->step));
    const float step_size = (float)(a->lr * correction2 / correction1), eps = (float)(a->eps * correction2);
    const float keep = (float)(1 - a->lr * a->weight_decay), grad_scale = (float)a->grad_scale;
    const float old1 = (float)a->beta1, new1 = (float)(1 - a->beta1), old2 = (float)a->beta2, new2 = (float)(1 - a->beta2);
    const int threads = cpu_threads(exec, (double)a->n * 64);
    float middle1[MAP_SIZE - 1], middle2[MAP_SIZE - 1];
    midpoints(middle1, a->map1);
    midpoints(middle2, a->map2);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t block = 0; block < cpu_blocks(a->n, ADAM8_BLOCK); block++) {
        const int64_t first = block * ADAM8_BLOCK, n = cpu_min(a->n - first, ADAM8_BLOCK);
        float *restrict p = (float *)a->p + first, m[ADAM8_BLOCK], v[ADAM8_BLOCK];
        const float *restrict g = (const float *)a->g + first;
        uint8_t *code1 = a->state1 + first, *code2 = a->state2 + first;
        for (int64_t i = 0; i < n; i++) {
            m[i] = a->map1[code1[i]] * a->absmax1[block];
            v[i] = a->map2[code2[i]] * a->absmax2[block];
        }
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            const float d = grad_scale * g[i];
            const bool finite = fabsf(d) <= FLT_MAX;
            m[i] = finite ? old1 * m[i] + new1 * d : 0;
            v[i] = finite ? old2 * v[i] + new2 * d * d : 0;
            p[i] = finite ? p[i] * keep - step_size * m[i] / (sqrtf(v[i]) + eps) : p[i];
        }
        a->absmax1[block] = requantise(code1, m, n, middle1, CODE_ZERO_SIGNED);
        a->absmax2[block] = requantise(code2, v, n, middle2, CODE_ZERO_UNSIGNED);
    }
    return ESP_OK;
}
