/* espalier verify: grpo/.  Losses and their coefficients, advantages, and the head's gradients. */
#include "cli/verify.h"
#include "contract/head.h"
#include "core/select.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* One case of losses.safetensors: what differs from the defaults of the golden data's README. */
typedef struct loss_case {
    const char *name;
    esp_objective objective;
    bool no_old, is_ratio;
    double grad_accum, steps_per_generation; /* 0 = 1 */
} loss_case;

#define CASE(case_name, ...)                                                                                                               \
    {                                                                                                                                      \
        .name = (case_name), .objective = {.kl_grad = ESP_KL_GRAD_K3, __VA_ARGS__ }                                                        \
    }
#define CASE_WITH(case_name, extra, ...)                                                                                                   \
    { .name = (case_name), .objective = {.kl_grad = ESP_KL_GRAD_K3, __VA_ARGS__}, extra }

static const loss_case loss_cases[] = {
    CASE("grpo", .loss = ESP_LOSS_GRPO),
    CASE("grpo_kl", .loss = ESP_LOSS_GRPO, .beta = 0.04f),
    CASE("bnpo", .loss = ESP_LOSS_BNPO),
    CASE("bnpo_kl", .loss = ESP_LOSS_BNPO, .beta = 0.04f),
    CASE("dr_grpo", .loss = ESP_LOSS_DR_GRPO),
    CASE("dr_grpo_kl", .loss = ESP_LOSS_DR_GRPO, .beta = 0.04f),
    CASE("dapo", .loss = ESP_LOSS_DAPO),
    CASE("dapo_kl", .loss = ESP_LOSS_DAPO, .beta = 0.04f),
    CASE("cispo", .loss = ESP_LOSS_CISPO, .epsilon_high = 1.15f),
    CASE("cispo_kl", .loss = ESP_LOSS_CISPO, .epsilon_high = 1.15f, .beta = 0.04f),
    CASE("sapo", .loss = ESP_LOSS_SAPO),
    CASE("sapo_kl", .loss = ESP_LOSS_SAPO, .beta = 0.04f),
    CASE("luspo", .loss = ESP_LOSS_LUSPO),
    CASE("luspo_kl", .loss = ESP_LOSS_LUSPO, .beta = 0.04f),
    CASE("vespo", .loss = ESP_LOSS_VESPO),
    CASE("vespo_kl", .loss = ESP_LOSS_VESPO, .beta = 0.04f),
    CASE("cispo_high5", .loss = ESP_LOSS_CISPO, .epsilon_high = 5),
    CASE("luspo_seq", .loss = ESP_LOSS_LUSPO, .level = ESP_IS_SEQUENCE),
    CASE("luspo_seq_kl", .loss = ESP_LOSS_LUSPO, .level = ESP_IS_SEQUENCE, .beta = 0.04f),
    CASE("gspo", .loss = ESP_LOSS_GRPO, .level = ESP_IS_SEQUENCE, .epsilon_low = 0.03f, .epsilon_high = 0.04f),
    CASE("gspo_kl", .loss = ESP_LOSS_GRPO, .level = ESP_IS_SEQUENCE, .epsilon_low = 0.03f, .epsilon_high = 0.04f, .beta = 0.04f),
    CASE("gspo_dapo", .loss = ESP_LOSS_DAPO, .level = ESP_IS_SEQUENCE, .epsilon_low = 0.03f, .epsilon_high = 0.04f),
    CASE("sapo_seq", .loss = ESP_LOSS_SAPO, .level = ESP_IS_SEQUENCE),
    CASE("cispo_seq", .loss = ESP_LOSS_CISPO, .level = ESP_IS_SEQUENCE, .epsilon_high = 1.02f),
    CASE("grpo_clip_higher", .loss = ESP_LOSS_GRPO, .epsilon_high = 0.28f),
    CASE("grpo_delta", .loss = ESP_LOSS_GRPO, .delta = 1.3f),
    CASE("grpo_delta_seq", .loss = ESP_LOSS_GRPO, .delta = 1.02f, .level = ESP_IS_SEQUENCE),
    CASE("grpo_kl_bias_corrected", .loss = ESP_LOSS_GRPO, .beta = 0.04f, .kl_bias_correction = true),
    CASE("grpo_kl_bias_corrected_seq", .loss = ESP_LOSS_GRPO, .beta = 0.04f, .kl_bias_correction = true, .level = ESP_IS_SEQUENCE),
    CASE_WITH("grpo_no_old", .no_old = true, .loss = ESP_LOSS_GRPO),
    CASE_WITH("grpo_accum4", .grad_accum = 4, .loss = ESP_LOSS_GRPO),
    {"dapo_accum4_spg8", {.kl_grad = ESP_KL_GRAD_K3, .loss = ESP_LOSS_DAPO}, .grad_accum = 4, .steps_per_generation = 8},
    CASE("dr_grpo_len64", .loss = ESP_LOSS_DR_GRPO, .max_completion_length = 64),
    CASE_WITH("grpo_is_ratio", .is_ratio = true, .loss = ESP_LOSS_GRPO),
    CASE_WITH("dapo_is_ratio_kl", .is_ratio = true, .loss = ESP_LOSS_DAPO, .beta = 0.04f),
    CASE_WITH("vespo_is_ratio", .is_ratio = true, .loss = ESP_LOSS_VESPO),
    CASE("vespo_params", .loss = ESP_LOSS_VESPO, .vespo_k_pos = 1.5f, .vespo_lambda_pos = 2, .vespo_k_neg = 2.5f, .vespo_lambda_neg = 1),
    CASE("sapo_temps", .loss = ESP_LOSS_SAPO, .sapo_temperature_pos = 0.8f, .sapo_temperature_neg = 1.6f),
    CASE("grpo_off_policy_mask", .loss = ESP_LOSS_GRPO, .off_policy_mask_threshold = 0.01f),
    CASE("grpo_entropy_bonus", .loss = ESP_LOSS_GRPO, .entropy_coef = 0.01f),
    CASE("dapo_entropy_bonus_kl", .loss = ESP_LOSS_DAPO, .entropy_coef = 0.02f, .beta = 0.04f),
    CASE("grpo_top_entropy", .loss = ESP_LOSS_GRPO, .top_entropy_quantile = 0.37f),
    CASE("grpo_top_entropy_bonus", .loss = ESP_LOSS_GRPO, .top_entropy_quantile = 0.37f, .entropy_coef = 0.01f),
};

