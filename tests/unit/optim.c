/* The optimiser: memory as planned, what a checkpoint keeps, clipping, skipped steps, refusals. */
#include "adapter_model.h"

#include "core/decimal.h"

#include <math.h>
#include <stdio.h>

static const adapter_shape small = {2, 6, 5}, large = {8, 600, 512}; /* of `large` A has 4800 values, B 4096: just 8-bit */

typedef struct log_lines {
    int warnings;
    char last[256];
} log_lines;

static void count_lines(void *user, esp_log_level level, const char *line) {
    log_lines *lines = user;
    lines->warnings += level == ESP_LOG_WARN;
    snprintf(lines->last, sizeof lines->last, "%s", line);
}

typedef struct bench {
    esp_ctx *ctx;
    adapter_model m;
    esp_optim *optim;
    log_lines lines;
} bench;

static void bench_make(bench *b, const char *backend, adapter_shape q, adapter_shape k, const esp_adamw_config *config) {
    *b = (bench){.optim = NULL};
    cr_assert_eq(esp_ctx_create(&b->ctx, &ESP_CTX_CONFIG(.backend = backend, .log = count_lines, .log_user = &b->lines)), ESP_OK, "%s",
                 esp_last_error());
    adapter_model_make(&b->m, b->ctx, q, k);
    cr_assert_eq(esp_adamw_create(&b->optim, &b->m.model, config), ESP_OK, "%s", esp_last_error());
}

static void bench_free(bench *b) {
    esp_optim_destroy(b->optim);
    free(b->m.memory);
    esp_ctx_destroy(b->ctx);
}

static int64_t count_of(const bench *b, int64_t i) {
    return b->m.params[i].dims[0] * b->m.params[i].dims[1];
}

/* Gradients that differ from step to step. */
static void set_gradients(bench *b, int step, double size) {
    for (int64_t i = 0; i < b->m.model.n_params; i++)
        for (int64_t j = 0; j < count_of(b, i); j++)
            espi_real_set(b->m.params[i].grad, j, size * sin(1 + (double)(j % 977) * 0.37 + step), b->m.params[i].dtype);
}

static esp_optim_stats step(bench *b) {
    esp_optim_stats stats = ESP_OPTIM_STATS_INIT;
    cr_assert_eq(esp_optim_step(b->optim), ESP_OK, "%s", esp_last_error());
    cr_assert_eq(esp_optim_stats_get(b->optim, &stats), ESP_OK, "%s", esp_last_error());
    return stats;
}

Test(optim, takes_the_planned_bytes) {
    for (int eight_bit = 0; eight_bit < 2; eight_bit++)
        for (int wide = 0; wide < 2; wide++) {
            bench b;
            const esp_adamw_config config = ESP_ADAMW_CONFIG(.eight_bit = eight_bit);
            bench_make(&b, wide ? "ref64" : "ref", small, large, &config);
            espi_extent planned;
            esp_memory memory = ESP_MEMORY_INIT;
            cr_assert_eq(espi_adamw_plan(&planned, &b.m.model, &config), ESP_OK, "%s", esp_last_error());
            cr_assert_eq(esp_ctx_memory(b.ctx, &memory), ESP_OK);
            cr_expect_eq(memory.optimizer, planned.main, "planned %zu, taken %zu", planned.main, memory.optimizer);
            set_gradients(&b, 0, 1);
            step(&b);
            cr_assert_eq(esp_ctx_memory(b.ctx, &memory), ESP_OK);
            cr_expect_eq(memory.peak, planned.main, "planned %zu, peak %zu", planned.main, memory.peak);
            cr_expect_eq(planned.host, 0);
            bench_free(&b);
        }
}

