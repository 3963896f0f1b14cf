/* Every op of ops.def on the GPU, over a table of shapes, against the double reference: its own program, for it needs neither Criterion nor
 * the rest of the library.  Exit status 77: no GPU.   test_cuda_ops [OP [SHAPE]]
 *
 * The inputs marked act in ops.h are rounded to bf16 first, for all three: the double reference says what is right, the float reference with
 * its results rounded to bf16 how far a plain implementation in bf16 is from it, and the GPU may err by twice that and a floor
 * (the head's plain logits, the experts' decoded weights, u, gu, and what d_a of down is made of are rounded before anything is made of them):
 *  - results in bf16: 2^-9 of the largest, for where a plain implementation adds several products it rounds each;
 *  - results in f32 that are made of bf16 products (gradients of branches, the head's rows) are measured against the reference rounded to bf16
 *    too, since the products' operands are; for the head, whose logits are in bf16, against one whose logits are rounded;
 *  - other results in f32: as tests/kernels/conformance.c.
 * Each call is made twice and must give the same bits, leave its inputs as they are, and write nowhere else. */
#include "cases.h"

#include "espalier/status.h"
#include "kernels/plain.h"
#include "kernels/stack.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

extern const espi_backend espi_backend_cuda;

#define FLOOR 1e-6
#define RESIDUE 1e-2
#define BF16_FLOOR 0x1p-9
#define GAP ((size_t)256)
#define GAP_BYTE 0xA5
#define MEMORY ((size_t)256 << 20)
enum { SKIPPED = 77 };

/* T, H, E, K, I, R, V, Hq, Hk, D. */
static const shape shapes[] = {
    {"no token", 0, 16, 4, 2, 16, 4, 33, 4, 2, 16, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true},
    {"one token", 1, 64, 8, 2, 32, 8, 97, 4, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true},
    {"ones", 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, ROUTE_RANDOM, ESP_NF4, ESP_F32, .extras = false},
    {"two tokens, odd all over", 2, 15, 3, 2, 7, 3, 31, 3, 1, 6, ROUTE_RANDOM, ESP_FP4, ESP_BF16, .nested = true, .renormalise = true},
    {"15", 15, 15, 4, 2, 15, 4, 65, 4, 4, 64, ROUTE_RANDOM, ESP_NF4, ESP_F32, .in_place = true, .decode = true},
    {"16", 16, 16, 8, 2, 16, 8, 64, 4, 2, 16, ROUTE_RANDOM, ESP_FP4, ESP_F32, .extras = true, .in_place = true},
    {"17", 17, 17, 5, 3, 17, 5, 67, 6, 2, 128, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true, .decode = true},
    {"31", 31, 31, 6, 1, 33, 2, 127, 2, 1, 30, ROUTE_SKEWED, ESP_NF4, ESP_F16, .nested = true},
    {"33", 33, 33, 6, 6, 31, 16, 129, 2, 2, 34, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true, .in_place = true},
    {"64", 64, 64, 8, 4, 32, 16, 256, 8, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true},
    {"65", 65, 65, 8, 2, 65, 17, 257, 5, 5, 12, ROUTE_SKEWED, ESP_FP4, ESP_F32, .extras = true},
    {"dense", 130, 128, 16, 4, 96, 16, 520, 8, 2, 128, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true},
    {"dense, f32 weights", 70, 96, 16, 4, 64, 8, 320, 4, 4, 64, ROUTE_RANDOM, ESP_NF4, ESP_F32, .bias = true, .extras = true},
    {"dense, large", 300, 512, 64, 8, 384, 32, 2056, 16, 2, 128, ROUTE_SKEWED, ESP_NF4, ESP_BF16, .renormalise = true},
    {"dense, no branch, in place", 257, 256, 32, 4, 200, 0, 1000, 8, 8, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .in_place = true},
    {"branch of few tokens, ranks in turns", 40, 160, 4, 2, 104, 40, 97, 4, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .bias = true,
     .extras = true},
    {"experts without tokens", 20, 32, 8, 2, 48, 4, 100, 4, 1, 8, ROUTE_EMPTY, ESP_NF4, ESP_BF16, .renormalise = true},
    {"all on one", 37, 48, 4, 1, 24, 4, 50, 4, 2, 64, ROUTE_ONE, ESP_NF4, ESP_BF16, .extras = true, .decode = true},
    {"plain bf16", 19, 40, 4, 2, 20, 4, 70, 4, 2, 20, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .renormalise = true},
    {"plain f16", 18, 24, 4, 2, 12, 4, 70, 4, 2, 18, ROUTE_SKEWED, ESP_Q_NONE, ESP_F16, .extras = true},
    {"plain f32", 21, 40, 4, 3, 20, 3, 70, 4, 2, 22, ROUTE_EMPTY, ESP_Q_NONE, ESP_F32, .extras = true},
    {"many blocks, double quantisation", 9, 256, 3, 2, 80, 8, 90, 2, 1, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .nested = true,
     .extras = true},
    {"long rows", 5, 1304, 2, 1, 130, 4, 700, 2, 1, 128, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true},
    {"many tokens", 3100, 8, 4, 2, 6, 2, 20, 2, 1, 4, ROUTE_SKEWED, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true},
    {"long sequences", 330, 16, 4, 2, 8, 2, 40, 2, 1, 128, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true},
    {"as gpt-oss", 150, 64, 8, 4, 32, 8, 136, 8, 1, 64, ROUTE_RANDOM, ESP_MXFP4, ESP_BF16, AS_GPT_OSS, .window = 8, .extras = true},
    {"as gpt-oss, decode", 17, 64, 5, 3, 96, 5, 67, 8, 1, 64, ROUTE_SKEWED, ESP_MXFP4, ESP_BF16, AS_GPT_OSS, .window = 3, .extras = true,
     .decode = true, .in_place = true},
    {"as gpt-oss, no token", 0, 32, 4, 2, 32, 4, 33, 4, 2, 64, ROUTE_RANDOM, ESP_MXFP4, ESP_BF16, AS_GPT_OSS, .window = 2, .extras = true},
    {"mxfp4, long rows", 6, 160, 3, 1, 288, 17, 40, 2, 1, 64, ROUTE_ONE, ESP_MXFP4, ESP_F32, .window = 1, .extras = true},
    {"window and sinks", 150, 16, 4, 2, 8, 2, 40, 3, 1, 18, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .bias = true, .sinks = true, .window = 33},
    {"a window of one block", 150, 16, 4, 2, 8, 2, 40, 4, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .window = 64, .clamped = true},
    {"a window beyond a block", 160, 16, 4, 2, 8, 2, 40, 6, 2, 128, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .window = 70, .sinks = true},
    {"a window wider than all", 40, 16, 4, 2, 8, 2, 40, 4, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .window = 1000, .interleaved = true},
    {"sigmoid, renormalised", 65, 33, 9, 3, 17, 4, 100, 4, 2, 20, ROUTE_RANDOM, ESP_NF4, ESP_BF16, SIGMOID_RULE, .renormalise = true,
     .extras = true},
    {"sigmoid, biased", 300, 40, 8, 2, 24, 4, 100, 2, 2, 8, ROUTE_RANDOM, ESP_FP4, ESP_F32, SIGMOID_RULE, .bias = true},
    {"scaled softmax", 20, 40, 6, 2, 24, 4, 100, 2, 2, 64, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .scaling = 3, .bias = true, .extras = true},
    {"clamped, interleaved, odd", 19, 21, 4, 2, 37, 3, 60, 2, 1, 6, ROUTE_SKEWED, ESP_FP4, ESP_F32, AS_GPT_OSS, .nested = true},
    {"one sequence", 333, 16, 4, 2, 8, 2, 40, 4, 2, 128, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true},
    {"one sequence, window and sinks", 300, 16, 4, 2, 8, 2, 40, 8, 1, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .sinks = true, .window = 150},
    {"shared prefixes", 300, 16, 4, 2, 8, 2, 40, 6, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .repeated = true},
    {"shared prefixes, odd", 120, 16, 4, 2, 8, 2, 40, 3, 1, 18, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .decode = true},
    {"shared prefixes, window", 449, 16, 4, 2, 8, 2, 40, 4, 2, 128, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .sinks = true,
     .window = 65},
    {"shared prefixes, one token each", 8, 16, 4, 2, 8, 2, 40, 2, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .window = 1},
    {"many rows of the head", 1100, 8, 4, 2, 6, 2, 24, 2, 1, 64, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .renormalise = true},
    {"a wide head", 1100, 64, 4, 2, 6, 2, 700, 2, 1, 64, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .repeated = true},
    {"a wide head, coefficients given", 1031, 128, 4, 2, 6, 2, 515, 2, 1, 64, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .in_place = true},
    {"a wide head, entropies", 1040, 64, 4, 2, 6, 2, 260, 2, 1, 64, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .extras = true},
    {"a large vocabulary", 20, 32, 4, 2, 8, 2, 8192, 2, 1, 64, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .repeated = true},
    {"a large vocabulary, entropies", 20, 32, 4, 2, 8, 2, 8192, 2, 1, 64, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .extras = true},
    {"forced and filtered", 66, 32, 8, 2, 16, 4, 100, 2, 1, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .forced = true, .filtered = true,
     .extras = true},
    {"top-k alone", 33, 144, 4, 1, 12, 4, 272, 2, 2, 8, ROUTE_ONE, ESP_NF4, ESP_BF16, .filtered = true, .extras = true},
    {"min-p alone", 200, 24, 4, 2, 12, 4, 131, 2, 2, 8, ROUTE_EMPTY, ESP_NF4, ESP_F16, .filtered = true},
    {"top-p alone", 40, 64, 16, 4, 16, 4, 1032, 2, 2, 8, ROUTE_SKEWED, ESP_NF4, ESP_BF16, .filtered = true, .forced = true},
};

