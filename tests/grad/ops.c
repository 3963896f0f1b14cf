/* Every backward op of the reference against central differences of its forward, in double.  The upstream gradient is random, parameter
 * gradients start from something that is not zero, and the saved arrays come from the double forward.
 * Differences: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h with h = 2^-14: truncation of order h^4 = 1e-17, rounding of order 1e-12. */
#include "cases.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define STEP 0x1p-14
#define LIMIT 1e-6
/* Below this share of the largest element of a gradient, errors are measured against that share. */
#define SMALL 1e-3

enum { CHECKS = 4 };

/* The loss holds scale * sum of (array of the forward) * (array of the backward, or 1). */
typedef struct term {
    const char *value, *upstream;
    double scale;
} term;

typedef struct pair {
    espi_op_id fwd, bwd;
    term terms[4];
    struct {
        const char *input, *gradient;
    } checks[CHECKS];
    bool overwrites;                    /* the gradient lies in an array that is read or kept in part, not added to */
    void (*before_forward)(problem *f); /* makes what stands between the input and the op */
    void (*after_forward)(problem *f);  /* makes the array that the loss reads */
    void (*after_backward)(problem *b); /* makes a gradient from what the backward wrote */
} pair;

static void *data_of(problem *p, const char *name) {
    return field_find(p, name)->data;
}

/* The weighted sum over the slots, so that the gate weights have a gradient. */
static void combine_down(problem *f) {
    const int64_t n = f->shape.tokens * f->shape.hidden;
    bool known = false;
    for (int i = 0; i < f->n_fields; i++) known = known || strcmp(f->fields[i].name, "combined") == 0;
    if (!known) field_add(f, "combined", ROLE_OUT, ESP_F64, n);
    const espi_combine_fwd a = {
        .out = data_of(f, "combined"), .y = data_of(f, "y"), .routing = f->args.down_fwd.routing, .hidden = f->shape.hidden};
    cr_assert_eq(espi_backend_ref64.combine_fwd.run(&(espi_exec){.threads = 1}, &a), ESP_OK);
}

/* Gradient of a token from those of its routed rows. */
static void gather_rows(problem *b) {
    const int64_t slots = b->shape.tokens * b->shape.top_k;
    const espi_combine_bwd a = {.d_x = field_add(b, "d_x", ROLE_OUT, ESP_F64, b->shape.tokens * b->shape.hidden),
                                .d_weight = field_add(b, "d_weight", ROLE_OUT, ESP_F64, slots),
                                .d_rows = data_of(b, "d_rows"),
                                .d_row_weight = field_add(b, "d_row_weight", ROLE_IN, ESP_F64, slots),
                                .routing = b->args.gate_up_bwd.routing,
                                .hidden = b->shape.hidden};
    cr_assert_eq(espi_backend_ref64.combine_bwd.run(&(espi_exec){.threads = 1}, &a), ESP_OK);
}

static const pair pairs[] = {
    {ESPI_OP_embed_fwd, ESPI_OP_embed_bwd, {{"out", "d_out", 1}}, {{"w", "d_table"}}, .overwrites = false},
    {ESPI_OP_rmsnorm_fwd, ESPI_OP_rmsnorm_bwd, {{"y", "d_y", 1}, {"x", "d_add", 1}}, {{"x", "d_x"}, {"w", "d_w"}}, .overwrites = false},
    {ESPI_OP_clamp_fwd, ESPI_OP_clamp_bwd, {{"y", "d_y", 1}}, {{"x", "d_x"}}},
    {ESPI_OP_rope_fwd, ESPI_OP_rope_bwd, {{"x", "x", 1}}, {{"x", "x"}}, .overwrites = true},
    {ESPI_OP_attention_fwd,
     ESPI_OP_attention_bwd,
     {{"out", "d_out", 1}},
     {{"q", "d_q"}, {"k", "d_k"}, {"v", "d_v"}, {"sinks", "d_sinks"}},
     .overwrites = false},
    {ESPI_OP_linear_fwd, ESPI_OP_linear_bwd, {{"y", "d_y", 1}}, {{"x", "d_x"}, {"a", "d_a"}, {"b", "d_b"}}, .overwrites = false},
    {ESPI_OP_router_fwd,
     ESPI_OP_router_bwd,
     {{"weight", "d_weight", 1}, {"p_sum", "aux_counts", AUX_COEF}, {"z_sum", NULL, Z_COEF}},
     {{"x", "d_x"}, {"w", "d_w"}},
     .overwrites = false},
    {ESPI_OP_gate_up_fwd,
     ESPI_OP_gate_up_bwd,
     {{"gu", "d_gu", 1}},
     {{"x", "d_x"}, {"a", "d_a"}, {"b", "d_b"}},
     .after_backward = gather_rows},
    {ESPI_OP_swiglu_fwd, ESPI_OP_swiglu_bwd, {{"act", "d_act", 1}}, {{"gu", "d_gu"}}, .overwrites = false},
    {ESPI_OP_down_fwd,
     ESPI_OP_down_bwd,
     {{"combined", "d_out", 1}},
     {{"gu", "d_gu"}, {"row_weight", "d_row_weight"}, {"a", "d_a"}, {"b", "d_b"}},
     .before_forward = form_activation,
     .after_forward = combine_down},
    {ESPI_OP_head_stats, ESPI_OP_head_grad, {{"lp", "g", 1}, {"entropy", "e", 1}}, {{"hidden", "d_hidden"}}, .overwrites = true},
};

