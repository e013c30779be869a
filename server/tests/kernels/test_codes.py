"""Codes in bits, and of numbers: what plain arithmetic gives, with our own kernels and without."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from text_generation_server.kernels import codes
from text_generation_server.kernels.codes import climb, pack, reorder, transpose_words, unpack

Bytes = NDArray[np.uint8]


@pytest.fixture(params=["native", "torch"], autouse=True)
def _library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(codes, "_library", lambda: None)
    elif codes._library() is None:
        pytest.skip("our own kernels are not built here")


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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 7), (2, 8), (5, 65), (300, 1030), (1, 100_000)])
@pytest.mark.parametrize("threads", [1, 2])
def test_codes_follow_each_other_in_the_order_of_numpys_bits(bits: int, shape: tuple[int, int], threads: int) -> None:
    torch.set_num_threads(threads)
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    expected = _packed(values.numpy(), bits)
    packed = pack(values, bits)
    assert np.array_equal(packed.numpy(), expected)
    assert np.array_equal(pack(values.t().contiguous().t(), bits).numpy(), expected)
    # Rows of a larger one, with bits of others behind them.
    large = torch.full((shape[0] + 2, expected.shape[1] + 3), 255, dtype=torch.uint8)
    large[1:-1, 1:-2] = packed
    for source in (packed, large[1:-1, 1:], large[1:-1, 1:-2].t().contiguous().t()):
        assert torch.equal(unpack(source, bits, shape[1]), values)
    torch.set_num_threads(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 7), (5, 65), (300, 1030)])
def test_columns_are_reordered_as_numpy_does(bits: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(bits)
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    order = torch.randperm(shape[1], generator=generator)
    large = torch.full((shape[0], shape[1] * bits // 8 + 9), 255, dtype=torch.uint8)
    packed = large[:, 2 : 2 + -(-shape[1] * bits // 8)]
    packed.copy_(pack(values, bits))
    assert np.array_equal(reorder(packed, bits, order).numpy(), _packed(values.numpy()[:, order.numpy()], bits))


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 2), (8, 17), (65, 40), (300, 33)])
@pytest.mark.parametrize(
    "places", [(0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7), (3, 7, 0, 1, 6, 2, 5, 4)], ids=str
)
def test_codes_of_words_lie_by_column(shape: tuple[int, int], places: tuple[int, ...]) -> None:
    words = np.random.default_rng(3).integers(0, 2**32, shape, dtype=np.uint32)
    codes = np.empty((shape[0], shape[1], 8), np.uint8)
    for i, place in enumerate(places):
        codes[:, :, place] = words >> np.uint32(4 * i) & np.uint32(15)
    found = transpose_words(torch.from_numpy(words.view(np.int32)), places)
    assert np.array_equal(found.numpy(), _packed(codes.reshape(shape[0], 8 * shape[1]).T, 4))


def _packed(values: Bytes, bits: int) -> Bytes:
    single = np.unpackbits(values[..., None], axis=-1, count=bits, bitorder="little")
    return np.packbits(single.reshape(len(values), values.shape[1] * bits), axis=-1, bitorder="little")
