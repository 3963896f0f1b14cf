/* Forward of head.  Twin: backward/head.c. */
#include "contract/head.h"

#include "contract/pass.h"
#include "core/select.h"
#include "models/model.h"

#include <string.h>

static bool has_prefix(const esp_batch *batch, int32_t seq) {
    return batch->prefix_of && batch->prefix_of[seq] >= 0;
}

/* Token t of sequence seq. */
static bool counted(const esp_batch *batch, int32_t seq, int64_t t) {
    return batch->loss_mask ? batch->loss_mask[t] != 0 : t > batch->cu_seqlens[seq] || has_prefix(batch, seq);
}

int64_t espi_head_count_rows(const esp_batch *batch) {
    int64_t n = 0;
    for (int32_t s = 0; s < batch->n_seqs; s++)
        for (int64_t t = batch->cu_seqlens[s]; t < batch->cu_seqlens[s + 1]; t++) n += counted(batch, s, t);
    return n;
}

/* The host's side of the arrays that ops read. */
typedef struct host_rows {
    int32_t *row, *d_row, *target, *shared_row;
} host_rows;

/* Takes up the counted tokens of one sequence. */
static esp_status fill_sequence(espi_head_rows *rows, const host_rows *host, const esp_batch *batch, int32_t s) {
    const int32_t begin = batch->cu_seqlens[s];
    for (int32_t t = begin; t < batch->cu_seqlens[s + 1]; t++) {
        if (!counted(batch, s, t)) continue;
        const int64_t i = rows->n++;
        host->row[i] = host->d_row[i] = t - 1;
        host->target[i] = batch->tokens[t];
        rows->token[i] = t;
        if (t > begin) continue;
        if (!has_prefix(batch, s))
            return ESPI_FAIL(ESP_ERR_ARG,
                             "loss_mask[%d]: got 1 at the first token of sequence %d, expected 0: nothing stands before it to predict it",
                             begin, s);
        host->row[i] = batch->cu_seqlens[batch->prefix_of[s] + 1] - 1;
        host->d_row[i] = (int32_t)(batch->n_tokens + rows->shared);
        host->shared_row[rows->shared++] = host->row[i];
    }
    return ESP_OK;
}

static esp_status fill_rows(espi_head_rows *rows, const host_rows *host, const esp_batch *batch) {
    rows->n = 0;
    rows->cu[0] = 0;
    for (int32_t s = 0; s < batch->n_seqs; s++) {
        const int64_t first = rows->n;
        ESPI_TRY(fill_sequence(rows, host, batch, s));
        if (rows->n == first && espi_is_prefix(batch, s)) continue;
        rows->seq[rows->n_seqs++] = s;
        rows->cu[rows->n_seqs] = (int32_t)rows->n;
    }
    return ESP_OK;
}

/* The ids that were left when token t was sampled. */
static esp_status check_kept(const esp_model *model, const esp_batch *b, int32_t t) {
    const int64_t begin = b->kept_offsets[t], end = b->kept_offsets[t + 1];
    if (begin < 0 || end < begin || end > b->n_kept)
        return ESPI_FAIL(ESP_ERR_ARG, "kept_offsets[%d]: got %lld after %lld, expected ascending numbers up to n_kept, %lld", t + 1,
                         (long long)end, (long long)begin, (long long)b->n_kept);
    bool found = begin == end;
    for (int64_t i = begin; i < end; i++) {
        const int32_t id = b->kept_ids[i];
        if (id < 0 || id >= model->config.vocab || (i > begin && id <= b->kept_ids[i - 1]))
            return ESPI_FAIL(ESP_ERR_ARG, "kept_ids of token %d: got %d as number %lld, expected ascending ids from 0 to %lld", t, id,
                             (long long)(i - begin), (long long)model->config.vocab - 1);
        found = found || id == b->tokens[t];
    }
    if (found) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG,
                     "kept_ids of token %d: got %lld ids without the token itself, %d, expected it among them: it was drawn from these "
                     "(are the lists those of the tokens beside it?)",
                     t, (long long)(end - begin), b->tokens[t]);
}

/* Of each row what the filter of its token had left. */
static esp_status take_kept(espi_head_rows *rows, const esp_model *model, espi_arena *arena, const esp_batch *batch) {
    const size_t borders = ((size_t)rows->n + 1) * sizeof(int64_t), ids = (size_t)batch->n_kept * sizeof(int32_t);
    int64_t *offsets;
    int32_t *kept;
    if (!arena->dry &&
        (batch->n_kept != (batch->kept_offsets ? batch->kept_offsets[batch->n_tokens] : 0) || (batch->n_kept && !batch->kept_ids)))
        return ESPI_FAIL(ESP_ERR_SHAPE,
                         "kept ids: got n_kept %lld, kept_ids %s and kept_offsets up to %lld, expected as many as the offsets say",
                         (long long)batch->n_kept, batch->kept_ids ? "given" : "NULL",
                         (long long)(batch->kept_offsets ? batch->kept_offsets[batch->n_tokens] : 0));
    if (batch->n_kept == 0) return ESP_OK;
    ESPI_TRY(espi_arena_take_shared(arena, borders, &offsets, &rows->kept_offsets));
    ESPI_TRY(espi_arena_take_shared(arena, ids, &kept, &rows->kept));
    if (arena->dry) return ESP_OK;
    offsets[0] = 0;
    for (int64_t i = 0; i < rows->n; i++) {
        const int32_t t = rows->token[i];
        ESPI_TRY(check_kept(model, batch, t));
        const int64_t count = batch->kept_offsets[t + 1] - batch->kept_offsets[t];
        memcpy(kept + offsets[i], batch->kept_ids + batch->kept_offsets[t], (size_t)count * sizeof *kept);
        offsets[i + 1] = offsets[i] + count;
    }
    ESPI_TRY(espi_ctx_put(model->ctx, rows->kept_offsets, offsets, borders));
    return espi_ctx_put(model->ctx, rows->kept, kept, (size_t)offsets[rows->n] * sizeof *kept);
}

