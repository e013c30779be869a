"""Time paged attention: our kernels on every instruction set, beside torch's, decode and prefill, contexts short and long.

Layers have caches of their own, whose blocks lie in no order, as those of a server do that has run for a while. torch's
`scaled_dot_product_attention` gets keys and values that lie together, bfloat16, and copies nothing. Rounds are interleaved. Beside
the figures stand the two roofs, measured in the same run: the bytes of the keys and values that a step must read, and the
multiplications in float32. Before anything is timed, results are compared with float64.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import common
import roofs
import torch
import torch.nn.functional as F
from text_generation_server.batch import StepBatch
from text_generation_server.config import prepare_environment
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.cpu.native.library import Library
from text_generation_server.kernels.interface import AttentionOptions, CacheSpec
from torch import Tensor

BLOCK = 16
HEADS = 32
SHAPES = {"1.1B": (4, 64), "8B": (8, 128)}  # key heads, size of a head: TinyLlama and Llama 3
# Sequences, tokens of each in this step, positions in the cache.
STEPS = {
    "decode, 1 x 2,048": (1, 1, 2048), "decode, 16 x 192": (16, 1, 192), "decode, 16 x 2,048": (16, 1, 2048),
    "prefill, 512": (1, 512, 512), "prefill, 2,048": (1, 2048, 2048),
}  # fmt: skip
TOLERANCE = 4e-3


@dataclass(frozen=True)
class Step:
    """Queries, and keys and values of every layer: [layers][sequences, heads, positions, size]."""

    queries: Tensor  # [sequences, HEADS, tokens, size]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def bytes_read(self) -> int:
        return sum(each.nbytes for each in (*self.keys, *self.values))

    @property
    def operations(self) -> float:
        """Multiplications and additions of what queries see."""
        sequences, heads, tokens, size = self.queries.shape
        seen = tokens * (self.keys[0].shape[2] - tokens) + tokens * (tokens + 1) / 2
        return 4.0 * len(self.keys) * sequences * heads * size * seen


def make_step(sequences: int, tokens: int, length: int, kv_heads: int, size: int, layers: int) -> Step:
    """Normally distributed."""
    generator = torch.Generator().manual_seed(length)

    def random(heads: int, positions: int) -> Tensor:
        return torch.randn(sequences, heads, positions, size, generator=generator).bfloat16()

    keys = [random(kv_heads, length) for _ in range(layers)]
    return Step(random(HEADS, tokens), keys, [random(kv_heads, length) for _ in range(layers)])


def ours(kernels: CpuKernels, step: Step) -> Callable[[], list[Tensor]]:
    """All layers, the cache filled already."""
    sequences, _, tokens, size = step.queries.shape
    kv_heads, length = step.keys[0].shape[1:3]
    per = -(-length // BLOCK)
    cache = kernels.new_kv_cache(CacheSpec(len(step.keys), kv_heads, size, torch.bfloat16), sequences * per, BLOCK)
    tables = torch.randperm(sequences * per, generator=torch.Generator().manual_seed(1)).view(sequences, per)
    positions = torch.arange(length)
    slots = tables[:, positions // BLOCK] * BLOCK + positions % BLOCK

    def batch(tokens: int, slots: Tensor) -> StepBatch:
        return StepBatch(
            token_ids=torch.zeros(sequences * tokens, dtype=torch.int64),
            positions=torch.arange(length - tokens, length).repeat(sequences),
            starts=[i * tokens for i in range(sequences + 1)], context_lengths=[length] * sequences, slots=slots.reshape(-1),
            block_tables=tables, sample_rows=torch.zeros(0, dtype=torch.int64), kv_cache=cache,
        )  # fmt: skip

    for layer, (keys, values) in enumerate(zip(step.keys, step.values, strict=True)):
        flat = [each.transpose(1, 2).reshape(sequences * length, kv_heads, size) for each in (keys, values)]
        kernels.store_kv(flat[0], flat[1], layer, batch(length, slots))
    queries = step.queries.transpose(1, 2).reshape(sequences * tokens, HEADS, size).contiguous()
    options, now = AttentionOptions(size**-0.5), batch(tokens, slots[:, -tokens:])
    return lambda: [kernels.attention(queries, layer, now, options) for layer in range(len(step.keys))]


def torchs(step: Step) -> Callable[[], list[Tensor]]:
    """The same by torch, [sequences, HEADS, tokens, size] of each layer."""
    tokens = step.queries.shape[2]

    def run() -> list[Tensor]:
        pairs = zip(step.keys, step.values, strict=True)
        return [
            F.scaled_dot_product_attention(step.queries, k, v, is_causal=tokens > 1, enable_gqa=True) for k, v in pairs
        ]

    return run


def check(name: str, found: Tensor, step: Step) -> None:
    """The first layer, relative to float64. found: [sequences * tokens, HEADS * size]."""
    sequences, _, tokens, size = step.queries.shape
    wanted = F.scaled_dot_product_attention(
        step.queries.double(), step.keys[0].double(), step.values[0].double(), is_causal=tokens > 1, enable_gqa=True
    )
    wanted = wanted.transpose(1, 2).reshape(sequences * tokens, HEADS * size)
    error = float(torch.linalg.norm(found.double() - wanted) / torch.linalg.norm(wanted))
    if not error <= TOLERANCE:
        sys.exit(f"{name}: wrong by {error:.1e} of float64; {TOLERANCE} is tolerated")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(shape: str, layers: int, rounds: int, roof: roofs.Roofs) -> str:
    """The table of one shape."""
    kv_heads, size = SHAPES[shape]
    # The others differ from these in products alone.
    kernels = {name: CpuKernels(name) for name in ("avx2", "avx512") if Library().variants[name]}
    lines = []
    for label, (sequences, tokens, length) in STEPS.items():
        step = make_step(sequences, tokens, length, kv_heads, size, layers)
        calls = {name: ours(each, step) for name, each in kernels.items()}
        for name, call in calls.items():
            check(f"{shape}, {label}, {name}", call()[0], step)
        calls["torch"] = torchs(step)
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                found[name].append(seconds(call))
        best = list(kernels)[-1]
        ratio = statistics.median(a / b for a, b in zip(found["torch"], found[best], strict=True))
        spent = statistics.median(found[best])
        line: list[object] = [label]
        line += [common.spread([1e3 * each for each in found[name]], 1) for name in calls]
        line += [f"{ratio:.2f}", f"{step.bytes_read / spent / roof.read:.2f}"]
        line.append(f"{step.operations / spent / roof.operations[best]:.2f}")
        lines.append(line)
    head = [f"{shape}, {layers} layers", *(f"{name}, ms" for name in (*kernels, "torch"))]
    return common.table([*head, "torch ÷ ours", "of the bandwidth", "of float32's multiplications"], lines)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="with caches of their own (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--print", action="store_true", help="do not write the result's file")
    arguments = parser.parse_args()
    prepare_environment()
    torch.set_grad_enabled(False)
    head, threads = common.environment(), len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    roof = roofs.measure(threads)
    tables = [measure(shape, arguments.layers, arguments.rounds, roof) for shape in SHAPES]
    body = "\n\n".join([*tables, roof.table()])
    print(body)
    if not arguments.print:
        common.write_result("attention", "Paged attention", head, body)


if __name__ == "__main__":
    main()
