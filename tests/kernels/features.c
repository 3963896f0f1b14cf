/* What the features of the families mean, on every backend, in cases simple enough to say the result beforehand. */
#include "cases.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>

/* T, H, E, K, I, R, V, Hq, Hk, D. */
static const shape gpt_oss = {"meaning, gpt-oss", 24, 64, 5, 2, 32, 3, 9, 4, 2, 16, ROUTE_RANDOM, ESP_MXFP4, ESP_F32, AS_GPT_OSS};
static const shape sigmoid = {"meaning, sigmoid", 3, 8, 6, 2, 8, 0, 9, 2, 2, 16, ROUTE_RANDOM, ESP_NF4, ESP_F32, SIGMOID_RULE};

/* Room for the roundings of a float sum of 64 terms of order 1; or of its terms, where products are of bf16. */
static double closeness(const espi_backend *backend) {
    return backend->bf16_products ? 0x1p-8 : 2e-6;
}

static void near(const espi_backend *backend, const char *what, int64_t i, double got, double want) {
    cr_expect(!!(fabs(got - want) <= closeness(backend) * fmax(1, fabs(want))), "%s, %s[%lld]: %.9g, expected %.9g", backend->name, what,
              (long long)i, got, want);
}

/* An input made constant, or its first `n` values given. */
static void fill(problem *p, const char *name, double value) {
    field *f = field_find(p, name);
    for (int64_t i = 0; i < f->count; i++) field_set(f, i, value);
    field_settle(f);
}
static void give(problem *p, const char *name, int n, const double *values) {
    field *f = field_find(p, name);
    for (int i = 0; i < n; i++) field_set(f, i, values[i]);
    field_settle(f);
}
static double get(problem *p, const char *name, int64_t i) {
    return field_get(field_find(p, name), i);
}

/* Each test is a function of one backend. */
static void each(void (*check)(const espi_backend *backend)) {
    const espi_backend *all[BACKENDS];
    const int n = backends(all);
    for (int i = 0; i < n; i++) check(all[i]);
}

/* Row of the key at place j before the queries of a sequence. */
static int64_t key_row(const espi_spans *spans, int32_t seq, int64_t j) {
    const int64_t prefix = spans->prefix_len ? spans->prefix_len[seq] : 0;
    return j < prefix ? spans->prefix_start[seq] + j : spans->k_start[seq] + j - prefix;
}

/* Where all scores are 0, a query's output is the sum of the values that it sees over their number and e^sink. */
static void equal_scores(const espi_backend *backend) {
    for (int c = 0; c < 16; c++) {
        shape s = gpt_oss;
        s.sinks = c & 1;
        s.decode = c & 2;
        s.window = c & 4 ? 5 : 0;
        s.shared = c & 8;
        problem p;
        problem_build(&p, ESPI_OP_attention_fwd, &s, backend->real, &espi_backend_ref);
        fill(&p, "q", 0);
        problem_call(&p, backend);
        const espi_spans *spans = &p.args.attention_fwd.spans;
        for (int32_t seq = 0; seq < spans->n_seqs; seq++) {
            for (int32_t i = spans->cu_q[seq]; i < spans->cu_q[seq + 1]; i++) {
                const int64_t last = (s.shared ? spans->prefix_len[seq] : 0) + spans->k_len[seq] - (spans->cu_q[seq + 1] - i);
                const int64_t first = s.window && last >= s.window ? last - s.window + 1 : 0;
                for (int64_t at = i * s.heads * s.head_dim; at < (i + 1) * s.heads * s.head_dim; at++) {
                    const int64_t head = at / s.head_dim % s.heads, kv_head = head / (s.heads / s.kv_heads);
                    double sum = 0, shares = (double)(last - first + 1);
                    if (s.sinks) shares += exp(get(&p, "sinks", head));
                    for (int64_t j = first; j <= last; j++)
                        sum += get(&p, "v", (key_row(spans, seq, j) * s.kv_heads + kv_head) * s.head_dim + at % s.head_dim);
                    near(backend, "out", at, get(&p, "out", at), sum / shares);
                    near(backend, "lse", i * s.heads + head, get(&p, "lse", i * s.heads + head), log(shares));
                }
            }
        }
        problem_free(&p);
    }
}
Test(features, attention_of_equal_scores) {
    each(equal_scores);
}

