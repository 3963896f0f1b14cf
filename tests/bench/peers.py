#!/usr/bin/env python3
"""One table of our figures beside those of public peers, of the same cases on the same kind of machine.

usage: peers.py PEERS.json OURS.json...     PEERS: what the peers' benchmark wrote; OURS: --json of esp_bench_experts and esp_bench_dense

A row is one of our cases with the fastest peer that has 4-bit weights and the fastest of all; the ratio is theirs over ours, so more than 1 is ahead.
Figures of different machines or hours differ by what the machines do: below a fifth, read them as alike.
"""
import json
import sys

FOUR_BITS = ("NF4", "int4", "MXFP4", "Q4_0", "IQ4_NL")


def same_case(ours, theirs):
    what, _, detail = ours["what"].partition(", ")
    return (all(ours.get(k) == theirs.get(k) for k in ("section", "shape", "threads", "M", "T")) and theirs.get("what") == what
            and detail in theirs["peer"] and theirs.get("regime", "cold") == (ours.get("regime") or "cold") and "ms" in theirs)


def fastest(rows):
    best = min(rows, key=lambda row: row["ms"], default=None)
    return (f"{best['ms']:.4g}", best["peer"].split(" (")[0][:44], best["ms"]) if best else ("", "", None)


def main():
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    peers = json.load(open(sys.argv[1]))
    print(f"peers: {peers.get('date', '')}, {peers.get('machine', {}).get('cpu', '')}\n")
    for path in sys.argv[2:]:
        ours = json.load(open(path))
        roof = ", ".join(f"{name} {value:.4g}" for name, value in ours["roof"].items() if value)
        print(f"{path}: {ours['date']}, {ours['cpu']}, {ours['backend']}; {roof}\n")
        print("| case | threads | ms | % of peak | 4-bit peer | ms | ratio | any peer | ms | ratio |\n|---|---|---|---|---|---|---|---|---|---|")
        peak = max(ours["roof"].get("bf16_dot_gflops", 0), ours["roof"].get("bf16_tiles_gflops", 0))
        for row in ours["rows"]:
            found = [r for r in peers["rows"] if same_case(row, r)]
            four, any_ = fastest([r for r in found if any(f in r["peer"] for f in FOUR_BITS)]), fastest(found)
            ratio = lambda theirs: f"{theirs[2] / row['ms']:.2f}" if theirs[2] else ""
            size = f"M = {row['M']}" if "M" in row else f"T = {row['T']}" if "T" in row else ""
            case = " ".join(filter(None, (row["section"], row["shape"], row["what"], row.get("format"), row.get("regime"), size)))
            share = f"{100 * row['gflops'] / peak / row['threads']:.1f}" if row.get("gflops") and peak else ""
            print(f"| {case} | {row['threads']} | {row['ms']:.4g} | {share} | {four[1]} | {four[0]} | {ratio(four)} | {any_[1]} | {any_[0]} | {ratio(any_)} |")
        print()


main()
