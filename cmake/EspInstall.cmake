# What `cmake --install` puts where: library, headers, programs, and how others find them (find_package, pkg-config).
include(CMakePackageConfigHelpers)

install(TARGETS espalier EXPORT espalierTargets)
install(TARGETS ${espalier_programs})
if(ESPALIER_HAVE_MPI)
  install(TARGETS espalier_mpi DESTINATION ${CMAKE_INSTALL_LIBDIR}) # beside the library, which looks for it there
endif()
install(DIRECTORY include/espalier TYPE INCLUDE)

set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/espalier)
install(EXPORT espalierTargets NAMESPACE espalier:: DESTINATION ${package_dir})
configure_package_config_file(cmake/espalierConfig.cmake.in espalierConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(espalierConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/espalierConfig.cmake ${PROJECT_BINARY_DIR}/espalierConfigVersion.cmake DESTINATION ${package_dir})

# The .pc file says where it lies relative to itself: a fixed prefix would be wrong after `cmake --install --prefix`.
file(RELATIVE_PATH pc_libdir ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_FULL_LIBDIR})
file(RELATIVE_PATH pc_includedir ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_FULL_INCLUDEDIR})
configure_file(cmake/espalier.pc.in espalier.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/espalier.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
