#!/usr/bin/env python3
"""How far `espalier plan --ranks` is from measured micro-batches of one rank, of two and of four, on this machine's CPU: weak scaling, every rank has as many
tokens however many ranks there are.

usage: scaling.py BUILD OUT.json [ROUNDS [CASE...]]     run from the top of the repository

A CASE is PROCESSESxS, S being over how many ranks the experts are spread, 0: jobs of one rank each that compute at the same time.  All: 1x0 2x0 2x1 2x2 4x1
4x2 4x4.  Of what OUT.json has already and of what is measured anew the shorter time is kept, so a busy machine can be measured in parts and again.

A small model of the shape of Qwen3-MoE, one thread a rank.  The constants of the plan come from messages by themselves between two ranks (seconds of a call, bytes a
second), and from two jobs of one rank that compute at the same time, at three numbers of tokens (operations and weights a second).  No micro-batch of several
ranks has a part in them: those, and the fourth number of tokens, are held out and predicted.  More ranks than cores share these: each then computes as much slower;
they are told apart.
"""
import datetime
import json
import os
import subprocess
import sys
import tempfile

TOKENS = [32, 64, 128, 256]
FITTED = [32, 64, 256]
CASES = ["1x0", "2x0", "2x1", "2x2", "4x1", "4x2", "4x4"]
SHAPE = {"model_type": "qwen3_moe", "hidden_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
         "moe_intermediate_size": 512, "intermediate_size": 2048, "num_experts": 32, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 4096,
         "max_position_embeddings": 40960, "rope_theta": 1000000.0, "hidden_act": "silu", "torch_dtype": "bfloat16"}
MPI = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_hwloc_base_binding_policy": "none",
       "OMPI_MCA_rmaps_base_oversubscribe": "1", "OMPI_MCA_mpi_yield_when_idle": "1", "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
       "OMP_NUM_THREADS": "1"}


def measure(build, config, case, rounds):
    processes, expert_ranks = case.split("x")
    command = [build + "/tests/bench/esp_bench_scaling", config, expert_ranks, str(rounds), *map(str, TOKENS)]
    environment = {**os.environ, **MPI, "ESP_MPI_PLUGIN": build + "/espalier_mpi.so"}
    run = subprocess.run(["mpirun", "-n", processes, *command], env=environment, capture_output=True, text=True)
    if run.returncode != 0:
        sys.exit(run.stdout + run.stderr)
    return [json.loads(line) for line in run.stdout.splitlines()]


def key(line):
    return tuple(line.get(name, 0) for name in ("processes", "ranks", "expert_ranks", "tokens", "skew", "call_bytes"))


def shorter(lines):
    best = {}
    for line in lines:
        if key(line) not in best or line["seconds"] < best[key(line)]["seconds"]:
            best[key(line)] = line
    return [best[k] for k in sorted(best)]


def predict(build, config, point, machine):
    """Seconds of a micro-batch: of computing, of rows under way, of sums."""
    options = [word for name, value in machine.items() for word in (f"--{name}", f"{value:.9g}")]
    if point["expert_ranks"] > 1:
        options += ["--skew", str(point["skew"])]
    text = subprocess.run([build + "/espalier", "plan", config, "--backend", "cpu", "--tokens", str(point["tokens"]), "--experts", "nf4", "--ranks",
                           str(point["ranks"]), "--expert-ranks", str(point["expert_ranks"]), *options], capture_output=True, text=True, check=True).stdout
    return [float(word) for word in text.splitlines()[2].split()[4:7]]


def line_through(points):
    """a, b of y = a + b x with the least squares of relative errors, and the mean of those errors."""
    w = [1 / y ** 2 for _, y in points]
    n, x, xx, y, xy = [sum(v * x ** i * y ** j for v, (x, y) in zip(w, points)) for i, j in ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1))]
    slope = (n * xy - x * y) / (n * xx - x * x)
    start = (y - slope * x) / n
    return start, slope, sum(abs((start + slope * x) / y - 1) for x, y in points) / len(points)


def fitted(point):
    return point["processes"] == 2 and point["ranks"] == 1 and point["skew"] == 1 and point["tokens"] in FITTED


