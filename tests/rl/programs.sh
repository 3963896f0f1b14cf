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
    refused "preset: got \"ppo\", expected trl-default" $model $prompts --preset ppo
    refused "mask_truncated together with overlong_share makes no sense" $model $prompts --preset dapo --mask-truncated
    refused "plot: set without --out" $model $prompts --plot "$work/x.svg"
    refused "seed: got -1, expected a whole number from 0 to 18446744073709551615" $model $prompts --seed -1
    refused "seed: got 18446744073709551616" $model $prompts --seed 18446744073709551616
    refused "mxfp4_rule: got up" $model $prompts --mxfp4-rule up
    refused "reward no-such: .*expected one of exact" $model $prompts --reward no-such
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
    has "step   2/2  reward .* exact .* clip .* length .* tok/s  ETA 0:0" "the line of a step"
    tail -n 1 "$work/out" | grep -qE '^result: before_sampled=none before_greedy=none after_sampled=none after_greedy=none steps=2 step_seconds_median=[0-9.]+ peak_bytes=([0-9]+) planned_bytes=\1$' || say "result line"
    grep -q '"learning_rate":0.001,' "$work/run/metrics.jsonl" || say "an option does not win over the config file"
    echo '{"stepz": 2}' >"$work/c.json" && refused 'unknown key "stepz"; did you mean "steps"' $model $prompts --config "$work/c.json"
    echo '{"steps": "2"}' >"$work/c.json" && refused "steps: got another type, expected a whole number" $model $prompts --config "$work/c.json"
    echo '{"steps": 2' >"$work/c.json" && refused "c.json:" $model $prompts --config "$work/c.json"

    # The evaluation before the first step has a line of its own.
    "$grpo" $model $prompts --eval "$source/examples/tasks/mix-eval.jsonl" --steps 1 --prompts-per-step 2 --eval-samples 1 --keep-best \
        --out "$work/evaluated" >"$work/out" 2>&1 || say "an evaluated run fails"
    has "^before: sampled exact 0" "evaluation" && has "result: before_sampled=0.[0-9]* before_greedy=0.[0-9]* after_sampled=0" "evaluation"
    [ "$(grep -c '"step":0' "$work/evaluated/metrics.jsonl")" = 1 ] || say "not one line of metrics for step 0"
    [ -f "$work/evaluated/adapter-best/adapter_model.safetensors" ] || say "no best adapter"

    # A config's preset lies under its other keys, and those under the line; the whole range of seeds.
    echo '{"preset": "dapo", "resample_tries": 1, "seed": "18446744073709551615", "reward": ["exact", "0.2*match"]}' >"$work/c.json"
    "$grpo" $model $prompts --config "$work/c.json" --epsilon-high 0.3 --dry-run >"$work/out" 2>&1 || say "--dry-run fails"
    has "epsilon_high *0.3 *option" "dry run" && has "epsilon_low *0.2 *preset" "dry run" && has "resample_tries *1 *config" "dry run"
    has "seed *18446744073709551615 *config" "dry run" && has "reward *exact, 0.2\*match *config" "dry run"
    has "plan: 60 steps of 128 completions (16 prompts, 8 each)" "dry run" && has "memory: [0-9]* bytes planned" "dry run"
    grep -q "^step" "$work/out" && say "--dry-run trains"
    "$grpo" $model $prompts --steps 2 --prompts-per-step 2 --seed 18446744073709551615 --reward exact --reward "0.5*length(target=6)" \
        --mxfp4-rule round_up --experts mxfp4 --out "$work/two" --plot "$work/live.svg" >"$work/out" 2>&1 || say "two rewards fail"
    grep -q '"rewards/length/mean":' "$work/two/metrics.jsonl" || say "a reward of the line is not logged"
    grep -q "</svg>" "$work/live.svg" || say "no live plot"
    grep -qE "nan|inf" "$work/two/metrics.jsonl" && say "metrics with a number that is none"
    if [ -w /dev/full ]; then
        "$grpo" $model $prompts --steps 1 --prompts-per-step 2 >/dev/full 2>"$work/out"
        [ $? -eq 73 ] || say "a full standard output: another exit status"
        has "standard output could not be written" "full output"
    fi

    # What the library has to say is told while it waits for a server; a signal then ends the run like any other.
    "$grpo" $model $prompts --server http://127.0.0.1:1 --server-adapter-dir "$work/unused" --server-retries 1000 >"$work/out" 2>&1 &
    pid=$!
    until grep -q "^warning: try 1 of 1001 failed" "$work/out" || ! kill -0 $pid; do sleep 0.1; done
    if ! grep -q "ESP_ERR_UNSUPPORTED" "$work/out"; then # it has libcurl
        kill -TERM $pid && wait $pid
        [ $? -eq 143 ] || say "SIGTERM before the first step: another exit status"
        has "signal 15: stopped before the run began" "SIGTERM before the first step"
    fi

    # Every name that dashboards know has its number in a step that has all of it.
    "$grpo" $model $prompts --steps 2 --prompts-per-step 4 --preset cispo --updates-per-batch 2 --beta 0.01 --correction tis --router-aux-coef 0.001 \
        --reward exact --out "$work/names" >"$work/out" 2>&1 || say "a run with everything fails"
    tail -n 1 "$work/names/metrics.jsonl" >"$work/out"
    for name in reward reward_std frac_reward_zero_std rewards/exact/mean rewards/exact/std kl entropy policy_loss entropy_coef aux_loss \
        clip_ratio/low_mean clip_ratio/low_min clip_ratio/high_mean clip_ratio/high_max clip_ratio/region_mean cispo_clip_ratio \
        completions/mean_length completions/min_length completions/max_length completions/mean_terminated_length \
        completions/min_terminated_length completions/max_terminated_length completions/clipped_ratio num_tokens step_time \
        sampling/sampling_logp_difference/mean sampling/sampling_logp_difference/max sampling/importance_sampling_ratio/min \
        sampling/importance_sampling_ratio/mean sampling/importance_sampling_ratio/max rollout_is_eff_sample_size k3_kl ppl_ratio \
        chi2_token chi2_seq moe/max_vio moe/min_vio moe/avg_vio moe/route_flip_rate skip/zero_adv_frac mem/peak_bytes time/sample \
        time/reward time/logp time/fwd time/bwd time/optim time/sync; do
        has "\"$name\":[-0-9]" "metrics"
    done

    # What is recorded is trained on again; which correction it gets is said, and what a file does not tell is not shown.
    "$grpo" $model $prompts --steps 1 --prompts-per-step 2 --save-rollouts "$work/kept" >"$work/out" 2>&1 || say "--save-rollouts fails"
    "$grpo" $model --rollouts "$work/kept" --steps 1 --prompts-per-step 2 >"$work/out" 2>&1 || say "--rollouts fails"
    has "correction tis of rho = exp(old - sampler) on 100.0 % of the counted tokens" "--rollouts"
    has "^step   1/1  reward [0-9.]*  kl" "--rollouts"

    "$grpo" $model $prompts --steps 100000 --prompts-per-step 2 --out "$work/long" >"$work/long.log" 2>&1 &
    pid=$!
    until grep -q "step   3" "$work/long.log" || ! kill -0 $pid; do sleep 0.1; done
    refused "another run writes into this folder" $model $prompts --steps 1 --out "$work/long"
    kill -TERM $pid && wait $pid
    [ $? -eq 143 ] || say "SIGTERM: another exit status"
    cp "$work/long.log" "$work/out"
    has "saved; go on with --resume" "SIGTERM"
    done_steps=$(sed -n 's/.*stopped after step \([0-9]*\),.*/\1/p' "$work/out")
    "$grpo" $model $prompts --steps $((done_steps + 1)) --prompts-per-step 2 --resume "$work/long" --out "$work/long" >"$work/out" 2>&1 || say "resume fails"
    has "after step $done_steps" "resume"
    has "result: .*steps=$((done_steps + 1)) " "resume"
}
exit $failed
