/* Is a file of rollouts what it should be?  Each check reads one column, piece by piece, and says where the first fault is. */
#include "rl/rollout_file.h"

#include "core/status.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PIECE 65536    /* elements read at a time */
#define POSITIVE 1e-3f /* what rounding may leave of a log-probability of 0 */

/* A file while it is checked, with what the other columns are told by. */
typedef struct scan {
    const espi_rollout_file *f;
    const char *path;
    const espi_rollout_extent *e;
    const espi_rollout_limits *limits;
    espi_rollout_summary *sum;
    int64_t vocab; /* INT64_MAX = not known */
    int64_t *offsets, *group;
    int32_t *n_prompt;
} scan;

typedef esp_status (*piece_fn)(scan *s, const void *data, int64_t first, int64_t n);

/* The column in pieces; total elements of `bytes` each. */
static esp_status each_piece(scan *s, espi_rollout_column column, int64_t total, size_t bytes, piece_fn check) {
    if (!espi_rollout_file_has(s->f, column)) return ESP_OK;
    const int64_t most = PIECE / (bytes > 64 ? (int64_t)bytes / 64 : 1) + 1;
    void *data = malloc((size_t)most * bytes + 1);
    if (!data) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory to check it", s->path);
    esp_status status = ESP_OK;
    for (int64_t first = 0; first < total && status == ESP_OK; first += most) {
        const int64_t n = total - first < most ? total - first : most;
        status = espi_rollout_file_read(data, s->f, column, first, n);
        if (status == ESP_OK) status = check(s, data, first, n);
    }
    free(data);
    return status;
}

static esp_status read_whole(scan *s, void *out, espi_rollout_column column, int64_t n, size_t bytes) {
    void *data = malloc((size_t)n * bytes + 1);
    if (!data) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %lld rows", s->path, (long long)n);
    memcpy(out, &data, sizeof data);
    return espi_rollout_file_read(data, s->f, column, 0, n);
}

/* The row that a token belongs to. */
static int64_t row_of(const scan *s, int64_t token) {
    int64_t low = 0, high = s->e->rows;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        if (s->offsets[middle] <= token)
            low = middle;
        else
            high = middle;
    }
    return low;
}

/* Walks tokens with their rows. */
typedef struct walk {
    int64_t row, first, answer, end; /* tokens of the row: prompt first .. answer-1 */
} walk;

static walk walk_to(const scan *s, int64_t token) {
    const int64_t row = row_of(s, token);
    return (walk){row, s->offsets[row], s->offsets[row] + s->n_prompt[row], s->offsets[row + 1]};
}

static void walk_on(walk *w, const scan *s, int64_t token) {
    if (token >= w->end) *w = walk_to(s, token);
}

static esp_status check_offsets(scan *s) {
    const int64_t rows = s->e->rows;
    if (rows == 0) return ESPI_FAIL(ESP_ERR_FORMAT, "%s: no row in it, expected at least one group", s->path);
    if (s->offsets[0] != 0 || s->offsets[rows] != s->e->tokens)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: /seq_offsets go from %lld to %lld, expected 0 to %lld, the number of tokens", s->path,
                         (long long)s->offsets[0], (long long)s->offsets[rows], (long long)s->e->tokens);
    for (int64_t i = 0; i < rows; i++)
        if (s->offsets[i + 1] <= s->offsets[i])
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: /seq_offsets[%lld] is %lld after %lld, expected an ascending list", s->path,
                             (long long)(i + 1), (long long)s->offsets[i + 1], (long long)s->offsets[i]);
    return ESP_OK;
}

static esp_status check_prompts(scan *s) {
    for (int64_t i = 0; i < s->e->rows; i++) {
        const int64_t n = s->offsets[i + 1] - s->offsets[i], completion = n - s->n_prompt[i];
        if (s->n_prompt[i] < 1 || completion < 1)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: /prompt_len is %d of %lld tokens, expected at least one token of each kind",
                             s->path, (long long)i, s->n_prompt[i], (long long)n);
        if (n > s->sum->longest) s->sum->longest = n;
        if (completion > s->sum->longest_completion) s->sum->longest_completion = completion;
    }
    return ESP_OK;
}

