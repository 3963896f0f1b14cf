/* A backend is a name and a table of ops; an empty slot = not offered.  kernels/ref fills every slot. */
#ifndef ESPI_KERNELS_BACKEND_H
#define ESPI_KERNELS_BACKEND_H

#include "kernels/ops.h"

/* A machine whose memory has several nodes: thread t runs on node of_thread[t], and piece p of the address space, 2^piece_bits bytes, lies where
 * thread p % threads runs, which touched it first.  For speed alone: what is elsewhere is farther away. */
enum { ESPI_NODES = 16 };
typedef struct espi_nodes {
    int count, threads, piece_bits;
    const unsigned char *of_thread; /* each below count <= ESPI_NODES */
} espi_nodes;

/* What a kernel may use besides its arguments. */
typedef struct espi_exec {
    void *device; /* what espi_device.start gave; NULL on a CPU */
    int threads;
    const espi_nodes *nodes; /* NULL: one node */
    void *scratch;           /* scratch() bytes, aligned to 64, contents undefined, dead after the call */
    bool always_split;       /* use all threads, even where the work does not pay for them: how the tests see rule 8 on small shapes */
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

/* What is queued on a lane is done in order; ops, puts, gets and waits are of the first.  The second is for ranks that exchange rows while
 * the first computes, the third for what is brought from the host's memory meanwhile: copies on it may be recorded with the ops around
 * them, when the first lane is ordered behind them before the recording ends. */
typedef enum espi_lane { ESPI_LANE_WORK, ESPI_LANE_EXCHANGE, ESPI_LANE_FETCH, ESPI_LANES } espi_lane;
#define ESPI_MARKS 64

/* Where a backend's arrays live when that is not host memory.  Functions that do not wait return once the work is queued. */
typedef struct espi_device {
    esp_status (*start)(void **device,
                        int which);    /* of those that the process sees, the which-th, counted on from the first behind the last */
    esp_status (*enter)(void *device); /* ops that this thread queues from now on are this device's */
    void (*stop)(void *device);
    esp_status (*alloc)(void *device, size_t bytes, void **out); /* contents undefined, aligned to 256 */
    void (*free)(void *device, void *p);
    esp_status (*alloc_host)(void *device, size_t bytes, void **out); /* pinned memory of the host, aligned to 64 */
    void (*free_host)(void *device, void *p);
    /* Bytes of its memory that are free, and a number that no other device of this host has; NULL: cannot be told. */
    esp_status (*left)(void *device, uint64_t *bytes, uint64_t *number);
    esp_status (*zero)(void *device, void *p, size_t bytes);
    esp_status (*put)(void *device, void *to, const void *from_host, size_t bytes); /* from_host may be used again on return */
    esp_status (*get)(void *device, void *to_host, const void *from, size_t bytes); /* waits */
    esp_status (*wait)(void *device); /* until all that was queued is done; then any failure that was found on the way */
    /* What is queued between begin and end is recorded instead of run; *graph is then run by launch, as often as wanted, with the same
     * addresses and sizes. */
    esp_status (*record_begin)(void *device);
    esp_status (*record_end)(void *device, void **graph);
    esp_status (*launch)(void *device, void *graph);
    void (*graph_free)(void *device, void *graph);
    /* A lane as the libraries of the device know it: a cudaStream_t. */
    void *(*lane)(void *device, espi_lane lane);
    /* Within device memory, or between it and pinned memory of the host; does not wait. */
    esp_status (*copy)(void *device, espi_lane lane, void *to, const void *from, size_t bytes);
    /* What is queued on `later` from now on waits for all that now is on `earlier`. */
    esp_status (*order)(void *device, espi_lane later, espi_lane earlier);
    /* Mark 0 .. ESPI_MARKS - 1 stands behind what now is on the lane; a lane waits for it; *passed: the work before it is done. */
    esp_status (*mark)(void *device, espi_lane lane, int mark);
    esp_status (*after)(void *device, espi_lane lane, int mark);
    esp_status (*passed)(void *device, int mark, bool *passed);
    /* watch is called again and again while get, put or wait wait; what it fails with they return.  NULL: nobody watches. */
    void (*set_watch)(void *device, esp_status (*watch)(void *user), void *user);
} espi_device;

/* Blocks of x, which is finite, to codes and scales as src/quant makes them, bit for bit. */
typedef struct espi_quantise {
    uint8_t *codes;  /* [ceil(n/2)] overwrite */
    float *absmax;   /* [ceil(n/64)] overwrite: NF4, FP4 */
    uint8_t *scales; /* [n/32] overwrite: MXFP4 */
    const void *x;   /* [n] of dtype F32, BF16 or F16 */
    esp_dtype dtype;
    int64_t n;
    esp_qformat format;
    float thresholds[15];     /* between neighbouring values, in ascending order; of MXFP4 the 7 of the magnitudes */
    uint8_t code_of_rank[16]; /* NF4, FP4: the code above so many thresholds */
    bool round_up;            /* MXFP4: the scale is the smallest power of two that is largest / 6 or more */
} espi_quantise;

typedef struct espi_backend {
    const char *name; /* "ref", "ref64", "cpu-generic", "cpu-avx2", "cpu-avx512", "cpu-avx512_bf16", "cpu-amx_bf16", "cuda" */
    esp_dtype real;
    esp_dtype act;                 /* of activations: real, but for a GPU's bf16 */
    bool bf16_products;            /* its products round what they multiply to bf16, though act is f32: taken only when asked for */
    const espi_device *device;     /* NULL: arrays are in host memory */
    bool (*available)(void);       /* can this machine run it? */
    const char *(*describe)(void); /* one line for ESP_LOG=select (e.g. which dense GEMM), or NULL */
    /* What becomes of experts on their way into a device's memory; NULL without a device. */
    esp_status (*quantise)(const espi_exec *exec, const espi_quantise *a);
    /* The form that experts are kept in; NULL: as they are. */
    size_t (*packed_bytes)(const espi_stack *w); /* of one expert in the form that the expert ops want; 0: as it is */
    esp_status (*pack)(const espi_exec *exec, void *packed, const espi_stack *one); /* one: one expert, as it is */
#define ESPI_OP(name, args) espi_slot_##name name;
#include "kernels/ops.def"
#undef ESPI_OP
} espi_backend;

extern const espi_backend espi_backend_ref, espi_backend_ref64;

/* Those of kernels/cpu that were built, best first; NULL-terminated. */
extern const espi_backend *const espi_backends_cpu[];
/* Those for GPUs that were built, likewise. */
extern const espi_backend *const espi_backends_gpu[];

#endif
