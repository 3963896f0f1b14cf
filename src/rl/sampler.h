/* The sampler's inside: what sampler.c holds and runs on the model, and sampler_generate.c schedules. */
#ifndef ESPI_RL_SAMPLER_H
#define ESPI_RL_SAMPLER_H

#include "contract/decoder.h"
#include "core/bytes.h"
#include "espalier/sampler.h"

/* Default of max_kept, where the vocabulary is larger. */
#define ESPI_SAMPLER_KEPT 1024

/* The arrays of one pass.  Everything of a pass lies in one block; the rooms' scratch comes behind it. */
typedef struct espi_sampler_arrays {
    int32_t *ids, *positions;                                  /* [pass_tokens] */
    int32_t *cu, *k_start, *k_len, *prefix_start, *prefix_len; /* [sequences+1], then [sequences] each */
    int32_t *row, *token;                                      /* [sequences] hidden state to draw from, what was drawn */
    double *uniform;                                           /* [sequences] */
    void *lp;                                                  /* real [sequences] */
    int32_t *kept, *kept_count;                                /* [sequences, max_kept], [sequences] */
    int32_t *chosen;                                           /* [L,tokens,K] of the last pass; NULL unless record_routes */
} espi_sampler_arrays;

/* ---- text of a row as it grows, sampler_text.c ---- */

typedef struct espi_row_text {
    esp_decode_state state;
    espi_bytes held; /* what may still turn out to be part of a stop string */
} espi_row_text;

/* Takes up one token.  *certain: that many bytes of held are text for sure; *stopped: a stop string follows them. */
esp_status espi_row_text_add(espi_row_text *text, size_t *certain, bool *stopped, const esp_generate_config *c, int32_t id);
/* No more tokens: an incomplete character becomes U+FFFD, and all that is held is text. */
esp_status espi_row_text_end(espi_row_text *text);
/* Forgets the first n bytes of held. */
void espi_row_text_drop(espi_row_text *text, size_t n);

/* A row that is being decoded. */
typedef struct espi_live_row {
    int32_t row, drawn;   /* of the request; tokens drawn so far */
    int32_t slot, prompt; /* where its own keys and values lie, and its prompt's */
    int32_t prefix, kept; /* keys of the prompt that it sees, keys of its own */
    int32_t next;         /* token to be fed */
    int32_t hidden;       /* hidden state of the pass that the next token is drawn from */
    espi_row_text text;
} espi_live_row;

struct esp_sampler {
    esp_model *model;
    int64_t sequences, length;
    int64_t prompts, completion; /* prompts held at once; longest completion, 0 = as long as `length` leaves */
    int64_t kept_most;
    bool record;
    int64_t pass_tokens; /* most tokens of one pass: a decode step of all rows, and prompts */
    espi_kv_cache cache;
    espi_room room;
    espi_arena arena;
    espi_sampler_arrays host, device; /* the same arrays as these files and as the ops see them */
    void *hidden;                     /* act [pass_tokens,H] */
    unsigned char *routes;            /* host memory [length,L,K] in the form of esp_batch: of the tokens that are told of */
    /* Bookkeeping of a call: the rows being decoded, in the order of the request; which slots are taken; how many still need a prompt. */
    espi_live_row *live; /* [sequences] */
    bool *taken;         /* [sequences] */
    int32_t *users;      /* [prompts] */
};

/* Runs the tokens of s->host: n_seqs spans that fill s->hidden.  routes: also s->host.chosen. */
esp_status espi_sampler_extend(esp_sampler *s, espi_arena *arena, int64_t tokens, int32_t n_seqs, bool routes);
/* Draws n tokens from the hidden states that s->host.row names.  temperature 0: the largest logit. */
esp_status espi_sampler_draw(esp_sampler *s, espi_arena *arena, int32_t n, double temperature, const espi_head_filter *filter);

#endif
