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

/* How many bytes from p on are valid. */
static size_t valid_length(const unsigned char *p, size_t n) {
    size_t at = 0, bad;
    while (at < n) {
        uint64_t eight = UINT64_C(0x8080808080808080);
        if (n - at >= sizeof eight) memcpy(&eight, p + at, sizeof eight);
        const bool ascii = (eight & UINT64_C(0x8080808080808080)) == 0;
        const size_t length = ascii ? sizeof eight : sequence_length(p + at, n - at, &bad);
        if (length == 0) break;
        at += length;
    }
    return at;
}

/* ---- growing lists ---- */

typedef struct bytes {
    unsigned char *p;
    size_t n, room;
} bytes;

static esp_status append(bytes *b, const void *data, size_t n) {
    if (n == 0) return ESP_OK;
    if (!b->p || n > b->room - b->n) {
        const size_t room = 2 * b->room + n + 64;
        unsigned char *p = realloc(b->p, room);
        if (!p) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu bytes of text", room);
        b->p = p;
        b->room = room;
    }
    memcpy(b->p + b->n, data, n);
    b->n += n;
    return ESP_OK;
}

/* A copy in which every invalid sequence is U+FFFD. */
static esp_status make_valid(bytes *out, const unsigned char *p, size_t n) {
    for (size_t at = 0; at < n;) {
        const size_t good = valid_length(p + at, n - at);
        size_t bad;
        ESPI_TRY(append(out, p + at, good));
        at += good;
        if (at == n) break;
        (void)sequence_length(p + at, n - at, &bad);
        ESPI_TRY(append(out, REPLACEMENT, 3));
        at += bad;
    }
    return ESP_OK;
}

/* ---- one call of encode ---- */

/* A piece that was met before: its bytes, zeros behind, and its ids. */
enum { CACHED_BYTES = 16, CACHED_IDS = 6, MAX_CACHE = 16384 };
typedef struct cached {
    uint64_t key[CACHED_BYTES / 8];
    int32_t ids[CACHED_IDS];
    uint8_t n, n_ids; /* n 0: nothing here yet */
} cached;

