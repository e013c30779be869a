"""A block of a decoder as one call: the bits of the single operations, whatever the step is made of."""

import json
import mmap
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from conftest import INSTRUCTION_SETS, kernels_of
from harness import MODELS, Log, Shard, load
from text_generation_server import shared_memory
from text_generation_server.distributed import Group, SharedMemory, add_up
from text_generation_server.faults import Fault, Faults
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.interface import AttentionOptions, FusesBlocks
from text_generation_server.layers import attention
from text_generation_server.layers.block import BLOCKS_AT_ONCE, runs_of
from text_generation_server.loading import Alone, TensorParallel
from text_generation_server.models.decoder import Decoder
from text_generation_server.shared_memory import PeerLost, Segment

ALONE = TensorParallel(0, 1, Alone())


def decoder(path: Path, kernels: CpuKernels, dtype: str, fused: bool, tp: TensorParallel = ALONE) -> Decoder:
    model = load(path, tp, kernels, dtype)
    for block in model.blocks:
        assert block.fused is not None  # type: ignore[attr-defined]
        if not fused:
            block.fused = None  # type: ignore[attr-defined]
    if not fused:
        model.runs = runs_of(model.blocks, kernels)
    assert all((run.joined is not None) == fused for run in model.runs)
    return model


def logits(model: Decoder, block_size: int) -> list[torch.Tensor]:
    """Of two sequences: one in chunks, one whole, then both token by token, then a long one alone."""
    shard = Shard(model, num_blocks=120, block_size=block_size)
    ids = [(7 * i + 3) % 500 for i in range(400)]
    a, b, c = Log(ids[:50], list(range(40))), Log(ids[9:30], list(range(40, 80))), Log(ids, list(range(80, 120)))
    shard.step([(a, 13), (b, 20)], sample_all=True)
    shard.step([(a, 30)], sample_all=True)
    shard.step([(a, 1), (b, 1)], sample_all=True)
    shard.step([(c, 300)], sample_all=True)
    shard.step([(c, 1), (a, 6)], sample_all=True)
    return [log.logits[length] for log in (a, b, c) for length in sorted(log.logits)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["docs-llama-7m", "docs-llama-7m-gptq-4bit-g128", "docs-llama-7m-bnb-nf4"])
@pytest.mark.parametrize("instruction_set", [name for name in INSTRUCTION_SETS if name != "none"])
def test_a_whole_block_has_the_bits_of_its_operations(
    instruction_set: str, name: str, dtype: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    kernels = kernels_of(instruction_set)
    whole, single = (logits(decoder(MODELS / name, kernels, dtype, fused), 16) for fused in (True, False))
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))


class Ranks:
    """Collectives of ranks that are threads of this process."""

    def __init__(self, size: int):
        self.size, self.parts = size, [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> TensorParallel:
        return TensorParallel(rank, self.size, _OfRank(self, rank))


class _OfRank(Alone):
    def __init__(self, ranks: Ranks, rank: int):
        self.ranks, self.rank = ranks, rank

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.ranks.parts[self.rank] = x.clone()
        self.ranks.barrier.wait()
        parts = list(self.ranks.parts)
        self.ranks.barrier.wait()
        return parts

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        add_up(self._exchange(x), x)
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim)

    def gather_to_first(self, x: torch.Tensor) -> torch.Tensor | None:
        return torch.cat(self._exchange(x), -1)  # every rank compares


class SharingRanks:
    """Real groups of ranks that are threads of this process: native code takes part by itself."""

    def __init__(self, size: int):
        memory = mmap.mmap(-1, shared_memory._segment_bytes(size))
        self.groups = []
        for rank in range(size):
            peers = {peer: os.pidfd_open(os.getpid()) for peer in {*range(size)} - {rank}}
            group = _SharingGroup(rank, size, Faults(None, rank))
            group._transport = SharedMemory(Segment(memory, rank, peers, timedelta(seconds=60)))
            self.groups.append(group)

    def of(self, rank: int) -> TensorParallel:
        return TensorParallel(rank, len(self.groups), self.groups[rank])


class _SharingGroup(Group):
    def gather_to_first(self, x: torch.Tensor) -> torch.Tensor | None:
        return self.all_gather(x)  # every rank compares


def of_ranks(
    ranks: Ranks | SharingRanks, size: int, model: Callable[[TensorParallel], Decoder]
) -> list[list[torch.Tensor]]:
    """Logits of every rank. All but the first come late."""

    def of_rank(rank: int) -> list[torch.Tensor]:
        mine = model(ranks.of(rank))
        time.sleep(0.2 if rank else 0)
        return logits(mine, 16)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(of_rank, range(size)))


