#!/bin/sh
# Every lint is able to fail: one faulty tree for each offence.   selftest.sh (no argument)
set -eu
lints=$(cd "$(dirname "$0")" && pwd)
tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
bad=0

# A clean tree, which every lint passes.
reset() {
    rm -rf "${tree:?}"/*
    mkdir -p "$tree/src/core" "$tree/src/io" "$tree/src/rl" "$tree/src/forward" "$tree/src/backward" "$tree/src/contract" "$tree/kernels/cpu" "$tree/include/espalier"
    write src/forward/x.c '/* Forward of x.  Twin: backward/x.c. */' '#include "contract/x.h"' 'int f;'
    write src/backward/x.c '/* Backward of x.  Twin: forward/x.c. */' '#include "contract/x.h"' 'int b;'
    write src/contract/x.h '/* x */'
    write src/core/a.c '/* exit(1) in a comment, and */' '#include "core/a.h"' 'const char *s = "exit(1); printf(1) fopen(1)"; // abort()'
    write src/io/f.c '/* f */' '#include <hdf5.h>' 'void f(void) { fopen(0, 0); }'
    write kernels/cpu/k.c '/* k */' '#include "kernels/ops.h"' 'int k;'
    write include/espalier/p.h '/// p' '#include <stddef.h>' 'int esp_p(size_t n);'
}

write() { # write FILE LINE..
    file=$tree/$1
    shift
    printf '%s\n' "$@" >"$file"
}

# expect STATUS LINT WHAT: the lint's exit status on the tree as it is.
expect() {
    status=0
    "$lints/$2.sh" "$tree" >"$tree/output" 2>&1 || status=$?
    if [ "$status" != "$1" ] && [ "$status" != 77 ]; then
        echo "$2.sh on \"$3\": exit status $status, expected $1"
        cat "$tree/output"
        bad=1
    fi
}

# offence LINT FILE LINE..: one faulty file in an otherwise clean tree.
offence() {
    lint=$1 name=$2
    shift
    reset
    write "$@"
    shift
    expect 1 "$lint" "$name: $*"
}

reset
for lint in twins quiet rooms files headers format; do expect 0 $lint "a clean tree"; done

offence twins src/forward/y.c '/* Forward of y.  Twin: backward/y.c. */'
offence twins src/backward/y.c '/* Backward of y.  Twin: forward/y.c. */'
offence twins src/forward/x.c '/* Forward of x. */' '#include "contract/x.h"'
offence twins src/backward/x.c '/* Backward of x.  Twin: forward/x.c. */'
for call in 'exit(1)' 'abort()' 'assert(0)' 'printf("x")' 'fprintf(stderr, "x")' 'puts("x")' 'perror("x")' 'fork()'; do
    offence quiet src/core/a.c '/* a */' "void a(void) { $call; }"
    offence quiet kernels/cpu/k.c '/* k */' "void a(void) { $call; }"
done
offence rooms src/core/a.c '/* a */' '#include "kernels/cpu/k.h"'
offence rooms src/core/a.c '/* a */' '#include "kernels/common.h"'
offence rooms src/core/a.c '/* a */' '#include "models/model.h"'
offence rooms src/core/a.c '/* a */' '#include <hdf5.h>'
offence rooms src/core/a.c '/* a */' 'void a(void) { fopen(0, 0); }'
offence rooms src/core/a.c '/* a */' 'int a(void) { return esp_comm_rank(0); }'
offence rooms src/forward/x.c '/* x */' '#include "rl/trainer.h"'
offence rooms src/backward/x.c '/* x */' '#include "io/file.h"'
offence rooms src/io/f.c '/* f */' 'int a = esp_reward_exact;'
offence rooms kernels/cpu/k.c '/* k */' '#include "core/ctx.h"'
offence rooms kernels/cpu/k.c '/* k */' 'void a(void) { fopen(0, 0); }'
offence files src/core/a.c 'int a;'
offence files src/core/a.c '/* a */' '/* TODO */'
offence headers include/espalier/p.h '/// p' 'size_t esp_p(void);'
offence headers include/espalier/p.h '/// p' 'int esp_p(int class);'
offence headers include/espalier/p.h '/// p' '#include <omp.h>'
cp "$lints/../../.clang-format" "$tree/"
offence format src/core/a.c '/* a */' 'int   a ;'
exit $bad
