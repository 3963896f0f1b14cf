#!/bin/bash
# Everything that needs a GPU, in under 9 minutes of its time: tests, sanitizers on small shapes, benchmarks.
#   tests/bench/gpu.sh pack BUILD DIR     where the compiler is: builds for the H100/H200 and puts all that a run needs into DIR
#   DIR/gpu.sh run RESULTS [PART..]       where the GPU is (needs nothing else but the driver and CUDA's libraries): RESULTS/gpu-*.json
#   tests/bench/gpu.sh all BUILD RESULTS  both, on one machine
# Parts: tests models ops sanitizers times; without any all of them, in this order.
# Bugs that were planted once, and what caught them: tests/cuda/planted.md.
set -u
here=$(cd "$(dirname "$0")" && pwd)
programs="tests/cuda/test_cuda_device tests/cuda/test_cuda_model tests/cuda/test_cuda_ops tests/bench/esp_bench_gpu
    tests/bench/esp_bench_gpu_ops tests/bench/esp_bench_gpu_experts tests/bench/esp_bench_gpu_experts_racecheck espalier"

pack() { # BUILD DIR
    root=$(cd "$here/../.." && pwd)
    cmake -S "$root" -B "$1" -DCMAKE_BUILD_TYPE=Release -DESPALIER_CUDA=ON -DESPALIER_DNNL=OFF -DESPALIER_CBLAS=OFF -DESPALIER_CURL=OFF \
        -DCMAKE_CUDA_ARCHITECTURES=90a-real >/dev/null || exit 1
    for program in $programs; do targets="${targets-} $(basename "$program" | sed s/^espalier$/espalier_cli/)"; done
    # shellcheck disable=SC2086  # a list of words
    cmake --build "$1" --parallel --target $targets || exit 1
    mkdir -p "$2/lib" "$2/configs"
    for program in $programs; do
        cp "$1/$program" "$2/" && strip "$2/$(basename "$program")"
        ldd "$1/$program" | awk '/=> \//{ print $3 }' |
            grep -vE '/(libc|libm|libpthread|libdl|librt|libresolv|libstdc\+\+|libgcc_s)\.so' | xargs -r -I{} cp -nL {} "$2/lib/"
    done
    cp -r "$root/tests/golden/data" "$2/"
    cp -r "$root"/tests/cli/configs/{qwen3-30b-a3b,gpt-oss-20b} "$2/configs/"
    cp "$here/gpu.sh" "$2/"
    git -C "$root" describe --always --dirty --abbrev=7 --match '' >"$2/commit"
}

failed=0
# step NAME SECONDS COMMAND..: its output to RESULTS/gpu-NAME.log, and one line of how it went.
step() {
    name=$1 limit=$2
    shift 2
    begin=$SECONDS
    timeout "$limit" stdbuf -oL "$@" >"$results/gpu-$name.log" 2>&1
    status=$?
    [ $status = 0 ] || [ $status = 77 ] || failed=1
    printf '%-28s %s in %d s\n' "$name" "$([ $status = 0 ] && echo passed || echo "exit status $status")" $((SECONDS - begin))
}

# record NAME COMMAND..: the JSON lines that the step of that name printed, with what they are of.
record() {
    name=$1
    shift
    {
        printf '{\n "commit": "%s",\n "device": "%s",\n "date": "%s",\n "command": "%s",\n "results": [\n' "$(cat "$here/commit")" "$device" \
            "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*"
        grep '^{' "$results/gpu-$name.log" | sed '$!s/$/,/; s/^/  /'
        printf ' ]\n}\n'
    } >"$results/gpu-$name.json"
}

# bench NAME SECONDS COMMAND..
bench() {
    step "$@"
    shift
    shift
    record "$name" "$@"
}

part_tests() {
    step device 60 ./test_cuda_device
    step model 90 ./test_cuda_model data
    step verify 60 ./espalier verify --device cuda data
}

part_models() {
    for shape in "qwen3-30b-a3b nf4 6" "gpt-oss-20b mxfp4 0"; do
        # shellcheck disable=SC2086  # three words
        set -- $shape
        bench "$1" 60 ./esp_bench_gpu "configs/$1" "experts=$2" adam8=1 decode=64 profile=1
        bench "$1-recomputed" 40 ./esp_bench_gpu "configs/$1" "experts=$2" adam8=1 budget=1 steps=5
        bench "$1-least-memory" 40 ./esp_bench_gpu "configs/$1" "experts=$2" host_moments=1 "host_layers=$3" budget=1 steps=5
        bench "$1-512" 40 ./esp_bench_gpu "configs/$1" "experts=$2" adam8=1 sequences=1 tokens=512 busy=1
        bench "$1-4x2048" 40 ./esp_bench_gpu "configs/$1" "experts=$2" adam8=1 sequences=4 steps=5
    done
}

part_ops() {
    step ops 90 ./test_cuda_ops
    step experts-exact 30 ./esp_bench_gpu_experts exact
    step experts-check 60 ./esp_bench_gpu_experts check
}

# A model of all ops; experts as they are tiled for few and for many rows, in the formats that have kernels of their own; attention over many
# steps of keys.
part_sanitizers() {
    for tool in memcheck racecheck initcheck; do
        checked="compute-sanitizer --tool $tool --error-exitcode 9 --report-api-errors no"
        # shellcheck disable=SC2086  # words
        step $tool-model 60 $checked ./test_cuda_model data q3c once
        experts=esp_bench_gpu_experts
        [ $tool != racecheck ] || experts=esp_bench_gpu_experts_racecheck # tests/cuda/planted.md says why
        for layer in nf4-r16 nf4-few-and-many mxfp4-r16-clamped mxfp4-few-rows; do
            # shellcheck disable=SC2086  # words
            step $tool-$layer 40 $checked ./$experts check $layer
        done
        # shellcheck disable=SC2086  # words
        step $tool-attention 40 $checked ./test_cuda_ops attention_bwd "one sequence"
    done
}

part_times() {
    bench ops-times 90 ./esp_bench_gpu_ops
    for shape in "qwen3-30b-a3b nf4" "qwen3-30b-a3b mxfp4" "gpt-oss-20b mxfp4"; do
        # shellcheck disable=SC2086  # two words
        bench "experts-${shape/ /-}" 60 ./esp_bench_gpu_experts time $shape 64 512 2048 4096 16384
        # shellcheck disable=SC2086  # two words
        bench "busy-${shape/ /-}" 20 ./esp_bench_gpu_experts busy $shape 64 512 2048
    done
}

run() { # RESULTS [PART..]
    cd "$here" || exit 1
    results=$1
    mkdir -p "$results"
    export LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    device=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
    [ -n "$device" ] || { echo "no GPU here: nvidia-smi names none"; exit 77; }
    chmod +x ./*
    shift
    [ $# -gt 0 ] || set -- tests models ops sanitizers times
    for part; do
        begun=$SECONDS
        "part_$part"
        printf '%-28s %d s\n' "== $part" $((SECONDS - begun))
    done
    echo "$SECONDS s of the GPU's time"
    exit $failed
}

case ${1-} in
pack) pack "$2" "$3" ;;
run)
    shift
    run "$@"
    ;;
all)
    pack "$2" "$2/gpu"
    exec "$2/gpu/gpu.sh" run "$(mkdir -p "$3" && cd "$3" && pwd)"
    ;;
*)
    sed -n '2,7p' "$0"
    exit 2
    ;;
esac
