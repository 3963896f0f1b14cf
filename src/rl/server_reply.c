/* Reads an answer of /v1/completions.  See server_reply.h. */
#include "rl/server_reply.h"

#include "core/status.h"
#include "rl/run.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NPY_MAGIC "\x93NUMPY"
#define NPY_HEADER_MAX 4096

void espi_reply_free(espi_reply *reply) {
    free(reply->model);
    free(reply->tokens);
    free(reply->lengths);
    free(reply->logprobs);
    free(reply->stopped);
    free(reply->routes);
    *reply = (espi_reply){0};
}

/* ---- routed experts: base64 of a .npy file (n_prompt + length - 1, layers, top_k) ---- */

static int base64_value(char c) {
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

/* out: NULL unless ESP_OK; free() it. */
static esp_status decode_base64(uint8_t **out, size_t *bytes, const char *text, size_t n) {
    *out = NULL;
    *bytes = 0;
    const size_t padding = n > 1 && text[n - 1] == '=' ? 1 + (text[n - 2] == '=') : 0;
    if (n % 4 != 0) return ESPI_FAIL(ESP_ERR_FORMAT, "routed_experts: %zu characters of base64, expected a multiple of 4", n);
    uint8_t *data = calloc(n / 4 * 3 + 1, 1);
    if (!data) return ESPI_FAIL(ESP_ERR_MEMORY, "no memory for %zu bytes of routed experts", n / 4 * 3);
    size_t used = 0;
    uint32_t word = 0;
    for (size_t i = 0; i < n; i++) {
        const int value = i >= n - padding ? 0 : base64_value(text[i]);
        if (value < 0) {
            free(data);
            return ESPI_FAIL(ESP_ERR_FORMAT, "routed_experts: character %zu is no base64", i);
        }
        word = word << 6 | (uint32_t)value;
        if (i % 4 != 3) continue;
        data[used++] = (uint8_t)(word >> 16);
        data[used++] = (uint8_t)(word >> 8);
        data[used++] = (uint8_t)word;
    }
    *out = data;
    *bytes = used - padding;
    return ESP_OK;
}

typedef struct npy {
    const uint8_t *data;
    size_t bytes;
    int width; /* of an element, in bytes */
    bool sign;
    long long dims[3];
} npy;

/* The text behind `key` in the dictionary of the header, blanks left out; NULL when it has none. */
static const char *npy_entry(const char *header, const char *key) {
    const char *at = strstr(header, key);
    if (!at) return NULL;
    at += strlen(key);
    return at + strspn(at, " :");
}

static esp_status read_npy(npy *out, const uint8_t *file, size_t bytes) {
    if (bytes < 12 || memcmp(file, NPY_MAGIC, sizeof NPY_MAGIC - 1) != 0 || file[6] < 1 || file[6] > 3)
        return ESPI_FAIL(ESP_ERR_FORMAT, "routed_experts: %zu bytes that are no .npy file of version 1 to 3", bytes);
    const size_t before = file[6] == 1 ? 10 : 12;
    size_t length = file[8] | (size_t)file[9] << 8;
    if (file[6] > 1) length |= (size_t)file[10] << 16 | (size_t)file[11] << 24;
    if (length > bytes - before || length >= NPY_HEADER_MAX)
        return ESPI_FAIL(ESP_ERR_FORMAT, "routed_experts: a .npy header of %zu bytes in a file of %zu", length, bytes);
    char header[NPY_HEADER_MAX];
    memcpy(header, file + before, length);
    header[length] = '\0';
    static const struct {
        const char *name;
        int width;
        bool sign;
    } types[] = {{"'|u1'", 1, false}, {"'<u2'", 2, false}, {"'<u4'", 4, false}, {"'|i1'", 1, true},
                 {"'<i2'", 2, true},  {"'<i4'", 4, true},  {"'<i8'", 8, true}};
    const char *descr = npy_entry(header, "'descr'"), *order = npy_entry(header, "'fortran_order'"), *shape = npy_entry(header, "'shape'");
    out->width = 0;
    for (int i = 0; i < ESPI_COUNT(types) && descr; i++) {
        if (strncmp(descr, types[i].name, strlen(types[i].name)) != 0) continue;
        out->width = types[i].width;
        out->sign = types[i].sign;
    }
    if (!out->width || !order || strncmp(order, "False", 5) != 0 || !shape ||
        sscanf(shape, "(%lld, %lld, %lld", &out->dims[0], &out->dims[1], &out->dims[2]) != 3)
        return ESPI_FAIL(ESP_ERR_FORMAT, "routed_experts: a .npy header \"%.120s\", expected integers of three dimensions in C order",
                         header);
    out->data = file + before + length;
    out->bytes = bytes - before - length;
    return ESP_OK;
}

static int64_t npy_id(const npy *a, size_t i) {
    const uint8_t *p = a->data + i * (size_t)a->width;
    uint64_t value = 0;
    for (int b = 0; b < a->width; b++) value |= (uint64_t)p[b] << (8 * b);
    const uint64_t top = (uint64_t)1 << (8 * a->width - 1);
    return a->sign && (value & top) ? (int64_t)(value - 2 * top) : (int64_t)value;
}

static void put_route(uint8_t *routes, size_t i, int32_t bytes, int64_t id) {
    routes[i * (size_t)bytes] = (uint8_t)id;
    if (bytes == 2) routes[i * 2 + 1] = (uint8_t)(id >> 8);
}

static esp_status copy_routes(espi_reply *reply, const npy *a, int32_t row, int32_t n, const espi_reply_want *want) {
    const espi_config *m = want->model;
    const int64_t rows = want->n_prompt + n - 1;
    if (a->dims[0] != rows || a->dims[1] != m->layers || a->dims[2] != m->top_k)
        return ESPI_FAIL(
            ESP_ERR_FORMAT,
            "choice %d: routed_experts have the shape (%lld, %lld, %lld), expected (%lld, %lld, %lld): every token but the last, "
            "every layer, every choice of an expert",
            row, a->dims[0], a->dims[1], a->dims[2], (long long)rows, (long long)m->layers, (long long)m->top_k);
    const size_t token = (size_t)(m->layers * m->top_k), need = (size_t)rows * token * (size_t)a->width;
    if (a->bytes != need) return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d: %zu bytes of routed_experts, expected %zu", row, a->bytes, need);
    uint8_t *to = reply->routes + (size_t)row * (size_t)(want->n_prompt + want->max_new_tokens) * token * (size_t)want->route_bytes;
    for (size_t i = 0; i < (size_t)rows * token; i++) {
        const size_t layer = i % token / (size_t)m->top_k, choice = i % (size_t)m->top_k;
        if (m->mlp_kind[layer] != ESPI_MLP_MOE) continue;
        const int64_t id = npy_id(a, i);
        bool twice = false;
        for (size_t k = 1; k <= choice; k++) twice |= npy_id(a, i - k) == id;
        if (id < 0 || id >= m->experts || twice)
            return ESPI_FAIL(
                ESP_ERR_FORMAT,
                "choice %d: routed_experts say expert %lld%s for token %zu in layer %zu, expected %lld different ones of 0 to %lld", row,
                (long long)id, twice ? " twice" : "", i / token, layer, (long long)m->top_k, (long long)m->experts - 1);
        put_route(to, i, want->route_bytes, id);
    }
    return ESP_OK;
}

/* n: tokens of the completion as the server sent it. */
static esp_status read_routes(espi_reply *reply, const json_t *choice, int32_t row, int32_t n, const espi_reply_want *want) {
    const json_t *text = json_object_get(choice, "routed_experts");
    if (!json_is_string(text))
        return ESPI_FAIL(ESP_ERR_UNSUPPORTED,
                         "choice %d has no routed_experts, expected a .npy file in base64: start the server with "
                         "--enable-return-routed-experts, or train without replaying routes (replay none)",
                         row);
    uint8_t *file;
    size_t bytes;
    npy array;
    ESPI_TRY(decode_base64(&file, &bytes, json_string_value(text), json_string_length(text)));
    esp_status status = read_npy(&array, file, bytes);
    if (status == ESP_OK) status = copy_routes(reply, &array, row, n, want);
    free(file);
    return status;
}

/* ---- one choice ---- */

static esp_status read_tokens(espi_reply *reply, const json_t *choice, int32_t row, const espi_reply_want *want) {
    const json_t *ids = json_object_get(choice, "token_ids");
    const json_t *logprobs = json_object_get(json_object_get(choice, "logprobs"), "token_logprobs");
    const size_t n = json_array_size(ids);
    if (!json_is_array(ids))
        return ESPI_FAIL(
            ESP_ERR_FORMAT,
            "choice %d has no token_ids, expected them (return_token_ids was asked for): the server must be vLLM 0.10.2 or newer, or "
            "do as it does",
            row);
    if (!json_is_array(logprobs)) return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d has no logprobs.token_logprobs, expected one a token", row);
    if (n < 1 || n > (size_t)want->max_new_tokens)
        return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d has %zu token_ids, expected 1 to %d (max_tokens)", row, n, want->max_new_tokens);
    if (json_array_size(logprobs) != n)
        return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d has %zu token_logprobs and %zu token_ids, expected as many", row,
                         json_array_size(logprobs), n);
    for (size_t i = 0; i < n; i++) {
        const size_t cell = (size_t)row * (size_t)want->max_new_tokens + i;
        const json_t *id = json_array_get(ids, i), *lp = json_array_get(logprobs, i);
        const json_int_t value = json_integer_value(id);
        if (!json_is_integer(id) || value < 0 || value >= want->model->vocab)
            return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d: token_ids[%zu] is %lld, expected 0 to %lld (the vocabulary)", row, i,
                             json_is_integer(id) ? (long long)value : -1LL, (long long)want->model->vocab - 1);
        const double p = json_is_number(lp) ? json_number_value(lp) : NAN;
        if (!(p <= 0) || !isfinite((float)p))
            return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d: token_logprobs[%zu] is %g, expected a finite number of at most 0", row, i, p);
        reply->tokens[cell] = (int32_t)value;
        reply->logprobs[cell] = (float)p;
    }
    reply->lengths[row] = (int32_t)n;
    return ESP_OK;
}

