/* A byte-level BPE in memory: tables that tokenizer_load.c builds once and tokenizer.c only reads. */
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
    size_t merge_mask;
    int32_t byte_id[256]; /* token of a single byte, -1 = none */
    int32_t unknown;      /* id for a byte without a token, -1 = none stated */
    int32_t *added;       /* ids of added tokens, longest first */
    int32_t n_added;
    bool nfc, ignore_merges;
    pcre2_code *split;                                            /* NULL: a text between added tokens is one piece */
    int32_t before[ESPI_MAX_TEMPLATE], behind[ESPI_MAX_TEMPLATE]; /* put around a text by the post-processor */
    int n_before, n_behind;
};

/* -1 = not in the vocabulary (added tokens not counted). */
int32_t espi_vocab_find(const esp_tokenizer *t, const unsigned char *bytes, size_t n);
const espi_merge *espi_merge_find(const esp_tokenizer *t, int32_t left, int32_t right);

#endif
