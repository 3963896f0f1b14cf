/* Batches of rollouts: memory, joining, picking, checking, and the arrays of a checkpoint.  One table names every column. */
#include "rl/rollout.h"

#include "core/status.h"
#include "rl/ranks.h"

#include <stdlib.h>
#include <string.h>

typedef enum unit { ROW, TOKEN, KEPT, UNITS } unit;
typedef enum width { ONE, REWARDS, ROUTES } width;

typedef struct column {
    const char *name; /* in a checkpoint */
    size_t offset;    /* of its pointer */
    esp_dtype dtype;
    unit unit;
    width width;
    unit border; /* the array has one element more and points into this unit: offsets; else UNITS */
} column;

#define AT(field) offsetof(espi_rollouts, field)
static const column columns[] = {
    {"rollout/offsets", AT(offsets), ESP_I64, ROW, ONE, TOKEN},
    {"rollout/n_prompt", AT(n_prompt), ESP_I32, ROW, ONE, UNITS},
    {"rollout/tokens", AT(tokens), ESP_I32, TOKEN, ONE, UNITS},
    {"rollout/loss_mask", AT(loss_mask), ESP_U8, TOKEN, ONE, UNITS},
    {"rollout/sampler_logprob", AT(sampler_logprob), ESP_F32, TOKEN, ONE, UNITS},
    {"rollout/finish", AT(finish), ESP_U8, ROW, ONE, UNITS},
    {"rollout/group", AT(group), ESP_I64, ROW, ONE, UNITS},
    {"rollout/version", AT(version), ESP_I64, ROW, ONE, UNITS},
    {"rollout/routes", AT(routes), ESP_U8, TOKEN, ROUTES, UNITS},
    {"rollout/kept_offsets", AT(kept_offsets), ESP_I64, TOKEN, ONE, KEPT},
    {"rollout/kept_ids", AT(kept_ids), ESP_I32, KEPT, ONE, UNITS},
    {"rollout/rewards", AT(rewards), ESP_F64, ROW, REWARDS, UNITS},
    {"rollout/advantage", AT(advantage), ESP_F64, ROW, ONE, UNITS},
    /* Those before are a source's. */
    {"rollout/reward", AT(reward), ESP_F64, ROW, ONE, UNITS},
    {"rollout/exact", AT(exact), ESP_F64, ROW, ONE, UNITS},
    {"rollout/old_logprob", AT(old_logprob), ESP_F32, TOKEN, ONE, UNITS},
    {"rollout/ref_logprob", AT(ref_logprob), ESP_F32, TOKEN, ONE, UNITS},
    {"rollout/is_ratio", AT(is_ratio), ESP_F32, TOKEN, ONE, UNITS},
};

enum { OF_SOURCE = 13 };

static bool present(const column *c, const espi_rollouts_shape *s) {
    if (c->width == ROUTES) return s->route_bytes > 0;
    return s->filtered || (c->unit != KEPT && c->border != KEPT);
}

static int64_t units(const espi_rollouts_shape *s, unit u) {
    return u == ROW ? s->rows : u == TOKEN ? s->tokens : s->kept;
}

static int64_t wide(const espi_rollouts_shape *s, const column *c) {
    return c->width == REWARDS ? s->rewards : c->width == ROUTES ? s->layers * s->top_k * s->route_bytes : 1;
}

static int64_t count(const espi_rollouts_shape *s, const column *c) {
    return (units(s, c->unit) + (c->border != UNITS)) * wide(s, c);
}

static void *get(const espi_rollouts *r, const column *c) {
    void *p;
    memcpy(&p, (const char *)r + c->offset, sizeof p);
    return p;
}

