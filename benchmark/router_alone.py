"""Measure the router without a model, against servers that do nothing.

Requests/s: `POST /generate` of one token, the router with a stub shard against a bare axum handler that reads and writes
JSON. Events/s: 64 streams, the router against a bare hyper stream of events made in advance, sent each by itself (as a
server does that makes one event after the other) and as many as fit a write. Rounds are interleaved; client, servers and
stub shard share the cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common


def main() -> None:
    """Run the rounds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--port", type=int, default=18310)
    parser.add_argument("--router", type=Path, default=common.ROUTER)
    arguments = parser.parse_args()
    common.build("text-generation-benchmark", "text-generation-router")
    head = common.environment()
    permits = ["--max-concurrent-requests", str(2 * arguments.streams)]
    bounds = ["--streams", str(arguments.streams), "--requests", "1000000000", "--duration", str(arguments.seconds)]
    requests = ["--api", "generate", "--max-new-tokens", "1", *bounds]
    events = ["--api", "generate-stream", "--max-new-tokens", "256", *bounds]
    with (
        common.router_alone(arguments.port, arguments.router, router_options=permits) as router,
        common.null_server("--flush-each") as each,
        common.null_server() as bulk,
    ):
        addresses = {"router": common.listening(router)[0]}
        addresses |= {"each": common.listening(each)[0], "bulk": common.listening(bulk)[0]}
        cases = [
            ("router, stub shard", "requests", "router", requests),
            ("bare axum handler", "requests", "bulk", requests),
            ("router, stub shard", "events", "router", events),
            ("bare hyper stream, events by themselves", "events", "each", events),
            ("bare hyper stream, events in bulk", "events", "bulk", events),
        ]
        rates: list[list[float]] = [[] for _ in cases]
        for _ in range(arguments.rounds):
            for index, (_, unit, server, options) in enumerate(cases):
                rates[index].append(common.load(addresses[server], *options)[f"{unit}_per_s"])
    routers = {"requests": rates[0], "events": rates[2]}
    rows = [
        (
            name,
            unit + "/s",
            common.spread(rates[index]),
            common.spread([a / b for a, b in zip(routers[unit], rates[index], strict=True)], 3),
        )
        for index, (name, unit, _, _) in enumerate(cases)
    ]
    body = common.table(["server", "unit", "median (range)", "router ÷ this"], rows)
    body += f"\n\n{arguments.streams} streams, {arguments.rounds} interleaved rounds of {arguments.seconds:g} s."
    common.write_result("router_alone", "The router alone", head, body)


if __name__ == "__main__":
    main()
