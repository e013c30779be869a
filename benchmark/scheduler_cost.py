"""Measure what one step costs in the scheduler: `plan` and `commit` at 256 running sequences and more.

Runs the scheduler's own example `cost` several times; a row of its table is a setting, and its median is in microseconds.
The limit is for 256 sequences without drafts. It is held against the round that others on the machine disturbed least:
the scheduler computes the same in every round, and waiting only adds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import common

LIMIT_US = 30.0
COLUMNS = ["running", "context", "open steps", "drafts", "steps", "median µs", "p99 µs"]


def run() -> dict[tuple[str, ...], tuple[float, float]]:
    """Run the example once; return (median, p99) in microseconds for each (running, context, open steps, drafts)."""
    command = ["cargo", "run", "--release", "--quiet", "-p", "scheduler", "--example", "cost"]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=1800, check=False)
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in done.stdout.splitlines()]
    if done.returncode or not lines or lines[0] != COLUMNS:
        raise common.MeasureError(f"cost: ended with {done.returncode}, expected a table of {COLUMNS}: {done.stderr}")
    return {tuple(line[:4]): (float(line[5]), float(line[6])) for line in lines[2:]}


def main() -> None:
    """Run the rounds, write the result, and exit with 1 if the limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    head = common.environment()
    rounds = [run() for _ in range(arguments.rounds)]
    rows = []
    for case in rounds[0]:
        medians, p99s = ([costs[case][index] for costs in rounds] for index in (0, 1))
        rows.append((*case, common.spread(medians, 1), common.spread(p99s, 1)))
    body = common.table([*COLUMNS[:4], "plan + commit, median µs (range of rounds)", "p99 µs"], rows)
    gated = [case for case in rounds[0] if case[0] == "256" and case[3] == "0"]
    if not gated:
        raise common.MeasureError(f"cost: found no row for 256 sequences without drafts in {list(rounds[0])}")
    worst = max(min(costs[case][0] for costs in rounds) for case in gated)
    body += "\n\n" + common.verdict("median at 256 sequences, least disturbed round", worst, LIMIT_US, "µs")
    common.write_result("scheduler_cost", "Scheduler: plan and commit", head, body)
    sys.exit(worst > LIMIT_US)


if __name__ == "__main__":
    main()