static esp_status check_shape(const espi_rollouts_shape *s) {
    const int64_t most = (int64_t)1 << 40;
    const int64_t *n = &s->rows;
    for (int64_t i = 0; i < ESPI_ROLLOUTS_SHAPE; i++)
        if (n[i] < 0 || n[i] > most)
            return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: size %lld of their shape is %lld, expected 0 to 2^40", (long long)i,
                             (long long)n[i]);
    if (s->group_size < 1 || s->rows % s->group_size != 0)
        return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: %lld rows in groups of %lld, expected whole groups", (long long)s->rows,
                         (long long)s->group_size);
    if (s->route_bytes > 2 || s->filtered > 1 || s->layers > 4096 || s->top_k > 4096 || s->rewards > 4096)
        return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: routes of %lld bytes, %lld layers, %lld experts a token, %lld rewards, expected fewer",
                         (long long)s->route_bytes, (long long)s->layers, (long long)s->top_k, (long long)s->rewards);
    return ESP_OK;
}

esp_status espi_rollouts_create(espi_rollouts *r, const espi_rollouts_shape *shape) {
    *r = (espi_rollouts){.shape = *shape};
    ESPI_TRY(check_shape(shape));
    for (int i = 0; i < ESPI_COUNT(columns); i++) {
        const column *c = &columns[i];
        if (!present(c, shape)) continue;
        const size_t n = (size_t)count(shape, c);
        void *p = calloc(n > 0 ? n : 1, esp_dtype_size(c->dtype));
        if (!p) {
            espi_rollouts_free(r);
            return ESPI_FAIL(ESP_ERR_MEMORY, "rollouts: no memory for %s of %zu values", c->name, n);
        }
        if (c->width == ROUTES) memset(p, 0xFF, n);
        memcpy((char *)r + c->offset, &p, sizeof p);
    }
    return ESP_OK;
}

void espi_rollouts_free(espi_rollouts *r) {
    for (int i = 0; i < ESPI_COUNT(columns); i++) free(get(r, &columns[i]));
    *r = (espi_rollouts){0};
}

/* Where the next row goes. */
typedef struct place {
    int64_t at[UNITS];
} place;

static place place_of(const espi_rollouts *r, int64_t row) {
    place p = {.at = {row, r->offsets[row], 0}};
    if (r->kept_offsets) p.at[KEPT] = r->kept_offsets[p.at[TOKEN]];
    return p;
}

/* Rows first .. last-1 of `from` to `to`, which moves on. */
static void copy_rows(espi_rollouts *r, place *to, const espi_rollouts *from, int64_t first, int64_t last) {
    const place a = place_of(from, first), b = place_of(from, last);
    for (int i = 0; i < ESPI_COUNT(columns); i++) {
        const column *c = &columns[i];
        char *dst = get(r, c);
        const char *src = get(from, c);
        if (!dst || wide(&r->shape, c) != wide(&from->shape, c)) continue; /* absent, or made new */
        const size_t one = esp_dtype_size(c->dtype) * (size_t)wide(&r->shape, c);
        const int64_t n = b.at[c->unit] - a.at[c->unit];
        if (c->border == UNITS) {
            if (n > 0) memcpy(dst + (size_t)to->at[c->unit] * one, src + (size_t)a.at[c->unit] * one, (size_t)n * one);
            continue;
        }
        int64_t *into = (int64_t *)(void *)dst + to->at[c->unit];
        const int64_t *borders = (const int64_t *)(const void *)src + a.at[c->unit];
        for (int64_t k = 0; k <= n; k++) into[k] = borders[k] - a.at[c->border] + to->at[c->border];
    }
    for (int u = 0; u < UNITS; u++) to->at[u] += b.at[u] - a.at[u];
}

/* May their rows stand in one batch? */
static bool same_form(const espi_rollouts_shape *a, const espi_rollouts_shape *b) {
    return a->group_size == b->group_size && a->rewards == b->rewards && a->layers == b->layers && a->top_k == b->top_k &&
           a->route_bytes == b->route_bytes && a->filtered == b->filtered;
}

static void copy_flags(espi_rollouts *r, const espi_rollouts *from) {
    r->has_rewards = from->has_rewards;
    r->has_advantages = from->has_advantages;
    r->has_old = from->has_old;
    r->has_ref = from->has_ref;
    r->has_ratio = from->has_ratio;
}

