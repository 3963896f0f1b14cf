/* Reads task files. */
#include "rl/tasks.h"
#include "io/file.h"
#include "rl/run.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define MAX_TASK_FILE ((size_t)1 << 31)

static esp_status copy_text(char **out, const json_t *object, const char *key) {
    const json_t *value = json_object_get(object, key);
    if (!json_is_string(value))
        return ESPI_FAIL(ESP_ERR_FORMAT, "key \"%s\": got %s, expected a string", key, value ? "another type" : "nothing");
    const size_t bytes = json_string_length(value);
    *out = malloc(bytes + 1);
    if (!*out) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu bytes", bytes);
    memcpy(*out, json_string_value(value), bytes + 1);
    return ESP_OK;
}

/* A list of integers from 0 to most. */
static esp_status copy_list(espi_ids *out, const json_t *object, const char *key, int64_t most) {
    const json_t *list = json_object_get(object, key);
    if (!json_is_array(list))
        return ESPI_FAIL(ESP_ERR_FORMAT, "key \"%s\": got %s, expected a list of integers", key, list ? "another type" : "nothing");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *value = json_array_get(list, i);
        if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) > most)
            return ESPI_FAIL(ESP_ERR_FORMAT, "key \"%s\": item %zu: got %s%lld, expected 0 to %lld", key, i,
                             json_is_integer(value) ? "" : "no integer, ", (long long)json_integer_value(value), (long long)most);
        ESPI_TRY(espi_ids_add(out, (int32_t)json_integer_value(value)));
    }
    return ESP_OK;
}

/* An answer as text, and the token that ends it. */
static esp_status append_answer(espi_ids *row, const char *answer, const espi_tasks_options *o) {
    ESPI_TRY(espi_ids_encode(row, o->tokenizer, answer, strlen(answer), false));
    return espi_ids_add(row, o->eos);
}

/* Each reader: the row of ids, how many of them are the prompt, and the texts that the line gives. */
typedef struct line {
    espi_ids row, mask; /* mask: of the whole row, empty = 1 behind the prompt */
    size_t n_prompt;
    char *prompt, *answer;
} line;

static esp_status read_text_pair(line *l, const json_t *object, const espi_tasks_options *o) {
    ESPI_TRY(copy_text(&l->prompt, object, "prompt"));
    ESPI_TRY(copy_text(&l->answer, object, "answer"));
    ESPI_TRY(espi_ids_encode(&l->row, o->tokenizer, l->prompt, strlen(l->prompt), true));
    l->n_prompt = l->row.n;
    return append_answer(&l->row, l->answer, o);
}

static esp_status read_messages(line *l, const json_t *object, const espi_tasks_options *o) {
    espi_chat_ids chat;
    const json_t *answer = json_object_get(object, "answer");
    const json_t *tools = json_object_get(object, "tools");
    if (tools && !json_is_null(tools)) return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "key \"tools\": got one, expected text messages only");
    if (answer) ESPI_TRY(copy_text(&l->answer, object, "answer"));
    ESPI_TRY(espi_chat_encode(&chat, json_object_get(object, "messages"), l->answer, o->tokenizer, &o->chat));
    l->row = chat.ids;
    l->n_prompt = (size_t)chat.n_prompt;
    if (answer)
        free(chat.answer);
    else
        l->answer = chat.answer;
    if (!l->answer)
        return ESPI_FAIL(ESP_ERR_FORMAT, "messages: got no answer, expected a last message of the assistant, or the key \"answer\"");
    return ESP_OK;
}

static esp_status read_text(line *l, const json_t *object, const espi_tasks_options *o) {
    char *text = NULL;
    ESPI_TRY(copy_text(&text, object, "text"));
    esp_status status = espi_ids_encode(&l->row, o->tokenizer, text, strlen(text), true);
    free(text);
    ESPI_TRY(status);
    l->n_prompt = l->row.n > 0 ? 1 : 0; /* nothing stands before the first token */
    return espi_ids_add(&l->row, o->eos);
}

