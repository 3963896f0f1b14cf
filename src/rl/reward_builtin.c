/* Built-in rewards with parameters: regex, number, json, length, repetition, overlong.  What each gives: espalier/reward.h. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "rl/reward.h"

#include <ctype.h>
#include <jansson.h>
#include <limits.h>
#include <math.h>
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

#define LARGEST 1e9
#define MATCH_LIMIT 1000000 /* steps of a match: an unlucky pattern gives up in about 10 ms instead of never */

typedef struct regex {
    espi_reward_head head;
    pcre2_code *code;
    pcre2_match_context *limits;
    int group; /* number of the group "answer", 0 = none */
} regex;

static void close_regex(void *user) {
    regex *r = user;
    pcre2_match_context_free(r->limits);
    pcre2_code_free(r->code);
    free(r);
}

/* 1, 0, or NaN when the match was given up. */
static float score_regex_one(const regex *r, pcre2_match_data *data, const char *text, const char *answer) {
    const int found = pcre2_match(r->code, (PCRE2_SPTR)text, strlen(text), 0, 0, data, r->limits);
    if (found == PCRE2_ERROR_NOMATCH) return 0;
    if (found < 0) return NAN;
    if (!r->group) return 1;
    const PCRE2_SIZE *ends = pcre2_get_ovector_pointer(data) + 2 * r->group;
    if (ends[0] == PCRE2_UNSET || ends[1] < ends[0]) return 0;
    const size_t length = ends[1] - ends[0];
    return length == strlen(answer) && memcmp(text + ends[0], answer, length) == 0;
}

static int score_regex(void *user, const esp_reward_batch *batch, float *reward) {
    const regex *r = user;
    pcre2_match_data *data = pcre2_match_data_create_from_pattern(r->code, NULL);
    if (!data) return esp_reward_fail(batch, "no memory for a match");
    double given_up = 0;
    for (int64_t i = 0; i < batch->n; i++) {
        reward[i] = score_regex_one(r, data, batch->completion[i], batch->answer[i]);
        given_up += isnan(reward[i]) ? 1 : 0;
    }
    pcre2_match_data_free(data);
    espi_reward_count(batch, "given_up", given_up);
    return 0;
}

esp_status espi_reward_open_regex(esp_reward *reward, const espi_reward_description *d) {
    int error;
    PCRE2_SIZE at;
    ESPI_TRY(espi_reward_numbers(d, NULL, 0));
    ESPI_TRY(espi_reward_take(reward, d, sizeof(regex), score_regex));
    reward->close = close_regex;
    regex *r = reward->user;
    r->code = pcre2_compile((PCRE2_SPTR)d->argument, PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_MATCH_INVALID_UTF, &error, &at, NULL);
    if (!r->code) {
        PCRE2_UCHAR why[128] = "";
        pcre2_get_error_message(error, why, sizeof why);
        return ESPI_FAIL(ESP_ERR_ARG, "reward regex: \"%.80s\": %s at byte %zu, expected a PCRE2 pattern", d->argument, (const char *)why,
                         (size_t)at);
    }
    r->limits = pcre2_match_context_create(NULL);
    if (!r->limits) return ESPI_FAIL(ESP_ERR_MEMORY, "reward regex: no memory for its limits");
    pcre2_set_match_limit(r->limits, MATCH_LIMIT);
    const int group = pcre2_substring_number_from_name(r->code, (PCRE2_SPTR) "answer");
    r->group = group > 0 ? group : 0;
    return ESP_OK;
}

typedef struct number {
    espi_reward_head head;
    double tolerance, anywhere;
} number;

