/* The list of backends for GPUs: none where they were not built. */
#include "kernels/backend.h"

#ifdef ESPI_HAVE_CUDA
extern const espi_backend espi_backend_cuda;
#endif

const espi_backend *const espi_backends_gpu[] = {
#ifdef ESPI_HAVE_CUDA
    &espi_backend_cuda,
#endif
    NULL,
};
