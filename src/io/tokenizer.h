/* A byte-level BPE in memory: tables that the readers build once (tokenizer_load.c from JSON, tokenizer_ranks.c from a rank file, both by
 * tokenizer_tables.c) and tokenizer.c only reads. */
#ifndef ESPI_IO_TOKENIZER_H
#define ESPI_IO_TOKENIZER_H

#include "espalier/tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

typedef struct espi_token {
    unsigned char *bytes; /* what it stands for; NULL: no token has this id */
    uint32_t n;
    bool added, special;
} espi_token;

/* left, right -> (rank, result); open addressing, empty slots have result -1. */
typedef struct espi_merge {
    int32_t left, right, rank, result;
} espi_merge;

/* Token bytes -> id; open addressing, empty slots are -1. */
typedef struct espi_vocab {
    int32_t *slots;
    size_t mask;
} espi_vocab;

enum { ESPI_MAX_TEMPLATE = 8 };

struct esp_tokenizer {
    espi_token *tokens;
    int32_t size; /* largest id + 1 */
    espi_vocab vocab;
    espi_merge *merges;
    size_t merge_mask, n_merges;
    int32_t byte_id[256];    /* token of a single byte, -1 = none */
    int32_t unknown;         /* id for a byte without a token, -1 = none stated */
    espi_vocab added;        /* of the added tokens */
    bool added_begins[256];  /* bytes that one of them begins with */
    uint32_t *added_lengths; /* their distinct lengths, longest first */
    int32_t n_added_lengths;
    bool nfc, ignore_merges;
    bool drop_gaps;                                               /* what the pattern does not match is no text */
    pcre2_code *split;                                            /* NULL: a text between added tokens is one piece */
    int32_t before[ESPI_MAX_TEMPLATE], behind[ESPI_MAX_TEMPLATE]; /* put around a text by the post-processor */
    int n_before, n_behind;
};

/* -1 = not in it. */
int32_t espi_vocab_find(const esp_tokenizer *t, const espi_vocab *vocab, const unsigned char *bytes, size_t n);
const espi_merge *espi_merge_find(const esp_tokenizer *t, int32_t left, int32_t right);

/* Building.  `path` is for messages. */
esp_status espi_tokens_create(esp_tokenizer *t, int32_t size, size_t n_vocab, size_t n_added, const char *path);
/* Replaces what the id had. */
esp_status espi_token_set(esp_tokenizer *t, int32_t id, const unsigned char *bytes, uint32_t n, const char *path);
/* The same for a token that no other one has the id of, into the vocabulary. */
esp_status espi_token_add(esp_tokenizer *t, int32_t id, const unsigned char *bytes, uint32_t n, const char *path);
/* An added token; espi_added_finish() when all are there. */
esp_status espi_added_add(esp_tokenizer *t, int32_t id, const char *content, bool special, const char *path);
void espi_added_finish(esp_tokenizer *t);
/* Of two equal merges the first counts. */
esp_status espi_merge_add(esp_tokenizer *t, int32_t left, int32_t right, int32_t rank, int32_t result, const char *path);
esp_status espi_split_compile(esp_tokenizer *t, const char *pattern, const char *path);

/* Ranks as tiktoken writes them (one base64 token and its rank a line) with the pattern and the special tokens of o200k_harmony. */
esp_status espi_ranks_read(esp_tokenizer *t, const char *text, size_t bytes, const char *path);

#endif
