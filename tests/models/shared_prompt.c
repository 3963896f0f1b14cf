/* A group's prompt computed once, against the same prompt before each completion: log-probabilities to the bit, loss and every gradient to
 * the rounding of sums taken in another order; and what a batch with prefixes must promise beyond that. */
#include "espalier/espalier.h"
#include "kernels/backend.h"
#include "lora_wave.h"
#include "models/model.h"

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>

enum { GROUPS = 4, MEMBERS = 9, TOKENS = 4096, SEQS = 64 };

/* Groups of completions of the lengths given (0: no more), behind prompts of `prompt` tokens.  apart: the completions stand in turn, one of
 * each group after the other, behind all the prompts. */
typedef struct layout {
    const char *name;
    bool apart;
    struct {
        int prompt, completions[MEMBERS];
    } groups[GROUPS];
} layout;

static const layout layouts[] = {
    {"one group, ragged", false, {{9, {5, 1, 7}}}},
    {"groups of one", false, {{6, {4}}, {1, {3}}}},
    {"several groups", false, {{4, {3, 6}}, {11, {2, 2, 8, 1}}, {1, {4, 5}}, {7, {1}}}},
    {"several groups, apart", true, {{4, {3, 6}}, {11, {2, 2, 8, 1}}, {1, {4, 5}}, {7, {1}}}},
    {"prompts that end within a block of keys, at its end, and behind it", false, {{31, {40, 2}}, {32, {33, 5}}, {70, {30}}}},
};
enum { LAYOUTS = sizeof layouts / sizeof layouts[0] };

/* Long enough for every product to be spread over the threads; one family of sequences, of which attention makes tasks in two ways. */
static const layout long_group = {"long", false, {{400, {200, 190, 210, 200, 200, 200, 200, 200}}}};

/* A batch in either form.  Values of a token are those of its place in its completion, whatever the form. */
typedef struct packed {
    int32_t tokens[TOKENS], cu[SEQS + 1], prefix_of[SEQS];
    uint8_t mask[TOKENS];
    float advantage[SEQS], old[TOKENS], ref[TOKENS], ratio[TOKENS];
    int32_t where[GROUPS][MEMBERS]; /* first token of a completion */
    int32_t n_seqs;
    const layout *layout;
    esp_batch batch;
} packed;

static int members(const layout *l, int g) {
    int n = 0;
    while (n < MEMBERS && l->groups[g].completions[n]) n++;
    return n;
}

static double wave(int g, int c, int t) {
    return sin(1.0 + 3.1 * g + 1.7 * c + 0.9 * t);
}

/* Appends a token; completion: the loss counts it. */
static void put(packed *p, int g, int c, int t, bool completion) {
    const int32_t at = p->cu[p->n_seqs + 1]++;
    p->tokens[at] = (int32_t)(fabs(wave(g, completion ? c : 100, t)) * 150);
    p->mask[at] = completion;
    p->old[at] = (float)(-5 + 0.4 * wave(g, c, t + 50));
    p->ref[at] = (float)(-5 + 0.4 * wave(g, c, t + 70));
    p->ratio[at] = (float)(1 + 0.3 * wave(g, c, t + 90));
}

static void begin(packed *p, int32_t prefix, float advantage) {
    p->cu[p->n_seqs + 1] = p->cu[p->n_seqs];
    p->prefix_of[p->n_seqs] = prefix;
    p->advantage[p->n_seqs] = advantage;
}

static void put_prompt(packed *p, int g) {
    for (int t = 0; t < p->layout->groups[g].prompt; t++) put(p, g, 0, t, false);
}

static void put_completion(packed *p, int g, int c, int32_t prefix) {
    begin(p, prefix, (float)wave(g, c, 7));
    if (prefix < 0) put_prompt(p, g);
    p->where[g][c] = p->cu[p->n_seqs + 1];
    for (int t = 0; t < p->layout->groups[g].completions[c]; t++) put(p, g, c, t, true);
    p->n_seqs++;
}

