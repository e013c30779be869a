#!/usr/bin/env bash
# Runs `make run` as the README says, waits for the streamed answer, and ends it as Ctrl-C would.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
port=$(.venv/bin/python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
setsid make run PORT="$port" >"$log" 2>&1 &
pid=$!
for _ in $(seq 600); do
    grep -q 'Serving until Ctrl-C' "$log" && break
    kill -0 "$pid" 2>/dev/null || { cat "$log"; exit 1; }
    sleep 0.2
done
grep -q 'Serving until Ctrl-C' "$log" || { cat "$log"; kill -TERM -- "-$pid"; exit 1; }
kill -INT -- "-$pid"
wait "$pid" || true
grep -A4 '^In the beginning' "$log"
if sed -n '/^In the beginning/,/^Try it yourself/p' "$log" | grep -q '^2[0-9-]*T[0-9:.]*Z'; then
    echo "lines of the log stand within the answer"
    exit 1
fi
rm -f "$log"
