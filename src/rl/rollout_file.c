/* Rollouts in files: saving a batch, and files as a source.  See rollout_file.h. */
#include "rl/rollout_file.h"

#include "core/status.h"
#include "io/folder.h"
#include "io/tokenizer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

void espi_tokenizer_hash(char out[17], const esp_tokenizer *tokenizer) {
    XXH64_hash_t hash = 0;
    for (int32_t id = 0; id < tokenizer->size; id++) {
        const espi_token *token = &tokenizer->tokens[id];
        /* Each token's hash is the next one's seed: the order counts, and no memory is taken. */
        hash = XXH64(token->bytes ? (const char *)token->bytes : "", token->bytes ? token->n : 0, hash);
    }
    snprintf(out, 17, "%016llx", (unsigned long long)hash);
}

/* ---- saving ---- */

/* Doubles that hold floats' values, as floats; free() them. */
static esp_status narrow(float **out, const double *values, int64_t n, const char *path) {
    float *narrowed = malloc((size_t)n * sizeof *narrowed + 1);
    *out = narrowed;
    if (!narrowed) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %lld values", path, (long long)n);
    for (int64_t i = 0; i < n; i++) {
        narrowed[i] = (float)values[i];
        if (!isnan(values[i]) && (double)narrowed[i] != values[i])
            return ESPI_FAIL(ESP_ERR_INTERNAL, "%s: value %lld is %.17g, expected what a float holds", path, (long long)i, values[i]);
    }
    return ESP_OK;
}

esp_status espi_rollouts_save(const char *path, const espi_rollouts *r, const char *const *prompt, const char *const *completion,
                              const espi_rollout_facts *facts) {
    const espi_rollouts_shape *s = &r->shape;
    const bool scored = !r->has_advantages && s->rewards > 0;
    const espi_rollout_extent extent = {.rows = s->rows,
                                        .tokens = s->tokens,
                                        .rewards = scored ? s->rewards : 0,
                                        .layers = s->layers,
                                        .top_k = s->top_k,
                                        .route_bytes = s->route_bytes,
                                        .kept = s->kept};
    float *scores = NULL;
    esp_status status = narrow(&scores, scored ? r->rewards : r->advantage, s->rows * (scored ? s->rewards : 1), path);
    const void *const data[ESPI_COLUMN_COUNT] = {[ESPI_COLUMN_TOKENS] = r->tokens,
                                                 [ESPI_COLUMN_OFFSETS] = r->offsets,
                                                 [ESPI_COLUMN_PROMPT_LEN] = r->n_prompt,
                                                 [ESPI_COLUMN_GROUP_ID] = r->group,
                                                 [ESPI_COLUMN_REWARDS] = scored ? scores : NULL,
                                                 [ESPI_COLUMN_ADVANTAGE] = scored ? NULL : scores,
                                                 [ESPI_COLUMN_LOGPROB] = r->sampler_logprob,
                                                 [ESPI_COLUMN_LOSS_MASK] = r->loss_mask,
                                                 [ESPI_COLUMN_TRUNCATED] = r->finish,
                                                 [ESPI_COLUMN_VERSION] = r->version,
                                                 [ESPI_COLUMN_ROUTES] = r->routes,
                                                 [ESPI_COLUMN_KEPT_OFFSETS] = r->kept_offsets,
                                                 [ESPI_COLUMN_KEPT_IDS] = r->kept_ids};
    if (status == ESP_OK) status = espi_rollout_file_write(path, &extent, data, prompt, completion, facts);
    free(scores);
    return status;
}

/* ---- files as a source ---- */

typedef struct part {
    char path[ESPI_PATH_MAX];
    int64_t first, groups; /* of all */
} part;

typedef struct reader {
    part *parts;
    int64_t n_parts, groups, group_size, n_rewards;
    espi_rollout_file *file; /* of parts[open] */
    int64_t open;
    bool routes; /* all files have them */
} reader;

static void close_reader(void *self) {
    reader *d = self;
    espi_rollout_file_close(d->file);
    free(d->parts);
    free(d);
}

static esp_status open_part(reader *d, int64_t i) {
    if (d->file && d->open == i) return ESP_OK;
    espi_rollout_file_close(d->file);
    d->file = NULL;
    d->open = i;
    return espi_rollout_file_open(&d->file, d->parts[i].path);
}

