/* A server for the tests: what vLLM's OpenAI-compatible server does for completions and adapters, with our own sampler behind it, on a free
 * port of the loopback interface.  And what servers do on bad days: see `kinds`.
 *
 *   mock_server MODEL [--processed] [--routes] [--no-lora] [--deaf] [--context N] [--key K]
 *
 * It prints "port N" and serves until its standard input ends, so it never outlives the test that started it.
 *   POST /mock/misbehave {"kind":K, "count":n, "seconds":s}     the next n requests that K fits
 *   POST /mock/random {"rate":p, "seed":s, "kinds":[K,..]}      that share of all requests
 *   POST /mock/forget {}                                        all adapters, as a restart does
 *   GET  /mock/stats                                            what was asked and what was done
 * As vLLM: the distribution that log-probabilities are of is stated at the start (--processed: with the temperature), parameters of sampling
 * that a request leaves out would come from elsewhere (here: it is refused), and an adapter that takes the name of another is answered for
 * from what is left of that one. */
#include "core/rng.h"
#include "espalier/espalier.h"
#include "models/model.h"

#include <arpa/inet.h>
#include <jansson.h>
#include <math.h>
#include <microhttpd.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define BASE "base"
#define MOST_ROWS 64
#define LONGEST 128
#define MOST_ADAPTERS 64
#define MOST_IDS 65536
#define MOST_PLANNED 64

/* What can go wrong, and with which requests. */
enum { COMPLETIONS = 1, ADAPTERS = 2, ANY = 3 };
typedef enum kind {
    NONE,
    ERROR_500,
    ERROR_503,
    TOO_MANY,
    REFUSED,
    SLOW,
    DROPPED,
    DROPPED_AFTER,
    CUT,
    TRUNCATED,
    EMPTY,
    NOT_JSON,
    SHORT_LOGPROBS,
    FEW_CHOICES,
    MANY_CHOICES,
    TWICE_CHOICE,
    MISSING_IDS,
    MISSING_LOGPROBS,
    BAD_ID,
    POSITIVE_LOGPROB,
    NULL_LOGPROB,
    NO_TOKENS,
    TOO_LONG,
    WRONG_FINISH,
    ABORTED,
    WRONG_MODEL,
    OLDER_MODEL,
    WRONG_PROMPT,
    SHORT_ROUTES,
    BAD_ROUTE,
    TORN_ROUTES,
    KINDS
} kind;
static const struct {
    const char *name;
    int fits;
} kinds[KINDS] = {
    [NONE] = {"none", ANY},
    [ERROR_500] = {"error500", ANY},
    [ERROR_503] = {"error503", ANY},
    [TOO_MANY] = {"error429", ANY},
    [REFUSED] = {"error400", ANY},
    [SLOW] = {"slow", ANY},
    [DROPPED] = {"dropped", ANY},             /* the connection, before anything is done */
    [DROPPED_AFTER] = {"dropped-after", ANY}, /* ... after all is done */
    [CUT] = {"cut", ANY},                     /* the connection, in the middle of the answer */
    [TRUNCATED] = {"truncated", COMPLETIONS},
    [EMPTY] = {"empty", COMPLETIONS},
    [NOT_JSON] = {"not-json", COMPLETIONS},
    [SHORT_LOGPROBS] = {"short-logprobs", COMPLETIONS},
    [FEW_CHOICES] = {"few-choices", COMPLETIONS},
    [MANY_CHOICES] = {"many-choices", COMPLETIONS},
    [TWICE_CHOICE] = {"twice-choice", COMPLETIONS},
    [MISSING_IDS] = {"missing-ids", COMPLETIONS},
    [MISSING_LOGPROBS] = {"missing-logprobs", COMPLETIONS},
    [BAD_ID] = {"bad-id", COMPLETIONS},
    [POSITIVE_LOGPROB] = {"positive-logprob", COMPLETIONS},
    [NULL_LOGPROB] = {"null-logprob", COMPLETIONS},
    [NO_TOKENS] = {"no-tokens", COMPLETIONS},
    [TOO_LONG] = {"too-long", COMPLETIONS},
    [WRONG_FINISH] = {"wrong-finish", COMPLETIONS},
    [ABORTED] = {"aborted", COMPLETIONS},
    [WRONG_MODEL] = {"wrong-model", COMPLETIONS},
    [OLDER_MODEL] = {"older-model", COMPLETIONS}, /* by the adapter that was loaded longest ago, and it says so */
    [WRONG_PROMPT] = {"wrong-prompt", COMPLETIONS},
    [SHORT_ROUTES] = {"short-routes", COMPLETIONS},
    [BAD_ROUTE] = {"bad-route", COMPLETIONS},
    [TORN_ROUTES] = {"torn-routes", COMPLETIONS},
};

