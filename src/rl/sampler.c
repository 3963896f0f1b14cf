/* The sampler: batched decoding with a key/value cache.  A prompt is prefilled once for its group and its cache rows are copied to the
 * others; a finished sequence leaves the batch; what does not fit is served in waves.  Draws are keyed by what is sampled, and every row of
 * the passes is independent of its neighbours, so neither the batch nor the waves show in a result. */
#include "espalier/sampler.h"
#include "contract/decoder.h"
#include "contract/head.h"
#include "core/rng.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_SEQUENCES 128
#define DEFAULT_LENGTH_CAP 4096
#define DEFAULT_NEW_TOKENS 16

/* Everything of one pass lies in one block; the rooms' scratch comes behind it. */
typedef struct inputs {
    int32_t *ids, *positions, *cu, *k_start, *k_len; /* [pass_tokens] x 2, [sequences+1], [sequences] x 2 */
    int32_t *row, *token;                            /* [sequences] */
    double *uniform;                                 /* [sequences] */
    void *lp;                                        /* real [sequences] */
} inputs;
typedef struct work {
    inputs host, device; /* the same arrays as this file and as the ops see them */
    void *hidden;        /* act [pass_tokens,H] */
} work;

struct esp_sampler {
    esp_model *model;
    int64_t sequences, length;
    int64_t pass_tokens; /* most tokens of one pass: a wave's decode step, or a packed prefill */
    espi_kv_cache cache; /* sequence in slot i owns rows i*length .. (i+1)*length-1 */
    espi_room room;
    espi_arena arena;
    work work;
    int32_t *slot_row;  /* [sequences] request row in the slot, bookkeeping */
    int32_t *slot_kept; /* [sequences] tokens whose keys the slot holds */
};

/* One call's request with defaults filled in. */
typedef struct request {
    esp_generate_config c;
    int32_t eos; /* stop id when the caller names none */
    int32_t *tokens, *lengths;
    float *logprobs;
    uint8_t *stopped;
} request;

static int64_t kv_width(const esp_model *model) {
    return model->config.kv_heads * model->config.head_dim;
}

static esp_status sample_rows(esp_sampler *s, espi_arena *arena, int64_t n, double temperature) {
    const esp_model *m = s->model;
    const espi_head_sample args = {
        .head =
            {.hidden = s->work.hidden, .rows = s->work.device.row, .w = m->head, .n = n, .temperature = temperature, .logit_scale = 1.0},
        .token = s->work.device.token,
        .lp = s->work.device.lp,
        .uniform = s->work.device.uniform};
    const inputs *host = &s->work.host, *device = &s->work.device;
    if (!arena->dry) {
        ESPI_TRY(espi_ctx_put(m->ctx, device->row, host->row, (size_t)n * sizeof *host->row));
        ESPI_TRY(espi_ctx_put(m->ctx, device->uniform, host->uniform, (size_t)n * sizeof *host->uniform));
    }
    ESPI_TRY(espi_op_head_sample(m->ctx, arena, &args));
    if (arena->dry) return ESP_OK;
    ESPI_TRY(espi_ctx_get(m->ctx, host->token, device->token, (size_t)n * sizeof *host->token));
    return espi_ctx_get(m->ctx, host->lp, device->lp, (size_t)n * m->ctx->real_size);
}

