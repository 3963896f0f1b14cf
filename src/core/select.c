/* Which backend runs an op: the dispatchers of every row of ops.def, and what a backend's name means. */
#include "core/select.h"
#include "core/record.h"
#include "core/threads.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert(ESPI_OP_COUNT *ESPI_MAX_BACKENDS <= sizeof(((esp_ctx *)0)->reported), "esp_ctx.reported is too small");

static const char *const op_names[] = {
#define ESPI_OP(name, args) #name,
#include "kernels/ops.def"
#undef ESPI_OP
};

/* "cpu-avx2: no such format; ref: ..": why the backends so far did not take an op. */
typedef struct refusals {
    char text[1024];
    size_t length;
} refusals;

static void add_text(refusals *list, const char *separator, const char *who, const char *what) {
    int n = snprintf(list->text + list->length, sizeof list->text - list->length, "%s%s%s%s", list->length ? separator : "", who,
                     what[0] ? ": " : "", what);
    if (n > 0) list->length += (size_t)n;
    if (list->length >= sizeof list->text) list->length = sizeof list->text - 1;
}

static void refuse(refusals *list, const espi_backend *backend, const char *reason) {
    add_text(list, "; ", backend->name, reason);
}

/* Once for each op and backend: the choice, and as a warning when a better backend refused. */
static void report(esp_ctx *ctx, espi_op_id op, int b, const refusals *refused) {
    unsigned char *done = &ctx->reported[op * ESPI_MAX_BACKENDS + b];
    if (*done) return;
    *done = 1;
    if (refused->length == 0)
        espi_log(ctx, ESP_LOG_SELECT, "%s: %s", op_names[op], ctx->backends[b]->name);
    else
        espi_log(ctx, ESP_LOG_WARN, "%s: %s, because %s", op_names[op], ctx->backends[b]->name, refused->text);
}

static esp_status unsupported(const esp_ctx *ctx, espi_op_id op, const refusals *refused) {
    return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "no backend takes %s (%s activations): %s", op_names[op], esp_dtype_name(ctx->act),
                     refused->length ? refused->text : "the context has no backend");
}

