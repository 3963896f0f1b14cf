#!/bin/sh
# Installs the packages of packages.txt that this machine lacks; says which command would do it where it may not.
set -eu
list=$(dirname "$0")/packages.txt
if ! command -v dpkg-query >/dev/null; then
    echo "espalier: not a Debian or Ubuntu system: make sure that it has what $list names, then use cmake and ctest as CONTRIBUTING.md says" >&2
    exit 0
fi
missing=
for package in $(grep -v '^#' "$list"); do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

echo "espalier: installing$missing"
if [ "$(id -u)" = 0 ]; then
    as_root=
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n"
else
    as_root=no
fi
install="apt-get update && apt-get install -y --no-install-recommends$missing"
if [ "$as_root" = no ]; then
    echo "espalier: packages are missing and this user may not install them.  Run as root, then try again:" >&2
    echo "    $install" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086  # both lists are words
if ! { $as_root apt-get update -q && $as_root apt-get install -q -y --no-install-recommends $missing; } then
    echo "espalier: installing the packages failed (see above).  What was tried: $install" >&2
    exit 1
fi