static int failures;

#define FAIL(...) (failures++, printf("FAIL " __VA_ARGS__), putchar('\n'), fflush(stdout))

static bool is_one_of(const char *name, const char *const *names) {
    while (*names && strcmp(name, *names) != 0) names++;
    return *names != NULL;
}

/* Whether an array of the problem's own dtype is marked act in ops.h. */
static bool is_act(espi_op_id op, const char *name) {
    static const char *const reals[] = {"rstd",   "d_w",     "cos",      "sin",        "lse",          "a",        "b",  "d_a",     "d_b",
                                        "logits", "weight",  "d_weight", "row_weight", "d_row_weight", "d_logits", "lp", "entropy", "g",
                                        "e",      "d_table", "d_sinks",  "total",      "parts",        NULL};
    return op != ESPI_OP_zero && op != ESPI_OP_sumsq && op != ESPI_OP_adamw && op != ESPI_OP_adamw8 && !is_one_of(name, reals);
}

/* Results in f32 that are made of bf16 products. */
static bool is_of_products(espi_op_id op, const char *name) {
    static const char *const grads[] = {"d_a", "d_b", "d_row_weight", NULL}, *const rows[] = {"lp", "entropy", "lse", "g", "e", NULL};
    const bool is_head = op == ESPI_OP_head_stats || op == ESPI_OP_head_fused || op == ESPI_OP_head_sample;
    return is_one_of(name, grads) || (is_head && is_one_of(name, rows)) || (op == ESPI_OP_router_bwd && strcmp(name, "d_w") == 0);
}

static double rounded(double value) {
    return espi_bf16_value(espi_bf16_bits((float)value));
}

static void round_field(field *f) {
    for (int64_t i = 0; i < f->count; i++) field_set(f, i, rounded(field_get(f, i)));
}

/* Of the problem's own dtype: another in the float problem than in the double one. */
static bool is_own(const problem *single, const problem *twice, int i) {
    return single->fields[i].dtype == ESP_F32 && twice->fields[i].dtype == ESP_F64;
}

static void round_inputs(problem *p, const problem *single, const problem *twice) {
    for (int i = 0; i < p->n_fields; i++) {
        if (p->fields[i].role == ROLE_OUT || !is_own(single, twice, i) || !is_act(p->op, p->fields[i].name)) continue;
        round_field(&p->fields[i]);
        field_settle(&p->fields[i]);
    }
}

static void run_reference(problem *p, const espi_backend *backend) {
    const char *refusal = NULL, *name = "";
    const esp_status status = op_cases[p->op].run(backend, p, 1, &refusal);
    const char *damage = problem_damage(p, &name);
    if (status == ESP_OK && !refusal && !damage) return;
    fprintf(stderr, "the reference does not run %s, shape %s: %s\n", op_cases[p->op].name, p->shape.name, esp_last_error());
    exit(1);
}

/* ---- On the GPU: all arrays of a call in one image, with gaps that nobody may write to ---- */

static void *gpu;
static unsigned char *memory, *image, *result, *pinned; /* memory: on the GPU */

typedef struct placed {
    size_t at[FIELDS], bytes[FIELDS], scratch, end;
} placed;

static size_t padded(size_t bytes) {
    return (bytes + GAP - 1) / GAP * GAP;
}

