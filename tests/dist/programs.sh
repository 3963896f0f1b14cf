#!/bin/sh
# programs.sh HOW GRPO SFT SOURCE [PLUGIN]: the programs as real processes, started by hand or by mpirun: on any number of ranks they write
# the adapter, metrics and completions of one process, and go on from each other's checkpoints.
how=$1 grpo=$2 sft=$3 source=$4 plugin=${5:-}
. "$(dirname "$0")/ranks.sh"

model=$source/examples/models/mix-moe
head -n 6 "$source/examples/tasks/mix-eval.jsonl" >"$work/eval.jsonl"
few="--eval $work/eval.jsonl --eval-every 2 --eval-samples 2 --micro-batch-tokens 60 --checkpoint-every 2 --seed 3"
few_grpo="--model $model --train $source/examples/tasks/mix-prompts.jsonl --prompts-per-step 4 --group-size 4 $few"
few_sft="--model $model --train $source/examples/tasks/mix-train.jsonl --prompts-per-step 5 $few"

# timeless FILE: without memory and clocks, which end a line
timeless() {
    sed 's/,"mem\/peak_bytes".*//' "$1"
}
# same DIR WANTED WHAT
same() {
    for name in adapter/adapter_model.safetensors adapter/adapter_config.json completions.jsonl; do
        test ! -f "$2/$name" || cmp -s "$1/$name" "$2/$name" || wrong "$3: $name is another"
    done
    timeless "$1/metrics.jsonl" >"$work/got"
    timeless "$2/metrics.jsonl" >"$work/want"
    cmp -s "$work/got" "$work/want" || wrong "$3: metrics are others: $(diff "$work/got" "$work/want" | head -c 600)"
    test "$(grep -c '^result: ' "$out")" = 1 || wrong "$3: $(grep -c '^result: ' "$out") results are told"
}

$grpo $few_grpo --steps 4 --out "$work/grpo1" >"$work/alone" || wrong "one process: $(cat "$work/alone")"
$sft $few_sft --steps 3 --out "$work/sft1" >"$work/alone" || wrong "one process: $(cat "$work/alone")"
for ranks in 2 3; do
    start 30 $ranks "$grpo" $few_grpo --steps 4 --out "$work/grpo$ranks"
    expect 0 50
    same "$work/grpo$ranks" "$work/grpo1" "GRPO on $ranks ranks"
done
start 30 2 "$grpo" $few_grpo --steps 4 --out "$work/copies" --expert-ranks 1
expect 0 50
same "$work/copies" "$work/grpo1" "GRPO on 2 ranks that hold all experts"
start 30 4 "$sft" $few_sft --steps 3 --out "$work/sft4" --expert-ranks 2
expect 0 50
same "$work/sft4" "$work/sft1" "SFT on 4 ranks, experts over 2"

start 30 2 "$grpo" $few_grpo --steps 2 --out "$work/half"
expect 0 50
start 30 3 "$grpo" $few_grpo --steps 4 --resume "$work/half" --out "$work/half"
expect 0 50
same "$work/half" "$work/grpo1" "2 steps on 2 ranks, 2 more on 3"

# One rank hears of the signal; all stop at the same step, and save.
if test "$how" = hand; then
    rm -rf "$work/meet" && mkdir "$work/meet"
    for rank in 0 1; do
        ESP_DEADLINE=30 ESP_WORLD=2 ESP_RANK=$rank ESP_RENDEZVOUS=file:$work/meet \
            timeout -k 5 60 "$grpo" $few_grpo --steps 500 --out "$work/stopped" >"$work/rank$rank" 2>&1 &
        eval "pid$rank=$!"
    done
    tries=0
    until test "$(cat "$work/stopped/metrics.jsonl" 2>/dev/null | wc -l)" -gt 2 || test $tries = 300; do
        tries=$((tries + 1))
        sleep 0.1
    done
    kill -TERM "$pid1"
    wait "$pid0"
    code0=$?
    wait "$pid1"
    code1=$?
    # timeout passes the signal on.
    test "$code0" = 143 || wrong "rank 0 ends with $code0, expected 143: $(cat "$work/rank0")"
    test "$code1" = 143 || wrong "rank 1 ends with $code1, expected 143: $(cat "$work/rank1")"
    grep -q '^signal 15: stopped after step .*, saved' "$work/rank0" || wrong "nothing tells of the signal: $(tail -n 3 "$work/rank0")"
    test -f "$work/stopped/checkpoint.h5" || wrong "nothing was saved"
fi
finish