esp_status espi_head_rows_make(espi_head_rows *rows, const esp_model *model, espi_arena *arena, const esp_batch *batch) {
    const int64_t most = batch->n_tokens > 0 ? batch->n_tokens - 1 : 0, n = arena->dry ? most : espi_head_count_rows(batch);
    const size_t ints = (size_t)n * sizeof(int32_t), reals = (size_t)n * model->ctx->real_size;
    const size_t seqs = (size_t)batch->n_seqs * sizeof(int32_t);
    host_rows host;
    *rows = (espi_head_rows){.n = n};
    ESPI_TRY(espi_arena_take_shared(arena, ints, &host.row, &rows->row));
    ESPI_TRY(espi_arena_take_shared(arena, ints, &host.d_row, &rows->d_row));
    ESPI_TRY(espi_arena_take_shared(arena, ints, &host.target, &rows->target));
    ESPI_TRY(espi_arena_take_shared(arena, seqs, &host.shared_row, &rows->shared_row));
    ESPI_TRY(espi_arena_take_host(arena, ints, &rows->token));
    ESPI_TRY(espi_arena_take_host(arena, seqs + sizeof(int32_t), &rows->cu));
    ESPI_TRY(espi_arena_take_host(arena, seqs, &rows->seq));
    ESPI_TRY(espi_arena_take_shared(arena, reals, &rows->host.lp, &rows->lp));
    ESPI_TRY(espi_arena_take_shared(arena, reals, &rows->host.entropy, &rows->entropy));
    ESPI_TRY(espi_arena_take(arena, reals, &rows->lse));
    ESPI_TRY(espi_arena_take_shared(arena, reals, &rows->host.g, &rows->g));
    ESPI_TRY(espi_arena_take_shared(arena, reals, &rows->host.e, &rows->e));
    if (!arena->dry) ESPI_TRY(fill_rows(rows, &host, batch));
    ESPI_TRY(take_kept(rows, model, arena, batch));
    if (arena->dry) return ESP_OK;
    ESPI_TRY(espi_ctx_put(model->ctx, rows->row, host.row, ints));
    ESPI_TRY(espi_ctx_put(model->ctx, rows->target, host.target, ints));
    if (rows->shared == 0) { /* each row is its own */
        rows->d_row = NULL;
        return ESP_OK;
    }
    ESPI_TRY(espi_ctx_put(model->ctx, rows->shared_row, host.shared_row, (size_t)rows->shared * sizeof(int32_t)));
    return espi_ctx_put(model->ctx, rows->d_row, host.d_row, ints);
}

esp_status espi_head_read(esp_model *model, espi_arena *arena, const espi_head_rows *rows) {
    const size_t reals = (size_t)rows->n * model->ctx->real_size;
    if (arena->dry) return ESP_OK;
    ESPI_TRY(espi_ctx_get(model->ctx, rows->host.lp, rows->lp, reals));
    return espi_ctx_get(model->ctx, rows->host.entropy, rows->entropy, reals);
}

espi_head espi_head_describe(const esp_model *model, const espi_head_rows *rows, const void *hidden, double temperature) {
    return (espi_head){.hidden = hidden,
                       .rows = rows->row,
                       .d_rows = rows->d_row,
                       .target = rows->target,
                       .kept_offsets = rows->kept_offsets,
                       .kept = rows->kept,
                       .w = model->head,
                       .n = rows->n,
                       .temperature = temperature,
                       .logit_scale = 1.0};
}

esp_status espi_head_logprob(esp_model *model, espi_arena *arena, const espi_head_rows *rows, const void *hidden, double temperature) {
    const espi_head_stats args = {
        .head = espi_head_describe(model, rows, hidden, temperature), .lp = rows->lp, .entropy = rows->entropy, .lse = rows->lse};
    return espi_op_head_stats(model->ctx, arena, &args);
}

enum { LOGIT_ROWS = 32 }; /* of one call: what stands in working memory at a time */

esp_status espi_head_full_logits(esp_model *model, espi_arena *arena, float *logits, const void *hidden, int64_t tokens) {
    const int64_t v = model->config.vocab, step = tokens < LOGIT_ROWS ? tokens : LOGIT_ROWS;
    const size_t real = model->ctx->real_size;
    int32_t *rows, *d_rows;
    void *values, *d_values;
    ESPI_TRY(espi_arena_take_shared(arena, (size_t)step * sizeof *rows, &rows, &d_rows));
    ESPI_TRY(espi_arena_take_shared(arena, (size_t)(step * v) * real, &values, &d_values));
    for (int64_t t = 0; t < tokens; t += step) {
        const int64_t n = tokens - t < step ? tokens - t : step;
        const espi_head_rows described = {.n = n, .row = d_rows};
        for (int64_t i = 0; i < n && !arena->dry; i++) rows[i] = (int32_t)(t + i);
        if (!arena->dry) ESPI_TRY(espi_ctx_put(model->ctx, d_rows, rows, (size_t)n * sizeof *rows));
        const espi_head_logits args = {.head = espi_head_describe(model, &described, hidden, 1.0), .logits = d_values};
        ESPI_TRY(espi_op_head_logits(model->ctx, arena, &args));
        if (arena->dry) break;
        ESPI_TRY(espi_ctx_get(model->ctx, values, d_values, (size_t)(n * v) * real));
        for (int64_t j = 0; j < n * v; j++) logits[t * v + j] = (float)espi_real_get(values, j, model->ctx->real);
    }
    return ESP_OK;
}
