/* The optimiser and its schedules against torch, transformers and bitsandbytes. */
#include "adapter_model.h"
#include "core/select.h"
#include "espalier/quant.h"
#include "golden.h"

/* 20 steps in float, each rounded twice: torch's own float run is as far from its double run. */
#define FLOAT_TOLERANCE 2e-6
/* The same in double, moments that mix over 20 steps. */
#define DOUBLE_TOLERANCE 1e-13

typedef struct adamw_case {
    const char *name;
    esp_adamw_config config;
} adamw_case;

/* As in the data's report.json; 20 steps. */
static const adamw_case cases[] = {
    {"adamw",
     {.struct_size = sizeof(esp_adamw_config),
      .lr = 1e-2f,
      .weight_decay = 0.01f,
      .schedule = ESP_SCHEDULE_COSINE,
      .warmup_steps = 3,
      .total_steps = 20}},
    {"adamw_nowd",
     {.struct_size = sizeof(esp_adamw_config),
      .lr = 5e-3f,
      .beta2 = 0.95f,
      .eps = 1e-6f,
      .schedule = ESP_SCHEDULE_COSINE,
      .total_steps = 20}},
    {"adamw_noclip",
     {.struct_size = sizeof(esp_adamw_config),
      .lr = 1e-2f,
      .weight_decay = 0.1f,
      .max_grad_norm = -1,
      .schedule = ESP_SCHEDULE_COSINE,
      .warmup_steps = 5,
      .total_steps = 20}},
};

/* p0 [4,64] and p1 [64,4] are A and B of q; p2 [33] is both of k, 16 and 17 values. */
static const struct {
    const char *name;
    int64_t first, count;
} parts[] = {{"0", 0, 256}, {"1", 0, 256}, {"2", 0, 16}, {"2", 16, 17}};

static void put_reals(void *out, const double *values, int64_t n, esp_dtype real) {
    for (int64_t i = 0; i < n; i++) espi_real_set(out, i, values[i], real);
}

static void expect_reals(const char *what, const char *tensor, const void *got, const double *expected, int64_t n, esp_dtype real,
                         double limit) {
    double *values = malloc((size_t)n * sizeof *values);
    cr_assert_not_null(values);
    for (int64_t i = 0; i < n; i++) values[i] = espi_real_get(got, i, real);
    const double error = golden_error(values, expected, n);
    cr_expect(error <= limit, "%s: %s is off by %.3g of its largest, limit %.3g", what, tensor, error, limit);
    free(values);
}

static double *read_part(const espi_st_file *file, const char *format, const char *name, int part, const char *suffix) {
    char key[96];
    snprintf(key, sizeof key, format, name, parts[part].name, suffix);
    return golden_read(file, key, NULL);
}

static void run_case(const espi_st_file *file, const adamw_case *c, const char *backend) {
    esp_ctx *ctx;
    cr_assert_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend)), ESP_OK, "%s", esp_last_error());
    const esp_dtype real = ctx->real;
    char key[96];
    snprintf(key, sizeof key, "%s.p064", c->name);
    const bool double_run = real == ESP_F64 && espi_st_find(file, key); /* only one case has one */
    const char *suffix = double_run ? "64" : "";
    const double limit = double_run ? DOUBLE_TOLERANCE : FLOAT_TOLERANCE;
    adapter_model m;
    adapter_model_make(&m, ctx, (adapter_shape){4, 64, 64}, (adapter_shape){1, 16, 17});
    double *g[4], *p[4];
    int64_t size[4];
    for (int i = 0; i < 4; i++) {
        double *start = read_part(file, "%.0sp%s%.0s", "", i, "");
        put_reals(m.params[i].data, start + parts[i].first, parts[i].count, real);
        free(start);
        g[i] = read_part(file, "%.0sg%s%.0s", "", i, "");
        p[i] = read_part(file, "%s.p%s%s", c->name, i, suffix);
        size[i] = i < 2 ? 256 : 33;
    }
    snprintf(key, sizeof key, "%s.lr", c->name);
    double *lr = golden_read(file, key, NULL);
    snprintf(key, sizeof key, "%s.grad_norm", c->name);
    double *norm = golden_read(file, key, NULL);

    esp_optim *optim;
    cr_assert_eq(esp_adamw_create(&optim, &m.model, &c->config), ESP_OK, "%s", esp_last_error());
    for (int64_t step = 0; step < 20; step++) {
        for (int i = 0; i < 4; i++) put_reals(m.params[i].grad, g[i] + step * size[i] + parts[i].first, parts[i].count, real);
        cr_assert_eq(esp_optim_step(optim), ESP_OK, "%s", esp_last_error());
        esp_optim_stats stats = ESP_OPTIM_STATS_INIT;
        cr_assert_eq(esp_optim_stats_get(optim, &stats), ESP_OK);
        cr_expect(fabs(stats.lr - lr[step]) <= 1e-15, "%s: step %d has lr %.17g, expected %.17g", c->name, (int)step, stats.lr, lr[step]);
        cr_expect(fabs(stats.grad_norm - norm[step]) <= 1e-6 * norm[step], "%s: norm %.9g, expected %.9g", c->name, stats.grad_norm,
                  norm[step]);
        for (int i = 0; i < 4; i++) {
            expect_reals(c->name, m.params[i].name, m.params[i].data, p[i] + step * size[i] + parts[i].first, parts[i].count, real, limit);
            cr_expect_eq(espi_real_get(m.params[i].grad, 0, real), 0, "the gradient of %s is left", m.params[i].name);
        }
    }
    for (int64_t i = 0; i < esp_optim_array_count(optim); i++) {
        esp_optim_array a = ESP_OPTIM_ARRAY_INIT;
        cr_assert_eq(esp_optim_array_get(optim, i, &a), ESP_OK, "%s", esp_last_error());
        double *expected = read_part(file, i % 2 ? "%s.v%s%s" : "%s.m%s%s", c->name, (int)(i / 2), suffix);
        expect_reals(c->name, a.name, a.data, expected + parts[i / 2].first, a.count, real, limit);
        free(expected);
    }
    esp_optim_destroy(optim);
    for (int i = 0; i < 4; i++) {
        free(g[i]);
        free(p[i]);
    }
    free(lr);
    free(norm);
    free(m.memory);
    esp_ctx_destroy(ctx);
}