/* Groups first .. first + count - 1. */
static void pack(packed *p, const layout *l, bool shared, int first, int count) {
    int32_t prompt[GROUPS] = {-1, -1, -1, -1};
    *p = (packed){.layout = l};
    for (int turn = 0; turn < (l->apart ? 1 + MEMBERS : 1); turn++) {
        for (int g = first; g < first + count; g++) {
            if (turn == 0 && shared && members(l, g)) {
                begin(p, -1, NAN); /* never read */
                put_prompt(p, g);
                prompt[g] = p->n_seqs++;
            }
            for (int c = 0; c < members(l, g); c++)
                if (!l->apart || turn == c + 1) put_completion(p, g, c, prompt[g]);
        }
    }
    p->batch = ESP_BATCH(.tokens = p->tokens, .cu_seqlens = p->cu, .n_tokens = p->cu[p->n_seqs], .n_seqs = p->n_seqs, .loss_mask = p->mask,
                         .advantage = p->advantage, .old_logprob = p->old, .ref_logprob = p->ref, .is_ratio = p->ratio);
    if (shared) p->batch.prefix_of = p->prefix_of;
}

static int completions_of(const layout *l) {
    int n = 0;
    for (int g = 0; g < GROUPS; g++) n += members(l, g);
    return n;
}
static double counted_of(const layout *l) {
    double n = 0;
    for (int g = 0; g < GROUPS; g++)
        for (int c = 0; c < members(l, g); c++) n += l->groups[g].completions[c];
    return n;
}

typedef struct subject {
    esp_ctx *ctx;
    esp_model *model;
} subject;

static const struct {
    const char *folder;
    esp_qformat experts;
} models[] = {{"q3a", ESP_NF4}, {"go1", ESP_MXFP4}, {"ol", ESP_FP4}, {"mx", ESP_Q_NONE}}; /* go1: sinks, a window of 5; mx: one of 7 */
enum { MODELS = sizeof models / sizeof models[0] };

static subject load(int model, const char *backend, int threads, esp_model_config config) {
    subject s;
    char dir[ESPI_PATH_MAX];
    snprintf(dir, sizeof dir, "%s/tests/golden/data/%s/model", ESP_SOURCE_DIR, models[model].folder);
    config.experts = models[model].experts;
    config.lora_rank = 3;
    config.train_router = true;
    OK(esp_ctx_create(&s.ctx, &ESP_CTX_CONFIG(.backend = backend, .threads = threads)));
    OK(esp_model_load(&s.model, s.ctx, dir, &config));
    lora_wave(s.model);
    return s;
}

static void drop(subject *s) {
    esp_model_destroy(s->model);
    esp_ctx_destroy(s->ctx);
}

/* Every gradient of a model, sinks and routers included: arrays one after the other. */
enum { ARRAYS = 64 };
typedef struct gradients {
    char name[ARRAYS][64];
    int64_t count[ARRAYS];
    double *values[ARRAYS];
    int n;
} gradients;

static void keep(gradients *all, const char *name, int64_t layer, const void *data, int64_t count, esp_dtype dtype) {
    if (!data) return;
    cr_assert_lt(all->n, ARRAYS);
    double *values = all->values[all->n] = malloc((size_t)count * sizeof *values);
    cr_assert_not_null(values);
    for (int64_t i = 0; i < count; i++) values[i] = dtype == ESP_F64 ? ((const double *)data)[i] : ((const float *)data)[i];
    snprintf(all->name[all->n], sizeof all->name[0], "%s %lld", name, (long long)layer);
    all->count[all->n++] = count;
}

static gradients gradients_of(const subject *s) {
    gradients all = {.n = 0};
    for (int64_t i = 0; i < esp_model_param_count(s->model); i++) {
        esp_param p = ESP_PARAM_INIT;
        OK(esp_model_param_get(s->model, i, &p));
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        keep(&all, p.name, i, p.grad, esp_tensor_count(&view), p.dtype);
    }
    const espi_config *c = &s->model->config;
    for (int64_t l = 0; l < c->layers; l++) {
        keep(&all, "router", l, s->model->layers[l].d_router, c->experts * c->hidden, s->ctx->real);
        keep(&all, "sinks", l, s->model->layers[l].d_sinks, c->heads, s->ctx->real);
    }
    return all;
}

static void forget(gradients *all) {
    for (int i = 0; i < all->n; i++) free(all->values[i]);
}

/* Each array within `tolerance` of its largest value; 0: the same bits. */
static void compare(const gradients *got, const gradients *want, double tolerance, const char *what) {
    cr_assert_eq(got->n, want->n);
    for (int i = 0; i < want->n; i++) {
        double worst = 0, largest = 0;
        for (int64_t j = 0; j < want->count[i]; j++) {
            worst = fmax(worst, fabs(got->values[i][j] - want->values[i][j]));
            largest = fmax(largest, fabs(want->values[i][j]));
            if (isnan(got->values[i][j])) worst = NAN;
        }
        cr_expect(!!(worst <= tolerance * largest) && largest > 0, "%s: gradient %s is off by %.3g of %.3g", what, want->name[i], worst,
                  largest);
    }
}

