#!/usr/bin/env bash
# A Rust toolchain of the version in rust-toolchain.toml, if there is none.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh

wanted=$(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
if ! command -v cargo >/dev/null; then
    # A package needs root; the installer does not.
    if apt-cache policy rustup 2>/dev/null | grep -q 'Candidate: [0-9]' && as_root true 2>/dev/null; then
        say "rustup, from the system's packages"
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq rustup >/dev/null
    else
        say "rustup, by its own installer"
        curl --proto '=https' --tlsv1.2 -sSf https://static.rust-lang.org/rustup/rustup-init.sh | sh -s -- -y --no-modify-path --profile minimal --default-toolchain none
    fi
fi
# rustup takes the version from rust-toolchain.toml and installs it if it is not there.
found=$(cargo --version | cut -d' ' -f2) || fail "cargo $wanted could not be set up"
if [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -1)" != "$wanted" ]; then
    fail "cargo is $found, $wanted or newer is needed. Install rustup, or remove the older cargo from PATH"
fi
