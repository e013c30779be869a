"""Measure what clients that do harm cost others, on the shipped model.

Eight streams run; beside them, in turn, nobody, and one kind of harm at a time, ten requests in a second:

  broken bodies     JSON that is nested 100,000 levels deep, or ends in the middle of a million digits
  long texts        prompts of 1.9 MB, which are refused by their length
  cut up            texts to tokenize of 100 KB, in whatever script
  templates         chats that make the template work until it is stopped
  leaving           requests for 200 tokens whose connection is closed at once
  slow heads        400 connections that send nothing after the first byte

For each the time between tokens is told, mean and p99, and the time of a short request (two tokens) sent meanwhile.
Rounds take turns; a ratio is the median of those of each round. Harm comes from a process of its own, which waits for
nothing that the victims' clients do.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import common

VICTIMS, TOKENS, A_SECOND, SLOW_HEADS = 8, 160, 10, 400
MOST = 1.2
JSON = {"Content-Type": "application/json"}
TEMPLATE = (
    "{% if messages[-1].content == 'loop' %}{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}"
    "{% endfor %}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
)
PROMPT = "In the beginning God created"


@dataclass
class Seen:
    """What the victims of one round saw, in milliseconds."""

    gaps: list[float] = field(default_factory=list)
    canaries: list[float] = field(default_factory=list)

    def mean(self) -> float:
        """Return the mean time between tokens."""
        return statistics.fmean(self.gaps)

    def p99(self) -> float:
        """Return the time between tokens that one in a hundred exceeds."""
        return sorted(self.gaps)[int(0.99 * len(self.gaps))]

    def canary(self) -> float:
        """Return the median time of a short request."""
        return statistics.median(self.canaries)


def body(tokens: int) -> str:
    """Return a greedy request of so many tokens."""
    parameters = {"max_new_tokens": tokens, "ignore_eos_token": True}
    return json.dumps({"inputs": PROMPT, "parameters": parameters})


def gaps(port: int) -> list[float]:
    """Return the milliseconds between the tokens of a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", "/generate_stream", body(TOKENS), JSON)
    times = [time.perf_counter() for line in connection.getresponse() if line.startswith(b"data:")]
    connection.close()
    if len(times) != TOKENS:
        raise common.MeasureError(f"found {len(times)} tokens, expected {TOKENS}")
    return [1000 * (after - before) for before, after in itertools.pairwise(times)]


