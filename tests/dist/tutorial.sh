#!/bin/sh
# Runs every command of examples/04_mpirun/README.md, in its order, in a folder of its own, and compares what it says is the same.
# Arguments: the folder of the programs, the sources, espalier_mpi.so or nothing.
how=mpirun programs=$1 source=$2 plugin=${3:-}
. "$(dirname "$0")/ranks.sh"
mkdir "$work/bin" && ln -s "$source/examples" "$work"
for program in espalier-sft espalier-grpo; do # the runs of the README have 60 steps
    printf '#!/bin/sh\nexec %s "$@" --steps 4\n' "$programs/$program" >"$work/bin/$program"
done
chmod +x "$work"/bin/*
cd "$work" || exit 1
awk '/^```sh$/ { inside = 1; n++; next } /^```$/ { inside = 0 } inside { print > sprintf("block-%02d.sh", n) }' "$source/examples/04_mpirun/README.md"
for block in block-*.sh; do
    PATH="$work/bin:$programs:$PATH" ESP_DEADLINE=60 sh -eu "$block" >output.log 2>&1 || wrong "$(cat "$block" output.log)"
done
for kind in sft grpo; do
    for ranks in 2 4; do
        cmp "out/$kind-1/adapter/adapter_model.safetensors" "out/$kind-$ranks/adapter/adapter_model.safetensors" || wrong "$kind: $ranks ranks end with another adapter"
    done
done
cmp out/sft-1/adapter/adapter_model.safetensors out/sft-hand/adapter/adapter_model.safetensors || wrong "by hand: another adapter"
finish
