#!/bin/sh
# Installs the build into a prefix of its own and uses it from outside: by find_package, by pkg-config, and after the prefix has moved.
# run.sh BUILD_DIR SOURCE_DIR CC
set -eu
build=$1 source=$2 cc=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cmake --install "$build" --prefix "$work/first" >/dev/null
mv "$work/first" "$work/prefix"
test -x "$work/prefix/bin/espalier"
"$work/prefix/bin/espalier" --help >/dev/null

configure() { # configure WANTED_VERSION
    cmake -S "$source/tests/consumer/outside" -B "$work/outside-$1" -DWANTED="$1" -DCMAKE_PREFIX_PATH="$work/prefix" -DCMAKE_C_COMPILER="$cc" >"$work/log" 2>&1
}
configure 0.1 || { cat "$work/log"; exit 1; }
cmake --build "$work/outside-0.1" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
"$work/outside-0.1/outside"
if configure 0.2; then
    echo "find_package(espalier 0.2) took an installed 0.1: while the major version is 0, every minor version may differ"
    exit 1
fi

pc=$(find "$work/prefix" -name espalier.pc)
PKG_CONFIG_PATH=$(dirname "$pc")
export PKG_CONFIG_PATH
libdir=$(pkg-config --variable=libdir espalier)
# shellcheck disable=SC2046  # flags are words
$cc -std=c17 -Wall -Wextra -Werror "$source/tests/consumer/outside/main.c" -o "$work/by_pkgconfig" $(pkg-config --cflags --libs espalier) -Wl,-rpath,"$libdir"
"$work/by_pkgconfig"
