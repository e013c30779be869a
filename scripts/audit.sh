#!/usr/bin/env bash
# What is shipped of others: known faults, licences, sources; and lists as CycloneDX in target/sbom/, which a validator judges.
#
#   scripts/audit.sh             everything; asks the databases of advisories, so it needs a network
#   scripts/audit.sh --offline   licences, sources and the lists alone; the tools are there from an earlier run
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$HOME/.cargo/bin:$PATH"
offline=${1:-}
tools=$PWD/target/tools
cargo_deny=0.20.2
python_tools=(pip-audit==2.10.1 "cyclonedx-python-lib[json-validation]==11.12.0")
say() { printf 'audit: %s\n' "$*"; }
if [ "$("$tools/bin/cargo-deny" --version 2>/dev/null)" != "cargo-deny $cargo_deny" ]; then
    say "building cargo-deny $cargo_deny"
    cargo install --quiet --locked --root "$tools" "cargo-deny@$cargo_deny"
fi
if [ "$(cat "$tools/python/installed" 2>/dev/null)" != "${python_tools[*]}" ]; then
    say "installing ${python_tools[*]}"
    .venv/bin/python -m venv --clear "$tools/python"
    "$tools/python/bin/pip" install -q --disable-pip-version-check "${python_tools[@]}"
    echo "${python_tools[*]}" > "$tools/python/installed"
fi
mkdir -p target/sbom
say "licences and sources of the Rust programs"
"$tools/bin/cargo-deny" --all-features check --hide-inclusion-graph licenses bans sources
for kind in rust python; do
    .venv/bin/python scripts/sbom.py $kind > target/sbom/$kind.json
    "$tools/python/bin/python" -c '
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
if (error := JsonStrictValidator(SchemaVersion.V1_5).validate_str(open(sys.argv[1]).read())) is not None:
    sys.exit(f"audit: error: {sys.argv[1]} is no list that CycloneDX takes: {error}")' target/sbom/$kind.json
    say "target/sbom/$kind.json: $(grep -c '"purl"' target/sbom/$kind.json) components"
done
if [ "$offline" != --offline ]; then
    say "advisories about the Rust programs"
    "$tools/bin/cargo-deny" --all-features check --hide-inclusion-graph advisories
    say "advisories about the Python packages, those of development too"
    "$tools/python/bin/pip-audit" --disable-pip --no-deps --requirement server/requirements.lock
fi
say "nothing found"
