/* Recordings of pieces of a pass, found again by the arguments of their ops. */
#include "core/record.h"
#include "kernels/backend.h"

#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

enum { RECORDINGS = 96 }; /* of decoding, one for each number of rows alive */

typedef struct recording {
    XXH128_hash_t key;
    bool used;
    void *graph; /* NULL: came once, not recorded yet */
    uint64_t last;
} recording;

struct espi_recordings {
    recording all[RECORDINGS];
    uint64_t clock;
    XXH3_state_t *walk; /* of the piece being walked, else NULL */
    bool busy;          /* a piece is on its way: one inside it is part of it */
};

void espi_recorded_op(esp_ctx *ctx, int op, const void *args, size_t bytes, const void *scratch) {
    XXH3_state_t *walk = ctx->recordings ? ctx->recordings->walk : NULL;
    if (!walk) return;
    (void)XXH3_128bits_update(walk, &op, sizeof op);
    (void)XXH3_128bits_update(walk, args, bytes);
    (void)XXH3_128bits_update(walk, &scratch, sizeof scratch);
}

static void forget(esp_ctx *ctx, recording *r) {
    if (r->graph) ctx->device_ops->graph_free(ctx->device, r->graph);
    *r = (recording){0};
}

void espi_recordings_free(esp_ctx *ctx) {
    if (!ctx->recordings) return;
    for (int i = 0; i < RECORDINGS; i++) forget(ctx, &ctx->recordings->all[i]);
    free(ctx->recordings);
    ctx->recordings = NULL;
}

/* The entry of this key, or a new one in the place of that which was not wanted for the longest time. */
static recording *look_up(esp_ctx *ctx, XXH128_hash_t key) {
    struct espi_recordings *all = ctx->recordings;
    recording *oldest = &all->all[0];
    for (int i = 0; i < RECORDINGS; i++) {
        recording *r = &all->all[i];
        if (r->used && XXH128_isEqual(r->key, key)) return r;
        if (r->last < oldest->last) oldest = r;
    }
    forget(ctx, oldest);
    oldest->key = key;
    return oldest;
}

static esp_status walk(XXH128_hash_t *key, esp_ctx *ctx, espi_arena *arena, espi_piece piece, void *user) {
    XXH3_state_t *state = XXH3_createState();
    if (!state) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory to walk a pass");
    (void)XXH3_128bits_reset(state);
    ctx->recordings->walk = state;
    arena->idle = true;
    const esp_status status = piece(user);
    arena->idle = false;
    ctx->recordings->walk = NULL;
    *key = XXH3_128bits_digest(state);
    (void)XXH3_freeState(state);
    return status;
}

static esp_status record(esp_ctx *ctx, recording *r, const char *name, espi_piece piece, void *user) {
    ESPI_TRY(ctx->device_ops->record_begin(ctx->device));
    const esp_status status = piece(user);
    const esp_status ended = ctx->device_ops->record_end(ctx->device, &r->graph);
    espi_log(ctx, ESP_LOG_SELECT, "%s: recorded", name);
    return status != ESP_OK ? status : ended;
}

static esp_status run(esp_ctx *ctx, espi_arena *arena, const char *name, espi_piece piece, void *user) {
    const espi_mark mark = espi_arena_mark(arena);
    XXH128_hash_t key;
    ESPI_TRY(walk(&key, ctx, arena, piece, user));
    recording *r = look_up(ctx, key);
    r->last = ++ctx->recordings->clock;
    if (!r->graph) {
        const bool second = r->used;
        r->used = true;
        espi_arena_release(arena, mark);
        if (!second) return piece(user);
        ESPI_TRY(record(ctx, r, name, piece, user));
    }
    return ctx->device_ops->launch(ctx->device, r->graph);
}

esp_status espi_recorded(esp_ctx *ctx, espi_arena *arena, bool allowed, const char *name, espi_piece piece, void *user) {
    if (!ctx->device || !allowed || arena->dry || (ctx->recordings && ctx->recordings->busy)) return piece(user);
    if (!ctx->recordings) ctx->recordings = calloc(1, sizeof *ctx->recordings);
    if (!ctx->recordings) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a list of recordings");
    ctx->recordings->busy = true;
    const esp_status status = run(ctx, arena, name, piece, user);
    ctx->recordings->busy = false;
    return status;
}
