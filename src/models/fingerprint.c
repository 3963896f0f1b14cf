/* One number for all frozen weights as they lie in memory, whoever holds which expert: what is not an expert's byte by byte, and then one
 * number for each expert, by its place in the model. */
#include "kernels/backend.h"
#include "models/model.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#define WINDOW ((size_t)4 << 20)
enum { MOST_PIECES = 16 };

typedef struct reader {
    esp_ctx *ctx;
    XXH3_state_t *state;
    char *window; /* in the host's memory */
} reader;

static esp_status feed(reader *r, const void *data, size_t bytes) {
    for (size_t at = 0; at < bytes; at += WINDOW) {
        const size_t n = bytes - at < WINDOW ? bytes - at : WINDOW;
        ESPI_TRY(espi_ctx_get(r->ctx, r->window, (const char *)data + at, n));
        XXH3_64bits_update(r->state, r->window, n);
    }
    return ESP_OK;
}

/* An array of which every own expert has a part of the same size. */
typedef struct piece {
    const void *data;
    size_t each;
} piece;

/* What a layer's experts lie in; their number. */
static int pieces_of(piece out[MOST_PIECES], const esp_model *m, const espi_layer *w) {
    const espi_stack *const stacks[] = {&w->gate_up, &w->down};
    const float *const biases[] = {w->gate_up_bias, w->down_bias};
    int n = 0;
    for (int i = 0; i < ESPI_COUNT(stacks) && w->mlp == ESPI_MLP_MOE; i++) {
        const espi_stack *s = stacks[i];
        const size_t parts = (size_t)s->parts, blocks = (size_t)s->part_blocks;
        const piece all[] = {{s->data, parts * s->part_bytes},
                             {s->absmax, parts * blocks * sizeof *s->absmax},
                             {s->absmax8, parts * blocks},
                             {s->nested, parts * (size_t)s->part_nested * sizeof *s->nested},
                             {s->offset, parts * sizeof *s->offset},
                             {s->scales, parts * blocks},
                             {s->packed, s->packed ? m->ctx->backends[0]->packed_bytes(s) : 0},
                             {biases[i], (size_t)s->rows * sizeof *biases[i]}};
        for (int k = 0; k < ESPI_COUNT(all); k++)
            if (all[k].data) out[n++] = all[k];
    }
    return n;
}

/* The part of the block that a layer's experts fill, without a gap. */
static void find_experts(const char **first, const char **last, const esp_model *m, const espi_layer *w) {
    piece pieces[MOST_PIECES];
    const int n = pieces_of(pieces, m, w);
    *first = *last = NULL;
    for (int i = 0; i < n; i++) {
        const char *begin = pieces[i].data, *end = begin + ESPI_ALIGNED(pieces[i].each * (size_t)m->share.count);
        if (!*first || begin < *first) *first = begin;
        if (!*last || end > *last) *last = end;
    }
}

/* Where the layers that are no guests begin, behind what is of no layer. */
static const char *find_layers(const esp_model *m) {
    for (int64_t l = 0; l < m->config.layers; l++)
        if (!m->layers[l].home) return (const char *)m->layers[l].norm1;
    return (const char *)m->weights.main + m->weights.extent.main;
}

/* What is of no layer, what a layer has beside its experts, and an embedding in a device's host memory: wherever layers are at home. */
static esp_status feed_others(reader *r, const esp_model *m) {
    const char *begin = (const char *)m->weights.main + m->guest_bytes;
    ESPI_TRY(feed(r, begin, (size_t)(find_layers(m) - begin)));
    for (int64_t l = 0; l < m->config.layers; l++) {
        const espi_layer *w = &m->layers[l];
        const char *at = (const char *)w->norm1, *const end = at + w->bytes, *first, *last;
        ESPI_TRY(espi_guest_fetch(m, l));
        find_experts(&first, &last, m, w);
        if (first) ESPI_TRY(feed(r, at, (size_t)(first - at)));
        if (first) at = last;
        ESPI_TRY(feed(r, at, (size_t)(end - at)));
    }
    if (m->weights.host && !m->config.tied_head)
        XXH3_64bits_update(r->state, m->embed.data, (size_t)(m->embed.rows * m->embed.cols) * esp_dtype_size(m->embed.dtype));
    return ESP_OK;
}

/* own [layers, experts]: those of this rank, the others 0. */
static esp_status digest_experts(uint64_t *own, reader *r, const esp_model *m) {
    const espi_share *share = &m->share;
    for (int64_t l = 0; l < m->config.layers; l++) {
        piece pieces[MOST_PIECES];
        const int n = pieces_of(pieces, m, &m->layers[l]);
        ESPI_TRY(espi_guest_fetch(m, l));
        for (int64_t e = 0; e < share->count && n > 0; e++) {
            XXH3_64bits_reset(r->state);
            for (int i = 0; i < n; i++) ESPI_TRY(feed(r, (const char *)pieces[i].data + (size_t)e * pieces[i].each, pieces[i].each));
            own[l * share->experts + share->first + e] = XXH3_64bits_digest(r->state);
        }
    }
    return ESP_OK;
}

/* all [ranks, layers, experts]: every expert's number is that of the first rank that holds it. */
static void choose(uint64_t *own, const uint64_t *all, const esp_model *m) {
    const espi_share *share = &m->share;
    const int64_t stride = m->config.layers * share->experts;
    for (int member = 0; member < share->spread; member++)
        for (int64_t l = 0; l < m->config.layers; l++)
            for (int64_t e = espi_share_border(share, member); e < espi_share_border(share, member + 1); e++)
                own[l * share->experts + e] = all[member * stride + l * share->experts + e];
}

static esp_status fingerprint(uint64_t *hash, reader *r, const esp_model *m, uint64_t *own, uint64_t *all) {
    const size_t bytes = (size_t)(m->config.layers * m->share.experts) * sizeof *own;
    ESPI_TRY(digest_experts(own, r, m));
    ESPI_TRY(espi_comm_gather(m->share.comm, (espi_place){"fingerprints of experts", -1}, all, own, bytes));
    choose(own, all, m);
    XXH3_64bits_reset(r->state);
    ESPI_TRY(feed_others(r, m));
    XXH3_64bits_update(r->state, own, bytes);
    *hash = XXH3_64bits_digest(r->state);
    return ESP_OK;
}

esp_status espi_model_fingerprint(uint64_t *hash, const esp_model *model) {
    const size_t n = (size_t)(model->config.layers * model->share.experts);
    reader r = {.ctx = model->ctx, .state = XXH3_createState(), .window = malloc(WINDOW)};
    uint64_t *own = calloc(n, sizeof *own), *all = calloc(n * (size_t)model->share.ranks, sizeof *all);
    const esp_status status =
        r.state && r.window && own && all ? fingerprint(hash, &r, model, own, all) : ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a checksum");
    XXH3_freeState(r.state);
    free(r.window);
    free(own);
    free(all);
    return status;
}
