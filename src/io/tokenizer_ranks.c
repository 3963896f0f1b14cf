/* Rank files of tiktoken -> tables.  Such a file has neither pattern nor special tokens: its name says whose they are, and those of the
 * o200k family are here. */
#include "core/status.h"
#include "io/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CONTRACTIONS "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
#define LEAD "[^\\r\\n\\p{L}\\p{N}]?"
#define UPPER "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]"
#define LOWER "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]"
#define O200K_PATTERN                                                                                                                      \
    LEAD UPPER "*" LOWER "+" CONTRACTIONS "|" LEAD UPPER "+" LOWER "*" CONTRACTIONS                                                        \
               "|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* Ids of o200k_harmony: ranks, then special tokens, reserved ones but for these. */
enum { FIRST_SPECIAL = 199998, SIZE = 201088 };
static const struct special {
    int32_t id;
    const char *name;
} specials[] = {{199998, "<|startoftext|>"}, {199999, "<|endoftext|>"},  {200002, "<|return|>"}, {200003, "<|constrain|>"},
                {200005, "<|channel|>"},     {200006, "<|start|>"},      {200007, "<|end|>"},    {200008, "<|message|>"},
                {200012, "<|call|>"},        {200018, "<|endofprompt|>"}};

enum { LONGEST = 1024 }; /* bytes of one token; the real ones have at most 128 */

/* -1: no character of the alphabet. */
static int sextet(char c) {
    static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    const char *at = c ? strchr(alphabet, c) : NULL;
    return at ? (int)(at - alphabet) : -1;
}

/* Number of bytes, -1: not base64 in whole quadruples, or too long. */
static int32_t from_base64(unsigned char out[LONGEST], const char *text, size_t n) {
    int32_t bytes = 0;
    if (n == 0 || n % 4 != 0 || n / 4 * 3 > LONGEST) return -1;
    for (size_t i = 0; i < n; i += 4) {
        const bool last = i + 4 == n;
        const int pad = !last || text[i + 3] != '=' ? 0 : text[i + 2] != '=' ? 1 : 2;
        uint32_t bits = 0;
        for (int j = 0; j < 4; j++) {
            const int value = j < 4 - pad ? sextet(text[i + (size_t)j]) : 0;
            if (value < 0) return -1;
            bits = bits << 6 | (uint32_t)value;
        }
        for (int j = 0; j < 3 - pad; j++) out[bytes++] = (unsigned char)(bits >> (16 - 8 * j));
    }
    return bytes;
}

static esp_status add_line(esp_tokenizer *t, const char *line, size_t n, int64_t number, const char *path) {
    unsigned char bytes[LONGEST];
    const char *space = memchr(line, ' ', n);
    const size_t digits = space ? n - (size_t)(space + 1 - line) : 0;
    int32_t rank = digits > 0 && digits <= 6 ? 0 : -1;
    for (size_t i = 0; rank >= 0 && i < digits; i++)
        rank = space[1 + i] >= '0' && space[1 + i] <= '9' ? 10 * rank + (space[1 + i] - '0') : -1;
    const int32_t length = space ? from_base64(bytes, line, (size_t)(space - line)) : -1;
    if (length < 0 || rank < 0 || rank >= FIRST_SPECIAL)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: got %.*s, expected a token in base64, a space, and a rank below %d", path,
                         (long long)number, n < 60 ? (int)n : 60, line, FIRST_SPECIAL);
    if (espi_vocab_find(t, &t->vocab, bytes, (size_t)length) >= 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s:%lld: token %.*s: got a second time, expected each once", path, (long long)number,
                         (int)(space - line), line);
    return espi_token_add(t, rank, bytes, (uint32_t)length, path);
}

static esp_status read_tokens(esp_tokenizer *t, const char *text, size_t bytes, const char *path) {
    int64_t number = 0;
    for (size_t begin = 0; begin < bytes;) {
        const char *newline = memchr(text + begin, '\n', bytes - begin);
        const size_t end = newline ? (size_t)(newline - text) : bytes;
        const size_t n = end > begin && text[end - 1] == '\r' ? end - 1 - begin : end - begin;
        number++;
        if (n > 0) ESPI_TRY(add_line(t, text + begin, n, number, path));
        begin = end + 1;
    }
    for (int b = 0; b < 256; b++)
        if (t->byte_id[b] < 0)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: byte 0x%02X: got no token for it, expected one for each byte", path, b);
    return ESP_OK;
}

/* The rank of a merge is that of the joined bytes, so every way to cut a token into two tokens is a merge. */
static esp_status derive_merges(esp_tokenizer *t, const char *path) {
    for (int32_t id = 0; id < FIRST_SPECIAL; id++) {
        const espi_token *token = &t->tokens[id];
        for (uint32_t cut = 1; cut < token->n; cut++) {
            const int32_t left = espi_vocab_find(t, &t->vocab, token->bytes, cut);
            const int32_t right = left < 0 ? -1 : espi_vocab_find(t, &t->vocab, token->bytes + cut, token->n - cut);
            if (right >= 0) ESPI_TRY(espi_merge_add(t, left, right, id, id, path));
        }
    }
    return ESP_OK;
}

static esp_status add_specials(esp_tokenizer *t, const char *path) {
    const int n = (int)(sizeof specials / sizeof specials[0]);
    int next = 0;
    for (int32_t id = FIRST_SPECIAL; id < SIZE; id++) {
        char reserved[32];
        snprintf(reserved, sizeof reserved, "<|reserved_%d|>", id);
        const bool named = next < n && specials[next].id == id;
        ESPI_TRY(espi_added_add(t, id, named ? specials[next].name : reserved, true, path));
        next += named;
    }
    espi_added_finish(t);
    return ESP_OK;
}

esp_status espi_ranks_read(esp_tokenizer *t, const char *text, size_t bytes, const char *path) {
    const char *slash = strrchr(path, '/'), *name = slash ? slash + 1 : path;
    if (strncmp(name, "o200k_", 6) != 0)
        return ESPI_FAIL(
            ESP_ERR_UNSUPPORTED,
            "%s: got a rank file of another name, expected o200k_base.tiktoken: a rank file does not state its pattern and its "
            "special tokens, and only those of o200k are built in",
            path);
    ESPI_TRY(espi_tokens_create(t, SIZE, FIRST_SPECIAL, SIZE - FIRST_SPECIAL, path));
    t->ignore_merges = true;
    ESPI_TRY(read_tokens(t, text, bytes, path));
    ESPI_TRY(derive_merges(t, path));
    ESPI_TRY(add_specials(t, path));
    return espi_split_compile(t, O200K_PATTERN, path);
}