/* "-1,234.50e3" at the start of the text: its value and how many bytes it has, 0 = none. */
static size_t read_number(double *value, const char *text) {
    char plain[64];
    size_t used = 0, at = 0;
    if (text[at] == '-' || text[at] == '+') plain[used++] = text[at++];
    const size_t first = at;
    while (used + 8 < sizeof plain) {
        const bool comma = text[at] == ',' && at > first && isdigit((unsigned char)text[at + 1]) && isdigit((unsigned char)text[at + 2]) &&
                           isdigit((unsigned char)text[at + 3]) && !isdigit((unsigned char)text[at + 4]);
        if (comma) at++;
        if (!isdigit((unsigned char)text[at])) break;
        plain[used++] = text[at++];
    }
    const bool whole = at > first;
    if (text[at] == '.' && isdigit((unsigned char)text[at + 1])) {
        plain[used++] = text[at++];
        while (used + 6 < sizeof plain && isdigit((unsigned char)text[at])) plain[used++] = text[at++];
    } else if (!whole) {
        return 0;
    }
    if (isdigit((unsigned char)text[at])) return 0; /* longer than any number that a double tells from its neighbours */
    const size_t sign = text[at] == 'e' || text[at] == 'E' ? at + 1 + (text[at + 1] == '-' || text[at + 1] == '+') : 0;
    if (sign && isdigit((unsigned char)text[sign])) {
        while (at < sign) plain[used++] = text[at++];
        for (int digits = 0; digits < 3 && isdigit((unsigned char)text[at]); digits++) plain[used++] = text[at++];
    }
    plain[used] = '\0';
    *value = strtod(plain, NULL);
    return isfinite(*value) ? at : 0;
}

/* The number behind the last marker that has one. */
static bool marked_number(double *value, const char *text) {
    static const char *const markers[] = {"answer is", "####", "\\boxed{"};
    bool found = false;
    for (const char *p = text; *p; p++)
        for (int m = 0; m < ESPI_COUNT(markers); m++) {
            if (strncasecmp(p, markers[m], strlen(markers[m])) != 0) continue;
            const char *q = p + strlen(markers[m]);
            q += strspn(q, " \t\n:=$*(");
            double read;
            if (read_number(&read, q) == 0) continue;
            *value = read;
            found = true;
        }
    return found;
}

static bool last_number(double *value, const char *text) {
    bool found = false;
    for (size_t n; *text; text += n ? n : 1) {
        double read;
        n = read_number(&read, text);
        if (n > 0) *value = read;
        found = found || n > 0;
    }
    return found;
}

static int score_number(void *user, const esp_reward_batch *batch, float *reward) {
    const number *r = user;
    for (int64_t i = 0; i < batch->n; i++) {
        double want, got;
        const char *text = batch->completion[i];
        if (!marked_number(&want, batch->answer[i]) && !last_number(&want, batch->answer[i])) {
            reward[i] = NAN;
            continue;
        }
        const bool found = marked_number(&got, text) || (r->anywhere > 0 && last_number(&got, text));
        reward[i] = found && fabs(got - want) <= r->tolerance;
    }
    return 0;
}

esp_status espi_reward_open_number(esp_reward *reward, const espi_reward_description *d) {
    double tolerance = 0, anywhere = 0;
    const espi_reward_number numbers[] = {{"tolerance", &tolerance, 0, LARGEST, false}, {"anywhere", &anywhere, 0, 1, true}};
    ESPI_TRY(espi_reward_numbers(d, numbers, ESPI_COUNT(numbers)));
    ESPI_TRY(espi_reward_take(reward, d, sizeof(number), score_number));
    number *r = reward->user;
    r->tolerance = tolerance;
    r->anywhere = anywhere;
    return ESP_OK;
}

typedef struct json_kind {
    const char *name;
    unsigned types; /* bit i: json_type i is one */
} json_kind;

static const json_kind json_kinds[] = {{"string", 1u << JSON_STRING},   {"number", 1u << JSON_INTEGER | 1u << JSON_REAL},
                                       {"integer", 1u << JSON_INTEGER}, {"boolean", 1u << JSON_TRUE | 1u << JSON_FALSE},
                                       {"array", 1u << JSON_ARRAY},     {"object", 1u << JSON_OBJECT},
                                       {"null", 1u << JSON_NULL},       {"any", UINT_MAX}};

static const json_kind *find_kind(const json_t *name) {
    for (int i = 0; i < ESPI_COUNT(json_kinds); i++)
        if (json_is_string(name) && strcmp(json_string_value(name), json_kinds[i].name) == 0) return &json_kinds[i];
    return NULL;
}

typedef struct shape {
    espi_reward_head head;
    json_t *keys, *optional; /* objects: key -> name of its type */
} shape;