/* Columns that a file may lack have their meaning here. */
static esp_status read_rows(espi_rollouts *r, const espi_rollout_file *f, int64_t row, int64_t token, int64_t n_kept_first) {
    const espi_rollouts_shape *s = &r->shape;
    const struct {
        espi_rollout_column column;
        void *into;
        int64_t first, n;
    } reads[] = {{ESPI_COLUMN_TOKENS, r->tokens, token, s->tokens},
                 {ESPI_COLUMN_GROUP_ID, r->group, row, s->rows},
                 {ESPI_COLUMN_LOGPROB, r->sampler_logprob, token, s->tokens},
                 {ESPI_COLUMN_LOSS_MASK, r->loss_mask, token, s->tokens},
                 {ESPI_COLUMN_TRUNCATED, r->finish, row, s->rows},
                 {ESPI_COLUMN_VERSION, r->version, row, s->rows},
                 {ESPI_COLUMN_ROUTES, r->routes, token, s->tokens},
                 {ESPI_COLUMN_KEPT_IDS, r->kept_ids, n_kept_first, s->kept}};
    for (int i = 0; i < ESPI_COUNT(reads); i++)
        if (reads[i].into && espi_rollout_file_has(f, reads[i].column))
            ESPI_TRY(espi_rollout_file_read(reads[i].into, f, reads[i].column, reads[i].first, reads[i].n));
    const int64_t version = espi_rollout_file_facts(f)->adapter_version;
    for (int64_t i = 0; i < s->rows; i++) {
        const int64_t answer = r->offsets[i] + r->n_prompt[i];
        for (int64_t k = r->offsets[i]; k < answer; k++) r->sampler_logprob[k] = 0;
        for (int64_t k = answer; k < r->offsets[i + 1]; k++) {
            if (!espi_rollout_file_has(f, ESPI_COLUMN_LOGPROB)) r->sampler_logprob[k] = NAN;
            if (!espi_rollout_file_has(f, ESPI_COLUMN_LOSS_MASK)) r->loss_mask[k] = 1;
        }
        if (!espi_rollout_file_has(f, ESPI_COLUMN_VERSION)) r->version[i] = version >= 0 ? version : 0;
    }
    return ESP_OK;
}

static esp_status widen(double *out, const espi_rollout_file *f, espi_rollout_column column, int64_t first, int64_t rows, int64_t width) {
    float *narrow = malloc((size_t)(rows * width) * sizeof *narrow + 1);
    if (!narrow) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %lld rewards", espi_rollout_file_path(f), (long long)(rows * width));
    const esp_status status = espi_rollout_file_read(narrow, f, column, first, rows);
    for (int64_t i = 0; status == ESP_OK && i < rows * width; i++) out[i] = (double)narrow[i];
    free(narrow);
    return status;
}

/* Rewards, or advantages with no rewards beside them. */
static esp_status read_scores(espi_rollouts *r, const espi_rollout_file *f, int64_t row) {
    const espi_rollouts_shape *s = &r->shape;
    r->has_rewards = espi_rollout_file_has(f, ESPI_COLUMN_REWARDS);
    r->has_advantages = !r->has_rewards;
    for (int64_t i = 0; i < s->rows; i++) r->exact[i] = NAN; /* a file has no answers */
    if (r->has_rewards) return widen(r->rewards, f, ESPI_COLUMN_REWARDS, row, s->rows, s->rewards);
    for (int64_t i = 0; i < s->rows * s->rewards; i++) r->rewards[i] = NAN;
    for (int64_t i = 0; i < s->rows; i++) r->reward[i] = NAN;
    return widen(r->advantage, f, ESPI_COLUMN_ADVANTAGE, row, s->rows, 1);
}

/* Where the rows stand, and how large the batch is. */
typedef struct place {
    int64_t *offsets; /* [rows+1] of the file */
    int64_t *kept;    /* [tokens+1] of the file, or NULL */
} place;

static esp_status find(place *p, espi_rollouts_shape *shape, const reader *d, int64_t row, bool routes) {
    const espi_rollout_file *f = d->file;
    const espi_rollout_extent *e = espi_rollout_file_extent(f);
    p->offsets = malloc((size_t)(shape->rows + 1) * sizeof *p->offsets);
    if (!p->offsets) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %lld rows", espi_rollout_file_path(f), (long long)shape->rows);
    ESPI_TRY(espi_rollout_file_read(p->offsets, f, ESPI_COLUMN_OFFSETS, row, shape->rows + 1));
    shape->tokens = p->offsets[shape->rows] - p->offsets[0];
    if (routes) {
        shape->layers = e->layers;
        shape->top_k = e->top_k;
        shape->route_bytes = e->route_bytes;
    }
    if (!espi_rollout_file_has(f, ESPI_COLUMN_KEPT_IDS)) return ESP_OK;
    p->kept = malloc((size_t)(shape->tokens + 1) * sizeof *p->kept);
    if (!p->kept) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for kept ids", espi_rollout_file_path(f));
    ESPI_TRY(espi_rollout_file_read(p->kept, f, ESPI_COLUMN_KEPT_OFFSETS, p->offsets[0], shape->tokens + 1));
    shape->filtered = 1;
    shape->kept = p->kept[shape->tokens] - p->kept[0];
    return ESP_OK;
}