static double loss_of(subject *s, packed *p, const esp_objective *objective, esp_tensor *d_hidden) {
    esp_tensor hidden;
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    double loss;
    p->batch.objective = objective;
    OK(esp_model_forward(s->model, &p->batch, &hidden));
    if (!objective) {
        OK(esp_model_cross_entropy(s->model, &p->batch, &hidden, &loss, d_hidden));
        return loss;
    }
    OK(esp_grpo_loss(s->model, &p->batch, &hidden, d_hidden, &stats));
    return stats.loss;
}

/* Adds the gradient of one batch. */
static double accumulate(subject *s, packed *p, const esp_objective *objective) {
    esp_tensor d_hidden;
    const double loss = loss_of(s, p, objective, &d_hidden);
    OK(esp_model_backward(s->model, &p->batch, &d_hidden));
    return loss;
}

/* Log-probabilities of the completions' tokens, completion after completion, and entropies behind them. */
static int logprobs(float *out, subject *s, packed *p) {
    static float lp[TOKENS], entropy[TOKENS];
    esp_tensor hidden;
    int n = 0;
    OK(esp_model_forward_only(s->model, &p->batch, &hidden));
    OK(esp_model_logprob(s->model, &p->batch, &hidden, 0.8F, lp, entropy));
    for (int g = 0; g < GROUPS; g++) {
        for (int c = 0; c < members(p->layout, g); c++) {
            for (int t = 0; t < p->layout->groups[g].completions[c]; t++) {
                out[n++] = lp[p->where[g][c] + t];
                out[n++] = entropy[p->where[g][c] + t];
            }
        }
    }
    return n;
}

#define LOSS(...)                                                                                                                          \
    { .struct_size = sizeof(esp_objective), __VA_ARGS__ }
static const struct {
    const char *name;
    esp_objective objective;
} objectives[] = {
    {"dapo, KL, entropy bonus, a temperature", LOSS(.loss = ESP_LOSS_DAPO, .beta = 0.04F, .entropy_coef = 0.01F, .temperature = 0.8F)},
    {"grpo", LOSS(.loss = ESP_LOSS_GRPO)},
    {"bnpo", LOSS(.loss = ESP_LOSS_BNPO)},
    {"dr_grpo", LOSS(.loss = ESP_LOSS_DR_GRPO)},
    {"gspo (two passes of the head)", LOSS(.loss = ESP_LOSS_GRPO, .level = ESP_IS_SEQUENCE)},
    {"luspo", LOSS(.loss = ESP_LOSS_LUSPO, .level = ESP_IS_SEQUENCE)},
};
enum { OBJECTIVES = sizeof objectives / sizeof objectives[0] };

/* Sums over a few hundred tokens in another order: some units in the last place of the largest value. */
static double tolerance_of(const subject *s) {
    return s->ctx->real == ESP_F64 ? 1e-12 : 4e-6;
}
/* Products of bf16 round a prompt's gradient once for all its completions, or once for each: some places of bf16 after two layers, most in
 * the keys' gradients, which are what is left of a cancellation, since those of a query's scores sum to 0. */
static double gradient_tolerance(const subject *s) {
    return s->ctx->backends[0]->bf16_products ? 0x1p-5 : tolerance_of(s);
}

/* objective NULL: cross-entropy. */
static void same_gradients(subject *s, const layout *l, const esp_objective *objective, const char *what) {
    static packed repeated, shared;
    char text[256];
    snprintf(text, sizeof text, "%s, %s, %s", s->ctx->backends[0]->name, l->name, what);
    pack(&repeated, l, false, 0, GROUPS);
    pack(&shared, l, true, 0, GROUPS);
    OK(esp_model_zero_grad(s->model));
    const double want_loss = accumulate(s, &repeated, objective);
    gradients want = gradients_of(s);
    OK(esp_model_zero_grad(s->model));
    const double loss = accumulate(s, &shared, objective);
    gradients got = gradients_of(s);
    cr_expect(!!(fabs(loss - want_loss) <= tolerance_of(s) * fmax(1, fabs(want_loss))), "%s: loss %.17g, expected %.17g", text, loss,
              want_loss);
    compare(&got, &want, gradient_tolerance(s), text);
    forget(&got);
    forget(&want);
}