/* T, H, E, K, I, R, V, Hq, Hk, D. */
static const shape shapes[] = {
    {"odd, nf4", 7, 5, 4, 2, 3, 2, 11, 3, 1, 6, ROUTE_RANDOM, ESP_NF4, ESP_F32, .extras = true},
    {"odd, plain, renormalised", 6, 7, 5, 3, 4, 3, 9, 4, 2, 4, ROUTE_RANDOM, ESP_Q_NONE, ESP_F32, .renormalise = true},
    {"one expert each", 5, 3, 3, 1, 5, 1, 7, 2, 2, 2, ROUTE_RANDOM, ESP_NF4, ESP_F32, .nested = true, .extras = true},
    {"one expert each, renormalised", 5, 3, 3, 1, 5, 1, 7, 2, 2, 2, ROUTE_RANDOM, ESP_FP4, ESP_F32, .renormalise = true, .extras = true},
    {"every expert", 4, 6, 3, 3, 2, 2, 5, 1, 1, 8, ROUTE_RANDOM, ESP_FP4, ESP_F32, .nested = true, .extras = true},
    {"every expert, renormalised", 4, 6, 3, 3, 2, 2, 5, 1, 1, 8, ROUTE_RANDOM, ESP_FP4, ESP_F32, .renormalise = true, .extras = true},
    {"experts without rows", 6, 5, 6, 2, 3, 4, 13, 6, 3, 4, ROUTE_EMPTY, ESP_NF4, ESP_F32, .extras = true},
    {"all on one", 9, 4, 4, 1, 3, 2, 6, 2, 1, 4, ROUTE_ONE, ESP_NF4, ESP_F32, .extras = false},
    {"one token", 1, 5, 4, 2, 3, 2, 8, 2, 1, 4, ROUTE_RANDOM, ESP_NF4, ESP_F32, .extras = true},
    {"no branch", 5, 5, 4, 2, 3, 0, 8, 2, 1, 4, ROUTE_RANDOM, ESP_NF4, ESP_F32, .extras = false},
    {"wide blocks", 3, 37, 3, 2, 11, 2, 8, 2, 1, 10, ROUTE_RANDOM, ESP_NF4, ESP_F32, .nested = true, .extras = true},
    {"as gpt-oss", 7, 32, 4, 2, 32, 2, 8, 4, 2, 6, ROUTE_RANDOM, ESP_MXFP4, ESP_F32, AS_GPT_OSS, .window = 2, .extras = true},
    {"mxfp4, two parts", 5, 32, 3, 2, 64, 1, 8, 2, 1, 4, ROUTE_EMPTY, ESP_MXFP4, ESP_F32, .sinks = true, .bias = true, .clamped = true},
    {"behind one another", 24, 3, 3, 2, 2, 1, 7, 4, 2, 4, ROUTE_RANDOM, ESP_NF4, ESP_F32, .shared = true, .sinks = true},
    {"behind one another, windows", 30, 3, 3, 2, 2, 1, 7, 2, 1, 4, ROUTE_RANDOM, ESP_NF4, ESP_F32, .shared = true, .window = 6},
    {"a window", 13, 5, 4, 2, 7, 2, 8, 4, 2, 4, ROUTE_RANDOM, ESP_NF4, ESP_F32, .window = 3, .interleaved = true},
    {"one key", 6, 5, 4, 2, 7, 2, 8, 4, 2, 4, ROUTE_RANDOM, ESP_NF4, ESP_F32, .window = 1, .sinks = true, .bias = true},
    {"sigmoid", 7, 5, 6, 3, 3, 2, 8, 2, 1, 8, ROUTE_RANDOM, ESP_NF4, ESP_F32, .sigmoid = true, .extras = true},
    {"sigmoid, corrected, scaled", 7, 5, 6, 2, 3, 2, 8, 2, 1, 8, ROUTE_RANDOM, ESP_NF4, ESP_F32, SIGMOID_RULE, .bias = true},
    {"sigmoid, the same, renormalised", 7, 5, 6, 3, 3, 2, 8, 2, 1, 12, ROUTE_RANDOM, ESP_NF4, ESP_F32, SIGMOID_RULE, .renormalise = true,
     .extras = true},
    {"sigmoid, one expert each", 7, 5, 6, 1, 3, 2, 8, 2, 1, 12, ROUTE_RANDOM, ESP_NF4, ESP_F32, .sigmoid = true, .renormalise = true},
    {"scaled softmax", 6, 5, 5, 3, 3, 2, 8, 2, 1, 4, ROUTE_RANDOM, ESP_NF4, ESP_F32, .scaling = 1.7, .bias = true, .extras = true},
    {"forced and filtered", 9, 5, 6, 2, 3, 2, 12, 2, 1, 4, ROUTE_EMPTY, ESP_NF4, ESP_F32, .extras = true, .forced = true, .filtered = true},
    {"forced and filtered, renormalised", 9, 5, 6, 3, 3, 2, 12, 2, 1, 4, ROUTE_SKEWED, ESP_NF4, ESP_F32, .renormalise = true,
     .extras = true, .forced = true, .filtered = true},
    {"forced sigmoid", 7, 5, 6, 2, 3, 2, 8, 2, 1, 8, ROUTE_RANDOM, ESP_NF4, ESP_F32, SIGMOID_RULE, .forced = true},
    {"scaled softmax, renormalised", 6, 5, 5, 3, 3, 2, 8, 2, 1, 4, ROUTE_RANDOM, ESP_NF4, ESP_F32, .scaling = 0.3, .renormalise = true},
};