typedef struct adapter {
    char name[128], path[512];
    float *values;
    int64_t number; /* of its load */
} adapter;

typedef struct planned {
    kind kind;
    double seconds;
} planned;

static struct {
    /* The state below it: one request at a time. */
    pthread_mutex_t lock;
    bool processed, routes, lora, deaf;
    int64_t context;
    const char *key; /* that requests below /v1 must bring; NULL = none */
    esp_ctx *ctx;
    esp_model *model;
    esp_sampler *sampler;
    esp_model_info info;
    adapter adapters[MOST_ADAPTERS]; /* name "" = free */
    adapter left[MOST_ADAPTERS];     /* of unloaded ones: their names and values */
    int n_left;

    planned planned[MOST_PLANNED];
    int n_planned;
    double rate;
    uint64_t seed;
    bool among[KINDS];
    uint32_t draws;

    char *ids[MOST_IDS]; /* X-Request-Id of every completions request */
    int64_t n_ids, ids_twice, without_id;
    int64_t done[KINDS], completions, answered, loads, unloads, most_loaded, stale;
} mock = {.lock = PTHREAD_MUTEX_INITIALIZER, .lora = true, .context = LONGEST};

static void check(esp_status status, const char *what) {
    if (status == ESP_OK) return;
    fprintf(stderr, "mock_server: %s: %s: %s\n", what, esp_status_name(status), esp_last_error());
    exit(2);
}

/* ---- the model behind it ---- */

static void each_parameter(float *values, bool set) {
    for (int64_t i = 0; i < esp_model_param_count(mock.model); i++) {
        esp_param p = ESP_PARAM_INIT;
        check(esp_model_param_get(mock.model, i, &p), "parameter");
        const esp_tensor view = esp_tensor_view(p.data, p.dtype, p.rank, p.dims);
        const int64_t n = esp_tensor_count(&view);
        memcpy(set ? p.data : (void *)values, set ? (const void *)values : p.data, (size_t)n * sizeof *values);
        values += n;
    }
}

static adapter *find(adapter *list, const char *name) {
    for (int i = 0; i < MOST_ADAPTERS; i++)
        if (strcmp(list[i].name, name) == 0) return &list[i];
    return NULL;
}

/* What a request asks for, and what came of it. */
typedef struct completion {
    int32_t prompt[LONGEST], n_prompt, stop_ids[16], n_stop_ids, n, max_tokens;
    double temperature;
    uint64_t seed;
    int32_t tokens[MOST_ROWS * LONGEST], lengths[MOST_ROWS];
    float logprobs[MOST_ROWS * LONGEST];
    uint8_t stopped[MOST_ROWS], *routes[MOST_ROWS];
} completion;

typedef struct recorder {
    uint8_t *out;
    int64_t rows, layers, top_k;
} recorder;

static void record_routes(void *user, const char *name, int64_t layer, const esp_tensor *tensor) {
    recorder *r = user;
    if (strcmp(name, "topk_idx") != 0) return;
    const int32_t *ids = tensor->data;
    for (int64_t t = 0; t < r->rows; t++)
        for (int64_t k = 0; k < r->top_k; k++) r->out[(t * r->layers + layer) * r->top_k + k] = (uint8_t)ids[t * r->top_k + k];
}