static esp_status fill(espi_rollouts *r, const reader *d, const espi_rollouts_shape *shape, const place *p, int64_t row) {
    ESPI_TRY(espi_rollouts_create(r, shape));
    for (int64_t i = 0; i <= shape->rows; i++) r->offsets[i] = p->offsets[i] - p->offsets[0];
    for (int64_t i = 0; p->kept && i <= shape->tokens; i++) r->kept_offsets[i] = p->kept[i] - p->kept[0];
    ESPI_TRY(espi_rollout_file_read(r->n_prompt, d->file, ESPI_COLUMN_PROMPT_LEN, row, shape->rows));
    ESPI_TRY(read_rows(r, d->file, row, p->offsets[0], p->kept ? p->kept[0] : 0));
    return read_scores(r, d->file, row);
}

/* Groups first .. first+n-1 of the file that is open. */
static esp_status read_groups(espi_rollouts *r, const reader *d, int64_t first, int64_t n, bool routes) {
    espi_rollouts_shape shape = {.rows = n * d->group_size, .group_size = d->group_size, .rewards = d->n_rewards};
    place p = {NULL, NULL};
    const int64_t row = first * d->group_size;
    esp_status status = find(&p, &shape, d, row, routes);
    if (status == ESP_OK) status = fill(r, d, &shape, &p, row);
    free(p.offsets);
    free(p.kept);
    return status;
}

static esp_status check_request(const reader *d, const espi_rollout_request *q) {
    const espi_rollout_file *f = d->file;
    const char *path = espi_rollout_file_path(f);
    const double temperature = espi_rollout_file_facts(f)->temperature;
    if (q->samples != d->group_size)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: groups of %lld rows, expected %d: set group_size to %lld", path, (long long)d->group_size,
                         q->samples, (long long)d->group_size);
    if (!isnan(temperature) && (float)temperature != q->temperature)
        return ESPI_FAIL(ESP_ERR_MISMATCH, "%s: sampled at temperature %g, expected %g: set temperature to that of the file", path,
                         temperature, (double)q->temperature);
    if (q->routes && !espi_rollout_file_has(f, ESPI_COLUMN_ROUTES))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED, "%s: no /routed_experts to replay, expected them: record them, or set replay to none or r2",
                         path);
    return ESP_OK;
}

static esp_status add_groups(espi_rollouts *r, const reader *d, int64_t first, int64_t n, const espi_rollout_request *request) {
    espi_rollouts some = {0};
    ESPI_TRY(check_request(d, request));
    esp_status status = read_groups(&some, d, first, n, request->routes);
    if (status == ESP_OK) status = espi_rollouts_append(r, &some);
    espi_rollouts_free(&some);
    return status;
}

static esp_status generate(void *self, espi_rollouts *r, const espi_rollout_request *request) {
    reader *d = self;
    const int64_t from = request->position, to = from + request->n_prompts;
    if (from < 0 || to > d->groups)
        return ESPI_FAIL(ESP_ERR_STATE, "%s: groups %lld to %lld are asked for, and there are %lld: the run has more steps than rollouts",
                         d->parts[0].path, (long long)from, (long long)to - 1, (long long)d->groups);
    for (int64_t i = 0; i < d->n_parts; i++) {
        const part *p = &d->parts[i];
        const int64_t first = from > p->first ? from : p->first, last = to < p->first + p->groups ? to : p->first + p->groups;
        if (first >= last) continue;
        ESPI_TRY(open_part(d, i));
        ESPI_TRY(add_groups(r, d, first - p->first, last - first, request));
    }
    return ESP_OK;
}

