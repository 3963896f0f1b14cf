#!/bin/sh
# The loop that README.md opens with compiles, as it stands there, against the public headers.   readme.sh SOURCE_DIR CC
set -eu
source=$1 cc=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

awk '/^```/ { if (inside && body ~ /int main/) { printf "%s", body; exit } inside = !inside && $0 == "```c"; body = ""; next }
     inside { body = body $0 "\n" }' "$source/README.md" >"$work/loop.c"
if ! [ -s "$work/loop.c" ]; then
    echo "README.md has no \`\`\`c block with an \"int main\""
    exit 1
fi
$cc -std=c17 -Wall -Wextra -Werror -I"$source/include" -c "$work/loop.c" -o "$work/loop.o"