/* Of one row: a forward over the whole of it gives the log-probabilities without the temperature, and the routes. */
static esp_status look_again(completion *c, int32_t row) {
    int32_t tokens[2 * LONGEST];
    float lp[2 * LONGEST];
    const int32_t n = c->n_prompt + c->lengths[row], cu[2] = {0, n};
    memcpy(tokens, c->prompt, (size_t)c->n_prompt * sizeof *tokens);
    memcpy(tokens + c->n_prompt, c->tokens + (size_t)row * c->max_tokens, (size_t)c->lengths[row] * sizeof *tokens);
    const esp_batch batch = ESP_BATCH(.tokens = tokens, .cu_seqlens = cu, .n_tokens = n, .n_seqs = 1);
    recorder r = {.rows = n - 1, .layers = mock.info.layers, .top_k = mock.info.top_k};
    r.out = calloc((size_t)(n * r.layers * r.top_k), 1);
    c->routes[row] = r.out;
    esp_tensor hidden;
    esp_model_set_probe(mock.model, record_routes, &r);
    esp_status status = esp_model_forward_only(mock.model, &batch, &hidden);
    esp_model_set_probe(mock.model, NULL, NULL);
    if (status == ESP_OK && !mock.processed) {
        status = esp_model_logprob(mock.model, &batch, &hidden, 1.0f, lp, NULL);
        memcpy(c->logprobs + (size_t)row * c->max_tokens, lp + c->n_prompt, (size_t)c->lengths[row] * sizeof *lp);
    }
    return status;
}

static esp_status generate(completion *c, const adapter *a) {
    const int32_t cu[2] = {0, c->n_prompt};
    const uint32_t key = 0;
    const esp_generate_config g = ESP_GENERATE_CONFIG(.prompts = c->prompt, .cu_prompts = cu, .n_prompts = 1, .samples = c->n,
                                                      .max_new_tokens = c->max_tokens, .temperature = (float)c->temperature,
                                                      .stop_ids = c->stop_ids, .n_stop_ids = c->n_stop_ids, .seed = c->seed, .keys = &key);
    esp_model_adapter_enable(mock.model, a && !mock.deaf);
    if (a) each_parameter(a->values, true);
    esp_status status = esp_sampler_generate(mock.sampler, &g, c->tokens, c->logprobs, c->lengths, c->stopped);
    for (int32_t row = 0; row < c->n && status == ESP_OK && (mock.routes || !mock.processed); row++) status = look_again(c, row);
    return status;
}

/* ---- answers ---- */

typedef struct answer {
    unsigned code;
    char *body; /* NULL: the connection is dropped */
    size_t bytes;
    bool cut;
} answer;

static answer text(unsigned code, const char *body) {
    return (answer){.code = code, .body = strdup(body), .bytes = strlen(body)};
}

static answer failure(unsigned code, const char *message) {
    json_t *root =
        json_pack("{s:{s:s, s:s, s:n, s:i}}", "error", "message", message, "type", "BadRequestError", "param", "code", (int)code);
    char *body = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return (answer){.code = code, .body = body, .bytes = strlen(body)};
}

static answer object(json_t *root) {
    char *body = json_dumps(root, JSON_COMPACT);
    json_decref(root);
    return (answer){.code = 200, .body = body, .bytes = strlen(body)};
}

static char *base64(const uint8_t *data, size_t n) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *out = calloc(1, (n + 2) / 3 * 4 + 1);
    for (size_t i = 0, at = 0; i < n; i += 3) {
        const uint32_t left = (uint32_t)(n - i),
                       word = (uint32_t)data[i] << 16 | (left > 1 ? (uint32_t)data[i + 1] << 8 : 0) | (left > 2 ? data[i + 2] : 0u);
        out[at++] = letters[word >> 18];
        out[at++] = letters[word >> 12 & 63];
        out[at++] = left > 1 ? letters[word >> 6 & 63] : '=';
        out[at++] = left > 2 ? letters[word & 63] : '=';
    }
    return out;
}

/* Routes of a row as numpy saves them: u1 (rows, layers, top_k). */
static json_t *routes_json(const completion *c, int32_t row, kind kind) {
    const long long rows = c->n_prompt + c->lengths[row] - 1 - (kind == SHORT_ROUTES);
    const size_t header = 128, bytes = (size_t)(rows * mock.info.layers * mock.info.top_k);
    uint8_t *file = calloc(1, header + bytes);
    memcpy(file, "\x93NUMPY\x01\x00", 8);
    file[8] = (uint8_t)(header - 10);
    memset(file + 10, ' ', header - 11);
    file[header - 1] = '\n';
    char dict[112];
    const int n = snprintf(dict, sizeof dict, "{'descr': '|u1', 'fortran_order': False, 'shape': (%lld, %lld, %lld), }", rows,
                           (long long)mock.info.layers, (long long)mock.info.top_k);
    memcpy(file + 10, dict, (size_t)n);
    memcpy(file + header, c->routes[row], bytes);
    if (kind == BAD_ROUTE) file[header + bytes / 2] = (uint8_t)mock.info.experts;
    char *coded = base64(file, header + bytes - (kind == TORN_ROUTES ? 5 : 0));
    json_t *out = json_string(coded);
    free(coded);
    free(file);
    return out;
}