/* Copies the keys and values of `count` cache rows from row `from` to row `to`, in every layer. */
static esp_status copy_rows(esp_sampler *s, espi_arena *arena, int64_t to, int64_t from, int64_t count) {
    const int64_t width = kv_width(s->model);
    const size_t row_bytes = (size_t)width * s->model->ctx->act_size;
    const espi_mark mark = espi_arena_mark(arena);
    int32_t *cu, *span; /* [2]; start and length */
    ESPI_TRY(espi_arena_take(arena, 4 * sizeof *cu, &cu));
    span = arena->dry ? NULL : cu + 2;
    if (!arena->dry) ESPI_TRY(espi_ctx_put(s->model->ctx, cu, (int32_t[]){0, (int32_t)count, (int32_t)to, (int32_t)count}, 4 * sizeof *cu));
    for (int64_t l = 0; l < s->model->config.layers; l++) {
        char *k = s->cache.k, *v = s->cache.v;
        if (!arena->dry) {
            k += row_bytes * (size_t)(s->cache.rows * l);
            v += row_bytes * (size_t)(s->cache.rows * l);
        }
        const espi_kv_append args = {
            .k_cache = k,
            .v_cache = v,
            .k = arena->dry ? NULL : k + row_bytes * (size_t)from,
            .v = arena->dry ? NULL : v + row_bytes * (size_t)from,
            .spans = {.cu_q = cu, .k_start = span, .k_len = arena->dry ? NULL : span + 1, .n_seqs = 1, .tokens = count},
            .width = width};
        ESPI_TRY(espi_op_kv_append(s->model->ctx, arena, &args));
    }
    espi_arena_release(arena, mark);
    return ESP_OK;
}

static esp_status extend(esp_sampler *s, espi_arena *arena, int64_t tokens, int32_t n_seqs) {
    const inputs *host = &s->work.host, *device = &s->work.device;
    const espi_spans spans = {.cu_q = device->cu, .k_start = device->k_start, .k_len = device->k_len, .n_seqs = n_seqs, .tokens = tokens};
    if (!arena->dry) {
        const size_t size = sizeof(int32_t), t = (size_t)tokens * size, n = (size_t)n_seqs * size;
        espi_positions(host->positions, &(espi_spans){.cu_q = host->cu, .k_len = host->k_len, .n_seqs = n_seqs});
        ESPI_TRY(espi_ctx_put(s->model->ctx, device->ids, host->ids, t));
        ESPI_TRY(espi_ctx_put(s->model->ctx, device->positions, host->positions, t));
        ESPI_TRY(espi_ctx_put(s->model->ctx, device->cu, host->cu, n + size));
        ESPI_TRY(espi_ctx_put(s->model->ctx, device->k_start, host->k_start, n));
        ESPI_TRY(espi_ctx_put(s->model->ctx, device->k_len, host->k_len, n));
    }
    return espi_decoder_extend(s->model, arena, s->work.hidden, &s->cache, &(espi_routes){0}, device->ids, device->positions, &spans,
                               tokens);
}

/* Takes cache and work arrays, then walks the dearest passes when the arena is dry. */
static esp_status lay_out(esp_sampler *s, espi_arena *arena) {
    const esp_model *m = s->model;
    const size_t n = (size_t)s->sequences, t = (size_t)s->pass_tokens, size = sizeof(int32_t);
    const int64_t rows = s->sequences * s->length;
    const size_t plane = (size_t)(m->config.layers * rows * kv_width(m)) * m->ctx->act_size;
    inputs *host = &s->work.host, *device = &s->work.device;
    s->cache = (espi_kv_cache){.rows = arena->dry ? 0 : rows};
    ESPI_TRY(espi_arena_take(arena, plane, &s->cache.k));
    ESPI_TRY(espi_arena_take(arena, plane, &s->cache.v));
    ESPI_TRY(espi_arena_take_shared(arena, t * size, &host->ids, &device->ids));
    ESPI_TRY(espi_arena_take_shared(arena, t * size, &host->positions, &device->positions));
    ESPI_TRY(espi_arena_take_shared(arena, (n + 1) * size, &host->cu, &device->cu));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->k_start, &device->k_start));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->k_len, &device->k_len));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->row, &device->row));
    ESPI_TRY(espi_arena_take_shared(arena, n * size, &host->token, &device->token));
    ESPI_TRY(espi_arena_take_shared(arena, n * sizeof(double), &host->uniform, &device->uniform));
    ESPI_TRY(espi_arena_take_shared(arena, n * m->ctx->real_size, &host->lp, &device->lp));
    ESPI_TRY(espi_arena_take(arena, t * (size_t)m->config.hidden * m->ctx->act_size, &s->work.hidden));
    if (!arena->dry) return ESP_OK;
    ESPI_TRY(extend(s, arena, s->pass_tokens, (int32_t)s->sequences));
    ESPI_TRY(copy_rows(s, arena, 0, 0, s->length));
    return sample_rows(s, arena, s->sequences, 1.0);
}