static bool has(problem *p, const char *name) {
    for (int i = 0; i < p->n_fields; i++)
        if (strcmp(p->fields[i].name, name) == 0) return true;
    return false;
}

static double element_before(const field *f, int64_t i) {
    field before = *f;
    before.data = f->before;
    return field_get(&before, i);
}

static double loss(const pair *test, problem *f, problem *b) {
    const char *refusal = NULL;
    for (int i = 0; i < f->n_fields; i++)
        memcpy(f->fields[i].data, f->fields[i].before, (size_t)f->fields[i].count * esp_dtype_size(f->fields[i].dtype));
    if (test->before_forward) test->before_forward(f);
    cr_assert_eq(op_cases[f->op].run(&espi_backend_ref64, f, 1, &refusal), ESP_OK);
    if (test->after_forward) test->after_forward(f);
    double sum = 0;
    for (const term *t = test->terms; t->value; t++) {
        if (!has(f, t->value) || (t->upstream && !has(b, t->upstream))) continue; /* only with `extras` */
        const field *value = field_find(f, t->value);
        for (int64_t i = 0; i < value->count; i++)
            sum += t->scale * field_get(value, i) * (t->upstream ? element_before(field_find(b, t->upstream), i) : 1);
    }
    return sum;
}

static double loss_at(const pair *test, problem *f, problem *b, const field *x, int64_t i, double offset) {
    field before = *x;
    before.data = x->before;
    const double old = field_get(&before, i);
    field_set(&before, i, old + offset);
    cr_assert_eq(field_get(&before, i), old + offset, "the step is not exact in %s", x->name);
    const double value = loss(test, f, b);
    field_set(&before, i, old);
    return value;
}

