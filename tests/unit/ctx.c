/* The context: memory accounting, configuration, log levels. */
#include "core/ctx.h"
#include "core/log.h"
#include "espalier/version.h"
#include "kernels/backend.h"

#include <criterion/criterion.h>
#include <criterion/redirect.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static esp_ctx *make(esp_ctx_config config) {
    esp_ctx *ctx = NULL;
    config.backend = "ref";
    cr_assert_eq(esp_ctx_create(&ctx, &config), ESP_OK, "%s", esp_last_error());
    return ctx;
}

static esp_memory memory_of(const esp_ctx *ctx) {
    esp_memory memory = ESP_MEMORY_INIT;
    cr_assert_eq(esp_ctx_memory(ctx, &memory), ESP_OK);
    return memory;
}

Test(ctx, memory_by_purpose) {
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.threads = 1));
    unsigned char *p[ESPI_MEM_COUNT];
    for (int i = 0; i < ESPI_MEM_COUNT; i++) {
        size_t bytes = 1000 + (size_t)i;
        cr_assert_eq(espi_ctx_alloc(ctx, (espi_purpose)i, bytes, &p[i]), ESP_OK);
        cr_expect_eq((uintptr_t)p[i] % ESPI_ALIGN, 0);
        for (size_t b = 0; b < bytes; b++) cr_assert_eq(p[i][b], 0);
        memset(p[i], 0xff, bytes);
    }
    esp_memory m = memory_of(ctx);
    cr_expect(m.weights == 1000 && m.adapter == 1001 && m.optimizer == 1002 && m.activations == 1003 && m.cache == 1004 &&
              m.staging == 1005);
    cr_expect(m.live == 6015 && m.peak == 6015);
    espi_ctx_free(ctx, ESPI_MEM_STAGING, p[ESPI_MEM_STAGING], 1005);
    espi_ctx_free(ctx, ESPI_MEM_STAGING, NULL, 1005);
    m = memory_of(ctx);
    cr_expect(m.staging == 0 && m.live == 5010 && m.peak == 6015);
    /* Zeroed also where the memory was used before. */
    cr_assert_eq(espi_ctx_alloc(ctx, ESPI_MEM_STAGING, 1005, &p[ESPI_MEM_STAGING]), ESP_OK);
    for (size_t b = 0; b < 1005; b++) cr_assert_eq(p[ESPI_MEM_STAGING][b], 0);
    cr_expect_eq(memory_of(ctx).peak, 6015);
    for (int i = 0; i < ESPI_MEM_COUNT; i++) espi_ctx_free(ctx, (espi_purpose)i, p[i], 1000 + (size_t)i);
    cr_expect(memory_of(ctx).live == 0 && memory_of(ctx).peak == 6015);
    void *none = &none;
    cr_expect_eq(espi_ctx_alloc(ctx, ESPI_MEM_CACHE, 0, &none), ESP_OK);
    cr_expect_null(none);
    esp_ctx_destroy(ctx);
    esp_ctx_destroy(NULL);
}

Test(ctx, memory_limit) {
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.memory_limit = 1000));
    void *a, *b;
    cr_assert_eq(espi_ctx_alloc(ctx, ESPI_MEM_WEIGHTS, 600, &a), ESP_OK);
    cr_expect_eq(espi_ctx_alloc(ctx, ESPI_MEM_CACHE, 401, &b), ESP_ERR_MEMORY);
    cr_expect_null(b);
    cr_expect(strstr(esp_last_error(), "401 bytes wanted for cache, but 600 are taken") != NULL, "%s", esp_last_error());
    cr_expect_eq(espi_ctx_alloc(ctx, ESPI_MEM_CACHE, SIZE_MAX, &b), ESP_ERR_MEMORY);
    cr_assert_eq(espi_ctx_alloc(ctx, ESPI_MEM_CACHE, 400, &b), ESP_OK);
    cr_expect_eq(memory_of(ctx).peak, 1000);
    espi_ctx_free(ctx, ESPI_MEM_WEIGHTS, a, 600);
    espi_ctx_free(ctx, ESPI_MEM_CACHE, b, 400);
    esp_ctx_destroy(ctx);
}

/* An allocator that counts, and fails or misaligns on request. */
typedef struct hooks {
    size_t live;
    bool fail;
    size_t skew;
} hooks;

static void *hook_alloc(void *user, size_t bytes) {
    hooks *h = user;
    if (h->fail) return NULL;
    h->live += bytes;
    unsigned char *p = aligned_alloc(64, ESPI_ALIGNED(bytes) + 64);
    return p == NULL ? NULL : p + h->skew;
}