static esp_status check_names(const espi_rollout_file *f, const char *const *names, int64_t n) {
    const espi_rollout_facts *facts = espi_rollout_file_facts(f);
    const int64_t width = espi_rollout_file_extent(f)->rewards;
    if (!espi_rollout_file_has(f, ESPI_COLUMN_REWARDS)) return ESP_OK;
    if (width != n)
        return ESPI_FAIL(ESP_ERR_MISMATCH,
                         "%s: %lld rewards a row, expected %lld: give the run the rewards of the file, whose weights count",
                         espi_rollout_file_path(f), (long long)width, (long long)n);
    for (int64_t i = 0; i < n && facts->reward_names; i++)
        if (strcmp(facts->reward_names[i], names[i]) != 0)
            return ESPI_FAIL(ESP_ERR_MISMATCH,
                             "%s: reward %lld is \"%.60s\", expected \"%.60s\": give the run the rewards of the file in its order",
                             espi_rollout_file_path(f), (long long)i, facts->reward_names[i], names[i]);
    return ESP_OK;
}

static void add_summary(espi_rollout_summary *total, const espi_rollout_summary *s) {
    if (total->rows == 0) {
        *total = *s;
        return;
    }
    if (s->rewards == 0) total->rewards = 0;
    total->rows += s->rows;
    total->groups += s->groups;
    total->tokens += s->tokens;
    total->counted += s->counted;
    total->truncated += s->truncated;
    total->with_logprob += s->with_logprob;
    total->unscored += s->unscored;
    total->without_spread += s->without_spread;
    if (s->longest > total->longest) total->longest = s->longest;
    if (s->longest_completion > total->longest_completion) total->longest_completion = s->longest_completion;
    if (s->first_version < total->first_version) total->first_version = s->first_version;
    if (s->last_version > total->last_version) total->last_version = s->last_version;
}

static esp_status check_part(reader *d, espi_rollout_summary *total, int64_t i, const espi_rollout_limits *limits, const char *const *names,
                             int64_t n_rewards) {
    espi_rollout_summary s;
    ESPI_TRY(open_part(d, i));
    ESPI_TRY(espi_rollout_file_check(&s, d->file, limits));
    ESPI_TRY(check_names(d->file, names, n_rewards));
    if (i > 0 && s.group_size != d->group_size)
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: groups of %lld rows, expected %lld, as in %s", d->parts[i].path, (long long)s.group_size,
                         (long long)d->group_size, d->parts[0].path);
    d->group_size = s.group_size;
    d->routes = (i == 0 || d->routes) && espi_rollout_file_has(d->file, ESPI_COLUMN_ROUTES);
    d->parts[i].first = d->groups;
    d->parts[i].groups = s.groups;
    d->groups += s.groups;
    add_summary(total, &s);
    return ESP_OK;
}

static bool is_rollouts(const char *name) {
    const size_t n = strlen(name);
    return n > 3 && strcmp(name + n - 3, ".h5") == 0;
}

static esp_status list_folder(reader *d, const char *path) {
    char **names;
    size_t n;
    ESPI_TRY(espi_folder_list(&names, &n, path));
    d->parts = calloc(n + 1, sizeof *d->parts);
    esp_status status = d->parts ? ESP_OK : ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for %zu files", path, n);
    for (size_t i = 0; i < n && status == ESP_OK; i++)
        if (is_rollouts(names[i])) status = espi_path_join(d->parts[d->n_parts++].path, path, names[i]);
    espi_folder_list_free(names, n);
    if (status == ESP_OK && d->n_parts == 0) status = ESPI_FAIL(ESP_ERR_FORMAT, "%s: no file *.h5 in this folder, expected rollouts", path);
    return status;
}

static esp_status list_parts(reader *d, const char *path) {
    if (espi_dir_exists(path)) return list_folder(d, path);
    d->parts = calloc(1, sizeof *d->parts);
    if (!d->parts) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for its bookkeeping", path);
    d->n_parts = 1;
    if (snprintf(d->parts->path, sizeof d->parts->path, "%s", path) < (int)sizeof d->parts->path) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_ARG, "path %.60s..: longer than %d bytes, use a shorter one", path, ESPI_PATH_MAX - 1);
}

esp_status espi_file_source(espi_rollout_source *source, espi_rollout_summary *total, const char *path, const espi_rollout_limits *limits,
                            const char *const *reward_names, int64_t n_rewards) {
    reader *d = calloc(1, sizeof *d);
    *total = (espi_rollout_summary){0};
    if (!d) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: no memory for a reader of rollouts", path);
    d->n_rewards = n_rewards;
    esp_status status = list_parts(d, path);
    for (int64_t i = 0; i < d->n_parts && status == ESP_OK; i++) status = check_part(d, total, i, limits, reward_names, n_rewards);
    if (status != ESP_OK) {
        close_reader(d);
        return status;
    }
    *source = (espi_rollout_source){
        .name = "file", .self = d, .own_prompts = true, .routes = d->routes, .generate = generate, .close = close_reader};
    return ESP_OK;
}
