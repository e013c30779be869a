"""Measure what answers of a given form cost, and what hostile forms cost others, on the shipped model.

Three parts, against one server in float32 with one shard:

  throughput   16 clients, answers of 128 tokens, with a form that never ends and without one
  first token  one token, with a schema that was seen before and without one
  hostile      the time between the tokens of one stream: beside nobody, beside a neighbour without a form, beside one whose
               form costs as much as is allowed, and beside clients that send forms that are refused, each another one
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

CLIENTS, TOKENS = 16, 128
LEAST_RATIO, MOST_FIRST_MS, MOST_DELAY = 0.95, 1.0, 0.20
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 9},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
ENDLESS = {"type": "json", "value": {"type": "array", "items": PERSON, "minItems": 1000}}
# Many ways on at every place, and lexer states that are new again and again.
COSTLY = {"type": "regex", "value": r"([ab]*a[ab]{13}|(\w{1,60}\s\w{1,60}[^,]{0,40}){30}|(.*a.*b.*c.*d){9})+#"}
PROMPT = "In the beginning God created"


def parameters(tokens: int, grammar: dict[str, Any] | None) -> dict[str, Any]:
    """Return the parameters of a greedy request of so many tokens."""
    form = {"grammar": grammar} if grammar else {"ignore_eos_token": True}
    return {"max_new_tokens": tokens, "details": True, **form}


class Client:
    """One connection that is kept."""

    def __init__(self, port: int) -> None:
        """Connect when first asked."""
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return status and answer."""
        self.connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = self.connection.getresponse()
        return response.status, json.loads(response.read())

    def generate(self, tokens: int, grammar: dict[str, Any] | None) -> int:
        """Return how many tokens were generated."""
        status, answer = self.post("/generate", {"inputs": PROMPT, "parameters": parameters(tokens, grammar)})
        if status != 200:
            raise common.MeasureError(f"/generate: found {status}: {answer}")
        return int(answer["details"]["generated_tokens"])

    def gaps(self, tokens: int) -> list[float]:
        """Return the milliseconds between the tokens of a stream."""
        body = {"inputs": PROMPT, "parameters": parameters(tokens, None)}
        self.connection.request("POST", "/generate_stream", json.dumps(body), {"Content-Type": "application/json"})
        times = [time.perf_counter() for line in self.connection.getresponse() if line.startswith(b"data:")]
        return [1000 * (after - before) for before, after in itertools.pairwise(times)]


