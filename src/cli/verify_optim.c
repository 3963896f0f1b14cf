/* espalier verify: optim/.  AdamW with clipping and warm-up, its 8-bit form, the schedules. */
#include "cli/verify.h"
#include "contract/head.h"
#include "core/select.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* The cases of adamw.safetensors, as the golden data's README lists them. */
typedef struct adamw_case {
    const char *name;
    double lr, weight_decay, beta1, beta2, eps, clip; /* clip 0 = none */
    int64_t warmup;
} adamw_case;

static const adamw_case adamw_cases[] = {
    {"adamw", 1e-2, 0.01, 0.9, 0.999, 1e-8, 1, 3},
    {"adamw_nowd", 5e-3, 0, 0.9, 0.95, 1e-6, 1, 0},
    {"adamw_noclip", 1e-2, 0.1, 0.9, 0.999, 1e-8, 0, 5},
};

enum { MAX_PARAMETERS = 16 };

typedef struct adamw_run {
    espi_verify *v;
    const espi_arrays *file;
    espi_arrays *got;
    const adamw_case *c;
    const espi_array *p[MAX_PARAMETERS], *g[MAX_PARAMETERS]; /* [..], [steps,..] */
    int n_params;
    int64_t steps;
} adamw_run;

typedef struct adamw_state {
    void *p, *m, *v, *g;
} adamw_state;

static esp_status take_state(const adamw_run *r, espi_arena *arena, adamw_state *state, const espi_array *p) {
    const size_t bytes = (size_t)p->n * r->v->ctx->real_size;
    ESPI_TRY(espi_arena_take(arena, bytes, &state->p));
    ESPI_TRY(espi_arena_take(arena, bytes, &state->m));
    ESPI_TRY(espi_arena_take(arena, bytes, &state->v));
    ESPI_TRY(espi_arena_take(arena, bytes, &state->g));
    for (int64_t i = 0; i < p->n && !arena->dry; i++) {
        espi_real_set(state->p, i, p->v[i], r->v->ctx->real);
        espi_real_set(state->m, i, 0, r->v->ctx->real);
        espi_real_set(state->v, i, 0, r->v->ctx->real);
    }
    return ESP_OK;
}

/* One optimiser step over all parameters; norm, lr: [out] what it used. */
static esp_status step_all(const adamw_run *r, espi_arena *arena, adamw_state *states, int64_t step, double *norm, double *lr) {
    esp_ctx *ctx = r->v->ctx;
    double sum = 0;
    for (int i = 0; i < r->n_params; i++) {
        const int64_t n = r->p[i]->n;
        for (int64_t k = 0; k < n && !arena->dry; k++) espi_real_set(states[i].g, k, r->g[i]->v[step * n + k], ctx->real);
        const espi_sumsq op = {&sum, states[i].g, n, 1};
        ESPI_TRY(espi_op_sumsq(ctx, arena, &op));
    }
    *norm = sqrt(sum);
    *lr = r->c->lr * esp_schedule_multiplier(ESP_SCHEDULE_COSINE, step, r->c->warmup, r->steps, 0);
    const double scale = r->c->clip > 0 ? fmin(1, r->c->clip / (*norm + 1e-6)) : 1;
    for (int i = 0; i < r->n_params; i++) {
        const adamw_state *s = &states[i];
        const espi_adamw op = {.p = s->p,
                               .m = s->m,
                               .v = s->v,
                               .g = s->g,
                               .n = r->p[i]->n,
                               .step = step + 1,
                               .lr = *lr,
                               .beta1 = r->c->beta1,
                               .beta2 = r->c->beta2,
                               .eps = r->c->eps,
                               .weight_decay = r->c->weight_decay,
                               .grad_scale = scale};
        ESPI_TRY(espi_op_adamw(ctx, arena, &op));
    }
    return ESP_OK;
}

