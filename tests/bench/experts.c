/* esp_bench_experts: 4-bit experts in the shapes and under the names of public peers' tables, beside the roofs of this machine measured
 * between the calls.  One product of an expert, forward and backward; a layer's forward; a layer's step with a branch on every expert; a layer
 * by one thread, on another processor each round, and by all, in turn.  A number is a median over rounds; each round times every case once,
 * and the roofs, of one thread and of all at once.  One thread of tiles goes to a quiet core before each case (quiet.h) and measures their
 * roof before and after it. */
#define _GNU_SOURCE /* sched_setaffinity */
#include "measure.h"
#include "onednn.h"
#include "quiet.h"

#include <jansson.h>
#include <math.h>
#include <omp.h>
#include <sched.h>

enum { EXPERTS_COLD = 64, PEERS_COLD = 16, RANK = 16, MOST = 96, SETS = 16, MOST_THREADS = 256 };

typedef struct layer_shape {
    const char *name;
    int64_t hidden, width, experts, top_k;
    bool interleaved;
    esp_qformat format;
} layer_shape;
static const layer_shape qwen3 = {"qwen3-30b-a3b", 2048, 768, 128, 8, false, ESP_NF4};
static const layer_shape gpt_oss = {"gpt-oss-20b", 2880, 2880, 32, 4, true, ESP_MXFP4};

/* A call that is timed `repeat` times. */
typedef struct expert_case {
    const char *section, *shape, *what, *regime, *format, *peer; /* peer: NULL: espalier */
    int64_t rows;                                                /* M of a product, T of a layer */
    double flops, bytes;
    int threads, repeat, calls;
    void (*run)(struct expert_case *c);
    void *data;
    size_t scratch, arrays;
    double seconds[MAX_ROUNDS], tiles[MAX_ROUNDS]; /* the roof of tiles beside it; 0: none */
    int quiet;                                     /* rounds on a core of its own */
} expert_case;

static const espi_backend *backend;
static int threads = 1;
static const char *commit, *part; /* of the sources; what --only said, or NULL */

static bool scales(void) {
    return part && strcmp(part, "scaling") == 0;
}

