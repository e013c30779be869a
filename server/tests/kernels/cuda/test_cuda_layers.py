"""Attention, norms, rotation, activation and whole models of the CUDA backend under emulation."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulated import DTYPES, TOLERANCE, emulator, error, random, unwritten
from harness import LLAMA, Log, Shard, load
from test_against_reference import REFERENCE, ROWS, check_attention, fill, step
from text_generation_server.batch import Singles
from text_generation_server.kernels.cuda.attention import PagedAttention
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.interface import AttentionOptions, CacheSpec, KVCache
from text_generation_server.kernels.reference.kernels import ReferenceKernels
from text_generation_server.loading import Alone, TensorParallel

__all__ = ["unwritten"]


@pytest.fixture
def kernels(pytestconfig: pytest.Config) -> CudaKernels:
    return CudaKernels(emulator(pytestconfig))


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "block_size"), [(4, 2, 16), (3, 3, 24), (6, 1, 128), (2, 1, 1), (18, 1, 32)]
)
def test_attention(
    heads: int, kv_heads: int, block_size: int, rows: str, window: int | None, kernels: CudaKernels, unwritten: None
) -> None:
    check_attention(kernels, heads, kv_heads, block_size, ROWS[rows], window, torch.bfloat16)


def attention_case(
    kernels: CudaKernels, dim: int, rows: list[tuple[int, int]], dtype: torch.dtype, options: AttentionOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is found and float64 arithmetic written out, for 4 query and 2 key/value heads."""
    num_blocks = sum(-(-length // 16) for length, _ in rows)
    total, queries = sum(length for length, _ in rows), sum(count for _, count in rows)
    q = random(queries, 4, dim).to(dtype)
    k, v = (random(total, 2, dim, seed=seed).to(dtype) for seed in (1, 2))
    cache = kernels.new_kv_cache(CacheSpec(1, 2, dim, dtype), num_blocks, 16)
    for stored in cache.layers[0]:
        stored.fill_(torch.nan)
    batch = step(rows, 16, cache)
    fill(kernels, cache, k, v, batch)
    attention = PagedAttention(kernels._backend, dim, dtype)
    found = attention(q, *cache.layers[0], batch, options)
    cap, window = options.cap, options.window
    slopes = torch.tensor(options.slopes or [0.0] * 4, dtype=torch.float64)[:, None, None]
    wanted, first, query = [], 0, 0
    for length, count in rows:
        keys, values = (t[first : first + length].double().repeat_interleave(2, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[query : query + count].double(), keys) * 0.2
        scores = cap * torch.tanh(scores / cap) if cap else scores
        position, key = torch.arange(length - count, length)[:, None], torch.arange(length)
        hidden = (key > position) | (key <= position - (window or length + 1))
        weights = (scores + slopes * (key - position)).masked_fill(hidden, -torch.inf).softmax(-1)
        wanted.append(torch.einsum("hqk,khd->qhd", weights, values))
        first, query = first + length, query + count
    return found, torch.cat(wanted).flatten(1)


@pytest.mark.parametrize(
    ("dim", "dtype", "cap", "slopes"),
    [
        (64, torch.float16, None, None),
        (80, torch.bfloat16, 3.0, None),
        (256, torch.bfloat16, None, None),
        (64, torch.bfloat16, None, (0.5, 0.25, 0.125, 0.0625)),
        (64, torch.float16, 2.0, (0.5, 0.0, 0.125, 1.0)),
    ],
)
@pytest.mark.parametrize("window", [None, 300])
def test_attention_over_several_splits_of_heads_of_any_size(
    dim: int,
    dtype: torch.dtype,
    cap: float | None,
    slopes: tuple[float, ...] | None,
    window: int | None,
    kernels: CudaKernels,
) -> None:
    options = AttentionOptions(0.2, window, cap, slopes)
    found, wanted = attention_case(kernels, dim, [(600, 1), (257, 3), (300, 40), (5, 5)], dtype, options)
    assert error(found, wanted) <= TOLERANCE[dtype]


@pytest.mark.parametrize("window", [None, 40, 300])
def test_a_query_has_the_same_bits_alone_in_a_chunk_and_among_others(
    window: int | None, pytestconfig: pytest.Config
) -> None:
    """Few rows or many, one block for all splits or one for each, whichever thread runs first."""
    results = []
    for order, rows in (
        (0, [(530, 70), (20, 20)]),
        (1, [(530, 70), (20, 20)]),
        (0, [(530, 8), (20, 1)]),
        (0, [(530, 1), (20, 9)]),
    ):
        kernels = CudaKernels(emulator(pytestconfig, order))
        counts = [count for _, count in rows]
        q, dtype = random(90, 4, 32), torch.bfloat16
        # The last queries of each sequence, as many as are asked for.
        q = torch.cat((q[70 - counts[0] : 70], q[90 - counts[1] :])).to(dtype)
        k, v = (random(550, 2, 32, seed=seed).to(dtype) for seed in (1, 2))
        cache = kernels.new_kv_cache(CacheSpec(1, 2, 32, dtype), 40, 16)
        batch = step(rows, 16, cache)
        fill(kernels, cache, k, v, batch)
        y = kernels.attention(q, 0, batch, AttentionOptions(0.2, window))
        results.append((y[counts[0] - 1], y[-1]))
    for first, second in results[1:]:
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][1])


def test_a_token_without_a_slot_is_stored_nowhere(kernels: CudaKernels) -> None:
    cache = kernels.new_kv_cache(CacheSpec(1, 2, 32, torch.bfloat16), 3, 16)
    # The block before is memory too: what is stored there would be seen.
    whole = [part.fill_(7.0) for part in cache.layers[0]]
    inner = KVCache([(whole[0][1:], whole[1][1:])], 2, 16)
    batch = step([(1, 1), (1, 1)], 16, inner)
    k, v = random(2, 2, 32).bfloat16(), random(2, 2, 32, seed=1).bfloat16()
    kernels.store_kv(k, v, 0, replace(batch, slots=torch.tensor([-1, 5])))
    for part, given in zip(whole, (k, v), strict=True):
        assert torch.equal(part[1, :, 5], given[1])
        assert (part == 7.0).sum() == part.numel() - 64


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (40, 1), (80, 1)])
def test_work_that_is_listed_on_the_device_gives_the_same_bits(
    heads: int, kv_heads: int, window: int | None, kernels: CudaKernels
) -> None:
    """One token to a row, in a table where rows lie anywhere, for contexts as long or longer."""
    rows, dtype = [(1, 1), (300, 1), (530, 1)], torch.bfloat16
    q = random(3, heads, 32).to(dtype)
    k, v = (random(831, kv_heads, 32, seed=seed).to(dtype) for seed in (1, 2))
    cache = kernels.new_kv_cache(CacheSpec(1, kv_heads, 32, dtype), 60, 16)
    batch = step(rows, 16, cache)
    fill(kernels, cache, k, v, batch)
    options = AttentionOptions(0.2, window)
    wanted = kernels.attention(q, 0, batch, options)
    places = torch.tensor([4, 0, 2])
    tables = torch.full((6, 70), 59)
    tables[places, : batch.block_tables.shape[1]] = batch.block_tables
    for longest in (530, 1024):
        singles = Singles(places, longest)
        listed = replace(batch, block_tables=tables, singles=singles, starts=(), context_lengths=(), _shared={})
        assert torch.equal(kernels.attention(q, 0, listed, options), wanted)
    elsewhere = replace(batch, block_tables=tables, table_rows=places.numpy(), _shared={})
    assert torch.equal(kernels.attention(q, 0, elsewhere, options), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_rotation_and_activation(dtype: torch.dtype, kernels: CudaKernels, unwritten: None) -> None:
    for shape, weights in (((5, 600), (600,)), ((5, 6, 32), (6, 32)), ((3, 8), (8,))):
        x, weight = random(*shape).to(dtype), random(*weights, seed=1).to(dtype)
        wanted = REFERENCE.rms_norm(x.double(), weight.double(), 1e-5)
        assert error(kernels.rms_norm(x, weight, 1e-5), wanted) <= TOLERANCE[dtype]
    qkv = random(5, 10, 32).to(dtype)
    cos, sin = random(5, 32, seed=2).float(), random(5, 32, seed=3).float()
    wanted = REFERENCE.rotate(qkv[:, :6].double(), cos.double(), sin.double())
    assert error(kernels.rotate(qkv[:, :6], cos, sin), wanted) <= TOLERANCE[dtype]
    gate_up = (random(7, 1200) * 20).to(dtype)
    assert error(kernels.silu_and_mul(gate_up), REFERENCE.silu_and_mul(gate_up.double())) <= TOLERANCE[dtype]
    extreme = torch.tensor([[-1e4, -200.0, 0.0, 1e4, 1.0, 1.0, 1.0, 1.0]]).to(dtype)
    assert kernels.silu_and_mul(extreme).tolist() == [[0.0, 0.0, 0.0, float(extreme[0, 3])]]


def test_a_norms_bits_do_not_depend_on_other_rows(kernels: CudaKernels) -> None:
    x, weight = random(9, 600).bfloat16(), random(600, seed=1).bfloat16()
    whole = kernels.rms_norm(x, weight, 1e-6)
    assert all(torch.equal(kernels.rms_norm(x[i : i + 1], weight, 1e-6), whole[i : i + 1]) for i in range(9))


def test_what_does_not_fit_is_refused(kernels: CudaKernels) -> None:
    with pytest.raises(ValueError, match="float32"):
        kernels.linear(torch.zeros(16, 16))
    with pytest.raises(ValueError, match="multiple of 8"):
        PagedAttention(kernels._backend, 36, torch.bfloat16)
    with pytest.raises(ValueError, match="even size"):
        kernels.rms_norm(torch.zeros(2, 3).bfloat16(), torch.zeros(3).bfloat16(), 1e-5)


def test_a_quantized_model_computes_what_the_reference_does_and_the_same_bits_however_it_is_cut(
    kernels: CudaKernels,
) -> None:
    alone, path = TensorParallel(0, 1, Alone()), LLAMA.with_name("docs-llama-7m-gptq-4bit-g128")
    ids = torch.randint(5, 2000, (22,), generator=torch.Generator().manual_seed(1)).tolist()

    def logits(kind: CudaKernels | ReferenceKernels, dtype: str, chunks: list[int]) -> torch.Tensor:
        shard, log, other = Shard(load(path, alone, kind, dtype), 8), Log(ids, [0, 1]), Log(ids[::-1], [2, 3])
        for i, count in enumerate(chunks):
            shard.step([(log, count), (other, 3)] if i % 2 == 0 and i < 16 else [(log, count)], sample_all=True)
        return torch.stack([log.logits[i + 1] for i in range(len(ids))])

    whole = logits(kernels, "bfloat16", [22])
    wanted, plain = logits(REFERENCE, "float32", [22]), logits(REFERENCE, "bfloat16", [22])
    assert error(whole, wanted.double()) <= 1.2 * error(plain, wanted.double())
    assert torch.equal(logits(kernels, "bfloat16", [10, 1, 1, 9, 1]), whole)


def test_a_batch_goes_to_the_models_device_whole(kernels: CudaKernels) -> None:
    cache = kernels.new_kv_cache(CacheSpec(1, 2, 32, torch.bfloat16), 8, 16)
    batch = step([(20, 2), (3, 1)], 16, cache)
    assert batch.on(torch.device("cpu")) is batch
    moved = batch.on(torch.device("meta"))
    tensors = [moved.token_ids, moved.positions, moved.slots, moved.block_tables, moved.sample_rows]
    assert {t.device.type for t in tensors} == {"meta"}
    assert (moved.starts, moved.context_lengths) == (batch.starts, batch.context_lengths)
