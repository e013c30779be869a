"""A block of a decoder as one call: the bits of the single operations, whatever the step is made of."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from conftest import INSTRUCTION_SETS, kernels_of
from harness import MODELS, Log, Shard, load
from text_generation_server.distributed import add_up
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.interface import AttentionOptions, FusesBlocks
from text_generation_server.layers import attention
from text_generation_server.layers.block import BLOCKS_AT_ONCE, runs_of
from text_generation_server.loading import Alone, TensorParallel
from text_generation_server.models.decoder import Decoder

ALONE = TensorParallel(0, 1, Alone())


def decoder(path: Path, kernels: CpuKernels, dtype: str, fused: bool, tp: TensorParallel = ALONE) -> Decoder:
    model = load(path, tp, kernels, dtype)
    for block in model.blocks:
        assert block.fused is not None  # type: ignore[attr-defined]
        if not fused:
            block.fused = None  # type: ignore[attr-defined]
    if not fused:
        model.runs = runs_of(model.blocks, kernels)
    assert all((run.joined is not None) == (fused and tp.size == 1) for run in model.runs)
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


@pytest.mark.parametrize(
    ("name", "size"), [("docs-llama-7m", 2), ("docs-qwen2-4m", 2), ("docs-llama-7m-gptq-4bit-g128", 4)]
)
def test_a_block_that_is_split_over_ranks_has_the_bits_of_its_operations(name: str, size: int) -> None:
    torch.set_num_threads(1)
    kernels = CpuKernels()
    dtype = "bfloat16" if "gptq" in name else "float32"

    def of_rank(ranks: Ranks, rank: int, fused: bool) -> list[torch.Tensor]:
        return logits(decoder(MODELS / name, kernels, dtype, fused, ranks.of(rank)), 16)

    results = []
    for fused in (True, False):
        ranks = Ranks(size)
        with ThreadPoolExecutor(size) as pool:
            results += [f.result() for f in [pool.submit(of_rank, ranks, rank, fused) for rank in range(size)]]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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