static void close_shape(void *user) {
    shape *r = user;
    json_decref(r->keys);
    json_decref(r->optional);
    free(r);
}

/* The text between ```json and ```, or all of it. */
static json_t *load_answer(const char *text) {
    static const char fence[] = "```";
    size_t length = strlen(text);
    const char *open = strstr(text, fence);
    if (open) {
        text = open + sizeof fence - 1;
        text += strcspn(text, "\n{");
        const char *close = strstr(text, fence);
        length = close ? (size_t)(close - text) : strlen(text);
    }
    return json_loadb(text, length, 0, NULL);
}

/* How many of the keys stand in the object with their type. */
static double fitting(json_t *keys, const json_t *object, bool optional) {
    const char *key;
    json_t *type;
    double right = 0;
    json_object_foreach(keys, key, type) {
        const json_t *value = json_object_get(object, key);
        right += value ? find_kind(type)->types >> json_typeof(value) & 1 : optional;
    }
    return right;
}

static float fit(const shape *r, const json_t *object) {
    if (!json_is_object(object)) return 0;
    const double keys = (double)(json_object_size(r->keys) + json_object_size(r->optional));
    return (float)((1 + fitting(r->keys, object, false) + fitting(r->optional, object, true)) / (1 + keys));
}

static int score_json(void *user, const esp_reward_batch *batch, float *reward) {
    for (int64_t i = 0; i < batch->n; i++) {
        json_t *object = load_answer(batch->completion[i]);
        reward[i] = fit(user, object);
        json_decref(object);
    }
    return 0;
}

/* Sorts the keys of a description by the ? at their end. */
static esp_status read_shape(shape *r, json_t *described, const char *text) {
    const char *key;
    json_t *type;
    r->keys = json_object();
    r->optional = json_object();
    if (!json_is_object(described))
        return ESPI_FAIL(ESP_ERR_ARG, "reward json: got %.80s, expected an object such as {\"name\":\"string\",\"age?\":\"integer\"}",
                         text);
    json_object_foreach(described, key, type) {
        char name[128];
        const size_t length = strlen(key), optional = length > 0 && key[length - 1] == '?';
        if (!find_kind(type) || length >= sizeof name)
            return ESPI_FAIL(ESP_ERR_ARG,
                             "reward json: key \"%.60s\": expected fewer than %zu bytes and as its type one of string, number, integer, "
                             "boolean, array, object, null, any",
                             key, sizeof name);
        memcpy(name, key, length - optional);
        name[length - optional] = '\0';
        if (json_object_set(optional ? r->optional : r->keys, name, type) != 0)
            return ESPI_FAIL(ESP_ERR_MEMORY, "reward json: no memory for its keys");
    }
    return ESP_OK;
}

esp_status espi_reward_open_json(esp_reward *reward, const espi_reward_description *d) {
    ESPI_TRY(espi_reward_numbers(d, NULL, 0));
    ESPI_TRY(espi_reward_take(reward, d, sizeof(shape), score_json));
    reward->close = close_shape;
    json_t *described = json_loads(d->argument, JSON_REJECT_DUPLICATES, NULL);
    const esp_status status = read_shape(reward->user, described, d->argument);
    json_decref(described);
    return status;
}

typedef struct length {
    espi_reward_head head;
    double target, width;
} length;

static int score_length(void *user, const esp_reward_batch *batch, float *reward) {
    const length *r = user;
    for (int64_t i = 0; i < batch->n; i++) reward[i] = (float)fmax(0, 1 - fabs(batch->completion_length[i] - r->target) / r->width);
    return 0;
}

esp_status espi_reward_open_length(esp_reward *reward, const espi_reward_description *d) {
    double target = 0, width = 0;
    const espi_reward_number numbers[] = {{"target", &target, 1, LARGEST, true}, {"width", &width, 1, LARGEST, true}};
    ESPI_TRY(espi_reward_numbers(d, numbers, ESPI_COUNT(numbers)));
    if (target == 0) return ESPI_FAIL(ESP_ERR_ARG, "reward length: got no target, expected length(target=TOKENS)");
    ESPI_TRY(espi_reward_take(reward, d, sizeof(length), score_length));
    length *r = reward->user;
    r->target = target;
    r->width = width > 0 ? width : target;
    return ESP_OK;
}