/* The arrays as the GPU wants them. */
static bool lay_out(placed *l, const problem *p, const problem *single, const problem *twice) {
    l->end = GAP;
    for (int i = 0; i < p->n_fields; i++) {
        const field *f = &p->fields[i];
        const bool act = is_own(single, twice, i) && is_act(p->op, f->name);
        l->at[i] = l->end;
        l->bytes[i] = (size_t)f->count * (act ? 2 : esp_dtype_size(f->dtype));
        l->end += padded(l->bytes[i]) + GAP;
        if (l->end > MEMORY) return false;
        memset(image + l->at[i] - GAP, GAP_BYTE, l->end - l->at[i] + GAP);
        if (!act) memcpy(image + l->at[i], f->data, l->bytes[i]);
        for (int64_t k = 0; act && k < f->count; k++) ((uint16_t *)(image + l->at[i]))[k] = espi_bf16_bits((float)field_get(f, k));
    }
    l->scratch = l->end;
    return true;
}

/* Every pointer to an array of the problem becomes one to its place on the GPU; inv_freq is read on the host. */
static void point_to_gpu(any_args *args, const problem *p, const placed *l) {
    for (size_t word = 0; word < sizeof *args / sizeof(void *); word++) {
        void *pointer;
        memcpy(&pointer, (char *)args + word * sizeof pointer, sizeof pointer);
        for (int i = 0; i < p->n_fields; i++) {
            if (p->fields[i].data != pointer || strcmp(p->fields[i].name, "inv_freq") == 0) continue;
            pointer = memory + l->at[i];
            memcpy((char *)args + word * sizeof pointer, &pointer, sizeof pointer);
            break;
        }
    }
}

/* The coefficients' function reads and writes the problem's arrays; the GPU, pinned ones. */
typedef struct relay {
    problem *p;
    esp_status (*coef)(void *user, int64_t first, int64_t count);
    espi_head_host pinned, own;
} relay;

static esp_status relay_coefficients(void *user, int64_t first, int64_t count) {
    const relay *r = user;
    const size_t at = (size_t)first, bytes = (size_t)count * sizeof(float);
    memcpy((float *)r->own.lp + at, (const float *)r->pinned.lp + at, bytes);
    memcpy((float *)r->own.entropy + at, (const float *)r->pinned.entropy + at, bytes);
    const esp_status status = r->coef(r->p, first, count);
    memcpy((float *)r->pinned.g + at, (const float *)r->own.g + at, bytes);
    memcpy((float *)r->pinned.e + at, (const float *)r->own.e + at, bytes);
    return status;
}

/* NULL: it ran, or failed with *status. */
static const char *call(espi_op_id op, any_args *args, placed *l, esp_status *status) {
    espi_exec exec = {.device = gpu, .threads = 1, .scratch = memory + l->scratch};
    const espi_device *device = espi_backend_cuda.device;
    size_t bytes = 0;
    switch (op) {
#define ESPI_OP(name, type)                                                                                                                \
    case ESPI_OP_##name:                                                                                                                   \
        if (!espi_backend_cuda.name.run) return "no such kernel";                                                                          \
        if (espi_backend_cuda.name.refuse && espi_backend_cuda.name.refuse(&args->name))                                                   \
            return espi_backend_cuda.name.refuse(&args->name);                                                                             \
        bytes = espi_backend_cuda.name.scratch ? espi_backend_cuda.name.scratch(&exec, &args->name) : 0;                                   \
        break;
#include "kernels/ops.def"
#undef ESPI_OP
    case ESPI_OP_COUNT:
        break;
    }
    l->end = l->scratch + padded(bytes) + GAP;
    if (l->end > MEMORY) return "more memory than this test has";
    memset(image + l->scratch, 0xFF, bytes);
    memset(image + l->scratch + bytes, GAP_BYTE, l->end - l->scratch - bytes);
    *status = device->put(gpu, memory, image, l->end);
    if (*status != ESP_OK) return NULL;
    switch (op) {
#define ESPI_OP(name, type)                                                                                                                \
    case ESPI_OP_##name:                                                                                                                   \
        *status = espi_backend_cuda.name.run(&exec, &args->name);                                                                          \
        break;
#include "kernels/ops.def"
#undef ESPI_OP
    case ESPI_OP_COUNT:
        break;
    }
    if (*status == ESP_OK) *status = device->get(gpu, result, memory, l->end);
    for (size_t b = l->scratch + bytes; *status == ESP_OK && b < l->end; b++)
        if (result[b] != GAP_BYTE) FAIL("%s: wrote %zu bytes behind its scratch of %zu", op_cases[op].name, b - l->scratch - bytes, bytes);
    return NULL;
}

/* Runs the problem on the GPU and leaves its results in the problem's arrays; false: not taken. */
static bool run_on_gpu(problem *p, const problem *single, const problem *twice) {
    placed l;
    relay r = {.p = p};
    any_args args = p->args;
    esp_status status = ESP_OK;
    if (!lay_out(&l, p, single, twice)) return false;
    point_to_gpu(&args, p, &l);
    if (p->op == ESPI_OP_head_fused) {
        const size_t n = padded((size_t)args.head_fused.head.n * sizeof(float));
        r.own = p->args.head_fused.host;
        r.coef = p->args.head_fused.coef;
        args.head_fused.host = r.pinned = (espi_head_host){pinned, pinned + n, pinned + 2 * n, pinned + 3 * n};
        if (r.coef) args.head_fused.coef = relay_coefficients;
        args.head_fused.coef_user = &r;
    }
    p->coef_next = 0;
    const char *refusal = call(p->op, &args, &l, &status);
    if (refusal) {
        printf("%s, shape %s: not taken: %s\n", op_cases[p->op].name, p->shape.name, refusal);
        return false;
    }
    if (status != ESP_OK) {
        FAIL("%s, shape %s: status %d, %s", op_cases[p->op].name, p->shape.name, (int)status, esp_last_error());
        if (status == ESP_ERR_DEVICE) exit(1); /* nothing runs after that */
        return false;
    }
    for (int i = 0; i < p->n_fields; i++) {
        field *f = &p->fields[i];
        if (f->role == ROLE_IN && memcmp(result + l.at[i], image + l.at[i], l.bytes[i]) != 0)
            FAIL("%s, shape %s: input %s changed", op_cases[p->op].name, p->shape.name, f->name);
        for (size_t b = 0; b < padded(l.bytes[i]) - l.bytes[i] + GAP; b++) {
            if (result[l.at[i] + l.bytes[i] + b] == GAP_BYTE) continue;
            FAIL("%s, shape %s: wrote %zu bytes behind array %s of %zu", op_cases[p->op].name, p->shape.name, b, f->name, l.bytes[i]);
            break;
        }
        const bool act = is_own(single, twice, i) && is_act(p->op, f->name);
        if (f->role == ROLE_IN) continue;
        if (!act) memcpy(f->data, result + l.at[i], l.bytes[i]);
        for (int64_t k = 0; act && k < f->count; k++) field_set(f, k, espi_bf16_value(((const uint16_t *)(result + l.at[i]))[k]));
    }
    return true;
}

/* ---- Comparing ---- */

typedef struct difference {
    double error;
    int64_t at;
} difference;

