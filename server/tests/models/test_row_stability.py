"""A row's bits depend on its own log alone: every way to compute a log gives the same raw logits, bit by bit.

The scenarios are those that a router makes: alone, among others, in chunks, recomputed after preemption or a crash,
with other blocks, behind a prefix that another sequence computed.
"""

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from harness import LLAMA, MODELS, QWEN2, Log, Shard, load, run_ranks
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.interface import BlockParts, FusedBlock, Matmul
from text_generation_server.kernels.weights import DenseRows, as_tensor
from text_generation_server.loading import Alone, TensorParallel
from torch import Tensor

PROMPT, LENGTH, BLOCK = 150, 166, 16
BLOCKS_PER_LOG = -(-LENGTH // BLOCK)
Digests = dict[int, str]
FULL = bool(os.environ.get("FULL"))
QUANTIZED = sorted(MODELS.glob("docs-llama-7m-*"))
# One that torch's 4-bit product serves, on shards whose slices have other groups, and one that is dequantized.
SAMPLED = [(MODELS / "docs-llama-7m-gptq-4bit-g128", 4), (MODELS / "docs-llama-7m-bnb-nf4", 1)]


def log_of(seed: int, blocks: range | list[int], length: int = LENGTH) -> Log:
    generator = torch.Generator().manual_seed(seed)
    return Log(torch.randint(3, 4096, (length,), generator=generator).tolist(), list(blocks))


def digests(log: Log) -> Digests:
    """Of the logits behind every id from the prompt's last on, by length of the log."""
    rows = {length: row for length, row in log.logits.items() if length >= PROMPT}
    return {length: hashlib.blake2b(row.numpy().tobytes(), digest_size=8).hexdigest() for length, row in rows.items()}


def decoded_alone(shard: Shard) -> Digests:
    log = log_of(0, range(BLOCKS_PER_LOG))
    shard.step([(log, PROMPT)], sample_all=True)
    while log.computed < LENGTH:
        shard.step([(log, 1)], sample_all=True)
    return digests(log)


def in_one_prefill(shard: Shard) -> Digests:
    log = log_of(0, range(BLOCKS_PER_LOG))
    shard.step([(log, LENGTH)], sample_all=True)
    return digests(log)


def in_chunks(size: int) -> Callable[[Shard], Digests]:
    def run(shard: Shard) -> Digests:
        log = log_of(0, range(BLOCKS_PER_LOG))
        while log.computed < LENGTH:
            shard.step([(log, min(size, LENGTH - log.computed))], sample_all=True)
        return digests(log)

    return run


def among_31_others(shard: Shard) -> Digests:
    """Others of all lengths, some decoding and some in prefill, before and behind; their number changes."""
    log = log_of(0, range(BLOCKS_PER_LOG))
    others = [log_of(i, range(i * BLOCKS_PER_LOG, (i + 1) * BLOCKS_PER_LOG), 5 * i + 3) for i in range(1, 32)]
    while log.computed < LENGTH:
        count = PROMPT - 13 if log.computed == 0 else 13 if log.computed < PROMPT else 1
        work = [(other, min(1 + i % 9, len(other.ids) - other.computed)) for i, other in enumerate(others)]
        work.insert(log.computed % 11, (log, count))
        shard.step([w for w in work if w[1]], sample_all=True)
    return digests(log)


def in_permuted_blocks(shard: Shard) -> Digests:
    """The cache is full of what an earlier sequence with unusable numbers left behind."""
    for k, v in shard.cache.layers:
        k[:-1], v[:-1] = torch.nan, torch.nan
    blocks = torch.randperm(300, generator=torch.Generator().manual_seed(3)).tolist()[:BLOCKS_PER_LOG]
    log = log_of(0, blocks)
    while log.computed < LENGTH:
        shard.step([(log, 40 if log.computed < 120 else 1)], sample_all=True)
    return digests(log)


def behind_a_prefix_hit(shard: Shard) -> Digests:
    """Another sequence with the same beginning computed the first blocks, itself in chunks and among others."""
    first, third = log_of(0, range(BLOCKS_PER_LOG)), log_of(7, range(100, 110), 90)
    first.ids = first.ids[: 8 * BLOCK + 3] + [77] * 20
    shard.step([(third, 20), (first, 50)])
    shard.step([(first, 90), (third, 1)])
    log = log_of(0, [*range(8), *range(50, 60)])
    log.computed = 8 * BLOCK
    shard.step([(third, 5), (log, PROMPT - log.computed)], sample_all=True)
    while log.computed < LENGTH:
        shard.step([(log, 1), (third, 1)], sample_all=True)
    return digests(log)


WAYS: dict[str, Callable[[Shard], Digests]] = {
    "in one prefill": in_one_prefill,
    "among 31 others": among_31_others,
    **{f"in chunks of {size}": in_chunks(size) for size in (1, 5, 16, 64, 100)},
    "in permuted blocks": in_permuted_blocks,
    "behind a prefix hit": behind_a_prefix_hit,
}


@dataclass(frozen=True)
class Setup:
    path: Path
    dtype: str
    size: int = 1


def compute(setup: Setup, kernels: CpuKernels, ways: Sequence[Callable[[Shard], Digests]]) -> list[Digests]:
    def work(tp: TensorParallel) -> list[Digests]:
        decoder = load(setup.path, tp, kernels, setup.dtype)
        return [way(Shard(decoder, num_blocks=400, block_size=BLOCK)) for way in ways]

    return run_ranks(setup.size, work)[0]  # type: ignore[return-value]


def differing(setup: Setup, kernels: CpuKernels, names: Sequence[str] = tuple(WAYS)) -> list[str]:
    """The ways whose bits are not those of the first: prompt in one step, then one id at a time, alone."""
    first, *others = compute(setup, kernels, [decoded_alone, *(WAYS[name] for name in names)])
    assert set(first) == set(range(PROMPT, LENGTH + 1))
    assert len(set(first.values())) == len(first)
    wrong = []
    for name, found in zip(names, others, strict=True):
        assert found.keys() <= first.keys()
        assert LENGTH in found
        if any(found[length] != first[length] for length in found):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    "setup",
    [Setup(path, dtype) for path in (LLAMA, QWEN2) for dtype in ("float32", "bfloat16")]
    + [Setup(QWEN2, dtype, size=2) for dtype in ("float32", "bfloat16")]
    + [Setup(path, "bfloat16", size) for path in QUANTIZED for size in (1, 2, 4) if FULL or (path, size) in SAMPLED],
    ids=str,
)
def test_every_way_to_compute_a_log_gives_the_same_bits(setup: Setup, kernels: CpuKernels) -> None:
    few = ("in one prefill", "among 31 others", "behind a prefix hit")
    assert differing(setup, kernels, few if setup.path in QUANTIZED and not FULL else tuple(WAYS)) == []
    assert kernels.row_stable


