/* Two threads on one tokenizer: the same ids as alone, and no data race (plain main: Criterion does not start under ThreadSanitizer). */
#include "espalier/tokenizer.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINES = 64, ROUNDS = 20, ROOM = 4096 };

typedef struct job {
    const esp_tokenizer *tokenizer;
    int32_t ids[ROOM];
    size_t n;
    int failed;
} job;

static void *run(void *argument) {
    job *j = argument;
    static const char line[] = "It's 12345 na\xC3\xAFve caf\x65\xCC\x81 lines, <|im_start|>user\n  of text.\n";
    char text[LINES * sizeof line], back[16 * LINES * sizeof line];
    size_t bytes = 0, decoded;
    for (int i = 0; i < LINES; i++, bytes += sizeof line - 1) memcpy(text + bytes, line, sizeof line - 1);
    for (int round = 0; round < ROUNDS; round++) {
        j->failed += esp_tokenizer_encode(j->tokenizer, text, bytes, false, round % 2, j->ids, ROOM, &j->n) != ESP_OK;
        j->failed += esp_tokenizer_decode(j->tokenizer, j->ids, j->n, false, back, sizeof back, &decoded) != ESP_OK;
    }
    return NULL;
}

int main(void) {
    static job alone, both[2];
    esp_tokenizer *tokenizer;
    if (esp_tokenizer_load(&tokenizer, ESP_SOURCE_DIR "/tests/golden/data/tokenizer") != ESP_OK) {
        fprintf(stderr, "%s\n", esp_last_error());
        return EXIT_FAILURE;
    }
    alone.tokenizer = both[0].tokenizer = both[1].tokenizer = tokenizer;
    run(&alone);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++)
        if (pthread_create(&threads[i], NULL, run, &both[i]) != 0) return EXIT_FAILURE;
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    int failed = alone.failed || alone.n == 0;
    for (int i = 0; i < 2; i++)
        failed |= both[i].failed || both[i].n != alone.n || memcmp(both[i].ids, alone.ids, alone.n * sizeof *alone.ids) != 0;
    esp_tokenizer_destroy(tokenizer);
    printf("%s\n", failed ? "failed" : "ok");
    return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
