/* Encoding and decoding: cut out added tokens, normalise, split, merge pairs of bytes; and back. */
#include "io/tokenizer.h"

#include "core/status.h"

#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#define REPLACEMENT "\xEF\xBF\xBD" /* U+FFFD */

/* ---- UTF-8 ---- */

/* Length of the valid sequence at p, or 0; *bad: how many bytes of an invalid one to replace (the longest valid beginning, at least 1). */
static size_t sequence_length(const unsigned char *p, size_t left, size_t *bad) {
    const unsigned char c = p[0];
    *bad = 1;
    if (c < 0x80) return 1;
    const size_t n = c >= 0xC2 && c <= 0xDF ? 2 : c >= 0xE0 && c <= 0xEF ? 3 : c >= 0xF0 && c <= 0xF4 ? 4 : 0;
    for (size_t i = 1; i < n; i++) {
        if (i >= left) return 0;
        unsigned char low = 0x80, high = 0xBF;
        if (i == 1) {
            if (c == 0xE0) low = 0xA0;  /* overlong */
            if (c == 0xED) high = 0x9F; /* surrogates */
            if (c == 0xF0) low = 0x90;
            if (c == 0xF4) high = 0x8F; /* beyond U+10FFFF */
        }
        if (p[i] < low || p[i] > high) return 0;
        *bad = i + 1;
    }
    return n;
}

/* How many bytes at the end of [p, p+n) are the beginning of a sequence that could still be completed. */
static size_t incomplete_tail(const unsigned char *p, size_t n) {
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        const unsigned char c = p[n - back];
        if (c < 0x80) return 0;
        if (c < 0xC0) continue;
        size_t bad;
        const size_t need = c <= 0xDF ? 2 : c <= 0xEF ? 3 : 4;
        if (c < 0xC2 || c > 0xF4 || need <= back) return 0;
        return sequence_length(p + n - back, back, &bad) == 0 && bad == back ? back : 0;
    }
    return 0;
}

/* ---- growing lists ---- */

typedef struct bytes {
    unsigned char *p;
    size_t n, room;
} bytes;

static esp_status append(bytes *b, const void *data, size_t n) {
    if (b->n + n > b->room) {
        const size_t room = 2 * b->room + n + 64;
        unsigned char *p = realloc(b->p, room);
        if (!p) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu bytes of text", room);
        b->p = p;
        b->room = room;
    }
    if (n) memcpy(b->p + b->n, data, n);
    b->n += n;
    return ESP_OK;
}

/* Everything that one call of encode needs; nothing of it is in the tokenizer, so calls from several threads do not meet. */
typedef struct encoder {
    const esp_tokenizer *t;
    pcre2_match_data *match;
    int32_t *ids;
    size_t capacity, n;
    /* The piece that is being merged: a chain of symbols, and the heap of pairs that could be merged next. */
    struct symbol {
        int32_t id, previous, next;
    } * symbols;
    struct pair {
        int32_t rank, left, left_id, right_id, result;
    } * heap;
    size_t room, heap_n, heap_room;
} encoder;

static void emit(encoder *e, int32_t id) {
    if (e->n < e->capacity) e->ids[e->n] = id;
    e->n++;
}

/* ---- byte pair merging ---- */

/* Lower rank first, then further left. */
static bool before(const struct pair *a, const struct pair *b) {
    return a->rank != b->rank ? a->rank < b->rank : a->left < b->left;
}

static esp_status push(encoder *e, int32_t left) {
    const struct symbol *a = &e->symbols[left];
    if (a->next < 0) return ESP_OK;
    const espi_merge *m = espi_merge_find(e->t, a->id, e->symbols[a->next].id);
    if (!m) return ESP_OK;
    if (e->heap_n == e->heap_room) {
        const size_t room = 2 * e->heap_room + 64;
        struct pair *heap = realloc(e->heap, room * sizeof *heap);
        if (!heap) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu pairs", room);
        e->heap = heap;
        e->heap_room = room;
    }
    size_t i = e->heap_n++;
    const struct pair new = {.rank = m->rank, .left = left, .left_id = m->left, .right_id = m->right, .result = m->result};
    for (; i > 0 && before(&new, &e->heap[(i - 1) / 2]); i = (i - 1) / 2) e->heap[i] = e->heap[(i - 1) / 2];
    e->heap[i] = new;
    return ESP_OK;
}

