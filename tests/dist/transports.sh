#!/bin/sh
# transports.sh HOW WORLD [PLUGIN]: ranks of tests/dist/world.c, started by hand (over TCP) or by mpirun: what goes right does, and every kind
# of misbehaviour ends on all ranks, with its exit status, in time, and with nobody left over.
how=$1 world=$2 plugin=${3:-}
. "$(dirname "$0")/ranks.sh"

for ranks in 2 3 4; do
    start 30 $ranks "$world" right
    expect 0 30
    test "$(grep -c ': right$' "$out")" = $ranks || wrong "$ranks ranks, but $(grep -c ': right$' "$out") say that all is right"
done

start 2 3 "$world" die
expect_failure "a rank that is killed" '74|75|137' 8
start 2 3 "$world" leave
expect_failure "a rank that leaves" '74|75|1|0' 8
start 2 3 "$world" desync
expect_failure "a rank at another place" 71 8
grep -q 'another place.*layer 4' "$out" || wrong "nobody names the place: $(cat "$out")"
start 2 3 "$world" early
expect_failure "a rank that is done too early" 71 8
grep -q 'the end.*the ranks went different ways\|the middle.*the ranks went different ways' "$out" || wrong "nobody names the two places: $(cat "$out")"
start 2 3 "$world" busy
expect_failure "a rank that is busy elsewhere" '74|75' 8
grep -q 'warning: rank [02] of 3 .*in "the middle", layer 4 (call 2): has waited' "$out" || wrong "nobody warns: $(cat "$out")"
grep -q 'rank [02], step 0: call 2, "the middle", layer 4: .*failed' "$out" || wrong "nobody tells the last calls: $(cat "$out")"
start 2 3 "$world" stop
expect_failure "a rank that is stopped" 75 8
grep -q 'rank [02] of 3, at "the middle", layer 4.*deadline' "$out" || wrong "nobody names the wait: $(cat "$out")"
finish
