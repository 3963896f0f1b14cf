# Sourced by every lint: `. lib.sh`, then fail "file:line: why" for each offence, and `finish` at the end.
# The tree that is looked at is $1 of the script.
set -eu
export LC_ALL=C
here=$(cd "$(dirname "$0")" && pwd)
cd "${1:?usage: $0 SOURCE_TREE}"
offences=$(mktemp)
trap 'rm -f "$offences"' EXIT

fail() { echo "$1" >>"$offences"; }

# sources DIR..: the C files below them; none where a DIR is absent.
sources() {
    for dir in "$@"; do
        [ ! -d "$dir" ] || find "$dir" -name '*.[ch]' -o -name '*.def' | sort
    done
}

# code DIR..: their lines as "file:line: text", without comments and literals.
code() {
    sources "$@" | xargs -r awk -f "$here/code.awk"
}

# forbid "why" REGEX: every line of standard input that matches is an offence.
forbid() {
    { grep -E "$2" || true; } | awk -v why="$1" '{ print $0 " <- " why }' >>"$offences"
}

finish() {
    if [ -s "$offences" ]; then
        cat "$offences"
        exit 1
    fi
}
