#!/bin/sh
# ranks.sh RANKS DATA [RECORD]: several ranks on GPUs (tests/cuda/ranks.c) do what one does, bit for bit, over NCCL and through the host.
# DATA: tests/golden/data.  Lines of results go to RECORD.  With one GPU the ranks share it, which takes NCCL 2.30; ESP_NCCL or the loader's path
# says where NCCL is.
# The norm alone is another in its last bits: one rank on a GPU takes the squares of neighbouring tensors in one piece, several ranks take
# every tensor and expert by itself.  It is the same for every number of ranks from 2, and within 1e-14 of that of one.
program=$1 data=$2 record=${3:-/dev/null}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
test "$gpus" -gt 0 || { echo "skipped: no GPU here" && exit 77; }
export NCCL_MULTI_RANK_GPU_ENABLE=1 NCCL_NVLS_ENABLE=0 ESP_DEADLINE="${ESP_DEADLINE:-30}"
failures=0

# start RANKS ARGUMENTS..: the job; its output in $work/out, the status of the first rank that failed in $status.
start() {
    n=$1 pids='' status=0
    shift
    rm -rf "$work/meet" "$work"/rank* && mkdir "$work/meet"
    rank=0
    while [ $rank -lt "$n" ]; do
        ESP_WORLD=$n ESP_RANK=$rank ESP_RENDEZVOUS=file:$work/meet \
            timeout -k 5 60 "$program" "$@" >"$work/rank$rank" 2>&1 &
        pids="$pids $!"
        rank=$((rank + 1))
    done
    for pid in $pids; do
        wait "$pid"
        code=$?
        [ $code = 0 ] || [ $status != 0 ] || status=$code
    done
    cat "$work"/rank* >"$work/out"
    grep '^{' "$work/out" >>"$record"
}
digest() { sed -n 's/.*"digest": "\(.*\)".*/\1/p' "$work/out"; }
norm() { sed -n 's/.*"norm": \([^,]*\),.*/\1/p' "$work/out"; }
but_the_norm() { echo "$1" | sed 's/ norm [0-9a-f]*//'; }
close() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a > 0 && (a - b) / a < 1e-14 && (b - a) / a < 1e-14) }'; }
wrong() {
    failures=$((failures + 1))
    echo "WRONG $1: exit status $status"
    cat "$work/out"
}

# alike NAME ARGUMENTS..: 2 and 4 ranks, in every spread, against one.
alike() {
    name=$1
    shift
    start 1 step "$@" spread=1
    want=$(digest) want_norm=$(norm) several=''
    [ -n "$want" ] || wrong "$name, alone"
    for cut in 2/1 2/2 4/1 4/2 4/4; do
        start ${cut%/*} step "$@" spread=${cut#*/}
        several=${several:-$(digest)}
        if [ $status = 0 ] && [ "$(digest)" = "$several" ] && [ "$(but_the_norm "$several")" = "$(but_the_norm "$want")" ] &&
            close "$(norm)" "$want_norm"; then
            echo "same  $name, ranks/spread $cut"
        else
            wrong "$name, ranks/spread $cut, expected $want"
        fi
    done
}

start 2 exchange
[ $status != 77 ] || { echo "skipped: no GPU, or a build without one" && exit 77; }
[ $status = 0 ] && echo "same  rows of 2 ranks" || wrong "rows of 2 ranks"
start 4 exchange
[ $status = 0 ] && echo "same  rows of 4 ranks" || wrong "rows of 4 ranks"
alike q3a "$data/q3a/model"
alike go1 "$data/go1/model" router=1 batches=5
alike "q3a in rounds" "$data/q3a/model" rows=8
"$program" make "$work/mid" && alike mid "$work/mid" tokens=700 batches=4 steps=2
ESP_DEVICE_EXCHANGE=host
export ESP_DEVICE_EXCHANGE
start 2 exchange bytes=16777216
[ $status = 0 ] && echo "same  rows of 2 ranks through the host" || wrong "rows of 2 ranks through the host"
alike "q3a through the host" "$data/q3a/model" batches=4
unset ESP_DEVICE_EXCHANGE
ESP_NCCL=/nowhere/libnccl.so.2
export ESP_NCCL
start 2 step "$data/q3a/model"
if [ $status = 64 ] && grep -q 'ESP_DEVICE_EXCHANGE=host' "$work/out"; then echo "right without NCCL"; else wrong "without NCCL"; fi
[ $failures = 0 ]
