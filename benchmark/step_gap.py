"""Measure how long a shard waits for the router between two steps with nothing to hide it.

One step in flight, greedy, 32 sequences, a vocabulary of 32,000: at the stub shard, from a `StepResult` handed to gRPC to
the next `StepPlan` decoded. Once with a shard that answers at once, where the answers to the clients of the step before
compete for the cores, and once with one that takes 5 ms per step, where they are long sent.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

LIMIT_MS = 1.0
STEP_US = (0, 5000)


def gap(arguments: argparse.Namespace, step_us: int) -> dict[str, Any]:
    """Run the measurement once and return its distribution in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gap.json"
        command: list[str | Path] = [
            common.BENCHMARK,
            "gap",
            "--router",
            arguments.router,
            "--port",
            str(arguments.port),
        ]
        command += ["--sequences", "32", "--tokens", str(arguments.tokens), "--vocab-size", "32000"]
        command += ["--step-us", str(step_us), "--json", path, "--", "--pipeline-depth", "1"]
        subprocess.run(command, cwd=common.ROOT, check=True, timeout=300, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(path.read_text())["gap"]
    return found


def main() -> None:
    """Run the rounds, write the result, and exit with 1 if the limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512, help="of each sequence")
    parser.add_argument("--port", type=int, default=18311)
    parser.add_argument("--router", type=Path, default=common.ROUTER)
    arguments = parser.parse_args()
    common.build("text-generation-benchmark", "text-generation-router")
    head = common.environment()
    found: dict[int, list[dict[str, Any]]] = {step_us: [] for step_us in STEP_US}
    for _ in range(arguments.rounds):
        for step_us in STEP_US:
            found[step_us].append(gap(arguments, step_us))
    rows = []
    for step_us, runs in found.items():
        columns = [common.spread([run[f"{column}_ms"] for run in runs], 3) for column in ("p50", "p90", "p99")]
        rows.append((f"{step_us / 1000:g} ms", *columns, sum(run["count"] for run in runs)))
    body = common.table(["a step takes", "p50 ms (range of rounds)", "p90 ms", "p99 ms", "gaps"], rows)
    worst = max(statistics.median(run["p50_ms"] for run in runs) for runs in found.values())
    body += "\n\n" + common.verdict("median gap", worst, LIMIT_MS, "ms")
    common.write_result("step_gap", "Between two steps, with nothing to hide it", head, body)
    sys.exit(worst > LIMIT_MS)


if __name__ == "__main__":
    main()
