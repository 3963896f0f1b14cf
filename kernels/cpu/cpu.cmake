# Sets espalier_cpu_objects and espalier_cpu_libraries.  The same sources are compiled once per instruction set.
set(cpu_sources
    kernels/cpu/attention.c
    kernels/cpu/backend.c
    kernels/cpu/experts.c
    kernels/cpu/head.c
    kernels/cpu/linear.c
    kernels/cpu/optim.c
    kernels/cpu/product.c
    kernels/cpu/router.c
    kernels/cpu/rows.c)
set(cpu_isas generic)
set(cpu_flags_generic)
# Beside those sources, what an instruction set has of its own.
set(cpu_own_avx512_bf16 kernels/cpu/packed_avx512_bf16.c)
set(cpu_own_amx_bf16 kernels/cpu/packed_amx_bf16.c)
# And without and with dot products of bf16 pairs.
set(cpu_f32_sources kernels/cpu/attention_f32.c)
set(cpu_bf16_sources kernels/cpu/attention_bf16.c kernels/cpu/bf16.c kernels/cpu/linear_bf16.c)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  list(APPEND cpu_isas avx2 avx512 avx512_bf16 amx_bf16)
  set(cpu_flags_avx2 -mavx2 -mfma)
  set(cpu_flags_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512)
  set(cpu_flags_avx512_bf16 ${cpu_flags_avx512} -mavx512bf16)
  set(cpu_flags_amx_bf16 ${cpu_flags_avx512_bf16} -mamx-tile -mamx-bf16 -mgfni)
endif()

set(espalier_cpu_objects)
set(espalier_cpu_libraries)
foreach(isa IN LISTS cpu_isas)
  set(target espalier_cpu_${isa})
  if(isa MATCHES "bf16$")
    set(cpu_some_sources ${cpu_bf16_sources})
  else()
    set(cpu_some_sources ${cpu_f32_sources})
  endif()
  add_library(${target} OBJECT ${cpu_sources} ${cpu_some_sources} ${cpu_own_${isa}})
  # -ffp-contract=fast: multiply-adds are fused wherever the machine can, in every row alike.
  # -Wno-psabi: vectors are passed between functions of one file only.
  target_compile_options(${target} PRIVATE -O3 -ffp-contract=fast -fno-math-errno -Wno-psabi ${cpu_flags_${isa}})
  target_compile_definitions(${target} PRIVATE ESPI_CPU_ISA=${isa})
  target_include_directories(${target} PRIVATE include src .)
  target_link_libraries(${target} PRIVATE OpenMP::OpenMP_C)
  list(APPEND espalier_cpu_objects $<TARGET_OBJECTS:${target}>)
endforeach()
# What no instruction set's flags may touch: the list of backends, and the libraries of dense products.
add_library(espalier_cpu_any OBJECT kernels/cpu/cpu.c kernels/cpu/dense.c kernels/cpu/pack.c)
target_include_directories(espalier_cpu_any PRIVATE include src .)
target_link_libraries(espalier_cpu_any PRIVATE OpenMP::OpenMP_C)
if(avx512 IN_LIST cpu_isas)
  target_compile_definitions(espalier_cpu_any PRIVATE ESPI_CPU_X86)
endif()
foreach(library dnnl cblas)
  string(TOUPPER ${library} name)
  if(ESPALIER_HAVE_${name})
    target_compile_definitions(espalier_cpu_any PRIVATE ESPI_HAVE_${name})
    target_include_directories(espalier_cpu_any SYSTEM PRIVATE ${espalier_${library}_include})
    list(APPEND espalier_cpu_libraries ${espalier_${library}_libraries})
  endif()
endforeach()
list(APPEND espalier_cpu_objects $<TARGET_OBJECTS:espalier_cpu_any>)
