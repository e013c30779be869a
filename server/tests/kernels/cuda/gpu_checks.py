"""What only a GPU can show (`make test-gpu`): that tensor cores, the driver and our emulation agree.

Its name keeps it out of other runs.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from emulated import TOLERANCE, error
from test_against_reference import REFERENCE, ROWS, fill, random, step
from test_quantized_products import CODINGS, make
from text_generation_server.kernels.cuda.kernels import CudaKernels
from text_generation_server.kernels.interface import AttentionOptions, CacheSpec
from text_generation_server.kernels.select import select_kernels
from text_generation_server.kernels.weights import Coding, Integer


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
