#!/bin/sh
# usage: spills.sh LEAST OBJECT...: the innermost loops with products of bf16 pairs, of vectors or of tiles, keep what they work on in
# registers: none of them loads a whole vector from the stack.  LEAST: so many such loops there must be, or the search has gone blind.  Exit
# status 77: no disassembler.
least=$1
shift
command -v objdump > /dev/null || exit 77
objdump -d --no-show-raw-insn "$@" | awk -v least="$least" '
function hex(s,    i, n) {
    n = 0
    for (i = 1; i <= length(s); i++) n = n * 16 + index("0123456789abcdef", substr(s, i, 1)) - 1
    return n
}
function finish(    i, j, k, inner, products, loads) {
    for (i = 1; i <= jumps; i++) {
        inner = 1
        for (j = 1; j <= jumps; j++)
            if (j != i && from[j] >= from[i] && to[j] <= to[i]) inner = 0
        products = loads = 0
        for (k = 1; k <= lines; k++) {
            if (at[k] < from[i] || at[k] > to[i]) continue
            if (text[k] ~ /[vt]dpbf16ps/) products++
            if (text[k] ~ /\(%r[sb]p[,)].*,%zmm[0-9]+/ && text[k] !~ /1to16|broadcast/) loads++
        }
        if (!inner || products == 0) continue
        loops++
        if (loads > 0) {
            print name ": " loads " vectors are loaded from the stack in a loop of " products " products"
            bad++
        }
    }
    jumps = lines = 0
}
/^[0-9a-f]+ <.*>:$/ { finish(); name = $2 }
/^ *[0-9a-f]+:/ {
    where = $1
    sub(/:/, "", where)
    lines++
    at[lines] = hex(where)
    text[lines] = $0
    if ($2 ~ /^j/ && $3 ~ /^[0-9a-f]+$/ && hex($3) <= at[lines]) {
        jumps++
        from[jumps] = hex($3)
        to[jumps] = at[lines]
    }
}
END {
    finish()
    print loops + 0 " loops, " bad + 0 " with spilled vectors"
    exit loops < least || bad > 0
}'