static esp_status walk_adamw(void *user, espi_arena *arena) {
    adamw_run *r = user;
    const esp_dtype real = r->v->ctx->real;
    adamw_state states[MAX_PARAMETERS];
    double *history[MAX_PARAMETERS], *norms = NULL, *lrs = NULL, norm, lr;
    for (int i = 0; i < r->n_params; i++) ESPI_TRY(take_state(r, arena, &states[i], r->p[i]));
    if (arena->dry) return step_all(r, arena, states, 0, &norm, &lr);
    for (int i = 0; i < r->n_params; i++) history[i] = espi_arrays_add(r->got, r->g[i]->n, "%s.p%d", r->c->name, i);
    norms = espi_arrays_add(r->got, r->steps, "%s.grad_norm", r->c->name);
    lrs = espi_arrays_add(r->got, r->steps, "%s.lr", r->c->name);
    for (int64_t step = 0; step < r->steps; step++) {
        ESPI_TRY(step_all(r, arena, states, step, &norms[step], &lrs[step]));
        for (int i = 0; i < r->n_params; i++)
            for (int64_t k = 0, n = r->p[i]->n; k < n; k++) history[i][step * n + k] = espi_real_get(states[i].p, k, real);
    }
    for (int i = 0; i < r->n_params; i++) {
        espi_arrays_put(r->got, states[i].m, real, r->p[i]->n, "%s.m%d", r->c->name, i);
        espi_arrays_put(r->got, states[i].v, real, r->p[i]->n, "%s.v%d", r->c->name, i);
    }
    return ESP_OK;
}

static void verify_adamw(espi_verify *v, const espi_arrays *file, const char *dir) {
    (void)dir;
    espi_arrays got = {0};
    adamw_run r = {.v = v, .file = file, .got = &got};
    for (int i = 0; i < MAX_PARAMETERS; i++) {
        r.p[i] = espi_arrays_find(file, "p%d", i);
        r.g[i] = espi_arrays_find(file, "g%d", i);
        if (!r.p[i] || !r.g[i] || r.p[i]->n == 0) break;
        r.steps = r.g[i]->n / r.p[i]->n;
        r.n_params = i + 1;
    }
    for (int i = 0; i < ESPI_COUNT(adamw_cases); i++) {
        r.c = &adamw_cases[i];
        if (!espi_arrays_find(file, "%s.p0", r.c->name)) continue;
        esp_status status = espi_verify_walk(v, walk_adamw, &r);
        if (status != ESP_OK) espi_verify_error(v, r.c->name, status);
    }
    for (int64_t i = 0; i < file->n; i++) {
        const espi_array *want = &file->items[i], *a = espi_arrays_find(&got, "%s", want->name);
        if (!strchr(want->name, '.')) continue; /* an input */
        size_t length = strlen(want->name);
        if (!a && length > 2 && strcmp(want->name + length - 2, "64") == 0) a = espi_arrays_find(&got, "%.*s", (int)length - 2, want->name);
        bool known = false;
        for (int k = 0; k < ESPI_COUNT(adamw_cases); k++)
            known = known || (strcspn(want->name, ".") == strlen(adamw_cases[k].name) &&
                              strncmp(want->name, adamw_cases[k].name, strlen(adamw_cases[k].name)) == 0);
        if (known)
            espi_verify_array(v, "adamw/", ESPI_RULE_FORWARD, a, want);
        else
            espi_verify_skip(v, want->name, "a case that this version does not know");
    }
    espi_arrays_free(&got);
}

/* ---- schedules ---- */

typedef struct schedule_case {
    const char *name;
    esp_schedule schedule;
    bool warmup;
    double num_cycles; /* 0 = the schedule's default */
} schedule_case;

static const schedule_case schedule_cases[] = {
    {"constant", ESP_SCHEDULE_CONSTANT, false, 0},
    {"constant_with_warmup", ESP_SCHEDULE_CONSTANT, true, 0},
    {"linear", ESP_SCHEDULE_LINEAR, true, 0},
    {"linear_nowarm", ESP_SCHEDULE_LINEAR, false, 0},
    {"cosine", ESP_SCHEDULE_COSINE, true, 0},
    {"cosine_half_cycles_1", ESP_SCHEDULE_COSINE, true, 1},
    {"cosine_with_restarts_3", ESP_SCHEDULE_COSINE_WITH_RESTARTS, true, 3},
};

static int64_t read_report(const json_t *report, const char *key, int64_t standard) {
    const json_t *value = json_object_get(json_object_get(report, "schedules"), key);
    return json_is_integer(value) ? (int64_t)json_integer_value(value) : standard;
}