/* The counted tokens of the padded arrays, sequence after sequence. */
typedef struct counted {
    int64_t rows, width, n;
    int32_t *cu;
    int64_t *place; /* [n] in the padded array */
    double *lp, *old, *ref, *is_ratio, *entropy, *g, *e;
    double *is_product; /* is_ratio with a row's uncounted factors moved to its first counted token */
} counted;

static double *gather(const counted *c, const espi_array *from) {
    if (!from || from->n != c->rows * c->width) return NULL;
    double *out = espi_cli_memory((size_t)c->n * sizeof *out);
    for (int64_t i = 0; i < c->n; i++) out[i] = from->v[c->place[i]];
    return out;
}

/* The reference takes the product of a sequence's corrections over its padding too, where a real run has 1 and this file has noise: for a
 * loss that uses the product (vespo) the noise goes to a counted token. */
static double *fold_uncounted(const counted *c, const espi_array *is_ratio, const espi_array *mask) {
    double *out = gather(c, is_ratio);
    for (int64_t i = 0; out && i < mask->n; i++) {
        const int64_t row = i / c->width;
        if (mask->v[i] == 0 && c->cu[row + 1] > c->cu[row]) out[c->cu[row]] *= is_ratio->v[i];
    }
    return out;
}

static counted count_tokens(const espi_arrays *file, const espi_array *mask) {
    counted c = {.rows = mask->dims[0], .width = mask->dims[1]};
    c.cu = espi_cli_memory((size_t)(c.rows + 1) * sizeof *c.cu);
    c.place = espi_cli_memory((size_t)mask->n * sizeof *c.place);
    for (int64_t i = 0; i < mask->n; i++) {
        if (mask->v[i] != 0) c.place[c.n++] = i;
        c.cu[i / c.width + 1] = (int32_t)c.n;
    }
    c.lp = gather(&c, espi_arrays_find(file, "lp"));
    c.old = gather(&c, espi_arrays_find(file, "old"));
    c.ref = gather(&c, espi_arrays_find(file, "ref"));
    c.is_ratio = gather(&c, espi_arrays_find(file, "is_ratio"));
    c.is_product = fold_uncounted(&c, espi_arrays_find(file, "is_ratio"), mask);
    c.entropy = gather(&c, espi_arrays_find(file, "entropy"));
    c.g = espi_cli_memory((size_t)c.n * sizeof *c.g);
    c.e = espi_cli_memory((size_t)c.n * sizeof *c.e);
    return c;
}

