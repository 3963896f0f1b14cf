/* The contract on bits: what a row becomes depends neither on the rows beside it nor on how many there are.  Each row-wise op runs a batch
 * at once, and again row by row (and in two pieces), on every backend.  Then what several ops must agree on. */
#include "cases.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <string.h>

/* T, H, E, K, I, R, V, Hq, Hk, D. */
static const shape shapes[] = {
    {"rows, small", 7, 24, 4, 2, 12, 4, 61, 4, 2, 8, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .extras = true},
    {"rows, odd", 33, 65, 6, 3, 31, 5, 130, 3, 1, 18, ROUTE_SKEWED, ESP_FP4, ESP_F32, .renormalise = true},
    {"rows, wide", 70, 128, 8, 2, 64, 16, 300, 8, 4, 32, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .nested = true, .extras = true},
    {"rows, many", 250, 24, 4, 2, 12, 4, 300, 4, 2, 8, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .renormalise = true, .extras = true},
    {"rows, as gpt-oss", 45, 64, 6, 3, 32, 4, 90, 4, 2, 16, ROUTE_RANDOM, ESP_MXFP4, ESP_BF16, AS_GPT_OSS, .window = 7},
    {"rows, sigmoid", 170, 40, 9, 3, 19, 3, 90, 3, 1, 20, ROUTE_SKEWED, ESP_NF4, ESP_F32, SIGMOID_RULE, .renormalise = true, .window = 30},
    {"rows, shared prefixes", 250, 24, 4, 2, 12, 4, 61, 4, 2, 32, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true, .sinks = true,
     .repeated = true},
    {"rows, shared prefixes and windows", 250, 24, 4, 2, 12, 4, 61, 4, 2, 16, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .shared = true,
     .window = 41},
    {"rows, one key", 150, 24, 4, 2, 12, 4, 61, 4, 2, 32, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .sinks = true, .window = 1, .clamped = true},
    {"rows, forced and filtered", 70, 140, 8, 2, 12, 4, 300, 4, 2, 8, ROUTE_RANDOM, ESP_NF4, ESP_BF16, .forced = true, .filtered = true},
    {"rows, packed", 70, 128, 4, 2, 64, 16, 61, 2, 2, 8, ROUTE_SKEWED, ESP_NF4, ESP_F32, .packed = true, .nested = true},
    {"rows, packed, as gpt-oss", 61, 64, 3, 2, 64, 3, 61, 2, 2, 8, ROUTE_RANDOM, ESP_MXFP4, ESP_F32, AS_GPT_OSS, .packed = true},
    {"rows, packed, deep", 70, 2112, 2, 1, 64, 16, 61, 2, 2, 8, ROUTE_ONE, ESP_NF4, ESP_F32, .packed = true},
    {"rows, packed, deep, as gpt-oss", 70, 2112, 2, 1, 64, 3, 61, 2, 2, 8, ROUTE_ONE, ESP_MXFP4, ESP_F32, AS_GPT_OSS, .packed = true},
};
enum { SHAPES = sizeof shapes / sizeof shapes[0] };

/* A batch that has run, and the same batch again, its arrays as they were before. */
typedef struct twice {
    problem whole, pieces;
    const espi_backend *backend;
    size_t size; /* of one real */
} twice;

static bool begin(twice *t, espi_op_id op, const shape *shape, const espi_backend *backend) {
    const char *refusal = NULL;
    t->backend = backend;
    t->size = esp_dtype_size(backend->real);
    problem_build(&t->whole, op, shape, backend->real, &espi_backend_ref);
    problem_build(&t->pieces, op, shape, backend->real, &espi_backend_ref);
    problem_pack(&t->whole, backend);
    problem_pack(&t->pieces, backend);
    cr_assert_eq(op_cases[op].run(backend, &t->whole, 2, &refusal), ESP_OK, "%s", esp_last_error());
    return refusal == NULL;
}

static void end(twice *t, bool ran) {
    for (int i = 0; ran && i < t->whole.n_fields; i++) {
        const field *a = &t->whole.fields[i], *b = &t->pieces.fields[i];
        cr_expect(memcmp(a->data, b->data, (size_t)a->count * esp_dtype_size(a->dtype)) == 0,
                  "%s on %s, shape %s, seed %llu, array %s: rows are not bit-equal when the batch is cut", op_cases[t->whole.op].name,
                  t->backend->name, t->whole.shape.name, (unsigned long long)t->whole.seed, a->name);
    }
    problem_free(&t->whole);
    problem_free(&t->pieces);
}

