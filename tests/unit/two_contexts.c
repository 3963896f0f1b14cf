/* Two threads, each with a context of its own: the same bits as one alone, and no data race (the preset tsan runs this; its main is plain
 * because Criterion does not start under ThreadSanitizer). */
#include "core/select.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 24, WIDTH = 96, OUT = 40, RANK = 4, ROUNDS = 20 };

typedef struct job {
    const char *backend;
    float y[ROWS * OUT]; /* result of the last round */
    esp_status status;
    char error[512];
} job;

static float value(int i) {
    return (float)(i * 2654435761u % 1000u) / 500.0f - 1.0f;
}

static esp_status passes(job *j) {
    float x[ROWS * WIDTH], gain[WIDTH], normed[ROWS * WIDTH], rstd[ROWS], w[OUT * WIDTH], a[RANK * WIDTH], b[OUT * RANK], u[ROWS * RANK];
    for (int i = 0; i < ROWS * WIDTH; i++) x[i] = value(i);
    for (int i = 0; i < WIDTH; i++) gain[i] = value(i + 3);
    for (int i = 0; i < OUT * WIDTH; i++) w[i] = value(i + 7);
    for (int i = 0; i < RANK * WIDTH; i++) a[i] = value(i + 11);
    for (int i = 0; i < OUT * RANK; i++) b[i] = value(i + 13);
    esp_ctx *ctx;
    ESPI_TRY(esp_ctx_create(&ctx, &ESP_CTX_CONFIG(.backend = j->backend, .threads = 1)));
    size_t bytes = 1 << 20;
    void *memory;
    esp_status status = espi_ctx_alloc(ctx, ESPI_MEM_ACTIVATIONS, bytes, &memory);
    for (int round = 0; round < ROUNDS && status == ESP_OK; round++) {
        espi_arena arena = espi_arena_over(memory, bytes);
        status = espi_op_rmsnorm_fwd(
            ctx, &arena, &(espi_rmsnorm_fwd){.y = normed, .rstd = rstd, .x = x, .w = gain, .rows = ROWS, .n = WIDTH, .eps = 1e-6});
        if (status == ESP_OK)
            status = espi_op_linear_fwd(ctx, &arena,
                                        &(espi_linear_fwd){.y = j->y,
                                                           .u = u,
                                                           .x = normed,
                                                           .w = {w, ESP_F32, OUT, WIDTH},
                                                           .lora = {.a = a, .b = b, .r = RANK, .scale = 2},
                                                           .tokens = ROWS});
        /* A failure in between: each thread has its own sentence. */
        if (status == ESP_OK && espi_ctx_alloc(ctx, ESPI_MEM_CACHE, SIZE_MAX, &(void *){NULL}) != ESP_ERR_MEMORY)
            status = ESPI_FAIL(ESP_ERR_INTERNAL, "an impossible allocation succeeded");
    }
    espi_ctx_free(ctx, ESPI_MEM_ACTIVATIONS, memory, bytes);
    esp_ctx_destroy(ctx);
    return status;
}

static void *run(void *argument) {
    job *j = argument;
    j->status = passes(j);
    snprintf(j->error, sizeof j->error, "%s", esp_last_error());
    return NULL;
}

/* 0 = as it should be. */
static int compare(const char *backend) {
    static job alone, both[2];
    alone.backend = both[0].backend = both[1].backend = backend;
    run(&alone);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, run, &both[i]) != 0) return 1;
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < 2; i++) {
        const job *j = &both[i];
        if (j->status != ESP_OK || alone.status != ESP_OK) {
            fprintf(stderr, "%s: alone: %s; thread %d: %s\n", backend, alone.error, i, j->error);
            return 1;
        }
        if (memcmp(j->y, alone.y, sizeof alone.y) != 0) {
            fprintf(stderr, "%s: thread %d has other bits than a context alone\n", backend, i);
            return 1;
        }
    }
    return 0;
}

int main(void) {
    int failed = compare("ref") + compare("cpu");
    printf("%s\n", failed ? "failed" : "ok");
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