static json_t *choice_json(const completion *c, int32_t row, kind kind) {
    json_t *ids = json_array(), *lps = json_array(), *prompt = json_array();
    const int32_t n = kind == NO_TOKENS ? 0 : c->lengths[row];
    for (int32_t i = 0; i < n; i++) {
        json_array_append_new(ids,
                              json_integer(kind == BAD_ID && i == n - 1 ? mock.info.vocab : c->tokens[(size_t)row * c->max_tokens + i]));
        if (kind == SHORT_LOGPROBS && i == n - 1) break;
        if (kind == NULL_LOGPROB && i == 0)
            json_array_append_new(lps, json_null());
        else
            json_array_append_new(
                lps, json_real(kind == POSITIVE_LOGPROB && i == 0 ? 0.25 : (double)c->logprobs[(size_t)row * c->max_tokens + i]));
    }
    for (int32_t i = n; kind == TOO_LONG && i <= c->max_tokens; i++) {
        json_array_append_new(ids, json_integer(3));
        json_array_append_new(lps, json_real(-1));
    }
    for (int32_t i = 0; i < c->n_prompt; i++) json_array_append_new(prompt, json_integer(c->prompt[i] + (kind == WRONG_PROMPT && i == 0)));
    const bool stopped = (c->stopped[row] != 0) != (kind == WRONG_FINISH);
    const char *finish = kind == ABORTED ? "abort" : stopped ? "stop" : "length";
    if (kind == WRONG_FINISH && !stopped && n == c->max_tokens) finish = "content_filter"; /* both would be right there */
    json_t *choice = json_pack("{s:i, s:s, s:{s:o}, s:s, s:o, s:o}", "index", kind == TWICE_CHOICE ? 0 : row, "text", "", "logprobs",
                               "token_logprobs", lps, "finish_reason", finish, "token_ids", ids, "prompt_token_ids", prompt);
    if (kind == MISSING_IDS) json_object_del(choice, "token_ids");
    if (kind == MISSING_LOGPROBS) json_object_set_new(choice, "logprobs", json_null());
    if (mock.routes) json_object_set_new(choice, "routed_experts", routes_json(c, row, kind));
    return choice;
}

static answer completion_answer(const completion *c, const char *model, const char *id, kind kind) {
    json_t *choices = json_array();
    for (int32_t row = 0; row < c->n; row++)
        if (kind != FEW_CHOICES || row + 1 < c->n) json_array_append_new(choices, choice_json(c, row, kind));
    if (kind == MANY_CHOICES) json_array_append_new(choices, choice_json(c, 0, kind));
    json_t *name = json_sprintf("cmpl-%s", id ? id : "none");
    answer a = object(json_pack("{s:o, s:s, s:i, s:s, s:o}", "id", name, "object", "text_completion", "created", 0, "model",
                                kind == WRONG_MODEL ? "another" : model, "choices", choices));
    if (kind == TRUNCATED) a.bytes /= 2;
    if (kind == EMPTY) a.bytes = 0;
    if (kind == NOT_JSON) {
        free(a.body);
        a = text(200, "<html><body>502 from a proxy that says 200</body></html>");
    }
    return a;
}

/* ---- requests ---- */

typedef struct request {
    char *body;
    size_t used;
} request;