Test(optim, only_large_tensors_are_eight_bit) {
    static const struct {
        const char *name;
        int64_t count;
        esp_dtype dtype;
    } expected[] = {{"layers.0.q.lora_A/m", 12, ESP_F32},        {"layers.0.q.lora_A/v", 12, ESP_F32},
                    {"layers.0.q.lora_B/m", 10, ESP_F32},        {"layers.0.q.lora_B/v", 10, ESP_F32},
                    {"layers.0.k.lora_A/m", 4800, ESP_U8},       {"layers.0.k.lora_A/v", 4800, ESP_U8},
                    {"layers.0.k.lora_A/absmax_m", 19, ESP_F32}, {"layers.0.k.lora_A/absmax_v", 19, ESP_F32},
                    {"layers.0.k.lora_B/m", 4096, ESP_U8},       {"layers.0.k.lora_B/v", 4096, ESP_U8},
                    {"layers.0.k.lora_B/absmax_m", 16, ESP_F32}, {"layers.0.k.lora_B/absmax_v", 16, ESP_F32}};
    bench b;
    bench_make(&b, "ref", small, large, &ESP_ADAMW_CONFIG(.eight_bit = true));
    cr_assert_eq(esp_optim_array_count(b.optim), 12);
    for (int i = 0; i < 12; i++) {
        esp_optim_array a = ESP_OPTIM_ARRAY_INIT;
        cr_assert_eq(esp_optim_array_get(b.optim, i, &a), ESP_OK, "%s", esp_last_error());
        cr_expect_str_eq(a.name, expected[i].name);
        cr_expect(a.count == expected[i].count && a.dtype == expected[i].dtype, "%s: %lld of %s", a.name, (long long)a.count,
                  esp_dtype_name(a.dtype));
    }
    esp_optim_array a = ESP_OPTIM_ARRAY_INIT;
    cr_expect_eq(esp_optim_array_get(b.optim, 12, &a), ESP_ERR_ARG);
    bench_free(&b);
    bench_make(&b, "ref", (adapter_shape){5, 819, 819}, (adapter_shape){0}, &ESP_ADAMW_CONFIG(.eight_bit = true)); /* 4095 values */
    cr_expect_eq(esp_optim_array_count(b.optim), 4);
    bench_free(&b);
}

/* Eight bits carry the update: parameters stay near those of the plain form, within a few percent of the way they went. */
Test(optim, eight_bit_follows_the_plain_form) {
    bench plain, eight;
    bench_make(&plain, "ref", large, (adapter_shape){0}, &ESP_ADAMW_CONFIG(.lr = 1e-2f));
    bench_make(&eight, "ref", large, (adapter_shape){0}, &ESP_ADAMW_CONFIG(.lr = 1e-2f, .eight_bit = true));
    for (int s = 0; s < 8; s++) {
        set_gradients(&plain, s / 4, 1e-3);
        set_gradients(&eight, s / 4, 1e-3);
        step(&plain);
        step(&eight);
    }
    double apart = 0, moved = 0;
    for (int64_t j = 0; j < count_of(&plain, 0); j++) {
        const double p = espi_real_get(plain.m.params[0].data, j, ESP_F32), q = espi_real_get(eight.m.params[0].data, j, ESP_F32);
        apart += (p - q) * (p - q);
        moved += p * p;
    }
    cr_expect(moved > 1 && sqrt(apart / moved) <= 0.05, "apart by %.3g of %.3g", sqrt(apart), sqrt(moved));
    bench_free(&plain);
    bench_free(&eight);
}

/* A first step of Adam moves by lr times the sign, whatever the clipping; so the norm itself and the second step have to show it. */
Test(optim, clips_by_the_global_norm) {
    bench clipped, scaled;
    bench_make(&clipped, "ref64", small, small, &ESP_ADAMW_CONFIG(.max_grad_norm = 0.5f, .eps = 1.0f));
    bench_make(&scaled, "ref64", small, small, &ESP_ADAMW_CONFIG(.max_grad_norm = -1, .eps = 1.0f));
    set_gradients(&clipped, 0, 3);
    const double norm = step(&clipped).grad_norm;
    double square = 0;
    for (int64_t i = 0; i < 4; i++)
        for (int64_t j = 0; j < count_of(&clipped, i); j++) square += pow(3 * sin(1 + (double)j * 0.37), 2);
    cr_expect(fabs(norm - sqrt(square)) <= 1e-12 * norm, "norm %.17g, expected %.17g", norm, sqrt(square));
    set_gradients(&scaled, 0, 3 * 0.5 / (norm + 1e-6));
    step(&scaled);
    for (int64_t j = 0; j < count_of(&clipped, 3); j++) {
        const double a = espi_real_get(clipped.m.params[3].data, j, ESP_F64), b = espi_real_get(scaled.m.params[3].data, j, ESP_F64);
        cr_expect(fabs(a - b) <= 1e-16 && a != 0, "value %d: %.17g, expected %.17g", (int)j, a, b);
    }
    bench_free(&clipped);
    bench_free(&scaled);
}

