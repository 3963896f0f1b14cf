#!/bin/sh
# The shared library exports what tests/abi/exported.txt lists, which is what the public headers declare: esp_* and nothing else.
# symbols.sh SOURCE_TREE LIBRARY
. "$(dirname "$0")/lib.sh"
list=tests/abi/exported.txt

declared=$(mktemp) exported=$(mktemp)
trap 'rm -f "$offences" "$declared" "$exported"' EXIT
code include | grep -v 'define ESP_API' | sed 's/^[^ ]* //' | tr '\n' ' ' | grep -oE 'ESP_API [^;(]*\(' | sed -E 's/.*[ *]([a-z0-9_]+)\($/\1/' | sort >"$declared"
nm -D --defined-only "$2" | awk '{ print $NF }' | sort >"$exported"

difference() { # difference A B WHY: the lines of A that B lacks
    comm -23 "$1" "$2" | forbid "$3" '.'
}
difference "$declared" "$exported" "declared with ESP_API, but not in the library"
difference "$declared" "$list" "declared with ESP_API, but not in $list"
difference "$exported" "$list" "exported, but not in $list"
difference "$list" "$exported" "in $list, but not exported"
forbid "not a public name" '^(esp[^_]|es[^p]|e[^s]|[^e])' <"$exported"
finish
