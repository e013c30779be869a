"""Measure how long streams pause when something of the server is killed, and that they lose nothing.

Streams run against the shipped model; in their middle one process gets SIGKILL. For each stream the longest time between
two of its events counts; every answer is compared with the one of an undisturbed run. A router takes its connections with
it, so what counts there is the time until a new request is answered.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import common
import psutil

TIMEOUT_S = 120.0


def stream(port: int, index: int, tokens: int, events: list[float], texts: dict[int, str]) -> None:
    """Run one stream: when its events came, and the text."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    body = {
        "inputs": f"Chapter {index}. In the beginning",
        "parameters": {"max_new_tokens": tokens, "ignore_eos_token": True, "do_sample": True, "seed": index},
    }
    connection.request("POST", "/generate_stream", json.dumps(body), {"Content-Type": "application/json"})
    for line in connection.getresponse():
        if line.startswith(b"data:"):
            events.append(time.perf_counter())
            event = json.loads(line[5:])
            if event.get("generated_text") is not None:
                texts[index] = event["generated_text"]
    connection.close()


def run_streams(
    port: int, streams: int, tokens: int, kill: psutil.Process | None
) -> tuple[list[float], dict[int, str]]:
    """Seconds of the longest pause of each stream, and its text; `kill` dies when a third of the tokens is there."""
    events: list[list[float]] = [[] for _ in range(streams)]
    texts: dict[int, str] = {}
    threads = [threading.Thread(target=stream, args=(port, i, tokens, events[i], texts)) for i in range(streams)]
    for thread in threads:
        thread.start()
    if kill is not None:
        while sum(map(len, events)) < streams * tokens // 3:
            time.sleep(0.005)
        kill.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join(TIMEOUT_S)
    return [max(b - a for a, b in itertools.pairwise(times)) for times in events if len(times) > 1], texts


def processes(launcher: int, word: str) -> list[psutil.Process]:
    """Return the launcher's children whose command line has this word."""
    return [child for child in psutil.Process(launcher).children(recursive=True) if word in " ".join(child.cmdline())]


def ranks(launcher: int) -> list[psutil.Process]:
    """Return the processes that serve a shard."""
    return [process for process in processes(launcher, "text-generation-server") if "serve" in process.cmdline()]


def answers(port: int) -> bool:
    """Whether a new request is answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        body = json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 1}})
        connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def measure(arguments: argparse.Namespace, num_shard: int, log: Path) -> list[list[str]]:
    """Return rows of the table for one number of shards."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [".venv/bin/text-generation-launcher", "--model-id", arguments.model, "--port", str(port)]
    rows = []
    with common.Server(
        [*command, "--num-shard", str(num_shard), "--hostname", "127.0.0.1"], log=log, speaks=False
    ) as server:
        server.wait_until_healthy(f"http://127.0.0.1:{port}/health", TIMEOUT_S)
        launcher = server.process.pid
        calm, expected = run_streams(port, arguments.streams, arguments.tokens, None)
        rows.append(["nothing", str(num_shard), common.spread([1e3 * s for s in calm]), "–"])
        pauses, same = [], True
        for turn in range(arguments.rounds):
            victim = ranks(launcher)[turn % num_shard]
            paused, texts = run_streams(port, arguments.streams, arguments.tokens, victim)
            pauses += paused
            same = same and texts == expected
            print(f"{num_shard} shards, rank killed: {max(paused):.2f} s, same: {texts == expected}", file=sys.stderr)
        rows.append(["a rank", str(num_shard), common.spread([1e3 * s for s in pauses]), "yes" if same else "NO"])
        gone = []
        for _ in range(arguments.rounds):
            processes(launcher, "text-generation-router")[0].send_signal(signal.SIGKILL)
            start = time.perf_counter()
            time.sleep(0.05)
            while not answers(port):
                time.sleep(0.02)
            gone.append(1e3 * (time.perf_counter() - start))
        rows.append(["the router", str(num_shard), common.spread(gone), "connections break"])
    return rows


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/docs-llama-7m", help="folder of the model")
    parser.add_argument("--streams", type=int, default=8, help="streams at once")
    parser.add_argument("--tokens", type=int, default=192, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=5, help="kills of each kind")
    arguments = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)
    common.build("text-generation-launcher", "text-generation-router")
    head = common.environment()
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for shards in (1, 2) for row in measure(arguments, shards, Path(folder) / "log")]
    body = common.table(["killed", "shards", "longest pause ms, median (range)", "same tokens as undisturbed"], rows)
    body += (
        f"\n\n{arguments.streams} streams of {arguments.tokens} sampled tokens, {arguments.rounds} kills of each kind."
    )
    body += "\n\nThe router's row: from the kill until a new request is answered."
    common.write_result("recovery", "Pauses after a kill", head, body)
    if any(row[-1] == "NO" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
