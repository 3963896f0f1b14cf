/* A task file: one JSON object a line.  A line gives its prompt and answer as
 *   "prompt", "answer"              text; the prompt gets the tokenizer's special tokens in front, the answer the end token behind
 *   "messages"                      a conversation in the chat format of the model's family; its last message, by the assistant, is the
 *                                   answer, unless "answer" gives one
 *   "text"                          all of it is answer but the first token; training only
 *   "prompt_ids", "answer_ids"      tokens as they are; "answer" may stand for the second
 *   "ids", "mask"                   tokens as they are, mask 1 where one is part of the answer; training only
 * Other keys are left alone. */
#ifndef ESPI_RL_TASKS_H
#define ESPI_RL_TASKS_H

#include "core/status.h"
#include "espalier/tokenizer.h"
#include "io/chat.h"

/* A line: tokens of the prompt and, behind them in the same array, of the answer. */
typedef struct espi_task {
    char *prompt, *answer; /* text, for what scores a completion; may be NULL where nothing does */
    int32_t *prompt_ids, *answer_ids;
    uint8_t *answer_mask;                  /* [n_answer] 0 = not trained on; NULL = all are */
    int32_t n_prompt, n_answer, n_counted; /* n_counted: trained on */
} espi_task;

typedef struct espi_tasks {
    espi_task *items;
    int64_t n;
    int32_t longest_prompt, longest_line; /* in tokens */
    uint64_t hash;                        /* of the file's bytes */
} espi_tasks;

typedef struct espi_tasks_options {
    const esp_tokenizer *tokenizer;
    int32_t eos;   /* ends an answer that is given as text */
    int64_t vocab; /* ids are below it */
    bool scored;   /* a prompt is continued and the completion compared with the answer: both have a text */
    espi_chat_options chat;
} espi_tasks_options;

/* ESP_ERR_IO; else the failure names file and line: not JSON, a key missing or of another type, an empty prompt, an id outside the
 * vocabulary, no line at all. */
esp_status espi_tasks_read(espi_tasks *tasks, const char *path, const espi_tasks_options *options);
void espi_tasks_free(espi_tasks *tasks);

#endif
