/* esp_bench: time of every op over a few shapes, beside the roof of this machine (multiply-adds, and copying) measured in the same run.
 * Rounds are interleaved: each round times every case once, and the figures are medians over the rounds. */
#include "cases.h"
#include "espalier/espalier.h"
#include "measure.h"

#include <getopt.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_CASES = 256 };

static const shape shapes[] = {
    {"demo, training step", 1800, 128, 8, 2, 64, 8, 64, 4, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_F32, .renormalise = true},
    {"demo, decode step", 128, 128, 8, 2, 64, 8, 64, 4, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_F32, .renormalise = true},
    {"Qwen3-30B-A3B layer, 16 of 128 experts", 128, 2048, 16, 8, 768, 16, 4096, 32, 4, 128, ROUTE_RANDOM, ESP_NF4, ESP_F32,
     .renormalise = true},
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

typedef struct bench_case {
    const char *op, *shape;
    double work; /* multiply-adds, or bytes moved when `memory` */
    bool memory;
    problem problem;
    espi_exec exec;
    double seconds[MAX_ROUNDS], median;
} bench_case;

#define ESPI_OP(name, args)                                                                                                                \
    static esp_status call_##name(const espi_backend *b, const espi_exec *exec, const any_args *a) {                                       \
        return b->name.run(exec, &a->name);                                                                                                \
    }                                                                                                                                      \
    static size_t scratch_##name(const espi_backend *b, const espi_exec *exec, const any_args *a) {                                        \
        return b->name.scratch ? b->name.scratch(exec, &a->name) : 0;                                                                      \
    }                                                                                                                                      \
    static bool takes_##name(const espi_backend *b, const any_args *a) {                                                                   \
        return b->name.run && !(b->name.refuse && b->name.refuse(&a->name));                                                               \
    }
#include "kernels/ops.def"
#undef ESPI_OP

static const struct {
    esp_status (*call)(const espi_backend *, const espi_exec *, const any_args *);
    size_t (*scratch)(const espi_backend *, const espi_exec *, const any_args *);
    bool (*takes)(const espi_backend *, const any_args *);
} ops[ESPI_OP_COUNT] = {
#define ESPI_OP(name, args) {call_##name, scratch_##name, takes_##name},
#include "kernels/ops.def"
#undef ESPI_OP
};

/* Multiply-adds of the matrix products of one call, or 0: the op moves memory. */
static double products_of(espi_op_id op, const any_args *a, const shape *s) {
    const double t = (double)s->tokens, slots = t * (double)s->top_k, r = (double)s->rank;
    const double gate_up = 2.0 * (double)s->width * (double)s->hidden, down = (double)s->width * (double)s->hidden;
    const double head = (double)a->head_stats.head.n * (double)s->vocab * (double)s->hidden; /* all five begin with an espi_head */
    switch (op) {
    case ESPI_OP_linear_fwd: {
        const espi_mat w = a->linear_fwd.w;
        return t * ((double)(w.rows * w.cols) + r * (double)(w.rows + w.cols));
    }
    case ESPI_OP_linear_bwd: {
        const espi_mat w = a->linear_bwd.w;
        return t * ((double)(w.rows * w.cols) + 2 * r * (double)(w.rows + w.cols));
    }
    case ESPI_OP_router_fwd:
    case ESPI_OP_router_bwd:
        return t * (double)(s->experts * s->hidden);
    case ESPI_OP_gate_up_fwd:
        return slots * (gate_up + r * (double)(2 * s->width + s->hidden));
    case ESPI_OP_gate_up_bwd:
        return slots * (gate_up + 2 * r * (double)(2 * s->width + s->hidden));
    case ESPI_OP_down_fwd:
        return slots * (down + r * (double)(s->width + s->hidden));
    case ESPI_OP_down_bwd:
        return slots * (down + 2 * r * (double)(s->width + s->hidden));
    case ESPI_OP_head_stats:
    case ESPI_OP_head_logits:
        return head;
    case ESPI_OP_head_sample:
    case ESPI_OP_head_grad:
        return 2 * head;
    case ESPI_OP_head_fused:
        return 3 * head;
    default:
        return 0;
    }
}

static double bytes_of(const problem *p) {
    double bytes = 0;
    for (int i = 0; i < p->n_fields; i++) {
        const double size = (double)p->fields[i].count * (double)esp_dtype_size(p->fields[i].dtype);
        bytes += p->fields[i].role == ROLE_INOUT ? 2 * size : size;
    }
    return bytes;
}

