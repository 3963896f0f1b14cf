/* How to make a call of each op of ops.def from a shape, and how to run it.  A row without a builder does not compile. */
#ifndef ESP_TESTS_CASES_H
#define ESP_TESTS_CASES_H

#include "problem.h"

/* Coefficients of the router's two auxiliary losses, with `extras`. */
#define AUX_COEF 0.7
#define Z_COEF 0.3

/* What goes together in a family: for tables of shapes. */
#define AS_GPT_OSS .renormalise = true, .sinks = true, .bias = true, .clamped = true, .interleaved = true
#define SIGMOID_RULE .sigmoid = true, .corrected = true, .scaling = 2.5, .partial_rope = true

typedef struct op_case {
    const char *name;
    void (*build)(problem *p);
    /* Runs on `backend` with scratch that is poisoned and guarded.  *refusal: the backend's reason, or NULL when it ran. */
    esp_status (*run)(const espi_backend *backend, problem *p, int threads, const char **refusal);
} op_case;

extern const op_case op_cases[ESPI_OP_COUNT];

/* Fills *p: the call of `op` on `shape`, arrays in `real`. */
void problem_build(problem *p, espi_op_id op, const shape *shape, esp_dtype real, const espi_backend *saver);
/* Builds and runs; every failure ends the test, refusals too. */
void problem_run(problem *p, espi_op_id op, const shape *shape, const espi_backend *backend, const espi_backend *saver);
/* The reference first, then what runs here of kernels/cpu; their number. */
enum { BACKENDS = 8 };
int backends(const espi_backend *all[BACKENDS]);

/* Of a down_fwd or gate_up_fwd problem: "act" again from "gu". */
void form_activation(problem *p);
/* The frozen matrices of a problem of the four expert ops; NULL: another op's. */
espi_stack *expert_stack(problem *p);

/* Puts the experts of a `packed` shape into the backend's form, where it has one for them.  Whether it did. */
bool problem_pack(problem *p, const espi_backend *backend);

/* Runs what has been built; every failure ends the test. */
void problem_call(problem *p, const espi_backend *backend);

#endif
