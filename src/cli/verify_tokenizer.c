/* espalier verify: tokenizer/.  Ids and decoded texts of a file of strings. */
#include "cli/verify.h"

#include "io/file.h"

#include <stdlib.h>
#include <string.h>

/* What of one kind agreed and what did not. */
typedef struct tally {
    const char *key;
    int64_t lines, different;
} tally;

static void compare_ids(tally *t, const esp_tokenizer *tokenizer, const json_t *line, bool plain) {
    const json_t *text = json_object_get(line, "text"), *want = json_object_get(line, t->key);
    if (!json_is_string(text) || !json_is_array(want)) return;
    const size_t bytes = json_string_length(text), capacity = bytes + 16;
    int32_t *ids = espi_cli_memory(capacity * sizeof *ids);
    size_t n = 0;
    bool same = esp_tokenizer_encode(tokenizer, json_string_value(text), bytes, true, plain, ids, capacity, &n) == ESP_OK &&
                n == json_array_size(want);
    for (size_t i = 0; same && i < n; i++) same = ids[i] == json_integer_value(json_array_get(want, i));
    t->lines++;
    t->different += !same;
    free(ids);
}

static void compare_text(tally *t, const esp_tokenizer *tokenizer, const json_t *line, bool skip_special) {
    const json_t *ids = json_object_get(line, "ids"), *want = json_object_get(line, t->key);
    if (!json_is_array(ids) || !json_is_string(want)) return;
    const size_t n = json_array_size(ids), capacity = 4 * json_string_length(want) + 64 * n + 64;
    int32_t *values = espi_cli_memory(n * sizeof *values);
    char *text = espi_cli_memory(capacity);
    for (size_t i = 0; i < n; i++) values[i] = (int32_t)json_integer_value(json_array_get(ids, i));
    size_t bytes = 0;
    const bool same = esp_tokenizer_decode(tokenizer, values, n, skip_special, text, capacity, &bytes) == ESP_OK &&
                      bytes == json_string_length(want) && memcmp(text, json_string_value(want), bytes) == 0;
    t->lines++;
    t->different += !same;
    free(values);
    free(text);
}

static void report(espi_verify *v, const char *file, const tally *t) {
    char name[96];
    snprintf(name, sizeof name, "%s/%s of %lld lines", file, t->key, (long long)t->lines);
    if (t->lines > 0) espi_verify_count(v, name, t->different);
}

static void verify_lines(espi_verify *v, const char *file, const char *text, const esp_tokenizer *tokenizer) {
    tally ids = {.key = "ids"}, plain = {.key = "ids_plain"}, decoded = {.key = "decoded"}, skipped = {.key = "decoded_skip_special"};
    for (const char *start = text; *start;) {
        const size_t length = strcspn(start, "\n");
        json_t *line = json_loadb(start, length, JSON_ALLOW_NUL, NULL);
        if (!line && length > 0) espi_verify_fail(v, file, "a line is not JSON");
        compare_ids(&ids, tokenizer, line, false);
        compare_ids(&plain, tokenizer, line, true);
        compare_text(&decoded, tokenizer, line, false);
        compare_text(&skipped, tokenizer, line, true);
        json_decref(line);
        start += length + (start[length] == '\n');
    }
    report(v, file, &ids);
    report(v, file, &plain);
    report(v, file, &decoded);
    report(v, file, &skipped);
}

static void verify_file(espi_verify *v, const char *dir, const char *name, const char *tokenizer_path) {
    char *path = espi_cli_path(dir, name), *text = NULL;
    esp_tokenizer *tokenizer = NULL;
    esp_status status = esp_tokenizer_load(&tokenizer, tokenizer_path);
    if (status == ESP_OK) status = espi_file_read_all(&text, NULL, path, (size_t)1 << 30);
    if (status != ESP_OK)
        espi_verify_error(v, name, status);
    else
        verify_lines(v, name, text, tokenizer);
    esp_tokenizer_destroy(tokenizer);
    free(text);
    free(path);
}

/* The strings of `name` by the file `tokenizer` beside them, or the one that --tokenizer names when it is of that kind. */
static void verify_vocabulary(espi_verify *v, const char *dir, const char *name, const char *tokenizer, bool ranks) {
    if (!espi_is_file(dir, name)) return;
    char *beside = espi_cli_path(dir, tokenizer);
    const char *suffix = v->tokenizer ? strrchr(v->tokenizer, '.') : NULL;
    const bool named = v->tokenizer && (suffix && strcmp(suffix, ".tiktoken") == 0) == ranks;
    const char *path = named ? v->tokenizer : espi_is_file(dir, tokenizer) ? beside : NULL;
    char reason[160];
    snprintf(reason, sizeof reason, "needs the vocabulary %s: put it into the folder or name it by --tokenizer", tokenizer);
    if (path)
        verify_file(v, dir, name, path);
    else
        espi_verify_skip(v, name, reason);
    free(beside);
}

void espi_verify_tokenizer(espi_verify *v, const char *dir) {
    verify_vocabulary(v, dir, "o200k.jsonl", "o200k_base.tiktoken", true);
    verify_vocabulary(v, dir, "qwen3.jsonl", "tokenizer.json", false);
}
