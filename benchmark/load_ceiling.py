"""Measure the ceiling of the load generator: against the null server, which does nothing, as fast as it can.

A server measured far below these figures is itself the bottleneck, not the load generator.
"""

from __future__ import annotations

import argparse

import common

CASES = [
    ("events, as many as fit a write", (), "generate-stream", 64, 256, "events_per_s"),
    ("events, each by itself", ("--flush-each",), "generate-stream", 64, 256, "events_per_s"),
    ("streams of one event", (), "generate-stream", 64, 1, "requests_per_s"),
    ("JSON answers (axum)", (), "generate", 64, 1, "requests_per_s"),
    ("OpenAI chunks, each by itself", ("--flush-each",), "openai", 64, 256, "events_per_s"),
]


def main() -> None:
    """Run every case in interleaved rounds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    arguments = parser.parse_args()
    common.build("text-generation-benchmark")
    head = common.environment()
    rates: dict[str, list[float]] = {case[0]: [] for case in CASES}
    for _ in range(arguments.rounds):
        for name, options, api, streams, tokens, measure in CASES:
            with common.null_server(*options) as server:
                address = common.listening(server)[0]
                report = common.load(
                    address,
                    *("--api", api, "--model", "null", "--streams", str(streams), "--max-new-tokens", str(tokens)),
                    *("--requests", "1000000000", "--duration", str(arguments.seconds)),
                )
                rates[name].append(report[measure])
    rows = [
        (name, f"`--api {api}`", streams, tokens, common.spread(rates[name]), measure.replace("_per_s", "/s"))
        for name, _, api, streams, tokens, measure in CASES
    ]
    body = common.table(["case", "load", "streams", "tokens", "median (range)", "unit"], rows)
    body += "\n\nClient and server share the cores, one thread each."
    common.write_result("load_ceiling", "Ceiling of the load generator", head, body)


if __name__ == "__main__":
    main()
