"""Measure what a token costs on its way to text in the router: incremental detokenization and the search for stop strings.

Runs the router's own example `text_cost` several times; each row of its table is a kind of text and a number of stop
strings. The limit is held against the round that others on the machine disturbed least: every round computes the same.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import common

LIMIT_US = 2.0
COLUMNS = ["text", "stop strings", "median ns", "p99 ns"]


def run() -> dict[tuple[str, ...], tuple[float, float]]:
    """Run the example once; return (median, p99) in nanoseconds per token for each (text, stop strings)."""
    command = ["cargo", "run", "--release", "--quiet", "-p", "text-generation-router", "--example", "text_cost"]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=1800, check=False)
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines()]
    if done.returncode or not lines or lines[0] != COLUMNS:
        raise common.MeasureError(
            f"text_cost: ended with {done.returncode}, expected a table of {COLUMNS}: {done.stderr}"
        )
    return {tuple(line[:2]): (float(line[2]), float(line[3])) for line in lines[2:]}


def main() -> None:
    """Run the rounds, write the result, and exit with 1 if the limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    head = common.environment()
    rounds = [run() for _ in range(arguments.rounds)]
    rows = []
    for case in rounds[0]:
        medians, p99s = ([costs[case][index] / 1000 for costs in rounds] for index in (0, 1))
        rows.append((*case, common.spread(medians, 2), common.spread(p99s, 2)))
    body = common.table([*COLUMNS[:2], "median µs per token (range of rounds)", "p99 µs"], rows)
    worst = max(min(costs[case][0] for costs in rounds) for case in rounds[0]) / 1000
    body += "\n\n" + common.verdict("median per token, worst row, least disturbed round", worst, LIMIT_US, "µs")
    common.write_result("text_cost", "From a token to its text", head, body)
    sys.exit(worst > LIMIT_US)


if __name__ == "__main__":
    main()