#define RUN(op, args)                                                                                                                      \
    do {                                                                                                                                   \
        espi_exec exec = {.threads = c->threads};                                                                                          \
        const size_t bytes = backend->op.scratch ? backend->op.scratch(&exec, args) : 0;                                                   \
        if (bytes > c->scratch) c->scratch = bytes;                                                                                        \
        exec.scratch = room(bytes);                                                                                                        \
        if (backend->op.run(&exec, args) != ESP_OK) die(#op);                                                                              \
    } while (0)

/* ---- weights ---- */

static uint8_t *bytes_of_noise(size_t n) {
    uint8_t *x = allocate(n);
    uint64_t state = 1;
    for (size_t i = 0; i < n; i++) x[i] = (uint8_t)((state = state * 6364136223846793005u + 1442695040888963407u) >> 56);
    return x;
}

static const float *table(esp_qformat format) {
    static const float nf4[16] = {-1,    -0.696F, -0.525F, -0.395F, -0.284F, -0.185F, -0.091F, 0,
                                  0.08F, 0.161F,  0.246F,  0.338F,  0.441F,  0.563F,  0.723F,  1};
    static const float mxfp4[16] = {0, 0.5F, 1, 1.5F, 2, 3, 4, 6, -0.0F, -0.5F, -1, -1.5F, -2, -3, -4, -6};
    return format == ESP_MXFP4 ? mxfp4 : nf4;
}

/* Codes at random, in the form that the backend wants. */
static espi_stack make_stack(esp_qformat format, int64_t experts, int64_t rows, int64_t cols, int parts) {
    const int64_t n = rows / parts * cols, block = format == ESP_MXFP4 ? ESPI_MXBLOCK : ESPI_QBLOCK;
    espi_stack one = {.format = format, .experts = 1, .rows = rows, .cols = cols, .parts = parts, .lut = table(format)};
    one.part_bytes = (size_t)n / 2;
    one.part_blocks = n / block;
    const size_t packed = backend->packed_bytes ? backend->packed_bytes(&one) : 0, blocks = (size_t)(parts * one.part_blocks);
    const size_t copies = packed ? 1 : (size_t)experts;
    one.data = bytes_of_noise(copies * (size_t)parts * one.part_bytes);
    if (format == ESP_MXFP4) {
        uint8_t *scales = allocate(copies * blocks);
        for (size_t i = 0; i < copies * blocks; i++) scales[i] = (uint8_t)(119 + i % 4);
        one.scales = scales;
    } else {
        float *absmax = floats(copies * blocks, 0.02F);
        for (size_t i = 0; i < copies * blocks; i++) absmax[i] = fabsf(absmax[i]) + 0.02F;
        one.absmax = absmax;
    }
    espi_stack all = one;
    all.experts = experts;
    if (!packed) return all;
    uint8_t *to = allocate((size_t)experts * packed);
    const espi_exec exec = {.threads = threads};
    if (backend->pack(&exec, to, &one) != ESP_OK) die("pack");
    for (int64_t e = 1; e < experts; e++) memcpy(to + (size_t)e * packed, to, packed);
    all.packed = to;
    all.data = NULL;
    all.absmax = NULL;
    all.scales = NULL;
    return all;
}

static double stack_bytes(const espi_stack *w) {
    const double per_code = w->format == ESP_MXFP4 ? 0.5 + 1.0 / ESPI_MXBLOCK : 0.5 + (double)sizeof(float) / ESPI_QBLOCK;
    return (double)(w->rows * w->cols) * per_code;
}

/* ---- one product ---- */

typedef struct product {
    espi_stack w;
    espi_routing routing;
    int32_t offsets[EXPERTS_COLD + 1], *row_token;
    float *x, *y, *weight;
    bool warm, backward;
} product;

static void run_product(expert_case *c) {
    product *d = c->data;
    const int64_t e = d->warm ? 0 : c->calls % EXPERTS_COLD;
    for (int64_t i = 0; i <= EXPERTS_COLD; i++) d->offsets[i] = i > e ? (int32_t)c->rows : 0;
    if (d->backward)
        RUN(gate_up_bwd, (&(espi_gate_up_bwd){.d_rows = d->x, .d_gu = d->y, .w = d->w, .routing = d->routing}));
    else
        RUN(down_fwd, (&(espi_down_fwd){.y = d->y, .act = d->x, .w = d->w, .routing = d->routing}));
}

static void make_product(expert_case *c, const espi_stack *w, int64_t rows, bool backward, bool warm) {
    product *d = allocate(sizeof *d);
    *d = (product){.w = *w, .warm = warm, .backward = backward};
    d->row_token = allocate((size_t)rows * sizeof(int32_t));
    for (int32_t i = 0; i < rows; i++) d->row_token[i] = i;
    d->x = floats((size_t)(rows * w->cols), 1);
    d->y = floats((size_t)(rows * w->rows), 1);
    d->weight = floats((size_t)rows, 1);
    d->routing = (espi_routing){.tokens = rows,
                                .experts = EXPERTS_COLD,
                                .top_k = 1,
                                .offsets = d->offsets,
                                .row_token = d->row_token,
                                .slot_row = d->row_token,
                                .row_weight = d->weight};
    *c = (expert_case){.section = "expert",
                       .shape = "1536x2048",
                       .what = backward ? "dX" : "fwd",
                       .regime = warm ? "warm" : "cold",
                       .format = w->format == ESP_MXFP4 ? "MXFP4" : "NF4",
                       .rows = rows,
                       .flops = 2.0 * (double)(rows * w->rows * w->cols),
                       .bytes = stack_bytes(w),
                       .threads = threads,
                       .repeat = rows < 8     ? 96
                                 : rows < 64  ? 32
                                 : rows < 256 ? 4
                                              : 1,
                       .run = run_product,
                       .data = d};
}

static void run_onednn(expert_case *c) {
    onednn_run(c->data, c->calls % PEERS_COLD);
}

/* The peer takes bf16 and gives bf16, so it has nothing to convert; or floats, as espalier does. */
static bool make_onednn(expert_case *c, const expert_case *like, bool floats) {
    *c = *like;
    c->peer = floats ? "oneDNN, packed, rows of floats" : "oneDNN, packed";
    c->format = "bf16";
    c->bytes = 0;
    c->run = run_onednn;
    c->data = onednn_make(like->rows, 1536, 2048, PEERS_COLD, threads, floats);
    return c->data != NULL;
}

/* ---- a layer ---- */

typedef struct layer {
    const layer_shape *shape;
    espi_stack gate_up, down;
    espi_lora lora_gate_up, lora_down;
} layer;

typedef struct batch {
    const layer *of;
    int32_t *idx; /* SETS routings */
    int sets;
    espi_dispatch dispatch;
    espi_routing routing;
    float *x, *out, *d_out, *gu, *act, *y, *u_gu, *u_dn, *d_gu, *d_rows, *d_x, *d_row_weight, *d_weight;
    bool train;
} batch;

static espi_lora branch(int64_t experts, int64_t in, int64_t out) {
    const size_t a = (size_t)(experts * RANK * in), b = (size_t)(experts * RANK * out);
    return (espi_lora){floats(a, 0.02F), floats(b, 0.02F), floats(a, 0), floats(b, 0), RANK, 1};
}

static layer make_layer(const layer_shape *s, bool train) {
    layer l = {.shape = s};
    l.gate_up = make_stack(s->format, s->experts, 2 * s->width, s->hidden, s->interleaved ? 1 : 2);
    l.down = make_stack(s->format, s->experts, s->hidden, s->width, 1);
    if (!train) return l;
    l.lora_gate_up = branch(s->experts, s->hidden, 2 * s->width);
    l.lora_down = branch(s->experts, s->width, s->hidden);
    return l;
}

/* The experts with the largest popularity + noise, ascending: rows per expert vary as prose varies them (coefficient of variation 0.7). With
 * `zipf`, popularity falls as 1 / rank; with one token, every set has experts of its own. */
static void choose(int32_t *idx, const layer_shape *s, int64_t tokens, int set, bool zipf) {
    for (int64_t t = 0; t < tokens; t++) {
        bool taken[256] = {false};
        for (int64_t k = 0; k < s->top_k; k++) {
            int64_t best = -1;
            double best_score = 0;
            for (int64_t e = 0; e < s->experts; e++) {
                const uint64_t at = (uint64_t)((t + 1000 * set) * s->experts + e);
                const double gumbel = -log(-log(0.5 * noise(at) + 0.5 + 1e-9));
                double normal = 0;
                for (uint64_t i = 0; i < 12; i++) normal += 0.5 * noise((uint64_t)e * 12 + i + 7777777);
                const double score = gumbel + (zipf ? -log((double)(1 + e * 37 % s->experts)) : 0.65 * normal);
                if (!taken[e] && (best < 0 || score > best_score)) {
                    best = e;
                    best_score = score;
                }
            }
            if (tokens == 1) best = (set * s->top_k + k) % s->experts;
            taken[best] = true;
        }
        for (int64_t e = 0, k = 0; e < s->experts; e++)
            if (taken[e]) idx[t * s->top_k + k++] = (int32_t)e;
    }
}

static void run_layer(expert_case *c) {
    batch *b = c->data;
    const layer *l = b->of;
    const layer_shape *s = l->shape;
    const espi_glu glu = {.interleaved = s->interleaved};
    espi_lora gate_up = l->lora_gate_up, down = l->lora_down;
    if (!b->train) gate_up.r = down.r = 0;
    b->dispatch.idx = b->idx + c->calls % b->sets * (c->rows * s->top_k);
    RUN(dispatch, &b->dispatch);
    RUN(gate_up_fwd, (&(espi_gate_up_fwd){b->gu, b->act, b->u_gu, b->x, l->gate_up, NULL, gate_up, b->routing, glu}));
    RUN(down_fwd, (&(espi_down_fwd){b->y, b->u_dn, b->act, l->down, NULL, down, b->routing}));
    RUN(combine_fwd, (&(espi_combine_fwd){b->out, b->y, NULL, b->routing, s->hidden}));
    if (!b->train) return;
    RUN(down_bwd, (&(espi_down_bwd){b->d_gu, b->d_row_weight, b->d_out, b->gu, b->u_dn, l->down, NULL, down, b->routing, glu}));
    RUN(gate_up_bwd, (&(espi_gate_up_bwd){b->d_rows, b->d_gu, b->x, b->u_gu, l->gate_up, gate_up, b->routing}));
    RUN(combine_bwd, (&(espi_combine_bwd){b->d_x, b->d_weight, b->d_rows, b->d_row_weight, b->routing, s->hidden}));
}

static float *array(expert_case *c, int64_t n) {
    c->arrays += (size_t)n * sizeof(float);
    return floats((size_t)n, 0);
}

/* Arrays that a step has in turn lie over each other, as in an arena: y and act of the forward, gradients of the backward. */
static void make_layer_case(expert_case *c, const layer *l, int64_t tokens, bool train, bool zipf) {
    const layer_shape *s = l->shape;
    const int64_t slots = tokens * s->top_k, h = s->hidden, w = s->width;
    batch *b = allocate(sizeof *b);
    *b = (batch){.of = l, .train = train, .sets = tokens == 1 ? (int)(s->experts / s->top_k) : 2};
    const double base = 6.0 * (double)(slots * h * w), low = 2.0 * (double)(slots * RANK * (2 * h + 3 * w));
    *c = (expert_case){.section = train ? "train" : "layer",
                       .shape = s->name,
                       .what = train ? "fwd+bwd" : "fwd",
                       .regime = zipf ? "zipf" : NULL,
                       .format = s->format == ESP_MXFP4 ? "MXFP4" : "NF4",
                       .rows = tokens,
                       .flops = train ? 2 * base + 3 * low : base,
                       .threads = threads,
                       .repeat = tokens == 1 ? 32 : 1,
                       .run = run_layer,
                       .data = b};
    b->idx = allocate((size_t)(b->sets * slots) * sizeof(int32_t));
    for (int set = 0; set < b->sets; set++) choose(b->idx + set * slots, s, tokens, set, zipf);
    int32_t *offsets = allocate((size_t)(s->experts + 1) * sizeof(int32_t)), *row_token = allocate((size_t)slots * sizeof(int32_t));
    int32_t *slot_row = allocate((size_t)slots * sizeof(int32_t));
    float *row_weight = array(c, slots), *weight = floats((size_t)slots, 0);
    for (int64_t i = 0; i < slots; i++) weight[i] = 1.0F / (float)s->top_k;
    b->dispatch = (espi_dispatch){offsets, row_token, slot_row, row_weight, NULL, weight, tokens, s->experts, s->top_k};
    b->routing = (espi_routing){tokens, s->experts, s->top_k, offsets, row_token, slot_row, row_weight};
    b->x = floats((size_t)(tokens * h), 1);
    b->d_out = floats((size_t)(tokens * h), 0.1F);
    b->out = array(c, tokens * h);
    b->gu = array(c, slots * 2 * w);
    b->y = array(c, slots * h);
    b->act = array(c, slots * (train ? 2 * w : w));
    if (!train) return;
    b->u_gu = array(c, slots * RANK);
    b->u_dn = array(c, slots * RANK);
    b->d_gu = b->act;
    b->d_rows = b->y;
    b->d_x = array(c, tokens * h);
    b->d_row_weight = array(c, slots);
    b->d_weight = array(c, slots);
}

/* ---- the program ---- */

static int make_cases(expert_case *cases, const char *only) {
    static const int64_t rows[] = {1, 2, 4, 8, 16, 32, 64, 128, 512};
    static layer layers[3];
    int n = 0;
    if (!only || strcmp(only, "expert") == 0) {
        const espi_stack nf4 = make_stack(ESP_NF4, EXPERTS_COLD, 1536, 2048, 1), mxfp4 = make_stack(ESP_MXFP4, EXPERTS_COLD, 1536, 2048, 1);
        for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
            make_product(&cases[n++], &nf4, rows[i], false, false);
            make_product(&cases[n++], &nf4, rows[i], true, false);
            make_product(&cases[n++], &mxfp4, rows[i], false, false);
            make_product(&cases[n++], &mxfp4, rows[i], true, false);
            const expert_case *like = &cases[n - 4];
            n += make_onednn(&cases[n], like, false);
            if (rows[i] >= 64) n += make_onednn(&cases[n], like, true);
            if (rows[i] < 64) make_product(&cases[n++], &nf4, rows[i], false, true);
        }
    }
    if (!only || strcmp(only, "layer") == 0 || strcmp(only, "train") == 0) {
        const bool train = only && strcmp(only, "train") == 0;
        layers[0] = make_layer(&qwen3, !only || train);
        for (int t = 0; t < 3; t++) {
            const int64_t tokens = t == 0 ? 1 : t == 1 ? 64 : 512;
            if (!train) make_layer_case(&cases[n++], &layers[0], tokens, false, false);
            if (t > 0 && (!only || train)) make_layer_case(&cases[n++], &layers[0], tokens, true, false);
        }
        if (!train) make_layer_case(&cases[n++], &layers[0], 512, false, true);
        if (only && strcmp(only, "layer") == 0) make_layer_case(&cases[n++], &layers[0], 4096, false, false);
    }
    if (scales()) {
        layers[2] = make_layer(&qwen3, false);
        for (int64_t tokens = 512; tokens <= 4096; tokens += 4096 - 512) {
            make_layer_case(&cases[n], &layers[2], tokens, false, false);
            cases[n + 1] = cases[n];
            cases[n].threads = 1;
            cases[n + 1].repeat = 4;
            n += 2;
        }
    }
    if (!only || strcmp(only, "gpt-oss") == 0) {
        layers[1] = make_layer(&gpt_oss, true);
        make_layer_case(&cases[n++], &layers[1], 512, false, false);
        make_layer_case(&cases[n++], &layers[1], 512, true, false);
    }
    return n;
}

