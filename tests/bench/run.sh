#!/bin/sh
# What `make bench` runs: esp_bench on one thread with a JSON file beside the build, experts and what is not one in the shapes of public peers, then the PyTorch loop that the GRPO step is compared with.
set -eu
cd "$(dirname "$0")/../.."
build=${BUILD:-build/release}
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
"$build/tests/bench/esp_bench" --model examples/models/mix-moe --json "$build/bench.json" --commit "$commit" "$@"
for part in experts dense; do
    "$build/tests/bench/esp_bench_$part" --json "$build/bench-$part.json" --commit "$commit"
done
echo "written: $build/bench.json, bench-experts.json, bench-dense.json; beside public peers: tests/bench/peers.py"
${PYTHON:-python3} tests/bench/reference_loop.py --model examples/models/mix-moe --train examples/tasks/mix-prompts.jsonl