static esp_status plan(esp_sampler *s, esp_model *model, const esp_sampler_config *config, espi_extent *room) {
    esp_sampler_config c;
    ESPI_TRY(espi_struct_read(&c, sizeof c, config, "esp_sampler_config"));
    const int64_t context = model->config.max_position;
    if (c.max_sequences < 0 || c.max_length < 0 || c.max_length > context)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "sampler: got max_sequences %d and max_length %d, expected positive numbers (0 = default) and a length of at most "
                         "the model's context, %lld",
                         c.max_sequences, c.max_length, (long long)context);
    s->model = model;
    s->sequences = c.max_sequences ? c.max_sequences : DEFAULT_SEQUENCES;
    s->length = c.max_length ? c.max_length : (context < DEFAULT_LENGTH_CAP ? context : DEFAULT_LENGTH_CAP);
    s->pass_tokens = s->sequences > s->length ? s->sequences : s->length;
    if (s->sequences > INT32_MAX / s->length)
        return ESPI_FAIL(ESP_ERR_ARG, "sampler: got %lld sequences of up to %lld tokens, expected at most %d cache rows: lower one of them",
                         (long long)s->sequences, (long long)s->length, INT32_MAX);
    espi_arena dry = espi_ctx_dry(model->ctx);
    const bool on = model->adapter_on;
    model->adapter_on = true; /* the dearer case */
    const esp_status status = lay_out(s, &dry);
    model->adapter_on = on;
    *room = espi_arena_high(&dry);
    return status;
}

esp_status esp_sampler_plan(esp_model *model, const esp_sampler_config *config, size_t *bytes) {
    if (!model || !bytes) return ESPI_FAIL(ESP_ERR_ARG, "esp_sampler_plan: model or bytes is NULL, expected both");
    esp_sampler s = {0};
    espi_extent room = {0};
    const esp_status status = plan(&s, model, config, &room);
    *bytes = room.main;
    return status;
}

static esp_status build(esp_sampler *s, esp_model *model, const esp_sampler_config *config) {
    espi_extent extent;
    ESPI_TRY(plan(s, model, config, &extent));
    s->slot_row = malloc((size_t)s->sequences * sizeof *s->slot_row);
    s->slot_kept = malloc((size_t)s->sequences * sizeof *s->slot_kept);
    if (!s->slot_row || !s->slot_kept)
        return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the bookkeeping of %lld sequences", (long long)s->sequences);
    ESPI_TRY(espi_room_take(&s->room, model->ctx, ESPI_MEM_CACHE, extent));
    s->arena = espi_room_arena(&s->room, model->ctx);
    return lay_out(s, &s->arena);
}

esp_status esp_sampler_create(esp_sampler **sampler, esp_model *model, const esp_sampler_config *config) {
    if (!sampler || !model) return ESPI_FAIL(ESP_ERR_ARG, "esp_sampler_create: sampler or model is NULL, expected both");
    *sampler = NULL;
    esp_sampler *s = calloc(1, sizeof *s);
    if (!s) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for a sampler's bookkeeping");
    s->model = model;
    const esp_status status = build(s, model, config);
    if (status != ESP_OK) {
        esp_sampler_destroy(s);
        return status;
    }
    *sampler = s;
    return ESP_OK;
}

void esp_sampler_destroy(esp_sampler *sampler) {
    if (!sampler) return;
    espi_room_free(&sampler->room, sampler->model->ctx);
    free(sampler->slot_row);
    free(sampler->slot_kept);
    free(sampler);
}

