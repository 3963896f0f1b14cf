/* One call of one op as a test sees it: named arrays with guard bands, filled from a seed, and the argument struct that points into them.
 * The value of an array's element depends on the seed, the array's name and its index alone, so the forward and the backward of an op, and
 * the same op in another dtype, are given the same numbers. */
#ifndef ESP_TESTS_PROBLEM_H
#define ESP_TESTS_PROBLEM_H

#include "kernels/backend.h"

typedef enum role {
    ROLE_IN,    /* must not change */
    ROLE_OUT,   /* overwritten: filled with NaN (or a value no op writes) before the call */
    ROLE_INOUT, /* added to, or written in part: filled with values */
} role;

enum { FIELD_NAME = 24, FIELDS = 40, GUARD = 64 };

typedef struct field {
    char name[FIELD_NAME];
    role role;
    esp_dtype dtype;
    int64_t count;
    void *data;   /* guarded */
    void *before; /* what data held before the call */
} field;

typedef enum routing_pattern { ROUTE_RANDOM, ROUTE_EMPTY, ROUTE_ONE, ROUTE_SKEWED } routing_pattern;

/* Sizes of every op at once; each takes those it knows. */
typedef struct shape {
    const char *name;
    int64_t tokens, hidden, experts, top_k, width, rank, vocab, heads, kv_heads, head_dim;
    routing_pattern pattern;
    esp_qformat format;
    esp_dtype plain;  /* of matrices that are not 4-bit */
    bool nested;      /* double quantisation */
    bool renormalise; /* router */
    bool extras;      /* bias, softcap, entropy coefficient, residual gradient, accumulation, auxiliary losses */
    bool in_place;    /* outputs over inputs where the op allows it */
    bool decode;      /* attention: keys that lie before the queries */
    bool shared;      /* attention: some sequences are the prefix of others */
    bool repeated;    /* head: rows that are named twice, gradients in rows of their own */
    /* What some families have. */
    bool sinks;
    int64_t window;    /* 0 = all keys */
    bool partial_rope; /* half of each head is rotated */
    bool bias;         /* of the router and of the experts */
    bool sigmoid, corrected;
    double scaling;
    bool clamped, interleaved;
    bool forced;   /* router: two tokens of three come with their experts */
    bool filtered; /* head: two rows of three are over some ids only, and drawing leaves some */
    bool packed;   /* experts: where a backend has a form of its own, in that */
} shape;

typedef union any_args {
#define ESPI_OP(name, args) args name;
#include "kernels/ops.def"
#undef ESPI_OP
} any_args;

typedef struct problem {
    shape shape;
    espi_op_id op;
    esp_dtype real;
    const espi_backend *saver; /* computes what a backward reads of its forward */
    uint64_t seed;
    field fields[FIELDS];
    int n_fields;
    any_args args;
    int64_t coef_next; /* head_fused: the row its callback must be called with next */
} problem;

uint64_t seed_of(const char *name);
/* Element i of the array `name`: a multiple of 2^-23 in [-1, 1), so that it and its neighbours are exact in f32. */
double value_of(uint64_t seed, const char *name, int64_t i);
/* Uniform in 0..n-1. */
int64_t pick(uint64_t seed, const char *name, int64_t i, int64_t n);

/* A new array; its data pointer.  ESP_DTYPE_NONE: the problem's real. */
void *field_add(problem *p, const char *name, role role, esp_dtype dtype, int64_t count);
field *field_look(problem *p, const char *name); /* NULL: there is none */
field *field_find(problem *p, const char *name); /* ends the test then */
double field_get(const field *f, int64_t i);
void field_set(field *f, int64_t i, double value);
/* After a test has chosen an input's values itself. */
void field_settle(field *f);
/* An input of `p` with the values that array has in `from`, in p's dtype. */
void *field_take(problem *p, const char *name, problem *from);

/* NULL, or what is wrong: an input changed, or a byte around an array was written. */
const char *problem_damage(const problem *p, const char **name);
void problem_free(problem *p);

#endif