static difference difference_of(const field *got, const field *want, bool round) {
    difference d = {0, 0};
    double largest = 0;
    for (int64_t i = 0; i < want->count; i++) {
        const double value = field_get(got, i), difference = fabs((round ? rounded(value) : value) - field_get(want, i));
        if (isnan(difference)) return (struct difference){difference, i};
        if (difference > d.error) d = (struct difference){difference, i};
        largest = fmax(largest, fabs(field_get(want, i)));
    }
    if (largest > RESIDUE) d.error /= largest;
    return d;
}

static double floor_of(const shape *s) {
    return fmax(FLOOR, 0x1p-24 * sqrt(fmax((double)(s->tokens * s->top_k), (double)s->hidden)));
}

static void compare(const problem *got, const problem *plain, const problem *want) {
    for (int i = 0; i < want->n_fields; i++) {
        const field *g = &got->fields[i], *w = &want->fields[i];
        const bool own = is_own(plain, want, i), act = own && is_act(want->op, w->name), loose = own && is_of_products(want->op, w->name);
        const bool is_float = w->dtype == ESP_F32 || w->dtype == ESP_F64;
        if (w->role == ROLE_IN) continue;
        const difference d = difference_of(g, w, false);
        double limit = w->dtype == ESP_U8 ? 1 : 0, error = d.error;
        if (is_float)
            limit = 2 * difference_of(&plain->fields[i], w, act || loose).error + (act || loose ? BF16_FLOOR : floor_of(&want->shape));
        if (w->dtype == ESP_U8)
            for (int64_t k = error = 0; k < w->count; k++) error = fmax(error, fabs(field_get(g, k) - field_get(w, k)));
        if (!(error <= limit))
            FAIL("%s, shape %s, array %s: error %.3g beyond %.3g; element %lld of %lld is %.9g, expected %.9g", op_cases[want->op].name,
                 want->shape.name, w->name, error, limit, (long long)d.at, (long long)w->count, field_get(g, d.at), field_get(w, d.at));
    }
}

/* ---- The head as a plain implementation in bf16 has it: exact, but for logits that are rounded before anything is made of them ---- */

static double finished(const espi_head *head, double product, int64_t v) {
    if (head->bias) product += head->bias[v];
    product *= head->logit_scale;
    if (head->softcap != 0) product = head->softcap * tanh(product / head->softcap);
    return product / head->temperature;
}

static bool is_kept(const espi_head *head, int64_t i, int64_t v) {
    if (!head->kept_offsets || head->kept_offsets[i] == head->kept_offsets[i + 1]) return true;
    for (int64_t j = head->kept_offsets[i]; j < head->kept_offsets[i + 1]; j++)
        if (head->kept[j] == v) return true;
    return false;
}

/* z: the rounded products of row i, finished; -INFINITY where the row is not over an id. */
static void plain_row(double *z, double *lp, double *entropy, double *lse, const problem *products, const espi_head *head, int64_t i) {
    const int64_t vocab = head->w.rows;
    double most = -INFINITY, sum = 0, sum_z = 0;
    for (int64_t v = 0; v < vocab; v++) {
        z[v] = is_kept(head, i, v) ? finished(head, rounded(field_get(field_find((problem *)products, "logits"), i * vocab + v)), v)
                                   : -INFINITY;
        most = fmax(most, z[v]);
    }
    for (int64_t v = 0; v < vocab; v++) {
        if (z[v] == -INFINITY) continue;
        sum += exp(z[v] - most);
        sum_z += z[v] * exp(z[v] - most);
    }
    *lse = most + log(sum);
    *entropy = *lse - sum_z / sum;
    *lp = z[head->target[i]] - *lse;
}

static void plain_gradient(field *d_hidden, const double *z, const espi_head *head, int64_t i, double g, double e, double lse,
                           double entropy) {
    const int64_t hidden = head->w.cols, to = head->d_rows ? head->d_rows[i] : head->rows[i];
    for (int64_t h = 0; h < hidden; h++) field_set(d_hidden, to * hidden + h, 0);
    for (int64_t v = 0; v < head->w.rows; v++) {
        if (z[v] == -INFINITY) continue;
        const double p = exp(z[v] - lse), bent = head->softcap != 0 ? head->temperature * z[v] / head->softcap : 0;
        double d = g * ((v == head->target[i]) - p) - (e != 0 ? e * p * (z[v] - lse + entropy) : 0);
        d = rounded(d * head->logit_scale / head->temperature * (1 - bent * bent));
        for (int64_t h = 0; h < hidden; h++) {
            const double w = espi_plain_value(head->w.data, head->w.dtype, v * hidden + h);
            field_set(d_hidden, to * hidden + h, field_get(d_hidden, to * hidden + h) + d * w);
        }
    }
}

/* Puts that into the results of a head_stats, head_grad or head_fused problem, for `compare` to measure. */
static void plain_head(problem *p) {
    const espi_head *head = p->op == ESPI_OP_head_stats   ? &p->args.head_stats.head
                            : p->op == ESPI_OP_head_grad  ? &p->args.head_grad.head
                            : p->op == ESPI_OP_head_fused ? &p->args.head_fused.head
                                                          : NULL;
    if (!head || head->n == 0) return;
    problem products, single;
    problem_build(&products, ESPI_OP_head_logits, &p->shape, ESP_F64, &espi_backend_ref);
    problem_build(&single, ESPI_OP_head_logits, &p->shape, ESP_F32, &espi_backend_ref);
    round_inputs(&products, &single, &products);
    espi_head *raw = &products.args.head_logits.head;
    raw->bias = NULL;
    raw->temperature = raw->logit_scale = 1;
    raw->softcap = 0;
    run_reference(&products, &espi_backend_ref64);
    double *z = malloc((size_t)head->w.rows * sizeof *z);
    for (int64_t i = 0; z && i < head->n; i++) {
        double lp, entropy, lse;
        plain_row(z, &lp, &entropy, &lse, &products, head, i);
        if (p->op != ESPI_OP_head_grad) {
            field_set(field_find(p, "lp"), i, lp);
            field_set(field_find(p, "entropy"), i, entropy);
            field_set(field_find(p, "lse"), i, lse);
        }
        if (p->op == ESPI_OP_head_stats) continue;
        const bool is_fused = p->op == ESPI_OP_head_fused;
        if (is_fused && i == 0) p->coef_next = 0;
        if (is_fused && p->args.head_fused.coef) p->args.head_fused.coef(p, i, 1);
        const field *e = is_fused || p->shape.extras ? field_find(p, "e") : NULL;
        plain_gradient(field_find(p, "d_hidden"), z, head, i, field_get(field_find(p, "g"), i), e ? field_get(e, i) : 0,
                       field_get(field_find(p, "lse"), i), e ? field_get(field_find(p, "entropy"), i) : 0);
    }
    free(z);
    problem_free(&products);
    problem_free(&single);
}

