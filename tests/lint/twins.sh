#!/bin/sh
# Twins: every src/forward/X.c has src/backward/X.c and src/contract/X.h; the first line of each names the other; both include the contract.
. "$(dirname "$0")/lib.sh"

for pair in forward:backward backward:forward; do
    mine=${pair%:*} other=${pair#*:}
    for file in src/"$mine"/*.c; do
        [ -e "$file" ] || continue
        name=$(basename "$file" .c)
        [ -e "src/$other/$name.c" ] || fail "$file: no twin src/$other/$name.c"
        [ -e "src/contract/$name.h" ] || fail "$file: no contract src/contract/$name.h"
        head -n 1 "$file" | grep -q "$other/$name\.c" || fail "$file:1: the first line does not name its twin $other/$name.c"
        grep -q "^#include \"contract/$name\.h\"" "$file" || fail "$file: does not include contract/$name.h"
    done
done
finish
