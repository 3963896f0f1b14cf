/* Generation as one queue of rows: in every pass the rows that are being decoded are fed their last token, and rows that wait take the
 * places of those that ended.  A prompt is computed once, in the pass in which its first row begins, and all its rows read its keys and
 * values where they lie.  Draws are keyed by what is sampled, and every row of a pass is independent of its neighbours, so neither the
 * batch nor the order shows in a result. */
#include "contract/head.h"
#include "core/rng.h"
#include "rl/ranks.h"
#include "rl/sampler.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DEFAULT_NEW_TOKENS 16

/* One call: the request with defaults filled in, and how far it is. */
typedef struct call {
    esp_sampler *s;
    esp_generate_config c;
    espi_head_filter filter;
    bool filtered, texts;
    int32_t eos; /* stop id when the caller names none */
    int32_t *tokens, *lengths;
    float *logprobs;
    uint8_t *stopped;
    int64_t own_rows, prompt_rows; /* of the cache, for each completion and each prompt */
    int32_t rows, waiting;         /* rows asked for; the first that has not begun */
    int32_t n_live;
    int32_t prompt,
        prompt_end;           /* where the prompt of the row that began last is held, and its last token in this pass, -1: an earlier one */
    int32_t n_tokens, n_seqs; /* of the pass that is being put together */
} call;

static int32_t prompt_length(const call *g, int32_t p) {
    return g->c.cu_prompts[p + 1] - g->c.cu_prompts[p];
}

/* ---- the request ---- */

static esp_status check_prompt(const call *g, int32_t p) {
    const esp_generate_config *c = &g->c;
    const esp_sampler *s = g->s;
    const int64_t n = (int64_t)c->cu_prompts[p + 1] - c->cu_prompts[p];
    if (n <= 0)
        return ESPI_FAIL(ESP_ERR_ARG, "prompt %d: got %lld tokens, expected at least 1: an empty prompt has no last token", p,
                         (long long)n);
    if (n + c->max_new_tokens > s->length)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "prompt %d: got %lld tokens, which with max_new_tokens = %d is beyond the sampler's max_length of %lld: shorten "
                         "the prompt, or raise max_length (the model's context is %lld)",
                         p, (long long)n, c->max_new_tokens, (long long)s->length, (long long)s->model->config.max_position);
    if (s->completion > 0 && n > s->length - s->completion)
        return ESPI_FAIL(ESP_ERR_ARG, "prompt %d: got %lld tokens, expected at most %lld: the sampler keeps %lld of %lld for completions",
                         p, (long long)n, (long long)(s->length - s->completion), (long long)s->completion, (long long)s->length);
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

static esp_status read_filter(call *g) {
    const esp_generate_config *c = &g->c;
    if (c->top_k < 0 || !(c->top_p >= 0 && c->top_p <= 1) || !(c->min_p >= 0 && c->min_p < 1))
        return ESPI_FAIL(ESP_ERR_ARG, "generate: got top_k %d, top_p %g, min_p %g, expected 0 or more, 0 to 1, and 0 to below 1", c->top_k,
                         (double)c->top_p, (double)c->min_p);
    if (c->top_k < g->s->model->config.vocab) g->filter.top_k = c->top_k; /* more than there are: all */
    if (c->top_p < 1) g->filter.top_p = c->top_p;
    g->filter.min_p = c->min_p;
    g->filtered = espi_filters(&g->filter);
    if (!g->filtered) return ESP_OK;
    if (c->greedy)
        return ESPI_FAIL(ESP_ERR_ARG,
                         "generate: got greedy with top_k %d, top_p %g, min_p %g, expected one or the other: greedy takes the "
                         "largest logit of all",
                         c->top_k, (double)c->top_p, (double)c->min_p);
    if (g->filter.top_k > g->s->kept_most)
        return ESPI_FAIL(ESP_ERR_ARG, "generate: got top_k %d, expected at most the sampler's max_kept, %lld: raise max_kept", c->top_k,
                         (long long)g->s->kept_most);
    if (g->logprobs && !c->on_drawn && !c->evaluation)
        return ESPI_FAIL(
            ESP_ERR_ARG,
            "generate: got top_k %d, top_p %g, min_p %g and logprobs without on_drawn: training would see another distribution "
            "than was sampled from; take the kept ids by on_drawn, or set evaluation, or ask for no logprobs",
            c->top_k, (double)c->top_p, (double)c->min_p);
    return ESP_OK;
}

