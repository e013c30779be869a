#!/usr/bin/env bash
# Builds the wheel and installs it into a virtual environment of its own, with no compiler and no Rust in reach; serves a
# model with what the wheel alone has brought.
#
#   deploy/tests/wheel.sh            what the wheel depends on is taken from .venv: quick, no network
#   deploy/tests/wheel.sh --full     pip installs everything, as for a user
set -euo pipefail
cd "$(dirname "$0")/../.."
. deploy/tests/common.sh
root=$PWD
scripts/wheel.sh >/dev/null
wheel=$(echo dist/*.whl)
say "$wheel: $(du -h "$wheel" | cut -f1)"
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill -TERM "$server" 2>/dev/null || true; rm -rf "$work"' EXIT

.venv/bin/python -m venv "$work/venv"
if [ "${1:-}" = --full ]; then
    constraints=$work/constraints.txt
    grep -v '^-' server/requirements.lock > "$constraints"
    start=$SECONDS
    "$work/venv/bin/pip" install -q --disable-pip-version-check -c "$constraints" "$wheel"
    say "pip install took $((SECONDS - start)) s"
else
    "$work/venv/bin/pip" install -q --disable-pip-version-check --no-deps "$wheel"
    # Of .venv the libraries alone: the package itself must be the wheel's.
    .venv/bin/python -c 'import sys; print(*(path for path in sys.path if path.endswith("site-packages")), sep="\n")' \
        > "$(echo "$work"/venv/lib/python3*/site-packages)/libraries.pth"
fi

# What stands in this PATH are the wheel's programs and what any system has; no cc, no cargo.
mkdir "$work/bin"
for tool in sh env uname ldconfig; do ln -s "$(command -v "$tool" || echo /sbin/"$tool")" "$work/bin/$tool"; done
port=$(free_port)
cp -r models/docs-llama-7m "$work/model"
cd "$work"
run() { env -i PATH="$work/venv/bin:$work/bin" HOME="$work" "$@"; }
where=$(run python -c 'import text_generation_server; print(text_generation_server.__file__)')
case $where in "$work"/*) ;; *) fail "the package is not the wheel's: $where" ;; esac
versions=$(for name in launcher router server benchmark; do run "text-generation-$name" --version | sed 's/^[^ ]* //'; done | sort -u)
[ "$(echo "$versions" | wc -l)" = 1 ] || fail "the programs are of several versions: $versions"
commit=$(git -C "$root" rev-parse --short=12 HEAD)
case $versions in *"($commit)"*) say "all programs are $versions" ;; *) fail "found version '$versions', expected commit $commit" ;; esac

(exec env -i PATH="$work/venv/bin:$work/bin" HOME="$work" text-generation-launcher --model-id "$work/model" --port "$port") \
    >"$work/log" 2>&1 &
server=$!
seconds=$(wait_ready "$port" "$server" "$work/log")
say "ready after $seconds s"
answers "$port"
grep -q "native kernels: avx" "$work/log" || { cat "$work/log"; fail "the wheel's kernels are not used"; }
kill -TERM "$server"
code=0
wait "$server" || code=$?
server=
[ "$code" = 0 ] || fail "SIGTERM: found exit code $code, expected 0"
say "ended with 0 after SIGTERM"
