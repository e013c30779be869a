#!/usr/bin/env bash
# Builds the wheel that brings everything: the Python package, its kernels, and the Rust programs. To dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
scripts/install.sh
programs=target/wheel
# What an earlier build listed is listed anew.
rm -rf "$programs" server/build server/*.egg-info/SOURCES.txt dist
mkdir -p "$programs"
for name in text-generation-launcher text-generation-router text-generation-benchmark; do
    strip -o "$programs/$name" "target/release/$name"
done
.venv/bin/python scripts/notices.py > server/THIRD_PARTY_NOTICES
TEXT_GENERATION_BINARIES=$PWD/$programs .venv/bin/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir dist ./server
rm -rf server/build server/THIRD_PARTY_NOTICES
ls -l dist