static esp_status read_texts(call *g) {
    const esp_generate_config *c = &g->c;
    g->texts = c->n_stop_strings > 0 || c->on_text;
    if (c->n_stop_strings < 0 || (c->n_stop_strings > 0 && !c->stop_strings) || (g->texts && !c->tokenizer))
        return ESPI_FAIL(ESP_ERR_ARG,
                         "generate: got n_stop_strings %d, stop_strings %s, tokenizer %s, expected both with stop strings, and "
                         "the tokenizer with on_text",
                         c->n_stop_strings, c->stop_strings ? "given" : "NULL", c->tokenizer ? "given" : "NULL");
    for (int32_t i = 0; i < c->n_stop_strings; i++) {
        const char *text = c->stop_strings[i];
        if (!text || !*text || ((unsigned char)*text & 0xC0) == 0x80)
            return ESPI_FAIL(ESP_ERR_ARG, "generate: stop string %d is %s, expected some text in UTF-8", i,
                             !text   ? "NULL"
                             : *text ? "not UTF-8: its first byte goes on with a character"
                                     : "empty");
    }
    return ESP_OK;
}

static esp_status read_counts(call *g) {
    esp_generate_config *c = &g->c;
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
    if (g->s->completion > 0 && c->max_new_tokens > g->s->completion)
        return ESPI_FAIL(ESP_ERR_ARG, "generate: got max_new_tokens %d, expected at most the sampler's, %lld", c->max_new_tokens,
                         (long long)g->s->completion);
    return ESP_OK;
}

static esp_status read_request(call *g, const esp_generate_config *config) {
    esp_generate_config *c = &g->c;
    ESPI_TRY(espi_struct_read(c, sizeof *c, config, "esp_generate_config"));
    ESPI_TRY(read_counts(g));
    ESPI_TRY(read_filter(g));
    ESPI_TRY(read_texts(g));
    if (c->n_prompts > 0 && (!c->prompts || !c->cu_prompts))
        return ESPI_FAIL(ESP_ERR_ARG, "generate: prompts or cu_prompts is NULL, expected both");
    if (c->n_stop_ids > 0 && !c->stop_ids) return ESPI_FAIL(ESP_ERR_ARG, "generate: got n_stop_ids %d and no stop_ids", c->n_stop_ids);
    if (c->n_prompts > 0 && c->cu_prompts[0] != 0)
        return ESPI_FAIL(ESP_ERR_ARG, "generate: cu_prompts[0]: got %d, expected 0", c->cu_prompts[0]);
    g->eos = (int32_t)g->s->model->config.eos_id;
    g->rows = c->n_prompts * c->samples;
    g->own_rows = g->s->completion > 0 ? g->s->completion : c->max_new_tokens;
    g->prompt_rows = g->s->length - g->own_rows;
    for (int32_t p = 0; p < c->n_prompts; p++) ESPI_TRY(check_prompt(g, p));
    return ESP_OK;
}

/* ---- one pass ---- */

/* Adds a span of n tokens to the pass: behind `kept - n` own keys from cache row `start` on, and behind `prefix` keys of a prompt. */
static void add_span(call *g, const int32_t *ids, int32_t n, int64_t start, int32_t kept, int32_t prompt, int32_t prefix) {
    const espi_sampler_arrays *host = &g->s->host;
    memcpy(host->ids + g->n_tokens, ids, (size_t)n * sizeof *ids);
    host->k_start[g->n_seqs] = (int32_t)start;
    host->k_len[g->n_seqs] = kept;
    host->prefix_start[g->n_seqs] = (int32_t)(g->s->sequences * g->own_rows + prompt * g->prompt_rows);
    host->prefix_len[g->n_seqs] = prefix;
    g->n_tokens += n;
    host->cu[++g->n_seqs] = g->n_tokens;
}

