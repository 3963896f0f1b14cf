/* The GRPO objective, the advantages and the head against TRL's numbers. */
#include "espalier/grpo.h"
#include "contract/head.h"
#include "core/select.h"
#include "golden.h"

#include <jansson.h>

/* Ours are sums of about 40 terms in double, theirs too, in another order. */
#define LOSS_TOLERANCE 1e-13
/* TRL's metrics and entropy gradients are float, and so are the advantages. */
#define FLOAT_TOLERANCE 1e-6

/* The inputs of losses.safetensors, [B,T], and where their counted tokens are. */
typedef struct inputs {
    espi_st_file *file;
    double *lp, *old, *ref, *entropy, *is_ratio, *is_product, *advantages;
    int64_t batch, n; /* sequences, tokens of the padded form */
    int32_t *cu, *place;
} inputs;

/* TRL takes the product of a sequence's corrections over padded places too, where a real run has 1.  This file has noise there, so that
 * vespo_is_ratio is a statement about the product: the noise goes to a counted token. */
static void fold_uncounted(double *is_ratio, const double *mask, int64_t length) {
    int64_t counted = 0;
    while (mask[counted] == 0) counted++;
    for (int64_t i = 0; i < length; i++)
        if (mask[i] == 0) is_ratio[counted] *= is_ratio[i];
}

static void pick(double *values, const int32_t *place, int32_t count) {
    for (int32_t i = 0; i < count; i++) values[i] = values[place[i]];
}

static inputs read_inputs(void) {
    inputs in = {.file = golden_open("grpo/losses.safetensors")};
    in.advantages = golden_read(in.file, "advantages", &in.batch);
    double *mask = golden_read(in.file, "mask", &in.n);
    in.cu = calloc((size_t)in.batch + 1, sizeof *in.cu);
    in.place = calloc((size_t)in.n, sizeof *in.place);
    cr_assert(in.cu && in.place);
    int32_t count = 0;
    for (int64_t s = 0, length = in.n / in.batch; s < in.batch; s++) {
        for (int64_t i = s * length; i < (s + 1) * length; i++)
            if (mask[i] != 0) in.place[count++] = (int32_t)i;
        in.cu[s + 1] = count;
    }
    double **arrays[] = {&in.lp, &in.old, &in.ref, &in.entropy, &in.is_ratio, &in.is_product};
    const char *names[] = {"lp", "old", "ref", "entropy", "is_ratio", "is_ratio"};
    for (size_t a = 0; a < 6; a++) {
        *arrays[a] = golden_read(in.file, names[a], NULL);
        for (int64_t s = 0, length = in.n / in.batch; s < in.batch && arrays[a] == &in.is_product; s++)
            fold_uncounted(in.is_product + s * length, mask + s * length, length);
        pick(*arrays[a], in.place, count);
    }
    free(mask);
    return in;
}

static void free_inputs(inputs *in) {
    double *arrays[] = {in->lp, in->old, in->ref, in->entropy, in->is_ratio, in->is_product, in->advantages};
    for (size_t a = 0; a < 7; a++) free(arrays[a]);
    free(in->cu);
    free(in->place);
    espi_st_close(in->file);
}

static double number(const json_t *params, const char *key, double standard) {
    const json_t *value = json_object_get(params, key);
    return json_is_number(value) ? json_number_value(value) : standard;
}

