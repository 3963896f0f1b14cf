/* A task file: one JSON object a line, with the strings "prompt" and "answer". */
#ifndef ESPI_RL_TASKS_H
#define ESPI_RL_TASKS_H

#include "core/status.h"
#include "espalier/tokenizer.h"

/* A line, with its tokens: prompt ids (special tokens in front), and, for SFT, answer ids with the end token behind. */
typedef struct espi_task {
    char *prompt, *answer;
    int32_t *prompt_ids, *answer_ids;
    int32_t n_prompt, n_answer;
} espi_task;

typedef struct espi_tasks {
    espi_task *items;
    int64_t n;
    int32_t longest_prompt, longest_line; /* in tokens */
    uint64_t hash;                        /* of the file's bytes */
} espi_tasks;

/* eos: what ends an answer.  Other keys of a line are left alone.
 * ESP_ERR_IO, or ESP_ERR_FORMAT naming file and line: not JSON, a key missing or no string, an empty prompt, no line at all. */
esp_status espi_tasks_read(espi_tasks *tasks, const char *path, const esp_tokenizer *tokenizer, int32_t eos);
void espi_tasks_free(espi_tasks *tasks);

#endif
