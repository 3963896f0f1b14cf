/* The head: blocks of rows meet chunks of the vocabulary, logits live in a tile on the stack.  Chunks begin at multiples of HEAD_COLS
 * whatever the call, and stats, grad, sample and logits make their tiles by the same function: a logit has the same bits everywhere. */
#include "kernels/cpu/cpu.h"

enum { HEAD_ROWS = 96, HEAD_COLS = 128 };

/* z of rows first .. first + m against vocabulary entries col .. col + n. */
static void logits_tile(float tile[HEAD_ROWS][HEAD_COLS], const espi_head *head, int64_t first, int64_t m, int64_t col, int64_t n) {
    cpu_weight w = cpu_plain(&head->w, true);
    const cpu_rows to = {tile[0], HEAD_COLS, NULL}, from = {(float *)head->hidden, head->w.cols, head->rows + first};
    for (int64_t i = 0; head->bias && i < m; i++) memcpy(tile[i], head->bias + col, (size_t)n * sizeof(float));
    cpu_product(&to, &from, &w, m, head->w.cols, col, n, head->bias != NULL);
    const float scale = (float)head->logit_scale, cap = (float)head->softcap, temperature = (float)head->temperature;
    if (scale == 1 && cap == 0 && temperature == 1) return;
    for (int64_t i = 0; i < m; i++) {
        for (int64_t j = 0; j < n; j++) {
            float z = tile[i][j] * scale;
            if (cap != 0) z = cap * tanhf(z / cap);
            tile[i][j] = z / temperature;
        }
    }
}

/* Running softmax sums of one row: sum = sum e^(z - max), moment = sum e^(z - max) (z - max). */
typedef struct row_sums {
    double max, sum, moment;
    float target; /* z of the target, once met */
} row_sums;

static void add_chunk(row_sums *s, const float *z, int64_t n) {
    vec largest = splat(-INFINITY), sum = {0}, moment = {0};
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) largest = vmax(load(z + j), largest);
    if (j < n) largest = vmax(load_part(z + j, n - j, -INFINITY), largest);
    const float max = vlargest(largest);
    if (max > s->max) { /* what was summed so far was relative to the old maximum */
        if (s->sum > 0) {
            const double shrink = exp(s->max - max);
            s->moment = shrink * (s->moment + s->sum * (s->max - max));
            s->sum *= shrink;
        }
        s->max = max;
    }
    const vec shift = splat((float)s->max);
    for (j = 0; j + LANES <= n; j += LANES) {
        const vec d = load(z + j) - shift, p = vexp(d);
        sum += p;
        moment += p * d;
    }
    if (j < n) {
        const vec d = load_part(z + j, n - j, (float)s->max - 100) - shift, p = vexp(d); /* e^-100 counts as 0 */
        sum += p;
        moment += p * d;
    }
    s->sum += vsum(sum);
    s->moment += vsum(moment);
}

/* Sums of m <= HEAD_ROWS rows over the whole vocabulary. */
static void block_sums(row_sums *sums, const espi_head *head, int64_t first, int64_t m, const int32_t *target) {
    _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
    for (int64_t i = 0; i < m; i++) sums[i] = (row_sums){.max = -INFINITY, .target = NAN};
    for (int64_t col = 0; col < head->w.rows; col += HEAD_COLS) {
        const int64_t n = cpu_min(head->w.rows - col, HEAD_COLS);
        logits_tile(tile, head, first, m, col, n);
        for (int64_t i = 0; i < m; i++) {
            add_chunk(&sums[i], tile[i], n);
            if (target && target[first + i] >= col && target[first + i] < col + n) sums[i].target = tile[i][target[first + i] - col];
        }
    }
}

static double lse_of(const row_sums *s) {
    return s->max + log(s->sum);
}

static void block_stats(const espi_head *head, int64_t first, int64_t m, float *lp, float *entropy, float *lse) {
    row_sums sums[HEAD_ROWS];
    block_sums(sums, head, first, m, head->target);
    for (int64_t i = 0; i < m; i++) {
        lse[first + i] = (float)lse_of(&sums[i]);
        lp[first + i] = (float)(sums[i].target - lse_of(&sums[i]));
        entropy[first + i] = (float)(log(sums[i].sum) - sums[i].moment / sums[i].sum);
    }
}