static double run_once(bench_case *c, const espi_backend *backend) {
    c->problem.coef_next = 0; /* head_fused: the callback counts rows */
    const double start = now();
    if (ops[c->problem.op].call(backend, &c->exec, &c->problem.args) != ESP_OK) die(c->op);
    return now() - start;
}

/* Short calls are repeated until the clock's grain does not matter. */
static double run_round(bench_case *c, const espi_backend *backend) {
    const double first = run_once(c, backend);
    if (first > 1e-3) return first;
    const int repeats = (int)(1e-3 / (first + 1e-7)) + 1;
    double total = 0;
    for (int i = 0; i < repeats; i++) total += run_once(c, backend);
    return total / repeats;
}

#if defined(__x86_64__)
#define ROOF_TARGET(flags) __attribute__((target(flags), noinline))
#else
#define ROOF_TARGET(flags) __attribute__((noinline))
#endif
/* Chains of multiply-adds in registers: enough of them to hide the latency. */
#define ROOF(name, flags, lanes)                                                                                                           \
    typedef float name##_vec __attribute__((vector_size(4 * (lanes))));                                                                    \
    ROOF_TARGET(flags) static float name(int64_t steps, float factor, double *work) {                                                      \
        name##_vec s0 = {1}, s1 = {2}, s2 = {3}, s3 = {4}, s4 = {5}, s5 = {6}, s6 = {7}, s7 = {8}, s8 = {9}, s9 = {10};                    \
        const name##_vec x = factor - (name##_vec){0};                                                                                     \
        for (int64_t i = 0; i < steps; i++) {                                                                                              \
            s0 = s0 * x + x, s1 = s1 * x + x, s2 = s2 * x + x, s3 = s3 * x + x, s4 = s4 * x + x;                                           \
            s5 = s5 * x + x, s6 = s6 * x + x, s7 = s7 * x + x, s8 = s8 * x + x, s9 = s9 * x + x;                                           \
        }                                                                                                                                  \
        *work = (double)steps * 10 * (lanes);                                                                                              \
        const name##_vec sum = s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9;                                                            \
        return sum[0];                                                                                                                     \
    }
#if defined(__x86_64__)
ROOF(roof_avx512, "avx512f,avx512vl,fma", 16)
ROOF(roof_avx2, "avx2,fma", 8)
ROOF(roof_plain, "sse2", 4)
#else
ROOF(roof_plain, "", 4)
#endif

/* Multiply-adds a second of one thread; keep: so that the loop is not dropped. */
static double fma_roof(const char *backend, volatile float *keep) {
    double work = 0;
    const double start = now();
#if defined(__x86_64__)
    if (strstr(backend, "avx512"))
        *keep = roof_avx512(1000000, 0.5f, &work);
    else if (strstr(backend, "avx2"))
        *keep = roof_avx2(2000000, 0.5f, &work);
    else
#endif
        *keep = roof_plain(4000000, 0.5f, &work);
    return work / (now() - start);
}

/* Bytes read and written a second. */
static double copy_roof(char *to, const char *from, size_t bytes) {
    const double start = now();
    memcpy(to, from, bytes);
    return 2.0 * (double)bytes / (now() - start);
}

static const espi_backend *find_backend(const char *name) {
    for (const espi_backend *const *b = espi_backends_cpu; *b; b++)
        if ((*b)->available() && (!name || strcmp((*b)->name, name) == 0)) return *b;
    fprintf(stderr, "esp_bench: no backend %s on this machine; there is:", name ? name : "(any)");
    for (const espi_backend *const *b = espi_backends_cpu; *b; b++)
        if ((*b)->available()) fprintf(stderr, " %s", (*b)->name);
    fprintf(stderr, "\n");
    exit(2);
}

static int add_cases(bench_case *cases, const espi_backend *backend, int threads, const char *only) {
    int n = 0;
    for (int s = 0; s < SHAPES; s++) {
        for (int op = 0; op < ESPI_OP_COUNT && n < MAX_CASES; op++) {
            if (only && !strstr(op_cases[op].name, only)) continue;
            bench_case *c = &cases[n];
            *c = (bench_case){.op = op_cases[op].name, .shape = shapes[s].name, .exec = {.threads = threads}};
            problem_build(&c->problem, (espi_op_id)op, &shapes[s], backend->real, backend);
            if (!ops[op].takes(backend, &c->problem.args)) {
                problem_free(&c->problem);
                continue;
            }
            c->exec.scratch = allocate(ops[op].scratch(backend, &c->exec, &c->problem.args));
            c->work = products_of((espi_op_id)op, &c->problem.args, &shapes[s]);
            c->memory = c->work == 0;
            if (c->memory) c->work = bytes_of(&c->problem);
            run_once(c, backend);
            n++;
        }
    }
    return n;
}