/* Everything that a server would otherwise take from its own defaults. */
static const char *missing_or_other(const json_t *root) {
    static const struct {
        const char *name;
        double value;
    } plain[] = {{"top_p", 1},      {"min_p", 0},   {"repetition_penalty", 1}, {"presence_penalty", 0}, {"frequency_penalty", 0},
                 {"min_tokens", 0}, {"logprobs", 0}};
    static const char *const numbers[] = {"n", "max_tokens", "temperature", "top_k", "seed"};
    for (size_t i = 0; i < sizeof plain / sizeof *plain; i++) {
        const json_t *value = json_object_get(root, plain[i].name);
        if (!json_is_number(value) || json_number_value(value) != plain[i].value) return plain[i].name;
    }
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!json_is_number(json_object_get(root, numbers[i]))) return numbers[i];
    const json_int_t top_k = json_integer_value(json_object_get(root, "top_k"));
    if (top_k != -1) return "top_k";
    if (!json_is_true(json_object_get(root, "ignore_eos"))) return "ignore_eos";
    if (!json_is_true(json_object_get(root, "return_token_ids"))) return "return_token_ids";
    if (!json_is_false(json_object_get(root, "add_special_tokens"))) return "add_special_tokens";
    if (!json_is_array(json_object_get(root, "stop_token_ids"))) return "stop_token_ids";
    if (!json_is_array(json_object_get(root, "prompt"))) return "prompt";
    return NULL;
}

static bool read_ids(int32_t *out, int32_t *n, int32_t most, const json_t *list) {
    *n = (int32_t)json_array_size(list);
    for (int32_t i = 0; i < *n && i < most; i++) out[i] = (int32_t)json_integer_value(json_array_get(list, (size_t)i));
    return *n <= most;
}

static answer complete(const json_t *root, const char *id, kind kind) {
    static completion c; /* under the lock, and large */
    const char *model = json_string_value(json_object_get(root, "model"));
    char message[512];
    const char *wrong = missing_or_other(root);
    if (wrong) {
        snprintf(message, sizeof message, "%s: missing, or not what a request of training says", wrong);
        return failure(400, message);
    }
    if (!model || (strcmp(model, BASE) != 0 && (!*model || !find(mock.adapters, model)))) {
        snprintf(message, sizeof message, "The model `%s` does not exist.", model ? model : "");
        return failure(404, message);
    }
    adapter *a = strcmp(model, BASE) ? find(mock.adapters, model) : NULL;
    for (int i = 0; a && kind == OLDER_MODEL && i < MOST_ADAPTERS; i++)
        if (mock.adapters[i].name[0] && mock.adapters[i].number < a->number) a = &mock.adapters[i];
    if (a) model = a->name;
    memset(&c, 0, sizeof c);
    c.n = (int32_t)json_integer_value(json_object_get(root, "n"));
    c.max_tokens = (int32_t)json_integer_value(json_object_get(root, "max_tokens"));
    c.temperature = json_number_value(json_object_get(root, "temperature"));
    c.seed = (uint64_t)json_integer_value(json_object_get(root, "seed"));
    if (!read_ids(c.prompt, &c.n_prompt, LONGEST, json_object_get(root, "prompt")) ||
        !read_ids(c.stop_ids, &c.n_stop_ids, 16, json_object_get(root, "stop_token_ids")) || c.n < 1 || c.n > MOST_ROWS ||
        c.max_tokens < 1 || c.n_prompt + c.max_tokens > mock.context) {
        snprintf(message, sizeof message, "This model's maximum context length is %lld tokens", (long long)mock.context);
        return failure(400, message);
    }
    if (id == NULL) mock.without_id++;
    for (int64_t i = 0; id && i < mock.n_ids; i++)
        if (strcmp(mock.ids[i], id) == 0) {
            mock.ids_twice++;
            break;
        }
    if (id && mock.n_ids < MOST_IDS) mock.ids[mock.n_ids++] = strdup(id);
    if (generate(&c, a) != ESP_OK) return failure(500, esp_last_error());
    answer out = completion_answer(&c, model, id, kind);
    for (int32_t row = 0; row < c.n; row++) free(c.routes[row]);
    mock.answered++;
    return out;
}

