/* Named, guarded, deterministic arrays of one op call. */
#include "problem.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { GUARD_BYTE = 0xA5 };

uint64_t seed_of(const char *name) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (; *name; name++) hash = (hash ^ (unsigned char)*name) * 0x100000001b3u;
    return hash;
}

/* splitmix64 (Steele, Lea, Flood 2014), as a function of its counter. */
static uint64_t bits_of(uint64_t seed, const char *name, int64_t i) {
    uint64_t z = (seed ^ seed_of(name)) + ((uint64_t)i + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

double value_of(uint64_t seed, const char *name, int64_t i) {
    return (double)(bits_of(seed, name, i) >> 40) * 0x1p-23 - 1;
}

int64_t pick(uint64_t seed, const char *name, int64_t i, int64_t n) {
    return (int64_t)(bits_of(seed, name, i) >> 8) % n;
}

double field_get(const field *f, int64_t i) {
    switch (f->dtype) {
    case ESP_F32:
        return ((const float *)f->data)[i];
    case ESP_F64:
        return ((const double *)f->data)[i];
    case ESP_I32:
        return ((const int32_t *)f->data)[i];
    case ESP_I64:
        return (double)((const int64_t *)f->data)[i];
    case ESP_U8:
        return ((const uint8_t *)f->data)[i];
    default:
        return NAN;
    }
}

void field_set(field *f, int64_t i, double value) {
    switch (f->dtype) {
    case ESP_F32:
        ((float *)f->data)[i] = (float)value;
        break;
    case ESP_F64:
        ((double *)f->data)[i] = value;
        break;
    case ESP_I32:
        ((int32_t *)f->data)[i] = (int32_t)value;
        break;
    case ESP_I64:
        ((int64_t *)f->data)[i] = (int64_t)value;
        break;
    case ESP_U8:
        ((uint8_t *)f->data)[i] = (uint8_t)value;
        break;
    case ESP_BF16:
        ((uint16_t *)f->data)[i] = (uint16_t)value;
        break;
    case ESP_F16:
        ((uint16_t *)f->data)[i] = (uint16_t)value;
        break;
    default:
        cr_assert_fail("no such dtype in a test array");
    }
}

static double fill_value(const problem *p, const field *f, int64_t i) {
    const bool is_float = f->dtype == ESP_F32 || f->dtype == ESP_F64;
    if (f->role == ROLE_OUT) return is_float ? NAN : 0x55;
    if (is_float) return value_of(p->seed, f->name, i);
    const uint64_t bits = bits_of(p->seed, f->name, i);
    /* sign and mantissa anything, exponent between 2^-5 and 2^0 */
    if (f->dtype == ESP_BF16) return (double)((bits & 0x807f) | (122 + bits / 65536 % 6) << 7);
    if (f->dtype == ESP_F16) return (double)((bits & 0x83ff) | (10 + bits / 65536 % 6) << 10);
    return (double)(bits % (f->dtype == ESP_U8 ? 256 : 1000));
}

void *field_add(problem *p, const char *name, role role, esp_dtype dtype, int64_t count) {
    cr_assert(p->n_fields < FIELDS, "%s: more than %d arrays in one problem", name, FIELDS);
    field *f = &p->fields[p->n_fields++];
    strncpy(f->name, name, FIELD_NAME - 1);
    f->role = role;
    f->dtype = dtype == ESP_DTYPE_NONE ? p->real : dtype;
    f->count = count;
    const size_t bytes = (size_t)count * esp_dtype_size(f->dtype), padded = (bytes + GUARD - 1) / GUARD * GUARD;
    unsigned char *block = aligned_alloc(GUARD, padded + (size_t)2 * GUARD);
    f->before = malloc(bytes + 1);
    cr_assert(block && f->before, "out of memory in a test");
    memset(block, GUARD_BYTE, padded + (size_t)2 * GUARD);
    f->data = block + GUARD;
    for (int64_t i = 0; i < count; i++) field_set(f, i, fill_value(p, f, i));
    memcpy(f->before, f->data, bytes);
    return f->data;
}

field *field_look(problem *p, const char *name) {
    for (int i = 0; i < p->n_fields; i++)
        if (strcmp(p->fields[i].name, name) == 0) return &p->fields[i];
    return NULL;
}

field *field_find(problem *p, const char *name) {
    field *found = field_look(p, name);
    cr_assert(found, "no array \"%s\" in this problem", name);
    return found;
}

void field_settle(field *f) {
    memcpy(f->before, f->data, (size_t)f->count * esp_dtype_size(f->dtype));
}

void *field_take(problem *p, const char *name, problem *from) {
    const field *source = field_find(from, name);
    const bool is_real = source->dtype == from->real;
    void *data = field_add(p, name, ROLE_IN, is_real ? ESP_DTYPE_NONE : source->dtype, source->count);
    field *f = &p->fields[p->n_fields - 1];
    for (int64_t i = 0; i < f->count; i++) field_set(f, i, field_get(source, i));
    memcpy(f->before, data, (size_t)f->count * esp_dtype_size(f->dtype));
    return data;
}

const char *problem_damage(const problem *p, const char **name) {
    for (int i = 0; i < p->n_fields; i++) {
        const field *f = &p->fields[i];
        const size_t bytes = (size_t)f->count * esp_dtype_size(f->dtype), padded = (bytes + GUARD - 1) / GUARD * GUARD;
        const unsigned char *data = f->data;
        *name = f->name;
        if (f->role == ROLE_IN && memcmp(data, f->before, bytes) != 0) return "an input changed";
        for (size_t b = 0; b < GUARD; b++)
            if (data[-1 - (ptrdiff_t)b] != GUARD_BYTE) return "written before its first element";
        for (size_t b = bytes; b < padded + GUARD; b++)
            if (data[b] != GUARD_BYTE) return "written behind its last element";
    }
    return NULL;
}

void problem_free(problem *p) {
    for (int i = 0; i < p->n_fields; i++) {
        free((unsigned char *)p->fields[i].data - GUARD);
        free(p->fields[i].before);
    }
    p->n_fields = 0;
}
