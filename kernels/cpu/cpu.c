/* The cpu backends that were built, best instruction set first, and whether this machine has what each needs. */
#include "kernels/backend.h"

extern const espi_backend espi_backend_cpu_generic;
bool espi_cpu_available_generic(void);

bool espi_cpu_available_generic(void) {
    return true;
}

#if defined(ESPI_CPU_X86)
extern const espi_backend espi_backend_cpu_avx2, espi_backend_cpu_avx512;
bool espi_cpu_available_avx2(void);
bool espi_cpu_available_avx512(void);

bool espi_cpu_available_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool espi_cpu_available_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif

const espi_backend *const espi_backends_cpu[] = {
#if defined(ESPI_CPU_X86)
    &espi_backend_cpu_avx512,
    &espi_backend_cpu_avx2,
#endif
    &espi_backend_cpu_generic,
    NULL,
};