/* Forward and backward of a whole model over `sequences` of `length` random tokens each. */
typedef struct model_run {
    const char *dir;
    int sequences, length;
    double load, forward, backward; /* seconds; backward with the loss */
    size_t planned, peak;           /* bytes, AdamW included */
} model_run;

static void run_model(model_run *run, const char *backend, int threads, int rounds) {
    const int n = run->sequences * run->length;
    int32_t *tokens = allocate((size_t)n * sizeof *tokens), *cu = allocate((size_t)(run->sequences + 1) * sizeof *cu);
    esp_ctx *ctx = NULL;
    esp_model *model = NULL;
    esp_optim *optim = NULL;
    esp_plan plan = ESP_PLAN_INIT;
    esp_memory memory = ESP_MEMORY_INIT;
    double forward[MAX_ROUNDS], backward[MAX_ROUNDS];
    if (esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend, .threads = threads)) != ESP_OK) die("context");
    if (esp_plan_folder(&plan, ctx, run->dir, NULL, NULL, n, run->sequences) != ESP_OK) die(run->dir);
    const double begin = now();
    if (esp_model_load(&model, ctx, run->dir, NULL) != ESP_OK) die(run->dir);
    run->load = now() - begin;
    if (esp_adamw_create(&optim, model, NULL) != ESP_OK) die("AdamW");
    for (int i = 0; i < n; i++) tokens[i] = (int32_t)pick(1, "tokens", i, 50);
    for (int i = 0; i <= run->sequences; i++) cu[i] = i * run->length;
    const esp_batch batch = ESP_BATCH(.tokens = tokens, .cu_seqlens = cu, .n_tokens = n, .n_seqs = run->sequences);
    for (int i = 0; i < rounds + 1; i++) {
        esp_tensor hidden, d_hidden;
        double loss;
        const double start = now();
        if (esp_model_forward(model, &batch, &hidden) != ESP_OK) die("forward");
        const double middle = now();
        if (esp_model_cross_entropy(model, &batch, &hidden, &loss, &d_hidden) != ESP_OK) die("loss");
        if (esp_model_backward(model, &batch, &d_hidden) != ESP_OK) die("backward");
        if (i == 0) continue; /* the first one allocates */
        forward[i - 1] = middle - start;
        backward[i - 1] = now() - middle;
    }
    if (esp_ctx_memory(ctx, &memory) != ESP_OK) die("memory");
    run->forward = median(forward, rounds);
    run->backward = median(backward, rounds);
    run->planned = plan.peak;
    run->peak = memory.peak;
    esp_optim_destroy(optim);
    esp_model_destroy(model);
    esp_ctx_destroy(ctx);
    free(tokens);
    free(cu);
}

static void write_json(const char *path, const char *commit, const char *backend, int threads, const bench_case *cases, int n, double fma,
                       double copy, const model_run *run) {
    char date[LINE];
    date_now(date);
    json_t *list = json_array();
    for (int i = 0; i < n; i++)
        json_array_append_new(list, json_pack("{s:s, s:s, s:f, s:f, s:f}", "op", cases[i].op, "shape", cases[i].shape, "seconds",
                                              cases[i].median, cases[i].memory ? "bytes_per_second" : "flop_per_second",
                                              (cases[i].memory ? 1 : 2) * cases[i].work / cases[i].median, "of_roof",
                                              cases[i].work / cases[i].median / (cases[i].memory ? copy : fma)));
    json_t *root = json_pack("{s:s, s:s, s:s, s:s, s:s, s:i, s:f, s:f, s:o}", "commit", commit, "compiler", ESP_COMPILER, "cpu", cpu_name(),
                             "date", date, "backend", backend, "threads", threads, "roof_flop_per_second", 2 * fma,
                             "roof_copy_bytes_per_second", copy, "cases", list);
    if (root && run->dir)
        json_object_set_new(root, "model",
                            json_pack("{s:s, s:i, s:i, s:f, s:f, s:f, s:I, s:I}", "folder", run->dir, "sequences", run->sequences, "length",
                                      run->length, "load_seconds", run->load, "forward_seconds", run->forward, "backward_seconds",
                                      run->backward, "planned_bytes", (json_int_t)run->planned, "peak_bytes", (json_int_t)run->peak));
    if (!root || json_dump_file(root, path, JSON_INDENT(1)) != 0) {
        fprintf(stderr, "esp_bench: cannot write %s\n", path);
        exit(1);
    }
    json_decref(root);
}