static void free_counted(counted *c) {
    free(c->cu);
    free(c->place);
    free(c->lp);
    free(c->old);
    free(c->ref);
    free(c->is_ratio);
    free(c->is_product);
    free(c->entropy);
    free(c->g);
    free(c->e);
}

static void scatter(espi_arrays *got, const counted *c, const double *from, const char *name, const char *key) {
    double *out = espi_arrays_add(got, c->rows * c->width, "%s.%s", name, key);
    for (int64_t i = 0; i < c->n; i++) out[c->place[i]] = from[i];
}

static esp_status run_case(espi_arrays *got, const loss_case *lc, const counted *c, const double *advantage) {
    esp_objective objective = lc->objective;
    objective.struct_size = sizeof objective;
    if (objective.max_completion_length == 0) objective.max_completion_length = (int32_t)c->width;
    const double accum = lc->grad_accum > 0 ? lc->grad_accum : 1, spg = lc->steps_per_generation > 0 ? lc->steps_per_generation : 1;
    const double *is_ratio = !lc->is_ratio ? NULL : objective.loss == ESP_LOSS_VESPO ? c->is_product : c->is_ratio;
    esp_grpo_stats stats = ESP_GRPO_STATS_INIT;
    ESPI_TRY(esp_objective_coefficients(&objective, (int32_t)c->rows, c->cu, c->lp, lc->no_old ? NULL : c->old,
                                        objective.beta != 0 ? c->ref : NULL, is_ratio, c->entropy, advantage, (double)c->n * accum / spg,
                                        (double)c->rows * accum, c->g, c->e, &stats));
    static const char *const widths[] = {"", "64"};
    for (int i = 0; i < ESPI_COUNT(widths); i++) {
        char key[16];
        espi_arrays_put(got, &stats.loss, ESP_F64, 1, "%s.loss%s", lc->name, widths[i]);
        snprintf(key, sizeof key, "dlp%s", widths[i]);
        scatter(got, c, c->g, lc->name, key);
        snprintf(key, sizeof key, "dentropy%s", widths[i]);
        scatter(got, c, c->e, lc->name, key);
    }
    return ESP_OK;
}

/* The whole computation is in double, so values of the f64 run are held to 1e-9; those of the f32 run to the usual limits, but a loss whose
 * terms cancel may be further from the f32 value than that value is from its own f64 run: then twice that distance. */
static double limit_of(const espi_verify *v, espi_rule rule, const espi_arrays *file, const espi_array *want) {
    if (want->dtype == ESP_F64) return 1e-9;
    const double usual = espi_verify_limit(v, rule, want->dtype);
    const espi_array *wide = espi_arrays_find(file, "%s64", want->name);
    if (rule != ESPI_RULE_FORWARD || !wide || want->n != 1) return usual;
    return fmax(usual, 2 * fabs(want->v[0] - wide->v[0]) / fabs(want->v[0]));
}