static int head_threads(const espi_exec *exec, const espi_head *head) {
    return cpu_threads(exec, (double)head->n * (double)head->w.rows * (double)head->w.cols);
}

esp_status ESPI_CPU(espi_head_stats)(const espi_exec *exec, const espi_head_stats *a) {
    const int threads = head_threads(exec, &a->head);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < a->head.n; first += HEAD_ROWS)
        block_stats(&a->head, first, cpu_min(a->head.n - first, HEAD_ROWS), a->lp, a->entropy, a->lse);
    return ESP_OK;
}

/* d loss / d (h W^T + bias) of one row's chunk, over z. */
static void dz_row(float *z, const espi_head *head, int64_t n, float g, float e, float lse, float entropy) {
    const float factor = (float)(head->logit_scale / head->temperature), to_tanh = (float)(head->temperature / head->softcap);
    const bool capped = head->softcap != 0;
    for (int64_t j = 0; j < n; j += LANES) {
        const int64_t count = cpu_min(n - j, LANES);
        const vec value = count == LANES ? load(z + j) : load_part(z + j, count, 0);
        const vec log_p = value - splat(lse), p = vexp(log_p);
        vec d = -splat(g) * p;
        if (e != 0) d -= splat(e) * p * (log_p + splat(entropy));
        d *= splat(factor);
        if (capped) {
            const vec t = value * splat(to_tanh);
            d *= splat(1.0f) - t * t;
        }
        if (count == LANES)
            store(z + j, d);
        else
            store_part(z + j, d, count);
    }
}

static void block_grad(const espi_head *head, int64_t first, int64_t m, float *d_hidden, const float *g, const float *e, const float *lse,
                       const float *entropy) {
    _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
    const int64_t hidden = head->w.cols;
    const cpu_rows to = {d_hidden, hidden, (head->d_rows ? head->d_rows : head->rows) + first};
    for (int64_t col = 0; col < head->w.rows; col += HEAD_COLS) {
        const int64_t n = cpu_min(head->w.rows - col, HEAD_COLS);
        logits_tile(tile, head, first, m, col, n);
        for (int64_t i = 0; i < m; i++) {
            const int64_t t = first + i;
            const int64_t hit = head->target[t] - col;
            const float z = hit >= 0 && hit < n ? tile[i][hit] : 0;
            dz_row(tile[i], head, n, g[t], e ? e[t] : 0, lse[t], e ? entropy[t] : 0);
            if (hit < 0 || hit >= n) continue;
            float d = (float)(g[t] * head->logit_scale / head->temperature);
            if (head->softcap != 0) {
                const float tanh_value = z * (float)(head->temperature / head->softcap);
                d *= 1 - tanh_value * tanh_value;
            }
            tile[i][hit] += d;
        }
        cpu_weight w = cpu_plain(&head->w, false);
        if (head->w.dtype == ESP_F32)
            w.data = (const float *)head->w.data + col * hidden;
        else
            w.data = (const uint16_t *)head->w.data + col * hidden;
        cpu_product(&to, &(cpu_rows){tile[0], HEAD_COLS, NULL}, &w, m, n, 0, hidden, col > 0);
    }
}

esp_status ESPI_CPU(espi_head_grad)(const espi_exec *exec, const espi_head_grad *a) {
    const int threads = head_threads(exec, &a->head);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < a->head.n; first += HEAD_ROWS)
        block_grad(&a->head, first, cpu_min(a->head.n - first, HEAD_ROWS), a->d_hidden, a->g, a->e, a->lse, a->entropy);
    return ESP_OK;
}

/* A group of blocks a turn: their statistics on all threads, the coefficients here, their gradients on all threads. */
enum { FUSED_BLOCKS = 16 };