static void hook_free(void *user, void *p, size_t bytes) {
    hooks *h = user;
    h->live -= bytes;
    free((unsigned char *)p - h->skew);
}

Test(ctx, allocator_hooks) {
    hooks h = {0};
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.alloc = hook_alloc, .free = hook_free, .alloc_user = &h));
    void *p;
    cr_assert_eq(espi_ctx_alloc(ctx, ESPI_MEM_ADAPTER, 100, &p), ESP_OK);
    cr_expect_eq(h.live, 100);
    espi_ctx_free(ctx, ESPI_MEM_ADAPTER, p, 100);
    cr_expect_eq(h.live, 0);
    h.fail = true;
    cr_expect_eq(espi_ctx_alloc(ctx, ESPI_MEM_ADAPTER, 100, &p), ESP_ERR_MEMORY);
    h.fail = false;
    h.skew = 8;
    cr_expect_eq(espi_ctx_alloc(ctx, ESPI_MEM_ADAPTER, 100, &p), ESP_ERR_ARG);
    cr_expect_eq(h.live, 0);
    cr_expect_eq(memory_of(ctx).live, 0);
    esp_ctx_destroy(ctx);
    cr_expect_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.alloc = hook_alloc)), ESP_ERR_ARG);
    cr_expect_null(ctx);
}

Test(ctx, backend_names) {
    static const char *const known[][2] = {{"ref", "ref"},  {"ref64", "ref64"}, {"cpu", "cpu"},
                                           {"auto", "cpu"}, {NULL, "cpu"},      {"cpu-generic", "cpu"}};
    unsetenv("ESP_CPU_ISA");
    for (int i = 0; i < ESPI_COUNT(known); i++) {
        esp_ctx *ctx;
        cr_assert_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = known[i][0])), ESP_OK, "%s", esp_last_error());
        cr_expect_str_eq(esp_ctx_backend(ctx), known[i][1]);
        cr_expect_eq(ctx->real, i == 1 ? ESP_F64 : ESP_F32);
        cr_expect_eq(ctx->real_size, i == 1 ? 8 : 4);
        esp_ctx_destroy(ctx);
    }
    static const char *const unknown[] = {"", "gpu", "cpux", "reference"};
    for (int i = 0; i < ESPI_COUNT(unknown); i++) {
        esp_ctx *ctx;
        cr_expect_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = unknown[i])), ESP_ERR_ARG, "%s", unknown[i]);
        cr_expect(strstr(esp_last_error(), "auto, any, cpu, cuda, ref or ref64") != NULL, "%s", esp_last_error());
    }
    esp_ctx *ctx;
    cr_expect_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "cpu-sse9")), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "sse9") != NULL && strstr(esp_last_error(), "generic") != NULL, "%s", esp_last_error());
}

Test(ctx, every_instruction_set_by_name) {
    for (int i = 0; espi_backends_cpu[i] != NULL; i++) {
        const espi_backend *backend = espi_backends_cpu[i];
        bool there = backend->available == NULL || backend->available();
        esp_ctx *ctx;
        esp_status status = esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = backend->name));
        cr_expect_eq(status, there ? ESP_OK : ESP_ERR_ARG, "%s: %s", backend->name, esp_last_error());
        if (status == ESP_OK) cr_expect(ctx->backends[0] == backend);
        esp_ctx_destroy(ctx);
    }
}

/* "cpu" keeps f32, "cpu-bf16" never does. */
Test(ctx, rounded_products_only_when_asked_for) {
    const espi_backend *best = NULL;
    for (int i = 0; best == NULL && espi_backends_cpu[i] != NULL; i++)
        if (espi_backends_cpu[i]->bf16_products && espi_backends_cpu[i]->available()) best = espi_backends_cpu[i];
    unsetenv("ESP_CPU_ISA");
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.backend = "cpu"));
    cr_expect_not(ctx->backends[0]->bf16_products);
    esp_ctx_destroy(ctx);
    const esp_status status = esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "cpu-bf16"));
    cr_assert_eq(status, best ? ESP_OK : ESP_ERR_UNSUPPORTED, "%s", esp_last_error());
    if (status == ESP_OK) cr_expect(ctx->backends[0] == best);
    esp_ctx_destroy(ctx);
    setenv("ESP_CPU_ISA", "generic", 1);
    cr_expect_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "cpu-bf16")), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "products of bf16") != NULL, "%s", esp_last_error());
}