def test_the_promise_holds_on_two_threads() -> None:
    torch.set_num_threads(2)
    try:
        assert differing(Setup(QWEN2, "float32"), CpuKernels(), ("in one prefill", "among 31 others")) == []
    finally:
        torch.set_num_threads(1)


def test_a_sequence_of_unusable_numbers_leaves_its_neighbours_as_they_are(kernels: CpuKernels) -> None:
    def work(tp: TensorParallel) -> tuple[Tensor, Tensor, Tensor]:
        decoder = load(LLAMA, tp, kernels)
        alone, beside = log_of(0, range(3), 40), log_of(0, range(10, 13), 40)
        Shard(decoder).step([(alone, 40)])
        decoder.embed.weight[3000] = torch.nan
        broken = Log([3000] * 20, [3, 4])
        shard = Shard(decoder)
        shard.step([(broken, 9), (beside, 20)])
        shard.step([(beside, 20), (broken, 11)])
        return alone.logits[40], beside.logits[40], broken.logits[20]

    alone, beside, broken = work(TensorParallel(0, 1, Alone()))
    assert torch.equal(alone, beside)
    assert broken.isnan().all()


class Uneven:
    """A linear that adds up the fourth of every eight rows, where there are more, in another order."""

    def __init__(self, matmul: Matmul, weight: Tensor):
        self.matmul, self.weight = matmul, weight

    def __call__(self, x: Tensor) -> Tensor:
        y = self.matmul(x)
        if len(x) > 8:
            half = x.shape[1] // 2
            products = x[3::8, None].float() * self.weight.float()
            y[3::8] = products[..., :half].sum(-1) + products[..., half:].sum(-1)
        return y


class PlantedLinear(CpuKernels):
    def linear(self, weight: Tensor | DenseRows) -> Matmul:
        return Uneven(super().linear(weight), as_tensor(weight, self.device))


class PlantedTail(CpuKernels):
    """An activation whose last elements, as behind a vector loop, are rounded otherwise, as in torch's own silu."""

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        y = super().silu_and_mul(gate_up)
        tail = y.view(-1)[-7:]
        tail.copy_(torch.nextafter(tail, torch.zeros_like(tail)))
        return y

    def fuse_block(self, parts: BlockParts) -> FusedBlock | None:
        """None: a whole block would not ask for an activation."""
        return None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_planted_linear_that_reduces_some_rows_differently_is_caught(dtype: str) -> None:
    torch.set_num_threads(1)
    assert {"among 31 others", "in chunks of 1"} <= set(differing(Setup(QWEN2, dtype), PlantedLinear()))


def test_a_planted_activation_with_vector_tails_is_caught() -> None:
    torch.set_num_threads(1)
    assert {"in one prefill", "among 31 others"} <= set(differing(Setup(QWEN2, "float32"), PlantedTail()))
