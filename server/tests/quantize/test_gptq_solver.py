"""The solver against the paper's update in float64."""

import numpy as np
import paper
import pytest
import torch
from text_generation_server.quantize import gptq
from text_generation_server.quantize.rounding import Codes, Grid, output_error, round_to_nearest


def layer(out: int, num: int, seed: int = 0, dead: int = 0) -> tuple[paper.Matrix, paper.Matrix]:
    """A weight, and the moments of inputs that hang together and differ in size, as those of a model do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * num, num)) @ rng.standard_normal((num, num)) / num**0.5
    x *= np.exp(rng.standard_normal(num))
    x[:, rng.permutation(num)[:dead]] = 0
    return rng.standard_normal((out, num)) * 0.05, x.T @ x / len(x)


def solved(weight: paper.Matrix, hessian: paper.Matrix, dtype: torch.dtype, grid: Grid, size: int, order: bool,
           static: bool) -> Codes:  # fmt: skip
    factor = gptq.factorize(torch.from_numpy(hessian).to(dtype).clone(), 0.01, order)
    return gptq.solve(torch.from_numpy(weight).to(dtype), factor, grid, size, static)


@pytest.mark.parametrize(
    ("bits", "size", "sym", "order", "static", "num"),
    [
        (4, 128, True, False, False, 256),
        (4, 128, True, True, False, 256),
        (4, 128, True, True, True, 256),
        (4, 128, False, False, True, 200),
        (3, 64, False, True, False, 320),
        (2, 32, True, False, False, 160),
        (2, 16, False, True, True, 144),
        (8, -1, True, True, False, 130),
        (4, -1, False, False, False, 96),
        (4, 1024, True, True, False, 150),
    ],
)
def test_codes_are_those_of_the_paper_s_update(
    bits: int, size: int, sym: bool, order: bool, static: bool, num: int
) -> None:
    weight, hessian = layer(24, num, seed=num + bits, dead=3)
    columns = np.argsort(-np.diag(hessian), kind="stable") if order else np.arange(num)
    codes, scales, zeros, group_of = paper.gptq(
        weight, hessian, bits, size, sym=sym, damping=0.01, order=columns, static=static
    )
    found = solved(weight, hessian, torch.float64, Grid(bits, sym), size, order, static)
    assert found.group_of.tolist() == group_of.tolist()
    np.testing.assert_array_equal(found.scales.double().numpy(), scales)
    np.testing.assert_array_equal(found.zeros.numpy(), zeros)
    np.testing.assert_array_equal(found.codes.numpy(), codes)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_in_float32_hardly_a_code_differs_and_the_result_is_as_good(order: bool, static: bool) -> None:
    weight, hessian = layer(64, 384)
    exact, single = (
        solved(weight, hessian, dtype, Grid(4, True), 128, order, static) for dtype in (torch.float64, torch.float32)
    )
    same = (exact.codes == single.codes).double().mean()
    assert same > 0.97
    errors = [
        output_error(codes.dequantize().double() - torch.from_numpy(weight), torch.from_numpy(hessian))
        for codes in (exact, single)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


def test_the_error_is_far_below_that_of_rounding_to_nearest() -> None:
    weight, hessian = (torch.from_numpy(part).float() for part in layer(64, 256))
    nearest = round_to_nearest(weight, Grid(4, True), 128).dequantize()
    factor = gptq.factorize(hessian.clone(), 0.01, True)
    found = gptq.solve(weight, factor, Grid(4, True), 128, True).dequantize()
    assert output_error(found - weight, hessian) < 0.6 * output_error(nearest - weight, hessian)


def test_rounding_to_nearest_is_the_papers_too() -> None:
    weight, _ = layer(16, 200)
    for sym in (False, True):
        found = round_to_nearest(torch.from_numpy(weight), Grid(3, sym), 64).dequantize()
        np.testing.assert_allclose(found.double().numpy(), paper.rounded(weight, 3, 64, sym), rtol=1e-6)


def test_a_search_never_makes_the_grid_s_own_error_larger() -> None:
    weight = torch.from_numpy(layer(64, 128)[0])
    errors = []
    for search in (False, True):
        scale, zero = (x[:, None] for x in Grid(3, True, search).fit(weight))
        change = (Grid(3, True).round(weight, scale, zero) - zero) * scale - weight
        errors.append(change.abs().pow(2.4).sum(1))
    assert bool((errors[1] <= errors[0]).all()) and float(errors[1].sum()) < 0.9 * float(errors[0].sum())


@pytest.mark.parametrize("sym", [False, True])
def test_groups_of_zeros_and_of_one_sign_have_grids_that_every_reader_understands(sym: bool) -> None:
    weight = torch.stack([torch.zeros(32), torch.linspace(0.1, 1, 32), -torch.linspace(0.1, 1, 32)])
    codes = round_to_nearest(weight, Grid(4, sym), -1)
    assert bool((codes.zeros >= 1).all()) and bool((codes.scales > 0).all())
    assert float((codes.dequantize() - weight).abs().max()) < 0.08
    assert not bool(codes.dequantize()[0].any())


def test_damping_is_raised_until_the_hessian_is_positive_definite() -> None:
    hessian = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    hessian[0, 1] = hessian[1, 0] = 1.02  # as rounding errors may leave it
    factor = gptq.factorize(hessian, 0.001, False)
    assert factor.damping > 0.02
    assert bool(torch.isfinite(factor.upper).all())


def test_a_hessian_that_no_damping_helps_is_refused() -> None:
    with pytest.raises(gptq.NotPositiveDefiniteError, match="not positive definite even with"):
        gptq.factorize(torch.full((8, 8), 1e30) - torch.eye(8) * 5e31, 0.01, False)


def test_a_factor_is_that_of_the_inverse() -> None:
    _, hessian = layer(1, 64)
    factor = gptq.factorize(torch.from_numpy(hessian).clone(), 0.05, False)
    damped = hessian + 0.05 * np.diag(hessian).mean() * np.eye(64)
    upper = factor.upper.numpy()
    assert not np.tril(upper, -1).any()
    np.testing.assert_allclose(upper.T @ upper @ damped, np.eye(64), atol=1e-9)