def short_request(port: int) -> float:
    """Return the milliseconds of a request of two tokens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    begun = time.perf_counter()
    connection.request("POST", "/generate", body(2), JSON)
    status = connection.getresponse().status
    connection.close()
    if status != 200:
        raise common.MeasureError(f"found {status}, expected 200")
    return 1000 * (time.perf_counter() - begun)


def post(path: str, bodies: list[bytes], expected: int) -> Callable[[int, int], None]:
    """Return what sends one body after the other, each on its own connection."""

    def send(port: int, n: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", path, bodies[n % len(bodies)], JSON)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        if response.status != expected:
            raise common.MeasureError(f"{path}: found {response.status}, expected {expected}: {content[:200]!r}")

    return send


def leave(port: int, n: int) -> None:
    """Ask for 200 tokens, and close."""
    raw = body(200 + n % 2).encode()
    head = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
        s.sendall(head.encode() + b"\r\n\r\n" + raw)


def harms() -> dict[str, Callable[[int, int], None] | None]:
    """Return what is sent beside the victims; slow heads are connections, and sent otherwise."""
    digits = b'{"inputs":"a","parameters":{"seed":' + b"9" * 1_000_000
    # A new word each time, so that nothing is remembered.
    texts = [
        json.dumps({"inputs": "".join(f"{word}{n * 4000 + i} " for i in range(4000))}).encode()
        for n, word in enumerate(("word", "слово", "単語", "\u0301\u0300", "👩‍👩‍👧"))
    ]
    letters = json.dumps({"inputs": "ab cd" * 380_000}).encode()
    chat = json.dumps({"messages": [{"role": "user", "content": "loop"}]}).encode()
    return {
        "nobody": None,
        "broken bodies": post("/generate", [b"[" * 100_000, digits], 400),
        "long texts": post("/generate", [letters], 422),
        "cut up": post("/tokenize", texts, 200),
        "templates": post("/v1/chat/completions", [chat], 422),
        "leaving": leave,
        "slow heads": None,
    }


def beside(port: int, name: str, harm: Callable[[int, int], None] | None) -> Seen:
    """Return what the victims see while the harm is done."""
    seen = Seen()

    def victim() -> None:
        seen.gaps.extend(gaps(port))

    with contextlib.ExitStack() as stack:
        for _ in range(SLOW_HEADS if name == "slow heads" else 0):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)).sendall(b"P")
        if harm:
            stack.enter_context(Attack(port, name))
        victims = [threading.Thread(target=victim) for _ in range(VICTIMS)]
        for thread in victims:
            thread.start()
        while any(thread.is_alive() for thread in victims):
            seen.canaries.append(short_request(port))
            time.sleep(0.05)
    return seen


class Attack:
    """One kind of harm, while it is entered; raises `MeasureError` where it was answered otherwise than expected."""

    def __init__(self, port: int, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.over, self.begun, self.told = context.Event(), context.Event(), context.Queue()
        self.process = context.Process(target=attack, args=(port, name, self.begun, self.over, self.told))

    def __enter__(self) -> None:
        self.process.start()
        if not self.begun.wait(60):
            raise common.MeasureError("found no attack after 60 s")

    def __exit__(self, *_: object) -> None:
        self.over.set()
        failure = self.told.get(timeout=60)
        self.process.join(60)
        if failure:
            raise common.MeasureError(failure)


def attack(port: int, name: str, begun: Any, over: Any, told: Any) -> None:
    """Do one kind of harm until it is over, and tell what went wrong with it, if anything did."""
    harm = harms()[name]
    assert harm is not None
    begun.set()
    failure = None
    for n in itertools.count():
        if over.is_set() or failure:
            break
        started = time.perf_counter()
        try:
            harm(port, n)
        except (common.MeasureError, OSError) as error:
            failure = f"{name}: {error}"
        over.wait(max(0.0, 1 / A_SECOND - (time.perf_counter() - started)))
    told.put(failure)


def measure(port: int, launcher: Path, rounds: int) -> dict[str, list[Seen]]:
    """Return what was seen in each round beside each harm."""
    found: dict[str, list[Seen]] = {name: [] for name in harms()}
    with tempfile.TemporaryDirectory() as folder:
        template = Path(folder) / "chat.jinja"
        template.write_text(TEMPLATE)
        command: list[str | Path] = [launcher, "--model-id", common.SHIPPED_MODEL, "--port", str(port)]
        command += ["--hostname", "127.0.0.1", "--dtype", "float32", "--shard-uds-path", f"{folder}/run"]
        command += ["--chat-template", template]
        with common.Server(command, log=Path(folder) / "log", speaks=False) as server:
            server.wait_until_healthy(f"http://127.0.0.1:{port}/health", 120)
            for name, harm in harms().items():
                beside(port, name, harm)
            for _ in range(rounds):
                for name, harm in harms().items():
                    found[name].append(beside(port, name, harm))
    return found


def main() -> None:
    """Run the rounds, write the result, and exit with 1 if a limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--port", type=int, default=18342)
    parser.add_argument("--launcher", type=Path, default=common.ROOT / ".venv" / "bin" / "text-generation-launcher")
    arguments = parser.parse_args()
    head = common.environment()
    found = measure(arguments.port, arguments.launcher, arguments.rounds)

    def ratio(name: str, what: Callable[[Seen], float]) -> float:
        return statistics.median(
            what(one) / what(alone) for one, alone in zip(found[name], found["nobody"], strict=True)
        )

    whats: list[tuple[str, Callable[[Seen], float]]] = [("mean", Seen.mean), ("p99", Seen.p99), ("short", Seen.canary)]
    rows: list[list[Any]] = []
    for name, seen in found.items():
        row = [name]
        for _, what in whats:
            row += [common.spread([what(one) for one in seen], 2), f"{ratio(name, what):.2f}"]
        rows.append(row)
    titles = ["8 streams beside", "mean ms between tokens", "", "p99 ms", "", "a short request, ms", ""]
    text = common.table(titles, rows)
    limits = [
        (f"{name}: {kind}", ratio(name, what), MOST) for name in found if name != "nobody" for kind, what in whats
    ]
    text += "\n\n" + "\n\n".join(common.verdict(name, value, limit, "×") for name, value, limit in limits)
    common.write_result("neighbours", "What harm costs others", head, text)
    sys.exit(any(value > limit for _, value, limit in limits))


if __name__ == "__main__":
    main()