static int order_ids(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Neighbours of equal id, all groups of the size of the first, no id twice. */
static esp_status check_groups(scan *s) {
    int64_t size = 1, n = 0;
    while (size < s->e->rows && s->group[size] == s->group[0]) size++;
    s->sum->group_size = size;
    for (int64_t i = 0, end; i < s->e->rows; i = end, n++) {
        for (end = i + 1; end < s->e->rows && s->group[end] == s->group[i];) end++;
        if (end - i != size)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: group %lld has %lld rows in a row, expected %lld, as the first one has",
                             s->path, (long long)i, (long long)s->group[i], (long long)(end - i), (long long)size);
        s->group[n] = s->group[i];
    }
    s->sum->groups = n;
    qsort(s->group, (size_t)n, sizeof *s->group, order_ids);
    for (int64_t i = 1; i < n; i++)
        if (s->group[i] == s->group[i - 1])
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: group %lld comes again further down, expected its rows to be neighbours", s->path,
                             (long long)s->group[i]);
    return ESP_OK;
}

static esp_status check_tokens(scan *s, const void *data, int64_t first, int64_t n) {
    const int32_t *ids = data;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->vocab)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: its token %lld is %d, expected 0 to %lld", s->path,
                             (long long)row_of(s, first + i), (long long)(first + i - s->offsets[row_of(s, first + i)]), ids[i],
                             (long long)s->vocab - 1);
    return ESP_OK;
}

static esp_status check_mask(scan *s, const void *data, int64_t first, int64_t n) {
    const uint8_t *mask = data;
    walk w = walk_to(s, first);
    for (int64_t i = 0; i < n; i++) {
        walk_on(&w, s, first + i);
        if (mask[i] > (first + i >= w.answer))
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: /loss_mask is %d at its token %lld, expected %s", s->path, (long long)w.row,
                             mask[i], (long long)(first + i - w.first), first + i < w.answer ? "0: it is the prompt's" : "0 or 1");
        s->sum->counted += mask[i];
    }
    return ESP_OK;
}

static esp_status check_logprobs(scan *s, const void *data, int64_t first, int64_t n) {
    const float *lp = data;
    walk w = walk_to(s, first);
    for (int64_t i = 0; i < n; i++) {
        walk_on(&w, s, first + i);
        if (first + i < w.answer || isnan(lp[i])) continue;
        if (isinf(lp[i]) || lp[i] > POSITIVE)
            return ESPI_FAIL(ESP_ERR_FORMAT,
                             "%s: row %lld: /sampler_logprob is %g at its token %lld, expected a finite number up to 0, or NaN", s->path,
                             (long long)w.row, (double)lp[i], (long long)(first + i - w.first));
        s->sum->with_logprob++;
    }
    return ESP_OK;
}

static esp_status check_truncated(scan *s, const void *data, int64_t first, int64_t n) {
    const uint8_t *finish = data;
    for (int64_t i = 0; i < n; i++) {
        if (finish[i] > ESPI_FINISH_ABORTED)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: /truncated is %d, expected 0, 1 or 2", s->path, (long long)(first + i),
                             finish[i]);
        s->sum->truncated += finish[i] != ESPI_FINISH_STOP;
    }
    return ESP_OK;
}

static esp_status check_rewards(scan *s, const void *data, int64_t first, int64_t n) {
    const float *rewards = data;
    for (int64_t i = 0; i < n * s->e->rewards; i++) {
        if (isinf(rewards[i]))
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: reward %lld is %g, expected a finite number, or NaN: not scorable", s->path,
                             (long long)(first + i / s->e->rewards), (long long)(i % s->e->rewards), (double)rewards[i]);
        s->sum->unscored += isnan(rewards[i]);
    }
    return ESP_OK;
}