/* ---- The experts as a plain implementation in bf16 has them: with 4-bit weights decoded to bf16, and what is stored between two steps read
 * again as it was stored ---- */

static void decode_weights(problem *p) {
    espi_stack *w = expert_stack(p);
    if (!w || w->format == ESP_Q_NONE) return;
    const int64_t each = w->rows * w->cols, n = w->experts * each;
    uint16_t *values = field_add(p, "decoded", ROLE_IN, ESP_BF16, n);
    for (int64_t i = 0; i < n; i++) values[i] = espi_bf16_bits(espi_stack_value(w, i / each, i % each / w->cols, i % w->cols));
    field_settle(field_find(p, "decoded"));
    *w = (espi_stack){.format = ESP_Q_NONE,
                      .dtype = ESP_BF16,
                      .experts = w->experts,
                      .rows = w->rows,
                      .cols = w->cols,
                      .parts = 1,
                      .data = values,
                      .part_bytes = (size_t)each * sizeof *values};
}

/* Of a gate_up_fwd problem: gu from the branch's u in bf16, then act from gu in bf16. */
static void plain_gate_up(problem *p) {
    if (p->op != ESPI_OP_gate_up_fwd) return;
    const espi_gate_up_fwd *a = &p->args.gate_up_fwd;
    const int64_t outs = a->w.rows, r = a->lora.r;
    field *gu = field_find(p, "gu"), *u = r ? field_find(p, "u") : NULL;
    for (int64_t e = 0; e < a->w.experts; e++) {
        for (int64_t i = a->routing.offsets[e] * outs; i < a->routing.offsets[e + 1] * outs; i++) {
            const float *b = (const float *)a->lora.b + (e * outs + i % outs) * r;
            double more = 0;
            for (int64_t j = 0; j < r; j++) {
                const double exact = field_get(u, i / outs * r + j);
                more += b[j] * (rounded(exact) - exact);
            }
            field_set(gu, i, field_get(gu, i) + a->lora.scale * more);
        }
    }
    round_field(gu);
    form_activation(p);
}

/* Of a down_bwd problem: d_a from the branch's gradient and the activation in bf16. */
static void plain_down_bwd(problem *p) {
    if (p->op != ESPI_OP_down_bwd || p->args.down_bwd.lora.r == 0) return;
    const espi_down_bwd *a = &p->args.down_bwd;
    const int64_t outs = a->w.rows, width = a->w.cols, r = a->lora.r, slots = p->shape.tokens * p->shape.top_k;
    field *d_a = field_find(p, "d_a");
    float *act = malloc((size_t)(slots * width + 1) * sizeof *act);
    if (!act) exit(1);
    (void)espi_backend_ref.swiglu_fwd.run(&(espi_exec){.threads = 1}, &(espi_swiglu_fwd){act, a->gu, slots, width, a->glu});
    for (int64_t at = 0; at < a->w.experts * slots * r; at++) {
        const int64_t e = at / (slots * r), s = at / r % slots, j = at % r;
        if (s < a->routing.offsets[e] || s >= a->routing.offsets[e + 1]) continue;
        const float *d_out = (const float *)a->d_out + a->routing.row_token[s] * outs, *b = (const float *)a->lora.b + e * outs * r + j;
        double q = 0;
        for (int64_t o = 0; o < outs; o++) q += (double)b[o * r] * d_out[o];
        q *= a->lora.scale * ((const float *)a->routing.row_weight)[s];
        for (int64_t i = 0; i < width; i++) {
            const double x = act[s * width + i];
            field_set(d_a, (e * r + j) * width + i, field_get(d_a, (e * r + j) * width + i) + rounded(q) * rounded(x) - q * x);
        }
    }
    free(act);
}

/* A draw is right when it is one from the distribution of the reference's logits, up to the rounding of logits to bf16. */
typedef struct drawn {
    const problem *p;
    const field *z;
    int64_t vocab, row;
    double slack; /* of a logit */
} drawn;

static double z_of(const drawn *d, int64_t v) {
    return field_get(d->z, d->row * d->vocab + v);
}

static void check_draw(const drawn *d, const int32_t *ids, int64_t n, int64_t token, double lp, double uniform, bool greedy) {
    double most = -INFINITY, sum = 0, below = 0, up_to = 0;
    bool is_listed = false;
    for (int64_t j = 0; j < n; j++) most = fmax(most, z_of(d, ids ? ids[j] : j));
    for (int64_t j = 0; j < n; j++) {
        const int64_t v = ids ? ids[j] : j;
        const double p = exp(z_of(d, v) - most);
        sum += p;
        if (v < token) below += p;
        if (v <= token) up_to += p;
        is_listed = is_listed || v == token;
    }
    const double want = token >= 0 && token < d->vocab ? z_of(d, token) - most - log(sum) : NAN;
    if (!is_listed || !(fabs(lp - want) <= 2 * d->slack))
        FAIL("head_sample, shape %s, row %lld: token %lld has lp %g, expected %g", d->p->shape.name, (long long)d->row, (long long)token,
             lp, want);
    else if (greedy ? z_of(d, token) < most - 2 * d->slack : uniform < below / sum - 2 * d->slack || uniform > up_to / sum + 2 * d->slack)
        FAIL("head_sample, shape %s, row %lld: token %lld of [%g, %g] for uniform %g", d->p->shape.name, (long long)d->row,
             (long long)token, below / sum, up_to / sum, uniform);
}

/* What the filter left are the most likely ids, as many as it says. */
static void check_left(const drawn *d, const espi_head_filter *f, const int32_t *left, int64_t n) {
    double least = INFINITY, most = -INFINITY, sum = 0, mass = 0, out = -INFINITY;
    for (int64_t v = 0; v < d->vocab; v++) most = fmax(most, z_of(d, v));
    for (int64_t v = 0, j = 0; v < d->vocab; v++) {
        const bool is_left = j < n && left[j] == v;
        j += is_left;
        sum += exp(z_of(d, v) - most);
        if (!is_left) {
            out = fmax(out, z_of(d, v));
            continue;
        }
        least = fmin(least, z_of(d, v));
        mass += exp(z_of(d, v) - most);
    }
    bool right = n > 0 && out <= least + 2 * d->slack;
    for (int64_t j = 1; j < n; j++) right = right && left[j] > left[j - 1];
    if (f->top_k) right = right && n <= f->top_k && (f->top_p > 0 || f->min_p > 0 || n == f->top_k);
    if (f->min_p > 0) right = right && exp(least - most) >= f->min_p * (1 - 4 * d->slack);
    if (f->top_p > 0 && !f->top_k && !(f->min_p > 0))
        right = right && mass >= (f->top_p - 2 * d->slack) * sum && mass - exp(least - most) <= (f->top_p + 2 * d->slack) * sum;
    if (!right)
        FAIL("head_sample, shape %s, row %lld: the filter left %lld ids down to z = %g of %g, without one of %g; their mass is %g",
             d->p->shape.name, (long long)d->row, (long long)n, least, most, out, mass / sum);
}