static void same_logprobs(subject *s, const layout *l) {
    static packed repeated, shared;
    static float want[2 * TOKENS], got[2 * TOKENS];
    pack(&repeated, l, false, 0, GROUPS);
    pack(&shared, l, true, 0, GROUPS);
    cr_expect_leq(shared.batch.n_tokens, repeated.batch.n_tokens);
    const int n = logprobs(want, s, &repeated);
    cr_assert_eq(n, 2 * (int)counted_of(l));
    cr_assert_eq(logprobs(got, s, &shared), n);
    for (int i = 0; i < n; i++) cr_expect(want[i] != 0 || i % 2, "%s, %s: nothing computed", s->ctx->backends[0]->name, l->name);
    cr_expect(memcmp(got, want, (size_t)n * sizeof *got) == 0, "%s, %s: other log-probabilities", s->ctx->backends[0]->name, l->name);
}

static const char *const backend_names[] = {"ref64", "ref", "cpu-generic", "cpu-avx2", "cpu-avx512", "cpu-avx512_bf16"};
enum { CASES = MODELS * 6 };

ParameterizedTestParameters(shared_prompt, equals_repeated) {
    static int index[CASES];
    for (int i = 0; i < CASES; i++) index[i] = i;
    return cr_make_param_array(int, index, CASES);
}

ParameterizedTest(int *index, shared_prompt, equals_repeated, .timeout = 120) {
    const char *backend = backend_names[*index / MODELS];
    esp_ctx *ctx;
    if (esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend)) != ESP_OK) cr_skip("%s", esp_last_error());
    esp_ctx_destroy(ctx);
    subject s = load(*index % MODELS, backend, 1, ESP_MODEL_CONFIG(0));
    const bool blocks = strncmp(backend, "cpu", 3) == 0 || *index % MODELS == 0; /* the references have none, and take long */
    for (int l = 0; l < LAYOUTS - !blocks; l++) {
        same_logprobs(&s, &layouts[l]);
        same_gradients(&s, &layouts[l], NULL, "cross-entropy");
        same_gradients(&s, &layouts[l], &objectives[l % OBJECTIVES].objective, objectives[l % OBJECTIVES].name);
    }
    drop(&s);
}

/* Each kind of loss, and each order of the sequences. */
Test(shared_prompt, every_objective) {
    subject s = load(0, "ref64", 1, ESP_MODEL_CONFIG(0));
    for (int o = 0; o < OBJECTIVES; o++)
        for (int l = 2; l < 4; l++) same_gradients(&s, &layouts[l], &objectives[o].objective, objectives[o].name);
    drop(&s);
}

/* A step cut into micro-batches of one group each, one of them with its prompts repeated: the gradient of the whole. */
Test(shared_prompt, micro_batches_add_up) {
    static packed whole, part;
    const layout *l = &layouts[2];
    subject s = load(0, "ref64", 1, ESP_MODEL_CONFIG(0));
    for (int o = 0; o < 2; o++) {
        pack(&whole, l, false, 0, GROUPS);
        OK(esp_model_zero_grad(s.model));
        accumulate(&s, &whole, &objectives[o].objective);
        gradients want = gradients_of(&s);
        OK(esp_model_zero_grad(s.model));
        for (int g = 0; g < GROUPS; g++) {
            pack(&part, l, g != 1, g, 1);
            part.batch.step_tokens = counted_of(l);
            part.batch.step_seqs = completions_of(l);
            accumulate(&s, &part, &objectives[o].objective);
        }
        gradients got = gradients_of(&s);
        compare(&got, &want, 1e-12, objectives[o].name);
        forget(&got);
        forget(&want);
    }
    drop(&s);
}

/* A group without spread of its rewards may be left out, as long as its tokens stay in the normaliser. */
Test(shared_prompt, leaving_out_a_group_of_zero_advantage) {
    static packed all, rest;
    static const esp_objective dapo = LOSS(.loss = ESP_LOSS_DAPO);
    const layout *l = &layouts[2];
    for (int backend = 0; backend < 2; backend++) {
        subject s = load(0, backend ? "cpu" : "ref64", 1, ESP_MODEL_CONFIG(0));
        pack(&all, l, true, 0, GROUPS);
        for (int32_t i = 0; i < all.n_seqs; i++)
            if (all.prefix_of[i] == all.prefix_of[all.n_seqs - 1]) all.advantage[i] = 0;
        OK(esp_model_zero_grad(s.model));
        accumulate(&s, &all, &dapo);
        gradients want = gradients_of(&s);
        pack(&rest, l, true, 0, GROUPS - 1);
        rest.batch.step_tokens = counted_of(l);
        rest.batch.step_seqs = completions_of(l);
        OK(esp_model_zero_grad(s.model));
        accumulate(&s, &rest, &dapo);
        gradients got = gradients_of(&s);
        compare(&got, &want, backend ? 4e-6 : 0, "without the group");
        forget(&got);
        forget(&want);
        drop(&s);
    }
}