static esp_status read_finish(espi_reply *reply, const json_t *choice, int32_t row, const espi_reply_want *want) {
    const int32_t n = reply->lengths[row], *ids = reply->tokens + (size_t)row * (size_t)want->max_new_tokens;
    const char *reason = json_string_value(json_object_get(choice, "finish_reason"));
    const bool ended = ids[n - 1] == want->stop_id;
    if (!reason || (strcmp(reason, "stop") != 0 && strcmp(reason, "length") != 0))
        return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d: finish_reason is \"%s\", expected stop or length", row, reason ? reason : "(none)");
    for (int32_t i = 0; i < n - 1; i++)
        if (ids[i] == want->stop_id)
            return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d goes on behind the end token %d at its place %d of %d", row, want->stop_id, i, n);
    if (reason[0] == 's' && !ended)
        return ESPI_FAIL(
            ESP_ERR_FORMAT,
            "choice %d: finish_reason is stop and its last token is %d, expected the end token %d: other ends than the one asked "
            "for (generation_config.json of the server's model?) would not be rewarded as one",
            row, ids[n - 1], want->stop_id);
    if (reason[0] == 'l' && n != want->max_new_tokens)
        return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d: finish_reason is length and it has %d tokens, expected %d (max_tokens)", row, n,
                         want->max_new_tokens);
    reply->stopped[row] = ended;
    /* As our own sampler does: a row ends before a token that the model does not take. */
    for (int32_t i = 0; i < n; i++) {
        if (!espi_token_refused(want->model, ids[i])) continue;
        if (i == 0)
            return ESPI_FAIL(ESP_ERR_FORMAT, "choice %d begins with token %d, which stands for a picture, expected text", row, ids[0]);
        reply->lengths[row] = i;
        reply->stopped[row] = 0;
        break;
    }
    return ESP_OK;
}

