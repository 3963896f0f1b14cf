#!/bin/sh
# espalier-grpo and espalier-sft: help, refusals with a suggestion, config files under options, the result line, SIGTERM and resume.
set -u
grpo=$1 sft=$2 source=$3
work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT
failed=0
model="--model $source/examples/models/mix-moe"
prompts="--train $source/examples/tasks/mix-prompts.jsonl"

say() { echo "FAILED: $*" && failed=1; }
has() { grep -qe "$1" "$work/out" || { say "$2: no \"$1\" in:" && cat "$work/out"; }; }
refused() { # refused WORDS ARGUMENTS..
    words=$1 && shift
    "$grpo" "$@" >"$work/stdout" 2>"$work/out" && say "accepted: $*"
    has "$words" "$*"
}

"$grpo" --help >"$work/out" || say "--help fails"
has "--shuffle-rewards" "--help"
"$sft" --help >"$work/out" || say "--help fails"
grep -q -e "--shuffle-rewards" "$work/out" && say "espalier-sft offers rewards"

# shellcheck disable=SC2086
{
    refused "did you mean --shuffle_rewards" $model $prompts --shufle-rewards
    refused "did you mean --steps" $model $prompts --stepz 3
    refused "temperature: got 0, expected a positive number" $model $prompts --temperature 0
    refused "lr: got x, expected a number" $model $prompts --lr x
    refused "lr: got 1e-46, expected a number that a float can hold" $model $prompts --lr 1e-46
    refused "lr: got 1e+39, expected a number that a float can hold" $model $prompts --lr 1e39
    refused "loss: got ppo" $model $prompts --loss ppo
    refused "expected a value" $model $prompts --steps
    refused "model: got nothing" $prompts
    refused "train: got nothing" $model
    refused "no-such" $model --train "$work/no-such.jsonl"

    echo '{"steps": 2, "prompts_per_step": 2, "lr": 0.5, "shuffle_rewards": true}' >"$work/c.json"
    "$grpo" $model $prompts --config "$work/c.json" --lr=0.001 --group-size 2 --out "$work/run" >"$work/out" 2>&1 || say "a config file fails"
    has "step   2/2" "config"
    has "plot: $work/run/metrics.svg" "config"
    tail -n 1 "$work/out" | grep -qE '^result: before_sampled=[^ ]+ before_greedy=[^ ]+ after_sampled=[^ ]+ after_greedy=[^ ]+ steps=2 step_seconds_median=[0-9.]+ peak_bytes=([0-9]+) planned_bytes=\1$' || say "result line"
    grep -q '"learning_rate":0.001,' "$work/run/metrics.jsonl" || say "an option does not win over the config file"
    echo '{"stepz": 2}' >"$work/c.json" && refused 'unknown key "stepz"; did you mean "steps"' $model $prompts --config "$work/c.json"
    echo '{"steps": "2"}' >"$work/c.json" && refused "steps: got another type, expected a whole number" $model $prompts --config "$work/c.json"
    echo '{"steps": 2' >"$work/c.json" && refused "c.json:" $model $prompts --config "$work/c.json"

    "$grpo" $model $prompts --steps 100000 --prompts-per-step 2 --out "$work/long" >"$work/out" 2>&1 &
    pid=$!
    until grep -q "step   3" "$work/out" || ! kill -0 $pid; do sleep 0.1; done
    kill -TERM $pid && wait $pid
    [ $? -eq 143 ] || say "SIGTERM: another exit status"
    has "saved; go on with --resume" "SIGTERM"
    done_steps=$(sed -n 's/.*stopped after step \([0-9]*\),.*/\1/p' "$work/out")
    "$grpo" $model $prompts --steps $((done_steps + 1)) --prompts-per-step 2 --resume "$work/long" --out "$work/long" >"$work/out" 2>&1 || say "resume fails"
    has "after step $done_steps" "resume"
    has "result: .*steps=$((done_steps + 1)) " "resume"
}
exit $failed
