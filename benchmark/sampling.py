"""Time what drawing an id for each row of logits takes: our own kernels beside torch's operators, option by option.

The logits are normally distributed, of a standard deviation of 3. Rounds are interleaved. The floor is the time in which torch
finds the highest logit of each row, which reads them all once.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import common
import numpy as np
import torch
from numpy.typing import NDArray
from text_generation_server.config import prepare_environment
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sampling.processors import change
from text_generation_server.sampling.sampler import Draw, draw
from torch import Tensor

OPTIONS: dict[str, dict[str, object]] = {
    "greedy": {},
    "temperature": {"do_sample": True, "temperature": 0.8},
    "top_k 50": {"do_sample": True, "top_k": 50},
    "top_k 50, top_p 0.9": {"do_sample": True, "top_k": 50, "top_p": 0.9},
    "top_p 0.9": {"do_sample": True, "top_p": 0.9},
    "typical_p 0.9": {"do_sample": True, "typical_p": 0.9},
    "greedy, penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.5, "count_penalty": 0.5},
    "greedy, 300 biases": {"logit_bias": tuple((7 * i, 0.5) for i in range(300))},
}
NUM_IDS = 1000  # of each sequence, half of them generated: what penalties count


def step(
    logits: Tensor,
    counts: list[Tensor],
    params: list[SamplingParams],
    positions: NDArray[np.int64],
    kernels: CpuKernels | None = None,
) -> Draw:
    """What a step does with logits that it may not change."""
    processed = logits
    if params[0].counts_ids or params[0].logit_bias:
        processed = logits.clone()
        change(processed, range(len(params)), params, counts, [NUM_IDS] * len(params), kernels)
    return draw(logits, processed, params, positions, kernels=kernels)


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(shapes: list[tuple[int, int]], rounds: int) -> str:
    """The table."""
    kernels, lines = CpuKernels(), []
    for rows, vocab in shapes:
        logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 3
        positions = np.arange(rows)
        ids = torch.randint(0, vocab, (rows, NUM_IDS), generator=torch.Generator().manual_seed(rows))
        counts = [
            torch.stack([torch.bincount(part, minlength=vocab).float() for part in (row, row[NUM_IDS // 2 :])])
            for row in ids
        ]
        for name, options in OPTIONS.items():
            params = [SamplingParams(seed=i, **options) for i in range(rows)]  # type: ignore[arg-type]
            found: dict[str, list[float]] = {"ours": [], "torch": [], "floor": []}
            for _ in range(rounds):
                found["ours"].append(milliseconds(partial(step, logits, counts, params, positions, kernels)))
                found["torch"].append(milliseconds(partial(step, logits, counts, params, positions)))
                found["floor"].append(milliseconds(partial(logits.max, -1)))
            ratio = statistics.median(a / b for a, b in zip(found["torch"], found["ours"], strict=True))
            lines.append([f"{rows} × {vocab}", name, *(common.spread(found[who], 2) for who in found), f"{ratio:.1f}"])
    return common.table(["logits", "options", "ours, ms", "torch, ms", "read once, ms", "torch ÷ ours"], lines)


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    prepare_environment()
    torch.set_num_threads(arguments.threads)
    body = measure([(1, 32_000), (16, 4096), (32, 32_000), (16, 151_936)], arguments.rounds)
    body = f"{arguments.threads} threads; medians and ranges of {arguments.rounds} interleaved rounds.\n\n{body}"
    common.write_result("sampling", "Drawing ids", common.environment(), body)
    return 0


if __name__ == "__main__":
    sys.exit(main())