static esp_status check_advantages(scan *s, const void *data, int64_t first, int64_t n) {
    const float *advantage = data;
    for (int64_t i = 0; i < n; i++)
        if (!isfinite(advantage[i]))
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: /advantage is %g, expected a finite number", s->path, (long long)(first + i),
                             (double)advantage[i]);
    return ESP_OK;
}

static esp_status check_versions(scan *s, const void *data, int64_t first, int64_t n) {
    const int64_t *version = data;
    for (int64_t i = 0; i < n; i++) {
        if (version[i] < 0)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: /adapter_version is %lld, expected 0 or more", s->path, (long long)(first + i),
                             (long long)version[i]);
        if (s->sum->first_version < 0 || version[i] < s->sum->first_version) s->sum->first_version = version[i];
        if (version[i] > s->sum->last_version) s->sum->last_version = version[i];
    }
    return ESP_OK;
}

static esp_status check_routes(scan *s, const void *data, int64_t first, int64_t n) {
    const int64_t one = s->e->layers * s->e->top_k, native = s->e->route_bytes == 1 ? ESPI_ROUTE_NATIVE_U8 : ESPI_ROUTE_NATIVE_U16;
    for (int64_t i = 0; i < n * one; i++) {
        uint16_t id;
        if (s->e->route_bytes == 1)
            id = ((const uint8_t *)data)[i];
        else
            memcpy(&id, (const uint8_t *)data + 2 * i, sizeof id);
        if (id != native && s->limits->experts >= 0 && id >= s->limits->experts) {
            const int64_t token = first + i / one, row = row_of(s, token);
            return ESPI_FAIL(ESP_ERR_FORMAT,
                             "%s: row %lld: its token %lld was routed to expert %d in layer %lld, expected 0 to %lld, or %lld: natively",
                             s->path, (long long)row, (long long)(token - s->offsets[row]), id, (long long)(i % one / s->e->top_k),
                             (long long)s->limits->experts - 1, (long long)native);
        }
    }
    return ESP_OK;
}

/* Borders, ids and tokens of one row's kept lists. */
typedef struct kept {
    int64_t *borders;
    int32_t *ids, *tokens;
} kept;

static esp_status check_kept_token(const scan *s, const kept *k, int64_t row, int64_t i) {
    const int64_t base = k->borders[0];
    bool found = k->borders[i] == k->borders[i + 1];
    for (int64_t at = k->borders[i]; at < k->borders[i + 1]; at++) {
        const int32_t low = at > k->borders[i] ? k->ids[at - base - 1] + 1 : 0, id = k->ids[at - base];
        if (id < low || id >= s->vocab)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: its token %lld keeps the id %d, expected ascending ids below %lld", s->path,
                             (long long)row, (long long)i, id, (long long)s->vocab);
        found = found || id == k->tokens[i];
    }
    if (found) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_FORMAT, "%s: row %lld: its token %lld is %d, and its kept ids lack it", s->path, (long long)row, (long long)i,
                     k->tokens[i]);
}

static esp_status check_kept_row(const scan *s, kept *k, int64_t row, int64_t *at) {
    const int64_t first = s->offsets[row], n = s->offsets[row + 1] - first;
    ESPI_TRY(espi_rollout_file_read(k->borders, s->f, ESPI_COLUMN_KEPT_OFFSETS, first, n + 1));
    for (int64_t i = 0; i <= n; i++) {
        if (k->borders[i] < *at || k->borders[i] > s->e->kept || (first + i == 0 && k->borders[i] != 0))
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: /kept_offsets[%lld] is %lld after %lld, expected an ascending list from 0 to %lld",
                             s->path, (long long)(first + i), (long long)k->borders[i], (long long)*at, (long long)s->e->kept);
        *at = k->borders[i];
    }
    const int64_t ids = k->borders[n] - k->borders[0];
    int32_t *grown = realloc(k->ids, (size_t)ids * sizeof *grown + 1);
    if (!grown) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the kept ids of row %lld", s->path, (long long)row);
    k->ids = grown;
    ESPI_TRY(espi_rollout_file_read(k->ids, s->f, ESPI_COLUMN_KEPT_IDS, k->borders[0], ids));
    ESPI_TRY(espi_rollout_file_read(k->tokens, s->f, ESPI_COLUMN_TOKENS, first, n));
    for (int64_t i = 0; i < n; i++) ESPI_TRY(check_kept_token(s, k, row, i));
    return ESP_OK;
}

