#!/bin/sh
# Every C file opens with a comment that says what it is; nothing is left for later.
. "$(dirname "$0")/lib.sh"

for file in $(sources include src kernels tests examples); do
    head -n 1 "$file" | grep -qE '^(/\*|//)' || fail "$file:1: no first comment that says what the file is"
    { grep -nHE '\b(TODO|FIXME|XXX|espi_stub)\b' "$file" || true; } | forbid "left for later" '.'
done
finish