/* Runs t->pieces with `args` in place of its own, on one thread. */
static void piece(twice *t, const any_args *args) {
    const any_args own = t->pieces.args;
    const char *refusal = NULL;
    t->pieces.args = *args;
    const esp_status status = op_cases[t->pieces.op].run(t->backend, &t->pieces, 1, &refusal);
    cr_assert(status == ESP_OK && !refusal, "%s on %s takes the batch but not its piece: %s", op_cases[t->pieces.op].name, t->backend->name,
              refusal ? refusal : esp_last_error());
    t->pieces.args = own;
}

/* p + n elements of the backend's real; const is given up because one helper serves inputs and outputs. */
static void *plus(const twice *t, const void *p, int64_t n) {
    return p ? (char *)(uintptr_t)p + (size_t)n * t->size : NULL;
}

/* Cuts of T rows: one at a time, and in two pieces. */
static int64_t cut(int64_t first, int64_t rows, bool singly) {
    if (singly) return first + 1;
    return first < rows / 3 ? rows / 3 : rows;
}

/* Narrows a call to rows first..next-1 of its batch. */
typedef void narrow_fn(const twice *t, any_args *args, int64_t first, int64_t next);

static void narrow_norm(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_rmsnorm_fwd *a = &args->rmsnorm_fwd;
    a->x = plus(t, a->x, first * a->n);
    a->y = plus(t, a->y, first * a->n);
    a->rstd = plus(t, a->rstd, first);
    a->rows = next - first;
}

static void narrow_rope(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_rope *a = &args->rope_fwd;
    a->x = plus(t, a->x, first * a->heads * a->head_dim);
    a->cos = plus(t, a->cos, first * a->half);
    a->sin = plus(t, a->sin, first * a->half);
    a->tokens = next - first;
}

static void narrow_swiglu(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_swiglu_fwd *a = &args->swiglu_fwd;
    a->act = plus(t, a->act, first * a->width);
    a->gu = plus(t, a->gu, first * 2 * a->width);
    a->rows = next - first;
}

static void narrow_swiglu_bwd(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_swiglu_bwd *a = &args->swiglu_bwd;
    a->d_gu = plus(t, a->d_gu, first * 2 * a->width);
    a->gu = plus(t, a->gu, first * 2 * a->width);
    a->d_act = plus(t, a->d_act, first * a->width);
    a->rows = next - first;
}

static void narrow_linear(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_linear_fwd *a = &args->linear_fwd;
    a->x = plus(t, a->x, first * a->w.cols);
    a->y = plus(t, a->y, first * a->w.rows);
    a->u = plus(t, a->u, first * a->lora.r);
    a->tokens = next - first;
}

static void narrow_router(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_router_fwd *a = &args->router_fwd;
    a->x = plus(t, a->x, first * a->w.cols);
    a->logits = plus(t, a->logits, first * a->w.rows);
    a->lse = plus(t, a->lse, first);
    a->idx += first * a->top_k;
    if (a->forced) a->forced += first * a->top_k;
    a->weight = plus(t, a->weight, first * a->top_k);
    a->tokens = next - first;
}

static void narrow_head(espi_head *h, int64_t first, int64_t next) {
    h->rows += first;
    if (h->d_rows) h->d_rows += first;
    h->target += first;
    h->n = next - first;
    if (h->kept_offsets) h->kept_offsets += first;
}

static void narrow_stats(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_head_stats *a = &args->head_stats;
    narrow_head(&a->head, first, next);
    a->lp = plus(t, a->lp, first);
    a->entropy = plus(t, a->entropy, first);
    a->lse = plus(t, a->lse, first);
}

static void narrow_sample(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_head_sample *a = &args->head_sample;
    narrow_head(&a->head, first, next);
    a->token += first;
    a->uniform += first;
    if (a->kept) a->kept += first * a->kept_most;
    if (a->kept) a->kept_count += first;
    a->lp = plus(t, a->lp, first);
}

static void narrow_grad(const twice *t, any_args *args, int64_t first, int64_t next) {
    espi_head_grad *a = &args->head_grad;
    narrow_head(&a->head, first, next);
    a->g = plus(t, a->g, first);
    a->e = plus(t, a->e, first);
    a->lse = plus(t, a->lse, first);
    a->entropy = plus(t, a->entropy, first);
}