typedef struct repetition {
    espi_reward_head head;
    double n, max;
} repetition;

/* Tokens of one completion, for the order of its n-grams. */
typedef struct gram {
    const int32_t *ids;
    int32_t n;
} gram;

static int order_grams(const void *a, const void *b) {
    const gram *x = a, *y = b;
    for (int32_t i = 0; i < x->n; i++)
        if (x->ids[i] != y->ids[i]) return x->ids[i] < y->ids[i] ? -1 : 1;
    return 0;
}

static double share_repeated(gram *grams, const int32_t *ids, int32_t length, int32_t n) {
    const int32_t total = length - n + 1;
    int32_t again = 0;
    if (total < 2) return 0;
    for (int32_t i = 0; i < total; i++) grams[i] = (gram){ids + i, n};
    qsort(grams, (size_t)total, sizeof *grams, order_grams);
    for (int32_t i = 1; i < total; i++) again += order_grams(&grams[i - 1], &grams[i]) == 0;
    return (double)again / total;
}

static int score_repetition(void *user, const esp_reward_batch *batch, float *reward) {
    const repetition *r = user;
    int32_t longest = 0;
    for (int64_t i = 0; i < batch->n; i++)
        if (batch->completion_length[i] > longest) longest = batch->completion_length[i];
    gram *grams = calloc((size_t)longest + 1, sizeof *grams);
    if (!grams) return esp_reward_fail(batch, "no memory for the n-grams of a completion");
    for (int64_t i = 0; i < batch->n; i++)
        reward[i] = (float)(0 - r->max * share_repeated(grams, batch->completion_ids[i], batch->completion_length[i], (int32_t)r->n));
    free(grams);
    return 0;
}

esp_status espi_reward_open_repetition(esp_reward *reward, const espi_reward_description *d) {
    double n = 3, max = 1;
    const espi_reward_number numbers[] = {{"n", &n, 1, 1000, true}, {"max", &max, 0, LARGEST, false}};
    ESPI_TRY(espi_reward_numbers(d, numbers, ESPI_COUNT(numbers)));
    ESPI_TRY(espi_reward_take(reward, d, sizeof(repetition), score_repetition));
    repetition *r = reward->user;
    r->n = n;
    r->max = max;
    return ESP_OK;
}

typedef struct overlong {
    espi_reward_head head;
    double max, buffer;
} overlong;

double espi_overlong(int32_t length, double max, double buffer) {
    return fmin(1, fmax(0, (length - (max - buffer)) / buffer));
}

static int score_overlong(void *user, const esp_reward_batch *batch, float *reward) {
    const overlong *r = user;
    const double max = r->max > 0 ? r->max : batch->max_completion;
    if (!(max >= r->buffer))
        return esp_reward_fail(batch, "the limit of a completion is not known or below the buffer: give overlong a max=");
    for (int64_t i = 0; i < batch->n; i++) reward[i] = (float)(0 - espi_overlong(batch->completion_length[i], max, r->buffer));
    return 0;
}

esp_status espi_reward_open_overlong(esp_reward *reward, const espi_reward_description *d) {
    double max = 0, buffer = 0;
    const espi_reward_number numbers[] = {{"max", &max, 1, LARGEST, true}, {"buffer", &buffer, 1, LARGEST, true}};
    ESPI_TRY(espi_reward_numbers(d, numbers, ESPI_COUNT(numbers)));
    if (buffer == 0) return ESPI_FAIL(ESP_ERR_ARG, "reward overlong: got no buffer, expected overlong(buffer=TOKENS)");
    if (max > 0 && max < buffer)
        return ESPI_FAIL(ESP_ERR_ARG, "reward overlong: got max %g below buffer %g, expected a larger one", max, buffer);
    ESPI_TRY(espi_reward_take(reward, d, sizeof(overlong), score_overlong));
    overlong *r = reward->user;
    r->max = max;
    r->buffer = buffer;
    return ESP_OK;
}
