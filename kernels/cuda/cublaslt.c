/* cuBLASLt, found when a GPU is first used: the same program then runs where there is neither driver nor CUDA.  Each function below is the
 * library's own, under its own name. */
#define _DEFAULT_SOURCE /* dlopen's RTLD_LOCAL, beside POSIX */

#include <cublasLt.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

const char *espi_cublaslt_open(void);

/* FUNCTION(name, parameters, arguments) */
#define FUNCTIONS                                                                                                                          \
    FUNCTION(cublasLtCreate, (cublasLtHandle_t * h), (h))                                                                                  \
    FUNCTION(cublasLtDestroy, (cublasLtHandle_t h), (h))                                                                                   \
    FUNCTION(cublasLtMatmul,                                                                                                               \
             (cublasLtHandle_t h, cublasLtMatmulDesc_t desc, const void *alpha, const void *a, cublasLtMatrixLayout_t la, const void *b,   \
              cublasLtMatrixLayout_t lb, const void *beta, const void *c, cublasLtMatrixLayout_t lc, void *d, cublasLtMatrixLayout_t ld,   \
              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t bytes, cudaStream_t stream),                                       \
             (h, desc, alpha, a, la, b, lb, beta, c, lc, d, ld, algo, workspace, bytes, stream))                                           \
    FUNCTION(cublasLtMatmulDescCreate, (cublasLtMatmulDesc_t * desc, cublasComputeType_t compute, cudaDataType_t scale),                   \
             (desc, compute, scale))                                                                                                       \
    FUNCTION(cublasLtMatmulDescDestroy, (cublasLtMatmulDesc_t desc), (desc))                                                               \
    FUNCTION(cublasLtMatmulDescSetAttribute,                                                                                               \
             (cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute, const void *value, size_t bytes),                       \
             (desc, attribute, value, bytes))                                                                                              \
    FUNCTION(cublasLtMatrixLayoutCreate,                                                                                                   \
             (cublasLtMatrixLayout_t * layout, cudaDataType type, uint64_t rows, uint64_t cols, int64_t stride),                           \
             (layout, type, rows, cols, stride))                                                                                           \
    FUNCTION(cublasLtMatrixLayoutDestroy, (cublasLtMatrixLayout_t layout), (layout))                                                       \
    FUNCTION(cublasLtMatmulPreferenceCreate, (cublasLtMatmulPreference_t * preference), (preference))                                      \
    FUNCTION(cublasLtMatmulPreferenceDestroy, (cublasLtMatmulPreference_t preference), (preference))                                       \
    FUNCTION(cublasLtMatmulPreferenceSetAttribute,                                                                                         \
             (cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const void *value, size_t bytes),     \
             (preference, attribute, value, bytes))                                                                                        \
    FUNCTION(cublasLtMatmulAlgoGetHeuristic,                                                                                               \
             (cublasLtHandle_t h, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t la, cublasLtMatrixLayout_t lb,                         \
              cublasLtMatrixLayout_t lc, cublasLtMatrixLayout_t ld, cublasLtMatmulPreference_t preference, int wanted,                     \
              cublasLtMatmulHeuristicResult_t *results, int *found),                                                                       \
             (h, desc, la, lb, lc, ld, preference, wanted, results, found))

#define FUNCTION(name, parameters, arguments)                                                                                              \
    static cublasStatus_t(*found_##name) parameters;                                                                                       \
    cublasStatus_t CUBLASWINAPI name parameters {                                                                                          \
        return found_##name arguments;                                                                                                     \
    }
FUNCTIONS
#undef FUNCTION

/* The types of cuBLASLt are fixed within a major version: the one that this was compiled against. */
#define STRING2(x) #x
#define STRING(x) STRING2(x)
#define LIBRARY "libcublasLt.so." STRING(CUBLAS_VER_MAJOR)

static const char *refusal;

static void look(void) {
    static const char *const places[] = {LIBRARY, "/usr/local/cuda/lib64/" LIBRARY};
    void *library = NULL;
    for (size_t i = 0; i < sizeof places / sizeof *places && library == NULL; i++) library = dlopen(places[i], RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        refusal = LIBRARY " was not found, expected it among the system's libraries or in LD_LIBRARY_PATH: it comes with CUDA";
        return;
    }
    void *symbol;
    /* A pointer to an object becomes one to a function as POSIX says it may, by its bytes. */
#define FUNCTION(name, parameters, arguments)                                                                                              \
    symbol = dlsym(library, #name);                                                                                                        \
    if (symbol == NULL) refusal = LIBRARY " lacks " #name ", expected the whole interface";                                                \
    memcpy(&found_##name, &symbol, sizeof symbol);
    FUNCTIONS
#undef FUNCTION
}

const char *espi_cublaslt_open(void) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, look);
    return refusal;
}