def fit(build, config, calls, points):
    latency, per_byte, call_error = line_through([(c["call_bytes"], c["seconds"]) for c in calls if c["processes"] == 2])
    alone = [p for p in points if fitted(p)]
    operations = [predict(build, config, p, {"gflops": 1, "gbytes": 1, "latency": 1})[0] for p in alone]
    fixed, per_operation, error = line_through([(o, p["seconds"]) for o, p in zip(operations, alone)])
    weights = predict(build, config, alone[0], {"gflops": 1e9, "gbytes": 1, "latency": 1, "gweights": 1})[0]
    machine = {"gflops": 1 / per_operation, "gweights": weights / fixed, "gbytes": 1e-9 / per_byte, "latency": 1e6 * latency}
    return machine, {"computing": round(error, 4), "messages": round(call_error, 4)}


def slowed(machine, ranks):
    """Ranks that share cores compute as much slower."""
    share = max(1, ranks / os.cpu_count())
    return {name: value / share if name in ("gflops", "gweights") else value for name, value in machine.items()}


def judge(build, config, points, machine):
    alone = {(p["tokens"], p["skew"]): p["seconds"] for p in points if p["processes"] == 1}
    for p in points:
        p["parts"] = predict(build, config, p, slowed(machine, p["processes"]))
        p["predicted"] = round(sum(p["parts"]), 5)
        p["error"] = round(p["predicted"] / p["seconds"] - 1, 4)
        p["use"] = "alone" if p["processes"] == 1 else "fitted" if fitted(p) else "more ranks than cores" if p["processes"] > os.cpu_count() else "held out"
        if (p["tokens"], p["skew"]) in alone:
            p["efficiency"] = round(alone[p["tokens"], p["skew"]] / p["seconds"], 3)


def summary(points, use, several):
    errors = sorted(abs(p["error"]) for p in points if p["use"] == use and (p["ranks"] > 1) == several)
    if not errors:
        return None
    return {"points": len(errors), "mean": round(sum(errors) / len(errors), 4), "median": errors[len(errors) // 2], "largest": errors[-1]}


def table(points):
    rows = ["| processes | ranks | S | tokens | skew | measured s | predicted s (compute + rows + sums) | error | efficiency |", "|---|---|---|---|---|---|---|---|---|"]
    for p in points:
        parts = " + ".join(f"{x:.4f}" for x in p["parts"])
        rows.append(f"| {p['processes']} | {p['ranks']} | {p['expert_ranks']} | {p['tokens']} | {p['skew']} | {p['seconds']:.4f} | {p['predicted']:.4f} ({parts}) | "
                    f"{100 * p['error']:+.1f} %, {p['use']} | {p.get('efficiency', '')} |")
    return "\n".join(rows)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    build, path, rounds, cases = os.path.abspath(sys.argv[1]), sys.argv[2], int((sys.argv[3:4] or [5])[0]), sys.argv[4:] or CASES
    said = []
    if os.path.exists(path):
        with open(path) as f:
            before = json.load(f)
        said = [{name: line[name] for name in line if name in ("processes", "ranks", "expert_ranks", "tokens", "skew", "call_bytes", "seconds")}
                for line in before["points"] + before["calls"]]
    with tempfile.TemporaryDirectory() as config:
        with open(config + "/config.json", "w") as f:
            json.dump(SHAPE, f)
        for case in cases:
            said += measure(build, config, case, rounds)
        said = shorter(said)
        calls, points = ([line for line in said if name in line] for name in ("call_bytes", "tokens"))
        machine, errors = ({}, {})
        if any(fitted(p) for p in points) and any(c["processes"] == 2 for c in calls):
            machine, errors = fit(build, config, calls, points)
            judge(build, config, points, machine)
            errors = {"fit": errors, "one rank, held out": summary(points, "held out", False), "two ranks, held out": summary(points, "held out", True),
                      "more ranks than cores": summary(points, "more ranks than cores", True)}
            print(table(points))
            print(json.dumps(machine), json.dumps(errors, indent=1))
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    with open("/proc/cpuinfo") as f:
        cpu = next(line.split(": ")[1].strip() for line in f if line.startswith("model name"))
    record = {"command": "tests/bench/scaling.py BUILD OUT.json", "commit": commit, "cpu": cpu, "cores": os.cpu_count(), "transport": "MPI",
              "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "shape": SHAPE, "constants": machine, "errors": errors,
              "points": points, "calls": calls}
    with open(path, "w") as f:
        json.dump(record, f, indent=1)
        f.write("\n")


if __name__ == "__main__":
    main()
