/* The tables of a tokenizer: token bytes -> id, pair -> merge, added tokens, the compiled pattern. */
#include "core/status.h"
#include "io/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

/* Unicode's White_Space.  PCRE2's own \s with UCP also matches U+180E, which Rust's and Oniguruma's do not. */
#define SPACES "\\t-\\r \\x{85}\\x{A0}\\x{1680}\\x{2000}-\\x{200A}\\x{2028}\\x{2029}\\x{202F}\\x{205F}\\x{3000}"

#define NO_MEMORY(path) ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the tokenizer's tables", path)

static size_t hash_bytes(const unsigned char *bytes, size_t n) {
    return (size_t)XXH3_64bits(bytes, n);
}

static size_t hash_pair(int32_t left, int32_t right) {
    const uint64_t key = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    return (size_t)(key * UINT64_C(0x9E3779B97F4A7C15) >> 20);
}

int32_t espi_vocab_find(const esp_tokenizer *t, const espi_vocab *vocab, const unsigned char *bytes, size_t n) {
    for (size_t i = hash_bytes(bytes, n) & vocab->mask; vocab->slots[i] >= 0; i = (i + 1) & vocab->mask) {
        const espi_token *token = &t->tokens[vocab->slots[i]];
        if (token->n == n && memcmp(token->bytes, bytes, n) == 0) return vocab->slots[i];
    }
    return -1;
}

static void vocab_insert(espi_vocab *vocab, const espi_token *token, int32_t id) {
    size_t i = hash_bytes(token->bytes, token->n) & vocab->mask;
    while (vocab->slots[i] >= 0) i = (i + 1) & vocab->mask;
    vocab->slots[i] = id;
}

/* At least twice as many slots as entries. */
static esp_status vocab_create(espi_vocab *vocab, size_t entries, const char *path) {
    size_t slots = 16;
    while (slots < 2 * entries) slots *= 2;
    vocab->slots = malloc(slots * sizeof *vocab->slots);
    if (!vocab->slots) return NO_MEMORY(path);
    memset(vocab->slots, 0xFF, slots * sizeof *vocab->slots);
    vocab->mask = slots - 1;
    return ESP_OK;
}

/* ---- tokens ---- */

esp_status espi_tokens_create(esp_tokenizer *t, int32_t size, size_t n_vocab, size_t n_added, const char *path) {
    t->size = size;
    t->unknown = -1;
    for (int b = 0; b < 256; b++) t->byte_id[b] = -1;
    t->tokens = calloc((size_t)size + 1, sizeof *t->tokens);
    t->added_lengths = calloc(n_added + 1, sizeof *t->added_lengths);
    if (!t->tokens || !t->added_lengths) return NO_MEMORY(path);
    ESPI_TRY(vocab_create(&t->vocab, n_vocab, path));
    return vocab_create(&t->added, n_added, path);
}

esp_status espi_token_set(esp_tokenizer *t, int32_t id, const unsigned char *bytes, uint32_t n, const char *path) {
    espi_token *token = &t->tokens[id];
    free(token->bytes);
    token->bytes = malloc((size_t)n + 1);
    if (!token->bytes) return NO_MEMORY(path);
    memcpy(token->bytes, bytes, n);
    token->bytes[n] = 0;
    token->n = n;
    return ESP_OK;
}

esp_status espi_token_add(esp_tokenizer *t, int32_t id, const unsigned char *bytes, uint32_t n, const char *path) {
    if (t->tokens[id].bytes)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: vocabulary: two tokens have id %d, one of them %.*s", path, id, (int)n, (const char *)bytes);
    ESPI_TRY(espi_token_set(t, id, bytes, n, path));
    if (n == 1) t->byte_id[bytes[0]] = id;
    vocab_insert(&t->vocab, &t->tokens[id], id);
    return ESP_OK;
}

esp_status espi_added_add(esp_tokenizer *t, int32_t id, const char *content, bool special, const char *path) {
    if (t->tokens[id].added)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: added tokens: got id %d twice, as %s and as %s, expected each once", path, id,
                         (const char *)t->tokens[id].bytes, content);
    ESPI_TRY(espi_token_set(t, id, (const unsigned char *)content, (uint32_t)strlen(content), path));
    t->tokens[id].added = true;
    t->tokens[id].special = special;
    t->added_begins[(unsigned char)content[0]] = true;
    t->added_lengths[t->n_added_lengths++] = t->tokens[id].n;
    vocab_insert(&t->added, &t->tokens[id], id);
    return ESP_OK;
}