static bool is_loss_input(const char *name) {
    return !strchr(name, '.');
}

static bool known_case(const char *name) {
    const size_t length = strcspn(name, ".");
    for (int i = 0; i < ESPI_COUNT(loss_cases); i++)
        if (strlen(loss_cases[i].name) == length && strncmp(loss_cases[i].name, name, length) == 0) return true;
    return false;
}

static void verify_losses(espi_verify *v, const espi_arrays *file) {
    const espi_array *mask = espi_arrays_find(file, "mask"), *advantage = espi_arrays_find(file, "advantages");
    if (!mask || mask->rank != 2 || !advantage || advantage->n != mask->dims[0]) {
        espi_verify_fail(v, "losses.safetensors", "mask [B,T] or advantages [B] is missing");
        return;
    }
    counted c = count_tokens(file, mask);
    espi_arrays got = {0};
    for (int i = 0; i < ESPI_COUNT(loss_cases); i++) {
        if (!espi_arrays_find(file, "%s.loss", loss_cases[i].name)) continue;
        esp_status status = run_case(&got, &loss_cases[i], &c, advantage->v);
        if (status != ESP_OK) espi_verify_error(v, loss_cases[i].name, status);
    }
    for (int64_t i = 0; i < file->n; i++) {
        const espi_array *want = &file->items[i], *a = espi_arrays_find(&got, "%s", want->name);
        if (is_loss_input(want->name)) continue;
        espi_rule rule = strstr(want->name, ".loss") ? ESPI_RULE_FORWARD : ESPI_RULE_GRADIENT;
        if (a && a->n == want->n)
            espi_verify_compare(v, "losses/", want->name, rule, limit_of(v, rule, file, want), a->v, want->v, want->n);
        else if (known_case(want->name))
            espi_verify_array(v, "losses/", rule, a, want);
        else
            espi_verify_skip(v, want->name, "a case that this version does not know");
    }
    espi_arrays_free(&got);
    free_counted(&c);
}

/* ---- advantages ---- */

typedef struct scaling {
    const char *name;
    esp_advantage_scale scale;
    esp_advantage_order order;
} scaling;

static const scaling scalings[] = {
    {"sum_then_normalize.group", ESP_SCALE_GROUP, ESP_SUM_THEN_NORMALIZE},
    {"sum_then_normalize.batch", ESP_SCALE_BATCH, ESP_SUM_THEN_NORMALIZE},
    {"sum_then_normalize.none", ESP_SCALE_NONE, ESP_SUM_THEN_NORMALIZE},
    {"normalize_then_sum.group", ESP_SCALE_GROUP, ESP_NORMALIZE_THEN_SUM},
    {"normalize_then_sum.batch", ESP_SCALE_BATCH, ESP_NORMALIZE_THEN_SUM},
    {"normalize_then_sum.none", ESP_SCALE_NONE, ESP_NORMALIZE_THEN_SUM},
};

/* "PREFIXadv.NAME" or its deviation, "PREFIXadv_std.NAME". */
static void compare_rows(espi_verify *v, const espi_arrays *file, const char *prefix, const char *kind, const char *name, const double *got,
                         int64_t n) {
    char key[96];
    snprintf(key, sizeof key, "%s%s.%s", prefix, kind, name);
    const espi_array *want = espi_arrays_find(file, "%s", key);
    if (!want)
        espi_verify_fail(v, key, "the reference is missing");
    else
        espi_verify_compare(v, "advantages/", key, ESPI_RULE_FORWARD, espi_verify_limit(v, ESPI_RULE_FORWARD, want->dtype), got, want->v,
                            want->n == n ? n : 0);
}

