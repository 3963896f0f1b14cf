/* The dispatcher, on backends made for the purpose: order, reasons, scratch, dry walks, what is logged. */
#include "core/select.h"

#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

static int ran_first, ran_second;
static const void *scratch_seen;
static int threads_seen;

static esp_status run_first(const espi_exec *exec, const espi_add *a) {
    (void)a;
    ran_first++;
    scratch_seen = exec->scratch;
    threads_seen = exec->threads;
    return ESP_OK;
}

static esp_status run_second(const espi_exec *exec, const espi_add *a) {
    (void)exec;
    (void)a;
    ran_second++;
    return ESP_OK;
}

static esp_status run_failing(const espi_exec *exec, const espi_add *a) {
    (void)exec;
    (void)a;
    return ESPI_FAIL(ESP_ERR_NONFINITE, "broken on purpose");
}

static size_t scratch_bytes(const espi_exec *exec, const espi_add *a) {
    return 10 * (size_t)a->n * (size_t)exec->threads;
}

static const char *refuse_odd(const espi_add *a) {
    return a->n % 2 ? "n is odd" : NULL;
}

static const espi_backend first = {.name = "cpu-first", .real = ESP_F32, .add = {run_first, scratch_bytes, refuse_odd}};
static const espi_backend second = {.name = "ref", .real = ESP_F32, .add = {run_second, NULL, NULL}};
static const espi_backend picky = {.name = "ref", .real = ESP_F32, .add = {run_second, NULL, refuse_odd}};
static const espi_backend failing = {.name = "failing", .real = ESP_F32, .add = {run_failing, scratch_bytes, NULL}};
static const espi_backend wide = {.name = "wide", .real = ESP_F64, .add = {run_first, NULL, NULL}};

typedef struct lines {
    int n, warnings;
    char last[256];
} lines;

static void keep_line(void *user, esp_log_level level, const char *line) {
    lines *l = user;
    l->n++;
    l->warnings += level == ESP_LOG_WARN;
    snprintf(l->last, sizeof l->last, "%s", line);
}

static esp_ctx context(lines *l, const espi_backend *a, const espi_backend *b) {
    return (esp_ctx){.backends = {a, b},
                     .n_backends = b == NULL ? 1 : 2,
                     .real = ESP_F32,
                     .act = ESP_F32,
                     .real_size = 4,
                     .threads = 3,
                     .log = keep_line,
                     .log_user = l,
                     .log_level = ESP_LOG_SELECT};
}

Test(select, takes_the_first_that_does_not_refuse) {
    lines l = {0};
    esp_ctx ctx = context(&l, &first, &second);
    _Alignas(64) unsigned char memory[128];
    espi_arena arena = espi_arena_over(memory, sizeof memory);
    cr_assert_eq(espi_op_add(&ctx, &arena, &(espi_add){.n = 4}), ESP_OK);
    cr_expect(ran_first == 1 && ran_second == 0 && threads_seen == 3);
    cr_expect(scratch_seen == memory && arena.main.used == 0 && arena.main.high == 128);
    cr_expect(l.n == 1 && l.warnings == 0);
    cr_expect_str_eq(l.last, "add: cpu-first");
    cr_assert_eq(espi_op_add(&ctx, &arena, &(espi_add){.n = 1}), ESP_OK);
    cr_expect(ran_first == 1 && ran_second == 1);
    cr_expect(l.n == 2 && l.warnings == 1);
    cr_expect_str_eq(l.last, "add: ref, because cpu-first: n is odd");
    /* Each choice is told once. */
    cr_assert_eq(espi_op_add(&ctx, &arena, &(espi_add){.n = 1}), ESP_OK);
    cr_assert_eq(espi_op_add(&ctx, &arena, &(espi_add){.n = 2}), ESP_OK);
    cr_expect(ran_first == 2 && ran_second == 2 && l.n == 2);
}

Test(select, empty_slot_is_a_reason) {
    lines l = {0};
    esp_ctx ctx = context(&l, &first, NULL);
    espi_arena arena = espi_arena_dry(false);
    cr_expect_eq(espi_op_swiglu_fwd(&ctx, &arena, &(espi_swiglu_fwd){0}), ESP_ERR_UNSUPPORTED);
    cr_expect(strstr(esp_last_error(), "no backend takes swiglu_fwd (F32 activations): cpu-first: not offered") == esp_last_error(), "%s",
              esp_last_error());
}

Test(select, unsupported_lists_every_reason) {
    lines l = {0};
    esp_ctx ctx = context(&l, &wide, &picky);
    espi_arena arena = espi_arena_dry(false);
    cr_expect_eq(espi_op_add(&ctx, &arena, &(espi_add){.n = 3}), ESP_ERR_UNSUPPORTED);
    cr_expect(strstr(esp_last_error(), "wide: computes in another dtype; ref: n is odd") != NULL, "%s", esp_last_error());
    cr_expect(ran_first == 0 && ran_second == 0 && l.n == 0);
}

Test(select, dry_walk_counts_and_does_not_run) {
    lines l = {0};
    esp_ctx ctx = context(&l, &first, &second);
    espi_arena arena = espi_arena_dry(false);
    cr_assert_eq(espi_op_add(&ctx, &arena, &(espi_add){.n = 10}), ESP_OK);
    cr_expect(ran_first == 0 && arena.main.used == 0 && arena.main.high == ESPI_ALIGNED(300));
}

Test(select, passes_failures_on) {
    lines l = {0};
    esp_ctx ctx = context(&l, &failing, &second);
    _Alignas(64) unsigned char memory[128];
    espi_arena arena = espi_arena_over(memory, sizeof memory);
    cr_expect_eq(espi_op_add(&ctx, &arena, &(espi_add){.n = 2}), ESP_ERR_NONFINITE);
    cr_expect(ran_second == 0 && arena.main.used == 0, "a failure is not a refusal");
    cr_expect_eq(espi_op_add(&ctx, &arena, &(espi_add){.n = 100}), ESP_ERR_MEMORY);
}
