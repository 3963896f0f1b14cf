# Sets espalier_cuda_objects and espalier_cuda_libraries; both empty without CUDA.
set(espalier_cuda_objects)
set(espalier_cuda_libraries)
if(NOT ESPALIER_HAVE_CUDA)
  return()
endif()

set(CMAKE_CUDA_COMPILER ${ESPALIER_NVCC})
if(NOT CMAKE_CUDA_ARCHITECTURES)
  if(ESPALIER_CUDA STREQUAL ON)
    set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 120-real)
  else()
    set(CMAKE_CUDA_ARCHITECTURES native)
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)

set(cuda_sources
    kernels/cuda/attention.cu
    kernels/cuda/attention_wgmma.cu
    kernels/cuda/backend.c
    kernels/cuda/combine.cu
    kernels/cuda/cublaslt.c
    kernels/cuda/device.c
    kernels/cuda/elementwise.cu
    kernels/cuda/embed.cu
    kernels/cuda/experts.cu
    kernels/cuda/experts_few.cu
    kernels/cuda/experts_lora.cu
    kernels/cuda/experts_mma.cu
    kernels/cuda/experts_plain.cu
    kernels/cuda/experts_tiled.cu
    kernels/cuda/experts_wgmma.cu
    kernels/cuda/head.cu
    kernels/cuda/head_wgmma.cu
    kernels/cuda/linear.cu
    kernels/cuda/norm.cu
    kernels/cuda/optim.cu
    kernels/cuda/pack.cu
    kernels/cuda/product.cu
    kernels/cuda/quant.cu
    kernels/cuda/rope.cu
    kernels/cuda/router.cu)
add_library(espalier_cuda OBJECT ${cuda_sources})
# Where they are compiled for a GPU without wgmma, nothing uses what these files have for it.
foreach(source IN LISTS cuda_sources)
  if(source MATCHES "_wgmma\\.cu$")
    set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS -diag-suppress=177)
  endif()
endforeach()
target_include_directories(espalier_cuda PRIVATE include src .)
target_include_directories(espalier_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
# No C++ run-time library is linked: no exceptions, no guards of function-local objects.
target_compile_options(
  espalier_cuda
  PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Wno-missing-field-initializers,-fvisibility=hidden,-fno-exceptions,-fno-rtti,-fno-threadsafe-statics>"
          "$<$<COMPILE_LANGUAGE:CUDA>:-Xptxas=-warn-spills,-warn-lmem-usage>"
          "$<$<AND:$<COMPILE_LANGUAGE:CUDA>,$<BOOL:${ESPALIER_WERROR}>>:-Werror=all-warnings>")
set(espalier_cuda_objects $<TARGET_OBJECTS:espalier_cuda>)
set(espalier_cuda_libraries CUDA::cudart_static ${CMAKE_DL_LIBS})
list(JOIN CMAKE_CUDA_ARCHITECTURES "+" architectures)
set(espalier_cuda_summary "${CUDAToolkit_VERSION} ${architectures}")
