#!/bin/sh
# Formatted as .clang-format says.  Other versions of clang-format than 14 differ in details: they are not asked (exit 77: skipped).
. "$(dirname "$0")/lib.sh"

tool=clang-format
! command -v clang-format-14 >/dev/null || tool=clang-format-14
if ! $tool --version 2>/dev/null | grep -q 'version 14\.'; then
    echo "skipped: no clang-format 14"
    exit 77
fi
for file in $(sources include src kernels tests examples | grep -v '\.def$'); do
    $tool --dry-run --Werror "$file" >/dev/null 2>&1 || fail "$file: not as clang-format writes it; run: $tool -i $file"
done
finish