static void check(const pair *test, problem *f, problem *b, const char *input, const char *gradient) {
    const field *x = field_find(f, input), *d = field_find(b, gradient);
    cr_assert_eq(x->count, d->count);
    const bool adds = d->role == ROLE_INOUT && !test->overwrites;
    double largest = 0;
    for (int64_t i = 0; i < d->count; i++) largest = fmax(largest, fabs(field_get(d, i) - (adds ? element_before(d, i) : 0)));
    for (int64_t i = 0; i < x->count; i++) {
        const double near = loss_at(test, f, b, x, i, STEP) - loss_at(test, f, b, x, i, -STEP);
        const double far = loss_at(test, f, b, x, i, 2 * STEP) - loss_at(test, f, b, x, i, -2 * STEP);
        const double numeric = (8 * near - far) / (12 * STEP);
        const double analytic = field_get(d, i) - (adds ? element_before(d, i) : 0);
        /* 1e-10: an exact zero (a gate that is always 1) differs from zero by the rounding of the loss alone */
        const double limit = LIMIT * fmax(fabs(analytic), SMALL * largest) + 1e-10;
        cr_assert(!!(fabs(numeric - analytic) <= limit), "%s, shape %s, seed %llu, %s[%lld]: by hand %.12g, by differences %.12g",
                  op_cases[test->bwd].name, f->shape.name, (unsigned long long)f->seed, gradient, (long long)i, analytic, numeric);
    }
}

static void check_pair(const pair *test, const shape *shape) {
    problem f, b;
    problem_build(&b, test->bwd, shape, ESP_F64, &espi_backend_ref64);
    if (test->bwd == ESPI_OP_head_grad) { /* rows that no token names are left as they were */
        field *d = field_find(&b, "d_hidden");
        memset(d->data, 0, (size_t)d->count * sizeof(double));
    }
    problem_call(&b, &espi_backend_ref64);
    problem_build(&f, test->fwd, shape, ESP_F64, &espi_backend_ref64);
    if (test->after_backward) test->after_backward(&b);
    for (int c = 0; c < CHECKS && test->checks[c].input; c++)
        if (has(&f, test->checks[c].input)) check(test, &f, &b, test->checks[c].input, test->checks[c].gradient);
    problem_free(&f);
    problem_free(&b);
}

ParameterizedTestParameters(grad, op) {
    static int index[sizeof pairs / sizeof pairs[0]];
    for (int i = 0; i < (int)(sizeof pairs / sizeof pairs[0]); i++) index[i] = i;
    return cr_make_param_array(int, index, sizeof pairs / sizeof pairs[0]);
}

ParameterizedTest(int *index, grad, op) {
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) check_pair(&pairs[*index], &shapes[s]);
}

/* A backward op that no pair checks fails here: every row whose name ends in _bwd or _grad must be the second of a pair. */
Test(grad, every_backward_is_checked) {
    for (int op = 0; op < ESPI_OP_COUNT; op++) {
        const char *name = op_cases[op].name, *end = strrchr(name, '_');
        if (!end || (strcmp(end, "_bwd") != 0 && strcmp(end, "_grad") != 0)) continue;
        bool checked = op == ESPI_OP_combine_bwd; /* on the way of gate_up_bwd */
        for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++) checked = checked || (int)pairs[i].bwd == op;
        cr_expect(checked, "%s has no row in the table of gradient checks", name);
    }
}

/* The one-pass head gives what the two-pass head gives for the same coefficients. */
Test(grad, head_fused_is_head_grad) {
    for (size_t s = 0; s < sizeof shapes / sizeof shapes[0]; s++) {
        problem fused, two;
        problem_run(&fused, ESPI_OP_head_fused, &shapes[s], &espi_backend_ref64, &espi_backend_ref64);
        problem_build(&two, ESPI_OP_head_grad, &shapes[s], ESP_F64, &espi_backend_ref64);
        two.args.head_grad.g = data_of(&fused, "g");
        two.args.head_grad.e = data_of(&fused, "e");
        two.args.head_grad.entropy = data_of(&fused, "entropy");
        problem_call(&two, &espi_backend_ref64);
        const field *d = field_find(&fused, "d_hidden");
        cr_assert_arr_eq(d->data, data_of(&two, "d_hidden"), (size_t)d->count * sizeof(double), "shape %s", shapes[s].name);
        problem_free(&fused);
        problem_free(&two);
    }
}