/* logits = bias where x is 0.  The correction ranks, but weighs nothing. */
static void sigmoid_weights(const espi_backend *backend) {
    const double bias[] = {log(3), 0, log(9), -log(3), 0, log(4)}, correction[] = {0, 0.5, -0.5, 0.4, 0.5, 0};
    const double score[] = {0.75, 0.5, 0.9, 0.25, 0.5, 0.8}; /* ranks 0.75, 1.0, 0.4, 0.65, 1.0, 0.8 */
    for (int renormalise = 0; renormalise < 2; renormalise++) {
        shape s = sigmoid;
        s.bias = true;
        s.top_k = 3;
        s.renormalise = renormalise;
        problem p;
        problem_build(&p, ESPI_OP_router_fwd, &s, backend->real, &espi_backend_ref);
        fill(&p, "x", 0);
        give(&p, "bias", 6, bias);
        give(&p, "correction", 6, correction);
        problem_call(&p, backend);
        const int chosen[] = {1, 4, 5};
        for (int64_t slot = 0; slot < 9; slot++) {
            const int e = chosen[slot % 3];
            cr_expect_eq(p.args.router_fwd.idx[slot], e, "%s: slot %lld has expert %d", backend->name, (long long)slot,
                         p.args.router_fwd.idx[slot]);
            near(backend, "weight", slot, get(&p, "weight", slot), 2.5 * (renormalise ? score[e] / 1.8 : score[e]));
        }
        near(backend, "lse", 0, get(&p, "lse", 0), log(3 + 1 + 9 + 1.0 / 3 + 1 + 4));
        problem_free(&p);
    }
}
Test(features, sigmoid_router) {
    each(sigmoid_weights);
}

/* Scores that all vanish have weights of 0, not of 0 / 0. */
static void vanished_scores(const espi_backend *backend) {
    shape s = sigmoid;
    s.bias = s.renormalise = true;
    problem p;
    problem_build(&p, ESPI_OP_router_fwd, &s, backend->real, &espi_backend_ref);
    fill(&p, "x", 0);
    fill(&p, "bias", -1000);
    problem_call(&p, backend);
    for (int64_t slot = 0; slot < s.tokens * s.top_k; slot++) cr_expect_eq(get(&p, "weight", slot), 0, "%s", backend->name);
    problem_free(&p);
}
Test(features, sigmoid_router_of_vanished_scores) {
    each(vanished_scores);
}

/* A row of zeros through an expert is the expert's bias; its gate gradient is the bias against the output's gradient. */
static void bias_of_the_expert(const espi_backend *backend) {
    problem p;
    problem_build(&p, ESPI_OP_gate_up_fwd, &gpt_oss, backend->real, &espi_backend_ref);
    fill(&p, "x", 0);
    problem_call(&p, backend);
    const int32_t *offsets = p.args.gate_up_fwd.routing.offsets;
    const int64_t gu = 2 * gpt_oss.width, hidden = gpt_oss.hidden;
    for (int64_t e = 0; e < gpt_oss.experts; e++)
        for (int64_t i = offsets[e] * gu; i < offsets[e + 1] * gu; i++)
            near(backend, "gu", i, get(&p, "gu", i), get(&p, "bias", e * gu + i % gu));
    problem_free(&p);

    problem_build(&p, ESPI_OP_down_fwd, &gpt_oss, backend->real, &espi_backend_ref);
    fill(&p, "act", 0);
    problem_call(&p, backend);
    offsets = p.args.down_fwd.routing.offsets;
    for (int64_t e = 0; e < gpt_oss.experts; e++)
        for (int64_t i = offsets[e] * hidden; i < offsets[e + 1] * hidden; i++)
            near(backend, "y", i, get(&p, "y", i), get(&p, "bias", e * hidden + i % hidden));
    problem_free(&p);

    problem_build(&p, ESPI_OP_down_bwd, &gpt_oss, backend->real, &espi_backend_ref);
    fill(&p, "gu", 0); /* of which the activation is 0 */
    problem_call(&p, backend);
    const espi_routing *routing = &p.args.down_bwd.routing;
    for (int64_t e = 0; e < gpt_oss.experts; e++) {
        for (int64_t row = routing->offsets[e]; row < routing->offsets[e + 1]; row++) {
            double product = 0;
            for (int64_t h = 0; h < hidden; h++)
                product += get(&p, "bias", e * hidden + h) * get(&p, "d_out", routing->row_token[row] * hidden + h);
            near(backend, "d_row_weight", row, get(&p, "d_row_weight", row), product);
        }
    }
    problem_free(&p);
}
Test(features, expert_bias) {
    each(bias_of_the_expert);
}