static void verify_advantage_set(espi_verify *v, const espi_arrays *file, const char *prefix, bool weighted) {
    const espi_array *rewards = espi_arrays_find(file, "%srewards_per_func", prefix), *size = espi_arrays_find(file, "num_generations");
    const espi_array *weights = weighted ? espi_arrays_find(file, "reward_weights") : NULL;
    if (!rewards || rewards->rank != 2 || !size || !(size->v[0] >= 1)) {
        espi_verify_fail(v, "advantages.safetensors", "rewards_per_func or num_generations is missing");
        return;
    }
    const int64_t n = rewards->dims[0], group = (int64_t)size->v[0];
    double *advantage = espi_cli_memory((size_t)n * sizeof *advantage), *deviation = espi_cli_memory((size_t)n * sizeof *deviation);
    for (int i = 0; i < ESPI_COUNT(scalings); i++) {
        const espi_array *want = espi_arrays_find(file, "%sadv.%s", prefix, scalings[i].name);
        if (!want) continue;
        esp_status status = esp_advantages(advantage, NULL, deviation, rewards->v, weights ? weights->v : NULL, n / group, group,
                                           rewards->dims[1], scalings[i].scale, scalings[i].order);
        if (status != ESP_OK) {
            espi_verify_error(v, want->name, status);
            continue;
        }
        compare_rows(v, file, prefix, "adv", scalings[i].name, advantage, n);
        compare_rows(v, file, prefix, "adv_std", scalings[i].name, deviation, n);
    }
    free(advantage);
    free(deviation);
}

static void verify_advantages(espi_verify *v, const espi_arrays *file) {
    verify_advantage_set(v, file, "", true);
    if (espi_arrays_find(file, "binary.rewards_per_func")) verify_advantage_set(v, file, "binary.", false);
}

/* ---- head ---- */

typedef struct head_run {
    espi_verify *v;
    const espi_array *hidden, *w, *targets, *coef_lp, *coef_entropy;
    const float *weight;
    const char *prefix;
    double temperature;
    espi_arrays *got;
} head_run;

static esp_status head_gradient(const head_run *h, espi_arena *arena, espi_head_grad *op, const double *g, const double *e,
                                const char *key) {
    esp_ctx *ctx = h->v->ctx;
    const int64_t n = op->head.n;
    for (int64_t i = 0; i < n && !arena->dry; i++) {
        espi_real_set((void *)op->g, i, g ? g[i] : 0, ctx->real);
        espi_real_set((void *)op->e, i, e ? e[i] : 0, ctx->real);
    }
    ESPI_TRY(espi_op_head_grad(ctx, arena, op));
    if (!arena->dry) espi_arrays_put(h->got, op->d_hidden, ctx->real, h->hidden->n, "%s.%s", h->prefix, key);
    return ESP_OK;
}

