#!/usr/bin/env bash
# A Rust toolchain of the version in rust-toolchain.toml, if there is none.
set -euo pipefail
cd "$(dirname "$0")/.."

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else return 1; fi
}

export PATH="$HOME/.cargo/bin:$PATH"
wanted=$(sed -n 's/^channel = "\(.*\)"/\1/p' rust-toolchain.toml)
if ! command -v cargo >/dev/null; then
    # A package needs root; the installer does not.
    if apt-cache policy rustup 2>/dev/null | grep -q 'Candidate: [0-9]' && as_root true 2>/dev/null; then
        echo "install: rustup, from the system's packages"
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq rustup >/dev/null
    else
        echo "install: rustup, by its own installer"
        curl --proto '=https' --tlsv1.2 -sSf https://static.rust-lang.org/rustup/rustup-init.sh | sh -s -- -y --no-modify-path --profile minimal --default-toolchain none
    fi
fi
# rustup takes the version from rust-toolchain.toml and installs it if it is not there.
found=$(cargo --version | cut -d' ' -f2) || { echo "install: error: cargo $wanted could not be set up" >&2; exit 1; }
if [ "$(printf '%s\n' "$wanted" "$found" | sort -V | head -1)" != "$wanted" ]; then
    echo "install: error: cargo is $found, $wanted or newer is needed. Install rustup, or remove the older cargo from PATH" >&2
    exit 1
fi