static struct pair pop(encoder *e) {
    const struct pair top = e->heap[0], last = e->heap[--e->heap_n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < e->heap_n; i = child) {
        if (child + 1 < e->heap_n && before(&e->heap[child + 1], &e->heap[child])) child++;
        if (!before(&e->heap[child], &last)) break;
        e->heap[i] = e->heap[child];
    }
    e->heap[i] = last;
    return top;
}

static esp_status merge_piece(encoder *e, const unsigned char *p, size_t n) {
    const esp_tokenizer *t = e->t;
    if (t->ignore_merges) {
        const int32_t whole = espi_vocab_find(t, p, n);
        if (whole >= 0) {
            emit(e, whole);
            return ESP_OK;
        }
    }
    if (n > e->room) {
        struct symbol *symbols = realloc(e->symbols, n * sizeof *symbols);
        if (!symbols) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a piece of %zu bytes", n);
        e->symbols = symbols;
        e->room = n;
    }
    for (size_t i = 0; i < n; i++) {
        const int32_t id = t->byte_id[p[i]] >= 0 ? t->byte_id[p[i]] : t->unknown;
        if (id < 0)
            return ESPI_FAIL(ESP_ERR_ARG, "text: got byte 0x%02X, for which the tokenizer has neither a token nor an unknown token", p[i]);
        e->symbols[i] = (struct symbol){.id = id, .previous = (int32_t)i - 1, .next = i + 1 < n ? (int32_t)i + 1 : -1};
    }
    e->heap_n = 0;
    for (size_t i = 0; i < n; i++) ESPI_TRY(push(e, (int32_t)i));
    while (e->heap_n > 0) {
        const struct pair best = pop(e);
        struct symbol *a = &e->symbols[best.left];
        /* A pair whose symbols have changed since it was pushed is stale. */
        if (a->id != best.left_id || a->next < 0 || e->symbols[a->next].id != best.right_id) continue;
        struct symbol *b = &e->symbols[a->next];
        a->id = best.result;
        a->next = b->next;
        b->id = -1;
        if (a->next >= 0) e->symbols[a->next].previous = best.left;
        if (a->previous >= 0) ESPI_TRY(push(e, a->previous));
        ESPI_TRY(push(e, best.left));
    }
    for (int32_t i = 0; n > 0 && i >= 0; i = e->symbols[i].next) emit(e, e->symbols[i].id);
    return ESP_OK;
}

/* Matches and the gaps between them are pieces. */
static esp_status split(encoder *e, const unsigned char *p, size_t n) {
    if (n == 0) return ESP_OK;
    if (!e->t->split) return merge_piece(e, p, n);
    size_t at = 0;
    while (at < n) {
        const int found = pcre2_match(e->t->split, p, n, at, PCRE2_NO_UTF_CHECK, e->match, NULL);
        if (found < 0 && found != PCRE2_ERROR_NOMATCH)
            return ESPI_FAIL(ESP_ERR_INTERNAL, "the tokenizer's pattern failed at byte %zu: PCRE2 error %d", at, found);
        const PCRE2_SIZE *where = pcre2_get_ovector_pointer(e->match);
        const size_t begin = found < 0 ? n : where[0], end = found < 0 ? n : where[1];
        if (begin > at) ESPI_TRY(merge_piece(e, p + at, begin - at));
        if (end > begin) ESPI_TRY(merge_piece(e, p + begin, end - begin));
        at = end > at ? end : at + 1;
    }
    return ESP_OK;
}

/* ---- text between added tokens ---- */

