#!/usr/bin/env bash
# What the programs are made of: known faults, licences, sources; and a list as CycloneDX in target/sbom/.
#
#   scripts/audit.sh             everything; asks the databases of advisories, so it needs a network
#   scripts/audit.sh --offline   licences, sources and the list alone
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"
offline=${1:-}
tools=$PWD/target/tools
say() { printf 'audit: %s\n' "$*"; }
command -v "$tools/bin/cargo-deny" >/dev/null || { say "building cargo-deny"; cargo install --quiet --locked --root "$tools" cargo-deny; }
if [ ! -x "$tools/python/bin/pip-audit" ]; then
    say "installing pip-audit and cyclonedx-bom"
    .venv/bin/python -m venv "$tools/python"
    "$tools/python/bin/pip" install -q --disable-pip-version-check pip-audit cyclonedx-bom
fi
mkdir -p target/sbom
say "licences and sources of the Rust programs"
"$tools/bin/cargo-deny" --all-features check --hide-inclusion-graph licenses bans sources
say "lists: target/sbom/python.json, target/sbom/rust.json"
"$tools/python/bin/cyclonedx-py" environment .venv/bin/python --output-format JSON --output-file target/sbom/python.json
"$tools/python/bin/python" scripts/rust_sbom.py > target/sbom/rust.json
if [ "$offline" != --offline ]; then
    say "advisories about the Rust programs"
    "$tools/bin/cargo-deny" --all-features check --hide-inclusion-graph advisories
    say "advisories about the Python packages"
    "$tools/python/bin/pip-audit" --disable-pip --no-deps --requirement server/requirements.lock
fi
say "nothing found"
