/* Text of a row while it is sampled: whole characters, and stop strings found wherever the borders of tokens lie. */
#include "rl/sampler.h"

#include <string.h>

#define REPLACEMENT "\xEF\xBF\xBD"
enum { PIECE = 64 }; /* bytes that most tokens fit in */

static esp_status no_memory(const espi_row_text *text) {
    return ESPI_FAIL(ESP_ERR_MEMORY, "generate: no memory for more than %zu bytes of a row's text", text->held.used);
}

static esp_status append(espi_row_text *text, const char *bytes) {
    return espi_bytes_add(&text->held, bytes, strlen(bytes)) ? ESP_OK : no_memory(text);
}

/* A model may have more rows of embedding than its tokenizer has ids: such a token has no text. */
static esp_status append_token(espi_row_text *text, const esp_tokenizer *tokenizer, int32_t id) {
    for (size_t want = PIECE;;) {
        size_t n = 0;
        if (!espi_bytes_reserve(&text->held, want)) return no_memory(text);
        const esp_status status =
            esp_tokenizer_decode_next(tokenizer, &text->state, id, true, text->held.data + text->held.used, want + 1, &n);
        if (status == ESP_OK) text->held.used += n;
        if (status == ESP_ERR_ARG) return append(text, REPLACEMENT);
        if (status != ESP_ERR_SHAPE || n <= want) return status;
        want = n;
    }
}

/* Does a stop string begin at byte `at` of what is held?  whole: and end there too, or else go on behind what is held. */
static bool stop_at(const espi_row_text *text, size_t at, bool whole, const esp_generate_config *c) {
    const size_t left = text->held.used - at;
    for (int32_t i = 0; i < c->n_stop_strings; i++) {
        const size_t n = strlen(c->stop_strings[i]);
        if (whole ? n <= left && memcmp(text->held.data + at, c->stop_strings[i], n) == 0
                  : n > left && memcmp(text->held.data + at, c->stop_strings[i], left) == 0)
            return true;
    }
    return false;
}

esp_status espi_row_text_add(espi_row_text *text, size_t *certain, bool *stopped, const esp_generate_config *c, int32_t id) {
    ESPI_TRY(append_token(text, c->tokenizer, id));
    *certain = 0;
    while (*certain < text->held.used && !stop_at(text, *certain, true, c)) ++*certain;
    *stopped = *certain < text->held.used;
    if (*stopped) return ESP_OK;
    *certain = 0;
    while (*certain < text->held.used && !stop_at(text, *certain, false, c)) ++*certain;
    return ESP_OK;
}

esp_status espi_row_text_end(espi_row_text *text) {
    if (text->state.n_pending == 0) return append(text, "");
    text->state.n_pending = 0;
    return append(text, REPLACEMENT);
}

void espi_row_text_drop(espi_row_text *text, size_t n) {
    text->held.used -= n;
    memmove(text->held.data, text->held.data + n, text->held.used + 1);
}