static esp_status read_ids(line *l, const json_t *object, const espi_tasks_options *o) {
    ESPI_TRY(copy_list(&l->row, object, "prompt_ids", o->vocab - 1));
    l->n_prompt = l->row.n;
    if (json_object_get(object, "answer")) ESPI_TRY(copy_text(&l->answer, object, "answer"));
    if (json_object_get(object, "answer_ids") || !l->answer) return copy_list(&l->row, object, "answer_ids", o->vocab - 1);
    return append_answer(&l->row, l->answer, o);
}

static esp_status read_masked(line *l, const json_t *object, const espi_tasks_options *o) {
    ESPI_TRY(copy_list(&l->row, object, "ids", o->vocab - 1));
    ESPI_TRY(copy_list(&l->mask, object, "mask", 1));
    if (l->mask.n != l->row.n)
        return ESPI_FAIL(ESP_ERR_FORMAT, "key \"mask\": got %zu items, expected %zu, as many as \"ids\"", l->mask.n, l->row.n);
    while (l->n_prompt < l->mask.n && !l->mask.p[l->n_prompt]) l->n_prompt++;
    if (l->n_prompt == 0)
        return ESPI_FAIL(ESP_ERR_FORMAT,
                         "key \"mask\": got 1 for the first token, expected 0: nothing stands before it to predict it from");
    return ESP_OK;
}

static const struct form {
    const char *key;
    esp_status (*read)(line *l, const json_t *object, const espi_tasks_options *o);
    bool trains_only; /* there is no prompt to be continued */
} forms[] = {{"prompt", read_text_pair, false},
             {"messages", read_messages, false},
             {"prompt_ids", read_ids, false},
             {"text", read_text, true},
             {"ids", read_masked, true}};

static esp_status find_form(const struct form **found, const json_t *object, bool scored) {
    *found = NULL;
    for (int i = 0; i < ESPI_COUNT(forms); i++) {
        if (!json_object_get(object, forms[i].key)) continue;
        if (*found) return ESPI_FAIL(ESP_ERR_FORMAT, "got the keys \"%s\" and \"%s\", expected one of them", (*found)->key, forms[i].key);
        *found = &forms[i];
    }
    if (!*found)
        return ESPI_FAIL(ESP_ERR_FORMAT, "got none of the keys \"prompt\", \"messages\", \"prompt_ids\", \"text\", \"ids\", expected one");
    if (scored && (*found)->trains_only)
        return ESPI_FAIL(ESP_ERR_FORMAT,
                         "key \"%s\": a prompt is continued here and the completion compared with an answer: got neither, expected "
                         "\"prompt\", \"messages\" or \"prompt_ids\"",
                         (*found)->key);
    return ESP_OK;
}

/* Texts of what came as ids. */
static esp_status add_texts(line *l, const espi_tasks_options *o) {
    const int32_t n_prompt = (int32_t)l->n_prompt, n_answer = (int32_t)(l->row.n - l->n_prompt);
    if (!l->prompt) ESPI_TRY(espi_completion_text(&l->prompt, o->tokenizer, l->row.p, n_prompt, false));
    if (l->answer) return ESP_OK;
    const bool ended = n_answer > 0 && l->row.p[l->row.n - 1] == o->eos;
    return espi_completion_text(&l->answer, o->tokenizer, l->row.p + l->n_prompt, n_answer, ended);
}

static esp_status check(line *l, const espi_tasks_options *o) {
    size_t counted = l->row.n - l->n_prompt;
    for (size_t i = l->n_prompt; i < l->mask.n; i++) counted -= !l->mask.p[i];
    if (l->n_prompt == 0) return ESPI_FAIL(ESP_ERR_FORMAT, "the prompt has no token, expected at least 1");
    if (counted == 0) return ESPI_FAIL(ESP_ERR_FORMAT, "the answer has no token, expected at least 1");
    if (l->row.n > INT32_MAX / 2) return ESPI_FAIL(ESP_ERR_FORMAT, "got %zu tokens, expected at most %d", l->row.n, INT32_MAX / 2);
    for (size_t i = 0; i < l->row.n; i++)
        if (l->row.p[i] >= o->vocab)
            return ESPI_FAIL(ESP_ERR_FORMAT, "token %zu: got id %d, expected one below the model's %lld: is this its tokenizer?", i,
                             l->row.p[i], (long long)o->vocab);
    return o->scored ? add_texts(l, o) : ESP_OK;
}

