# Shell functions to start ranks and to see how they end.  Sourced with how=hand|mpirun, plugin=path of espalier_mpi.so or "".
work=$(mktemp -d)
out=$work/out failures=0
trap 'rm -rf "$work"' EXIT
wrong() {
    echo "WRONG: $1"
    failures=$((failures + 1))
}
# What the ranks said, but for the calls that they remember.
said() {
    grep -vE ': call [0-9]+, "' "$out"
}
finish() {
    test $failures = 0 && echo "all right"
    exit $((failures > 0))
}
if test "$how" = mpirun && ! { command -v mpirun >/dev/null && test -n "$plugin"; }; then
    echo "skipped: no mpirun here, or built without MPI"
    exit 77
fi
# As root, more ranks than cores, and cores that are shared.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_btl_vader_single_copy_mechanism=none OMP_NUM_THREADS=1 ESP_MPI_PLUGIN="$plugin"

# count_left PATTERN: how many processes of this script's jobs are left after 3 seconds; those of a script beside it have another mark.
export RANKS_TEST=$$
count_left() {
    for _ in 1 2 3 4 5 6; do
        left=0
        for pid in $(pgrep -f "$1"); do
            tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "RANKS_TEST=$RANKS_TEST" && left=$((left + 1))
        done
        test "$left" = 0 && return
        sleep 0.5
    done
}

# start DEADLINE RANKS COMMAND...: runs the job; sets status (of the launcher, or of the first rank that failed), took (seconds), left.
start() {
    export ESP_DEADLINE="$1"
    n=$2
    shift 2
    began=$(date +%s)
    if test "$how" = mpirun; then
        timeout -k 5 60 mpirun -n "$n" "$@" >"$out" 2>&1
        status=$?
    else
        rm -rf "$work/meet" && mkdir "$work/meet"
        pids=
        for rank in $(seq 0 $((n - 1))); do
            ESP_WORLD=$n ESP_RANK=$rank ESP_RENDEZVOUS=file:$work/meet timeout -k 5 60 "$@" >"$work/rank$rank" 2>&1 &
            pids="$pids $!"
        done
        status=0
        for pid in $pids; do
            wait "$pid"
            code=$?
            test $code = 0 || test $status != 0 || status=$code
        done
        cat "$work"/rank? >"$out"
    fi
    took=$(($(date +%s) - began))
    count_left "^$1"
}
# expect STATUS SECONDS
expect() {
    test "$status" = "$1" || wrong "status $status, expected $1: $(said)"
    test "$took" -le "$2" || wrong "took $took s, expected at most $2"
    test "$left" = 0 || wrong "$left processes are left"
}
# expect_failure WHAT STATUSES SECONDS
expect_failure() {
    echo "$status" | grep -qxE "$2" || wrong "$1: status $status, expected $2: $(said)"
    test "$took" -le "$3" || wrong "$1: took $took s, expected at most $3"
    test "$left" = 0 || wrong "$1: $left processes are left"
}