static esp_status walk_head(void *user, espi_arena *arena) {
    const head_run *h = user;
    esp_ctx *ctx = h->v->ctx;
    const int64_t n = h->hidden->dims[0], width = h->hidden->dims[1];
    int32_t *rows, *target;
    void *hidden, *lp, *entropy, *lse, *g, *e, *d_hidden;
    void **const scalars[] = {&lp, &entropy, &lse, &g, &e};
    ESPI_TRY(espi_arena_take(arena, (size_t)n * sizeof *rows, &rows));
    ESPI_TRY(espi_arena_take(arena, (size_t)n * sizeof *target, &target));
    ESPI_TRY(espi_arena_take(arena, (size_t)(n * width) * ctx->real_size, &hidden));
    ESPI_TRY(espi_arena_take(arena, (size_t)(n * width) * ctx->real_size, &d_hidden));
    for (int i = 0; i < ESPI_COUNT(scalars); i++) ESPI_TRY(espi_arena_take(arena, (size_t)n * ctx->real_size, scalars[i]));
    for (int64_t i = 0; i < n && !arena->dry; i++) {
        rows[i] = (int32_t)i;
        target[i] = (int32_t)h->targets->v[i];
    }
    for (int64_t i = 0; i < n * width && !arena->dry; i++) espi_real_set(hidden, i, h->hidden->v[i], ctx->real);
    const espi_head head = {.hidden = hidden,
                            .rows = rows,
                            .target = target,
                            .w = {h->weight, ESP_F32, h->w->dims[0], width},
                            .n = n,
                            .temperature = h->temperature,
                            .logit_scale = 1};
    const espi_head_stats stats = {head, lp, entropy, lse};
    ESPI_TRY(espi_op_head_stats(ctx, arena, &stats));
    espi_head_grad grad = {head, d_hidden, g, e, lse, entropy};
    ESPI_TRY(head_gradient(h, arena, &grad, h->coef_lp->v, NULL, "dh_lp"));
    ESPI_TRY(head_gradient(h, arena, &grad, NULL, h->coef_entropy->v, "dh_entropy"));
    if (arena->dry) return ESP_OK;
    espi_arrays_put(h->got, lp, ctx->real, n, "%s.lp", h->prefix);
    espi_arrays_put(h->got, entropy, ctx->real, n, "%s.entropy", h->prefix);
    return ESP_OK;
}

static void compare_head(espi_verify *v, const espi_arrays *got, const espi_array *want) {
    if (!strchr(want->name, '.')) return; /* an input */
    if (strstr(want->name, ".dW_")) {
        espi_verify_skip(v, want->name, "the head's weight is frozen: it has no gradient");
        return;
    }
    size_t length = strlen(want->name);
    if (length > 2 && strcmp(want->name + length - 2, "64") == 0) length -= 2;
    const espi_rule rule = strstr(want->name, ".dh_") ? ESPI_RULE_GRADIENT : ESPI_RULE_FORWARD;
    espi_verify_array(v, "head/", rule, espi_arrays_find(got, "%.*s", (int)length, want->name), want);
}

static void verify_head(espi_verify *v, const espi_arrays *file) {
    espi_arrays got = {0};
    head_run h = {.v = v, .got = &got};
    h.hidden = espi_arrays_find(file, "hidden");
    h.w = espi_arrays_find(file, "W");
    h.targets = espi_arrays_find(file, "targets");
    h.coef_lp = espi_arrays_find(file, "coef_lp");
    h.coef_entropy = espi_arrays_find(file, "coef_entropy");
    if (!h.hidden || !h.w || !h.targets || !h.coef_lp || !h.coef_entropy) {
        espi_verify_fail(v, "head.safetensors", "hidden, W, targets, coef_lp or coef_entropy is missing");
        return;
    }
    float *weight = espi_array_f32(h.w);
    h.weight = weight;
    static const struct {
        const char *prefix;
        double temperature;
    } heads[] = {{"t1", 1}, {"t07", 0.7}};
    for (int i = 0; i < ESPI_COUNT(heads); i++) {
        h.prefix = heads[i].prefix;
        h.temperature = heads[i].temperature;
        esp_status status = espi_verify_walk(v, walk_head, &h);
        if (status != ESP_OK) espi_verify_error(v, heads[i].prefix, status);
    }
    for (int64_t i = 0; i < file->n; i++) compare_head(v, &got, &file->items[i]);
    free(weight);
    espi_arrays_free(&got);
}

void espi_verify_grpo(espi_verify *v, const char *dir) {
    static const struct {
        const char *name;
        void (*verify)(espi_verify *v, const espi_arrays *file);
    } files[] = {{"losses.safetensors", verify_losses}, {"advantages.safetensors", verify_advantages}, {"head.safetensors", verify_head}};
    for (int i = 0; i < ESPI_COUNT(files); i++) {
        espi_arrays file;
        if (espi_verify_open(v, &file, dir, files[i].name)) files[i].verify(v, &file);
        espi_arrays_free(&file);
    }
}
