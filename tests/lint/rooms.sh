#!/bin/sh
# Who may include and call what: design section 2.
. "$(dirname "$0")/lib.sh"

code src >"$offences.src"
code kernels >"$offences.kernels"

# src reaches kernels by the contract only; kernels reach nothing of src but the status sentence.
grep -E '#include "kernels/' "$offences.src" | grep -vE '"kernels/(backend\.h|ops\.h|ops\.def|plain\.h)"' |
    forbid "src/ knows only backend.h, ops.h, ops.def and plain.h of kernels/" '.'
grep -E '#include "' "$offences.kernels" | grep -vE '"(kernels/[^"]*|espalier/(tensor|status)\.h|core/status\.h|[^"/]*)"' |
    forbid "kernels/ includes kernels/, espalier/tensor.h and core/status.h" '.'

# No room calls back up.
closed() { # closed ROOMS NOT-ITS-BUSINESS
    grep -E "^src/($1)/" "$offences.src" | forbid "this room is none of its business" "#include \"($2)/"
}
closed core 'contract|forward|backward|optim|quant|models|dist|rl|cli'
grep -E '^src/core/' "$offences.src" | grep -v '"io/machine\.h"' | forbid "of io, core takes what the machine says of itself alone" '#include "io/'
closed dist 'contract|forward|backward|optim|quant|models|rl|cli'
grep -E '^src/dist/' "$offences.src" | grep -vE '"io/(file|machine)\.h"' | forbid "of io, dist takes the door to files and what the machine says of itself alone" '#include "io/'
closed quant 'contract|forward|backward|optim|models|dist|io|rl|cli'
closed 'contract|forward|backward' 'optim|io|rl|cli'
closed optim 'contract|forward|backward|io|rl|cli'
closed io 'contract|forward|backward|optim|rl|cli'
closed models 'rl|cli'
closed rl 'cli'
grep -v '^src/dist/' "$offences.src" | grep -v '"dist/share\.h"' | forbid "of dist, others take share.h alone" '#include "dist/'

# One room each for files, ranks and rewards.
grep -v '^src/io/' "$offences.src" | forbid "only src/io opens files" \
    '\b(fopen|freopen|fdopen|open|openat|creat|opendir|mkstemp|mkdtemp|tmpfile|mmap|unlink|rename|mkdir)[ ]*\(|#include [<"]hdf5'
cat "$offences.kernels" | forbid "kernels open no files" '\b(fopen|open|mmap)[ ]*\('
grep -v '^src/dist/' "$offences.src" | forbid "only src/dist knows a rank" '\besp_comm_(rank|size)\b|\bMPI_|#include [<"](mpi|nccl)'
grep -vE '^src/(rl|cli)/' "$offences.src" | forbid "only src/rl knows a reward" '\besp_reward|#include "(espalier/trainer|rl/)'
rm -f "$offences.src" "$offences.kernels"
finish
