/* Every op of ops.def, on every backend that this machine runs, over a table of shapes, against the double reference.
 *
 * The error of an array is its largest difference from ref64 over ref64's largest magnitude.  It may be twice the error of the float
 * reference, plus a floor: that one sums in double and rounds once, so a kernel that sums in float needs room for the rounding of its
 * partial sums, 2^-24 * sqrt(terms) if they err at random, and never less than 1e-6. Integers must be equal; one 8-bit optimiser code in 64
 * may be a neighbour, for a float moment may fall on the other side of a midpoint.
 *
 * Where a backend's products are of bf16, the plain version is the float reference on operands rounded to bf16, and the floor is a place of
 * bf16: between two products a kernel rounds what the reference does not (weights of keys, gradients of scores and logits), and both operands
 * of the second.  What is drawn from logits can be compared only where they are the same: there all versions are given rounded operands, and
 * nothing else is allowed for. */
#include "cases.h"

#include "core/status.h"
#include "espalier/quant.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#define FLOOR 1e-6
#define BF16_FLOOR 0x1p-8
/* Inputs are of order 1: an array all below this is what is left of a cancellation, and its error is taken against 1. */
#define RESIDUE 1e-2

/* T, H, E, K, I, R, V, Hq, Hk, D. */
static const shape shapes[] = {
    {"no token", 0, 17, 4, 2, 16, 4, 33, 4, 2, 16, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true},
    {"one token", 1, 64, 8, 2, 32, 8, 97, 4, 2, 16, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true},
    {"ones", 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, ROUTE_RANDOM, ESP_NF4, ESP_F32, .extras = false},
    {"two tokens, odd all over", 2, 15, 3, 2, 7, 3, 31, 3, 1, 6, ROUTE_RANDOM, ESP_FP4, ESP_BF16, .nested = true, .renormalise = true},
    {"15", 15, 15, 4, 2, 15, 4, 65, 4, 4, 8, ROUTE_RANDOM, ESP_NF4, ESP_F32, .in_place = true, .decode = true},
    {"16", 16, 16, 4, 2, 16, 8, 64, 4, 2, 16, ROUTE_RANDOM, ESP_FP4, ESP_F32, .extras = true, .in_place = true},
    {"17", 17, 17, 5, 3, 17, 5, 67, 6, 2, 10, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true, .decode = true},
    {"31", 31, 31, 6, 1, 33, 2, 127, 2, 1, 30, ROUTE_SKEWED, ESP_NF4, ESP_F16, .nested = true},
    {"33", 33, 33, 6, 6, 31, 16, 129, 2, 2, 34, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true, .in_place = true},
    {"64", 64, 64, 8, 4, 32, 16, 256, 8, 2, 32, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true},
    {"65", 65, 65, 8, 2, 65, 17, 257, 5, 5, 12, ROUTE_SKEWED, ESP_FP4, ESP_F32, .extras = true},
    {"experts without tokens", 20, 32, 8, 2, 48, 4, 100, 4, 1, 8, ROUTE_EMPTY, ESP_NF4, ESP_BF16, .renormalise = true},
    {"all on one", 37, 48, 4, 1, 24, 4, 50, 4, 2, 16, ROUTE_ONE, ESP_NF4, ESP_BF16, .extras = true, .decode = true},
    {"plain bf16", 19, 40, 4, 2, 20, 4, 70, 4, 2, 20, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .renormalise = true},
    {"plain f16", 18, 24, 4, 2, 12, 4, 70, 4, 2, 18, ROUTE_SKEWED, ESP_Q_NONE, ESP_F16, .extras = true},
    {"plain f32", 21, 40, 4, 3, 20, 3, 70, 4, 2, 22, ROUTE_EMPTY, ESP_Q_NONE, ESP_F32, .extras = true},
    {"no branch", 23, 36, 4, 2, 20, 0, 80, 4, 2, 8, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true},
    {"many blocks, double quantisation", 9, 256, 3, 2, 80, 8, 90, 2, 1, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .nested = true,
     .extras = true},
    {"long rows", 5, 300, 2, 1, 130, 4, 700, 2, 1, 128, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true},
    {"a large head", 290, 72, 2, 1, 6, 2, 1900, 2, 1, 4, ROUTE_SKEWED, ESP_NF4, ESP_BF16, .extras = true, .repeated = true},
    {"many tokens", 3100, 8, 4, 2, 6, 2, 20, 2, 1, 4, ROUTE_SKEWED, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true},
    {"a long sequence", 150, 16, 4, 2, 8, 2, 40, 2, 1, 16, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true},
    {"as gpt-oss", 33, 64, 8, 4, 32, 4, 129, 8, 2, 16, ROUTE_RANDOM, ESP_MXFP4, ESP_BF16, AS_GPT_OSS, .window = 8, .extras = true},
    {"as gpt-oss, decode", 17, 64, 5, 3, 96, 5, 67, 6, 2, 10, ROUTE_SKEWED, ESP_MXFP4, ESP_BF16, AS_GPT_OSS, .window = 3, .extras = true,
     .decode = true, .in_place = true},
    {"as gpt-oss, no token", 0, 32, 4, 2, 32, 4, 33, 4, 2, 16, ROUTE_RANDOM, ESP_MXFP4, ESP_BF16, AS_GPT_OSS, .window = 2, .extras = true},
    {"mxfp4, two parts, no branch", 9, 32, 4, 2, 96, 0, 40, 4, 4, 8, ROUTE_EMPTY, ESP_MXFP4, ESP_F32, .sinks = true, .bias = true},
    {"mxfp4, long rows", 6, 160, 3, 1, 288, 17, 40, 2, 1, 64, ROUTE_ONE, ESP_MXFP4, ESP_F32, .window = 1, .extras = true},
    {"window and sinks", 150, 16, 4, 2, 8, 2, 40, 3, 1, 18, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .bias = true, .sinks = true, .window = 33},
    {"a window of one block", 150, 16, 4, 2, 8, 2, 40, 4, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .window = 64, .clamped = true},
    {"a window wider than all", 40, 16, 4, 2, 8, 2, 40, 4, 2, 32, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .window = 1000, .interleaved = true},
    {"shared prefixes", 300, 16, 4, 2, 8, 2, 40, 6, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .repeated = true,
     .extras = true},
    {"shared prefixes, odd", 120, 16, 4, 2, 8, 2, 40, 3, 1, 18, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .decode = true},
    {"shared prefixes of a block", 449, 16, 4, 2, 8, 2, 40, 4, 2, 32, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .sinks = true,
     .repeated = true},
    {"shared prefixes beyond the window", 300, 16, 4, 2, 8, 2, 40, 4, 1, 16, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .sinks = true,
     .window = 23},
    {"shared prefixes and long windows", 900, 16, 4, 2, 8, 2, 40, 2, 1, 80, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .window = 97},
    {"shared prefixes, one token each", 8, 16, 4, 2, 8, 2, 40, 2, 2, 16, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .window = 1},
    {"sigmoid, renormalised", 65, 33, 9, 3, 17, 4, 100, 4, 2, 20, ROUTE_RANDOM, ESP_NF4, ESP_BF16, SIGMOID_RULE, .renormalise = true,
     .extras = true},
    {"sigmoid, biased", 31, 40, 8, 2, 24, 4, 100, 2, 2, 8, ROUTE_RANDOM, ESP_FP4, ESP_F32, SIGMOID_RULE, .bias = true},
    {"sigmoid alone", 22, 24, 6, 2, 24, 4, 100, 2, 2, 8, ROUTE_RANDOM, ESP_FP4, ESP_F32, .sigmoid = true, .extras = true},
    {"scaled softmax", 20, 40, 6, 2, 24, 4, 100, 2, 2, 64, ROUTE_RANDOM, ESP_Q_NONE, ESP_BF16, .scaling = 3, .bias = true, .extras = true},
    {"scaled softmax, renormalised", 20, 40, 6, 2, 24, 4, 100, 2, 2, 12, ROUTE_RANDOM, ESP_Q_NONE, ESP_F16, .renormalise = true,
     .scaling = 0.5, .bias = true, .interleaved = true},
    {"clamped, odd", 19, 21, 4, 2, 13, 3, 60, 2, 1, 6, ROUTE_RANDOM, ESP_NF4, ESP_F32, .nested = true, .clamped = true, .in_place = true},
    {"replayed routes", 65, 33, 9, 3, 17, 4, 100, 4, 2, 20, ROUTE_SKEWED, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true,
     .forced = true, .filtered = true},
    {"replayed routes, in place", 40, 24, 6, 2, 12, 4, 300, 2, 2, 8, ROUTE_RANDOM, ESP_NF4, ESP_F32, .in_place = true, .extras = true,
     .forced = true},
    {"replayed sigmoid routes", 31, 24, 8, 3, 12, 4, 300, 2, 2, 8, ROUTE_RANDOM, ESP_NF4, ESP_F32, SIGMOID_RULE, .renormalise = true,
     .forced = true, .filtered = true},
    {"top-k alone", 33, 140, 4, 1, 12, 4, 270, 2, 2, 8, ROUTE_ONE, ESP_NF4, ESP_BF16, .filtered = true, .extras = true},
    {"min-p alone", 200, 24, 4, 2, 12, 4, 131, 2, 2, 8, ROUTE_EMPTY, ESP_NF4, ESP_F16, .filtered = true},
    {"clamped, interleaved, odd", 19, 21, 4, 2, 37, 3, 60, 2, 1, 6, ROUTE_SKEWED, ESP_FP4, ESP_F32, AS_GPT_OSS, .nested = true},
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

/* Parameter gradients sum over the routed rows: the longest sums of a shape of many tokens. */
static double floor_of(const shape *s) {
    return fmax(FLOOR, 0x1p-24 * sqrt((double)(s->tokens * s->top_k)));
}

/* Two arrays come behind a product and the activation: what the product's sums were rounded by reaches them times the activation's slope,
 * which the limits of gpt-oss hold below 4 in these shapes, while the array's own largest value is limited too. */
static double slope_of(espi_op_id op, const field *f) {
    const bool behind =
        (op == ESPI_OP_gate_up_fwd && strcmp(f->name, "act") == 0) || (op == ESPI_OP_down_bwd && strcmp(f->name, "d_gu") == 0);
    return behind ? 4 : 1;
}

static double error_of(const field *got, const field *want) {
    double worst = 0, largest = 0;
    for (int64_t i = 0; i < want->count; i++) {
        const double difference = fabs(field_get(got, i) - field_get(want, i)), size = fabs(field_get(want, i));
        if (isnan(difference)) return difference; /* in either: an element that was not written, or went wrong */
        if (difference > worst) worst = difference;
        if (size > largest) largest = size;
    }
    return largest > RESIDUE ? worst / largest : worst;
}

/* Of packed experts what comes from their products is bound by what the float reference errs by when it is given what these round.  What
 * the branches make is bound as ever. */
static bool of_packed(const field *f) {
    static const char *const names[] = {"gu", "act", "y", "d_rows", "d_gu", "d_row_weight"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strcmp(names[i], f->name) == 0) return true;
    return false;
}

/* Ops whose products are of bf16 where the backend says so. */
static bool multiplies_bf16(const espi_backend *backend, espi_op_id op) {
    static const espi_op_id ops[] = {ESPI_OP_attention_fwd, ESPI_OP_attention_bwd, ESPI_OP_head_stats,
                                     ESPI_OP_head_grad,     ESPI_OP_head_fused,    ESPI_OP_head_logits,
                                     ESPI_OP_head_sample,   ESPI_OP_linear_fwd,    ESPI_OP_linear_bwd};
    bool found = false;
    for (size_t i = 0; i < sizeof ops / sizeof ops[0]; i++) found = found || ops[i] == op;
    return found && backend->bf16_products;
}

/* What products of bf16 round: of packed experts, of the others. */
static const char *const packed_operands[] = {"x", "act", "d_gu", "d_out", "lut", NULL};
static const char *const dense_operands[] = {"q", "k", "v", "d_out", "hidden", "x", "d_y", "w", "a", "b", NULL};

static void round_operands(problem *p, const char *const *names) {
    for (; *names; names++) {
        for (int i = 0; i < p->n_fields; i++) {
            field *f = &p->fields[i];
            if (f->role != ROLE_IN || strcmp(f->name, *names) != 0) continue;
            for (int64_t k = 0; k < f->count; k++) {
                if (f->dtype == ESP_F32 || f->dtype == ESP_F64)
                    field_set(f, k, espi_bf16_value(espi_bf16_bits((float)field_get(f, k))));
                else if (f->dtype == ESP_F16)
                    espi_plain_store(f->data, ESP_F16, k, espi_bf16_value(espi_bf16_bits(espi_plain_value(f->data, ESP_F16, k))));
            }
            field_settle(f);
        }
    }
}

/* rounded: `plain` with rounded operands, NULL where nothing is. */
static void compare(const espi_backend *backend, problem *got, problem *plain, problem *want, problem *rounded) {
    const bool all_rounded = rounded && multiplies_bf16(backend, want->op);
    for (int i = 0; i < want->n_fields; i++) {
        const field *g = &got->fields[i], *w = &want->fields[i];
        if (w->role == ROLE_IN) continue;
        double limit = 0;
        if (w->dtype == ESP_F32 || w->dtype == ESP_F64)
            limit = 2 * error_of(&(rounded && (all_rounded || of_packed(w)) ? rounded : plain)->fields[i], w) +
                    (all_rounded ? BF16_FLOOR : slope_of(want->op, w) * floor_of(&want->shape));
        double error = error_of(g, w);
        if (w->dtype == ESP_U8) {
            limit = 1;
            error = 0;
            int64_t others = 0;
            for (int64_t k = 0; k < w->count; k++) {
                const double off = fabs(field_get(g, k) - field_get(w, k));
                error = fmax(error, off);
                others += off > 0;
            }
            cr_expect(others <= 1 + w->count / 64, "%s on %s, shape %s, seed %llu, array %s: %lld of %lld codes are others",
                      op_cases[want->op].name, backend->name, want->shape.name, (unsigned long long)want->seed, w->name, (long long)others,
                      (long long)w->count);
        }
        cr_expect(!!(error <= limit), "%s on %s, shape %s, seed %llu, array %s: error %.3g is beyond its limit %.3g",
                  op_cases[want->op].name, backend->name, want->shape.name, (unsigned long long)want->seed, w->name, error, limit);
    }
}

/* What a backend made of a shape; false: it refuses this case, with a reason.  operands: those that are rounded to bf16 first, or NULL. */
static bool run_on(problem *p, espi_op_id op, const shape *shape, const espi_backend *backend, int threads, const char *const *operands) {
    const char *refusal = NULL, *damaged = NULL;
    problem_build(p, op, shape, backend->real, &espi_backend_ref);
    if (operands) round_operands(p, operands);
    problem_pack(p, backend);
    const esp_status status = op_cases[op].run(backend, p, threads, &refusal);
    if (refusal) {
        cr_log_info("%s on %s, shape %s: refused: %s", op_cases[op].name, backend->name, shape->name, refusal);
        return false;
    }
    cr_assert_eq(status, ESP_OK, "%s on %s, shape %s, seed %llu: %s", op_cases[op].name, backend->name, shape->name,
                 (unsigned long long)p->seed, esp_last_error());
    const char *damage = problem_damage(p, &damaged);
    cr_assert_null(damage, "%s on %s, shape %s, %d threads, array %s: %s", op_cases[op].name, backend->name, shape->name, threads, damaged,
                   damage);
    return true;
}

static void expect_same_bits(const problem *a, const problem *b, const char *what, const espi_backend *backend) {
    for (int i = 0; i < a->n_fields; i++) {
        const size_t bytes = (size_t)a->fields[i].count * esp_dtype_size(a->fields[i].dtype);
        cr_expect(memcmp(a->fields[i].data, b->fields[i].data, bytes) == 0, "%s on %s, shape %s, seed %llu, array %s: not bit-equal for %s",
                  op_cases[a->op].name, backend->name, a->shape.name, (unsigned long long)a->seed, a->fields[i].name, what);
    }
}

static void conform(espi_op_id op, const shape *shape, const espi_backend *backend, problem *plain, problem *want) {
    problem one, more, rounded = {.n_fields = 0}, exact = {.n_fields = 0};
    const bool multiplies = multiplies_bf16(backend, op), draws = multiplies && op == ESPI_OP_head_sample;
    const char *const *given = draws ? dense_operands : NULL;
    if (run_on(&one, op, shape, backend, 1, given)) {
        espi_stack *w = expert_stack(&one);
        const bool packed = w && w->packed;
        if (packed || multiplies) run_on(&rounded, op, shape, &espi_backend_ref, 1, packed ? packed_operands : dense_operands);
        if (draws) {
            run_on(&exact, op, shape, &espi_backend_ref64, 1, given);
            compare(backend, &one, &rounded, &exact, NULL);
        } else {
            compare(backend, &one, plain, want, packed || multiplies ? &rounded : NULL);
        }
        static const char *const teams[] = {"1 and 2 threads", "1 and 3 threads on two memory nodes", "1 and 3 threads of which one comes"};
        for (int team = 0; team < ESPI_COUNT(teams); team++) {
            omp_set_max_active_levels(team < 2); /* 0: a region has the thread that comes to it, as within a region of the caller's */
            run_on(&more, op, shape, backend, team == 0 ? 2 : 3, given);
            omp_set_max_active_levels(1);
            expect_same_bits(&one, &more, teams[team], backend);
            problem_free(&more);
        }
    }
    problem_free(&exact);
    problem_free(&rounded);
    problem_free(&one);
}

static struct criterion_test_params all_ops(void) {
    static int index[ESPI_OP_COUNT];
    for (int i = 0; i < ESPI_OP_COUNT; i++) index[i] = i;
    return cr_make_param_array(int, index, ESPI_OP_COUNT);
}

ParameterizedTestParameters(kernels, conformance) {
    return all_ops();
}

ParameterizedTest(int *op, kernels, conformance) {
    for (int s = 0; s < SHAPES; s++) {
        problem plain, want;
        cr_assert(run_on(&want, (espi_op_id)*op, &shapes[s], &espi_backend_ref64, 1, NULL), "ref64 refuses %s", op_cases[*op].name);
        cr_assert(run_on(&plain, (espi_op_id)*op, &shapes[s], &espi_backend_ref, 1, NULL), "ref refuses %s", op_cases[*op].name);
        compare(&espi_backend_ref, &plain, &plain, &want, NULL);
        for (const espi_backend *const *backend = espi_backends_cpu; *backend; backend++)
            if ((*backend)->available()) conform((espi_op_id)*op, &shapes[s], *backend, &plain, &want);
        problem_free(&plain);
        problem_free(&want);
    }
}

/* Experts in a backend's own form.  Strips of rows, columns and blocks of every length; sums in one panel and in several. */
static const shape packed_shapes[] = {
    {"packed", 65, 192, 5, 2, 96, 16, 40, 2, 1, 8, ROUTE_SKEWED, ESP_NF4, ESP_F32, .packed = true, .bias = true},
    {"packed, a row", 1, 64, 2, 1, 64, 4, 40, 2, 1, 8, ROUTE_RANDOM, ESP_FP4, ESP_F32, .packed = true},
    {"packed, few rows", 14, 128, 8, 2, 64, 0, 40, 2, 1, 8, ROUTE_RANDOM, ESP_NF4, ESP_F32, .packed = true, .nested = true},
    {"packed, many rows", 420, 64, 3, 2, 288, 8, 40, 2, 1, 8, ROUTE_ONE, ESP_NF4, ESP_F32, .packed = true},
    {"packed, gates not whole records", 21, 64, 4, 2, 80, 33, 40, 2, 1, 8, ROUTE_EMPTY, ESP_FP4, ESP_F32, .packed = true, .clamped = true},
    {"packed, as gpt-oss", 50, 128, 4, 2, 192, 16, 40, 2, 1, 8, ROUTE_SKEWED, ESP_MXFP4, ESP_F32, AS_GPT_OSS, .packed = true},
    {"packed, deep", 40, 2112, 2, 1, 64, 16, 40, 2, 1, 8, ROUTE_ONE, ESP_NF4, ESP_F32, .packed = true},
    {"packed, deep, as gpt-oss", 37, 2112, 2, 1, 96, 16, 40, 2, 1, 8, ROUTE_ONE, ESP_MXFP4, ESP_F32, AS_GPT_OSS, .packed = true},
    {"packed, deep, many rows", 70, 2112, 2, 1, 64, 16, 40, 2, 1, 8, ROUTE_ONE, ESP_NF4, ESP_F32, .packed = true},
    {"packed, deep, many rows, as gpt-oss", 70, 2112, 2, 1, 96, 16, 40, 2, 1, 8, ROUTE_ONE, ESP_MXFP4, ESP_F32, AS_GPT_OSS, .packed = true},
    {"packed, one in two forms", 30, 128, 4, 3, 48, 4, 40, 2, 1, 8, ROUTE_RANDOM, ESP_NF4, ESP_F32, .packed = true},
};

Test(kernels, packed_experts) {
    const espi_op_id ops[] = {ESPI_OP_gate_up_fwd, ESPI_OP_gate_up_bwd, ESPI_OP_down_fwd, ESPI_OP_down_bwd};
    for (size_t i = 0; i < 4 * sizeof packed_shapes / sizeof packed_shapes[0]; i++) {
        const shape *s = &packed_shapes[i / 4];
        problem plain, want;
        run_on(&want, ops[i % 4], s, &espi_backend_ref64, 1, NULL);
        run_on(&plain, ops[i % 4], s, &espi_backend_ref, 1, NULL);
        for (const espi_backend *const *backend = espi_backends_cpu; *backend; backend++)
            if ((*backend)->pack && (*backend)->available()) conform(ops[i % 4], s, *backend, &plain, &want);
        problem_free(&plain);
        problem_free(&want);
    }
}

/* 6 times 2^126 is no number of bf16. */
Test(kernels, packing_refuses_scales_beyond_bf16) {
    static uint8_t codes[32 * 64 / 2], scales[64];
    const espi_stack one = {.format = ESP_MXFP4,
                            .experts = 1,
                            .rows = 32,
                            .cols = 64,
                            .parts = 1,
                            .part_bytes = sizeof codes,
                            .part_blocks = sizeof scales,
                            .data = codes,
                            .scales = scales,
                            .lut = esp_quant_table(ESP_MXFP4)};
    const espi_exec exec = {.threads = 1};
    for (const espi_backend *const *backend = espi_backends_cpu; *backend; backend++) {
        if (!(*backend)->pack || !(*backend)->available()) continue;
        void *packed = aligned_alloc(64, ((*backend)->packed_bytes(&one) + 63) / 64 * 64);
        scales[63] = 252;
        cr_expect_eq((*backend)->pack(&exec, packed, &one), ESP_OK, "%s: %s", (*backend)->name, esp_last_error());
        scales[63] = 253;
        cr_expect_eq((*backend)->pack(&exec, packed, &one), ESP_ERR_UNSUPPORTED, "%s", (*backend)->name);
        cr_expect(strstr(esp_last_error(), "block 63 of 32 has scale byte 253, expected at most 252"), "%s", esp_last_error());
        free(packed);
    }
}

/* What a float reference may differ from the double one by: it rounds what it stores and nothing else. */
Test(kernels, float_reference_rounds_once) {
    for (int op = 0; op < ESPI_OP_COUNT; op++) {
        for (int s = 0; s < SHAPES; s++) {
            problem plain, want;
            run_on(&want, (espi_op_id)op, &shapes[s], &espi_backend_ref64, 1, NULL);
            run_on(&plain, (espi_op_id)op, &shapes[s], &espi_backend_ref, 1, NULL);
            for (int i = 0; i < want.n_fields; i++) {
                if (want.fields[i].role == ROLE_IN) continue;
                const double error = error_of(&plain.fields[i], &want.fields[i]);
                cr_expect(!!(error <= FLOOR), "%s, shape %s, array %s: error %.3g", op_cases[op].name, shapes[s].name, want.fields[i].name,
                          error);
            }
            problem_free(&plain);
            problem_free(&want);
        }
    }
}

static size_t scratch_of(const espi_backend *backend, espi_op_id op, const any_args *a) {
    const espi_exec exec = {.threads = 1};
    switch (op) {
#define ESPI_OP(name, args)                                                                                                                \
    case ESPI_OP_##name:                                                                                                                   \
        return backend->name.scratch ? backend->name.scratch(&exec, &a->name) : 0;
#include "kernels/ops.def"
#undef ESPI_OP
    default:
        return 0;
    }
}

/* A plan asks for scratch before there are arrays: with every pointer NULL the answer is the same.  What a GPU's slots answer is host code,
 * and is asked here too where it was built. */
Test(kernels, scratch_depends_on_sizes_alone) {
    /* Whole records of a GPU, which has its experts packed. */
    static const shape records = {"records", 40, 128, 4, 2, 64, 16, 97, 4, 2, 64, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true};
    static char packed;
    const espi_backend *all[2 * BACKENDS];
    int n = backends(all);
    for (const espi_backend *const *gpu = espi_backends_gpu; *gpu; gpu++) all[n++] = *gpu;
    for (int op = 0; op < ESPI_OP_COUNT; op++) {
        for (int s = 0; s <= SHAPES; s++) {
            const shape *shape = s < SHAPES ? &shapes[s] : &records;
            problem p;
            problem_build(&p, (espi_op_id)op, shape, ESP_F32, &espi_backend_ref);
            espi_stack *experts = expert_stack(&p);
            if (shape == &records && experts) experts->packed = &packed;
            any_args blind = p.args;
            for (size_t at = 0; at + sizeof(void *) <= sizeof blind; at += sizeof(void *)) {
                void *word;
                memcpy(&word, (char *)&blind + at, sizeof word);
                for (int i = 0; i < p.n_fields; i++)
                    if (word == p.fields[i].data) memset((char *)&blind + at, 0, sizeof word);
            }
            for (int b = 0; b < n; b++)
                cr_expect_eq(scratch_of(all[b], (espi_op_id)op, &blind), scratch_of(all[b], (espi_op_id)op, &p.args), "%s on %s, shape %s",
                             op_cases[op].name, all[b]->name, shape->name);
            problem_free(&p);
        }
    }
}

/* A plan is made for the most rows that a batch may have: the head of fewer never asks for more, however they are cut. */
Test(kernels, scratch_of_the_head_grows_with_its_rows) {
    static const espi_op_id ops[] = {ESPI_OP_head_stats, ESPI_OP_head_grad, ESPI_OP_head_fused, ESPI_OP_head_sample};
    static const int64_t sizes[][2] = {{151936, 2048}, {201088, 2880}, {32000, 4096}, {97, 24}}; /* words, width */
    const espi_backend *all[2 * BACKENDS];
    int backend_count = backends(all);
    for (const espi_backend *const *gpu = espi_backends_gpu; *gpu; gpu++) all[backend_count++] = *gpu;
    for (int b = 0; b < backend_count; b++)
        for (size_t i = 0; i < sizeof ops / sizeof *ops * (sizeof sizes / sizeof *sizes); i++) {
            const int64_t *size = sizes[i % (sizeof sizes / sizeof *sizes)];
            const espi_op_id op = ops[i / (sizeof sizes / sizeof *sizes)];
            size_t most = 0;
            for (int64_t n = 1; n < 20000; n += n % 256 == 1 ? 127 : n % 256 == 128 ? 128 : 1) {
                const espi_head head = {
                    .w = {.dtype = ESP_BF16, .rows = size[0], .cols = size[1]}, .n = n, .temperature = 1, .logit_scale = 1};
                const any_args args = op == ESPI_OP_head_stats   ? (any_args){.head_stats = {.head = head}}
                                      : op == ESPI_OP_head_grad  ? (any_args){.head_grad = {.head = head}}
                                      : op == ESPI_OP_head_fused ? (any_args){.head_fused = {.head = head}}
                                                                 : (any_args){.head_sample = {.head = head}};
                const size_t bytes = scratch_of(all[b], op, &args);
                cr_assert_geq(bytes, most, "%s on %s, %lld words: %zu bytes for %lld rows, %zu for fewer", op_cases[op].name, all[b]->name,
                              (long long)size[0], bytes, (long long)n, most);
                most = bytes;
            }
        }
}

static bool has_refusal(const espi_backend *backend, espi_op_id op, problem *p) {
    const char *refusal = NULL;
    op_cases[op].run(backend, p, 1, &refusal);
    return refusal != NULL;
}

/* A format or dtype that nobody reads is refused with a reason, before anything is computed. */
Test(kernels, reference_refuses_unknown_weights) {
    const espi_op_id experts[] = {ESPI_OP_gate_up_fwd, ESPI_OP_gate_up_bwd, ESPI_OP_down_fwd, ESPI_OP_down_bwd};
    problem p;
    for (size_t i = 0; i < sizeof experts / sizeof experts[0]; i++) {
        problem_build(&p, experts[i], &shapes[1], ESP_F32, &espi_backend_ref);
        espi_stack *w = expert_stack(&p);
        w->format = ESP_Q_DEFAULT;
        cr_expect(has_refusal(&espi_backend_ref, experts[i], &p), "%s takes a format of no name", op_cases[experts[i]].name);
        w->format = ESP_MXFP4;
        w->cols = 48;
        cr_expect(has_refusal(&espi_backend_ref, experts[i], &p), "%s takes MXFP4 in rows of 48", op_cases[experts[i]].name);
        problem_free(&p);
    }
    problem_build(&p, ESPI_OP_linear_fwd, &shapes[1], ESP_F32, &espi_backend_ref);
    p.args.linear_fwd.w.dtype = ESP_I8;
    cr_expect(has_refusal(&espi_backend_ref, ESPI_OP_linear_fwd, &p), "linear_fwd takes an I8 weight");
    problem_free(&p);
}

/* Not a number in, error out: a router without finite logits has no choice to make. */
Test(kernels, router_refuses_nan) {
    const espi_backend *all[BACKENDS];
    const int n = backends(all);
    for (int i = 0; i < n; i++) {
        if (!all[i]->router_fwd.run) continue;
        problem p;
        const char *refusal = NULL;
        problem_build(&p, ESPI_OP_router_fwd, &shapes[9], all[i]->real, &espi_backend_ref);
        field_set(field_find(&p, "x"), 100, NAN);
        cr_expect_eq(op_cases[ESPI_OP_router_fwd].run(all[i], &p, 1, &refusal), ESP_ERR_NONFINITE, "%s", all[i]->name);
        problem_free(&p);
    }
}