#define AUX 0.02
#define Z 0.01
static double loss_with_router(subject *s, packed *p, const esp_objective *objective) {
    esp_tensor d_hidden;
    double aux, z;
    const double loss = loss_of(s, p, objective, &d_hidden);
    OK(esp_model_router_losses(s->model, &aux, &z));
    return loss + AUX * aux + Z * z;
}

/* Central differences of the loss, router losses included, by every stride-th parameter. */
static void check_differences(int model, const esp_objective *objective, int64_t stride) {
    static packed p;
    const double h = 1e-5;
    subject s = load(model, "ref64", 1, ESP_MODEL_CONFIG(.router_aux_coef = AUX, .router_z_coef = Z));
    pack(&p, &layouts[3], true, 0, GROUPS);
    accumulate(&s, &p, objective);
    gradients all = gradients_of(&s);
    for (int64_t i = 0; i < esp_model_param_count(s.model); i++) {
        esp_param param = ESP_PARAM_INIT;
        OK(esp_model_param_get(s.model, i, &param));
        double *data = param.data, worst = 0, largest = 0;
        for (int64_t j = 0; j < all.count[i]; j++) largest = fmax(largest, fabs(all.values[i][j]));
        cr_expect(largest > 0, "%s: gradient is zero everywhere", param.name);
        for (int64_t j = i % stride; j < all.count[i]; j += stride) {
            const double before = data[j];
            data[j] = before + h;
            const double up = loss_with_router(&s, &p, objective);
            data[j] = before - h;
            const double down = loss_with_router(&s, &p, objective);
            data[j] = before;
            worst = fmax(worst, fabs((up - down) / (2 * h) - all.values[i][j]));
        }
        cr_expect(!!(worst <= 1e-6 * largest), "%s, %s: difference %g of the largest gradient %g", models[model].folder, param.name, worst,
                  largest);
    }
    forget(&all);
    drop(&s);
}

Test(shared_prompt, differences, .timeout = 120) {
    static const esp_objective wide = LOSS(.loss = ESP_LOSS_DAPO, .epsilon_low = 1, .epsilon_high = 1e6F); /* nothing is clipped */
    for (int m = 0; m < 2; m++) check_differences(m, m ? NULL : &wide, 521);
}

/* Gradients of one batch by a model made so; same bits or not. */
static gradients gradients_by(const char *backend, int threads, esp_model_config config, packed *p) {
    subject s = load(1, backend, threads, config);
    accumulate(&s, p, &objectives[0].objective);
    gradients all = gradients_of(&s);
    drop(&s);
    return all;
}

static void same_bits(gradients a, gradients b, const char *what) {
    compare(&a, &b, 0, what);
    forget(&a);
    forget(&b);
}

Test(shared_prompt, threads_keep_the_bits, .timeout = 60) {
    static packed p;
    pack(&p, &long_group, true, 0, GROUPS);
    for (int threads = 2; threads < 5; threads++)
        same_bits(gradients_by("cpu", threads, ESP_MODEL_CONFIG(0), &p), gradients_by("cpu", 1, ESP_MODEL_CONFIG(0), &p), "more threads");
}

Test(shared_prompt, checkpointing_keeps_the_bits) {
    static packed p;
    pack(&p, &layouts[3], true, 0, GROUPS);
    same_bits(gradients_by("cpu", 1, ESP_MODEL_CONFIG(.activation_budget = 1), &p), gradients_by("cpu", 1, ESP_MODEL_CONFIG(0), &p),
              "recomputing every layer");
}

/* Where nobody has a prefix, saying so changes nothing. */
Test(shared_prompt, no_prefix_is_no_change) {
    static packed with, without;
    pack(&with, &layouts[2], false, 0, GROUPS);
    pack(&without, &layouts[2], false, 0, GROUPS);
    with.batch.prefix_of = with.prefix_of;
    same_bits(gradients_by("cpu", 1, ESP_MODEL_CONFIG(0), &with), gradients_by("cpu", 1, ESP_MODEL_CONFIG(0), &without), "prefix_of of -1");
}