/* The line's memory becomes the task's, whatever is wrong with the line: the tasks free it. */
static void keep(espi_task *task, const line *l) {
    *task = (espi_task){.prompt = l->prompt,
                        .answer = l->answer,
                        .prompt_ids = l->row.p,
                        .answer_ids = l->row.p + l->n_prompt,
                        .n_prompt = (int32_t)l->n_prompt,
                        .n_answer = (int32_t)(l->row.n - l->n_prompt)};
    task->n_counted = task->n_answer;
}

/* Only of a line that was checked: the mask then has as many entries as the line has tokens. */
static esp_status keep_mask(espi_task *task, const line *l) {
    if (l->mask.n == 0) return ESP_OK;
    task->answer_mask = malloc((size_t)task->n_answer);
    if (!task->answer_mask) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a mask of %d tokens", task->n_answer);
    for (int32_t i = 0; i < task->n_answer; i++) {
        task->answer_mask[i] = l->mask.p[task->n_prompt + i] != 0;
        task->n_counted -= !task->answer_mask[i];
    }
    return ESP_OK;
}

static esp_status read_line(espi_task *task, const char *text, size_t bytes, const espi_tasks_options *o) {
    json_error_t error;
    const struct form *form = NULL;
    line l = {0};
    json_t *object = json_loadb(text, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!object) return ESPI_FAIL(ESP_ERR_FORMAT, "not JSON: %s", error.text);
    esp_status status = json_is_object(object) ? find_form(&form, object, o->scored)
                                               : ESPI_FAIL(ESP_ERR_FORMAT, "got another JSON value, expected an object");
    if (status == ESP_OK) status = form->read(&l, object, o);
    if (status == ESP_OK) status = check(&l, o);
    json_decref(object);
    keep(task, &l);
    if (status == ESP_OK) status = keep_mask(task, &l);
    free(l.mask.p);
    return status;
}

static esp_status add_line(espi_tasks *tasks, const char *text, size_t bytes, const char *path, int64_t number,
                           const espi_tasks_options *o) {
    espi_task *task = &tasks->items[tasks->n++];
    const esp_status status = read_line(task, text, bytes, o);
    if (status != ESP_OK) return ESPI_FAIL(status, "%s:%lld: %s", path, (long long)number, esp_last_error());
    const int32_t whole = task->n_prompt + task->n_answer;
    if (task->n_prompt > tasks->longest_prompt) tasks->longest_prompt = task->n_prompt;
    if (whole > tasks->longest_line) tasks->longest_line = whole;
    return ESP_OK;
}

static esp_status split(espi_tasks *tasks, const char *text, size_t bytes, const char *path, const espi_tasks_options *options) {
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
        if (blank < end) ESPI_TRY(add_line(tasks, text + begin, end - begin, path, line, options));
        begin = end + 1;
    }
    if (tasks->n == 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no line, expected at least one {\"prompt\": .., \"answer\": ..}", path);
    return ESP_OK;
}

esp_status espi_tasks_read(espi_tasks *tasks, const char *path, const espi_tasks_options *options) {
    char *text;
    size_t bytes;
    *tasks = (espi_tasks){0};
    ESPI_TRY(espi_file_read_all(&text, &bytes, path, MAX_TASK_FILE));
    tasks->hash = XXH64(text, bytes, 0);
    const esp_status status = split(tasks, text, bytes, path, options);
    free(text);
    if (status != ESP_OK) espi_tasks_free(tasks);
    return status;
}

void espi_tasks_free(espi_tasks *tasks) {
    for (int64_t i = 0; i < tasks->n; i++) {
        free(tasks->items[i].prompt);
        free(tasks->items[i].answer);
        free(tasks->items[i].prompt_ids);
        free(tasks->items[i].answer_mask);
    }
    free(tasks->items);
    *tasks = (espi_tasks){0};
}
