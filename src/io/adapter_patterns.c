/* rank_pattern and alpha_pattern of an adapter_config.json: regular expressions on module names, as PEFT matches them. */
#define PCRE2_CODE_UNIT_WIDTH 8

#include "core/status.h"
#include "io/adapter.h"
#include "io/file.h"

#include <pcre2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct pattern {
    pcre2_code *code;
    double value;
} pattern;

struct espi_patterns {
    char path[ESPI_PATH_MAX];
    const char *key;
    size_t n;
    pattern list[];
};

static esp_status compile(pattern *out, const char *path, const char *key, const char *expression, const json_t *value) {
    static const char begin[] = "(.*\\.)?(", end[] = ")$";
    const size_t bytes = strlen(expression) + sizeof begin + sizeof end;
    char *whole = malloc(bytes);
    if (!whole) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: %s: no memory for %s", path, key, expression);
    snprintf(whole, bytes, "%s%s%s", begin, expression, end);
    int error;
    PCRE2_SIZE where;
    out->code = pcre2_compile((PCRE2_SPTR)whole, PCRE2_ZERO_TERMINATED, PCRE2_ANCHORED | PCRE2_UTF, &error, &where, NULL);
    out->value = json_number_value(value);
    free(whole);
    if (!out->code) {
        PCRE2_UCHAR why[128];
        pcre2_get_error_message(error, why, sizeof why);
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %s: got %s, expected a regular expression: %s", path, key, expression, (const char *)why);
    }
    if (!json_is_number(value) || !(out->value > 0))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %s of %s: got %g, expected a positive number", path, key, expression, out->value);
    return ESP_OK;
}

esp_status espi_patterns_read(espi_patterns **patterns, const json_t *root, const char *path, const char *key) {
    json_t *object = json_object_get(root, key);
    if (object && !json_is_null(object) && !json_is_object(object))
        return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %s: got no object, expected one of module names and numbers", path, key);
    const size_t n = json_object_size(object);
    espi_patterns *p = calloc(1, sizeof *p + n * sizeof *p->list);
    *patterns = p;
    if (!p) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: %s: no memory for %zu patterns", path, key, n);
    p->key = key;
    snprintf(p->path, sizeof p->path, "%s", path);
    const char *expression;
    json_t *value;
    json_object_foreach(object, expression, value) ESPI_TRY(compile(&p->list[p->n++], path, key, expression, value));
    return ESP_OK;
}

void espi_patterns_free(espi_patterns *patterns) {
    for (size_t i = 0; patterns && i < patterns->n; i++) pcre2_code_free(patterns->list[i].code);
    free(patterns);
}

bool espi_patterns_empty(const espi_patterns *patterns) {
    return patterns->n == 0;
}

esp_status espi_patterns_apply(double *value, const espi_patterns *patterns, const char *module) {
    for (size_t i = 0; i < patterns->n; i++) {
        pcre2_match_data *match = pcre2_match_data_create_from_pattern(patterns->list[i].code, NULL);
        if (!match) return ESPI_FAIL(ESP_ERR_MEMORY, "%s: %s: no memory to match %s", patterns->path, patterns->key, module);
        const int found = pcre2_match(patterns->list[i].code, (PCRE2_SPTR)module, PCRE2_ZERO_TERMINATED, 0, 0, match, NULL);
        pcre2_match_data_free(match);
        if (found >= 0) {
            *value = patterns->list[i].value;
            return ESP_OK;
        }
        if (found != PCRE2_ERROR_NOMATCH)
            return ESPI_FAIL(ESP_ERR_FORMAT, "%s: %s: number %zu cannot be matched with %s (PCRE2 error %d), expected a simpler one",
                             patterns->path, patterns->key, i, module, found);
    }
    return ESP_OK;
}
