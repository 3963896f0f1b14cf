# esp_add_test(name SOURCES a.c b.c [LABELS unit ...] [TIMEOUT s] [TESTS n]): one Criterion binary, one CTest test.
#   TESTS: how many tests the sources declare, where they come from X-macro rows and not from plain Test(...) lines.
# esp_add_plain_test(same): a program with its own main, where Criterion cannot run (ThreadSanitizer).
# esp_add_script_test(name COMMAND ... [LABELS ...] [TIMEOUT s]): any command; exit status 77 = skipped.
# esp_count_tests(): adds the test `count`, see count.cmake.  To be called last.

# Criterion finds its tests through a linker section: these flags drop tests, and what is left still passes.
if("${CMAKE_C_FLAGS} ${CMAKE_EXE_LINKER_FLAGS} ${CMAKE_C_FLAGS_${CMAKE_BUILD_TYPE}}" MATCHES "-flto|--gc-sections" OR CMAKE_INTERPROCEDURAL_OPTIMIZATION)
  message(FATAL_ERROR "tests vanish under -flto and --gc-sections: configure with ESPALIER_BUILD_TESTS=OFF or without these flags")
endif()

# What Criterion lets pass: no test at all, leaks, and what sanitizers print.
set(esp_fail_pattern "Tested: 0 ;ERROR: (Address|Leak)Sanitizer;WARNING: ThreadSanitizer;runtime error:;definitely lost;Invalid (read|write)")

function(esp_test_properties name)
  cmake_parse_arguments(PARSE_ARGV 1 T "" "TIMEOUT" "LABELS")
  if(NOT T_TIMEOUT)
    set(T_TIMEOUT 120)
  endif()
  set_tests_properties(${name} PROPERTIES TIMEOUT ${T_TIMEOUT} LABELS "${T_LABELS}" SKIP_RETURN_CODE 77 FAIL_REGULAR_EXPRESSION
                                          "${esp_fail_pattern}")
endfunction()

function(esp_test_program name)
  add_executable(test_${name} ${ARGN})
  target_link_libraries(test_${name} PRIVATE espalier_internal)
  target_include_directories(test_${name} PRIVATE ${PROJECT_SOURCE_DIR}/tests/support)
  target_compile_definitions(test_${name} PRIVATE ESP_SOURCE_DIR="${PROJECT_SOURCE_DIR}" ESP_BINARY_DIR="${PROJECT_BINARY_DIR}")
endfunction()

function(esp_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 T "" "TIMEOUT;TESTS" "SOURCES;LABELS")
  esp_test_program(${name} ${T_SOURCES})
  target_link_libraries(test_${name} PRIVATE PkgConfig::CRITERION)
  if("thread" IN_LIST ESPALIER_SANITIZE) # Criterion does not start under ThreadSanitizer: the target is there, for those that name it
    set_target_properties(test_${name} PROPERTIES EXCLUDE_FROM_ALL ON)
    return()
  endif()
  add_test(NAME ${name} COMMAND test_${name} -j1)
  esp_test_properties(${name} TIMEOUT "${T_TIMEOUT}" LABELS "${T_LABELS}")
  list(TRANSFORM T_SOURCES PREPEND ${CMAKE_CURRENT_SOURCE_DIR}/)
  if(NOT T_TESTS)
    set(T_TESTS 0)
  endif()
  list(JOIN T_SOURCES "|" sources)
  set_property(GLOBAL APPEND PROPERTY esp_counted "$<TARGET_FILE:test_${name}>|${T_TESTS}|${sources}")
endfunction()

function(esp_add_plain_test name)
  cmake_parse_arguments(PARSE_ARGV 1 T "" "TIMEOUT" "SOURCES;LABELS")
  esp_test_program(${name} ${T_SOURCES})
  add_test(NAME ${name} COMMAND test_${name})
  esp_test_properties(${name} TIMEOUT "${T_TIMEOUT}" LABELS "${T_LABELS}")
endfunction()

function(esp_add_script_test name)
  cmake_parse_arguments(PARSE_ARGV 1 T "" "TIMEOUT" "COMMAND;LABELS")
  add_test(NAME ${name} COMMAND ${T_COMMAND})
  esp_test_properties(${name} TIMEOUT "${T_TIMEOUT}" LABELS "${T_LABELS}")
endfunction()

function(esp_count_tests)
  get_property(counted GLOBAL PROPERTY esp_counted)
  if(counted)
    list(JOIN counted "\n" lines)
    file(GENERATE OUTPUT ${PROJECT_BINARY_DIR}/tests/counted.txt CONTENT "${lines}\n")
    esp_add_script_test(count COMMAND ${CMAKE_COMMAND} -DLIST=${PROJECT_BINARY_DIR}/tests/counted.txt -P
                        ${PROJECT_SOURCE_DIR}/cmake/count.cmake LABELS lint)
  endif()
endfunction()