static void narrowed(const shape *s, const espi_backend *backend, bool singly, espi_op_id op, int64_t rows, narrow_fn *narrow) {
    twice t;
    shape plain = *s;
    if (op == ESPI_OP_router_fwd) plain.extras = false; /* its sums over the batch are not row-wise */
    const bool ran = begin(&t, op, &plain, backend);
    for (int64_t i = 0, next; ran && i < rows; i = next) {
        next = cut(i, rows, singly);
        any_args args = t.pieces.args;
        narrow(&t, &args, i, next);
        piece(&t, &args);
    }
    end(&t, ran);
}

/* Tokens first..next-1 routed alone: their routing, and where their rows lie in the whole batch. */
typedef struct part {
    int32_t offsets[64], row_token[512], slot_row[512], whole_row[512];
    double row_weight[512];
    espi_routing routing;
    int64_t rows;
} part;

static void route_part(part *p, const twice *t, const espi_routing *whole, int64_t first, int64_t next) {
    int32_t row = 0;
    for (int64_t e = 0; e < whole->experts; e++) {
        p->offsets[e] = row;
        for (int64_t s = whole->offsets[e]; s < whole->offsets[e + 1]; s++) {
            if (whole->row_token[s] < first || whole->row_token[s] >= next) continue;
            p->row_token[row] = whole->row_token[s] - (int32_t)first;
            memcpy((char *)p->row_weight + (size_t)row * t->size, plus(t, whole->row_weight, s), t->size);
            p->whole_row[row++] = (int32_t)s;
        }
    }
    p->offsets[whole->experts] = row;
    for (int64_t slot = first * whole->top_k; slot < next * whole->top_k; slot++)
        for (int32_t r = 0; r < row; r++)
            if (p->whole_row[r] == whole->slot_row[slot]) p->slot_row[slot - first * whole->top_k] = r;
    p->routing = (espi_routing){next - first, whole->experts, whole->top_k, p->offsets, p->row_token, p->slot_row, p->row_weight};
    p->rows = row;
}

/* Rows of a part, gathered from the whole batch's array or scattered into it. */
static void gather(const twice *t, const part *p, void *rows, const void *whole, int64_t width) {
    for (int64_t r = 0; r < p->rows; r++)
        memcpy(plus(t, rows, r * width), plus(t, whole, p->whole_row[r] * width), (size_t)width * t->size);
}
static void scatter(const twice *t, const part *p, void *whole, const void *rows, int64_t width) {
    for (int64_t r = 0; r < p->rows; r++)
        memcpy(plus(t, whole, p->whole_row[r] * width), plus(t, rows, r * width), (size_t)width * t->size);
}

enum { PART_VALUES = 70 * 2112 };
static double part_in[PART_VALUES], part_out[PART_VALUES], part_act[PART_VALUES], part_u[210 * 16];

static void gate_up_rows(const shape *s, const espi_backend *backend, bool singly) {
    twice t;
    static part p;
    const bool ran = begin(&t, ESPI_OP_gate_up_fwd, s, backend);
    for (int64_t i = 0, next; ran && i < s->tokens; i = next) {
        next = cut(i, s->tokens, singly);
        any_args args = t.pieces.args;
        espi_gate_up_fwd *a = &args.gate_up_fwd;
        route_part(&p, &t, &t.pieces.args.gate_up_fwd.routing, i, next);
        a->x = plus(&t, a->x, i * s->hidden);
        a->gu = part_out;
        a->act = part_act;
        a->u = part_u;
        a->routing = p.routing;
        piece(&t, &args);
        scatter(&t, &p, t.pieces.args.gate_up_fwd.gu, part_out, 2 * s->width);
        scatter(&t, &p, t.pieces.args.gate_up_fwd.act, part_act, s->width);
        scatter(&t, &p, t.pieces.args.gate_up_fwd.u, part_u, s->rank);
    }
    end(&t, ran);
}

