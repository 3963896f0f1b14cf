# Sets espalier_cpu_objects and espalier_cpu_libraries.  The same sources are compiled once per instruction set.
set(cpu_sources kernels/cpu/backend.c)
set(espalier_cpu_objects)
set(espalier_cpu_libraries)
