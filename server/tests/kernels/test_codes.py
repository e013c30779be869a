"""Codes out of words, of numbers and in planes: what plain arithmetic gives, with our own kernels and without."""

import numpy as np
import pytest
import torch
from text_generation_server.kernels import codes
from text_generation_server.kernels.codes import PLANES, climb, new_planes, pack, spread_bits, unpack


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


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 7), (2, 8), (5, 65), (300, 1030), (1, 100_000)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_plane_has_the_bits_of_features_that_lie_a_plane_apart(
    bits: int, shape: tuple[int, int], threads: int
) -> None:
    torch.set_num_threads(threads)
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    expected, shift = [], 0
    for width in PLANES[bits]:
        slots = 8 // width
        filled = np.zeros((shape[0], -(-shape[1] // slots) * slots), np.int64)
        filled[:, : shape[1]] = values.numpy() >> shift & 2**width - 1
        by_slot = filled.reshape(shape[0], slots, filled.shape[1] // slots)
        expected.append((by_slot << width * np.arange(slots)[None, :, None]).sum(1))
        shift += width
    planes = pack(values, bits)
    assert all(np.array_equal(plane.numpy(), one) for plane, one in zip(planes, expected, strict=True))
    # Into some rows of larger ones, and from codes that do not lie row by row.
    large = [torch.full((shape[0] + 2, plane.shape[1] + 3), 255, dtype=torch.uint8) for plane in planes]
    inside = [plane[1:-1, 1:-2] for plane in large]
    pack(values.t().contiguous().t(), bits, inside)
    assert all(torch.equal(one, plane) for one, plane in zip(inside, planes, strict=True))
    assert all(int((one == 255).sum()) >= one.numel() - plane.numel() for one, plane in zip(large, planes, strict=True))
    for source in (planes, inside):
        for out in (torch.full(shape, 255, dtype=torch.uint8), torch.full(shape, 9.0)):
            assert torch.equal(unpack(source, bits, out), values.to(out.dtype))
    assert torch.equal(unpack(planes, bits, torch.full(shape[::-1], 255, dtype=torch.uint8).t()), values)
    assert [plane.shape for plane in new_planes(*shape, bits)] == [plane.shape for plane in planes]
    torch.set_num_threads(1)
