/* Reads task files. */
#include "rl/tasks.h"
#include "io/file.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define MAX_TASK_FILE ((size_t)1 << 31)

/* text -> ids with room for one more. */
static esp_status encode(int32_t **ids, int32_t *n, const esp_tokenizer *tokenizer, const char *text, bool add_special) {
    const size_t bytes = strlen(text), capacity = bytes + 16;
    size_t count;
    *ids = malloc((capacity + 1) * sizeof **ids);
    if (!*ids) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu ids", capacity);
    /* Byte-level tokens hold at least one byte each; special tokens are few.  Task files are input, so specials in them are text. */
    ESPI_TRY(esp_tokenizer_encode(tokenizer, text, bytes, add_special, true, *ids, capacity, &count));
    *n = (int32_t)count;
    return ESP_OK;
}

static esp_status read_string(char **out, const json_t *object, const char *key, const char *path, int64_t line) {
    const json_t *value = json_object_get(object, key);
    if (!json_is_string(value))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: key \"%s\": got %s, expected a string", path, (long long)line, key,
                         value ? "another type" : "nothing");
    const size_t bytes = json_string_length(value);
    if (strlen(json_string_value(value)) != bytes)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: key \"%s\": got a string with a NUL inside, expected text", path, (long long)line, key);
    *out = malloc(bytes + 1);
    if (!*out) return ESPI_FAIL(ESP_ERR_MEMORY, "%s:%lld: no memory for %zu bytes", path, (long long)line, bytes);
    memcpy(*out, json_string_value(value), bytes + 1);
    return ESP_OK;
}

static esp_status fill(espi_task *task, const json_t *object, const char *path, int64_t line, const esp_tokenizer *tokenizer, int32_t eos) {
    ESPI_TRY(read_string(&task->prompt, object, "prompt", path, line));
    ESPI_TRY(read_string(&task->answer, object, "answer", path, line));
    ESPI_TRY(encode(&task->prompt_ids, &task->n_prompt, tokenizer, task->prompt, true));
    ESPI_TRY(encode(&task->answer_ids, &task->n_answer, tokenizer, task->answer, false));
    task->answer_ids[task->n_answer++] = eos;
    if (task->n_prompt == 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: the prompt has no token, expected at least 1", path, (long long)line);
    return ESP_OK;
}

static esp_status add_line(espi_tasks *tasks, const char *text, size_t bytes, const char *path, int64_t line,
                           const esp_tokenizer *tokenizer, int32_t eos) {
    json_error_t error;
    json_t *object = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!object) return ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: not JSON: %s", path, (long long)line, error.text);
    espi_task *task = &tasks->items[tasks->n++];
    const esp_status status = json_is_object(object)
                                  ? fill(task, object, path, line, tokenizer, eos)
                                  : ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: got another JSON value, expected an object", path, (long long)line);
    json_decref(object);
    if (status == ESP_OK) {
        const int32_t whole = task->n_prompt + task->n_answer;
        if (task->n_prompt > tasks->longest_prompt) tasks->longest_prompt = task->n_prompt;
        if (whole > tasks->longest_line) tasks->longest_line = whole;
    }
    return status;
}

static esp_status split(espi_tasks *tasks, const char *text, size_t bytes, const char *path, const esp_tokenizer *tokenizer, int32_t eos) {
    size_t lines = 1;
    for (size_t i = 0; i < bytes; i++) lines += text[i] == '\n';
    tasks->items = calloc(lines, sizeof *tasks->items);
    if (!tasks->items) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %zu lines", path, lines);
    int64_t line = 0;
    for (size_t begin = 0; begin < bytes;) {
        const char *newline = memchr(text + begin, '\n', bytes - begin);
        const size_t end = newline ? (size_t)(newline - text) : bytes;
        size_t blank = begin;
        line++;
        while (blank < end && (text[blank] == ' ' || text[blank] == '\t' || text[blank] == '\r')) blank++;
        if (blank < end) ESPI_TRY(add_line(tasks, text + begin, end - begin, path, line, tokenizer, eos));
        begin = end + 1;
    }
    if (tasks->n == 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no line, expected at least one {\"prompt\": .., \"answer\": ..}", path);
    return ESP_OK;
}

esp_status espi_tasks_read(espi_tasks *tasks, const char *path, const esp_tokenizer *tokenizer, int32_t eos) {
    char *text;
    size_t bytes;
    *tasks = (espi_tasks){0};
    ESPI_TRY(espi_file_read_all(&text, &bytes, path, MAX_TASK_FILE));
    tasks->hash = XXH64(text, bytes, 0);
    const esp_status status = split(tasks, text, bytes, path, tokenizer, eos);
    free(text);
    if (status != ESP_OK) espi_tasks_free(tasks);
    return status;
}

void espi_tasks_free(espi_tasks *tasks) {
    for (int64_t i = 0; i < tasks->n; i++) {
        free(tasks->items[i].prompt);
        free(tasks->items[i].answer);
        free(tasks->items[i].prompt_ids);
        free(tasks->items[i].answer_ids);
    }
    free(tasks->items);
    *tasks = (espi_tasks){0};
}
