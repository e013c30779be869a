"""Measure what one step costs in the scheduler: `plan` and `commit` at 256 running sequences.

Runs the scheduler's own example `cost` several times, which prints a table and knows the limit of 30 µs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

import common


def main() -> None:
    """Run the example, write what it prints, and exit as it does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    head = common.environment()
    command = ["cargo", "run", "--release", "--quiet", "-p", "scheduler", "--example", "cost"]
    outputs = []
    failed = False
    for _ in range(arguments.rounds):
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, timeout=1800, check=False)
        if not done.stdout.strip():
            raise common.MeasureError(f"cost: ended with {done.returncode} and no output: {done.stderr.strip()}")
        outputs.append(done.stdout.strip())
        failed |= done.returncode != 0
    body = "\n\n".join(f"Round {number}\n\n```text\n{output}\n```" for number, output in enumerate(outputs, 1))
    common.write_result("scheduler_cost", "Scheduler: plan and commit", head, body)
    sys.exit(failed)


if __name__ == "__main__":
    main()