static esp_objective options(const json_t *params, int64_t padded_length) {
    esp_objective o = ESP_OBJECTIVE(.loss = ESP_LOSS_GRPO, .kl_grad = ESP_KL_GRAD_K3);
    const char *loss = json_string_value(json_object_get(params, "loss_type"));
    if (loss) cr_assert_eq(esp_loss_type_parse(&o.loss, loss), ESP_OK, "%s", esp_last_error());
    const char *level = json_string_value(json_object_get(params, "importance_sampling_level"));
    if (level && !strcmp(level, "sequence")) o.level = ESP_IS_SEQUENCE;
    o.epsilon_low = (float)number(params, "epsilon_low", 0);
    o.epsilon_high = (float)number(params, "epsilon_high", 0);
    o.delta = (float)number(params, "delta", 0);
    o.beta = (float)number(params, "beta", 0);
    o.kl_bias_correction = json_is_true(json_object_get(params, "use_bias_correction_kl"));
    o.sapo_temperature_pos = (float)number(params, "sapo_temperature_pos", 0);
    o.sapo_temperature_neg = (float)number(params, "sapo_temperature_neg", 0);
    o.vespo_k_pos = (float)number(params, "vespo_k_pos", 0);
    o.vespo_lambda_pos = (float)number(params, "vespo_lambda_pos", 0);
    o.vespo_k_neg = (float)number(params, "vespo_k_neg", 0);
    o.vespo_lambda_neg = (float)number(params, "vespo_lambda_neg", 0);
    o.off_policy_mask_threshold = (float)number(params, "off_policy_mask_threshold", 0);
    o.top_entropy_quantile = (float)number(params, "top_entropy_quantile", 0);
    o.entropy_coef = (float)number(params, "entropy_coef", 0);
    o.max_completion_length = (int32_t)number(params, "max_completion_length", (double)padded_length);
    return o;
}

/* expected [B,T] with zeros where nothing counts. */
static double error_of(const inputs *in, const char *key, const double *coefficients) {
    double *expected = golden_read(in->file, key, NULL);
    double *got = calloc((size_t)in->n, sizeof *got);
    cr_assert_not_null(got);
    for (int32_t i = 0; i < in->cu[in->batch]; i++) got[in->place[i]] = coefficients[i];
    const double error = golden_error(got, expected, in->n);
    free(expected);
    free(got);
    return error;
}

static void check_metric(const char *name, const json_t *metrics, const char *key, double got) {
    const json_t *value = json_object_get(metrics, key);
    if (!json_is_number(value)) return;
    const double expected = json_number_value(value);
    cr_expect(fabs(got - expected) <= FLOAT_TOLERANCE, "%s: %s is %.9g, expected %.9g", name, key, got, expected);
}

static void check_case(const inputs *in, const char *name, const json_t *about) {
    const json_t *params = json_object_get(about, "params"), *metrics = json_object_get(about, "metrics");
    const esp_objective objective = options(params, in->n / in->batch);
    const int32_t count = in->cu[in->batch];
    const double *is_ratio = objective.loss == ESP_LOSS_VESPO ? in->is_product : in->is_ratio;
    const double accumulated = number(params, "grad_accum", 1);
    double *g = calloc((size_t)count, sizeof *g), *e = calloc((size_t)count, sizeof *e);
    cr_assert(g && e);
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    const esp_status status = esp_objective_coefficients(
        &objective, (int32_t)in->batch, in->cu, in->lp, json_is_true(json_object_get(params, "no_old")) ? NULL : in->old, in->ref,
        json_is_true(json_object_get(params, "is_ratio")) ? is_ratio : NULL, in->entropy, in->advantages,
        count * accumulated / number(params, "steps_per_generation", 1), (double)in->batch * accumulated, g, e, &stats);
    cr_assert_eq(status, ESP_OK, "%s: %s", name, esp_last_error());

    char key[128];
    snprintf(key, sizeof key, "%s.loss64", name);
    const double loss = golden_scalar(in->file, key), loss_error = fabs(stats.loss - loss);
    cr_expect(loss_error <= LOSS_TOLERANCE * fmax(1, fabs(loss)), "%s: loss %.17g, expected %.17g", name, stats.loss, loss);
    snprintf(key, sizeof key, "%s.dlp64", name);
    const double g_error = error_of(in, key, g);
    cr_expect(g_error <= LOSS_TOLERANCE, "%s: d loss / d logprob is off by %.3g of its largest", name, g_error);
    snprintf(key, sizeof key, "%s.dentropy", name);
    if (espi_st_find(in->file, key)) {
        const double e_error = error_of(in, key, e);
        cr_expect(e_error <= FLOAT_TOLERANCE, "%s: d loss / d entropy is off by %.3g of its largest", name, e_error);
    }
    check_metric(name, metrics, "kl", stats.kl);
    check_metric(name, metrics, "entropy", stats.entropy);
    check_metric(name, metrics, "policy_loss", stats.policy_loss);
    check_metric(name, metrics, "clip_ratio/low_mean", stats.clip_low);
    check_metric(name, metrics, "clip_ratio/high_mean", stats.clip_high);
    check_metric(name, metrics, "clip_ratio/region_mean", stats.clip_low + stats.clip_high);
    check_metric(name, metrics, "cispo_clip_ratio", stats.clip_high);
    free(g);
    free(e);
}

