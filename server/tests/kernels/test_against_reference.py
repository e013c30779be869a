"""CPU kernels against the plain reference in float64, and what they promise about memory nobody wrote."""

import pytest
import torch
from conftest import kernels_of
from text_generation_server.batch import StepBatch
from text_generation_server.kernels.cpu import attention
from text_generation_server.kernels.cpu.kernels import CpuKernels
from text_generation_server.kernels.interface import AttentionOptions, CacheSpec, KVCache
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from torch import Tensor

REFERENCE = ReferenceKernels()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(found: Tensor, want: Tensor) -> None:
    tolerance = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 4, 17, 100, 1100])
def test_linear(rows: int, dtype: torch.dtype, every_kernels: CpuKernels) -> None:
    x, weight = random(rows, 48).to(dtype), random(80, 48, seed=1).to(dtype) / 7
    y = every_kernels.linear(weight)(x)
    assert y.dtype == dtype
    assert y.shape == (rows, 80)
    assert_close(y, REFERENCE.linear(weight.double())(x.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_rotation_and_activation(dtype: torch.dtype, every_kernels: CpuKernels) -> None:
    kernels = every_kernels
    x, weight = random(5, 6, 32).to(dtype), random(6, 32, seed=1).to(dtype)
    found = kernels.rms_norm(x, weight, 1e-5)
    assert_close(found, REFERENCE.rms_norm(x.double(), weight.double(), 1e-5))
    cos, sin = random(5, 32, seed=2).float(), random(5, 32, seed=3).float()
    assert_close(kernels.rotate(x, cos, sin), REFERENCE.rotate(x.double(), cos.double(), sin.double()))
    gate_up = (random(7, 64) * 20).to(dtype)
    torch.testing.assert_close(
        kernels.silu_and_mul(gate_up).double(), REFERENCE.silu_and_mul(gate_up.double()), rtol=1e-2, atol=1e-3
    )


def test_activation_of_extreme_gates_is_finite(every_kernels: CpuKernels) -> None:
    gate_up = torch.tensor([[-1e4, -200.0, 0.0, 1e4, 1.0, 1.0, 1.0, 1.0]])
    assert every_kernels.silu_and_mul(gate_up).tolist() == [[0.0, 0.0, 0.0, 1e4]]


def fill(kernels: CpuKernels | ReferenceKernels, cache: KVCache, k: Tensor, v: Tensor, batch: StepBatch) -> None:
    """Stores all keys and values of every sequence, as if earlier steps had."""
    slots = [
        int(batch.block_tables[i, p // cache.block_size]) * cache.block_size + p % cache.block_size
        for i, length in enumerate(batch.context_lengths)
        for p in range(length)
    ]
    whole = StepBatch(
        batch.token_ids, batch.positions, batch.starts, batch.context_lengths, torch.tensor(slots), batch.block_tables,
        batch.sample_rows, cache,
    )  # fmt: skip
    kernels.store_kv(k, v, 0, whole)


def step(rows: list[tuple[int, int]], block_size: int, cache: KVCache) -> StepBatch:
    """rows: (context length, queries) of each sequence. Blocks are scattered."""
    lengths = [length for length, _ in rows]
    width = max(-(-length // block_size) for length in lengths)
    order = torch.randperm(cache.num_blocks, generator=torch.Generator().manual_seed(1))
    tables = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, length in enumerate(lengths):
        need = -(-length // block_size)
        tables[i, :need], order = order[:need], order[need:]
    positions = [p for length, count in rows for p in range(length - count, length)]
    starts = [0]
    for _, count in rows:
        starts.append(starts[-1] + count)
    nothing = torch.zeros(len(positions), dtype=torch.int64)
    return StepBatch(nothing, torch.tensor(positions), starts, lengths, nothing, tables, nothing[:0], cache)


ROWS = {
    "decode": [(1, 1), (64, 1), (65, 1), (200, 1)],
    "prefill": [(130, 130), (3, 3)],
    "mixed": [(129, 1), (70, 5), (300, 100), (1, 1), (64, 64)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 1, 7, 64, 100])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_size"), [(4, 2, 16), (3, 3, 24), (6, 1, 128), (2, 1, 1), (70, 1, 32)]
)
def test_attention(
    heads: int,
    kv_heads: int,
    block_size: int,
    rows: str,
    window: int | None,
    dtype: torch.dtype,
    every_kernels: CpuKernels,
) -> None:
    check_attention(every_kernels, heads, kv_heads, block_size, ROWS[rows], window, dtype)


def check_attention(
    kernels: CpuKernels,
    heads: int,
    kv_heads: int,
    block_size: int,
    rows: list[tuple[int, int]],
    window: int | None,
    dtype: torch.dtype,
    cap: float | None = None,
    slopes: tuple[float, ...] | None = None,
) -> None:
    kernels.prepare(32, 32)
    num_blocks = sum(-(-length // block_size) for length, _ in rows) + 2
    total, queries = sum(length for length, _ in rows), sum(count for _, count in rows)
    q, options = random(queries, heads, 32).to(dtype), AttentionOptions(0.2, window, cap, slopes)
    k, v = (random(total, kv_heads, 32, seed=seed).to(dtype) for seed in (1, 2))
    cache = kernels.new_kv_cache(CacheSpec(1, kv_heads, 32, dtype), num_blocks, block_size)
    for stored in cache.layers[0]:
        stored[:num_blocks] = torch.nan
    batch = step(rows, block_size, cache)
    fill(kernels, cache, k, v, batch)
    plain = REFERENCE.new_kv_cache(CacheSpec(1, kv_heads, 32, torch.float64), num_blocks, block_size)
    reference = step(rows, block_size, plain)
    fill(REFERENCE, plain, k.double(), v.double(), reference)
    found = kernels.attention(q, 0, batch, options)
    assert found.dtype == dtype
    assert_close(found, REFERENCE.attention(q.double(), 0, reference, options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("cap", "slopes"), [(0.7, False), (50.0, False), (None, True), (2.0, True)])
@pytest.mark.parametrize("window", [None, 40])
def test_attention_with_capped_scores_and_distances(
    window: int | None, cap: float | None, slopes: bool, dtype: torch.dtype, every_kernels: CpuKernels
) -> None:
    by_head = tuple(2.0 ** -(i + 1) for i in range(6)) if slopes else None
    for rows in ROWS.values():
        check_attention(every_kernels, 6, 2, 16, rows, window, dtype, cap, by_head)


def test_attention_in_many_slabs_and_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SLAB_BYTES", 200_000)
    monkeypatch.setattr(attention, "PIECE_BYTES", 50_000)
    check_attention(kernels_of("none"), 4, 2, 16, [(500, 200), (90, 1), (1000, 1), (64, 64)], None, torch.float32)


def test_the_cache_holds_what_its_specification_says(every_kernels: CpuKernels) -> None:
    spec = CacheSpec(3, 2, 32, torch.bfloat16)
    cache = every_kernels.new_kv_cache(spec, 10, 16)
    # torch's operators have a block more than asked: zeros.
    blocks = 11 if every_kernels is kernels_of("none") else 10
    assert (
        sum(t.numel() * t.element_size() for layer in cache.layers for t in layer) == spec.bytes_per_token * 16 * blocks
    )