/* Everything that one call of encode needs; nothing of it is in the tokenizer, so calls from several threads do not meet. */
typedef struct encoder {
    const esp_tokenizer *t;
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack; /* NULL until a match needs more than the machine's own */
    int32_t *ids;
    size_t capacity, n;
    cached *cache; /* [cache_mask + 1], NULL for a short text */
    size_t cache_mask;
    bytes normal; /* a text between added tokens in NFC */
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

static esp_status byte_id(int32_t *id, const esp_tokenizer *t, unsigned char byte) {
    *id = t->byte_id[byte] >= 0 ? t->byte_id[byte] : t->unknown;
    if (*id < 0)
        return ESPI_FAIL(ESP_ERR_ARG, "text: got byte 0x%02X, for which the tokenizer has neither a token nor an unknown token", byte);
    return ESP_OK;
}

/* A long piece: a heap finds the next pair, so the time is n log n. */
static esp_status merge_long(encoder *e, const unsigned char *p, size_t n) {
    if (n > e->room) {
        struct symbol *symbols = realloc(e->symbols, n * sizeof *symbols);
        if (!symbols) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a piece of %zu bytes", n);
        e->symbols = symbols;
        e->room = n;
    }
    for (size_t i = 0; i < n; i++) {
        ESPI_TRY(byte_id(&e->symbols[i].id, e->t, p[i]));
        e->symbols[i].previous = (int32_t)i - 1;
        e->symbols[i].next = i + 1 < n ? (int32_t)i + 1 : -1;
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
    for (int32_t i = 0; i >= 0; i = e->symbols[i].next) emit(e, e->symbols[i].id);
    return ESP_OK;
}

/* A short one: the pairs lie in a row that is searched and closed up. */
enum { SHORT_PIECE = 32 };
static esp_status merge_short(encoder *e, const unsigned char *p, size_t n) {
    int32_t ids[SHORT_PIECE];
    const espi_merge *pairs[SHORT_PIECE];
    for (size_t i = 0; i < n; i++) ESPI_TRY(byte_id(&ids[i], e->t, p[i]));
    for (size_t i = 0; i + 1 < n; i++) pairs[i] = espi_merge_find(e->t, ids[i], ids[i + 1]);
    while (n > 1) {
        size_t best = n;
        for (size_t i = 0; i + 1 < n; i++)
            if (pairs[i] && (best == n || pairs[i]->rank < pairs[best]->rank)) best = i;
        if (best == n) break;
        ids[best] = pairs[best]->result;
        n--;
        memmove(ids + best + 1, ids + best + 2, (n - best - 1) * sizeof *ids);
        if (best + 1 < n) {
            memmove(pairs + best + 1, pairs + best + 2, (n - best - 2) * sizeof *pairs);
            pairs[best] = espi_merge_find(e->t, ids[best], ids[best + 1]);
        }
        if (best > 0) pairs[best - 1] = espi_merge_find(e->t, ids[best - 1], ids[best]);
    }
    for (size_t i = 0; i < n; i++) emit(e, ids[i]);
    return ESP_OK;
}

static esp_status merge_piece(encoder *e, const unsigned char *p, size_t n) {
    const int32_t whole = e->t->ignore_merges ? espi_vocab_find(e->t, &e->t->vocab, p, n) : -1;
    if (whole < 0) return n <= SHORT_PIECE ? merge_short(e, p, n) : merge_long(e, p, n);
    emit(e, whole);
    return ESP_OK;
}

/* Words repeat: a piece that a call has met before is not merged again. */
static esp_status encode_piece(encoder *e, const unsigned char *p, size_t n) {
    if (!e->cache || n > CACHED_BYTES) return merge_piece(e, p, n);
    uint64_t key[2] = {0};
    memcpy(key, p, n);
    const uint64_t hash = (key[0] * UINT64_C(0x9E3779B97F4A7C15)) ^ ((key[1] + n) * UINT64_C(0xC2B2AE3D27D4EB4F));
    cached *c = &e->cache[(hash >> 32 ^ hash >> 48) & e->cache_mask];
    if (c->n == n && c->key[0] == key[0] && c->key[1] == key[1]) {
        for (int i = 0; i < c->n_ids; i++) emit(e, c->ids[i]);
        return ESP_OK;
    }
    const size_t first = e->n;
    ESPI_TRY(merge_piece(e, p, n));
    if (e->n <= e->capacity && e->n - first <= CACHED_IDS) {
        *c = (cached){.key = {key[0], key[1]}, .n = (uint8_t)n, .n_ids = (uint8_t)(e->n - first)};
        memcpy(c->ids, e->ids + first, (e->n - first) * sizeof *c->ids);
    }
    return ESP_OK;
}

/* ---- pieces ---- */

/* A pattern of a file may be slow or deep on some text: both have a limit.  A run of letters is backtracked once a byte, hence the bytes.
 */
enum { MATCH_LIMIT = 10000000, STACK_FIRST = 64 << 10, STACK_MOST = 64 << 20 };

static esp_status create_match(encoder *e, size_t text_bytes) {
    e->match = pcre2_match_data_create(1, NULL);
    e->context = pcre2_match_context_create(NULL);
    if (!e->match || !e->context) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a match");
    pcre2_set_match_limit(e->context, MATCH_LIMIT + (uint32_t)text_bytes);
    return ESP_OK;
}

static esp_status find_piece(int *found, encoder *e, const unsigned char *p, size_t n, size_t at) {
    *found = pcre2_match(e->t->split, p, n, at, PCRE2_NO_UTF_CHECK, e->match, e->context);
    if (*found == PCRE2_ERROR_JIT_STACKLIMIT && !e->stack) {
        e->stack = pcre2_jit_stack_create(STACK_FIRST, STACK_MOST, NULL);
        if (!e->stack) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the stack of a match");
        pcre2_jit_stack_assign(e->context, NULL, e->stack);
        *found = pcre2_match(e->t->split, p, n, at, PCRE2_NO_UTF_CHECK, e->match, e->context);
    }
    if (*found >= 0 || *found == PCRE2_ERROR_NOMATCH) return ESP_OK;
    PCRE2_UCHAR reason[128];
    pcre2_get_error_message(*found, reason, sizeof reason);
    return ESPI_FAIL(ESP_ERR_ARG, "text: the tokenizer's pattern gave up at byte %zu of %zu: %s; expected text with shorter pieces", at, n,
                     (char *)reason);
}

/* Matches and the gaps between them are pieces. */
static esp_status split(encoder *e, const unsigned char *p, size_t n) {
    if (n == 0) return ESP_OK;
    if (!e->t->split) return encode_piece(e, p, n);
    const PCRE2_SIZE *where = pcre2_get_ovector_pointer(e->match);
    for (size_t at = 0; at < n;) {
        int found;
        ESPI_TRY(find_piece(&found, e, p, n, at));
        const size_t begin = found < 0 ? n : where[0], end = found < 0 ? n : where[1];
        if (begin > at && !e->t->drop_gaps) ESPI_TRY(encode_piece(e, p + at, begin - at));
        if (end > begin) ESPI_TRY(encode_piece(e, p + begin, end - begin));
        at = end > at ? end : at + 1;
    }
    return ESP_OK;
}

/* ---- text between added tokens ---- */

static size_t ascii_run(const unsigned char *p, size_t n) {
    size_t i = 0;
    while (i < n && p[i] < 0x80) i++;
    return i;
}

static esp_status compose(bytes *out, const unsigned char *p, size_t n) {
    utf8proc_uint8_t *composed;
    const utf8proc_ssize_t length = utf8proc_map(p, (utf8proc_ssize_t)n, &composed, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
    if (length < 0) return ESPI_FAIL(ESP_ERR_INTERNAL, "NFC of %zu bytes: %s", n, utf8proc_errmsg(length));
    const esp_status status = append(out, composed, (size_t)length);
    free(composed);
    return status;
}

/* NFC.  An ASCII character never joins what stands before it, so each run of others is composed on its own, with the one before it. */
static esp_status normalise(encoder *e, const unsigned char *p, size_t n) {
    if (!e->t->nfc || ascii_run(p, n) == n) return split(e, p, n);
    e->normal.n = 0;
    for (size_t at = 0; at < n;) {
        const size_t plain = ascii_run(p + at, n - at);
        size_t begin = at + plain, end = begin;
        while (end < n && p[end] >= 0x80) end++;
        if (end > begin && plain > 0) begin--;
        ESPI_TRY(append(&e->normal, p + at, begin - at));
        if (end > begin) ESPI_TRY(compose(&e->normal, p + begin, end - begin));
        at = end;
    }
    return split(e, e->normal.p, e->normal.n); /* NOLINT(clang-analyzer-unix.Malloc): freed where the encoder ends */
}

/* The added token that begins at p: the longest. */
static int32_t added_at(const esp_tokenizer *t, const unsigned char *p, size_t left) {
    for (int32_t i = 0; i < t->n_added_lengths; i++) {
        const size_t length = t->added_lengths[i];
        const int32_t id = length <= left ? espi_vocab_find(t, &t->added, p, length) : -1;
        if (id >= 0) return id;
    }
    return -1;
}

static esp_status encode_text(encoder *e, const unsigned char *p, size_t n, bool specials_as_text) {
    const bool *begins = e->t->added_begins;
    size_t from = 0;
    for (size_t at = 0; at < n && !specials_as_text;) {
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

/* A short text is not worth a cache. */
static esp_status create_cache(encoder *e, size_t text_bytes) {
    size_t slots = MAX_CACHE;
    while (slots > text_bytes / 16) slots /= 2;
    if (slots < 64) return ESP_OK;
    e->cache = calloc(slots, sizeof *e->cache);
    e->cache_mask = slots - 1;
    return e->cache ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a cache of %zu pieces", slots);
}

static esp_status encode_valid(encoder *e, const unsigned char *p, size_t n, bool specials_as_text) {
    ESPI_TRY(create_cache(e, n));
    if (e->t->split) ESPI_TRY(create_match(e, n));
    return encode_text(e, p, n, specials_as_text);
}

esp_status esp_tokenizer_encode(const esp_tokenizer *tokenizer, const char *text, size_t text_bytes, bool add_special,
                                bool specials_as_text, int32_t *ids, size_t capacity, size_t *n) {
    if (!tokenizer || (!text && text_bytes) || !n || (!ids && capacity))
        return ESPI_FAIL(ESP_ERR_ARG, "esp_tokenizer_encode: tokenizer, text, ids or n is NULL");
    if (text_bytes > INT32_MAX / 2)
        return ESPI_FAIL(ESP_ERR_ARG, "text: got %zu bytes, expected at most %d: cut it into documents", text_bytes, INT32_MAX / 2);
    encoder e = {.t = tokenizer, .ids = ids, .capacity = capacity};
    const unsigned char *p = (const unsigned char *)text;
    bytes mended = {0};
    esp_status status = ESP_OK;
    if (valid_length(p, text_bytes) < text_bytes) {
        status = make_valid(&mended, p, text_bytes);
        p = mended.p;
        text_bytes = mended.n;
    }
    for (int i = 0; i < tokenizer->n_before && add_special; i++) emit(&e, tokenizer->before[i]);
    if (status == ESP_OK) status = encode_valid(&e, p, text_bytes, specials_as_text);
    for (int i = 0; i < tokenizer->n_behind && add_special; i++) emit(&e, tokenizer->behind[i]);
    pcre2_match_data_free(e.match);
    pcre2_match_context_free(e.context);
    pcre2_jit_stack_free(e.stack);
    free(e.cache);
    free(e.normal.p);
    free(e.symbols);
    free(e.heap);
    free(mended.p);
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
    if (status == ESP_OK && valid.n >= capacity)
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
    const int32_t id = espi_vocab_find(tokenizer, &tokenizer->added, (const unsigned char *)token, n);
    return id >= 0 ? id : espi_vocab_find(tokenizer, &tokenizer->vocab, (const unsigned char *)token, n);
}
