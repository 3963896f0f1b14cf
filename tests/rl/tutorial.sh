#!/bin/sh
# Runs every command of examples/03_grpo/README.md, in its order, in a folder of its own.  What is shown is that they run.
# Arguments: the folder of the programs, the sources, the mock server of the tests or nothing.
set -u
programs=$1 source=$2 mock=${3:-}
work=$(mktemp -d)
server=
trap '[ -n "$server" ] && kill $server 2>/dev/null; rm -rf "$work"' EXIT
mkdir "$work/bin" && ln -s "$source/examples" "$source/include" "$work"
# Where the README leaves it at the 60 steps of the default, two do.
cat >"$work/bin/espalier-grpo" <<END
#!/bin/sh
case "\$*" in *--steps*) exec "$programs/espalier-grpo" "\$@" ;; esac
exec "$programs/espalier-grpo" "\$@" --steps 2
END
chmod +x "$work/bin/espalier-grpo"
cd "$work" || exit 1
# Blocks marked sh; the here-documents in them are theirs.
awk '/^```sh$/ { inside = 1; n++; next } /^```$/ { inside = 0 } inside { print > sprintf("block-%02d.sh", n) }' "$source/examples/03_grpo/README.md"
count=$(ls block-*.sh | wc -l)
[ "$count" -ge 8 ] || { echo "FAILED: $count blocks of commands in the README, expected at least 8" && exit 1; }
if [ -n "$mock" ]; then
    mkfifo open # the server ends with its standard input
    "$mock" examples/models/mix-moe --processed <open >mock.out 2>&1 &
    server=$!
    exec 4>open
    until grep -q "^port" mock.out 2>/dev/null; do sleep 0.1; done
    port=$(sed -n 's/^port //p' mock.out)
    sed -i "s/localhost:8000/localhost:$port/" block-*.sh
fi
for block in block-*.sh; do
    if grep -q -e "--server" "$block" && [ -z "$mock" ]; then continue; fi
    if grep -q python3 "$block" && ! command -v python3 >/dev/null; then continue; fi
    PATH="$work/bin:$programs:$PATH" sh -eu "$block" >output.log 2>&1 || { echo "FAILED:" && cat "$block" output.log && exit 1; }
done
[ -f out/metrics.svg ] && [ -f out-again/checkpoint.h5 ] || { echo "FAILED: the runs left no files" && exit 1; }
echo "$count blocks of commands run"