static void check_sample(problem *got, const shape *s) {
    problem logits, single;
    problem_build(&logits, ESPI_OP_head_logits, s, ESP_F64, &espi_backend_ref);
    problem_build(&single, ESPI_OP_head_logits, s, ESP_F32, &espi_backend_ref);
    round_inputs(&logits, &single, &logits);
    const espi_head_sample *a = &got->args.head_sample;
    if (a->head.temperature == 0) logits.args.head_logits.head.temperature = 1;
    run_reference(&logits, &espi_backend_ref64);
    drawn d = {got, field_find(&logits, "logits"), s->vocab, 0, 0};
    for (int64_t i = 0; i < d.z->count; i++) d.slack = fmax(d.slack, fabs(field_get(d.z, i)) * 0x1p-8 + 1e-5);
    for (; d.row < a->head.n; d.row++) {
        const int32_t *left = a->kept ? a->kept + d.row * a->kept_most : NULL;
        const int64_t n = a->kept ? a->kept_count[d.row] : s->vocab;
        if (left) check_left(&d, &a->filter, left, n);
        check_draw(&d, left, n, a->token[d.row], ((const float *)a->lp)[d.row], a->uniform[d.row], a->head.temperature == 0);
    }
    problem_free(&logits);
    problem_free(&single);
}

static void expect_same_bits(const problem *a, const problem *b) {
    for (int i = 0; i < a->n_fields; i++) {
        const size_t bytes = (size_t)a->fields[i].count * esp_dtype_size(a->fields[i].dtype);
        if (memcmp(a->fields[i].data, b->fields[i].data, bytes) != 0)
            FAIL("%s, shape %s, array %s: not the same bits again", op_cases[a->op].name, a->shape.name, a->fields[i].name);
    }
}

/* Attention sees all its tokens as one sequence, which then is many tiles long. */
static void join_sequences(problem *p) {
    espi_spans *spans = p->op == ESPI_OP_attention_fwd   ? &p->args.attention_fwd.spans
                        : p->op == ESPI_OP_attention_bwd ? &p->args.attention_bwd.spans
                                                         : NULL;
    if (!spans) return;
    field *cu = field_find(p, "cu_q"), *len = field_find(p, "k_len");
    field_set(cu, 1, (double)p->shape.tokens);
    field_set(len, 0, (double)p->shape.tokens);
    field_settle(cu);
    field_settle(len);
    spans->n_seqs = 1;
}

/* The shape that an op has of a line of the table: the reference would take minutes for the experts of the large one. */
static const shape *shape_of(espi_op_id op, const shape *s) {
    static const shape experts = {"dense, large",     200, 256, 16, 4, 128, 32, 520, 8, 2, 64, ROUTE_SKEWED, ESP_NF4, ESP_BF16,
                                  .renormalise = true};
    const bool is_of_experts = op == ESPI_OP_gate_up_fwd || op == ESPI_OP_gate_up_bwd || op == ESPI_OP_down_fwd || op == ESPI_OP_down_bwd;
    return is_of_experts && strcmp(s->name, experts.name) == 0 ? &experts : s;
}

static bool conform(espi_op_id op, const shape *line) {
    const shape *s = shape_of(op, line);
    problem want, plain, got, again;
    problem_build(&want, op, s, ESP_F64, &espi_backend_ref);
    problem_build(&plain, op, s, ESP_F32, &espi_backend_ref);
    problem_build(&got, op, s, ESP_F32, &espi_backend_ref);
    problem_build(&again, op, s, ESP_F32, &espi_backend_ref);
    problem *const all[] = {&want, &plain, &got, &again};
    for (int i = 0; i < 4; i++) {
        round_inputs(all[i], &plain, &want);
        if (strncmp(s->name, "one sequence", strlen("one sequence")) == 0) join_sequences(all[i]);
    }
    const bool taken = run_on_gpu(&got, &plain, &want);
    if (taken) {
        run_reference(&want, &espi_backend_ref64);
        decode_weights(&plain);
        run_reference(&plain, &espi_backend_ref);
        plain_head(&plain);
        plain_gate_up(&plain);
        plain_down_bwd(&plain);
        if (op == ESPI_OP_head_sample)
            check_sample(&got, s);
        else
            compare(&got, &plain, &want);
        if (run_on_gpu(&again, &plain, &want)) expect_same_bits(&got, &again);
    }
    for (int i = 0; i < 4; i++) problem_free(all[i]);
    return taken;
}

/* Not a number in, a failure out at the next wait, and none after it. */
static void router_reports_nan(void) {
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        if (strcmp(shapes[s].name, "dense") != 0) continue;
        problem p, twice;
        problem_build(&p, ESPI_OP_router_fwd, &shapes[s], ESP_F32, &espi_backend_ref);
        problem_build(&twice, ESPI_OP_router_fwd, &shapes[s], ESP_F64, &espi_backend_ref);
        field_set(field_find(&p, "x"), 100, NAN);
        placed l;
        any_args args = p.args;
        esp_status status = ESP_OK;
        lay_out(&l, &p, &p, &twice);
        point_to_gpu(&args, &p, &l);
        call(p.op, &args, &l, &status);
        if (status != ESP_ERR_NONFINITE) FAIL("router_fwd: a logit that is not finite gives status %d", (int)status);
        status = espi_backend_cuda.device->wait(gpu);
        if (status != ESP_OK) FAIL("router_fwd: a failure is reported twice");
        problem_free(&p);
        problem_free(&twice);
    }
}