Test(golden_optim, adamw) {
    espi_st_file *file = golden_open("optim/adamw.safetensors");
    for (size_t c = 0; c < sizeof cases / sizeof cases[0]; c++) {
        run_case(file, &cases[c], "ref");
        run_case(file, &cases[c], "ref64");
        run_case(file, &cases[c], "auto");
    }
    espi_st_close(file);
}

Test(golden_optim, schedules) {
    static const struct {
        const char *name;
        esp_schedule schedule;
        int64_t warmup;
        double num_cycles;
    } rows[] = {{"constant", ESP_SCHEDULE_CONSTANT, 0, 0},
                {"constant_with_warmup", ESP_SCHEDULE_CONSTANT, 4, 0},
                {"linear", ESP_SCHEDULE_LINEAR, 4, 0},
                {"linear_nowarm", ESP_SCHEDULE_LINEAR, 0, 0},
                {"cosine", ESP_SCHEDULE_COSINE, 4, 0},
                {"cosine_half_cycles_1", ESP_SCHEDULE_COSINE, 4, 1},
                {"cosine_with_restarts_3", ESP_SCHEDULE_COSINE_WITH_RESTARTS, 4, 3}};
    espi_st_file *file = golden_open("optim/schedules.safetensors");
    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
        int64_t count;
        double *expected = golden_read(file, rows[r].name, &count);
        for (int64_t n = 0; n < count; n++) {
            const double got = esp_schedule_multiplier(rows[r].schedule, n, rows[r].warmup, 25, rows[r].num_cycles);
            cr_expect(fabs(got - expected[n]) <= 1e-15, "%s: step %d is %.17g, expected %.17g", rows[r].name, (int)n, got, expected[n]);
        }
        free(expected);
    }
    espi_st_close(file);
}

/* One 8-bit state: the block scales, then the codes.  bitsandbytes looks codes up in 2^16 cells of [-1,1], so its code may be the second
 * nearest where the value lies within half a cell of a midpoint: there both codes are as far away, but for a cell. */
static void expect_codes(const espi_st_file *file, int step, const char *state, const char *absmax, const uint8_t *codes,
                         const float *scales, const double *map, const double *value, int64_t n) {
    const double cell = 2.0 / 65536;
    char key[64];
    int64_t blocks;
    snprintf(key, sizeof key, "step%d.%s", step, absmax);
    double *expected_scale = golden_read(file, key, &blocks);
    snprintf(key, sizeof key, "step%d.%s", step, state);
    double *expected = golden_read(file, key, NULL);
    for (int64_t b = 0; b < blocks; b++)
        cr_expect(fabs(scales[b] - expected_scale[b]) <= 1e-6 * expected_scale[b], "%s block %d: %.9g, expected %.9g", key, (int)b,
                  (double)scales[b], expected_scale[b]);
    for (int64_t i = 0; i < n; i++) {
        const double x = value[i] / expected_scale[i / 256], ours = map[codes[i]], theirs = map[(int)expected[i]];
        cr_expect(fabs(fabs(ours - x) - fabs(theirs - x)) <= 1.1 * cell, "%s value %d is %g: code %d (%g), expected %d (%g)", key, (int)i,
                  x, codes[i], ours, (int)expected[i], theirs);
    }
    free(expected_scale);
    free(expected);
}