static void verify_schedules(espi_verify *v, const espi_arrays *file, const char *dir) {
    json_t *report = espi_verify_report(dir);
    const int64_t total = read_report(report, "total_steps", 25), warmup = read_report(report, "warmup_steps", 4);
    json_decref(report);
    for (int64_t i = 0; i < file->n; i++) {
        const espi_array *want = &file->items[i];
        const schedule_case *known = NULL;
        for (int k = 0; k < ESPI_COUNT(schedule_cases); k++)
            if (strcmp(schedule_cases[k].name, want->name) == 0) known = &schedule_cases[k];
        if (!known) {
            espi_verify_skip(v, want->name, "a schedule that this version does not offer");
            continue;
        }
        double *got = espi_cli_memory((size_t)want->n * sizeof *got);
        for (int64_t n = 0; n < want->n; n++)
            got[n] = esp_schedule_multiplier(known->schedule, n, known->warmup ? warmup : 0, total, known->num_cycles);
        espi_verify_compare(v, "schedules/", want->name, ESPI_RULE_FORWARD, 1e-12, got, want->v, want->n);
        free(got);
    }
}

/* ---- 8 bit ---- */

/* Each step is made from the stored state of the step before.  The reference ran on the CPU: it decays before the update, has no sign
 * correction of the first moment, and looks codes up in cells of 2^-15, so a code may be one step off, or stand for a value within a cell.
 */
#define CELL (1.0 / 32768)

typedef struct adamw8_run {
    espi_verify *v;
    const espi_arrays *file;
    int64_t n, step;
    float *map1, *map2;
} adamw8_run;

static const espi_array *stored(const adamw8_run *r, const char *key, int64_t step) {
    return step < 0 ? NULL : espi_arrays_find(r->file, "step%lld.%s", (long long)step, key);
}

static void compare_codes(const adamw8_run *r, const char *key, const uint8_t *got, const float *map) {
    const espi_array *want = stored(r, key, r->step);
    char name[96];
    snprintf(name, sizeof name, "step%lld.%s codes further off than the reference's search", (long long)r->step, key);
    if (!want || want->n != r->n) {
        espi_verify_fail(r->v, name, "the reference is missing");
        return;
    }
    double *near = espi_cli_memory((size_t)r->n * sizeof *near);
    for (int64_t i = 0; i < r->n; i++) {
        const bool close = fabs(got[i] - want->v[i]) <= 1 || fabsf(map[got[i]] - map[(uint8_t)want->v[i]]) <= CELL;
        near[i] = close ? want->v[i] : got[i];
    }
    espi_verify_compare(r->v, "adamw8bit/", name, ESPI_RULE_EXACT, 0, near, want->v, r->n);
    free(near);
}

static void compare_values(const adamw8_run *r, const char *name, const double *got, const espi_array *want, int64_t offset, int64_t n) {
    char label[64];
    snprintf(label, sizeof label, "step%lld.%s", (long long)r->step, name);
    if (!want || want->n < offset + n)
        espi_verify_fail(r->v, label, "the reference is missing");
    else
        espi_verify_compare(r->v, "adamw8bit/", label, ESPI_RULE_FORWARD, 2e-5, got, want->v + offset, n);
}

