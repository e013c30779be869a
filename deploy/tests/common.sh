# Shared by the scripts beside it. Each proves one way of installing, from scratch, with one command, and prints what it took.

say() { printf '%s: %s\n' "$(basename "$0" .sh)" "$*"; }
fail() { printf '%s: error: %s\n' "$(basename "$0" .sh)" "$*" >&2; exit 1; }

# A TCP port that nobody listens on now.
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# wait_ready PORT PROCESS LOG: until GET /readyz answers 200; what is printed then is the seconds it took.
wait_ready() {
    local start=$SECONDS
    until curl -sf -o /dev/null "http://127.0.0.1:$1/readyz"; do
        kill -0 "$2" 2>/dev/null || { cat "$3" >&2; fail "the server ended before it was ready"; }
        [ $((SECONDS - start)) -lt 300 ] || { cat "$3" >&2; fail "not ready within 300 s"; }
        sleep 0.2
    done
    echo $((SECONDS - start))
}

# answers PORT: a stream of 24 tokens ends with its whole text, and a second request gets the same text.
answers() {
    local body='{"inputs": "In the beginning God created", "parameters": {"max_new_tokens": 24}}' streamed whole
    streamed=$(curl -sfN "http://127.0.0.1:$1/generate_stream" -H 'Content-Type: application/json' -d "$body" |
        python3 -c 'import json, sys
events = [json.loads(line[5:]) for line in sys.stdin if line.startswith("data:")]
assert len(events) == 24, events
print(events[-1]["generated_text"])')
    whole=$(curl -sf "http://127.0.0.1:$1/generate" -H 'Content-Type: application/json' -d "$body" |
        python3 -c 'import json, sys; print(json.load(sys.stdin)["generated_text"])')
    [ -n "$streamed" ] && [ "$streamed" = "$whole" ] || fail "found two texts for one prompt: '$streamed' and '$whole'"
    say "answered: $(echo "$streamed" | head -c 70)"
}
