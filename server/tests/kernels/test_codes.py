"""Codes out of words and of numbers: what plain arithmetic gives, with our own kernels and without."""

import numpy as np
import pytest
import torch
from text_generation_server.kernels import codes
from text_generation_server.kernels.codes import climb, spread_bits


@pytest.fixture(params=["native", "torch"], autouse=True)
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(codes, "_library", lambda: None)
    elif codes._library() is None:
        pytest.skip("our own kernels are not built here")


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("eights", [0, 1, 7, 40_000])
@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_those_that_numpy_finds(bits: int, eights: int, threads: int) -> None:
    torch.set_num_threads(threads)
    data = torch.randint(0, 256, (eights * bits,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    single = np.unpackbits(data.numpy(), bitorder="little").reshape(-1, bits)
    expected = (single << np.arange(bits)).sum(1).astype(np.uint8)
    assert np.array_equal(spread_bits(data, bits).numpy(), expected)
    torch.set_num_threads(1)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 200_000])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_code_is_that_of_the_highest_bound_below_a_number(count: int, threads: int) -> None:
    torch.set_num_threads(threads)
    bounds = np.linspace(-1, 1, 15, dtype=np.float32)
    wanted = np.random.default_rng(0).permutation(256)[:16].astype(np.uint8)
    steps = [(-float("inf"), int(wanted[0]))]
    steps += [(float(b), int(wanted[i + 1]) - int(wanted[i]) & 255) for i, b in enumerate(bounds)]
    values = np.random.default_rng(1).normal(size=count).astype(np.float32)
    values[::5] = bounds[np.arange(len(values[::5])) % 15]  # a number that is a bound is not above it
    expected = wanted[np.searchsorted(bounds, values, side="left")]
    assert np.array_equal(climb(torch.from_numpy(values), steps).numpy(), expected)
    torch.set_num_threads(1)
