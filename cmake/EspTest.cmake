# esp_add_test(name SOURCES a.c b.c [LABELS unit ...] [TIMEOUT s]): one Criterion binary, one CTest test.
function(esp_add_test name)
  cmake_parse_arguments(T "" "TIMEOUT" "SOURCES;LABELS" ${ARGN})
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 120)
  endif()
  add_executable(test_${name} ${T_SOURCES})
  target_link_libraries(test_${name} PRIVATE espalier_internal PkgConfig::CRITERION)
  target_include_directories(test_${name} PRIVATE ${CMAKE_SOURCE_DIR}/tests/support)
  target_compile_definitions(test_${name} PRIVATE ESP_SOURCE_DIR="${CMAKE_SOURCE_DIR}" ESP_BINARY_DIR="${CMAKE_BINARY_DIR}")
  add_test(NAME ${name} COMMAND test_${name} -j1)
  set_tests_properties(${name} PROPERTIES TIMEOUT ${T_TIMEOUT} LABELS "${T_LABELS}" FAIL_REGULAR_EXPRESSION
                       "Tested: 0 ;ERROR: (Address|Leak)Sanitizer;runtime error:;definitely lost;Invalid (read|write)")
endfunction()