/* Servers that say which prompt they answered must have answered this one. */
static esp_status check_prompt(const json_t *choice, int32_t row, const espi_reply_want *want) {
    const json_t *ids = json_object_get(choice, "prompt_token_ids");
    if (!json_is_array(ids)) return ESP_OK;
    bool same = json_array_size(ids) == (size_t)want->n_prompt;
    for (int32_t i = 0; same && i < want->n_prompt; i++) same = json_integer_value(json_array_get(ids, (size_t)i)) == want->prompt[i];
    return same ? ESP_OK
                : ESPI_FAIL(ESP_ERR_FORMAT,
                            "choice %d: prompt_token_ids are %zu others than the %d that were sent: the server cut or changed the prompt",
                            row, json_array_size(ids), want->n_prompt);
}

static esp_status read_choice(espi_reply *reply, const json_t *choice, const espi_reply_want *want, bool *seen) {
    const json_t *index = json_object_get(choice, "index");
    const json_int_t row = json_integer_value(index);
    if (!json_is_integer(index) || row < 0 || row >= want->samples)
        return ESPI_FAIL(ESP_ERR_FORMAT, "a choice has the index %lld, expected 0 to %d", json_is_integer(index) ? (long long)row : -1LL,
                         want->samples - 1);
    if (seen[row]) return ESPI_FAIL(ESP_ERR_FORMAT, "two choices have the index %d, expected each once", (int)row);
    seen[row] = true;
    ESPI_TRY(check_prompt(choice, (int32_t)row, want));
    ESPI_TRY(read_tokens(reply, choice, (int32_t)row, want));
    const int32_t sent = reply->lengths[row]; /* the end may leave fewer */
    ESPI_TRY(read_finish(reply, choice, (int32_t)row, want));
    return want->route_bytes ? read_routes(reply, choice, (int32_t)row, sent, want) : ESP_OK;
}

