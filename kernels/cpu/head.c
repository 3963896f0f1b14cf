/* The head: blocks of rows meet chunks of the vocabulary, logits live in a tile on the stack.  Chunks begin at multiples of HEAD_COLS
 * whatever the call, and stats, grad, sample and logits make their tiles by the same function: a logit has the same bits everywhere. */
#include "kernels/cpu/operand.h"

#include <omp.h>
#include <stdlib.h>

/* Rows that are worked on together at most, and entries of the vocabulary at a time. */
enum { HEAD_ROWS = 128, HEAD_COLS = 512 };

/* Rows first .. first + m - 1 of the head's: what a task works on. */
typedef struct block {
    const espi_head *head;
    int64_t first, m;
    operand rows;
    float (*kept)[HEAD_COLS]; /* room for the logits of all chunks, or NULL: they are made again when wanted again */
    int64_t kept_rows;        /* of a chunk */
} block;

static int64_t chunks_of(const espi_head *head) {
    return cpu_blocks(head->w.rows, HEAD_COLS);
}

/* What is done to a row's products before they are logits. */
static void finish_logits(float *z, const espi_head *head, int64_t n) {
    const float scale = (float)head->logit_scale, cap = (float)head->softcap, temperature = (float)head->temperature;
    if (scale == 1 && cap == 0 && temperature == 1) return;
    for (int64_t j = 0; j < n; j++) {
        float value = z[j] * scale;
        if (cap != 0) value = cap * tanhf(value / cap);
        z[j] = value / temperature;
    }
}

/* z of a block against vocabulary entries col .. col + n. */
static void logits_tile(float (*tile)[HEAD_COLS], const block *b, int64_t col, int64_t n) {
    const espi_head *head = b->head;
    const cpu_weight w = cpu_plain(&head->w, true);
    for (int64_t i = 0; head->bias && i < b->m; i++) memcpy(tile[i], head->bias + col, (size_t)n * sizeof(float));
    multiply(&(cpu_rows){tile[0], HEAD_COLS, NULL}, &b->rows, &w, b->m, head->w.cols, col, n, head->bias != NULL);
    for (int64_t i = 0; i < b->m; i++) finish_logits(tile[i], head, n);
}

/* The ids that row i is a distribution over; none: the vocabulary. */
typedef struct id_list {
    const int32_t *ids;
    int64_t n;
} id_list;
static id_list list_of(const espi_head *head, int64_t i) {
    if (!head->kept_offsets) return (id_list){NULL, 0};
    return (id_list){head->kept + head->kept_offsets[i], head->kept_offsets[i + 1] - head->kept_offsets[i]};
}

/* Of the rows from i on, as many as have a list like the i-th, or none: those without go through the vocabulary together. */
static int64_t run_end(const espi_head *head, int64_t i, int64_t end) {
    if (!head->kept_offsets) return end;
    const bool listed = list_of(head, i).n > 0;
    while (i < end && (list_of(head, i).n > 0) == listed) i++;
    return i;
}

