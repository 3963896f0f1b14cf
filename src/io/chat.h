/* Messages -> tokens, as the chat templates of two families of models write them.  What a message says is always plain text: control tokens
 * come from the format alone. */
#ifndef ESPI_IO_CHAT_H
#define ESPI_IO_CHAT_H

#include "io/ids.h"

#include <jansson.h>

typedef enum espi_chat_format {
    ESPI_CHAT_NONE,   /* the family states none: messages are refused */
    ESPI_CHAT_CHATML, /* Qwen3: <|im_start|>role ... <|im_end|>, with its thinking block */
    ESPI_CHAT_HARMONY /* gpt-oss: <|start|>role<|message|> ... <|end|>, channels, <|return|> */
} espi_chat_format;

typedef struct espi_chat_options {
    espi_chat_format format;
    bool no_thinking; /* ChatML: the assistant's turn begins with an empty thinking block (the template's enable_thinking = false) */
} espi_chat_options;

/* Prompt and answer as one row of ids. */
typedef struct espi_chat_ids {
    espi_ids ids;
    int32_t n_prompt;
    char *answer; /* text of the answer, NULL: none */
} espi_chat_ids;

/* messages: [{"role", "content"}, ...].  answer NULL: a last message of the assistant is the answer, else there is none and the prompt ends
 * with the beginning of the assistant's turn (ids.n = n_prompt).  answer given: it is the assistant's last message.  An answer ends with
 * the token that ends the turn.  ESP_ERR_FORMAT: what is no message; ESP_ERR_UNSUPPORTED: roles, tools and contents that the format is not
 * written for; a tokenizer without the format's tokens. */
esp_status espi_chat_encode(espi_chat_ids *out, const json_t *messages, const char *answer, const esp_tokenizer *tokenizer,
                            const espi_chat_options *options);
void espi_chat_free(espi_chat_ids *chat);

#endif