static answer load(const json_t *root, const char *id, kind kind) {
    (void)id, (void)kind;
    const char *name = json_string_value(json_object_get(root, "lora_name")), *path = json_string_value(json_object_get(root, "lora_path"));
    char message[768];
    if (!mock.lora) return failure(404, "Not Found");
    if (!name || !path || !*name) return failure(400, "Both 'lora_name' and 'lora_path' must be provided.");
    adapter *a = find(mock.adapters, name);
    if (a) {
        if (!json_is_true(json_object_get(root, "load_inplace"))) {
            snprintf(message, sizeof message, "The lora adapter '%s' has already been loaded.", name);
            return failure(400, message);
        }
        mock.stale++;
        return text(200, "Success");
    }
    a = find(mock.adapters, "");
    if (!a) return failure(500, "no room for another adapter");
    esp_model_adapter_enable(mock.model, true);
    if (esp_model_load_adapter(mock.model, path) != ESP_OK) return failure(400, esp_last_error());
    a->values = malloc((size_t)mock.info.adapter_parameters * sizeof *a->values);
    each_parameter(a->values, false);
    const adapter *old = find(mock.left, name);
    if (old) {
        memcpy(a->values, old->values, (size_t)mock.info.adapter_parameters * sizeof *a->values);
        mock.stale++;
    }
    snprintf(a->name, sizeof a->name, "%s", name);
    snprintf(a->path, sizeof a->path, "%s", path);
    a->number = mock.loads++;
    int64_t loaded = 0;
    for (int i = 0; i < MOST_ADAPTERS; i++) loaded += mock.adapters[i].name[0] != '\0';
    if (loaded > mock.most_loaded) mock.most_loaded = loaded;
    return text(200, "Success");
}

static answer unload(const json_t *root, const char *id, kind kind) {
    (void)id, (void)kind;
    const char *name = json_string_value(json_object_get(root, "lora_name"));
    adapter *a = name && *name ? find(mock.adapters, name) : NULL;
    char message[256];
    if (!a) {
        snprintf(message, sizeof message, "The lora adapter '%s' cannot be found.", name ? name : "");
        return failure(404, message);
    }
    adapter *left = &mock.left[mock.n_left++ % MOST_ADAPTERS];
    free(left->values);
    *left = *a;
    *a = (adapter){0};
    mock.unloads++;
    return text(200, "Success");
}

/* As a server that was started again. */
static answer forget_adapters(void) {
    for (int i = 0; i < MOST_ADAPTERS; i++) {
        free(mock.adapters[i].values);
        free(mock.left[i].values);
        mock.adapters[i] = mock.left[i] = (adapter){0};
    }
    return text(200, "forgotten");
}

static answer list_models(void) {
    json_t *data = json_array();
    json_array_append_new(data, json_pack("{s:s, s:s, s:I, s:s, s:n}", "id", BASE, "object", "model", "max_model_len",
                                          (json_int_t)mock.context, "root", BASE, "parent"));
    for (int i = 0; i < MOST_ADAPTERS; i++)
        if (mock.adapters[i].name[0])
            json_array_append_new(data, json_pack("{s:s, s:s, s:s, s:s}", "id", mock.adapters[i].name, "object", "model", "root",
                                                  mock.adapters[i].path, "parent", BASE));
    return object(json_pack("{s:s, s:o}", "object", "list", "data", data));
}

static answer stats(void) {
    json_t *root = json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "completions", (json_int_t)mock.completions, "answered",
                             (json_int_t)mock.answered, "loads", (json_int_t)mock.loads, "unloads", (json_int_t)mock.unloads, "most_loaded",
                             (json_int_t)mock.most_loaded, "stale", (json_int_t)mock.stale, "ids_twice", (json_int_t)mock.ids_twice,
                             "without_id", (json_int_t)mock.without_id);
    for (int k = NONE + 1; k < KINDS; k++) json_object_set_new(root, kinds[k].name, json_integer(mock.done[k]));
    return object(root);
}

static kind kind_of(const json_t *name) {
    for (int k = 0; k < KINDS && json_is_string(name); k++)
        if (strcmp(kinds[k].name, json_string_value(name)) == 0) return (kind)k;
    return KINDS;
}

static answer misbehave(const json_t *root) {
    const kind kind = kind_of(json_object_get(root, "kind"));
    const json_int_t count = json_integer_value(json_object_get(root, "count"));
    if (kind == KINDS || mock.n_planned + count > MOST_PLANNED) return failure(400, "no such kind, or too many");
    for (json_int_t i = 0; i < count; i++)
        mock.planned[mock.n_planned++] = (planned){kind, json_number_value(json_object_get(root, "seconds"))};
    return text(200, "planned");
}

static answer misbehave_at_random(const json_t *root) {
    const json_t *list = json_object_get(root, "kinds");
    mock.rate = json_number_value(json_object_get(root, "rate"));
    mock.seed = (uint64_t)json_integer_value(json_object_get(root, "seed"));
    memset(mock.among, 0, sizeof mock.among);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const kind kind = kind_of(json_array_get(list, i));
        if (kind == KINDS) return failure(400, "no such kind");
        mock.among[kind] = true;
    }
    return text(200, "planned");
}

