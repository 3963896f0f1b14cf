/* espalier verify: arrays by name, the comparer, and the lines of the report. */
#include "cli/verify.h"

#include "io/file.h"
#include "io/safetensors.h"
#include "kernels/plain.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static char *format_name(const char *format, va_list args) {
    va_list again;
    va_copy(again, args);
    int length = vsnprintf(NULL, 0, format, again);
    va_end(again);
    char *name = espi_cli_memory((size_t)length + 1);
    vsnprintf(name, (size_t)length + 1, format, args);
    return name;
}

static espi_array *append(espi_arrays *arrays, char *name, int64_t n) {
    if (arrays->n == arrays->capacity) {
        int64_t capacity = arrays->capacity ? 2 * arrays->capacity : 64;
        espi_array *items = espi_cli_memory((size_t)capacity * sizeof *items);
        if (arrays->n) memcpy(items, arrays->items, (size_t)arrays->n * sizeof *items);
        free(arrays->items);
        arrays->items = items;
        arrays->capacity = capacity;
    }
    espi_array *array = &arrays->items[arrays->n++];
    *array = (espi_array){.name = name, .dims = {n}, .rank = 1, .n = n, .dtype = ESP_F64, .v = espi_cli_memory((size_t)n * sizeof(double))};
    return array;
}

double *espi_arrays_add(espi_arrays *arrays, int64_t n, const char *format, ...) {
    va_list args;
    va_start(args, format);
    char *name = format_name(format, args);
    va_end(args);
    return append(arrays, name, n)->v;
}

static void widen(double *v, const void *data, esp_dtype dtype, int64_t n) {
    for (int64_t i = 0; i < n; i++) switch (dtype) {
        case ESP_F64:
            v[i] = ((const double *)data)[i];
            break;
        case ESP_I32:
            v[i] = ((const int32_t *)data)[i];
            break;
        case ESP_I64:
            v[i] = (double)((const int64_t *)data)[i];
            break;
        case ESP_U8:
        case ESP_BOOL:
            v[i] = ((const uint8_t *)data)[i];
            break;
        default:
            v[i] = espi_plain_value(data, dtype, i);
            break;
        }
}

void espi_arrays_put(espi_arrays *arrays, const void *data, esp_dtype dtype, int64_t n, const char *format, ...) {
    va_list args;
    va_start(args, format);
    char *name = format_name(format, args);
    va_end(args);
    espi_array *array = append(arrays, name, n);
    array->dtype = dtype;
    widen(array->v, data, dtype, n);
}

const espi_array *espi_arrays_find(const espi_arrays *arrays, const char *format, ...) {
    va_list args;
    va_start(args, format);
    char *name = format_name(format, args);
    va_end(args);
    const espi_array *found = NULL;
    for (int64_t i = 0; i < arrays->n && !found; i++)
        if (strcmp(arrays->items[i].name, name) == 0) found = &arrays->items[i];
    free(name);
    return found;
}

void espi_arrays_free(espi_arrays *arrays) {
    for (int64_t i = 0; i < arrays->n; i++) {
        free(arrays->items[i].name);
        free(arrays->items[i].v);
    }
    free(arrays->items);
    *arrays = (espi_arrays){0};
}

static esp_status read_tensor(espi_arrays *arrays, const espi_st_tensor *tensor) {
    size_t size = esp_dtype_size(tensor->dtype);
    if (size == 0) return ESPI_FAIL(ESP_ERR_DTYPE, "%s: dtype %s is not read here", tensor->name, tensor->dtype_name);
    void *data = espi_cli_memory(tensor->bytes);
    esp_status status = espi_st_read(tensor, data, 0, tensor->bytes);
    if (status == ESP_OK) {
        espi_arrays_put(arrays, data, tensor->dtype, (int64_t)(tensor->bytes / size), "%s", tensor->name);
        espi_array *array = &arrays->items[arrays->n - 1];
        array->rank = tensor->rank;
        memcpy(array->dims, tensor->dims, sizeof array->dims);
    }
    free(data);
    return status;
}

esp_status espi_arrays_read(espi_arrays *arrays, const char *path) {
    espi_st_file *file;
    esp_status status = espi_st_open(&file, path);
    if (status != ESP_OK) return status;
    for (size_t i = 0; i < espi_st_count(file) && status == ESP_OK; i++) status = read_tensor(arrays, espi_st_at(file, i));
    espi_st_close(file);
    return status;
}

float *espi_array_f32(const espi_array *array) {
    float *out = espi_cli_memory((size_t)array->n * sizeof *out);
    for (int64_t i = 0; i < array->n; i++) out[i] = (float)array->v[i];
    return out;
}

uint8_t *espi_array_u8(const espi_array *array) {
    uint8_t *out = espi_cli_memory((size_t)array->n);
    for (int64_t i = 0; i < array->n; i++) out[i] = (uint8_t)array->v[i];
    return out;
}

/* On a GPU activations and their gradients are bf16: twice the largest errors that a plain bf16 run of the golden folders has (0.06, 0.05, and
 * with a clamp 0.174: by its rounding a value beside the border has a gradient or has none). */
#define BF16_FORWARD 0.12
#define BF16_GRADIENT 0.1
#define BF16_CLAMPED_GRADIENT 0.35

/* Limits of the golden data's README.  Under ref64, against values of an f64 run, what remains is double rounding over a few thousand
 * operations: 1e-12, and 1e-11 for gradients, which cancel more. */