/* The last query of a long sequence alone, whose keys are split among blocks, against the same query among all. */
static void decode_of_many_keys(int64_t head_dim) {
    const shape s = {"decode of many keys", 1000, 16, 4, 2, 8, 2, 40, 8, 2, 0, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .sinks = true};
    shape sized = s;
    sized.head_dim = head_dim;
    problem want, p;
    problem_build(&want, ESPI_OP_attention_fwd, &sized, ESP_F64, &espi_backend_ref);
    problem_build(&p, ESPI_OP_attention_fwd, &sized, ESP_F32, &espi_backend_ref);
    problem *const both[] = {&want, &p};
    for (int i = 0; i < 2; i++) {
        round_inputs(both[i], &p, &want);
        join_sequences(both[i]);
    }
    run_reference(&want, &espi_backend_ref64);
    field_set(field_find(&p, "cu_q"), 1, 1);
    placed l;
    any_args args = p.args;
    esp_status status = ESP_OK;
    lay_out(&l, &p, &p, &want);
    point_to_gpu(&args, &p, &l);
    const int64_t row = (s.tokens - 1) * s.heads * head_dim;
    args.attention_fwd.q = (const uint16_t *)args.attention_fwd.q + row;
    args.attention_fwd.spans.tokens = 1;
    const char *refusal = call(p.op, &args, &l, &status);
    if (refusal || status != ESP_OK) FAIL("attention_fwd, %s: %s, status %d", s.name, refusal ? refusal : esp_last_error(), (int)status);
    const uint16_t *out = (const uint16_t *)(result + l.at[field_find(&p, "out") - p.fields]);
    const float *lse = (const float *)(result + l.at[field_find(&p, "lse") - p.fields]);
    double error = 0, largest = 0, lse_error = 0;
    for (int64_t i = 0; i < s.heads * head_dim; i++) {
        const double right = field_get(field_find(&want, "out"), row + i);
        error = fmax(error, fabs(espi_bf16_value(out[i]) - right));
        largest = fmax(largest, fabs(right));
    }
    for (int64_t h = 0; h < s.heads; h++)
        lse_error = fmax(lse_error, fabs(lse[h] - field_get(field_find(&want, "lse"), (s.tokens - 1) * s.heads + h)));
    if (!(error <= 3 * BF16_FLOOR * largest) || !(lse_error <= 1e-5))
        FAIL("attention_fwd, %s of %lld: error %.3g of the output, %.3g of the log-sum", s.name, (long long)head_dim, error, lse_error);
    problem_free(&want);
    problem_free(&p);
}

/* Many steps in many blocks, again and again: what overtakes a barrier that is missing shows as other bits. */
static void attention_again(espi_op_id op, int64_t head_dim) {
    enum { TIMES = 12 };
    const shape s = {"again", 1500, 16, 4, 2, 8, 2, 40, 8, 1, head_dim, ROUTE_RANDOM, ESP_NF4, ESP_BF16};
    shape small = s;
    small.tokens = 2;
    problem p, twice; /* of the other only the dtypes are looked at */
    unsigned char *first[FIELDS] = {0};
    problem_build(&p, op, &s, ESP_F32, &espi_backend_ref);
    problem_build(&twice, op, &small, ESP_F64, &espi_backend_ref);
    join_sequences(&p);
    for (int k = 0, before = failures; k < TIMES && failures == before && run_on_gpu(&p, &p, &twice); k++) {
        for (int i = 0; i < p.n_fields; i++) {
            const size_t bytes = (size_t)p.fields[i].count * esp_dtype_size(p.fields[i].dtype);
            if (p.fields[i].role == ROLE_IN) continue;
            if (!first[i]) {
                first[i] = malloc(bytes);
                if (!first[i]) exit(1);
                memcpy(first[i], p.fields[i].data, bytes);
            } else if (memcmp(first[i], p.fields[i].data, bytes) != 0) {
                FAIL("%s of %lld, run %d: array %s has other bits than the first time", op_cases[op].name, (long long)head_dim, k,
                     p.fields[i].name);
            }
        }
    }
    for (int i = 0; i < p.n_fields; i++) free(first[i]);
    problem_free(&p);
    problem_free(&twice);
}

/* Moments in the host's memory, more than are on their way at once, and in an odd number: the bits of moments on the GPU, twice. */
static void moments_over_the_bus(void) {
    enum { N = (7 << 20) + 3, STEPS = 2 };
    static const char *const names[] = {"p", "m", "v"};
    const espi_device *device = espi_backend_cuda.device;
    const size_t bytes = (size_t)N * sizeof(float), each = padded(bytes);
    float *values = (float *)(void *)image, *got = (float *)(void *)result;
    unsigned char *home;
    void *host;
    if (device->alloc_host(gpu, 2 * each, &host) != ESP_OK) {
        FAIL("adamw: %s", esp_last_error());
        return;
    }
    home = host;
    for (int there = 0; there < 2; there++) {
        espi_exec exec = {.device = gpu, .threads = 1, .scratch = memory + 5 * each};
        unsigned char *const places[] = {memory, there ? home : memory + each, there ? home + each : memory + 2 * each, memory + 3 * each};
        espi_adamw a = {places[0], places[1], places[2], places[3], N, 0, 1e-2, 0.9, 0.99, 1e-8, 0.1, 0.5, there};
        esp_status status = ESP_OK;
        for (int k = 0; k < 4; k++) {
            for (int i = 0; i < N; i++) values[i] = (float)((i * (7 + k) + k) % 1009) * (k == 2 ? 1e-3f : 1e-2f) - (k == 2 ? 0 : 5);
            if (status == ESP_OK) status = device->put(gpu, places[k], values, bytes);
        }
        for (a.step = 1; a.step <= STEPS && status == ESP_OK; a.step++) status = espi_backend_cuda.adamw.run(&exec, &a);
        for (int k = 0; k < 3 && status == ESP_OK; k++) {
            status = device->get(gpu, there ? values : got + k * (each / sizeof(float)), places[k], bytes);
            if (there && memcmp(values, got + k * (each / sizeof(float)), bytes) != 0)
                FAIL("adamw: %s has other bits with moments in the host's memory", names[k]);
        }
        if (status != ESP_OK) FAIL("adamw: %s", esp_last_error());
    }
    device->free_host(gpu, host);
}

/* A wide head with several slices of its vocabulary, against the same with gradients of entropies that are 0, whose logits go through memory.
 * Some rows have logits so large that a target is next to impossible, or certain.  All products are exact, so both round the same logits. */
enum { SLICED_ROWS = 700, SLICED_TOKENS = 1400, SLICED_HIDDEN = 128, SLICED_VOCAB = 17001 };

static float sliced_hidden(int64_t token, int64_t h) {
    const float size = token % 50 < 4 ? 64 : 1;
    return ((float)((uint32_t)(token * SLICED_HIDDEN + h) * 2654435761u / 65536 % 3) - 1) * size;
}

static float sliced_weight(int64_t v, int64_t h) {
    return (float)((uint32_t)(v * SLICED_HIDDEN + h) * 2246822519u / 65536 % 9) / 8 - 0.5f;
}

static int64_t sliced_token(int64_t row) {
    return (row * 3 + 1) % SLICED_TOKENS;
}

/* Of every other row with large logits the likeliest id. */
static int32_t sliced_target(int64_t row) {
    int32_t likeliest = 0;
    double most = -INFINITY;
    if (sliced_token(row) % 50 >= 4 || row % 2) return row == 5 ? SLICED_VOCAB - 1 : (int32_t)(row * 977 % SLICED_VOCAB);
    for (int32_t v = 0; v < SLICED_VOCAB; v++) {
        double sum = 0;
        for (int64_t h = 0; h < SLICED_HIDDEN; h++) sum += (double)sliced_hidden(sliced_token(row), h) * (double)sliced_weight(v, h);
        if (sum > most) most = sum, likeliest = v;
    }
    return likeliest;
}

