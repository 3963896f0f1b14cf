/* The cpu backends that were built, best instruction set first. */
#include "kernels/backend.h"

extern const espi_backend espi_backend_cpu_generic;
#if defined(ESPI_CPU_X86)
extern const espi_backend espi_backend_cpu_avx2, espi_backend_cpu_avx512;
#endif

const espi_backend *const espi_backends_cpu[] = {
#if defined(ESPI_CPU_X86)
    &espi_backend_cpu_avx512,
    &espi_backend_cpu_avx2,
#endif
    &espi_backend_cpu_generic,
    NULL,
};
