"""Measure shards on one machine beside one process: decode of one sequence through HTTP, the same cores for all.

A gptq checkpoint (4 bits, groups of 128) of TinyLlama's dimensions with random weights, made here. One process has a thread
for each core; N shards have one each, share no weights, and add up their parts twice in each layer. Sides take turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path

import common
import peers

START_TIMEOUT_S = 300.0
PORT = 18430


def measure(arguments: argparse.Namespace, folder: Path) -> tuple[str, float]:
    """The table, and the median of the ratios of the first number of shards beside one."""
    model = peers.servable(folder)
    runs: dict[int, list[common.Report]] = {count: [] for count in [1, *arguments.shards]}
    for turn in range(arguments.rounds):
        for count in runs:
            command = [
                common.ROOT / ".venv" / "bin" / "text-generation-launcher",
                "--model-id",
                model,
                "--port",
                str(PORT),
            ]
            command += ["--hostname", "127.0.0.1", "--num-shard", str(count)]
            with common.Server(command, log=folder / f"{count}.log", speaks=False) as server:
                server.wait_until_healthy(f"http://127.0.0.1:{PORT}/health", START_TIMEOUT_S)
                report = common.load(
                    f"127.0.0.1:{PORT}",
                    *("--streams", "1", "--requests", str(arguments.requests), "--warmup", "1", "--words", "16"),
                    *("--max-new-tokens", str(arguments.tokens), "--duration", "120", "--timeout", "120"),
                )
            runs[count].append(report)
            print(
                f"round {turn + 1}: {count} shards: {report['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True
            )
    rows, ratios = [], {}
    for count, reports in runs.items():
        pairs = zip(reports, runs[1], strict=True)
        ratios[count] = [mine["tokens_per_s"] / one["tokens_per_s"] for mine, one in pairs]
        between = [report["between_tokens"]["p50_ms"] for report in reports]
        speeds = [report["tokens_per_s"] for report in reports]
        rows.append([count, common.spread(speeds, 1), common.spread(between, 1), common.spread(ratios[count], 2)])
    head = ["shards", "tokens/s", "between tokens p50 ms", "÷ one process"]
    first = statistics.median(ratios[arguments.shards[0]])
    note = f"**{arguments.shards[0]} shards ÷ one process: {first:.2f}, at least 0.9 wanted: {'held' if first >= 0.9 else 'NOT HELD'}.**"
    return f"{common.table(head, rows)}\n\n{len(os.sched_getaffinity(0))} cores. {note}", first


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[2], help="numbers of shards beside one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where the model is made and kept; by default it is removed")
    parser.add_argument("--name", default="shards", help="of the result's file (default: %(default)s)")
    arguments = parser.parse_args()
    common.build("text-generation-benchmark")
    head = common.environment()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(exist_ok=True)
        body, ratio = measure(arguments, folder.resolve())
    common.write_result(arguments.name, "Shards on one machine beside one process", head, body)
    if ratio < 0.9:
        sys.exit(1)


if __name__ == "__main__":
    main()