static void head_in_slices(void) {
    const espi_device *device = espi_backend_cuda.device;
    const size_t reals = SLICED_ROWS * sizeof(float), each = padded(reals), gradient = padded((size_t)SLICED_TOKENS * SLICED_HIDDEN * 2);
    const size_t sizes[] = {
        (size_t)SLICED_TOKENS * SLICED_HIDDEN * 2, (size_t)SLICED_VOCAB * SLICED_HIDDEN * 2, reals, reals, reals, reals};
    unsigned char *places[6], *to = memory;
    float *const results[] = {(float *)(void *)image, (float *)(void *)result};
    esp_status status = ESP_OK;
    for (int k = 0; k < 6 && status == ESP_OK; k++) {
        uint16_t *halves = (uint16_t *)(void *)image;
        for (int64_t i = 0; k < 2 && i < (int64_t)(sizes[k] / 2); i++)
            halves[i] = espi_bf16_bits((k ? sliced_weight : sliced_hidden)(i / SLICED_HIDDEN, i % SLICED_HIDDEN));
        for (int64_t i = 0; k >= 2 && i < SLICED_ROWS; i++) {
            if (k < 4) ((int32_t *)(void *)image)[i] = k == 2 ? (int32_t)sliced_token(i) : sliced_target(i);
            if (k >= 4) ((float *)(void *)image)[i] = k == 4 ? (float)(i % 7 - 3) : 0;
        }
        places[k] = to;
        to += padded(sizes[k]);
        status = device->put(gpu, places[k], image, sizes[k]);
    }
    for (int way = 0; way < 2 && status == ESP_OK; way++) {
        const espi_head_fused a = {.head = {.hidden = places[0],
                                            .rows = (int32_t *)(void *)places[2],
                                            .target = (int32_t *)(void *)places[3],
                                            .w = {places[1], ESP_BF16, SLICED_VOCAB, SLICED_HIDDEN},
                                            .n = SLICED_ROWS,
                                            .temperature = 1,
                                            .logit_scale = 1},
                                   .lp = to,
                                   .entropy = to + each,
                                   .lse = to + 2 * each,
                                   .g = places[4],
                                   .e = places[5],
                                   .d_hidden = to + 3 * each,
                                   .e_is_zero = way == 0};
        const espi_exec exec = {.device = gpu, .threads = 1, .scratch = to + 3 * each + gradient};
        status = device->zero(gpu, to, 3 * each + gradient);
        if (status == ESP_OK) status = espi_backend_cuda.head_fused.run(&exec, &a);
        if (status == ESP_OK) status = device->get(gpu, results[way], to, 3 * each + gradient);
    }
    if (status != ESP_OK) {
        FAIL("head_fused in slices: %s", esp_last_error());
        return;
    }
    double least = 0, most = -INFINITY;
    for (int i = 0; i < SLICED_ROWS; i++) {
        const float *got = results[0] + i, *want = results[1] + i, *got_entropy = got + each / sizeof(float),
                    *want_entropy = want + each / sizeof(float);
        const size_t at = (size_t)sliced_token(i) * SLICED_HIDDEN;
        const uint16_t *d = (const uint16_t *)(void *)(image + 3 * each) + at, *want_d = (const uint16_t *)(void *)(result + 3 * each) + at;
        double error = 0, size = 0;
        for (int h = 0; h < SLICED_HIDDEN; h++) {
            error += pow(espi_bf16_value(d[h]) - espi_bf16_value(want_d[h]), 2);
            size += pow(espi_bf16_value(want_d[h]), 2);
        }
        /* of logits of some hundreds an f32 keeps no more; and a plain gradient rounds what nearly cancels */
        const double rounding = 1e-6 * (fabs(*want) + fabs(want[2 * each / sizeof(float)]));
        if (!(fabs(*got - *want) <= 1e-5 + rounding) || !(fabs(*got_entropy - *want_entropy) <= 1e-4 + rounding) ||
            !(sqrt(error) <= 0x1p-7 * sqrt(size) + 0x1p-6))
            FAIL("head_fused in slices, row %d: lp %.9g, expected %.9g; entropy %.6g, expected %.6g; d_hidden is off by %.3g of %.3g", i,
                 (double)*got, (double)*want, (double)*got_entropy, (double)*want_entropy, sqrt(error), sqrt(size));
        least = fmin(least, *want);
        most = fmax(most, *want);
    }
    if (!(least < -130) || !(most > -0.01))
        FAIL("head_fused in slices: log-probabilities from %.3g to %.3g are not what this is for", least, most);
}

static bool set_up(void) {
    const espi_device *device = espi_backend_cuda.device;
    image = malloc(MEMORY);
    result = malloc(MEMORY);
    void *at, *host;
    if (!image || !result || device->start(&gpu, 0) != ESP_OK) return false;
    if (device->alloc(gpu, MEMORY, &at) != ESP_OK || device->alloc_host(gpu, (size_t)1 << 20, &host) != ESP_OK) return false;
    memory = at;
    pinned = host;
    return true;
}

int main(int argc, char **argv) {
    if (!espi_backend_cuda.available()) {
        puts("no GPU");
        return SKIPPED;
    }
    if (!set_up()) {
        printf("no start: %s\n", esp_last_error());
        return 1;
    }
    for (int op = 0; op < ESPI_OP_COUNT; op++) {
        if (argc > 1 && strcmp(argv[1], op_cases[op].name) != 0) continue;
        const int before = failures;
        int taken = 0;
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            if (argc <= 2 || strcmp(argv[2], shapes[s].name) == 0) taken += conform((espi_op_id)op, &shapes[s]);
        printf("%-16s %2d shapes, %d failures\n", op_cases[op].name, taken, failures - before);
        fflush(stdout);
    }
    if (argc == 1 || (argc == 2 && strcmp(argv[1], "attention_fwd") == 0)) {
        decode_of_many_keys(64);
        decode_of_many_keys(128);
    }
    for (int i = 0; i < 4; i++) {
        const espi_op_id op = i % 2 ? ESPI_OP_attention_bwd : ESPI_OP_attention_fwd;
        if (argc == 1 || (argc == 2 && strcmp(argv[1], op_cases[op].name) == 0)) attention_again(op, i / 2 ? 128 : 64);
    }
    if (argc == 1 || strcmp(argv[1], "adamw") == 0) moments_over_the_bus();
    if (argc == 1 || strcmp(argv[1], "head_fused") == 0) head_in_slices();
    if (argc == 1) router_reports_nan();
    espi_backend_cuda.device->stop(gpu);
    free(image);
    free(result);
    printf("%d failures\n", failures);
    return failures > 0;
}