typedef struct roofs {
    double fma[MAX_ROUNDS], dot[MAX_ROUNDS], tiles[MAX_ROUNDS], zeros[MAX_ROUNDS], read[MAX_ROUNDS];
} roofs;

/* Of so many threads at once, each timed by itself. */
static void measure_roofs(roofs *r, int round, int n) {
    double fma = 0, dot = 0, tiles = 0, zeros = 0, read = 0;
    (void)read_roof(0, n); /* has its memory */
#pragma omp parallel num_threads(n) reduction(+ : fma, dot, tiles, zeros, read)
    {
        fma += fma_roof();
#pragma omp barrier
        dot += dot_roof();
#pragma omp barrier
        tiles += tile_roof(backend, false);
#pragma omp barrier
        zeros += tile_roof(backend, true);
#pragma omp barrier
        read += read_roof(omp_get_thread_num(), n);
    }
    r->fma[round] = fma;
    r->dot[round] = dot;
    r->tiles[round] = tiles;
    r->zeros[round] = zeros;
    r->read[round] = read;
}

static double peak(const roofs *r, int rounds) {
    const double tiles = median(r->tiles, rounds);
    return tiles > 0 ? tiles : median(backend->bf16_products ? r->dot : r->fma, rounds);
}

static json_t *roof_json(const roofs *r, int rounds) {
    return json_pack("{s:f, s:f, s:f, s:f, s:f}", "fp32_fma_gflops", 1e-9 * median(r->fma, rounds), "bf16_dot_gflops",
                     1e-9 * median(r->dot, rounds), "bf16_tiles_gflops", 1e-9 * median(r->tiles, rounds), "bf16_tiles_of_zeros_gflops",
                     1e-9 * median(r->zeros, rounds), "dram_read_gbs", 1e-9 * median(r->read, rounds));
}