esp_status espi_rollouts_append(espi_rollouts *r, const espi_rollouts *from) {
    const espi_rollouts_shape *s = &from->shape, *mine = &r->shape;
    espi_rollouts_shape sum = *s;
    if (mine->group_size > 0) {
        if (!same_form(mine, s) || r->has_rewards != from->has_rewards)
            return ESPI_FAIL(ESP_ERR_MISMATCH,
                             "rollouts: a batch in groups of %lld with %lld rewards, routes of %lld bytes and kept ids %lld joins one with "
                             "%lld, %lld, %lld and %lld, expected the same: one source gives all of a generation",
                             (long long)s->group_size, (long long)s->rewards, (long long)s->route_bytes, (long long)s->filtered,
                             (long long)mine->group_size, (long long)mine->rewards, (long long)mine->route_bytes,
                             (long long)mine->filtered);
        sum.rows += mine->rows;
        sum.tokens += mine->tokens;
        sum.kept += mine->kept;
    }
    espi_rollouts joined;
    ESPI_TRY(espi_rollouts_create(&joined, &sum));
    place to = {{0}};
    if (mine->group_size > 0) copy_rows(&joined, &to, r, 0, mine->rows);
    copy_rows(&joined, &to, from, 0, s->rows);
    copy_flags(&joined, from);
    espi_rollouts_free(r);
    *r = joined;
    return ESP_OK;
}

esp_status espi_rollouts_widen(espi_rollouts *r, espi_rollouts *from, const espi_rollouts_shape *shape) {
    ESPI_TRY(espi_rollouts_create(r, shape));
    place to = {{0}};
    copy_rows(r, &to, from, 0, from->shape.rows);
    copy_flags(r, from);
    espi_rollouts_free(from);
    return ESP_OK;
}

esp_status espi_rollouts_select(espi_rollouts *r, const int64_t *groups, int64_t n_groups) {
    const int64_t g = r->shape.group_size;
    espi_rollouts_shape s = r->shape;
    s.rows = n_groups * g;
    s.tokens = s.kept = 0;
    for (int64_t i = 0; i < n_groups; i++) {
        const place a = place_of(r, groups[i] * g), b = place_of(r, (groups[i] + 1) * g);
        s.tokens += b.at[TOKEN] - a.at[TOKEN];
        s.kept += b.at[KEPT] - a.at[KEPT];
    }
    espi_rollouts picked;
    ESPI_TRY(espi_rollouts_create(&picked, &s));
    place to = {{0}};
    for (int64_t i = 0; i < n_groups; i++) copy_rows(&picked, &to, r, groups[i] * g, (groups[i] + 1) * g);
    copy_flags(&picked, r);
    espi_rollouts_free(r);
    *r = picked;
    return ESP_OK;
}

/* Of the ranks' batches: the shape of each, and of all together. */
static esp_status add_shapes(espi_rollouts_shape *sum, const espi_rollouts_shape *each, int ranks) {
    *sum = each[0];
    for (int i = 1; i < ranks; i++) {
        const espi_rollouts_shape *s = &each[i];
        if (!same_form(s, sum))
            return ESPI_FAIL(ESP_ERR_MISMATCH, "rollouts: those of rank %d are not of the form of rank 0's, expected one source for all",
                             i);
        sum->rows += s->rows;
        sum->tokens += s->tokens;
        sum->kept += s->kept;
    }
    return ESP_OK;
}

/* Where the batch of each rank begins: borders [UNITS][ranks+1]. */
static void find_borders(int64_t *borders, const espi_rollouts_shape *each, int ranks) {
    for (int u = 0; u < UNITS; u++) {
        int64_t *b = borders + u * (ranks + 1);
        b[0] = 0;
        for (int i = 0; i < ranks; i++) b[i + 1] = b[i] + units(&each[i], (unit)u);
    }
}

/* Every rank has its own rows in place; scratch [ranks+1]. */
static esp_status share_columns(espi_rollouts *r, const esp_model *model, const int64_t *borders, int64_t *scratch) {
    const int ranks = espi_ranks_count(model);
    for (int i = 0; i < OF_SOURCE; i++) {
        const column *c = &columns[i];
        const int64_t *b = borders + c->unit * (ranks + 1), width = wide(&r->shape, c), first = c->border != UNITS;
        for (int k = 0; k <= ranks; k++) scratch[k] = (b[k] + first) * width; /* the 0 before all offsets is there */
        if (get(r, c)) ESPI_TRY(espi_ranks_share(get(r, c), model, c->name, scratch, esp_dtype_size(c->dtype)));
    }
    return ESP_OK;
}