static bool is_ascii(const unsigned char *p, size_t n) {
    unsigned char any = 0;
    for (size_t i = 0; i < n; i++) any |= p[i];
    return any < 0x80;
}

static esp_status normalise(encoder *e, const unsigned char *p, size_t n) {
    if (!e->t->nfc || n == 0 || is_ascii(p, n)) return split(e, p, n);
    utf8proc_uint8_t *out;
    const utf8proc_ssize_t length = utf8proc_map(p, (utf8proc_ssize_t)n, &out, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (length < 0) return ESPI_FAIL(ESP_ERR_INTERNAL, "NFC of %zu bytes: %s", n, utf8proc_errmsg(length));
    const esp_status status = split(e, out, (size_t)length);
    free(out);
    return status;
}

/* The added token that begins at p: the longest. */
static int32_t added_at(const esp_tokenizer *t, const unsigned char *p, size_t left) {
    for (int32_t i = 0; i < t->n_added; i++) {
        const espi_token *token = &t->tokens[t->added[i]];
        if (token->n <= left && memcmp(token->bytes, p, token->n) == 0) return t->added[i];
    }
    return -1;
}

static esp_status encode_text(encoder *e, const unsigned char *p, size_t n, bool specials_as_text) {
    bool begins[256] = {false};
    for (int32_t i = 0; i < e->t->n_added && !specials_as_text; i++) begins[e->t->tokens[e->t->added[i]].bytes[0]] = true;
    size_t from = 0;
    for (size_t at = 0; at < n;) {
        const int32_t id = begins[p[at]] ? added_at(e->t, p + at, n - at) : -1;
        if (id < 0) {
            at++;
            continue;
        }
        ESPI_TRY(normalise(e, p + from, at - from));
        emit(e, id);
        at += e->t->tokens[id].n;
        from = at;
    }
    return normalise(e, p + from, n - from);
}

/* A copy in which every invalid sequence is U+FFFD. */
static esp_status make_valid(bytes *out, const unsigned char *p, size_t n) {
    for (size_t at = 0; at < n;) {
        size_t bad;
        const size_t good = sequence_length(p + at, n - at, &bad);
        ESPI_TRY(good ? append(out, p + at, good) : append(out, REPLACEMENT, 3));
        at += good ? good : bad;
    }
    return ESP_OK;
}

esp_status esp_tokenizer_encode(const esp_tokenizer *tokenizer, const char *text, size_t text_bytes, bool add_special,
                                bool specials_as_text, int32_t *ids, size_t capacity, size_t *n) {
    if (!tokenizer || (!text && text_bytes) || !n || (!ids && capacity))
        return ESPI_FAIL(ESP_ERR_ARG, "esp_tokenizer_encode: tokenizer, text, ids or n is NULL");
    if (text_bytes > INT32_MAX / 2)
        return ESPI_FAIL(ESP_ERR_ARG, "text: got %zu bytes, expected at most %d: cut it into documents", text_bytes, INT32_MAX / 2);
    encoder e = {.t = tokenizer, .ids = ids, .capacity = capacity};
    bytes valid = {0};
    esp_status status = make_valid(&valid, (const unsigned char *)text, text_bytes);
    if (status == ESP_OK && tokenizer->split) {
        e.match = pcre2_match_data_create(1, NULL);
        if (!e.match) status = ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a match");
    }
    for (int i = 0; i < tokenizer->n_before && add_special; i++) emit(&e, tokenizer->before[i]);
    if (status == ESP_OK) status = encode_text(&e, valid.p, valid.n, specials_as_text);
    for (int i = 0; i < tokenizer->n_behind && add_special; i++) emit(&e, tokenizer->behind[i]);
    pcre2_match_data_free(e.match);
    free(e.symbols);
    free(e.heap);
    free(valid.p);
    *n = e.n;
    if (status == ESP_OK && e.n > capacity)
        return ESPI_FAIL(ESP_ERR_SHAPE, "ids: got room for %zu, expected %zu: call again with that much", capacity, e.n);
    return status;
}

/* ---- decoding ---- */

static esp_status token_of(const espi_token **token, const esp_tokenizer *t, int32_t id) {
    if (id < 0 || id >= t->size || !t->tokens[id].bytes)
        return ESPI_FAIL(ESP_ERR_ARG, "id: got %d, expected one of the tokenizer's, below %d", id, t->size);
    *token = &t->tokens[id];
    return ESP_OK;
}

/* The bytes of `from`, made valid, into the caller's buffer with a NUL behind. */
static esp_status hand_out(char *text, size_t capacity, size_t *n, const bytes *from) {
    bytes valid = {0};
    esp_status status = make_valid(&valid, from->p, from->n);
    *n = valid.n;
    if (status == ESP_OK && valid.n + 1 > capacity)
        status = ESPI_FAIL(ESP_ERR_SHAPE, "text: got room for %zu bytes, expected %zu with the NUL: call again with that much", capacity,
                           valid.n + 1);
    if (status == ESP_OK) {
        if (valid.n) memcpy(text, valid.p, valid.n);
        text[valid.n] = 0;
    }
    free(valid.p);
    return status;
}

esp_status esp_tokenizer_decode(const esp_tokenizer *tokenizer, const int32_t *ids, size_t n_ids, bool skip_special, char *text,
                                size_t capacity, size_t *n) {
    if (!tokenizer || (!ids && n_ids) || !n || (!text && capacity))
        return ESPI_FAIL(ESP_ERR_ARG, "esp_tokenizer_decode: tokenizer, ids, text or n is NULL");
    bytes raw = {0};
    esp_status status = ESP_OK;
    for (size_t i = 0; i < n_ids && status == ESP_OK; i++) {
        const espi_token *token = NULL;
        status = token_of(&token, tokenizer, ids[i]);
        if (status == ESP_OK && !(skip_special && token->special)) status = append(&raw, token->bytes, token->n);
    }
    if (status == ESP_OK) status = hand_out(text, capacity, n, &raw);
    free(raw.p);
    return status;
}

esp_status esp_tokenizer_decode_next(const esp_tokenizer *tokenizer, esp_decode_state *state, int32_t id, bool skip_special, char *text,
                                     size_t capacity, size_t *n) {
    if (!tokenizer || !state || !n || (!text && capacity))
        return ESPI_FAIL(ESP_ERR_ARG, "esp_tokenizer_decode_next: tokenizer, state, text or n is NULL");
    const espi_token *token = NULL;
    ESPI_TRY(token_of(&token, tokenizer, id));
    bytes raw = {0};
    esp_status status = append(&raw, state->pending, (size_t)state->n_pending);
    if (status == ESP_OK && !(skip_special && token->special)) status = append(&raw, token->bytes, token->n);
    const size_t tail = status == ESP_OK ? incomplete_tail(raw.p, raw.n) : 0;
    raw.n -= tail;
    if (status == ESP_OK) status = hand_out(text, capacity, n, &raw);
    if (status == ESP_OK) { /* only now: a buffer that was too small loses nothing */
        state->n_pending = (int)tail;
        if (tail) memcpy(state->pending, raw.p + raw.n, tail);
    }
    free(raw.p);
    return status;
}

int32_t esp_tokenizer_size(const esp_tokenizer *tokenizer) {
    return tokenizer ? tokenizer->size : 0;
}

int32_t esp_tokenizer_id(const esp_tokenizer *tokenizer, const char *token) {
    if (!tokenizer || !token) return -1;
    const size_t n = strlen(token);
    for (int32_t i = 0; i < tokenizer->n_added; i++) {
        const espi_token *added = &tokenizer->tokens[tokenizer->added[i]];
        if (added->n == n && memcmp(added->bytes, token, n) == 0) return tokenizer->added[i];
    }
    return espi_vocab_find(tokenizer, (const unsigned char *)token, n);
}