static void feed(call *g, espi_live_row *live) {
    add_span(g, &live->next, 1, live->slot * g->own_rows, ++live->kept, live->prompt, live->prefix);
    live->hidden = g->n_tokens - 1;
}

static int32_t first_free(const bool *taken) {
    int32_t i = 0;
    while (taken[i]) i++;
    return i;
}

/* A place for the next prompt, and the prompt into this pass.  false: there is no room. */
static bool begin_prompt(call *g, int32_t p) {
    const esp_sampler *s = g->s;
    const int32_t n = prompt_length(g, p);
    int32_t slot = 0;
    while (slot < s->prompts && s->users[slot] > 0) slot++;
    if (slot == s->prompts || g->n_tokens + n > s->pass_tokens) return false;
    s->users[slot] = g->c.samples;
    add_span(g, g->c.prompts + g->c.cu_prompts[p], n, s->sequences * g->own_rows + slot * g->prompt_rows, n, slot, 0);
    g->prompt = slot;
    g->prompt_end = g->n_tokens - 1;
    return true;
}

/* Rows that wait take the free places.  A row whose prompt was computed in an earlier pass is fed the prompt's last token again: only its
 * hidden state is wanted, the keys are there. */
static void admit(call *g) {
    esp_sampler *s = g->s;
    for (; g->waiting < g->rows && g->n_live < s->sequences; g->waiting++) {
        const int32_t p = g->waiting / g->c.samples, n = prompt_length(g, p);
        if (g->waiting % g->c.samples == 0 && !begin_prompt(g, p)) return;
        espi_live_row *live = &s->live[g->n_live++];
        *live = (espi_live_row){.row = g->waiting, .slot = first_free(s->taken), .prompt = g->prompt, .prefix = n, .hidden = g->prompt_end};
        s->taken[live->slot] = true;
        if (g->prompt_end >= 0) continue;
        live->prefix = n - 1;
        live->next = g->c.prompts[g->c.cu_prompts[p + 1] - 1];
        feed(g, live);
    }
}

static esp_status draw_tokens(call *g) {
    esp_sampler *s = g->s;
    for (int32_t i = 0; i < g->n_live; i++) {
        const espi_live_row *live = &s->live[i];
        const int32_t prompt = live->row / g->c.samples, sample = live->row % g->c.samples;
        const uint32_t key = g->c.keys ? g->c.keys[prompt] : (uint32_t)prompt;
        s->host.row[i] = live->hidden;
        s->host.uniform[i] = espi_uniform(g->c.seed, g->c.evaluation ? ESPI_STREAM_EVAL : ESPI_STREAM_SAMPLE, g->c.step, key,
                                          (uint32_t)sample, (uint32_t)live->drawn);
    }
    return espi_sampler_draw(s, &s->arena, g->n_live, g->c.greedy ? 0.0 : (double)g->c.temperature, &g->filter);
}

/* Where experts lie on several ranks a pass is one of all ranks, and may have nothing of this one's. */
static esp_status run_pass(call *g) {
    esp_sampler *s = g->s;
    g->n_tokens = g->n_seqs = 0;
    g->prompt_end = -1;
    s->host.cu[0] = 0;
    for (int32_t i = 0; i < g->n_live; i++) feed(g, &s->live[i]);
    admit(g);
    const espi_mark mark = espi_arena_mark(&s->arena);
    ESPI_TRY(espi_sampler_extend(s, &s->arena, g->n_tokens, g->n_seqs, s->record && g->c.on_drawn));
    if (g->n_live > 0) ESPI_TRY(draw_tokens(g));
    espi_arena_release(&s->arena, mark);
    return ESP_OK;
}

/* ---- what was drawn ---- */

static bool stops(const call *g, int32_t id) {
    if (!g->c.stop_ids) return id == g->eos;
    for (int32_t i = 0; i < g->c.n_stop_ids; i++)
        if (g->c.stop_ids[i] == id) return true;
    return false;
}

/* The i-th of the live rows has drawn `id`. */
typedef struct draw {
    int32_t i, id;
    float logprob;
    bool stopped, last;
} draw;

static esp_status told(int code, const char *name, int32_t index, int32_t row) {
    if (code == 0) return ESP_OK;
    return ESPI_FAIL(ESP_ERR_CALLBACK, "generate: %s returned %d for token %d of row %d, expected 0", name, code, index, row);
}