#define ESPI_OP(name, args)                                                                                                                \
    esp_status espi_op_##name(esp_ctx *ctx, espi_arena *arena, const args *a) {                                                            \
        refusals refused = {.length = 0};                                                                                                  \
        for (int b = 0; b < ctx->n_backends; b++) {                                                                                        \
            const espi_slot_##name *slot = &ctx->backends[b]->name;                                                                        \
            const char *reason = slot->run == NULL ? "not offered" : slot->refuse == NULL ? NULL : slot->refuse(a);                        \
            if (ctx->backends[b]->real != ctx->real) reason = "computes in another dtype";                                                 \
            if (reason != NULL) {                                                                                                          \
                refuse(&refused, ctx->backends[b], reason);                                                                                \
                continue;                                                                                                                  \
            }                                                                                                                              \
            report(ctx, ESPI_OP_##name, b, &refused);                                                                                      \
            if (ctx->device != NULL) ESPI_TRY(ctx->device_ops->enter(ctx->device));                                                        \
            espi_exec exec = {.device = ctx->device, .threads = ctx->threads, .nodes = espi_threads_nodes(ctx)};                           \
            const espi_mark mark = espi_arena_mark(arena);                                                                                 \
            ESPI_TRY(espi_arena_take(arena, slot->scratch == NULL ? 0 : slot->scratch(&exec, a), &exec.scratch));                          \
            if (arena->idle) espi_recorded_op(ctx, ESPI_OP_##name, a, sizeof *a, exec.scratch);                                            \
            esp_status status = arena->dry || arena->idle ? ESP_OK : slot->run(&exec, a);                                                  \
            espi_arena_release(arena, mark);                                                                                               \
            return status;                                                                                                                 \
        }                                                                                                                                  \
        return unsupported(ctx, ESPI_OP_##name, &refused);                                                                                 \
    }

#include "kernels/ops.def"
#undef ESPI_OP

/* "generic", "avx2": an instruction set is the name of its backend behind "cpu-". */
static const char *instruction_set(const espi_backend *backend) {
    return backend->name + strlen("cpu-");
}

static bool usable(const espi_backend *backend) {
    return backend->available == NULL || backend->available();
}

static void use(esp_ctx *ctx, const espi_backend *backend) {
    ctx->backends[ctx->n_backends++] = backend;
    const char *more = backend->describe == NULL ? NULL : backend->describe();
    espi_log(ctx, ESP_LOG_SELECT, "backend %s, %d threads%s%s", backend->name, ctx->threads, more ? ": " : "", more ? more : "");
}

/* The cpu backend of an instruction set; NULL: the best that this machine has and that does not round, or, with `bf16`, the best of those
 * whose products are of bf16. */
static esp_status find_cpu(const espi_backend **found, const char *isa, bool bf16, const char *asked_by) {
    refusals there = {.length = 0};
    for (int i = 0; espi_backends_cpu[i] != NULL; i++) {
        const espi_backend *backend = espi_backends_cpu[i];
        if (!usable(backend) || (bf16 && !backend->bf16_products)) continue;
        if (isa == NULL ? backend->bf16_products == bf16 : strcmp(isa, instruction_set(backend)) == 0) {
            *found = backend;
            return ESP_OK;
        }
        add_text(&there, ", ", instruction_set(backend), "");
    }
    return ESPI_FAIL(isa == NULL ? ESP_ERR_UNSUPPORTED : ESP_ERR_ARG,
                     "%s asks for the instruction set %s%s; this build on this machine has: %s", asked_by, isa == NULL ? "(any)" : isa,
                     bf16 ? " with products of bf16" : "", there.length ? there.text : "none");
}

static const espi_backend *usable_gpu(void) {
    for (int i = 0; espi_backends_gpu[i] != NULL; i++)
        if (usable(espi_backends_gpu[i])) return espi_backends_gpu[i];
    return NULL;
}

static esp_status find_gpu(const espi_backend **found, const char *name) {
    for (int i = 0; espi_backends_gpu[i] != NULL; i++) {
        if (strcmp(espi_backends_gpu[i]->name, name) != 0) continue;
        *found = espi_backends_gpu[i];
        if (usable(*found)) return ESP_OK;
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "esp_ctx_config.backend is \"%s\", but this machine has no GPU that it can use, expected a driver and a GPU of "
                         "compute capability 8.0 or more: look at nvidia-smi, or take \"any\" or \"cpu\"",
                         name);
    }
    return ESPI_FAIL(
        ESP_ERR_UNSUPPORTED,
        "esp_ctx_config.backend is \"%s\", which this build does not have: configure with ESPALIER_CUDA=ON, or take \"any\" or "
        "\"cpu\"",
        name);
}

esp_status espi_select_backends(esp_ctx *ctx, const char *name) {
    const espi_backend *first = strcmp(name, "any") == 0 ? usable_gpu() : NULL;
    const bool bf16 = strcmp(name, "cpu-bf16") == 0;
    const bool any_cpu = bf16 || strcmp(name, "auto") == 0 || strcmp(name, "cpu") == 0 || strcmp(name, "any") == 0;
    if (first != NULL) {
        espi_log(ctx, ESP_LOG_INFO, "backend any: taking %s", first->name);
    } else if (strcmp(name, "cuda") == 0) {
        ESPI_TRY(find_gpu(&first, name));
    } else if (any_cpu) {
        const char *forced = getenv("ESP_CPU_ISA");
        if (forced != NULL && forced[0] == '\0') forced = NULL;
        ESPI_TRY(find_cpu(&first, forced, bf16, forced ? "ESP_CPU_ISA" : "esp_ctx_config.backend"));
    } else if (strncmp(name, "cpu-", 4) == 0) {
        ESPI_TRY(find_cpu(&first, name + 4, false, "esp_ctx_config.backend"));
    } else if (strcmp(name, "ref") == 0) {
        first = &espi_backend_ref;
    } else if (strcmp(name, "ref64") == 0) {
        first = &espi_backend_ref64;
    } else {
        return ESPI_FAIL(ESP_ERR_ARG,
                         "esp_ctx_config.backend is \"%s\", expected auto, any, cpu, cuda, ref or ref64 (or cpu-bf16, or an instruction "
                         "set: cpu-generic, "
                         "cpu-avx2, cpu-avx512, cpu-avx512_bf16, cpu-amx_bf16)",
                         name);
    }
    ctx->n_backends = 0;
    ctx->real = first->real;
    ctx->real_size = esp_dtype_size(first->real);
    ctx->act = first->act;
    ctx->act_size = esp_dtype_size(first->act);
    ctx->device_ops = first->device;
    use(ctx, first);
    /* The reference computes in host memory, and in its own dtype alone. */
    if (first != &espi_backend_ref && first != &espi_backend_ref64 && first->device == NULL) use(ctx, &espi_backend_ref);
    return ESP_OK;
}
