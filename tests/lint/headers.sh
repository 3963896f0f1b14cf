#!/bin/sh
# Every public header compiles alone, as C17 and (where there is a C++ compiler) as C++17, without warnings, and includes nothing but the
# standard library and its sisters.   headers.sh SOURCE_TREE [CC [CXX]]
. "$(dirname "$0")/lib.sh"
cc=${2:-cc} cxx=${3:-c++}

for header in include/espalier/*.h; do
    name=espalier/$(basename "$header")
    echo "#include \"$name\"" | $cc -std=c17 -pedantic -Wall -Wextra -Werror -fsyntax-only -Iinclude -x c - 2>>"$offences" || fail "$header: not C17 by itself"
    if command -v "$cxx" >/dev/null; then
        echo "#include \"$name\"" | $cxx -std=c++17 -pedantic -Wall -Wextra -Werror -fsyntax-only -Iinclude -x c++ - 2>>"$offences" || fail "$header: not C++17 by itself"
    fi
    { grep -nHE '^#include' "$header" || true; } | { grep -vE '"espalier/[a-z_0-9]+\.h"|<(std[a-z]+|math)\.h>' || true; } |
        forbid "neither of the standard library nor of espalier" '.'
done
finish
