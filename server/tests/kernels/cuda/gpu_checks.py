"""What only a GPU can show (`make test-gpu`): that tensor cores, the driver and our emulation agree; that it serves.

Its name keeps it out of other runs. The tests of serving are those that run under emulation everywhere.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from emulated import TOLERANCE, error
from step_client import LLAMA, Sequence_, Shards, generate
from test_against_reference import REFERENCE, ROWS, fill, random, step
from test_cuda_sampling import HOW
from test_cuda_serving import (
    LIMITS,
    MODELS,
    answers,
    check_ids,
    served,
    started,
    test_logits_that_are_not_finite_end_their_row_alone,
    test_recorded_steps_give_the_bits_of_others_and_of_steps_one_after_another,
    test_rows_that_need_the_host_are_drawn_there_beside_others,
)
from test_quantized_products import CODINGS, make
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.cuda.sampling import draw, drawn_of, words_of
from text_generation_server.kernels.interface import AttentionOptions, CacheSpec
from text_generation_server.kernels.select import select_kernels
from text_generation_server.kernels.weights import Coding, Integer
from text_generation_server.sampling.params import SamplingParams
from text_generation_server.sampling.sampler import draw_ids, requests_of
from text_generation_server.shard import Shard

__all__ = [
    "test_logits_that_are_not_finite_end_their_row_alone",
    "test_recorded_steps_give_the_bits_of_others_and_of_steps_one_after_another",
    "test_rows_that_need_the_host_are_drawn_there_beside_others",
]


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Shard]:
    """Starts a rank on the first GPU."""
    return partial(started, tmp_path)


@pytest.mark.parametrize("name", sorted(path.name for path in MODELS.iterdir() if (path / "reference.json").exists()))
def test_every_shipped_model_gives_the_first_ids_of_transformers(name: str, start: Callable[..., Shard]) -> None:
    shard, reference = start((1, 2, 4), MODELS / name), json.loads((MODELS / name / "reference.json").read_text())
    blocks = shard.measure_blocks(LIMITS)
    shard.allocate(blocks, LIMITS)
    chosen = reference["greedy"][:4]
    plans = served([r["prompt_ids"] for r in chosen], [{"params": SamplingParams()}] * len(chosen), 8)
    check_ids(answers(shard, plans), chosen)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_give_the_first_ids_of_transformers() -> None:
    references = json.loads((LLAMA / "reference.json").read_text())["greedy"]
    sequences = [Sequence_(row, r["prompt_ids"]) for row, r in enumerate(references)]
    with Shards(LLAMA, 2, "bfloat16", ("--device", "cuda")) as shards:
        generate(shards, sequences, 8, depth=2)
    alike = [s.ids == r["generated_ids"][:8] for s, r in zip(sequences, references, strict=True)]
    assert sum(alike) >= 0.75 * len(alike)


def test_ids_are_those_that_float64_arithmetic_draws(kernels: CudaKernels) -> None:
    logits = (torch.randn(len(HOW), 128256, generator=torch.Generator().manual_seed(1)) * 3).round(decimals=2)
    params = [SamplingParams(do_sample=True, seed=i, **how) for i, how in enumerate(HOW)]
    requests = requests_of(params, np.arange(len(HOW)))
    wanted = draw_ids(logits, logits, params, np.array([r.number for r in requests]), None, None)
    found = draw(kernels._backend, logits.to(kernels.device), torch.from_numpy(words_of(requests)).to(kernels.device))
    assert drawn_of(found.cpu().numpy()).ids.tolist() == wanted.ids.tolist()


@pytest.fixture(scope="module")
def kernels() -> CudaKernels:
    selected = select_kernels("cuda")  # says why, where there is none
    assert isinstance(selected, CudaKernels)
    return selected


@pytest.mark.parametrize("shape", [(4096, 4096, 128), (6144, 4096, 128), (1000, 11008, 64), (72, 200, 48)], ids=str)
@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_products_equal_float64_and_rows_do_not_know_each_other(
    coding: Coding, shape: tuple[int, int, int], kernels: CudaKernels
) -> None:
    weight, matrix = make(coding, *shape, isinstance(coding, Integer), False, torch.float16)
    linear = kernels.quantized_linear(weight.to(kernels.device), torch.bfloat16, "layer")
    x = torch.randn(300, shape[1]).bfloat16().to(kernels.device)
    whole = linear(x)
    assert error(whole.cpu(), x.cpu().double() @ matrix.T) <= TOLERANCE[torch.bfloat16]
    for rows in (1, 2, 3, 4, 8, 16, 33, 64, 200):
        for first in (0, 300 - rows):
            assert torch.equal(linear(x[first : first + rows]), whole[first : first + rows]), rows
    assert torch.equal(linear(x), whole)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("rows", ROWS)
def test_attention_equals_float64(rows: str, window: int | None, kernels: CudaKernels) -> None:
    work, dtype = ROWS[rows], torch.bfloat16
    blocks = sum(-(-length // 16) for length, _ in work)
    total, queries = sum(length for length, _ in work), sum(count for _, count in work)
    q, k, v = (random(n, h, 128, seed=n + h).to(dtype) for n, h in ((queries, 8), (total, 2), (total, 2)))
    options = AttentionOptions(0.1, window)
    cache = kernels.new_kv_cache(CacheSpec(1, 2, 128, dtype), blocks, 16)
    for part in cache.layers[0]:
        part.fill_(torch.nan)
    plain = REFERENCE.new_kv_cache(CacheSpec(1, 2, 128, torch.float64), blocks, 16)
    wanted_batch = step(work, 16, plain)
    fill(REFERENCE, plain, k.double(), v.double(), wanted_batch)
    wanted = REFERENCE.attention(q.double(), 0, wanted_batch, options)
    batch = step(work, 16, cache)
    slots = [
        int(batch.block_tables[i, p // 16]) * 16 + p % 16
        for i, length in enumerate(batch.context_lengths)
        for p in range(length)
    ]
    on_device = batch.on(kernels.device)
    whole = replace(on_device, slots=torch.tensor(slots, device=kernels.device))
    kernels.store_kv(k.to(kernels.device), v.to(kernels.device), 0, whole)
    found = kernels.attention(q.to(kernels.device), 0, on_device, options)
    assert error(found.cpu(), wanted) <= TOLERANCE[dtype]