double espi_verify_limit(const espi_verify *v, espi_rule rule, esp_dtype reference) {
    if (rule == ESPI_RULE_EXACT) return 0;
    if (v->ctx->device) return rule == ESPI_RULE_FORWARD ? BF16_FORWARD : v->clamped ? BF16_CLAMPED_GRADIENT : BF16_GRADIENT;
    bool wide = v->ctx->real == ESP_F64 && reference == ESP_F64;
    return rule == ESPI_RULE_FORWARD ? (wide ? 1e-12 : 2e-5) : (wide ? 1e-11 : 1e-4);
}

/* NaN on either side gives NaN, which no limit lets through.  A reference of zeros asks for zeros. */
static double measure(espi_rule rule, const double *got, const double *want, int64_t n) {
    double largest = 0, largest_want = 0, sum = 0, sum_want = 0, different = 0;
    for (int64_t i = 0; i < n; i++) {
        double d = got[i] == want[i] ? 0 : fabs(got[i] - want[i]);
        if (d != d) return NAN;
        if (d > largest) largest = d;
        if (fabs(want[i]) > largest_want) largest_want = fabs(want[i]);
        sum += d * d;
        sum_want += want[i] * want[i];
        different += d != 0;
    }
    if (rule == ESPI_RULE_EXACT) return different;
    if (largest == 0) return 0;
    return rule == ESPI_RULE_FORWARD ? largest / largest_want : sqrt(sum) / sqrt(sum_want);
}

static void print_name(const espi_verify *v, const char *label, const char *name) {
    printf("%s/%s%s", v->folder, label, name);
}

void espi_verify_compare(espi_verify *v, const char *label, const char *name, espi_rule rule, double limit, const double *got,
                         const double *want, int64_t n) {
    double error = measure(rule, got, want, n);
    bool failed = !(error <= limit);
    print_name(v, label, name);
    printf("  %s %.3g  limit %.3g  %s\n", rule == ESPI_RULE_EXACT ? "different" : "error", error, limit, failed ? "FAIL" : "ok");
    if (failed)
        v->failed++;
    else
        v->passed++;
}

void espi_verify_count(espi_verify *v, const char *name, int64_t different) {
    print_name(v, "", name);
    printf("  different %lld  limit 0  %s\n", (long long)different, different == 0 ? "ok" : "FAIL");
    if (different == 0)
        v->passed++;
    else
        v->failed++;
}

void espi_verify_array(espi_verify *v, const char *label, espi_rule rule, const espi_array *got, const espi_array *want) {
    if (got && got->n == want->n) {
        espi_verify_compare(v, label, want->name, rule, espi_verify_limit(v, rule, want->dtype), got->v, want->v, want->n);
        return;
    }
    print_name(v, label, want->name);
    if (got)
        printf("  has %lld values, expected %lld  FAIL\n", (long long)got->n, (long long)want->n);
    else
        printf("  was not produced  FAIL\n");
    v->failed++;
}

void espi_verify_skip(espi_verify *v, const char *name, const char *reason) {
    print_name(v, "", name);
    printf("  skipped: %s\n", reason);
    v->skipped++;
}

void espi_verify_fail(espi_verify *v, const char *name, const char *reason) {
    print_name(v, "", name);
    printf("  %s  FAIL\n", reason);
    v->failed++;
}

void espi_verify_error(espi_verify *v, const char *name, esp_status status) {
    print_name(v, "", name);
    printf("  %s: %s  FAIL\n", esp_status_name(status), esp_last_error());
    v->failed++;
}

bool espi_is_file(const char *dir, const char *name) {
    char *path = espi_cli_path(dir, name);
    bool is = espi_file_exists(path);
    free(path);
    return is;
}

bool espi_is_folder(const char *dir, const char *name) {
    char *path = espi_cli_path(dir, name);
    bool is = espi_dir_exists(path);
    free(path);
    return is;
}

bool espi_verify_open(espi_verify *v, espi_arrays *arrays, const char *dir, const char *name) {
    *arrays = (espi_arrays){0};
    if (!espi_is_file(dir, name)) {
        espi_verify_skip(v, name, "not in this folder");
        return false;
    }
    char *path = espi_cli_path(dir, name);
    esp_status status = espi_arrays_read(arrays, path);
    free(path);
    if (status != ESP_OK) {
        espi_verify_error(v, name, status);
        espi_arrays_free(arrays);
    }
    return status == ESP_OK;
}

json_t *espi_verify_report(const char *dir) {
    char *path = espi_cli_path(dir, "report.json"), *text = NULL;
    json_t *report = NULL;
    if (espi_is_file(dir, "report.json") && espi_file_read_all(&text, NULL, path, (size_t)64 << 20) == ESP_OK)
        report = json_loads(text, 0, NULL);
    free(text);
    free(path);
    return report;
}

esp_status espi_verify_walk(espi_verify *v, espi_walk walk, void *user) {
    espi_arena dry = espi_ctx_dry(v->ctx);
    ESPI_TRY(walk(user, &dry));
    espi_room room;
    ESPI_TRY(espi_room_take(&room, v->ctx, ESPI_MEM_ACTIVATIONS, espi_arena_high(&dry)));
    espi_arena arena = espi_room_arena(&room, v->ctx);
    const esp_status status = walk(user, &arena);
    espi_room_free(&room, v->ctx);
    return status;
}