static esp_status check_prompt(const esp_sampler *s, const esp_generate_config *c, int32_t p) {
    const int64_t n = (int64_t)c->cu_prompts[p + 1] - c->cu_prompts[p];
    if (n <= 0)
        return ESPI_FAIL(ESP_ERR_ARG, "prompt %d: got %lld tokens, expected at least 1: an empty prompt has no last token", p,
                         (long long)n);
    if (n + c->max_new_tokens > s->length)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "prompt %d: got %lld tokens, which with max_new_tokens = %d is beyond the sampler's max_length of %lld: shorten "
                         "the prompt, or raise max_length (the model's context is %lld)",
                         p, (long long)n, c->max_new_tokens, (long long)s->length, (long long)s->model->config.max_position);
    for (int32_t i = c->cu_prompts[p]; i < c->cu_prompts[p + 1]; i++) {
        if (c->prompts[i] < 0 || c->prompts[i] >= s->model->config.vocab)
            return ESPI_FAIL(ESP_ERR_ARG, "prompt %d: got id %d at its token %d, expected 0 to %lld (the vocabulary)", p, c->prompts[i],
                             i - c->cu_prompts[p], (long long)s->model->config.vocab - 1);
        if (espi_token_refused(&s->model->config, c->prompts[i]))
            return ESPI_FAIL(
                ESP_ERR_ARG,
                "prompt %d: got id %d at its token %d, which stands for a picture, expected text: this is the text model alone", p,
                c->prompts[i], i - c->cu_prompts[p]);
    }
    return ESP_OK;
}

static esp_status read_request(request *r, const esp_sampler *s, const esp_generate_config *config) {
    esp_generate_config *c = &r->c;
    ESPI_TRY(espi_struct_read(c, sizeof *c, config, "esp_generate_config"));
    if (c->samples == 0) c->samples = 1;
    if (c->max_new_tokens == 0) c->max_new_tokens = DEFAULT_NEW_TOKENS;
    if (c->temperature == 0) c->temperature = 1;
    if (c->samples < 0 || c->max_new_tokens < 0 || c->n_prompts < 0 || c->n_stop_ids < 0 || c->n_prompts > INT32_MAX / c->samples)
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "generate: got n_prompts %d, samples %d, max_new_tokens %d, n_stop_ids %d, expected none negative and at most %d rows",
            c->n_prompts, c->samples, c->max_new_tokens, c->n_stop_ids, INT32_MAX);
    if (!(c->temperature > 0) || !isfinite(c->temperature))
        return ESPI_FAIL(ESP_ERR_ARG,
                         "generate: got temperature %g, expected a positive number (0 = the default, 1); for the most likely "
                         "token set greedy",
                         (double)c->temperature);
    if (c->n_prompts > 0 && (!c->prompts || !c->cu_prompts))
        return ESPI_FAIL(ESP_ERR_ARG, "generate: prompts or cu_prompts is NULL, expected both");
    if (c->n_stop_ids > 0 && !c->stop_ids) return ESPI_FAIL(ESP_ERR_ARG, "generate: got n_stop_ids %d and no stop_ids", c->n_stop_ids);
    if (c->n_prompts > 0 && c->cu_prompts[0] != 0)
        return ESPI_FAIL(ESP_ERR_ARG, "generate: cu_prompts[0]: got %d, expected 0", c->cu_prompts[0]);
    r->eos = (int32_t)s->model->config.eos_id;
    for (int32_t p = 0; p < c->n_prompts; p++) ESPI_TRY(check_prompt(s, c, p));
    return ESP_OK;
}

static bool stops(const request *r, int32_t id) {
    if (!r->c.stop_ids) return id == r->eos;
    for (int32_t i = 0; i < r->c.n_stop_ids; i++)
        if (r->c.stop_ids[i] == id) return true;
    return false;
}