/* State before step k: what bitsandbytes had after step k - 1; zeros at first. */
static void load_state(const espi_st_file *file, int step, const char *name, void *out, int64_t n, bool codes) {
    char key[64];
    snprintf(key, sizeof key, "step%d.%s", step - 1, name);
    double *values = step > 0 ? golden_read(file, key, NULL) : calloc((size_t)n, sizeof *values);
    cr_assert_not_null(values);
    for (int64_t i = 0; i < n; i++) {
        if (codes)
            ((uint8_t *)out)[i] = (uint8_t)values[i];
        else
            ((float *)out)[i] = (float)values[i];
    }
    free(values);
}

Test(golden_optim, adamw8bit_step_by_step) {
    enum { N = 4224, BLOCKS = 17, STEPS = 5 };
    static float p[N], g[N], map[2][256], absmax1[BLOCKS], absmax2[BLOCKS];
    static uint8_t state1[N], state2[N];
    static double m[N], v[N]; /* the new moments, not quantised */
    espi_st_file *file = golden_open("optim/adamw8bit.safetensors");
    double *start = golden_read(file, "p", NULL), *gradients = golden_read(file, "g", NULL), *after = golden_read(file, "p_after", NULL);
    double *maps[] = {golden_read(file, "qmap1", NULL), golden_read(file, "qmap2", NULL)};
    for (int i = 0; i < 256; i++)
        for (int side = 0; side < 2; side++) {
            map[side][i] = (float)maps[side][i];
            cr_expect_eq(esp_dynamic_map(side == 0)[i], map[side][i], "dynamic map %d, value %d", side, i);
        }
    espi_arena none = espi_arena_over(NULL, 0);
    esp_ctx *ctxs[2];
    cr_assert_eq(esp_ctx_create(&ctxs[0], &ESP_CTX_CONFIG(.backend = "ref")), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_ctx_create(&ctxs[1], &ESP_CTX_CONFIG(.backend = "cpu")), ESP_OK, "%s", esp_last_error());
    for (int run = 0; run < 2 * STEPS; run++) {
        const int step = run % STEPS;
        esp_ctx *ctx = ctxs[run / STEPS];
        const double *before = step == 0 ? start : after + (step - 1) * N;
        for (int i = 0; i < N; i++) {
            p[i] = (float)before[i];
            g[i] = (float)gradients[step * N + i];
        }
        load_state(file, step, "state1", state1, N, true);
        load_state(file, step, "state2", state2, N, true);
        load_state(file, step, "absmax1", absmax1, BLOCKS, false);
        load_state(file, step, "absmax2", absmax2, BLOCKS, false);
        for (int i = 0; i < N; i++) {
            m[i] = 0.9 * maps[0][state1[i]] * absmax1[i / 256] + 0.1 * g[i];
            v[i] = 0.999 * maps[1][state2[i]] * absmax2[i / 256] + 0.001 * g[i] * g[i];
        }
        const espi_adamw8 args = {.p = p,
                                  .state1 = state1,
                                  .state2 = state2,
                                  .absmax1 = absmax1,
                                  .absmax2 = absmax2,
                                  .g = g,
                                  .map1 = map[0],
                                  .map2 = map[1],
                                  .n = N,
                                  .step = step + 1,
                                  .lr = 1e-2,
                                  .beta1 = 0.9,
                                  .beta2 = 0.999,
                                  .eps = 1e-8,
                                  .weight_decay = 0.01,
                                  .grad_scale = 1};
        cr_assert_eq(espi_op_adamw8(ctx, &none, &args), ESP_OK, "%s", esp_last_error());
        expect_reals("adamw8bit", "p", p, after + step * N, N, ESP_F32, FLOAT_TOLERANCE);
        expect_codes(file, step, "state1", "absmax1", state1, absmax1, maps[0], m, N);
        expect_codes(file, step, "state2", "absmax2", state2, absmax2, maps[1], v, N);
    }
    double *all[] = {start, gradients, after, maps[0], maps[1]};
    for (int i = 0; i < 5; i++) free(all[i]);
    for (int i = 0; i < 2; i++) esp_ctx_destroy(ctxs[i]);
    espi_st_close(file);
}
