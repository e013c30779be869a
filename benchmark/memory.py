"""Measure whether the router's memory stays flat: its slope per 10,000 requests, over many times as many.

The router runs with a stub shard. After warm-up its resident set is read after every batch of requests; the slope is
that of the least-squares line. The KV cache is small enough that its index is full after the warm-up: a cache that is still
filling is no leak. The allocator keeps pages for a while and gives them back in waves of some MiB, 100,000 requests long and
more, so a line through fewer of them says where in a wave they were.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

import common

LIMIT_MIB = 1.0


def resident_mib(process_id: int) -> float:
    """Return the resident set of a process in MiB."""
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Send the requests, write the result, and exit with 1 if the limit is not held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=300_000)
    parser.add_argument("--warmup", type=int, default=25_000)
    parser.add_argument("--batch", type=int, default=10_000, help="requests between two readings")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--port", type=int, default=18312)
    parser.add_argument("--router", type=Path, default=common.ROUTER)
    arguments = parser.parse_args()
    common.build("text-generation-benchmark", "text-generation-router")
    head = common.environment()
    readings: list[tuple[int, float]] = []
    with common.router_alone(arguments.port, arguments.router, "--num-blocks", "1024") as router:
        address, _, process_id, *_ = common.listening(router)

        def send(num_requests: int, seed: int) -> None:
            # Half of the requests streams, half of them JSON; new prompts each time, of which few share a prefix.
            for api in ("generate-stream", "generate"):
                common.load(
                    address,
                    *("--api", api, "--streams", str(arguments.streams), "--requests", str(num_requests // 2)),
                    *("--num-prompts", str(num_requests), "--seed", str(seed), "--words", "24"),
                    *("--max-new-tokens", "16", "--duration", "300"),
                )

        send(arguments.warmup, 0)
        readings.append((0, resident_mib(int(process_id))))
        for batch in range(1, arguments.requests // arguments.batch + 1):
            send(arguments.batch, batch)
            readings.append((batch * arguments.batch, resident_mib(int(process_id))))
    slope = statistics.linear_regression(*zip(*readings, strict=True)).slope * 10_000
    rows = [(f"{requests:,}", f"{mib:.2f}") for requests, mib in readings]
    body = common.table(["requests after warm-up", "resident set of the router (MiB)"], rows)
    body += "\n\n" + common.verdict("slope per 10,000 requests", slope, LIMIT_MIB, "MiB")
    common.write_result("memory", f"Memory of the router over {arguments.requests:,} requests", head, body)
    sys.exit(slope > LIMIT_MIB)


if __name__ == "__main__":
    main()