/* Writes down one drawn token of a request's row and hands it to the caller.  *goes_on: the row does. */
static esp_status record(bool *goes_on, const esp_sampler *s, const request *r, int32_t row, int32_t id, double lp) {
    const int32_t at = r->lengths[row];
    const size_t cell = (size_t)row * (size_t)r->c.max_new_tokens + (size_t)at;
    const bool refused = espi_token_refused(&s->model->config, id), stop = stops(r, id);
    if (refused && at == 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "generate: row %d: the model's first token is %d, which stands for a picture, expected text: change the prompt",
                         row, id);
    if (!isfinite(lp))
        return ESPI_FAIL(ESP_ERR_NONFINITE,
                         "generate: row %d, token %d: got log-probability %g, expected a finite number: the logits have NaN or infinity",
                         row, at, lp);
    *goes_on = !refused && !stop && at + 1 < r->c.max_new_tokens;
    if (r->stopped) r->stopped[row] = stop && !refused;
    if (refused) return ESP_OK; /* the row was cut before it */
    r->lengths[row]++;
    r->tokens[cell] = id;
    if (r->logprobs) r->logprobs[cell] = (float)lp;
    const int code = r->c.on_token ? r->c.on_token(r->c.on_token_user, row, at, id, (float)lp) : 0;
    if (code == 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_CALLBACK, "generate: on_token returned %d for token %d of row %d, expected 0", code, at, row);
}

static double draw(const request *r, int32_t row) {
    const int32_t prompt = row / r->c.samples, sample = row % r->c.samples;
    const uint32_t key = r->c.keys ? r->c.keys[prompt] : (uint32_t)prompt;
    return espi_uniform(r->c.seed, r->c.evaluation ? ESPI_STREAM_EVAL : ESPI_STREAM_SAMPLE, r->c.step, key, (uint32_t)sample,
                        (uint32_t)r->lengths[row]);
}

/* Draws the next token of the rows in slots live[0..n): the hidden state of the i-th is row work.row[i].  Keeps those that go on. */
static esp_status next_tokens(esp_sampler *s, const request *r, int32_t *live, int32_t *n) {
    for (int32_t i = 0; i < *n; i++) s->work.host.uniform[i] = draw(r, s->slot_row[live[i]]);
    const espi_mark mark = espi_arena_mark(&s->arena);
    ESPI_TRY(sample_rows(s, &s->arena, *n, r->c.greedy ? 0.0 : (double)r->c.temperature));
    espi_arena_release(&s->arena, mark);
    int32_t left = 0;
    for (int32_t i = 0; i < *n; i++) {
        const int32_t slot = live[i], id = s->work.host.token[i];
        bool goes_on = false;
        ESPI_TRY(record(&goes_on, s, r, s->slot_row[slot], id, espi_real_get(s->work.host.lp, i, s->model->ctx->real)));
        if (!goes_on) continue;
        s->work.host.ids[left] = id;
        live[left++] = slot;
    }
    *n = left;
    return ESP_OK;
}

/* Prefills the prompts first .. last-1 of the request in one pass, each into the slot of its first row in this wave; then gives the others
 * of its group a copy.  work.row [out]: where each slot's last hidden state is, for the slots begin .. end-1; next_tokens reads it. */
static esp_status prefill(esp_sampler *s, const request *r, int32_t begin, int32_t end) {
    int32_t n_seqs = 0, tokens = 0, before = -1, source = 0;
    s->work.host.cu[0] = 0;
    for (int32_t slot = begin; slot < end; slot++) {
        const int32_t p = s->slot_row[slot] / r->c.samples, length = r->c.cu_prompts[p + 1] - r->c.cu_prompts[p];
        if (p != before) {
            memcpy(s->work.host.ids + tokens, r->c.prompts + r->c.cu_prompts[p], (size_t)length * sizeof(int32_t));
            s->work.host.k_start[n_seqs] = (int32_t)(slot * s->length);
            s->work.host.k_len[n_seqs] = length;
            tokens += length;
            s->work.host.cu[++n_seqs] = tokens;
            before = p;
        }
        s->work.host.row[slot - begin] = tokens - 1;
        s->slot_kept[slot] = length;
    }
    ESPI_TRY(extend(s, &s->arena, tokens, n_seqs));
    before = -1;
    for (int32_t slot = begin; slot < end; slot++) {
        const int32_t p = s->slot_row[slot] / r->c.samples;
        if (p != before)
            source = slot;
        else
            ESPI_TRY(copy_rows(s, &s->arena, slot * s->length, source * s->length, s->slot_kept[slot]));
        before = p;
    }
    return ESP_OK;
}