Test(optim, a_norm_that_is_not_finite_skips_the_step) {
    const double bad[] = {NAN, INFINITY};
    for (int i = 0; i < 2; i++) {
        bench b;
        bench_make(&b, "ref", small, large, NULL);
        set_gradients(&b, 0, 1);
        step(&b);
        const double before = espi_real_get(b.m.params[2].data, 7, ESP_F32);
        set_gradients(&b, 1, 1);
        espi_real_set(b.m.params[3].grad, 4000, bad[i], ESP_F32);
        const esp_optim_stats stats = step(&b);
        cr_expect(stats.step == 1 && stats.skipped == 1, "step %lld, skipped %lld", (long long)stats.step, (long long)stats.skipped);
        cr_expect(!isfinite(stats.grad_norm));
        cr_expect_eq(espi_real_get(b.m.params[2].data, 7, ESP_F32), before, "the parameter moved");
        cr_expect_eq(espi_real_get(b.m.params[3].grad, 4000, ESP_F32), 0, "the gradient is left");
        cr_expect(b.lines.warnings == 1 && strstr(b.lines.last, "step 2 skipped"), "%d warnings, \"%s\"", b.lines.warnings, b.lines.last);
        bench_free(&b);
    }
}

static void copy_state(bench *to, const bench *from) {
    for (int64_t i = 0; i < esp_optim_array_count(from->optim); i++) {
        esp_optim_array a = ESP_OPTIM_ARRAY_INIT, b = ESP_OPTIM_ARRAY_INIT;
        cr_assert_eq(esp_optim_array_get(from->optim, i, &a), ESP_OK);
        cr_assert_eq(esp_optim_array_get(to->optim, i, &b), ESP_OK);
        memcpy(b.data, a.data, (size_t)a.count * esp_dtype_size(a.dtype));
    }
    for (int64_t i = 0; i < from->m.model.n_params; i++)
        memcpy(to->m.params[i].data, from->m.params[i].data, (size_t)count_of(from, i) * from->ctx->real_size);
}

/* What a checkpoint does: arrays and counters into a fresh optimiser, then on, bit for bit. */
Test(optim, resumes_bit_for_bit) {
    for (int eight_bit = 0; eight_bit < 2; eight_bit++) {
        bench whole, resumed;
        const esp_adamw_config config = ESP_ADAMW_CONFIG(.eight_bit = eight_bit, .schedule = ESP_SCHEDULE_COSINE, .warmup_steps = 2,
                                                         .total_steps = 9, .weight_decay = 0.1f);
        bench_make(&whole, "ref", small, large, &config);
        bench_make(&resumed, "ref", small, large, &config);
        for (int s = 0; s < 6; s++) {
            if (s == 3) {
                copy_state(&resumed, &whole);
                cr_assert_eq(esp_optim_restore(resumed.optim, 3, 1), ESP_OK, "%s", esp_last_error());
            }
            set_gradients(&whole, s, 1);
            set_gradients(&resumed, s, 1);
            const esp_optim_stats a = step(&whole);
            if (s < 3) continue;
            const esp_optim_stats b = step(&resumed);
            cr_expect(a.lr == b.lr && a.step == b.step && b.skipped == 1 && a.lr > 0);
            for (int64_t i = 0; i < 4; i++)
                cr_expect(memcmp(whole.m.params[i].data, resumed.m.params[i].data, (size_t)count_of(&whole, i) * 4) == 0,
                          "step %d: %s differs", s, whole.m.params[i].name);
        }
        bench_free(&whole);
        bench_free(&resumed);
    }
}

Test(optim, warm_up_starts_at_zero) {
    bench b;
    bench_make(&b, "ref", small, small, &ESP_ADAMW_CONFIG(.lr = 0.5f, .warmup_steps = 4));
    for (int s = 0; s < 6; s++) {
        set_gradients(&b, s, 1);
        const double lr = step(&b).lr;
        cr_expect_eq(lr, 0.5 * (s < 4 ? s / 4.0 : 1), "step %d: lr %g", s, lr);
    }
    bench_free(&b);
}

/* Defaults are half a wave and one cycle; the optimiser uses what its config says. */
Test(optim, cycles_of_the_cosine_schedules) {
    for (int64_t n = 0; n < 12; n++) {
        const double once = esp_schedule_multiplier(ESP_SCHEDULE_COSINE, n, 0, 10, 0);
        cr_expect_eq(once, esp_schedule_multiplier(ESP_SCHEDULE_COSINE, n, 0, 10, 0.5));
        cr_expect_eq(esp_schedule_multiplier(ESP_SCHEDULE_COSINE_WITH_RESTARTS, n, 0, 10, 0),
                     esp_schedule_multiplier(ESP_SCHEDULE_COSINE_WITH_RESTARTS, n, 0, 10, 1));
        if (n <= 10) cr_expect(fabs(once - esp_schedule_multiplier(ESP_SCHEDULE_COSINE_WITH_RESTARTS, n, 0, 10, 0)) <= 1e-15);
    }
    bench b;
    bench_make(&b, "ref", small, small,
               &ESP_ADAMW_CONFIG(.lr = 0.5f, .schedule = ESP_SCHEDULE_COSINE_WITH_RESTARTS, .total_steps = 4, .num_cycles = 2));
    const double expected[] = {0.5, 0.25, 0.5, 0.25, 0};
    for (int s = 0; s < 5; s++) {
        set_gradients(&b, s, 1);
        const double lr = step(&b).lr;
        cr_expect(fabs(lr - expected[s]) <= 1e-15, "step %d: lr %g, expected %g", s, lr, expected[s]);
    }
    bench_free(&b);
}