/* The median of what the rounds reached of the roof of tiles beside them. */
static double of_tiles(const expert_case *c, int rounds) {
    double of[MAX_ROUNDS];
    for (int i = 0; i < rounds; i++) of[i] = c->flops / c->seconds[i] / c->tiles[i];
    return median(of, rounds);
}

static json_t *each_json(const expert_case *c, int rounds) {
    json_t *each = json_array();
    for (int i = 0; i < rounds; i++) json_array_append_new(each, json_real(1e3 * c->seconds[i]));
    return each;
}

static void write_json(const char *path, const expert_case *cases, int n, int rounds, const roofs *one, const roofs *all) {
    char date[LINE];
    date_now(date);
    json_t *rows = json_array();
    for (int i = 0; i < n; i++) {
        const expert_case *c = &cases[i];
        const double seconds = median(c->seconds, rounds);
        json_t *row = json_pack("{s:s, s:s, s:s, s:I, s:s, s:s, s:i, s:i, s:f, s:f, s:I}", "section", c->section, "shape", c->shape, "what",
                                c->what, strcmp(c->section, "expert") == 0 ? "M" : "T", (json_int_t)c->rows, "peer",
                                c->peer ? c->peer : "espalier", "format", c->format, "threads", c->threads, "windows", rounds, "ms",
                                1e3 * seconds, "gflops", 1e-9 * c->flops / seconds, "scratch_bytes", (json_int_t)c->scratch);
        if (scales()) json_object_set_new(row, "each_ms", each_json(c, rounds));
        if (c->regime) json_object_set_new(row, "regime", json_string(c->regime));
        if (c->bytes > 0) json_object_set_new(row, "gbs", json_real(1e-9 * c->bytes / seconds));
        if (c->tiles[0] > 0) {
            json_object_set_new(row, "bf16_tiles_gflops", json_real(1e-9 * median(c->tiles, rounds)));
            json_object_set_new(row, "of_tiles", json_real(of_tiles(c, rounds)));
            json_object_set_new(row, "quiet_windows", json_integer(c->quiet));
        }
        json_array_append_new(rows, row);
    }
    json_t *root = json_pack("{s:s, s:s*, s:s, s:s, s:s, s:s, s:s, s:o, s:o}", "command", "esp_bench_experts", "only", part, "commit",
                             commit, "compiler", ESP_COMPILER, "cpu", cpu_name(), "date", date, "backend", backend->name, "roof",
                             roof_json(one, rounds), "rows", rows);
    if (root && threads > 1) json_object_set_new(root, "roof_of_all_threads", roof_json(all, rounds));
    if (!root || json_dump_file(root, path, JSON_INDENT(1)) != 0) die(path);
    json_decref(root);
}