static esp_status check_kept(scan *s) {
    if (!espi_rollout_file_has(s->f, ESPI_COLUMN_KEPT_IDS)) return ESP_OK;
    kept k = {.borders = malloc((size_t)(s->sum->longest + 1) * sizeof *k.borders),
              .tokens = malloc((size_t)s->sum->longest * sizeof *k.tokens)};
    esp_status status = k.borders && k.tokens ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for kept ids", s->path);
    int64_t at = 0;
    for (int64_t row = 0; row < s->e->rows && status == ESP_OK; row++) status = check_kept_row(s, &k, row, &at);
    if (status == ESP_OK && at != s->e->kept)
        status = ESPI_FAIL(ESP_ERR_FORMAT, "%s: /kept_offsets end at %lld, expected %lld, the number of kept ids", s->path, (long long)at,
                           (long long)s->e->kept);
    free(k.borders);
    free(k.ids);
    free(k.tokens);
    return status;
}

/* Groups in which the first reward says nothing. */
static esp_status count_spread(scan *s) {
    const int64_t g = s->sum->group_size, width = s->e->rewards;
    if (width == 0) return ESP_OK;
    float *rewards = malloc((size_t)(g * width) * sizeof *rewards);
    if (!rewards) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for the rewards of a group", s->path);
    esp_status status = ESP_OK;
    for (int64_t first = 0; first < s->e->rows && status == ESP_OK; first += g) {
        bool spread = false;
        status = espi_rollout_file_read(rewards, s->f, ESPI_COLUMN_REWARDS, first, g);
        for (int64_t i = 1; i < g && status == ESP_OK; i++) spread = spread || rewards[i * width] != rewards[0];
        s->sum->without_spread += !spread;
    }
    free(rewards);
    return status;
}

static esp_status check_facts(scan *s) {
    const espi_rollout_facts *facts = espi_rollout_file_facts(s->f);
    const espi_rollout_limits *l = s->limits;
    if (facts->vocab_size >= 0 && l->vocab >= 0 && facts->vocab_size != l->vocab)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: for a vocabulary of %lld, expected %lld: it belongs to another model", s->path,
                         (long long)facts->vocab_size, (long long)l->vocab);
    if (*facts->tokenizer_hash && *l->tokenizer_hash && strcmp(facts->tokenizer_hash, l->tokenizer_hash) != 0)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: tokenizer_hash is %.40s, expected %s: its ids are another tokenizer's", s->path,
                         facts->tokenizer_hash, l->tokenizer_hash);
    if (s->e->route_bytes > 0 && l->layers >= 0 && (s->e->layers != l->layers || s->e->top_k != l->top_k))
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: /routed_experts are of %lld layers with %lld experts a token, expected %lld and %lld",
                         s->path, (long long)s->e->layers, (long long)s->e->top_k, (long long)l->layers, (long long)l->top_k);
    const bool filtered = facts->top_k > 0 || facts->top_p < 1 || facts->min_p > 0;
    if (filtered && !espi_rollout_file_has(s->f, ESPI_COLUMN_KEPT_IDS))
        return ESPI_FAIL(
            ESP_ERR_FORMAT,
            "%s: it was sampled with top_k %lld, top_p %g, min_p %g and has no /kept_ids, expected them: the log-probabilities "
            "are of a distribution that training would not see",
            s->path, (long long)facts->top_k, facts->top_p, facts->min_p);
    s->vocab = l->vocab >= 0 ? l->vocab : facts->vocab_size >= 0 ? facts->vocab_size : INT64_MAX;
    return ESP_OK;
}