@pytest.mark.parametrize(
    ("name", "size"), [("docs-llama-7m", 2), ("docs-qwen2-4m", 2), ("docs-llama-7m-gptq-4bit-g128", 4)]
)
def test_a_block_that_is_split_over_ranks_has_the_bits_of_its_operations(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    # Prompts take several turns.
    monkeypatch.setattr(shared_memory, "SLOT_BYTES", 1 << 13)
    kernels = CpuKernels()
    dtype = "bfloat16" if "gptq" in name else "float32"
    single, *others = [
        of_ranks(ranks, size, lambda tp, fused=fused: decoder(MODELS / name, kernels, dtype, fused, tp))  # type: ignore[misc]
        for ranks, fused in (
            (Ranks(size), False),
            (Ranks(size), True),
            (SharingRanks(size), False),
            (SharingRanks(size), True),
        )
    ]
    for other in others:
        for rank in range(size):
            assert all(torch.equal(a, b) for a, b in zip(single[0], other[rank], strict=True))


@pytest.mark.parametrize("instruction_set", [name for name in INSTRUCTION_SETS if name != "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_sums_over_ranks_are_those_of_tensors(instruction_set: str, dtype: str) -> None:
    """An embedding of which two ranks say that they own it; its rows are no whole vectors."""
    size, kernels = 3, kernels_of(instruction_set)
    weights = [
        (torch.randn(50, 77, generator=torch.Generator().manual_seed(r)) * 3).to(getattr(torch, dtype))
        for r in range(size)
    ]
    ids = torch.tensor([0, 49, 7, 60, 7, -1])
    owned, ranks = [range(50), range(0), range(50)], SharingRanks(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(kernels.embed_share, weights[r], owned[r], ids, ranks.groups[r]) for r in range(size)]
        results = [future.result() for future in futures]
    expected = np.zeros((6, 77), np.float32)
    for rank in (0, 2):
        expected[[0, 1, 2, 4]] += weights[rank][ids[[0, 1, 2, 4]]].float().numpy()
    for result in results:
        assert result is not None
        assert torch.equal(result, torch.from_numpy(expected).to(result.dtype))


def step_of_first(ranks: SharingRanks) -> Callable[[], list[torch.Tensor]]:
    """A step of the first of two ranks, whose embedding is not summed up: the first to wait is a block."""
    model = decoder(MODELS / "docs-llama-7m", CpuKernels(), "float32", True, ranks.of(0))
    model.embed.tp = ALONE
    model.embed.weight = torch.randn(512, model.embed.weight.shape[1])
    return lambda: logits(model, 16)


def test_native_code_that_waits_says_so_and_is_released_when_a_peer_leaves() -> None:
    torch.set_num_threads(1)
    ranks = SharingRanks(2)
    step = step_of_first(ranks)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(step)
        deadline = time.monotonic() + 20
        while not ranks.groups[0].waits:
            assert time.monotonic() < deadline
        time.sleep(0.05)
        assert ranks.groups[0].waits
        ranks.groups[1].close()
        with pytest.raises(PeerLost, match="rank 1 left the epoch while rank 0 waited for rank 1"):
            future.result(timeout=20)
    assert not ranks.groups[0].waits
    ranks.groups[0].close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_native_code_goes_on_after_no_error_of_its_callbacks() -> None:
    torch.set_num_threads(1)
    for error, message in ((OSError("what is known"), "what is known"), (KeyError("x"), "rank 0 could not end a sum")):
        ranks = SharingRanks(2)
        step = step_of_first(ranks)
        ranks.groups[0]._faults._armed = Fault("all_reduce", 1, "raise")
        ranks.groups[0]._faults.reach = Mock(side_effect=error)  # type: ignore[method-assign]
        with pytest.raises((OSError, RuntimeError), match=message):
            step()


def test_a_fault_on_demand_comes_between_giving_and_receiving_in_native_code_too() -> None:
    torch.set_num_threads(1)
    ranks = SharingRanks(2)
    step = step_of_first(ranks)
    ranks.groups[0]._faults._armed = Fault("all_reduce", 1, "raise")
    with pytest.raises(RuntimeError, match="fault on demand at all_reduce"):
        step()
    # It had given its part: the other one has it.
    other = ranks.groups[1]
    other._formed._segment.contribute(None)  # type: ignore[attr-defined]
    assert other._formed._segment.take(0, torch.empty(13, 256)).abs().sum() > 0  # type: ignore[attr-defined]


def test_a_cache_of_another_layout_is_left_to_single_operations() -> None:
    torch.set_num_threads(1)
    kernels = CpuKernels()
    whole, single = (logits(decoder(MODELS / "docs-llama-7m", kernels, "float32", f), 10) for f in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))


def test_blocks_with_biases_and_norms_of_heads_have_the_bits_of_their_operations(tmp_path: Path) -> None:
    """Qwen2 has biases of q, k and v, Qwen3 norms of heads. The shipped Qwen2 and a random Qwen3."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.3)
    model.save_pretrained(tmp_path)
    kernels = CpuKernels()
    for path in (MODELS / "docs-qwen2-4m", tmp_path):
        for dtype in ("float32", "bfloat16"):
            whole, single = (logits(decoder(path, kernels, dtype, fused), 16) for fused in (True, False))
            assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))


def test_blocks_with_capped_scores_and_distances_have_the_bits_of_their_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def options(scale: float, window: int | None) -> AttentionOptions:
        return AttentionOptions(scale, window, cap=2.0, slopes=tuple(2.0**-i for i in range(heads)))

    path, kernels = MODELS / "docs-llama-7m", CpuKernels()
    heads = int(json.loads((path / "config.json").read_text())["num_attention_heads"])
    plain = logits(decoder(path, kernels, "float32", fused=True), 16)
    monkeypatch.setattr(attention, "AttentionOptions", options)
    whole, single = (logits(decoder(path, kernels, "float32", fused), 16) for fused in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(whole, single, strict=True))
    assert not torch.equal(whole[-1], plain[-1])


def test_without_kernels_of_our_own_no_block_is_fused() -> None:
    kernels = CpuKernels("none")
    assert isinstance(kernels, FusesBlocks)
    model = load(MODELS / "docs-llama-7m", ALONE, kernels)
    assert all(block.fused is None for block in model.blocks)  # type: ignore[attr-defined]


def test_every_layer_of_blocks_that_are_joined_is_told_of() -> None:
    torch.set_num_threads(1)
    model = decoder(MODELS / "docs-llama-7m", CpuKernels(), "float32", fused=True)
    assert len(model.blocks) <= BLOCKS_AT_ONCE
    told: list[int] = []
    Shard(model, num_blocks=8, block_size=16).step([(Log([1, 5, 9], [3]), 2)], on_layer=lambda: told.append(1))
    assert len(told) == len(model.blocks)