static void down_rows(const shape *s, const espi_backend *backend, bool singly) {
    twice t;
    static part p;
    const bool ran = begin(&t, ESPI_OP_down_fwd, s, backend);
    for (int64_t i = 0, next; ran && i < s->tokens; i = next) {
        next = cut(i, s->tokens, singly);
        any_args args = t.pieces.args;
        espi_down_fwd *a = &args.down_fwd;
        route_part(&p, &t, &t.pieces.args.down_fwd.routing, i, next);
        gather(&t, &p, part_in, a->act, s->width);
        a->act = part_in;
        a->y = part_out;
        a->u = part_u;
        a->routing = p.routing;
        piece(&t, &args);
        scatter(&t, &p, t.pieces.args.down_fwd.y, part_out, s->hidden);
        scatter(&t, &p, t.pieces.args.down_fwd.u, part_u, s->rank);
    }
    end(&t, ran);
}

/* Each query alone against the keys before it, as the sampler does it, or every sequence alone. */
static void attention_rows(const shape *s, const espi_backend *backend, bool singly) {
    twice t;
    const bool ran = begin(&t, ESPI_OP_attention_fwd, s, backend);
    const espi_spans spans = t.pieces.args.attention_fwd.spans;
    for (int32_t q = 0; ran && q < spans.n_seqs; q++) {
        const int32_t n = spans.cu_q[q + 1] - spans.cu_q[q], step = singly ? 1 : n;
        for (int32_t i = 0; i < n; i += step) {
            const int32_t cu[] = {0, step}, start = spans.k_start[q], len = i + step;
            any_args args = t.pieces.args;
            espi_attention_fwd *a = &args.attention_fwd;
            const int64_t first = spans.cu_q[q] + i;
            a->q = plus(&t, a->q, first * s->heads * s->head_dim);
            a->out = plus(&t, a->out, first * s->heads * s->head_dim);
            a->lse = plus(&t, a->lse, first * s->heads);
            a->spans = (espi_spans){cu, &start, &len, 1, step};
            if (s->shared) {
                a->spans.prefix_start = spans.prefix_start + q;
                a->spans.prefix_len = spans.prefix_len + q;
            }
            piece(&t, &args);
        }
    }
    end(&t, ran);
}

typedef void cut_fn(const shape *s, const espi_backend *backend, bool singly);

/* Either rows that a call can simply be narrowed to, or an op that needs a walk of its own. */
static const struct {
    espi_op_id op;
    narrow_fn *narrow;
    bool head; /* a row is a counted token, not a token */
    cut_fn *walk;
} cutters[] = {
    {ESPI_OP_rmsnorm_fwd, narrow_norm, false, NULL},      {ESPI_OP_linear_fwd, narrow_linear, false, NULL},
    {ESPI_OP_router_fwd, narrow_router, false, NULL},     {ESPI_OP_head_stats, narrow_stats, true, NULL},
    {ESPI_OP_head_sample, narrow_sample, true, NULL},     {ESPI_OP_head_grad, narrow_grad, true, NULL},
    {ESPI_OP_gate_up_fwd, NULL, false, gate_up_rows},     {ESPI_OP_down_fwd, NULL, false, down_rows},
    {ESPI_OP_attention_fwd, NULL, false, attention_rows}, {ESPI_OP_rope_fwd, narrow_rope, false, NULL},
    {ESPI_OP_swiglu_fwd, narrow_swiglu, false, NULL},     {ESPI_OP_swiglu_bwd, narrow_swiglu_bwd, false, NULL},
};
enum { CUTTERS = sizeof cutters / sizeof cutters[0] };

ParameterizedTestParameters(rows, cut_batch) {
    static int index[CUTTERS];
    for (int i = 0; i < CUTTERS; i++) index[i] = i;
    return cr_make_param_array(int, index, CUTTERS);
}

ParameterizedTest(int *index, rows, cut_batch) {
    const espi_backend *all[BACKENDS];
    const int n = backends(all);
    for (int s = 0; s < SHAPES; s++) {
        for (int b = 0; b < n; b++) {
            const int64_t rows = cutters[*index].head ? (shapes[s].tokens + 1) / 2 : shapes[s].tokens;
            for (int singly = 0; singly < 2; singly++) {
                if (cutters[*index].walk)
                    cutters[*index].walk(&shapes[s], all[b], singly);
                else
                    narrowed(&shapes[s], all[b], singly, cutters[*index].op, rows, cutters[*index].narrow);
            }
        }
    }
}

/* The gradient of a LoRA, a router or sinks: all that a call adds is one sum, formed apart from what was there, so batches have the same
 * bits whether they are added up here or by several ranks. */
