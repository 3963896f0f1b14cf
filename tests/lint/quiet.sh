#!/bin/sh
# The library neither prints nor exits nor asserts: nothing of the kind in src/ (but its command line) and kernels/.
# The default log sink of src/core/log.c is the one place that may write to standard error, and src/rl/reward_command.c the one that starts
# processes (a user's reward command, each in a group of its own) and kills them.  src/dist/comm_tcp.c kills ranks of its own job that do not
# notice its end, as a launcher would.
. "$(dirname "$0")/lib.sh"

code src kernels | grep -v '^src/cli/' | grep -v '^src/core/log\.c:[0-9]*: *fprintf(stderr,' |
    grep -vE '^src/rl/reward_command\.c:[0-9]*: .*\b(kill\(-|posix_spawn\()' |
    grep -v '^src/dist/comm_tcp\.c:[0-9]*: .*\bkill((pid_t)p->number' >"$offences.code"
forbid "the library does not end the program" '\b(exit|_exit|_Exit|quick_exit|abort|raise|kill|assert|__builtin_trap)[ ]*\(' <"$offences.code"
forbid "the library does not print" '\b(printf|vprintf|puts|putchar|perror|dprintf|psignal)[ ]*\(|\b(stdout|stderr)\b' <"$offences.code"
forbid "the library does not fork" '\b(fork|vfork|system|popen|posix_spawnp?)[ ]*\(' <"$offences.code"
rm -f "$offences.code"
finish