Test(golden_grpo, every_loss_and_option) {
    inputs in = read_inputs();
    json_error_t error;
    json_t *report = json_load_file(ESP_SOURCE_DIR "/tests/golden/data/grpo/report.json", 0, &error);
    cr_assert_not_null(report, "report.json: %s", error.text);
    const char *name;
    json_t *about;
    json_t *cases = json_object_get(report, "cases");
    json_object_foreach(cases, name, about) check_case(&in, name, about);
    cr_expect_eq(json_object_size(cases), 43, "%zu cases, expected 43", json_object_size(cases));
    json_decref(report);
    free_inputs(&in);
}

static void check_advantages(const espi_st_file *file, const char *prefix, const double *weights, const char *key,
                             esp_advantage_scale scale, esp_advantage_order order) {
    char name[96];
    int64_t count, n;
    snprintf(name, sizeof name, "%srewards_per_func", prefix);
    double *rewards = golden_read(file, name, &count);
    snprintf(name, sizeof name, "%sadv.%s", prefix, key);
    double *expected = golden_read(file, name, &n), *got = calloc((size_t)n, sizeof *got), *total = calloc((size_t)n, sizeof *total);
    double *deviation = calloc((size_t)n, sizeof *deviation);
    cr_assert(got && total && deviation);
    const int64_t group = (int64_t)golden_scalar(file, "num_generations");
    cr_assert_eq(esp_advantages(got, total, deviation, rewards, weights, n / group, group, count / n, scale, order), ESP_OK, "%s",
                 esp_last_error());
    const double error = golden_error(got, expected, n);
    cr_expect(error <= FLOAT_TOLERANCE, "%s: off by %.3g of the largest", name, error);
    snprintf(name, sizeof name, "%sadv_std.%s", prefix, key);
    double *expected_deviation = golden_read(file, name, NULL);
    const double deviation_error = golden_error(deviation, expected_deviation, n);
    cr_expect(deviation_error <= FLOAT_TOLERANCE, "%s: off by %.3g of the largest", name, deviation_error);
    for (int64_t i = 0; i < n; i++) {
        bool scored = false;
        for (int64_t f = 0; f < count / n; f++) scored |= !isnan(rewards[i * (count / n) + f]);
        cr_expect_eq(isnan(total[i]), !scored, "%s: row %lld has the sum %g", name, (long long)i, total[i]);
        if (!scored) cr_expect_eq(got[i], 0, "%s: row %lld was not scored and has the advantage %g", name, (long long)i, got[i]);
    }
    free(rewards);
    free(expected);
    free(expected_deviation);
    free(got);
    free(total);
    free(deviation);
}

Test(golden_grpo, advantages) {
    espi_st_file *file = golden_open("grpo/advantages.safetensors");
    double *weights = golden_read(file, "reward_weights", NULL);
    const char *prefixes[] = {"", "binary."};
    for (int b = 0; b < 2; b++) {
        const double *w = b == 0 ? weights : NULL;
        check_advantages(file, prefixes[b], w, "sum_then_normalize.none", ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE);
        check_advantages(file, prefixes[b], w, "sum_then_normalize.group", ESP_SCALE_GROUP, ESP_SUM_THEN_NORMALIZE);
        check_advantages(file, prefixes[b], w, "sum_then_normalize.batch", ESP_SCALE_BATCH, ESP_SUM_THEN_NORMALIZE);
        check_advantages(file, prefixes[b], w, "normalize_then_sum.group", ESP_SCALE_GROUP, ESP_NORMALIZE_THEN_SUM);
    }
    free(weights);
    espi_st_close(file);
}

