"""Starts the server, streams one answer to the terminal, and keeps serving until Ctrl-C."""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "In the beginning God created"


def is_ready(port: int) -> bool:
    """Whether GET /readyz answers 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def is_taken(port: int) -> bool:
    """Whether somebody listens there already, whose answers would be taken for the server's."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def first_key() -> str:
    """Of those that the server takes from the environment; none if it wants none."""
    return os.environ.get("API_KEY", "").split(",")[0].strip()


def stream(port: int) -> None:
    """Prints the tokens of one answer as they come."""
    body = json.dumps({"inputs": PROMPT, "parameters": {"max_new_tokens": 60, "do_sample": True, "seed": 7}})
    headers = {"Content-Type": "application/json"}
    if key := first_key():
        headers["Authorization"] = f"Bearer {key}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/generate_stream", body, headers)
    response = connection.getresponse()
    if response.status != 200:
        sys.exit(f"run: the server answered {response.status}: {response.read().decode(errors='replace')[:300]}")
    print(f"\n{PROMPT}", end="", flush=True)
    for line in response:
        if line.startswith(b"data:"):
            event = json.loads(line[5:])
            if "error" in event:
                sys.exit(f"\nrun: the server answered: {event['error']}")
            if not event["token"]["special"]:
                print(event["token"]["text"], end="", flush=True)
    connection.close()
    print("\n")


def pass_on(lines: BinaryIO, terminal: threading.Lock) -> None:
    """Prints the server's log as it comes, but nothing while somebody else has the terminal."""
    for line in lines:
        with terminal:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/docs-llama-7m", help="folder or hub id")
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("args", nargs="*", help="more flags for text-generation-launcher, after --")
    options = parser.parse_args()
    launcher = str(ROOT / ".venv/bin/text-generation-launcher")
    command = [launcher, "--model-id", options.model, "--port", str(options.port), *options.args]
    if is_taken(options.port):
        print(f"run: error: --port {options.port} is in use; choose another one: --port", file=sys.stderr)
        return 1
    print("run:", " ".join(command), flush=True)
    # Ctrl-C reaches the launcher through the terminal; this process only waits for it to drain.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    restore = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    server = subprocess.Popen(command, preexec_fn=restore, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    terminal = threading.Lock()
    log = threading.Thread(target=pass_on, args=(server.stdout, terminal))
    log.start()
    while not is_ready(options.port):
        if (code := server.poll()) is not None:
            log.join()
            return code
        time.sleep(0.2)
    try:
        with terminal:
            stream(options.port)
            print(
                "Try it yourself:\n\n"
                f"  curl -N http://127.0.0.1:{options.port}/generate_stream -H 'Content-Type: application/json' \\\n"
                + ('    -H "Authorization: Bearer $API_KEY" \\\n' if first_key() else "")
                + f'    -d \'{{"inputs": "{PROMPT}", "parameters": {{"max_new_tokens": 40}}}}\'\n\n'
                "Serving until Ctrl-C.",
                flush=True,
            )
    except BaseException:
        server.terminate()
        raise
    code = server.wait()
    log.join()
    return code


if __name__ == "__main__":
    sys.exit(main())
