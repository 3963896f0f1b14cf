/* A backend is a name and a table of ops; an empty slot = not offered.  kernels/ref fills every slot. */
#ifndef ESPI_KERNELS_BACKEND_H
#define ESPI_KERNELS_BACKEND_H

#include "kernels/ops.h"

/* What a kernel may use besides its arguments. */
typedef struct espi_exec {
    int threads;
    void *scratch;     /* scratch() bytes, aligned to 64, contents undefined, dead after the call */
    bool always_split; /* use all threads, even where the work does not pay for them: how the tests see rule 8 on small shapes */
} espi_exec;

/* run: the kernel.  scratch: bytes it needs, a function of the sizes in the arguments alone (never of data or pointers), NULL = none.
 * refuse: NULL or a function that gives the reason why this case is not taken, or NULL when it is. */
#define ESPI_OP(name, args)                                                                                                                \
    typedef struct espi_slot_##name {                                                                                                      \
        esp_status (*run)(const espi_exec *exec, const args *a);                                                                           \
        size_t (*scratch)(const espi_exec *exec, const args *a);                                                                           \
        const char *(*refuse)(const args *a);                                                                                              \
    } espi_slot_##name;
#include "kernels/ops.def"
#undef ESPI_OP

typedef enum espi_op_id {
#define ESPI_OP(name, args) ESPI_OP_##name,
#include "kernels/ops.def"
#undef ESPI_OP
    ESPI_OP_COUNT
} espi_op_id;

typedef struct espi_backend {
    const char *name; /* "ref", "ref64", "cpu-generic", "cpu-avx2", "cpu-avx512" */
    esp_dtype real;
    bool (*available)(void);       /* can this machine run it? */
    const char *(*describe)(void); /* one line for ESP_LOG=select (e.g. which dense GEMM), or NULL */
#define ESPI_OP(name, args) espi_slot_##name name;
#include "kernels/ops.def"
#undef ESPI_OP
} espi_backend;

extern const espi_backend espi_backend_ref, espi_backend_ref64;

/* Those of kernels/cpu that were built, best first; NULL-terminated. */
extern const espi_backend *const espi_backends_cpu[];

#endif
