#!/bin/sh
# faults.sh HOW SFT FAULT.so SOURCE [PLUGIN]: ranks of the real espalier-sft, one of which fails in every way there is (fault.c).  Each time: the
# exit status, the line that names rank, step, call and layer, nobody left, and an end within the deadline and 5 seconds.
how=$1 sft=$2 fault=$3 source=$4 plugin=${5:-}
. "$(dirname "$0")/ranks.sh"
deadline=2
run="--model $source/examples/models/mix-moe --train $source/examples/tasks/mix-train.jsonl --steps 6 --prompts-per-step 6 --micro-batch-tokens 64"

# ranks DEADLINE FAULT OPTIONS..: three ranks; none of them may be left a second after the launcher has ended.
ranks() {
    seconds=$1
    export ESP_FAULT="$2" LD_PRELOAD="$fault" ASAN_OPTIONS=verify_asan_link_order=0
    shift 2
    # shellcheck disable=SC2086
    start "$seconds" 3 "$sft" $run "$@"
    unset ESP_FAULT LD_PRELOAD
}
says() {
    grep -qE "$1" "$out" || wrong "$what: nobody says \"$1\": $(said)"
}
# fails WHAT STATUSES FAULT: within the deadline and 5 seconds, the start of a launcher and two steps not counted.
fails() {
    what=$1
    ranks $deadline "$3"
    expect_failure "$what" "$2" $((deadline + 5 + 3))
}
line='rank [0-2] of 3 \([^)]*\), step 2, in "rows to the experts", layer 1 \(call [0-9]+\): ESP_ERR_COMM: '

fails "killed" '74|75|137' "1 kill rows..to..the..experts 1 2"
test "$how" = mpirun || says "${line}.*the connection to rank 1 is gone"
fails "left" '74|75|1|0' "1 exit rows..to..the..experts 1 2"
fails "stopped" 75 "1 stop rows..to..the..experts 1 2"
says "${line}.*the deadline passed while waiting"
says 'warning: rank [0-2] of 3 .* has waited for the other ranks for a quarter of its 2 s'
says 'rank [0-2], step 2: call [0-9]+, "rows to the experts", layer 1: .* failed'
says '^the job of 3 ranks ends with 75 after step 1'
fails "slow" 75 "2 delay rows..to..the..experts 1 2"
says "${line}.*the deadline passed while waiting"
fails "busy" 75 "1 busy rows..to..the..experts 1 2"
fails "a message that is short" '71|74|75' "1 short rows..to..the..experts 1 2"
fails "not finite" 76 "1 nan rows..to..the..experts 1 2"
says 'rank 1 of 3 .*, step 2, .*: ESP_ERR_NONFINITE: router logit of token'
says 'rank 0 of 3 .*, step 2, in "rows of every expert", layer 2 .*: ESP_ERR_NONFINITE: rank 1 failed before "the loss"'
fails "rank 0 killed" '74|75|137' "0 kill gradients..to..the..experts 2"

what="slow, but in time"
ranks 8 "2 delay rows..to..the..experts 1 2"
expect 0 40
says 'warning: rank [01] of 3 .* has waited'

what="no space"
ranks $deadline "1 full gradients -2 1" --checkpoint-every 2 --out "$work/full"
expect_failure "$what" 73 30
says 'rank [0-2] of 3 .*ESP_ERR_IO: .*No space left'

# alike WHAT KEY COMMAND..: rank 1 is started otherwise.
alike() {
    what=$1 key=$2
    shift 2
    start $deadline 3 sh -c 'rank=${OMPI_COMM_WORLD_RANK:-$ESP_RANK}; '"$*"
    count_left "^($sft|$work/other)"
    expect_failure "$what" 71 $((deadline + 8))
    says "rank [0-2] of 3 .*ESP_ERR_MISMATCH: .*$key is not the same on all ranks: rank 0 has [0-9a-f]+, rank 1 has [0-9a-f]+"
}
cp "$sft" "$work/other" && echo >>"$work/other"
alike "another program" "the program \(the file that runs\)" 'test $rank = 1 && exec '"$work/other $run; exec $sft $run"
alike "another seed" "model.seed" "exec $sft $run --seed \$((rank % 2))"
mkdir "$work/model" && cp "$source"/examples/models/mix-moe/* "$work/model" && echo >>"$work/model/config.json"
alike "another config.json" "config.json" 'test $rank = 1 && exec '"$sft $run --model $work/model; exec $sft $run"
alike "another environment" "ESP_CPU_ISA" 'test $rank = 1 && export ESP_CPU_ISA=generic; exec '"$sft $run"

what="goes on after a kill"
LD_PRELOAD='' OMP_NUM_THREADS=1 "$sft" $run --out "$work/whole" >/dev/null || wrong "$what: the run alone fails"
ranks $deadline "1 kill is..a..stop..asked..for -1 5" --checkpoint-every 2 --out "$work/cut"
expect_failure "$what" '74|75|137' 10
# shellcheck disable=SC2086
start 30 2 "$sft" $run --checkpoint-every 2 --resume "$work/cut" --out "$work/cut"
expect 0 30
says 'resumed from .* after step 4'
cmp "$work/whole/adapter/adapter_model.safetensors" "$work/cut/adapter/adapter_model.safetensors" || wrong "$what: another adapter"

what="wrong use"
ranks $deadline "-1 none" --stepz 3
expect_failure "$what" 64 10
says 'did you mean --steps'
what="too little memory"
ranks $deadline "-1 none" --eval "$source/examples/tasks/mix-eval.jsonl" --decode-rows 100000000
expect_failure "$what" 70 10
says 'rank [0-2] of 3 .*ESP_ERR_MEMORY: rank 0: a run takes up to [0-9]+ bytes here, all 3 ranks .* together [0-9]+, expected at most the [0-9]+ that are left \(/'
ranks $deadline "-1 none" --memory-limit 1000000
expect_failure "$what" 70 10
says 'ESP_ERR_MEMORY: rank 0: a run takes up to [0-9]+ bytes, expected at most esp_ctx_config.memory_limit, 1000000'
ranks $deadline "-1 none" --memory-limit 1000000 --ignore-memory
expect_failure "$what" 70 10
says 'ESP_ERR_MEMORY: rank 0: [0-9]+ bytes wanted'
what="no such model"
ranks $deadline "-1 none" --train "$work/none.jsonl"
expect_failure "$what" '73|65' 10
if test "$how" = mpirun; then
    fails "no room for messages" 73 "0 noroom"
    says '/dev/shm has [0-9]+ bytes left, expected'
fi
finish