/* Where the prefill that starts at slot `begin` ends: whole prompts, as many as one pass holds. */
static int32_t prefill_end(const esp_sampler *s, const request *r, int32_t begin, int32_t n) {
    int64_t tokens = 0;
    int32_t before = -1;
    for (int32_t slot = begin; slot < n; slot++) {
        const int32_t p = s->slot_row[slot] / r->c.samples;
        if (p != before) tokens += r->c.cu_prompts[p + 1] - r->c.cu_prompts[p];
        if (tokens > s->pass_tokens) return slot;
        before = p;
    }
    return n;
}

static esp_status decode(esp_sampler *s, const request *r, int32_t *live, int32_t n) {
    while (n > 0) {
        for (int32_t i = 0; i < n; i++) {
            const int32_t slot = live[i];
            s->work.host.cu[i] = i;
            s->work.host.k_start[i] = (int32_t)(slot * s->length);
            s->work.host.k_len[i] = ++s->slot_kept[slot];
            s->work.host.row[i] = i;
        }
        s->work.host.cu[n] = n;
        ESPI_TRY(extend(s, &s->arena, n, n));
        ESPI_TRY(next_tokens(s, r, live, &n));
    }
    return ESP_OK;
}

/* Rows first .. first+n-1 of the request, together. */
static esp_status wave(esp_sampler *s, const request *r, int32_t *live, int32_t *ids, int32_t first, int32_t n) {
    int32_t n_live = 0;
    for (int32_t slot = 0; slot < n; slot++) s->slot_row[slot] = first + slot;
    for (int32_t begin = 0, end; begin < n; begin = end) {
        end = prefill_end(s, r, begin, n);
        ESPI_TRY(prefill(s, r, begin, end));
        int32_t part = end - begin;
        for (int32_t i = 0; i < part; i++) live[n_live + i] = begin + i;
        ESPI_TRY(next_tokens(s, r, live + n_live, &part));
        /* The next prefill uses work.ids itself. */
        memcpy(ids + n_live, s->work.host.ids, (size_t)part * sizeof *ids);
        n_live += part;
    }
    memcpy(s->work.host.ids, ids, (size_t)n_live * sizeof *ids);
    return decode(s, r, live, n_live);
}

esp_status esp_sampler_generate(esp_sampler *sampler, const esp_generate_config *config, int32_t *tokens, float *logprobs, int32_t *lengths,
                                uint8_t *stopped) {
    if (!sampler || !config || !tokens || !lengths)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_sampler_generate: sampler, config, tokens or lengths is NULL, expected all four");
    request r = {.tokens = tokens, .lengths = lengths, .logprobs = logprobs, .stopped = stopped};
    ESPI_TRY(read_request(&r, sampler, config));
    const int32_t rows = r.c.n_prompts * r.c.samples;
    const size_t cells = (size_t)rows * (size_t)r.c.max_new_tokens;
    if (rows == 0) return ESP_OK;
    memset(tokens, 0, cells * sizeof *tokens);
    if (logprobs) memset(logprobs, 0, cells * sizeof *logprobs);
    memset(lengths, 0, (size_t)rows * sizeof *lengths);
    int32_t *live = malloc(2 * (size_t)sampler->sequences * sizeof *live);
    if (!live) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for the list of %lld live sequences", (long long)sampler->sequences);
    const espi_mark mark = espi_arena_mark(&sampler->arena);
    esp_status status = ESP_OK;
    for (int64_t first = 0; first < rows && status == ESP_OK; first += sampler->sequences) {
        const int64_t n = rows - first < sampler->sequences ? rows - first : sampler->sequences;
        status = wave(sampler, &r, live, live + sampler->sequences, (int32_t)first, (int32_t)n);
    }
    espi_arena_release(&sampler->arena, mark); /* a pass that failed half-way has not */
    free(live);
    return status;
}