static const char usage[] =
    "usage: esp_bench [--backend NAME] [--threads N] [--rounds N] [--only OP]\n"
    "                 [--model DIR [--sequences N] [--length N]] [--json FILE] [--commit ID]\n"
    "--only: ops whose name contains OP.  --model: also a forward and backward of that model, over 128 sequences of 14 tokens.\n";

int main(int argc, char **argv) {
    static bench_case cases[MAX_CASES];
    static double fma[MAX_ROUNDS], copy[MAX_ROUNDS];
    static const struct option options[] = {{"backend", required_argument, NULL, 'b'},
                                            {"threads", required_argument, NULL, 't'},
                                            {"rounds", required_argument, NULL, 'r'},
                                            {"only", required_argument, NULL, 'o'},
                                            {"model", required_argument, NULL, 'm'},
                                            {"json", required_argument, NULL, 'j'},
                                            {"commit", required_argument, NULL, 'c'},
                                            {"sequences", required_argument, NULL, 's'},
                                            {"length", required_argument, NULL, 'l'},
                                            {"help", no_argument, NULL, 'h'},
                                            {NULL, 0, NULL, 0}};
    const char *name = NULL, *only = NULL, *json = NULL, *commit = "unknown";
    model_run run = {.sequences = 128, .length = 14};
    int threads = 1, rounds = 11, option;
    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (option == 'b')
            name = optarg;
        else if (option == 't')
            threads = atoi(optarg);
        else if (option == 'r')
            rounds = atoi(optarg);
        else if (option == 'o')
            only = optarg;
        else if (option == 'm')
            run.dir = optarg;
        else if (option == 's')
            run.sequences = atoi(optarg);
        else if (option == 'l')
            run.length = atoi(optarg);
        else if (option == 'j')
            json = optarg;
        else if (option == 'c')
            commit = optarg;
        else {
            fputs(usage, option == 'h' ? stdout : stderr);
            return option == 'h' ? 0 : 2;
        }
    }
    if (threads < 1 || rounds < 1 || rounds >= MAX_ROUNDS || run.sequences < 1 || run.length < 1) {
        fprintf(stderr, "esp_bench: --threads, --rounds, --sequences, --length: at least 1 each, fewer than %d rounds\n", MAX_ROUNDS);
        return 2;
    }
    if (threads > 1) stopwatch = CLOCK_MONOTONIC;
    const espi_backend *backend = find_backend(name);
    const int n = add_cases(cases, backend, threads, only);
    const size_t copied = (size_t)64 << 20;
    char *from = allocate(copied), *to = allocate(copied);
    memset(from, 1, copied);
    memset(to, 2, copied);
    volatile float keep;
    for (int round = 0; round < rounds; round++) {
        fma[round] = fma_roof(backend->name, &keep);
        copy[round] = copy_roof(to, from, copied);
        for (int i = 0; i < n; i++) cases[i].seconds[round] = run_round(&cases[i], backend);
    }
    const double fma_median = median(fma, rounds), copy_median = median(copy, rounds);
    printf("%s, %d threads, %s, %s; one thread: %.1f GFLOP/s multiply-add, %.1f GB/s copy\n", backend->name, threads, cpu_name(),
           ESP_COMPILER, 2e-9 * fma_median, 1e-9 * copy_median);
    const char *shape = "";
    for (int i = 0; i < n; i++) {
        bench_case *c = &cases[i];
        c->median = median(c->seconds, rounds);
        if (strcmp(shape, c->shape) != 0) printf("-- %s\n", shape = c->shape);
        const double rate = c->work / c->median, roof = c->memory ? copy_median : fma_median;
        printf("%-14s %10.1f us %8.1f %s %6.2f of the roof\n", c->op, 1e6 * c->median, (c->memory ? 1e-9 : 2e-9) * rate,
               c->memory ? "GB/s   " : "GFLOP/s", rate / roof);
    }
    if (run.dir) {
        run_model(&run, backend->name, threads, rounds);
        printf("%s, %d x %d tokens: loaded in %.2f s, forward %.1f ms, loss and backward %.1f ms; planned %zu bytes, peak %zu\n", run.dir,
               run.sequences, run.length, run.load, 1e3 * run.forward, 1e3 * run.backward, run.planned, run.peak);
    }
    if (json) write_json(json, commit, backend->name, threads, cases, n, fma_median, copy_median, &run);
    for (int i = 0; i < n; i++) {
        problem_free(&cases[i].problem);
        free(cases[i].exec.scratch);
    }
    free(from);
    free(to);
    return 0;
}
