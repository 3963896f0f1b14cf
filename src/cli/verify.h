/* espalier verify: what its files share.  verify.c walks the folders, verify_report.c compares and counts; each other file knows one kind
 * of golden folder.  Every tensor is held as doubles, whatever its dtype: the folders are small. */
#ifndef ESPI_CLI_VERIFY_H
#define ESPI_CLI_VERIFY_H

#include "cli/cli.h"
#include "core/ctx.h"

#include <jansson.h>

typedef struct espi_array {
    char *name;
    int64_t dims[ESP_MAX_RANK];
    int rank;
    int64_t n;
    esp_dtype dtype; /* as the file had it */
    double *v;
} espi_array;

/* Named arrays: a file, or what a run produced. */
typedef struct espi_arrays {
    espi_array *items;
    int64_t n, capacity;
} espi_arrays;

/* Adds an array of n values, to be filled; the name is formatted. */
double *espi_arrays_add(espi_arrays *arrays, int64_t n, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* Copies n values of `dtype`. */
void espi_arrays_put(espi_arrays *arrays, const void *data, esp_dtype dtype, int64_t n, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
/* NULL when there is none. */
const espi_array *espi_arrays_find(const espi_arrays *arrays, const char *format, ...) __attribute__((format(printf, 2, 3)));
void espi_arrays_free(espi_arrays *arrays);
/* All tensors of a safetensors file. */
esp_status espi_arrays_read(espi_arrays *arrays, const char *path);

/* The values as another type; the caller frees. */
float *espi_array_f32(const espi_array *array);
uint8_t *espi_array_u8(const espi_array *array);

/* How an error is measured, and what it may be. */
typedef enum espi_rule {
    ESPI_RULE_FORWARD,  /* max|a-b| / max|b| */
    ESPI_RULE_GRADIENT, /* norm(a-b) / norm(b) */
    ESPI_RULE_EXACT     /* number of values that differ; 0 */
} espi_rule;

typedef struct espi_verify {
    esp_ctx *ctx;
    const char *tokenizer; /* --tokenizer, or NULL */
    const char *folder;    /* name in front of every line */
    bool clamped;          /* does the model clamp activations? */
    int64_t passed, failed, skipped;
} espi_verify;

/* The limit of a rule; reference: dtype of the reference values. */
double espi_verify_limit(const espi_verify *v, espi_rule rule, esp_dtype reference);
/* One line each, counted.  label: "" or "model_nf4/", in front of the name. */
void espi_verify_compare(espi_verify *v, const char *label, const char *name, espi_rule rule, double limit, const double *got,
                         const double *want, int64_t n);
/* The same for a count of what differs, which must be 0. */
void espi_verify_count(espi_verify *v, const char *name, int64_t different);
/* The same for a whole array; `got` NULL = it was not produced: a failure. */
void espi_verify_array(espi_verify *v, const char *label, espi_rule rule, const espi_array *got, const espi_array *want);
void espi_verify_skip(espi_verify *v, const char *name, const char *reason);
void espi_verify_fail(espi_verify *v, const char *name, const char *reason);
/* A failed library call, as a failed line. */
void espi_verify_error(espi_verify *v, const char *name, esp_status status);

bool espi_is_file(const char *dir, const char *name);
bool espi_is_folder(const char *dir, const char *name);
/* Reads DIR/NAME if it is there: true.  Otherwise a skipped line (not there) or a failed one (not readable). */
bool espi_verify_open(espi_verify *v, espi_arrays *arrays, const char *dir, const char *name);

/* DIR/report.json, or NULL when there is none; the caller drops it. */
json_t *espi_verify_report(const char *dir);

/* Working memory of an op, from the context: walk(dry arena) first, then walk(arena). */
typedef esp_status (*espi_walk)(void *user, espi_arena *arena);
esp_status espi_verify_walk(espi_verify *v, espi_walk walk, void *user);

/* How many 8-bit codes of block scales differ by more than the reference's search explains.  nested, offset: the reference's. */
int64_t espi_scale_codes_off(const float *scales, const uint8_t *got, const uint8_t *want, float offset, const float *nested, int64_t n);

/* One golden folder each. */
void espi_verify_model(espi_verify *v, const char *dir);
void espi_verify_grpo(espi_verify *v, const char *dir);
void espi_verify_optim(espi_verify *v, const char *dir);
void espi_verify_quant(espi_verify *v, const char *dir);
void espi_verify_tokenizer(espi_verify *v, const char *dir);

#endif
