/* Text of a row while it is sampled: whole characters, and stop strings found wherever the borders of tokens lie. */
#include "rl/sampler.h"

#include <stdlib.h>
#include <string.h>

#define REPLACEMENT "\xEF\xBF\xBD"
enum { PIECE = 64 }; /* bytes that most tokens fit in */

static esp_status make_room(espi_row_text *text, size_t n) {
    if (text->used + n + 1 <= text->capacity) return ESP_OK;
    const size_t capacity = 2 * (text->used + n + 1);
    char *grown = realloc(text->held, capacity);
    if (!grown) return ESPI_FAIL(ESP_ERR_MEMORY, "generate: no memory for %zu bytes of a row's text", capacity);
    text->held = grown;
    text->capacity = capacity;
    return ESP_OK;
}

static esp_status append(espi_row_text *text, const char *bytes) {
    const size_t n = strlen(bytes);
    ESPI_TRY(make_room(text, n));
    memcpy(text->held + text->used, bytes, n + 1);
    text->used += n;
    return ESP_OK;
}

/* A model may have more rows of embedding than its tokenizer has ids: such a token has no text. */
static esp_status append_token(espi_row_text *text, const esp_tokenizer *tokenizer, int32_t id) {
    for (size_t want = PIECE;;) {
        size_t n = 0;
        ESPI_TRY(make_room(text, want));
        const esp_status status = esp_tokenizer_decode_next(tokenizer, &text->state, id, true, text->held + text->used, want + 1, &n);
        if (status == ESP_OK) text->used += n;
        if (status == ESP_ERR_ARG) return append(text, REPLACEMENT);
        if (status != ESP_ERR_SHAPE || n <= want) return status;
        want = n;
    }
}

/* Does a stop string begin at byte `at` of what is held?  whole: and end there too, or else go on behind what is held. */
static bool stop_at(const espi_row_text *text, size_t at, bool whole, const esp_generate_config *c) {
    const size_t left = text->used - at;
    for (int32_t i = 0; i < c->n_stop_strings; i++) {
        const size_t n = strlen(c->stop_strings[i]);
        if (whole ? n <= left && memcmp(text->held + at, c->stop_strings[i], n) == 0
                  : n > left && memcmp(text->held + at, c->stop_strings[i], left) == 0)
            return true;
    }
    return false;
}

esp_status espi_row_text_add(espi_row_text *text, size_t *certain, bool *stopped, const esp_generate_config *c, int32_t id) {
    ESPI_TRY(append_token(text, c->tokenizer, id));
    *certain = 0;
    while (*certain < text->used && !stop_at(text, *certain, true, c)) ++*certain;
    *stopped = *certain < text->used;
    if (*stopped) return ESP_OK;
    *certain = 0;
    while (*certain < text->used && !stop_at(text, *certain, false, c)) ++*certain;
    return ESP_OK;
}

esp_status espi_row_text_end(espi_row_text *text) {
    if (text->state.n_pending == 0) return make_room(text, 0);
    text->state.n_pending = 0;
    return append(text, REPLACEMENT);
}

void espi_row_text_drop(espi_row_text *text, size_t n) {
    text->used -= n;
    memmove(text->held, text->held + n, text->used + 1);
}