static esp_status gather(espi_rollouts *r, const esp_model *model, espi_rollouts_shape *each, int64_t *borders) {
    const int ranks = espi_ranks_count(model), own = espi_ranks_own(model), stride = ranks + 1;
    espi_rollouts all;
    espi_rollouts_shape sum;
    ESPI_TRY(espi_ranks_gather(each, model, "sizes of rollouts", &r->shape, sizeof r->shape));
    ESPI_TRY(add_shapes(&sum, each, ranks));
    ESPI_TRY(espi_rollouts_create(&all, &sum));
    find_borders(borders, each, ranks);
    place to = {{borders[ROW * stride + own], borders[TOKEN * stride + own], borders[KEPT * stride + own]}};
    copy_rows(&all, &to, r, 0, r->shape.rows);
    const esp_status status = share_columns(&all, model, borders, borders + UNITS * stride);
    copy_flags(&all, r);
    espi_rollouts_free(r);
    *r = all;
    return status;
}

esp_status espi_rollouts_gather(espi_rollouts *r, const esp_model *model) {
    const size_t ranks = (size_t)espi_ranks_count(model);
    if (ranks == 1) return ESP_OK;
    espi_rollouts_shape *each = calloc(ranks, sizeof *each);
    int64_t *borders = calloc((UNITS + 1) * (ranks + 1), sizeof *borders);
    const esp_status status = each && borders ? gather(r, model, each, borders)
                                              : ESPI_FAIL(ESP_ERR_MEMORY, "rollouts: no memory for the sizes of %zu ranks", ranks);
    free(each);
    free(borders);
    return status;
}

static esp_status check_borders(const int64_t *borders, int64_t n, int64_t total, const char *name, bool strict) {
    if (borders[0] != 0 || borders[n] != total)
        return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: %s go from %lld to %lld, expected 0 to %lld", name, (long long)borders[0],
                         (long long)borders[n], (long long)total);
    for (int64_t i = 0; i < n; i++)
        if (borders[i + 1] < borders[i] + strict)
            return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: %s[%lld] is %lld after %lld, expected an ascending list", name, (long long)(i + 1),
                             (long long)borders[i + 1], (long long)borders[i]);
    return ESP_OK;
}

static esp_status check_row(const espi_rollouts *r, int64_t row, int64_t vocab) {
    const int64_t first = r->offsets[row], last = r->offsets[row + 1], answer = first + r->n_prompt[row];
    if (r->n_prompt[row] < 1 || answer >= last)
        return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: row %lld has a prompt of %d of its %lld tokens, expected at least one of each kind",
                         (long long)row, r->n_prompt[row], (long long)(last - first));
    if (r->finish[row] > ESPI_FINISH_ABORTED)
        return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: row %lld: finish is %d, expected 0 to 2", (long long)row, r->finish[row]);
    for (int64_t i = first; i < last; i++) {
        if (r->tokens[i] < 0 || r->tokens[i] >= vocab)
            return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: row %lld has the id %d, expected 0 to %lld", (long long)row, r->tokens[i],
                             (long long)vocab - 1);
        if (r->loss_mask[i] > (i >= answer))
            return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: row %lld has loss mask %d at its token %lld, expected %s", (long long)row,
                             r->loss_mask[i], (long long)(i - first), i < answer ? "0: it is the prompt's" : "0 or 1");
    }
    return ESP_OK;
}

static esp_status check_routes(const espi_rollouts *r, int64_t experts) {
    const espi_rollouts_shape *s = &r->shape;
    const int64_t n = s->tokens * s->layers * s->top_k, native = s->route_bytes == 1 ? ESPI_ROUTE_NATIVE_U8 : ESPI_ROUTE_NATIVE_U16;
    for (int64_t i = 0; i < n; i++) {
        uint16_t id = 0;
        if (s->route_bytes == 1)
            id = r->routes[i];
        else
            memcpy(&id, r->routes + 2 * i, sizeof id);
        if (id >= experts && id != native)
            return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: token %lld was routed to expert %d, expected 0 to %lld, or %lld: natively",
                             (long long)(i / (s->layers * s->top_k)), id, (long long)experts - 1, (long long)native);
    }
    return ESP_OK;
}