/* A gate or up value just inside its limits passes its gradient, one at a limit or beyond does not; no lower limit of the gate. */
static void limits(const espi_backend *backend) {
    const double limit = 0.5, inside = nextafterf(0.5F, 0), beyond = nextafterf(0.5F, 1);
    const double gates[] = {inside, limit, beyond, -inside, -limit, -beyond, -0.9, 0.9};
    const double ups[] = {0.25, inside, limit, beyond, -inside, -limit, -beyond, 0.9};
    for (int c = 0; c < 2; c++) {
        shape s = gpt_oss;
        s.width = 64;
        s.tokens = 1;
        s.interleaved = c == 0;
        const int64_t step = s.interleaved ? 2 : 1, up = s.interleaved ? 1 : s.width;
        problem f, b;
        problem_build(&f, ESPI_OP_swiglu_fwd, &s, backend->real, &espi_backend_ref);
        problem_build(&b, ESPI_OP_swiglu_bwd, &s, backend->real, &espi_backend_ref);
        for (int64_t i = 0; i < 64; i++) {
            for (int back = 0; back < 2; back++) {
                field *gu = field_find(back ? &b : &f, "gu");
                field_set(gu, i * step, gates[i / 8]);
                field_set(gu, i * step + up, ups[i % 8]);
                field_settle(gu);
            }
        }
        problem_call(&f, backend);
        problem_call(&b, backend);
        for (int64_t i = 0; i < 64; i++) {
            const double g = fmin(gates[i / 8], limit), u = fmax(fmin(ups[i % 8], limit), -limit), sigma = 1 / (1 + exp(-1.702 * g));
            const double d = get(&b, "d_act", i), d_gate = get(&b, "d_gu", i * step), d_up = get(&b, "d_gu", i * step + up);
            near(backend, "act", i, get(&f, "act", i), (u + 1) * g * sigma);
            near(backend, "d_gate", i, d_gate, gates[i / 8] < limit ? d * (u + 1) * sigma * (1 + 1.702 * g * (1 - sigma)) : 0);
            near(backend, "d_up", i, d_up, fabs(ups[i % 8]) < limit ? d * g * sigma : 0);
        }
        problem_free(&f);
        problem_free(&b);
    }
}
Test(features, gradient_stops_at_the_limits) {
    each(limits);
}

/* Scale byte 0 is 2^-127, which a shift into the exponent would make 0; byte 254 is 2^127. */
static void extreme_scales(const espi_backend *backend) {
    const double scale_byte[] = {0, 254}, x[] = {0x1p+120, 0x1p-120};
    for (int c = 0; c < 2; c++) {
        shape s = gpt_oss;
        s.rank = 0;
        s.bias = false;
        problem p;
        problem_build(&p, ESPI_OP_gate_up_fwd, &s, backend->real, &espi_backend_ref);
        fill(&p, "scales", scale_byte[c]);
        fill(&p, "lut", 0.5);
        fill(&p, "x", x[c]);
        problem_call(&p, backend);
        for (int64_t i = 0; i < s.tokens * s.top_k * 2 * s.width; i++)
            cr_expect_eq(get(&p, "gu", i), c ? 64 * 64.0 : 64 * 0x1p-8, "%s, scale byte %g: %a", backend->name, scale_byte[c],
                         get(&p, "gu", i));
        problem_free(&p);
    }
}
Test(features, mxfp4_scales_reach_both_ends) {
    each(extreme_scales);
}

/* What the backends of kernels/cpu do not compute would run on the reference, many times slower: none of the families may need that. */
static void takes_all(const espi_backend *backend) {
    const shape *shapes[] = {&gpt_oss, &sigmoid};
    for (int s = 0; s < 2; s++) {
        for (int op = 0; op < ESPI_OP_COUNT; op++) {
            problem p;
            const char *refusal = NULL;
            problem_build(&p, (espi_op_id)op, shapes[s], backend->real, &espi_backend_ref);
            cr_expect_eq(op_cases[op].run(backend, &p, 1, &refusal), ESP_OK, "%s", esp_last_error());
            cr_expect_null(refusal, "%s on %s, shape %s: refused: %s", op_cases[op].name, backend->name, shapes[s]->name, refusal);
            problem_free(&p);
        }
    }
}
Test(features, no_cpu_backend_refuses) {
    each(takes_all);
}