/* z of a block's row i for n <= PANEL_COLS ids: the chains of the product over the whole vocabulary, so the same bits. */
static void logits_of_ids(float *z, const block *b, int64_t i, const int32_t *ids, int64_t n) {
    _Alignas(64) float entries[PANEL_COLS][PANEL_DEPTH];
    const espi_head *head = b->head;
    const cpu_weight w = cpu_plain(&head->w, true), gathered = cpu_floats(entries[0], PANEL_DEPTH, 1, true);
    const cpu_rows to = {z, PANEL_COLS, NULL};
    for (int64_t j = 0; head->bias && j < n; j++) z[j] = head->bias[ids[j]];
    for (int64_t k = 0; k < head->w.cols; k += PANEL_DEPTH) {
        const int64_t depth = cpu_min(head->w.cols - k, PANEL_DEPTH);
        for (int64_t j = 0; j < n; j++) cpu_decode_row(entries[j], &w, ids[j], k, depth);
        const operand x = operand_at(&b->rows, i, k);
        multiply(&to, &x, &gathered, 1, depth, 0, n, head->bias || k > 0);
    }
    finish_logits(z, head, n);
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

/* Where the logits of the chunk at `col` go: the room for them, or `tile`. */
static float (*place_of(const block *b, float (*tile)[HEAD_COLS], int64_t col))[HEAD_COLS] {
    return b->kept ? b->kept + col / HEAD_COLS * b->kept_rows : tile;
}

/* Sums of a block over the whole vocabulary. */
static void block_sums(row_sums *sums, const block *b, bool targets) {
    _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
    const int32_t *target = targets ? b->head->target + b->first : NULL;
    for (int64_t i = 0; i < b->m; i++) sums[i] = (row_sums){.max = -INFINITY, .target = NAN};
    for (int64_t col = 0; col < b->head->w.rows; col += HEAD_COLS) {
        const int64_t n = cpu_min(b->head->w.rows - col, HEAD_COLS);
        float(*z)[HEAD_COLS] = place_of(b, tile, col);
        logits_tile(z, b, col, n);
        for (int64_t i = 0; i < b->m; i++) {
            add_chunk(&sums[i], z[i], n);
            if (target && target[i] >= col && target[i] < col + n) sums[i].target = z[i][target[i] - col];
        }
    }
}

static double lse_of(const row_sums *s) {
    return s->max + log(s->sum);
}

/* The same for one row over a list. */
static row_sums list_sums(const block *b, int64_t i, const id_list *list, int32_t target) {
    row_sums sums = {.max = -INFINITY, .target = NAN};
    for (int64_t at = 0; at < list->n; at += PANEL_COLS) {
        float z[PANEL_COLS];
        const int64_t n = cpu_min(list->n - at, PANEL_COLS);
        logits_of_ids(z, b, i, list->ids + at, n);
        add_chunk(&sums, z, n);
        for (int64_t j = 0; j < n; j++)
            if (list->ids[at + j] == target) sums.target = z[j];
    }
    return sums;
}

/* The part of a block that begins with its row i and ends before row `end`. */
static block part_of(const block *b, int64_t i, int64_t end) {
    return (block){b->head, b->first + i, end - i, operand_at(&b->rows, i, 0), b->kept ? b->kept + i : NULL, b->kept_rows};
}

static void block_stats(const block *b, float *lp, float *entropy, float *lse) {
    const espi_head *head = b->head;
    row_sums sums[HEAD_ROWS] = {{0}};
    for (int64_t i = 0, end; i < b->m; i = end) {
        const bool listed = list_of(head, b->first + i).n > 0;
        end = run_end(head, b->first + i, b->first + b->m) - b->first;
        const block run = part_of(b, i, end);
        if (!listed) block_sums(sums + i, &run, true);
        for (int64_t k = i; listed && k < end; k++) {
            const id_list list = list_of(head, b->first + k);
            sums[k] = list_sums(b, k, &list, head->target[b->first + k]);
        }
    }
    for (int64_t i = 0; i < b->m; i++) {
        lse[b->first + i] = (float)lse_of(&sums[i]);
        lp[b->first + i] = (float)(sums[i].target - lse_of(&sums[i]));
        entropy[b->first + i] = (float)(log(sums[i].sum) - sums[i].moment / sums[i].sum);
    }
}

/* ---- tasks ---- */

static int head_threads(const espi_exec *exec, const espi_head *head) {
    return cpu_threads(exec, (double)head->n * (double)head->w.rows * (double)head->w.cols);
}

/* Rows of a block: HEAD_ROWS at most, and so that the threads have as many blocks each. */
static int64_t block_rows(int64_t n, int threads) {
    const int64_t rounds = cpu_blocks(n, (int64_t)threads * HEAD_ROWS);
    return n > 0 ? cpu_blocks(n, rounds * threads) : HEAD_ROWS;
}

/* Bytes a thread needs for a block, and for its logits. */
static size_t rows_bytes(const espi_head *head) {
    return operand_bytes(HEAD_ROWS, head->w.cols);
}
/* A small head is multiplied again sooner than it is worth the memory. */
static const int64_t keeping_pays = 1 << 17;
static size_t kept_bytes(const espi_head *head, int64_t rows) {
    return head->w.rows * head->w.cols < keeping_pays ? 0 : (size_t)(chunks_of(head) * rows) * HEAD_COLS * sizeof(float);
}
static size_t head_scratch(const espi_exec *exec, const espi_head *head) {
    return (size_t)exec->threads * rows_bytes(head);
}

/* Rows first .. first + m - 1 in one of as many places as there may be threads.  kept: room for the logits of so many rows in each, behind the
 * rows'. */
static block enter_place(const espi_exec *exec, const espi_head *head, int64_t first, int64_t m, int64_t kept, int64_t place) {
    const cpu_rows rows = {(float *)head->hidden, head->w.cols, head->rows + first};
    block b = {.head = head, .first = first, .m = m, .kept_rows = kept};
    b.rows = make_operand((char *)exec->scratch + (size_t)place * rows_bytes(head), &rows, m, head->w.cols);
    if (kept_bytes(head, kept) > 0)
        b.kept = (float(*)[HEAD_COLS])(void *)((char *)exec->scratch + head_scratch(exec, head) + (size_t)place * kept_bytes(head, kept));
    return b;
}

/* In the place of this thread. */
static block enter_block(const espi_exec *exec, const espi_head *head, int64_t first, int64_t m, int64_t kept) {
    return enter_place(exec, head, first, m, kept, omp_get_thread_num());
}

size_t ESPI_CPU(espi_head_stats_scratch)(const espi_exec *exec, const espi_head_stats *a) {
    return head_scratch(exec, &a->head);
}

esp_status ESPI_CPU(espi_head_stats)(const espi_exec *exec, const espi_head_stats *a) {
    const int threads = head_threads(exec, &a->head);
    const int64_t rows = block_rows(a->head.n, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < a->head.n; first += rows) {
        const block b = enter_block(exec, &a->head, first, cpu_min(a->head.n - first, rows), 0);
        block_stats(&b, a->lp, a->entropy, a->lse);
    }
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

/* What the loss asks of one row. */
typedef struct row_coef {
    float g, e, lse, entropy;
} row_coef;
static row_coef coef_of(const espi_head_grad *a, int64_t i) {
    const float *e = a->e;
    return (row_coef){((const float *)a->g)[i], e ? e[i] : 0, ((const float *)a->lse)[i], e ? ((const float *)a->entropy)[i] : 0};
}

/* z of n entries, the hit-th of which is the target (or none), becomes d loss / d (h W^T + bias). */
static void dz_chunk(float *z, const espi_head *head, int64_t n, int64_t hit, const row_coef *c) {
    const bool met = hit >= 0 && hit < n;
    const float target = met ? z[hit] : 0;
    dz_row(z, head, n, c->g, c->e, c->lse, c->entropy);
    if (!met) return;
    float d = (float)(c->g * head->logit_scale / head->temperature);
    if (head->softcap != 0) {
        const float tanh_value = target * (float)(head->temperature / head->softcap);
        d *= 1 - tanh_value * tanh_value;
    }
    z[hit] += d;
}

static const int32_t *d_rows_of(const espi_head *head) {
    return head->d_rows ? head->d_rows : head->rows;
}

/* Bytes of the operand that dz of a chunk becomes. */
enum { DZ_BYTES = HEAD_ROWS * HEAD_COLS * sizeof(uint16_t) };

static void vocabulary_grad(const espi_head_grad *a, const block *b) {
    _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
    _Alignas(64) char room[DZ_BYTES];
    const espi_head *head = b->head;
    const int64_t hidden = head->w.cols;
    const cpu_rows to = {a->d_hidden, hidden, d_rows_of(head) + b->first};
    for (int64_t col = 0; col < head->w.rows; col += HEAD_COLS) {
        const int64_t n = cpu_min(head->w.rows - col, HEAD_COLS);
        float(*z)[HEAD_COLS] = place_of(b, tile, col);
        if (!b->kept) logits_tile(z, b, col, n);
        for (int64_t i = 0; i < b->m; i++) {
            const row_coef c = coef_of(a, b->first + i);
            dz_chunk(z[i], head, n, head->target[b->first + i] - col, &c);
        }
        cpu_weight w = cpu_plain(&head->w, false);
        w.data = (const char *)head->w.data + (size_t)(col * hidden) * esp_dtype_size(head->w.dtype);
        const operand d_z = make_operand(room, &(cpu_rows){z[0], HEAD_COLS, NULL}, b->m, n);
        multiply(&to, &d_z, &w, b->m, n, 0, hidden, col > 0);
    }
}

/* A block's row i over a list: its entries' rows of W, times their d z, in strips of what fits beside them. */
static void list_grad(const espi_head_grad *a, const block *b, int64_t i, const id_list *list) {
    _Alignas(64) float entries[PANEL_COLS][PANEL_DEPTH];
    _Alignas(64) char room[2 * PANEL_COLS * sizeof(uint16_t)];
    const espi_head *head = b->head;
    const int64_t hidden = head->w.cols;
    const row_coef c = coef_of(a, b->first + i);
    const cpu_weight w = cpu_plain(&head->w, true), gathered = cpu_floats(entries[0], PANEL_DEPTH, 1, false);
    float *d = (float *)a->d_hidden + d_rows_of(head)[b->first + i] * hidden;
    for (int64_t at = 0; at < list->n; at += PANEL_COLS) {
        float z[PANEL_COLS];
        const int64_t n = cpu_min(list->n - at, PANEL_COLS);
        int64_t hit = 0;
        logits_of_ids(z, b, i, list->ids + at, n);
        while (hit < n && list->ids[at + hit] != head->target[b->first + i]) hit++;
        dz_chunk(z, head, n, hit, &c);
        const operand d_z = make_operand(room, &(cpu_rows){z, PANEL_COLS, NULL}, 1, n);
        for (int64_t col = 0; col < hidden; col += PANEL_DEPTH) {
            const int64_t width = cpu_min(hidden - col, PANEL_DEPTH);
            for (int64_t j = 0; j < n; j++) cpu_decode_row(entries[j], &w, list->ids[at + j], col, width);
            multiply(&(cpu_rows){d + col, hidden, NULL}, &d_z, &gathered, 1, n, 0, width, at > 0);
        }
    }
}

static void block_grad(const espi_head_grad *a, const block *b) {
    for (int64_t i = 0, end; i < b->m; i = end) {
        const bool listed = list_of(b->head, b->first + i).n > 0;
        end = run_end(b->head, b->first + i, b->first + b->m) - b->first;
        const block run = part_of(b, i, end);
        if (!listed) vocabulary_grad(a, &run);
        for (int64_t k = i; listed && k < end; k++) {
            const id_list list = list_of(b->head, b->first + k);
            list_grad(a, b, k, &list);
        }
    }
}

size_t ESPI_CPU(espi_head_grad_scratch)(const espi_exec *exec, const espi_head_grad *a) {
    return head_scratch(exec, &a->head);
}

esp_status ESPI_CPU(espi_head_grad)(const espi_exec *exec, const espi_head_grad *a) {
    const int threads = head_threads(exec, &a->head);
    const int64_t rows = block_rows(a->head.n, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < a->head.n; first += rows) {
        const block b = enter_block(exec, &a->head, first, cpu_min(a->head.n - first, rows), 0);
        block_grad(a, &b);
    }
    return ESP_OK;
}

/* The logits of a block are kept until its coefficients are there: two products of the vocabulary instead of three. */
size_t ESPI_CPU(espi_head_fused_scratch)(const espi_exec *exec, const espi_head_fused *a) {
    return head_scratch(exec, &a->head) + (size_t)exec->threads * kept_bytes(&a->head, HEAD_ROWS);
}

/* Block i of those of `rows` rows that cover begin .. end - 1, with room for its logits. */
static block turn_block(const espi_exec *exec, const espi_head *head, int64_t begin, int64_t end, int64_t rows, int64_t i) {
    const int64_t first = begin + i * rows;
    return enter_place(exec, head, first, cpu_min(end - first, rows), HEAD_ROWS, i);
}

esp_status ESPI_CPU(espi_head_fused)(const espi_exec *exec, const espi_head_fused *a) {
    const int threads = head_threads(exec, &a->head);
    const int64_t rows = block_rows(a->head.n, threads), turn = threads * rows;
    const espi_head_grad grad = {.head = a->head, .d_hidden = a->d_hidden, .g = a->g, .e = a->e, .lse = a->lse, .entropy = a->entropy};
    for (int64_t begin = 0; begin < a->head.n; begin += turn) {
        const int64_t end = cpu_min(a->head.n, begin + turn);
        const int64_t blocks = cpu_blocks(end - begin, rows);
        esp_status status = ESP_OK;
        /* As many blocks as threads were asked for; there may be fewer.  Block i has place i in both halves, where its logits are. */
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
#pragma omp for schedule(static, 1)
            for (int64_t i = 0; i < blocks; i++) {
                const block b = turn_block(exec, &a->head, begin, end, rows, i);
                block_stats(&b, a->lp, a->entropy, a->lse);
            }
#pragma omp single
            status = a->coef ? a->coef(a->coef_user, begin, end - begin) : ESP_OK;
#pragma omp for schedule(static, 1)
            for (int64_t i = 0; i < blocks; i++) {
                if (status != ESP_OK) continue;
                const block b = turn_block(exec, &a->head, begin, end, rows, i);
                block_grad(&grad, &b);
            }
        }
        ESPI_TRY(status);
    }
    return ESP_OK;
}

size_t ESPI_CPU(espi_head_logits_scratch)(const espi_exec *exec, const espi_head_logits *a) {
    return head_scratch(exec, &a->head);
}

esp_status ESPI_CPU(espi_head_logits)(const espi_exec *exec, const espi_head_logits *a) {
    const int64_t vocab = a->head.w.rows;
    const int threads = head_threads(exec, &a->head);
    const int64_t rows = block_rows(a->head.n, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < a->head.n; first += rows) {
        _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
        const block b = enter_block(exec, &a->head, first, cpu_min(a->head.n - first, rows), 0);
        for (int64_t col = 0; col < vocab; col += HEAD_COLS) {
            const int64_t n = cpu_min(vocab - col, HEAD_COLS);
            logits_tile(tile, &b, col, n);
            for (int64_t i = 0; i < b.m; i++) memcpy((float *)a->logits + (first + i) * vocab + col, tile[i], (size_t)n * sizeof(float));
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

/* As over the vocabulary, with the list's places for ids. */
static void draw_from_list(const espi_head_sample *a, const block *b, int64_t i, const id_list *list) {
    const row_sums sums = list_sums(b, i, list, -1);
    const int64_t row = b->first + i;
    draw d = {.z = NAN};
    for (int64_t at = 0; at < list->n; at += PANEL_COLS) {
        float z[PANEL_COLS];
        const int64_t n = cpu_min(list->n - at, PANEL_COLS);
        logits_of_ids(z, b, i, list->ids + at, n);
        draw_chunk(&d, z, at, n, (float)lse_of(&sums), a->uniform[row]);
    }
    a->token[row] = list->ids[d.token];
    ((float *)a->lp)[row] = (float)(d.z - lse_of(&sums));
}

/* An entry of the list of the largest: a heap with the weakest on top. */
typedef struct candidate {
    float z;
    int32_t id;
} candidate;

static bool weaker(const candidate *a, const candidate *b) {
    return a->z < b->z || (a->z == b->z && a->id > b->id);
}

/* Puts `c` where the top of a heap of n is missing. */
static void sink(candidate *heap, int64_t n, candidate c) {
    int64_t at = 0;
    for (int64_t child = 1; child < n; child = 2 * at + 1) {
        if (child + 1 < n && weaker(&heap[child + 1], &heap[child])) child++;
        if (!weaker(&heap[child], &c)) break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = c;
}

static void rise(candidate *heap, int64_t at, candidate c) {
    for (; at > 0 && weaker(&c, &heap[(at - 1) / 2]); at = (at - 1) / 2) heap[at] = heap[(at - 1) / 2];
    heap[at] = c;
}

/* The largest entries of a row while the chunks pass by. */
typedef struct largest_list {
    candidate *heap;
    int64_t n, most;
} largest_list;

static void list_chunk(largest_list *l, const float *z, int64_t col, int64_t n) {
    for (int64_t j = 0; j < n; j++) {
        const candidate c = {z[j], (int32_t)(col + j)};
        if (l->n < l->most)
            rise(l->heap, l->n++, c);
        else if (weaker(&l->heap[0], &c))
            sink(l->heap, l->n, c);
    }
}

/* Largest first. */
static void sort_list(largest_list *l) {
    for (int64_t n = l->n - 1; n > 0; n--) {
        const candidate weakest = l->heap[0];
        sink(l->heap, n, l->heap[n]);
        l->heap[n] = weakest;
    }
}

static int ascending(const void *a, const void *b) {
    const int32_t x = *(const int32_t *)a, y = *(const int32_t *)b;
    return (x > y) - (x < y);
}

/* One more than may be left, so that too many are noticed. */
static int64_t list_length(const espi_head_sample *a) {
    return a->filter.top_k ? a->filter.top_k : a->kept_most + 1;
}

/* Without a filter the logits are kept from the sums to the draw. */
static int64_t kept_of(const espi_head_sample *a) {
    return espi_filters(&a->filter) ? 0 : cpu_min(a->head.n, HEAD_ROWS);
}

size_t ESPI_CPU(espi_head_sample_scratch)(const espi_exec *exec, const espi_head_sample *a) {
    const size_t lists = espi_filters(&a->filter) ? (size_t)(a->head.n * list_length(a)) * sizeof(candidate) : 0;
    return head_scratch(exec, &a->head) + lists + (size_t)exec->threads * kept_bytes(&a->head, kept_of(a));
}

/* How many of the sorted list the filter leaves; sum: of e^(z - largest) over the vocabulary. */
static int64_t leave(const largest_list *l, const espi_head_filter *f, double sum) {
    const float first = l->heap[0].z;
    double reached = 0;
    int64_t left = 0;
    if (f->top_k) sum = 0;
    for (int64_t j = 0; f->top_k && j < l->n; j++) sum += expf(l->heap[j].z - first);
    for (bool enough = false; left < l->n && !enough; left++) {
        reached += expf(l->heap[left].z - first);
        enough = f->top_p > 0 && reached >= f->top_p * sum;
    }
    while (f->min_p > 0 && left > 1 && expf(l->heap[left - 1].z - first) < f->min_p) left--;
    return left;
}

/* A block's filtered draw: one pass over the vocabulary for the sums and the largest entries, then the lists alone. */
static void block_filtered(const espi_exec *exec, const espi_head_sample *a, const block *b) {
    _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
    const int64_t most = list_length(a);
    candidate *heaps = (candidate *)(void *)((char *)exec->scratch + head_scratch(exec, &a->head));
    row_sums sums[HEAD_ROWS];
    largest_list lists[HEAD_ROWS];
    for (int64_t i = 0; i < b->m; i++) {
        sums[i] = (row_sums){.max = -INFINITY};
        lists[i] = (largest_list){heaps + (b->first + i) * most, 0, most};
    }
    for (int64_t col = 0; col < b->head->w.rows; col += HEAD_COLS) {
        const int64_t n = cpu_min(b->head->w.rows - col, HEAD_COLS);
        logits_tile(tile, b, col, n);
        for (int64_t i = 0; i < b->m; i++) {
            add_chunk(&sums[i], tile[i], n);
            list_chunk(&lists[i], tile[i], col, n);
        }
    }
    for (int64_t i = 0; i < b->m; i++) {
        int32_t *kept = a->kept + (b->first + i) * a->kept_most;
        sort_list(&lists[i]);
        const int64_t left = leave(&lists[i], &a->filter, sums[i].sum);
        a->kept_count[b->first + i] = left > a->kept_most ? -1 : (int32_t)left;
        if (left > a->kept_most) continue;
        for (int64_t j = 0; j < left; j++) kept[j] = lists[i].heap[j].id;
        qsort(kept, (size_t)left, sizeof *kept, ascending);
        draw_from_list(a, b, i, &(id_list){kept, left});
    }
}

static void block_sample(const espi_head_sample *a, const block *b, bool greedy) {
    _Alignas(64) float tile[HEAD_ROWS][HEAD_COLS];
    row_sums sums[HEAD_ROWS];
    draw draws[HEAD_ROWS];
    block_sums(sums, b, false);
    for (int64_t i = 0; i < b->m; i++) draws[i] = (draw){.z = greedy ? -INFINITY : NAN};
    for (int64_t col = 0; col < b->head->w.rows; col += HEAD_COLS) {
        const int64_t n = cpu_min(b->head->w.rows - col, HEAD_COLS);
        float(*z)[HEAD_COLS] = place_of(b, tile, col);
        if (!b->kept) logits_tile(z, b, col, n);
        for (int64_t i = 0; i < b->m; i++) {
            if (greedy)
                largest_chunk(&draws[i], z[i], col, n);
            else
                draw_chunk(&draws[i], z[i], col, n, (float)lse_of(&sums[i]), a->uniform[b->first + i]);
        }
    }
    for (int64_t i = 0; i < b->m; i++) {
        a->token[b->first + i] = draws[i].token;
        ((float *)a->lp)[b->first + i] = (float)(draws[i].z - lse_of(&sums[i]));
    }
}

esp_status ESPI_CPU(espi_head_sample)(const espi_exec *exec, const espi_head_sample *a) {
    espi_head head = a->head;
    const bool greedy = head.temperature == 0;
    if (greedy) head.temperature = 1;
    const int threads = head_threads(exec, &head);
    const int64_t rows = block_rows(head.n, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t first = 0; first < head.n; first += rows) {
        const block b = enter_block(exec, &head, first, cpu_min(head.n - first, rows), kept_of(a));
        if (espi_filters(&a->filter))
            block_filtered(exec, a, &b);
        else
            block_sample(a, &b, greedy);
    }
    return ESP_OK;
}
