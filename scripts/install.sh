#!/usr/bin/env bash
# Prepares a fresh Debian 12 or Ubuntu 24.04: system packages, a Rust toolchain, Python packages in .venv/, release builds.
# Does only what is missing and says what it does. Works as root, and as a user who has the tools already.
set -euo pipefail
cd "$(dirname "$0")/.."

. scripts/common.sh

# System packages -------------------------------------------------------------------------------------------------

# The first interpreter that is new enough and can make a virtual environment.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null
        then echo "$candidate"; return; fi
    done
    return 1
}

missing=()
command -v cc >/dev/null && command -v c++ >/dev/null && command -v make >/dev/null || missing+=(build-essential)
command -v curl >/dev/null || missing+=(curl ca-certificates)
find_python >/dev/null || missing+=(python3 python3-venv)
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || fail "missing: ${missing[*]}. This system has no apt-get; install them by hand"
    say "system packages: ${missing[*]}"
    as_root apt-get update -qq || fail "missing: ${missing[*]}. Install them as root"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
fi
python=$(find_python) || fail "no Python 3.11, 3.12 or 3.13 with venv was found; name one with PYTHON=..."

# Rust ------------------------------------------------------------------------------------------------------------

scripts/rust.sh

# Python packages, and release builds at the same time: the former wait for the network, the latter for the processor --

if [ ! -x .venv/bin/python ]; then
    say "virtual environment .venv/ with $("$python" --version)"
    "$python" -m venv .venv
fi
# One stamp for all that decides what is installed.
kernels=server/text_generation_server/kernels/cpu/native
state=$(cat server/requirements.lock server/pyproject.toml server/setup.py proto/shard.proto "$kernels"/*.{cpp,h,py} | sha256sum | cut -d' ' -f1)
install_python() {
    local torch
    torch=$(grep '^torch==' server/requirements.lock)
    say "Python packages ($torch and what it needs; a few minutes on a fresh machine)"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        .venv/bin/pip install -q --disable-pip-version-check --index-url "$TORCH_INDEX_URL" "$torch"
    fi
    .venv/bin/pip install -q --disable-pip-version-check -r server/requirements.lock
    .venv/bin/python scripts/broken_packages.py server/requirements.lock > .venv/.broken
    if [ -s .venv/.broken ]; then
        say "an earlier installation broke off; once more: $(sed 's/==.*//' .venv/.broken | tr '\n' ' ')"
        .venv/bin/pip install -q --disable-pip-version-check --no-deps --ignore-installed \
            ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r .venv/.broken
    fi
    .venv/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e ./server
    # Once more for its message alone, if there is one: pip keeps it to itself.
    .venv/bin/python "$kernels/build.py" "${CXX:-c++}" || say "torch's operators serve instead, several times slower"
    echo "$state" > .venv/.installed
    say "Python packages are ready"
}
packages=
if [ "$(cat .venv/.installed 2>/dev/null)" != "$state" ] || [ ! -e "$kernels/libkernels.so" ]; then
    install_python &
    packages=$!
fi

binaries=(text-generation-launcher text-generation-router text-generation-benchmark)
say "release builds (a few minutes the first time): ${binaries[*]}"
built=0
cargo build --locked --release --quiet -p text-generation-launcher -p text-generation-router -p text-generation-benchmark || built=$?
if [ -n "$packages" ]; then wait "$packages" || fail "the Python packages could not be installed; see above"; fi
[ "$built" = 0 ] || fail "the release builds failed; see above"
for binary in "${binaries[@]}"; do
    # Not over the running file: a server may be in use.
    if ! cmp -s "target/release/$binary" ".venv/bin/$binary"; then
        cp "target/release/$binary" ".venv/bin/.$binary.$$"
        mv ".venv/bin/.$binary.$$" ".venv/bin/$binary"
    fi
done
say "ready: .venv/bin/text-generation-launcher --help"
