"""Measure what HTTP costs: the router's routes in front of an engine that answers at once, beside bare handlers.

Runs the router's own example `http_cost` several times, with keys, metrics and traces on. Requests are held against a bare
axum handler of the same answer, events against a bare stream of the same events; client and servers share the cores.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys

import common

LEAST = {"requests": 0.60, "events": 0.50}


def run() -> dict[str, tuple[float, float]]:
    """Run the example once; return (ours, bare) per second of requests and of events."""
    command = ["cargo", "run", "--release", "--quiet", "-p", "text-generation-router", "--example", "http_cost"]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=1800, check=False)
    found = re.findall(r"^(\w+)/s: (\d+) here, (\d+) bare", done.stdout, re.MULTILINE)
    if done.returncode or {name for name, _, _ in found} != LEAST.keys():
        raise common.MeasureError(f"http_cost: ended with {done.returncode}: {done.stdout}{done.stderr}")
    return {name: (float(ours), float(bare)) for name, ours, bare in found}


def main() -> None:
    """Run the rounds, write the result, and exit with 1 if a limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    head = common.environment()
    rounds = [run() for _ in range(arguments.rounds)]
    rows, ratios = [], {}
    for name in LEAST:
        ours, bare = ([one[name][index] for one in rounds] for index in (0, 1))
        each = [mine / theirs for mine, theirs in zip(ours, bare, strict=True)]
        ratios[name] = statistics.median(each)
        rows.append((name + "/s", common.spread(ours), common.spread(bare), common.spread(each, 2)))
    body = common.table(["", "this server", "bare", "ratio"], rows)
    for name, least in LEAST.items():
        body += "\n\n" + common.verdict(f"{name} lost against bare", 1 - ratios[name], 1 - least, "")
    common.write_result("http_cost", "What HTTP costs", head, body)
    sys.exit(any(ratios[name] < least for name, least in LEAST.items()))


if __name__ == "__main__":
    main()