static int longer_first(const void *a, const void *b) {
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x < y) - (x > y);
}

void espi_added_finish(esp_tokenizer *t) {
    int32_t n = 0;
    qsort(t->added_lengths, (size_t)t->n_added_lengths, sizeof *t->added_lengths, longer_first);
    for (int32_t i = 0; i < t->n_added_lengths; i++)
        if (n == 0 || t->added_lengths[i] != t->added_lengths[n - 1]) t->added_lengths[n++] = t->added_lengths[i];
    t->n_added_lengths = n;
}

/* ---- merges ---- */

static size_t merge_slot(const esp_tokenizer *t, int32_t left, int32_t right) {
    size_t i = hash_pair(left, right) & t->merge_mask;
    while (t->merges[i].result >= 0 && (t->merges[i].left != left || t->merges[i].right != right)) i = (i + 1) & t->merge_mask;
    return i;
}

const espi_merge *espi_merge_find(const esp_tokenizer *t, int32_t left, int32_t right) {
    const espi_merge *m = t->merges ? &t->merges[merge_slot(t, left, right)] : NULL;
    return m && m->result >= 0 ? m : NULL;
}

static esp_status grow_merges(esp_tokenizer *t, const char *path) {
    espi_merge *old = t->merges;
    const size_t had = old ? t->merge_mask + 1 : 0, slots = had ? 2 * had : 1024;
    espi_merge *merges = malloc(slots * sizeof *merges);
    if (!merges) return NO_MEMORY(path);
    memset(merges, -1, slots * sizeof *merges); /* every result */
    t->merges = merges;
    t->merge_mask = slots - 1;
    for (size_t i = 0; i < had; i++)
        if (old[i].result >= 0) merges[merge_slot(t, old[i].left, old[i].right)] = old[i];
    free(old);
    return ESP_OK;
}

esp_status espi_merge_add(esp_tokenizer *t, int32_t left, int32_t right, int32_t rank, int32_t result, const char *path) {
    if (!t->merges || 2 * (t->n_merges + 1) > t->merge_mask) ESPI_TRY(grow_merges(t, path));
    espi_merge *m = &t->merges[merge_slot(t, left, right)];
    if (m->result >= 0) return ESP_OK;
    *m = (espi_merge){.left = left, .right = right, .rank = rank, .result = result};
    t->n_merges++;
    return ESP_OK;
}

/* ---- the pattern ---- */

/* Replaces \s, inside and outside of classes, and \S outside of them, by explicit lists; everything else is copied. */
static char *portable_pattern(const char *pattern) {
    char *out = malloc(strlen(pattern) * (sizeof SPACES + 4) + 1), *w = out;
    bool in_class = false;
    for (const char *p = pattern; out && *p; p++) {
        if (p[0] == '\\' && (p[1] == 's' || (p[1] == 'S' && !in_class))) {
            w += sprintf(w, in_class ? "%s" SPACES : "[%s" SPACES "]", p[1] == 'S' ? "^" : "");
            p++;
            continue;
        }
        if (p[0] == '\\' && p[1])
            *w++ = *p++;
        else if (p[0] == '[')
            in_class = true;
        else if (p[0] == ']')
            in_class = false;
        *w++ = *p;
    }
    if (out) *w = 0;
    return out;
}

esp_status espi_split_compile(esp_tokenizer *t, const char *pattern, const char *path) {
    if (t->split) return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: pre_tokenizer: got two patterns, expected one", path);
    char *portable = portable_pattern(pattern);
    if (!portable) return NO_MEMORY(path);
    int error;
    PCRE2_SIZE at;
    t->split = pcre2_compile((PCRE2_SPTR)portable, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error, &at, NULL);
    free(portable);
    if (!t->split) {
        PCRE2_UCHAR text[128];
        pcre2_get_error_message(error, text, sizeof text);
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: pre_tokenizer: pattern %s: %s", path, pattern, (char *)text);
    }
    (void)pcre2_jit_compile(t->split, PCRE2_JIT_COMPLETE); /* without JIT the same matches, slower */
    return ESP_OK;
}