static void time_case(expert_case *c, int round) {
    const bool alone = threads == 1 && !c->peer && strstr(backend->name, "amx");
    const bool quiet = alone && settle();
    const double before = alone ? tile_roof(backend, false) : 0, start = now();
    for (int i = 0; i < c->repeat; i++, c->calls++) c->run(c);
    c->seconds[round] = (now() - start) / c->repeat;
    if (round == 0) c->quiet = 0;
    c->quiet += quiet && shared_by() <= QUIET;
    c->tiles[round] = alone ? fmax(before, tile_roof(backend, false)) : 0;
}

static void print_roofs(const char *who, const roofs *r, int rounds) {
    printf("%s: %.1f GFLOP/s f32, %.1f bf16, %.1f tiles (%.1f of zeros), %.1f GB/s read\n", who, 1e-9 * median(r->fma, rounds),
           1e-9 * median(r->dot, rounds), 1e-9 * median(r->tiles, rounds), 1e-9 * median(r->zeros, rounds), 1e-9 * median(r->read, rounds));
}

/* The processors of all threads, to which one thread goes in turn: others may disturb any of them. */
typedef struct places {
    int of_thread[MOST_THREADS];
    cpu_set_t before;
} places;

static void look_around(places *p) {
    if (threads < 2 || threads > MOST_THREADS) die("scaling takes 2 to 256 threads: --threads");
    if (sched_getaffinity(0, sizeof p->before, &p->before) != 0) die("sched_getaffinity");
#pragma omp parallel num_threads(threads)
    p->of_thread[omp_get_thread_num()] = sched_getcpu();
}
static void move(const places *p, int round) {
    if (!go_to(p->of_thread[round % threads])) die("sched_setaffinity");
}
static void move_back(const places *p) {
    if (sched_setaffinity(0, sizeof p->before, &p->before) != 0) die("sched_setaffinity");
}