/* What goes wrong with this request. */
static planned choose(int fits) {
    for (int i = 0; i < mock.n_planned; i++) {
        if (!(kinds[mock.planned[i].kind].fits & fits)) continue;
        const planned one = mock.planned[i];
        memmove(mock.planned + i, mock.planned + i + 1, (size_t)(--mock.n_planned - i) * sizeof one);
        return one;
    }
    const uint32_t draw = mock.draws++;
    if (!(espi_uniform(mock.seed, ESPI_STREAM_CONTROL, draw, 0, 0, 0) < mock.rate)) return (planned){NONE, 0};
    int n = 0, able[KINDS];
    for (int k = 0; k < KINDS; k++)
        if (mock.among[k] && (kinds[k].fits & fits)) able[n++] = k;
    return n ? (planned){(kind)able[(int)(espi_uniform(mock.seed, ESPI_STREAM_CONTROL, draw, 1, 0, 0) * n)], 0.02} : (planned){NONE, 0};
}

/* A request that something may go wrong with. */
static answer answer_or_not(const json_t *root, const char *id, answer (*done)(const json_t *root, const char *id, kind kind), int fits,
                            double *slow) {
    const planned p = choose(fits);
    mock.done[p.kind]++;
    *slow = p.kind == SLOW ? p.seconds : 0;
    if (p.kind == ERROR_500 || p.kind == ERROR_503) return failure(p.kind == ERROR_500 ? 500 : 503, "the engine is not well");
    if (p.kind == TOO_MANY || p.kind == REFUSED) return failure(p.kind == TOO_MANY ? 429 : 400, "the engine does not want this");
    if (p.kind == DROPPED) return (answer){0};
    answer out = done(root, id, p.kind);
    out.cut = p.kind == CUT;
    if (p.kind != DROPPED_AFTER) return out;
    free(out.body);
    return (answer){0};
}

/* What is posted, by its address. */
static answer post(const char *url, const json_t *root, const char *id, double *slow) {
    if (strcmp(url, "/mock/misbehave") == 0) return misbehave(root);
    if (strcmp(url, "/mock/random") == 0) return misbehave_at_random(root);
    if (strcmp(url, "/mock/forget") == 0) return forget_adapters();
    if (strcmp(url, "/v1/load_lora_adapter") == 0) return answer_or_not(root, id, load, ADAPTERS, slow);
    if (strcmp(url, "/v1/unload_lora_adapter") == 0) return answer_or_not(root, id, unload, ADAPTERS, slow);
    if (strcmp(url, "/v1/completions") != 0) return failure(404, "Not Found");
    mock.completions++;
    return answer_or_not(root, id, complete, COMPLETIONS, slow);
}

/* The answer; *slow: seconds to wait before it is sent. */
static answer serve(const char *method, const char *url, const request *r, const char *id, const char *authorization, double *slow) {
    static const char bearer[] = "Bearer ";
    if (mock.key && strncmp(url, "/v1/", 4) == 0 &&
        (!authorization || strncmp(authorization, bearer, strlen(bearer)) != 0 || strcmp(authorization + strlen(bearer), mock.key) != 0))
        return failure(401, "Unauthorized");
    const bool get = strcmp(method, "GET") == 0;
    if (get && strcmp(url, "/health") == 0) return text(200, "");
    if (get && strcmp(url, "/v1/models") == 0) return list_models();
    if (get && strcmp(url, "/mock/stats") == 0) return stats();
    if (get) return failure(404, "Not Found");
    json_error_t error;
    json_t *root = json_loadb(r->body ? r->body : "", r->used, 0, &error);
    const answer out = root ? post(url, root, id, slow) : failure(400, error.text);
    json_decref(root);
    return out;
}

/* Half of the body, then the connection ends. */
static ssize_t half(void *user, uint64_t at, char *buffer, size_t room) {
    const answer *a = user;
    const uint64_t end = a->bytes / 2;
    if (at >= end) return MHD_CONTENT_READER_END_WITH_ERROR;
    const size_t n = end - at < room ? (size_t)(end - at) : room;
    memcpy(buffer, a->body + at, n);
    return (ssize_t)n;
}