/* Text that became certain with this token; a stop string ends the row. */
static esp_status tell_text(const call *g, draw *d, bool stop_id) {
    espi_live_row *live = &g->s->live[d->i];
    espi_row_text *text = &live->text;
    size_t certain = 0;
    bool found = false;
    if (!stop_id) ESPI_TRY(espi_row_text_add(text, &certain, &found, &g->c, d->id));
    d->stopped = d->stopped || found;
    d->last = d->last || found;
    if (d->last && !found) {
        ESPI_TRY(espi_row_text_end(text));
        certain = text->held.used;
    }
    if (g->c.on_text && (certain > 0 || d->last)) {
        const char behind = text->held.data[certain];
        text->held.data[certain] = '\0';
        ESPI_TRY(told(g->c.on_text(g->c.on_text_user, live->row, text->held.data, certain, d->last), "on_text", live->drawn, live->row));
        text->held.data[certain] = behind;
    }
    espi_row_text_drop(text, certain);
    return ESP_OK;
}

/* Experts of the tokens that were fed for this draw, into s->routes; their number. */
static int32_t routes_of(const call *g, const espi_live_row *live) {
    const esp_sampler *s = g->s;
    const espi_config *c = &s->model->config;
    const bool begins = live->drawn == 0;
    if (begins && live->row % g->c.samples != 0) return 0; /* told with the first */
    const int32_t n = begins ? prompt_length(g, live->row / g->c.samples) : 1, first = live->hidden - n + 1;
    memset(s->routes, UINT8_MAX, (size_t)(n * c->layers * c->top_k) * (size_t)espi_route_bytes(c));
    for (int64_t l = 0; l < c->layers; l++)
        if (s->model->layers[l].mlp == ESPI_MLP_MOE)
            espi_routes_write(s->routes, c, l, s->host.chosen + (l * g->n_tokens + first) * c->top_k, n);
    return n;
}

static esp_status tell_drawn(const call *g, const draw *d) {
    const esp_sampler *s = g->s;
    const espi_live_row *live = &s->live[d->i];
    esp_drawn drawn = {.struct_size = sizeof drawn,
                       .row = live->row,
                       .index = live->drawn,
                       .id = d->id,
                       .logprob = d->logprob,
                       .last = d->last,
                       .stopped = d->stopped};
    if (g->filtered) {
        drawn.kept = s->host.kept + d->i * s->kept_most;
        drawn.n_kept = s->host.kept_count[d->i];
    }
    if (s->record) {
        drawn.n_routed = routes_of(g, live);
        drawn.routed_experts = s->routes;
    }
    return told(g->c.on_drawn(g->c.on_drawn_user, &drawn), "on_drawn", live->drawn, live->row);
}

static esp_status check_draw(const call *g, const draw *d, bool refused) {
    const espi_live_row *live = &g->s->live[d->i];
    if (g->filtered && g->s->host.kept_count[d->i] < 0)
        return ESPI_FAIL(
            ESP_ERR_UNSUPPORTED,
            "generate: row %d, token %d: top_p %g and min_p %g leave more than the sampler's max_kept, %lld ids: set top_k, or "
            "raise max_kept (or the logits are not finite numbers)",
            live->row, live->drawn, g->filter.top_p, g->filter.min_p, (long long)g->s->kept_most);
    if (refused && live->drawn == 0)
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "generate: row %d: the model's first token is %d, which stands for a picture, expected text: change the prompt",
                         live->row, d->id);
    if (!isfinite(d->logprob))
        return ESPI_FAIL(ESP_ERR_NONFINITE,
                         "generate: row %d, token %d: got log-probability %g, expected a finite number: the logits have NaN or infinity",
                         live->row, live->drawn, (double)d->logprob);
    return ESP_OK;
}