int main(int argc, char **argv) {
    static expert_case cases[MOST];
    static roofs one, all;
    static places here;
    const bench_options asked = bench_read(argc, argv, "esp_bench_experts", 5, "expert|layer|train|scaling|gpt-oss");
    const int rounds = asked.rounds;
    const char *json = asked.json;
    backend = asked.backend;
    threads = asked.threads;
    commit = asked.commit;
    part = asked.only;
    const int n = make_cases(cases, asked.only);
    if (scales()) look_around(&here);
    for (int round = -1; round < rounds; round++) { /* the first round warms up */
        const int at = round < 0 ? 0 : round;
        const bool moves = scales();
        if (moves) move(&here, at);
        measure_roofs(&one, at, 1);
        for (int i = 0; i < n; i++)
            if (!moves || cases[i].threads == 1) time_case(&cases[i], at);
        if (moves) move_back(&here);
        if (threads > 1) measure_roofs(&all, at, threads);
        for (int i = 0; i < n; i++)
            if (moves && cases[i].threads > 1) time_case(&cases[i], at);
    }
    printf("%s, %d threads, %s\n", backend->name, threads, cpu_name());
    print_roofs("one thread", &one, rounds);
    if (threads > 1) print_roofs("all at once", &all, rounds);
    for (int i = 0; i < n; i++) {
        const expert_case *c = &cases[i];
        const double seconds = median(c->seconds, rounds), rate = c->flops / seconds;
        printf("%-7s %-14s %-8s %-5s %-5s %5lld %10.3f ms %8.1f GFLOP/s %5.1f %% of peak", c->section, c->shape, c->what, c->format,
               c->regime ? c->regime : "", (long long)c->rows, 1e3 * seconds, 1e-9 * rate,
               100 * (c->tiles[0] > 0 ? of_tiles(c, rounds) : rate / peak(c->threads > 1 ? &all : &one, rounds)));
        if (c->tiles[0] > 0) printf(" (%d of %d windows quiet)", c->quiet, rounds);
        if (c->peer) printf(" %s", c->peer);
        if (c->bytes > 0) printf(" %6.1f GB/s", 1e-9 * c->bytes / seconds);
        if (c->arrays) printf(", %.3f GB", 1e-9 * (double)(c->scratch + c->arrays));
        if (scales() && c->threads > 1) printf(", %.2f times as fast as one thread", median(c[-1].seconds, rounds) / seconds);
        printf("\n");
    }
    if (json) write_json(json, cases, n, rounds, &one, &all);
    return 0;
}