esp_status ESPI_CPU(espi_head_fused)(const espi_exec *exec, const espi_head_fused *a) {
    const int threads = head_threads(exec, &a->head);
    for (int64_t turn = 0; turn < a->head.n; turn += FUSED_BLOCKS * HEAD_ROWS) {
        const int64_t end = cpu_min(a->head.n, turn + FUSED_BLOCKS * HEAD_ROWS);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
        for (int64_t first = turn; first < end; first += HEAD_ROWS)
            block_stats(&a->head, first, cpu_min(end - first, HEAD_ROWS), a->lp, a->entropy, a->lse);
        ESPI_TRY(a->coef(a->coef_user, turn, end - turn));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
        for (int64_t first = turn; first < end; first += HEAD_ROWS)
            block_grad(&a->head, first, cpu_min(end - first, HEAD_ROWS), a->d_hidden, a->g, a->e, a->lse, a->entropy);
    }
    return ESP_OK;
}

esp_status ESPI_CPU(espi_head_logits)(const espi_exec *exec, const espi_head_logits *a) {
    const int64_t vocab = a->head.w.rows;
    const int threads = head_threads(exec, &a->head);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < a->head.n; first += HEAD_ROWS) {
        _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
        const int64_t m = cpu_min(a->head.n - first, HEAD_ROWS);
        for (int64_t col = 0; col < vocab; col += HEAD_COLS) {
            const int64_t n = cpu_min(vocab - col, HEAD_COLS);
            logits_tile(tile, &a->head, first, m, col, n);
            for (int64_t i = 0; i < m; i++) memcpy((float *)a->logits + (first + i) * vocab + col, tile[i], (size_t)n * sizeof(float));
        }
    }
    return ESP_OK;
}

/* One row's draw while the chunks pass by. */
typedef struct draw {
    double below; /* cumulative probability so far */
    float z;      /* of the token; greedy: the largest so far */
    int32_t token;
    bool done;
} draw;

/* The first entry whose cumulative probability passes the uniform; rounding may leave none, then the last that has any probability. */
static void draw_chunk(draw *d, const float *z, int64_t col, int64_t n, float lse, double uniform) {
    float p[HEAD_COLS];
    for (int64_t j = 0; j < n; j += LANES) {
        const int64_t count = cpu_min(n - j, LANES);
        if (count == LANES)
            store(p + j, vexp(load(z + j) - splat(lse)));
        else
            store_part(p + j, vexp(load_part(z + j, count, 0) - splat(lse)), count);
    }
    for (int64_t j = 0; j < n && !d->done; j++) {
        d->below += p[j];
        if (p[j] > 0 || d->below > uniform) {
            d->token = (int32_t)(col + j);
            d->z = z[j];
        }
        d->done = d->below > uniform;
    }
}

static void largest_chunk(draw *d, const float *z, int64_t col, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        if (!(z[j] > d->z)) continue;
        d->z = z[j];
        d->token = (int32_t)(col + j);
    }
}

static void block_sample(const espi_head *head, bool greedy, int64_t first, int64_t m, const espi_head_sample *a) {
    _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
    row_sums sums[HEAD_ROWS];
    draw draws[HEAD_ROWS];
    block_sums(sums, head, first, m, NULL);
    for (int64_t i = 0; i < m; i++) draws[i] = (draw){.z = greedy ? -INFINITY : NAN};
    for (int64_t col = 0; col < head->w.rows; col += HEAD_COLS) {
        const int64_t n = cpu_min(head->w.rows - col, HEAD_COLS);
        logits_tile(tile, head, first, m, col, n);
        for (int64_t i = 0; i < m; i++) {
            if (greedy)
                largest_chunk(&draws[i], tile[i], col, n);
            else
                draw_chunk(&draws[i], tile[i], col, n, (float)lse_of(&sums[i]), a->uniform[first + i]);
        }
    }
    for (int64_t i = 0; i < m; i++) {
        a->token[first + i] = draws[i].token;
        ((float *)a->lp)[first + i] = (float)(draws[i].z - lse_of(&sums[i]));
    }
}

esp_status ESPI_CPU(espi_head_sample)(const espi_exec *exec, const espi_head_sample *a) {
    espi_head head = a->head;
    const bool greedy = head.temperature == 0;
    if (greedy) head.temperature = 1;
    const int threads = head_threads(exec, &head);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < head.n; first += HEAD_ROWS) block_sample(&head, greedy, first, cpu_min(head.n - first, HEAD_ROWS), a);
    return ESP_OK;
}