/* Writes down what was drawn and hands it to the caller. */
static esp_status record(const call *g, draw *d) {
    espi_live_row *live = &g->s->live[d->i];
    const size_t cell = (size_t)live->row * (size_t)g->c.max_new_tokens + (size_t)live->drawn;
    const bool refused = espi_token_refused(&g->s->model->config, d->id);
    ESPI_TRY(check_draw(g, d, refused));
    d->stopped = stops(g, d->id) && !refused;
    d->last = d->stopped || refused || live->drawn + 1 == g->c.max_new_tokens;
    if (g->texts) ESPI_TRY(tell_text(g, d, d->stopped || refused));
    if (g->stopped) g->stopped[live->row] = d->stopped;
    if (refused) return ESP_OK; /* the row was cut before it */
    g->lengths[live->row]++;
    g->tokens[cell] = live->next = d->id;
    if (g->logprobs) g->logprobs[cell] = d->logprob;
    if (g->c.on_token)
        ESPI_TRY(told(g->c.on_token(g->c.on_token_user, live->row, live->drawn, d->id, d->logprob), "on_token", live->drawn, live->row));
    if (g->c.on_drawn) ESPI_TRY(tell_drawn(g, d));
    live->drawn++;
    return ESP_OK;
}

static void leave(call *g, espi_live_row *live) {
    g->s->taken[live->slot] = false;
    g->s->users[live->prompt]--;
    free(live->text.held.data);
}

/* Rows that end leave; the others close up. */
static esp_status take_draws(call *g) {
    esp_sampler *s = g->s;
    int32_t left = 0;
    esp_status status = ESP_OK;
    for (int32_t i = 0; i < g->n_live; i++) {
        draw d = {.i = i, .id = s->host.token[i], .logprob = (float)espi_real_get(s->host.lp, i, s->model->ctx->real)};
        if (status == ESP_OK) status = record(g, &d);
        if (d.last && status == ESP_OK)
            leave(g, &s->live[i]);
        else
            s->live[left++] = s->live[i];
    }
    g->n_live = left;
    return status;
}

/* Are there passes to come?  Where they are of all ranks: as long as one of them has any, and none has failed. */
static esp_status goes_on(bool *more, const call *g, esp_status mine) {
    const esp_model *model = g->s->model;
    *more = mine == ESP_OK && (g->n_live > 0 || g->waiting < g->rows);
    if (!espi_share_travels(&model->share)) return mine;
    ESPI_TRY(espi_ranks_agree(model, "a pass of the sampler", mine));
    return espi_ranks_any(more, model, "the sampler's next pass", *more);
}

static esp_status run(call *g, esp_status mine) {
    for (bool more;;) {
        ESPI_TRY(goes_on(&more, g, mine));
        if (!more) return ESP_OK;
        mine = run_pass(g);
        if (mine == ESP_OK) mine = take_draws(g);
    }
}

/* Every row still waits. */
static void begin(const call *g) {
    const size_t cells = (size_t)g->rows * (size_t)g->c.max_new_tokens;
    memset(g->tokens, 0, cells * sizeof *g->tokens);
    if (g->logprobs) memset(g->logprobs, 0, cells * sizeof *g->logprobs);
    memset(g->lengths, 0, (size_t)g->rows * sizeof *g->lengths);
    memset(g->s->taken, 0, (size_t)g->s->sequences * sizeof *g->s->taken);
    memset(g->s->users, 0, (size_t)g->s->prompts * sizeof *g->s->users);
}

esp_status esp_sampler_generate(esp_sampler *sampler, const esp_generate_config *config, int32_t *tokens, float *logprobs, int32_t *lengths,
                                uint8_t *stopped) {
    if (!sampler || !config || !tokens || !lengths)
        return ESPI_FAIL(ESP_ERR_ARG, "esp_sampler_generate: sampler, config, tokens or lengths is NULL, expected all four");
    call g = {.s = sampler, .tokens = tokens, .lengths = lengths, .logprobs = logprobs, .stopped = stopped};
    const esp_status read = read_request(&g, config);
    if (read == ESP_OK) begin(&g);
    const espi_mark mark = espi_arena_mark(&sampler->arena);
    sampler->model->share.most_tokens = sampler->pass_tokens;
    const esp_status status = run(&g, read);
    espi_arena_release(&sampler->arena, mark); /* a pass that failed half-way has not */
    for (int32_t i = 0; i < g.n_live; i++) free(sampler->live[i].text.held.data);
    return status;
}