static esp_status check_all(scan *s) {
    const espi_rollout_extent *e = s->e;
    ESPI_TRY(check_facts(s));
    ESPI_TRY(read_whole(s, &s->offsets, ESPI_COLUMN_OFFSETS, e->rows + 1, sizeof *s->offsets));
    ESPI_TRY(read_whole(s, &s->n_prompt, ESPI_COLUMN_PROMPT_LEN, e->rows, sizeof *s->n_prompt));
    ESPI_TRY(read_whole(s, &s->group, ESPI_COLUMN_GROUP_ID, e->rows, sizeof *s->group));
    ESPI_TRY(check_offsets(s));
    ESPI_TRY(check_prompts(s));
    ESPI_TRY(check_groups(s));
    ESPI_TRY(each_piece(s, ESPI_COLUMN_TOKENS, e->tokens, sizeof(int32_t), check_tokens));
    ESPI_TRY(each_piece(s, ESPI_COLUMN_LOSS_MASK, e->tokens, 1, check_mask));
    ESPI_TRY(each_piece(s, ESPI_COLUMN_LOGPROB, e->tokens, sizeof(float), check_logprobs));
    ESPI_TRY(each_piece(s, ESPI_COLUMN_TRUNCATED, e->rows, 1, check_truncated));
    ESPI_TRY(
        each_piece(s, ESPI_COLUMN_REWARDS, e->rewards ? e->rows : 0, sizeof(float) * (size_t)(e->rewards + !e->rewards), check_rewards));
    ESPI_TRY(each_piece(s, ESPI_COLUMN_ADVANTAGE, e->rows, sizeof(float), check_advantages));
    ESPI_TRY(each_piece(s, ESPI_COLUMN_VERSION, e->rows, sizeof(int64_t), check_versions));
    const size_t routed = (size_t)(e->layers * e->top_k * e->route_bytes);
    ESPI_TRY(each_piece(s, ESPI_COLUMN_ROUTES, routed ? e->tokens : 0, routed + !routed, check_routes));
    ESPI_TRY(check_kept(s));
    return count_spread(s);
}

esp_status espi_rollout_file_check(espi_rollout_summary *summary, const espi_rollout_file *file, const espi_rollout_limits *limits) {
    scan s = {.f = file, .path = espi_rollout_file_path(file), .e = espi_rollout_file_extent(file), .limits = limits, .sum = summary};
    const int64_t version = espi_rollout_file_facts(file)->adapter_version;
    *summary =
        (espi_rollout_summary){.rows = s.e->rows, .tokens = s.e->tokens, .rewards = s.e->rewards, .first_version = -1, .last_version = -1};
    const esp_status status = check_all(&s);
    if (status == ESP_OK && !espi_rollout_file_has(file, ESPI_COLUMN_LOSS_MASK))
        for (int64_t i = 0; i < s.e->rows; i++) summary->counted += s.offsets[i + 1] - s.offsets[i] - s.n_prompt[i];
    if (summary->first_version < 0) summary->first_version = summary->last_version = version;
    free(s.offsets);
    free(s.n_prompt);
    free(s.group);
    return status;
}

void espi_rollout_correction_tell(char out[256], const espi_rollout_summary *s, const char *correction) {
    const int64_t all = s->counted > s->with_logprob ? s->counted : s->with_logprob;
    const double share = all > 0 ? 100.0 * (double)s->with_logprob / (double)all : 0;
    if (s->with_logprob == 0)
        snprintf(out, 256,
                 "none: no sampler log-probabilities, so the policy's own pass before the first update stands for the old policy");
    else if (strcmp(correction, "none") == 0)
        snprintf(out, 256, "none: sampler log-probabilities are there (%.1f %% of the counted tokens) for tis, mis or icepop", share);
    else
        snprintf(out, 256, "%s of rho = exp(old - sampler) on %.1f %% of the counted tokens, 1 on the others", correction, share);
}
