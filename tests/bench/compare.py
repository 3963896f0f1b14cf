#!/usr/bin/env python3
"""Processor seconds of a GRPO step of the demo, espalier-grpo against reference_loop.py: rounds of both in turn, one thread each, as JSON.

usage: compare.py BUILD OUT.json [ROUNDS]     run from the top of the repository, by a Python that has torch

Ours is user plus system time of a run of 9 steps less that of a run of 1 step, over 8: the early steps, in which almost no group is skipped; and the
same for the demo's 60 steps over 59, where more and more groups have no spread in reward and are left out, exactly.  The reference loop skips nothing,
so its early steps stand for all.
"""
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile

MODEL, TRAIN = "examples/models/mix-moe", "examples/tasks/mix-prompts.jsonl"
STEPS = 9
RUN = 60


def processor_seconds(command, threads):
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        sys.exit(f"{command[0]} ended with status {status}")
    return usage.ru_utime + usage.ru_stime


def our_step(build, threads, steps=STEPS):
    with tempfile.TemporaryDirectory() as out:
        run = lambda steps: processor_seconds([build + "/espalier-grpo", "--model", MODEL, "--train", TRAIN, "--steps", str(steps), "--seed", "0", "--out", f"{out}/{steps}"], threads)
        return (run(steps) - run(1)) / (steps - 1)


def reference_step():
    text = subprocess.run([sys.executable, "tests/bench/reference_loop.py", "--model", MODEL, "--train", TRAIN, "--steps", str(STEPS)],
                          capture_output=True, text=True, check=True).stdout
    found = re.search(r"reference: (torch \S+), .* best (\S+), median (\S+)", text)
    if not found:
        sys.exit(text.strip())
    return found[1], float(found[2]), float(found[3])


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    build, path = sys.argv[1:3]
    ours, run, two_threads, best, median = [], [], [], [], []
    for _ in range(int(sys.argv[3]) if len(sys.argv) == 4 else 5):
        ours.append(our_step(build, 1))
        torch, *seconds = reference_step()
        best.append(seconds[0])
        median.append(seconds[1])
        run.append(our_step(build, 1, RUN))
        two_threads.append(our_step(build, 2, RUN))
    middle = lambda values: sorted(values)[len(values) // 2]
    cpu = next(line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    result = {"date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": commit, "cpu": cpu,
              "load_average": os.getloadavg()[0], "reference": torch, "espalier_early_step": ours, "espalier_run_step": run,
              "espalier_run_step_two_threads": two_threads,
              "reference_step_best": best, "reference_step_median": median,
              "ratio_early": middle(median) / middle(ours), "ratio_run": middle(median) / middle(run),
              "ratio_run_two_threads": middle(median) / middle(two_threads)}
    json.dump(result, open(path, "w"), indent=1)
    print(json.dumps(result, indent=1))


main()