Test(optim, options_mean_the_decimal_that_was_written) {
    cr_expect_eq(espi_decimal(0.999f), 0.999);
    cr_expect_eq(espi_decimal(1e-8f), 1e-8);
    cr_expect_eq(espi_decimal(-0.2f), -0.2);
    cr_expect_eq(espi_decimal(0), 0);
    cr_expect_eq((float)espi_decimal(1.0f / 3), 1.0f / 3);
    cr_expect(isinf(espi_decimal(INFINITY)) && isnan(espi_decimal(NAN)));
}

static const struct {
    esp_adamw_config config;
    const char *word;
} refused[] = {
    {{.struct_size = sizeof(esp_adamw_config), .lr = -1}, "lr"},
    {{.struct_size = sizeof(esp_adamw_config), .lr = NAN}, "lr"},
    {{.struct_size = sizeof(esp_adamw_config), .beta1 = 1}, "beta1"},
    {{.struct_size = sizeof(esp_adamw_config), .beta2 = -0.5f}, "beta2"},
    {{.struct_size = sizeof(esp_adamw_config), .eps = -1}, "eps"},
    {{.struct_size = sizeof(esp_adamw_config), .weight_decay = -1}, "weight_decay"},
    {{.struct_size = sizeof(esp_adamw_config), .max_grad_norm = NAN}, "max_grad_norm"},
    {{.struct_size = sizeof(esp_adamw_config), .schedule = 4}, "schedule"},
    {{.struct_size = sizeof(esp_adamw_config), .warmup_steps = -1}, "warmup_steps"},
    {{.struct_size = sizeof(esp_adamw_config), .schedule = ESP_SCHEDULE_LINEAR}, "total_steps"},
    {{.struct_size = sizeof(esp_adamw_config), .schedule = ESP_SCHEDULE_COSINE_WITH_RESTARTS}, "total_steps"},
    {{.struct_size = sizeof(esp_adamw_config), .num_cycles = 2}, "num_cycles is 2"},
    {{.struct_size = sizeof(esp_adamw_config), .schedule = ESP_SCHEDULE_COSINE, .total_steps = 5, .num_cycles = -1}, "num_cycles"},
    {{.struct_size = sizeof(esp_adamw_config), .schedule = ESP_SCHEDULE_COSINE, .total_steps = 5, .num_cycles = NAN}, "num_cycles"},
    {{.struct_size = sizeof(esp_adamw_config), .schedule = ESP_SCHEDULE_COSINE, .warmup_steps = 5, .total_steps = 5}, "total_steps"}};

Test(optim, bad_options_are_refused_by_name) {
    bench b;
    bench_make(&b, "ref", small, small, NULL);
    for (size_t i = 0; i < sizeof refused / sizeof refused[0]; i++) {
        esp_optim *optim;
        cr_expect_eq(esp_adamw_create(&optim, &b.m.model, &refused[i].config), ESP_ERR_ARG, "case %zu is accepted", i);
        cr_expect_null(optim);
        cr_expect(strstr(esp_last_error(), refused[i].word), "case %zu: %s", i, esp_last_error());
    }
    cr_expect_eq(esp_optim_restore(b.optim, -1, 0), ESP_ERR_ARG);
    bench_free(&b);
}

Test(optim, nothing_to_train_is_refused) {
    esp_ctx *ctx;
    adapter_model m;
    esp_optim *optim;
    espi_extent planned;
    cr_assert_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref")), ESP_OK, "%s", esp_last_error());
    adapter_model_make(&m, ctx, (adapter_shape){0}, (adapter_shape){0});
    cr_expect_eq(esp_adamw_create(&optim, &m.model, NULL), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "nothing to train"), "%s", esp_last_error());
    cr_assert_eq(espi_adamw_plan(&planned, &m.model, NULL), ESP_OK);
    cr_expect_eq(planned.main, 0);
    cr_expect_eq(planned.host, 0);
    free(m.memory);
    esp_ctx_destroy(ctx);
}