Test(ctx, instruction_set_by_environment) {
    esp_ctx *ctx;
    setenv("ESP_CPU_ISA", "generic", 1);
    cr_assert_eq(esp_ctx_create(&ctx, NULL), ESP_OK, "%s", esp_last_error());
    cr_expect_str_eq(ctx->backends[0]->name, "cpu-generic");
    cr_expect_eq(ctx->n_backends, 2);
    cr_expect_str_eq(ctx->backends[1]->name, "ref");
    esp_ctx_destroy(ctx);
    setenv("ESP_CPU_ISA", "mmx", 1);
    cr_expect_eq(esp_ctx_create(&ctx, NULL), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "ESP_CPU_ISA") != NULL && strstr(esp_last_error(), "generic") != NULL, "%s", esp_last_error());
}

Test(ctx, threads) {
    setenv("OMP_NUM_THREADS", "3", 1); /* too late for this process's runtime: only the field counts here */
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.threads = 5));
    cr_expect_eq(ctx->threads, 5);
    esp_ctx_destroy(ctx);
    ctx = make(ESP_CTX_CONFIG(.threads = 0));
    cr_expect_geq(ctx->threads, 1);
    esp_ctx_destroy(ctx);
    cr_expect_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.threads = -1)), ESP_ERR_ARG);
    cr_expect_eq(esp_ctx_create(NULL, NULL), ESP_ERR_ARG);
    cr_expect_eq(esp_ctx_create(&ctx, &(esp_ctx_config){.struct_size = 0}), ESP_ERR_ARG);
}

/* The lines that a context handed out. */
typedef struct lines {
    int n;
    esp_log_level level;
    char last[256];
} lines;

static void keep_line(void *user, esp_log_level level, const char *line) {
    lines *l = user;
    l->n++;
    l->level = level;
    snprintf(l->last, sizeof l->last, "%s", line);
}

Test(ctx, log_levels) {
    static const struct {
        const char *env;
        int passed; /* of the five levels */
    } rows[] = {{NULL, 3}, {"error", 1}, {"warn", 2}, {"info", 3}, {"select", 4}, {"debug", 5}};
    for (int i = 0; i < ESPI_COUNT(rows); i++) {
        if (rows[i].env)
            setenv("ESP_LOG", rows[i].env, 1);
        else
            unsetenv("ESP_LOG");
        lines l = {0};
        esp_ctx *ctx = make(ESP_CTX_CONFIG(.log = keep_line, .log_user = &l));
        l.n = 0;
        for (int level = ESP_LOG_ERROR; level <= ESP_LOG_DEBUG; level++) {
            espi_log(ctx, (esp_log_level)level, "line %d", level);
            cr_expect_eq(espi_log_enabled(ctx, (esp_log_level)level), level < rows[i].passed);
        }
        cr_expect_eq(l.n, rows[i].passed, "%s: %d", rows[i].env ? rows[i].env : "unset", l.n);
        cr_expect_eq((int)l.level, rows[i].passed - 1);
        char expected[20];
        snprintf(expected, sizeof expected, "line %d", rows[i].passed - 1);
        cr_expect_str_eq(l.last, expected);
        esp_ctx_destroy(ctx);
    }
    setenv("ESP_LOG", "loud", 1);
    esp_ctx *ctx;
    cr_expect_eq(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = "ref")), ESP_ERR_ARG);
    cr_expect(strstr(esp_last_error(), "ESP_LOG=loud") != NULL, "%s", esp_last_error());
}

Test(ctx, silent_unless_asked, .init = cr_redirect_stderr) {
    unsetenv("ESP_LOG");
    esp_ctx *ctx = make(ESP_CTX_CONFIG(.threads = 1));
    espi_log(ctx, ESP_LOG_ERROR, "unwanted");
    esp_ctx_destroy(ctx);
    setenv("ESP_LOG", "warn", 1);
    ctx = make(ESP_CTX_CONFIG(.threads = 1));
    espi_log(ctx, ESP_LOG_WARN, "wanted");
    espi_log(ctx, ESP_LOG_INFO, "unwanted");
    esp_ctx_destroy(ctx);
    fflush(stderr);
    cr_expect_stderr_eq_str("espalier warn: wanted\n");
}

Test(ctx, version) {
    char expected[40];
    snprintf(expected, sizeof expected, "%d.%d.%d", ESP_VERSION_MAJOR, ESP_VERSION_MINOR, ESP_VERSION_PATCH);
    cr_expect_str_eq(esp_version(), expected);
}