def throughput(port: int, requests: int, grammar: dict[str, Any] | None) -> float:
    """Return tokens per second of all clients together."""
    counts = [0] * CLIENTS

    def run(at: int) -> None:
        client = Client(port)
        counts[at] = sum(client.generate(TOKENS, grammar) for _ in range(requests))

    threads = [threading.Thread(target=run, args=(at,)) for at in range(CLIENTS)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - begun
    if sum(counts) != CLIENTS * requests * TOKENS:
        raise common.MeasureError(f"found {sum(counts)} tokens, expected {CLIENTS * requests * TOKENS}")
    return sum(counts) / took


def first_tokens(port: int, count: int) -> tuple[list[float], list[float]]:
    """Return milliseconds to an answer of one token: without a form and with a schema seen before, in turn."""
    client, grammar = Client(port), {"type": "json", "value": PERSON}
    found: tuple[list[float], list[float]] = ([], [])
    client.generate(1, grammar)
    for _ in range(count):
        for times, form in zip(found, (None, grammar), strict=True):
            begun = time.perf_counter()
            client.generate(1, form)
            times.append(1000 * (time.perf_counter() - begun))
    return found


def beside(port: int, tokens: int, neighbour: Callable[[Client], None] | None) -> list[float]:
    """Return the gaps of one stream while a neighbour repeats what it does."""
    over = threading.Event()

    def run() -> None:
        client = Client(port)
        while neighbour is not None and not over.is_set():
            neighbour(client)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        time.sleep(0.2)
        return Client(port).gaps(tokens)
    finally:
        over.set()
        thread.join()


def attack() -> Callable[[Client], None]:
    """Return what sends a refused form after the other, ten in a second, none of them twice."""
    numbers = itertools.count()

    def send(client: Client) -> None:
        n = next(numbers)
        forms: list[dict[str, Any]] = [
            {"type": "regex", "value": f"(a{{1000}}){{1000}}{n}"},
            {
                "type": "json",
                "value": {"type": "object", "properties": {f"p{i}x{n}": {"type": "string"} for i in range(900)}},
            },
            {"type": "json", "value": {"type": "integer", "multipleOf": 1_000_003 + n}},
            {"type": "json", "value": {"enum": [], "title": str(n)}},
        ]
        status, answer = client.post("/generate", {"inputs": "a", "parameters": {"grammar": forms[n % len(forms)]}})
        if status != 422:
            raise common.MeasureError(f"found {status}, expected 422: {answer}")
        time.sleep(0.1)

    return send


def main() -> None:
    """Run the rounds, write the result, and exit with 1 if a limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=3, help="of each client and round")
    parser.add_argument("--port", type=int, default=18341)
    parser.add_argument("--launcher", type=Path, default=common.ROOT / ".venv" / "bin" / "text-generation-launcher")
    arguments = parser.parse_args()
    head, port = common.environment(), arguments.port
    neighbours: dict[str, Callable[[Client], None] | None] = {
        "nobody": None,
        "a neighbour without a form": lambda client: (client.generate(TOKENS, None), None)[1],
        "one whose form is costly": lambda client: (client.generate(TOKENS, COSTLY), None)[1],
        "refused forms, ten a second": attack(),
    }
    plain, bound = [], []
    gaps: dict[str, list[list[float]]] = {name: [] for name in neighbours}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            arguments.launcher,
            "--model-id",
            common.SHIPPED_MODEL,
            "--port",
            str(port),
            "--hostname",
            "127.0.0.1",
        ]
        command += ["--dtype", "float32", "--shard-uds-path", f"{folder}/run"]
        with common.Server(command, log=Path(folder) / "log", speaks=False) as server:
            server.wait_until_healthy(f"http://127.0.0.1:{port}/health", 120)
            throughput(port, 1, None)
            throughput(port, 1, ENDLESS)
            for _ in range(arguments.rounds):
                plain.append(throughput(port, arguments.requests, None))
                bound.append(throughput(port, arguments.requests, ENDLESS))
            without, seen = first_tokens(port, 100)
            for _ in range(arguments.rounds):
                for name, neighbour in neighbours.items():
                    gaps[name].append(beside(port, 400, neighbour))
    ratio = statistics.median(b / p for b, p in zip(bound, plain, strict=True))
    extra = statistics.median(seen) - statistics.median(without)
    rows = [
        ("without a form", common.spread(plain), ""),
        ("with one", common.spread(bound), f"{ratio:.3f}"),
    ]
    body = common.table([f"{CLIENTS} clients, {TOKENS} tokens each", "tokens/s", "ratio"], rows)
    rows = [
        (name, common.spread(times, 2))
        for name, times in (("without a form", without), ("with a schema seen before", seen))
    ]
    body += "\n\n" + common.table(["an answer of one token", "ms"], rows)

    def of(name: str, what: Callable[[list[float]], float]) -> list[float]:
        return [what(one) for one in gaps[name]]

    def p99(one: list[float]) -> float:
        return sorted(one)[int(0.99 * len(one))]

    rows = [(name, common.spread(of(name, statistics.fmean), 2), common.spread(of(name, p99), 2)) for name in gaps]
    body += "\n\n" + common.table(["a stream beside", "mean ms between tokens", "p99 ms"], rows)

    def delay(name: str, base: str) -> float:
        pairs = zip(of(name, statistics.fmean), of(base, statistics.fmean), strict=True)
        return statistics.median(one / other for one, other in pairs) - 1

    costly = delay("one whose form is costly", "a neighbour without a form")
    refused = delay("refused forms, ten a second", "nobody")
    limits = [
        ("throughput lost to forms", 1 - ratio, 1 - LEAST_RATIO, ""),
        ("extra to the first token, schema seen before", extra, MOST_FIRST_MS, "ms"),
        ("delay by a neighbour's costly form, against one without", costly, MOST_DELAY, ""),
        ("delay by refused forms", refused, MOST_DELAY, ""),
    ]
    body += "\n\n" + "\n\n".join(common.verdict(*limit) for limit in limits)
    common.write_result("constrained", "Answers of a given form", head, body)
    sys.exit(any(found > limit for _, found, limit, _ in limits))


if __name__ == "__main__":
    main()