static void one_sum(espi_op_id op, const shape *shape, const espi_backend *backend) {
    static const char *const gradients[] = {"d_a", "d_b", "d_w", "d_sinks"};
    twice t;
    const bool ran = begin(&t, op, shape, backend);
    for (size_t g = 0; ran && g < sizeof gradients / sizeof gradients[0]; g++) {
        field *apart = field_look(&t.pieces, gradients[g]);
        if (apart) memset(apart->data, 0, (size_t)apart->count * t.size);
    }
    if (ran) piece(&t, &t.pieces.args);
    for (size_t g = 0; ran && g < sizeof gradients / sizeof gradients[0]; g++) {
        const field *apart = field_look(&t.pieces, gradients[g]), *there = field_look(&t.whole, gradients[g]);
        int64_t wrong = 0;
        for (int64_t i = 0; apart && i < apart->count; i++)
            if (t.size == sizeof(float))
                wrong += ((float *)there->data)[i] != ((float *)there->before)[i] + ((float *)apart->data)[i];
            else
                wrong += ((double *)there->data)[i] != ((double *)there->before)[i] + ((double *)apart->data)[i];
        cr_expect_eq(wrong, 0, "%s on %s, shape %s: %lld values of %s are not what was there plus one sum", op_cases[op].name,
                     backend->name, shape->name, (long long)wrong, gradients[g]);
    }
    problem_free(&t.whole);
    problem_free(&t.pieces);
}

Test(rows, gradients_get_one_sum) {
    static const espi_op_id ops[] = {ESPI_OP_linear_bwd, ESPI_OP_gate_up_bwd, ESPI_OP_down_bwd, ESPI_OP_router_bwd, ESPI_OP_attention_bwd};
    const espi_backend *all[BACKENDS];
    const int n = backends(all);
    for (size_t o = 0; o < sizeof ops / sizeof ops[0]; o++)
        for (int b = 0; b < n; b++) {
            shape large = shapes[0]; /* more rows than a kernel takes at once */
            large.name = "rows, many for one expert";
            large.tokens = 900;
            large.pattern = ROUTE_SKEWED;
            one_sum(ops[o], &large, all[b]);
            for (int s = 0; s < SHAPES; s++) one_sum(ops[o], &shapes[s], all[b]);
        }
}

/* The lists that a draw left, as the trainer gets them. */
static void give_left(espi_head *head, const problem *drawn) {
    static int64_t offsets[256];
    static int32_t kept[256 * 16];
    const espi_head_sample *a = &drawn->args.head_sample;
    for (int64_t i = 0; i < a->head.n; i++) {
        cr_assert(a->kept_count[i] > 0 && a->kept_most <= 16);
        memcpy(kept + offsets[i], a->kept + i * a->kept_most, (size_t)a->kept_count[i] * sizeof *kept);
        offsets[i + 1] = offsets[i] + a->kept_count[i];
    }
    head->kept_offsets = offsets;
    head->kept = kept;
}

/* The sampler's log-probability of the token it drew is, bit for bit, what the trainer finds for that token. */
Test(rows, sampled_log_prob_is_the_trainers) {
    const espi_backend *all[BACKENDS];
    const int n = backends(all);
    for (int b = 0; b < n; b++) {
        for (int s = 0; s < 2 * SHAPES; s++) {
            problem drawn, found;
            shape greedy = shapes[s / 2];
            greedy.in_place = s % 2 == 1;
            if (greedy.in_place) greedy.extras = greedy.filtered = false; /* greedy means temperature 1 */
            problem_run(&drawn, ESPI_OP_head_sample, &greedy, all[b], &espi_backend_ref);
            problem_build(&found, ESPI_OP_head_stats, &greedy, all[b]->real, &espi_backend_ref);
            found.args.head_stats.head.target = field_find(&drawn, "token")->data;
            if (greedy.filtered) give_left(&found.args.head_stats.head, &drawn);
            problem_call(&found, all[b]);
            const field *lp = field_find(&drawn, "lp");
            cr_expect_arr_eq(lp->data, field_find(&found, "lp")->data, (size_t)lp->count * esp_dtype_size(lp->dtype), "%s, shape %s%s",
                             all[b]->name, greedy.name, greedy.in_place ? ", greedy" : "");
            problem_free(&drawn);
            problem_free(&found);
        }
    }
}