static void free_answer(void *user) {
    answer *a = user;
    free(a->body);
    free(a);
}

static enum MHD_Result send_answer(struct MHD_Connection *connection, answer a) {
    if (!a.code) return MHD_NO;
    struct MHD_Response *response;
    if (a.cut && a.bytes > 1) {
        answer *kept = malloc(sizeof *kept);
        *kept = a;
        response = MHD_create_response_from_callback(a.bytes, 4096, half, kept, free_answer);
    } else {
        response = MHD_create_response_from_buffer(a.bytes, a.body, MHD_RESPMEM_MUST_FREE);
    }
    MHD_add_response_header(response, "Content-Type", "application/json");
    const enum MHD_Result result = MHD_queue_response(connection, a.code, response);
    MHD_destroy_response(response);
    return result;
}

static enum MHD_Result handle(void *user, struct MHD_Connection *connection, const char *url, const char *method, const char *version,
                              const char *data, size_t *bytes, void **state) {
    (void)user, (void)version;
    request *r = *state;
    if (!r) {
        *state = calloc(1, sizeof *r);
        return *state ? MHD_YES : MHD_NO;
    }
    if (*bytes) {
        r->body = realloc(r->body, r->used + *bytes + 1);
        memcpy(r->body + r->used, data, *bytes);
        r->used += *bytes;
        *bytes = 0;
        return MHD_YES;
    }
    double slow = 0;
    pthread_mutex_lock(&mock.lock);
    const answer a = serve(method, url, r, MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "X-Request-Id"),
                           MHD_lookup_connection_value(connection, MHD_HEADER_KIND, "Authorization"), &slow);
    pthread_mutex_unlock(&mock.lock);
    if (slow > 0) nanosleep(&(struct timespec){(time_t)slow, (long)((slow - floor(slow)) * 1e9)}, NULL);
    return send_answer(connection, a);
}

static void forget(void *user, struct MHD_Connection *connection, void **state, enum MHD_RequestTerminationCode code) {
    (void)user, (void)connection, (void)code;
    request *r = *state;
    if (r) free(r->body);
    free(r);
}

static void open_model(const char *dir) {
    check(esp_ctx_create(&mock.ctx, &ESP_CTX_CONFIG(.threads = 1)), "context");
    check(esp_model_load(&mock.model, mock.ctx, dir, NULL), "model");
    mock.info = (esp_model_info)ESP_MODEL_INFO_INIT;
    check(esp_model_info_get(mock.model, &mock.info), "info");
    check(esp_sampler_create(&mock.sampler, mock.model, &ESP_SAMPLER_CONFIG(.max_sequences = MOST_ROWS, .max_length = LONGEST)), "sampler");
}

int main(int argc, char **argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: mock_server MODEL [--processed] [--routes] [--no-lora] [--deaf] [--context N] [--key K]\n");
        return 2;
    }
    for (int i = 2; i < argc; i++) {
        if (strcmp(argv[i], "--processed") == 0) mock.processed = true;
        if (strcmp(argv[i], "--routes") == 0) mock.routes = true;
        if (strcmp(argv[i], "--no-lora") == 0) mock.lora = false;
        if (strcmp(argv[i], "--deaf") == 0) mock.deaf = true; /* adapters are loaded, and the base answers */
        if (strcmp(argv[i], "--context") == 0 && i + 1 < argc) mock.context = atoi(argv[i + 1]);
        if (strcmp(argv[i], "--key") == 0 && i + 1 < argc) mock.key = argv[i + 1];
    }
    open_model(argv[1]);
    const struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct MHD_Daemon *daemon =
        MHD_start_daemon(MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_THREAD_PER_CONNECTION, 0, NULL, NULL, handle, NULL, MHD_OPTION_SOCK_ADDR,
                         (const struct sockaddr *)&address, MHD_OPTION_NOTIFY_COMPLETED, forget, NULL, MHD_OPTION_END);
    if (!daemon) {
        fprintf(stderr, "mock_server: no daemon\n");
        return 2;
    }
    printf("port %d\n", MHD_get_daemon_info(daemon, MHD_DAEMON_INFO_BIND_PORT)->port);
    fflush(stdout);
    for (char byte; read(STDIN_FILENO, &byte, 1) == 1;) continue;
    /* No orderly end: requests may be asleep. */
    _exit(0);
}