Test(shared_prompt, planned_is_taken) {
    static packed p;
    subject s = load(0, "cpu", 1, ESP_MODEL_CONFIG(0));
    esp_plan plan = ESP_PLAN_INIT;
    esp_memory memory = ESP_MEMORY_INIT;
    char dir[ESPI_PATH_MAX];
    snprintf(dir, sizeof dir, "%s/tests/golden/data/q3a/model", ESP_SOURCE_DIR);
    pack(&p, &layouts[2], true, 0, GROUPS);
    OK(esp_plan_folder(&plan, s.ctx, dir, &ESP_MODEL_CONFIG(.experts = ESP_NF4, .lora_rank = 3, .train_router = true), NULL,
                       p.batch.n_tokens, p.n_seqs));
    accumulate(&s, &p, &objectives[0].objective);
    OK(esp_ctx_memory(s.ctx, &memory));
    cr_expect_eq(memory.activations_used, plan.activations, "used %zu, planned %zu", memory.activations_used, plan.activations);
    cr_expect_eq(memory.activations, plan.activations);
    drop(&s);
}

static void refused(subject *s, const packed *p, esp_status expected, const char *words) {
    esp_tensor hidden;
    const esp_status status = esp_model_forward(s->model, &p->batch, &hidden);
    cr_expect_eq(status, expected, "%s: got %s", words, esp_status_name(status));
    cr_expect(status == ESP_OK || strstr(esp_last_error(), words), "%s: not in: %s", words, esp_last_error());
}

Test(shared_prompt, refusals) {
    static packed p, q;
    subject s = load(0, "cpu", 1, ESP_MODEL_CONFIG(0));
    esp_tensor hidden, d_hidden;
    pack(&p, &layouts[2], true, 0, GROUPS); /* sequences 0: a prompt, 1, 2: its completions, 3: a prompt, .. */
    p.prefix_of[1] = 1;
    refused(&s, &p, ESP_ERR_ARG, "prefix_of[1]: got 1, expected -1 or a sequence before");
    p.prefix_of[1] = -2;
    refused(&s, &p, ESP_ERR_ARG, "prefix_of[1]: got -2");
    p.prefix_of[1] = 0;
    p.prefix_of[2] = 1;
    refused(&s, &p, ESP_ERR_ARG, "prefix_of[2]: got sequence 1, which has a prefix itself (0)");
    p.prefix_of[2] = 0;
    s.model->config.max_position = p.cu[2] - 1;
    refused(&s, &p, ESP_ERR_ARG, "sequence 1 has 7 tokens, expected at most the model's context of 6");
    s.model->config.max_position = 4096;
    refused(&s, &p, ESP_OK, "");

    p.mask[0] = 1;
    OK(esp_model_forward(s.model, &p.batch, &hidden));
    double loss;
    cr_expect_eq(esp_model_cross_entropy(s.model, &p.batch, &hidden, &loss, &d_hidden), ESP_ERR_ARG);
    cr_expect_not_null(strstr(esp_last_error(), "loss_mask[0]"), "%s", esp_last_error());
    p.mask[0] = 0;
    OK(esp_model_cross_entropy(s.model, &p.batch, &hidden, &loss, &d_hidden));
    q = p;
    q.batch.prefix_of = q.prefix_of;
    q.prefix_of[2] = -1;
    cr_expect_eq(esp_model_backward(s.model, &q.batch, &d_hidden), ESP_ERR_STATE);
    cr_expect_not_null(strstr(esp_last_error(), "prefix_of[2]"), "%s", esp_last_error());
    q.batch.prefix_of = NULL;
    cr_expect_eq(esp_model_backward(s.model, &q.batch, &d_hidden), ESP_ERR_STATE);
    OK(esp_model_backward(s.model, &p.batch, &d_hidden));
    drop(&s);
}

/* Without a mask everything counts that has something before it: also the first token of a completion. */
Test(shared_prompt, counted_without_a_mask) {
    static packed p;
    static float lp[TOKENS];
    subject s = load(0, "cpu", 1, ESP_MODEL_CONFIG(0));
    esp_tensor hidden;
    pack(&p, &layouts[0], true, 0, GROUPS);
    p.batch.loss_mask = NULL;
    OK(esp_model_forward_only(s.model, &p.batch, &hidden));
    OK(esp_model_logprob(s.model, &p.batch, &hidden, 1, lp, NULL));
    for (int32_t t = 0; t < p.batch.n_tokens; t++) cr_expect_eq(lp[t] != 0, t > 0, "token %d: %g", t, (double)lp[t]);
    drop(&s);
}