static esp_status walk_adamw8(void *user, espi_arena *arena) {
    const adamw8_run *r = user;
    esp_ctx *ctx = r->v->ctx;
    const int64_t n = r->n, blocks = (n + 255) / 256;
    void *p, *g;
    uint8_t *state1, *state2;
    float *absmax1, *absmax2;
    ESPI_TRY(espi_arena_take(arena, (size_t)n * ctx->real_size, &p));
    ESPI_TRY(espi_arena_take(arena, (size_t)n * ctx->real_size, &g));
    ESPI_TRY(espi_arena_take(arena, (size_t)n, &state1));
    ESPI_TRY(espi_arena_take(arena, (size_t)n, &state2));
    ESPI_TRY(espi_arena_take(arena, (size_t)blocks * sizeof *absmax1, &absmax1));
    ESPI_TRY(espi_arena_take(arena, (size_t)blocks * sizeof *absmax2, &absmax2));
    const espi_array *after = espi_arrays_find(r->file, "p_after"), *gradient = espi_arrays_find(r->file, "g");
    const double *before = r->step == 0 ? espi_arrays_find(r->file, "p")->v : after->v + (r->step - 1) * n;
    const espi_array *s1 = stored(r, "state1", r->step - 1), *s2 = stored(r, "state2", r->step - 1);
    const espi_array *a1 = stored(r, "absmax1", r->step - 1), *a2 = stored(r, "absmax2", r->step - 1);
    for (int64_t i = 0; i < n && !arena->dry; i++) {
        espi_real_set(p, i, before[i], ctx->real);
        espi_real_set(g, i, gradient->v[r->step * n + i], ctx->real);
        state1[i] = s1 ? (uint8_t)s1->v[i] : 0;
        state2[i] = s2 ? (uint8_t)s2->v[i] : 0;
        absmax1[i / 256] = a1 ? (float)a1->v[i / 256] : 0;
        absmax2[i / 256] = a2 ? (float)a2->v[i / 256] : 0;
    }
    const espi_adamw8 op = {.p = p,
                            .state1 = state1,
                            .state2 = state2,
                            .absmax1 = absmax1,
                            .absmax2 = absmax2,
                            .g = g,
                            .map1 = r->map1,
                            .map2 = r->map2,
                            .n = n,
                            .step = r->step + 1,
                            .lr = 1e-2,
                            .beta1 = 0.9,
                            .beta2 = 0.999,
                            .eps = 1e-8,
                            .weight_decay = 0.01,
                            .grad_scale = 1};
    ESPI_TRY(espi_op_adamw8(ctx, arena, &op));
    if (arena->dry) return ESP_OK;
    espi_arrays values = {0};
    espi_arrays_put(&values, p, ctx->real, n, "p");
    espi_arrays_put(&values, absmax1, ESP_F32, blocks, "absmax1");
    espi_arrays_put(&values, absmax2, ESP_F32, blocks, "absmax2");
    compare_values(r, "p_after", values.items[0].v, after, r->step * n, n);
    compare_values(r, "absmax1", values.items[1].v, stored(r, "absmax1", r->step), 0, blocks);
    compare_values(r, "absmax2", values.items[2].v, stored(r, "absmax2", r->step), 0, blocks);
    espi_arrays_free(&values);
    compare_codes(r, "state1", state1, r->map1);
    compare_codes(r, "state2", state2, r->map2);
    return ESP_OK;
}

static void verify_adamw8(espi_verify *v, const espi_arrays *file, const char *dir) {
    (void)dir;
    const espi_array *p = espi_arrays_find(file, "p"), *g = espi_arrays_find(file, "g"), *after = espi_arrays_find(file, "p_after");
    const espi_array *map1 = espi_arrays_find(file, "qmap1"), *map2 = espi_arrays_find(file, "qmap2");
    if (!p || !g || !after || !map1 || !map2 || p->n == 0 || after->n != g->n || map1->n != 256 || map2->n != 256) {
        espi_verify_fail(v, "adamw8bit.safetensors", "p, g, p_after, qmap1 or qmap2 is missing or has another size");
        return;
    }
    adamw8_run r = {.v = v, .file = file, .n = p->n, .map1 = espi_array_f32(map1), .map2 = espi_array_f32(map2)};
    for (r.step = 0; r.step < g->n / p->n; r.step++) {
        esp_status status = espi_verify_walk(v, walk_adamw8, &r);
        if (status != ESP_OK) espi_verify_error(v, "adamw8bit", status);
    }
    free(r.map1);
    free(r.map2);
}

void espi_verify_optim(espi_verify *v, const char *dir) {
    static const struct {
        const char *name;
        void (*verify)(espi_verify *v, const espi_arrays *file, const char *dir);
    } files[] = {
        {"adamw.safetensors", verify_adamw}, {"schedules.safetensors", verify_schedules}, {"adamw8bit.safetensors", verify_adamw8}};
    for (int i = 0; i < ESPI_COUNT(files); i++) {
        espi_arrays file;
        if (espi_verify_open(v, &file, dir, files[i].name)) files[i].verify(v, &file, dir);
        espi_arrays_free(&file);
    }
}