static esp_status check_kept(const espi_rollouts *r, int64_t vocab) {
    ESPI_TRY(check_borders(r->kept_offsets, r->shape.tokens, r->shape.kept, "kept_offsets", false));
    for (int64_t t = 0; t < r->shape.tokens; t++) {
        bool found = r->kept_offsets[t] == r->kept_offsets[t + 1];
        for (int64_t k = r->kept_offsets[t]; k < r->kept_offsets[t + 1]; k++) {
            const int32_t low = k > r->kept_offsets[t] ? r->kept_ids[k - 1] + 1 : 0;
            if (r->kept_ids[k] < low || r->kept_ids[k] >= vocab)
                return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: token %lld keeps the id %d, expected ascending ids below %lld", (long long)t,
                                 r->kept_ids[k], (long long)vocab);
            found = found || r->kept_ids[k] == r->tokens[t];
        }
        if (!found) return ESPI_FAIL(ESP_ERR_FORMAT, "rollouts: token %lld is %d, and its kept ids lack it", (long long)t, r->tokens[t]);
    }
    return ESP_OK;
}

esp_status espi_rollouts_check(const espi_rollouts *r, int64_t vocab, int64_t experts) {
    ESPI_TRY(check_borders(r->offsets, r->shape.rows, r->shape.tokens, "offsets", true));
    for (int64_t row = 0; row < r->shape.rows; row++) ESPI_TRY(check_row(r, row, vocab));
    if (r->routes) ESPI_TRY(check_routes(r, experts));
    return r->kept_offsets ? check_kept(r, vocab) : ESP_OK;
}

void espi_rollouts_arrays(espi_saved_array *arrays, size_t *n, espi_rollouts *r) {
    *n = 0;
    arrays[(*n)++] = (espi_saved_array){"rollout/shape", ESP_I64, ESPI_ROLLOUTS_SHAPE, &r->shape};
    arrays[(*n)++] = (espi_saved_array){"rollout/flags", ESP_U8, ESPI_ROLLOUTS_FLAGS, &r->has_rewards};
    for (int i = 0; i < ESPI_COUNT(columns); i++) {
        const column *c = &columns[i];
        if (get(r, c)) arrays[(*n)++] = (espi_saved_array){c->name, c->dtype, count(&r->shape, c), get(r, c)};
    }
}

static esp_status read_arrays(espi_rollouts *r, const espi_checkpoint *checkpoint) {
    espi_saved_array arrays[ESPI_ROLLOUT_ARRAYS];
    size_t n;
    espi_rollouts_arrays(arrays, &n, r);
    for (size_t i = 1; i < n; i++) ESPI_TRY(espi_checkpoint_read(checkpoint, &arrays[i]));
    return ESP_OK;
}

esp_status espi_rollouts_read(espi_rollouts *r, const espi_checkpoint *checkpoint) {
    espi_rollouts_shape shape;
    *r = (espi_rollouts){0};
    ESPI_TRY(espi_checkpoint_read(checkpoint, &(espi_saved_array){"rollout/shape", ESP_I64, ESPI_ROLLOUTS_SHAPE, &shape}));
    /* The file's own count before memory is taken for it. */
    int64_t tokens;
    ESPI_TRY(espi_checkpoint_count(&tokens, checkpoint, "rollout/tokens", ESP_I32));
    if (tokens != shape.tokens)
        return ESPI_FAIL(ESP_ERR_FORMAT, "checkpoint: rollout/tokens has %lld values, expected %lld as rollout/shape says",
                         (long long)tokens, (long long)shape.tokens);
    ESPI_TRY(espi_rollouts_create(r, &shape));
    const esp_status status = read_arrays(r, checkpoint);
    if (status != ESP_OK) espi_rollouts_free(r);
    return status;
}
