/* esp_bench_dense: what is not an expert, in the shapes and under the names of public peers' tables, beside the roofs of this machine measured
 * between the calls.  A number is a median over rounds; each round times every case once, and the roofs. */
#include "core/status.h"
#include "espalier/quant.h"
#include "kernels/backend.h"
#include "kernels/plain.h"
#include "measure.h"
#include "roof.h"

#include <jansson.h>
#include <math.h>

enum { HEADS = 32, KV_HEADS = 4, DIM = 128, HIDDEN = 2048, VOCAB = 151936, HEAD_ROWS = 512, PROJECTIONS = 4, MOST = 16 };

/* A call, and what it is to be measured by: useful floating-point operations, bytes or weights. */
typedef struct dense_case {
    const char *section, *shape, *what;
    int tokens;
    double amount;
    const char *unit; /* of amount a second, in 1e9 */
    esp_status (*run)(struct dense_case *c);
    void *data;
    size_t scratch; /* largest of its ops */
    double seconds[MAX_ROUNDS];
} dense_case;

static const espi_backend *backend;
static int threads = 1;
static const char *commit, *part; /* of the sources; what --only said, or NULL */

static uint16_t *halves(size_t n, float scale) {
    uint16_t *x = allocate(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = espi_bf16_bits(scale * noise(i));
    return x;
}

/* One op, its scratch and the count of it. */
#define RUN(op, args)                                                                                                                      \
    do {                                                                                                                                   \
        espi_exec exec = {.threads = threads};                                                                                             \
        const size_t bytes = backend->op.scratch ? backend->op.scratch(&exec, args) : 0;                                                   \
        if (bytes > c->scratch) c->scratch = bytes;                                                                                        \
        exec.scratch = room(bytes);                                                                                                        \
        ESPI_TRY(backend->op.run(&exec, args));                                                                                            \
    } while (0)

typedef struct attention_data {
    espi_attention_fwd forward;
    espi_attention_bwd backward;
    int32_t cu[2], zero, length;
} attention_data;

static esp_status run_attention(dense_case *c) {
    const attention_data *d = c->data;
    RUN(attention_fwd, &d->forward);
    RUN(attention_bwd, &d->backward);
    return ESP_OK;
}

static void make_attention(dense_case *c, int tokens) {
    const size_t wide = (size_t)tokens * HEADS * DIM, narrow = (size_t)tokens * KV_HEADS * DIM;
    attention_data *d = allocate(sizeof *d);
    *d = (attention_data){.cu = {0, tokens}, .length = tokens};
    d->forward = (espi_attention_fwd){.out = floats(wide, 0),
                                      .lse = floats((size_t)tokens * HEADS, 0),
                                      .q = floats(wide, 2),
                                      .k = floats(narrow, 2),
                                      .v = floats(narrow, 2),
                                      .heads = HEADS,
                                      .kv_heads = KV_HEADS,
                                      .head_dim = DIM,
                                      .scale = 1 / sqrt(DIM)};
    d->forward.spans = (espi_spans){.cu_q = d->cu, .k_start = &d->zero, .k_len = &d->length, .n_seqs = 1, .tokens = tokens};
    const espi_attention_fwd *f = &d->forward;
    d->backward = (espi_attention_bwd){.d_q = floats(wide, 0),
                                       .d_k = floats(narrow, 0),
                                       .d_v = floats(narrow, 0),
                                       .d_out = floats(wide, 2),
                                       .q = f->q,
                                       .k = f->k,
                                       .v = f->v,
                                       .out = f->out,
                                       .lse = f->lse,
                                       .spans = f->spans,
                                       .heads = HEADS,
                                       .kv_heads = KV_HEADS,
                                       .head_dim = DIM,
                                       .scale = f->scale};
    *c = (dense_case){.section = "attention",
                      .shape = "32/4 x 128 causal",
                      .what = "fwd+bwd",
                      .tokens = tokens,
                      .unit = "gflops",
                      .amount = 3.5 * 4 * tokens * (double)tokens * DIM * HEADS / 2,
                      .run = run_attention,
                      .data = d};
}

typedef struct projections_data {
    espi_linear_fwd forward[PROJECTIONS];
    espi_linear_bwd backward[PROJECTIONS];
} projections_data;

static esp_status run_projections(dense_case *c) {
    const projections_data *d = c->data;
    for (int i = 0; i < PROJECTIONS; i++) {
        RUN(linear_fwd, &d->forward[i]);
        RUN(linear_bwd, &d->backward[i]);
    }
    return ESP_OK;
}

static void make_projections(dense_case *c, int tokens) {
    static const int64_t sizes[PROJECTIONS][2] = {{4096, HIDDEN}, {512, HIDDEN}, {512, HIDDEN}, {HIDDEN, 4096}};
    projections_data *d = allocate(sizeof *d);
    *c = (dense_case){.section = "attention",
                      .shape = "q k v o projections",
                      .what = "fwd+dX",
                      .tokens = tokens,
                      .unit = "gflops",
                      .run = run_projections,
                      .data = d};
    for (int i = 0; i < PROJECTIONS; i++) {
        const int64_t out = sizes[i][0], in = sizes[i][1];
        const espi_mat w = {floats((size_t)(out * in), 0.03f), ESP_F32, out, in};
        const size_t x = (size_t)(tokens * in), y = (size_t)(tokens * out);
        d->forward[i] = (espi_linear_fwd){.y = floats(y, 0), .x = floats(x, 1), .w = w, .tokens = tokens};
        d->backward[i] = (espi_linear_bwd){.d_x = floats(x, 0), .d_y = floats(y, 1), .x = d->forward[i].x, .w = w, .tokens = tokens};
        c->amount += 4.0 * tokens * (double)(out * in);
    }
}

static esp_status coefficients(void *user, int64_t first, int64_t count) {
    float *g = user;
    for (int64_t i = first; i < first + count; i++) g[i] = -1;
    return ESP_OK;
}

static esp_status run_head(dense_case *c) {
    RUN(head_fused, (const espi_head_fused *)c->data);
    return ESP_OK;
}

static void make_head(dense_case *c) {
    int32_t *rows = allocate(HEAD_ROWS * sizeof *rows), *target = allocate(HEAD_ROWS * sizeof *target);
    for (int i = 0; i < HEAD_ROWS; i++) {
        rows[i] = i;
        target[i] = (int32_t)(7919 * i % VOCAB);
    }
    espi_head_fused *a = allocate(sizeof *a);
    const size_t n = HEAD_ROWS, wide = n * HIDDEN;
    *a = (espi_head_fused){.head = {.hidden = floats(wide, 1.7f),
                                    .rows = rows,
                                    .target = target,
                                    .n = HEAD_ROWS,
                                    .temperature = 1,
                                    .w = {halves((size_t)VOCAB * HIDDEN, 0.034f), ESP_BF16, VOCAB, HIDDEN},
                                    .logit_scale = 1},
                           .lp = floats(n, 0),
                           .entropy = floats(n, 0),
                           .lse = floats(n, 0),
                           .g = floats(n, 0),
                           .d_hidden = floats(wide, 0),
                           .coef = coefficients};
    a->coef_user = a->g;
    *c = (dense_case){.section = "head",
                      .shape = "512x151936x2048",
                      .what = "fwd+bwd",
                      .tokens = HEAD_ROWS,
                      .unit = "gflops",
                      .amount = 4.0 * HEAD_ROWS * (double)VOCAB * HIDDEN,
                      .run = run_head,
                      .data = a};
}

static esp_status run_draw(dense_case *c) {
    RUN(head_sample, (const espi_head_sample *)c->data);
    return ESP_OK;
}

/* What a step of decoding does with the head: reads all of it for a few rows. */
static void make_draw(dense_case *c, int rows, const espi_head *head) {
    static double uniform[HEAD_ROWS];
    espi_head_sample *a = allocate(sizeof *a);
    *a = (espi_head_sample){.head = *head, .token = allocate(HEAD_ROWS * sizeof(int32_t)), .lp = floats(HEAD_ROWS, 0), .uniform = uniform};
    a->head.n = rows;
    for (int i = 0; i < rows; i++) uniform[i] = 0.5;
    *c = (dense_case){.section = "head",
                      .shape = "151936x2048",
                      .what = "draw",
                      .tokens = rows,
                      .unit = "gbs",
                      .amount = 2.0 * VOCAB * HIDDEN,
                      .run = run_draw,
                      .data = a};
}

#define ADAM_SETTINGS .step = 3, .lr = 1e-3, .beta1 = 0.9, .beta2 = 0.999, .eps = 1e-8, .weight_decay = 0.01, .grad_scale = 1

static esp_status run_adamw(dense_case *c) {
    RUN(adamw, (const espi_adamw *)c->data);
    return ESP_OK;
}
static void make_adamw(dense_case *c) {
    const int64_t n = 13107200;
    espi_adamw *a = allocate(sizeof *a);
    *a = (espi_adamw){
        .p = floats((size_t)n, 1), .m = floats((size_t)n, 0), .v = floats((size_t)n, 0), .g = floats((size_t)n, 1), .n = n, ADAM_SETTINGS};
    *c = (dense_case){
        .section = "adamw", .shape = "13.1 M fp32", .what = "step", .unit = "gbs", .amount = 28.0 * (double)n, .run = run_adamw, .data = a};
}

static esp_status run_adamw8(dense_case *c) {
    RUN(adamw8, (const espi_adamw8 *)c->data);
    return ESP_OK;
}
static void make_adamw8(dense_case *c) {
    const int64_t n = 13107200;
    espi_adamw8 *a = allocate(sizeof *a);
    float *maps = allocate(512 * sizeof *maps);
    for (int i = 0; i < 512; i++) maps[i] = i < 256 ? (float)(i - 127) / 128 : (float)(i - 256) / 255;
    *a = (espi_adamw8){.p = floats((size_t)n, 1),
                       .state1 = allocate((size_t)n),
                       .state2 = allocate((size_t)n),
                       .absmax1 = floats((size_t)n / 256, 0),
                       .absmax2 = floats((size_t)n / 256, 0),
                       .g = floats((size_t)n, 1),
                       .map1 = maps,
                       .map2 = maps + 256,
                       .n = n,
                       ADAM_SETTINGS};
    memset(a->state1, 0, (size_t)n);
    memset(a->state2, 0, (size_t)n);
    *c = (dense_case){.section = "adamw",
                      .shape = "13.1 M fp32",
                      .what = "step, 8-bit moments",
                      .unit = "gbs",
                      .amount = 16.0 * (double)n,
                      .run = run_adamw8,
                      .data = a};
}

typedef struct quant_data {
    uint8_t *codes;
    float *absmax, *values;
    const void *x;
    esp_dtype dtype;
    int64_t n;
} quant_data;

static esp_status run_quantise(dense_case *c) {
    const quant_data *d = c->data;
    return esp_quantize(d->codes, d->absmax, d->x, d->dtype, d->n, 64, ESP_NF4);
}
static void make_quantise(dense_case *c, esp_dtype dtype) {
    quant_data *d = allocate(sizeof *d);
    const size_t n = 5120 * 2048;
    *d = (quant_data){.codes = allocate(n / 2), .absmax = floats(n / 64, 0), .dtype = dtype, .n = (int64_t)n};
    d->x = dtype == ESP_F32 ? (void *)floats(n, 0.02f) : (void *)halves(n, 0.02f);
    *c = (dense_case){.section = "quant",
                      .shape = "10.5 M",
                      .what = dtype == ESP_F32 ? "NF4 quantise, from fp32" : "NF4 quantise, from bf16",
                      .unit = "gws",
                      .amount = (double)n,
                      .run = run_quantise,
                      .data = d};
}

/* ---- the program ---- */

static int make_cases(dense_case *cases, const char *only) {
    int n = 0;
    const bool all = !only;
    if (all || strcmp(only, "attention") == 0) {
        make_attention(&cases[n++], 512);
        make_attention(&cases[n++], 2048);
    }
    if (all || strcmp(only, "projections") == 0) make_projections(&cases[n++], 512);
    if (all || strcmp(only, "head") == 0) {
        make_head(&cases[n++]);
        const espi_head *head = &((const espi_head_fused *)cases[n - 1].data)->head;
        make_draw(&cases[n++], 1, head);
        make_draw(&cases[n++], 8, head);
    }
    if (all || strcmp(only, "adamw") == 0) {
        make_adamw(&cases[n++]);
        make_adamw8(&cases[n++]);
    }
    if (all || strcmp(only, "quant") == 0) {
        make_quantise(&cases[n++], ESP_F32);
        make_quantise(&cases[n++], ESP_BF16);
    }
    return n;
}

static void write_json(const char *path, const dense_case *cases, int n, int rounds, double fma, double dot, double copy, double reading) {
    char date[LINE];
    date_now(date);
    json_t *rows = json_array();
    for (int i = 0; i < n; i++) {
        const dense_case *c = &cases[i];
        const double seconds = median(c->seconds, rounds);
        json_t *row = json_pack("{s:s, s:s, s:s, s:s, s:i, s:i, s:f, s:f, s:I}", "section", c->section, "shape", c->shape, "what", c->what,
                                "peer", "espalier", "threads", threads, "windows", rounds, "ms", 1e3 * seconds, c->unit,
                                1e-9 * c->amount / seconds, "scratch_bytes", (json_int_t)c->scratch);
        if (c->tokens) json_object_set_new(row, "T", json_integer(c->tokens));
        json_array_append_new(rows, row);
    }
    json_t *root =
        json_pack("{s:s, s:s*, s:s, s:s, s:s, s:s, s:s, s:{s:f, s:f, s:f, s:f}, s:o}", "command", "esp_bench_dense", "only", part, "commit",
                  commit, "compiler", ESP_COMPILER, "cpu", cpu_name(), "date", date, "backend", backend->name, "roof", "fp32_fma_gflops",
                  1e-9 * fma, "bf16_dot_gflops", 1e-9 * dot, "dram_copy_gbs", 1e-9 * copy, "dram_read_gbs", 1e-9 * reading, "rows", rows);
    if (!root || json_dump_file(root, path, JSON_INDENT(1)) != 0) die(path);
    json_decref(root);
}

int main(int argc, char **argv) {
    static dense_case cases[MOST];
    static double fma[MAX_ROUNDS], dot[MAX_ROUNDS], copy[MAX_ROUNDS], reading[MAX_ROUNDS];
    const bench_options asked = bench_read(argc, argv, "esp_bench_dense", 3, "attention|projections|head|adamw|quant");
    const int rounds = asked.rounds;
    const char *json = asked.json;
    backend = asked.backend;
    threads = asked.threads;
    commit = asked.commit;
    part = asked.only;
    const int n = make_cases(cases, asked.only);
    for (int round = -1; round < rounds; round++) { /* the first round warms up */
        const int at = round < 0 ? 0 : round;
        fma[at] = fma_roof();
        dot[at] = dot_roof();
        copy[at] = copy_roof();
        reading[at] = read_roof(0, 1);
        for (int i = 0; i < n; i++) {
            const double start = now();
            if (cases[i].run(&cases[i]) != ESP_OK) die(cases[i].section);
            cases[i].seconds[at] = now() - start;
        }
    }
    const double f = median(fma, rounds), d = median(dot, rounds), m = median(copy, rounds), r = median(reading, rounds);
    printf("%s, %d threads; one thread: %.1f GFLOP/s f32, %.1f bf16, %.1f GB/s copy, %.1f read\n", backend->name, threads, 1e-9 * f,
           1e-9 * d, 1e-9 * m, 1e-9 * r);
    for (int i = 0; i < n; i++) {
        const dense_case *c = &cases[i];
        const double seconds = median(c->seconds, rounds);
        printf("%-10s %-20s %-24s %5d %9.2f ms %8.2f %s, scratch %.1f MB\n", c->section, c->shape, c->what, c->tokens, 1e3 * seconds,
               1e-9 * c->amount / seconds, c->unit, 1e-6 * (double)c->scratch);
    }
    if (json) write_json(json, cases, n, rounds, f, d, m, r);
    return 0;
}