/* Hidden states to log-probability, entropy, and both gradients, at a temperature; `limit` relative to the largest. */
static void check_head(const espi_st_file *file, const char *backend, const char *prefix, double temperature, double limit) {
    esp_ctx *ctx;
    cr_assert_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend)), ESP_OK, "%s", esp_last_error());
    const bool wide = ctx->real == ESP_F64;
    int64_t values, n, weights;
    double *hidden = golden_read(file, "hidden", &values), *targets = golden_read(file, "targets", &n);
    double *w = golden_read(file, "W", &weights);
    const int64_t width = values / n;
    float *w32 = malloc((size_t)weights * sizeof *w32);
    double *x = calloc((size_t)values, sizeof *x), *d_hidden = calloc((size_t)values, sizeof *d_hidden);
    int32_t *rows = calloc((size_t)n, sizeof *rows), *target = calloc((size_t)n, sizeof *target);
    double *reals[5]; /* lp, entropy, lse, a coefficient, zeros */
    for (int i = 0; i < 5; i++) cr_assert_not_null(reals[i] = calloc((size_t)n, sizeof *reals[i]));
    cr_assert(w32 && x && d_hidden && rows && target);
    for (int64_t i = 0; i < weights; i++) w32[i] = (float)w[i];
    for (int64_t i = 0; i < values; i++) espi_real_set(x, i, hidden[i], ctx->real);
    for (int64_t i = 0; i < n; i++) {
        rows[i] = (int32_t)i;
        target[i] = (int32_t)targets[i];
    }
    const espi_head head = {.hidden = x,
                            .rows = rows,
                            .target = target,
                            .w = {w32, ESP_F32, weights / width, width},
                            .n = n,
                            .temperature = temperature,
                            .logit_scale = 1};
    const size_t bytes = 1 << 24;
    void *memory = aligned_alloc(64, bytes);
    espi_arena arena = espi_arena_over(memory, bytes);
    const espi_head_stats stats = {.head = head, .lp = reals[0], .entropy = reals[1], .lse = reals[2]};
    cr_assert_eq(espi_op_head_stats(ctx, &arena, &stats), ESP_OK, "%s", esp_last_error());
    static const struct {
        const char *value, *coefficient, *gradient;
    } kinds[] = {{"lp", "coef_lp", "dh_lp"}, {"entropy", "coef_entropy", "dh_entropy"}};
    for (int k = 0; k < 2; k++) {
        double *coefficient = golden_read(file, kinds[k].coefficient, NULL);
        for (int64_t i = 0; i < n; i++) espi_real_set(reals[3], i, coefficient[i], ctx->real);
        const espi_head_grad grad = {.head = head,
                                     .d_hidden = d_hidden,
                                     .g = reals[k == 0 ? 3 : 4],
                                     .e = reals[k == 0 ? 4 : 3],
                                     .lse = reals[2],
                                     .entropy = reals[1]};
        cr_assert_eq(espi_op_head_grad(ctx, &arena, &grad), ESP_OK, "%s", esp_last_error());
        const char *const names[] = {kinds[k].value, kinds[k].gradient};
        const void *const got[] = {reals[k], d_hidden};
        for (int i = 0; i < 2; i++) {
            char key[64];
            int64_t count;
            snprintf(key, sizeof key, "%s.%s%s", prefix, names[i], wide ? "64" : "");
            double *expected = golden_read(file, key, &count), *ours = malloc((size_t)count * sizeof *ours);
            cr_assert_not_null(ours);
            for (int64_t j = 0; j < count; j++) ours[j] = espi_real_get(got[i], j, ctx->real);
            const double error = golden_error(ours, expected, count);
            cr_expect(error <= limit, "%s on %s: off by %.3g of its largest, limit %.3g", key, backend, error, limit);
            free(expected);
            free(ours);
        }
        free(coefficient);
    }
    void *all[] = {hidden, targets, w, w32, x, d_hidden, rows, target, memory};
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) free(all[i]);
    for (int i = 0; i < 5; i++) free(reals[i]);
    esp_ctx_destroy(ctx);
}

Test(golden_grpo, head) {
    espi_st_file *file = golden_open("grpo/head.safetensors");
    static const char *const backends[] = {"ref64", "ref", "auto"};
    for (int b = 0; b < 3; b++)
        for (int t = 0; t < 2; t++) /* double: 157 terms in another order; float: the data's own forward tolerance */
            check_head(file, backends[b], t ? "t07" : "t1", t ? 0.7 : 1.0, b == 0 ? 1e-13 : 2e-5);
    espi_st_close(file);
}