/* dispatch against its definition: rows ascend by (expert, token), and slot_row is where a slot went; combine_bwd walks back along it. */
Test(rows, dispatch_sorts_slots) {
    const routing_pattern patterns[] = {ROUTE_RANDOM, ROUTE_EMPTY, ROUTE_ONE, ROUTE_SKEWED};
    const espi_backend *all[BACKENDS];
    const int n = backends(all);
    for (int c = 0; c < 4 * n; c++) {
        shape s = shapes[1];
        s.pattern = patterns[c % 4];
        problem p;
        problem_run(&p, ESPI_OP_dispatch, &s, all[c / 4], &espi_backend_ref);
        const espi_dispatch *a = &p.args.dispatch;
        const field *weight = field_find(&p, "weight"), *row_weight = field_find(&p, "row_weight");
        cr_expect_eq(a->offsets[0], 0);
        cr_expect_eq(a->offsets[s.experts], s.tokens * s.top_k);
        for (int64_t slot = 0; slot < s.tokens * s.top_k; slot++) {
            const int32_t row = a->slot_row[slot], e = a->idx[slot];
            cr_expect(a->offsets[e] <= row && row < a->offsets[e + 1], "%s: slot %lld lies outside its expert", all[c / 4]->name,
                      (long long)slot);
            cr_expect_eq(a->row_token[row], slot / s.top_k);
            cr_expect_eq(field_get(row_weight, row), field_get(weight, slot));
            cr_expect(row == a->offsets[e] || a->row_token[row - 1] < a->row_token[row], "%s: tokens of an expert do not ascend",
                      all[c / 4]->name);
        }
        problem_free(&p);
    }
}

/* Of equal experts the router would take the first: a forced token that has those is no flip, one with a later expert is. */
Test(rows, ties_and_flips) {
    const espi_backend *all[BACKENDS];
    const int n = backends(all);
    for (int b = 0; b < n; b++) {
        problem p;
        shape s = shapes[1];
        s.forced = s.extras = true;
        problem_build(&p, ESPI_OP_router_fwd, &s, all[b]->real, &espi_backend_ref);
        field *w = field_find(&p, "w"), *forced = field_find(&p, "forced");
        for (int64_t i = 0; i < w->count; i++) field_set(w, i, field_get(w, i % s.hidden));
        for (int64_t slot = 0; slot < forced->count; slot++)
            field_set(forced, slot, (double)(slot % s.top_k + (slot / s.top_k % 4 == 1 && slot % s.top_k == s.top_k - 1)));
        field_settle(w);
        field_settle(forced);
        const int64_t before = *p.args.router_fwd.flips;
        problem_call(&p, all[b]);
        cr_expect_eq(*p.args.router_fwd.flips - before, (s.tokens + 2) / 4, "%s", all[b]->name);
        problem_free(&p);
    }
}

/* Ties go to the lower expert, and to the lower token id. */
Test(rows, ties_go_to_the_lower_index) {
    const espi_backend *all[BACKENDS];
    const int n = backends(all);
    for (int b = 0; b < n; b++) {
        problem p;
        shape s = shapes[1];
        s.in_place = true;
        problem_build(&p, ESPI_OP_router_fwd, &s, all[b]->real, &espi_backend_ref);
        field *w = field_find(&p, "w");
        for (int64_t i = 0; i < w->count; i++) field_set(w, i, field_get(w, i % s.hidden));
        memcpy(w->before, w->data, (size_t)w->count * sizeof(float));
        problem_call(&p, all[b]);
        for (int64_t slot = 0; slot < s.tokens * s.top_k; slot++)
            cr_expect_eq(p.args.router_fwd.idx[slot], slot % s.top_k, "%s", all[b]->name);
        problem_free(&p);
        problem_build(&p, ESPI_OP_head_sample, &s, all[b]->real, &espi_backend_ref);
        w = field_find(&p, "w");
        for (int64_t i = 0; i < w->count; i++) field_set(w, i, field_get(w, i % s.hidden));
        memcpy(w->before, w->data, (size_t)w->count * sizeof(float));
        problem_call(&p, all[b]);
        for (int64_t i = 0; i < p.args.head_sample.head.n; i++) cr_expect_eq(p.args.head_sample.token[i], 0, "%s", all[b]->name);
        problem_free(&p);
    }
}