/* ---- the answer ---- */

static esp_status take(espi_reply *reply, const espi_reply_want *want) {
    const int64_t cells = (int64_t)want->samples * want->max_new_tokens;
    ESPI_TRY(espi_take_array(&reply->tokens, cells, sizeof *reply->tokens));
    ESPI_TRY(espi_take_array(&reply->logprobs, cells, sizeof *reply->logprobs));
    ESPI_TRY(espi_take_array(&reply->lengths, want->samples, sizeof *reply->lengths));
    ESPI_TRY(espi_take_array(&reply->stopped, want->samples, sizeof *reply->stopped));
    if (!want->route_bytes) return ESP_OK;
    const int64_t n =
        (int64_t)want->samples * (want->n_prompt + want->max_new_tokens) * want->model->layers * want->model->top_k * want->route_bytes;
    ESPI_TRY(espi_take_array(&reply->routes, n, 1));
    memset(reply->routes, 0xFF, (size_t)n);
    return ESP_OK;
}

static esp_status read_root(espi_reply *reply, const json_t *root, const espi_reply_want *want) {
    const json_t *choices = json_object_get(root, "choices");
    const char *model = json_string_value(json_object_get(root, "model"));
    bool *seen = NULL;
    if (!json_is_array(choices) || json_array_size(choices) != (size_t)want->samples)
        return ESPI_FAIL(ESP_ERR_FORMAT, "an answer with %zu choices, expected %d", json_array_size(choices), want->samples);
    if (!model) return ESPI_FAIL(ESP_ERR_FORMAT, "an answer that names no model, expected the one that wrote it");
    ESPI_TRY(take(reply, want));
    ESPI_TRY(espi_copy_text(&reply->model, model));
    ESPI_TRY(espi_take_array(&seen, want->samples, sizeof *seen));
    esp_status status = ESP_OK;
    for (int32_t i = 0; i < want->samples && status == ESP_OK; i++)
        status = read_choice(reply, json_array_get(choices, (size_t)i), want, seen);
    free(seen);
    reply->offers_routes = json_is_string(json_object_get(json_array_get(choices, 0), "routed_experts"));
    return status;
}

esp_status espi_reply_read(espi_reply *reply, const char *body, size_t bytes, const espi_reply_want *want) {
    json_error_t error;
    *reply = (espi_reply){0};
    json_t *root = json_loadb(body, bytes, JSON_REJECT_DUPLICATES, &error);
    if (!root) return ESPI_FAIL(ESP_ERR_FORMAT, "an answer of %zu bytes that is no JSON: %s at byte %d", bytes, error.text, error.position);
    const esp_status status = read_root(reply, root, want);
    json_decref(root);
    if (status != ESP_OK) espi_reply_free(reply);
    return status;
}
