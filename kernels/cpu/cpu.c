/* The cpu backends that were built, best instruction set first, and whether this machine has what each needs. */
#if defined(__linux__)
#define _DEFAULT_SOURCE /* syscall() */
#endif
#include "kernels/backend.h"

#if defined(ESPI_CPU_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

extern const espi_backend espi_backend_cpu_generic;
bool espi_cpu_available_generic(void);

bool espi_cpu_available_generic(void) {
    return true;
}

#if defined(ESPI_CPU_X86)
extern const espi_backend espi_backend_cpu_avx2, espi_backend_cpu_avx512, espi_backend_cpu_avx512_bf16, espi_backend_cpu_amx_bf16;
bool espi_cpu_available_avx2(void);
bool espi_cpu_available_avx512(void);
bool espi_cpu_available_avx512_bf16(void);
bool espi_cpu_available_amx_bf16(void);

bool espi_cpu_available_avx2(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool espi_cpu_available_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

bool espi_cpu_available_avx512_bf16(void) {
    unsigned a = 0, b, c, d;
    return espi_cpu_available_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}

/* A process must ask the kernel for the tiles' state before it may touch them; asking again does no harm. */
static bool tiles_permitted(void) {
#if defined(__linux__) && defined(SYS_arch_prctl)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return false;
#endif
}

bool espi_cpu_available_amx_bf16(void) {
    unsigned a, b, c = 0, d = 0;
    const bool tiles = __get_cpuid_count(7, 0, &a, &b, &c, &d) && d >> 22 & 1 && d >> 24 & 1, moves_bits = c >> 8 & 1; /* GFNI */
    return tiles && moves_bits && espi_cpu_available_avx512_bf16() && tiles_permitted();
}
#endif

const espi_backend *const espi_backends_cpu[] = {
#if defined(ESPI_CPU_X86)
    &espi_backend_cpu_amx_bf16, &espi_backend_cpu_avx512_bf16,
    &espi_backend_cpu_avx512,   &espi_backend_cpu_avx2,
#endif
    &espi_backend_cpu_generic,  NULL,
};
